/* SPDX-License-Identifier: Apache-2.0 */
/* Profiles: what makes them, their files, memory and limits. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "small_profile.h"

#include <dirent.h>
#include <jansson.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- making */

#define REJECT_MODEL(part, ...)                                                                    \
    do {                                                                                           \
        fkv_model_params m = good_model();                                                         \
        fkv_profile *p = (fkv_profile *)&m;                                                        \
        __VA_ARGS__;                                                                               \
        assert_int_equal(fkv_profile_create_exact(ctx, &m, FKV_DTYPE_F16, &p), FKV_ERR_INVALID);   \
        assert_null(p);                                                                            \
        assert_message(part);                                                                      \
    } while (0)

static void test_model_errors(void **state) {
    (void)state;
    const double bad[] = {NAN, INFINITY, -1.0, 1e7};
    double freq[4] = {1, 1, 1, 1};
    char id[257];
    memset(id, 'a', sizeof id);
    id[256] = '\0';
    REJECT_MODEL("struct_size", m.struct_size = 0);
    REJECT_MODEL("struct_size", m.struct_size = sizeof m - 8);
    REJECT_MODEL("model.n_layers", m.n_layers = 0);
    REJECT_MODEL("model.n_layers", m.n_layers = 1025);
    REJECT_MODEL("model.n_layers", m.n_layers = -1);
    REJECT_MODEL("model.n_q_heads", m.n_q_heads = 0);
    REJECT_MODEL("model.n_q_heads", m.n_q_heads = 1025);
    REJECT_MODEL("model.n_q_heads", m.n_q_heads = 7);
    REJECT_MODEL("model.n_kv_heads", m.n_kv_heads = 0);
    REJECT_MODEL("model.n_kv_heads", m.n_kv_heads = 12);
    REJECT_MODEL("model.n_kv_heads", m.n_kv_heads = INT32_MIN);
    REJECT_MODEL("model.head_dim", m.head_dim = 0);
    REJECT_MODEL("model.head_dim", m.head_dim = 12);
    REJECT_MODEL("model.head_dim", m.head_dim = 264);
    REJECT_MODEL("model.rope_layout", m.rope_layout = 3);
    REJECT_MODEL("model.rope_layout", m.rope_layout = -1);
    REJECT_MODEL("model.rope_dim", m.rope_dim = 7);
    REJECT_MODEL("model.rope_dim", m.rope_dim = 10);
    REJECT_MODEL("model.rope_dim", m.rope_dim = -2);
    REJECT_MODEL("model.rope_dim", m.rope_layout = FKV_ROPE_NONE; m.rope_dim = 8);
    REJECT_MODEL("model.inv_freq", m.rope_layout = FKV_ROPE_NONE);
    REJECT_MODEL("model.inv_freq", m.inv_freq_count = 3);
    REJECT_MODEL("model.inv_freq", m.rope_dim = 6);
    REJECT_MODEL("model.inv_freq", m.inv_freq = NULL);
    for (int i = 0; i < 4; i++) {
        freq[3] = bad[i];
        REJECT_MODEL("model.inv_freq[3]", m.inv_freq = freq);
        REJECT_MODEL("model.rope_scaling", m.rope_scaling = i == 3 ? 1e31 : bad[i]);
        REJECT_MODEL("model.softmax_scale", m.softmax_scale = i == 3 ? 1e-31 : bad[i]);
    }
    REJECT_MODEL("model.id", m.model_id = id);
    const char *not_utf8[] = {
        "\xff",         "\xc3", "\xc0\x80",      "\xed\xa0\x80",        "\xf4\x90\x80\x80",
        "\xe0\x9f\xbf", "\x80", "a\xf0\x9f\x98", "\xf8\x88\x80\x80\x80"};
    for (size_t i = 0; i < 9; i++) {
        REJECT_MODEL("not UTF-8", m.model_id = not_utf8[i]);
    }
    fkv_model_params m = good_model();
    fkv_profile *p;
    assert_int_equal(fkv_profile_create_exact(ctx, NULL, FKV_DTYPE_F16, &p), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_create_exact(ctx, &m, FKV_DTYPE_NONE, &p), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_create_exact(ctx, &m, 99, &p), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_create_exact(ctx, &m, FKV_DTYPE_F16, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_create_exact(NULL, &m, FKV_DTYPE_F16, &p), FKV_ERR_HANDLE);
}

#define REJECT_FOURIER(part, ...)                                                                  \
    do {                                                                                           \
        fkv_model_params m = good_model();                                                         \
        fkv_fourier_params f = good_fourier();                                                     \
        fkv_profile *p = (fkv_profile *)&m;                                                        \
        const uint8_t *k = k_mask, *v = v_mask;                                                    \
        size_t bytes = MASK;                                                                       \
        __VA_ARGS__;                                                                               \
        assert_int_equal(fkv_profile_create_fourier(ctx, &m, &f, k, v, bytes, &p),                 \
                         FKV_ERR_INVALID);                                                         \
        assert_null(p);                                                                            \
        assert_message(part);                                                                      \
    } while (0)

static void test_fourier_errors(void **state) {
    (void)state;
    uint8_t mask[MASK] = {[13] = 2};
    REJECT_FOURIER("struct_size", f.struct_size = 4);
    REJECT_FOURIER("fourier.storage_dtype", f.storage_dtype = FKV_DTYPE_NONE);
    REJECT_FOURIER("fourier.storage_dtype", f.storage_dtype = 4);
    REJECT_FOURIER("fourier.coefficient_dtype", f.coefficient_dtype = FKV_DTYPE_BF16);
    REJECT_FOURIER("fourier.bins", f.bins = 0);
    REJECT_FOURIER("fourier.bins", f.bins = 65537);
    REJECT_FOURIER("fourier.n_sink", f.n_sink = -1);
    REJECT_FOURIER("fourier.n_sink", f.n_sink = FKV_MAX_SINK + 1);
    REJECT_FOURIER("fourier.n_local", f.n_local = -1);
    REJECT_FOURIER("fourier.n_local", f.n_local = INT32_MAX);
    REJECT_FOURIER("fourier.restoration", f.restoration = 2);
    REJECT_FOURIER("fourier.outgrow", f.outgrow = -1);
    REJECT_FOURIER("fourier.period", f.period = 63);
    REJECT_FOURIER("fourier.period", f.period = INT64_MAX);
    REJECT_FOURIER("fourier.min_middle", f.min_middle = -1);
    REJECT_FOURIER("model.n_layers", m.n_layers = 0);
    REJECT_FOURIER("k_mask is NULL", k = NULL);
    REJECT_FOURIER("v_mask is NULL", v = NULL);
    REJECT_FOURIER("mask_bytes", bytes--);
    REJECT_FOURIER("mask_bytes", bytes = SIZE_MAX);
    REJECT_FOURIER("k_mask[13]", k = mask);
    REJECT_FOURIER("v_mask[13]", v = mask);
    fkv_model_params m = good_model();
    fkv_profile *p;
    assert_int_equal(fkv_profile_create_fourier(ctx, &m, NULL, k_mask, v_mask, MASK, &p),
                     FKV_ERR_INVALID);
    struct {
        fkv_fourier_params known;
        char newer[8];
    } newer = {.newer = {[3] = 1}};
    newer.known = good_fourier();
    newer.known.struct_size = sizeof newer;
    assert_int_equal(fkv_profile_create_fourier(ctx, &m, &newer.known, k_mask, v_mask, MASK, &p),
                     FKV_ERR_UNSUPPORTED);
    newer.newer[3] = 0;
    assert_int_equal(fkv_profile_create_fourier(ctx, &m, &newer.known, k_mask, v_mask, MASK, &p),
                     FKV_OK);
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
}

static void test_query(void **state) {
    (void)state;
    fkv_model_params m = good_model();
    fkv_profile_info info = {.struct_size = sizeof info};
    fkv_profile *p;
    uint8_t codes[HEADS * DIM + 1];
    assert_int_equal(fkv_profile_create_exact(ctx, &m, FKV_DTYPE_BF16, &p), FKV_OK);
    assert_int_equal(fkv_profile_query(p, &info), FKV_OK);
    assert_int_equal(info.coding, FKV_CODING_EXACT);
    assert_int_equal(info.storage_dtype, FKV_DTYPE_BF16);
    assert_int_equal(info.coefficient_dtype, FKV_DTYPE_NONE);
    assert_int_equal(info.bins | info.n_local | info.period | info.k_fourier_channels, 0);
    assert_int_equal(info.rope_dim, DIM);
    assert_true(fabs(info.softmax_scale - 1 / sqrt(8.0)) < 1e-15);
    assert_int_equal(fkv_profile_channels(p, 1, FKV_PART_V, codes, sizeof codes - 1), FKV_OK);
    for (int i = 0; i < HEADS * DIM; i++) {
        assert_int_equal(codes[i], FKV_CHANNEL_EXACT);
    }
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);

    assert_int_equal(make_fourier(ctx, &p), FKV_OK);
    assert_int_equal(fkv_profile_query(p, &info), FKV_OK);
    assert_int_equal(info.struct_size, sizeof info);
    assert_int_equal(info.coding, FKV_CODING_FOURIER);
    assert_int_equal(info.n_layers, LAYERS);
    assert_int_equal(info.n_q_heads, 6);
    assert_int_equal(info.bins, 512);
    assert_int_equal(info.n_sink, 4);
    assert_int_equal(info.n_local, 1024);
    assert_int_equal(info.period, 32768);
    assert_int_equal(info.min_middle, 1024);
    assert_int_equal(info.k_fourier_channels, 12);
    assert_int_equal(info.v_fourier_channels, 1);
    for (int layer = 0; layer < LAYERS; layer++) {
        for (int part = FKV_PART_K; part <= FKV_PART_V; part++) {
            const uint8_t *mask = (part == FKV_PART_K ? k_mask : v_mask) + layer * HEADS * DIM;
            codes[HEADS * DIM] = 0xee;
            assert_int_equal(fkv_profile_channels(p, layer, part, codes, sizeof codes), FKV_OK);
            for (int i = 0; i < HEADS * DIM; i++) {
                assert_int_equal(codes[i], mask[i] ? FKV_CHANNEL_FOURIER : FKV_CHANNEL_EXACT);
            }
            assert_int_equal(codes[HEADS * DIM], 0xee);
        }
    }
    assert_int_equal(fkv_profile_channels(p, -1, 0, codes, sizeof codes), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_channels(p, LAYERS, 0, codes, sizeof codes), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_channels(p, 0, 2, codes, sizeof codes), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_channels(p, 0, 0, NULL, sizeof codes), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_channels(p, 0, 0, codes, HEADS * DIM - 1), FKV_ERR_BUFFER);
    assert_int_equal(fkv_profile_query(p, NULL), FKV_ERR_INVALID);
    info.struct_size = 0;
    assert_int_equal(fkv_profile_query(p, &info), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
}

static void test_handles(void **state) {
    (void)state;
    fkv_context *other;
    fkv_profile *p, *none;
    fkv_profile_info info = {.struct_size = sizeof info};
    size_t n;
    assert_int_equal(fkv_context_create(NULL, &other), FKV_OK);
    assert_int_equal(make_fourier(other, &p), FKV_OK);
    assert_int_equal(fkv_profile_query((fkv_profile *)other, &info), FKV_ERR_HANDLE);
    assert_int_equal(fkv_context_destroy((fkv_context *)p), FKV_ERR_HANDLE);
    assert_int_equal(fkv_context_destroy(other), FKV_OK);
    /* the profile keeps what it needs */
    assert_int_equal(fkv_profile_query(p, &info), FKV_OK);
    assert_int_equal(fkv_profile_save(p, NULL, 0, &n), FKV_OK);
    assert_int_equal(make_fourier(other, &none), FKV_ERR_HANDLE);
    assert_null(none);
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    assert_int_equal(fkv_profile_destroy(p), FKV_ERR_HANDLE);
    assert_int_equal(fkv_profile_query(p, &info), FKV_ERR_HANDLE);
    assert_int_equal(fkv_profile_save(p, NULL, 0, &n), FKV_ERR_HANDLE);
    assert_int_equal(fkv_profile_save_file(p, "x"), FKV_ERR_HANDLE);
    assert_int_equal(fkv_profile_channels(p, 0, 0, NULL, 0), FKV_ERR_HANDLE);
    assert_int_equal(fkv_profile_destroy(NULL), FKV_OK);
}

/* ---- files */

static char directory[64];

static const char *in_directory(const char *name) {
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

static int count_files(void) {
    int n = 0;
    DIR *dir = opendir(directory);
    assert_non_null(dir);
    while (readdir(dir)) {
        n++;
    }
    closedir(dir);
    return n - 2;
}

static void test_files(void **state) {
    (void)state;
    fkv_profile *p, *q;
    char path[128];
    strcpy(path, in_directory("profile.json"));
    assert_int_equal(make_fourier(ctx, &p), FKV_OK);
    assert_int_equal(fkv_profile_save_file(p, path), FKV_OK);
    assert_int_equal(fkv_profile_load_file(ctx, path, &q), FKV_OK);
    assert_same_text(p, q);
    assert_int_equal(fkv_profile_destroy(q), FKV_OK);
    assert_int_equal(fkv_profile_save_file(p, path), FKV_OK); /* replaces */
    assert_int_equal(count_files(), 1);

    assert_int_equal(fkv_profile_save_file(p, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_save_file(p, directory), FKV_ERR_IO);
    assert_message("not a regular file");
    assert_int_equal(fkv_profile_save_file(p, "/dev/null"), FKV_ERR_IO);
    assert_int_equal(fkv_profile_save_file(p, in_directory("none/x")), FKV_ERR_IO);
    assert_message("none/x: create: No such file or directory");
    assert_int_equal(fkv_profile_save_file(p, ""), FKV_ERR_IO);

    assert_int_equal(fkv_profile_load_file(ctx, NULL, &q), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_load_file(ctx, path, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_load_file(NULL, path, &q), FKV_ERR_HANDLE);
    assert_int_equal(fkv_profile_load_file(ctx, in_directory("none"), &q), FKV_ERR_IO);
    assert_message("none: open: No such file or directory");
    assert_int_equal(fkv_profile_load_file(ctx, directory, &q), FKV_ERR_IO);
    assert_int_equal(fkv_profile_load_file(ctx, "/dev/zero", &q), FKV_ERR_IO);
    assert_int_equal(mkfifo(in_directory("pipe"), 0600), 0);
    assert_int_equal(fkv_profile_load_file(ctx, in_directory("pipe"), &q), FKV_ERR_IO);
    assert_message("not a regular file");
    assert_int_equal(unlink(in_directory("pipe")), 0);
    assert_int_equal(truncate(path, 0), 0);
    assert_int_equal(fkv_profile_load_file(ctx, path, &q), FKV_ERR_FORMAT);
    assert_int_equal(truncate(path, (64 << 20) + 1), 0); /* sparse */
    assert_int_equal(fkv_profile_load_file(ctx, path, &q), FKV_ERR_LIMIT);
    assert_null(q);
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    assert_int_equal(unlink(path), 0);
}

/* A disk that is full in the middle of the text leaves the old file. */
static void test_failed_write(void **state) {
    (void)state;
    fkv_profile *p, *q;
    struct rlimit old, small;
    char path[128];
    strcpy(path, in_directory("profile.json"));
    assert_int_equal(make_fourier(ctx, &p), FKV_OK);
    assert_int_equal(fkv_profile_save_file(p, path), FKV_OK);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    small = old;
    small.rlim_cur = 100;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    fkv_status status = fkv_profile_save_file(p, path);
    setrlimit(RLIMIT_FSIZE, &old);
    signal(SIGXFSZ, handler);
    assert_int_equal(status, FKV_ERR_IO);
    assert_message("File too large");
    assert_int_equal(count_files(), 1);
    assert_int_equal(fkv_profile_load_file(ctx, path, &q), FKV_OK);
    assert_same_text(p, q);
    assert_int_equal(fkv_profile_destroy(q), FKV_OK);
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    assert_int_equal(unlink(path), 0);
}

/* ---- memory and limits */

struct faults {
    long calls, fail_at, blocks;
    bool forever;
};
static struct faults heap_faults, json_faults;

static bool fails(struct faults *f) {
    long call = f->calls++;
    return call == f->fail_at || (f->forever && call > f->fail_at);
}

static void *faulty_alloc(void *user, size_t bytes, size_t alignment) {
    void *p = fails(user) ? NULL : aligned_alloc(alignment, (bytes + 63) / 64 * 64);
    ((struct faults *)user)->blocks += p != NULL;
    return p;
}

static void faulty_free(void *user, void *pointer, size_t bytes) {
    (void)bytes;
    ((struct faults *)user)->blocks--;
    free(pointer);
}

/* Where the lexer of jansson 2.14 cannot enlarge its buffer, it goes on and reads and writes beyond it.
 * The buffer starts with 16 bytes and doubles: those requests are granted. */
static void *json_alloc(size_t bytes) {
    bool lexer = bytes >= 32 && (bytes & (bytes - 1)) == 0;
    void *p = !lexer && fails(&json_faults) ? NULL : malloc(bytes);
    json_faults.blocks += p != NULL;
    return p;
}

static void json_free(void *pointer) {
    json_faults.blocks -= pointer != NULL;
    free(pointer);
}

/* The library never touches jansson's allocator; this program does, to make it fail. */
static fkv_status all_of_it(fkv_context *context, const char *text, size_t n) {
    fkv_profile *p = NULL, *q = NULL;
    char path[128];
    strcpy(path, in_directory("oom.json"));
    fkv_status status = make_fourier(context, &p);
    if (status == FKV_OK) {
        status = fkv_profile_save_file(p, path);
    }
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    if (status == FKV_OK) {
        status = fkv_profile_load_file(context, path, &p);
        assert_int_equal(unlink(path), 0);
    }
    if (status == FKV_OK) {
        assert_int_equal(fkv_profile_destroy(p), FKV_OK);
        status = fkv_profile_load(context, text, n, &q);
    }
    if (status == FKV_OK) {
        assert_int_equal(fkv_profile_destroy(q), FKV_OK);
    }
    return status;
}

static void test_out_of_memory(void **state) {
    (void)state;
    fkv_profile *p;
    size_t n;
    assert_int_equal(make_fourier(ctx, &p), FKV_OK);
    char *text = text_of(p, &n);
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    fkv_context_params params;
    fkv_context *context;
    assert_int_equal(fkv_context_params_init(&params, sizeof params), FKV_OK);
    params.alloc = faulty_alloc;
    params.free = faulty_free;
    params.alloc_user = &heap_faults;
    params.threads = 1;
    heap_faults = (struct faults){.fail_at = -1};
    assert_int_equal(fkv_context_create(&params, &context), FKV_OK);
    long base = heap_faults.blocks;
    json_set_alloc_funcs(json_alloc, json_free);
    for (int mode = 0; mode < 4; mode++) {
        struct faults *faults = mode < 2 ? &heap_faults : &json_faults;
        fkv_status status = FKV_ERR_NOMEM;
        long count = 0;
        for (; status != FKV_OK; count++) {
            heap_faults = (struct faults){.fail_at = -1, .blocks = heap_faults.blocks};
            json_faults = (struct faults){.fail_at = -1};
            faults->fail_at = count;
            faults->forever = mode % 2;
            status = all_of_it(context, text, n);
            /* jansson takes some of its own failures for errors in the text */
            assert_true(status == FKV_OK || status == FKV_ERR_NOMEM ||
                        (mode >= 2 && status == FKV_ERR_FORMAT));
            assert_int_equal(heap_faults.blocks, base);
            assert_int_equal(json_faults.blocks, 0);
        }
        assert_true(count > 10);
    }
    json_set_alloc_funcs(malloc, free);
    assert_int_equal(fkv_context_destroy(context), FKV_OK);
    assert_int_equal(heap_faults.blocks, 0);
    assert_int_equal(count_files(), 0);
    free(text);
}

static void test_limits(void **state) {
    (void)state;
    fkv_context *context;
    fkv_context_params params;
    fkv_context_info info = {.struct_size = sizeof info};
    fkv_profile *p;
    size_t n;
    assert_int_equal(make_fourier(ctx, &p), FKV_OK);
    char *text = text_of(p, &n);
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    assert_int_equal(fkv_context_params_init(&params, sizeof params), FKV_OK);
    params.threads = 1;
    assert_int_equal(fkv_context_create(&params, &context), FKV_OK);
    assert_int_equal(fkv_context_query(context, &info), FKV_OK);
    assert_int_equal(fkv_context_destroy(context), FKV_OK);
    params.max_bytes = info.live_bytes + 200;
    params.max_file_bytes = n;
    assert_int_equal(fkv_context_create(&params, &context), FKV_OK);
    assert_int_equal(make_fourier(context, &p), FKV_ERR_LIMIT);
    assert_int_equal(fkv_profile_load(context, text, n, &p), FKV_ERR_LIMIT);
    assert_int_equal(fkv_context_query(context, &info), FKV_OK);
    assert_true(info.peak_bytes <= params.max_bytes);
    assert_int_equal(fkv_context_destroy(context), FKV_OK);
    params.max_bytes = 0;
    assert_int_equal(fkv_context_create(&params, &context), FKV_OK);
    assert_int_equal(fkv_profile_load(context, text, n, &p), FKV_OK);
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    assert_int_equal(fkv_context_destroy(context), FKV_OK);
    params.max_file_bytes = n - 1;
    assert_int_equal(fkv_context_create(&params, &context), FKV_OK);
    assert_int_equal(fkv_profile_load(context, text, n, &p), FKV_ERR_LIMIT);
    assert_int_equal(fkv_context_destroy(context), FKV_OK);
    /* a text whose tree would take far more memory than the text */
    params.max_file_bytes = 1 << 20;
    char *dense = malloc(1 << 20);
    assert_non_null(dense);
    for (size_t i = 0; i < 1 << 20; i += 4) {
        memcpy(dense + i, i == 0 ? "[[]," : "[[]]", 4);
        dense[i + 3] = ',';
    }
    assert_int_equal(fkv_context_create(&params, &context), FKV_OK);
    assert_int_equal(fkv_profile_load(context, dense, 1 << 20, &p), FKV_ERR_LIMIT);
    assert_int_equal(fkv_context_destroy(context), FKV_OK);
    free(dense);
    free(text);
}

static void *use_shared(void *profile) {
    fkv_profile_info info = {.struct_size = sizeof info};
    size_t faults = 0, n;
    for (int i = 0; i < 50; i++) {
        faults += fkv_profile_query(profile, &info) != FKV_OK;
        faults += fkv_profile_save(profile, NULL, 0, &n) != FKV_OK;
        faults += fkv_profile_channels(profile, 5, 0, NULL, 0) != FKV_ERR_INVALID;
    }
    return (void *)faults;
}

static void test_threads(void **state) {
    (void)state;
    fkv_profile *p;
    pthread_t threads[4];
    assert_int_equal(make_fourier(ctx, &p), FKV_OK);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, use_shared, p), 0);
    }
    for (int i = 0; i < 4; i++) {
        void *faults;
        pthread_join(threads[i], &faults);
        assert_null(faults);
    }
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
}

static int open_all(void **state) {
    (void)state;
    fkv_context_params params;
    strcpy(directory, "/tmp/fkv-test-XXXXXX");
    return fkv_context_params_init(&params, sizeof params) != FKV_OK || !mkdtemp(directory) ||
           fkv_context_create(&params, &ctx) != FKV_OK;
}

static int close_all(void **state) {
    (void)state;
    fkv_context_info info = {.struct_size = sizeof info};
    fkv_status status = fkv_context_query(ctx, &info);
    return status != FKV_OK || fkv_context_destroy(ctx) != FKV_OK || rmdir(directory) != 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_model_errors),  cmocka_unit_test(test_fourier_errors),
        cmocka_unit_test(test_query),         cmocka_unit_test(test_handles),
        cmocka_unit_test(test_files),         cmocka_unit_test(test_failed_write),
        cmocka_unit_test(test_out_of_memory), cmocka_unit_test(test_limits),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests_name("profile", tests, open_all, close_all);
}
