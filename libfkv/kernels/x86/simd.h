/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels of every x86 level, over the vector of vec_avx2.h or vec_avx512.h. The including file sets
 *   FKV_SUFFIX   name of the level      MAX_ROWS, WEIGH_ROWS   rows whose sums fit the registers
 */
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

#define FKV_FFT_WIDTH VL
/* From a panel to the next one; 0, which prefetches what is read anyway, if there is none. The second level is
 * the right place: two panels do not fit the first (measured: half the time of prefetching there). */
static inline intptr_t distance(const void *panel, const void *next) {
    return next ? (intptr_t)next - (intptr_t)panel : 0;
}
static inline void prefetch(const void *here, intptr_t ahead, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)((intptr_t)here + ahead + (intptr_t)i), _MM_HINT_T1);
}

#define UNROLL _Pragma("GCC unroll 8")
#include "kernels/fft_lanes.h"

#define STORE f32
#define ELEMENT float
#include "simd_store.h"
#define STORE f16
#define ELEMENT uint16_t
#include "simd_store.h"
#define STORE bf16
#define ELEMENT uint16_t
#include "simd_store.h"

/*
 * e^x for x <= 0: n = round(x log2 e), r = x - n ln 2 in two steps, then the series of e^r up to r^6
 * (|r| <= ln 2 / 2: the rest is below 1.2e-7). Below -87 the result is 0: such weights are less than the last
 * bit of any sum. NaN stays NaN.
 */
static inline vf exp_negative(vf x) {
    vf n = v_round(v_mul(x, v_set1(1.44269504088896341f)));
    vf r = v_fma(n, v_set1(-0.693145751953125f), x);
    r = v_fma(n, v_set1(-1.42860677e-6f), r);
    vf p = v_set1(1.38888889e-3f);
    p = v_fma(p, r, v_set1(8.33333333e-3f));
    p = v_fma(p, r, v_set1(4.16666667e-2f));
    p = v_fma(p, r, v_set1(1.66666667e-1f));
    p = v_fma(p, r, v_set1(0.5f));
    p = v_fma(p, r, v_set1(1.0f));
    p = v_fma(p, r, v_set1(1.0f));
    return v_zero_below(x, v_set1(-87.0f), v_scale2(p, n));
}

static FKV_DECL_SOFTMAX(FKV_NAME(softmax)) {
    const vf lowest = v_set1(-INFINITY);
    vf top = lowest;
    int i = 0;
    for (; i + VL <= n; i += VL)
        top = v_max(top, v_load(s + i));
    if (i < n)
        top = v_max(top, v_first(v_load(s + i), n - i, lowest));
    float lanes[VL], m = -INFINITY;
    v_store(lanes, top);
    for (int j = 0; j < VL; j++)
        if (lanes[j] > m || lanes[j] != lanes[j])
            m = lanes[j];
    *max = m;
    *sum = 0.0f;
    if (m == -INFINITY) {
        memset(s, 0, (size_t)n * sizeof *s);
        return;
    }
    vf shift = v_set1(m), total = v_zero();
    for (i = 0; i + VL <= n; i += VL) {
        vf e = exp_negative(v_sub(v_load(s + i), shift));
        v_store(s + i, e);
        total = v_add(total, e);
    }
    if (i < n) {
        vf e = exp_negative(v_sub(v_load(s + i), shift));
        v_store_first(s + i, e, n - i);
        total = v_add(total, v_first(e, n - i, v_zero()));
    }
    *sum = v_hsum(total);
}

static inline __attribute__((always_inline)) void
interpolate_block(float *s, ptrdiff_t s_stride, const float *grid, ptrdiff_t grid_stride,
                  const struct fkv_taps *taps, const int rows) {
    const int cell = taps->cell, repeat = cell < VL ? cell : VL;
    for (int t = 0; t < 64; t += VL) {
        vf sum[4];
        UNROLL for (int r = 0; r < rows; r++) sum[r] = v_zero();
        for (int k = 0; k < FKV_TAPS; k++) {
            vf tap = v_load(&taps->tap[k][t]);
            UNROLL for (int r = 0; r < rows; r++) {
                const float *g = grid + r * grid_stride + t / cell + k;
                vf x = repeat == VL ? v_set1(*g) : v_load_repeat(g, repeat);
                sum[r] = v_fma(tap, x, sum[r]);
            }
        }
        UNROLL for (int r = 0; r < rows; r++) v_store(s + r * s_stride + t, sum[r]);
    }
}

static FKV_DECL_INTERPOLATE(FKV_NAME(interpolate)) {
    if (taps->width == 1) {
        for (int r = 0; r < rows; r++)
            memcpy(s + r * s_stride, grid + r * grid_stride, 64 * sizeof *s);
        return;
    }
    for (; rows >= 4; rows -= 4, s += 4 * s_stride, grid += 4 * grid_stride)
        interpolate_block(s, s_stride, grid, grid_stride, taps, 4);
    for (; rows; rows--, s += s_stride, grid += grid_stride)
        interpolate_block(s, s_stride, grid, grid_stride, taps, 1);
}

/* The eight taps of a token lie in the lanes of one 256-bit vector; even and odd tokens of a cell have a
 * sum each, so that the chain of dependent additions is half as long. */
static inline __attribute__((always_inline)) void spread_block(float *grid, ptrdiff_t grid_stride,
                                                               const float *p, ptrdiff_t p_stride,
                                                               const struct fkv_taps *taps,
                                                               int tokens, const int rows) {
    const int cell = taps->cell;
    for (int first = 0; first < tokens; first += cell, grid++) {
        int end = first + cell < tokens ? first + cell : tokens, t = first;
        __m256 even[4], odd[4];
        UNROLL for (int r = 0; r < rows; r++) {
            even[r] = _mm256_loadu_ps(grid + r * grid_stride);
            odd[r] = _mm256_setzero_ps();
        }
        for (; t + 2 <= end; t += 2) {
            __m256 tap0 = _mm256_loadu_ps(taps->by_token[t]);
            __m256 tap1 = _mm256_loadu_ps(taps->by_token[t + 1]);
            UNROLL for (int r = 0; r < rows; r++) {
                const float *x = p + r * p_stride + t;
                even[r] = _mm256_fmadd_ps(tap0, _mm256_set1_ps(x[0]), even[r]);
                odd[r] = _mm256_fmadd_ps(tap1, _mm256_set1_ps(x[1]), odd[r]);
            }
        }
        if (t < end) {
            __m256 tap = _mm256_loadu_ps(taps->by_token[t]);
            UNROLL for (int r = 0; r < rows; r++) even[r] =
                _mm256_fmadd_ps(tap, _mm256_set1_ps(p[r * p_stride + t]), even[r]);
        }
        UNROLL for (int r = 0; r < rows; r++)
            _mm256_storeu_ps(grid + r * grid_stride, _mm256_add_ps(even[r], odd[r]));
    }
}

static FKV_DECL_SPREAD(FKV_NAME(spread)) {
    if (taps->width == 1) {
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < tokens; t++)
                grid[r * grid_stride + t] += p[r * p_stride + t];
        return;
    }
    for (; rows >= 4; rows -= 4, grid += 4 * grid_stride, p += 4 * p_stride)
        spread_block(grid, grid_stride, p, p_stride, taps, tokens, 4);
    for (; rows; rows--, grid += grid_stride, p += p_stride)
        spread_block(grid, grid_stride, p, p_stride, taps, tokens, 1);
}

#include "simd_packed.h"

static inline __attribute__((always_inline)) void
unpack_class(float **x, const uint8_t **p, int count, const uint8_t **list, const uint16_t **scale,
             const uint16_t **zero, const float *carrier, const int bits) {
    for (int i = 0; i < count; i++, (*list)++, (*scale)++, (*zero)++, *p += 8 * bits) {
        float *to = *x + **list * 64;
        const vf step = v_set1(_cvtsh_ss(**scale));
        const vf least = v_set1(carrier[**list] + _cvtsh_ss(**zero));
        for (int half = 0; half < 16 / VL; half++) {
            vf key[4];
            key_vectors(key, *p, half, bits);
            UNROLL for (int v = 0; v < 4; v++)
                v_store(to + 16 * v + half * VL, v_fma(step, key[v], least));
        }
    }
}

static FKV_DECL_UNPACK(FKV_NAME(unpack)) {
    const uint8_t *p = k;
    unpack_class(&x, &p, counts[0], &list, &scale, &zero, carrier, 8);
    unpack_class(&x, &p, counts[1], &list, &scale, &zero, carrier, 4);
    unpack_class(&x, &p, counts[2], &list, &scale, &zero, carrier, 3);
    unpack_class(&x, &p, counts[3], &list, &scale, &zero, carrier, 2);
}

static FKV_DECL_OVER(FKV_NAME(over)) {
    for (int r = 0; r < rows; r++) {
        const vf least = v_set1(limit[r]);
        uint64_t all = 0;
        for (int t = 0; t < 64; t += VL)
            all |= v_over(v_load(s + r * s_stride + t), least) << t;
        bits[r] = all;
    }
}

static inline vi FKV_NAME(sift_dot)(vi s, vi u, vi z) {
    return vi_dot_words(s, u, z);
}
#define SIFT(name) FKV_NAME(name)
#define SIFT_TARGET
#define SIFT_ROWS MAX_ROWS
#define SIFT_VECTORS 2
#define SIFT_DOT 0
#include "simd_sift.h"

static FKV_DECL_FOLD_INDEX(FKV_NAME(fold_index)) {
    const int padded = (channels + 15) / 16 * 16;
    float scales[FKV_MAX_HEAD_DIM], centres[FKV_MAX_HEAD_DIM];
    for (int c = 0; c < padded; c += VL) {
        const int n = channels - c < VL ? channels - c : VL;
        v_store(scales + c, n > 0 ? v_first(v_load_bf16(scale + c), n, v_zero()) : v_zero());
        v_store(centres + c, n > 0 ? v_first(v_load_bf16(centre + c), n, v_zero()) : v_zero());
    }
    for (int r = 0; r < rows; r++, y += stride, z += stride, q += stride) {
        vf most = v_zero(), sum = v_zero();
        vi total = vi_set1(0);
        for (int c = 0; c < padded; c += VL) {
            const int n = channels - c < VL ? channels - c : VL;
            const vf x = n == VL ? v_load(q + c)
                         : n > 0 ? v_first(v_load(q + c), n, v_zero())
                                 : v_zero();
            const vf product = v_mul(x, v_load(scales + c));
            sum = v_fma(x, v_load(centres + c), sum);
            most = v_max(most, v_abs(product));
            v_store(y + c, product);
        }
        const float step = v_hmax(most) / 127.0f;
        const vf inverse = v_set1(step > 0x1p-120f ? 1.0f / step : 0.0f);
        for (int c = 0; c < padded; c += VL) {
            const vi code = v_to_int(v_mul(v_load(y + c), inverse));
            total = vi_add(total, code);
            vi_save_signed_bytes(z + c, code);
        }
        sums[r] = (struct fkv_folded){step, v_hsum(sum), (int32_t)v_hsum(v_from_int(total))};
    }
}

/* The 8 codes of an octet, one in a byte. */
static inline uint64_t octet(const uint8_t *p) {
    uint32_t x;
    memcpy(&x, p, sizeof x);
    return (x & UINT32_C(0x0f0f0f0f)) | (uint64_t)(x >> 4 & UINT32_C(0x0f0f0f0f)) << 32;
}
static inline __m256 refine_octet(const float *y, const uint8_t *coarse, const uint8_t *fine,
                                  __m256 sum) {
    const __m128i code = _mm_cvtsi64_si128((long long)(octet(coarse) << 4 | octet(fine)));
    const __m256 u = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(code));
    return _mm256_fmadd_ps(_mm256_loadu_ps(y), _mm256_sub_ps(u, _mm256_set1_ps(127.5f)), sum);
}

static FKV_DECL_REFINE(FKV_NAME(refine)) {
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    int o = 0;
    for (; o + 2 <= octets; o += 2, y += 16, coarse += 512, fine += 8) {
        even = refine_octet(y, coarse, fine, even);
        odd = refine_octet(y + 8, coarse + 256, fine + 4, odd);
    }
    if (o < octets)
        even = refine_octet(y, coarse, fine, even);
    even = _mm256_add_ps(even, odd);
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(even), _mm256_extractf128_ps(even, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

#define SLOTS(name)                                                                                \
    { FKV_PASTE(name, f32), FKV_PASTE(name, f16), FKV_PASTE(name, bf16) }

void FKV_NAME(fkv_kernels_init)(struct fkv_kernels *k) {
    *k = (struct fkv_kernels){
        .scores = SLOTS(scores),
        .weigh = SLOTS(weigh),
        .softmax = FKV_NAME(softmax),
        .interpolate = FKV_NAME(interpolate),
        .spread = FKV_NAME(spread),
        .contract = SLOTS(contract),
        .expand = SLOTS(expand),
        .accumulate = SLOTS(accumulate),
        .widen = SLOTS(widen),
        .narrow = SLOTS(narrow),
        .fft_pass = FKV_NAME(fft_pass),
        .rotate = FKV_NAME(rotate),
        .scores_packed = FKV_NAME(scores_packed),
        .weigh_packed = FKV_NAME(weigh_packed),
        .fold = FKV_NAME(fold),
        .code_keys = FKV_NAME(code_keys),
        .code_values = FKV_NAME(code_values),
        .uncarry = SLOTS(uncarry),
        .gather = SLOTS(gather),
        .carry = FKV_NAME(carry),
        .turn = SLOTS(turn),
        .unpack = FKV_NAME(unpack),
        .over = FKV_NAME(over),
        .fold_index = FKV_NAME(fold_index),
        .sift = FKV_NAME(sift),
        .refine = FKV_NAME(refine),
    };
}
