/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What libfkv and the module libfkv-cuda say to each other: plain structs and one table of functions. The only
 * header of libfkv/ that cuda/ includes. The module computes and launches; it owns no books. Addresses of the
 * device are uint64_t on the host's side.
 *
 * How tokens lie on the device. A fragment is what the 32 lanes of a warp hold of a 16 x 16 matrix of 16-bit
 * elements for one matrix instruction: lane l has rows l / 4 and l / 4 + 8 and columns 2 (l % 4), + 1, and these
 * + 8. So element (r, c) is in lane 4 (r % 8) + c % 8 / 2, register r / 8 + 2 (c / 8), half c % 2.
 *
 *   exact page   for each KV head K [D / 16][64 / 16], then V [D / 16][64 / 16] fragments of 512 bytes, 16 for
 *                each lane; D rounded up to 16. Rows and columns are (token, channel) in K, (channel, token) in V
 *   unit         the tokens that share scales, 64 or 128; a block of the coding is one or more units. For each KV
 *                head its K, then its V, each part a multiple of 16 bytes:
 *                  codes: panels of 16 planes, a plane being two bits of a channel's codes
 *                  exact channels: panels of 16, as fragments like those of pages
 *                  K: scales [planes], zero points [planes], f16; V: (scale, zero point) [planes]. Zero points stand
 *                    at a channel's first plane, 0 at the others
 *                  K: the exponent of the largest scale * 4^(index of the channel's last plane), int32; 12 bytes of
 *                    padding
 *   order        tokens of a unit are taken in this order, in codes and exact channels: those of the first half from
 *                the middle backwards, then those of the second. Below, token n is number n of the order
 *   codes        lie so that a word with one of four masks is a register of a matrix instruction of 8-bit integers:
 *                what the mask leaves are four codes times 1, 4, 16 or 64. A lane's words of a panel lie together;
 *                bits 8 b + 2 p of a word hold, with g = lane / 4, t = lane % 4:
 *                  K, panels 2 i and 2 i + 1 as one: words [unit / 64][lane][r], tile j is 16 tokens:
 *                    plane 16 (r / 2) + 4 t + b, token g + 8 (r % 2) of tile 4 j + p, word (j, lane, r)
 *                  K, a last panel without another: words [lane][unit / 64][r], r < 2:
 *                    plane 4 t + b, token g + 8 r of tile 4 j + p
 *                  V, a panel: words [lane][unit / 64][h], s = word / 2, h = word % 2:
 *                    plane g + 8 (p % 2), token 2 t + b / 2 + 8 (b % 2) of tile 2 (s + p / 2 * unit / 64) + h
 *   table        of a sequence, uint64_t [layers][slots]: the sink page, then for each tile of the body its exact
 *                page, or at the first tile of a block the block, or of a coded tile its kept channels
 *
 * Fourier caches:
 *   kept page    for each KV head the kept channels of K, then of V, of a tile, as panels of 16 channels: fragments
 *                [64 / 16] as in exact pages. A last panel of up to 8 channels is half as long: lanes have 8 bytes of
 *                each fragment, registers 0 and 1 in K, 0 and 2 in V
 *   segment      coefficients [coded rows of the layer][stride] in their type, at the next multiple of 16 bytes
 *                float ones[stride], then struct fkv_cuda_state [coded rows]
 *   table        of segments, uint64_t [layers][segment_slots]
 */
#ifndef FKV_BACKEND_CUDA_H
#define FKV_BACKEND_CUDA_H

#include <stddef.h>
#include <stdint.h>

#define FKV_MODULE_ABI 3u
#define FKV_MODULE_ENTRY "fkv_cuda_module"
#define FKV_SPAN 8            /* units that share the carriers' weights */
#define FKV_CUDA_CHEBYSHEV 16 /* polynomials for the slow pairs of a span */
#define FKV_CUDA_MAX_GROUP 8  /* query heads that one work item serves */
/* floats of a partial result: rows stay aligned to 16 bytes */
#define FKV_CUDA_PARTIAL(dim) ((dim) + 4)
#define FKV_CUDA_NO_CHANNEL -1 /* a plane that fills up a panel */

/* A plane of two bits, or an exact channel. */
struct fkv_plane {
    int16_t channel;
    int16_t index; /* 0: the lowest two bits */
};

/* A channel that has codes, for coding: its carrier is u cos + w sin of the angle of a pair. */
struct fkv_cuda_channel {
    int16_t number, first; /* first: its first plane in its part */
    int16_t pair, bits;    /* pair: rope_dim / 2 for those that do not turn */
    float u, w;
};

/* One KV head of one layer. */
struct fkv_cuda_head {
    int32_t k_steps, v_steps, k_exact, v_exact; /* panels */
    int32_t offset, bytes, k_bytes;             /* within a unit; k_bytes of K come first */
    int32_t k_planes, v_planes;                 /* first entries in the cache's list of planes; */
    int32_t k_exacts, v_exacts;                 /* and of exact channels */
    int32_t carried;                            /* K has carriers */
    int32_t k_channels, v_channels;             /* that have codes */
    int32_t unit_bytes;                         /* of the layer: all heads of a unit */
};

/* Values of fkv_cuda_cache.coded */
#define FKV_CUDA_EXACT 0
#define FKV_CUDA_CALIBRATED 1
#define FKV_CUDA_FOURIER 2

/* One KV head of one layer of a Fourier cache; K and V. */
struct fkv_cuda_split {
    int32_t kept[2], coded[2]; /* channels */
    int32_t eighths[2];        /* kept ones, in eights */
    int32_t offset, bytes;     /* in a kept page */
    int32_t
        list[2]; /* first entry of its channels in the cache's list: kept ones, then coded ones */
    int32_t row[2]; /* first coefficient row in a segment */
};

/* One coded channel in a segment; see struct fkv_channel_state. */
struct fkv_cuda_state {
    double sum;
    float reference, beta, offset, padding;
};

/* Tables of a period; at the start of its buffer on the device. See codec/spectrum.h: everything is as there but
 * the transforms, whose length is a power of two and whose results are in bit-reversed order. */
struct fkv_cuda_spectrum {
    int64_t period;
    int32_t bins, padded, stride, per_segment; /* per_segment: tiles */
    int32_t cell, grid;
    int32_t points, rows; /* grid points that a tile touches; room for them, a multiple of 8 */
    int32_t log_fft, direct;
    uint64_t panel;    /* float [64][stride] */
    uint64_t weight;   /* float [stride] */
    uint64_t pre;      /* float2 [bins] */
    uint64_t post;     /* float2 [grid], unless direct */
    uint64_t kernel;   /* float2 [fft], bit-reversed, unless direct */
    uint64_t twiddles; /* float2 [fft / 2]: e^(-2 pi i k / fft) */
    uint64_t
        taps; /* fragments [(points + 15) / 16][4][2], f16: (token, point), high and low parts */
    uint64_t spread; /* the same, (point, token), in the storage type */
};

/* Geometry and tables of a cache; constant. Addresses are of the device. */
struct fkv_cuda_cache {
    int32_t n_layers, n_q_heads, n_kv_heads, group, dim,
        dtype; /* dtype: fkv_dtype_code of exact tokens */
    int32_t rope_layout, rope_dim;
    int32_t coded, unit, units_per_block, sinks;
    int32_t
        fast; /* pairs whose carriers are held as cosines, a multiple of 8; the others are polynomials */
    int32_t panels; /* most V panels of a head, exact ones included, for sizes; */
    int32_t most_k_planes, most_k_exacts; /* and of K's planes and exact channels, with padding */
    int32_t most_bytes;                   /* of a head's unit */
    float scale;                          /* softmax scale */
    double rope_scaling;
    int32_t coefficients, padding; /* fkv_dtype_code of Fourier coefficients */
    uint64_t splits;               /* struct fkv_cuda_split [layers][Hk] */
    uint64_t channels;             /* uint16_t [], see fkv_cuda_split.list */
    uint64_t inv_freq;             /* double [rope_dim / 2] */
    uint64_t heads;                /* struct fkv_cuda_head [layers][Hk] */
    uint64_t planes;               /* struct fkv_plane [] */
    uint64_t unit_bytes;           /* int32_t [layers] */
    uint64_t carriers;             /* float [layers][2][Hk][D] */
    uint64_t
        coded_channels; /* struct fkv_cuda_channel [layers][2][Hk][D]: those with codes first, as their planes */
    uint64_t kinds; /* uint8_t [layers][2][Hk][D]: 1 for channels of 3 bits, 2 for exact ones */
    uint64_t
        basis; /* fragments [2][fast / 16 + 1][unit / 32][2], f16: functions of the distance j + 1/2 from the
                       unit's middle, even ones, then odd ones, high and low parts: cosines or sines of the fast
                       pairs, then 8 even or odd polynomials */
    uint64_t
        sections; /* fragments [FKV_SPAN][2], f16: polynomials of the span in those of its units: rows are 8 even
                          and 8 odd ones of the unit */
    uint64_t
        turns; /* float2 [FKV_SPAN][fast]: cos and sin of w_j times the middle of unit i of a span */
    uint64_t
        project; /* fragments [(pairs - fast) / 8][2], f16: high and low parts of what slow pairs give to the
                         polynomials; columns are (cos, sin) of a pair */
};

/* A sequence in a step. */
struct fkv_cuda_row {
    uint64_t table;
    int64_t slots;
    int32_t base, n_new, offset;     /* as struct fkv_row */
    int32_t rope_first, rope_offset; /* token of its first entry in the rope table; where that is */
    int32_t segment_slots;           /* Fourier caches: */
    uint64_t segments, spectrum;
};

/* A piece of work: one query token, one KV head (or some of its query heads), a range of what it sees. */
struct fkv_cuda_item {
    int32_t row, head, query;
    int32_t q_first, q_count; /* query heads of the group */
    int32_t first, count;     /* units if coded, else table entries */
    int32_t coded;
    int32_t part, parts; /* number among the pieces of one output, and how many there are */
    int32_t output;      /* number of the output: its first partial is at `slot` */
    int32_t slot;
    int32_t sink; /* 1: the range begins with the sink page, and `first` is the entry behind it */
    int32_t wave; /* Fourier caches: the wave of the query's first segment */
};

/* Fourier caches: a query token and a segment that it sees. Its tiles' masses are float [Hq][per_segment][rows] from
 * `mass` on, their largest scores float [Hq][per_segment] from `maxima` on. */
struct fkv_cuda_wave {
    int32_t row, query, segment, tiles;
    int64_t mass, maxima;
};

/* Fourier caches: what becomes of the items and waves of one query token and KV head. */
struct fkv_cuda_output {
    int32_t row, query, head, q_first, q_count;
    int32_t slot, parts; /* partial results of items */
    int32_t wave, waves;
    int32_t padding;
};

/* Tiles that are folded into a segment. */
struct fkv_cuda_fold {
    uint64_t segment;
    int32_t row, tile;    /* first tile of the body */
    int32_t local, count; /* its number in the segment, and how many */
};

/* What a step's kernels read; at the start of the plan's buffer on the device. */
struct fkv_cuda_step {
    int32_t n_rows, tokens;
    int32_t rope_tokens; /* entries of the rope table */
    int32_t padding;
};

struct fkv_cuda_patch {
    uint64_t where, value; /* *where = value, */
    uint64_t zero;         /* then `zero` bytes at value are cleared */
};

struct fkv_cuda_view {
    uint64_t data;
    int64_t token_stride, head_stride;
    int32_t dtype, present;
};

struct fkv_cuda_seal {
    int32_t row, tile; /* first tile of the block */
    uint64_t block;
};

/* Arguments of attention; addresses of the plan's buffers. */
struct fkv_cuda_attend {
    uint64_t step, rows, items; /* items of this layer */
    uint64_t n_items;           /* int32_t, on the device */
    uint64_t rope;              /* float [2][pairs][rope_capacity] */
    uint64_t
        partials; /* float [slots][group][FKV_CUDA_PARTIAL(D)]: sums, largest score, sum of weights */
    uint64_t counters; /* uint32_t: items taken, then [outputs] parts done; zero between launches */
    int64_t rope_capacity;
    int32_t layer, appended;
    int32_t grid;
    int32_t longest, n_rows; /* append: new tokens of a sequence at most, if that is many; else 0 */
    int32_t follows;         /* attention: the launch before it is the append of the same tokens */
    struct fkv_cuda_view q, out, lse;
    /* Fourier caches. Behind n_items: the numbers of waves and of outputs. */
    uint64_t waves, outputs;
    uint64_t spectra; /* float [waves][Hq][spectrum_stride] */
    uint64_t grids;   /* float [waves][Hq][grid_stride] */
    uint64_t stats; /* float [waves][Hq][4]: unit of the grid; largest score, sum, sum over ones */
    uint64_t mass, maxima; /* see struct fkv_cuda_wave */
    int64_t spectrum_stride, grid_stride;
    int32_t n_waves, n_outputs; /* as many as a replay may have */
    int32_t coded_rows;         /* of the layer */
    int32_t log_fft, tiles;     /* longest transform, most tiles of a wave */
    int32_t padding;
};

struct fkv_cuda_info {
    int32_t device, multiprocessors;
    int32_t major, minor;
    char name[128];
};

/* Functions return 0, or a number whose text fkv_cuda_ops.text() gives. */
struct fkv_cuda_ops {
    uint32_t struct_size, abi;
    const char *version;
    int (*open)(int device, struct fkv_cuda_info *info);
    const char *(*text)(int error);
    int (*alloc)(int device, size_t bytes, uint64_t *address); /* cleared */
    int (*free)(int device, uint64_t address);
    int (*alloc_host)(int device, size_t bytes, void **pointer);
    int (*free_host)(int device, void *pointer);
    int (*upload)(int device, uint64_t to, const void *from, size_t bytes, void *stream);
    int (*copy)(int device, uint64_t to, uint64_t from, size_t bytes, void *stream);
    int (*synchronize)(int device, void *stream);
    int (*stream_device)(void *stream, int *device);
    int (*capturing)(int device, void *stream, int *yes);
    /* whether memory is the device's: 1; another's: 0 */
    int (*owns)(int device, uint64_t address, int *yes);
    int (*event_create)(int device, void **event);
    int (*event_destroy)(int device, void *event);
    int (*event_record)(int device, void *event, void *stream);
    int (*event_wait)(int device, void *event); /* by the host */

    int (*patch)(int device, uint64_t patches, int count, void *stream);
    /* positions: int32_t [tokens] */
    int (*rope)(int device, const struct fkv_cuda_cache *c, uint64_t positions, int tokens,
                uint64_t rope, int64_t capacity, void *stream);
    /* max_tokens: the most that a replay of a captured launch may see */
    int (*append)(int device, const struct fkv_cuda_cache *c, const struct fkv_cuda_attend *a,
                  const struct fkv_cuda_view *k, const struct fkv_cuda_view *v, int max_tokens,
                  void *stream);
    int (*attend)(int device, const struct fkv_cuda_cache *c, const struct fkv_cuda_attend *a,
                  void *stream);
    int (*seal)(int device, const struct fkv_cuda_cache *c, const struct fkv_cuda_attend *a,
                uint64_t seals, int count, void *stream);
    /* Reads back tokens [first, first + count) of K (part 0) or V; `coded` tiles of the body are. */
    int (*read)(int device, const struct fkv_cuda_cache *c, uint64_t table, int64_t slots,
                int layer, int part, int64_t coded, int64_t first, int64_t count,
                const struct fkv_cuda_view *out, void *stream);
    /* Fourier caches: copies kept channels (struct fkv_cuda_seal, block is the kept page), folds the others */
    int (*fold)(int device, const struct fkv_cuda_cache *c, const struct fkv_cuda_attend *a,
                uint64_t seals, int n_seals, uint64_t folds, int n_folds, int most_bins,
                void *stream);
    int (*read_fourier)(int device, const struct fkv_cuda_cache *c, const struct fkv_cuda_row *row,
                        int layer, int part, int coded_rows, int64_t coded, int64_t first,
                        int64_t count, const struct fkv_cuda_view *out, void *stream);
};

/* FKV_MODULE_ABI and, as a guard against builds of different days, the size of what is passed. */
#define FKV_MODULE_HANDSHAKE                                                                       \
    (FKV_MODULE_ABI * 16777216u + (uint32_t)sizeof(struct fkv_cuda_cache) * 4096u +                \
     (uint32_t)(sizeof(struct fkv_cuda_attend) + sizeof(struct fkv_cuda_item) * 7 +                \
                sizeof(struct fkv_cuda_head) * 3 + sizeof(struct fkv_cuda_row)))

/* The module's only symbol. */
typedef const struct fkv_cuda_ops *(*fkv_cuda_module_fn)(uint32_t handshake, const char *version);

#endif /* FKV_BACKEND_CUDA_H */
