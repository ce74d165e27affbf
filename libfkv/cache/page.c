/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pages and their holders. The number of holders is the last word of the pad: kernels may read the pad, as
 * any memory behind their data, but nothing of it becomes part of a result, and they never write there. So a
 * count costs no memory, and data keep the alignment of the allocation.
 */
#include "cache/cache.h"

#include <string.h>

/* Sizes are multiples of 8, so that the word is aligned. */
static uint64_t *holders(const void *page, size_t bytes) {
    return (uint64_t *)(void *)((char *)(uintptr_t)page + bytes - sizeof(uint64_t));
}

void *fkv_page_new(struct fkv_cache_object *cache, struct fkv_seq *seq, enum fkv_class class,
                   size_t bytes) {
    void *page = fkv_cache_alloc(cache, seq, class, bytes);
    if (page)
        *holders(page, bytes) = 1;
    return page;
}

void *fkv_page_copy(struct fkv_cache_object *cache, struct fkv_seq *seq, enum fkv_class class,
                    const void *page, size_t bytes) {
    void *copy = fkv_page_new(cache, seq, class, bytes);
    if (copy)
        memcpy(copy, page, bytes - FKV_PAD);
    return copy;
}

void *fkv_page_share(struct fkv_cache_object *cache, struct fkv_seq *seq, enum fkv_class class,
                     void *page, size_t bytes) {
    if (!page)
        return NULL;
    if (++*holders(page, bytes) == 2)
        cache->bytes_shared += bytes;
    seq->account.bytes[class] += bytes;
    return page;
}

void fkv_page_drop(struct fkv_cache_object *cache, struct fkv_seq *seq, enum fkv_class class,
                   void *page, size_t bytes) {
    if (!page)
        return;
    uint64_t left = --*holders(page, bytes);
    if (!left) {
        fkv_cache_free(cache, seq, class, page, bytes);
        return;
    }
    if (left == 1)
        cache->bytes_shared -= bytes;
    seq->account.bytes[class] -= bytes;
}

bool fkv_page_shared(const void *page, size_t bytes) {
    return page && *holders(page, bytes) > 1;
}
