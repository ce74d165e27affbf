/* SPDX-License-Identifier: Apache-2.0 */
/* Storing new tokens in exact pages: load, rotate, round to the storage type. */
#include "attend/plan.h"
#include "codec/rope.h"

#include <math.h>
#include <string.h>

#define MAX_D FKV_MAX_HEAD_DIM

/* Below this, a value rounds to a finite one of the storage type, and, less a reference, of the
 * coefficients' type. */
static float finite_limit(const struct fkv_profile_object *p) {
    const fkv_dtype dtype = p->storage_dtype;
    if (p->coding == FKV_CODING_CALIBRATED && p->finite_limit < 65520.0f)
        return p->finite_limit;
    if (dtype == FKV_DTYPE_F16)
        return 65520.0f;
    if (p->coding == FKV_CODING_FOURIER)
        return p->fourier.coefficient_dtype == FKV_DTYPE_F16 ? 65520.0f : 0x1p126f;
    return dtype == FKV_DTYPE_BF16 ? 0x1.ffp127f : INFINITY;
}

/* A key as it is held. */
static void load_key(const struct fkv_plan_object *plan, const struct fkv_view *k, int64_t token,
                     int head, float *x) {
    const struct fkv_model *m = &plan->cache->profile->model;
    fkv_load_head(plan->ctx->kernels, k, token, head, m->head_dim, x);
    if (plan->cache->profile->codec.domain == FKV_DOMAIN_UNROTATED)
        return;
    fkv_rope_apply(m, x, plan->cos + token * (m->rope_dim / 2),
                   plan->sin + token * (m->rope_dim / 2));
}

static bool in_range(const float *x, int n, float limit) {
    int bad = 0;
    for (int i = 0; i < n; i++)
        bad |= !(fabsf(x[i]) < limit);
    return !bad;
}

struct store_job {
    struct fkv_plan_object *plan;
    const struct fkv_row *row;
    const struct fkv_layer *layer;
    const struct fkv_view *k, *v;
    int64_t first_piece; /* piece 0 is the sink page, piece i + 1 body tile i */
    _Atomic int bad;
};

/* The new tokens that fall into one page, for one KV head. */
static void store_piece(void *arg, int64_t item, int thread) {
    struct store_job *job = arg;
    const struct fkv_profile_object *p = job->plan->cache->profile;
    const struct fkv_kernels *kernels = job->plan->ctx->kernels;
    const int D = p->model.head_dim, sinks = fkv_sinks(p), heads = p->model.n_kv_heads;
    const int64_t piece = job->first_piece + item / heads;
    const int head = (int)(item % heads);
    const int64_t page_first = piece ? sinks + (piece - 1) * FKV_TILE : 0;
    const int64_t page_end = piece ? page_first + FKV_TILE : sinks;
    const int64_t first = fkv_max64(page_first, job->row->base);
    const int64_t end = fkv_min64(page_end, job->row->base + job->row->n_new);
    char *page = piece ? job->layer->tiles[piece - 1] : job->layer->sink;
    const size_t room = (size_t)fkv_page_room(p, !piece);
    char *key = fkv_element(page, p->storage_dtype, fkv_page_offset(p, !piece, head, FKV_PART_K));
    char *value = fkv_element(page, p->storage_dtype, fkv_page_offset(p, !piece, head, FKV_PART_V));
    const enum fkv_store store = fkv_store_of(p->storage_dtype);
    const size_t size = fkv_dtype_size(p->storage_dtype);
    const float limit = finite_limit(p);
    const int32_t *positions = job->plan->positions;
    (void)thread;
    for (int64_t t = first; positions && !head && t < end; t++)
        fkv_page_positions(p, !piece, page)[t - page_first] =
            positions[job->row->offset + t - job->row->base];
    for (int64_t t = first; t < end; t++) {
        const int64_t token = job->row->offset + t - job->row->base, at = t - page_first;
        _Alignas(64) float x[MAX_D + 16];
        _Alignas(64) char narrow[(MAX_D + 16) * sizeof(float)];
        load_key(job->plan, job->k, token, head, x);
        bool good = in_range(x, D, limit);
        kernels->narrow[store](narrow, x, (size_t)D);
        for (int d = 0; d < D; d++) /* channel-major */
            memcpy(key + ((size_t)d * room + (size_t)at) * size, narrow + (size_t)d * size, size);
        fkv_load_head(kernels, job->v, token, head, D, x);
        good &= in_range(x, D, limit);
        kernels->narrow[store](value + (size_t)at * (size_t)D * size, x, (size_t)D);
        if (!good)
            atomic_store_explicit(&job->bad, 1, memory_order_relaxed);
    }
}

bool fkv_store(struct fkv_plan_object *plan, int layer, const struct fkv_view *k,
               const struct fkv_view *v) {
    const struct fkv_profile_object *p = plan->cache->profile;
    const int sinks = fkv_sinks(p);
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct fkv_row *row = &plan->rows[i];
        if (!row->n_new)
            continue;
        struct store_job job = {plan, row, &row->seq->layers[layer], k, v, 0, 0};
        job.first_piece = row->base < sinks ? 0 : (row->base - sinks) / FKV_TILE + 1;
        int64_t pieces = fkv_body_tiles(p, row->base + row->n_new) + 1 - job.first_piece;
        fkv_pool_run(plan->ctx->pool, pieces * p->model.n_kv_heads, store_piece, &job);
        if (atomic_load(&job.bad) && !(plan->ctx->flags & FKV_CONTEXT_PROPAGATE_NONFINITE))
            return false;
    }
    return true;
}

fkv_status fkv_store_report(struct fkv_plan_object *plan, const struct fkv_view *k,
                            const struct fkv_view *v) {
    const struct fkv_profile_object *p = plan->cache->profile;
    const float limit = finite_limit(p);
    const int D = p->model.head_dim;
    for (int part = 0; part < 2; part++)
        for (int64_t t = 0; t < plan->tokens; t++)
            for (int h = 0; h < p->model.n_kv_heads; h++) {
                float raw[MAX_D + 16], x[MAX_D + 16];
                fkv_load_head(plan->ctx->kernels, part ? v : k, t, h, D, raw);
                memcpy(x, raw, sizeof x);
                if (!part)
                    load_key(plan, k, t, h, x);
                for (int pass = 0; pass < 2; pass++) /* the input itself before its rotation */
                    for (int d = 0; d < D; d++) {
                        float value = pass ? x[d] : raw[d];
                        if (pass ? fabsf(value) < limit : isfinite(value))
                            continue;
                        return fkv_fail(plan->ctx, FKV_ERR_NONFINITE,
                                        "%s[%lld][%d][%d] = %g%s cannot be stored",
                                        part ? "v" : "k", (long long)t, h, d, (double)value,
                                        pass && !part ? " (after RoPE)" : "");
                    }
            }
    return fkv_fail(plan->ctx, FKV_ERR_NONFINITE, "k or v holds a value that cannot be stored");
}
