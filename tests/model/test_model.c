/* SPDX-License-Identifier: Apache-2.0 */
/* Loading models: right ones are read exactly, wrong ones are refused with the file's name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"
#include "tiny.h"

static char dir[256];

static int make_dir(void **state) {
    (void)state;
    tiny_make_dir(dir, sizeof dir);
    return 0;
}

static int remove_dir(void **state) {
    (void)state;
    tiny_remove_dir(dir);
    return 0;
}

static void assert_values(const float *values, const char *name, size_t count) {
    for (size_t i = 0; i < count; i++) {
        assert_true(values[i] == tiny_value(name, i));
    }
}

static void test_values(void **state) {
    (void)state;
    const fkv_dtype dtypes[] = {FKV_DTYPE_F32, FKV_DTYPE_F16, FKV_DTYPE_BF16};
    for (int i = 0; i < 6; i++) {
        const struct tiny tiny = {.dtype = dtypes[i % 3],
                                  .kv_heads = 2,
                                  .head_dim = 8,
                                  .indexed = i >= 3,
                                  .tied = i == 4};
        struct needle_model m;
        struct needle_error error = {""};
        tiny_write(dir, &tiny);
        assert_int_equal(needle_model_load(dir, &m, &error), NEEDLE_OK);
        assert_int_equal(m.config.head_dim, 8);
        assert_int_equal(m.config.n_kv_heads, 2);
        assert_values(m.embedding, "model.embed_tokens.weight", TINY_VOCAB * TINY_HIDDEN);
        assert_values(m.head, m.config.tied ? "model.embed_tokens.weight" : "lm_head.weight",
                      TINY_VOCAB * TINY_HIDDEN);
        assert_values(m.layers[0].k, "model.layers.0.self_attn.k_proj.weight", 16 * TINY_HIDDEN);
        assert_values(m.layers[1].down, "model.layers.1.mlp.down_proj.weight",
                      TINY_INNER * TINY_HIDDEN);
        assert_values(m.layers[1].input_norm, "model.layers.1.input_layernorm.weight", TINY_HIDDEN);
        needle_model_free(&m);
    }
}

/* The model must be refused, with these words in the message. */
static void assert_refused(const char *file, const char *why) {
    struct needle_model m;
    struct needle_error error = {""};
    assert_int_equal(needle_model_load(dir, &m, &error), NEEDLE_BAD_INPUT);
    if (!strstr(error.text, file) || !strstr(error.text, why)) {
        print_error("message \"%s\" lacks \"%s\" or \"%s\"\n", error.text, file, why);
        fail();
    }
    assert_null(m.layers);
}

static void test_config(void **state) {
    (void)state;
    /* Each config.json has one of these instead of the usual line. */
    const struct {
        const char *from, *to, *why;
    } cases[] = {
        {"LlamaForCausalLM", "MistralForCausalLM", "MistralForCausalLM"},
        {"\"silu\"", "\"gelu\"", "hidden_act"},
        {"\"vocab_size\": 256", "\"vocab_size\": 128256", "vocab_size"},
        {"\"hidden_size\": 32", "\"hidden_size\": \"32\"", "hidden_size"},
        {"\"hidden_size\": 32", "\"hidden_size\": -32", "hidden_size"},
        {"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000000000", "num_hidden_layers"},
        {"\"num_hidden_layers\"", "\"layers\"", "num_hidden_layers"},
        {"\"num_attention_heads\": 4", "\"num_attention_heads\": 3", "heads"},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"llama3\"}", "llama3"},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\"}", "linear"},
        {"\"rope_scaling\": null", "\"attention_bias\": true", "attention_bias"},
        {"\"rope_scaling\": null", "\"partial_rotary_factor\": 0.5", "partial_rotary_factor"},
        {"\"rope_theta\": 1000.0", "\"rope_theta\": 0", "rope_theta"},
        {"\"rms_norm_eps\": 1e-5", "\"rms_norm_eps\": 1e999", "line 1"},
        {"\"rms_norm_eps\"", "\"vocab_size\"", "line 1"},
        {"}", "", "line"},
    };
    const struct tiny tiny = {.dtype = FKV_DTYPE_F32, .kv_heads = 2, .head_dim = 8};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char path[300], text[2048], wrong[2048];
        tiny_write(dir, &tiny);
        snprintf(path, sizeof path, "%s/config.json", dir);
        FILE *file = fopen(path, "rb");
        assert_non_null(file);
        text[fread(text, 1, sizeof text - 1, file)] = '\0';
        fclose(file);
        char *at = strstr(text, cases[i].from);
        assert_non_null(at);
        int n = snprintf(wrong, sizeof wrong, "%.*s%s%s", (int)(at - text), text, cases[i].to,
                         at + strlen(cases[i].from));
        tiny_write_file(dir, "config.json", wrong, (size_t)n);
        assert_refused("config.json", cases[i].why);
    }
}

static void test_newer_rope_keys(void **state) {
    (void)state;
    struct needle_model m;
    struct needle_error error = {""};
    const struct tiny tiny = {
        .dtype = FKV_DTYPE_F32,
        .kv_heads = 2,
        .head_dim = 16,
        .config = ", \"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 16.0}"};
    tiny_write(dir, &tiny);
    assert_int_equal(needle_model_load(dir, &m, &error), NEEDLE_OK);
    assert_int_equal(m.config.head_dim, 16);
    /* 16^(-2j/16) */
    assert_true(m.inv_freq[0] == 1.0 && m.inv_freq[4] == 0.25);
    needle_model_free(&m);
}

static void test_tensors(void **state) {
    (void)state;
    const char *q = "model.layers.1.self_attn.q_proj.weight";
    const struct tiny right = {.dtype = FKV_DTYPE_BF16, .kv_heads = 2, .head_dim = 8};
    struct tiny wrong = right;
    wrong.skip = q;
    tiny_write(dir, &wrong);
    assert_refused("model.safetensors", "self_attn.q_proj.weight is missing");
    wrong = right;
    wrong.nan = q;
    tiny_write(dir, &wrong);
    assert_refused("model.safetensors", "not finite");
    wrong = right;
    wrong.extra = "model.layers.2.input_layernorm.weight";
    tiny_write(dir, &wrong);
    assert_refused("model.safetensors", wrong.extra);
    wrong = right;
    wrong.added_rows = 1;
    tiny_write(dir, &wrong);
    assert_refused("model.safetensors", "[257, 32]");
    wrong = right;
    wrong.extra = "model.layers.0.self_attn.rotary_emb.inv_freq";
    tiny_write(dir, &wrong);
    struct needle_model m;
    struct needle_error error = {""};
    assert_int_equal(needle_model_load(dir, &m, &error), NEEDLE_OK);
    needle_model_free(&m);
}

static char *read_weights(const char *name, size_t *count) {
    char path[300], *bytes;
    struct needle_error error;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    assert_int_equal(needle_read_file(path, 1 << 24, &bytes, count, &error), NEEDLE_OK);
    return bytes;
}

static void test_truncated(void **state) {
    (void)state;
    const struct tiny tiny = {.dtype = FKV_DTYPE_BF16, .kv_heads = 2, .head_dim = 8};
    tiny_write(dir, &tiny);
    size_t count;
    char *bytes = read_weights("model.safetensors", &count);
    for (size_t n = 0; n < count; n += n < 32 ? 1 : n < count - 700 ? 601 : 97) {
        tiny_write_file(dir, "model.safetensors", bytes, n);
        assert_refused("model.safetensors", "");
    }
    tiny_write_file(dir, "model.safetensors", bytes, count - 1);
    assert_refused("model.safetensors", "truncated");
    free(bytes);
}

static void test_longer(void **state) {
    (void)state;
    const struct tiny tiny = {.dtype = FKV_DTYPE_BF16, .kv_heads = 2, .head_dim = 8};
    tiny_write(dir, &tiny);
    size_t count;
    char *bytes = read_weights("model.safetensors", &count);
    tiny_write_file(dir, "model.safetensors", bytes, count + 1); /* the zero behind the text */
    assert_refused("model.safetensors", "1 bytes follow");
    free(bytes);
}

/* Whatever a header says, the answer is an error or a model, never a crash. */
static void test_flipped_bits(void **state) {
    (void)state;
    const struct tiny tiny = {.dtype = FKV_DTYPE_BF16, .kv_heads = 2, .head_dim = 8};
    tiny_write(dir, &tiny);
    size_t count, refused = 0, tried = 0;
    char *bytes = read_weights("model.safetensors", &count);
    for (size_t i = 0; i < 600; i++, tried++) {
        struct needle_model m;
        struct needle_error error = {""};
        bytes[i] = (char)(bytes[i] ^ 1 << i % 8);
        tiny_write_file(dir, "model.safetensors", bytes, count);
        bytes[i] = (char)(bytes[i] ^ 1 << i % 8);
        int code = needle_model_load(dir, &m, &error);
        assert_true(code == NEEDLE_OK ||
                    (code == NEEDLE_BAD_INPUT && strstr(error.text, "model.safetensors")));
        refused += code != NEEDLE_OK;
        needle_model_free(&m);
    }
    /* Only flips within the metadata can go unnoticed. */
    assert_true(tried - refused < 60);
    free(bytes);
}

static void test_index(void **state) {
    (void)state;
    const struct tiny tiny = {
        .dtype = FKV_DTYPE_F16, .kv_heads = 2, .head_dim = 8, .indexed = true};
    const char *name = "model.safetensors.index.json";
    const struct {
        const char *text, *why;
    } cases[] = {
        {"", "line"},
        {"{}", "weight_map"},
        {"{\"weight_map\": {\"a\": 3}}", "not the name of a file"},
        {"{\"weight_map\": {\"a\": \"../part-0\"}}", "not the name of a file"},
        {"{\"weight_map\": {\"a\": \"part-0\"}}", "tensor a is not in part-0"},
        {"{\"weight_map\": {\"model.norm.weight\": \"part-0\"}}", "is not in part-0"},
        {"{\"weight_map\": {}}", "missing"},
    };
    tiny_write(dir, &tiny);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tiny_write_file(dir, name, cases[i].text, strlen(cases[i].text));
        assert_refused(i < 6 ? name : "", cases[i].why);
    }
    const char *absent = "{\"weight_map\": {\"model.norm.weight\": \"part-2\"}}";
    tiny_write_file(dir, name, absent, strlen(absent));
    assert_refused("part-2", "No such file");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_values, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(test_config, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(test_newer_rope_keys, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(test_tensors, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(test_truncated, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(test_longer, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(test_flipped_bits, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(test_index, make_dir, remove_dir),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
