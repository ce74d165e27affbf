/* SPDX-License-Identifier: Apache-2.0 */
/* Calibrated profiles: what is held is as near as the scales promise, and attention runs on what is held. */
#include "property.h"

static struct random rng;

static int runs(int full) {
    return random_quick() ? (full + 7) / 8 : full;
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static struct config draw(void) {
    struct config c = config_draw(&rng);

    config_draw_calibrated(&rng, &c);
    return c;
}

static double scaling_of(const struct world *w) {
    return w->model.rope_scaling != 0 ? w->model.rope_scaling : 1;
}

/* ---- what is exact: the tokens as their storage type has them */

/* Tokens as held while exact, and, in the domain of the profile, as they are coded from. */
struct exact {
    struct held seen;  /* as attention sees them: after RoPE */
    struct held coded; /* of the domain */
};

/* One layer of a whole stream. Rotated keys are rounded after RoPE, by the library's own sines: they are read from
 * an exact cache. */
static void exact_read(struct exact *x, struct world *w, const struct stream *s, int layer) {
    const struct config *c = &w->config;
    const size_t row = (size_t)c->kv_heads * (size_t)c->head_dim, count = (size_t)s->n * row;
    struct config plain = *c;
    struct world twin;

    plain.calibrated = false;
    world_open(&twin, &plain);
    fkv_sequence id = world_sequence(&twin);
    feed(&twin, id, s, 0, STEP_APPEND, NULL);
    held_read(&x->seen, &twin, id, layer, 0, s->n);
    held_read(&x->coded, &twin, id, layer, 0, s->n);
    world_close(&twin);
    if (c->codec.domain == FKV_DOMAIN_ROTATED)
        return;
    for (size_t i = 0; i < count; i++)
        x->coded.k[i] = x->seen.k[i] = oracle_round((double)s->k[layer][i], c->storage);
    for (size_t i = 0; i < count; i += (size_t)c->head_dim)
        oracle_rope(&w->model, s->positions[i / row], x->seen.k + i);
}

static void exact_free(struct exact *x) {
    held_free(&x->seen);
    held_free(&x->coded);
}

/* ---- what is held */

/* K as read, brought into the domain of the profile. */
static void to_domain(const struct world *w, const struct stream *s, struct held *h) {
    const struct config *c = &w->config;
    const int64_t row = (int64_t)c->kv_heads * c->head_dim;
    const double scaling = scaling_of(w);
    int rotated = c->rope_dim ? c->rope_dim : c->head_dim;

    if (c->codec.domain == FKV_DOMAIN_ROTATED || c->rope == FKV_ROPE_NONE)
        return;
    for (int64_t i = 0; i < h->n * row; i += c->head_dim) {
        oracle_rope(&w->model, -s->positions[i / row], h->k + i);
        for (int d = 0; d < rotated; d++)
            h->k[i + d] /= scaling * scaling;
    }
}

struct channel {
    int layer, part, head, d;
    int bits;
};

/* Carriers of a head at a token's position, as they belong into the domain. */
static void carriers_at(const struct world *w, const struct channel *at, int64_t position,
                        double *x) {
    const struct config *c = &w->config;
    const float *carrier =
        w->carrier[at->part] + (size_t)((at->layer * c->kv_heads + at->head) * c->head_dim);

    for (int d = 0; d < c->head_dim; d++)
        x[d] = (double)carrier[d];
    if (at->part == FKV_PART_K && c->codec.domain == FKV_DOMAIN_ROTATED)
        oracle_rope(&w->model, position, x);
}

/* One group of tokens of one channel: x exact, y held, m the carrier there. */
static void check_group(const struct world *w, const struct channel *at, const double *x,
                        const double *y, const double *m, int64_t first) {
    const int n = w->config.codec.group;
    const int64_t stride = (int64_t)w->config.kv_heads * w->config.head_dim;
    double low = INFINITY, high = -INFINITY, size = 0;

    for (int t = 0; t < n; t++) {
        low = fmin(low, x[t * stride] - m[t]);
        high = fmax(high, x[t * stride] - m[t]);
        size = fmax(size, fabs(x[t * stride]) + fabs(m[t]));
    }
    /* scale and zero are f16, rounded outwards; carriers and residuals were f32 */
    const double slack = fmax(fabs(low) * 0x1p-10, 0x1p-24) + size * 0x1p-20;
    const double top = (1 << at->bits) - 1;
    double bound = at->bits == 16  ? 0
                   : at->bits == 0 ? size * 0x1p-21
                                   : ((high - low) / top + slack) / 2 * (1 + 0x1p-9) + slack;
    if (at->bits == 16 && w->config.codec.domain == FKV_DOMAIN_UNROTATED && at->part == FKV_PART_K)
        bound = size * 0x1p-20; /* rotated and back */
    for (int t = 0; t < n; t++) {
        const double want = at->bits == 0 ? m[t] : x[t * stride];
        if (!(fabs(y[t * stride] - want) <= bound))
            property_fail("layer %d part %d head %d channel %d, %d bits, token %lld: %.9g, want "
                          "%.9g +- %.3g",
                          at->layer, at->part, at->head, at->d, at->bits, (long long)(first + t),
                          y[t * stride], want, bound);
    }
}

static void check_channel(const struct world *w, struct channel *at, const struct stream *s,
                          const struct held *exact, const struct held *got) {
    const struct config *c = &w->config;
    const int64_t sinks = c->codec.n_sink, coded = config_coded(c, s->n), n = c->codec.group;
    const int64_t row = (int64_t)c->kv_heads * c->head_dim, i = at->head * c->head_dim + at->d;
    const double *x = (at->part ? exact->v : exact->k) + i, *y = (at->part ? got->v : got->k) + i;

    at->bits = w->mask[at->part][at->layer * row + i];
    for (int64_t first = sinks; first < sinks + coded; first += n) {
        double m[128], head[FKV_MAX_HEAD_DIM];
        for (int64_t t = 0; t < n; t++) {
            carriers_at(w, at, s->positions[first + t], head);
            m[t] = head[at->d];
        }
        check_group(w, at, x + first * row, y + first * row, m, first);
    }
}

/* Exact tokens bit for bit; of the coded ones a sample of channels. */
static void held(const struct config *c) {
    struct world w;
    struct stream s;
    struct exact exact;
    struct held got;

    world_open(&w, c);
    stream_init(&s, c, 1, c->tokens);
    fkv_sequence id = world_sequence(&w);
    feed(&w, id, &s, random_int(&w.rng, 2, 12), STEP_APPEND, NULL);
    const int64_t row = (int64_t)c->kv_heads * c->head_dim, sinks = c->codec.n_sink;
    const int64_t coded = config_coded(c, s.n);
    const double rounding = c->codec.domain == FKV_DOMAIN_UNROTATED ? 0x1p-22 : 0;
    CHECK(world_stats(&w, id).tokens_coded == (uint64_t)coded);
    for (struct channel at = {0}; at.layer < c->layers; at.layer++) {
        exact_read(&exact, &w, &s, at.layer);
        held_read(&got, &w, id, at.layer, 0, s.n);
        for (int64_t i = 0; i < s.n * row; i++)
            if (i / row < least(sinks, s.n) || i / row >= sinks + coded) {
                CHECK(fabs(got.k[i] - exact.seen.k[i]) <= 8 * rounding);
                CHECK(got.v[i] == exact.seen.v[i]);
            }
        to_domain(&w, &s, &got);
        for (int64_t i = 0; i < 2 * row; i++) {
            at.part = (int)(i / row);
            at.head = (int)(i % row / c->head_dim);
            at.d = (int)(i % c->head_dim);
            if (random_chance(&w.rng, 24.0 / (double)row))
                check_channel(&w, &at, &s, &exact.coded, &got);
        }
        held_free(&got);
        exact_free(&exact);
    }
    stream_free(&s);
    world_close(&w);
}

static void bounds(void **state) {
    (void)state;
    for (int i = 0; i < runs(120); i++) {
        struct config c = draw();
        property_run("held", held, &c);
    }
}

/* ---- attention on what is held */

/* Rows of the step see the tokens held before it, and the step's own exactly. */
static void check_fused(struct world *w, const struct stream *s, int64_t at, int64_t n, int layer,
                        const struct held *before, const struct outputs *o) {
    size_t row = (size_t)w->config.kv_heads * (size_t)w->config.head_dim;
    size_t past = (size_t)at * row, own = (size_t)n * row;
    struct exact exact;
    struct held seen = {.n = at + n};

    exact_read(&exact, w, s, layer);
    seen.k = malloc((past + own + 1) * sizeof *seen.k);
    seen.v = malloc((past + own + 1) * sizeof *seen.v);
    memcpy(seen.k, before->k, past * sizeof *seen.k);
    memcpy(seen.v, before->v, past * sizeof *seen.v);
    memcpy(seen.k + past, exact.seen.k + past, own * sizeof *seen.k);
    memcpy(seen.v + past, exact.seen.v + past, own * sizeof *seen.v);
    check_attention(w, layer, &seen, s, at, n, at, true, o, 0);
    held_free(&seen);
    exact_free(&exact);
}

static void attention(const struct config *c) {
    struct world w;
    struct stream s;
    struct outputs o;
    struct held before, after;

    world_open(&w, c);
    stream_init(&s, c, 1, c->tokens);
    fkv_sequence id = world_sequence(&w);
    for (int64_t at = 0, n; at < s.n; at += n) {
        int layer = (int)random_int(&w.rng, 0, c->layers - 1);
        enum step_mode mode = (enum step_mode)random_int(&w.rng, 0, 3);
        n = least(random_int(&w.rng, 1, random_chance(&w.rng, 0.3) ? 3 : s.n), s.n - at);
        held_read(&before, &w, id, layer, 0, at);
        step_one(&w, id, &s, at, n, mode, &o);
        if (mode == STEP_FUSED)
            check_fused(&w, &s, at, n, layer, &before, &o);
        if (mode == STEP_ATTEND)
            check_attention(&w, layer, &before, &s, at, n, at, false, &o, 0);
        if (mode == STEP_APPEND_ATTEND) {
            held_read(&after, &w, id, layer, 0, at + n);
            check_attention(&w, layer, &after, &s, at, n, at, true, &o, 0);
            held_free(&after);
        }
        held_free(&before);
        outputs_free(&o);
        if (mode == STEP_ATTEND) /* nothing was appended yet */
            step_one(&w, id, &s, at, n, STEP_APPEND, NULL);
    }
    stream_free(&s);
    world_close(&w);
}

static void attention_on_held(void **state) {
    (void)state;
    for (int i = 0; i < runs(120); i++) {
        struct config c = draw();
        property_run("attention", attention, &c);
    }
    assert_true(checks_that_count() > 0.5);
}

/* Every width alone, with and without carriers. */
static void uniform(void **state) {
    static const int bits[] = {0, 2, 3, 4, 8, 16};
    (void)state;

    for (int i = 0; i < runs(36); i++) {
        struct config c = draw();
        c.bits = bits[i % 6];
        c.carriers = i / 6 % 2;
        property_run("held", held, &c);
        property_run("attention", attention, &c);
    }
}

/* Thousands of tokens, many chunks, positions far from 0. */
static void long_sequences(void **state) {
    (void)state;
    for (int i = 0; i < runs(8); i++) {
        struct config c = draw();
        c.layers = c.kv_heads = 1;
        c.head_dim = i % 2 ? 32 : 64;
        c.rope_dim = 0;
        c.tokens = random_int(&rng, 2000, 5000);
        if (i % 4 == 3)
            c.codec.domain = FKV_DOMAIN_UNROTATED;
        property_run("held", held, &c);
        property_run("attention", attention, &c);
    }
}

/* ---- the same tokens in other pieces */

static void splits(const struct config *c) {
    struct world w;
    struct stream s, probe;
    struct outputs want, o;

    world_open(&w, c);
    stream_init(&s, c, 1, c->tokens);
    stream_init(&probe, c, 2, 7);
    for (int64_t i = 0; i < probe.n; i++)
        probe.positions[i] = s.positions[s.n - 1] + 1 + i;
    fkv_sequence bulk = world_sequence(&w);
    feed(&w, bulk, &s, 0, STEP_APPEND, NULL);
    uint64_t bytes = world_stats(&w, bulk).bytes;
    fkv_sequence ids[3];
    for (int i = 0; i < 3; i++) {
        ids[i] = world_sequence(&w);
        feed(&w, ids[i], &s, 1 + 6 * i, i == 1 ? STEP_FUSED : STEP_APPEND, NULL);
        held_same(&w, bulk, &w, ids[i], s.n);
        CHECK(world_stats(&w, ids[i]).bytes == bytes);
    }
    step_one(&w, bulk, &probe, 0, probe.n, STEP_FUSED, &want);
    for (int i = 0; i < 3; i++) {
        step_one(&w, ids[i], &probe, 0, probe.n, STEP_FUSED, &o);
        outputs_same(&want, 0, &o, 0, probe.n, c, "after pieces");
        outputs_free(&o);
    }
    outputs_free(&want);
    stream_free(&s);
    stream_free(&probe);
    world_close(&w);
}

static void any_split(void **state) {
    (void)state;
    for (int i = 0; i < runs(48); i++) {
        struct config c = draw();
        property_run("splits", splits, &c);
    }
}

/* ---- grouped queries are repeated heads, bit for bit */

static void repeated_heads(const struct config *c) {
    struct config many = *c;
    struct world a, b;
    struct stream s, t;
    struct outputs x, y;
    const int64_t dim = c->head_dim, G = c->group, Hk = c->kv_heads;

    many.kv_heads = (int)(Hk * G);
    many.group = 1;
    world_open(&a, c);
    world_open(&b, &many);
    /* the profile of b: each head of a's, G times */
    fkv_profile *repeated;
    fkv_codec_params codec = c->codec;
    size_t count = (size_t)(Hk * G * dim);
    uint8_t *bits[2] = {malloc(count), malloc(count)};
    float *carrier[2] = {malloc(count * 4), malloc(count * 4)};
    codec.storage_dtype = c->storage;
    for (int part = 0; part < 2; part++)
        for (int64_t i = 0; i < (int64_t)count; i++) {
            int64_t from = i / (G * dim) * dim + i % dim;
            bits[part][i] = a.mask[part][from];
            carrier[part][i] = a.carrier[part][from];
        }
    OK(fkv_profile_create_coded(b.ctx, &b.model, &codec, bits[0], bits[1], count, carrier[0],
                                carrier[1], count, &repeated));
    OK(fkv_plan_destroy(b.plan));
    OK(fkv_cache_destroy(b.cache));
    OK(fkv_profile_destroy(b.profile));
    b.profile = repeated;
    OK(fkv_cache_create(b.ctx, b.profile, NULL, &b.cache));
    OK(fkv_plan_create(b.cache, &b.plan));
    stream_init(&s, c, 1, c->tokens);
    stream_init(&t, &many, 1, c->tokens);
    memcpy(t.positions, s.positions, (size_t)s.n * sizeof *s.positions);
    memcpy(t.q[0], s.q[0], (size_t)(s.n * Hk * G * dim) * 4);
    for (int64_t i = 0; i < s.n * Hk * G * dim; i++) {
        int64_t from = i / (Hk * G * dim) * Hk * dim + i / (G * dim) % Hk * dim + i % dim;
        t.k[0][i] = s.k[0][from];
        t.v[0][i] = s.v[0][from];
    }
    fkv_sequence id = world_sequence(&a), twin = world_sequence(&b);
    step_one(&a, id, &s, 0, s.n - 3, STEP_FUSED, NULL);
    step_one(&b, twin, &t, 0, s.n - 3, STEP_FUSED, NULL);
    step_one(&a, id, &s, s.n - 3, 3, STEP_FUSED, &x);
    step_one(&b, twin, &t, s.n - 3, 3, STEP_FUSED, &y);
    CHECK(memcmp(x.out[0], y.out[0], (size_t)(3 * Hk * G * dim) * 4) == 0);
    CHECK(memcmp(x.lse[0], y.lse[0], (size_t)(3 * Hk * G) * 4) == 0);
    outputs_free(&x);
    outputs_free(&y);
    stream_free(&s);
    stream_free(&t);
    for (int part = 0; part < 2; part++) {
        free(bits[part]);
        free(carrier[part]);
    }
    world_close(&a);
    world_close(&b);
}

static void grouped_heads(void **state) {
    (void)state;
    for (int i = 0; i < runs(32); i++) {
        struct config c = draw();
        c.layers = 1;
        c.tokens = c.tokens < 10 ? 10 : c.tokens;
        property_run("repeated_heads", repeated_heads, &c);
    }
}

/* ---- where coding begins and ends */

static void thresholds(const struct config *c) {
    struct world w;
    struct stream s;

    world_open(&w, c);
    stream_init(&s, c, 1, c->tokens);
    fkv_sequence id = world_sequence(&w);
    for (int64_t n = 1; n <= s.n; n++) {
        step_one(&w, id, &s, n - 1, 1, STEP_APPEND, NULL);
        fkv_stats stats = world_stats(&w, id), predicted = {.struct_size = sizeof predicted};
        CHECK(stats.tokens == (uint64_t)n);
        CHECK(stats.tokens_coded == (uint64_t)config_coded(c, n));
        CHECK(stats.tokens_exact == stats.tokens - stats.tokens_coded);
        CHECK(stats.bytes ==
              stats.bytes_exact + stats.bytes_tables + stats.bytes_blocks + stats.bytes_scales);
        fkv_stats all = world_stats(&w, FKV_ALL_SEQUENCES);
        OK(fkv_profile_estimate(w.profile, n, 0, &predicted));
        if (!c->positions) /* listed positions take room of their own */
            CHECK(all.bytes == predicted.bytes && all.bytes_blocks == predicted.bytes_blocks &&
                  all.bytes_scales == predicted.bytes_scales &&
                  all.bytes_exact == predicted.bytes_exact);
    }
    stream_free(&s);
    world_close(&w);
}

static void coding_thresholds(void **state) {
    (void)state;
    for (int i = 0; i < runs(24); i++) {
        struct config c = draw();
        property_run("thresholds", thresholds, &c);
    }
}

/* ---- series that invite overflow, division by zero or cancellation */

enum { CONSTANT, ZERO, ALTERNATING, STEP, DENORMAL, SPIKE, N_KINDS };

static float extreme(int kind, int64_t t, int64_t n) {
    switch (kind) {
    case CONSTANT:
        return 65504;
    case ALTERNATING:
        return t % 2 ? -65504 : 65504;
    case STEP:
        return t < n / 8 ? 65504 : -65504;
    case DENORMAL:
        return t % 3 ? 0x1p-24f : 0;
    case SPIKE:
        return t == n / 2 ? 65504 : 0;
    default:
        return 0;
    }
}

static void extremes(const struct config *c) {
    struct world w;
    struct stream s;
    struct outputs o;
    struct held h;
    int64_t row = (int64_t)c->kv_heads * c->head_dim;

    world_open(&w, c);
    stream_init(&s, c, 1, c->tokens);
    for (int64_t i = 0; i < s.n * row; i++) {
        s.v[0][i] = extreme((int)(i % row % N_KINDS), i / row, s.n);
        s.k[0][i] = extreme((int)(i % row % N_KINDS), i / row, s.n) / 16;
    }
    fkv_sequence id = world_sequence(&w);
    feed(&w, id, &s, 4, STEP_APPEND_ATTEND, &o);
    held_read(&h, &w, id, 0, 0, s.n);
    for (int64_t i = 0; i < s.n * row; i++) {
        CHECK(isfinite(h.k[i]) && isfinite(h.v[i]));
        /* without a carrier a constant comes back exactly */
        if (i % row % N_KINDS <= ZERO && w.mask[1][i % row] != 0)
            CHECK(h.v[i] == (double)s.v[0][i]);
    }
    for (int64_t i = 0; i < o.rows * row * c->group; i++)
        CHECK(isfinite(o.out[0][i]));
    outputs_free(&o);
    held_free(&h);
    stream_free(&s);
    world_close(&w);
}

static void extreme_series(void **state) {
    (void)state;
    for (int i = 0; i < runs(30); i++) {
        struct config c = draw();
        c.layers = 1;
        c.rope = FKV_ROPE_NONE;
        c.rope_dim = 0;
        c.carriers = false;
        c.in = c.out = FKV_DTYPE_F32;
        c.storage = i % 2 ? FKV_DTYPE_F16 : FKV_DTYPE_F32;
        property_run("extremes", extremes, &c);
    }
}

/* Values whose residuals an f16 scale cannot hold are refused, and nothing has changed. */
static void too_large(const struct config *c) {
    struct world w;
    struct stream s;

    world_open(&w, c);
    stream_init(&s, c, 1, c->tokens);
    fkv_sequence id = world_sequence(&w);
    uint64_t bytes = world_stats(&w, id).bytes;
    int64_t row = (int64_t)c->kv_heads * c->head_dim;
    s.v[0][random_int(&w.rng, 0, s.n * row - 1)] = 70000;
    struct part part = {id, &s, 0, s.n};
    CHECK(step_try(&w, &part, 1, STEP_APPEND, NULL) == FKV_ERR_NONFINITE);
    CHECK(world_stats(&w, id).bytes == bytes && world_stats(&w, id).tokens == 0);
    stream_free(&s);
    world_close(&w);
}

static void values_beyond_the_scales(void **state) {
    (void)state;
    for (int i = 0; i < runs(16); i++) {
        struct config c = draw();
        c.layers = 1;
        c.bits = 2;
        c.in = FKV_DTYPE_F32;
        c.storage = i % 3 ? FKV_DTYPE_BF16 : FKV_DTYPE_F32;
        property_run("too_large", too_large, &c);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bounds),
        cmocka_unit_test(attention_on_held),
        cmocka_unit_test(uniform),
        cmocka_unit_test(long_sequences),
        cmocka_unit_test(any_split),
        cmocka_unit_test(grouped_heads),
        cmocka_unit_test(coding_thresholds),
        cmocka_unit_test(extreme_series),
        cmocka_unit_test(values_beyond_the_scales),
    };

    random_init(&rng, random_seed("test_calibrated", 4));
    return cmocka_run_group_tests_name("calibrated", tests, NULL, NULL);
}
