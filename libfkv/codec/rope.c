/* SPDX-License-Identifier: Apache-2.0 */
#include "codec/rope.h"

#include <string.h>

void fkv_rope_table(const struct fkv_model *model, const int64_t *positions, int64_t n,
                    float *cos_out, float *sin_out) {
    int pairs = model->rope_dim / 2;
    for (int64_t t = 0; t < n; t++) {
        double position = (double)positions[t];
        for (int j = 0; j < pairs; j++) {
            double c, s;
            fkv_angle(position, model->inv_freq[j], &c, &s);
            cos_out[t * pairs + j] = (float)(c * model->rope_scaling);
            sin_out[t * pairs + j] = (float)(s * model->rope_scaling);
        }
    }
}

void fkv_rope_begin(struct fkv_rope_rows *rows, const struct fkv_profile_object *profile) {
    rows->profile = profile;
    rows->from = -1;
}

void fkv_rope_row(struct fkv_rope_rows *rows, int64_t position, float *cos_out, float *sin_out) {
    const struct fkv_model *m = &rows->profile->model;
    const int pairs = m->rope_dim / 2;
    const int64_t on = position % FKV_TILE, from = position - on;
    const double *c = rows->profile->angles + 2 * on * pairs, *s = c + pairs;
    for (int j = 0; from != rows->from && j < pairs; j++)
        fkv_angle((double)from, m->inv_freq[j], &rows->cos[j], &rows->sin[j]);
    rows->from = from;
    for (int j = 0; j < pairs; j++) {
        const double x = rows->cos[j] * c[j] - rows->sin[j] * s[j];
        const double y = rows->sin[j] * c[j] + rows->cos[j] * s[j];
        cos_out[j] = (float)(x * m->rope_scaling);
        sin_out[j] = (float)(y * m->rope_scaling);
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
