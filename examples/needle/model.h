/* SPDX-License-Identifier: Apache-2.0 */
/* A LLaMA-architecture model: config.json and weights, all in f32. */
#ifndef NEEDLE_MODEL_H
#define NEEDLE_MODEL_H

#include "common.h"

struct needle_config {
    int32_t vocab_size;
    int32_t hidden_size;
    int32_t n_layers;
    int32_t n_heads;
    int32_t n_kv_heads;
    int32_t head_dim;
    int32_t intermediate_size;
    int32_t trained_window; /* max_position_embeddings; 0 if not stated */
    double rope_theta;
    double rms_norm_eps;
    bool tied; /* the embedding is also the output projection */
};

/* Matrices are [out, in], row-major: y = W x. */
struct needle_layer {
    float *input_norm;
    float *q;
    float *k;
    float *v;
    float *o;
    float *post_norm;
    float *gate;
    float *up;
    float *down;
};

struct needle_model {
    struct needle_config config;
    float *embedding; /* [vocab, hidden] */
    float *head;      /* [vocab, hidden]; == embedding if tied */
    float *norm;
    struct needle_layer *layers;
    double *inv_freq; /* [head_dim / 2] */
    size_t parameters;
};

/*
 * Loads a folder with config.json and safetensors. Everything is checked; what this program cannot
 * compute (another architecture, biases, scaled RoPE, a vocabulary that is not bytes) is
 * NEEDLE_BAD_INPUT with the file and the reason. Freed with needle_model_free().
 */
int needle_model_load(const char *dir, struct needle_model *model, struct needle_error *error);
void needle_model_free(struct needle_model *model);

/* The model's geometry for libfkv; borrows model->inv_freq. */
void needle_model_params(const struct needle_model *model, fkv_model_params *params);

#endif
