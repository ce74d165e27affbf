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
};

/* Fills every slot for a level (never BEST): the reference first, then overrides upwards. */
void fkv_kernels_init(struct fkv_kernels *k, fkv_cpu_level level);
/* Best level of this processor (CPUID and XCR0) that this build has. */
fkv_cpu_level fkv_cpu_best_level(void);

void fkv_kernels_init_ref(struct fkv_kernels *k);
#ifdef FKV_HAVE_AVX2
void fkv_kernels_init_avx2(struct fkv_kernels *k);
#endif
#ifdef FKV_HAVE_AVX512
void fkv_kernels_init_avx512(struct fkv_kernels *k);
#endif

#endif /* FKV_KERNELS_KERNELS_H */
