/* SPDX-License-Identifier: Apache-2.0 */
/* Which tokens a party sees: scores of raw queries and keys, the top k of each query head, votes, spans. */
#include "attend/longcache.h"
#include "codec/rope.h"

#include <math.h>
#include <string.h>

#define MAX_D FKV_MAX_HEAD_DIM

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

/* ---- scanning */

struct scan {
    const struct fkv_longjob *job;
    const struct fkv_party *party;
    int head, rows;
    int64_t first_row, range;
    int stride;
    float *q;        /* [rows][stride] */
    float *permuted; /* the same as coded tiles hold their channels */
    float *folded;   /* permuted, times the scales of a group */
    float *scores;   /* [rows][64] */
    float *tile;     /* [D][64]: a tile's keys as f32, when many rows read them */
    float base[FKV_SCAN_ROWS], constant[FKV_SCAN_ROWS];
    float limit[FKV_SCAN_ROWS]; /* a row's least pick, once it has all */
    int held[FKV_SCAN_ROWS];
    int64_t group;
};

static struct scan scan_at(const struct fkv_longjob *job, int64_t unit, int thread) {
    const struct fkv_longcache *lc = job->lc;
    const struct fkv_party *party = &lc->parties[job->round->first];
    while (unit >=
           party->scan + party->scan_blocks * party->ranges * job->profile->model.n_kv_heads)
        party++;
    const int64_t local = unit - party->scan, per_head = party->scan_blocks * party->ranges;
    const int64_t group = job->profile->model.group;
    struct scan s = {.job = job,
                     .party = party,
                     .head = (int)(local / per_head),
                     .first_row = local % per_head / party->ranges * FKV_SCAN_ROWS,
                     .range = local % party->ranges,
                     .group = -1};
    s.rows = (int)fkv_min64(FKV_SCAN_ROWS, party->count * group - s.first_row);
    s.stride = (int)fkv_round16(job->profile->model.head_dim);
    s.q = lc->scratches + thread * lc->scratch;
    s.permuted = s.q + FKV_SCAN_ROWS * s.stride;
    s.folded = s.permuted + FKV_SCAN_ROWS * s.stride;
    s.scores = s.folded + FKV_SCAN_ROWS * s.stride;
    s.tile = s.scores + FKV_SCAN_ROWS * FKV_TILE;
    return s;
}

/* Row r of a party's head is query r / G and query head r % G of the group. */
static void load_queries(struct scan *s) {
    const struct fkv_longjob *job = s->job;
    const struct fkv_model *m = &job->profile->model;
    const struct fkv_residuals *k =
        fkv_profile_residuals(job->profile, job->layer, FKV_PART_K, s->head);
    const float *carrier = fkv_profile_carrier(job->profile, job->layer, FKV_PART_K, s->head);
    for (int r = 0; r < s->rows; r++) {
        const int64_t at = s->first_row + r;
        const int64_t token =
            job->plan->rows[s->party->row].offset + s->party->first + at / m->group;
        float *q = s->q + (ptrdiff_t)r * s->stride,
              *permuted = s->permuted + (ptrdiff_t)r * s->stride;
        fkv_load_head(job->kernels, job->q, token, s->head * m->group + (int)(at % m->group),
                      m->head_dim, q);
        s->constant[r] = 0.0f;
        for (int d = 0; d < m->head_dim; d++) {
            permuted[d] = q[k->list[d]];
            if (d >= k->count[FKV_WIDTH_EXACT])
                s->constant[r] += permuted[d] * carrier[k->list[d]];
        }
        s->limit[r] = -INFINITY;
        s->held[r] = 0;
    }
}

static void score_exact(const struct scan *s, bool sinks, const struct fkv_place *place,
                        const void *next) {
    const struct fkv_profile_object *p = s->job->profile;
    const struct fkv_kernels *kernels = s->job->kernels;
    const enum fkv_store store = fkv_store_of(p->storage_dtype);
    const int D = p->model.head_dim;
    if (s->rows < 12 || store == FKV_STORE_F32 || sinks) {
        const void *keys = sinks ? fkv_spread_sinks(s->job, place, s->tile) : place->exact;
        kernels->scores[store](s->scores, FKV_TILE, s->q, s->stride, keys, D, s->rows, 0, next);
        return;
    }
    kernels->widen[store](s->tile, place->exact, (size_t)D * FKV_TILE);
    kernels->scores[FKV_STORE_F32](s->scores, FKV_TILE, s->q, s->stride, s->tile, D, s->rows, 0,
                                   NULL);
}

static void score_coded(struct scan *s, const struct fkv_place *place,
                        const struct fkv_place *next) {
    const struct fkv_profile_object *p = s->job->profile;
    const struct fkv_kernels *kernels = s->job->kernels;
    const struct fkv_residuals *k = fkv_profile_residuals(p, s->job->layer, FKV_PART_K, s->head);
    const int exact = k->count[FKV_WIDTH_EXACT];
    if (place->group != s->group) {
        kernels->fold(s->folded, s->stride, s->base, s->permuted + exact, s->stride, place->scale,
                      place->zero, k->quantised, s->rows);
        for (int r = 0; r < s->rows; r++)
            s->base[r] += s->constant[r];
        s->group = place->group;
    }
    kernels->scores_packed(s->scores, FKV_TILE, s->folded, s->stride, s->base, place->codes,
                           k->count + FKV_WIDTH_8, s->rows, 0, k->quantised ? next->codes : NULL);
    if (exact)
        kernels->scores[fkv_store_of(p->storage_dtype)](s->scores, FKV_TILE, s->permuted, s->stride,
                                                        place->exact, exact, s->rows, 1,
                                                        next->exact);
}

/* Into a list in descending order; equal scores stay in the order in which they came, which is that of the tokens.
 * Returns the number held. */
static int insert(struct fkv_pick *list, int held, int room, float score, int64_t index) {
    int at = held < room ? held : room - 1;
    if (held == room && !(score > list[at].score))
        return held;
    for (; at > 0 && score > list[at - 1].score; at--)
        list[at] = list[at - 1];
    list[at] = (struct fkv_pick){score, (int32_t)index};
    return held < room ? held + 1 : room;
}

static struct fkv_pick *list_of(const struct scan *s, int r) {
    const int64_t rows = s->party->count * s->job->profile->model.group;
    const int64_t list = (s->head * rows + s->first_row + r) * s->party->ranges + s->range;
    return s->job->lc->picks + s->party->picks + list * s->job->lc->params.top_k;
}

/* Slots `mask` of a page whose first token is `first`. */
static void pick_page(struct scan *s, int64_t first, uint64_t mask) {
    const int room = s->job->lc->params.top_k;
    uint64_t over[FKV_SCAN_ROWS];
    s->job->kernels->over(over, s->scores, FKV_TILE, s->limit, s->rows);
    for (int r = 0; r < s->rows; r++) {
        struct fkv_pick *list = list_of(s, r);
        for (uint64_t bits = over[r] & mask; bits; bits &= bits - 1) {
            const int t = __builtin_ctzll(bits);
            s->held[r] = insert(list, s->held[r], room, s->scores[r * FKV_TILE + t], first + t);
        }
        if (s->held[r] == room)
            s->limit[r] = list[room - 1].score;
    }
}

void fkv_scan_unit(void *arg, int64_t unit, int thread) {
    const struct fkv_longjob *job = arg;
    const struct fkv_profile_object *p = job->profile;
    struct scan s = scan_at(job, unit, thread);
    const struct fkv_run middle = s.party->middle;
    const int64_t begin = fkv_page_of(p, middle.first),
                  pages = fkv_page_of(p, middle.end - 1) + 1 - begin;
    const int64_t from = begin + pages * s.range / s.party->ranges;
    const int64_t until = begin + pages * (s.range + 1) / s.party->ranges;
    load_queries(&s);
    for (int64_t page = from; page < until; page++) {
        const int64_t first = fkv_page_first(p, page);
        const int64_t low = fkv_max64(0, middle.first - first);
        const int64_t high =
            fkv_min64(fkv_min64(FKV_TILE, middle.end - first), page < 0 ? fkv_sinks(p) : FKV_TILE);
        const struct fkv_place place = fkv_page_place(job, s.party, page, s.head, FKV_PART_K);
        struct fkv_place next = {0};
        if (page + 1 < until)
            next = fkv_page_place(job, s.party, page + 1, s.head, FKV_PART_K);
        if (place.codes)
            score_coded(&s, &place, &next);
        else
            score_exact(&s, page < 0, &place, next.codes ? NULL : next.exact);
        pick_page(&s, first, (~UINT64_C(0) >> (64 - (high - low))) << low);
    }
    for (int r = 0; r < s.rows; r++)
        for (int i = s.held[r]; i < job->lc->params.top_k; i++)
            list_of(&s, r)[i].index = -1;
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
    const struct fkv_pick *list = job->lc->picks + party->picks;
    int64_t n = 0;
    for (int64_t r = 0; r < rows; r++) {
        struct fkv_pick best[FKV_MAX_TOP_K];
        int held = 0;
        for (int64_t i = 0; i < party->ranges * k; i++, list++)
            if (list->index >= 0)
                held = insert(best, held, k, list->score, list->index);
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
