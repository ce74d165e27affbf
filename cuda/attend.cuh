/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What all parts of attention share. Tokens are the rows of the matrix instructions, query heads their eight
 * columns; factors are split into a high and a low part, so that operands of few bits lose nothing that matters.
 * Scores are in units of log2, weights and all sums of them are times 2^kPBits.
 */
#ifndef FKV_CUDA_ATTEND_CUH
#define FKV_CUDA_ATTEND_CUH

#include "common.cuh"

namespace fkv {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLowest = -1e30f; /* stands for -infinity where differences are taken */
constexpr int kMergeGroups = 4;   /* of threads, when parts of an output are added */
constexpr int kPBits = 10;        /* low parts of weights are normal numbers of f16 */
constexpr int kQBits = 12;        /* queries' factors are 2^12 at most, */
constexpr int kWBits = 14;        /* those of carriers 2^14 */
/* Shared memory with which blocks fill a multiprocessor: of 228 KiB, less what the system and the kernel take of it. */
constexpr int kRoom = (113 << 10) - 512;
constexpr int kStages = 4;      /* of an exact cache's ring, see Ring: */
constexpr int kStagePanels = 1; /* so many panels of a page each; 2 were no faster */
constexpr int kStage = kStagePanels * 2048;

/* Shared memory of a block; offsets in bytes from the start. */
struct Shared {
    int stats, q, out, factors, planes, bases, exacts, pairs, mu, kinds, lists, basis, turns;
    int project, inv_freq;      /* as the cache's */
    int v_mu, v_kinds, v_lists; /* as mu, kinds and lists, of V */
    int warps, warp_bytes;      /* of each warp: sums, a place for units or pages, then */
    int stage, turned, slow;    /* these, from the warp's start */
    int barriers, used, bytes;  /* `used` is what is needed, `bytes` what a block gets */
};

struct Arguments {
    fkv_cuda_cache c;
    fkv_cuda_attend a;
    int k_planes, k_exacts;       /* most of a head */
    int stage;                    /* room for a unit in a warp's shared memory */
    int near;                     /* 1: what turns carriers is in shared memory too */
    int coded_tiles, exact_tiles; /* 16 channels of a warp's sums */
    Shared at;
};

/* Pairs with room for whole panels of slow ones. */
__host__ __device__ inline int padded_pairs(const fkv_cuda_cache &c) {
    const int pairs = c.rope_dim / 2;
    return c.fast + (pairs > c.fast ? (pairs - c.fast + 7) / 8 * 8 : 0);
}

/* Bytes of the carriers' basis. */
__host__ __device__ inline int basis_bytes(const fkv_cuda_cache &c) {
    return 2 * (c.fast / 16 + 1) * (c.unit / 32) * 1024;
}

/* Bytes of the fragments that turn slow pairs into polynomials. */
__host__ __device__ inline int project_bytes(const fkv_cuda_cache &c) {
    return (padded_pairs(c) - c.fast) / 8 * 1024;
}

template <int H> inline Shared layout(const Arguments &g) {
    const fkv_cuda_cache &c = g.c;
    const int padded = (c.dim + 15) / 16 * 16, pairs = c.coded ? padded_pairs(c) : 0;
    const int quads = H / 4, exact = g.exact_tiles * 512;
    Shared s = {};
    s.stats = 0; /* see Block */
    s.q = s.stats + (kWarps * 2 + 8) * H * 4;
    s.out = s.q;                                 /* factors have been made of q by then */
    s.factors = s.planes = s.q + H * padded * 4; /* of exact items and of coded ones */
    s.bases = s.planes + g.k_planes * H * 4;
    s.exacts = s.bases + g.k_planes / 16 * 256 * quads;
    s.pairs = s.exacts + g.k_exacts / 16 * 256 * quads;
    s.mu = s.pairs + pairs * H * 8;
    s.kinds = s.mu + (c.coded ? c.dim * 4 : 0);
    s.lists = s.kinds + (c.coded ? padded : 0);
    s.basis = s.lists + (g.k_planes + g.k_exacts) * (int)sizeof(fkv_plane);
    s.v_mu = s.basis;
    s.v_kinds = s.v_mu + (c.coded ? c.dim * 4 : 0);
    s.v_lists = s.v_kinds + (c.coded ? padded : 0);
    s.basis = s.v_lists + g.coded_tiles * 16 * (int)sizeof(fkv_plane);
    if (s.basis < s.factors + padded / 16 * 256 * quads) {
        s.basis = s.factors + padded / 16 * 256 * quads;
    }
    s.turns = s.basis + (c.coded ? basis_bytes(c) : 0);
    s.project = (s.turns + (c.coded ? FKV_SPAN * c.fast * 8 : 0) + 15) / 16 * 16;
    s.inv_freq = s.project + (g.near ? project_bytes(c) : 0);
    s.barriers = s.inv_freq + (g.near ? c.rope_dim / 2 * 8 : 0);
    s.barriers = (s.barriers + 7) / 8 * 8;
    s.warps =
        (s.barriers + (kWarps * kStages + 1) * 8 + 127) / 128 * 128; /* the last one's is merging */
    if (c.coded) {
        s.stage = g.coded_tiles * 256 * quads;
        s.turned = s.stage + g.stage;
        /* phases of the pairs are where the turned weights come to be */
        s.slow = s.turned + (c.fast * H > pairs ? c.fast * H : pairs) * 8;
        s.warp_bytes = s.slow + FKV_CUDA_CHEBYSHEV * H * 4;
        s.warp_bytes = s.warp_bytes > exact ? s.warp_bytes : exact;
    } else {
        s.stage = exact; /* pages on their way, see Ring */
        s.warp_bytes = exact + kStages * kStage;
    }
    /* merge_parts() has all of it: an output has no more parts than there are blocks, and its tail */
    const int merge = (kMergeGroups * padded + g.a.grid + 2) * H * 4;
    s.warp_bytes = s.warp_bytes * kWarps > merge ? s.warp_bytes : merge / kWarps + 1;
    s.warp_bytes = (s.warp_bytes + 127) / 128 * 128;
    s.used = s.warps + kWarps * s.warp_bytes;
    s.bytes = s.used < kRoom ? kRoom : s.used; /* the rest is room for parts that are merged */
    return s;
}

template <int H> struct Block {
    const Arguments &g;
    const Shared &at;
    char *shared;
    int thread, lane, warp;

    __device__ Block(const Arguments &args, char *memory)
        : g(args), at(args.at), shared(memory), thread(threadIdx.x), lane(threadIdx.x % 32),
          warp(threadIdx.x / 32) {
    }

    template <typename X> __device__ X *as(int offset) const {
        return (X *)(shared + offset);
    }
    __device__ float *maxima() const { /* [warps][H] */
        return as<float>(at.stats);
    }
    __device__ float *sums() const { /* [warps][H] */
        return maxima() + kWarps * H;
    }
    __device__ float *norm() const { /* [H] of factors in floating point, a power of two */
        return sums() + kWarps * H;
    }
    __device__ float *code_norm() const { /* of factors in digits */
        return norm() + H;
    }
    __device__ float *
    carrier_norm() const { /* of carriers' weights and exact channels, a power of two */
        return norm() + 2 * H;
    }
    __device__ float *carrier_by() const { /* 1 / carrier_norm */
        return norm() + 6 * H;
    }
    __device__ float *constant() const { /* score of the carriers that do not turn */
        return norm() + 3 * H;
    }
    __device__ float *total_max() const {
        return norm() + 4 * H;
    }
    __device__ float *total() const {
        return norm() + 5 * H;
    }
    /* A warp's own memory; its sums come first. In exact items of coded caches they may take all of it. */
    __device__ char *of_warp(int w) const {
        return shared + at.warps + w * at.warp_bytes;
    }
};

/* What a block works on, in its shared memory. */
struct Work {
    fkv_cuda_item item;
    fkv_cuda_row row;
    fkv_cuda_head head;
};

/* Brought there by two loads that depend on each other. The first does not wait for the number of items: lists have
 * room for an item of every block. */
__device__ inline void fetch_work(const Arguments &g, int i, int n_items, Work *work) {
    if (i >= (int)gridDim.x && i >= n_items) {
        return;
    }
    const int32_t *item = (const int32_t *)((const fkv_cuda_item *)g.a.items + i);
    const int t = threadIdx.x;
    constexpr int item_words = sizeof(fkv_cuda_item) / 4, row_words = sizeof(fkv_cuda_row) / 4;
    constexpr int head_words = sizeof(fkv_cuda_head) / 4;
    const int32_t *from = nullptr;
    int32_t *to = nullptr;
    const int row = __ldcg(item), head = g.a.layer * g.c.n_kv_heads + __ldcg(item + 1);
    if (i >= n_items) {
        return;
    }
    if (t < 32) {
        from = t < item_words ? item + t : nullptr;
        to = (int32_t *)&work->item + t;
    } else if (t < 64) {
        const int32_t *at = (const int32_t *)((const fkv_cuda_row *)g.a.rows + row);
        from = t - 32 < row_words ? at + t - 32 : nullptr;
        to = (int32_t *)&work->row + t - 32;
    } else if (t < 96 && g.c.coded) {
        const int32_t *at = (const int32_t *)((const fkv_cuda_head *)g.c.heads + head);
        from = t - 64 < head_words ? at + t - 64 : nullptr;
        to = (int32_t *)&work->head + t - 64;
    }
    if (from) {
        *to = __ldcg(from);
    }
}

/* The range of an item that its query sees. */
__device__ inline int visible_tokens(const Arguments &g, const fkv_cuda_row &row,
                                     const fkv_cuda_item &item) {
    return g.a.appended ? row.base + item.query + 1 : row.base;
}

/* A thread's elements of the item's queries, on their way, with what turns them: (x, other, cos, -sin or sin). Threads
 * of a head take every so many channels of it; heads have no more than 256. */
template <int H> struct EarlyQuery {
    static constexpr int threads = kThreads / H, each = 256 / threads;
    float4 e[each];
};

template <bool F32, int H>
__device__ __forceinline__ void early_elements(const Block<H> &b, const fkv_cuda_row &row,
                                               const fkv_cuda_item &item, EarlyQuery<H> &early) {
    constexpr int threads = EarlyQuery<H>::threads;
    const fkv_cuda_cache &c = b.g.c;
    const int h = b.thread / threads, pairs = c.rope_dim / 2;
    const int dtype = F32 ? FKV_F32 : b.g.a.q.dtype == FKV_F16 ? FKV_F16 : FKV_BF16;
    const char *from =
        row_at(b.g.a.q, row.offset + item.query, item.head * c.group + item.q_first + h);
    const float *cosines =
        (const float *)b.g.a.rope + row.rope_offset + row.base + item.query - row.rope_first;
    const float *sines = cosines + pairs * b.g.a.rope_capacity;
    const bool interleaved = c.rope_layout == 2;
#pragma unroll
    for (int k = 0; k < EarlyQuery<H>::each; k++) {
        const int d = b.thread % threads + k * threads;
        const bool first = interleaved ? d % 2 == 0 : d < pairs;
        const int other = interleaved ? d ^ 1 : first ? d + pairs : d - pairs;
        const int pair = interleaved ? d / 2 : first ? d : other;
        float4 e = make_float4(0.0f, 0.0f, 1.0f, 0.0f);
        if (h < item.q_count && d < c.dim) {
            e.x = load_element(from, dtype, d);
            if (d < c.rope_dim) {
                const int64_t at = pair * b.g.a.rope_capacity;
                e.y = load_element(from, dtype, other);
                e.z = cosines[at];
                e.w = first ? -sines[at] : sines[at];
            }
        }
        early.e[k] = e;
    }
}
template <int H>
__device__ __forceinline__ EarlyQuery<H> begin_query(const Block<H> &b, const fkv_cuda_row &row,
                                                     const fkv_cuda_item &item) {
    EarlyQuery<H> early;
    if (b.g.a.q.dtype == FKV_F32) {
        early_elements<true>(b, row, item, early);
    } else {
        early_elements<false>(b, row, item, early);
    }
    return early;
}

/* The queries, and the norms that follow from their largest elements. `digits` is what an element may reach as an
 * integer. */
template <int H>
__device__ void load_query(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item,
                           float digits, const EarlyQuery<H> &early) {
    constexpr int threads = EarlyQuery<H>::threads;
    const int padded = (b.g.c.dim + 15) / 16 * 16;
    float *q = b.template as<float>(b.at.q);
#pragma unroll
    for (int k = 0; k < EarlyQuery<H>::each; k++) { /* in the CPU's order of operations */
        const int d = b.thread % threads + k * threads;
        const float4 &e = early.e[k];
        const float x = __fadd_rn(__fmul_rn(e.x, e.z), __fmul_rn(e.y, e.w));
        if (d < padded) {
            q[b.thread / threads * padded + d] = x * (b.g.c.scale * kLog2e);
        }
    }
    __syncthreads();
    for (int h = b.warp; h < H; h += kWarps) {
        float most = 0.0f;
        for (int d = b.lane; d < padded; d += 32) {
            most = fmaxf(most, fabsf(q[h * padded + d]));
        }
        for (int i = 16; i; i /= 2) {
            most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
        }
        if (!b.lane) {
            b.norm()[h] = power2(exponent(most) - kQBits);
            b.code_norm()[h] = fmaxf(most, 1e-30f) / digits;
        }
    }
}

} // namespace fkv

#endif /* FKV_CUDA_ATTEND_CUH */
