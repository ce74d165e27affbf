/* SPDX-License-Identifier: Apache-2.0 */
/* fkv_cache_meter() and fkv_cache_fidelity(): arguments, states, failing allocations. What they measure is the
 * subject of property/test_meter.c. */
#include "fixture.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* The fixture's calibrated profile: 4 sinks, 32 local tokens, blocks of 64. */
enum { FIRST = 4 + 32, BLOCK = 64 };

static void OK(fkv_status status) {
    assert_int_equal(status, FKV_OK);
}

static fkv_fidelity fidelity_of(const struct fixture *f, int layer) {
    fkv_fidelity got = {.struct_size = sizeof got};
    OK(fkv_cache_fidelity(f->cache, layer, &got));
    return got;
}

static uint64_t bytes_of(const struct fixture *f) {
    fkv_stats stats = {.struct_size = sizeof stats};
    OK(fkv_cache_stats(f->cache, FKV_ALL_SEQUENCES, &stats));
    return stats.bytes;
}

static fkv_status append_only(struct fixture *f, fkv_plan *plan, struct stream *s, int64_t tokens) {
    const struct options *o = &f->options;
    float *x = malloc(fixture_q_floats(f, tokens) * sizeof *x);
    fkv_status status = fixture_update(plan, s->id, tokens);
    for (int layer = 0; !status && layer < o->layers; layer++) {
        fixture_values(x, s->length, tokens, o->kv_heads, o->dim, s->number, layer, 'k');
        fkv_tensor k = fixture_tensor(x, FKV_DTYPE_F32, tokens, o->kv_heads, o->dim);
        status = fkv_append(plan, layer, &k, &k);
    }
    s->length += status ? 0 : tokens;
    free(x);
    return status;
}

static void arguments(void **state) {
    (void)state;
    struct fixture f;
    fkv_fidelity got = {.struct_size = sizeof got, .blocks = 77}, same = got;
    fixture_open(&f, &(struct options){.calibrated = true});
    static const double bad[] = {-0.01, 1.0001, -INFINITY, INFINITY, NAN};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(fkv_cache_meter(f.cache, bad[i]), FKV_ERR_INVALID);
        assert_non_null(strstr(fixture_message(&f), "fraction"));
    }
    assert_int_equal(fkv_cache_meter(NULL, 1), FKV_ERR_HANDLE);
    assert_int_equal(fkv_cache_meter((fkv_cache *)f.profile, 1), FKV_ERR_HANDLE);
    assert_int_equal(fkv_cache_fidelity(f.cache, 0, &got), FKV_ERR_STATE);
    assert_non_null(strstr(fixture_message(&f), "off"));
    OK(fkv_cache_meter(f.cache, 0)); /* already off */
    OK(fkv_cache_meter(f.cache, 0.5));
    assert_int_equal(fkv_cache_fidelity(NULL, 0, &got), FKV_ERR_HANDLE);
    assert_int_equal(fkv_cache_fidelity(f.cache, -2, &got), FKV_ERR_INVALID);
    assert_int_equal(fkv_cache_fidelity(f.cache, 2, &got), FKV_ERR_INVALID);
    assert_int_equal(fkv_cache_fidelity(f.cache, 0, NULL), FKV_ERR_INVALID);
    got.struct_size = sizeof got - 8;
    assert_int_equal(fkv_cache_fidelity(f.cache, 0, &got), FKV_ERR_INVALID);
    got.struct_size = sizeof got;
    assert_memory_equal(&got, &same, sizeof got);
    for (int layer = -1; layer < 2; layer++) {
        got = fidelity_of(&f, layer);
        same = (fkv_fidelity){.struct_size = sizeof same, .fraction = 0.5};
        assert_memory_equal(&got, &same, sizeof got);
    }
    fixture_close(&f);
}

/* Only sealed blocks can be measured. */
static void other_profiles(void **state) {
    (void)state;
    const struct options kinds[] = {{.exact = true}, {.min_middle = 1}};
    for (int i = 0; i < 2; i++) {
        struct fixture f;
        fkv_fidelity got = {.struct_size = sizeof got};
        fixture_open(&f, &kinds[i]);
        assert_int_equal(fkv_cache_meter(f.cache, 1), FKV_ERR_UNSUPPORTED);
        assert_non_null(strstr(fixture_message(&f), "calibrated"));
        OK(fkv_cache_meter(f.cache, 0)); /* it is off, as asked */
        assert_int_equal(fkv_cache_fidelity(f.cache, 0, &got), FKV_ERR_STATE);
        fixture_stream(&f, 1, 300);
        fixture_close(&f);
    }
}

/* When figures begin, end and begin afresh. */
static void states(void **state) {
    (void)state;
    struct heap heap = {0};
    struct fixture f;
    fkv_plan *plan;
    fixture_open(&f, &(struct options){.calibrated = true, .threads = 2, .heap = &heap});
    struct stream s = fixture_stream(&f, 1, FIRST + 2 * BLOCK - 1);
    OK(fkv_plan_create(f.cache, &plan));
    const uint64_t bytes = bytes_of(&f);
    const int64_t live = heap.bytes;
    OK(fkv_cache_meter(f.cache, 1));
    assert_int_equal(bytes_of(&f) - bytes, heap.bytes - live);
    OK(fixture_step(&f, plan, &s, 1, NULL, NULL)); /* the arrival that seals the second block */
    fkv_fidelity got = fidelity_of(&f, FKV_ALL_LAYERS), layers[2];
    assert_int_equal(got.blocks, 2);
    assert_int_equal(got.samples, 2 * 4);
    assert_true(got.block_error > 0 && got.output_error > 0 && got.weight > 0 && got.weight < 1);
    for (int i = 0; i < 2; i++) {
        layers[i] = fidelity_of(&f, i);
        assert_int_equal(layers[i].blocks, 1);
        assert_true(layers[i].block_error_max <= got.block_error_max);
    }
    assert_true(fabs(layers[0].lse_bias + layers[1].lse_bias - 2 * got.lse_bias) < 1e-12);
    OK(append_only(&f, plan, &s, 2 * BLOCK)); /* no queries */
    got = fidelity_of(&f, 1);
    assert_int_equal(got.blocks, 1);
    assert_int_equal(got.blocks_missed, 2);
    OK(fixture_step(&f, plan, &s, BLOCK - 1, NULL, NULL)); /* seals nothing */
    assert_int_equal(fidelity_of(&f, 1).blocks, 1);
    OK(fixture_update(plan, s.id, 1));
    OK(fkv_cache_meter(f.cache, 1)); /* afresh, and too late for this step */
    assert_int_equal(fidelity_of(&f, 1).blocks, 0);
    for (int layer = 0; layer < 2; layer++)
        OK(fixture_layer(&f, plan, &s, 1, layer, NULL, NULL));
    s.length++;
    assert_int_equal(fidelity_of(&f, 1).blocks, 0);
    assert_int_equal(fidelity_of(&f, 1).blocks_missed, 1);
    OK(fixture_update(plan, s.id, BLOCK));
    OK(fkv_cache_meter(f.cache, 0)); /* ends while a plan is made for it */
    for (int layer = 0; layer < 2; layer++)
        OK(fixture_layer(&f, plan, &s, BLOCK, layer, NULL, NULL));
    OK(fkv_cache_meter(f.cache, 1));
    assert_int_equal(fidelity_of(&f, 1).blocks_missed, 0);
    OK(fkv_sequence_free(f.cache, s.id));
    OK(fkv_plan_destroy(plan));
    fixture_close(&f); /* with the meter on */
}

/* Fewer bits, more error: 2 for all channels, as bad as it gets, against 8. */
static void bad_profile(void **state) {
    (void)state;
    fkv_fidelity got[2];
    for (int i = 0; i < 2; i++) {
        struct fixture f;
        fkv_codec_params codec;
        fixture_open(&f, &(struct options){.calibrated = true});
        OK(fkv_cache_destroy(f.cache));
        OK(fkv_profile_destroy(f.profile));
        OK(fkv_codec_params_init(&codec, sizeof codec));
        OK(fkv_profile_create_uniform(f.ctx, &f.model, &codec, i ? 8 : 2, &f.profile));
        OK(fkv_cache_create(f.ctx, f.profile, NULL, &f.cache));
        OK(fkv_cache_meter(f.cache, 1));
        fixture_stream(&f, 3, 1000);
        got[i] = fidelity_of(&f, FKV_ALL_LAYERS);
        assert_int_equal(got[i].blocks, 2 * 6);
        fixture_close(&f);
    }
    assert_true(got[0].block_error > 30 * got[1].block_error);
    assert_true(got[0].lse_error > 30 * got[1].lse_error);
    assert_true(got[0].output_error > 30 * got[1].output_error);
    assert_true(got[1].block_error > 0 && got[1].block_error < 0.01);
}

/* Every allocation of a step with the meter, and of its start, fails once: nothing has changed, also in its figures,
 * and the next try succeeds. */
static void failing(void **state) {
    (void)state;
    struct heap heap = {0};
    struct fixture f;
    fkv_plan *plan;
    struct stream s = {.number = 1};
    fixture_open(&f, &(struct options){.calibrated = true, .threads = 2, .heap = &heap});
    OK(fkv_sequence_create(f.cache, NULL, &s.id));
    OK(fkv_plan_create(f.cache, &plan));
    heap_fail(&heap, 1, false);
    assert_int_equal(fkv_cache_meter(f.cache, 1), FKV_ERR_NOMEM);
    heap_fail(&heap, 0, false);
    assert_int_equal(
        fkv_cache_fidelity(f.cache, 0, &(fkv_fidelity){.struct_size = sizeof(fkv_fidelity)}),
        FKV_ERR_STATE);
    OK(fkv_cache_meter(f.cache, 1));
    for (int64_t n = 1;; n++) {
        heap_fail(&heap, n, false);
        fkv_status status = fixture_update(plan, s.id, FIRST + 3 * BLOCK);
        const bool failed = heap_failed(&heap);
        heap_fail(&heap, 0, false);
        assert_int_equal(status, failed ? FKV_ERR_NOMEM : FKV_OK);
        if (!failed)
            break;
    }
    for (int layer = 0; layer < 2; layer++)
        for (int64_t n = 1;; n++) {
            heap_fail(&heap, n, false);
            fkv_status status = fixture_layer(&f, plan, &s, FIRST + 3 * BLOCK, layer, NULL, NULL);
            const bool failed = heap_failed(&heap);
            heap_fail(&heap, 0, false);
            assert_int_equal(status, failed ? FKV_ERR_NOMEM : FKV_OK);
            assert_int_equal(fidelity_of(&f, layer).blocks, failed ? 0 : 3);
            if (!failed)
                break;
        }
    heap_fail(&heap, 1, false); /* starting afresh fails: the old figures stay */
    assert_int_equal(fkv_cache_meter(f.cache, 0.5), FKV_ERR_NOMEM);
    heap_fail(&heap, 0, false);
    assert_int_equal(fidelity_of(&f, 0).blocks, 3);
    OK(fkv_plan_destroy(plan));
    fixture_close(&f);
}

/* ---- while an append is under way */

struct intruder {
    struct fixture *f;
    fkv_status meter, fidelity;
    int calls;
};

static void intrude(void *user) {
    struct intruder *in = user;
    fkv_fidelity got = {.struct_size = sizeof got};
    if (in->calls++)
        return;
    in->meter = fkv_cache_meter(in->f->cache, 0.25);
    in->fidelity = fkv_cache_fidelity(in->f->cache, 0, &got);
}

static void busy(void **state) {
    (void)state;
    struct heap heap = {0};
    struct fixture f;
    fkv_plan *plan;
    struct stream s = {.number = 1};
    fixture_open(&f, &(struct options){.calibrated = true, .heap = &heap});
    struct intruder in = {.f = &f};
    OK(fkv_sequence_create(f.cache, NULL, &s.id));
    OK(fkv_plan_create(f.cache, &plan));
    OK(fkv_cache_meter(f.cache, 1));
    OK(fixture_update(plan, s.id, 300));
    heap.watch_user = &in;
    heap.watch = intrude;
    OK(fixture_layer(&f, plan, &s, 300, 0, NULL, NULL));
    heap.watch = NULL;
    assert_true(in.calls > 0);
    assert_int_equal(in.meter, FKV_ERR_BUSY);
    assert_int_equal(in.fidelity, FKV_ERR_BUSY);
    assert_true(fidelity_of(&f, 0).fraction == 1);
    OK(fkv_plan_destroy(plan));
    fixture_close(&f);
}

/* Values that are not finite, where they may pass, are left out and spoil nothing. */
static void not_finite(void **state) {
    (void)state;
    struct fixture f;
    fkv_plan *plan;
    struct stream s = {.number = 1};
    enum { N = FIRST + 2 * BLOCK, HK = 2, D = 16 };
    static float x[N * HK * D], q[N * 2 * HK * D], out[N * 2 * HK * D];
    fixture_open(&f, &(struct options){.calibrated = true,
                                       .layers = 1,
                                       .flags = FKV_CONTEXT_PROPAGATE_NONFINITE});
    OK(fkv_sequence_create(f.cache, NULL, &s.id));
    OK(fkv_plan_create(f.cache, &plan));
    OK(fkv_cache_meter(f.cache, 1));
    OK(fixture_update(plan, s.id, N));
    fixture_values(x, 0, N, HK, D, 1, 0, 'k');
    fixture_values(q, 0, N, 2 * HK, D, 1, 0, 'q');
    x[(4 + 10) * HK * D] = NAN; /* the first block, head 0 */
    fkv_tensor tk = fixture_tensor(x, FKV_DTYPE_F32, N, HK, D);
    fkv_tensor tq = fixture_tensor(q, FKV_DTYPE_F32, N, 2 * HK, D);
    fkv_tensor to = fixture_tensor(out, FKV_DTYPE_F32, N, 2 * HK, D);
    OK(fkv_append_attend(plan, 0, &tq, &tk, &tk, &to, NULL));
    fkv_fidelity got = fidelity_of(&f, 0);
    assert_int_equal(got.blocks, 2);
    assert_int_equal(got.samples, 4); /* head 1 of both; head 0's whole outputs are NaN */
    assert_true(isfinite(got.block_error) && isfinite(got.lse_error_max) &&
                isfinite(got.output_error_max));
    OK(fkv_plan_destroy(plan));
    fixture_close(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(arguments),   cmocka_unit_test(other_profiles), cmocka_unit_test(states),
        cmocka_unit_test(bad_profile), cmocka_unit_test(failing),        cmocka_unit_test(busy),
        cmocka_unit_test(not_finite),
    };
    return cmocka_run_group_tests_name("meter", tests, NULL, NULL);
}
