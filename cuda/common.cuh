/* SPDX-License-Identifier: Apache-2.0 */
/* Pieces that the kernels share: streaming loads, matrix instructions, element types, the caller's views. */
#ifndef FKV_CUDA_COMMON_CUH
#define FKV_CUDA_COMMON_CUH

#include "backend_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FKV_F32 1
#define FKV_F16 2
#define FKV_BF16 3

namespace fkv {

/* Read once: not kept in the first-level cache. */
__device__ __forceinline__ uint4 stream16(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

/* 16 bytes to shared memory, in the background. */
__device__ __forceinline__ void copy_async(void *to, const void *p) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
        "l"(p)
        : "memory");
}
/* 8 bytes */
__device__ __forceinline__ void copy_async8(void *to, const void *p) {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
        "l"(p)
        : "memory");
}
__device__ __forceinline__ void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/* For all copies, or all but those of the last group. */
__device__ __forceinline__ void copies_wait(bool but_last) {
    if (but_last) {
        asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
}

__device__ __forceinline__ void prefetch(const void *p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FKV_BULK 1 /* copies by the copy engine */
#else
#define FKV_BULK 0
#endif

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* What the launch before has written is there behind this, if this launch was allowed to begin early. */
__device__ __forceinline__ void await_launch() {
#if FKV_BULK
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* The next launch may begin when all blocks have said this or ended. */
__device__ __forceinline__ void release_launch() {
#if FKV_BULK
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* `bytes` (a multiple of 16) to the second-level cache, by one thread. */
__device__ __forceinline__ void prefetch_block(const void *p, uint32_t bytes) {
#if FKV_BULK
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#else
    for (uint32_t i = 0; i < bytes; i += 128) {
        prefetch((const char *)p + i);
    }
#endif
}

#if FKV_BULK
__device__ __forceinline__ void barrier_init(uint64_t *barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier))
                 : "memory");
}

/* One thread: `bytes` from p to shared memory; the barrier's phase ends when they are there. What is read once leaves
 * the second-level cache first, so that what every launch needs stays there. */
__device__ __forceinline__ void bulk_copy(void *to, const void *p, uint32_t bytes,
                                          uint64_t *barrier) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
                 "l"(p), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t *barrier, uint32_t parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again%=:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again%=;\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}
#endif

/* 16 bytes of shared memory. Not moved behind the instructions that follow, as compilers do to save registers: so
 * several loads are under way at once. */
__device__ __forceinline__ uint4 load_now(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address));
    return v;
}

template <typename T> struct Element;

template <> struct Element<__half> {
    static __device__ __forceinline__ uint32_t pack(float a, float b) {
        __half2 h = __floats2half2_rn(a, b);
        return *reinterpret_cast<uint32_t *>(&h);
    }
    /* x cut off to as many bits as an element has. */
    static __device__ __forceinline__ float high(float x) {
        return __uint_as_float(__float_as_uint(x) & 0xffffe000);
    }
    static __device__ __forceinline__ void mma(float (&c)[4], const uint4 &a, uint32_t b0,
                                               uint32_t b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, "
                     "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    }
    static __device__ __forceinline__ uint16_t bits(float x) {
        return __half_as_ushort(__float2half_rn(x));
    }
    static __device__ __forceinline__ float value(uint16_t x) {
        return __half2float(__ushort_as_half(x));
    }
};

template <> struct Element<__nv_bfloat16> {
    static __device__ __forceinline__ uint32_t pack(float a, float b) {
        __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
        return *reinterpret_cast<uint32_t *>(&h);
    }
    static __device__ __forceinline__ float high(float x) {
        return __uint_as_float(__float_as_uint(x) & 0xffff0000);
    }
    static __device__ __forceinline__ void mma(float (&c)[4], const uint4 &a, uint32_t b0,
                                               uint32_t b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                     "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    }
    static __device__ __forceinline__ uint16_t bits(float x) {
        return __bfloat16_as_ushort(__float2bfloat16_rn(x));
    }
    static __device__ __forceinline__ float value(uint16_t x) {
        return __bfloat162float(__ushort_as_bfloat16(x));
    }
};

/* Transposes an 8 x 8 matrix of 16-bit elements held by a warp. */
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 2^e for e in the range of normal numbers */
__device__ __forceinline__ float power2(int e) {
    e = e < -126 ? -126 : e > 127 ? 127 : e;
    return __int_as_float((e + 127) << 23);
}

/* e with 2^e <= x < 2^(e + 1); -100 for 0 */
__device__ __forceinline__ int exponent(float x) {
    int e = (int)(__float_as_uint(x) >> 23 & 255) - 127;
    return e < -100 ? -100 : e;
}

__device__ __forceinline__ const char *row_at(const fkv_cuda_view &v, int64_t token, int head) {
    return (const char *)v.data + token * v.token_stride + head * v.head_stride;
}

__device__ __forceinline__ float load_element(const char *row, int dtype, int d) {
    if (dtype == FKV_F32) {
        return ((const float *)row)[d];
    }
    const uint16_t bits = ((const uint16_t *)row)[d];
    const float half = Element<__half>::value(bits), other = Element<__nv_bfloat16>::value(bits);
    return dtype == FKV_F16 ? half : other; /* no branch, so that loads can go ahead */
}

__device__ __forceinline__ void store_element(char *row, int dtype, int d, float x) {
    if (dtype == FKV_F32) {
        ((float *)row)[d] = x;
    } else {
        ((uint16_t *)row)[d] =
            dtype == FKV_F16 ? Element<__half>::bits(x) : Element<__nv_bfloat16>::bits(x);
    }
}

/* Elements before (r, c) in a fragment. */
__device__ __forceinline__ int in_fragment(int r, int c) {
    return ((r % 8 * 4 + c % 8 / 2) * 4 + r / 8 + 2 * (c / 8)) * 2 + c % 2;
}
/* Elements before K[token][channel] or V[token][channel] of a head in a page; `token` is within it. */
__device__ __forceinline__ int in_page(int token, int channel, bool value) {
    const int fragment = channel / 16 * 4 + token / 16;
    return fragment * 256 +
           (value ? in_fragment(channel % 16, token % 16) : in_fragment(token % 16, channel % 16));
}

/* A token's number in the order of its unit, and the other way round: see backend_cuda.h. */
__device__ __forceinline__ int in_order(int unit, int token) {
    return token < unit / 2 ? unit / 2 - 1 - token : token;
}

/* Where a code lies in its part's codes: word, and lowest bit; see backend_cuda.h. `tiles` of 16 tokens a unit;
 * `token` is in order. */
struct Place {
    int word, bit;
};
__device__ __forceinline__ Place place_in_k(int steps, int tiles, int plane, int token) {
    const int tile = token / 16, r = token % 16, panel = plane / 16, k = plane % 16;
    const int lane = r % 8 * 4 + k / 4, bit = k % 4 * 8 + tile % 4 * 2;
    if ((panel | 1) < steps) {
        return {panel / 2 * tiles * 32 + (tile / 4 * 32 + lane) * 4 + r / 8 + panel % 2 * 2, bit};
    }
    return {panel * tiles * 16 + lane * (tiles / 2) + tile / 4 * 2 + r / 8, bit};
}
__device__ __forceinline__ Place place_in_v(int tiles, int plane, int token) {
    const int tile = token / 16, r = token % 16, step = tile / 2, each = tiles / 4;
    const int lane = plane % 8 * 4 + r % 8 / 2;
    return {plane / 16 * tiles * 16 + lane * (tiles / 2) + step % each * 2 + tile % 2,
            (r % 2 * 2 + r / 8) * 8 + (step / each * 2 + plane % 16 / 8) * 2};
}

/* Whether d is the first of its RoPE pair, the pair's number, and the other channel. pair -1: none */
__device__ __forceinline__ int rope_pair(const fkv_cuda_cache &c, int d, int *other, bool *first) {
    const int pairs = c.rope_dim / 2;
    if (d >= c.rope_dim) {
        return -1;
    }
    if (c.rope_layout == 2) {
        *first = d % 2 == 0;
        *other = d ^ 1;
        return d / 2;
    }
    *first = d < pairs;
    *other = *first ? d + pairs : d - pairs;
    return d % pairs;
}

/* x[d] after RoPE, in the order of operations of the CPU. `rope` is the table's column of the token. */
__device__ __forceinline__ float rotated(const fkv_cuda_cache &c, const char *row, int dtype, int d,
                                         const float *rope, int64_t capacity) {
    const float x = load_element(row, dtype, d);
    int other;
    bool first;
    const int pair = rope_pair(c, d, &other, &first);
    if (pair < 0) {
        return x;
    }
    const float y = load_element(row, dtype, other);
    const float co = rope[pair * capacity], si = rope[(c.rope_dim / 2 + pair) * capacity];
    return first ? __fsub_rn(__fmul_rn(x, co), __fmul_rn(y, si))
                 : __fadd_rn(__fmul_rn(x, co), __fmul_rn(y, si));
}

} // namespace fkv

/* The launchers, one for each file. */
cudaError_t fkv_cuda_patch_launch(uint64_t patches, int count, cudaStream_t stream);
cudaError_t fkv_cuda_rope_launch(const fkv_cuda_cache &c, uint64_t positions, int tokens,
                                 uint64_t rope, int64_t capacity, cudaStream_t stream);
cudaError_t fkv_cuda_append_launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a,
                                   const fkv_cuda_view &k, const fkv_cuda_view &v, int max_tokens,
                                   cudaStream_t stream);
cudaError_t fkv_cuda_attend_launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a,
                                   cudaStream_t stream);
cudaError_t fkv_cuda_seal_launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a, uint64_t seals,
                                 int count, cudaStream_t stream);
cudaError_t fkv_cuda_read_launch(const fkv_cuda_cache &c, uint64_t table, int64_t slots, int layer,
                                 int part, int64_t coded, int64_t first, int64_t count,
                                 const fkv_cuda_view &out, cudaStream_t stream);
/* Of Fourier caches. */
cudaError_t fkv_cuda_fourier_launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a,
                                    cudaStream_t stream);
cudaError_t fkv_cuda_fold_launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a, uint64_t seals,
                                 int n_seals, uint64_t folds, int n_folds, int most_bins,
                                 cudaStream_t stream);
cudaError_t fkv_cuda_read_fourier_launch(const fkv_cuda_cache &c, const fkv_cuda_row &row,
                                         int layer, int part, int coded_rows, int64_t coded,
                                         int64_t first, int64_t count, const fkv_cuda_view &out,
                                         cudaStream_t stream);

#endif /* FKV_CUDA_COMMON_CUH */
