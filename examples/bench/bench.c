/* SPDX-License-Identifier: Apache-2.0 */
#include "bench.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum op { OP_ATTEND, OP_APPEND };

struct options {
    enum op op;
    int hq, hk, dim, batch, threads, repeats, layer;
    bool shape_given;
    int64_t tokens;
    const char *profile;
    fkv_dtype storage;
    fkv_cpu_level cpu_level;
    uint64_t seed;
    bool json, check, select, index, cuda, tokens_given, profile_given;
};

static const char usage[] =
    "Usage: fkv-bench [OPTION ...]\n"
    "Times one layer's decode step or append, held as asked and dense in bf16, in turns.\n"
    "\n"
    "  --op attend|append     what to time: one new token for each sequence, or storing\n"
    "                         and coding all tokens (default attend)\n"
    "  --profile PROFILE      exact | fourier:SHARE[:BINS] with SHARE of the channels coded\n"
    "                         (BINS default 512) | coded:RATE, calibrated with random\n"
    "                         carriers and bits of 0, 2 and 4, RATE bits for an element |\n"
    "                         uniform:BITS | FILE, a profile as JSON\n"
    "                         (default fourier:0.8)\n"
    "  --select               attend with selection, within 8192 tokens, to keys held\n"
    "                         unrotated (exact, coded: or uniform:); dense attends to all\n"
    "  --index                with an index of exact keys, for --select or --op append\n"
    "  --layer N              layer of FILE to take (default 0)\n"
    "  --storage f16|bf16|f32 type of what is held exactly (default f16; not with FILE)\n"
    "  --hq N --hk N --dim N  query heads, KV heads, head dimension (default 32 8 128; not\n"
    "                         with FILE)\n"
    "  --tokens N             tokens of each sequence (default 32768)\n"
    "  --batch N              sequences of a step (default 1)\n"
    "  --threads N            0: one for each processor (default 0)\n"
    "  --cpu best|reference|avx2|avx512\n"
    "                         instruction set (default best)\n"
    "  --backend cpu|cuda     where to run (default cpu). cuda: a decode step on a GPU, exact and\n"
    "                         calibrated, or fourier:SHARE[:BINS] or FILE; only --profile,\n"
    "                         --tokens, --batch and --json apply, and without --tokens a list\n"
    "                         of shapes is run\n"
    "  --repeats N            timed calls of each (default 51, for append 5)\n"
    "  --seed N               of the random keys, values and queries (default 1)\n"
    "  --no-check             do not compare outputs with float64 (which takes long for\n"
    "                         long coded sequences, as they are restored for it)\n"
    "  --json                 print one JSON object\n"
    "  --help                 print this\n"
    "\n"
    "Exit status: 0 done, 1 failed or outputs out of tolerance, 2 wrong usage.\n";

/* ---- command line */

static void usage_error(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

static void usage_error(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("fkv-bench: ", stderr);
    vfprintf(stderr, format, args);
    fputs("\nTry fkv-bench --help.\n", stderr);
    va_end(args);
    exit(2);
}

static void value_error(const char *option, const char *value) {
    usage_error("'%s' is no value for %s", value, option);
}

static int64_t integer(const char *option, const char *value, int64_t min, int64_t max) {
    char *end;
    errno = 0;
    long long x = strtoll(value, &end, 10);
    if (errno || end == value || *end || x < min || x > max)
        value_error(option, value);
    return x;
}

struct word {
    const char *name;
    int value;
};

static int one_of(const char *option, const char *value, const struct word *words) {
    for (; words->name; words++)
        if (!strcmp(value, words->name))
            return words->value;
    value_error(option, value);
    return 0;
}

static bool set_shape(struct options *o, const char *name, const char *value) {
    if (!strcmp(name, "--hq"))
        o->hq = (int)integer(name, value, 1, 1024);
    else if (!strcmp(name, "--hk"))
        o->hk = (int)integer(name, value, 1, 1024);
    else if (!strcmp(name, "--dim"))
        o->dim = (int)integer(name, value, 8, FKV_MAX_HEAD_DIM);
    else
        return false;
    o->shape_given = true;
    return true;
}

static bool set_word(struct options *o, const char *name, const char *value) {
    static const struct word ops[] = {{"attend", OP_ATTEND}, {"append", OP_APPEND}, {0}};
    static const struct word backends[] = {
        {"cpu", FKV_BACKEND_CPU}, {"cuda", FKV_BACKEND_CUDA}, {0}};
    static const struct word types[] = {
        {"f16", FKV_DTYPE_F16}, {"bf16", FKV_DTYPE_BF16}, {"f32", FKV_DTYPE_F32}, {0}};
    static const struct word levels[] = {{"best", FKV_CPU_BEST},
                                         {"reference", FKV_CPU_REFERENCE},
                                         {"avx2", FKV_CPU_AVX2},
                                         {"avx512", FKV_CPU_AVX512},
                                         {0}};
    if (!strcmp(name, "--op"))
        o->op = (enum op)one_of(name, value, ops);
    else if (!strcmp(name, "--backend"))
        o->cuda = one_of(name, value, backends) == FKV_BACKEND_CUDA;
    else if (!strcmp(name, "--storage"))
        o->storage = one_of(name, value, types);
    else if (!strcmp(name, "--cpu"))
        o->cpu_level = one_of(name, value, levels);
    else
        return false;
    return true;
}

static bool set_number(struct options *o, const char *name, const char *value) {
    if (!strcmp(name, "--tokens")) {
        o->tokens = integer(name, value, 1, (int64_t)1 << 26);
        o->tokens_given = true;
    } else if (!strcmp(name, "--batch"))
        o->batch = (int)integer(name, value, 1, 4096);
    else if (!strcmp(name, "--threads"))
        o->threads = (int)integer(name, value, 0, 1024);
    else if (!strcmp(name, "--repeats"))
        o->repeats = (int)integer(name, value, 1, 1000000);
    else if (!strcmp(name, "--layer"))
        o->layer = (int)integer(name, value, 0, 1023);
    else if (!strcmp(name, "--seed"))
        o->seed = (uint64_t)integer(name, value, 0, INT64_MAX);
    else
        return false;
    return true;
}

static struct options parse(int argc, char **argv) {
    struct options o = {.hq = 32,
                        .hk = 8,
                        .dim = 128,
                        .batch = 1,
                        .tokens = 32768,
                        .profile = "fourier:0.8",
                        .seed = 1,
                        .check = true};
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = argv[i + 1];
        if (!strcmp(name, "--help")) {
            fputs(usage, stdout);
            exit(0);
        }
        if (!strcmp(name, "--json")) {
            o.json = true;
            continue;
        }
        if (!strcmp(name, "--select")) {
            o.select = true;
            continue;
        }
        if (!strcmp(name, "--index")) {
            o.index = true;
            continue;
        }
        if (!strcmp(name, "--no-check")) {
            o.check = false;
            continue;
        }
        if (!value)
            usage_error("%s: an unknown option, or its value is missing", name);
        i++;
        if (!strcmp(name, "--profile"))
            o.profile = value, o.profile_given = true;
        else if (!set_shape(&o, name, value) && !set_word(&o, name, value) &&
                 !set_number(&o, name, value))
            usage_error("unknown option %s", name);
    }
    if (o.hq % o.hk)
        usage_error("--hq is not a multiple of --hk");
    if (o.dim % 8)
        usage_error("--dim is not a multiple of 8");
    if (!o.repeats)
        o.repeats = o.op == OP_ATTEND ? 51 : 5;
    return o;
}

/* ---- profiles */

static void init_fourier(struct bench_model *model, const struct options *o, const char *rest,
                         struct bench_random *r) {
    char *end;
    double share = strtod(rest, &end);
    long bins = 512;

    if (end == rest || !(share >= 0 && share <= 1))
        value_error("--profile", o->profile);
    if (*end == ':') {
        rest = end + 1;
        bins = strtol(rest, &end, 10);
        if (end == rest)
            value_error("--profile", o->profile);
    }
    if (*end || bins < 1 || bins > 65536)
        value_error("--profile", o->profile);
    fkv_fourier_params_init(&model->fourier, sizeof(model->fourier));
    model->fourier.bins = (int32_t)bins;
    model->fourier.storage_dtype = o->storage ? o->storage : FKV_DTYPE_F16;
    bench_model_code(model, share, r);
}

/* "coded:RATE" or "uniform:BITS" */
static void init_calibrated(struct bench_model *model, const struct options *o, const char *rest,
                            struct bench_random *r) {
    bool uniform = *o->profile == 'u';
    char *end;
    double number = strtod(rest, &end);

    if (end == rest || *end || !(number >= 0 && number <= 16))
        value_error("--profile", o->profile);
    if (!(uniform ? bench_model_uniform(model, (int)number) && number == (int)number
                  : bench_model_calibrate(model, number, r)))
        value_error("--profile", o->profile);
}

static void set_selection(struct bench_model *model, const struct options *o) {
    if (o->select && (!model->calibrated || o->op != OP_ATTEND))
        usage_error("--select is for --op attend with profiles exact, coded: and uniform:");
    if (o->index && (!model->calibrated || (!o->select && o->op != OP_APPEND)))
        usage_error("--index is for --select, or for --op append with the same profiles");
    model->select = o->select;
    model->index = o->index;
    if (o->select || o->index)
        model->codec.domain = FKV_DOMAIN_UNROTATED;
}

static void init_model(struct bench_model *model, const struct options *o, fkv_context *ctx,
                       struct bench_random *r) {
    const double theta = 500000;
    static const struct {
        const char *prefix;
        void (*init)(struct bench_model *, const struct options *, const char *,
                     struct bench_random *);
    } forms[] = {{"fourier:", init_fourier},
                 {"coded:", init_calibrated},
                 {"uniform:", init_calibrated},
                 {"exact", NULL}};
    for (size_t i = 0; i < sizeof(forms) / sizeof(forms[0]); i++) {
        size_t length = strlen(forms[i].prefix);
        if (strncmp(o->profile, forms[i].prefix, length) != 0 ||
            (!forms[i].init && o->profile[length]))
            continue;
        bench_model_init(model, o->hq, o->hk, o->dim, theta);
        model->storage = o->storage ? o->storage : FKV_DTYPE_F16;
        if (forms[i].init)
            forms[i].init(model, o, o->profile + length, r);
        else if (o->select || o->index)
            bench_model_uniform(model, 16);
        set_selection(model, o);
        return;
    }
    if (o->shape_given || o->storage)
        usage_error("a profile's file states --hq, --hk, --dim and --storage itself");
    bench_model_load(model, ctx, o->profile, o->layer, theta);
    set_selection(model, o);
}

static fkv_context *make_context(const struct options *o, fkv_context_info *info) {
    char message[512] = "";
    fkv_context *ctx;
    fkv_context_params params;
    fkv_status status;

    fkv_context_params_init(&params, sizeof(params));
    params.threads = o->threads;
    params.cpu_level = o->cpu_level;
    params.message = message;
    params.message_bytes = sizeof(message);
    status = fkv_context_create(&params, &ctx);
    if (status)
        bench_fail("context: %s: %s", fkv_status_string(status), message);
    info->struct_size = sizeof(*info);
    bench_check(ctx, fkv_context_query(ctx, info), "context");
    return ctx;
}

/* ---- timing: the variants take turns, so that what disturbs the machine disturbs both */

static void time_attend(struct bench_variant *v, const struct options *o, struct bench_random *r) {
    size_t count = (size_t)o->batch * (size_t)v->model->hq * (size_t)v->model->dim;
    float *q = bench_alloc(count, sizeof(float)), *out = bench_alloc(count, sizeof(float));
    double ignored = 0;

    for (int i = 0; i < 2; i++) {
        for (int set = 0; set < v[i].sets; set++)
            bench_variant_fill(&v[i], set, r, &ignored, &ignored);
        fprintf(stderr, "filled %d x %d sequences of the %s variant\n", v[i].sets, o->batch,
                i ? "asked" : "dense");
        if (o->check)
            bench_variant_check(&v[i], 0, r);
    }
    bench_random_fill(r, q, count);
    for (int repeat = 0; repeat < o->repeats; repeat++)
        for (int i = 0; i < 2; i++)
            bench_variant_attend(&v[i], repeat % v[i].sets, q, out, &v[i].seconds[repeat],
                                 &v[i].plan_seconds[repeat]);
    free(q);
    free(out);
}

static void time_append(struct bench_variant *v, const struct options *o, struct bench_random *r) {
    for (int repeat = 0; repeat < o->repeats; repeat++) {
        for (int i = 0; i < 2; i++) {
            bench_variant_fill(&v[i], 0, r, &v[i].seconds[repeat], &v[i].plan_seconds[repeat]);
            if (o->check && repeat == o->repeats - 1)
                bench_variant_check(&v[i], 0, r);
            bench_variant_drop(&v[i], 0);
        }
        fprintf(stderr, "repeat %d of %d\n", repeat + 1, o->repeats);
    }
}

/* ---- results */

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

struct result {
    double median, fastest, plan_median, bytes_per_second, share, ratio;
};

static struct result result_of(struct bench_variant *v, const struct options *o, double bandwidth) {
    size_t n = (size_t)o->repeats;
    struct result r;
    qsort(v->seconds, n, sizeof(double), by_value);
    qsort(v->plan_seconds, n, sizeof(double), by_value);
    r.median = v->seconds[n / 2];
    r.fastest = v->seconds[0];
    r.plan_median = v->plan_seconds[n / 2];
    /* A decode step reads what is held; an append is compared by what came in, as 16-bit numbers. */
    r.bytes_per_second = (double)(o->op == OP_ATTEND ? v->bytes : v->dense_bytes) / r.median;
    r.share = r.bytes_per_second / bandwidth;
    r.ratio = v->bytes ? (double)v->dense_bytes / (double)v->bytes : 0;
    return r;
}

static const char *level_name(fkv_cpu_level level) {
    return level == FKV_CPU_AVX512 ? "avx512" : level == FKV_CPU_AVX2 ? "avx2" : "reference";
}

static void print_json_string(const char *s) {
    putchar('"');
    for (; *s; s++) {
        if (*s == '"' || *s == '\\')
            printf("\\%c", *s);
        else if ((unsigned char)*s < 0x20)
            printf("\\u%04x", *s);
        else
            putchar(*s);
    }
    putchar('"');
}

static void print_json_variant(const char *name, const struct bench_variant *v,
                               const struct result *r) {
    char error[32] = "null"; /* not checked, or not a number */
    if (v->tolerance > 0 && isfinite(v->max_error))
        snprintf(error, sizeof(error), "%.3g", v->max_error);
    printf(",\"%s\":{\"seconds\":%.9g,\"seconds_fastest\":%.9g,\"plan_seconds\":%.9g,"
           "\"bytes\":%llu,\"dense_bytes\":%llu,\"ratio\":%.6g,\"tokens_coded\":%lld,"
           "\"bytes_per_second\":%.6g,\"bandwidth_share\":%.4g,\"sets\":%d,"
           "\"max_error\":%s,\"max_output\":%.3g,\"tolerance\":%.3g}",
           name, r->median, r->fastest, r->plan_median, (unsigned long long)v->bytes,
           (unsigned long long)v->dense_bytes, r->ratio, (long long)v->tokens_coded,
           r->bytes_per_second, r->share, v->sets, error, v->max_output, v->tolerance);
}

static void print_json(const struct options *o, const fkv_context_info *info, double bandwidth,
                       const struct bench_variant *v, const struct result *r) {
    const struct bench_model *model = v[1].model;
    printf("{\"program\":\"fkv-bench\",\"version\":\"%s\",\"op\":\"%s\",\"backend\":\"cpu\","
           "\"cpu_level\":\"%s\",\"threads\":%d,\"hq\":%d,\"hk\":%d,\"dim\":%d,\"tokens\":%lld,"
           "\"batch\":%d,\"repeats\":%d,\"seed\":%llu,\"cache_bytes\":%llu,"
           "\"read_bytes_per_second\":%.6g,\"profile\":",
           fkv_version_string(), o->op == OP_ATTEND ? "attend" : "append",
           level_name(info->cpu_level), info->threads, model->hq, model->hk, model->dim,
           (long long)o->tokens, o->batch, o->repeats, (unsigned long long)o->seed,
           (unsigned long long)bench_cache_bytes(), bandwidth);
    print_json_string(o->profile);
    print_json_variant("dense", &v[0], &r[0]);
    print_json_variant("asked", &v[1], &r[1]);
    printf(",\"speedup\":%.4g}\n", r[0].median / r[1].median);
}

static void print_table(const struct options *o, const fkv_context_info *info, double bandwidth,
                        const struct bench_variant *v, const struct result *r) {
    const struct bench_model *model = v[1].model;
    const char *file = strrchr(o->profile, '/');
    const char *names[2] = {"dense bf16", file ? file + 1 : o->profile};
    printf("%s: Hq %d, Hk %d, D %d, %d x %lld tokens; %s, %d threads, medians of %d\n",
           o->op == OP_ATTEND ? "attend, one new token" : "append", model->hq, model->hk,
           model->dim, o->batch, (long long)o->tokens, level_name(info->cpu_level), info->threads,
           o->repeats);
    printf("read bandwidth of the machine: %.2f GB/s\n\n", bandwidth * 1e-9);
    printf("%-20s %11s %11s %9s %12s %6s %8s %9s %10s\n", "", "ms", "fastest ms", "plan ms",
           "held bytes", "ratio", "GB/s", "of read", "max error");
    for (int i = 0; i < 2; i++) {
        printf("%-20s %11.4f %11.4f %9.4f %12llu %6.2f %8.2f %8.1f%%", names[i], r[i].median * 1e3,
               r[i].fastest * 1e3, r[i].plan_median * 1e3, (unsigned long long)v[i].bytes,
               r[i].ratio, r[i].bytes_per_second * 1e-9, r[i].share * 100);
        if (o->check)
            printf(" %10.2g\n", v[i].max_error);
        else
            printf(" %10s\n", "-");
    }
    printf("\n%.2f times as fast as dense, %.2f times smaller.\n", r[0].median / r[1].median,
           (double)v[0].bytes / (double)v[1].bytes);
    if (!o->check)
        printf("The outputs were not checked.\n");
    if (o->op == OP_APPEND)
        printf("GB/s count the keys and values that came in, as 16-bit numbers.\n");
}

int main(int argc, char **argv) {
    struct options o = parse(argc, argv);
    if (o.cuda)
        return bench_cuda(o.json, o.batch, o.tokens_given ? o.tokens : 0,
                          o.profile_given ? o.profile : NULL);
    struct bench_random r = {o.seed};
    struct bench_model models[2];
    struct bench_variant v[2];
    struct result results[2];
    fkv_context_info info;
    fkv_context *ctx = make_context(&o, &info);
    uint64_t caches = bench_cache_bytes();
    size_t buffer = caches > (uint64_t)128 << 20 ? 4 * (size_t)caches : (size_t)512 << 20;
    bool wrong = false;

    init_model(&models[1], &o, ctx, &r);
    models[0] = models[1];
    models[0].coded = models[0].calibrated = models[0].select = models[0].index = false;
    models[0].storage = FKV_DTYPE_BF16;
    fprintf(stderr, "measuring the read bandwidth\n");
    double bandwidth = bench_read_bandwidth(info.threads, buffer);
    for (int i = 0; i < 2; i++)
        bench_variant_init(&v[i], ctx, &models[i], o.tokens, o.batch, o.op == OP_APPEND, o.repeats);
    (o.op == OP_ATTEND ? time_attend : time_append)(v, &o, &r);
    if ((models[1].coded || models[1].calibrated) && !v[1].tokens_coded)
        fprintf(stderr, "note: so few tokens all stay exact\n");
    for (int i = 0; i < 2; i++)
        results[i] = result_of(&v[i], &o, bandwidth);
    (o.json ? print_json : print_table)(&o, &info, bandwidth, v, results);
    for (int i = 0; i < 2; i++) {
        if (!(v[i].max_error <= v[i].tolerance)) {
            fprintf(stderr, "fkv-bench: the %s variant is off by %g, more than %g\n",
                    i ? "asked" : "dense", v[i].max_error, v[i].tolerance);
            wrong = true;
        }
        bench_variant_free(&v[i]);
    }
    bench_model_free(&models[1]);
    fkv_context_destroy(ctx);
    return wrong;
}
