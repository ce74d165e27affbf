/* SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L

#include "common.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>

int needle_fail(struct needle_error *error, int code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(error->text, sizeof error->text, format, args);
    va_end(args);
    return code;
}

int needle_fail_fkv(struct needle_error *error, int code, fkv_context *ctx, fkv_status status,
                    const char *what) {
    char detail[512] = "";
    fkv_context_message(ctx, detail, sizeof detail, NULL);
    return needle_fail(error, code, "%s: %s%s%s", what, fkv_status_string(status),
                       detail[0] ? ": " : "", detail);
}

void *needle_alloc(size_t count, size_t size) {
    const size_t align = 64;
    if (size != 0 && count > (SIZE_MAX - align) / size) {
        return NULL;
    }
    size_t bytes = (count * size + align - 1) / align * align;
    return aligned_alloc(align, bytes ? bytes : align);
}

double needle_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

uint64_t needle_peak_rss(void) {
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? (uint64_t)usage.ru_maxrss * 1024 : 0;
}

uint64_t needle_random_u64(struct needle_random *random) {
    uint64_t z = (random->state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

struct needle_random needle_random_stream(uint64_t seed, uint64_t stream) {
    struct needle_random a = {seed};
    struct needle_random b = {needle_random_u64(&a) + stream};
    return (struct needle_random){needle_random_u64(&b)};
}

size_t needle_random_below(struct needle_random *random, size_t n) {
    return (size_t)(needle_random_u64(random) % n);
}

double needle_random_unit(struct needle_random *random) {
    return (double)(needle_random_u64(random) >> 11) * 0x1p-53;
}

static int read_open_file(FILE *file, const char *path, size_t limit, char **bytes, size_t *count,
                          struct needle_error *error) {
    struct stat status;
    if (fstat(fileno(file), &status) != 0 || !S_ISREG(status.st_mode)) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "%s: not a regular file", path);
    }
    if ((uint64_t)status.st_size > limit) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "%s: larger than %zu bytes", path, limit);
    }
    size_t size = (size_t)status.st_size;
    char *data = malloc(size + 1);
    if (!data) {
        return needle_fail(error, NEEDLE_FAILED, "%s: out of memory", path);
    }
    if (fread(data, 1, size, file) != size) {
        free(data);
        return needle_fail(error, NEEDLE_BAD_INPUT, "%s: could not be read", path);
    }
    data[size] = '\0';
    *bytes = data;
    *count = size;
    return NEEDLE_OK;
}

int needle_read_file(const char *path, size_t limit, char **bytes, size_t *count,
                     struct needle_error *error) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "%s: %s", path, strerror(errno));
    }
    int code = read_open_file(file, path, limit, bytes, count, error);
    fclose(file);
    return code;
}

static volatile sig_atomic_t interrupted;

static void on_interrupt(int number) {
    (void)number;
    interrupted = 1;
}

bool needle_interrupted(void) {
    return interrupted != 0;
}

void needle_catch_interrupt(void) {
    /* RESETHAND: a second Ctrl-C ends the program at once. */
    struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = SA_RESETHAND | SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
}
