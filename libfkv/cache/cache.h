/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The object behind fkv_cache: sequences, and for each layer of each the tiles and segments that hold its
 * tokens. This room knows what is allocated and why; it never computes on the contents.
 *
 * A layer of a sequence: [sink page | body tiles 0, 1, 2, ..]. Body tile i holds the 64 tokens from
 * n_sink + 64 i on. Tiles below n_coded are coded: their page holds the kept channels, the others are in
 * the coefficients of the segment that covers the tile. The rest are exact pages. Exact profiles have no
 * sinks and never code, so that tile i begins at token 64 i.
 *
 *   exact page   for each KV head: K [D][64], then V [64][D], elements of the storage type; in calibrated
 *                profiles then the 64 tokens' positions
 *   sink page    an exact page for so many tokens as there are sinks, rounded up to 4, instead of 64
 *   kept page    for each KV head: K [kept][64], then V [64][kept]
 *   block        of a calibrated profile, one page for several tiles, in the entry of its first one while the
 *                others are NULL: for each KV head the tiles of K and then of V (exact channels as in a kept
 *                page, then codes as in kernels.h), then for each group of tokens of K and then of V the
 *                scales and the zero points, f16; rounded up to 8 bytes. Then the indices of those heads that
 *                have one (index.h), rounded up to 64 bytes. Behind all that struct fkv_block_head
 *   segment      two pages: the struct below with the row of fkv_spectrum_ones() for its length and the
 *                per-channel numbers; coefficients, for each KV head K [coded][stride] then V [coded][stride]
 *
 * Pages are shared by the sequences that were forked from one another, and counted. What is written to has
 * one holder: a sequence that appends to a shared page, or codes into a shared segment, gets a copy first.
 * Full pages, coded tiles and full segments are never written to again.
 */
#ifndef FKV_CACHE_CACHE_H
#define FKV_CACHE_CACHE_H

#include "codec/spectrum.h"
#include "profile/profile.h"

#define FKV_PAD 64 /* bytes behind the data of every page, which kernels may read; see page.c */

enum fkv_class {
    FKV_CLASS_EXACT,
    FKV_CLASS_KEPT,
    FKV_CLASS_COEFFICIENTS,
    FKV_CLASS_TABLES,
    FKV_CLASS_BLOCKS,
    FKV_CLASS_SCALES,
    FKV_CLASS_INDEX,
    FKV_N_CLASS
};

struct fkv_account {
    uint64_t bytes[FKV_N_CLASS];
};

/* Numbers of one coded channel. A restored value is offset + gain * sum_n w_n (C[n] + beta ones[n]) phi_n. */
struct fkv_channel_state {
    double sum;      /* of the samples less the reference */
    float reference; /* mean of the segment's first tile, subtracted before the transform */
    float gain, beta, offset;
};

/* The head of a page that ends with `ones` and `channels`. */
struct fkv_segment {
    int64_t tiles;                      /* coded so far */
    void *coefficients;                 /* a page: rows of all heads, in the coefficient type */
    float *ones;                        /* [stride] */
    struct fkv_channel_state *channels; /* [coded channels of the layer], in the rows' order */
    bool restored;                      /* authors' restoration: gains are frozen */
};

struct fkv_layer {
    int64_t tokens;
    int64_t n_coded; /* tiles; after a crop more than the tokens left would have had coded */
    void *sink;
    void **tiles;
    int64_t n_tiles; /* pages present: all tiles of the body */
    int64_t tile_slots;
    struct fkv_segment **segments;
    int64_t n_segments;
    int64_t segment_slots;
    /* Positions of the tokens in blocks: index + shift, unless uneven. */
    int64_t shift;
    bool uneven;
    /* While an append is under way, what to go back to if it fails: the table of before, and the shared
     * page of which *old_place is a copy now. */
    void **old_tiles;
    int64_t old_slots;
    void *old_page;
    void **old_place;
};

/* What the meter has found in a layer: sums over its samples. */
struct fkv_meter_sums {
    uint64_t blocks, missed, samples;
    double block_error, block_energy, block_max; /* |o' - o|^2, |o|^2, largest ratio of the two */
    double lse, lse_square, lse_max;
    double weight;
    double output_error, output_energy, output_max;
};

/* The fidelity meter (docs/codec.md): which blocks are measured, and what was found. */
struct fkv_meter {
    double fraction;
    uint64_t number;              /* never the same twice in a cache; plans are made for one */
    struct fkv_meter_sums sums[]; /* [n_layers] */
};

struct fkv_device_cache;
struct fkv_device_seq;

struct fkv_seq {
    int64_t id;
    int64_t period;
    uint64_t crops;                     /* so many: plans from before one are outdated */
    struct fkv_shared_spectrum *shared; /* NULL for exact profiles */
    struct fkv_account account;         /* all that it holds, shared or not */
    struct fkv_layer *layers;      /* on the CUDA backend only the numbers of tokens and tiles */
    struct fkv_device_seq *device; /* CUDA: its pages */
};

/* A spectrum in use by `users` sequences. */
struct fkv_shared_spectrum {
    struct fkv_shared_spectrum *next;
    struct fkv_spectrum *spectrum;
    int64_t users;
    /* on the CUDA backend: its tables there, struct fkv_cuda_spectrum; and what plans must know of them */
    uint64_t device;
    size_t device_bytes;
    int log_fft, rows;
};

/* Bytes of a block. */
struct fkv_block_size {
    size_t scales; /* together */
    size_t index;  /* of all heads */
    size_t head;   /* offset of its struct fkv_block_head */
    size_t bytes;  /* of the page, without a list of positions */
};

/* Whose tokens a block holds: positions are first, first + 1, .., or listed behind this. */
struct fkv_block_head {
    int32_t first;
    int32_t listed;
};

/* Where a layer's heads lie in its pages and segments. Constant after creation. */
struct fkv_head_layout {
    size_t kept[2]; /* elements before K and V in a kept page */
    size_t rows[2]; /* first coefficient row of K and V in a segment */
    /* bytes in a block: */
    size_t tiles[2];      /* before the first tile of K and V */
    size_t tile_bytes[2]; /* from tile to tile */
    size_t scales[2];     /* before the first group's scales */
    size_t index;         /* before the index of K; 0: there is none */
};
struct fkv_layer_layout {
    struct fkv_head_layout *heads;
    size_t kept_elements;
    size_t coded_rows;
    struct fkv_block_size block;
};

struct fkv_cache_object {
    _Atomic int refs;
    struct fkv_ctx *ctx;
    struct fkv_profile_object *profile;
    uint64_t max_tokens;
    uint64_t max_bytes;
    _Atomic int lock; /* readers, or -1 for a writer */
    bool closed;
    bool indexed; /* heads whose keys are exact have an index in each block */
    uint64_t bytes;
    uint64_t bytes_shared;            /* in pages with several holders, once */
    size_t refused;                   /* size of the last allocation that failed */
    struct fkv_account account;       /* everything, once */
    struct fkv_layer_layout *layouts; /* [n_layers]; NULL for exact profiles */
    struct fkv_shared_spectrum *spectra;
    struct fkv_device_cache *device; /* of the CUDA backend, else NULL */
    struct fkv_meter *meter;         /* NULL: off */
    uint64_t meters;                 /* started so far */
    struct fkv_seq **seqs;           /* slots */
    int64_t n_slots;
    int64_t next_id;
};

/* cache.c */
fkv_status fkv_cache_new(struct fkv_ctx *ctx, struct fkv_profile_object *profile,
                         const fkv_cache_params *params, struct fkv_cache_object **out);
void fkv_cache_ref(struct fkv_cache_object *cache);
void fkv_cache_unref(struct fkv_cache_object *cache);
/* Frees all data; the shell stays while plans refer to it. */
void fkv_cache_clear(struct fkv_cache_object *cache);
bool fkv_cache_read_lock(struct fkv_cache_object *cache);
bool fkv_cache_write_lock(struct fkv_cache_object *cache);
void fkv_cache_read_unlock(struct fkv_cache_object *cache);
void fkv_cache_write_unlock(struct fkv_cache_object *cache);
/* Counted allocation, zeroed, on the account of the cache and, unless NULL, of a sequence. */
void *fkv_cache_alloc(struct fkv_cache_object *cache, struct fkv_seq *seq, enum fkv_class class,
                      size_t bytes);
void fkv_cache_free(struct fkv_cache_object *cache, struct fkv_seq *seq, enum fkv_class class,
                    void *pointer, size_t bytes);
fkv_status fkv_seq_new(struct fkv_cache_object *cache, int64_t period, int64_t *id);
/* A sequence that holds what `parent` holds. Layers must be equal. */
fkv_status fkv_seq_fork(struct fkv_cache_object *cache, const struct fkv_seq *parent, int64_t *id);
/* The longest length, at most `tokens`, that a crop can leave; and the shortest from which on it can leave
 * every one. */
int64_t fkv_seq_crop_floor(const struct fkv_cache_object *cache, const struct fkv_seq *seq,
                           int64_t tokens);
int64_t fkv_seq_crop_limit(const struct fkv_cache_object *cache, const struct fkv_seq *seq);
/* Needs a length for which fkv_seq_crop_floor() is itself. Allocates nothing. */
void fkv_seq_crop(struct fkv_cache_object *cache, struct fkv_seq *seq, int64_t tokens);
void fkv_seq_delete(struct fkv_cache_object *cache, struct fkv_seq *seq);
/* NULL if the id is not living. */
struct fkv_seq *fkv_seq_find(struct fkv_cache_object *cache, int64_t id);
/* Tokens all layers hold; *equal tells whether they hold the same number. */
int64_t fkv_seq_tokens(const struct fkv_cache_object *cache, const struct fkv_seq *seq,
                       bool *equal);

/* The status and message of the allocation that was refused last. */
fkv_status fkv_cache_refused(struct fkv_cache_object *cache);
/* Bytes of a cache without sequences, and of a sequence without tokens. */
size_t fkv_cache_base_bytes(const struct fkv_profile_object *profile);
size_t fkv_seq_base_bytes(const struct fkv_profile_object *profile);

/* page.c: memory that may be held by several sequences, each of which drops it once. `bytes` is the size
 * asked for, FKV_PAD included. Holders are counted under the cache's write lock. */
void *fkv_page_new(struct fkv_cache_object *cache, struct fkv_seq *seq, enum fkv_class class,
                   size_t bytes); /* zeroed */
void *fkv_page_copy(struct fkv_cache_object *cache, struct fkv_seq *seq, enum fkv_class class,
                    const void *page, size_t bytes);
/* `seq` becomes one more holder. The page may be NULL, here and in what follows. */
void *fkv_page_share(struct fkv_cache_object *cache, struct fkv_seq *seq, enum fkv_class class,
                     void *page, size_t bytes);
void fkv_page_drop(struct fkv_cache_object *cache, struct fkv_seq *seq, enum fkv_class class,
                   void *page, size_t bytes);
/* Whether there is another holder; a page that has one must not be written to. */
bool fkv_page_shared(const void *page, size_t bytes);

/* block.c */
struct fkv_block_size fkv_block_size(const struct fkv_profile_object *profile, int layer);
void fkv_block_layout(const struct fkv_profile_object *profile, int layer, bool indexed,
                      struct fkv_layer_layout *layout);
/* Of one page. */
size_t fkv_block_bytes(const struct fkv_profile_object *profile, const struct fkv_block_size *size,
                       const void *page);
/* Bytes before the codes of a tile. */
size_t fkv_exact_tile_bytes(const struct fkv_profile_object *profile,
                            const struct fkv_residuals *residuals);
/* The block for the tiles from `tile` on, with their positions but empty else. step: positions of the tokens
 * that the layer does not hold yet. */
void *fkv_block_new(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer, int64_t tile,
                    const int32_t *step);
void *fkv_block_share(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer, void *page);
void fkv_block_drop(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer, void *page);
/* Sets shift and uneven for one more block. */
void fkv_layer_note_block(const struct fkv_cache_object *cache, struct fkv_layer *l, int layer,
                          int64_t tile, const void *page);

/* layer.c: sizes, and the growing, sealing, forking and cropping of one layer */
struct fkv_segment_bytes {
    size_t coefficients, tables; /* of its two pages; no coefficients: 0 */
};
size_t fkv_exact_page_bytes(const struct fkv_profile_object *profile);
size_t fkv_sink_page_bytes(const struct fkv_profile_object *profile);
size_t fkv_kept_page_bytes(const struct fkv_profile_object *profile, int layer);
struct fkv_segment_bytes fkv_segment_size(const struct fkv_profile_object *profile, int layer,
                                          int stride);
/* Entries of a table that holds `count`: depends on the count alone, not on how it was reached. */
int64_t fkv_slots_for(int64_t count);
/* Tiles of a body, of which the first are coded, once the layer holds `tokens` tokens. */
int64_t fkv_body_tiles(const struct fkv_profile_object *profile, int64_t tokens);
int64_t fkv_tiles_to_code(const struct fkv_profile_object *profile, int64_t tokens);

/* Makes room for n_new exact tokens. On failure the layer is as it was. */
fkv_status fkv_layer_grow(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                          int64_t n_new);
/* Ends a growth: keeps it, or drops what was added. */
void fkv_layer_grown(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer, bool keep);

/* What coding up to `until` tiles will need, allocated ahead. */
struct fkv_coding_room {
    int64_t until;
    void **kept; /* [until - n_coded] kept pages or blocks; entries NULL where there is none */
    int64_t kept_count;
    struct fkv_segment **segments; /* the new table; NULL if the old one serves */
    int64_t n_segments, segment_slots;
    struct fkv_segment *open; /* copy of the segment under way, if that is shared */
};
fkv_status fkv_layer_reserve(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                             int64_t until, const int32_t *step, struct fkv_coding_room *room);
void fkv_layer_unreserve(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                         struct fkv_coding_room *room);
/* Takes the new segments into use, before coding. Cannot fail. */
void fkv_layer_open_segments(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                             struct fkv_coding_room *room);
/* Puts the kept pages or blocks in place of the exact ones, which are freed. Cannot fail. */
void fkv_layer_seal(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                    struct fkv_coding_room *room);
void fkv_layer_free(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer);
/* Makes an empty layer of `child` hold what that of `parent` holds. fkv_layer_free() after a failure. */
fkv_status fkv_layer_fork(struct fkv_cache_object *cache, const struct fkv_seq *parent,
                          struct fkv_seq *child, int layer);
/* See fkv_seq_crop(). */
void fkv_layer_crop(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer, int64_t tokens);
/* Bytes of its pages that others hold as well. */
uint64_t fkv_layer_shared_bytes(const struct fkv_cache_object *cache, const struct fkv_seq *seq,
                                int layer);

/* stats.c */
void fkv_cache_count(struct fkv_cache_object *cache, const struct fkv_seq *seq, fkv_stats *stats);
fkv_status fkv_profile_predict(struct fkv_profile_object *profile, int64_t tokens, int64_t period,
                               fkv_stats *stats);

/* meter.c. Begins afresh; fraction 0 ends it. */
fkv_status fkv_meter_start(struct fkv_cache_object *cache, double fraction);
/* Of one layer, or of all: layer -1. */
void fkv_meter_report(const struct fkv_cache_object *cache, int layer, fkv_fidelity *fidelity);
/* Chosen blocks of a layer before `block`: so the block is chosen if the next one has more before it. */
int64_t fkv_meter_rank(const struct fkv_meter *meter, int layer, int64_t block);

static inline int fkv_sinks(const struct fkv_profile_object *p) {
    return p->coding == FKV_CODING_FOURIER      ? p->fourier.n_sink
           : p->coding == FKV_CODING_CALIBRATED ? p->codec.n_sink
                                                : 0;
}
static inline int64_t fkv_tiles_per_block(const struct fkv_profile_object *p) {
    return p->codec.block / FKV_TILE;
}
static inline const struct fkv_block_head *fkv_block_head(const struct fkv_block_size *size,
                                                          const void *page) {
    return (const struct fkv_block_head *)(const void *)((const char *)page + size->head);
}
/* The block that holds a coded tile. */
static inline char *fkv_block_of(const struct fkv_profile_object *p, const struct fkv_layer *l,
                                 int64_t tile) {
    return l->tiles[tile - tile % fkv_tiles_per_block(p)];
}
static inline int64_t fkv_tiles_per_segment(int64_t period) {
    return period / FKV_TILE;
}
/* Tokens before the first tile that is not coded; 0 if none is. */
static inline int64_t fkv_coded_end(const struct fkv_profile_object *p, const struct fkv_layer *l) {
    return l->n_coded ? fkv_sinks(p) + l->n_coded * FKV_TILE : 0;
}

/* Page addressing, shared by codec and attention. Tokens that an exact page has room for, and elements before a
 * part of it. */
static inline int fkv_page_room(const struct fkv_profile_object *p, bool sinks) {
    return sinks ? (fkv_sinks(p) + 3) / 4 * 4 : FKV_TILE;
}
static inline size_t fkv_page_offset(const struct fkv_profile_object *p, bool sinks, int kv_head,
                                     fkv_part part) {
    return ((size_t)kv_head * 2 + (size_t)part) * (size_t)p->model.head_dim *
           (size_t)fkv_page_room(p, sinks);
}
static inline size_t fkv_exact_offset(const struct fkv_profile_object *p, int kv_head,
                                      fkv_part part) {
    return fkv_page_offset(p, false, kv_head, part);
}
/* Positions of an exact page's tokens; in calibrated profiles only. */
static inline int32_t *fkv_page_positions(const struct fkv_profile_object *p, bool sinks,
                                          const void *page) {
    size_t elements = fkv_page_offset(p, sinks, p->model.n_kv_heads, FKV_PART_K);
    return (int32_t *)(void *)((char *)(uintptr_t)page +
                               elements * (p->storage_dtype == FKV_DTYPE_F32 ? 4 : 2));
}
static inline char *fkv_element(const void *base, fkv_dtype dtype, size_t index) {
    return (char *)(uintptr_t)base + index * (dtype == FKV_DTYPE_F32 ? 4 : 2);
}

#endif /* FKV_CACHE_CACHE_H */
