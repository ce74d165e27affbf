/* SPDX-License-Identifier: Apache-2.0 */
/* The end of a work item: the sums of its warps, added in order, become an output or a part of one. */
#ifndef FKV_CUDA_ATTEND_END_CUH
#define FKV_CUDA_ATTEND_END_CUH

#include "attend.cuh"

#include <math_constants.h>

namespace fkv {

/* A warp's sum in exact items: [tiles][32], columns as in attend_exact.cuh. */
template <int H> __device__ float from_tile(const float4 *o, int row, int head) {
    const float *x = (const float *)(o + row / 16 * 32 + row % 8 * 4);
    const int half = row % 16 / 8 * 2;
    float y = x[head / 2 * 4 + head % 2 + half];
    if (H == 4) {
        y += x[(head + 4) / 2 * 4 + head % 2 + half];
    }
    return y;
}

/* In coded items: [tiles][32] of a quad, (row, row + 8). */
__device__ inline float from_coded(const float2 *o, int row, int head) {
    return ((const float *)(o + row / 16 * 32 + row % 8 * 4 + head))[row % 16 / 8];
}

/* Adds the warps' sums, in their order, of `rows` rows of a part; the planes of a channel follow each other. */
template <int H>
__device__ void add_planes(const Block<H> &b, const fkv_plane *planes, int rows, int first_row) {
    const int padded = (b.g.c.dim + 15) / 16 * 16;
    float *out = b.template as<float>(b.at.out);
    for (int i = b.thread; i < rows * H; i += kThreads) {
        const int h = i % H;
        int row = i / H;
        const fkv_plane p = planes[row];
        if (p.channel < 0 || p.index) {
            continue;
        }
        float all = 0.0f, by = 1.0f;
        do {
            float sum = 0.0f;
            for (int w = 0; w < kWarps; w++) {
                const float2 *o = (const float2 *)b.of_warp(w) + h / 4 * b.g.coded_tiles * 32;
                sum = fmaf(from_coded(o, first_row + row, h % 4), b.maxima()[w * H + h], sum);
            }
            all = fmaf(sum, by, all);
            by *= 4.0f;
            row++;
        } while (row < rows && planes[row].index && planes[row].channel == p.channel);
        out[h * padded + p.channel] += all;
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
__device__ void add_warps(const Block<H> &b, const fkv_cuda_item &item, const fkv_cuda_head &head) {
    const fkv_cuda_cache &c = b.g.c;
    const int padded = (c.dim + 15) / 16 * 16;
    float *out = b.template as<float>(b.at.out);
    if (!item.coded) {
        for (int i = b.thread; i < padded * H; i += kThreads) {
            const int d = i / H, h = i % H;
            float sum = 0.0f;
            for (int w = 0; w < kWarps; w++) {
                const float4 *o = (const float4 *)b.of_warp(w);
                sum = fmaf(from_tile<H>(o, d, h), b.maxima()[w * H + h], sum);
            }
            out[h * padded + d] = sum;
        }
        return;
    }
    const float *mu = b.template as<float>(b.at.v_mu);
    const uint8_t *kinds = b.template as<uint8_t>(b.at.v_kinds);
    for (int i = b.thread; i < padded * H; i += kThreads) {
        const int d = i / H, h = i % H;
        out[h * padded + d] = d < c.dim && kinds[d] != 2 ? b.total()[h] * mu[d] : 0.0f;
    }
    const fkv_plane *planes = b.template as<fkv_plane>(b.at.v_lists);
    __syncthreads();
    add_planes(b, planes, head.v_steps * 16, 0);
    add_planes(b, planes + head.v_steps * 16, head.v_exact * 16, head.v_steps * 16);
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

/* Parts of outputs come from other blocks, by way of the second-level cache; NEAR: they are in shared memory. */
template <bool NEAR> __device__ __forceinline__ float part_value(const float *p) {
    return NEAR ? *p : __ldcg(p);
}
template <bool NEAR> __device__ __forceinline__ float4 part_values(const float *p) {
    return NEAR ? *(const float4 *)p : __ldcg((const float4 *)p);
}

/* Largest score and sum of the item's heads over all parts; each part's share in `shares` [parts][H]. */
template <int H, bool NEAR>
__device__ void weigh_parts(const Block<H> &b, const fkv_cuda_item &item, const float *parts,
                            int stride, int group, float *shares) {
    for (int h = b.warp; h < H; h += kWarps) {
        float top = kLowest, sum = 0.0f;
        for (int i = b.lane; i < item.parts; i += 32) {
            float x = kLowest;
            if (h < item.q_count) {
                x = part_value<NEAR>(parts + ((size_t)i * group + h) * stride + b.g.c.dim);
            }
            shares[i * H + h] = x;
            top = fmaxf(top, x);
        }
        for (int i = 16; i; i /= 2) {
            top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
        }
        for (int i = b.lane; h < item.q_count && i < item.parts; i += 32) {
            const float share = fast_exp2(shares[i * H + h] - top);
            shares[i * H + h] = share;
            sum = fmaf(part_value<NEAR>(parts + ((size_t)i * group + h) * stride + b.g.c.dim + 1),
                       share, sum);
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
}

/* The parts of one output, in order: each of 4 groups of threads adds every fourth one, four channels at a time. `sums`
 * is what is free of the warps' own memory. */
template <int H, bool NEAR>
__device__ void merge_parts(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item,
                            const float *parts, float *sums) {
    const fkv_cuda_cache &c = b.g.c;
    const int stride = FKV_CUDA_PARTIAL(c.dim), group = min(c.group, FKV_CUDA_MAX_GROUP);
    const int padded = (c.dim + 15) / 16 * 16, words = c.dim / 4 * item.q_count;
    float *out = b.template as<float>(b.at.out), *shares = sums + kMergeGroups * H * padded;
    weigh_parts<H, NEAR>(b, item, parts, stride, group, shares);
    for (int j = b.thread; j < words * kMergeGroups; j += kThreads) {
        const int which = j % words, part = j / words;
        const int h = which / (c.dim / 4), d = which % (c.dim / 4) * 4;
        const float *from = parts + (size_t)h * stride + d;
        float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (int i = part; i < item.parts; i += kMergeGroups) {
            const float4 x = part_values<NEAR>(from + (size_t)i * group * stride);
            const float share = shares[i * H + h];
            o.x = fmaf(x.x, share, o.x), o.y = fmaf(x.y, share, o.y);
            o.z = fmaf(x.z, share, o.z), o.w = fmaf(x.w, share, o.w);
        }
        *(float4 *)(sums + (part * H + h) * padded + d) = o;
    }
    __syncthreads();
    for (int j = b.thread; j < item.q_count * c.dim; j += kThreads) {
        const int at = j / c.dim * padded + j % c.dim;
        float o = 0.0f;
        for (int part = 0; part < kMergeGroups; part++) {
            o += sums[part * H * padded + at];
        }
        out[at] = o;
    }
    __syncthreads();
    for (int h = b.warp; h < item.q_count; h += kWarps) {
        write_output(b, row, item, h, out + h * padded, b.total_max()[h], b.total()[h]);
    }
}

/* Brings the parts to shared memory in one piece, if they fit, and merges them. merged: how often this block did. */
template <int H>
__device__ void merge_output(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item,
                             uint32_t &merged) {
    const fkv_cuda_cache &c = b.g.c;
    const int stride = FKV_CUDA_PARTIAL(c.dim), group = min(c.group, FKV_CUDA_MAX_GROUP);
    const float *parts = (const float *)b.g.a.partials + (size_t)item.slot * group * stride;
    float *sums = (float *)b.of_warp(0); /* the warps' own memory is free by now */
#if FKV_BULK
    const int padded = (c.dim + 15) / 16 * 16;
    const int own = ((kMergeGroups * padded + item.parts) * H * 4 + 15) / 16 * 16;
    const int64_t bytes = (int64_t)item.parts * group * stride * 4;
    if (own + bytes <= b.at.bytes - b.at.warps) {
        uint64_t *barrier = b.template as<uint64_t>(b.at.barriers) + kWarps * kStages;
        float *near = (float *)(b.of_warp(0) + own);
        /* other blocks' writes and this one's of its sums, before the copy engine takes their places */
        asm volatile("fence.proxy.async;" ::: "memory");
        __syncthreads();
        if (!b.thread) {
            bulk_copy(near, parts, (uint32_t)bytes, barrier);
        }
        barrier_wait(barrier, merged & 1);
        merged++;
        merge_parts<H, true>(b, row, item, near, sums);
        return;
    }
#endif
    merge_parts<H, false>(b, row, item, parts, sums);
}

template <int H>
__device__ void end_item(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item,
                         unsigned *last, uint32_t &merged) {
    const fkv_cuda_cache &c = b.g.c;
    const int padded = (c.dim + 15) / 16 * 16;
    const float *out = b.template as<float>(b.at.out);
    if (item.parts == 1) {
        for (int h = b.warp; h < item.q_count; h += kWarps) {
            write_output(b, row, item, h, out + h * padded, b.total_max()[h], b.total()[h]);
        }
        return;
    }
    const int stride = FKV_CUDA_PARTIAL(c.dim), group = min(c.group, FKV_CUDA_MAX_GROUP);
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
        merge_output(b, row, item, merged);
    }
}

} // namespace fkv

#endif /* FKV_CUDA_ATTEND_END_CUH */
