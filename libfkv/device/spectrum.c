/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tables of a period on the device. Grids, taps and windows are the CPU's (codec/spectrum.h); transforms have
 * lengths of powers of two there, so that a period that is not a power of two times the grid's cell takes the chirp.
 */
#include "device/device.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PI 3.14159265358979323846
#define MOST_LOG_FFT 14 /* that shared memory has room for */
#define LEAD 3          /* grid points before a token's cell, as in spectrum.c */

/* What a period takes, and where it lies in the buffer. */
struct sizes {
    struct fkv_cuda_spectrum c; /* addresses are offsets */
    size_t bytes;
};

static size_t piece(struct sizes *s, uint64_t *at, size_t bytes) {
    *at = s->bytes;
    s->bytes += (bytes + 255) / 256 * 256;
    return bytes;
}

static bool power_of_two(int64_t n) {
    return n > 0 && (n & (n - 1)) == 0;
}

static fkv_status plan_sizes(struct fkv_ctx *ctx, const struct fkv_spectrum *sp, struct sizes *s) {
    *s = (struct sizes){.c = {.period = sp->period,
                              .bins = sp->bins,
                              .padded = sp->padded,
                              .stride = sp->stride,
                              .per_segment = (int32_t)fkv_tiles_per_segment(sp->period),
                              .cell = sp->taps.cell}};
    struct fkv_cuda_spectrum *c = &s->c;
    const int64_t cell = sp->taps.cell, points = sp->period / cell;
    c->points = (int32_t)(FKV_TILE / cell) + sp->taps.width - 1;
    c->rows = (c->points + 7) / 8 * 8;
    c->direct = sp->period % cell == 0 && points >= sp->bins && power_of_two(points);
    const int64_t need = c->direct ? points : sp->bins + sp->grid;
    while (c->log_fft < 40 && INT64_C(1) << c->log_fft < need) {
        c->log_fft++;
    }
    if (c->log_fft > MOST_LOG_FFT) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED,
                        "a period of %lld tokens with %d bins needs a transform of %lld points; on "
                        "CUDA at most %d",
                        (long long)sp->period, sp->bins, (long long)need, 1 << MOST_LOG_FFT);
    }
    c->grid = (int32_t)sp->grid;
    const size_t fft = (size_t)1 << c->log_fft, steps = (size_t)(c->points + 15) / 16;
    const size_t complex = 2 * sizeof(float);
    uint64_t head;
    piece(s, &head, sizeof *c);
    piece(s, &c->panel, (size_t)(64 * sp->stride) * sizeof(float));
    piece(s, &c->weight, (size_t)sp->stride * sizeof(float));
    piece(s, &c->pre, (size_t)sp->bins * complex);
    piece(s, &c->post, c->direct ? 0 : (size_t)sp->grid * complex);
    piece(s, &c->kernel, c->direct ? 0 : fft * complex);
    piece(s, &c->twiddles, fft / 2 * complex);
    piece(s, &c->taps, steps * 4096);
    piece(s, &c->spread, steps * 4096);
    return FKV_OK;
}

/* e^(i pi cell m^2 / T), from integers */
static void chirp(const struct fkv_spectrum *sp, int64_t m, double *re, double *im) {
    const uint64_t modulus = 2 * (uint64_t)sp->period;
    const uint64_t square = (uint64_t)m * (uint64_t)m % modulus;
    const double angle =
        PI * (double)(square * (uint64_t)sp->taps.cell % modulus) / (double)sp->period;
    *re = cos(angle);
    *im = sin(angle);
}

static void fill_factors(const struct fkv_spectrum *sp, const struct fkv_cuda_spectrum *c,
                         float *pre, float *post, float *twiddles) {
    const int64_t shift = sp->taps.width > 1 ? (int64_t)LEAD * sp->taps.cell : 0;
    for (int n = 0; n < sp->bins; n++) {
        double sr, si, cr = 1.0, ci = 0.0;
        fkv_spectrum_phase(sp, n, shift, &sr, &si);
        if (!c->direct) {
            chirp(sp, n, &cr, &ci);
        }
        pre[2 * n] = (float)(sp->window[n] * (sr * cr + si * ci));
        pre[2 * n + 1] = (float)(sp->window[n] * (sr * ci - si * cr));
    }
    for (int64_t i = 0; !c->direct && i < sp->grid; i++) {
        double re, im;
        chirp(sp, i, &re, &im);
        post[2 * i] = (float)re;
        post[2 * i + 1] = (float)im;
    }
    const int64_t n = INT64_C(1) << c->log_fft;
    for (int64_t k = 0; k < n / 2; k++) {
        const double angle = -2.0 * PI * (double)k / (double)n;
        twiddles[2 * k] = (float)cos(angle);
        twiddles[2 * k + 1] = (float)sin(angle);
    }
}

/* In place, decimation in frequency: the result is bit-reversed. */
static void transform(double *x, int64_t n) {
    for (int64_t half = n / 2; half; half /= 2) {
        for (int64_t i = 0; i < n; i++) {
            if (i & half) {
                continue;
            }
            double *a = x + 2 * i, *b = x + 2 * (i + half);
            const double angle = -PI * (double)(i & (half - 1)) / (double)half;
            const double c = cos(angle), s = sin(angle);
            const double re = a[0] - b[0], im = a[1] - b[1];
            a[0] += b[0];
            a[1] += b[1];
            b[0] = re * c - im * s;
            b[1] = re * s + im * c;
        }
    }
}

/* The transform of e^(-i chirp(m)), m = -(N-1) .. grid-1, wrapped around, over the length. */
static fkv_status fill_kernel(struct fkv_ctx *ctx, const struct fkv_spectrum *sp,
                              const struct fkv_cuda_spectrum *c, float *kernel) {
    const int64_t n = INT64_C(1) << c->log_fft;
    const size_t bytes = (size_t)n * 2 * sizeof(double);
    if (c->direct) {
        return FKV_OK;
    }
    double *x = fkv_heap_calloc(&ctx->heap, bytes);
    if (!x) {
        return fkv_fail_memory(ctx, bytes, "sequence");
    }
    for (int64_t m = 1 - sp->bins; m < sp->grid; m++) {
        double *to = x + 2 * (m < 0 ? m + n : m);
        chirp(sp, m, &to[0], &to[1]);
        to[1] = -to[1];
    }
    transform(x, n);
    for (int64_t i = 0; i < 2 * n; i++) {
        kernel[i] = (float)(x[i] / (double)n);
    }
    fkv_heap_free(&ctx->heap, x, bytes);
    return FKV_OK;
}

/* Element (r, col) of a fragment and of the one with what is left of it. */
static void put(uint16_t *fragment, int r, int col, float x, bool bf16) {
    const size_t at =
        (size_t)((r % 8 * 4 + col % 8 / 2) * 4 + r / 8 + 2 * (col / 8)) * 2 + (size_t)(col % 2);
    const uint16_t high = bf16 ? fkv_f32_to_bf16(x) : fkv_f32_to_f16(x);
    const float rest = x - (bf16 ? fkv_bf16_to_f32(high) : fkv_f16_to_f32(high));
    fragment[at] = high;
    fragment[256 + at] = bf16 ? fkv_f32_to_bf16(rest) : fkv_f32_to_f16(rest);
}

static void fill_taps(const struct fkv_spectrum *sp, bool bf16, uint16_t *taps, uint16_t *spread) {
    for (int t = 0; t < FKV_TILE; t++) {
        for (int k = 0; k < sp->taps.width; k++) {
            const int point = t / sp->taps.cell + k;
            const size_t fragment = (size_t)(point / 16 * 4 + t / 16) * 512;
            put(taps + fragment, t % 16, point % 16, sp->taps.tap[k][t], false);
            put(spread + fragment, point % 16, t % 16, sp->taps.tap[k][t], bf16);
        }
    }
}

static void *at(void *memory, uint64_t offset) {
    return (char *)memory + offset;
}

fkv_status fkv_device_spectrum_new(struct fkv_cache_object *cache,
                                   struct fkv_shared_spectrum *shared) {
    const struct fkv_spectrum *sp = shared->spectrum;
    struct fkv_device_buffer buffer = {0, 0};
    struct sizes s;
    void *memory;
    fkv_status status = plan_sizes(cache->ctx, sp, &s);
    if (status == FKV_OK) {
        status = fkv_device_reserve(cache, &buffer, s.bytes);
    }
    if (status == FKV_OK) {
        status = fkv_device_stage(cache, s.bytes, &memory);
    }
    if (status == FKV_OK) {
        memset(memory, 0, s.bytes);
        status = fill_kernel(cache->ctx, sp, &s.c, at(memory, s.c.kernel));
    }
    if (status == FKV_OK) {
        memcpy(at(memory, s.c.panel), sp->panel, (size_t)(64 * sp->stride) * sizeof(float));
        memcpy(at(memory, s.c.weight), sp->weight, (size_t)sp->stride * sizeof(float));
        fill_factors(sp, &s.c, at(memory, s.c.pre), at(memory, s.c.post), at(memory, s.c.twiddles));
        fill_taps(sp, cache->profile->storage_dtype == FKV_DTYPE_BF16, at(memory, s.c.taps),
                  at(memory, s.c.spread));
        uint64_t *addresses[] = {&s.c.panel,  &s.c.weight,   &s.c.pre,  &s.c.post,
                                 &s.c.kernel, &s.c.twiddles, &s.c.taps, &s.c.spread};
        for (size_t i = 0; i < sizeof addresses / sizeof addresses[0]; i++) {
            *addresses[i] += buffer.address;
        }
        memcpy(memory, &s.c, sizeof s.c);
        status = fkv_device_send(cache, buffer.address, s.bytes);
    }
    if (status != FKV_OK) {
        fkv_device_release(cache, &buffer);
        return status;
    }
    shared->device = buffer.address;
    shared->device_bytes = buffer.bytes;
    shared->log_fft = s.c.log_fft;
    shared->rows = s.c.rows;
    return FKV_OK;
}

void fkv_device_spectrum_free(struct fkv_cache_object *cache, struct fkv_shared_spectrum *shared) {
    struct fkv_device_buffer buffer = {shared->device, shared->device_bytes};
    fkv_device_release(cache, &buffer);
}
