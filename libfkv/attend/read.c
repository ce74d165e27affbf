/* SPDX-License-Identifier: Apache-2.0 */
/* Reading back what is held, by the formulas of the header and in double: the slow, plain way. */
#include "attend/plan.h"
#include "kernels/packed.h"

struct reader {
    const struct fkv_cache_object *cache;
    const struct fkv_seq *seq;
    const struct fkv_layer *layer;
    int layer_index;
    fkv_part part;
    double *phases; /* cos and sin of 2 pi n l / T for the token at hand, [bins] pairs */
    double *rows;   /* weighted coefficients of a head's channels, [coded][bins] pairs */
};

/* Token `at` of an exact body tile or, tile -1, of the sinks. */
static float exact_value(const struct reader *r, int64_t tile, int head, int64_t at, int d) {
    const struct fkv_profile_object *p = r->cache->profile;
    const size_t D = (size_t)p->model.head_dim, t = (size_t)at, c = (size_t)d;
    const void *page = tile < 0 ? r->layer->sink : r->layer->tiles[tile];
    size_t index = fkv_page_offset(p, tile < 0, head, r->part);
    index += r->part == FKV_PART_K ? c * (size_t)fkv_page_room(p, tile < 0) + t : t * D + c;
    return fkv_load_element(fkv_element(page, p->storage_dtype, index), p->storage_dtype);
}

static void set_phases(const struct reader *r, int64_t local) {
    const struct fkv_spectrum *sp = r->seq->shared->spectrum;
    for (int n = 0; n < sp->bins; n++)
        fkv_spectrum_phase(sp, n, local, &r->phases[2 * n], &r->phases[2 * n + 1]);
}

/* Coefficients of one channel as the restoration takes them: gain w_n (C[n] + beta ones[n]). */
static void load_row(const struct reader *r, const struct fkv_segment *s, size_t row, double *to) {
    const struct fkv_profile_object *p = r->cache->profile;
    const struct fkv_spectrum *sp = r->seq->shared->spectrum;
    const struct fkv_channel_state *state = &s->channels[row];
    const fkv_dtype dtype = p->fourier.coefficient_dtype;
    const bool authors = p->fourier.restoration == FKV_RESTORE_AUTHORS;
    const char *c = fkv_element(s->coefficients, dtype, row * (size_t)sp->stride);
    for (int i = 0; i < 2 * sp->bins; i++) {
        const size_t at = (size_t)(i % 2 * sp->padded + i / 2);
        double weight = (double)state->gain * (authors ? 1.0 : (double)sp->weight[i / 2]);
        double value = (double)fkv_load_element(fkv_element(c, dtype, at), dtype);
        to[i] = weight * (value + (double)state->beta * (double)s->ones[at]);
    }
}

/* Eight sums side by side, which the compiler can put in vectors. */
static double restore(const struct reader *r, double offset, const double *row) {
    const int n = 2 * r->seq->shared->spectrum->bins;
    double sums[8] = {0.0};
    int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++)
            sums[j] += row[i + j] * r->phases[i + j];
    for (; i < n; i++)
        sums[0] += row[i] * r->phases[i];
    for (int j = 0; j < 8; j++)
        offset += sums[j];
    return offset;
}

/* Token `at` of body tile `tile`, all channels of a head. */
static void coded_head(const struct reader *r, int head, int64_t tile, int64_t at, float *x) {
    const struct fkv_profile_object *p = r->cache->profile;
    const struct fkv_channels *c = fkv_profile_head(p, r->layer_index, r->part, head);
    const struct fkv_head_layout *layout = &r->cache->layouts[r->layer_index].heads[head];
    const int64_t per_segment = fkv_tiles_per_segment(r->seq->period);
    const struct fkv_segment *s = r->layer->segments[tile / per_segment];
    const size_t kept = (size_t)c->kept, t = (size_t)at;
    set_phases(r, tile % per_segment * FKV_TILE + at);
    for (size_t i = 0; i < kept; i++) {
        size_t index = layout->kept[r->part];
        index += r->part == FKV_PART_K ? i * FKV_TILE + t : t * kept + i;
        x[c->list[i]] = fkv_load_element(
            fkv_element(r->layer->tiles[tile], p->storage_dtype, index), p->storage_dtype);
    }
    for (size_t i = 0; i < (size_t)c->coded; i++)
        x[c->list[kept + i]] =
            (float)restore(r, (double)s->channels[layout->rows[r->part] + i].offset,
                           r->rows + i * 2 * (size_t)r->seq->shared->spectrum->bins);
}

/* ---- calibrated profiles */

/* What token `at` of body tile `tile` holds of one head, carriers not yet turned. */
static void block_head(const struct reader *r, int head, int64_t tile, int at, double *exact,
                       double *residual) {
    const struct fkv_profile_object *p = r->cache->profile;
    const struct fkv_residuals *c = fkv_profile_residuals(p, r->layer_index, r->part, head);
    const struct fkv_head_layout *layout = &r->cache->layouts[r->layer_index].heads[head];
    const int64_t in_block = tile % fkv_tiles_per_block(p);
    const char *block = fkv_block_of(p, r->layer, tile);
    const char *data =
        block + layout->tiles[r->part] + (size_t)in_block * layout->tile_bytes[r->part];
    const uint8_t *codes = (const uint8_t *)data + fkv_exact_tile_bytes(p, c);
    const uint16_t *scale = (const uint16_t *)(const void *)(block + layout->scales[r->part]) +
                            in_block * FKV_TILE / p->codec.group * 2 * c->quantised;
    const int n_exact = c->count[FKV_WIDTH_EXACT];
    for (int i = 0; i < n_exact; i++) {
        size_t index = (size_t)(r->part == FKV_PART_K ? i * FKV_TILE + at : at * n_exact + i);
        exact[c->list[i]] =
            (double)fkv_load_element(fkv_element(data, p->storage_dtype, index), p->storage_dtype);
    }
    int n = 0;
    for (enum fkv_width w = FKV_WIDTH_8; w < FKV_WIDTH_0; w++) {
        const int bits = fkv_width_bits(w), count = c->count[w];
        for (int i = 0; i < count; i++, n++) {
            unsigned code = r->part == FKV_PART_K ? fkv_packed_key(codes + i * 8 * bits, bits, at)
                                                  : fkv_packed_value(codes, bits, count, at, i);
            residual[c->list[n_exact + n]] = (double)fkv_f16_to_f32(scale[c->quantised + n]) +
                                             (double)fkv_f16_to_f32(scale[n]) * code;
        }
        codes += 8 * bits * count;
    }
}

/* Position of a token of the body or, tile -1, of the sinks. */
static int64_t position_of(const struct reader *r, int64_t tile, int at) {
    const struct fkv_profile_object *p = r->cache->profile;
    const struct fkv_layer *l = r->layer;
    if (tile < 0 || tile >= l->n_coded)
        return fkv_page_positions(p, tile < 0, tile < 0 ? l->sink : l->tiles[tile])[at];
    const struct fkv_block_head *head =
        fkv_block_head(&r->cache->layouts[r->layer_index].block, fkv_block_of(p, l, tile));
    const int64_t in_block = tile % fkv_tiles_per_block(p) * FKV_TILE + at;
    return head->listed ? ((const int32_t *)(const void *)(head + 1))[in_block]
                        : head->first + in_block;
}

static void rotate(const struct reader *r, int64_t position, double *x) {
    const struct fkv_waves *w = r->cache->profile->waves;
    for (int j = 0; w && j < w->pairs; j++) {
        double cosine, sine, *a = x + w->first[j], *b = x + w->second[j], old = *a;
        fkv_waves_angle(w, j, position, 0.0, &cosine, &sine);
        *a = old * cosine - *b * sine;
        *b = *b * cosine + old * sine;
    }
}

/* A token of a calibrated profile's sequence, as attention sees it. */
static void calibrated_head(const struct reader *r, int head, int64_t tile, int at, float *x) {
    const struct fkv_profile_object *p = r->cache->profile;
    const int D = p->model.head_dim;
    const bool coded = tile >= 0 && tile < r->layer->n_coded;
    const bool unrotated = p->codec.domain == FKV_DOMAIN_UNROTATED && r->part == FKV_PART_K;
    const bool turned = !unrotated && r->part == FKV_PART_K;
    double value[FKV_MAX_HEAD_DIM] = {0.0}, exact[FKV_MAX_HEAD_DIM] = {0.0};
    double residual[FKV_MAX_HEAD_DIM] = {0.0};
    if (coded) {
        const struct fkv_residuals *c = fkv_profile_residuals(p, r->layer_index, r->part, head);
        const float *carrier = fkv_profile_carrier(p, r->layer_index, r->part, head);
        block_head(r, head, tile, at, exact, residual);
        for (int d = 0; d < D; d++)
            value[d] = (double)carrier[d];
        if (turned && c->carried)
            rotate(r, position_of(r, tile, at), value);
        for (int d = 0; d < D; d++)
            value[d] += residual[d];
        for (int i = 0; i < c->count[FKV_WIDTH_EXACT]; i++)
            value[c->list[i]] = exact[c->list[i]];
    } else {
        for (int d = 0; d < D; d++)
            value[d] = (double)exact_value(r, tile, head, at, d);
    }
    if (unrotated)
        rotate(r, position_of(r, tile, at), value);
    for (int d = 0; d < D; d++)
        x[d] = (float)value[d];
}

/* The rows of a head for the segment of a coded tile. */
static void load_rows(const struct reader *r, int head, int64_t tile) {
    const struct fkv_channels *c =
        fkv_profile_head(r->cache->profile, r->layer_index, r->part, head);
    const size_t first = r->cache->layouts[r->layer_index].heads[head].rows[r->part];
    const struct fkv_segment *s = r->layer->segments[tile / fkv_tiles_per_segment(r->seq->period)];
    for (size_t i = 0; i < (size_t)c->coded; i++)
        load_row(r, s, first + i, r->rows + i * 2 * (size_t)r->seq->shared->spectrum->bins);
}

static void read_head(const struct reader *r, int head, int64_t first, int64_t count,
                      const struct fkv_view *out) {
    const struct fkv_profile_object *p = r->cache->profile;
    const size_t size = fkv_dtype_size(out->dtype);
    int64_t loaded = -1;
    for (int64_t i = 0; i < count; i++) {
        const int64_t body = first + i - fkv_sinks(p), tile = body / FKV_TILE;
        float x[FKV_MAX_HEAD_DIM];
        if (p->coding == FKV_CODING_CALIBRATED) {
            calibrated_head(r, head, body < 0 ? -1 : tile,
                            (int)(body < 0 ? first + i : body % FKV_TILE), x);
        } else if (body >= 0 && tile < r->layer->n_coded) {
            int64_t segment = tile / fkv_tiles_per_segment(r->seq->period);
            if (segment != loaded)
                load_rows(r, head, tile);
            loaded = segment;
            coded_head(r, head, tile, body % FKV_TILE, x);
        } else {
            const int64_t at = body < 0 ? first + i : body % FKV_TILE;
            for (int d = 0; d < p->model.head_dim; d++)
                x[d] = exact_value(r, body < 0 ? -1 : tile, head, at, d);
        }
        char *row = out->data + i * out->token_stride + head * out->head_stride;
        for (int d = 0; d < p->model.head_dim; d++)
            fkv_store_element(row + (size_t)d * size, out->dtype, x[d]);
    }
}

size_t fkv_read_scratch(const struct fkv_seq *seq) {
    if (!seq->shared)
        return 0;
    return (FKV_MAX_HEAD_DIM + 1) * 2 * (size_t)seq->shared->spectrum->bins * sizeof(double);
}

void fkv_read_tokens(const struct fkv_cache_object *cache, const struct fkv_seq *seq, int layer,
                     fkv_part part, int64_t first, int64_t count, const struct fkv_view *out,
                     double *scratch) {
    struct reader r = {cache, seq, &seq->layers[layer], layer, part, scratch, NULL};
    if (seq->shared)
        r.rows = scratch + 2 * seq->shared->spectrum->bins;
    for (int h = 0; h < cache->profile->model.n_kv_heads; h++)
        read_head(&r, h, first, count, out);
}
