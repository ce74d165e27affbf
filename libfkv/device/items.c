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

static int64_t span_cost(const struct fkv_device_cache *d, int layer, int head) {
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

static int subgroups(const struct fkv_device_cache *d) {
    return (d->c.group + FKV_CUDA_MAX_GROUP - 1) / FKV_CUDA_MAX_GROUP;
}

/* Items of a layer if none may cost more than `most`. */
static int64_t count_items(const struct fkv_plan_object *plan, int layer, int64_t most,
                           int64_t *cost) {
    const struct fkv_device_cache *d = plan->cache->device;
    const int64_t outputs = plan->tokens * d->c.n_kv_heads * subgroups(d);
    const int64_t few = plan->ctx->multiprocessors * BLOCKS_PER_PROCESSOR / 8;
    int64_t items = 0;
    *cost = 0;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct extent e = extent_of(plan, layer, i);
        for (int h = 0; h < d->c.n_kv_heads; h++) {
            const struct output o = cut_output(d, layer, h, &e, most);
            const int64_t times = plan->rows[i].n_new * subgroups(d);
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
    const int64_t outputs =
        plan->tokens * plan->cache->device->c.n_kv_heads * subgroups(plan->cache->device);
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
    w->slots += item.parts > 1 ? item.parts : 0;
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
    w->outputs = w->slots = 0;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct extent e = extent_of(plan, layer, i);
        for (int h = 0; h < d->c.n_kv_heads; h++) {
            const struct output o = cut_output(d, layer, h, &e, most);
            for (int64_t query = 0; query < plan->rows[i].n_new; query++) {
                for (int s = 0; s < subgroups(d); s++) {
                    const int left = d->c.group - s * FKV_CUDA_MAX_GROUP;
                    const struct fkv_cuda_item item = {
                        .row = (int32_t)i,
                        .head = h,
                        .query = (int32_t)query,
                        .q_first = s * FKV_CUDA_MAX_GROUP,
                        .q_count = left < FKV_CUDA_MAX_GROUP ? left : FKV_CUDA_MAX_GROUP,
                    };
                    write_output(w, d, item, &e, &o, coded);
                }
            }
        }
    }
}

static bool same_ranges(const struct fkv_plan_object *plan, int layer,
                        struct fkv_device_items *list) {
    bool same = list->valid;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct extent e = extent_of(plan, layer, i);
        const int64_t key[3] = {e.coded, e.first - e.sink, e.last};
        same = same && !memcmp(list->key + 3 * i, key, sizeof key);
        memcpy(list->key + 3 * i, key, sizeof key);
    }
    list->valid = false; /* until it is sent */
    return same;
}

static fkv_status need_capacity(struct fkv_plan_object *plan, int64_t items) {
    struct fkv_device_plan *p = plan->device;
    if (items <= p->item_capacity) {
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
    const size_t list = 16 + (size_t)capacity * sizeof(struct fkv_cuda_item);
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
    int64_t items, outputs = 0;
    if (same_ranges(plan, layer, list)) {
        list->valid = true;
        return FKV_OK;
    }
    const int64_t most = choose_cost(plan, layer, &items);
    for (int64_t i = 0; i < plan->n_rows; i++) {
        outputs += plan->rows[i].n_new * cache->device->c.n_kv_heads * subgroups(cache->device);
    }
    fkv_status status = need_capacity(plan, items);
    if (status == FKV_OK) {
        status = need_results(plan, items, outputs);
    }
    void *memory;
    const size_t bytes = 16 + (size_t)items * sizeof(struct fkv_cuda_item);
    if (status == FKV_OK) {
        status = fkv_device_stage(cache, bytes, &memory);
    }
    if (status != FKV_OK) {
        return status;
    }
    struct writer w = {.items = (struct fkv_cuda_item *)(void *)((char *)memory + 16)};
    write_items(plan, layer, most, &w, true);
    write_items(plan, layer, most, &w, false);
    memset(memory, 0, 16);
    memcpy(memory, &w.n, sizeof w.n);
    const size_t stride = 16 + (size_t)p->item_capacity * sizeof(struct fkv_cuda_item);
    status = fkv_device_send(cache, p->items.address + (uint64_t)index * stride, bytes);
    list->count = w.n;
    list->valid = status == FKV_OK;
    return status;
}
