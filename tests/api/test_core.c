/* SPDX-License-Identifier: Apache-2.0 */
/* What every other room stands on: status, tensors, contexts, heap, conversions. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "core/core.h"
#include "kernels/kernels.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- status, version */

static void test_status_strings(void **state) {
    (void)state;
    assert_string_equal(fkv_status_string(FKV_OK), "FKV_OK");
    assert_string_equal(fkv_status_string(FKV_ERR_BUFFER), "FKV_ERR_BUFFER");
    for (int i = 0; i > FKV_ERR_BUFFER; i--) {
        assert_string_not_equal(fkv_status_string(i), fkv_status_string(i - 1));
    }
    const fkv_status unknown[] = {1, FKV_ERR_BUFFER - 1, INT32_MIN, INT32_MAX};
    for (size_t i = 0; i < 4; i++) {
        assert_string_equal(fkv_status_string(unknown[i]), "unknown status");
    }
    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", FKV_VERSION_MAJOR, FKV_VERSION_MINOR,
             FKV_VERSION_PATCH);
    assert_string_equal(fkv_version_string(), version);
    assert_int_equal(fkv_abi_version(), FKV_ABI_VERSION);
}

/* ---- tensors */

static void test_tensor_init(void **state) {
    (void)state;
    float data[24];
    fkv_tensor t, before;
    const int64_t shape[4] = {2, 3, 4, 1};
    assert_int_equal(fkv_tensor_init(&t, data, FKV_DTYPE_F32, 3, shape), FKV_OK);
    assert_int_equal(t.struct_size, sizeof t);
    assert_int_equal(t.byte_length, sizeof data);
    assert_int_equal(t.strides[0], 48);
    assert_int_equal(t.strides[1], 16);
    assert_int_equal(t.strides[2], 4);
    before = t;
    const int64_t negative[2] = {2, -1}, huge[3] = {INT64_MAX / 4, 2, 4}, none[2] = {0, 8};
    assert_int_equal(fkv_tensor_init(NULL, data, FKV_DTYPE_F32, 3, shape), FKV_ERR_INVALID);
    assert_int_equal(fkv_tensor_init(&t, data, FKV_DTYPE_F32, 3, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_tensor_init(&t, data, FKV_DTYPE_F32, 0, shape), FKV_ERR_INVALID);
    assert_int_equal(fkv_tensor_init(&t, data, FKV_DTYPE_F32, 5, shape), FKV_ERR_INVALID);
    assert_int_equal(fkv_tensor_init(&t, data, FKV_DTYPE_NONE, 3, shape), FKV_ERR_INVALID);
    assert_int_equal(fkv_tensor_init(&t, data, 99, 3, shape), FKV_ERR_INVALID);
    assert_int_equal(fkv_tensor_init(&t, data, FKV_DTYPE_F32, 2, negative), FKV_ERR_INVALID);
    assert_int_equal(fkv_tensor_init(&t, NULL, FKV_DTYPE_F32, 3, shape), FKV_ERR_INVALID);
    assert_int_equal(fkv_tensor_init(&t, data, FKV_DTYPE_F32, 3, huge), FKV_ERR_LIMIT);
    assert_memory_equal(&t, &before, sizeof t);
    assert_int_equal(fkv_tensor_init(&t, NULL, FKV_DTYPE_BF16, 2, none), FKV_OK);
    assert_int_equal(t.byte_length, 0);
}

#define VIEW(t, output) fkv_tensor_view(NULL, "x", t, 5, 3, 8, output, &view)

static void test_tensor_view(void **state) {
    (void)state;
    static _Alignas(64) uint16_t data[5 * 3 * 8 + 64];
    const int64_t shape[3] = {5, 3, 8};
    struct fkv_view view;
    fkv_tensor good, t;
    assert_int_equal(fkv_tensor_init(&good, data, FKV_DTYPE_F16, 3, shape), FKV_OK);
    assert_int_equal(VIEW(&good, true), FKV_OK);
    assert_ptr_equal(view.data, data);
    assert_int_equal(view.token_stride, 48);
    assert_int_equal(view.head_stride, 16);
    assert_int_equal(VIEW(NULL, false), FKV_ERR_INVALID);
#define REJECT(status, ...)                                                                        \
    do {                                                                                           \
        t = good;                                                                                  \
        __VA_ARGS__;                                                                               \
        assert_int_equal(VIEW(&t, true), status);                                                  \
    } while (0)
    REJECT(FKV_ERR_INVALID, t.struct_size = 0);
    REJECT(FKV_ERR_INVALID, t.struct_size--);
    REJECT(FKV_ERR_INVALID, t.dtype = FKV_DTYPE_NONE);
    REJECT(FKV_ERR_UNSUPPORTED, t.dtype = 4);
    REJECT(FKV_ERR_UNSUPPORTED, t.device = FKV_DEVICE_CUDA);
    REJECT(FKV_ERR_INVALID, t.device_id = 1);
    REJECT(FKV_ERR_UNSUPPORTED, t.reserved = 1);
    REJECT(FKV_ERR_INVALID, t.ndim = 2);
    REJECT(FKV_ERR_INVALID, t.shape[1] = 4);
    REJECT(FKV_ERR_INVALID, t.data = NULL);
    REJECT(FKV_ERR_INVALID, t.data = (char *)data + 1);
    REJECT(FKV_ERR_INVALID, t.byte_length--);
    REJECT(FKV_ERR_INVALID, t.byte_length = UINT64_MAX);
    REJECT(FKV_ERR_INVALID, t.strides[0] = 0);
    REJECT(FKV_ERR_INVALID, t.strides[0] = -48);
    REJECT(FKV_ERR_INVALID, t.strides[0] = 49);
    REJECT(FKV_ERR_INVALID, t.strides[2] = 4);
    REJECT(FKV_ERR_INVALID, t.strides[0] = INT64_MAX - 1);
    REJECT(FKV_ERR_INVALID, t.strides[1] = 14);             /* heads overlap */
    REJECT(FKV_ERR_INVALID, t.strides[0] = 40);             /* token 2 meets token 0's last head */
    REJECT(FKV_OK, t.strides[0] = 16; t.strides[1] = 80);   /* [heads, tokens, D] */
    REJECT(FKV_OK, t.strides[0] = 50; t.byte_length = 248); /* padded tokens */
    REJECT(FKV_OK, t.strides[0] = 16; t.strides[1] = 88; t.byte_length = 256);
#undef REJECT
    t = good;
    t.strides[1] = 14;
    assert_int_equal(VIEW(&t, false), FKV_OK); /* an input may overlap itself */
    /* strides of single and empty dimensions mean nothing */
    const int64_t one[3] = {1, 1, 8}, none[3] = {0, 3, 8};
    assert_int_equal(fkv_tensor_init(&t, data, FKV_DTYPE_F16, 3, one), FKV_OK);
    t.strides[0] = -7, t.strides[1] = 0;
    assert_int_equal(fkv_tensor_view(NULL, "x", &t, 1, 1, 8, true, &view), FKV_OK);
    assert_int_equal(view.head_stride, 16);
    assert_int_equal(fkv_tensor_init(&t, NULL, FKV_DTYPE_F16, 3, none), FKV_OK);
    assert_int_equal(fkv_tensor_view(NULL, "x", &t, 0, 3, 8, true, &view), FKV_OK);
    /* log-sum-exp: two dimensions, f32 only */
    const int64_t lse[2] = {5, 3};
    assert_int_equal(fkv_tensor_init(&t, data, FKV_DTYPE_F32, 2, lse), FKV_OK);
    assert_int_equal(fkv_tensor_view(NULL, "lse", &t, 5, 3, -1, true, &view), FKV_OK);
    assert_int_equal(view.head_stride, 4);
    t.dtype = FKV_DTYPE_F16;
    assert_int_equal(fkv_tensor_view(NULL, "lse", &t, 5, 3, -1, true, &view), FKV_ERR_INVALID);
}

/* Against a count of every byte, over all small strides. */
static void test_output_overlap(void **state) {
    (void)state;
    static uint16_t data[4096];
    for (int64_t a = 1; a <= 24; a++) {
        for (int64_t b = 1; b <= 24; b++) {
            uint8_t used[4096] = {0};
            bool overlap = false;
            for (int64_t i = 0; i < 4 * 5 * 3; i++) {
                uint8_t *element = &used[i / 15 * a + i / 3 % 5 * b + i % 3];
                overlap = overlap || *element;
                *element = 1;
            }
            fkv_tensor t = {.struct_size = sizeof t,
                            .dtype = FKV_DTYPE_F16,
                            .data = data,
                            .byte_length = sizeof data,
                            .ndim = 3,
                            .shape = {4, 5, 3},
                            .strides = {2 * a, 2 * b, 2}};
            struct fkv_view view;
            assert_int_equal(fkv_tensor_view(NULL, "x", &t, 4, 5, 3, true, &view),
                             overlap ? FKV_ERR_INVALID : FKV_OK);
        }
    }
}

/* ---- parameter structs */

struct small {
    uint32_t struct_size;
    int32_t a;
};
struct big {
    uint32_t struct_size;
    int32_t a;
    int64_t b, c;
};

static void test_params(void **state) {
    (void)state;
    struct big big = {sizeof big, 7, 8, 9}, got;
    struct small small = {sizeof small, 5};
    assert_int_equal(fkv_params_read(NULL, "p", &big, 8, &got, sizeof got), FKV_OK);
    assert_int_equal(got.c, 9);
    assert_int_equal(fkv_params_read(NULL, "p", &small, 8, &got, sizeof got), FKV_OK);
    assert_int_equal(got.a, 5);
    assert_int_equal(got.b | got.c, 0);
    assert_int_equal(got.struct_size, sizeof got);
    memset(&small, 0x55, sizeof small);
    assert_int_equal(fkv_params_read(NULL, "p", &big, 8, &small, sizeof small),
                     FKV_ERR_UNSUPPORTED);
    assert_int_equal(small.a, 0x55555555);
    big.b = 0, big.c = 1 << 24;
    assert_int_equal(fkv_params_read(NULL, "p", &big, 8, &small, sizeof small),
                     FKV_ERR_UNSUPPORTED);
    big.c = 0;
    assert_int_equal(fkv_params_read(NULL, "p", &big, 8, &small, sizeof small), FKV_OK);
    assert_int_equal(small.a, 7);
    const uint32_t wrong[] = {0, 4, 7, 4097, UINT32_MAX};
    for (size_t i = 0; i < 5; i++) {
        small.struct_size = wrong[i];
        assert_int_equal(fkv_params_read(NULL, "p", &small, 8, &got, sizeof got), FKV_ERR_INVALID);
        assert_int_equal(fkv_params_write(NULL, "p", &small, 8, &big, sizeof big), FKV_ERR_INVALID);
        assert_int_equal(fkv_params_init(&small, wrong[i], 8, &big, sizeof big), FKV_ERR_INVALID);
    }
    assert_int_equal(fkv_params_read(NULL, "p", NULL, 8, &got, sizeof got), FKV_ERR_INVALID);
    assert_int_equal(fkv_params_init(NULL, 8, 8, &big, sizeof big), FKV_ERR_INVALID);
    /* outputs: no more than the caller's size, which stays; what is unknown here becomes zero */
    struct small pair[2] = {{sizeof small, 0}, {1, 2}};
    big = (struct big){sizeof big, 3, 4, 5};
    assert_int_equal(fkv_params_write(NULL, "p", pair, 8, &big, sizeof big), FKV_OK);
    assert_int_equal(pair[0].struct_size, sizeof small);
    assert_int_equal(pair[0].a, 3);
    assert_int_equal(pair[1].struct_size, 1);
    memset(&got, 0x55, sizeof got);
    assert_int_equal(fkv_params_init(&got, sizeof got, 8, &pair[0], sizeof small), FKV_OK);
    assert_int_equal(got.struct_size, sizeof got);
    assert_int_equal(got.a, 3);
    assert_int_equal(got.b | got.c, 0);
}

/* ---- contexts and their heap */

/* Counts what the library asks of it; the allocation numbered `fail_at` fails, or all from there on. */
struct counter {
    long calls, fail_at;
    bool forever, crooked;
    int64_t blocks, bytes;
};

static void *counted_alloc(void *user, size_t bytes, size_t alignment) {
    struct counter *c = user;
    long call = c->calls++;
    if (call == c->fail_at || (c->forever && call > c->fail_at)) {
        return NULL;
    }
    char *p = aligned_alloc(alignment, (bytes + 2 * alignment - 1) / alignment * alignment);
    if (!p || alignment != 64) {
        abort();
    }
    c->blocks++;
    c->bytes += (int64_t)bytes;
    return c->crooked ? p + 32 : p;
}

static void counted_free(void *user, void *pointer, size_t bytes) {
    struct counter *c = user;
    c->blocks--;
    c->bytes -= (int64_t)bytes;
    free(c->crooked ? (char *)pointer - 32 : pointer);
}

static fkv_context_params counted_params(struct counter *c) {
    fkv_context_params p;
    assert_int_equal(fkv_context_params_init(&p, sizeof p), FKV_OK);
    p.alloc = counted_alloc;
    p.free = counted_free;
    p.alloc_user = c;
    p.threads = 2;
    return p;
}

static void test_context_errors(void **state) {
    (void)state;
    char message[128];
    fkv_context_params p;
    fkv_context *ctx;
    assert_int_equal(fkv_context_create(NULL, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_context_params_init(NULL, sizeof p), FKV_ERR_INVALID);
    /* the struct of the first release, which is the least there can be */
    const size_t first = offsetof(fkv_context_params, device_id);
    assert_int_equal(fkv_context_params_init(&p, first - 1), FKV_ERR_INVALID);
#define REJECT(status, ...)                                                                        \
    do {                                                                                           \
        assert_int_equal(fkv_context_params_init(&p, sizeof p), FKV_OK);                           \
        p.threads = 1;                                                                             \
        p.message = message;                                                                       \
        p.message_bytes = sizeof message;                                                          \
        message[0] = '\0';                                                                         \
        ctx = (fkv_context *)&p;                                                                   \
        __VA_ARGS__;                                                                               \
        assert_int_equal(fkv_context_create(&p, &ctx), status);                                    \
        assert_null(ctx);                                                                          \
    } while (0)
    REJECT(FKV_ERR_INVALID, p.struct_size = 0);
    REJECT(FKV_ERR_INVALID, p.struct_size = (uint32_t)first - 1);
    assert_string_equal(message, "");
    REJECT(FKV_ERR_UNSUPPORTED, p.backend = FKV_BACKEND_CUDA; p.module_path = "/nowhere/x.so");
    assert_non_null(strstr(message, "the CUDA module cannot be loaded: /nowhere/x.so"));
    REJECT(FKV_ERR_UNSUPPORTED, p.backend = FKV_BACKEND_CUDA; p.module_path = "/nowhere/x.so";
           p.message_bytes = 4);
    assert_string_equal(message, "the");
    REJECT(FKV_ERR_UNSUPPORTED, p.backend = FKV_BACKEND_CUDA; p.module_path = "/nowhere/x.so";
           p.message = NULL);
    REJECT(FKV_ERR_UNSUPPORTED, p.backend = -1);
    REJECT(FKV_ERR_UNSUPPORTED, p.cpu_level = 4);
    REJECT(FKV_ERR_UNSUPPORTED, p.cpu_level = -1);
    REJECT(FKV_ERR_UNSUPPORTED, p.flags = 2);
    REJECT(FKV_ERR_INVALID, p.threads = -1);
    REJECT(FKV_ERR_LIMIT, p.threads = 257);
    REJECT(FKV_ERR_INVALID, p.alloc = counted_alloc);
    REJECT(FKV_ERR_INVALID, p.free = counted_free);
    REJECT(FKV_ERR_LIMIT, p.max_bytes = 1);
    REJECT(FKV_ERR_LIMIT, p.max_tokens = UINT64_MAX);
    assert_true(strlen(message) > 0);
    if (fkv_cpu_best_level() < FKV_CPU_AVX512) {
        REJECT(FKV_ERR_UNSUPPORTED, p.cpu_level = FKV_CPU_AVX512);
    }
#undef REJECT
    struct {
        fkv_context_params known;
        uint64_t newer;
    } newer;
    assert_int_equal(fkv_context_params_init(&newer.known, sizeof newer), FKV_OK);
    assert_int_equal(newer.known.struct_size, sizeof newer);
    assert_int_equal(newer.newer, 0);
    newer.known.message = message;
    newer.known.message_bytes = sizeof message;
    newer.newer = 1;
    assert_int_equal(fkv_context_create(&newer.known, &ctx), FKV_ERR_UNSUPPORTED);
    assert_non_null(strstr(message, "beyond"));
    newer.newer = 0;
    assert_int_equal(fkv_context_create(&newer.known, &ctx), FKV_OK);
    assert_int_equal(fkv_context_destroy(ctx), FKV_OK);
}

static void test_context_query(void **state) {
    (void)state;
    struct counter c = {.fail_at = -1};
    for (fkv_cpu_level level = FKV_CPU_BEST; level <= fkv_cpu_best_level(); level++) {
        fkv_context_params p = counted_params(&c);
        p.cpu_level = level;
        fkv_context *ctx;
        assert_int_equal(fkv_context_create(&p, &ctx), FKV_OK);
        fkv_context_info info = {.struct_size = sizeof info};
        assert_int_equal(fkv_context_query(ctx, &info), FKV_OK);
        assert_int_equal(info.backend, FKV_BACKEND_CPU);
        assert_int_equal(info.threads, 2);
        assert_int_equal(info.best_cpu_level, fkv_cpu_best_level());
        assert_int_equal(info.cpu_level, level == FKV_CPU_BEST ? info.best_cpu_level : level);
        assert_int_equal(info.live_bytes, c.bytes);
        assert_true(info.peak_bytes >= info.live_bytes && info.live_bytes > 0);
        assert_true(info.has_cuda == 0 || info.has_cuda == 1); /* as it was built */
        info.struct_size = 8;
        assert_int_equal(fkv_context_query(ctx, &info), FKV_ERR_INVALID);
        assert_int_equal(fkv_context_query(ctx, NULL), FKV_ERR_INVALID);
        char text[64];
        size_t needed;
        assert_int_equal(fkv_context_message(ctx, NULL, 0, &needed), FKV_OK);
        assert_int_equal(fkv_context_message(ctx, text, sizeof text, NULL), FKV_OK);
        assert_string_equal(text, "info is NULL");
        assert_int_equal(needed, strlen(text) + 1);
        assert_int_equal(fkv_context_message(ctx, text, 5, &needed), FKV_ERR_BUFFER);
        assert_string_equal(text, "info");
        assert_int_equal(needed, 13);
        assert_int_equal(fkv_context_message(ctx, text, 0, NULL), FKV_ERR_BUFFER);
        assert_int_equal(fkv_context_message(ctx, NULL, 1, &needed), FKV_ERR_INVALID);
        assert_int_equal(fkv_context_message(ctx, NULL, 0, NULL), FKV_ERR_INVALID);
        assert_int_equal(fkv_context_destroy(ctx), FKV_OK);
        assert_int_equal(c.blocks, 0);
        assert_int_equal(c.bytes, 0);
    }
    fkv_context *ctx;
    fkv_context_info info = {.struct_size = sizeof info};
    assert_int_equal(fkv_context_create(NULL, &ctx), FKV_OK);
    assert_int_equal(fkv_context_query(ctx, &info), FKV_OK);
    assert_int_equal(info.threads, fkv_online_processors());
    assert_int_equal(fkv_context_destroy(ctx), FKV_OK);
}

static void test_context_out_of_memory(void **state) {
    (void)state;
    for (int forever = 0; forever < 2; forever++) {
        fkv_status status = FKV_ERR_NOMEM;
        for (long n = 0; status != FKV_OK; n++) {
            struct counter c = {.fail_at = n, .forever = forever};
            char message[64] = "";
            fkv_context_params p = counted_params(&c);
            p.message = message;
            p.message_bytes = sizeof message;
            fkv_context *ctx;
            status = fkv_context_create(&p, &ctx);
            if (status != FKV_OK) {
                assert_int_equal(status, FKV_ERR_NOMEM);
                assert_true(strlen(message) > 0);
            } else {
                assert_true(n >= 3); /* context, kernel table, pool */
                assert_int_equal(fkv_context_destroy(ctx), FKV_OK);
            }
            assert_int_equal(c.blocks, 0);
            assert_int_equal(c.bytes, 0);
        }
    }
    struct counter c = {.fail_at = -1, .crooked = true};
    fkv_context_params p = counted_params(&c);
    fkv_context *ctx;
    assert_int_equal(fkv_context_create(&p, &ctx), FKV_ERR_NOMEM);
    assert_int_equal(c.blocks, 0);
}

static void *allocate_much(void *p) {
    struct fkv_heap *heap = p;
    void *blocks[64];
    for (int round = 0; round < 200; round++) {
        for (int i = 0; i < 64; i++) {
            blocks[i] = fkv_heap_alloc(heap, 100);
        }
        for (int i = 0; i < 64; i++) {
            fkv_heap_free(heap, blocks[i], 100);
        }
    }
    return NULL;
}

static void test_heap_limit(void **state) {
    (void)state;
    struct fkv_heap heap = {.max_bytes = 5000};
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, allocate_much, &heap), 0);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
    }
    assert_int_equal(heap.live, 0);
    assert_int_equal(heap.peak, 5000);
    assert_null(fkv_heap_alloc(&heap, 0));
    assert_null(fkv_heap_alloc(&heap, 5001));
    assert_int_equal(fkv_heap_status(&heap, 5001), FKV_ERR_LIMIT);
    assert_int_equal(fkv_heap_status(&heap, 5000), FKV_ERR_NOMEM);
    heap.max_bytes = 0;
    const size_t huge[] = {SIZE_MAX, SIZE_MAX - 63, PTRDIFF_MAX, PTRDIFF_MAX - 64};
    for (size_t i = 0; i < 3; i++) {
        assert_null(fkv_heap_alloc(&heap, huge[i]));
    }
    unsigned char *p = fkv_heap_calloc(&heap, 1000);
    assert_non_null(p);
    for (int i = 0; i < 1000; i++) {
        assert_int_equal(p[i], 0);
    }
    assert_int_equal(heap.live, 1000);
    fkv_heap_free(&heap, p, 1000);
    fkv_heap_free(&heap, NULL, 7);
    assert_int_equal(heap.live, 0);
}

static void test_context_handles(void **state) {
    (void)state;
    fkv_context *ctx;
    int not_a_handle[16] = {0};
    assert_int_equal(fkv_context_create(NULL, &ctx), FKV_OK);
    assert_int_equal(fkv_context_destroy(NULL), FKV_OK);
    assert_int_equal(fkv_context_destroy((fkv_context *)not_a_handle), FKV_ERR_HANDLE);
    assert_int_equal(fkv_profile_destroy((fkv_profile *)ctx), FKV_ERR_HANDLE);
    assert_int_equal(fkv_context_destroy(ctx), FKV_OK);
    assert_int_equal(fkv_context_destroy(ctx), FKV_ERR_HANDLE);
    fkv_context_info info = {.struct_size = sizeof info};
    assert_int_equal(fkv_context_query(ctx, &info), FKV_ERR_HANDLE);
    assert_int_equal(fkv_context_query(NULL, &info), FKV_ERR_HANDLE);
    char text[8];
    assert_int_equal(fkv_context_message(ctx, text, sizeof text, NULL), FKV_ERR_HANDLE);
}

/* ---- conversions */

/* binary16 by its definition: sign, exponent, fraction. */
static double f16_value(uint16_t h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double magnitude = exponent == 31  ? (fraction ? (double)NAN : (double)INFINITY)
                       : exponent == 0 ? ldexp(fraction, -24)
                                       : ldexp(1024 + fraction, exponent - 25);
    return h >> 15 ? -magnitude : magnitude;
}

static uint32_t float_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float bits_float(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static void test_half_exhaustive(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float x = fkv_f16_to_f32((uint16_t)h);
        double expected = f16_value((uint16_t)h);
        if (isnan(expected)) {
            assert_true(isnan(x));
            assert_int_equal(fkv_f32_to_f16(x), h | 0x200u); /* quiet, payload kept */
        } else {
            assert_true((double)x == expected && !signbit(x) == !signbit(expected));
            assert_int_equal(fkv_f32_to_f16(x), h);
        }
        x = fkv_bf16_to_f32((uint16_t)h);
        assert_int_equal(float_bits(x), h << 16);
        assert_int_equal(fkv_f32_to_bf16(x), isnan(x) ? h | 0x40u : h);
    }
}

/* Between neighbours: below, at and above the midpoint. */
static void test_half_rounding(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 0x7c00; h++) {
        uint32_t even = h & 1 ? h + 1 : h;
        double above = h == 0x7bff ? 65536.0 : f16_value((uint16_t)(h + 1));
        float middle = (float)((f16_value((uint16_t)h) + above) / 2);
        assert_int_equal(fkv_f32_to_f16(middle), even);
        assert_int_equal(fkv_f32_to_f16(-middle), even | 0x8000u);
        assert_int_equal(fkv_f32_to_f16(nextafterf(middle, 0)), h);
        assert_int_equal(fkv_f32_to_f16(nextafterf(middle, INFINITY)), h + 1);
    }
    for (uint32_t h = 0; h < 0x7f80; h++) {
        float middle = bits_float(h << 16 | 0x8000u);
        assert_int_equal(fkv_f32_to_bf16(middle), h & 1 ? h + 1 : h);
        assert_int_equal(fkv_f32_to_bf16(bits_float(h << 16 | 0x7fffu)), h);
        assert_int_equal(fkv_f32_to_bf16(bits_float(h << 16 | 0x8001u)), h + 1);
    }
    assert_int_equal(fkv_f32_to_f16(3e38f), 0x7c00);
    assert_int_equal(fkv_f32_to_f16(-INFINITY), 0xfc00);
    assert_int_equal(fkv_f32_to_f16(bits_float(1)), 0);
}

static void test_elements(void **state) {
    (void)state;
    unsigned char buffer[8];
    const fkv_dtype types[] = {FKV_DTYPE_F32, FKV_DTYPE_F16, FKV_DTYPE_BF16};
    const size_t sizes[] = {4, 2, 2};
    for (int i = 0; i < 3; i++) {
        memset(buffer, 0xee, sizeof buffer);
        assert_int_equal(fkv_dtype_size(types[i]), sizes[i]);
        fkv_store_element(buffer + 1, types[i], -1.5f);
        assert_true(fkv_load_element(buffer + 1, types[i]) == -1.5f);
        assert_int_equal(buffer[0], 0xee);
        assert_int_equal(buffer[1 + sizes[i]], 0xee);
    }
    assert_int_equal(fkv_dtype_size(FKV_DTYPE_NONE), 0);
    assert_int_equal(fkv_dtype_size(4), 0);
    assert_int_equal(fkv_dtype_size(-1), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_status_strings),  cmocka_unit_test(test_tensor_init),
        cmocka_unit_test(test_tensor_view),     cmocka_unit_test(test_output_overlap),
        cmocka_unit_test(test_params),          cmocka_unit_test(test_context_errors),
        cmocka_unit_test(test_context_query),   cmocka_unit_test(test_context_out_of_memory),
        cmocka_unit_test(test_context_handles), cmocka_unit_test(test_heap_limit),
        cmocka_unit_test(test_half_exhaustive), cmocka_unit_test(test_half_rounding),
        cmocka_unit_test(test_elements),
    };
    return cmocka_run_group_tests_name("core", tests, NULL, NULL);
}
