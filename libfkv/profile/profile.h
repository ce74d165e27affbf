/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The object behind fkv_profile: geometry, coding, and for each layer and KV head which channels are
 * kept and which are Fourier-coded. Immutable once made, so it needs no lock.
 */
#ifndef FKV_PROFILE_PROFILE_H
#define FKV_PROFILE_PROFILE_H

#include "core/core.h"

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

struct fkv_profile_object {
    _Atomic int refs;
    struct fkv_ctx *ctx;
    struct fkv_model model;
    fkv_coding coding;
    fkv_dtype storage_dtype;
    fkv_fourier_params fourier;    /* min_middle resolved; meaningful if coding is FOURIER */
    struct fkv_channels *channels; /* [n_layers][2][n_kv_heads]; NULL if coding is EXACT */
    int64_t coded_channels[2];     /* over all layers, K and V */
};

static inline const struct fkv_channels *fkv_profile_head(const struct fkv_profile_object *p,
                                                          int layer, fkv_part part, int kv_head) {
    return &p->channels[((size_t)layer * 2 + (size_t)part) * (size_t)p->model.n_kv_heads +
                        (size_t)kv_head];
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
/* What the two above do once the struct is of this library's version. What is wrong becomes `error`
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
/* profile_json.c */
fkv_status fkv_profile_from_json(struct fkv_ctx *ctx, const char *json, size_t bytes,
                                 struct fkv_profile_object **out);
fkv_status fkv_profile_from_file(struct fkv_ctx *ctx, const char *path,
                                 struct fkv_profile_object **out);
/* On success *text is on the heap, *bytes long without a terminating zero, allocated as *bytes + 1. */
fkv_status fkv_profile_to_json(const struct fkv_profile_object *profile, char **text,
                               size_t *bytes);
fkv_status fkv_profile_to_file(const struct fkv_profile_object *profile, const char *path);
/* published.c */
fkv_status fkv_profile_from_published(struct fkv_ctx *ctx, struct fkv_model *model,
                                      const fkv_fourier_params *fourier, const char *json,
                                      size_t bytes, double fraction,
                                      struct fkv_profile_object **out);

#endif /* FKV_PROFILE_PROFILE_H */
