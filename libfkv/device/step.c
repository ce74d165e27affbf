/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A step on the device. fkv_plan_update() makes room for short steps in all layers and sends everything that the
 * kernels read, so that the calls of the layers only launch, and can be captured into a graph. Long steps, which
 * are not worth capturing, get their pages layer by layer: the exact pages of one layer are coded and given back
 * before those of the next are taken.
 */
#include "device/device.h"

#include <sched.h>
#include <string.h>

#define SHORT_STEP                                                                                 \
    64 /* new tokens of a sequence, at most, for a step that is prepared as a whole */
#define MAX_QUERIES (1 << 18)
#define MAX_GRID_PER_PROCESSOR 2

static struct fkv_device_plan *device_plan(struct fkv_plan_object *plan) {
    return plan->device;
}

static fkv_status make_plan(struct fkv_plan_object *plan) {
    struct fkv_cache_object *cache = plan->cache;
    const int32_t layers = cache->profile->model.n_layers;
    if (plan->device) {
        return FKV_OK;
    }
    struct fkv_device_plan *p = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, sizeof *p);
    if (!p) {
        return fkv_cache_refused(cache);
    }
    p->n_lists = cache->device->c.coded ? layers : 1;
    p->lists =
        fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, (size_t)p->n_lists * sizeof *p->lists);
    p->ready = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, (size_t)layers);
    plan->device = p;
    if (!p->lists || !p->ready) {
        fkv_status status = fkv_cache_refused(cache);
        fkv_device_plan_free(plan);
        return status;
    }
    return FKV_OK;
}

static void free_rows(struct fkv_cache_object *cache, struct fkv_device_plan *p) {
    for (int32_t i = 0; p->lists && i < p->n_lists; i++) {
        fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, p->lists[i].key,
                       (size_t)p->row_capacity * FKV_ITEMS_KEY * sizeof(int64_t));
        p->lists[i].key = NULL;
        p->lists[i].valid = false;
    }
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, p->rows,
                   (size_t)p->row_capacity * sizeof *p->rows);
    p->rows = NULL;
    p->row_capacity = 0;
}

void fkv_device_plan_free(struct fkv_plan_object *plan) {
    struct fkv_device_plan *p = plan->device;
    struct fkv_cache_object *cache = plan->cache;
    if (!p) {
        return;
    }
    plan->ctx->cuda->synchronize(plan->ctx->device, plan->ctx->stream);
    free_rows(cache, p);
    fkv_device_release(cache, &p->step);
    fkv_device_release(cache, &p->items);
    fkv_device_release(cache, &p->rope);
    fkv_device_release(cache, &p->partials);
    fkv_device_release(cache, &p->counters);
    fkv_device_release(cache, &p->seals);
    fkv_device_release(cache, &p->spectra);
    fkv_device_release(cache, &p->grids);
    fkv_device_release(cache, &p->stats);
    fkv_device_release(cache, &p->mass);
    fkv_device_release(cache, &p->maxima);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, p->lists, (size_t)p->n_lists * sizeof *p->lists);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, p->ready, (size_t)cache->profile->model.n_layers);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, p, sizeof *p);
    plan->device = NULL;
}

void fkv_device_plan_end(struct fkv_plan_object *plan) {
    struct fkv_cache_object *cache = plan->cache;
    if (!plan->device) {
        return;
    }
    while (!fkv_cache_write_lock(cache)) {
        sched_yield(); /* another plan's call is under way */
    }
    fkv_device_plan_free(plan);
    fkv_cache_write_unlock(cache);
}

static fkv_status outgrown(struct fkv_plan_object *plan, const char *what) {
    return fkv_fail(plan->ctx, FKV_ERR_STATE,
                    "the captured plan has no room for so many %s: capture again", what);
}

static fkv_status need_rows(struct fkv_plan_object *plan, int64_t rows) {
    struct fkv_device_plan *p = plan->device;
    struct fkv_cache_object *cache = plan->cache;
    if (rows <= p->row_capacity) {
        return FKV_OK;
    }
    const int64_t capacity = fkv_max64(16, rows + rows / 2);
    free_rows(cache, p);
    p->row_capacity = capacity;
    p->rows = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, (size_t)capacity * sizeof *p->rows);
    bool good = p->rows != NULL;
    for (int32_t i = 0; good && i < p->n_lists; i++) {
        p->lists[i].key = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES,
                                          (size_t)capacity * FKV_ITEMS_KEY * sizeof(int64_t));
        good = p->lists[i].key != NULL;
    }
    return good ? FKV_OK : fkv_cache_refused(cache);
}

/* ---- what the kernels read */

static size_t rows_at(void) {
    return (sizeof(struct fkv_cuda_step) + 255) / 256 * 256;
}
static size_t positions_at(const struct fkv_device_plan *p) {
    return rows_at() + ((size_t)p->row_capacity * sizeof(struct fkv_cuda_row) + 255) / 256 * 256;
}

/* First token of the row whose angles the step needs: that of the first tile it may code. */
static int64_t first_angle(const struct fkv_cache_object *cache, const struct fkv_row *row) {
    const struct fkv_profile_object *p = cache->profile;
    int64_t first = row->base;
    for (int l = 0; p->coding == FKV_CODING_CALIBRATED && l < p->model.n_layers; l++) {
        const int64_t coded = row->seq->layers[l].n_coded;
        if (fkv_device_tiles_to_code(p, row->base + row->n_new) > coded) {
            first = fkv_min64(first, cache->device->c.sinks + coded * FKV_TILE);
        }
    }
    return first;
}

static fkv_status fill_rows(struct fkv_plan_object *plan, const struct fkv_plan_object *next) {
    struct fkv_device_plan *p = plan->device;
    int64_t angles = 0;
    for (int64_t i = 0; i < next->n_rows; i++) {
        const struct fkv_row *row = &next->rows[i];
        const struct fkv_device_seq *s = row->seq->device;
        const int64_t first = first_angle(plan->cache, row);
        if (row->base + row->n_new > INT32_MAX - FKV_TILE ||
            angles + row->base + row->n_new - first > INT32_MAX) {
            return fkv_fail(plan->ctx, FKV_ERR_LIMIT, "plan: too many tokens for the device");
        }
        p->rows[i] =
            (struct fkv_cuda_row){.table = s->table,
                                  .slots = s->slots,
                                  .base = (int32_t)row->base,
                                  .n_new = (int32_t)row->n_new,
                                  .offset = (int32_t)row->offset,
                                  .rope_first = (int32_t)first,
                                  .rope_offset = (int32_t)angles,
                                  .segment_slots = (int32_t)s->segment_slots,
                                  .segments = s->segment_table,
                                  .spectrum = row->seq->shared ? row->seq->shared->device : 0};
        angles += row->base + row->n_new - first;
    }
    p->n_rows = next->n_rows;
    p->max_tokens = angles;
    return FKV_OK;
}

static fkv_status need_buffers(struct fkv_plan_object *plan) {
    struct fkv_device_plan *p = plan->device;
    const int64_t angles = fkv_max64(p->max_tokens, 64);
    const size_t pairs = (size_t)plan->cache->profile->model.rope_dim / 2;
    if (angles > p->rope_capacity) {
        if (p->captured) {
            return outgrown(plan, "tokens");
        }
        const int64_t capacity = angles + angles / 4 + 1024;
        fkv_status status = fkv_device_reserve(
            plan->cache, &p->rope, (size_t)capacity * (pairs ? pairs : 1) * 2 * sizeof(float));
        if (status != FKV_OK) {
            return status;
        }
        p->rope_capacity = capacity;
    }
    const size_t bytes = positions_at(p) + (size_t)p->rope_capacity * sizeof(int32_t);
    if (p->captured && bytes > p->step.bytes) {
        return outgrown(plan, "sequences");
    }
    return fkv_device_reserve(plan->cache, &p->step, bytes);
}

static fkv_status send_step(struct fkv_plan_object *plan, const struct fkv_plan_object *next,
                            const fkv_batch *batch) {
    struct fkv_device_plan *p = plan->device;
    struct fkv_cache_object *cache = plan->cache;
    struct fkv_ctx *ctx = plan->ctx;
    const size_t bytes = positions_at(p) + (size_t)p->max_tokens * sizeof(int32_t);
    void *memory;
    fkv_status status = fkv_device_stage(cache, bytes, &memory);
    if (status != FKV_OK) {
        return status;
    }
    const struct fkv_cuda_step step = {(int32_t)next->n_rows, (int32_t)next->tokens,
                                       (int32_t)p->max_tokens, 0};
    memcpy(memory, &step, sizeof step);
    if (next->n_rows) {
        memcpy((char *)memory + rows_at(), p->rows, (size_t)next->n_rows * sizeof *p->rows);
    }
    int32_t *positions = (int32_t *)(void *)((char *)memory + positions_at(p));
    for (int64_t i = 0; i < next->n_rows; i++) {
        const struct fkv_row *row = &next->rows[i];
        for (int64_t t = p->rows[i].rope_first; t < row->base + row->n_new; t++) {
            const int64_t token = row->offset + t - row->base;
            *positions++ =
                (int32_t)(batch->positions && t >= row->base ? batch->positions[token] : t);
        }
    }
    status = fkv_device_send(cache, p->step.address, bytes);
    if (status != FKV_OK) {
        return status;
    }
    int error = ctx->cuda->rope(ctx->device, &cache->device->c, p->step.address + positions_at(p),
                                (int)p->max_tokens, p->rope.address, p->rope_capacity, ctx->stream);
    return FKV_DEVICE_CHECK(ctx, error, "angles");
}

/* ---- update */

static fkv_status check_batch(struct fkv_plan_object *plan, const struct fkv_plan_object *next,
                              const fkv_batch *batch) {
    int yes = 0;
    int error = plan->ctx->cuda->capturing(plan->ctx->device, plan->ctx->stream, &yes);
    if (error || yes) {
        return error ? FKV_DEVICE_CHECK(plan->ctx, error, "stream")
                     : fkv_fail(plan->ctx, FKV_ERR_STATE, "plans are updated outside captures");
    }
    const bool indices = plan->cache->device->c.coded == FKV_CUDA_CALIBRATED;
    for (int64_t i = 0; batch->positions && indices && i < next->n_rows; i++) {
        const struct fkv_row *row = &next->rows[i];
        for (int64_t t = 0; t < row->n_new; t++) {
            if (batch->positions[row->offset + t] != row->base + t) {
                return fkv_fail(
                    plan->ctx, FKV_ERR_UNSUPPORTED,
                    "positions[%lld]: in calibrated caches on CUDA a token's position is "
                    "its index",
                    (long long)(row->offset + t));
            }
        }
    }
    return FKV_OK;
}

/* Exact pages of one layer for the step; all rows or none. */
static fkv_status ready_layer(struct fkv_plan_object *plan, const struct fkv_plan_object *next,
                              int layer) {
    struct fkv_device_cache *d = plan->cache->device;
    const int64_t noted = d->n_pending;
    fkv_status status = FKV_OK;
    for (int64_t i = 0; status == FKV_OK && i < next->n_rows; i++) {
        const struct fkv_row *row = &next->rows[i];
        if (row->n_new && row->seq->layers[layer].tokens == row->base) {
            status = fkv_device_layer_grow(plan->cache, row->seq, layer, row->base + row->n_new);
        }
    }
    if (status == FKV_OK) {
        plan->device->ready[layer] = true;
        return FKV_OK;
    }
    for (int64_t i = 0; i < next->n_rows; i++) {
        fkv_device_layer_shrink(plan->cache, next->rows[i].seq, layer);
    }
    d->n_pending = fkv_min64(noted, d->n_pending); /* those of pages that are gone */
    return status;
}

static bool is_short(const struct fkv_plan_object *next) {
    for (int64_t i = 0; i < next->n_rows; i++) {
        if (next->rows[i].n_new > SHORT_STEP) {
            return false;
        }
    }
    return true;
}

static fkv_status ready_all(struct fkv_plan_object *plan, const struct fkv_plan_object *next) {
    fkv_status status = FKV_OK;
    for (int l = 0; status == FKV_OK && l < plan->cache->profile->model.n_layers; l++) {
        status = ready_layer(plan, next, l);
        for (int k = 0; status != FKV_OK && k < l; k++) {
            for (int64_t i = 0; i < next->n_rows; i++) {
                fkv_device_layer_shrink(plan->cache, next->rows[i].seq, k);
            }
        }
    }
    return status;
}

/* Tables that the rows' pages will need, before their addresses are sent. */
static fkv_status prepare(struct fkv_plan_object *plan, struct fkv_plan_object *next,
                          const fkv_batch *batch) {
    struct fkv_device_plan *p = plan->device;
    const int layers = plan->cache->profile->model.n_layers;
    const int64_t noted = plan->cache->device->n_pending;
    memset(p->ready, 0, (size_t)layers);
    fkv_status status = need_rows(plan, next->n_rows);
    if (status == FKV_OK) {
        status = is_short(next) ? ready_all(plan, next) : FKV_OK;
    }
    for (int64_t i = 0; status == FKV_OK && !is_short(next) && i < next->n_rows; i++) {
        status = fkv_device_seq_slots(plan->cache, next->rows[i].seq,
                                      next->rows[i].base + next->rows[i].n_new);
    }
    for (int64_t i = 0; status == FKV_OK && i < next->n_rows; i++) {
        const struct fkv_row *row = &next->rows[i];
        if (row->seq->shared) {
            status = fkv_device_need_segments(plan->cache, row->seq, row->base + row->n_new);
        }
    }
    if (status == FKV_OK) {
        status = fill_rows(plan, next);
    }
    if (status == FKV_OK) {
        status = need_buffers(plan);
    }
    if (status == FKV_OK) {
        status = fkv_device_flush(plan->cache);
    }
    if (status != FKV_OK) {
        plan->cache->device->n_pending = fkv_min64(noted, plan->cache->device->n_pending);
        return status;
    }
    return send_step(plan, next, batch);
}

fkv_status fkv_device_plan_set(struct fkv_plan_object *plan, struct fkv_plan_object *next,
                               const fkv_batch *batch) {
    fkv_status status = make_plan(plan);
    if (status == FKV_OK) {
        status = check_batch(plan, next, batch);
    }
    if (status == FKV_OK) {
        status = prepare(plan, next, batch);
    }
    if (status != FKV_OK) {
        return status;
    }
    bool same = next->n_rows == plan->n_rows;
    for (int64_t i = 0; same && i < next->n_rows; i++) {
        same = next->rows[i].n_new == plan->rows[i].n_new;
    }
    for (int32_t i = 0; !same && i < plan->device->n_lists; i++) {
        plan->device->lists[i].valid = false;
    }
    return FKV_OK;
}

/* The items of short steps, once the plan's rows are the new ones. */
fkv_status fkv_device_plan_finish(struct fkv_plan_object *plan) {
    struct fkv_device_plan *p = plan->device;
    fkv_status status = FKV_OK;
    p->from = 0;
    p->until = plan->tokens;
    /* twice: one that needs more room than those before it takes their lists away */
    for (int i = 0; status == FKV_OK && is_short(plan) && i < 2 * p->n_lists; i++) {
        if (fkv_device_slice_end(plan, i % p->n_lists, 0) == plan->tokens) {
            status = fkv_device_make_items(plan, i % p->n_lists);
        }
    }
    return status;
}

/* ---- the calls of a layer */

static struct fkv_cuda_view cuda_view(const struct fkv_view *v) {
    struct fkv_cuda_view view = {0, 0, 0, 0, 0};
    if (v) {
        view = (struct fkv_cuda_view){(uint64_t)(uintptr_t)v->data, v->token_stride, v->head_stride,
                                      v->dtype, 1};
    }
    return view;
}

static struct fkv_cuda_attend arguments(struct fkv_plan_object *plan, int layer) {
    const struct fkv_device_plan *p = device_plan(plan);
    const int32_t list = p->n_lists > 1 ? layer : 0;
    const struct fkv_cache_object *cache = plan->cache;
    const uint64_t items = p->items.address + (uint64_t)list * fkv_device_list_bytes(p);
    const uint64_t waves = items + 16 + (uint64_t)p->item_capacity * sizeof(struct fkv_cuda_item);
    const bool fourier = cache->device->c.coded == FKV_CUDA_FOURIER;
    return (struct fkv_cuda_attend){
        .step = p->step.address,
        .rows = p->step.address + rows_at(),
        .items = items + 16,
        .n_items = items,
        .rope = p->rope.address,
        .partials = p->partials.address,
        .counters = p->counters.address,
        .rope_capacity = p->rope_capacity,
        .layer = layer,
        .grid = plan->ctx->multiprocessors * MAX_GRID_PER_PROCESSOR,
        .waves = waves,
        .outputs = waves + (uint64_t)p->wave_capacity * sizeof(struct fkv_cuda_wave),
        .spectra = p->spectra.address,
        .grids = p->grids.address,
        .stats = p->stats.address,
        .mass = p->mass.address,
        .maxima = p->maxima.address,
        .spectrum_stride =
            fourier ? fkv_spectrum_stride(INT64_MAX, cache->profile->fourier.bins) : 0,
        .grid_stride = p->grid_stride,
        .n_waves = (int32_t)p->wave_capacity,
        .n_outputs = (int32_t)p->output_capacity,
        .coded_rows = fourier ? cache->device->coded_rows[layer] : 0,
        .log_fft = p->log_fft,
        .tiles = (int32_t)(p->maxima_stride / fkv_max64(1, cache->device->c.n_q_heads)),
    };
}

/* follows: whether the launch before is the append of the plan's tokens. */
static fkv_status attend(struct fkv_plan_object *plan, int layer, const struct fkv_view *q,
                         const struct fkv_view *out, const struct fkv_view *lse, bool appended,
                         bool follows) {
    struct fkv_ctx *ctx = plan->ctx;
    int yes = 0;
    if (!plan->tokens) {
        return FKV_OK;
    }
    if (plan->tokens > MAX_QUERIES) {
        return fkv_fail(ctx, FKV_ERR_LIMIT,
                        "attention of %lld query tokens in one step; on CUDA at most %d",
                        (long long)plan->tokens, MAX_QUERIES);
    }
    int error = ctx->cuda->capturing(ctx->device, ctx->stream, &yes);
    fkv_status status = FKV_DEVICE_CHECK(ctx, error, "stream");
    if (status == FKV_OK && yes && !is_short(plan)) {
        status =
            fkv_fail(ctx, FKV_ERR_UNSUPPORTED,
                     "steps of more than %d tokens of a sequence cannot be captured", SHORT_STEP);
    }
    if (status == FKV_OK && yes && fkv_device_slice_end(plan, layer, 0) < plan->tokens) {
        status = fkv_fail(ctx, FKV_ERR_UNSUPPORTED,
                          "attention of %lld query tokens takes more than one slice and cannot be "
                          "captured",
                          (long long)plan->tokens);
    }
    for (int64_t from = 0; status == FKV_OK && from < plan->tokens; from = plan->device->until) {
        plan->device->from = from;
        plan->device->until = fkv_device_slice_end(plan, layer, from);
        if (!yes) {
            status = fkv_device_make_items(plan, layer);
        }
        if (status != FKV_OK) {
            return status;
        }
        struct fkv_cuda_attend a = arguments(plan, layer);
        a.appended = appended;
        a.follows = follows && !from;
        a.q = cuda_view(q);
        a.out = cuda_view(out);
        a.lse = cuda_view(lse);
        plan->device->captured = plan->device->captured || yes;
        error = ctx->cuda->attend(ctx->device, &plan->cache->device->c, &a, ctx->stream);
        status = FKV_DEVICE_CHECK(ctx, error, "attention");
    }
    return status;
}

fkv_status fkv_device_attend(struct fkv_plan_object *plan, int layer, const struct fkv_view *q,
                             const struct fkv_view *out, const struct fkv_view *lse,
                             bool appended) {
    return attend(plan, layer, q, out, lse, appended, false);
}

/* Blocks that the row's tokens fill, as jobs; their pages are taken. */
static fkv_status take_blocks(struct fkv_plan_object *plan, int64_t row, int layer,
                              struct fkv_cuda_seal *jobs, struct fkv_device_page **pages,
                              int64_t *n) {
    struct fkv_cache_object *cache = plan->cache;
    const struct fkv_row *r = &plan->rows[row];
    const int64_t step = fkv_device_block_tiles(cache->device);
    const int64_t until = fkv_device_tiles_to_code(cache->profile, r->base + r->n_new);
    for (int64_t tile = r->seq->layers[layer].n_coded; tile < until; tile += step) {
        struct fkv_device_page *page =
            fkv_device_page_new(cache, r->seq, cache->device->pool_of[layer]);
        if (!page) {
            return fkv_cache_refused(cache);
        }
        pages[*n] = page;
        jobs[*n] = (struct fkv_cuda_seal){(int32_t)row, (int32_t)tile, page->address};
        ++*n;
    }
    return FKV_OK;
}

static int64_t count_blocks(const struct fkv_plan_object *plan, int layer) {
    const struct fkv_cache_object *cache = plan->cache;
    int64_t n = 0;
    for (int64_t i = 0; cache->device->c.coded && i < plan->n_rows; i++) {
        const struct fkv_row *r = &plan->rows[i];
        const int64_t until = fkv_device_tiles_to_code(cache->profile, r->base + r->n_new);
        n += fkv_max64(0, until - r->seq->layers[layer].n_coded) /
             fkv_device_block_tiles(cache->device);
    }
    return n;
}

/* Room for what the step will code, so that nothing can fail behind the launches. */
struct sealing {
    struct fkv_cuda_seal *jobs;
    struct fkv_device_page **pages;
    int64_t n, slots;
    struct fkv_folding folding; /* of Fourier caches */
};

static bool folds(const struct fkv_plan_object *plan) {
    return plan->cache->device->c.coded == FKV_CUDA_FOURIER;
}

static void end_sealing(struct fkv_plan_object *plan, struct sealing *s) {
    fkv_device_folding_end(plan, &s->folding);
    fkv_cache_free(plan->cache, NULL, FKV_CLASS_TABLES, s->jobs,
                   (size_t)s->slots * sizeof *s->jobs);
    fkv_cache_free(plan->cache, NULL, FKV_CLASS_TABLES, s->pages,
                   (size_t)s->slots * sizeof *s->pages);
}

/* For a step that came to nothing: its blocks are given back. */
static void undo_sealing(struct fkv_plan_object *plan, struct sealing *s) {
    for (int64_t i = 0; i < s->n; i++) {
        fkv_device_page_drop(plan->cache, plan->rows[s->jobs[i].row].seq, s->pages[i]);
    }
    fkv_device_folding_undo(plan, &s->folding);
    end_sealing(plan, s);
}

static fkv_status begin_sealing(struct fkv_plan_object *plan, int layer, struct sealing *s) {
    struct fkv_cache_object *cache = plan->cache;
    *s = (struct sealing){.slots = 0};
    if (folds(plan)) {
        return fkv_device_folding_begin(plan, layer, &s->folding);
    }
    s->slots = count_blocks(plan, layer);
    if (!s->slots) {
        return FKV_OK;
    }
    s->jobs = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, (size_t)s->slots * sizeof *s->jobs);
    s->pages = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, (size_t)s->slots * sizeof *s->pages);
    fkv_status status = s->jobs && s->pages ? FKV_OK : fkv_cache_refused(cache);
    for (int64_t i = 0; status == FKV_OK && i < plan->n_rows; i++) {
        status = take_blocks(plan, i, layer, s->jobs, s->pages, &s->n);
    }
    if (status == FKV_OK) {
        status =
            fkv_device_reserve(cache, &plan->device->seals, (size_t)s->slots * sizeof *s->jobs);
    }
    if (status == FKV_OK) {
        status = fkv_device_ready(cache, (size_t)s->slots * sizeof *s->jobs, s->slots);
    }
    if (status != FKV_OK) {
        undo_sealing(plan, s);
    }
    return status;
}

/* Launches the coding and puts the blocks in the place of the pages. */
static fkv_status run_sealing(struct fkv_plan_object *plan, int layer, struct sealing *s) {
    struct fkv_cache_object *cache = plan->cache;
    struct fkv_ctx *ctx = plan->ctx;
    const size_t bytes = (size_t)s->n * sizeof *s->jobs;
    const int64_t step = s->n ? fkv_device_block_tiles(cache->device) : 0;
    void *memory;
    if (folds(plan)) {
        const struct fkv_cuda_attend a = arguments(plan, layer);
        return fkv_device_folding_run(plan, layer, &a, &s->folding);
    }
    if (!s->n) {
        return FKV_OK;
    }
    fkv_status status = fkv_device_stage(cache, bytes, &memory);
    if (status == FKV_OK) {
        memcpy(memory, s->jobs, bytes);
        status = fkv_device_send(cache, plan->device->seals.address, bytes);
    }
    if (status == FKV_OK) {
        const struct fkv_cuda_attend a = arguments(plan, layer);
        int error = ctx->cuda->seal(ctx->device, &cache->device->c, &a, plan->device->seals.address,
                                    (int)s->n, ctx->stream);
        status = FKV_DEVICE_CHECK(ctx, error, "coding");
    }
    for (int64_t i = 0; status == FKV_OK && i < s->n; i++) {
        struct fkv_seq *seq = plan->rows[s->jobs[i].row].seq;
        for (int64_t t = 0; t < step; t++) {
            struct fkv_device_page **entry =
                fkv_device_entry(seq->device, layer, 1 + s->jobs[i].tile + t);
            fkv_device_page_drop(cache, seq, *entry);
            *entry = t ? NULL : s->pages[i];
        }
        seq->layers[layer].n_coded = s->jobs[i].tile + step;
        const uint64_t at = (uint64_t)((int64_t)layer * seq->device->slots + 1 + s->jobs[i].tile);
        status = fkv_device_patch(cache, seq->device->table + at * 8, s->pages[i]->address, 0);
    }
    return status == FKV_OK ? fkv_device_flush(cache) : status;
}

static fkv_status launch_append(struct fkv_plan_object *plan, int layer, const struct fkv_view *k,
                                const struct fkv_view *v, bool capturing) {
    struct fkv_ctx *ctx = plan->ctx;
    struct fkv_cuda_attend a = arguments(plan, layer);
    const struct fkv_cuda_view keys = cuda_view(k), values = cuda_view(v);
    /* how many warps; a replay with more tokens only takes longer */
    const int64_t most =
        capturing ? fkv_max64(plan->tokens, 4 * plan->device->row_capacity) : plan->tokens;
    a.n_rows = (int32_t)plan->n_rows;
    for (int64_t i = 0; !is_short(plan) && i < plan->n_rows; i++) {
        a.longest = (int32_t)fkv_max64(a.longest, plan->rows[i].n_new);
    }
    if (a.n_rows > 65535) {
        a.longest = 0; /* more than a grid's z: token by token */
    }
    int error = ctx->cuda->append(ctx->device, &plan->cache->device->c, &a, &keys, &values,
                                  (int)fkv_min64(most, INT32_MAX), ctx->stream);
    return FKV_DEVICE_CHECK(ctx, error, "append");
}

static void advance(struct fkv_plan_object *plan, int layer) {
    for (int64_t i = 0; i < plan->n_rows; i++) {
        plan->rows[i].seq->layers[layer].tokens += plan->rows[i].n_new;
    }
}

fkv_status fkv_device_append(struct fkv_plan_object *plan, int layer, const struct fkv_view *q,
                             const struct fkv_view *k, const struct fkv_view *v,
                             const struct fkv_view *out, const struct fkv_view *lse) {
    struct fkv_ctx *ctx = plan->ctx;
    struct sealing sealing = {.slots = 0};
    int capturing = 0;
    if (!plan->tokens) {
        return FKV_OK;
    }
    int error = ctx->cuda->capturing(ctx->device, ctx->stream, &capturing);
    fkv_status status = FKV_DEVICE_CHECK(ctx, error, "stream");
    if (status == FKV_OK && capturing && !plan->device->ready[layer]) {
        status =
            fkv_fail(ctx, FKV_ERR_UNSUPPORTED,
                     "steps of more than %d tokens of a sequence cannot be captured", SHORT_STEP);
    }
    if (status == FKV_OK && !plan->device->ready[layer]) {
        status = ready_layer(plan, plan, layer);
        if (status == FKV_OK) {
            status = fkv_device_flush(plan->cache);
        }
    }
    if (status == FKV_OK && !capturing) {
        status = begin_sealing(plan, layer, &sealing);
    }
    if (status != FKV_OK) {
        return status;
    }
    status = launch_append(plan, layer, k, v, capturing);
    if (status == FKV_OK && q) {
        status = attend(plan, layer, q, out, lse, true, true);
    }
    plan->device->captured = plan->device->captured || capturing;
    if (status != FKV_OK) {
        undo_sealing(plan, &sealing);
        return status;
    }
    if (!capturing) {
        advance(plan, layer);
        status = run_sealing(plan, layer, &sealing);
    }
    end_sealing(plan, &sealing);
    return status;
}

/* What coding needs is taken for all layers first: it is there, or nothing has changed and the call can be repeated. */
fkv_status fkv_device_replayed(struct fkv_plan_object *plan) {
    struct fkv_cache_object *cache = plan->cache;
    const int layers = cache->profile->model.n_layers;
    const size_t bytes = (size_t)layers * sizeof(struct sealing);
    struct sealing *all = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, bytes);
    fkv_status status = all ? FKV_OK : fkv_cache_refused(cache);
    int begun = 0;
    while (status == FKV_OK && begun < layers) {
        status = begin_sealing(plan, begun, &all[begun]);
        begun += status == FKV_OK;
    }
    for (int l = 0; status != FKV_OK && l < begun; l++) {
        undo_sealing(plan, &all[l]);
    }
    for (int l = 0; status == FKV_OK && l < layers; l++) {
        advance(plan, l);
    }
    for (int l = 0; begun == layers && l < layers; l++) {
        if (status == FKV_OK) {
            status = run_sealing(plan, l, &all[l]);
        }
        end_sealing(plan, &all[l]);
    }
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, all, bytes);
    return status;
}

fkv_status fkv_device_read(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                           fkv_part part, int64_t first, int64_t count,
                           const struct fkv_view *out) {
    struct fkv_ctx *ctx = cache->ctx;
    const struct fkv_cuda_view view = cuda_view(out);
    const struct fkv_layer *l = &seq->layers[layer];
    if (!count) {
        return FKV_OK;
    }
    if (seq->shared) {
        return fkv_device_read_fourier(cache, seq, layer, part, first, count, &view);
    }
    int error =
        ctx->cuda->read(ctx->device, &cache->device->c, seq->device->table, seq->device->slots,
                        layer, part, l->n_coded, first, count, &view, ctx->stream);
    return FKV_DEVICE_CHECK(ctx, error, "reading back");
}
