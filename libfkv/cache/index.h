/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An index of exact keys: a copy of them in 8 bits, of which a search reads the upper 4 of all and the lower 4 of
 * few, with how far each key is from its copies. It lies in the block of the keys, so it is shared, copied and
 * dropped with them. libfkv/attend/sift.c says how it is used and why the result is that of a plain search.
 *
 * Key t is centre + scale * (u[t] - 127.5) + fine residual in each channel, with u = 16 * high + low, and
 * centre + 16 * scale * (high[t] - 7.5) + coarse residual. The index of one head in one block:
 *   struct fkv_index_head
 *   scale[stride], centre[stride] bfloat16, with 0 in channels from D on; stride is D rounded up to 32
 *   for each tile: coarse codes   [octets][64 tokens][4 bytes], octets of channels: in byte i of octet o high of
 *                                 channel 8 o + i in the lower half, of channel 8 o + 4 + i in the upper one
 *                  coarse bounds  [64], of the length of a token's residual: bfloat16, rounded up
 *   for each tile: fine codes     [64 tokens][octets][4 bytes], low likewise
 * Codes of channels from D on are 0. A block with a value that is not finite, or above 2^60, has infinite bounds.
 */
#ifndef FKV_CACHE_INDEX_H
#define FKV_CACHE_INDEX_H

#include "cache/cache.h"

/* What a length or a bound may lack because squares underflow; see sift.c. */
#define FKV_INDEX_TINY 0x1p-58f

/* Bounds for all tokens of a block. */
struct fkv_index_head {
    float reach;  /* sqrt(sum over c of max over t of key[c][t]^2) */
    float fine;   /* length of a fine residual */
    float spread; /* sqrt(sum over c of (high[c][t] - 7.5)^2) */
    float unused[13];
};

struct fkv_index {
    const struct fkv_index_head *head;
    const uint16_t *scale, *centre;
    const uint8_t *coarse, *fine;
    const uint16_t *coarse_bound;
};

static inline size_t fkv_index_octets(const struct fkv_profile_object *p) {
    return ((size_t)p->model.head_dim + 7) / 8;
}
static inline size_t fkv_index_stride(const struct fkv_profile_object *p) {
    return ((size_t)p->model.head_dim + 31) / 32 * 32;
}
static inline size_t fkv_index_head_bytes(const struct fkv_profile_object *p) {
    return sizeof(struct fkv_index_head) + 2 * fkv_index_stride(p) * sizeof(uint16_t);
}
static inline size_t fkv_index_codes_bytes(const struct fkv_profile_object *p) {
    return FKV_TILE * 4 * fkv_index_octets(p);
}
/* Of the coarse half of a tile. */
static inline size_t fkv_index_coarse_bytes(const struct fkv_profile_object *p) {
    return fkv_index_codes_bytes(p) + FKV_TILE * sizeof(uint16_t);
}
static inline size_t fkv_index_bytes(const struct fkv_profile_object *p) {
    const size_t tiles = (size_t)fkv_tiles_per_block(p);
    return fkv_index_head_bytes(p) + tiles * (fkv_index_coarse_bytes(p) + fkv_index_codes_bytes(p));
}

/* Tile `tile` of a block's index at `at`. */
static inline struct fkv_index fkv_index_of(const struct fkv_profile_object *p, const char *at,
                                            int64_t tile) {
    const size_t tiles = (size_t)fkv_tiles_per_block(p), i = (size_t)tile;
    const char *coarse = at + fkv_index_head_bytes(p);
    const char *fine = coarse + tiles * fkv_index_coarse_bytes(p);
    struct fkv_index x;
    x.head = (const struct fkv_index_head *)(const void *)at;
    x.scale = (const uint16_t *)(const void *)(x.head + 1);
    x.centre = x.scale + fkv_index_stride(p);
    x.coarse = (const uint8_t *)coarse + i * fkv_index_coarse_bytes(p);
    x.coarse_bound = (const uint16_t *)(const void *)(x.coarse + fkv_index_codes_bytes(p));
    x.fine = (const uint8_t *)fine + i * fkv_index_codes_bytes(p);
    return x;
}

/* codec/keyindex.c: makes the index of one head at `at` from the exact panels [D][64] of the block's tiles, the
 * first at `keys`, the next `tile_bytes` later. x: [D][64] floats of scratch. */
void fkv_index_make(const struct fkv_profile_object *p, const struct fkv_kernels *kernels,
                    const char *keys, size_t tile_bytes, float *x, char *at);

#endif /* FKV_CACHE_INDEX_H */
