/* SPDX-License-Identifier: Apache-2.0 */
/* The reference of every kernel, written to be read. The other levels are compared with this one. */
#include "kernels/kernels.h"

#include "core/core.h"

#include <math.h>
#include <string.h>

#define FKV_SUFFIX ref
#define FKV_FFT_WIDTH 4
#include "kernels/fft_lanes.h"

static float from_f32(float x) {
    return x;
}
static float to_f32(float x) {
    return x;
}

/* The kernels that read a storage type, once for each. */
#define DEFINE_STORE_KERNELS(store, element, from, to)                                             \
    static FKV_DECL_SCORES(scores_##store) {                                                       \
        const element *key = k;                                                                    \
        (void)next;                                                                                \
        for (int r = 0; r < rows; r++)                                                             \
            for (int t = 0; t < 64; t++) {                                                         \
                float sum = 0.0f;                                                                  \
                for (int d = 0; d < dims; d++)                                                     \
                    sum += q[r * q_stride + d] * from(key[d * 64 + t]);                            \
                s[r * s_stride + t] = add ? s[r * s_stride + t] + sum : sum;                       \
            }                                                                                      \
    }                                                                                              \
    static FKV_DECL_WEIGH(weigh_##store) {                                                         \
        const element *value = v;                                                                  \
        (void)next;                                                                                \
        for (int r = 0; r < rows; r++)                                                             \
            for (int t = 0; t < tokens; t++)                                                       \
                for (int c = 0; c < dims; c++)                                                     \
                    o[r * o_stride + c] += p[r * p_stride + t] * from(value[t * dims + c]);        \
    }                                                                                              \
    static FKV_DECL_CONTRACT(contract_##store) {                                                   \
        const element *coefficient = coef;                                                         \
        for (int r = 0; r < rows; r++)                                                             \
            for (int n = 0; n < count; n++) {                                                      \
                float sum = 0.0f;                                                                  \
                for (int c = 0; c < channels; c++)                                                 \
                    sum += q[r * q_stride + c] * from(coefficient[c * coef_stride + n]);           \
                a[r * a_stride + n] = sum;                                                         \
            }                                                                                      \
    }                                                                                              \
    static FKV_DECL_EXPAND(expand_##store) {                                                       \
        const element *coefficient = coef;                                                         \
        for (int r = 0; r < rows; r++)                                                             \
            for (int c = 0; c < channels; c++) {                                                   \
                float sum = 0.0f;                                                                  \
                for (int n = 0; n < count; n++)                                                    \
                    sum += p[r * p_stride + n] * from(coefficient[c * coef_stride + n]);           \
                o[r * o_stride + c] = sum;                                                         \
            }                                                                                      \
    }                                                                                              \
    static FKV_DECL_ACCUMULATE(accumulate_##store) {                                               \
        element *coefficient = coef;                                                               \
        for (int c = 0; c < channels; c++)                                                         \
            for (int n = 0; n < count; n++) {                                                      \
                element *e = &coefficient[c * coef_stride + n];                                    \
                *e = to(from(*e) + x[c * x_stride + n]);                                           \
            }                                                                                      \
    }                                                                                              \
    static FKV_DECL_WIDEN(widen_##store) {                                                         \
        const element *from_array = src;                                                           \
        for (size_t i = 0; i < n; i++)                                                             \
            dst[i] = from(from_array[i]);                                                          \
    }                                                                                              \
    static FKV_DECL_NARROW(narrow_##store) {                                                       \
        element *to_array = dst;                                                                   \
        for (size_t i = 0; i < n; i++)                                                             \
            to_array[i] = to(src[i]);                                                              \
    }

DEFINE_STORE_KERNELS(f32, float, from_f32, to_f32)
DEFINE_STORE_KERNELS(f16, uint16_t, fkv_f16_to_f32, fkv_f32_to_f16)
DEFINE_STORE_KERNELS(bf16, uint16_t, fkv_bf16_to_f32, fkv_f32_to_bf16)

static FKV_DECL_SOFTMAX(softmax_ref) {
    float m = s[0];
    for (int i = 1; i < n; i++)
        if (s[i] > m || isnan(s[i]))
            m = s[i];
    float total = 0.0f;
    for (int i = 0; i < n; i++) {
        s[i] = m == -INFINITY ? 0.0f : expf(s[i] - m);
        total += s[i];
    }
    *max = m;
    *sum = total;
}

static FKV_DECL_INTERPOLATE(interpolate_ref) {
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < 64; t++) {
            float sum = 0.0f;
            for (int k = 0; k < taps->width; k++)
                sum += taps->tap[k][t] * grid[r * grid_stride + t / taps->cell + k];
            s[r * s_stride + t] = sum;
        }
}

static FKV_DECL_SPREAD(spread_ref) {
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            for (int k = 0; k < taps->width; k++)
                grid[r * grid_stride + t / taps->cell + k] += taps->tap[k][t] * p[r * p_stride + t];
}

void fkv_kernels_init_ref(struct fkv_kernels *k) {
    *k = (struct fkv_kernels){
        .scores = {scores_f32, scores_f16, scores_bf16},
        .weigh = {weigh_f32, weigh_f16, weigh_bf16},
        .softmax = softmax_ref,
        .interpolate = interpolate_ref,
        .spread = spread_ref,
        .contract = {contract_f32, contract_f16, contract_bf16},
        .expand = {expand_f32, expand_f16, expand_bf16},
        .accumulate = {accumulate_f32, accumulate_f16, accumulate_bf16},
        .widen = {widen_f32, widen_f16, widen_bf16},
        .narrow = {narrow_f32, narrow_f16, narrow_bf16},
        .fft_pass = fft_pass_ref,
        .rotate = rotate_ref,
    };
    fkv_packed_init_ref(k);
    fkv_select_init_ref(k);
}
