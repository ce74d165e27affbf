/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What may run at the same time does, with the same bits; what may not gets BUSY and changes nothing. Run
 * under a race detector these are its subject too.
 */
#include "fixture.h"

#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define THREADS 8

/* Failures are counted in the threads and asserted by the test's own thread. */
struct job {
    struct fixture *f;
    int number;
    uint64_t result;
    int wrong;         /* statuses or values that must not be */
    int done, refused; /* calls that were OK or BUSY */
    struct shared *shared;
};

static void run_threads(void *(*fn)(void *), struct job *jobs, int count) {
    pthread_t threads[THREADS];
    for (int i = 0; i < count; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, fn, &jobs[i]), 0);
    for (int i = 0; i < count; i++)
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    for (int i = 0; i < count; i++)
        if (jobs[i].wrong)
            fail_msg("thread %d: %d wrong of %d", i, jobs[i].wrong, jobs[i].done);
}

/* ---- own caches, common context and profile */

/* Length, values and outputs of a sequence that grows over page and block borders. */
static uint64_t grow(struct fixture *f, int number, int *wrong) {
    static const int64_t lengths[] = {150, 1, 40, 1, 70, 1, 1};
    struct fixture own = *f;
    struct stream s = {.number = (uint64_t)number};
    fkv_plan *plan = NULL;
    uint64_t hash = 0;
    *wrong += fkv_cache_create(f->ctx, f->profile, NULL, &own.cache) != FKV_OK;
    *wrong += fkv_sequence_create(own.cache, NULL, &s.id) != FKV_OK;
    *wrong += fkv_plan_create(own.cache, &plan) != FKV_OK;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        size_t floats = 2 * fixture_q_floats(f, lengths[i]);
        float *out = malloc(floats * sizeof *out);
        *wrong += fixture_step(&own, plan, &s, lengths[i], out, NULL) != FKV_OK;
        hash = fixture_hash(hash, out, floats * sizeof *out);
        free(out);
    }
    uint64_t digest = fixture_digest(&own, s.id);
    *wrong += fkv_plan_destroy(plan) != FKV_OK;
    *wrong += fkv_cache_destroy(own.cache) != FKV_OK;
    return fixture_hash(hash, &digest, sizeof digest);
}

static void *grow_thread(void *user) {
    struct job *job = user;
    job->result = grow(job->f, job->number, &job->wrong);
    return NULL;
}

static void own_caches(void **state) {
    (void)state;
    for (int threads = 1; threads <= 3; threads++) {
        struct heap heap = {0};
        struct fixture f;
        fixture_open(&f, &(struct options){.heap = &heap, .threads = threads});
        struct job jobs[THREADS] = {0};
        for (int i = 0; i < THREADS; i++)
            jobs[i] = (struct job){.f = &f, .number = i};
        run_threads(grow_thread, jobs, THREADS);
        for (int i = 0; i < THREADS; i++) {
            int wrong = 0;
            assert_true(grow(&f, i, &wrong) == jobs[i].result);
            assert_int_equal(wrong, 0);
        }
        fixture_close(&f);
    }
}

/* ---- one cache */

struct shared {
    struct stream read, write;
    pthread_barrier_t start;
    _Atomic int writers, steps;
    float q[5 * 64], expected[2][5 * 64];
};

static fkv_status attend(struct job *job, fkv_plan *plan, int layer, float *out) {
    fkv_tensor q = fixture_tensor(job->shared->q, FKV_DTYPE_F32, 5, 4, 16);
    fkv_tensor o = fixture_tensor(out, FKV_DTYPE_F32, 5, 4, 16);
    return fkv_attend(plan, layer, &q, &o, NULL);
}

static void count(struct job *job, fkv_status status) {
    job->done += status == FKV_OK;
    job->refused += status == FKV_ERR_BUSY;
    job->wrong += status != FKV_OK && status != FKV_ERR_BUSY;
    if (status == FKV_ERR_BUSY)
        sched_yield();
}

/* Attends again and again, and looks at the other readers' functions in between, until no writer is left;
 * without writers, a fixed number of times. */
static void *read_thread(void *user) {
    struct job *job = user;
    struct shared *s = job->shared;
    fkv_plan *plan = NULL;
    fkv_status status;
    while ((status = fkv_plan_create(job->f->cache, &plan)) == FKV_ERR_BUSY)
        sched_yield();
    job->wrong += status != FKV_OK;
    while ((status = fixture_update(plan, s->read.id, 5)) == FKV_ERR_BUSY)
        sched_yield();
    job->wrong += status != FKV_OK;
    pthread_barrier_wait(&s->start);
    float out[5 * 64];
    for (int i = 0; i < 200 || s->writers; i++) {
        /* readers without a pause would keep a writer out for good */
        for (int seen = s->steps; i % 4 == 3 && s->writers && s->steps == seen;)
            sched_yield();
        memset(out, 0x5a, sizeof out);
        status = attend(job, plan, i % 2, out);
        count(job, status);
        if (status == FKV_OK)
            job->wrong += memcmp(out, s->expected[i % 2], sizeof out) != 0;
        else
            for (size_t j = 0; j < sizeof out; j++)
                job->wrong += ((unsigned char *)out)[j] != 0x5a;
        int64_t length = -1;
        status = fkv_sequence_length(job->f->cache, s->read.id, &length);
        count(job, status);
        job->wrong += status == FKV_OK && length != s->read.length;
        fkv_stats stats = {.struct_size = sizeof stats};
        count(job, fkv_cache_stats(job->f->cache, FKV_ALL_SEQUENCES, &stats));
    }
    job->wrong += fkv_plan_destroy(plan) != FKV_OK;
    return NULL;
}

static void open_shared(struct fixture *f, struct shared *s, struct job *jobs, int readers) {
    s->read = fixture_stream(f, 1, 300);
    s->write = (struct stream){.number = 2};
    assert_int_equal(fkv_sequence_create(f->cache, NULL, &s->write.id), FKV_OK);
    fixture_values(s->q, 300, 5, 4, 16, 1, 0, 'q');
    for (int i = 0; i < THREADS; i++)
        jobs[i] = (struct job){.f = f, .number = i, .shared = s};
    fkv_plan *plan;
    assert_int_equal(fkv_plan_create(f->cache, &plan), FKV_OK);
    assert_int_equal(fixture_update(plan, s->read.id, 5), FKV_OK);
    for (int layer = 0; layer < 2; layer++)
        assert_int_equal(attend(&jobs[0], plan, layer, s->expected[layer]), FKV_OK);
    assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
    assert_int_equal(pthread_barrier_init(&s->start, NULL, (unsigned)readers), 0);
}

static void common_cache(void **state) {
    (void)state;
    for (int threads = 1; threads <= 3; threads += 2) {
        struct fixture f;
        struct shared s = {.writers = 0};
        struct job jobs[THREADS];
        fixture_open(&f, &(struct options){.threads = threads});
        open_shared(&f, &s, jobs, THREADS);
        run_threads(read_thread, jobs, THREADS);
        for (int i = 0; i < THREADS; i++) {
            assert_int_equal(jobs[i].done, 600);
            assert_int_equal(jobs[i].refused, 0);
        }
        pthread_barrier_destroy(&s.start);
        fixture_close(&f);
    }
}

/* Appends to its own sequence in spite of the readers, and makes and frees others. */
static void *write_thread(void *user) {
    struct job *job = user;
    struct shared *s = job->shared;
    fkv_plan *plan = NULL;
    fkv_status status;
    fkv_sequence other;
    while ((status = fkv_plan_create(job->f->cache, &plan)) == FKV_ERR_BUSY)
        sched_yield();
    job->wrong += status != FKV_OK;
    pthread_barrier_wait(&s->start);
    for (int step = 0; step < 60; step++) {
        int64_t tokens = step % 7 == 6 ? 30 : 3;
        while ((status = fixture_update(plan, s->write.id, tokens)) == FKV_ERR_BUSY)
            sched_yield();
        job->wrong += status != FKV_OK;
        for (int layer = 0; layer < 2; layer++) {
            while ((status = fixture_layer(job->f, plan, &s->write, tokens, layer, NULL, NULL)) ==
                   FKV_ERR_BUSY) {
                job->refused++;
                sched_yield();
            }
            count(job, status);
        }
        s->steps++;
        s->write.length += tokens;
        while ((status = fkv_sequence_create(job->f->cache, NULL, &other)) == FKV_ERR_BUSY)
            sched_yield();
        job->wrong += status != FKV_OK;
        while ((status = fkv_sequence_free(job->f->cache, other)) == FKV_ERR_BUSY)
            sched_yield();
        job->wrong += status != FKV_OK;
    }
    s->writers--;
    job->wrong += fkv_plan_destroy(plan) != FKV_OK;
    return NULL;
}

static void *reader_or_writer(void *user) {
    return ((struct job *)user)->number == 0 ? write_thread(user) : read_thread(user);
}

static void writer_beside_readers(void **state) {
    (void)state;
    enum { N = 4 };
    struct fixture f, alone;
    struct shared s = {.writers = 1};
    struct job jobs[THREADS];
    fixture_open(&f, NULL);
    open_shared(&f, &s, jobs, N);
    run_threads(reader_or_writer, jobs, N);
    assert_int_equal(jobs[0].done, 120);
    /* the same steps with nobody about */
    fixture_open(&alone, NULL);
    struct stream same = fixture_stream(&alone, 2, 0);
    fkv_plan *plan;
    assert_int_equal(fkv_plan_create(alone.cache, &plan), FKV_OK);
    for (int step = 0; step < 60; step++)
        assert_int_equal(fixture_step(&alone, plan, &same, step % 7 == 6 ? 30 : 3, NULL, NULL),
                         FKV_OK);
    assert_true(fixture_digest(&alone, same.id) == fixture_digest(&f, s.write.id));
    assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
    fixture_close(&alone);
    pthread_barrier_destroy(&s.start);
    fixture_close(&f);
}

/* ---- a writer held in the middle of its work */

struct hold {
    struct fixture *f;
    fkv_plan *plan;
    struct stream *stream;
    pthread_barrier_t inside;
    bool armed;
    fkv_status status;
};

static void stop_inside(void *user) {
    struct hold *hold = user;
    if (!hold->armed)
        return;
    hold->armed = false;
    pthread_barrier_wait(&hold->inside);
    pthread_barrier_wait(&hold->inside);
}

static void *append_thread(void *user) {
    struct hold *hold = user;
    hold->status = fixture_layer(hold->f, hold->plan, hold->stream, 100, 0, NULL, NULL);
    return NULL;
}

static void *update_thread(void *user) {
    struct hold *hold = user;
    hold->status = fixture_update(hold->plan, hold->stream->id, 100);
    return NULL;
}

static void start_hold(struct hold *hold, struct heap *heap, void *(*fn)(void *),
                       pthread_t *thread) {
    hold->armed = true;
    heap->watch_user = hold;
    heap->watch = stop_inside;
    assert_int_equal(pthread_create(thread, NULL, fn, hold), 0);
    pthread_barrier_wait(&hold->inside);
}

static void end_hold(struct hold *hold, struct heap *heap, pthread_t thread) {
    pthread_barrier_wait(&hold->inside);
    pthread_join(thread, NULL);
    heap->watch = NULL;
    assert_int_equal(hold->status, FKV_OK);
}

static void busy(void **state) {
    (void)state;
    struct heap heap = {0};
    struct fixture f;
    fixture_open(&f, &(struct options){.heap = &heap});
    struct stream a = fixture_stream(&f, 1, 150), b = fixture_stream(&f, 2, 150);
    fkv_plan *plan, *other, *fresh = NULL;
    assert_int_equal(fkv_plan_create(f.cache, &plan), FKV_OK);
    assert_int_equal(fkv_plan_create(f.cache, &other), FKV_OK);
    assert_int_equal(fixture_update(plan, a.id, 100), FKV_OK);
    assert_int_equal(fixture_update(other, b.id, 5), FKV_OK);
    struct hold hold = {.f = &f, .plan = plan, .stream = &a};
    assert_int_equal(pthread_barrier_init(&hold.inside, NULL, 2), 0);
    float x[5 * 64];
    fkv_tensor q = fixture_tensor(x, FKV_DTYPE_F32, 5, 4, 16);
    fkv_tensor k = fixture_tensor(x, FKV_DTYPE_F32, 5, 2, 16);
    fixture_values(x, 0, 5, 4, 16, 3, 0, 'q');
    float out[5 * 64];
    fkv_tensor o = fixture_tensor(out, FKV_DTYPE_F32, 5, 4, 16);
    fkv_sequence id;
    int64_t length;
    fkv_stats stats = {.struct_size = sizeof stats};
    pthread_t thread;
    start_hold(&hold, &heap, append_thread, &thread);
    const fkv_status got[] = {
        fkv_sequence_create(f.cache, NULL, &id),
        fkv_sequence_free(f.cache, b.id),
        fkv_sequence_fork(f.cache, b.id, &id),
        fkv_sequence_crop(f.cache, b.id, 0),
        fkv_sequence_crop_limit(f.cache, b.id, &length),
        fkv_sequence_crop_floor(f.cache, b.id, 0, &length),
        fkv_sequence_length(f.cache, b.id, &length),
        fkv_sequence_read(f.cache, b.id, 0, 0, 5, &k, NULL),
        fkv_cache_stats(f.cache, FKV_ALL_SEQUENCES, &stats),
        fixture_update(other, b.id, 1),
        fkv_append(other, 0, &k, &k),
        fkv_attend(other, 0, &q, &o, NULL),
        fkv_append_attend(other, 0, &q, &k, &k, &o, NULL),
        fixture_update(plan, a.id, 1), /* the plan itself is in use, too */
        fkv_append(plan, 0, &k, &k),
        fkv_attend(plan, 1, &q, &o, NULL),
        fkv_plan_destroy(plan),
        fkv_cache_destroy(f.cache),
    };
    fkv_status creation = fkv_plan_create(f.cache, &fresh);
    end_hold(&hold, &heap, thread);
    for (size_t i = 0; i < sizeof got / sizeof *got; i++)
        if (got[i] != FKV_ERR_BUSY)
            fail_msg("call %zu beside a writer: %s", i, fkv_status_string(got[i]));
    assert_true(creation == FKV_OK || creation == FKV_ERR_BUSY);
    assert_int_equal(fkv_plan_destroy(fresh), FKV_OK);
    assert_int_equal(fixture_layer(&f, plan, &a, 100, 1, NULL, NULL), FKV_OK);
    /* an update that has stopped halfway: its plan is in use */
    start_hold(&hold, &heap, update_thread, &thread);
    fkv_status second[] = {fixture_update(plan, a.id, 1),
                           fkv_attend(plan, 0, &q, &o, NULL),
                           fkv_plan_destroy(plan),
                           fkv_cache_destroy(f.cache),
                           fkv_sequence_fork(f.cache, b.id, &id), /* writers beside a reader */
                           fkv_sequence_crop(f.cache, b.id, 0)};
    fkv_status reading = fkv_sequence_crop_limit(f.cache, b.id, &length);
    end_hold(&hold, &heap, thread);
    assert_int_equal(reading, FKV_OK);
    for (int i = 0; i < 6; i++)
        assert_int_equal(second[i], FKV_ERR_BUSY);
    assert_int_equal(fkv_attend(other, 0, &q, &o, NULL), FKV_OK);
    /* all as if nobody had tried */
    struct stream same = {.number = 1};
    assert_int_equal(fkv_sequence_create(f.cache, NULL, &same.id), FKV_OK);
    assert_int_equal(fixture_step(&f, other, &same, 150, NULL, NULL), FKV_OK);
    assert_int_equal(fixture_step(&f, other, &same, 100, NULL, NULL), FKV_OK);
    assert_true(fixture_digest(&f, same.id) == fixture_digest(&f, a.id));
    assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
    assert_int_equal(fkv_plan_destroy(other), FKV_OK);
    pthread_barrier_destroy(&hold.inside);
    fixture_close(&f);
}

/* ---- storm: handles are replaced and ended by any thread while others use them */

#define SLOTS 3

struct storm {
    struct heap heap;
    struct fixture model;
    _Atomic(fkv_context *) ctx[SLOTS];
    _Atomic(fkv_profile *) profile[SLOTS];
    _Atomic(fkv_cache *) cache[SLOTS];
    _Atomic(fkv_plan *) plan[SLOTS];
};

static struct storm storm;

static uint64_t next_random(uint64_t *x) {
    *x ^= *x << 13;
    *x ^= *x >> 7;
    return *x ^= *x << 17;
}

/* A handle that was taken out of its slot is this thread's to end: OK as soon as nobody is in it. */
#define REPLACE(job, slot, fresh, destroy)                                                         \
    do {                                                                                           \
        fkv_status ended;                                                                          \
        void *old = atomic_exchange(&(slot), (fresh));                                             \
        while ((ended = destroy(old)) == FKV_ERR_BUSY)                                             \
            sched_yield();                                                                         \
        (job)->wrong += ended != FKV_OK;                                                           \
    } while (0)

static fkv_status replace_context(struct job *job, int slot) {
    fkv_context *ctx = NULL;
    fkv_context_params params;
    fkv_context_params_init(&params, sizeof params);
    params.threads = 1 + slot % 2;
    params.alloc = heap_alloc;
    params.free = heap_free;
    params.alloc_user = &storm.heap;
    fkv_status status = fkv_context_create(&params, &ctx);
    if (status == FKV_OK)
        REPLACE(job, storm.ctx[slot], ctx, fkv_context_destroy);
    return status;
}

static fkv_status replace_profile(struct job *job, int slot) {
    struct fixture f = storm.model;
    fkv_profile *profile = NULL;
    f.ctx = storm.ctx[slot];
    f.model.inv_freq = f.inv_freq;
    fkv_status status = fixture_profile(&f, &profile);
    if (status == FKV_OK)
        REPLACE(job, storm.profile[slot], profile, fkv_profile_destroy);
    return status;
}

static fkv_status replace_cache(struct job *job, int slot) {
    fkv_cache *cache = NULL;
    fkv_status status = fkv_cache_create(storm.ctx[slot], storm.profile[slot], NULL, &cache);
    if (status == FKV_OK)
        REPLACE(job, storm.cache[slot], cache, fkv_cache_destroy);
    return status;
}

static fkv_status replace_plan(struct job *job, int slot) {
    fkv_plan *plan = NULL;
    fkv_status status = fkv_plan_create(storm.cache[slot], &plan);
    if (status == FKV_OK)
        REPLACE(job, storm.plan[slot], plan, fkv_plan_destroy);
    return status;
}

/* A step of a new sequence with a plan that everybody uses. */
static fkv_status use_plan(struct job *job, int slot) {
    struct fixture f = storm.model;
    struct stream s = {.number = 1};
    (void)job;
    f.cache = storm.cache[slot];
    fkv_sequence fork = -1;
    fkv_status status = fkv_sequence_create(f.cache, NULL, &s.id);
    if (status == FKV_OK)
        status = fixture_step(&f, storm.plan[slot], &s, 3, NULL, NULL);
    if (status == FKV_OK && fkv_sequence_fork(f.cache, s.id, &fork) == FKV_OK) {
        fkv_sequence_crop(f.cache, s.id, 1);
        s.id = fork; /* the other one stays until the cache goes */
        status = fixture_step(&f, storm.plan[slot], &s, 3, NULL, NULL);
    }
    fkv_sequence_free(f.cache, s.id);
    return status;
}

static fkv_status look(struct job *job, int slot) {
    fkv_context_info info = {.struct_size = sizeof info};
    fkv_profile_info profile = {.struct_size = sizeof profile};
    fkv_stats stats = {.struct_size = sizeof stats};
    char text[64];
    const fkv_status got[] = {fkv_context_query(storm.ctx[slot], &info),
                              fkv_profile_query(storm.profile[slot], &profile),
                              fkv_context_message(storm.ctx[slot], text, sizeof text, NULL)};
    for (int i = 0; i < 3; i++)
        job->wrong += got[i] != FKV_OK && got[i] != FKV_ERR_HANDLE && got[i] != FKV_ERR_BUFFER;
    return fkv_cache_stats(storm.cache[slot], FKV_ALL_SEQUENCES, &stats);
}

static void *storm_thread(void *user) {
    static fkv_status (*const acts[])(struct job *, int) = {
        replace_context, replace_profile, replace_cache, replace_plan,
        use_plan,        use_plan,        use_plan,      look};
    struct job *job = user;
    uint64_t random = 0x9e3779b97f4a7c15u * (uint64_t)(job->number + 1);
    for (int i = 0; i < 400; i++) {
        uint64_t r = next_random(&random) >> 20;
        fkv_status status = acts[r % 8](job, (int)(r / 8 % SLOTS));
        job->done += status == FKV_OK;
        /* STATE: another thread has set the common plan to its own step; HANDLE: or freed it */
        job->wrong += status != FKV_OK && status != FKV_ERR_HANDLE && status != FKV_ERR_BUSY &&
                      status != FKV_ERR_STATE && status != FKV_ERR_INVALID;
    }
    return NULL;
}

static void create_and_destroy(void **state) {
    (void)state;
    memset(&storm, 0, sizeof storm);
    fixture_model(&storm.model, NULL);
    struct job jobs[THREADS] = {0};
    for (int i = 0; i < THREADS; i++)
        jobs[i].number = i;
    for (int slot = 0; slot < SLOTS; slot++) {
        assert_int_equal(replace_context(&jobs[0], slot), FKV_OK);
        assert_int_equal(replace_profile(&jobs[0], slot), FKV_OK);
        assert_int_equal(replace_cache(&jobs[0], slot), FKV_OK);
        assert_int_equal(replace_plan(&jobs[0], slot), FKV_OK);
    }
    run_threads(storm_thread, jobs, THREADS);
    for (int i = 0; i < THREADS; i++)
        assert_true(jobs[i].done > 50);
    for (int slot = 0; slot < SLOTS; slot++) {
        assert_int_equal(fkv_context_destroy(storm.ctx[slot]), FKV_OK);
        assert_int_equal(fkv_cache_destroy(storm.cache[slot]), FKV_OK);
        assert_int_equal(fkv_profile_destroy(storm.profile[slot]), FKV_OK);
        assert_int_equal(fkv_plan_destroy(storm.plan[slot]), FKV_OK);
    }
    assert_int_equal(storm.heap.blocks, 0);
    assert_int_equal(storm.heap.bytes, 0);
    assert_int_equal(storm.heap.mismatches, 0);
}

/* ---- one handle ended by all threads at once: one of them does it */

struct ending {
    pthread_barrier_t start;
    void *handle;
    int kind;
};

static struct ending ending;

static void *end_thread(void *user) {
    struct job *job = user;
    pthread_barrier_wait(&ending.start);
    fkv_status status;
    do {
        status = ending.kind == 0   ? fkv_context_destroy(ending.handle)
                 : ending.kind == 1 ? fkv_profile_destroy(ending.handle)
                 : ending.kind == 2 ? fkv_cache_destroy(ending.handle)
                 : ending.kind == 3 ? fkv_plan_destroy(ending.handle)
                                    : fkv_calibrator_destroy(ending.handle);
    } while (status == FKV_ERR_BUSY);
    job->done += status == FKV_OK;
    job->wrong += status != FKV_OK && status != FKV_ERR_HANDLE;
    return NULL;
}

static void ended_once(void **state) {
    (void)state;
    enum { N = 4 };
    assert_int_equal(pthread_barrier_init(&ending.start, NULL, N), 0);
    for (int round = 0; round < 100; round++) {
        struct heap heap = {0};
        struct fixture f;
        fkv_plan *plan;
        fkv_calibrator *cal;
        fixture_open(&f, &(struct options){.heap = &heap});
        assert_int_equal(fkv_plan_create(f.cache, &plan), FKV_OK);
        assert_int_equal(fkv_calibrator_create(f.ctx, &f.model, NULL, &cal), FKV_OK);
        void *handles[] = {f.ctx, f.profile, f.cache, plan, cal};
        for (ending.kind = 0; ending.kind < 5; ending.kind++) {
            struct job jobs[THREADS] = {0};
            ending.handle = handles[ending.kind];
            run_threads(end_thread, jobs, N);
            int done = 0;
            for (int i = 0; i < N; i++)
                done += jobs[i].done;
            assert_int_equal(done, 1);
        }
        assert_int_equal(heap.blocks, 0);
    }
    pthread_barrier_destroy(&ending.start);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(own_caches),
        cmocka_unit_test(common_cache),
        cmocka_unit_test(writer_beside_readers),
        cmocka_unit_test(busy),
        cmocka_unit_test(create_and_destroy),
        cmocka_unit_test(ended_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
