/* SPDX-License-Identifier: Apache-2.0 */
/* Forking and cropping sequences: every refusal, the lengths that are possible, plans, what is counted. */
#include "fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static fkv_stats stats_of(struct fixture *f, fkv_sequence id) {
    fkv_stats stats = {.struct_size = sizeof stats};
    assert_int_equal(fkv_cache_stats(f->cache, id, &stats), FKV_OK);
    return stats;
}

static int64_t length_of(struct fixture *f, fkv_sequence id) {
    int64_t length = -1;
    assert_int_equal(fkv_sequence_length(f->cache, id, &length), FKV_OK);
    return length;
}

/* Bytes of a sequence's pages: what forks share. */
static uint64_t page_bytes(const fkv_stats *s) {
    return s->bytes_exact + s->bytes_kept + s->bytes_coefficients;
}

/* ---- refusals */

static void bad_arguments(void **state) {
    (void)state;
    struct fixture f;
    fixture_open(&f, NULL);
    struct stream s = fixture_stream(&f, 1, 150), gone = fixture_stream(&f, 2, 10);
    assert_int_equal(fkv_sequence_free(f.cache, gone.id), FKV_OK);
    const uint64_t before = fixture_digest(&f, s.id);
    fkv_cache *wrong[] = {NULL, (fkv_cache *)(void *)&f, (fkv_cache *)(void *)f.profile,
                          (fkv_cache *)(uintptr_t)8, (fkv_cache *)UINTPTR_MAX};
    fkv_sequence id = 77;
    int64_t n = 77;
    for (int i = 0; i < 5; i++) {
        assert_int_equal(fkv_sequence_fork(wrong[i], s.id, &id), FKV_ERR_HANDLE);
        assert_int_equal(fkv_sequence_crop(wrong[i], s.id, 10), FKV_ERR_HANDLE);
        assert_int_equal(fkv_sequence_crop_limit(wrong[i], s.id, &n), FKV_ERR_HANDLE);
        assert_int_equal(fkv_sequence_crop_floor(wrong[i], s.id, 10, &n), FKV_ERR_HANDLE);
    }
    const fkv_sequence ids[] = {gone.id, FKV_ALL_SEQUENCES, -2, INT64_MIN, INT64_MAX, s.id + 1};
    for (int i = 0; i < 6; i++) {
        assert_int_equal(fkv_sequence_fork(f.cache, ids[i], &id), FKV_ERR_HANDLE);
        assert_int_equal(fkv_sequence_crop(f.cache, ids[i], 0), FKV_ERR_HANDLE);
        assert_int_equal(fkv_sequence_crop_limit(f.cache, ids[i], &n), FKV_ERR_HANDLE);
        assert_int_equal(fkv_sequence_crop_floor(f.cache, ids[i], 0, &n), FKV_ERR_HANDLE);
    }
    const int64_t lengths[] = {-1, 151, INT64_MIN, INT64_MAX};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(fkv_sequence_crop(f.cache, s.id, lengths[i]), FKV_ERR_INVALID);
        assert_non_null(strstr(fixture_message(&f), "0..150"));
        assert_int_equal(fkv_sequence_crop_floor(f.cache, s.id, lengths[i], &n), FKV_ERR_INVALID);
    }
    assert_int_equal(fkv_sequence_fork(f.cache, s.id, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_sequence_crop_limit(f.cache, s.id, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_sequence_crop_floor(f.cache, s.id, 5, NULL), FKV_ERR_INVALID);
    assert_true(id == 77 && n == 77);
    assert_int_equal(stats_of(&f, FKV_ALL_SEQUENCES).sequences, 1);
    assert_true(fixture_digest(&f, s.id) == before);
    fixture_close(&f);
}

/* A fork needs room for its tables, no more: the cache's limit says when there is none. */
static void fork_limit(void **state) {
    (void)state;
    struct heap heap = {0};
    struct fixture f;
    fixture_open(&f, &(struct options){.heap = &heap, .exact = true, .cache_bytes = 70000});
    struct stream s = fixture_stream(&f, 1, 150);
    fkv_sequence id = -7, last = -7;
    int forks = 0;
    int64_t bytes = 0;
    fkv_status status;
    while (bytes = heap.bytes, (status = fkv_sequence_fork(f.cache, s.id, &id)) == FKV_OK) {
        assert_true(id != last);
        last = id;
        forks++;
    }
    assert_int_equal(status, FKV_ERR_LIMIT);
    assert_true(forks > 10 && id == last && heap.bytes == bytes);
    assert_true(stats_of(&f, FKV_ALL_SEQUENCES).bytes <= 70000);
    assert_int_equal(fkv_sequence_free(f.cache, last), FKV_OK);
    assert_int_equal(fkv_sequence_fork(f.cache, s.id, &id), FKV_OK);
    assert_int_equal(fkv_sequence_free(f.cache, id), FKV_OK);
    assert_int_equal(stats_of(&f, FKV_ALL_SEQUENCES).sequences, forks);
    fkv_stats stats = stats_of(&f, s.id);
    assert_int_equal(stats.bytes_shared, page_bytes(&stats));
    fixture_close(&f);
}

/* ---- lengths that are possible: sinks 4, local 32, period 128, hence two tiles to a segment */

static const struct options coded = {.period = 128, .bins = 8, .min_middle = 1};

static void possible_lengths(void **state) {
    (void)state;
    struct fixture f;
    fixture_open(&f, &coded);
    /* 4 + 5 * 64 + 32 + 30: five tiles are coded, two segments are full */
    struct stream s = fixture_stream(&f, 1, 386);
    const uint64_t before = fixture_digest(&f, s.id);
    int64_t limit, possible;
    assert_int_equal(stats_of(&f, s.id).tokens_coded, 320);
    assert_int_equal(fkv_sequence_crop_limit(f.cache, s.id, &limit), FKV_OK);
    assert_int_equal(limit, 324);
    for (int64_t n = 0; n <= 386; n++) {
        int64_t want = n <= 4 || n >= 324 ? n : n >= 260 ? 260 : n >= 132 ? 132 : 4;
        assert_int_equal(fkv_sequence_crop_floor(f.cache, s.id, n, &possible), FKV_OK);
        assert_int_equal(possible, want);
        if (want == n)
            continue;
        assert_int_equal(fkv_sequence_crop(f.cache, s.id, n), FKV_ERR_STATE);
        char text[32];
        snprintf(text, sizeof text, "is 324, the nearest below %d", (int)want);
        assert_non_null(strstr(fixture_message(&f), text));
    }
    assert_true(fixture_digest(&f, s.id) == before);
    const int64_t down[] = {386, 385, 325, 324, 260, 132, 4, 3, 1, 0, 0};
    const int64_t coded_then[] = {320, 320, 320, 320, 256, 128, 0, 0, 0, 0, 0};
    for (int i = 0; i < 11; i++) {
        assert_int_equal(fkv_sequence_crop(f.cache, s.id, down[i]), FKV_OK);
        assert_int_equal(length_of(&f, s.id), down[i]);
        assert_int_equal(stats_of(&f, s.id).tokens_coded, coded_then[i]);
        assert_int_equal(fkv_sequence_crop_limit(f.cache, s.id, &limit), FKV_OK);
        assert_int_equal(limit, coded_then[i] ? 4 + coded_then[i] : 0);
    }
    /* an empty sequence is a new one */
    struct stream fresh = fixture_stream(&f, 1, 0);
    fkv_stats a = stats_of(&f, s.id), b = stats_of(&f, fresh.id);
    assert_memory_equal(&a, &b, sizeof a);
    fixture_close(&f);
}

/* An exact cache is cropped to any length; memory goes with the pages. */
static void exact_lengths(void **state) {
    (void)state;
    struct heap heap = {0};
    struct fixture f;
    fixture_open(&f, &(struct options){.heap = &heap, .exact = true});
    struct stream s = fixture_stream(&f, 1, 300);
    int64_t limit = -1, possible = -1;
    uint64_t page = stats_of(&f, s.id).bytes_exact / 5;
    for (int64_t n = 300; n >= 0; n--) {
        int64_t bytes = heap.bytes;
        fkv_stats before = stats_of(&f, s.id);
        assert_int_equal(fkv_sequence_crop_limit(f.cache, s.id, &limit), FKV_OK);
        assert_int_equal(fkv_sequence_crop_floor(f.cache, s.id, n, &possible), FKV_OK);
        assert_true(limit == 0 && possible == n);
        assert_int_equal(fkv_sequence_crop(f.cache, s.id, n), FKV_OK);
        fkv_stats now = stats_of(&f, s.id);
        assert_int_equal(now.bytes_exact, (uint64_t)(n + 63) / 64 * page);
        assert_int_equal(bytes - heap.bytes, before.bytes - now.bytes);
    }
    fixture_close(&f);
}

/* ---- plans */

/* What all calls with a plan say, in which nothing may change. */
static void expect_outdated(struct fixture *f, fkv_plan *plan, const struct stream *s, int64_t n) {
    float x[8 * 64], out[8 * 64];
    const uint64_t before = fixture_digest(f, s->id);
    assert_true(n <= 8);
    memset(x, 0, sizeof x);
    memset(out, 0x5a, sizeof out);
    fkv_tensor q = fixture_tensor(x, FKV_DTYPE_F32, n, 4, 16);
    fkv_tensor k = fixture_tensor(x, FKV_DTYPE_F32, n, 2, 16);
    fkv_tensor o = fixture_tensor(out, FKV_DTYPE_F32, n, 4, 16);
    for (int layer = 0; layer < 2; layer++) {
        assert_int_equal(fkv_append(plan, layer, &k, &k), FKV_ERR_STATE);
        assert_non_null(strstr(fixture_message(f), "changed"));
        assert_int_equal(fkv_attend(plan, layer, &q, &o, NULL), FKV_ERR_STATE);
        assert_int_equal(fkv_append_attend(plan, layer, &q, &k, &k, &o, NULL), FKV_ERR_STATE);
    }
    for (size_t i = 0; i < sizeof out; i++)
        assert_int_equal(((unsigned char *)out)[i], 0x5a);
    assert_true(fixture_digest(f, s->id) == before);
}

static void crop_outdates(void **state) {
    (void)state;
    for (int exact = 0; exact < 2; exact++) {
        struct options options = coded;
        struct fixture f;
        options.exact = exact;
        fixture_open(&f, &options);
        struct stream s = fixture_stream(&f, 1, 200);
        fkv_plan *plan, *other;
        assert_int_equal(fkv_plan_create(f.cache, &plan), FKV_OK);
        assert_int_equal(fkv_plan_create(f.cache, &other), FKV_OK);
        /* before the step */
        assert_int_equal(fixture_update(plan, s.id, 3), FKV_OK);
        assert_int_equal(fkv_sequence_crop(f.cache, s.id, 198), FKV_OK);
        s.length = 198;
        expect_outdated(&f, plan, &s, 3);
        /* after it, back to just where it began: the plan is not taken for a fresh one */
        assert_int_equal(fixture_step(&f, plan, &s, 3, NULL, NULL), FKV_OK);
        assert_int_equal(fkv_sequence_crop(f.cache, s.id, 198), FKV_OK);
        s.length = 198;
        expect_outdated(&f, plan, &s, 3);
        /* another has cropped and appended as much */
        assert_int_equal(fixture_update(plan, s.id, 3), FKV_OK);
        assert_int_equal(fkv_sequence_crop(f.cache, s.id, 190), FKV_OK);
        s.length = 190;
        assert_int_equal(fixture_step(&f, other, &s, 8, NULL, NULL), FKV_OK);
        expect_outdated(&f, plan, &s, 3);
        /* of two sequences only one is cropped; emptied; freed */
        assert_int_equal(fixture_update(plan, s.id, 3), FKV_OK);
        assert_int_equal(fkv_sequence_crop(f.cache, s.id, 0), FKV_OK);
        s.length = 0;
        expect_outdated(&f, plan, &s, 3);
        assert_int_equal(fixture_step(&f, plan, &s, 3, NULL, NULL), FKV_OK);
        /* cropping to what is there, or refused, changes nothing */
        assert_int_equal(fixture_update(plan, s.id, 2), FKV_OK);
        assert_int_equal(fkv_sequence_crop(f.cache, s.id, 3), FKV_OK);
        assert_int_equal(fkv_sequence_crop(f.cache, s.id, 4), FKV_ERR_INVALID);
        assert_int_equal(fixture_layer(&f, plan, &s, 2, 0, NULL, NULL), FKV_OK);
        /* half a step is taken back */
        assert_int_equal(fkv_sequence_crop(f.cache, s.id, 3), FKV_OK);
        expect_outdated(&f, plan, &s, 2);
        assert_int_equal(fixture_step(&f, plan, &s, 2, NULL, NULL), FKV_OK);
        struct stream same = fixture_stream(&f, 1, 5);
        assert_int_equal(stats_of(&f, same.id).bytes_exact, stats_of(&f, s.id).bytes_exact);
        assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
        assert_int_equal(fkv_plan_destroy(other), FKV_OK);
        fixture_close(&f);
    }
}

/* A plan from before the fork goes on with the parent, whichever of the two writes first. */
static void fork_keeps_plans(void **state) {
    (void)state;
    for (int exact = 0; exact < 2; exact++)
        for (int child_first = 0; child_first < 2; child_first++) {
            struct options options = coded;
            struct fixture f;
            options.exact = exact;
            fixture_open(&f, &options);
            struct stream s = fixture_stream(&f, 1, 163), child = s;
            fkv_plan *plan, *other;
            assert_int_equal(fkv_plan_create(f.cache, &plan), FKV_OK);
            assert_int_equal(fkv_plan_create(f.cache, &other), FKV_OK);
            assert_int_equal(fixture_update(plan, s.id, 70), FKV_OK);
            assert_int_equal(fkv_sequence_fork(f.cache, s.id, &child.id), FKV_OK);
            child.number = 9;
            if (child_first)
                assert_int_equal(fixture_step(&f, other, &child, 5, NULL, NULL), FKV_OK);
            for (int layer = 0; layer < 2; layer++)
                assert_int_equal(fixture_layer(&f, plan, &s, 70, layer, NULL, NULL), FKV_OK);
            if (!child_first)
                assert_int_equal(fixture_step(&f, other, &child, 5, NULL, NULL), FKV_OK);
            /* the same without a fork; freed first, so that the digests count no sharing */
            struct stream same = fixture_stream(&f, 1, 163), twin = fixture_stream(&f, 1, 163);
            assert_int_equal(fixture_step(&f, other, &same, 70, NULL, NULL), FKV_OK);
            twin.number = 9;
            assert_int_equal(fixture_step(&f, other, &twin, 5, NULL, NULL), FKV_OK);
            uint64_t wanted = fixture_digest(&f, twin.id);
            assert_int_equal(fkv_sequence_free(f.cache, s.id), FKV_OK);
            assert_true(fixture_digest(&f, child.id) == wanted);
            assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
            assert_int_equal(fkv_plan_destroy(other), FKV_OK);
            fixture_close(&f);
        }
}

/* Unequal layers cannot be forked. */
static void fork_between_steps(void **state) {
    (void)state;
    struct fixture f;
    fixture_open(&f, NULL);
    struct stream s = fixture_stream(&f, 1, 20);
    fkv_plan *plan;
    fkv_sequence id = -7;
    assert_int_equal(fkv_plan_create(f.cache, &plan), FKV_OK);
    assert_int_equal(fixture_update(plan, s.id, 3), FKV_OK);
    assert_int_equal(fixture_layer(&f, plan, &s, 3, 0, NULL, NULL), FKV_OK);
    assert_int_equal(fkv_sequence_fork(f.cache, s.id, &id), FKV_ERR_STATE);
    assert_int_equal(id, -7);
    assert_non_null(strstr(fixture_message(&f), "crop"));
    assert_int_equal(fixture_layer(&f, plan, &s, 3, 1, NULL, NULL), FKV_OK);
    assert_int_equal(fkv_sequence_fork(f.cache, s.id, &id), FKV_OK);
    assert_int_equal(length_of(&f, id), 23);
    assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
    fixture_close(&f);
}

/* ---- what is counted */

static void shared_bytes(void **state) {
    (void)state;
    struct heap heap = {0};
    struct options options = coded;
    struct fixture f;
    options.heap = &heap;
    fixture_open(&f, &options);
    struct stream s = fixture_stream(&f, 1, 386), child = s;
    fkv_plan *plan;
    fkv_stats alone = stats_of(&f, s.id), all = stats_of(&f, FKV_ALL_SEQUENCES);
    assert_true(alone.bytes_shared == 0 && all.bytes_shared == 0);
    int64_t bytes = heap.bytes;
    assert_int_equal(fkv_sequence_fork(f.cache, s.id, &child.id), FKV_OK);
    fkv_stats a = stats_of(&f, s.id), b = stats_of(&f, child.id);
    assert_memory_equal(&a, &b, sizeof a);
    assert_int_equal(a.bytes, alone.bytes);
    /* all pages, and the tables within segments, but not those that point to them */
    assert_true(a.bytes_shared > page_bytes(&a) && a.bytes_shared < a.bytes);
    all = stats_of(&f, FKV_ALL_SEQUENCES);
    assert_int_equal(all.bytes_shared, a.bytes_shared);
    assert_int_equal(heap.bytes - bytes, b.bytes - b.bytes_shared);
    assert_true(heap.bytes - bytes < 4096);
    assert_int_equal(all.tokens, 2 * 386);
    assert_int_equal(all.bytes_exact, alone.bytes_exact);
    /* one token: the last page of each layer is copied, and nothing else */
    assert_int_equal(fkv_plan_create(f.cache, &plan), FKV_OK);
    assert_int_equal(fixture_step(&f, plan, &child, 1, NULL, NULL), FKV_OK);
    /* two layers of a page for 4 sinks, K and V in f16 and a pad, and one for a tile */
    const uint64_t sinks = (uint64_t)(f.options.kv_heads * f.options.dim) * 2 * 4 * 2 + 64;
    const uint64_t page = alone.bytes_exact / 2 - sinks;
    b = stats_of(&f, child.id);
    assert_int_equal(b.bytes_shared, a.bytes_shared - 2 * page);
    assert_int_equal(b.bytes_exact, a.bytes_exact);
    assert_int_equal(stats_of(&f, FKV_ALL_SEQUENCES).bytes_exact, alone.bytes_exact + 2 * page);
    /* coding: the open segment is copied, too, but not the full ones */
    assert_int_equal(fixture_step(&f, plan, &child, 60, NULL, NULL), FKV_OK);
    all = stats_of(&f, FKV_ALL_SEQUENCES);
    assert_int_equal(all.bytes_coefficients, alone.bytes_coefficients / 3 * 4);
    /* older programs know a shorter struct, and its last field is left alone */
    a.struct_size = (uint32_t)offsetof(fkv_stats, bytes_shared);
    a.bytes_shared = 77;
    a.tokens = 0;
    assert_int_equal(fkv_cache_stats(f.cache, s.id, &a), FKV_OK);
    assert_true(a.tokens == 386 && a.bytes_shared == 77);
    assert_int_equal(fkv_profile_estimate(f.profile, 386, 0, &a), FKV_OK);
    assert_true(a.tokens == 386 && a.bytes_shared == 77);
    a.struct_size--;
    assert_int_equal(fkv_cache_stats(f.cache, s.id, &a), FKV_ERR_INVALID);
    /* the last holder shares nothing */
    assert_int_equal(fkv_sequence_free(f.cache, s.id), FKV_OK);
    b = stats_of(&f, child.id);
    assert_int_equal(b.bytes_shared, 0);
    assert_int_equal(stats_of(&f, FKV_ALL_SEQUENCES).bytes_shared, 0);
    assert_int_equal(stats_of(&f, FKV_ALL_SEQUENCES).bytes_exact, b.bytes_exact);
    assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
    fixture_close(&f);
}

/* A cache that goes with forks in it, its plans still there. */
static void destroyed_with_forks(void **state) {
    (void)state;
    struct heap heap = {0};
    struct options options = coded;
    struct fixture f;
    options.heap = &heap;
    fixture_open(&f, &options);
    struct stream s = fixture_stream(&f, 1, 300);
    fkv_sequence id = s.id;
    fkv_plan *plan;
    assert_int_equal(fkv_plan_create(f.cache, &plan), FKV_OK);
    for (int i = 0; i < 20; i++)
        assert_int_equal(fkv_sequence_fork(f.cache, i % 3 ? s.id : id, &id), FKV_OK);
    assert_int_equal(fixture_update(plan, id, 3), FKV_OK);
    fkv_cache *cache = f.cache;
    assert_int_equal(fkv_cache_destroy(cache), FKV_OK);
    f.cache = NULL;
    assert_int_equal(fkv_sequence_fork(cache, s.id, &id), FKV_ERR_HANDLE);
    assert_int_equal(fkv_sequence_crop(cache, s.id, 0), FKV_ERR_HANDLE);
    assert_int_equal(fixture_update(plan, id, 3), FKV_ERR_HANDLE);
    assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
    fixture_close(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_arguments),       cmocka_unit_test(fork_limit),
        cmocka_unit_test(possible_lengths),    cmocka_unit_test(exact_lengths),
        cmocka_unit_test(crop_outdates),       cmocka_unit_test(fork_keeps_plans),
        cmocka_unit_test(fork_between_steps),  cmocka_unit_test(shared_bytes),
        cmocka_unit_test(destroyed_with_forks)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
