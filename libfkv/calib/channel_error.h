/* SPDX-License-Identifier: Apache-2.0 */
/* The error of each channel of one prompt under a criterion of the calibration. */
#ifndef FKV_CALIB_CHANNEL_ERROR_H
#define FKV_CALIB_CHANNEL_ERROR_H

#include "profile/profile.h"

struct fkv_prompt {
    struct fkv_ctx *ctx;
    const struct fkv_model *model;
    const fkv_fourier_params *fourier;
    fkv_criterion criterion;
    int64_t tokens; /* more than n_sink + n_local */
};

/* errors[Hk * D] of x, a checked and finite view of [tokens, Hk, D]. rotate: with RoPE at positions
 * 0..tokens-1. q, [tokens, Hq, D] before RoPE or NULL: each error times the mean square of that
 * channel in the queries that read it. Errors: NOMEM; results may be infinite or NaN if squares
 * overflow. */
fkv_status fkv_prompt_errors(const struct fkv_prompt *prompt, const struct fkv_view *x, bool rotate,
                             const struct fkv_view *q, double *errors);

#endif /* FKV_CALIB_CHANNEL_ERROR_H */
