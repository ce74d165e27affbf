/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Forks and crops: a fork is its parent until they part, and nothing that either does later reaches the
 * other; what a crop leaves is what appending so many tokens gives.
 */
#include "forks.h"

static struct random rng;

static int runs(int full) {
    return random_quick() ? (full + 7) / 8 : full;
}

static void run_some(const char *name, property_fn property, int count) {
    for (int i = 0; i < runs(count); i++) {
        struct config c = forks_draw(&rng, i % N_KIND);
        property_run(name, property, &c);
    }
}

/* ---- a fork and its parent part */

static void part_ways(const struct config *c) {
    enum { CHILDREN = 5 };
    struct world w;
    struct stream own, other[CHILDREN];
    fkv_sequence parent, child[CHILDREN], twin;

    world_open(&w, c);
    int64_t others = other_bytes(&w);
    stream_init(&own, c, 1, c->tokens + 200);
    parent = world_sequence(&w);
    step_one(&w, parent, &own, 0, c->tokens, STEP_APPEND, NULL);
    twin = world_sequence(&w); /* never shares */
    step_one(&w, twin, &own, 0, c->tokens, STEP_APPEND, NULL);
    fkv_stats before = world_stats(&w, parent);
    for (int i = 0; i < CHILDREN; i++) {
        stream_init(&other[i], c, 10 + (uint64_t)i, c->tokens + 200);
        child[i] = fork_of(&w, i > 2 ? child[i - 1] : parent);
        held_same(&w, parent, &w, child[i], c->tokens);
        fkv_stats now = world_stats(&w, child[i]);
        same_stats(&before, &now, true);
        CHECK(now.bytes_shared == world_stats(&w, parent).bytes_shared);
    }
    check_bytes(&w, others);
    /* children go on with tokens of their own; the last one with those of its parent */
    for (int i = 0; i < CHILDREN; i++) {
        int64_t n = random_int(&w.rng, 1, 200);
        const struct stream *s = i == CHILDREN - 1 ? &own : &other[i];
        step_one(&w, child[i], s, c->tokens, n, STEP_FUSED, NULL);
        held_same(&w, parent, &w, twin, c->tokens);
        fkv_stats now = world_stats(&w, parent);
        same_stats(&before, &now, true);
        /* beside a sequence that had the same tokens from the start */
        fkv_sequence scratch = world_sequence(&w);
        step_one(&w, scratch, &own, 0, c->tokens, STEP_APPEND, NULL);
        step_one(&w, scratch, s, c->tokens, n, STEP_FUSED, NULL);
        held_same(&w, child[i], &w, scratch, c->tokens + n);
        now = world_stats(&w, child[i]);
        fkv_stats of_scratch = world_stats(&w, scratch);
        same_stats(&now, &of_scratch, true);
        CHECK(of_scratch.bytes_shared == 0);
        if (n < 200)
            step_both(&w, child[i], scratch, s, c->tokens + n, 200 - n);
        OK(fkv_sequence_free(w.cache, scratch));
    }
    step_both(&w, parent, twin, &own, c->tokens, 200);
    held_same(&w, parent, &w, twin, c->tokens + 200);
    /* and end in any order */
    for (int left = CHILDREN; left > 0; left--) {
        int i = (int)random_int(&w.rng, 0, left - 1);
        int64_t live = w.live;
        fkv_stats gone = world_stats(&w, child[i]);
        OK(fkv_sequence_free(w.cache, child[i]));
        CHECK(live - w.live == (int64_t)(gone.bytes - gone.bytes_shared));
        child[i] = child[left - 1];
        held_same(&w, parent, &w, twin, c->tokens + 200);
        check_bytes(&w, others);
    }
    CHECK(world_stats(&w, FKV_ALL_SEQUENCES).bytes_shared == 0);
    for (int i = 0; i < CHILDREN; i++)
        stream_free(&other[i]);
    stream_free(&own);
    world_close(&w);
}

static void fork_then_part(void **state) {
    (void)state;
    run_some("part_ways", part_ways, 60);
}

/* Parent and children in one batch, all of them writing to what they share. */
static void together(const struct config *c) {
    enum { N = 4 };
    struct world w, alone;
    struct stream s[N];
    struct part parts[N], mine;
    struct outputs all, one;
    fkv_sequence id[N];

    world_open(&w, c);
    world_open(&alone, c);
    for (int i = 0; i < N; i++) {
        stream_init(&s[i], c, 1 + (uint64_t)i, c->tokens + 100);
        id[i] = i ? fork_of(&w, id[0]) : world_sequence(&w);
        if (!i)
            step_one(&w, id[0], &s[0], 0, c->tokens, STEP_APPEND, NULL);
    }
    for (int i = 0; i < N; i++)
        parts[i] = (struct part){id[i], &s[i], c->tokens, random_int(&w.rng, 0, 100)};
    OK(step_try(&w, parts, N, STEP_FUSED, &all));
    for (int64_t i = 0, row = 0; i < N; row += parts[i++].count) {
        mine = parts[i];
        mine.sequence = world_sequence(&alone);
        step_one(&alone, mine.sequence, &s[0], 0, c->tokens, STEP_APPEND, NULL);
        OK(step_try(&alone, &mine, 1, STEP_FUSED, &one));
        outputs_same(&all, row, &one, 0, mine.count, c, "forks in a batch");
        outputs_free(&one);
        held_same(&w, id[i], &alone, mine.sequence, c->tokens + mine.count);
    }
    outputs_free(&all);
    for (int i = 0; i < N; i++)
        stream_free(&s[i]);
    world_close(&w);
    world_close(&alone);
}

static void forks_in_a_batch(void **state) {
    (void)state;
    run_some("together", together, 60);
}

/* Four beams over some steps: each takes up one of the last step's. */
static void beams(const struct config *c) {
    enum { N = 4, STEPS = 30 };
    struct world w;
    struct stream s;
    fkv_sequence id[N], next[N], scratch;
    int history[N][STEPS], older[N][STEPS];

    world_open(&w, c);
    int64_t others = other_bytes(&w);
    stream_init(&s, c, 1, c->tokens + N * STEPS);
    id[0] = world_sequence(&w);
    step_one(&w, id[0], &s, 0, c->tokens, STEP_APPEND, NULL);
    for (int i = 1; i < N; i++)
        id[i] = fork_of(&w, id[0]);
    for (int step = 0; step < STEPS; step++) {
        struct part parts[N];
        memcpy(older, history, sizeof history);
        for (int i = 0; i < N; i++) {
            int from = (int)random_int(&w.rng, 0, N - 1);
            next[i] = step ? fork_of(&w, id[from]) : id[i];
            memcpy(history[i], older[from], sizeof older[from]);
            history[i][step] = N * step + i;
        }
        for (int i = 0; step && i < N; i++)
            OK(fkv_sequence_free(w.cache, id[i]));
        memcpy(id, next, sizeof id);
        for (int i = 0; i < N; i++)
            parts[i] = (struct part){id[i], &s, c->tokens + history[i][step], 1};
        OK(step_try(&w, parts, N, STEP_FUSED, NULL));
    }
    check_bytes(&w, others);
    for (int i = 0; i < N; i++) {
        scratch = world_sequence(&w);
        step_one(&w, scratch, &s, 0, c->tokens, STEP_APPEND, NULL);
        for (int step = 0; step < STEPS; step++)
            step_one(&w, scratch, &s, c->tokens + history[i][step], 1, STEP_APPEND, NULL);
        held_same(&w, id[i], &w, scratch, c->tokens + STEPS);
    }
    stream_free(&s);
    world_close(&w);
}

static void beam_search(void **state) {
    (void)state;
    run_some("beams", beams, 36);
}

/* 10 000 forks of one sequence, which goes first. */
static void many_forks(void **state) {
    enum { N = 10000 };
    static fkv_sequence id[N];
    (void)state;
    for (enum coding_kind kind = 0; kind < N_KIND; kind++) {
        struct config c = forks_draw(&rng, kind);
        struct world w;
        struct stream s;
        c.tokens = 300;
        world_open(&w, &c);
        int64_t others = other_bytes(&w);
        stream_init(&s, &c, 1, 400);
        fkv_sequence parent = world_sequence(&w), twin = world_sequence(&w);
        step_one(&w, parent, &s, 0, 300, STEP_APPEND, NULL);
        step_one(&w, twin, &s, 0, 300, STEP_APPEND, NULL);
        uint64_t data = world_stats(&w, parent).bytes_exact;
        for (int i = 0; i < N; i++)
            id[i] = fork_of(&w, random_chance(&w.rng, 0.5) && i ? id[i / 2] : parent);
        fkv_stats all = world_stats(&w, FKV_ALL_SEQUENCES);
        assert_true(all.sequences == N + 2 && all.tokens == (N + 2) * 300);
        assert_true(all.bytes_exact == 2 * data);
        OK(fkv_sequence_free(w.cache, parent));
        CHECK(world_stats(&w, FKV_ALL_SEQUENCES).bytes_exact == 2 * data);
        check_bytes(&w, others);
        for (int i = 0; i < N; i++) {
            int at = (int)((int64_t)i * 7919 % N);
            if (i % 1000 == 0)
                held_same(&w, id[at], &w, twin, 300);
            if (i == N - 1) {
                CHECK(world_stats(&w, id[at]).bytes_shared == 0);
                step_both(&w, id[at], twin, &s, 300, 100);
            }
            OK(fkv_sequence_free(w.cache, id[at]));
        }
        check_bytes(&w, others);
        stream_free(&s);
        world_close(&w);
    }
}

/* ---- crops */

/* Lengths at and about every edge, and others. */
static int draw_lengths(struct world *w, int64_t *lengths, int count) {
    const struct config *c = &w->config;
    const int64_t coded = coded_end(c, tiles_to_code(c, c->tokens));
    const int64_t edges[] = {0, sinks(c), coded, floor_of(c, coded, coded - 1), c->tokens};
    int n = 0;

    for (int i = 0; i < LENGTH(edges); i++) {
        for (int64_t at = edges[i] - 1; at <= edges[i] + 1; at++) {
            if (at >= 0 && at <= c->tokens)
                lengths[n++] = at;
        }
    }
    while (n < count)
        lengths[n++] = random_int(&w->rng, 0, c->tokens);
    return n;
}

/* Crops `id`, whose tokens and coding are those of `whole`, to a length or to what is possible below. Returns
 * how many tiles are coded then. */
static int64_t crop_one(struct world *w, fkv_sequence id, fkv_sequence whole, int64_t to,
                        int64_t *possible) {
    const struct config *c = &w->config;
    const int64_t coded = tiles_to_code(c, c->tokens);
    fkv_stats before = world_stats(w, id);
    int64_t limit, length;

    OK(fkv_sequence_crop_limit(w->cache, id, &limit));
    CHECK(limit == coded_end(c, coded));
    OK(fkv_sequence_crop_floor(w->cache, id, to, possible));
    CHECK(*possible == floor_of(c, coded, to));
    fkv_status status = fkv_sequence_crop(w->cache, id, to);
    CHECK(status == (*possible == to ? FKV_OK : FKV_ERR_STATE));
    if (status != FKV_OK) {
        fkv_stats now = world_stats(w, id);
        same_stats(&before, &now, true);
        held_same(w, id, w, whole, c->tokens);
        OK(fkv_sequence_crop(w->cache, id, *possible));
    }
    OK(fkv_sequence_length(w->cache, id, &length));
    CHECK(length == *possible);
    held_same(w, id, w, whole, length);
    return length >= limit ? coded : length <= sinks(c) ? 0 : (length - sinks(c)) / 64;
}

static void cropped(const struct config *c) {
    struct world w;
    struct stream s;
    int64_t lengths[40], possible;

    world_open(&w, c);
    int64_t others = other_bytes(&w);
    int count = draw_lengths(&w, lengths, LENGTH(lengths));
    stream_init(&s, c, 1, c->tokens + 150);
    fkv_sequence whole = world_sequence(&w);
    step_one(&w, whole, &s, 0, c->tokens, STEP_APPEND, NULL);
    for (int i = 0; i < count; i++) {
        int64_t to = lengths[i];
        bool fork = random_chance(&w.rng, 0.5);
        fkv_sequence id = fork ? fork_of(&w, whole) : world_sequence(&w);
        if (!fork)
            step_one(&w, id, &s, 0, c->tokens, STEP_APPEND, NULL);
        int64_t coded = crop_one(&w, id, whole, to, &possible);
        step_one(&w, id, &s, possible, to - possible, STEP_APPEND, NULL);
        held_same(&w, id, &w, whole, possible);
        fkv_stats a = world_stats(&w, id);
        coded = coded > tiles_to_code(c, to) ? coded : tiles_to_code(c, to);
        CHECK(a.tokens_coded == (uint64_t)coded * 64);
        if (coded == tiles_to_code(c, to)) { /* then all is as if there had been no more */
            fkv_sequence same = world_sequence(&w);
            step_one(&w, same, &s, 0, to, STEP_APPEND, NULL);
            held_same(&w, id, &w, same, to);
            fkv_stats b = world_stats(&w, same);
            same_stats(&a, &b, to == 0);
            step_both(&w, id, same, &s, to, 150);
            held_same(&w, id, &w, same, to + 150);
            OK(fkv_sequence_free(w.cache, same));
        }
        OK(fkv_sequence_free(w.cache, id));
        if (i % 8 == 0)
            check_bytes(&w, others);
    }
    stream_free(&s);
    world_close(&w);
}

static void crop_is_append(void **state) {
    (void)state;
    run_some("cropped", cropped, 60);
}

/* Drafts of up to n_local tokens are taken back, now and then, while a sequence grows one by one. */
static void drafts(const struct config *c) {
    struct world w;
    struct stream s, draft;
    int64_t last_coded = 0, most = c->fourier || c->calibrated ? config_local(c) : 70;

    world_open(&w, c);
    stream_init(&s, c, 1, c->tokens);
    stream_init(&draft, c, 2, c->tokens + 80);
    fkv_sequence id = world_sequence(&w), plain = world_sequence(&w);
    for (int64_t at = 0, n; at < c->tokens; at += n) {
        n = random_int(&w.rng, 1, c->tokens - at < 40 ? c->tokens - at : 40);
        int64_t taken_back = random_int(&w.rng, 0, most);
        step_one(&w, id, &draft, at, taken_back, STEP_FUSED, NULL);
        OK(fkv_sequence_crop(w.cache, id, at));
        if (tiles_to_code(c, at + taken_back) > last_coded)
            break; /* a tile was coded because of drafts: the two differ by intent */
        if (at)
            held_same(&w, id, &w, plain, at);
        step_both(&w, id, plain, &s, at, n);
        held_same(&w, id, &w, plain, at + n);
        last_coded = tiles_to_code(c, at + n);
        fkv_stats a = world_stats(&w, id), b = world_stats(&w, plain);
        same_stats(&a, &b, false);
    }
    stream_free(&s);
    stream_free(&draft);
    world_close(&w);
}

static void drafts_taken_back(void **state) {
    (void)state;
    run_some("drafts", drafts, 90);
}

/* A step that only some layers have had is taken back, or cannot be and is finished. */
static void half_step(const struct config *c) {
    struct world w;
    struct stream s;
    struct outputs o;
    fkv_sequence id, other;
    int64_t length;

    world_open(&w, c);
    int64_t n = c->tokens, more = random_int(&w.rng, 1, 100), end = n + more;
    int64_t few = random_int(&w.rng, 1, random_chance(&w.rng, 0.5) ? 2 : 50);
    stream_init(&s, c, 1, end + 100);
    id = world_sequence(&w);
    step_one(&w, id, &s, 0, n, STEP_APPEND, NULL);
    int64_t coded = tiles_to_code(c, n), ahead = tiles_to_code(c, end);
    if (random_chance(&w.rng, 0.5)) /* one layer of two */
        w.first_layer = c->layers - 1;
    else
        w.config.layers = 1;
    step_one(&w, id, &s, n, more, STEP_FUSED, NULL);
    w.config.layers = c->layers;
    w.first_layer = 0;
    if (c->layers == 1) {
        OK(fkv_sequence_crop(w.cache, id, floor_of(c, ahead, n)));
    } else {
        OK(fkv_sequence_length(w.cache, id, &length));
        CHECK(length == n);
        CHECK(fkv_sequence_fork(w.cache, id, &other) == FKV_ERR_STATE);
        CHECK(fkv_sequence_crop(w.cache, id, n + 1) == FKV_ERR_INVALID);
        OK(fkv_sequence_crop_limit(w.cache, id, &length));
        CHECK(length == coded_end(c, ahead));
        fkv_status status = fkv_sequence_crop(w.cache, id, n);
        CHECK(status == (floor_of(c, ahead, n) == n ? FKV_OK : FKV_ERR_STATE));
        if (status != FKV_OK)
            OK(fkv_sequence_crop(w.cache, id, floor_of(c, ahead, n)));
    }
    OK(fkv_sequence_length(w.cache, id, &length));
    CHECK(length == floor_of(c, ahead, n));
    /* all goes on, though the layers may have coded differently far */
    other = fork_of(&w, id);
    OK(step_try(&w, &(struct part){other, &s, length, few}, 1, STEP_ATTEND, &o));
    for (int layer = 0; layer < c->layers; layer++) {
        struct held h;
        held_read(&h, &w, other, layer, 0, length);
        check_attention(&w, layer, &h, &s, length, few, length, false, &o, 0);
        held_free(&h);
    }
    outputs_free(&o);
    step_one(&w, other, &s, length, end - length, STEP_FUSED, NULL);
    step_one(&w, other, &s, end, 100, STEP_FUSED, NULL);
    step_both(&w, id, other, &s, length, 0);
    if (ahead == coded) {
        fkv_sequence scratch = world_sequence(&w);
        step_one(&w, scratch, &s, 0, end + 100, STEP_APPEND, NULL);
        held_same(&w, other, &w, scratch, end + 100);
    }
    stream_free(&s);
    world_close(&w);
}

static void half_steps(void **state) {
    (void)state;
    run_some("half_step", half_step, 90);
    for (int i = 0; i < runs(60);
         i++) { /* the half step codes, into a new segment, and is taken back */
        struct config c = forks_draw(&rng, KIND_FOURIER);
        int64_t segment = c.params.period / 64 * 64;
        c.layers = 2;
        c.params.n_local = (int)random_int(&rng, 64, 130);
        c.tokens = sinks(&c) + c.params.n_local + segment * random_int(&rng, 0, 3) +
                   random_int(&rng, 20, 61);
        property_run("half_step", half_step, &c);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fork_then_part), cmocka_unit_test(forks_in_a_batch),
        cmocka_unit_test(beam_search),    cmocka_unit_test(many_forks),
        cmocka_unit_test(crop_is_append), cmocka_unit_test(drafts_taken_back),
        cmocka_unit_test(half_steps)};

    random_init(&rng, random_seed("test_forks", 7));
    return cmocka_run_group_tests_name("forks", tests, NULL, NULL);
}
