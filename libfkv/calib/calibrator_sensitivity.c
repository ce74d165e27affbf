/* SPDX-License-Identifier: Apache-2.0 */
/* What a calibrator does under FKV_CRITERION_SENSITIVITY. */
#include "calib/allocate.h"
#include "calib/calibrator.h"

#include <string.h>

/* Takes over *model. */
static fkv_status make(struct fkv_ctx *ctx, struct fkv_model *model, const fkv_codec_params *codec,
                       struct fkv_calibrator_object **out) {
    struct fkv_calibrator_object *cal = fkv_heap_calloc(&ctx->heap, sizeof *cal);
    if (!cal) {
        fkv_model_free(ctx, model);
        return fkv_fail_memory(ctx, sizeof *cal, "calibrator");
    }
    cal->criterion = FKV_CRITERION_SENSITIVITY;
    atomic_flag_clear(&cal->busy);
    fkv_ctx_ref(ctx);
    cal->ctx = ctx;
    cal->model = *model;
    fkv_status status = fkv_sensitivity_init(&cal->sensitivity, ctx, &cal->model, codec);
    if (status) {
        fkv_calibrator_delete(cal);
        return status;
    }
    *out = cal;
    return FKV_OK;
}

fkv_status fkv_calibrator_new_sensitivity(struct fkv_ctx *ctx, const fkv_model_params *params,
                                          const fkv_codec_params *codec,
                                          struct fkv_calibrator_object **out) {
    struct fkv_model model;
    fkv_status status = fkv_model_read(ctx, params, &model);
    return status ? status : make(ctx, &model, codec, out);
}

fkv_status fkv_calibrator_restore(struct fkv_ctx *ctx, const char *data, size_t bytes,
                                  struct fkv_calibrator_object **out) {
    struct fkv_model model;
    fkv_codec_params codec;
    struct fkv_calibrator_object *cal;
    fkv_status status = fkv_sensitivity_read_model(ctx, data, bytes, &model, &codec);
    if (!status)
        status = make(ctx, &model, &codec, &cal);
    if (status)
        return status;
    status = fkv_sensitivity_read_sums(&cal->sensitivity, data, bytes);
    if (status) {
        fkv_calibrator_delete(cal);
        return status;
    }
    *out = cal;
    return FKV_OK;
}

/* ---- observing */

static fkv_status window_tokens(struct fkv_calibrator_object *cal, const fkv_tensor *k,
                                int64_t *tokens) {
    fkv_tensor keys;
    fkv_status status = fkv_params_read(cal->ctx, "k", k, sizeof keys, &keys, sizeof keys);
    if (status)
        return status;
    if (keys.ndim != 3 || keys.shape[0] < 1)
        return fkv_fail(cal->ctx, FKV_ERR_INVALID, "k must be [tokens, %d, %d] of at least a token",
                        cal->model.n_kv_heads, cal->model.head_dim);
    *tokens = keys.shape[0];
    return FKV_OK;
}

fkv_status fkv_calibrator_add_window(struct fkv_calibrator_object *cal, int layer,
                                     const struct fkv_window_tensors *t) {
    const int kv_heads = cal->model.n_kv_heads;
    struct fkv_window w = {.gradients = t->grad_k, .queries = t->q};
    if (!t->grad_k != !t->grad_v)
        return fkv_fail(cal->ctx, FKV_ERR_INVALID, "%s is NULL: give both gradients or none",
                        t->grad_k ? "grad_v" : "grad_k");
    fkv_status status = window_tokens(cal, t->k, &w.tokens);
    if (!status)
        status = fkv_calibrator_tensor(cal, "k", t->k, w.tokens, kv_heads, &w.k);
    if (!status && (uint64_t)w.tokens > cal->ctx->max_tokens)
        status = fkv_fail(cal->ctx, FKV_ERR_LIMIT, "a window of %lld tokens; the limit is %llu",
                          (long long)w.tokens, (unsigned long long)cal->ctx->max_tokens);
    if (!status)
        status = fkv_calibrator_tensor(cal, "v", t->v, w.tokens, kv_heads, &w.v);
    if (!status && t->grad_k)
        status = fkv_calibrator_tensor(cal, "grad_k", t->grad_k, w.tokens, kv_heads, &w.grad_k);
    if (!status && t->grad_v)
        status = fkv_calibrator_tensor(cal, "grad_v", t->grad_v, w.tokens, kv_heads, &w.grad_v);
    if (!status && t->q)
        status = fkv_calibrator_tensor(cal, "q", t->q, w.tokens, cal->model.n_q_heads, &w.q);
    return status ? status : fkv_sensitivity_add(&cal->sensitivity, layer, &w);
}

fkv_status fkv_calibrator_set_weights(struct fkv_calibrator_object *cal, int layer,
                                      const double *weights) {
    const size_t channels = fkv_sensitivity_channels(&cal->model);
    for (size_t i = 0; i < channels; i++)
        if (!(weights[i] >= 0 && weights[i] <= 1e30))
            return fkv_fail(cal->ctx, FKV_ERR_INVALID, "weights[%zu]: not a number in 0..1e30", i);
    memcpy(cal->sensitivity.weights + (size_t)layer * channels, weights, channels * sizeof(double));
    cal->sensitivity.counts[layer].weighted = 1;
    return FKV_OK;
}

/* ---- allocating */

fkv_status fkv_calibrator_allot(struct fkv_calibrator_object *cal,
                                const fkv_allocation_params *params, fkv_allocation_info *report,
                                struct fkv_profile_object **out) {
    struct fkv_heap *heap = &cal->ctx->heap;
    const size_t half = (size_t)cal->model.n_layers * fkv_sensitivity_channels(&cal->model);
    const size_t loss_bytes = 2 * half * sizeof(double), carrier_bytes = 2 * half * sizeof(float);
    double *losses = fkv_heap_alloc(heap, loss_bytes);
    float *carriers = fkv_heap_alloc(heap, carrier_bytes);
    fkv_status status = losses && carriers
                            ? fkv_sensitivity_losses(&cal->sensitivity, params->tokens, losses)
                            : fkv_fail_memory(cal->ctx, loss_bytes, "losses of channels");
    if (!status)
        status = fkv_sensitivity_carriers(&cal->sensitivity, carriers);
    if (!status) {
        const struct fkv_allotment a = {cal->ctx, &cal->model, cal->sensitivity.codec,
                                        losses,   carriers,    carriers + half};
        status = fkv_allocate(&a, params, report, out);
    }
    fkv_heap_free(heap, losses, loss_bytes);
    fkv_heap_free(heap, carriers, carrier_bytes);
    return status;
}
