/* SPDX-License-Identifier: Apache-2.0 */
/* Rotary position embedding (RoFormer, arXiv 2104.09864, section 3.2.2): angles in double, then f32. */
#ifndef FKV_CODEC_ROPE_H
#define FKV_CODEC_ROPE_H

#include "profile/profile.h"

/* cos and sin of position * inv_freq, times rope_scaling, for n positions: [n][rope_dim / 2] each. */
void fkv_rope_table(const struct fkv_model *model, const int64_t *positions, int64_t n,
                    float *cos_out, float *sin_out);
/* Rotates one head vector x[head_dim] in place with one row of the tables; nothing without RoPE. */
void fkv_rope_apply(const struct fkv_model *model, float *x, const float *cos_row,
                    const float *sin_row);

#endif /* FKV_CODEC_ROPE_H */
