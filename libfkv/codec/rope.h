/* SPDX-License-Identifier: Apache-2.0 */
/* Head vectors on their way in: loading, and rotary position embedding (RoFormer, arXiv 2104.09864, section 3.2.2): angles in double, then f32. */
#ifndef FKV_CODEC_ROPE_H
#define FKV_CODEC_ROPE_H

#include "kernels/kernels.h"
#include "profile/profile.h"

/* cos and sin of position * inv_freq, times rope_scaling, for n positions: [n][rope_dim / 2] each. */
void fkv_rope_table(const struct fkv_model *model, const int64_t *positions, int64_t n,
                    float *cos_out, float *sin_out);
/* Rotates one head vector x[head_dim] in place with one row of the tables; nothing without RoPE. */
void fkv_rope_apply(const struct fkv_model *model, float *x, const float *cos_row,
                    const float *sin_row);
/* One head vector of a caller's tensor as f32. Kernels may read past a row, where a caller's memory may end,
 * so it goes through a copy. x has room for FKV_MAX_HEAD_DIM floats. */
void fkv_load_head(const struct fkv_kernels *kernels, const struct fkv_view *view, int64_t token,
                   int head, int dim, float *x);

#endif /* FKV_CODEC_ROPE_H */
