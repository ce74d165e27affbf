/* SPDX-License-Identifier: Apache-2.0 */
/* The reference of the kernels that selection needs. */
#include "core/core.h"
#include "kernels/kernels.h"
#include "kernels/packed.h"

static float from_f32(float x) {
    return x;
}

#define DEFINE_TURN(store, element, load)                                                          \
    static FKV_DECL_TURN(turn_##store) {                                                           \
        const element *key = k;                                                                    \
        (void)next;                                                                                \
        for (int j = 0; j < pairs; j++)                                                            \
            for (int t = from; t < end; t++) {                                                     \
                const int a = first[j] * 64 + t, b = second[j] * 64 + t;                           \
                const float x = load(key[a]), z = load(key[b]);                                    \
                y[a] = x * cos[j * 64 + t] - z * sin[j * 64 + t];                                  \
                y[b] = z * cos[j * 64 + t] + x * sin[j * 64 + t];                                  \
            }                                                                                      \
        for (int d = 2 * pairs; d < dims; d++)                                                     \
            for (int t = from; t < end; t++)                                                       \
                y[d * 64 + t] = load(key[d * 64 + t]);                                             \
    }

DEFINE_TURN(f32, float, from_f32)
DEFINE_TURN(f16, uint16_t, fkv_f16_to_f32)
DEFINE_TURN(bf16, uint16_t, fkv_bf16_to_f32)

static FKV_DECL_UNPACK(unpack_ref) {
    static const int bits[FKV_N_PACKED] = {8, 4, 3, 2};
    const uint8_t *channel = k;
    for (int w = 0, c = 0; w < FKV_N_PACKED; w++)
        for (int i = 0; i < counts[w]; i++, c++, channel += 8 * bits[w])
            for (int t = 0; t < 64; t++)
                x[list[c] * 64 + t] =
                    carrier[list[c]] + fkv_f16_to_f32(zero[c]) +
                    fkv_f16_to_f32(scale[c]) * (float)fkv_packed_key(channel, bits[w], t);
}

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
    k->unpack = unpack_ref;
    k->over = over_ref;
}
