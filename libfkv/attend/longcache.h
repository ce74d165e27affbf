/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Selection of what is attended to (docs/longcache.md), over keys that are held without their rotation.
 *
 * The queries of a step are cut into parties: up to `chunk` queries of one sequence that select together and see
 * the same view, each up to itself. A view is a list of pieces, each a stretch of one page whose tokens get
 * consecutive positions. Parties run in rounds, so that the workspace does not grow with the step. In a round:
 *   scan    units of (KV head, block of query heads, range of pages): the top k keys of each query head
 *   settle  with an index, each query head: the keys that are still open
 *   choose  each party: votes, spans, pieces
 *   attend  units of (KV head, block of query heads), chunks of up to 16 pieces, merged in order
 * Results depend on the parties, on no other of these cuts.
 */
#ifndef FKV_ATTEND_LONGCACHE_H
#define FKV_ATTEND_LONGCACHE_H

#include "attend/attend.h"
#include "profile/waves.h"

#define FKV_SCAN_ROWS 48    /* query heads of a scan unit */
#define FKV_CHUNK_PIECES 16 /* pieces whose scores go through one softmax */

/* Tokens first..end-1 of a sequence. */
struct fkv_run {
    int64_t first, end;
};

/* Slots from..end-1 of a page (-1: the sinks', else a body tile); slot t is at position `position` + t. */
struct fkv_piece {
    int64_t page;
    int64_t position;
    int from, end;
};

/* A key that a query head has among its best; index is the token's. */
struct fkv_pick {
    float score;
    int32_t index;
};

/* A key that may be among them: its score is between these. */
struct fkv_maybe {
    float lower, upper;
    int32_t index;
};

static inline int fkv_maybes_room(int top_k) {
    return 16 + 2 * top_k;
}

struct fkv_party {
    int64_t row;           /* of the plan */
    int64_t first;         /* its first query among the row's new tokens */
    int64_t count;         /* queries */
    int64_t tokens;        /* of the sequence, up to its last query */
    struct fkv_run middle; /* what is scanned; empty: everything is seen */
    bool last;             /* of its row */
    /* within its round */
    int64_t scan, scan_blocks, ranges; /* scan units: [head][block][range] */
    int64_t list;                      /* its first list of picks */
    int64_t unit, blocks;              /* units of attention: [head][block] */
    /* what was chosen */
    int64_t pieces, chunks, width;
    int64_t item; /* first (unit, chunk) */
};

struct fkv_round {
    int64_t first, count; /* parties */
    int64_t scans, units;
    int64_t rows; /* query heads of all its parties */
};

/* The last selection of a row, for fkv_plan_selection(). */
struct fkv_chosen {
    int64_t tokens, width, spans;
    struct fkv_run middle;
};

struct fkv_longcache {
    fkv_select_params params;
    int64_t parties_n, rounds_n, round_most; /* the most parties of a round */
    int64_t clip;                            /* most spans of any party */
    int64_t pieces_most, chunks_most, runs_most;
    int64_t votes, voters;           /* picks of a party, and votes for one key, at most */
    int64_t partial, state, scratch; /* floats */
    int64_t partials_n, states_n, lists_n, items_most;
    int64_t turns_n, ranges_most;
    bool by_chunk;
    int layer; /* of the last selection; -1: none */
    struct fkv_party *parties;
    struct fkv_round *rounds;
    struct fkv_piece *pieces; /* [round_most][pieces_most] */
    int32_t *chunks;          /* [round_most][chunks_most + 1]: first piece of each */
    float *turns; /* [round_most][pieces_most][2][pairs]: cos, sin of what turns queries back */
    struct fkv_run *runs;      /* [threads][runs_most] */
    struct fkv_pick *picks;    /* of a round, lists of top_k: [query head of the party][range] */
    struct fkv_maybe *maybes;  /* the same of fkv_maybes_room(); NULL: the cache has no index */
    int32_t *maybes_n;         /* in each list */
    uint32_t *sorting;         /* [threads][2 * votes + voters + 1] */
    struct fkv_chosen *chosen; /* [rows] */
    struct fkv_run *spans;     /* [rows][clip] */
    double *fine,
        *coarse; /* [64] and [turns_n] rows of (cos, sin): of t, and of 64 i + 31.5 - 64 */
    float *states, *partials, *scratches;
    size_t bytes; /* of the block that holds this struct and all arrays */
};

/* longcache.c: plan->longcache for the rows that are set; the last step's is used again where it serves. */
fkv_status fkv_longcache_set(struct fkv_plan_object *plan, const struct fkv_plan_object *last);
void fkv_longcache_attend(struct fkv_plan_object *plan, int layer, const struct fkv_view *q,
                          const struct fkv_view *out, const struct fkv_view *lse);
/* Most tokens of a view. */
int64_t fkv_select_scope(const fkv_select_params *params);

/* What the units of a layer share. */
struct fkv_longjob {
    struct fkv_plan_object *plan;
    const struct fkv_profile_object *profile;
    const struct fkv_kernels *kernels;
    struct fkv_longcache *lc;
    int layer;
    const struct fkv_view *q, *out, *lse;
    const struct fkv_round *round;
};

static inline const struct fkv_layer *fkv_party_layer(const struct fkv_longjob *job,
                                                      const struct fkv_party *party) {
    return &job->plan->rows[party->row].seq->layers[job->layer];
}
static inline int64_t fkv_page_first(const struct fkv_profile_object *p, int64_t page) {
    return page < 0 ? 0 : fkv_sinks(p) + page * FKV_TILE;
}
static inline int64_t fkv_page_of(const struct fkv_profile_object *p, int64_t token) {
    const int64_t sinks = fkv_sinks(p);
    return token < sinks ? -1 : (token - sinks) / FKV_TILE;
}

/* Where K or V of a page lies for one head. */
struct fkv_place {
    const char *exact; /* the exact channels of a coded tile, or all */
    const char *codes; /* NULL: all channels are exact */
    const uint16_t *scale, *zero;
    int64_t group; /* of the middle: where scales change; -1: an exact page */
};
struct fkv_place fkv_page_place(const struct fkv_longjob *job, const struct fkv_party *party,
                                int64_t page, int head, fkv_part part);

/* The sinks' keys as a tile [D][64], of the storage type, at `to`. */
const void *fkv_spread_sinks(const struct fkv_longjob *job, const struct fkv_place *place,
                             void *to);

/* Pool functions over a round's scan units (scan.c), over its query heads if there is an index (sift.c), and over its
 * parties (select.c). */
void fkv_scan_unit(void *arg, int64_t unit, int thread);
void fkv_settle_unit(void *arg, int64_t row, int thread);
void fkv_choose(void *arg, int64_t party, int thread);

/* view.c: attention of a round's units, each whole, or in three passes with chunks as items. */
void fkv_view_unit(void *arg, int64_t unit, int thread);
void fkv_view_begin(void *arg, int64_t unit, int thread);
void fkv_view_chunk(void *arg, int64_t item, int thread);
void fkv_view_end(void *arg, int64_t unit, int thread);

#endif /* FKV_ATTEND_LONGCACHE_H */
