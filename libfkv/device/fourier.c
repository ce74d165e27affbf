/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fourier caches on the device: how channels lie in pages and segments, the tables of segments, and coding. The rules
 * are the CPU's (cache.h): a full segment is never written to again, the one under way is copied by the first of its
 * holders that codes a tile.
 */
#include "device/device.h"

#include <string.h>

static size_t coefficient_size(const struct fkv_profile_object *p) {
    return fkv_dtype_size(p->fourier.coefficient_dtype);
}

/* ---- layout */

/* The heads of all layers; returns the length of the list of channels. `list` may be NULL. */
size_t fkv_device_split(const struct fkv_profile_object *p, struct fkv_device_cache *d,
                        uint16_t *list) {
    const int heads = p->model.n_kv_heads;
    size_t n = 0;
    for (int l = 0; l < p->model.n_layers; l++) {
        int32_t offset = 0, row = 0;
        for (int h = 0; h < heads; h++) {
            struct fkv_cuda_split *s = &d->splits[l * heads + h];
            s->offset = offset;
            s->bytes = 0;
            for (int part = 0; part < 2; part++) {
                const struct fkv_channels *c = fkv_profile_head(p, l, part, h);
                s->kept[part] = c->kept;
                s->coded[part] = c->coded;
                s->eighths[part] = (c->kept + 7) / 8;
                s->list[part] = (int32_t)n;
                s->row[part] = row;
                s->bytes += s->eighths[part] * 8 * FKV_TILE * 2;
                row += c->coded;
                if (list) {
                    memcpy(list + n, c->list, (size_t)p->model.head_dim * sizeof *list);
                }
                n += (size_t)p->model.head_dim;
            }
            offset += s->bytes;
        }
        d->unit_bytes[l] = offset;
        d->coded_rows[l] = row;
    }
    return n;
}

/* Bytes of a layer's segments; those of short periods, which have fewer bins, take as much. */
size_t fkv_device_segment_bytes(const struct fkv_profile_object *p,
                                const struct fkv_device_cache *d, int layer) {
    const size_t rows = (size_t)d->coded_rows[layer];
    const size_t stride = (size_t)fkv_spectrum_stride(INT64_MAX, p->fourier.bins);
    return (rows * stride * coefficient_size(p) + stride * sizeof(float) +
            rows * sizeof(struct fkv_cuda_state) + 255) /
           256 * 256;
}

/* ---- tables of segments */

static int64_t segments_of(const struct fkv_seq *seq, int64_t tiles) {
    return fkv_ceil_div(tiles, fkv_tiles_per_segment(seq->period));
}

static struct fkv_device_page **segment_entry(const struct fkv_device_seq *s, int layer,
                                              int64_t i) {
    return &s->segments[(int64_t)layer * s->segment_slots + i];
}

static fkv_status patch_segment(struct fkv_cache_object *cache, const struct fkv_device_seq *s,
                                int layer, int64_t i, uint64_t address) {
    return fkv_device_patch(
        cache, s->segment_table + (uint64_t)((int64_t)layer * s->segment_slots + i) * 8, address,
        0);
}

static void free_segments(struct fkv_cache_object *cache, struct fkv_seq *seq) {
    struct fkv_device_seq *s = seq->device;
    struct fkv_device_buffer table = {s->segment_table, s->segment_table_bytes};
    fkv_device_release(cache, &table);
    fkv_cache_free(cache, seq, FKV_CLASS_TABLES, s->segments,
                   (size_t)cache->profile->model.n_layers * (size_t)s->segment_slots *
                       sizeof *s->segments);
    s->segments = NULL;
    s->segment_slots = 0;
    s->segment_table = 0;
    s->segment_table_bytes = 0;
}

/* A table of `slots` segments for each layer, with what the old one has. */
static fkv_status grow_segments(struct fkv_cache_object *cache, struct fkv_seq *seq,
                                int64_t slots) {
    struct fkv_device_seq *s = seq->device;
    const int layers = cache->profile->model.n_layers;
    const size_t entries = (size_t)layers * (size_t)slots;
    struct fkv_device_seq next = *s;
    struct fkv_device_buffer table = {0, 0};
    const int64_t noted = cache->device->n_pending;
    fkv_status status = fkv_device_reserve(cache, &table, entries * sizeof(uint64_t));
    if (status != FKV_OK) {
        return status;
    }
    next.segment_slots = slots;
    next.segment_table = table.address;
    next.segment_table_bytes = table.bytes;
    next.segments = fkv_cache_alloc(cache, seq, FKV_CLASS_TABLES, entries * sizeof *next.segments);
    status = next.segments ? FKV_OK : fkv_cache_refused(cache);
    for (int l = 0; l < layers; l++) {
        for (int64_t i = 0; status == FKV_OK && i < s->segment_slots; i++) {
            struct fkv_device_page *page = *segment_entry(s, l, i);
            *segment_entry(&next, l, i) = page;
            if (page) {
                status = patch_segment(cache, &next, l, i, page->address);
            }
        }
    }
    if (status != FKV_OK) {
        cache->device->n_pending = noted;
        fkv_cache_free(cache, seq, FKV_CLASS_TABLES, next.segments,
                       entries * sizeof *next.segments);
        fkv_device_release(cache, &table);
        return status;
    }
    if (s->segment_table) {
        status = fkv_device_flush(cache); /* what is noted of the old one, before it ends */
    }
    free_segments(cache, seq);
    *s = next;
    return status;
}

fkv_status fkv_device_need_segments(struct fkv_cache_object *cache, struct fkv_seq *seq,
                                    int64_t tokens) {
    const int64_t need = segments_of(seq, fkv_device_tiles_to_code(cache->profile, tokens));
    int64_t slots = 2;
    while (slots < need) {
        slots *= 2;
    }
    return slots > seq->device->segment_slots ? grow_segments(cache, seq, slots) : FKV_OK;
}

/* Drops a layer's segments behind its coded tiles. */
void fkv_device_drop_segments(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                              int64_t tiles) {
    struct fkv_device_seq *s = seq->device;
    for (int64_t i = segments_of(seq, tiles); i < s->segment_slots; i++) {
        struct fkv_device_page **entry = segment_entry(s, layer, i);
        fkv_device_page_drop(cache, seq, *entry);
        *entry = NULL;
    }
}

void fkv_device_segments_free(struct fkv_cache_object *cache, struct fkv_seq *seq) {
    if (!seq->device->segments) {
        return;
    }
    for (int l = 0; l < cache->profile->model.n_layers; l++) {
        fkv_device_drop_segments(cache, seq, l, 0);
    }
    free_segments(cache, seq);
}

fkv_status fkv_device_segments_fork(struct fkv_cache_object *cache,
                                    const struct fkv_device_seq *from, struct fkv_seq *child) {
    struct fkv_device_seq *s = child->device;
    if (!from->segment_slots) {
        return FKV_OK;
    }
    fkv_status status = grow_segments(cache, child, from->segment_slots);
    for (int l = 0; status == FKV_OK && l < cache->profile->model.n_layers; l++) {
        for (int64_t i = 0; status == FKV_OK && i < from->segment_slots; i++) {
            struct fkv_device_page *page = *segment_entry(from, l, i);
            if (page) {
                *segment_entry(s, l, i) = fkv_device_page_share(cache, child, page);
                status = patch_segment(cache, s, l, i, page->address);
            }
        }
    }
    return status;
}

uint64_t fkv_device_shared_segments(const struct fkv_cache_object *cache,
                                    const struct fkv_device_seq *s) {
    uint64_t bytes = 0;
    for (int64_t i = 0; i < s->segment_slots * cache->profile->model.n_layers; i++) {
        if (s->segments[i] && s->segments[i]->holders > 1) {
            bytes += cache->device->pools[s->segments[i]->pool].bytes;
        }
    }
    return bytes;
}

/* ---- coding. Everything is taken before the launches, so that nothing can fail behind them. */

/* What a row's tiles [first, until) of a layer will be. */
static int64_t until_of(const struct fkv_plan_object *plan, const struct fkv_row *row) {
    return fkv_device_tiles_to_code(plan->cache->profile, row->base + row->n_new);
}

static void count_jobs(const struct fkv_plan_object *plan, int layer, struct fkv_folding *f) {
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct fkv_row *row = &plan->rows[i];
        const int64_t first = row->seq->layers[layer].n_coded, until = until_of(plan, row);
        if (until > first) {
            f->slots += until - first;
            f->fold_slots +=
                segments_of(row->seq, until) - first / fkv_tiles_per_segment(row->seq->period);
        }
    }
}

static fkv_status take_kept(struct fkv_plan_object *plan, int64_t i, int layer,
                            struct fkv_folding *f) {
    struct fkv_cache_object *cache = plan->cache;
    const struct fkv_row *row = &plan->rows[i];
    const int64_t until = until_of(plan, row);
    for (int64_t tile = row->seq->layers[layer].n_coded; tile < until; tile++) {
        struct fkv_device_page *page = NULL;
        if (cache->device->unit_bytes[layer]) {
            page = fkv_device_page_new(cache, row->seq, cache->device->pool_of[layer]);
            if (!page) {
                return fkv_cache_refused(cache);
            }
        }
        f->pages[f->n] = page;
        f->jobs[f->n++] =
            (struct fkv_cuda_seal){(int32_t)i, (int32_t)tile, page ? page->address : 0};
    }
    return FKV_OK;
}

/* The segments that a row's tiles go to: the one under way, which must be its own, and new ones. */
static fkv_status take_segments(struct fkv_plan_object *plan, int64_t i, int layer,
                                struct fkv_folding *f) {
    struct fkv_cache_object *cache = plan->cache;
    struct fkv_ctx *ctx = plan->ctx;
    const struct fkv_row *row = &plan->rows[i];
    const int64_t per = fkv_tiles_per_segment(row->seq->period), until = until_of(plan, row);
    int64_t tile = row->seq->layers[layer].n_coded;
    const int32_t pool = cache->device->segment_pool[layer];
    while (tile < until) {
        const int64_t segment = tile / per, end = fkv_min64(until, (segment + 1) * per);
        struct fkv_device_page *old =
            tile % per ? *segment_entry(row->seq->device, layer, segment) : NULL;
        struct fkv_device_page *page = old;
        if (!old || old->holders > 1) {
            page = fkv_device_page_new(cache, row->seq, pool);
            if (!page) {
                return fkv_cache_refused(cache);
            }
        }
        f->segments[f->n_folds] = page == old ? NULL : page;
        f->folds[f->n_folds++] = (struct fkv_cuda_fold){
            page->address, (int32_t)i, (int32_t)tile, (int32_t)(tile % per), (int32_t)(end - tile)};
        if (old && old != page) {
            int error = ctx->cuda->copy(ctx->device, page->address, old->address,
                                        cache->device->pools[pool].bytes, ctx->stream);
            if (error) {
                return FKV_DEVICE_CHECK(ctx, error, "copying a shared segment");
            }
        }
        tile = end;
    }
    return FKV_OK;
}

static size_t lists_bytes(const struct fkv_folding *f) {
    return (size_t)f->slots * sizeof *f->jobs + (size_t)f->fold_slots * sizeof *f->folds;
}

void fkv_device_folding_end(struct fkv_plan_object *plan, struct fkv_folding *f) {
    struct fkv_cache_object *cache = plan->cache;
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, f->jobs, (size_t)f->slots * sizeof *f->jobs);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, f->pages, (size_t)f->slots * sizeof *f->pages);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, f->folds,
                   (size_t)f->fold_slots * sizeof *f->folds);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, f->segments,
                   (size_t)f->fold_slots * sizeof *f->segments);
    *f = (struct fkv_folding){0};
}

static bool make_lists(struct fkv_cache_object *cache, struct fkv_folding *f) {
    f->jobs = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, (size_t)f->slots * sizeof *f->jobs);
    f->pages = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, (size_t)f->slots * sizeof *f->pages);
    f->folds =
        fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, (size_t)f->fold_slots * sizeof *f->folds);
    f->segments =
        fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, (size_t)f->fold_slots * sizeof *f->segments);
    return f->jobs && f->pages && f->folds && f->segments;
}

void fkv_device_folding_undo(struct fkv_plan_object *plan, struct fkv_folding *f) {
    struct fkv_cache_object *cache = plan->cache;
    for (int64_t i = 0; i < f->n; i++) {
        fkv_device_page_drop(cache, plan->rows[f->jobs[i].row].seq, f->pages[i]);
    }
    for (int64_t i = 0; i < f->n_folds; i++) {
        fkv_device_page_drop(cache, plan->rows[f->folds[i].row].seq, f->segments[i]);
    }
    fkv_device_folding_end(plan, f);
}

fkv_status fkv_device_folding_begin(struct fkv_plan_object *plan, int layer,
                                    struct fkv_folding *f) {
    struct fkv_cache_object *cache = plan->cache;
    *f = (struct fkv_folding){0};
    count_jobs(plan, layer, f);
    if (!f->slots) {
        return FKV_OK;
    }
    fkv_status status = make_lists(cache, f) ? FKV_OK : fkv_cache_refused(cache);
    for (int64_t i = 0; status == FKV_OK && i < plan->n_rows; i++) {
        status = take_kept(plan, i, layer, f);
        if (status == FKV_OK) {
            status = take_segments(plan, i, layer, f);
        }
    }
    if (status == FKV_OK) {
        status = fkv_device_reserve(cache, &plan->device->seals, lists_bytes(f));
    }
    if (status == FKV_OK) {
        status = fkv_device_ready(cache, lists_bytes(f), f->slots + f->fold_slots);
    }
    if (status != FKV_OK) {
        fkv_device_folding_undo(plan, f);
    }
    return status;
}

/* What was launched goes into the books. */
static fkv_status enter(struct fkv_plan_object *plan, int layer, const struct fkv_folding *f) {
    struct fkv_cache_object *cache = plan->cache;
    fkv_status status = FKV_OK;
    for (int64_t i = 0; i < f->n && status == FKV_OK; i++) {
        struct fkv_seq *seq = plan->rows[f->jobs[i].row].seq;
        const int64_t entry = 1 + f->jobs[i].tile;
        struct fkv_device_page **place = fkv_device_entry(seq->device, layer, entry);
        fkv_device_page_drop(cache, seq, *place);
        *place = f->pages[i];
        seq->layers[layer].n_coded = entry;
        if (f->pages[i]) {
            status = fkv_device_patch(
                cache,
                seq->device->table + (uint64_t)((int64_t)layer * seq->device->slots + entry) * 8,
                f->pages[i]->address, 0);
        }
    }
    for (int64_t i = 0; i < f->n_folds && status == FKV_OK; i++) {
        struct fkv_seq *seq = plan->rows[f->folds[i].row].seq;
        const int64_t segment = f->folds[i].tile / fkv_tiles_per_segment(seq->period);
        struct fkv_device_page **place = segment_entry(seq->device, layer, segment);
        if (f->segments[i]) {
            fkv_device_page_drop(cache, seq, *place);
            *place = f->segments[i];
            status = patch_segment(cache, seq->device, layer, segment, f->segments[i]->address);
        }
    }
    return status == FKV_OK ? fkv_device_flush(cache) : status;
}

fkv_status fkv_device_folding_run(struct fkv_plan_object *plan, int layer,
                                  const struct fkv_cuda_attend *a, const struct fkv_folding *f) {
    struct fkv_cache_object *cache = plan->cache;
    struct fkv_ctx *ctx = plan->ctx;
    const size_t bytes = lists_bytes(f);
    const uint64_t lists = plan->device->seals.address;
    void *memory;
    if (!f->n) {
        return FKV_OK;
    }
    fkv_status status = fkv_device_stage(cache, bytes, &memory);
    if (status != FKV_OK) {
        return status;
    }
    const size_t folds_at = (size_t)f->slots * sizeof *f->jobs;
    memcpy(memory, f->jobs, folds_at);
    memcpy((char *)memory + folds_at, f->folds, (size_t)f->n_folds * sizeof *f->folds);
    status = fkv_device_send(cache, lists, bytes);
    if (status == FKV_OK) {
        const int padded = fkv_spectrum_stride(INT64_MAX, cache->profile->fourier.bins) / 2;
        int error = ctx->cuda->fold(ctx->device, &cache->device->c, a, lists,
                                    cache->device->unit_bytes[layer] ? (int)f->n : 0,
                                    lists + folds_at, (int)f->n_folds, padded, ctx->stream);
        status = FKV_DEVICE_CHECK(ctx, error, "coding");
    }
    return status == FKV_OK ? enter(plan, layer, f) : status;
}

fkv_status fkv_device_read_fourier(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                                   fkv_part part, int64_t first, int64_t count,
                                   const struct fkv_cuda_view *out) {
    struct fkv_ctx *ctx = cache->ctx;
    const struct fkv_cuda_row row = {.table = seq->device->table,
                                     .slots = seq->device->slots,
                                     .segment_slots = (int32_t)seq->device->segment_slots,
                                     .segments = seq->device->segment_table,
                                     .spectrum = seq->shared->device};
    int error = ctx->cuda->read_fourier(ctx->device, &cache->device->c, &row, layer, part,
                                        cache->device->coded_rows[layer],
                                        seq->layers[layer].n_coded, first, count, out, ctx->stream);
    return FKV_DEVICE_CHECK(ctx, error, "reading back");
}
