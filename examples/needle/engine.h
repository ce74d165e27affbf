/* SPDX-License-Identifier: Apache-2.0 */
/* The forward pass: everything but attention is here, attention and the cache are libfkv's. */
#ifndef NEEDLE_ENGINE_H
#define NEEDLE_ENGINE_H

#include "model.h"
#include "progress.h"

#define NEEDLE_MAX_PROFILES 32

/* One way to hold what was read. */
struct needle_held {
    fkv_cache *cache;
    fkv_plan *plan;
    fkv_sequence sequence; /* -1: none */
};

struct needle_engine {
    const struct needle_model *model;
    fkv_context *ctx;
    /* The first one attends while a context is read, the others take the same keys and values. */
    struct needle_held held[NEEDLE_MAX_PROFILES];
    size_t n_held;
    struct needle_held *now; /* of these, the one that answers */
    /* If set, every forward pass is observed: give it one prompt whole, on an empty sequence. */
    fkv_calibrator *calibrator;
    /* May be NULL; needle_engine_units() steps are made for each forward pass. */
    struct needle_progress *progress;
    /* Activations of `capacity` tokens, grown when needed. */
    size_t capacity;
    float *x;
    float *q;
    float *k;
    float *v;
    float *attention;
    /* Activations of one block of rows. */
    float *normed;
    float *gate;
    float *up;
};

/* Threads of the matrix products; 0 leaves the BLAS library's choice. */
void needle_engine_threads(int32_t threads);

/* flags: of fkv_cache_params */
int needle_engine_open(struct needle_engine *engine, const struct needle_model *model,
                       fkv_context *ctx, fkv_profile *const *profiles, size_t n_profiles,
                       uint64_t flags, struct needle_error *error);
void needle_engine_close(struct needle_engine *engine);

/*
 * Frees the sequence that `index` holds, if there is one, and begins an empty one; `period` as in
 * fkv_sequence_params.
 */
int needle_engine_begin(struct needle_engine *engine, size_t index, int64_t period,
                        struct needle_error *error);

/* Goes on with a fork of the sequence, which is left in *whole; needle_engine_return() frees the fork. */
int needle_engine_branch(struct needle_engine *engine, fkv_sequence *whole,
                         struct needle_error *error);
void needle_engine_return(struct needle_engine *engine, fkv_sequence whole);

/*
 * Appends n tokens to the sequence in one step. `logits` gets [n_logits, vocab] of the last n_logits
 * tokens. After an error the sequence can only be freed.
 */
int needle_engine_forward(struct needle_engine *engine, const uint8_t *tokens, size_t n,
                          size_t n_logits, float *logits, struct needle_error *error);
/* The same without logits, for all that hold, in steps of `chunk` tokens; 0: all in one. */
int needle_engine_prefill(struct needle_engine *engine, const uint8_t *tokens, size_t n,
                          size_t chunk, struct needle_error *error);
/* Progress steps of needle_engine_prefill(). */
uint64_t needle_engine_units(const struct needle_engine *engine, size_t n, size_t chunk);

#endif
