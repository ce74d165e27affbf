/* SPDX-License-Identifier: Apache-2.0 */
/* docs/formats.md describes what is read and written here. */
#include "profile/json.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define FORMAT_NAME "fkv-profile"
/* Version 2 has calibrated profiles. What version 1 can say is still written as version 1. */
#define FORMAT_VERSION 2

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

/* Indices are the values of the enums in fkv.h. */
static const char *const dtype_names[] = {NULL, "f32", "f16", "bf16"};
static const char *const rope_names[] = {"none", "half_split", "interleaved"};
static const char *const coding_names[] = {"exact", "fourier", "calibrated"};
static const char *const domain_names[] = {"rotated", "unrotated"};
static const char *const restoration_names[] = {"least_squares", "authors"};
static const char *const outgrow_names[] = {"segment", "error"};

/* ---- reading. The first error stays; after it every function returns nothing. */

static int64_t read_header(struct fkv_reader *r, json_t *root) {
    const char *format = json_string_value(fkv_json_member(r, root, "", "format", JSON_STRING));
    if (format && strcmp(format, FORMAT_NAME) != 0) {
        FKV_JSON_FAIL(r, "format: \"%.60s\", expected \"%s\"", format, FORMAT_NAME);
    }
    int64_t version = fkv_json_int(r, root, "", "version");
    if (r->status == FKV_OK && (version < 1 || version > FORMAT_VERSION)) {
        r->status =
            fkv_fail(r->ctx, FKV_ERR_VERSION, "version: %" PRId64 ", this library reads 1 to %d",
                     version, FORMAT_VERSION);
    }
    return version;
}

static void read_inv_freq(struct fkv_reader *r, const json_t *object, fkv_model_params *p,
                          double inv_freq[FKV_MAX_HEAD_DIM / 2]) {
    json_t *array = fkv_json_member(r, object, "model.", "inv_freq", JSON_ARRAY);
    size_t n = json_array_size(array);
    if (n > FKV_MAX_HEAD_DIM / 2) {
        FKV_JSON_FAIL(r, "model.inv_freq: %zu entries, at most %d", n, FKV_MAX_HEAD_DIM / 2);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *value = json_array_get(array, i);
        if (!json_is_number(value)) {
            FKV_JSON_FAIL(r, "model.inv_freq[%zu]: %s, expected a number", i, fkv_json_type(value));
            return;
        }
        inv_freq[i] = json_number_value(value);
    }
    p->inv_freq = inv_freq;
    p->inv_freq_count = (int32_t)n;
}

static void read_model(struct fkv_reader *r, const json_t *root, struct fkv_model *model) {
    static const char *const keys[] = {"id",           "n_layers",     "n_q_heads", "n_kv_heads",
                                       "head_dim",     "rope_layout",  "rope_dim",  "inv_freq",
                                       "rope_scaling", "softmax_scale"};
    json_t *object = fkv_json_member(r, root, "", "model", JSON_OBJECT);
    double inv_freq[FKV_MAX_HEAD_DIM / 2];
    const char *place = "model.";
    fkv_json_only_keys(r, object, place, keys, COUNT(keys));
    fkv_model_params p = {.struct_size = sizeof p};
    p.model_id = json_string_value(fkv_json_member(r, object, place, "id", JSON_STRING));
    p.n_layers = fkv_json_int32(r, object, place, "n_layers");
    p.n_q_heads = fkv_json_int32(r, object, place, "n_q_heads");
    p.n_kv_heads = fkv_json_int32(r, object, place, "n_kv_heads");
    p.head_dim = fkv_json_int32(r, object, place, "head_dim");
    p.rope_layout = fkv_json_name(r, object, place, "rope_layout", rope_names, COUNT(rope_names));
    p.rope_dim = fkv_json_int32(r, object, place, "rope_dim");
    read_inv_freq(r, object, &p, inv_freq);
    p.rope_scaling = fkv_json_real(r, object, place, "rope_scaling");
    p.softmax_scale = fkv_json_real(r, object, place, "softmax_scale");
    if (r->status == FKV_OK) {
        r->status = fkv_model_build(r->ctx, FKV_ERR_FORMAT, &p, model);
    }
}

/* How channels are held; of fourier and codec the one that `coding` names is filled. */
struct coding {
    fkv_coding kind;
    fkv_dtype storage;
    fkv_fourier_params fourier;
    fkv_codec_params codec;
};

static void read_fourier_coding(struct fkv_reader *r, json_t *object, const char *place,
                                struct coding *coding) {
    static const char *const keys[] = {"kind",   "storage",   "coefficients", "bins",
                                       "n_sink", "n_local",   "restoration",  "outgrow",
                                       "period", "min_middle"};
    fkv_fourier_params *fourier = &coding->fourier;
    fkv_json_only_keys(r, object, place, keys, COUNT(keys));
    fourier->struct_size = sizeof *fourier;
    fourier->storage_dtype = coding->storage;
    fourier->coefficient_dtype =
        fkv_json_name(r, object, place, "coefficients", dtype_names, COUNT(dtype_names));
    fourier->bins = fkv_json_int32(r, object, place, "bins");
    fourier->n_sink = fkv_json_int32(r, object, place, "n_sink");
    fourier->n_local = fkv_json_int32(r, object, place, "n_local");
    fourier->restoration =
        fkv_json_name(r, object, place, "restoration", restoration_names, COUNT(restoration_names));
    fourier->outgrow =
        fkv_json_name(r, object, place, "outgrow", outgrow_names, COUNT(outgrow_names));
    fourier->period = fkv_json_int(r, object, place, "period");
    fourier->min_middle = fkv_json_int(r, object, place, "min_middle");
    if (r->status == FKV_OK) {
        r->status = fkv_fourier_check(r->ctx, FKV_ERR_FORMAT, "coding", fourier);
    }
}

static void read_calibrated_coding(struct fkv_reader *r, json_t *object, const char *place,
                                   struct coding *coding) {
    static const char *const keys[] = {"kind",   "storage", "group",  "block",
                                       "n_sink", "n_local", "domain", "spectral_bins"};
    fkv_codec_params *codec = &coding->codec;
    fkv_json_only_keys(r, object, place, keys, COUNT(keys));
    codec->struct_size = sizeof *codec;
    codec->storage_dtype = coding->storage;
    codec->group = fkv_json_int32(r, object, place, "group");
    codec->block = fkv_json_int32(r, object, place, "block");
    codec->n_sink = fkv_json_int32(r, object, place, "n_sink");
    codec->n_local = fkv_json_int32(r, object, place, "n_local");
    codec->domain = fkv_json_name(r, object, place, "domain", domain_names, COUNT(domain_names));
    codec->spectral_bins = fkv_json_int32(r, object, place, "spectral_bins");
    if (r->status == FKV_OK) {
        r->status = fkv_codec_check(r->ctx, FKV_ERR_FORMAT, "coding", codec);
    }
}

static void read_coding(struct fkv_reader *r, const json_t *root, int64_t version,
                        struct coding *coding) {
    static const char *const exact_keys[] = {"kind", "storage"};
    const char *place = "coding.";
    json_t *object = fkv_json_member(r, root, "", "coding", JSON_OBJECT);
    memset(coding, 0, sizeof *coding);
    coding->kind = fkv_json_name(r, object, place, "kind", coding_names,
                                 version == 1 ? FKV_CODING_CALIBRATED : COUNT(coding_names));
    coding->storage = fkv_json_name(r, object, place, "storage", dtype_names, COUNT(dtype_names));
    if (coding->kind == FKV_CODING_EXACT) {
        fkv_json_only_keys(r, object, place, exact_keys, COUNT(exact_keys));
    } else if (coding->kind == FKV_CODING_FOURIER) {
        read_fourier_coding(r, object, place, coding);
    } else {
        read_calibrated_coding(r, object, place, coding);
    }
}

/* One string for each KV head into mask[n_kv_heads][head_dim]. */
static void read_heads(struct fkv_reader *r, const struct fkv_model *m, const json_t *layer,
                       size_t index, const char *key, uint8_t *mask) {
    char place[64];
    snprintf(place, sizeof place, "layers[%zu].", index);
    const json_t *heads = fkv_json_heads(r, m, layer, place, key);
    for (size_t h = 0; r->status == FKV_OK && h < (size_t)m->n_kv_heads; h++) {
        const json_t *string = json_array_get(heads, h);
        if (!json_is_string(string)) {
            FKV_JSON_FAIL(r, "%s%s[%zu]: %s, expected a string", place, key, h,
                          fkv_json_type(string));
        } else if (json_string_length(string) != (size_t)m->head_dim) {
            FKV_JSON_FAIL(r, "%s%s[%zu]: %zu characters, expected %d", place, key, h,
                          json_string_length(string), m->head_dim);
        }
        const char *codes = json_string_value(string);
        for (size_t d = 0; r->status == FKV_OK && d < (size_t)m->head_dim; d++) {
            if (codes[d] != 'x' && codes[d] != 'f') {
                FKV_JSON_FAIL(r, "%s%s[%zu]: character %zu is neither x nor f", place, key, h, d);
            }
            *mask++ = codes[d] == 'f';
        }
    }
}

/* masks: K's [n_layers][n_kv_heads][head_dim], then V's. */
static void read_layers(struct fkv_reader *r, const json_t *root, const struct fkv_model *m,
                        uint8_t *masks) {
    static const char *const keys[] = {"k", "v"};
    size_t per_layer = (size_t)m->n_kv_heads * (size_t)m->head_dim;
    size_t n_layers = (size_t)m->n_layers;
    json_t *layers = fkv_json_member(r, root, "", "layers", JSON_ARRAY);
    if (r->status == FKV_OK && json_array_size(layers) != n_layers) {
        FKV_JSON_FAIL(r, "layers: %zu entries, expected %zu", json_array_size(layers), n_layers);
    }
    for (size_t i = 0; r->status == FKV_OK && i < n_layers; i++) {
        json_t *layer = json_array_get(layers, i);
        char place[64];
        snprintf(place, sizeof place, "layers[%zu].", i);
        if (!json_is_object(layer)) {
            FKV_JSON_FAIL(r, "layers[%zu]: %s, expected an object", i, fkv_json_type(layer));
            return;
        }
        fkv_json_only_keys(r, layer, place, keys, COUNT(keys));
        read_heads(r, m, layer, i, "k", masks + i * per_layer);
        read_heads(r, m, layer, i, "v", masks + (n_layers + i) * per_layer);
    }
}

static void read_fourier(struct fkv_reader *r, const json_t *root, struct fkv_model *model,
                         const fkv_fourier_params *fourier, struct fkv_profile_object **out) {
    size_t n = (size_t)model->n_layers * (size_t)model->n_kv_heads * (size_t)model->head_dim;
    uint8_t *masks = fkv_heap_alloc(&r->ctx->heap, 2 * n);
    if (!masks) {
        r->status = fkv_fail_memory(r->ctx, 2 * n, "channel masks");
        return;
    }
    read_layers(r, root, model, masks);
    if (r->status == FKV_OK) {
        r->status = fkv_profile_new_fourier(r->ctx, model, fourier, masks, masks + n, out);
    }
    fkv_heap_free(&r->ctx->heap, masks, 2 * n);
}

fkv_status fkv_profile_from_json(struct fkv_ctx *ctx, const char *json, size_t bytes,
                                 struct fkv_profile_object **out) {
    static const char *const keys[] = {"format", "version", "model", "coding", "layers"};
    struct fkv_reader r = {.ctx = ctx};
    json_t *root = NULL;
    r.status = fkv_json_parse(ctx, json, bytes, &root);
    if (r.status != FKV_OK) {
        return r.status;
    }
    struct fkv_model model;
    memset(&model, 0, sizeof model);
    struct coding coding;
    int64_t version = read_header(&r, root); /* first: other versions may have other keys */
    read_coding(&r, root, version, &coding);
    fkv_json_only_keys(&r, root, "", keys, coding.kind == FKV_CODING_EXACT ? 4 : 5);
    read_model(&r, root, &model);
    if (r.status == FKV_OK) {
        if (coding.kind == FKV_CODING_EXACT) {
            r.status = fkv_profile_new_exact(ctx, &model, coding.storage, out);
        } else if (coding.kind == FKV_CODING_FOURIER) {
            read_fourier(&r, root, &model, &coding.fourier, out);
        } else {
            fkv_json_read_coded(&r, root, &model, &coding.codec, out);
        }
        if (r.status != FKV_OK) {
            fkv_model_free(ctx, &model);
        }
    }
    json_decref(root);
    return r.status;
}

/* ---- writing. A NULL anywhere means that there was no memory; json_pack() passes it on. */

static json_t *model_tree(const struct fkv_model *m) {
    json_t *inv_freq = json_array();
    for (int i = 0; i < m->rope_dim / 2; i++) {
        if (json_array_append_new(inv_freq, json_real(m->inv_freq[i])) != 0) {
            json_decref(inv_freq);
            return NULL;
        }
    }
    return json_pack("{s:s, s:i, s:i, s:i, s:i, s:s, s:i, s:o, s:f, s:f}", "id", m->model_id,
                     "n_layers", m->n_layers, "n_q_heads", m->n_q_heads, "n_kv_heads",
                     m->n_kv_heads, "head_dim", m->head_dim, "rope_layout",
                     rope_names[m->rope_layout], "rope_dim", m->rope_dim, "inv_freq", inv_freq,
                     "rope_scaling", m->rope_scaling, "softmax_scale", m->softmax_scale);
}

static json_t *coding_tree(const struct fkv_profile_object *p) {
    const fkv_fourier_params *f = &p->fourier;
    if (p->coding == FKV_CODING_EXACT) {
        return json_pack("{s:s, s:s}", "kind", coding_names[p->coding], "storage",
                         dtype_names[p->storage_dtype]);
    }
    if (p->coding == FKV_CODING_CALIBRATED) {
        const fkv_codec_params *c = &p->codec;
        return json_pack("{s:s, s:s, s:i, s:i, s:i, s:i, s:s, s:i}", "kind",
                         coding_names[p->coding], "storage", dtype_names[p->storage_dtype], "group",
                         (int)c->group, "block", (int)c->block, "n_sink", (int)c->n_sink, "n_local",
                         (int)c->n_local, "domain", domain_names[c->domain], "spectral_bins",
                         (int)c->spectral_bins);
    }
    return json_pack("{s:s, s:s, s:s, s:i, s:i, s:i, s:s, s:s, s:I, s:I}", "kind",
                     coding_names[p->coding], "storage", dtype_names[p->storage_dtype],
                     "coefficients", dtype_names[f->coefficient_dtype], "bins", (int)f->bins,
                     "n_sink", (int)f->n_sink, "n_local", (int)f->n_local, "restoration",
                     restoration_names[f->restoration], "outgrow", outgrow_names[f->outgrow],
                     "period", (json_int_t)f->period, "min_middle", (json_int_t)f->min_middle);
}

static json_t *heads_tree(const struct fkv_profile_object *p, int layer, fkv_part part) {
    json_t *heads = json_array();
    for (int h = 0; h < p->model.n_kv_heads; h++) {
        const struct fkv_channels *c = fkv_profile_head(p, layer, part, h);
        char codes[FKV_MAX_HEAD_DIM];
        memset(codes, 'x', sizeof codes);
        for (int i = 0; i < c->coded; i++) {
            codes[c->list[c->kept + i]] = 'f';
        }
        if (json_array_append_new(heads, json_stringn(codes, (size_t)p->model.head_dim)) != 0) {
            json_decref(heads);
            return NULL;
        }
    }
    return heads;
}

static json_t *layers_tree(const struct fkv_profile_object *p) {
    json_t *layers = json_array();
    for (int i = 0; i < p->model.n_layers; i++) {
        json_t *layer = json_pack("{s:o, s:o}", "k", heads_tree(p, i, FKV_PART_K), "v",
                                  heads_tree(p, i, FKV_PART_V));
        if (json_array_append_new(layers, layer) != 0) {
            json_decref(layers);
            return NULL;
        }
    }
    return layers;
}

static json_t *profile_tree(const struct fkv_profile_object *p) {
    const bool coded = p->coding == FKV_CODING_CALIBRATED;
    json_t *root =
        json_pack("{s:s, s:i, s:o, s:o}", "format", FORMAT_NAME, "version", coded ? 2 : 1, "model",
                  model_tree(&p->model), "coding", coding_tree(p));
    if (root && p->coding != FKV_CODING_EXACT &&
        json_object_set_new(root, "layers", coded ? fkv_json_coded_layers(p) : layers_tree(p)) !=
            0) {
        json_decref(root);
        return NULL;
    }
    return root;
}

struct sink {
    char *text; /* NULL: only count */
    size_t bytes;
};

static int write_sink(const char *text, size_t bytes, void *p) {
    struct sink *sink = p;
    if (sink->text) {
        memcpy(sink->text + sink->bytes, text, bytes);
    }
    sink->bytes += bytes;
    return 0;
}

fkv_status fkv_profile_to_json(const struct fkv_profile_object *profile, char **text,
                               size_t *bytes) {
    struct fkv_ctx *ctx = profile->ctx;
    const size_t flags = JSON_INDENT(1) | JSON_REAL_PRECISION(17);
    struct sink sink = {NULL, 0};
    json_t *root = profile_tree(profile);
    if (!root || json_dump_callback(root, write_sink, &sink, flags) != 0) {
        json_decref(root);
        return fkv_fail(ctx, FKV_ERR_NOMEM, "no memory for the profile's text");
    }
    size_t n = sink.bytes + 1; /* a final newline */
    char *buffer = fkv_heap_alloc(&ctx->heap, n + 1);
    if (!buffer) {
        json_decref(root);
        return fkv_fail_memory(ctx, n + 1, "profile text");
    }
    sink = (struct sink){buffer, 0};
    int failed = json_dump_callback(root, write_sink, &sink, flags);
    json_decref(root);
    if (failed) {
        fkv_heap_free(&ctx->heap, buffer, n + 1);
        return fkv_fail(ctx, FKV_ERR_NOMEM, "no memory for the profile's text");
    }
    buffer[n - 1] = '\n';
    buffer[n] = '\0';
    *text = buffer;
    *bytes = n;
    return FKV_OK;
}
