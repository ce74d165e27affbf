/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Complex FFT of 16 vectors side by side (one per lane), for sizes 2^a 3^b 5^c. Side by side, because a
 * decode step always has several query heads to transform and their lanes fill a register without any
 * shuffling; no library we know of batches in this layout.
 */
#ifndef FKV_CODEC_FFT_H
#define FKV_CODEC_FFT_H

#include "core/core.h"
#include "kernels/kernels.h"

struct fkv_fft {
    int64_t n;
    int passes;
    int radix[40];
    float *twiddles; /* of all passes, one after another */
    size_t twiddle_bytes;
};

/* Four arrays [n][16]: the vectors and scratch of the same size. A pass swaps them. */
struct fkv_lanes {
    float *re, *im, *re2, *im2;
};

/* Smallest size >= n that has only the factors 2, 3 and 5. */
int64_t fkv_fft_size(int64_t n);
/* Bytes of the twiddles that fkv_fft_init() allocates. */
size_t fkv_fft_bytes(int64_t n);
fkv_status fkv_fft_init(struct fkv_heap *heap, int64_t n, struct fkv_fft *fft);
void fkv_fft_free(struct fkv_heap *heap, struct fkv_fft *fft);
/* re + i im := sum_j x_j e^{-2 pi i jk / n}. For the inverse (times n) exchange re and im around it. */
void fkv_fft_run(const struct fkv_kernels *kernels, const struct fkv_fft *fft,
                 struct fkv_lanes *lanes);

#endif /* FKV_CODEC_FFT_H */
