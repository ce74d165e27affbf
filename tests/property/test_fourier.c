/* SPDX-License-Identifier: Apache-2.0 */
/* Fourier profiles: what is held is the documented restoration, and attention runs on what is held. */
#include "property.h"

static struct random rng;

static int runs(int full) {
    return random_quick() ? (full + 7) / 8 : full;
}

static struct config exact_of(const struct config *c) {
    struct config twin = *c;

    twin.fourier = false;
    return twin;
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Tokens of the coded middle once `tokens` are held. */
static int64_t coded_tokens(const struct config *c, int64_t tokens) {
    int64_t middle = tokens - c->params.n_sink - c->params.n_local;
    int64_t least_middle = c->params.min_middle ? c->params.min_middle : 2 * c->params.bins;

    return middle < least_middle || middle < 1 ? 0 : middle / 64 * 64;
}

/* A world with the same tokens held exactly beside the one under test. */
struct pair {
    struct world coded, exact;
    fkv_sequence id, twin;
    struct stream s;
};

static void pair_open(struct pair *p, const struct config *c) {
    struct config plain = exact_of(c);

    world_open(&p->coded, c);
    world_open(&p->exact, &plain);
    p->id = world_sequence(&p->coded);
    p->twin = world_sequence(&p->exact);
    stream_init(&p->s, c, 1, c->tokens);
}

static void pair_close(struct pair *p) {
    stream_free(&p->s);
    world_close(&p->coded);
    world_close(&p->exact);
}

/* ---- what is held */

struct channel {
    int layer, head, d;
    fkv_part part;
};

typedef double (*restore_fn)(const struct oracle_phases *p, const double *x, int64_t n,
                             int64_t stride, int bins, double *y);

/* The coded tokens of one channel, segment by segment, against the oracle's restoration. */
static void check_channel(const struct config *c, const struct oracle_phases *phases,
                          const struct channel *at, const double *got, const double *exact,
                          int64_t coded, int64_t stride, restore_fn restore, double tolerance) {
    double *want = malloc((size_t)(coded + 1) * sizeof *want);
    int64_t capacity = c->params.period / 64 * 64;

    for (int64_t first = 0; first < coded; first += capacity) {
        int64_t n = least(coded - first, capacity);
        const double *x = exact + first * stride, *y = got + first * stride;
        double mean = oracle_mean(x, n, stride), error = 0, size = 0;
        double cancelled = restore(phases, x, n, stride, c->params.bins, want);
        for (int64_t l = 0; l < n; l++) {
            error += (y[l * stride] - want[l]) * (y[l * stride] - want[l]);
            size += (x[l * stride] - mean) * (x[l * stride] - mean);
        }
        double length = sqrt((double)n), rounding = 0x1p-23 * fabs(mean) * length;
        double bound = tolerance * (1 + length / 8) * (sqrt(size) + cancelled * length) + rounding;
        if (!(sqrt(error) <= bound))
            property_fail(
                "layer %d part %d head %d channel %d, coded tokens %lld + %lld: error %.3g, "
                "allowed %.3g",
                at->layer, at->part, at->head, at->d, (long long)first, (long long)n, sqrt(error),
                bound);
    }
    free(want);
}

static void check_kept(const double *got, const double *exact, int64_t first, int64_t end,
                       int64_t stride) {
    for (int64_t t = first; t < end; t++)
        CHECK(got[t * stride] == exact[t * stride]);
}

/* All channels: exact tokens and kept channels bitwise; of the coded ones a sample. */
static void check_held(struct pair *p, restore_fn restore) {
    const struct config *c = &p->coded.config;
    int64_t stride = (int64_t)c->kv_heads * c->head_dim, sink = c->params.n_sink;
    int64_t coded = coded_tokens(c, p->s.n), n = p->s.n;
    double tolerance = c->params.coefficient_dtype == FKV_DTYPE_F16 ? 0x1p-11 : 1e-6;
    struct oracle_phases phases;
    struct held got, exact;

    CHECK(world_stats(&p->coded, p->id).tokens_coded == (uint64_t)coded);
    oracle_phases_init(&phases, c->params.period);
    for (struct channel at = {0}; at.layer < c->layers; at.layer++) {
        held_read(&got, &p->coded, p->id, at.layer, 0, n);
        held_read(&exact, &p->exact, p->twin, at.layer, 0, n);
        for (int64_t i = 0; i < 2 * stride; i++) {
            at.part = (fkv_part)(i / stride);
            at.head = (int)(i % stride / c->head_dim);
            at.d = (int)(i % c->head_dim);
            const double *x = (at.part ? got.v : got.k) + i % stride;
            const double *y = (at.part ? exact.v : exact.k) + i % stride;
            bool is_coded = world_coded(&p->coded, at.layer, at.part, at.head, at.d);
            check_kept(x, y, 0, is_coded ? least(sink, n) : n, stride);
            check_kept(x, y, sink + coded, n, stride);
            if (is_coded && random_chance(&p->coded.rng, 12.0 / (double)stride))
                check_channel(c, &phases, &at, x + sink * stride, y + sink * stride, coded, stride,
                              restore, tolerance);
        }
        held_free(&got);
        held_free(&exact);
    }
    oracle_phases_free(&phases);
}

static void held(const struct config *c) {
    struct pair p;

    pair_open(&p, c);
    feed(&p.coded, p.id, &p.s, random_int(&p.coded.rng, 2, 12), STEP_APPEND, NULL);
    feed(&p.exact, p.twin, &p.s, 0, STEP_APPEND, NULL);
    check_held(&p, oracle_least_squares);
    pair_close(&p);
}

static struct config draw(void) {
    struct config c = config_draw(&rng);

    config_draw_fourier(&rng, &c);
    return c;
}

static void restoration(void **state) {
    (void)state;
    for (int i = 0; i < runs(80); i++) {
        struct config c = draw();
        property_run("held", held, &c);
    }
}

static void periods(void **state) {
    static const int64_t list[] = {64,  65,  67,  127, 128,  129,  255,  256, 257,
                                   509, 512, 513, 640, 1021, 1024, 2047, 4099};
    (void)state;

    for (int i = 0; i < LENGTH(list); i++) {
        struct config c = draw();
        c.head_dim = 16;
        c.rope_dim = 0;
        c.layers = c.kv_heads = 1;
        c.params.period = list[i];
        c.params.bins = i % 2 ? (int)list[i] : (int)random_int(&rng, 1, list[i] / 2 + 1);
        c.params.min_middle = 1;
        c.tokens = c.params.n_sink + c.params.n_local + least(list[i], 1500) * 3 / 2;
        property_run("periods", held, &c);
    }
}

/* With all bins nothing is lost: odd and even periods, full and partly filled. */
static double copy_series(const struct oracle_phases *p, const double *x, int64_t n, int64_t stride,
                          int bins, double *y) {
    (void)p;
    (void)bins;
    for (int64_t l = 0; l < n; l++)
        y[l] = x[l * stride];
    return 0;
}

static void complete(const struct config *c) {
    struct pair p;

    pair_open(&p, c);
    feed(&p.coded, p.id, &p.s, 4, STEP_APPEND, NULL);
    feed(&p.exact, p.twin, &p.s, 0, STEP_APPEND, NULL);
    check_held(&p, copy_series);
    pair_close(&p);
}

static void all_bins(void **state) {
    (void)state;
    for (int i = 0; i < runs(40); i++) {
        struct config c = draw();
        c.params.bins = (int)(c.params.period / 2 + 1) + (i % 3 == 0) * 100;
        c.params.coefficient_dtype = FKV_DTYPE_F32;
        c.params.min_middle = 1;
        property_run("complete", complete, &c);
    }
}

/* Where the middle fills the period, the error's energy is that of the dropped bins. */
static void energy(const struct config *c) {
    struct pair p;
    struct held got, exact;
    struct oracle_phases phases;
    int64_t stride = (int64_t)c->kv_heads * c->head_dim, period = c->params.period;

    pair_open(&p, c);
    feed(&p.coded, p.id, &p.s, 5, STEP_APPEND, NULL);
    feed(&p.exact, p.twin, &p.s, 0, STEP_APPEND, NULL);
    CHECK(coded_tokens(c, p.s.n) >= period);
    oracle_phases_init(&phases, period);
    held_read(&got, &p.coded, p.id, 0, c->params.n_sink, period);
    held_read(&exact, &p.exact, p.twin, 0, c->params.n_sink, period);
    for (int64_t i = 0; i < stride; i += 5) {
        struct oracle_series all;
        double error = 0, dropped = 0, total = 0;
        oracle_analyse(&phases, exact.v + i, period, stride,
                       oracle_mean(exact.v + i, period, stride), (int)(period / 2 + 1), &all);
        for (int n = 0; n < all.bins; n++) {
            double w = n == 0 || 2 * n == period ? 1 : 2;
            double e = w * (all.c[n] * all.c[n] + all.s[n] * all.s[n]) / (double)period;
            total += e;
            dropped += n >= c->params.bins ? e : 0;
        }
        for (int64_t t = 0; t < period; t++)
            error += pow(got.v[t * stride + i] - exact.v[t * stride + i], 2);
        CHECK(fabs(error - dropped) <= 1e-5 * total);
        oracle_series_free(&all);
    }
    oracle_phases_free(&phases);
    held_free(&got);
    held_free(&exact);
    pair_close(&p);
}

static void dropped_energy(void **state) {
    (void)state;
    for (int i = 0; i < runs(24); i++) {
        struct config c = draw();
        c.layers = 1;
        c.coded[0] = c.coded[1] = 1;
        c.params.coefficient_dtype = FKV_DTYPE_F32;
        c.params.period = 64 * random_int(&rng, 1, 6);
        c.params.bins = (int)random_int(&rng, 1, c.params.period / 2);
        c.params.min_middle = 1;
        c.tokens = c.params.n_sink + c.params.n_local + c.params.period;
        property_run("energy", energy, &c);
    }
}

/* ---- attention on what is held */

/* Rows of the step see the tokens held before it, and with `fused` the step's own exactly. */
static void check_step(struct pair *p, int64_t at, int64_t n, const struct held *before, int layer,
                       const struct outputs *o) {
    const struct config *c = &p->coded.config;
    size_t row = (size_t)c->kv_heads * (size_t)c->head_dim;
    struct held seen, own;

    held_read(&own, &p->exact, p->twin, layer, at, n);
    seen.n = at + n;
    seen.k = malloc(((size_t)seen.n * row + 1) * sizeof *seen.k);
    seen.v = malloc(((size_t)seen.n * row + 1) * sizeof *seen.v);
    memcpy(seen.k, before->k, (size_t)at * row * sizeof *seen.k);
    memcpy(seen.v, before->v, (size_t)at * row * sizeof *seen.v);
    memcpy(seen.k + (size_t)at * row, own.k, (size_t)n * row * sizeof *seen.k);
    memcpy(seen.v + (size_t)at * row, own.v, (size_t)n * row * sizeof *seen.v);
    check_attention(&p->coded, layer, &seen, &p->s, at, n, at, true, o, 0);
    held_free(&seen);
    held_free(&own);
}

static void attention(const struct config *c) {
    struct pair p;
    struct outputs o;
    struct held before, after;

    pair_open(&p, c);
    struct random *r = &p.coded.rng;
    feed(&p.exact, p.twin, &p.s, 0, STEP_APPEND, NULL);
    for (int64_t at = 0, n; at < p.s.n; at += n) {
        int layer = (int)random_int(r, 0, c->layers - 1);
        enum step_mode mode = (enum step_mode)random_int(r, 0, 3);
        n = least(random_int(r, 1, random_chance(r, 0.3) ? 3 : p.s.n), p.s.n - at);
        held_read(&before, &p.coded, p.id, layer, 0, at);
        step_one(&p.coded, p.id, &p.s, at, n, mode, &o);
        if (mode == STEP_FUSED)
            check_step(&p, at, n, &before, layer, &o);
        if (mode == STEP_ATTEND)
            check_attention(&p.coded, layer, &before, &p.s, at, n, at, false, &o, 0);
        if (mode == STEP_APPEND_ATTEND) {
            held_read(&after, &p.coded, p.id, layer, 0, at + n);
            check_attention(&p.coded, layer, &after, &p.s, at, n, at, true, &o, 0);
            held_free(&after);
        }
        held_free(&before);
        outputs_free(&o);
        if (mode == STEP_ATTEND) /* nothing was appended yet */
            step_one(&p.coded, p.id, &p.s, at, n, STEP_APPEND, NULL);
    }
    pair_close(&p);
}

static void attention_on_held(void **state) {
    (void)state;
    for (int i = 0; i < runs(80); i++) {
        struct config c = draw();
        property_run("attention", attention, &c);
    }
    assert_true(checks_that_count() > 0.5);
}

static void all_coded_or_none(void **state) {
    static const double shares[][2] = {{0, 0}, {1, 1}, {0, 1}, {1, 0}};
    (void)state;

    for (int i = 0; i < runs(16); i++) {
        struct config c = draw();
        memcpy(c.coded, shares[i % LENGTH(shares)], sizeof c.coded);
        property_run("held", held, &c);
        property_run("attention", attention, &c);
    }
}

/* Several segments, tokens by the thousand, a coarse grid. */
static void long_sequences(void **state) {
    (void)state;
    for (int i = 0; i < runs(6); i++) {
        struct config c = draw();
        c.layers = c.kv_heads = 1;
        c.head_dim = 32;
        c.rope_dim = 0;
        c.params.period = random_int(&rng, 800, 6000);
        c.params.bins = (int)random_int(&rng, 1, 40);
        c.params.min_middle = 0;
        c.tokens = random_int(&rng, 2000, 5000);
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
    for (int i = 0; i < runs(32); i++) {
        struct config c = draw();
        property_run("splits", splits, &c);
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
        fkv_stats stats = world_stats(&w, id);
        CHECK(stats.tokens == (uint64_t)n);
        CHECK(stats.tokens_coded == (uint64_t)coded_tokens(c, n));
        CHECK(stats.tokens_exact == stats.tokens - stats.tokens_coded);
        CHECK(stats.bytes ==
              stats.bytes_exact + stats.bytes_kept + stats.bytes_coefficients + stats.bytes_tables);
    }
    stream_free(&s);
    world_close(&w);
}

static void coding_thresholds(void **state) {
    (void)state;
    for (int i = 0; i < runs(24); i++) {
        struct config c = draw();
        c.params.min_middle = i % 2 ? 0 : c.params.min_middle;
        property_run("thresholds", thresholds, &c);
    }
}

static void outgrow(const struct config *c) {
    struct world w;
    struct stream s;
    struct held before, after;
    struct part whole;
    int64_t capacity = c->params.period / 64 * 64;
    int64_t fits = c->params.n_sink + c->params.n_local + capacity + 63;

    world_open(&w, c);
    stream_init(&s, c, 1, fits + 200);
    fkv_sequence id = world_sequence(&w);
    whole = (struct part){id, &s, 0, fits + 1};
    CHECK(step_try(&w, &whole, 1, STEP_FUSED, NULL) == FKV_ERR_LIMIT);
    CHECK(world_stats(&w, id).tokens == 0);
    int64_t first = random_int(&w.rng, 0, fits);
    step_one(&w, id, &s, 0, first, STEP_APPEND, NULL);
    uint64_t bytes = world_stats(&w, id).bytes;
    held_read(&before, &w, id, 0, 0, first);
    whole = (struct part){id, &s, first, fits - first + random_int(&w.rng, 1, 150)};
    CHECK(step_try(&w, &whole, 1, STEP_APPEND, NULL) == FKV_ERR_LIMIT);
    CHECK(world_stats(&w, id).bytes == bytes);
    held_read(&after, &w, id, 0, 0, first);
    size_t size = (size_t)(first * c->kv_heads * c->head_dim) * sizeof *before.k;
    CHECK(memcmp(before.k, after.k, size) == 0 && memcmp(before.v, after.v, size) == 0);
    step_one(&w, id, &s, first, fits - first, STEP_FUSED, NULL);
    CHECK(world_stats(&w, id).tokens_coded == (uint64_t)capacity);
    held_free(&before);
    held_free(&after);
    stream_free(&s);
    world_close(&w);
}

static void outgrow_is_an_error(void **state) {
    (void)state;
    for (int i = 0; i < runs(24); i++) {
        struct config c = draw();
        c.params.outgrow = FKV_OUTGROW_ERROR;
        c.params.min_middle = 1;
        property_run("outgrow", outgrow, &c);
    }
}

/* ---- the published restoration, over a prompt in one piece */

static void authors(const struct config *c) {
    struct pair p;

    pair_open(&p, c);
    feed(&p.coded, p.id, &p.s, 0, STEP_FUSED, NULL);
    feed(&p.exact, p.twin, &p.s, 0, STEP_APPEND, NULL);
    check_held(&p, oracle_authors);
    pair_close(&p);
}

static void authors_restoration(void **state) {
    (void)state;
    for (int i = 0; i < runs(24); i++) {
        struct config c = draw();
        c.params.restoration = FKV_RESTORE_AUTHORS;
        c.params.min_middle = 1;
        c.params.period = c.tokens + random_int(&rng, 64, 300);
        property_run("authors", authors, &c);
        /* few bins over a small part of the period would cancel beyond the kernels' tolerance */
        c.params.bins = (int)random_int(&rng, 16, 60);
        c.params.period = c.tokens + 64;
        property_run("attention", attention, &c);
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
        if (i % row % N_KINDS <= ZERO) /* a constant is its mean */
            CHECK(fabs(h.v[i] - (double)s.v[0][i]) <= 1e-6 * 65504);
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
        c.in = c.out = FKV_DTYPE_F32;
        c.storage = i % 2 ? FKV_DTYPE_F16 : FKV_DTYPE_F32;
        c.params.restoration = (fkv_restoration)(i % 4 == 3);
        c.params.bins = (int)random_int(&rng, 1, c.params.period);
        c.params.min_middle = 1;
        property_run("extremes", extremes, &c);
    }
}

/* Values that the storage type holds and the coefficients do not are refused, or all stays finite. */
static void too_large(const struct config *c) {
    struct world w;
    struct stream s;
    struct held h;
    int64_t row = (int64_t)c->kv_heads * c->head_dim;
    float size = c->params.coefficient_dtype == FKV_DTYPE_F16 ? 1e6f : 3e38f;

    world_open(&w, c);
    stream_init(&s, c, 1, c->tokens);
    for (int64_t i = 0; i < s.n * row; i++)
        s.v[0][i] = i / row % 48 < 24 ? -size : size;
    fkv_sequence id = world_sequence(&w);
    uint64_t bytes = world_stats(&w, id).bytes;
    struct part part = {id, &s, 0, s.n};
    fkv_status status = step_try(&w, &part, 1, STEP_APPEND, NULL);
    CHECK(status == FKV_OK || status == FKV_ERR_NONFINITE);
    if (status == FKV_OK) {
        held_read(&h, &w, id, 0, 0, s.n);
        for (int64_t i = 0; i < s.n * row; i++)
            CHECK(isfinite(h.v[i]));
        held_free(&h);
    } else
        CHECK(world_stats(&w, id).bytes == bytes && world_stats(&w, id).tokens == 0);
    stream_free(&s);
    world_close(&w);
}

static void values_beyond_the_coefficients(void **state) {
    (void)state;
    for (int i = 0; i < runs(16); i++) {
        struct config c = draw();
        c.layers = 1;
        c.in = c.out = FKV_DTYPE_F32;
        c.storage = i % 2 ? FKV_DTYPE_BF16 : FKV_DTYPE_F32;
        property_run("too_large", too_large, &c);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(restoration),
                                       cmocka_unit_test(periods),
                                       cmocka_unit_test(all_bins),
                                       cmocka_unit_test(dropped_energy),
                                       cmocka_unit_test(attention_on_held),
                                       cmocka_unit_test(all_coded_or_none),
                                       cmocka_unit_test(long_sequences),
                                       cmocka_unit_test(any_split),
                                       cmocka_unit_test(coding_thresholds),
                                       cmocka_unit_test(outgrow_is_an_error),
                                       cmocka_unit_test(authors_restoration),
                                       cmocka_unit_test(extreme_series),
                                       cmocka_unit_test(values_beyond_the_coefficients)};

    random_init(&rng, random_seed("test_fourier", 4));
    return cmocka_run_group_tests_name("fourier", tests, NULL, NULL);
}
