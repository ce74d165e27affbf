/* SPDX-License-Identifier: Apache-2.0 */
#include "cache/cache.h"
#include "device/device.h"

static void finish(const struct fkv_profile_object *profile, const struct fkv_account *account,
                   fkv_stats *stats) {
    const struct fkv_model *m = &profile->model;
    stats->bytes_exact = account->bytes[FKV_CLASS_EXACT];
    stats->bytes_kept = account->bytes[FKV_CLASS_KEPT];
    stats->bytes_coefficients = account->bytes[FKV_CLASS_COEFFICIENTS];
    stats->bytes_tables = account->bytes[FKV_CLASS_TABLES];
    stats->bytes_blocks = account->bytes[FKV_CLASS_BLOCKS];
    stats->bytes_scales = account->bytes[FKV_CLASS_SCALES];
    stats->bytes_index = account->bytes[FKV_CLASS_INDEX];
    stats->bytes = 0;
    for (int c = 0; c < FKV_N_CLASS; c++)
        stats->bytes += account->bytes[c];
    stats->tokens_exact = stats->tokens - stats->tokens_coded;
    stats->dense_bytes =
        stats->tokens * 4 * (uint64_t)m->n_kv_heads * (uint64_t)m->head_dim * (uint64_t)m->n_layers;
    stats->ratio = stats->tokens ? (double)stats->dense_bytes / (double)stats->bytes : 0.0;
}

static void add_sequence(const struct fkv_cache_object *cache, const struct fkv_seq *seq,
                         fkv_stats *stats) {
    bool equal;
    stats->sequences++;
    stats->tokens += (uint64_t)fkv_seq_tokens(cache, seq, &equal);
    stats->tokens_coded += (uint64_t)seq->layers[0].n_coded * FKV_TILE;
}

void fkv_cache_count(struct fkv_cache_object *cache, const struct fkv_seq *seq, fkv_stats *stats) {
    if (seq) {
        add_sequence(cache, seq, stats);
        /* who else holds a page is known to the page alone */
        if (cache->device)
            stats->bytes_shared = fkv_device_shared_bytes(cache, seq);
        for (int l = 0; !cache->device && cache->bytes_shared && l < cache->profile->model.n_layers;
             l++)
            stats->bytes_shared += fkv_layer_shared_bytes(cache, seq, l);
    } else {
        for (int64_t i = 0; i < cache->n_slots; i++)
            if (cache->seqs[i])
                add_sequence(cache, cache->seqs[i], stats);
        stats->bytes_shared = cache->bytes_shared;
    }
    finish(cache->profile, seq ? &seq->account : &cache->account, stats);
}

fkv_status fkv_profile_predict(struct fkv_profile_object *profile, int64_t tokens, int64_t period,
                               fkv_stats *stats) {
    const bool fourier = profile->coding == FKV_CODING_FOURIER;
    const int64_t tiles = fkv_body_tiles(profile, tokens);
    const int64_t coded = fkv_tiles_to_code(profile, tokens);
    const uint64_t layers = (uint64_t)profile->model.n_layers;
    struct fkv_account a = {{0}};
    uint64_t *tables = &a.bytes[FKV_CLASS_TABLES];
    int64_t segments = 0;
    int stride = 0;
    *tables = fkv_cache_base_bytes(profile) + fkv_seq_base_bytes(profile) +
              (uint64_t)fkv_slots_for(1) * sizeof(struct fkv_seq *);
    if (fourier) {
        size_t spectrum = fkv_spectrum_bytes(period, profile->fourier.bins);
        if (!spectrum)
            return fkv_fail(profile->ctx, FKV_ERR_LIMIT, "period %lld is too long",
                            (long long)period);
        *tables += spectrum + sizeof(struct fkv_shared_spectrum);
        stride = fkv_spectrum_stride(period, profile->fourier.bins);
        segments = fkv_ceil_div(coded, fkv_tiles_per_segment(period));
        if (segments > 1 && profile->fourier.outgrow == FKV_OUTGROW_ERROR)
            return fkv_fail(profile->ctx, FKV_ERR_LIMIT,
                            "%lld tokens outgrow the period of %lld tokens", (long long)tokens,
                            (long long)period);
    }
    bool has_sink = fkv_sinks(profile) && tokens;
    a.bytes[FKV_CLASS_EXACT] = layers * ((uint64_t)(tiles - coded) * fkv_exact_page_bytes(profile) +
                                         (has_sink ? fkv_sink_page_bytes(profile) : 0));
    *tables += layers * ((uint64_t)fkv_slots_for(tiles) * sizeof(void *) +
                         (uint64_t)segments * sizeof(struct fkv_segment *));
    for (int l = 0; fourier && l < profile->model.n_layers; l++) {
        struct fkv_segment_bytes size = fkv_segment_size(profile, l, stride);
        a.bytes[FKV_CLASS_KEPT] += (uint64_t)coded * fkv_kept_page_bytes(profile, l);
        a.bytes[FKV_CLASS_COEFFICIENTS] += (uint64_t)segments * size.coefficients;
        *tables += (uint64_t)segments * size.tables;
    }
    for (int l = 0; profile->coding == FKV_CODING_CALIBRATED && l < profile->model.n_layers; l++) {
        struct fkv_block_size size = fkv_block_size(profile, l);
        uint64_t blocks = (uint64_t)(coded / fkv_tiles_per_block(profile));
        a.bytes[FKV_CLASS_BLOCKS] += blocks * (size.bytes - size.scales);
        a.bytes[FKV_CLASS_SCALES] += blocks * size.scales;
    }
    stats->sequences = 1;
    stats->tokens = (uint64_t)tokens;
    stats->tokens_coded = (uint64_t)coded * FKV_TILE;
    finish(profile, &a, stats);
    return FKV_OK;
}
