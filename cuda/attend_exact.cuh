/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention over exact pages. With H = 4 columns 0..3 of the matrix instructions hold the high parts of four heads'
 * factors and 4..7 what rounding them left; with H = 8 high and low parts take an instruction each.
 */
#ifndef FKV_CUDA_ATTEND_EXACT_CUH
#define FKV_CUDA_ATTEND_EXACT_CUH

#include "attend.cuh"

namespace fkv {

/* The factors of one panel for a lane: [high, low][columns k.., k + 8..]. */
template <int H> struct Factors { uint32_t b[H / 4][2]; };

/* The high part of x, or what is left. */
template <typename T> __device__ __forceinline__ float half_of(float x, bool low) {
    const float high = Element<T>::high(x);
    return low ? x - high : high;
}

/* x0, x1, x8, x9: the lane's four values of a panel, for its head. */
template <typename T, int H>
__device__ __forceinline__ void split(Factors<H> &f, float x0, float x1, float x8, float x9,
                                      bool low) {
    if (H == 4) {
        f.b[0][0] = Element<T>::pack(half_of<T>(x0, low), half_of<T>(x1, low));
        f.b[0][1] = Element<T>::pack(half_of<T>(x8, low), half_of<T>(x9, low));
    } else {
        f.b[0][0] = Element<T>::pack(half_of<T>(x0, false), half_of<T>(x1, false));
        f.b[0][1] = Element<T>::pack(half_of<T>(x8, false), half_of<T>(x9, false));
        f.b[H / 4 - 1][0] = Element<T>::pack(half_of<T>(x0, true), half_of<T>(x1, true));
        f.b[H / 4 - 1][1] = Element<T>::pack(half_of<T>(x8, true), half_of<T>(x9, true));
    }
}

template <typename T, int H>
__device__ __forceinline__ void multiply(float (&c)[4], const uint4 &a, const Factors<H> &f) {
#pragma unroll
    for (int i = 0; i < H / 4; i++) {
        Element<T>::mma(c, a, f.b[i][0], f.b[i][1]);
    }
}

/* The running softmax of the lane's two columns. */
struct Running {
    float max[2], sum[2];
};

/*
 * Turns scores s * f + add into weights: their maximum into r.max, their sums into `sums`, alpha[] how much what
 * was gathered before shrinks. p: the weights as factors of MT panels of tokens.
 */
template <typename T, int MT, int H>
__device__ __forceinline__ void soften(float (&s)[MT][4], const float (&f)[2],
                                       const float (&add)[2], int visible, int lane, Running &r,
                                       float (&alpha)[2], float (&sums)[2], Factors<H> (&p)[MT]) {
    const bool low = H == 4 && lane % 4 >= 2;
    float top[2] = {kLowest, kLowest};
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x = s[i][j];
            if (H == 4) {
                x += __shfl_xor_sync(~0u, x, 2);
            }
            s[i][j] = fmaf(x, f[j % 2], add[j % 2]);
        }
    }
    if (visible < MT * 16) {
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (i * 16 + lane / 4 + j / 2 * 8 >= visible) {
                    s[i][j] = -INFINITY;
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < MT; i++) {
        top[0] = fmaxf(top[0], fmaxf(s[i][0], s[i][2]));
        top[1] = fmaxf(top[1], fmaxf(s[i][1], s[i][3]));
    }
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
        for (int d = 4; d < 32; d *= 2) {
            top[c] = fmaxf(top[c], __shfl_xor_sync(~0u, top[c], d));
        }
        top[c] = fmaxf(top[c], r.max[c]);
        alpha[c] = fast_exp2(r.max[c] - top[c]);
        r.max[c] = top[c];
        sums[c] = 0.0f;
    }
    const float shifted[2] = {top[0] - kPBits, top[1] - kPBits};
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x[2];
#pragma unroll
            for (int c = 0; c < 2; c++) {
                x[c] = fast_exp2(s[i][half * 2 + c] - shifted[c]);
                sums[c] += x[c];
            }
            if (H == 4) {
                p[i].b[0][half] =
                    transpose(Element<T>::pack(half_of<T>(x[0], low), half_of<T>(x[1], low)));
            } else {
                p[i].b[0][half] =
                    transpose(Element<T>::pack(half_of<T>(x[0], false), half_of<T>(x[1], false)));
                p[i].b[H / 4 - 1][half] =
                    transpose(Element<T>::pack(half_of<T>(x[0], true), half_of<T>(x[1], true)));
            }
        }
    }
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
        for (int d = 4; d < 32; d *= 2) {
            sums[c] += __shfl_xor_sync(~0u, sums[c], d);
        }
        r.sum[c] = fmaf(r.sum[c], alpha[c], sums[c]);
    }
}

/* o := o * alpha + acc * by + add, for the lane's rows r and r + 8 of a tile of channels. */
__device__ __forceinline__ void gather(float4 *o, const float (&alpha)[2], const float (&acc)[4],
                                       float by0, float by8, const float (&add0)[2],
                                       const float (&add8)[2]) {
    float4 x = *o;
    x.x = fmaf(x.x, alpha[0], fmaf(acc[0], by0, add0[0]));
    x.y = fmaf(x.y, alpha[1], fmaf(acc[1], by0, add0[1]));
    x.z = fmaf(x.z, alpha[0], fmaf(acc[2], by8, add8[0]));
    x.w = fmaf(x.w, alpha[1], fmaf(acc[3], by8, add8[1]));
    *o = x;
}

/* One exact page: `visible` of its tokens. q: factors [panels][32] of the queries. */
template <typename T, int H>
__device__ __forceinline__ void exact_page(const char *k, int panels, const Factors<H> *q,
                                           const float (&f)[2], int visible, int lane, Running &r,
                                           float4 *o, const char *next) {
    const char *v = k + (size_t)panels * 2048;
    float s[4][4] = {};
    for (int i = lane; i < panels * 16; i += 32) {
        prefetch(v + i * 128);
    }
#pragma unroll 2
    for (int i = 0; i < panels; i++) {
        uint4 a[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            a[t] = stream16(k + ((i * 4 + t) * 32 + lane) * 16);
        }
        const Factors<H> b = q[i * 32 + lane];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            multiply<T, H>(s[t], a[t], b);
        }
    }
    if (next) {
        for (int i = lane; i < panels * 16; i += 32) {
            prefetch(next + i * 128);
        }
    }
    const float none[2] = {0.0f, 0.0f};
    float alpha[2], sums[2];
    Factors<H> p[4];
    soften<T, 4, H>(s, f, none, visible, lane, r, alpha, sums, p);
#pragma unroll 2
    for (int i = 0; i < panels; i++) {
        uint4 a[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            a[t] = stream16(v + ((i * 4 + t) * 32 + lane) * 16);
        }
        float acc[4] = {};
#pragma unroll
        for (int t = 0; t < 4; t++) {
            multiply<T, H>(acc, a[t], p[t]);
        }
        gather(&o[i * 32 + lane], alpha, acc, 1.0f, 1.0f, none, none);
    }
}

#if FKV_BULK
/* A warp's pages on their way through shared memory, panel after panel. */
struct Ring {
    char *memory;
    uint64_t *barriers;
    const uint64_t *table;
    size_t offset;
    int panels;
    int page, sink, step;   /* the next page is number `page` of the item */
    int base;               /* entry of the item's first page; the sink page comes before it */
    int each, within;       /* chunks of a page, and of the next one that are under way */
    int left;               /* chunks that are not under way */
    uint32_t issued, taken; /* chunks, those of earlier items counted in */
    const char *at;         /* the page's next chunk */

    __device__ __forceinline__ void issue(int lane) {
        if (left > 0 && !lane) {
            if (!within) {
                at = (const char *)table[sink && !page ? 0 : base + page - sink] + offset;
                page += step;
            }
            const uint32_t stage = issued % kStages;
            bulk_copy(memory + stage * kStage, at, kStage, &barriers[stage]);
            at += kStage;
            within = within + 1 == each ? 0 : within + 1;
        }
        left--;
        issued++;
    }
    /* Panel i of a page; taken in order, and given back. */
    __device__ __forceinline__ const uint4 *take(int i) const {
        const uint32_t stage = taken % kStages;
        if (i % kStagePanels == 0) {
            barrier_wait(&barriers[stage], taken / kStages & 1);
        }
        return (const uint4 *)(memory + stage * kStage + i % kStagePanels * 2048);
    }
    __device__ __forceinline__ void give_back(int i, int lane) {
        if (i % kStagePanels == kStagePanels - 1) {
            taken++;
            __syncwarp();
            issue(lane);
        }
    }
};

/* exact_page() with panels from a ring. */
template <typename T, int H>
__device__ __forceinline__ void ring_page(Ring &ring, const Factors<H> *q, const float (&f)[2],
                                          int visible, int lane, Running &r, float4 *o) {
    float s[4][4] = {};
    for (int i = 0; i < ring.panels; i++) {
        const uint4 *panel = ring.take(i) + lane;
        const Factors<H> b = q[i * 32 + lane];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            multiply<T, H>(s[t], panel[t * 32], b);
        }
        ring.give_back(i, lane);
    }
    const float none[2] = {0.0f, 0.0f};
    float alpha[2], sums[2];
    Factors<H> p[4];
    soften<T, 4, H>(s, f, none, visible, lane, r, alpha, sums, p);
    for (int i = 0; i < ring.panels; i++) {
        const uint4 *panel = ring.take(ring.panels + i) + lane;
        float acc[4] = {};
#pragma unroll
        for (int t = 0; t < 4; t++) {
            multiply<T, H>(acc, panel[t * 32], p[t]);
        }
        ring.give_back(ring.panels + i, lane);
        gather(&o[i * 32 + lane], alpha, acc, 1.0f, 1.0f, none, none);
    }
}
#endif

template <typename T, int H> __device__ void make_factors(const Block<H> &b) {
    const int padded = (b.g.c.dim + 15) / 16 * 16;
    const float *q = b.template as<float>(b.at.q);
    Factors<H> *to = b.template as<Factors<H>>(b.at.factors);
    for (int i = b.thread; i < padded / 16 * 32; i += kThreads) {
        const int lane = i % 32, head = H == 4 ? lane / 4 % 4 : lane / 4;
        const float *x = q + head * padded + i / 32 * 16 + lane % 4 * 2;
        const float by = 1.0f / b.norm()[head];
        split<T, H>(to[i], x[0] * by, x[1] * by, x[8] * by, x[9] * by, H == 4 && lane / 4 >= 4);
    }
}

#if FKV_BULK
/* The item's pages that hold something the query sees. */
__device__ __forceinline__ int seen_pages(const Arguments &g, const fkv_cuda_row &row,
                                          const fkv_cuda_item &item) {
    const int tiles = (visible_tokens(g, row, item) - g.c.sinks + 63) / 64;
    return max(0, min(item.count, item.sink + max(0, tiles + 1 - item.first)));
}

/* The warp's pages of an item, the first of them under way. */
template <int H>
__device__ __forceinline__ Ring begin_ring(const Block<H> &b, const fkv_cuda_row &row,
                                           const fkv_cuda_item &item, uint32_t passed) {
    const fkv_cuda_cache &c = b.g.c;
    const int panels = (c.dim + 15) / 16, each = 2 * panels / kStagePanels;
    const int pages = (seen_pages(b.g, row, item) - b.warp + kWarps - 1) / kWarps;
    Ring ring = {b.of_warp(b.warp) + b.at.stage,
                 b.template as<uint64_t>(b.at.barriers) + b.warp * kStages,
                 (const uint64_t *)row.table + b.g.a.layer * row.slots,
                 (size_t)item.head * panels * 4096,
                 panels,
                 b.warp,
                 item.sink,
                 kWarps,
                 item.first,
                 each,
                 0,
                 pages * each,
                 passed,
                 passed,
                 nullptr};
    for (int i = 0; i < kStages; i++) {
        ring.issue(b.lane);
    }
    return ring;
}

template <typename T, int H>
__device__ void ring_item(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item,
                          Running &r, float4 *o, Ring &ring) {
    const int visible = visible_tokens(b.g, row, item), sinks = b.g.c.sinks;
    const int column = H == 4 ? b.lane * 2 % 4 : b.lane * 2 % 8;
    const float f[2] = {b.norm()[column], b.norm()[column + 1]};
    const Factors<H> *q = b.template as<Factors<H>>(b.at.factors);
    const int pages = seen_pages(b.g, row, item);
    for (int i = b.warp; i < pages; i += kWarps) {
        const int entry = item.first + i - item.sink;
        const int here = min(visible - sinks - (entry - 1) * 64, 64);
        ring_page<T, H>(ring, q, f, here, b.lane, r, o);
    }
}
#endif

template <typename T, int H>
__device__ void exact_item(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item,
                           Running &r, float4 *o) {
    const fkv_cuda_cache &c = b.g.c;
    const int panels = (c.dim + 15) / 16, visible = visible_tokens(b.g, row, item);
    const uint64_t *table = (const uint64_t *)row.table + b.g.a.layer * row.slots;
    const size_t offset = (size_t)item.head * panels * 4096;
    const int column = H == 4 ? b.lane * 2 % 4 : b.lane * 2 % 8;
    const float f[2] = {b.norm()[column], b.norm()[column + 1]};
    const Factors<H> *q = b.template as<Factors<H>>(b.at.factors);
    for (int i = b.warp; i < item.count; i += kWarps) {
        const int entry = i || !item.sink ? item.first + i - item.sink : 0;
        const int first = entry ? c.sinks + (entry - 1) * 64 : 0;
        const int here = min(visible - first, entry ? 64 : c.sinks);
        if (here <= 0) {
            continue;
        }
        const char *next = nullptr;
        if (i + kWarps < item.count) {
            next = (const char *)table[item.first + i + kWarps - item.sink] + offset;
        }
        exact_page<T, H>((const char *)table[entry] + offset, panels, q, f, here, b.lane, r, o,
                         next);
    }
}

} // namespace fkv

#endif /* FKV_CUDA_ATTEND_EXACT_CUH */
