/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Caches whose pages are on a CUDA device. The books are on the host and nothing is ever read back for them:
 * struct fkv_layer says how many tokens there are and how many tiles are coded, as on the CPU; pages, their
 * holders and the tables of sequences are here; the contents are the module's (backend_cuda.h says how they lie).
 *
 * What kernels on the stream may still read is given back to the pools at once: whoever takes it next writes to it
 * on the same stream, later.
 */
#ifndef FKV_DEVICE_DEVICE_H
#define FKV_DEVICE_DEVICE_H

#include "attend/plan.h"
#include "backend_cuda.h"

/* A page on the device, and the sequences that hold it. */
struct fkv_device_page {
    uint64_t address;
    uint32_t holders;
    int32_t pool;
    struct fkv_device_page *next; /* in the pool's list of free pages */
};

struct fkv_device_chunk {
    struct fkv_device_chunk *next;
    uint64_t address;
    int64_t count;
    struct fkv_device_page pages[];
};

/* Pages of one size. */
struct fkv_device_pool {
    size_t bytes;
    enum fkv_class class;
    size_t scales; /* of bytes, those counted as scales */
    struct fkv_device_page *free;
    struct fkv_device_chunk *chunks;
    int64_t pages;
};

/* Pinned memory through which the host's data pass, in turns. */
#define FKV_DEVICE_STAGES 4
struct fkv_device_stage {
    void *memory, *event;
    size_t bytes;
    bool used;
};

struct fkv_device_buffer {
    uint64_t address;
    size_t bytes;
};

struct fkv_device_cache {
    struct fkv_cuda_cache c;
    struct fkv_cuda_head *heads;   /* [layers][Hk]; NULL unless coded */
    struct fkv_cuda_split *splits; /* of Fourier caches, likewise */
    int32_t *coded_rows;           /* [layers] of theirs */
    int32_t *unit_bytes;           /* [layers]; of Fourier caches: of a page of kept channels */
    struct fkv_device_buffer tables, patches;
    struct fkv_device_pool *pools; /* exact pages, then the layers' blocks, kept pages, segments */
    int32_t n_pools;
    int32_t *pool_of;      /* [layers] of blocks or kept pages */
    int32_t *segment_pool; /* [layers] */
    struct fkv_device_stage stages[FKV_DEVICE_STAGES];
    int32_t stage;
    /* Writes to tables that have not been sent yet. */
    struct fkv_cuda_patch *pending;
    int64_t n_pending, pending_slots;
};

/* Of a sequence: pages by table entry, [layers][slots]; the same on the device. */
struct fkv_device_seq {
    struct fkv_device_page **pages;
    int64_t slots;
    uint64_t table;
    size_t table_bytes;
    /* Fourier caches: the same of segments, [layers][segment_slots] */
    struct fkv_device_page **segments;
    int64_t segment_slots;
    uint64_t segment_table;
    size_t segment_table_bytes;
};

/* One layer's work items, or those of all layers of an exact cache. */
#define FKV_ITEMS_KEY 4
struct fkv_device_items {
    int64_t *
        key; /* [rows][FKV_ITEMS_KEY]: coded tiles, first and last entry, period; n_new is the plan's */
    int32_t count, outputs, slots;
    bool valid;
};

struct fkv_device_plan {
    struct fkv_device_buffer step; /* struct fkv_cuda_step, rows, positions */
    struct fkv_device_buffer
        items; /* [lists]: int32_t counts of what follows and 4 bytes, struct fkv_cuda_item [capacity],
                * struct fkv_cuda_wave [wave_capacity], struct fkv_cuda_output [output_capacity] */
    struct fkv_device_buffer rope, partials, counters, seals;
    int64_t rope_capacity, item_capacity, row_capacity;
    int32_t n_lists;
    struct fkv_device_items *lists;
    struct fkv_cuda_row *rows;
    int64_t n_rows, max_tokens;
    bool *ready; /* [layers]: pages are there for the step */
    bool captured;
    /* Fourier caches: what the waves of a slice of the step's query tokens take; see backend_cuda.h */
    struct fkv_device_buffer spectra, grids, stats, mass, maxima;
    int64_t wave_capacity, output_capacity;
    int64_t grid_stride, mass_stride, maxima_stride; /* floats of a wave; grid_stride: of a head */
    int32_t log_fft;
    int64_t from, until; /* the slice */
};

/* Fourier caches: a layer's tiles on their way into segments. */
struct fkv_folding {
    struct fkv_cuda_seal *jobs;
    struct fkv_device_page **pages; /* of kept channels; entries NULL where a layer has none */
    int64_t n, slots;
    struct fkv_cuda_fold *folds;
    struct fkv_device_page **segments; /* new ones; NULL where the old one serves */
    int64_t n_folds, fold_slots;
};

#define FKV_DEVICE_CHECK(ctx, error, what)                                                         \
    ((error) ? fkv_fail((ctx), FKV_ERR_DEVICE, "%s: %s", (what), (ctx)->cuda->text(error)) : FKV_OK)

/* pool.c */
struct fkv_device_page *fkv_device_page_new(struct fkv_cache_object *cache, struct fkv_seq *seq,
                                            int32_t pool);
struct fkv_device_page *fkv_device_page_share(struct fkv_cache_object *cache, struct fkv_seq *seq,
                                              struct fkv_device_page *page);
void fkv_device_page_drop(struct fkv_cache_object *cache, struct fkv_seq *seq,
                          struct fkv_device_page *page);
void fkv_device_pools_free(struct fkv_cache_object *cache);
/* Device memory on the cache's account; grows without keeping contents. */
fkv_status fkv_device_reserve(struct fkv_cache_object *cache, struct fkv_device_buffer *buffer,
                              size_t bytes);
void fkv_device_release(struct fkv_cache_object *cache, struct fkv_device_buffer *buffer);
/* Room in pinned memory for the next fkv_device_send(). */
fkv_status fkv_device_stage(struct fkv_cache_object *cache, size_t bytes, void **memory);
fkv_status fkv_device_send(struct fkv_cache_object *cache, uint64_t to, size_t bytes);
/* Room for the next transfers, of up to `bytes` each, and for so many notes of writes to tables: behind it they find
 * what memory they need. */
fkv_status fkv_device_ready(struct fkv_cache_object *cache, size_t bytes, int64_t patches);
/* Notes a write to a table; fkv_device_flush() sends what is noted. */
fkv_status fkv_device_patch(struct fkv_cache_object *cache, uint64_t where, uint64_t value,
                            uint64_t zero);
fkv_status fkv_device_flush(struct fkv_cache_object *cache);

/* layout.c */
fkv_status fkv_device_cache_new(struct fkv_cache_object *cache);
void fkv_device_cache_free(struct fkv_cache_object *cache);

/* sequence.c: what layer.c does for the CPU */
fkv_status fkv_device_seq_new(struct fkv_cache_object *cache, struct fkv_seq *seq);
void fkv_device_seq_free(struct fkv_cache_object *cache, struct fkv_seq *seq);
fkv_status fkv_device_seq_fork(struct fkv_cache_object *cache, const struct fkv_seq *parent,
                               struct fkv_seq *child);
void fkv_device_layer_crop(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                           int64_t tokens);
uint64_t fkv_device_shared_bytes(const struct fkv_cache_object *cache, const struct fkv_seq *seq);
/* Exact pages for `after` tokens of a layer, and a copy of the last one if it is shared. */
fkv_status fkv_device_layer_grow(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                                 int64_t after);
/* Table entries for so many tokens. */
fkv_status fkv_device_seq_slots(struct fkv_cache_object *cache, struct fkv_seq *seq,
                                int64_t tokens);
/* Gives back pages behind what the layer holds. */
void fkv_device_layer_shrink(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer);
int64_t fkv_device_tiles_to_code(const struct fkv_profile_object *profile, int64_t tokens);

/* step.c */
fkv_status fkv_device_plan_set(struct fkv_plan_object *plan, struct fkv_plan_object *next,
                               const fkv_batch *batch);
/* Once plan's rows are next's. */
fkv_status fkv_device_plan_finish(struct fkv_plan_object *plan);
void fkv_device_plan_end(struct fkv_plan_object *plan); /* waits for the cache's lock */
void fkv_device_plan_free(struct fkv_plan_object *plan);
fkv_status fkv_device_append(struct fkv_plan_object *plan, int layer, const struct fkv_view *q,
                             const struct fkv_view *k, const struct fkv_view *v,
                             const struct fkv_view *out, const struct fkv_view *lse);
fkv_status fkv_device_attend(struct fkv_plan_object *plan, int layer, const struct fkv_view *q,
                             const struct fkv_view *out, const struct fkv_view *lse, bool appended);
fkv_status fkv_device_replayed(struct fkv_plan_object *plan);
fkv_status fkv_device_read(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                           fkv_part part, int64_t first, int64_t count, const struct fkv_view *out);

/* items.c: the items of the slice of a step's query tokens */
fkv_status fkv_device_make_items(struct fkv_plan_object *plan, int layer);
/* Behind the last query token of a slice that begins with `from`: all of them unless waves take much memory. */
int64_t fkv_device_slice_end(const struct fkv_plan_object *plan, int layer, int64_t from);

/* spectrum.c: a period's tables */
fkv_status fkv_device_spectrum_new(struct fkv_cache_object *cache,
                                   struct fkv_shared_spectrum *shared);
void fkv_device_spectrum_free(struct fkv_cache_object *cache, struct fkv_shared_spectrum *shared);

/* fourier.c */
size_t fkv_device_split(const struct fkv_profile_object *profile, struct fkv_device_cache *device,
                        uint16_t *list);
size_t fkv_device_segment_bytes(const struct fkv_profile_object *profile,
                                const struct fkv_device_cache *device, int layer);
/* Table entries for the segments of so many tokens. */
fkv_status fkv_device_need_segments(struct fkv_cache_object *cache, struct fkv_seq *seq,
                                    int64_t tokens);
void fkv_device_drop_segments(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                              int64_t tiles);
void fkv_device_segments_free(struct fkv_cache_object *cache, struct fkv_seq *seq);
fkv_status fkv_device_segments_fork(struct fkv_cache_object *cache,
                                    const struct fkv_device_seq *from, struct fkv_seq *child);
uint64_t fkv_device_shared_segments(const struct fkv_cache_object *cache,
                                    const struct fkv_device_seq *s);
/* Room for what the step will code; nothing is changed if it fails. Then the launches and the books, and the end. */
fkv_status fkv_device_folding_begin(struct fkv_plan_object *plan, int layer, struct fkv_folding *f);
fkv_status fkv_device_folding_run(struct fkv_plan_object *plan, int layer,
                                  const struct fkv_cuda_attend *a, const struct fkv_folding *f);
/* For a step that came to nothing. */
void fkv_device_folding_undo(struct fkv_plan_object *plan, struct fkv_folding *f);
void fkv_device_folding_end(struct fkv_plan_object *plan, struct fkv_folding *f);
fkv_status fkv_device_read_fourier(struct fkv_cache_object *cache, struct fkv_seq *seq, int layer,
                                   fkv_part part, int64_t first, int64_t count,
                                   const struct fkv_cuda_view *out);

static inline struct fkv_device_page **fkv_device_entry(const struct fkv_device_seq *s, int layer,
                                                        int64_t entry) {
    return &s->pages[(int64_t)layer * s->slots + entry];
}
static inline size_t fkv_device_list_bytes(const struct fkv_device_plan *p) {
    return 16 + (size_t)p->item_capacity * sizeof(struct fkv_cuda_item) +
           (size_t)p->wave_capacity * sizeof(struct fkv_cuda_wave) +
           (size_t)p->output_capacity * sizeof(struct fkv_cuda_output);
}
static inline int64_t fkv_device_block_tiles(const struct fkv_device_cache *d) {
    return (int64_t)d->c.units_per_block * d->c.unit / FKV_TILE;
}

#endif /* FKV_DEVICE_DEVICE_H */
