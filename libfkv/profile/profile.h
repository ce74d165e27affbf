/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The object behind fkv_profile: geometry, coding, and for each layer and KV head which channels are
 * held how. Immutable once made, so it needs no lock.
 */
#ifndef FKV_PROFILE_PROFILE_H
#define FKV_PROFILE_PROFILE_H

#include "core/core.h"
#include "profile/waves.h"

#define FKV_TILE 64 /* tokens of a tile: the unit of storage and of coding */

struct fkv_model {
    int n_layers, n_q_heads, n_kv_heads, group, head_dim;
    fkv_rope_layout rope_layout;
    int rope_dim;     /* 0 without RoPE */
    double *inv_freq; /* rope_dim / 2 entries, on the heap; NULL without RoPE */
    double rope_scaling;
    double softmax_scale;
    char model_id[256];
};

/* The channels of one KV head in one part (K or V) of one layer: `list` holds the kept channels in
 * ascending order, then the coded ones in ascending order. */
struct fkv_channels {
    uint16_t list[FKV_MAX_HEAD_DIM];
    int kept;
    int coded;
};

/* Classes of channels in the calibrated coding, in the order in which a block holds them. */
enum fkv_width {
    FKV_WIDTH_EXACT, /* in the storage type */
    FKV_WIDTH_8,
    FKV_WIDTH_4,
    FKV_WIDTH_3,
    FKV_WIDTH_2,
    FKV_WIDTH_0, /* carrier alone */
    FKV_N_WIDTH
};
static inline int fkv_width_bits(enum fkv_width width) {
    static const int bits[FKV_N_WIDTH] = {16, 8, 4, 3, 2, 0};
    return bits[width];
}

/* The channels of one KV head in one part of one layer of a calibrated profile. */
struct fkv_residuals {
    uint8_t list[FKV_MAX_HEAD_DIM]; /* by class, ascending within each */
    uint16_t count[FKV_N_WIDTH];
    uint16_t quantised; /* channels of 2, 3, 4 and 8 bits; they follow the exact ones in the list */
    bool carried;       /* a carrier that is not zero */
};

struct fkv_profile_object {
    _Atomic int refs;
    struct fkv_ctx *ctx;
    struct fkv_model model;
    fkv_coding coding;
    fkv_dtype storage_dtype;
    double *angles;                /* of RoPE, see waves.h; NULL without */
    fkv_fourier_params fourier;    /* min_middle resolved; meaningful if coding is FOURIER */
    struct fkv_channels *channels; /* [n_layers][2][n_kv_heads]; NULL if coding is EXACT */
    int64_t coded_channels[2];     /* over all layers, K and V */
    /* calibrated coding */
    fkv_codec_params codec;
    struct fkv_residuals *residuals; /* [n_layers][2][n_kv_heads] */
    float *carriers;                 /* [n_layers][2][n_kv_heads][head_dim] */
    struct fkv_waves *waves;         /* NULL without RoPE */
    float finite_limit;              /* largest |k| and |v| whose residuals f16 scales can hold */
};

static inline const struct fkv_channels *fkv_profile_head(const struct fkv_profile_object *p,
                                                          int layer, fkv_part part, int kv_head) {
    return &p->channels[((size_t)layer * 2 + (size_t)part) * (size_t)p->model.n_kv_heads +
                        (size_t)kv_head];
}

static inline const struct fkv_residuals *
fkv_profile_residuals(const struct fkv_profile_object *p, int layer, fkv_part part, int kv_head) {
    return &p->residuals[((size_t)layer * 2 + (size_t)part) * (size_t)p->model.n_kv_heads +
                         (size_t)kv_head];
}
static inline const float *fkv_profile_carrier(const struct fkv_profile_object *p, int layer,
                                               fkv_part part, int kv_head) {
    return p->carriers +
           (((size_t)layer * 2 + (size_t)part) * (size_t)p->model.n_kv_heads + (size_t)kv_head) *
               (size_t)p->model.head_dim;
}

void fkv_profile_ref(struct fkv_profile_object *profile);
void fkv_profile_unref(struct fkv_profile_object *profile);

/* Checked copies of what callers give. fkv_model_free() undoes fkv_model_read(). NULL for the Fourier
 * parameters stands for the defaults. */
fkv_status fkv_model_read(struct fkv_ctx *ctx, const fkv_model_params *params,
                          struct fkv_model *model);
fkv_status fkv_model_copy(struct fkv_ctx *ctx, const struct fkv_model *src, struct fkv_model *dst);
void fkv_model_free(struct fkv_ctx *ctx, struct fkv_model *model);
fkv_status fkv_fourier_read(struct fkv_ctx *ctx, const fkv_fourier_params *params,
                            fkv_fourier_params *fourier);
/* Whether each value is within its bounds; the message names "<place>.<name>". */
struct fkv_range {
    const char *name;
    int64_t value, least, most;
};
fkv_status fkv_check_ranges(struct fkv_ctx *ctx, fkv_status error, const char *place,
                            const struct fkv_range *ranges, size_t count);
/* What fkv_model_read() and fkv_fourier_read() do once the struct is of this library's version. What is wrong becomes `error`
 * (INVALID for arguments, FORMAT for files), its place in the message "model.n_layers" or
 * "<place>.bins". */
fkv_status fkv_model_build(struct fkv_ctx *ctx, fkv_status error, const fkv_model_params *params,
                           struct fkv_model *model);
fkv_status fkv_fourier_check(struct fkv_ctx *ctx, fkv_status error, const char *place,
                             fkv_fourier_params *fourier);
void fkv_fourier_defaults(fkv_fourier_params *fourier);

/* The constructors take over *model on success (and leave it alone on failure). masks: [n_layers][Hk][D],
 * 1 = coded. `fourier` comes from fkv_fourier_read(). */
fkv_status fkv_profile_new_exact(struct fkv_ctx *ctx, struct fkv_model *model, fkv_dtype storage,
                                 struct fkv_profile_object **out);
fkv_status fkv_profile_new_fourier(struct fkv_ctx *ctx, struct fkv_model *model,
                                   const fkv_fourier_params *fourier, const uint8_t *k_mask,
                                   const uint8_t *v_mask, struct fkv_profile_object **out);
/* coded.c. carriers may be NULL. bits: [n_layers][Hk][D]. */
void fkv_codec_defaults(fkv_codec_params *codec);
fkv_status fkv_codec_check(struct fkv_ctx *ctx, fkv_status error, const char *place,
                           const fkv_codec_params *codec);
fkv_status fkv_codec_read(struct fkv_ctx *ctx, const fkv_codec_params *params,
                          fkv_codec_params *codec);
fkv_status fkv_profile_new_coded(struct fkv_ctx *ctx, struct fkv_model *model,
                                 const fkv_codec_params *codec, const uint8_t *k_bits,
                                 const uint8_t *v_bits, const float *k_carrier,
                                 const float *v_carrier, struct fkv_profile_object **out);
void fkv_profile_free_coded(struct fkv_profile_object *profile);
/* A channel's code, of any calibrated profile. */
void fkv_profile_bits(const struct fkv_profile_object *profile, int layer, fkv_part part,
                      int kv_head, uint8_t *bits);
/* Mean bits of an element, scales included. */
double fkv_profile_mean_bits(const struct fkv_profile_object *profile, fkv_part part);
bool fkv_bits_allowed(int bits);
/* Largest carrier. */
#define FKV_MAX_CARRIER 32768.0f
/* MISMATCH names the first field in which the models differ. */
fkv_status fkv_model_match(struct fkv_ctx *ctx, const struct fkv_model *have,
                           const struct fkv_model *want);

/* profile_json.c */
fkv_status fkv_profile_from_json(struct fkv_ctx *ctx, const char *json, size_t bytes,
                                 struct fkv_profile_object **out);
/* On success *text is on the heap, *bytes long without a terminating zero, allocated as *bytes + 1. */
fkv_status fkv_profile_to_json(const struct fkv_profile_object *profile, char **text,
                               size_t *bytes);
/* profile_file.c */
fkv_status fkv_profile_from_file(struct fkv_ctx *ctx, const char *path,
                                 struct fkv_profile_object **out);
fkv_status fkv_profile_to_file(const struct fkv_profile_object *profile, const char *path);
/* published.c */
fkv_status fkv_profile_from_published(struct fkv_ctx *ctx, struct fkv_model *model,
                                      const fkv_fourier_params *fourier, const char *json,
                                      size_t bytes, double fraction,
                                      struct fkv_profile_object **out);

#endif /* FKV_PROFILE_PROFILE_H */
