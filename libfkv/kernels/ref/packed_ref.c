/* SPDX-License-Identifier: Apache-2.0 */
/* The reference of the kernels of packed residuals; kernels.h says how codes lie in memory. */
#include "kernels/kernels.h"

#include "core/core.h"
#include "kernels/packed.h"

#include <math.h>
#include <string.h>

static const int bits_of[FKV_N_PACKED] = {8, 4, 3, 2};

static FKV_DECL_SCORES_PACKED(scores_packed_ref) {
    (void)next;
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < 64; t++) {
            const uint8_t *channel = k;
            const float *x = q + r * q_stride;
            float sum = base[r];
            for (int w = 0; w < FKV_N_PACKED; w++)
                for (int c = 0; c < counts[w]; c++, channel += 8 * bits_of[w])
                    sum += *x++ * (float)fkv_packed_key(channel, bits_of[w], t);
            s[r * s_stride + t] = add ? s[r * s_stride + t] + sum : sum;
        }
}

static FKV_DECL_WEIGH_PACKED(weigh_packed_ref) {
    (void)next;
    for (int r = 0; r < rows; r++) {
        const uint8_t *class = v;
        const float *x = p + r * p_stride;
        float *to = o + r * o_stride, total = 0.0f;
        int at = 0;
        for (int t = 0; t < tokens; t++)
            total += x[t];
        for (int w = 0; w < FKV_N_PACKED; class += 8 * bits_of[w] * counts[w], w++)
            for (int c = 0; c < counts[w]; c++, at++) {
                float sum = 0.0f;
                for (int t = 0; t < tokens; t++)
                    sum += x[t] * (float)fkv_packed_value(class, bits_of[w], counts[w], t, c);
                to[at] += fkv_f16_to_f32(scale[at]) * sum + fkv_f16_to_f32(zero[at]) * total;
            }
    }
}

static FKV_DECL_FOLD(fold_ref) {
    for (int r = 0; r < rows; r++) {
        float sum = 0.0f;
        for (int c = 0; c < channels; c++) {
            y[r * y_stride + c] = q[r * q_stride + c] * fkv_f16_to_f32(scale[c]);
            sum += q[r * q_stride + c] * fkv_f16_to_f32(zero[c]);
        }
        base[r] = sum;
    }
}

/* ---- coding */

/* The neighbour of a finite f16 towards -infinity. */
static uint16_t f16_below(uint16_t h) {
    if (h == 0)
        return 0x8001;
    return (uint16_t)(h & 0x8000 ? h + 1 : h - 1);
}

struct range {
    uint16_t scale, zero;
    float inverse, origin; /* code = (x - origin) * inverse */
};

static struct range range_of(float low, float high, bool finite, int bits) {
    if (!finite)
        return (struct range){0, 0x7e00, 0.0f, 0.0f};
    uint16_t zero = fkv_f32_to_f16(low);
    if (low == high)
        return (struct range){0, zero, 0.0f, 0.0f};
    low = fmaxf(low, -65504.0f);
    if (fkv_f16_to_f32(zero) > low)
        zero = f16_below(zero);
    float origin = fkv_f16_to_f32(zero);
    float step = (high - origin) / (float)((1 << bits) - 1);
    uint16_t scale = fkv_f32_to_f16(step);
    if (fkv_f16_to_f32(scale) < step)
        scale++;
    return (struct range){scale, zero, 1.0f / fkv_f16_to_f32(scale), origin};
}

static unsigned code_of(const struct range *g, float x, int bits) {
    const float top = (float)((1 << bits) - 1);
    float code = rintf((x - g->origin) * g->inverse);
    return code > 0.0f ? (unsigned)(code < top ? code : top) : 0; /* NaN gives 0 */
}

static void put_key(uint8_t *channel, int bits, int t, unsigned code) {
    const int v = t / 16, i = t % 16;
    if (bits == 8)
        channel[t] = (uint8_t)code;
    else if (bits == 4)
        channel[2 * i + v / 2] |= (uint8_t)(code << v % 2 * 4);
    else
        channel[i] |= (uint8_t)((code & 3) << 2 * v);
    if (bits == 3)
        channel[16 + 2 * v + i / 8] |= (uint8_t)((code >> 2) << i % 8);
}

static void put_word(uint8_t *p, int bits, int channels, int t, int c, unsigned code) {
    const int S = 32 / bits, bit = t % S * bits;
    p[4 * ((ptrdiff_t)(t / S) * channels + c) + bit / 8] |= (uint8_t)(code << bit % 8);
}

static void put_value(uint8_t *class, int bits, int channels, int t, int c, unsigned code) {
    if (bits != 3) {
        put_word(class, bits, channels, t, c, code);
        return;
    }
    put_word(class, 2, channels, t, c, code & 3);
    put_word(class + 16 * (ptrdiff_t)channels, 1, channels, t, c, code >> 2);
}

/* t_step and c_step: distances in x of tokens and of channels. */
static void code_ref(uint8_t *codes, ptrdiff_t tile_bytes, uint16_t *scale, uint16_t *zero,
                     const float *x, ptrdiff_t t_step, ptrdiff_t c_step, int bits, int channels,
                     int tiles, bool keys) {
    for (int i = 0; i < tiles; i++)
        memset(codes + i * tile_bytes, 0, (size_t)(8 * bits) * (size_t)channels);
    for (int c = 0; c < channels; c++, x += c_step) {
        float low = x[0], high = x[0];
        bool finite = true;
        for (int t = 0; t < 64 * tiles; t++) {
            low = fminf(low, x[t * t_step]);
            high = fmaxf(high, x[t * t_step]);
            finite = finite && isfinite(x[t * t_step]);
        }
        const struct range g = range_of(low, high, finite, bits);
        scale[c] = g.scale;
        zero[c] = g.zero;
        for (int t = 0; t < 64 * tiles; t++) {
            uint8_t *tile = codes + t / 64 * tile_bytes;
            unsigned code = code_of(&g, x[t * t_step], bits);
            if (keys)
                put_key(tile + (ptrdiff_t)c * 8 * bits, bits, t % 64, code);
            else
                put_value(tile, bits, channels, t % 64, c, code);
        }
    }
}

static FKV_DECL_CODE(code_keys_ref) {
    code_ref(codes, tile_bytes, scale, zero, x, 1, x_stride, bits, channels, tiles, true);
}

static FKV_DECL_CODE(code_values_ref) {
    code_ref(codes, tile_bytes, scale, zero, x, x_stride, 1, bits, channels, tiles, false);
}

static float from_f32(float x) {
    return x;
}

#define DEFINE_STORE_KERNELS(store, element, from)                                                 \
    static FKV_DECL_UNCARRY(uncarry_##store) {                                                     \
        const element *key = k;                                                                    \
        for (int t = 0; t < 64; t++)                                                               \
            x[t] = from(key[t]) - (u * c[t] + v * s[t]);                                           \
    }                                                                                              \
    static FKV_DECL_GATHER(gather_##store) {                                                       \
        const element *value = v;                                                                  \
        for (int t = 0; t < 64; t++)                                                               \
            for (int i = 0; i < count; i++)                                                        \
                x[t * x_stride + i] = from(value[t * dims + list[i]]) - carrier[list[i]];          \
    }

DEFINE_STORE_KERNELS(f32, float, from_f32)
DEFINE_STORE_KERNELS(f16, uint16_t, fkv_f16_to_f32)
DEFINE_STORE_KERNELS(bf16, uint16_t, fkv_bf16_to_f32)

/* ---- carriers */

static FKV_DECL_CARRY(carry_ref) {
    for (int r = 0; r < rows; r++, y += y_stride, weights += w_stride) {
        for (int m = 0; m < FKV_CHEBYSHEV; m++)
            y[2 * fast + m] = 0.0f;
        for (int j = 0; j < pairs; j++) {
            float a = weights[j] * c[j] + weights[half + j] * s[j];
            float b = weights[half + j] * c[j] - weights[j] * s[j];
            if (j < fast) {
                y[j] = a;
                y[fast + j] = b;
                continue;
            }
            for (int m = 0; m < FKV_CHEBYSHEV; m++)
                y[2 * fast + m] += (m % 2 ? b : a) * project[(j - fast) * FKV_CHEBYSHEV + m];
        }
    }
}

void fkv_packed_init_ref(struct fkv_kernels *k) {
    k->scores_packed = scores_packed_ref;
    k->weigh_packed = weigh_packed_ref;
    k->fold = fold_ref;
    k->code_keys = code_keys_ref;
    k->code_values = code_values_ref;
    k->uncarry[FKV_STORE_F32] = uncarry_f32;
    k->uncarry[FKV_STORE_F16] = uncarry_f16;
    k->uncarry[FKV_STORE_BF16] = uncarry_bf16;
    k->gather[FKV_STORE_F32] = gather_f32;
    k->gather[FKV_STORE_F16] = gather_f16;
    k->gather[FKV_STORE_BF16] = gather_bf16;
    k->carry = carry_ref;
}
