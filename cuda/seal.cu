/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Coding blocks: a thread block takes K or V of one KV head of one unit. Channels are coded in the registers in which
 * the pages' fragments arrive; only codes pass through shared memory, where they come to their places. The same
 * integers and scales as the CPU's: every operation that rounds is written out, so that none is contracted.
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

/* What a block knows of its channels, in shared memory. */
struct Channels {
    int16_t first[256]; /* first plane of a channel, or the number of an exact one; -1: neither */
    uint8_t bits[256];  /* of its codes; 16 for exact channels */
    float mu[256];
};

__device__ inline void list_channels(const fkv_cuda_cache &c, const Part &part, const float *mu,
                                     const uint8_t *kinds, Channels *to) {
    for (int d = threadIdx.x; d < c.dim; d += kThreads) {
        to->first[d] = -1;
        to->bits[d] = 0;
        to->mu[d] = mu[d];
    }
    __syncthreads();
    const int n = part.steps * 16;
    for (int i = threadIdx.x; i < n + part.exacts * 16; i += kThreads) {
        const fkv_plane p = i < n ? part.planes[i] : part.wide[i - n];
        if (p.channel < 0 || p.index) {
            continue;
        }
        int count = 1;
        while (i < n && i + count < n && part.planes[i + count].index == count &&
               part.planes[i + count].channel == p.channel) {
            count++;
        }
        to->first[p.channel] = (int16_t)(i < n ? i : i - n);
        /* codes of 3 bits take two planes */
        to->bits[p.channel] = i >= n ? 16 : count == 2 && kinds[p.channel] == 1 ? 3 : 2 * count;
    }
    __syncthreads();
}

/* What the lanes that share a channel find together. `step`: they differ in lane bits from `step` to `last`. */
template <int N>
__device__ inline Range measure(const float (&x)[N], int bits, int step, int last) {
    float low = x[0], high = x[0];
    int bad = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
        bad |= !(fabsf(x[i]) < INFINITY);
    }
    for (int d = step; d <= last; d *= 2) {
        low = fminf(low, __shfl_xor_sync(~0u, low, d));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, d));
        bad |= __shfl_xor_sync(~0u, bad, d);
    }
    return range_of(low, high, !bad, bits);
}

/* Four codes in the bytes of a word. Rounding is to even, as by rintf(). */
__device__ inline uint32_t four_codes(const Range &g, float a, float b, float c, float d,
                                      float top) {
    const auto code = [&](float x) {
        const float y = fmaxf(__fmul_rn(__fsub_rn(x, g.origin), g.inverse), 0.0f);
        return __float_as_uint(__fadd_rn(fminf(y, top), 8388608.0f));
    };
    return __byte_perm(__byte_perm(code(a), code(b), 0x0040), __byte_perm(code(c), code(d), 0x0040),
                       0x5410);
}

/* Plane k of four codes: two bits in every byte; and those in one byte, the first lowest. */
__device__ inline uint32_t plane_of(uint32_t codes, int k) {
    return codes >> 2 * k & 0x03030303u;
}
__device__ inline uint32_t gathered(uint32_t plane) {
    return plane * 0x01041040u >> 24;
}

template <typename T> __device__ inline float element(uint32_t word, int half) {
    return Element<T>::value((uint16_t)(word >> 16 * half));
}

/* A panel of 16 channels of the unit's exact pages: a lane's fragments, tile by tile. */
template <int TILES>
__device__ inline void load_panel(const fkv_cuda_cache &c, const uint64_t *table, int tile,
                                  int head, bool v, int panel, uint4 (&x)[TILES]) {
    const int panels = (c.dim + 15) / 16;
    const size_t offset = (size_t)head * panels * 4096 + (v ? panels * 2048 : 0) + panel * 2048 +
                          threadIdx.x % 32 * 16;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        x[i] = stream16((const char *)table[1 + tile + i / 4] + offset + i % 4 * 512);
    }
}

/* Scale and zero point for a channel's planes. */
__device__ inline void write_scales(const Part &part, bool v, int first, int planes,
                                    const Range &g) {
    uint16_t *to = (uint16_t *)part.scales + (v ? 2 * first : first);
    for (int k = 0; k < planes; k++) {
        to[v ? 2 * k : k] = g.scale;
        to[v ? 2 * k + 1 : part.steps * 16 + k] = k ? 0 : g.zero;
    }
}

/* One channel of K: the lane's tokens are rows g and g + 8 of every tile; eight lanes share a channel. Order turns the
 * tiles of the first half around, so that they go to the lane 7 - g. */
template <typename T, int TILES>
__device__ inline void code_key(const fkv_cuda_cache &c, const Part &part, const Channels &all,
                                int d, const uint4 (&raw)[TILES], int which, const float *rope,
                                int64_t capacity, uint8_t *image, int *top) {
    const int lane = threadIdx.x % 32, g = lane / 4, bits = d < c.dim ? all.bits[d] : 0;
    if (!__any_sync(~0u, bits != 0)) {
        return;
    }
    const int first = bits ? all.first[d] : 0;
    int other = 0;
    bool leads = true;
    const int pair = bits && bits < 16 ? rope_pair(c, d, &other, &leads) : -1;
    const float u = bits ? all.mu[d] : 0.0f;
    const float w = pair < 0 ? 0.0f : leads ? -all.mu[other] : all.mu[other];
    const float *cosines = rope + (pair < 0 ? 0 : pair) * capacity + g;
    const float *sines = cosines + c.rope_dim / 2 * capacity;
    float x[TILES * 2];
    uint16_t *exact = (uint16_t *)part.exact;
#pragma unroll
    for (int i = 0; i < TILES * 2; i++) {
        const uint4 &f = raw[i / 2];
        const uint32_t word = which / 2 ? i % 2 ? f.w : f.z : i % 2 ? f.y : f.x;
        const int token = i / 2 * 16 + i % 2 * 8;
        float carrier = u;
        if (pair >= 0) {
            carrier = __fadd_rn(__fmul_rn(u, cosines[token]), __fmul_rn(w, sines[token]));
        }
        x[i] = __fsub_rn(element<T>(word, which % 2), carrier);
        if (bits == 16) {
            const int n = in_order(TILES * 16, token + g);
            exact[(first / 16 * TILES + n / 16) * 256 + in_fragment(n % 16, first % 16)] =
                (uint16_t)(word >> which % 2 * 16);
        }
    }
    const int coded = bits < 16 ? bits : 0;
    const Range r = measure<TILES * 2>(x, coded ? coded : 2, 4, 16);
    const float most = (float)((1 << coded) - 1);
    /* [tiles of the first half or the second][row half], four tiles in the bytes, in the new order */
    uint32_t turned[2], straight[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float a[4] = {}, b[4] = {};
#pragma unroll
        for (int i = 0; i < TILES / 2; i++) {
            a[i] = x[(TILES / 2 - 1 - i) * 2 + 1 - h];
            b[i] = x[(TILES / 2 + i) * 2 + h];
        }
        turned[h] = four_codes(r, a[0], a[1], a[2], a[3], most);
        straight[h] = four_codes(r, b[0], b[1], b[2], b[3], most);
    }
    const int planes = (coded + 1) / 2;
    if (coded && !g) {
        write_scales(part, false, first, planes, r);
        atomicMax(top, exponent(Element<__half>::value(r.scale)) + 2 * (planes - 1));
    }
    for (int k = 0; k < 4; k++) {
        if (!__any_sync(~0u, k < planes)) {
            break;
        }
        uint32_t y = gathered(plane_of(turned[0], k)) | gathered(plane_of(turned[1], k)) << 16;
        y = __shfl_xor_sync(~0u, y, 28);
        const uint32_t z = gathered(plane_of(straight[0], k)) | gathered(plane_of(straight[1], k))
                                                                    << 16;
        if (k >= planes) {
            continue;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t one = y >> 16 * h & 255, two = z >> 16 * h & 255;
            const Place at = place_in_k(part.steps, TILES, first + k, g + 8 * h);
            if (TILES == 4) { /* both halves are in a byte */
                image[at.word * 4 + at.bit / 8] = (uint8_t)(one & 15 | two << 4);
            } else {
                const Place next = place_in_k(part.steps, TILES, first + k, 64 + g + 8 * h);
                image[at.word * 4 + at.bit / 8] = (uint8_t)one;
                image[next.word * 4 + next.bit / 8] = (uint8_t)two;
            }
        }
    }
}

/* One channel of V: the lane's tokens are 2 t, 2 t + 8, 2 t + 1, 2 t + 9 of every tile; four lanes share a channel.
 * Rows 0..7 of a panel's planes and 8..15 go to images of their own. */
template <typename T, int TILES>
__device__ inline void code_value(const fkv_cuda_cache &c, const Part &part, const Channels &all,
                                  int d, const uint4 (&raw)[TILES], bool second, uint32_t *image) {
    const int lane = threadIdx.x % 32, t = lane % 4, bits = d < c.dim ? all.bits[d] : 0;
    if (!__any_sync(~0u, bits != 0)) {
        return;
    }
    const int first = bits ? all.first[d] : 0;
    const float mu = bits ? all.mu[d] : 0.0f;
    float x[TILES * 4];
    uint16_t *exact = (uint16_t *)part.exact;
#pragma unroll
    for (int i = 0; i < TILES * 4; i++) {
        const uint4 &f = raw[i / 4];
        const uint32_t word = second ? i % 2 ? f.w : f.y : i % 2 ? f.z : f.x;
        x[i] = __fsub_rn(element<T>(word, i / 2 % 2), mu);
        if (bits == 16) {
            const int n = in_order(TILES * 16, i / 4 * 16 + 2 * t + i % 2 * 8 + i / 2 % 2);
            exact[(first / 16 * TILES + n / 16) * 256 + in_fragment(first % 16, n % 16)] =
                (uint16_t)(word >> i / 2 % 2 * 16);
        }
    }
    const int coded = bits < 16 ? bits : 0;
    const Range r = measure<TILES * 4>(x, coded ? coded : 2, 1, 2);
    const float most = (float)((1 << coded) - 1);
    uint32_t codes[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const float *y = x + i * 4;
        codes[i] = i < TILES / 2 ? four_codes(r, y[3], y[2], y[1], y[0], most)
                                 : four_codes(r, y[0], y[1], y[2], y[3], most);
    }
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) { /* the first half is turned around: lane 3 - t has it */
        codes[i] = __shfl_xor_sync(~0u, codes[i], 3);
    }
    const int planes = (coded + 1) / 2;
    if (coded && !t) {
        write_scales(part, true, first, planes, r);
    }
    for (int k = 0; k < planes; k++) {
        const int row = (first + k) % 16, panel = (first + k) / 16;
        uint32_t *to =
            image + (row / 8 * part.steps + panel) * TILES * 16 + (row % 8 * 4 + t) * (TILES / 2);
#pragma unroll
        for (int w = 0; w < TILES / 2; w++) {
            to[w] = (plane_of(codes[TILES / 2 - 1 - w], k) | plane_of(codes[TILES / 2 + w], k) << 4)
                    << row / 8 * 2;
        }
    }
}

/* What no channel fills: planes and exact channels that fill up panels. */
__device__ inline void clear_rest(const Part &part, bool v, int tiles) {
    const int n = part.steps * 16;
    for (int i = threadIdx.x; i < n; i += kThreads) {
        if (part.planes[i].channel < 0) {
            write_scales(part, v, i, 1, {0, 0, 0.0f, 0.0f});
        }
    }
    for (int i = threadIdx.x; i < part.exacts * tiles * 256; i += kThreads) {
        const int channel = i / (tiles * 16), n_token = i % (tiles * 16);
        if (part.wide[channel].channel < 0) {
            const int r = n_token % 16,
                      at = v ? in_fragment(channel % 16, r) : in_fragment(r, channel % 16);
            ((uint16_t *)part.exact)[(channel / 16 * tiles + n_token / 16) * 256 + at] = 0;
        }
    }
}

/* A block: K or V of a head's unit. Its warps take panels of channels, straight from the pages' fragments. */
template <typename T, int TILES>
__global__ __launch_bounds__(kThreads) void seal_kernel(const fkv_cuda_cache c,
                                                        const fkv_cuda_attend a,
                                                        const fkv_cuda_seal *seals) {
    extern __shared__ __align__(16) char memory[];
    __shared__ Channels all;
    __shared__ int top;
    const fkv_cuda_seal seal = seals[blockIdx.x / c.units_per_block];
    const fkv_cuda_row row = ((const fkv_cuda_row *)a.rows)[seal.row];
    const int within = blockIdx.x % c.units_per_block, head_index = blockIdx.y;
    const bool v = blockIdx.z;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, panels = (c.dim + 15) / 16;
    const fkv_cuda_head head =
        ((const fkv_cuda_head *)c.heads)[a.layer * c.n_kv_heads + head_index];
    char *blob =
        (char *)seal.block + within * (size_t)((const int *)c.unit_bytes)[a.layer] + head.offset;
    const Part part = part_of(c, head, blob, v);
    const size_t channels = ((size_t)(a.layer * 2 + v) * c.n_kv_heads + head_index) * c.dim;
    const int tile = seal.tile + within * (TILES / 4), words = part.steps * TILES * 16;
    const uint64_t *table = (const uint64_t *)row.table + a.layer * row.slots;
    const float *rope =
        (const float *)a.rope + row.rope_offset + c.sinks + tile * 64 - row.rope_first;
    for (int i = threadIdx.x; i < (v ? 2 : 1) * words / 4; i += kThreads) {
        ((uint4 *)memory)[i] = make_uint4(0, 0, 0, 0);
    }
    if (!threadIdx.x) {
        top = -24;
    }
    list_channels(c, part, (const float *)c.carriers + channels,
                  (const uint8_t *)c.kinds + channels, &all);
    for (int panel = warp; panel < panels; panel += kThreads / 32) {
        uint4 raw[TILES];
        load_panel<TILES>(c, table, tile, head_index, v, panel, raw);
        if (v) {
            for (int i = 0; i < 2; i++) {
                code_value<T, TILES>(c, part, all, panel * 16 + lane / 4 + 8 * i, raw, i != 0,
                                     (uint32_t *)memory);
            }
        } else {
            for (int i = 0; i < 4; i++) {
                code_key<T, TILES>(c, part, all, panel * 16 + lane % 4 * 2 + i % 2 + i / 2 * 8, raw,
                                   i, rope, a.rope_capacity, (uint8_t *)memory, &top);
            }
        }
    }
    clear_rest(part, v, TILES);
    __syncthreads();
    for (int i = threadIdx.x; i < words / 4; i += kThreads) {
        uint4 x = ((const uint4 *)memory)[i];
        if (v) {
            const uint4 y = ((const uint4 *)memory)[words / 4 + i];
            x = make_uint4(x.x | y.x, x.y | y.y, x.z | y.z, x.w | y.w);
        }
        ((uint4 *)part.codes)[i] = x;
    }
    if (!v && !threadIdx.x) {
        *(int *)(blob + head.k_bytes - 16) = top;
    }
}

template <typename T, int TILES>
cudaError_t launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a, const fkv_cuda_seal *seals,
                   int count, cudaStream_t stream) {
    const int k = c.most_k_planes * TILES * 4, v = c.panels * 16 * TILES * 8;
    const int bytes = k > v ? k : v;
    cudaError_t e = cudaFuncSetAttribute(seal_kernel<T, TILES>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess) {
        return e;
    }
    seal_kernel<T, TILES>
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
        return half ? fkv::launch<__half, 4>(c, a, s, count, stream)
                    : fkv::launch<__nv_bfloat16, 4>(c, a, s, count, stream);
    }
    return half ? fkv::launch<__half, 8>(c, a, s, count, stream)
                : fkv::launch<__nv_bfloat16, 8>(c, a, s, count, stream);
}
