/* SPDX-License-Identifier: Apache-2.0 */
#include "attend/longcache.h"
#include "device/device.h"

fkv_status fkv_batch_init(fkv_batch *batch, size_t struct_size) {
    const fkv_batch defaults = {.struct_size = sizeof defaults};
    return fkv_params_init(batch, struct_size, sizeof defaults, &defaults, sizeof defaults);
}

fkv_status fkv_plan_create(fkv_cache *cache, fkv_plan **out) {
    if (out)
        *out = NULL;
    struct fkv_cache_object *c = fkv_handle_acquire(FKV_KIND_CACHE, cache);
    if (!c)
        return FKV_ERR_HANDLE;
    struct fkv_plan_object *plan = NULL;
    fkv_status status =
        out ? fkv_plan_new(c, &plan) : fkv_fail(c->ctx, FKV_ERR_INVALID, "out is NULL");
    if (status == FKV_OK) {
        *out = fkv_handle_create(FKV_KIND_PLAN, plan);
        if (!*out) {
            status = fkv_fail(c->ctx, FKV_ERR_NOMEM, "no memory for a handle");
            fkv_plan_free(plan);
        }
    }
    fkv_handle_release(cache);
    return status;
}

fkv_status fkv_plan_destroy(fkv_plan *plan) {
    void *object;
    if (!plan)
        return FKV_OK;
    fkv_status status = fkv_handle_close(FKV_KIND_PLAN, plan, &object);
    if (status == FKV_OK)
        fkv_plan_free(object);
    return status;
}

/* Takes a plan, and its cache for reading or writing; leave() gives both back. */
static fkv_status enter(fkv_plan *handle, bool writing, struct fkv_plan_object **plan) {
    struct fkv_plan_object *p = fkv_handle_acquire(FKV_KIND_PLAN, handle);
    int idle = 0;
    *plan = p;
    if (!p)
        return FKV_ERR_HANDLE;
    fkv_status status = FKV_OK;
    writing = writing || p->ctx->cuda; /* even a plan's update moves pages there */
    if (!atomic_compare_exchange_strong(&p->busy, &idle, 1)) {
        status = fkv_fail(p->ctx, FKV_ERR_BUSY, "another thread is using the plan");
        fkv_handle_release(handle);
        return status;
    }
    if (writing ? !fkv_cache_write_lock(p->cache) : !fkv_cache_read_lock(p->cache)) {
        status = fkv_fail(p->ctx, FKV_ERR_BUSY, "another thread is using the cache");
    } else if (p->cache->closed) {
        status = fkv_fail(p->ctx, FKV_ERR_HANDLE, "the plan's cache was destroyed");
        if (writing)
            fkv_cache_write_unlock(p->cache);
        else
            fkv_cache_read_unlock(p->cache);
    }
    if (status == FKV_OK)
        return FKV_OK;
    atomic_store(&p->busy, 0);
    fkv_handle_release(handle);
    return status;
}

static fkv_status leave(fkv_plan *handle, struct fkv_plan_object *plan, bool writing,
                        fkv_status status) {
    if (writing || plan->ctx->cuda)
        fkv_cache_write_unlock(plan->cache);
    else
        fkv_cache_read_unlock(plan->cache);
    atomic_store(&plan->busy, 0);
    fkv_handle_release(handle);
    return status;
}

static fkv_status read_batch(struct fkv_ctx *ctx, const fkv_batch *batch, fkv_batch *own) {
    fkv_status status = fkv_params_read(ctx, "batch", batch, sizeof *own, own, sizeof *own);
    if (status != FKV_OK)
        return status;
    if (own->count < 0)
        return fkv_fail(ctx, FKV_ERR_INVALID, "batch.count: %d is negative", own->count);
    if (own->count && (!own->sequences || !own->n_new))
        return fkv_fail(ctx, FKV_ERR_INVALID, "batch.%s is NULL",
                        own->sequences ? "n_new" : "sequences");
    return FKV_OK;
}

fkv_status fkv_plan_update(fkv_plan *plan, const fkv_batch *batch) {
    struct fkv_plan_object *p;
    fkv_batch own;
    fkv_status status = enter(plan, false, &p);
    if (status != FKV_OK)
        return status;
    status = read_batch(p->ctx, batch, &own);
    if (status == FKV_OK)
        status = fkv_plan_set(p, &own);
    return leave(plan, p, false, status);
}

static fkv_status check_layer(struct fkv_plan_object *plan, int32_t layer) {
    int n = plan->cache->profile->model.n_layers;
    if (layer < 0 || layer >= n)
        return fkv_fail(plan->ctx, FKV_ERR_INVALID, "layer is %d of %d", layer, n);
    return FKV_OK;
}

/* The tensors of a call, checked; lse is optional. */
struct views {
    struct fkv_view q, k, v, out, lse;
};

static fkv_status view_kv(struct fkv_plan_object *plan, const fkv_tensor *k, const fkv_tensor *v,
                          struct views *views) {
    const struct fkv_model *m = &plan->cache->profile->model;
    fkv_status status = fkv_tensor_view(plan->ctx, "k", k, plan->tokens, m->n_kv_heads, m->head_dim,
                                        false, &views->k);
    if (status != FKV_OK)
        return status;
    return fkv_tensor_view(plan->ctx, "v", v, plan->tokens, m->n_kv_heads, m->head_dim, false,
                           &views->v);
}

static fkv_status view_q(struct fkv_plan_object *plan, const fkv_tensor *q, const fkv_tensor *out,
                         const fkv_tensor *lse, struct views *views) {
    const struct fkv_model *m = &plan->cache->profile->model;
    fkv_status status = fkv_tensor_view(plan->ctx, "q", q, plan->tokens, m->n_q_heads, m->head_dim,
                                        false, &views->q);
    if (status == FKV_OK)
        status = fkv_tensor_view(plan->ctx, "out", out, plan->tokens, m->n_q_heads, m->head_dim,
                                 true, &views->out);
    if (status == FKV_OK && lse)
        status = fkv_tensor_view(plan->ctx, "lse", lse, plan->tokens, m->n_q_heads, -1, true,
                                 &views->lse);
    if (status == FKV_OK)
        status = fkv_plan_check_finite(plan, "q", &views->q, m->n_q_heads);
    return status;
}

/* attending: with q, out and lse, else without. */
static fkv_status append(fkv_plan *plan, int32_t layer, bool attending, const fkv_tensor *q,
                         const fkv_tensor *k, const fkv_tensor *v, const fkv_tensor *out,
                         const fkv_tensor *lse) {
    struct fkv_plan_object *p;
    struct views views;
    bool appended;
    fkv_status status = enter(plan, true, &p);
    if (status != FKV_OK)
        return status;
    status = check_layer(p, layer);
    if (status == FKV_OK)
        status = fkv_plan_check(p, layer, true, &appended);
    if (status == FKV_OK)
        status = view_kv(p, k, v, &views);
    if (status == FKV_OK && attending)
        status = view_q(p, q, out, lse, &views);
    if (status == FKV_OK)
        status = fkv_plan_append(p, layer, attending ? &views.q : NULL, &views.k, &views.v,
                                 &views.out, lse ? &views.lse : NULL);
    return leave(plan, p, true, status);
}

fkv_status fkv_append(fkv_plan *plan, int32_t layer, const fkv_tensor *k, const fkv_tensor *v) {
    return append(plan, layer, false, NULL, k, v, NULL, NULL);
}

fkv_status fkv_append_attend(fkv_plan *plan, int32_t layer, const fkv_tensor *q,
                             const fkv_tensor *k, const fkv_tensor *v, const fkv_tensor *out,
                             const fkv_tensor *lse) {
    return append(plan, layer, true, q, k, v, out, lse);
}

fkv_status fkv_attend(fkv_plan *plan, int32_t layer, const fkv_tensor *q, const fkv_tensor *out,
                      const fkv_tensor *lse) {
    struct fkv_plan_object *p;
    struct views views;
    bool appended;
    fkv_status status = enter(plan, false, &p);
    if (status != FKV_OK)
        return status;
    status = check_layer(p, layer);
    if (status == FKV_OK)
        status = fkv_plan_check(p, layer, false, &appended);
    if (status == FKV_OK)
        status = view_q(p, q, out, lse, &views);
    if (status == FKV_OK && p->longcache && p->tokens && !appended)
        status = fkv_fail(p->ctx, FKV_ERR_STATE,
                          "attention with selection needs the step's tokens: append them first");
    if (status == FKV_OK && p->cache->device)
        status =
            fkv_device_attend(p, layer, &views.q, &views.out, lse ? &views.lse : NULL, appended);
    else if (status == FKV_OK)
        (p->longcache ? p->ctx->ops->attend_selected : p->ctx->ops->attend)(
            p, layer, &views.q, &views.out, lse ? &views.lse : NULL);
    return leave(plan, p, false, status);
}

/* ---- selection */

static const fkv_select_params select_defaults = {.struct_size = sizeof select_defaults,
                                                  .n_global = 32,
                                                  .n_local = 4096,
                                                  .span = 32,
                                                  .top_k = 4,
                                                  .clip = 127,
                                                  .chunk = 512};

fkv_status fkv_select_params_init(fkv_select_params *params, size_t struct_size) {
    return fkv_params_init(params, struct_size, sizeof select_defaults, &select_defaults,
                           sizeof select_defaults);
}

static fkv_status read_select(struct fkv_ctx *ctx, const fkv_select_params *params,
                              fkv_select_params *own) {
    fkv_status status = fkv_params_read(ctx, "params", params, sizeof *own, own, sizeof *own);
    if (status != FKV_OK)
        return status;
    const struct fkv_range ranges[] = {
        {"n_global", own->n_global, 0, FKV_MAX_SCOPE}, {"n_local", own->n_local, 1, FKV_MAX_SCOPE},
        {"span", own->span, 1, FKV_MAX_SCOPE},         {"top_k", own->top_k, 0, FKV_MAX_TOP_K},
        {"clip", own->clip, 0, FKV_MAX_SCOPE},         {"chunk", own->chunk, 1, own->n_local}};
    status =
        fkv_check_ranges(ctx, FKV_ERR_INVALID, "params", ranges, sizeof ranges / sizeof *ranges);
    if (status != FKV_OK)
        return status;
    if (own->reserved)
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED, "params.reserved is not zero");
    if (fkv_select_scope(own) > FKV_MAX_SCOPE)
        return fkv_fail(ctx, FKV_ERR_INVALID, "params: a scope of %lld tokens, more than %d",
                        (long long)fkv_select_scope(own), FKV_MAX_SCOPE);
    return FKV_OK;
}

fkv_status fkv_plan_select(fkv_plan *plan, const fkv_select_params *params) {
    struct fkv_plan_object *p;
    fkv_select_params own = select_defaults;
    fkv_status status = enter(plan, false, &p);
    if (status != FKV_OK)
        return status;
    const struct fkv_profile_object *profile = p->cache->profile;
    if (params)
        status = read_select(p->ctx, params, &own);
    if (status == FKV_OK && params &&
        (profile->coding != FKV_CODING_CALIBRATED ||
         profile->codec.domain != FKV_DOMAIN_UNROTATED || p->cache->device))
        status = fkv_fail(p->ctx, FKV_ERR_UNSUPPORTED,
                          "selection needs a calibrated profile whose keys are held unrotated");
    if (status == FKV_OK) {
        p->selecting = params;
        p->select = own;
    }
    return leave(plan, p, false, status);
}

static void write_spans(const struct fkv_longcache *lc, int32_t index, int64_t *spans) {
    const struct fkv_run *from = lc->spans + (int64_t)index * lc->clip;
    for (int64_t i = 0; i < lc->chosen[index].spans; i++) {
        spans[2 * i] = from[i].first;
        spans[2 * i + 1] = from[i].end;
    }
}

fkv_status fkv_plan_selection(fkv_plan *plan, int32_t index, fkv_selection *selection,
                              int64_t *spans, size_t count) {
    struct fkv_plan_object *p;
    fkv_status status = enter(plan, false, &p);
    if (status != FKV_OK)
        return status;
    const struct fkv_longcache *lc = p->longcache;
    if (index < 0 || index >= p->n_rows)
        status =
            fkv_fail(p->ctx, FKV_ERR_INVALID, "index is %d of %lld", index, (long long)p->n_rows);
    else if (!spans && count)
        status = fkv_fail(p->ctx, FKV_ERR_INVALID, "spans is NULL, count is %zu", count);
    else if (!lc || lc->layer < 0 || !p->rows[index].n_new)
        status = fkv_fail(p->ctx, FKV_ERR_STATE,
                          "no attention with selection since the plan was updated");
    if (status == FKV_OK) {
        const struct fkv_chosen *c = &lc->chosen[index];
        fkv_selection own = {.struct_size = sizeof own,
                             .layer = lc->layer,
                             .tokens = c->tokens,
                             .view = c->width,
                             .middle_first = c->middle.first,
                             .middle_end = c->middle.end,
                             .spans = c->spans};
        status = fkv_params_write(p->ctx, "selection", selection, sizeof own, &own, sizeof own);
        if (status == FKV_OK && spans && count < 2 * (size_t)c->spans)
            status = fkv_fail(p->ctx, FKV_ERR_BUFFER, "spans: %zu numbers, %lld are needed", count,
                              (long long)(2 * c->spans));
    }
    if (status == FKV_OK && spans)
        write_spans(lc, index, spans);
    return leave(plan, p, false, status);
}

fkv_status fkv_plan_replayed(fkv_plan *plan) {
    struct fkv_plan_object *p;
    bool appended;
    fkv_status status = enter(plan, true, &p);
    if (status != FKV_OK)
        return status;
    if (!p->cache->device)
        status = fkv_fail(p->ctx, FKV_ERR_UNSUPPORTED, "the CPU backend has no graphs");
    for (int l = 0; status == FKV_OK && l < p->cache->profile->model.n_layers; l++)
        status = fkv_plan_check(p, l, true, &appended);
    if (status == FKV_OK)
        status = fkv_device_replayed(p);
    return leave(plan, p, true, status);
}

static fkv_status merge(struct fkv_ctx *ctx, const fkv_tensor *out_a, const fkv_tensor *lse_a,
                        const fkv_tensor *out_b, const fkv_tensor *lse_b) {
    if (!out_a || out_a->struct_size < sizeof *out_a || out_a->ndim != 3)
        return fkv_fail(ctx, FKV_ERR_INVALID, "out_a is no tensor of [tokens, heads, D]");
    const int64_t tokens = out_a->shape[0], heads = out_a->shape[1], dim = out_a->shape[2];
    struct fkv_view a, b, la, lb;
    fkv_status status = fkv_tensor_view(ctx, "out_a", out_a, tokens, heads, dim, true, &a);
    if (status == FKV_OK)
        status = fkv_tensor_view(ctx, "lse_a", lse_a, tokens, heads, -1, true, &la);
    if (status == FKV_OK)
        status = fkv_tensor_view(ctx, "out_b", out_b, tokens, heads, dim, false, &b);
    if (status == FKV_OK)
        status = fkv_tensor_view(ctx, "lse_b", lse_b, tokens, heads, -1, false, &lb);
    if (status == FKV_OK)
        fkv_merge_states(&a, &la, &b, &lb, tokens, heads, dim);
    return status;
}

fkv_status fkv_merge(fkv_context *ctx, const fkv_tensor *out_a, const fkv_tensor *lse_a,
                     const fkv_tensor *out_b, const fkv_tensor *lse_b) {
    struct fkv_ctx *c = fkv_handle_acquire(FKV_KIND_CONTEXT, ctx);
    if (!c)
        return FKV_ERR_HANDLE;
    fkv_status status = c->cuda ? fkv_fail(c, FKV_ERR_UNSUPPORTED, "the CUDA backend has no merge")
                                : merge(c, out_a, lse_a, out_b, lse_b);
    fkv_handle_release(ctx);
    return status;
}
