/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What FKV_CRITERION_SENSITIVITY keeps: plain sums in double precision, for each layer and part one row of
 * Hk * D numbers per kind, so that two calibrators merge by adding. Nothing depends on the carriers, which
 * are known only at the end.
 */
#ifndef FKV_CALIB_SENSITIVITY_H
#define FKV_CALIB_SENSITIVITY_H

#include "profile/profile.h"

enum fkv_sum {
    FKV_SUM_X,    /* values */
    FKV_SUM_XX,   /* squares */
    FKV_SUM_GG,   /* squared gradients */
    FKV_SUM_FAST, /* energy outside each window's mean and waves of at least 64 tokens */
    FKV_SUM_QQ,   /* squares of the queries of the group; K only */
    FKV_N_SUM
};

struct fkv_sensitivity_counts {
    int64_t windows;
    int64_t tokens;
    int64_t gradient_tokens;
    int64_t query_tokens;
    int64_t weighted; /* 1: output weights are set */
};

struct fkv_sensitivity {
    struct fkv_ctx *ctx;
    const struct fkv_model *model; /* the calibrator's */
    fkv_codec_params codec;
    double *sums;    /* [n_layers][2][FKV_N_SUM][Hk * D] */
    double *weights; /* [n_layers][Hk * D], of V; meaningful where counts say so */
    struct fkv_sensitivity_counts *counts; /* [n_layers] */
};

/* k, v, gradients and queries of one window of one layer, checked and finite. */
struct fkv_window {
    int64_t tokens;
    struct fkv_view k, v, grad_k, grad_v, q;
    bool gradients, queries;
};

static inline size_t fkv_sensitivity_channels(const struct fkv_model *m) {
    return (size_t)m->n_kv_heads * (size_t)m->head_dim;
}
static inline double *fkv_sensitivity_row(const struct fkv_sensitivity *s, int layer, fkv_part part,
                                          enum fkv_sum sum) {
    return s->sums + (((size_t)layer * 2 + (size_t)part) * FKV_N_SUM + (size_t)sum) *
                         fkv_sensitivity_channels(s->model);
}
size_t fkv_sensitivity_sums(const struct fkv_model *m); /* doubles at sums */

/* codec NULL: defaults. */
fkv_status fkv_sensitivity_init(struct fkv_sensitivity *s, struct fkv_ctx *ctx,
                                const struct fkv_model *model, const fkv_codec_params *codec);
void fkv_sensitivity_free(struct fkv_sensitivity *s);
fkv_status fkv_sensitivity_add(struct fkv_sensitivity *s, int layer,
                               const struct fkv_window *window);
/* Adds `other`, which is of the same geometry. */
fkv_status fkv_sensitivity_merge(struct fkv_sensitivity *s, const struct fkv_sensitivity *other);

/* A layer that was not observed, or lacks what the statistic needs: STATE. */
fkv_status fkv_sensitivity_statistic(const struct fkv_sensitivity *s, int layer, fkv_part part,
                                     fkv_statistic statistic, double *values);
/* Expected loss of every channel's carrier alone in the domain of the codec, [n_layers][2][Hk * D], for
 * contexts of `tokens` tokens. */
fkv_status fkv_sensitivity_losses(const struct fkv_sensitivity *s, int64_t tokens, double *losses);
/* Means as carriers, K's [n_layers][Hk * D], then V's. */
fkv_status fkv_sensitivity_carriers(const struct fkv_sensitivity *s, float *carriers);

/* sensitivity_file.c */
fkv_status fkv_sensitivity_save(const struct fkv_sensitivity *s, char *buffer, size_t bytes,
                                size_t *needed);
/* Reads the geometry; *model is the caller's to free. */
fkv_status fkv_sensitivity_read_model(struct fkv_ctx *ctx, const char *data, size_t bytes,
                                      struct fkv_model *model, fkv_codec_params *codec);
/* Reads the rest into a fresh object of that geometry. */
fkv_status fkv_sensitivity_read_sums(struct fkv_sensitivity *s, const char *data, size_t bytes);

#endif /* FKV_CALIB_SENSITIVITY_H */
