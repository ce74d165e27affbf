/* SPDX-License-Identifier: Apache-2.0 */
#include "model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config.h"
#include "safetensors.h"

struct loader {
    struct needle_model *model;
    struct needle_weights *weights;
    const char *dir;
    struct needle_error *error;
};

/* Sizes were limited by config.c, so rows * cols cannot overflow. cols 0: a vector. */
static int load(struct loader *l, const char *name, int32_t rows, int32_t cols, float **out) {
    size_t count = (size_t)rows * (size_t)(cols ? cols : 1);
    *out = needle_alloc(count, sizeof **out);
    if (!*out) {
        return needle_fail(l->error, NEEDLE_FAILED, "%s: out of memory", l->dir);
    }
    l->model->parameters += count;
    return needle_weights_read(l->weights, name, (size_t)rows, (size_t)cols, *out, l->error);
}

static int load_layer_part(struct loader *l, int32_t layer, const char *part, int32_t rows,
                           int32_t cols, float **out) {
    char name[128];
    snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, part);
    return load(l, name, rows, cols, out);
}

static int load_layer(struct loader *l, int32_t i) {
    const struct needle_config *c = &l->model->config;
    struct needle_layer *y = &l->model->layers[i];
    const int32_t hidden = c->hidden_size, inner = c->intermediate_size;
    const int32_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    const struct {
        const char *name;
        int32_t rows, cols;
        float **out;
    } parts[] = {
        {"input_layernorm", hidden, 0, &y->input_norm},
        {"self_attn.q_proj", q, hidden, &y->q},
        {"self_attn.k_proj", kv, hidden, &y->k},
        {"self_attn.v_proj", kv, hidden, &y->v},
        {"self_attn.o_proj", hidden, q, &y->o},
        {"post_attention_layernorm", hidden, 0, &y->post_norm},
        {"mlp.gate_proj", inner, hidden, &y->gate},
        {"mlp.up_proj", inner, hidden, &y->up},
        {"mlp.down_proj", hidden, inner, &y->down},
    };
    for (size_t j = 0; j < sizeof parts / sizeof *parts; j++) {
        int code = load_layer_part(l, i, parts[j].name, parts[j].rows, parts[j].cols, parts[j].out);
        if (code) {
            return code;
        }
    }
    return NEEDLE_OK;
}

static bool may_be_unread(const char *name, const void *user) {
    /* Older files store the RoPE frequencies, which follow from config.json; some tied models store the
     * output projection a second time. */
    const struct needle_config *c = user;
    const char *suffix = strstr(name, ".rotary_emb.inv_freq");
    return (suffix && !strcmp(suffix, ".rotary_emb.inv_freq")) ||
           (c->tied && !strcmp(name, "lm_head.weight"));
}

static int load_weights(struct loader *l) {
    struct needle_model *m = l->model;
    const struct needle_config *c = &m->config;
    int code = load(l, "model.embed_tokens.weight", c->vocab_size, c->hidden_size, &m->embedding);
    for (int32_t i = 0; i < c->n_layers && !code; i++) {
        code = load_layer(l, i);
    }
    code = code ? code : load(l, "model.norm.weight", c->hidden_size, 0, &m->norm);
    if (c->tied) {
        m->head = m->embedding;
    } else if (!code) {
        code = load(l, "lm_head.weight", c->vocab_size, c->hidden_size, &m->head);
    }
    if (code) {
        return code;
    }
    const char *file;
    const char *name = needle_weights_unread(l->weights, may_be_unread, c, &file);
    return name ? needle_fail(l->error, NEEDLE_BAD_INPUT,
                              "%s: tensor %s does not belong to a model as in config.json", file,
                              name)
                : NEEDLE_OK;
}

static void fill_inv_freq(struct needle_model *m) {
    const double dim = m->config.head_dim;
    for (int32_t j = 0; j < m->config.head_dim / 2; j++) {
        m->inv_freq[j] = 1.0 / pow(m->config.rope_theta, 2.0 * j / dim);
    }
}

int needle_model_load(const char *dir, struct needle_model *model, struct needle_error *error) {
    *model = (struct needle_model){0};
    int code = needle_config_load(dir, &model->config, error);
    if (code) {
        return code;
    }
    struct loader l = {.model = model, .dir = dir, .error = error};
    model->layers = calloc((size_t)model->config.n_layers, sizeof *model->layers);
    model->inv_freq = needle_alloc((size_t)model->config.head_dim / 2, sizeof *model->inv_freq);
    if (!model->layers || !model->inv_freq) {
        code = needle_fail(error, NEEDLE_FAILED, "%s: out of memory", dir);
    } else {
        fill_inv_freq(model);
        code = needle_weights_open(dir, &l.weights, error);
        code = code ? code : load_weights(&l);
    }
    needle_weights_close(l.weights);
    if (code) {
        needle_model_free(model);
    }
    return code;
}

void needle_model_free(struct needle_model *model) {
    for (int32_t i = 0; model->layers && i < model->config.n_layers; i++) {
        struct needle_layer *y = &model->layers[i];
        float *parts[] = {y->input_norm, y->q,    y->k,  y->v,   y->o,
                          y->post_norm,  y->gate, y->up, y->down};
        for (size_t j = 0; j < sizeof parts / sizeof *parts; j++) {
            free(parts[j]);
        }
    }
    if (model->head != model->embedding) {
        free(model->head);
    }
    free(model->embedding);
    free(model->norm);
    free(model->layers);
    free(model->inv_freq);
    *model = (struct needle_model){0};
}

void needle_model_params(const struct needle_model *model, fkv_model_params *params) {
    const struct needle_config *c = &model->config;
    fkv_model_params_init(params, sizeof *params);
    params->n_layers = c->n_layers;
    params->n_q_heads = c->n_heads;
    params->n_kv_heads = c->n_kv_heads;
    params->head_dim = c->head_dim;
    params->rope_layout = FKV_ROPE_HALF_SPLIT;
    params->rope_dim = c->head_dim;
    params->inv_freq_count = c->head_dim / 2;
    params->inv_freq = model->inv_freq;
}
