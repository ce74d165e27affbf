/* SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L

#include "tiny.h"

#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_HEADER 16384
#define MAX_DATA ((size_t)1 << 20)

/* A file that is being put together. */
struct file {
    char header[MAX_HEADER];
    unsigned char *data;
    size_t data_bytes;
};

struct writer {
    const struct tiny *tiny;
    struct file files[2];
    char map[MAX_HEADER];
    int at; /* file that the next tensor goes to */
};

static void must(bool good, const char *what) {
    if (!good) {
        perror(what);
        abort();
    }
}

static void append(char *text, size_t bytes, const char *format, const char *a, const char *b) {
    size_t used = strlen(text);
    must((size_t)snprintf(text + used, bytes - used, format, a, b) < bytes - used, "header");
}

float tiny_value(const char *name, size_t i) {
    uint32_t x = (uint32_t)i * 2654435761u;
    for (; *name; name++) {
        x = (x ^ (unsigned char)*name) * 16777619u;
    }
    x ^= x >> 15;
    return (float)((int)(x % 65) - 32) / 64.0f;
}

static uint32_t encode(float value, fkv_dtype dtype) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (dtype == FKV_DTYPE_F32) {
        return bits;
    }
    if (dtype == FKV_DTYPE_BF16) {
        return bits >> 16;
    }
    /* binary16 of a normal number whose low mantissa bits are zero, or of zero or NaN. */
    uint32_t sign = bits >> 16 & 0x8000u, exponent = bits >> 23 & 255u;
    if (exponent == 0) {
        return sign;
    }
    uint32_t half_exponent = exponent == 255 ? 31 : exponent - 112;
    return sign | half_exponent << 10 | (bits >> 13 & 1023u);
}

static const char *dtype_name(fkv_dtype dtype) {
    return dtype == FKV_DTYPE_F32 ? "F32" : dtype == FKV_DTYPE_F16 ? "F16" : "BF16";
}

static void put_value(struct file *f, float value, fkv_dtype dtype) {
    const size_t size = dtype == FKV_DTYPE_F32 ? 4 : 2;
    uint32_t bits = encode(value, dtype);
    must(f->data_bytes + size <= MAX_DATA, "data");
    for (size_t i = 0; i < size; i++) {
        f->data[f->data_bytes++] = (unsigned char)(bits >> 8 * i);
    }
}

static void put_tensor(struct writer *w, const char *name, int rows, int cols) {
    const struct tiny *t = w->tiny;
    struct file *f = &w->files[w->at];
    if (t->skip && !strcmp(t->skip, name)) {
        return;
    }
    rows += cols ? t->added_rows : 0;
    const size_t begin = f->data_bytes, count = (size_t)rows * (size_t)(cols ? cols : 1);
    for (size_t i = 0; i < count; i++) {
        float value = tiny_value(name, i);
        if (i == 0 && t->nan && !strcmp(t->nan, name)) {
            const uint32_t nan = 0x7fc00000u;
            memcpy(&value, &nan, sizeof value);
        }
        put_value(f, value, t->dtype);
    }
    char extent[160], shape[64];
    snprintf(shape, sizeof shape, cols ? "[%d,%d]" : "[%d]", rows, cols);
    snprintf(extent, sizeof extent, "{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
             dtype_name(t->dtype), shape, begin, f->data_bytes);
    append(f->header, sizeof f->header, ",\"%s\":%s", name, extent);
    append(w->map, sizeof w->map, w->map[0] ? ",\"%s\":\"part-%s\"" : "\"%s\":\"part-%s\"", name,
           w->at ? "1" : "0");
}

static void put_layer(struct writer *w, int layer) {
    const int q = TINY_HEADS * w->tiny->head_dim, kv = w->tiny->kv_heads * w->tiny->head_dim;
    const struct {
        const char *name;
        int rows, cols;
    } parts[] = {
        {"input_layernorm", TINY_HIDDEN, 0},        {"self_attn.q_proj", q, TINY_HIDDEN},
        {"self_attn.k_proj", kv, TINY_HIDDEN},      {"self_attn.v_proj", kv, TINY_HIDDEN},
        {"self_attn.o_proj", TINY_HIDDEN, q},       {"post_attention_layernorm", TINY_HIDDEN, 0},
        {"mlp.gate_proj", TINY_INNER, TINY_HIDDEN}, {"mlp.up_proj", TINY_INNER, TINY_HIDDEN},
        {"mlp.down_proj", TINY_HIDDEN, TINY_INNER}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        char name[128];
        snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, parts[i].name);
        put_tensor(w, name, parts[i].rows, parts[i].cols);
    }
}

void tiny_write_file(const char *dir, const char *name, const void *bytes, size_t count) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *file = fopen(path, "wb");
    must(file && fwrite(bytes, 1, count, file) == count, path);
    must(fclose(file) == 0, path);
}

static void write_weights(const char *dir, const char *name, struct file *f) {
    append(f->header, sizeof f->header, "}%s%s", "", "");
    const size_t length = strlen(f->header), total = 8 + length + f->data_bytes;
    unsigned char *all = malloc(total);
    must(all != NULL, "memory");
    for (int i = 0; i < 8; i++) {
        all[i] = (unsigned char)((uint64_t)length >> 8 * i);
    }
    memcpy(all + 8, f->header, length);
    memcpy(all + 8 + length, f->data, f->data_bytes);
    tiny_write_file(dir, name, all, total);
    free(all);
}

static void write_config(const char *dir, const struct tiny *t) {
    char text[2048], head_dim[64] = "";
    if (t->head_dim != TINY_HIDDEN / TINY_HEADS) {
        snprintf(head_dim, sizeof head_dim, ", \"head_dim\": %d", t->head_dim);
    }
    snprintf(text, sizeof text,
             "{\"architectures\": [\"LlamaForCausalLM\"], \"hidden_act\": \"silu\", "
             "\"vocab_size\": %d, \"hidden_size\": %d, \"intermediate_size\": %d, "
             "\"num_hidden_layers\": %d, \"num_attention_heads\": %d, \"num_key_value_heads\": %d, "
             "\"rope_theta\": 1000.0, \"rms_norm_eps\": 1e-5, \"rope_scaling\": null, "
             "\"tie_word_embeddings\": %s%s%s}\n",
             TINY_VOCAB, TINY_HIDDEN, TINY_INNER, TINY_LAYERS, TINY_HEADS, t->kv_heads,
             t->tied ? "true" : "false", head_dim, t->config ? t->config : "");
    tiny_write_file(dir, "config.json", text, strlen(text));
}

void tiny_write(const char *dir, const struct tiny *tiny) {
    struct writer *w = calloc(1, sizeof *w);
    must(w != NULL, "memory");
    w->tiny = tiny;
    for (int i = 0; i < 2; i++) {
        w->files[i].data = malloc(MAX_DATA);
        must(w->files[i].data != NULL, "memory");
        append(w->files[i].header, MAX_HEADER, "{\"__metadata__\":{\"format\":\"pt\"}%s%s", "", "");
    }
    put_tensor(w, "model.embed_tokens.weight", TINY_VOCAB, TINY_HIDDEN);
    for (int layer = 0; layer < TINY_LAYERS; layer++) {
        w->at = tiny->indexed && layer > 0;
        put_layer(w, layer);
    }
    put_tensor(w, "model.norm.weight", TINY_HIDDEN, 0);
    if (!tiny->tied) {
        put_tensor(w, "lm_head.weight", TINY_VOCAB, TINY_HIDDEN);
    }
    if (tiny->extra) {
        put_tensor(w, tiny->extra, 2, 0);
    }
    write_config(dir, tiny);
    write_weights(dir, tiny->indexed ? "part-0" : "model.safetensors", &w->files[0]);
    if (tiny->indexed) {
        char index[MAX_HEADER + 64];
        write_weights(dir, "part-1", &w->files[1]);
        snprintf(index, sizeof index, "{\"weight_map\": {%s}}\n", w->map);
        tiny_write_file(dir, "model.safetensors.index.json", index, strlen(index));
    }
    free(w->files[0].data);
    free(w->files[1].data);
    free(w);
}

void tiny_make_dir(char *dir, size_t bytes) {
    const char *parent = getenv("TMPDIR");
    snprintf(dir, bytes, "%s/fkv-tiny-XXXXXX", parent ? parent : "/tmp");
    must(mkdtemp(dir) != NULL, dir);
}

void tiny_remove_dir(const char *dir) {
    DIR *stream = opendir(dir);
    must(stream != NULL, dir);
    for (struct dirent *entry; (entry = readdir(stream));) {
        char path[1024];
        if (entry->d_name[0] != '.') {
            snprintf(path, sizeof path, "%s/%s", dir, entry->d_name);
            must(unlink(path) == 0, path);
        }
    }
    closedir(stream);
    must(rmdir(dir) == 0, dir);
}
