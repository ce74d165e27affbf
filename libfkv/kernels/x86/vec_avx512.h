/* SPDX-License-Identifier: Apache-2.0 */
/* The vector of AVX-512: 16 floats. Same names as vec_avx2.h, so that simd.h is written once. */
#include <immintrin.h>

#define VL 16
typedef __m512 vf;

static inline vf v_zero(void) {
    return _mm512_setzero_ps();
}
static inline vf v_set1(float x) {
    return _mm512_set1_ps(x);
}
static inline vf v_fma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}
static inline vf v_mul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}
static inline vf v_add(vf a, vf b) {
    return _mm512_add_ps(a, b);
}
static inline vf v_sub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}
/* b if either is NaN */
static inline vf v_max(vf a, vf b) {
    return _mm512_max_ps(a, b);
}
static inline vf v_load(const float *p) {
    return _mm512_loadu_ps(p);
}
static inline void v_store(float *p, vf x) {
    _mm512_storeu_ps(p, x);
}
static inline __mmask16 v_mask(int n) {
    return (__mmask16)((1u << n) - 1u);
}
/* the first n lanes; the others are `other` or stay in memory as they are */
static inline vf v_first(vf x, int n, vf other) {
    return _mm512_mask_mov_ps(other, v_mask(n), x);
}
static inline void v_store_first(float *p, vf x, int n) {
    _mm512_mask_storeu_ps(p, v_mask(n), x);
}
static inline float v_hsum(vf x) {
    return _mm512_reduce_add_ps(x);
}
static inline vf v_load_f32(const float *p) {
    return _mm512_loadu_ps(p);
}
static inline vf v_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
static inline vf v_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline void v_save_f32(float *p, vf x) {
    _mm512_storeu_ps(p, x);
}
static inline void v_save_f16(uint16_t *p, vf x) {
    _mm256_storeu_si256((__m256i *)(void *)p,
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void v_save_bf16(uint16_t *p, vf x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    __m512i r = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}
/* lane i of the result is p[i / repeat]; repeat is a power of two up to VL */
static inline vf v_load_repeat(const float *p, int repeat) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m128i shift = _mm_cvtsi32_si128(__builtin_ctz((unsigned)repeat));
    return _mm512_permutexvar_ps(_mm512_srl_epi32(lane, shift), _mm512_loadu_ps(p));
}
/* 2^n * x for integral n */
static inline vf v_scale2(vf x, vf n) {
    return _mm512_scalef_ps(x, n);
}
static inline vf v_round(vf x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* 0 where x < limit, else y */
static inline vf v_zero_below(vf x, vf limit, vf y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), y);
}

/* ---- integers, for packed codes */

typedef __m512i vi;

static inline vi vi_set1(int x) {
    return _mm512_set1_epi32(x);
}
/* VL elements, zero-extended; exactly those are read */
static inline vi vi_bytes(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
}
static inline vi vi_words(const uint8_t *p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
/* the first n of VL dwords, the others 0 */
static inline vi vi_dwords(const uint8_t *p, int n) {
    return _mm512_maskz_loadu_epi32(v_mask(n), p);
}
static inline void vi_save_dwords(uint8_t *p, vi x, int n) {
    _mm512_mask_storeu_epi32(p, v_mask(n), x);
}
static inline void vi_save_bytes(uint8_t *p, vi x) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(x));
}
static inline void vi_save_words(uint8_t *p, vi x) {
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(x));
}
static inline vi vi_srl(vi x, int n) {
    return _mm512_srl_epi32(x, _mm_cvtsi32_si128(n));
}
static inline vi vi_sll(vi x, int n) {
    return _mm512_sll_epi32(x, _mm_cvtsi32_si128(n));
}
static inline vi vi_add(vi a, vi b) {
    return _mm512_add_epi32(a, b);
}
static inline vi vi_or(vi a, vi b) {
    return _mm512_or_si512(a, b);
}
static inline vi vi_and(vi a, vi b) {
    return _mm512_and_si512(a, b);
}
/* bit `bit` of each lane */
static inline unsigned vi_bits(vi x, int bit) {
    return _mm512_test_epi32_mask(x, _mm512_set1_epi32(1 << bit));
}
static inline vi v_to_int(vf x) {
    return _mm512_cvtps_epi32(x);
}
static inline vf v_from_int(vi x) {
    return _mm512_cvtepi32_ps(x);
}
/* the number in the low 2 or 4 bits of each lane */
static inline vf v_low2(vi x) {
    return _mm512_permutevar_ps(_mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3), x);
}
static inline vf v_low4(vi x) {
    return _mm512_permutexvar_ps(
        x, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
/* 4 more in the lanes whose bit is set in `bits`, or in which x has a 1 at bit t */
static inline vf v_add4_bits(vf low, unsigned bits) {
    return _mm512_mask_add_ps(low, (__mmask16)bits, low, _mm512_set1_ps(4.0f));
}
static inline vf v_add4_if(vf low, vi x, int t) {
    return v_add4_bits(low, vi_bits(x, t));
}
static inline vf v_min(vf a, vf b) {
    return _mm512_min_ps(a, b);
}
static inline float v_hmin(vf x) {
    return _mm512_reduce_min_ps(x);
}
static inline float v_hmax(vf x) {
    return _mm512_reduce_max_ps(x);
}
static inline vf v_div(vf a, vf b) {
    return _mm512_div_ps(a, b);
}
/* x where a == b, else y; NaN equals nothing */
static inline vf v_if_equal(vf a, vf b, vf x, vf y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), x);
}
/* the first n of VL f16; the others 0 */
static inline vf v_f16_first(const uint16_t *p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(v_mask(n), p));
}
static inline void v_save_f16_first(uint16_t *p, vf x, int n) {
    _mm256_mask_storeu_epi16(p, v_mask(n),
                             _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* rounded to f16: to nearest, down, up */
static inline vf v_round_f16(vf x) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline vf v_floor_f16(vf x) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}
static inline vf v_ceil_f16(vf x) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
}
/* p[0], p[1], p[0], p[1], .. */
static inline vf v_set_pair(const float *p) {
    return _mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_load_sd((const double *)(const void *)p)));
}
/* a[0], b[0], a[1], b[1], .. */
static inline void v_store_pairs(float *p, vf a, vf b) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high =
        _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    _mm512_storeu_ps(p, _mm512_permutex2var_ps(a, low, b));
    _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(a, high, b));
}
/* row[list[i]] for VL indices */
static inline vf v_gather(const float *row, const int *list) {
    return _mm512_i32gather_ps(_mm512_loadu_si512(list), row, 4);
}
/* bit i: x > limit in lane i; not if either is NaN */
static inline uint64_t v_over(vf x, vf limit) {
    return _mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ);
}
/* bit i: not x < limit in lane i; so if either is NaN */
static inline uint64_t v_not_under(vf x, vf limit) {
    return _mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ);
}
static inline vf v_abs(vf x) {
    return _mm512_abs_ps(x);
}
/* VL bytes, each lane clamped to -128..127 */
static inline void vi_save_signed_bytes(int8_t *p, vi x) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtsepi32_epi8(x));
}

/* ---- bytes: 4 in a lane */

static inline vi vi_load(const uint8_t *p) {
    return _mm512_loadu_si512(p);
}
/* 4-bit codes of the lower and upper halves of bytes */
static inline vi vi_lower(vi x) {
    return _mm512_and_si512(x, _mm512_set1_epi8(15));
}
static inline vi vi_upper(vi x) {
    return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15));
}
/* s + the sums of neighbouring products of unsigned and signed bytes, in words */
static inline vi vi_dot_words(vi s, vi u, vi z) {
    return _mm512_add_epi16(s, _mm512_maddubs_epi16(u, z));
}
/* s + the sums of neighbouring words, in lanes */
static inline vi vi_add_words(vi s, vi x) {
    return _mm512_add_epi32(s, _mm512_madd_epi16(x, _mm512_set1_epi16(1)));
}
