/* SPDX-License-Identifier: Apache-2.0 */
#include "core/core.h"

#include <stdlib.h>
#include <string.h>

#define ALIGNMENT ((size_t)64)

static void *default_alloc(size_t bytes) {
    /* C11 wants a multiple of the alignment; bytes is at most PTRDIFF_MAX, so this cannot wrap */
    return aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) & ~(ALIGNMENT - 1));
}

/* Counts `bytes` before they exist, so that concurrent callers cannot pass the limit together. */
static bool reserve(struct fkv_heap *heap, uint64_t bytes, uint64_t *live) {
    uint64_t old = atomic_load_explicit(&heap->live, memory_order_relaxed);
    do {
        if (__builtin_add_overflow(old, bytes, live)) {
            return false;
        }
        if (heap->max_bytes != 0 && *live > heap->max_bytes) {
            return false;
        }
    } while (!atomic_compare_exchange_weak_explicit(&heap->live, &old, *live, memory_order_relaxed,
                                                    memory_order_relaxed));
    return true;
}

static void raise_peak(struct fkv_heap *heap, uint64_t live) {
    uint64_t peak = atomic_load_explicit(&heap->peak, memory_order_relaxed);
    while (peak < live &&
           !atomic_compare_exchange_weak_explicit(&heap->peak, &peak, live, memory_order_relaxed,
                                                  memory_order_relaxed)) {
    }
}

static void release(struct fkv_heap *heap, void *pointer, size_t bytes) {
    if (heap->free) {
        heap->free(heap->user, pointer, bytes);
    } else {
        free(pointer);
    }
}

void *fkv_heap_alloc(struct fkv_heap *heap, size_t bytes) {
    uint64_t live;
    if (bytes == 0 || bytes > PTRDIFF_MAX - ALIGNMENT || !reserve(heap, bytes, &live)) {
        return NULL;
    }
    void *p = heap->alloc ? heap->alloc(heap->user, bytes, ALIGNMENT) : default_alloc(bytes);
    if (p && (uintptr_t)p % ALIGNMENT != 0) {
        /* a caller's allocator that breaks its promise would crash aligned loads much later */
        release(heap, p, bytes);
        p = NULL;
    }
    if (!p) {
        atomic_fetch_sub_explicit(&heap->live, bytes, memory_order_relaxed);
        return NULL;
    }
    raise_peak(heap, live);
    return p;
}

void *fkv_heap_calloc(struct fkv_heap *heap, size_t bytes) {
    void *p = fkv_heap_alloc(heap, bytes);
    if (p) {
        memset(p, 0, bytes);
    }
    return p;
}

void fkv_heap_free(struct fkv_heap *heap, void *pointer, size_t bytes) {
    if (pointer) {
        release(heap, pointer, bytes);
        atomic_fetch_sub_explicit(&heap->live, bytes, memory_order_relaxed);
    }
}

fkv_status fkv_heap_status(struct fkv_heap *heap, size_t bytes) {
    uint64_t live = atomic_load_explicit(&heap->live, memory_order_relaxed);
    bool limited = heap->max_bytes != 0;
    return limited && (live > heap->max_bytes || bytes > heap->max_bytes - live) ? FKV_ERR_LIMIT
                                                                                 : FKV_ERR_NOMEM;
}
