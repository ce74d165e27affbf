/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the property tests share: a random configuration that shrinks when a property fails, a world (context,
 * profile, cache, plan) made from it whose allocator is counted, streams of random tokens, one call for a
 * step of the plan over all layers, and the comparison of its outputs with the oracle.
 */
#ifndef FKV_TESTS_PROPERTY_H
#define FKV_TESTS_PROPERTY_H

#include "fkv/fkv.h"

#include "oracle.h"
#include "random.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define LENGTH(a) ((int)(sizeof(a) / sizeof(a)[0]))
#define MAX_LAYERS 3
#define MAX_PARTS 64

/* ---- configurations */

struct config {
    uint64_t seed; /* of everything random in the world and its tokens */
    int layers, kv_heads, group, head_dim;
    fkv_rope_layout rope;
    int rope_dim;
    double rope_scaling, softmax_scale;
    fkv_dtype storage, in, out;
    fkv_cpu_level level;
    int threads;
    uint64_t flags;
    bool strided;   /* tensors with gaps, also [heads, tokens, D] */
    bool positions; /* other than the index */
    int64_t tokens;
    bool fourier;
    fkv_fourier_params params; /* of a Fourier profile; its storage type is `storage` */
    double coded[2]; /* share of coded channels of K and V; heads with none and all occur */
    bool calibrated;
    fkv_codec_params codec; /* of a calibrated profile; its storage type is `storage` */
    bool carriers;
    int bits; /* of all channels; -1: mixed, with heads of one kind among them */
};

/* The simplest one: f32, one layer, no RoPE, exact, one thread, best level. */
struct config config_plain(uint64_t seed);
/* Geometry, types, RoPE, tensors, level and threads drawn; exact. */
struct config config_draw(struct random *r);
/* Adds a Fourier coding in which `tokens` tokens pass several codings. */
void config_draw_fourier(struct random *r, struct config *c);
/* Adds a calibrated coding in which `tokens` tokens fill several blocks. */
void config_draw_calibrated(struct random *r, struct config *c);
/* Sinks and local tokens of either coding; 0 of an exact profile. */
int64_t config_sinks(const struct config *c);
int64_t config_local(const struct config *c);
/* Tokens of the coded middle once `tokens` are held. */
int64_t config_coded(const struct config *c, int64_t tokens);
/* The best level of this processor and build; levels begin at FKV_CPU_REFERENCE. */
fkv_cpu_level config_best_level(void);

/* Runs a property; if it fails, finds a smaller configuration that fails as well and reports that one. */
typedef void (*property_fn)(const struct config *c);
void property_run(const char *name, property_fn property, const struct config *c);
/* Ends the property that is running. */
_Noreturn void property_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            property_fail("line %d: %s", __LINE__, #condition);                                    \
    } while (0)
#define OK(call)                                                                                   \
    do {                                                                                           \
        fkv_status status_ = (call);                                                               \
        if (status_ != FKV_OK)                                                                     \
            property_fail("line %d: %s: %s", __LINE__, #call, fkv_status_string(status_));         \
    } while (0)

/* ---- worlds */

struct world {
    struct config config;
    struct random rng; /* for tensor layouts and the like */
    fkv_context *ctx;
    fkv_profile *profile;
    fkv_cache *cache;
    fkv_plan *plan;
    fkv_model_params model;
    double inv_freq[FKV_MAX_HEAD_DIM / 2];
    uint8_t *mask[2];  /* [layers][kv_heads][head_dim]: coded, or bits; NULL for an exact profile */
    float *carrier[2]; /* the same shape; NULL unless calibrated */
    int64_t live;      /* bytes the allocator has given out */
    int first_layer;   /* steps leave out those before it */
};

void world_open(struct world *w, const struct config *c);
/* Destroys everything and fails if the allocator has not got all its bytes back. */
void world_close(struct world *w);
fkv_sequence world_sequence(struct world *w);
bool world_coded(const struct world *w, int layer, fkv_part part, int kv_head, int channel);
fkv_stats world_stats(struct world *w, fkv_sequence sequence);

/* ---- tokens */

struct stream {
    int64_t n;
    int64_t *positions;
    float *q[MAX_LAYERS]; /* [n][q_heads][head_dim], values of the input type */
    float *k[MAX_LAYERS]; /* [n][kv_heads][head_dim] */
    float *v[MAX_LAYERS];
};

void stream_init(struct stream *s, const struct config *c, uint64_t seed, int64_t n);
void stream_free(struct stream *s);

/* ---- steps */

enum step_mode {
    STEP_FUSED,         /* fkv_append_attend() */
    STEP_APPEND,        /* append alone */
    STEP_APPEND_ATTEND, /* append, then attend */
    STEP_ATTEND         /* attend before appending: earlier tokens only */
};

/* Tokens first..first+count-1 of a stream, for one sequence. */
struct part {
    fkv_sequence sequence;
    const struct stream *stream;
    int64_t first, count;
};

/* Rows in batch order; out values of the output type, widened. */
struct outputs {
    int64_t rows;
    float *out[MAX_LAYERS]; /* [rows][q_heads][head_dim] */
    float *lse[MAX_LAYERS]; /* [rows][q_heads] */
};

/* All layers; o may be NULL (nothing kept). The first status that is not OK ends it; on such an error the
 * output tensors were left alone, or the property fails. */
fkv_status step_try(struct world *w, const struct part *parts, int count, enum step_mode mode,
                    struct outputs *o);
/* step_try() of one sequence, which must succeed */
void step_one(struct world *w, fkv_sequence sequence, const struct stream *s, int64_t first,
              int64_t count, enum step_mode mode, struct outputs *o);
void outputs_free(struct outputs *o);
/* Copies rows first.. of b into a, which begins empty and grows. */
void outputs_append(struct outputs *a, const struct outputs *b, const struct config *c);
void outputs_same(const struct outputs *a, int64_t a_row, const struct outputs *b, int64_t b_row,
                  int64_t rows, const struct config *c, const char *what);

/* Appends a stream in random pieces, or in one (pieces 0), or one by one (pieces 1). */
void feed(struct world *w, fkv_sequence sequence, const struct stream *s, int64_t pieces,
          enum step_mode mode, struct outputs *o);

/* ---- what is held, and the oracle's word on it */

struct held {
    int64_t n;
    double *k, *v; /* [n][kv_heads][head_dim] */
};

void held_read(struct held *h, struct world *w, fkv_sequence sequence, int layer, int64_t first,
               int64_t count);
void held_free(struct held *h);
/* Two sequences hold the same bits in all layers. */
void held_same(struct world *a, fkv_sequence x, struct world *b, fkv_sequence y, int64_t count);

/* Checks rows of a step: row i (token first + i of the stream) saw `past` held tokens, and with `causal` as
 * many more as i + 1. Rows are sampled, the first and last always. */
void check_attention(const struct world *w, int layer, const struct held *h, const struct stream *s,
                     int64_t first, int64_t count, int64_t past, bool causal,
                     const struct outputs *o, int64_t o_row);
/* Of the outputs checked so far, the share whose check meant something. */
double checks_that_count(void);

#endif /* FKV_TESTS_PROPERTY_H */
