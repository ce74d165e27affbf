/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The items of Fourier caches: ranges of tokens of one KV head for the query heads of one query token. A block's
 * eight warps take tiles: pages of kept channels, or exact ones, where all channels are kept. Tokens are the rows of
 * the matrix instructions and query heads their columns, as in attend_exact.cuh. Scores of coded channels are 8 taps
 * of the grid for each token, one more step of the matrix product whose factors are the taps; spreading weights on
 * the grid is one more panel of values, of which nothing is kept but the tile's own sums: they go to memory with the
 * tile's largest score.
 */
#include "attend_exact.cuh"
#include "fourier.cuh"

namespace fkv {

/* Shared memory; offsets in bytes. */
struct Room {
    int q, out, factors, warps, warp_bytes, stage, barriers, bytes;
};

struct Task {
    fkv_cuda_cache c;
    fkv_cuda_attend a;
    Room at;
    int panels; /* 16 channels of a warp's sums */
};

template <int H> inline Room lay_out(const fkv_cuda_cache &c) {
    const int panels = (c.dim + 15) / 16;
    Room r = {};
    r.q = r.out = 0;
    r.factors = H * panels * 16 * 4;
    r.warps = r.factors + panels * 32 * (int)sizeof(Factors<H>);
    r.warps = (r.warps + 127) / 128 * 128;
    r.stage = panels * 512;
    r.warp_bytes = r.stage + kStages * 2048;
    r.barriers = r.warps + kWarps * r.warp_bytes;
    r.bytes = r.barriers + kWarps * kStages * 8;
    return r;
}

/* What a block knows of its item. */
template <int H> struct Known {
    fkv_cuda_item item;
    fkv_cuda_row row;
    fkv_cuda_split split;
    fkv_cuda_spectrum spectrum;
    float norm[H], maxima[kWarps][H], sums[kWarps][H], top[H], total[H];
};

template <typename X> __device__ __forceinline__ void take_words(X *to, const X *from, int first) {
    const int i = (int)threadIdx.x - first;
    if (i >= 0 && i < (int)sizeof(X) / 4) {
        ((int *)to)[i] = __ldcg((const int *)from + i);
    }
}

/* The words of item i and of what it refers to. */
template <int H> __device__ void get_to_know(const Task &g, int i, Known<H> *known) {
    const fkv_cuda_item *item = (const fkv_cuda_item *)g.a.items + i;
    const fkv_cuda_row *row = (const fkv_cuda_row *)g.a.rows + __ldcg(&item->row);
    const int head = __ldcg(&item->head);
    take_words(&known->item, item, 0);
    take_words(&known->row, row, 32);
    take_words(&known->split,
               (const fkv_cuda_split *)g.c.splits + g.a.layer * g.c.n_kv_heads + head, 64);
    const fkv_cuda_spectrum *spectrum =
        (const fkv_cuda_spectrum *)__ldcg((const unsigned long long *)&row->spectrum);
    take_words(&known->spectrum, spectrum, 128);
}

/* The tiles of a warp, and their panels on the way through its shared memory. K's panels come before V's; the last of
 * each may be half a one. Tile i is number first + i * step of the item, which is an entry of the table from `base`
 * on; number 0 may be the sink page. */
struct Belt {
    char *memory;
    uint64_t *barriers;
    const uint64_t *table;
    size_t offset;
    int k_eighths, v_eighths;
    int first, step, base, sink, tiles;
    int lane;
    uint32_t issued, taken; /* since the launch's start */
    int tile, chunk;        /* to be issued next */

    __device__ __forceinline__ int k_chunks() const {
        return (k_eighths + 1) / 2;
    }
    __device__ __forceinline__ int chunks() const {
        return k_chunks() + (v_eighths + 1) / 2;
    }
    __device__ __forceinline__ const char *page(int i) const {
        const int number = first + i * step;
        return (const char *)table[sink && !number ? 0 : base + number] + offset;
    }
    /* Chunk i of a tile: where it begins, and its bytes. */
    __device__ __forceinline__ int begin(int i, int *bytes) const {
        const bool value = i >= k_chunks();
        const int within = (value ? i - k_chunks() : i) * 2048;
        *bytes = min(2048, (value ? v_eighths : k_eighths) * 1024 - within);
        return (value ? k_eighths * 1024 : 0) + within;
    }
    __device__ __forceinline__ void issue() {
        if (tile >= tiles || !chunks()) {
            return;
        }
#if FKV_BULK
        if (!lane) {
            int bytes;
            const char *from = page(tile) + begin(chunk, &bytes);
            bulk_copy(memory + issued % kStages * 2048, from, (uint32_t)bytes,
                      &barriers[issued % kStages]);
        }
#endif
        issued++;
        if (++chunk == chunks()) {
            chunk = 0;
            tile++;
        }
    }
    /* Chunk i of tile t; chunks are taken in order. */
    __device__ __forceinline__ const char *take(int t, int i) {
#if FKV_BULK
        barrier_wait(&barriers[taken % kStages], taken / kStages & 1);
        return memory + taken % kStages * 2048;
#else
        int bytes;
        return page(t) + begin(i, &bytes);
#endif
    }
    __device__ __forceinline__ void give_back() {
        taken++;
        __syncwarp();
        issue();
    }
    /* Into the second-level cache. */
    __device__ __forceinline__ void announce(int t) const {
        if (t < tiles && !lane && chunks()) {
            prefetch_block(page(t), (uint32_t)(k_eighths + v_eighths) * 1024);
        }
    }
};

/* A fragment of a chunk; of half a chunk in K and V the registers 0 and 1 or 0 and 2. */
__device__ __forceinline__ uint4 whole_fragment(const char *chunk, int i, int lane) {
    return ((const uint4 *)chunk)[i * 32 + lane];
}
template <int PART>
__device__ __forceinline__ uint4 half_fragment(const char *chunk, int i, int lane) {
    const uint2 x = ((const uint2 *)chunk)[i * 32 + lane];
    return PART ? make_uint4(x.x, 0, x.y, 0) : make_uint4(x.x, x.y, 0, 0);
}

/* What completes the scores of a segment's tiles, for a lane's columns. */
template <int H> struct Waves {
    const float *grid;          /* the lane's own head's */
    const uint4 *taps, *spread; /* the lane's */
    float *mass, *maxima;       /* of the item's first head */
    int64_t mass_stride;        /* floats from head to head */
    int maxima_stride;          /* the same */
    float unit[2];              /* of the lane's two columns */
    int each, rows, steps, q_count;
};

/* Four grid points of the lane, from `at` on, as factors. */
struct Points {
    float x[4];
};
__device__ __forceinline__ Points load_points(const float *grid, int at) {
    return {{grid[at], grid[at + 1], grid[at + 8], grid[at + 9]}};
}

/* s := s * by + taps * grid */
template <int H>
__device__ __forceinline__ void add_grid(float (&s)[4][4], const Waves<H> &w, const float (&by)[2],
                                         int at, const Points &first, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            s[i][j] *= by[j % 2];
        }
    }
    for (int step = 0; step < w.steps; step++) {
        const Points p = step ? load_points(w.grid, at + step * 16) : first;
        Factors<H> f;
        split<__half, H>(f, p.x[0], p.x[1], p.x[2], p.x[3], H == 4 && lane >= 16);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 *tap = w.taps + (step * 4 + i) * 64;
            multiply<__half, H>(s[i], __ldg(tap), f);
            multiply<__half, H>(s[i], __ldg(tap + 32), f);
        }
    }
}

/* The tile's weights on the grid, and its largest score. */
template <typename T, int H>
__device__ __forceinline__ void
spread_weights(const Waves<H> &w, int local, const Factors<H> (&p)[4], const Running &r, int lane) {
    const int column = lane % 4 * 2;
    const bool writes = H == 8 || lane % 4 < 2;
    for (int step = 0; step < w.steps; step++) {
        float acc[4] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 *by = w.spread + (step * 4 + i) * 64;
            multiply<T, H>(acc, __ldg(by), p[i]);
            multiply<T, H>(acc, __ldg(by + 32), p[i]);
        }
        if (H == 4) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                acc[j] += __shfl_xor_sync(~0u, acc[j], 2);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int head = column + j % 2, row = step * 16 + lane / 4 + j / 2 * 8;
            if (writes && head < w.q_count && row < w.rows) {
                w.mass[head * w.mass_stride + (int64_t)local * w.rows + row] = acc[j];
            }
        }
    }
    if (writes && lane < 4) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (column + j < w.q_count) {
                w.maxima[(column + j) * w.maxima_stride + local] = r.max[j];
            }
        }
    }
}

/* One tile: `visible` of its tokens. f: what a sum of products of factors stands for. */
template <typename T, int H, bool WAVES>
__device__ __forceinline__ void one_tile(Belt &belt, int t, const Factors<H> *q,
                                         const float (&f)[2], const Waves<H> &w, int local,
                                         const Points &points, int visible, Running &r, float4 *o) {
    const int lane = belt.lane;
    const float none[2] = {0.0f, 0.0f};
    float s[4][4] = {};
    int chunk = 0;
    for (int i = 0; i < belt.k_eighths / 2; i++, chunk++) {
        const char *panel = belt.take(t, chunk);
        const Factors<H> b = q[i * 32 + lane];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            multiply<T, H>(s[j], whole_fragment(panel, j, lane), b);
        }
        belt.give_back();
    }
    if (belt.k_eighths % 2) {
        const char *panel = belt.take(t, chunk++);
        const Factors<H> b = q[belt.k_eighths / 2 * 32 + lane];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            multiply<T, H>(s[j], half_fragment<0>(panel, j, lane), b);
        }
        belt.give_back();
    }
    float alpha[2], sums[2];
    Factors<H> p[4];
    if (WAVES) {
        const float by[2] = {__fdividef(f[0], w.unit[0]), __fdividef(f[1], w.unit[1])};
        add_grid<H>(s, w, by, local * w.each, points, lane);
        soften<T, 4, H>(s, w.unit, none, visible, lane, r, alpha, sums, p);
        spread_weights<T, H>(w, local, p, r, lane);
    } else {
        soften<T, 4, H>(s, f, none, visible, lane, r, alpha, sums, p);
    }
    const int panels = (belt.v_eighths + 1) / 2;
    for (int i = 0; i < panels; i++, chunk++) {
        const char *panel = belt.take(t, chunk);
        const bool half = i * 2 + 1 == belt.v_eighths;
        float acc[4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            multiply<T, H>(acc,
                           half ? half_fragment<1>(panel, j, lane) : whole_fragment(panel, j, lane),
                           p[j]);
        }
        belt.give_back();
        gather(&o[i * 32 + lane], alpha, acc, 1.0f, 1.0f, none, none);
    }
}

/* ---- queries */

template <int DTYPE, int H> __device__ void turn_query(const Task &g, const Known<H> &k, float *q) {
    const int padded = g.panels * 16;
    const float *rope =
        (const float *)g.a.rope + k.row.rope_offset + k.row.base + k.item.query - k.row.rope_first;
    for (int i = threadIdx.x; i < H * padded; i += kThreads) {
        const int h = i / padded, d = i % padded;
        float x = 0.0f;
        if (h < k.item.q_count && d < g.c.dim) {
            const char *from = row_at(g.a.q, k.row.offset + k.item.query,
                                      k.item.head * g.c.group + k.item.q_first + h);
            x = rotated(g.c, from, DTYPE, d, rope, g.a.rope_capacity) * (g.c.scale * kLog2e);
        }
        q[i] = x;
    }
}

/* The query's elements, then what a factor of 1 stands for, then factors: all channels, or K's kept ones. */
template <typename T, int H>
__device__ void prepare_query(const Task &g, Known<H> *k, float *q, Factors<H> *factors) {
    const int padded = g.panels * 16, warp = threadIdx.x / 32, own = threadIdx.x % 32;
    switch (g.a.q.dtype) {
    case FKV_F32:
        turn_query<FKV_F32, H>(g, *k, q);
        break;
    case FKV_F16:
        turn_query<FKV_F16, H>(g, *k, q);
        break;
    default:
        turn_query<FKV_BF16, H>(g, *k, q);
    }
    __syncthreads();
    for (int h = warp; h < H; h += kWarps) {
        float most = 0.0f;
        for (int d = own; d < padded; d += 32) {
            most = fmaxf(most, fabsf(q[h * padded + d]));
        }
        for (int i = 16; i; i /= 2) {
            most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
        }
        if (!own) {
            k->norm[h] = power2(exponent(most) - kQBits);
        }
    }
    __syncthreads();
    const uint16_t *list = (const uint16_t *)g.c.channels + k->split.list[0];
    const int n = k->item.coded ? k->split.kept[0] : g.c.dim;
    for (int i = threadIdx.x; i < (n + 15) / 16 * 32; i += kThreads) {
        const int lane = i % 32, head = H == 4 ? lane / 4 % 4 : lane / 4;
        const float by = 1.0f / k->norm[head];
        float x[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int at = i / 32 * 16 + lane % 4 * 2 + j % 2 + j / 2 * 8;
            const int d = k->item.coded && at < n ? list[at] : at;
            x[j] = at < n ? q[head * padded + d] * by : 0.0f;
        }
        split<T, H>(factors[i], x[0], x[1], x[2], x[3], H == 4 && lane / 4 >= 4);
    }
    __syncthreads();
}

/* ---- items */

/* Tokens behind which the item's query sees nothing. */
template <int H> __device__ __forceinline__ int visible_end(const Task &g, const Known<H> &k) {
    return g.a.appended ? k.row.base + k.item.query + 1 : k.row.base;
}

template <int H> __device__ void begin_belt(const Task &g, const Known<H> &k, Belt *b) {
    const int warp = threadIdx.x / 32, seen = visible_end(g, k) - g.c.sinks;
    const int body = (seen + 63) / 64; /* tiles, at least in part */
    b->table = (const uint64_t *)k.row.table + g.a.layer * k.row.slots;
    b->tile = b->chunk = 0;
    if (k.item.coded) {
        const int count = max(0, min(k.item.count, body - k.item.first));
        b->first = k.item.first + count * warp / kWarps;
        b->tiles = k.item.first + count * (warp + 1) / kWarps - b->first;
        b->step = b->base = 1;
        b->sink = 0;
        b->offset = k.split.offset;
        b->k_eighths = k.split.eighths[0];
        b->v_eighths = k.split.eighths[1];
    } else {
        /* the item's `first` is an entry of the table, that of tile first - 1 */
        const int tiles = max(0, body - (k.item.first - 1));
        const int count = min(k.item.count, k.item.sink + min(tiles, k.item.count - k.item.sink));
        b->sink = k.item.sink;
        b->first = warp;
        b->step = kWarps;
        b->tiles = (count - warp + kWarps - 1) / kWarps;
        b->offset = (size_t)k.item.head * g.panels * 4096;
        b->k_eighths = b->v_eighths = g.panels * 2;
        b->base = k.item.first - k.item.sink;
    }
}

template <typename T, int H>
__device__ void exact_tiles(const Task &g, const Known<H> &k, Belt &belt, const Factors<H> *q,
                            Running &r, float4 *o) {
    const int visible = visible_end(g, k), column = H == 4 ? belt.lane * 2 % 4 : belt.lane * 2 % 8;
    const float f[2] = {k.norm[column], k.norm[column + 1]};
    const Waves<H> nothing = {};
    for (int i = 0; i < belt.tiles; i++) {
        const int page = belt.first + i * belt.step; /* of the item */
        const bool sink = belt.sink && !page;
        const int first = sink ? 0 : g.c.sinks + (k.item.first - 1 + page - belt.sink) * 64;
        one_tile<T, H, false>(belt, i, q, f, nothing, 0, Points(),
                              min(visible - first, sink ? g.c.sinks : 64), r, o);
    }
}

template <int H>
__device__ Waves<H> waves_of(const Task &g, const Known<H> &k, int segment, int lane) {
    const fkv_cuda_spectrum &sp = k.spectrum;
    const int64_t index = k.item.wave + segment;
    const fkv_cuda_wave wave = ((const fkv_cuda_wave *)g.a.waves)[index];
    const int first = k.item.head * g.c.group + k.item.q_first;
    const int64_t row = index * g.c.n_q_heads + first;
    const int own = min(H == 4 ? lane / 4 % 4 : lane / 4, k.item.q_count - 1);
    const int column = H == 4 ? lane * 2 % 4 : lane * 2 % 8;
    Waves<H> w;
    w.grid = (const float *)g.a.grids + (row + own) * g.a.grid_stride + lane % 4 * 2;
    w.taps = (const uint4 *)sp.taps + lane;
    w.spread = (const uint4 *)sp.spread + lane;
    w.mass_stride = (int64_t)sp.per_segment * sp.rows;
    w.mass = (float *)g.a.mass + wave.mass + first * w.mass_stride;
    w.maxima_stride = sp.per_segment;
    w.maxima = (float *)g.a.maxima + wave.maxima + (int64_t)first * sp.per_segment;
    for (int j = 0; j < 2; j++) {
        const int h = min(column + j, k.item.q_count - 1);
        w.unit[j] = ((const float *)g.a.stats)[(row + h) * 4];
    }
    w.each = 64 / sp.cell;
    w.rows = sp.rows;
    w.steps = (sp.points + 15) / 16;
    w.q_count = k.item.q_count;
    return w;
}

template <typename T, int H>
__device__ void coded_tiles(const Task &g, const Known<H> &k, Belt &belt, const Factors<H> *q,
                            Running &r, float4 *o) {
    const int visible = visible_end(g, k) - g.c.sinks;
    const int column = H == 4 ? belt.lane * 2 % 4 : belt.lane * 2 % 8;
    const float f[2] = {k.norm[column], k.norm[column + 1]};
    for (int i = 0; i < belt.tiles;) {
        const int segment = (belt.first + i) / k.spectrum.per_segment;
        const int begin = segment * k.spectrum.per_segment;
        const int end = min(belt.tiles, begin + k.spectrum.per_segment - belt.first);
        const Waves<H> w = waves_of<H>(g, k, segment, belt.lane);
        Points points = load_points(w.grid, (belt.first + i - begin) * w.each);
        for (; i < end; i++) {
            const int tile = belt.first + i, local = tile - begin;
            const Points now = points;
            belt.announce(i + 2);
            if (i + 1 < end) {
                points = load_points(w.grid, (local + 1) * w.each);
            }
            one_tile<T, H, true>(belt, i, q, f, w, local, now, min(visible - tile * 64, 64), r, o);
        }
    }
}

/* ---- the ends of items */

template <int H> __device__ float sum_of_warp(const float4 *o, int row, int head) {
    const float *x = (const float *)(o + row / 16 * 32 + row % 8 * 4) + row % 16 / 8 * 2;
    const float y = x[head / 2 * 4 + head % 2];
    return H == 4 ? y + x[(head + 4) / 2 * 4 + head % 2] : y;
}

/* Adds the warps up, in order, and writes the partial result. */
template <int H> __device__ void end_task(const Task &g, Known<H> *k, char *memory) {
    const int padded = g.panels * 16, stride = FKV_CUDA_PARTIAL(g.c.dim);
    const int group = min(g.c.group, FKV_CUDA_MAX_GROUP);
    float *out = (float *)(memory + g.at.out);
    if (threadIdx.x < H) {
        float top = kNothing, sum = 0.0f;
        for (int w = 0; w < kWarps; w++) {
            top = fmaxf(top, k->maxima[w][threadIdx.x]);
        }
        for (int w = 0; w < kWarps; w++) {
            const float share = fast_exp2(k->maxima[w][threadIdx.x] - top);
            k->maxima[w][threadIdx.x] = share;
            sum = fmaf(k->sums[w][threadIdx.x], share, sum);
        }
        k->top[threadIdx.x] = top;
        k->total[threadIdx.x] = sum;
    }
    for (int i = threadIdx.x; i < H * padded; i += kThreads) {
        out[i] = 0.0f;
    }
    __syncthreads();
    const uint16_t *list = (const uint16_t *)g.c.channels + k->split.list[1];
    const int rows = k->item.coded ? k->split.kept[1] : g.c.dim;
    for (int i = threadIdx.x; i < rows * H; i += kThreads) {
        const int row = i / H, h = i % H;
        float sum = 0.0f;
        for (int w = 0; w < kWarps; w++) {
            const float4 *o = (const float4 *)(memory + g.at.warps + w * g.at.warp_bytes);
            sum = fmaf(sum_of_warp<H>(o, row, h), k->maxima[w][h], sum);
        }
        out[h * padded + (k->item.coded ? list[row] : row)] = sum;
    }
    __syncthreads();
    float *part = (float *)g.a.partials + (size_t)(k->item.slot + k->item.part) * group * stride;
    for (int i = threadIdx.x; i < k->item.q_count * g.c.dim; i += kThreads) {
        const int h = i / g.c.dim, d = i % g.c.dim;
        part[h * stride + d] = out[h * padded + d];
    }
    if ((int)threadIdx.x < k->item.q_count) {
        part[threadIdx.x * stride + g.c.dim] = k->top[threadIdx.x];
        part[threadIdx.x * stride + g.c.dim + 1] = k->total[threadIdx.x];
    }
}

template <typename T, int H>
__global__ __launch_bounds__(kThreads, 2) void items_kernel(const __grid_constant__ Task g) {
    extern __shared__ __align__(128) char memory[];
    __shared__ Known<H> known;
    __shared__ int taken;
    const int n_items = *(const int *)g.a.n_items, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    char *own = memory + g.at.warps + warp * g.at.warp_bytes;
    Belt belt = {};
    belt.memory = own + g.at.stage;
    belt.barriers = (uint64_t *)(memory + g.at.barriers) + warp * kStages;
    belt.lane = lane;
    bool waited = false;
    release_launch();
#if FKV_BULK
    if (threadIdx.x < kWarps * kStages) {
        barrier_init((uint64_t *)(memory + g.at.barriers) + threadIdx.x);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    for (int i = blockIdx.x; i < n_items; i = taken) {
        __syncthreads();
        get_to_know<H>(g, i, &known);
        if (!threadIdx.x) {
            /* one for every item altogether; who draws the last sets the counter back */
            unsigned *counter = (unsigned *)g.a.counters;
            const unsigned drawn = atomicAdd(counter, 1u);
            if (drawn == (unsigned)n_items - 1) {
                *counter = 0;
            }
            taken = (int)(gridDim.x + drawn);
        }
        for (int j = lane; j < g.panels * 32; j += 32) {
            ((float4 *)own)[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        __syncthreads();
        begin_belt<H>(g, known, &belt);
        /* codes are there already; exact pages may still be written to by the append in front */
        if (known.item.coded && !waited) {
            for (int j = 0; j < kStages; j++) {
                belt.issue();
            }
            belt.announce(1);
            belt.announce(2);
        }
        Factors<H> *factors = (Factors<H> *)(memory + g.at.factors);
        prepare_query<T, H>(g, &known, (float *)(memory + g.at.q), factors);
        const bool early = known.item.coded && !waited;
        if (!waited) {
            await_launch();
            waited = true;
        }
        if (!early) {
            for (int j = 0; j < kStages; j++) {
                belt.issue();
            }
        }
        Running r = {{kLowest, kLowest}, {0.0f, 0.0f}};
        if (known.item.coded) {
            coded_tiles<T, H>(g, known, belt, factors, r, (float4 *)own);
        } else {
            exact_tiles<T, H>(g, known, belt, factors, r, (float4 *)own);
        }
        if (lane < H / 2) {
            for (int j = 0; j < 2; j++) {
                known.maxima[warp][lane * 2 + j] = r.max[j];
                known.sums[warp][lane * 2 + j] = r.sum[j];
            }
        }
        __syncthreads();
        end_task<H>(g, &known, memory);
    }
    if (!waited) {
        await_launch(); /* who waits for this launch waits for those in front of it */
    }
}

template <typename T, int H>
cudaError_t launch_items(const fkv_cuda_cache &c, const fkv_cuda_attend &a, cudaStream_t stream) {
    const Task g = {c, a, lay_out<H>(c), (c.dim + 15) / 16};
    static int allowed[64]; /* by device; the attribute may be set twice, that is harmless */
    int device;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess && (device >= 64 || allowed[device] < g.at.bytes)) {
        e = cudaFuncSetAttribute(items_kernel<T, H>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 g.at.bytes);
        if (e == cudaSuccess && device < 64) {
            allowed[device] = g.at.bytes;
        }
    }
    const bool early = a.follows || a.n_waves;
    return e == cudaSuccess ? launch_early(items_kernel<T, H>, a.grid, kThreads, (size_t)g.at.bytes,
                                           early, stream, g)
                            : e;
}

} // namespace fkv

cudaError_t fkv_cuda_fourier_items_launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a,
                                          cudaStream_t stream) {
    using namespace fkv;
    if (c.dtype == FKV_F16) {
        return c.group <= 4 ? launch_items<__half, 4>(c, a, stream)
                            : launch_items<__half, 8>(c, a, stream);
    }
    return c.group <= 4 ? launch_items<__nv_bfloat16, 4>(c, a, stream)
                        : launch_items<__nv_bfloat16, 8>(c, a, stream);
}
