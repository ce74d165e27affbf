/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tables that follow from RoPE's frequencies alone. A carrier's share of the scores is a sum of one sinusoid per
 * RoPE pair. Over the 64 tokens of a tile, counted from its middle, the pairs that turn far are taken as they are;
 * the slow ones together are a polynomial of degree 15, so that most pairs cost next to nothing.
 */
#ifndef FKV_PROFILE_WAVES_H
#define FKV_PROFILE_WAVES_H

#include "core/core.h"

#define FKV_MAX_PAIRS (FKV_MAX_HEAD_DIM / 2)
#define FKV_DEGREES 16 /* Chebyshev polynomials of degree 0..15 */

struct fkv_model;

/* cos, then sin, of t * inv_freq, [64][2][pairs]: what turns heads on from a multiple of 64 to their position; see
 * codec/rope.h. NULL in *out for a model without RoPE. */
fkv_status fkv_angles_create(struct fkv_ctx *ctx, const struct fkv_model *model, double **out);
void fkv_angles_destroy(struct fkv_ctx *ctx, const struct fkv_model *model, double *angles);

struct fkv_waves {
    int pairs;   /* sorted by descending frequency */
    bool halves; /* pair j is of channels j and pairs + j */
    int fast;    /* the first of them are not in the polynomial */
    int half;    /* pairs, rounded up to 16 */
    double frequency[FKV_MAX_PAIRS];
    uint8_t first[FKV_MAX_PAIRS], second[FKV_MAX_PAIRS]; /* channels of a pair */
    int16_t pair_of[FKV_MAX_HEAD_DIM];                   /* -1: not rotated */
    double scaling;
    float *cos, *sin; /* [pairs][64]: of frequency * (t - 31.5) */
    float *
        columns; /* [2 * fast + 16][64]: cos, then sin of the fast pairs, then T_m((t - 31.5) / 32) */
    float *project; /* [pairs - fast][16]: of cos (even m) and sin (odd m) on T_m */
    size_t bytes;   /* of all tables together, this struct included */
};

/* NULL in *out for a model without RoPE. */
fkv_status fkv_waves_create(struct fkv_ctx *ctx, const struct fkv_model *model,
                            struct fkv_waves **out);
void fkv_waves_destroy(struct fkv_ctx *ctx, struct fkv_waves *waves);
/* c[j], s[j] := scaling * cos, sin of frequency * (position + 31.5): rows, `stride` floats apart, for `count` tiles
 * that begin at `position`, position + 64, .. */
void fkv_waves_turns(const struct fkv_waves *waves, int64_t position, int64_t count, float *c,
                     float *s, ptrdiff_t stride);
/* cos and sin of position * frequency, as exactly as double tells them. */
void fkv_angle(double position, double frequency, double *c, double *s);
/* For one pair in double: of frequency * (position + offset), offset a multiple of 1/2. */
void fkv_waves_angle(const struct fkv_waves *waves, int pair, int64_t position, double offset,
                     double *c, double *s);

#endif /* FKV_PROFILE_WAVES_H */
