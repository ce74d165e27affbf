/* SPDX-License-Identifier: Apache-2.0 */
#include "attend/attend.h"
#include "attend/longcache.h"
#include "device/device.h"

#include <math.h>
#include <string.h>

fkv_status fkv_plan_new(struct fkv_cache_object *cache, struct fkv_plan_object **out) {
    struct fkv_plan_object *plan = fkv_heap_calloc(&cache->ctx->heap, sizeof *plan);
    *out = NULL;
    if (!plan)
        return fkv_fail_memory(cache->ctx, sizeof *plan, "a plan");
    plan->ctx = cache->ctx;
    plan->cache = cache;
    fkv_cache_ref(cache);
    *out = plan;
    return FKV_OK;
}

/* Whether the step has a table of RoPE's sines: bounded, or little for each sequence. */
static bool has_table(const struct fkv_plan_object *plan) {
    return plan->tokens <= FKV_ROPE_TOKENS + 16 * plan->n_rows;
}

static size_t rope_bytes(const struct fkv_plan_object *plan) {
    if (!has_table(plan))
        return 0;
    return (size_t)plan->tokens * (size_t)(plan->cache->profile->model.rope_dim / 2) *
           sizeof(float);
}

static size_t positions_bytes(const struct fkv_plan_object *plan) {
    const struct fkv_profile_object *p = plan->cache->profile;
    const bool used = p->coding == FKV_CODING_CALIBRATED || (p->model.rope_dim && !has_table(plan));
    return used ? (size_t)plan->tokens * sizeof *plan->positions : 0;
}

static void free_contents(struct fkv_plan_object *plan) {
    struct fkv_heap *heap = &plan->ctx->heap;
    fkv_heap_free(heap, plan->rows, (size_t)plan->n_rows * sizeof *plan->rows);
    fkv_heap_free(heap, plan->rooms, (size_t)plan->n_rows * sizeof *plan->rooms);
    fkv_heap_free(heap, plan->cos, rope_bytes(plan));
    fkv_heap_free(heap, plan->sin, rope_bytes(plan));
    fkv_heap_free(heap, plan->positions, positions_bytes(plan));
    fkv_heap_free(heap, plan->work.states, plan->work.bytes[0]);
    fkv_heap_free(heap, plan->work.partials, plan->work.bytes[1]);
    fkv_heap_free(heap, plan->work.scratches, plan->work.bytes[2]);
    if (plan->longcache)
        fkv_heap_free(heap, plan->longcache, plan->longcache->bytes);
    fkv_meter_free(plan);
}

void fkv_plan_free(struct fkv_plan_object *plan) {
    struct fkv_cache_object *cache = plan->cache;
    fkv_device_plan_end(plan);
    free_contents(plan);
    fkv_plan_free_turns(plan);
    fkv_heap_free(&plan->ctx->heap, plan, sizeof *plan);
    fkv_cache_unref(cache);
}

/* ---- update */

/* Allocates; *bytes is set only on success so that free_contents() frees what is there. */
static fkv_status take(struct fkv_plan_object *plan, size_t count, size_t size, void *out,
                       size_t *bytes) {
    size_t total;
    if (!fkv_mul_size(count, size, &total))
        return fkv_fail(plan->ctx, FKV_ERR_LIMIT, "plan: %zu * %zu bytes overflow", count, size);
    void *p = total ? fkv_heap_calloc(&plan->ctx->heap, total) : NULL;
    if (total && !p)
        return fkv_fail_memory(plan->ctx, total, "plan");
    memcpy(out, &p, sizeof p);
    if (bytes)
        *bytes = total;
    return FKV_OK;
}

static fkv_status check_row(struct fkv_plan_object *plan, const fkv_batch *batch, int32_t i,
                            struct fkv_row *row) {
    struct fkv_cache_object *cache = plan->cache;
    row->id = batch->sequences[i];
    row->n_new = batch->n_new[i];
    row->seq = fkv_seq_find(cache, row->id);
    if (!row->seq)
        return fkv_fail(plan->ctx, FKV_ERR_HANDLE, "sequences[%d]: %lld is no living sequence", i,
                        (long long)row->id);
    if (row->n_new < 0)
        return fkv_fail(plan->ctx, FKV_ERR_INVALID, "n_new[%d]: %lld is negative", i,
                        (long long)row->n_new);
    bool equal;
    row->crops = row->seq->crops;
    row->base = fkv_seq_tokens(cache, row->seq, &equal);
    if (!equal)
        return fkv_fail(plan->ctx, FKV_ERR_STATE,
                        "sequences[%d]: its layers hold unequal numbers of tokens (the least is "
                        "%lld): finish the step",
                        i, (long long)row->base);
    if ((uint64_t)row->n_new > cache->max_tokens ||
        (uint64_t)(row->base + row->n_new) > cache->max_tokens)
        return fkv_fail(
            plan->ctx, FKV_ERR_LIMIT, "sequences[%d]: %lld + %lld tokens exceed the limit of %llu",
            i, (long long)row->base, (long long)row->n_new, (unsigned long long)cache->max_tokens);
    for (int32_t j = 0; j < i; j++)
        if (batch->sequences[j] == row->id)
            return fkv_fail(plan->ctx, FKV_ERR_INVALID, "sequences[%d] is sequences[%d] again", i,
                            j);
    const struct fkv_profile_object *p = cache->profile;
    int64_t coded = fkv_tiles_to_code(p, row->base + row->n_new);
    if (p->coding == FKV_CODING_FOURIER && p->fourier.outgrow == FKV_OUTGROW_ERROR &&
        coded > fkv_tiles_per_segment(row->seq->period))
        return fkv_fail(plan->ctx, FKV_ERR_LIMIT,
                        "sequences[%d]: %lld tokens outgrow its period of %lld tokens", i,
                        (long long)(row->base + row->n_new), (long long)row->seq->period);
    return FKV_OK;
}

static fkv_status check_positions(struct fkv_plan_object *plan, const fkv_batch *batch) {
    if (!batch->positions) {
        if (batch->positions_count)
            return fkv_fail(plan->ctx, FKV_ERR_INVALID,
                            "positions is NULL, positions_count is %lld",
                            (long long)batch->positions_count);
        return FKV_OK;
    }
    if (batch->positions_count != plan->tokens)
        return fkv_fail(plan->ctx, FKV_ERR_INVALID,
                        "positions_count: %lld, the step has %lld tokens",
                        (long long)batch->positions_count, (long long)plan->tokens);
    for (int64_t i = 0; i < plan->tokens; i++)
        if (batch->positions[i] < 0 || batch->positions[i] > INT32_MAX)
            return fkv_fail(plan->ctx, FKV_ERR_INVALID, "positions[%lld]: %lld is out of range",
                            (long long)i, (long long)batch->positions[i]);
    return FKV_OK;
}

static fkv_status set_rows(struct fkv_plan_object *plan, const fkv_batch *batch) {
    size_t count = (size_t)batch->count;
    fkv_status status = take(plan, count, sizeof *plan->rows, &plan->rows, NULL);
    if (status != FKV_OK)
        return status;
    plan->n_rows = batch->count;
    status = take(plan, count, sizeof *plan->rooms, &plan->rooms, NULL);
    if (status != FKV_OK)
        return status;
    const struct fkv_model *m = &plan->cache->profile->model;
    /* Fill the lanes of the transforms, but rather leave lanes empty than threads. */
    const int64_t heads_for_all = (int64_t)batch->count * m->n_kv_heads / plan->ctx->threads;
    for (int32_t i = 0; i < batch->count; i++) {
        struct fkv_row *row = &plan->rows[i];
        status = check_row(plan, batch, i, row);
        if (status != FKV_OK)
            return status;
        const int64_t rows_of_head = row->n_new * m->group;
        row->offset = plan->tokens;
        row->blocks = fkv_ceil_div(rows_of_head, FKV_UNIT_ROWS);
        row->heads_per_unit = 1;
        if (plan->cache->profile->coding == FKV_CODING_FOURIER && rows_of_head)
            row->heads_per_unit = (int)fkv_max64(
                1,
                fkv_min64(heads_for_all, fkv_min64(m->n_kv_heads, FKV_FFT_LANES / rows_of_head)));
        row->first_unit = plan->units;
        plan->units += row->blocks * fkv_ceil_div(m->n_kv_heads, row->heads_per_unit);
        plan->tokens += row->n_new;
    }
    return check_positions(plan, batch);
}

static fkv_status set_rope(struct fkv_plan_object *plan, const fkv_batch *batch) {
    const size_t half = (size_t)(plan->cache->profile->model.rope_dim / 2);
    struct fkv_rope_rows rows;
    fkv_rope_begin(&rows, plan->cache->profile);
    fkv_status status = take(plan, rope_bytes(plan), 1, &plan->cos, NULL);
    if (status == FKV_OK)
        status = take(plan, rope_bytes(plan), 1, &plan->sin, NULL);
    if (status == FKV_OK)
        status = take(plan, positions_bytes(plan), 1, &plan->positions, NULL);
    if (status != FKV_OK)
        return status;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct fkv_row *row = &plan->rows[i];
        for (int64_t t = 0; t < row->n_new; t++) {
            int64_t token = row->offset + t;
            int64_t position = batch->positions ? batch->positions[token] : row->base + t;
            if (plan->positions)
                plan->positions[token] = (int32_t)position;
            if (plan->cos)
                fkv_rope_row(&rows, position, plan->cos + (size_t)token * half,
                             plan->sin + (size_t)token * half);
        }
    }
    return FKV_OK;
}

void fkv_plan_rotate(struct fkv_plan_rope *rope, int64_t token, float *x) {
    const struct fkv_plan_object *plan = rope->plan;
    const struct fkv_model *m = &plan->cache->profile->model;
    const int half = m->rope_dim / 2;
    if (!half)
        return;
    if (plan->cos) {
        fkv_rope_apply(m, x, plan->cos + token * half, plan->sin + token * half);
        return;
    }
    if (token != rope->token)
        fkv_rope_row(&rope->rows, plan->positions[token], rope->cos, rope->sin);
    rope->token = token;
    fkv_rope_apply(m, x, rope->cos, rope->sin);
}

/* What the layers of a row can show during the step, at most. Crops can leave more tiles coded than the
 * tokens call for, and not the same number in all layers. */
struct extent {
    int64_t chunks, segments;
};

static struct extent row_extent(const struct fkv_profile_object *p, const struct fkv_row *row) {
    const int64_t after = row->base + row->n_new, period = row->seq->period;
    const int64_t to_code = fkv_tiles_to_code(p, after);
    struct extent e = {0, 0};
    for (int l = 0; l < p->model.n_layers; l++) {
        const int64_t before = row->seq->layers[l].n_coded, coded = fkv_max64(before, to_code);
        if (l && before == row->seq->layers[l - 1].n_coded)
            continue;
        e.chunks = fkv_max64(e.chunks, fkv_chunk_count(p, period, after, before));
        e.chunks = fkv_max64(e.chunks, fkv_chunk_count(p, period, after, coded));
        e.segments = fkv_max64(e.segments, fkv_ceil_div(coded, fkv_tiles_per_segment(period)));
    }
    return e;
}

static void size_workspace(struct fkv_plan_object *plan) {
    const struct fkv_profile_object *p = plan->cache->profile;
    struct fkv_workspace *w = &plan->work;
    const int64_t threads = plan->ctx->threads, heads = p->model.n_kv_heads;
    int64_t items = 0;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct fkv_row *row = &plan->rows[i];
        const struct extent e = row_extent(p, row);
        w->grid = fkv_max64(w->grid, e.segments * fkv_grid_floats(row->seq));
        w->partial = fkv_max64(w->partial, fkv_partial_floats(p, row->seq));
        w->scratch = fkv_max64(w->scratch, fkv_attend_scratch(p, row->seq));
        items += row->blocks * heads * e.chunks;
    }
    w->state = fkv_state_floats(p, w->grid);
    /* Many units keep all threads busy by themselves; one thread gains nothing from chunks. */
    w->by_chunk = threads > 1 && plan->units < 4 * threads;
    if (plan->selecting) /* it has a workspace of its own */
        return;
    w->n_states = plan->units ? (w->by_chunk ? plan->units : threads) : 0;
    w->n_partials = plan->units ? (w->by_chunk ? items : threads) : 0;
}

/* A buffer for the next step: the last step's if it serves and is not far too large. */
static fkv_status take_work(struct fkv_plan_object *plan, const struct fkv_plan_object *last, int i,
                            int64_t count, int64_t floats) {
    float **to[3] = {&plan->work.states, &plan->work.partials, &plan->work.scratches};
    float *have[3] = {last->work.states, last->work.partials, last->work.scratches};
    size_t need = (size_t)count * (size_t)floats * sizeof(float);
    if (need && last->work.bytes[i] >= need && last->work.bytes[i] / 4 <= need) {
        *to[i] = have[i];
        plan->work.bytes[i] = last->work.bytes[i];
        return FKV_OK;
    }
    return take(plan, (size_t)count, (size_t)floats * sizeof(float), to[i], &plan->work.bytes[i]);
}

static fkv_status take_workspace(struct fkv_plan_object *plan, const struct fkv_plan_object *last) {
    const struct fkv_workspace *w = &plan->work;
    fkv_status status = take_work(plan, last, 0, w->n_states, w->state);
    if (status == FKV_OK)
        status = take_work(plan, last, 1, w->n_partials, w->partial);
    if (status == FKV_OK)
        status = take_work(plan, last, 2, plan->ctx->threads, w->scratch);
    return status;
}

/* Leaves to `b` what both use, before `a` is freed. */
static void leave_shared(struct fkv_workspace *a, const struct fkv_workspace *b) {
    if (a->states == b->states)
        a->states = NULL;
    if (a->partials == b->partials)
        a->partials = NULL;
    if (a->scratches == b->scratches)
        a->scratches = NULL;
}

fkv_status fkv_plan_set(struct fkv_plan_object *plan, const fkv_batch *batch) {
    struct fkv_plan_object next = {.ctx = plan->ctx, .cache = plan->cache};
    next.selecting = plan->selecting;
    next.select = plan->select;
    fkv_status status = set_rows(&next, batch);
    const bool device = plan->cache->device != NULL;
    if (device && status == FKV_OK)
        status = fkv_device_plan_set(plan, &next, batch);
    if (!device && status == FKV_OK)
        status = set_rope(&next, batch);
    if (!device && status == FKV_OK) {
        size_workspace(&next);
        status = take_workspace(&next, plan);
    }
    if (!device && status == FKV_OK)
        status = fkv_meter_set(&next);
    if (!device && status == FKV_OK)
        status = fkv_longcache_set(&next, plan);
    if (!device && status == FKV_OK)
        status = fkv_plan_set_turns(plan, &next);
    if (status != FKV_OK) {
        leave_shared(&next.work, &plan->work);
        free_contents(&next);
        return status;
    }
    leave_shared(&plan->work, &next.work);
    free_contents(plan);
    plan->rows = next.rows;
    plan->rooms = next.rooms;
    plan->n_rows = next.n_rows;
    plan->tokens = next.tokens;
    plan->units = next.units;
    plan->cos = next.cos;
    plan->sin = next.sin;
    plan->positions = next.positions;
    plan->work = next.work;
    plan->meter = next.meter;
    plan->longcache = next.longcache;
    return device ? fkv_device_plan_finish(plan) : FKV_OK;
}

/* ---- the calls of a step */

fkv_status fkv_plan_check(struct fkv_plan_object *plan, int layer, bool appending, bool *appended) {
    int64_t before = 0, after = 0;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        struct fkv_row *row = &plan->rows[i];
        row->seq = fkv_seq_find(plan->cache, row->id);
        bool cropped = row->seq && row->seq->crops != row->crops;
        int64_t tokens = row->seq && !cropped ? row->seq->layers[layer].tokens : -1;
        if (tokens != row->base && tokens != row->base + row->n_new)
            return fkv_fail(plan->ctx, FKV_ERR_STATE,
                            "plan: sequence %lld has changed since the plan was updated",
                            (long long)row->id);
        if (row->n_new)
            *(tokens == row->base ? &before : &after) += 1;
    }
    if ((before && after) || (appending && after))
        return fkv_fail(plan->ctx, FKV_ERR_STATE, "plan: layer %d has had this step already",
                        layer);
    *appended = after > 0;
    return FKV_OK;
}

fkv_status fkv_plan_check_finite(struct fkv_plan_object *plan, const char *name,
                                 const struct fkv_view *x, int heads) {
    const int D = plan->cache->profile->model.head_dim;
    const size_t size = fkv_dtype_size(x->dtype);
    if (plan->ctx->cuda || plan->ctx->flags & FKV_CONTEXT_PROPAGATE_NONFINITE)
        return FKV_OK;
    for (int64_t t = 0; t < plan->tokens; t++)
        for (int h = 0; h < heads; h++) {
            const char *from = x->data + t * x->token_stride + h * x->head_stride;
            for (int d = 0; d < D; d++) {
                float value = fkv_load_element(from + (size_t)d * size, x->dtype);
                if (!isfinite(value))
                    return fkv_fail(plan->ctx, FKV_ERR_NONFINITE, "%s[%lld][%d][%d] = %g", name,
                                    (long long)t, h, d, (double)value);
            }
        }
    return FKV_OK;
}

/* Room for the new tokens and for what they will push into code, of all rows or of none. */
static fkv_status make_room(struct fkv_plan_object *plan, int layer) {
    fkv_status status = FKV_OK;
    int64_t grown = 0, reserved = 0;
    for (; grown < plan->n_rows; grown++) {
        struct fkv_row *row = &plan->rows[grown];
        status = fkv_layer_grow(plan->cache, row->seq, layer, row->n_new);
        if (status != FKV_OK)
            break;
    }
    for (; status == FKV_OK && reserved < plan->n_rows; reserved++) {
        struct fkv_row *row = &plan->rows[reserved];
        int64_t until = fkv_tiles_to_code(plan->cache->profile, row->base + row->n_new);
        const int32_t *step = plan->positions ? plan->positions + row->offset : NULL;
        status =
            fkv_layer_reserve(plan->cache, row->seq, layer, until, step, &plan->rooms[reserved]);
        if (status != FKV_OK)
            break;
    }
    if (status == FKV_OK)
        return FKV_OK;
    while (reserved--)
        fkv_layer_unreserve(plan->cache, plan->rows[reserved].seq, layer, &plan->rooms[reserved]);
    while (grown--)
        fkv_layer_grown(plan->cache, plan->rows[grown].seq, layer, false);
    return status;
}

static void seal(struct fkv_plan_object *plan, const struct fkv_row *row, int layer,
                 struct fkv_coding_room *room, const struct fkv_view *q) {
    struct fkv_cache_object *cache = plan->cache;
    const int64_t first = row->seq->layers[layer].n_coded, until = room->until;
    if (cache->meter)
        fkv_meter_exact(plan, row, layer, q, until);
    fkv_layer_seal(cache, row->seq, layer, room);
    if (cache->meter)
        fkv_meter_coded(plan, row, layer, q, first);
}

fkv_status fkv_plan_append(struct fkv_plan_object *plan, int layer, const struct fkv_view *q,
                           const struct fkv_view *k, const struct fkv_view *v,
                           const struct fkv_view *out, const struct fkv_view *lse) {
    const struct fkv_backend_ops *ops = plan->ctx->ops;
    struct fkv_cache_object *cache = plan->cache;
    if (cache->device)
        return fkv_device_append(plan, layer, q, k, v, out, lse);
    fkv_status status = make_room(plan, layer);
    if (status != FKV_OK)
        return status;
    bool stored = ops->store(plan, layer, k, v);
    for (int64_t i = 0; i < plan->n_rows; i++) {
        struct fkv_row *row = &plan->rows[i];
        if (stored)
            row->seq->layers[layer].tokens += row->n_new;
        else
            fkv_layer_unreserve(cache, row->seq, layer, &plan->rooms[i]);
        fkv_layer_grown(cache, row->seq, layer, stored);
    }
    if (!stored)
        return fkv_store_report(plan, k, v);
    if (q)
        (plan->longcache ? ops->attend_selected : ops->attend)(plan, layer, q, out, lse);
    for (int64_t i = 0; i < plan->n_rows; i++) {
        struct fkv_row *row = &plan->rows[i];
        struct fkv_coding_room *room = &plan->rooms[i];
        if (room->until <= row->seq->layers[layer].n_coded)
            continue;
        fkv_layer_open_segments(cache, row->seq, layer, room);
        ops->code(plan, row, layer, room);
        seal(plan, row, layer, room, q);
    }
    return FKV_OK;
}
