/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The object behind fkv_plan: the rows of a step, the RoPE tables of its tokens, and the workspace that
 * every layer of the step uses again.
 *
 * Attention is cut into units: a block of up to FKV_UNIT_ROWS rows (a row being one query head of one query
 * token) that share the KV heads they read, and chunks of up to 16 tiles of tokens. A partial result of one
 * chunk is softmax-normalised to its own maximum; partials are merged in the order of the chunks. With few
 * units the chunks run in parallel, with many the units do: the arithmetic of a row is the same.
 */
#ifndef FKV_ATTEND_PLAN_H
#define FKV_ATTEND_PLAN_H

#include "backend.h"
#include "cache/cache.h"
#include "codec/rope.h"

#define FKV_UNIT_ROWS 32
/* Steps of more tokens, unless they are of many sequences, have no table of RoPE's sines. */
#define FKV_ROPE_TOKENS 2048
#define FKV_CHUNK_TILES 16
#define FKV_CHUNK_TOKENS (FKV_CHUNK_TILES * FKV_TILE)

/* One sequence of the step. */
struct fkv_row {
    int64_t id;
    struct fkv_seq *seq; /* found again by id in every call */
    uint64_t crops;      /* of the sequence when the plan was updated */
    int64_t base;        /* tokens held before the step */
    int64_t n_new;
    int64_t offset;     /* of its first token in the batch */
    int heads_per_unit; /* KV heads that share a unit */
    int64_t blocks;     /* row blocks of a KV head */
    int64_t first_unit;
    int64_t first_slot; /* of its blocks in the meter's work */
    /* set by each attend */
    int64_t n_chunks;
    int64_t first_item; /* of its (unit, head, chunk) items */
};

/* Sizes in floats, the same for all units of a plan. */
struct fkv_workspace {
    int64_t grid;     /* a row's grids of all segments */
    int64_t partial;  /* a chunk's result for the rows of one head */
    int64_t state;    /* a unit's */
    int64_t scratch;  /* a thread's */
    int64_t n_states; /* units, or threads */
    int64_t n_partials;
    bool by_chunk; /* chunks in parallel */
    float *states, *partials, *scratches;
    size_t bytes[3];
};

/* Where the middles of coded tiles turn the carriers: for each tile c[half], then s[half], for positions that are
 * index + shift. Made once and kept from step to step. */
struct fkv_turns {
    float *rows;
    int64_t tiles, slots;
    int64_t shift;
};
struct fkv_device_plan;
struct fkv_meter_work;

struct fkv_plan_object {
    _Atomic int busy;
    struct fkv_ctx *ctx;
    struct fkv_cache_object *cache;
    struct fkv_row *rows;
    struct fkv_coding_room *rooms;
    int64_t n_rows;
    int64_t tokens;
    int64_t units;
    /* [tokens][rope_dim / 2]; NULL for long steps, whose rows are made when they are needed */
    float *cos, *sin;
    /* [tokens]; of calibrated profiles, and where there is no table; else NULL */
    int32_t *positions;
    struct fkv_workspace work;
    struct fkv_turns turns;
    struct fkv_meter_work *meter; /* NULL if no block that the step can seal is to be measured */
    /* Selection: what the next update takes up, and longcache.h's part of the step; NULL without selection. */
    bool selecting;
    fkv_select_params select;
    struct fkv_longcache *longcache;
    struct fkv_device_plan *device; /* of the CUDA backend */
};

/* Rows of RoPE for tokens of the step: from its table, or made one after another. */
struct fkv_plan_rope {
    const struct fkv_plan_object *plan;
    struct fkv_rope_rows rows;
    int64_t token; /* whose row is in cos and sin; -1: none */
    float cos[FKV_MAX_PAIRS], sin[FKV_MAX_PAIRS];
};
static inline void fkv_plan_rope_begin(struct fkv_plan_rope *rope,
                                       const struct fkv_plan_object *plan) {
    rope->plan = plan;
    rope->token = -1;
    fkv_rope_begin(&rope->rows, plan->cache->profile);
}
/* Rotates one head vector of a token; nothing without RoPE. */
void fkv_plan_rotate(struct fkv_plan_rope *rope, int64_t token, float *x);

fkv_status fkv_plan_new(struct fkv_cache_object *cache, struct fkv_plan_object **out);
void fkv_plan_free(struct fkv_plan_object *plan);
fkv_status fkv_plan_set(struct fkv_plan_object *plan, const fkv_batch *batch);
/* Finds the sequences again and checks that each layer is before the step (*appended false) or after. */
fkv_status fkv_plan_check(struct fkv_plan_object *plan, int layer, bool appending, bool *appended);
/* append (q NULL) and append_attend; all views checked. */
fkv_status fkv_plan_append(struct fkv_plan_object *plan, int layer, const struct fkv_view *q,
                           const struct fkv_view *k, const struct fkv_view *v,
                           const struct fkv_view *out, const struct fkv_view *lse);
/* NONFINITE with the first bad index, unless the context lets such values pass. */
fkv_status fkv_plan_check_finite(struct fkv_plan_object *plan, const char *name,
                                 const struct fkv_view *x, int heads);

/* The CPU backend's operations: codec/store.c, codec/fourier.c, attend/attend.c. */
bool fkv_store(struct fkv_plan_object *plan, int layer, const struct fkv_view *k,
               const struct fkv_view *v);
void fkv_code(struct fkv_plan_object *plan, const struct fkv_row *row, int layer,
              const struct fkv_coding_room *room);
void fkv_attend_rows(struct fkv_plan_object *plan, int layer, const struct fkv_view *q,
                     const struct fkv_view *out, const struct fkv_view *lse);
/* Where a rotated or stored value first leaves the storage type's range, for the message. */
fkv_status fkv_store_report(struct fkv_plan_object *plan, const struct fkv_view *k,
                            const struct fkv_view *v);
/* Floats of scratch that coding takes per thread. */
int64_t fkv_code_scratch(int stride);
/* codec/residual.c: fkv_code() of calibrated profiles, and its scratch */
void fkv_code_blocks(struct fkv_plan_object *plan, const struct fkv_row *row, int layer,
                     const struct fkv_coding_room *room);
int64_t fkv_block_scratch(const struct fkv_profile_object *profile);
/* turns.c. Extends the table to all tiles that the rows of `next` can have coded during the step. */
fkv_status fkv_plan_set_turns(struct fkv_plan_object *plan, const struct fkv_plan_object *next);
void fkv_plan_free_turns(struct fkv_plan_object *plan);
/* The turn of a tile that begins at `position`: from the table, or made in own[2 * half]. */
const float *fkv_turn_at(const struct fkv_plan_object *plan, int64_t tile, int64_t position,
                         float *own);
/* The same for a coded tile of a layer; NULL if its positions are listed. */
const float *fkv_turn_of(const struct fkv_plan_object *plan, int layer_index,
                         const struct fkv_layer *layer, int64_t tile, float *own);

/* meter.c: measures the chosen blocks that a row seals. fkv_meter_set() makes room in the next step's plan;
 * fkv_meter_exact() comes before sealing, fkv_meter_coded() after, with the first block that was sealed. */
fkv_status fkv_meter_set(struct fkv_plan_object *plan);
void fkv_meter_free(struct fkv_plan_object *plan);
void fkv_meter_exact(struct fkv_plan_object *plan, const struct fkv_row *row, int layer,
                     const struct fkv_view *q, int64_t until);
void fkv_meter_coded(struct fkv_plan_object *plan, const struct fkv_row *row, int layer,
                     const struct fkv_view *q, int64_t first);

/* read.c: K or V of `count` tokens as attention sees them, restored in double. scratch: as many
 * bytes as fkv_read_scratch() says; NULL for exact profiles. */
size_t fkv_read_scratch(const struct fkv_seq *seq);
void fkv_read_tokens(const struct fkv_cache_object *cache, const struct fkv_seq *seq, int layer,
                     fkv_part part, int64_t first, int64_t count, const struct fkv_view *out,
                     double *scratch);

/* merge.c */
void fkv_merge_states(const struct fkv_view *out_a, const struct fkv_view *lse_a,
                      const struct fkv_view *out_b, const struct fkv_view *lse_b, int64_t tokens,
                      int64_t heads, int64_t dim);

#endif /* FKV_ATTEND_PLAN_H */
