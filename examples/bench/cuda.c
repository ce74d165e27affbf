/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The CUDA backend's part of fkv-bench: decode steps of one model in a graph of all its layers, exact in bf16 and
 * coded, in turns. Layers are so many that their data are several times the second-level cache. A step is all that
 * a decode step does: append, attention, merging; coding a block, which happens once in as many steps as a block
 * has tokens, is timed apart and counted in proportion.
 */
#define _GNU_SOURCE
#include "bench.h"

#include "gpu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HQ = 32, HK = 8, DIM = 128, REPEATS = 21, CHUNK = 4096, LONG_CHUNK = 32768 };

enum kind { EXACT, CALIBRATED, FOURIER, FROM_FILE };

struct side {
    const char *name;
    enum kind kind;
    fkv_profile *profile;
    fkv_cache *cache;
    fkv_plan *plan;
    fkv_sequence *sequences;
    int64_t *n_new;
    void *graph;
    double seconds[REPEATS];
    double bytes;          /* of a layer and step */
    double append_seconds; /* per token and layer, coding included */
};

struct shape {
    int batch;
    int64_t tokens;
};

struct world {
    fkv_context *ctx;
    void *stream, *first, *second;
    struct shape shape;
    int layers;
    struct bench_random random;
    void *k, *v, *q, *out;
    const char *profile; /* of the second side; NULL: calibrated */
    double share;        /* fourier:SHARE:BINS */
    int bins;
};

/* A profile like those that calibration gives for 12 times fewer bytes: most channels by their carrier alone, some
 * with 2 and few with 4 bits, heads unequal. */
static void choose_bits(struct world *w, uint8_t *bits, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const double tilt = 0.12 * sin((double)(i / DIM) * 1.7);
        const double x = (double)(bench_random_next(&w->random) >> 11) * 0x1p-53;
        bits[i] = x < 0.08 + tilt * 0.4 ? 4 : x < 0.44 + tilt ? 2 : 0;
    }
}

/* Every layer with its own channels, unevenly spread over the heads. */
static void make_fourier(struct world *w, const fkv_model_params *model, struct side *s) {
    const size_t n = (size_t)HK * DIM;
    uint8_t *masks[2] = {bench_alloc((size_t)w->layers * n, 1),
                         bench_alloc((size_t)w->layers * n, 1)};
    fkv_fourier_params f;
    for (int l = 0; l < w->layers; l++) {
        struct bench_model one;
        bench_model_init(&one, HQ, HK, DIM, 500000);
        bench_model_code(&one, w->share, &w->random);
        for (int part = 0; part < 2; part++) {
            memcpy(masks[part] + (size_t)l * n, one.mask[part], n);
        }
        bench_model_free(&one);
    }
    fkv_fourier_params_init(&f, sizeof f);
    f.storage_dtype = FKV_DTYPE_BF16;
    f.bins = w->bins;
    bench_check(w->ctx,
                fkv_profile_create_fourier(w->ctx, model, &f, masks[0], masks[1],
                                           (size_t)w->layers * n, &s->profile),
                "profile");
    free(masks[0]);
    free(masks[1]);
}

static void make_profile(struct world *w, struct side *s) {
    const size_t n = (size_t)w->layers * HK * DIM;
    double inv_freq[DIM / 2];
    fkv_model_params model;
    for (int j = 0; j < DIM / 2; j++) {
        inv_freq[j] = pow(500000.0, -2.0 * j / DIM);
    }
    fkv_model_params_init(&model, sizeof model);
    model.n_layers = w->layers;
    model.n_q_heads = HQ;
    model.n_kv_heads = HK;
    model.head_dim = DIM;
    model.rope_layout = FKV_ROPE_HALF_SPLIT;
    model.inv_freq = inv_freq;
    model.inv_freq_count = DIM / 2;
    if (s->kind == EXACT) {
        bench_check(w->ctx, fkv_profile_create_exact(w->ctx, &model, FKV_DTYPE_BF16, &s->profile),
                    "profile");
        return;
    }
    if (s->kind == FROM_FILE) {
        bench_check(w->ctx, fkv_profile_load_file(w->ctx, w->profile, &s->profile), "profile");
        return;
    }
    if (s->kind == FOURIER) {
        make_fourier(w, &model, s);
        return;
    }
    fkv_codec_params codec;
    fkv_codec_params_init(&codec, sizeof codec);
    codec.storage_dtype = FKV_DTYPE_BF16;
    uint8_t *bits[2] = {bench_alloc(n, 1), bench_alloc(n, 1)};
    float *carriers[2] = {bench_alloc(n, sizeof(float)), bench_alloc(n, sizeof(float))};
    for (int part = 0; part < 2; part++) {
        choose_bits(w, bits[part], n);
        bench_random_fill(&w->random, carriers[part], n);
    }
    bench_check(w->ctx,
                fkv_profile_create_coded(w->ctx, &model, &codec, bits[0], bits[1], n, carriers[0],
                                         carriers[1], n, &s->profile),
                "profile");
    for (int part = 0; part < 2; part++) {
        free(bits[part]);
        free(carriers[part]);
    }
}

static fkv_tensor tensor(void *data, int64_t tokens, int heads) {
    const int64_t shape[3] = {tokens, heads, DIM};
    fkv_tensor t;
    fkv_tensor_init(&t, data, FKV_DTYPE_BF16, 3, shape);
    t.device = FKV_DEVICE_CUDA;
    return t;
}

static void update(struct world *w, struct side *s, int first, int count, int64_t n_new) {
    fkv_batch batch;
    fkv_batch_init(&batch, sizeof batch);
    for (int i = 0; i < count; i++) {
        s->n_new[i] = n_new;
    }
    batch.count = count;
    batch.sequences = s->sequences + first;
    batch.n_new = s->n_new;
    bench_check(w->ctx, fkv_plan_update(s->plan, &batch), "plan");
}

/* All tokens of all sequences, some thousand at a time; timed on the device. Long sequences come in long pieces, so
 * that the device is busy with each. */
static void fill_side(struct world *w, struct side *s) {
    const int64_t chunk = w->shape.tokens < 4 * LONG_CHUNK ? CHUNK : LONG_CHUNK;
    double seconds = 0.0;
    int64_t timed = 0;
    for (int b = 0; b < w->shape.batch; b++) {
        for (int64_t done = 0; done < w->shape.tokens; done += chunk) {
            const int64_t n = w->shape.tokens - done < chunk ? w->shape.tokens - done : chunk;
            const fkv_tensor k = tensor(w->k, n, HK), v = tensor(w->v, n, HK);
            update(w, s, b, 1, n);
            gpu_event_record(w->first, w->stream);
            for (int l = 0; l < w->layers; l++) {
                bench_check(w->ctx, fkv_append(s->plan, l, &k, &v), "append");
            }
            gpu_event_record(w->second, w->stream);
            const double t = gpu_event_seconds(w->first, w->second);
            if (done > 2 * CHUNK) { /* the first code little */
                seconds += t;
                timed += n * w->layers;
            }
        }
    }
    s->append_seconds = timed ? seconds / (double)timed : 0.0;
}

static void open_side(struct world *w, struct side *s, const char *name, enum kind kind) {
    fkv_sequence_params p;
    memset(s, 0, sizeof *s);
    s->name = name;
    s->kind = kind;
    fkv_sequence_params_init(&p, sizeof p);
    p.period = kind >= FOURIER ? w->shape.tokens : 0;
    make_profile(w, s);
    bench_check(w->ctx, fkv_cache_create(w->ctx, s->profile, NULL, &s->cache), "cache");
    bench_check(w->ctx, fkv_plan_create(s->cache, &s->plan), "plan");
    s->sequences = bench_alloc((size_t)w->shape.batch, sizeof *s->sequences);
    s->n_new = bench_alloc((size_t)w->shape.batch, sizeof *s->n_new);
    for (int b = 0; b < w->shape.batch; b++) {
        bench_check(w->ctx, fkv_sequence_create(s->cache, &p, &s->sequences[b]), "sequence");
    }
    fill_side(w, s);
    for (int b = 0; b < w->shape.batch; b++) {
        fkv_stats stats = {.struct_size = sizeof stats};
        bench_check(w->ctx, fkv_cache_stats(s->cache, s->sequences[b], &stats), "statistics");
        s->bytes += (double)(stats.bytes_exact + stats.bytes_blocks + stats.bytes_scales +
                             stats.bytes_kept + stats.bytes_coefficients) /
                    w->layers;
    }
    update(w, s, 0, w->shape.batch, 1);
    const fkv_tensor q = tensor(w->q, w->shape.batch, HQ), out = tensor(w->out, w->shape.batch, HQ);
    const fkv_tensor k = tensor(w->k, w->shape.batch, HK), v = tensor(w->v, w->shape.batch, HK);
    gpu_synchronize();
    gpu_capture_begin(w->stream);
    for (int l = 0; l < w->layers; l++) {
        bench_check(w->ctx, fkv_append_attend(s->plan, l, &q, &k, &v, &out, NULL), "step");
    }
    s->graph = gpu_capture_end(w->stream);
}

static void close_side(struct side *s) {
    gpu_graph_free(s->graph);
    fkv_plan_destroy(s->plan);
    fkv_cache_destroy(s->cache);
    fkv_profile_destroy(s->profile);
    free(s->sequences);
    free(s->n_new);
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x) {
    qsort(x, REPEATS, sizeof *x, ascending);
    return x[REPEATS / 2];
}

static void time_sides(struct world *w, struct side *sides, int n) {
    for (int i = -3; i < REPEATS; i++) {
        for (int j = 0; j < n; j++) {
            gpu_event_record(w->first, w->stream);
            gpu_graph_launch(sides[j].graph, w->stream);
            gpu_event_record(w->second, w->stream);
            const double t = gpu_event_seconds(w->first, w->second) / w->layers;
            if (i >= 0) {
                sides[j].seconds[i] = t;
            }
        }
    }
}

/* Time of a kernel that only reads so many bytes, as measured on an H200. */
static double curve(double bytes) {
    return 1.9e-6 + bytes / 4.59e12;
}

static void print_side(const struct world *w, struct side *s, double dense, bool json) {
    const double t = median(s->seconds), rate = s->bytes / t;
    const double append = s->append_seconds * 1e9, expected = curve(s->bytes);
    if (json) {
        printf("{\"batch\":%d,\"tokens\":%lld,\"profile\":\"%s\",\"us\":%.2f,\"mb\":%.2f,\"tb_per_"
               "s\":%.3f,"
               "\"of_ceiling\":%.3f,\"ratio\":%.3f,\"append_ns\":%.3f}\n",
               w->shape.batch, (long long)w->shape.tokens, s->name, t * 1e6, s->bytes * 1e-6,
               rate * 1e-12, expected / t, dense / t, append);
        return;
    }
    printf("%3d x %7lld  %-16s %9.1f us %9.1f MB %6.2f TB/s %5.0f %%  %5.2fx   %8.2f ns\n",
           w->shape.batch, (long long)w->shape.tokens, s->name, t * 1e6, s->bytes * 1e-6,
           rate * 1e-12, 100 * expected / t, dense / t, append);
    fflush(stdout);
}

/* One query head of the coded side's last layer against float64 over what it holds. */
static void check_side(struct world *w, struct side *s) {
    const int64_t tokens = w->shape.tokens;
    if (w->shape.batch > 1 || tokens > 40000) {
        return;
    }
    gpu_graph_launch(s->graph, w->stream);
    bench_check(w->ctx, fkv_plan_replayed(s->plan), "step");
    const int64_t shape[3] = {tokens + 1, HK, DIM};
    const size_t n = (size_t)(tokens + 1) * HK * DIM;
    float *host[2], out[DIM];
    uint16_t q16[HQ * DIM], out16[HQ * DIM];
    for (int part = 0; part < 2; part++) {
        void *device = gpu_alloc(n * sizeof(float));
        fkv_tensor t;
        fkv_tensor_init(&t, device, FKV_DTYPE_F32, 3, shape);
        t.device = FKV_DEVICE_CUDA;
        bench_check(w->ctx,
                    fkv_sequence_read(s->cache, s->sequences[0], w->layers - 1, 0, tokens + 1,
                                      part ? NULL : &t, part ? &t : NULL),
                    "reading back");
        host[part] = bench_alloc(n, sizeof(float));
        gpu_to_host(host[part], device, n * sizeof(float));
        gpu_free(device);
    }
    gpu_to_host(q16, w->q, sizeof q16);
    gpu_to_host(out16, w->out, sizeof out16);
    double worst = 0.0, most = 0.0;
    for (int h = 0; h < HQ; h += 5) {
        double q[DIM], o[DIM] = {0}, max = -INFINITY, sum = 0.0;
        for (int d = 0; d < DIM; d++) {
            uint32_t bits = (uint32_t)q16[h * DIM + d] << 16;
            memcpy(&out[d], &bits, 4);
        }
        for (int j = 0; j < DIM / 2; j++) {
            const double a = (double)tokens * pow(500000.0, -2.0 * j / DIM);
            q[j] = out[j] * cos(a) - out[j + DIM / 2] * sin(a);
            q[j + DIM / 2] = out[j + DIM / 2] * cos(a) + out[j] * sin(a);
        }
        double *score = bench_alloc((size_t)tokens + 1, sizeof(double));
        for (int64_t t = 0; t <= tokens; t++) {
            const float *k = host[0] + (t * HK + h / 4) * DIM;
            double x = 0.0;
            for (int d = 0; d < DIM; d++) {
                x += q[d] * (double)k[d];
            }
            score[t] = x / sqrt(DIM);
            max = fmax(max, score[t]);
        }
        for (int64_t t = 0; t <= tokens; t++) {
            const float *v = host[1] + (t * HK + h / 4) * DIM;
            const double p = exp(score[t] - max);
            sum += p;
            for (int d = 0; d < DIM; d++) {
                o[d] += p * (double)v[d];
            }
        }
        for (int d = 0; d < DIM; d++) {
            uint32_t bits = (uint32_t)out16[h * DIM + d] << 16;
            float got;
            memcpy(&got, &bits, 4);
            worst = fmax(worst, fabs((double)got - o[d] / sum));
            most = fmax(most, fabs(o[d] / sum));
        }
        free(score);
    }
    printf("    %s: largest difference from float64 %.2g, largest output %.2g (bf16 rounds %.2g)\n",
           s->name, worst, most, most * 0x1p-9);
    if (!(worst <= most * 0x1p-8 + 1e-4)) {
        bench_fail("%s: outputs are wrong", s->name);
    }
    free(host[0]);
    free(host[1]);
}

/* Of the profile's file, which must be of the bench's model. */
static int layers_of(struct world *w) {
    fkv_profile *profile;
    fkv_profile_info info = {.struct_size = sizeof info};
    bench_check(w->ctx, fkv_profile_load_file(w->ctx, w->profile, &profile), "profile");
    bench_check(w->ctx, fkv_profile_query(profile, &info), "profile");
    if (info.n_q_heads != HQ || info.n_kv_heads != HK || info.head_dim != DIM) {
        bench_fail("%s is not of %d query heads, %d KV heads and dimension %d", w->profile, HQ, HK,
                   DIM);
    }
    fkv_profile_destroy(profile);
    return info.n_layers;
}

static void run_shape(struct world *w, const struct shape *shape, bool json) {
    struct side sides[2];
    const double dense = (double)shape->batch * (double)shape->tokens * HK * DIM * 4;
    w->shape = *shape;
    /* the coded side alone should be 4 times the cache, within what the memory holds of the dense one */
    w->layers = (int)fmin(64, ceil(300e6 / (dense / 12)));
    w->layers = (int)fmax(1, fmin(w->layers, 80e9 / dense));
    const char *name = "calibrated 12x";
    enum kind kind = CALIBRATED;
    if (w->profile) {
        const char *file = strrchr(w->profile, '/');
        kind = w->share >= 0.0 ? FOURIER : FROM_FILE;
        name = file ? file + 1 : w->profile;
        w->layers = kind == FROM_FILE ? layers_of(w) : w->layers;
    }
    open_side(w, &sides[0], "exact bf16", EXACT);
    open_side(w, &sides[1], name, kind);
    time_sides(w, sides, 2);
    const double reference = median(sides[0].seconds);
    print_side(w, &sides[0], reference, json);
    print_side(w, &sides[1], reference, json);
    if (!json) {
        check_side(w, &sides[0]);
        check_side(w, &sides[1]);
    }
    close_side(&sides[0]);
    close_side(&sides[1]);
}

static void fill_bf16(struct world *w, void *to, size_t n) {
    float *x = bench_alloc(n, sizeof(float));
    uint16_t *y = bench_alloc(n, sizeof(uint16_t));
    bench_random_fill(&w->random, x, n);
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], 4);
        y[i] = (uint16_t)(bits >> 16);
    }
    gpu_to_device(to, y, n * 2);
    free(x);
    free(y);
}

/* "fourier:SHARE[:BINS]", or a file's name. */
static void parse_profile(struct world *w, const char *profile) {
    w->profile = profile;
    w->share = -1.0;
    w->bins = 512;
    if (profile && !strncmp(profile, "fourier:", 8)) {
        char *end;
        w->share = strtod(profile + 8, &end);
        w->bins = *end == ':' ? (int)strtol(end + 1, &end, 10) : 512;
        if (*end || !(w->share >= 0.0 && w->share <= 1.0) || w->bins < 1) {
            bench_fail("--profile %s: fourier:SHARE[:BINS]", profile);
        }
    }
}

int bench_cuda(bool json, int batch, int64_t tokens, const char *profile) {
    static const struct shape all[] = {{1, 8192},    {1, 32768},  {1, 131072},
                                       {1, 1048576}, {16, 32768}, {8, 131072}};
    const struct shape one = {batch, tokens};
    struct world w = {.random = {1}};
    fkv_context_params p;
    char message[512] = "";
    const char *why;
    parse_profile(&w, profile);
    if (!gpu_open(0, &why)) {
        bench_fail("%s", why);
    }
    w.stream = gpu_stream_new();
    w.first = gpu_event_new();
    w.second = gpu_event_new();
    fkv_context_params_init(&p, sizeof p);
    p.backend = FKV_BACKEND_CUDA;
    p.stream = w.stream;
    p.message = message;
    p.message_bytes = sizeof message;
    if (fkv_context_create(&p, &w.ctx) != FKV_OK) {
        bench_fail("%s", message);
    }
    const size_t row = (size_t)HK * DIM;
    w.k = gpu_alloc(LONG_CHUNK * row * 2);
    w.v = gpu_alloc(LONG_CHUNK * row * 2);
    w.q = gpu_alloc((size_t)256 * HQ * DIM * 2);
    w.out = gpu_alloc((size_t)256 * HQ * DIM * 2);
    fill_bf16(&w, w.k, LONG_CHUNK * row);
    fill_bf16(&w, w.v, LONG_CHUNK * row);
    fill_bf16(&w, w.q, (size_t)256 * HQ * DIM);
    if (!json) {
        printf("%s, driver %d; Hq %d, Hk %d, D %d; medians of %d replays\n"
               "batch x tokens  held as               time      bytes    rate  of reading  ratio  "
               "append+code "
               "per token\n",
               gpu_name(), gpu_driver_version(), HQ, HK, DIM, REPEATS);
    }
    if (tokens) {
        run_shape(&w, &one, json);
    } else {
        for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
            run_shape(&w, &all[i], json);
        }
    }
    fkv_context_destroy(w.ctx);
    return 0;
}
