/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The table of CPU kernels. A kernel computes on host arrays; it never allocates and never fails.
 *
 * A tile holds 64 tokens. K tiles are channel-major, [dims][64], so that tokens lie in vector lanes and
 * a score needs no sum across lanes; V tiles are token-major, [64][dims], so that channels lie in lanes.
 *
 * Every kernel treats each row (one query head of one query token) alone and in the same order of
 * operations however many rows a call has: that is what makes results independent of batching.
 *
 * All strides count elements. Inputs are padded: up to 15 elements past the last one of an array may be
 * read (what stands there, even NaN, has no influence). Outputs are written exactly.
 */
#ifndef FKV_KERNELS_KERNELS_H
#define FKV_KERNELS_KERNELS_H

#include "fkv/fkv.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FKV_TAPS 8       /* width of the interpolation kernel */
#define FKV_FFT_LANES 16 /* transforms that run side by side */

/* Storage types as table indices. */
enum fkv_store { FKV_STORE_F32, FKV_STORE_F16, FKV_STORE_BF16, FKV_N_STORE };

static inline enum fkv_store fkv_store_of(fkv_dtype dtype) {
    return dtype == FKV_DTYPE_F32   ? FKV_STORE_F32
           : dtype == FKV_DTYPE_F16 ? FKV_STORE_F16
                                    : FKV_STORE_BF16;
}

/* Interpolation from a grid with a point every `cell` tokens: token t of a tile is
 * sum_k tap[k][t] * grid[t / cell + k]. cell is 1, 2, 4, .. 64. width 8, or 1 (then cell is 1, tap 1). */
struct fkv_taps {
    int cell;
    int width;
    float tap[FKV_TAPS][64];
    float by_token[64][FKV_TAPS]; /* the same, transposed */
};

/* s[r][t] = (add ? s[r][t] : 0) + sum_d q[r][d] * k[d][t], t = 0..63. `next` is the panel of the same shape
 * that will be read after this one, or NULL: it is prefetched on the way, since it lies in another page,
 * where hardware prefetching does not follow. */
#define FKV_DECL_SCORES(name)                                                                      \
    void name(float *s, ptrdiff_t s_stride, const float *q, ptrdiff_t q_stride, const void *k,     \
              int dims, int rows, int add, const void *next)
/* o[r][c] += sum_{t < tokens} p[r][t] * v[t][c], t ascending; tokens 0..64; tokens beyond have no
 * influence. next as above. */
#define FKV_DECL_WEIGH(name)                                                                       \
    void name(float *o, ptrdiff_t o_stride, const float *p, ptrdiff_t p_stride, const void *v,     \
              int dims, int tokens, int rows, const void *next)
/* In place: m = max s, s = exp(s - m), *sum = sum of s. n >= 1; s[n..] is left alone. An all -inf row
 * gives zeros and sum 0. */
#define FKV_DECL_SOFTMAX(name) void name(float *s, int n, float *max, float *sum)
/* s[r][t] = interpolation, t = 0..63 */
#define FKV_DECL_INTERPOLATE(name)                                                                 \
    void name(float *s, ptrdiff_t s_stride, const float *grid, ptrdiff_t grid_stride,              \
              const struct fkv_taps *taps, int rows)
/* The adjoint: grid[r][t / cell + k] += tap[k][t] * p[r][t] for t < tokens */
#define FKV_DECL_SPREAD(name)                                                                      \
    void name(float *grid, ptrdiff_t grid_stride, const float *p, ptrdiff_t p_stride,              \
              const struct fkv_taps *taps, int tokens, int rows)
/* a[r][n] = sum_c q[r][c] * coef[c][n], n < count */
#define FKV_DECL_CONTRACT(name)                                                                    \
    void name(float *a, ptrdiff_t a_stride, const float *q, ptrdiff_t q_stride, const void *coef,  \
              ptrdiff_t coef_stride, int channels, int count, int rows)
/* o[r][c] = sum_n p[r][n] * coef[c][n] */
#define FKV_DECL_EXPAND(name)                                                                      \
    void name(float *o, ptrdiff_t o_stride, const float *p, ptrdiff_t p_stride, const void *coef,  \
              ptrdiff_t coef_stride, int channels, int count, int rows)
/* coef[c][n] = round(coef[c][n] + x[c][n]) */
#define FKV_DECL_ACCUMULATE(name)                                                                  \
    void name(void *coef, ptrdiff_t coef_stride, const float *x, ptrdiff_t x_stride, int channels, \
              int count)
/* n elements to f32 and back (round to nearest even; beyond the range: infinity) */
#define FKV_DECL_WIDEN(name) void name(float *dst, const void *src, size_t n)
#define FKV_DECL_NARROW(name) void name(void *dst, const float *src, size_t n)
/* One pass of a Stockham FFT over 16 lanes, arrays [points][16]: radix r in {2, 3, 4, 5};
 * y[q + s (r p + k)] = sum_j w_r^{jk} (w^{p} )^k x[q + s (p + m j)] with m = n / r, w = e^{-2 pi i / n};
 * twiddles: [m][r - 1] pairs (re, im) of w^{p k}, k = 1..r-1. */
#define FKV_DECL_FFT_PASS(name)                                                                    \
    void name(float *yr, float *yi, const float *xr, const float *xi, const float *twiddles,       \
              int radix, int m, int s)
/* z[p][lane] = x[p][lane] * (cr[p] + i ci[p]); z may be x */
#define FKV_DECL_ROTATE(name)                                                                      \
    void name(float *zr, float *zi, const float *xr, const float *xi, const float *cr,             \
              const float *ci, int points)

/*
 * Packed residuals. A tile's channels are sorted by bits: 8, 4, 3, then 2; counts[4] says how many there are
 * of each, and arrays of one number per channel are in the same order. Codes are read and written exactly,
 * without padding; a channel takes 8 bytes for every bit.
 *
 *   keys     one channel after another; the codes x[64] of a channel are
 *            8 bits: byte t = x[t]        4 bits: 16-bit word i = x[i] | x[16+i] << 4 | x[32+i] << 8 | x[48+i] << 12
 *            2 bits: byte i = x[i] | x[16+i] << 2 | x[32+i] << 4 | x[48+i] << 6
 *            3 bits: the low two bits as above, then four 16-bit words of high bits: bit i of word v is of x[16v+i]
 *   values   for each class, 32-bit words [64 / S][channels]: the codes of S tokens of one channel, the first one
 *            in the lowest bits. 8 bits: S = 4; 4 bits: S = 8; 2 bits: S = 16; 3 bits: the low two bits as above,
 *            then the high bits with S = 32
 */
#define FKV_N_PACKED 4
/* s[r][t] = (add ? s[r][t] : 0) + (base[r] + sum_c q[r][c] * x[c][t]), t = 0..63. next as in SCORES; bytes are
 * those of the panel. */
#define FKV_DECL_SCORES_PACKED(name)                                                               \
    void name(float *s, ptrdiff_t s_stride, const float *q, ptrdiff_t q_stride, const float *base, \
              const void *k, const uint16_t counts[FKV_N_PACKED], int rows, int add,               \
              const void *next)
/* o[r][c] += scale[c] * sum_{t < tokens} p[r][t] * x[t][c] + zero[c] * sum_{t < tokens} p[r][t]; scale and
 * zero are f16, read exactly; tokens 0..64. */
#define FKV_DECL_WEIGH_PACKED(name)                                                                \
    void name(float *o, ptrdiff_t o_stride, const float *p, ptrdiff_t p_stride, const void *v,     \
              const uint16_t counts[FKV_N_PACKED], const uint16_t *scale, const uint16_t *zero,    \
              int tokens, int rows, const void *next)
/* y[r][c] = q[r][c] * scale[c]; base[r] = sum_c q[r][c] * zero[c]. f16 as above. */
#define FKV_DECL_FOLD(name)                                                                        \
    void name(float *y, ptrdiff_t y_stride, float *base, const float *q, ptrdiff_t q_stride,       \
              const uint16_t *scale, const uint16_t *zero, int channels, int rows)
/*
 * Codes of `bits` (8, 4, 3 or 2) for the 64 * tiles tokens of each of `channels` channels, which share a scale and
 * a zero point: zero is the least value rounded down to f16, scale the range over 2^bits - 1 rounded up, so that
 * zero + scale * code is within scale / 2 of every value. A constant series has scale 0 and zero rounded to
 * nearest; one with a value that is not finite has zero NaN and codes 0. Codes of tile i go to codes + i *
 * tile_bytes. keys: x[c][t]; values: x[t][c].
 */
#define FKV_DECL_CODE(name)                                                                        \
    void name(void *codes, ptrdiff_t tile_bytes, uint16_t *scale, uint16_t *zero, const float *x,  \
              ptrdiff_t x_stride, int bits, int channels, int tiles)
/* x[t] = k[t] - (u * c[t] + v * s[t]), t = 0..63 */
#define FKV_DECL_UNCARRY(name)                                                                     \
    void name(float *x, const void *k, const float *c, const float *s, float u, float v)
/* x[t][i] = v[t][list[i]] - carrier[list[i]], t = 0..63, i < count; v has `dims` channels */
#define FKV_DECL_GATHER(name)                                                                      \
    void name(float *x, ptrdiff_t x_stride, const void *v, int dims, const uint8_t *list,          \
              int count, const float *carrier)
/*
 * The carriers' scores of a tile are, with t counted from its middle, sum_j a'_j cos w_j t + b'_j sin w_j t, where
 * a' = a c + b s and b' = b c - a s turn the weights to the tile's position. Rows of weights are a[pairs], then b,
 * `half` later. The first `fast` pairs go to y as they are, a' at [0, fast), b' at [fast, 2 fast). The others
 * become 16 Chebyshev coefficients at y[2 fast..], coefficient m being the sum over j of (m even ? a'_j : b'_j) *
 * project[j][m].
 */
#define FKV_CHEBYSHEV 16
#define FKV_DECL_CARRY(name)                                                                       \
    void name(float *y, ptrdiff_t y_stride, const float *weights, ptrdiff_t w_stride, int half,    \
              const float *c, const float *s, const float *project, int pairs, int fast, int rows)

/* Keys of a tile turned by RoPE: for pair j of `pairs`, a = first[j] and b = second[j],
 * y[a][t] = k[a][t] cos[j][t] - k[b][t] sin[j][t] and y[b][t] = k[b][t] cos[j][t] + k[a][t] sin[j][t]; channels
 * from 2 * pairs on are copied. y is [dims][64] and may be k; slots from..end-1 are written, and perhaps others of
 * the same sixteen. next as in SCORES. */
#define FKV_DECL_TURN(name)                                                                        \
    void name(float *y, const void *k, int dims, int pairs, const uint8_t *first,                  \
              const uint8_t *second, const float *cos, const float *sin, int from, int end,        \
              const void *next)
/* x[list[c]][t] = carrier[list[c]] + zero[c] + scale[c] * code[c][t], t = 0..63, for the packed channels of a key
 * tile; x is [..][64], scale and zero are f16. */
#define FKV_DECL_UNPACK(name)                                                                      \
    void name(float *x, const void *k, const uint16_t counts[FKV_N_PACKED], const uint8_t *list,   \
              const uint16_t *scale, const uint16_t *zero, const float *carrier)
/* Bit t of bits[r] is s[r][t] > limit[r], t = 0..63; NaN is not over anything. */
#define FKV_DECL_OVER(name)                                                                        \
    void name(uint64_t *bits, const float *s, ptrdiff_t s_stride, const float *limit, int rows)

/*
 * The index of keys (cache/index.h). Rows of a query are folded into a block's scales:
 * y[r][c] = q[r][c] * scale[c] and z[r][c] = y[r][c] / step, rounded to nearest, -127..127, where step is the greatest
 * |y[r][c]| over 127; where that is below 2^-120, z is 0. Both are written for `channels` rounded up to 16, with zeros
 * behind the last one; scale and centre are bfloat16, padded. The sums are of q * centre and of z. A sum that is not
 * finite makes z meaningless.
 */
struct fkv_folded {
    float step, centre;
    int32_t z;
};
#define FKV_DECL_FOLD_INDEX(name)                                                                  \
    void name(float *y, int8_t *z, ptrdiff_t stride, struct fkv_folded *sums, const float *q,      \
              const uint16_t *scale, const uint16_t *centre, int channels, int rows)
/* Bit t of bits[r] is !(step * i + (norm * bound[t] + base) < limit[r]) with two fused operations, so NaN sets it;
 * i = sum_c z[r][c] * u[c][t] over 8 * octets channels and 4-bit codes [octets][64][4]. bound: bfloat16, behind the
 * codes. next as in SCORES. */
struct fkv_sift {
    float step, base, norm;
};
#define FKV_DECL_SIFT(name)                                                                        \
    void name(uint64_t *bits, const int8_t *z, ptrdiff_t z_stride, const struct fkv_sift *sift,    \
              const float *limit, const uint8_t *codes, int octets, int rows, const void *next)
/* sum_c y[c] * (16 * a[c] + b[c] - 127.5) of one token: octet i of a is at coarse + 256 i, of b at fine + 4 i. */
#define FKV_DECL_REFINE(name)                                                                      \
    float name(const float *y, const uint8_t *coarse, const uint8_t *fine, int octets)

typedef FKV_DECL_SCORES((*fkv_scores_fn));
typedef FKV_DECL_WEIGH((*fkv_weigh_fn));
typedef FKV_DECL_SOFTMAX((*fkv_softmax_fn));
typedef FKV_DECL_INTERPOLATE((*fkv_interpolate_fn));
typedef FKV_DECL_SPREAD((*fkv_spread_fn));
typedef FKV_DECL_CONTRACT((*fkv_contract_fn));
typedef FKV_DECL_EXPAND((*fkv_expand_fn));
typedef FKV_DECL_ACCUMULATE((*fkv_accumulate_fn));
typedef FKV_DECL_WIDEN((*fkv_widen_fn));
typedef FKV_DECL_NARROW((*fkv_narrow_fn));
typedef FKV_DECL_FFT_PASS((*fkv_fft_pass_fn));
typedef FKV_DECL_ROTATE((*fkv_rotate_fn));
typedef FKV_DECL_SCORES_PACKED((*fkv_scores_packed_fn));
typedef FKV_DECL_WEIGH_PACKED((*fkv_weigh_packed_fn));
typedef FKV_DECL_FOLD((*fkv_fold_fn));
typedef FKV_DECL_CODE((*fkv_code_fn));
typedef FKV_DECL_UNCARRY((*fkv_uncarry_fn));
typedef FKV_DECL_GATHER((*fkv_gather_fn));
typedef FKV_DECL_CARRY((*fkv_carry_fn));
typedef FKV_DECL_TURN((*fkv_turn_fn));
typedef FKV_DECL_UNPACK((*fkv_unpack_fn));
typedef FKV_DECL_OVER((*fkv_over_fn));
typedef FKV_DECL_FOLD_INDEX((*fkv_fold_index_fn));
typedef FKV_DECL_SIFT((*fkv_sift_fn));
typedef FKV_DECL_REFINE((*fkv_refine_fn));

/* Slots by storage type; contract, expand and accumulate exist for F32 and F16 (BF16 slots are filled
 * too, so that no slot is ever NULL). */
struct fkv_kernels {
    fkv_scores_fn scores[FKV_N_STORE];
    fkv_weigh_fn weigh[FKV_N_STORE];
    fkv_softmax_fn softmax;
    fkv_interpolate_fn interpolate;
    fkv_spread_fn spread;
    fkv_contract_fn contract[FKV_N_STORE];
    fkv_expand_fn expand[FKV_N_STORE];
    fkv_accumulate_fn accumulate[FKV_N_STORE];
    fkv_widen_fn widen[FKV_N_STORE];
    fkv_narrow_fn narrow[FKV_N_STORE];
    fkv_fft_pass_fn fft_pass;
    fkv_rotate_fn rotate;
    fkv_scores_packed_fn scores_packed;
    fkv_weigh_packed_fn weigh_packed;
    fkv_fold_fn fold;
    fkv_code_fn code_keys, code_values;
    fkv_uncarry_fn uncarry[FKV_N_STORE];
    fkv_gather_fn gather[FKV_N_STORE];
    fkv_carry_fn carry;
    fkv_turn_fn turn[FKV_N_STORE];
    fkv_unpack_fn unpack;
    fkv_over_fn over;
    fkv_fold_index_fn fold_index;
    fkv_sift_fn sift;
    fkv_refine_fn refine;
};

/* Fills every slot for a level (never BEST): the reference first, then overrides upwards. */
void fkv_kernels_init(struct fkv_kernels *k, fkv_cpu_level level);
/* Best level of this processor (CPUID and XCR0) that this build has. */
fkv_cpu_level fkv_cpu_best_level(void);

void fkv_kernels_init_ref(struct fkv_kernels *k);
/* ref/packed_ref.c: the kernels of packed residuals */
void fkv_packed_init_ref(struct fkv_kernels *k);
/* ref/select_ref.c: the kernels of selection */
void fkv_select_init_ref(struct fkv_kernels *k);
#ifdef FKV_HAVE_AVX2
void fkv_kernels_init_avx2(struct fkv_kernels *k);
#endif
#ifdef FKV_HAVE_AVX512
void fkv_kernels_init_avx512(struct fkv_kernels *k);
/* Those that use AVX512_VNNI, which processors of that level may lack: same results. */
void fkv_kernels_init_avx512_vnni(struct fkv_kernels *k);
bool fkv_cpu_has_avx512_vnni(void);
#endif

#endif /* FKV_KERNELS_KERNELS_H */
