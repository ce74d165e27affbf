/* SPDX-License-Identifier: Apache-2.0 */
/* The kernels of selection on every level: turned keys, unpacked keys, scores over a limit. */
#include "arrays.h"

#include "core/core.h"
#include "kernels/kernels.h"
#include "kernels/packed.h"

#include <stdio.h>

static struct fkv_kernels kernels;
static fkv_cpu_level first_level = FKV_CPU_REFERENCE;

static void each_level(void (*test)(void)) {
    static const char *const names[] = {"", "reference", "avx2", "avx512"};
    for (fkv_cpu_level level = first_level; level <= fkv_cpu_best_level(); level++) {
        fkv_kernels_init(&kernels, level);
        snprintf(where, sizeof where, "%s", names[level]);
        test();
    }
}

static void turn_once(void) {
    static const fkv_dtype types[] = {FKV_DTYPE_F32, FKV_DTYPE_F16, FKV_DTYPE_BF16};
    for (int i = 0; i < 60; i++) {
        const fkv_dtype dtype = types[i % 3];
        const int dims = (int)random_int(&rng, 1, 16) * 8;
        const int pairs = (int)random_int(&rng, 0, dims / 2);
        const int from = (int)random_int(&rng, 0, 63), end = (int)random_int(&rng, from + 1, 64);
        const size_t size = oracle_element_size(dtype), n = (size_t)dims * 64;
        struct guard gk, gy, gc, gs;
        char *k = guard_alloc(&gk, n * size, PADDING * size);
        float *y = guard_alloc(&gy, n * sizeof *y, 0);
        float *c = guard_alloc(&gc, (size_t)pairs * 64 * sizeof *c + 4, PADDING * sizeof *c);
        float *s = guard_alloc(&gs, (size_t)pairs * 64 * sizeof *s + 4, PADDING * sizeof *s);
        uint8_t first[128], second[128];
        for (size_t j = 0; j < n; j++)
            oracle_store(k + j * size, dtype, random_normal(&rng));
        random_fill(&rng, c, (size_t)pairs * 64, 1);
        random_fill(&rng, s, (size_t)pairs * 64, 1);
        for (int j = 0; j < pairs; j++) { /* in any order */
            first[j] = (uint8_t)(2 * (pairs - 1 - j) + i % 2);
            second[j] = (uint8_t)(2 * (pairs - 1 - j) + 1 - i % 2);
        }
        kernels.turn[fkv_store_of(dtype)](y, k, dims, pairs, first, second, c, s, from, end,
                                          i % 4 ? NULL : k);
        for (int t = from; t < end; t++) {
            for (int d = 2 * pairs; d < dims; d++)
                near("copied", d, t, (double)y[d * 64 + t],
                     oracle_load(k + (size_t)(d * 64 + t) * size, dtype), 0);
            for (int j = 0; j < pairs; j++) {
                const int a = first[j] * 64 + t, b = second[j] * 64 + t;
                const double x = oracle_load(k + (size_t)a * size, dtype);
                const double z = oracle_load(k + (size_t)b * size, dtype);
                const double u = (double)c[j * 64 + t], v = (double)s[j * 64 + t];
                const double bound = 0x1p-22 * (fabs(x) + fabs(z)) * (fabs(u) + fabs(v));
                near("first", j, t, (double)y[a], x * u - z * v, bound);
                near("second", j, t, (double)y[b], z * u + x * v, bound);
            }
        }
        for (int d = 0; d < dims; d++) { /* other sixteens are left alone */
            assert_true(guard_untouched(y + d * 64, y + d * 64 + from / 16 * 16));
            assert_true(guard_untouched(y + d * 64 + (end + 15) / 16 * 16, y + d * 64 + 64));
        }
        assert_true(guard_intact(&gy));
        guard_free(&gk);
        guard_free(&gy);
        guard_free(&gc);
        guard_free(&gs);
    }
}

static void unpack_once(void) {
    static const int bits[FKV_N_PACKED] = {8, 4, 3, 2};
    for (int i = 0; i < 40; i++) {
        uint16_t counts[FKV_N_PACKED];
        uint8_t list[64];
        uint16_t scale[64], zero[64];
        float carrier[64];
        int n = 0;
        size_t bytes = 0;
        for (int w = 0; w < FKV_N_PACKED; w++) {
            counts[w] = (uint16_t)random_int(&rng, 0, 6);
            n += counts[w];
            bytes += (size_t)(8 * bits[w]) * counts[w];
        }
        struct guard gk, gx;
        uint8_t *k = guard_alloc(&gk, bytes + 8, 0);
        float *x = guard_alloc(&gx, (size_t)64 * 64 * sizeof *x, 0);
        for (size_t j = 0; j < bytes; j++)
            k[j] = (uint8_t)random_next(&rng);
        for (int c = 0; c < 64; c++) {
            list[c] = (uint8_t)(63 - 2 * c);
            scale[c] = fkv_f32_to_f16((float)random_normal(&rng));
            zero[c] = fkv_f32_to_f16((float)random_normal(&rng));
            carrier[c] = (float)random_normal(&rng);
        }
        kernels.unpack(x, k, counts, list, scale, zero, carrier);
        const uint8_t *channel = k;
        for (int w = 0, c = 0; w < FKV_N_PACKED; w++)
            for (int j = 0; j < counts[w]; j++, c++, channel += 8 * bits[w])
                for (int t = 0; t < 64; t++) {
                    const double code = fkv_packed_key(channel, bits[w], t);
                    const double step = (double)fkv_f16_to_f32(scale[c]);
                    const double least = (double)carrier[list[c]] + (double)fkv_f16_to_f32(zero[c]);
                    near("unpacked", c, t, (double)x[list[c] * 64 + t], least + step * code,
                         0x1p-22 * (8 + fabs(step) * code));
                }
        for (int d = 0; d < 64; d++) {
            bool written = false;
            for (int c = 0; c < n; c++)
                written = written || list[c] == d;
            if (!written)
                assert_true(guard_untouched(x + d * 64, x + d * 64 + 64));
        }
        assert_true(guard_intact(&gx));
        guard_free(&gk);
        guard_free(&gx);
    }
}

static void over_once(void) {
    for (int i = 0; i < 60; i++) {
        const int rows = (int)random_int(&rng, 1, 9);
        const ptrdiff_t stride = 64 + random_int(&rng, 0, 9);
        struct guard g, gb;
        float *s = guard_alloc(&g, (size_t)((rows - 1) * stride + 64) * sizeof *s, 0);
        uint64_t *bits = guard_alloc(&gb, (size_t)rows * sizeof *bits, 0);
        float limit[9];
        for (int r = 0; r < rows; r++) {
            limit[r] = r % 4 == 3 ? -INFINITY : (float)random_int(&rng, -2, 2);
            for (int t = 0; t < 64; t++) {
                static const float odd[] = {NAN, INFINITY, -INFINITY};
                s[r * stride + t] = random_chance(&rng, 0.1) ? odd[random_int(&rng, 0, 2)]
                                                             : (float)random_int(&rng, -3, 3);
            }
        }
        kernels.over(bits, s, stride, limit, rows);
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < 64; t++)
                assert_int_equal(bits[r] >> t & 1, s[r * stride + t] > limit[r]);
        assert_true(guard_intact(&gb));
        guard_free(&g);
        guard_free(&gb);
    }
}

static void turns(void **state) {
    (void)state;
    each_level(turn_once);
}

static void unpacking(void **state) {
    (void)state;
    each_level(unpack_once);
}

static void limits(void **state) {
    (void)state;
    each_level(over_once);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(turns), cmocka_unit_test(unpacking),
                                       cmocka_unit_test(limits)};
    random_init(&rng, random_seed("test_select", 9));
    return cmocka_run_group_tests_name("select", tests, NULL, NULL);
}
