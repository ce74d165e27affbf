/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Coding blocks: a thread block takes K or V of one KV head of one unit. The same integers and scales as the CPU's:
 * every operation that rounds is written out, so that none is contracted.
 */
#include "common.cuh"

namespace fkv {

constexpr int kThreads = 256;

struct Range {
    uint16_t scale, zero;
    float inverse, origin;
};

/* The neighbour of a finite f16 towards -infinity. */
__device__ inline uint16_t half_below(uint16_t h) {
    return h == 0 ? 0x8001 : (uint16_t)(h & 0x8000 ? h + 1 : h - 1);
}

__device__ inline Range range_of(float low, float high, bool finite, int bits) {
    if (!finite) {
        return {0, 0x7e00, 0.0f, 0.0f};
    }
    uint16_t zero = Element<__half>::bits(low);
    if (low == high) {
        return {0, zero, 0.0f, 0.0f};
    }
    low = fmaxf(low, -65504.0f);
    if (Element<__half>::value(zero) > low) {
        zero = half_below(zero);
    }
    const float origin = Element<__half>::value(zero);
    const float step = __fdiv_rn(__fsub_rn(high, origin), (float)((1 << bits) - 1));
    uint16_t scale = Element<__half>::bits(step);
    if (Element<__half>::value(scale) < step) {
        scale++;
    }
    return {scale, zero, __fdiv_rn(1.0f, Element<__half>::value(scale)), origin};
}

__device__ inline unsigned code_of(const Range &g, float x, int bits) {
    const float top = (float)((1 << bits) - 1);
    const float code = rintf(__fmul_rn(__fsub_rn(x, g.origin), g.inverse));
    return code > 0.0f ? (unsigned)(code < top ? code : top) : 0;
}

struct Part {
    int steps, exacts;
    const fkv_plane *planes, *wide;
    char *codes, *exact, *scales;
};

__device__ inline Part part_of(const fkv_cuda_cache &c, const fkv_cuda_head &h, char *blob,
                               bool v) {
    const int panel = c.unit * 4, steps = v ? h.v_steps : h.k_steps;
    const int exacts = v ? h.v_exact : h.k_exact;
    char *codes = blob + (v ? h.k_bytes : 0);
    char *exact = codes + steps * panel, *scales = exact + exacts * panel * 8;
    const fkv_plane *planes = (const fkv_plane *)c.planes;
    return {steps,
            exacts,
            planes + (v ? h.v_planes : h.k_planes),
            planes + (v ? h.v_exacts : h.k_exacts),
            codes,
            exact,
            scales};
}

/* values[d][t] := the unit's elements, `stride` apart */
__device__ inline void load_unit(const fkv_cuda_cache &c, const uint64_t *table, int tile, int head,
                                 bool v, uint16_t *values, int stride) {
    const int panels = (c.dim + 15) / 16;
    for (int i = threadIdx.x; i < c.unit / 64 * panels * 128; i += kThreads) {
        const int lane = i % 32, fragment = i / 32 % (panels * 4), page = i / 32 / (panels * 4);
        const char *from = (const char *)table[1 + tile + page] + (size_t)head * panels * 4096 +
                           (v ? panels * 2048 : 0);
        const uint4 x = stream16(from + (fragment * 32 + lane) * 16);
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int r = lane / 4 + j / 2 % 2 * 8, col = lane % 4 * 2 + j % 2 + j / 4 * 8;
            const int d = fragment / 4 * 16 + (v ? r : col);
            const int t = page * 64 + fragment % 4 * 16 + (v ? col : r);
            values[d * stride + t] = (uint16_t)(words[j / 2] >> 16 * (j % 2));
        }
    }
}

/* Residuals of one channel: the lane's tokens lane, lane + 32, .. */
template <typename T, int N>
__device__ inline void residuals(const fkv_cuda_cache &c, const uint16_t *values, int d,
                                 const float *mu, bool v, const float *rope, int64_t capacity,
                                 float (&x)[N]) {
    const int lane = threadIdx.x % 32;
    int other = d;
    bool first = true;
    const int pair = v ? -1 : rope_pair(c, d, &other, &first);
    const float u = mu[d], w = first ? -mu[other] : mu[other];
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int t = lane + 32 * i;
        float carrier = u;
        if (pair >= 0) {
            const float co = rope[pair * capacity + t];
            const float si = rope[(c.rope_dim / 2 + pair) * capacity + t];
            carrier = __fadd_rn(__fmul_rn(u, co), __fmul_rn(w, si));
        }
        x[i] = __fsub_rn(Element<T>::value(values[t]), carrier);
    }
}

template <int N> __device__ inline Range measure(const float (&x)[N], int bits) {
    float low = x[0], high = x[0];
    bool finite = true;
#pragma unroll
    for (int i = 0; i < N; i++) {
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
        finite = finite && fabsf(x[i]) < INFINITY;
    }
    for (int d = 16; d; d /= 2) {
        low = fminf(low, __shfl_xor_sync(~0u, low, d));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, d));
    }
    return range_of(low, high, __all_sync(~0u, finite), bits);
}

/* Bits of the channel whose first plane is planes[i]: codes of 3 bits take two planes. */
__device__ inline int bits_of(const fkv_cuda_cache &c, const fkv_plane *planes, int i, int n,
                              const uint8_t *kinds) {
    int count = 0;
    for (int j = i; j < n && planes[j].channel == planes[i].channel; j++) {
        count++;
    }
    return count == 2 && kinds[planes[i].channel] == 1 ? 3 : 2 * count;
}

/* The word number i of K's codes: where place_in_k() puts them. codes: [planes][16 TILES], tokens in order */
template <int TILES>
__device__ inline uint32_t gather_k(const uint8_t *codes, int steps, int i) {
    constexpr int unit = TILES * 16;
    const int pair = i / (2 * unit), within = i % (2 * unit);
    const bool paired = 2 * pair + 1 < steps;
    const int lane = paired ? within / 4 % 32 : within / (TILES / 2);
    const int r = paired ? within % 4 : within % 2;
    const int j = paired ? within / 128 : within % (TILES / 2) / 2;
    const uint8_t *from = codes + (pair * 32 + r / 2 * 16 + lane % 4 * 4) * unit + j * 64 +
                          lane / 4 + r % 2 * 8;
    uint32_t word = 0;
#pragma unroll
    for (int b = 0; b < 4; b++) {
#pragma unroll
        for (int p = 0; p < 4; p++) {
            word |= (uint32_t)from[b * unit + p * 16] << (8 * b + 2 * p);
        }
    }
    return word;
}

template <int TILES> __device__ inline uint32_t gather_v(const uint8_t *codes, int i) {
    constexpr int unit = TILES * 16;
    const int panel = i / unit, lane = i % unit / (TILES / 2), w = i % (TILES / 2);
    const uint8_t *from =
        codes + (panel * 16 + lane / 4) * unit + w * 16 + lane % 4 * 2;
    uint32_t word = 0;
#pragma unroll
    for (int b = 0; b < 4; b++) {
#pragma unroll
        for (int p = 0; p < 4; p++) {
            word |= (uint32_t)from[p % 2 * 8 * unit + p / 2 * (unit / 2) + b / 2 + b % 2 * 8]
                    << (8 * b + 2 * p);
        }
    }
    return word;
}

template <typename T, int N>
__global__ __launch_bounds__(kThreads) void seal_kernel(const fkv_cuda_cache c,
                                                        const fkv_cuda_attend a,
                                                        const fkv_cuda_seal *seals) {
    extern __shared__ __align__(16) char memory[];
    constexpr int unit = N * 32, stride = unit + 2;
    const fkv_cuda_seal seal = seals[blockIdx.x / c.units_per_block];
    const fkv_cuda_row row = ((const fkv_cuda_row *)a.rows)[seal.row];
    const int within = blockIdx.x % c.units_per_block, head_index = blockIdx.y;
    const bool v = blockIdx.z;
    const int padded = (c.dim + 15) / 16 * 16, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const fkv_cuda_head head =
        ((const fkv_cuda_head *)c.heads)[a.layer * c.n_kv_heads + head_index];
    char *blob =
        (char *)seal.block + within * (size_t)((const int *)c.unit_bytes)[a.layer] + head.offset;
    const Part part = part_of(c, head, blob, v);
    const float *mu =
        (const float *)c.carriers + ((size_t)(a.layer * 2 + v) * c.n_kv_heads + head_index) * c.dim;
    const uint8_t *kinds =
        (const uint8_t *)c.kinds + ((size_t)(a.layer * 2 + v) * c.n_kv_heads + head_index) * c.dim;
    const int tile = seal.tile + within * (unit / 64), n = part.steps * 16;
    const float *rope =
        (const float *)a.rope + row.rope_offset + c.sinks + tile * 64 - row.rope_first;
    uint16_t *values = (uint16_t *)memory;
    uint8_t *codes = (uint8_t *)(values + padded * stride); /* [planes][unit] */
    __shared__ int top;
    if (!threadIdx.x) {
        top = -24;
    }
    load_unit(c, (const uint64_t *)row.table + a.layer * row.slots, tile, head_index, v, values,
              stride);
    __syncthreads();
    for (int i = warp; i < n; i += kThreads / 32) {
        const fkv_plane p = part.planes[i];
        uint16_t *scale = (uint16_t *)part.scales + (v ? 2 * i : i);
        uint16_t *zero = scale + (v ? 1 : n);
        if (p.channel < 0) {
            for (int j = 0; j < N; j++) {
                codes[i * unit + in_order(unit, lane + 32 * j)] = 0;
            }
            *scale = *zero = 0;
        }
        if (p.channel < 0 || p.index) {
            continue;
        }
        float x[N];
        const int bits = bits_of(c, part.planes, i, n, kinds), planes = (bits + 1) / 2;
        residuals<T, N>(c, values + p.channel * stride, p.channel, mu, v, rope, a.rope_capacity, x);
        const Range g = measure<N>(x, bits);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const unsigned code = code_of(g, x[j], bits);
            for (int k = 0; k < planes; k++) {
                codes[(i + k) * unit + in_order(unit, lane + 32 * j)] = code >> 2 * k & 3;
            }
        }
        if (lane < planes) {
            scale[v ? 2 * lane : lane] = g.scale;
            zero[v ? 2 * lane : lane] = lane ? 0 : g.zero;
        }
        if (!lane) {
            atomicMax(&top, exponent(Element<__half>::value(g.scale)) + 2 * (planes - 1));
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < part.steps * unit; i += kThreads) {
        ((uint32_t *)part.codes)[i] =
            v ? gather_v<unit / 16>(codes, i) : gather_k<unit / 16>(codes, part.steps, i);
    }
    for (int i = threadIdx.x; i < part.exacts * unit * 16; i += kThreads) {
        const int channel = i / unit, t = in_order(unit, i % unit), d = part.wide[channel].channel;
        const int at = v ? in_fragment(channel % 16, t % 16) : in_fragment(t % 16, channel % 16);
        ((uint16_t *)part.exact)[(channel / 16 * (unit / 16) + t / 16) * 256 + at] =
            d < 0 ? 0 : values[d * stride + i % unit];
    }
    if (!v && !threadIdx.x) {
        *(int *)(blob + head.k_bytes - 16) = top;
    }
}

template <typename T, int N>
cudaError_t launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a, const fkv_cuda_seal *seals,
                   int count, cudaStream_t stream) {
    const int padded = (c.dim + 15) / 16 * 16;
    const int planes = c.most_k_planes > c.panels * 16 ? c.most_k_planes : c.panels * 16;
    const int bytes = padded * (N * 32 + 2) * 2 + planes * N * 32;
    cudaError_t e =
        cudaFuncSetAttribute(seal_kernel<T, N>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess) {
        return e;
    }
    seal_kernel<T, N>
        <<<dim3(count * c.units_per_block, c.n_kv_heads, 2), kThreads, bytes, stream>>>(c, a,
                                                                                        seals);
    return cudaGetLastError();
}

} // namespace fkv

cudaError_t fkv_cuda_seal_launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a, uint64_t seals,
                                 int count, cudaStream_t stream) {
    const fkv_cuda_seal *s = (const fkv_cuda_seal *)seals;
    const bool half = c.dtype == FKV_F16;
    if (c.unit == 64) {
        return half ? fkv::launch<__half, 2>(c, a, s, count, stream)
                    : fkv::launch<__nv_bfloat16, 2>(c, a, s, count, stream);
    }
    return half ? fkv::launch<__half, 4>(c, a, s, count, stream)
                : fkv::launch<__nv_bfloat16, 4>(c, a, s, count, stream);
}
