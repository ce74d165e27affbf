/* SPDX-License-Identifier: Apache-2.0 */
#include "api/calibrator.h"

fkv_status fkv_calibrator_params_init(fkv_calibrator_params *params, size_t struct_size) {
    const fkv_calibrator_params defaults = {.criterion = FKV_CRITERION_RESIDUAL};
    return fkv_params_init(params, struct_size, sizeof defaults, &defaults, sizeof defaults);
}

static fkv_status create(struct fkv_ctx *ctx, const fkv_model_params *model,
                         const fkv_calibrator_params *params, fkv_calibrator **out) {
    fkv_calibrator_params own;
    fkv_calibrator_params_init(&own, sizeof own);
    if (params) {
        fkv_status status = fkv_params_read(
            ctx, "params", params, offsetof(fkv_calibrator_params, codec), &own, sizeof own);
        if (status)
            return status;
    }
    if (own.criterion < FKV_CRITERION_RESIDUAL || own.criterion > FKV_CRITERION_SENSITIVITY)
        return fkv_fail(ctx, FKV_ERR_INVALID, "params.criterion: %ld is unknown",
                        (long)own.criterion);
    fkv_fourier_params defaults;
    fkv_fourier_params_init(&defaults, sizeof defaults);
    struct fkv_calibrator_object *cal;
    fkv_status status = own.criterion == FKV_CRITERION_SENSITIVITY
                            ? fkv_calibrator_new_sensitivity(ctx, model, own.codec, &cal)
                            : fkv_calibrator_new(ctx, model, own.criterion,
                                                 own.fourier ? own.fourier : &defaults, &cal);
    return status ? status : fkv_calibrator_publish(cal, out);
}

fkv_status fkv_calibrator_publish(struct fkv_calibrator_object *cal, fkv_calibrator **out) {
    *out = fkv_handle_create(FKV_KIND_CALIBRATOR, cal);
    if (*out)
        return FKV_OK;
    fkv_status status = fkv_fail(cal->ctx, FKV_ERR_NOMEM, "no memory for a handle");
    fkv_calibrator_delete(cal);
    return status;
}

fkv_status fkv_calibrator_create(fkv_context *ctx, const fkv_model_params *model,
                                 const fkv_calibrator_params *params, fkv_calibrator **out) {
    if (out)
        *out = NULL;
    struct fkv_ctx *c = fkv_handle_acquire(FKV_KIND_CONTEXT, ctx);
    if (!c)
        return FKV_ERR_HANDLE;
    fkv_status status = c->cuda
                            ? fkv_fail(c, FKV_ERR_UNSUPPORTED, "calibrators are of the CPU backend")
                        : out ? create(c, model, params, out)
                              : fkv_fail(c, FKV_ERR_INVALID, "out is NULL");
    fkv_handle_release(ctx);
    return status;
}

fkv_status fkv_calibrator_enter(fkv_calibrator *handle, struct fkv_calibrator_object **cal) {
    *cal = fkv_handle_acquire(FKV_KIND_CALIBRATOR, handle);
    if (!*cal)
        return FKV_ERR_HANDLE;
    if (atomic_flag_test_and_set_explicit(&(*cal)->busy, memory_order_acquire)) {
        fkv_status status =
            fkv_fail((*cal)->ctx, FKV_ERR_BUSY, "another thread is using the calibrator");
        fkv_handle_release(handle);
        return status;
    }
    return FKV_OK;
}

fkv_status fkv_calibrator_leave(fkv_calibrator *handle, struct fkv_calibrator_object *cal,
                                fkv_status status) {
    atomic_flag_clear_explicit(&cal->busy, memory_order_release);
    fkv_handle_release(handle);
    return status;
}

fkv_status fkv_calibrator_layer(const struct fkv_calibrator_object *cal, int32_t layer) {
    if (layer < 0 || layer >= cal->model.n_layers)
        return fkv_fail(cal->ctx, FKV_ERR_INVALID, "layer is %ld of %d", (long)layer,
                        cal->model.n_layers);
    return FKV_OK;
}

fkv_status fkv_calibrator_observe(fkv_calibrator *calibrator, int32_t layer, const fkv_tensor *k,
                                  const fkv_tensor *v, const fkv_tensor *q) {
    struct fkv_calibrator_object *cal;
    fkv_status status = fkv_calibrator_enter(calibrator, &cal);
    if (status)
        return status;
    status = fkv_calibrator_layer(cal, layer);
    if (!status && cal->criterion == FKV_CRITERION_SENSITIVITY) {
        const struct fkv_window_tensors tensors = {.k = k, .v = v, .q = q};
        status = fkv_calibrator_add_window(cal, layer, &tensors);
    } else if (!status) {
        status = fkv_calibrator_add(cal, layer, k, v, q);
    }
    return fkv_calibrator_leave(calibrator, cal, status);
}

fkv_status fkv_calibrator_room(const struct fkv_calibrator_object *cal, int32_t layer,
                               fkv_part part, const char *name, const double *values,
                               size_t count) {
    fkv_status status = fkv_calibrator_layer(cal, layer);
    if (status)
        return status;
    if (part != FKV_PART_K && part != FKV_PART_V)
        return fkv_fail(cal->ctx, FKV_ERR_INVALID, "part %ld is unknown", (long)part);
    if (!values)
        return fkv_fail(cal->ctx, FKV_ERR_INVALID, "%s is NULL", name);
    size_t needed = (size_t)cal->model.n_kv_heads * (size_t)cal->model.head_dim;
    if (count < needed)
        return fkv_fail(cal->ctx, FKV_ERR_BUFFER, "%s has room for %zu of %zu channels", name,
                        count, needed);
    return FKV_OK;
}

fkv_status fkv_calibrator_errors(fkv_calibrator *calibrator, int32_t layer, fkv_part part,
                                 double *errors, size_t count) {
    struct fkv_calibrator_object *cal;
    fkv_status status = fkv_calibrator_enter(calibrator, &cal);
    if (status)
        return status;
    status = fkv_calibrator_room(cal, layer, part, "errors", errors, count);
    if (!status && cal->criterion == FKV_CRITERION_SENSITIVITY)
        status =
            fkv_sensitivity_statistic(&cal->sensitivity, layer, part, FKV_STATISTIC_LOSS, errors);
    else if (!status)
        status = fkv_calibrator_mean(cal, layer, part, errors);
    return fkv_calibrator_leave(calibrator, cal, status);
}

static fkv_status check_fractions(const struct fkv_calibrator_object *cal, const char *name,
                                  const double *fractions, size_t count) {
    for (size_t i = 0; fractions && i < count; i++)
        if (!(fractions[i] >= 0 && fractions[i] <= 1))
            return fkv_fail(cal->ctx, FKV_ERR_INVALID, "%s[%zu] is %g, not in [0, 1]", name, i,
                            fractions[i]);
    return FKV_OK;
}

static fkv_status solve(struct fkv_calibrator_object *cal, const double *k_fraction,
                        const double *v_fraction, size_t count, fkv_profile **out) {
    bool given = k_fraction || v_fraction;
    if (cal->criterion == FKV_CRITERION_SENSITIVITY)
        return fkv_fail(cal->ctx, FKV_ERR_UNSUPPORTED,
                        "a calibrator of sensitivities is solved by fkv_calibrator_allocate()");
    if (!k_fraction != !v_fraction || count != (given ? (size_t)cal->model.n_layers : 0))
        return fkv_fail(cal->ctx, FKV_ERR_INVALID,
                        "k_fraction and v_fraction: both with count %d, or both NULL with count 0",
                        cal->model.n_layers);
    fkv_status status = check_fractions(cal, "k_fraction", k_fraction, count);
    if (!status)
        status = check_fractions(cal, "v_fraction", v_fraction, count);
    if (status)
        return status;
    struct fkv_profile_object *profile;
    status = fkv_calibrator_profile(cal, k_fraction, v_fraction, &profile);
    if (status)
        return status;
    *out = fkv_handle_create(FKV_KIND_PROFILE, profile);
    if (!*out) {
        fkv_profile_unref(profile);
        return fkv_fail(cal->ctx, FKV_ERR_NOMEM, "no memory for a handle");
    }
    return FKV_OK;
}

fkv_status fkv_calibrator_solve(fkv_calibrator *calibrator, const double *k_fraction,
                                const double *v_fraction, size_t count, fkv_profile **out) {
    if (out)
        *out = NULL;
    struct fkv_calibrator_object *cal;
    fkv_status status = fkv_calibrator_enter(calibrator, &cal);
    if (status)
        return status;
    status = out ? solve(cal, k_fraction, v_fraction, count, out)
                 : fkv_fail(cal->ctx, FKV_ERR_INVALID, "out is NULL");
    return fkv_calibrator_leave(calibrator, cal, status);
}

fkv_status fkv_calibrator_destroy(fkv_calibrator *calibrator) {
    if (!calibrator)
        return FKV_OK;
    void *object;
    fkv_status status = fkv_handle_close(FKV_KIND_CALIBRATOR, calibrator, &object);
    if (!status)
        fkv_calibrator_delete(object);
    return status;
}
