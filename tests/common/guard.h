/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory that notices when it is overrun: a filled zone in front, and behind the data a page that cannot
 * be touched at all, so that even a read one element too far ends the program.
 */
#ifndef FKV_TESTS_GUARD_H
#define FKV_TESTS_GUARD_H

#include <stdbool.h>
#include <stddef.h>

struct guard {
    void *data;
    size_t bytes;
    unsigned char *base;
    size_t usable; /* bytes between base and the protected page */
    size_t mapped;
};

/*
 * Everything is filled at first, the data and all round it, with 0x7fa5a5a5 at each multiple of 4: a
 * signalling NaN, which no arithmetic leaves as it is. `slack` bytes lie between the data and the
 * protected page. Ends the program if there is no memory.
 */
void *guard_alloc(struct guard *g, size_t bytes, size_t slack);
/* Fills as at first, so that what is left over can be checked with guard_untouched(). */
void guard_fill(void *p, size_t bytes);
/* false if a byte outside the data has changed */
bool guard_intact(const struct guard *g);
/* false if a byte in [p, limit) has changed since guard_alloc() */
bool guard_untouched(const void *p, const void *limit);
void guard_free(struct guard *g);

#endif /* FKV_TESTS_GUARD_H */
