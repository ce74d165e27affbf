/* SPDX-License-Identifier: Apache-2.0 */
#include "calib/sensitivity.h"

#include "calib/channel_error.h"
#include "codec/rope.h"

#include <math.h>
#include <string.h>

#define SLOW_WAVE 64 /* tokens: waves no shorter count as slow */
#define MAX_COUNT (INT64_C(1) << 53)

/* ---- memory */

size_t fkv_sensitivity_sums(const struct fkv_model *m) {
    return (size_t)m->n_layers * 2 * FKV_N_SUM * fkv_sensitivity_channels(m);
}

static size_t weights_bytes(const struct fkv_model *m) {
    return (size_t)m->n_layers * fkv_sensitivity_channels(m) * sizeof(double);
}

static size_t counts_bytes(const struct fkv_model *m) {
    return (size_t)m->n_layers * sizeof(struct fkv_sensitivity_counts);
}

fkv_status fkv_sensitivity_init(struct fkv_sensitivity *s, struct fkv_ctx *ctx,
                                const struct fkv_model *model, const fkv_codec_params *codec) {
    *s = (struct fkv_sensitivity){.ctx = ctx, .model = model};
    fkv_status status = fkv_codec_read(ctx, codec, &s->codec);
    if (status)
        return status;
    const size_t bytes = fkv_sensitivity_sums(model) * sizeof(double);
    s->sums = fkv_heap_calloc(&ctx->heap, bytes);
    s->weights = fkv_heap_calloc(&ctx->heap, weights_bytes(model));
    s->counts = fkv_heap_calloc(&ctx->heap, counts_bytes(model));
    if (!s->sums || !s->weights || !s->counts) {
        status = fkv_fail_memory(ctx, bytes, "statistics of a calibrator");
        fkv_sensitivity_free(s);
    }
    return status;
}

void fkv_sensitivity_free(struct fkv_sensitivity *s) {
    if (!s->ctx)
        return;
    fkv_heap_free(&s->ctx->heap, s->sums, fkv_sensitivity_sums(s->model) * sizeof(double));
    fkv_heap_free(&s->ctx->heap, s->weights, weights_bytes(s->model));
    fkv_heap_free(&s->ctx->heap, s->counts, counts_bytes(s->model));
    *s = (struct fkv_sensitivity){0};
}

/* ---- observing. A work item is one KV head of one part; it sums its tokens in ascending order. */

struct summing {
    const struct fkv_sensitivity *s;
    const struct fkv_window *window;
    double *added; /* [2][FKV_N_SUM][Hk * D] */
};

static void add_squares(const struct summing *w, const struct fkv_view *view, int head,
                        double *sum) {
    const int dim = w->s->model->head_dim;
    float row[FKV_MAX_HEAD_DIM];
    for (int64_t t = 0; t < w->window->tokens; t++) {
        fkv_load_head(w->s->ctx->kernels, view, t, head, dim, row);
        for (int d = 0; d < dim; d++)
            sum[d] += (double)row[d] * row[d];
    }
}

static void add_values(const struct summing *w, const struct fkv_view *view, int head, double *sum,
                       double *squares) {
    const int dim = w->s->model->head_dim;
    float row[FKV_MAX_HEAD_DIM];
    for (int64_t t = 0; t < w->window->tokens; t++) {
        fkv_load_head(w->s->ctx->kernels, view, t, head, dim, row);
        for (int d = 0; d < dim; d++) {
            sum[d] += row[d];
            squares[d] += (double)row[d] * row[d];
        }
    }
}

static void sum_head(void *arg, int64_t item, int thread) {
    const struct summing *w = arg;
    const struct fkv_model *m = w->s->model;
    const int part = (int)(item % 2), head = (int)(item / 2);
    const size_t channels = fkv_sensitivity_channels(m);
    double *row = w->added + (size_t)part * FKV_N_SUM * channels + (size_t)head * m->head_dim;
    (void)thread;
    add_values(w, part ? &w->window->v : &w->window->k, head, row + FKV_SUM_X * channels,
               row + FKV_SUM_XX * channels);
    if (w->window->gradients)
        add_squares(w, part ? &w->window->grad_v : &w->window->grad_k, head,
                    row + FKV_SUM_GG * channels);
    for (int g = 0; w->window->queries && part == FKV_PART_K && g < m->group; g++)
        add_squares(w, &w->window->q, head * m->group + g, row + FKV_SUM_QQ * channels);
}

/* What is left of a window's energy without its mean and its slow waves. */
static fkv_status add_fast(const struct fkv_sensitivity *s, const struct fkv_window *window,
                           double *added) {
    const size_t channels = fkv_sensitivity_channels(s->model);
    fkv_fourier_params fourier = {.bins =
                                      (int32_t)fkv_min64(window->tokens / SLOW_WAVE + 1, 65536)};
    const struct fkv_prompt prompt = {s->ctx, s->model, &fourier, FKV_CRITERION_RESIDUAL,
                                      window->tokens};
    for (int part = 0; part < 2; part++) {
        double *fast = added + ((size_t)part * FKV_N_SUM + FKV_SUM_FAST) * channels;
        fkv_status status =
            fkv_prompt_errors(&prompt, part ? &window->v : &window->k, false, NULL, fast);
        if (status)
            return status;
        for (size_t i = 0; i < channels; i++)
            fast[i] *= (double)window->tokens;
    }
    return FKV_OK;
}

/* Adds `n` numbers if all sums stay finite. */
static fkv_status add_finite(struct fkv_ctx *ctx, double *sums, const double *added, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!isfinite(sums[i] + added[i]))
            return fkv_fail(ctx, FKV_ERR_NONFINITE, "the sums overflow: values too large");
    for (size_t i = 0; i < n; i++)
        sums[i] += added[i];
    return FKV_OK;
}

static bool add_counts(struct fkv_sensitivity_counts *a, const struct fkv_sensitivity_counts *b) {
    if (a->windows > MAX_COUNT - b->windows || a->tokens > MAX_COUNT - b->tokens)
        return false;
    a->windows += b->windows;
    a->tokens += b->tokens;
    a->gradient_tokens += b->gradient_tokens; /* never more than tokens */
    a->query_tokens += b->query_tokens;
    return true;
}

fkv_status fkv_sensitivity_add(struct fkv_sensitivity *s, int layer,
                               const struct fkv_window *window) {
    const size_t n = 2 * FKV_N_SUM * fkv_sensitivity_channels(s->model);
    const int64_t tokens = window->tokens;
    struct fkv_sensitivity_counts counts = s->counts[layer];
    const struct fkv_sensitivity_counts more = {1, tokens, window->gradients ? tokens : 0,
                                                window->queries ? tokens : 0, 0};
    if (!add_counts(&counts, &more))
        return fkv_fail(s->ctx, FKV_ERR_LIMIT, "too many tokens");
    double *added = fkv_heap_calloc(&s->ctx->heap, n * sizeof(double));
    if (!added)
        return fkv_fail_memory(s->ctx, n * sizeof(double), "statistics of a window");
    struct summing w = {s, window, added};
    fkv_pool_run(s->ctx->pool, 2 * (int64_t)s->model->n_kv_heads, sum_head, &w);
    fkv_status status = add_fast(s, window, added);
    if (!status)
        status = add_finite(s->ctx, fkv_sensitivity_row(s, layer, FKV_PART_K, FKV_SUM_X), added, n);
    if (!status)
        s->counts[layer] = counts;
    fkv_heap_free(&s->ctx->heap, added, n * sizeof(double));
    return status;
}

fkv_status fkv_sensitivity_merge(struct fkv_sensitivity *s, const struct fkv_sensitivity *other) {
    const struct fkv_model *m = s->model;
    const size_t channels = fkv_sensitivity_channels(m);
    for (int layer = 0; layer < m->n_layers; layer++) {
        struct fkv_sensitivity_counts sum = s->counts[layer];
        if (!add_counts(&sum, &other->counts[layer]))
            return fkv_fail(s->ctx, FKV_ERR_LIMIT, "layer %d: too many tokens", layer);
        const size_t at = (size_t)layer * channels;
        if (s->counts[layer].weighted && other->counts[layer].weighted &&
            memcmp(s->weights + at, other->weights + at, channels * sizeof(double)) != 0)
            return fkv_fail(s->ctx, FKV_ERR_MISMATCH, "layer %d: other output weights", layer);
    }
    fkv_status status = add_finite(s->ctx, s->sums, other->sums, fkv_sensitivity_sums(m));
    for (int layer = 0; !status && layer < m->n_layers; layer++) {
        const size_t at = (size_t)layer * channels;
        add_counts(&s->counts[layer], &other->counts[layer]);
        if (other->counts[layer].weighted) {
            memcpy(s->weights + at, other->weights + at, channels * sizeof(double));
            s->counts[layer].weighted = 1;
        }
    }
    return status;
}

/* ---- results */

static double mean_of(const struct fkv_sensitivity *s, int layer, fkv_part part, size_t i) {
    return fkv_sensitivity_row(s, layer, part, FKV_SUM_X)[i] / (double)s->counts[layer].tokens;
}

static double variance_of(const struct fkv_sensitivity *s, int layer, fkv_part part, size_t i) {
    const double n = (double)s->counts[layer].tokens, mean = mean_of(s, layer, part, i);
    const double square = fkv_sensitivity_row(s, layer, part, FKV_SUM_XX)[i] / n;
    const double variance = square - mean * mean;
    /* below this it is the rounding of the sums */
    return variance > 0x1p-46 * square ? variance : 0.0;
}

static double query_square(const struct fkv_sensitivity *s, int layer, size_t i) {
    return fkv_sensitivity_row(s, layer, FKV_PART_K, FKV_SUM_QQ)[i] /
           ((double)s->counts[layer].query_tokens * s->model->group);
}

/* Without weights the spread of V counts relative to that of the layer. */
static double value_weight(const struct fkv_sensitivity *s, int layer, size_t i) {
    const size_t channels = fkv_sensitivity_channels(s->model);
    if (s->counts[layer].weighted)
        return s->weights[(size_t)layer * channels + i];
    double spread = 0;
    for (size_t j = 0; j < channels; j++)
        spread += variance_of(s, layer, FKV_PART_V, j);
    return spread > 0 ? 1 / spread : 0;
}

/* Squared gradients, or their substitute: a change of a score moves the output by the spread of V. */
static double sensitivity_of(const struct fkv_sensitivity *s, int layer, fkv_part part, size_t i) {
    const size_t dim = (size_t)s->model->head_dim, head = i / dim;
    if (s->counts[layer].gradient_tokens)
        return fkv_sensitivity_row(s, layer, part, FKV_SUM_GG)[i] /
               (double)s->counts[layer].gradient_tokens;
    if (part == FKV_PART_V)
        return value_weight(s, layer, i);
    double spread = 0;
    for (size_t d = 0; d < dim; d++)
        spread += value_weight(s, layer, head * dim + d) *
                  variance_of(s, layer, FKV_PART_V, head * dim + d);
    const double scale = s->model->softmax_scale;
    return query_square(s, layer, i) * scale * scale * spread;
}

static double slow_share(const struct fkv_sensitivity *s, int layer, fkv_part part, size_t i) {
    const double n = (double)s->counts[layer].tokens;
    const double variance = variance_of(s, layer, part, i);
    const double fast = fkv_sensitivity_row(s, layer, part, FKV_SUM_FAST)[i] / n;
    return variance > 0 ? fmin(1, fmax(0, 1 - fast / variance)) : 0;
}

static fkv_status need(const struct fkv_sensitivity *s, int layer, bool sensitivity, bool query) {
    const struct fkv_sensitivity_counts *c = &s->counts[layer];
    if (!c->windows)
        return fkv_fail(s->ctx, FKV_ERR_STATE, "layer %d was not observed", layer);
    if (sensitivity && !c->gradient_tokens && !c->query_tokens)
        return fkv_fail(s->ctx, FKV_ERR_STATE, "layer %d has neither gradients nor queries", layer);
    if (query && !c->query_tokens)
        return fkv_fail(s->ctx, FKV_ERR_STATE, "layer %d has no queries", layer);
    return FKV_OK;
}

fkv_status fkv_sensitivity_statistic(const struct fkv_sensitivity *s, int layer, fkv_part part,
                                     fkv_statistic statistic, double *values) {
    const bool loss = statistic == FKV_STATISTIC_LOSS;
    fkv_status status = need(s, layer, loss || statistic == FKV_STATISTIC_SENSITIVITY,
                             statistic == FKV_STATISTIC_QUERY);
    if (status)
        return status;
    for (size_t i = 0; i < fkv_sensitivity_channels(s->model); i++) {
        switch (statistic) {
        case FKV_STATISTIC_MEAN:
            values[i] = mean_of(s, layer, part, i);
            break;
        case FKV_STATISTIC_VARIANCE:
            values[i] = variance_of(s, layer, part, i);
            break;
        case FKV_STATISTIC_SENSITIVITY:
            values[i] = sensitivity_of(s, layer, part, i);
            break;
        case FKV_STATISTIC_QUERY:
            values[i] = part == FKV_PART_K ? query_square(s, layer, i) : 0;
            break;
        case FKV_STATISTIC_SLOW_SHARE:
            values[i] = slow_share(s, layer, part, i);
            break;
        default:
            values[i] = .5 * sensitivity_of(s, layer, part, i) * variance_of(s, layer, part, i);
        }
    }
    return FKV_OK;
}

/* Over positions 0..tokens-1 the mean of sin^2: how much of its partner a rotated channel is. */
static double mixing(double frequency, int64_t tokens) {
    const double x = 2 * frequency * (double)tokens;
    return x < 1e-4 ? 0 : .5 * (1 - sin(x) / x);
}

/* Keys coded after RoPE: the residuals of a pair, and what their errors do, turn into one another. */
static void mix_pairs(const struct fkv_model *m, int64_t tokens, double *x) {
    const int half = m->rope_dim / 2;
    for (int h = 0; h < m->n_kv_heads; h++, x += m->head_dim)
        for (int j = 0; j < half; j++) {
            const bool interleaved = m->rope_layout == FKV_ROPE_INTERLEAVED;
            const int a = interleaved ? 2 * j : j, b = interleaved ? a + 1 : j + half;
            const double s = mixing(m->inv_freq[j], tokens), xa = x[a], xb = x[b];
            x[a] = (1 - s) * xa + s * xb;
            x[b] = (1 - s) * xb + s * xa;
        }
}

static fkv_status check_solvable(const struct fkv_sensitivity *s) {
    const bool gradients = s->counts[0].gradient_tokens > 0;
    for (int layer = 0; layer < s->model->n_layers; layer++) {
        const struct fkv_sensitivity_counts *c = &s->counts[layer];
        if (c->windows < 2)
            return fkv_fail(s->ctx, FKV_ERR_STATE,
                            "layer %d has %d observations, at least 2 needed", layer,
                            (int)c->windows);
        if ((c->gradient_tokens > 0) != gradients)
            return fkv_fail(s->ctx, FKV_ERR_STATE,
                            "layer %d has %s gradients, layer 0 %s: all layers or none", layer,
                            gradients ? "no" : "has", gradients ? "does" : "none");
        fkv_status status = need(s, layer, true, false);
        if (status)
            return status;
    }
    return FKV_OK;
}

fkv_status fkv_sensitivity_losses(const struct fkv_sensitivity *s, int64_t tokens, double *losses) {
    const struct fkv_model *m = s->model;
    const size_t channels = fkv_sensitivity_channels(m);
    fkv_status status = check_solvable(s);
    if (status)
        return status;
    double *variance = fkv_heap_alloc(&s->ctx->heap, channels * sizeof(double));
    if (!variance)
        return fkv_fail_memory(s->ctx, channels * sizeof(double), "variances");
    for (int layer = 0; layer < m->n_layers; layer++)
        for (int part = 0; part < 2; part++, losses += channels) {
            for (size_t i = 0; i < channels; i++) {
                losses[i] = sensitivity_of(s, layer, part, i);
                variance[i] = variance_of(s, layer, part, i);
            }
            const bool rotated = s->codec.domain == FKV_DOMAIN_ROTATED;
            /* queries meet keys at all distances, whatever the domain of the codes */
            if (part == FKV_PART_K && (rotated || !s->counts[layer].gradient_tokens))
                mix_pairs(m, tokens, losses);
            if (part == FKV_PART_K && rotated)
                mix_pairs(m, tokens, variance);
            for (size_t i = 0; i < channels; i++)
                losses[i] *= .5 * variance[i];
        }
    fkv_heap_free(&s->ctx->heap, variance, channels * sizeof(double));
    return FKV_OK;
}

fkv_status fkv_sensitivity_carriers(const struct fkv_sensitivity *s, float *carriers) {
    const size_t channels = fkv_sensitivity_channels(s->model);
    const int n_layers = s->model->n_layers;
    for (int part = 0; part < 2; part++)
        for (int layer = 0; layer < n_layers; layer++)
            for (size_t i = 0; i < channels; i++) {
                const double mean = mean_of(s, layer, part, i);
                if (!(fabs(mean) <= FKV_MAX_CARRIER))
                    return fkv_fail(s->ctx, FKV_ERR_NONFINITE,
                                    "layer %d: the mean of channel %zu of %c is %g, too large",
                                    layer, i, part ? 'v' : 'k', mean);
                *carriers++ = (float)mean;
            }
    return FKV_OK;
}
