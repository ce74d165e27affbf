/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A handle is a number, never an address:
 *
 *     generation : 41 | kind : 3 | index : 20
 *
 * The table's entry has the same word with the number of users in place of the index, so that one
 * compare-exchange both checks a handle and takes a user. Kind 0 is a free entry. An entry's generation
 * rises when it is freed: an old handle never matches again. There is no lock, hence nothing that a
 * fork() can leave locked.
 */
#include "core/core.h"

#include <stdlib.h>

#define LOW_BITS 20
#define LOW_MASK ((UINT64_C(1) << LOW_BITS) - 1)
#define KIND_BITS 3
#define KIND_MASK ((UINT64_C(1) << KIND_BITS) - 1)
#define GENERATION (UINT64_C(1) << (LOW_BITS + KIND_BITS))

#define CHUNK_ENTRIES 256u
#define N_CHUNKS ((uint32_t)(LOW_MASK + 1) / CHUNK_ENTRIES)

_Static_assert(sizeof(uintptr_t) == 8, "a handle needs 64 bits");

struct entry {
    _Atomic uint64_t state;
    void *object; /* written before state names it, read only with a user or after the close */
    _Atomic uint32_t next_free;
};

/* Chunks never move and are never freed, so that a stale handle can be looked up safely. */
static struct entry first_chunk[CHUNK_ENTRIES];
static _Atomic(struct entry *) chunks[N_CHUNKS];
static _Atomic uint32_t n_used; /* entries that were ever handed out */
/* Stack of free entries: index + 1 in the low half (0: empty), a count of changes in the high half, which
 * keeps a slow pop from succeeding after others popped and pushed the same entry. */
static _Atomic uint64_t free_head;

static struct entry *entry_at(uint32_t index) {
    uint32_t chunk = index / CHUNK_ENTRIES;
    struct entry *base =
        chunk == 0 ? first_chunk : atomic_load_explicit(&chunks[chunk], memory_order_acquire);
    return base ? base + index % CHUNK_ENTRIES : NULL;
}

static bool make_chunk(uint32_t chunk) {
    if (chunk == 0 || atomic_load_explicit(&chunks[chunk], memory_order_acquire)) {
        return true;
    }
    /* shared by all contexts, so no context's heap can own it */
    struct entry *fresh = calloc(CHUNK_ENTRIES, sizeof *fresh);
    struct entry *expected = NULL;
    if (fresh &&
        !atomic_compare_exchange_strong_explicit(&chunks[chunk], &expected, fresh,
                                                 memory_order_acq_rel, memory_order_acquire)) {
        free(fresh);
        return true;
    }
    return fresh != NULL;
}

static bool pop_free(uint32_t *index) {
    uint64_t head = atomic_load_explicit(&free_head, memory_order_acquire);
    uint64_t next;
    do {
        uint32_t top = (uint32_t)head;
        if (top == 0) {
            return false;
        }
        *index = top - 1;
        uint32_t below = atomic_load_explicit(&entry_at(*index)->next_free, memory_order_relaxed);
        next = ((head >> 32) + 1) << 32 | below;
    } while (!atomic_compare_exchange_weak_explicit(&free_head, &head, next, memory_order_acq_rel,
                                                    memory_order_acquire));
    return true;
}

static void push_free(uint32_t index, struct entry *e) {
    uint64_t head = atomic_load_explicit(&free_head, memory_order_relaxed);
    uint64_t next;
    do {
        atomic_store_explicit(&e->next_free, (uint32_t)head, memory_order_relaxed);
        next = ((head >> 32) + 1) << 32 | (index + 1);
    } while (!atomic_compare_exchange_weak_explicit(&free_head, &head, next, memory_order_release,
                                                    memory_order_relaxed));
}

static bool take_unused(uint32_t *index) {
    uint32_t used = atomic_load_explicit(&n_used, memory_order_relaxed);
    do {
        if (used > LOW_MASK || !make_chunk(used / CHUNK_ENTRIES)) {
            return false;
        }
    } while (!atomic_compare_exchange_weak_explicit(&n_used, &used, used + 1, memory_order_relaxed,
                                                    memory_order_relaxed));
    *index = used;
    return true;
}

void *fkv_handle_create(enum fkv_kind kind, void *object) {
    uint32_t index;
    if (!pop_free(&index) && !take_unused(&index)) {
        return NULL;
    }
    struct entry *e = entry_at(index);
    uint64_t state = atomic_load_explicit(&e->state, memory_order_relaxed);
    state |= (uint64_t)kind << LOW_BITS;
    e->object = object;
    atomic_store_explicit(&e->state, state, memory_order_release);
    return (void *)(uintptr_t)(state | index);
}

/* The entry that a handle of this kind would have, living or not. */
static struct entry *find(enum fkv_kind kind, const void *handle, uint64_t *tag) {
    uint64_t word = (uintptr_t)handle;
    if ((word >> LOW_BITS & KIND_MASK) != (uint64_t)kind) {
        return NULL;
    }
    *tag = word & ~LOW_MASK;
    return entry_at((uint32_t)(word & LOW_MASK));
}

void *fkv_handle_acquire(enum fkv_kind kind, const void *handle) {
    uint64_t tag;
    struct entry *e = find(kind, handle, &tag);
    if (!e) {
        return NULL;
    }
    uint64_t state = atomic_load_explicit(&e->state, memory_order_relaxed);
    do {
        if ((state & ~LOW_MASK) != tag || (state & LOW_MASK) == LOW_MASK) {
            return NULL;
        }
    } while (!atomic_compare_exchange_weak_explicit(&e->state, &state, state + 1,
                                                    memory_order_acquire, memory_order_relaxed));
    return e->object;
}

void fkv_handle_release(const void *handle) {
    struct entry *e = entry_at((uint32_t)((uintptr_t)handle & LOW_MASK));
    atomic_fetch_sub_explicit(&e->state, 1, memory_order_release);
}

fkv_status fkv_handle_close(enum fkv_kind kind, const void *handle, void **object) {
    uint64_t tag;
    struct entry *e = find(kind, handle, &tag);
    if (!e) {
        return FKV_ERR_HANDLE;
    }
    uint64_t ended = (tag & ~(KIND_MASK << LOW_BITS)) + GENERATION;
    uint64_t state = tag;
    while (!atomic_compare_exchange_weak_explicit(&e->state, &state, ended, memory_order_acq_rel,
                                                  memory_order_relaxed)) {
        if ((state & ~LOW_MASK) != tag) {
            return FKV_ERR_HANDLE;
        }
        if (state != tag) {
            return FKV_ERR_BUSY;
        }
    }
    *object = e->object;
    push_free((uint32_t)((uintptr_t)handle & LOW_MASK), e);
    return FKV_OK;
}
