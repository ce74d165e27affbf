/* SPDX-License-Identifier: Apache-2.0 */
/* Plans, append, attend and merge: what they accept, what they refuse, and that a refusal changes
 * nothing. */
#include "fixture.h"
#include "guard.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define HQ 4
#define HK 2
#define D 16
#define TOKENS 7 /* of the step: 3 of one sequence, 4 of the other */

struct bench {
    struct heap heap;
    struct fixture f;
    fkv_plan *plan;
    struct stream streams[2];
    float q[TOKENS * HQ * D], k[TOKENS * HK * D], v[TOKENS * HK * D], out[TOKENS * HQ * D];
    float lse[TOKENS * HQ];
    fkv_tensor tq, tk, tv, to, tl;
};

static const int64_t step_new[2] = {3, 4};

static fkv_status update(fkv_plan *plan, const fkv_sequence *ids, const int64_t *n_new, int count) {
    fkv_batch batch;
    fkv_batch_init(&batch, sizeof batch);
    batch.count = count;
    batch.sequences = ids;
    batch.n_new = n_new;
    return fkv_plan_update(plan, &batch);
}

static fkv_status update_both(struct bench *b, fkv_plan *plan) {
    fkv_sequence ids[2] = {b->streams[0].id, b->streams[1].id};
    return update(plan, ids, step_new, 2);
}

static void fill(struct bench *b) {
    fixture_values(b->q, 500, TOKENS, HQ, D, 9, 0, 'q');
    fixture_values(b->k, 500, TOKENS, HK, D, 9, 0, 'k');
    fixture_values(b->v, 500, TOKENS, HK, D, 9, 0, 'v');
}

/* Two sequences, one with a coded middle and one still short, and a step for both. */
static void open_bench(struct bench *b, const struct options *options) {
    memset(b, 0, sizeof *b);
    struct options o = options ? *options : (struct options){0};
    o.heap = &b->heap;
    fixture_open(&b->f, &o);
    b->streams[0] = fixture_stream(&b->f, 1, 210);
    b->streams[1] = fixture_stream(&b->f, 2, 5);
    assert_int_equal(fkv_plan_create(b->f.cache, &b->plan), FKV_OK);
    assert_int_equal(update_both(b, b->plan), FKV_OK);
    fill(b);
    b->tq = fixture_tensor(b->q, FKV_DTYPE_F32, TOKENS, HQ, D);
    b->tk = fixture_tensor(b->k, FKV_DTYPE_F32, TOKENS, HK, D);
    b->tv = fixture_tensor(b->v, FKV_DTYPE_F32, TOKENS, HK, D);
    b->to = fixture_tensor(b->out, FKV_DTYPE_F32, TOKENS, HQ, D);
    b->tl = fixture_lse(b->lse, TOKENS, HQ);
}

static void close_bench(struct bench *b) {
    assert_int_equal(fkv_plan_destroy(b->plan), FKV_OK);
    fixture_close(&b->f);
}

static fkv_status append(struct bench *b, int layer) {
    return fkv_append(b->plan, layer, &b->tk, &b->tv);
}

static fkv_status attend(struct bench *b, int layer) {
    return fkv_attend(b->plan, layer, &b->tq, &b->to, &b->tl);
}

static fkv_status both(struct bench *b, int layer) {
    return fkv_append_attend(b->plan, layer, &b->tq, &b->tk, &b->tv, &b->to, &b->tl);
}

typedef fkv_status (*call_fn)(struct bench *b, int layer);

static uint64_t digest(struct bench *b) {
    uint64_t hash = fixture_digest(&b->f, b->streams[0].id);
    uint64_t other = fixture_digest(&b->f, b->streams[1].id);
    fkv_stats all = {.struct_size = sizeof all};
    assert_int_equal(fkv_cache_stats(b->f.cache, FKV_ALL_SEQUENCES, &all), FKV_OK);
    return fixture_hash(fixture_hash(hash, &other, sizeof other), &all, sizeof all);
}

/* The call is refused with `status`: nothing held has changed, outputs are untouched, no memory is kept. */
static void expect_refusal(struct bench *b, call_fn call, int layer, fkv_status status,
                           const char *what) {
    uint64_t before = digest(b);
    int64_t bytes = b->heap.bytes;
    memset(b->out, 0x5a, sizeof b->out);
    memset(b->lse, 0x5a, sizeof b->lse);
    fkv_status got = call(b, layer);
    if (got != status)
        fail_msg("%s: %s, expected %s", what, fkv_status_string(got), fkv_status_string(status));
    assert_true(fixture_message(&b->f)[0] != 0);
    const unsigned char *out = (unsigned char *)b->out, *lse = (unsigned char *)b->lse;
    for (size_t i = 0; i < sizeof b->out; i++)
        assert_int_equal(out[i], 0x5a);
    for (size_t i = 0; i < sizeof b->lse; i++)
        assert_int_equal(lse[i], 0x5a);
    assert_int_equal(b->heap.bytes, bytes);
    assert_true(digest(b) == before);
}

/* After all refusals the step still gives what it gives in a cache that saw none of them. */
static void expect_clean_step(struct bench *b) {
    struct bench other;
    open_bench(&other, &b->f.options);
    for (int layer = 0; layer < 2; layer++) {
        fill(b);
        assert_int_equal(both(b, layer), FKV_OK);
        assert_int_equal(both(&other, layer), FKV_OK);
        assert_memory_equal(b->out, other.out, sizeof b->out);
        assert_memory_equal(b->lse, other.lse, sizeof b->lse);
    }
    assert_true(digest(b) == digest(&other));
    close_bench(&other);
}

/* ---- plans */

static void plan_handles(void **state) {
    (void)state;
    struct bench b;
    open_bench(&b, NULL);
    fkv_plan *plan = (fkv_plan *)&b;
    assert_int_equal(fkv_plan_create(NULL, &plan), FKV_ERR_HANDLE);
    assert_null(plan);
    assert_int_equal(fkv_plan_create((fkv_cache *)b.f.ctx, &plan), FKV_ERR_HANDLE);
    assert_int_equal(fkv_plan_create((fkv_cache *)&b, &plan), FKV_ERR_HANDLE);
    assert_int_equal(fkv_plan_create(b.f.cache, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_plan_create(b.f.cache, &plan), FKV_OK);
    fkv_batch batch;
    assert_int_equal(fkv_batch_init(NULL, sizeof batch), FKV_ERR_INVALID);
    assert_int_equal(fkv_batch_init(&batch, 0), FKV_ERR_INVALID);
    assert_int_equal(fkv_batch_init(&batch, sizeof batch), FKV_OK);
    fkv_plan *wrong[] = {NULL,           (fkv_plan *)b.f.cache,    (fkv_plan *)b.f.profile,
                         (fkv_plan *)&b, (fkv_plan *)(uintptr_t)1, (fkv_plan *)UINTPTR_MAX};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        assert_int_equal(fkv_plan_update(wrong[i], &batch), FKV_ERR_HANDLE);
        assert_int_equal(fkv_append(wrong[i], 0, &b.tk, &b.tv), FKV_ERR_HANDLE);
        assert_int_equal(fkv_attend(wrong[i], 0, &b.tq, &b.to, NULL), FKV_ERR_HANDLE);
        assert_int_equal(fkv_append_attend(wrong[i], 0, &b.tq, &b.tk, &b.tv, &b.to, NULL),
                         FKV_ERR_HANDLE);
        assert_int_equal(fkv_plan_destroy(wrong[i]), wrong[i] ? FKV_ERR_HANDLE : FKV_OK);
    }
    assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
    assert_int_equal(fkv_plan_destroy(plan), FKV_ERR_HANDLE);
    assert_int_equal(fkv_plan_update(plan, &batch), FKV_ERR_HANDLE);
    close_bench(&b);
}

static void refuse_batch(struct bench *b, const fkv_batch *batch, fkv_status status,
                         const char *what) {
    int64_t bytes = b->heap.bytes;
    fkv_status got = fkv_plan_update(b->plan, batch);
    if (got != status)
        fail_msg("%s: %s, expected %s", what, fkv_status_string(got), fkv_status_string(status));
    assert_int_equal(b->heap.bytes, bytes);
}

static void bad_batches(void **state) {
    (void)state;
    struct bench b;
    open_bench(&b, NULL);
    fkv_sequence ids[3] = {b.streams[0].id, b.streams[1].id, b.streams[0].id}, freed;
    int64_t n_new[3] = {3, 4, 1}, positions[7] = {0, 1, 2, 3, 4, 5, 6};
    assert_int_equal(fkv_sequence_create(b.f.cache, NULL, &freed), FKV_OK);
    assert_int_equal(fkv_sequence_free(b.f.cache, freed), FKV_OK);
    fkv_batch good;
    fkv_batch_init(&good, sizeof good);
    good.count = 2;
    good.sequences = ids;
    good.n_new = n_new;
    refuse_batch(&b, NULL, FKV_ERR_INVALID, "NULL");
    fkv_batch bad = good;
    bad.struct_size = 0;
    refuse_batch(&b, &bad, FKV_ERR_INVALID, "struct_size 0");
    bad = good;
    bad.count = -1;
    refuse_batch(&b, &bad, FKV_ERR_INVALID, "count -1");
    bad.count = INT32_MIN;
    refuse_batch(&b, &bad, FKV_ERR_INVALID, "count INT32_MIN");
    bad = good;
    bad.sequences = NULL;
    refuse_batch(&b, &bad, FKV_ERR_INVALID, "no sequences");
    bad = good;
    bad.n_new = NULL;
    refuse_batch(&b, &bad, FKV_ERR_INVALID, "no n_new");
    bad = good;
    bad.count = 3;
    refuse_batch(&b, &bad, FKV_ERR_INVALID, "a sequence twice");
    bad = good;
    ids[1] = freed;
    refuse_batch(&b, &good, FKV_ERR_HANDLE, "a freed sequence");
    ids[1] = INT64_MAX;
    refuse_batch(&b, &good, FKV_ERR_HANDLE, "no sequence");
    ids[1] = FKV_ALL_SEQUENCES;
    refuse_batch(&b, &good, FKV_ERR_HANDLE, "all sequences");
    ids[1] = INT64_MIN;
    refuse_batch(&b, &good, FKV_ERR_HANDLE, "the least id");
    ids[1] = b.streams[1].id;
    n_new[1] = -1;
    refuse_batch(&b, &good, FKV_ERR_INVALID, "n_new -1");
    n_new[1] = INT64_MIN;
    refuse_batch(&b, &good, FKV_ERR_INVALID, "the least n_new");
    n_new[1] = INT64_MAX;
    refuse_batch(&b, &good, FKV_ERR_LIMIT, "the largest n_new");
    n_new[0] = INT64_MAX;
    refuse_batch(&b, &good, FKV_ERR_LIMIT, "a sum that overflows");
    n_new[0] = 3;
    n_new[1] = 4;
    bad.positions_count = 7;
    refuse_batch(&b, &bad, FKV_ERR_INVALID, "positions missing");
    bad.positions = positions;
    const int64_t counts[] = {0, 6, 8, -1, INT64_MAX, INT64_MIN};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        bad.positions_count = counts[i];
        refuse_batch(&b, &bad, FKV_ERR_INVALID, "positions_count");
    }
    bad.positions_count = 7;
    const int64_t wrong[] = {-1, INT64_C(1) << 31, INT64_MAX, INT64_MIN};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        positions[6] = wrong[i];
        refuse_batch(&b, &bad, FKV_ERR_INVALID, "position out of range");
    }
    struct {
        fkv_batch batch;
        uint64_t tail;
    } longer = {good, 1};
    longer.batch.struct_size = sizeof longer;
    refuse_batch(&b, &longer.batch, FKV_ERR_UNSUPPORTED, "an unknown field");
    /* the step from before is still set */
    expect_clean_step(&b);
    longer.tail = 0;
    assert_int_equal(fkv_plan_update(b.plan, &longer.batch), FKV_OK);
    close_bench(&b);
}

/* ---- tensors */

static void try_damages(struct bench *b, fkv_tensor *tensor, const char *name, call_fn call) {
    fkv_tensor good = *tensor;
    char what[96];
    for (int i = 0; i < fixture_n_damages; i++) {
        fixture_damages[i].apply(tensor);
        snprintf(what, sizeof what, "%s.%s", name, fixture_damages[i].name);
        expect_refusal(b, call, 0, fixture_damages[i].status, what);
        *tensor = good;
    }
}

static void bad_tensors(void **state) {
    (void)state;
    struct bench b;
    open_bench(&b, NULL);
    try_damages(&b, &b.tk, "append k", append);
    try_damages(&b, &b.tv, "append v", append);
    try_damages(&b, &b.tq, "attend q", attend);
    try_damages(&b, &b.to, "attend out", attend);
    try_damages(&b, &b.tl, "attend lse", attend);
    try_damages(&b, &b.tq, "both q", both);
    try_damages(&b, &b.tk, "both k", both);
    try_damages(&b, &b.tv, "both v", both);
    try_damages(&b, &b.to, "both out", both);
    try_damages(&b, &b.tl, "both lse", both);
    /* outputs that overlap themselves */
    b.to.strides[0] = b.to.strides[1];
    expect_refusal(&b, attend, 0, FKV_ERR_INVALID, "out overlaps itself");
    b.to.strides[0] = HQ * D * 4;
    b.tl.dtype = FKV_DTYPE_F16;
    expect_refusal(&b, attend, 0, FKV_ERR_INVALID, "lse in f16");
    b.tl.dtype = FKV_DTYPE_F32;
    expect_clean_step(&b);
    close_bench(&b);
}

static void null_tensors(void **state) {
    (void)state;
    struct bench b;
    open_bench(&b, NULL);
    uint64_t before = digest(&b);
    assert_int_equal(fkv_append(b.plan, 0, NULL, &b.tv), FKV_ERR_INVALID);
    assert_int_equal(fkv_append(b.plan, 0, &b.tk, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_attend(b.plan, 0, NULL, &b.to, &b.tl), FKV_ERR_INVALID);
    assert_int_equal(fkv_attend(b.plan, 0, &b.tq, NULL, &b.tl), FKV_ERR_INVALID);
    for (int i = 0; i < 4; i++)
        assert_int_equal(fkv_append_attend(b.plan, 0, i == 0 ? NULL : &b.tq, i == 1 ? NULL : &b.tk,
                                           i == 2 ? NULL : &b.tv, i == 3 ? NULL : &b.to, &b.tl),
                         FKV_ERR_INVALID);
    struct {
        fkv_tensor tensor;
        uint64_t tail;
    } longer = {b.tk, 1};
    longer.tensor.struct_size = sizeof longer;
    assert_int_equal(fkv_append(b.plan, 0, &longer.tensor, &b.tv), FKV_ERR_UNSUPPORTED);
    assert_true(digest(&b) == before);
    static const int layers[] = {-1, 2, INT32_MAX, INT32_MIN};
    for (int i = 0; i < 4; i++) {
        expect_refusal(&b, append, layers[i], FKV_ERR_INVALID, "layer");
        expect_refusal(&b, attend, layers[i], FKV_ERR_INVALID, "layer");
        expect_refusal(&b, both, layers[i], FKV_ERR_INVALID, "layer");
    }
    expect_clean_step(&b);
    longer.tail = 0;
    assert_int_equal(update_both(&b, b.plan), FKV_OK);
    assert_int_equal(fkv_append(b.plan, 0, &longer.tensor, &b.tv), FKV_OK);
    close_bench(&b);
}

/* A [heads, tokens, D] array in f16 with gaps full of NaN gives what the packed f32 one gives. */
static void strides_and_gaps(void **state) {
    (void)state;
    struct bench b, packed;
    open_bench(&b, NULL);
    open_bench(&packed, NULL);
    enum { ROW = D + 5, HEAD = TOKENS * ROW + 3 };
    float k[HK * HEAD];
    for (int i = 0; i < HK * HEAD; i++)
        k[i] = NAN;
    for (int t = 0; t < TOKENS; t++)
        for (int h = 0; h < HK; h++)
            memcpy(k + h * HEAD + t * ROW, b.k + (t * HK + h) * D, D * sizeof *k);
    float out[HQ * HEAD];
    memset(out, 0x5a, sizeof out);
    b.tk.data = k;
    b.tk.strides[0] = ROW * 4;
    b.tk.strides[1] = HEAD * 4;
    b.tk.byte_length = ((HK - 1) * HEAD + (TOKENS - 1) * ROW + D) * 4;
    b.to.data = out;
    b.to.strides[0] = ROW * 4;
    b.to.strides[1] = HEAD * 4;
    b.to.byte_length = ((HQ - 1) * HEAD + (TOKENS - 1) * ROW + D) * 4;
    assert_int_equal(both(&b, 0), FKV_OK);
    assert_int_equal(both(&packed, 0), FKV_OK);
    for (int h = 0; h < HQ; h++)
        for (int i = 0; i < HEAD; i++) {
            int t = i / ROW, d = i % ROW;
            float gap;
            memset(&gap, 0x5a, sizeof gap);
            const float *expected = t < TOKENS && d < D ? &packed.out[(t * HQ + h) * D + d] : &gap;
            assert_memory_equal(&out[h * HEAD + i], expected, sizeof gap);
        }
    assert_int_equal(both(&b, 1), FKV_OK);
    assert_int_equal(both(&packed, 1), FKV_OK);
    assert_true(digest(&b) == digest(&packed));
    close_bench(&b);
    close_bench(&packed);
}

/* A tensor of 3 tokens whose last byte is the last one of its memory. */
static fkv_tensor edge_tensor(struct guard *g, fkv_dtype dtype, int heads, int dim) {
    size_t bytes = 3 * (size_t)heads * (size_t)dim * (dtype == FKV_DTYPE_F32 ? 4 : 2);
    uint16_t *data = guard_alloc(g, bytes, 0);
    for (size_t i = 0; i < bytes / 2; i++)
        data[i] = (uint16_t)(0x3800 + i % 64); /* finite in every type */
    return fixture_tensor(data, dtype, 3, heads, dim);
}

static void check_edges(int dim, fkv_dtype dtype, fkv_cpu_level level) {
    struct fixture f;
    struct options options = {.dim = dim, .exact = true, .level = level};
    fixture_open(&f, &options);
    fkv_sequence id;
    fkv_plan *plan;
    struct guard g[5];
    fkv_tensor q = edge_tensor(&g[0], dtype, 4, dim), k = edge_tensor(&g[1], dtype, 2, dim);
    fkv_tensor v = edge_tensor(&g[2], dtype, 2, dim), out = edge_tensor(&g[3], dtype, 4, dim);
    fkv_tensor lse = fixture_lse(guard_alloc(&g[4], 3 * 4 * 4, 0), 3, 4);
    assert_int_equal(fkv_sequence_create(f.cache, NULL, &id), FKV_OK);
    assert_int_equal(fkv_plan_create(f.cache, &plan), FKV_OK);
    assert_int_equal(fixture_update(plan, id, 3), FKV_OK);
    assert_int_equal(fkv_append_attend(plan, 0, &q, &k, &v, &out, &lse), FKV_OK);
    assert_int_equal(fkv_append(plan, 1, &k, &v), FKV_OK);
    assert_int_equal(fkv_attend(plan, 1, &q, &out, NULL), FKV_OK);
    assert_int_equal(fkv_sequence_read(f.cache, id, 0, 0, 3, &k, &v), FKV_OK);
    assert_int_equal(fkv_merge(f.ctx, &out, &lse, &q, &lse), FKV_OK);
    for (int i = 0; i < 5; i++) {
        assert_true(guard_intact(&g[i]));
        guard_free(&g[i]);
    }
    assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
    fixture_close(&f);
}

/* No tensor is touched outside its elements, whatever vectors the kernels use. */
static void edges_of_memory(void **state) {
    (void)state;
    fkv_context *ctx;
    fkv_context_info info = {.struct_size = sizeof info};
    assert_int_equal(fkv_context_create(NULL, &ctx), FKV_OK);
    assert_int_equal(fkv_context_query(ctx, &info), FKV_OK);
    assert_int_equal(fkv_context_destroy(ctx), FKV_OK);
    for (fkv_cpu_level level = FKV_CPU_REFERENCE; level <= info.best_cpu_level; level++)
        for (int dim = 8; dim <= 64; dim += 8)
            for (fkv_dtype dtype = FKV_DTYPE_F32; dtype <= FKV_DTYPE_BF16; dtype++)
                check_edges(dim, dtype, level);
}

/* ---- order of calls */

static void order_of_calls(void **state) {
    (void)state;
    struct bench b;
    open_bench(&b, NULL);
    assert_int_equal(append(&b, 0), FKV_OK);
    expect_refusal(&b, append, 0, FKV_ERR_STATE, "the layer has had this step");
    expect_refusal(&b, both, 0, FKV_ERR_STATE, "the layer has had this step");
    assert_int_equal(attend(&b, 0), FKV_OK);
    /* layers of unequal length: no new step for these, but this one may be finished */
    int64_t length;
    assert_int_equal(fkv_sequence_length(b.f.cache, b.streams[0].id, &length), FKV_OK);
    assert_int_equal(length, 210);
    fkv_plan *other;
    assert_int_equal(fkv_plan_create(b.f.cache, &other), FKV_OK);
    assert_int_equal(update_both(&b, other), FKV_ERR_STATE);
    assert_int_equal(update_both(&b, b.plan), FKV_ERR_STATE);
    assert_int_equal(fixture_update(other, b.streams[1].id, 1), FKV_ERR_STATE);
    assert_int_equal(both(&b, 1), FKV_OK);
    assert_int_equal(fkv_sequence_length(b.f.cache, b.streams[0].id, &length), FKV_OK);
    assert_int_equal(length, 213);
    /* outdated: another plan has grown one of the sequences since */
    assert_int_equal(update_both(&b, b.plan), FKV_OK);
    b.streams[1].length += 4;
    assert_int_equal(fixture_step(&b.f, other, &b.streams[1], 1, NULL, NULL), FKV_OK);
    expect_refusal(&b, append, 0, FKV_ERR_STATE, "outdated");
    expect_refusal(&b, attend, 0, FKV_ERR_STATE, "outdated");
    expect_refusal(&b, both, 0, FKV_ERR_STATE, "outdated");
    assert_int_equal(update_both(&b, b.plan), FKV_OK);
    assert_int_equal(both(&b, 0), FKV_OK);
    assert_int_equal(both(&b, 1), FKV_OK);
    assert_int_equal(fkv_plan_destroy(other), FKV_OK);
    close_bench(&b);
}

static void freed_sequence(void **state) {
    (void)state;
    struct bench b;
    open_bench(&b, NULL);
    assert_int_equal(append(&b, 0), FKV_OK);
    assert_int_equal(fkv_sequence_free(b.f.cache, b.streams[1].id), FKV_OK);
    assert_int_equal(append(&b, 1), FKV_ERR_STATE);
    assert_int_equal(attend(&b, 0), FKV_ERR_STATE);
    assert_int_equal(both(&b, 1), FKV_ERR_STATE);
    assert_int_equal(fixture_update(b.plan, b.streams[1].id, 1), FKV_ERR_HANDLE);
    /* the other one has a layer too long, for good: it can be freed */
    assert_int_equal(fixture_update(b.plan, b.streams[0].id, 1), FKV_ERR_STATE);
    assert_int_equal(fkv_sequence_free(b.f.cache, b.streams[0].id), FKV_OK);
    close_bench(&b);
}

/* A plan that was never updated, or whose cache is gone. */
static void idle_plans(void **state) {
    (void)state;
    struct bench b;
    open_bench(&b, NULL);
    fkv_plan *plan;
    assert_int_equal(fkv_plan_create(b.f.cache, &plan), FKV_OK);
    assert_int_equal(fkv_append(plan, 0, &b.tk, &b.tv) == FKV_OK, false);
    fkv_plan *other = b.plan;
    assert_int_equal(fkv_cache_destroy(b.f.cache), FKV_OK);
    assert_int_equal(update_both(&b, other), FKV_ERR_HANDLE);
    assert_int_equal(append(&b, 0), FKV_ERR_HANDLE);
    assert_int_equal(attend(&b, 0), FKV_ERR_HANDLE);
    assert_int_equal(both(&b, 0), FKV_ERR_HANDLE);
    assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
    b.f.cache = NULL;
    close_bench(&b);
}

static void nothing_to_do(void **state) {
    (void)state;
    struct bench b;
    open_bench(&b, NULL);
    uint64_t before = digest(&b);
    /* no sequences */
    assert_int_equal(update(b.plan, NULL, NULL, 0), FKV_OK);
    fkv_tensor q = fixture_tensor(NULL, FKV_DTYPE_F32, 0, HQ, D);
    fkv_tensor k = fixture_tensor(NULL, FKV_DTYPE_F16, 0, HK, D);
    fkv_tensor lse = fixture_lse(NULL, 0, HQ);
    assert_int_equal(fkv_append_attend(b.plan, 0, &q, &k, &k, &q, &lse), FKV_OK);
    assert_int_equal(fkv_append(b.plan, 1, &k, &k), FKV_OK);
    assert_int_equal(fkv_attend(b.plan, 1, &q, &q, NULL), FKV_OK);
    /* no tokens */
    assert_int_equal(fixture_update(b.plan, b.streams[0].id, 0), FKV_OK);
    assert_int_equal(fkv_append(b.plan, 0, &k, &k), FKV_OK);
    assert_int_equal(fkv_attend(b.plan, 0, &q, &q, &lse), FKV_OK);
    assert_int_equal(fkv_append_attend(b.plan, 1, &q, &k, &k, &q, &lse), FKV_OK);
    assert_true(digest(&b) == before);
    /* an empty sequence */
    fkv_sequence fresh;
    assert_int_equal(fkv_sequence_create(b.f.cache, NULL, &fresh), FKV_OK);
    assert_int_equal(fixture_update(b.plan, fresh, TOKENS), FKV_OK);
    assert_int_equal(attend(&b, 0), FKV_OK);
    for (int i = 0; i < TOKENS * HQ * D; i++)
        assert_true(b.out[i] == 0);
    for (int i = 0; i < TOKENS * HQ; i++)
        assert_true(b.lse[i] == -INFINITY);
    /* its first token sees itself alone */
    assert_int_equal(append(&b, 0), FKV_OK);
    assert_int_equal(attend(&b, 0), FKV_OK);
    for (int h = 0; h < HQ; h++)
        for (int d = 0; d < D; d++)
            assert_true(fabsf(b.out[h * D + d] - b.v[h / 2 * D + d]) <= 0x1p-11f);
    close_bench(&b);
}

/* ---- values */

static void expect_nonfinite(struct bench *b, call_fn call, float *x, float value,
                             const char *where) {
    float saved = *x;
    *x = value;
    expect_refusal(b, call, 0, FKV_ERR_NONFINITE, where);
    if (!strstr(fixture_message(&b->f), where))
        fail_msg("\"%s\" does not name %s", fixture_message(&b->f), where);
    *x = saved;
}

static void nonfinite(void **state) {
    (void)state;
    struct bench b;
    open_bench(&b, NULL);
    static const float values[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        float x = values[i];
        b.k[6 * HK * D] = x; /* a later one, which must not be the one named */
        expect_nonfinite(&b, append, &b.k[(5 * HK + 1) * D + 3], x, "k[5][1][3]");
        b.k[6 * HK * D] = 1;
        expect_nonfinite(&b, append, &b.k[0], x, "k[0][0][0]");
        expect_nonfinite(&b, append, &b.v[(6 * HK + 1) * D + 15], x, "v[6][1][15]");
        expect_nonfinite(&b, attend, &b.q[(2 * HQ + 3) * D + 8], x, "q[2][3][8]");
        expect_nonfinite(&b, both, &b.q[0], x, "q[0][0][0]");
        expect_nonfinite(&b, both, &b.k[(4 * HK + 1) * D], x, "k[4][1][0]");
        expect_nonfinite(&b, both, &b.v[(3 * HK) * D + 1], x, "v[3][0][1]");
    }
    /* beyond f16, also only after rotation or rounding */
    expect_nonfinite(&b, append, &b.k[D + 2], 1e30f, "k[0][1][2]");
    expect_nonfinite(&b, both, &b.v[D + 2], -1e30f, "v[0][1][2]");
    expect_nonfinite(&b, append, &b.v[D + 2], 65520, "v[0][1][2]");
    b.k[4 * HK * D] = b.k[4 * HK * D + D / 2] = 60000; /* 85000 long; index 1 + 5 = 6 radians */
    b.k[3 * HK * D] = b.k[3 * HK * D + D / 2] = 60000; /* index 5 */
    b.k[5 * HK * D] = b.k[5 * HK * D + D / 2] = 60000; /* index 7 */
    expect_refusal(&b, append, 0, FKV_ERR_NONFINITE, "overflow by rotation");
    expect_clean_step(&b);
    close_bench(&b);
}

/* What the storage type holds is accepted: f16 up to 65504 after rounding, f32 up to the end. */
static void large_values(void **state) {
    (void)state;
    struct bench b;
    open_bench(&b, NULL);
    b.v[D + 2] = 65519;
    b.v[D + 3] = -65504;
    assert_int_equal(both(&b, 0), FKV_OK);
    for (int i = 0; i < TOKENS * HQ * D; i++)
        assert_true(isfinite(b.out[i]));
    close_bench(&b);
    open_bench(&b, &(struct options){.storage = FKV_DTYPE_BF16, .exact = true});
    b.v[D + 2] = 1e30f;
    assert_int_equal(both(&b, 0), FKV_OK);
    close_bench(&b);
    open_bench(&b, &(struct options){.storage = FKV_DTYPE_F32, .exact = true});
    b.v[D + 2] = 3e38f;
    assert_int_equal(append(&b, 0), FKV_OK);
    close_bench(&b);
}

/* With the flag, a NaN spoils its own sequence and KV head and nothing else. */
static void propagation(void **state) {
    (void)state;
    struct bench b, clean;
    open_bench(&b, &(struct options){.flags = FKV_CONTEXT_PROPAGATE_NONFINITE});
    open_bench(&clean, &(struct options){.flags = FKV_CONTEXT_PROPAGATE_NONFINITE});
    b.v[(1 * HK + 1) * D + 4] = NAN; /* sequence 0, its second token, KV head 1 */
    b.k[(5 * HK + 0) * D + 2] = NAN; /* sequence 1, its third token, KV head 0 */
    assert_int_equal(both(&b, 0), FKV_OK);
    assert_int_equal(both(&clean, 0), FKV_OK);
    for (int t = 0; t < TOKENS; t++)
        for (int h = 0; h < HQ; h++) {
            const float *row = b.out + (t * HQ + h) * D;
            if ((t < 3) != (h / 2 == 1))
                continue;
            if (t == 1 || t == 2)
                assert_true(isnan(row[4]));
            else if (t == 5 || t == 6)
                assert_true(isnan(row[0]));
        }
    for (int t = 0; t < TOKENS; t++)
        for (int h = 0; h < HQ; h++)
            if ((t < 3) != (h / 2 == 1) || t == 0 || t == 3 || t == 4)
                assert_memory_equal(b.out + (t * HQ + h) * D, clean.out + (t * HQ + h) * D,
                                    D * sizeof(float));
    close_bench(&b);
    close_bench(&clean);
}

static void output_types(void **state) {
    (void)state;
    struct bench b;
    open_bench(&b, NULL);
    assert_int_equal(append(&b, 0), FKV_OK);
    assert_int_equal(attend(&b, 0), FKV_OK);
    uint16_t half[TOKENS * HQ * D];
    fkv_tensor out = fixture_tensor(half, FKV_DTYPE_BF16, TOKENS, HQ, D);
    assert_int_equal(fkv_attend(b.plan, 0, &b.tq, &out, NULL), FKV_OK);
    for (int i = 0; i < TOKENS * HQ * D; i++) {
        uint32_t bits;
        memcpy(&bits, &b.out[i], sizeof bits);
        bits += 0x7fff + (bits >> 16 & 1);
        assert_int_equal(half[i], bits >> 16);
    }
    out.dtype = FKV_DTYPE_F16;
    assert_int_equal(fkv_attend(b.plan, 0, &b.tq, &out, NULL), FKV_OK);
    for (int i = 0; i < TOKENS * HQ * D; i++) {
        int exponent = (half[i] >> 10 & 31) - 15, fraction = half[i] & 1023;
        double x = exponent > -15 ? ldexp(1024 + fraction, exponent - 10) : ldexp(fraction, -24);
        x = half[i] & 0x8000 ? -x : x;
        assert_true(fabs(x - b.out[i]) <= fmax(fabs(x) * 0x1p-11, 0x1p-25));
    }
    close_bench(&b);
}

/* A token's default position is its index; a position of 2^31 - 1 is as good as any. */
static void positions(void **state) {
    (void)state;
    struct bench b, explicit;
    open_bench(&b, NULL);
    open_bench(&explicit, NULL);
    fkv_sequence ids[2] = {explicit.streams[0].id, explicit.streams[1].id};
    int64_t at[TOKENS] = {210, 211, 212, 5, 6, 7, 8};
    fkv_batch batch;
    fkv_batch_init(&batch, sizeof batch);
    batch.count = 2;
    batch.sequences = ids;
    batch.n_new = step_new;
    batch.positions = at;
    batch.positions_count = TOKENS;
    assert_int_equal(fkv_plan_update(explicit.plan, &batch), FKV_OK);
    memset(at, 0xff, sizeof at); /* only read during the call */
    for (int layer = 0; layer < 2; layer++) {
        assert_int_equal(both(&b, layer), FKV_OK);
        assert_int_equal(both(&explicit, layer), FKV_OK);
        assert_memory_equal(b.out, explicit.out, sizeof b.out);
    }
    assert_true(digest(&b) == digest(&explicit));
    for (int t = 0; t < TOKENS; t++)
        at[t] = INT32_MAX;
    assert_int_equal(fkv_plan_update(explicit.plan, &batch), FKV_OK);
    assert_int_equal(both(&explicit, 0), FKV_OK);
    for (int i = 0; i < TOKENS * HQ * D; i++)
        assert_true(isfinite(explicit.out[i]));
    close_bench(&b);
    close_bench(&explicit);
}

/* ---- merge */

static fkv_status merge(struct bench *b, int layer) {
    (void)layer;
    return fkv_merge(b->f.ctx, &b->to, &b->tl, &b->tq, &b->tk);
}

static void bad_merges(void **state) {
    (void)state;
    struct bench b;
    open_bench(&b, NULL);
    float lse[TOKENS * HQ] = {0};
    b.tk = fixture_lse(lse, TOKENS, HQ);
    try_damages(&b, &b.tl, "lse_a", merge);
    try_damages(&b, &b.tq, "out_b", merge);
    try_damages(&b, &b.tk, "lse_b", merge);
    /* out_a says what the shape is, so one that is only different makes the others wrong */
    try_damages(&b, &b.to, "out_a", merge);
    assert_int_equal(fkv_merge(NULL, &b.to, &b.tl, &b.tq, &b.tk), FKV_ERR_HANDLE);
    assert_int_equal(fkv_merge((fkv_context *)b.plan, &b.to, &b.tl, &b.tq, &b.tk), FKV_ERR_HANDLE);
    assert_int_equal(fkv_merge(b.f.ctx, NULL, &b.tl, &b.tq, &b.tk), FKV_ERR_INVALID);
    assert_int_equal(fkv_merge(b.f.ctx, &b.to, NULL, &b.tq, &b.tk), FKV_ERR_INVALID);
    assert_int_equal(fkv_merge(b.f.ctx, &b.to, &b.tl, NULL, &b.tk), FKV_ERR_INVALID);
    assert_int_equal(fkv_merge(b.f.ctx, &b.to, &b.tl, &b.tq, NULL), FKV_ERR_INVALID);
    fkv_tensor out = fixture_tensor(NULL, FKV_DTYPE_F16, 0, HQ, D), l = fixture_lse(NULL, 0, HQ);
    assert_int_equal(fkv_merge(b.f.ctx, &out, &l, &out, &l), FKV_OK);
    close_bench(&b);
}

/* Against the formula, with rows that saw nothing on one side, on the other, or on both, and with
 * logarithms too far apart to add. */
static void merges(void **state) {
    (void)state;
    struct bench b;
    open_bench(&b, NULL);
    static const float pairs[TOKENS][2] = {
        {0, 0},      {1.5f, -2},   {-INFINITY, 3}, {3, -INFINITY}, {-INFINITY, -INFINITY},
        {1000, 990}, {-1000, 1000}};
    float lse[TOKENS * HQ], before[TOKENS * HQ * D];
    fixture_values(b.out, 0, TOKENS, HQ, D, 4, 0, 'o');
    for (int i = 0; i < TOKENS * HQ; i++) {
        b.lse[i] = pairs[i / HQ][0];
        lse[i] = pairs[i / HQ][1];
        for (int d = 0; d < D; d++) {
            b.out[i * D + d] = b.lse[i] == -INFINITY ? 0 : b.out[i * D + d];
            b.q[i * D + d] = lse[i] == -INFINITY ? 0 : b.q[i * D + d];
        }
    }
    memcpy(before, b.out, sizeof before);
    fkv_tensor tl = fixture_lse(lse, TOKENS, HQ);
    assert_int_equal(fkv_merge(b.f.ctx, &b.to, &b.tl, &b.tq, &tl), FKV_OK);
    for (int i = 0; i < TOKENS * HQ * D; i++) {
        double la = pairs[i / (HQ * D)][0], lb = pairs[i / (HQ * D)][1], m = fmax(la, lb);
        double wa = m == -INFINITY ? 0 : exp(la - m), wb = m == -INFINITY ? 0 : exp(lb - m);
        double sum = wa + wb, out = sum > 0 ? (wa * before[i] + wb * b.q[i]) / sum : 0;
        double l = sum > 0 ? m + log(sum) : -INFINITY;
        assert_true(fabs(out - b.out[i]) <= 1e-6);
        assert_true(l == b.lse[i / D] || fabs(l - b.lse[i / D]) <= 1e-6 * (1 + fabs(l)));
    }
    close_bench(&b);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plan_handles),    cmocka_unit_test(bad_batches),
        cmocka_unit_test(bad_tensors),     cmocka_unit_test(null_tensors),
        cmocka_unit_test(edges_of_memory), cmocka_unit_test(strides_and_gaps),
        cmocka_unit_test(order_of_calls),  cmocka_unit_test(freed_sequence),
        cmocka_unit_test(idle_plans),      cmocka_unit_test(nothing_to_do),
        cmocka_unit_test(nonfinite),       cmocka_unit_test(large_values),
        cmocka_unit_test(propagation),     cmocka_unit_test(output_types),
        cmocka_unit_test(positions),       cmocka_unit_test(bad_merges),
        cmocka_unit_test(merges),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
