/* SPDX-License-Identifier: Apache-2.0 */
/* The making of the index of keys: see cache/index.h. */
#include "cache/index.h"

#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

#define MAX_D FKV_MAX_HEAD_DIM

/* Above this, keys are not told apart: sums of their squares could overflow. */
#define MOST 0x1p60f

struct tables {
    struct fkv_index_head *head;
    uint16_t *scales, *centres;
    float scale[MAX_D], centre[MAX_D], inverse[MAX_D];
};

/* The upper half of a float >= 0, rounded away from 0. */
static uint16_t round_up(float x) {
    uint32_t bits;
    if (!(x < 0x1p100f))
        x = INFINITY;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0xffff) >> 16);
}

/* The upper half of a finite float. */
static uint16_t cut(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* Scales, centres and the reach of a block. */
static void find_ranges(const struct fkv_profile_object *p, const struct fkv_kernels *kernels,
                        const char *keys, size_t tile_bytes, float *x, struct tables *to) {
    const enum fkv_store store = fkv_store_of(p->storage_dtype);
    const int D = p->model.head_dim;
    const int64_t tiles = fkv_tiles_per_block(p);
    float low[MAX_D], high[MAX_D], rest[MAX_D], sum = 0.0f;
    for (int64_t i = 0; i < tiles; i++) {
        kernels->widen[store](x, keys + (size_t)i * tile_bytes, (size_t)D * FKV_TILE);
        for (int c = 0; c < D; c++) {
            const float *k = x + c * FKV_TILE;
            float least = i ? low[c] : k[0], most = i ? high[c] : k[0], none = i ? rest[c] : 0.0f;
            for (int t = 0; t < FKV_TILE; t++) {
                least = k[t] < least ? k[t] : least;
                most = k[t] > most ? k[t] : most;
                none += k[t] * 0.0f; /* stays 0 while all are finite */
            }
            low[c] = least;
            high[c] = most;
            rest[c] = none;
        }
    }
    memset(to->head, 0, fkv_index_head_bytes(p));
    for (int c = 0; c < D; c++) {
        const float far = fabsf(low[c]) > fabsf(high[c]) ? fabsf(low[c]) : fabsf(high[c]);
        const bool good = rest[c] == 0.0f && far < MOST;
        to->centres[c] = cut(good ? 0.5f * (low[c] + high[c]) : 0.0f);
        to->centre[c] = fkv_bf16_to_f32(to->centres[c]);
        const float up = high[c] - to->centre[c], down = to->centre[c] - low[c];
        const float step = good ? (up > down ? up : down) / 127.5f : 0.0f;
        to->scales[c] = step > 0x1p-100f ? round_up(step) : 0;
        to->scale[c] = fkv_bf16_to_f32(to->scales[c]);
        to->inverse[c] = step > 0x1p-100f ? 1.0f / to->scale[c] : 0.0f;
        sum += good ? far * far : INFINITY;
    }
    to->head->reach = sqrtf(sum) * 1.0001f + FKV_INDEX_TINY;
}

/* Sums of squares over the channels of each token. */
struct squares {
    float coarse[FKV_TILE], fine[FKV_TILE], spread[FKV_TILE];
};

static void code_channel(const float *k, float centre, float scale, float inverse, uint8_t *u,
                         struct squares *sums) {
    for (int t = 0; t < FKV_TILE; t++) {
        float code = (k[t] - centre) * inverse + 128.0f;
        code = code > 0.0f ? code : 0.0f; /* NaN becomes 0 */
        code = code < 255.0f ? code : 255.0f;
        const int i = (int)code;
        const float near = k[t] - (centre + scale * ((float)i - 127.5f));
        const float far = k[t] - (centre + scale * ((float)(i & 0xf0) - 120.0f));
        const float high = (float)(i >> 4) - 7.5f;
        u[t] = (uint8_t)i;
        sums->fine[t] += near * near;
        sums->coarse[t] += far * far;
        sums->spread[t] += high * high;
    }
}

/* A length, with what the floats above may lack: less than a millionth of the reach, and what underflowed. */
static float bound_of(float squares, float reach) {
    return sqrtf(squares) * 1.0001f + 1e-6f * reach + FKV_INDEX_TINY;
}

static void save_bounds(const struct squares *sums, struct fkv_index_head *head, uint16_t *coarse) {
    for (int t = 0; t < FKV_TILE; t++) {
        const float fine = bound_of(sums->fine[t], head->reach);
        const float spread = sqrtf(sums->spread[t]) * 1.0001f;
        coarse[t] = round_up(bound_of(sums->coarse[t], head->reach));
        if (!(fine <= head->fine))
            head->fine = fine;
        if (!(spread <= head->spread))
            head->spread = spread;
    }
}

static void code_tile(const struct fkv_profile_object *p, const float *x, const struct tables *from,
                      const struct fkv_index *to) {
    const int D = p->model.head_dim, octets = (int)fkv_index_octets(p);
    uint8_t *high = (uint8_t *)(uintptr_t)to->coarse, *low = (uint8_t *)(uintptr_t)to->fine;
    struct squares sums = {{0}, {0}, {0}};
    for (int o = 0; o < octets; o++) {
        uint8_t u[8][FKV_TILE] = {{0}};
        for (int i = 0; i < 8 && 8 * o + i < D; i++) {
            const int c = 8 * o + i;
            code_channel(x + c * FKV_TILE, from->centre[c], from->scale[c], from->inverse[c], u[i],
                         &sums);
        }
        for (int t = 0; t < FKV_TILE; t++)
            for (int i = 0; i < 4; i++) {
                const int a = u[i][t], b = u[4 + i][t];
                high[(o * FKV_TILE + t) * 4 + i] = (uint8_t)(a >> 4 | (b & 0xf0));
                low[(t * octets + o) * 4 + i] = (uint8_t)((a & 15) | (b & 15) << 4);
            }
    }
    save_bounds(&sums, from->head, (uint16_t *)(uintptr_t)to->coarse_bound);
}

void fkv_index_make(const struct fkv_profile_object *p, const struct fkv_kernels *kernels,
                    const char *keys, size_t tile_bytes, float *x, char *at) {
    const enum fkv_store store = fkv_store_of(p->storage_dtype);
    struct tables tables;
    tables.head = (struct fkv_index_head *)(void *)at;
    tables.scales = (uint16_t *)(void *)(tables.head + 1);
    tables.centres = tables.scales + fkv_index_stride(p);
    find_ranges(p, kernels, keys, tile_bytes, x, &tables);
    for (int64_t i = 0; i < fkv_tiles_per_block(p); i++) {
        const struct fkv_index to = fkv_index_of(p, at, i);
        kernels->widen[store](x, keys + (size_t)i * tile_bytes,
                              (size_t)p->model.head_dim * FKV_TILE);
        code_tile(p, x, &tables, &to);
    }
}
