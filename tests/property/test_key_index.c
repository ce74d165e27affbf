/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A cache with an index of keys selects what one without does, and attends alike, bit for bit: for keys of every kind,
 * in decoding and in chunks, with forks and crops on the way, for any threads and batches.
 */
#include "core/core.h"
#include "random.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define MAX_SPANS 512
#define MOST_SEQS 5

static struct random rng;

static void ok(fkv_status status, const char *what) {
    if (status != FKV_OK)
        fail_msg("%s: %s", what, fkv_status_string(status));
}
#define OK(call) ok(call, #call)

static int runs(int n) {
    return random_quick() ? (n + 3) / 4 : n;
}

/* Kinds of keys: what a search could get wrong. */
enum kind {
    NORMAL,
    DRIFT,       /* a walk: neighbours are alike, as in captured keys */
    FEW,         /* a few different keys, each many times, as keys of a first layer are */
    EQUAL,       /* all the same */
    WHOLE,       /* small whole numbers: products full of ties */
    ALTERNATING, /* of sign */
    OUTLIER,     /* one channel is a thousand times the others */
    RARE,        /* one token is */
    DENORMAL,
    MIXED_SIZES, /* blocks of other sizes, up to what overflows in a sum */
    INFINITE,    /* some values; let pass */
    ODD,         /* some NaN; let pass */
    KINDS
};

struct setting {
    int kv_heads, group, dim, n_sink, n_local, block;
    fkv_dtype storage;
    fkv_cpu_level level;
    enum kind kind;
    fkv_select_params select;
    uint64_t seed;
};

struct side {
    fkv_context *ctx;
    fkv_profile *profile;
    fkv_cache *cache;
    fkv_plan *plan;
    fkv_sequence ids[MOST_SEQS];
};

static struct setting draw(enum kind kind) {
    static const int dims[] = {8, 16, 24, 40, 64, 128};
    struct setting s = {.kv_heads = (int)random_int(&rng, 1, 3),
                        .group = (int)random_int(&rng, 1, 8),
                        .dim = dims[random_int(&rng, 0, 5)],
                        .n_sink = (int)random_int(&rng, 0, 1) * (int)random_int(&rng, 1, 40),
                        .n_local = (int)random_int(&rng, 0, 200),
                        .block = 128 << random_int(&rng, 0, 1),
                        .storage = (fkv_dtype)random_int(&rng, 1, 3),
                        .level = FKV_CPU_BEST,
                        .kind = kind,
                        .seed = random_next(&rng)};
    if (kind >= DENORMAL && s.storage == FKV_DTYPE_F16)
        s.storage = FKV_DTYPE_BF16;
    fkv_select_params_init(&s.select, sizeof s.select);
    s.select.n_global = (int)random_int(&rng, 0, 50);
    s.select.n_local = (int)random_int(&rng, 20, 150);
    s.select.span = (int)random_int(&rng, 1, 4);
    s.select.top_k =
        random_chance(&rng, .1) ? (int)random_int(&rng, 20, 256) : (int)random_int(&rng, 1, 8);
    s.select.clip = (int)random_int(&rng, 1, 60);
    s.select.chunk = (int)random_int(&rng, 1, s.select.n_local);
    return s;
}

/* Value i of a token's key or query, nearly normal: the same whenever it is asked for. */
static double noise(const struct setting *s, int64_t t, int64_t i) {
    uint64_t x = s->seed + (uint64_t)t * UINT64_C(0x9e3779b97f4a7c15) +
                 (uint64_t)i * UINT64_C(0xd1342543de82ef95);
    x = (x ^ x >> 32) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 29) * UINT64_C(0x94d049bb133111eb);
    x ^= x >> 32;
    double sum = 0;
    for (int j = 0; j < 64; j += 16)
        sum += (double)(x >> j & 65535);
    return (sum / 65535 - 2) * 1.7;
}

static float key(const struct setting *s, int64_t t, int h, int d) {
    const int64_t i = h * 256 + d;
    const double x = noise(s, t, i);
    switch (s->kind) {
    case DRIFT:
        return (float)(3 * sin(.01 * (double)t + (double)i) + 2 * cos((double)i) + .3 * x);
    case FEW:
        return (float)noise(s, (t * 7) % 11, i);
    case EQUAL:
        return (float)sin((double)i);
    case WHOLE:
        return (float)floor(1.3 * x);
    case ALTERNATING:
        return (float)((t % 2 ? 1 : -1) * (1 + d % 3));
    case OUTLIER:
        return (float)(d == 3 ? 1000 * x : x);
    case RARE:
        return (float)(t % 997 == 300 ? 1000 * x : x);
    case DENORMAL:
        return (float)(x * 0x1p-130);
    case MIXED_SIZES:
        return (float)(x * pow(2, (double)(t / 300 * 37 % 60)) * (t % 500 == 77 ? 0x1p50 : 1));
    case INFINITE:
        return t % 211 == 90 && d == h ? (x > 0 ? INFINITY : -INFINITY) : (float)x;
    case ODD:
        return t % 307 == 5 && d == 2 ? NAN : (float)x;
    default:
        return (float)x;
    }
}

static float query(const struct setting *s, int64_t t, int h, int d) {
    const double x = noise(s, t, 1 << 20 | (h * 256 + d));
    if (s->kind == WHOLE)
        return (float)floor(x);
    if (s->kind == DENORMAL && t % 3 == 0)
        return (float)(x * 0x1p-40);
    if (s->kind == MIXED_SIZES && t % 5 == 0)
        return (float)(x * 0x1p60);
    if (s->kind == OUTLIER && t % 2)
        return (float)(d == 3 ? .001 * x : x);
    if (s->kind == ODD && t % 17 == 0 && d == 1)
        return NAN;
    return (float)x;
}

static struct side open_side(const struct setting *s, bool indexed, int threads) {
    struct side w;
    fkv_context_params params;
    fkv_codec_params codec;
    fkv_cache_params cache;
    fkv_model_params model;
    OK(fkv_context_params_init(&params, sizeof params));
    params.threads = threads;
    params.cpu_level = s->level;
    params.flags = s->kind >= MIXED_SIZES ? FKV_CONTEXT_PROPAGATE_NONFINITE : 0;
    OK(fkv_context_create(&params, &w.ctx));
    struct fkv_ctx *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, w.ctx);
    ctx->sift_from = 0; /* short middles, too */
    fkv_handle_release(w.ctx);
    OK(fkv_model_params_init(&model, sizeof model));
    model.n_layers = 1;
    model.n_q_heads = s->kv_heads * s->group;
    model.n_kv_heads = s->kv_heads;
    model.head_dim = s->dim;
    OK(fkv_codec_params_init(&codec, sizeof codec));
    codec.storage_dtype = s->storage;
    codec.n_sink = s->n_sink;
    codec.n_local = s->n_local;
    codec.block = s->block;
    codec.domain = FKV_DOMAIN_UNROTATED;
    OK(fkv_profile_create_uniform(w.ctx, &model, &codec, FKV_CHANNEL_EXACT, &w.profile));
    OK(fkv_cache_params_init(&cache, sizeof cache));
    cache.flags = indexed ? FKV_CACHE_KEY_INDEX : 0;
    OK(fkv_cache_create(w.ctx, w.profile, &cache, &w.cache));
    OK(fkv_plan_create(w.cache, &w.plan));
    OK(fkv_plan_select(w.plan, &s->select));
    return w;
}

static void close_side(struct side *w) {
    OK(fkv_plan_destroy(w->plan));
    OK(fkv_cache_destroy(w->cache));
    OK(fkv_profile_destroy(w->profile));
    OK(fkv_context_destroy(w->ctx));
}

/* One step of n sequences, the tokens of which are first[i].. of the setting's (shift[i] later, in forks). */
static float *step(struct side *w, const struct setting *s, int n, const fkv_sequence *ids,
                   const int64_t *first, const int64_t *shift, const int64_t *count) {
    const int hq = s->kv_heads * s->group;
    int64_t all = 0, at = 0;
    for (int i = 0; i < n; i++)
        all += count[i];
    const int64_t shape[] = {all, hq, s->dim}, kv[] = {all, s->kv_heads, s->dim};
    float *x[3], *out = calloc((size_t)(all * hq * s->dim + 1), sizeof *out);
    for (int i = 0; i < 3; i++)
        x[i] = malloc((size_t)(all * hq * s->dim + 1) * sizeof(float));
    for (int i = 0; i < n; i++)
        for (int64_t t = first[i] + shift[i]; t < first[i] + shift[i] + count[i]; t++, at++) {
            for (int h = 0; h < hq; h++)
                for (int d = 0; d < s->dim; d++)
                    x[0][(at * hq + h) * s->dim + d] = query(s, t, h, d);
            for (int h = 0; h < s->kv_heads; h++)
                for (int d = 0; d < s->dim; d++) {
                    x[1][(at * s->kv_heads + h) * s->dim + d] = key(s, t, h, d);
                    x[2][(at * s->kv_heads + h) * s->dim + d] = (float)sin((double)(t + d));
                }
        }
    fkv_tensor q, k, v, o;
    fkv_batch batch;
    OK(fkv_batch_init(&batch, sizeof batch));
    batch.count = n;
    batch.sequences = ids;
    batch.n_new = count;
    OK(fkv_plan_update(w->plan, &batch));
    OK(fkv_tensor_init(&q, x[0], FKV_DTYPE_F32, 3, shape));
    OK(fkv_tensor_init(&k, x[1], FKV_DTYPE_F32, 3, kv));
    OK(fkv_tensor_init(&v, x[2], FKV_DTYPE_F32, 3, kv));
    OK(fkv_tensor_init(&o, out, FKV_DTYPE_F32, 3, shape));
    OK(fkv_append_attend(w->plan, 0, &q, &k, &v, &o, NULL));
    for (int i = 0; i < 3; i++)
        free(x[i]);
    return out;
}

static int64_t spans_of(struct side *w, int i, int64_t *spans) {
    fkv_selection got = {.struct_size = sizeof got};
    OK(fkv_plan_selection(w->plan, i, &got, spans, 2 * MAX_SPANS));
    return got.spans;
}

static int64_t found; /* spans that were compared */

/* The same step on both sides. */
static void both(struct side *w, const struct setting *s, int n, const int64_t *first,
                 const int64_t *shift, const int64_t *count) {
    int64_t all = 0, spans[2][2 * MAX_SPANS];
    float *out[2];
    for (int i = 0; i < n; i++)
        all += count[i];
    for (int i = 0; i < 2; i++)
        out[i] = step(&w[i], s, n, w[i].ids, first, shift, count);
    if (memcmp(out[0], out[1], (size_t)(all * s->kv_heads * s->group * s->dim) * sizeof(float)) !=
        0)
        fail_msg("kind %d, %d x %d, dim %d, type %d, top_k %d: outputs differ at token %lld",
                 s->kind, s->kv_heads, s->group, s->dim, s->storage, s->select.top_k,
                 (long long)first[0]);
    for (int i = 0; i < n; i++) {
        if (!count[i])
            continue;
        const int64_t a = spans_of(&w[0], i, spans[0]), b = spans_of(&w[1], i, spans[1]);
        if (a != b || memcmp(spans[0], spans[1], (size_t)(2 * a) * sizeof(int64_t)) != 0)
            fail_msg("kind %d, %d x %d, dim %d, type %d, top_k %d: spans differ at token %lld",
                     s->kind, s->kv_heads, s->group, s->dim, s->storage, s->select.top_k,
                     (long long)first[0]);
        found += a;
    }
    free(out[0]);
    free(out[1]);
}

/* A long prefill in pieces, then some tokens one by one. */
static void one_sequence(void **state) {
    (void)state;
    for (int i = 0; i < runs(2 * KINDS); i++) {
        struct setting s = draw((enum kind)(i % KINDS));
        struct side w[2];
        const int64_t zero = 0;
        int64_t tokens = random_int(&rng, 600, 1800);
        if (i % 5 == 4) {
            tokens = 400; /* the reference is slow */
            s.dim = s.dim % 40;
            s.dim = s.dim ? s.dim : 8;
            s.level = (fkv_cpu_level)random_int(&rng, FKV_CPU_REFERENCE, FKV_CPU_AVX512);
            fkv_context_params params;
            fkv_context *ctx;
            OK(fkv_context_params_init(&params, sizeof params));
            params.cpu_level = s.level;
            if (fkv_context_create(&params, &ctx) == FKV_OK)
                fkv_context_destroy(ctx);
            else
                s.level = FKV_CPU_BEST;
        }
        for (int j = 0; j < 2; j++) {
            w[j] = open_side(&s, j, (int)random_int(&rng, 1, 6));
            OK(fkv_sequence_create(w[j].cache, NULL, &w[j].ids[0]));
        }
        int64_t t = 0;
        found = 0;
        for (int64_t n; t < tokens; t += n) {
            n = random_int(&rng, 1, 700);
            both(w, &s, 1, &t, &zero, &n);
        }
        const int64_t end = s.level ? t + 60 : t + 600;
        for (const int64_t one = 1; t < end; t++)
            both(w, &s, 1, &t, &zero, &one);
        if (s.kind <= RARE && !found)
            fail_msg("nothing was selected");
        close_side(&w[0]);
        close_side(&w[1]);
    }
}

/* Sequences that fork, are cropped and go on, in batches. */
static void many_sequences(void **state) {
    (void)state;
    for (int i = 0; i < runs(KINDS); i++) {
        struct setting s = draw((enum kind)(i % KINDS));
        struct side w[2];
        int64_t length[MOST_SEQS] = {0}, shift[MOST_SEQS] = {0};
        for (int j = 0; j < 2; j++) {
            w[j] = open_side(&s, j, (int)random_int(&rng, 1, 4));
            for (int k = 0; k < MOST_SEQS; k++)
                OK(fkv_sequence_create(w[j].cache, NULL, &w[j].ids[k]));
        }
        for (int round = 0; round < 14; round++) {
            int64_t count[MOST_SEQS];
            for (int k = 0; k < MOST_SEQS; k++)
                count[k] = random_chance(&rng, .5) ? 1 : random_int(&rng, 0, 300);
            both(w, &s, MOST_SEQS, length, shift, count);
            for (int k = 0; k < MOST_SEQS; k++)
                length[k] += count[k];
            const int a = (int)random_int(&rng, 0, MOST_SEQS - 1);
            const int b = (int)random_int(&rng, 0, MOST_SEQS - 1);
            int64_t until = random_int(&rng, 0, length[a]);
            for (int j = 0; j < 2; j++) {
                OK(fkv_sequence_crop_floor(w[j].cache, w[j].ids[a], until, &until));
                OK(fkv_sequence_crop(w[j].cache, w[j].ids[a], until));
                if (a == b)
                    continue;
                OK(fkv_sequence_free(w[j].cache, w[j].ids[b]));
                OK(fkv_sequence_fork(w[j].cache, w[j].ids[a], &w[j].ids[b]));
            }
            length[a] = until;
            shift[a] += 7; /* other tokens from now on */
            if (a != b) {
                length[b] = until;
                shift[b] = shift[a] + 13;
            }
        }
        close_side(&w[0]);
        close_side(&w[1]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(one_sequence),
                                       cmocka_unit_test(many_sequences)};

    random_init(&rng, random_seed("test_key_index", 6));
    return cmocka_run_group_tests_name("key_index", tests, NULL, NULL);
}
