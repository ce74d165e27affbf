/* SPDX-License-Identifier: Apache-2.0 */
/* The top k keys of each query head: scores of raw queries and keys, page by page. */
#include "attend/scan.h"
#include "codec/rope.h"

#include <math.h>

struct fkv_scan fkv_scan_at(const struct fkv_longjob *job, int64_t unit, int thread) {
    const struct fkv_longcache *lc = job->lc;
    const struct fkv_party *party = &lc->parties[job->round->first];
    while (unit >=
           party->scan + party->scan_blocks * party->ranges * job->profile->model.n_kv_heads)
        party++;
    const int64_t local = unit - party->scan, per_head = party->scan_blocks * party->ranges;
    const int64_t group = job->profile->model.group;
    struct fkv_scan s = {.job = job,
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
    s.y[0] = s.tile + s.stride * FKV_TILE;
    s.y[1] = s.y[0] + FKV_SCAN_ROWS * s.stride;
    s.lows = s.y[1] + FKV_SCAN_ROWS * s.stride;
    s.z = (int8_t *)(s.lows + FKV_SCAN_ROWS * lc->params.top_k);
    return s;
}

/* Row r of a party's head is query r / G and query head r % G of the group. */
static void load_queries(struct fkv_scan *s) {
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

static void score_exact(const struct fkv_scan *s, bool sinks, const struct fkv_place *place,
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

static void score_coded(struct fkv_scan *s, const struct fkv_place *place,
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

static bool better(struct fkv_pick a, struct fkv_pick b) {
    return a.score > b.score || (a.score == b.score && a.index < b.index);
}

int fkv_pick_insert(struct fkv_pick *list, int held, int room, struct fkv_pick pick) {
    int at = held < room ? held : room - 1;
    if (held == room && !better(pick, list[at]))
        return held;
    for (; at > 0 && better(pick, list[at - 1]); at--)
        list[at] = list[at - 1];
    list[at] = pick;
    return held < room ? held + 1 : room;
}

int64_t fkv_scan_list(const struct fkv_scan *s, int r) {
    const int64_t rows = s->party->count * s->job->profile->model.group;
    return s->party->list + (s->head * rows + s->first_row + r) * s->party->ranges + s->range;
}

void fkv_scan_add(struct fkv_scan *s, int r, float score, int64_t index) {
    const int room = s->job->lc->params.top_k;
    struct fkv_pick *list = s->job->lc->picks + fkv_scan_list(s, r) * room;
    if (!(score > -INFINITY))
        return;
    s->held[r] = fkv_pick_insert(list, s->held[r], room, (struct fkv_pick){score, (int32_t)index});
    if (s->held[r] == room && list[room - 1].score > s->limit[r])
        s->limit[r] = list[room - 1].score;
    if (s->sifting)
        fkv_sift_raise(s, r, score);
}

/* Slots `mask` of a page whose scores are there. Tokens come in ascending order: one that is as good as the last of
 * a full list is not better. */
static void pick_page(struct fkv_scan *s, int64_t first, uint64_t mask) {
    uint64_t over[FKV_SCAN_ROWS];
    s->job->kernels->over(over, s->scores, FKV_TILE, s->limit, s->rows);
    for (int r = 0; r < s->rows; r++)
        for (uint64_t bits = over[r] & mask; bits; bits &= bits - 1) {
            const int t = __builtin_ctzll(bits);
            fkv_scan_add(s, r, s->scores[r * FKV_TILE + t], first + t);
        }
}

void fkv_scan_exact(struct fkv_scan *s, const struct fkv_place *place, bool sinks, const void *next,
                    int64_t first, uint64_t mask) {
    score_exact(s, sinks, place, next);
    pick_page(s, first, mask);
}

/* The slots of a page that are in the middle. */
static uint64_t slots_of(const struct fkv_scan *s, int64_t page) {
    const struct fkv_profile_object *p = s->job->profile;
    const struct fkv_run middle = s->party->middle;
    const int64_t first = fkv_page_first(p, page), low = fkv_max64(0, middle.first - first);
    const int64_t high =
        fkv_min64(fkv_min64(FKV_TILE, middle.end - first), page < 0 ? fkv_sinks(p) : FKV_TILE);
    return (~UINT64_C(0) >> (64 - (high - low))) << low;
}

static void scan_page(struct fkv_scan *s, int64_t page, bool last) {
    const int64_t first = fkv_page_first(s->job->profile, page);
    const uint64_t mask = slots_of(s, page);
    if (fkv_sift_has(s, page)) {
        fkv_sift_page(s, page, mask);
        return;
    }
    const struct fkv_place place = fkv_page_place(s->job, s->party, page, s->head, FKV_PART_K);
    struct fkv_place next = {0};
    if (!last)
        next = fkv_page_place(s->job, s->party, page + 1, s->head, FKV_PART_K);
    if (place.codes) {
        score_coded(s, &place, &next);
        pick_page(s, first, mask);
        return;
    }
    fkv_scan_exact(s, &place, page < 0, next.codes ? NULL : next.exact, first, mask);
}

void fkv_scan_unit(void *arg, int64_t unit, int thread) {
    const struct fkv_longjob *job = arg;
    const struct fkv_profile_object *p = job->profile;
    const int k = job->lc->params.top_k;
    struct fkv_scan s = fkv_scan_at(job, unit, thread);
    const struct fkv_run middle = s.party->middle;
    const int64_t begin = fkv_page_of(p, middle.first),
                  pages = fkv_page_of(p, middle.end - 1) + 1 - begin;
    const int64_t from = begin + pages * s.range / s.party->ranges;
    const int64_t until = begin + pages * (s.range + 1) / s.party->ranges;
    load_queries(&s);
    if (job->lc->maybes)
        fkv_sift_begin(&s, until);
    for (int64_t page = from; page < until; page++)
        scan_page(&s, page, page + 1 == until);
    fkv_sift_end(&s);
    for (int r = 0; r < s.rows; r++)
        for (int i = s.held[r]; i < k; i++)
            job->lc->picks[fkv_scan_list(&s, r) * k + i].index = -1;
}
