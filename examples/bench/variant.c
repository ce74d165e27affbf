/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- models */

static void set_rope(struct bench_model *model, double theta) {
    int pairs = model->rope_dim / 2;
    model->inv_freq = bench_alloc((size_t)pairs, sizeof(double));
    for (int j = 0; j < pairs; j++)
        model->inv_freq[j] = pow(theta, -2.0 * j / model->rope_dim);
}

void bench_model_init(struct bench_model *model, int hq, int hk, int dim, double theta) {
    memset(model, 0, sizeof(*model));
    model->hq = hq;
    model->hk = hk;
    model->dim = dim;
    model->rope_layout = FKV_ROPE_HALF_SPLIT;
    model->rope_dim = dim;
    model->scale = 1.0 / sqrt(dim);
    set_rope(model, theta);
}

struct ranked {
    double rank;
    size_t channel;
};

static int by_rank(const void *a, const void *b) {
    double x = ((const struct ranked *)a)->rank, y = ((const struct ranked *)b)->rank;
    return (x > y) - (x < y);
}

/* Channels in a random order. What a head has in advance makes the heads' shares differ, as in real profiles. */
static void rank(const struct bench_model *model, struct bench_random *r, struct ranked *ranked) {
    size_t dim = (size_t)model->dim, channels = (size_t)model->hk * dim;
    double head = 0;

    for (size_t c = 0; c < channels; c++) {
        if (c % dim == 0)
            head = 0.3 * (double)(bench_random_next(r) >> 11) * 0x1p-53;
        ranked[c].rank = head + (double)(bench_random_next(r) >> 11) * 0x1p-53;
        ranked[c].channel = c;
    }
    qsort(ranked, channels, sizeof(*ranked), by_rank);
}

void bench_model_code(struct bench_model *model, double fraction, struct bench_random *r) {
    size_t channels = (size_t)model->hk * (size_t)model->dim;
    size_t coded = (size_t)lround(fraction * (double)channels);
    struct ranked *ranked = bench_alloc(channels, sizeof(*ranked));

    model->coded = true;
    for (int part = 0; part < 2; part++) {
        rank(model, r, ranked);
        model->mask[part] = bench_alloc(channels, 1);
        for (size_t i = 0; i < coded; i++)
            model->mask[part][ranked[i].channel] = 1;
    }
    free(ranked);
}

static void start_calibrated(struct bench_model *model) {
    size_t channels = (size_t)model->hk * (size_t)model->dim;

    model->calibrated = true;
    fkv_codec_params_init(&model->codec, sizeof(model->codec));
    model->codec.storage_dtype = model->storage;
    for (int part = 0; part < 2; part++) {
        model->mask[part] = bench_alloc(channels, 1);
        model->carrier[part] = bench_alloc(channels, sizeof(float));
    }
}

bool bench_model_calibrate(struct bench_model *model, double rate, struct bench_random *r) {
    size_t channels = (size_t)model->hk * (size_t)model->dim;
    struct ranked *ranked = bench_alloc(channels, sizeof(*ranked));

    start_calibrated(model);
    double scales = 32.0 / model->codec.group;
    /* n channels of 4 bits and 15 n of 2 */
    double n = rate * (double)channels / (15 * (2 + scales) + 4 + scales);
    size_t fours = (size_t)lround(n), coded = (size_t)lround(16 * n);
    for (int part = 0; part < 2 && coded <= channels; part++) {
        rank(model, r, ranked);
        for (size_t i = 0; i < coded; i++)
            model->mask[part][ranked[i].channel] = i < fours ? 4 : 2;
        bench_random_fill(r, model->carrier[part], channels);
    }
    free(ranked);
    return coded <= channels;
}

bool bench_model_uniform(struct bench_model *model, int bits) {
    start_calibrated(model);
    for (int part = 0; part < 2; part++)
        memset(model->mask[part], bits, (size_t)model->hk * (size_t)model->dim);
    return bits == 0 || (bits >= 2 && bits <= 4) || bits == 8 || bits == 16;
}

static void load_coding(struct bench_model *model, fkv_context *ctx, fkv_profile *profile,
                        const fkv_profile_info *info, int layer) {
    size_t channels = (size_t)model->hk * (size_t)model->dim;
    fkv_fourier_params *fourier = &model->fourier;

    fkv_fourier_params_init(fourier, sizeof(*fourier));
    fourier->storage_dtype = info->storage_dtype;
    fourier->coefficient_dtype = info->coefficient_dtype;
    fourier->bins = info->bins;
    fourier->n_sink = info->n_sink;
    fourier->n_local = info->n_local;
    fourier->restoration = info->restoration;
    fourier->outgrow = info->outgrow;
    fourier->period = info->period;
    fourier->min_middle = info->min_middle;
    for (int part = 0; part < 2; part++) {
        model->mask[part] = bench_alloc(channels, 1);
        bench_check(ctx, fkv_profile_channels(profile, layer, part, model->mask[part], channels),
                    "channels of the profile");
        for (size_t c = 0; c < channels; c++)
            model->mask[part][c] = model->mask[part][c] == FKV_CHANNEL_FOURIER;
    }
}

static void load_calibrated(struct bench_model *model, fkv_context *ctx, fkv_profile *profile,
                            const fkv_profile_info *info, int layer) {
    size_t channels = (size_t)model->hk * (size_t)model->dim;
    fkv_codec_params *codec = &model->codec;

    start_calibrated(model);
    codec->group = info->group;
    codec->block = info->block;
    codec->n_sink = info->n_sink;
    codec->n_local = info->n_local;
    codec->domain = info->domain;
    for (int part = 0; part < 2; part++) {
        bench_check(ctx, fkv_profile_channels(profile, layer, part, model->mask[part], channels),
                    "channels of the profile");
        bench_check(ctx, fkv_profile_carriers(profile, layer, part, model->carrier[part], channels),
                    "carriers of the profile");
    }
}

void bench_model_load(struct bench_model *model, fkv_context *ctx, const char *path, int layer,
                      double theta) {
    fkv_profile *profile;
    fkv_profile_info info;

    bench_check(ctx, fkv_profile_load_file(ctx, path, &profile), "profile");
    info.struct_size = sizeof(info);
    bench_check(ctx, fkv_profile_query(profile, &info), "profile");
    if (layer >= info.n_layers)
        bench_fail("%s has layers 0..%d, not %d", path, info.n_layers - 1, layer);
    memset(model, 0, sizeof(*model));
    model->hq = info.n_q_heads;
    model->hk = info.n_kv_heads;
    model->dim = info.head_dim;
    model->rope_layout = info.rope_layout;
    model->rope_dim = info.rope_layout == FKV_ROPE_NONE ? 0 : info.rope_dim;
    model->scale = info.softmax_scale;
    model->storage = info.storage_dtype;
    model->coded = info.coding == FKV_CODING_FOURIER;
    set_rope(model, theta);
    if (model->coded)
        load_coding(model, ctx, profile, &info, layer);
    if (info.coding == FKV_CODING_CALIBRATED)
        load_calibrated(model, ctx, profile, &info, layer);
    fkv_profile_destroy(profile);
}

void bench_model_free(struct bench_model *model) {
    free(model->inv_freq);
    free(model->mask[0]);
    free(model->mask[1]);
    free(model->carrier[0]);
    free(model->carrier[1]);
}

static fkv_profile *make_profile(fkv_context *ctx, const struct bench_model *model) {
    fkv_profile *profile;
    fkv_model_params params;

    fkv_model_params_init(&params, sizeof(params));
    params.n_layers = 1;
    params.n_q_heads = model->hq;
    params.n_kv_heads = model->hk;
    params.head_dim = model->dim;
    params.rope_layout = model->rope_layout;
    params.rope_dim = model->rope_dim;
    params.inv_freq_count = model->rope_dim / 2;
    params.inv_freq = model->rope_dim ? model->inv_freq : NULL;
    params.softmax_scale = model->scale;
    size_t channels = (size_t)model->hk * (size_t)model->dim;
    fkv_status status;
    if (model->coded)
        status = fkv_profile_create_fourier(ctx, &params, &model->fourier, model->mask[0],
                                            model->mask[1], channels, &profile);
    else if (model->calibrated)
        status = fkv_profile_create_coded(ctx, &params, &model->codec, model->mask[0],
                                          model->mask[1], channels, model->carrier[0],
                                          model->carrier[1], channels, &profile);
    else
        status = fkv_profile_create_exact(ctx, &params, model->storage, &profile);
    bench_check(ctx, status, "profile");
    return profile;
}

/* ---- variants */

static int64_t period_of(int64_t tokens) {
    return tokens < 64 ? 64 : tokens;
}

/* As many sets as make the data 4 times the caches, but no more than a quarter of the memory. */
static int count_sets(const struct bench_variant *v) {
    fkv_stats stats = {.struct_size = sizeof(stats)};
    bench_check(v->ctx, fkv_profile_estimate(v->profile, v->tokens, period_of(v->tokens), &stats),
                "estimate");
    uint64_t bytes = stats.bytes * (uint64_t)v->batch + 1;
    uint64_t sets = 4 * bench_cache_bytes() / bytes + 1;
    uint64_t fit = bench_memory_bytes() / 4 / bytes;
    if (sets > fit)
        sets = fit ? fit : 1;
    return sets < 1024 ? (int)sets : 1024;
}

void bench_variant_init(struct bench_variant *v, fkv_context *ctx, const struct bench_model *model,
                        int64_t tokens, int batch, int sets, int repeats) {
    memset(v, 0, sizeof(*v));
    v->ctx = ctx;
    v->model = model;
    v->tokens = tokens;
    v->batch = batch;
    v->profile = make_profile(ctx, model);
    fkv_cache_params params;
    fkv_cache_params_init(&params, sizeof(params));
    params.flags = model->index ? FKV_CACHE_KEY_INDEX : 0;
    bench_check(ctx, fkv_cache_create(ctx, v->profile, &params, &v->cache), "cache");
    bench_check(ctx, fkv_plan_create(v->cache, &v->plan), "plan");
    if (model->select) {
        fkv_select_params select;
        fkv_select_params_init(&select, sizeof(select));
        bench_check(ctx, fkv_plan_select(v->plan, &select), "selection");
    }
    v->sets = sets ? sets : count_sets(v);
    v->sequences = bench_alloc((size_t)v->sets * (size_t)batch, sizeof(*v->sequences));
    v->seconds = bench_alloc((size_t)repeats, sizeof(double));
    v->plan_seconds = bench_alloc((size_t)repeats, sizeof(double));
}

/* The same number of new tokens for every sequence of a set. */
static void update_plan(struct bench_variant *v, int set, int64_t tokens, double *seconds) {
    fkv_batch batch;
    int64_t *n_new = bench_alloc((size_t)v->batch, sizeof(*n_new));

    for (int b = 0; b < v->batch; b++)
        n_new[b] = tokens;
    fkv_batch_init(&batch, sizeof(batch));
    batch.count = v->batch;
    batch.sequences = v->sequences + (size_t)set * (size_t)v->batch;
    batch.n_new = n_new;
    double start = bench_now();
    bench_check(v->ctx, fkv_plan_update(v->plan, &batch), "plan");
    *seconds += bench_now() - start;
    free(n_new);
}

static void make_sequences(struct bench_variant *v, fkv_sequence *sequences) {
    fkv_sequence_params params;

    fkv_sequence_params_init(&params, sizeof(params));
    if (v->model->coded)
        params.period = period_of(v->tokens);
    for (int b = 0; b < v->batch; b++)
        bench_check(v->ctx, fkv_sequence_create(v->cache, &params, &sequences[b]), "sequence");
}

/* What the set holds, and the tables that it shares with all others. */
static void count_bytes(struct bench_variant *v, const fkv_sequence *sequences) {
    fkv_stats all = {.struct_size = sizeof(all)};
    v->bytes = 0;
    v->dense_bytes = 0;
    for (int b = 0; b < v->batch; b++) {
        fkv_stats stats = {.struct_size = sizeof(stats)};
        bench_check(v->ctx, fkv_cache_stats(v->cache, sequences[b], &stats), "statistics");
        v->bytes += stats.bytes;
        v->dense_bytes += stats.dense_bytes;
        v->tokens_coded = (int64_t)stats.tokens_coded;
    }
    bench_check(v->ctx, fkv_cache_stats(v->cache, FKV_ALL_SEQUENCES, &all), "statistics");
    v->bytes += all.bytes - v->bytes / (uint64_t)v->batch * all.sequences;
}

void bench_variant_fill(struct bench_variant *v, int set, struct bench_random *r, double *seconds,
                        double *plan_seconds) {
    const struct bench_model *model = v->model;
    fkv_sequence *sequences = v->sequences + (size_t)set * (size_t)v->batch;
    int64_t chunk = v->batch < 16 ? 1024 / v->batch : 64;
    size_t row = (size_t)model->hk * (size_t)model->dim;
    size_t count = (size_t)v->batch * (size_t)chunk * row;
    float *k = bench_alloc(count, sizeof(float)), *value = bench_alloc(count, sizeof(float));

    make_sequences(v, sequences);
    for (int64_t done = 0; done < v->tokens; done += chunk) {
        int64_t n = v->tokens - done < chunk ? v->tokens - done : chunk;
        int64_t shape[3] = {n * v->batch, model->hk, model->dim};
        fkv_tensor tk, tv;
        bench_random_fill(r, k, (size_t)shape[0] * row);
        bench_random_fill(r, value, (size_t)shape[0] * row);
        fkv_tensor_init(&tk, k, FKV_DTYPE_F32, 3, shape);
        fkv_tensor_init(&tv, value, FKV_DTYPE_F32, 3, shape);
        update_plan(v, set, n, plan_seconds);
        double start = bench_now();
        bench_check(v->ctx, fkv_append(v->plan, 0, &tk, &tv), "append");
        *seconds += bench_now() - start;
    }
    free(k);
    free(value);
    count_bytes(v, sequences);
}

void bench_variant_drop(struct bench_variant *v, int set) {
    for (int b = 0; b < v->batch; b++)
        bench_check(
            v->ctx,
            fkv_sequence_free(v->cache, v->sequences[(size_t)set * (size_t)v->batch + (size_t)b]),
            "freeing a sequence");
}

void bench_variant_attend(struct bench_variant *v, int set, float *q, float *out, double *seconds,
                          double *plan_seconds) {
    int64_t shape[3] = {v->batch, v->model->hq, v->model->dim};
    int64_t kv_shape[3] = {v->batch, v->model->hk, v->model->dim};
    fkv_tensor tq, tkv, to;

    /* the new token's key and value are queries, to have something */
    fkv_tensor_init(&tq, q, FKV_DTYPE_F32, 3, shape);
    fkv_tensor_init(&tkv, q, FKV_DTYPE_F32, 3, kv_shape);
    fkv_tensor_init(&to, out, FKV_DTYPE_F32, 3, shape);
    update_plan(v, set, 1, plan_seconds);
    double start = bench_now();
    bench_check(v->ctx,
                v->model->select ? fkv_append_attend(v->plan, 0, &tq, &tkv, &tkv, &to, NULL)
                                 : fkv_attend(v->plan, 0, &tq, &to, NULL),
                "attend");
    *seconds += bench_now() - start;
}

void bench_variant_free(struct bench_variant *v) {
    fkv_plan_destroy(v->plan);
    fkv_cache_destroy(v->cache);
    fkv_profile_destroy(v->profile);
    free(v->sequences);
    free(v->seconds);
    free(v->plan_seconds);
}
