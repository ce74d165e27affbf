/* SPDX-License-Identifier: Apache-2.0 */
#include "attend/plan.h"

#include <string.h>

/* Whether carriers turn at all. */
static bool turning(const struct fkv_profile_object *p) {
    return p->waves && p->codec.domain == FKV_DOMAIN_ROTATED;
}

static size_t row_floats(const struct fkv_plan_object *plan) {
    return 2 * (size_t)plan->cache->profile->waves->half;
}

void fkv_plan_free_turns(struct fkv_plan_object *plan) {
    if (plan->turns.rows)
        fkv_heap_free(&plan->ctx->heap, plan->turns.rows,
                      (size_t)plan->turns.slots * row_floats(plan) * sizeof(float));
}

/* Position less index of the first token of the body. */
static int64_t row_shift(const struct fkv_plan_object *next, const struct fkv_row *row) {
    const struct fkv_profile_object *p = next->cache->profile;
    const struct fkv_layer *l = &row->seq->layers[0];
    const int64_t sinks = fkv_sinks(p);
    if (l->n_coded)
        return l->shift;
    if (row->base > sinks)
        return fkv_page_positions(p, false, l->tiles[0])[0] - sinks;
    return next->positions[row->offset + sinks - row->base] - sinks;
}

static fkv_status grow(struct fkv_plan_object *plan, int64_t tiles) {
    struct fkv_turns *t = &plan->turns;
    const int64_t slots = fkv_slots_for(tiles);
    const size_t row = row_floats(plan) * sizeof(float);
    if (slots <= t->slots)
        return FKV_OK;
    size_t bytes;
    if (!fkv_mul_size((size_t)slots, row, &bytes))
        return fkv_fail(plan->ctx, FKV_ERR_LIMIT, "plan: %lld tiles", (long long)tiles);
    float *rows = fkv_heap_alloc(&plan->ctx->heap, bytes);
    if (!rows)
        return fkv_fail_memory(plan->ctx, bytes, "plan");
    if (t->tiles)
        memcpy(rows, t->rows, (size_t)t->tiles * row);
    fkv_plan_free_turns(plan);
    t->rows = rows;
    t->slots = slots;
    return FKV_OK;
}

fkv_status fkv_plan_set_turns(struct fkv_plan_object *plan, const struct fkv_plan_object *next) {
    const struct fkv_profile_object *p = plan->cache->profile;
    struct fkv_turns *t = &plan->turns;
    int64_t tiles = 0, shift = 0;
    for (int64_t i = 0; turning(p) && i < next->n_rows; i++) {
        const struct fkv_row *row = &next->rows[i];
        const int64_t coded =
            fkv_max64(row->seq->layers[0].n_coded, fkv_tiles_to_code(p, row->base + row->n_new));
        if (coded && !tiles)
            shift = row_shift(next, row);
        tiles = fkv_max64(tiles, coded);
    }
    if (!tiles)
        return FKV_OK;
    if (shift != t->shift)
        t->tiles = 0;
    fkv_status status = grow(plan, tiles);
    if (status != FKV_OK || tiles <= t->tiles)
        return status;
    float *to = t->rows + (size_t)t->tiles * row_floats(plan);
    fkv_waves_turns(p->waves, fkv_sinks(p) + t->tiles * FKV_TILE + shift, tiles - t->tiles, to,
                    to + p->waves->half, (ptrdiff_t)row_floats(plan));
    t->tiles = tiles;
    t->shift = shift;
    return FKV_OK;
}

const float *fkv_turn_at(const struct fkv_plan_object *plan, int64_t tile, int64_t position,
                         float *own) {
    const struct fkv_profile_object *p = plan->cache->profile;
    const struct fkv_turns *t = &plan->turns;
    if (tile < t->tiles && position == fkv_sinks(p) + tile * FKV_TILE + t->shift)
        return t->rows + (size_t)tile * row_floats(plan);
    fkv_waves_turns(p->waves, position, 1, own, own + p->waves->half, 0);
    return own;
}

const float *fkv_turn_of(const struct fkv_plan_object *plan, int layer_index,
                         const struct fkv_layer *layer, int64_t tile, float *own) {
    const struct fkv_profile_object *p = plan->cache->profile;
    if (!layer->uneven)
        return fkv_turn_at(plan, tile, fkv_sinks(p) + tile * FKV_TILE + layer->shift, own);
    const struct fkv_block_head *head =
        fkv_block_head(&plan->cache->layouts[layer_index].block, fkv_block_of(p, layer, tile));
    const int64_t in_block = tile % fkv_tiles_per_block(p);
    return head->listed ? NULL : fkv_turn_at(plan, tile, head->first + in_block * FKV_TILE, own);
}
