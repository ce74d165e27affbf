/* SPDX-License-Identifier: Apache-2.0 */
/* Calibrators of FKV_CRITERION_SENSITIVITY, and allocation. */
#include "api/calibrator.h"

#include "calib/allocate.h"

#include <math.h>

fkv_status fkv_allocation_params_init(fkv_allocation_params *params, size_t struct_size) {
    const fkv_allocation_params defaults = {.target = FKV_TARGET_RATIO,
                                            .value = 12,
                                            .tokens = 8192,
                                            .levels = 1 << 0 | 1 << 2 | 1 << 4};
    return fkv_params_init(params, struct_size, sizeof defaults, &defaults, sizeof defaults);
}

static fkv_status check_criterion(const struct fkv_calibrator_object *cal) {
    if (cal->criterion != FKV_CRITERION_SENSITIVITY)
        return fkv_fail(cal->ctx, FKV_ERR_UNSUPPORTED,
                        "only a calibrator of FKV_CRITERION_SENSITIVITY does this");
    return FKV_OK;
}

static fkv_status enter(fkv_calibrator *handle, struct fkv_calibrator_object **cal) {
    fkv_status status = fkv_calibrator_enter(handle, cal);
    if (!status) {
        status = check_criterion(*cal);
        if (status)
            fkv_calibrator_leave(handle, *cal, status);
    }
    return status;
}

fkv_status fkv_calibrator_observe_gradients(fkv_calibrator *calibrator, int32_t layer,
                                            const fkv_tensor *k, const fkv_tensor *v,
                                            const fkv_tensor *grad_k, const fkv_tensor *grad_v,
                                            const fkv_tensor *q) {
    struct fkv_calibrator_object *cal;
    fkv_status status = enter(calibrator, &cal);
    if (status)
        return status;
    const struct fkv_window_tensors tensors = {k, v, grad_k, grad_v, q};
    status = fkv_calibrator_layer(cal, layer);
    if (!status)
        status = fkv_calibrator_add_window(cal, layer, &tensors);
    return fkv_calibrator_leave(calibrator, cal, status);
}

fkv_status fkv_calibrator_weigh_values(fkv_calibrator *calibrator, int32_t layer,
                                       const double *weights, size_t count) {
    struct fkv_calibrator_object *cal;
    fkv_status status = enter(calibrator, &cal);
    if (status)
        return status;
    const size_t channels = fkv_sensitivity_channels(&cal->model);
    status = fkv_calibrator_layer(cal, layer);
    if (!status && !weights)
        status = fkv_fail(cal->ctx, FKV_ERR_INVALID, "weights is NULL");
    if (!status && count != channels)
        status = fkv_fail(cal->ctx, FKV_ERR_INVALID, "count is %zu, expected %zu", count, channels);
    if (!status)
        status = fkv_calibrator_set_weights(cal, layer, weights);
    return fkv_calibrator_leave(calibrator, cal, status);
}

fkv_status fkv_calibrator_statistic(fkv_calibrator *calibrator, int32_t layer, fkv_part part,
                                    fkv_statistic statistic, double *values, size_t count) {
    struct fkv_calibrator_object *cal;
    fkv_status status = enter(calibrator, &cal);
    if (status)
        return status;
    status = fkv_calibrator_room(cal, layer, part, "values", values, count);
    if (!status && (statistic < FKV_STATISTIC_MEAN || statistic > FKV_STATISTIC_LOSS))
        status = fkv_fail(cal->ctx, FKV_ERR_INVALID, "statistic %ld is unknown", (long)statistic);
    if (!status)
        status = fkv_sensitivity_statistic(&cal->sensitivity, layer, part, statistic, values);
    return fkv_calibrator_leave(calibrator, cal, status);
}

static fkv_status merge(struct fkv_calibrator_object *cal, fkv_calibrator *handle) {
    struct fkv_calibrator_object *other;
    fkv_status status = enter(handle, &other);
    if (status) {
        /* the text may be in another context */
        return fkv_fail(cal->ctx, status, "other: not to be had (%s)", fkv_status_string(status));
    }
    status = fkv_model_match(cal->ctx, &other->model, &cal->model);
    if (!status)
        status = fkv_sensitivity_merge(&cal->sensitivity, &other->sensitivity);
    return fkv_calibrator_leave(handle, other, status);
}

fkv_status fkv_calibrator_merge(fkv_calibrator *calibrator, fkv_calibrator *other) {
    struct fkv_calibrator_object *cal;
    fkv_status status = enter(calibrator, &cal);
    if (status)
        return status;
    status = other == calibrator
                 ? fkv_fail(cal->ctx, FKV_ERR_INVALID, "a calibrator cannot be merged with itself")
                 : merge(cal, other);
    return fkv_calibrator_leave(calibrator, cal, status);
}

fkv_status fkv_calibrator_save(fkv_calibrator *calibrator, char *buffer, size_t bytes,
                               size_t *needed) {
    struct fkv_calibrator_object *cal;
    fkv_status status = enter(calibrator, &cal);
    if (status)
        return status;
    if (!needed || (!buffer && bytes > 0))
        status = fkv_fail(cal->ctx, FKV_ERR_INVALID, "%s is NULL", needed ? "buffer" : "needed");
    else
        status = fkv_sensitivity_save(&cal->sensitivity, buffer, bytes, needed);
    return fkv_calibrator_leave(calibrator, cal, status);
}

fkv_status fkv_calibrator_load(fkv_context *handle, const char *data, size_t bytes,
                               fkv_calibrator **out) {
    if (!out)
        return FKV_ERR_INVALID;
    *out = NULL;
    struct fkv_ctx *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, handle);
    if (!ctx)
        return FKV_ERR_HANDLE;
    struct fkv_calibrator_object *cal;
    fkv_status status = data ? fkv_calibrator_restore(ctx, data, bytes, &cal)
                             : fkv_fail(ctx, FKV_ERR_INVALID, "data is NULL");
    if (!status)
        status = fkv_calibrator_publish(cal, out);
    fkv_handle_release(handle);
    return status;
}

/* ---- allocation */

/* Gives out the profile and the report, both or neither. */
static fkv_status hand_over(struct fkv_ctx *ctx, struct fkv_profile_object *profile,
                            const fkv_allocation_info *filled, fkv_allocation_info *report,
                            fkv_profile **out) {
    fkv_profile *handle = fkv_handle_create(FKV_KIND_PROFILE, profile);
    fkv_status status = handle ? FKV_OK : fkv_fail(ctx, FKV_ERR_NOMEM, "no memory for a handle");
    if (!status && report)
        status = fkv_params_write(ctx, "report", report, sizeof *filled, filled, sizeof *filled);
    if (!status)
        *out = handle;
    else if (handle)
        fkv_profile_destroy(handle);
    else
        fkv_profile_unref(profile);
    return status;
}

fkv_status fkv_calibrator_allocate(fkv_calibrator *calibrator, const fkv_allocation_params *params,
                                   fkv_allocation_info *report, fkv_profile **out) {
    struct fkv_calibrator_object *cal;
    if (out)
        *out = NULL;
    fkv_status status = enter(calibrator, &cal);
    if (status)
        return status;
    fkv_allocation_params own;
    fkv_allocation_info filled;
    struct fkv_profile_object *profile;
    status = out ? fkv_allocation_read(cal->ctx, &cal->model, params, &own)
                 : fkv_fail(cal->ctx, FKV_ERR_INVALID, "out is NULL");
    if (!status)
        status = fkv_calibrator_allot(cal, &own, &filled, &profile);
    if (!status)
        status = hand_over(cal->ctx, profile, &filled, report, out);
    return fkv_calibrator_leave(calibrator, cal, status);
}

/* What fkv_profile_create_allocated() is given. */
struct given {
    const double *losses[2];
    size_t losses_count;
    const float *carriers[2];
    size_t carrier_count;
};

static fkv_status check_given(struct fkv_ctx *ctx, const struct given *g, size_t n) {
    for (int part = 0; part < 2; part++) {
        const char name = part ? 'v' : 'k';
        if (!g->losses[part])
            return fkv_fail(ctx, FKV_ERR_INVALID, "%c_losses is NULL", name);
        for (size_t i = 0; g->losses_count == n && i < n; i++)
            if (!(g->losses[part][i] >= 0 && g->losses[part][i] <= 1e60))
                return fkv_fail(ctx, FKV_ERR_INVALID, "%c_losses[%zu]: not a number in 0..1e60",
                                name, i);
    }
    const size_t carriers = g->carriers[0] || g->carriers[1] ? n : 0;
    if (g->losses_count != n)
        return fkv_fail(ctx, FKV_ERR_INVALID, "losses_count is %zu, expected %zu", g->losses_count,
                        n);
    if (g->carrier_count != carriers)
        return fkv_fail(ctx, FKV_ERR_INVALID, "carrier_count is %zu, expected %zu",
                        g->carrier_count, carriers);
    return FKV_OK;
}

/* From [part][layer] to [layer][part]. */
static void interleave(const struct fkv_model *m, const struct given *g, double *losses) {
    const size_t channels = (size_t)m->n_kv_heads * (size_t)m->head_dim;
    for (size_t layer = 0; layer < (size_t)m->n_layers; layer++)
        for (int part = 0; part < 2; part++)
            for (size_t i = 0; i < channels; i++)
                *losses++ = g->losses[part][layer * channels + i];
}

static fkv_status allocate(struct fkv_ctx *ctx, const struct fkv_model *model,
                           const fkv_codec_params *codec, const fkv_allocation_params *params,
                           const struct given *g, fkv_allocation_info *report, fkv_profile **out) {
    const size_t n = (size_t)model->n_layers * (size_t)model->n_kv_heads * (size_t)model->head_dim;
    struct fkv_allotment a = {
        .ctx = ctx, .model = model, .k_carrier = g->carriers[0], .v_carrier = g->carriers[1]};
    fkv_allocation_params own;
    fkv_allocation_info filled;
    struct fkv_profile_object *profile;
    fkv_status status = fkv_codec_read(ctx, codec, &a.codec);
    if (!status)
        status = fkv_allocation_read(ctx, model, params, &own);
    if (!status)
        status = check_given(ctx, g, n);
    if (status)
        return status;
    double *losses = fkv_heap_alloc(&ctx->heap, 2 * n * sizeof *losses);
    if (!losses)
        return fkv_fail_memory(ctx, 2 * n * sizeof *losses, "losses of channels");
    interleave(model, g, losses);
    a.losses = losses;
    status = fkv_allocate(&a, &own, &filled, &profile);
    fkv_heap_free(&ctx->heap, losses, 2 * n * sizeof *losses);
    return status ? status : hand_over(ctx, profile, &filled, report, out);
}

fkv_status fkv_profile_create_allocated(fkv_context *handle, const fkv_model_params *model_params,
                                        const fkv_codec_params *codec,
                                        const fkv_allocation_params *params, const double *k_losses,
                                        const double *v_losses, size_t losses_count,
                                        const float *k_carrier, const float *v_carrier,
                                        size_t carrier_count, fkv_allocation_info *report,
                                        fkv_profile **out) {
    if (!out)
        return FKV_ERR_INVALID;
    *out = NULL;
    struct fkv_ctx *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, handle);
    if (!ctx)
        return FKV_ERR_HANDLE;
    const struct given g = {
        {k_losses, v_losses}, losses_count, {k_carrier, v_carrier}, carrier_count};
    struct fkv_model model;
    fkv_status status = fkv_model_read(ctx, model_params, &model);
    if (!status) {
        status = allocate(ctx, &model, codec, params, &g, report, out);
        fkv_model_free(ctx, &model);
    }
    fkv_handle_release(handle);
    return status;
}
