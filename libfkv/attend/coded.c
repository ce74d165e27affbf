/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention on sealed blocks (docs/codec.md). Scores are q . (carrier turned to the token) + q . residual: the first
 * is a sum of waves, a few columns per tile; the second comes from the codes, scales folded into q. Outputs are the
 * weighted sums of the codes, scaled group by group, and the carrier times the sum of the weights. Channels of 0
 * bits appear in neither. Unrotated keys are rotated tile by tile, which is the slow, plain way.
 */
#include "attend/unit.h"

#include "kernels/packed.h"

#include <string.h>

_Static_assert(FKV_DEGREES == FKV_CHEBYSHEV, "the kernels' polynomials");

static bool unrotated(const struct fkv_profile_object *p) {
    return p->coding == FKV_CODING_CALIBRATED && p->codec.domain == FKV_DOMAIN_UNROTATED;
}

static const struct fkv_residuals *residuals_of(const struct fkv_chunk_job *c, fkv_part part) {
    return fkv_profile_residuals(c->job->profile, c->job->layer, part, c->u->head + c->h);
}

static const float *carrier_of(const struct fkv_chunk_job *c, fkv_part part) {
    return fkv_profile_carrier(c->job->profile, c->job->layer, part, c->u->head + c->h);
}

/* ---- queries */

/* With a = q1 m1 + q2 m2 and b = q2 m1 - q1 m2 for the channels 1, 2 of a pair, the carrier's score at position p is
 * a cos wp + b sin wp. */
void fkv_coded_query(const struct fkv_job *job, const struct fkv_unit *u, int h, int r) {
    const struct fkv_profile_object *p = job->profile;
    const struct fkv_residuals *k = fkv_profile_residuals(p, job->layer, FKV_PART_K, u->head + h);
    const float *carrier = fkv_profile_carrier(p, job->layer, FKV_PART_K, u->head + h);
    const struct fkv_waves *w = unrotated(p) ? NULL : p->waves;
    const ptrdiff_t row = h * u->rows + r;
    const float *q = u->q + row * u->dim_stride;
    float *permuted = u->permuted + row * u->dim_stride,
          *weights = u->weights + row * u->weight_stride;
    const int half = p->waves ? p->waves->half : 0, D = p->model.head_dim;
    float constant = 0.0f,
          x[FKV_MAX_HEAD_DIM]; /* q without the exact channels: they have no carrier */
    memcpy(x, q, (size_t)D * sizeof *x);
    for (int i = 0; i < k->count[FKV_WIDTH_EXACT]; i++)
        x[k->list[i]] = 0.0f;
    for (int d = 0; d < D; d++)
        permuted[d] = q[k->list[d]];
    memset(weights, 0, (size_t)u->weight_stride * sizeof *weights);
    for (int j = 0; w && j < w->pairs; j++) {
        const float q1 = x[w->first[j]], q2 = x[w->second[j]];
        const float m1 = carrier[w->first[j]], m2 = carrier[w->second[j]];
        weights[j] = q1 * m1 + q2 * m2;
        weights[half + j] = q2 * m1 - q1 * m2;
    }
    for (int d = 0; d < D; d++)
        if (!w || w->pair_of[d] < 0)
            constant += x[d] * carrier[d];
    weights[2 * half] = constant;
}

/* ---- scratch */

void fkv_coded_scratch(struct fkv_chunk_job *c, float *floats) {
    const struct fkv_unit *u = c->u;
    c->folded = floats;
    c->turned = c->folded + FKV_UNIT_ROWS * (ptrdiff_t)u->dim_stride;
    c->turn = c->turned + FKV_UNIT_ROWS * (ptrdiff_t)u->weight_stride;
    c->waves = c->turn + u->weight_stride;
    c->base = c->waves + FKV_TILE * (ptrdiff_t)u->weight_stride;
}

/* ---- a tile's place in its block */

struct place {
    const char *exact; /* exact channels, then codes */
    const char *codes;
    const uint16_t *scale, *zero;
    int64_t group; /* of the whole middle */
};

static struct place place_of(const struct fkv_chunk_job *c, int tile, fkv_part part) {
    const struct fkv_profile_object *p = c->job->profile;
    const struct fkv_layer_layout *layout = &c->job->plan->cache->layouts[c->job->layer];
    const struct fkv_head_layout *head = &layout->heads[c->u->head + c->h];
    const struct fkv_residuals *r = residuals_of(c, part);
    const int64_t at = c->chunk.tile + tile, in_block = at % fkv_tiles_per_block(p);
    const int64_t group = in_block * FKV_TILE / p->codec.group;
    const char *block = fkv_block_of(p, fkv_layer_of(c->job, c->u), at);
    struct place place = {
        .exact = block + head->tiles[part] + (size_t)in_block * head->tile_bytes[part],
        .scale =
            (const uint16_t *)(const void *)(block + head->scales[part]) + group * 2 * r->quantised,
        .group = at * FKV_TILE / p->codec.group,
    };
    place.codes = place.exact + fkv_exact_tile_bytes(p, r);
    place.zero = place.scale + r->quantised;
    return place;
}

static const void *next_codes(const struct fkv_chunk_job *c, int tile, fkv_part part) {
    if (tile + 1 < c->chunk.tiles)
        return place_of(c, tile + 1, part).codes;
    return NULL;
}

/* Scales and zero points lie apart from the codes, where no stream of reads comes by. */
static void prefetch_next_scales(const struct fkv_chunk_job *c, int tile, fkv_part part) {
    if (tile + 1 >= c->chunk.tiles)
        return;
    const char *scales = (const char *)place_of(c, tile + 1, part).scale;
    const int bytes = 2 * (int)sizeof(uint16_t) * residuals_of(c, part)->quantised;
    for (int i = 0; i < bytes; i += 64)
        __builtin_prefetch(scales + i);
}

/* ---- waves of tokens at any positions */

/* c[j][t], s[j][t] := scaling * cos, sin of the pairs at positions[t], as products of a turn by a multiple of 64 and
 * a wave: a function of the position alone. turn: [2 * half] of scratch. */
static void waves_at(const struct fkv_waves *w, const int32_t *positions, int tokens, float *c,
                     float *s, float *turn) {
    int32_t turned = -1;
    for (int t = 0; t < tokens; t++) {
        const int32_t at = positions[t] % FKV_TILE, first = positions[t] - at;
        if (first != turned)
            fkv_waves_turns(w, first, 1, turn, turn + w->half, 0);
        turned = first;
        for (int j = 0; j < w->pairs; j++) {
            const float x = turn[j], y = turn[w->half + j];
            const float u = w->cos[j * FKV_TILE + at], v = w->sin[j * FKV_TILE + at];
            c[j * FKV_TILE + t] = x * u - y * v;
            s[j * FKV_TILE + t] = y * u + x * v;
        }
    }
}

/* Positions of a tile's tokens: those listed, or made in own[64]. */
static const int32_t *positions_of(const struct fkv_chunk_job *c, int tile, int32_t *own) {
    const struct fkv_profile_object *p = c->job->profile;
    const struct fkv_layer *l = fkv_layer_of(c->job, c->u);
    const int64_t at = c->chunk.tile + tile;
    if (c->chunk.kind != FKV_CHUNK_CODED)
        return c->chunk.kind == FKV_CHUNK_SINK ? fkv_page_positions(p, true, l->sink)
                                               : fkv_page_positions(p, false, l->tiles[at]);
    const struct fkv_block_head *head =
        fkv_block_head(&c->job->plan->cache->layouts[c->job->layer].block, fkv_block_of(p, l, at));
    const int64_t first = at % fkv_tiles_per_block(p) * FKV_TILE;
    if (head->listed)
        return (const int32_t *)(const void *)(head + 1) + first;
    for (int t = 0; t < FKV_TILE; t++)
        own[t] = (int32_t)(head->first + first + t);
    return own;
}

/* ---- scores of rotated keys */

/* s := scores of the turned carriers. */
static void score_carriers(const struct fkv_chunk_job *c, int tile, float *s) {
    const struct fkv_job *job = c->job;
    const struct fkv_unit *u = c->u;
    const struct fkv_waves *w = job->profile->waves;
    const fkv_scores_fn scores = job->kernels->scores[FKV_STORE_F32];
    const float *weights = u->weights + (ptrdiff_t)c->h * u->rows * u->weight_stride;
    const float *turn =
        fkv_turn_of(job->plan, job->layer, fkv_layer_of(job, u), c->chunk.tile + tile, c->turn);
    if (turn) {
        const int columns = 2 * w->fast + (w->fast < w->pairs ? FKV_DEGREES : 0);
        job->kernels->carry(c->turned, u->weight_stride, weights, u->weight_stride, w->half, turn,
                            turn + w->half, w->project, w->pairs, w->fast, u->rows);
        scores(s, FKV_CHUNK_TOKENS, c->turned, u->weight_stride, w->columns, columns, u->rows, 0,
               NULL);
        return;
    }
    int32_t own[FKV_TILE];
    float *sines = c->waves + w->half * FKV_TILE;
    waves_at(w, positions_of(c, tile, own), FKV_TILE, c->waves, sines, c->turn);
    scores(s, FKV_CHUNK_TOKENS, weights, u->weight_stride, c->waves, w->pairs, u->rows, 0, NULL);
    scores(s, FKV_CHUNK_TOKENS, weights + w->half, u->weight_stride, sines, w->pairs, u->rows, 1,
           NULL);
}

static void score_rotated(struct fkv_chunk_job *c, int tile) {
    const struct fkv_job *job = c->job;
    const struct fkv_unit *u = c->u;
    const struct fkv_profile_object *p = job->profile;
    const struct fkv_residuals *r = residuals_of(c, FKV_PART_K);
    const struct place place = place_of(c, tile, FKV_PART_K);
    const ptrdiff_t first = (ptrdiff_t)c->h * u->rows;
    const float *q = u->permuted + first * u->dim_stride;
    const bool turning = r->carried && p->waves;
    float *s = c->scores + tile * FKV_TILE;
    if (turning)
        score_carriers(c, tile, s);
    prefetch_next_scales(c, tile, FKV_PART_K);
    if (place.group != c->group) {
        job->kernels->fold(c->folded, u->dim_stride, c->base, q + r->count[FKV_WIDTH_EXACT],
                           u->dim_stride, place.scale, place.zero, r->quantised, u->rows);
        for (int i = 0; i < u->rows; i++)
            c->base[i] += u->weights[(first + i) * u->weight_stride + u->weight_stride - 16];
        c->group = place.group;
    }
    job->kernels->scores_packed(s, FKV_CHUNK_TOKENS, c->folded, u->dim_stride, c->base, place.codes,
                                r->count + FKV_WIDTH_8, u->rows, turning,
                                next_codes(c, tile, FKV_PART_K));
    if (r->count[FKV_WIDTH_EXACT])
        job->kernels->scores[fkv_store_of(p->storage_dtype)](s, FKV_CHUNK_TOKENS, q, u->dim_stride,
                                                             place.exact, r->count[FKV_WIDTH_EXACT],
                                                             u->rows, 1, NULL);
}

/* ---- scores of unrotated keys */

static void load_exact(const struct fkv_chunk_job *c, int tile, float *x) {
    const struct fkv_profile_object *p = c->job->profile;
    const struct fkv_layer *l = fkv_layer_of(c->job, c->u);
    const enum fkv_store store = fkv_store_of(p->storage_dtype);
    const size_t D = (size_t)p->model.head_dim;
    if (c->chunk.kind != FKV_CHUNK_SINK) {
        const void *keys = fkv_element(l->tiles[c->chunk.tile + tile], p->storage_dtype,
                                       fkv_exact_offset(p, c->u->head + c->h, FKV_PART_K));
        c->job->kernels->widen[store](x, keys, D * FKV_TILE);
        return;
    }
    /* in place, the last rows first: what a row becomes lies at or behind all that is still to be read */
    const char *keys = fkv_sink_tile(c);
    for (size_t d = D; d-- > 0;) {
        float row[FKV_TILE];
        c->job->kernels->widen[store](row, fkv_element(keys, p->storage_dtype, d * FKV_TILE),
                                      FKV_TILE);
        memcpy(x + d * FKV_TILE, row, sizeof row);
    }
}

/* x[d][t] := carrier + residual of a coded tile */
static void load_coded(const struct fkv_chunk_job *c, int tile, float *x) {
    const struct fkv_profile_object *p = c->job->profile;
    const struct fkv_residuals *r = residuals_of(c, FKV_PART_K);
    const struct place place = place_of(c, tile, FKV_PART_K);
    const float *carrier = carrier_of(c, FKV_PART_K);
    const uint8_t *codes = (const uint8_t *)place.codes;
    int at = r->count[FKV_WIDTH_EXACT];
    for (int i = 0; i < at; i++)
        c->job->kernels->widen[fkv_store_of(p->storage_dtype)](
            x + r->list[i] * FKV_TILE,
            fkv_element(place.exact, p->storage_dtype, (size_t)i * FKV_TILE), FKV_TILE);
    for (enum fkv_width w = FKV_WIDTH_8; w < FKV_N_WIDTH; w++)
        for (int i = 0; i < r->count[w]; i++, at++) {
            const int d = r->list[at], n = at - r->count[FKV_WIDTH_EXACT];
            float scale = 0.0f, zero = carrier[d];
            if (w < FKV_WIDTH_0) {
                scale = fkv_f16_to_f32(place.scale[n]);
                zero += fkv_f16_to_f32(place.zero[n]);
            }
            for (int t = 0; t < FKV_TILE; t++)
                x[d * FKV_TILE + t] =
                    w < FKV_WIDTH_0
                        ? zero + scale * (float)fkv_packed_key(codes, fkv_width_bits(w), t)
                        : zero;
            codes += 8 * fkv_width_bits(w);
        }
}

static void rotate(const struct fkv_chunk_job *c, int tile, int tokens, float *x) {
    const struct fkv_waves *w = c->job->profile->waves;
    int32_t own[FKV_TILE];
    float *sines = c->waves + w->half * FKV_TILE;
    waves_at(w, positions_of(c, tile, own), tokens, c->waves, sines, c->turn);
    for (int j = 0; j < w->pairs; j++) {
        float *a = x + w->first[j] * FKV_TILE, *b = x + w->second[j] * FKV_TILE;
        const float *cosine = c->waves + j * FKV_TILE, *sine = sines + j * FKV_TILE;
        for (int t = 0; t < tokens; t++) {
            const float old = a[t];
            a[t] = old * cosine[t] - b[t] * sine[t];
            b[t] = b[t] * cosine[t] + old * sine[t];
        }
    }
}

static void score_unrotated(const struct fkv_chunk_job *c, int tile) {
    const struct fkv_unit *u = c->u;
    const int tokens = (int)fkv_min64(FKV_TILE, c->chunk.tokens - tile * FKV_TILE);
    if (c->chunk.kind == FKV_CHUNK_CODED)
        load_coded(c, tile, c->tile);
    else
        load_exact(c, tile, c->tile);
    if (c->job->profile->waves)
        rotate(c, tile, tokens, c->tile);
    c->job->kernels->scores[FKV_STORE_F32](c->scores + tile * FKV_TILE, FKV_CHUNK_TOKENS,
                                           u->q + (ptrdiff_t)c->h * u->rows * u->dim_stride,
                                           u->dim_stride, c->tile, c->job->profile->model.head_dim,
                                           u->rows, 0, NULL);
}

bool fkv_coded_scores(const struct fkv_job *job, const struct fkv_chunk *chunk) {
    return job->profile->coding == FKV_CODING_CALIBRATED &&
           (chunk->kind == FKV_CHUNK_CODED || unrotated(job->profile));
}

void fkv_coded_score(struct fkv_chunk_job *c, int tile) {
    if (unrotated(c->job->profile))
        score_unrotated(c, tile);
    else
        score_rotated(c, tile);
}

/* ---- outputs */

void fkv_coded_weigh(const struct fkv_chunk_job *c, int tile, int first, int rows, int tokens) {
    const struct fkv_profile_object *p = c->job->profile;
    const struct fkv_residuals *r = residuals_of(c, FKV_PART_V);
    const struct place place = place_of(c, tile, FKV_PART_V);
    const float *weights = c->scores + (ptrdiff_t)first * FKV_CHUNK_TOKENS + tile * FKV_TILE;
    float *to = c->kept + (ptrdiff_t)first * c->u->dim_stride;
    const int exact = r->count[FKV_WIDTH_EXACT];
    if (exact)
        c->job->kernels->weigh[fkv_store_of(p->storage_dtype)](to, c->u->dim_stride, weights,
                                                               FKV_CHUNK_TOKENS, place.exact, exact,
                                                               tokens, rows, NULL);
    prefetch_next_scales(c, tile, FKV_PART_V);
    if (r->quantised)
        c->job->kernels->weigh_packed(to + exact, c->u->dim_stride, weights, FKV_CHUNK_TOKENS,
                                      place.codes, r->count + FKV_WIDTH_8, place.scale, place.zero,
                                      tokens, rows, next_codes(c, tile, FKV_PART_V));
}

void fkv_coded_finish(const struct fkv_chunk_job *c, const struct fkv_partial *to) {
    const struct fkv_residuals *r = residuals_of(c, FKV_PART_V);
    const float *carrier = carrier_of(c, FKV_PART_V);
    const int exact = r->count[FKV_WIDTH_EXACT], held = exact + r->quantised;
    for (int i = 0; i < c->u->rows; i++) {
        const float *kept = c->kept + (ptrdiff_t)i * c->u->dim_stride;
        float *o = to->o + (ptrdiff_t)i * c->u->dim_stride;
        for (int n = 0; n < held; n++)
            o[r->list[n]] = kept[n];
        for (int n = exact; r->carried && n < c->job->profile->model.head_dim; n++)
            o[r->list[n]] += carrier[r->list[n]] * to->sum[i];
    }
}
