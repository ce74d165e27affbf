/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Spectra of all channels of a prompt at once, as matrix products over blocks of 64 tokens: the waves
 * of 32 bins are the columns of a [64][64] tile that all channels share. A wave of bin n at token l is
 * looked up at n * l mod T in a table of one period, so no phase is ever rounded.
 */
#include "calib/channel_error.h"

#include "codec/rope.h"
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

#define BLOCK FKV_TILE
#define BAND (BLOCK / 2) /* bins of a tile: cosine and sine of each make BLOCK columns */
#define GROUP 256        /* channels that one item works on */
#define FLUSH 8          /* blocks summed in f32 before they go to double */

/* Of the restored series r before the authors' affine match, and of its product with the series. */
struct restored {
    double peak, energy, product;
};

struct scratch {
    _Alignas(64) float tile[BLOCK * BLOCK];
    _Alignas(64) float product[GROUP * BLOCK];
    _Alignas(64) double sum[GROUP * BLOCK];
    _Alignas(64) float rows[BLOCK * FKV_MAX_HEAD_DIM];
    _Alignas(64) float cos[BLOCK * FKV_MAX_HEAD_DIM / 2];
    _Alignas(64) float sin[BLOCK * FKV_MAX_HEAD_DIM / 2];
};

/* All of one call's memory, carved from one piece. T is `length`; rows are channels h * D + d. */
struct work {
    const struct fkv_prompt *prompt;
    const struct fkv_kernels *kernels;
    struct fkv_view x, q;
    bool rotate, authors;
    int rows;
    int64_t length, blocks, bins, bands, q_blocks;
    struct scratch *scratch;   /* [threads] */
    float *wave;               /* [T][2] */
    float *series;             /* [blocks][rows][BLOCK], mean removed */
    double *energy, *peak;     /* [rows], of the series */
    double *kept;              /* [bands][rows], energy in the bins */
    float *coefs;              /* [bands][rows][BLOCK] */
    struct restored *restored; /* [blocks][rows] */
    double *squares;           /* [q_blocks][rows] */
};

/* ---- series */

/* One block of one head in f32, [count][D]. */
static void load_block(const struct work *w, const struct fkv_view *view, int head, int64_t first,
                       int count, bool rotate, struct scratch *s) {
    const struct fkv_model *model = w->prompt->model;
    int dim = model->head_dim;
    for (int t = 0; t < count; t++) {
        float *row = s->rows + t * dim;
        fkv_load_head(w->prompt->ctx->kernels, view, first + t, head, dim, row);
        if (rotate)
            fkv_rope_apply(model, row, s->cos + t * (model->rope_dim / 2),
                           s->sin + t * (model->rope_dim / 2));
    }
}

static void load_angles(const struct work *w, int64_t first, int count, struct scratch *s) {
    int64_t positions[BLOCK];
    for (int t = 0; t < count; t++)
        positions[t] = first + t;
    fkv_rope_table(w->prompt->model, positions, count, s->cos, s->sin);
}

static void gather_series(void *arg, int64_t b, int thread) {
    const struct work *w = arg;
    struct scratch *s = &w->scratch[thread];
    int dim = w->prompt->model->head_dim;
    int64_t first = w->prompt->fourier->n_sink + b * BLOCK;
    int count = (int)fkv_min64(BLOCK, w->length - b * BLOCK);
    if (w->rotate)
        load_angles(w, first, count, s);
    for (int h = 0; h < w->prompt->model->n_kv_heads; h++) {
        load_block(w, &w->x, h, first, count, w->rotate, s);
        float *out = w->series + (b * w->rows + h * dim) * BLOCK;
        for (int d = 0; d < dim; d++)
            for (int t = 0; t < count; t++)
                out[d * BLOCK + t] = s->rows[t * dim + d];
    }
}

static void center_series(void *arg, int64_t r, int thread) {
    (void)thread;
    const struct work *w = arg;
    double sum = 0, energy = 0, peak = 0;
    for (int64_t t = 0; t < w->length; t++)
        sum += w->series[(t / BLOCK * w->rows + r) * BLOCK + t % BLOCK];
    double mean = sum / (double)w->length;
    for (int64_t t = 0; t < w->length; t++) {
        float *x = &w->series[(t / BLOCK * w->rows + r) * BLOCK + t % BLOCK];
        *x = (float)(*x - mean);
        energy += (double)*x * *x;
        peak = fmax(peak, fabs(*x));
    }
    w->energy[r] = energy;
    w->peak[r] = peak;
}

/* Sums of q^2 over the tokens of a block and the query heads of each KV head. */
static void square_queries(void *arg, int64_t b, int thread) {
    const struct work *w = arg;
    const struct fkv_model *model = w->prompt->model;
    struct scratch *s = &w->scratch[thread];
    int dim = model->head_dim;
    int count = (int)fkv_min64(BLOCK, w->prompt->tokens - b * BLOCK);
    double *sums = w->squares + b * w->rows;
    memset(sums, 0, (size_t)w->rows * sizeof *sums);
    load_angles(w, b * BLOCK, count, s);
    for (int h = 0; h < model->n_q_heads; h++) {
        load_block(w, &w->q, h, b * BLOCK, count, true, s);
        double *out = sums + h / model->group * dim;
        for (int t = 0; t < count; t++)
            for (int d = 0; d < dim; d++)
                out[d] += (double)s->rows[t * dim + d] * s->rows[t * dim + d];
    }
}

/* ---- spectra */

static void make_wave(void *arg, int64_t b, int thread) {
    (void)thread;
    const struct work *w = arg;
    double step = 2 * 3.14159265358979323846 / (double)w->length;
    for (int64_t l = b * BLOCK; l < fkv_min64(w->length, (b + 1) * BLOCK); l++) {
        w->wave[2 * l] = (float)cos(step * (double)l);
        w->wave[2 * l + 1] = (float)sin(step * (double)l);
    }
}

/* Waves of a band over a block, token-major (column 2i: cosine of bin i; 2i + 1: its sine), or
 * transposed. Bin 0, which the mean has taken, and what is beyond the bins or the series: zero. */
static void fill_tile(const struct work *w, int64_t band, int64_t block, bool transposed,
                      float *tile) {
    int64_t n0 = fkv_max64(1, band * BAND), n1 = fkv_min64(w->bins, (band + 1) * BAND);
    int count = (int)fkv_min64(BLOCK, w->length - block * BLOCK);
    ptrdiff_t by_token = transposed ? 1 : BLOCK, by_column = transposed ? BLOCK : 1;
    memset(tile, 0, BLOCK * BLOCK * sizeof *tile);
    for (int t = 0; t < count; t++) {
        int64_t l = block * BLOCK + t;
        int64_t phase = n0 * l % w->length;
        float *out = tile + t * by_token + 2 * (n0 - band * BAND) * by_column;
        for (int64_t n = n0; n < n1; n++) {
            out[0] = w->wave[2 * phase];
            out[by_column] = w->wave[2 * phase + 1];
            out += 2 * by_column;
            phase += l;
            phase -= phase >= w->length ? w->length : 0;
        }
    }
}

static int group_rows(const struct work *w, int64_t first) {
    return (int)fkv_min64(GROUP, w->rows - first);
}

/* Energy that the bins of a band take from each series; with whole periods the waves are orthogonal,
 * so this is what least squares removes. */
static void keep_band(const struct work *w, int64_t band, int64_t first, const double *sum) {
    for (int r = 0; r < group_rows(w, first); r++) {
        double kept = 0;
        for (int i = 0; i < BAND; i++) {
            double c = sum[r * BLOCK + 2 * i], s = sum[r * BLOCK + 2 * i + 1];
            double weight = 2 * (band * BAND + i) == w->length ? 1 : 2;
            kept += weight * (c * c + s * s);
        }
        w->kept[band * w->rows + first + r] = kept / (double)w->length;
        if (w->authors)
            for (int i = 0; i < BLOCK; i++)
                w->coefs[(band * w->rows + first + r) * BLOCK + i] = (float)sum[r * BLOCK + i];
    }
}

static void transform(void *arg, int64_t item, int thread) {
    const struct work *w = arg;
    struct scratch *s = &w->scratch[thread];
    int64_t band = item % w->bands, first = item / w->bands * GROUP;
    int rows = group_rows(w, first);
    size_t values = (size_t)rows * BLOCK;
    memset(s->sum, 0, values * sizeof *s->sum);
    memset(s->product, 0, values * sizeof *s->product);
    for (int64_t b = 0; b < w->blocks; b++) {
        int count = (int)fkv_min64(BLOCK, w->length - b * BLOCK);
        fill_tile(w, band, b, false, s->tile);
        w->kernels->weigh[FKV_STORE_F32](s->product, BLOCK,
                                         w->series + (b * w->rows + first) * BLOCK, BLOCK, s->tile,
                                         BLOCK, count, rows, NULL);
        if ((b + 1) % FLUSH && b + 1 < w->blocks)
            continue;
        for (size_t i = 0; i < values; i++) {
            s->sum[i] += s->product[i];
            s->product[i] = 0;
        }
    }
    keep_band(w, band, first, s->sum);
}

/* r(l) of the authors' formula without its factor 1/N, which the match takes out again. Over a whole
 * period every wave but bin 0 has mean 0, so leaving bin 0 out is subtracting the mean of r. */
static void restore(void *arg, int64_t item, int thread) {
    const struct work *w = arg;
    struct scratch *s = &w->scratch[thread];
    int64_t block = item % w->blocks, first = item / w->blocks * GROUP;
    int rows = group_rows(w, first);
    int count = (int)fkv_min64(BLOCK, w->length - block * BLOCK);
    memset(s->product, 0, (size_t)rows * BLOCK * sizeof *s->product);
    for (int64_t band = 0; band < w->bands; band++) {
        fill_tile(w, band, block, true, s->tile);
        w->kernels->weigh[FKV_STORE_F32](s->product, BLOCK,
                                         w->coefs + (band * w->rows + first) * BLOCK, BLOCK,
                                         s->tile, BLOCK, BLOCK, rows, NULL);
    }
    for (int r = 0; r < rows; r++) {
        const float *x = w->series + (block * w->rows + first + r) * BLOCK;
        struct restored sums = {0, 0, 0};
        for (int t = 0; t < count; t++) {
            double value = s->product[r * BLOCK + t];
            sums.peak = fmax(sums.peak, fabs(value));
            sums.energy += value * value;
            sums.product += value * x[t];
        }
        w->restored[block * w->rows + first + r] = sums;
    }
}

/* ---- errors */

static double residual_error(const struct work *w, int64_t r) {
    double energy = w->energy[r];
    for (int64_t band = 0; band < w->bands; band++)
        energy -= w->kept[band * w->rows + r];
    return (energy < 0 ? 0 : energy) / (double)w->length;
}

/* Mean of (s r - x)^2 with s = max|x| / max|r|, x without its mean. A series with nothing in its bins
 * restores to its mean: a least-squares r (2/T of this one) below 2^-17 of the peak is the rounding of
 * f32, not a signal. */
static double published_error(const struct work *w, int64_t r) {
    struct restored all = {0, 0, 0};
    for (int64_t b = 0; b < w->blocks; b++) {
        const struct restored *sums = &w->restored[b * w->rows + r];
        all.peak = fmax(all.peak, sums->peak);
        all.energy += sums->energy;
        all.product += sums->product;
    }
    bool empty = all.peak * 2 / (double)w->length <= 0x1p-17 * w->peak[r];
    double scale = empty ? 0 : w->peak[r] / all.peak;
    double error = w->energy[r] - 2 * scale * all.product + scale * scale * all.energy;
    return (error < 0 ? 0 : error) / (double)w->length;
}

static double query_square(const struct work *w, int64_t r) {
    double sum = 0;
    for (int64_t b = 0; b < w->q_blocks; b++)
        sum += w->squares[b * w->rows + r];
    return sum / ((double)w->prompt->tokens * w->prompt->model->group);
}

/* ---- memory and order of work */

/* Hands out 64-byte aligned pieces of one block; with base NULL it only adds up. */
struct carver {
    char *base;
    size_t used;
    bool overflow;
};

static void *carve(struct carver *c, int64_t a, int64_t b, size_t size) {
    void *piece = c->base ? c->base + c->used : NULL;
    size_t bytes;
    if (!fkv_mul_size((size_t)a, (size_t)b, &bytes) || !fkv_size(bytes, size, 63, &bytes) ||
        !fkv_add_size(c->used, bytes & ~(size_t)63, &c->used))
        c->overflow = true;
    return piece;
}

static struct carver lay_out(struct work *w, char *base) {
    struct carver c = {base, 0, false};
    w->scratch = carve(&c, w->prompt->ctx->threads, 1, sizeof *w->scratch);
    w->wave = carve(&c, w->length, 2, sizeof *w->wave);
    w->series = carve(&c, w->blocks * BLOCK, w->rows, sizeof *w->series);
    w->energy = carve(&c, w->rows, 1, sizeof *w->energy);
    w->peak = carve(&c, w->rows, 1, sizeof *w->peak);
    w->kept = carve(&c, w->bands, w->rows, sizeof *w->kept);
    w->coefs = carve(&c, w->authors ? w->bands * BLOCK : 0, w->rows, sizeof *w->coefs);
    w->restored = carve(&c, w->authors ? w->blocks : 0, w->rows, sizeof *w->restored);
    w->squares = carve(&c, w->q_blocks, w->rows, sizeof *w->squares);
    return c;
}

static void run(struct work *w, double *errors) {
    struct fkv_pool *pool = w->prompt->ctx->pool;
    int64_t groups = fkv_ceil_div(w->rows, GROUP);
    fkv_pool_run(pool, w->blocks, make_wave, w);
    fkv_pool_run(pool, w->blocks, gather_series, w);
    fkv_pool_run(pool, w->rows, center_series, w);
    fkv_pool_run(pool, groups * w->bands, transform, w);
    if (w->authors)
        fkv_pool_run(pool, groups * w->blocks, restore, w);
    if (w->q_blocks)
        fkv_pool_run(pool, w->q_blocks, square_queries, w);
    for (int r = 0; r < w->rows; r++) {
        errors[r] = w->authors ? published_error(w, r) : residual_error(w, r);
        if (w->q_blocks)
            errors[r] *= query_square(w, r);
    }
}

fkv_status fkv_prompt_errors(const struct fkv_prompt *prompt, const struct fkv_view *x, bool rotate,
                             const struct fkv_view *q, double *errors) {
    struct fkv_ctx *ctx = prompt->ctx;
    struct work w = {.prompt = prompt,
                     .kernels = ctx->kernels,
                     .x = *x,
                     .rotate = rotate,
                     .authors = prompt->criterion == FKV_CRITERION_PUBLISHED,
                     .rows = prompt->model->n_kv_heads * prompt->model->head_dim,
                     .length = prompt->tokens - prompt->fourier->n_sink - prompt->fourier->n_local};
    w.blocks = fkv_ceil_div(w.length, BLOCK);
    w.bins = fkv_min64(prompt->fourier->bins, w.length / 2 + 1);
    w.bands = fkv_ceil_div(w.bins, BAND);
    if (q) {
        w.q = *q;
        w.q_blocks = fkv_ceil_div(prompt->tokens, BLOCK);
    }
    struct carver need = lay_out(&w, NULL);
    char *memory = need.overflow ? NULL : fkv_heap_alloc(&ctx->heap, need.used);
    if (!memory)
        return fkv_fail_memory(ctx, need.overflow ? SIZE_MAX : need.used,
                               "series and spectra of a prompt");
    lay_out(&w, memory);
    run(&w, errors);
    fkv_heap_free(&ctx->heap, memory, need.used);
    return FKV_OK;
}
