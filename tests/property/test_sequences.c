/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Many sequences: a sequence's results do not depend on its neighbours in the batch or on the number of
 * threads; bad values touch nothing else; bytes are counted as the allocator sees them.
 */
#include "property.h"

static struct random rng;

static int runs(int full) {
    return random_quick() ? (full + 7) / 8 : full;
}

enum kind { EXACT, FOURIER, CALIBRATED };

/* Exact, or with small windows so that much is coded. */
static struct config draw(enum kind kind) {
    struct config c = config_draw(&rng);

    c.head_dim = 8 * (int)random_int(&rng, 1, 5);
    c.rope_dim = 0;
    if (kind == FOURIER)
        config_draw_fourier(&rng, &c);
    if (kind == CALIBRATED)
        config_draw_calibrated(&rng, &c);
    c.tokens = 1;
    return c;
}

/* ---- a ragged batch */

static const int64_t lengths[] = {0, 1, 2, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 700, 5};

#define N LENGTH(lengths)

struct ragged {
    struct world w;
    struct stream s[N];
    fkv_sequence id[N];
    int64_t at[N];
};

static void ragged_open(struct ragged *g, const struct config *c) {
    world_open(&g->w, c);
    for (int i = 0; i < N; i++) {
        stream_init(&g->s[i], c, 100 + (uint64_t)i, lengths[i] + 300);
        g->id[i] = world_sequence(&g->w);
        step_one(&g->w, g->id[i], &g->s[i], 0, lengths[i], STEP_APPEND, NULL);
        g->at[i] = lengths[i];
    }
}

static void ragged_close(struct ragged *g) {
    for (int i = 0; i < N; i++)
        stream_free(&g->s[i]);
    world_close(&g->w);
}

/* A step of some of the sequences, in an order and with numbers of tokens that depend on `seed` alone. */
static int draw_parts(struct ragged *g, uint64_t seed, struct part *parts, int *which) {
    static const int64_t news[] = {0, 1, 1, 1, 2, 3, 5, 33, 64, 65, 130};
    struct random r;
    int count = 0, order[N];

    random_init(&r, seed);
    for (int i = 0; i < N; i++) {
        int j = (int)random_int(&r, 0, i);
        order[i] = order[j];
        order[j] = i;
    }
    for (int i = 0; i < N; i++) {
        if (random_chance(&r, 0.2))
            continue;
        int s = order[i];
        int64_t n = news[random_int(&r, 0, LENGTH(news) - 1)];
        which[count] = s;
        parts[count++] = (struct part){g->id[s], &g->s[s], g->at[s], n};
    }
    return count;
}

static void advance(struct ragged *g, const struct part *parts, const int *which, int count) {
    for (int i = 0; i < count; i++)
        g->at[which[i]] += parts[i].count;
}

static void alone(const struct config *c) {
    static struct ragged batch, single;
    struct part parts[N], mine;
    struct outputs all, one;
    int which[N];

    ragged_open(&batch, c);
    ragged_open(&single, c);
    for (int step = 0; step < 2; step++) {
        enum step_mode mode = step ? STEP_APPEND_ATTEND : STEP_FUSED;
        int count = draw_parts(&batch, c->seed + (uint64_t)step, parts, which);
        OK(step_try(&batch.w, parts, count, mode, &all));
        int64_t row = 0;
        for (int i = 0; i < count; row += parts[i++].count) {
            int s = which[i];
            mine = (struct part){single.id[s], &single.s[s], single.at[s], parts[i].count};
            OK(step_try(&single.w, &mine, 1, mode, &one));
            outputs_same(&all, row, &one, 0, parts[i].count, c, "row of a batch");
            outputs_free(&one);
        }
        outputs_free(&all);
        advance(&batch, parts, which, count);
        advance(&single, parts, which, count);
    }
    for (int s = 0; s < N; s++) {
        held_same(&batch.w, batch.id[s], &single.w, single.id[s], batch.at[s]);
        CHECK(world_stats(&batch.w, batch.id[s]).bytes ==
              world_stats(&single.w, single.id[s]).bytes);
    }
    ragged_close(&batch);
    ragged_close(&single);
}

static void row_of_a_batch(void **state) {
    (void)state;
    for (int i = 0; i < runs(12); i++) {
        struct config c = draw(i % 3);
        property_run("alone", alone, &c);
    }
}

/* ---- threads */

static struct outputs threads_run(const struct config *c) {
    static struct ragged g;
    struct part parts[N];
    struct outputs o, all = {0};
    int which[N];

    ragged_open(&g, c);
    for (int step = 0; step < 2; step++) {
        int count = draw_parts(&g, c->seed + (uint64_t)step, parts, which);
        OK(step_try(&g.w, parts, count, step ? STEP_ATTEND : STEP_FUSED, &o));
        outputs_append(&all, &o, c);
        outputs_free(&o);
        advance(&g, parts, which, step ? 0 : count);
    }
    ragged_close(&g);
    return all;
}

static void threads(const struct config *c) {
    static const int numbers[] = {2, 3, 8};
    struct config other = *c;

    other.threads = 1;
    struct outputs one = threads_run(&other);
    for (int i = 0; i < LENGTH(numbers); i++) {
        other.threads = numbers[i];
        struct outputs many = threads_run(&other);
        outputs_same(&one, 0, &many, 0, one.rows, c, "threads");
        outputs_free(&many);
    }
    outputs_free(&one);
}

static void number_of_threads(void **state) {
    (void)state;
    for (int i = 0; i < runs(6); i++) {
        struct config c = draw(i % 3);
        property_run("threads", threads, &c);
    }
}

/* ---- values that cannot be stored */

enum { IN_K, IN_V, IN_Q, N_PLACES };

/* The stream with one bad element of layer 0, at a token from `first` on. Returns the KV head it belongs to;
 * *token is where. Rows before the bad one are the same memory. */
static int spoil(struct random *r, const struct config *c, struct stream *s, int place, float value,
                 int64_t first, int64_t count, int64_t *token) {
    int heads = place == IN_Q ? c->kv_heads * c->group : c->kv_heads;
    int head = (int)random_int(r, 0, heads - 1);
    float *x = place == IN_K ? s->k[0] : place == IN_V ? s->v[0] : s->q[0];

    *token = first + random_int(r, 0, count - 1);
    x[(*token * heads + head) * c->head_dim + random_int(r, 0, c->head_dim - 1)] = value;
    return place == IN_Q ? head / c->group : head;
}

static void rejected_once(struct ragged *g, const struct config *c, int place, float value,
                          const struct part *parts, int count, int victim) {
    struct stream bad;
    struct part spoilt[N];
    int64_t token, length = -1;
    uint64_t bytes = world_stats(&g->w, FKV_ALL_SEQUENCES).bytes;

    stream_init(&bad, c, 100 + (uint64_t)victim, g->s[victim].n);
    memcpy(spoilt, parts, sizeof spoilt);
    for (int i = 0; i < count; i++) {
        if (parts[i].stream == &g->s[victim]) {
            spoil(&g->w.rng, c, &bad, place, value, parts[i].first, parts[i].count, &token);
            spoilt[i].stream = &bad;
        }
    }
    CHECK(step_try(&g->w, spoilt, count, STEP_FUSED, NULL) == FKV_ERR_NONFINITE);
    if (place != IN_Q)
        CHECK(step_try(&g->w, spoilt, count, STEP_APPEND, NULL) == FKV_ERR_NONFINITE);
    else
        CHECK(step_try(&g->w, spoilt, count, STEP_ATTEND, NULL) == FKV_ERR_NONFINITE);
    CHECK(world_stats(&g->w, FKV_ALL_SEQUENCES).bytes == bytes);
    for (int i = 0; i < N; i++) {
        OK(fkv_sequence_length(g->w.cache, g->id[i], &length));
        CHECK(length == g->at[i]);
    }
    stream_free(&bad);
}

static void rejected(const struct config *c) {
    static struct ragged g, control;
    struct part parts[N];
    struct outputs a, b;
    int which[N];

    ragged_open(&g, c);
    ragged_open(&control, c);
    int count = draw_parts(&g, c->seed, parts, which), victim = -1;
    for (int i = 0; i < count; i++) {
        if (parts[i].count > 0)
            victim = which[i];
    }
    for (int place = 0; place < N_PLACES && victim >= 0; place++) {
        rejected_once(&g, c, place, NAN, parts, count, victim);
        rejected_once(&g, c, place, -INFINITY, parts, count, victim);
        if (c->storage == FKV_DTYPE_F16 && c->in != FKV_DTYPE_F16 && place != IN_Q)
            rejected_once(&g, c, place, 1e6f, parts, count, victim);
    }
    /* and then everything goes on as if nothing had been tried */
    OK(step_try(&g.w, parts, count, STEP_FUSED, &a));
    advance(&g, parts, which, count);
    count = draw_parts(&control, c->seed, parts, which);
    OK(step_try(&control.w, parts, count, STEP_FUSED, &b));
    advance(&control, parts, which, count);
    outputs_same(&a, 0, &b, 0, a.rows, c, "after refusals");
    for (int i = 0; i < N; i++)
        held_same(&g.w, g.id[i], &control.w, control.id[i], g.at[i]);
    outputs_free(&a);
    outputs_free(&b);
    ragged_close(&g);
    ragged_close(&control);
}

static void bad_values_are_rejected(void **state) {
    (void)state;
    for (int i = 0; i < runs(12); i++) {
        struct config c = draw(i % 3);
        property_run("rejected", rejected, &c);
    }
}

/* All rows of a batch but the spoilt sequence's own KV head are the same bits. */
static void check_confined(const struct config *c, const struct outputs *a, const struct outputs *b,
                           const struct part *parts, int count, int bad_part, int bad_head) {
    int heads = c->kv_heads * c->group;
    int64_t row = 0;

    for (int i = 0; i < count; row += parts[i++].count) {
        for (int64_t t = row; t < row + parts[i].count; t++) {
            for (int h = 0; h < heads; h++) {
                if (i == bad_part && h / c->group == bad_head)
                    continue;
                CHECK(memcmp(a->out[0] + (t * heads + h) * c->head_dim,
                             b->out[0] + (t * heads + h) * c->head_dim,
                             (size_t)c->head_dim * sizeof(float)) == 0);
                CHECK(memcmp(a->lse[0] + t * heads + h, b->lse[0] + t * heads + h, sizeof(float)) ==
                      0);
            }
        }
    }
}

static void confined(const struct config *c) {
    static struct ragged clean, bad;
    struct part parts[N], spoilt[N];
    struct outputs a, b;
    int which[N], bad_part = -1, bad_head;
    int64_t token, row = 0;

    ragged_open(&clean, c);
    ragged_open(&bad, c);
    int count = draw_parts(&clean, c->seed, parts, which);
    draw_parts(&bad, c->seed, spoilt, which);
    for (int i = 0; i < count; i++)
        bad_part = parts[i].count > 0 ? i : bad_part;
    int place = (int)random_int(&clean.w.rng, 0, N_PLACES - 1);
    if (bad_part >= 0) {
        int s = which[bad_part];
        bad_head =
            spoil(&clean.w.rng, c, &bad.s[s], place, NAN, bad.at[s], parts[bad_part].count, &token);
        OK(step_try(&clean.w, parts, count, STEP_FUSED, &a));
        OK(step_try(&bad.w, spoilt, count, STEP_FUSED, &b));
        check_confined(c, &a, &b, parts, count, bad_part, bad_head);
        for (int i = 0; i < bad_part; i++)
            row += parts[i].count;
        /* and in its own place it shows */
        row = (row + token - parts[bad_part].first) * c->kv_heads * c->group;
        bool shows = false;
        for (int64_t i = 0; i < (int64_t)c->group * c->head_dim; i++)
            shows |= isnan(b.out[0][(row + bad_head * c->group) * c->head_dim + i]);
        CHECK(shows);
        outputs_free(&a);
        outputs_free(&b);
        /* the next step, over what is held by then */
        advance(&clean, parts, which, count);
        advance(&bad, parts, which, count);
        count = draw_parts(&clean, c->seed + 1, parts, which);
        draw_parts(&bad, c->seed + 1, spoilt, which);
        int next = -1;
        for (int i = 0; i < count; i++)
            next = which[i] == s ? i : next;
        OK(step_try(&clean.w, parts, count, STEP_APPEND_ATTEND, &a));
        OK(step_try(&bad.w, spoilt, count, STEP_APPEND_ATTEND, &b));
        check_confined(c, &a, &b, parts, count, next, bad_head);
        outputs_free(&a);
        outputs_free(&b);
    }
    ragged_close(&clean);
    ragged_close(&bad);
}

static void bad_values_stay_in_their_place(void **state) {
    (void)state;
    for (int i = 0; i < runs(16); i++) {
        struct config c = draw(i % 3);
        c.layers = 1;
        c.flags = FKV_CONTEXT_PROPAGATE_NONFINITE;
        property_run("confined", confined, &c);
    }
}

/* ---- bytes */

static uint64_t live_bytes(struct world *w) {
    fkv_context_info info = {.struct_size = sizeof info};

    OK(fkv_context_query(w->ctx, &info));
    CHECK(info.live_bytes == (uint64_t)w->live);
    return info.live_bytes;
}

/* What the caches' stats say is what came and went with the cache. */
static void bytes(const struct config *c) {
    struct world w;
    struct stream s;
    fkv_sequence ids[6];

    world_open(&w, c);
    OK(fkv_plan_destroy(w.plan));
    uint64_t cache_bytes = world_stats(&w, FKV_ALL_SEQUENCES).bytes;
    uint64_t others = live_bytes(&w) - cache_bytes;
    OK(fkv_plan_create(w.cache, &w.plan));
    stream_init(&s, c, 1, 900);
    for (int i = 0; i < LENGTH(ids); i++) {
        ids[i] = world_sequence(&w);
        for (int64_t at = 0, n; at < s.n && random_chance(&w.rng, 0.8); at += n) {
            n = random_int(&w.rng, 0, s.n - at);
            step_one(&w, ids[i], &s, at, n, STEP_FUSED, NULL);
        }
        if (i % 3 == 2)
            OK(fkv_sequence_free(w.cache, ids[i - 1]));
        OK(fkv_plan_destroy(w.plan));
        fkv_stats all = world_stats(&w, FKV_ALL_SEQUENCES);
        CHECK(all.bytes == live_bytes(&w) - others);
        CHECK(all.bytes == all.bytes_exact + all.bytes_kept + all.bytes_coefficients +
                               all.bytes_tables + all.bytes_blocks + all.bytes_scales);
        CHECK(all.sequences == (uint64_t)(i + 1 - (i + 1) / 3));
        OK(fkv_plan_create(w.cache, &w.plan));
    }
    stream_free(&s);
    world_close(&w);
}

static void counted_bytes(void **state) {
    (void)state;
    for (int i = 0; i < runs(40); i++) {
        struct config c = draw(i % 3);
        property_run("bytes", bytes, &c);
    }
}

static void estimate(const struct config *c) {
    static const int64_t sizes[] = {0, 1, 63, 64, 65, 500, 900};
    struct stream s;

    stream_init(&s, c, 1, 900);
    for (int i = 0; i < LENGTH(sizes); i++) {
        struct world w;
        fkv_stats predicted = {.struct_size = sizeof predicted};
        fkv_sequence_params params;
        fkv_sequence id;
        world_open(&w, c);
        OK(fkv_sequence_params_init(&params, sizeof params));
        params.period = c->fourier && i % 2 ? 77 + i : 0;
        OK(fkv_profile_estimate(w.profile, sizes[i], params.period, &predicted));
        OK(fkv_sequence_create(w.cache, &params, &id));
        step_one(&w, id, &s, 0, sizes[i], STEP_APPEND, NULL);
        fkv_stats all = world_stats(&w, FKV_ALL_SEQUENCES);
        CHECK(all.tokens == predicted.tokens && all.tokens_coded == predicted.tokens_coded);
        CHECK(all.tokens_exact == predicted.tokens_exact);
        CHECK(all.bytes_exact == predicted.bytes_exact);
        CHECK(all.bytes_kept == predicted.bytes_kept);
        CHECK(all.bytes_coefficients == predicted.bytes_coefficients);
        CHECK(all.bytes_blocks == predicted.bytes_blocks);
        CHECK(all.bytes_scales == predicted.bytes_scales);
        CHECK(all.bytes_tables == predicted.bytes_tables);
        CHECK(all.bytes == predicted.bytes && all.dense_bytes == predicted.dense_bytes);
        CHECK(all.ratio == predicted.ratio && all.sequences == predicted.sequences);
        CHECK(all.dense_bytes == 4u * (uint64_t)c->kv_heads * (uint64_t)c->head_dim *
                                     (uint64_t)c->layers * (uint64_t)sizes[i]);
        world_close(&w);
    }
    stream_free(&s);
}

static void estimates(void **state) {
    (void)state;
    for (int i = 0; i < runs(24); i++) {
        struct config c = draw(i % 3);
        c.positions = c.positions && !c.calibrated; /* lists of them take room of their own */
        property_run("estimate", estimate, &c);
    }
}

/* ---- long steps, which have no table of RoPE's sines */

/* A refusal says where, from a row made for it alone. */
static void refused_far_in(struct world *w, struct stream *s) {
    const struct config *c = &w->config;
    const int64_t at = s->n * 9 / 10, row = (int64_t)c->kv_heads * c->head_dim;
    char text[300] = "", place[32];
    if (c->storage != FKV_DTYPE_F16)
        return;
    s->k[0][at * row] = 3e5f;
    struct part part = {world_sequence(w), s, 0, s->n};
    CHECK(step_try(w, &part, 1, STEP_APPEND, NULL) == FKV_ERR_NONFINITE);
    OK(fkv_context_message(w->ctx, text, sizeof text, NULL));
    snprintf(place, sizeof place, "k[%lld][0]", (long long)at);
    if (!strstr(text, place))
        property_fail("%s is not in: %s", place, text);
}

static void long_step(const struct config *c) {
    struct world w;
    struct stream s;
    struct outputs a, b;
    struct held h;

    world_open(&w, c);
    stream_init(&s, c, 1, c->tokens);
    fkv_sequence whole = world_sequence(&w), pieces = world_sequence(&w);
    step_one(&w, whole, &s, 0, s.n, STEP_APPEND, NULL);
    feed(&w, pieces, &s, 6, STEP_APPEND, NULL);
    held_same(&w, whole, &w, pieces, s.n);
    /* queries of as long a step, to what is held and to themselves */
    fkv_sequence fused = world_sequence(&w);
    step_one(&w, fused, &s, 0, s.n, STEP_FUSED, &a);
    if (!c->fourier && !c->calibrated) { /* else what they saw is coded now */
        held_read(&h, &w, fused, 0, 0, s.n);
        check_attention(&w, 0, &h, &s, 0, s.n, 0, true, &a, 0);
        held_free(&h);
        fkv_sequence again = world_sequence(&w);
        feed(&w, again, &s, 6, STEP_FUSED, &b);
        outputs_same(&a, 0, &b, 0, s.n, c, "in pieces");
        outputs_free(&b);
    }
    outputs_free(&a);
    const int64_t next = s.positions[s.n - 1] + 1;
    for (int64_t t = 0; t < s.n; t++)
        s.positions[t] = next + t;
    step_one(&w, whole, &s, 0, s.n, STEP_ATTEND, &a);
    held_read(&h, &w, whole, 0, 0, s.n);
    check_attention(&w, 0, &h, &s, 0, s.n, s.n, false, &a, 0);
    held_free(&h);
    outputs_free(&a);
    refused_far_in(&w, &s);
    stream_free(&s);
    world_close(&w);
}

static void long_steps(void **state) {
    (void)state;
    for (int i = 0; i < runs(16); i++) {
        struct config c = draw(i % 3);
        c.layers = 1;
        c.kv_heads = 2;
        c.group = c.group > 2 ? 2 : c.group;
        c.head_dim = i % 2 ? 16 : 24;
        c.rope = i % 4 < 2 ? FKV_ROPE_HALF_SPLIT : FKV_ROPE_INTERLEAVED;
        c.rope_dim = 0;
        c.storage = i % 5 ? FKV_DTYPE_F16 : FKV_DTYPE_F32;
        c.in = FKV_DTYPE_F32;
        c.flags = 0;
        c.tokens = random_int(&rng, 2065, 2300);
        property_run("long_step", long_step, &c);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(row_of_a_batch),
                                       cmocka_unit_test(number_of_threads),
                                       cmocka_unit_test(bad_values_are_rejected),
                                       cmocka_unit_test(bad_values_stay_in_their_place),
                                       cmocka_unit_test(counted_bytes),
                                       cmocka_unit_test(estimates),
                                       cmocka_unit_test(long_steps)};

    random_init(&rng, random_seed("test_sequences", 5));
    return cmocka_run_group_tests_name("sequences", tests, NULL, NULL);
}
