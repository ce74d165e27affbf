/* SPDX-License-Identifier: Apache-2.0 */
/* The whole model through libfkv against its double-precision twin. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "forward64.h"
#include "tiny.h"

/* 192 bytes are used: a number is stated and asked for, so that attention has work to do. */
static const char text[] = "The cache keeps keys and values of every layer.\n"
                           "One of the special magic numbers for copper-window is: 4817305.\n"
                           "So the special magic number for copper-window is: 4817305.\n"
                           "Nothing else was said about it.\n";
enum { TOKENS = 192 };

static struct needle_model model;
static double *reference; /* [TOKENS, vocab] */

static size_t vocab_of(const struct needle_model *m) {
    return (size_t)m->config.vocab_size;
}

/* Logits of all tokens, given in steps of the sizes in `steps` (the last one is repeated). */
static float *engine_logits(const struct needle_model *m, fkv_dtype storage, const size_t *steps,
                            size_t n_steps, size_t n) {
    struct needle_error error = {""};
    struct needle_engine engine;
    fkv_context_params context_params;
    fkv_context *ctx;
    fkv_profile *profile;
    fkv_model_params params;
    assert_int_equal(fkv_context_params_init(&context_params, sizeof context_params), FKV_OK);
    context_params.threads = 2;
    assert_int_equal(fkv_context_create(&context_params, &ctx), FKV_OK);
    needle_model_params(m, &params);
    assert_int_equal(fkv_profile_create_exact(ctx, &params, storage, &profile), FKV_OK);
    assert_int_equal(needle_engine_open(&engine, m, ctx, &profile, 1, 0, &error), NEEDLE_OK);
    float *logits = malloc(n * vocab_of(m) * sizeof *logits);
    assert_non_null(logits);
    /* A sequence before it must leave no trace. */
    assert_int_equal(needle_engine_begin(&engine, 0, 0, &error), NEEDLE_OK);
    assert_int_equal(needle_engine_prefill(&engine, (const uint8_t *)text, 5, 2, &error),
                     NEEDLE_OK);
    assert_int_equal(needle_engine_begin(&engine, 0, 0, &error), NEEDLE_OK);
    for (size_t at = 0, step = 0; at < n; step++) {
        size_t count = steps[step < n_steps ? step : n_steps - 1];
        count = n - at < count ? n - at : count;
        assert_int_equal(needle_engine_forward(&engine, (const uint8_t *)text + at, count, count,
                                               logits + at * vocab_of(m), &error),
                         NEEDLE_OK);
        at += count;
    }
    needle_engine_close(&engine);
    assert_int_equal(fkv_profile_destroy(profile), FKV_OK);
    assert_int_equal(fkv_context_destroy(ctx), FKV_OK);
    return logits;
}

static double distance_from_reference(const float *logits, const double *expected, size_t count) {
    double worst = 0;
    for (size_t i = 0; i < count; i++) {
        assert_true(isfinite(logits[i]));
        worst = fmax(worst, fabs((double)logits[i] - expected[i]));
    }
    return worst;
}

static const size_t whole[] = {TOKENS};

static void test_reference_reads_the_number(void **state) {
    (void)state;
    /* The twin itself: each digit of the repeated number is the most likely next byte. */
    const char *answer = strstr(strstr(text, "4817305") + 7, "4817305");
    const size_t vocab = vocab_of(&model);
    size_t at = (size_t)(answer - text);
    assert_in_range(at, 100, TOKENS - 7);
    for (size_t i = 0; i < 7; i++) {
        const double *row = reference + (at + i - 1) * vocab;
        size_t best = 0;
        for (size_t j = 1; j < vocab; j++) {
            best = row[j] > row[best] ? j : best;
        }
        assert_int_equal(best, answer[i]);
    }
}

static void test_f32_storage(void **state) {
    (void)state;
    float *logits = engine_logits(&model, FKV_DTYPE_F32, whole, 1, TOKENS);
    double worst = distance_from_reference(logits, reference, TOKENS * vocab_of(&model));
    print_message("f32: largest error %.2e\n", worst);
    assert_true(worst < 1e-3);
    free(logits);
}

static void test_f16_storage(void **state) {
    (void)state;
    float *logits = engine_logits(&model, FKV_DTYPE_F16, whole, 1, TOKENS);
    double worst = distance_from_reference(logits, reference, TOKENS * vocab_of(&model));
    print_message("f16: largest error %.2e\n", worst);
    assert_true(worst < 2e-2);
    /* Storing in f16 cannot go unnoticed: if it does, something else was stored. */
    assert_true(worst > 1e-4);
    free(logits);
}

static void test_steps_make_no_difference(void **state) {
    (void)state;
    const size_t mixed[] = {7, 64, 1, 1, 3, 64, 52}, ones[] = {1};
    const size_t count = TOKENS * vocab_of(&model);
    float *at_once = engine_logits(&model, FKV_DTYPE_F32, whole, 1, TOKENS);
    float *in_steps = engine_logits(&model, FKV_DTYPE_F32, mixed, 7, TOKENS);
    float *one_by_one = engine_logits(&model, FKV_DTYPE_F32, ones, 1, TOKENS);
    double worst = 0;
    for (size_t i = 0; i < count; i++) {
        worst = fmax(worst, fabs((double)at_once[i] - (double)in_steps[i]));
        worst = fmax(worst, fabs((double)at_once[i] - (double)one_by_one[i]));
    }
    print_message("steps: largest difference %.2e\n", worst);
    assert_true(worst < 1e-4);
    free(at_once);
    free(in_steps);
    free(one_by_one);
}

/* Other shapes than the big model's: groups of 1, 2 and 4 heads, head_dim 8 and 16, untied. */
static void test_tiny_models(void **state) {
    (void)state;
    const struct tiny shapes[] = {
        {.dtype = FKV_DTYPE_F32, .kv_heads = 4, .head_dim = 8},
        {.dtype = FKV_DTYPE_F16, .kv_heads = 2, .head_dim = 8, .tied = true},
        {.dtype = FKV_DTYPE_BF16, .kv_heads = 1, .head_dim = 16, .indexed = true},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        enum { N = 60 };
        char dir[256];
        struct needle_model m;
        struct needle_error error;
        tiny_make_dir(dir, sizeof dir);
        tiny_write(dir, &shapes[i]);
        assert_int_equal(needle_model_load(dir, &m, &error), NEEDLE_OK);
        double *expected = malloc(N * vocab_of(&m) * sizeof *expected);
        assert_non_null(expected);
        assert_true(forward64(&m, (const uint8_t *)text, N, expected));
        const size_t steps[] = {17, 1, 30};
        float *logits = engine_logits(&m, FKV_DTYPE_F32, steps, 3, N);
        double largest = 0;
        for (size_t j = 0; j < N * vocab_of(&m); j++) {
            largest = fmax(largest, fabs(expected[j]));
        }
        assert_true(largest > 0.5);
        assert_true(distance_from_reference(logits, expected, N * vocab_of(&m)) < 1e-4 * largest);
        free(logits);
        free(expected);
        needle_model_free(&m);
        tiny_remove_dir(dir);
    }
}

static int load(void **state) {
    (void)state;
    struct needle_error error;
    if (needle_model_load(NEEDLE_MODEL_DIR, &model, &error)) {
        fprintf(stderr, "%s\n", error.text);
        return -1;
    }
    reference = malloc(TOKENS * vocab_of(&model) * sizeof *reference);
    needle_engine_threads(2);
    return reference && forward64(&model, (const uint8_t *)text, TOKENS, reference) ? 0 : -1;
}

static int unload(void **state) {
    (void)state;
    free(reference);
    needle_model_free(&model);
    return 0;
}

int main(void) {
    assert_true(sizeof text - 1 >= TOKENS);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference_reads_the_number),
        cmocka_unit_test(test_f32_storage),
        cmocka_unit_test(test_f16_storage),
        cmocka_unit_test(test_steps_make_no_difference),
        cmocka_unit_test(test_tiny_models),
    };
    return cmocka_run_group_tests(tests, load, unload);
}
