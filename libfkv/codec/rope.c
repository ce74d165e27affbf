/* SPDX-License-Identifier: Apache-2.0 */
#include "codec/rope.h"

#include <math.h>
#include <string.h>

/* A position of 31 bits times a frequency rounds to 2^-23 of an angle, as coarse as the f32 result.
 * fma gives the rounding exactly, and the first order of the addition theorem puts it back. */
void fkv_rope_table(const struct fkv_model *model, const int64_t *positions, int64_t n,
                    float *cos_out, float *sin_out) {
    int pairs = model->rope_dim / 2;
    for (int64_t t = 0; t < n; t++) {
        double position = (double)positions[t];
        for (int j = 0; j < pairs; j++) {
            double angle = position * model->inv_freq[j];
            double rest = fma(position, model->inv_freq[j], -angle);
            double c = cos(angle), s = sin(angle);
            cos_out[t * pairs + j] = (float)((c - rest * s) * model->rope_scaling);
            sin_out[t * pairs + j] = (float)((s + rest * c) * model->rope_scaling);
        }
    }
}

void fkv_rope_apply(const struct fkv_model *model, float *x, const float *cos_row,
                    const float *sin_row) {
    int pairs = model->rope_dim / 2;
    bool interleaved = model->rope_layout == FKV_ROPE_INTERLEAVED;
    int step = interleaved ? 2 : 1;
    int distance = interleaved ? 1 : pairs;
    for (int j = 0; j < pairs; j++) {
        float *a = x + j * step, *b = a + distance;
        float a0 = *a, b0 = *b;
        *a = a0 * cos_row[j] - b0 * sin_row[j];
        *b = b0 * cos_row[j] + a0 * sin_row[j];
    }
}

void fkv_load_head(const struct fkv_kernels *kernels, const struct fkv_view *view, int64_t token,
                   int head, int dim, float *x) {
    _Alignas(64) char copy[(FKV_MAX_HEAD_DIM + 16) * sizeof(float)];
    const char *from = view->data + token * view->token_stride + head * view->head_stride;
    memcpy(copy, from, (size_t)dim * fkv_dtype_size(view->dtype));
    kernels->widen[fkv_store_of(view->dtype)](x, copy, (size_t)dim);
}
