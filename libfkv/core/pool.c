/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One word holds the state of the pool: number of the job, whether it is open, and how many workers are
 * in it. A worker enters by compare-exchange while the job is open; the caller, when no item is left,
 * closes it and waits only for those inside. So a worker that wakes late costs nobody anything, and
 * whatever describes the job is written only while nobody can be inside.
 *
 * Waiting starts with a short spin, because attention's jobs follow one another within microseconds.
 */
#define _GNU_SOURCE
#include "core/core.h"

#include <fenv.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#define INSIDE_MASK UINT64_C(0xffff)
#define OPEN UINT64_C(0x10000)
#define JOB UINT64_C(0x20000)
#define SPINS 2000

struct worker {
    struct fkv_pool *pool;
    pthread_t thread;
    int index;
};

struct fkv_pool {
    _Alignas(64) _Atomic uint64_t state;
    _Alignas(64) _Atomic int64_t next; /* item to hand out */
    /* the job */
    _Alignas(64) int64_t items;
    fkv_pool_fn fn;
    void *arg;
    /* the rest */
    struct fkv_heap *heap;
    pid_t pid;
    int threads; /* the caller's included */
    int started; /* of workers */
    int spins;
    _Atomic bool stop;
    _Atomic int sleeping;      /* workers that wait on `wake` or are about to */
    _Atomic bool caller_waits; /* on `done` */
    pthread_mutex_t run_lock;  /* held for a whole job */
    pthread_mutex_t lock;      /* for the conditions */
    pthread_cond_t wake;
    pthread_cond_t done;
    struct worker workers[];
};

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("" ::: "memory");
#endif
}

int fkv_online_processors(void) {
    cpu_set_t set;
    long n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                         : sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > FKV_MAX_THREADS ? FKV_MAX_THREADS : (int)n;
}

static void run_items(struct fkv_pool *pool, int thread) {
    for (;;) {
        int64_t item = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (item >= pool->items) {
            return;
        }
        pool->fn(pool->arg, item, thread);
    }
}

/* Whether `state` has an open job other than `seen`. */
static bool is_news(uint64_t state, uint64_t seen) {
    return (state & OPEN) != 0 && state / JOB != seen;
}

/* Blocks until there is a job to enter; false when the pool ends. */
static bool await_job(struct fkv_pool *pool, uint64_t seen) {
    for (int i = 0; i < pool->spins; i++) {
        if (is_news(atomic_load_explicit(&pool->state, memory_order_acquire), seen)) {
            return true;
        }
        relax();
    }
    /* Sequentially consistent on both sides: either this load sees the caller's job, or the caller sees
     * the count and takes the lock, which is free only once this thread really waits. */
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleeping, 1);
    while (!atomic_load(&pool->stop) && !is_news(atomic_load(&pool->state), seen)) {
        pthread_cond_wait(&pool->wake, &pool->lock);
    }
    atomic_fetch_sub(&pool->sleeping, 1);
    bool stop = atomic_load(&pool->stop);
    pthread_mutex_unlock(&pool->lock);
    return !stop;
}

static void leave_job(struct fkv_pool *pool) {
    uint64_t left = atomic_fetch_sub(&pool->state, 1) - 1;
    if ((left & (OPEN | INSIDE_MASK)) == 0 && atomic_load(&pool->caller_waits)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_signal(&pool->done);
        pthread_mutex_unlock(&pool->lock);
    }
}

static void *worker_main(void *p) {
    struct worker *worker = p;
    struct fkv_pool *pool = worker->pool;
    uint64_t seen = 0; /* jobs count from 1 */
    fesetenv(FE_DFL_ENV);
    while (await_job(pool, seen)) {
        uint64_t state = atomic_load_explicit(&pool->state, memory_order_relaxed);
        while (is_news(state, seen)) {
            uint64_t job = state / JOB;
            if (atomic_compare_exchange_weak_explicit(&pool->state, &state, state + 1,
                                                      memory_order_acquire, memory_order_relaxed)) {
                run_items(pool, worker->index);
                leave_job(pool);
                seen = job;
            }
        }
    }
    return NULL;
}

static void wake_workers(struct fkv_pool *pool, int64_t wanted) {
    if (atomic_load(&pool->sleeping) == 0) {
        return;
    }
    pthread_mutex_lock(&pool->lock);
    if (wanted >= pool->started) {
        pthread_cond_broadcast(&pool->wake);
    } else {
        for (int64_t i = 0; i < wanted; i++) {
            pthread_cond_signal(&pool->wake);
        }
    }
    pthread_mutex_unlock(&pool->lock);
}

/* Closes the job and waits for the workers that are inside. */
static void finish_job(struct fkv_pool *pool) {
    uint64_t state = atomic_fetch_and(&pool->state, ~OPEN) & ~OPEN;
    for (int i = 0; i < pool->spins && (state & INSIDE_MASK) != 0; i++) {
        relax();
        state = atomic_load_explicit(&pool->state, memory_order_acquire);
    }
    if ((state & INSIDE_MASK) == 0) {
        return;
    }
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->caller_waits, true);
    while ((atomic_load(&pool->state) & INSIDE_MASK) != 0) {
        pthread_cond_wait(&pool->done, &pool->lock);
    }
    atomic_store(&pool->caller_waits, false);
    pthread_mutex_unlock(&pool->lock);
}

/* fn must not run the pool that runs it. A job that is run inline takes no lock: what `thread` selects
 * belongs to the caller's job, not to the pool. */
void fkv_pool_run(struct fkv_pool *pool, int64_t items, fkv_pool_fn fn, void *arg) {
    /* the same bits whatever rounding mode or exception traps the host has set in this thread */
    fenv_t env;
    if (items <= 0) {
        return;
    }
    fegetenv(&env);
    fesetenv(FE_DFL_ENV);
    if (items == 1 || pool->started == 0 || getpid() != pool->pid) {
        for (int64_t i = 0; i < items; i++) {
            fn(arg, i, 0);
        }
    } else {
        pthread_mutex_lock(&pool->run_lock);
        pool->items = items;
        pool->fn = fn;
        pool->arg = arg;
        atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
        uint64_t state = atomic_load_explicit(&pool->state, memory_order_relaxed);
        atomic_store(&pool->state, (state + JOB) | OPEN);
        wake_workers(pool, items - 1);
        run_items(pool, 0);
        finish_job(pool);
        pthread_mutex_unlock(&pool->run_lock);
    }
    fesetenv(&env);
}

static size_t pool_size(int threads) {
    return sizeof(struct fkv_pool) + (size_t)threads * sizeof(struct worker);
}

/* Signals stay with the host's own threads. */
static bool start_workers(struct fkv_pool *pool) {
    sigset_t all, old;
    sigfillset(&all);
    if (pthread_sigmask(SIG_SETMASK, &all, &old) != 0) {
        return false;
    }
    while (pool->started < pool->threads - 1) {
        struct worker *w = &pool->workers[pool->started];
        w->pool = pool;
        w->index = pool->started + 1;
        if (pthread_create(&w->thread, NULL, worker_main, w) != 0) {
            break;
        }
        pool->started++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return pool->started == pool->threads - 1;
}

fkv_status fkv_pool_create(struct fkv_heap *heap, int threads, struct fkv_pool **out) {
    if (threads < 1 || threads > FKV_MAX_THREADS) {
        return FKV_ERR_LIMIT;
    }
    struct fkv_pool *pool = fkv_heap_calloc(heap, pool_size(threads));
    if (!pool) {
        return fkv_heap_status(heap, pool_size(threads));
    }
    pool->heap = heap;
    pool->pid = getpid();
    pool->threads = threads;
    /* with more threads than processors a spinning thread keeps a working one out */
    pool->spins = threads <= fkv_online_processors() ? SPINS : 0;
    pthread_mutex_init(&pool->run_lock, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    if (!start_workers(pool)) {
        fkv_pool_destroy(pool);
        return FKV_ERR_LIMIT;
    }
    *out = pool;
    return FKV_OK;
}

void fkv_pool_destroy(struct fkv_pool *pool) {
    if (!pool) {
        return;
    }
    if (getpid() == pool->pid) { /* a forked child has neither the threads nor usable locks */
        pthread_mutex_lock(&pool->lock);
        atomic_store(&pool->stop, true);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
        for (int i = 0; i < pool->started; i++) {
            pthread_join(pool->workers[i].thread, NULL);
        }
        pthread_cond_destroy(&pool->done);
        pthread_cond_destroy(&pool->wake);
        pthread_mutex_destroy(&pool->lock);
        pthread_mutex_destroy(&pool->run_lock);
    }
    fkv_heap_free(pool->heap, pool, pool_size(pool->threads));
}
