/* SPDX-License-Identifier: Apache-2.0 */
/* What every part of fkv-needle uses: exit codes, error texts, time, random numbers, files. */
#ifndef NEEDLE_COMMON_H
#define NEEDLE_COMMON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <fkv/fkv.h>

/* Functions that can fail return one of these; the program exits with it. */
enum needle_code {
    NEEDLE_OK = 0,
    NEEDLE_FAILED = 1,       /* the library, the memory or an output file failed */
    NEEDLE_BAD_INPUT = 2,    /* options, model, profile or text are not usable */
    NEEDLE_INTERRUPTED = 130 /* SIGINT, as shells report it */
};

/* Text of the error that a function returned. */
struct needle_error {
    char text[1024];
};

/* Writes the text and returns `code`. */
int needle_fail(struct needle_error *error, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* The same for a failed call of libfkv: adds the status and the context's message. */
int needle_fail_fkv(struct needle_error *error, int code, fkv_context *ctx, fkv_status status,
                    const char *what);

/* malloc(count * size) aligned for vector code; NULL if it overflows or there is no memory. */
void *needle_alloc(size_t count, size_t size);

/* Seconds of a clock that never goes back. */
double needle_seconds(void);
/* Largest memory this process had, in bytes. */
uint64_t needle_peak_rss(void);

/* splitmix64: streams of one seed are independent of how many numbers others drew. */
struct needle_random {
    uint64_t state;
};
struct needle_random needle_random_stream(uint64_t seed, uint64_t stream);
uint64_t needle_random_u64(struct needle_random *random);
/* In [0, n); n at least 1. */
size_t needle_random_below(struct needle_random *random, size_t n);
/* In [0, 1). */
double needle_random_unit(struct needle_random *random);

/* Reads a regular file of at most `limit` bytes; *bytes is to be freed. */
int needle_read_file(const char *path, size_t limit, char **bytes, size_t *count,
                     struct needle_error *error);

/* Set by SIGINT; long work looks at it and returns NEEDLE_INTERRUPTED. */
bool needle_interrupted(void);
void needle_catch_interrupt(void);

#endif
