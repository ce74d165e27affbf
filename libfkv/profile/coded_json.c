/* SPDX-License-Identifier: Apache-2.0 */
/* The layers of a calibrated profile as JSON; docs/formats.md describes them. */
#include "profile/json.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

/* Indices are bits. */
static const char codes[] = "0?234???8???????x";

/* ---- base64 (RFC 4648) of little-endian floats */

static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

#define TEXT_BYTES(floats) (((floats)*4 + 2) / 3 * 4)

static void encode_floats(const float *x, size_t n, char *text) {
    unsigned char bytes[FKV_MAX_HEAD_DIM * 4 + 2] = {0};
    memcpy(bytes, x, n * sizeof *x);
    for (size_t i = 0; i < n * 4; i += 3) {
        uint32_t word = (uint32_t)bytes[i] << 16 | (uint32_t)bytes[i + 1] << 8 | bytes[i + 2];
        for (size_t k = 0; k < 4; k++) {
            *text++ = i + k > n * 4 ? '=' : alphabet[word >> (18 - 6 * k) & 63];
        }
    }
}

/* false if it is not the text of n floats */
static bool decode_floats(const char *text, size_t n, float *x) {
    unsigned char bytes[FKV_MAX_HEAD_DIM * 4 + 2] = {0};
    for (size_t i = 0; i < n * 4; i += 3) {
        uint32_t word = 0;
        for (size_t k = 0; k < 4; k++, text++) {
            const char *at = *text ? strchr(alphabet, *text) : NULL;
            bool padding = i + k > n * 4;
            if (padding ? *text != '=' : !at) {
                return false;
            }
            word = word << 6 | (padding ? 0 : (uint32_t)(at - alphabet));
        }
        for (size_t k = 0; k < 3; k++) {
            bytes[i + k] = (unsigned char)(word >> (16 - 8 * k));
        }
    }
    memcpy(x, bytes, n * sizeof *x);
    return n * 4 % 3 == 0 || (bytes[n * 4] == 0 && bytes[n * 4 + 1] == 0);
}

/* ---- reading */

static void read_bits(struct fkv_reader *r, const struct fkv_model *m, const json_t *layer,
                      const char *place, const char *key, uint8_t *bits) {
    const json_t *heads = fkv_json_heads(r, m, layer, place, key);
    for (size_t h = 0; heads && h < (size_t)m->n_kv_heads; h++) {
        const json_t *string = json_array_get(heads, h);
        if (!json_is_string(string)) {
            FKV_JSON_FAIL(r, "%s%s[%zu]: %s, expected a string", place, key, h,
                          fkv_json_type(string));
            return;
        }
        if (json_string_length(string) != (size_t)m->head_dim) {
            FKV_JSON_FAIL(r, "%s%s[%zu]: %zu characters, expected %d", place, key, h,
                          json_string_length(string), m->head_dim);
            return;
        }
        const char *text = json_string_value(string);
        for (int d = 0; d < m->head_dim; d++) {
            const char *at = text[d] && text[d] != '?' ? strchr(codes, text[d]) : NULL;
            if (!at) {
                FKV_JSON_FAIL(r, "%s%s[%zu]: character %d is not 0, 2, 3, 4, 8 or x", place, key, h,
                              d);
                return;
            }
            *bits++ = (uint8_t)(at - codes);
        }
    }
}

/* An empty string stands for zeros. */
static void read_carriers(struct fkv_reader *r, const struct fkv_model *m, const json_t *layer,
                          const char *place, const char *key, float *carrier) {
    const json_t *heads = fkv_json_heads(r, m, layer, place, key);
    const size_t dim = (size_t)m->head_dim;
    for (size_t h = 0; heads && h < (size_t)m->n_kv_heads; h++, carrier += dim) {
        const json_t *string = json_array_get(heads, h);
        if (!json_is_string(string)) {
            FKV_JSON_FAIL(r, "%s%s[%zu]: %s, expected a string", place, key, h,
                          fkv_json_type(string));
            return;
        }
        size_t length = json_string_length(string);
        memset(carrier, 0, dim * sizeof *carrier);
        if (length == 0) {
            continue;
        }
        if (length != TEXT_BYTES(dim) || !decode_floats(json_string_value(string), dim, carrier)) {
            FKV_JSON_FAIL(r, "%s%s[%zu]: not the base64 text of %zu floats", place, key, h, dim);
            return;
        }
        for (size_t d = 0; d < dim; d++) {
            if (!(fabsf(carrier[d]) <= FKV_MAX_CARRIER)) {
                FKV_JSON_FAIL(r, "%s%s[%zu]: float %zu is %g, not a number in +-%g", place, key, h,
                              d, (double)carrier[d], (double)FKV_MAX_CARRIER);
                return;
            }
        }
    }
}

/* All channels of all layers, of K and of V. */
struct channels {
    uint8_t *bits[2];
    float *carrier[2];
};

static void read_layer(struct fkv_reader *r, const struct fkv_model *m, json_t *layer, size_t index,
                       const struct channels *c) {
    static const char *const keys[] = {"k", "v", "k_carrier", "v_carrier"};
    const size_t first = index * (size_t)m->n_kv_heads * (size_t)m->head_dim;
    char place[64];
    snprintf(place, sizeof place, "layers[%zu].", index);
    if (!json_is_object(layer)) {
        FKV_JSON_FAIL(r, "layers[%zu]: %s, expected an object", index, fkv_json_type(layer));
        return;
    }
    fkv_json_only_keys(r, layer, place, keys, COUNT(keys));
    for (int part = 0; part < 2; part++) {
        read_bits(r, m, layer, place, keys[part], c->bits[part] + first);
        read_carriers(r, m, layer, place, keys[2 + part], c->carrier[part] + first);
    }
}

static void read_layers(struct fkv_reader *r, const json_t *root, const struct fkv_model *m,
                        const struct channels *c) {
    const size_t n_layers = (size_t)m->n_layers;
    json_t *layers = fkv_json_member(r, root, "", "layers", JSON_ARRAY);
    if (r->status == FKV_OK && json_array_size(layers) != n_layers) {
        FKV_JSON_FAIL(r, "layers: %zu entries, expected %zu", json_array_size(layers), n_layers);
    }
    for (size_t i = 0; r->status == FKV_OK && i < n_layers; i++) {
        read_layer(r, m, json_array_get(layers, i), i, c);
    }
}

void fkv_json_read_coded(struct fkv_reader *r, json_t *root, struct fkv_model *model,
                         const fkv_codec_params *codec, struct fkv_profile_object **out) {
    /* at most 2^28 channels: the geometry was checked */
    const size_t n = (size_t)model->n_layers * (size_t)model->n_kv_heads * (size_t)model->head_dim;
    const size_t bytes = 2 * n * (sizeof(float) + 1);
    float *floats = fkv_heap_alloc(&r->ctx->heap, bytes);
    if (!floats) {
        r->status = fkv_fail_memory(r->ctx, bytes, "channels");
        return;
    }
    uint8_t *bits = (uint8_t *)(floats + 2 * n);
    const struct channels c = {{bits, bits + n}, {floats, floats + n}};
    read_layers(r, root, model, &c);
    if (r->status == FKV_OK) {
        r->status = fkv_profile_new_coded(r->ctx, model, codec, c.bits[0], c.bits[1], c.carrier[0],
                                          c.carrier[1], out);
        if (r->status == FKV_ERR_INVALID) {
            r->status = FKV_ERR_FORMAT; /* carriers that RoPE makes too large */
        }
    }
    fkv_heap_free(&r->ctx->heap, floats, bytes);
}

/* ---- writing */

static json_t *bits_text(const struct fkv_profile_object *p, int layer, fkv_part part, int head) {
    uint8_t bits[FKV_MAX_HEAD_DIM];
    char text[FKV_MAX_HEAD_DIM];
    fkv_profile_bits(p, layer, part, head, bits);
    for (int d = 0; d < p->model.head_dim; d++) {
        text[d] = codes[bits[d]];
    }
    return json_stringn(text, (size_t)p->model.head_dim);
}

static json_t *carrier_text(const struct fkv_profile_object *p, int layer, fkv_part part,
                            int head) {
    char text[TEXT_BYTES(FKV_MAX_HEAD_DIM)];
    const size_t dim = (size_t)p->model.head_dim;
    if (!fkv_profile_residuals(p, layer, part, head)->carried) {
        return json_string("");
    }
    encode_floats(fkv_profile_carrier(p, layer, part, head), dim, text);
    return json_stringn(text, TEXT_BYTES(dim));
}

static json_t *heads_tree(const struct fkv_profile_object *p, int layer, fkv_part part,
                          json_t *text(const struct fkv_profile_object *, int, fkv_part, int)) {
    json_t *heads = json_array();
    for (int h = 0; h < p->model.n_kv_heads; h++) {
        if (json_array_append_new(heads, text(p, layer, part, h)) != 0) {
            json_decref(heads);
            return NULL;
        }
    }
    return heads;
}

json_t *fkv_json_coded_layers(const struct fkv_profile_object *p) {
    json_t *layers = json_array();
    for (int i = 0; i < p->model.n_layers; i++) {
        json_t *layer =
            json_pack("{s:o, s:o, s:o, s:o}", "k", heads_tree(p, i, FKV_PART_K, bits_text), "v",
                      heads_tree(p, i, FKV_PART_V, bits_text), "k_carrier",
                      heads_tree(p, i, FKV_PART_K, carrier_text), "v_carrier",
                      heads_tree(p, i, FKV_PART_V, carrier_text));
        if (json_array_append_new(layers, layer) != 0) {
            json_decref(layers);
            return NULL;
        }
    }
    return layers;
}
