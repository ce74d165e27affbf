/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A channel with b bits loses f * g(b), f being the loss of its carrier alone. g is the same for all
 * channels, so all have the same convex hull of (cost, g), and a step along it is worth f times the slope.
 * Taking all steps of all channels in the order of their worth is optimal at every sum that is reached: no
 * other choice of levels costs as little and loses less. A target is a place in that order.
 */
#include "calib/allocate.h"

#include "cache/cache.h"

#include <math.h>
#include <string.h>

#define N_LEVELS 6

/* Residual variance left by each width, of its variance: measured (docs/calibration.md). */
static const struct {
    int bits;
    double gain;
} levels[N_LEVELS] = {{0, 1.0}, {2, .11}, {3, .025}, {4, .006}, {8, 2.5e-5}, {16, 1e-7}};

struct level {
    int bits;
    double cost, gain; /* bits per element, scales included */
};

struct step {
    double worth; /* loss avoided per bit and element */
    uint32_t channel;
    uint32_t to; /* index in the hull */
};

struct work {
    const struct fkv_allotment *a;
    const fkv_allocation_params *params;
    struct level hull[N_LEVELS];
    int n_hull;
    size_t channels, per_layer, n_steps; /* per_layer: of K and V together */
    struct step *steps;
    uint8_t *bits; /* K's [n_layers][Hk * D], then V's */
};

/* ---- parameters */

static uint64_t level_bit(int bits) {
    return UINT64_C(1) << bits;
}

static fkv_status check_levels(struct fkv_ctx *ctx, uint64_t mask) {
    uint64_t known = 0;
    for (int i = 0; i < N_LEVELS; i++)
        known |= level_bit(levels[i].bits);
    if (!mask || (mask & ~known))
        return fkv_fail(ctx, FKV_ERR_INVALID,
                        "allocation.levels: %#llx has no or other levels than 0, 2, 3, 4, 8, 16",
                        (unsigned long long)mask);
    return FKV_OK;
}

static fkv_status check_weights(struct fkv_ctx *ctx, const struct fkv_model *model,
                                const fkv_allocation_params *p) {
    const uint64_t n = p->weights ? 2 * (uint64_t)model->n_layers : 0;
    if (p->weights_count != n)
        return fkv_fail(ctx, FKV_ERR_INVALID, "allocation.weights_count: %llu, expected %llu",
                        (unsigned long long)p->weights_count, (unsigned long long)n);
    for (uint64_t i = 0; i < n; i++)
        if (!(p->weights[i] >= 0 && p->weights[i] <= 1e30))
            return fkv_fail(ctx, FKV_ERR_INVALID, "allocation.weights[%llu]: not in 0..1e30",
                            (unsigned long long)i);
    return FKV_OK;
}

fkv_status fkv_allocation_read(struct fkv_ctx *ctx, const struct fkv_model *model,
                               const fkv_allocation_params *params, fkv_allocation_params *own) {
    fkv_status status = FKV_OK;
    fkv_allocation_params_init(own, sizeof *own);
    if (params)
        status = fkv_params_read(ctx, "allocation", params, sizeof *own, own, sizeof *own);
    if (status)
        return status;
    if (own->target < FKV_TARGET_RATIO || own->target > FKV_TARGET_LOSS)
        return fkv_fail(ctx, FKV_ERR_INVALID, "allocation.target: %ld is unknown",
                        (long)own->target);
    if (!(own->value > 0 && own->value <= 1e30))
        return fkv_fail(ctx, FKV_ERR_INVALID, "allocation.value: %g is not in (0, 1e30]",
                        own->value);
    if (own->tokens < 1 || (uint64_t)own->tokens > ctx->max_tokens)
        return fkv_fail(ctx, FKV_ERR_INVALID, "allocation.tokens: %lld is not in 1..%llu",
                        (long long)own->tokens, (unsigned long long)ctx->max_tokens);
    status = check_levels(ctx, own->levels);
    return status ? status : check_weights(ctx, model, own);
}

/* ---- the order of steps */

static double cost_of(const struct fkv_codec_params *codec, int bits) {
    if (bits == 16)
        return codec->storage_dtype == FKV_DTYPE_F32 ? 32 : 16;
    return bits ? bits + 32.0 / codec->group : 0;
}

static void make_hull(struct work *w) {
    for (int i = 0; i < N_LEVELS; i++) {
        if (!(w->params->levels & level_bit(levels[i].bits)))
            continue;
        struct level next = {levels[i].bits, cost_of(&w->a->codec, levels[i].bits), levels[i].gain};
        while (w->n_hull > 1) {
            const struct level *a = &w->hull[w->n_hull - 2], *b = a + 1;
            if ((a->gain - b->gain) * (next.cost - b->cost) >
                (b->gain - next.gain) * (b->cost - a->cost))
                break;
            w->n_hull--;
        }
        w->hull[w->n_hull++] = next;
    }
}

/* Channel numbers run through layers, then parts, as `losses` do. */
static double loss_of(const struct work *w, size_t channel) {
    const size_t layer = channel / w->per_layer;
    const size_t part = channel % w->per_layer / (w->per_layer / 2);
    const double *weights = w->params->weights;
    return w->a->losses[channel] * (weights ? weights[2 * layer + part] : 1);
}

/* A total order, so that any sort gives the same. */
static bool before(const struct step *a, const struct step *b) {
    if (a->worth != b->worth)
        return a->worth > b->worth;
    return a->channel != b->channel ? a->channel < b->channel : a->to < b->to;
}

static void sift_down(struct step *heap, size_t n, size_t i) {
    const struct step item = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(&heap[child], &heap[child + 1]))
            child++;
        if (!before(&item, &heap[child]))
            break;
        heap[i] = heap[child];
    }
    heap[i] = item;
}

/* Heapsort: it needs no memory, which would have to come from the context. */
static void sort_steps(struct step *steps, size_t n) {
    for (size_t i = n / 2; i-- > 0;)
        sift_down(steps, n, i);
    for (size_t end = n; end-- > 1;) {
        const struct step last = steps[end];
        steps[end] = steps[0];
        steps[0] = last;
        sift_down(steps, end, 0);
    }
}

static void make_steps(struct work *w) {
    for (size_t c = 0; c < w->channels; c++) {
        const double loss = loss_of(w, c);
        for (int i = 1; i < w->n_hull && loss > 0; i++) {
            const struct level *a = &w->hull[i - 1], *b = a + 1;
            w->steps[w->n_steps++] = (struct step){loss * (a->gain - b->gain) / (b->cost - a->cost),
                                                   (uint32_t)c, (uint32_t)i};
        }
    }
    sort_steps(w->steps, w->n_steps);
}

/* ---- what a place in the order gives */

static size_t bits_index(const struct work *w, size_t channel) {
    const size_t half = w->per_layer / 2, layer = channel / w->per_layer;
    const size_t i = channel % w->per_layer;
    return i < half ? layer * half + i : w->channels / 2 + layer * half + i - half;
}

static void take(struct work *w, size_t count) {
    memset(w->bits, w->hull[0].bits, w->channels);
    for (size_t i = 0; i < count; i++)
        w->bits[bits_index(w, w->steps[i].channel)] = (uint8_t)w->hull[w->steps[i].to].bits;
}

static double predicted_loss(const struct work *w) {
    double sum = 0;
    for (size_t c = 0; c < w->channels; c++)
        for (int i = 0; i < w->n_hull; i++)
            if (w->hull[i].bits == w->bits[bits_index(w, c)])
                sum += loss_of(w, c) * w->hull[i].gain;
    return sum;
}

static fkv_status build(struct work *w, size_t count, struct fkv_profile_object **out) {
    struct fkv_model model;
    fkv_status status = fkv_model_copy(w->a->ctx, w->a->model, &model);
    if (status)
        return status;
    take(w, count);
    status =
        fkv_profile_new_coded(w->a->ctx, &model, &w->a->codec, w->bits, w->bits + w->channels / 2,
                              w->a->k_carrier, w->a->v_carrier, out);
    if (status)
        fkv_model_free(w->a->ctx, &model);
    return status;
}

static fkv_status ratio_at(struct work *w, size_t count, double *ratio) {
    struct fkv_profile_object *profile;
    fkv_stats stats = {.struct_size = sizeof stats};
    fkv_status status = build(w, count, &profile);
    if (status)
        return status;
    status = fkv_profile_predict(profile, w->params->tokens, 0, &stats);
    *ratio = stats.ratio;
    fkv_profile_unref(profile);
    return status;
}

/* ---- targets: the number of steps to take */

/* Bytes rise with every step, up to the few that align heads within a block. */
static fkv_status find_ratio(struct work *w, size_t *count) {
    double ratio;
    fkv_status status = ratio_at(w, 0, &ratio);
    if (status)
        return status;
    if (ratio < w->params->value)
        return fkv_fail(w->a->ctx, FKV_ERR_UNSUPPORTED,
                        "a ratio of %g cannot be met: sinks, tail and the lowest level alone take "
                        "%lld tokens to %.4g",
                        w->params->value, (long long)w->params->tokens, ratio);
    size_t fits = 0, over = w->n_steps + 1;
    while (!status && over - fits > 1) {
        const size_t middle = fits + (over - fits) / 2;
        status = ratio_at(w, middle, &ratio);
        if (ratio >= w->params->value)
            fits = middle;
        else
            over = middle;
    }
    *count = fits;
    return status;
}

static fkv_status find_bits(struct work *w, size_t *count) {
    const double budget = w->params->value * (double)w->channels * (1 + 1e-12);
    double sum = w->hull[0].cost * (double)w->channels;
    if (sum > budget)
        return fkv_fail(w->a->ctx, FKV_ERR_UNSUPPORTED,
                        "%g bits per element cannot be met: the lowest level takes %g",
                        w->params->value, w->hull[0].cost);
    size_t n = 0;
    for (; n < w->n_steps; n++) {
        const struct level *to = &w->hull[w->steps[n].to];
        sum += to->cost - to[-1].cost;
        if (sum > budget)
            break;
    }
    *count = n;
    return FKV_OK;
}

static fkv_status find_loss(struct work *w, size_t *count) {
    take(w, w->n_steps);
    const double least = predicted_loss(w);
    if (least > w->params->value)
        return fkv_fail(w->a->ctx, FKV_ERR_UNSUPPORTED,
                        "a predicted loss of %g cannot be met: the highest level leaves %g",
                        w->params->value, least);
    size_t enough = w->n_steps, low = 0;
    while (low < enough) {
        const size_t middle = low + (enough - low) / 2;
        take(w, middle);
        if (predicted_loss(w) <= w->params->value)
            enough = middle;
        else
            low = middle + 1;
    }
    *count = enough;
    return FKV_OK;
}

/* ---- all together */

static fkv_status fill_report(struct work *w, struct fkv_profile_object *profile,
                              fkv_allocation_info *report) {
    fkv_stats stats = {.struct_size = sizeof stats};
    fkv_status status = fkv_profile_predict(profile, w->params->tokens, 0, &stats);
    if (status)
        return status;
    double carriers = 0;
    for (size_t c = 0; c < w->channels; c++)
        carriers += loss_of(w, c);
    *report = (fkv_allocation_info){
        .struct_size = sizeof *report,
        .predicted_loss = predicted_loss(w),
        .carrier_loss = carriers,
        .bits = .5 * (fkv_profile_mean_bits(profile, FKV_PART_K) +
                      fkv_profile_mean_bits(profile, FKV_PART_V)),
        .ratio = stats.ratio,
        .tokens = w->params->tokens,
    };
    return FKV_OK;
}

static fkv_status solve(struct work *w, fkv_allocation_info *report,
                        struct fkv_profile_object **out) {
    size_t count = 0;
    make_hull(w);
    make_steps(w);
    fkv_status status = w->params->target == FKV_TARGET_RATIO  ? find_ratio(w, &count)
                        : w->params->target == FKV_TARGET_BITS ? find_bits(w, &count)
                                                               : find_loss(w, &count);
    if (!status)
        status = build(w, count, out);
    if (!status && report) {
        status = fill_report(w, *out, report);
        if (status)
            fkv_profile_unref(*out);
    }
    return status;
}

fkv_status fkv_allocate(const struct fkv_allotment *allotment, const fkv_allocation_params *params,
                        fkv_allocation_info *report, struct fkv_profile_object **out) {
    struct fkv_heap *heap = &allotment->ctx->heap;
    const struct fkv_model *m = allotment->model;
    struct work w = {.a = allotment, .params = params};
    w.per_layer = 2 * (size_t)m->n_kv_heads * (size_t)m->head_dim;
    w.channels = (size_t)m->n_layers * w.per_layer; /* at most 2^29 */
    size_t bytes;
    if (!fkv_mul_size(w.channels, (N_LEVELS - 1) * sizeof *w.steps, &bytes))
        return fkv_fail(allotment->ctx, FKV_ERR_LIMIT, "too many channels");
    w.steps = fkv_heap_alloc(heap, bytes);
    w.bits = fkv_heap_alloc(heap, w.channels);
    fkv_status status = w.steps && w.bits
                            ? solve(&w, report, out)
                            : fkv_fail_memory(allotment->ctx, bytes, "steps of an allocation");
    fkv_heap_free(heap, w.steps, bytes);
    fkv_heap_free(heap, w.bits, w.channels);
    return status;
}
