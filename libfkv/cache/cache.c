/* SPDX-License-Identifier: Apache-2.0 */
#include "cache/cache.h"
#include "device/device.h"

#include <string.h>

void *fkv_cache_alloc(struct fkv_cache_object *cache, struct fkv_seq *seq, enum fkv_class class,
                      size_t bytes) {
    if (!bytes)
        return NULL;
    void *p = NULL;
    if (bytes <= cache->max_bytes && cache->bytes <= cache->max_bytes - bytes)
        p = fkv_heap_calloc(&cache->ctx->heap, bytes);
    if (!p) {
        cache->refused = bytes;
        return NULL;
    }
    cache->bytes += bytes;
    cache->account.bytes[class] += bytes;
    if (seq)
        seq->account.bytes[class] += bytes;
    return p;
}

void fkv_cache_free(struct fkv_cache_object *cache, struct fkv_seq *seq, enum fkv_class class,
                    void *pointer, size_t bytes) {
    if (!pointer)
        return;
    fkv_heap_free(&cache->ctx->heap, pointer, bytes);
    cache->bytes -= bytes;
    cache->account.bytes[class] -= bytes;
    if (seq)
        seq->account.bytes[class] -= bytes;
}

fkv_status fkv_cache_refused(struct fkv_cache_object *cache) {
    if (cache->bytes + cache->refused > cache->max_bytes)
        return fkv_fail(cache->ctx, FKV_ERR_LIMIT,
                        "cache: %zu bytes more would pass its limit of %llu bytes", cache->refused,
                        (unsigned long long)cache->max_bytes);
    return fkv_fail_memory(cache->ctx, cache->refused, "cache");
}

/* ---- locks: a reader or writer that cannot have the cache at once is told so, not made to wait */

bool fkv_cache_read_lock(struct fkv_cache_object *cache) {
    int n = atomic_load(&cache->lock);
    while (n >= 0)
        if (atomic_compare_exchange_weak(&cache->lock, &n, n + 1))
            return true;
    return false;
}

bool fkv_cache_write_lock(struct fkv_cache_object *cache) {
    int free_lock = 0;
    return atomic_compare_exchange_strong(&cache->lock, &free_lock, -1);
}

void fkv_cache_read_unlock(struct fkv_cache_object *cache) {
    atomic_fetch_sub(&cache->lock, 1);
}

void fkv_cache_write_unlock(struct fkv_cache_object *cache) {
    atomic_store(&cache->lock, 0);
}

/* ---- the cache */

static size_t layouts_bytes(const struct fkv_profile_object *profile) {
    size_t layers = (size_t)profile->model.n_layers, heads = (size_t)profile->model.n_kv_heads;
    if (profile->coding == FKV_CODING_EXACT)
        return 0;
    return layers * (sizeof(struct fkv_layer_layout) + heads * sizeof(struct fkv_head_layout));
}

size_t fkv_cache_base_bytes(const struct fkv_profile_object *profile) {
    return sizeof(struct fkv_cache_object) + layouts_bytes(profile);
}

static void fill_layouts(struct fkv_cache_object *cache) {
    const struct fkv_profile_object *profile = cache->profile;
    const int layers = profile->model.n_layers, heads = profile->model.n_kv_heads;
    struct fkv_head_layout *next = (struct fkv_head_layout *)(void *)(cache->layouts + layers);
    for (int l = 0; l < layers; l++, next += heads) {
        struct fkv_layer_layout *layout = &cache->layouts[l];
        layout->heads = next;
        if (profile->coding == FKV_CODING_CALIBRATED) {
            fkv_block_layout(profile, l, cache->indexed, layout);
            continue;
        }
        for (int h = 0; h < heads; h++)
            for (int part = 0; part < 2; part++) {
                const struct fkv_channels *c = fkv_profile_head(profile, l, part, h);
                next[h].kept[part] = layout->kept_elements;
                next[h].rows[part] = layout->coded_rows;
                layout->kept_elements += (size_t)c->kept * FKV_TILE;
                layout->coded_rows += (size_t)c->coded;
            }
    }
}

fkv_status fkv_cache_new(struct fkv_ctx *ctx, struct fkv_profile_object *profile,
                         const fkv_cache_params *params, struct fkv_cache_object **out) {
    struct fkv_cache_object *cache = fkv_heap_calloc(&ctx->heap, sizeof *cache);
    *out = NULL;
    if (!cache)
        return fkv_fail_memory(ctx, sizeof *cache, "cache");
    cache->refs = 1;
    cache->ctx = ctx;
    cache->profile = profile;
    cache->max_tokens = params->max_tokens ? params->max_tokens : ctx->max_tokens;
    cache->max_bytes = params->max_bytes ? params->max_bytes : UINT64_MAX;
    cache->indexed = params->flags & FKV_CACHE_KEY_INDEX;
    cache->bytes = sizeof *cache;
    cache->account.bytes[FKV_CLASS_TABLES] = sizeof *cache;
    fkv_ctx_ref(ctx);
    fkv_profile_ref(profile);
    if (ctx->cuda) {
        fkv_status status = fkv_device_cache_new(cache);
        if (status != FKV_OK) {
            fkv_cache_unref(cache);
            return status;
        }
    } else if (profile->coding != FKV_CODING_EXACT) {
        cache->layouts = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, layouts_bytes(profile));
        if (!cache->layouts) {
            fkv_status status = fkv_cache_refused(cache);
            fkv_cache_unref(cache);
            return status;
        }
        fill_layouts(cache);
    }
    *out = cache;
    return FKV_OK;
}

void fkv_cache_ref(struct fkv_cache_object *cache) {
    atomic_fetch_add(&cache->refs, 1);
}

void fkv_cache_unref(struct fkv_cache_object *cache) {
    if (atomic_fetch_sub(&cache->refs, 1) != 1)
        return;
    struct fkv_ctx *ctx = cache->ctx;
    struct fkv_profile_object *profile = cache->profile;
    fkv_cache_clear(cache);
    fkv_heap_free(&ctx->heap, cache, sizeof *cache);
    fkv_profile_unref(profile);
    fkv_ctx_unref(ctx);
}

void fkv_cache_clear(struct fkv_cache_object *cache) {
    for (int64_t i = 0; i < cache->n_slots; i++)
        if (cache->seqs[i])
            fkv_seq_delete(cache, cache->seqs[i]);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, cache->seqs,
                   (size_t)cache->n_slots * sizeof *cache->seqs);
    if (cache->device)
        fkv_device_cache_free(cache);
    fkv_meter_start(cache, 0.0);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, cache->layouts, layouts_bytes(cache->profile));
    cache->seqs = NULL;
    cache->n_slots = 0;
    cache->layouts = NULL;
    cache->closed = true;
}

/* ---- spectra shared by the sequences of a period */

static size_t spectrum_bytes(const struct fkv_profile_object *profile, int64_t period) {
    return fkv_spectrum_bytes(period, profile->fourier.bins) + sizeof(struct fkv_shared_spectrum);
}

static fkv_status share_spectrum(struct fkv_cache_object *cache, int64_t period,
                                 struct fkv_shared_spectrum **out) {
    for (struct fkv_shared_spectrum *s = cache->spectra; s; s = s->next)
        if (s->spectrum->period == period) {
            s->users++;
            *out = s;
            return FKV_OK;
        }
    const int bins = cache->profile->fourier.bins;
    if (!fkv_spectrum_bytes(period, bins))
        return fkv_fail(cache->ctx, FKV_ERR_LIMIT, "sequence: period %lld is too long",
                        (long long)period);
    size_t own = sizeof(struct fkv_shared_spectrum), tables = fkv_spectrum_bytes(period, bins);
    struct fkv_shared_spectrum *s = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, own);
    if (!s)
        return fkv_cache_refused(cache);
    fkv_status status = FKV_ERR_NOMEM;
    if (tables <= cache->max_bytes - cache->bytes)
        status =
            fkv_spectrum_create(&cache->ctx->heap, cache->ctx->kernels, period, bins, &s->spectrum);
    if (status != FKV_OK) {
        cache->refused = tables;
        fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, s, own);
        return fkv_cache_refused(cache);
    }
    if (cache->device) {
        status = fkv_device_spectrum_new(cache, s);
        if (status != FKV_OK) {
            fkv_spectrum_destroy(&cache->ctx->heap, s->spectrum);
            fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, s, own);
            return status;
        }
    }
    cache->bytes += tables;
    cache->account.bytes[FKV_CLASS_TABLES] += tables;
    s->users = 1;
    s->next = cache->spectra;
    cache->spectra = s;
    *out = s;
    return FKV_OK;
}

static void unshare_spectrum(struct fkv_cache_object *cache, struct fkv_shared_spectrum *shared) {
    if (!shared || --shared->users)
        return;
    struct fkv_shared_spectrum **at = &cache->spectra;
    while (*at != shared)
        at = &(*at)->next;
    *at = shared->next;
    size_t bytes = spectrum_bytes(cache->profile, shared->spectrum->period);
    size_t tables = bytes - sizeof *shared;
    if (cache->device)
        fkv_device_spectrum_free(cache, shared);
    fkv_spectrum_destroy(&cache->ctx->heap, shared->spectrum);
    cache->bytes -= tables;
    cache->account.bytes[FKV_CLASS_TABLES] -= tables;
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, shared, sizeof *shared);
}

/* ---- sequences: an id is generation * 2^24 + slot, the generation counting all sequences ever made */

#define SLOT_BITS 24

size_t fkv_seq_base_bytes(const struct fkv_profile_object *profile) {
    return sizeof(struct fkv_seq) + (size_t)profile->model.n_layers * sizeof(struct fkv_layer);
}

/* A free slot; the table grows if there is none. */
static fkv_status take_slot(struct fkv_cache_object *cache, int64_t *slot) {
    for (*slot = 0; *slot < cache->n_slots; ++*slot)
        if (!cache->seqs[*slot])
            return FKV_OK;
    int64_t slots = fkv_slots_for(cache->n_slots + 1);
    if (slots > INT64_C(1) << SLOT_BITS || cache->next_id >= INT64_MAX >> SLOT_BITS)
        return fkv_fail(cache->ctx, FKV_ERR_LIMIT, "cache: too many sequences");
    size_t size = sizeof *cache->seqs;
    struct fkv_seq **seqs = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, (size_t)slots * size);
    if (!seqs)
        return fkv_cache_refused(cache);
    if (cache->n_slots)
        memcpy(seqs, cache->seqs, (size_t)cache->n_slots * size);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, cache->seqs, (size_t)cache->n_slots * size);
    cache->seqs = seqs;
    cache->n_slots = slots;
    return FKV_OK;
}

/* Not yet in the table. Takes over one use of the spectrum; gives it back on failure. */
static fkv_status make_seq(struct fkv_cache_object *cache, int64_t period,
                           struct fkv_shared_spectrum *shared, struct fkv_seq **out) {
    const size_t bytes = fkv_seq_base_bytes(cache->profile);
    struct fkv_seq *seq = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, bytes);
    *out = seq;
    if (!seq) {
        fkv_status status = fkv_cache_refused(cache);
        unshare_spectrum(cache, shared);
        return status;
    }
    seq->account.bytes[FKV_CLASS_TABLES] = bytes;
    seq->layers = (struct fkv_layer *)(void *)(seq + 1);
    seq->shared = shared;
    seq->period = period;
    if (cache->device) {
        fkv_status status = fkv_device_seq_new(cache, seq);
        if (status != FKV_OK)
            fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, seq, bytes);
        return status;
    }
    return FKV_OK;
}

static void free_seq(struct fkv_cache_object *cache, struct fkv_seq *seq) {
    if (cache->device)
        fkv_device_seq_free(cache, seq);
    for (int l = 0; l < cache->profile->model.n_layers; l++)
        if (!cache->device)
            fkv_layer_free(cache, seq, l);
    unshare_spectrum(cache, seq->shared);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, seq, fkv_seq_base_bytes(cache->profile));
}

/* Gives a sequence its id, or frees it. */
static fkv_status enter_seq(struct fkv_cache_object *cache, struct fkv_seq *seq, int64_t *id) {
    int64_t slot;
    fkv_status status = take_slot(cache, &slot);
    if (status != FKV_OK) {
        free_seq(cache, seq);
        return status;
    }
    seq->id = (cache->next_id++ << SLOT_BITS) | slot;
    cache->seqs[slot] = seq;
    *id = seq->id;
    return FKV_OK;
}

fkv_status fkv_seq_new(struct fkv_cache_object *cache, int64_t period, int64_t *id) {
    struct fkv_shared_spectrum *shared = NULL;
    struct fkv_seq *seq;
    fkv_status status = FKV_OK;
    if (cache->profile->coding == FKV_CODING_FOURIER)
        status = share_spectrum(cache, period, &shared);
    if (status == FKV_OK)
        status = make_seq(cache, period, shared, &seq);
    return status == FKV_OK ? enter_seq(cache, seq, id) : status;
}

fkv_status fkv_seq_fork(struct fkv_cache_object *cache, const struct fkv_seq *parent, int64_t *id) {
    struct fkv_seq *seq;
    if (parent->shared)
        parent->shared->users++;
    fkv_status status = make_seq(cache, parent->period, parent->shared, &seq);
    if (status != FKV_OK)
        return status;
    if (cache->device)
        status = fkv_device_seq_fork(cache, parent, seq);
    for (int l = 0; !cache->device && status == FKV_OK && l < cache->profile->model.n_layers; l++)
        status = fkv_layer_fork(cache, parent, seq, l);
    if (status == FKV_OK)
        return enter_seq(cache, seq, id);
    free_seq(cache, seq);
    return status;
}

struct fkv_seq *fkv_seq_find(struct fkv_cache_object *cache, int64_t id) {
    int64_t slot = id & ((INT64_C(1) << SLOT_BITS) - 1);
    if (id < 0 || slot >= cache->n_slots || !cache->seqs[slot] || cache->seqs[slot]->id != id)
        return NULL;
    return cache->seqs[slot];
}

void fkv_seq_delete(struct fkv_cache_object *cache, struct fkv_seq *seq) {
    cache->seqs[seq->id & ((INT64_C(1) << SLOT_BITS) - 1)] = NULL;
    free_seq(cache, seq);
}

int64_t fkv_seq_tokens(const struct fkv_cache_object *cache, const struct fkv_seq *seq,
                       bool *equal) {
    int64_t least = seq->layers[0].tokens;
    *equal = true;
    for (int l = 1; l < cache->profile->model.n_layers; l++) {
        if (seq->layers[l].tokens != seq->layers[0].tokens)
            *equal = false;
        least = fkv_min64(least, seq->layers[l].tokens);
    }
    return least;
}

/* ---- crops: inside the coded part only where nothing that stays depends on what goes */

int64_t fkv_seq_crop_limit(const struct fkv_cache_object *cache, const struct fkv_seq *seq) {
    int64_t limit = 0;
    for (int l = 0; l < cache->profile->model.n_layers; l++)
        limit = fkv_max64(limit, fkv_coded_end(cache->profile, &seq->layers[l]));
    return limit;
}

int64_t fkv_seq_crop_floor(const struct fkv_cache_object *cache, const struct fkv_seq *seq,
                           int64_t tokens) {
    const int64_t sinks = fkv_sinks(cache->profile);
    if (tokens <= sinks || tokens >= fkv_seq_crop_limit(cache, seq))
        return tokens;
    /* a segment is one sum over its tiles; blocks are never opened again */
    const int64_t unit = cache->profile->coding == FKV_CODING_CALIBRATED
                             ? cache->profile->codec.block
                             : fkv_tiles_per_segment(seq->period) * FKV_TILE;
    return sinks + (tokens - sinks) / unit * unit;
}

void fkv_seq_crop(struct fkv_cache_object *cache, struct fkv_seq *seq, int64_t tokens) {
    for (int l = 0; l < cache->profile->model.n_layers; l++)
        if (cache->device)
            fkv_device_layer_crop(cache, seq, l, tokens);
        else
            fkv_layer_crop(cache, seq, l, tokens);
    seq->crops++;
}
