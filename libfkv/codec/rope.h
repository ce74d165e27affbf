/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Head vectors on their way in: loading, and rotary position embedding (RoFormer, arXiv 2104.09864, section 3.2.2):
 * angles in double, then f32. A row holds cos or sin of position * inv_freq, times rope_scaling, for each pair.
 */
#ifndef FKV_CODEC_ROPE_H
#define FKV_CODEC_ROPE_H

#include "kernels/kernels.h"
#include "profile/profile.h"

/* Rows of n positions, [n][rope_dim / 2] each, without a profile. */
void fkv_rope_table(const struct fkv_model *model, const int64_t *positions, int64_t n,
                    float *cos_out, float *sin_out);
/* Rows one after another: the sines of a multiple of 64 once, and from there on by the profile's table, so that a row
 * costs little, and no table grows with the sequence. A row is a function of its position alone. */
struct fkv_rope_rows {
    const struct fkv_profile_object *profile;
    int64_t from; /* that multiple; -1: none yet */
    double cos[FKV_MAX_PAIRS], sin[FKV_MAX_PAIRS];
};
void fkv_rope_begin(struct fkv_rope_rows *rows, const struct fkv_profile_object *profile);
void fkv_rope_row(struct fkv_rope_rows *rows, int64_t position, float *cos_out, float *sin_out);
/* Rotates one head vector x[head_dim] in place with one row of the tables; nothing without RoPE. */
void fkv_rope_apply(const struct fkv_model *model, float *x, const float *cos_row,
                    const float *sin_row);
/* One head vector of a caller's tensor as f32. Kernels may read past a row, where a caller's memory may end,
 * so it goes through a copy. x has room for FKV_MAX_HEAD_DIM floats. */
void fkv_load_head(const struct fkv_kernels *kernels, const struct fkv_view *view, int64_t token,
                   int head, int dim, float *x);

#endif /* FKV_CODEC_ROPE_H */
