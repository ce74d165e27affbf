/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Coding tiles by FourierAttention (arXiv 2506.11886, corrected; docs/fourier.md). Tiles are folded one after
 * another, each with one rounding of the coefficients, so that the bytes depend on the tokens alone and not on
 * how they were appended.
 */
#include "attend/plan.h"

#include <math.h>
#include <string.h>

#define BLOCK 32 /* channels folded together */

struct scratch {
    float *basis;   /* [64][stride] */
    float *partial; /* [BLOCK][stride] */
    float *x;       /* [MAX_HEAD_DIM][64] */
};

int64_t fkv_code_scratch(int stride) {
    return (int64_t)(FKV_TILE + BLOCK) * stride + FKV_MAX_HEAD_DIM * FKV_TILE + 64;
}

struct code_job {
    struct fkv_plan_object *plan;
    struct fkv_seq *seq;
    int layer;
    const struct fkv_coding_room *room;
};

/* One KV head's K or V of a layer. */
struct head {
    const struct fkv_profile_object *profile;
    const struct fkv_kernels *kernels;
    const struct fkv_spectrum *spectrum;
    struct fkv_layer *layer;
    const struct fkv_channels *channels;
    fkv_part part;
    size_t exact, kept, row; /* offsets in pages and segments */
    struct scratch scratch;
};

static float load(const struct head *h, const void *base, size_t index) {
    return fkv_load_element(fkv_element(base, h->profile->storage_dtype, index),
                            h->profile->storage_dtype);
}

/* x[c][t] := coded channel c of the tile */
static void gather(const struct head *h, int64_t tile) {
    const char *page = h->layer->tiles[tile];
    const int D = h->profile->model.head_dim;
    for (int c = 0; c < h->channels->coded; c++) {
        size_t d = h->channels->list[h->channels->kept + c];
        for (size_t t = 0; t < FKV_TILE; t++) {
            size_t at = h->part == FKV_PART_K ? d * FKV_TILE + t : t * (size_t)D + d;
            h->scratch.x[(size_t)c * FKV_TILE + t] = load(h, page, h->exact + at);
        }
    }
}

static void copy_kept(const struct head *h, int64_t tile, char *kept_page) {
    const fkv_dtype dtype = h->profile->storage_dtype;
    const size_t size = fkv_dtype_size(dtype), D = (size_t)h->profile->model.head_dim;
    const char *from = fkv_element(h->layer->tiles[tile], dtype, h->exact);
    const size_t kept = (size_t)h->channels->kept;
    char *to = fkv_element(kept_page, dtype, h->kept);
    for (size_t c = 0; c < kept; c++) {
        size_t d = h->channels->list[c];
        if (h->part == FKV_PART_K) {
            memcpy(to + c * FKV_TILE * size, from + d * FKV_TILE * size, FKV_TILE * size);
            continue;
        }
        for (size_t t = 0; t < FKV_TILE; t++)
            memcpy(to + (t * kept + c) * size, from + (t * D + d) * size, size);
    }
}

static double tile_sum(const float *x) {
    double sum = 0.0;
    for (int t = 0; t < FKV_TILE; t++)
        sum += (double)x[t];
    return sum;
}

/* Removes the reference, which is the mean of the segment's first tile, and keeps the sum exact. */
static void centre(const struct head *h, struct fkv_channel_state *states, bool first) {
    for (int c = 0; c < h->channels->coded; c++) {
        float *x = h->scratch.x + (ptrdiff_t)c * FKV_TILE;
        if (first)
            states[c].reference = (float)(tile_sum(x) / FKV_TILE);
        for (int t = 0; t < FKV_TILE; t++)
            x[t] -= states[c].reference;
        states[c].sum += tile_sum(x);
    }
}

static void fold(const struct head *h, char *rows) {
    const int stride = h->spectrum->stride;
    const fkv_dtype dtype = h->profile->fourier.coefficient_dtype;
    for (int c = 0; c < h->channels->coded; c += BLOCK) {
        int n = (int)fkv_min64(BLOCK, h->channels->coded - c);
        memset(h->scratch.partial, 0, (size_t)n * (size_t)stride * sizeof(float));
        h->kernels->weigh[FKV_STORE_F32](h->scratch.partial, stride,
                                         h->scratch.x + (ptrdiff_t)c * FKV_TILE, FKV_TILE,
                                         h->scratch.basis, stride, FKV_TILE, n, NULL);
        h->kernels->accumulate[fkv_store_of(dtype)](
            fkv_element(rows, dtype, (size_t)c * (size_t)stride), stride, h->scratch.partial,
            stride, n, stride);
    }
}

/* Coefficient rows and channel numbers of the head in a segment. */
static char *segment_rows(const struct head *h, const struct fkv_segment *s) {
    return fkv_element(s->coefficients, h->profile->fourier.coefficient_dtype,
                       h->row * (size_t)h->spectrum->stride);
}

static void code_tile(const struct head *h, int64_t tile, char *kept_page) {
    const int64_t per_segment = fkv_tiles_per_segment(h->spectrum->period);
    struct fkv_segment *s = h->layer->segments[tile / per_segment];
    const int64_t local = tile % per_segment;
    if (h->channels->kept)
        copy_kept(h, tile, kept_page);
    if (!h->channels->coded)
        return;
    gather(h, tile);
    centre(h, s->channels + h->row, local == 0);
    fkv_spectrum_basis(h->spectrum, local * FKV_TILE, h->scratch.basis);
    fold(h, segment_rows(h, s));
}

/* ---- restoration */

static void restore_least_squares(const struct head *h, struct fkv_segment *s) {
    struct fkv_channel_state *states = s->channels + h->row;
    for (int c = 0; c < h->channels->coded; c++) {
        double rest = states[c].sum / (double)(s->tiles * FKV_TILE);
        states[c].gain = 1.0f;
        states[c].beta = (float)-rest;
        states[c].offset = (float)((double)states[c].reference + rest);
    }
}

/* Running mean and extremes of a series. */
struct extent {
    double sum;
    float low, high;
};

static void extend(struct extent *e, float x, bool first) {
    e->sum += (double)x;
    e->low = first ? x : fminf(e->low, x);
    e->high = first ? x : fmaxf(e->high, x);
}

static double deviation(const struct extent *e, double mean) {
    return fmax((double)e->high - mean, mean - (double)e->low);
}

/* The published affine: gain 2 s T / N on the coefficients of the raw series, offset mean x - s mean r. The
 * series must still be in exact pages, all tiles of the segment. */
static void restore_authors(const struct head *h, struct fkv_segment *s, int64_t first_tile) {
    const struct fkv_spectrum *sp = h->spectrum;
    const double inverse = 2.0 * (double)sp->period / sp->bins, L = (double)(s->tiles * FKV_TILE);
    const fkv_dtype dtype = h->profile->fourier.coefficient_dtype;
    for (int c = 0; c < h->channels->coded; c++) {
        struct fkv_channel_state *state = &s->channels[h->row + (size_t)c];
        float *row = h->scratch.partial;
        const char *from = fkv_element(segment_rows(h, s), dtype, (size_t)c * (size_t)sp->stride);
        for (int n = 0; n < sp->stride; n++)
            row[n] = fkv_load_element(fkv_element(from, dtype, (size_t)n), dtype) +
                     state->reference * s->ones[n];
        struct extent r = {0}, x = {0};
        for (int64_t tile = 0; tile < s->tiles; tile++) {
            float restored[FKV_TILE];
            fkv_spectrum_basis(sp, tile * FKV_TILE, h->scratch.basis);
            h->kernels->expand[FKV_STORE_F32](restored, 1, h->scratch.basis, sp->stride, row,
                                              sp->stride, 1, sp->stride, FKV_TILE);
            gather(h, first_tile + tile);
            for (int t = 0; t < FKV_TILE; t++) {
                extend(&r, restored[t] * (float)(inverse * 2.0 * (double)sp->period), !tile && !t);
                extend(&x, h->scratch.x[c * FKV_TILE + t], !tile && !t);
            }
        }
        double r_span = deviation(&r, r.sum / L), x_span = deviation(&x, x.sum / L);
        double scale = r_span > 0.0 ? x_span / r_span : 0.0;
        state->gain = (float)(scale * inverse);
        state->beta = state->reference;
        state->offset = (float)(x.sum / L - scale * r.sum / L);
    }
}

static void restore(const struct head *h, int64_t from_tile, int64_t until) {
    const int64_t per_segment = fkv_tiles_per_segment(h->spectrum->period);
    for (int64_t i = from_tile / per_segment; i * per_segment < until; i++) {
        struct fkv_segment *s = h->layer->segments[i];
        if (h->profile->fourier.restoration == FKV_RESTORE_LEAST_SQUARES)
            restore_least_squares(h, s);
        else if (!s->restored)
            restore_authors(h, s, i * per_segment);
    }
}

static void code_head(void *arg, int64_t item, int thread) {
    const struct code_job *job = arg;
    const struct fkv_cache_object *cache = job->plan->cache;
    const int kv_head = (int)(item / 2);
    const fkv_part part = (fkv_part)(item % 2);
    const struct fkv_head_layout *layout = &cache->layouts[job->layer].heads[kv_head];
    const struct fkv_workspace *work = &job->plan->work;
    const struct fkv_spectrum *sp = job->seq->shared->spectrum;
    float *floats = work->scratches + thread * work->scratch;
    struct head h = {
        .profile = cache->profile,
        .kernels = job->plan->ctx->kernels,
        .spectrum = sp,
        .layer = &job->seq->layers[job->layer],
        .channels = fkv_profile_head(cache->profile, job->layer, part, kv_head),
        .part = part,
        .exact = fkv_exact_offset(cache->profile, kv_head, part),
        .kept = layout->kept[part],
        .row = layout->rows[part],
        .scratch = {.basis = floats,
                    .partial = floats + (ptrdiff_t)FKV_TILE * sp->stride,
                    .x = floats + (ptrdiff_t)(FKV_TILE + BLOCK) * sp->stride},
    };
    const int64_t first = h.layer->n_coded;
    for (int64_t tile = first; tile < job->room->until; tile++)
        code_tile(&h, tile, job->room->kept[tile - first]);
    if (h.channels->coded)
        restore(&h, first, job->room->until);
}

void fkv_code(struct fkv_plan_object *plan, const struct fkv_row *row, int layer,
              const struct fkv_coding_room *room) {
    struct fkv_layer *l = &row->seq->layers[layer];
    const struct fkv_spectrum *sp = row->seq->shared->spectrum;
    const int64_t per_segment = fkv_tiles_per_segment(sp->period);
    struct code_job job = {plan, row->seq, layer, room};
    const int64_t first = l->n_coded / per_segment;
    for (int64_t i = first; i * per_segment < room->until; i++) {
        struct fkv_segment *s = l->segments[i];
        s->tiles = fkv_min64(room->until - i * per_segment, per_segment);
        fkv_spectrum_ones(sp, s->tiles * FKV_TILE, s->ones);
    }
    fkv_pool_run(plan->ctx->pool, 2 * (int64_t)plan->cache->profile->model.n_kv_heads, code_head,
                 &job);
    for (int64_t i = first; i * per_segment < room->until; i++)
        l->segments[i]->restored = true;
}
