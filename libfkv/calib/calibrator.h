/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The object behind fkv_calibrator: for each layer and part, the sum over prompts of each channel's
 * error under one criterion. Callers hold `busy` around every function but create and destroy.
 */
#ifndef FKV_CALIB_CALIBRATOR_H
#define FKV_CALIB_CALIBRATOR_H

#include "profile/profile.h"

/* Whether the prompts of a layer came with queries: all of them do or none does, because errors with
 * and without the weight of the queries are of different units. */
enum fkv_query_use { FKV_QUERIES_OPEN, FKV_QUERIES_GIVEN, FKV_QUERIES_ABSENT };

struct fkv_calibrator_object {
    struct fkv_ctx *ctx;
    struct fkv_model model;
    fkv_fourier_params fourier;
    fkv_criterion criterion;
    atomic_flag busy;
    double *sums;     /* [n_layers][2][Hk * D] */
    int64_t *prompts; /* [n_layers] */
    uint8_t *queries; /* [n_layers], fkv_query_use */
};

fkv_status fkv_calibrator_new(struct fkv_ctx *ctx, const fkv_model_params *model,
                              fkv_criterion criterion, const fkv_fourier_params *fourier,
                              struct fkv_calibrator_object **out);
void fkv_calibrator_delete(struct fkv_calibrator_object *cal);
fkv_status fkv_calibrator_add(struct fkv_calibrator_object *cal, int layer, const fkv_tensor *k,
                              const fkv_tensor *v, const fkv_tensor *q);
fkv_status fkv_calibrator_mean(struct fkv_calibrator_object *cal, int layer, fkv_part part,
                               double *errors);
/* NULL fractions: the published shares by depth. Entries are checked by the caller. */
fkv_status fkv_calibrator_profile(struct fkv_calibrator_object *cal, const double *k_fraction,
                                  const double *v_fraction, struct fkv_profile_object **out);

#endif /* FKV_CALIB_CALIBRATOR_H */
