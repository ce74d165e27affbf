/* SPDX-License-Identifier: Apache-2.0 */
#include "codec/fft.h"

#include <math.h>

static bool smooth(int64_t n) {
    for (int p = 2; p <= 5; p++)
        while (n % p == 0)
            n /= p;
    return n == 1;
}

int64_t fkv_fft_size(int64_t n) {
    while (!smooth(n))
        n++;
    return n;
}

static void fill_twiddles(float *tw, int64_t n, int radix) {
    for (int64_t p = 0; p < n / radix; p++)
        for (int k = 1; k < radix; k++) {
            double angle = -2.0 * 3.14159265358979323846 * (double)(p * k % n) / (double)n;
            *tw++ = (float)cos(angle);
            *tw++ = (float)sin(angle);
        }
}

static int next_radix(int64_t n) {
    return n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : n % 3 == 0 ? 3 : 5;
}

size_t fkv_fft_bytes(int64_t n) {
    size_t floats = 0;
    for (; n > 1; n /= next_radix(n))
        floats += (size_t)(n / next_radix(n)) * (size_t)(2 * (next_radix(n) - 1));
    return floats * sizeof(float);
}

fkv_status fkv_fft_init(struct fkv_heap *heap, int64_t n, struct fkv_fft *fft) {
    *fft = (struct fkv_fft){.n = n, .twiddle_bytes = fkv_fft_bytes(n)};
    if (!fft->twiddle_bytes)
        return FKV_OK;
    fft->twiddles = fkv_heap_alloc(heap, fft->twiddle_bytes);
    if (!fft->twiddles)
        return FKV_ERR_NOMEM;
    for (int64_t rest = n; rest > 1; rest /= fft->radix[fft->passes++])
        fft->radix[fft->passes] = next_radix(rest);
    int64_t rest = n;
    float *tw = fft->twiddles;
    for (int i = 0; i < fft->passes; i++) {
        int radix = fft->radix[i];
        fill_twiddles(tw, rest, radix);
        tw += rest / radix * 2 * (radix - 1);
        rest /= radix;
    }
    return FKV_OK;
}

void fkv_fft_free(struct fkv_heap *heap, struct fkv_fft *fft) {
    fkv_heap_free(heap, fft->twiddles, fft->twiddle_bytes);
    *fft = (struct fkv_fft){0};
}

void fkv_fft_run(const struct fkv_kernels *kernels, const struct fkv_fft *fft,
                 struct fkv_lanes *lanes) {
    const float *tw = fft->twiddles;
    int64_t n = fft->n, s = 1;
    for (int i = 0; i < fft->passes; i++) {
        int radix = fft->radix[i];
        int64_t m = n / radix;
        kernels->fft_pass(lanes->re2, lanes->im2, lanes->re, lanes->im, tw, radix, (int)m, (int)s);
        *lanes = (struct fkv_lanes){lanes->re2, lanes->im2, lanes->re, lanes->im};
        tw += m * 2 * (radix - 1);
        n = m;
        s *= radix;
    }
}
