/* SPDX-License-Identifier: Apache-2.0 */
#include "calib/calibrator.h"

#include "codec/rope.h"

#include "calib/channel_error.h"

#include <math.h>

static size_t layer_channels(const struct fkv_calibrator_object *cal) {
    return (size_t)cal->model.n_kv_heads * (size_t)cal->model.head_dim;
}

static double *channel_sums(const struct fkv_calibrator_object *cal, int layer, fkv_part part) {
    return cal->sums + ((size_t)layer * 2 + (size_t)part) * layer_channels(cal);
}

fkv_status fkv_calibrator_new(struct fkv_ctx *ctx, const fkv_model_params *model,
                              fkv_criterion criterion, const fkv_fourier_params *fourier,
                              struct fkv_calibrator_object **out) {
    struct fkv_calibrator_object *cal = fkv_heap_calloc(&ctx->heap, sizeof *cal);
    if (!cal)
        return fkv_fail_memory(ctx, sizeof *cal, "calibrator");
    cal->criterion = criterion;
    atomic_flag_clear(&cal->busy);
    fkv_status status = fkv_fourier_read(ctx, fourier, &cal->fourier);
    if (!status)
        status = fkv_model_read(ctx, model, &cal->model);
    if (status) {
        fkv_heap_free(&ctx->heap, cal, sizeof *cal);
        return status;
    }
    fkv_ctx_ref(ctx);
    cal->ctx = ctx;
    size_t layers = (size_t)cal->model.n_layers;
    size_t sums_bytes = layers * 2 * layer_channels(cal) * sizeof(double);
    cal->sums = fkv_heap_calloc(&ctx->heap, sums_bytes);
    cal->prompts = fkv_heap_calloc(&ctx->heap, layers * sizeof(int64_t));
    cal->queries = fkv_heap_calloc(&ctx->heap, layers);
    if (!cal->sums || !cal->prompts || !cal->queries) {
        status = fkv_fail_memory(ctx, sums_bytes, "statistics of a calibrator");
        fkv_calibrator_delete(cal);
        return status;
    }
    *out = cal;
    return FKV_OK;
}

void fkv_calibrator_delete(struct fkv_calibrator_object *cal) {
    struct fkv_ctx *ctx = cal->ctx;
    size_t layers = (size_t)cal->model.n_layers;
    fkv_heap_free(&ctx->heap, cal->sums, layers * 2 * layer_channels(cal) * sizeof(double));
    fkv_heap_free(&ctx->heap, cal->prompts, layers * sizeof(int64_t));
    fkv_heap_free(&ctx->heap, cal->queries, layers);
    fkv_sensitivity_free(&cal->sensitivity);
    fkv_model_free(ctx, &cal->model);
    fkv_heap_free(&ctx->heap, cal, sizeof *cal);
    fkv_ctx_unref(ctx);
}

/* ---- observing */

/* The first NaN or infinity in index order, so that the message does not depend on threads. */
static fkv_status check_finite(struct fkv_ctx *ctx, const char *name, const struct fkv_view *view,
                               int64_t tokens, int heads, int dim) {
    float row[FKV_MAX_HEAD_DIM];
    for (int64_t t = 0; t < tokens; t++)
        for (int h = 0; h < heads; h++) {
            fkv_load_head(ctx->kernels, view, t, h, dim, row);
            int bad = 0;
            for (int d = 0; d < dim; d++)
                bad |= !isfinite(row[d]);
            for (int d = 0; bad && d < dim; d++)
                if (!isfinite(row[d]))
                    return fkv_fail(ctx, FKV_ERR_NONFINITE, "%s[%lld][%d][%d] is not finite", name,
                                    (long long)t, h, d);
        }
    return FKV_OK;
}

fkv_status fkv_calibrator_tensor(struct fkv_calibrator_object *cal, const char *name,
                                 const fkv_tensor *tensor, int64_t tokens, int heads,
                                 struct fkv_view *view) {
    int dim = cal->model.head_dim;
    fkv_status status = fkv_tensor_view(cal->ctx, name, tensor, tokens, heads, dim, false, view);
    if (!status)
        status = check_finite(cal->ctx, name, view, tokens, heads, dim);
    return status;
}

/* The number of tokens is the keys'; the other tensors must agree with it. */
static fkv_status prompt_tokens(struct fkv_calibrator_object *cal, const fkv_tensor *k,
                                int64_t *tokens) {
    fkv_tensor keys;
    fkv_status status = fkv_params_read(cal->ctx, "k", k, sizeof keys, &keys, sizeof keys);
    if (status)
        return status;
    int64_t outside = (int64_t)cal->fourier.n_sink + cal->fourier.n_local;
    if (keys.ndim != 3 || keys.shape[0] <= outside)
        return fkv_fail(cal->ctx, FKV_ERR_INVALID,
                        "k must be [tokens, %d, %d] of more than n_sink + n_local = %lld tokens",
                        cal->model.n_kv_heads, cal->model.head_dim, (long long)outside);
    *tokens = keys.shape[0];
    return FKV_OK;
}

static fkv_status check_query_use(struct fkv_calibrator_object *cal, int layer, bool given) {
    enum fkv_query_use use = given ? FKV_QUERIES_GIVEN : FKV_QUERIES_ABSENT;
    if (cal->criterion == FKV_CRITERION_RESIDUAL && cal->queries[layer] != FKV_QUERIES_OPEN &&
        cal->queries[layer] != use)
        return fkv_fail(cal->ctx, FKV_ERR_INVALID,
                        "q must be given for all prompts of a layer or for none (layer %d)", layer);
    return FKV_OK;
}

/* Finite inputs may be so large that their squares are not. */
static fkv_status check_errors(struct fkv_calibrator_object *cal, int layer,
                               const double *added[2]) {
    for (int part = 0; part < 2; part++) {
        const double *sums = channel_sums(cal, layer, part);
        for (size_t i = 0; i < layer_channels(cal); i++)
            if (!isfinite(sums[i] + added[part][i]))
                return fkv_fail(cal->ctx, FKV_ERR_NONFINITE,
                                "the error of channel %zu of %c overflows: values too large", i,
                                part ? 'v' : 'k');
    }
    return FKV_OK;
}

static fkv_status measure(struct fkv_calibrator_object *cal, int layer, int64_t tokens,
                          const struct fkv_view *k, const struct fkv_view *v,
                          const struct fkv_view *q) {
    size_t channels = layer_channels(cal);
    size_t bytes = 2 * channels * sizeof(double);
    double *added = fkv_heap_alloc(&cal->ctx->heap, bytes);
    if (!added)
        return fkv_fail_memory(cal->ctx, bytes, "errors of a prompt");
    const double *parts[2] = {added, added + channels};
    bool residual = cal->criterion == FKV_CRITERION_RESIDUAL;
    struct fkv_prompt prompt = {cal->ctx, &cal->model, &cal->fourier, cal->criterion, tokens};
    fkv_status status = fkv_prompt_errors(&prompt, k, residual, residual ? q : NULL, added);
    if (!status)
        status = fkv_prompt_errors(&prompt, v, false, NULL, added + channels);
    if (!status)
        status = check_errors(cal, layer, parts);
    if (!status) {
        double *sums = channel_sums(cal, layer, FKV_PART_K);
        for (size_t i = 0; i < 2 * channels; i++)
            sums[i] += added[i];
        cal->prompts[layer]++;
        cal->queries[layer] = q ? FKV_QUERIES_GIVEN : FKV_QUERIES_ABSENT;
    }
    fkv_heap_free(&cal->ctx->heap, added, bytes);
    return status;
}

fkv_status fkv_calibrator_add(struct fkv_calibrator_object *cal, int layer, const fkv_tensor *k,
                              const fkv_tensor *v, const fkv_tensor *q) {
    struct fkv_view k_view, v_view, q_view;
    int64_t tokens = 0;
    fkv_status status = prompt_tokens(cal, k, &tokens);
    if (!status)
        status = check_query_use(cal, layer, q != NULL);
    if (!status)
        status = fkv_calibrator_tensor(cal, "k", k, tokens, cal->model.n_kv_heads, &k_view);
    if (!status && (uint64_t)tokens > cal->ctx->max_tokens)
        status = fkv_fail(cal->ctx, FKV_ERR_LIMIT, "a prompt of %lld tokens; the limit is %llu",
                          (long long)tokens, (unsigned long long)cal->ctx->max_tokens);
    if (!status)
        status = fkv_calibrator_tensor(cal, "v", v, tokens, cal->model.n_kv_heads, &v_view);
    if (!status && q)
        status = fkv_calibrator_tensor(cal, "q", q, tokens, cal->model.n_q_heads, &q_view);
    if (!status)
        status = measure(cal, layer, tokens, &k_view, &v_view, q ? &q_view : NULL);
    return status;
}

/* ---- results */

fkv_status fkv_calibrator_mean(struct fkv_calibrator_object *cal, int layer, fkv_part part,
                               double *errors) {
    if (!cal->prompts[layer])
        return fkv_fail(cal->ctx, FKV_ERR_STATE, "layer %d was not observed", layer);
    const double *sums = channel_sums(cal, layer, part);
    for (size_t i = 0; i < layer_channels(cal); i++)
        errors[i] = sums[i] / (double)cal->prompts[layer];
    return FKV_OK;
}

/* Ascending error, ties by index: a total order, so that any sort gives the same. */
static bool dearer(const double *errors, int32_t a, int32_t b) {
    return errors[a] > errors[b] || (errors[a] == errors[b] && a > b);
}

static void sift_down(int32_t *heap, size_t n, size_t i, const double *errors) {
    int32_t item = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && dearer(errors, heap[child + 1], heap[child]))
            child++;
        if (!dearer(errors, heap[child], item))
            break;
        heap[i] = heap[child];
    }
    heap[i] = item;
}

/* Marks the `count` channels of least error. The heap keeps the cheapest seen, the dearest on top. */
static void mark_cheapest(uint8_t *mask, int32_t *heap, const double *errors, size_t channels,
                          size_t count) {
    if (!count)
        return;
    for (size_t i = 0; i < count; i++)
        heap[i] = (int32_t)i;
    for (size_t i = count; i-- > 0;)
        sift_down(heap, count, i, errors);
    for (size_t i = count; i < channels; i++)
        if (dearer(errors, heap[0], (int32_t)i)) {
            heap[0] = (int32_t)i;
            sift_down(heap, count, 0, errors);
        }
    for (size_t i = 0; i < count; i++)
        mask[heap[i]] = 1;
}

/* The published shares were set for 28 layers; a layer belongs to the group in which it begins. */
static double published_fraction(int layer, int n_layers, fkv_part part) {
    if (layer * 28 < n_layers * 4)
        return part == FKV_PART_K ? .90 : .95;
    if (layer * 28 >= n_layers * 20)
        return part == FKV_PART_K ? .50 : .70;
    return .80;
}

static void choose(const struct fkv_calibrator_object *cal, fkv_part part, const double *fraction,
                   uint8_t *mask, int32_t *heap) {
    size_t channels = layer_channels(cal);
    int n_layers = cal->model.n_layers;
    for (int layer = 0; layer < n_layers; layer++) {
        double share = fraction ? fraction[layer] : published_fraction(layer, n_layers, part);
        size_t count = (size_t)floor(share * (double)channels + .5);
        /* the sums order as the means do: all channels of a layer saw the same prompts */
        mark_cheapest(mask + (size_t)layer * channels, heap, channel_sums(cal, layer, part),
                      channels, count);
    }
}

fkv_status fkv_calibrator_profile(struct fkv_calibrator_object *cal, const double *k_fraction,
                                  const double *v_fraction, struct fkv_profile_object **out) {
    struct fkv_ctx *ctx = cal->ctx;
    for (int layer = 0; layer < cal->model.n_layers; layer++)
        if (!cal->prompts[layer])
            return fkv_fail(ctx, FKV_ERR_STATE, "layer %d was not observed", layer);
    size_t channels = layer_channels(cal);
    size_t mask_bytes = (size_t)cal->model.n_layers * channels;
    uint8_t *masks = fkv_heap_calloc(&ctx->heap, 2 * mask_bytes);
    int32_t *heap = fkv_heap_alloc(&ctx->heap, channels * sizeof *heap);
    struct fkv_model model;
    fkv_status status = masks && heap ? fkv_model_copy(ctx, &cal->model, &model)
                                      : fkv_fail_memory(ctx, 2 * mask_bytes, "channel masks");
    if (!status) {
        choose(cal, FKV_PART_K, k_fraction, masks, heap);
        choose(cal, FKV_PART_V, v_fraction, masks + mask_bytes, heap);
        status =
            fkv_profile_new_fourier(ctx, &model, &cal->fourier, masks, masks + mask_bytes, out);
        if (status)
            fkv_model_free(ctx, &model);
    }
    fkv_heap_free(&ctx->heap, masks, 2 * mask_bytes);
    fkv_heap_free(&ctx->heap, heap, channels * sizeof *heap);
    return status;
}
