/* SPDX-License-Identifier: Apache-2.0 */
/* fkv_plan_select(), fkv_plan_selection(), FKV_CACHE_KEY_INDEX: arguments, states, bytes, failing allocations. */
#include "fixture.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { HQ = 4, HK = 2, DIM = 16, MOST = 400 };

struct setup {
    struct heap heap;
    fkv_context *ctx;
    fkv_profile *profile;
    fkv_cache *cache;
    fkv_plan *plan;
    fkv_sequence id;
    double inv_freq[DIM / 2];
    float q[MOST * HQ * DIM], k[MOST * HK * DIM], v[MOST * HK * DIM], out[MOST * HQ * DIM];
};

static void OK(fkv_status status) {
    assert_int_equal(status, FKV_OK);
}

static fkv_select_params small(void) {
    fkv_select_params p;
    OK(fkv_select_params_init(&p, sizeof p));
    p.n_global = 8;
    p.n_local = 40;
    p.span = 8;
    p.clip = 4;
    p.chunk = 16;
    return p;
}

/* bits 16: with an index */
static struct setup *begin_with(fkv_domain domain, int bits) {
    struct setup *s = calloc(1, sizeof *s);
    fkv_context_params context;
    fkv_model_params model;
    fkv_codec_params codec;
    fkv_cache_params cache;
    OK(fkv_context_params_init(&context, sizeof context));
    context.threads = 2;
    context.alloc = heap_alloc;
    context.free = heap_free;
    context.alloc_user = &s->heap;
    OK(fkv_context_create(&context, &s->ctx));
    OK(fkv_model_params_init(&model, sizeof model));
    model.n_layers = 1;
    model.n_q_heads = HQ;
    model.n_kv_heads = HK;
    model.head_dim = DIM;
    model.rope_layout = FKV_ROPE_HALF_SPLIT;
    for (int j = 0; j < DIM / 2; j++)
        s->inv_freq[j] = pow(1000, -j / 8.0);
    model.inv_freq = s->inv_freq;
    model.inv_freq_count = DIM / 2;
    OK(fkv_codec_params_init(&codec, sizeof codec));
    codec.domain = domain;
    OK(fkv_profile_create_uniform(s->ctx, &model, &codec, bits, &s->profile));
    OK(fkv_cache_params_init(&cache, sizeof cache));
    cache.flags = bits == 16 ? FKV_CACHE_KEY_INDEX : 0;
    OK(fkv_cache_create(s->ctx, s->profile, &cache, &s->cache));
    OK(fkv_plan_create(s->cache, &s->plan));
    OK(fkv_sequence_create(s->cache, NULL, &s->id));
    fixture_values(s->q, 0, MOST, HQ, DIM, 1, 0, 'q');
    fixture_values(s->k, 0, MOST, HK, DIM, 1, 0, 'k');
    fixture_values(s->v, 0, MOST, HK, DIM, 1, 0, 'v');
    return s;
}

static struct setup *begin(fkv_domain domain) {
    return begin_with(domain, 4);
}

static void end(struct setup *s) {
    OK(fkv_plan_destroy(s->plan));
    OK(fkv_cache_destroy(s->cache));
    OK(fkv_profile_destroy(s->profile));
    OK(fkv_context_destroy(s->ctx));
    assert_int_equal(s->heap.bytes, 0);
    assert_int_equal(s->heap.mismatches, 0);
    free(s);
}

static fkv_status update(struct setup *s, int64_t n) {
    fkv_batch batch;
    OK(fkv_batch_init(&batch, sizeof batch));
    batch.count = 1;
    batch.sequences = &s->id;
    batch.n_new = &n;
    return fkv_plan_update(s->plan, &batch);
}

static fkv_status run(struct setup *s, int64_t first, int64_t n) {
    fkv_tensor q = fixture_tensor(s->q + first * HQ * DIM, FKV_DTYPE_F32, n, HQ, DIM);
    fkv_tensor k = fixture_tensor(s->k + first * HK * DIM, FKV_DTYPE_F32, n, HK, DIM);
    fkv_tensor v = fixture_tensor(s->v + first * HK * DIM, FKV_DTYPE_F32, n, HK, DIM);
    fkv_tensor out = fixture_tensor(s->out + first * HQ * DIM, FKV_DTYPE_F32, n, HQ, DIM);
    return fkv_append_attend(s->plan, 0, &q, &k, &v, &out, NULL);
}

static void params(void **state) {
    (void)state;
    struct setup *s = begin(FKV_DOMAIN_UNROTATED);
    const struct {
        size_t field;
        int32_t value;
        fkv_status status;
    } cases[] = {
        {offsetof(fkv_select_params, n_global), -1, FKV_ERR_INVALID},
        {offsetof(fkv_select_params, n_global), 0, FKV_OK},
        {offsetof(fkv_select_params, n_global), FKV_MAX_SCOPE, FKV_ERR_INVALID},
        {offsetof(fkv_select_params, n_local), 0, FKV_ERR_INVALID},
        {offsetof(fkv_select_params, n_local), 16, FKV_OK},
        {offsetof(fkv_select_params, n_local), 15, FKV_ERR_INVALID}, /* chunk is 16 */
        {offsetof(fkv_select_params, span), 0, FKV_ERR_INVALID},
        {offsetof(fkv_select_params, span), INT32_MAX, FKV_ERR_INVALID},
        {offsetof(fkv_select_params, top_k), -1, FKV_ERR_INVALID},
        {offsetof(fkv_select_params, top_k), FKV_MAX_TOP_K, FKV_OK},
        {offsetof(fkv_select_params, top_k), FKV_MAX_TOP_K + 1, FKV_ERR_INVALID},
        {offsetof(fkv_select_params, clip), -1, FKV_ERR_INVALID},
        {offsetof(fkv_select_params, clip), FKV_MAX_SCOPE, FKV_ERR_INVALID},
        {offsetof(fkv_select_params, chunk), 0, FKV_ERR_INVALID},
        {offsetof(fkv_select_params, chunk), 41, FKV_ERR_INVALID},
        {offsetof(fkv_select_params, reserved), 1, FKV_ERR_UNSUPPORTED},
        {offsetof(fkv_select_params, struct_size), 4, FKV_ERR_INVALID},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        fkv_select_params p = small();
        memcpy((char *)&p + cases[i].field, &cases[i].value, sizeof cases[i].value);
        assert_int_equal(fkv_plan_select(s->plan, &p), cases[i].status);
    }
    assert_int_equal(fkv_select_params_init(NULL, sizeof(fkv_select_params)), FKV_ERR_INVALID);
    assert_int_equal(fkv_plan_select(NULL, NULL), FKV_ERR_HANDLE);
    assert_int_equal(fkv_plan_select((fkv_plan *)s->cache, NULL), FKV_ERR_HANDLE);
    OK(fkv_plan_select(s->plan, NULL));
    end(s);
    s = begin(FKV_DOMAIN_ROTATED);
    fkv_select_params p = small();
    assert_int_equal(fkv_plan_select(s->plan, &p), FKV_ERR_UNSUPPORTED);
    OK(fkv_plan_select(s->plan, NULL));
    OK(update(s, 10));
    OK(run(s, 0, 10));
    end(s);
}

static void states(void **state) {
    (void)state;
    struct setup *s = begin(FKV_DOMAIN_UNROTATED);
    fkv_select_params p = small();
    fkv_selection got = {.struct_size = sizeof got};
    int64_t spans[8];
    OK(update(s, 200));
    OK(run(s, 0, 200));
    assert_int_equal(fkv_plan_selection(s->plan, 0, &got, NULL, 0), FKV_ERR_STATE);
    OK(fkv_plan_select(s->plan, &p)); /* from the next update on */
    assert_int_equal(fkv_plan_selection(s->plan, 0, &got, NULL, 0), FKV_ERR_STATE);
    OK(update(s, 1));
    fkv_tensor q = fixture_tensor(s->q, FKV_DTYPE_F32, 1, HQ, DIM);
    fkv_tensor out = fixture_tensor(s->out, FKV_DTYPE_F32, 1, HQ, DIM);
    assert_int_equal(fkv_attend(s->plan, 0, &q, &out, NULL), FKV_ERR_STATE);
    assert_int_equal(fkv_plan_selection(s->plan, 0, &got, NULL, 0), FKV_ERR_STATE);
    OK(run(s, 200, 1));
    OK(fkv_plan_selection(s->plan, 0, &got, NULL, 0));
    assert_int_equal(got.tokens, 201);
    assert_int_equal(got.middle_first, 8);
    assert_int_equal(got.middle_end, 161);
    assert_in_range(got.spans, 1, 4);
    assert_int_equal(fkv_plan_selection(s->plan, 0, &got, spans, 1), FKV_ERR_BUFFER);
    assert_int_equal(fkv_plan_selection(s->plan, 0, &got, NULL, 1), FKV_ERR_INVALID);
    assert_int_equal(fkv_plan_selection(s->plan, 1, &got, NULL, 0), FKV_ERR_INVALID);
    assert_int_equal(fkv_plan_selection(s->plan, -1, &got, NULL, 0), FKV_ERR_INVALID);
    assert_int_equal(fkv_plan_selection(s->plan, 0, NULL, NULL, 0), FKV_ERR_INVALID);
    OK(fkv_plan_selection(s->plan, 0, &got, spans, 8));
    int64_t seen = 0;
    for (int64_t i = 0; i < got.spans; i++)
        seen += spans[2 * i + 1] - spans[2 * i];
    assert_int_equal(got.view, 8 + seen + 40);
    OK(update(s, 0)); /* nothing new: nothing to select for */
    OK(run(s, 201, 0));
    assert_int_equal(fkv_plan_selection(s->plan, 0, &got, NULL, 0), FKV_ERR_STATE);
    OK(fkv_plan_select(s->plan, NULL));
    OK(update(s, 1));
    OK(run(s, 201, 1));
    assert_int_equal(fkv_plan_selection(s->plan, 0, &got, NULL, 0), FKV_ERR_STATE);
    end(s);
}

/* Every allocation of an update and a step fails once: nothing has changed, and the next try succeeds. */
static void fail_each(struct setup *s) {
    fkv_select_params p = small();
    int64_t length, at = 0;
    OK(fkv_plan_select(s->plan, &p));
    for (int i = 0; i < 4; i++) {
        static const int64_t steps[] = {170, 1, 60, 130};
        for (int64_t n = 1;; n++) {
            heap_fail(&s->heap, n, false);
            fkv_status status = update(s, steps[i]);
            if (status == FKV_OK)
                status = run(s, at, steps[i]);
            const bool failed = heap_failed(&s->heap);
            heap_fail(&s->heap, 0, false);
            OK(fkv_sequence_length(s->cache, s->id, &length));
            assert_int_equal(status, failed ? FKV_ERR_NOMEM : FKV_OK);
            assert_int_equal(length, failed ? at : at + steps[i]);
            if (!failed)
                break;
        }
        at += steps[i];
    }
    end(s);
}

/* Queries with selection see views, not the whole: the fidelity meter counts what it could not measure. */
static void with_meter(void **state) {
    (void)state;
    struct setup *s = begin(FKV_DOMAIN_UNROTATED);
    fkv_select_params p = small();
    fkv_fidelity got = {.struct_size = sizeof got};
    OK(fkv_cache_meter(s->cache, 1));
    OK(fkv_plan_select(s->plan, &p));
    OK(update(s, 4 + 128 + 128));
    OK(run(s, 0, 4 + 128 + 128));
    OK(fkv_cache_fidelity(s->cache, 0, &got));
    assert_int_equal(got.blocks, 0);
    assert_int_equal(got.blocks_missed, 1);
    OK(fkv_plan_select(s->plan, NULL));
    OK(update(s, 128));
    OK(run(s, 4 + 128 + 128, 128));
    OK(fkv_cache_fidelity(s->cache, 0, &got));
    assert_int_equal(got.blocks, 1);
    assert_int_equal(got.blocks_missed, 1);
    assert_true(got.block_error > 0);
    end(s);
}

static void failing(void **state) {
    (void)state;
    fail_each(begin(FKV_DOMAIN_UNROTATED));
    fail_each(begin_with(FKV_DOMAIN_UNROTATED, 16));
}

/* ---- an index of keys */

static void flags(void **state) {
    (void)state;
    struct setup *s = begin(FKV_DOMAIN_ROTATED), *unrotated = begin(FKV_DOMAIN_UNROTATED);
    fkv_cache_params p;
    fkv_cache *cache;
    OK(fkv_cache_params_init(&p, sizeof p));
    assert_int_equal(p.flags, 0);
    p.flags = 2;
    assert_int_equal(fkv_cache_create(s->ctx, s->profile, &p, &cache), FKV_ERR_UNSUPPORTED);
    p.flags = FKV_CACHE_KEY_INDEX;
    assert_int_equal(fkv_cache_create(s->ctx, s->profile, &p, &cache), FKV_ERR_UNSUPPORTED);
    assert_null(cache);
    p.struct_size = offsetof(fkv_cache_params, flags); /* of a program that does not know them */
    OK(fkv_cache_create(s->ctx, s->profile, &p, &cache));
    OK(fkv_cache_destroy(cache));
    p.struct_size = sizeof p; /* keys are coded: no index, but nothing wrong */
    OK(fkv_cache_create(unrotated->ctx, unrotated->profile, &p, &cache));
    OK(fkv_cache_destroy(cache));
    end(s);
    end(unrotated);
}

static fkv_stats stats_of(struct setup *s, fkv_sequence id) {
    fkv_stats stats = {.struct_size = sizeof stats};
    OK(fkv_cache_stats(s->cache, id, &stats));
    return stats;
}

/* The index is counted as it is allocated, shared by forks, and goes with its block. */
static void index_bytes(void **state) {
    (void)state;
    struct setup *s = begin_with(FKV_DOMAIN_UNROTATED, 16);
    fkv_sequence child;
    fkv_stats estimate = {.struct_size = sizeof estimate};
    OK(update(s, MOST));
    OK(run(s, 0, MOST));
    OK(fkv_profile_estimate(s->profile, MOST, 0, &estimate));
    const fkv_stats one = stats_of(s, s->id), all = stats_of(s, FKV_ALL_SEQUENCES);
    assert_int_equal(one.tokens_coded, 256); /* two blocks of 128 */
    /* a byte for each element of K, and what the ranges take */
    const uint64_t codes = 256 * HK * DIM;
    assert_in_range(one.bytes_index, codes, codes + 256 * HK * 2 + 2 * HK * 256);
    assert_int_equal(all.bytes_index, one.bytes_index);
    assert_int_equal(all.bytes_blocks,
                     estimate.bytes_blocks + all.bytes - estimate.bytes - all.bytes_index);
    assert_in_range(all.bytes, estimate.bytes + one.bytes_index,
                    estimate.bytes + one.bytes_index + 2 * 64);
    OK(fkv_sequence_fork(s->cache, s->id, &child));
    assert_int_equal(stats_of(s, child).bytes_index, one.bytes_index);
    assert_int_equal(stats_of(s, FKV_ALL_SEQUENCES).bytes_index, one.bytes_index);
    OK(fkv_sequence_crop(s->cache, s->id, 4 + 128));
    assert_int_equal(stats_of(s, s->id).bytes_index, one.bytes_index / 2);
    assert_int_equal(stats_of(s, FKV_ALL_SEQUENCES).bytes_index, one.bytes_index);
    OK(fkv_sequence_free(s->cache, child));
    assert_int_equal(stats_of(s, FKV_ALL_SEQUENCES).bytes_index, one.bytes_index / 2);
    OK(fkv_sequence_crop(s->cache, s->id, 0));
    assert_int_equal(stats_of(s, FKV_ALL_SEQUENCES).bytes_index, 0);
    end(s);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(params),  cmocka_unit_test(states),
                                       cmocka_unit_test(failing), cmocka_unit_test(with_meter),
                                       cmocka_unit_test(flags),   cmocka_unit_test(index_bytes)};
    return cmocka_run_group_tests_name("selection", tests, NULL, NULL);
}
