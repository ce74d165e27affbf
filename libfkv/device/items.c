/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Cutting a layer's attention into work items of about equal cost. An item is a range of pages or of spans for one
 * KV head; what a head's units cost depends on its bits. Lists are made again only when the ranges change, which in
 * decoding is once in 64 steps.
 */
#include "device/device.h"

#include <string.h>

/* Blocks that run on a multiprocessor at once, and the costs of a warp's work in bytes that would take as long to
 * read: a page of exact tokens costs its bytes, a unit of codes its bytes and its instructions. */
#define BLOCKS_PER_PROCESSOR 2
#define UNIT_COST 12000
#define WAVE_TILE_COST                                                                             \
    16000 /* of a tile's softmax, and scores and weights on the grid, in Fourier caches */
#define MOST_SCRATCH (INT64_C(1) << 30) /* bytes that the waves of a slice may take */
#define WARPS 8

/* What a row shows in a layer. */
struct extent {
    int64_t coded;       /* tiles */
    int64_t first, last; /* table entries of exact pages behind the coded ones; last excluded */
    bool sink;
};

struct costs {
    int64_t page, span[2];
};

static struct extent extent_of(const struct fkv_plan_object *plan, int layer, int64_t i) {
    const struct fkv_device_cache *d = plan->cache->device;
    const struct fkv_row *row = &plan->rows[i];
    const int64_t body = row->base + row->n_new - d->c.sinks;
    struct extent e = {.coded = row->seq->layers[layer].n_coded};
    e.first = 1 + e.coded;
    e.last = 1 + (body > 0 ? fkv_ceil_div(body, FKV_TILE) : 0);
    e.last = fkv_max64(e.last, e.first);
    e.sink = d->c.sinks && row->base + row->n_new > 0;
    return e;
}

static int64_t page_cost(const struct fkv_device_cache *d) {
    return (int64_t)(d->pools[0].bytes / (size_t)d->c.n_kv_heads) * WARPS;
}

static bool fourier(const struct fkv_device_cache *d) {
    return d->c.coded == FKV_CUDA_FOURIER;
}

static int64_t span_cost(const struct fkv_device_cache *d, int layer, int head) {
    if (fourier(d)) {
        return FKV_SPAN *
               (d->splits[layer * d->c.n_kv_heads + head].bytes + (int64_t)WAVE_TILE_COST);
    }
    return FKV_SPAN * (d->heads[layer * d->c.n_kv_heads + head].bytes + (int64_t)UNIT_COST);
}

/* Steps of a range and how many of them an item takes when items may cost `most`. */
struct cut {
    int64_t steps, each, parts;
};

static struct cut cut_range(int64_t steps, int64_t cost, int64_t most) {
    struct cut c = {steps, fkv_max64(1, most / cost), 0};
    if (steps) {
        c.parts = fkv_ceil_div(steps, c.each);
        c.each = fkv_ceil_div(steps, c.parts); /* equal ones */
        c.parts = fkv_ceil_div(steps, c.each);
    }
    return c;
}

struct output {
    struct cut coded, exact;
};

static struct output cut_output(const struct fkv_device_cache *d, int layer, int head,
                                const struct extent *e, int64_t most) {
    const int64_t units = d->c.coded ? e->coded * FKV_TILE / d->c.unit : 0;
    struct output o;
    o.coded =
        cut_range(fkv_ceil_div(units, FKV_SPAN), d->c.coded ? span_cost(d, layer, head) : 1, most);
    o.exact = cut_range(fkv_ceil_div(e->last - e->first + e->sink, WARPS), page_cost(d), most);
    if (!o.coded.parts && !o.exact.parts) {
        o.exact.parts = 1; /* sees nothing, but must be written */
    }
    return o;
}

/* Query tokens of a row in the slice, and the first of them. */
static int64_t queries_of(const struct fkv_plan_object *plan, int64_t i, int64_t *first) {
    const struct fkv_row *row = &plan->rows[i];
    const int64_t from = fkv_max64(plan->device->from, row->offset);
    const int64_t until = fkv_min64(plan->device->until, row->offset + row->n_new);
    *first = from - row->offset;
    return fkv_max64(0, until - from);
}

static int64_t segments_of(const struct fkv_plan_object *plan, int64_t i, int64_t tiles) {
    const struct fkv_seq *seq = plan->rows[i].seq;
    return seq->shared ? fkv_ceil_div(tiles, fkv_tiles_per_segment(seq->period)) : 0;
}

static int subgroups(const struct fkv_device_cache *d) {
    return (d->c.group + FKV_CUDA_MAX_GROUP - 1) / FKV_CUDA_MAX_GROUP;
}

/* Items of a layer if none may cost more than `most`. */
static int64_t count_items(const struct fkv_plan_object *plan, int layer, int64_t most,
                           int64_t *cost) {
    const struct fkv_device_cache *d = plan->cache->device;
    const int64_t tokens = plan->device->until - plan->device->from;
    const int64_t outputs = tokens * d->c.n_kv_heads * subgroups(d);
    const int64_t few = plan->ctx->multiprocessors * BLOCKS_PER_PROCESSOR / 8;
    int64_t items = 0;
    *cost = 0;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct extent e = extent_of(plan, layer, i);
        for (int h = 0; h < d->c.n_kv_heads; h++) {
            const struct output o = cut_output(d, layer, h, &e, most);
            int64_t unused;
            const int64_t times = queries_of(plan, i, &unused) * subgroups(d);
            /* short tails, if they are many, are done by whoever is ready first */
            const bool apart = o.coded.parts && o.exact.steps == 1 && outputs > few;
            items += (o.coded.parts + (apart ? 0 : o.exact.parts)) * times;
            *cost += (o.coded.steps * (d->c.coded ? span_cost(d, layer, h) : 0) +
                      o.exact.steps * page_cost(d)) *
                     times;
        }
    }
    return items;
}

/* The largest cost of an item with which the items still fill the device once. */
static int64_t choose_cost(const struct fkv_plan_object *plan, int layer, int64_t *items) {
    const int64_t grid = plan->ctx->multiprocessors * BLOCKS_PER_PROCESSOR;
    int64_t cost;
    const int64_t least = count_items(plan, layer, INT64_MAX, &cost);
    const int64_t tokens = plan->device->until - plan->device->from;
    const int64_t outputs =
        tokens * plan->cache->device->c.n_kv_heads * subgroups(plan->cache->device);
    int64_t most = fkv_max64(1, cost / grid);
    *items = count_items(plan, layer, most, &cost);
    while (*items > grid && *items > least) {
        most += most / 64 + 1;
        *items = count_items(plan, layer, most, &cost);
    }
    *items += outputs; /* the tails */
    return most;
}

struct writer {
    struct fkv_cuda_item *items;
    int32_t n, outputs, slots;
    struct fkv_cuda_wave
        *to_waves; /* Fourier caches; with their outputs written by the first pass */
    struct fkv_cuda_output *to_outputs;
    int32_t waves;
};

static void write_range(struct writer *w, struct fkv_cuda_item item, const struct cut *c,
                        int64_t first, int64_t count, int64_t step, bool coded, int32_t *part) {
    item.coded = coded;
    for (int64_t i = 0; i < c->parts; i++) {
        const int64_t from = i * c->each * step;
        item.part = (*part)++;
        item.first = (int32_t)(first + from);
        item.count = (int32_t)fkv_min64(c->each * step, count - from);
        w->items[w->n++] = item;
        /* the sink page comes before the others, so that the rest begins an entry earlier */
        if (!i && item.sink) {
            first--;
            item.sink = 0;
        }
    }
}

static void write_output(struct writer *w, const struct fkv_device_cache *d,
                         struct fkv_cuda_item item, const struct extent *e, const struct output *o,
                         bool coded) {
    int32_t part = coded ? 0 : (int32_t)o->coded.parts;
    item.parts = (int32_t)(o->coded.parts + o->exact.parts);
    item.output = w->outputs++;
    item.slot = w->slots;
    w->slots += item.parts > 1 || fourier(d) ? item.parts : 0;
    if (coded && fourier(d)) {
        w->to_outputs[item.output] = (struct fkv_cuda_output){
            .row = item.row,
            .query = item.query,
            .head = item.head,
            .q_first = item.q_first,
            .q_count = item.q_count,
            .slot = item.slot,
            .parts = item.parts,
            .wave = item.wave,
            .waves = w->waves,
        };
    }
    if (coded) {
        write_range(w, item, &o->coded, 0, d->c.coded ? e->coded * FKV_TILE / d->c.unit : 0,
                    FKV_SPAN, true, &part);
        return;
    }
    item.sink = e->sink;
    write_range(w, item, &o->exact, e->first, e->last - e->first + e->sink, WARPS, false, &part);
}

/* Coded ranges come first: blocks take items in this order, and what is short should end the launch. */
static void write_items(const struct fkv_plan_object *plan, int layer, int64_t most,
                        struct writer *w, bool coded) {
    const struct fkv_device_cache *d = plan->cache->device;
    int32_t wave = 0;
    w->outputs = w->slots = 0;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct extent e = extent_of(plan, layer, i);
        int64_t first;
        const int64_t queries = queries_of(plan, i, &first);
        w->waves = (int32_t)segments_of(plan, i, e.coded);
        for (int h = 0; h < d->c.n_kv_heads; h++) {
            const struct output o = cut_output(d, layer, h, &e, most);
            for (int64_t query = first; query < first + queries; query++) {
                for (int s = 0; s < subgroups(d); s++) {
                    const int left = d->c.group - s * FKV_CUDA_MAX_GROUP;
                    const struct fkv_cuda_item item = {
                        .row = (int32_t)i,
                        .head = h,
                        .query = (int32_t)query,
                        .q_first = s * FKV_CUDA_MAX_GROUP,
                        .q_count = left < FKV_CUDA_MAX_GROUP ? left : FKV_CUDA_MAX_GROUP,
                        .wave = wave + (int32_t)(query - first) * w->waves,
                    };
                    write_output(w, d, item, &e, &o, coded);
                }
            }
        }
        wave += (int32_t)queries * w->waves;
    }
}

/* A wave for each query token and segment. */
static int32_t write_waves(const struct fkv_plan_object *plan, int layer,
                           struct fkv_cuda_wave *to) {
    const struct fkv_device_plan *p = plan->device;
    int32_t n = 0;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const int64_t coded = plan->rows[i].seq->layers[layer].n_coded;
        const int64_t segments = segments_of(plan, i, coded);
        int64_t first;
        const int64_t queries = queries_of(plan, i, &first);
        for (int64_t query = first; query < first + queries; query++) {
            for (int64_t s = 0; s < segments; s++, n++) {
                const int64_t per = fkv_tiles_per_segment(plan->rows[i].seq->period);
                to[n] = (struct fkv_cuda_wave){.row = (int32_t)i,
                                               .query = (int32_t)query,
                                               .segment = (int32_t)s,
                                               .tiles = (int32_t)fkv_min64(per, coded - s * per),
                                               .mass = n * p->mass_stride,
                                               .maxima = n * p->maxima_stride};
            }
        }
    }
    return n;
}

/* What a wave of a row takes. */
struct wave_size {
    int64_t grid, mass, maxima; /* floats: of a head, of all, of all */
};

static struct wave_size wave_size(const struct fkv_plan_object *plan, int64_t i) {
    const struct fkv_shared_spectrum *shared = plan->rows[i].seq->shared;
    const int64_t heads = plan->cache->device->c.n_q_heads;
    const int64_t tiles = fkv_tiles_per_segment(plan->rows[i].seq->period);
    return (struct wave_size){(shared->spectrum->grid + 67) / 4 * 4, heads * tiles * shared->rows,
                              heads * tiles};
}

int64_t fkv_device_slice_end(const struct fkv_plan_object *plan, int layer, int64_t from) {
    const struct fkv_device_cache *d = plan->cache->device;
    struct wave_size most = {0, 0, 0};
    int64_t waves = 0, token = from;
    if (!fourier(d)) {
        return plan->tokens;
    }
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct wave_size size = wave_size(plan, i);
        most.grid = fkv_max64(most.grid, size.grid);
        most.mass = fkv_max64(most.mass, size.mass + size.maxima);
    }
    const int64_t stride = fkv_spectrum_stride(INT64_MAX, plan->cache->profile->fourier.bins);
    const int64_t wave = (d->c.n_q_heads * (most.grid + stride + 4) + most.mass) * 4;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct fkv_row *row = &plan->rows[i];
        const int64_t end = row->offset + row->n_new;
        const int64_t each = segments_of(plan, i, row->seq->layers[layer].n_coded);
        if (token >= end) {
            continue;
        }
        const int64_t room = each ? fkv_max64(0, MOST_SCRATCH / wave - waves) / each : end - token;
        if (room < end - token) {
            return fkv_max64(token + room, from + 1);
        }
        waves += each * (end - token);
        token = end;
    }
    return plan->tokens;
}

static fkv_status outgrown(struct fkv_plan_object *plan, const char *what) {
    return fkv_fail(plan->ctx, FKV_ERR_STATE, "the captured plan has no room for %s: capture again",
                    what);
}

/* Room for the waves of the slice. What a captured launch knows cannot change. */
static fkv_status need_waves(struct fkv_plan_object *plan, int64_t waves, int64_t outputs) {
    struct fkv_device_plan *p = plan->device;
    struct fkv_cache_object *cache = plan->cache;
    struct fkv_device_plan next = *p;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct wave_size size = wave_size(plan, i);
        const int32_t log_fft = plan->rows[i].seq->shared->log_fft;
        next.grid_stride = fkv_max64(next.grid_stride, size.grid);
        next.mass_stride = fkv_max64(next.mass_stride, size.mass);
        next.maxima_stride = fkv_max64(next.maxima_stride, size.maxima);
        next.log_fft = next.log_fft > log_fft ? next.log_fft : log_fft;
    }
    if (waves > p->wave_capacity || !p->wave_capacity) {
        next.wave_capacity = waves + waves / 4 + plan->tokens + 2; /* some open a segment */
    }
    if (outputs > p->output_capacity) {
        next.output_capacity = outputs + outputs / 4 + 8;
    }
    const bool wider = next.grid_stride > p->grid_stride || next.mass_stride > p->mass_stride ||
                       next.maxima_stride > p->maxima_stride || next.log_fft > p->log_fft;
    const bool more =
        next.wave_capacity > p->wave_capacity || next.output_capacity > p->output_capacity;
    if (!wider && !more) {
        return FKV_OK;
    }
    if (p->captured) {
        return outgrown(plan, wider ? "so long a period" : "so many segments and query tokens");
    }
    const size_t n = (size_t)next.wave_capacity, heads = (size_t)cache->device->c.n_q_heads;
    const size_t stride = (size_t)fkv_spectrum_stride(INT64_MAX, cache->profile->fourier.bins);
    const struct {
        struct fkv_device_buffer *buffer;
        size_t floats;
    } needs[] = {{&p->spectra, n * heads * stride},
                 {&p->grids, n * heads * (size_t)next.grid_stride},
                 {&p->stats, n * heads * 4},
                 {&p->mass, n * (size_t)next.mass_stride},
                 {&p->maxima, n * (size_t)next.maxima_stride}};
    for (size_t i = 0; i < sizeof needs / sizeof needs[0]; i++) {
        fkv_status status =
            fkv_device_reserve(cache, needs[i].buffer, needs[i].floats * sizeof(float));
        if (status != FKV_OK) {
            return status;
        }
    }
    p->grid_stride = next.grid_stride;
    p->mass_stride = next.mass_stride;
    p->maxima_stride = next.maxima_stride;
    p->log_fft = next.log_fft;
    if (more) {
        p->wave_capacity = next.wave_capacity;
        p->output_capacity = next.output_capacity;
    }
    p->item_capacity = 0; /* lists are laid out again, in another buffer if need be */
    for (int32_t i = 0; i < p->n_lists; i++) {
        p->lists[i].valid = false;
    }
    return FKV_OK;
}

static bool same_ranges(const struct fkv_plan_object *plan, int layer,
                        struct fkv_device_items *list) {
    bool same = list->valid;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct extent e = extent_of(plan, layer, i);
        const int64_t key[FKV_ITEMS_KEY] = {e.coded, e.first - e.sink, e.last,
                                            plan->rows[i].seq->shared ? plan->rows[i].seq->period
                                                                      : 0};
        same = same && !memcmp(list->key + FKV_ITEMS_KEY * i, key, sizeof key);
        memcpy(list->key + FKV_ITEMS_KEY * i, key, sizeof key);
    }
    same = same && plan->device->until - plan->device->from == plan->tokens;
    list->valid = false; /* until it is sent */
    return same;
}

static fkv_status need_capacity(struct fkv_plan_object *plan, int64_t items) {
    struct fkv_device_plan *p = plan->device;
    if (items <= p->item_capacity && p->item_capacity) {
        return FKV_OK;
    }
    if (p->captured) {
        return fkv_fail(plan->ctx, FKV_ERR_STATE,
                        "the plan was captured with room for %lld work items, this step has %lld: "
                        "capture again",
                        (long long)p->item_capacity, (long long)items);
    }
    /* blocks fetch their first item before they know how many there are */
    const int64_t capacity = fkv_max64(items + items / 4 + 64,
                                       BLOCKS_PER_PROCESSOR * (int64_t)plan->ctx->multiprocessors);
    const size_t list = fkv_device_list_bytes(p) +
                        (size_t)(capacity - p->item_capacity) * sizeof(struct fkv_cuda_item);
    fkv_status status = fkv_device_reserve(plan->cache, &p->items, (size_t)p->n_lists * list);
    if (status == FKV_OK) {
        p->item_capacity = capacity;
        for (int32_t i = 0; i < p->n_lists; i++) {
            p->lists[i].valid = false;
        }
    }
    return status;
}

/* Partial results and counters for the items of a list. */
static fkv_status need_results(struct fkv_plan_object *plan, int64_t slots, int64_t outputs) {
    struct fkv_device_plan *p = plan->device;
    const struct fkv_cuda_cache *c = &plan->cache->device->c;
    const int group = c->group < FKV_CUDA_MAX_GROUP ? c->group : FKV_CUDA_MAX_GROUP;
    const size_t partials =
        (size_t)slots * (size_t)group * (size_t)FKV_CUDA_PARTIAL(c->dim) * sizeof(float);
    const size_t counters = (size_t)(outputs + 1) * sizeof(uint32_t); /* and of items taken */
    if (p->captured && (partials > p->partials.bytes || counters > p->counters.bytes)) {
        return fkv_fail(plan->ctx, FKV_ERR_STATE,
                        "the step outgrew the captured plan: capture again");
    }
    fkv_status status = fkv_device_reserve(plan->cache, &p->partials, partials);
    return status == FKV_OK ? fkv_device_reserve(plan->cache, &p->counters, counters) : status;
}

fkv_status fkv_device_make_items(struct fkv_plan_object *plan, int layer) {
    struct fkv_device_plan *p = plan->device;
    struct fkv_cache_object *cache = plan->cache;
    const int32_t index = p->n_lists > 1 ? layer : 0;
    struct fkv_device_items *list = &p->lists[index];
    const bool waving = fourier(cache->device);
    int64_t items, outputs = 0, waves = 0;
    if (same_ranges(plan, layer, list)) {
        list->valid = true;
        return FKV_OK;
    }
    const int64_t most = choose_cost(plan, layer, &items);
    for (int64_t i = 0; i < plan->n_rows; i++) {
        int64_t first;
        const int64_t queries = queries_of(plan, i, &first);
        outputs += queries * cache->device->c.n_kv_heads * subgroups(cache->device);
        waves += queries * segments_of(plan, i, plan->rows[i].seq->layers[layer].n_coded);
    }
    fkv_status status = waving ? need_waves(plan, waves, outputs) : FKV_OK;
    if (status == FKV_OK) {
        status = need_capacity(plan, items);
    }
    if (status == FKV_OK) {
        status = need_results(plan, items, outputs);
    }
    void *memory;
    /* waves and outputs lie behind the room for items */
    const size_t bytes =
        waving ? fkv_device_list_bytes(p) : 16 + (size_t)items * sizeof(struct fkv_cuda_item);
    if (status == FKV_OK) {
        status = fkv_device_stage(cache, bytes, &memory);
    }
    if (status != FKV_OK) {
        return status;
    }
    struct writer w = {.items = (struct fkv_cuda_item *)(void *)((char *)memory + 16)};
    w.to_waves = (struct fkv_cuda_wave *)(void *)(w.items + p->item_capacity);
    w.to_outputs = (struct fkv_cuda_output *)(void *)(w.to_waves + p->wave_capacity);
    write_items(plan, layer, most, &w, true);
    write_items(plan, layer, most, &w, false);
    const int32_t counts[4] = {w.n, waving ? write_waves(plan, layer, w.to_waves) : 0,
                               waving ? w.outputs : 0, 0};
    memcpy(memory, counts, sizeof counts);
    status = fkv_device_send(cache, p->items.address + (uint64_t)index * fkv_device_list_bytes(p),
                             bytes);
    list->count = w.n;
    list->valid = status == FKV_OK && p->until - p->from == plan->tokens;
    return status;
}
