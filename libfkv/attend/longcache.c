/* SPDX-License-Identifier: Apache-2.0 */
/* How a step is cut into parties and rounds, what they need of workspace, and in which order they run. */
#include "attend/longcache.h"

#include <math.h>
#include <string.h>

int64_t fkv_select_scope(const fkv_select_params *p) {
    const int64_t spans = p->top_k ? (int64_t)p->clip * p->span : 0;
    return (int64_t)p->n_global + spans + p->n_local;
}

/* ---- parties and rounds; with lc->parties NULL they are only counted */

static void add_party(struct fkv_longcache *lc, int64_t row, const struct fkv_row *at,
                      int64_t first, int64_t count) {
    const fkv_select_params *params = &lc->params;
    struct fkv_party party = {.row = row, .first = first, .count = count};
    party.tokens = at->base + first + count;
    party.last = first + count == at->n_new;
    if (party.tokens > fkv_select_scope(params))
        party.middle = (struct fkv_run){params->n_global, party.tokens - params->n_local};
    lc->votes = fkv_max64(lc->votes, count);
    if (lc->parties)
        lc->parties[lc->parties_n] = party;
    lc->parties_n++;
}

static void cut_parties(const struct fkv_plan_object *plan, struct fkv_longcache *lc) {
    lc->parties_n = lc->votes = 0;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        const struct fkv_row *row = &plan->rows[i];
        for (int64_t t = 0, n; t < row->n_new; t += n) {
            const int64_t chunk = lc->params.chunk;
            n = fkv_min64(row->n_new - t, chunk - (row->base + t) % chunk);
            add_party(lc, i, row, t, n);
        }
    }
}

/* A party's share in the scan: ranges enough for all threads, if its rows alone are not. */
static void size_scan(const struct fkv_plan_object *plan, const struct fkv_longcache *lc,
                      struct fkv_party *party, int64_t parties) {
    const struct fkv_profile_object *p = plan->cache->profile;
    const struct fkv_model *m = &p->model;
    party->scan_blocks = fkv_ceil_div(party->count * m->group, FKV_SCAN_ROWS);
    party->ranges = 0;
    if (party->middle.first >= party->middle.end || !lc->params.top_k || !lc->params.clip)
        return;
    const int64_t units = parties * party->scan_blocks * m->n_kv_heads;
    const int64_t threads = plan->ctx->threads, wanted = threads > 1 ? 4 * threads : 1;
    const int64_t pages =
        fkv_page_of(p, party->middle.end - 1) + 1 - fkv_page_of(p, party->middle.first);
    party->ranges = fkv_max64(1, fkv_min64(fkv_ceil_div(wanted, units), pages / 8));
}

/* Rounds of as many parties as have no more queries than the largest. */
static void cut_rounds(const struct fkv_plan_object *plan, struct fkv_longcache *lc) {
    const struct fkv_model *m = &plan->cache->profile->model;
    lc->rounds_n = lc->round_most = lc->lists_n = lc->items_most = 0;
    for (int64_t i = 0, end; i < lc->parties_n; i = end) {
        struct fkv_round round = {.first = i};
        int64_t queries = 0, lists = 0;
        for (end = i; end < lc->parties_n && queries + lc->parties[end].count <= lc->votes; end++)
            queries += lc->parties[end].count;
        round.count = end - i;
        for (int64_t j = i; j < end; j++) {
            struct fkv_party *party = &lc->parties[j];
            size_scan(plan, lc, party, round.count);
            party->scan = round.scans;
            party->list = lists;
            party->unit = round.units;
            lc->ranges_most = fkv_max64(lc->ranges_most, party->ranges);
            party->blocks = fkv_ceil_div(party->count * m->group, FKV_UNIT_ROWS);
            round.scans += party->scan_blocks * party->ranges * m->n_kv_heads;
            round.units += party->blocks * m->n_kv_heads;
            round.rows += party->count * m->n_q_heads;
            lists += party->count * m->n_q_heads * party->ranges;
        }
        lc->rounds[lc->rounds_n++] = round;
        lc->round_most = fkv_max64(lc->round_most, round.count);
        lc->lists_n = fkv_max64(lc->lists_n, lists);
        lc->items_most = fkv_max64(lc->items_most, round.units);
    }
}

/* ---- sizes */

static void size_views(const struct fkv_plan_object *plan, struct fkv_longcache *lc) {
    const fkv_select_params *params = &lc->params;
    const struct fkv_profile_object *p = plan->cache->profile;
    int64_t widest = 0;
    for (int64_t i = 0; i < lc->parties_n; i++)
        widest = fkv_max64(widest, fkv_min64(lc->parties[i].tokens, fkv_select_scope(params)));
    lc->clip = fkv_min64(params->clip, widest);
    const int64_t runs = lc->clip + 2;
    lc->runs_most = 2 * runs;
    lc->pieces_most = widest / FKV_TILE + 2 * runs + 1;
    lc->chunks_most = lc->pieces_most / FKV_CHUNK_PIECES + 3;
    lc->turns_n = widest / FKV_TILE + 3;
    const int64_t stride = fkv_round16(p->model.head_dim);
    const int64_t view =
        FKV_UNIT_ROWS * (FKV_CHUNK_PIECES * FKV_TILE + 2 * stride) + 2 * stride * FKV_TILE;
    const int64_t sift = plan->cache->indexed ? 3 * stride + params->top_k : 0;
    const int64_t scan = FKV_SCAN_ROWS * (3 * stride + FKV_TILE + sift) + stride * FKV_TILE;
    lc->scratch = fkv_max64(view, scan) + 64;
    if (plan->cache->indexed) /* a row's candidates of all ranges */
        lc->scratch =
            fkv_max64(lc->scratch,
                      FKV_MAX_HEAD_DIM + 64 +
                          3 * lc->ranges_most * (fkv_maybes_room(params->top_k) + params->top_k));
    lc->state = FKV_UNIT_ROWS * (2 * stride + 2) + 32;
    lc->partial = FKV_UNIT_ROWS * (stride + 2) + 32;
    lc->voters = lc->votes * p->model.n_q_heads;
    lc->votes = lc->voters * params->top_k;
}

static void size_units(const struct fkv_plan_object *plan, struct fkv_longcache *lc) {
    const int64_t threads = plan->ctx->threads;
    lc->by_chunk = threads > 1 && lc->items_most < 4 * threads;
    lc->states_n = lc->by_chunk ? lc->items_most : threads;
    lc->items_most *= lc->chunks_most;
    lc->partials_n = lc->by_chunk ? lc->items_most : threads;
}

/* One block of the heap, cut into arrays: first measured with base NULL, then with it. */
struct carver {
    char *base;
    size_t at;
    bool overflow;
};

static void *carve(struct carver *c, int64_t count, int64_t size, size_t element) {
    size_t bytes = 0;
    const size_t at = c->at;
    if (!fkv_mul_size((size_t)count, (size_t)size, &bytes) ||
        !fkv_mul_size(bytes, element, &bytes) || !fkv_add_size(bytes, 63 + c->at, &c->at))
        c->overflow = true;
    c->at = c->at / 64 * 64;
    return c->base ? c->base + at : NULL;
}

static void carve_all(struct carver *c, const struct fkv_plan_object *plan,
                      struct fkv_longcache *lc) {
    const int64_t threads = plan->ctx->threads;
    const struct fkv_waves *w = plan->cache->profile->waves;
    const int64_t pairs = w ? w->pairs : 0;
    const int top_k = lc->params.top_k;
    carve(c, 1, 1, sizeof *lc);
    lc->parties = carve(c, lc->parties_n, 1, sizeof *lc->parties);
    lc->rounds = carve(c, lc->parties_n, 1, sizeof *lc->rounds);
    lc->pieces = carve(c, lc->round_most, lc->pieces_most, sizeof *lc->pieces);
    lc->chunks = carve(c, lc->round_most, lc->chunks_most + 1, sizeof *lc->chunks);
    lc->turns = carve(c, lc->round_most * lc->pieces_most, 2 * pairs, sizeof *lc->turns);
    lc->runs = carve(c, threads, lc->runs_most, sizeof *lc->runs);
    lc->picks = carve(c, lc->lists_n, top_k, sizeof *lc->picks);
    lc->maybes = NULL;
    if (plan->cache->indexed && top_k) {
        lc->maybes = carve(c, lc->lists_n, fkv_maybes_room(top_k), sizeof *lc->maybes);
        lc->maybes_n = carve(c, lc->lists_n, 1, sizeof *lc->maybes_n);
    }
    lc->sorting = carve(c, threads, 2 * lc->votes + lc->voters + 1, sizeof *lc->sorting);
    lc->chosen = carve(c, plan->n_rows, 1, sizeof *lc->chosen);
    lc->spans = carve(c, plan->n_rows, lc->clip, sizeof *lc->spans);
    lc->fine = carve(c, FKV_TILE, 2 * pairs, sizeof *lc->fine);
    lc->coarse = carve(c, lc->turns_n, 2 * pairs, sizeof *lc->coarse);
    lc->states = carve(c, lc->states_n, lc->state, sizeof *lc->states);
    lc->partials = carve(c, lc->partials_n, lc->partial, sizeof *lc->partials);
    lc->scratches = carve(c, threads, lc->scratch, sizeof *lc->scratches);
    carve(c, 1, 64, 1); /* that kernels may read */
}

/* Angles for the turns of pieces; without the scaling, which the keys have. */
static void fill_turns(const struct fkv_waves *w, struct fkv_longcache *lc,
                       const struct fkv_longcache *last) {
    if (!w)
        return;
    int64_t have = 0;
    if (last) {
        have = fkv_min64(last->turns_n, lc->turns_n);
        memcpy(lc->fine, last->fine, (size_t)(FKV_TILE * 2 * w->pairs) * sizeof *lc->fine);
        memcpy(lc->coarse, last->coarse, (size_t)(have * 2 * w->pairs) * sizeof *lc->coarse);
    }
    for (int64_t i = last ? FKV_TILE : 0; i < FKV_TILE + lc->turns_n; i++) {
        const int64_t row = i - FKV_TILE;
        if (row >= 0 && row < have)
            continue;
        double *to = row < 0 ? lc->fine + i * 2 * w->pairs : lc->coarse + row * 2 * w->pairs;
        for (int j = 0; j < w->pairs; j++) {
            fkv_waves_angle(w, j, row < 0 ? i : FKV_TILE * (row - 1), row < 0 ? 0.0 : 31.5,
                            &to[2 * j], &to[2 * j + 1]);
            to[2 * j] /= w->scaling;
            to[2 * j + 1] /= w->scaling;
        }
    }
}

fkv_status fkv_longcache_set(struct fkv_plan_object *plan, const struct fkv_plan_object *last) {
    struct fkv_longcache size = {.params = plan->select, .layer = -1};
    struct fkv_heap *heap = &plan->ctx->heap;
    if (!plan->selecting)
        return FKV_OK;
    for (int64_t i = 0; i < plan->n_rows; i++)
        if (plan->rows[i].base + plan->rows[i].n_new > INT32_MAX)
            return fkv_fail(plan->ctx, FKV_ERR_LIMIT,
                            "sequences[%lld]: selection is for at most %d tokens", (long long)i,
                            INT32_MAX);
    cut_parties(plan, &size);
    /* the cuts of rounds need the parties themselves */
    const size_t room = (size_t)size.parties_n * (sizeof *size.parties + sizeof *size.rounds);
    char *temporary = room ? fkv_heap_calloc(heap, room) : NULL;
    if (room && !temporary)
        return fkv_fail_memory(plan->ctx, room, "plan");
    size.parties = (struct fkv_party *)(void *)temporary;
    size.rounds =
        (struct fkv_round *)(void *)(temporary + (size_t)size.parties_n * sizeof *size.parties);
    if (room) {
        cut_parties(plan, &size);
        cut_rounds(plan, &size);
    }
    size_views(plan, &size);
    size_units(plan, &size);
    struct carver carver = {0};
    struct fkv_longcache places = size;
    carve_all(&carver, plan, &places);
    char *block = carver.overflow ? NULL : fkv_heap_calloc(heap, carver.at);
    fkv_status status = FKV_OK;
    if (carver.overflow)
        status = fkv_fail(plan->ctx, FKV_ERR_LIMIT, "plan: the workspace of selection overflows");
    else if (!block)
        status = fkv_fail_memory(plan->ctx, carver.at, "plan");
    if (block) {
        places = size;
        places.bytes = carver.at;
        carver = (struct carver){.base = block};
        carve_all(&carver, plan, &places);
        if (room) {
            memcpy(places.parties, size.parties, (size_t)size.parties_n * sizeof *size.parties);
            memcpy(places.rounds, size.rounds, (size_t)size.rounds_n * sizeof *size.rounds);
        }
        fill_turns(plan->cache->profile->waves, &places, last->longcache);
        plan->longcache = memcpy(block, &places, sizeof places);
    }
    fkv_heap_free(heap, temporary, room);
    return status;
}

/* ---- running */

void fkv_longcache_attend(struct fkv_plan_object *plan, int layer, const struct fkv_view *q,
                          const struct fkv_view *out, const struct fkv_view *lse) {
    struct fkv_longcache *lc = plan->longcache;
    struct fkv_longjob job = {
        plan, plan->cache->profile, plan->ctx->kernels, lc, layer, q, out, lse, NULL};
    for (int64_t i = 0; i < lc->rounds_n; i++) {
        job.round = &lc->rounds[i];
        fkv_pool_run(plan->ctx->pool, job.round->scans, fkv_scan_unit, &job);
        if (lc->maybes)
            fkv_pool_run(plan->ctx->pool, job.round->rows, fkv_settle_unit, &job);
        fkv_pool_run(plan->ctx->pool, job.round->count, fkv_choose, &job);
        if (!lc->by_chunk) {
            fkv_pool_run(plan->ctx->pool, job.round->units, fkv_view_unit, &job);
            continue;
        }
        int64_t items = 0;
        for (int64_t j = 0; j < job.round->count; j++) {
            struct fkv_party *party = &lc->parties[job.round->first + j];
            party->item = items;
            items += party->blocks * plan->cache->profile->model.n_kv_heads * party->chunks;
        }
        fkv_pool_run(plan->ctx->pool, job.round->units, fkv_view_begin, &job);
        fkv_pool_run(plan->ctx->pool, items, fkv_view_chunk, &job);
        fkv_pool_run(plan->ctx->pool, job.round->units, fkv_view_end, &job);
    }
    lc->layer = layer;
}
