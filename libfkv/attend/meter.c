/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Measuring what coding costs (docs/codec.md, "The fidelity meter"). Block b is sealed by the arrival of one token,
 * the newest of its local window, however the appends are split; that token's queries measure it. Attention leaves
 * their whole outputs here, then the block alone is attended to twice, by the kernels of attention itself: from its
 * exact pages just before they are dropped, and from the sealed block. Nothing of this is read by anything else.
 */
#include "attend/unit.h"

#include <math.h>
#include <string.h>

/* One query head and one block. */
struct sample {
    double block_error, block_energy;
    double lse, weight;
    double output_error, output_energy;
};

struct fkv_meter_work {
    uint64_t number;        /* of the meter that it is for */
    int64_t slots;          /* chosen blocks of the step's rows, at most */
    int64_t stride;         /* of an output: the floats of a head, then the log-sum-exp */
    int64_t state;          /* floats of a thread: a unit, and a partial result */
    float *whole;           /* [slots][Hq][stride]: the queries' outputs */
    float *exact;           /* the same of the blocks alone */
    float *states;          /* [threads][state] */
    struct sample *samples; /* [slots][Hq] */
    size_t bytes;           /* of the block that holds this struct and all arrays */
};

/* ---- which blocks, and which token is theirs */

static int64_t first_block(const struct fkv_plan_object *plan, const struct fkv_row *row,
                           int layer) {
    return row->seq->layers[layer].n_coded / fkv_tiles_per_block(plan->cache->profile);
}

static bool is_chosen(const struct fkv_meter *meter, int layer, int64_t block) {
    return fkv_meter_rank(meter, layer, block + 1) > fkv_meter_rank(meter, layer, block);
}

/* The block that the arrival of a sequence's token seals; -1: none. */
static int64_t sealed_by(const struct fkv_profile_object *p, int64_t token) {
    const int64_t behind = token + 1 - fkv_sinks(p) - p->codec.n_local;
    return behind > 0 && behind % p->codec.block == 0 ? behind / p->codec.block - 1 : -1;
}

static int64_t sealing_token(const struct fkv_profile_object *p, int64_t block) {
    return fkv_sinks(p) + (block + 1) * p->codec.block + p->codec.n_local - 1;
}

/* The plan's work if it is for the meter that runs now. */
static struct fkv_meter_work *work_of(const struct fkv_plan_object *plan) {
    const struct fkv_meter *meter = plan->cache->meter;
    return meter && plan->meter && plan->meter->number == meter->number ? plan->meter : NULL;
}

/* ---- room */

static int64_t count_slots(const struct fkv_plan_object *plan, struct fkv_row *row) {
    const struct fkv_profile_object *p = plan->cache->profile;
    const int64_t end = fkv_tiles_to_code(p, row->base + row->n_new) / fkv_tiles_per_block(p);
    int64_t most = 0;
    for (int l = 0; l < p->model.n_layers; l++) {
        const int64_t first = first_block(plan, row, l);
        if (first < end)
            most = fkv_max64(most, fkv_meter_rank(plan->cache->meter, l, end) -
                                       fkv_meter_rank(plan->cache->meter, l, first));
    }
    return most;
}

static bool size_of(const struct fkv_plan_object *plan, struct fkv_meter_work *w, size_t parts[4]) {
    const struct fkv_model *m = &plan->cache->profile->model;
    const int64_t dim = fkv_round16(m->head_dim);
    size_t outputs, states, samples;
    w->stride = dim + 16;
    w->state = fkv_round16(fkv_state_floats(plan->cache->profile, 0)) +
               fkv_round16(FKV_UNIT_ROWS * (2 + dim));
    parts[0] = (sizeof *w + 63) / 64 * 64;
    bool fits =
        fkv_mul_size((size_t)w->slots, (size_t)m->n_q_heads, &samples) &&
        fkv_mul_size(samples, (size_t)w->stride * sizeof(float), &outputs) &&
        fkv_mul_size((size_t)plan->ctx->threads, (size_t)w->state * sizeof(float), &states) &&
        fkv_mul_size(samples, sizeof(struct sample), &samples);
    parts[1] = fits ? outputs : 0;
    parts[2] = fits ? states : 0;
    parts[3] = fits ? samples : 0;
    return fits && fkv_size(2, outputs, parts[0], &w->bytes) &&
           fkv_add_size(w->bytes, states, &w->bytes) && fkv_add_size(w->bytes, samples, &w->bytes);
}

fkv_status fkv_meter_set(struct fkv_plan_object *plan) {
    const struct fkv_meter *meter = plan->cache->meter;
    struct fkv_meter_work own = {0}, *w;
    size_t parts[4];
    if (!meter || plan->selecting)
        return FKV_OK;
    own.number = meter->number;
    for (int64_t i = 0; i < plan->n_rows; i++) {
        plan->rows[i].first_slot = own.slots;
        own.slots += count_slots(plan, &plan->rows[i]);
    }
    if (!own.slots)
        return FKV_OK;
    if (!size_of(plan, &own, parts))
        return fkv_fail(plan->ctx, FKV_ERR_LIMIT, "plan: %lld blocks to measure",
                        (long long)own.slots);
    w = fkv_heap_alloc(&plan->ctx->heap, own.bytes);
    if (!w)
        return fkv_fail_memory(plan->ctx, own.bytes, "plan");
    *w = own;
    w->whole = (float *)(void *)((char *)w + parts[0]);
    w->exact = (float *)(void *)((char *)w->whole + parts[1]);
    w->states = (float *)(void *)((char *)w->exact + parts[1]);
    w->samples = (struct sample *)(void *)((char *)w->states + parts[2]);
    plan->meter = w;
    return FKV_OK;
}

void fkv_meter_free(struct fkv_plan_object *plan) {
    if (plan->meter)
        fkv_heap_free(&plan->ctx->heap, plan->meter, plan->meter->bytes);
    plan->meter = NULL;
}

/* Where a head's output of a chosen block lies, in outputs. */
static int64_t place_of(const struct fkv_plan_object *plan, const struct fkv_row *row, int layer,
                        int64_t first, int64_t block, int head) {
    const struct fkv_meter *meter = plan->cache->meter;
    const int64_t rank = fkv_meter_rank(meter, layer, block) - fkv_meter_rank(meter, layer, first);
    return (row->first_slot + rank) * plan->cache->profile->model.n_q_heads + head;
}

/* ---- whole outputs */

void fkv_meter_whole(const struct fkv_job *job, const struct fkv_row *row, int64_t new_token,
                     int head, const float *o, float lse) {
    const struct fkv_profile_object *p = job->profile;
    const struct fkv_meter_work *w = work_of(job->plan);
    const int64_t block = sealed_by(p, row->base + new_token);
    if (!w || block < 0)
        return;
    const int64_t first = first_block(job->plan, row, job->layer);
    if (block < first || !is_chosen(job->plan->cache->meter, job->layer, block))
        return;
    float *to = w->whole + place_of(job->plan, row, job->layer, first, block, head) * w->stride;
    memcpy(to, o, (size_t)p->model.head_dim * sizeof *to);
    to[w->stride - 1] = lse;
}

/* ---- a block alone */

struct meter_job {
    struct fkv_job job;
    struct fkv_meter_work *work;
    const struct fkv_row *row;
    int64_t first, end; /* blocks that are sealed now */
    enum fkv_chunk_kind kind;
};

/* The i-th chosen block: the last one that has no more than i others before it. */
static int64_t chosen_at(const struct meter_job *j, int64_t i) {
    const struct fkv_meter *meter = j->job.plan->cache->meter;
    const int64_t wanted = fkv_meter_rank(meter, j->job.layer, j->first) + i;
    int64_t low = j->first, high = j->end - 1;
    while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        if (fkv_meter_rank(meter, j->job.layer, middle) <= wanted)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

static int64_t count_chosen(const struct meter_job *j) {
    const struct fkv_meter *meter = j->job.plan->cache->meter;
    return fkv_meter_rank(meter, j->job.layer, j->end) -
           fkv_meter_rank(meter, j->job.layer, j->first);
}

static void compare(const struct meter_job *j, int64_t at, const float *coded, double lse) {
    const struct fkv_meter_work *w = j->work;
    const float *exact = w->exact + at * w->stride, *whole = w->whole + at * w->stride;
    const double exact_lse = (double)exact[w->stride - 1], all = (double)whole[w->stride - 1];
    const double share = exp(exact_lse - all), coded_share = exp(lse - all);
    const double rest = 1.0 - share + coded_share;
    struct sample s = {.lse = lse - exact_lse, .weight = share};
    for (int d = 0; d < j->job.profile->model.head_dim; d++) {
        const double o = (double)exact[d], c = (double)coded[d], O = (double)whole[d];
        const double moved = (coded_share * (c - O) - share * (o - O)) / rest;
        s.block_error += (c - o) * (c - o);
        s.block_energy += o * o;
        s.output_error += moved * moved;
        s.output_energy += O * O;
    }
    w->samples[at] = s;
}

/* Up to FKV_UNIT_ROWS query heads of one KV head, from the g-th of its group on. */
static void measure_rows(const struct meter_job *j, int64_t block, int kv_head, int g, int thread) {
    const struct fkv_profile_object *p = j->job.profile;
    const int64_t tiles = fkv_tiles_per_block(p), token = sealing_token(p, block);
    const int D = p->model.head_dim, group = p->model.group;
    float *floats = j->work->states + thread * j->work->state;
    struct fkv_unit u = {.row = j->row, .head = kv_head, .n_heads = 1};
    u.first_row = (token - j->row->base) * group + g;
    u.rows = (int)fkv_min64(FKV_UNIT_ROWS, group - g);
    fkv_unit_carve(&j->job, &u, floats, 0);
    floats += fkv_round16(fkv_state_floats(p, 0));
    const struct fkv_partial part = {
        .max = floats, .sum = floats + FKV_UNIT_ROWS, .o = floats + 2 * FKV_UNIT_ROWS};
    const struct fkv_chunk chunk = {.kind = j->kind,
                                    .tile = block * tiles,
                                    .token = fkv_sinks(p) + block * p->codec.block,
                                    .tiles = (int)tiles,
                                    .tokens = p->codec.block};
    struct fkv_plan_rope rope;
    fkv_plan_rope_begin(&rope, j->job.plan);
    for (int r = 0; r < u.rows; r++)
        fkv_load_query(&j->job, &u, 0, r, &rope);
    fkv_attend_chunk(&j->job, &u, 0, &chunk, thread, &part);
    for (int r = 0; r < u.rows; r++) {
        float *o = part.o + (ptrdiff_t)r * u.dim_stride;
        const int64_t at =
            place_of(j->job.plan, j->row, j->job.layer, j->first, block, kv_head * group + g + r);
        for (int d = 0; d < D; d++)
            o[d] /= part.sum[r];
        const float lse = part.max[r] + logf(part.sum[r]);
        if (j->kind == FKV_CHUNK_CODED) {
            compare(j, at, o, (double)lse);
            continue;
        }
        memcpy(j->work->exact + at * j->work->stride, o, (size_t)D * sizeof *o);
        j->work->exact[(at + 1) * j->work->stride - 1] = lse;
    }
}

static void measure_item(void *arg, int64_t item, int thread) {
    const struct meter_job *j = arg;
    const struct fkv_model *m = &j->job.profile->model;
    const int64_t block = chosen_at(j, item / m->n_kv_heads);
    for (int g = 0; g < m->group; g += FKV_UNIT_ROWS)
        measure_rows(j, block, (int)(item % m->n_kv_heads), g, thread);
}

static struct meter_job make_job(struct fkv_plan_object *plan, const struct fkv_row *row, int layer,
                                 const struct fkv_view *q, enum fkv_chunk_kind kind) {
    return (struct meter_job){
        .job = {plan, plan->cache->profile, plan->ctx->kernels, layer, q, NULL, NULL},
        .work = work_of(plan),
        .row = row,
        .kind = kind};
}

void fkv_meter_exact(struct fkv_plan_object *plan, const struct fkv_row *row, int layer,
                     const struct fkv_view *q, int64_t until) {
    struct meter_job j = make_job(plan, row, layer, q, FKV_CHUNK_EXACT);
    j.first = first_block(plan, row, layer);
    j.end = until / fkv_tiles_per_block(plan->cache->profile);
    if (q && j.work)
        fkv_pool_run(plan->ctx->pool, count_chosen(&j) * plan->cache->profile->model.n_kv_heads,
                     measure_item, &j);
}

/* ---- the sums; in the order of blocks and heads, so that threads do not matter */

static void add_sample(struct fkv_meter_sums *sums, const struct sample *s) {
    if (!isfinite(s->block_error + s->block_energy + s->lse + s->output_error + s->output_energy))
        return;
    sums->samples++;
    sums->block_error += s->block_error;
    sums->block_energy += s->block_energy;
    sums->lse += s->lse;
    sums->lse_square += s->lse * s->lse;
    sums->lse_max = fmax(sums->lse_max, fabs(s->lse));
    sums->weight += s->weight;
    sums->output_error += s->output_error;
    sums->output_energy += s->output_energy;
    if (s->block_error > 0.0)
        sums->block_max = fmax(sums->block_max, sqrt(s->block_error / s->block_energy));
    if (s->output_error > 0.0)
        sums->output_max = fmax(sums->output_max, sqrt(s->output_error / s->output_energy));
}

void fkv_meter_coded(struct fkv_plan_object *plan, const struct fkv_row *row, int layer,
                     const struct fkv_view *q, int64_t first) {
    const struct fkv_model *m = &plan->cache->profile->model;
    struct fkv_meter_sums *sums = &plan->cache->meter->sums[layer];
    struct meter_job j = make_job(plan, row, layer, q, FKV_CHUNK_CODED);
    j.first = first / fkv_tiles_per_block(plan->cache->profile);
    j.end = first_block(plan, row, layer);
    const int64_t chosen = count_chosen(&j);
    if (!q || !j.work) {
        sums->missed += (uint64_t)chosen;
        return;
    }
    fkv_pool_run(plan->ctx->pool, chosen * m->n_kv_heads, measure_item, &j);
    const struct sample *s = j.work->samples + row->first_slot * m->n_q_heads;
    for (int64_t i = 0; i < chosen * m->n_q_heads; i++)
        add_sample(sums, &s[i]);
    sums->blocks += (uint64_t)chosen;
}
