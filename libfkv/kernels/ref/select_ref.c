/* SPDX-License-Identifier: Apache-2.0 */
/* The reference of the kernels that selection needs. */
#include "core/core.h"
#include "kernels/kernels.h"
#include "kernels/packed.h"

#include <math.h>
#include <string.h>

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

static FKV_DECL_FOLD_INDEX(fold_index_ref) {
    for (int r = 0; r < rows; r++, y += stride, z += stride, q += stride) {
        struct fkv_folded s = {0.0f, 0.0f, 0};
        memset(y, 0, (size_t)((channels + 15) / 16 * 16) * sizeof *y);
        memset(z, 0, (size_t)((channels + 15) / 16 * 16));
        for (int c = 0; c < channels; c++) {
            y[c] = q[c] * fkv_bf16_to_f32(scale[c]);
            s.centre += q[c] * fkv_bf16_to_f32(centre[c]);
            if (fabsf(y[c]) > s.step)
                s.step = fabsf(y[c]);
        }
        s.step /= 127.0f;
        const float inverse = s.step > 0x1p-120f ? 1.0f / s.step : 0.0f;
        for (int c = 0; c < channels; c++) {
            const float code = y[c] * inverse;
            z[c] = (int8_t)lrintf(fabsf(code) <= 127.5f ? code : 0.0f);
            s.z += z[c];
        }
        sums[r] = s;
    }
}

static int nibble(const uint8_t *octet, int i) {
    return octet[i % 4] >> (i / 4 * 4) & 15;
}

static FKV_DECL_SIFT(sift_ref) {
    const uint8_t *bounds = codes + 256 * (size_t)octets;
    (void)next;
    for (int r = 0; r < rows; r++) {
        bits[r] = 0;
        for (int t = 0; t < 64; t++) {
            int32_t sum = 0;
            uint16_t bound;
            memcpy(&bound, bounds + 2 * t, sizeof bound);
            for (int c = 0; c < 8 * octets; c++)
                sum += z[r * z_stride + c] * nibble(codes + c / 8 * 256 + 4 * t, c % 8);
            const float add = fmaf(sift[r].norm, fkv_bf16_to_f32(bound), sift[r].base);
            const bool under = fmaf(sift[r].step, (float)sum, add) < limit[r];
            bits[r] |= (uint64_t)!under << t;
        }
    }
}

static FKV_DECL_REFINE(refine_ref) {
    float sum = 0.0f;
    for (int c = 0; c < 8 * octets; c++) {
        const int code = 16 * nibble(coarse + c / 8 * 256, c % 8) + nibble(fine + c / 8 * 4, c % 8);
        sum += y[c] * ((float)code - 127.5f);
    }
    return sum;
}

void fkv_select_init_ref(struct fkv_kernels *k) {
    k->turn[FKV_STORE_F32] = turn_f32;
    k->turn[FKV_STORE_F16] = turn_f16;
    k->turn[FKV_STORE_BF16] = turn_bf16;
    k->unpack = unpack_ref;
    k->over = over_ref;
    k->fold_index = fold_index_ref;
    k->sift = sift_ref;
    k->refine = refine_ref;
}
