/* SPDX-License-Identifier: Apache-2.0 */
/* Finding, loading and refusing the module; the messages when something is missing. Needs no GPU. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "fkv/fkv.h"

#include <stdlib.h>
#include <string.h>

static const char *module_path; /* NULL: not built */
static const char *foreign_path;

static fkv_status try_open(const char *path, int32_t device, char message[512]) {
    fkv_context_params p;
    fkv_context *ctx = (fkv_context *)(uintptr_t)1;
    assert_int_equal(fkv_context_params_init(&p, sizeof p), FKV_OK);
    p.backend = FKV_BACKEND_CUDA;
    p.module_path = path;
    p.device_id = device;
    p.message = message;
    p.message_bytes = 512;
    message[0] = '\0';
    fkv_status status = fkv_context_create(&p, &ctx);
    if (status == FKV_OK) {
        fkv_context_info info = {.struct_size = sizeof info};
        assert_int_equal(fkv_context_query(ctx, &info), FKV_OK);
        assert_int_equal(info.backend, FKV_BACKEND_CUDA);
        assert_int_equal(fkv_context_synchronize(ctx), FKV_OK);
        assert_int_equal(fkv_context_destroy(ctx), FKV_OK);
    } else {
        assert_null(ctx);
        assert_true(strlen(message) > 10);
    }
    return status;
}

static void assert_contains(const char *text, const char *part) {
    if (!strstr(text, part)) {
        fail_msg("\"%s\" does not contain \"%s\"", text, part);
    }
}

static void test_missing_module(void **state) {
    char message[512];
    (void)state;
    assert_int_equal(try_open("/nowhere/libfkv-cuda.so.0", 0, message), FKV_ERR_UNSUPPORTED);
    assert_contains(message, "/nowhere/libfkv-cuda.so.0");
}

static void test_foreign_module(void **state) {
    char message[512];
    (void)state;
    assert_int_equal(try_open(foreign_path, 0, message), FKV_ERR_VERSION);
    assert_contains(message, "no module of libfkv");
}

static void test_environment(void **state) {
    char message[512];
    (void)state;
    setenv("FKV_CUDA_MODULE", "relative.so", 1);
    assert_int_equal(try_open(NULL, 0, message), FKV_ERR_INVALID);
    assert_contains(message, "FKV_CUDA_MODULE");
    setenv("FKV_CUDA_MODULE", foreign_path, 1);
    assert_int_equal(try_open(NULL, 0, message), FKV_ERR_VERSION);
    unsetenv("FKV_CUDA_MODULE");
}

static void test_device(void **state) {
    char message[512];
    (void)state;
    if (!module_path) {
        skip();
    }
    fkv_status status = try_open(module_path, 0, message);
    if (status != FKV_OK) {
        assert_int_equal(status, FKV_ERR_DEVICE);
        assert_contains(message, "CUDA device 0");
    }
    assert_int_equal(try_open(module_path, 4711, message), FKV_ERR_DEVICE);
    assert_contains(message, "CUDA device 4711");
    assert_int_equal(try_open(module_path, -1, message), FKV_ERR_DEVICE);
}

/* Nothing of this changes what the CPU does; what belongs to CUDA is refused there. */
static void test_cpu(void **state) {
    fkv_context_params p;
    fkv_context *ctx;
    (void)state;
    assert_int_equal(fkv_context_create(NULL, &ctx), FKV_OK);
    assert_int_equal(fkv_context_set_stream(ctx, NULL), FKV_ERR_UNSUPPORTED);
    assert_int_equal(fkv_context_synchronize(ctx), FKV_OK);
    assert_int_equal(fkv_context_destroy(ctx), FKV_OK);
    assert_int_equal(fkv_context_set_stream(ctx, NULL), FKV_ERR_HANDLE);
    assert_int_equal(fkv_context_synchronize(ctx), FKV_ERR_HANDLE);
    assert_int_equal(fkv_context_params_init(&p, sizeof p), FKV_OK);
    p.device_id = 1;
    assert_int_equal(fkv_context_create(&p, &ctx), FKV_ERR_INVALID);
    p.device_id = 0;
    p.reserved = 1;
    assert_int_equal(fkv_context_create(&p, &ctx), FKV_ERR_UNSUPPORTED);
    assert_int_equal(fkv_plan_replayed(NULL), FKV_ERR_HANDLE);
}

/* Programs that were built before the struct grew. */
static void test_old_params(void **state) {
    fkv_context_params p;
    fkv_context *ctx;
    (void)state;
    memset(&p, 0xff, sizeof p);
    assert_int_equal(fkv_context_params_init(&p, offsetof(fkv_context_params, device_id)), FKV_OK);
    assert_int_equal(p.device_id, -1); /* not touched */
    assert_int_equal(fkv_context_create(&p, &ctx), FKV_OK);
    assert_int_equal(fkv_context_destroy(ctx), FKV_OK);
}

int main(int argc, char **argv) {
    foreign_path = argc > 1 ? realpath(argv[1], NULL) : NULL;
    module_path = argc > 2 ? realpath(argv[2], NULL) : NULL;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_missing_module),
        cmocka_unit_test(test_foreign_module),
        cmocka_unit_test(test_environment),
        cmocka_unit_test(test_device),
        cmocka_unit_test(test_cpu),
        cmocka_unit_test(test_old_params),
    };
    unsetenv("FKV_CUDA_MODULE");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
