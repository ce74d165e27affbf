/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Coding blocks. A thread block takes some KV heads of one unit, of each first K, then V. The part's exact tokens come
 * to shared memory as they lie in the pages; warps take the channels that have bits, four of K or eight of V at once,
 * eight or four lanes to a channel; codes come to their places in shared memory and leave it together. Cosines and
 * sines of the unit are in shared memory as well, once for all heads. The same integers and scales as the CPU's: every
 * operation that rounds is written out, so that none is contracted.
 */
#include "common.cuh"

namespace fkv {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMostHeads = 8;
/* Of a multiprocessor, less what the kernel has besides: with more, blocks are alone on it. */
constexpr int kHalfOfShared = (113 << 10) - 1024;

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
    return {scale, zero, __frcp_rn(Element<__half>::value(scale)), origin};
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

/* Shared memory; offsets in bytes. */
struct Places {
    int stage, image, scales, list, angles, bytes;
};

struct Arguments {
    fkv_cuda_cache c;
    fkv_cuda_attend a;
    const fkv_cuda_seal *seals;
    int heads; /* of a thread block */
    Places at;
};

/* What a warp knows of the part in hand. */
struct Work {
    Part part;
    const char *stage;
    char *image;
    uint16_t *scales;
    const fkv_cuda_channel *list;
    int channels;
    int panels; /* of a page */
    int lane;
};

/* Smallest and largest; not a number if one is none. */
__device__ inline float least(float a, float b) {
    float c;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
__device__ inline float most(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

/* Of what the lanes that share a channel have found; they differ in the lane's lowest bits. */
template <int LANES> __device__ inline Range measure(float low, float high, int bits) {
#pragma unroll
    for (int d = 1; d < LANES; d *= 2) {
        low = least(low, __shfl_xor_sync(~0u, low, d));
        high = most(high, __shfl_xor_sync(~0u, high, d));
    }
    return range_of(low, high, fabsf(low) < INFINITY && fabsf(high) < INFINITY, bits);
}

/* Codes are (x - origin) * inverse, rounded, within 0 and `top`. They are within it by themselves if the range is an
 * ordinary one; else x becomes the codes here, and the range one that leaves them as they are. */
template <int N> __device__ inline void mend(float (&x)[N], Range &r, float low, int bits) {
    const bool odd = !(r.inverse > 0.0f && r.inverse < INFINITY && r.origin <= low);
    if (__any_sync(~0u, odd)) {
        const float top = (float)((1 << bits) - 1);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float y = fmaxf(__fmul_rn(__fsub_rn(x[i], r.origin), r.inverse), 0.0f);
            x[i] = odd ? fminf(y, top) : x[i];
        }
        r.origin = odd ? 0.0f : r.origin;
        r.inverse = odd ? 1.0f : r.inverse;
    }
}

/* Four codes in the bytes of a word. Rounding is to even, as by rintf(). */
__device__ inline uint32_t four_codes(const Range &g, float a, float b, float c, float d) {
    const auto code = [&](float x) {
        return __float_as_uint(__fadd_rn(__fmul_rn(__fsub_rn(x, g.origin), g.inverse), 8388608.0f));
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

/* A half of a word as a number. */
template <typename T> struct Halves;
template <> struct Halves<__half> {
    static __device__ inline int which(int half) {
        return half * 16;
    }
    static __device__ inline float pick(uint32_t word, int which) {
        return Element<__half>::value((uint16_t)(word >> which));
    }
    static __device__ inline uint32_t least(uint32_t a, uint32_t b) {
        const __half2 x = __hmin2_nan(*(const __half2 *)&a, *(const __half2 *)&b);
        return *(const uint32_t *)&x;
    }
    static __device__ inline uint32_t most(uint32_t a, uint32_t b) {
        const __half2 x = __hmax2_nan(*(const __half2 *)&a, *(const __half2 *)&b);
        return *(const uint32_t *)&x;
    }
};
template <> struct Halves<__nv_bfloat16> {
    static __device__ inline int which(int half) {
        return half ? 0x3244 : 0x1044;
    }
    static __device__ inline float pick(uint32_t word, int which) {
        return __uint_as_float(__byte_perm(word, 0, which));
    }
    static __device__ inline uint32_t least(uint32_t a, uint32_t b) {
        const __nv_bfloat162 x =
            __hmin2_nan(*(const __nv_bfloat162 *)&a, *(const __nv_bfloat162 *)&b);
        return *(const uint32_t *)&x;
    }
    static __device__ inline uint32_t most(uint32_t a, uint32_t b) {
        const __nv_bfloat162 x =
            __hmax2_nan(*(const __nv_bfloat162 *)&a, *(const __nv_bfloat162 *)&b);
        return *(const uint32_t *)&x;
    }
};

/* ---- a part's exact tokens in shared memory: [unit / 64] pages' fragments. The 16 bytes of a fragment's lanes are
 * exchanged such that a warp's reads of one channel go to different banks. */

__device__ inline int exchanged(int lane) {
    return lane ^ lane >> 3;
}

template <int TILES>
__device__ inline void fetch_tokens(const char *const (&pages)[TILES / 4], size_t offset,
                                    int panels, char *stage) {
    const int lane = threadIdx.x % 32, fragments = panels * 4;
#pragma unroll
    for (int page = 0; page < TILES / 4; page++) {
        const char *from = pages[page] + offset + lane * 16;
        char *to = stage + page * fragments * 512 + exchanged(lane) * 16;
        for (int i = threadIdx.x / 32; i < fragments; i += kWarps) {
            copy_async(to + i * 512, from + i * 512);
        }
    }
    copies_commit();
}

/* Where a fragment's lane of a channel's panel lies; tile i is fragment_at() further. */
__device__ inline const char *lane_of(const Work &w, int channel, int lane) {
    return w.stage + channel / 16 * 2048 + exchanged(lane) * 16;
}
__device__ inline int fragment_at(const Work &w, int tile) {
    return tile / 4 * w.panels * 2048 + tile % 4 * 512;
}

/* Scale and zero point for a channel's planes. */
__device__ inline void write_scales(const Work &w, bool v, int first, int planes, const Range &g) {
    uint16_t *to = w.scales + (v ? 2 * first : first);
    for (int k = 0; k < planes; k++) {
        to[v ? 2 * k : k] = g.scale;
        to[v ? 2 * k + 1 : w.part.steps * 16 + k] = k ? 0 : g.zero;
    }
}

/* (cos, sin) of tokens 16 i + g and 16 i + g + 8 of the unit. NEAR: from shared memory. */
template <bool NEAR>
__device__ inline float4 angles_at(const Arguments &g, const float4 *table, const float *rope,
                                   int pair, int tile, int tiles, int row) {
    if (NEAR) {
        return table[(pair * tiles + tile) * 8 + row];
    }
    if (pair >= g.c.rope_dim / 2) {
        return make_float4(1.0f, 0.0f, 1.0f, 0.0f);
    }
    const float *at = rope + pair * g.a.rope_capacity + tile * 16 + row;
    const float *sines = at + g.c.rope_dim / 2 * g.a.rope_capacity;
    return make_float4(__ldg(at), __ldg(sines), __ldg(at + 8), __ldg(sines + 8));
}

/* Four channels of K from number `start` of the list. A lane has tokens g and g + 8 of every tile. Order turns the
 * tiles of the first half around, so that they go to the lane of 7 - g. */
template <typename T, int TILES, bool NEAR>
__device__ inline void code_keys(const Arguments &args, const Work &work, int start,
                                 const float4 *table, const float *rope, int *top) {
    const int slot = work.lane / 8, g = work.lane % 8;
    const bool real = start + slot < work.channels;
    const fkv_cuda_channel ch = work.list[real ? start + slot : start];
    const int which = Halves<T>::which(ch.number % 2);
    const char *raw = lane_of(work, ch.number, g * 4 + ch.number % 8 / 2) + ch.number / 8 % 2 * 8;
    float x[TILES * 2], low = INFINITY, high = -INFINITY;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const uint2 words = *(const uint2 *)(raw + fragment_at(work, i));
        const float4 t = angles_at<NEAR>(args, table, rope, ch.pair, i, TILES, g);
        x[2 * i] = __fsub_rn(Halves<T>::pick(words.x, which),
                             __fadd_rn(__fmul_rn(ch.u, t.x), __fmul_rn(ch.w, t.y)));
        x[2 * i + 1] = __fsub_rn(Halves<T>::pick(words.y, which),
                                 __fadd_rn(__fmul_rn(ch.u, t.z), __fmul_rn(ch.w, t.w)));
        low = least(low, least(x[2 * i], x[2 * i + 1]));
        high = most(high, most(x[2 * i], x[2 * i + 1]));
    }
    Range r = measure<8>(low, high, ch.bits);
    const int planes = real ? (ch.bits + 1) / 2 : 0;
    if (real && !g) {
        write_scales(work, false, ch.first, planes, r);
        atomicMax(top, exponent(Element<__half>::value(r.scale)) + 2 * (planes - 1));
    }
    mend<TILES * 2>(x, r, low, ch.bits);
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
        turned[h] = four_codes(r, a[0], a[1], a[2], a[3]);
        straight[h] = four_codes(r, b[0], b[1], b[2], b[3]);
    }
    for (int k = 0; k < 4; k++) {
        if (!__any_sync(~0u, k < planes)) {
            break;
        }
        uint32_t y = gathered(plane_of(turned[0], k)) | gathered(plane_of(turned[1], k)) << 16;
        y = __shfl_xor_sync(~0u, y, 7);
        const uint32_t z = gathered(plane_of(straight[0], k)) | gathered(plane_of(straight[1], k))
                                                                    << 16;
        if (k >= planes) {
            continue;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t one = y >> 16 * h & 255, two = z >> 16 * h & 255;
            const Place at = place_in_k(work.part.steps, TILES, ch.first + k, g + 8 * h);
            uint8_t *image = (uint8_t *)work.image;
            if (TILES == 4) { /* both halves are in a byte */
                image[at.word * 4 + at.bit / 8] = (uint8_t)((one & 15) | two << 4);
            } else {
                const Place next = place_in_k(work.part.steps, TILES, ch.first + k, 64 + g + 8 * h);
                image[at.word * 4 + at.bit / 8] = (uint8_t)one;
                image[next.word * 4 + next.bit / 8] = (uint8_t)two;
            }
        }
    }
}

/* Eight channels of V. A lane has tokens 2 t, 2 t + 8, 2 t + 1, 2 t + 9 of every tile. Rows 0..7 of a panel's planes and
 * 8..15 go to images of their own. Taking the carrier away is monotonous, so that ranges are those of what is held. */
template <typename T, int TILES> __device__ inline void code_values(const Work &work, int start) {
    const int slot = work.lane / 4, t = work.lane % 4;
    const bool real = start + slot < work.channels;
    const fkv_cuda_channel ch = work.list[real ? start + slot : start];
    const char *raw = lane_of(work, ch.number, ch.number % 8 * 4 + t) + ch.number / 8 % 2 * 4;
    const int first_half = Halves<T>::which(0), second_half = Halves<T>::which(1);
    uint32_t words[TILES * 2];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        words[2 * i] = *(const uint32_t *)(raw + fragment_at(work, i));
        words[2 * i + 1] = *(const uint32_t *)(raw + fragment_at(work, i) + 8);
    }
    uint32_t lows = words[0], highs = words[0];
#pragma unroll
    for (int i = 1; i < TILES * 2; i++) {
        lows = Halves<T>::least(lows, words[i]);
        highs = Halves<T>::most(highs, words[i]);
    }
    const float low = __fsub_rn(
        least(Halves<T>::pick(lows, first_half), Halves<T>::pick(lows, second_half)), ch.u);
    const float high = __fsub_rn(
        most(Halves<T>::pick(highs, first_half), Halves<T>::pick(highs, second_half)), ch.u);
    Range r = measure<4>(low, high, ch.bits);
    const int planes = real ? (ch.bits + 1) / 2 : 0;
    if (real && !t) {
        write_scales(work, true, ch.first, planes, r);
    }
    float x[TILES * 4];
#pragma unroll
    for (int i = 0; i < TILES * 4; i++) {
        x[i] = __fsub_rn(
            Halves<T>::pick(words[i / 4 * 2 + i % 2], i / 2 % 2 ? second_half : first_half), ch.u);
    }
    mend<TILES * 4>(x, r, low, ch.bits);
    uint32_t codes[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const float *y = x + i * 4;
        codes[i] = i < TILES / 2 ? four_codes(r, y[3], y[2], y[1], y[0])
                                 : four_codes(r, y[0], y[1], y[2], y[3]);
    }
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) { /* the first half is turned around: lane 3 - t has it */
        codes[i] = __shfl_xor_sync(~0u, codes[i], 3);
    }
    for (int k = 0; k < planes; k++) {
        const int row = (ch.first + k) % 16, panel = (ch.first + k) / 16;
        uint32_t y[TILES / 2];
#pragma unroll
        for (int w = 0; w < TILES / 2; w++) {
            y[w] = (plane_of(codes[TILES / 2 - 1 - w], k) | plane_of(codes[TILES / 2 + w], k) << 4)
                   << row / 8 * 2;
        }
        uint32_t *to = (uint32_t *)work.image + (row / 8 * work.part.steps + panel) * TILES * 16 +
                       (row % 8 * 4 + t) * (TILES / 2);
        if (TILES == 4) {
            *(uint2 *)to = make_uint2(y[0], y[1]);
        } else {
            *(uint4 *)to = make_uint4(y[0], y[1], y[TILES / 2 - 2], y[TILES / 2 - 1]);
        }
    }
}

/* Exact channels, and zeros for those that fill up a panel. */
template <int TILES> __device__ inline void copy_exact(const Work &work, bool v) {
#pragma unroll 1
    for (int i = threadIdx.x; i < work.part.exacts * TILES * 256; i += kThreads) {
        const int at = i % 256, lane = at / 8, reg = at / 2 % 4;
        const int r = lane / 4 + 8 * (reg % 2), col = lane % 4 * 2 + at % 2 + 8 * (reg / 2);
        const int channel = work.part.wide[i / (TILES * 256) * 16 + (v ? r : col)].channel;
        const int token = in_order(TILES * 16, i / 256 % TILES * 16 + (v ? col : r));
        uint16_t x = 0;
        if (channel >= 0) {
            const int from =
                v ? in_fragment(channel % 16, token % 16) : in_fragment(token % 16, channel % 16);
            x = ((const uint16_t *)(lane_of(work, channel, from / 8) +
                                    fragment_at(work, token / 16)))[from % 8];
        }
        ((uint16_t *)work.part.exact)[i] = x;
    }
}

/* The unit's angles as angles_at() has them; behind them a row for channels that do not turn. */
template <int TILES>
__device__ inline void fill_angles(const Arguments &g, const float *rope, float2 *to) {
    const int pairs = g.c.rope_dim / 2;
    for (int i = threadIdx.x; i < (pairs + 1) * TILES * 16; i += kThreads) {
        const int pair = i / (TILES * 16), token = i % (TILES * 16);
        float2 x = make_float2(1.0f, 0.0f);
        if (pair < pairs) {
            const float *at = rope + pair * g.a.rope_capacity + token;
            x = make_float2(__ldg(at), __ldg(at + pairs * g.a.rope_capacity));
        }
        to[(i / 16 * 8 + token % 8) * 2 + token / 8 % 2] = x;
    }
}

/* Codes, and the scales behind the exact channels, to where they stay. */
template <int TILES> __device__ inline void write_part(const Work &work, bool v) {
    const int words = work.part.steps * TILES * 4; /* of 16 bytes */
    const uint4 *image = (const uint4 *)work.image;
#pragma unroll 1
    for (int i = threadIdx.x; i < words; i += kThreads) {
        uint4 x = image[i];
        if (v) {
            const uint4 y = image[words + i];
            x = make_uint4(x.x | y.x, x.y | y.y, x.z | y.z, x.w | y.w);
        }
        ((uint4 *)work.part.codes)[i] = x;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < work.part.steps * 4; i += kThreads) {
        ((uint4 *)work.part.scales)[i] = ((const uint4 *)work.scales)[i];
    }
}

/* Starts bringing a part's exact tokens and its list of channels. */
template <int TILES>
__device__ inline void fetch_part(const Arguments &g, const char *const (&pages)[TILES / 4],
                                  int head, bool v, int channels, char *memory) {
    const fkv_cuda_cache &c = g.c;
    const int panels = (c.dim + 15) / 16;
    const size_t at = ((size_t)(g.a.layer * 2 + v) * c.n_kv_heads + head) * c.dim;
    const fkv_cuda_channel *from = (const fkv_cuda_channel *)c.coded_channels + at;
    if (threadIdx.x < channels) { /* no more than 256 */
        copy_async(memory + g.at.list + threadIdx.x * 16, from + threadIdx.x);
    }
    fetch_tokens<TILES>(pages, (size_t)(2 * head + v) * panels * 2048, panels, memory + g.at.stage);
}

template <typename T, int TILES, bool NEAR>
__global__ __launch_bounds__(kThreads, 2) void seal_kernel(const __grid_constant__ Arguments g) {
    extern __shared__ __align__(128) char memory[];
    __shared__ int top;
    __shared__ fkv_cuda_head heads[kMostHeads];
    const fkv_cuda_cache &c = g.c;
    const int first = blockIdx.y * g.heads, count = min(g.heads, c.n_kv_heads - first);
    constexpr int head_words = sizeof(fkv_cuda_head) / 4;
    for (int i = threadIdx.x; i < count * head_words; i += kThreads) {
        const fkv_cuda_head *from = (const fkv_cuda_head *)c.heads + g.a.layer * c.n_kv_heads;
        ((int32_t *)heads)[i] = ((const int32_t *)(from + first))[i];
    }
    const fkv_cuda_seal seal = g.seals[blockIdx.x / c.units_per_block];
    const fkv_cuda_row row = ((const fkv_cuda_row *)g.a.rows)[seal.row];
    const int within = blockIdx.x % c.units_per_block, tile = seal.tile + within * (TILES / 4);
    const int warp = threadIdx.x / 32;
    const char *pages[TILES / 4];
    for (int i = 0; i < TILES / 4; i++) {
        pages[i] =
            (const char *)((const uint64_t *)row.table)[g.a.layer * row.slots + 1 + tile + i];
    }
    const float *rope =
        (const float *)g.a.rope + row.rope_offset + c.sinks + tile * 64 - row.rope_first;
    char *unit = (char *)seal.block + within * (size_t)((const int *)c.unit_bytes)[g.a.layer];
    float4 *table = (float4 *)(memory + g.at.angles);
    Work work;
    work.stage = memory + g.at.stage;
    work.image = memory + g.at.image;
    work.scales = (uint16_t *)(memory + g.at.scales);
    work.list = (const fkv_cuda_channel *)(memory + g.at.list);
    work.panels = (c.dim + 15) / 16;
    work.lane = threadIdx.x % 32;
    __syncthreads();
    fetch_part<TILES>(g, pages, first, false, heads[0].k_channels, memory);
    if (NEAR) {
        fill_angles<TILES>(g, rope, (float2 *)table);
    }
    for (int i = 0; i < 2 * count; i++) {
        const bool v = i % 2;
        const fkv_cuda_head &head = heads[i / 2];
        char *blob = unit + head.offset;
        work.part = part_of(c, head, blob, v);
        work.channels = v ? head.v_channels : head.k_channels;
        const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll 1
        for (int j = threadIdx.x; j < (v ? 2 : 1) * work.part.steps * TILES * 4; j += kThreads) {
            ((uint4 *)work.image)[j] = none;
        }
#pragma unroll 1
        for (int j = threadIdx.x; j < work.part.steps * 4; j += kThreads) {
            ((uint4 *)work.scales)[j] = none;
        }
        if (!threadIdx.x) {
            top = -24;
        }
        copies_wait(false);
        __syncthreads();
        if (v) {
            for (int j = warp * 8; j < work.channels; j += kWarps * 8) {
                code_values<T, TILES>(work, j);
            }
        } else {
            for (int j = warp * 4; j < work.channels; j += kWarps * 4) {
                code_keys<T, TILES, NEAR>(g, work, j, table, rope, &top);
            }
        }
        copy_exact<TILES>(work, v);
        __syncthreads();
        if (i + 1 < 2 * count) {
            const fkv_cuda_head &next = heads[(i + 1) / 2];
            fetch_part<TILES>(g, pages, first + (i + 1) / 2, !v,
                              v ? next.k_channels : next.v_channels, memory);
        }
        write_part<TILES>(work, v);
        if (!v && !threadIdx.x) {
            *(int *)(blob + head.k_bytes - 16) = top;
        }
        __syncthreads();
    }
}

inline Places place(const fkv_cuda_cache &c, bool angles) {
    const int k = c.most_k_planes / 16, v = c.panels, panel = c.unit * 4;
    Places at = {};
    at.image = c.unit / 64 * ((c.dim + 15) / 16) * 2048;
    at.scales = at.image + (k > 2 * v ? k : 2 * v) * panel;
    at.list = at.scales + (k > v ? k : v) * 64;
    at.angles = at.list + c.dim * (int)sizeof(fkv_cuda_channel);
    at.bytes = at.angles + (angles ? (c.rope_dim / 2 + 1) * c.unit * 8 : 0);
    return at;
}

/* Heads of a thread block such that blocks fill the device in as few rounds as possible. */
inline int heads_of_block(int units, int heads, int slots) {
    int best = 1;
    double least_time = 1e300;
    for (int n = 1; n <= heads && n <= kMostHeads; n++) {
        const int blocks = units * ((heads + n - 1) / n);
        const double time = ((blocks + slots - 1) / slots) * (n + 0.3); /* 0.3: to begin */
        if (time < least_time) {
            least_time = time;
            best = n;
        }
    }
    return best;
}

inline int processors() {
    int device = 0, n = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
                   cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) ==
                       cudaSuccess &&
                   n
               ? n
               : 1;
}

template <typename T, int TILES, bool NEAR>
cudaError_t launch_kernel(const Arguments &g, dim3 grid, cudaStream_t stream) {
    const cudaError_t e = cudaFuncSetAttribute(
        seal_kernel<T, TILES, NEAR>, cudaFuncAttributeMaxDynamicSharedMemorySize, g.at.bytes);
    if (e != cudaSuccess) {
        return e;
    }
    seal_kernel<T, TILES, NEAR><<<grid, kThreads, g.at.bytes, stream>>>(g);
    return cudaGetLastError();
}

template <typename T, int TILES>
cudaError_t launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a, const fkv_cuda_seal *seals,
                   int count, cudaStream_t stream) {
    const int units = count * c.units_per_block;
    Arguments g = {c, a, seals, heads_of_block(units, c.n_kv_heads, processors() * 2),
                   place(c, true)};
    const dim3 grid(units, (c.n_kv_heads + g.heads - 1) / g.heads);
    if (g.at.bytes <= kHalfOfShared) {
        return launch_kernel<T, TILES, true>(g, grid, stream);
    }
    g.at = place(c, false);
    return launch_kernel<T, TILES, false>(g, grid, stream);
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
