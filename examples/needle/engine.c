/* SPDX-License-Identifier: Apache-2.0 */
#include "engine.h"

#include <cblas.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* Rows that pass through the matrix products together: bounds the memory of the wide MLP. */
#define BLOCK 1024
/* Progress units of attention for each block of a layer: what it costs beside projections and MLP. */
#define ATTENTION_UNITS 4

void needle_engine_threads(int32_t threads) {
#ifdef NEEDLE_OPENBLAS
    if (threads > 0) {
        openblas_set_num_threads(threads);
    }
#else
    (void)threads;
#endif
}

/* y[rows, out] = x[rows, in] . w[out, in]^T + beta * y */
static void linear(const float *x, size_t rows, int32_t in, const float *w, int32_t out, float beta,
                   float *y) {
    if (rows == 1) {
        cblas_sgemv(CblasRowMajor, CblasNoTrans, out, in, 1.0f, w, in, x, 1, beta, y, 1);
    } else {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)rows, out, in, 1.0f, x, in, w, in,
                    beta, y, out);
    }
}

static void rms_norm(const float *x, size_t rows, int32_t n, const float *weight, double eps,
                     float *y) {
    for (size_t r = 0; r < rows; r++, x += n, y += n) {
        double sum = 0;
        for (int32_t i = 0; i < n; i++) {
            sum += (double)x[i] * (double)x[i];
        }
        const float scale = (float)(1.0 / sqrt(sum / n + eps));
        for (int32_t i = 0; i < n; i++) {
            y[i] = x[i] * scale * weight[i];
        }
    }
}

static void swiglu(float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) {
        gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

static size_t block_rows(size_t n, size_t first) {
    return n - first < BLOCK ? n - first : BLOCK;
}

static void free_activations(struct needle_engine *e) {
    float **parts[] = {&e->x, &e->q, &e->k, &e->v, &e->attention, &e->normed, &e->gate, &e->up};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        free(*parts[i]);
        *parts[i] = NULL;
    }
    e->capacity = 0;
}

static int reserve(struct needle_engine *e, size_t n, struct needle_error *error) {
    if (n <= e->capacity) {
        return NEEDLE_OK;
    }
    const struct needle_config *c = &e->model->config;
    const size_t hidden = (size_t)c->hidden_size, inner = (size_t)c->intermediate_size;
    const size_t q = (size_t)(c->n_heads * c->head_dim), kv = (size_t)(c->n_kv_heads * c->head_dim);
    const size_t block = block_rows(n, 0);
    free_activations(e);
    e->x = needle_alloc(n, hidden * sizeof(float));
    e->q = needle_alloc(n, q * sizeof(float));
    e->k = needle_alloc(n, kv * sizeof(float));
    e->v = needle_alloc(n, kv * sizeof(float));
    e->attention = needle_alloc(n, q * sizeof(float));
    e->normed = needle_alloc(block, hidden * sizeof(float));
    e->gate = needle_alloc(block, inner * sizeof(float));
    e->up = needle_alloc(block, inner * sizeof(float));
    if (!e->x || !e->q || !e->k || !e->v || !e->attention || !e->normed || !e->gate || !e->up) {
        free_activations(e);
        return needle_fail(error, NEEDLE_FAILED, "out of memory for the activations of %zu tokens",
                           n);
    }
    e->capacity = n;
    return NEEDLE_OK;
}

static void project(struct needle_engine *e, const struct needle_layer *y, size_t first,
                    size_t rows) {
    const struct needle_config *c = &e->model->config;
    const int32_t hidden = c->hidden_size;
    const int32_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    rms_norm(e->x + first * (size_t)hidden, rows, hidden, y->input_norm, c->rms_norm_eps,
             e->normed);
    linear(e->normed, rows, hidden, y->q, q, 0, e->q + first * (size_t)q);
    linear(e->normed, rows, hidden, y->k, kv, 0, e->k + first * (size_t)kv);
    linear(e->normed, rows, hidden, y->v, kv, 0, e->v + first * (size_t)kv);
}

static void finish_block(struct needle_engine *e, const struct needle_layer *y, size_t first,
                         size_t rows) {
    const struct needle_config *c = &e->model->config;
    const int32_t hidden = c->hidden_size, inner = c->intermediate_size;
    const int32_t q = c->n_heads * c->head_dim;
    float *x = e->x + first * (size_t)hidden;
    linear(e->attention + first * (size_t)q, rows, q, y->o, hidden, 1, x);
    rms_norm(x, rows, hidden, y->post_norm, c->rms_norm_eps, e->normed);
    linear(e->normed, rows, hidden, y->gate, inner, 0, e->gate);
    linear(e->normed, rows, hidden, y->up, inner, 0, e->up);
    swiglu(e->gate, e->up, rows * (size_t)inner);
    linear(e->gate, rows, inner, y->down, hidden, 1, x);
}

/* Attends with the cache that is in use; while a context is read, the others get the tokens too. */
static int attend(struct needle_engine *e, int32_t layer, size_t n, bool reading,
                  struct needle_error *error) {
    const struct needle_config *c = &e->model->config;
    const int64_t q_shape[] = {(int64_t)n, c->n_heads, c->head_dim};
    const int64_t kv_shape[] = {(int64_t)n, c->n_kv_heads, c->head_dim};
    fkv_tensor q, k, v, out;
    fkv_status status = fkv_tensor_init(&q, e->q, FKV_DTYPE_F32, 3, q_shape);
    status = status ? status : fkv_tensor_init(&k, e->k, FKV_DTYPE_F32, 3, kv_shape);
    status = status ? status : fkv_tensor_init(&v, e->v, FKV_DTYPE_F32, 3, kv_shape);
    status = status ? status : fkv_tensor_init(&out, e->attention, FKV_DTYPE_F32, 3, q_shape);
    if (!status && e->calibrator) {
        status = fkv_calibrator_observe(e->calibrator, layer, &k, &v, &q);
        if (status) {
            return needle_fail_fkv(error, NEEDLE_FAILED, e->ctx, status, "calibration");
        }
    }
    status = status ? status : fkv_append_attend(e->now->plan, layer, &q, &k, &v, &out, NULL);
    for (size_t i = 1; i < e->n_held && reading && !status; i++) {
        status = fkv_append(e->held[i].plan, layer, &k, &v);
    }
    return status ? needle_fail_fkv(error, NEEDLE_FAILED, e->ctx, status, "attention") : NEEDLE_OK;
}

static int forward_layer(struct needle_engine *e, int32_t layer, size_t n, bool reading,
                         struct needle_error *error) {
    const struct needle_layer *y = &e->model->layers[layer];
    for (size_t i = 0; i < n; i += BLOCK) {
        project(e, y, i, block_rows(n, i));
        needle_progress_step(e->progress, 1);
    }
    if (needle_interrupted()) {
        return needle_fail(error, NEEDLE_INTERRUPTED, "interrupted");
    }
    int code = attend(e, layer, n, reading, error);
    if (code) {
        return code;
    }
    needle_progress_step(e->progress, ATTENTION_UNITS * ((n + BLOCK - 1) / BLOCK));
    for (size_t i = 0; i < n; i += BLOCK) {
        finish_block(e, y, i, block_rows(n, i));
        needle_progress_step(e->progress, 1);
    }
    return NEEDLE_OK;
}

static void output_logits(struct needle_engine *e, size_t n, size_t n_logits, float *logits) {
    const struct needle_config *c = &e->model->config;
    const size_t hidden = (size_t)c->hidden_size;
    for (size_t i = n - n_logits; i < n; i += BLOCK) {
        size_t rows = block_rows(n, i);
        rms_norm(e->x + i * hidden, rows, c->hidden_size, e->model->norm, c->rms_norm_eps,
                 e->normed);
        linear(e->normed, rows, c->hidden_size, e->model->head, c->vocab_size, 0, logits);
        logits += rows * (size_t)c->vocab_size;
    }
}

static int update_plan(struct needle_engine *e, const struct needle_held *held, size_t n,
                       struct needle_error *error) {
    const int64_t n_new = (int64_t)n;
    fkv_batch batch;
    fkv_batch_init(&batch, sizeof batch);
    batch.count = 1;
    batch.sequences = &held->sequence;
    batch.n_new = &n_new;
    fkv_status status = fkv_plan_update(held->plan, &batch);
    return status ? needle_fail_fkv(error, NEEDLE_FAILED, e->ctx, status, "next step") : NEEDLE_OK;
}

static int forward(struct needle_engine *engine, const uint8_t *tokens, size_t n, bool reading,
                   struct needle_error *error) {
    const struct needle_model *m = engine->model;
    const size_t hidden = (size_t)m->config.hidden_size;
    int code = reserve(engine, n, error);
    code = code ? code : update_plan(engine, engine->now, n, error);
    for (size_t i = 1; i < engine->n_held && reading && !code; i++) {
        code = update_plan(engine, &engine->held[i], n, error);
    }
    if (code) {
        return code;
    }
    for (size_t i = 0; i < n; i++) {
        memcpy(engine->x + i * hidden, m->embedding + tokens[i] * hidden, hidden * sizeof(float));
    }
    for (int32_t layer = 0; layer < m->config.n_layers; layer++) {
        code = forward_layer(engine, layer, n, reading, error);
        if (code) {
            return code;
        }
    }
    return NEEDLE_OK;
}

int needle_engine_forward(struct needle_engine *engine, const uint8_t *tokens, size_t n,
                          size_t n_logits, float *logits, struct needle_error *error) {
    int code = forward(engine, tokens, n, false, error);
    if (!code) {
        output_logits(engine, n, n_logits, logits);
    }
    return code;
}

int needle_engine_prefill(struct needle_engine *engine, const uint8_t *tokens, size_t n,
                          size_t chunk, struct needle_error *error) {
    const size_t step = chunk ? chunk : n;
    engine->now = engine->held;
    for (size_t i = 0; i < n; i += step) {
        size_t count = n - i < step ? n - i : step;
        int code = forward(engine, tokens + i, count, true, error);
        if (code) {
            return code;
        }
    }
    return NEEDLE_OK;
}

uint64_t needle_engine_units(const struct needle_engine *engine, size_t n, size_t chunk) {
    const size_t step = chunk ? chunk : n;
    uint64_t blocks = 0;
    for (size_t i = 0; i < n; i += step) {
        size_t count = n - i < step ? n - i : step;
        blocks += (count + BLOCK - 1) / BLOCK;
    }
    return blocks * (2 + ATTENTION_UNITS) * (uint64_t)engine->model->config.n_layers;
}

int needle_engine_open(struct needle_engine *engine, const struct needle_model *model,
                       fkv_context *ctx, fkv_profile *const *profiles, size_t n_profiles,
                       uint64_t flags, struct needle_error *error) {
    fkv_cache_params params;
    fkv_cache_params_init(&params, sizeof params);
    params.flags = flags;
    *engine = (struct needle_engine){.model = model, .ctx = ctx, .now = engine->held};
    for (size_t i = 0; i < n_profiles; i++) {
        struct needle_held *held = &engine->held[engine->n_held++];
        held->sequence = -1;
        fkv_status status = fkv_cache_create(ctx, profiles[i], &params, &held->cache);
        status = status ? status : fkv_plan_create(held->cache, &held->plan);
        if (status) {
            int code = needle_fail_fkv(error, NEEDLE_FAILED, ctx, status, "cache");
            needle_engine_close(engine);
            return code;
        }
    }
    return NEEDLE_OK;
}

void needle_engine_close(struct needle_engine *engine) {
    for (size_t i = 0; i < engine->n_held; i++) {
        fkv_plan_destroy(engine->held[i].plan);
        fkv_cache_destroy(engine->held[i].cache);
    }
    free_activations(engine);
    *engine = (struct needle_engine){0};
}

int needle_engine_begin(struct needle_engine *engine, size_t index, int64_t period,
                        struct needle_error *error) {
    struct needle_held *held = &engine->held[index];
    fkv_status status = FKV_OK;
    if (held->sequence >= 0) {
        status = fkv_sequence_free(held->cache, held->sequence);
        held->sequence = -1;
    }
    fkv_sequence_params params;
    fkv_sequence_params_init(&params, sizeof params);
    params.period = period;
    status = status ? status : fkv_sequence_create(held->cache, &params, &held->sequence);
    return status ? needle_fail_fkv(error, NEEDLE_FAILED, engine->ctx, status, "sequence")
                  : NEEDLE_OK;
}

int needle_engine_branch(struct needle_engine *engine, fkv_sequence *whole,
                         struct needle_error *error) {
    fkv_sequence fork;
    fkv_status status = fkv_sequence_fork(engine->now->cache, engine->now->sequence, &fork);
    if (status) {
        return needle_fail_fkv(error, NEEDLE_FAILED, engine->ctx, status, "fork");
    }
    *whole = engine->now->sequence;
    engine->now->sequence = fork;
    return NEEDLE_OK;
}

void needle_engine_return(struct needle_engine *engine, fkv_sequence whole) {
    fkv_sequence_free(engine->now->cache, engine->now->sequence);
    engine->now->sequence = whole;
}
