/* SPDX-License-Identifier: Apache-2.0 */
/* Caches and sequences: creation, limits, accounting, reading back, and the end of their lives. */
#include "fixture.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static uint64_t live_bytes(struct fixture *f) {
    fkv_context_info info = {.struct_size = sizeof info};
    assert_int_equal(fkv_context_query(f->ctx, &info), FKV_OK);
    return info.live_bytes;
}

static fkv_stats stats_of(struct fixture *f, fkv_sequence id) {
    fkv_stats stats = {.struct_size = sizeof stats};
    assert_int_equal(fkv_cache_stats(f->cache, id, &stats), FKV_OK);
    return stats;
}

/* Handles that are not what they should be; the first is NULL. */
#define WRONG_HANDLES(type, f)                                                                     \
    type *wrong[] = {NULL, (type *)(void *)&(f), (type *)(void *)(f).profile,                      \
                     (type *)(uintptr_t)8, (type *)UINTPTR_MAX};                                   \
    enum { N_WRONG = 5 }

/* ---- creation */

static void parameter_structs(void **state) {
    (void)state;
    fkv_cache_params cache;
    fkv_sequence_params sequence;
    assert_int_equal(fkv_cache_params_init(NULL, sizeof cache), FKV_ERR_INVALID);
    const size_t first = offsetof(fkv_cache_params, flags); /* the size without it is taken, too */
    assert_int_equal(fkv_cache_params_init(&cache, first - 1), FKV_ERR_INVALID);
    assert_int_equal(fkv_cache_params_init(&cache, first), FKV_OK);
    assert_int_equal(fkv_cache_params_init(&cache, 0), FKV_ERR_INVALID);
    assert_int_equal(fkv_cache_params_init(&cache, SIZE_MAX), FKV_ERR_INVALID);
    assert_int_equal(fkv_sequence_params_init(NULL, sizeof sequence), FKV_ERR_INVALID);
    assert_int_equal(fkv_sequence_params_init(&sequence, 4), FKV_ERR_INVALID);
    struct {
        fkv_cache_params cache;
        uint64_t tail;
    } longer;
    memset(&longer, 0xff, sizeof longer);
    assert_int_equal(fkv_cache_params_init(&longer.cache, sizeof longer), FKV_OK);
    assert_int_equal(longer.cache.struct_size, sizeof longer);
    assert_true(longer.cache.max_tokens == 0 && longer.cache.max_bytes == 0 && longer.tail == 0);
}

static void cache_creation(void **state) {
    (void)state;
    struct fixture f;
    fixture_open(&f, NULL);
    uint64_t live = live_bytes(&f);
    WRONG_HANDLES(fkv_context, f);
    fkv_cache *cache = (fkv_cache *)&f;
    for (int i = 0; i < N_WRONG; i++) {
        assert_int_equal(fkv_cache_create(wrong[i], f.profile, NULL, &cache), FKV_ERR_HANDLE);
        assert_null(cache);
    }
    assert_int_equal(fkv_cache_create(f.ctx, NULL, NULL, &cache), FKV_ERR_HANDLE);
    assert_int_equal(fkv_cache_create(f.ctx, (fkv_profile *)f.cache, NULL, &cache), FKV_ERR_HANDLE);
    assert_int_equal(fkv_cache_create(f.ctx, f.profile, NULL, NULL), FKV_ERR_INVALID);
    struct {
        fkv_cache_params params;
        uint64_t tail;
    } longer;
    fkv_cache_params_init(&longer.params, sizeof longer);
    longer.tail = 1;
    assert_int_equal(fkv_cache_create(f.ctx, f.profile, &longer.params, &cache),
                     FKV_ERR_UNSUPPORTED);
    longer.params.struct_size = 0;
    assert_int_equal(fkv_cache_create(f.ctx, f.profile, &longer.params, &cache), FKV_ERR_INVALID);
    longer.params.struct_size = sizeof longer.params;
    longer.params.reserved = 1;
    assert_int_not_equal(fkv_cache_create(f.ctx, f.profile, &longer.params, &cache), FKV_OK);
    assert_null(cache);
    assert_true(live_bytes(&f) == live);
    longer.params.reserved = 0;
    longer.params.struct_size = sizeof longer;
    longer.tail = 0;
    assert_int_equal(fkv_cache_create(f.ctx, f.profile, &longer.params, &cache), FKV_OK);
    assert_int_equal(fkv_cache_destroy(cache), FKV_OK);
    assert_int_equal(fkv_cache_destroy(cache), FKV_ERR_HANDLE);
    assert_int_equal(fkv_cache_destroy((fkv_cache *)f.ctx), FKV_ERR_HANDLE);
    assert_int_equal(fkv_cache_destroy(NULL), FKV_OK);
    assert_true(live_bytes(&f) == live);
    fixture_close(&f);
}

static void sequence_creation(void **state) {
    (void)state;
    struct fixture f;
    fixture_open(&f, NULL);
    fkv_sequence id, other;
    WRONG_HANDLES(fkv_cache, f);
    for (int i = 0; i < N_WRONG; i++)
        assert_int_equal(fkv_sequence_create(wrong[i], NULL, &id), FKV_ERR_HANDLE);
    assert_int_equal(fkv_sequence_create(f.cache, NULL, NULL), FKV_ERR_INVALID);
    struct {
        fkv_sequence_params params;
        uint64_t tail;
    } p;
    fkv_sequence_params_init(&p.params, sizeof p);
    static const int64_t periods[] = {-1, 1, 63, INT64_MIN};
    for (int i = 0; i < 4; i++) {
        p.params.period = periods[i];
        assert_int_equal(fkv_sequence_create(f.cache, &p.params, &id), FKV_ERR_INVALID);
    }
    p.params.period = INT64_MAX;
    fkv_status status = fkv_sequence_create(f.cache, &p.params, &id);
    assert_true(status == FKV_ERR_LIMIT || status == FKV_ERR_INVALID);
    p.params.period = 64;
    p.tail = 9;
    assert_int_equal(fkv_sequence_create(f.cache, &p.params, &id), FKV_ERR_UNSUPPORTED);
    p.tail = 0;
    p.params.reserved = 1;
    assert_int_not_equal(fkv_sequence_create(f.cache, &p.params, &id), FKV_OK);
    p.params.reserved = 0;
    p.params.struct_size = 4;
    assert_int_equal(fkv_sequence_create(f.cache, &p.params, &id), FKV_ERR_INVALID);
    p.params.struct_size = sizeof p;
    assert_int_equal(stats_of(&f, FKV_ALL_SEQUENCES).sequences, 0);
    assert_int_equal(fkv_sequence_create(f.cache, &p.params, &id), FKV_OK);
    assert_int_equal(fkv_sequence_create(f.cache, NULL, &other), FKV_OK);
    assert_true(id >= 0 && other >= 0 && id != other);
    assert_int_equal(stats_of(&f, FKV_ALL_SEQUENCES).sequences, 2);
    fixture_close(&f);
}

/* ---- lives */

static void stale_ids(void **state) {
    (void)state;
    struct fixture f;
    fixture_open(&f, NULL);
    struct stream s = fixture_stream(&f, 1, 20);
    fkv_sequence later;
    assert_int_equal(fkv_sequence_free(f.cache, s.id), FKV_OK);
    assert_int_equal(fkv_sequence_create(f.cache, NULL, &later), FKV_OK);
    assert_true(later != s.id);
    fkv_sequence ids[] = {s.id, -1, -2, INT64_MIN, INT64_MAX, later + 1, later ^ INT64_C(1) << 40};
    float x[32];
    fkv_tensor t = fixture_tensor(x, FKV_DTYPE_F32, 1, 2, 16);
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) {
        int64_t length = 77;
        fkv_stats stats = {.struct_size = sizeof stats, .bytes = 77};
        assert_int_equal(fkv_sequence_length(f.cache, ids[i], &length), FKV_ERR_HANDLE);
        assert_int_equal(length, 77);
        assert_int_equal(fkv_sequence_free(f.cache, ids[i]), FKV_ERR_HANDLE);
        assert_int_equal(fkv_sequence_read(f.cache, ids[i], 0, 0, 1, &t, NULL), FKV_ERR_HANDLE);
        if (ids[i] != FKV_ALL_SEQUENCES) {
            assert_int_equal(fkv_cache_stats(f.cache, ids[i], &stats), FKV_ERR_HANDLE);
            assert_int_equal(stats.bytes, 77);
        }
    }
    assert_int_equal(fkv_sequence_free(NULL, later), FKV_ERR_HANDLE);
    assert_int_equal(fkv_sequence_length(f.cache, later, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_sequence_length((fkv_cache *)f.ctx, later, &later), FKV_ERR_HANDLE);
    fixture_close(&f);
}

/* Memory settles after the first round, and ids never come back. */
static void many_sequences(void **state) {
    (void)state;
    enum { N = 10000 };
    struct fixture f;
    fixture_open(&f, NULL);
    fkv_sequence *ids = malloc(N * sizeof *ids), highest = -1;
    uint64_t settled = 0;
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < N; i++) {
            assert_int_equal(fkv_sequence_create(f.cache, NULL, &ids[i]), FKV_OK);
            assert_true(ids[i] > highest || round == 0);
        }
        for (int i = 0; i < N; i++)
            highest = ids[i] > highest ? ids[i] : highest;
        assert_int_equal(stats_of(&f, FKV_ALL_SEQUENCES).sequences, N);
        /* in an order that is neither theirs nor its reverse */
        for (int i = 0; i < N; i++)
            assert_int_equal(fkv_sequence_free(f.cache, ids[(i * 7919 + round) % N]), FKV_OK);
        assert_int_equal(stats_of(&f, FKV_ALL_SEQUENCES).sequences, 0);
        if (round)
            assert_true(live_bytes(&f) == settled);
        settled = live_bytes(&f);
    }
    free(ids);
    fixture_close(&f);
}

/* Objects go in every order; what still lives goes on working. */
static void any_order(void **state) {
    (void)state;
    static const char orders[][5] = {"xpcl", "xplc", "xcpl", "xclp", "xlpc", "xlcp",
                                     "pxcl", "pxlc", "pcxl", "pclx", "plxc", "plcx",
                                     "cxpl", "cxlp", "cpxl", "cplx", "clxp", "clpx",
                                     "lxpc", "lxcp", "lpxc", "lpcx", "lcxp", "lcpx"};
    for (size_t i = 0; i < sizeof orders / sizeof *orders; i++) {
        struct heap heap = {0};
        struct fixture f;
        fixture_open(&f, &(struct options){.heap = &heap});
        struct stream s = fixture_stream(&f, 1, 150);
        fkv_plan *plan;
        assert_int_equal(fkv_plan_create(f.cache, &plan), FKV_OK);
        assert_int_equal(fixture_step(&f, plan, &s, 3, NULL, NULL), FKV_OK);
        bool cache = true, has_plan = true;
        for (const char *what = orders[i]; *what; what++) {
            if (*what == 'x')
                assert_int_equal(fkv_context_destroy(f.ctx), FKV_OK);
            else if (*what == 'p')
                assert_int_equal(fkv_profile_destroy(f.profile), FKV_OK);
            else if (*what == 'c')
                assert_int_equal(fkv_cache_destroy(f.cache), FKV_OK);
            else
                assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
            cache = cache && *what != 'c';
            has_plan = has_plan && *what != 'l';
            if (cache)
                assert_int_equal(stats_of(&f, s.id).tokens, s.length);
            if (cache && has_plan)
                assert_int_equal(fixture_step(&f, plan, &s, 70, NULL, NULL), FKV_OK);
            else if (has_plan)
                assert_int_equal(fixture_step(&f, plan, &s, 1, NULL, NULL), FKV_ERR_HANDLE);
        }
        assert_int_equal(heap.blocks, 0);
        assert_int_equal(heap.bytes, 0);
        assert_int_equal(heap.mismatches, 0);
    }
}

/* ---- accounting */

static void check_estimate(struct fixture *f, int64_t tokens, int64_t period) {
    fkv_sequence_params params;
    fkv_sequence_params_init(&params, sizeof params);
    params.period = period;
    fkv_plan *plan;
    struct stream s = {.number = 3};
    assert_int_equal(fkv_cache_create(f->ctx, f->profile, NULL, &f->cache), FKV_OK);
    assert_int_equal(fkv_sequence_create(f->cache, &params, &s.id), FKV_OK);
    assert_int_equal(fkv_plan_create(f->cache, &plan), FKV_OK);
    assert_int_equal(fixture_step(f, plan, &s, tokens, NULL, NULL), FKV_OK);
    fkv_stats all = stats_of(f, FKV_ALL_SEQUENCES), one = stats_of(f, s.id);
    fkv_stats estimate = {.struct_size = sizeof estimate};
    int64_t calls = f->options.heap->calls;
    assert_int_equal(fkv_profile_estimate(f->profile, tokens, period, &estimate), FKV_OK);
    assert_int_equal(f->options.heap->calls, calls);
    assert_memory_equal(&estimate, &all, sizeof all);
    assert_int_equal(all.tokens, tokens);
    assert_int_equal(all.tokens_exact + all.tokens_coded, tokens);
    assert_int_equal(all.bytes,
                     all.bytes_exact + all.bytes_kept + all.bytes_coefficients + all.bytes_tables);
    assert_int_equal(all.dense_bytes, tokens * 4 * 2 * 16 * 2);
    double ratio = tokens ? (double)all.dense_bytes / (double)all.bytes : 0;
    assert_true(all.ratio == ratio);
    /* tables may be shared; tokens are the sequence's */
    assert_true(one.bytes_exact == all.bytes_exact && one.bytes_kept == all.bytes_kept);
    assert_true(one.bytes_coefficients == all.bytes_coefficients && one.bytes <= all.bytes);
    assert_int_equal(one.tokens_coded, all.tokens_coded);
    assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
    assert_int_equal(fkv_cache_destroy(f->cache), FKV_OK);
}

/* What is reported is what the allocator has: the difference that the cache makes is its stats. */
static void check_live(struct fixture *f, int64_t tokens) {
    int64_t before = f->options.heap->bytes;
    assert_int_equal(fkv_cache_create(f->ctx, f->profile, NULL, &f->cache), FKV_OK);
    struct stream a = fixture_stream(f, 1, tokens);
    fixture_stream(f, 2, tokens / 2);
    assert_int_equal(f->options.heap->bytes - before, stats_of(f, FKV_ALL_SEQUENCES).bytes);
    assert_int_equal(fkv_sequence_free(f->cache, a.id), FKV_OK);
    assert_int_equal(f->options.heap->bytes - before, stats_of(f, FKV_ALL_SEQUENCES).bytes);
    assert_int_equal(fkv_cache_destroy(f->cache), FKV_OK);
    assert_int_equal(f->options.heap->bytes, before);
}

static void accounting(void **state) {
    (void)state;
    static const int64_t lengths[] = {0,   1,   3,   4,   5,   67,  68,  69,  99,  100, 101, 131,
                                      132, 163, 164, 165, 228, 300, 611, 612, 613, 676, 1300};
    for (int exact = 0; exact < 2; exact++) {
        struct heap heap = {0};
        struct fixture f;
        fixture_open(&f, &(struct options){.heap = &heap, .exact = exact});
        assert_int_equal(fkv_cache_destroy(f.cache), FKV_OK);
        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
            check_estimate(&f, lengths[i], 0);
            check_estimate(&f, lengths[i], 64);
            check_estimate(&f, lengths[i], 333);
            check_live(&f, lengths[i]);
        }
        f.cache = NULL;
        fixture_close(&f);
    }
}

static void bad_stats(void **state) {
    (void)state;
    struct fixture f;
    fixture_open(&f, NULL);
    fkv_stats stats = {.struct_size = sizeof stats, .bytes = 77};
    WRONG_HANDLES(fkv_cache, f);
    for (int i = 0; i < N_WRONG; i++)
        assert_int_equal(fkv_cache_stats(wrong[i], FKV_ALL_SEQUENCES, &stats), FKV_ERR_HANDLE);
    assert_int_equal(fkv_cache_stats(f.cache, FKV_ALL_SEQUENCES, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_estimate(NULL, 1, 0, &stats), FKV_ERR_HANDLE);
    assert_int_equal(fkv_profile_estimate((fkv_profile *)f.cache, 1, 0, &stats), FKV_ERR_HANDLE);
    assert_int_equal(fkv_profile_estimate(f.profile, 1, 0, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_estimate(f.profile, -1, 0, &stats), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_estimate(f.profile, INT64_MIN, 0, &stats), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_estimate(f.profile, INT64_MAX, 0, &stats), FKV_ERR_LIMIT);
    assert_int_equal(fkv_profile_estimate(f.profile, (INT64_C(1) << 26) + 1, 0, &stats),
                     FKV_ERR_LIMIT);
    assert_int_equal(fkv_profile_estimate(f.profile, 1, -1, &stats), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_estimate(f.profile, 1, 63, &stats), FKV_ERR_INVALID);
    fkv_status status = fkv_profile_estimate(f.profile, 1, INT64_MAX, &stats);
    assert_true(status == FKV_ERR_LIMIT || status == FKV_ERR_INVALID);
    stats.struct_size = 0;
    assert_int_equal(fkv_cache_stats(f.cache, FKV_ALL_SEQUENCES, &stats), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_estimate(f.profile, 1, 0, &stats), FKV_ERR_INVALID);
    assert_int_equal(stats.bytes, 77);
    /* a newer program's longer struct is filled as far as it is known */
    struct {
        fkv_stats stats;
        uint64_t tail;
    } longer = {.stats = {.struct_size = sizeof longer}, .tail = 77};
    assert_int_equal(fkv_cache_stats(f.cache, FKV_ALL_SEQUENCES, &longer.stats), FKV_OK);
    assert_int_equal(longer.stats.struct_size, sizeof longer);
    fixture_close(&f);
}

/* ---- limits */

static void token_limit(void **state) {
    (void)state;
    struct fixture f;
    fixture_open(&f, &(struct options){.cache_tokens = 100});
    struct stream s = fixture_stream(&f, 1, 98);
    fkv_plan *plan;
    assert_int_equal(fkv_plan_create(f.cache, &plan), FKV_OK);
    assert_int_equal(fixture_update(plan, s.id, 3), FKV_ERR_LIMIT);
    assert_int_equal(fixture_step(&f, plan, &s, 2, NULL, NULL), FKV_OK);
    assert_int_equal(fixture_update(plan, s.id, 1), FKV_ERR_LIMIT);
    assert_int_equal(fixture_update(plan, s.id, 0), FKV_OK);
    assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
    fixture_close(&f);
}

/* A cache full of bytes says so in the append, changes nothing, and goes on when there is room again. */
static void byte_limit(void **state) {
    (void)state;
    const uint64_t limit = 600000;
    for (int of_context = 0; of_context < 2; of_context++) {
        struct fixture f;
        fixture_open(&f, &(struct options){.cache_bytes = of_context ? 0 : limit,
                                           .max_bytes = of_context ? limit : 0,
                                           .storage = FKV_DTYPE_F32,
                                           .exact = true});
        struct stream first = fixture_stream(&f, 1, 256), s = {.number = 2};
        fkv_plan *plan;
        assert_int_equal(fkv_sequence_create(f.cache, NULL, &s.id), FKV_OK);
        assert_int_equal(fkv_plan_create(f.cache, &plan), FKV_OK);
        uint64_t before = 0;
        int call = 0; /* 0: the plan; 1, 2: the layers */
        fkv_status status;
        for (;; call = (call + 1) % 3) {
            before = fixture_digest(&f, s.id);
            status = call ? fixture_layer(&f, plan, &s, 64, call - 1, NULL, NULL)
                          : fixture_update(plan, s.id, 64);
            if (status != FKV_OK)
                break;
            s.length += call == 2 ? 64 : 0;
            assert_true(stats_of(&f, FKV_ALL_SEQUENCES).bytes <= limit);
            assert_true(live_bytes(&f) <= limit || !of_context);
        }
        assert_int_equal(status, FKV_ERR_LIMIT);
        assert_true(s.length >= 256 && fixture_digest(&f, s.id) == before);
        assert_int_equal(fkv_sequence_free(f.cache, first.id), FKV_OK);
        for (; call < 3; call++)
            assert_int_equal(call ? fixture_layer(&f, plan, &s, 64, call - 1, NULL, NULL)
                                  : fixture_update(plan, s.id, 64),
                             FKV_OK);
        assert_int_equal(stats_of(&f, s.id).tokens, s.length + 64);
        assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
        fixture_close(&f);
    }
}

/* Outgrowing the period: refused with FKV_OUTGROW_ERROR, with nothing stored. */
static void outgrowing(void **state) {
    (void)state;
    struct fixture f;
    fixture_open(&f, NULL);
    fkv_fourier_params fourier;
    fkv_fourier_params_init(&fourier, sizeof fourier);
    fourier.bins = 16;
    fourier.n_local = 32;
    fourier.period = 128;
    fourier.outgrow = FKV_OUTGROW_ERROR;
    uint8_t mask[2 * 2 * 16];
    memset(mask, 1, sizeof mask);
    fkv_profile *profile;
    assert_int_equal(
        fkv_profile_create_fourier(f.ctx, &f.model, &fourier, mask, mask, sizeof mask, &profile),
        FKV_OK);
    assert_int_equal(fkv_cache_destroy(f.cache), FKV_OK);
    assert_int_equal(fkv_cache_create(f.ctx, profile, NULL, &f.cache), FKV_OK);
    fkv_plan *plan;
    struct stream s = {.number = 1};
    assert_int_equal(fkv_sequence_create(f.cache, NULL, &s.id), FKV_OK);
    assert_int_equal(fkv_plan_create(f.cache, &plan), FKV_OK);
    fkv_status status;
    while ((status = fixture_step(&f, plan, &s, 13, NULL, NULL)) == FKV_OK)
        assert_true(s.length < 1000);
    assert_int_equal(status, FKV_ERR_LIMIT);
    assert_true(s.length >= 4 + 128 + 32 - 13);
    uint64_t before = fixture_digest(&f, s.id);
    fkv_stats stats = {.struct_size = sizeof stats};
    assert_int_not_equal(fixture_step(&f, plan, &s, 500, NULL, NULL), FKV_OK);
    assert_true(fixture_digest(&f, s.id) == before);
    assert_int_equal(fkv_profile_estimate(profile, s.length, 0, &stats), FKV_OK);
    assert_int_equal(fkv_profile_estimate(profile, s.length + 500, 0, &stats), FKV_ERR_LIMIT);
    assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
    assert_int_equal(fkv_profile_destroy(profile), FKV_OK);
    fixture_close(&f);
}

/* ---- reading back */

static void bad_reads(void **state) {
    (void)state;
    struct fixture f;
    fixture_open(&f, NULL);
    struct stream s = fixture_stream(&f, 1, 150);
    float k[3 * 32], v[3 * 32];
    fkv_tensor tk = fixture_tensor(k, FKV_DTYPE_F32, 3, 2, 16);
    fkv_tensor tv = fixture_tensor(v, FKV_DTYPE_F32, 3, 2, 16);
    static const struct {
        int32_t layer;
        int64_t first, count;
    } calls[] = {{-1, 0, 3},        {2, 0, 3},
                 {INT32_MAX, 0, 3}, {0, -1, 3},
                 {0, 148, 3},       {0, 151, 0},
                 {0, 150, 3},       {0, INT64_MAX, 3},
                 {0, INT64_MIN, 3}, {0, 0, -1},
                 {0, 0, INT64_MAX}, {0, 0, INT64_MIN},
                 {0, 0, 2},         {0, INT64_MAX, INT64_MAX}};
    memset(k, 0x5a, sizeof k);
    memset(v, 0x5a, sizeof v);
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        assert_int_equal(fkv_sequence_read(f.cache, s.id, calls[i].layer, calls[i].first,
                                           calls[i].count, &tk, &tv),
                         FKV_ERR_INVALID);
    for (int i = 0; i < fixture_n_damages; i++)
        for (int part = 0; part < 2; part++) {
            fkv_tensor *t = part ? &tv : &tk, good = *t;
            fixture_damages[i].apply(t);
            fkv_status status = fkv_sequence_read(f.cache, s.id, 1, 0, 3, &tk, &tv);
            if (status != fixture_damages[i].status)
                fail_msg("read %s: %s", fixture_damages[i].name, fkv_status_string(status));
            *t = good;
        }
    for (size_t i = 0; i < sizeof k; i++)
        assert_true(((unsigned char *)k)[i] == 0x5a && ((unsigned char *)v)[i] == 0x5a);
    assert_int_equal(fkv_sequence_read(NULL, s.id, 0, 0, 3, &tk, &tv), FKV_ERR_HANDLE);
    assert_int_equal(fkv_sequence_read((fkv_cache *)f.ctx, s.id, 0, 0, 3, &tk, &tv),
                     FKV_ERR_HANDLE);
    assert_int_equal(fkv_sequence_read(f.cache, s.id, 0, 147, 3, &tk, &tv), FKV_OK);
    fkv_tensor none = fixture_tensor(NULL, FKV_DTYPE_F32, 0, 2, 16);
    assert_int_equal(fkv_sequence_read(f.cache, s.id, 0, 150, 0, &none, &none), FKV_OK);
    fixture_close(&f);
}

/* Exact values come back as they were stored, whole or in pieces, keys after RoPE. */
static void exact_reads(void **state) {
    (void)state;
    enum { N = 150 };
    struct fixture f;
    fixture_open(&f, &(struct options){.exact = true, .storage = FKV_DTYPE_F32});
    struct stream s = fixture_stream(&f, 1, N);
    float stored[N * 32], k[N * 32], v[N * 32], piece[32];
    fkv_tensor tk = fixture_tensor(k, FKV_DTYPE_F32, N, 2, 16);
    fkv_tensor tv = fixture_tensor(v, FKV_DTYPE_F32, N, 2, 16);
    assert_int_equal(fkv_sequence_read(f.cache, s.id, 1, 0, N, &tk, NULL), FKV_OK);
    assert_int_equal(fkv_sequence_read(f.cache, s.id, 1, 0, N, NULL, &tv), FKV_OK);
    fixture_values(stored, 0, N, 2, 16, 1, 1, 'v');
    assert_memory_equal(v, stored, sizeof v);
    fixture_values(stored, 0, N, 2, 16, 1, 1, 'k');
    for (int i = 0; i < N * 32; i++) {
        int d = i % 16, t = i / 32;
        double angle = t * f.inv_freq[d % 8];
        double x = d < 8 ? stored[i] * cos(angle) - stored[i + 8] * sin(angle)
                         : stored[i] * cos(angle) + stored[i - 8] * sin(angle);
        assert_true(fabs(k[i] - x) <= 4e-7);
    }
    fkv_tensor tp = fixture_tensor(piece, FKV_DTYPE_F32, 1, 2, 16);
    for (int t = 0; t < N; t++) {
        assert_int_equal(fkv_sequence_read(f.cache, s.id, 1, t, 1, &tp, NULL), FKV_OK);
        assert_memory_equal(piece, k + t * 32, sizeof piece);
    }
    fixture_close(&f);
}

/* Signals at the edge of f16, constant and alternating: everything stays finite. */
static void extreme_signals(void **state) {
    (void)state;
    enum { N = 400 };
    for (int authors = 0; authors < 2; authors++) {
        struct heap heap = {0};
        struct fixture f;
        fixture_open(&f, &(struct options){.heap = &heap, .authors = authors});
        fkv_sequence id;
        fkv_plan *plan;
        assert_int_equal(fkv_sequence_create(f.cache, NULL, &id), FKV_OK);
        assert_int_equal(fkv_plan_create(f.cache, &plan), FKV_OK);
        assert_int_equal(fixture_update(plan, id, N), FKV_OK);
        static float x[N * 32], q[N * 64], out[N * 64], k[N * 32], v[N * 32];
        static const float levels[8] = {45000, -45000, 0, 1e-7f, 6e-8f, 1, 65504, -3};
        for (int t = 0; t < N; t++) {
            for (int i = 0; i < 32; i++) {
                float level = i % 16 < 8 ? levels[i % 8] : levels[i % 8] * (t % 2 ? -1.f : 1.f);
                x[t * 32 + i] = level;
            }
            for (int i = 0; i < 64; i++)
                q[t * 64 + i] = 1e-3f;
        }
        fkv_tensor tv = fixture_tensor(x, FKV_DTYPE_F32, N, 2, 16);
        fkv_tensor tq = fixture_tensor(q, FKV_DTYPE_F32, N, 4, 16);
        fkv_tensor to = fixture_tensor(out, FKV_DTYPE_F32, N, 4, 16);
        fkv_tensor tk = fixture_tensor(k, FKV_DTYPE_F32, N, 2, 16);
        for (int i = 0; i < N * 32; i++)
            k[i] = x[i] / 2; /* room for the rotation */
        for (int layer = 0; layer < 2; layer++)
            assert_int_equal(fkv_append(plan, layer, &tk, &tv), FKV_OK);
        assert_int_equal(fkv_attend(plan, 0, &tq, &to, NULL), FKV_OK);
        for (int i = 0; i < N * 64; i++)
            assert_true(isfinite(out[i]));
        fkv_tensor rv = fixture_tensor(v, FKV_DTYPE_F32, N, 2, 16);
        assert_int_equal(fkv_sequence_read(f.cache, id, 0, 0, N, &tk, &rv), FKV_OK);
        for (int i = 0; i < N * 32; i++)
            assert_true(isfinite(k[i]) && isfinite(v[i]));
        for (int t = 0; t < N; t++) /* constants survive coding */
            assert_true(fabsf(v[t * 32] - 45000) <= 45 && v[t * 32 + 2] == 0);
        assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
        fixture_close(&f);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(parameter_structs), cmocka_unit_test(cache_creation),
        cmocka_unit_test(sequence_creation), cmocka_unit_test(stale_ids),
        cmocka_unit_test(many_sequences),    cmocka_unit_test(any_order),
        cmocka_unit_test(accounting),        cmocka_unit_test(bad_stats),
        cmocka_unit_test(token_limit),       cmocka_unit_test(byte_limit),
        cmocka_unit_test(outgrowing),        cmocka_unit_test(bad_reads),
        cmocka_unit_test(exact_reads),       cmocka_unit_test(extreme_signals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
