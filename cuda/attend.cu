/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention: one launch. A block of 8 warps takes work items, each a range of tokens of one KV head for the query
 * heads of one query token. Its warps take pages, or the units of a span, in turns; at the end of an item their
 * sums are added in order. An output made of several items is merged, in order as well, by the block that ends
 * last; so results do not depend on scheduling.
 */
#include "attend_end.cuh"
#include "attend_exact.cuh"
#include "attend_span.cuh"

namespace fkv {

/* A warp's sums of values are zero; its maxima and sums of weights are written when it is done. */
template <int H> __device__ void clear_sums(const Block<H> &b) {
    float4 *o = (float4 *)b.of_warp(b.warp);
    const int coded = b.g.coded_tiles * 256 * (H / 4), exact = b.g.exact_tiles * 512;
    for (int t = b.lane; t < max(coded, exact) / 16; t += 32) {
        o[t] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#if FKV_BULK
    /* units are copied to where this is, by another way to memory */
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

template <typename T, int H, bool CODED>
__device__ void run_exact(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item,
                          uint32_t &passed) {
    Running r = {{kLowest, kLowest}, {0.0f, 0.0f}};
    const EarlyQuery<H> early = begin_query(b, row, item);
    /* the append in front of this launch may still be under way: tokens from row.base on are its own */
    const int last = item.first + item.count - item.sink; /* behind the item's last entry */
    if (b.g.a.follows && (item.sink || b.g.c.sinks + (last - 1) * 64 > row.base)) {
        await_launch();
    }
    float4 *o = (float4 *)b.of_warp(b.warp);
#if FKV_BULK
    Ring ring;
    if (!CODED) {
        ring = begin_ring(b, row, item, passed);
    }
#endif
    load_query(b, row, item, 1.0f, early);
    __syncthreads();
    make_factors<T, H>(b);
    __syncthreads();
#if FKV_BULK
    if (!CODED) {
        ring_item<T, H>(b, row, item, r, o, ring);
        passed = ring.taken;
    } else
#endif
    {
        exact_item<T, H>(b, row, item, r, o);
    }
    if (b.lane < H / 2) {
        for (int c = 0; c < 2; c++) {
            b.maxima()[b.warp * H + b.lane * 2 + c] = r.max[c];
            b.sums()[b.warp * H + b.lane * 2 + c] = r.sum[c];
        }
    }
}

template <typename T, int MT, int H, bool FAR>
__device__ void run_coded(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item,
                          const fkv_cuda_head &head, uint32_t &passed) {
    CodedRunning r[H / 4];
#pragma unroll
    for (int quad = 0; quad < H / 4; quad++) {
        r[quad] = {kLowest, 0.0f};
    }
    if (!FAR || head.bytes <= b.g.stage) {
        coded_item<T, MT, H, true>(b, row, item, head, r, passed);
    } else {
        coded_item<T, MT, H, !FAR>(b, row, item, head, r, passed);
    }
#pragma unroll
    for (int quad = 0; quad < H / 4; quad++) {
        if (b.lane < 4) {
            b.maxima()[b.warp * H + quad * 4 + b.lane] = r[quad].max;
            b.sums()[b.warp * H + quad * 4 + b.lane] = r[quad].sum;
        }
    }
}

/* MT: tiles of a unit, 0 in exact caches. FAR: some units are read where they lie; without that code the kernel fits
 * better in the cache of instructions. */
template <typename T, int MT, int H, bool FAR>
__global__ __launch_bounds__(kThreads,
                             16 / kWarps) void attend_kernel(const __grid_constant__ Arguments g) {
    extern __shared__ __align__(128) char memory[];
    __shared__ unsigned last;
    const Block<H> b(g, memory);
    const int n_items = __ldg((const int *)g.a.n_items);
    __shared__ int taken;
    __shared__ Work work;
    const fkv_cuda_item &item = work.item;
    const fkv_cuda_row &row = work.row;
    const fkv_cuda_head &head = work.head;
    uint32_t merged = 0; /* outputs */
    uint32_t passed = 0; /* chunks through this warp's ring, or units through its places */
    if (MT) {            /* waited for with the first item's profile */
        const auto copy = [&](int to, uint64_t from, int bytes) {
            for (int i = b.thread * 16; i < bytes; i += kThreads * 16) {
                copy_async(memory + to + i, (const char *)from + i);
            }
        };
        copy(b.at.basis, g.c.basis, basis_bytes(g.c));
        copy(b.at.turns, g.c.turns, FKV_SPAN * g.c.fast * 8);
        if (g.near) {
            copy(b.at.project, g.c.project, project_bytes(g.c));
            copy(b.at.inv_freq, g.c.inv_freq, g.c.rope_dim / 2 * 8);
        }
        copies_commit();
    }
#if FKV_BULK
    if (b.thread <= kWarps * kStages) {
        barrier_init(b.template as<uint64_t>(b.at.barriers) + b.thread);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
#endif
    for (int i = blockIdx.x;;) {
        clear_sums(b);
        fetch_work(g, i, n_items, &work);
        if (i >= n_items) {
            break;
        }
        if (!b.thread) {
            /* one for every item altogether; who draws the last sets the counter back */
            unsigned *counter = (unsigned *)g.a.counters;
            const unsigned drawn = atomicAdd(counter, 1);
            if (drawn == (unsigned)n_items - 1) {
                *counter = 0;
            }
            taken = gridDim.x + drawn;
        }
        __syncthreads();
        if (MT && item.coded) {
            run_coded<T, MT ? MT : 4, H, FAR>(b, row, item, head, passed);
        } else {
            run_exact<T, H, MT != 0>(b, row, item, passed);
        }
        __syncthreads();
        total_sums(b);
        i = taken;
        __syncthreads();
        add_warps(b, item, head);
        __syncthreads();
        end_item(b, row, item, &last, merged);
        __syncthreads();
    }
}

/* Whether a launch may begin before the one in front of it has ended: from 9.0 on. */
inline bool can_begin_early(int device) {
    static int major[64];
    int value = device < 64 ? major[device] : 0;
    if (!value &&
        cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        device < 64) {
        major[device] = value;
    }
    return value >= 9;
}

template <typename T, int MT, int H, bool FAR>
cudaError_t launch(Arguments &g, cudaStream_t stream) {
    const Shared at = g.at = layout<H>(g);
    static int allowed[64]; /* by device; the attribute may be set twice, that is harmless */
    int device;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess && (device >= 64 || allowed[device] < at.bytes)) {
        e = cudaFuncSetAttribute(attend_kernel<T, MT, H, FAR>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, at.bytes);
        if (e == cudaSuccess && device < 64) {
            allowed[device] = at.bytes;
        }
    }
    if (e != cudaSuccess) {
        return e;
    }
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(g.a.grid);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = at.bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = g.a.follows && can_begin_early(device) ? 1 : 0;
    return cudaLaunchKernelEx(&config, attend_kernel<T, MT, H, FAR>, (const Arguments &)g);
}

/* Room for units such that two blocks fit on a multiprocessor. Parts of larger ones are read where they lie. */
template <int H> void choose_stage(Arguments &g) {
    const int exact_tiles = g.exact_tiles;
    g.exact_tiles = 0; /* their sums may take the units' place */
    const int most = (kRoom - layout<H>(g).used) / kWarps / 128 * 128;
    g.exact_tiles = exact_tiles;
    g.stage = (g.c.most_bytes + 127) / 128 * 128;
    if (g.stage > most) {
        g.stage = most > 0 ? most : 0;
    }
    g.near = 1;
    g.near = g.c.rope_dim % 4 == 0 && layout<H>(g).used <= kRoom;
}

template <typename T, int MT, int H> cudaError_t by_room(Arguments &g, cudaStream_t stream) {
    if (MT) {
        choose_stage<H>(g);
    }
    return MT && g.stage < g.c.most_bytes ? launch<T, MT, H, MT != 0>(g, stream)
                                          : launch<T, MT, H, false>(g, stream);
}

template <typename T, int MT> cudaError_t by_heads(Arguments &g, cudaStream_t stream) {
    return g.c.group <= 4 ? by_room<T, MT, 4>(g, stream) : by_room<T, MT, 8>(g, stream);
}

template <typename T> cudaError_t by_unit(Arguments &g, cudaStream_t stream) {
    return !g.c.coded       ? by_heads<T, 0>(g, stream)
           : g.c.unit == 64 ? by_heads<T, 4>(g, stream)
                            : by_heads<T, 8>(g, stream);
}

} // namespace fkv

cudaError_t fkv_cuda_attend_launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a,
                                   cudaStream_t stream) {
    fkv::Arguments g = {c, a, 0, 0, 0, 0, 0, (c.dim + 15) / 16, {}};
    if (c.coded) {
        g.k_planes = c.most_k_planes;
        g.k_exacts = c.most_k_exacts;
        g.coded_tiles = c.panels;
    }
    return c.dtype == FKV_F16 ? fkv::by_unit<__half>(g, stream)
                              : fkv::by_unit<__nv_bfloat16>(g, stream);
}
