/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How much memory a prefill takes at its peak, as the system counts it: no more than one layer's dense keys and values,
 * the coded cache with its tails, and a constant. Each case is a process of its own, since a peak is one of the whole
 * process, and what it frees need not go back to the system.
 *
 *     test_peak one-step|steps|attended [LAYERS [TOKENS]]
 *
 * Keys and values are a small array that tokens and heads share by their strides: so the caller's own memory, of
 * which the library knows nothing, is next to nothing.
 */
#include "fkv/fkv.h"

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#define MIB (1024.0 * 1024.0)

/* Whatever else there is: a step's workspace and tables, threads, the pages of the library itself, what the allocator
 * keeps between its blocks. */
#define CONSTANT (4.0 * MIB)

enum { HQ = 32, HK = 8, DIM = 128, CHANNELS = HK * DIM };

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            printf("line %d: %s\n", __LINE__, #condition);                                         \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)
#define OK(call) CHECK((call) == FKV_OK)

/* ---- the process */

/* A line of /proc/self/status, in bytes; -1 if there is none. */
static double status_of(const char *name) {
    char line[256];
    double kib = -1;
    FILE *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, name, strlen(name)))
            kib = atof(line + strlen(name) + 1);
    if (f)
        fclose(f);
    return kib < 0 ? -1 : kib * 1024;
}

/* Makes the peak what is resident now. */
static void forget_peak(void) {
    FILE *f = fopen("/proc/self/clear_refs", "w");
    if (!f)
        return; /* it is that of the process then, which has done nothing large */
    fputs("5", f);
    fclose(f);
}

static double peak(void) {
    struct rusage usage;
    const double known = status_of("VmHWM");
    if (known >= 0)
        return known;
    CHECK(getrusage(RUSAGE_SELF, &usage) == 0);
    return (double)usage.ru_maxrss * 1024;
}

/* ---- a cache of about twelve times less */

struct setup {
    fkv_context *ctx;
    fkv_profile *profile;
    fkv_cache *cache;
    fkv_plan *plan;
    fkv_sequence id;
    double inv_freq[DIM / 2];
};

static void begin(struct setup *s, int layers, int threads) {
    fkv_context_params context;
    fkv_model_params model;
    fkv_codec_params codec;
    const size_t count = (size_t)layers * CHANNELS;
    uint8_t *k_bits = calloc(count, 1), *v_bits = calloc(count, 1);
    float *carrier = malloc(count * sizeof *carrier);
    OK(fkv_context_params_init(&context, sizeof context));
    context.threads = threads;
    OK(fkv_context_create(&context, &s->ctx));
    OK(fkv_model_params_init(&model, sizeof model));
    model.n_layers = layers;
    model.n_q_heads = HQ;
    model.n_kv_heads = HK;
    model.head_dim = DIM;
    model.rope_layout = FKV_ROPE_HALF_SPLIT;
    for (int j = 0; j < DIM / 2; j++)
        s->inv_freq[j] = pow(500000, -2.0 * j / DIM);
    model.inv_freq = s->inv_freq;
    model.inv_freq_count = DIM / 2;
    OK(fkv_codec_params_init(&codec, sizeof codec));
    /* bits where calibration puts them: a quarter of K's channels, most of V's */
    for (size_t i = 0; i < count; i++) {
        k_bits[i] = i % 64 == 0 ? 4 : i % 4 == 0 ? 2 : 0;
        v_bits[i] = i % 64 == 1 ? 4 : i % 3 != 0 ? 2 : 0;
        carrier[i] = (float)(i % 11) / 8 - 0.6f;
    }
    OK(fkv_profile_create_coded(s->ctx, &model, &codec, k_bits, v_bits, count, carrier, carrier,
                                count, &s->profile));
    free(k_bits);
    free(v_bits);
    free(carrier);
    OK(fkv_cache_create(s->ctx, s->profile, NULL, &s->cache));
    OK(fkv_plan_create(s->cache, &s->plan));
    OK(fkv_sequence_create(s->cache, NULL, &s->id));
}

static void end(struct setup *s) {
    OK(fkv_plan_destroy(s->plan));
    OK(fkv_cache_destroy(s->cache));
    OK(fkv_profile_destroy(s->profile));
    OK(fkv_context_destroy(s->ctx));
}

/* Token t, head h, channel d is element 64 t + 192 h + d of an array. */
static fkv_tensor shared(uint16_t *data, int64_t tokens, int heads) {
    fkv_tensor x;
    const int64_t shape[3] = {tokens, heads, DIM};
    OK(fkv_tensor_init(&x, data, FKV_DTYPE_F16, 3, shape));
    x.strides[0] = 64 * 2;
    x.strides[1] = 192 * 2;
    x.byte_length = (uint64_t)((tokens - 1) * x.strides[0] + (heads - 1) * x.strides[1] + 2 * DIM);
    return x;
}

/* f16 numbers between 1/2 and 2 of either sign, at random. */
static uint16_t *noise(int64_t tokens, int heads) {
    const size_t n = (size_t)(tokens * 64 + heads * 192 + DIM);
    uint16_t *x = malloc(n * sizeof *x);
    uint64_t state = 88172645463325252u;
    for (size_t i = 0; i < n; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        x[i] = (uint16_t)((state >> 20 & 0x87ff) | 0x3800);
    }
    return x;
}

static void update(struct setup *s, int64_t tokens) {
    fkv_batch batch;
    OK(fkv_batch_init(&batch, sizeof batch));
    batch.count = 1;
    batch.sequences = &s->id;
    batch.n_new = &tokens;
    OK(fkv_plan_update(s->plan, &batch));
}

static void read_stats(struct setup *s, fkv_stats *stats) {
    *stats = (fkv_stats){.struct_size = sizeof *stats};
    OK(fkv_cache_stats(s->cache, FKV_ALL_SEQUENCES, stats));
}

/* `peak_bytes` is the most over what the process had before, `counted` that of the context's own count. A layer has at
 * most `step` dense tokens at a time. With steps, blocks take the places of exact pages of another size, so that the C
 * library's allocator keeps gaps, 5 to 15 % of the whole: not the library's to count, but the process has them. */
static void judge(const char *what, int layers, int64_t step, double peak_bytes, double counted,
                  const fkv_stats *stats) {
    const double coded = (double)stats->bytes, layer = (double)stats->dense_bytes / layers;
    const double dense = layer * ((double)step / (double)stats->tokens);
    printf("%s: %d layers, %lld tokens, ratio %.2f: peak %.2f MiB (counted by the library %.2f)\n"
           "    one layer of %lld dense tokens %.2f + coded cache and tail %.2f = %.2f MiB;"
           " over it %.2f\n",
           what, layers, (long long)stats->tokens, stats->ratio, peak_bytes / MIB, counted / MIB,
           (long long)step, dense / MIB, coded / MIB, (dense + coded) / MIB,
           (peak_bytes - dense - coded) / MIB);
    CHECK(peak_bytes > 0.9 * (dense > coded ? dense : coded)); /* it was measured */
    CHECK(counted <= dense + coded + CONSTANT);
    CHECK(peak_bytes <= layer + coded + CONSTANT);
}

static double counted_peak(struct setup *s) {
    fkv_context_info info = {.struct_size = sizeof info};
    OK(fkv_context_query(s->ctx, &info));
    return (double)info.peak_bytes;
}

/* Layer after layer, without attention, whose time grows with the square of the tokens; all tokens in one step or in
 * several, of which each layer has its exact tokens at the same time. */
static void prefill(const char *what, int layers, int64_t tokens, int64_t step) {
    struct setup s;
    fkv_stats stats;
    uint16_t *x = noise(tokens, HK);
    forget_peak();
    const double before = status_of("VmRSS");
    begin(&s, layers, 2);
    for (int64_t at = 0; at < tokens; at += step) {
        const int64_t n = step < tokens - at ? step : tokens - at;
        fkv_tensor kv = shared(x + at * 64, n, HK);
        update(&s, n);
        for (int layer = 0; layer < layers; layer++)
            OK(fkv_append(s.plan, layer, &kv, &kv));
    }
    const double most = peak() - before, counted = counted_peak(&s);
    read_stats(&s, &stats);
    judge(what, layers, step, most, counted, &stats);
    end(&s);
    free(x);
}

static void attended(int layers, int64_t tokens) {
    struct setup s;
    fkv_stats stats;
    uint16_t *x = noise(tokens, HQ);
    uint16_t *o = malloc((size_t)tokens * HQ * DIM * sizeof *o);
    const int64_t shape[3] = {tokens, HQ, DIM};
    fkv_tensor q = shared(x, tokens, HQ), kv = shared(x, tokens, HK), out;
    OK(fkv_tensor_init(&out, o, FKV_DTYPE_F16, 3, shape));
    memset(o, 0, (size_t)out.byte_length);
    forget_peak();
    const double before = status_of("VmRSS");
    begin(&s, layers, 2);
    update(&s, tokens);
    for (int layer = 0; layer < layers; layer++)
        OK(fkv_append_attend(s.plan, layer, &q, &kv, &kv, &out, NULL));
    const double most = peak() - before, counted = counted_peak(&s);
    read_stats(&s, &stats);
    judge("attended", layers, tokens, most, counted, &stats);
    end(&s);
    free(o);
    free(x);
}

static bool is_sanitized(void) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return true;
#else
    return false;
#endif
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    const int layers = argc > 2 ? atoi(argv[2]) : 4;
    const int64_t tokens = argc > 3 ? atoll(argv[3]) : 32768;
    if (is_sanitized() || status_of("VmRSS") < 0) {
        printf("skipped: a sanitizer's memory is counted, or none\n");
        return 77;
    }
    if (!strcmp(what, "one-step"))
        prefill(what, layers, tokens, tokens);
    else if (!strcmp(what, "steps"))
        prefill(what, layers, tokens, 512);
    else if (!strcmp(what, "attended"))
        attended(argc > 2 ? layers : 2, argc > 3 ? tokens : 3072);
    else
        return 2;
    return 0;
}
