/* SPDX-License-Identifier: Apache-2.0 */
/* The vector of AVX2 with FMA and F16C: 8 floats. Same names as vec_avx512.h. */
#include <immintrin.h>

#define VL 8
typedef __m256 vf;

static inline vf v_zero(void) {
    return _mm256_setzero_ps();
}
static inline vf v_set1(float x) {
    return _mm256_set1_ps(x);
}
static inline vf v_fma(vf a, vf b, vf c) {
    return _mm256_fmadd_ps(a, b, c);
}
static inline vf v_mul(vf a, vf b) {
    return _mm256_mul_ps(a, b);
}
static inline vf v_add(vf a, vf b) {
    return _mm256_add_ps(a, b);
}
static inline vf v_sub(vf a, vf b) {
    return _mm256_sub_ps(a, b);
}
/* b if either is NaN */
static inline vf v_max(vf a, vf b) {
    return _mm256_max_ps(a, b);
}
static inline vf v_load(const float *p) {
    return _mm256_loadu_ps(p);
}
static inline void v_store(float *p, vf x) {
    _mm256_storeu_ps(p, x);
}
static inline __m256i v_mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
/* the first n lanes; the others are `other` or stay in memory as they are */
static inline vf v_first(vf x, int n, vf other) {
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(v_mask(n)));
}
static inline void v_store_first(float *p, vf x, int n) {
    _mm256_maskstore_ps(p, v_mask(n), x);
}
static inline float v_hsum(vf x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
static inline vf v_load_f32(const float *p) {
    return _mm256_loadu_ps(p);
}
static inline vf v_load_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
static inline vf v_load_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline void v_save_f32(float *p, vf x) {
    _mm256_storeu_ps(p, x);
}
static inline void v_save_f16(uint16_t *p, vf x) {
    _mm_storeu_si128((__m128i *)(void *)p,
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void v_save_bf16(uint16_t *p, vf x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    __m256i r = _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet), nan));
    r = _mm256_srli_epi32(r, 16);
    _mm_storeu_si128((__m128i *)(void *)p,
                     _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}
/* lane i of the result is p[i / repeat]; repeat is a power of two up to VL */
static inline vf v_load_repeat(const float *p, int repeat) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m128i shift = _mm_cvtsi32_si128(__builtin_ctz((unsigned)repeat));
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), _mm256_srl_epi32(lane, shift));
}
/* 2^n * x for integral n in the range of normal exponents */
static inline vf v_scale2(vf x, vf n) {
    __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), e));
}
static inline vf v_round(vf x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* 0 where x < limit, else y */
static inline vf v_zero_below(vf x, vf limit, vf y) {
    return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_NLT_UQ), y);
}

/* ---- integers, for packed codes */

typedef __m256i vi;

static inline vi vi_set1(int x) {
    return _mm256_set1_epi32(x);
}
/* VL elements, zero-extended; exactly those are read */
static inline vi vi_bytes(const uint8_t *p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p));
}
static inline vi vi_words(const uint8_t *p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
}
/* the first n of VL dwords, the others 0 */
static inline vi vi_dwords(const uint8_t *p, int n) {
    return _mm256_maskload_epi32((const int *)(const void *)p, v_mask(n));
}
static inline void vi_save_dwords(uint8_t *p, vi x, int n) {
    _mm256_maskstore_epi32((int *)(void *)p, v_mask(n), x);
}
static inline void vi_save_bytes(uint8_t *p, vi x) {
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packus_epi16(words, words));
}
static inline void vi_save_words(uint8_t *p, vi x) {
    _mm_storeu_si128((__m128i *)(void *)p,
                     _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
static inline vi vi_srl(vi x, int n) {
    return _mm256_srl_epi32(x, _mm_cvtsi32_si128(n));
}
static inline vi vi_sll(vi x, int n) {
    return _mm256_sll_epi32(x, _mm_cvtsi32_si128(n));
}
static inline vi vi_add(vi a, vi b) {
    return _mm256_add_epi32(a, b);
}
static inline vi vi_or(vi a, vi b) {
    return _mm256_or_si256(a, b);
}
static inline vi vi_and(vi a, vi b) {
    return _mm256_and_si256(a, b);
}
/* bit `bit` of each lane */
static inline unsigned vi_bits(vi x, int bit) {
    return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(vi_sll(x, 31 - bit)));
}
static inline vi v_to_int(vf x) {
    return _mm256_cvtps_epi32(x);
}
static inline vf v_from_int(vi x) {
    return _mm256_cvtepi32_ps(x);
}
/* the number in the low 2 or 4 bits of each lane */
static inline vf v_low2(vi x) {
    return _mm256_permutevar_ps(_mm256_setr_ps(0, 1, 2, 3, 0, 1, 2, 3), x);
}
static inline vf v_low4(vi x) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(15)));
}
/* 4 more in the lanes whose bit is set in `bits`, or in which x has a 1 at bit t */
static inline vf v_add4_bits(vf low, unsigned bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i set = _mm256_and_si256(_mm256_set1_epi32((int)bits), lane);
    __m256 four =
        _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)), _mm256_set1_ps(4.0f));
    return _mm256_add_ps(low, four);
}
static inline vf v_add4_if(vf low, vi x, int t) {
    __m256i bit = vi_sll(vi_and(vi_srl(x, t), vi_set1(1)), 2);
    return _mm256_add_ps(low, _mm256_cvtepi32_ps(bit));
}
static inline vf v_min(vf a, vf b) {
    return _mm256_min_ps(a, b);
}
static inline float v_hmin(vf x) {
    __m128 y = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_min_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_min_ss(y, _mm_movehdup_ps(y)));
}
static inline float v_hmax(vf x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
static inline vf v_div(vf a, vf b) {
    return _mm256_div_ps(a, b);
}
/* x where a == b, else y; NaN equals nothing */
static inline vf v_if_equal(vf a, vf b, vf x, vf y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
/* the first n of VL f16; the others 0 */
static inline vf v_f16_first(const uint16_t *p, int n) {
    uint16_t full[VL] = {0};
    if (n == VL)
        return v_load_f16(p);
    for (int i = 0; i < n; i++)
        full[i] = p[i];
    return v_load_f16(full);
}
static inline void v_save_f16_first(uint16_t *p, vf x, int n) {
    uint16_t full[VL];
    v_save_f16(full, x);
    for (int i = 0; i < n; i++)
        p[i] = full[i];
}
/* rounded to f16: to nearest, down, up */
static inline vf v_round_f16(vf x) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline vf v_floor_f16(vf x) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}
static inline vf v_ceil_f16(vf x) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
}
/* p[0], p[1], p[0], p[1], .. */
static inline vf v_set_pair(const float *p) {
    return _mm256_castpd_ps(_mm256_broadcast_sd((const double *)(const void *)p));
}
/* a[0], b[0], a[1], b[1], .. */
static inline void v_store_pairs(float *p, vf a, vf b) {
    __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    _mm256_storeu_ps(p, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
}
/* row[list[i]] for VL indices */
static inline vf v_gather(const float *row, const int *list) {
    return _mm256_i32gather_ps(row, _mm256_loadu_si256((const __m256i *)(const void *)list), 4);
}
/* bit i: x > limit in lane i; not if either is NaN */
static inline uint64_t v_over(vf x, vf limit) {
    return (uint64_t)_mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_GT_OQ));
}
/* bit i: not x < limit in lane i; so if either is NaN */
static inline uint64_t v_not_under(vf x, vf limit) {
    return (uint64_t)_mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_NLT_UQ));
}
static inline vf v_abs(vf x) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}
/* VL bytes, each lane clamped to -128..127 */
static inline void vi_save_signed_bytes(int8_t *p, vi x) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packs_epi16(words, words));
}

/* ---- bytes: 4 in a lane */

static inline vi vi_load(const uint8_t *p) {
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}
/* 4-bit codes of the lower and upper halves of bytes */
static inline vi vi_lower(vi x) {
    return _mm256_and_si256(x, _mm256_set1_epi8(15));
}
static inline vi vi_upper(vi x) {
    return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15));
}
/* s + the sums of neighbouring products of unsigned and signed bytes, in words */
static inline vi vi_dot_words(vi s, vi u, vi z) {
    return _mm256_add_epi16(s, _mm256_maddubs_epi16(u, z));
}
/* s + the sums of neighbouring words, in lanes */
static inline vi vi_add_words(vi s, vi x) {
    return _mm256_add_epi32(s, _mm256_madd_epi16(x, _mm256_set1_epi16(1)));
}
