/* SPDX-License-Identifier: Apache-2.0 */
/* What is at hand while attention runs: a job, a unit of it, a chunk of a unit. attend.c makes them; coded.c computes
 * on chunks of calibrated profiles. */
#ifndef FKV_ATTEND_UNIT_H
#define FKV_ATTEND_UNIT_H

#include "attend/attend.h"

/* A unit's rows: `rows` of each of n_heads KV heads; row r is query r / G, query head r % G of its group. */
struct fkv_unit {
    const struct fkv_row *row;
    int head, n_heads;
    int64_t first_row;
    int rows;
    int dim_stride;  /* of q, permuted and o */
    float *q;        /* [n_heads][rows][dim]: rotated and scaled */
    float *permuted; /* the same, kept channels first */
    float *o;
    float *max, *sum; /* [n_heads][rows] */
    float *grid;      /* [segment][n_heads * rows][grid_stride]: scores of the coded channels */
    float *mass;      /* the same shape: weights of the tokens, spread */
    int64_t grid_stride;
    float *weights; /* calibrated: [n_heads][rows][weight_stride]: a[half], b[half], the constant */
    int weight_stride;
};

struct fkv_partial {
    float *max, *sum, *o, *mass; /* o: [rows][dim]; mass: [rows][mass_stride] */
    int64_t mass_stride;
};

struct fkv_job {
    struct fkv_plan_object *plan;
    const struct fkv_profile_object *profile;
    const struct fkv_kernels *kernels;
    int layer;
    const struct fkv_view *q, *out, *lse;
};

static inline const struct fkv_layer *fkv_layer_of(const struct fkv_job *job,
                                                   const struct fkv_unit *u) {
    return &u->row->seq->layers[job->layer];
}

struct fkv_chunk_job {
    const struct fkv_job *job;
    const struct fkv_unit *u;
    int h;
    struct fkv_chunk chunk;
    int visible[FKV_UNIT_ROWS]; /* tokens of the chunk that each row sees */
    int most;
    float *scores; /* [rows][FKV_CHUNK_TOKENS] */
    float *kept;   /* [rows][dim]: output of the kept, or exact and quantised, channels */
    float *tile;   /* [D][64]: sinks as a tile, in the storage type; unrotated keys turned */
    /* calibrated: */
    float *folded; /* [rows][dim]: q * scale of the quantised channels */
    float *base;   /* [rows] */
    float *turned; /* [rows][weight_stride] */
    float *turn;   /* a tile's own, [2 * half] */
    float *waves;  /* [2 * half][64] */
    int64_t group; /* whose scales are folded in; -1: none */
};

/* attend.c. Cuts fkv_state_floats() floats into the arrays of a unit; grid: floats of a row's grids. */
void fkv_unit_carve(const struct fkv_job *job, struct fkv_unit *u, float *floats, int64_t grid);
/* Makes row r of KV head h: the query, rotated and scaled. */
void fkv_load_query(const struct fkv_job *job, const struct fkv_unit *u, int h, int r,
                    struct fkv_plan_rope *rope);
/* The chunk's result for one head; false if no row sees any of it. */
bool fkv_attend_chunk(const struct fkv_job *job, const struct fkv_unit *u, int h,
                      const struct fkv_chunk *chunk, int thread, const struct fkv_partial *to);
/* meter.c: the output of a query head of a new token of a row, for the meter to keep if it needs it. */
void fkv_meter_whole(const struct fkv_job *job, const struct fkv_row *row, int64_t new_token,
                     int head, const float *o, float lse);

/* Keys of the sinks, of the chunk's head, as a tile in c->tile. */
const void *fkv_sink_tile(const struct fkv_chunk_job *c);

/* coded.c: what calibrated profiles do otherwise. A query, once rotated and scaled: its channels in the order of
 * the blocks, and its weights on the carriers' waves. */
void fkv_coded_query(const struct fkv_job *job, const struct fkv_unit *u, int h, int r);
/* Cuts the scratch behind c->kept. */
void fkv_coded_scratch(struct fkv_chunk_job *c, float *floats);
/* Whether the tiles of a chunk need fkv_coded_score() for their scores. */
bool fkv_coded_scores(const struct fkv_job *job, const struct fkv_chunk *chunk);
void fkv_coded_score(struct fkv_chunk_job *c, int tile);
/* The weighted sum of rows that see the same `tokens` of a tile, into c->kept. */
void fkv_coded_weigh(const struct fkv_chunk_job *c, int tile, int first, int rows, int tokens);
/* Puts c->kept and the carriers into the partial result. */
void fkv_coded_finish(const struct fkv_chunk_job *c, const struct fkv_partial *to);

#endif /* FKV_ATTEND_UNIT_H */
