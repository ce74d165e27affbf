/* SPDX-License-Identifier: Apache-2.0 */
#include "profile/json.h"

#include <inttypes.h>
#include <string.h>

const char *fkv_json_type(const json_t *value) {
    static const char *const names[] = {"object", "array", "string", "integer",
                                        "real",   "true",  "false",  "null"};
    return value ? names[json_typeof(value)] : "nothing";
}

#define MAX_TOKEN 4096 /* bytes of a string or number; a model's id can take 1532 */

/* Whether the parser can be trusted with a text. Its memory is not on the context's heap, so hold it down
 * beforehand. A text of nothing but brackets becomes a tree of a hundred times its size: that is refused
 * beyond eight times the largest text. And where jansson 2.14 gets no memory for a longer token, it goes
 * on beyond the end of the buffer: so tokens stay so short that they never need much. */
static fkv_status check_size(struct fkv_ctx *ctx, const char *text, size_t bytes) {
    uint64_t tree = 0;
    size_t token = 0;
    bool in_string = false, escaped = false;
    if (bytes > ctx->max_file_bytes) {
        return fkv_fail(ctx, FKV_ERR_LIMIT, "the text has %zu bytes, max_file_bytes is %" PRIu64,
                        bytes, ctx->max_file_bytes);
    }
    for (size_t i = 0; i < bytes && token <= MAX_TOKEN; i++) {
        char c = text[i];
        token++;
        if (in_string) {
            in_string = escaped || c != '"';
            escaped = !escaped && c == '\\';
        } else if (c == '"') {
            in_string = true;
        } else if (c == ',' || c == '[' || c == '{') {
            tree += c == ',' ? 64 : 256;
            token = 0;
        } else if (c == ']' || c == '}' || c == ':' || c == ' ' || (c >= '\t' && c <= '\r')) {
            token = 0;
        }
    }
    if (token > MAX_TOKEN) {
        return fkv_fail(ctx, FKV_ERR_FORMAT, "a string or number of more than %d bytes", MAX_TOKEN);
    }
    if (tree / 8 > ctx->max_file_bytes) {
        return fkv_fail(ctx, FKV_ERR_LIMIT, "the text has too many values for max_file_bytes");
    }
    return FKV_OK;
}

fkv_status fkv_json_parse(struct fkv_ctx *ctx, const char *text, size_t bytes, json_t **root) {
    fkv_status status = check_size(ctx, text, bytes);
    if (status != FKV_OK) {
        return status;
    }
    json_error_t error;
    memset(&error, 0, sizeof error); /* the parser may fail before it does so itself */
    json_t *value = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    /* It is vague about its own lack of memory: no code at all, or, inside a string, as if the text were
     * wrong. Only the first can be told apart. */
    enum json_error_code code = value ? json_error_unknown : json_error_code(&error);
    if (!value && (code == json_error_out_of_memory || code == json_error_unknown)) {
        return fkv_fail(ctx, FKV_ERR_NOMEM, "no memory to parse %zu bytes", bytes);
    }
    if (!value) {
        return fkv_fail(ctx, FKV_ERR_FORMAT, "line %d, column %d: %s", error.line, error.column,
                        error.text);
    }
    if (!json_is_object(value)) {
        json_decref(value);
        return fkv_fail(ctx, FKV_ERR_FORMAT, "the text is an array, expected an object");
    }
    *root = value;
    return FKV_OK;
}

/* ---- members of objects */

json_t *fkv_json_member(struct fkv_reader *r, const json_t *object, const char *place,
                        const char *key, json_type type) {
    json_t *value = r->status == FKV_OK ? json_object_get(object, key) : NULL;
    if (r->status != FKV_OK) {
        return NULL;
    }
    if (!value) {
        FKV_JSON_FAIL(r, "%s%s: missing", place, key);
        return NULL;
    }
    static const char *const expected[] = {"an object", "an array", "a string", "an integer",
                                           "a number"};
    if (json_typeof(value) != type && !(type == JSON_REAL && json_is_integer(value))) {
        FKV_JSON_FAIL(r, "%s%s: %s, expected %s", place, key, fkv_json_type(value), expected[type]);
        return NULL;
    }
    return value;
}

void fkv_json_only_keys(struct fkv_reader *r, json_t *object, const char *place,
                        const char *const *known, size_t count) {
    const char *key;
    json_t *value;
    if (r->status != FKV_OK) {
        return;
    }
    json_object_foreach(object, key, value) {
        bool found = false;
        for (size_t i = 0; i < count; i++) {
            found = found || strcmp(key, known[i]) == 0;
        }
        if (!found) {
            FKV_JSON_FAIL(r, "%s%.60s: unknown key", place, key);
            return;
        }
    }
}

int64_t fkv_json_int(struct fkv_reader *r, const json_t *object, const char *place,
                     const char *key) {
    return json_integer_value(fkv_json_member(r, object, place, key, JSON_INTEGER));
}

int32_t fkv_json_int32(struct fkv_reader *r, const json_t *object, const char *place,
                       const char *key) {
    int64_t value = fkv_json_int(r, object, place, key);
    if (value < INT32_MIN || value > INT32_MAX) {
        FKV_JSON_FAIL(r, "%s%s: %" PRId64 " is out of range", place, key, value);
        return 0;
    }
    return (int32_t)value;
}

double fkv_json_real(struct fkv_reader *r, const json_t *object, const char *place,
                     const char *key) {
    return json_number_value(fkv_json_member(r, object, place, key, JSON_REAL));
}

int32_t fkv_json_name(struct fkv_reader *r, const json_t *object, const char *place,
                      const char *key, const char *const *names, size_t count) {
    const char *name = json_string_value(fkv_json_member(r, object, place, key, JSON_STRING));
    if (!name) {
        return 0;
    }
    for (size_t i = 0; i < count; i++) {
        if (names[i] && strcmp(name, names[i]) == 0) {
            return (int32_t)i;
        }
    }
    FKV_JSON_FAIL(r, "%s%s: unknown name \"%.60s\"", place, key, name);
    return 0;
}

json_t *fkv_json_heads(struct fkv_reader *r, const struct fkv_model *m, const json_t *layer,
                       const char *place, const char *key) {
    json_t *heads = fkv_json_member(r, layer, place, key, JSON_ARRAY);
    if (r->status == FKV_OK && json_array_size(heads) != (size_t)m->n_kv_heads) {
        FKV_JSON_FAIL(r, "%s%s: %zu entries, expected %d", place, key, json_array_size(heads),
                      m->n_kv_heads);
    }
    return r->status == FKV_OK ? heads : NULL;
}
