/* SPDX-License-Identifier: Apache-2.0 */
/* Channel lists as published with FourierAttention, in both layouts. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "fkv/fkv.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADS = 2, DIM = 8, CHANNELS = HEADS * DIM };

static fkv_context *ctx;

static fkv_model_params model_of(int layers, int kv_heads, int dim) {
    fkv_model_params m;
    assert_int_equal(fkv_model_params_init(&m, sizeof m), FKV_OK);
    m.n_layers = layers;
    m.n_q_heads = kv_heads;
    m.n_kv_heads = kv_heads;
    m.head_dim = dim;
    return m;
}

static fkv_status import_text(const fkv_model_params *model, const char *text, size_t bytes,
                              double fraction, fkv_profile **out) {
    fkv_fourier_params f;
    assert_int_equal(fkv_fourier_params_init(&f, sizeof f), FKV_OK);
    return fkv_profile_import_published(ctx, model, &f, text, bytes, fraction, out);
}

static fkv_status import_two_layers(const char *text, double fraction, fkv_profile **out) {
    fkv_model_params m = model_of(2, HEADS, DIM);
    fkv_status status = import_text(&m, text, strlen(text), fraction, out);
    assert_true((status == FKV_OK) == (*out != NULL));
    return status;
}

/* codes: 'f' and 'x' for each channel of a layer's part */
static void assert_codes(fkv_profile *profile, int layer, fkv_part part, const char *codes) {
    uint8_t got[CHANNELS];
    assert_int_equal(fkv_profile_channels(profile, layer, part, got, sizeof got), FKV_OK);
    for (int c = 0; c < CHANNELS; c++) {
        assert_int_equal(got[c], codes[c] == 'f' ? FKV_CHANNEL_FOURIER : FKV_CHANNEL_EXACT);
    }
}

static const char plain[] =
    "{\"Layer_1\": {\"self_attn.v_proj\": [], \"self_attn.k_proj\": [15]},"
    " \"Layer_0\": {\"self_attn.k_proj\": [9, 0, 7, 8],"
    " \"self_attn.v_proj\": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]}}";

/* The same channels. Layer 1: a head with none and, in V, all channels kept. */
static const char split[] =
    "{\"Layer_0\": {\"kc_list\": [0, 7, 8, 9], \"kc_h_list\": [2, 4],"
    " \"kn_list\": [1, 2, 3, 4, 5, 6, 10, 11, 12, 13, 14, 15], \"kn_h_list\": [6, 12],"
    " \"vc_list\": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], \"vc_h_list\": [8, 16],"
    " \"vn_list\": [], \"vn_h_list\": [0, 0]},"
    " \"Layer_1\": {\"kc_list\": [15], \"kc_h_list\": [0, 1],"
    " \"kn_list\": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], \"kn_h_list\": [8, 15],"
    " \"vc_list\": [], \"vc_h_list\": [0, 0],"
    " \"vn_list\": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],"
    " \"vn_h_list\": [8, 16]}}";

static void test_layouts(void **state) {
    (void)state;
    const char *texts[] = {plain, split};
    for (int i = 0; i < 2; i++) {
        fkv_profile *p;
        fkv_profile_info info = {.struct_size = sizeof info};
        assert_int_equal(import_two_layers(texts[i], 1.0, &p), FKV_OK);
        assert_codes(p, 0, FKV_PART_K, "fxxxxxxfffxxxxxx");
        assert_codes(p, 0, FKV_PART_V, "ffffffffffffffff");
        assert_codes(p, 1, FKV_PART_K, "xxxxxxxxxxxxxxxf");
        assert_codes(p, 1, FKV_PART_V, "xxxxxxxxxxxxxxxx");
        assert_int_equal(fkv_profile_query(p, &info), FKV_OK);
        assert_int_equal(info.coding, FKV_CODING_FOURIER);
        assert_int_equal(info.k_fourier_channels, 5);
        assert_int_equal(info.v_fourier_channels, 16);
        assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    }
}

static void test_fraction(void **state) {
    (void)state;
    fkv_profile *p;
    assert_int_equal(import_two_layers(plain, 0.5, &p), FKV_OK);
    assert_codes(p, 0, FKV_PART_K, "fxxxxxxxxfxxxxxx"); /* 9 and 0 have the least error */
    assert_codes(p, 0, FKV_PART_V, "ffffffffxxxxxxxx");
    assert_codes(p, 1, FKV_PART_K, "xxxxxxxxxxxxxxxf"); /* half of one rounds up */
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    assert_int_equal(import_two_layers(plain, 0.1, &p), FKV_OK);
    assert_codes(p, 0, FKV_PART_K, "xxxxxxxxxxxxxxxx");
    assert_codes(p, 0, FKV_PART_V, "ffxxxxxxxxxxxxxx");
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    const double bad[] = {0.0, -0.5, 1.0000001, NAN, INFINITY};
    for (int i = 0; i < 5; i++) {
        assert_int_equal(import_two_layers(plain, bad[i], &p), FKV_ERR_INVALID);
    }
    assert_int_equal(import_two_layers(split, 0.5, &p), FKV_ERR_INVALID);
}

static void test_arguments(void **state) {
    (void)state;
    fkv_profile *p;
    fkv_fourier_params f;
    fkv_model_params m = model_of(2, HEADS, DIM), wrong = model_of(2, HEADS, DIM + 1);
    size_t n = strlen(plain);
    assert_int_equal(fkv_fourier_params_init(&f, sizeof f), FKV_OK);
    assert_int_equal(fkv_profile_import_published(ctx, NULL, &f, plain, n, 1, &p), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_import_published(ctx, &wrong, &f, plain, n, 1, &p),
                     FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_import_published(ctx, &m, NULL, plain, n, 1, &p), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_import_published(ctx, &m, &f, NULL, n, 1, &p), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_import_published(ctx, &m, &f, plain, n, 1, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_import_published(NULL, &m, &f, plain, n, 1, &p), FKV_ERR_HANDLE);
    f.bins = 0;
    assert_int_equal(fkv_profile_import_published(ctx, &m, &f, plain, n, 1, &p), FKV_ERR_INVALID);
    assert_int_equal(import_text(&m, plain, SIZE_MAX, 1, &p), FKV_ERR_LIMIT);
}

static const struct {
    const char *text, *from, *to;
    fkv_status status;
    const char *message;
} edits[] = {
    {plain, "[9, 0", "[9, 9", FKV_ERR_FORMAT,
     "Layer_0.self_attn.k_proj[1]: channel 9 is listed twice"},
    {plain, "[9, 0", "[16, 0", FKV_ERR_MISMATCH, "Layer_0.self_attn.k_proj[0]: channel 16"},
    {plain, "[9, 0", "[-1, 0", FKV_ERR_FORMAT, "Layer_0.self_attn.k_proj[0]: -1"},
    {plain, "[9, 0", "[9.0, 0", FKV_ERR_FORMAT, "Layer_0.self_attn.k_proj[0]: real"},
    {plain, "[9, 0", "[9, null", FKV_ERR_FORMAT, "Layer_0.self_attn.k_proj[1]: null"},
    {plain, "[9, 0", "[9223372036854775807, 0", FKV_ERR_MISMATCH, "Layer_0.self_attn.k_proj[0]"},
    {plain, "[9, 0", "[9223372036854775808, 0", FKV_ERR_FORMAT, "too big"},
    {plain, "[15]", "15", FKV_ERR_FORMAT, "Layer_1.self_attn.k_proj: integer"},
    {plain, "\"self_attn.v_proj\": [], ", "", FKV_ERR_FORMAT, "Layer_1.self_attn.v_proj: nothing"},
    {plain, "\"self_attn.v_proj\": []", "\"kc_list\": []", FKV_ERR_FORMAT,
     "Layer_1.kc_list: unknown"},
    {plain, "Layer_1", "Layer_2", FKV_ERR_FORMAT, "Layer_1: missing"},
    {plain, "Layer_1", "Layer_01", FKV_ERR_FORMAT, "Layer_01: unknown key"},
    {plain, "Layer_1", "Layer_", FKV_ERR_FORMAT, "Layer_: unknown key"},
    {plain, "Layer_1", "layer_1", FKV_ERR_FORMAT, "layer_1: unknown key"},
    {plain, "Layer_1", "Layer_0", FKV_ERR_FORMAT, "duplicate"},
    {plain, "{\"Layer_1\"", "{\"Layer_2\": {}, \"Layer_1\"", FKV_ERR_MISMATCH,
     "Layer_2: the lists have 3"},
    {plain, "\"Layer_1\": {\"self_attn.v_proj\": [], \"self_attn.k_proj\": [15]},", "",
     FKV_ERR_MISMATCH, "Layer_1: the lists have 1"},
    {plain, "{\"self_attn.v_proj\": [], \"self_attn.k_proj\": [15]}", "[]", FKV_ERR_FORMAT,
     "Layer_1: array"},
    {plain, "[15]},", "[15]}, \"note\": 1,", FKV_ERR_FORMAT, "note: unknown key"},
    {plain, "}}", "}} x", FKV_ERR_FORMAT, "line 1"},
    {split, "[0, 7, 8, 9]", "[0, 7, 8]", FKV_ERR_FORMAT, "Layer_0.kc_h_list[1]: 4"},
    {split, "[0, 7, 8, 9]", "[0, 7, 8, 9, 10]", FKV_ERR_FORMAT,
     "Layer_0.kc_h_list[1]: ends at 4 of 5"},
    {split, "[0, 7, 8, 9]", "[0, 8, 7, 9]", FKV_ERR_FORMAT,
     "Layer_0.kc_list[1]: channel 8 is not one of head 0"},
    {split, "[0, 7, 8, 9]", "[0, 0, 8, 9]", FKV_ERR_FORMAT,
     "Layer_0.kc_list[1]: channel 0 is listed twice"},
    {split, "[0, 7, 8, 9]", "[0, 6, 8, 9]", FKV_ERR_FORMAT,
     "Layer_0.kn_list[5]: channel 6 is listed twice"},
    {split, "[0, 7, 8, 9]", "[0, 7, 8, 16]", FKV_ERR_MISMATCH, "Layer_0.kc_list[3]: channel 16"},
    {split, "[2, 4]", "[4, 2]", FKV_ERR_FORMAT, "Layer_0.kc_list[2]"},
    {split, "\"kn_h_list\": [6, 12]", "\"kn_h_list\": [6, 5]", FKV_ERR_FORMAT,
     "Layer_0.kn_h_list[1]: 5"},
    {split, "[2, 4]", "[3, 4]", FKV_ERR_FORMAT, "Layer_0.kc_list[2]"},
    {split, "[2, 4]", "[0, 2, 4]", FKV_ERR_MISMATCH, "Layer_0.kc_h_list: 3 heads"},
    {split, "[2, 4]", "[]", FKV_ERR_MISMATCH, "Layer_0.kc_h_list: 0 heads"},
    {split, "[2, 4]", "[-2, 4]", FKV_ERR_FORMAT, "Layer_0.kc_h_list[0]: -2"},
    {split, "[2, 4]", "[2, \"4\"]", FKV_ERR_FORMAT, "Layer_0.kc_h_list[1]: string"},
    {split, "[2, 4]", "[2, 4000000000000000000]", FKV_ERR_FORMAT, "Layer_0.kc_h_list[1]"},
    {split, "13, 14, 15], \"kn_h_list\": [6, 12]", "13, 14], \"kn_h_list\": [6, 11]",
     FKV_ERR_FORMAT, "Layer_0.kc_list: channel 15 is neither"},
    {split, "\"vn_h_list\": [0, 0]", "\"vn_h_lists\": [0, 0]", FKV_ERR_FORMAT,
     "Layer_0.vn_h_lists: unknown"},
    {split, ", \"vn_h_list\": [0, 0]", "", FKV_ERR_FORMAT, "Layer_0.vn_h_list: nothing"},
};

static void test_bad_lists(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof edits / sizeof edits[0]; i++) {
        const char *at = strstr(edits[i].text, edits[i].from);
        assert_non_null(at);
        char changed[2048], message[512];
        fkv_profile *p;
        snprintf(changed, sizeof changed, "%.*s%s%s", (int)(at - edits[i].text), edits[i].text,
                 edits[i].to, at + strlen(edits[i].from));
        fkv_status status = import_two_layers(changed, 1.0, &p);
        assert_int_equal(fkv_context_message(ctx, message, sizeof message, NULL), FKV_OK);
        if (status != edits[i].status || !strstr(message, edits[i].message)) {
            fail_msg("%s -> %s: %s, %s", edits[i].from, edits[i].to, fkv_status_string(status),
                     message);
        }
    }
}

static void test_other_geometry(void **state) {
    (void)state;
    const fkv_model_params others[] = {model_of(1, HEADS, DIM), model_of(3, HEADS, DIM),
                                       model_of(2, 1, DIM), model_of(2, 4, DIM)};
    const char *texts[] = {plain, split};
    for (int i = 0; i < 4; i++) {
        for (int t = 0; t < 2; t++) {
            if (t == 0 && i == 3) {
                continue; /* plain lists fit every larger layer */
            }
            fkv_profile *p;
            assert_int_equal(import_text(&others[i], texts[t], strlen(texts[t]), 1.0, &p),
                             FKV_ERR_MISMATCH);
        }
    }
}

static void test_damaged_text(void **state) {
    (void)state;
    const char *texts[] = {plain, split};
    for (int t = 0; t < 2; t++) {
        size_t n = strlen(texts[t]);
        fkv_profile *p;
        fkv_model_params m = model_of(2, HEADS, DIM);
        char *copy = malloc(n);
        assert_non_null(copy);
        memcpy(copy, texts[t], n);
        for (size_t i = 0; i < n; i++) {
            assert_int_equal(import_text(&m, copy, i, 1.0, &p), FKV_ERR_FORMAT);
            for (int bit = 0; bit < 8; bit++) {
                copy[i] = (char)(texts[t][i] ^ 1 << bit);
                fkv_status status = import_text(&m, copy, n, 1.0, &p);
                assert_true(status == FKV_OK || status == FKV_ERR_FORMAT ||
                            status == FKV_ERR_MISMATCH);
                assert_int_equal(fkv_profile_destroy(p), FKV_OK);
            }
            copy[i] = texts[t][i];
        }
        free(copy);
    }
}

/* ---- the real files, where they are at hand */

static char *read_real(const char *name, size_t *bytes) {
    const char *folder = getenv("FKV_PUBLISHED_DIR");
    char path[1024];
    snprintf(path, sizeof path, "%s/%s",
             folder ? folder : FKV_SOURCE_ROOT "/../shared/data/compressed_dims", name);
    FILE *file = fopen(path, "rb");
    if (!file) {
        print_message("not found: %s\n", path);
        skip();
    }
    char *text = malloc(2 << 20);
    assert_non_null(text);
    *bytes = fread(text, 1, 2 << 20, file);
    fclose(file);
    return text;
}

static void check_real(const char *stem, int layers, int64_t k_channels, int64_t v_channels) {
    static uint8_t codes[2][8 * 128];
    const fkv_model_params m = model_of(layers, 8, 128);
    fkv_profile *p[2];
    for (int i = 0; i < 2; i++) {
        char name[128];
        size_t n;
        snprintf(name, sizeof name, "%s%s.json", stem, i == 0 ? "" : "_splithead");
        char *text = read_real(name, &n);
        assert_int_equal(import_text(&m, text, n, 1.0, &p[i]), FKV_OK);
        free(text);
        fkv_profile_info info = {.struct_size = sizeof info};
        assert_int_equal(fkv_profile_query(p[i], &info), FKV_OK);
        assert_int_equal(info.k_fourier_channels, k_channels);
        assert_int_equal(info.v_fourier_channels, v_channels);
    }
    for (int layer = 0; layer < layers; layer++) {
        for (int part = 0; part < 2; part++) {
            for (int i = 0; i < 2; i++) {
                assert_int_equal(fkv_profile_channels(p[i], layer, part, codes[i], sizeof codes[i]),
                                 FKV_OK);
            }
            assert_memory_equal(codes[0], codes[1], sizeof codes[0]);
        }
    }
    assert_int_equal(fkv_profile_destroy(p[0]), FKV_OK);
    assert_int_equal(fkv_profile_destroy(p[1]), FKV_OK);
}

/* What the lists save at the published setting: 4 sinks, 1024 local tokens, 512 bins in f16. */
static void test_real_ratio(void **state) {
    static const struct {
        int64_t tokens;
        double ratio;
    } published[] = {{32768, 3.5}, {131072, 4.0}};
    const fkv_model_params m = model_of(32, 8, 128);
    fkv_profile *p;
    size_t n;
    (void)state;
    char *text = read_real("llama3.1-8b_compressed_dims_32k_1024states.json", &n);
    assert_int_equal(import_text(&m, text, n, 1.0, &p), FKV_OK);
    free(text);
    for (int i = 0; i < 2; i++) {
        fkv_stats stats = {.struct_size = sizeof stats};
        int64_t period = published[i].tokens - 4 - 1024;
        assert_int_equal(fkv_profile_estimate(p, published[i].tokens, period, &stats), FKV_OK);
        print_message("%lld tokens: %.3f times smaller\n", (long long)published[i].tokens,
                      stats.ratio);
        assert_true(stats.ratio > 0.98 * published[i].ratio);
        assert_true(stats.ratio < 1.02 * published[i].ratio);
    }
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
}

static void test_real_8b(void **state) {
    (void)state;
    check_real("llama3.1-8b_compressed_dims_32k_1024states", 32, 24160, 25996);
}

static void test_real_3b(void **state) {
    (void)state;
    check_real("llama3.2-3b_compressed_dims_32k_1024states", 28, 20884, 22720);
}

static int open_context(void **state) {
    (void)state;
    return fkv_context_create(NULL, &ctx);
}

static int close_context(void **state) {
    (void)state;
    return fkv_context_destroy(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layouts),        cmocka_unit_test(test_fraction),
        cmocka_unit_test(test_arguments),      cmocka_unit_test(test_bad_lists),
        cmocka_unit_test(test_other_geometry), cmocka_unit_test(test_damaged_text),
        cmocka_unit_test(test_real_8b),        cmocka_unit_test(test_real_ratio),
        cmocka_unit_test(test_real_3b),
    };
    return cmocka_run_group_tests_name("published", tests, open_context, close_context);
}
