/* SPDX-License-Identifier: Apache-2.0 */
#include "cache/cache.h"

#include <string.h>

static size_t element_size(fkv_dtype dtype) {
    return dtype == FKV_DTYPE_F32 ? 4 : 2;
}

size_t fkv_exact_page_bytes(const struct fkv_profile_object *profile) {
    const struct fkv_model *m = &profile->model;
    return (size_t)m->n_kv_heads * 2 * (size_t)m->head_dim * FKV_TILE *
               element_size(profile->storage_dtype) +
           FKV_PAD;
}

static size_t layer_channels(const struct fkv_profile_object *profile, int layer, bool coded) {
    size_t n = 0;
    for (int h = 0; h < profile->model.n_kv_heads; h++)
        for (int part = 0; part < 2; part++) {
            const struct fkv_channels *c = fkv_profile_head(profile, layer, part, h);
            n += (size_t)(coded ? c->coded : c->kept);
        }
    return n;
}

size_t fkv_kept_page_bytes(const struct fkv_profile_object *profile, int layer) {
    size_t n = layer_channels(profile, layer, false);
    return n ? n * FKV_TILE * element_size(profile->storage_dtype) + FKV_PAD : 0;
}

struct fkv_segment_bytes fkv_segment_size(const struct fkv_profile_object *profile, int layer,
                                          int stride) {
    size_t rows = layer_channels(profile, layer, true), row = (size_t)stride;
    size_t element = element_size(profile->fourier.coefficient_dtype);
    struct fkv_segment_bytes size = {
        .coefficients = rows ? rows * row * element + FKV_PAD : 0,
        .tables = row * sizeof(float) + rows * sizeof(struct fkv_channel_state),
    };
    return size;
}

int64_t fkv_slots_for(int64_t count) {
    int64_t slots = 16;
    if (!count)
        return 0;
    while (slots < count)
        slots *= 2;
    return slots;
}

int64_t fkv_body_tiles(const struct fkv_profile_object *profile, int64_t tokens) {
    int64_t body = tokens - fkv_sinks(profile);
    return body > 0 ? fkv_ceil_div(body, FKV_TILE) : 0;
}

int64_t fkv_tiles_to_code(const struct fkv_profile_object *profile, int64_t tokens) {
    if (profile->coding != FKV_CODING_FOURIER)
        return 0;
    int64_t middle = tokens - fkv_sinks(profile) - profile->fourier.n_local;
    return middle < fkv_max64(profile->fourier.min_middle, 1) ? 0 : middle / FKV_TILE;
}

/* ---- exact pages */

static void drop_pages(struct fkv_cache_object *cache, struct fkv_seq *seq, struct fkv_layer *l,
                       int64_t first) {
    size_t bytes = fkv_exact_page_bytes(cache->profile);
    for (int64_t i = first; i < l->n_tiles; i++)
        fkv_cache_free(cache, seq, FKV_CLASS_EXACT, l->tiles[i], bytes);
    l->n_tiles = fkv_min64(l->n_tiles, first);
}

fkv_status fkv_layer_grow(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                          int64_t n_new) {
    struct fkv_layer *l = &seq->layers[layer];
    const int64_t tiles = fkv_body_tiles(cache->profile, l->tokens + n_new);
    const int64_t slots = fkv_slots_for(tiles);
    const size_t bytes = fkv_exact_page_bytes(cache->profile);
    l->old_tiles = NULL;
    l->old_slots = -1;
    if (!n_new)
        return FKV_OK;
    if (fkv_sinks(cache->profile) && !l->sink) {
        l->sink = fkv_cache_alloc(cache, seq, FKV_CLASS_EXACT, bytes);
        if (!l->sink)
            return fkv_cache_refused(cache);
    }
    if (slots > l->tile_slots) {
        void **table =
            fkv_cache_alloc(cache, seq, FKV_CLASS_TABLES, (size_t)slots * sizeof *l->tiles);
        if (!table)
            goto refused;
        if (l->n_tiles)
            memcpy(table, l->tiles, (size_t)l->n_tiles * sizeof *l->tiles);
        l->old_tiles = l->tiles;
        l->old_slots = l->tile_slots;
        l->tiles = table;
        l->tile_slots = slots;
    }
    while (l->n_tiles < tiles) {
        void *page = fkv_cache_alloc(cache, seq, FKV_CLASS_EXACT, bytes);
        if (!page)
            goto refused;
        l->tiles[l->n_tiles++] = page;
    }
    return FKV_OK;
refused:;
    fkv_status status = fkv_cache_refused(cache);
    fkv_layer_grown(cache, seq, layer, false);
    return status;
}

void fkv_layer_grown(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer, bool keep) {
    struct fkv_layer *l = &seq->layers[layer];
    const bool replaced = l->old_slots >= 0;
    if (!keep) {
        drop_pages(cache, seq, l, fkv_body_tiles(cache->profile, l->tokens));
        if (!l->tokens && l->sink) {
            fkv_cache_free(cache, seq, FKV_CLASS_EXACT, l->sink,
                           fkv_exact_page_bytes(cache->profile));
            l->sink = NULL;
        }
        if (replaced) {
            void **table = l->tiles;
            int64_t slots = l->tile_slots;
            l->tiles = l->old_tiles;
            l->tile_slots = l->old_slots;
            l->old_tiles = table;
            l->old_slots = slots;
        }
    }
    if (replaced)
        fkv_cache_free(cache, seq, FKV_CLASS_TABLES, l->old_tiles,
                       (size_t)l->old_slots * sizeof *l->tiles);
    l->old_tiles = NULL;
    l->old_slots = -1;
}

/* ---- coding */

static void free_segment(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                         struct fkv_segment *s) {
    struct fkv_segment_bytes size =
        fkv_segment_size(cache->profile, layer, seq->shared->spectrum->stride);
    fkv_cache_free(cache, seq, FKV_CLASS_COEFFICIENTS, s->coefficients, size.coefficients);
    fkv_cache_free(cache, seq, FKV_CLASS_TABLES, s->ones, size.tables);
}

static fkv_status new_segment(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                              struct fkv_segment *s) {
    const int stride = seq->shared->spectrum->stride;
    struct fkv_segment_bytes size = fkv_segment_size(cache->profile, layer, stride);
    *s = (struct fkv_segment){0};
    s->ones = fkv_cache_alloc(cache, seq, FKV_CLASS_TABLES, size.tables);
    if (!s->ones)
        return fkv_cache_refused(cache);
    s->channels = (struct fkv_channel_state *)(void *)(s->ones + stride);
    if (!size.coefficients)
        return FKV_OK;
    s->coefficients = fkv_cache_alloc(cache, seq, FKV_CLASS_COEFFICIENTS, size.coefficients);
    if (s->coefficients)
        return FKV_OK;
    fkv_status status = fkv_cache_refused(cache);
    free_segment(cache, seq, layer, s);
    return status;
}

static fkv_status reserve_segments(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                                   struct fkv_coding_room *room) {
    struct fkv_layer *l = &seq->layers[layer];
    int64_t needed = fkv_ceil_div(room->until, fkv_tiles_per_segment(seq->period));
    room->n_segments = l->n_segments;
    if (needed <= l->n_segments)
        return FKV_OK;
    room->segment_slots = needed;
    room->segments =
        fkv_cache_alloc(cache, seq, FKV_CLASS_TABLES, (size_t)needed * sizeof *room->segments);
    if (!room->segments)
        return fkv_cache_refused(cache);
    if (l->n_segments)
        memcpy(room->segments, l->segments, (size_t)l->n_segments * sizeof *room->segments);
    while (room->n_segments < needed) {
        fkv_status status = new_segment(cache, seq, layer, &room->segments[room->n_segments]);
        if (status != FKV_OK)
            return status;
        room->n_segments++;
    }
    return FKV_OK;
}

fkv_status fkv_layer_reserve(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                             int64_t until, struct fkv_coding_room *room) {
    struct fkv_layer *l = &seq->layers[layer];
    const int64_t count = until - l->n_coded;
    *room = (struct fkv_coding_room){.until = until, .n_segments = l->n_segments};
    if (count <= 0)
        return FKV_OK;
    const size_t bytes = fkv_kept_page_bytes(cache->profile, layer);
    fkv_status status = reserve_segments(cache, seq, layer, room);
    if (status == FKV_OK) {
        room->kept =
            fkv_cache_alloc(cache, seq, FKV_CLASS_TABLES, (size_t)count * sizeof *room->kept);
        room->kept_count = room->kept ? count : 0;
        if (!room->kept)
            status = fkv_cache_refused(cache);
    }
    for (int64_t i = 0; status == FKV_OK && bytes && i < count; i++) {
        room->kept[i] = fkv_cache_alloc(cache, seq, FKV_CLASS_KEPT, bytes);
        if (!room->kept[i])
            status = fkv_cache_refused(cache);
    }
    if (status != FKV_OK)
        fkv_layer_unreserve(cache, seq, layer, room);
    return status;
}

static void free_kept_table(struct fkv_cache_object *cache, struct fkv_seq *seq,
                            struct fkv_coding_room *room) {
    fkv_cache_free(cache, seq, FKV_CLASS_TABLES, room->kept,
                   (size_t)room->kept_count * sizeof *room->kept);
    room->kept = NULL;
    room->kept_count = 0;
}

void fkv_layer_unreserve(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                         struct fkv_coding_room *room) {
    struct fkv_layer *l = &seq->layers[layer];
    for (int64_t i = 0; i < room->kept_count; i++)
        fkv_cache_free(cache, seq, FKV_CLASS_KEPT, room->kept[i],
                       fkv_kept_page_bytes(cache->profile, layer));
    free_kept_table(cache, seq, room);
    if (!room->segments)
        return;
    for (int64_t i = l->n_segments; i < room->n_segments; i++)
        free_segment(cache, seq, layer, &room->segments[i]);
    fkv_cache_free(cache, seq, FKV_CLASS_TABLES, room->segments,
                   (size_t)room->segment_slots * sizeof *room->segments);
    room->segments = NULL;
}

void fkv_layer_open_segments(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                             struct fkv_coding_room *room) {
    struct fkv_layer *l = &seq->layers[layer];
    if (!room->segments)
        return;
    fkv_cache_free(cache, seq, FKV_CLASS_TABLES, l->segments,
                   (size_t)l->segment_slots * sizeof *l->segments);
    l->segments = room->segments;
    l->n_segments = room->n_segments;
    l->segment_slots = room->segment_slots;
    room->segments = NULL;
}

void fkv_layer_seal(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                    struct fkv_coding_room *room) {
    struct fkv_layer *l = &seq->layers[layer];
    size_t bytes = fkv_exact_page_bytes(cache->profile);
    for (int64_t i = 0; i < room->kept_count; i++) {
        void **tile = &l->tiles[l->n_coded + i];
        fkv_cache_free(cache, seq, FKV_CLASS_EXACT, *tile, bytes);
        *tile = room->kept[i];
    }
    l->n_coded += room->kept_count;
    free_kept_table(cache, seq, room);
}

void fkv_layer_free(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer) {
    struct fkv_layer *l = &seq->layers[layer];
    size_t exact = fkv_exact_page_bytes(cache->profile);
    drop_pages(cache, seq, l, l->n_coded);
    for (int64_t i = 0; i < l->n_coded; i++)
        fkv_cache_free(cache, seq, FKV_CLASS_KEPT, l->tiles[i],
                       fkv_kept_page_bytes(cache->profile, layer));
    for (int64_t i = 0; i < l->n_segments; i++)
        free_segment(cache, seq, layer, &l->segments[i]);
    fkv_cache_free(cache, seq, FKV_CLASS_TABLES, l->segments,
                   (size_t)l->segment_slots * sizeof *l->segments);
    fkv_cache_free(cache, seq, FKV_CLASS_TABLES, l->tiles,
                   (size_t)l->tile_slots * sizeof *l->tiles);
    fkv_cache_free(cache, seq, FKV_CLASS_EXACT, l->sink, exact);
    *l = (struct fkv_layer){0};
}
