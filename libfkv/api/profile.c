/* SPDX-License-Identifier: Apache-2.0 */
#include "profile/profile.h"

#include <string.h>

fkv_status fkv_model_params_init(fkv_model_params *params, size_t struct_size) {
    const fkv_model_params defaults = {.struct_size = sizeof defaults};
    return fkv_params_init(params, struct_size, sizeof defaults, &defaults, sizeof defaults);
}

fkv_status fkv_fourier_params_init(fkv_fourier_params *params, size_t struct_size) {
    fkv_fourier_params defaults;
    fkv_fourier_defaults(&defaults);
    return fkv_params_init(params, struct_size, sizeof defaults, &defaults, sizeof defaults);
}

fkv_status fkv_codec_params_init(fkv_codec_params *params, size_t struct_size) {
    fkv_codec_params defaults;
    fkv_codec_defaults(&defaults);
    return fkv_params_init(params, struct_size, sizeof defaults, &defaults, sizeof defaults);
}

/* Makes the handle of a new object, or ends the object. */
static fkv_status publish(struct fkv_ctx *ctx, struct fkv_profile_object *profile,
                          fkv_profile **out) {
    *out = fkv_handle_create(FKV_KIND_PROFILE, profile);
    if (!*out) {
        fkv_profile_unref(profile);
        return fkv_fail(ctx, FKV_ERR_NOMEM, "no memory for a handle");
    }
    return FKV_OK;
}

static fkv_status create_exact(struct fkv_ctx *ctx, const fkv_model_params *params,
                               fkv_dtype storage_dtype, fkv_profile **out) {
    struct fkv_model model;
    struct fkv_profile_object *profile;
    fkv_status status = fkv_model_read(ctx, params, &model);
    if (status != FKV_OK) {
        return status;
    }
    status = fkv_profile_new_exact(ctx, &model, storage_dtype, &profile);
    if (status != FKV_OK) {
        fkv_model_free(ctx, &model);
        return status;
    }
    return publish(ctx, profile, out);
}

fkv_status fkv_profile_create_exact(fkv_context *handle, const fkv_model_params *model,
                                    fkv_dtype storage_dtype, fkv_profile **out) {
    if (!out) {
        return FKV_ERR_INVALID;
    }
    *out = NULL;
    struct fkv_ctx *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, handle);
    if (!ctx) {
        return FKV_ERR_HANDLE;
    }
    fkv_status status = create_exact(ctx, model, storage_dtype, out);
    fkv_handle_release(handle);
    return status;
}

/* Where a Fourier profile's channels come from: masks, or a text if `json` is set. */
struct channel_source {
    const uint8_t *k_mask, *v_mask;
    size_t mask_bytes;
    const char *json;
    size_t json_bytes;
    double fraction;
};

static fkv_status check_masks(struct fkv_ctx *ctx, const struct fkv_model *model,
                              const struct channel_source *source) {
    size_t n = (size_t)model->n_layers * (size_t)model->n_kv_heads * (size_t)model->head_dim;
    if (!source->k_mask || !source->v_mask) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "%s is NULL", source->k_mask ? "v_mask" : "k_mask");
    }
    if (source->mask_bytes != n) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "mask_bytes is %zu, expected %zu", source->mask_bytes,
                        n);
    }
    return FKV_OK;
}

static fkv_status create_fourier(struct fkv_ctx *ctx, const fkv_model_params *params,
                                 const fkv_fourier_params *fourier_params,
                                 const struct channel_source *source, fkv_profile **out) {
    struct fkv_model model;
    fkv_fourier_params fourier;
    struct fkv_profile_object *profile;
    if (!fourier_params) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "fourier is NULL");
    }
    fkv_status status = fkv_fourier_read(ctx, fourier_params, &fourier);
    if (status == FKV_OK) {
        status = fkv_model_read(ctx, params, &model);
    }
    if (status != FKV_OK) {
        return status;
    }
    if (source->json) {
        status = fkv_profile_from_published(ctx, &model, &fourier, source->json, source->json_bytes,
                                            source->fraction, &profile);
    } else {
        status = check_masks(ctx, &model, source);
        if (status == FKV_OK) {
            status = fkv_profile_new_fourier(ctx, &model, &fourier, source->k_mask, source->v_mask,
                                             &profile);
        }
    }
    if (status != FKV_OK) {
        fkv_model_free(ctx, &model);
        return status;
    }
    return publish(ctx, profile, out);
}

fkv_status fkv_profile_create_fourier(fkv_context *handle, const fkv_model_params *model,
                                      const fkv_fourier_params *fourier, const uint8_t *k_mask,
                                      const uint8_t *v_mask, size_t mask_bytes, fkv_profile **out) {
    if (!out) {
        return FKV_ERR_INVALID;
    }
    *out = NULL;
    struct fkv_ctx *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, handle);
    if (!ctx) {
        return FKV_ERR_HANDLE;
    }
    const struct channel_source source = {
        .k_mask = k_mask, .v_mask = v_mask, .mask_bytes = mask_bytes};
    fkv_status status = create_fourier(ctx, model, fourier, &source, out);
    fkv_handle_release(handle);
    return status;
}

/* What fkv_profile_create_coded() is given. */
struct coded_source {
    const uint8_t *k_bits, *v_bits;
    size_t bits_bytes;
    const float *k_carrier, *v_carrier;
    size_t carrier_count;
};

static fkv_status check_coded(struct fkv_ctx *ctx, const struct fkv_model *model,
                              const struct coded_source *source) {
    size_t n = (size_t)model->n_layers * (size_t)model->n_kv_heads * (size_t)model->head_dim;
    size_t carriers = source->k_carrier || source->v_carrier ? n : 0;
    if (!source->k_bits || !source->v_bits) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "%s is NULL", source->k_bits ? "v_bits" : "k_bits");
    }
    if (source->bits_bytes != n) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "bits_bytes is %zu, expected %zu", source->bits_bytes,
                        n);
    }
    if (source->carrier_count != carriers) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "carrier_count is %zu, expected %zu",
                        source->carrier_count, carriers);
    }
    return FKV_OK;
}

static fkv_status create_coded(struct fkv_ctx *ctx, const fkv_model_params *params,
                               const fkv_codec_params *codec_params,
                               const struct coded_source *source, fkv_profile **out) {
    struct fkv_model model;
    fkv_codec_params codec;
    struct fkv_profile_object *profile;
    fkv_status status = fkv_codec_read(ctx, codec_params, &codec);
    if (status == FKV_OK) {
        status = fkv_model_read(ctx, params, &model);
    }
    if (status != FKV_OK) {
        return status;
    }
    status = check_coded(ctx, &model, source);
    if (status == FKV_OK) {
        status = fkv_profile_new_coded(ctx, &model, &codec, source->k_bits, source->v_bits,
                                       source->k_carrier, source->v_carrier, &profile);
    }
    if (status != FKV_OK) {
        fkv_model_free(ctx, &model);
        return status;
    }
    return publish(ctx, profile, out);
}

fkv_status fkv_profile_create_coded(fkv_context *handle, const fkv_model_params *model,
                                    const fkv_codec_params *codec, const uint8_t *k_bits,
                                    const uint8_t *v_bits, size_t bits_bytes,
                                    const float *k_carrier, const float *v_carrier,
                                    size_t carrier_count, fkv_profile **out) {
    if (!out) {
        return FKV_ERR_INVALID;
    }
    *out = NULL;
    struct fkv_ctx *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, handle);
    if (!ctx) {
        return FKV_ERR_HANDLE;
    }
    const struct coded_source source = {k_bits,    v_bits,    bits_bytes,
                                        k_carrier, v_carrier, carrier_count};
    fkv_status status = create_coded(ctx, model, codec, &source, out);
    fkv_handle_release(handle);
    return status;
}

static fkv_status create_uniform(struct fkv_ctx *ctx, const fkv_model_params *params,
                                 const fkv_codec_params *codec, int32_t bits, fkv_profile **out) {
    struct fkv_model model;
    if (!fkv_bits_allowed(bits)) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "bits: %d is not 0, 2, 3, 4, 8 or 16", (int)bits);
    }
    fkv_status status = fkv_model_read(ctx, params, &model);
    if (status != FKV_OK) {
        return status;
    }
    size_t n = (size_t)model.n_layers * (size_t)model.n_kv_heads * (size_t)model.head_dim;
    fkv_model_free(ctx, &model);
    uint8_t *all = fkv_heap_alloc(&ctx->heap, n);
    if (!all) {
        return fkv_fail_memory(ctx, n, "bits");
    }
    memset(all, (int)bits, n);
    const struct coded_source source = {.k_bits = all, .v_bits = all, .bits_bytes = n};
    status = create_coded(ctx, params, codec, &source, out);
    fkv_heap_free(&ctx->heap, all, n);
    return status;
}

fkv_status fkv_profile_create_uniform(fkv_context *handle, const fkv_model_params *model,
                                      const fkv_codec_params *codec, int32_t bits,
                                      fkv_profile **out) {
    if (!out) {
        return FKV_ERR_INVALID;
    }
    *out = NULL;
    struct fkv_ctx *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, handle);
    if (!ctx) {
        return FKV_ERR_HANDLE;
    }
    fkv_status status = create_uniform(ctx, model, codec, bits, out);
    fkv_handle_release(handle);
    return status;
}

fkv_status fkv_profile_import_published(fkv_context *handle, const fkv_model_params *model,
                                        const fkv_fourier_params *fourier, const char *json,
                                        size_t json_bytes, double fraction, fkv_profile **out) {
    if (!out) {
        return FKV_ERR_INVALID;
    }
    *out = NULL;
    struct fkv_ctx *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, handle);
    if (!ctx) {
        return FKV_ERR_HANDLE;
    }
    const struct channel_source source = {
        .json = json, .json_bytes = json_bytes, .fraction = fraction};
    fkv_status status = json ? create_fourier(ctx, model, fourier, &source, out)
                             : fkv_fail(ctx, FKV_ERR_INVALID, "json is NULL");
    fkv_handle_release(handle);
    return status;
}

fkv_status fkv_profile_load(fkv_context *handle, const char *json, size_t json_bytes,
                            fkv_profile **out) {
    if (!out) {
        return FKV_ERR_INVALID;
    }
    *out = NULL;
    struct fkv_ctx *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, handle);
    if (!ctx) {
        return FKV_ERR_HANDLE;
    }
    struct fkv_profile_object *profile;
    fkv_status status = json ? fkv_profile_from_json(ctx, json, json_bytes, &profile)
                             : fkv_fail(ctx, FKV_ERR_INVALID, "json is NULL");
    if (status == FKV_OK) {
        status = publish(ctx, profile, out);
    }
    fkv_handle_release(handle);
    return status;
}

fkv_status fkv_profile_load_file(fkv_context *handle, const char *path, fkv_profile **out) {
    if (!out) {
        return FKV_ERR_INVALID;
    }
    *out = NULL;
    struct fkv_ctx *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, handle);
    if (!ctx) {
        return FKV_ERR_HANDLE;
    }
    struct fkv_profile_object *profile;
    fkv_status status = path ? fkv_profile_from_file(ctx, path, &profile)
                             : fkv_fail(ctx, FKV_ERR_INVALID, "path is NULL");
    if (status == FKV_OK) {
        status = publish(ctx, profile, out);
    }
    fkv_handle_release(handle);
    return status;
}

static fkv_status save(struct fkv_profile_object *profile, char *buffer, size_t bytes,
                       size_t *needed) {
    struct fkv_ctx *ctx = profile->ctx;
    char *text;
    size_t size;
    if (!needed || (!buffer && bytes > 0)) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "%s is NULL", needed ? "buffer" : "needed");
    }
    fkv_status status = fkv_profile_to_json(profile, &text, &size);
    if (status != FKV_OK) {
        return status;
    }
    *needed = size;
    if (buffer && bytes < size) {
        status =
            fkv_fail(ctx, FKV_ERR_BUFFER, "the text has %zu bytes, the buffer %zu", size, bytes);
    } else if (buffer) {
        memcpy(buffer, text, size);
    }
    fkv_heap_free(&ctx->heap, text, size + 1);
    return status;
}

fkv_status fkv_profile_save(fkv_profile *handle, char *buffer, size_t bytes, size_t *needed) {
    struct fkv_profile_object *profile = fkv_handle_acquire(FKV_KIND_PROFILE, handle);
    if (!profile) {
        return FKV_ERR_HANDLE;
    }
    fkv_status status = save(profile, buffer, bytes, needed);
    fkv_handle_release(handle);
    return status;
}

fkv_status fkv_profile_save_file(fkv_profile *handle, const char *path) {
    struct fkv_profile_object *profile = fkv_handle_acquire(FKV_KIND_PROFILE, handle);
    if (!profile) {
        return FKV_ERR_HANDLE;
    }
    fkv_status status = path ? fkv_profile_to_file(profile, path)
                             : fkv_fail(profile->ctx, FKV_ERR_INVALID, "path is NULL");
    fkv_handle_release(handle);
    return status;
}

fkv_status fkv_profile_query(fkv_profile *handle, fkv_profile_info *info) {
    struct fkv_profile_object *p = fkv_handle_acquire(FKV_KIND_PROFILE, handle);
    if (!p) {
        return FKV_ERR_HANDLE;
    }
    const bool coded = p->coding == FKV_CODING_CALIBRATED;
    /* without Fourier coding p->fourier is all zeros, and p->codec unless calibrated */
    fkv_profile_info filled = {
        .struct_size = sizeof filled,
        .coding = p->coding,
        .n_layers = p->model.n_layers,
        .n_q_heads = p->model.n_q_heads,
        .n_kv_heads = p->model.n_kv_heads,
        .head_dim = p->model.head_dim,
        .rope_layout = p->model.rope_layout,
        .rope_dim = p->model.rope_dim,
        .storage_dtype = p->storage_dtype,
        .coefficient_dtype = p->fourier.coefficient_dtype,
        .bins = p->fourier.bins,
        .n_sink = coded ? p->codec.n_sink : p->fourier.n_sink,
        .n_local = coded ? p->codec.n_local : p->fourier.n_local,
        .restoration = p->fourier.restoration,
        .outgrow = p->fourier.outgrow,
        .period = p->fourier.period,
        .min_middle = p->fourier.min_middle,
        .k_fourier_channels = p->coded_channels[FKV_PART_K],
        .v_fourier_channels = p->coded_channels[FKV_PART_V],
        .softmax_scale = p->model.softmax_scale,
        .group = p->codec.group,
        .block = p->codec.block,
        .domain = p->codec.domain,
        .k_bits = coded ? fkv_profile_mean_bits(p, FKV_PART_K) : 0.0,
        .v_bits = coded ? fkv_profile_mean_bits(p, FKV_PART_V) : 0.0,
    };
    fkv_status status = fkv_params_write(p->ctx, "info", info, offsetof(fkv_profile_info, group),
                                         &filled, sizeof filled);
    fkv_handle_release(handle);
    return status;
}

static fkv_status check_part(const struct fkv_profile_object *p, int32_t layer, fkv_part part) {
    if (layer < 0 || layer >= p->model.n_layers) {
        return fkv_fail(p->ctx, FKV_ERR_INVALID, "layer %d of %d", (int)layer, p->model.n_layers);
    }
    if (part != FKV_PART_K && part != FKV_PART_V) {
        return fkv_fail(p->ctx, FKV_ERR_INVALID, "part %d is neither K nor V", (int)part);
    }
    return FKV_OK;
}

static fkv_status write_codes(const struct fkv_profile_object *p, int32_t layer, fkv_part part,
                              uint8_t *codes, size_t bytes) {
    size_t dim = (size_t)p->model.head_dim, n = (size_t)p->model.n_kv_heads * dim;
    fkv_status status = check_part(p, layer, part);
    if (status != FKV_OK) {
        return status;
    }
    if (!codes) {
        return fkv_fail(p->ctx, FKV_ERR_INVALID, "codes is NULL");
    }
    if (bytes < n) {
        return fkv_fail(p->ctx, FKV_ERR_BUFFER, "codes: %zu bytes, %zu needed", bytes, n);
    }
    memset(codes, FKV_CHANNEL_EXACT, n);
    for (int h = 0; p->channels && h < p->model.n_kv_heads; h++, codes += dim) {
        const struct fkv_channels *c = fkv_profile_head(p, layer, part, h);
        for (int i = 0; i < c->coded; i++) {
            codes[c->list[c->kept + i]] = FKV_CHANNEL_FOURIER;
        }
    }
    codes = p->residuals ? codes : NULL;
    for (int h = 0; codes && h < p->model.n_kv_heads; h++, codes += dim) {
        fkv_profile_bits(p, layer, part, h, codes);
    }
    return FKV_OK;
}

fkv_status fkv_profile_channels(fkv_profile *handle, int32_t layer, fkv_part part, uint8_t *codes,
                                size_t bytes) {
    struct fkv_profile_object *profile = fkv_handle_acquire(FKV_KIND_PROFILE, handle);
    if (!profile) {
        return FKV_ERR_HANDLE;
    }
    fkv_status status = write_codes(profile, layer, part, codes, bytes);
    fkv_handle_release(handle);
    return status;
}

static fkv_status write_carriers(const struct fkv_profile_object *p, int32_t layer, fkv_part part,
                                 float *carriers, size_t count) {
    size_t n = (size_t)p->model.n_kv_heads * (size_t)p->model.head_dim;
    fkv_status status = check_part(p, layer, part);
    if (status != FKV_OK) {
        return status;
    }
    if (!carriers) {
        return fkv_fail(p->ctx, FKV_ERR_INVALID, "carriers is NULL");
    }
    if (count < n) {
        return fkv_fail(p->ctx, FKV_ERR_BUFFER, "carriers: %zu floats, %zu needed", count, n);
    }
    if (p->carriers) {
        memcpy(carriers, fkv_profile_carrier(p, layer, part, 0), n * sizeof *carriers);
    } else {
        memset(carriers, 0, n * sizeof *carriers);
    }
    return FKV_OK;
}

fkv_status fkv_profile_carriers(fkv_profile *handle, int32_t layer, fkv_part part, float *carriers,
                                size_t count) {
    struct fkv_profile_object *profile = fkv_handle_acquire(FKV_KIND_PROFILE, handle);
    if (!profile) {
        return FKV_ERR_HANDLE;
    }
    fkv_status status = write_carriers(profile, layer, part, carriers, count);
    fkv_handle_release(handle);
    return status;
}

fkv_status fkv_profile_match(fkv_profile *handle, const fkv_model_params *params) {
    struct fkv_profile_object *profile = fkv_handle_acquire(FKV_KIND_PROFILE, handle);
    struct fkv_model model;
    if (!profile) {
        return FKV_ERR_HANDLE;
    }
    fkv_status status = fkv_model_read(profile->ctx, params, &model);
    if (status == FKV_OK) {
        status = fkv_model_match(profile->ctx, &profile->model, &model);
        fkv_model_free(profile->ctx, &model);
    }
    fkv_handle_release(handle);
    return status;
}

fkv_status fkv_profile_destroy(fkv_profile *handle) {
    if (!handle) {
        return FKV_OK;
    }
    void *profile;
    fkv_status status = fkv_handle_close(FKV_KIND_PROFILE, handle, &profile);
    if (status == FKV_OK) {
        fkv_profile_unref(profile);
    }
    return status;
}
