/* SPDX-License-Identifier: Apache-2.0 */
/* A unit of the search for the best keys: up to 48 query heads of one KV head, over a range of pages. */
#ifndef FKV_ATTEND_SCAN_H
#define FKV_ATTEND_SCAN_H

#include "attend/longcache.h"
#include "cache/index.h"

/* Where the indices of a layer's head are: page i below `end` has one, tile i & mask in that of its block. */
struct fkv_indices {
    int64_t end, mask;
    void *const *blocks;
    /* bytes before an index, of its head, of the coarse half of a tile */
    size_t from, head, coarse;
    int octets;
};

/* A page that was sifted, and what is open in it: looked at after the next page, when its data have come. */
struct fkv_opened {
    const uint8_t *coarse, *fine;
    int64_t first; /* its first token */
    const float *y, *middle, *off;
    uint64_t bits[FKV_SCAN_ROWS];
    bool any;
};

struct fkv_scan {
    const struct fkv_longjob *job;
    const struct fkv_party *party;
    int head, rows;
    int64_t first_row, range;
    int stride;
    float *q;        /* [rows][stride] */
    float *permuted; /* the same as coded tiles hold their channels */
    float *folded;   /* permuted, times the scales of a group */
    float *scores;   /* [rows][64] */
    float *tile;     /* [D][64]: a tile's keys as f32, when many rows read them */
    float base[FKV_SCAN_ROWS], constant[FKV_SCAN_ROWS];
    /* What is not over it is not among a row's best; -infinity: not known. */
    float limit[FKV_SCAN_ROWS];
    int held[FKV_SCAN_ROWS];
    int64_t group;
    /* With an index; see sift.c. y, middle and off are of two blocks in turns, `side` being the one at hand. */
    bool sifting;
    int side;
    const char *block[2];           /* whose scales are folded in */
    float *y[2];                    /* [rows][stride] */
    int8_t *z;                      /* [rows][stride] */
    float *lows;                    /* [rows][top_k]: the greatest lower bounds, descending */
    int lows_n[FKV_SCAN_ROWS];      /* of each row */
    float least[FKV_SCAN_ROWS];     /* what is less is not among a row's best */
    float norm[FKV_SCAN_ROWS];      /* bounds of the lengths of q */
    float middle[2][FKV_SCAN_ROWS]; /* sum of q * centre */
    float off[2][FKV_SCAN_ROWS];    /* how far fine scores may be off */
    struct fkv_sift sift[FKV_SCAN_ROWS];
    struct fkv_opened opened;
    struct fkv_indices indices;
    int64_t sifted, scored; /* rows of pages that were sifted, and that were scored all the same */
};

/* scan.c */
struct fkv_scan fkv_scan_at(const struct fkv_longjob *job, int64_t unit, int thread);
/* Where the lists of a row, counted from the unit's first, lie in lc->picks and lc->maybes. */
int64_t fkv_scan_list(const struct fkv_scan *s, int r);
/* Takes a key into a row's list, if it is good enough. */
void fkv_scan_add(struct fkv_scan *s, int r, float score, int64_t index);
/* All scores of an exact page, the slots in `mask` of which are candidates; its first token is `first`. */
void fkv_scan_exact(struct fkv_scan *s, const struct fkv_place *place, bool sinks, const void *next,
                    int64_t first, uint64_t mask);
/* Into a list in descending order, of equal scores the lower token first. Returns the number held. */
int fkv_pick_insert(struct fkv_pick *list, int held, int room, struct fkv_pick pick);

/* sift.c */
/* Rows of queries in terms of a block's index: a key's score is no more than step * i + (norm * bound + base) of
 * the coarse codes, and within `off` of middle + the refined sum. At most FKV_SCAN_ROWS. */
struct fkv_sift_rows {
    int rows;
    ptrdiff_t stride;
    const float *q, *norm; /* in: [rows][stride] and [rows], of fkv_sift_norm() */
    float *y;
    int8_t *z;
    struct fkv_sift *sift;
    float *middle, *off;
};
float fkv_sift_norm(const float *q, int dims);
void fkv_sift_fold(const struct fkv_kernels *kernels, const struct fkv_index *x,
                   const struct fkv_sift_rows *to, int dims);
/* For a unit that reads pages up to `until`. */
void fkv_sift_begin(struct fkv_scan *s, int64_t until);
static inline bool fkv_sift_has(const struct fkv_scan *s, int64_t page) {
    return s->sifting && page >= 0 && page < s->indices.end;
}
/* A page with an index. */
void fkv_sift_page(struct fkv_scan *s, int64_t page, uint64_t mask);
/* What is open in the last page. */
void fkv_sift_end(struct fkv_scan *s);
/* Takes note of a score that is known, or of a lower bound. */
void fkv_sift_raise(struct fkv_scan *s, int r, float low);

#endif /* FKV_ATTEND_SCAN_H */
