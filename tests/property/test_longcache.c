/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Selection against a plain statement of it in double. Most keys and queries are small whole numbers, so that
 * products are exact and full of ties: which tokens are chosen is then known for certain.
 */
#include "core/core.h"
#include "oracle.h"
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

#define MAX_SPANS 64

static struct random rng;

static void ok(fkv_status status, const char *what) {
    if (status != FKV_OK)
        fail_msg("%s: %s", what, fkv_status_string(status));
}
#define OK(call) ok(call, #call)

static int runs(int n) {
    return random_quick() ? (n + 3) / 4 : n;
}

/* ---- a case */

struct setting {
    int kv_heads, group, dim, rope_dim, threads, n_sink, n_local, bits;
    fkv_rope_layout rope;
    fkv_dtype storage;
    fkv_cpu_level level;
    bool whole; /* numbers */
    bool indexed;
    int64_t tokens;
    fkv_select_params select;
};

struct world {
    struct setting set;
    fkv_context *ctx;
    fkv_profile *profile;
    fkv_cache *cache;
    fkv_plan *plan;
    fkv_model_params model;
    double inv_freq[FKV_MAX_HEAD_DIM / 2];
};

struct tokens {
    int64_t n;
    float *q, *k, *v;
};

static struct setting draw(void) {
    static const int dims[] = {8, 16, 24, 64, 72};
    struct setting s = {.kv_heads = (int)random_int(&rng, 1, 3),
                        .group = (int)random_int(&rng, 1, 4),
                        .dim = dims[random_int(&rng, 0, 4)],
                        .threads = (int)random_int(&rng, 1, 3),
                        .n_sink = (int)random_int(&rng, 0, 1) * (int)random_int(&rng, 1, 40),
                        .n_local = (int)random_int(&rng, 0, 300),
                        .bits = 16,
                        .storage = (fkv_dtype)random_int(&rng, 1, 3),
                        .level = FKV_CPU_BEST,
                        .whole = true,
                        .indexed = random_chance(&rng, 0.5),
                        .tokens = random_int(&rng, 1, 900)};
    s.rope = (fkv_rope_layout)random_int(&rng, 0, 2);
    s.rope_dim = s.rope && random_chance(&rng, 0.3) ? s.dim / 2 : 0;
    fkv_select_params_init(&s.select, sizeof s.select);
    s.select.n_global = (int)random_int(&rng, 0, 50);
    s.select.n_local = (int)random_int(&rng, 1, 120);
    s.select.span = (int)random_int(&rng, 1, 40);
    s.select.top_k = (int)random_int(&rng, 0, 6);
    s.select.clip = (int)random_int(&rng, 0, 9);
    s.select.chunk = (int)random_int(&rng, 1, s.select.n_local);
    return s;
}

static void open_world(struct world *w, const struct setting *set) {
    fkv_context_params params;
    fkv_codec_params codec;
    fkv_cache_params cache;
    memset(w, 0, sizeof *w);
    w->set = *set;
    fkv_context_params_init(&params, sizeof params);
    params.threads = set->threads;
    params.cpu_level = set->level;
    OK(fkv_context_create(&params, &w->ctx));
    struct fkv_ctx *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, w->ctx);
    ctx->sift_from = 0; /* an index is used in short middles, too */
    fkv_handle_release(w->ctx);
    fkv_model_params_init(&w->model, sizeof w->model);
    w->model.n_layers = 1;
    w->model.n_q_heads = set->kv_heads * set->group;
    w->model.n_kv_heads = set->kv_heads;
    w->model.head_dim = set->dim;
    w->model.rope_layout = set->rope;
    w->model.rope_dim = set->rope_dim;
    if (set->rope) {
        int pairs = (set->rope_dim ? set->rope_dim : set->dim) / 2;
        for (int j = 0; j < pairs; j++)
            w->inv_freq[j] = pow(10000, -(double)j / pairs);
        w->model.inv_freq = w->inv_freq;
        w->model.inv_freq_count = pairs;
    }
    fkv_codec_params_init(&codec, sizeof codec);
    codec.storage_dtype = set->storage;
    codec.n_sink = set->n_sink;
    codec.n_local = set->n_local;
    codec.domain = FKV_DOMAIN_UNROTATED;
    OK(fkv_profile_create_uniform(w->ctx, &w->model, &codec, set->bits, &w->profile));
    fkv_cache_params_init(&cache, sizeof cache);
    cache.flags = set->indexed ? FKV_CACHE_KEY_INDEX : 0;
    OK(fkv_cache_create(w->ctx, w->profile, &cache, &w->cache));
    OK(fkv_plan_create(w->cache, &w->plan));
    OK(fkv_plan_select(w->plan, &set->select));
}

static void close_world(struct world *w) {
    OK(fkv_plan_destroy(w->plan));
    OK(fkv_cache_destroy(w->cache));
    OK(fkv_profile_destroy(w->profile));
    OK(fkv_context_destroy(w->ctx));
}

static void fill(struct world *w, float **x, int64_t n, bool whole) {
    *x = malloc((size_t)(n + 1) * sizeof **x);
    for (int64_t i = 0; i < n; i++)
        (*x)[i] = whole ? (float)random_int(&rng, -2, 2)
                        : (float)oracle_round(random_normal(&rng), w->set.storage);
}

static struct tokens make_tokens(struct world *w) {
    const struct setting *s = &w->set;
    struct tokens t = {.n = s->tokens};
    fill(w, &t.q, t.n * s->kv_heads * s->group * s->dim, s->whole);
    fill(w, &t.k, t.n * s->kv_heads * s->dim, s->whole);
    fill(w, &t.v, t.n * s->kv_heads * s->dim, false);
    if (s->whole) /* attention that mixes */
        for (int64_t i = 0; i < t.n * s->kv_heads * s->group * s->dim; i++)
            t.q[i] *= 0.25f;
    return t;
}

static void free_tokens(struct tokens *t) {
    free(t->q);
    free(t->k);
    free(t->v);
}

/* Tokens first.. of t, out and lse beginning at those of token 0. */
static void step(struct world *w, fkv_sequence id, const struct tokens *t, int64_t first,
                 int64_t count, bool apart, float *out, float *lse) {
    const struct setting *s = &w->set;
    const int64_t hq = s->kv_heads * s->group, shape[] = {count, hq, s->dim};
    const int64_t kv[] = {count, s->kv_heads, s->dim};
    fkv_tensor q, k, v, o, l;
    fkv_batch batch;
    fkv_batch_init(&batch, sizeof batch);
    batch.count = 1;
    batch.sequences = &id;
    batch.n_new = &count;
    OK(fkv_plan_update(w->plan, &batch));
    OK(fkv_tensor_init(&q, t->q + first * hq * s->dim, FKV_DTYPE_F32, 3, shape));
    OK(fkv_tensor_init(&k, t->k + first * kv[1] * s->dim, FKV_DTYPE_F32, 3, kv));
    OK(fkv_tensor_init(&v, t->v + first * kv[1] * s->dim, FKV_DTYPE_F32, 3, kv));
    OK(fkv_tensor_init(&o, out + first * hq * s->dim, FKV_DTYPE_F32, 3, shape));
    OK(fkv_tensor_init(&l, lse + first * hq, FKV_DTYPE_F32, 2, shape));
    if (!apart) {
        OK(fkv_append_attend(w->plan, 0, &q, &k, &v, &o, &l));
        return;
    }
    if (count)
        assert_int_equal(fkv_attend(w->plan, 0, &q, &o, &l), FKV_ERR_STATE);
    OK(fkv_append(w->plan, 0, &k, &v));
    OK(fkv_attend(w->plan, 0, &q, &o, &l));
}

/* ---- the plain statement */

struct view {
    int64_t n, middle_first, middle_end;
    int64_t *token; /* [n] */
    bool *marked;   /* [tokens] */
};

static double product(const struct world *w, const struct tokens *t, int64_t i, int h, int64_t j) {
    const struct setting *s = &w->set;
    const float *q = t->q + (i * s->kv_heads * s->group + h) * s->dim;
    const float *k = t->k + (j * s->kv_heads + h / s->group) * s->dim;
    double sum = 0;
    for (int d = 0; d < s->dim; d++)
        sum += (double)q[d] * (double)k[d];
    return sum;
}

static void vote(const struct world *w, const struct tokens *t, int64_t i, int h,
                 const struct view *v, int *votes) {
    const int64_t n = v->middle_end - v->middle_first;
    bool *taken = calloc((size_t)n, 1);
    for (int k = 0; k < w->set.select.top_k && k < n; k++) {
        int64_t best = -1;
        double top = 0;
        for (int64_t j = 0; j < n; j++) {
            double x = product(w, t, i, h, v->middle_first + j);
            if (!taken[j] && (best < 0 || x > top)) {
                best = j;
                top = x;
            }
        }
        taken[best] = true;
        votes[best]++;
    }
    free(taken);
}

/* What queries first..end-1 see, `end` being the length with them. */
static struct view choose(const struct world *w, const struct tokens *t, int64_t first,
                          int64_t end) {
    const fkv_select_params *p = &w->set.select;
    const int64_t spans = p->top_k ? (int64_t)p->clip * p->span : 0;
    struct view v = {.token = malloc((size_t)(end + 1) * sizeof *v.token),
                     .marked = calloc((size_t)end + 1, 1)};
    for (int64_t j = 0; j < end; j++)
        v.marked[j] =
            end <= p->n_global + spans + p->n_local || j < p->n_global || j >= end - p->n_local;
    if (end > p->n_global + spans + p->n_local) {
        v.middle_first = p->n_global;
        v.middle_end = end - p->n_local;
        const int64_t n = v.middle_end - v.middle_first;
        int *votes = calloc((size_t)n + 1, sizeof *votes);
        for (int64_t i = first; i < end; i++)
            for (int h = 0; h < w->set.kv_heads * w->set.group; h++)
                vote(w, t, i, h, &v, votes);
        for (int c = 0; c < p->clip; c++) {
            int64_t best = 0;
            for (int64_t j = 1; j < n; j++)
                best = votes[j] > votes[best] ? j : best;
            if (!votes[best])
                break;
            votes[best] = 0;
            for (int64_t j = best - p->span / 2; j < best + (p->span + 1) / 2; j++)
                if (j >= 0 && j < n)
                    v.marked[v.middle_first + j] = true;
        }
        free(votes);
    }
    for (int64_t j = 0; j < end; j++)
        if (v.marked[j])
            v.token[v.n++] = j;
    return v;
}

static void check_row(const struct world *w, const struct tokens *t, const struct view *v,
                      int64_t i, int64_t end, int h, const float *out, const float *lse) {
    const struct setting *s = &w->set;
    const int64_t hq = s->kv_heads * s->group, at = v->n - (end - i), D = s->dim;
    double q[FKV_MAX_HEAD_DIM], o[FKV_MAX_HEAD_DIM];
    double *k = malloc((size_t)(v->n * D) * sizeof *k), *x = malloc((size_t)(v->n * D) * sizeof *x);
    for (int d = 0; d < D; d++)
        q[d] = (double)t->q[(i * hq + h) * D + d];
    oracle_rope(&w->model, at, q);
    for (int64_t j = 0; j <= at; j++) {
        for (int d = 0; d < D; d++) {
            const int64_t from = (v->token[j] * s->kv_heads + h / s->group) * D + d;
            k[j * D + d] = (double)t->k[from];
            x[j * D + d] = (double)t->v[from];
        }
        oracle_rope(&w->model, j, k + j * D);
    }
    struct oracle_row row = oracle_attend(q, k, x, at + 1, D, (int)D, oracle_scale(&w->model), o);
    for (int d = 0; d < D; d++) {
        const double bound = oracle_tolerance(&row, o[d], FKV_DTYPE_F32);
        if (!(fabs((double)out[(i * hq + h) * D + d] - o[d]) <= bound))
            fail_msg("token %lld head %d: out[%d] = %.9g, want %.9g +- %.3g", (long long)i, h, d,
                     (double)out[(i * hq + h) * D + d], o[d], bound);
    }
    if (!(fabs((double)lse[i * hq + h] - row.lse) <= 1e-5 * (1 + row.max_score)))
        fail_msg("token %lld head %d: lse %.9g, want %.9g", (long long)i, h,
                 (double)lse[i * hq + h], row.lse);
    free(k);
    free(x);
}

static void check_selection(const struct world *w, const struct view *v, int64_t end) {
    fkv_selection got = {.struct_size = sizeof got};
    int64_t spans[2 * MAX_SPANS], at = v->middle_first;
    OK(fkv_plan_selection(w->plan, 0, &got, spans, 2 * MAX_SPANS));
    assert_int_equal(got.tokens, end);
    assert_int_equal(got.view, v->n);
    assert_int_equal(got.middle_first, v->middle_first);
    assert_int_equal(got.middle_end, v->middle_end);
    for (int64_t i = 0; i < got.spans; i++) {
        for (; at < spans[2 * i]; at++)
            assert_false(v->marked[at]);
        assert_true(spans[2 * i] < spans[2 * i + 1]);
        for (; at < spans[2 * i + 1]; at++)
            assert_true(v->marked[at]);
    }
    for (; at < v->middle_end; at++)
        assert_false(v->marked[at]);
}

/* A step's parties, against what it gave. */
static void check_step(const struct world *w, const struct tokens *t, int64_t first, int64_t count,
                       const float *out, const float *lse) {
    const int64_t chunk = w->set.select.chunk;
    for (int64_t i = first, end; i < first + count; i = end) {
        end = (i / chunk + 1) * chunk;
        end = end < first + count ? end : first + count;
        const bool last = end == first + count;
        if (!last && random_chance(&rng, 0.7)) /* costly: not all of a step's */
            continue;
        struct view v = choose(w, t, i, end);
        if (last)
            check_selection(w, &v, end);
        for (int n = 0; n < 3; n++)
            check_row(w, t, &v, n ? random_int(&rng, i, end - 1) : i, end,
                      (int)random_int(&rng, 0, w->set.kv_heads * w->set.group - 1), out, lse);
        check_row(w, t, &v, end - 1, end, 0, out, lse);
        free(v.token);
        free(v.marked);
    }
}

static float *outputs(const struct world *w, int64_t n) {
    return calloc((size_t)(n * w->set.kv_heads * w->set.group * (w->set.dim + 1) + 1),
                  sizeof(float));
}

static void against_statement(void **state) {
    (void)state;
    for (int i = 0; i < runs(120); i++) {
        struct setting set = draw();
        struct world w;
        if (i % 4 == 3)
            set.level = (fkv_cpu_level)random_int(&rng, FKV_CPU_REFERENCE, FKV_CPU_AVX512);
        fkv_context_params params;
        fkv_context *ctx;
        fkv_context_params_init(&params, sizeof params);
        params.cpu_level = set.level;
        if (fkv_context_create(&params, &ctx) != FKV_OK)
            set.level = FKV_CPU_BEST;
        else
            fkv_context_destroy(ctx);
        open_world(&w, &set);
        struct tokens t = make_tokens(&w);
        fkv_sequence id;
        OK(fkv_sequence_create(w.cache, NULL, &id));
        float *out = outputs(&w, t.n), *lse = out + t.n * set.kv_heads * set.group * set.dim;
        const int64_t pieces = random_int(&rng, 1, 8);
        for (int64_t first = 0, n; first < t.n; first += n) {
            n = random_chance(&rng, 0.3) ? 1 : random_int(&rng, 1, t.n / pieces + 1);
            n = n < t.n - first ? n : t.n - first;
            step(&w, id, &t, first, n, random_chance(&rng, 0.3), out, lse);
            check_step(&w, &t, first, n, out, lse);
        }
        free(out);
        free_tokens(&t);
        close_world(&w);
    }
}

/* ---- invariance, with any numbers: the same bits */

/* A step of several sequences, each with its own tokens first..first+count-1. */
static void batch_step(struct world *w, int n, const fkv_sequence *ids, const struct tokens *t,
                       const int64_t *first, const int64_t *count, float **out) {
    const struct setting *s = &w->set;
    const int64_t hq = s->kv_heads * s->group, row[2] = {hq * s->dim, s->kv_heads * s->dim};
    int64_t all = 0, at = 0;
    for (int i = 0; i < n; i++)
        all += count[i];
    float *x[4];
    for (int i = 0; i < 4; i++)
        x[i] = calloc((size_t)(all * row[0] + 1), sizeof(float));
    for (int i = 0; i < n; at += count[i++]) {
        memcpy(x[0] + at * row[0], t[i].q + first[i] * row[0],
               (size_t)(count[i] * row[0]) * sizeof(float));
        memcpy(x[1] + at * row[1], t[i].k + first[i] * row[1],
               (size_t)(count[i] * row[1]) * sizeof(float));
        memcpy(x[2] + at * row[1], t[i].v + first[i] * row[1],
               (size_t)(count[i] * row[1]) * sizeof(float));
    }
    const int64_t shape[] = {all, hq, s->dim}, kv[] = {all, s->kv_heads, s->dim};
    fkv_tensor q, k, v, o;
    fkv_batch batch;
    fkv_batch_init(&batch, sizeof batch);
    batch.count = n;
    batch.sequences = ids;
    batch.n_new = count;
    OK(fkv_plan_update(w->plan, &batch));
    OK(fkv_tensor_init(&q, x[0], FKV_DTYPE_F32, 3, shape));
    OK(fkv_tensor_init(&k, x[1], FKV_DTYPE_F32, 3, kv));
    OK(fkv_tensor_init(&v, x[2], FKV_DTYPE_F32, 3, kv));
    OK(fkv_tensor_init(&o, x[3], FKV_DTYPE_F32, 3, shape));
    OK(fkv_append_attend(w->plan, 0, &q, &k, &v, &o, NULL));
    at = 0;
    for (int i = 0; i < n; at += count[i++])
        memcpy(out[i] + first[i] * row[0], x[3] + at * row[0],
               (size_t)(count[i] * row[0]) * sizeof(float));
    for (int i = 0; i < 4; i++)
        free(x[i]);
}

static struct tokens tokens_of(const struct setting *set, uint64_t seed) {
    struct random keep = rng;
    struct world w = {.set = *set};
    random_init(&rng, seed);
    struct tokens t = make_tokens(&w);
    rng = keep;
    return t;
}

/* Steps that end at multiples of `cut`; with neighbours of other lengths, or alone. The last selection goes to
 * spans, -1 behind them. */
static float *feed(const struct setting *set, bool indexed, int threads, int64_t cut,
                   int neighbours, int64_t spans[2 * MAX_SPANS + 1]) {
    struct setting own = *set;
    struct world w;
    fkv_sequence ids[4];
    struct tokens t[4];
    float *out[4];
    own.threads = threads;
    own.indexed = indexed;
    open_world(&w, &own);
    const int n = neighbours + 1, mine = neighbours / 2;
    for (int i = 0; i < n; i++) {
        struct setting other = own;
        other.tokens = i == mine ? own.tokens : own.tokens * (i + 1) / 5;
        t[i] = tokens_of(&other, i == mine ? 77 : (uint64_t)i);
        out[i] = outputs(&w, t[i].n);
        OK(fkv_sequence_create(w.cache, NULL, &ids[i]));
    }
    int64_t first[4] = {0}, count[4];
    while (first[mine] < t[mine].n) {
        for (int i = 0; i < n; i++) {
            const int64_t left = t[i].n - first[i], step = cut * (1 + (i == mine ? 0 : i));
            count[i] = left < step ? left : step;
        }
        batch_step(&w, n, ids, t, first, count, out);
        for (int i = 0; i < n; i++)
            first[i] += count[i];
    }
    fkv_selection got = {.struct_size = sizeof got};
    OK(fkv_plan_selection(w.plan, mine, &got, spans, 2 * MAX_SPANS));
    spans[2 * got.spans] = -1;
    for (int i = 0; i < n; i++) {
        free_tokens(&t[i]);
        if (i != mine)
            free(out[i]);
    }
    close_world(&w);
    return out[mine];
}

static void same_bits(void **state) {
    (void)state;
    static const int bits[] = {16, 16, 8, 4, 3, 2};
    for (int i = 0; i < runs(24); i++) {
        struct setting set = draw();
        set.whole = false;
        set.bits = bits[i % 6];
        set.tokens = random_int(&rng, 300, 900);
        set.select.chunk = (int)random_int(&rng, 1, set.select.n_local);
        const int64_t chunk = set.select.chunk, far = (set.tokens / chunk + 1) * chunk;
        const bool exact = set.bits == 16; /* what is coded between steps depends on them */
        const size_t bytes =
            (size_t)(set.tokens * set.kv_heads * set.group * set.dim) * sizeof(float);
        int64_t want[2 * MAX_SPANS + 1], spans[2 * MAX_SPANS + 1];
        float *base = feed(&set, false, 1, chunk, 0, want);
        const struct {
            int threads, neighbours;
            int64_t cut;
            bool indexed;
        } others[] = {{2, 0, chunk, false}, {8, 0, chunk, true},     {1, 3, chunk, true},
                      {3, 2, chunk, false}, {1, 0, 3 * chunk, true}, {2, 1, far, true}};
        for (int j = 0; j < (exact ? 6 : 4); j++) {
            float *out = feed(&set, others[j].indexed, others[j].threads, others[j].cut,
                              others[j].neighbours, spans);
            assert_memory_equal(base, out, bytes);
            for (int n = 0; n == 0 || want[n - 1] >= 0; n++)
                assert_int_equal(want[n], spans[n]);
            free(out);
        }
        free(base);
    }
}

/* ---- coded keys: what was selected is attended to as it is held; what fits is all seen, as by plain attention */

static void coded_view(void **state) {
    (void)state;
    static const int bits[] = {16, 8, 4, 3, 2, 0};
    for (int i = 0; i < runs(36); i++) {
        struct setting set = draw();
        struct world w;
        fkv_plan *plain;
        fkv_sequence id;
        set.whole = false;
        set.bits = bits[i % 6];
        set.storage = FKV_DTYPE_F32;
        const int64_t scope = set.select.n_global + set.select.n_local +
                              (set.select.top_k ? set.select.clip * set.select.span : 0);
        set.tokens = scope < 900 ? scope : 900;
        open_world(&w, &set);
        OK(fkv_plan_create(w.cache, &plain));
        struct tokens t = make_tokens(&w);
        OK(fkv_sequence_create(w.cache, NULL, &id));
        const int64_t row = set.kv_heads * set.group * set.dim;
        float *a = outputs(&w, t.n), *b = outputs(&w, t.n), *lse = outputs(&w, t.n);
        step(&w, id, &t, 0, t.n - 1, false, a, lse);
        step(&w, id, &t, t.n - 1, 1, true, a, lse);
        const int64_t one = 1, shape[] = {1, set.kv_heads * set.group, set.dim};
        fkv_tensor q, o;
        fkv_batch batch;
        OK(fkv_tensor_init(&q, t.q + (t.n - 1) * row, FKV_DTYPE_F32, 3, shape));
        OK(fkv_tensor_init(&o, b + (t.n - 1) * row, FKV_DTYPE_F32, 3, shape));
        /* plain attention, the step's token being there already: crop it and append it again */
        const int64_t kv[] = {1, set.kv_heads, set.dim};
        fkv_tensor k, v;
        int64_t limit;
        OK(fkv_sequence_crop_limit(w.cache, id, &limit));
        if (limit <= t.n - 1) {
            OK(fkv_sequence_crop(w.cache, id, t.n - 1));
            fkv_batch_init(&batch, sizeof batch);
            batch.count = 1;
            batch.sequences = &id;
            batch.n_new = &one;
            OK(fkv_plan_update(plain, &batch));
            OK(fkv_tensor_init(&k, t.k + (t.n - 1) * kv[1] * kv[2], FKV_DTYPE_F32, 3, kv));
            OK(fkv_tensor_init(&v, t.v + (t.n - 1) * kv[1] * kv[2], FKV_DTYPE_F32, 3, kv));
            OK(fkv_append(plain, 0, &k, &v));
            OK(fkv_attend(plain, 0, &q, &o, NULL));
            for (int64_t d = 0; d < row; d++)
                if (!(fabsf(a[(t.n - 1) * row + d] - b[(t.n - 1) * row + d]) <= 2e-4f))
                    fail_msg("%d bits: %g, plain attention %g", set.bits,
                             (double)a[(t.n - 1) * row + d], (double)b[(t.n - 1) * row + d]);
        }
        free(a);
        free(b);
        free(lse);
        free_tokens(&t);
        OK(fkv_plan_destroy(plain));
        close_world(&w);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(against_statement),
                                       cmocka_unit_test(same_bits), cmocka_unit_test(coded_view)};

    random_init(&rng, random_seed("test_longcache", 5));
    return cmocka_run_group_tests_name("longcache", tests, NULL, NULL);
}
