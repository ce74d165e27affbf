/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Caches on a CUDA device against float64 over what they hold, and what they hold against the CPU: exact tokens bit
 * for bit, codes by the reference quantiser. Skipped without a device.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "fkv/fkv.h"

#include "../../examples/bench/gpu.h"
#include "kernels/kernels.h"
#include "oracle.h"
#include "random.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GUARD 256

static const char *module_path;
static void *stream;

/* ---- a case: model, profile, caches on both sides */

struct config {
    const char *name;
    int layers, hq, hk, dim, rope_dim;
    fkv_rope_layout layout;
    fkv_dtype storage, in, out;
    int bits; /* FOURIER; -1: exact profile; 99: mixed; else uniform */
    int group, block, n_sink, n_local;
    double theta;
};

#define FOURIER -2
/* What `group` of such a case stands for. */
static const struct {
    int bins;
    int64_t period;
    double share; /* of channels that are coded */
    fkv_dtype coefficients;
} fouriers[] = {
    {32, 2048, 0.765, FKV_DTYPE_F16}, {24, 500, 0.6, FKV_DTYPE_F32},
    {97, 192, 1.0, FKV_DTYPE_F16},    {16, 4096, 0.5, FKV_DTYPE_F16},
    {64, 2000, 0.8, FKV_DTYPE_F16},   {32, 1024, -1.0, FKV_DTYPE_F16},
};

struct world {
    const struct config *c;
    fkv_model_params model;
    double inv_freq[128];
    float *carriers[2];
    uint8_t *bits[2];
    fkv_context *ctx;
    fkv_profile *profile;
    fkv_cache *cache;
    fkv_plan *plan;
    struct random random;
};

static fkv_context *open_context(fkv_backend backend) {
    fkv_context_params p;
    fkv_context *ctx;
    char message[512] = "";
    fkv_context_params_init(&p, sizeof p);
    p.backend = backend;
    if (backend == FKV_BACKEND_CPU) {
        p.cpu_level =
            FKV_CPU_REFERENCE; /* vector levels subtract carriers with one rounding less */
    }
    p.message = message;
    p.message_bytes = sizeof message;
    if (backend == FKV_BACKEND_CUDA) {
        p.module_path = module_path;
        p.stream = stream;
    }
    if (fkv_context_create(&p, &ctx) != FKV_OK) {
        fail_msg("%s", message);
    }
    return ctx;
}

#define OK(w, call) check((w)->ctx, (call), #call)
static void check(fkv_context *ctx, fkv_status status, const char *what) {
    if (status != FKV_OK) {
        char text[512] = "";
        fkv_context_message(ctx, text, sizeof text, NULL);
        fail_msg("%s: %s: %s", what, fkv_status_string(status), text);
    }
}

static void make_channels(struct world *w) {
    const struct config *c = w->c;
    static const uint8_t some[] = {0, 2, 4, 0, 3, 2, 8, 0, 2, 0};
    const size_t n = (size_t)(c->layers * c->hk * c->dim);
    for (int part = 0; part < 2; part++) {
        w->bits[part] = malloc(n);
        w->carriers[part] = malloc(n * sizeof(float));
        for (size_t i = 0; i < n; i++) {
            w->bits[part][i] =
                (uint8_t)(c->bits == 99 ? some[random_int(&w->random, 0, 9)] : c->bits);
            w->carriers[part][i] = (float)(3.0 * random_uniform(&w->random) - 1.5);
        }
    }
}

/* A share of the channels, more in some heads; the first head of each layer keeps all of its keys. */
static void make_fourier(struct world *w, fkv_fourier_params *f) {
    const struct config *c = w->c;
    const size_t n = (size_t)(c->layers * c->hk * c->dim);
    fkv_fourier_params_init(f, sizeof *f);
    f->storage_dtype = c->storage;
    f->coefficient_dtype = fouriers[c->group].coefficients;
    f->bins = fouriers[c->group].bins;
    f->period = fouriers[c->group].period;
    f->n_sink = c->n_sink;
    f->n_local = c->n_local;
    f->min_middle = 64;
    for (int part = 0; part < 2; part++) {
        w->bits[part] = malloc(n);
        for (size_t i = 0; i < n; i++) {
            const size_t head = i / (size_t)c->dim % (size_t)c->hk;
            const double tilt = 0.2 * sin((double)(i / (size_t)c->dim) * 2.3);
            const double all = fouriers[c->group].share;
            const double share = all == 1.0 ? 1.0 : !head && !part && c->hk > 1 ? 0.0 : all + tilt;
            w->bits[part][i] = random_uniform(&w->random) < share;
        }
    }
}

static void open_world(struct world *w, const struct config *c, uint64_t seed) {
    memset(w, 0, sizeof *w);
    w->c = c;
    random_init(&w->random, seed);
    fkv_model_params_init(&w->model, sizeof w->model);
    w->model.n_layers = c->layers;
    w->model.n_q_heads = c->hq;
    w->model.n_kv_heads = c->hk;
    w->model.head_dim = c->dim;
    w->model.rope_layout = c->layout;
    w->model.rope_dim = c->rope_dim;
    w->model.inv_freq_count = c->rope_dim / 2;
    w->model.inv_freq = c->rope_dim ? w->inv_freq : NULL;
    for (int j = 0; j < c->rope_dim / 2; j++) {
        w->inv_freq[j] = pow(c->theta, -2.0 * j / c->rope_dim);
    }
    w->ctx = open_context(FKV_BACKEND_CUDA);
    if (c->bits == -1) {
        OK(w, fkv_profile_create_exact(w->ctx, &w->model, c->storage, &w->profile));
    } else if (c->bits == FOURIER) {
        fkv_fourier_params f;
        make_fourier(w, &f);
        OK(w, fkv_profile_create_fourier(w->ctx, &w->model, &f, w->bits[0], w->bits[1],
                                         (size_t)(c->layers * c->hk * c->dim), &w->profile));
    } else {
        fkv_codec_params codec;
        make_channels(w);
        fkv_codec_params_init(&codec, sizeof codec);
        codec.storage_dtype = c->storage;
        codec.group = c->group;
        codec.block = c->block;
        codec.n_sink = c->n_sink;
        codec.n_local = c->n_local;
        const size_t n = (size_t)(c->layers * c->hk * c->dim);
        OK(w, fkv_profile_create_coded(w->ctx, &w->model, &codec, w->bits[0], w->bits[1], n,
                                       w->carriers[0], w->carriers[1], n, &w->profile));
    }
    OK(w, fkv_cache_create(w->ctx, w->profile, NULL, &w->cache));
    OK(w, fkv_plan_create(w->cache, &w->plan));
}

static void close_world(struct world *w) {
    OK(w, fkv_plan_destroy(w->plan));
    OK(w, fkv_cache_destroy(w->cache));
    OK(w, fkv_profile_destroy(w->profile));
    assert_int_equal(fkv_context_destroy(w->ctx), FKV_OK);
    for (int part = 0; part < 2; part++) {
        free(w->bits[part]);
        free(w->carriers[part]);
    }
}

/* ---- device tensors between guards, filled with NaN */

struct array {
    char *device, *host;
    size_t bytes;
    fkv_tensor t;
};

static struct array new_array(fkv_dtype dtype, int64_t tokens, int heads, int dim) {
    struct array a;
    const int64_t shape[3] = {tokens, heads, dim};
    a.bytes = (size_t)(tokens * heads * (dim ? dim : 1)) * oracle_element_size(dtype);
    a.device = gpu_alloc(a.bytes + 2 * GUARD);
    a.host = calloc(a.bytes + 2 * GUARD, 1);
    assert_int_equal(fkv_tensor_init(&a.t, a.device + GUARD, dtype, dim ? 3 : 2, shape), FKV_OK);
    a.t.device = FKV_DEVICE_CUDA;
    return a;
}

static void free_array(struct array *a) {
    gpu_free(a->device);
    free(a->host);
}

static void fetch(struct array *a) {
    gpu_to_host(a->host, a->device, a->bytes + 2 * GUARD);
    for (int i = 0; i < GUARD; i++) {
        if ((unsigned char)a->host[i] != 0xff ||
            (unsigned char)a->host[a->bytes + GUARD + (size_t)i] != 0xff) {
            fail_msg("guard %d was written to", i);
        }
    }
}

static double at(const struct array *a, size_t i) {
    return oracle_load(a->host + GUARD + i * oracle_element_size(a->t.dtype), a->t.dtype);
}

/* Channel-dependent means, so that residuals are not the whole value. */
static void fill(struct world *w, struct array *a, double spread) {
    const size_t size = oracle_element_size(a->t.dtype), n = a->bytes / size;
    for (size_t i = 0; i < n; i++) {
        double x = spread * (2 * random_uniform(&w->random) - 1) + 0.5 * sin((double)(i % 127));
        oracle_store(a->host + GUARD + i * size, a->t.dtype, x);
    }
    gpu_to_device(a->device + GUARD, a->host + GUARD, a->bytes);
}

/* ---- a step of several sequences */

struct step {
    int count;
    fkv_sequence ids[4];
    int64_t n_new[4], base[4];
    int64_t tokens;
    struct array q[2], k[2], v[2], out[2], lse[2]; /* by layer */
};

static void plan_step(struct world *w, struct step *s) {
    fkv_batch batch;
    s->tokens = 0;
    for (int i = 0; i < s->count; i++) {
        OK(w, fkv_sequence_length(w->cache, s->ids[i], &s->base[i]));
        s->tokens += s->n_new[i];
    }
    fkv_batch_init(&batch, sizeof batch);
    batch.count = s->count;
    batch.sequences = s->ids;
    batch.n_new = s->n_new;
    OK(w, fkv_plan_update(w->plan, &batch));
}

static void make_arrays(struct world *w, struct step *s) {
    const struct config *c = w->c;
    for (int l = 0; l < c->layers; l++) {
        s->q[l] = new_array(c->in, s->tokens, c->hq, c->dim);
        s->k[l] = new_array(c->in, s->tokens, c->hk, c->dim);
        s->v[l] = new_array(c->in, s->tokens, c->hk, c->dim);
        s->out[l] = new_array(c->out, s->tokens, c->hq, c->dim);
        s->lse[l] = new_array(FKV_DTYPE_F32, s->tokens, c->hq, 0);
        fill(w, &s->q[l], 2.0);
        fill(w, &s->k[l], 2.0);
        fill(w, &s->v[l], 1.0);
    }
}

static void free_arrays(struct world *w, struct step *s) {
    for (int l = 0; l < w->c->layers; l++) {
        free_array(&s->q[l]);
        free_array(&s->k[l]);
        free_array(&s->v[l]);
        free_array(&s->out[l]);
        free_array(&s->lse[l]);
    }
}

static void run_layer(struct world *w, struct step *s, int l) {
    OK(w, fkv_append_attend(w->plan, l, &s->q[l].t, &s->k[l].t, &s->v[l].t, &s->out[l].t,
                            &s->lse[l].t));
}

/* What a sequence holds, as doubles [tokens][hk][dim]. */
static double *read_part(struct world *w, fkv_sequence id, int layer, fkv_part part,
                         int64_t tokens) {
    struct array a = new_array(FKV_DTYPE_F32, tokens, w->c->hk, w->c->dim);
    OK(w,
       fkv_sequence_read(w->cache, id, layer, 0, tokens, part ? NULL : &a.t, part ? &a.t : NULL));
    fetch(&a);
    const size_t n = a.bytes / sizeof(float);
    double *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        x[i] = at(&a, i);
    }
    free_array(&a);
    return x;
}

/* Compares one query token's outputs with float64 over k and v. Returns the largest share of the tolerance. */
static double compare_token(struct world *w, struct step *s, int layer, int64_t token,
                            int64_t position, int64_t visible, const double *k, const double *v) {
    const struct config *c = w->c;
    double worst = 0;
    for (int h = 0; h < c->hq; h++) {
        double q[256], o[256];
        const size_t first = ((size_t)token * (size_t)c->hq + (size_t)h) * (size_t)c->dim;
        for (int d = 0; d < c->dim; d++) {
            q[d] = at(&s->q[layer], first + (size_t)d);
        }
        oracle_rope(&w->model, position, q);
        const int head = h / (c->hq / c->hk);
        const struct oracle_row row =
            oracle_attend(q, k + head * c->dim, v + head * c->dim, visible, c->hk * c->dim, c->dim,
                          oracle_scale(&w->model), o);
        for (int d = 0; d < c->dim; d++) {
            /* factors are split in two 16-bit parts: bf16 keeps 2^-16 of them, f16 2^-21; carriers at f16's */
            double tolerance = oracle_tolerance(&row, o[d], c->out) +
                               (c->storage == FKV_DTYPE_BF16 ? 0x1p-14 : 0x1p-18) *
                                   (1 + row.max_score) * row.max_value;
            double error = fabs(at(&s->out[layer], first + (size_t)d) - o[d]);
            if (!(error <= tolerance)) {
                fail_msg("%s: layer %d token %lld head %d channel %d: %.9g, expected %.9g +- %.2g",
                         c->name, layer, (long long)token, h, d,
                         at(&s->out[layer], first + (size_t)d), o[d], tolerance);
            }
            worst = fmax(worst, error / tolerance);
        }
        double lse = at(&s->lse[layer], (size_t)token * (size_t)c->hq + (size_t)h);
        if (!(fabs(lse - row.lse) <= 1e-3 * (1 + fabs(row.lse)))) {
            fail_msg("%s: lse %.9g, expected %.9g", c->name, lse, row.lse);
        }
    }
    return worst;
}

static double compare_step(struct world *w, struct step *s) {
    double worst = 0;
    for (int l = 0; l < w->c->layers; l++) {
        fetch(&s->out[l]);
        fetch(&s->lse[l]);
        int64_t token = 0;
        for (int i = 0; i < s->count; token += s->n_new[i], i++) {
            const int64_t after = s->base[i] + s->n_new[i];
            if (!s->n_new[i]) {
                continue;
            }
            double *k = read_part(w, s->ids[i], l, FKV_PART_K, after);
            double *v = read_part(w, s->ids[i], l, FKV_PART_V, after);
            const int64_t jump = s->n_new[i] > 8 ? s->n_new[i] / 5 : 1;
            for (int64_t t = 0; t < s->n_new[i]; t += jump) {
                worst = fmax(worst, compare_token(w, s, l, token + t, s->base[i] + t,
                                                  s->base[i] + t + 1, k, v));
            }
            free(k);
            free(v);
        }
    }
    return worst;
}

/* ---- tests */

static const struct config configs[] = {
    {"exact f16", 2, 8, 2, 128, 128, FKV_ROPE_HALF_SPLIT, FKV_DTYPE_F16, FKV_DTYPE_BF16,
     FKV_DTYPE_F32, -1, 0, 0, 0, 0, 500000},
    {"exact bf16, 8 heads", 1, 16, 2, 64, 64, FKV_ROPE_INTERLEAVED, FKV_DTYPE_BF16, FKV_DTYPE_BF16,
     FKV_DTYPE_BF16, -1, 0, 0, 0, 0, 10000},
    {"exact f16, 16 heads, odd dimension", 1, 32, 2, 72, 32, FKV_ROPE_HALF_SPLIT, FKV_DTYPE_F16,
     FKV_DTYPE_F32, FKV_DTYPE_F32, -1, 0, 0, 0, 0, 10000},
    {"exact f16, no rope, 1 head", 1, 1, 1, 256, 0, FKV_ROPE_NONE, FKV_DTYPE_F16, FKV_DTYPE_F16,
     FKV_DTYPE_F16, -1, 0, 0, 0, 0, 10000},
    {"mixed bits", 2, 8, 2, 128, 128, FKV_ROPE_HALF_SPLIT, FKV_DTYPE_F16, FKV_DTYPE_F32,
     FKV_DTYPE_F32, 99, 128, 128, 4, 128, 500000},
    {"mixed bits, bf16, 8 heads, blocks of 2", 1, 16, 2, 64, 64, FKV_ROPE_INTERLEAVED,
     FKV_DTYPE_BF16, FKV_DTYPE_BF16, FKV_DTYPE_F32, 99, 64, 128, 5, 40, 10000},
    {"mixed bits, blocks of 256", 1, 6, 2, 96, 64, FKV_ROPE_HALF_SPLIT, FKV_DTYPE_F16,
     FKV_DTYPE_F32, FKV_DTYPE_F32, 99, 128, 256, 0, 0, 10000},
    {"0 bits", 1, 4, 1, 64, 64, FKV_ROPE_HALF_SPLIT, FKV_DTYPE_F16, FKV_DTYPE_F32, FKV_DTYPE_F32, 0,
     64, 64, 4, 64, 10000},
    {"2 bits", 1, 4, 1, 128, 128, FKV_ROPE_HALF_SPLIT, FKV_DTYPE_F16, FKV_DTYPE_F32, FKV_DTYPE_F32,
     2, 128, 128, 4, 64, 10000},
    {"3 bits", 1, 4, 1, 128, 128, FKV_ROPE_HALF_SPLIT, FKV_DTYPE_F16, FKV_DTYPE_F32, FKV_DTYPE_F32,
     3, 64, 64, 4, 64, 10000},
    {"4 bits", 1, 4, 2, 128, 128, FKV_ROPE_HALF_SPLIT, FKV_DTYPE_BF16, FKV_DTYPE_F32, FKV_DTYPE_F32,
     4, 128, 128, 4, 64, 10000},
    {"8 bits", 1, 4, 2, 128, 128, FKV_ROPE_HALF_SPLIT, FKV_DTYPE_F16, FKV_DTYPE_F32, FKV_DTYPE_F32,
     8, 128, 128, 4, 64, 10000},
    {"16 bits", 1, 4, 2, 128, 128, FKV_ROPE_HALF_SPLIT, FKV_DTYPE_F16, FKV_DTYPE_F32, FKV_DTYPE_F32,
     16, 128, 128, 4, 64, 10000},
    {"mixed bits, no rope", 1, 4, 2, 64, 0, FKV_ROPE_NONE, FKV_DTYPE_F16, FKV_DTYPE_F32,
     FKV_DTYPE_F32, 99, 128, 128, 4, 64, 10000},
    {"Fourier", 2, 8, 2, 128, 128, FKV_ROPE_HALF_SPLIT, FKV_DTYPE_F16, FKV_DTYPE_BF16,
     FKV_DTYPE_F32, FOURIER, 0, 0, 4, 136, 500000},
    {"Fourier, bf16, 8 heads, segments of 448", 1, 16, 2, 64, 64, FKV_ROPE_INTERLEAVED,
     FKV_DTYPE_BF16, FKV_DTYPE_BF16, FKV_DTYPE_F32, FOURIER, 1, 0, 5, 40, 10000},
    {"Fourier, all channels and bins", 1, 6, 2, 96, 64, FKV_ROPE_HALF_SPLIT, FKV_DTYPE_F16,
     FKV_DTYPE_F32, FKV_DTYPE_F32, FOURIER, 2, 0, 0, 0, 10000},
    {"Fourier, 1 head, wide cells", 1, 1, 1, 256, 0, FKV_ROPE_NONE, FKV_DTYPE_F16, FKV_DTYPE_F16,
     FKV_DTYPE_F16, FOURIER, 3, 0, 4, 64, 10000},
    {"Fourier, 12 heads, chirp of 2000", 1, 12, 1, 128, 128, FKV_ROPE_HALF_SPLIT, FKV_DTYPE_BF16,
     FKV_DTYPE_BF16, FKV_DTYPE_BF16, FOURIER, 4, 0, 4, 136, 500000},
    {"Fourier, no channel coded", 1, 4, 2, 64, 64, FKV_ROPE_HALF_SPLIT, FKV_DTYPE_F16,
     FKV_DTYPE_F32, FKV_DTYPE_F32, FOURIER, 5, 0, 4, 64, 10000},
};
enum { FIRST_FOURIER = 14 };

/* Instrumented kernels get a few cases. */
static bool skipped(size_t i) {
    const char *only = getenv("FKV_TEST_FOURIER"); /* those of Fourier caches alone */
    if (only && *only == '1' && i < FIRST_FOURIER) {
        return true;
    }
    return random_quick() && i != 1 && i != 4 && i != 5 && i != FIRST_FOURIER &&
           i != FIRST_FOURIER + 1;
}

static void run_steps(struct world *w, struct step *s) {
    plan_step(w, s);
    make_arrays(w, s);
    for (int l = 0; l < w->c->layers; l++) {
        run_layer(w, s, l);
    }
}

static void test_outputs(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof configs / sizeof configs[0]; i++) {
        if (skipped(i)) {
            continue;
        }
        struct world w;
        struct step s = {.count = 3};
        open_world(&w, &configs[i], 17 + i);
        for (int j = 0; j < s.count; j++) {
            OK(&w, fkv_sequence_create(w.cache, NULL, &s.ids[j]));
        }
        static const int64_t steps[][3] = {{1300, 3, 500}, {1, 1, 1},   {5, 0, 2},
                                           {1, 2, 1},      {300, 1, 1}, {1, 1, 1}};
        for (size_t k = 0; k < sizeof steps / sizeof steps[0]; k++) {
            memcpy(s.n_new, steps[k], sizeof steps[k]);
            run_steps(&w, &s);
            /* what the step coded can be read back only in its coded form, so that long steps are compared
             * by their last row at most where nothing was coded */
            const double worst = w.c->bits == -1 || k % 2 ? compare_step(&w, &s) : 0.0;
            if (k == 5) {
                print_message("%s: %.2f of the tolerance\n", w.c->name, worst);
            }
            free_arrays(&w, &s);
        }
        close_world(&w);
    }
}

/* Attention alone, behind an append: the same function of what is held, coded or not. */
static void test_attend_alone(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof configs / sizeof configs[0]; i++) {
        if (skipped(i)) {
            continue;
        }
        struct world w;
        struct step s = {.count = 2};
        open_world(&w, &configs[i], 99 + i);
        for (int j = 0; j < s.count; j++) {
            OK(&w, fkv_sequence_create(w.cache, NULL, &s.ids[j]));
        }
        s.n_new[0] = 2900;
        s.n_new[1] = 700;
        plan_step(&w, &s);
        make_arrays(&w, &s);
        for (int l = 0; l < w.c->layers; l++) {
            OK(&w, fkv_append(w.plan, l, &s.k[l].t, &s.v[l].t));
            OK(&w, fkv_attend(w.plan, l, &s.q[l].t, &s.out[l].t, &s.lse[l].t));
        }
        compare_step(&w, &s);
        free_arrays(&w, &s);
        close_world(&w);
    }
}

/* Codes, scales and zero points: read back from a coded cache against the reference quantiser applied to what an
 * exact cache holds of the same tokens. */
static void expect_block(struct world *w, const double *exact, const double *coded, int layer,
                         fkv_part part, int head, int d, int64_t first, int64_t *wrong) {
    const struct config *c = w->c;
    const int channel = (layer * c->hk + head) * c->dim + d, bits = w->bits[part][channel];
    struct fkv_kernels kernels;
    fkv_kernels_init(&kernels, FKV_CPU_REFERENCE);
    for (int64_t g = 0; g < c->block; g += c->group) {
        float x[128 + 16];
        double carrier[128];
        for (int t = 0; t < c->group; t++) {
            const int64_t position = first + g + t;
            double mu[256];
            for (int e = 0; e < c->dim; e++) {
                mu[e] = w->carriers[part][(layer * c->hk + head) * c->dim + e];
            }
            if (part == FKV_PART_K) {
                oracle_rope(&w->model, position, mu);
            }
            carrier[t] = mu[d];
            /* the carrier as the library has it: products and sums in f32 of angles in f32 */
            float rotated = (float)mu[d];
            if (part == FKV_PART_K && d < c->rope_dim) {
                const int pairs = c->rope_dim / 2;
                const bool inter = c->layout == FKV_ROPE_INTERLEAVED;
                const bool is_first = inter ? d % 2 == 0 : d < pairs;
                const int pair = inter ? d / 2 : d % pairs, e = inter      ? d ^ 1
                                                                : is_first ? d + pairs
                                                                           : d - pairs;
                const float *m = w->carriers[part] + (layer * c->hk + head) * c->dim;
                const float co = (float)cos((double)position * w->inv_freq[pair]);
                const float si = (float)sin((double)position * w->inv_freq[pair]);
                const float u = m[d] * co, v = (is_first ? -m[e] : m[e]) * si;
                rotated = u + v;
            }
            x[t] = (float)exact[(position * c->hk + head) * c->dim + d] - rotated;
        }
        uint8_t codes[128];
        uint16_t scale, zero;
        memset(codes, 0, sizeof codes);
        kernels.code_keys(codes, 8 * bits, &scale, &zero, x, c->group, bits, 1, c->group / 64);
        for (int t = 0; t < c->group; t++) {
            const float one = 1.0f, none = 0.0f;
            float unpacked[64];
            uint16_t counts[FKV_N_PACKED] = {bits == 8, bits == 4, bits == 3, bits == 2};
            kernels.scores_packed(unpacked, 64, &one, 1, &none, codes + t / 64 * 8 * bits, counts,
                                  1, 0, NULL);
            const double scaled = oracle_load(&scale, FKV_DTYPE_F16) * (double)unpacked[t % 64];
            const double expected = carrier[t] + oracle_load(&zero, FKV_DTYPE_F16) + scaled;
            const double got = coded[((first + g + t) * c->hk + head) * c->dim + d];
            *wrong += !(fabs(got - expected) <= 1e-6 * (1 + fabs(expected)));
        }
    }
}

static void test_codes(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof configs / sizeof configs[0]; i++) {
        const struct config *c = &configs[i];
        if (c->bits < 0 || skipped(i)) {
            continue;
        }
        struct config plain = *c;
        struct world w, e;
        struct step s = {.count = 1};
        plain.bits = -1;
        open_world(&w, c, 5 + i);
        open_world(&e, &plain, 5 + i);
        const int64_t tokens = c->n_sink + c->n_local + 3 * c->block + 5,
                      until = c->n_sink + 3 * c->block;
        s.n_new[0] = tokens;
        OK(&w, fkv_sequence_create(w.cache, NULL, &s.ids[0]));
        plan_step(&w, &s);
        make_arrays(&w, &s);
        for (int l = 0; l < c->layers; l++) {
            OK(&w, fkv_append(w.plan, l, &s.k[l].t, &s.v[l].t));
        }
        struct step r = s;
        OK(&e, fkv_sequence_create(e.cache, NULL, &r.ids[0]));
        plan_step(&e, &r);
        for (int l = 0; l < c->layers; l++) {
            OK(&e, fkv_append(e.plan, l, &s.k[l].t, &s.v[l].t));
        }
        fkv_stats stats = {.struct_size = sizeof stats};
        OK(&w, fkv_cache_stats(w.cache, s.ids[0], &stats));
        assert_int_equal(stats.tokens_coded, 3 * c->block);
        int64_t wrong = 0, all = 0;
        for (int l = 0; l < c->layers; l++) {
            for (int part = 0; part < 2; part++) {
                double *coded = read_part(&w, s.ids[0], l, part, tokens);
                double *exact = read_part(&e, r.ids[0], l, part, tokens);
                for (int64_t j = 0; j < tokens * c->hk * c->dim; j++) {
                    const int64_t t = j / c->dim / c->hk;
                    const int head = (int)(j / c->dim % c->hk), d = (int)(j % c->dim);
                    const int bits = w.bits[part][(l * c->hk + head) * c->dim + d];
                    if (t < c->n_sink || t >= until || bits == 16) {
                        assert_true(coded[j] == exact[j]);
                    } else if (bits && (t - c->n_sink) % c->block == 0) {
                        expect_block(&w, exact, coded, l, part, head, d, t, &wrong);
                        all += c->block;
                    }
                }
                free(coded);
                free(exact);
            }
        }
        print_message("%s: %lld of %lld codes differ\n", c->name, (long long)wrong, (long long)all);
        assert_int_equal(wrong, 0);
        free_arrays(&w, &s);
        close_world(&w);
        close_world(&e);
    }
}

/* What a CPU cache of the same profile holds: exact tokens bit for bit. Coded ones too, but that the CPU turns carriers
 * from the middle of a tile: residuals differ in their last bits, and where one is at the edge between two codes the
 * codes differ by 1. */
static void compare_cpu(const struct config *c) {
    enum { TOKENS = 700 };
    struct world w;
    struct step s = {.count = 1, .n_new = {TOKENS}};
    char *text;
    size_t bytes;
    open_world(&w, c, 3);
    OK(&w, fkv_sequence_create(w.cache, NULL, &s.ids[0]));
    plan_step(&w, &s);
    make_arrays(&w, &s);
    OK(&w, fkv_append(w.plan, 0, &s.k[0].t, &s.v[0].t));
    fkv_context *cpu = open_context(FKV_BACKEND_CPU);
    fkv_profile *profile;
    fkv_cache *cache;
    fkv_plan *plan;
    fkv_sequence id;
    fkv_batch batch;
    OK(&w, fkv_profile_save(w.profile, NULL, 0, &bytes));
    text = malloc(bytes);
    OK(&w, fkv_profile_save(w.profile, text, bytes, &bytes));
    check(cpu, fkv_profile_load(cpu, text, bytes, &profile), "profile");
    check(cpu, fkv_cache_create(cpu, profile, NULL, &cache), "cache");
    check(cpu, fkv_plan_create(cache, &plan), "plan");
    check(cpu, fkv_sequence_create(cache, NULL, &id), "sequence");
    fkv_batch_init(&batch, sizeof batch);
    batch.count = 1;
    batch.sequences = &id;
    batch.n_new = s.n_new;
    check(cpu, fkv_plan_update(plan, &batch), "plan");
    fkv_tensor k = s.k[0].t, v = s.v[0].t;
    k.data = s.k[0].host + GUARD, v.data = s.v[0].host + GUARD;
    k.device = v.device = FKV_DEVICE_CPU;
    check(cpu, fkv_append(plan, 0, &k, &v), "append");
    const int64_t n = (int64_t)TOKENS * c->hk * c->dim, shape[3] = {TOKENS, c->hk, c->dim};
    for (int part = 0; part < 2; part++) {
        fkv_tensor t;
        float *got = malloc((size_t)n * sizeof(float));
        fkv_tensor_init(&t, got, FKV_DTYPE_F32, 3, shape);
        check(cpu, fkv_sequence_read(cache, id, 0, 0, TOKENS, part ? NULL : &t, part ? &t : NULL),
              "read");
        double *x = read_part(&w, s.ids[0], 0, part, TOKENS);
        int64_t different = 0, wrong = 0;
        for (int64_t i = 0; i < n; i++) {
            different += x[i] != (double)got[i];
            const double difference = fabs(x[i] - (double)got[i]);
            const int channel = (int)(i % (c->hk * c->dim)),
                      bits = c->bits < 0 ? 16 : w.bits[part][channel];
            if (c->bits == FOURIER) {
                /* a coefficient that is at the edge between two of its type is rounded to either: 2^-11 of it */
                wrong += !(difference <= 1e-6 * (1 + fabs((double)got[i])));
                assert_true(difference <= 1e-3);
                assert_true(w.bits[part][channel] || difference == 0.0);
                continue;
            }
            wrong += !(difference <= 1e-6 * (1 + fabs((double)got[i])));
            /* no residual is beyond +-5 */
            assert_true(difference <= 1e-6 * (1 + fabs((double)got[i])) ||
                        difference <= 10.0 / ((1 << bits) - 1));
        }
        print_message("%s: %lld of %lld values differ in the last bit\n", c->name,
                      (long long)different, (long long)n);
        if (c->bits == FOURIER) {
            print_message("    %lld of %lld beyond 1e-6\n", (long long)wrong, (long long)n);
        } else {
            assert_true(c->bits < 0 ? !different : wrong <= 1 + n / 100000);
        }
        free(x);
        free(got);
    }
    free(text);
    fkv_plan_destroy(plan);
    fkv_cache_destroy(cache);
    fkv_profile_destroy(profile);
    fkv_context_destroy(cpu);
    free_arrays(&w, &s);
    close_world(&w);
}

static void test_against_cpu(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof configs / sizeof configs[0]; i++) {
        if (!skipped(i)) {
            compare_cpu(&configs[i]);
        }
    }
}

/* A captured step, replayed while sequences grow past blocks, against calls one by one: the same bits. */
static void test_graph(void **state) {
    (void)state;
    static const size_t cases[] = {0, 4, FIRST_FOURIER, FIRST_FOURIER + 1};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        if (skipped(cases[i]) && cases[i]) {
            continue;
        }
        struct world w[2];
        struct step s[2] = {{.count = 3}, {.count = 3}};
        void *graph = NULL;
        for (int j = 0; j < 2; j++) {
            open_world(&w[j], &configs[cases[i]], 7);
            for (int k = 0; k < 3; k++) {
                OK(&w[j], fkv_sequence_create(w[j].cache, NULL, &s[j].ids[k]));
                s[j].n_new[k] = 190 + 101 * k;
            }
            run_steps(&w[j], &s[j]);
            free_arrays(&w[j], &s[j]);
            s[j].n_new[0] = s[j].n_new[1] = s[j].n_new[2] = 1;
        }
        for (int step = 0; step < (random_quick() ? 10 : 140); step++) {
            plan_step(&w[0], &s[0]);
            plan_step(&w[1], &s[1]);
            if (!step) {
                make_arrays(&w[0], &s[0]);
                make_arrays(&w[1], &s[1]);
                gpu_capture_begin(stream);
                for (int l = 0; l < w[0].c->layers; l++) {
                    run_layer(&w[0], &s[0], l);
                }
                graph = gpu_capture_end(stream);
            }
            for (int l = 0; l < w[0].c->layers; l++) {
                fill(&w[0], &s[0].q[l], 2.0);
                fill(&w[0], &s[0].k[l], 2.0);
                fill(&w[0], &s[0].v[l], 2.0);
                gpu_to_device(s[1].q[l].device + GUARD, s[0].q[l].host + GUARD, s[0].q[l].bytes);
                gpu_to_device(s[1].k[l].device + GUARD, s[0].k[l].host + GUARD, s[0].k[l].bytes);
                gpu_to_device(s[1].v[l].device + GUARD, s[0].v[l].host + GUARD, s[0].v[l].bytes);
            }
            gpu_graph_launch(graph, stream);
            OK(&w[0], fkv_plan_replayed(w[0].plan));
            for (int l = 0; l < w[0].c->layers; l++) {
                run_layer(&w[1], &s[1], l);
                fetch(&s[0].out[l]);
                fetch(&s[1].out[l]);
                assert_memory_equal(s[0].out[l].host, s[1].out[l].host,
                                    s[0].out[l].bytes + 2 * GUARD);
            }
        }
        compare_step(&w[0], &s[0]);
        gpu_graph_free(graph);
        for (int j = 0; j < 2; j++) {
            free_arrays(&w[j], &s[j]);
            close_world(&w[j]);
        }
    }
}

/* Forks share, write apart and are counted; crops take back. */
static void test_forks(void **state) {
    (void)state;
    static const size_t cases[] = {0, 4, FIRST_FOURIER};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        if (skipped(cases[i]) && cases[i]) {
            continue;
        }
        struct world w;
        struct step s = {.count = 1, .n_new = {700}};
        fkv_sequence child;
        fkv_stats one = {.struct_size = sizeof one}, both = one;
        open_world(&w, &configs[cases[i]], 21);
        OK(&w, fkv_sequence_create(w.cache, NULL, &s.ids[0]));
        run_steps(&w, &s);
        free_arrays(&w, &s);
        OK(&w, fkv_cache_stats(w.cache, s.ids[0], &one));
        OK(&w, fkv_sequence_fork(w.cache, s.ids[0], &child));
        OK(&w, fkv_cache_stats(w.cache, s.ids[0], &both));
        assert_true(both.bytes_shared > one.bytes_exact / 2);
        s.count = 2;
        s.ids[1] = child;
        s.n_new[0] = 1;
        s.n_new[1] = 3;
        for (int k = 0; k < 3; k++) {
            run_steps(&w, &s);
            compare_step(&w, &s);
            free_arrays(&w, &s);
        }
        int64_t limit;
        OK(&w, fkv_sequence_crop_limit(w.cache, child, &limit));
        OK(&w, fkv_sequence_crop(w.cache, child, 705));
        assert_true(limit <= 705);
        run_steps(&w, &s);
        compare_step(&w, &s);
        free_arrays(&w, &s);
        OK(&w, fkv_sequence_free(w.cache, s.ids[0]));
        s.ids[0] = child;
        s.count = 1;
        run_steps(&w, &s);
        compare_step(&w, &s);
        free_arrays(&w, &s);
        close_world(&w);
    }
}

/* ---- Fourier caches */

/* Appends tokens [first, first + n) of a row's arrays to one sequence. */
static void append_some(struct world *w, struct step *from, fkv_sequence id, int64_t first,
                        int64_t n) {
    struct step s = {.count = 1, .n_new = {n}};
    const struct config *c = w->c;
    s.ids[0] = id;
    plan_step(w, &s);
    for (int l = 0; l < c->layers; l++) {
        const int64_t shape[3] = {n, c->hk, c->dim};
        const size_t at = (size_t)(first * c->hk * c->dim) * oracle_element_size(c->in);
        fkv_tensor k, v;
        fkv_tensor_init(&k, from->k[l].device + GUARD + at, c->in, 3, shape);
        fkv_tensor_init(&v, from->v[l].device + GUARD + at, c->in, 3, shape);
        k.device = v.device = FKV_DEVICE_CUDA;
        OK(w, fkv_append(w->plan, l, &k, &v));
    }
}

static void expect_same(struct world *w, fkv_sequence a, fkv_sequence b, int64_t tokens) {
    for (int l = 0; l < w->c->layers; l++) {
        for (int part = 0; part < 2; part++) {
            double *x = read_part(w, a, l, part, tokens), *y = read_part(w, b, l, part, tokens);
            assert_memory_equal(x, y, (size_t)(tokens * w->c->hk * w->c->dim) * sizeof *x);
            free(x);
            free(y);
        }
    }
}

/* What is held depends on the tokens and not on how they were appended: in pieces, by a fork that shares the segment
 * under way with its parent, after a crop to a segment's end. */
static void test_fourier_histories(void **state) {
    (void)state;
    static const int64_t pieces[] = {1, 63, 64, 65, 130, 7, 200, 1, 1, 300, 68};
    for (size_t i = FIRST_FOURIER; i < FIRST_FOURIER + 2; i++) {
        struct world w;
        struct step s = {.count = 1, .n_new = {900}};
        fkv_sequence whole, child, late;
        fkv_stats before = {.struct_size = sizeof before}, after = before;
        open_world(&w, &configs[i], 40 + i);
        OK(&w, fkv_sequence_create(w.cache, NULL, &s.ids[0]));
        OK(&w, fkv_sequence_create(w.cache, NULL, &whole));
        s.tokens = 900;
        make_arrays(&w, &s);
        append_some(&w, &s, whole, 0, 900);
        int64_t done = 0;
        for (size_t k = 0; k < sizeof pieces / sizeof pieces[0]; done += pieces[k++]) {
            append_some(&w, &s, s.ids[0], done, pieces[k]);
        }
        assert_int_equal(done, 900);
        expect_same(&w, s.ids[0], whole, 900);
        /* a fork goes another way than its parent, both from 600 tokens on */
        OK(&w, fkv_sequence_create(w.cache, NULL, &late));
        append_some(&w, &s, late, 0, 600);
        OK(&w, fkv_sequence_fork(w.cache, late, &child));
        append_some(&w, &s, child, 100, 300);
        append_some(&w, &s, late, 600, 300);
        expect_same(&w, late, whole, 900);
        OK(&w, fkv_sequence_free(w.cache, late));
        OK(&w, fkv_sequence_create(w.cache, NULL, &late));
        append_some(&w, &s, late, 0, 600);
        append_some(&w, &s, late, 100, 300);
        expect_same(&w, late, child, 900);
        /* back to where nothing depends on what goes, and forth again */
        int64_t floor;
        OK(&w, fkv_sequence_crop_floor(w.cache, s.ids[0], 700, &floor));
        if (floor < 700) {
            assert_int_equal(fkv_sequence_crop(w.cache, s.ids[0], floor + 1), FKV_ERR_STATE);
        }
        OK(&w, fkv_cache_stats(w.cache, s.ids[0], &before));
        OK(&w, fkv_sequence_crop(w.cache, s.ids[0], floor));
        append_some(&w, &s, s.ids[0], floor, 900 - floor);
        expect_same(&w, s.ids[0], whole, 900);
        OK(&w, fkv_cache_stats(w.cache, s.ids[0], &after));
        assert_int_equal(after.bytes_kept, before.bytes_kept);
        assert_int_equal(after.bytes_coefficients, before.bytes_coefficients);
        assert_int_equal(after.bytes_exact, before.bytes_exact);
        assert_true(after.bytes_kept > 0 && after.bytes_coefficients > 0);
        /* the same attention twice: the same bits */
        s.ids[0] = whole;
        s.n_new[0] = 3;
        free_arrays(&w, &s);
        run_steps(&w, &s);
        compare_step(&w, &s);
        struct array again = new_array(w.c->out, 3, w.c->hq, w.c->dim);
        for (int l = 0; l < w.c->layers; l++) {
            gpu_fill(again.device + GUARD, 0xff, again.bytes);
            OK(&w, fkv_attend(w.plan, l, &s.q[l].t, &again.t, NULL));
            fetch(&again);
            assert_memory_equal(again.host, s.out[l].host, again.bytes + 2 * GUARD);
        }
        free_array(&again);
        free_arrays(&w, &s);
        close_world(&w);
    }
}

/* What is not there says so. */
static void test_fourier_refusals(void **state) {
    (void)state;
    struct world w;
    fkv_fourier_params f;
    fkv_profile *profile;
    fkv_cache *cache;
    fkv_sequence id;
    const struct config *c = &configs[FIRST_FOURIER];
    const size_t n = (size_t)(c->layers * c->hk * c->dim);
    open_world(&w, c, 1);
    for (int part = 0; part < 2; part++) {
        free(w.bits[part]);
    }
    make_fourier(&w, &f);
    f.restoration = FKV_RESTORE_AUTHORS;
    OK(&w, fkv_profile_create_fourier(w.ctx, &w.model, &f, w.bits[0], w.bits[1], n, &profile));
    assert_int_equal(fkv_cache_create(w.ctx, profile, NULL, &cache), FKV_ERR_UNSUPPORTED);
    OK(&w, fkv_profile_destroy(profile));
    f.restoration = FKV_RESTORE_LEAST_SQUARES;
    f.storage_dtype = FKV_DTYPE_F32;
    OK(&w, fkv_profile_create_fourier(w.ctx, &w.model, &f, w.bits[0], w.bits[1], n, &profile));
    assert_int_equal(fkv_cache_create(w.ctx, profile, NULL, &cache), FKV_ERR_UNSUPPORTED);
    OK(&w, fkv_profile_destroy(profile));
    fkv_sequence_params p;
    fkv_stats before = {.struct_size = sizeof before}, after = before;
    fkv_sequence_params_init(&p, sizeof p);
    p.period = 3000001; /* more points than a transform has */
    OK(&w, fkv_cache_stats(w.cache, FKV_ALL_SEQUENCES, &before));
    assert_int_equal(fkv_sequence_create(w.cache, &p, &id), FKV_ERR_UNSUPPORTED);
    OK(&w, fkv_cache_stats(w.cache, FKV_ALL_SEQUENCES, &after));
    assert_int_equal(after.bytes, before.bytes);
    p.period = 1048576;
    OK(&w, fkv_sequence_create(w.cache, &p, &id));
    close_world(&w);
}

/* Bad places and tensors are refused, and nothing changes. */
static void test_bad_places(void **state) {
    (void)state;
    struct world w;
    struct step s = {.count = 1, .n_new = {70}};
    int64_t tokens;
    open_world(&w, &configs[0], 2);
    OK(&w, fkv_sequence_create(w.cache, NULL, &s.ids[0]));
    plan_step(&w, &s);
    make_arrays(&w, &s);
    fkv_tensor k = s.k[0].t;
    k.data = s.k[0].host + GUARD;
    assert_int_equal(fkv_append(w.plan, 0, &k, &s.v[0].t), FKV_ERR_INVALID);
    k = s.k[0].t;
    k.device = FKV_DEVICE_CPU;
    assert_int_equal(fkv_append(w.plan, 0, &k, &s.v[0].t), FKV_ERR_INVALID);
    k.device = FKV_DEVICE_CUDA;
    k.device_id = 1;
    assert_int_equal(fkv_append(w.plan, 0, &k, &s.v[0].t), FKV_ERR_INVALID);
    OK(&w, fkv_sequence_length(w.cache, s.ids[0], &tokens));
    assert_int_equal(tokens, 0);
    run_layer(&w, &s, 0);
    run_layer(&w, &s, 1);
    compare_step(&w, &s);
    free_arrays(&w, &s);
    close_world(&w);
}

/* Limits in the middle of growth: refused, nothing changed, usable afterwards; and bytes as the driver sees them. */
static void test_memory(void **state) {
    (void)state;
    struct world w;
    struct step s = {.count = 1, .n_new = {100000}};
    open_world(&w, &configs[4], 2);
    OK(&w, fkv_plan_destroy(w.plan));
    OK(&w, fkv_cache_destroy(w.cache));
    fkv_cache_params p;
    fkv_cache_params_init(&p, sizeof p);
    p.max_bytes = 96 << 20;
    OK(&w, fkv_cache_create(w.ctx, w.profile, &p, &w.cache));
    OK(&w, fkv_plan_create(w.cache, &w.plan));
    OK(&w, fkv_sequence_create(w.cache, NULL, &s.ids[0]));
    plan_step(&w, &s);
    make_arrays(&w, &s);
    assert_int_equal(fkv_append(w.plan, 0, &s.k[0].t, &s.v[0].t), FKV_ERR_LIMIT);
    free_arrays(&w, &s);
    s.n_new[0] = 100;
    run_steps(&w, &s);
    compare_step(&w, &s);
    free_arrays(&w, &s);
    OK(&w, fkv_plan_destroy(w.plan));
    OK(&w, fkv_cache_destroy(w.cache));
    const size_t before = gpu_free_bytes();
    OK(&w, fkv_cache_create(w.ctx, w.profile, NULL, &w.cache));
    OK(&w, fkv_plan_create(w.cache, &w.plan));
    OK(&w, fkv_sequence_create(w.cache, NULL, &s.ids[0]));
    s.n_new[0] = 30000;
    plan_step(&w, &s);
    make_arrays(&w, &s);
    size_t own = 0;
    for (int l = 0; l < 2; l++) {
        OK(&w, fkv_append(w.plan, l, &s.k[l].t, &s.v[l].t));
        own += s.q[l].bytes + s.k[l].bytes + s.v[l].bytes + s.out[l].bytes + s.lse[l].bytes;
    }
    fkv_stats stats = {.struct_size = sizeof stats};
    OK(&w, fkv_cache_stats(w.cache, FKV_ALL_SEQUENCES, &stats));
    gpu_synchronize();
    const double used = (double)(before - gpu_free_bytes()) - (double)own;
    print_message("driver: %.1f MB, statistics: %.1f MB\n", used * 1e-6,
                  (double)stats.bytes * 1e-6);
    assert_true(fabs(used - (double)stats.bytes) < 24e6);
    free_arrays(&w, &s);
    close_world(&w);
}

int main(int argc, char **argv) {
    const char *why;
    module_path = argc > 1 ? argv[1] : NULL;
    if (!module_path || !gpu_open(0, &why)) {
        printf("skipped: %s\n", module_path ? why : "the module was not built");
        return 77;
    }
    stream = gpu_stream_new();
    printf("%s, driver %d\n", gpu_name(), gpu_driver_version());
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_cpu),
        cmocka_unit_test(test_codes),
        cmocka_unit_test(test_outputs),
        cmocka_unit_test(test_attend_alone),
        cmocka_unit_test(test_graph),
        cmocka_unit_test(test_forks),
        cmocka_unit_test(test_fourier_histories),
        cmocka_unit_test(test_fourier_refusals),
        cmocka_unit_test(test_bad_places),
        cmocka_unit_test(test_memory),
    };
    const char *filter = getenv("FKV_TEST_FILTER"); /* a pattern, for one test alone */
    if (filter) {
        cmocka_set_test_filter(filter);
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
