/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calibrators of sensitivities against plain double computations, merging and saving, and the allocation
 * of bits against every possible choice.
 */
#include "fixture.h"
#include "guard.h"
#include "random.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define PI 3.14159265358979323846
#define CHANNELS 32 /* of a layer of the default model */
#define N_STATISTICS 6

struct setup {
    struct fixture f;
    fkv_calibrator *cal;
};

static fkv_calibrator *make_calibrator(struct fixture *f, const fkv_codec_params *codec) {
    fkv_calibrator *cal;
    fkv_calibrator_params params;
    fkv_calibrator_params_init(&params, sizeof params);
    params.criterion = FKV_CRITERION_SENSITIVITY;
    params.codec = codec;
    assert_int_equal(fkv_calibrator_create(f->ctx, &f->model, &params, &cal), FKV_OK);
    return cal;
}

static void open_setup(struct setup *s, const struct options *options) {
    fixture_open(&s->f, options);
    s->cal = make_calibrator(&s->f, NULL);
}

static void close_setup(struct setup *s) {
    assert_int_equal(fkv_calibrator_destroy(s->cal), FKV_OK);
    fixture_close(&s->f);
}

/* ---- windows: values depend on the token's number, so that any cut gives the same tokens */

struct window {
    int64_t tokens;
    float *data[5]; /* k, v, grad_k, grad_v, q */
    fkv_tensor t[5];
};

static struct window make_window(const struct fixture *f, int64_t first, int64_t tokens,
                                 int layer) {
    static const int kinds[5] = {'k', 'v', 'v', 'k', 'q'};
    struct window w = {.tokens = tokens};
    for (int i = 0; i < 5; i++) {
        const int heads = i < 4 ? f->options.kv_heads : f->options.q_heads;
        w.data[i] = malloc((size_t)(tokens * heads * f->options.dim) * sizeof(float));
        fixture_values(w.data[i], first, tokens, heads, f->options.dim, i < 2 || i == 4 ? 1 : 2,
                       layer, kinds[i]);
        w.t[i] = fixture_tensor(w.data[i], FKV_DTYPE_F32, tokens, heads, f->options.dim);
    }
    return w;
}

static void free_window(struct window *w) {
    for (int i = 0; i < 5; i++)
        free(w->data[i]);
}

static fkv_status observe(fkv_calibrator *cal, int layer, const struct window *w, bool gradients,
                          bool queries) {
    return fkv_calibrator_observe_gradients(cal, layer, &w->t[0], &w->t[1],
                                            gradients ? &w->t[2] : NULL,
                                            gradients ? &w->t[3] : NULL, queries ? &w->t[4] : NULL);
}

/* Tokens first..first+tokens-1 of all layers. */
static void observe_all(struct fixture *f, fkv_calibrator *cal, int64_t first, int64_t tokens,
                        bool gradients, bool queries) {
    for (int layer = 0; layer < f->options.layers; layer++) {
        struct window w = make_window(f, first, tokens, layer);
        assert_int_equal(observe(cal, layer, &w, gradients, queries), FKV_OK);
        free_window(&w);
    }
}

static void statistic(fkv_calibrator *cal, int layer, fkv_part part, fkv_statistic which,
                      double *values) {
    assert_int_equal(fkv_calibrator_statistic(cal, layer, part, which, values, CHANNELS), FKV_OK);
}

static void assert_near(double a, double b, double tolerance) {
    if (!(fabs(a - b) <= tolerance * fmax(fabs(a), fabs(b)) + 1e-12))
        fail_msg("%.17g and %.17g", a, b);
}

/* ---- statistics */

struct expected {
    double mean, variance, gradient, query;
};

static struct expected expect(const struct fixture *f, const struct window *w, int part, int c) {
    const int dim = f->options.dim, group = f->options.q_heads / f->options.kv_heads;
    const double n = (double)w->tokens;
    struct expected e = {0};
    for (int64_t t = 0; t < w->tokens; t++)
        e.mean += w->data[part][t * CHANNELS + c] / n;
    for (int64_t t = 0; t < w->tokens; t++) {
        const double x = w->data[part][t * CHANNELS + c] - e.mean;
        const double g = w->data[2 + part][t * CHANNELS + c];
        e.variance += x * x / n;
        e.gradient += g * g / n;
        for (int i = 0; i < group && !part; i++) {
            const int h = c / dim * group + i;
            const double q = w->data[4][(t * f->options.q_heads + h) * dim + c % dim];
            e.query += q * q / (n * group);
        }
    }
    return e;
}

static void against_doubles(void **state) {
    (void)state;
    for (int threads = 1; threads <= 3; threads += 2) {
        struct setup s;
        open_setup(&s, &(struct options){.threads = threads});
        struct window w = make_window(&s.f, 0, 300, 1);
        double values[N_STATISTICS][CHANNELS];
        assert_int_equal(observe(s.cal, 1, &w, true, true), FKV_OK);
        for (int part = 0; part < 2; part++) {
            for (int i = 0; i < N_STATISTICS; i++)
                statistic(s.cal, 1, part, i, values[i]);
            for (int c = 0; c < CHANNELS; c++) {
                const struct expected e = expect(&s.f, &w, part, c);
                assert_near(values[FKV_STATISTIC_MEAN][c], e.mean, 1e-12);
                assert_near(values[FKV_STATISTIC_VARIANCE][c], e.variance, 1e-12);
                assert_near(values[FKV_STATISTIC_SENSITIVITY][c], e.gradient, 1e-12);
                assert_near(values[FKV_STATISTIC_QUERY][c], e.query, 1e-12);
                assert_near(values[FKV_STATISTIC_LOSS][c], .5 * e.gradient * e.variance, 1e-12);
            }
        }
        free_window(&w);
        close_setup(&s);
    }
}

/* A mean that jumps between windows and slow waves are explained; fast waves are not. */
static void slow_share(void **state) {
    (void)state;
    static const double frequency[4] = {0, 2. / 256, 3.5 / 64, 100. / 256}; /* turns per token */
    struct setup s;
    open_setup(&s, NULL);
    for (int i = 0; i < 2; i++) {
        struct window w = make_window(&s.f, 0, 256, 0);
        for (int t = 0; t < 256; t++)
            for (int c = 0; c < 4; c++)
                w.data[1][t * CHANNELS + c] =
                    (float)(c ? cos(2 * PI * frequency[c] * t) : 3 + 2 * i);
        assert_int_equal(observe(s.cal, 0, &w, true, false), FKV_OK);
        free_window(&w);
    }
    double share[CHANNELS];
    statistic(s.cal, 0, FKV_PART_V, FKV_STATISTIC_SLOW_SHARE, share);
    assert_near(share[0], 1, 1e-6);
    assert_near(share[1], 1, 1e-5);
    assert_true(share[2] < 1e-5 && share[3] < 1e-5);
    close_setup(&s);
}

/* Without gradients: V by its weight, K by the queries and the spread of V. */
static void without_gradients(void **state) {
    (void)state;
    struct setup s;
    open_setup(&s, NULL);
    struct window w = make_window(&s.f, 0, 200, 0);
    double k[CHANNELS], v[CHANNELS], variance[CHANNELS], query[CHANNELS], weights[CHANNELS];
    assert_int_equal(observe(s.cal, 0, &w, false, true), FKV_OK);
    for (int weighted = 0; weighted < 2; weighted++) {
        statistic(s.cal, 0, FKV_PART_V, FKV_STATISTIC_VARIANCE, variance);
        statistic(s.cal, 0, FKV_PART_K, FKV_STATISTIC_QUERY, query);
        double total = 0;
        for (int c = 0; c < CHANNELS; c++)
            total += variance[c];
        for (int c = 0; c < CHANNELS; c++)
            weights[c] = weighted ? 1 + c : 1 / total;
        if (weighted)
            assert_int_equal(fkv_calibrator_weigh_values(s.cal, 0, weights, CHANNELS), FKV_OK);
        statistic(s.cal, 0, FKV_PART_K, FKV_STATISTIC_SENSITIVITY, k);
        statistic(s.cal, 0, FKV_PART_V, FKV_STATISTIC_SENSITIVITY, v);
        for (int c = 0; c < CHANNELS; c++) {
            double spread = 0;
            for (int d = c / 16 * 16; d < c / 16 * 16 + 16; d++)
                spread += weights[d] * variance[d];
            assert_near(v[c], weights[c], 1e-12);
            assert_near(k[c], query[c] * spread / 16, 1e-12); /* 1/16: the squared scale */
        }
    }
    free_window(&w);
    close_setup(&s);
}

/* ---- order, merging, saving */

static void assert_same_statistics(fkv_calibrator *a, fkv_calibrator *b, double tolerance) {
    double x[CHANNELS], y[CHANNELS];
    for (int layer = 0; layer < 2; layer++)
        for (int part = 0; part < 2; part++)
            for (int i = 0; i < N_STATISTICS; i++) {
                statistic(a, layer, part, i, x);
                statistic(b, layer, part, i, y);
                for (int c = 0; c < CHANNELS; c++)
                    assert_near(x[c], y[c], tolerance);
            }
}

static void merging(void **state) {
    (void)state;
    static const int64_t cuts[5] = {0, 100, 101, 240, 400};
    struct setup s;
    open_setup(&s, NULL);
    fkv_calibrator *a = make_calibrator(&s.f, NULL), *b = make_calibrator(&s.f, NULL);
    for (int i = 0; i < 4; i++)
        observe_all(&s.f, s.cal, cuts[i], cuts[i + 1] - cuts[i], true, true);
    for (int i = 3; i >= 0; i--) /* the other way round, and dealt out */
        observe_all(&s.f, i % 2 ? a : b, cuts[i], cuts[i + 1] - cuts[i], true, true);
    assert_int_equal(fkv_calibrator_merge(a, b), FKV_OK);
    assert_same_statistics(s.cal, a, 1e-11);
    /* b is as it was, and can be merged again: the means do not change by it */
    fkv_calibrator *twice = make_calibrator(&s.f, NULL);
    assert_int_equal(fkv_calibrator_merge(twice, b), FKV_OK);
    assert_same_statistics(twice, b, 0);
    assert_int_equal(fkv_calibrator_merge(twice, b), FKV_OK);
    assert_same_statistics(twice, b, 1e-13);
    assert_int_equal(fkv_calibrator_destroy(twice), FKV_OK);
    assert_int_equal(fkv_calibrator_destroy(a), FKV_OK);
    assert_int_equal(fkv_calibrator_destroy(b), FKV_OK);
    close_setup(&s);
}

static char *save(fkv_calibrator *cal, size_t *bytes) {
    assert_int_equal(fkv_calibrator_save(cal, NULL, 0, bytes), FKV_OK);
    char *data = malloc(*bytes);
    size_t needed = 0;
    memset(data, 0x55, *bytes);
    assert_int_equal(fkv_calibrator_save(cal, data, *bytes - 1, &needed), FKV_ERR_BUFFER);
    assert_true(needed == *bytes && guard_untouched(data, data) && data[0] == 0x55);
    assert_int_equal(fkv_calibrator_save(cal, data, *bytes, &needed), FKV_OK);
    return data;
}

static void saving(void **state) {
    (void)state;
    struct setup s;
    open_setup(&s, NULL);
    fkv_calibrator *loaded;
    size_t bytes, again_bytes;
    double weights[CHANNELS] = {1, 2, 3};
    observe_all(&s.f, s.cal, 0, 130, true, true);
    observe_all(&s.f, s.cal, 130, 70, false, true);
    assert_int_equal(fkv_calibrator_weigh_values(s.cal, 1, weights, CHANNELS), FKV_OK);
    char *data = save(s.cal, &bytes);
    assert_int_equal(fkv_calibrator_load(s.f.ctx, data, bytes, &loaded), FKV_OK);
    char *again = save(loaded, &again_bytes);
    assert_int_equal(again_bytes, bytes);
    assert_memory_equal(again, data, bytes);
    /* it goes on as the one that was saved does */
    observe_all(&s.f, s.cal, 200, 64, true, true);
    observe_all(&s.f, loaded, 200, 64, true, true);
    assert_same_statistics(s.cal, loaded, 0);
    free(again);
    free(data);
    assert_int_equal(fkv_calibrator_destroy(loaded), FKV_OK);
    close_setup(&s);
}

static uint64_t checksum(const char *data, size_t bytes) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ (unsigned char)data[i]) * UINT64_C(0x100000001b3);
    return hash;
}

static fkv_status try_load(struct fixture *f, const char *data, size_t bytes) {
    fkv_calibrator *loaded = (fkv_calibrator *)(uintptr_t)1;
    /* from its own block, so that reading too far is noticed */
    char *copy = malloc(bytes ? bytes : 1);
    memcpy(copy, data, bytes);
    fkv_status status = fkv_calibrator_load(f->ctx, copy, bytes, &loaded);
    free(copy);
    if (status)
        assert_null(loaded);
    else
        assert_int_equal(fkv_calibrator_destroy(loaded), FKV_OK);
    return status;
}

/* Sets a number and makes the checksum right again. */
static fkv_status load_changed(struct fixture *f, const char *data, size_t bytes, size_t at,
                               const void *value, size_t size) {
    char *copy = malloc(bytes + 8);
    memcpy(copy, data, bytes);
    memcpy(copy + at, value, size);
    const uint64_t sum = checksum(copy, bytes - 8);
    memcpy(copy + bytes - 8, &sum, 8);
    fkv_status status = try_load(f, copy, bytes);
    free(copy);
    return status;
}

static void damaged(void **state) {
    (void)state;
    struct setup s;
    open_setup(&s, NULL);
    size_t bytes;
    observe_all(&s.f, s.cal, 0, 100, true, true);
    char *data = save(s.cal, &bytes);
    const int64_t version = 2, minus = -1, huge = INT64_MAX;
    const int32_t layers[] = {0, 3, 1024, -1, INT32_MAX}, dims[] = {0, 24, 8192, -8};
    const double nan_value = NAN, negative = -1;
    const size_t counts = 352 + 8 * sizeof(double), sums = counts + 2 * 5 * 8;
    assert_int_equal(try_load(&s.f, data, bytes), FKV_OK);
    for (size_t n = 0; n < bytes; n += n < 500 ? 1 : 997)
        assert_int_equal(try_load(&s.f, data, n), FKV_ERR_FORMAT);
    for (size_t at = 24; at < bytes; at += at < 500 ? 1 : 331) {
        data[at] ^= 0x10;
        assert_int_equal(try_load(&s.f, data, bytes), FKV_ERR_CHECKSUM);
        data[at] ^= 0x10;
    }
    assert_int_equal(load_changed(&s.f, data, bytes, 0, "G", 1), FKV_ERR_FORMAT);
    assert_int_equal(load_changed(&s.f, data, bytes, 8, &version, 8), FKV_ERR_VERSION);
    assert_int_equal(load_changed(&s.f, data, bytes, 16, &huge, 8), FKV_ERR_FORMAT);
    for (size_t i = 0; i < 5; i++)
        assert_int_equal(load_changed(&s.f, data, bytes, 24, &layers[i], 4), FKV_ERR_FORMAT);
    for (size_t i = 0; i < 4; i++)
        assert_int_equal(load_changed(&s.f, data, bytes, 36, &dims[i], 4), FKV_ERR_FORMAT);
    for (size_t at = 44; at <= 44; at += 4) /* rope_dim */
        for (size_t i = 0; i < 5; i++)
            assert_int_equal(load_changed(&s.f, data, bytes, at, &layers[i], 4), FKV_ERR_FORMAT);
    for (int i = 0; i < 5; i++) {
        assert_int_equal(load_changed(&s.f, data, bytes, counts + 8 * (size_t)i, &minus, 8),
                         FKV_ERR_FORMAT);
        assert_int_equal(load_changed(&s.f, data, bytes, counts + 8 * (size_t)i, &huge, 8),
                         FKV_ERR_FORMAT);
    }
    assert_int_equal(load_changed(&s.f, data, bytes, sums, &nan_value, 8), FKV_ERR_FORMAT);
    assert_int_equal(load_changed(&s.f, data, bytes, sums, &negative, 8), FKV_OK); /* a sum */
    assert_int_equal(load_changed(&s.f, data, bytes, sums + 8 * CHANNELS, &negative, 8),
                     FKV_ERR_FORMAT); /* a sum of squares */
    assert_int_equal(load_changed(&s.f, data, bytes, bytes - 16, &negative, 8), FKV_ERR_FORMAT);
    free(data);
    close_setup(&s);
}

/* ---- allocation */

/* The bits that a profile gives each channel: K of all layers, then V. */
static void read_bits(const struct fixture *f, fkv_profile *profile, uint8_t *bits) {
    const size_t n = (size_t)f->options.kv_heads * (size_t)f->options.dim;
    for (int part = 0; part < 2; part++)
        for (int layer = 0; layer < f->options.layers; layer++, bits += n)
            assert_int_equal(fkv_profile_channels(profile, layer, part, bits, n), FKV_OK);
}

static double cost_of(int bits) {
    return bits == 16 ? 16 : bits ? bits + 32. / 128 : 0;
}

static double gain_of(int bits) {
    return bits == 0   ? 1
           : bits == 2 ? .11
           : bits == 3 ? .025
           : bits == 4 ? .006
           : bits == 8 ? 2.5e-5
                       : 1e-7;
}

static double mean_cost(const uint8_t *bits, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += cost_of(bits[i]) / n;
    return sum;
}

static double total_loss(const double *losses, const uint8_t *bits, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += losses[i] * gain_of(bits[i]);
    return sum;
}

/* The least loss of any choice that costs no more. */
static double best_loss(const double *losses, int n, const int *levels, int n_levels,
                        double budget) {
    if (!n)
        return budget >= -1e-9 ? 0 : INFINITY;
    double best = INFINITY;
    for (int i = 0; i < n_levels; i++)
        if (cost_of(levels[i]) <= budget + 1e-9)
            best = fmin(best, losses[0] * gain_of(levels[i]) +
                                  best_loss(losses + 1, n - 1, levels, n_levels,
                                            budget - cost_of(levels[i])));
    return best;
}

static fkv_status allocate(struct fixture *f, const fkv_allocation_params *params,
                           const double *losses, int n, fkv_allocation_info *report,
                           fkv_profile **out) {
    return fkv_profile_create_allocated(f->ctx, &f->model, NULL, params, losses, losses + n,
                                        (size_t)n, NULL, NULL, 0, report, out);
}

/* One layer, one head of 8 channels: small enough for every choice to be tried on 7 that matter. */
static void optimal(void **state) {
    (void)state;
    static const int sets[3][4] = {{0, 2, 4, -1}, {0, 2, 3, 4}, {2, 4, 8, -1}};
    struct random r;
    struct fixture f;
    random_init(&r, random_seed("test_sensitivity", 11));
    fixture_open(&f, &(struct options){.layers = 1, .q_heads = 1, .kv_heads = 1, .dim = 8});
    for (int round = 0; round < (random_quick() ? 6 : 30); round++) {
        const int *levels = sets[round % 3], n_levels = levels[3] < 0 ? 3 : 4;
        const int most = n_levels == 4 ? 9 : 10; /* of 16 channels; the others have no loss */
        double losses[16] = {0};
        uint8_t bits[16];
        for (int i = 0; i < most; i++)
            losses[(i * 5) % 16] = exp(3 * random_normal(&r));
        fkv_allocation_params params;
        fkv_allocation_params_init(&params, sizeof params);
        params.target = FKV_TARGET_BITS;
        params.levels = 0;
        for (int i = 0; i < n_levels; i++)
            params.levels |= UINT64_C(1) << levels[i];
        params.value = cost_of(levels[0]) + .05 + 2 * random_uniform(&r);
        fkv_allocation_info report = {.struct_size = sizeof report};
        fkv_profile *profile;
        assert_int_equal(allocate(&f, &params, losses, 8, &report, &profile), FKV_OK);
        read_bits(&f, profile, bits);
        const double cost = mean_cost(bits, 16), loss = total_loss(losses, bits, 16);
        assert_true(cost <= params.value + 1e-9);
        assert_near(report.bits, cost, 1e-12);
        assert_near(report.predicted_loss, loss, 1e-12);
        /* nothing that costs as little is better */
        double some[16];
        int n = 0;
        for (int i = 0; i < 16; i++)
            if (losses[i] > 0)
                some[n++] = losses[i];
        const double idle = (16 - n) * cost_of(levels[0]);
        assert_true(loss <= best_loss(some, n, levels, n_levels, cost * 16 - idle) * (1 + 1e-9));
        /* and it is no smaller than it must be: the next step does not fit */
        assert_true(cost + 2.25 / 16 + 4. / 16 > params.value ||
                    loss <= best_loss(some, n, levels, n_levels, 1e9) * (1 + 1e-9));
        assert_int_equal(fkv_profile_destroy(profile), FKV_OK);
    }
    fixture_close(&f);
}

static fkv_status allocate_to(struct setup *s, fkv_target target, double value, uint64_t levels,
                              fkv_allocation_info *report, fkv_profile **out) {
    fkv_allocation_params params;
    fkv_allocation_params_init(&params, sizeof params);
    params.target = target;
    params.value = value;
    params.levels = levels;
    *report = (fkv_allocation_info){.struct_size = sizeof *report};
    return fkv_calibrator_allocate(s->cal, &params, report, out);
}

#define L024 (1u | 1u << 2 | 1u << 4)

static void targets(void **state) {
    (void)state;
    static const double ratios[] = {1.5, 3, 6, 12, 15};
    struct setup s;
    open_setup(&s, NULL);
    observe_all(&s.f, s.cal, 0, 200, true, false);
    observe_all(&s.f, s.cal, 200, 100, true, false);
    double last = -1;
    for (size_t i = 0; i < sizeof ratios / sizeof *ratios; i++) {
        fkv_allocation_info a, b;
        fkv_profile *profile, *other;
        fkv_stats stats = {.struct_size = sizeof stats};
        assert_int_equal(allocate_to(&s, FKV_TARGET_RATIO, ratios[i], L024 | 1u << 8, &a, &profile),
                         FKV_OK);
        assert_int_equal(fkv_profile_estimate(profile, 8192, 0, &stats), FKV_OK);
        assert_true(a.ratio == stats.ratio && a.ratio >= ratios[i] && a.tokens == 8192);
        assert_true(i == 0 ||
                    a.ratio < ratios[i] * 1.1); /* no more given away than steps are big */
        assert_true(a.predicted_loss > last && a.predicted_loss < a.carrier_loss);
        last = a.predicted_loss;
        /* what one target gives, the others give when asked for it */
        assert_int_equal(
            allocate_to(&s, FKV_TARGET_LOSS, a.predicted_loss, L024 | 1u << 8, &b, &other), FKV_OK);
        assert_true(b.predicted_loss <= a.predicted_loss && b.bits <= a.bits + 1e-9);
        assert_int_equal(fkv_profile_destroy(other), FKV_OK);
        assert_int_equal(allocate_to(&s, FKV_TARGET_BITS, a.bits, L024 | 1u << 8, &b, &other),
                         FKV_OK);
        assert_near(b.bits, a.bits, 1e-12);
        assert_int_equal(fkv_profile_destroy(other), FKV_OK);
        assert_int_equal(fkv_profile_destroy(profile), FKV_OK);
    }
    close_setup(&s);
}

/* Carriers are the means; a layer whose losses are weighed up gets more. */
static void carriers_and_weights(void **state) {
    (void)state;
    struct setup s;
    open_setup(&s, NULL);
    observe_all(&s.f, s.cal, 0, 200, true, false);
    observe_all(&s.f, s.cal, 200, 100, true, false);
    fkv_allocation_params params;
    fkv_allocation_params_init(&params, sizeof params);
    params.target = FKV_TARGET_BITS;
    params.value = 1;
    double weights[4] = {1, 1, 1, 1}, before = 0;
    params.weights = weights;
    params.weights_count = 4;
    for (int i = 0; i < 2; i++) {
        fkv_profile *profile;
        double means[CHANNELS], sum = 0;
        float carriers[CHANNELS];
        uint8_t bits[4 * CHANNELS];
        assert_int_equal(fkv_calibrator_allocate(s.cal, &params, NULL, &profile), FKV_OK);
        statistic(s.cal, 1, FKV_PART_V, FKV_STATISTIC_MEAN, means);
        assert_int_equal(fkv_profile_carriers(profile, 1, FKV_PART_V, carriers, CHANNELS), FKV_OK);
        for (int c = 0; c < CHANNELS; c++)
            assert_true(carriers[c] == (float)means[c]);
        read_bits(&s.f, profile, bits);
        for (int c = 0; c < CHANNELS; c++)
            sum += bits[3 * CHANNELS + c]; /* V of layer 1 */
        assert_true(i == 0 || sum > before);
        before = sum;
        weights[3] = 100;
        assert_int_equal(fkv_profile_destroy(profile), FKV_OK);
    }
    close_setup(&s);
}

/* Two channels of a pair that turns fast are one after RoPE: they get the same bits; one that hardly turns
 * within the context keeps its two apart. */
static void pairs_mix(void **state) {
    (void)state;
    struct setup s;
    const struct options options = {.layers = 1, .q_heads = 1, .kv_heads = 1, .dim = 16};
    fixture_open(&s.f, &options);
    s.f.inv_freq[7] = 1e-7;
    fkv_codec_params codec;
    fkv_codec_params_init(&codec, sizeof codec);
    for (fkv_domain domain = FKV_DOMAIN_ROTATED; domain <= FKV_DOMAIN_UNROTATED; domain++) {
        codec.domain = domain;
        s.cal = make_calibrator(&s.f, &codec);
        for (int i = 0; i < 2; i++) {
            struct window w = make_window(&s.f, 100 * i, 100, 0);
            for (int t = 0; t < 100; t++)
                for (int d = 0; d < 16; d++) {
                    w.data[2][t * 16 + d] = d == 0 || d == 7 ? 1.f : 1e-4f;
                    w.data[3][t * 16 + d] = 0;
                }
            assert_int_equal(observe(s.cal, 0, &w, true, false), FKV_OK);
            free_window(&w);
        }
        fkv_allocation_info report;
        fkv_profile *profile;
        uint8_t bits[32];
        assert_int_equal(allocate_to(&s, FKV_TARGET_LOSS, 1e-2, L024, &report, &profile), FKV_OK);
        read_bits(&s.f, profile, bits);
        assert_true(bits[0] > 0 && bits[7] > 0 && bits[15] == 0);
        assert_int_equal(bits[8] > 0, domain == FKV_DOMAIN_ROTATED);
        assert_int_equal(fkv_profile_destroy(profile), FKV_OK);
        assert_int_equal(fkv_calibrator_destroy(s.cal), FKV_OK);
    }
    fixture_close(&s.f);
}

/* ---- what cannot be had */

static void bad_tensors(void **state) {
    (void)state;
    struct setup s;
    open_setup(&s, NULL);
    struct window w = make_window(&s.f, 0, 64, 0);
    const fkv_tensor good[5] = {w.t[0], w.t[1], w.t[2], w.t[3], w.t[4]};
    for (int i = 0; i < 5; i++) {
        for (int d = 0; d < fixture_n_damages; d++) {
            fixture_damages[d].apply(&w.t[i]);
            const fkv_status status = observe(s.cal, 0, &w, true, true);
            if (status != fixture_damages[d].status)
                fail_msg("tensor %d, %s: %d", i, fixture_damages[d].name, status);
            w.t[i] = good[i];
        }
        const float kept = w.data[i][40];
        w.data[i][40] = NAN;
        assert_int_equal(observe(s.cal, 0, &w, true, true), FKV_ERR_NONFINITE);
        w.data[i][40] = kept;
    }
    assert_int_equal(fkv_calibrator_observe_gradients(s.cal, 0, NULL, &w.t[1], NULL, NULL, NULL),
                     FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_observe_gradients(s.cal, 0, &w.t[0], NULL, NULL, NULL, NULL),
                     FKV_ERR_INVALID);
    for (int i = 2; i < 4; i++)
        assert_int_equal(fkv_calibrator_observe_gradients(s.cal, 0, &w.t[0], &w.t[1],
                                                          i == 2 ? &w.t[2] : NULL,
                                                          i == 3 ? &w.t[3] : NULL, NULL),
                         FKV_ERR_INVALID);
    assert_int_equal(observe(s.cal, 2, &w, true, true), FKV_ERR_INVALID);
    assert_int_equal(observe(s.cal, -1, &w, true, true), FKV_ERR_INVALID);
    /* nothing of all this was counted */
    double values[CHANNELS];
    assert_int_equal(
        fkv_calibrator_statistic(s.cal, 0, FKV_PART_K, FKV_STATISTIC_MEAN, values, CHANNELS),
        FKV_ERR_STATE);
    free_window(&w);
    close_setup(&s);
}

static void bad_statistics(void **state) {
    (void)state;
    struct setup s;
    open_setup(&s, NULL);
    double values[CHANNELS] = {0};
    struct window w = make_window(&s.f, 0, 64, 0);
    assert_int_equal(observe(s.cal, 0, &w, false, false), FKV_OK);
    const struct {
        int layer, part, which;
        double *values;
        size_t count;
        fkv_status status;
    } cases[] = {
        {0, 0, 0, values, CHANNELS, FKV_OK},
        {0, 0, 2, values, CHANNELS, FKV_ERR_STATE}, /* no gradients, no queries */
        {0, 0, 3, values, CHANNELS, FKV_ERR_STATE},
        {0, 0, 5, values, CHANNELS, FKV_ERR_STATE},
        {1, 0, 0, values, CHANNELS, FKV_ERR_STATE},
        {2, 0, 0, values, CHANNELS, FKV_ERR_INVALID},
        {0, 2, 0, values, CHANNELS, FKV_ERR_INVALID},
        {0, 0, 6, values, CHANNELS, FKV_ERR_INVALID},
        {0, 0, -1, values, CHANNELS, FKV_ERR_INVALID},
        {0, 0, 0, NULL, CHANNELS, FKV_ERR_INVALID},
        {0, 0, 0, values, CHANNELS - 1, FKV_ERR_BUFFER},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_int_equal(fkv_calibrator_statistic(s.cal, cases[i].layer, cases[i].part,
                                                  cases[i].which, cases[i].values, cases[i].count),
                         cases[i].status);
    assert_int_equal(fkv_calibrator_weigh_values(s.cal, 0, values, CHANNELS - 1), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_weigh_values(s.cal, 0, NULL, CHANNELS), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_weigh_values(s.cal, 2, values, CHANNELS), FKV_ERR_INVALID);
    values[3] = -1;
    assert_int_equal(fkv_calibrator_weigh_values(s.cal, 0, values, CHANNELS), FKV_ERR_INVALID);
    values[3] = NAN;
    assert_int_equal(fkv_calibrator_weigh_values(s.cal, 0, values, CHANNELS), FKV_ERR_INVALID);
    free_window(&w);
    close_setup(&s);
}

/* Layers with 0, 1, 2 observations; gradients in one layer only; a target out of reach. */
static void unsolvable(void **state) {
    (void)state;
    struct setup s;
    open_setup(&s, NULL);
    fkv_allocation_info report;
    fkv_profile *profile;
    struct window w = make_window(&s.f, 0, 64, 0);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(allocate_to(&s, FKV_TARGET_RATIO, 6, L024, &report, &profile),
                         FKV_ERR_STATE);
        assert_null(profile);
        observe_all(&s.f, s.cal, 64 * i, 64, true, false);
    }
    assert_int_equal(allocate_to(&s, FKV_TARGET_RATIO, 1000, L024, &report, &profile),
                     FKV_ERR_UNSUPPORTED);
    assert_non_null(strstr(fixture_message(&s.f), "alone take 8192 tokens to "));
    assert_int_equal(allocate_to(&s, FKV_TARGET_BITS, 2, 1u << 2 | 1u << 4, &report, &profile),
                     FKV_ERR_UNSUPPORTED);
    assert_non_null(strstr(fixture_message(&s.f), "takes 2.25"));
    assert_int_equal(allocate_to(&s, FKV_TARGET_LOSS, 1e-30, L024, &report, &profile),
                     FKV_ERR_UNSUPPORTED);
    assert_non_null(strstr(fixture_message(&s.f), "highest level leaves"));
    assert_int_equal(allocate_to(&s, FKV_TARGET_RATIO, 6, L024, &report, &profile), FKV_OK);
    assert_int_equal(fkv_profile_destroy(profile), FKV_OK);
    /* another calibrator: gradients in layer 0 alone */
    fkv_calibrator *kept = s.cal;
    s.cal = make_calibrator(&s.f, NULL);
    for (int i = 0; i < 4; i++)
        assert_int_equal(observe(s.cal, i % 2, &w, i % 2 == 0, true), FKV_OK);
    assert_int_equal(allocate_to(&s, FKV_TARGET_RATIO, 6, L024, &report, &profile), FKV_ERR_STATE);
    assert_int_equal(fkv_calibrator_destroy(kept), FKV_OK);
    free_window(&w);
    close_setup(&s);
}

static void bad_parameters(void **state) {
    (void)state;
    struct setup s;
    open_setup(&s, NULL);
    observe_all(&s.f, s.cal, 0, 64, true, false);
    observe_all(&s.f, s.cal, 64, 64, true, false);
    fkv_allocation_params good;
    fkv_allocation_params_init(&good, sizeof good);
    double weights[4] = {1, 1, NAN, 1}, losses[2 * 2 * CHANNELS] = {1};
    fkv_allocation_params bad[10];
    for (int i = 0; i < 10; i++)
        bad[i] = good;
    bad[0].target = 3;
    bad[1].target = -1;
    bad[2].value = 0;
    bad[3].value = NAN;
    bad[4].tokens = 0;
    bad[5].levels = 0;
    bad[6].levels |= 1u << 1;
    bad[7].weights_count = 4; /* without weights */
    bad[8].weights = weights;
    bad[9] = bad[8];
    bad[9].weights_count = 4;
    fkv_profile *profile;
    for (int i = 0; i < 10; i++) {
        assert_int_equal(fkv_calibrator_allocate(s.cal, &bad[i], NULL, &profile), FKV_ERR_INVALID);
        assert_int_equal(allocate(&s.f, &bad[i], losses, 2 * CHANNELS, NULL, &profile),
                         FKV_ERR_INVALID);
        assert_null(profile);
    }
    fkv_allocation_info report = {.struct_size = 3};
    assert_int_equal(fkv_calibrator_allocate(s.cal, &good, &report, &profile), FKV_ERR_INVALID);
    assert_null(profile);
    assert_int_equal(fkv_calibrator_allocate(s.cal, &good, NULL, NULL), FKV_ERR_INVALID);
    assert_int_equal(allocate(&s.f, &good, losses, 2 * CHANNELS - 1, NULL, &profile),
                     FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_create_allocated(s.f.ctx, &s.f.model, NULL, &good, losses, NULL,
                                                  2 * CHANNELS, NULL, NULL, 0, NULL, &profile),
                     FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_create_allocated(s.f.ctx, &s.f.model, NULL, &good, losses, losses,
                                                  2 * CHANNELS, NULL, NULL, 1, NULL, &profile),
                     FKV_ERR_INVALID);
    losses[5] = -1;
    assert_int_equal(allocate(&s.f, &good, losses, 2 * CHANNELS, NULL, &profile), FKV_ERR_INVALID);
    losses[5] = INFINITY;
    assert_int_equal(allocate(&s.f, &good, losses, 2 * CHANNELS, NULL, &profile), FKV_ERR_INVALID);
    close_setup(&s);
}

static void wrong_kind(void **state) {
    (void)state;
    struct setup s;
    open_setup(&s, NULL);
    fkv_calibrator *residual;
    fkv_profile *profile;
    size_t needed;
    double values[CHANNELS];
    assert_int_equal(fkv_calibrator_create(s.f.ctx, &s.f.model, NULL, &residual), FKV_OK);
    struct window w = make_window(&s.f, 0, 64, 0);
    assert_int_equal(observe(residual, 0, &w, true, true), FKV_ERR_UNSUPPORTED);
    assert_int_equal(fkv_calibrator_merge(s.cal, residual), FKV_ERR_UNSUPPORTED);
    assert_int_equal(fkv_calibrator_merge(residual, s.cal), FKV_ERR_UNSUPPORTED);
    assert_int_equal(fkv_calibrator_merge(s.cal, s.cal), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_merge(s.cal, NULL), FKV_ERR_HANDLE);
    assert_int_equal(fkv_calibrator_merge(NULL, s.cal), FKV_ERR_HANDLE);
    assert_int_equal(fkv_calibrator_save(residual, NULL, 0, &needed), FKV_ERR_UNSUPPORTED);
    assert_int_equal(fkv_calibrator_save(s.cal, NULL, 0, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_save(s.cal, NULL, 5, &needed), FKV_ERR_INVALID);
    fkv_calibrator *none;
    assert_int_equal(fkv_calibrator_load(s.f.ctx, NULL, 5, &none), FKV_ERR_INVALID);
    assert_null(none);
    assert_int_equal(fkv_calibrator_statistic(residual, 0, 0, 0, values, CHANNELS),
                     FKV_ERR_UNSUPPORTED);
    assert_int_equal(fkv_calibrator_weigh_values(residual, 0, values, CHANNELS),
                     FKV_ERR_UNSUPPORTED);
    assert_int_equal(fkv_calibrator_allocate(residual, NULL, NULL, &profile), FKV_ERR_UNSUPPORTED);
    assert_int_equal(fkv_calibrator_solve(s.cal, NULL, NULL, 0, &profile), FKV_ERR_UNSUPPORTED);
    /* fkv_calibrator_observe() is an observation without gradients */
    assert_int_equal(fkv_calibrator_observe(s.cal, 0, &w.t[0], &w.t[1], &w.t[4]), FKV_OK);
    assert_int_equal(fkv_calibrator_errors(s.cal, 0, FKV_PART_V, values, CHANNELS), FKV_OK);
    free_window(&w);
    assert_int_equal(fkv_calibrator_destroy(residual), FKV_OK);
    /* another geometry */
    struct fixture other;
    fixture_open(&other, &(struct options){.layers = 3});
    fkv_calibrator *foreign = make_calibrator(&other, NULL);
    assert_int_equal(fkv_calibrator_merge(s.cal, foreign), FKV_ERR_MISMATCH);
    assert_int_equal(fkv_calibrator_destroy(foreign), FKV_OK);
    fixture_close(&other);
    close_setup(&s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(against_doubles),
        cmocka_unit_test(slow_share),
        cmocka_unit_test(without_gradients),
        cmocka_unit_test(merging),
        cmocka_unit_test(saving),
        cmocka_unit_test(damaged),
        cmocka_unit_test(optimal),
        cmocka_unit_test(targets),
        cmocka_unit_test(carriers_and_weights),
        cmocka_unit_test(pairs_mix),
        cmocka_unit_test(bad_tensors),
        cmocka_unit_test(bad_statistics),
        cmocka_unit_test(unsolvable),
        cmocka_unit_test(bad_parameters),
        cmocka_unit_test(wrong_kind),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
