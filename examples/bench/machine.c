/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "bench.h"

#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

double bench_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void bench_fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("fkv-bench: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

void bench_check(fkv_context *ctx, fkv_status status, const char *what) {
    char message[512] = "";
    if (status == FKV_OK)
        return;
    if (ctx)
        fkv_context_message(ctx, message, sizeof(message), NULL);
    bench_fail("%s: %s%s%s", what, fkv_status_string(status), message[0] ? ": " : "", message);
}

void *bench_alloc(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (!p)
        bench_fail("no memory for %zu times %zu bytes", count, size);
    return p;
}

/* ---- random numbers */

uint64_t bench_random_next(struct bench_random *r) {
    uint64_t z = (r->state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

void bench_random_fill(struct bench_random *r, float *x, size_t n) {
    /* a uniform 16-bit number has deviation 65536 / sqrt(12); of four of them twice that */
    const float mean = 4.0f * 32767.5f;
    const float scale = sqrtf(12.0f) / (2.0f * 65536.0f);
    for (size_t i = 0; i < n; i++) {
        uint64_t z = bench_random_next(r);
        uint64_t sum = (z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48);
        x[i] = ((float)sum - mean) * scale;
    }
}

/* ---- memory */

static bool read_line(const char *path, char *line, int bytes) {
    FILE *f = fopen(path, "r");
    bool ok = f && fgets(line, bytes, f);
    if (f)
        fclose(f);
    return ok;
}

/* Bytes of the highest cache of a processor, if it is the first of those that share it. */
static uint64_t own_cache_bytes(long cpu) {
    uint64_t bytes = 0;
    for (int index = 0;; index++) {
        char path[128], line[64], unit = 0;
        uint64_t size = 0;
        int base = snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%ld/cache/index%d/",
                            cpu, index);
        snprintf(path + base, sizeof(path) - (size_t)base, "size");
        if (!read_line(path, line, sizeof(line)) || sscanf(line, "%" SCNu64 "%c", &size, &unit) < 1)
            return bytes;
        size <<= unit == 'K' ? 10 : unit == 'M' ? 20 : 0;
        snprintf(path + base, sizeof(path) - (size_t)base, "shared_cpu_list");
        /* Levels come in ascending order; the last one read counts. */
        bytes = read_line(path, line, sizeof(line)) && strtol(line, NULL, 10) == cpu ? size : 0;
    }
}

uint64_t bench_cache_bytes(void) {
    uint64_t bytes = 0;
    long cpus = sysconf(_SC_NPROCESSORS_CONF);
    for (long cpu = 0; cpu < cpus; cpu++)
        bytes += own_cache_bytes(cpu);
    return bytes ? bytes : (uint64_t)32 << 20;
}

uint64_t bench_memory_bytes(void) {
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return pages > 0 && page > 0 ? (uint64_t)pages * (uint64_t)page : (uint64_t)4 << 30;
}

/* ---- read bandwidth */

struct reader {
    pthread_t thread;
    pthread_barrier_t *barrier;
    const uint64_t *words;
    size_t count;
    int passes;
    double *start, *stop; /* of each pass */
    uint64_t sum;
};

static uint64_t sum_words(const uint64_t *w, size_t n) {
    uint64_t a[8] = {0};
    for (size_t i = 0; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++)
            a[j] += w[i + (size_t)j];
    return a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
}

static void *read_passes(void *arg) {
    struct reader *r = arg;
    /* Written by the thread that reads it, so that it lies in its own memory on NUMA machines. */
    memset((void *)(uintptr_t)r->words, 1, r->count * sizeof(uint64_t));
    for (int pass = 0; pass < r->passes; pass++) {
        pthread_barrier_wait(r->barrier);
        r->start[pass] = bench_now();
        r->sum += sum_words(r->words, r->count);
        r->stop[pass] = bench_now();
    }
    return NULL;
}

double bench_read_bandwidth(int threads, size_t bytes) {
    enum { PASSES = 7 };
    pthread_barrier_t barrier;
    struct reader *readers = bench_alloc((size_t)threads, sizeof(*readers));
    double *times = bench_alloc((size_t)threads * 2 * PASSES, sizeof(*times));
    size_t count = bytes / (size_t)threads / 4096 * 512;
    size_t mapped = count * sizeof(uint64_t) * (size_t)threads;
    uint64_t *words =
        mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    double best = 0;
    uint64_t sum = 0;

    if (words == MAP_FAILED)
        bench_fail("no memory to measure the read bandwidth in");
    madvise(words, mapped, MADV_HUGEPAGE);
    pthread_barrier_init(&barrier, NULL, (unsigned)threads);
    for (int i = 0; i < threads; i++) {
        struct reader *r = &readers[i];
        r->barrier = &barrier;
        r->words = words + count * (size_t)i;
        r->count = count;
        r->passes = PASSES;
        r->start = times + 2 * PASSES * i;
        r->stop = r->start + PASSES;
        if (pthread_create(&r->thread, NULL, read_passes, r))
            bench_fail("no thread to measure the read bandwidth with");
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(readers[i].thread, NULL);
        sum += readers[i].sum;
    }
    for (int pass = 0; pass < PASSES; pass++) {
        double start = readers[0].start[pass], stop = readers[0].stop[pass];
        for (int i = 1; i < threads; i++) {
            start = fmin(start, readers[i].start[pass]);
            stop = fmax(stop, readers[i].stop[pass]);
        }
        best = fmax(best, (double)mapped / (stop - start));
    }
    /* Looking at the sums keeps the compiler from leaving the reading out. */
    if (sum != PASSES * (uint64_t)0x0101010101010101u * (mapped / sizeof(uint64_t)))
        bench_fail("memory was read wrongly");
    pthread_barrier_destroy(&barrier);
    munmap(words, mapped);
    free(times);
    free(readers);
    return best;
}
