/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What may go wrong around a device: memory that ends in the middle of a step, pointers and streams of other places,
 * two streams, and steps of other shapes than the captured one. Whatever failed is repeated, and everything is compared
 * bit for bit with a cache to which nothing happened. Skipped without a device.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "fkv/fkv.h"

#include "../../examples/bench/gpu.h"
#include "random.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 2, HQ = 8, HK = 2, DIM = 64, MOST = 1200, SEQUENCES = 4, GUARD = 256 };

static const char *module_path, *fault_path;
static void (*fault_after)(int);
static int (*fault_count)(void);

/* Device memory of a step's tensors, with guards around the outputs; one for both layers. */
struct tensors {
    char *q, *k, *v, *out;
    int64_t tokens;
};

struct world {
    bool coded;
    void *stream;
    fkv_context *ctx;
    fkv_profile *profile;
    fkv_cache *cache;
    fkv_plan *plan;
    fkv_sequence ids[SEQUENCES];
    struct tensors t[LAYERS];
    struct random random;
};

#define OK(w, call) check((w)->ctx, (call), #call)
static void check(fkv_context *ctx, fkv_status status, const char *what) {
    if (status != FKV_OK) {
        char text[512] = "";
        fkv_context_message(ctx, text, sizeof text, NULL);
        fail_msg("%s: %s: %s", what, fkv_status_string(status), text);
    }
}

static void params_for(fkv_context_params *p, const char *module, void *stream) {
    fkv_context_params_init(p, sizeof *p);
    p->backend = FKV_BACKEND_CUDA;
    p->module_path = module;
    p->stream = stream;
}

static void make_profile(struct world *w) {
    static const uint8_t some[] = {0, 2, 4, 0, 3, 2, 8, 0, 2, 0};
    enum { N = LAYERS * HK * DIM };
    uint8_t bits[2][N];
    float carriers[2][N];
    double inv_freq[DIM / 2];
    fkv_model_params m;
    for (int j = 0; j < DIM / 2; j++) {
        inv_freq[j] = pow(10000.0, -2.0 * j / DIM);
    }
    fkv_model_params_init(&m, sizeof m);
    m.n_layers = LAYERS;
    m.n_q_heads = HQ;
    m.n_kv_heads = HK;
    m.head_dim = DIM;
    m.rope_dim = DIM;
    m.rope_layout = FKV_ROPE_HALF_SPLIT;
    m.inv_freq = inv_freq;
    m.inv_freq_count = DIM / 2;
    if (!w->coded) {
        OK(w, fkv_profile_create_exact(w->ctx, &m, FKV_DTYPE_F16, &w->profile));
        return;
    }
    fkv_codec_params c;
    fkv_codec_params_init(&c, sizeof c);
    c.storage_dtype = FKV_DTYPE_F16;
    c.group = 64;
    c.block = 128;
    c.n_sink = 4;
    c.n_local = 64;
    for (int part = 0; part < 2; part++) {
        for (int i = 0; i < N; i++) {
            bits[part][i] = some[random_int(&w->random, 0, 9)];
            carriers[part][i] = (float)(3.0 * random_uniform(&w->random) - 1.5);
        }
    }
    OK(w, fkv_profile_create_coded(w->ctx, &m, &c, bits[0], bits[1], N, carriers[0], carriers[1], N,
                                   &w->profile));
}

static void open_world(struct world *w, bool coded, const char *module, void *stream) {
    fkv_context_params p;
    char message[512] = "";
    memset(w, 0, sizeof *w);
    w->coded = coded;
    w->stream = stream;
    random_init(&w->random, 11);
    params_for(&p, module, stream);
    p.message = message;
    p.message_bytes = sizeof message;
    if (fkv_context_create(&p, &w->ctx) != FKV_OK) {
        fail_msg("%s", message);
    }
    make_profile(w);
    OK(w, fkv_cache_create(w->ctx, w->profile, NULL, &w->cache));
    OK(w, fkv_plan_create(w->cache, &w->plan));
    for (int i = 0; i < SEQUENCES; i++) {
        OK(w, fkv_sequence_create(w->cache, NULL, &w->ids[i]));
    }
    for (int l = 0; l < LAYERS; l++) {
        w->t[l].q = gpu_alloc((size_t)MOST * HQ * DIM * 4);
        w->t[l].k = gpu_alloc((size_t)MOST * HK * DIM * 4);
        w->t[l].v = gpu_alloc((size_t)MOST * HK * DIM * 4);
        w->t[l].out = gpu_alloc((size_t)MOST * HQ * DIM * 4 + 2 * GUARD);
    }
}

static void close_world(struct world *w) {
    OK(w, fkv_plan_destroy(w->plan));
    OK(w, fkv_cache_destroy(w->cache));
    OK(w, fkv_profile_destroy(w->profile));
    assert_int_equal(fkv_context_destroy(w->ctx), FKV_OK);
    for (int l = 0; l < LAYERS; l++) {
        gpu_free(w->t[l].q);
        gpu_free(w->t[l].k);
        gpu_free(w->t[l].v);
        gpu_free(w->t[l].out);
    }
}

/* The same numbers in every world that has drawn as often; outputs are NaN before. */
static void fill(struct world *w, int64_t tokens) {
    const size_t n = (size_t)tokens * HQ * DIM;
    float *x = malloc(n * sizeof *x);
    for (int l = 0; l < LAYERS; l++) {
        char *to[3] = {w->t[l].q, w->t[l].k, w->t[l].v};
        for (int i = 0; i < 3; i++) {
            const size_t count = i ? n / HQ * HK : n;
            for (size_t j = 0; j < count; j++) {
                x[j] = (float)(2.0 * random_uniform(&w->random) - 1.0);
            }
            gpu_to_device(to[i], x, count * sizeof *x);
        }
        gpu_fill(w->t[l].out, 0xff, (size_t)MOST * HQ * DIM * 4 + 2 * GUARD);
        w->t[l].tokens = tokens;
    }
    free(x);
}

static fkv_tensor tensor(char *data, int64_t tokens, int heads) {
    const int64_t shape[3] = {tokens, heads, DIM};
    fkv_tensor t;
    fkv_tensor_init(&t, data, FKV_DTYPE_F32, 3, shape);
    t.device = FKV_DEVICE_CUDA;
    return t;
}

static fkv_status update(struct world *w, const fkv_sequence *ids, const int64_t *n_new, int count,
                         const int64_t *positions) {
    fkv_batch batch;
    fkv_batch_init(&batch, sizeof batch);
    batch.count = count;
    batch.sequences = ids;
    batch.n_new = n_new;
    batch.positions = positions;
    for (int i = 0; positions && i < count; i++) {
        batch.positions_count += n_new[i];
    }
    return fkv_plan_update(w->plan, &batch);
}

static fkv_status run_layer(struct world *w, int l) {
    const struct tensors *t = &w->t[l];
    const fkv_tensor q = tensor(t->q, t->tokens, HQ), k = tensor(t->k, t->tokens, HK);
    const fkv_tensor v = tensor(t->v, t->tokens, HK), out = tensor(t->out + GUARD, t->tokens, HQ);
    return fkv_append_attend(w->plan, l, &q, &k, &v, &out, NULL);
}

static int64_t sum_of(const int64_t *n_new, int count) {
    int64_t sum = 0;
    for (int i = 0; i < count; i++) {
        sum += n_new[i];
    }
    return sum;
}

static void step(struct world *w, const fkv_sequence *ids, const int64_t *n_new, int count) {
    OK(w, update(w, ids, n_new, count, NULL));
    fill(w, sum_of(n_new, count));
    for (int l = 0; l < LAYERS; l++) {
        OK(w, run_layer(w, l));
    }
}

/* Outputs of the last step, bit for bit, and guards. */
static void expect_same(const struct world *a, const struct world *b, const char *what) {
    const size_t bytes = (size_t)MOST * HQ * DIM * 4 + 2 * GUARD;
    char *x = malloc(bytes), *y = malloc(bytes);
    for (int l = 0; l < LAYERS; l++) {
        const size_t used = (size_t)a->t[l].tokens * HQ * DIM * 4;
        gpu_to_host(x, a->t[l].out, bytes);
        gpu_to_host(y, b->t[l].out, bytes);
        for (size_t i = 0; i < bytes; i++) {
            if (x[i] != y[i]) {
                fail_msg("%s: layer %d: byte %zu of the outputs differs", what, l, i);
            }
            if ((i < GUARD || i >= GUARD + used) && (unsigned char)x[i] != 0xff) {
                fail_msg("%s: layer %d: byte %zu beside the outputs was written to", what, l, i);
            }
        }
        for (size_t i = 0; i < used / 4; i++) {
            float f;
            memcpy(&f, x + GUARD + 4 * i, 4);
            assert_true(isfinite(f));
        }
    }
    free(x);
    free(y);
}

static void expect_same_stats(struct world *a, struct world *b) {
    fkv_stats x = {.struct_size = sizeof x}, y = x;
    OK(a, fkv_cache_stats(a->cache, FKV_ALL_SEQUENCES, &x));
    OK(b, fkv_cache_stats(b->cache, FKV_ALL_SEQUENCES, &y));
    assert_int_equal(x.bytes_exact, y.bytes_exact);
    assert_int_equal(x.bytes_blocks, y.bytes_blocks);
    assert_int_equal(x.bytes_scales, y.bytes_scales);
    assert_int_equal(x.tokens_coded, y.tokens_coded);
}

/* ---- memory that ends */

/* Runs a call of which memory may be refused, then again when there is some. Returns how often it was refused. */
#define REPEATED(w, call)                                                                          \
    do {                                                                                           \
        fkv_status status_ = (call);                                                               \
        if (status_ != FKV_OK) {                                                                   \
            assert_int_equal(status_, FKV_ERR_NOMEM);                                              \
            assert_true(fault_count() > 0);                                                        \
            refusals++;                                                                            \
            for (int i_ = 0; i_ < SEQUENCES; i_++) {                                               \
                int64_t now_;                                                                      \
                OK((w), fkv_sequence_length((w)->cache, (w)->ids[i_], &now_));                     \
                assert_int_equal(now_, lengths[i_]);                                               \
            }                                                                                      \
            fault_after(-1);                                                                       \
            OK((w), (call));                                                                       \
        }                                                                                          \
    } while (0)

/* Memory ends at the n-th request of a step, for every n. */
static void end_memory(bool coded, const int64_t *n_new, int count) {
    static const int64_t before[] = {500, 70, 300, 130};
    int refusals = 0, last = -1;
    for (int n = 0; refusals != last; n++) {
        struct world w, twin;
        int64_t lengths[SEQUENCES];
        last = refusals;
        fault_after(-1);
        open_world(&w, coded, fault_path, NULL);
        open_world(&twin, coded, module_path, NULL);
        step(&w, w.ids, before, SEQUENCES);
        step(&twin, twin.ids, before, SEQUENCES);
        memcpy(lengths, before, sizeof lengths);
        fault_after(n);
        REPEATED(&w, update(&w, w.ids, n_new, count, NULL));
        fill(&w, sum_of(n_new, count));
        REPEATED(&w, run_layer(&w, 0));
        /* a layer ahead of the others: lengths are those of layer 0 */
        for (int i = 0; i < count; i++) {
            OK(&w, fkv_sequence_length(w.cache, w.ids[i], &lengths[i]));
        }
        REPEATED(&w, run_layer(&w, 1));
        fault_after(-1);
        step(&twin, twin.ids, n_new, count);
        expect_same(&w, &twin, "after a refusal");
        static const int64_t one[] = {1, 1, 1, 1};
        step(&w, w.ids, one, SEQUENCES);
        step(&twin, twin.ids, one, SEQUENCES);
        expect_same(&w, &twin, "a step later");
        expect_same_stats(&w, &twin);
        close_world(&w);
        close_world(&twin);
        assert_true(n < 200);
    }
    print_message("%s, %lld tokens: %d refusals\n", coded ? "coded" : "exact",
                  (long long)sum_of(n_new, count), refusals);
    assert_true(refusals > 0);
}

static void test_no_memory(void **state) {
    (void)state;
    static const int64_t longer[] = {700, 100, 3, 200}, shorter[] = {3, 60, 1, 64};
    for (int coded = 0; coded < 2; coded++) {
        end_memory(coded, longer, SEQUENCES);
        end_memory(coded, shorter, SEQUENCES);
    }
}

/* The same behind replays of a graph: coding finds no memory, and finds it when the call is repeated. */
static void test_no_memory_replayed(void **state) {
    (void)state;
    struct world w, twin;
    void *stream = gpu_stream_new(), *graph;
    /* nothing is coded yet, so that the first block needs memory */
    static const int64_t before[] = {150, 70, 120, 5}, one[] = {1, 1, 1, 1};
    int refusals = 0;
    fault_after(-1);
    open_world(&w, true, fault_path, stream);
    open_world(&twin, true, module_path, NULL);
    step(&w, w.ids, before, SEQUENCES);
    step(&twin, twin.ids, before, SEQUENCES);
    OK(&w, update(&w, w.ids, one, SEQUENCES, NULL));
    fill(&w, SEQUENCES);
    gpu_capture_begin(stream);
    for (int l = 0; l < LAYERS; l++) {
        OK(&w, run_layer(&w, l));
    }
    graph = gpu_capture_end(stream);
    for (int i = 0; i < 300; i++) {
        int64_t lengths[SEQUENCES];
        for (int j = 0; j < SEQUENCES; j++) {
            lengths[j] = before[j] + i;
        }
        if (i) {
            OK(&w, update(&w, w.ids, one, SEQUENCES, NULL));
            fill(&w, SEQUENCES);
        }
        gpu_graph_launch(graph, stream);
        fault_after(0);
        REPEATED(&w, fkv_plan_replayed(w.plan));
        fault_after(-1);
        step(&twin, twin.ids, one, SEQUENCES);
        expect_same(&w, &twin, "replay");
    }
    expect_same_stats(&w, &twin);
    print_message("%d refusals\n", refusals);
    assert_true(refusals > 0);
    gpu_graph_free(graph);
    close_world(&w);
    close_world(&twin);
    gpu_stream_free(stream);
}

/* ---- streams */

/* Two caches on two streams, their calls in turns, nothing waited for in between. */
static void test_two_streams(void **state) {
    (void)state;
    void *streams[2] = {gpu_stream_new(), gpu_stream_new()};
    struct world w[2], alone;
    static const int64_t n_new[][SEQUENCES] = {
        {900, 1, 200, 99}, {1, 1, 1, 1}, {3, 0, 64, 1}, {1, 300, 1, 1}, {1, 1, 1, 1}};
    for (int coded = 0; coded < 2; coded++) {
        for (int i = 0; i < 2; i++) {
            open_world(&w[i], coded, module_path, streams[i]);
        }
        open_world(&alone, coded, module_path, NULL);
        for (size_t s = 0; s < sizeof n_new / sizeof n_new[0]; s++) {
            for (int i = 0; i < 2; i++) {
                fill(&w[i], sum_of(n_new[s], SEQUENCES));
            }
            for (int i = 0; i < 2; i++) {
                OK(&w[i], update(&w[i], w[i].ids, n_new[s], SEQUENCES, NULL));
            }
            for (int l = 0; l < LAYERS; l++) {
                for (int i = 0; i < 2; i++) {
                    OK(&w[i], run_layer(&w[i], l));
                }
            }
            step(&alone, alone.ids, n_new[s], SEQUENCES);
            expect_same(&w[0], &alone, "first stream");
            expect_same(&w[1], &alone, "second stream");
        }
        close_world(&w[0]);
        close_world(&w[1]);
        close_world(&alone);
    }
    gpu_stream_free(streams[0]);
    gpu_stream_free(streams[1]);
}

/* A context goes over to another stream between steps. */
static void test_change_stream(void **state) {
    (void)state;
    void *streams[2] = {gpu_stream_new(), gpu_stream_new()};
    struct world w, alone;
    static const int64_t n_new[] = {300, 1, 64, 5};
    open_world(&w, true, module_path, streams[0]);
    open_world(&alone, true, module_path, NULL);
    for (int i = 0; i < 4; i++) {
        step(&w, w.ids, n_new, SEQUENCES);
        OK(&w, fkv_context_set_stream(w.ctx, streams[(i + 1) % 2]));
        step(&alone, alone.ids, n_new, SEQUENCES);
        expect_same(&w, &alone, "stream changed");
    }
    OK(&w, fkv_context_set_stream(w.ctx, NULL));
    close_world(&w);
    close_world(&alone);
    gpu_stream_free(streams[0]);
    gpu_stream_free(streams[1]);
}

/* ---- pointers */

static void expect_invalid(struct world *w, int which, const fkv_tensor *bad) {
    const struct tensors *t = &w->t[0];
    fkv_tensor x[4] = {tensor(t->q, t->tokens, HQ), tensor(t->k, t->tokens, HK),
                       tensor(t->v, t->tokens, HK), tensor(t->out + GUARD, t->tokens, HQ)};
    x[which] = *bad;
    assert_int_equal(fkv_append_attend(w->plan, 0, &x[0], &x[1], &x[2], &x[3], NULL),
                     FKV_ERR_INVALID);
}

/* A host pointer as the device's, tensors that say they are elsewhere, and a device's tensor given to the CPU. */
static void test_pointers(void **state) {
    (void)state;
    struct world w, twin;
    static const int64_t n_new[] = {100, 7, 64, 1};
    char *host = calloc((size_t)MOST * HQ * DIM, 4);
    open_world(&w, true, module_path, NULL);
    open_world(&twin, true, module_path, NULL);
    OK(&w, update(&w, w.ids, n_new, SEQUENCES, NULL));
    fill(&w, sum_of(n_new, SEQUENCES));
    for (int which = 0; which < 4; which++) {
        const int heads = which == 1 || which == 2 ? HK : HQ;
        fkv_tensor bad = tensor(host, w.t[0].tokens, heads);
        expect_invalid(&w, which, &bad);
        bad = tensor(w.t[0].q, w.t[0].tokens, heads);
        bad.device = FKV_DEVICE_CPU;
        expect_invalid(&w, which, &bad);
        bad.device = FKV_DEVICE_CUDA;
        bad.device_id = 1;
        expect_invalid(&w, which, &bad);
    }
    int64_t length;
    OK(&w, fkv_sequence_length(w.cache, w.ids[0], &length));
    assert_int_equal(length, 0);
    for (int l = 0; l < LAYERS; l++) {
        OK(&w, run_layer(&w, l));
    }
    step(&twin, twin.ids, n_new, SEQUENCES);
    expect_same(&w, &twin, "behind refused pointers");
    fkv_tensor to = tensor(host, 100, HK);
    assert_int_equal(fkv_sequence_read(w.cache, w.ids[0], 0, 0, 100, &to, NULL), FKV_ERR_INVALID);
    fkv_context_params p;
    fkv_context *cpu;
    fkv_context_params_init(&p, sizeof p);
    assert_int_equal(fkv_context_create(&p, &cpu), FKV_OK);
    struct world c = {.coded = false, .ctx = cpu};
    random_init(&c.random, 11);
    make_profile(&c);
    OK(&c, fkv_cache_create(cpu, c.profile, NULL, &c.cache));
    OK(&c, fkv_plan_create(c.cache, &c.plan));
    OK(&c, fkv_sequence_create(c.cache, NULL, &c.ids[0]));
    OK(&c, update(&c, c.ids, n_new, 1, NULL));
    const fkv_tensor k = tensor(w.t[0].k, 100, HK), v = tensor(w.t[0].v, 100, HK);
    assert_int_equal(fkv_append(c.plan, 0, &k, &v), FKV_ERR_UNSUPPORTED);
    fkv_plan_destroy(c.plan);
    fkv_cache_destroy(c.cache);
    fkv_profile_destroy(c.profile);
    fkv_context_destroy(cpu);
    close_world(&w);
    close_world(&twin);
    free(host);
}

/* A second device's stream and memory are refused by the first's context; a context of the second works while the
 * first is current. */
static void test_other_device(void **state) {
    (void)state;
    const char *why;
    fkv_context_params p;
    fkv_context *ctx;
    if (!gpu_open(1, &why)) {
        assert_true(gpu_open(0, &why));
        params_for(&p, module_path, NULL);
        p.device_id = 1;
        assert_int_equal(fkv_context_create(&p, &ctx), FKV_ERR_DEVICE);
        print_message("one device only: what needs two was skipped\n");
        return;
    }
    void *stream = gpu_stream_new();
    char *memory = gpu_alloc((size_t)MOST * HQ * DIM * 4);
    assert_true(gpu_open(0, &why));
    params_for(&p, module_path, stream);
    assert_int_equal(fkv_context_create(&p, &ctx), FKV_ERR_INVALID);
    struct world w, twin;
    static const int64_t n_new[] = {100, 7, 64, 1};
    open_world(&w, true, module_path, NULL);
    open_world(&twin, true, module_path, NULL);
    assert_int_equal(fkv_context_set_stream(w.ctx, stream), FKV_ERR_INVALID);
    OK(&w, update(&w, w.ids, n_new, SEQUENCES, NULL));
    fill(&w, sum_of(n_new, SEQUENCES));
    for (int which = 0; which < 4; which++) {
        const fkv_tensor bad = tensor(memory, w.t[0].tokens, which == 1 || which == 2 ? HK : HQ);
        expect_invalid(&w, which, &bad);
    }
    for (int l = 0; l < LAYERS; l++) {
        OK(&w, run_layer(&w, l));
    }
    step(&twin, twin.ids, n_new, SEQUENCES);
    expect_same(&w, &twin, "behind another device's pointers");
    p.device_id = 1;
    assert_int_equal(fkv_context_create(&p, &ctx), FKV_OK);
    assert_int_equal(fkv_context_synchronize(ctx), FKV_OK);
    step(&w, w.ids, n_new, SEQUENCES); /* allocates on the first device, which is still current */
    step(&twin, twin.ids, n_new, SEQUENCES);
    expect_same(&w, &twin, "beside a context of another device");
    assert_int_equal(fkv_context_destroy(ctx), FKV_OK);
    close_world(&w);
    close_world(&twin);
    assert_true(gpu_open(1, &why));
    gpu_stream_free(stream);
    gpu_free(memory);
    assert_true(gpu_open(0, &why));
}

/* ---- steps of other shapes */

/* A graph captured with the largest step is replayed with fewer sequences, in another order, with other counts. */
static void test_ragged_replays(void **state) {
    (void)state;
    static const struct {
        int count, order[SEQUENCES];
        int64_t n_new[SEQUENCES];
    } steps[] = {{4, {0, 1, 2, 3}, {4, 4, 4, 4}},
                 {4, {0, 1, 2, 3}, {1, 1, 1, 1}},
                 {2, {3, 1}, {1, 3}},
                 {1, {2}, {1}},
                 {3, {2, 0, 1}, {0, 4, 1}},
                 {4, {3, 2, 1, 0}, {2, 1, 4, 3}},
                 {1, {0}, {4}},
                 {4, {1, 0, 3, 2}, {1, 1, 1, 1}}};
    static const int64_t before[] = {250, 70, 300, 5};
    for (int coded = 0; coded < 2; coded++) {
        struct world w, twin;
        void *stream = gpu_stream_new(), *graph = NULL;
        open_world(&w, coded, module_path, stream);
        open_world(&twin, coded, module_path, NULL);
        step(&w, w.ids, before, SEQUENCES);
        step(&twin, twin.ids, before, SEQUENCES);
        for (int i = 0; i < 80; i++) {
            const size_t s = i % (sizeof steps / sizeof steps[0]);
            fkv_sequence a[SEQUENCES], b[SEQUENCES];
            for (int j = 0; j < steps[s].count; j++) {
                a[j] = w.ids[steps[s].order[j]];
                b[j] = twin.ids[steps[s].order[j]];
            }
            OK(&w, update(&w, a, steps[s].n_new, steps[s].count, NULL));
            fill(&w, sum_of(steps[s].n_new, steps[s].count));
            if (!graph) {
                gpu_capture_begin(stream);
                for (int l = 0; l < LAYERS; l++) {
                    OK(&w, run_layer(&w, l));
                }
                graph = gpu_capture_end(stream);
            }
            gpu_graph_launch(graph, stream);
            OK(&w, fkv_plan_replayed(w.plan));
            step(&twin, b, steps[s].n_new, steps[s].count);
            expect_same(&w, &twin, "ragged replay");
        }
        expect_same_stats(&w, &twin);
        gpu_graph_free(graph);
        close_world(&w);
        close_world(&twin);
        gpu_stream_free(stream);
    }
}

/* Positions that are not the indices: keys are turned by them, as on the CPU bit for bit. Coded caches refuse them. */
static void test_positions(void **state) {
    (void)state;
    enum { N = 90 };
    struct world w;
    fkv_context_params p;
    fkv_context *cpu;
    int64_t positions[N];
    static const int64_t n_new[] = {N};
    for (int i = 0; i < N; i++) {
        positions[i] = i < 50 ? 3 * i : 100000 + 7 * i;
    }
    open_world(&w, true, module_path, NULL);
    assert_int_equal(update(&w, w.ids, n_new, 1, positions), FKV_ERR_UNSUPPORTED);
    close_world(&w);
    open_world(&w, false, module_path, NULL);
    OK(&w, update(&w, w.ids, n_new, 1, positions));
    fill(&w, N);
    OK(&w, run_layer(&w, 0));
    fkv_context_params_init(&p, sizeof p);
    assert_int_equal(fkv_context_create(&p, &cpu), FKV_OK);
    struct world c = {.coded = false, .ctx = cpu};
    random_init(&c.random, 11);
    make_profile(&c);
    OK(&c, fkv_cache_create(cpu, c.profile, NULL, &c.cache));
    OK(&c, fkv_plan_create(c.cache, &c.plan));
    OK(&c, fkv_sequence_create(c.cache, NULL, &c.ids[0]));
    OK(&c, update(&c, c.ids, n_new, 1, positions));
    float *host[5];
    const int heads[4] = {HQ, HK, HK, HQ};
    char *device[3] = {w.t[0].q, w.t[0].k, w.t[0].v};
    fkv_tensor t[4];
    for (int i = 0; i < 4; i++) {
        const size_t bytes = (size_t)N * heads[i] * DIM * 4;
        host[i] = calloc(1, bytes);
        t[i] = tensor((char *)host[i], N, heads[i]);
        t[i].device = FKV_DEVICE_CPU;
        if (i < 3) {
            gpu_to_host(host[i], device[i], bytes);
        }
    }
    OK(&c, fkv_append_attend(c.plan, 0, &t[0], &t[1], &t[2], &t[3], NULL));
    const size_t bytes = (size_t)N * HK * DIM * 4, outputs = (size_t)N * HQ * DIM;
    fkv_tensor keys = tensor(gpu_alloc(bytes), N, HK);
    OK(&w, fkv_sequence_read(w.cache, w.ids[0], 0, 0, N, &keys, NULL));
    host[4] = malloc(bytes);
    gpu_to_host(host[4], keys.data, bytes);
    gpu_free(keys.data);
    OK(&c, fkv_sequence_read(c.cache, c.ids[0], 0, 0, N, &t[1], NULL));
    assert_memory_equal(host[4], host[1], bytes);
    float *out = malloc(outputs * 4);
    gpu_to_host(out, w.t[0].out + GUARD, outputs * 4);
    for (size_t i = 0; i < outputs; i++) {
        assert_true(fabsf(out[i] - host[3][i]) <= 2e-5f);
    }
    free(out);
    for (int i = 0; i < 5; i++) {
        free(host[i]);
    }
    fkv_plan_destroy(c.plan);
    fkv_cache_destroy(c.cache);
    fkv_profile_destroy(c.profile);
    fkv_context_destroy(cpu);
    close_world(&w);
}

int main(int argc, char **argv) {
    const char *why;
    module_path = argc > 1 ? argv[1] : NULL;
    fault_path = argc > 2 ? argv[2] : NULL;
    if (!fault_path || !gpu_open(0, &why)) {
        printf("skipped: %s\n", fault_path ? why : "the module was not built");
        return 77;
    }
    setenv("FKV_REAL_MODULE", module_path, 1);
    void *fault = dlopen(fault_path, RTLD_NOW | RTLD_LOCAL);
    if (!fault) {
        printf("%s\n", dlerror());
        return 1;
    }
    void *symbol = dlsym(fault, "fault_after");
    memcpy(&fault_after, &symbol, sizeof symbol);
    symbol = dlsym(fault, "fault_count");
    memcpy(&fault_count, &symbol, sizeof symbol);
    printf("%s, driver %d\n", gpu_name(), gpu_driver_version());
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_memory),      cmocka_unit_test(test_no_memory_replayed),
        cmocka_unit_test(test_two_streams),    cmocka_unit_test(test_change_stream),
        cmocka_unit_test(test_pointers),       cmocka_unit_test(test_other_device),
        cmocka_unit_test(test_ragged_replays), cmocka_unit_test(test_positions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
