/* SPDX-License-Identifier: Apache-2.0 */
/* Memory of the device: pages in pools, buffers, and the way of the host's data to it. */
#include "device/device.h"

#include <string.h>

#define LEAST_CHUNK ((size_t)2 << 20) /* what the driver hands out anyway */
#define MOST_CHUNK ((size_t)256 << 20)

static void count(struct fkv_cache_object *cache, struct fkv_seq *seq, enum fkv_class class,
                  uint64_t bytes, bool add) {
    cache->account.bytes[class] += add ? bytes : 0 - bytes;
    if (seq) {
        seq->account.bytes[class] += add ? bytes : 0 - bytes;
    }
}

static bool trim_pools(struct fkv_cache_object *cache);

/* What pools hold in vain is given back before memory is refused. */
static uint64_t device_alloc(struct fkv_cache_object *cache, size_t bytes) {
    struct fkv_ctx *ctx = cache->ctx;
    uint64_t address = 0;
    while (bytes > cache->max_bytes || cache->bytes > cache->max_bytes - bytes ||
           ctx->cuda->alloc(ctx->device, bytes, &address) != 0) {
        if (!trim_pools(cache)) {
            cache->refused = bytes;
            return 0;
        }
    }
    cache->bytes += bytes;
    count(cache, NULL, FKV_CLASS_TABLES, bytes, true);
    return address;
}

static void device_free(struct fkv_cache_object *cache, uint64_t address, size_t bytes) {
    if (!address) {
        return;
    }
    cache->ctx->cuda->free(cache->ctx->device, address);
    cache->bytes -= bytes;
    count(cache, NULL, FKV_CLASS_TABLES, bytes, false);
}

/* ---- pages. A chunk's bytes that are in no living page count as tables. */

static size_t chunk_book(int64_t pages) {
    return sizeof(struct fkv_device_chunk) + (size_t)pages * sizeof(struct fkv_device_page);
}

/* Takes a chunk's pages out of the list of free ones; false if one of them is held. */
static bool withdraw(struct fkv_device_pool *pool, const struct fkv_device_chunk *chunk) {
    for (int64_t i = 0; i < chunk->count; i++) {
        if (chunk->pages[i].holders) {
            return false;
        }
    }
    struct fkv_device_page **at = &pool->free;
    while (*at) {
        if (*at >= chunk->pages && *at < chunk->pages + chunk->count) {
            *at = (*at)->next;
        } else {
            at = &(*at)->next;
        }
    }
    return true;
}

/* Frees the chunks of which no page is held; false if there are none. */
static bool trim_pools(struct fkv_cache_object *cache) {
    struct fkv_device_cache *d = cache->device;
    bool freed = false;
    for (int32_t i = 0; d && d->pools && i < d->n_pools; i++) {
        struct fkv_device_pool *pool = &d->pools[i];
        for (struct fkv_device_chunk **at = &pool->chunks; *at;) {
            struct fkv_device_chunk *chunk = *at;
            if (!withdraw(pool, chunk)) {
                at = &chunk->next;
                continue;
            }
            *at = chunk->next;
            pool->pages -= chunk->count;
            device_free(cache, chunk->address, (size_t)chunk->count * pool->bytes);
            fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, chunk, chunk_book(chunk->count));
            freed = true;
        }
    }
    return freed;
}

static bool grow_pool(struct fkv_cache_object *cache, struct fkv_device_pool *pool, int32_t index,
                      int64_t pages) {
    struct fkv_device_chunk *chunk =
        fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, chunk_book(pages));
    if (!chunk) {
        return false;
    }
    chunk->address = device_alloc(cache, (size_t)pages * pool->bytes);
    if (!chunk->address) {
        fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, chunk, chunk_book(pages));
        return false;
    }
    chunk->count = pages;
    chunk->next = pool->chunks;
    pool->chunks = chunk;
    pool->pages += pages;
    for (int64_t i = pages - 1; i >= 0; i--) {
        struct fkv_device_page *page = &chunk->pages[i];
        page->address = chunk->address + (uint64_t)i * pool->bytes;
        page->pool = index;
        page->next = pool->free;
        pool->free = page;
    }
    return true;
}

struct fkv_device_page *fkv_device_page_new(struct fkv_cache_object *cache, struct fkv_seq *seq,
                                            int32_t index) {
    struct fkv_device_pool *pool = &cache->device->pools[index];
    if (!pool->free) {
        /* a quarter more, so that chunks are few and what is unused stays little */
        size_t want = (size_t)(pool->pages / 4) * pool->bytes;
        want = want < LEAST_CHUNK ? LEAST_CHUNK : want > MOST_CHUNK ? MOST_CHUNK : want;
        const int64_t pages = fkv_max64(1, (int64_t)(want / pool->bytes));
        if (!grow_pool(cache, pool, index, pages) && !grow_pool(cache, pool, index, 1)) {
            return NULL;
        }
    }
    struct fkv_device_page *page = pool->free;
    pool->free = page->next;
    page->next = NULL;
    page->holders = 0;
    return fkv_device_page_share(cache, seq, page);
}

static void count_page(struct fkv_cache_object *cache, struct fkv_seq *seq,
                       const struct fkv_device_pool *pool, bool add, bool whole) {
    struct fkv_account *accounts[2] = {seq ? &seq->account : NULL, whole ? &cache->account : NULL};
    for (int i = 0; i < 2; i++) {
        if (accounts[i]) {
            uint64_t data = pool->bytes - pool->scales, scales = pool->scales;
            accounts[i]->bytes[pool->class] += add ? data : 0 - data;
            accounts[i]->bytes[FKV_CLASS_SCALES] += add ? scales : 0 - scales;
        }
    }
    if (whole) {
        count(cache, NULL, FKV_CLASS_TABLES, pool->bytes, !add);
    }
}

struct fkv_device_page *fkv_device_page_share(struct fkv_cache_object *cache, struct fkv_seq *seq,
                                              struct fkv_device_page *page) {
    if (!page) {
        return NULL;
    }
    const struct fkv_device_pool *pool = &cache->device->pools[page->pool];
    page->holders++;
    count_page(cache, seq, pool, true, page->holders == 1);
    if (page->holders == 2) {
        cache->bytes_shared += pool->bytes;
    }
    return page;
}

void fkv_device_page_drop(struct fkv_cache_object *cache, struct fkv_seq *seq,
                          struct fkv_device_page *page) {
    if (!page) {
        return;
    }
    struct fkv_device_pool *pool = &cache->device->pools[page->pool];
    page->holders--;
    count_page(cache, seq, pool, false, page->holders == 0);
    if (page->holders == 1) {
        cache->bytes_shared -= pool->bytes;
    } else if (!page->holders) {
        page->next = pool->free;
        pool->free = page;
    }
}

void fkv_device_pools_free(struct fkv_cache_object *cache) {
    struct fkv_device_cache *d = cache->device;
    for (int32_t i = 0; d->pools && i < d->n_pools; i++) {
        while (d->pools[i].chunks) {
            struct fkv_device_chunk *chunk = d->pools[i].chunks;
            d->pools[i].chunks = chunk->next;
            device_free(cache, chunk->address, (size_t)chunk->count * d->pools[i].bytes);
            fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, chunk, chunk_book(chunk->count));
        }
    }
}

/* ---- buffers */

fkv_status fkv_device_reserve(struct fkv_cache_object *cache, struct fkv_device_buffer *buffer,
                              size_t bytes) {
    if (bytes <= buffer->bytes) {
        return FKV_OK;
    }
    size_t size = 4096;
    while (size < bytes) {
        size += size / 2 / 4096 * 4096 + 4096;
    }
    uint64_t address = device_alloc(cache, size);
    if (!address) {
        return fkv_cache_refused(cache);
    }
    fkv_device_release(cache, buffer);
    *buffer = (struct fkv_device_buffer){address, size};
    return FKV_OK;
}

void fkv_device_release(struct fkv_cache_object *cache, struct fkv_device_buffer *buffer) {
    device_free(cache, buffer->address, buffer->bytes);
    *buffer = (struct fkv_device_buffer){0, 0};
}

/* ---- sending. The host waits only if it is FKV_DEVICE_STAGES transfers ahead of the device. */

fkv_status fkv_device_stage(struct fkv_cache_object *cache, size_t bytes, void **memory) {
    struct fkv_ctx *ctx = cache->ctx;
    struct fkv_device_stage *s = &cache->device->stages[cache->device->stage];
    int error = 0;
    if (!s->event) {
        error = ctx->cuda->event_create(ctx->device, &s->event);
    }
    if (!error && s->used) {
        error = ctx->cuda->event_wait(ctx->device, s->event);
    }
    if (!error && s->bytes < bytes) {
        void *larger = NULL; /* what there is stays if there is no more */
        if (ctx->cuda->alloc_host(ctx->device, bytes + bytes / 2, &larger)) {
            return fkv_fail_memory(ctx, bytes + bytes / 2, "pinned memory");
        }
        if (s->memory) {
            ctx->cuda->free_host(ctx->device, s->memory);
        }
        s->memory = larger;
        s->bytes = bytes + bytes / 2;
    }
    *memory = s->memory;
    return FKV_DEVICE_CHECK(ctx, error, "pinned memory");
}

/* Room for so many notes of writes to tables. */
static fkv_status patch_slots(struct fkv_cache_object *cache, int64_t needed) {
    struct fkv_device_cache *d = cache->device;
    if (needed <= d->pending_slots) {
        return FKV_OK;
    }
    int64_t slots = d->pending_slots ? 2 * d->pending_slots : 256;
    while (slots < needed) {
        slots *= 2;
    }
    struct fkv_cuda_patch *pending =
        fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, (size_t)slots * sizeof *pending);
    if (!pending) {
        return fkv_cache_refused(cache);
    }
    if (d->n_pending) {
        memcpy(pending, d->pending, (size_t)d->n_pending * sizeof *pending);
    }
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, d->pending,
                   (size_t)d->pending_slots * sizeof *pending);
    d->pending = pending;
    d->pending_slots = slots;
    return FKV_OK;
}

fkv_status fkv_device_ready(struct fkv_cache_object *cache, size_t bytes, int64_t patches) {
    struct fkv_device_cache *d = cache->device;
    const int64_t all = d->n_pending + patches;
    fkv_status status = patch_slots(cache, all);
    if (status == FKV_OK) {
        status = fkv_device_reserve(cache, &d->patches, (size_t)all * sizeof *d->pending);
    }
    const size_t most = (size_t)all * sizeof *d->pending, needed = bytes > most ? bytes : most;
    const int32_t next = d->stage;
    for (int i = 0; status == FKV_OK && i < FKV_DEVICE_STAGES; i++) {
        void *memory;
        if (d->stages[i].bytes < needed) { /* else nothing is waited for */
            d->stage = i;
            status = fkv_device_stage(cache, needed, &memory);
        }
    }
    d->stage = next;
    return status;
}

fkv_status fkv_device_send(struct fkv_cache_object *cache, uint64_t to, size_t bytes) {
    struct fkv_ctx *ctx = cache->ctx;
    struct fkv_device_stage *s = &cache->device->stages[cache->device->stage];
    int error = ctx->cuda->upload(ctx->device, to, s->memory, bytes, ctx->stream);
    if (!error) {
        error = ctx->cuda->event_record(ctx->device, s->event, ctx->stream);
    }
    s->used = true;
    cache->device->stage = (cache->device->stage + 1) % FKV_DEVICE_STAGES;
    return FKV_DEVICE_CHECK(ctx, error, "sending");
}

fkv_status fkv_device_patch(struct fkv_cache_object *cache, uint64_t where, uint64_t value,
                            uint64_t zero) {
    struct fkv_device_cache *d = cache->device;
    fkv_status status = patch_slots(cache, d->n_pending + 1);
    if (status != FKV_OK) {
        return status;
    }
    d->pending[d->n_pending++] = (struct fkv_cuda_patch){where, value, zero};
    return FKV_OK;
}

fkv_status fkv_device_flush(struct fkv_cache_object *cache) {
    struct fkv_device_cache *d = cache->device;
    struct fkv_ctx *ctx = cache->ctx;
    const size_t bytes = (size_t)d->n_pending * sizeof *d->pending;
    void *memory;
    if (!bytes) {
        return FKV_OK;
    }
    fkv_status status = fkv_device_reserve(cache, &d->patches, bytes);
    if (status == FKV_OK) {
        status = fkv_device_stage(cache, bytes, &memory);
    }
    if (status != FKV_OK) {
        return status;
    }
    memcpy(memory, d->pending, bytes);
    status = fkv_device_send(cache, d->patches.address, bytes);
    if (status == FKV_OK) {
        int error =
            ctx->cuda->patch(ctx->device, d->patches.address, (int)d->n_pending, ctx->stream);
        status = FKV_DEVICE_CHECK(ctx, error, "page tables");
    }
    d->n_pending = 0;
    return status;
}
