/* SPDX-License-Identifier: Apache-2.0 */
#include "profile/waves.h"

#include "profile/profile.h"

#include <math.h>
#include <string.h>

#define PI 3.14159265358979323846
/*
 * A sinusoid of frequency w is, on a tile, cos or sin of (32 w) x with |x| < 1. Its Chebyshev coefficients are
 * 2 J_m(32 w), and J_16(4.5) is 2e-8: below the rounding of the sum.
 */
#define SLOW_ANGLE 4.5
#define NODES 32

static double chebyshev_of(double angle, int m) {
    double sum = 0.0;
    for (int k = 0; k < NODES; k++) {
        double place = PI * (k + 0.5) / NODES, x = angle * cos(place);
        sum += (m % 2 ? sin(x) : cos(x)) * cos(m * place);
    }
    return sum * (m ? 2.0 : 1.0) / NODES;
}

static void sort_pairs(const struct fkv_model *m, struct fkv_waves *w) {
    const bool interleaved = m->rope_layout == FKV_ROPE_INTERLEAVED;
    int order[FKV_MAX_PAIRS];
    for (int j = 0; j < w->pairs; j++) {
        int at = j;
        for (; at > 0 && m->inv_freq[order[at - 1]] < m->inv_freq[j]; at--) {
            order[at] = order[at - 1];
        }
        order[at] = j;
    }
    for (int d = 0; d < FKV_MAX_HEAD_DIM; d++) {
        w->pair_of[d] = -1;
    }
    w->halves = !interleaved;
    for (int i = 0; i < w->pairs; i++) {
        w->halves = w->halves && order[i] == i;
        const int j = order[i], a = interleaved ? 2 * j : j, b = interleaved ? a + 1 : j + w->pairs;
        w->frequency[i] = m->inv_freq[j];
        w->first[i] = (uint8_t)a;
        w->second[i] = (uint8_t)b;
        w->pair_of[a] = w->pair_of[b] = (int16_t)i;
        w->fast += 32.0 * w->frequency[i] > SLOW_ANGLE;
    }
}

static void fill_tables(struct fkv_waves *w) {
    const size_t row = FKV_TILE * sizeof(float);
    for (int j = 0; j < w->pairs; j++) {
        for (int t = 0; t < FKV_TILE; t++) {
            w->cos[j * FKV_TILE + t] = (float)cos(w->frequency[j] * (t - 31.5));
            w->sin[j * FKV_TILE + t] = (float)sin(w->frequency[j] * (t - 31.5));
        }
    }
    memcpy(w->columns, w->cos, (size_t)w->fast * row);
    memcpy(w->columns + w->fast * FKV_TILE, w->sin, (size_t)w->fast * row);
    for (int m = 0; m < FKV_DEGREES; m++) {
        for (int t = 0; t < FKV_TILE; t++) {
            w->columns[(2 * w->fast + m) * FKV_TILE + t] = (float)cos(m * acos((t - 31.5) / 32.0));
        }
        for (int j = w->fast; j < w->pairs; j++) {
            w->project[(j - w->fast) * FKV_DEGREES + m] =
                (float)chebyshev_of(32.0 * w->frequency[j], m);
        }
    }
}

fkv_status fkv_waves_create(struct fkv_ctx *ctx, const struct fkv_model *model,
                            struct fkv_waves **out) {
    *out = NULL;
    if (!model->rope_dim) {
        return FKV_OK;
    }
    struct fkv_waves sorted = {.pairs = model->rope_dim / 2, .scaling = model->rope_scaling};
    sorted.half = (sorted.pairs + 15) / 16 * 16;
    sort_pairs(model, &sorted);
    const size_t head = (sizeof sorted + 63) / 64 * 64;
    const size_t wave = (size_t)sorted.pairs * FKV_TILE;
    const size_t columns = (size_t)(2 * sorted.fast + FKV_DEGREES) * FKV_TILE;
    const size_t project = (size_t)(sorted.pairs - sorted.fast) * FKV_DEGREES;
    sorted.bytes = head + (2 * wave + columns + project + 16) * sizeof(float);
    struct fkv_waves *w = fkv_heap_calloc(&ctx->heap, sorted.bytes);
    if (!w) {
        return fkv_fail_memory(ctx, sorted.bytes, "tables of RoPE");
    }
    *w = sorted;
    w->cos = (float *)(void *)((char *)w + head);
    w->sin = w->cos + wave;
    w->columns = w->sin + wave;
    w->project = w->columns + columns;
    fill_tables(w);
    *out = w;
    return FKV_OK;
}

static size_t angles_bytes(const struct fkv_model *model) {
    return (size_t)FKV_TILE * (size_t)model->rope_dim * sizeof(double);
}

fkv_status fkv_angles_create(struct fkv_ctx *ctx, const struct fkv_model *model, double **out) {
    const int pairs = model->rope_dim / 2;
    *out = NULL;
    if (!pairs) {
        return FKV_OK;
    }
    double *angles = fkv_heap_alloc(&ctx->heap, angles_bytes(model));
    if (!angles) {
        return fkv_fail_memory(ctx, angles_bytes(model), "tables of RoPE");
    }
    for (int t = 0; t < FKV_TILE; t++) {
        for (int j = 0; j < pairs; j++) {
            fkv_angle(t, model->inv_freq[j], &angles[2 * t * pairs + j],
                      &angles[(2 * t + 1) * pairs + j]);
        }
    }
    *out = angles;
    return FKV_OK;
}

void fkv_angles_destroy(struct fkv_ctx *ctx, const struct fkv_model *model, double *angles) {
    fkv_heap_free(&ctx->heap, angles, angles_bytes(model));
}

void fkv_waves_destroy(struct fkv_ctx *ctx, struct fkv_waves *waves) {
    if (waves) {
        fkv_heap_free(&ctx->heap, waves, waves->bytes);
    }
}

/* A position of 31 bits times a frequency rounds to 2^-23 of an angle, as coarse as an f32 result. fma gives the
 * rounding exactly, and the first order of the addition theorem puts it back. */
void fkv_angle(double position, double frequency, double *c, double *s) {
    const double angle = position * frequency;
    const double rest = fma(position, frequency, -angle);
    const double cosine = cos(angle), sine = sin(angle);
    *c = cosine - rest * sine;
    *s = sine + rest * cosine;
}

void fkv_waves_angle(const struct fkv_waves *w, int pair, int64_t position, double offset,
                     double *c, double *s) {
    fkv_angle((double)position + offset, w->frequency[pair], c, s);
    *c *= w->scaling;
    *s *= w->scaling;
}

/* Angles are computed afresh where position mod 1024 is below 64, and turned on from tile to tile between: the
 * result depends on the position alone, wherever a table begins. */
#define STEPS 16

void fkv_waves_turns(const struct fkv_waves *w, int64_t position, int64_t count, float *c, float *s,
                     ptrdiff_t stride) {
    const int64_t before = position / FKV_TILE % STEPS;
    for (int j = 0; j < w->pairs; j++) {
        const double step_c = cos(FKV_TILE * w->frequency[j]);
        const double step_s = sin(FKV_TILE * w->frequency[j]);
        double x = 0.0, y = 0.0;
        for (int64_t i = -before; i < count; i++) {
            const double last = x;
            if ((i + before) % STEPS == 0) {
                fkv_waves_angle(w, j, position + i * FKV_TILE, 31.5, &x, &y);
            } else {
                x = last * step_c - y * step_s;
                y = y * step_c + last * step_s;
            }
            if (i >= 0) {
                c[i * stride + j] = (float)x;
                s[i * stride + j] = (float)y;
            }
        }
    }
}
