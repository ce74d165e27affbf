/* SPDX-License-Identifier: Apache-2.0 */
#include "attend/plan.h"
#include "device/device.h"

/* Size of fkv_cache_params in the first release. */
#define FIRST_PARAMS offsetof(fkv_cache_params, flags)

fkv_status fkv_cache_params_init(fkv_cache_params *params, size_t struct_size) {
    const fkv_cache_params defaults = {.struct_size = sizeof defaults};
    return fkv_params_init(params, struct_size, FIRST_PARAMS, &defaults, sizeof defaults);
}

fkv_status fkv_sequence_params_init(fkv_sequence_params *params, size_t struct_size) {
    const fkv_sequence_params defaults = {.struct_size = sizeof defaults};
    return fkv_params_init(params, struct_size, sizeof defaults, &defaults, sizeof defaults);
}

static fkv_status check_flags(struct fkv_ctx *ctx, const struct fkv_profile_object *profile,
                              uint64_t flags) {
    if (flags & ~(uint64_t)FKV_CACHE_KEY_INDEX)
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED, "params.flags: unknown bits in %#llx",
                        (unsigned long long)flags);
    if (!(flags & FKV_CACHE_KEY_INDEX))
        return FKV_OK;
    if (profile->coding != FKV_CODING_CALIBRATED || profile->codec.domain != FKV_DOMAIN_UNROTATED)
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED,
                        "params.flags: an index of keys needs a calibrated profile that holds them "
                        "unrotated");
    if (ctx->cuda)
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED,
                        "params.flags: the CUDA backend has no index of keys");
    return FKV_OK;
}

static fkv_status create_cache(struct fkv_ctx *ctx, struct fkv_profile_object *profile,
                               const fkv_cache_params *params, fkv_cache **out) {
    fkv_cache_params own = {.struct_size = sizeof own};
    if (params) {
        fkv_status status = fkv_params_read(ctx, "params", params, FIRST_PARAMS, &own, sizeof own);
        if (status != FKV_OK)
            return status;
    }
    if (own.reserved)
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED, "params.reserved is not zero");
    struct fkv_cache_object *cache;
    fkv_status status = check_flags(ctx, profile, own.flags);
    if (status == FKV_OK)
        status = fkv_cache_new(ctx, profile, &own, &cache);
    if (status != FKV_OK)
        return status;
    *out = fkv_handle_create(FKV_KIND_CACHE, cache);
    if (*out)
        return FKV_OK;
    fkv_cache_unref(cache);
    return fkv_fail(ctx, FKV_ERR_NOMEM, "no memory for a handle");
}

fkv_status fkv_cache_create(fkv_context *ctx, fkv_profile *profile, const fkv_cache_params *params,
                            fkv_cache **out) {
    if (out)
        *out = NULL;
    struct fkv_ctx *c = fkv_handle_acquire(FKV_KIND_CONTEXT, ctx);
    if (!c)
        return FKV_ERR_HANDLE;
    struct fkv_profile_object *p = fkv_handle_acquire(FKV_KIND_PROFILE, profile);
    fkv_status status;
    if (!p)
        status = fkv_fail(c, FKV_ERR_HANDLE, "profile is no living profile");
    else if (!out)
        status = fkv_fail(c, FKV_ERR_INVALID, "out is NULL");
    else
        status = create_cache(c, p, params, out);
    if (p)
        fkv_handle_release(profile);
    fkv_handle_release(ctx);
    return status;
}

fkv_status fkv_cache_destroy(fkv_cache *cache) {
    void *object;
    if (!cache)
        return FKV_OK;
    struct fkv_cache_object *c = fkv_handle_acquire(FKV_KIND_CACHE, cache);
    if (!c)
        return FKV_ERR_HANDLE;
    if (!fkv_cache_write_lock(c)) { /* a plan is working on it */
        fkv_status busy = fkv_fail(c->ctx, FKV_ERR_BUSY, "another thread is using the cache");
        fkv_handle_release(cache);
        return busy;
    }
    fkv_handle_release(cache);
    fkv_status status = fkv_handle_close(FKV_KIND_CACHE, cache, &object);
    if (status == FKV_OK)
        fkv_cache_clear(c);
    fkv_cache_write_unlock(c);
    if (status == FKV_OK)
        fkv_cache_unref(c);
    return status;
}

/* Takes a cache for reading or writing; leave() gives it back. */
static fkv_status enter(fkv_cache *handle, bool writing, struct fkv_cache_object **cache) {
    *cache = fkv_handle_acquire(FKV_KIND_CACHE, handle);
    if (!*cache)
        return FKV_ERR_HANDLE;
    if (writing ? fkv_cache_write_lock(*cache) : fkv_cache_read_lock(*cache))
        return FKV_OK;
    fkv_status status = fkv_fail((*cache)->ctx, FKV_ERR_BUSY, "another thread is using the cache");
    fkv_handle_release(handle);
    return status;
}

static fkv_status leave(fkv_cache *handle, struct fkv_cache_object *cache, bool writing,
                        fkv_status status) {
    if (writing)
        fkv_cache_write_unlock(cache);
    else
        fkv_cache_read_unlock(cache);
    fkv_handle_release(handle);
    return status;
}

/* Size of fkv_stats in the first release. */
#define FIRST_STATS offsetof(fkv_stats, bytes_shared)

static fkv_status find(struct fkv_cache_object *cache, fkv_sequence id, struct fkv_seq **seq) {
    *seq = fkv_seq_find(cache, id);
    if (*seq)
        return FKV_OK;
    return fkv_fail(cache->ctx, FKV_ERR_HANDLE, "%lld is no living sequence", (long long)id);
}

static fkv_status check_period(struct fkv_profile_object *profile, int64_t *period) {
    if (profile->coding != FKV_CODING_FOURIER)
        *period = INT64_MAX; /* never outgrown */
    else if (!*period)
        *period = profile->fourier.period;
    if (*period < FKV_TILE)
        return fkv_fail(profile->ctx, FKV_ERR_INVALID, "period is %lld, at least %d expected",
                        (long long)*period, FKV_TILE);
    return FKV_OK;
}

fkv_status fkv_sequence_create(fkv_cache *cache, const fkv_sequence_params *params,
                               fkv_sequence *out) {
    struct fkv_cache_object *c;
    fkv_sequence_params own = {.struct_size = sizeof own};
    fkv_status status = enter(cache, true, &c);
    if (status != FKV_OK)
        return status;
    if (!out)
        status = fkv_fail(c->ctx, FKV_ERR_INVALID, "out is NULL");
    if (status == FKV_OK && params)
        status = fkv_params_read(c->ctx, "params", params, sizeof own, &own, sizeof own);
    if (status == FKV_OK && own.reserved)
        status = fkv_fail(c->ctx, FKV_ERR_UNSUPPORTED, "params.reserved is not zero");
    if (status == FKV_OK)
        status = check_period(c->profile, &own.period);
    int64_t id;
    if (status == FKV_OK)
        status = fkv_seq_new(c, own.period, &id);
    if (status == FKV_OK)
        *out = id;
    return leave(cache, c, true, status);
}

fkv_status fkv_sequence_free(fkv_cache *cache, fkv_sequence sequence) {
    struct fkv_cache_object *c;
    struct fkv_seq *seq;
    fkv_status status = enter(cache, true, &c);
    if (status != FKV_OK)
        return status;
    status = find(c, sequence, &seq);
    if (status == FKV_OK)
        fkv_seq_delete(c, seq);
    return leave(cache, c, true, status);
}

fkv_status fkv_sequence_fork(fkv_cache *cache, fkv_sequence sequence, fkv_sequence *out) {
    struct fkv_cache_object *c;
    struct fkv_seq *seq;
    bool equal;
    int64_t id;
    fkv_status status = enter(cache, true, &c);
    if (status != FKV_OK)
        return status;
    status = find(c, sequence, &seq);
    if (status == FKV_OK && !out)
        status = fkv_fail(c->ctx, FKV_ERR_INVALID, "out is NULL");
    if (status == FKV_OK) {
        int64_t tokens = fkv_seq_tokens(c, seq, &equal);
        if (!equal)
            status = fkv_fail(c->ctx, FKV_ERR_STATE,
                              "the layers of sequence %lld hold unequal numbers of tokens (the "
                              "least is %lld): finish the step, or crop",
                              (long long)sequence, (long long)tokens);
    }
    if (status == FKV_OK)
        status = fkv_seq_fork(c, seq, &id);
    if (status == FKV_OK)
        *out = id;
    return leave(cache, c, true, status);
}

/* A length that crops are asked for. */
static fkv_status check_length(struct fkv_cache_object *cache, const struct fkv_seq *seq,
                               int64_t tokens) {
    bool equal;
    const int64_t held = fkv_seq_tokens(cache, seq, &equal);
    if (tokens < 0 || tokens > held)
        return fkv_fail(cache->ctx, FKV_ERR_INVALID, "tokens is %lld, not in 0..%lld",
                        (long long)tokens, (long long)held);
    return FKV_OK;
}

static fkv_status crop(struct fkv_cache_object *c, struct fkv_seq *seq, int64_t tokens) {
    fkv_status status = check_length(c, seq, tokens);
    if (status != FKV_OK)
        return status;
    const int64_t below = fkv_seq_crop_floor(c, seq, tokens);
    if (below != tokens)
        return fkv_fail(c->ctx, FKV_ERR_STATE,
                        "%lld tokens would end within coded ones: the smallest length that can be "
                        "cropped to is %lld, the nearest below %lld",
                        (long long)tokens, (long long)fkv_seq_crop_limit(c, seq), (long long)below);
    bool equal;
    if (tokens != fkv_seq_tokens(c, seq, &equal) || !equal)
        fkv_seq_crop(c, seq, tokens);
    return FKV_OK;
}

fkv_status fkv_sequence_crop(fkv_cache *cache, fkv_sequence sequence, int64_t tokens) {
    struct fkv_cache_object *c;
    struct fkv_seq *seq;
    fkv_status status = enter(cache, true, &c);
    if (status != FKV_OK)
        return status;
    status = find(c, sequence, &seq);
    if (status == FKV_OK)
        status = crop(c, seq, tokens);
    return leave(cache, c, true, status);
}

fkv_status fkv_sequence_crop_limit(fkv_cache *cache, fkv_sequence sequence, int64_t *limit) {
    struct fkv_cache_object *c;
    struct fkv_seq *seq;
    fkv_status status = enter(cache, false, &c);
    if (status != FKV_OK)
        return status;
    status = find(c, sequence, &seq);
    if (status == FKV_OK && !limit)
        status = fkv_fail(c->ctx, FKV_ERR_INVALID, "limit is NULL");
    if (status == FKV_OK)
        *limit = fkv_seq_crop_limit(c, seq);
    return leave(cache, c, false, status);
}

fkv_status fkv_sequence_crop_floor(fkv_cache *cache, fkv_sequence sequence, int64_t tokens,
                                   int64_t *possible) {
    struct fkv_cache_object *c;
    struct fkv_seq *seq;
    fkv_status status = enter(cache, false, &c);
    if (status != FKV_OK)
        return status;
    status = find(c, sequence, &seq);
    if (status == FKV_OK && !possible)
        status = fkv_fail(c->ctx, FKV_ERR_INVALID, "possible is NULL");
    if (status == FKV_OK)
        status = check_length(c, seq, tokens);
    if (status == FKV_OK)
        *possible = fkv_seq_crop_floor(c, seq, tokens);
    return leave(cache, c, false, status);
}

fkv_status fkv_sequence_length(fkv_cache *cache, fkv_sequence sequence, int64_t *tokens) {
    struct fkv_cache_object *c;
    struct fkv_seq *seq;
    bool equal;
    fkv_status status = enter(cache, false, &c);
    if (status != FKV_OK)
        return status;
    status = find(c, sequence, &seq);
    if (status == FKV_OK && !tokens)
        status = fkv_fail(c->ctx, FKV_ERR_INVALID, "tokens is NULL");
    if (status == FKV_OK)
        *tokens = fkv_seq_tokens(c, seq, &equal);
    return leave(cache, c, false, status);
}

static fkv_status read_sequence(struct fkv_cache_object *c, fkv_sequence sequence, int32_t layer,
                                int64_t first, int64_t count, const fkv_tensor *k,
                                const fkv_tensor *v) {
    const struct fkv_model *m = &c->profile->model;
    const fkv_tensor *tensors[2] = {k, v};
    const char *names[2] = {"k", "v"};
    struct fkv_view views[2];
    struct fkv_seq *seq;
    fkv_status status = find(c, sequence, &seq);
    if (status != FKV_OK)
        return status;
    if (layer < 0 || layer >= m->n_layers)
        return fkv_fail(c->ctx, FKV_ERR_INVALID, "layer is %d of %d", layer, m->n_layers);
    int64_t tokens = seq->layers[layer].tokens;
    if (first < 0 || count < 0 || first > tokens || count > tokens - first)
        return fkv_fail(c->ctx, FKV_ERR_INVALID, "tokens %lld .. + %lld of %lld", (long long)first,
                        (long long)count, (long long)tokens);
    for (int part = 0; part < 2; part++)
        if (tensors[part]) {
            status = fkv_tensor_view(c->ctx, names[part], tensors[part], count, m->n_kv_heads,
                                     m->head_dim, true, &views[part]);
            if (status != FKV_OK)
                return status;
        }
    for (int part = 0; c->device && part < 2; part++)
        if (tensors[part] && status == FKV_OK)
            status = fkv_device_read(c, seq, layer, part, first, count, &views[part]);
    if (c->device)
        return status;
    const size_t bytes = fkv_read_scratch(seq);
    double *scratch = bytes ? fkv_heap_alloc(&c->ctx->heap, bytes) : NULL;
    if (bytes && !scratch)
        return fkv_fail_memory(c->ctx, bytes, "reading");
    for (int part = 0; part < 2; part++)
        if (tensors[part])
            fkv_read_tokens(c, seq, layer, part, first, count, &views[part], scratch);
    fkv_heap_free(&c->ctx->heap, scratch, bytes);
    return FKV_OK;
}

fkv_status fkv_sequence_read(fkv_cache *cache, fkv_sequence sequence, int32_t layer, int64_t first,
                             int64_t count, const fkv_tensor *k, const fkv_tensor *v) {
    struct fkv_cache_object *c;
    fkv_status status = enter(cache, false, &c);
    if (status != FKV_OK)
        return status;
    status = read_sequence(c, sequence, layer, first, count, k, v);
    return leave(cache, c, false, status);
}

fkv_status fkv_cache_stats(fkv_cache *cache, fkv_sequence sequence, fkv_stats *stats) {
    struct fkv_cache_object *c;
    struct fkv_seq *seq = NULL;
    fkv_stats own = {.struct_size = sizeof own};
    fkv_status status = enter(cache, false, &c);
    if (status != FKV_OK)
        return status;
    if (sequence != FKV_ALL_SEQUENCES)
        status = find(c, sequence, &seq);
    if (status == FKV_OK) {
        fkv_cache_count(c, seq, &own);
        status = fkv_params_write(c->ctx, "stats", stats, FIRST_STATS, &own, sizeof own);
    }
    return leave(cache, c, false, status);
}

static fkv_status start_meter(struct fkv_cache_object *c, double fraction) {
    if (!(fraction >= 0.0 && fraction <= 1.0))
        return fkv_fail(c->ctx, FKV_ERR_INVALID, "fraction is %g, not in 0..1", fraction);
    if (fraction > 0.0 && c->profile->coding != FKV_CODING_CALIBRATED)
        return fkv_fail(c->ctx, FKV_ERR_UNSUPPORTED,
                        "the meter is for calibrated profiles: others have no sealed blocks");
    if (fraction > 0.0 && c->device)
        return fkv_fail(c->ctx, FKV_ERR_UNSUPPORTED, "the CUDA backend has no meter");
    return fkv_meter_start(c, fraction);
}

fkv_status fkv_cache_meter(fkv_cache *cache, double fraction) {
    struct fkv_cache_object *c;
    fkv_status status = enter(cache, true, &c);
    if (status != FKV_OK)
        return status;
    return leave(cache, c, true, start_meter(c, fraction));
}

fkv_status fkv_cache_fidelity(fkv_cache *cache, int32_t layer, fkv_fidelity *fidelity) {
    struct fkv_cache_object *c;
    fkv_fidelity own = {.struct_size = sizeof own};
    fkv_status status = enter(cache, false, &c);
    if (status != FKV_OK)
        return status;
    const int layers = c->profile->model.n_layers;
    if (layer != FKV_ALL_LAYERS && (layer < 0 || layer >= layers))
        status = fkv_fail(c->ctx, FKV_ERR_INVALID, "layer is %d of %d", layer, layers);
    else if (!c->meter)
        status = fkv_fail(c->ctx, FKV_ERR_STATE, "the meter is off: fkv_cache_meter() starts it");
    if (status == FKV_OK) {
        fkv_meter_report(c, layer, &own);
        status = fkv_params_write(c->ctx, "fidelity", fidelity, sizeof own, &own, sizeof own);
    }
    return leave(cache, c, false, status);
}

fkv_status fkv_profile_estimate(fkv_profile *profile, int64_t tokens, int64_t period,
                                fkv_stats *stats) {
    struct fkv_profile_object *p = fkv_handle_acquire(FKV_KIND_PROFILE, profile);
    fkv_stats own = {.struct_size = sizeof own};
    if (!p)
        return FKV_ERR_HANDLE;
    fkv_status status = FKV_OK;
    if (tokens < 0 || period < 0)
        status = fkv_fail(p->ctx, FKV_ERR_INVALID, "tokens %lld or period %lld is negative",
                          (long long)tokens, (long long)period);
    else if ((uint64_t)tokens > p->ctx->max_tokens)
        status = fkv_fail(p->ctx, FKV_ERR_LIMIT, "tokens: %lld exceeds the limit of %llu",
                          (long long)tokens, (unsigned long long)p->ctx->max_tokens);
    if (status == FKV_OK)
        status = check_period(p, &period);
    if (status == FKV_OK)
        status = fkv_profile_predict(p, tokens, period, &own);
    if (status == FKV_OK)
        status = fkv_params_write(p->ctx, "stats", stats, FIRST_STATS, &own, sizeof own);
    fkv_handle_release(profile);
    return status;
}
