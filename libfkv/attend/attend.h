/* SPDX-License-Identifier: Apache-2.0 */
/* How the workspace of attention is cut; shared by plan.c, which sizes it, and attend.c, which uses it. */
#ifndef FKV_ATTEND_ATTEND_H
#define FKV_ATTEND_ATTEND_H

#include "attend/plan.h"

/* A run of up to 16 tiles that are held alike. */
enum fkv_chunk_kind { FKV_CHUNK_SINK, FKV_CHUNK_CODED, FKV_CHUNK_EXACT };
struct fkv_chunk {
    enum fkv_chunk_kind kind;
    int64_t segment;
    int64_t tile;  /* first, of the body */
    int64_t token; /* index of its first token in the sequence */
    int tiles;
    int tokens;
};

/* Chunks of a layer with `tokens` tokens of which `coded` tiles are coded, and the i-th of them. */
int64_t fkv_chunk_count(const struct fkv_profile_object *profile, int64_t period, int64_t tokens,
                        int64_t coded);
struct fkv_chunk fkv_chunk_at(const struct fkv_profile_object *profile, int64_t period,
                              int64_t tokens, int64_t coded, int64_t i);

static inline int64_t fkv_round16(int64_t n) {
    return (n + 15) / 16 * 16;
}
/* Grid points that a chunk of coded tiles touches, rounded up likewise; 0 for exact profiles. */
int64_t fkv_chunk_grid(const struct fkv_seq *seq);
/* Grid points of one segment, rounded up for alignment and padding; 0 for exact profiles. */
int64_t fkv_grid_floats(const struct fkv_seq *seq);
/* Calibrated: floats of a row's weights on the carriers' waves; 0 for other profiles. */
int64_t fkv_weight_stride(const struct fkv_profile_object *profile);
int64_t fkv_partial_floats(const struct fkv_profile_object *profile, const struct fkv_seq *seq);
int64_t fkv_state_floats(const struct fkv_profile_object *profile, int64_t grid);
int64_t fkv_attend_scratch(const struct fkv_profile_object *profile, const struct fkv_seq *seq);

#endif /* FKV_ATTEND_ATTEND_H */
