/* SPDX-License-Identifier: Apache-2.0 */
#include "codec/spectrum.h"

#include <math.h>
#include <string.h>

#define PI 3.14159265358979323846
#define FINE 1024        /* entries of the fine table of roots */
#define LEAD 3           /* grid points before the first token's cell */
#define OVERSAMPLING 1.9 /* least T / (2 N cell) of a grid coarser than the tokens */
#define L FKV_FFT_LANES

static int pad16(int n) {
    return (n + 15) / 16 * 16;
}

static int used_bins(int64_t period, int bins) {
    return (int)fkv_min64(bins, period / 2 + 1);
}

int fkv_spectrum_stride(int64_t period, int bins) {
    return 2 * pad16(used_bins(period, bins));
}

/* The sizes that T and N imply, before anything is allocated. */
static bool plan_sizes(int64_t period, int bins, struct fkv_spectrum *sp) {
    if (period < 64 || period > INT64_C(1) << 40)
        return false;
    *sp = (struct fkv_spectrum){.period = period, .capacity = period / 64 * 64};
    sp->bins = used_bins(period, bins);
    sp->padded = pad16(sp->bins);
    sp->stride = 2 * sp->padded;
    int cell = 1;
    while (cell < 64 && (double)period >= OVERSAMPLING * 2.0 * sp->bins * (2 * cell))
        cell *= 2;
    sp->taps.cell = cell;
    sp->taps.width = cell > 1 ? FKV_TAPS : 1;
    sp->grid = sp->capacity / cell + sp->taps.width - 1;
    int64_t points = period / cell;
    sp->direct = period % cell == 0 && points >= sp->bins && fkv_fft_size(points) == points;
    sp->fft.n = sp->direct ? points : fkv_fft_size(sp->bins + sp->grid);
    return sp->fft.n <= INT32_MAX / L;
}

/* Hands out 64-byte aligned pieces of one block; with base NULL it only adds up. */
struct carver {
    char *base;
    size_t used;
};

static void *carve(struct carver *c, size_t count, size_t size) {
    char *p = c->base ? c->base + c->used : NULL;
    c->used += (count * size + 63) / 64 * 64;
    return p;
}

static int64_t coarse_roots(const struct fkv_spectrum *sp) {
    return 2 * sp->period / FINE + 1;
}

static size_t lay_out(struct fkv_spectrum *sp, void *base) {
    struct carver c = {base, (sizeof *sp + 63) / 64 * 64};
    size_t bins = (size_t)sp->bins, grid = (size_t)sp->grid, n = (size_t)sp->fft.n;
    sp->panel = carve(&c, 64 * (size_t)sp->stride, sizeof(float));
    sp->window = carve(&c, bins, sizeof(float));
    sp->weight = carve(&c, (size_t)sp->stride, sizeof(float));
    sp->roots = carve(&c, (size_t)(coarse_roots(sp) + FINE), 2 * sizeof(double));
    sp->pre_re = carve(&c, bins, sizeof(float));
    sp->pre_im = carve(&c, bins, sizeof(float));
    if (!sp->direct) {
        sp->post_re = carve(&c, grid, sizeof(float));
        sp->post_im = carve(&c, grid, sizeof(float));
        sp->kernel_re = carve(&c, n, sizeof(float));
        sp->kernel_im = carve(&c, n, sizeof(float));
    }
    return c.used;
}

size_t fkv_spectrum_bytes(int64_t period, int bins) {
    struct fkv_spectrum sp;
    return plan_sizes(period, bins, &sp) ? lay_out(&sp, NULL) + fkv_fft_bytes(sp.fft.n) : 0;
}

/* e^{2 pi i k / 2T}, 0 <= k < 2T */
static void root(const struct fkv_spectrum *sp, uint64_t k, double *re, double *im) {
    const double *a = sp->roots + 2 * (k / FINE);
    const double *b = sp->roots + 2 * (coarse_roots(sp) + (int64_t)(k % FINE));
    *re = a[0] * b[0] - a[1] * b[1];
    *im = a[0] * b[1] + a[1] * b[0];
}

static void fill_roots(struct fkv_spectrum *sp) {
    int64_t coarse = coarse_roots(sp);
    for (int64_t i = 0; i < coarse + FINE; i++) {
        double k = i < coarse ? (double)i * FINE : (double)(i - coarse);
        double angle = PI * k / (double)sp->period;
        sp->roots[2 * i] = cos(angle);
        sp->roots[2 * i + 1] = sin(angle);
    }
}

void fkv_spectrum_phase(const struct fkv_spectrum *sp, int64_t n, int64_t t, double *c, double *s) {
    uint64_t k = (uint64_t)n * (uint64_t)t % (uint64_t)sp->period;
    root(sp, 2 * k, c, s);
}

static void fill_panel(struct fkv_spectrum *sp) {
    memset(sp->panel, 0, 64 * (size_t)sp->stride * sizeof(float));
    for (int j = 0; j < 64; j++)
        for (int n = 0; n < sp->bins; n++) {
            double c, s;
            fkv_spectrum_phase(sp, n, j, &c, &s);
            sp->panel[j * sp->stride + n] = (float)c;
            sp->panel[j * sp->stride + sp->padded + n] = (float)s;
        }
    memset(sp->weight, 0, (size_t)sp->stride * sizeof(float));
    for (int n = 1; n < sp->bins; n++) {
        float w = 2 * (int64_t)n == sp->period ? 2.0f : 4.0f;
        sp->weight[n] = sp->weight[sp->padded + n] = w;
    }
}

static double bessel_i0(double x) {
    double term = 1.0, sum = 1.0;
    for (int k = 1; term > sum * 1e-18; k++) {
        term *= x * x / (4.0 * k * k);
        sum += term;
    }
    return sum;
}

/* Taps and window of the Kaiser-Bessel function with the shape that suits the oversampling. */
static void fill_window(struct fkv_spectrum *sp) {
    struct fkv_taps *taps = &sp->taps;
    if (taps->width == 1) {
        for (int t = 0; t < 64; t++)
            taps->tap[0][t] = taps->by_token[t][0] = 1.0f;
        for (int n = 0; n < sp->bins; n++)
            sp->window[n] = 1.0f;
        return;
    }
    const double w = FKV_TAPS;
    double sigma = (double)sp->period / (2.0 * sp->bins * taps->cell);
    double beta = PI * sqrt(w * w / (sigma * sigma) * (sigma - 0.5) * (sigma - 0.5) - 0.8);
    for (int t = 0; t < 64; t++)
        for (int k = 0; k < FKV_TAPS; k++) {
            double x = (double)(t % taps->cell) / taps->cell - (k - LEAD);
            double u = 1.0 - 4.0 * x * x / (w * w);
            double value = u > 0.0 ? bessel_i0(beta * sqrt(u)) / bessel_i0(beta) : 0.0;
            taps->tap[k][t] = taps->by_token[t][k] = (float)value;
        }
    for (int n = 0; n < sp->bins; n++) {
        double f = PI * w * n * taps->cell / (double)sp->period, d = sqrt(beta * beta - f * f);
        sp->window[n] = (float)(bessel_i0(beta) * d / (w * sinh(d)));
    }
}

static int64_t lead(const struct fkv_spectrum *sp) {
    return sp->taps.width > 1 ? LEAD : 0;
}

/* e^{i pi cell m^2 / T}: the chirp of nm = (n^2 + m^2 - (m - n)^2) / 2 */
static void chirp(const struct fkv_spectrum *sp, int64_t m, double *re, double *im) {
    uint64_t modulus = 2 * (uint64_t)sp->period;
    uint64_t square = (uint64_t)m * (uint64_t)m % modulus;
    root(sp, square * (uint64_t)sp->taps.cell % modulus, re, im);
}

static void fill_factors(struct fkv_spectrum *sp) {
    for (int n = 0; n < sp->bins; n++) {
        double sr, si, cr = 1.0, ci = 0.0;
        fkv_spectrum_phase(sp, n, lead(sp) * sp->taps.cell, &sr, &si);
        if (!sp->direct)
            chirp(sp, n, &cr, &ci);
        sp->pre_re[n] = (float)(sp->window[n] * (sr * cr + si * ci)); /* e^{-i shift} e^{i chirp} */
        sp->pre_im[n] = (float)(sp->window[n] * (sr * ci - si * cr));
    }
    for (int64_t i = 0; !sp->direct && i < sp->grid; i++) {
        double re, im;
        chirp(sp, i, &re, &im);
        sp->post_re[i] = (float)re;
        sp->post_im[i] = (float)im;
    }
}

/* The transform of b_m = e^{-i chirp(m)}, m = -(N-1) .. grid-1, wrapped around, over the FFT's size. */
static fkv_status fill_kernel(struct fkv_heap *heap, const struct fkv_kernels *kernels,
                              struct fkv_spectrum *sp) {
    size_t floats = (size_t)sp->fft.n * L, bytes = 4 * floats * sizeof(float);
    float *work = fkv_heap_calloc(heap, bytes);
    if (!work)
        return FKV_ERR_NOMEM;
    struct fkv_lanes lanes = {work, work + floats, work + 2 * floats, work + 3 * floats};
    for (int64_t m = 1 - sp->bins; m < sp->grid; m++) {
        double re, im;
        chirp(sp, m < 0 ? -m : m, &re, &im);
        int64_t at = (m < 0 ? m + sp->fft.n : m) * L;
        lanes.re[at] = (float)re;
        lanes.im[at] = (float)-im;
    }
    fkv_fft_run(kernels, &sp->fft, &lanes);
    for (int64_t i = 0; i < sp->fft.n; i++) {
        sp->kernel_re[i] = lanes.re[i * L] / (float)sp->fft.n;
        sp->kernel_im[i] = lanes.im[i * L] / (float)sp->fft.n;
    }
    fkv_heap_free(heap, work, bytes);
    return FKV_OK;
}

fkv_status fkv_spectrum_create(struct fkv_heap *heap, const struct fkv_kernels *kernels,
                               int64_t period, int bins, struct fkv_spectrum **out) {
    struct fkv_spectrum sizes;
    *out = NULL;
    if (!plan_sizes(period, bins, &sizes))
        return FKV_ERR_LIMIT;
    size_t bytes = lay_out(&sizes, NULL);
    struct fkv_spectrum *sp = fkv_heap_alloc(heap, bytes);
    if (!sp)
        return FKV_ERR_NOMEM;
    *sp = sizes;
    sp->bytes = lay_out(sp, sp);
    fkv_status status = fkv_fft_init(heap, sizes.fft.n, &sp->fft);
    if (status == FKV_OK) {
        fill_roots(sp);
        fill_panel(sp);
        fill_window(sp);
        fill_factors(sp);
        if (!sp->direct)
            status = fill_kernel(heap, kernels, sp);
    }
    if (status != FKV_OK) {
        fkv_spectrum_destroy(heap, sp);
        return status;
    }
    *out = sp;
    return FKV_OK;
}

void fkv_spectrum_destroy(struct fkv_heap *heap, struct fkv_spectrum *sp) {
    if (!sp)
        return;
    fkv_fft_free(heap, &sp->fft);
    fkv_heap_free(heap, sp, sp->bytes);
}

void fkv_spectrum_basis(const struct fkv_spectrum *sp, int64_t first, float *basis) {
    float *cos_first = basis,
          *sin_first = basis + sp->padded; /* row 0 holds the rotation meanwhile */
    const double scale = 0.5 / (double)sp->period;
    memset(basis, 0, (size_t)sp->stride * sizeof(float));
    for (int n = 0; n < sp->bins; n++) {
        double c, s;
        fkv_spectrum_phase(sp, n, first, &c, &s);
        cos_first[n] = (float)(c * scale);
        sin_first[n] = (float)(s * scale);
    }
    for (int j = 63; j >= 1; j--) { /* row 0 is its own product: panel row 0 is cos 0, sin 0 */
        const float *c = sp->panel + j * sp->stride, *s = c + sp->padded;
        float *to_cos = basis + j * sp->stride, *to_sin = to_cos + sp->padded;
        for (int n = 0; n < sp->padded; n++) {
            to_cos[n] = c[n] * cos_first[n] - s[n] * sin_first[n];
            to_sin[n] = s[n] * cos_first[n] + c[n] * sin_first[n];
        }
    }
}

/* sum_{l < length} e^{i l x} = sin(length x / 2) / sin(x / 2) * e^{i (length - 1) x / 2} */
void fkv_spectrum_ones(const struct fkv_spectrum *sp, int64_t length, float *row) {
    uint64_t modulus = 2 * (uint64_t)sp->period;
    memset(row, 0, (size_t)sp->stride * sizeof(float));
    row[0] = (float)(0.5 * (double)length / (double)sp->period);
    for (int n = 1; n < sp->bins && length > 0; n++) {
        double cosine, above, below, re, im;
        root(sp, (uint64_t)n * (uint64_t)length % modulus, &cosine, &above);
        root(sp, (uint64_t)n, &cosine, &below);
        root(sp, (uint64_t)n * (uint64_t)(length - 1) % modulus, &re, &im);
        double size = 0.5 * above / below / (double)sp->period;
        row[n] = (float)(size * re);
        row[sp->padded + n] = (float)(size * im);
    }
}

size_t fkv_spectrum_scratch(const struct fkv_spectrum *sp) {
    return 4 * (size_t)sp->fft.n * L * sizeof(float);
}

static struct fkv_lanes zeroed_lanes(const struct fkv_spectrum *sp, void *scratch) {
    size_t floats = (size_t)sp->fft.n * L;
    float *f = scratch;
    memset(f, 0, 2 * floats * sizeof(float));
    return (struct fkv_lanes){f, f + floats, f + 2 * floats, f + 3 * floats};
}

/* Circular convolution with the chirp kernel, or with the reversed conjugate of it for the adjoint. Both
 * arrays exchanged, z * k becomes z * conj(k), and a transform becomes its inverse. */
static void convolve(const struct fkv_spectrum *sp, const struct fkv_kernels *kernels,
                     struct fkv_lanes *z, bool adjoint) {
    fkv_fft_run(kernels, &sp->fft, z);
    float *re = adjoint ? z->im : z->re, *im = adjoint ? z->re : z->im;
    kernels->rotate(re, im, re, im, sp->kernel_re, sp->kernel_im, (int)sp->fft.n);
    struct fkv_lanes swapped = {z->im, z->re, z->im2, z->re2};
    fkv_fft_run(kernels, &sp->fft, &swapped);
    *z = (struct fkv_lanes){swapped.im, swapped.re, swapped.im2, swapped.re2};
}

void fkv_spectrum_to_grid(const struct fkv_spectrum *sp, const struct fkv_kernels *kernels,
                          const float *row, ptrdiff_t row_stride, float *grid,
                          ptrdiff_t grid_stride, int rows, void *scratch) {
    struct fkv_lanes z = zeroed_lanes(sp, scratch);
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < sp->bins; n++) {
            float a = row[r * row_stride + n], b = row[r * row_stride + sp->padded + n];
            z.re[n * L + r] = a * sp->pre_re[n] + b * sp->pre_im[n];
            z.im[n * L + r] = a * sp->pre_im[n] - b * sp->pre_re[n];
        }
    if (sp->direct) {
        struct fkv_lanes swapped = {z.im, z.re, z.im2, z.re2};
        fkv_fft_run(kernels, &sp->fft, &swapped);
        for (int64_t i = 0, at = 0; i < sp->grid; i++, at = at + 1 < sp->fft.n ? at + 1 : 0)
            for (int r = 0; r < rows; r++)
                grid[r * grid_stride + i] = swapped.im[at * L + r];
        return;
    }
    convolve(sp, kernels, &z, false);
    for (int64_t i = 0; i < sp->grid; i++)
        for (int r = 0; r < rows; r++)
            grid[r * grid_stride + i] =
                sp->post_re[i] * z.re[i * L + r] - sp->post_im[i] * z.im[i * L + r];
}

void fkv_spectrum_from_grid(const struct fkv_spectrum *sp, const struct fkv_kernels *kernels,
                            const float *grid, ptrdiff_t grid_stride, float *row,
                            ptrdiff_t row_stride, int rows, void *scratch) {
    struct fkv_lanes z = zeroed_lanes(sp, scratch);
    for (int64_t i = 0, at = 0; i < sp->grid; i++, at = at + 1 < sp->fft.n ? at + 1 : 0)
        for (int r = 0; r < rows; r++) {
            float g = grid[r * grid_stride + i];
            if (sp->direct) {
                z.re[at * L + r] += g;
            } else {
                z.re[i * L + r] = g * sp->post_re[i];
                z.im[i * L + r] = -g * sp->post_im[i];
            }
        }
    if (sp->direct)
        fkv_fft_run(kernels, &sp->fft, &z);
    else
        convolve(sp, kernels, &z, true);
    for (int r = 0; r < rows; r++) {
        float *to = row + r * row_stride;
        memset(to, 0, (size_t)sp->stride * sizeof(float));
        for (int n = 0; n < sp->bins; n++) {
            float zr = z.re[n * L + r], zi = z.im[n * L + r];
            to[n] = zr * sp->pre_re[n] + zi * sp->pre_im[n];
            to[sp->padded + n] = zr * sp->pre_im[n] - zi * sp->pre_re[n];
        }
    }
}
