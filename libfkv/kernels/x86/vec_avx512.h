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
