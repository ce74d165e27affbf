/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The index of keys: its kernels against plain sums, and that its bounds hold for the scores that the plain search
 * computes, for keys of every kind and on every level.
 */
#include "arrays.h"

#include "attend/scan.h"
#include "core/core.h"
#include "kernels/kernels.h"

#include <stdio.h>

#define ROWS 9

static struct fkv_kernels kernels;

/* The last level is that of AVX-512 without what only some of its processors have. */
static void each_level(void (*test)(void)) {
    static const char *const names[] = {"", "reference", "avx2", "avx512"};
    for (fkv_cpu_level level = FKV_CPU_REFERENCE; level <= fkv_cpu_best_level(); level++) {
        fkv_kernels_init(&kernels, level);
        snprintf(where, sizeof where, "%s", names[level]);
        test();
    }
#ifdef FKV_HAVE_AVX512
    if (fkv_cpu_best_level() >= FKV_CPU_AVX512) {
        fkv_kernels_init_avx512(&kernels);
        snprintf(where, sizeof where, "avx512 alone");
        test();
    }
#endif
}

static int nibble(const uint8_t *octet, int i) {
    return octet[i % 4] >> (i / 4 * 4) & 15;
}

static uint16_t upper_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* ---- kernels */

static void fold_once(void) {
    for (int i = 0; i < 80; i++) {
        const int rows = (int)random_int(&rng, 1, ROWS), dims = (int)random_int(&rng, 1, 256);
        const int padded = (dims + 15) / 16 * 16;
        const ptrdiff_t stride = padded + 16 * random_int(&rng, 0, 1);
        const size_t n = (size_t)((rows - 1) * stride + padded);
        struct guard gy, gz, gs, gc, gq;
        float *y = guard_alloc(&gy, n * sizeof *y, 0), *q = guard_alloc(&gq, n * sizeof *q, 0);
        int8_t *z = guard_alloc(&gz, (n + 3) / 4 * 4, 0);
        uint16_t *scale = guard_alloc(&gs, (size_t)dims * 2, 30);
        uint16_t *centre = guard_alloc(&gc, (size_t)dims * 2, 30);
        struct fkv_folded sums[ROWS];
        for (int c = 0; c < dims; c++) {
            scale[c] = upper_half((float)fabs(random_normal(&rng)));
            centre[c] = upper_half((float)random_normal(&rng));
            for (int r = 0; r < rows; r++)
                q[r * stride + c] = i % 7 ? (float)random_normal(&rng) : 0.0f;
        }
        kernels.fold_index(y, z, stride, sums, q, scale, centre, dims, rows);
        for (int r = 0; r < rows; r++) {
            double middle = 0, size = 0, most = 0;
            int total = 0;
            for (int c = 0; c < padded; c++) {
                const float want = c < dims ? q[r * stride + c] * fkv_bf16_to_f32(scale[c]) : 0.0f;
                const double code = (double)z[r * stride + c];
                near("y", r, c, (double)y[r * stride + c], (double)want, 0);
                assert_in_range(z[r * stride + c] + 127, 0, 254);
                near("z", r, c, (double)sums[r].step * code, (double)want,
                     .5001 * (double)sums[r].step);
                total += z[r * stride + c];
                most = fmax(most, fabs((double)want));
                if (c < dims) {
                    const double x = (double)q[r * stride + c] * (double)fkv_bf16_to_f32(centre[c]);
                    middle += x;
                    size += fabs(x);
                } else {
                    assert_int_equal(z[r * stride + c], 0);
                }
            }
            near("step", r, 0, (double)sums[r].step, most / 127, 1e-7 * most);
            near("centre", r, 0, (double)sums[r].centre, middle, 2e-5 * size);
            assert_int_equal(sums[r].z, total);
        }
        for (int r = 0; r + 1 < rows; r++)
            assert_true(guard_untouched(y + r * stride + padded, y + (r + 1) * stride));
        assert_true(guard_intact(&gy) && guard_intact(&gz));
        guard_free(&gy);
        guard_free(&gz);
        guard_free(&gs);
        guard_free(&gc);
        guard_free(&gq);
    }
}

static void sift_once(void) {
    for (int i = 0; i < 80; i++) {
        const int rows = (int)random_int(&rng, 1, ROWS), octets = (int)random_int(&rng, 1, 32);
        const ptrdiff_t stride = 8 * octets + random_int(&rng, 0, 9);
        struct guard gk, gz, gb;
        const size_t bytes = 256 * (size_t)octets;
        uint8_t *k = guard_alloc(&gk, bytes + 128, 0);
        int8_t *z = guard_alloc(&gz, (size_t)(rows - 1) * (size_t)stride + 8 * (size_t)octets, 0);
        uint64_t *bits = guard_alloc(&gb, (size_t)rows * sizeof *bits, 0);
        struct fkv_sift sift[ROWS];
        float limit[ROWS];
        for (size_t j = 0; j < bytes; j++)
            k[j] = i % 5 ? (uint8_t)random_next(&rng) : 255; /* the greatest sums */
        for (int t = 0; t < 64; t++) {
            const uint16_t bound =
                upper_half(random_chance(&rng, .05) ? INFINITY : (float)random_int(&rng, 0, 9));
            memcpy(k + bytes + 2 * t, &bound, sizeof bound);
        }
        for (int r = 0; r < rows; r++) {
            sift[r] = (struct fkv_sift){(float)random_normal(&rng), (float)random_normal(&rng),
                                        (float)random_int(&rng, 0, 2)};
            if (random_chance(&rng, .05))
                sift[r].base = NAN;
            limit[r] = r % 4 == 3 ? -INFINITY : 100 * (float)random_normal(&rng);
            for (int c = 0; c < 8 * octets; c++)
                z[r * stride + c] = (int8_t)(i % 5 ? random_int(&rng, -127, 127) : 127);
        }
        kernels.sift(bits, z, stride, sift, limit, k, octets, rows,
                     random_chance(&rng, .5) ? k : NULL);
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < 64; t++) {
                int sum = 0;
                uint16_t bound;
                memcpy(&bound, k + bytes + 2 * t, sizeof bound);
                for (int c = 0; c < 8 * octets; c++)
                    sum += z[r * stride + c] * nibble(k + c / 8 * 256 + 4 * t, c % 8);
                const float add = fmaf(sift[r].norm, fkv_bf16_to_f32(bound), sift[r].base);
                const bool under = fmaf(sift[r].step, (float)sum, add) < limit[r];
                if ((bits[r] >> t & 1) != !under)
                    fail_msg("%s: row %d token %d", where, r, t);
            }
        assert_true(guard_intact(&gb));
        guard_free(&gk);
        guard_free(&gz);
        guard_free(&gb);
    }
}

static void refine_once(void) {
    for (int i = 0; i < 200; i++) {
        const int octets = (int)random_int(&rng, 1, 32);
        struct guard gy, ga, gb;
        float *y = guard_alloc(&gy, (size_t)octets * 8 * sizeof *y, 0);
        uint8_t *a = guard_alloc(&ga, 256 * (size_t)(octets - 1) + 4, 0);
        uint8_t *b = guard_alloc(&gb, 4 * (size_t)octets, 0);
        double sum = 0, size = 0;
        for (size_t j = 0; j < ga.bytes; j++)
            a[j] = (uint8_t)random_next(&rng);
        for (size_t j = 0; j < gb.bytes; j++)
            b[j] = (uint8_t)random_next(&rng);
        for (int c = 0; c < 8 * octets; c++) {
            y[c] = (float)random_normal(&rng);
            const double x = (double)y[c] * (16 * nibble(a + c / 8 * 256, c % 8) +
                                             nibble(b + c / 8 * 4, c % 8) - 127.5);
            sum += x;
            size += fabs(x);
        }
        near("refined", i, octets, (double)kernels.refine(y, a, b, octets), sum, 2e-5 * size);
        guard_free(&gy);
        guard_free(&ga);
        guard_free(&gb);
    }
}

/* ---- bounds */

enum kind {
    NORMAL,
    OFFSET,
    OUTLIER,
    EQUAL,
    ALTERNATING,
    WHOLE,
    DENORMAL,
    TINY,
    HUGE_KEYS,
    VAST,
    INFINITE,
    ODD,
    KINDS
};

static double draw_key(enum kind kind, int64_t t, int c) {
    const double x = random_normal(&rng);
    switch (kind) {
    case OFFSET:
        return x + 40 * sin(c);
    case OUTLIER:
        return c == 3 ? 900 * x : x;
    case EQUAL:
        return sin(c);
    case ALTERNATING:
        return t % 2 ? 7 : -7;
    case WHOLE:
        return (double)random_int(&rng, -2, 2);
    case DENORMAL:
        return x * 0x1p-140;
    case TINY:
        return x * 0x1p-50;
    case HUGE_KEYS:
        return x * 0x1p50;
    case VAST:
        return random_chance(&rng, .01) ? x * 0x1p125 : x;
    case INFINITE:
        return random_chance(&rng, .001) ? (x > 0 ? (double)INFINITY : -(double)INFINITY) : x;
    case ODD:
        return random_chance(&rng, .001) ? (double)NAN : x;
    default:
        return x;
    }
}

static void check_tile(const struct fkv_profile_object *p, const struct fkv_index *x,
                       const float *q, const char *keys, enum kind kind) {
    const int D = p->model.head_dim, octets = (int)fkv_index_octets(p);
    const ptrdiff_t stride = (D + 15) / 16 * 16;
    float norm[ROWS], middle[ROWS], off[ROWS], scores[ROWS * 64], y[ROWS * 256];
    int8_t z[ROWS * 256];
    struct fkv_sift sift[ROWS];
    uint64_t bits[ROWS];
    for (int r = 0; r < ROWS; r++)
        norm[r] = fkv_sift_norm(q + r * stride, D);
    fkv_sift_fold(&kernels, x,
                  &(struct fkv_sift_rows){ROWS, stride, q, norm, y, z, sift, middle, off}, D);
    kernels.scores[fkv_store_of(p->storage_dtype)](scores, 64, q, stride, keys, D, ROWS, 0, NULL);
    for (int t = 0; t < 64; t++) {
        float limit[ROWS];
        for (int r = 0; r < ROWS; r++)
            limit[r] = scores[64 * r + t];
        kernels.sift(bits, z, stride, sift, limit, x->coarse, octets, ROWS, NULL);
        for (int r = 0; r < ROWS; r++) {
            const float score = scores[64 * r + t];
            const float fine = middle[r] + kernels.refine(y + r * stride, x->coarse + 4 * t,
                                                          x->fine + 4 * t * octets, octets);
            if (!(bits[r] >> t & 1) && score == score)
                fail_msg("%s: kind %d: a coarse bound is below %g", where, kind, (double)score);
            /* as in sift.c: what is not certain is kept, and lower bounds are certain */
            if (fine + off[r] < score || fine - off[r] > score ||
                (score != score && fine - off[r] > -INFINITY))
                fail_msg("%s: kind %d: %g is not %g +- %g", where, kind, (double)score,
                         (double)fine, (double)off[r]);
            if (kind <= OUTLIER && r % 3) /* not an empty bound */
                near("off", r, kind, (double)off[r], 0, 0.02 * (double)(norm[r] * x->head->reach));
        }
    }
}

static void bounds_once(void) {
    static const int dims[] = {8, 13, 16, 24, 40, 64, 72, 128, 250, 256};
    for (int i = 0; i < 10 * KINDS; i++) {
        const enum kind kind = (enum kind)(i % KINDS);
        struct fkv_profile_object p = {.storage_dtype = (fkv_dtype)random_int(&rng, 1, 3)};
        p.coding = FKV_CODING_CALIBRATED;
        p.model.head_dim = dims[random_int(&rng, 0, 9)];
        p.codec.block = 64 << random_int(&rng, 0, 2);
        const size_t size = oracle_element_size(p.storage_dtype);
        const size_t tile = (size_t)p.model.head_dim * 64 * size;
        const int tiles = p.codec.block / 64, D = p.model.head_dim, stride = (D + 15) / 16 * 16;
        struct guard gk, gi, gx, gq;
        char *keys = guard_alloc(&gk, (size_t)tiles * tile, PADDING * size);
        char *index = guard_alloc(&gi, fkv_index_bytes(&p), 0);
        float *x = guard_alloc(&gx, (size_t)D * 64 * sizeof *x, 0);
        float *q = guard_alloc(&gq, (size_t)(ROWS * stride) * sizeof *q, PADDING * sizeof *q);
        for (int64_t t = 0; t < 64 * tiles; t++)
            for (int c = 0; c < D; c++)
                oracle_store(keys + (size_t)(t / 64) * tile + (size_t)(c * 64 + t % 64) * size,
                             p.storage_dtype, draw_key(kind, t, c));
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < D; c++)
                q[r * stride + c] = (float)(random_normal(&rng) * (r % 3 ? 1 : 0x1p-60 * r) *
                                            (r == 8 ? 0x1p90 : 1));
        fkv_index_make(&p, &kernels, keys, tile, x, index);
        assert_true(guard_intact(&gi) && guard_intact(&gx));
        for (int t = 0; t < tiles; t++) {
            const struct fkv_index at = fkv_index_of(&p, index, t);
            check_tile(&p, &at, q, keys + (size_t)t * tile, kind);
        }
        guard_free(&gk);
        guard_free(&gi);
        guard_free(&gx);
        guard_free(&gq);
    }
}

static void folding(void **state) {
    (void)state;
    each_level(fold_once);
}

static void sifting(void **state) {
    (void)state;
    each_level(sift_once);
}

static void refining(void **state) {
    (void)state;
    each_level(refine_once);
}

static void bounds(void **state) {
    (void)state;
    each_level(bounds_once);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(folding), cmocka_unit_test(sifting),
                                       cmocka_unit_test(refining), cmocka_unit_test(bounds)};
    random_init(&rng, random_seed("test_index", 11));
    return cmocka_run_group_tests_name("index", tests, NULL, NULL);
}
