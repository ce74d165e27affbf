/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The object behind fkv_calibrator: for each layer and part, the sum over prompts of each channel's
 * error under one criterion; or, under FKV_CRITERION_SENSITIVITY, the sums of sensitivity.h and nothing
 * else. Callers hold `busy` around every function but create and destroy.
 */
#ifndef FKV_CALIB_CALIBRATOR_H
#define FKV_CALIB_CALIBRATOR_H

#include "calib/sensitivity.h"

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
    struct fkv_sensitivity sensitivity;
};

fkv_status fkv_calibrator_new(struct fkv_ctx *ctx, const fkv_model_params *model,
                              fkv_criterion criterion, const fkv_fourier_params *fourier,
                              struct fkv_calibrator_object **out);
/* One of FKV_CRITERION_SENSITIVITY. codec NULL: defaults. */
fkv_status fkv_calibrator_new_sensitivity(struct fkv_ctx *ctx, const fkv_model_params *model,
                                          const fkv_codec_params *codec,
                                          struct fkv_calibrator_object **out);
/* The same from what fkv_sensitivity_save() wrote. */
fkv_status fkv_calibrator_restore(struct fkv_ctx *ctx, const char *data, size_t bytes,
                                  struct fkv_calibrator_object **out);
void fkv_calibrator_delete(struct fkv_calibrator_object *cal);
fkv_status fkv_calibrator_add(struct fkv_calibrator_object *cal, int layer, const fkv_tensor *k,
                              const fkv_tensor *v, const fkv_tensor *q);
/* A checked and finite view of [tokens, heads, D]. */
fkv_status fkv_calibrator_tensor(struct fkv_calibrator_object *cal, const char *name,
                                 const fkv_tensor *tensor, int64_t tokens, int heads,
                                 struct fkv_view *view);
/* The tensors of one window; those that are not given are NULL. */
struct fkv_window_tensors {
    const fkv_tensor *k, *v, *grad_k, *grad_v, *q;
};
fkv_status fkv_calibrator_add_window(struct fkv_calibrator_object *cal, int layer,
                                     const struct fkv_window_tensors *tensors);
fkv_status fkv_calibrator_set_weights(struct fkv_calibrator_object *cal, int layer,
                                      const double *weights);
fkv_status fkv_calibrator_mean(struct fkv_calibrator_object *cal, int layer, fkv_part part,
                               double *errors);
/* NULL fractions: the published shares by depth. Entries are checked by the caller. */
fkv_status fkv_calibrator_profile(struct fkv_calibrator_object *cal, const double *k_fraction,
                                  const double *v_fraction, struct fkv_profile_object **out);
/* params from fkv_allocation_read(); report may be NULL. */
fkv_status fkv_calibrator_allot(struct fkv_calibrator_object *cal,
                                const fkv_allocation_params *params, fkv_allocation_info *report,
                                struct fkv_profile_object **out);

#endif /* FKV_CALIB_CALIBRATOR_H */
