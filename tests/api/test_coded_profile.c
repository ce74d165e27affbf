/* SPDX-License-Identifier: Apache-2.0 */
/* Calibrated profiles: what makes them, what they say, their text, and of which model they are. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "fixture.h"
#include "small_profile.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>

static const uint8_t k_bits[MASK] = {0, 2, 3, 4, 8, 16, 0, 2, 4, 4, 4, 4, 4, 4, 4, 4};
static const uint8_t v_bits[MASK] = {[MASK - 1] = 16, [3] = 8, [9] = 3};
static float k_carrier[MASK], v_carrier[MASK];

static fkv_codec_params good_codec(void) {
    fkv_codec_params c;
    assert_int_equal(fkv_codec_params_init(&c, sizeof c), FKV_OK);
    return c;
}

static fkv_status make_coded(fkv_context *context, fkv_profile **out) {
    fkv_model_params m = good_model();
    fkv_codec_params c = good_codec();
    for (int i = 0; i < MASK; i++) {
        k_carrier[i] = i < 8 ? 0.0f : (float)i / 7.0f - 1.0f;
        v_carrier[i] = i % 5 ? -1e-7f * (float)i : 32768.0f;
    }
    return fkv_profile_create_coded(context, &m, &c, k_bits, v_bits, MASK, k_carrier, v_carrier,
                                    MASK, out);
}

/* ---- making */

#define REJECT(expected, part, ...)                                                                \
    do {                                                                                           \
        fkv_model_params m = good_model();                                                         \
        fkv_codec_params c = good_codec();                                                         \
        fkv_profile *p = (fkv_profile *)&m;                                                        \
        const uint8_t *k = k_bits, *v = v_bits;                                                    \
        const float *kc = k_carrier, *vc = v_carrier;                                              \
        size_t bytes = MASK, count = MASK;                                                         \
        __VA_ARGS__;                                                                               \
        assert_int_equal(fkv_profile_create_coded(ctx, &m, &c, k, v, bytes, kc, vc, count, &p),    \
                         expected);                                                                \
        assert_null(p);                                                                            \
        assert_message(part);                                                                      \
    } while (0)

static void test_errors(void **state) {
    (void)state;
    uint8_t bits[MASK] = {[13] = 5};
    float carrier[MASK] = {0};
    const float bad[] = {NAN, INFINITY, -INFINITY, 32769.0f, -1e30f};
    REJECT(FKV_ERR_INVALID, "struct_size", c.struct_size = 4);
    REJECT(FKV_ERR_INVALID, "codec.storage_dtype", c.storage_dtype = FKV_DTYPE_NONE);
    REJECT(FKV_ERR_INVALID, "codec.storage_dtype", c.storage_dtype = 4);
    REJECT(FKV_ERR_INVALID, "codec.group", c.group = 0);
    REJECT(FKV_ERR_INVALID, "codec.group", c.group = 96);
    REJECT(FKV_ERR_INVALID, "codec.group", c.group = 256);
    REJECT(FKV_ERR_INVALID, "codec.block", c.block = 192);
    REJECT(FKV_ERR_INVALID, "codec.block", c.block = 512);
    REJECT(FKV_ERR_INVALID, "codec.block", c.block = 64);
    REJECT(FKV_ERR_INVALID, "codec.block", c.block = -128);
    REJECT(FKV_ERR_INVALID, "codec.n_sink", c.n_sink = FKV_MAX_SINK + 1);
    REJECT(FKV_ERR_INVALID, "codec.n_local", c.n_local = -1);
    REJECT(FKV_ERR_INVALID, "codec.n_local", c.n_local = INT32_MAX);
    REJECT(FKV_ERR_INVALID, "codec.domain", c.domain = 2);
    REJECT(FKV_ERR_UNSUPPORTED, "codec.spectral_bins", c.spectral_bins = 1);
    REJECT(FKV_ERR_INVALID, "model.n_layers", m.n_layers = 0);
    REJECT(FKV_ERR_INVALID, "k_bits is NULL", k = NULL);
    REJECT(FKV_ERR_INVALID, "v_bits is NULL", v = NULL);
    REJECT(FKV_ERR_INVALID, "bits_bytes", bytes--);
    REJECT(FKV_ERR_INVALID, "bits_bytes", bytes = SIZE_MAX);
    REJECT(FKV_ERR_INVALID, "carrier_count", count++);
    REJECT(FKV_ERR_INVALID, "carrier_count", count = 0);
    REJECT(FKV_ERR_INVALID, "carrier_count", kc = NULL; vc = NULL);
    for (int i = 0; i < 256; i++) {
        if (i == 0 || (i >= 2 && i <= 4) || i == 8 || i == 16) {
            continue;
        }
        bits[13] = (uint8_t)i;
        REJECT(FKV_ERR_INVALID, "k_bits[13]", k = bits);
        REJECT(FKV_ERR_INVALID, "v_bits[13]", v = bits);
    }
    for (int i = 0; i < 5; i++) {
        carrier[7] = bad[i];
        REJECT(FKV_ERR_INVALID, "k_carrier[7]", kc = carrier);
        REJECT(FKV_ERR_INVALID, "v_carrier[7]", vc = carrier);
    }
    carrier[7] = carrier[3] = 32768; /* a pair: RoPE can make sqrt(2) of it */
    REJECT(FKV_ERR_INVALID, "after RoPE", kc = carrier);
    fkv_model_params m = good_model();
    fkv_codec_params c = good_codec();
    fkv_profile *p;
    assert_int_equal(
        fkv_profile_create_coded(ctx, &m, &c, k_bits, v_bits, MASK, NULL, NULL, 0, NULL),
        FKV_ERR_INVALID);
    assert_int_equal(
        fkv_profile_create_coded(NULL, &m, &c, k_bits, v_bits, MASK, NULL, NULL, 0, &p),
        FKV_ERR_HANDLE);
    assert_int_equal(fkv_codec_params_init(NULL, sizeof c), FKV_ERR_INVALID);
    assert_int_equal(fkv_codec_params_init(&c, sizeof c - 1), FKV_ERR_INVALID);
}

static void test_uniform(void **state) {
    (void)state;
    fkv_model_params m = good_model();
    fkv_codec_params c = good_codec();
    fkv_profile *p;
    for (int bits = -1; bits < 300; bits++) {
        bool good = bits == 0 || (bits >= 2 && bits <= 4) || bits == 8 || bits == 16;
        fkv_status status = fkv_profile_create_uniform(ctx, &m, &c, bits, &p);
        assert_int_equal(status, good ? FKV_OK : FKV_ERR_INVALID);
        if (!good) {
            assert_message("bits: ");
            continue;
        }
        uint8_t codes[HEADS * DIM];
        float carriers[HEADS * DIM];
        fkv_profile_info info = {.struct_size = sizeof info};
        for (int i = 0; i < 2 * LAYERS; i++) {
            assert_int_equal(fkv_profile_channels(p, i / 2, i % 2, codes, sizeof codes), FKV_OK);
            assert_int_equal(fkv_profile_carriers(p, i / 2, i % 2, carriers, HEADS * DIM), FKV_OK);
            for (int d = 0; d < HEADS * DIM; d++) {
                assert_int_equal(codes[d], bits);
                assert_true(carriers[d] == 0.0f);
            }
        }
        assert_int_equal(fkv_profile_query(p, &info), FKV_OK);
        double want = bits == 0 || bits == 16 ? bits : bits + 32.0 / 128;
        assert_true(info.k_bits == want && info.v_bits == want);
        assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    }
    assert_int_equal(fkv_profile_create_uniform(ctx, &m, NULL, 4, &p), FKV_OK); /* defaults */
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    assert_int_equal(fkv_profile_create_uniform(ctx, &m, &c, 4, NULL), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_create_uniform(NULL, &m, &c, 4, &p), FKV_ERR_HANDLE);
    m.n_kv_heads = 0;
    assert_int_equal(fkv_profile_create_uniform(ctx, &m, &c, 4, &p), FKV_ERR_INVALID);
}

static void test_query(void **state) {
    (void)state;
    fkv_profile *p;
    fkv_profile_info info = {.struct_size = sizeof info};
    uint8_t codes[HEADS * DIM + 1];
    float carriers[HEADS * DIM + 1];
    assert_int_equal(make_coded(ctx, &p), FKV_OK);
    assert_int_equal(fkv_profile_query(p, &info), FKV_OK);
    assert_int_equal(info.coding, FKV_CODING_CALIBRATED);
    assert_int_equal(info.storage_dtype, FKV_DTYPE_F16);
    assert_int_equal(info.coefficient_dtype | info.bins | info.restoration | info.outgrow, 0);
    assert_int_equal(info.n_sink, 4);
    assert_int_equal(info.n_local, 128);
    assert_int_equal(info.group, 128);
    assert_int_equal(info.block, 128);
    assert_int_equal(info.domain, FKV_DOMAIN_ROTATED);
    /* of the 32 channels of K: 2 + 3 + 4 + 8 + 16 + 2 + 8 * 4 bits and 13 scales; of V: 16 + 8 + 3, 2 */
    assert_true(info.k_bits == (67 + 13 * 0.25) / 32 && info.v_bits == (27 + 2 * 0.25) / 32);
    /* a struct of the first release */
    fkv_profile_info small;
    memset(&small, 0xee, sizeof small);
    small.struct_size = offsetof(fkv_profile_info, group);
    assert_int_equal(fkv_profile_query(p, &small), FKV_OK);
    assert_int_equal(small.n_layers, LAYERS);
    assert_int_equal(small.group, (int32_t)0xeeeeeeee);
    for (int layer = 0; layer < LAYERS; layer++) {
        for (int part = FKV_PART_K; part <= FKV_PART_V; part++) {
            const int first = layer * HEADS * DIM;
            const uint8_t *bits = (part == FKV_PART_K ? k_bits : v_bits) + first;
            const float *carrier = (part == FKV_PART_K ? k_carrier : v_carrier) + first;
            codes[HEADS * DIM] = 0xee;
            carriers[HEADS * DIM] = 7.0f;
            assert_int_equal(fkv_profile_channels(p, layer, part, codes, sizeof codes), FKV_OK);
            assert_int_equal(fkv_profile_carriers(p, layer, part, carriers, HEADS * DIM + 1),
                             FKV_OK);
            assert_memory_equal(codes, bits, HEADS * DIM);
            for (int i = 0; i < HEADS * DIM; i++) {
                assert_true(carriers[i] == carrier[i] &&
                            !(carriers[i] == 0 && signbit(carriers[i])));
            }
            assert_true(codes[HEADS * DIM] == 0xee && carriers[HEADS * DIM] == 7.0f);
        }
    }
    assert_int_equal(fkv_profile_carriers(p, -1, 0, carriers, 99), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_carriers(p, LAYERS, 0, carriers, 99), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_carriers(p, 0, 2, carriers, 99), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_carriers(p, 0, 0, NULL, 99), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_carriers(p, 0, 0, carriers, HEADS * DIM - 1), FKV_ERR_BUFFER);
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    assert_int_equal(fkv_profile_carriers(p, 0, 0, carriers, 99), FKV_ERR_HANDLE);
}

/* ---- text */

static fkv_status load(const char *text, size_t bytes, fkv_profile **out) {
    char *copy = malloc(bytes > 0 ? bytes : 1);
    assert_non_null(copy);
    memcpy(copy, text, bytes);
    fkv_status status = fkv_profile_load(ctx, copy, bytes, out);
    free(copy);
    assert_true((status == FKV_OK) == (*out != NULL));
    return status;
}

/* Ends the profile. */
static void round_trip(fkv_profile *profile) {
    size_t n;
    char *text = text_of(profile, &n);
    fkv_profile *again;
    if (load(text, n, &again) != FKV_OK) {
        assert_message("?");
    }
    fkv_profile_info a = {.struct_size = sizeof a}, b = {.struct_size = sizeof b};
    assert_int_equal(fkv_profile_query(profile, &a), FKV_OK);
    assert_int_equal(fkv_profile_query(again, &b), FKV_OK);
    assert_memory_equal(&a, &b, sizeof a);
    size_t row = (size_t)(a.n_kv_heads * a.head_dim);
    uint8_t *codes = malloc(2 * row);
    float *carriers = malloc(2 * row * sizeof *carriers);
    for (int i = 0; i < 2 * a.n_layers; i++) {
        assert_int_equal(fkv_profile_channels(profile, i / 2, i % 2, codes, row), FKV_OK);
        assert_int_equal(fkv_profile_channels(again, i / 2, i % 2, codes + row, row), FKV_OK);
        assert_memory_equal(codes, codes + row, row);
        assert_int_equal(fkv_profile_carriers(profile, i / 2, i % 2, carriers, row), FKV_OK);
        assert_int_equal(fkv_profile_carriers(again, i / 2, i % 2, carriers + row, row), FKV_OK);
        assert_memory_equal(carriers, carriers + row, row * sizeof *carriers);
    }
    assert_same_text(profile, again);
    assert_int_equal(fkv_profile_destroy(again), FKV_OK);
    assert_int_equal(fkv_profile_destroy(profile), FKV_OK);
    free(text);
    free(codes);
    free(carriers);
}

static void test_round_trip(void **state) {
    (void)state;
    static const uint8_t levels[] = {0, 2, 3, 4, 8, 16};
    static uint8_t bits[2 * 3 * 4 * FKV_MAX_HEAD_DIM];
    static float carriers[2 * 3 * 4 * FKV_MAX_HEAD_DIM];
    uint32_t seed = 1;
    for (int i = 0; i < 40; i++) {
        double freq[FKV_MAX_HEAD_DIM / 2];
        fkv_model_params m = good_model();
        fkv_codec_params c = good_codec();
        m.n_layers = 1 + i % 3;
        m.n_kv_heads = 1 + i % 4;
        m.n_q_heads = m.n_kv_heads;
        m.head_dim = 8 * (1 + i * 7 % 32);
        m.inv_freq = freq;
        m.inv_freq_count = m.head_dim / 2;
        for (int j = 0; j < m.inv_freq_count; j++) {
            freq[j] = pow(10000.0 + i, -(double)j / m.inv_freq_count);
        }
        for (size_t j = 0; j < sizeof bits; j++) {
            seed = seed * 1664525u + 1013904223u;
            bits[j] = levels[(seed >> 20) % 6];
            carriers[j] = ldexpf((float)(int32_t)(seed << 3), -20 - (int)(seed >> 27));
        }
        c.storage_dtype = FKV_DTYPE_F32 + i % 3;
        c.block = 64 << i % 3;
        c.group = c.block == 64 || i % 2 ? 64 : 128;
        c.n_sink = i;
        c.n_local = i * 1000;
        c.domain = i % 2;
        size_t n = (size_t)m.n_layers * (size_t)m.n_kv_heads * (size_t)m.head_dim;
        fkv_profile *p;
        assert_int_equal(fkv_profile_create_coded(ctx, &m, &c, bits, bits + n, n,
                                                  i % 3 ? carriers : NULL,
                                                  i % 5 ? carriers + n : NULL, i % 15 ? n : 0, &p),
                         FKV_OK);
        round_trip(p);
    }
}

/* Each entry changes the text of make_coded() in one place. */
static const struct {
    const char *from, *to;
    fkv_status status;
    const char *message;
} edits[] = {
    {"\"version\": 2", "\"version\": 1", FKV_ERR_FORMAT,
     "coding.kind: unknown name \"calibrated\""},
    {"\"version\": 2", "\"version\": 3", FKV_ERR_VERSION, "version: 3"},
    {"\"version\": 2", "\"version\": 0", FKV_ERR_VERSION, "version: 0"},
    {"\"version\": 2", "\"version\": -1", FKV_ERR_VERSION, "version: -1"},
    {"calibrated", "fourier", FKV_ERR_FORMAT, "coding.group: unknown key"},
    {"\"group\": 128", "\"group\": 32", FKV_ERR_FORMAT, "coding.group: 32"},
    {"\"group\": 128", "\"group\": \"128\"", FKV_ERR_FORMAT, "coding.group: string"},
    {"\"group\": 128,", "", FKV_ERR_FORMAT, "coding.group: missing"},
    {"\"block\": 128", "\"block\": 64", FKV_ERR_FORMAT, "coding.block: 64"},
    {"\"block\": 128", "\"block\": 4294967424", FKV_ERR_FORMAT, "coding.block: 4294967424"},
    {"\"block\": 128", "\"block\": 256", FKV_OK, ""},
    {"\"n_sink\": 4", "\"n_sink\": -4", FKV_ERR_FORMAT, "coding.n_sink: -4"},
    {"\"domain\": \"rotated\"", "\"domain\": \"frequency\"", FKV_ERR_FORMAT,
     "coding.domain: unknown name \"frequency\""},
    {"\"spectral_bins\": 0", "\"spectral_bins\": 2", FKV_ERR_UNSUPPORTED,
     "coding.spectral_bins: 2"},
    {"\"spectral_bins\": 0", "\"spectral_bins\": 0, \"x\": 0", FKV_ERR_FORMAT,
     "coding.x: unknown key"},
    {"\"n_layers\": 2", "\"n_layers\": 3", FKV_ERR_FORMAT, "layers: 2 entries, expected 3"},
    {"\"n_layers\": 2", "\"n_layers\": 1", FKV_ERR_FORMAT, "layers: 2 entries, expected 1"},
    {"\"n_kv_heads\": 2", "\"n_kv_heads\": 1", FKV_ERR_FORMAT,
     "layers[0].k: 2 entries, expected 1"},
    {"\"head_dim\": 8", "\"head_dim\": 16", FKV_ERR_FORMAT,
     "layers[0].k[0]: 8 characters, expected 16"},
    {"02348x02", "02345x02", FKV_ERR_FORMAT, "layers[0].k[0]: character 4 is not"},
    {"02348x02", "0234?x02", FKV_ERR_FORMAT, "layers[0].k[0]: character 4 is not"},
    {"02348x02", "02348x0", FKV_ERR_FORMAT, "layers[0].k[0]: 7 characters"},
    {"\"02348x02\"", "16", FKV_ERR_FORMAT, "layers[0].k[0]: integer, expected a string"},
    {"\"k_carrier\": [\n    \"\"", "\"k_carrier\": [\n    \"AAAA\"", FKV_ERR_FORMAT,
     "layers[0].k_carrier[0]: not the base64 text of 8 floats"},
    {"\"k_carrier\": [\n    \"\"", "\"k_carrier\": [\n    null", FKV_ERR_FORMAT,
     "layers[0].k_carrier[0]: null"},
    {"\"k_carrier\": [\n    \"\"",
     "\"k_carrier\": [\n    \"AADAfwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"", FKV_ERR_FORMAT,
     "layers[0].k_carrier[0]: float 0 is nan"},
    {"\"k_carrier\": [\n    \"\"",
     "\"k_carrier\": [\n    \"AAAAAAAAgP8AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"", FKV_ERR_FORMAT,
     "layers[0].k_carrier[0]: float 1 is -inf"},
    {"\"k_carrier\": [\n    \"\"",
     "\"k_carrier\": [\n    \"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEc=\"", FKV_ERR_FORMAT, "?"},
    {"\"k_carrier\": [\n    \"\"",
     "\"k_carrier\": [\n    \"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==\"", FKV_ERR_FORMAT,
     "layers[0].k_carrier[0]: not the base64"},
    {"\"k_carrier\": [\n    \"\"",
     "\"k_carrier\": [\n    \"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA*A=\"", FKV_ERR_FORMAT,
     "layers[0].k_carrier[0]: not the base64"},
    {"\"k_carrier\": [\n    \"\"", "\"k_carrier\": [\n    \"\",\n    \"\"", FKV_ERR_FORMAT,
     "layers[0].k_carrier: 3 entries, expected 2"},
    {"\"k_carrier\"", "\"carrier\"", FKV_ERR_FORMAT, "layers[0].carrier: unknown key"},
    {"{\n   \"k\"", "7, {\n   \"k\"", FKV_ERR_FORMAT, "layers: 3 entries"},
};

static void test_bad_text(void **state) {
    (void)state;
    fkv_profile *good, *p;
    size_t n;
    assert_int_equal(make_coded(ctx, &good), FKV_OK);
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
        /* "?": 32768 exactly is a carrier that is allowed */
        fkv_status want = strcmp(edits[i].message, "?") == 0 ? FKV_OK : edits[i].status;
        if (status != want) {
            fail_msg("%s -> %s: %s", edits[i].from, edits[i].to, fkv_status_string(status));
        }
        if (status == FKV_OK) {
            assert_int_equal(fkv_profile_destroy(p), FKV_OK);
        } else {
            assert_message(edits[i].message);
        }
    }
    free(text);
    assert_int_equal(fkv_profile_destroy(good), FKV_OK);
}

static void test_damaged_text(void **state) {
    (void)state;
    fkv_profile *good, *p;
    size_t n;
    assert_int_equal(make_coded(ctx, &good), FKV_OK);
    char *text = text_of(good, &n);
    for (size_t i = 0; i < n - 1; i++) {
        assert_int_equal(load(text, i, &p), FKV_ERR_FORMAT);
    }
    for (size_t i = 0; i < n; i++) {
        const char old = text[i];
        for (int bit = 0; bit < 8; bit++) {
            text[i] = (char)(old ^ 1 << bit);
            fkv_status status = load(text, n, &p);
            if (status == FKV_OK) { /* another profile, but a sound one */
                round_trip(p);
            } else {
                assert_true(status == FKV_ERR_FORMAT || status == FKV_ERR_VERSION ||
                            status == FKV_ERR_UNSUPPORTED);
            }
        }
        text[i] = old;
    }
    free(text);
    assert_int_equal(fkv_profile_destroy(good), FKV_OK);
}

/* A text of the size that real models have. */
static void test_large(void **state) {
    (void)state;
    enum { L = 32, H = 8, D = 128, N = L * H * D };
    double freq[D / 2];
    uint8_t *bits = malloc(N);
    float *carriers = malloc(N * sizeof *carriers);
    fkv_model_params m = good_model();
    fkv_profile *p;
    size_t n;
    m.n_layers = L;
    m.n_q_heads = 32;
    m.n_kv_heads = H;
    m.head_dim = D;
    m.inv_freq = freq;
    m.inv_freq_count = D / 2;
    for (int j = 0; j < D / 2; j++) {
        freq[j] = pow(5e5, -j / 64.0);
    }
    for (int i = 0; i < N; i++) {
        bits[i] = (uint8_t)(i % 3 ? 0 : 2 + i % 2 * 2);
        carriers[i] = (float)sin(i * 0.7);
    }
    assert_int_equal(
        fkv_profile_create_coded(ctx, &m, NULL, bits, bits, N, carriers, carriers, N, &p), FKV_OK);
    free(text_of(p, &n));
    print_message("32 layers, 8 heads, 128 channels: %zu bytes of text\n", n);
    assert_true(n <= 1500000);
    round_trip(p);
    free(bits);
    free(carriers);
}

/* ---- models */

static void test_match(void **state) {
    (void)state;
    fkv_model_params m = good_model();
    fkv_profile *p;
    double freq[4];
    assert_int_equal(make_coded(ctx, &p), FKV_OK);
    assert_int_equal(fkv_profile_match(p, &m), FKV_OK);
    memcpy(freq, inv_freq, sizeof freq);
    freq[1] *= 1 + 1e-7;
    m.inv_freq = freq;
    m.model_id = NULL;
    assert_int_equal(fkv_profile_match(p, &m), FKV_OK);
#define MISMATCH(part, ...)                                                                        \
    do {                                                                                           \
        m = good_model();                                                                          \
        __VA_ARGS__;                                                                               \
        assert_int_equal(fkv_profile_match(p, &m), FKV_ERR_MISMATCH);                              \
        assert_message(part);                                                                      \
    } while (0)
    freq[1] = inv_freq[1] * 1.001;
    MISMATCH("model.n_layers: 2, the model has 3", m.n_layers = 3);
    MISMATCH("model.n_q_heads", m.n_q_heads = 8);
    MISMATCH("model.n_kv_heads", m.n_kv_heads = 3);
    MISMATCH("model.head_dim", m.head_dim = 16; m.rope_dim = 8);
    MISMATCH("model.rope_layout", m.rope_layout = FKV_ROPE_INTERLEAVED);
    MISMATCH("model.rope_dim", m.rope_dim = 6; m.inv_freq_count = 3);
    MISMATCH("model.rope_scaling", m.rope_scaling = 1.5);
    MISMATCH("model.softmax_scale", m.softmax_scale = 1);
    MISMATCH("model.inv_freq[1]", m.inv_freq = freq);
    MISMATCH("model.id", m.model_id = "another");
    m = good_model();
    m.n_layers = 0;
    assert_int_equal(fkv_profile_match(p, &m), FKV_ERR_INVALID);
    assert_int_equal(fkv_profile_match(p, NULL), FKV_ERR_INVALID);
    m = good_model();
    assert_int_equal(fkv_profile_destroy(p), FKV_OK);
    assert_int_equal(fkv_profile_match(p, &m), FKV_ERR_HANDLE);
}

/* ---- memory */

/* Everything that can be done with a profile, or the first error. */
static fkv_status all_of(fkv_context *context) {
    fkv_model_params m = good_model();
    fkv_profile *p = NULL, *q = NULL, *u = NULL;
    size_t n;
    char *text = NULL;
    fkv_status status = make_coded(context, &p);
    if (status == FKV_OK) {
        status = fkv_profile_match(p, &m);
    }
    if (status == FKV_OK) {
        status = fkv_profile_create_uniform(context, &m, NULL, 4, &u);
    }
    if (status == FKV_OK) {
        status = fkv_profile_save(p, NULL, 0, &n);
    }
    if (status == FKV_OK) {
        text = malloc(n);
        status = fkv_profile_save(p, text, n, &n);
    }
    if (status == FKV_OK) {
        status = fkv_profile_load(context, text, n, &q);
    }
    free(text);
    assert_true((q != NULL) == (status == FKV_OK));
    assert_int_equal(fkv_profile_destroy(p) | fkv_profile_destroy(q) | fkv_profile_destroy(u),
                     FKV_OK);
    return status;
}

static void test_memory(void **state) {
    (void)state;
    for (int forever = 0; forever < 2; forever++) {
        int64_t at = 1;
        for (bool failed = true; failed; at++) {
            struct heap heap = {0};
            fkv_context_params params;
            fkv_context *context;
            assert_int_equal(fkv_context_params_init(&params, sizeof params), FKV_OK);
            params.alloc = heap_alloc;
            params.free = heap_free;
            params.alloc_user = &heap;
            params.threads = 1;
            assert_int_equal(fkv_context_create(&params, &context), FKV_OK);
            heap_fail(&heap, at, forever);
            fkv_status status = all_of(context);
            failed = heap_failed(&heap);
            assert_int_equal(status, failed ? FKV_ERR_NOMEM : FKV_OK);
            heap_fail(&heap, 0, false);
            assert_int_equal(all_of(context), FKV_OK);
            assert_int_equal(fkv_context_destroy(context), FKV_OK);
            assert_int_equal(heap.blocks | heap.bytes | heap.mismatches, 0);
        }
        assert_true(at > 10);
    }
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
        cmocka_unit_test(test_errors),   cmocka_unit_test(test_uniform),
        cmocka_unit_test(test_query),    cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_bad_text), cmocka_unit_test(test_damaged_text),
        cmocka_unit_test(test_large),    cmocka_unit_test(test_match),
        cmocka_unit_test(test_memory),
    };
    return cmocka_run_group_tests_name("coded_profile", tests, open_context, close_context);
}
