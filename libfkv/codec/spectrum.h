/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Everything that follows from a period T and a number of bins N alone: the Fourier basis, the grid on which a
 * band-limited function is evaluated, and the transforms between bins and grid. Shared by all sequences of a
 * cache with that period, layers and heads.
 *
 * A row of coefficients has `stride` = 2 * padded reals: cosines at [0, N), sines at [padded, padded + N),
 * zeros between. Stored rows are C[n] / 2T and S[n] / 2T of the sums in fkv.h: no greater than the largest
 * sample even after a reference is subtracted from it, so that f16 cannot overflow.
 *
 * A function f(t) = sum_n A_n cos(2 pi n t/T) + B_n sin(2 pi n t/T) is evaluated at all tokens of a segment
 * through a grid with a point every `cell` tokens: f(t) = sum_k tap[k][t % cell] g[t / cell + k], where
 *   g_i = Re sum_n window_n (A_n - i B_n) e^{2 pi i n cell (i - 3) / T}
 * and tap and window are the Kaiser-Bessel function and its transform (Beatty, Nishimura, Pauly, IEEE TMI
 * 2005). By Poisson's formula this holds for any real T / cell; with oversampling T / (2 N cell) >= 1.9 the
 * aliases are below 1e-7. Too short a period for that has cell 1 and grid = tokens, which is exact.
 * The grid sums are a chirp-z transform (Bluestein), or one FFT where T / cell is a smooth integer.
 */
#ifndef FKV_CODEC_SPECTRUM_H
#define FKV_CODEC_SPECTRUM_H

#include "codec/fft.h"

struct fkv_spectrum {
    int64_t period;
    int64_t capacity; /* tokens of a full segment: T rounded down to whole tiles */
    int bins;         /* N, at most T / 2 + 1 */
    int padded;
    int stride;
    int64_t grid; /* points of a full segment's grid */
    struct fkv_taps taps;
    float *panel;  /* [64][stride]: cos and sin of 2 pi n j / T for the tokens j of a first tile */
    float *window; /* [bins] */
    float *weight; /* [stride]: 2 w_n of the least-squares inverse; 0 at n = 0 */
    double *roots; /* e^{2 pi i k / 2T} as coarse[k >> 10] * fine[k & 1023]: pairs (re, im) */
    struct fkv_fft fft;
    bool direct;                  /* one FFT of T / cell points instead of the chirp-z */
    float *pre_re, *pre_im;       /* [bins]: factor of bin n before the sum */
    float *post_re, *post_im;     /* [grid]: factor of grid point i after it (chirp only) */
    float *kernel_re, *kernel_im; /* [fft.n]: transformed chirp / n (chirp only) */
    size_t bytes;                 /* of all tables together, this struct included */
};

/* Reals of a row of coefficients. */
int fkv_spectrum_stride(int64_t period, int bins);
/* Needs period >= 64. LIMIT if the sizes overflow what the transforms can index. */
fkv_status fkv_spectrum_create(struct fkv_heap *heap, const struct fkv_kernels *kernels,
                               int64_t period, int bins, struct fkv_spectrum **out);
void fkv_spectrum_destroy(struct fkv_heap *heap, struct fkv_spectrum *spectrum);
/* What fkv_spectrum_create() would allocate; 0 if it would refuse. */
size_t fkv_spectrum_bytes(int64_t period, int bins);

/* basis[64][stride] := cos and sin of 2 pi n (first + j) / T, divided by 2T */
void fkv_spectrum_basis(const struct fkv_spectrum *spectrum, int64_t first, float *basis);
/* row[stride] := the coefficients, over 2T, of a series that is 1 for l < length and 0 behind */
void fkv_spectrum_ones(const struct fkv_spectrum *spectrum, int64_t length, float *row);
/* *c = cos, *s = sin of 2 pi n t / T, from the integer n t mod T */
void fkv_spectrum_phase(const struct fkv_spectrum *spectrum, int64_t n, int64_t t, double *c,
                        double *s);

/* Scratch of the two transforms below, in bytes. */
size_t fkv_spectrum_scratch(const struct fkv_spectrum *spectrum);
/* rows (up to 16) of A, B -> grids. grid rows have spectrum->grid points. */
void fkv_spectrum_to_grid(const struct fkv_spectrum *spectrum, const struct fkv_kernels *kernels,
                          const float *row, ptrdiff_t row_stride, float *grid,
                          ptrdiff_t grid_stride, int rows, void *scratch);
/* The adjoint: row_n = sum_t p(t) cos, sum_t p(t) sin for grids made by the spread kernel from p. */
void fkv_spectrum_from_grid(const struct fkv_spectrum *spectrum, const struct fkv_kernels *kernels,
                            const float *grid, ptrdiff_t grid_stride, float *row,
                            ptrdiff_t row_stride, int rows, void *scratch);

#endif /* FKV_CODEC_SPECTRUM_H */
