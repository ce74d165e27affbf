/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention: one launch. A block of 8 warps takes work items, each a range of tokens of one KV head for the query
 * heads of one query token. Its warps take pages, or the units of a span, in turns; at the end of an item their
 * sums are added in order. An output made of several items is merged, in order as well, by the block that ends
 * last; so results do not depend on scheduling.
 */
#include "attend.cuh"

#include <math_constants.h>

namespace fkv {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr float kLog2e = 1.4426950408889634f;

/* Shared memory of a block; offsets in bytes from the start. */
struct Shared {
    int scales; /* [warps][2] of a unit, its exponent behind */
    int scales_bytes;
    int q, factors, planes, exacts, pairs, turned, slow, phases, out, o, ring, barriers, stats,
        bytes;
};

template <int H>
__host__ __device__ inline Shared layout(const fkv_cuda_cache &c, int k_planes, int k_exacts) {
    const int padded = (c.dim + 15) / 16 * 16, pairs = c.rope_dim / 2;
    const int fast = c.coded ? c.fast : 0, turned = c.coded ? pairs : 0;
    const int tiles = c.panels > padded / 16 ? c.panels : padded / 16;
    Shared s;
    s.stats = 0; /* [warps][H] max, sum; [H] norms, constants, totals: see Block */
    s.q = s.stats + (kWarps * 2 + 8) * H * 4;
    s.out = s.q + H * padded * 4;
    s.factors = s.out + H * padded * 4;
    s.planes = s.factors + padded / 16 * 32 * (int)sizeof(Factors<H>);
    s.exacts = s.planes + k_planes * H * 4;
    s.pairs = s.exacts + k_exacts * H * 4;
    const int all = fast > turned ? fast : turned;
    s.turned = s.pairs + (c.coded ? all * H * 8 : 0);
    s.slow = s.turned + 2 * fast * H * 8;
    s.phases = s.slow + (c.coded ? 2 * FKV_CUDA_CHEBYSHEV * H * 4 : 0);
    s.o = (s.phases + 2 * all * 8 + 15) / 16 * 16;
    s.scales = s.o + kWarps * tiles * 512;
    s.scales_bytes = c.coded ? k_planes * 4 + c.panels * 64 + 16 : 0;
    s.ring =
        s.scales + kWarps * 2 * s.scales_bytes; /* exact caches: what is on its way, see Ring */
    s.barriers = s.ring + (c.coded ? 0 : kWarps * 4 * 2048);
    s.bytes = s.barriers + (c.coded ? 0 : kWarps * 4 * 8);
    return s;
}

struct Arguments {
    fkv_cuda_cache c;
    fkv_cuda_attend a;
    int k_planes, k_exacts; /* most of a head */
};

template <int H> struct Block {
    const Arguments &g;
    const Shared at;
    char *shared;
    int thread, lane, warp;

    __device__ Block(const Arguments &args, char *memory)
        : g(args), at(layout<H>(args.c, args.k_planes, args.k_exacts)), shared(memory),
          thread(threadIdx.x), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
    }

    template <typename X> __device__ X *as(int offset) const {
        return (X *)(shared + offset);
    }
    __device__ float *maxima() const {
        return as<float>(at.stats);
    }
    __device__ float *sums() const {
        return maxima() + kWarps * H;
    }
    __device__ float *norm() const {
        return sums() + kWarps * H;
    }
    __device__ float *carrier_norm() const {
        return norm() + H;
    }
    __device__ float *constant() const {
        return norm() + 2 * H;
    }
    __device__ float *total_max() const {
        return norm() + 3 * H;
    }
    __device__ float *total() const {
        return norm() + 4 * H;
    }
};

/* q, rotated and in units of log2; a power of two to which its largest element belongs. */
template <int H>
__device__ void load_query(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item) {
    const fkv_cuda_cache &c = b.g.c;
    const int padded = (c.dim + 15) / 16 * 16;
    const int64_t token = row.offset + item.query;
    const float *rope =
        (const float *)b.g.a.rope + row.rope_offset + row.base + item.query - row.rope_first;
    float *q = b.template as<float>(b.at.q);
    for (int h = b.warp; h < H; h += kWarps) {
        float most = 0.0f;
        for (int d = b.lane; d < padded; d += 32) {
            float x = 0.0f;
            if (h < item.q_count && d < c.dim) {
                const char *from = row_at(b.g.a.q, token, item.head * c.group + item.q_first + h);
                x = rotated(c, from, b.g.a.q.dtype, d, rope, b.g.a.rope_capacity) *
                    (c.scale * kLog2e);
            }
            q[h * padded + d] = x;
            most = fmaxf(most, fabsf(x));
        }
        for (int i = 16; i; i /= 2) {
            most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
        }
        if (!b.lane) {
            b.norm()[h] = power2(exponent(most) - kQBits);
        }
    }
}

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

/* The range of an item that its query sees. */
__device__ inline int visible_tokens(const Arguments &g, const fkv_cuda_row &row,
                                     const fkv_cuda_item &item) {
    return g.a.appended ? row.base + item.query + 1 : row.base;
}

template <typename T, int H>
__device__ void exact_item(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item,
                           Running &r, float4 *o, uint32_t &passed) {
    const fkv_cuda_cache &c = b.g.c;
    const int panels = (c.dim + 15) / 16, visible = visible_tokens(b.g, row, item);
    const uint64_t *table = (const uint64_t *)row.table + b.g.a.layer * row.slots;
    const size_t offset = (size_t)item.head * panels * 4096;
    const int column = H == 4 ? b.lane * 2 % 4 : b.lane * 2 % 8;
    const float f[2] = {b.norm()[column], b.norm()[column + 1]};
    const Factors<H> *q = b.template as<Factors<H>>(b.at.factors);
#if FKV_BULK
    if (!c.coded) {
        const int tiles = (visible - c.sinks + 63) / 64;
        const int count = max(0, min(item.count, item.sink + max(0, tiles + 1 - item.first)));
        const int pages = (count - b.warp + kWarps - 1) / kWarps;
        Ring ring = {b.template as<char>(b.at.ring) + b.warp * kStages * kStage,
                     b.template as<uint64_t>(b.at.barriers) + b.warp * kStages,
                     table,
                     offset,
                     b.warp,
                     item.sink,
                     kWarps,
                     panels,
                     item.first,
                     pages * 2 * panels,
                     0,
                     0,
                     passed};
        for (int i = 0; i < kStages; i++) {
            ring.issue(b.lane);
        }
        for (int i = 0; i < pages; i++) {
            const int entry = item.first + b.warp + i * kWarps - item.sink;
            const int here = min(visible - c.sinks - (entry - 1) * 64, 64);
            ring_page<T, H>(ring, q, f, here, b.lane, r, o);
        }
        passed += ring.chunks;
        return;
    }
#endif
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

/* Queries times carriers: [pairs][H] (a, b), and what does not turn. */
template <int H> __device__ void weigh_carriers(const Block<H> &b, const fkv_cuda_item &item) {
    const fkv_cuda_cache &c = b.g.c;
    const int pairs = c.rope_dim / 2, all = max(pairs, c.fast), padded = (c.dim + 15) / 16 * 16;
    const float *mu =
        (const float *)c.carriers + ((size_t)b.g.a.layer * 2 * c.n_kv_heads + item.head) * c.dim;
    const uint8_t *kinds =
        (const uint8_t *)c.kinds + ((size_t)b.g.a.layer * 2 * c.n_kv_heads + item.head) * c.dim;
    const float *q = b.template as<float>(b.at.q);
    float2 *to = b.template as<float2>(b.at.pairs);
    for (int h = b.warp; h < H; h += kWarps) {
        float sum = 0.0f, rest = 0.0f;
        for (int j = b.lane; j < all; j += 32) {
            float2 w = make_float2(0.0f, 0.0f);
            if (j < pairs) {
                const int d = c.rope_layout == 2 ? 2 * j : j;
                const int e = c.rope_layout == 2 ? d + 1 : d + pairs;
                /* exact channels are held with their carriers */
                const float qd = kinds[d] == 2 ? 0.0f : q[h * padded + d];
                const float qe = kinds[e] == 2 ? 0.0f : q[h * padded + e];
                w.x = (float)c.rope_scaling * (qd * mu[d] + qe * mu[e]);
                w.y = (float)c.rope_scaling * (qe * mu[d] - qd * mu[e]);
            }
            to[j * H + h] = w;
            sum += fabsf(w.x) + fabsf(w.y);
        }
        for (int d = c.rope_dim + b.lane; d < c.dim; d += 32) {
            rest += kinds[d] == 2 ? 0.0f : q[h * padded + d] * mu[d];
        }
        for (int i = 16; i; i /= 2) {
            sum += __shfl_xor_sync(~0u, sum, i);
            rest += __shfl_xor_sync(~0u, rest, i);
        }
        if (!b.lane) {
            b.carrier_norm()[h] = power2(max(exponent(sum), -60) + 1 - kWBits);
            b.constant()[h] = rest;
        }
    }
}

template <int H> __device__ void make_plane_factors(const Block<H> &b, const fkv_cuda_head &head) {
    const fkv_cuda_cache &c = b.g.c;
    const int padded = (c.dim + 15) / 16 * 16;
    const fkv_plane *planes = (const fkv_plane *)c.planes;
    const float *q = b.template as<float>(b.at.q);
    for (int i = b.thread; i < head.k_steps * 16 * H; i += kThreads) {
        const fkv_plane p = planes[head.k_planes + i / H];
        float x = 0.0f;
        if (p.channel >= 0) {
            x = q[i % H * padded + p.channel] / b.norm()[i % H] * power2(2 * p.index);
        }
        b.template as<float>(b.at.planes)[i] = x;
    }
    for (int i = b.thread; i < head.k_exact * 16 * H; i += kThreads) {
        const fkv_plane p = planes[head.k_exacts + i / H];
        b.template as<float>(b.at.exacts)[i] =
            p.channel >= 0 ? q[i % H * padded + p.channel] / b.norm()[i % H] : 0.0f;
    }
}

/* Norms hold for the factors times the largest plane too. */
template <int H> __device__ void widen_norms(const Block<H> &b, const fkv_cuda_head &head) {
    if (b.thread < H) {
        b.norm()[b.thread] *= power2(2 * head.top_plane);
    }
}

/* cos and sin of the pairs' angles: at the span's start, or at its middle for slow pairs. */
template <int H> __device__ void turn_phases(const Block<H> &b, int span, float2 *phases) {
    const fkv_cuda_cache &c = b.g.c;
    const double start = (double)c.sinks + (double)span * (FKV_SPAN * c.unit);
    const double middle = start + 0.5 * (FKV_SPAN * c.unit - 1);
    for (int j = b.thread; j < c.rope_dim / 2; j += kThreads) {
        double x = (j < c.fast ? start : middle) * ((const double *)c.inv_freq)[j] *
                   0.15915494309189533577;
        float s, t;
        sincospif(2.0f * (float)(x - rint(x)), &s, &t);
        phases[j] = make_float2(t, s);
    }
}

template <int H>
__device__ void turn_weights(const Block<H> &b, const float2 *phases, float2 *turned, float *slow) {
    const fkv_cuda_cache &c = b.g.c;
    const int pairs = c.rope_dim / 2, n = pairs - c.fast;
    const float2 *w = b.template as<float2>(b.at.pairs);
    for (int i = b.thread; i < c.fast * H; i += kThreads) {
        const float by = 1.0f / b.carrier_norm()[i % H];
        const float2 x = w[i], t = i / H < pairs ? phases[i / H] : make_float2(1.0f, 0.0f);
        turned[i] = make_float2((x.x * t.x + x.y * t.y) * by, (x.y * t.x - x.x * t.y) * by);
    }
    const float *project = (const float *)c.project;
    constexpr int parts = 4;
    for (int i = b.thread; i < FKV_CUDA_CHEBYSHEV * H * parts; i += kThreads) {
        const int part = i % parts, h = i / parts % H, m = i / parts / H;
        float sum = 0.0f;
        for (int j = part; j < n; j += parts) {
            const float2 x = w[(c.fast + j) * H + h], t = phases[c.fast + j];
            const float y = m % 2 ? x.y * t.x - x.x * t.y : x.x * t.x + x.y * t.y;
            sum = fmaf(y, __ldg(project + j * FKV_CUDA_CHEBYSHEV + m), sum);
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (!part) {
            slow[m * H + h] = sum / b.carrier_norm()[h];
        }
    }
}

template <int MT, int H>
__device__ void coded_item(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item,
                           const fkv_cuda_head &head, Running &r, float4 *o) {
    const fkv_cuda_cache &c = b.g.c;
    const uint64_t *table = (const uint64_t *)row.table + b.g.a.layer * row.slots + 1;
    const int tiles = c.units_per_block * c.unit / 64,
              unit_bytes = ((const int *)c.unit_bytes)[b.g.a.layer];
    const int visible = visible_tokens(b.g, row, item) - c.sinks;
    CodedView<H> v;
    v.head = head;
    v.planes = b.template as<float>(b.at.planes);
    v.exacts = b.template as<float>(b.at.exacts);
    v.norm = b.norm();
    v.carrier_norm = b.carrier_norm();
    v.constant = b.constant();
    v.basis = (const uint4 *)c.basis;
    v.turns = (const float2 *)c.turns;
    v.fast = c.fast;
    const int all = max(c.rope_dim / 2, c.fast);
    float2 *phases = b.template as<float2>(b.at.phases);
    float2 *turned = b.template as<float2>(b.at.turned);
    float *slow = b.template as<float>(b.at.slow);
    const int spans = (item.count + FKV_SPAN - 1) / FKV_SPAN, first = item.first / FKV_SPAN;
    const int slow_size = FKV_CUDA_CHEBYSHEV * H;
    if (head.carried) {
        turn_phases(b, first, phases);
        turn_phases(b, first + 1, phases + all);
        __syncthreads();
        turn_weights(b, phases, turned, slow);
    }
    const int scales_at = head.bytes - (head.k_steps + head.v_steps) * 64 - 16;
    const auto unit_at = [&](int unit) {
        return (const char *)table[unit / c.units_per_block * tiles] +
               unit % c.units_per_block * (size_t)unit_bytes + head.offset;
    };
    const auto fetch_scales = [&](const char *blob, char *to) {
        for (int j = b.lane; j * 16 < head.bytes - scales_at; j += 32) {
            copy_async(to + j * 16, blob + scales_at + j * 16);
        }
        copies_commit();
    };
    /* addresses of the warp's next two units: the second one is on its way while the first is worked on */
    const int end = item.first + item.count;
    const char *next = nullptr, *second = nullptr;
    if (item.first + b.warp < end) {
        next = unit_at(item.first + b.warp);
        second = unit_at(min(item.first + b.warp + FKV_SPAN, end - 1));
        fetch_scales(next, b.template as<char>(b.at.scales) + b.warp * 2 * b.at.scales_bytes);
    }
    for (int i = 0; i < spans; i++) {
        const int at = i & 1, other = at ^ 1;
        if (head.carried) {
            __syncthreads();
            if (i + 1 < spans) {
                turn_weights(b, phases + other * all, turned + other * c.fast * H,
                             slow + other * slow_size);
                turn_phases(b, first + i + 2, phases + at * all);
            }
        }
        const int unit = (first + i) * FKV_SPAN + b.warp;
        const int here = min(visible - unit * c.unit, c.unit);
        if (unit >= end || here <= 0) {
            continue;
        }
        char *scales = b.template as<char>(b.at.scales) + (b.warp * 2 + at) * b.at.scales_bytes;
        const int ahead = unit + FKV_SPAN;
        const char *blob = next;
        __syncwarp();
        if (ahead < end) {
            next = second;
            second = unit_at(min(ahead + FKV_SPAN, end - 1));
            for (int j = b.lane; j * 128 < scales_at; j += 32) {
                prefetch(next + j * 128);
            }
            fetch_scales(next, b.template as<char>(b.at.scales) +
                                   (b.warp * 2 + other) * b.at.scales_bytes);
        }
        copies_wait(ahead < end);
        __syncwarp();
        coded_unit<MT, H>(blob, scales, v, turned + at * c.fast * H, slow + at * slow_size, b.warp,
                          here, b.lane, r, o);
    }
    copies_wait(false); /* also of a unit that turned out to be invisible */
    __syncwarp();
}

/* ---- ends */

template <int H> __device__ float from_tile(const float4 *o, int row, int head) {
    const float *x = (const float *)(o + row / 16 * 32 + row % 8 * 4);
    const int half = row % 16 / 8 * 2;
    float y = x[head / 2 * 4 + head % 2 + half];
    if (H == 4) {
        y += x[(head + 4) / 2 * 4 + head % 2 + half];
    }
    return y;
}

/* The warps' sums, in their order. `rows` of a part, plane `index`; everything in plane order. */
template <int H>
__device__ void add_planes(const Block<H> &b, const fkv_plane *planes, int rows, int first_row,
                           int index, int tiles) {
    const int padded = (b.g.c.dim + 15) / 16 * 16;
    float *out = b.template as<float>(b.at.out);
    for (int i = b.thread; i < rows * H; i += kThreads) {
        const fkv_plane p = planes[i / H];
        const int h = i % H;
        if (p.channel < 0 || p.index != index) {
            continue;
        }
        float sum = 0.0f;
        for (int w = 0; w < kWarps; w++) {
            const float4 *o = b.template as<float4>(b.at.o) + w * tiles * 32;
            sum = fmaf(from_tile<H>(o, first_row + i / H, h), b.maxima()[w * H + h], sum);
        }
        out[h * padded + p.channel] += sum * power2(2 * index);
    }
}

/* b.maxima() becomes each warp's share, exp2(its maximum - that of all). */
template <int H> __device__ void total_sums(const Block<H> &b) {
    if (b.thread < H) {
        float top = kLowest, sum = 0.0f;
        for (int w = 0; w < kWarps; w++) {
            top = fmaxf(top, b.maxima()[w * H + b.thread]);
        }
        for (int w = 0; w < kWarps; w++) {
            const float share = fast_exp2(b.maxima()[w * H + b.thread] - top);
            b.maxima()[w * H + b.thread] = share;
            sum = fmaf(b.sums()[w * H + b.thread], share, sum);
        }
        b.total_max()[b.thread] = top;
        b.total()[b.thread] = sum;
    }
}

template <int H>
__device__ void add_warps(const Block<H> &b, const fkv_cuda_item &item, const fkv_cuda_head &head,
                          int tiles) {
    const fkv_cuda_cache &c = b.g.c;
    const int padded = (c.dim + 15) / 16 * 16;
    float *out = b.template as<float>(b.at.out);
    if (!item.coded) {
        for (int i = b.thread; i < padded * H; i += kThreads) {
            const int d = i / H, h = i % H;
            float sum = 0.0f;
            for (int w = 0; w < kWarps; w++) {
                const float4 *o = b.template as<float4>(b.at.o) + w * tiles * 32;
                sum = fmaf(from_tile<H>(o, d, h), b.maxima()[w * H + h], sum);
            }
            out[h * padded + d] = sum;
        }
        return;
    }
    const float *mu = (const float *)c.carriers +
                      ((size_t)(b.g.a.layer * 2 + 1) * c.n_kv_heads + item.head) * c.dim;
    const uint8_t *kinds = (const uint8_t *)c.kinds +
                           ((size_t)(b.g.a.layer * 2 + 1) * c.n_kv_heads + item.head) * c.dim;
    for (int i = b.thread; i < padded * H; i += kThreads) {
        const int d = i / H, h = i % H;
        out[h * padded + d] = d < c.dim && kinds[d] != 2 ? b.total()[h] * mu[d] : 0.0f;
    }
    const fkv_plane *planes = (const fkv_plane *)c.planes;
    for (int index = 0; index < 4; index++) {
        __syncthreads();
        add_planes(b, planes + head.v_planes, head.v_steps * 16, 0, index, tiles);
    }
    __syncthreads();
    add_planes(b, planes + head.v_exacts, head.v_exact * 16, head.v_steps * 16, 0, tiles);
}

template <int H>
__device__ void write_output(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item,
                             int h, const float *o, float top, float sum) {
    const fkv_cuda_cache &c = b.g.c;
    const int64_t token = row.offset + item.query;
    const int head = item.head * c.group + item.q_first + h;
    char *to = (char *)row_at(b.g.a.out, token, head);
    const float inverse = sum > 0.0f ? 1.0f / sum : sum == 0.0f ? 0.0f : sum;
    for (int d = b.lane; d < c.dim; d += 32) {
        store_element(to, b.g.a.out.dtype, d, o[d] * inverse);
    }
    if (b.g.a.lse.present && !b.lane) {
        *(float *)row_at(b.g.a.lse, token, head) =
            sum == 0.0f ? -CUDART_INF_F : (top - kPBits + log2f(sum)) * 0.69314718055994531f;
    }
}

/* The parts of one output, in order. */
template <int H>
__device__ void merge_parts(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item) {
    const fkv_cuda_cache &c = b.g.c;
    const int stride = c.dim + 2, group = min(c.group, FKV_CUDA_MAX_GROUP);
    const int padded = (c.dim + 15) / 16 * 16;
    const float *parts = (const float *)b.g.a.partials + (size_t)item.slot * group * stride;
    float *out = b.template as<float>(b.at.out);
    for (int h = b.warp; h < item.q_count; h += kWarps) {
        float top = kLowest, sum = 0.0f;
        for (int i = b.lane; i < item.parts; i += 32) {
            top = fmaxf(top, __ldcg(parts + ((size_t)i * group + h) * stride + c.dim));
        }
        for (int i = 16; i; i /= 2) {
            top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
        }
        for (int i = b.lane; i < item.parts; i += 32) {
            const float *part = parts + ((size_t)i * group + h) * stride + c.dim;
            sum = fmaf(__ldcg(part + 1), fast_exp2(__ldcg(part) - top), sum);
        }
        for (int i = 16; i; i /= 2) {
            sum += __shfl_xor_sync(~0u, sum, i);
        }
        if (!b.lane) {
            b.total_max()[h] = top;
            b.total()[h] = sum;
        }
    }
    __syncthreads();
    for (int j = b.thread; j < item.q_count * c.dim; j += kThreads) {
        const int h = j / c.dim, d = j % c.dim;
        const float *part = parts + (size_t)h * stride;
        const float top = b.total_max()[h];
        float o = 0.0f;
#pragma unroll 8
        for (int i = 0; i < item.parts; i++) {
            const float *at = part + (size_t)i * group * stride;
            o = fmaf(__ldcg(at + d), fast_exp2(__ldcg(at + c.dim) - top), o);
        }
        out[h * padded + d] = o;
    }
    __syncthreads();
    for (int h = b.warp; h < item.q_count; h += kWarps) {
        write_output(b, row, item, h, out + h * padded, b.total_max()[h], b.total()[h]);
    }
}

template <int H>
__device__ void end_item(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item,
                         unsigned *last) {
    const fkv_cuda_cache &c = b.g.c;
    const int padded = (c.dim + 15) / 16 * 16;
    const float *out = b.template as<float>(b.at.out);
    if (item.parts == 1) {
        for (int h = b.warp; h < item.q_count; h += kWarps) {
            write_output(b, row, item, h, out + h * padded, b.total_max()[h], b.total()[h]);
        }
        return;
    }
    const int stride = c.dim + 2, group = min(c.group, FKV_CUDA_MAX_GROUP);
    float *part = (float *)b.g.a.partials + (size_t)(item.slot + item.part) * group * stride;
    for (int h = b.warp; h < item.q_count; h += kWarps) {
        for (int d = b.lane; d < c.dim; d += 32) {
            part[h * stride + d] = out[h * padded + d];
        }
        if (!b.lane) {
            part[h * stride + c.dim] = b.total_max()[h];
            part[h * stride + c.dim + 1] = b.total()[h];
        }
    }
    __threadfence();
    __syncthreads();
    if (!b.thread) {
        unsigned *counter = (unsigned *)b.g.a.counters + 1 + item.output;
        *last = atomicAdd(counter, 1) == (unsigned)item.parts - 1;
        if (*last) {
            *counter = 0;
        }
    }
    __syncthreads();
    if (*last) {
        __threadfence();
        merge_parts(b, row, item);
    }
}

template <typename T, int MT, int H>
__global__ __launch_bounds__(kThreads, 2) void attend_kernel(const __grid_constant__ Arguments g) {
    extern __shared__ __align__(16) char memory[];
    __shared__ unsigned last;
    const Block<H> b(g, memory);
    const int padded = (g.c.dim + 15) / 16 * 16;
    const int tiles = max(g.c.panels, padded / 16), n_items = __ldg((const int *)g.a.n_items);
    float4 *o = b.template as<float4>(b.at.o) + b.warp * tiles * 32;
    __shared__ int taken;
    uint32_t passed = 0; /* chunks through this warp's ring */
#if FKV_BULK
    if (!g.c.coded && b.thread < kWarps * kStages) {
        barrier_init(b.template as<uint64_t>(b.at.barriers) + b.thread);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
#endif
    for (int i = blockIdx.x; i < n_items;) {
        if (!b.thread) {
            /* one for every item altogether; who draws the last sets the counter back */
            unsigned *counter = (unsigned *)g.a.counters;
            const unsigned drawn = atomicAdd(counter, 1);
            if (drawn == (unsigned)n_items - 1) {
                *counter = 0;
            }
            taken = gridDim.x + drawn;
        }
        const fkv_cuda_item item = ((const fkv_cuda_item *)g.a.items)[i];
        const fkv_cuda_row row = ((const fkv_cuda_row *)g.a.rows)[item.row];
        fkv_cuda_head head = {};
        Running r = {{kLowest, kLowest}, {0.0f, 0.0f}};
        for (int t = b.lane; t < tiles * 32; t += 32) {
            o[t] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        load_query(b, row, item);
        __syncthreads();
        if (item.coded) {
            head = ((const fkv_cuda_head *)g.c.heads)[g.a.layer * g.c.n_kv_heads + item.head];
            widen_norms(b, head);
            weigh_carriers(b, item);
            __syncthreads();
            make_plane_factors(b, head);
            __syncthreads();
            coded_item<MT, H>(b, row, item, head, r, o);
        } else {
            make_factors<T, H>(b);
            __syncthreads();
            exact_item<T, H>(b, row, item, r, o, passed);
        }
        if (b.lane < H / 2) {
            for (int c = 0; c < 2; c++) {
                b.maxima()[b.warp * H + b.lane * 2 + c] = r.max[c];
                b.sums()[b.warp * H + b.lane * 2 + c] = r.sum[c];
            }
        }
        __syncthreads();
        total_sums(b);
        i = taken;
        __syncthreads();
        add_warps(b, item, head, tiles);
        __syncthreads();
        end_item(b, row, item, &last);
        __syncthreads();
    }
}

template <typename T, int MT, int H> cudaError_t launch(const Arguments &g, cudaStream_t stream) {
    const Shared at = layout<H>(g.c, g.k_planes, g.k_exacts);
    static int allowed[64]; /* by device; the attribute may be set twice, that is harmless */
    int device;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess && (device >= 64 || allowed[device] < at.bytes)) {
        e = cudaFuncSetAttribute(attend_kernel<T, MT, H>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, at.bytes);
        if (e == cudaSuccess && device < 64) {
            allowed[device] = at.bytes;
        }
    }
    if (e != cudaSuccess) {
        return e;
    }
    attend_kernel<T, MT, H><<<g.a.grid, kThreads, at.bytes, stream>>>(g);
    return cudaGetLastError();
}

template <typename T, int MT> cudaError_t by_heads(const Arguments &g, cudaStream_t stream) {
    return g.c.group <= 4 ? launch<T, MT, 4>(g, stream) : launch<T, MT, 8>(g, stream);
}

} // namespace fkv

cudaError_t fkv_cuda_attend_launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a,
                                   cudaStream_t stream) {
    const fkv::Arguments g = {c, a, c.coded ? c.most_k_planes : 0, c.coded ? c.most_k_exacts : 0};
    const bool half = c.dtype == FKV_F16;
    if (c.coded && c.unit == 64) {
        return half ? fkv::by_heads<__half, 4>(g, stream)
                    : fkv::by_heads<__nv_bfloat16, 4>(g, stream);
    }
    return half ? fkv::by_heads<__half, 8>(g, stream) : fkv::by_heads<__nv_bfloat16, 8>(g, stream);
}
