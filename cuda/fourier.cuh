/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the kernels of Fourier caches share. A layer's attention is five launches, each of which may begin while the
 * one before it runs:
 *   bins      q . coefficients of K: the spectrum of each query head's score, for each segment
 *   grid      its transform: the score on the segment's grid
 *   attend    items: pages of kept channels, whose scores are completed from the grid and whose weights are spread
 *             on it, tile by tile (fourier_attend.cu); and exact pages
 *   mass      the weights' grids, gathered and transformed: spectra again
 *   output    spectra . coefficients of V, added to what the items have of kept channels and exact tokens
 * Everything is summed in an order that depends on the work alone.
 */
#ifndef FKV_CUDA_FOURIER_CUH
#define FKV_CUDA_FOURIER_CUH

#include "common.cuh"

namespace fkv {

constexpr float kToLog2 = 1.4426950408889634f;
constexpr float kNothing = -1e30f; /* stands for -infinity where differences are taken */
constexpr int kWeightBits = 10;    /* weights are times 2^this, as in attend.cuh */

/* Tiles of a wave that its query sees, at least in part. */
__device__ __forceinline__ int visible_tiles(const fkv_cuda_cache &c, const fkv_cuda_attend &a,
                                             const fkv_cuda_row &row, const fkv_cuda_wave &wave,
                                             const fkv_cuda_spectrum &sp) {
    const int visible = (a.appended ? row.base + wave.query + 1 : row.base) - c.sinks;
    const int tiles = (visible + 63) / 64 - wave.segment * sp.per_segment;
    return visible <= 0 ? 0 : max(0, min(tiles, wave.tiles));
}

/* The parts of a segment. */
struct Segment {
    const char *coefficients;
    const float *ones;
    const fkv_cuda_state *states;
};

__host__ __device__ inline size_t ones_at(int rows, int stride, int dtype) {
    return ((size_t)rows * stride * (dtype == FKV_F32 ? 4 : 2) + 15) / 16 * 16;
}

__device__ __forceinline__ Segment segment_at(const char *page, int rows, int stride, int dtype) {
    const char *ones = page + ones_at(rows, stride, dtype);
    return {page, (const float *)ones, (const fkv_cuda_state *)(ones + (size_t)stride * 4)};
}

__device__ __forceinline__ Segment segment_of(const fkv_cuda_cache &c, const fkv_cuda_attend &a,
                                              const fkv_cuda_row &row, int segment, int stride) {
    const char *page =
        (const char *)((const uint64_t *)row.segments)[a.layer * row.segment_slots + segment];
    return segment_at(page, a.coded_rows, stride, c.coefficients);
}

/* Eight coefficients from `at` on, a multiple of 8. */
__device__ __forceinline__ void load_eight(const void *base, size_t at, int dtype, float (&x)[8]) {
    if (dtype == FKV_F32) {
        const float4 *from = (const float4 *)((const float *)base + at);
        const float4 u = from[0], v = from[1];
        x[0] = u.x, x[1] = u.y, x[2] = u.z, x[3] = u.w;
        x[4] = v.x, x[5] = v.y, x[6] = v.z, x[7] = v.w;
        return;
    }
    const uint4 u = *(const uint4 *)((const uint16_t *)base + at);
    const uint32_t words[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = Element<__half>::value((uint16_t)(words[i] & 0xffff));
        x[2 * i + 1] = Element<__half>::value((uint16_t)(words[i] >> 16));
    }
}

__device__ __forceinline__ float2 times(float2 a, float2 b) {
    return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}

/* Position of element i in shared memory: no two lanes of a pass in the same bank. */
__device__ __forceinline__ int spaced(int i) {
    return i + (i >> 4);
}
inline size_t transform_bytes(int log_fft) {
    const size_t n = (size_t)1 << log_fft;
    return (n + n / 16) * sizeof(float2);
}

__device__ __forceinline__ int reversed(int i, int log_n) {
    return log_n ? (int)(__brev((unsigned)i) >> (32 - log_n)) : 0;
}

/*
 * K stages of a transform of 2^log_n points, in place: halves h 2^(K-1) .. h of a decimation in frequency, whose
 * result is bit-reversed, or h .. h 2^(K-1) of a decimation in time, which takes that back. Backwards: with
 * e^(+i..).
 */
template <int K, bool InTime, bool Backwards>
__device__ void transform_pass(float2 *x, int log_n, int log_h, const float2 *twiddles) {
    constexpr int size = 1 << K;
    const int groups = 1 << (log_n - K), h = 1 << log_h;
    for (int g = threadIdx.x; g < groups; g += blockDim.x) {
        const int r = g & (h - 1), base = (g >> log_h) * (h << K) + r;
        float2 e[size];
#pragma unroll
        for (int m = 0; m < size; m++) {
            e[m] = x[spaced(base + m * h)];
        }
#pragma unroll
        for (int i = 0; i < K; i++) {
            const int s = InTime ? i : K - 1 - i;
#pragma unroll
            for (int m = 0; m < size; m++) {
                if (m >> s & 1) {
                    continue;
                }
                const int k = (m & ((1 << s) - 1)) * h + r, other = m | 1 << s;
                float2 w = twiddles[(size_t)k << (log_n - 1 - log_h - s)];
                if (Backwards) {
                    w.y = -w.y;
                }
                if (InTime) {
                    const float2 v = times(e[other], w);
                    e[other] = make_float2(e[m].x - v.x, e[m].y - v.y);
                    e[m] = make_float2(e[m].x + v.x, e[m].y + v.y);
                } else {
                    const float2 d = make_float2(e[m].x - e[other].x, e[m].y - e[other].y);
                    e[m] = make_float2(e[m].x + e[other].x, e[m].y + e[other].y);
                    e[other] = times(d, w);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < size; m++) {
            x[spaced(base + m * h)] = e[m];
        }
    }
    __syncthreads();
}

/* By all threads of a block, which are in step before and after. */
template <bool InTime, bool Backwards>
__device__ void transform(float2 *x, int log_n, const float2 *twiddles) {
    int done = 0; /* stages */
    while (done < log_n) {
        const int k = min(3, log_n - done), log_h = InTime ? done : log_n - done - k;
        if (k == 3) {
            transform_pass<3, InTime, Backwards>(x, log_n, log_h, twiddles);
        } else if (k == 2) {
            transform_pass<2, InTime, Backwards>(x, log_n, log_h, twiddles);
        } else {
            transform_pass<1, InTime, Backwards>(x, log_n, log_h, twiddles);
        }
        done += k;
    }
}

/* z := the convolution of z with the chirp, or its adjoint. */
template <bool Adjoint> __device__ void convolve(float2 *z, const fkv_cuda_spectrum &sp) {
    const float2 *twiddles = (const float2 *)sp.twiddles, *kernel = (const float2 *)sp.kernel;
    transform<false, false>(z, sp.log_fft, twiddles);
    for (int i = threadIdx.x; i < 1 << sp.log_fft; i += blockDim.x) {
        float2 k = kernel[i];
        if (Adjoint) {
            k.y = -k.y;
        }
        z[spaced(i)] = times(z[spaced(i)], k);
    }
    __syncthreads();
    transform<true, true>(z, sp.log_fft, twiddles);
}

/* Launches that may begin before the one in front has ended, from 9.0 on. */
inline bool launches_early(int device) {
    static int major[64];
    int value = device < 64 ? major[device] : 0;
    if (!value &&
        cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        device < 64) {
        major[device] = value;
    }
    return value >= 9;
}

template <typename... Parameters, typename... Given>
cudaError_t launch_early(void (*kernel)(Parameters...), int grid, int threads, size_t shared,
                         bool early, cudaStream_t stream, Given &&...given) {
    int device;
    cudaError_t e = cudaGetDevice(&device);
    if (e != cudaSuccess) {
        return e;
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)grid);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early && launches_early(device) ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, (Parameters)given...);
}

} // namespace fkv

/* fourier_attend.cu: the items */
cudaError_t fkv_cuda_fourier_items_launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a,
                                          cudaStream_t stream);

#endif /* FKV_CUDA_FOURIER_CUH */
