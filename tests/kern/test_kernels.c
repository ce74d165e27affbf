/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every kernel of every level this processor has, against the same sum in double precision. Arrays end 15
 * elements (the padding that kernels may read) before a page that cannot be read; gaps between rows hold
 * NaN, and nothing but the output may be written.
 */
#include "core/core.h"
#include "kernels/kernels.h"

#include "arrays.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LENGTH(a) ((int)(sizeof(a) / sizeof(a)[0]))
#define UNIT 0x1p-23

static struct fkv_kernels kernels; /* of the level under test */

static const fkv_dtype dtypes[] = {FKV_DTYPE_F32, FKV_DTYPE_F16, FKV_DTYPE_BF16};
static const int dims_list[] = {1,  2,  3,  7,  8,  9,  15, 16,  17,  24,  26,  31,
                                32, 33, 47, 48, 64, 65, 80, 120, 127, 128, 129, 256};
static const int rows_list[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33};
static const int tokens_list[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64};
static const int count_list[] = {1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 255, 257, 512, 1024};

/* ---- the four matrix products: out[r][j] = base + sum_i a[r][i] b[i][j] */

enum product { SCORES, WEIGH, CONTRACT, EXPAND };

struct product_case {
    enum product op;
    fkv_dtype dtype;
    int rows, inner, columns;
    int add;
};

static void product_call(const struct product_case *c, float *out, ptrdiff_t out_stride,
                         const float *a, ptrdiff_t a_stride, const struct stored *b, int rows) {
    enum fkv_store type = fkv_store_of(c->dtype);

    switch (c->op) {
    case SCORES:
        kernels.scores[type](out, out_stride, a, a_stride, b->data, c->inner, rows, c->add,
                             rows % 2 ? b->data : NULL);
        break;
    case WEIGH:
        kernels.weigh[type](out, out_stride, a, a_stride, b->data, c->columns, c->inner, rows,
                            rows % 2 ? b->data : NULL);
        break;
    case CONTRACT:
        kernels.contract[type](out, out_stride, a, a_stride, b->data, b->stride, c->inner,
                               c->columns, rows);
        break;
    case EXPAND:
        kernels.expand[type](out, out_stride, a, a_stride, b->data, b->stride, c->columns, c->inner,
                             rows);
        break;
    }
}

static void product_check(const struct product_case *c, const struct matrix *a,
                          const struct stored *b, const struct matrix *before,
                          const struct matrix *out) {
    ptrdiff_t inner_stride = c->op == EXPAND ? 1 : b->stride;
    ptrdiff_t column_stride = c->op == EXPAND ? b->stride : 1;
    bool add = c->op == WEIGH || (c->op == SCORES && c->add);

    for (int r = 0; r < c->rows; r++) {
        for (int j = 0; j < c->columns; j++) {
            double sum = add ? (double)before->x[r * before->stride + j] : 0;
            double size = fabs(sum);
            for (int i = 0; i < c->inner; i++) {
                double term = (double)a->x[r * a->stride + i] *
                              b->value[i * inner_stride + j * column_stride];
                sum += term;
                size += fabs(term);
            }
            near("out", r, j, (double)out->x[r * out->stride + j], sum,
                 (c->inner + 2) * UNIT * size / 2);
        }
    }
}

static void product_rows_alone(const struct product_case *c, const struct matrix *a,
                               const struct stored *b, const struct matrix *before,
                               const struct matrix *out) {
    struct matrix row;

    for (int r = 0; r < c->rows; r++) {
        matrix_init(&row, 1, c->columns);
        memcpy(row.x, before->x + r * before->stride, (size_t)c->columns * sizeof(float));
        product_call(c, row.x, row.stride, a->x + r * a->stride, a->stride, b, 1);
        if (memcmp(row.x, out->x + r * out->stride, (size_t)c->columns * sizeof(float)) != 0)
            fail_msg("%s: row %d alone differs", where, r);
        matrix_free(&row);
    }
}

static void product_run(const struct product_case *c) {
    struct matrix a, before, out;
    struct stored b;

    snprintf(where, sizeof where, "product %d type %d rows %d inner %d columns %d add %d", c->op,
             c->dtype, c->rows, c->inner, c->columns, c->add);
    matrix_init(&a, c->rows, c->inner);
    matrix_init(&before, c->rows, c->columns);
    matrix_init(&out, c->rows, c->columns);
    int stored_rows = c->op == EXPAND ? c->columns : c->inner;
    int stored_columns = c->op == EXPAND ? c->inner : c->columns;
    ptrdiff_t gap = c->op == CONTRACT || c->op == EXPAND ? random_int(&rng, 0, 20) : 0;
    stored_init(&b, c->dtype, stored_rows, stored_columns, stored_columns + gap);
    matrix_copy(&out, &before);
    product_call(c, out.x, out.stride, a.x, a.stride, &b, c->rows);
    product_check(c, &a, &b, &before, &out);
    matrix_check_gaps(&out);
    if (c->rows > 1)
        product_rows_alone(c, &a, &b, &before, &out);
    matrix_free(&a);
    matrix_free(&before);
    matrix_free(&out);
    stored_free(&b);
}

/* All pairs of the two sizes that matter, the number of rows drawn (or also all, if `rows` is given). */
static void product_sweep(enum product op, const int *inner, int inners, const int *columns,
                          int n_columns) {
    for (int type = 0; type < LENGTH(dtypes); type++) {
        for (int i = 0; i < inners; i++) {
            for (int j = 0; j < n_columns; j++) {
                if (random_quick() && (i + j) % 4 != 0)
                    continue;
                struct product_case c = {.op = op,
                                         .dtype = dtypes[type],
                                         .inner = inner[i],
                                         .columns = columns[j],
                                         .add = (int)random_int(&rng, 0, 1)};
                int most = c.inner * c.columns > 30000 ? 3 : LENGTH(rows_list) - 1;
                c.rows = rows_list[random_int(&rng, 0, most)];
                product_run(&c);
            }
        }
    }
}

static void scores(void **state) {
    static const int columns[] = {64, 64, 64};
    static const int none[] = {0};
    (void)state;

    product_sweep(SCORES, dims_list, LENGTH(dims_list), columns, LENGTH(columns));
    product_sweep(SCORES, none, 1, columns, 1);
    for (int r = 0; r < LENGTH(rows_list); r++) {
        struct product_case c = {SCORES, FKV_DTYPE_F16, rows_list[r], 64, 64, r & 1};
        product_run(&c);
    }
}

static void weigh(void **state) {
    (void)state;
    product_sweep(WEIGH, tokens_list, LENGTH(tokens_list), dims_list, LENGTH(dims_list));
    for (int r = 0; r < LENGTH(rows_list); r++) {
        struct product_case c = {WEIGH, FKV_DTYPE_F16, rows_list[r], 63, 80, 0};
        product_run(&c);
    }
}

static void contract(void **state) {
    (void)state;
    product_sweep(CONTRACT, dims_list, LENGTH(dims_list), count_list, LENGTH(count_list));
}

static void expand(void **state) {
    (void)state;
    product_sweep(EXPAND, count_list, LENGTH(count_list), dims_list, LENGTH(dims_list));
}

/* ---- interpolation and its adjoint */

static void taps_init(struct fkv_taps *taps, int cell, int width) {
    memset(taps, 0xff, sizeof *taps); /* taps beyond the width are NaN: reading them shows */
    taps->cell = cell;
    taps->width = width;
    for (int k = 0; k < width; k++) {
        for (int t = 0; t < 64; t++) {
            taps->tap[k][t] = width == 1 ? 1.0f : (float)random_normal(&rng);
            taps->by_token[t][k] = taps->tap[k][t];
        }
    }
}

static void interpolate_case(int cell, int width, int rows) {
    struct fkv_taps taps;
    struct matrix grid, out, alone;

    snprintf(where, sizeof where, "interpolate cell %d width %d rows %d", cell, width, rows);
    taps_init(&taps, cell, width);
    matrix_init(&grid, rows, 63 / cell + width);
    matrix_init(&out, rows, 64);
    kernels.interpolate(out.x, out.stride, grid.x, grid.stride, &taps, rows);
    matrix_check_gaps(&out);
    for (int r = 0; r < rows; r++) {
        for (int t = 0; t < 64; t++) {
            double sum = 0, size = 0;
            for (int k = 0; k < width; k++) {
                double term =
                    (double)taps.tap[k][t] * (double)grid.x[r * grid.stride + t / cell + k];
                sum += term;
                size += fabs(term);
            }
            near("s", r, t, (double)out.x[r * out.stride + t], sum, 5 * UNIT * size);
        }
        matrix_init(&alone, 1, 64);
        kernels.interpolate(alone.x, alone.stride, grid.x + r * grid.stride, grid.stride, &taps, 1);
        if (memcmp(alone.x, out.x + r * out.stride, 64 * sizeof(float)) != 0)
            fail_msg("%s: row %d alone differs", where, r);
        matrix_free(&alone);
    }
    matrix_free(&grid);
    matrix_free(&out);
}

static void spread_case(int cell, int width, int tokens, int rows) {
    struct fkv_taps taps;
    struct matrix grid, before, p, alone;
    int points = 63 / cell + width;

    snprintf(where, sizeof where, "spread cell %d width %d tokens %d rows %d", cell, width, tokens,
             rows);
    taps_init(&taps, cell, width);
    matrix_init(&before, rows, points);
    matrix_init(&grid, rows, points);
    matrix_copy(&grid, &before);
    matrix_init(&p, rows, tokens);
    kernels.spread(grid.x, grid.stride, p.x, p.stride, &taps, tokens, rows);
    matrix_check_gaps(&grid);
    for (int r = 0; r < rows; r++) {
        for (int i = 0; i < points; i++) {
            double sum = (double)before.x[r * before.stride + i], size = fabs(sum);
            for (int t = 0; t < tokens; t++) {
                int k = i - t / cell;
                if (k < 0 || k >= width)
                    continue;
                double term = (double)taps.tap[k][t] * (double)p.x[r * p.stride + t];
                sum += term;
                size += fabs(term);
            }
            near("grid", r, i, (double)grid.x[r * grid.stride + i], sum,
                 (width * cell + 2) * UNIT * size);
        }
        matrix_init(&alone, 1, points);
        memcpy(alone.x, before.x + r * before.stride, (size_t)points * sizeof(float));
        kernels.spread(alone.x, alone.stride, p.x + r * p.stride, p.stride, &taps, tokens, 1);
        if (memcmp(alone.x, grid.x + r * grid.stride, (size_t)points * sizeof(float)) != 0)
            fail_msg("%s: row %d alone differs", where, r);
        matrix_free(&alone);
    }
    matrix_free(&grid);
    matrix_free(&before);
    matrix_free(&p);
}

static void interpolate(void **state) {
    (void)state;
    for (int r = 0; r < LENGTH(rows_list); r++) {
        for (int cell = 1; cell <= 64; cell *= 2)
            interpolate_case(cell, FKV_TAPS, rows_list[r]);
        interpolate_case(1, 1, rows_list[r]);
    }
}

static void spread(void **state) {
    (void)state;
    for (int i = 0; i < LENGTH(tokens_list); i++) {
        for (int r = 0; r < LENGTH(rows_list); r++) {
            for (int cell = 1; cell <= 64; cell *= 2)
                spread_case(cell, FKV_TAPS, tokens_list[i], rows_list[r]);
            spread_case(1, 1, tokens_list[i], rows_list[r]);
        }
    }
}

/* ---- softmax */

static void softmax_case(int n, double deviation, double minus_infinities) {
    struct matrix s, before;
    float max = -1, sum = -1;
    double largest = -INFINITY, total = 0;

    snprintf(where, sizeof where, "softmax n %d deviation %g", n, deviation);
    matrix_init(&s, 1, n);
    matrix_init(&before, 1, n);
    for (int i = 0; i < n; i++) {
        before.x[i] = random_chance(&rng, minus_infinities)
                          ? -INFINITY
                          : (float)(random_normal(&rng) * deviation);
        largest = fmax(largest, (double)before.x[i]);
    }
    matrix_copy(&s, &before);
    kernels.softmax(s.x, n, &max, &sum);
    matrix_check_gaps(&s);
    assert_true((double)max == largest);
    for (int i = 0; i < n; i++) {
        /* the difference is one rounded subtraction; exp of it to 4 units in the last place */
        float x = largest == -INFINITY ? -INFINITY : before.x[i] - max;
        double want = exp((double)x);
        near("exp", 0, i, (double)s.x[i], want, 4 * UNIT * want + 0x1p-125);
        total += (double)s.x[i];
    }
    near("sum", 0, 0, (double)sum, total, n * UNIT * total);
    matrix_free(&s);
    matrix_free(&before);
}

static void softmax(void **state) {
    static const double deviations[] = {0, 0.1, 1, 10, 30, 1000, 1e30, 3e37};
    (void)state;

    for (int n = 1; n <= 1088; n += n < 80 ? 1 : 21) {
        softmax_case(n, deviations[random_int(&rng, 0, LENGTH(deviations) - 1)], 0);
        softmax_case(n, 3, 0);
        softmax_case(n, 20, 0.3);
        softmax_case(n, 1, 1);
    }
}

/* ---- conversions */

static float half_value(int type, unsigned pattern) {
    return type == FKV_STORE_F16 ? fkv_f16_to_f32((uint16_t)pattern)
                                 : fkv_bf16_to_f32((uint16_t)pattern);
}

static unsigned half_pattern(int type, float x) {
    return type == FKV_STORE_F16 ? fkv_f32_to_f16(x) : fkv_f32_to_bf16(x);
}

static void widen_half(int type, const uint16_t *pattern, const float *got, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float want = half_value(type, pattern[i]);
        double oracle = oracle_load(&pattern[i], dtypes[type]);
        bool same = isnan(want) ? isnan(got[i]) && isnan(oracle)
                                : memcmp(&want, &got[i], 4) == 0 && (double)want == oracle;
        if (!same)
            fail_msg("widen type %d: 0x%04x gives %g, want %g", type, pattern[i], (double)got[i],
                     (double)want);
    }
}

static void narrow_half(int type, const float *x, const uint16_t *got, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t oracle;
        unsigned want = half_pattern(type, x[i]);
        oracle_store(&oracle, dtypes[type], (double)x[i]);
        bool same = isnan(x[i]) ? isnan(half_value(type, got[i])) && isnan(half_value(type, want))
                                : got[i] == want && got[i] == oracle;
        if (!same)
            fail_msg("narrow type %d: %a gives 0x%04x, want 0x%04x", type, (double)x[i], got[i],
                     want);
    }
}

/* Lengths and offsets that leave every remainder; each conversion to and from guarded arrays. */
static void convert_chunks(int type, const uint16_t *pattern, const float *x, size_t total) {
    for (size_t at = 0; at < total;) {
        size_t n = (size_t)random_int(&rng, 0, 70);
        n = n < total - at ? n : total - at;
        struct guard wide, narrow, floats, halves;
        float *f = guard_alloc(&wide, n * 4, 0);
        uint16_t *h = guard_alloc(&narrow, n * 2, 0);
        float *source = guard_alloc(&floats, n * 4, PADDING * 4);
        uint16_t *codes = guard_alloc(&halves, n * 2, PADDING * 2);
        memcpy(source, x + at, n * 4);
        memcpy(codes, pattern + at, n * 2);
        kernels.widen[type](f, codes, n);
        kernels.narrow[type](h, source, n);
        widen_half(type, codes, f, n);
        narrow_half(type, source, h, n);
        assert_true(guard_intact(&wide) && guard_intact(&narrow));
        guard_free(&wide);
        guard_free(&narrow);
        guard_free(&floats);
        guard_free(&halves);
        at += n;
    }
}

static float any_float(int type) {
    union {
        uint32_t bits;
        float value;
    } u = {.bits = (uint32_t)random_next(&rng)};

    if (random_chance(&rng, 0.5)) {
        /* at and beside a value of the narrow type and a tie between two of them */
        u.value = half_value(type, (unsigned)random_int(&rng, 0, 65535));
        u.bits +=
            (uint32_t)random_int(&rng, -1, 1) + (random_chance(&rng, 0.5) ? 0x1000u : 0x8000u);
    }
    return u.value;
}

static void conversions(void **state) {
    enum { N = 65536 };
    uint16_t *pattern = malloc(N * sizeof *pattern);
    float *x = malloc(N * sizeof *x);
    (void)state;

    for (int type = FKV_STORE_F16; type <= FKV_STORE_BF16; type++) {
        for (int i = 0; i < N; i++) {
            pattern[i] = (uint16_t)i;
            x[i] = any_float(type);
        }
        convert_chunks(type, pattern, x, N);
        kernels.narrow[type](pattern, x, N);
        narrow_half(type, x, pattern, N);
        for (int i = 0; i < N; i++)
            pattern[i] = (uint16_t)i;
        kernels.widen[type](x, pattern, N);
        widen_half(type, pattern, x, N);
    }
    for (int i = 0; i < N; i++)
        x[i] = any_float(FKV_STORE_F16);
    float *copy = malloc(N * sizeof *copy);
    kernels.widen[FKV_STORE_F32](copy, x, N);
    assert_memory_equal(copy, x, N * sizeof *x);
    memset(copy, 0, N * sizeof *copy);
    kernels.narrow[FKV_STORE_F32](copy, x, N - 3);
    assert_memory_equal(copy, x, (N - 3) * sizeof *x);
    assert_true(copy[N - 3] == 0 && copy[N - 1] == 0);
    free(copy);
    free(pattern);
    free(x);
}

static void accumulate_case(fkv_dtype dtype, int channels, int count) {
    struct stored coef;
    struct matrix x;
    size_t size = oracle_element_size(dtype);

    snprintf(where, sizeof where, "accumulate type %d channels %d count %d", dtype, channels,
             count);
    stored_init(&coef, dtype, channels, count, count + random_int(&rng, 0, 20));
    matrix_init(&x, channels, count);
    kernels.accumulate[fkv_store_of(dtype)](coef.data, coef.stride, x.x, x.stride, channels, count);
    assert_true(guard_intact(&coef.guard));
    for (int c = 0; c < channels; c++) {
        const char *row = coef.data + (size_t)(c * coef.stride) * size;
        for (int n = 0; n < count; n++) {
            float sum = (float)(coef.value[c * coef.stride + n] + (double)x.x[c * x.stride + n]);
            near("coef", c, n, oracle_load(row + (size_t)n * size, dtype),
                 oracle_round((double)sum, dtype), 0);
        }
        if (c < channels - 1)
            assert_true(
                guard_untouched(row + (size_t)count * size, row + (size_t)coef.stride * size));
    }
    stored_free(&coef);
    matrix_free(&x);
}

static void accumulate(void **state) {
    (void)state;
    for (int type = 0; type < LENGTH(dtypes); type++) {
        for (int i = 0; i < LENGTH(count_list); i++) {
            for (int channels = 1; channels <= 9; channels += 4)
                accumulate_case(dtypes[type], channels, count_list[i]);
        }
    }
}

/* ---- FFT */

/* Draws an order of radices whose product is n; false if n has another prime factor. */
static bool radices_of(int n, int *radix, int *count) {
    *count = 0;
    while (n > 1) {
        int r = (int)random_int(&rng, 2, 5);
        if (n % 2 && n % 3 && n % 5)
            return false;
        if (n % r == 0) {
            radix[(*count)++] = r;
            n /= r;
        }
    }
    return true;
}

static void twiddles_of(float *w, int n, int radix) {
    for (int p = 0; p < n / radix; p++) {
        for (int k = 1; k < radix; k++) {
            double angle = -6.283185307179586 * (double)(p * k % n) / n;
            *w++ = (float)cos(angle);
            *w++ = (float)sin(angle);
        }
    }
}

/* The transform of one lane at `bins` of its frequencies; error and size of what was looked at. */
static void dft_compare(const float *const in[2], const float *const out[2], int n, int lane,
                        int step, double *error, double *size) {
    double *c = malloc((size_t)n * sizeof *c), *s = malloc((size_t)n * sizeof *s);

    for (int j = 0; j < n; j++) {
        c[j] = cos(6.283185307179586 * j / n);
        s[j] = -sin(6.283185307179586 * j / n);
    }
    for (int k = 0; k < n; k += step) {
        double re = 0, im = 0;
        for (int j = 0, at = 0; j < n; j++, at = (at + k) % n) {
            double x = (double)in[0][j * FKV_FFT_LANES + lane];
            double y = (double)in[1][j * FKV_FFT_LANES + lane];
            re += x * c[at] - y * s[at];
            im += x * s[at] + y * c[at];
        }
        double dr = (double)out[0][k * FKV_FFT_LANES + lane] - re;
        double di = (double)out[1][k * FKV_FFT_LANES + lane] - im;
        *error += dr * dr + di * di;
        *size += re * re + im * im;
    }
    free(c);
    free(s);
}

static void fft_case(int n, const int *radix, int passes) {
    size_t bytes = (size_t)n * FKV_FFT_LANES * sizeof(float);
    struct guard guards[7];
    float *array[6]; /* input, two work arrays; real and imaginary */
    double error = 0, size = 0;

    for (int i = 0; i < 6; i++)
        array[i] = guard_alloc(&guards[i], bytes, PADDING * 4);
    random_fill(&rng, array[0], (size_t)n * FKV_FFT_LANES, 1);
    random_fill(&rng, array[1], (size_t)n * FKV_FFT_LANES, 1);
    float **x = array, **y = array + 2;
    for (int pass = 0, s = 1, left = n; pass < passes; pass++) {
        int m = left / radix[pass];
        float *w = guard_alloc(&guards[6], (size_t)(m * (radix[pass] - 1)) * 8, PADDING * 4);
        twiddles_of(w, left, radix[pass]);
        kernels.fft_pass(y[0], y[1], x[0], x[1], w, radix[pass], m, s);
        guard_free(&guards[6]);
        s *= radix[pass];
        left = m;
        x = y;
        y = array + (pass % 2 ? 2 : 4);
    }
    for (int lane = 0; lane<FKV_FFT_LANES; lane += n> 200 ? 15 : 1)
        dft_compare((const float *const[]){array[0], array[1]}, (const float *const[]){x[0], x[1]},
                    n, lane, n / 300 + 1, &error, &size);
    snprintf(where, sizeof where, "fft of %d points in %d passes", n, passes);
    near("relative error", 0, 0, sqrt(error / size), 0, 6e-8 * (1 + passes));
    for (int i = 0; i < 6; i++) {
        assert_true(guard_intact(&guards[i]));
        guard_free(&guards[i]);
    }
}

static void fft(void **state) {
    int largest = random_quick() ? 400 : 3000;
    (void)state;

    for (int n = 2; n <= largest; n++) {
        int radix[16], passes;
        if (radices_of(n, radix, &passes))
            fft_case(n, radix, passes);
    }
}

static void rotate_case(int points, bool in_place) {
    int lanes = points * FKV_FFT_LANES;
    struct matrix xr, xi, cr, ci, zr, zi;

    snprintf(where, sizeof where, "rotate %d points%s", points, in_place ? " in place" : "");
    matrix_init(&xr, 1, lanes);
    matrix_init(&xi, 1, lanes);
    matrix_init(&zr, 1, lanes);
    matrix_init(&zi, 1, lanes);
    matrix_init(&cr, 1, points);
    matrix_init(&ci, 1, points);
    if (in_place) {
        matrix_copy(&zr, &xr);
        matrix_copy(&zi, &xi);
        kernels.rotate(zr.x, zi.x, zr.x, zi.x, cr.x, ci.x, points);
    } else
        kernels.rotate(zr.x, zi.x, xr.x, xi.x, cr.x, ci.x, points);
    matrix_check_gaps(&zr);
    matrix_check_gaps(&zi);
    for (int at = 0; at < lanes; at++) {
        double a = (double)xr.x[at], b = (double)xi.x[at];
        double c = (double)cr.x[at / FKV_FFT_LANES], s = (double)ci.x[at / FKV_FFT_LANES];
        double bound = 2 * UNIT * (fabs(a) + fabs(b)) * (fabs(c) + fabs(s));
        near("re", 0, at, (double)zr.x[at], a * c - b * s, bound);
        near("im", 0, at, (double)zi.x[at], a * s + b * c, bound);
    }
    struct matrix *all[] = {&xr, &xi, &cr, &ci, &zr, &zi};
    for (int i = 0; i < LENGTH(all); i++)
        matrix_free(all[i]);
}

static void rotate(void **state) {
    static const int sizes[] = {1, 2, 3, 7, 16, 17, 100};
    (void)state;

    for (int i = 0; i < LENGTH(sizes); i++) {
        rotate_case(sizes[i], false);
        rotate_case(sizes[i], true);
    }
}

/* ---- every test at every level, under one plan */

static const struct {
    const char *name;
    void (*run)(void **state);
} tests[] = {{"scores", scores},          {"weigh", weigh},
             {"contract", contract},      {"expand", expand},
             {"softmax", softmax},        {"interpolate", interpolate},
             {"spread", spread},          {"rotate", rotate},
             {"accumulate", accumulate},  {"fft", fft},
             {"conversions", conversions}};

#define N_TESTS LENGTH(tests)

struct run {
    uint64_t seed;
    fkv_cpu_level level;
    char name[40];
};

static int start(void **state) {
    const struct run *run = *state;

    random_init(&rng, run->seed);
    fkv_kernels_init(&kernels, run->level);
    return 0;
}

int main(void) {
    static const char *const names[] = {"", "reference", "avx2", "avx512"};
    static struct run runs[4 * N_TESTS];
    struct CMUnitTest list[4 * N_TESTS];
    uint64_t seed = random_seed("test_kernels", 1);
    int n = 0;

    for (fkv_cpu_level level = FKV_CPU_REFERENCE; level <= fkv_cpu_best_level(); level++) {
        for (int i = 0; i < N_TESTS; i++, n++) {
            runs[n].seed = seed;
            runs[n].level = level;
            snprintf(runs[n].name, sizeof runs[n].name, "%s %s", names[level], tests[i].name);
            list[n] = (struct CMUnitTest){.name = runs[n].name,
                                          .test_func = tests[i].run,
                                          .setup_func = start,
                                          .initial_state = &runs[n]};
        }
    }
    return _cmocka_run_group_tests("kernels", list, (size_t)n, NULL, NULL);
}
