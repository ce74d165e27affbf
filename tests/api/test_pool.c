/* SPDX-License-Identifier: Apache-2.0 */
/* Handles and the thread pool: what many threads share. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "core/core.h"

#include <fenv.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- handles */

static void test_handles(void **state) {
    (void)state;
    int object = 1;
    void *closed;
    void *h = fkv_handle_create(FKV_KIND_CACHE, &object);
    assert_non_null(h);
    assert_null(fkv_handle_acquire(FKV_KIND_PLAN, h));
    assert_int_equal(fkv_handle_close(FKV_KIND_PLAN, h, &closed), FKV_ERR_HANDLE);
    assert_ptr_equal(fkv_handle_acquire(FKV_KIND_CACHE, h), &object);
    assert_ptr_equal(fkv_handle_acquire(FKV_KIND_CACHE, h), &object);
    fkv_handle_release(h);
    assert_int_equal(fkv_handle_close(FKV_KIND_CACHE, h, &closed), FKV_ERR_BUSY);
    fkv_handle_release(h);
    assert_int_equal(fkv_handle_close(FKV_KIND_CACHE, h, &closed), FKV_OK);
    assert_ptr_equal(closed, &object);
    assert_null(fkv_handle_acquire(FKV_KIND_CACHE, h));
    assert_int_equal(fkv_handle_close(FKV_KIND_CACHE, h, &closed), FKV_ERR_HANDLE);
    void *again = fkv_handle_create(FKV_KIND_CACHE, &object); /* the same entry */
    assert_ptr_not_equal(again, h);
    assert_null(fkv_handle_acquire(FKV_KIND_CACHE, h));
    /* numbers and addresses that never were handles */
    for (int kind = FKV_KIND_CONTEXT; kind <= FKV_KIND_PLAN; kind++) {
        assert_null(fkv_handle_acquire(kind, NULL));
        assert_null(fkv_handle_acquire(kind, &object));
        assert_null(fkv_handle_acquire(kind, (void *)UINTPTR_MAX));
        for (uintptr_t i = 1; i < 2000000; i += 997) {
            assert_null(fkv_handle_acquire(kind, (void *)i));
        }
    }
    assert_int_equal(fkv_handle_close(FKV_KIND_CACHE, again, &closed), FKV_OK);
    /* more than one chunk of the table */
    enum { MANY = 3000 };
    static void *many[MANY];
    for (int i = 0; i < MANY; i++) {
        many[i] = fkv_handle_create(FKV_KIND_PROFILE, &many[i]);
        assert_non_null(many[i]);
    }
    for (int i = 0; i < MANY; i++) {
        assert_ptr_equal(fkv_handle_acquire(FKV_KIND_PROFILE, many[i]), &many[i]);
        fkv_handle_release(many[i]);
        assert_int_equal(fkv_handle_close(FKV_KIND_PROFILE, many[i], &closed), FKV_OK);
        assert_ptr_equal(closed, &many[i]);
    }
}

/* Many threads make, use and end handles, some of them each other's. */
static _Atomic(void *) shared_handles[8];
static _Atomic int handle_faults;

static void *use_handles(void *p) {
    uint32_t seed = *(const uint32_t *)p;
    static int objects[8];
    for (int i = 0; i < 20000; i++) {
        seed = seed * 1664525u + 1013904223u;
        uint32_t slot = seed >> 24 & 7u;
        void *h = shared_handles[slot], *closed;
        int *object = fkv_handle_acquire(FKV_KIND_PLAN, h);
        if (object) {
            handle_faults += object != &objects[slot];
            fkv_handle_release(h);
        }
        if (seed >> 30 == 0 && fkv_handle_close(FKV_KIND_PLAN, h, &closed) == FKV_OK) {
            handle_faults += closed != &objects[slot];
            void *fresh = fkv_handle_create(FKV_KIND_PLAN, &objects[slot]);
            handle_faults += fresh == h;
            shared_handles[slot] = fresh;
        } else if (!h) {
            void *none = NULL, *fresh = fkv_handle_create(FKV_KIND_PLAN, &objects[slot]);
            if (!atomic_compare_exchange_strong(&shared_handles[slot], &none, fresh)) {
                handle_faults += fkv_handle_close(FKV_KIND_PLAN, fresh, &closed) != FKV_OK;
            }
        }
    }
    return NULL;
}

static void test_handles_threads(void **state) {
    (void)state;
    pthread_t threads[4];
    const uint32_t seeds[4] = {1, 2, 3, 4};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, use_handles, (void *)&seeds[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
    }
    assert_int_equal(handle_faults, 0);
    for (int i = 0; i < 8; i++) {
        void *closed;
        assert_non_null(shared_handles[i]);
        assert_int_equal(fkv_handle_close(FKV_KIND_PLAN, shared_handles[i], &closed), FKV_OK);
    }
}

/* ---- pool */

struct job {
    int threads;
    _Atomic int bad_thread;
    int64_t items;
    uint8_t done[1000];
    _Atomic uint8_t busy[8]; /* a scratch space must not be used twice at a time */
};

static void do_item(void *arg, int64_t item, int thread) {
    struct job *job = arg;
    if (thread < 0 || thread >= job->threads || atomic_fetch_add(&job->busy[thread & 7], 1) != 0) {
        job->bad_thread++;
    }
    job->bad_thread += fegetround() != FE_TONEAREST;
    job->done[item]++;
    atomic_fetch_sub(&job->busy[thread & 7], 1);
}

struct pool_user {
    struct fkv_pool *pool;
    int threads, faults;
};

static void *run_jobs(void *p) {
    struct pool_user *user = p;
    const int64_t sizes[] = {0, 1, 2, 3, 7, 8, 9, 100, 1000, -1};
    for (int round = 0; round < 300; round++) {
        struct job job = {.threads = user->threads, .items = sizes[round % 10]};
        fkv_pool_run(user->pool, job.items, do_item, &job);
        user->faults += job.bad_thread;
        for (int64_t i = 0; i < 1000; i++) {
            user->faults += job.done[i] != (i < job.items);
        }
        if (round % 100 == 99) {
            usleep(2000); /* long enough for the workers to go to sleep */
        }
    }
    return NULL;
}

static void test_pool(void **state) {
    (void)state;
    const int sizes[] = {1, 2, 3, 8};
    for (int s = 0; s < 4; s++) {
        struct fkv_heap heap = {0};
        struct fkv_pool *pool;
        assert_int_equal(fkv_pool_create(&heap, sizes[s], &pool), FKV_OK);
        struct pool_user users[3];
        pthread_t threads[3];
        for (int i = 0; i < 3; i++) {
            users[i] = (struct pool_user){pool, sizes[s], 0};
            assert_int_equal(pthread_create(&threads[i], NULL, run_jobs, &users[i]), 0);
        }
        for (int i = 0; i < 3; i++) {
            pthread_join(threads[i], NULL);
            assert_int_equal(users[i].faults, 0);
        }
        assert_int_equal(fesetround(FE_UPWARD), 0);
        run_jobs(&users[0]);
        assert_int_equal(fegetround(), FE_UPWARD);
        fesetround(FE_TONEAREST);
        assert_int_equal(users[0].faults, 0);
        fkv_pool_destroy(pool);
        assert_int_equal(heap.live, 0);
    }
    struct fkv_heap heap = {0};
    struct fkv_pool *pool;
    assert_int_equal(fkv_pool_create(&heap, 0, &pool), FKV_ERR_LIMIT);
    assert_int_equal(fkv_pool_create(&heap, 257, &pool), FKV_ERR_LIMIT);
    for (int i = 0; i < 50; i++) { /* ends before its workers have begun */
        assert_int_equal(fkv_pool_create(&heap, 4, &pool), FKV_OK);
        fkv_pool_destroy(pool);
    }
    fkv_pool_destroy(NULL);
}

static void test_pool_fork(void **state) {
    (void)state;
    struct fkv_heap heap = {0};
    struct fkv_pool *pool;
    assert_int_equal(fkv_pool_create(&heap, 3, &pool), FKV_OK);
    struct pool_user user = {pool, 3, 0};
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        alarm(20);
        user.threads = 1; /* all items run on the caller */
        run_jobs(&user);
        fkv_pool_destroy(pool);
        _exit(user.faults == 0 && heap.live == 0 ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    run_jobs(&user);
    assert_int_equal(user.faults, 0);
    fkv_pool_destroy(pool);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_handles),
        cmocka_unit_test(test_handles_threads),
        cmocka_unit_test(test_pool),
        cmocka_unit_test(test_pool_fork),
    };
    return cmocka_run_group_tests_name("pool", tests, NULL, NULL);
}
