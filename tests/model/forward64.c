/* SPDX-License-Identifier: Apache-2.0 */
#include "forward64.h"

#include <math.h>
#include <stdlib.h>

/* y = W x, W [out, in]. Four sums, as a single chain of additions would take minutes. */
static void mat_vec(const float *w, const double *x, size_t out, size_t in, double *y) {
    for (size_t o = 0; o < out; o++, w += in) {
        double sum[4] = {0, 0, 0, 0};
        for (size_t i = 0; i < in; i++) {
            sum[i % 4] += (double)w[i] * x[i];
        }
        y[o] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
}

static void norm(const double *x, const float *weight, size_t n, double eps, double *y) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += x[i] * x[i];
    }
    for (size_t i = 0; i < n; i++) {
        y[i] = x[i] / sqrt(sum / (double)n + eps) * (double)weight[i];
    }
}

/* Channel j with j + D/2, by t * theta^(-2j/D). */
static void rotate(double *x, size_t heads, size_t dim, double theta, size_t t) {
    for (size_t h = 0; h < heads; h++, x += dim) {
        for (size_t j = 0; j < dim / 2; j++) {
            const double angle = (double)t * pow(theta, -2.0 * (double)j / (double)dim);
            const double a = x[j], b = x[j + dim / 2];
            x[j] = a * cos(angle) - b * sin(angle);
            x[j + dim / 2] = a * sin(angle) + b * cos(angle);
        }
    }
}

struct state {
    const struct needle_config *c;
    size_t hidden, inner, q_size, kv_size, dim;
    double *x;      /* [n, hidden] */
    double *k, *v;  /* [n, kv_size], of one layer */
    double *scores; /* [n] */
    double *normed, *q, *mixed, *added, *gate, *up;
};

/* Attention of token t over tokens 0..t. */
static void attend(const struct state *s, size_t t) {
    const size_t group = s->q_size / s->kv_size;
    for (size_t h = 0; h < s->q_size / s->dim; h++) {
        const double *q = s->q + h * s->dim;
        const size_t at = h / group * s->dim;
        double top = -INFINITY, sum = 0;
        for (size_t u = 0; u <= t; u++) {
            double dot = 0;
            for (size_t d = 0; d < s->dim; d++) {
                dot += q[d] * s->k[u * s->kv_size + at + d];
            }
            s->scores[u] = dot / sqrt((double)s->dim);
            top = fmax(top, s->scores[u]);
        }
        for (size_t u = 0; u <= t; u++) {
            s->scores[u] = exp(s->scores[u] - top);
            sum += s->scores[u];
        }
        for (size_t d = 0; d < s->dim; d++) {
            double mixed = 0;
            for (size_t u = 0; u <= t; u++) {
                mixed += s->scores[u] / sum * s->v[u * s->kv_size + at + d];
            }
            s->mixed[h * s->dim + d] = mixed;
        }
    }
}

static void layer64(const struct state *s, const struct needle_layer *y, size_t n) {
    for (size_t t = 0; t < n; t++) {
        double *x = s->x + t * s->hidden;
        double *k = s->k + t * s->kv_size;
        norm(x, y->input_norm, s->hidden, s->c->rms_norm_eps, s->normed);
        mat_vec(y->q, s->normed, s->q_size, s->hidden, s->q);
        mat_vec(y->k, s->normed, s->kv_size, s->hidden, k);
        mat_vec(y->v, s->normed, s->kv_size, s->hidden, s->v + t * s->kv_size);
        rotate(s->q, s->q_size / s->dim, s->dim, s->c->rope_theta, t);
        rotate(k, s->kv_size / s->dim, s->dim, s->c->rope_theta, t);
        attend(s, t);
        mat_vec(y->o, s->mixed, s->hidden, s->q_size, s->added);
        for (size_t i = 0; i < s->hidden; i++) {
            x[i] += s->added[i];
        }
        norm(x, y->post_norm, s->hidden, s->c->rms_norm_eps, s->normed);
        mat_vec(y->gate, s->normed, s->inner, s->hidden, s->gate);
        mat_vec(y->up, s->normed, s->inner, s->hidden, s->up);
        for (size_t i = 0; i < s->inner; i++) {
            s->gate[i] *= s->up[i] / (1 + exp(-s->gate[i]));
        }
        mat_vec(y->down, s->gate, s->hidden, s->inner, s->added);
        for (size_t i = 0; i < s->hidden; i++) {
            x[i] += s->added[i];
        }
    }
}

static void run(const struct state *s, const struct needle_model *model, const uint8_t *tokens,
                size_t n, double *logits) {
    const size_t vocab = (size_t)s->c->vocab_size;
    for (size_t t = 0; t < n; t++) {
        for (size_t i = 0; i < s->hidden; i++) {
            s->x[t * s->hidden + i] = (double)model->embedding[tokens[t] * s->hidden + i];
        }
    }
    for (int32_t l = 0; l < s->c->n_layers; l++) {
        layer64(s, &model->layers[l], n);
    }
    for (size_t t = 0; t < n; t++) {
        norm(s->x + t * s->hidden, model->norm, s->hidden, s->c->rms_norm_eps, s->normed);
        mat_vec(model->head, s->normed, vocab, s->hidden, logits + t * vocab);
    }
}

bool forward64(const struct needle_model *model, const uint8_t *tokens, size_t n, double *logits) {
    const struct needle_config *c = &model->config;
    struct state s = {.c = c,
                      .hidden = (size_t)c->hidden_size,
                      .inner = (size_t)c->intermediate_size,
                      .q_size = (size_t)(c->n_heads * c->head_dim),
                      .kv_size = (size_t)(c->n_kv_heads * c->head_dim),
                      .dim = (size_t)c->head_dim};
    const size_t total =
        n * (s.hidden + 2 * s.kv_size + 1) + 2 * s.hidden + 2 * s.q_size + 2 * s.inner;
    double *memory = malloc(total * sizeof *memory);
    if (!memory) {
        return false;
    }
    s.x = memory;
    s.k = s.x + n * s.hidden;
    s.v = s.k + n * s.kv_size;
    s.scores = s.v + n * s.kv_size;
    s.normed = s.scores + n;
    s.added = s.normed + s.hidden;
    s.q = s.added + s.hidden;
    s.mixed = s.q + s.q_size;
    s.gate = s.mixed + s.q_size;
    s.up = s.gate + s.inner;
    run(&s, model, tokens, n, logits);
    free(memory);
    return true;
}
