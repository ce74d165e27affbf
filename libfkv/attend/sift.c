/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The search with an index of keys (cache/index.h): it finds what the plain one finds, bit for bit.
 *
 * Let s be the score that the plain search computes for a key. With |e| the bound of what the key's copy lacks, n
 * that of the query's length and R = n * reach, which no sum of |q_c k_c| over the block exceeds,
 *     | s - sum_c q_c (centre_c + scale_c (u_c - 127.5)) |  <=  n |e| + slack,
 *     slack = (8 D + 256) 2^-24 R + 2^-120.
 * The slack has what rounding does to s (D products: 2 D 2^-24 R), to q * scale, to the sums over the centres and
 * over the products (3 D of terms that are no more than R in all), and to the last additions (of numbers below
 * 12 R); the smallest number is for underflow. Where R is not below 2^120, so that s or a part of it could overflow,
 * or is no number, the slack is infinite and the block is scored as without an index.
 *
 * Coarse: the products y = q * scale are z * step + d with whole numbers |z| <= 127, and |d_c| <= .5001 step, so that
 *     16 sum y_c (high_c - 7.5)  =  16 step sum z_c high_c - 120 step sum z_c + 16 sum d_c (high_c - 7.5)
 * where the last term is no more than 8.002 step sqrt(D) spread. The sums over z are of integers and exact.
 *
 * A row keeps the k greatest lower bounds it has seen (of a score that is known, the score): what is less than the
 * least of them is not among its k best. Keys whose coarse upper bound is not less get fine bounds; if these, too,
 * leave it open, the key is kept as a maybe. When a row has as many as there is room for, and at the end, the maybes
 * that are still open are scored as the plain search does, with the same kernel. At the end this is done over all
 * ranges together, which makes the number of keys to be scored independent of the number of threads.
 *
 * In short middles it takes longer to know good keys than to score all, the more so the more rows share the keys that
 * are read (measured: 8192 tokens for a decode step of 4 query heads to a KV head, 30720 in prefill).
 */
#include "attend/scan.h"
#include "codec/rope.h"

#include <math.h>

static struct fkv_indices find_indices(const struct fkv_scan *s, int64_t until) {
    const struct fkv_longjob *job = s->job;
    const struct fkv_profile_object *p = job->profile;
    const struct fkv_layer *l = fkv_party_layer(job, s->party);
    const size_t from = job->plan->cache->layouts[job->layer].heads[s->head].index;
    return (struct fkv_indices){.end = from ? fkv_min64(l->n_coded, until) : 0,
                                .mask = fkv_tiles_per_block(p) - 1,
                                .blocks = l->tiles,
                                .from = from,
                                .head = fkv_index_head_bytes(p),
                                .coarse = fkv_index_coarse_bytes(p),
                                .octets = (int)fkv_index_octets(p)};
}

/* The index of a page's block, and the coarse half of its tile there. */
static const char *block_of(const struct fkv_indices *x, int64_t page) {
    return (const char *)x->blocks[page & ~x->mask] + x->from;
}
static const uint8_t *coarse_of(const struct fkv_indices *x, int64_t page) {
    return (const uint8_t *)block_of(x, page) + x->head + (size_t)(page & x->mask) * x->coarse;
}

void fkv_sift_begin(struct fkv_scan *s, int64_t until) {
    const int D = s->job->profile->model.head_dim;
    const struct fkv_run middle = s->party->middle;
    const int64_t least = s->job->plan->ctx->sift_from * (12 + s->rows) / 12;
    s->sifting = middle.end - middle.first >= least;
    s->indices = find_indices(s, until);
    for (int r = 0; r < s->rows; r++) {
        s->norm[r] = fkv_sift_norm(s->q + (ptrdiff_t)r * s->stride, D);
        s->least[r] = -INFINITY;
        s->lows_n[r] = 0;
        s->job->lc->maybes_n[fkv_scan_list(s, r)] = 0;
    }
}

/* The least of the k greatest numbers, -infinity if there are not so many; x takes one more. */
static float take_low(float *x, int *n, int k, float low) {
    int at = *n < k ? *n : k - 1;
    if (low > -INFINITY && (*n < k || low > x[at])) {
        for (; at > 0 && low > x[at - 1]; at--)
            x[at] = x[at - 1];
        x[at] = low;
        *n += *n < k;
    }
    return *n == k ? x[k - 1] : -INFINITY;
}

void fkv_sift_raise(struct fkv_scan *s, int r, float low) {
    const int k = s->job->lc->params.top_k;
    const float least = take_low(s->lows + (ptrdiff_t)r * k, &s->lows_n[r], k, low);
    if (!(least > s->least[r]))
        return;
    s->least[r] = least;
    const float under = nextafterf(least, -INFINITY);
    if (under > s->limit[r])
        s->limit[r] = under;
}

float fkv_sift_norm(const float *q, int dims) {
    float sum = 0.0f;
    for (int d = 0; d < dims; d++)
        sum += q[d] * q[d];
    return sqrtf(sum) * 1.0001f + FKV_INDEX_TINY;
}

void fkv_sift_fold(const struct fkv_kernels *kernels, const struct fkv_index *x,
                   const struct fkv_sift_rows *to, int dims) {
    const float root = 1.001f * sqrtf((float)dims);
    struct fkv_folded sums[FKV_SCAN_ROWS];
    kernels->fold_index(to->y, to->z, to->stride, sums, to->q, x->scale, x->centre, dims, to->rows);
    for (int r = 0; r < to->rows; r++) {
        const float all = to->norm[r] * x->head->reach;
        const float slack =
            all < 0x1p120f ? (8.0f * (float)dims + 256.0f) * 0x1p-24f * all + 0x1p-120f : INFINITY;
        const float step = sums[r].step;
        const float lost = step > 0x1p-119f ? step : 127.0f * 0x1p-119f;
        to->sift[r].step = 16.0f * step;
        to->sift[r].base = sums[r].centre - 120.0f * step * (float)sums[r].z +
                           8.002f * lost * root * x->head->spread + slack;
        to->sift[r].norm = to->norm[r];
        to->middle[r] = sums[r].centre;
        to->off[r] = to->norm[r] * x->head->fine + slack;
    }
}

static void fold(struct fkv_scan *s, const struct fkv_index *x) {
    const struct fkv_sift_rows to = {.rows = s->rows,
                                     .stride = s->stride,
                                     .q = s->q,
                                     .norm = s->norm,
                                     .y = s->y[s->side],
                                     .z = s->z,
                                     .sift = s->sift,
                                     .middle = s->middle[s->side],
                                     .off = s->off[s->side]};
    fkv_sift_fold(s->job->kernels, x, &to, s->job->profile->model.head_dim);
}

/* ---- maybes */

/* The score of a key in a sealed block as the plain search has it. */
static float score_of(const struct fkv_longjob *job, const struct fkv_party *party, int head,
                      const float *q, int64_t token) {
    const struct fkv_profile_object *p = job->profile;
    const int64_t page = fkv_page_of(p, token);
    const struct fkv_place place = fkv_page_place(job, party, page, head, FKV_PART_K);
    float scores[FKV_TILE];
    job->kernels->scores[fkv_store_of(p->storage_dtype)](
        scores, FKV_TILE, q, p->model.head_dim, place.exact, p->model.head_dim, 1, 0, NULL);
    return scores[token - fkv_page_first(p, page)];
}

/* Makes room among a row's maybes. */
static void settle_row(struct fkv_scan *s, int r) {
    struct fkv_longcache *lc = s->job->lc;
    const int64_t list = fkv_scan_list(s, r);
    const int k = lc->params.top_k, n = lc->maybes_n[list];
    struct fkv_maybe *maybe = lc->maybes + list * fkv_maybes_room(k);
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (!(maybe[i].upper < s->least[r]))
            maybe[kept++] = maybe[i];
    if (2 * kept > n) {
        /* what is known takes the place of the bounds */
        s->lows_n[r] = 0;
        for (int i = 0; i < s->held[r]; i++)
            fkv_sift_raise(s, r, lc->picks[list * k + i].score);
        for (int i = 0; i < kept; i++)
            fkv_scan_add(s, r,
                         score_of(s->job, s->party, s->head, s->q + (ptrdiff_t)r * s->stride,
                                  maybe[i].index),
                         maybe[i].index);
        s->scored += kept;
        kept = 0;
    }
    lc->maybes_n[list] = kept;
}

static void add_maybe(struct fkv_scan *s, int r, struct fkv_maybe maybe) {
    struct fkv_longcache *lc = s->job->lc;
    const int64_t list = fkv_scan_list(s, r);
    const int room = fkv_maybes_room(lc->params.top_k);
    if (lc->maybes_n[list] == room)
        settle_row(s, r);
    lc->maybes[list * room + lc->maybes_n[list]++] = maybe;
    fkv_sift_raise(s, r, maybe.lower);
}

static void refine_row(struct fkv_scan *s, int r) {
    const struct fkv_opened *o = &s->opened;
    const int octets = s->indices.octets;
    for (uint64_t bits = o->bits[r]; bits; bits &= bits - 1) {
        const int t = __builtin_ctzll(bits);
        const float sum = s->job->kernels->refine(
            o->y + (ptrdiff_t)r * s->stride, o->coarse + 4 * t, o->fine + 4 * t * octets, octets);
        const float score = o->middle[r] + sum, off = o->off[r];
        if (!(score + off < s->least[r]))
            add_maybe(s, r, (struct fkv_maybe){score - off, score + off, (int32_t)(o->first + t)});
    }
}

void fkv_sift_end(struct fkv_scan *s) {
    if (s->opened.any)
        for (int r = 0; r < s->rows; r++)
            refine_row(s, r);
    s->opened.any = false;
}

static void prefetch(const void *from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)from + i, 0, 2);
}

/* What is read after the next page, in part: the kernel fetches all of the next page, but what is done between two
 * calls of it would leave the memory idle. */
static void look_ahead(const struct fkv_indices *x, int64_t page) {
    if (page >= x->end)
        return;
    if (!(page & x->mask))
        prefetch(block_of(x, page), x->head);
    prefetch(coarse_of(x, page), x->coarse / 2);
}

static int count_bits(uint64_t x) {
    x -= x >> 1 & UINT64_C(0x5555555555555555);
    x = (x & UINT64_C(0x3333333333333333)) + (x >> 2 & UINT64_C(0x3333333333333333));
    x = (x + (x >> 4)) & UINT64_C(0x0f0f0f0f0f0f0f0f);
    return (int)(x * UINT64_C(0x0101010101010101) >> 56);
}

/* Keeps what is open in a page for fkv_sift_end(), or scores it at once if there is too much. */
static void open_page(struct fkv_scan *s, int64_t page, const struct fkv_index *x,
                      const uint64_t *bits, uint64_t mask) {
    struct fkv_opened *o = &s->opened;
    const int octets = s->indices.octets;
    const int64_t first = fkv_page_first(s->job->profile, page);
    uint64_t any = 0;
    int open = 0;
    for (int r = 0; r < s->rows; r++) {
        o->bits[r] = bits[r] & mask;
        any |= o->bits[r];
        open += count_bits(o->bits[r]);
    }
    if (open > 8 * (s->rows + 1)) {
        const struct fkv_place place = fkv_page_place(s->job, s->party, page, s->head, FKV_PART_K);
        fkv_scan_exact(s, &place, false, NULL, first, mask);
        s->scored += s->rows;
        return;
    }
    o->coarse = x->coarse;
    o->fine = x->fine;
    o->first = first;
    o->y = s->y[s->side];
    o->middle = s->middle[s->side];
    o->off = s->off[s->side];
    o->any = open;
    for (; any; any &= any - 1)
        prefetch(x->fine + 4 * __builtin_ctzll(any) * octets, 4 * (size_t)octets);
}

void fkv_sift_page(struct fkv_scan *s, int64_t page, uint64_t mask) {
    const struct fkv_indices *all = &s->indices;
    const char *block = block_of(all, page);
    const struct fkv_index x = fkv_index_of(s->job->profile, block, page & all->mask);
    uint64_t bits[FKV_SCAN_ROWS];
    if (s->block[s->side] != block) {
        s->side ^= 1;
        s->block[s->side] = block;
        fold(s, &x);
    }
    s->job->kernels->sift(bits, s->z, s->stride, s->sift, s->least, x.coarse, all->octets, s->rows,
                          page + 1 < all->end ? coarse_of(all, page + 1) : NULL);
    look_ahead(all, page + 2);
    fkv_sift_end(s);
    open_page(s, page, &x, bits, mask);
    s->sifted += s->rows;
    /* keys that cannot be told apart: the plain search is faster */
    if (s->scored > s->sifted / 4 + 8 * s->rows) {
        fkv_sift_end(s);
        s->sifting = false;
    }
}

/* ---- the end */

/* A row's candidates of all ranges. */
struct finals {
    struct fkv_maybe *maybe;
    int n;
};

/* Whether fewer than k others can be better than one of them: then it is among the k best, whatever its score. */
static bool certain(const struct finals *f, int i, int k) {
    int over = 0;
    for (int j = 0; j < f->n && over < k; j++)
        over += j != i && !(f->maybe[j].upper < f->maybe[i].lower);
    return over < k && f->maybe[i].lower > -INFINITY;
}

/* What the ranges have of a row that is not known to be too small; at most as many as they have together. */
static struct finals gather(const struct fkv_longjob *job, const struct fkv_party *party,
                            int64_t lists, struct fkv_maybe *to) {
    const struct fkv_longcache *lc = job->lc;
    const int k = lc->params.top_k, room = fkv_maybes_room(k);
    const struct fkv_pick *picks = lc->picks + lists * k;
    struct finals f = {to, 0};
    float lows[FKV_MAX_TOP_K], least = -INFINITY;
    int lows_n = 0, all = 0;
    for (int64_t i = 0; i < party->ranges * k; i++)
        if (picks[i].index >= 0)
            to[all++] = (struct fkv_maybe){picks[i].score, picks[i].score, picks[i].index};
    for (int64_t i = 0; i < party->ranges; i++)
        for (int j = 0; j < lc->maybes_n[lists + i]; j++)
            to[all++] = lc->maybes[(lists + i) * room + j];
    for (int i = 0; i < all; i++)
        least = take_low(lows, &lows_n, k, to[i].lower);
    for (int i = 0; i < all; i++)
        if (!(to[i].upper < least))
            to[f.n++] = to[i];
    return f;
}

/* The k best of a row over all ranges, to the first of its lists. Where bounds are enough to tell that a key is
 * among them its lower bound stands for its score: only votes are left to be given. */
static void settle(const struct fkv_longjob *job, const struct fkv_party *party, int64_t row,
                   float *q) {
    struct fkv_longcache *lc = job->lc;
    const struct fkv_model *m = &job->profile->model;
    const int k = lc->params.top_k;
    const int64_t rows = party->count * m->group, lists = party->list + row * party->ranges;
    const int head = (int)(row / rows);
    struct fkv_pick best[FKV_MAX_TOP_K], *picks = lc->picks + lists * k;
    const struct finals f =
        gather(job, party, lists, (struct fkv_maybe *)(void *)(q + FKV_MAX_HEAD_DIM + 16));
    int sure = 0, held = 0;
    for (int64_t i = 0; i < party->ranges * k; i++)
        picks[i].index = -1;
    for (int i = 0; i < f.n; i++)
        if (certain(&f, i, k))
            picks[sure++] = (struct fkv_pick){f.maybe[i].lower, f.maybe[i].index};
    if (sure == k || sure == f.n)
        return;
    fkv_load_head(job->kernels, job->q,
                  job->plan->rows[party->row].offset + party->first + row % rows / m->group,
                  head * m->group + (int)(row % m->group), m->head_dim, q);
    for (int i = 0; i < f.n; i++) {
        const struct fkv_maybe *maybe = &f.maybe[i];
        if (certain(&f, i, k))
            continue;
        const float score = maybe->lower == maybe->upper
                                ? maybe->lower
                                : score_of(job, party, head, q, maybe->index);
        if (score > -INFINITY)
            held = fkv_pick_insert(best, held, k - sure, (struct fkv_pick){score, maybe->index});
    }
    for (int i = 0; i < held; i++)
        picks[sure + i] = best[i];
}

void fkv_settle_unit(void *arg, int64_t item, int thread) {
    const struct fkv_longjob *job = arg;
    const struct fkv_longcache *lc = job->lc;
    const int heads = job->profile->model.n_q_heads;
    const struct fkv_party *party = &lc->parties[job->round->first];
    for (; item >= party->count * heads; party++)
        item -= party->count * heads;
    if (party->ranges)
        settle(job, party, item, lc->scratches + thread * lc->scratch);
}
