/* SPDX-License-Identifier: Apache-2.0 */
/* Both criteria against plain double computations, the choice of channels, and bad inputs. */
#include "fixture.h"
#include "guard.h"

#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define PI 3.14159265358979323846
#define MAX_CHANNELS 64

struct setup {
    struct fixture f;
    fkv_calibrator *cal;
    fkv_fourier_params fourier;
};

static fkv_status open_setup(struct setup *s, const struct options *options,
                             fkv_criterion criterion) {
    fixture_open(&s->f, options);
    const struct options *o = &s->f.options;
    fkv_fourier_params_init(&s->fourier, sizeof s->fourier);
    s->fourier.bins = o->bins;
    s->fourier.n_sink = o->n_sink < 0 ? 0 : o->n_sink;
    s->fourier.n_local = o->n_local;
    s->fourier.period = o->period;
    fkv_calibrator_params params;
    fkv_calibrator_params_init(&params, sizeof params);
    params.criterion = criterion;
    params.fourier = &s->fourier;
    return fkv_calibrator_create(s->f.ctx, &s->f.model, &params, &s->cal);
}

static void close_setup(struct setup *s) {
    assert_int_equal(fkv_calibrator_destroy(s->cal), FKV_OK);
    fixture_close(&s->f);
}

/* One prompt's tensors. */
struct prompt {
    int64_t tokens;
    float *k, *v, *q;
    fkv_tensor tk, tv, tq;
};

static struct prompt make_prompt(const struct fixture *f, int64_t tokens, uint64_t number,
                                 int layer) {
    const struct options *o = &f->options;
    struct prompt p = {.tokens = tokens};
    size_t floats = fixture_q_floats(f, tokens) + 1;
    p.k = malloc(floats * sizeof(float));
    p.v = malloc(floats * sizeof(float));
    p.q = malloc(floats * sizeof(float));
    fixture_values(p.k, 0, tokens, o->kv_heads, o->dim, number, layer, 'k');
    fixture_values(p.v, 0, tokens, o->kv_heads, o->dim, number, layer, 'v');
    fixture_values(p.q, 0, tokens, o->q_heads, o->dim, number, layer, 'q');
    p.tk = fixture_tensor(p.k, FKV_DTYPE_F32, tokens, o->kv_heads, o->dim);
    p.tv = fixture_tensor(p.v, FKV_DTYPE_F32, tokens, o->kv_heads, o->dim);
    p.tq = fixture_tensor(p.q, FKV_DTYPE_F32, tokens, o->q_heads, o->dim);
    return p;
}

static void free_prompt(struct prompt *p) {
    free(p->k);
    free(p->v);
    free(p->q);
}

/* ---- what the criteria say, in double */

static double rotated(const struct fixture *f, const float *x, int heads, int64_t t, int h, int d) {
    int dim = f->options.dim, half = dim / 2;
    const float *row = x + (t * heads + h) * dim;
    double angle = (double)t * f->inv_freq[d % half];
    if (d < half)
        return row[d] * cos(angle) - row[d + half] * sin(angle);
    return row[d] * cos(angle) + row[d - half] * sin(angle);
}

static void take_series(const struct setup *s, const float *x, int64_t length, int h, int d,
                        bool rotate, double *series) {
    int heads = s->f.options.kv_heads, dim = s->f.options.dim;
    double mean = 0;
    for (int64_t l = 0; l < length; l++) {
        int64_t t = l + s->fourier.n_sink;
        series[l] = rotate ? rotated(&s->f, x, heads, t, h, d) : x[(t * heads + h) * dim + d];
        mean += series[l] / (double)length;
    }
    for (int64_t l = 0; l < length; l++)
        series[l] -= mean;
}

static void spectrum(const double *x, int64_t length, int64_t n, double *c, double *s) {
    *c = *s = 0;
    for (int64_t l = 0; l < length; l++) {
        double phase = 2 * PI * (double)(n * l % length) / (double)length;
        *c += x[l] * cos(phase);
        *s += x[l] * sin(phase);
    }
}

/* The energy in the bins that are dropped, so that nothing is shared with a difference of energies. */
static double expect_residual(const double *x, int64_t length, int bins) {
    double energy = 0;
    for (int64_t n = bins; n <= length / 2; n++) {
        double c, s;
        spectrum(x, length, n, &c, &s);
        energy += (2 * n == length ? 1 : 2) * (c * c + s * s) / (double)length;
    }
    return energy / (double)length;
}

static double max_abs(const double *x, int64_t n) {
    double peak = 0;
    for (int64_t i = 0; i < n; i++)
        peak = fmax(peak, fabs(x[i]));
    return peak;
}

static double expect_published(const double *x, int64_t length, int64_t bins) {
    double *r = calloc((size_t)length, sizeof *r), mean = 0, error = 0;
    bins = bins < length / 2 + 1 ? bins : length / 2 + 1;
    for (int64_t n = 0; n < bins; n++) {
        double c, s;
        spectrum(x, length, n, &c, &s);
        for (int64_t l = 0; l < length; l++) {
            double phase = 2 * PI * (double)(n * l % length) / (double)length;
            r[l] += (c * cos(phase) + s * sin(phase)) / (double)bins;
        }
    }
    for (int64_t l = 0; l < length; l++)
        mean += r[l] / (double)length;
    for (int64_t l = 0; l < length; l++)
        r[l] -= mean;
    double peak = max_abs(r, length);
    double scale = peak > 1e-9 ? max_abs(x, length) / peak : 0;
    for (int64_t l = 0; l < length; l++)
        error += (r[l] * scale - x[l]) * (r[l] * scale - x[l]) / (double)length;
    free(r);
    return error;
}

static double expect_square(const struct setup *s, const struct prompt *p, int h, int d) {
    int heads = s->f.options.q_heads, group = heads / s->f.options.kv_heads;
    double sum = 0;
    for (int64_t t = 0; t < p->tokens; t++)
        for (int g = 0; g < group; g++) {
            double x = rotated(&s->f, p->q, heads, t, h * group + g, d);
            sum += x * x;
        }
    return sum / ((double)p->tokens * group);
}

static void expect(const struct setup *s, const struct prompt *p, fkv_criterion criterion,
                   fkv_part part, bool queries, double *errors) {
    int64_t length = p->tokens - s->fourier.n_sink - s->fourier.n_local;
    double *series = malloc((size_t)length * sizeof *series);
    bool residual = criterion == FKV_CRITERION_RESIDUAL, keys = part == FKV_PART_K;
    for (int h = 0; h < s->f.options.kv_heads; h++)
        for (int d = 0; d < s->f.options.dim; d++) {
            take_series(s, keys ? p->k : p->v, length, h, d, residual && keys, series);
            double error = residual ? expect_residual(series, length, s->fourier.bins)
                                    : expect_published(series, length, s->fourier.bins);
            if (residual && keys && queries)
                error *= expect_square(s, p, h, d);
            errors[h * s->f.options.dim + d] += error;
        }
    free(series);
}

static void check_errors(struct setup *s, int layer, fkv_part part, const double *expected) {
    double errors[MAX_CHANNELS];
    size_t channels = (size_t)s->f.options.kv_heads * (size_t)s->f.options.dim;
    assert_int_equal(fkv_calibrator_errors(s->cal, layer, part, errors, channels), FKV_OK);
    for (size_t i = 0; i < channels; i++)
        if (fabs(errors[i] - expected[i]) > 1e-5 * expected[i] + 5e-8)
            fail_msg("part %d channel %zu: %.12g, expected %.12g", part, i, errors[i], expected[i]);
}

static void compare(const struct options *options, fkv_criterion criterion, bool queries,
                    const int64_t *lengths, int n_prompts) {
    struct setup s;
    assert_int_equal(open_setup(&s, options, criterion), FKV_OK);
    double k[MAX_CHANNELS] = {0}, v[MAX_CHANNELS] = {0};
    for (int i = 0; i < n_prompts; i++) {
        struct prompt p = make_prompt(&s.f, lengths[i], (uint64_t)i, 1);
        assert_int_equal(fkv_calibrator_observe(s.cal, 1, &p.tk, &p.tv, queries ? &p.tq : NULL),
                         FKV_OK);
        expect(&s, &p, criterion, FKV_PART_K, queries, k);
        expect(&s, &p, criterion, FKV_PART_V, queries, v);
        free_prompt(&p);
    }
    for (int i = 0; i < MAX_CHANNELS; i++) {
        k[i] /= n_prompts;
        v[i] /= n_prompts;
    }
    check_errors(&s, 1, FKV_PART_K, k);
    check_errors(&s, 1, FKV_PART_V, v);
    close_setup(&s);
}

/* Middles of one block, of odd and even length, of several blocks; more bins than the middle has; one
 * token. */
static void compare_all(fkv_criterion criterion, bool queries) {
    static const int64_t several[] = {36 + 100, 36 + 257, 36 + 64};
    static const int64_t one[] = {36 + 700};
    static const int64_t tiny[] = {36 + 1, 36 + 2, 36 + 31};
    compare(NULL, criterion, queries, several, 3);
    compare(&(struct options){.bins = 40, .threads = 3}, criterion, queries, one, 1);
    compare(&(struct options){.bins = 64}, criterion, queries, tiny, 3);
    compare(&(struct options){.level = FKV_CPU_REFERENCE}, criterion, queries, several, 2);
    compare(&(struct options){.bins = 1, .n_sink = -1}, criterion, queries, several, 1);
}

static void residual_without_queries(void **state) {
    (void)state;
    compare_all(FKV_CRITERION_RESIDUAL, false);
}

static void residual_with_queries(void **state) {
    (void)state;
    compare_all(FKV_CRITERION_RESIDUAL, true);
}

static void published(void **state) {
    (void)state;
    compare_all(FKV_CRITERION_PUBLISHED, false);
    compare_all(FKV_CRITERION_PUBLISHED, true);
}

/* More channels than one work item takes, and channels that the groups do not divide evenly. */
static void many_channels(void **state) {
    (void)state;
    struct options options = {.layers = 2, .q_heads = 9, .kv_heads = 9, .dim = 40, .threads = 2};
    struct setup s, t;
    assert_int_equal(open_setup(&s, &options, FKV_CRITERION_PUBLISHED), FKV_OK);
    struct prompt p = make_prompt(&s.f, 300, 7, 0);
    double *errors = malloc(360 * sizeof *errors);
    assert_int_equal(fkv_calibrator_observe(s.cal, 0, &p.tk, &p.tv, NULL), FKV_OK);
    assert_int_equal(fkv_calibrator_errors(s.cal, 0, FKV_PART_V, errors, 360), FKV_OK);
    double series[300];
    for (int i = 0; i < 360; i += 7) {
        take_series(&s, p.v, 300 - 36, i / 40, i % 40, false, series);
        double expected = expect_published(series, 300 - 36, 16);
        assert_true(fabs(errors[i] - expected) <= 1e-5 * expected);
    }
    options.threads = 1;
    double again[360];
    assert_int_equal(open_setup(&t, &options, FKV_CRITERION_PUBLISHED), FKV_OK);
    assert_int_equal(fkv_calibrator_observe(t.cal, 0, &p.tk, &p.tv, NULL), FKV_OK);
    assert_int_equal(fkv_calibrator_errors(t.cal, 0, FKV_PART_V, again, 360), FKV_OK);
    assert_memory_equal(again, errors, sizeof again);
    free(errors);
    free_prompt(&p);
    close_setup(&s);
    close_setup(&t);
}

static void special_channels(void **state) {
    (void)state;
    struct setup s;
    assert_int_equal(open_setup(&s, NULL, FKV_CRITERION_PUBLISHED), FKV_OK);
    struct prompt p = make_prompt(&s.f, 36 + 256, 1, 0);
    double variance = 0;
    for (int64_t t = 0; t < p.tokens; t++) {
        float *row = p.v + t * 32;
        row[0] = 3.25f;                                                      /* constant */
        row[1] = 0;                                                          /* nothing at all */
        row[2] = (float)(1e-3 * cos(2 * PI * 100. * (double)(t - 4) / 256)); /* above the bins */
        row[3] = (float)(1e3 * cos(2 * PI * 5. * (double)(t - 4) / 256));    /* within */
    }
    variance = .5e-6;
    double errors[32];
    assert_int_equal(fkv_calibrator_observe(s.cal, 0, &p.tk, &p.tv, NULL), FKV_OK);
    assert_int_equal(fkv_calibrator_errors(s.cal, 0, FKV_PART_V, errors, 32), FKV_OK);
    assert_true(errors[0] == 0 && errors[1] == 0);
    assert_true(fabs(errors[2] - variance) < 1e-5 * variance);
    assert_true(errors[3] < 1e-6 * .5e6);
    free_prompt(&p);
    close_setup(&s);
}

/* f16 and bf16 with the strides of [heads, tokens, D]: the same numbers, so the same errors. */
static void types_and_strides(void **state) {
    (void)state;
    struct setup s;
    assert_int_equal(open_setup(&s, NULL, FKV_CRITERION_RESIDUAL), FKV_OK);
    struct prompt p = make_prompt(&s.f, 200, 3, 0);
    uint16_t *half = malloc(2 * 200 * 16 * sizeof *half);
    for (int t = 0; t < 200; t++)
        for (int i = 0; i < 32; i++) {
            uint32_t bits;
            memcpy(&bits, &p.k[t * 32 + i], sizeof bits);
            bits &= 0xffff0000u; /* a bf16 number */
            memcpy(&p.k[t * 32 + i], &bits, sizeof bits);
            half[(i / 16 * 200 + t) * 16 + i % 16] = (uint16_t)(bits >> 16);
        }
    fkv_tensor strided = fixture_tensor(half, FKV_DTYPE_BF16, 200, 2, 16);
    strided.strides[0] = 16 * 2;
    strided.strides[1] = 200 * 16 * 2;
    double a[32], b[32];
    assert_int_equal(fkv_calibrator_observe(s.cal, 0, &p.tk, &p.tv, NULL), FKV_OK);
    assert_int_equal(fkv_calibrator_observe(s.cal, 1, &strided, &p.tv, NULL), FKV_OK);
    assert_int_equal(fkv_calibrator_errors(s.cal, 0, FKV_PART_K, a, 32), FKV_OK);
    assert_int_equal(fkv_calibrator_errors(s.cal, 1, FKV_PART_K, b, 32), FKV_OK);
    assert_memory_equal(a, b, sizeof a);
    free(half);
    free_prompt(&p);
    close_setup(&s);
}

/* Reading ends with the last element, also where a row is no whole vector. */
static void edges_of_memory(void **state) {
    (void)state;
    struct setup s;
    struct options options = {.q_heads = 1, .kv_heads = 1, .dim = 24, .n_local = 8};
    for (fkv_dtype dtype = FKV_DTYPE_F32; dtype <= FKV_DTYPE_BF16; dtype++) {
        struct guard g;
        size_t bytes = 100 * 24 * (dtype == FKV_DTYPE_F32 ? 4 : 2);
        assert_int_equal(open_setup(&s, &options, FKV_CRITERION_RESIDUAL), FKV_OK);
        memset(guard_alloc(&g, bytes, 0), 0x38, bytes);
        fkv_tensor t = fixture_tensor(g.data, dtype, 100, 1, 24);
        assert_int_equal(fkv_calibrator_observe(s.cal, 0, &t, &t, &t), FKV_OK);
        guard_free(&g);
        close_setup(&s);
    }
}

/* ---- solving */

static void observe_all(struct setup *s, int64_t tokens) {
    for (int layer = 0; layer < s->f.options.layers; layer++) {
        struct prompt p = make_prompt(&s->f, tokens, 5, layer);
        assert_int_equal(fkv_calibrator_observe(s->cal, layer, &p.tk, &p.tv, NULL), FKV_OK);
        free_prompt(&p);
    }
}

/* Exactly `count` channels are coded, and none of them has a larger error than one that is kept (equal
 * errors: the lower index is coded). */
static void check_choice(struct setup *s, fkv_profile *profile, int layer, fkv_part part,
                         int count) {
    double errors[MAX_CHANNELS];
    uint8_t codes[MAX_CHANNELS];
    int channels = s->f.options.kv_heads * s->f.options.dim, coded = 0;
    assert_int_equal(fkv_calibrator_errors(s->cal, layer, part, errors, (size_t)channels), FKV_OK);
    assert_int_equal(fkv_profile_channels(profile, layer, part, codes, (size_t)channels), FKV_OK);
    for (int i = 0; i < channels; i++) {
        coded += codes[i] == FKV_CHANNEL_FOURIER;
        for (int j = 0; j < channels; j++)
            if (codes[i] == FKV_CHANNEL_FOURIER && codes[j] == FKV_CHANNEL_EXACT)
                assert_true(errors[i] < errors[j] || (errors[i] == errors[j] && i < j));
    }
    assert_int_equal(coded, count);
}

static void fractions(void **state) {
    (void)state;
    static const double shares[][2] = {{0, 1}, {.5, .25}, {.51, .52}, {1. / 64, .999}};
    static const int counts[][2] = {{0, 32}, {16, 8}, {16, 17}, {1, 32}};
    struct setup s;
    assert_int_equal(open_setup(&s, NULL, FKV_CRITERION_RESIDUAL), FKV_OK);
    observe_all(&s, 150);
    for (size_t i = 0; i < sizeof shares / sizeof *shares; i++) {
        double k[2] = {shares[i][0], shares[i][1]}, v[2] = {shares[i][1], shares[i][0]};
        fkv_profile *profile;
        assert_int_equal(fkv_calibrator_solve(s.cal, k, v, 2, &profile), FKV_OK);
        check_choice(&s, profile, 0, FKV_PART_K, counts[i][0]);
        check_choice(&s, profile, 1, FKV_PART_K, counts[i][1]);
        check_choice(&s, profile, 0, FKV_PART_V, counts[i][1]);
        check_choice(&s, profile, 1, FKV_PART_V, counts[i][0]);
        assert_int_equal(fkv_profile_destroy(profile), FKV_OK);
    }
    close_setup(&s);
}

/* 28 layers as published; the parameters of the coding arrive in the profile. */
static void published_shares(void **state) {
    (void)state;
    struct setup s;
    struct options options = {.layers = 28, .q_heads = 1, .kv_heads = 1, .dim = 40};
    assert_int_equal(open_setup(&s, &options, FKV_CRITERION_PUBLISHED), FKV_OK);
    observe_all(&s, 60);
    fkv_profile *profile;
    assert_int_equal(fkv_calibrator_solve(s.cal, NULL, NULL, 0, &profile), FKV_OK);
    for (int layer = 0; layer < 28; layer++) {
        check_choice(&s, profile, layer, FKV_PART_K, layer < 4 ? 36 : layer >= 20 ? 20 : 32);
        check_choice(&s, profile, layer, FKV_PART_V, layer < 4 ? 38 : layer >= 20 ? 28 : 32);
    }
    fkv_profile_info info = {.struct_size = sizeof info};
    assert_int_equal(fkv_profile_query(profile, &info), FKV_OK);
    assert_int_equal(info.bins, s.fourier.bins);
    assert_int_equal(info.n_local, s.fourier.n_local);
    assert_int_equal(info.period, s.fourier.period);
    assert_int_equal(info.coding, FKV_CODING_FOURIER);
    assert_int_equal(fkv_profile_destroy(profile), FKV_OK);
    close_setup(&s);
}

/* Equal errors: the lower index is compressed first. */
static void ties(void **state) {
    (void)state;
    struct setup s;
    assert_int_equal(open_setup(&s, NULL, FKV_CRITERION_PUBLISHED), FKV_OK);
    for (int layer = 0; layer < 2; layer++) {
        struct prompt p = make_prompt(&s.f, 100, 1, layer);
        memset(p.k, 0, 100 * 32 * sizeof *p.k);
        assert_int_equal(fkv_calibrator_observe(s.cal, layer, &p.tk, &p.tv, NULL), FKV_OK);
        free_prompt(&p);
    }
    double share[2] = {.25, .75};
    fkv_profile *profile;
    uint8_t codes[32];
    assert_int_equal(fkv_calibrator_solve(s.cal, share, share, 2, &profile), FKV_OK);
    for (int layer = 0; layer < 2; layer++) {
        assert_int_equal(fkv_profile_channels(profile, layer, FKV_PART_K, codes, 32), FKV_OK);
        for (int i = 0; i < 32; i++)
            assert_int_equal(codes[i] == FKV_CHANNEL_FOURIER, i < (layer ? 24 : 8));
    }
    assert_int_equal(fkv_profile_destroy(profile), FKV_OK);
    close_setup(&s);
}

/* The solved profile outlives the calibrator and the context's handle, and makes a working cache. */
static void profile_is_usable(void **state) {
    (void)state;
    struct setup s;
    assert_int_equal(open_setup(&s, NULL, FKV_CRITERION_RESIDUAL), FKV_OK);
    observe_all(&s, 150);
    assert_int_equal(fkv_profile_destroy(s.f.profile), FKV_OK);
    assert_int_equal(fkv_cache_destroy(s.f.cache), FKV_OK);
    assert_int_equal(fkv_calibrator_solve(s.cal, NULL, NULL, 0, &s.f.profile), FKV_OK);
    assert_int_equal(fkv_cache_create(s.f.ctx, s.f.profile, NULL, &s.f.cache), FKV_OK);
    assert_int_equal(fkv_calibrator_destroy(s.cal), FKV_OK);
    struct stream stream = fixture_stream(&s.f, 1, 300);
    fkv_stats stats = {.struct_size = sizeof stats};
    assert_int_equal(fkv_cache_stats(s.f.cache, stream.id, &stats), FKV_OK);
    assert_true(stats.tokens_coded > 0);
    fixture_close(&s.f);
}

/* ---- bad inputs */

static void bad_creation(void **state) {
    (void)state;
    struct fixture f;
    fixture_open(&f, NULL);
    fkv_calibrator *cal = (fkv_calibrator *)&f;
    fkv_calibrator_params params;
    assert_int_equal(fkv_calibrator_params_init(NULL, sizeof params), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_params_init(&params, 4), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_params_init(&params, sizeof params), FKV_OK);
    assert_int_equal(params.criterion, FKV_CRITERION_RESIDUAL);

    assert_int_equal(fkv_calibrator_create(NULL, &f.model, NULL, &cal), FKV_ERR_HANDLE);
    assert_null(cal);
    assert_int_equal(fkv_calibrator_create((fkv_context *)f.profile, &f.model, NULL, &cal),
                     FKV_ERR_HANDLE);
    assert_int_equal(fkv_calibrator_create(f.ctx, NULL, NULL, &cal), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_create(f.ctx, &f.model, NULL, NULL), FKV_ERR_INVALID);
    params.criterion = 3;
    assert_int_equal(fkv_calibrator_create(f.ctx, &f.model, &params, &cal), FKV_ERR_INVALID);
    params.criterion = FKV_CRITERION_PUBLISHED;
    params.struct_size = 0;
    assert_int_equal(fkv_calibrator_create(f.ctx, &f.model, &params, &cal), FKV_ERR_INVALID);
    params.struct_size = sizeof params;
    fkv_fourier_params fourier;
    fkv_fourier_params_init(&fourier, sizeof fourier);
    fourier.bins = 0;
    params.fourier = &fourier;
    assert_int_equal(fkv_calibrator_create(f.ctx, &f.model, &params, &cal), FKV_ERR_INVALID);
    fkv_model_params model = f.model;
    model.head_dim = 12;
    assert_int_equal(fkv_calibrator_create(f.ctx, &model, NULL, &cal), FKV_ERR_INVALID);
    assert_null(cal);

    struct {
        fkv_calibrator_params params;
        uint64_t tail;
    } longer;
    memset(&longer, 0, sizeof longer);
    fkv_calibrator_params_init(&longer.params, sizeof longer);
    assert_int_equal(fkv_calibrator_create(f.ctx, &f.model, &longer.params, &cal), FKV_OK);
    assert_int_equal(fkv_calibrator_destroy(cal), FKV_OK);
    assert_int_equal(fkv_calibrator_destroy(cal), FKV_ERR_HANDLE);
    longer.tail = 1;
    assert_int_equal(fkv_calibrator_create(f.ctx, &f.model, &longer.params, &cal),
                     FKV_ERR_UNSUPPORTED);
    assert_int_equal(fkv_calibrator_destroy(NULL), FKV_OK);
    fixture_close(&f);
}

static void expect_observe(struct setup *s, struct prompt *p, fkv_tensor *which,
                           fkv_status status) {
    double before[32], after[32];
    fkv_tensor saved = *which;
    assert_int_equal(fkv_calibrator_errors(s->cal, 0, FKV_PART_K, before, 32), FKV_OK);
    assert_int_equal(fkv_calibrator_observe(s->cal, 0, &p->tk, &p->tv, &p->tq), status);
    assert_int_equal(fkv_calibrator_errors(s->cal, 0, FKV_PART_K, after, 32), FKV_OK);
    assert_memory_equal(before, after, sizeof before);
    *which = saved;
}

static void bad_tensor(struct setup *s, struct prompt *p, fkv_tensor *t) {
    for (int i = 0; i < fixture_n_damages; i++) {
        fkv_tensor good = *t;
        fixture_damages[i].apply(t);
        /* the keys say how many tokens there are, so then it is the others that do not fit */
        expect_observe(s, p, t, fixture_damages[i].status);
        *t = good;
    }
}

static void bad_observations(void **state) {
    (void)state;
    struct setup s;
    assert_int_equal(open_setup(&s, NULL, FKV_CRITERION_RESIDUAL), FKV_OK);
    struct prompt p = make_prompt(&s.f, 100, 1, 0);
    assert_int_equal(fkv_calibrator_observe(NULL, 0, &p.tk, &p.tv, NULL), FKV_ERR_HANDLE);
    assert_int_equal(fkv_calibrator_observe((fkv_calibrator *)s.f.ctx, 0, &p.tk, &p.tv, NULL),
                     FKV_ERR_HANDLE);
    assert_int_equal(fkv_calibrator_observe(s.cal, -1, &p.tk, &p.tv, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_observe(s.cal, 2, &p.tk, &p.tv, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_observe(s.cal, 0, NULL, &p.tv, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_observe(s.cal, 0, &p.tk, NULL, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_observe(s.cal, 0, &p.tk, &p.tv, &p.tq), FKV_OK);
    bad_tensor(&s, &p, &p.tk);
    bad_tensor(&s, &p, &p.tv);
    bad_tensor(&s, &p, &p.tq);
    /* queries for all prompts of a layer or for none */
    assert_int_equal(fkv_calibrator_observe(s.cal, 0, &p.tk, &p.tv, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_observe(s.cal, 1, &p.tk, &p.tv, NULL), FKV_OK);
    assert_int_equal(fkv_calibrator_observe(s.cal, 1, &p.tk, &p.tv, &p.tq), FKV_ERR_INVALID);
    free_prompt(&p);
    /* no middle, and a middle of one token */
    p = make_prompt(&s.f, 36, 1, 0);
    assert_int_equal(fkv_calibrator_observe(s.cal, 1, &p.tk, &p.tv, NULL), FKV_ERR_INVALID);
    free_prompt(&p);
    p = make_prompt(&s.f, 37, 1, 0);
    assert_int_equal(fkv_calibrator_observe(s.cal, 1, &p.tk, &p.tv, NULL), FKV_OK);
    free_prompt(&p);
    close_setup(&s);
}

static void check_nonfinite(struct setup *s, struct prompt *p, float *x, const char *where) {
    float saved = *x;
    const float values[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        *x = values[i];
        expect_observe(s, p, &p->tk, FKV_ERR_NONFINITE);
        assert_non_null(strstr(fixture_message(&s->f), where));
    }
    *x = saved;
}

static void nonfinite(void **state) {
    (void)state;
    struct setup s;
    assert_int_equal(open_setup(&s, NULL, FKV_CRITERION_RESIDUAL), FKV_OK);
    struct prompt p = make_prompt(&s.f, 100, 1, 0);
    assert_int_equal(fkv_calibrator_observe(s.cal, 0, &p.tk, &p.tv, &p.tq), FKV_OK);
    check_nonfinite(&s, &p, &p.k[0], "k[0][0][0]");
    check_nonfinite(&s, &p, &p.k[99 * 32 + 31], "k[99][1][15]");
    check_nonfinite(&s, &p, &p.v[50 * 32 + 17], "v[50][1][1]");
    check_nonfinite(&s, &p, &p.q[3 * 64 + 63], "q[3][3][15]");
    /* finite, but not with squares */
    p.v[40 * 32] = 3e38f;
    p.v[41 * 32] = -3e38f;
    p.v[42 * 32] = 3e38f;
    fkv_status status = fkv_calibrator_observe(s.cal, 0, &p.tk, &p.tv, &p.tq);
    assert_true(status == FKV_OK || status == FKV_ERR_NONFINITE);
    double errors[32];
    assert_int_equal(fkv_calibrator_errors(s.cal, 0, FKV_PART_V, errors, 32), FKV_OK);
    for (int i = 0; i < 32; i++)
        assert_true(isfinite(errors[i]));
    free_prompt(&p);
    close_setup(&s);
}

static void bad_results(void **state) {
    (void)state;
    struct setup s;
    assert_int_equal(open_setup(&s, NULL, FKV_CRITERION_RESIDUAL), FKV_OK);
    double errors[32], share[2] = {.5, .5}, bad[2] = {.5, 1.5};
    fkv_profile *profile = (fkv_profile *)&s;
    assert_int_equal(fkv_calibrator_errors(s.cal, 0, FKV_PART_K, errors, 32), FKV_ERR_STATE);
    assert_int_equal(fkv_calibrator_solve(s.cal, share, share, 2, &profile), FKV_ERR_STATE);
    assert_null(profile);
    struct prompt p = make_prompt(&s.f, 100, 1, 0);
    assert_int_equal(fkv_calibrator_observe(s.cal, 0, &p.tk, &p.tv, NULL), FKV_OK);
    free_prompt(&p);
    assert_int_equal(fkv_calibrator_solve(s.cal, NULL, NULL, 0, &profile), FKV_ERR_STATE);
    observe_all(&s, 100);
    assert_int_equal(fkv_calibrator_errors(NULL, 0, FKV_PART_K, errors, 32), FKV_ERR_HANDLE);
    assert_int_equal(fkv_calibrator_errors(s.cal, 2, FKV_PART_K, errors, 32), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_errors(s.cal, -1, FKV_PART_K, errors, 32), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_errors(s.cal, 0, 2, errors, 32), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_errors(s.cal, 0, FKV_PART_K, NULL, 32), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_errors(s.cal, 0, FKV_PART_K, errors, 31), FKV_ERR_BUFFER);
    assert_int_equal(fkv_calibrator_solve(NULL, share, share, 2, &profile), FKV_ERR_HANDLE);
    assert_int_equal(fkv_calibrator_solve(s.cal, share, share, 2, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_solve(s.cal, share, NULL, 2, &profile), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_solve(s.cal, NULL, share, 2, &profile), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_solve(s.cal, share, share, 1, &profile), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_solve(s.cal, share, share, SIZE_MAX, &profile),
                     FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_solve(s.cal, NULL, NULL, 2, &profile), FKV_ERR_INVALID);
    assert_int_equal(fkv_calibrator_solve(s.cal, bad, share, 2, &profile), FKV_ERR_INVALID);
    bad[1] = -1e-9;
    assert_int_equal(fkv_calibrator_solve(s.cal, share, bad, 2, &profile), FKV_ERR_INVALID);
    bad[1] = NAN;
    assert_int_equal(fkv_calibrator_solve(s.cal, share, bad, 2, &profile), FKV_ERR_INVALID);
    assert_null(profile);
    close_setup(&s);
}

/* ---- threads */

struct busy_job {
    struct setup *s;
    struct prompt *p;
    pthread_barrier_t inside;
    bool armed;
    fkv_status status;
};

/* Holds the observing thread within its allocation until the other thread has tried. */
static void stop_inside(void *user) {
    struct busy_job *job = user;
    if (!job->armed)
        return;
    job->armed = false;
    pthread_barrier_wait(&job->inside);
    pthread_barrier_wait(&job->inside);
}

static void *observe_thread(void *user) {
    struct busy_job *job = user;
    job->status = fkv_calibrator_observe(job->s->cal, 0, &job->p->tk, &job->p->tv, NULL);
    return NULL;
}

static void one_thread_at_a_time(void **state) {
    (void)state;
    struct heap heap = {0};
    struct setup s;
    assert_int_equal(open_setup(&s, &(struct options){.heap = &heap}, FKV_CRITERION_RESIDUAL),
                     FKV_OK);
    struct prompt p = make_prompt(&s.f, 100, 1, 0);
    struct busy_job job = {.s = &s, .p = &p, .armed = true};
    pthread_t thread;
    double errors[32];
    pthread_barrier_init(&job.inside, NULL, 2);
    heap.watch_user = &job;
    heap.watch = stop_inside;
    assert_int_equal(pthread_create(&thread, NULL, observe_thread, &job), 0);
    pthread_barrier_wait(&job.inside);
    fkv_profile *profile;
    fkv_status statuses[4] = {fkv_calibrator_observe(s.cal, 0, &p.tk, &p.tv, NULL),
                              fkv_calibrator_errors(s.cal, 0, FKV_PART_K, errors, 32),
                              fkv_calibrator_solve(s.cal, NULL, NULL, 0, &profile),
                              fkv_calibrator_destroy(s.cal)};
    pthread_barrier_wait(&job.inside);
    pthread_join(thread, NULL);
    for (int i = 0; i < 4; i++)
        assert_int_equal(statuses[i], FKV_ERR_BUSY);
    assert_int_equal(job.status, FKV_OK);
    assert_int_equal(fkv_calibrator_errors(s.cal, 0, FKV_PART_K, errors, 32), FKV_OK);
    heap.watch = NULL;
    pthread_barrier_destroy(&job.inside);
    free_prompt(&p);
    close_setup(&s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(residual_without_queries),
        cmocka_unit_test(residual_with_queries),
        cmocka_unit_test(published),
        cmocka_unit_test(many_channels),
        cmocka_unit_test(special_channels),
        cmocka_unit_test(types_and_strides),
        cmocka_unit_test(edges_of_memory),
        cmocka_unit_test(fractions),
        cmocka_unit_test(published_shares),
        cmocka_unit_test(ties),
        cmocka_unit_test(profile_is_usable),
        cmocka_unit_test(bad_creation),
        cmocka_unit_test(bad_observations),
        cmocka_unit_test(nonfinite),
        cmocka_unit_test(bad_results),
        cmocka_unit_test(one_thread_at_a_time),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
