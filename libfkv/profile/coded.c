/* SPDX-License-Identifier: Apache-2.0 */
/* What a calibrated profile says: bits and carriers of every channel. */
#include "profile/profile.h"

#include <math.h>
#include <string.h>

#define MAX_LOCAL (INT32_C(1) << 30)

/* ---- parameters */

void fkv_codec_defaults(fkv_codec_params *codec) {
    *codec = (fkv_codec_params){
        .struct_size = sizeof *codec,
        .storage_dtype = FKV_DTYPE_F16,
        .group = 128,
        .block = 128,
        .n_sink = 4,
        .n_local = 128,
        .domain = FKV_DOMAIN_ROTATED,
    };
}

fkv_status fkv_codec_check(struct fkv_ctx *ctx, fkv_status error, const char *place,
                           const fkv_codec_params *c) {
    const struct fkv_range ranges[] = {
        {"storage_dtype", c->storage_dtype, FKV_DTYPE_F32, FKV_DTYPE_BF16},
        {"group", c->group, 64, 128},
        {"block", c->block, 64, 256},
        {"n_sink", c->n_sink, 0, FKV_MAX_SINK},
        {"n_local", c->n_local, 0, MAX_LOCAL},
        {"domain", c->domain, FKV_DOMAIN_ROTATED, FKV_DOMAIN_UNROTATED},
    };
    fkv_status status =
        fkv_check_ranges(ctx, error, place, ranges, sizeof ranges / sizeof ranges[0]);
    if (status != FKV_OK) {
        return status;
    }
    if (c->group != 64 && c->group != 128) {
        return fkv_fail(ctx, error, "%s.group: %d is neither 64 nor 128", place, (int)c->group);
    }
    if ((c->block != 64 && c->block != 128 && c->block != 256) || c->block % c->group != 0) {
        return fkv_fail(ctx, error, "%s.block: %d is not 64, 128 or 256 and a multiple of group",
                        place, (int)c->block);
    }
    if (c->spectral_bins != 0) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED, "%s.spectral_bins: %d, only 0 is supported",
                        place, (int)c->spectral_bins);
    }
    return FKV_OK;
}

fkv_status fkv_codec_read(struct fkv_ctx *ctx, const fkv_codec_params *params,
                          fkv_codec_params *codec) {
    fkv_codec_params c;
    fkv_status status = FKV_OK;
    if (params) {
        status = fkv_params_read(ctx, "codec", params, sizeof c, &c, sizeof c);
    } else {
        fkv_codec_defaults(&c);
    }
    if (status == FKV_OK) {
        status = fkv_codec_check(ctx, FKV_ERR_INVALID, "codec", &c);
    }
    if (status == FKV_OK) {
        *codec = c;
    }
    return status;
}

/* ---- bits and carriers */

bool fkv_bits_allowed(int bits) {
    return bits == 0 || bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == 16;
}

static size_t part_channels(const struct fkv_model *model) {
    return (size_t)model->n_layers * (size_t)model->n_kv_heads * (size_t)model->head_dim;
}

static fkv_status check_bits(struct fkv_ctx *ctx, const char *name, const struct fkv_model *model,
                             const uint8_t *bits) {
    size_t n = part_channels(model);
    for (size_t i = 0; i < n; i++) {
        if (!fkv_bits_allowed(bits[i])) {
            return fkv_fail(ctx, FKV_ERR_INVALID, "%s[%zu]: %u is not 0, 2, 3, 4, 8 or 16", name, i,
                            (unsigned)bits[i]);
        }
    }
    return FKV_OK;
}

static fkv_status check_carriers(struct fkv_ctx *ctx, const char *name,
                                 const struct fkv_model *model, const float *carrier) {
    size_t n = carrier ? part_channels(model) : 0;
    for (size_t i = 0; i < n; i++) {
        if (!(fabsf(carrier[i]) <= FKV_MAX_CARRIER)) {
            return fkv_fail(ctx, FKV_ERR_INVALID, "%s[%zu]: %g is not a number in +-%g", name, i,
                            (double)carrier[i], (double)FKV_MAX_CARRIER);
        }
    }
    return FKV_OK;
}

static void list_residuals(const uint8_t *bits, int head_dim, struct fkv_residuals *r) {
    int n = 0;
    for (enum fkv_width w = 0; w < FKV_N_WIDTH; w++) {
        int first = n;
        for (int d = 0; d < head_dim; d++) {
            if (bits[d] == fkv_width_bits(w)) {
                r->list[n++] = (uint8_t)d;
            }
        }
        r->count[w] = (uint16_t)(n - first);
    }
    r->quantised = (uint16_t)(head_dim - r->count[FKV_WIDTH_EXACT] - r->count[FKV_WIDTH_0]);
}

/* A zero is +0, so that texts of equal profiles are equal. */
static void copy_carrier(const float *from, int head_dim, float *to, struct fkv_residuals *r) {
    for (int d = 0; from && d < head_dim; d++) {
        to[d] = from[d] == 0.0f ? 0.0f : from[d];
        r->carried = r->carried || to[d] != 0.0f;
    }
}

/* The largest size a carrier has after RoPE. */
static float largest_carrier(const struct fkv_model *m, const float *carrier, fkv_part part) {
    const int pairs = part == FKV_PART_K ? m->rope_dim / 2 : 0;
    const bool interleaved = m->rope_layout == FKV_ROPE_INTERLEAVED;
    double most = 0.0;
    for (int j = 0; j < pairs; j++) {
        int a = interleaved ? 2 * j : j, b = interleaved ? a + 1 : j + pairs;
        most = fmax(most, m->rope_scaling * hypot((double)carrier[a], (double)carrier[b]));
    }
    for (int d = 2 * pairs; d < m->head_dim; d++) {
        most = fmax(most, fabs((double)carrier[d]));
    }
    return (float)fmin(most, 1e30);
}

static fkv_status set_limit(struct fkv_profile_object *profile) {
    const struct fkv_model *m = &profile->model;
    float most = 0.0f;
    bool quantised = false;
    for (int layer = 0; layer < m->n_layers; layer++) {
        for (int i = 0; i < 2 * m->n_kv_heads; i++) {
            const fkv_part part = (fkv_part)(i % 2);
            const float *carrier = fkv_profile_carrier(profile, layer, part, i / 2);
            most = fmaxf(most, largest_carrier(m, carrier, part));
            quantised |= fkv_profile_residuals(profile, layer, part, i / 2)->quantised > 0;
        }
    }
    if (most > FKV_MAX_CARRIER) {
        return fkv_fail(profile->ctx, FKV_ERR_INVALID, "carriers: %g after RoPE, at most %g",
                        (double)most, (double)FKV_MAX_CARRIER);
    }
    profile->finite_limit = quantised ? nextafterf(65504.0f - most, INFINITY) : INFINITY;
    return FKV_OK;
}

static void fill_part(struct fkv_profile_object *profile, fkv_part part, const uint8_t *bits,
                      const float *carrier) {
    const struct fkv_model *m = &profile->model;
    const size_t dim = (size_t)m->head_dim;
    for (int layer = 0; layer < m->n_layers; layer++) {
        for (int head = 0; head < m->n_kv_heads; head++, bits += dim) {
            struct fkv_residuals *r =
                profile->residuals +
                (fkv_profile_residuals(profile, layer, part, head) - profile->residuals);
            float *to = profile->carriers +
                        (fkv_profile_carrier(profile, layer, part, head) - profile->carriers);
            list_residuals(bits, m->head_dim, r);
            copy_carrier(carrier, m->head_dim, to, r);
            carrier = carrier ? carrier + dim : NULL;
        }
    }
}

static size_t residuals_bytes(const struct fkv_model *m) {
    return (size_t)m->n_layers * 2 * (size_t)m->n_kv_heads * sizeof(struct fkv_residuals);
}

static size_t carriers_bytes(const struct fkv_model *m) {
    return 2 * part_channels(m) * sizeof(float);
}

void fkv_profile_free_coded(struct fkv_profile_object *profile) {
    struct fkv_heap *heap = &profile->ctx->heap;
    fkv_heap_free(heap, profile->residuals, residuals_bytes(&profile->model));
    fkv_heap_free(heap, profile->carriers, carriers_bytes(&profile->model));
    fkv_waves_destroy(profile->ctx, profile->waves);
    profile->residuals = NULL;
    profile->carriers = NULL;
    profile->waves = NULL;
}

static fkv_status fill_profile(struct fkv_profile_object *profile, const uint8_t *k_bits,
                               const uint8_t *v_bits, const float *k_carrier,
                               const float *v_carrier) {
    struct fkv_ctx *ctx = profile->ctx;
    const size_t residuals = residuals_bytes(&profile->model);
    const size_t carriers = carriers_bytes(&profile->model);
    profile->residuals = fkv_heap_calloc(&ctx->heap, residuals);
    if (!profile->residuals) {
        return fkv_fail_memory(ctx, residuals, "channel lists");
    }
    profile->carriers = fkv_heap_calloc(&ctx->heap, carriers);
    if (!profile->carriers) {
        return fkv_fail_memory(ctx, carriers, "carriers");
    }
    fill_part(profile, FKV_PART_K, k_bits, k_carrier);
    fill_part(profile, FKV_PART_V, v_bits, v_carrier);
    fkv_status status = set_limit(profile);
    return status == FKV_OK ? fkv_waves_create(ctx, &profile->model, &profile->waves) : status;
}

fkv_status fkv_profile_new_coded(struct fkv_ctx *ctx, struct fkv_model *model,
                                 const fkv_codec_params *codec, const uint8_t *k_bits,
                                 const uint8_t *v_bits, const float *k_carrier,
                                 const float *v_carrier, struct fkv_profile_object **out) {
    struct fkv_profile_object *profile;
    fkv_status status = check_bits(ctx, "k_bits", model, k_bits);
    if (status == FKV_OK) {
        status = check_bits(ctx, "v_bits", model, v_bits);
    }
    if (status == FKV_OK) {
        status = check_carriers(ctx, "k_carrier", model, k_carrier);
    }
    if (status == FKV_OK) {
        status = check_carriers(ctx, "v_carrier", model, v_carrier);
    }
    if (status == FKV_OK) {
        status = fkv_profile_new_exact(ctx, model, codec->storage_dtype, &profile);
    }
    if (status != FKV_OK) {
        return status;
    }
    profile->coding = FKV_CODING_CALIBRATED;
    profile->codec = *codec;
    status = fill_profile(profile, k_bits, v_bits, k_carrier, v_carrier);
    if (status != FKV_OK) {
        fkv_profile_free_coded(profile);
        profile->model.inv_freq = NULL; /* still the caller's */
        fkv_profile_unref(profile);
        return status;
    }
    *out = profile;
    return FKV_OK;
}

void fkv_profile_bits(const struct fkv_profile_object *profile, int layer, fkv_part part,
                      int kv_head, uint8_t *bits) {
    const struct fkv_residuals *r = fkv_profile_residuals(profile, layer, part, kv_head);
    int n = 0;
    for (enum fkv_width w = 0; w < FKV_N_WIDTH; w++) {
        for (int i = 0; i < r->count[w]; i++) {
            bits[r->list[n++]] = (uint8_t)fkv_width_bits(w);
        }
    }
}

double fkv_profile_mean_bits(const struct fkv_profile_object *profile, fkv_part part) {
    const struct fkv_model *m = &profile->model;
    const int exact = profile->storage_dtype == FKV_DTYPE_F32 ? 32 : 16;
    double sum = 0.0;
    for (int i = 0; i < m->n_layers * m->n_kv_heads; i++) {
        const struct fkv_residuals *r =
            fkv_profile_residuals(profile, i / m->n_kv_heads, part, i % m->n_kv_heads);
        for (enum fkv_width w = 0; w < FKV_N_WIDTH; w++) {
            sum += (double)r->count[w] * (w == FKV_WIDTH_EXACT ? exact : fkv_width_bits(w));
        }
        sum += (double)r->quantised * 32.0 / profile->codec.group;
    }
    return sum / (double)part_channels(m);
}

/* ---- of which model */

fkv_status fkv_model_match(struct fkv_ctx *ctx, const struct fkv_model *have,
                           const struct fkv_model *want) {
    const struct {
        const char *name;
        double have, want;
    } fields[] = {
        {"n_layers", have->n_layers, want->n_layers},
        {"n_q_heads", have->n_q_heads, want->n_q_heads},
        {"n_kv_heads", have->n_kv_heads, want->n_kv_heads},
        {"head_dim", have->head_dim, want->head_dim},
        {"rope_layout", have->rope_layout, want->rope_layout},
        {"rope_dim", have->rope_dim, want->rope_dim},
        {"rope_scaling", have->rope_scaling, want->rope_scaling},
        {"softmax_scale", have->softmax_scale, want->softmax_scale},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        if (!(fabs(fields[i].have - fields[i].want) <= 1e-6 * fabs(fields[i].want))) {
            return fkv_fail(ctx, FKV_ERR_MISMATCH, "model.%s: %g, the model has %g", fields[i].name,
                            fields[i].have, fields[i].want);
        }
    }
    for (int j = 0; j < have->rope_dim / 2; j++) {
        if (!(fabs(have->inv_freq[j] - want->inv_freq[j]) <= 1e-6 * fabs(want->inv_freq[j]))) {
            return fkv_fail(ctx, FKV_ERR_MISMATCH, "model.inv_freq[%d]: %g, the model has %g", j,
                            have->inv_freq[j], want->inv_freq[j]);
        }
    }
    if (have->model_id[0] && want->model_id[0] && strcmp(have->model_id, want->model_id) != 0) {
        return fkv_fail(ctx, FKV_ERR_MISMATCH, "model.id: \"%.80s\", the model is \"%.80s\"",
                        have->model_id, want->model_id);
    }
    return FKV_OK;
}
