/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A small model with profile and cache, deterministic tensors, and an allocator that counts, checks and
 * fails on demand. Values depend on (stream, layer, token, head, channel) only, so a test may feed the
 * same sequence in any pieces.
 */
#ifndef FKV_TESTS_FIXTURE_H
#define FKV_TESTS_FIXTURE_H

#include "fkv/fkv.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- allocator: new memory is filled with 0xff, which is NaN in every element type */

struct heap {
    _Atomic int64_t blocks, bytes; /* living */
    _Atomic int64_t calls;         /* of alloc, since heap_fail() */
    _Atomic int64_t mismatches;    /* frees with another size than was asked for */
    _Atomic int64_t fail_at;       /* number of the call that gets NULL; 0: none */
    _Atomic bool forever;          /* and every one after it */
    /* called for every allocation if not NULL */
    void (*watch)(void *user);
    void *watch_user;
};

void *heap_alloc(void *user, size_t bytes, size_t alignment);
void heap_free(void *user, void *pointer, size_t bytes);
void heap_fail(struct heap *heap, int64_t fail_at, bool forever);
/* Whether the call named by heap_fail() has come. */
bool heap_failed(const struct heap *heap);

/* ---- model, profile, cache */

struct options {
    int layers, q_heads, kv_heads, dim; /* 0: 2, 4, 2, 16 */
    bool exact;                         /* else Fourier, every third channel kept */
    bool authors;                       /* the published restoration */
    bool calibrated;                    /* bits of 0 to 16 and carriers, blocks of 64 */
    fkv_dtype storage;                  /* 0: F16 */
    int bins, n_sink, n_local;          /* 0: 16, 4, 32; n_sink < 0 for none */
    int64_t period;                     /* 0: 512 */
    int64_t min_middle;                 /* 0: the library's default */
    int threads;                        /* 0: 1 */
    fkv_cpu_level level;
    uint64_t flags, max_bytes, cache_bytes, cache_tokens;
    struct heap *heap; /* NULL: the library's */
};

#define FIXTURE_MAX_PAIRS 32

struct fixture {
    struct options options; /* resolved */
    fkv_model_params model;
    double inv_freq[FIXTURE_MAX_PAIRS];
    fkv_context *ctx;
    fkv_profile *profile;
    fkv_cache *cache;
};

/* Every step that can fail returns its status and leaves *f to fixture_close(), which allows NULLs. */
fkv_status fixture_try(struct fixture *f, const struct options *options);
/* The same, for tests that need it to succeed. options may be NULL. */
void fixture_open(struct fixture *f, const struct options *options);
void fixture_close(struct fixture *f);
fkv_status fixture_profile(struct fixture *f, fkv_profile **out);
void fixture_model(struct fixture *f, const struct options *options);

/* ---- tensors and steps */

/* x[tokens][heads][dim] in [-1, 1), plus a slow wave per channel. kind: 'q', 'k' or 'v'. */
void fixture_values(float *x, int64_t first, int64_t tokens, int heads, int dim, uint64_t stream,
                    int layer, int kind);
fkv_tensor fixture_tensor(void *data, fkv_dtype dtype, int64_t tokens, int64_t heads, int64_t dim);
fkv_tensor fixture_lse(void *data, int64_t tokens, int64_t heads);

/* Every way in which a tensor description can be wrong, and what that is. The tensor is f32 with at least
 * two tokens and two heads. */
struct damage {
    const char *name;
    fkv_status status;
    void (*apply)(fkv_tensor *tensor);
};
extern const struct damage fixture_damages[];
extern const int fixture_n_damages;

struct stream {
    fkv_sequence id;
    uint64_t number; /* of its values */
    int64_t length;
};

/* Floats of one tensor of `tokens` tokens with Hq heads. */
size_t fixture_q_floats(const struct fixture *f, int64_t tokens);
/* A step of one sequence: `tokens` new ones through append_attend() in all layers. out, [layers][tokens]
 * [Hq][D], and lse, [layers][tokens][Hq], may be NULL. On success the stream is longer. */
fkv_status fixture_step(struct fixture *f, fkv_plan *plan, struct stream *s, int64_t tokens,
                        float *out, float *lse);
/* One layer of a step that fkv_plan_update() has set. */
fkv_status fixture_layer(struct fixture *f, fkv_plan *plan, const struct stream *s, int64_t tokens,
                         int layer, float *out, float *lse);
fkv_status fixture_update(fkv_plan *plan, fkv_sequence id, int64_t tokens);
/* A new sequence of `tokens` tokens, made with a plan of its own. */
struct stream fixture_stream(struct fixture *f, uint64_t number, int64_t tokens);
/* Hash of all that a sequence holds (lengths, read-back of every layer, stats). */
uint64_t fixture_digest(struct fixture *f, fkv_sequence id);
uint64_t fixture_hash(uint64_t hash, const void *data, size_t bytes);
/* The text of the context's last error. */
const char *fixture_message(struct fixture *f);

#endif /* FKV_TESTS_FIXTURE_H */
