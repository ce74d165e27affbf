/* SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64

#include "safetensors.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define MAX_HEADER_BYTES ((uint64_t)100 << 20)
#define MAX_INDEX_BYTES ((size_t)64 << 20)
#define MAX_DIMS 4

struct file {
    char *path;
    FILE *stream;
    uint64_t data_offset; /* of the first tensor byte in the file */
    uint64_t data_bytes;
};

struct tensor {
    char *name;
    const struct file *file;
    fkv_dtype dtype;
    size_t ndim;
    uint64_t shape[MAX_DIMS];
    uint64_t begin; /* in the file's data */
    uint64_t bytes;
    bool was_read;
};

struct needle_weights {
    struct file **files;
    size_t n_files;
    struct tensor *tensors;
    size_t n_tensors;
};

static size_t dtype_bytes(fkv_dtype dtype) {
    return dtype == FKV_DTYPE_F32 ? 4 : 2;
}

static fkv_dtype dtype_of(const char *name) {
    if (!name) {
        return FKV_DTYPE_NONE;
    }
    return !strcmp(name, "F32")    ? FKV_DTYPE_F32
           : !strcmp(name, "F16")  ? FKV_DTYPE_F16
           : !strcmp(name, "BF16") ? FKV_DTYPE_BF16
                                   : FKV_DTYPE_NONE;
}

static struct tensor *find(const struct needle_weights *w, const char *name) {
    for (size_t i = 0; i < w->n_tensors; i++) {
        if (!strcmp(w->tensors[i].name, name)) {
            return &w->tensors[i];
        }
    }
    return NULL;
}

/* Shape and byte range, which must agree with each other and lie within the file. */
static int parse_extent(struct tensor *t, const json_t *entry, struct needle_error *error) {
    const char *path = t->file->path;
    const json_t *shape = json_object_get(entry, "shape");
    const json_t *range = json_object_get(entry, "data_offsets");
    const json_t *first = json_array_get(range, 0);
    const json_t *last = json_array_get(range, 1);
    t->ndim = json_array_size(shape);
    if (!json_is_array(shape) || t->ndim > MAX_DIMS || json_array_size(range) != 2 ||
        !json_is_integer(first) || !json_is_integer(last)) {
        return needle_fail(error, NEEDLE_BAD_INPUT,
                           "%s: tensor %s: shape or data_offsets are malformed", path, t->name);
    }
    uint64_t bytes = dtype_bytes(t->dtype);
    for (size_t i = 0; i < t->ndim; i++) {
        const json_t *extent = json_array_get(shape, i);
        json_int_t n = json_integer_value(extent);
        if (!json_is_integer(extent) || n < 1 || (uint64_t)n > INT64_MAX / bytes) {
            return needle_fail(error, NEEDLE_BAD_INPUT,
                               "%s: tensor %s: shape is not of positive integers, or too large",
                               path, t->name);
        }
        t->shape[i] = (uint64_t)n;
        bytes *= (uint64_t)n;
    }
    json_int_t begin = json_integer_value(first);
    json_int_t end = json_integer_value(last);
    if (begin < 0 || end < begin || (uint64_t)(end - begin) != bytes) {
        return needle_fail(error, NEEDLE_BAD_INPUT,
                           "%s: tensor %s: data_offsets do not fit its shape and type", path,
                           t->name);
    }
    if ((uint64_t)end > t->file->data_bytes) {
        return needle_fail(error, NEEDLE_BAD_INPUT,
                           "%s: truncated: tensor %s ends at byte %" PRIu64
                           ", the file has %" PRIu64,
                           path, t->name, t->file->data_offset + (uint64_t)end,
                           t->file->data_offset + t->file->data_bytes);
    }
    t->begin = (uint64_t)begin;
    t->bytes = bytes;
    return NEEDLE_OK;
}

static int add_tensor(struct needle_weights *w, const struct file *file, const char *name,
                      const json_t *entry, struct needle_error *error) {
    if (find(w, name)) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "%s: tensor %s is in another file too",
                           file->path, name);
    }
    struct tensor t = {.file = file};
    const char *dtype = json_string_value(json_object_get(entry, "dtype"));
    t.dtype = dtype_of(dtype);
    if (t.dtype == FKV_DTYPE_NONE) {
        return needle_fail(error, NEEDLE_BAD_INPUT,
                           "%s: tensor %s has type %s; F32, F16 and BF16 can be read", file->path,
                           name, dtype ? dtype : "(none)");
    }
    struct tensor *grown = realloc(w->tensors, (w->n_tensors + 1) * sizeof *grown);
    if (!grown) {
        return needle_fail(error, NEEDLE_FAILED, "%s: out of memory", file->path);
    }
    w->tensors = grown;
    t.name = strdup(name);
    if (!t.name) {
        return needle_fail(error, NEEDLE_FAILED, "%s: out of memory", file->path);
    }
    w->tensors[w->n_tensors++] = t;
    return parse_extent(&w->tensors[w->n_tensors - 1], entry, error);
}

static int parse_header(struct needle_weights *w, const struct file *file, const char *text,
                        size_t length, struct needle_error *error) {
    json_error_t why;
    json_t *root = json_loadb(text, length, JSON_REJECT_DUPLICATES, &why);
    if (!json_is_object(root)) {
        json_decref(root);
        return needle_fail(error, NEEDLE_BAD_INPUT, "%s: not a safetensors file: header: %s",
                           file->path, root ? "not a JSON object" : why.text);
    }
    int code = NEEDLE_OK;
    uint64_t end = 0;
    const char *name;
    json_t *entry;
    json_object_foreach(root, name, entry) {
        if (!strcmp(name, "__metadata__")) {
            continue;
        }
        code = add_tensor(w, file, name, entry, error);
        if (code) {
            break;
        }
        const struct tensor *t = &w->tensors[w->n_tensors - 1];
        end = t->begin + t->bytes > end ? t->begin + t->bytes : end;
    }
    if (!code && end != file->data_bytes) {
        code = needle_fail(error, NEEDLE_BAD_INPUT, "%s: %" PRIu64 " bytes follow the last tensor",
                           file->path, file->data_bytes - end);
    }
    json_decref(root);
    return code;
}

static int read_header(struct needle_weights *w, struct file *file, struct needle_error *error) {
    struct stat status;
    unsigned char prefix[8];
    if (fstat(fileno(file->stream), &status) != 0 || !S_ISREG(status.st_mode)) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "%s: not a regular file", file->path);
    }
    uint64_t size = (uint64_t)status.st_size;
    if (size < sizeof prefix || fread(prefix, 1, sizeof prefix, file->stream) != sizeof prefix) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "%s: not a safetensors file: too short",
                           file->path);
    }
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--) {
        length = length << 8 | prefix[i];
    }
    if (length < 2 || length > MAX_HEADER_BYTES || length > size - sizeof prefix) {
        return needle_fail(error, NEEDLE_BAD_INPUT,
                           "%s: not a safetensors file, or truncated: a header of %" PRIu64
                           " bytes in a file of %" PRIu64,
                           file->path, length, size);
    }
    file->data_offset = sizeof prefix + length;
    file->data_bytes = size - file->data_offset;
    char *text = malloc((size_t)length);
    if (!text) {
        return needle_fail(error, NEEDLE_FAILED, "%s: out of memory", file->path);
    }
    int code = fread(text, 1, (size_t)length, file->stream) == length
                   ? parse_header(w, file, text, (size_t)length, error)
                   : needle_fail(error, NEEDLE_BAD_INPUT, "%s: could not be read", file->path);
    free(text);
    return code;
}

static char *join(const char *dir, const char *name) {
    size_t bytes = strlen(dir) + strlen(name) + 2;
    char *path = malloc(bytes);
    if (path) {
        snprintf(path, bytes, "%s/%s", dir, name);
    }
    return path;
}

static int open_file(struct needle_weights *w, const char *dir, const char *name,
                     struct needle_error *error) {
    struct file *file = calloc(1, sizeof *file);
    struct file **grown = realloc(w->files, (w->n_files + 1) * sizeof *grown);
    if (grown) {
        w->files = grown;
    }
    if (!file || !grown) {
        free(file);
        return needle_fail(error, NEEDLE_FAILED, "%s: out of memory", dir);
    }
    w->files[w->n_files++] = file;
    file->path = join(dir, name);
    if (!file->path) {
        return needle_fail(error, NEEDLE_FAILED, "%s: out of memory", dir);
    }
    file->stream = fopen(file->path, "rb");
    if (!file->stream) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "%s: %s", file->path, strerror(errno));
    }
    return read_header(w, file, error);
}

static struct file *find_file(const struct needle_weights *w, const char *dir, const char *name) {
    size_t skip = strlen(dir) + 1;
    for (size_t i = 0; i < w->n_files; i++) {
        if (!strcmp(w->files[i]->path + skip, name)) {
            return w->files[i];
        }
    }
    return NULL;
}

static int open_indexed(struct needle_weights *w, const char *dir, const char *index_path,
                        const json_t *root, struct needle_error *error) {
    json_t *map = json_object_get(root, "weight_map");
    const char *name;
    json_t *value;
    if (!json_is_object(map)) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "%s: no weight_map", index_path);
    }
    json_object_foreach(map, name, value) {
        const char *file = json_string_value(value);
        if (!file || !file[0] || strchr(file, '/')) {
            return needle_fail(error, NEEDLE_BAD_INPUT, "%s: %s: not the name of a file here",
                               index_path, name);
        }
        int code = find_file(w, dir, file) ? NEEDLE_OK : open_file(w, dir, file, error);
        if (code) {
            return code;
        }
        const struct tensor *t = find(w, name);
        if (!t || t->file != find_file(w, dir, file)) {
            return needle_fail(error, NEEDLE_BAD_INPUT, "%s: tensor %s is not in %s", index_path,
                               name, file);
        }
    }
    return NEEDLE_OK;
}

static int open_index(struct needle_weights *w, const char *dir, const char *index_path,
                      struct needle_error *error) {
    char *text;
    size_t length;
    int code = needle_read_file(index_path, MAX_INDEX_BYTES, &text, &length, error);
    if (code) {
        return code;
    }
    json_error_t why;
    json_t *root = json_loadb(text, length, JSON_REJECT_DUPLICATES, &why);
    code = root ? open_indexed(w, dir, index_path, root, error)
                : needle_fail(error, NEEDLE_BAD_INPUT, "%s: line %d: %s", index_path, why.line,
                              why.text);
    json_decref(root);
    free(text);
    return code;
}

int needle_weights_open(const char *dir, struct needle_weights **out, struct needle_error *error) {
    struct stat status;
    struct needle_weights *w = calloc(1, sizeof *w);
    char *index_path = join(dir, "model.safetensors.index.json");
    int code = NEEDLE_OK;
    if (!w || !index_path) {
        code = needle_fail(error, NEEDLE_FAILED, "%s: out of memory", dir);
    } else if (stat(index_path, &status) == 0) {
        code = open_index(w, dir, index_path, error);
    } else {
        code = open_file(w, dir, "model.safetensors", error);
    }
    free(index_path);
    if (code) {
        needle_weights_close(w);
        w = NULL;
    }
    *out = w;
    return code;
}

void needle_weights_close(struct needle_weights *weights) {
    if (!weights) {
        return;
    }
    for (size_t i = 0; i < weights->n_files; i++) {
        if (weights->files[i]->stream) {
            fclose(weights->files[i]->stream);
        }
        free(weights->files[i]->path);
        free(weights->files[i]);
    }
    for (size_t i = 0; i < weights->n_tensors; i++) {
        free(weights->tensors[i].name);
    }
    free(weights->files);
    free(weights->tensors);
    free(weights);
}

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float f16_value(uint32_t half) {
    float sign = half & 0x8000u ? -1.0f : 1.0f;
    uint32_t exponent = half >> 10 & 31u;
    uint32_t fraction = half & 1023u;
    if (exponent == 31) {
        return fraction ? NAN : sign * INFINITY;
    }
    return exponent ? sign * ldexpf((float)(1024u + fraction), (int)exponent - 25)
                    : sign * ldexpf((float)fraction, -24);
}

static float element(const unsigned char *p, fkv_dtype dtype) {
    uint32_t low = (uint32_t)p[0] | (uint32_t)p[1] << 8;
    switch (dtype) {
    case FKV_DTYPE_F32:
        return from_bits(low | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
    case FKV_DTYPE_F16:
        return f16_value(low);
    default:
        return from_bits(low << 16);
    }
}

static int read_elements(struct tensor *t, float *out, struct needle_error *error) {
    unsigned char buffer[16384];
    const size_t size = dtype_bytes(t->dtype);
    FILE *stream = t->file->stream;
    size_t done = 0;
    int sought = fseeko(stream, (off_t)(t->file->data_offset + t->begin), SEEK_SET);
    for (uint64_t left = t->bytes; left > 0;) {
        size_t bytes = left < sizeof buffer ? (size_t)left : sizeof buffer;
        if (sought != 0 || fread(buffer, 1, bytes, stream) != bytes) {
            return needle_fail(error, NEEDLE_BAD_INPUT, "%s: tensor %s could not be read",
                               t->file->path, t->name);
        }
        for (size_t i = 0; i < bytes; i += size, done++) {
            out[done] = element(buffer + i, t->dtype);
            if (!isfinite(out[done])) {
                return needle_fail(error, NEEDLE_BAD_INPUT,
                                   "%s: tensor %s: element %zu is not finite", t->file->path,
                                   t->name, done);
            }
        }
        left -= bytes;
    }
    t->was_read = true;
    return NEEDLE_OK;
}

int needle_weights_read(struct needle_weights *weights, const char *name, size_t rows, size_t cols,
                        float *out, struct needle_error *error) {
    struct tensor *t = find(weights, name);
    if (!t) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "%s: tensor %s is missing",
                           weights->n_files ? weights->files[0]->path : "(no file)", name);
    }
    size_t ndim = cols ? 2 : 1;
    if (t->ndim != ndim || t->shape[0] != rows || (cols && t->shape[1] != cols)) {
        char have[128] = "";
        for (size_t i = 0; i < t->ndim; i++) {
            size_t used = strlen(have);
            snprintf(have + used, sizeof have - used, "%s%" PRIu64, i ? ", " : "", t->shape[i]);
        }
        char want[64];
        snprintf(want, sizeof want, cols ? "%zu, %zu" : "%zu", rows, cols);
        return needle_fail(error, NEEDLE_BAD_INPUT,
                           "%s: tensor %s has shape [%s]; config.json asks for [%s]", t->file->path,
                           name, have, want);
    }
    return read_elements(t, out, error);
}

const char *needle_weights_unread(const struct needle_weights *weights,
                                  bool (*ignore)(const char *name, const void *user),
                                  const void *user, const char **file) {
    for (size_t i = 0; i < weights->n_tensors; i++) {
        const struct tensor *t = &weights->tensors[i];
        if (!t->was_read && !ignore(t->name, user)) {
            *file = t->file->path;
            return t->name;
        }
    }
    return NULL;
}
