/* SPDX-License-Identifier: Apache-2.0 */
/* Sequences on the device: their tables, growing, forking and cropping. */
#include "device/device.h"

#include <string.h>

static size_t table_bytes(const struct fkv_cache_object *cache, int64_t slots) {
    return (size_t)cache->profile->model.n_layers * (size_t)slots * sizeof(uint64_t);
}

int64_t fkv_device_tiles_to_code(const struct fkv_profile_object *p, int64_t tokens) {
    if (p->coding == FKV_CODING_FOURIER) {
        return fkv_tiles_to_code(p, tokens);
    }
    if (p->coding != FKV_CODING_CALIBRATED) {
        return 0;
    }
    const int64_t middle = tokens - p->codec.n_sink - p->codec.n_local;
    return middle < p->codec.block ? 0 : middle / p->codec.block * (p->codec.block / FKV_TILE);
}

static int sinks_of(const struct fkv_cache_object *cache) {
    return cache->device->c.sinks;
}

/* Tiles of the body for so many tokens. */
static int64_t body_tiles(const struct fkv_cache_object *cache, int64_t tokens) {
    const int64_t body = tokens - sinks_of(cache);
    return body > 0 ? fkv_ceil_div(body, FKV_TILE) : 0;
}

fkv_status fkv_device_seq_new(struct fkv_cache_object *cache, struct fkv_seq *seq) {
    seq->device = fkv_cache_alloc(cache, seq, FKV_CLASS_TABLES, sizeof *seq->device);
    return seq->device ? FKV_OK : fkv_cache_refused(cache);
}

/* A table of `slots` entries for each layer, with what the old one has. */
static fkv_status grow_table(struct fkv_cache_object *cache, struct fkv_seq *seq, int64_t slots) {
    struct fkv_device_seq *s = seq->device;
    const int layers = cache->profile->model.n_layers;
    const size_t pages = (size_t)layers * (size_t)slots * sizeof *s->pages;
    struct fkv_device_seq next = *s;
    struct fkv_device_buffer table = {0, 0};
    fkv_status status = fkv_device_reserve(cache, &table, table_bytes(cache, slots));
    if (status != FKV_OK) {
        return status;
    }
    next.slots = slots;
    next.table = table.address;
    next.pages = fkv_cache_alloc(cache, seq, FKV_CLASS_TABLES, pages);
    if (!next.pages) {
        status = fkv_cache_refused(cache);
    }
    const int64_t noted = cache->device->n_pending;
    for (int l = 0; status == FKV_OK && l < layers; l++) {
        for (int64_t i = 0; status == FKV_OK && i < s->slots; i++) {
            struct fkv_device_page *page = *fkv_device_entry(s, l, i);
            *fkv_device_entry(&next, l, i) = page;
            if (page) {
                status = fkv_device_patch(
                    cache, next.table + (uint64_t)((int64_t)l * slots + i) * 8, page->address, 0);
            }
        }
    }
    if (status != FKV_OK) {
        cache->device->n_pending = noted;
        fkv_cache_free(cache, seq, FKV_CLASS_TABLES, next.pages, pages);
        fkv_device_release(cache, &table);
        return status;
    }
    next.table_bytes = table.bytes;
    fkv_cache_free(cache, seq, FKV_CLASS_TABLES, s->pages,
                   (size_t)layers * (size_t)s->slots * sizeof *s->pages);
    struct fkv_device_buffer old = {s->table, s->table_bytes};
    if (old.address) {
        /* notes of writes to it would come after the end of its life */
        status = fkv_device_flush(cache);
    }
    fkv_device_release(cache, &old);
    *s = next;
    return status;
}

static fkv_status need_slots(struct fkv_cache_object *cache, struct fkv_seq *seq, int64_t entries) {
    int64_t slots = 64;
    while (slots < entries) {
        slots *= 2;
    }
    return slots > seq->device->slots ? grow_table(cache, seq, slots) : FKV_OK;
}

fkv_status fkv_device_seq_slots(struct fkv_cache_object *cache, struct fkv_seq *seq,
                                int64_t tokens) {
    return need_slots(cache, seq, body_tiles(cache, tokens) + 1);
}

static fkv_status set_entry(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                            int64_t entry, struct fkv_device_page *page, uint64_t zero) {
    struct fkv_device_seq *s = seq->device;
    *fkv_device_entry(s, layer, entry) = page;
    return fkv_device_patch(cache, s->table + (uint64_t)((int64_t)layer * s->slots + entry) * 8,
                            page->address, zero);
}

/* The page that the next token goes to must be the sequence's own. */
static fkv_status own_last(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer) {
    const int64_t tokens = seq->layers[layer].tokens, body = tokens - sinks_of(cache);
    const int64_t entry = body < 0 ? 0 : 1 + body / FKV_TILE;
    if (body >= 0 ? body % FKV_TILE == 0 : !tokens) {
        return FKV_OK;
    }
    struct fkv_device_page *page = *fkv_device_entry(seq->device, layer, entry);
    if (!page || page->holders == 1) {
        return FKV_OK;
    }
    struct fkv_device_page *copy = fkv_device_page_new(cache, seq, 0);
    if (!copy) {
        return fkv_cache_refused(cache);
    }
    struct fkv_ctx *ctx = cache->ctx;
    int error = ctx->cuda->copy(ctx->device, copy->address, page->address,
                                cache->device->pools[0].bytes, ctx->stream);
    fkv_status status = FKV_DEVICE_CHECK(ctx, error, "copying a shared page");
    if (status == FKV_OK) {
        status = set_entry(cache, seq, layer, entry, copy, 0);
    }
    fkv_device_page_drop(cache, seq, status == FKV_OK ? page : copy);
    if (status != FKV_OK) {
        *fkv_device_entry(seq->device, layer, entry) = page;
    }
    return status;
}

fkv_status fkv_device_layer_grow(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                                 int64_t after) {
    const int64_t tiles = body_tiles(cache, after);
    /* In this order: a table that grows sends what is noted before its entries are noted again, so that no
     * entry is written to twice in one launch. */
    fkv_status status = own_last(cache, seq, layer);
    if (status == FKV_OK) {
        status = need_slots(cache, seq, tiles + 1);
    }
    const int64_t coded = seq->layers[layer].n_coded;
    for (int64_t i = sinks_of(cache) && after ? 0 : 1; status == FKV_OK && i <= tiles; i++) {
        if (i && i <= coded) {
            i = coded;
            continue;
        }
        if (*fkv_device_entry(seq->device, layer, i)) {
            continue;
        }
        struct fkv_device_page *page = fkv_device_page_new(cache, seq, 0);
        status = page ? set_entry(cache, seq, layer, i, page, cache->device->pools[0].bytes)
                      : fkv_cache_refused(cache);
        if (status != FKV_OK) {
            fkv_device_page_drop(cache, seq, page);
            if (page) {
                *fkv_device_entry(seq->device, layer, i) = NULL;
            }
        }
    }
    return status;
}

/* Drops all entries from `first` on. */
static void drop_from(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                      int64_t first) {
    struct fkv_device_seq *s = seq->device;
    for (int64_t i = first; i < s->slots; i++) {
        struct fkv_device_page **entry = fkv_device_entry(s, layer, i);
        fkv_device_page_drop(cache, seq, *entry);
        *entry = NULL;
    }
}

void fkv_device_layer_shrink(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer) {
    const struct fkv_layer *l = &seq->layers[layer];
    drop_from(cache, seq, layer,
              l->tokens ? 1 + fkv_max64(l->n_coded, body_tiles(cache, l->tokens)) : 0);
}

void fkv_device_layer_crop(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                           int64_t tokens) {
    struct fkv_layer *l = &seq->layers[layer];
    l->tokens = tokens;
    l->n_coded = fkv_min64(l->n_coded, body_tiles(cache, tokens));
    if (seq->shared) {
        fkv_device_drop_segments(cache, seq, layer, l->n_coded);
    }
    fkv_device_layer_shrink(cache, seq, layer);
}

void fkv_device_seq_free(struct fkv_cache_object *cache, struct fkv_seq *seq) {
    struct fkv_device_seq *s = seq->device;
    const int layers = cache->profile->model.n_layers;
    if (!s) {
        return;
    }
    if (s->segments) {
        (void)fkv_device_flush(cache); /* as below */
    }
    fkv_device_segments_free(cache, seq);
    for (int l = 0; l < layers && s->pages; l++) {
        drop_from(cache, seq, l, 0);
    }
    fkv_cache_free(cache, seq, FKV_CLASS_TABLES, s->pages,
                   (size_t)layers * (size_t)s->slots * sizeof *s->pages);
    struct fkv_device_buffer table = {s->table, s->table_bytes};
    if (table.address) {
        (void)fkv_device_flush(cache); /* what fails here fails again in a call that can say so */
    }
    fkv_device_release(cache, &table);
    fkv_cache_free(cache, seq, FKV_CLASS_TABLES, s, sizeof *s);
    seq->device = NULL;
}

fkv_status fkv_device_seq_fork(struct fkv_cache_object *cache, const struct fkv_seq *parent,
                               struct fkv_seq *child) {
    const struct fkv_device_seq *from = parent->device;
    if (!from->slots) {
        return FKV_OK;
    }
    fkv_status status = grow_table(cache, child, from->slots);
    for (int l = 0; status == FKV_OK && l < cache->profile->model.n_layers; l++) {
        child->layers[l].tokens = parent->layers[l].tokens;
        child->layers[l].n_coded = parent->layers[l].n_coded;
        for (int64_t i = 0; status == FKV_OK && i < from->slots; i++) {
            struct fkv_device_page *page = *fkv_device_entry(from, l, i);
            if (page) {
                status =
                    set_entry(cache, child, l, i, fkv_device_page_share(cache, child, page), 0);
            }
        }
    }
    if (status == FKV_OK) {
        status = fkv_device_segments_fork(cache, from, child);
    }
    return status == FKV_OK ? fkv_device_flush(cache) : status;
}

uint64_t fkv_device_shared_bytes(const struct fkv_cache_object *cache, const struct fkv_seq *seq) {
    const struct fkv_device_seq *s = seq->device;
    uint64_t bytes = fkv_device_shared_segments(cache, s);
    for (int64_t i = 0; i < s->slots * cache->profile->model.n_layers; i++) {
        if (s->pages[i] && s->pages[i]->holders > 1) {
            bytes += cache->device->pools[s->pages[i]->pool].bytes;
        }
    }
    return bytes;
}
