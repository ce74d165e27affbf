/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Statistics as bytes, little-endian, each piece a multiple of 8:
 *
 *     "FKVCALIB" | version u64 | bytes in all u64 | geometry: struct head | inv_freq f64[rope_dim / 2]
 *     counts i64[n_layers][5] | sums f64[n_layers][2][FKV_N_SUM][Hk * D] | weights f64[n_layers][Hk * D]
 *     FNV-1a of all before, u64
 */
#include "calib/sensitivity.h"

#include <math.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "numbers are written as they lie in memory");

#define VERSION 1
static const char MAGIC[8] = {'F', 'K', 'V', 'C', 'A', 'L', 'I', 'B'};

struct head {
    char magic[8];
    uint64_t version, bytes;
    int32_t n_layers, n_q_heads, n_kv_heads, head_dim, rope_layout, rope_dim;
    int32_t codec[8]; /* fkv_codec_params, 0 for its size */
    double rope_scaling, softmax_scale;
    char model_id[256];
};
_Static_assert(sizeof(struct head) == 352, "no padding");

static uint64_t checksum(const char *data, size_t bytes) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ (unsigned char)data[i]) * UINT64_C(0x100000001b3);
    return hash;
}

struct sizes {
    size_t inv_freq, counts, sums, weights, all;
};

static struct sizes sizes_of(const struct fkv_model *m) {
    struct sizes s = {
        .inv_freq = (size_t)(m->rope_dim / 2) * sizeof(double),
        .counts = (size_t)m->n_layers * sizeof(struct fkv_sensitivity_counts),
        .sums = fkv_sensitivity_sums(m) * sizeof(double),
        .weights = (size_t)m->n_layers * fkv_sensitivity_channels(m) * sizeof(double),
    };
    /* at most 2^30 channels: far from overflow */
    s.all = sizeof(struct head) + s.inv_freq + s.counts + s.sums + s.weights + sizeof(uint64_t);
    return s;
}

static char *put(char *to, const void *from, size_t bytes) {
    if (bytes)
        memcpy(to, from, bytes);
    return to + bytes;
}

fkv_status fkv_sensitivity_save(const struct fkv_sensitivity *s, char *buffer, size_t bytes,
                                size_t *needed) {
    const struct fkv_model *m = s->model;
    const struct sizes size = sizes_of(m);
    struct head head = {
        .version = VERSION,
        .bytes = size.all,
        .n_layers = m->n_layers,
        .n_q_heads = m->n_q_heads,
        .n_kv_heads = m->n_kv_heads,
        .head_dim = m->head_dim,
        .rope_layout = m->rope_layout,
        .rope_dim = m->rope_dim,
        .codec = {0, s->codec.storage_dtype, s->codec.group, s->codec.block, s->codec.n_sink,
                  s->codec.n_local, s->codec.domain, s->codec.spectral_bins},
        .rope_scaling = m->rope_scaling,
        .softmax_scale = m->softmax_scale,
    };
    memcpy(head.magic, MAGIC, sizeof MAGIC);
    memcpy(head.model_id, m->model_id, sizeof head.model_id);
    *needed = size.all;
    if (buffer && bytes < size.all)
        return fkv_fail(s->ctx, FKV_ERR_BUFFER, "the statistics have %zu bytes, the buffer %zu",
                        size.all, bytes);
    if (!buffer)
        return FKV_OK;
    char *at = put(buffer, &head, sizeof head);
    at = put(at, m->inv_freq, size.inv_freq);
    at = put(at, s->counts, size.counts);
    at = put(at, s->sums, size.sums);
    at = put(at, s->weights, size.weights);
    const uint64_t sum = checksum(buffer, (size_t)(at - buffer));
    put(at, &sum, sizeof sum);
    return FKV_OK;
}

/* ---- reading: nothing is believed before it is checked */

static fkv_status check_frame(struct fkv_ctx *ctx, const char *data, size_t bytes,
                              struct head *head) {
    if (bytes > ctx->max_file_bytes)
        return fkv_fail(ctx, FKV_ERR_LIMIT, "%zu bytes, max_file_bytes is %llu", bytes,
                        (unsigned long long)ctx->max_file_bytes);
    if (bytes < sizeof *head + sizeof(uint64_t) || memcmp(data, MAGIC, sizeof MAGIC) != 0)
        return fkv_fail(ctx, FKV_ERR_FORMAT, "not the statistics of a calibrator");
    memcpy(head, data, sizeof *head);
    if (head->version != VERSION)
        return fkv_fail(ctx, FKV_ERR_VERSION, "version %llu, this library reads %d",
                        (unsigned long long)head->version, VERSION);
    if (head->bytes != bytes)
        return fkv_fail(ctx, FKV_ERR_FORMAT, "%zu bytes, %llu expected", bytes,
                        (unsigned long long)head->bytes);
    uint64_t sum;
    memcpy(&sum, data + bytes - sizeof sum, sizeof sum);
    if (sum != checksum(data, bytes - sizeof sum))
        return fkv_fail(ctx, FKV_ERR_CHECKSUM, "the statistics fail their checksum");
    return FKV_OK;
}

static fkv_status read_geometry(struct fkv_ctx *ctx, const struct head *head, const char *data,
                                size_t bytes, struct fkv_model *model) {
    double inv_freq[FKV_MAX_HEAD_DIM / 2] = {0};
    fkv_model_params p = {
        .struct_size = sizeof p,
        .n_layers = head->n_layers,
        .n_q_heads = head->n_q_heads,
        .n_kv_heads = head->n_kv_heads,
        .head_dim = head->head_dim,
        .rope_layout = head->rope_layout,
        .rope_dim = head->rope_dim,
        .rope_scaling = head->rope_scaling,
        .softmax_scale = head->softmax_scale,
        .model_id = head->model_id,
        .inv_freq = inv_freq,
    };
    const int pairs =
        head->rope_dim > 0 && head->rope_dim <= FKV_MAX_HEAD_DIM ? head->rope_dim / 2 : 0;
    if ((size_t)pairs * sizeof(double) > bytes - sizeof *head)
        return fkv_fail(ctx, FKV_ERR_FORMAT, "too short for its geometry");
    memcpy(inv_freq, data + sizeof *head, (size_t)pairs * sizeof(double));
    p.inv_freq_count = pairs;
    if (!memchr(head->model_id, 0, sizeof head->model_id))
        return fkv_fail(ctx, FKV_ERR_FORMAT, "model.id: not terminated");
    fkv_status status = fkv_model_build(ctx, FKV_ERR_FORMAT, &p, model);
    if (!status && sizes_of(model).all != bytes) {
        fkv_model_free(ctx, model);
        status = fkv_fail(ctx, FKV_ERR_FORMAT, "%zu bytes do not fit the geometry", bytes);
    }
    return status;
}

fkv_status fkv_sensitivity_read_model(struct fkv_ctx *ctx, const char *data, size_t bytes,
                                      struct fkv_model *model, fkv_codec_params *codec) {
    struct head head;
    fkv_status status = check_frame(ctx, data, bytes, &head);
    if (status)
        return status;
    const int32_t *c = head.codec;
    *codec = (fkv_codec_params){sizeof *codec, c[1], c[2], c[3], c[4], c[5], c[6], c[7]};
    status = fkv_codec_check(ctx, FKV_ERR_FORMAT, "codec", codec);
    return status ? status : read_geometry(ctx, &head, data, bytes, model);
}

static fkv_status check_counts(struct fkv_ctx *ctx, const struct fkv_sensitivity_counts *c,
                               int layer) {
    const int64_t most = INT64_C(1) << 53;
    if (c->windows < 0 || c->tokens < c->windows || c->tokens > most || c->gradient_tokens < 0 ||
        c->gradient_tokens > c->tokens || c->query_tokens < 0 || c->query_tokens > c->tokens ||
        (c->windows == 0 && c->tokens > 0) || c->weighted < 0 || c->weighted > 1)
        return fkv_fail(ctx, FKV_ERR_FORMAT, "layer %d: impossible counts", layer);
    return FKV_OK;
}

static fkv_status check_sums(const struct fkv_sensitivity *s) {
    const size_t channels = fkv_sensitivity_channels(s->model);
    for (int row = 0; row < s->model->n_layers * 2 * FKV_N_SUM; row++)
        for (size_t i = 0; i < channels; i++) {
            const double x = s->sums[(size_t)row * channels + i];
            if (!isfinite(x) || (row % FKV_N_SUM != FKV_SUM_X && x < 0))
                return fkv_fail(s->ctx, FKV_ERR_FORMAT, "layer %d: impossible sums",
                                row / (2 * FKV_N_SUM));
        }
    for (size_t i = 0; i < (size_t)s->model->n_layers * channels; i++)
        if (!(s->weights[i] >= 0 && s->weights[i] <= 1e30))
            return fkv_fail(s->ctx, FKV_ERR_FORMAT, "layer %zu: impossible weights", i / channels);
    return FKV_OK;
}

fkv_status fkv_sensitivity_read_sums(struct fkv_sensitivity *s, const char *data, size_t bytes) {
    const struct sizes size = sizes_of(s->model);
    const char *at = data + sizeof(struct head) + size.inv_freq;
    if (size.all != bytes)
        return fkv_fail(s->ctx, FKV_ERR_FORMAT, "%zu bytes do not fit the geometry", bytes);
    memcpy(s->counts, at, size.counts);
    memcpy(s->sums, at + size.counts, size.sums);
    memcpy(s->weights, at + size.counts + size.sums, size.weights);
    fkv_status status = FKV_OK;
    for (int layer = 0; !status && layer < s->model->n_layers; layer++)
        status = check_counts(s->ctx, &s->counts[layer], layer);
    return status ? status : check_sums(s);
}
