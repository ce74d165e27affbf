/* SPDX-License-Identifier: Apache-2.0 */
/* How many bits each channel gets. */
#ifndef FKV_CALIB_ALLOCATE_H
#define FKV_CALIB_ALLOCATE_H

#include "profile/profile.h"

/* What there is to allocate to. */
struct fkv_allotment {
    struct fkv_ctx *ctx;
    const struct fkv_model *model;
    fkv_codec_params codec;
    const double *losses; /* [n_layers][2][Hk * D]: of the carrier alone; finite, not negative */
    const float *k_carrier, *v_carrier; /* [n_layers][Hk * D] or NULL */
};

/* Checked copy; `weights` points to the caller's array. NULL: defaults. */
fkv_status fkv_allocation_read(struct fkv_ctx *ctx, const struct fkv_model *model,
                               const fkv_allocation_params *params, fkv_allocation_params *own);
/* `params` from fkv_allocation_read(). report: may be NULL; all fields but struct_size are set. */
fkv_status fkv_allocate(const struct fkv_allotment *allotment, const fkv_allocation_params *params,
                        fkv_allocation_info *report, struct fkv_profile_object **out);

#endif /* FKV_CALIB_ALLOCATE_H */
