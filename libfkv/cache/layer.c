/* SPDX-License-Identifier: Apache-2.0 */
#include "cache/cache.h"

#include <string.h>

/* Bytes of a segment's page before its tables. */
#define SEGMENT_HEAD 64
_Static_assert(sizeof(struct fkv_segment) <= SEGMENT_HEAD, "the head of a segment");

static size_t element_size(fkv_dtype dtype) {
    return dtype == FKV_DTYPE_F32 ? 4 : 2;
}

static size_t page_bytes(const struct fkv_profile_object *profile, bool sinks) {
    const size_t elements = fkv_page_offset(profile, sinks, profile->model.n_kv_heads, FKV_PART_K);
    const size_t positions =
        profile->coding == FKV_CODING_CALIBRATED ? (size_t)fkv_page_room(profile, sinks) : 0;
    return elements * element_size(profile->storage_dtype) + positions * sizeof(int32_t) + FKV_PAD;
}

size_t fkv_exact_page_bytes(const struct fkv_profile_object *profile) {
    return page_bytes(profile, false);
}

size_t fkv_sink_page_bytes(const struct fkv_profile_object *profile) {
    return page_bytes(profile, true);
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
        .tables =
            SEGMENT_HEAD + row * sizeof(float) + rows * sizeof(struct fkv_channel_state) + FKV_PAD,
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
    if (profile->coding == FKV_CODING_CALIBRATED) {
        int64_t blocks = (tokens - fkv_sinks(profile) - profile->codec.n_local) /
                         (int64_t)profile->codec.block; /* a negative one is none */
        return fkv_max64(blocks, 0) * fkv_tiles_per_block(profile);
    }
    if (profile->coding != FKV_CODING_FOURIER)
        return 0;
    int64_t middle = tokens - fkv_sinks(profile) - profile->fourier.n_local;
    return middle < fkv_max64(profile->fourier.min_middle, 1) ? 0 : middle / FKV_TILE;
}

/* ---- exact pages */

static void drop_exact(struct fkv_cache_object *cache, struct fkv_seq *seq, void *page) {
    fkv_page_drop(cache, seq, FKV_CLASS_EXACT, page, fkv_exact_page_bytes(cache->profile));
}

static void drop_sink(struct fkv_cache_object *cache, struct fkv_seq *seq, void *page) {
    fkv_page_drop(cache, seq, FKV_CLASS_EXACT, page, fkv_sink_page_bytes(cache->profile));
}

/* Drops the tiles from `first` on, which are exact. */
static void drop_tiles(struct fkv_cache_object *cache, struct fkv_seq *seq, struct fkv_layer *l,
                       int64_t first) {
    for (int64_t i = first; i < l->n_tiles; i++)
        drop_exact(cache, seq, l->tiles[i]);
    l->n_tiles = fkv_min64(l->n_tiles, first);
}

static bool grow_table(struct fkv_cache_object *cache, struct fkv_seq *seq, struct fkv_layer *l,
                       int64_t slots) {
    if (slots <= l->tile_slots)
        return true;
    void **table = fkv_cache_alloc(cache, seq, FKV_CLASS_TABLES, (size_t)slots * sizeof *l->tiles);
    if (!table)
        return false;
    if (l->n_tiles)
        memcpy(table, l->tiles, (size_t)l->n_tiles * sizeof *l->tiles);
    l->old_tiles = l->tiles;
    l->old_slots = l->tile_slots;
    l->tiles = table;
    l->tile_slots = slots;
    return true;
}

/* Makes the page that the next token goes to, if it is there already, this sequence's own. */
static bool own_last_page(struct fkv_cache_object *cache, struct fkv_seq *seq,
                          struct fkv_layer *l) {
    const int64_t body = l->tokens - fkv_sinks(cache->profile);
    const size_t bytes = page_bytes(cache->profile, body < 0);
    void **place = body < 0 ? &l->sink : NULL;
    if (body > 0 && body % FKV_TILE)
        place = &l->tiles[body / FKV_TILE];
    if (!place || !fkv_page_shared(*place, bytes))
        return true;
    void *copy = fkv_page_copy(cache, seq, FKV_CLASS_EXACT, *place, bytes);
    if (!copy)
        return false;
    l->old_place = place;
    l->old_page = *place;
    *place = copy;
    return true;
}

fkv_status fkv_layer_grow(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                          int64_t n_new) {
    struct fkv_layer *l = &seq->layers[layer];
    const int64_t tiles = fkv_body_tiles(cache->profile, l->tokens + n_new);
    const size_t bytes = fkv_exact_page_bytes(cache->profile);
    l->old_tiles = NULL;
    l->old_slots = -1;
    l->old_page = NULL;
    l->old_place = NULL;
    if (!n_new)
        return FKV_OK;
    bool room = grow_table(cache, seq, l, fkv_slots_for(tiles)) && own_last_page(cache, seq, l);
    if (room && fkv_sinks(cache->profile) && !l->sink) {
        l->sink = fkv_page_new(cache, seq, FKV_CLASS_EXACT, fkv_sink_page_bytes(cache->profile));
        room = l->sink;
    }
    while (room && l->n_tiles < tiles) {
        void *page = fkv_page_new(cache, seq, FKV_CLASS_EXACT, bytes);
        room = page;
        if (page)
            l->tiles[l->n_tiles++] = page;
    }
    if (room)
        return FKV_OK;
    fkv_status status = fkv_cache_refused(cache);
    fkv_layer_grown(cache, seq, layer, false);
    return status;
}

/* Undoes what fkv_layer_grow() did, but for the old table, which fkv_layer_grown() frees or takes back. */
static void shrink(struct fkv_cache_object *cache, struct fkv_seq *seq, struct fkv_layer *l) {
    drop_tiles(cache, seq, l, fkv_body_tiles(cache->profile, l->tokens));
    if (!l->tokens) {
        drop_sink(cache, seq, l->sink);
        l->sink = NULL;
    }
    if (l->old_page) {
        void *copy = *l->old_place;
        *l->old_place = l->old_page;
        l->old_page = copy;
    }
    if (l->old_slots >= 0) {
        void **table = l->tiles;
        int64_t slots = l->tile_slots;
        l->tiles = l->old_tiles;
        l->tile_slots = l->old_slots;
        l->old_tiles = table;
        l->old_slots = slots;
    }
}

void fkv_layer_grown(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer, bool keep) {
    struct fkv_layer *l = &seq->layers[layer];
    if (!keep)
        shrink(cache, seq, l);
    if (l->old_place == &l->sink)
        drop_sink(cache, seq, l->old_page);
    else
        drop_exact(cache, seq, l->old_page);
    if (l->old_slots >= 0)
        fkv_cache_free(cache, seq, FKV_CLASS_TABLES, l->old_tiles,
                       (size_t)l->old_slots * sizeof *l->tiles);
    l->old_tiles = NULL;
    l->old_slots = -1;
    l->old_page = NULL;
    l->old_place = NULL;
}

/* ---- coding */

static struct fkv_segment_bytes segment_size(const struct fkv_cache_object *cache,
                                             const struct fkv_seq *seq, int layer) {
    return fkv_segment_size(cache->profile, layer, seq->shared->spectrum->stride);
}

static void drop_segment(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                         struct fkv_segment *s) {
    if (!s)
        return;
    struct fkv_segment_bytes size = segment_size(cache, seq, layer);
    fkv_page_drop(cache, seq, FKV_CLASS_COEFFICIENTS, s->coefficients, size.coefficients);
    fkv_page_drop(cache, seq, FKV_CLASS_TABLES, s, size.tables);
}

static void *new_page(struct fkv_cache_object *cache, struct fkv_seq *seq, enum fkv_class class,
                      const void *from, size_t bytes) {
    return from ? fkv_page_copy(cache, seq, class, from, bytes)
                : fkv_page_new(cache, seq, class, bytes);
}

/* A new segment: empty, or a copy of `from`. */
static fkv_status make_segment(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                               const struct fkv_segment *from, struct fkv_segment **out) {
    struct fkv_segment_bytes size = segment_size(cache, seq, layer);
    struct fkv_segment *s = new_page(cache, seq, FKV_CLASS_TABLES, from, size.tables);
    *out = s;
    if (!s)
        return fkv_cache_refused(cache);
    s->ones = (float *)(void *)((char *)s + SEGMENT_HEAD);
    s->channels = (struct fkv_channel_state *)(void *)(s->ones + seq->shared->spectrum->stride);
    s->coefficients = NULL;
    if (!size.coefficients)
        return FKV_OK;
    s->coefficients = new_page(cache, seq, FKV_CLASS_COEFFICIENTS, from ? from->coefficients : NULL,
                               size.coefficients);
    if (s->coefficients)
        return FKV_OK;
    fkv_status status = fkv_cache_refused(cache);
    drop_segment(cache, seq, layer, s);
    *out = NULL;
    return status;
}

/* The segment that coding would go on in, if others hold it too, else NULL. */
static struct fkv_segment *shared_open_segment(const struct fkv_cache_object *cache,
                                               const struct fkv_seq *seq, int layer) {
    const struct fkv_layer *l = &seq->layers[layer];
    const int64_t per_segment = fkv_tiles_per_segment(seq->period);
    if (l->n_coded % per_segment == 0)
        return NULL;
    struct fkv_segment *open = l->segments[l->n_coded / per_segment];
    return fkv_page_shared(open, segment_size(cache, seq, layer).tables) ? open : NULL;
}

static fkv_status reserve_segments(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                                   struct fkv_coding_room *room) {
    struct fkv_layer *l = &seq->layers[layer];
    int64_t needed = fkv_ceil_div(room->until, fkv_tiles_per_segment(seq->period));
    const struct fkv_segment *open = shared_open_segment(cache, seq, layer);
    fkv_status status = FKV_OK;
    room->n_segments = l->n_segments;
    if (open)
        status = make_segment(cache, seq, layer, open, &room->open);
    if (status != FKV_OK || needed <= l->n_segments)
        return status;
    room->segment_slots = needed;
    room->segments =
        fkv_cache_alloc(cache, seq, FKV_CLASS_TABLES, (size_t)needed * sizeof *room->segments);
    if (!room->segments)
        return fkv_cache_refused(cache);
    if (l->n_segments)
        memcpy(room->segments, l->segments, (size_t)l->n_segments * sizeof *room->segments);
    while (room->n_segments < needed) {
        status = make_segment(cache, seq, layer, NULL, &room->segments[room->n_segments]);
        if (status != FKV_OK)
            return status;
        room->n_segments++;
    }
    return FKV_OK;
}

/* ---- pages of coded tiles: kept channels, or blocks */

/* Whether tile i has a page, and its bytes. */
static bool has_page(const struct fkv_profile_object *p, int layer, int64_t i) {
    if (p->coding == FKV_CODING_CALIBRATED)
        return i % fkv_tiles_per_block(p) == 0;
    return fkv_kept_page_bytes(p, layer) > 0;
}

static size_t coded_bytes(const struct fkv_cache_object *cache, int layer, const void *page) {
    if (!page)
        return 0;
    if (cache->profile->coding == FKV_CODING_CALIBRATED)
        return fkv_block_bytes(cache->profile, &cache->layouts[layer].block, page);
    return fkv_kept_page_bytes(cache->profile, layer);
}

static void *new_coded(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer, int64_t i,
                       const int32_t *step) {
    if (cache->profile->coding == FKV_CODING_CALIBRATED)
        return fkv_block_new(cache, seq, layer, i, step);
    return fkv_page_new(cache, seq, FKV_CLASS_KEPT, fkv_kept_page_bytes(cache->profile, layer));
}

static void *share_coded(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                         void *page) {
    if (cache->profile->coding == FKV_CODING_CALIBRATED)
        return fkv_block_share(cache, seq, layer, page);
    return fkv_page_share(cache, seq, FKV_CLASS_KEPT, page, coded_bytes(cache, layer, page));
}

static void drop_coded_page(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                            void *page) {
    if (cache->profile->coding == FKV_CODING_CALIBRATED)
        fkv_block_drop(cache, seq, layer, page);
    else
        fkv_page_drop(cache, seq, FKV_CLASS_KEPT, page, coded_bytes(cache, layer, page));
}

fkv_status fkv_layer_reserve(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                             int64_t until, const int32_t *step, struct fkv_coding_room *room) {
    struct fkv_layer *l = &seq->layers[layer];
    const int64_t count = until - l->n_coded;
    *room = (struct fkv_coding_room){.until = until, .n_segments = l->n_segments};
    if (count <= 0)
        return FKV_OK;
    fkv_status status = FKV_OK;
    if (cache->profile->coding == FKV_CODING_FOURIER)
        status = reserve_segments(cache, seq, layer, room);
    if (status == FKV_OK) {
        room->kept =
            fkv_cache_alloc(cache, seq, FKV_CLASS_TABLES, (size_t)count * sizeof *room->kept);
        room->kept_count = room->kept ? count : 0;
        if (!room->kept)
            status = fkv_cache_refused(cache);
    }
    for (int64_t i = 0; status == FKV_OK && i < count; i++) {
        if (!has_page(cache->profile, layer, l->n_coded + i))
            continue;
        room->kept[i] = new_coded(cache, seq, layer, l->n_coded + i, step);
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
        drop_coded_page(cache, seq, layer, room->kept[i]);
    free_kept_table(cache, seq, room);
    drop_segment(cache, seq, layer, room->open);
    room->open = NULL;
    if (!room->segments)
        return;
    for (int64_t i = l->n_segments; i < room->n_segments; i++)
        drop_segment(cache, seq, layer, room->segments[i]);
    fkv_cache_free(cache, seq, FKV_CLASS_TABLES, room->segments,
                   (size_t)room->segment_slots * sizeof *room->segments);
    room->segments = NULL;
}

static void free_segment_table(struct fkv_cache_object *cache, struct fkv_seq *seq,
                               struct fkv_layer *l) {
    fkv_cache_free(cache, seq, FKV_CLASS_TABLES, l->segments,
                   (size_t)l->segment_slots * sizeof *l->segments);
}

void fkv_layer_open_segments(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                             struct fkv_coding_room *room) {
    struct fkv_layer *l = &seq->layers[layer];
    if (room->segments) {
        free_segment_table(cache, seq, l);
        l->segments = room->segments;
        l->n_segments = room->n_segments;
        l->segment_slots = room->segment_slots;
        room->segments = NULL;
    }
    if (room->open) {
        struct fkv_segment **open = &l->segments[l->n_coded / fkv_tiles_per_segment(seq->period)];
        drop_segment(cache, seq, layer, *open);
        *open = room->open;
        room->open = NULL;
    }
}

void fkv_layer_seal(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                    struct fkv_coding_room *room) {
    struct fkv_layer *l = &seq->layers[layer];
    for (int64_t i = 0; i < room->kept_count; i++) {
        void **tile = &l->tiles[l->n_coded + i];
        drop_exact(cache, seq, *tile);
        *tile = room->kept[i];
        if (*tile && cache->profile->coding == FKV_CODING_CALIBRATED)
            fkv_layer_note_block(cache, l, layer, l->n_coded + i, *tile);
    }
    l->n_coded += room->kept_count;
    free_kept_table(cache, seq, room);
}

/* ---- forks and crops */

/* Drops coded tiles from `first` on and the segments behind them; no exact tile is left. */
static void drop_coded(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                       int64_t first) {
    struct fkv_layer *l = &seq->layers[layer];
    if (first >= l->n_coded)
        return;
    const int64_t segments = fkv_ceil_div(first, fkv_tiles_per_segment(seq->period));
    for (int64_t i = first; i < l->n_coded; i++)
        drop_coded_page(cache, seq, layer, l->tiles[i]);
    for (int64_t i = segments; i < l->n_segments; i++)
        drop_segment(cache, seq, layer, l->segments[i]);
    l->n_coded = l->n_tiles = first;
    l->n_segments = fkv_min64(l->n_segments, segments);
}

void fkv_layer_crop(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                    int64_t tokens) {
    struct fkv_layer *l = &seq->layers[layer];
    const int64_t tiles = fkv_body_tiles(cache->profile, tokens);
    if (!tokens) {
        fkv_layer_free(cache, seq, layer);
        return;
    }
    drop_tiles(cache, seq, l, fkv_max64(tiles, l->n_coded));
    drop_coded(cache, seq, layer, tiles);
    l->tokens = tokens;
}

void fkv_layer_free(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer) {
    struct fkv_layer *l = &seq->layers[layer];
    drop_tiles(cache, seq, l, l->n_coded);
    drop_coded(cache, seq, layer, 0);
    free_segment_table(cache, seq, l);
    fkv_cache_free(cache, seq, FKV_CLASS_TABLES, l->tiles,
                   (size_t)l->tile_slots * sizeof *l->tiles);
    drop_sink(cache, seq, l->sink);
    *l = (struct fkv_layer){0};
}

static fkv_status make_tables(struct fkv_cache_object *cache, struct fkv_seq *seq,
                              struct fkv_layer *l, int64_t slots, int64_t segments) {
    if (slots) {
        l->tiles = fkv_cache_alloc(cache, seq, FKV_CLASS_TABLES, (size_t)slots * sizeof *l->tiles);
        if (!l->tiles)
            return fkv_cache_refused(cache);
        l->tile_slots = slots;
    }
    if (segments) {
        l->segments =
            fkv_cache_alloc(cache, seq, FKV_CLASS_TABLES, (size_t)segments * sizeof *l->segments);
        if (!l->segments)
            return fkv_cache_refused(cache);
        l->segment_slots = segments;
    }
    return FKV_OK;
}

static struct fkv_segment *share_segment(struct fkv_cache_object *cache, struct fkv_seq *seq,
                                         int layer, struct fkv_segment *s) {
    struct fkv_segment_bytes size = segment_size(cache, seq, layer);
    fkv_page_share(cache, seq, FKV_CLASS_COEFFICIENTS, s->coefficients, size.coefficients);
    return fkv_page_share(cache, seq, FKV_CLASS_TABLES, s, size.tables);
}

fkv_status fkv_layer_fork(struct fkv_cache_object *cache, const struct fkv_seq *parent,
                          struct fkv_seq *child, int layer) {
    const struct fkv_layer *from = &parent->layers[layer];
    struct fkv_layer *l = &child->layers[layer];
    fkv_status status =
        make_tables(cache, child, l, fkv_slots_for(from->n_tiles), from->n_segments);
    if (status != FKV_OK)
        return status;
    const size_t exact = fkv_exact_page_bytes(cache->profile);
    for (int64_t i = 0; i < from->n_tiles; i++)
        l->tiles[i] = i < from->n_coded
                          ? share_coded(cache, child, layer, from->tiles[i])
                          : fkv_page_share(cache, child, FKV_CLASS_EXACT, from->tiles[i], exact);
    for (int64_t i = 0; i < from->n_segments; i++)
        l->segments[i] = share_segment(cache, child, layer, from->segments[i]);
    l->sink = fkv_page_share(cache, child, FKV_CLASS_EXACT, from->sink,
                             fkv_sink_page_bytes(cache->profile));
    l->tokens = from->tokens;
    l->n_coded = from->n_coded;
    l->n_tiles = from->n_tiles;
    l->n_segments = from->n_segments;
    l->shift = from->shift;
    l->uneven = from->uneven;
    return FKV_OK;
}

uint64_t fkv_layer_shared_bytes(const struct fkv_cache_object *cache, const struct fkv_seq *seq,
                                int layer) {
    const struct fkv_layer *l = &seq->layers[layer];
    const size_t exact = fkv_exact_page_bytes(cache->profile);
    const size_t sink = fkv_sink_page_bytes(cache->profile);
    uint64_t bytes = fkv_page_shared(l->sink, sink) ? sink : 0;
    for (int64_t i = 0; i < l->n_tiles; i++) {
        const size_t size = i < l->n_coded ? coded_bytes(cache, layer, l->tiles[i]) : exact;
        bytes += fkv_page_shared(l->tiles[i], size) ? size : 0;
    }
    for (int64_t i = 0; i < l->n_segments; i++) {
        const struct fkv_segment_bytes size = segment_size(cache, seq, layer);
        if (fkv_page_shared(l->segments[i], size.tables))
            bytes += size.tables + size.coefficients;
    }
    return bytes;
}
