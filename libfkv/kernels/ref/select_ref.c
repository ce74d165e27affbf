/* SPDX-License-Identifier: Apache-2.0 */
/* The reference of the kernels that selection needs. */
#include "core/core.h"
#include "kernels/kernels.h"

static float from_f32(float x) {
    return x;
}

#define DEFINE_TURN(store, element, from)                                                          \
    static FKV_DECL_TURN(turn_##store) {                                                           \
        const element *key = k;                                                                    \
        const int begin = first / 16 * 16, stop = (end + 15) / 16 * 16;                            \
        for (int j = 0; j < pairs; j++)                                                            \
            for (int t = begin; t < stop; t++) {                                                   \
                const int a = j * step * 64 + t, b = (j * step + distance) * 64 + t;               \
                const float x = from(key[a]), z = from(key[b]);                                    \
                y[a] = x * cos[j * 64 + t] - z * sin[j * 64 + t];                                  \
                y[b] = z * cos[j * 64 + t] + x * sin[j * 64 + t];                                  \
            }                                                                                      \
        for (int d = 2 * pairs; d < dims; d++)                                                     \
            for (int t = begin; t < stop; t++)                                                     \
                y[d * 64 + t] = from(key[d * 64 + t]);                                             \
    }

DEFINE_TURN(f32, float, from_f32)
DEFINE_TURN(f16, uint16_t, fkv_f16_to_f32)
DEFINE_TURN(bf16, uint16_t, fkv_bf16_to_f32)

static FKV_DECL_OVER(over_ref) {
    for (int r = 0; r < rows; r++) {
        bits[r] = 0;
        for (int t = 0; t < 64; t++)
            bits[r] |= (uint64_t)(s[r * s_stride + t] > limit[r]) << t;
    }
}

void fkv_select_init_ref(struct fkv_kernels *k) {
    k->turn[FKV_STORE_F32] = turn_f32;
    k->turn[FKV_STORE_F16] = turn_f16;
    k->turn[FKV_STORE_BF16] = turn_bf16;
    k->over = over_ref;
}
