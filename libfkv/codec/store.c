/* SPDX-License-Identifier: Apache-2.0 */
/* Storing new tokens in exact pages: load, rotate, round to the storage type. */
#include "attend/plan.h"

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
    int heads;           /* KV heads of an item */
    _Atomic int bad;
};

/* The new tokens that fall into one page. */
struct piece {
    char *page;
    bool sinks;
    int64_t page_first, first, end; /* tokens of the sequence */
};

static struct piece piece_at(const struct store_job *job, int64_t index) {
    const int sinks = fkv_sinks(job->plan->cache->profile);
    struct piece piece = {.sinks = !index,
                          .page_first = index ? sinks + (index - 1) * FKV_TILE : 0};
    const int64_t page_end = index ? piece.page_first + FKV_TILE : sinks;
    piece.first = fkv_max64(piece.page_first, job->row->base);
    piece.end = fkv_min64(page_end, job->row->base + job->row->n_new);
    piece.page = index ? job->layer->tiles[index - 1] : job->layer->sink;
    return piece;
}

static void store_positions(const struct store_job *job, const struct piece *piece) {
    const struct fkv_profile_object *p = job->plan->cache->profile;
    const int32_t *positions = job->plan->positions + job->row->offset - job->row->base;
    int32_t *to = fkv_page_positions(p, piece->sinks, piece->page);
    for (int64_t t = piece->first; t < piece->end; t++)
        to[t - piece->page_first] = positions[t];
}

/* Where keys are held rotated: rows of RoPE for a piece's tokens, cos and then sin of each, and floats from row to
 * row. Where the plan has no table they are made for the heads of an item together. */
struct rows {
    const float *cos, *sin;
    int stride;
};

static bool rotates(const struct fkv_profile_object *p) {
    return p->model.rope_dim && p->codec.domain != FKV_DOMAIN_UNROTATED;
}

static struct rows find_rows(const struct store_job *job, const struct piece *piece,
                             float *scratch) {
    const struct fkv_plan_object *plan = job->plan;
    const int half = plan->cache->profile->model.rope_dim / 2;
    const int64_t token = job->row->offset + piece->first - job->row->base;
    if (!rotates(plan->cache->profile))
        return (struct rows){0};
    if (plan->cos)
        return (struct rows){plan->cos + token * half, plan->sin + token * half, half};
    struct fkv_rope_rows rope;
    fkv_rope_begin(&rope, plan->cache->profile);
    for (int64_t i = 0; i < piece->end - piece->first; i++)
        fkv_rope_row(&rope, plan->positions[token + i], scratch + 2 * i * half,
                     scratch + (2 * i + 1) * half);
    return (struct rows){scratch, scratch + half, 2 * half};
}

static bool store_head(const struct store_job *job, const struct piece *piece, int head,
                       const struct rows *rows) {
    const struct fkv_profile_object *p = job->plan->cache->profile;
    const struct fkv_kernels *kernels = job->plan->ctx->kernels;
    const int D = p->model.head_dim;
    const size_t room = (size_t)fkv_page_room(p, piece->sinks);
    char *key = fkv_element(piece->page, p->storage_dtype,
                            fkv_page_offset(p, piece->sinks, head, FKV_PART_K));
    char *value = fkv_element(piece->page, p->storage_dtype,
                              fkv_page_offset(p, piece->sinks, head, FKV_PART_V));
    const enum fkv_store store = fkv_store_of(p->storage_dtype);
    const size_t size = fkv_dtype_size(p->storage_dtype);
    const float limit = finite_limit(p);
    bool good = true;
    for (int64_t t = piece->first; t < piece->end; t++) {
        const int64_t token = job->row->offset + t - job->row->base, at = t - piece->page_first;
        const int64_t row = (t - piece->first) * rows->stride;
        _Alignas(64) float x[MAX_D + 16];
        _Alignas(64) char narrow[(MAX_D + 16) * sizeof(float)];
        fkv_load_head(kernels, job->k, token, head, D, x);
        if (rows->cos)
            fkv_rope_apply(&p->model, x, rows->cos + row, rows->sin + row);
        good &= in_range(x, D, limit);
        kernels->narrow[store](narrow, x, (size_t)D);
        for (int d = 0; d < D; d++) /* channel-major */
            memcpy(key + ((size_t)d * room + (size_t)at) * size, narrow + (size_t)d * size, size);
        fkv_load_head(kernels, job->v, token, head, D, x);
        good &= in_range(x, D, limit);
        kernels->narrow[store](value + (size_t)at * (size_t)D * size, x, (size_t)D);
    }
    return good;
}

/* A piece, for some of the KV heads. */
static void store_item(void *arg, int64_t item, int thread) {
    struct store_job *job = arg;
    const struct fkv_workspace *w = &job->plan->work;
    const struct fkv_profile_object *p = job->plan->cache->profile;
    const int64_t groups = p->model.n_kv_heads / job->heads;
    const struct piece piece = piece_at(job, job->first_piece + item / groups);
    const int first = (int)(item % groups) * job->heads;
    const struct rows rows = find_rows(job, &piece, w->scratches + thread * w->scratch);
    if (p->coding == FKV_CODING_CALIBRATED && !first)
        store_positions(job, &piece);
    for (int head = first; head < first + job->heads; head++)
        if (!store_head(job, &piece, head, &rows))
            atomic_store_explicit(&job->bad, 1, memory_order_relaxed);
}

bool fkv_store(struct fkv_plan_object *plan, int layer, const struct fkv_view *k,
               const struct fkv_view *v) {
    const struct fkv_profile_object *p = plan->cache->profile;
    const int sinks = fkv_sinks(p);
    const int heads = rotates(p) && !plan->cos ? p->model.n_kv_heads : 1;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct fkv_row *row = &plan->rows[i];
        if (!row->n_new)
            continue;
        struct store_job job = {plan, row, &row->seq->layers[layer], k, v, 0, heads, 0};
        job.first_piece = row->base < sinks ? 0 : (row->base - sinks) / FKV_TILE + 1;
        int64_t pieces = fkv_body_tiles(p, row->base + row->n_new) + 1 - job.first_piece;
        fkv_pool_run(plan->ctx->pool, pieces * (p->model.n_kv_heads / heads), store_item, &job);
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
    struct fkv_plan_rope rope;
    fkv_plan_rope_begin(&rope, plan);
    for (int part = 0; part < 2; part++)
        for (int64_t t = 0; t < plan->tokens; t++)
            for (int h = 0; h < p->model.n_kv_heads; h++) {
                float raw[MAX_D + 16], x[MAX_D + 16];
                fkv_load_head(plan->ctx->kernels, part ? v : k, t, h, D, raw);
                memcpy(x, raw, sizeof x);
                if (!part && rotates(p))
                    fkv_plan_rotate(&rope, t, x);
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
