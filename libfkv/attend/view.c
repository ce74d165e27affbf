/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention over a party's view. Slot t of a piece is at position c + t; its key is turned by t - 31.5, the same for
 * all pieces, and the query by its own position less c + 31.5. Keys are never copied but a tile at a time.
 */
#include "attend/longcache.h"
#include "codec/rope.h"

#include <math.h>
#include <string.h>

#define SCORES (FKV_CHUNK_PIECES * FKV_TILE)

/* Rows of one KV head; row r is query r / G, query head r % G of its group. */
struct unit {
    const struct fkv_longjob *job;
    const struct fkv_party *party;
    int64_t index; /* of the party in the round */
    int head, rows, stride;
    int64_t first_row;
    float *q; /* [rows][stride]: at their positions, scaled */
    float *o, *max, *sum;
};

struct partial {
    float *max, *sum, *o;
};

/* One chunk and its scratch. */
struct chunk {
    const struct unit *u;
    const struct fkv_piece *pieces;
    const float *turns;
    int n;
    bool coded;    /* some channels of V */
    float *scores; /* [rows][SCORES] */
    float *turned; /* [rows][stride]: queries for the piece at hand */
    float *kept;   /* [rows][stride]: outputs in the order of coded channels */
    float *tile;   /* [D][64] */
    float *sinks;  /* the same, of the storage type */
};

static struct unit unit_at(const struct fkv_longjob *job, int64_t index, int thread) {
    const struct fkv_longcache *lc = job->lc;
    const struct fkv_model *m = &job->profile->model;
    const struct fkv_party *first = &lc->parties[job->round->first], *party = first;
    while (index >= party->unit + party->blocks * m->n_kv_heads)
        party++;
    const int64_t local = index - party->unit;
    struct unit u = {.job = job,
                     .party = party,
                     .index = party - first,
                     .head = (int)(local / party->blocks),
                     .first_row = local % party->blocks * FKV_UNIT_ROWS,
                     .stride = (int)fkv_round16(m->head_dim)};
    u.rows = (int)fkv_min64(FKV_UNIT_ROWS, party->count * m->group - u.first_row);
    u.q = lc->states + (lc->by_chunk ? index : thread) * lc->state;
    u.o = u.q + FKV_UNIT_ROWS * u.stride;
    u.max = u.o + FKV_UNIT_ROWS * u.stride;
    u.sum = u.max + FKV_UNIT_ROWS;
    return u;
}

static struct partial partial_at(const struct unit *u, int64_t index) {
    float *f = u->job->lc->partials + index * u->job->lc->partial;
    return (struct partial){f, f + FKV_UNIT_ROWS, f + 2 * FKV_UNIT_ROWS};
}

static int64_t query_of(const struct unit *u, int r) {
    return (u->first_row + r) / u->job->profile->model.group;
}

/* Position of a row's query: the end of the view is that of the last one. */
static int64_t position_of(const struct unit *u, int r) {
    return u->party->width - u->party->count + query_of(u, r);
}

/* Room for the head behind `r` of the caller's tensors. */
static void locate(const struct unit *u, int r, int64_t *token, int *head) {
    const int group = u->job->profile->model.group;
    *token = u->job->plan->rows[u->party->row].offset + u->party->first + query_of(u, r);
    *head = u->head * group + (int)((u->first_row + r) % group);
}

/* x := x turned back by (c, s), or on with s negated; pairs as the waves list them. */
static void turn_query(const struct fkv_waves *w, const float *restrict c, const float *restrict s,
                       const float *restrict from, float *restrict to, int dims) {
    const int pairs = w ? w->pairs : 0;
    memcpy(to, from, (size_t)dims * sizeof *to);
    if (pairs && w->halves) { /* in vectors */
        for (int j = 0; j < pairs; j++) {
            const float a = from[j], b = from[pairs + j];
            to[j] = a * c[j] + b * s[j];
            to[pairs + j] = b * c[j] - a * s[j];
        }
        return;
    }
    for (int j = 0; j < pairs; j++) {
        const float a = from[w->first[j]], b = from[w->second[j]];
        to[w->first[j]] = a * c[j] + b * s[j];
        to[w->second[j]] = b * c[j] - a * s[j];
    }
}

static void begin(const struct unit *u) {
    const struct fkv_longjob *job = u->job;
    const struct fkv_model *m = &job->profile->model;
    float cosine[FKV_MAX_PAIRS], sine[FKV_MAX_PAIRS];
    int64_t tabled = -1;
    for (int r = 0; r < u->rows; r++) {
        float *q = u->q + (ptrdiff_t)r * u->stride;
        int64_t token, position = position_of(u, r);
        int head;
        locate(u, r, &token, &head);
        fkv_load_head(job->kernels, job->q, token, head, m->head_dim, q);
        if (position != tabled)
            fkv_rope_table(m, &position, 1, cosine, sine);
        tabled = position;
        fkv_rope_apply(m, q, cosine, sine);
        for (int d = 0; d < m->head_dim; d++)
            q[d] *= (float)m->softmax_scale;
        u->max[r] = -INFINITY;
        u->sum[r] = 0.0f;
    }
    memset(u->o, 0, (size_t)u->rows * (size_t)u->stride * sizeof(float));
}

/* ---- a chunk */

static struct fkv_place place_of(const struct chunk *c, int i, fkv_part part) {
    return fkv_page_place(c->u->job, c->u->party, c->pieces[i].page, c->u->head, part);
}

static struct chunk chunk_at(const struct unit *u, int64_t index, int thread) {
    const struct fkv_longcache *lc = u->job->lc;
    const int32_t *bounds = lc->chunks + u->index * (lc->chunks_most + 1) + index;
    const struct fkv_waves *w = u->job->profile->waves;
    struct chunk c = {.u = u, .n = bounds[1] - bounds[0]};
    c.pieces = lc->pieces + u->index * lc->pieces_most + bounds[0];
    c.turns = lc->turns + (u->index * lc->pieces_most + bounds[0]) * (w ? 2 * w->pairs : 0);
    c.coded =
        c.pieces[0].page >= 0 && c.pieces[0].page < fkv_party_layer(u->job, u->party)->n_coded;
    c.scores = lc->scratches + thread * lc->scratch;
    c.turned = c.scores + FKV_UNIT_ROWS * SCORES;
    c.kept = c.turned + FKV_UNIT_ROWS * (ptrdiff_t)u->stride;
    c.tile = c.kept + FKV_UNIT_ROWS * (ptrdiff_t)u->stride;
    c.sinks = c.tile + u->stride * (ptrdiff_t)FKV_TILE;
    return c;
}

/* A coded tile's keys as f32. */
static void unpack(const struct chunk *c, const struct fkv_place *place) {
    const struct fkv_longjob *job = c->u->job;
    const struct fkv_profile_object *p = job->profile;
    const struct fkv_residuals *k = fkv_profile_residuals(p, job->layer, FKV_PART_K, c->u->head);
    const float *carrier = fkv_profile_carrier(p, job->layer, FKV_PART_K, c->u->head);
    const int exact = k->count[FKV_WIDTH_EXACT];
    for (int i = 0; i < exact; i++)
        job->kernels->widen[fkv_store_of(p->storage_dtype)](
            c->tile + k->list[i] * FKV_TILE,
            fkv_element(place->exact, p->storage_dtype, (size_t)i * FKV_TILE), FKV_TILE);
    job->kernels->unpack(c->tile, place->codes, k->count + FKV_WIDTH_8, k->list + exact,
                         place->scale, place->zero, carrier);
    for (int i = exact + k->quantised; i < p->model.head_dim; i++)
        for (int t = 0; t < FKV_TILE; t++)
            c->tile[k->list[i] * FKV_TILE + t] = carrier[k->list[i]];
}

static void score_piece(const struct chunk *c, int i) {
    const struct unit *u = c->u;
    const struct fkv_longjob *job = u->job;
    const struct fkv_profile_object *p = job->profile;
    const struct fkv_waves *w = p->waves;
    const struct fkv_piece *piece = &c->pieces[i];
    struct fkv_place place = place_of(c, i, FKV_PART_K);
    const int D = p->model.head_dim;
    const enum fkv_store store = fkv_store_of(p->storage_dtype);
    const float *q = u->q;
    float *s = c->scores + i * FKV_TILE;
    const void *next =
        i + 1 < c->n ? place_of(c, i + 1, FKV_PART_K).exact : place_of(c, 0, FKV_PART_V).exact;
    const bool packed = place.codes;
    if (packed)
        unpack(c, &place);
    if (piece->page < 0)
        place.exact = fkv_spread_sinks(job, &place, c->sinks);
    if (!w && !packed) {
        job->kernels->scores[store](s, SCORES, q, u->stride, place.exact, D, u->rows, 0, NULL);
        return;
    }
    if (w) {
        const float *turn = c->turns + (ptrdiff_t)i * 2 * w->pairs;
        for (int r = 0; r < u->rows; r++)
            turn_query(w, turn, turn + w->pairs, u->q + (ptrdiff_t)r * u->stride,
                       c->turned + (ptrdiff_t)r * u->stride, D);
        q = c->turned;
        job->kernels->turn[packed ? FKV_STORE_F32 : store](
            c->tile, packed ? (const void *)c->tile : place.exact, D, w->pairs, w->first, w->second,
            w->cos, w->sin, piece->from, piece->end, packed ? NULL : next);
    }
    job->kernels->scores[FKV_STORE_F32](s, SCORES, q, u->stride, c->tile, D, u->rows, 0, NULL);
}

/* Slots of a piece that a row sees end here; at most piece->from: none. */
static int seen(const struct chunk *c, int i, int r) {
    const struct fkv_piece *piece = &c->pieces[i];
    return (int)fkv_min64(piece->end, position_of(c->u, r) + 1 - piece->position);
}

/* Scores of what a row does not see. Returns whether it sees anything. */
static bool mask(const struct chunk *c, int r) {
    bool any = false;
    for (int i = 0; i < c->n; i++) {
        float *s = c->scores + (ptrdiff_t)r * SCORES + i * FKV_TILE;
        const int from = c->pieces[i].from, end = seen(c, i, r);
        any = any || end > from;
        for (int t = 0; t < from; t++)
            s[t] = -INFINITY;
        for (int t = end > from ? end : from; t < FKV_TILE; t++)
            s[t] = -INFINITY;
    }
    return any;
}

/* V of a piece for rows first..end-1, which see the same of it. */
static void weigh_piece(const struct chunk *c, int i, int first, int end, int until,
                        const struct partial *to) {
    const struct unit *u = c->u;
    const struct fkv_longjob *job = u->job;
    const struct fkv_profile_object *p = job->profile;
    const fkv_weigh_fn weigh = job->kernels->weigh[fkv_store_of(p->storage_dtype)];
    const struct fkv_place place = place_of(c, i, FKV_PART_V);
    const int D = p->model.head_dim, rows = end - first, from = c->pieces[i].from;
    const float *weights = c->scores + (ptrdiff_t)first * SCORES + i * FKV_TILE;
    float *o = (c->coded ? c->kept : to->o) + (ptrdiff_t)first * u->stride;
    if (!c->coded) {
        const void *next = NULL;
        if (i + 1 < c->n)
            next = fkv_element(place_of(c, i + 1, FKV_PART_V).exact, p->storage_dtype,
                               (size_t)c->pieces[i + 1].from * (size_t)D);
        weigh(o, u->stride, weights + from, SCORES,
              fkv_element(place.exact, p->storage_dtype, (size_t)from * (size_t)D), D, until - from,
              rows, next);
        return;
    }
    const struct fkv_residuals *v = fkv_profile_residuals(p, job->layer, FKV_PART_V, u->head);
    const int exact = v->count[FKV_WIDTH_EXACT];
    if (exact)
        weigh(o, u->stride, weights, SCORES, place.exact, exact, until, rows, NULL);
    if (v->quantised)
        job->kernels->weigh_packed(o + exact, u->stride, weights, SCORES, place.codes,
                                   v->count + FKV_WIDTH_8, place.scale, place.zero, until, rows,
                                   NULL);
}

/* Outputs of coded channels to their places, and their carriers. */
static void finish_coded(const struct chunk *c, const struct partial *to) {
    const struct fkv_longjob *job = c->u->job;
    const struct fkv_residuals *v =
        fkv_profile_residuals(job->profile, job->layer, FKV_PART_V, c->u->head);
    const float *carrier = fkv_profile_carrier(job->profile, job->layer, FKV_PART_V, c->u->head);
    const int exact = v->count[FKV_WIDTH_EXACT], held = exact + v->quantised;
    for (int r = 0; r < c->u->rows; r++) {
        const float *kept = c->kept + (ptrdiff_t)r * c->u->stride;
        float *o = to->o + (ptrdiff_t)r * c->u->stride;
        for (int n = 0; n < held; n++)
            o[v->list[n]] = kept[n];
        for (int n = exact; n < job->profile->model.head_dim; n++)
            o[v->list[n]] += carrier[v->list[n]] * to->sum[r];
    }
}

/* The chunk's result; false if no row sees any of it. */
static bool attend_chunk(const struct unit *u, int64_t index, int thread,
                         const struct partial *to) {
    struct chunk c = chunk_at(u, index, thread);
    const size_t bytes = (size_t)u->rows * (size_t)u->stride * sizeof(float);
    bool any = false;
    if (seen(&c, 0, u->rows - 1) <= c.pieces[0].from) {
        for (int r = 0; r < u->rows; r++)
            to->max[r] = -INFINITY;
        return false;
    }
    for (int i = 0; i < c.n; i++)
        score_piece(&c, i);
    for (int r = 0; r < u->rows; r++) {
        to->max[r] = -INFINITY;
        to->sum[r] = 0.0f;
        if (!mask(&c, r))
            continue;
        u->job->kernels->softmax(c.scores + (ptrdiff_t)r * SCORES, c.n * FKV_TILE, &to->max[r],
                                 &to->sum[r]);
        any = true;
    }
    memset(to->o, 0, bytes);
    if (c.coded)
        memset(c.kept, 0, bytes);
    for (int i = 0; i < c.n; i++)
        for (int r = 0, end; r < u->rows; r = end) {
            const int until = seen(&c, i, r);
            for (end = r + 1; end < u->rows && seen(&c, i, end) == until;)
                end++;
            if (until > c.pieces[i].from)
                weigh_piece(&c, i, r, end, until, to);
        }
    if (c.coded)
        finish_coded(&c, to);
    return any;
}

static void merge(const struct unit *u, const struct partial *from) {
    for (int r = 0; r < u->rows; r++) {
        if (from->max[r] == -INFINITY)
            continue;
        const float max = u->max[r] > from->max[r] ? u->max[r] : from->max[r];
        const float keep = expf(u->max[r] - max), add = expf(from->max[r] - max);
        float *o = u->o + (ptrdiff_t)r * u->stride;
        const float *x = from->o + (ptrdiff_t)r * u->stride;
        u->max[r] = max;
        u->sum[r] = u->sum[r] * keep + from->sum[r] * add;
        for (int d = 0; d < u->job->profile->model.head_dim; d++)
            o[d] = o[d] * keep + x[d] * add;
    }
}

static void end(const struct unit *u) {
    const struct fkv_longjob *job = u->job;
    const int D = job->profile->model.head_dim;
    for (int r = 0; r < u->rows; r++) {
        float *o = u->o + (ptrdiff_t)r * u->stride;
        const float sum = u->sum[r], inverse = sum != 0.0f ? 1.0f / sum : 0.0f;
        int64_t token;
        int head;
        locate(u, r, &token, &head);
        for (int d = 0; d < D; d++)
            o[d] *= inverse;
        job->kernels->narrow[fkv_store_of(job->out->dtype)](
            job->out->data + token * job->out->token_stride + head * job->out->head_stride, o,
            (size_t)D);
        if (!job->lse)
            continue;
        const float lse = sum != 0.0f ? u->max[r] + logf(sum) : -INFINITY;
        memcpy(job->lse->data + token * job->lse->token_stride + head * job->lse->head_stride, &lse,
               sizeof lse);
    }
}

/* ---- scheduling */

void fkv_view_unit(void *arg, int64_t index, int thread) {
    const struct unit u = unit_at(arg, index, thread);
    const struct partial partial = partial_at(&u, thread);
    begin(&u);
    for (int64_t i = 0; i < u.party->chunks; i++)
        if (attend_chunk(&u, i, thread, &partial))
            merge(&u, &partial);
    end(&u);
}

void fkv_view_begin(void *arg, int64_t index, int thread) {
    const struct unit u = unit_at(arg, index, thread);
    begin(&u);
}

void fkv_view_chunk(void *arg, int64_t item, int thread) {
    const struct fkv_longjob *job = arg;
    const int heads = job->profile->model.n_kv_heads;
    const struct fkv_party *party = &job->lc->parties[job->round->first];
    while (item >= party->item + party->blocks * heads * party->chunks)
        party++;
    const int64_t local = item - party->item;
    const struct unit u = unit_at(job, party->unit + local / party->chunks, thread);
    const struct partial partial = partial_at(&u, item);
    attend_chunk(&u, local % party->chunks, thread, &partial);
}

void fkv_view_end(void *arg, int64_t index, int thread) {
    const struct unit u = unit_at(arg, index, thread);
    for (int64_t i = 0; i < u.party->chunks; i++) {
        const struct partial partial =
            partial_at(&u, u.party->item + (index - u.party->unit) * u.party->chunks + i);
        merge(&u, &partial);
    }
    end(&u);
}
