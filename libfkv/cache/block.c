/* SPDX-License-Identifier: Apache-2.0 */
/* Sealed blocks of calibrated profiles: their sizes, where things lie in them, whose tokens they hold. */
#include "cache/cache.h"
#include "cache/index.h"

#include <string.h>

static size_t part_bytes(const struct fkv_profile_object *p, const struct fkv_residuals *r) {
    size_t bytes = 0;
    for (enum fkv_width w = FKV_WIDTH_8; w < FKV_WIDTH_0; w++)
        bytes += (size_t)(8 * fkv_width_bits(w)) * r->count[w];
    return bytes + fkv_exact_tile_bytes(p, r);
}

size_t fkv_exact_tile_bytes(const struct fkv_profile_object *p, const struct fkv_residuals *r) {
    return (size_t)r->count[FKV_WIDTH_EXACT] * FKV_TILE *
           (p->storage_dtype == FKV_DTYPE_F32 ? 4 : 2);
}

/* Lays out one layer; heads may be NULL, and are if there is an index. */
static struct fkv_block_size lay_out(const struct fkv_profile_object *p, int layer, bool indexed,
                                     struct fkv_head_layout *heads) {
    const size_t tiles = (size_t)fkv_tiles_per_block(p);
    const size_t groups = (size_t)(p->codec.block / p->codec.group);
    struct fkv_block_size size = {0};
    bool exact = false;
    size_t at = 0;
    for (int h = 0; h < p->model.n_kv_heads; h++) {
        size_t scales[2];
        for (int part = 0; part < 2; part++) {
            const struct fkv_residuals *r = fkv_profile_residuals(p, layer, part, h);
            const size_t tile = part_bytes(p, r);
            if (heads) {
                heads[h].tiles[part] = at;
                heads[h].tile_bytes[part] = tile;
            }
            at += tiles * tile;
            scales[part] = groups * r->quantised * 2 * sizeof(uint16_t);
            exact = exact || r->count[FKV_WIDTH_EXACT];
        }
        for (int part = 0; part < 2; part++) {
            if (heads)
                heads[h].scales[part] = at;
            at += scales[part];
            size.scales += scales[part];
        }
        at = (at + 7) / 8 * 8;
    }
    for (int h = 0; indexed && h < p->model.n_kv_heads; h++) {
        if (fkv_profile_residuals(p, layer, FKV_PART_K, h)->count[FKV_WIDTH_EXACT] <
            p->model.head_dim)
            continue;
        at = (at + 63) / 64 * 64;
        heads[h].index = at;
        at += fkv_index_bytes(p);
        size.index += fkv_index_bytes(p);
    }
    size.head = at;
    /* Kernels for exact channels may read behind their data, those for codes never do. */
    size.bytes = at + sizeof(struct fkv_block_head) + (exact ? FKV_PAD : sizeof(uint64_t));
    return size;
}

struct fkv_block_size fkv_block_size(const struct fkv_profile_object *p, int layer) {
    return lay_out(p, layer, false, NULL);
}

void fkv_block_layout(const struct fkv_profile_object *p, int layer, bool indexed,
                      struct fkv_layer_layout *layout) {
    layout->block = lay_out(p, layer, indexed, layout->heads);
}

size_t fkv_block_bytes(const struct fkv_profile_object *p, const struct fkv_block_size *size,
                       const void *page) {
    const struct fkv_block_head *head = fkv_block_head(size, page);
    return size->bytes + (head->listed ? (size_t)p->codec.block * sizeof(int32_t) : 0);
}

/* ---- pages; the parts of their bytes that scales and indices take are counted apart */

static void count_apart(struct fkv_account *account, const struct fkv_block_size *size) {
    account->bytes[FKV_CLASS_BLOCKS] -= size->scales + size->index;
    account->bytes[FKV_CLASS_SCALES] += size->scales;
    account->bytes[FKV_CLASS_INDEX] += size->index;
}

static void count_together(struct fkv_account *account, const struct fkv_block_size *size) {
    account->bytes[FKV_CLASS_BLOCKS] += size->scales + size->index;
    account->bytes[FKV_CLASS_SCALES] -= size->scales;
    account->bytes[FKV_CLASS_INDEX] -= size->index;
}

/* Position of body token i, which is in an exact page or among those of the step. */
static int32_t position_of(const struct fkv_cache_object *cache, const struct fkv_layer *l,
                           int64_t i, const int32_t *step) {
    const int64_t token = fkv_sinks(cache->profile) + i;
    if (token >= l->tokens)
        return step[token - l->tokens];
    return fkv_page_positions(cache->profile, false, l->tiles[i / FKV_TILE])[i % FKV_TILE];
}

void *fkv_block_new(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer, int64_t tile,
                    const int32_t *step) {
    const struct fkv_profile_object *p = cache->profile;
    const struct fkv_block_size *size = &cache->layouts[layer].block;
    const struct fkv_layer *l = &seq->layers[layer];
    const int64_t first = tile * FKV_TILE, n = p->codec.block;
    bool listed = false;
    for (int64_t i = 1; i < n && !listed; i++)
        listed = (int64_t)position_of(cache, l, first + i, step) !=
                 (int64_t)position_of(cache, l, first, step) + i;
    const size_t bytes = size->bytes + (listed ? (size_t)n * sizeof(int32_t) : 0);
    char *page = fkv_page_new(cache, seq, FKV_CLASS_BLOCKS, bytes);
    if (!page)
        return NULL;
    count_apart(&cache->account, size);
    count_apart(&seq->account, size);
    struct fkv_block_head *head = (struct fkv_block_head *)(void *)(page + size->head);
    head->first = position_of(cache, l, first, step);
    head->listed = listed;
    int32_t *list = (int32_t *)(void *)(head + 1);
    for (int64_t i = 0; listed && i < n; i++)
        list[i] = position_of(cache, l, first + i, step);
    return page;
}

void *fkv_block_share(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer, void *page) {
    const struct fkv_block_size *size = &cache->layouts[layer].block;
    if (!page)
        return NULL;
    fkv_page_share(cache, seq, FKV_CLASS_BLOCKS, page, fkv_block_bytes(cache->profile, size, page));
    count_apart(&seq->account, size);
    return page;
}

void fkv_block_drop(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer, void *page) {
    const struct fkv_block_size *size = &cache->layouts[layer].block;
    if (!page)
        return;
    const size_t bytes = fkv_block_bytes(cache->profile, size, page);
    count_together(&seq->account, size);
    if (!fkv_page_shared(page, bytes))
        count_together(&cache->account, size);
    fkv_page_drop(cache, seq, FKV_CLASS_BLOCKS, page, bytes);
}

void fkv_layer_note_block(const struct fkv_cache_object *cache, struct fkv_layer *l, int layer,
                          int64_t tile, const void *page) {
    const struct fkv_block_head *head = fkv_block_head(&cache->layouts[layer].block, page);
    const int64_t shift = head->first - (fkv_sinks(cache->profile) + tile * FKV_TILE);
    if (!tile) {
        l->shift = shift;
        l->uneven = head->listed;
    }
    l->uneven = l->uneven || head->listed || shift != l->shift;
}
