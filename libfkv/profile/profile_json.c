/* SPDX-License-Identifier: Apache-2.0 */
/* docs/formats.md describes what is read and written here. */
#define _GNU_SOURCE
#include "profile/json.h"
#include "profile/profile.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FORMAT_NAME "fkv-profile"
#define FORMAT_VERSION 1

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

/* Indices are the values of the enums in fkv.h. */
static const char *const dtype_names[] = {NULL, "f32", "f16", "bf16"};
static const char *const rope_names[] = {"none", "half_split", "interleaved"};
static const char *const coding_names[] = {"exact", "fourier"};
static const char *const restoration_names[] = {"least_squares", "authors"};
static const char *const outgrow_names[] = {"segment", "error"};

/* ---- reading. The first error stays; after it every function returns nothing. */

struct reader {
    struct fkv_ctx *ctx;
    fkv_status status;
};

#define FAIL(r, ...) ((r)->status = fkv_fail((r)->ctx, FKV_ERR_FORMAT, __VA_ARGS__))

/* place: "" or the path of `object` with a final dot. NULL if missing or of another type. */
static json_t *member(struct reader *r, const json_t *object, const char *place, const char *key,
                      json_type type) {
    json_t *value = r->status == FKV_OK ? json_object_get(object, key) : NULL;
    if (r->status != FKV_OK) {
        return NULL;
    }
    if (!value) {
        FAIL(r, "%s%s: missing", place, key);
        return NULL;
    }
    static const char *const expected[] = {"an object", "an array", "a string", "an integer",
                                           "a number"};
    if (json_typeof(value) != type && !(type == JSON_REAL && json_is_integer(value))) {
        FAIL(r, "%s%s: %s, expected %s", place, key, fkv_json_type(value), expected[type]);
        return NULL;
    }
    return value;
}

static void only_keys(struct reader *r, json_t *object, const char *place, const char *const *known,
                      size_t count) {
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
            FAIL(r, "%s%.60s: unknown key", place, key);
            return;
        }
    }
}

static int64_t read_int(struct reader *r, const json_t *object, const char *place,
                        const char *key) {
    return json_integer_value(member(r, object, place, key, JSON_INTEGER));
}

static int32_t read_int32(struct reader *r, const json_t *object, const char *place,
                          const char *key) {
    int64_t value = read_int(r, object, place, key);
    if (value < INT32_MIN || value > INT32_MAX) {
        FAIL(r, "%s%s: %" PRId64 " is out of range", place, key, value);
        return 0;
    }
    return (int32_t)value;
}

static double read_real(struct reader *r, const json_t *object, const char *place,
                        const char *key) {
    return json_number_value(member(r, object, place, key, JSON_REAL));
}

static int32_t read_name(struct reader *r, const json_t *object, const char *place, const char *key,
                         const char *const *names, size_t count) {
    const char *name = json_string_value(member(r, object, place, key, JSON_STRING));
    if (!name) {
        return 0;
    }
    for (size_t i = 0; i < count; i++) {
        if (names[i] && strcmp(name, names[i]) == 0) {
            return (int32_t)i;
        }
    }
    FAIL(r, "%s%s: unknown name \"%.60s\"", place, key, name);
    return 0;
}

static void read_header(struct reader *r, json_t *root) {
    const char *format = json_string_value(member(r, root, "", "format", JSON_STRING));
    if (format && strcmp(format, FORMAT_NAME) != 0) {
        FAIL(r, "format: \"%.60s\", expected \"%s\"", format, FORMAT_NAME);
    }
    int64_t version = read_int(r, root, "", "version");
    if (r->status == FKV_OK && version != FORMAT_VERSION) {
        r->status = fkv_fail(r->ctx, FKV_ERR_VERSION, "version: %" PRId64 ", this library reads %d",
                             version, FORMAT_VERSION);
    }
}

static void read_inv_freq(struct reader *r, const json_t *object, fkv_model_params *p,
                          double inv_freq[FKV_MAX_HEAD_DIM / 2]) {
    json_t *array = member(r, object, "model.", "inv_freq", JSON_ARRAY);
    size_t n = json_array_size(array);
    if (n > FKV_MAX_HEAD_DIM / 2) {
        FAIL(r, "model.inv_freq: %zu entries, at most %d", n, FKV_MAX_HEAD_DIM / 2);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *value = json_array_get(array, i);
        if (!json_is_number(value)) {
            FAIL(r, "model.inv_freq[%zu]: %s, expected a number", i, fkv_json_type(value));
            return;
        }
        inv_freq[i] = json_number_value(value);
    }
    p->inv_freq = inv_freq;
    p->inv_freq_count = (int32_t)n;
}

static void read_model(struct reader *r, const json_t *root, struct fkv_model *model) {
    static const char *const keys[] = {"id",           "n_layers",     "n_q_heads", "n_kv_heads",
                                       "head_dim",     "rope_layout",  "rope_dim",  "inv_freq",
                                       "rope_scaling", "softmax_scale"};
    json_t *object = member(r, root, "", "model", JSON_OBJECT);
    double inv_freq[FKV_MAX_HEAD_DIM / 2];
    const char *place = "model.";
    only_keys(r, object, place, keys, COUNT(keys));
    fkv_model_params p = {.struct_size = sizeof p};
    p.model_id = json_string_value(member(r, object, place, "id", JSON_STRING));
    p.n_layers = read_int32(r, object, place, "n_layers");
    p.n_q_heads = read_int32(r, object, place, "n_q_heads");
    p.n_kv_heads = read_int32(r, object, place, "n_kv_heads");
    p.head_dim = read_int32(r, object, place, "head_dim");
    p.rope_layout = read_name(r, object, place, "rope_layout", rope_names, COUNT(rope_names));
    p.rope_dim = read_int32(r, object, place, "rope_dim");
    read_inv_freq(r, object, &p, inv_freq);
    p.rope_scaling = read_real(r, object, place, "rope_scaling");
    p.softmax_scale = read_real(r, object, place, "softmax_scale");
    if (r->status == FKV_OK) {
        r->status = fkv_model_build(r->ctx, FKV_ERR_FORMAT, &p, model);
    }
}

static void read_coding(struct reader *r, const json_t *root, fkv_coding *coding,
                        fkv_fourier_params *fourier) {
    static const char *const keys[] = {"kind",   "storage",   "coefficients", "bins",
                                       "n_sink", "n_local",   "restoration",  "outgrow",
                                       "period", "min_middle"};
    const char *place = "coding.";
    json_t *object = member(r, root, "", "coding", JSON_OBJECT);
    *coding = read_name(r, object, place, "kind", coding_names, COUNT(coding_names));
    bool exact = *coding == FKV_CODING_EXACT;
    only_keys(r, object, place, keys, exact ? 2 : COUNT(keys));
    memset(fourier, 0, sizeof *fourier);
    fourier->struct_size = sizeof *fourier;
    fourier->storage_dtype =
        read_name(r, object, place, "storage", dtype_names, COUNT(dtype_names));
    if (exact) {
        return;
    }
    fourier->coefficient_dtype =
        read_name(r, object, place, "coefficients", dtype_names, COUNT(dtype_names));
    fourier->bins = read_int32(r, object, place, "bins");
    fourier->n_sink = read_int32(r, object, place, "n_sink");
    fourier->n_local = read_int32(r, object, place, "n_local");
    fourier->restoration =
        read_name(r, object, place, "restoration", restoration_names, COUNT(restoration_names));
    fourier->outgrow = read_name(r, object, place, "outgrow", outgrow_names, COUNT(outgrow_names));
    fourier->period = read_int(r, object, place, "period");
    fourier->min_middle = read_int(r, object, place, "min_middle");
    if (r->status == FKV_OK) {
        r->status = fkv_fourier_check(r->ctx, FKV_ERR_FORMAT, "coding", fourier);
    }
}

/* One string for each KV head into mask[n_kv_heads][head_dim]. */
static void read_heads(struct reader *r, const struct fkv_model *m, const json_t *layer,
                       size_t index, const char *key, uint8_t *mask) {
    char place[64];
    snprintf(place, sizeof place, "layers[%zu].", index);
    json_t *heads = member(r, layer, place, key, JSON_ARRAY);
    if (r->status == FKV_OK && json_array_size(heads) != (size_t)m->n_kv_heads) {
        FAIL(r, "%s%s: %zu entries, expected %d", place, key, json_array_size(heads),
             m->n_kv_heads);
    }
    for (size_t h = 0; r->status == FKV_OK && h < (size_t)m->n_kv_heads; h++) {
        const json_t *string = json_array_get(heads, h);
        if (!json_is_string(string)) {
            FAIL(r, "%s%s[%zu]: %s, expected a string", place, key, h, fkv_json_type(string));
        } else if (json_string_length(string) != (size_t)m->head_dim) {
            FAIL(r, "%s%s[%zu]: %zu characters, expected %d", place, key, h,
                 json_string_length(string), m->head_dim);
        }
        const char *codes = json_string_value(string);
        for (size_t d = 0; r->status == FKV_OK && d < (size_t)m->head_dim; d++) {
            if (codes[d] != 'x' && codes[d] != 'f') {
                FAIL(r, "%s%s[%zu]: character %zu is neither x nor f", place, key, h, d);
            }
            *mask++ = codes[d] == 'f';
        }
    }
}

/* masks: K's [n_layers][n_kv_heads][head_dim], then V's. */
static void read_layers(struct reader *r, const json_t *root, const struct fkv_model *m,
                        uint8_t *masks) {
    static const char *const keys[] = {"k", "v"};
    size_t per_layer = (size_t)m->n_kv_heads * (size_t)m->head_dim;
    size_t n_layers = (size_t)m->n_layers;
    json_t *layers = member(r, root, "", "layers", JSON_ARRAY);
    if (r->status == FKV_OK && json_array_size(layers) != n_layers) {
        FAIL(r, "layers: %zu entries, expected %zu", json_array_size(layers), n_layers);
    }
    for (size_t i = 0; r->status == FKV_OK && i < n_layers; i++) {
        json_t *layer = json_array_get(layers, i);
        char place[64];
        snprintf(place, sizeof place, "layers[%zu].", i);
        if (!json_is_object(layer)) {
            FAIL(r, "layers[%zu]: %s, expected an object", i, fkv_json_type(layer));
            return;
        }
        only_keys(r, layer, place, keys, COUNT(keys));
        read_heads(r, m, layer, i, "k", masks + i * per_layer);
        read_heads(r, m, layer, i, "v", masks + (n_layers + i) * per_layer);
    }
}

static void read_fourier(struct reader *r, const json_t *root, struct fkv_model *model,
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
    struct reader r = {.ctx = ctx};
    json_t *root = NULL;
    r.status = fkv_json_parse(ctx, json, bytes, &root);
    if (r.status != FKV_OK) {
        return r.status;
    }
    struct fkv_model model;
    memset(&model, 0, sizeof model);
    fkv_coding coding;
    fkv_fourier_params fourier;
    read_header(&r, root); /* first: other versions may have other keys */
    read_coding(&r, root, &coding, &fourier);
    only_keys(&r, root, "", keys, coding == FKV_CODING_EXACT ? 4 : 5);
    read_model(&r, root, &model);
    if (r.status == FKV_OK) {
        if (coding == FKV_CODING_EXACT) {
            r.status = fkv_profile_new_exact(ctx, &model, fourier.storage_dtype, out);
        } else {
            read_fourier(&r, root, &model, &fourier, out);
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
    json_t *root =
        json_pack("{s:s, s:i, s:o, s:o}", "format", FORMAT_NAME, "version", FORMAT_VERSION, "model",
                  model_tree(&p->model), "coding", coding_tree(p));
    if (root && p->coding != FKV_CODING_EXACT &&
        json_object_set_new(root, "layers", layers_tree(p)) != 0) {
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

/* ---- files */

static fkv_status fail_io(struct fkv_ctx *ctx, const char *path, const char *what, int error) {
    char buffer[128];
    return fkv_fail(ctx, FKV_ERR_IO, "%s: %s: %s", path, what,
                    strerror_r(error, buffer, sizeof buffer));
}

/* The size of a file that is fit to be read. */
static fkv_status check_file(struct fkv_ctx *ctx, const char *path, int fd, size_t *size) {
    struct stat st;
    if (fstat(fd, &st) != 0) {
        return fail_io(ctx, path, "fstat", errno);
    }
    if (!S_ISREG(st.st_mode)) {
        return fkv_fail(ctx, FKV_ERR_IO, "%s: not a regular file", path);
    }
    if ((uint64_t)st.st_size > ctx->max_file_bytes) {
        return fkv_fail(ctx, FKV_ERR_LIMIT, "%s: %" PRId64 " bytes, max_file_bytes is %" PRIu64,
                        path, (int64_t)st.st_size, ctx->max_file_bytes);
    }
    *size = (size_t)st.st_size;
    return FKV_OK;
}

/* Up to `size` bytes; *got is less if the file has become shorter. */
static fkv_status read_all(struct fkv_ctx *ctx, const char *path, int fd, char *buffer, size_t size,
                           size_t *got) {
    *got = 0;
    while (*got < size) {
        ssize_t n = read(fd, buffer + *got, size - *got);
        if (n < 0 && errno != EINTR) {
            return fail_io(ctx, path, "read", errno);
        }
        if (n == 0) {
            break;
        }
        *got += n > 0 ? (size_t)n : 0;
    }
    return FKV_OK;
}

fkv_status fkv_profile_from_file(struct fkv_ctx *ctx, const char *path,
                                 struct fkv_profile_object **out) {
    /* non-blocking: opening a pipe must not wait for a writer */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0) {
        return fail_io(ctx, path, "open", errno);
    }
    size_t size = 0, got;
    fkv_status status = check_file(ctx, path, fd, &size);
    if (status == FKV_OK) {
        char *text = fkv_heap_alloc(&ctx->heap, size + 1);
        if (!text) {
            status = fkv_fail_memory(ctx, size + 1, path);
        } else {
            status = read_all(ctx, path, fd, text, size, &got);
            if (status == FKV_OK) {
                status = fkv_profile_from_json(ctx, text, got, out);
            }
            fkv_heap_free(&ctx->heap, text, size + 1);
        }
    }
    close(fd);
    return status;
}

static int write_all(int fd, const char *text, size_t bytes) {
    while (bytes > 0) {
        ssize_t n = write(fd, text, bytes);
        if (n < 0 && errno != EINTR) {
            return errno;
        }
        if (n > 0) {
            text += n;
            bytes -= (size_t)n;
        }
    }
    return fsync(fd) == 0 ? 0 : errno;
}

/* A new file beside `path`, its name in `temporary`; -1 with errno. */
static int open_beside(const char *path, char *temporary, size_t room) {
    const char *slash = strrchr(path, '/');
    int directory = slash ? (int)(slash - path) + 1 : 0;
    int fd = -1;
    for (unsigned i = 0; i < 1000; i++) {
        snprintf(temporary, room, "%.*s.fkv-%ld-%u.tmp", directory, path, (long)getpid(), i);
        fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOCTTY, 0666);
        if (fd >= 0 || errno != EEXIST) {
            break;
        }
    }
    return fd;
}

static fkv_status replace_file(struct fkv_ctx *ctx, const char *path, char *temporary, size_t room,
                               const char *text, size_t bytes) {
    struct stat st;
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode)) {
        return fkv_fail(ctx, FKV_ERR_IO, "%s: not a regular file", path);
    }
    int fd = open_beside(path, temporary, room);
    if (fd < 0) {
        return fail_io(ctx, path, "create", errno);
    }
    const char *what = "write";
    int error = write_all(fd, text, bytes);
    if (close(fd) != 0 && error == 0) {
        error = errno;
    }
    if (error == 0 && rename(temporary, path) != 0) {
        what = "rename";
        error = errno;
    }
    if (error != 0) {
        unlink(temporary);
        return fail_io(ctx, path, what, error);
    }
    return FKV_OK;
}

fkv_status fkv_profile_to_file(const struct fkv_profile_object *profile, const char *path) {
    struct fkv_ctx *ctx = profile->ctx;
    char *text;
    size_t bytes;
    fkv_status status = fkv_profile_to_json(profile, &text, &bytes);
    if (status != FKV_OK) {
        return status;
    }
    size_t room = strlen(path) + 64;
    char *temporary = fkv_heap_alloc(&ctx->heap, room);
    status = temporary ? replace_file(ctx, path, temporary, room, text, bytes)
                       : fkv_fail_memory(ctx, room, path);
    fkv_heap_free(&ctx->heap, temporary, room);
    fkv_heap_free(&ctx->heap, text, bytes + 1);
    return status;
}
