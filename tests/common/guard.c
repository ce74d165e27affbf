/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "guard.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define FRONT 256

#define PATTERN 0x7fa5a5a5u

static unsigned char fill(const unsigned char *p) {
    return (unsigned char)(PATTERN >> (uintptr_t)p % 4 * 8);
}

void guard_fill(void *p, size_t bytes) {
    unsigned char *to = p, *end = to + bytes;
    const uint32_t word = PATTERN;

    for (; to < end && (uintptr_t)to % 4 != 0; to++)
        *to = fill(to);
    for (; end - to >= 4; to += 4)
        memcpy(to, &word, 4);
    for (; to < end; to++)
        *to = fill(to);
}

void *guard_alloc(struct guard *g, size_t bytes, size_t slack) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t usable = (FRONT + bytes + slack + page - 1) / page * page;
    void *base =
        mmap(NULL, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (base == MAP_FAILED || mprotect((char *)base + usable, page, PROT_NONE) != 0) {
        fprintf(stderr, "guard_alloc: no memory for %zu bytes\n", bytes);
        exit(2);
    }
    g->base = base;
    g->usable = usable;
    g->mapped = usable + page;
    g->bytes = bytes;
    g->data = g->base + usable - slack - bytes;
    guard_fill(g->base, usable);
    return g->data;
}

bool guard_untouched(const void *p, const void *limit) {
    const unsigned char *at = p, *end = limit;
    const uint32_t word = PATTERN;

    for (; at < end && (uintptr_t)at % 4 != 0; at++) {
        if (*at != fill(at))
            return false;
    }
    for (; end - at >= 4; at += 4) {
        if (memcmp(at, &word, 4) != 0)
            return false;
    }
    for (; at < end; at++) {
        if (*at != fill(at))
            return false;
    }
    return true;
}

bool guard_intact(const struct guard *g) {
    const unsigned char *data = g->data;

    return guard_untouched(g->base, data) && guard_untouched(data + g->bytes, g->base + g->usable);
}

void guard_free(struct guard *g) {
    munmap(g->base, g->mapped);
    memset(g, 0, sizeof *g);
}
