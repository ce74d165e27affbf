/* SPDX-License-Identifier: Apache-2.0 */
/* The fidelity meter: it reports what float64 finds in data read back, and nothing else notices it. */
#include "property.h"

static struct random rng;

static int runs(int full) {
    return random_quick() ? (full + 7) / 8 : full;
}

static struct config draw(void) {
    struct config c = config_draw(&rng);

    config_draw_calibrated(&rng, &c);
    c.out = FKV_DTYPE_F32; /* whole outputs are compared with what the step returned */
    return c;
}

static fkv_fidelity fidelity_of(const struct world *w, int layer) {
    fkv_fidelity f = {.struct_size = sizeof f};

    OK(fkv_cache_fidelity(w->cache, layer, &f));
    return f;
}

static int64_t blocks_of(const struct config *c) {
    return config_coded(c, c->tokens) / c->codec.block;
}

/* ---- what the oracle finds */

struct found {
    int64_t samples;
    double block_error, block_energy, block_max;
    double lse, lse_square, lse_max, weight;
    double output_error, output_energy, output_max;
};

/* Attention of one query head to `count` tokens of what is held, from `first` on. */
static struct oracle_row look(const struct world *w, const struct held *h, const double *q,
                              int head, int64_t first, int64_t count, double *out) {
    const struct config *c = &w->config;
    const int64_t stride = (int64_t)c->kv_heads * c->head_dim;
    const int64_t at = first * stride + (int64_t)(head / c->group) * c->head_dim;

    return oracle_attend(q, h->k + at, h->v + at, count, stride, c->head_dim,
                         oracle_scale(&w->model), out);
}

static double square(const double *x, int n) {
    double sum = 0;

    for (int i = 0; i < n; i++)
        sum += x[i] * x[i];
    return sum;
}

/* One query head of the token that seals a block: attention to all tokens up to itself, with this block exact and
 * coded. `before` is what the step saw, `coded` what is held now. */
static void find_sample(const struct world *w, int layer, const struct stream *s, int64_t block,
                        int head, const struct held *before, const struct held *coded,
                        struct found *f) {
    const struct config *c = &w->config;
    const int D = c->head_dim, heads = c->kv_heads * c->group;
    const int64_t first = c->codec.n_sink + block * c->codec.block, end = first + c->codec.block;
    const int64_t token = end + c->codec.n_local - 1;
    double q[FKV_MAX_HEAD_DIM], part[3][FKV_MAX_HEAD_DIM], o[FKV_MAX_HEAD_DIM];
    double other[FKV_MAX_HEAD_DIM], whole[FKV_MAX_HEAD_DIM];

    for (int d = 0; d < D; d++)
        q[d] = (double)s->q[layer][(token * heads + head) * D + d];
    oracle_rope(&w->model, s->positions[token], q);
    const double l = look(w, before, q, head, first, c->codec.block, o).lse;
    const double m = look(w, coded, q, head, first, c->codec.block, other).lse;
    const double all = look(w, before, q, head, 0, token + 1, whole).lse;
    for (int d = 0; d < D; d++)
        part[0][d] = other[d] - o[d];
    /* the whole with this block coded: taken out and put back in */
    for (int d = 0; d < D; d++) {
        const double rest = whole[d] - exp(l - all) * o[d];
        part[1][d] =
            (rest + exp(m - all) * other[d]) / (1 - exp(l - all) + exp(m - all)) - whole[d];
    }
    f->samples++;
    f->block_error += square(part[0], D);
    f->block_energy += square(o, D);
    f->block_max = fmax(f->block_max, sqrt(square(part[0], D) / square(o, D)));
    f->lse += m - l;
    f->lse_square += (m - l) * (m - l);
    f->lse_max = fmax(f->lse_max, fabs(m - l));
    f->weight += exp(l - all);
    f->output_error += square(part[1], D);
    f->output_energy += square(whole, D);
    f->output_max = fmax(f->output_max, sqrt(square(part[1], D) / square(whole, D)));
}

static void near(const char *what, int layer, double got, double want, double slack) {
    if (!(fabs(got - want) <= 1e-3 * fabs(want) + slack))
        property_fail("layer %d: %s is %.9g, want %.9g", layer, what, got, want);
}

/* What f32 may add to errors of outputs and to log-sum-exps. */
#define SLACK 5e-5

static void compare(int layer, const fkv_fidelity *got, const struct found *f) {
    const double n = (double)f->samples;

    CHECK(got->samples == (uint64_t)f->samples);
    near("block_error", layer, got->block_error, sqrt(f->block_error / f->block_energy), SLACK);
    near("block_error_max", layer, got->block_error_max, f->block_max, 4 * SLACK);
    near("lse_bias", layer, got->lse_bias, f->lse / n, SLACK);
    near("lse_error", layer, got->lse_error, sqrt(f->lse_square / n), SLACK);
    near("lse_error_max", layer, got->lse_error_max, f->lse_max, SLACK);
    near("weight", layer, got->weight, f->weight / n, SLACK);
    near("output_error", layer, got->output_error, sqrt(f->output_error / f->output_energy), SLACK);
    near("output_error_max", layer, got->output_error_max, f->output_max, 4 * SLACK);
}

/* Prefill in one step: all that its queries see is exact. A twin whose local window never ends holds it. */
static void oracle(const struct config *c) {
    struct config open = *c;
    struct world w, twin;
    struct stream s;
    struct held before, coded;

    open.codec.n_local = (int)c->tokens;
    world_open(&w, c);
    world_open(&twin, &open);
    stream_init(&s, c, 1, c->tokens);
    OK(fkv_cache_meter(w.cache, 1));
    fkv_sequence id = world_sequence(&w), exact = world_sequence(&twin);
    feed(&w, id, &s, 0, STEP_FUSED, NULL);
    feed(&twin, exact, &s, 0, STEP_APPEND, NULL);
    for (int layer = 0; layer < c->layers; layer++) {
        struct found f = {0};
        held_read(&before, &twin, exact, layer, 0, s.n);
        held_read(&coded, &w, id, layer, 0, s.n);
        for (int64_t b = 0; b < blocks_of(c); b++)
            for (int head = 0; head < c->kv_heads * c->group; head++)
                find_sample(&w, layer, &s, b, head, &before, &coded, &f);
        fkv_fidelity got = fidelity_of(&w, layer);
        CHECK(got.blocks == (uint64_t)blocks_of(c) && got.blocks_missed == 0);
        if (f.samples)
            compare(layer, &got, &f);
        held_free(&before);
        held_free(&coded);
    }
    stream_free(&s);
    world_close(&w);
    world_close(&twin);
}

static void against_the_oracle(void **state) {
    (void)state;
    for (int i = 0; i < runs(80); i++) {
        struct config c = draw();
        if (i % 4 == 0)
            c.codec.domain = FKV_DOMAIN_UNROTATED;
        property_run("oracle", oracle, &c);
    }
}

/* Every width alone; more bits, less error, and none where all is exact. */
static void widths(void **state) {
    static const int bits[] = {0, 2, 3, 4, 8, 16};
    (void)state;

    for (int i = 0; i < runs(24); i++) {
        struct config c = draw();
        double last = INFINITY;
        c.threads = 1;
        c.codec.domain = i % 2 ? FKV_DOMAIN_UNROTATED : FKV_DOMAIN_ROTATED;
        c.carriers = false;
        c.tokens = c.codec.n_sink + c.codec.n_local + 2 * c.codec.block;
        for (int b = 0; b < LENGTH(bits); b++) {
            struct world w;
            struct stream s;
            c.bits = bits[b];
            property_run("oracle", oracle, &c);
            world_open(&w, &c);
            stream_init(&s, &c, 1, c.tokens);
            OK(fkv_cache_meter(w.cache, 1));
            feed(&w, world_sequence(&w), &s, 0, STEP_FUSED, NULL);
            const fkv_fidelity f = fidelity_of(&w, FKV_ALL_LAYERS);
            assert_true(f.block_error < last);
            assert_true(bits[b] < 16 || f.block_error < 1e-5);
            assert_true(bits[b] > 0 || f.block_error > 0.5);
            last = f.block_error;
            stream_free(&s);
            world_close(&w);
        }
    }
}

/* ---- nothing else notices */

static void unnoticed(const struct config *c) {
    struct world with, without;
    struct stream s;
    struct outputs a, b;

    world_open(&with, c);
    world_open(&without, c);
    stream_init(&s, c, 1, c->tokens);
    const uint64_t empty = world_stats(&with, FKV_ALL_SEQUENCES).bytes;
    OK(fkv_cache_meter(with.cache, 0.1 + 0.9 * random_uniform(&with.rng)));
    const uint64_t more = world_stats(&with, FKV_ALL_SEQUENCES).bytes - empty;
    CHECK(more > 0 && more < 256 + 256 * (uint64_t)c->layers);
    with.rng = without.rng;
    fkv_sequence x = world_sequence(&with), y = world_sequence(&without);
    feed(&with, x, &s, 5, STEP_FUSED, &a);
    feed(&without, y, &s, 5, STEP_FUSED, &b);
    outputs_same(&a, 0, &b, 0, s.n, c, "with the meter");
    held_same(&with, x, &without, y, s.n);
    CHECK(world_stats(&with, x).bytes == world_stats(&without, y).bytes);
    CHECK(world_stats(&with, FKV_ALL_SEQUENCES).bytes ==
          world_stats(&without, FKV_ALL_SEQUENCES).bytes + more);
    OK(fkv_cache_meter(with.cache, 0));
    CHECK(world_stats(&with, FKV_ALL_SEQUENCES).bytes ==
          world_stats(&without, FKV_ALL_SEQUENCES).bytes);
    outputs_free(&a);
    outputs_free(&b);
    stream_free(&s);
    world_close(&with);
    world_close(&without);
}

static void outputs_are_the_same(void **state) {
    (void)state;
    for (int i = 0; i < runs(40); i++) {
        struct config c = draw();
        c.out = c.in;
        property_run("unnoticed", unnoticed, &c);
    }
}

/* ---- which blocks, and that figures depend on nothing else */

static void same_blocks(const fkv_fidelity *a, const fkv_fidelity *b, const char *what) {
    if (a->blocks != b->blocks || a->samples != b->samples || a->blocks_missed ||
        b->blocks_missed || memcmp(&a->block_error, &b->block_error, 5 * sizeof(double)) != 0)
        property_fail("%s: %llu and %llu blocks, errors %.17g and %.17g, %.17g and %.17g", what,
                      (unsigned long long)a->blocks, (unsigned long long)b->blocks, a->block_error,
                      b->block_error, a->lse_error, b->lse_error);
}

/* One world, fed in some pieces, perhaps beside a short sequence that seals nothing. */
static void gauge(const struct config *c, const struct stream *s, double fraction, int64_t pieces,
                  bool neighbour, fkv_fidelity *to) {
    struct world w;
    struct outputs o;

    world_open(&w, c);
    OK(fkv_cache_meter(w.cache, fraction));
    const fkv_sequence id = world_sequence(&w), other = world_sequence(&w);
    for (int64_t at = 0, n; at < s->n; at += n) {
        n = pieces == 0 ? s->n : random_int(&w.rng, 1, 1 + 2 * s->n / pieces);
        n = n < s->n - at ? n : s->n - at;
        struct part parts[2] = {{other, s, at, at == 0 ? 1 : 0}, {id, s, at, n}};
        OK(step_try(&w, parts + !neighbour, 1 + neighbour, STEP_FUSED, &o));
        outputs_free(&o);
    }
    for (int layer = 0; layer < c->layers; layer++) {
        to[layer] = fidelity_of(&w, layer);
        const double wanted = fraction * (double)blocks_of(c);
        CHECK(fabs((double)to[layer].blocks - wanted) < 1);
        CHECK(to[layer].fraction == fraction);
    }
    to[c->layers] = fidelity_of(&w, FKV_ALL_LAYERS);
    world_close(&w);
}

static void invariant(const struct config *c) {
    struct config threads = *c;
    struct stream s;
    struct random r;
    fkv_fidelity a[MAX_LAYERS + 1], b[MAX_LAYERS + 1];

    random_init(&r, c->seed + 5);
    const double fraction = random_chance(&r, 0.3) ? 1 : 0.05 + 0.95 * random_uniform(&r);
    threads.threads = c->threads == 3 ? 1 : 3;
    stream_init(&s, c, 1, c->tokens);
    gauge(c, &s, fraction, 0, false, a);
    gauge(&threads, &s, fraction, 0, false, b);
    for (int layer = 0; layer <= c->layers; layer++) /* of all that is reported */
        if (memcmp(&a[layer], &b[layer], sizeof *a) != 0)
            property_fail("layer %d depends on the number of threads", layer);
    /* what a query sees beside its block may have been coded in smaller steps, so that only what is of the blocks
     * alone stays the same */
    gauge(c, &s, fraction, 4, false, b);
    for (int layer = 0; layer < c->layers; layer++)
        same_blocks(&a[layer], &b[layer], "in other pieces");
    gauge(&threads, &s, fraction, 7, true, b);
    for (int layer = 0; layer < c->layers; layer++)
        same_blocks(&a[layer], &b[layer], "beside another sequence");
    stream_free(&s);
}

static void figures_depend_on_the_tokens_alone(void **state) {
    (void)state;
    for (int i = 0; i < runs(40); i++) {
        struct config c = draw();
        if (i % 8 == 7) { /* a step that has no table of RoPE's sines */
            c.head_dim = 16;
            c.rope_dim = 0;
            c.layers = c.group = 1;
            c.tokens = random_int(&rng, 2065, 2300);
        }
        property_run("invariant", invariant, &c);
    }
}

/* ---- forks, crops and frees */

static void operations(const struct config *c) {
    struct world w;
    struct stream s;
    int64_t limit;

    world_open(&w, c);
    stream_init(&s, c, 1, c->tokens);
    OK(fkv_cache_meter(w.cache, 1));
    fkv_sequence id = world_sequence(&w), fork;
    const int64_t half = s.n / 2;
    step_one(&w, id, &s, 0, half, STEP_FUSED, NULL);
    OK(fkv_sequence_fork(w.cache, id, &fork));
    step_one(&w, id, &s, half, s.n - half, STEP_FUSED, NULL);
    const fkv_fidelity once = fidelity_of(&w, FKV_ALL_LAYERS);
    CHECK(once.blocks == (uint64_t)(blocks_of(c) * c->layers));
    /* a fork seals blocks of its own; those sealed before it are no news */
    step_one(&w, fork, &s, half, s.n - half, STEP_FUSED, NULL);
    const uint64_t own =
        (uint64_t)((config_coded(c, s.n) - config_coded(c, half)) / c->codec.block);
    CHECK(fidelity_of(&w, FKV_ALL_LAYERS).blocks == once.blocks + own * (uint64_t)c->layers);
    OK(fkv_sequence_crop_limit(w.cache, fork, &limit));
    OK(fkv_sequence_crop(w.cache, fork, limit));
    step_one(&w, fork, &s, limit, s.n - limit, STEP_FUSED, NULL); /* nothing to seal again */
    CHECK(fidelity_of(&w, FKV_ALL_LAYERS).blocks == once.blocks + own * (uint64_t)c->layers);
    OK(fkv_sequence_crop(w.cache, fork, 0));
    OK(fkv_sequence_free(w.cache, random_chance(&w.rng, 0.5) ? id : fork));
    CHECK(fidelity_of(&w, FKV_ALL_LAYERS).blocks == once.blocks + own * (uint64_t)c->layers);
    stream_free(&s);
    world_close(&w);
}

static void forks_and_crops(void **state) {
    (void)state;
    for (int i = 0; i < runs(40); i++) {
        struct config c = draw();
        property_run("operations", operations, &c);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(against_the_oracle),
        cmocka_unit_test(widths),
        cmocka_unit_test(outputs_are_the_same),
        cmocka_unit_test(figures_depend_on_the_tokens_alone),
        cmocka_unit_test(forks_and_crops),
    };

    random_init(&rng, random_seed("test_meter", 9));
    return cmocka_run_group_tests_name("meter", tests, NULL, NULL);
}
