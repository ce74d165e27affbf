/* SPDX-License-Identifier: Apache-2.0 */
/* The profile that test_profile.c and test_profile_text.c start from. cmocka.h comes first. */
#ifndef FKV_TESTS_SMALL_PROFILE_H
#define FKV_TESTS_SMALL_PROFILE_H

#include "fkv/fkv.h"

#include <stdlib.h>
#include <string.h>

enum { LAYERS = 2, HEADS = 2, DIM = 8, MASK = LAYERS * HEADS * DIM };

static fkv_context *ctx;
static const double inv_freq[4] = {1.0, 0.1, 1.0 / 3.0, 1e-5};
static const uint8_t k_mask[MASK] = {1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1};
static const uint8_t v_mask[MASK] = {[MASK - 1] = 1};

static inline fkv_model_params good_model(void) {
    fkv_model_params m;
    assert_int_equal(fkv_model_params_init(&m, sizeof m), FKV_OK);
    m.n_layers = LAYERS;
    m.n_q_heads = 6;
    m.n_kv_heads = HEADS;
    m.head_dim = DIM;
    m.rope_layout = FKV_ROPE_HALF_SPLIT;
    m.inv_freq = inv_freq;
    m.inv_freq_count = 4;
    m.model_id = "m\u00f6del \"1\"\n";
    return m;
}

static inline fkv_fourier_params good_fourier(void) {
    fkv_fourier_params f;
    assert_int_equal(fkv_fourier_params_init(&f, sizeof f), FKV_OK);
    return f;
}

static inline fkv_status make_fourier(fkv_context *context, fkv_profile **out) {
    fkv_model_params m = good_model();
    fkv_fourier_params f = good_fourier();
    return fkv_profile_create_fourier(context, &m, &f, k_mask, v_mask, MASK, out);
}

static inline void assert_message(const char *part) {
    char text[512];
    assert_int_equal(fkv_context_message(ctx, text, sizeof text, NULL), FKV_OK);
    if (!strstr(text, part)) {
        fail_msg("\"%s\" does not contain \"%s\"", text, part);
    }
}

/* The text of a profile, zero-terminated, to be freed. */
static inline char *text_of(fkv_profile *profile, size_t *bytes) {
    size_t got;
    assert_int_equal(fkv_profile_save(profile, NULL, 0, bytes), FKV_OK);
    char *text = calloc(1, *bytes + 1);
    assert_non_null(text);
    assert_int_equal(fkv_profile_save(profile, text, *bytes, &got), FKV_OK);
    assert_int_equal(got, *bytes);
    assert_int_equal(text[*bytes - 1], '\n');
    return text;
}

static inline void assert_same_text(fkv_profile *a, fkv_profile *b) {
    size_t n, m;
    char *x = text_of(a, &n), *y = text_of(b, &m);
    assert_string_equal(x, y);
    free(x);
    free(y);
}

#endif /* FKV_TESTS_SMALL_PROFILE_H */
