/* SPDX-License-Identifier: Apache-2.0 */
/* How a layer is cut into chunks, and what attention needs of workspace. */
#include "attend/attend.h"

int64_t fkv_chunk_count(const struct fkv_profile_object *p, int64_t period, int64_t tokens,
                        int64_t coded) {
    int64_t sink = fkv_sinks(p) && tokens ? 1 : 0, tiles = fkv_body_tiles(p, tokens), chunks = 0;
    if (coded) {
        int64_t per_segment = fkv_tiles_per_segment(period);
        chunks = coded / per_segment * fkv_ceil_div(per_segment, FKV_CHUNK_TILES) +
                 fkv_ceil_div(coded % per_segment, FKV_CHUNK_TILES);
    }
    return sink + chunks + fkv_ceil_div(tiles - coded, FKV_CHUNK_TILES);
}

struct fkv_chunk fkv_chunk_at(const struct fkv_profile_object *p, int64_t period, int64_t tokens,
                              int64_t coded, int64_t i) {
    const int64_t sinks = fkv_sinks(p), body = fkv_body_tiles(p, tokens);
    struct fkv_chunk c = {.kind = FKV_CHUNK_SINK, .tokens = (int)fkv_min64(sinks, tokens)};
    if (sinks && i-- == 0) {
        c.tiles = 1;
        return c;
    }
    int64_t end = coded;
    c.kind = FKV_CHUNK_CODED;
    if (coded) {
        const int64_t per_segment = fkv_tiles_per_segment(period);
        const int64_t chunks = fkv_ceil_div(per_segment, FKV_CHUNK_TILES);
        c.segment = i / chunks;
        c.tile = c.segment * per_segment + i % chunks * FKV_CHUNK_TILES;
        end = fkv_min64(coded, (c.segment + 1) * per_segment);
    }
    if (c.tile >= coded) {
        c.kind = FKV_CHUNK_EXACT;
        c.segment = 0;
        i -= fkv_chunk_count(p, period, sinks + coded * FKV_TILE, coded) - (sinks && 1);
        c.tile = coded + i * FKV_CHUNK_TILES;
        end = body;
    }
    c.tiles = (int)fkv_min64(FKV_CHUNK_TILES, end - c.tile);
    c.token = sinks + c.tile * FKV_TILE;
    c.tokens = (int)fkv_min64(c.tiles * FKV_TILE, tokens - c.token);
    return c;
}

/* ---- workspace */

int64_t fkv_grid_floats(const struct fkv_seq *seq) {
    return seq->shared ? fkv_round16(seq->shared->spectrum->grid + 16) : 0;
}

int64_t fkv_chunk_grid(const struct fkv_seq *seq) {
    const struct fkv_taps *taps;
    if (!seq->shared)
        return 0;
    taps = &seq->shared->spectrum->taps;
    return fkv_round16(FKV_CHUNK_TOKENS / taps->cell + taps->width + 16);
}

int64_t fkv_weight_stride(const struct fkv_profile_object *p) {
    if (p->coding != FKV_CODING_CALIBRATED)
        return 0;
    return (p->waves ? 2 * p->waves->half : 0) + 16;
}

int64_t fkv_partial_floats(const struct fkv_profile_object *p, const struct fkv_seq *seq) {
    return FKV_UNIT_ROWS * (2 + fkv_round16(p->model.head_dim) + fkv_chunk_grid(seq)) + 16;
}

int64_t fkv_state_floats(const struct fkv_profile_object *p, int64_t grid) {
    return FKV_UNIT_ROWS *
               (3 * fkv_round16(p->model.head_dim) + 16 + 2 * grid + fkv_weight_stride(p)) +
           64;
}

int64_t fkv_attend_scratch(const struct fkv_profile_object *p, const struct fkv_seq *seq) {
    int64_t chunk = FKV_UNIT_ROWS * (FKV_CHUNK_TOKENS + fkv_round16(p->model.head_dim)) +
                    FKV_TILE * fkv_round16(p->model.head_dim) + 64;
    if (p->coding == FKV_CODING_CALIBRATED) {
        const int64_t weights = fkv_weight_stride(p), dim = fkv_round16(p->model.head_dim);
        chunk += FKV_UNIT_ROWS * (dim + 1 + weights) + weights * (1 + FKV_TILE);
        return fkv_max64(chunk, fkv_block_scratch(p));
    }
    if (!seq->shared)
        return chunk;
    const struct fkv_spectrum *sp = seq->shared->spectrum;
    int64_t transform = FKV_UNIT_ROWS * (int64_t)sp->stride + FKV_UNIT_ROWS * FKV_MAX_HEAD_DIM +
                        64 + (int64_t)(fkv_spectrum_scratch(sp) / sizeof(float));
    return fkv_max64(fkv_max64(chunk, transform), fkv_code_scratch(sp->stride));
}
