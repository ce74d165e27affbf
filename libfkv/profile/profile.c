/* SPDX-License-Identifier: Apache-2.0 */
#include "profile/profile.h"

#include <math.h>
#include <string.h>

#define MAX_LAYERS 1024
#define MAX_HEADS 1024
#define MAX_BINS 65536
#define MAX_LOCAL (INT32_C(1) << 30) /* sinks + local + a tile stays an int32 */
#define MIN_PERIOD 64
#define MAX_PERIOD (INT64_C(1) << 40)

/* ---- geometry */

fkv_status fkv_check_ranges(struct fkv_ctx *ctx, fkv_status error, const char *place,
                            const struct fkv_range *ranges, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const struct fkv_range *r = &ranges[i];
        if (r->value < r->least || r->value > r->most) {
            return fkv_fail(ctx, error, "%s.%s: %lld is outside %lld..%lld", place, r->name,
                            (long long)r->value, (long long)r->least, (long long)r->most);
        }
    }
    return FKV_OK;
}

static fkv_status check_geometry(struct fkv_ctx *ctx, fkv_status error, const fkv_model_params *p) {
    const struct fkv_range ranges[] = {
        {"n_layers", p->n_layers, 1, MAX_LAYERS},
        {"n_q_heads", p->n_q_heads, 1, MAX_HEADS},
        {"n_kv_heads", p->n_kv_heads, 1, p->n_q_heads},
        {"head_dim", p->head_dim, 8, FKV_MAX_HEAD_DIM},
        {"rope_layout", p->rope_layout, FKV_ROPE_NONE, FKV_ROPE_INTERLEAVED},
        {"rope_dim", p->rope_dim, 0, p->rope_layout == FKV_ROPE_NONE ? 0 : p->head_dim},
    };
    fkv_status status =
        fkv_check_ranges(ctx, error, "model", ranges, sizeof ranges / sizeof ranges[0]);
    if (status != FKV_OK) {
        return status;
    }
    if (p->n_q_heads % p->n_kv_heads != 0) {
        return fkv_fail(ctx, error, "model.n_q_heads: %d is not a multiple of n_kv_heads %d",
                        (int)p->n_q_heads, (int)p->n_kv_heads);
    }
    if (p->head_dim % 8 != 0) {
        return fkv_fail(ctx, error, "model.head_dim: %d is not a multiple of 8", (int)p->head_dim);
    }
    if (p->rope_dim % 2 != 0) {
        return fkv_fail(ctx, error, "model.rope_dim: %d is odd", (int)p->rope_dim);
    }
    return FKV_OK;
}

static fkv_status check_frequencies(struct fkv_ctx *ctx, fkv_status error,
                                    const fkv_model_params *p, int rope_dim) {
    if (p->inv_freq_count != rope_dim / 2) {
        return fkv_fail(ctx, error, "model.inv_freq: %d entries, expected %d",
                        (int)p->inv_freq_count, rope_dim / 2);
    }
    if (rope_dim > 0 && !p->inv_freq) {
        return fkv_fail(ctx, error, "model.inv_freq: NULL");
    }
    for (int i = 0; i < rope_dim / 2; i++) {
        /* the upper bound keeps position * inv_freq far inside what sin and cos can tell apart */
        if (!(p->inv_freq[i] >= 0.0 && p->inv_freq[i] <= 1e6)) {
            return fkv_fail(ctx, error, "model.inv_freq[%d]: not a number in 0..1e6", i);
        }
    }
    return FKV_OK;
}

/* Factors are used in single precision. 0 stands for `otherwise`. */
static fkv_status check_factor(struct fkv_ctx *ctx, fkv_status error, const char *name,
                               double value, double otherwise, double *out) {
    *out = value == 0.0 ? otherwise : value;
    if (!(*out >= 1e-30 && *out <= 1e30)) {
        return fkv_fail(ctx, error, "model.%s: not a number in 1e-30..1e30", name);
    }
    return FKV_OK;
}

/* JSON can hold nothing but UTF-8 (RFC 3629: no surrogates, no overlong forms, at most U+10FFFF). */
static bool is_utf8(const unsigned char *s, size_t n) {
    static const uint32_t least[4] = {0, 0x80, 0x800, 0x10000};
    for (size_t i = 0; i < n;) {
        int more = s[i] < 0x80 ? 0 : s[i] >> 5 == 6 ? 1 : s[i] >> 4 == 14 ? 2 : 3;
        if (more == 3 && s[i] >> 3 != 30) {
            return false;
        }
        uint32_t code = more == 0 ? s[i] : s[i] & (0x3fu >> more);
        i++;
        for (int k = 0; k < more; k++, i++) {
            if (i == n || s[i] >> 6 != 2) {
                return false;
            }
            code = code << 6 | (s[i] & 0x3fu);
        }
        if (code < least[more] || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) {
            return false;
        }
    }
    return true;
}

static fkv_status copy_id(struct fkv_ctx *ctx, fkv_status error, const char *id,
                          struct fkv_model *model) {
    size_t n = 0;
    while (id && n < sizeof model->model_id && id[n] != '\0') {
        n++;
    }
    if (n == sizeof model->model_id) {
        return fkv_fail(ctx, error, "model.id: longer than %zu bytes", n - 1);
    }
    if (!is_utf8((const unsigned char *)id, n)) {
        return fkv_fail(ctx, error, "model.id: not UTF-8");
    }
    if (n > 0) {
        memcpy(model->model_id, id, n);
    }
    return FKV_OK;
}

static size_t inv_freq_bytes(const struct fkv_model *model) {
    return (size_t)(model->rope_dim / 2) * sizeof(double);
}

static fkv_status copy_frequencies(struct fkv_ctx *ctx, const double *inv_freq,
                                   struct fkv_model *model) {
    size_t bytes = inv_freq_bytes(model);
    model->inv_freq = NULL;
    if (bytes > 0) {
        model->inv_freq = fkv_heap_alloc(&ctx->heap, bytes);
        if (!model->inv_freq) {
            return fkv_fail_memory(ctx, bytes, "inv_freq");
        }
        memcpy(model->inv_freq, inv_freq, bytes);
    }
    return FKV_OK;
}

fkv_status fkv_model_build(struct fkv_ctx *ctx, fkv_status error, const fkv_model_params *p,
                           struct fkv_model *model) {
    fkv_status status = check_geometry(ctx, error, p);
    if (status != FKV_OK) {
        return status;
    }
    struct fkv_model m = {
        .n_layers = p->n_layers,
        .n_q_heads = p->n_q_heads,
        .n_kv_heads = p->n_kv_heads,
        .group = p->n_q_heads / p->n_kv_heads,
        .head_dim = p->head_dim,
        .rope_layout = p->rope_layout,
        .rope_dim = p->rope_layout != FKV_ROPE_NONE && p->rope_dim == 0 ? p->head_dim : p->rope_dim,
    };
    status = check_frequencies(ctx, error, p, m.rope_dim);
    if (status == FKV_OK) {
        status = check_factor(ctx, error, "rope_scaling", p->rope_scaling, 1.0, &m.rope_scaling);
    }
    if (status == FKV_OK) {
        status = check_factor(ctx, error, "softmax_scale", p->softmax_scale,
                              1.0 / sqrt((double)m.head_dim), &m.softmax_scale);
    }
    if (status == FKV_OK) {
        status = copy_id(ctx, error, p->model_id, &m);
    }
    if (status == FKV_OK) {
        status = copy_frequencies(ctx, p->inv_freq, &m);
    }
    if (status == FKV_OK) {
        *model = m;
    }
    return status;
}

fkv_status fkv_model_read(struct fkv_ctx *ctx, const fkv_model_params *params,
                          struct fkv_model *model) {
    fkv_model_params p;
    fkv_status status = fkv_params_read(ctx, "model", params, sizeof p, &p, sizeof p);
    return status == FKV_OK ? fkv_model_build(ctx, FKV_ERR_INVALID, &p, model) : status;
}

fkv_status fkv_model_copy(struct fkv_ctx *ctx, const struct fkv_model *src, struct fkv_model *dst) {
    struct fkv_model m = *src;
    fkv_status status = copy_frequencies(ctx, src->inv_freq, &m);
    if (status == FKV_OK) {
        *dst = m;
    }
    return status;
}

void fkv_model_free(struct fkv_ctx *ctx, struct fkv_model *model) {
    fkv_heap_free(&ctx->heap, model->inv_freq, inv_freq_bytes(model));
    model->inv_freq = NULL;
}

/* ---- Fourier parameters */

void fkv_fourier_defaults(fkv_fourier_params *fourier) {
    *fourier = (fkv_fourier_params){
        .struct_size = sizeof *fourier,
        .storage_dtype = FKV_DTYPE_F16,
        .coefficient_dtype = FKV_DTYPE_F16,
        .bins = 512,
        .n_sink = 4,
        .n_local = 1024,
        .restoration = FKV_RESTORE_LEAST_SQUARES,
        .outgrow = FKV_OUTGROW_SEGMENT,
        .period = 32768,
    };
}

fkv_status fkv_fourier_check(struct fkv_ctx *ctx, fkv_status error, const char *place,
                             fkv_fourier_params *f) {
    const struct fkv_range ranges[] = {
        {"storage_dtype", f->storage_dtype, FKV_DTYPE_F32, FKV_DTYPE_BF16},
        {"coefficient_dtype", f->coefficient_dtype, FKV_DTYPE_F32, FKV_DTYPE_F16},
        {"bins", f->bins, 1, MAX_BINS},
        {"n_sink", f->n_sink, 0, FKV_MAX_SINK},
        {"n_local", f->n_local, 0, MAX_LOCAL},
        {"restoration", f->restoration, FKV_RESTORE_LEAST_SQUARES, FKV_RESTORE_AUTHORS},
        {"outgrow", f->outgrow, FKV_OUTGROW_SEGMENT, FKV_OUTGROW_ERROR},
        {"period", f->period, MIN_PERIOD, MAX_PERIOD},
        {"min_middle", f->min_middle, 0, MAX_PERIOD},
    };
    fkv_status status =
        fkv_check_ranges(ctx, error, place, ranges, sizeof ranges / sizeof ranges[0]);
    if (status == FKV_OK && f->min_middle == 0) {
        f->min_middle = 2 * (int64_t)f->bins;
    }
    return status;
}

fkv_status fkv_fourier_read(struct fkv_ctx *ctx, const fkv_fourier_params *params,
                            fkv_fourier_params *fourier) {
    fkv_fourier_params f;
    fkv_status status = FKV_OK;
    if (params) {
        status = fkv_params_read(ctx, "fourier", params, sizeof f, &f, sizeof f);
    } else {
        fkv_fourier_defaults(&f);
    }
    if (status == FKV_OK) {
        status = fkv_fourier_check(ctx, FKV_ERR_INVALID, "fourier", &f);
    }
    if (status == FKV_OK) {
        *fourier = f;
    }
    return status;
}

/* ---- the object */

static size_t channels_bytes(const struct fkv_model *model) {
    return (size_t)model->n_layers * 2 * (size_t)model->n_kv_heads * sizeof(struct fkv_channels);
}

void fkv_profile_ref(struct fkv_profile_object *profile) {
    atomic_fetch_add_explicit(&profile->refs, 1, memory_order_relaxed);
}

void fkv_profile_unref(struct fkv_profile_object *profile) {
    if (!profile || atomic_fetch_sub_explicit(&profile->refs, 1, memory_order_acq_rel) != 1) {
        return;
    }
    struct fkv_ctx *ctx = profile->ctx;
    fkv_heap_free(&ctx->heap, profile->channels, channels_bytes(&profile->model));
    fkv_profile_free_coded(profile);
    fkv_angles_destroy(ctx, &profile->model, profile->angles);
    fkv_model_free(ctx, &profile->model);
    fkv_heap_free(&ctx->heap, profile, sizeof *profile);
    fkv_ctx_unref(ctx);
}

fkv_status fkv_profile_new_exact(struct fkv_ctx *ctx, struct fkv_model *model, fkv_dtype storage,
                                 struct fkv_profile_object **out) {
    if (fkv_dtype_size(storage) == 0) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "storage_dtype: unknown type %d", (int)storage);
    }
    struct fkv_profile_object *profile = fkv_heap_calloc(&ctx->heap, sizeof *profile);
    if (!profile) {
        return fkv_fail_memory(ctx, sizeof *profile, "profile");
    }
    fkv_status status = fkv_angles_create(ctx, model, &profile->angles);
    if (status != FKV_OK) {
        fkv_heap_free(&ctx->heap, profile, sizeof *profile);
        return status;
    }
    atomic_init(&profile->refs, 1);
    fkv_ctx_ref(ctx);
    profile->ctx = ctx;
    profile->model = *model;
    profile->coding = FKV_CODING_EXACT;
    profile->storage_dtype = storage;
    *out = profile;
    return FKV_OK;
}

/* Sorts the channels of one head into kept and coded, each ascending. */
static void list_channels(const uint8_t *mask, int head_dim, struct fkv_channels *c) {
    int coded = 0;
    for (int d = 0; d < head_dim; d++) {
        coded += mask[d];
    }
    c->coded = coded;
    c->kept = head_dim - coded;
    int next[2] = {0, c->kept};
    for (int d = 0; d < head_dim; d++) {
        c->list[next[mask[d]]++] = (uint16_t)d;
    }
}

static void list_layers(struct fkv_profile_object *profile, fkv_part part, const uint8_t *mask) {
    const struct fkv_model *m = &profile->model;
    for (int layer = 0; layer < m->n_layers; layer++) {
        for (int head = 0; head < m->n_kv_heads; head++, mask += m->head_dim) {
            size_t row = (size_t)layer * 2 + (size_t)part;
            struct fkv_channels *c = &profile->channels[row * (size_t)m->n_kv_heads + (size_t)head];
            list_channels(mask, m->head_dim, c);
            profile->coded_channels[part] += c->coded;
        }
    }
}

static fkv_status check_mask(struct fkv_ctx *ctx, const char *name, const struct fkv_model *model,
                             const uint8_t *mask) {
    size_t n = (size_t)model->n_layers * (size_t)model->n_kv_heads * (size_t)model->head_dim;
    for (size_t i = 0; i < n; i++) {
        if (mask[i] > 1) {
            return fkv_fail(ctx, FKV_ERR_INVALID, "%s[%zu]: %u is neither 0 nor 1", name, i,
                            (unsigned)mask[i]);
        }
    }
    return FKV_OK;
}

fkv_status fkv_profile_new_fourier(struct fkv_ctx *ctx, struct fkv_model *model,
                                   const fkv_fourier_params *fourier, const uint8_t *k_mask,
                                   const uint8_t *v_mask, struct fkv_profile_object **out) {
    fkv_status status = check_mask(ctx, "k_mask", model, k_mask);
    if (status == FKV_OK) {
        status = check_mask(ctx, "v_mask", model, v_mask);
    }
    if (status != FKV_OK) {
        return status;
    }
    struct fkv_channels *channels = fkv_heap_calloc(&ctx->heap, channels_bytes(model));
    if (!channels) {
        return fkv_fail_memory(ctx, channels_bytes(model), "channel lists");
    }
    struct fkv_profile_object *profile;
    status = fkv_profile_new_exact(ctx, model, fourier->storage_dtype, &profile);
    if (status != FKV_OK) {
        fkv_heap_free(&ctx->heap, channels, channels_bytes(model));
        return status;
    }
    profile->coding = FKV_CODING_FOURIER;
    profile->fourier = *fourier;
    profile->channels = channels;
    list_layers(profile, FKV_PART_K, k_mask);
    list_layers(profile, FKV_PART_V, v_mask);
    *out = profile;
    return FKV_OK;
}
