/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a warp does in attention. Tokens are the rows of its matrix instructions, query heads the eight columns:
 * with H = 4 the columns 0..3 hold the high parts of four heads' factors and 4..7 what rounding them left; with
 * H = 8 high and low parts take an instruction each. So 16-bit factors lose nothing that matters.
 *
 * Codes need no conversion: two bits in the mantissa of an f16 that is else zero are code * 2^-18 or 2^-16, which
 * scores and sums take back. Scores are in units of log2.
 */
#ifndef FKV_CUDA_ATTEND_CUH
#define FKV_CUDA_ATTEND_CUH

#include "common.cuh"

namespace fkv {

constexpr float kLowest = -1e30f; /* stands for -infinity where differences are taken */
constexpr int kPBits = 10; /* weights, and all sums of them, are times 2^10: low parts are normal */
constexpr int kQBits = 12; /* and queries' factors about 2^12 at most */
constexpr int kWBits = 14;
constexpr int kCodeBits = 18; /* codes stand times 2^-18 in rows 0..7 of a fragment */

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

/* The two fragments of a word. Codes are brought to bits 6 and 8, near the top of the mantissa: matrix units align
 * products by exponents, those of denormals by the least one, and drop what is far below. Rows 8..15 come out
 * times 4. */
template <int Second> __device__ __forceinline__ uint4 planes_of(uint32_t word) {
    const uint32_t low = Second ? word >> 2 : word << 6, high = Second ? word >> 6 : word << 2;
    return make_uint4(low & 0x00c000c0, low & 0x03000300, high & 0x00c000c0, high & 0x03000300);
}

/* A panel's words of a lane, MT fragments. */
template <int MT> struct Words {
    uint32_t w[MT / 2];
    __device__ __forceinline__ void load(const char *panel, int lane) {
        if (MT == 8) {
            uint4 v = stream16(panel + lane * 16);
            w[0] = v.x, w[1] = v.y, w[MT / 2 - 2] = v.z, w[MT / 2 - 1] = v.w;
        } else {
            uint2 v = stream8(panel + lane * 8);
            w[0] = v.x, w[1] = v.y;
        }
    }
};

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
constexpr int kStages = 4;
constexpr int kStage = 2048; /* a panel of a page */

/* A warp's pages on their way through shared memory, panel after panel. */
struct Ring {
    char *memory;
    uint64_t *barriers;
    const uint64_t *table;
    size_t offset;
    int first, sink, step, panels; /* page i is number first + i * step of the item */
    int base;                  /* entry of the item's first page; the sink page comes before it */
    int chunks, issued, taken; /* of this item */
    uint32_t before;           /* chunks of earlier items */

    __device__ __forceinline__ void issue(int lane) {
        if (issued < chunks && !lane) {
            const int page = first + issued / (2 * panels) * step;
            const uint64_t at = table[sink && !page ? 0 : base + page - sink];
            const uint32_t stage = (before + issued) % kStages;
            bulk_copy(memory + stage * kStage,
                      (const char *)at + offset + issued % (2 * panels) * kStage, kStage,
                      &barriers[stage]);
        }
        issued++;
    }
    __device__ __forceinline__ const uint4 *wait() const {
        const uint32_t n = before + taken, stage = n % kStages;
        barrier_wait(&barriers[stage], n / kStages & 1);
        return (const uint4 *)(memory + stage * kStage);
    }
    __device__ __forceinline__ void next(int lane) {
        taken++;
        __syncwarp();
        issue(lane);
    }
};

/* exact_page() with panels from a ring. */
template <typename T, int H>
__device__ __forceinline__ void ring_page(Ring &ring, const Factors<H> *q, const float (&f)[2],
                                          int visible, int lane, Running &r, float4 *o) {
    float s[4][4] = {};
    for (int i = 0; i < ring.panels; i++) {
        const uint4 *panel = ring.wait() + lane;
        const Factors<H> b = q[i * 32 + lane];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            multiply<T, H>(s[t], panel[t * 32], b);
        }
        ring.next(lane);
    }
    const float none[2] = {0.0f, 0.0f};
    float alpha[2], sums[2];
    Factors<H> p[4];
    soften<T, 4, H>(s, f, none, visible, lane, r, alpha, sums, p);
    for (int i = 0; i < ring.panels; i++) {
        const uint4 *panel = ring.wait() + lane;
        float acc[4] = {};
#pragma unroll
        for (int t = 0; t < 4; t++) {
            multiply<T, H>(acc, panel[t * 32], p[t]);
        }
        ring.next(lane);
        gather(&o[i * 32 + lane], alpha, acc, 1.0f, 1.0f, none, none);
    }
}
#endif

__device__ __forceinline__ float2 two_halves(const char *p) {
    return __half22float2(*(const __half2 *)p);
}

/* What the warps of a work item share about coded units. */
template <int H> struct CodedView {
    fkv_cuda_head head;
    const float *planes;       /* [16 k_steps][H] factors of the planes, normalised */
    const float *exacts;       /* [16 k_exact][H] of the exact channels */
    const float *norm;         /* [H] 2^(what was normalised away) */
    const float *carrier_norm; /* [H] */
    const float *constant;     /* [H] score of the carriers that do not turn */
    const uint4 *basis;        /* fragments */
    const float2 *turns;       /* [SPAN][fast] */
    int fast;
};

/* Adds the carriers' scores. w: [fast][H] (a, b) at the span's start; slow: [16][H] coefficients. */
template <int MT, int H>
__device__ __forceinline__ void add_carriers(float (&s)[MT][4], const CodedView<H> &v,
                                             const float2 *w, const float *slow, int unit, int lane,
                                             int head, bool low) {
    const int k = lane % 4;
    for (int i = 0; i < v.fast / 8; i++) {
        const float2 x = w[(i * 8 + k) * H + head], y = w[(i * 8 + k + 4) * H + head];
        const float2 tx = v.turns[unit * v.fast + i * 8 + k];
        const float2 ty = v.turns[unit * v.fast + i * 8 + k + 4];
        Factors<H> b;
        split<__half, H>(b, x.x * tx.x + x.y * tx.y, x.y * tx.x - x.x * tx.y,
                         y.x * ty.x + y.y * ty.y, y.y * ty.x - y.x * ty.y, low);
        const uint4 *a = v.basis + i * MT * 64 + lane;
#pragma unroll
        for (int t = 0; t < MT; t++) {
            multiply<__half, H>(s[t], __ldg(a + t * 64), b);
            multiply<__half, H>(s[t], __ldg(a + t * 64 + 32), b);
        }
    }
    Factors<H> b;
    split<__half, H>(b, slow[2 * k * H + head], slow[(2 * k + 1) * H + head],
                     slow[(2 * k + 8) * H + head], slow[(2 * k + 9) * H + head], low);
    const uint4 *a = v.basis + (v.fast / 8 + unit) * MT * 64 + lane;
#pragma unroll
    for (int t = 0; t < MT; t++) {
        multiply<__half, H>(s[t], __ldg(a + t * 64), b);
        multiply<__half, H>(s[t], __ldg(a + t * 64 + 32), b);
    }
}

/* One unit. */
template <int MT, int H>
__device__ __forceinline__ void
coded_unit(const char *blob, const char *k_scale, const CodedView<H> &v, const float2 *w,
           const float *slow, int unit, int visible, int lane, Running &r, float4 *o) {
    const bool low = H == 4 && lane / 4 >= 4;
    const int head = H == 4 ? lane / 4 % 4 : lane / 4, k = lane % 4;
    const int column = H == 4 ? lane * 2 % 4 : lane * 2 % 8;
    const fkv_cuda_head &h = v.head;
    constexpr int panel = MT * 64;
    const char *v_codes = blob + h.k_steps * panel, *k_exact = v_codes + h.v_steps * panel;
    const char *v_exact = k_exact + h.k_exact * panel * 8;
    const char *k_zero = k_scale + h.k_steps * 32;
    const char *v_scale = k_zero + h.k_steps * 32, *v_zero = v_scale + h.v_steps * 32;
    const int e = *(const int *)(v_zero + h.v_steps * 32);
    const float shrink = power2(-e);
    float s[MT][4] = {};
    float base = 0.0f;
    for (int i = 0; i < h.k_exact;
         i++) { /* rare: in their own scale, brought to that of the codes */
        const float *q = v.exacts + (i * 16 + 2 * k) * H + head;
        Factors<H> b;
        split<__half, H>(b, q[0], q[H], q[8 * H], q[9 * H], low);
#pragma unroll
        for (int t = 0; t < MT; t++) {
            multiply<__half, H>(s[t], stream16(k_exact + ((i * MT + t) * 32 + lane) * 16), b);
        }
    }
    if (h.k_exact) {
        const float x = power2(-kCodeBits - e), y = power2(2 - kCodeBits - e);
#pragma unroll
        for (int t = 0; t < MT; t++) {
            s[t][0] *= x, s[t][1] *= x, s[t][2] *= y, s[t][3] *= y;
        }
    }
    Words<MT> ahead;
    if (h.k_steps) {
        ahead.load(blob, lane);
    }
    for (int i = 0; i < h.k_steps; i++) {
        const Words<MT> words = ahead;
        if (i + 1 < h.k_steps) {
            ahead.load(blob + (i + 1) * panel, lane);
        }
        const float *q = v.planes + (i * 16 + 2 * k) * H + head;
        const float2 c0 = two_halves(k_scale + i * 32 + k * 4);
        const float2 c8 = two_halves(k_scale + i * 32 + k * 4 + 16);
        const float2 z0 = two_halves(k_zero + i * 32 + k * 4);
        const float2 z8 = two_halves(k_zero + i * 32 + k * 4 + 16);
        const float q0 = q[0], q1 = q[H], q8 = q[8 * H], q9 = q[9 * H];
        base += q0 * z0.x + q1 * z0.y + q8 * z8.x + q9 * z8.y;
        Factors<H> b;
        split<__half, H>(b, q0 * (c0.x * shrink), q1 * (c0.y * shrink), q8 * (c8.x * shrink),
                         q9 * (c8.y * shrink), low);
#pragma unroll
        for (int t = 0; t < MT / 2; t++) {
            multiply<__half, H>(s[2 * t], planes_of<0>(words.w[t]), b);
            multiply<__half, H>(s[2 * t + 1], planes_of<1>(words.w[t]), b);
        }
    }
    if (h.v_steps) {
        ahead.load(v_codes, lane);
    }
    base += __shfl_xor_sync(~0u, base, 1);
    base += __shfl_xor_sync(~0u, base, 2);
    float f[2], add[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
        const float norm = v.norm[column + c];
        const float carried = h.carried ? v.carrier_norm[column + c] : 1.0f;
        const float first = norm * power2(kCodeBits + e) / carried;
        f[c] = carried;
        add[c] = v.constant[column + c] + norm * __shfl_sync(~0u, base, (column + c) * 4);
#pragma unroll
        for (int t = 0; t < MT; t++) {
            s[t][c] *= first;
            s[t][c + 2] *= first * 0.25f;
        }
    }
    if (h.carried) {
        add_carriers<MT, H>(s, v, w, slow, unit, lane, head, low);
    }
    float alpha[2], sums[2];
    Factors<H> p[MT];
    soften<__half, MT, H>(s, f, add, visible, lane, r, alpha, sums, p);
    const bool adds = H == 8 || k < 2; /* zero points: once, with the high parts */
    for (int i = 0; i < h.v_steps; i++) {
        const Words<MT> words = ahead;
        if (i + 1 < h.v_steps) {
            ahead.load(v_codes + (i + 1) * panel, lane);
        }
        const __half *scale = (const __half *)(v_scale + i * 32) + lane / 4;
        const __half *zero = (const __half *)(v_zero + i * 32) + lane / 4;
        const float by0 = __half2float(scale[0]) * power2(kCodeBits);
        const float by8 = __half2float(scale[8]) * power2(kCodeBits - 2);
        const float z0 = adds ? __half2float(zero[0]) : 0.0f;
        const float z8 = adds ? __half2float(zero[8]) : 0.0f;
        float acc[4] = {}, other[4] = {}; /* two chains, half as long */
#pragma unroll
        for (int t = 0; t < MT / 2; t++) {
            multiply<__half, H>(acc, planes_of<0>(words.w[t]), p[2 * t]);
            multiply<__half, H>(other, planes_of<1>(words.w[t]), p[2 * t + 1]);
        }
#pragma unroll
        for (int t = 0; t < 4; t++) {
            acc[t] += other[t];
        }
        const float a0[2] = {z0 * sums[0], z0 * sums[1]}, a8[2] = {z8 * sums[0], z8 * sums[1]};
        gather(&o[i * 32 + lane], alpha, acc, by0, by8, a0, a8);
    }
    for (int i = 0; i < h.v_exact; i++) {
        const float none[2] = {0.0f, 0.0f};
        float acc[4] = {};
#pragma unroll
        for (int t = 0; t < MT; t++) {
            multiply<__half, H>(acc, stream16(v_exact + ((i * MT + t) * 32 + lane) * 16), p[t]);
        }
        gather(&o[(h.v_steps + i) * 32 + lane], alpha, acc, 1.0f, 1.0f, none, none);
    }
}

} // namespace fkv

#endif /* FKV_CUDA_ATTEND_CUH */
