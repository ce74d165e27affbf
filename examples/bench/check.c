/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention in float64 over the keys and values that a set holds, so that what is left to differ is the
 * arithmetic of the library and not the coding.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { CHECKED_HEADS = 3, READ_TOKENS = 4096 };

/* One query head against one sequence. */
struct row {
    int head;
    double q[FKV_MAX_HEAD_DIM];
    double out[FKV_MAX_HEAD_DIM];
    double *weights; /* scores, then softmax weights */
    double max_score, max_value;
};

/* What a sequence's query sees: every token's position, or -1. */
struct view {
    int64_t tokens, query;
    int64_t *position;
};

static struct view view_of(const struct bench_variant *v, int32_t index) {
    struct view view = {v->tokens, v->tokens, NULL};
    fkv_selection s = {.struct_size = sizeof(s)};
    fkv_select_params select;
    if (!v->model->select) {
        view.position = bench_alloc((size_t)view.tokens, sizeof(int64_t));
        for (int64_t t = 0; t < view.tokens; t++)
            view.position[t] = t;
        return view;
    }
    fkv_select_params_init(&select, sizeof(select));
    int64_t *spans = bench_alloc(2 * (size_t)select.clip, sizeof(*spans)), at = 0;
    bench_check(v->ctx, fkv_plan_selection(v->plan, index, &s, spans, 2 * (size_t)select.clip),
                "selection");
    view = (struct view){s.tokens, s.view - 1, bench_alloc((size_t)s.tokens, sizeof(int64_t))};
    for (int64_t t = 0, i = 0; t < s.tokens; t++) {
        while (i < s.spans && t >= spans[2 * i + 1])
            i++;
        bool seen = t < s.middle_first || t >= s.middle_end || (i < s.spans && t >= spans[2 * i]);
        view.position[t] = seen ? at++ : -1;
    }
    free(spans);
    return view;
}

/* x, turned on by `position` */
static void rotate(const struct bench_model *model, const float *q, int64_t position, double *x) {
    int half = model->rope_dim / 2;
    bool split = model->rope_layout == FKV_ROPE_HALF_SPLIT;
    for (int d = 0; d < model->dim; d++)
        x[d] = (double)q[d];
    for (int j = 0; j < half; j++) {
        int a = split ? j : 2 * j, b = split ? j + half : 2 * j + 1;
        double angle = (double)position * model->inv_freq[j], xa = x[a], xb = x[b];
        x[a] = xa * cos(angle) - xb * sin(angle);
        x[b] = xb * cos(angle) + xa * sin(angle);
    }
}

/* Reads `count` tokens of K or V, [count][hk][dim]. */
static void read_part(const struct bench_variant *v, fkv_sequence sequence, int64_t first,
                      int64_t count, fkv_part part, float *x) {
    int64_t shape[3] = {count, v->model->hk, v->model->dim};
    fkv_tensor t;
    fkv_tensor_init(&t, x, FKV_DTYPE_F32, 3, shape);
    bench_check(v->ctx,
                fkv_sequence_read(v->cache, sequence, 0, first, count,
                                  part == FKV_PART_K ? &t : NULL, part == FKV_PART_K ? NULL : &t),
                "reading a sequence");
}

static void add_scores(const struct bench_model *model, struct row *row, const struct view *view,
                       const float *k, int64_t first, int64_t count) {
    int kv_head = row->head / (model->hq / model->hk);
    for (int64_t t = 0; t < count; t++) {
        const float *x = k + ((size_t)t * (size_t)model->hk + (size_t)kv_head) * (size_t)model->dim;
        double s = 0, turned[FKV_MAX_HEAD_DIM];
        row->weights[first + t] = -INFINITY;
        if (view->position[first + t] < 0)
            continue;
        rotate(model, x, view->position[first + t] - (first + t), turned);
        for (int d = 0; d < model->dim; d++)
            s += row->q[d] * turned[d];
        row->weights[first + t] = s * model->scale;
        row->max_score = fmax(row->max_score, fabs(s * model->scale));
    }
}

static void softmax(struct row *row, int64_t tokens) {
    double max = -INFINITY, sum = 0;
    for (int64_t t = 0; t < tokens; t++)
        max = fmax(max, row->weights[t]);
    for (int64_t t = 0; t < tokens; t++)
        sum += row->weights[t] = exp(row->weights[t] - max);
    for (int64_t t = 0; t < tokens; t++)
        row->weights[t] /= sum;
}

static void add_values(const struct bench_model *model, struct row *row, const struct view *view,
                       const float *value, int64_t first, int64_t count) {
    int kv_head = row->head / (model->hq / model->hk);
    for (int64_t t = 0; t < count; t++) {
        if (view->position[first + t] < 0)
            continue;
        const float *x =
            value + ((size_t)t * (size_t)model->hk + (size_t)kv_head) * (size_t)model->dim;
        for (int d = 0; d < model->dim; d++) {
            row->out[d] += row->weights[first + t] * (double)x[d];
            row->max_value = fmax(row->max_value, fabs((double)x[d]));
        }
    }
}

static void compare(struct bench_variant *v, const struct row *row, const float *out) {
    for (int d = 0; d < v->model->dim; d++) {
        double error = fabs((double)out[d] - row->out[d]);
        /* fmax() passes over NaN */
        v->max_error = fmax(v->max_error, isnan(error) ? INFINITY : error);
        v->max_output = fmax(v->max_output, fabs(row->out[d]));
    }
    v->tolerance = fmax(v->tolerance, 16 * 0x1p-23 * (1 + row->max_score) * row->max_value);
}

static void check_sequence(struct bench_variant *v, int32_t index, fkv_sequence sequence,
                           const float *q, const float *out) {
    const struct bench_model *model = v->model;
    size_t dim = (size_t)model->dim, chunk = (size_t)READ_TOKENS * (size_t)model->hk * dim;
    float *x = bench_alloc(chunk, sizeof(float));
    struct row *rows = bench_alloc(CHECKED_HEADS, sizeof(*rows));
    struct view view = view_of(v, index);

    for (int i = 0; i < CHECKED_HEADS; i++) {
        rows[i].head = (model->hq - 1) * i / (CHECKED_HEADS - 1);
        rows[i].weights = bench_alloc((size_t)view.tokens, sizeof(double));
        rotate(model, q + (size_t)rows[i].head * dim, view.query, rows[i].q);
    }
    for (int part = FKV_PART_K; part <= FKV_PART_V; part++) {
        for (int64_t first = 0; first < view.tokens; first += READ_TOKENS) {
            int64_t n = view.tokens - first < READ_TOKENS ? view.tokens - first : READ_TOKENS;
            read_part(v, sequence, first, n, part, x);
            for (int i = 0; i < CHECKED_HEADS; i++)
                (part == FKV_PART_K ? add_scores : add_values)(model, &rows[i], &view, x, first, n);
        }
        for (int i = 0; i < CHECKED_HEADS && part == FKV_PART_K; i++)
            softmax(&rows[i], view.tokens);
    }
    for (int i = 0; i < CHECKED_HEADS; i++) {
        compare(v, &rows[i], out + (size_t)rows[i].head * dim);
        free(rows[i].weights);
    }
    free(view.position);
    free(rows);
    free(x);
}

void bench_variant_check(struct bench_variant *v, int set, struct bench_random *r) {
    size_t row = (size_t)v->model->hq * (size_t)v->model->dim, count = (size_t)v->batch * row;
    float *q = bench_alloc(count, sizeof(float)), *out = bench_alloc(count, sizeof(float));
    const fkv_sequence *sequences = v->sequences + (size_t)set * (size_t)v->batch;
    double ignored = 0;

    bench_random_fill(r, q, count);
    bench_variant_attend(v, set, q, out, &ignored, &ignored);
    check_sequence(v, 0, sequences[0], q, out);
    if (v->batch > 1)
        check_sequence(v, v->batch - 1, sequences[v->batch - 1], q + count - row,
                       out + count - row);
    free(q);
    free(out);
}
