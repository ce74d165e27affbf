/* SPDX-License-Identifier: Apache-2.0 */
/* The JSON text of profiles: what is written can be read, and everything else is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "small_profile.h"

#include <locale.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>

static fkv_status load(const char *text, size_t bytes, fkv_profile **out) {
    /* a copy of exactly this size lets a sanitizer see every read beyond it */
    char *copy = malloc(bytes > 0 ? bytes : 1);
    assert_non_null(copy);
    memcpy(copy, text, bytes);
    fkv_status status = fkv_profile_load(ctx, copy, bytes, out);
    free(copy);
    assert_true((status == FKV_OK) == (*out != NULL));
    return status;
}

static void round_trip(fkv_profile *profile) {
    size_t n;
    char *text = text_of(profile, &n);
    fkv_profile *again;
    assert_int_equal(load(text, n, &again), FKV_OK);
    fkv_profile_info a = {.struct_size = sizeof a}, b = {.struct_size = sizeof b};
    assert_int_equal(fkv_profile_query(profile, &a), FKV_OK);
    assert_int_equal(fkv_profile_query(again, &b), FKV_OK);
    assert_memory_equal(&a, &b, sizeof a);
    assert_same_text(profile, again);
    assert_int_equal(fkv_profile_destroy(again), FKV_OK);
    assert_int_equal(fkv_profile_destroy(profile), FKV_OK);
    free(text);
}

static void test_round_trip(void **state) {
    (void)state;
    fkv_profile *p;
    uint32_t seed = 1;
    for (int i = 0; i < 60; i++) {
        double freq[FKV_MAX_HEAD_DIM / 2];
        static uint8_t masks[2 * 3 * 4 * FKV_MAX_HEAD_DIM];
        fkv_model_params m = good_model();
        fkv_fourier_params f = good_fourier();
        m.n_layers = 1 + i % 3;
        m.n_kv_heads = 1 + i % 4;
        m.n_q_heads = m.n_kv_heads * (1 + i % 5);
        m.head_dim = 8 * (1 + i * 7 % 32);
        m.rope_layout = i % 3;
        m.rope_dim = m.rope_layout == FKV_ROPE_NONE ? 0 : i % 2 ? m.head_dim / 4 * 2 : m.head_dim;
        m.inv_freq = freq;
        m.inv_freq_count = m.rope_dim / 2;
        m.rope_scaling = i % 4 ? 0.1 * i : 0;
        m.softmax_scale = i % 5 ? pow(3.0, -i) : 0;
        for (int j = 0; j < m.inv_freq_count; j++) {
            freq[j] = pow(10000.0 + i, -(double)j / m.inv_freq_count);
        }
        for (size_t j = 0; j < sizeof masks; j++) {
            seed = seed * 1664525u + 1013904223u;
            masks[j] = seed >> 30 == 0;
        }
        f.storage_dtype = FKV_DTYPE_F32 + i % 3;
        f.coefficient_dtype = FKV_DTYPE_F32 + i % 2;
        f.bins = 1 + i * 1000;
        f.period = 64 + ((int64_t)i << 30);
        f.restoration = i % 2;
        f.outgrow = i / 2 % 2;
        f.min_middle = i % 3 * 100;
        m.model_id = i % 2 ? NULL : "\xf0\x9f\x98\x80 \\ \x01";
        size_t n = (size_t)m.n_layers * (size_t)m.n_kv_heads * (size_t)m.head_dim;
        assert_int_equal(fkv_profile_create_fourier(ctx, &m, &f, masks, masks + n, n, &p), FKV_OK);
        round_trip(p);
        assert_int_equal(fkv_profile_create_exact(ctx, &m, f.storage_dtype, &p), FKV_OK);
        round_trip(p);
    }
}

static void test_save_buffers(void **state) {
    (void)state;
    fkv_profile *p;
    size_t n, needed;
    assert_int_equal(make_fourier(ctx, &p), FKV_OK);
    char *text = text_of(p, &n);
    memset(text, '#', n);
    needed = 0;
    assert_int_equal(fkv_profile_save(p, text, n - 1, &needed), FKV_ERR_BUFFER);
    assert_int_equal(needed, n);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(text[i], '#');
    }
    assert_int_equal(fkv_profile_save(p, NULL, 5, &needed), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_save(p, text, n, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    assert_int_equal(fkv_profile_load(ctx, NULL, 0, &p), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_load(ctx, text, n, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_load(NULL, text, n, &p), FKV_ERR_HANDLE);
    free(text);
}

/* Each entry changes the text of make_fourier() in one place. */
static const struct {
    const char *from, *to;
    fkv_status status;
    const char *message;
} edits[] = {
    {"\"format\": \"fkv-profile\",", "", FKV_ERR_FORMAT, "format: missing"},
    {"fkv-profile", "fkv-cache", FKV_ERR_FORMAT, "format: \"fkv-cache\""},
    {"\"version\": 1", "\"version\": 3", FKV_ERR_VERSION, "version: 3"},
    {"\"version\": 1", "\"version\": 3, \"future\": 0", FKV_ERR_VERSION, "version: 3"},
    {"\"version\": 1", "\"version\": 2", FKV_OK, ""},
    {"\"version\": 1", "\"version\": 1.0", FKV_ERR_FORMAT, "version: real, expected an integer"},
    {"\"version\": 1", "\"version\": 1, \"extra\": 0", FKV_ERR_FORMAT, "extra: unknown key"},
    {"\"version\": 1", "\"version\": 1, \"version\": 1", FKV_ERR_FORMAT, "duplicate"},
    {"\"model\"", "\"modell\"", FKV_ERR_FORMAT, "modell: unknown key"},
    {"\"id\": ", "\"id\": 5, \"x\": ", FKV_ERR_FORMAT, "model.x: unknown key"},
    {"\"n_layers\": 2", "\"n_layers\": 3", FKV_ERR_FORMAT, "layers: 2 entries, expected 3"},
    {"\"n_layers\": 2", "\"n_layers\": -1", FKV_ERR_FORMAT, "model.n_layers: -1"},
    {"\"n_layers\": 2", "\"n_layers\": 4294967298", FKV_ERR_FORMAT, "model.n_layers: 4294967298"},
    {"\"n_layers\": 2", "\"n_layers\": 9223372036854775808", FKV_ERR_FORMAT, "too big integer"},
    {"\"n_layers\": 2", "\"n_layers\": \"2\"", FKV_ERR_FORMAT, "model.n_layers: string"},
    {"\"n_layers\": 2", "\"n_layers\": null", FKV_ERR_FORMAT, "model.n_layers: null"},
    {"\"n_q_heads\": 6", "\"n_q_heads\": 7", FKV_ERR_FORMAT, "model.n_q_heads: 7"},
    {"\"n_kv_heads\": 2", "\"n_kv_heads\": 3", FKV_ERR_FORMAT,
     "layers[0].k: 2 entries, expected 3"},
    {"\"head_dim\": 8", "\"head_dim\": 16", FKV_ERR_FORMAT,
     "layers[0].k[0]: 8 characters, expected 16"},
    {"half_split", "half", FKV_ERR_FORMAT, "model.rope_layout: unknown name \"half\""},
    {"\"rope_dim\": 8", "\"rope_dim\": 6", FKV_ERR_FORMAT, "model.inv_freq: 4 entries, expected 3"},
    {"1.0000000000000001e-5", "NaN", FKV_ERR_FORMAT, "line "},
    {"1.0000000000000001e-5", "1e999", FKV_ERR_FORMAT, "overflow"},
    {"1.0000000000000001e-5", "-1", FKV_ERR_FORMAT, "model.inv_freq[3]"},
    {"1.0000000000000001e-5", "1,5", FKV_ERR_FORMAT, "model.inv_freq: 5 entries, expected 4"},
    {"1.0000000000000001e-5", "true", FKV_ERR_FORMAT, "model.inv_freq[3]: true"},
    {"\"rope_scaling\": 1.0", "\"rope_scaling\": -1.0", FKV_ERR_FORMAT, "model.rope_scaling"},
    {"\"rope_scaling\": 1.0", "\"rope_scaling\": []", FKV_ERR_FORMAT, "model.rope_scaling: array"},
    {"\"kind\": \"fourier\"", "\"kind\": \"exact\"", FKV_ERR_FORMAT,
     "coding.coefficients: unknown key"},
    {"\"kind\": \"fourier\"", "\"kind\": \"wavelet\"", FKV_ERR_FORMAT, "coding.kind"},
    {"\"storage\": \"f16\"", "\"storage\": \"f64\"", FKV_ERR_FORMAT, "coding.storage"},
    {"\"coefficients\": \"f16\"", "\"coefficients\": \"bf16\"", FKV_ERR_FORMAT,
     "coding.coefficient"},
    {"\"bins\": 512", "\"bins\": 0", FKV_ERR_FORMAT, "coding.bins: 0"},
    {"\"bins\": 512", "\"bins\": 5.5", FKV_ERR_FORMAT, "coding.bins: real"},
    {"\"n_sink\": 4", "\"n_sink\": 65", FKV_ERR_FORMAT, "coding.n_sink: 65"},
    {"\"period\": 32768", "\"period\": 1", FKV_ERR_FORMAT, "coding.period: 1"},
    {"\"outgrow\": \"segment\",", "", FKV_ERR_FORMAT, "coding.outgrow: missing"},
    {"\"layers\"", "\"layer\"", FKV_ERR_FORMAT, "layer: unknown key"},
    {"xxxxxxxf", "xxxxxxxg", FKV_ERR_FORMAT, "layers[1].v[1]: character 7"},
    {"xxxxxxxf", "xxxxxxx", FKV_ERR_FORMAT, "layers[1].v[1]: 7 characters, expected 8"},
    {"\"xxxxxxxf\"", "[]", FKV_ERR_FORMAT, "layers[1].v[1]: array, expected a string"},
    {"\"xxxxxxxf\"", "\"xxxxxxxf\", \"xxxxxxxx\"", FKV_ERR_FORMAT,
     "layers[1].v: 3 entries, expected 2"},
    {"\"k\"", "\"K\"", FKV_ERR_FORMAT, "layers[0].K: unknown key"},
    {"{\n   \"k\"", "7, {\n   \"k\"", FKV_ERR_FORMAT, "layers: 3 entries"},
    {"{\n \"format\"", "[{\n \"format\"", FKV_ERR_FORMAT, "line "},
    {"{\n \"format\"", "\xef\xbb\xbf{\n \"format\"", FKV_ERR_FORMAT, "line "},
    {"]\n}\n", "]\n} x", FKV_ERR_FORMAT, "end of file expected"},
    {"]\n}\n", "]\n}}", FKV_ERR_FORMAT, "end of file expected"},
    {"]\n}\n", "],\n}", FKV_ERR_FORMAT, "line "},
    {"]\n}\n", "]\n} \t\n\n", FKV_OK, ""},
    {"\"rope_dim\": 8", "\"rope_dim\": 0", FKV_OK, ""},
    {"\"rope_scaling\": 1.0", "\"rope_scaling\": 1", FKV_OK, ""},
};

static void test_bad_text(void **state) {
    (void)state;
    fkv_profile *good, *p;
    size_t n;
    assert_int_equal(make_fourier(ctx, &good), FKV_OK);
    char *text = text_of(good, &n);
    for (size_t i = 0; i < sizeof edits / sizeof edits[0]; i++) {
        const char *at = strstr(text, edits[i].from);
        if (!at) {
            fail_msg("\"%s\" is not in the text:\n%s", edits[i].from, text);
        }
        char changed[4096];
        int length = snprintf(changed, sizeof changed, "%.*s%s%s", (int)(at - text), text,
                              edits[i].to, at + strlen(edits[i].from));
        assert_true(length > 0 && length < (int)sizeof changed);
        fkv_status status = load(changed, (size_t)length, &p);
        if (status != edits[i].status) {
            fail_msg("%s -> %s: %s", edits[i].from, edits[i].to, fkv_status_string(status));
        }
        if (status == FKV_OK) {
            assert_same_text(good, p);
            assert_int_equal(fkv_profile_destroy(p), FKV_OK);
        } else {
            assert_message(edits[i].message);
        }
    }
    free(text);
    assert_int_equal(fkv_profile_destroy(good), FKV_OK);
}

static void test_hostile_text(void **state) {
    (void)state;
    fkv_profile *p;
    const char *texts[] = {"",
                           " ",
                           "{}",
                           "[]",
                           "0",
                           "\"\"",
                           "null",
                           "{\"format\":\"fkv-profile\"}",
                           "{\"format\":[]}",
                           "{\"a\\u0000\":1}",
                           "{\"format\":\"\\ud800\"}"};
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        assert_int_equal(load(texts[i], strlen(texts[i]), &p), FKV_ERR_FORMAT);
    }
    assert_int_equal(load("\0", 1, &p), FKV_ERR_FORMAT);
    const size_t n = 100000;
    char *deep = malloc(n);
    assert_non_null(deep);
    memset(deep, '[', n);
    assert_int_equal(load(deep, n, &p), FKV_ERR_FORMAT);
    for (size_t i = 0; i < n; i += 5) {
        memcpy(deep + i, "{\"a\":", 5);
    }
    assert_int_equal(load(deep, n, &p), FKV_ERR_FORMAT);
    free(deep);
    char *token = malloc(10000);
    assert_non_null(token);
    snprintf(token, 10000, "{\"format\": \"\\\"%04999d", 0);
    assert_int_equal(load(token, strlen(token), &p), FKV_ERR_FORMAT);
    assert_message("a string or number of more than 4096 bytes");
    snprintf(token, 10000, "{\"version\": %04999d}", 0);
    assert_int_equal(load(token, strlen(token), &p), FKV_ERR_FORMAT);
    assert_message("a string or number of more than 4096 bytes");
    free(token);
    /* control characters of a name do not reach the message */
    const char *name =
        "{\"format\":\"fkv-profile\",\"version\":1,\"model\":{},\"coding\":{\"kind\":"
        "\"exact\",\"storage\":\"f16\"},\"a\\n\\u001bb\":0}";
    assert_int_equal(load(name, strlen(name), &p), FKV_ERR_FORMAT);
    assert_message("a??b: unknown key");
}

static void test_damaged_text(void **state) {
    (void)state;
    fkv_profile *good, *p;
    size_t n;
    assert_int_equal(make_fourier(ctx, &good), FKV_OK);
    char *text = text_of(good, &n);
    for (size_t i = 0; i < n - 1; i++) {
        assert_int_equal(load(text, i, &p), FKV_ERR_FORMAT);
    }
    assert_int_equal(load(text, n - 1, &p), FKV_OK); /* only the newline is missing */
    assert_same_text(good, p);
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    for (size_t i = 0; i < n; i++) {
        const char old = text[i];
        for (int bit = 0; bit < 8; bit++) {
            text[i] = (char)(old ^ 1 << bit);
            fkv_status status = load(text, n, &p);
            if (status ==
                FKV_OK) { /* a digit or a letter of a name: another profile, but a sound one */
                round_trip(p);
            } else {
                assert_true(status == FKV_ERR_FORMAT || status == FKV_ERR_VERSION);
            }
        }
        text[i] = old;
    }
    free(text);
    assert_int_equal(fkv_profile_destroy(good), FKV_OK);
}

static void test_locale(void **state) {
    (void)state;
    const char *names[] = {"de_DE.UTF-8", "de_DE.utf8", "de_DE", "fr_FR.UTF-8", "fr_FR.utf8"};
    fkv_profile *p;
    size_t n, m;
    assert_int_equal(make_fourier(ctx, &p), FKV_OK);
    char *before = text_of(p, &n);
    bool found = false;
    for (size_t i = 0; i < 5 && !found; i++) {
        found = setlocale(LC_ALL, names[i]) && strcmp(localeconv()->decimal_point, ",") == 0;
    }
    if (found) {
        char *after = text_of(p, &m);
        assert_string_equal(before, after);
        free(after);
        round_trip(p);
        assert_string_equal(localeconv()->decimal_point, ",");
        setlocale(LC_ALL, "C");
    } else {
        fkv_profile_destroy(p);
    }
    free(before);
    if (!found) {
        print_message("no locale with a decimal comma is installed\n");
        skip();
    }
}

/* What the documentation shows is what is written. */
static void test_documented_example(void **state) {
    (void)state;
    static char page[1 << 16];
    FILE *file = fopen(FKV_SOURCE_ROOT "/docs/formats.md", "rb");
    assert_non_null(file);
    size_t n = fread(page, 1, sizeof page - 1, file);
    fclose(file);
    assert_true(n < sizeof page - 1);
    char *begin = strstr(page, "```json\n"), *end = begin ? strstr(begin + 8, "```") : NULL;
    assert_non_null(end);
    *end = '\0';
    fkv_profile *p;
    assert_int_equal(load(begin + 8, strlen(begin + 8), &p), FKV_OK);
    char *text = text_of(p, &n);
    assert_string_equal(text, begin + 8);
    free(text);
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
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
        cmocka_unit_test(test_round_trip),         cmocka_unit_test(test_save_buffers),
        cmocka_unit_test(test_bad_text),           cmocka_unit_test(test_hostile_text),
        cmocka_unit_test(test_damaged_text),       cmocka_unit_test(test_locale),
        cmocka_unit_test(test_documented_example),
    };
    return cmocka_run_group_tests_name("profile_text", tests, open_context, close_context);
}
