/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Channel lists in the two layouts that were published with FourierAttention (docs/formats.md). A channel
 * is numbered head * D + d within its layer.
 */
#include "profile/json.h"
#include "profile/profile.h"

#include <stdio.h>
#include <string.h>

enum mark { UNLISTED, KEPT, CODED };

/* One list that is being read, with what its messages need. */
struct list {
    struct fkv_ctx *ctx;
    const struct fkv_model *model;
    int layer;
    const char *key;
    const json_t *array;
};

#define FAIL(l, error, format, ...)                                                                \
    fkv_fail((l)->ctx, error, "Layer_%d.%s" format, (l)->layer, (l)->key, __VA_ARGS__)

static fkv_status open_list(struct list *l, const json_t *object, const char *key) {
    l->key = key;
    l->array = json_object_get(object, key);
    if (!json_is_array(l->array)) {
        return FAIL(l, FKV_ERR_FORMAT, ": %s, expected an array", fkv_json_type(l->array));
    }
    return FKV_OK;
}

static fkv_status list_entry(const struct list *l, size_t i, int64_t *value) {
    const json_t *entry = json_array_get(l->array, i);
    if (!json_is_integer(entry)) {
        return FAIL(l, FKV_ERR_FORMAT, "[%zu]: %s, expected an integer", i, fkv_json_type(entry));
    }
    *value = json_integer_value(entry);
    if (*value < 0) {
        return FAIL(l, FKV_ERR_FORMAT, "[%zu]: %lld is negative", i, (long long)*value);
    }
    return FKV_OK;
}

/* Entry i of a list of channels of heads first_head.. last_head - 1, each listed once. */
static fkv_status take_channel(const struct list *l, size_t i, int64_t first_head,
                               int64_t last_head, enum mark mark, uint8_t *marks) {
    int64_t channel = 0, dim = l->model->head_dim;
    fkv_status status = list_entry(l, i, &channel);
    if (status != FKV_OK) {
        return status;
    }
    if (channel >= dim * l->model->n_kv_heads) {
        return FAIL(l, FKV_ERR_MISMATCH, "[%zu]: channel %lld, the model has %lld", i,
                    (long long)channel, (long long)(dim * l->model->n_kv_heads));
    }
    if (channel < first_head * dim || channel >= last_head * dim) {
        return FAIL(l, FKV_ERR_FORMAT, "[%zu]: channel %lld is not one of head %lld", i,
                    (long long)channel, (long long)first_head);
    }
    if (marks[channel] != UNLISTED) {
        return FAIL(l, FKV_ERR_FORMAT, "[%zu]: channel %lld is listed twice", i,
                    (long long)channel);
    }
    marks[channel] = (uint8_t)mark;
    return FKV_OK;
}

static fkv_status only_keys(struct fkv_ctx *ctx, int layer, json_t *object,
                            const char *const *known, size_t count) {
    const char *key;
    json_t *value;
    json_object_foreach(object, key, value) {
        bool found = false;
        for (size_t i = 0; i < count; i++) {
            found = found || strcmp(key, known[i]) == 0;
        }
        if (!found) {
            return fkv_fail(ctx, FKV_ERR_FORMAT, "Layer_%d.%.60s: unknown key", layer, key);
        }
    }
    return FKV_OK;
}

/* ---- plain: coded channels by ascending error; any leading share is a choice */

static const char *const plain_keys[2] = {"self_attn.k_proj", "self_attn.v_proj"};

static fkv_status read_plain(struct list *l, const json_t *object, fkv_part part, double fraction,
                             uint8_t *marks) {
    fkv_status status = open_list(l, object, plain_keys[part]);
    size_t n = status == FKV_OK ? json_array_size(l->array) : 0;
    size_t taken = (size_t)((double)n * fraction + 0.5);
    for (size_t i = 0; status == FKV_OK && i < n; i++) {
        status = take_channel(l, i, 0, l->model->n_kv_heads, i < taken ? CODED : KEPT, marks);
    }
    return status;
}

/* ---- split by head: coded and kept channels, each with the end of every head's share */

static const char *const split_keys[2][4] = {{"kc_list", "kc_h_list", "kn_list", "kn_h_list"},
                                             {"vc_list", "vc_h_list", "vn_list", "vn_h_list"}};

static fkv_status read_split_list(struct list *l, const json_t *object, const char *list_key,
                                  const char *ends_key, enum mark mark, uint8_t *marks) {
    struct list ends = *l;
    fkv_status status = open_list(l, object, list_key);
    if (status == FKV_OK) {
        status = open_list(&ends, object, ends_key);
    }
    if (status != FKV_OK) {
        return status;
    }
    size_t n_heads = json_array_size(ends.array), n = json_array_size(l->array);
    if (n_heads != (size_t)l->model->n_kv_heads) {
        return FAIL(&ends, FKV_ERR_MISMATCH, ": %zu heads, the model has %d", n_heads,
                    l->model->n_kv_heads);
    }
    int64_t begin = 0, end = 0;
    for (size_t head = 0; head < n_heads; head++, begin = end) {
        status = list_entry(&ends, head, &end);
        if (status == FKV_OK && (end < begin || (uint64_t)end > n)) {
            status = FAIL(&ends, FKV_ERR_FORMAT, "[%zu]: %lld is outside %lld..%zu", head,
                          (long long)end, (long long)begin, n);
        }
        for (int64_t i = begin; status == FKV_OK && i < end; i++) {
            status = take_channel(l, (size_t)i, (int64_t)head, (int64_t)head + 1, mark, marks);
        }
        if (status != FKV_OK) {
            return status;
        }
    }
    if ((uint64_t)end != n) {
        return FAIL(&ends, FKV_ERR_FORMAT, "[%zu]: ends at %lld of %zu channels", n_heads - 1,
                    (long long)end, n);
    }
    return FKV_OK;
}

static fkv_status read_split(struct list *l, const json_t *object, fkv_part part, uint8_t *marks) {
    const char *const *keys = split_keys[part];
    fkv_status status = read_split_list(l, object, keys[0], keys[1], CODED, marks);
    if (status == FKV_OK) {
        status = read_split_list(l, object, keys[2], keys[3], KEPT, marks);
    }
    int channels = l->model->n_kv_heads * l->model->head_dim;
    for (int c = 0; status == FKV_OK && c < channels; c++) {
        if (marks[c] == UNLISTED) {
            status = fkv_fail(l->ctx, FKV_ERR_FORMAT,
                              "Layer_%d.%s: channel %d is neither here nor in %s", l->layer,
                              keys[0], c, keys[2]);
        }
    }
    return status;
}

/* ---- layers */

/* marks become the mask of one layer and part. */
static fkv_status read_part(struct list *l, const json_t *object, bool plain, fkv_part part,
                            double fraction, uint8_t *marks) {
    size_t channels = (size_t)l->model->n_kv_heads * (size_t)l->model->head_dim;
    memset(marks, UNLISTED, channels);
    fkv_status status =
        plain ? read_plain(l, object, part, fraction, marks) : read_split(l, object, part, marks);
    for (size_t c = 0; c < channels; c++) {
        marks[c] = marks[c] == CODED;
    }
    return status;
}

static fkv_status read_layer(struct fkv_ctx *ctx, const struct fkv_model *model, int layer,
                             json_t *object, double fraction, uint8_t *k_mask, uint8_t *v_mask) {
    struct list l = {.ctx = ctx, .model = model, .layer = layer};
    if (!json_is_object(object)) {
        return fkv_fail(ctx, FKV_ERR_FORMAT, "Layer_%d: %s, expected an object", layer,
                        fkv_json_type(object));
    }
    bool plain = json_object_get(object, plain_keys[0]) || json_object_get(object, plain_keys[1]);
    fkv_status status = plain ? only_keys(ctx, layer, object, plain_keys, 2)
                              : only_keys(ctx, layer, object, &split_keys[0][0], 8);
    if (status == FKV_OK && !plain && fraction != 1.0) {
        status = fkv_fail(ctx, FKV_ERR_INVALID,
                          "fraction: Layer_%d is split by head, which allows only 1", layer);
    }
    if (status == FKV_OK) {
        status = read_part(&l, object, plain, FKV_PART_K, fraction, k_mask);
    }
    if (status == FKV_OK) {
        status = read_part(&l, object, plain, FKV_PART_V, fraction, v_mask);
    }
    return status;
}

static bool is_layer_name(const char *key) {
    const char *prefix = "Layer_", *digits = key + strlen(prefix);
    size_t n = strncmp(key, prefix, strlen(prefix)) == 0 ? strspn(digits, "0123456789") : 0;
    return n > 0 && digits[n] == '\0' && (digits[0] != '0' || n == 1);
}

/* The keys are Layer_0, Layer_1, ..., without a gap, as many as the model has layers. */
static fkv_status check_layers(struct fkv_ctx *ctx, const struct fkv_model *model, json_t *root) {
    const char *key;
    json_t *value;
    json_object_foreach(root, key, value) {
        if (!is_layer_name(key)) {
            return fkv_fail(ctx, FKV_ERR_FORMAT, "%.60s: unknown key", key);
        }
    }
    size_t n = json_object_size(root);
    for (size_t i = 0; i < n; i++) {
        char name[32];
        snprintf(name, sizeof name, "Layer_%zu", i);
        if (!json_object_get(root, name)) {
            return fkv_fail(ctx, FKV_ERR_FORMAT, "%s: missing", name);
        }
    }
    if (n != (size_t)model->n_layers) {
        return fkv_fail(ctx, FKV_ERR_MISMATCH, "Layer_%zu: the lists have %zu layers, the model %d",
                        n < (size_t)model->n_layers ? n : (size_t)model->n_layers, n,
                        model->n_layers);
    }
    return FKV_OK;
}

static fkv_status read_masks(struct fkv_ctx *ctx, const struct fkv_model *model, json_t *root,
                             double fraction, uint8_t *k_mask, uint8_t *v_mask) {
    size_t channels = (size_t)model->n_kv_heads * (size_t)model->head_dim;
    fkv_status status = check_layers(ctx, model, root);
    for (int i = 0; status == FKV_OK && i < model->n_layers; i++) {
        char name[32];
        snprintf(name, sizeof name, "Layer_%d", i);
        status = read_layer(ctx, model, i, json_object_get(root, name), fraction,
                            k_mask + (size_t)i * channels, v_mask + (size_t)i * channels);
    }
    return status;
}

fkv_status fkv_profile_from_published(struct fkv_ctx *ctx, struct fkv_model *model,
                                      const fkv_fourier_params *fourier, const char *json,
                                      size_t bytes, double fraction,
                                      struct fkv_profile_object **out) {
    if (!(fraction > 0.0 && fraction <= 1.0)) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "fraction: not in (0, 1]");
    }
    json_t *root;
    fkv_status status = fkv_json_parse(ctx, json, bytes, &root);
    if (status != FKV_OK) {
        return status;
    }
    size_t n = (size_t)model->n_layers * (size_t)model->n_kv_heads * (size_t)model->head_dim;
    uint8_t *masks = fkv_heap_alloc(&ctx->heap, 2 * n);
    if (!masks) {
        json_decref(root);
        return fkv_fail_memory(ctx, 2 * n, "channel masks");
    }
    status = read_masks(ctx, model, root, fraction, masks, masks + n);
    json_decref(root);
    if (status == FKV_OK) {
        status = fkv_profile_new_fourier(ctx, model, fourier, masks, masks + n, out);
    }
    fkv_heap_free(&ctx->heap, masks, 2 * n);
    return status;
}
