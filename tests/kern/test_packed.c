/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels of packed residuals, of every level this processor has, in double precision. Codes end right
 * before a page that cannot be read; other arrays 15 elements before it.
 */
#include "core/core.h"
#include "kernels/kernels.h"

#include "arrays.h"

#include <math.h>
#include <stdio.h>

#define LENGTH(a) ((int)(sizeof(a) / sizeof(a)[0]))
#define UNIT 0x1p-23
#define MAX_CHANNELS 256

static struct fkv_kernels kernels; /* of the level under test */

static const int bits_of[FKV_N_PACKED] = {8, 4, 3, 2};
static const int rows_list[] = {1, 2, 3, 4, 5, 6, 7, 8, 13, 17, 32};
static const int tokens_list[] = {64, 0, 1, 7, 15, 16, 17, 31, 32, 33, 48, 63};
/* of 8, 4, 3 and 2 bits */
static const uint16_t counts_list[][FKV_N_PACKED] = {
    {0, 0, 0, 0},   {1, 0, 0, 0},     {0, 1, 0, 0},     {0, 0, 1, 0},   {0, 0, 0, 1},
    {1, 1, 1, 1},   {0, 0, 0, 16},    {0, 16, 0, 0},    {0, 0, 17, 0},  {15, 0, 0, 31},
    {7, 8, 9, 10},  {0, 33, 0, 31},   {64, 0, 0, 64},   {0, 0, 128, 0}, {3, 48, 2, 75},
    {0, 128, 0, 0}, {32, 32, 32, 32}, {64, 64, 64, 64}, {0, 0, 0, 256}, {256, 0, 0, 0},
    {0, 0, 255, 1}, {5, 0, 47, 0},    {0, 20, 0, 31},   {1, 2, 33, 65}, {0, 9, 0, 8},
};

/* ---- the layout, as kernels.h has it */

static void put_bits(uint8_t *p, long bit, int bits, unsigned code) {
    for (int i = 0; i < bits; i++, bit++)
        p[bit / 8] = (uint8_t)((p[bit / 8] & ~(1u << bit % 8)) | (code >> i & 1) << bit % 8);
}

static unsigned get_bits(const uint8_t *p, long bit, int bits) {
    unsigned code = 0;
    for (int i = 0; i < bits; i++, bit++)
        code |= (p[bit / 8] >> bit % 8 & 1u) << i;
    return code;
}

/* Bits of the low part of a code (all of it, but two of three bits), and where they begin in a tile of a class
 * of n channels; where the high bit of a code of three bits is. */
static int low_bits(int bits) {
    return bits == 3 ? 2 : bits;
}
static long low_at(bool keys, int bits, int n, int c, int t) {
    const int b = low_bits(bits);
    if (keys && bits == 8)
        return ((long)c * 64 + t) * 8;
    if (keys)
        return (long)c * 64 * bits + t % 16 * 4 * b + t / 16 * b;
    return ((long)(t / (32 / b)) * n + c) * 32 + t % (32 / b) * b;
}
static long high_at(bool keys, int n, int c, int t) {
    return keys ? (long)c * 192 + 128 + t : (long)n * 128 + ((long)(t / 32) * n + c) * 32 + t % 32;
}

static void put_code(bool keys, uint8_t *class, int bits, int n, int c, int t, unsigned code) {
    put_bits(class, low_at(keys, bits, n, c, t), low_bits(bits), code);
    if (bits == 3)
        put_bits(class, high_at(keys, n, c, t), 1, code >> 2);
}

static unsigned get_code(bool keys, const uint8_t *class, int bits, int n, int c, int t) {
    unsigned code = get_bits(class, low_at(keys, bits, n, c, t), low_bits(bits));
    return bits == 3 ? code | get_bits(class, high_at(keys, n, c, t), 1) << 2 : code;
}

/* ---- a panel of random codes */

struct panel {
    struct guard guard, scale_guard, zero_guard;
    uint8_t *data;
    uint16_t *scale, *zero;
    int channels;
    unsigned code[MAX_CHANNELS][64];
};

static void panel_init(struct panel *p, const uint16_t *counts, bool keys) {
    size_t bytes = 0;
    p->channels = 0;
    for (int w = 0; w < FKV_N_PACKED; w++) {
        bytes += (size_t)(8 * bits_of[w]) * counts[w];
        p->channels += counts[w];
    }
    p->data = guard_alloc(&p->guard, bytes, 0);
    p->scale = guard_alloc(&p->scale_guard, (size_t)p->channels * 2, 0);
    p->zero = guard_alloc(&p->zero_guard, (size_t)p->channels * 2, 0);
    uint8_t *class = p->data;
    int at = 0;
    for (int w = 0; w < FKV_N_PACKED; class += 8 * bits_of[w] * counts[w], w++)
        for (int c = 0; c < counts[w]; c++, at++) {
            p->scale[at] = fkv_f32_to_f16((float)random_uniform(&rng));
            p->zero[at] = fkv_f32_to_f16((float)random_normal(&rng));
            for (int t = 0; t < 64; t++) {
                p->code[at][t] = (unsigned)random_int(&rng, 0, (1 << bits_of[w]) - 1);
                put_code(keys, class, bits_of[w], counts[w], c, t, p->code[at][t]);
            }
        }
}

static void panel_free(struct panel *p) {
    guard_free(&p->guard);
    guard_free(&p->scale_guard);
    guard_free(&p->zero_guard);
}

/* Rows of several calls must be those of one call, bit for bit. */
static void same_row(const char *what, const float *a, const float *b, int n) {
    if (memcmp(a, b, (size_t)n * sizeof *a) != 0)
        fail_msg("%s: %s depends on the number of rows", where, what);
}

static void check_scores(const uint16_t *counts, int rows, int add) {
    struct panel p;
    struct matrix q, s, before, alone;
    float base[32];
    panel_init(&p, counts, true);
    matrix_init(&q, rows, p.channels + 1);
    matrix_init(&s, rows, 64);
    matrix_init(&before, rows, 64);
    matrix_init(&alone, 1, 64);
    matrix_copy(&s, &before);
    random_fill(&rng, base, 32, 1);
    kernels.scores_packed(s.x, s.stride, q.x, q.stride, base, p.data, counts, rows, add,
                          rows % 2 ? p.data : NULL);
    for (int r = 0; r < rows; r++) {
        for (int t = 0; t < 64; t++) {
            double sum = (double)base[r] + (add ? (double)before.x[r * before.stride + t] : 0);
            double size = 2 * fabs(sum) + 1;
            for (int c = 0; c < p.channels; c++) {
                double term = (double)q.x[r * q.stride + c] * p.code[c][t];
                sum += term;
                size += fabs(term);
            }
            near("scores", r, t, (double)s.x[r * s.stride + t], sum,
                 UNIT * size * (p.channels + 2) / 2);
        }
        memcpy(alone.x, before.x + r * before.stride, 64 * sizeof(float));
        kernels.scores_packed(alone.x, alone.stride, q.x + r * q.stride, q.stride, base + r, p.data,
                              counts, 1, add, NULL);
        same_row("scores", alone.x, s.x + r * s.stride, 64);
    }
    matrix_check_gaps(&s);
    matrix_free(&q);
    matrix_free(&s);
    matrix_free(&before);
    matrix_free(&alone);
    panel_free(&p);
}

static void check_weigh(const uint16_t *counts, int rows, int tokens) {
    struct panel p;
    struct matrix weights, o, before, alone;
    panel_init(&p, counts, false);
    matrix_init(&weights, rows, tokens > 0 ? tokens : 1);
    matrix_init(&o, rows, p.channels + 1);
    matrix_init(&before, rows, p.channels + 1);
    matrix_init(&alone, 1, p.channels + 1);
    matrix_copy(&o, &before);
    kernels.weigh_packed(o.x, o.stride, weights.x, weights.stride, p.data, counts, p.scale, p.zero,
                         tokens, rows, rows % 2 ? p.data : NULL);
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < p.channels; c++) {
            double was = (double)before.x[r * before.stride + c], sum = was, size = fabs(was) + 1;
            for (int t = 0; t < tokens; t++) {
                double weight = (double)weights.x[r * weights.stride + t];
                double step = (double)fkv_f16_to_f32(p.scale[c]) * p.code[c][t];
                double level = (double)fkv_f16_to_f32(p.zero[c]);
                sum += weight * (step + level);
                size += fabs(weight) * (fabs(step) + fabs(level));
            }
            near("output", r, c, (double)o.x[r * o.stride + c], sum,
                 UNIT * size * (tokens + 4) / 2);
        }
        if (o.x[r * o.stride + p.channels] != before.x[r * before.stride + p.channels])
            fail_msg("%s: wrote behind the last channel", where);
        memcpy(alone.x, before.x + r * before.stride, (size_t)(p.channels + 1) * sizeof(float));
        kernels.weigh_packed(alone.x, alone.stride, weights.x + r * weights.stride, weights.stride,
                             p.data, counts, p.scale, p.zero, tokens, 1, NULL);
        same_row("output", alone.x, o.x + r * o.stride, p.channels);
    }
    matrix_check_gaps(&o);
    matrix_free(&weights);
    matrix_free(&o);
    matrix_free(&before);
    matrix_free(&alone);
    panel_free(&p);
}

static void test_products(void **state) {
    (void)state;
    const int step = random_quick() ? 3 : 1;
    for (int i = 0; i < LENGTH(counts_list); i++) {
        const uint16_t *counts = counts_list[i];
        for (int j = i % step; j < LENGTH(rows_list); j += step) {
            snprintf(where, sizeof where, "%d %d %d %d channels, %d rows", counts[0], counts[1],
                     counts[2], counts[3], rows_list[j]);
            check_scores(counts, rows_list[j], (i + j) % 2);
            for (int k = 0; k < LENGTH(tokens_list); k += 1 + (j > 2) * 5)
                check_weigh(counts, rows_list[j], tokens_list[k]);
        }
    }
}

static void test_fold(void **state) {
    (void)state;
    for (int i = 0; i < LENGTH(counts_list); i++)
        for (int rows = 1; rows < 6; rows++) {
            struct panel p;
            struct matrix q, y;
            float base[6];
            panel_init(&p, counts_list[i], true);
            matrix_init(&q, rows, p.channels + 1);
            matrix_init(&y, rows, p.channels + 1);
            struct matrix before = y;
            before.x = memcpy(malloc((size_t)(rows * y.stride + 16) * sizeof(float)), y.x,
                              (size_t)((rows - 1) * y.stride + y.columns) * sizeof(float));
            base[rows] = 5;
            snprintf(where, sizeof where, "fold of %d channels, %d rows", p.channels, rows);
            kernels.fold(y.x, y.stride, base, q.x, q.stride, p.scale, p.zero, p.channels, rows);
            for (int r = 0; r < rows; r++) {
                double sum = 0, size = 0;
                for (int c = 0; c < p.channels; c++) {
                    float x = q.x[r * q.stride + c];
                    assert_true(y.x[r * y.stride + c] == x * fkv_f16_to_f32(p.scale[c]));
                    sum += (double)x * (double)fkv_f16_to_f32(p.zero[c]);
                    size += fabs((double)x * (double)fkv_f16_to_f32(p.zero[c]));
                }
                near("base", r, 0, (double)base[r], sum, UNIT * size * (p.channels + 1) / 2);
                assert_true(y.x[r * y.stride + p.channels] == before.x[r * y.stride + p.channels]);
            }
            assert_true(base[rows] == 5);
            matrix_check_gaps(&y);
            free(before.x);
            matrix_free(&q);
            matrix_free(&y);
            panel_free(&p);
        }
}

/* ---- coding */

enum series { NORMAL, WAVE, CONSTANT, ZERO, TINY, LARGEST, ALTERNATING, OFFSET, SPIKE, BROKEN };
enum { N_SERIES = BROKEN + 1 };

static float sample(enum series kind, int t, float level) {
    switch (kind) {
    case NORMAL:
        return (float)random_normal(&rng);
    case WAVE:
        return (float)sin(t * 0.1) * level;
    case CONSTANT:
        return level;
    case ZERO:
        return 0.0f;
    case TINY:
        return (float)ldexp(random_normal(&rng), -130);
    case LARGEST:
        return t % 3 ? 65504.0f : -65504.0f;
    case ALTERNATING:
        return t % 2 ? level : -level;
    case OFFSET:
        return 1000.0f + (float)random_normal(&rng) * 0.01f;
    case SPIKE:
        return t == 37 ? 100.0f : (float)random_normal(&rng) * 0.01f;
    default:
        return t == 63 ? (level > 0 ? INFINITY : NAN) : level;
    }
}

struct coding_case {
    bool keys;
    int bits, channels, tiles;
};

static void check_series(const struct coding_case *k, enum series kind, const float *x, int c,
                         const uint8_t *codes, size_t tile_bytes, uint16_t scale16,
                         uint16_t zero16) {
    const double scale = (double)fkv_f16_to_f32(scale16), zero = (double)fkv_f16_to_f32(zero16);
    if (kind == BROKEN) {
        if (!isnan(zero) || scale16 != 0)
            fail_msg("%s: a series that is not finite has zero %g and scale %g", where, zero,
                     scale);
        return;
    }
    double least = (double)x[0], most = (double)x[0];
    for (int t = 0; t < 64 * k->tiles; t++) {
        least = fmin(least, (double)x[t]);
        most = fmax(most, (double)x[t]);
    }
    if (least == most && (scale16 != 0 || zero16 != fkv_f32_to_f16(x[0])))
        fail_msg("%s: a constant %g has zero %g and scale %g", where, least, zero, scale);
    /* rounded down and up, by no more than an f16 can help: 2^-10, or the least one there is */
    const double top = (1 << k->bits) - 1, ulp = fmax(fabs(least) * 0x1p-10, 0x1p-24);
    if (least != most && !(zero <= least && zero >= least - ulp))
        fail_msg("%s: zero is %.9g, the least value %.9g", where, zero, least);
    const double want = (most - zero) / top;
    if (least != most &&
        !(scale >= want * (1 - UNIT) && scale <= want + fmax(want * 0x1p-9, 0x1p-24)))
        fail_msg("%s: scale is %.9g, %.9g would do", where, scale, want);
    for (int t = 0; t < 64 * k->tiles; t++) {
        unsigned code = get_code(k->keys, codes + (size_t)(t / 64) * tile_bytes, k->bits,
                                 k->channels, c, t % 64);
        double y = zero + scale * code, x_t = (double)x[t];
        double half = least == most ? fmax(fabs(least) * 0x1p-11, 0x1p-25) : scale / 2;
        double rounding = UNIT * (fabs(x_t) + fabs(zero) + scale * top);
        if (!(fabs(y - x_t) <= half + rounding))
            fail_msg("%s: token %d: %.9g came back as %.9g, half a scale is %.9g", where, t, x_t, y,
                     half);
    }
}

static void check_coding(const struct coding_case *k) {
    const size_t bytes = (size_t)(8 * k->bits) * (size_t)k->channels, tile_bytes = bytes + 7;
    const int tokens = 64 * k->tiles;
    struct guard codes_guard, scale_guard, zero_guard;
    struct matrix x;
    uint8_t *codes = guard_alloc(&codes_guard, (size_t)(k->tiles - 1) * tile_bytes + bytes, 0);
    uint16_t *scale = guard_alloc(&scale_guard, (size_t)k->channels * 2, 0);
    uint16_t *zero = guard_alloc(&zero_guard, (size_t)k->channels * 2, 0);
    float *series = malloc((size_t)(k->channels * tokens) * sizeof *series);
    enum series kind[MAX_CHANNELS];
    matrix_init(&x, k->keys ? k->channels : tokens, k->keys ? tokens : k->channels);
    for (int c = 0; c < k->channels; c++) {
        float level = (float)random_normal(&rng);
        kind[c] = (enum series)random_int(&rng, 0, N_SERIES - 1);
        for (int t = 0; t < tokens; t++) {
            float value = sample(kind[c], t, level);
            series[c * tokens + t] = value;
            x.x[k->keys ? c * x.stride + t : t * x.stride + c] = value;
        }
    }
    (k->keys ? kernels.code_keys : kernels.code_values)(
        codes, (ptrdiff_t)tile_bytes, scale, zero, x.x, x.stride, k->bits, k->channels, k->tiles);
    for (int c = 0; c < k->channels; c++) {
        snprintf(where, sizeof where, "%s, %d bits, channel %d of %d, %d tiles, series %d",
                 k->keys ? "keys" : "values", k->bits, c, k->channels, k->tiles, kind[c]);
        check_series(k, kind[c], series + c * tokens, c, codes, tile_bytes, scale[c], zero[c]);
    }
    for (int i = 0; i < k->tiles - 1; i++) {
        const uint8_t *end = codes + (size_t)i * tile_bytes + bytes;
        /* whole words of the filling only: it is a pattern of four bytes */
        for (const uint8_t *p = end; p < end + 7; p++)
            if ((uintptr_t)p % 4 == 0 && p + 4 <= end + 7 && !guard_untouched(p, p + 4))
                fail_msg("%s: wrote between tiles", where);
    }
    assert_true(guard_intact(&codes_guard) && guard_intact(&scale_guard) &&
                guard_intact(&zero_guard));
    guard_free(&codes_guard);
    guard_free(&scale_guard);
    guard_free(&zero_guard);
    matrix_free(&x);
    free(series);
}

static void test_coding(void **state) {
    (void)state;
    static const int channels[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 128, 256};
    for (int i = 0; i < LENGTH(channels); i += random_quick() ? 3 : 1)
        for (int w = 0; w < FKV_N_PACKED; w++)
            for (int j = 0; j < 4; j++) {
                const struct coding_case k = {j % 2, bits_of[w], channels[i], 1 + j / 2};
                check_coding(&k);
            }
}

/* ---- carriers */

static void test_uncarry(void **state) {
    (void)state;
    static const fkv_dtype dtypes[] = {FKV_DTYPE_F32, FKV_DTYPE_F16, FKV_DTYPE_BF16};
    for (int i = 0; i < 9; i++) {
        struct stored k;
        struct matrix wave, x;
        float u = (float)random_normal(&rng), v = (float)random_normal(&rng);
        stored_init(&k, dtypes[i % 3], 1, 64, 64);
        matrix_init(&wave, 2, 64);
        matrix_init(&x, 1, 64);
        const float *c = wave.x, *s = wave.x + wave.stride;
        snprintf(where, sizeof where, "uncarry, type %d", dtypes[i % 3]);
        kernels.uncarry[fkv_store_of(dtypes[i % 3])](x.x, k.data, c, s, u, v);
        for (int t = 0; t < 64; t++) {
            double a = (double)u * (double)c[t], b = (double)v * (double)s[t];
            near("x", 0, t, (double)x.x[t], k.value[t] - (a + b),
                 2 * UNIT * (fabs(a) + fabs(b) + fabs(k.value[t])));
        }
        matrix_check_gaps(&x);
        stored_free(&k);
        matrix_free(&wave);
        matrix_free(&x);
    }
}

static void test_gather(void **state) {
    (void)state;
    static const fkv_dtype dtypes[] = {FKV_DTYPE_F32, FKV_DTYPE_F16, FKV_DTYPE_BF16};
    for (int i = 0; i < 60; i++) {
        const int dims = 8 * (int)random_int(&rng, 1, 32), count = (int)random_int(&rng, 0, dims);
        const fkv_dtype dtype = dtypes[i % 3];
        struct stored v;
        struct matrix x, carrier;
        uint8_t list[MAX_CHANNELS];
        stored_init(&v, dtype, 64, dims, dims);
        matrix_init(&x, 64, count + 1);
        matrix_init(&carrier, 1, dims);
        for (int c = 0; c < count; c++)
            list[c] = (uint8_t)random_int(&rng, 0, dims - 1);
        snprintf(where, sizeof where, "gather %d of %d, type %d", count, dims, dtype);
        float *before = malloc(64 * sizeof *before);
        for (int t = 0; t < 64; t++)
            before[t] = x.x[t * x.stride + count];
        kernels.gather[fkv_store_of(dtype)](x.x, x.stride, v.data, dims, list, count, carrier.x);
        for (int t = 0; t < 64; t++) {
            for (int c = 0; c < count; c++)
                assert_true(x.x[t * x.stride + c] ==
                            (float)v.value[t * dims + list[c]] - carrier.x[list[c]]);
            assert_true(x.x[t * x.stride + count] == before[t]);
        }
        matrix_check_gaps(&x);
        free(before);
        stored_free(&v);
        matrix_free(&x);
        matrix_free(&carrier);
    }
}

static void check_carry(int pairs, int fast, int rows) {
    const int half = (pairs + 15) / 16 * 16;
    struct matrix weights, turn, project, y;
    matrix_init(&weights, rows, 2 * half);
    matrix_init(&turn, 2, half);
    matrix_init(&project, pairs - fast + 1, FKV_CHEBYSHEV);
    project.stride = FKV_CHEBYSHEV;
    matrix_init(&y, rows, 2 * fast + FKV_CHEBYSHEV);
    random_fill(&rng, project.x, (size_t)((pairs - fast) * FKV_CHEBYSHEV), 1);
    const float *c = turn.x, *s = turn.x + turn.stride;
    snprintf(where, sizeof where, "carry of %d pairs, %d fast, %d rows", pairs, fast, rows);
    kernels.carry(y.x, y.stride, weights.x, weights.stride, half, c, s, project.x, pairs, fast,
                  rows);
    for (int r = 0; r < rows; r++) {
        const float *a = weights.x + r * weights.stride, *b = a + half;
        double want[2 * MAX_CHANNELS + FKV_CHEBYSHEV] = {0}, size[2 * MAX_CHANNELS + FKV_CHEBYSHEV];
        for (int i = 0; i < 2 * fast + FKV_CHEBYSHEV; i++)
            size[i] = 1;
        for (int j = 0; j < pairs; j++) {
            double re = (double)a[j] * (double)c[j] + (double)b[j] * (double)s[j];
            double im = (double)b[j] * (double)c[j] - (double)a[j] * (double)s[j];
            double both = fabs((double)a[j]) + fabs((double)b[j]);
            if (j < fast) {
                want[j] = re;
                want[fast + j] = im;
                size[j] = size[fast + j] = 4 * both;
                continue;
            }
            for (int m = 0; m < FKV_CHEBYSHEV; m++) {
                double factor = (double)project.x[(j - fast) * FKV_CHEBYSHEV + m];
                want[2 * fast + m] += (m % 2 ? im : re) * factor;
                size[2 * fast + m] += 4 * both * fabs(factor);
            }
        }
        for (int i = 0; i < 2 * fast + FKV_CHEBYSHEV; i++)
            near("coefficient", r, i, (double)y.x[r * y.stride + i], want[i],
                 UNIT * size[i] * (i < 2 * fast ? 2 : pairs));
        struct matrix alone;
        matrix_init(&alone, 1, 2 * fast + FKV_CHEBYSHEV);
        kernels.carry(alone.x, alone.stride, a, weights.stride, half, c, s, project.x, pairs, fast,
                      1);
        same_row("coefficient", alone.x, y.x + r * y.stride, 2 * fast + FKV_CHEBYSHEV);
        matrix_free(&alone);
    }
    matrix_check_gaps(&y);
    matrix_free(&weights);
    matrix_free(&turn);
    matrix_free(&project);
    matrix_free(&y);
}

static void test_carry(void **state) {
    (void)state;
    static const int pairs[] = {1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 127, 128};
    for (int i = 0; i < LENGTH(pairs); i++)
        for (int j = 0; j < 4; j++) {
            check_carry(pairs[i], pairs[i] * j / 3, 1 + (i + j) % 5);
            check_carry(pairs[i], (pairs[i] - 1) * j / 3, 32);
        }
}

int main(void) {
    static const char *const names[] = {NULL, "reference", "AVX2", "AVX-512"};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products), cmocka_unit_test(test_fold),
        cmocka_unit_test(test_coding),   cmocka_unit_test(test_uncarry),
        cmocka_unit_test(test_gather),   cmocka_unit_test(test_carry),
    };
    int failed = 0;
    random_init(&rng, random_seed("test_packed", 1));
    for (fkv_cpu_level level = FKV_CPU_REFERENCE; level <= fkv_cpu_best_level(); level++) {
        fkv_kernels_init(&kernels, level);
        failed += cmocka_run_group_tests_name(names[level], tests, NULL, NULL);
    }
    return failed;
}
