/* SPDX-License-Identifier: Apache-2.0 */
#include "config.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct reader {
    const json_t *root;
    const char *path;
    struct needle_error *error;
};

/* An integer in [min, max]; `missing` below min makes the key mandatory. */
static int get_int(const struct reader *r, const char *key, int32_t missing, int32_t min,
                   int32_t max, int32_t *out) {
    const json_t *value = json_object_get(r->root, key);
    if ((!value || json_is_null(value)) && missing >= min) {
        *out = missing;
        return NEEDLE_OK;
    }
    json_int_t n = json_integer_value(value);
    if (!json_is_integer(value) || n < min || n > max) {
        return needle_fail(r->error, NEEDLE_BAD_INPUT, "%s: %s must be an integer in [%d, %d]",
                           r->path, key, min, max);
    }
    *out = (int32_t)n;
    return NEEDLE_OK;
}

static int get_positive(const struct reader *r, const json_t *object, const char *key,
                        double missing, double *out) {
    const json_t *value = json_object_get(object, key);
    *out = value ? json_number_value(value) : missing;
    if ((value && !json_is_number(value)) || !(*out > 0)) {
        return needle_fail(r->error, NEEDLE_BAD_INPUT, "%s: %s must be a positive number", r->path,
                           key);
    }
    return NEEDLE_OK;
}

/* The key may be absent; if it is there it must be this string. */
static int need_string(const struct reader *r, const char *key, const char *expected) {
    const json_t *value = json_object_get(r->root, key);
    const char *text = json_string_value(value);
    if (!value || (text && !strcmp(text, expected))) {
        return NEEDLE_OK;
    }
    return needle_fail(r->error, NEEDLE_BAD_INPUT, "%s: %s is %s; only %s is supported", r->path,
                       key, text ? text : "not a string", expected);
}

static int refuse_flag(const struct reader *r, const char *key) {
    const json_t *value = json_object_get(r->root, key);
    if (!value || json_is_false(value) || json_is_null(value)) {
        return NEEDLE_OK;
    }
    return needle_fail(r->error, NEEDLE_BAD_INPUT, "%s: %s is not supported", r->path, key);
}

static int check_architecture(const struct reader *r) {
    const json_t *list = json_object_get(r->root, "architectures");
    const char *name = json_string_value(json_array_get(list, 0));
    if (json_array_size(list) != 1 || !name || strcmp(name, "LlamaForCausalLM")) {
        return needle_fail(r->error, NEEDLE_BAD_INPUT,
                           "%s: architecture %s; only LlamaForCausalLM is supported", r->path,
                           name ? name : "(not stated)");
    }
    int code = need_string(r, "model_type", "llama");
    code = code ? code : need_string(r, "hidden_act", "silu");
    code = code ? code : refuse_flag(r, "attention_bias");
    return code ? code : refuse_flag(r, "mlp_bias");
}

/* Where a file says how RoPE is scaled: rope_scaling, or rope_parameters in newer ones. */
static int check_rope_type(const struct reader *r, const char *key) {
    const json_t *scaling = json_object_get(r->root, key);
    if (!scaling || json_is_null(scaling)) {
        return NEEDLE_OK;
    }
    const char *type = json_string_value(json_object_get(scaling, "rope_type"));
    if (!type) {
        type = json_string_value(json_object_get(scaling, "type"));
    }
    if (!type || strcmp(type, "default")) {
        return needle_fail(r->error, NEEDLE_BAD_INPUT,
                           "%s: %s of type %s; scaled RoPE is not supported", r->path, key,
                           type ? type : "(not stated)");
    }
    return NEEDLE_OK;
}

static int read_rope(const struct reader *r, struct needle_config *c) {
    int code = check_rope_type(r, "rope_scaling");
    code = code ? code : check_rope_type(r, "rope_parameters");
    double rotated = 1;
    code = code ? code : get_positive(r, r->root, "partial_rotary_factor", 1, &rotated);
    if (!code && rotated != 1) {
        code = needle_fail(r->error, NEEDLE_BAD_INPUT, "%s: partial_rotary_factor is not supported",
                           r->path);
    }
    const json_t *nested = json_object_get(r->root, "rope_parameters");
    const json_t *object = json_object_get(nested, "rope_theta") ? nested : r->root;
    return code ? code : get_positive(r, object, "rope_theta", 10000, &c->rope_theta);
}

static int read_sizes(const struct reader *r, struct needle_config *c) {
    const int32_t none = -1;
    int code = get_int(r, "vocab_size", none, 256, 1024, &c->vocab_size);
    if (code) {
        return needle_fail(r->error, code,
                           "%s: vocab_size must be in [256, 1024]: tokens are bytes here", r->path);
    }
    code = get_int(r, "hidden_size", none, 8, 65536, &c->hidden_size);
    code = code ? code : get_int(r, "intermediate_size", none, 1, 1 << 20, &c->intermediate_size);
    code = code ? code : get_int(r, "num_hidden_layers", none, 1, 1024, &c->n_layers);
    code = code ? code : get_int(r, "num_attention_heads", none, 1, 1024, &c->n_heads);
    code = code ? code : get_int(r, "num_key_value_heads", c->n_heads, 1, 1024, &c->n_kv_heads);
    code = code ? code
                : get_int(r, "head_dim", c->hidden_size / c->n_heads, 1, FKV_MAX_HEAD_DIM,
                          &c->head_dim);
    code = code ? code : get_int(r, "max_position_embeddings", 0, 0, INT32_MAX, &c->trained_window);
    if (!code && (c->n_heads % c->n_kv_heads || c->head_dim % 8)) {
        code = needle_fail(r->error, NEEDLE_BAD_INPUT,
                           "%s: %d heads, %d KV heads, head_dim %d: heads must be a multiple of KV "
                           "heads, head_dim of 8",
                           r->path, c->n_heads, c->n_kv_heads, c->head_dim);
    }
    return code;
}

static int read_config(const struct reader *r, struct needle_config *c) {
    int code = check_architecture(r);
    code = code ? code : read_sizes(r, c);
    code = code ? code : read_rope(r, c);
    code = code ? code : get_positive(r, r->root, "rms_norm_eps", 1e-6, &c->rms_norm_eps);
    c->tied = json_is_true(json_object_get(r->root, "tie_word_embeddings"));
    return code;
}

int needle_config_load(const char *dir, struct needle_config *config, struct needle_error *error) {
    char path[4096];
    if ((size_t)snprintf(path, sizeof path, "%s/config.json", dir) >= sizeof path) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "%.200s...: path too long", dir);
    }
    char *text;
    size_t length;
    int code = needle_read_file(path, (size_t)1 << 20, &text, &length, error);
    if (code) {
        return code;
    }
    json_error_t why;
    json_t *root = json_loadb(text, length, JSON_REJECT_DUPLICATES, &why);
    if (root) {
        struct reader reader = {root, path, error};
        code = read_config(&reader, config);
    } else {
        code = needle_fail(error, NEEDLE_BAD_INPUT, "%s: line %d: %s", path, why.line, why.text);
    }
    json_decref(root);
    free(text);
    return code;
}
