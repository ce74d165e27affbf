/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An index of exact keys: a copy of them in 8 bits, of which a search reads the upper 4 of all and the lower 4 of
 * few, with how far each key is from its copies. It lies in the block of the keys, so it is shared, copied and
 * dropped with them. libfkv/attend/sift.c says how it is used and why the result is that of a plain search.
 *
 * Key t is zero + scale * u[t] + fine residual in each channel, with u = 16 * high + low, and
 * zero + scale * (16 * high[t] + 7.5) + coarse residual. The index of one head in one block:
 *   scale[stride], zero[stride]   f32, with 0 in channels from D on; stride is D rounded up to 16
 *   reach                         f32: a bound of sqrt(sum over c of max over t of key[c][t]^2); then up to 64 bytes
 *   for each tile: coarse codes   [octets][64 tokens][4 bytes], octets of channels: in byte i of octet o high of
 *                                 channel 8 o + i in the lower half, of channel 8 o + 4 + i in the upper one
 *                  coarse bounds  [64], of the length of a token's residual: bfloat16, rounded up
 *   for each tile: fine codes     [64 tokens][octets][4 bytes], low likewise
 *                  fine bounds    [64]
 * Codes of channels from D on are 0. A token with a value that is not finite has infinite bounds, and its block an
 * infinite reach.
 */
#ifndef FKV_CACHE_INDEX_H
#define FKV_CACHE_INDEX_H

#include "cache/cache.h"

/* What a length or a bound may lack because squares underflow; see sift.c. */
#define FKV_INDEX_TINY 0x1p-58f

struct fkv_index {
    const float *scale, *zero, *reach;
    const uint8_t *coarse, *fine;
    const uint16_t *coarse_bound, *fine_bound;
};

static inline size_t fkv_index_octets(const struct fkv_profile_object *p) {
    return ((size_t)p->model.head_dim + 7) / 8;
}
static inline size_t fkv_index_stride(const struct fkv_profile_object *p) {
    return ((size_t)p->model.head_dim + 15) / 16 * 16;
}
static inline size_t fkv_index_head_bytes(const struct fkv_profile_object *p) {
    return (2 * fkv_index_stride(p) + 16) * sizeof(float);
}
/* Of the coarse or the fine half of a tile. */
static inline size_t fkv_index_tile_bytes(const struct fkv_profile_object *p) {
    return FKV_TILE * (4 * fkv_index_octets(p) + sizeof(uint16_t));
}
static inline size_t fkv_index_bytes(const struct fkv_profile_object *p) {
    const size_t tiles = (size_t)fkv_tiles_per_block(p);
    return fkv_index_head_bytes(p) + 2 * tiles * fkv_index_tile_bytes(p);
}

/* Tile `tile` of a block's index at `at`. */
static inline struct fkv_index fkv_index_of(const struct fkv_profile_object *p, const char *at,
                                            int64_t tile) {
    const size_t size = fkv_index_tile_bytes(p), codes = FKV_TILE * 4 * fkv_index_octets(p);
    const char *coarse = at + fkv_index_head_bytes(p) + (size_t)tile * size;
    const char *fine = coarse + (size_t)fkv_tiles_per_block(p) * size;
    struct fkv_index x;
    x.scale = (const float *)(const void *)at;
    x.zero = x.scale + fkv_index_stride(p);
    x.reach = x.zero + fkv_index_stride(p);
    x.coarse = (const uint8_t *)coarse;
    x.coarse_bound = (const uint16_t *)(const void *)(coarse + codes);
    x.fine = (const uint8_t *)fine;
    x.fine_bound = (const uint16_t *)(const void *)(fine + codes);
    return x;
}

/* codec/keyindex.c: makes the index of one head at `at` from the exact panels [D][64] of the block's tiles, the
 * first at `keys`, the next `tile_bytes` later. x: [D][64] floats of scratch, 64 more behind them. */
void fkv_index_make(const struct fkv_profile_object *p, const struct fkv_kernels *kernels,
                    const char *keys, size_t tile_bytes, float *x, char *at);

#endif /* FKV_CACHE_INDEX_H */
