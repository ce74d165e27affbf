/* SPDX-License-Identifier: Apache-2.0 */
/* Which tokens a party sees, from the top k of each query head: votes, spans, pieces. scan.c finds those. */
#include "attend/scan.h"

#include <math.h>
#include <string.h>

struct fkv_place fkv_page_place(const struct fkv_longjob *job, const struct fkv_party *party,
                                int64_t page, int head, fkv_part part) {
    const struct fkv_profile_object *p = job->profile;
    const struct fkv_layer *l = fkv_party_layer(job, party);
    if (page < 0 || page >= l->n_coded) {
        const void *at = page < 0 ? l->sink : l->tiles[page];
        return (struct fkv_place){
            .exact = fkv_element(at, p->storage_dtype, fkv_page_offset(p, page < 0, head, part)),
            .group = -1};
    }
    const struct fkv_head_layout *layout = &job->plan->cache->layouts[job->layer].heads[head];
    const struct fkv_residuals *r = fkv_profile_residuals(p, job->layer, part, head);
    const int64_t in_block = page % fkv_tiles_per_block(p);
    const char *block = fkv_block_of(p, l, page);
    struct fkv_place place = {
        .exact = block + layout->tiles[part] + (size_t)in_block * layout->tile_bytes[part],
        .scale = (const uint16_t *)(const void *)(block + layout->scales[part]) +
                 in_block * FKV_TILE / p->codec.group * 2 * r->quantised,
        .group = page * FKV_TILE / p->codec.group,
    };
    if (r->count[FKV_WIDTH_EXACT] == p->model.head_dim) /* the tile is a panel like any other */
        return place;
    place.codes = place.exact + fkv_exact_tile_bytes(p, r);
    place.zero = place.scale + r->quantised;
    return place;
}

const void *fkv_spread_sinks(const struct fkv_longjob *job, const struct fkv_place *place,
                             void *to) {
    const struct fkv_profile_object *p = job->profile;
    const size_t room = (size_t)fkv_page_room(p, true), size = fkv_dtype_size(p->storage_dtype);
    for (size_t d = 0; d < (size_t)p->model.head_dim; d++) {
        char *row = (char *)to + d * FKV_TILE * size;
        memcpy(row, place->exact + d * room * size, room * size);
        memset(row + room * size, 0, (FKV_TILE - room) * size);
    }
    return to;
}

/* ---- choosing */

/* By index, eleven bits at a time; `spare` has as much room. Returns where the result is. */
static uint32_t *sort_indices(uint32_t *x, uint32_t *spare, int64_t n, int64_t below) {
    for (int shift = 0; below >> shift; shift += 11) {
        uint32_t starts[2049] = {0};
        for (int64_t i = 0; i < n; i++)
            starts[(x[i] >> shift & 2047) + 1]++;
        for (int b = 0; b < 2048; b++)
            starts[b + 1] += starts[b];
        for (int64_t i = 0; i < n; i++)
            spare[starts[x[i] >> shift & 2047]++] = x[i];
        uint32_t *swap = x;
        x = spare;
        spare = swap;
    }
    return x;
}

/* The top k of each query head over all ranges, one vote each. */
static int64_t collect_votes(const struct fkv_longjob *job, const struct fkv_party *party,
                             uint32_t *votes) {
    const int k = job->lc->params.top_k;
    const int64_t rows = party->count * job->profile->model.n_q_heads;
    const struct fkv_pick *list = job->lc->picks + party->list * k;
    int64_t n = 0;
    for (int64_t r = 0; r < rows; r++) {
        struct fkv_pick best[FKV_MAX_TOP_K];
        int held = 0;
        for (int64_t i = 0; i < party->ranges * k; i++, list++)
            if (list->index >= 0)
                held = fkv_pick_insert(best, held, k, *list);
        for (int i = 0; i < held; i++)
            votes[n++] = (uint32_t)best[i].index;
    }
    return n;
}

/* Keeps the `clip` tokens of most votes, of equal ones the lower, in ascending order; returns their number. votes
 * are sorted; counts has room for the most votes of a token and one. */
static int64_t clip_votes(uint32_t *votes, int64_t n, int64_t clip, uint32_t *counts,
                          int64_t voters) {
    int64_t kept = 0, over = 0, least = voters;
    memset(counts, 0, (size_t)(voters + 1) * sizeof *counts);
    for (int64_t i = 0, end; i < n; i = end) {
        for (end = i + 1; end < n && votes[end] == votes[i];)
            end++;
        counts[end - i]++;
    }
    while (least > 0 && over + counts[least] <= clip)
        over += counts[least--];
    int64_t ties = clip - over; /* of those with `least` votes */
    for (int64_t i = 0, end; i < n; i = end) {
        for (end = i + 1; end < n && votes[end] == votes[i];)
            end++;
        if (end - i > least || (least > 0 && end - i == least && ties-- > 0))
            votes[kept++] = votes[i];
    }
    return kept;
}

static int64_t add_run(struct fkv_run *runs, int64_t n, int64_t first, int64_t end) {
    if (first >= end)
        return n;
    if (n && runs[n - 1].end >= first) {
        runs[n - 1].end = fkv_max64(runs[n - 1].end, end);
        return n;
    }
    runs[n] = (struct fkv_run){first, end};
    return n + 1;
}

/* Spans of the party's middle, in ascending order and apart. */
static int64_t choose_spans(const struct fkv_longjob *job, const struct fkv_party *party,
                            int thread, struct fkv_run *spans) {
    const struct fkv_longcache *lc = job->lc;
    const fkv_select_params *params = &lc->params;
    if (!party->ranges) /* nothing was scanned */
        return 0;
    uint32_t *votes = lc->sorting + thread * (2 * lc->votes + lc->voters + 1);
    int64_t n = collect_votes(job, party, votes), spans_n = 0;
    uint32_t *sorted = sort_indices(votes, votes + lc->votes, n, party->middle.end);
    n = clip_votes(sorted, n, params->clip, votes + 2 * lc->votes, lc->voters);
    for (int64_t i = 0; i < n; i++) {
        const int64_t centre = sorted[i];
        spans_n = add_run(spans, spans_n, fkv_max64(party->middle.first, centre - params->span / 2),
                          fkv_min64(party->middle.end, centre + (params->span + 1) / 2));
    }
    return spans_n;
}

static int64_t cut_pieces(const struct fkv_profile_object *p, const struct fkv_run *runs, int64_t n,
                          struct fkv_piece *pieces, int64_t *width) {
    int64_t count = 0, position = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t t = runs[i].first; t < runs[i].end;) {
            const int64_t page = fkv_page_of(p, t), first = fkv_page_first(p, page);
            const int64_t end = fkv_min64(runs[i].end, page < 0 ? fkv_sinks(p) : first + FKV_TILE);
            pieces[count++] = (struct fkv_piece){.page = page,
                                                 .position = position - (t - first),
                                                 .from = (int)(t - first),
                                                 .end = (int)(end - first)};
            position += end - t;
            t = end;
        }
    *width = position;
    return count;
}

/* Tiles whose values come from codes. Where all channels are exact it is as if nothing were coded: how much is, then
 * has no influence on the chunks. */
static int64_t coded_tiles(const struct fkv_longjob *job, const struct fkv_party *party) {
    const struct fkv_model *m = &job->profile->model;
    for (int h = 0; h < m->n_kv_heads; h++)
        if (fkv_profile_residuals(job->profile, job->layer, FKV_PART_V, h)->count[FKV_WIDTH_EXACT] <
            m->head_dim)
            return fkv_party_layer(job, party)->n_coded;
    return 0;
}

/* Chunks of pieces that are held alike. */
static int64_t cut_chunks(const struct fkv_piece *pieces, int64_t n, int64_t coded,
                          int32_t *chunks) {
    int64_t count = 0;
    bool last = false;
    for (int64_t i = 0, in = 0; i < n; i++, in++) {
        const bool now = pieces[i].page >= 0 && pieces[i].page < coded;
        if (i && now == last && in < FKV_CHUNK_PIECES)
            continue;
        chunks[count++] = (int32_t)i;
        last = now;
        in = 0;
    }
    chunks[count] = (int32_t)n;
    return count;
}

/* What turns queries back, so that slot t of the piece is at angle (t - 31.5) w: the slots' table serves all. */
static void turn_pieces(const struct fkv_longjob *job, const struct fkv_piece *pieces, int64_t n,
                        float *turns) {
    const struct fkv_waves *w = job->profile->waves;
    for (int64_t i = 0; w && i < n; i++) {
        const int64_t at = pieces[i].position + FKV_TILE; /* never negative */
        const double *x = job->lc->coarse + at / FKV_TILE * 2 * w->pairs;
        const double *y = job->lc->fine + at % FKV_TILE * 2 * w->pairs;
        for (int j = 0; j < w->pairs; j++, x += 2, y += 2) {
            turns[j] = (float)(x[0] * y[0] - x[1] * y[1]);
            turns[w->pairs + j] = (float)(x[1] * y[0] + x[0] * y[1]);
        }
        turns += 2 * w->pairs;
    }
}

void fkv_choose(void *arg, int64_t index, int thread) {
    const struct fkv_longjob *job = arg;
    struct fkv_longcache *lc = job->lc;
    struct fkv_party *party = &lc->parties[job->round->first + index];
    struct fkv_run *runs = lc->runs + thread * lc->runs_most, *spans = runs + lc->clip + 2;
    const struct fkv_run middle = party->middle;
    const int64_t pairs = job->profile->waves ? job->profile->waves->pairs : 0;
    struct fkv_piece *pieces = lc->pieces + index * lc->pieces_most;
    int64_t n = 0, spans_n = choose_spans(job, party, thread, spans);
    n = add_run(runs, n, 0, middle.first);
    for (int64_t i = 0; i < spans_n; i++)
        n = add_run(runs, n, spans[i].first, spans[i].end);
    n = add_run(runs, n, middle.end, party->tokens);
    party->pieces = cut_pieces(job->profile, runs, n, pieces, &party->width);
    party->chunks = cut_chunks(pieces, party->pieces, coded_tiles(job, party),
                               lc->chunks + index * (lc->chunks_most + 1));
    turn_pieces(job, pieces, party->pieces, lc->turns + index * lc->pieces_most * 2 * pairs);
    if (!party->last)
        return;
    lc->chosen[party->row] = (struct fkv_chosen){party->tokens, party->width, spans_n, middle};
    if (spans_n)
        memcpy(lc->spans + party->row * lc->clip, spans, (size_t)spans_n * sizeof *spans);
}
