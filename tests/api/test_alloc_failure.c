/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every allocation of every scenario fails once, alone and with all that follow it: the call in which it
 * happens says NOMEM and has changed nothing, the same call succeeds when there is memory again, the
 * scenario ends with the bits it has without any failure, and nothing leaks.
 */
#include "fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define DONE 1
#define N_STREAMS 24
#define MAX_CALLS 64

struct run {
    struct heap heap;
    struct fixture f;
    fkv_plan *plan;
    struct stream streams[N_STREAMS];
    int n_streams;
    fkv_calibrator *cal;
    fkv_profile *profile; /* made by the scenario */
    char path[64];
    int at; /* calls that have succeeded */
    uint64_t result;
};

/* What a run without failures holds before each of its calls, and at the end. */
struct trace {
    uint64_t states[MAX_CALLS];
    int calls;
};

struct scenario {
    const char *name;
    struct options options;
    bool bare; /* begins before there is a context */
    void (*prepare)(struct run *r);
    fkv_status (*next)(struct run *r); /* one library call; DONE after the last */
};

/* ---- scenarios */

/* Many sequences with several periods: the table of sequences grows, and so does that of spectra. */
static fkv_status next_sequence(struct run *r) {
    if (r->n_streams == N_STREAMS)
        return DONE;
    fkv_sequence_params params;
    fkv_sequence_params_init(&params, sizeof params);
    params.period = 100 + 100 * (r->n_streams % 3);
    fkv_sequence id = -7;
    fkv_status status = fkv_sequence_create(r->f.cache, &params, &id);
    if (status == FKV_OK)
        r->streams[r->n_streams++].id = id;
    else
        assert_int_equal(id, -7);
    return status;
}

static fkv_status next_creation(struct run *r) {
    struct fixture *f = &r->f;
    fkv_context_params params;
    fkv_context_params_init(&params, sizeof params);
    params.threads = 2;
    params.alloc = heap_alloc;
    params.free = heap_free;
    params.alloc_user = &r->heap;
    switch (r->at) {
    case 0:
        return fkv_context_create(&params, &f->ctx);
    case 1:
        return fixture_profile(f, &f->profile);
    case 2:
        return fkv_cache_create(f->ctx, f->profile, NULL, &f->cache);
    case 3:
        return next_sequence(r);
    case 4:
        return fkv_plan_create(f->cache, &r->plan);
    case 5:
        return fixture_update(r->plan, r->streams[0].id, 10);
    default:
        return DONE;
    }
}

static void prepare_plan(struct run *r) {
    r->n_streams = 1;
    assert_int_equal(fkv_sequence_create(r->f.cache, NULL, &r->streams[0].id), FKV_OK);
    assert_int_equal(fkv_plan_create(r->f.cache, &r->plan), FKV_OK);
}

/* Steps of these lengths, layer by layer; every other one appends without attending. */
static fkv_status next_step(struct run *r, const int *lengths, int count) {
    struct fixture *f = &r->f;
    struct stream *s = &r->streams[0];
    int step = r->at / 3, layer = r->at % 3 - 1, tokens = step < count ? lengths[step] : 0;
    if (step == count)
        return DONE;
    if (layer < 0)
        return fixture_update(r->plan, s->id, tokens);
    float *out = malloc(fixture_q_floats(f, tokens) * sizeof *out);
    fkv_status status;
    if (step % 2) {
        fixture_values(out, s->length, tokens, 2, 16, s->number, layer, 'k');
        fkv_tensor k = fixture_tensor(out, FKV_DTYPE_F32, tokens, 2, 16);
        status = fkv_append(r->plan, layer, &k, &k);
    } else {
        status = fixture_layer(f, r->plan, s, tokens, layer, out, NULL);
    }
    if (status == FKV_OK)
        r->result = fixture_hash(r->result, out, fixture_q_floats(f, tokens) / 2 * sizeof *out);
    if (status == FKV_OK && layer == 1)
        s->length += tokens;
    free(out);
    return status;
}

/* Over page borders, into the first coded block, over many at once, over a period's end, one by one. */
static fkv_status next_append(struct run *r) {
    static const int lengths[] = {1, 40, 1, 60, 1, 150, 63, 1};
    return next_step(r, lengths, sizeof lengths / sizeof *lengths);
}

static void prepare_fork(struct run *r) {
    r->n_streams = 1;
    r->streams[0] = fixture_stream(&r->f, 1, 150);
    assert_int_equal(fkv_plan_create(r->f.cache, &r->plan), FKV_OK);
}

static fkv_status update_all(struct run *r, const int64_t *n_new) {
    fkv_sequence ids[N_STREAMS];
    for (int i = 0; i < r->n_streams; i++)
        ids[i] = r->streams[i].id;
    fkv_batch batch;
    fkv_batch_init(&batch, sizeof batch);
    batch.count = r->n_streams;
    batch.sequences = ids;
    batch.n_new = n_new;
    return fkv_plan_update(r->plan, &batch);
}

static fkv_status fork_stream(struct run *r, int from) {
    struct stream child = r->streams[from];
    fkv_sequence id = -7;
    fkv_status status = fkv_sequence_fork(r->f.cache, child.id, &id);
    if (status == FKV_OK) {
        child.id = id;
        r->streams[r->n_streams++] = child;
    } else {
        assert_int_equal(id, -7);
    }
    return status;
}

/* Forks until the table of sequences grows, of which some are freed again; then parent and children in one
 * batch, whose last pages and open segments are copied; crops, which allocate nothing; and once more. */
static fkv_status next_fork(struct run *r) {
    static const int64_t n_new[2][4] = {{3, 70, 0, 1}, {70, 1, 200, 1}};
    enum { FORKS = 17, CROP = FORKS, UPDATE, APPEND, STEP = APPEND + 2, KEPT = 4 };
    struct fixture *f = &r->f;
    int at = r->at % STEP, round = r->at / STEP, tokens = 0;
    if (round == 2)
        return DONE;
    if (at < FORKS)
        return fork_stream(r, at % r->n_streams);
    if (at == CROP) {
        for (int i = KEPT; i < r->n_streams; i++)
            assert_int_equal(fkv_sequence_free(f->cache, r->streams[i].id), FKV_OK);
        r->n_streams = KEPT;
        for (int i = 0; i < KEPT; i++) {
            r->streams[i].length -= i;
            assert_int_equal(fkv_sequence_crop(f->cache, r->streams[i].id, r->streams[i].length),
                             FKV_OK);
        }
        return FKV_OK;
    }
    if (at == UPDATE)
        return update_all(r, n_new[round]);
    for (int i = 0; i < KEPT; i++)
        tokens += (int)n_new[round][i];
    float *x = malloc(fixture_q_floats(f, tokens) * sizeof *x);
    fixture_values(x, 1000 * round, tokens, 2, 16, 5, at - APPEND, 'k');
    fkv_tensor k = fixture_tensor(x, FKV_DTYPE_F32, tokens, 2, 16);
    fkv_status status = fkv_append(r->plan, at - APPEND, &k, &k);
    free(x);
    for (int i = 0; status == FKV_OK && at == APPEND + 1 && i < KEPT; i++)
        r->streams[i].length += n_new[round][i];
    return status;
}

static void prepare_streams(struct run *r) {
    r->n_streams = 3;
    for (int i = 0; i < 3; i++)
        r->streams[i] = fixture_stream(&r->f, (uint64_t)i, 60 * i);
    assert_int_equal(fkv_plan_create(r->f.cache, &r->plan), FKV_OK);
}

static fkv_status next_plan(struct run *r) {
    static const int64_t n_new[][3] = {{1, 0, 0}, {1, 1, 1}, {300, 2, 5}, {1, 1, 1}, {7, 900, 1}};
    if (r->at == 5)
        return DONE;
    return update_all(r, n_new[r->at]);
}

static void prepare_read(struct run *r) {
    r->n_streams = 1;
    r->streams[0] = fixture_stream(&r->f, 1, 200);
}

static fkv_status next_read(struct run *r) {
    if (r->at == 2)
        return DONE;
    static float k[190 * 32], v[190 * 32];
    fkv_tensor tk = fixture_tensor(k, FKV_DTYPE_F32, 190, 2, 16);
    fkv_tensor tv = fixture_tensor(v, FKV_DTYPE_F32, 190, 2, 16);
    memset(k, 0x5a, sizeof k);
    fkv_status status = fkv_sequence_read(r->f.cache, r->streams[0].id, r->at, 5, 190, &tk, &tv);
    if (status == FKV_OK)
        r->result = fixture_hash(fixture_hash(r->result, k, sizeof k), v, sizeof v);
    else
        for (size_t i = 0; i < sizeof k; i++)
            assert_int_equal(((unsigned char *)k)[i], 0x5a);
    return status;
}

static fkv_status observe(struct run *r, int layer, fkv_criterion criterion) {
    enum { N = 150 };
    static float x[N * 64];
    fixture_values(x, 0, N, 4, 16, 3, layer, 'k');
    fkv_tensor k = fixture_tensor(x, FKV_DTYPE_F32, N, 2, 16);
    fkv_tensor q = fixture_tensor(x, FKV_DTYPE_F32, N, 4, 16);
    return fkv_calibrator_observe(r->cal, layer, &k, &k, criterion ? NULL : &q);
}

static fkv_status next_calibration(struct run *r, fkv_criterion criterion) {
    fkv_calibrator_params params;
    fkv_calibrator_params_init(&params, sizeof params);
    params.criterion = criterion;
    fkv_fourier_params fourier;
    fkv_fourier_params_init(&fourier, sizeof fourier);
    fourier.n_local = 32;
    fourier.bins = 40;
    params.fourier = &fourier;
    uint8_t codes[32];
    switch (r->at) {
    case 0:
        return fkv_calibrator_create(r->f.ctx, &r->f.model, &params, &r->cal);
    case 1:
    case 2:
    case 3:
        return observe(r, r->at % 2, criterion);
    case 4:
        return fkv_calibrator_solve(r->cal, NULL, NULL, 0, &r->profile);
    case 5:
        for (int layer = 0; layer < 2; layer++) {
            double errors[32];
            assert_int_equal(fkv_calibrator_errors(r->cal, layer, FKV_PART_K, errors, 32), FKV_OK);
            r->result = fixture_hash(r->result, errors, sizeof errors);
        }
        return fkv_profile_channels(r->profile, 1, FKV_PART_K, codes, sizeof codes);
    default:
        return DONE;
    }
}

static fkv_status next_residual(struct run *r) {
    return next_calibration(r, FKV_CRITERION_RESIDUAL);
}

static fkv_status next_published(struct run *r) {
    return next_calibration(r, FKV_CRITERION_PUBLISHED);
}

static void prepare_path(struct run *r) {
    strcpy(r->path, "/tmp/fkv-test-XXXXXX");
    int fd = mkstemp(r->path);
    assert_true(fd >= 0);
    close(fd);
}

static fkv_status next_profile(struct run *r) {
    static char text[65536];
    static size_t bytes;
    fkv_status status = FKV_OK;
    switch (r->at) {
    case 0:
        status = fkv_profile_save(r->f.profile, text, sizeof text, &bytes);
        r->result = status ? r->result : fixture_hash(r->result, text, bytes);
        return status;
    case 1:
        return fkv_profile_load(r->f.ctx, text, bytes, &r->profile);
    case 2:
        return fkv_profile_save_file(r->profile, r->path);
    case 3:
        assert_int_equal(fkv_profile_destroy(r->profile), FKV_OK);
        r->profile = NULL;
        return FKV_OK;
    case 4:
        return fkv_profile_load_file(r->f.ctx, r->path, &r->profile);
    case 5:
        status = fkv_profile_save(r->profile, text, sizeof text, &bytes);
        r->result = status ? r->result : fixture_hash(r->result, text, bytes);
        return status;
    default:
        return DONE;
    }
}

static const struct scenario scenarios[] = {
    {"creation", {0}, true, NULL, next_creation},
    {"append exact", {.exact = true}, false, prepare_plan, next_append},
    {"append coded", {.period = 128, .bins = 8}, false, prepare_plan, next_append},
    {"append coded as published",
     {.period = 128, .bins = 8, .authors = true},
     false,
     prepare_plan,
     next_append},
    {"append with threads",
     {.period = 128, .bins = 8, .threads = 3},
     false,
     prepare_plan,
     next_append},
    {"append calibrated", {.calibrated = true}, false, prepare_plan, next_append},
    {"append calibrated with threads",
     {.calibrated = true, .threads = 3},
     false,
     prepare_plan,
     next_append},
    {"creation calibrated", {.calibrated = true}, true, NULL, next_creation},
    {"plan calibrated", {.calibrated = true}, false, prepare_streams, next_plan},
    {"fork exact", {.exact = true}, false, prepare_fork, next_fork},
    {"fork coded", {.period = 192, .bins = 8, .min_middle = 1}, false, prepare_fork, next_fork},
    {"fork calibrated", {.calibrated = true}, false, prepare_fork, next_fork},
    {"plan", {0}, false, prepare_streams, next_plan},
    {"read", {0}, false, prepare_read, next_read},
    {"sequences", {0}, false, NULL, next_sequence},
    {"calibration", {.threads = 2}, false, NULL, next_residual},
    {"calibration as published", {.threads = 2}, false, NULL, next_published},
    {"profile", {0}, false, prepare_path, next_profile},
};

/* ---- the loop */

static void open_run(struct run *r, const struct scenario *s) {
    memset(r, 0, sizeof *r);
    struct options options = s->options;
    options.heap = &r->heap;
    if (s->bare)
        fixture_model(&r->f, &options);
    else
        fixture_open(&r->f, &options);
    if (s->prepare)
        s->prepare(r);
}

static void close_run(struct run *r) {
    assert_int_equal(fkv_plan_destroy(r->plan), FKV_OK);
    assert_int_equal(fkv_calibrator_destroy(r->cal), FKV_OK);
    assert_int_equal(fkv_profile_destroy(r->profile), FKV_OK);
    fixture_close(&r->f);
    if (r->path[0])
        unlink(r->path);
}

/* Hash of everything held and of all results so far. */
static uint64_t state_of(struct run *r) {
    uint64_t hash = r->result;
    for (int i = 0; r->f.cache && i < r->n_streams; i++) {
        uint64_t digest = fixture_digest(&r->f, r->streams[i].id);
        hash = fixture_hash(hash, &digest, sizeof digest);
    }
    for (int layer = 0; r->cal && layer < 2; layer++)
        for (fkv_part part = 0; part < 2; part++) {
            double errors[32] = {0};
            fkv_calibrator_errors(r->cal, layer, part, errors, 32);
            hash = fixture_hash(hash, errors, sizeof errors);
        }
    return hash;
}

static void record(const struct scenario *s, struct trace *trace) {
    struct run r;
    open_run(&r, s);
    for (;;) {
        assert_true(r.at < MAX_CALLS);
        trace->states[r.at] = state_of(&r);
        fkv_status status = s->next(&r);
        if (status == DONE)
            break;
        if (status)
            fail_msg("%s: call %d: %s", s->name, r.at, fkv_status_string(status));
        r.at++;
    }
    trace->calls = r.at;
    close_run(&r);
}

/* Runs the scenario with the n-th allocation failing; false if it has fewer. */
static bool run_once(const struct scenario *s, int64_t n, bool forever, const struct trace *trace) {
    struct run r;
    open_run(&r, s);
    heap_fail(&r.heap, n, forever);
    bool failed = false;
    for (;;) {
        int64_t bytes = r.heap.bytes;
        fkv_status status = s->next(&r);
        if (status == DONE)
            break;
        bool now = heap_failed(&r.heap) && !failed;
        if (status != (now ? FKV_ERR_NOMEM : FKV_OK))
            fail_msg("%s: allocation %lld, call %d: %s", s->name, (long long)n, r.at,
                     fkv_status_string(status));
        if (!now) {
            r.at++;
            continue;
        }
        failed = true;
        heap_fail(&r.heap, 0, false);
        if (r.heap.bytes != bytes)
            fail_msg("%s: allocation %lld, call %d keeps memory", s->name, (long long)n, r.at);
        if (state_of(&r) != trace->states[r.at])
            fail_msg("%s: allocation %lld, call %d: state changed", s->name, (long long)n, r.at);
        assert_true(!r.f.ctx || fixture_message(&r.f)[0] != 0);
    }
    heap_fail(&r.heap, 0, false);
    assert_int_equal(r.at, trace->calls);
    if (state_of(&r) != trace->states[r.at])
        fail_msg("%s: allocation %lld: another result", s->name, (long long)n);
    close_run(&r);
    return failed;
}

static void every_allocation(void **state) {
    const struct scenario *s = *state;
    struct trace trace;
    record(s, &trace);
    int64_t n[2];
    for (int forever = 0; forever < 2; forever++)
        for (n[forever] = 1; run_once(s, n[forever], forever, &trace);)
            n[forever]++;
    assert_true(n[0] > 1 && n[0] == n[1]); /* there was something to fail */
}

int main(void) {
    enum { N = sizeof scenarios / sizeof *scenarios };
    struct CMUnitTest tests[N];
    for (int i = 0; i < N; i++)
        tests[i] = (struct CMUnitTest){scenarios[i].name, every_allocation, NULL, NULL,
                                       (void *)(uintptr_t)&scenarios[i]};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
