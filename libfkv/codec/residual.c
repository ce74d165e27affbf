/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sealing blocks: what a tile's channels are beyond their carriers, quantised group by group (docs/codec.md).
 * A block is made from the exact pages of its own tokens alone, so its bytes depend on nothing else.
 */
#include "attend/plan.h"
#include "cache/index.h"

#include <string.h>

#define MAX_D FKV_MAX_HEAD_DIM
#define MAX_GROUP_TILES 2

struct block_job {
    struct fkv_plan_object *plan;
    struct fkv_layer *layer;
    int layer_index;
    const struct fkv_coding_room *room;
};

/* One KV head's K or V of one block. */
struct head {
    const struct fkv_plan_object *plan;
    const struct fkv_profile_object *profile;
    const struct fkv_kernels *kernels;
    const struct fkv_residuals *residuals;
    const float *carrier;
    fkv_part part;
    void *const *pages; /* of the block's tiles */
    int64_t tile;       /* the first, of the body */
    char *block;
    const struct fkv_block_head *block_head;
    size_t from;                   /* elements before the part in an exact page */
    size_t to, tile_bytes, scales; /* in the block */
    float *x;                      /* [D][64 tiles] for keys, [64 tiles][row] for values */
    float *turn[MAX_GROUP_TILES];  /* own turns, c then s */
    const float
        *c[MAX_GROUP_TILES]; /* of the group at hand; NULL for tiles with listed positions */
    int row;
};

static const void *exact_tile(const struct head *h, int64_t i, size_t element) {
    return fkv_element(h->pages[i], h->profile->storage_dtype, h->from + element);
}

static void copy_exact(const struct head *h, int64_t i, char *to) {
    const size_t size = fkv_dtype_size(h->profile->storage_dtype);
    const size_t n = h->residuals->count[FKV_WIDTH_EXACT], D = (size_t)h->profile->model.head_dim;
    for (size_t c = 0; c < n; c++) {
        const size_t d = h->residuals->list[c];
        if (h->part == FKV_PART_K) {
            memcpy(to + c * FKV_TILE * size, exact_tile(h, i, d * FKV_TILE), FKV_TILE * size);
            continue;
        }
        for (size_t t = 0; t < FKV_TILE; t++)
            memcpy(to + (t * n + c) * size, exact_tile(h, i, t * D + d), size);
    }
}

/* ---- residuals of keys */

static const float zeros[FKV_TILE];

/* x - u c(t) - v s(t) is what channel d is beyond its carrier in one tile. */
struct carried {
    const float *c, *s;
    float u, v;
};

/* Where the positions are not one after another: the pair's waves token by token. */
static void listed_waves(const struct head *h, int64_t i, int pair, float *c, float *s) {
    const int32_t *list = (const int32_t *)(const void *)(h->block_head + 1) + i * FKV_TILE;
    for (int t = 0; t < FKV_TILE; t++) {
        double cosine, sine;
        fkv_waves_angle(h->profile->waves, pair, list[t], 0.0, &cosine, &sine);
        c[t] = (float)cosine;
        s[t] = (float)sine;
    }
}

/* waves: 128 floats of scratch */
static struct carried carried_key(const struct head *h, int64_t i, int64_t in_group, int d,
                                  float *waves) {
    const struct fkv_waves *w = h->profile->waves;
    const bool rotated = w && h->profile->codec.domain == FKV_DOMAIN_ROTATED;
    const int pair = rotated ? w->pair_of[d] : -1;
    struct carried k = {zeros, zeros, 0.0f, 0.0f};
    if (!h->residuals->carried)
        return k;
    if (pair < 0) {
        for (int t = 0; t < FKV_TILE; t++)
            waves[t] = 1.0f;
        return (struct carried){waves, zeros, h->carrier[d], 0.0f};
    }
    float a = h->carrier[w->first[pair]], b = h->carrier[w->second[pair]];
    const float *c = h->c[in_group];
    if (c) {
        const float turn_c = c[pair], turn_s = c[w->half + pair], turned = a * turn_c - b * turn_s;
        b = b * turn_c + a * turn_s;
        a = turned;
        k.c = w->cos + pair * FKV_TILE;
        k.s = w->sin + pair * FKV_TILE;
    } else {
        listed_waves(h, i, pair, waves, waves + FKV_TILE);
        k.c = waves;
        k.s = waves + FKV_TILE;
    }
    k.u = d == w->first[pair] ? a : b;
    k.v = d == w->first[pair] ? -b : a;
    return k;
}

/* Turns of the group's tiles, from the plan's table where it has them. */
static void find_turns(struct head *h, int64_t first, int64_t tiles) {
    const struct fkv_waves *w = h->profile->waves;
    if (!w || h->profile->codec.domain != FKV_DOMAIN_ROTATED || !h->residuals->carried)
        return;
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t position = h->block_head->first + (first + i) * FKV_TILE;
        h->c[i] = h->block_head->listed
                      ? NULL
                      : fkv_turn_at(h->plan, h->tile + first + i, position, h->turn[i]);
    }
}

static void load_keys(struct head *h, int64_t first, int64_t tiles) {
    const enum fkv_store store = fkv_store_of(h->profile->storage_dtype);
    const uint8_t *list = h->residuals->list + h->residuals->count[FKV_WIDTH_EXACT];
    find_turns(h, first, tiles);
    for (int n = 0; n < h->residuals->quantised; n++)
        for (int64_t i = 0; i < tiles; i++) {
            float waves[2 * FKV_TILE];
            const struct carried k = carried_key(h, first + i, i, list[n], waves);
            h->kernels->uncarry[store](h->x + (n * tiles + i) * FKV_TILE,
                                       exact_tile(h, first + i, (size_t)list[n] * FKV_TILE), k.c,
                                       k.s, k.u, k.v);
        }
}

static void load_values(const struct head *h, int64_t first, int64_t tiles) {
    const enum fkv_store store = fkv_store_of(h->profile->storage_dtype);
    for (int64_t i = 0; i < tiles; i++)
        h->kernels->gather[store](h->x + i * FKV_TILE * h->row, h->row, exact_tile(h, first + i, 0),
                                  h->profile->model.head_dim,
                                  h->residuals->list + h->residuals->count[FKV_WIDTH_EXACT],
                                  h->residuals->quantised, h->carrier);
}

/* ---- one group */

static void code_group(struct head *h, int64_t group) {
    const int64_t tiles = h->profile->codec.group / FKV_TILE, first = group * tiles;
    const struct fkv_residuals *r = h->residuals;
    const bool keys = h->part == FKV_PART_K;
    const fkv_code_fn code = keys ? h->kernels->code_keys : h->kernels->code_values;
    char *to = h->block + h->to + (size_t)first * h->tile_bytes;
    uint16_t *scale = (uint16_t *)(void *)(h->block + h->scales) + group * 2 * r->quantised;
    uint16_t *zero = scale + r->quantised;
    const float *x = h->x;
    for (int64_t i = 0; i < tiles; i++)
        copy_exact(h, first + i, to + (size_t)i * h->tile_bytes);
    if (keys)
        load_keys(h, first, tiles);
    else
        load_values(h, first, tiles);
    to += fkv_exact_tile_bytes(h->profile, r);
    for (enum fkv_width w = FKV_WIDTH_8; w < FKV_WIDTH_0; w++) {
        const int n = r->count[w], bits = fkv_width_bits(w);
        if (!n)
            continue;
        code(to, (ptrdiff_t)h->tile_bytes, scale, zero, x, keys ? tiles * FKV_TILE : h->row, bits,
             n, (int)tiles);
        to += 8 * bits * n;
        scale += n;
        zero += n;
        x += keys ? n * tiles * FKV_TILE : n;
    }
}

static int64_t row_floats(const struct fkv_profile_object *p) {
    return (p->model.head_dim + 15) / 16 * 16;
}

int64_t fkv_block_scratch(const struct fkv_profile_object *p) {
    return p->codec.group * row_floats(p) + MAX_GROUP_TILES * 2 * FKV_MAX_PAIRS + 64;
}

static void code_item(void *arg, int64_t item, int thread) {
    const struct block_job *job = arg;
    const struct fkv_cache_object *cache = job->plan->cache;
    const struct fkv_profile_object *p = cache->profile;
    const struct fkv_layer_layout *layout = &cache->layouts[job->layer_index];
    const int64_t tiles = fkv_tiles_per_block(p), parts = 2 * (int64_t)p->model.n_kv_heads;
    const int64_t tile = job->layer->n_coded + item / parts * tiles;
    const int kv_head = (int)(item % parts / 2);
    const fkv_part part = (fkv_part)(item % 2);
    float *floats = job->plan->work.scratches + thread * job->plan->work.scratch;
    struct head h = {
        .plan = job->plan,
        .profile = p,
        .kernels = job->plan->ctx->kernels,
        .residuals = fkv_profile_residuals(p, job->layer_index, part, kv_head),
        .carrier = fkv_profile_carrier(p, job->layer_index, part, kv_head),
        .part = part,
        .pages = job->layer->tiles + tile,
        .tile = tile,
        .block = job->room->kept[tile - job->layer->n_coded],
        .from = fkv_exact_offset(p, kv_head, part),
        .to = layout->heads[kv_head].tiles[part],
        .tile_bytes = layout->heads[kv_head].tile_bytes[part],
        .scales = layout->heads[kv_head].scales[part],
        .x = floats + MAX_GROUP_TILES * 2 * FKV_MAX_PAIRS,
        .turn = {floats, floats + 2 * FKV_MAX_PAIRS},
        .row = (int)row_floats(p),
    };
    h.block_head = fkv_block_head(&layout->block, h.block);
    for (int64_t g = 0; g < p->codec.block / p->codec.group; g++)
        code_group(&h, g);
    if (part == FKV_PART_K && layout->heads[kv_head].index)
        fkv_index_make(p, h.kernels, h.block + h.to, h.tile_bytes, h.x,
                       h.block + layout->heads[kv_head].index);
}

void fkv_code_blocks(struct fkv_plan_object *plan, const struct fkv_row *row, int layer,
                     const struct fkv_coding_room *room) {
    const struct fkv_profile_object *p = plan->cache->profile;
    struct block_job job = {plan, &row->seq->layers[layer], layer, room};
    const int64_t blocks = (room->until - job.layer->n_coded) / fkv_tiles_per_block(p);
    fkv_pool_run(plan->ctx->pool, blocks * 2 * p->model.n_kv_heads, code_item, &job);
}
