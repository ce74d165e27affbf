/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How much memory a prefill takes at its peak, as the system counts it: no more than one layer's dense keys and values,
 * the coded cache with its tails, and a constant. A process of its own, since a peak is one of the whole process.
 *
 *     test_peak [LAYERS [TOKENS]]     prints the numbers
 *
 * Keys and values are a small array that tokens and heads share by their strides: so the caller's own memory, of
 * which the library knows nothing, is next to nothing.
 */
#include "fkv/fkv.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include <cmocka.h>

#define MIB (1024.0 * 1024.0)

/* Whatever else there is: a step's workspace and tables, threads, the pages of the library itself, what the allocator
 * keeps between its blocks. */
#define CONSTANT (4.0 * MIB)

enum { HQ = 32, HK = 8, DIM = 128, CHANNELS = HK * DIM };

static int n_layers = 4;
static int64_t n_tokens = 32768;

static void OK(fkv_status status) {
    assert_int_equal(status, FKV_OK);
}

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
    assert_int_equal(getrusage(RUSAGE_SELF, &usage), 0);
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
    for (size_t i = 0; i < count;
         i++) { /* bits where calibration puts them: few channels of K, half of V */
        k_bits[i] = i % 64 == 0 ? 4 : i % 8 == 0 ? 2 : 0;
        v_bits[i] = i % 64 == 1 ? 4 : i % 2 == 0 ? 2 : 0;
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

static double held(struct setup *s, fkv_stats *stats) {
    *stats = (fkv_stats){.struct_size = sizeof *stats};
    OK(fkv_cache_stats(s->cache, FKV_ALL_SEQUENCES, stats));
    return (double)stats->bytes;
}

/* `peak_bytes` is the most over what the process had before, `counted` that of the context's own count. */
static void judge(const char *what, int layers, double peak_bytes, double counted,
                  const fkv_stats *stats) {
    const double dense = (double)stats->dense_bytes / layers, coded = (double)stats->bytes;
    printf("%s: %d layers, %lld tokens, ratio %.2f: peak %.1f MiB (counted by the library %.1f);\n"
           "    one dense layer %.1f + coded cache and tail %.1f = %.1f MiB; over it %.2f\n",
           what, layers, (long long)stats->tokens, stats->ratio, peak_bytes / MIB, counted / MIB,
           dense / MIB, coded / MIB, (dense + coded) / MIB, (peak_bytes - dense - coded) / MIB);
    assert_true(stats->ratio > 10 || stats->tokens < 16384);
    assert_true(counted <= dense + coded + CONSTANT);
    assert_true(peak_bytes > 0.9 * dense); /* it was measured */
    assert_true(peak_bytes <= dense + coded + CONSTANT);
}

static double counted_peak(struct setup *s) {
    fkv_context_info info = {.struct_size = sizeof info};
    OK(fkv_context_query(s->ctx, &info));
    return (double)info.peak_bytes;
}

/* Layer after layer, all tokens in one step or in several: a step is the same for all layers, so that with several
 * each layer's exact tokens are few at any time. */
static void prefill(int64_t step) {
    struct setup s;
    fkv_stats stats;
    uint16_t *x = noise(n_tokens, HK);
    forget_peak();
    const double before = status_of("VmRSS");
    begin(&s, n_layers, 2);
    for (int64_t at = 0; at < n_tokens; at += step) {
        const int64_t n = step < n_tokens - at ? step : n_tokens - at;
        fkv_tensor kv = shared(x + at * 64, n, HK);
        update(&s, n);
        for (int layer = 0; layer < n_layers; layer++)
            OK(fkv_append(s.plan, layer, &kv, &kv));
    }
    const double most = peak() - before, counted = counted_peak(&s);
    held(&s, &stats);
    if (step >= n_tokens) {
        judge("one step", n_layers, most, counted, &stats);
    } else {
        printf("steps of %lld: peak %.1f MiB, held %.1f MiB\n", (long long)step, most / MIB,
               (double)stats.bytes / MIB);
        const double dense = (double)stats.dense_bytes / (double)n_tokens * (double)step;
        assert_true(most <= dense + (double)stats.bytes + CONSTANT);
    }
    end(&s);
    free(x);
}

static void one_step(void **state) {
    (void)state;
    prefill(n_tokens);
}

static void several_steps(void **state) {
    (void)state;
    prefill(512);
}

/* With attention, whose time grows with the square of the tokens: fewer of them, the same constant. */
static void attended(void **state) {
    enum { LAYERS = 2, TOKENS = 3072 };
    (void)state;
    struct setup s;
    fkv_stats stats;
    uint16_t *x = noise(TOKENS, HQ);
    uint16_t *o = malloc((size_t)TOKENS * HQ * DIM * sizeof *o);
    const int64_t shape[3] = {TOKENS, HQ, DIM};
    fkv_tensor q = shared(x, TOKENS, HQ), kv = shared(x, TOKENS, HK), out;
    OK(fkv_tensor_init(&out, o, FKV_DTYPE_F16, 3, shape));
    memset(o, 0, (size_t)out.byte_length);
    forget_peak();
    const double before = status_of("VmRSS");
    begin(&s, LAYERS, 2);
    update(&s, TOKENS);
    for (int layer = 0; layer < LAYERS; layer++)
        OK(fkv_append_attend(s.plan, layer, &q, &kv, &kv, &out, NULL));
    const double most = peak() - before, counted = counted_peak(&s);
    held(&s, &stats);
    judge("attended", LAYERS, most, counted, &stats);
    end(&s);
    free(o);
    free(x);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(one_step), cmocka_unit_test(several_steps),
                                       cmocka_unit_test(attended)};
    n_layers = argc > 1 ? atoi(argv[1]) : n_layers;
    n_tokens = argc > 2 ? atoll(argv[2]) : n_tokens;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    printf("1..0 # SKIP a sanitizer's memory is not ours\n");
    return 77;
#endif
    if (status_of("VmRSS") < 0)
        return 77; /* no /proc */
    return cmocka_run_group_tests_name("peak", tests, NULL, NULL);
}
