/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention over a layer. For coded tiles in spectral form (docs/fourier.md): with one basis phi_n per head,
 *   scores   s(t) = sum_n a[n] phi_n(t) + q_kept . k_kept(t),    a[n] = sum_{d coded} q_d K[n,d]
 *   output   o_d  = sum_n P[n] V[n,d] for coded d,               P[n] = sum_t p(t) phi_n(t)
 * and both sums over n run through a grid (codec/spectrum.h), so that neither K nor V is ever rebuilt.
 */
#include "attend/unit.h"

#include <math.h>
#include <string.h>

#define MAX_D FKV_MAX_HEAD_DIM

void fkv_unit_carve(const struct fkv_job *job, struct fkv_unit *u, float *floats, int64_t grid) {
    const int64_t dim = fkv_round16(job->profile->model.head_dim);
    u->dim_stride = (int)dim;
    u->q = floats;
    u->permuted = u->q + FKV_UNIT_ROWS * dim;
    u->o = u->permuted + FKV_UNIT_ROWS * dim;
    u->max = u->o + FKV_UNIT_ROWS * dim;
    u->sum = u->max + FKV_UNIT_ROWS;
    u->grid = u->sum + FKV_UNIT_ROWS + 16;
    u->mass = u->grid + FKV_UNIT_ROWS * grid;
    u->weights = u->mass + FKV_UNIT_ROWS * grid;
    u->weight_stride = (int)fkv_weight_stride(job->profile);
}

static struct fkv_unit unit_at(const struct fkv_job *job, int64_t index, int thread) {
    const struct fkv_plan_object *plan = job->plan;
    const struct fkv_workspace *w = &plan->work;
    const struct fkv_model *m = &job->profile->model;
    int64_t low = 0, high = plan->n_rows - 1;
    while (low <
           high) { /* the last row with first_unit <= index has units, those behind have not */
        int64_t middle = (low + high + 1) / 2;
        if (plan->rows[middle].first_unit <= index)
            low = middle;
        else
            high = middle - 1;
    }
    const struct fkv_row *row = &plan->rows[low];
    const int64_t local = index - row->first_unit;
    struct fkv_unit u = {.row = row, .grid_stride = fkv_grid_floats(row->seq)};
    u.head = (int)(local / row->blocks) * row->heads_per_unit;
    u.n_heads = (int)fkv_min64(row->heads_per_unit, m->n_kv_heads - u.head);
    u.first_row = local % row->blocks * FKV_UNIT_ROWS;
    u.rows = (int)fkv_min64(FKV_UNIT_ROWS, row->n_new * m->group - u.first_row);
    fkv_unit_carve(job, &u, w->states + (w->by_chunk ? index : thread) * w->state, w->grid);
    return u;
}

static struct fkv_partial partial_at(const struct fkv_job *job, const struct fkv_unit *u,
                                     int64_t index) {
    const struct fkv_workspace *w = &job->plan->work;
    float *f = w->partials + index * w->partial;
    return (struct fkv_partial){.max = f,
                                .sum = f + FKV_UNIT_ROWS,
                                .o = f + 2 * FKV_UNIT_ROWS,
                                .mass = f + FKV_UNIT_ROWS * (2 + u->dim_stride),
                                .mass_stride = fkv_chunk_grid(u->row->seq)};
}

/* ---- begin: queries, and for each segment the grid of the coded channels' scores */

void fkv_load_query(const struct fkv_job *job, const struct fkv_unit *u, int h, int r,
                    struct fkv_plan_rope *rope) {
    const struct fkv_model *m = &job->profile->model;
    const int64_t at = u->first_row + r, token = u->row->offset + at / m->group;
    const int head = (u->head + h) * m->group + (int)(at % m->group), D = m->head_dim;
    float *q = u->q + (ptrdiff_t)(h * u->rows + r) * u->dim_stride;
    fkv_load_head(job->kernels, job->q, token, head, D, q);
    fkv_plan_rotate(rope, token, q);
    for (int d = 0; d < D; d++)
        q[d] *= (float)m->softmax_scale;
    if (job->profile->coding == FKV_CODING_CALIBRATED)
        fkv_coded_query(job, u, h, r);
    if (job->profile->coding != FKV_CODING_FOURIER)
        return;
    const struct fkv_channels *c =
        fkv_profile_head(job->profile, job->layer, FKV_PART_K, u->head + h);
    float *permuted = u->permuted + (ptrdiff_t)(h * u->rows + r) * u->dim_stride;
    for (int d = 0; d < D; d++)
        permuted[d] = q[c->list[d]];
}

static const char *segment_rows(const struct fkv_job *job, const struct fkv_unit *u,
                                const struct fkv_segment *s, int h, fkv_part part) {
    const struct fkv_layer_layout *layout = &job->plan->cache->layouts[job->layer];
    const size_t row = layout->heads[u->head + h].rows[part];
    return fkv_element(s->coefficients, job->profile->fourier.coefficient_dtype,
                       row * (size_t)u->row->seq->shared->spectrum->stride);
}

/* Weights w_n of the restoration, and the numbers of the channels of a head. */
static void weigh_bins(const struct fkv_job *job, const struct fkv_spectrum *sp, float *row) {
    if (job->profile->fourier.restoration == FKV_RESTORE_AUTHORS)
        return;
    for (int n = 0; n < sp->stride; n++)
        row[n] *= sp->weight[n];
}

static const struct fkv_channel_state *head_states(const struct fkv_job *job,
                                                   const struct fkv_unit *u,
                                                   const struct fkv_segment *s, int h,
                                                   fkv_part part) {
    return s->channels + job->plan->cache->layouts[job->layer].heads[u->head + h].rows[part];
}

/* a[r][n] of one head's rows over a segment. */
static void contract_head(const struct fkv_job *job, const struct fkv_unit *u,
                          const struct fkv_segment *s, int h, float *a, float *scaled) {
    const struct fkv_spectrum *sp = u->row->seq->shared->spectrum;
    const struct fkv_channels *c =
        fkv_profile_head(job->profile, job->layer, FKV_PART_K, u->head + h);
    const struct fkv_channel_state *state = head_states(job, u, s, h, FKV_PART_K);
    const enum fkv_store store = fkv_store_of(job->profile->fourier.coefficient_dtype);
    for (int r = 0; r < u->rows; r++)
        for (int d = 0; d < c->coded; d++)
            scaled[r * MAX_D + d] =
                u->permuted[(ptrdiff_t)(h * u->rows + r) * u->dim_stride + c->kept + d] *
                state[d].gain;
    job->kernels->contract[store](a, sp->stride, scaled, MAX_D,
                                  segment_rows(job, u, s, h, FKV_PART_K), sp->stride, c->coded,
                                  sp->stride, u->rows);
    for (int r = 0; r < u->rows; r++) {
        float *row = a + (ptrdiff_t)r * sp->stride, ones = 0.0f, constant = 0.0f;
        const float *q = u->permuted + (ptrdiff_t)(h * u->rows + r) * u->dim_stride + c->kept;
        for (int d = 0; d < c->coded; d++) {
            ones += scaled[r * MAX_D + d] * state[d].beta;
            constant += q[d] * state[d].offset;
        }
        for (int n = 0; n < sp->stride; n++)
            row[n] += ones * s->ones[n];
        weigh_bins(job, sp, row);
        row[0] += constant;
    }
}

static int64_t segment_grid(const struct fkv_unit *u, int64_t segment) {
    return segment * u->n_heads * u->rows * u->grid_stride;
}

/* Rows go through the transforms 16 at a time. */
static int lanes_from(const struct fkv_unit *u, int first) {
    return (int)fkv_min64(FKV_FFT_LANES, u->n_heads * u->rows - first);
}

static void begin_segments(const struct fkv_job *job, const struct fkv_unit *u, float *scratch) {
    const struct fkv_layer *l = fkv_layer_of(job, u);
    const struct fkv_spectrum *sp = u->row->seq->shared->spectrum;
    float *a = scratch, *scaled = a + FKV_UNIT_ROWS * (ptrdiff_t)sp->stride;
    float *transform = scaled + FKV_UNIT_ROWS * MAX_D;
    for (int64_t i = 0; i < l->n_segments; i++) {
        for (int h = 0; h < u->n_heads; h++)
            contract_head(job, u, l->segments[i], h, a + (ptrdiff_t)h * u->rows * sp->stride,
                          scaled);
        float *grid = u->grid + segment_grid(u, i);
        for (int r = 0; r < u->n_heads * u->rows; r += FKV_FFT_LANES)
            fkv_spectrum_to_grid(sp, job->kernels, a + (ptrdiff_t)r * sp->stride, sp->stride,
                                 grid + r * u->grid_stride, u->grid_stride, lanes_from(u, r),
                                 transform);
    }
    memset(u->mass, 0, (size_t)segment_grid(u, l->n_segments) * sizeof(float));
}

static void begin_unit(const struct fkv_job *job, const struct fkv_unit *u, int thread) {
    const struct fkv_workspace *w = &job->plan->work;
    const int rows = u->n_heads * u->rows;
    struct fkv_plan_rope rope;
    fkv_plan_rope_begin(&rope, job->plan);
    for (int h = 0; h < u->n_heads; h++)
        for (int r = 0; r < u->rows; r++)
            fkv_load_query(job, u, h, r, &rope);
    for (int r = 0; r < rows; r++) {
        u->max[r] = -INFINITY;
        u->sum[r] = 0.0f;
    }
    memset(u->o, 0, (size_t)rows * (size_t)u->dim_stride * sizeof(float));
    if (fkv_layer_of(job, u)->n_segments)
        begin_segments(job, u, w->scratches + thread * w->scratch);
}

/* ---- one chunk, one head */

static void find_visible(struct fkv_chunk_job *c) {
    const struct fkv_unit *u = c->u;
    const struct fkv_layer *l = fkv_layer_of(c->job, u);
    const bool appended = l->tokens > u->row->base;
    c->most = 0;
    for (int r = 0; r < u->rows; r++) {
        int64_t query = (u->first_row + r) / c->job->profile->model.group;
        int64_t seen = u->row->base + (appended ? query + 1 : 0) - c->chunk.token;
        c->visible[r] = (int)fkv_max64(0, fkv_min64(seen, c->chunk.tokens));
        c->most = c->visible[r] > c->most ? c->visible[r] : c->most;
    }
}

static const char *chunk_page(const struct fkv_chunk_job *c, int tile) {
    const struct fkv_layer *l = fkv_layer_of(c->job, c->u);
    return c->chunk.kind == FKV_CHUNK_SINK ? l->sink : l->tiles[c->chunk.tile + tile];
}

/* K or V of one tile for the chunk's head: all channels, or the kept ones. */
static const void *panel(const struct fkv_chunk_job *c, int tile, fkv_part part) {
    const struct fkv_profile_object *p = c->job->profile;
    const int head = c->u->head + c->h;
    size_t at = fkv_page_offset(p, c->chunk.kind == FKV_CHUNK_SINK, head, part);
    if (c->chunk.kind == FKV_CHUNK_CODED)
        at = c->job->plan->cache->layouts[c->job->layer].heads[head].kept[part];
    return fkv_element(chunk_page(c, tile), p->storage_dtype, at);
}

const void *fkv_sink_tile(const struct fkv_chunk_job *c) {
    const struct fkv_profile_object *p = c->job->profile;
    const size_t room = (size_t)fkv_page_room(p, true), D = (size_t)p->model.head_dim;
    const char *from = panel(c, 0, FKV_PART_K);
    memset(c->tile, 0, D * FKV_TILE * sizeof *c->tile);
    for (size_t d = 0; d < D; d++)
        memcpy(fkv_element(c->tile, p->storage_dtype, d * FKV_TILE),
               fkv_element(from, p->storage_dtype, d * room),
               room * fkv_dtype_size(p->storage_dtype));
    return c->tile;
}

/* The panel that will be read after this one: keys of all tiles, then values of all tiles. */
static const void *next_panel(const struct fkv_chunk_job *c, int tile, fkv_part part) {
    if (tile + 1 < c->chunk.tiles)
        return panel(c, tile + 1, part);
    return part == FKV_PART_K ? panel(c, 0, FKV_PART_V) : NULL;
}

/* Tile i of a coded chunk: its first grid point within the segment. */
static int64_t grid_of_tile(const struct fkv_chunk_job *c, int tile) {
    const struct fkv_spectrum *sp = c->u->row->seq->shared->spectrum;
    int64_t local = c->chunk.tile + tile - c->chunk.segment * fkv_tiles_per_segment(sp->period);
    return local * (FKV_TILE / sp->taps.cell);
}

static void score_tile(struct fkv_chunk_job *c, int tile) {
    const struct fkv_job *job = c->job;
    const struct fkv_unit *u = c->u;
    const struct fkv_profile_object *p = job->profile;
    if (fkv_coded_scores(job, &c->chunk)) {
        fkv_coded_score(c, tile);
        return;
    }
    const fkv_scores_fn scores = job->kernels->scores[fkv_store_of(p->storage_dtype)];
    const ptrdiff_t first = (ptrdiff_t)c->h * u->rows;
    const bool sinks = c->chunk.kind == FKV_CHUNK_SINK;
    const void *keys = sinks ? fkv_sink_tile(c) : panel(c, tile, FKV_PART_K);
    const void *next = sinks ? NULL : next_panel(c, tile, FKV_PART_K);
    float *s = c->scores + tile * FKV_TILE;
    if (c->chunk.kind != FKV_CHUNK_CODED) {
        scores(s, FKV_CHUNK_TOKENS, u->q + first * u->dim_stride, u->dim_stride, keys,
               p->model.head_dim, u->rows, 0, next);
        return;
    }
    const struct fkv_channels *channels =
        fkv_profile_head(p, job->layer, FKV_PART_K, u->head + c->h);
    if (channels->coded)
        job->kernels->interpolate(s, FKV_CHUNK_TOKENS,
                                  u->grid + segment_grid(u, c->chunk.segment) +
                                      first * u->grid_stride + grid_of_tile(c, tile),
                                  u->grid_stride, &u->row->seq->shared->spectrum->taps, u->rows);
    if (channels->kept)
        scores(s, FKV_CHUNK_TOKENS, u->permuted + first * u->dim_stride, u->dim_stride, keys,
               channels->kept, u->rows, channels->coded > 0, next);
}

/* V of one tile for rows [first, first + rows) that see the same `tokens` of it. */
static void weigh_tile(const struct fkv_chunk_job *c, int tile, int first, int rows, int tokens,
                       const struct fkv_partial *to) {
    const struct fkv_job *job = c->job;
    const struct fkv_unit *u = c->u;
    const struct fkv_profile_object *p = job->profile;
    if (p->coding == FKV_CODING_CALIBRATED && c->chunk.kind == FKV_CHUNK_CODED) {
        fkv_coded_weigh(c, tile, first, rows, tokens);
        return;
    }
    const fkv_weigh_fn weigh = job->kernels->weigh[fkv_store_of(p->storage_dtype)];
    const float *weights = c->scores + (ptrdiff_t)first * FKV_CHUNK_TOKENS + tile * FKV_TILE;
    const void *values = panel(c, tile, FKV_PART_V), *next = next_panel(c, tile, FKV_PART_V);
    if (c->chunk.kind != FKV_CHUNK_CODED) {
        weigh(to->o + (ptrdiff_t)first * u->dim_stride, u->dim_stride, weights, FKV_CHUNK_TOKENS,
              values, p->model.head_dim, tokens, rows, next);
        return;
    }
    const struct fkv_channels *channels =
        fkv_profile_head(p, job->layer, FKV_PART_V, u->head + c->h);
    if (channels->kept)
        weigh(c->kept + (ptrdiff_t)first * u->dim_stride, u->dim_stride, weights, FKV_CHUNK_TOKENS,
              values, channels->kept, tokens, rows, next);
    if (channels->coded)
        job->kernels->spread(to->mass + first * to->mass_stride + grid_of_tile(c, tile) -
                                 grid_of_tile(c, 0),
                             to->mass_stride, weights, FKV_CHUNK_TOKENS,
                             &u->row->seq->shared->spectrum->taps, tokens, rows);
}

static int in_tile(const struct fkv_chunk_job *c, int r, int tile) {
    return (int)fkv_max64(0, fkv_min64(c->visible[r] - tile * FKV_TILE, FKV_TILE));
}

static void weigh_chunk(const struct fkv_chunk_job *c, const struct fkv_partial *to) {
    for (int tile = 0; tile * FKV_TILE < c->most; tile++)
        for (int r = 0, end; r < c->u->rows; r = end) {
            int tokens = in_tile(c, r, tile);
            for (end = r + 1; end < c->u->rows && in_tile(c, end, tile) == tokens;)
                end++;
            if (tokens)
                weigh_tile(c, tile, r, end - r, tokens, to);
        }
}

bool fkv_attend_chunk(const struct fkv_job *job, const struct fkv_unit *u, int h,
                      const struct fkv_chunk *chunk, int thread, const struct fkv_partial *to) {
    const struct fkv_workspace *w = &job->plan->work;
    const size_t floats = (size_t)u->rows * (size_t)u->dim_stride;
    struct fkv_chunk_job c = {.job = job, .u = u, .h = h, .chunk = *chunk, .group = -1};
    c.scores = w->scratches + thread * w->scratch;
    c.kept = c.scores + FKV_UNIT_ROWS * FKV_CHUNK_TOKENS;
    c.tile = c.kept + FKV_UNIT_ROWS * u->dim_stride;
    if (job->profile->coding == FKV_CODING_CALIBRATED)
        fkv_coded_scratch(&c, c.tile + FKV_TILE * u->dim_stride);
    find_visible(&c);
    for (int tile = 0; tile * FKV_TILE < c.most; tile++)
        score_tile(&c, tile);
    for (int r = 0; r < u->rows; r++) {
        to->max[r] = -INFINITY;
        to->sum[r] = 0.0f;
        if (c.visible[r])
            job->kernels->softmax(c.scores + (ptrdiff_t)r * FKV_CHUNK_TOKENS, c.visible[r],
                                  &to->max[r], &to->sum[r]);
    }
    if (!c.most)
        return false;
    memset(to->o, 0, floats * sizeof(float));
    const struct fkv_channels *channels = NULL;
    const bool calibrated = job->profile->coding == FKV_CODING_CALIBRATED;
    if (c.chunk.kind == FKV_CHUNK_CODED) {
        if (!calibrated)
            channels = fkv_profile_head(job->profile, job->layer, FKV_PART_V, u->head + h);
        memset(c.kept, 0, floats * sizeof(float));
        if (to->mass_stride)
            memset(to->mass, 0, (size_t)(u->rows * to->mass_stride) * sizeof(float));
    }
    weigh_chunk(&c, to);
    for (int r = 0; channels && r < u->rows; r++)
        for (int d = 0; d < channels->kept; d++)
            to->o[r * u->dim_stride + channels->list[d]] = c.kept[r * u->dim_stride + d];
    if (calibrated && c.chunk.kind == FKV_CHUNK_CODED)
        fkv_coded_finish(&c, to);
    return true;
}

static bool attend_chunk(const struct fkv_job *job, const struct fkv_unit *u, int h, int64_t index,
                         int thread, const struct fkv_partial *to) {
    const struct fkv_layer *l = fkv_layer_of(job, u);
    const struct fkv_chunk chunk =
        fkv_chunk_at(job->profile, u->row->seq->period, l->tokens, l->n_coded, index);
    return fkv_attend_chunk(job, u, h, &chunk, thread, to);
}

/* ---- merging partials, in the order of the chunks */

static void merge_row(float *to, const float *from, int64_t n, float keep, float add) {
    for (int64_t i = 0; i < n; i++)
        to[i] = to[i] * keep + from[i] * add;
}

static void scale_row(float *row, int64_t n, float keep) {
    if (keep == 1.0f)
        return;
    for (int64_t i = 0; i < n; i++)
        row[i] *= keep;
}

static void merge_chunk(const struct fkv_job *job, const struct fkv_unit *u, int h, int64_t index,
                        const struct fkv_partial *from) {
    const struct fkv_layer *l = fkv_layer_of(job, u);
    const struct fkv_chunk chunk =
        fkv_chunk_at(job->profile, u->row->seq->period, l->tokens, l->n_coded, index);
    for (int r = 0; r < u->rows; r++) {
        const int at = h * u->rows + r;
        if (from->max[r] == -INFINITY)
            continue;
        float max = u->max[at] > from->max[r] ? u->max[at] : from->max[r];
        float keep = expf(u->max[at] - max), add = expf(from->max[r] - max);
        u->max[at] = max;
        u->sum[at] = u->sum[at] * keep + from->sum[r] * add;
        merge_row(u->o + (ptrdiff_t)at * u->dim_stride, from->o + (ptrdiff_t)r * u->dim_stride,
                  job->profile->model.head_dim, keep, add);
        for (int64_t s = 0; s < l->n_segments; s++)
            scale_row(u->mass + segment_grid(u, s) + at * u->grid_stride, u->grid_stride, keep);
        if (chunk.kind != FKV_CHUNK_CODED || !u->row->seq->shared)
            continue;
        const struct fkv_taps *taps = &u->row->seq->shared->spectrum->taps;
        const struct fkv_chunk_job place = {.job = job, .u = u, .h = h, .chunk = chunk};
        float *mass = u->mass + segment_grid(u, chunk.segment) + at * u->grid_stride +
                      grid_of_tile(&place, 0);
        merge_row(mass, from->mass + r * from->mass_stride,
                  chunk.tiles * (FKV_TILE / taps->cell) + taps->width - 1, 1.0f, add);
    }
}

/* ---- end: outputs of the coded channels, normalisation, writing */

static void expand_head(const struct fkv_job *job, const struct fkv_unit *u,
                        const struct fkv_segment *s, int h, float *sums, float *o) {
    const struct fkv_spectrum *sp = u->row->seq->shared->spectrum;
    const struct fkv_channels *c =
        fkv_profile_head(job->profile, job->layer, FKV_PART_V, u->head + h);
    const struct fkv_channel_state *state = head_states(job, u, s, h, FKV_PART_V);
    const enum fkv_store store = fkv_store_of(job->profile->fourier.coefficient_dtype);
    float total[FKV_UNIT_ROWS], ones[FKV_UNIT_ROWS];
    for (int r = 0; r < u->rows; r++) {
        float *row = sums + (ptrdiff_t)r * sp->stride;
        total[r] = row[0];
        weigh_bins(job, sp, row);
        ones[r] = 0.0f;
        for (int n = 0; n < sp->stride; n++)
            ones[r] += row[n] * s->ones[n];
    }
    job->kernels->expand[store](o, MAX_D, sums, sp->stride, segment_rows(job, u, s, h, FKV_PART_V),
                                sp->stride, c->coded, sp->stride, u->rows);
    for (int r = 0; r < u->rows; r++)
        for (int d = 0; d < c->coded; d++)
            u->o[(ptrdiff_t)(h * u->rows + r) * u->dim_stride + c->list[c->kept + d]] +=
                state[d].gain * (o[r * MAX_D + d] + state[d].beta * ones[r]) +
                state[d].offset * total[r];
}

static void end_segments(const struct fkv_job *job, const struct fkv_unit *u, float *scratch) {
    const struct fkv_layer *l = fkv_layer_of(job, u);
    const struct fkv_spectrum *sp = u->row->seq->shared->spectrum;
    float *sums = scratch, *o = sums + FKV_UNIT_ROWS * (ptrdiff_t)sp->stride;
    float *transform = o + FKV_UNIT_ROWS * MAX_D;
    for (int64_t i = 0; i < l->n_segments; i++) {
        const float *mass = u->mass + segment_grid(u, i);
        for (int r = 0; r < u->n_heads * u->rows; r += FKV_FFT_LANES)
            fkv_spectrum_from_grid(sp, job->kernels, mass + r * u->grid_stride, u->grid_stride,
                                   sums + (ptrdiff_t)r * sp->stride, sp->stride, lanes_from(u, r),
                                   transform);
        for (int h = 0; h < u->n_heads; h++)
            expand_head(job, u, l->segments[i], h, sums + (ptrdiff_t)h * u->rows * sp->stride, o);
    }
}

static void write_row(const struct fkv_job *job, const struct fkv_unit *u, int h, int r) {
    const struct fkv_model *m = &job->profile->model;
    const int64_t at = u->first_row + r, token = u->row->offset + at / m->group;
    const int head = (u->head + h) * m->group + (int)(at % m->group), row = h * u->rows + r;
    float *o = u->o + (ptrdiff_t)row * u->dim_stride;
    const float sum = u->sum[row], inverse = sum != 0.0f ? 1.0f / sum : 0.0f;
    for (int d = 0; d < m->head_dim; d++)
        o[d] *= inverse;
    char *to = job->out->data + token * job->out->token_stride + head * job->out->head_stride;
    job->kernels->narrow[fkv_store_of(job->out->dtype)](to, o, (size_t)m->head_dim);
    if (!job->lse && !job->plan->meter)
        return;
    const float lse = sum != 0.0f ? u->max[row] + logf(sum) : -INFINITY;
    if (job->plan->meter)
        fkv_meter_whole(job, u->row, at / m->group, head, o, lse);
    if (job->lse)
        memcpy(job->lse->data + token * job->lse->token_stride + head * job->lse->head_stride, &lse,
               sizeof lse);
}

static void end_unit(const struct fkv_job *job, const struct fkv_unit *u, int thread) {
    const struct fkv_workspace *w = &job->plan->work;
    if (fkv_layer_of(job, u)->n_segments)
        end_segments(job, u, w->scratches + thread * w->scratch);
    for (int h = 0; h < u->n_heads; h++)
        for (int r = 0; r < u->rows; r++)
            write_row(job, u, h, r);
}

/* ---- scheduling */

static void run_unit(void *arg, int64_t index, int thread) {
    const struct fkv_job *job = arg;
    const struct fkv_unit u = unit_at(job, index, thread);
    const struct fkv_partial partial = partial_at(job, &u, thread);
    begin_unit(job, &u, thread);
    for (int h = 0; h < u.n_heads; h++)
        for (int64_t i = 0; i < u.row->n_chunks; i++)
            if (attend_chunk(job, &u, h, i, thread, &partial))
                merge_chunk(job, &u, h, i, &partial);
    end_unit(job, &u, thread);
}

static void run_begin(void *arg, int64_t index, int thread) {
    const struct fkv_job *job = arg;
    const struct fkv_unit u = unit_at(job, index, thread);
    begin_unit(job, &u, thread);
}

/* Items of a row: its units in order, of each all chunks of all heads. */
static int64_t first_item(const struct fkv_job *job, const struct fkv_unit *u, int64_t unit) {
    const int64_t blocks = u->row->blocks, heads = job->profile->model.n_kv_heads;
    const int64_t local = unit - u->row->first_unit;
    const int64_t heads_before = local / blocks * u->row->heads_per_unit;
    const int64_t here = fkv_min64(u->row->heads_per_unit, heads - heads_before);
    return u->row->first_item + (heads_before * blocks + local % blocks * here) * u->row->n_chunks;
}

static void run_chunk(void *arg, int64_t item, int thread) {
    const struct fkv_job *job = arg;
    const struct fkv_plan_object *plan = job->plan;
    int64_t row = 0;
    while (row + 1 < plan->n_rows && plan->rows[row + 1].first_item <= item)
        row++;
    const struct fkv_row *at = &plan->rows[row];
    const int64_t local = (item - at->first_item) / at->n_chunks; /* (unit, head) */
    const int64_t full = at->heads_per_unit * at->blocks, group = local / full;
    const int64_t here =
        fkv_min64(at->heads_per_unit, job->profile->model.n_kv_heads - group * at->heads_per_unit);
    const int64_t rest = local - group * full;
    const int64_t unit = at->first_unit + group * at->blocks + rest / here;
    const struct fkv_unit u = unit_at(job, unit, thread);
    const struct fkv_partial partial = partial_at(job, &u, item);
    attend_chunk(job, &u, (int)(rest % here), (item - at->first_item) % at->n_chunks, thread,
                 &partial);
}

static void run_end(void *arg, int64_t index, int thread) {
    const struct fkv_job *job = arg;
    const struct fkv_unit u = unit_at(job, index, thread);
    int64_t item = first_item(job, &u, index);
    for (int h = 0; h < u.n_heads; h++)
        for (int64_t i = 0; i < u.row->n_chunks; i++, item++) {
            const struct fkv_partial partial = partial_at(job, &u, item);
            merge_chunk(job, &u, h, i, &partial);
        }
    end_unit(job, &u, thread);
}

void fkv_attend_rows(struct fkv_plan_object *plan, int layer, const struct fkv_view *q,
                     const struct fkv_view *out, const struct fkv_view *lse) {
    struct fkv_job job = {plan, plan->cache->profile, plan->ctx->kernels, layer, q, out, lse};
    int64_t items = 0;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        struct fkv_row *row = &plan->rows[i];
        const struct fkv_layer *l = &row->seq->layers[layer];
        row->n_chunks = fkv_chunk_count(job.profile, row->seq->period, l->tokens, l->n_coded);
        row->first_item = items;
        items += row->blocks * job.profile->model.n_kv_heads * row->n_chunks;
    }
    if (!plan->work.by_chunk) {
        fkv_pool_run(plan->ctx->pool, plan->units, run_unit, &job);
        return;
    }
    fkv_pool_run(plan->ctx->pool, plan->units, run_begin, &job);
    fkv_pool_run(plan->ctx->pool, items, run_chunk, &job);
    fkv_pool_run(plan->ctx->pool, plan->units, run_end, &job);
}
