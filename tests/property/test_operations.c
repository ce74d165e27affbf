/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random operations on many sequences (create, fork, crop, free, append, attend, read) agree with plain lists
 * of tokens, and the bytes with the allocator's, after every one of them.
 */
#include "forks.h"

static struct random rng;

#define MAX_LIVE 12
#define MOST_TOKENS 420
#define POOL 512 /* tokens to draw from */

/* What a sequence should be: its tokens, as indices into the pool, and how much of it is coded. */
struct model {
    fkv_sequence id;
    int64_t n, coded;
    int16_t token[MOST_TOKENS];
};

struct operations {
    struct world w;
    struct stream pool;
    struct model live[MAX_LIVE];
    int n_live;
    int64_t others;
    fkv_sequence gone;
};

static int64_t op_counts[9];

/* The model with tokens first..first+n-1 of the pool appended. */
static void model_append(const struct config *c, struct model *m, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        m->token[m->n++] = (int16_t)(first + i);
    int64_t coded = tiles_to_code(c, m->n);
    m->coded = coded > m->coded ? coded : m->coded;
}

static void append_run(struct operations *o, struct model *m, int64_t first, int64_t n) {
    step_one(&o->w, m->id, &o->pool, first, n, STEP_APPEND, NULL);
    model_append(&o->w.config, m, first, n);
}

/* A sequence with the tokens and coding of `m` that never shared a page. */
static struct model rebuild(struct operations *o, const struct model *m) {
    const struct config *c = &o->w.config;
    struct model fresh = {.id = world_sequence(&o->w)};
    int64_t edge = coded_end(c, m->coded);

    for (int64_t i = 0, n; i < edge; i += n) { /* runs of the pool */
        for (n = 1; i + n < edge && m->token[i + n] == m->token[i] + n;)
            n++;
        append_run(o, &fresh, m->token[i], n);
    }
    for (int64_t n; fresh.coded < m->coded; fresh.coded = tiles_to_code(c, fresh.n)) {
        /* other tokens push these out of the window */
        n = sinks(c) + config_local(c) + 64 * m->coded - fresh.n;
        n = n < 1 ? 1 : n > 64 ? 64 : n;
        append_run(o, &fresh, 7, n);
    }
    OK(fkv_sequence_crop(o->w.cache, fresh.id, edge));
    fresh.n = edge;
    fresh.coded = m->coded;
    for (int64_t i = edge, n; i < m->n; i += n) {
        for (n = 1; i + n < m->n && m->token[i + n] == m->token[i] + n;)
            n++;
        append_run(o, &fresh, m->token[i], n);
    }
    CHECK(fresh.coded == m->coded);
    return fresh;
}

static void check_rebuilt(struct operations *o, struct model *m) {
    struct model fresh = rebuild(o, m);
    fkv_stats a = world_stats(&o->w, m->id), b = world_stats(&o->w, fresh.id);

    held_same(&o->w, m->id, &o->w, fresh.id, m->n);
    same_stats(&a, &b, false);
    if (m->n + 3 <= MOST_TOKENS) { /* and both attend alike */
        step_both(&o->w, m->id, fresh.id, &o->pool, 100, 3);
        model_append(&o->w.config, m, 100, 3);
    }
    OK(fkv_sequence_free(o->w.cache, fresh.id));
}

/* Some exact tokens are those of the list: values as they are, keys rotated by their place. */
static void check_list(struct operations *o, const struct model *m) {
    const struct config *c = &o->w.config;
    int64_t edge = coded_end(c, m->coded), count = m->n < 3 ? m->n : 3;
    int64_t first = m->n - count;
    size_t row = (size_t)(c->kv_heads * c->head_dim);
    const bool unrotated = c->calibrated && c->codec.domain == FKV_DOMAIN_UNROTATED;

    if (random_chance(&o->w.rng, 0.3))
        first = random_int(&o->w.rng, 0, m->n - count);
    for (int layer = 0; layer < c->layers; layer++) {
        struct held h;
        held_read(&h, &o->w, m->id, layer, first, count);
        for (int64_t i = 0; i < count; i++) {
            size_t token = (size_t)m->token[first + i];
            if (first + i >= sinks(c) && first + i < edge)
                continue;
            for (size_t d = 0; d < row; d++)
                CHECK(h.v[(size_t)i * row + d] ==
                      oracle_round((double)o->pool.v[layer][token * row + d], c->storage));
            for (size_t head = 0; head < row; head += (size_t)c->head_dim) {
                double k[FKV_MAX_HEAD_DIM];
                for (int d = 0; d < c->head_dim; d++) {
                    k[d] = (double)o->pool.k[layer][token * row + head + (size_t)d];
                    if (unrotated) /* rounded as it came, then rotated by who reads it */
                        k[d] = oracle_round(k[d], c->storage);
                }
                oracle_rope(&o->w.model, first + i, k);
                for (int d = 0; d < c->head_dim; d++)
                    CHECK(fabs(h.k[(size_t)i * row + head + (size_t)d] - k[d]) <=
                          2e-6 + (unrotated ? 0 : 1.01 * oracle_half_ulp(k[d], c->storage)));
            }
        }
        held_free(&h);
    }
}

static void check_attend(struct operations *o, const struct model *m) {
    const struct config *c = &o->w.config;
    struct outputs out;
    struct part part = {m->id, &o->pool, random_int(&o->w.rng, 0, POOL - 3), 2};

    /* queries have the positions behind the sequence */
    int64_t kept[2] = {o->pool.positions[part.first], o->pool.positions[part.first + 1]};
    for (int64_t i = 0; i < 2; i++)
        o->pool.positions[part.first + i] = m->n + i;
    OK(step_try(&o->w, &part, 1, STEP_ATTEND, &out));
    for (int layer = 0; layer < c->layers; layer++) {
        struct held h;
        held_read(&h, &o->w, m->id, layer, 0, m->n);
        check_attention(&o->w, layer, &h, &o->pool, part.first, 2, m->n, false, &out, 0);
        held_free(&h);
    }
    for (int64_t i = 0; i < 2; i++)
        o->pool.positions[part.first + i] = kept[i];
    outputs_free(&out);
}

/* Lengths, coding and bytes of all sequences, and the allocator's word on them. */
static void check_all(struct operations *o) {
    const struct config *c = &o->w.config;
    fkv_stats all = world_stats(&o->w, FKV_ALL_SEQUENCES);
    uint64_t tokens = 0, coded = 0;

    for (int i = 0; i < o->n_live; i++) {
        int64_t length = -1;
        OK(fkv_sequence_length(o->w.cache, o->live[i].id, &length));
        CHECK(length == o->live[i].n);
        tokens += (uint64_t)o->live[i].n;
        coded += 64 * (uint64_t)o->live[i].coded;
    }
    CHECK(all.sequences == (uint64_t)o->n_live);
    CHECK(all.tokens == tokens && all.tokens_coded == coded);
    CHECK(all.dense_bytes ==
          tokens * 4 * (uint64_t)c->kv_heads * (uint64_t)c->head_dim * (uint64_t)c->layers);
    CHECK(o->n_live > 1 || all.bytes_shared == 0);
    check_bytes(&o->w, o->others);
}

static void op_create(struct operations *o) {
    if (o->n_live < MAX_LIVE)
        o->live[o->n_live++] = (struct model){.id = world_sequence(&o->w)};
}

static void op_fork(struct operations *o, struct model *m) {
    if (o->n_live == MAX_LIVE)
        return;
    o->live[o->n_live] = *m;
    o->live[o->n_live++].id = fork_of(&o->w, m->id);
}

static void op_free(struct operations *o, struct model *m) {
    int64_t live = o->w.live;
    fkv_stats stats = world_stats(&o->w, m->id);

    OK(fkv_sequence_free(o->w.cache, m->id));
    if (o->n_live > 1) /* else the spectrum goes, too */
        CHECK(live - o->w.live == (int64_t)(stats.bytes - stats.bytes_shared));
    CHECK(fkv_sequence_free(o->w.cache, m->id) == FKV_ERR_HANDLE);
    o->gone = m->id;
    *m = o->live[--o->n_live];
}

static void op_crop(struct operations *o, struct model *m) {
    const struct config *c = &o->w.config;
    int64_t to = random_int(&o->w.rng, 0, m->n), possible, got;

    if (random_chance(&o->w.rng, 0.6)) /* near the end, as with drafts */
        to = m->n - random_int(&o->w.rng, 0, m->n < 8 ? m->n : 8);
    possible = floor_of(c, m->coded, to);
    OK(fkv_sequence_crop_floor(o->w.cache, m->id, to, &got));
    CHECK(got == possible);
    OK(fkv_sequence_crop_limit(o->w.cache, m->id, &got));
    CHECK(got == coded_end(c, m->coded));
    fkv_status status = fkv_sequence_crop(o->w.cache, m->id, to);
    CHECK(status == (possible == to ? FKV_OK : FKV_ERR_STATE));
    CHECK(fkv_sequence_crop(o->w.cache, m->id, m->n + 1) == FKV_ERR_INVALID);
    if (status != FKV_OK)
        return;
    if (to < coded_end(c, m->coded))
        m->coded = to <= sinks(c) ? 0 : (to - sinks(c)) / 64;
    m->n = to;
}

/* One step of several sequences; if `bad`, one that is refused. */
static void op_append(struct operations *o, bool bad) {
    struct part parts[MAX_LIVE] = {{0}};
    struct model *m[MAX_LIVE];
    int count = 0;
    struct random *r = &o->w.rng;
    float kept = 0, *spoilt = NULL;

    for (int i = 0; i < o->n_live; i++) {
        struct model *candidate = &o->live[i];
        int64_t n = random_chance(r, 0.6) ? random_int(r, 0, 3) : random_int(r, 0, 70);
        if (candidate->n + n > MOST_TOKENS || random_chance(r, 0.5))
            continue;
        m[count] = candidate;
        parts[count++] = (struct part){candidate->id, &o->pool, random_int(r, 0, POOL - n), n};
    }
    if (bad && count && parts[count - 1].count) {
        const struct part *last = &parts[count - 1];
        spoilt = o->pool.v[0] + last->first * o->w.config.kv_heads * o->w.config.head_dim;
        kept = *spoilt;
        *spoilt = NAN;
    }
    fkv_status status = step_try(&o->w, parts, count, STEP_FUSED, NULL);
    if (spoilt)
        *spoilt = kept;
    CHECK(status == (spoilt ? FKV_ERR_NONFINITE : FKV_OK));
    for (int i = 0; i < count && status == FKV_OK; i++)
        model_append(&o->w.config, m[i], parts[i].first, parts[i].count);
}

static void operate(struct operations *o) {
    struct random *r = &o->w.rng;
    int kind = (int)random_int(r, 0, 99);
    struct model *m = o->n_live ? &o->live[random_int(r, 0, o->n_live - 1)] : NULL;

    kind = !m || kind < 5 ? 0
           : kind < 20    ? 1
           : kind < 32    ? 2
           : kind < 52    ? 3
           : kind < 82    ? 4
           : kind < 85    ? 5
           : kind < 92    ? 6
           : kind < 99    ? 7
                          : 8;
    op_counts[kind]++;
    switch (kind) {
    case 0:
        op_create(o);
        break;
    case 1:
        op_fork(o, m);
        break;
    case 2:
        op_free(o, m);
        break;
    case 3:
        op_crop(o, m);
        break;
    case 4:
    case 5:
        op_append(o, kind == 5);
        break;
    case 6:
        check_attend(o, m);
        break;
    case 7:
        check_list(o, m);
        break;
    default:
        check_rebuilt(o, m);
    }
}

/* As many operations as the configuration has tokens. */
static void operations(const struct config *c) {
    static struct operations o;

    memset(&o, 0, sizeof o);
    world_open(&o.w, c);
    o.others = other_bytes(&o.w);
    stream_init(&o.pool, c, 1, POOL);
    for (int64_t i = 0; i < c->tokens; i++) {
        operate(&o);
        check_all(&o);
    }
    while (o.n_live) {
        check_list(&o, &o.live[0]);
        check_rebuilt(&o, &o.live[0]);
        op_free(&o, &o.live[0]);
        check_all(&o);
    }
    stream_free(&o.pool);
    world_close(&o.w);
}

static void random_operations(void **state) {
    enum { WORLDS = 72, EACH = 1800 };
    int64_t total = 0;

    (void)state;
    for (int i = 0; i < (random_quick() ? 8 : WORLDS); i++) {
        struct config c = forks_draw(&rng, i % N_KIND);
        c.layers = 1 + i % 2;
        c.head_dim = 8;
        c.tokens = random_quick() ? EACH / 8 : EACH;
        property_run("operations", operations, &c);
    }
    for (int i = 0; i < LENGTH(op_counts); i++) {
        total += op_counts[i];
        assert_true(op_counts[i] > 0);
    }
    print_message("%lld operations: create %lld fork %lld free %lld crop %lld append %lld refused "
                  "%lld attend %lld read %lld rebuild %lld\n",
                  (long long)total, (long long)op_counts[0], (long long)op_counts[1],
                  (long long)op_counts[2], (long long)op_counts[3], (long long)op_counts[4],
                  (long long)op_counts[5], (long long)op_counts[6], (long long)op_counts[7],
                  (long long)op_counts[8]);
    assert_true(random_quick() || total >= 100000);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(random_operations)};

    random_init(&rng, random_seed("test_operations", 11));
    return cmocka_run_group_tests_name("operations", tests, NULL, NULL);
}
