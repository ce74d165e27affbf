/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention over one unit of codes by one warp, for four query heads ("a quad").
 *
 * Codes are the operand of the matrix units as they lie: a word with a mask is a register of four 8-bit integers.
 * The other operand are integers too: queries times scales, and softmax weights, in digits of 8 bits. So products and
 * sums are exact; only what the digits leave out is lost, 2^-16 (bf16 caches) or 2^-22 (f16) of the largest factor
 * for queries, and 2^-24 of the unit's largest weight. Columns 2 t and 2 t + 1 hold two digits of head t, so that
 * the lanes of a column pair have different tokens, and no lane does another's work again.
 *
 * Carriers are sums of few functions of the position: fragments of f16 that are constant, in high and low parts.
 */
#ifndef FKV_CUDA_ATTEND_CODED_CUH
#define FKV_CUDA_ATTEND_CODED_CUH

#include "attend.cuh"

namespace fkv {

constexpr float kPTop = 22.99f;          /* log2 of the largest weight as an integer, below 2^23 */
constexpr float kMagic = 8388608.0f;     /* 2^23: adding it rounds to an integer, in the low bits */
constexpr uint32_t kCodes = 0x03030303u; /* the first four codes of a word */
constexpr int kMostSteps = 20; /* panels of K with which sums of two digits stay below 2^31 */

/* Digits of queries' factors, how large a factor may become, and what is added for rounding and signs. */
template <typename T> struct Queries {
    static constexpr int digits = 2;
    static constexpr float top = 16220.0f; /* a scale is below 2, so that factors stay below 2^15 */
    static constexpr float magic = 1.5f * kMagic + 0x80;
};
template <> struct Queries<__half> {
    static constexpr int digits = 3;
    static constexpr float top = 2076180.0f;
    static constexpr float magic = 1.5f * kMagic + 0x8080;
};

__device__ __forceinline__ void multiply_keys(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                              uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_keys(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, "
                 "{%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a0), "r"(a1), "r"(b0));
}
__device__ __forceinline__ void multiply_values(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_halves(float (&c)[4], const uint4 &a, uint2 b) {
    Element<__half>::mma(c, a, b.x, b.y);
}

/* (x, y) as f16, cut off; on the lanes of low parts what the cut leaves. `cut`: the bits that go, else 0. */
__device__ __forceinline__ uint32_t split_halves(float x, float y, uint32_t cut) {
    uint32_t z;
    x -= __uint_as_float(__float_as_uint(x) & cut);
    y -= __uint_as_float(__float_as_uint(y) & cut);
    asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(y), "f"(x));
    return z;
}
/* For the lane's column: odd ones hold low parts. */
__device__ __forceinline__ uint32_t cut_of(int lane) {
    return lane & 4 ? 0xffffe000u : 0;
}
/* (high, low) of x as f16: the columns of a head in an accumulator's row. */
__device__ __forceinline__ uint32_t both_parts(float x) {
    const __half high = __float2half_rz(x);
    const __half2 y = __halves2half2(high, __float2half_rz(x - __half2float(high)));
    return *reinterpret_cast<const uint32_t *>(&y);
}

__device__ __forceinline__ float2 two_halves(uint32_t x) {
    return __half22float2(*reinterpret_cast<const __half2 *>(&x));
}

/* What the warps of a work item share about coded units, for a quad. */
struct CodedView {
    const fkv_cuda_head &head;
    const float *planes;   /* [panels][H][16] factors of the planes, the quad's first head */
    const uint2 *bases;    /* [panels][32] the same for zero points, fragments */
    const uint2 *exacts;   /* [panels][32] of the exact channels */
    const uint4 *basis;    /* fragments, see backend_cuda.h; in shared memory */
    const uint4 *sections; /* fragments */
    const float2 *turns;   /* [SPAN][fast] */
    const float2 *turned;  /* [H][fast] weights at the span's start, the quad's first head */
    const float *slow;     /* [16][H] coefficients */
    int fast;
    float by, base_norm, carrier_norm,
        constant; /* of the lane's head; by: sums of codes to the carriers' norm */
};

/* The running softmax of the lane's head. */
struct CodedRunning {
    float max, sum;
};

/* Factors of four planes for the lane's column: q * scale rounded to an integer, then its digit. */
template <typename T> struct KeyDigits {
    uint32_t first, fix_or, fix_sub, fix_xor;

    __device__ explicit KeyDigits(int lane) {
        /* columns 2 t: the higher digit; digits but the highest are stored with 128 added */
        const bool low = lane & 4;
        const uint32_t byte = Queries<T>::digits - 1 - low;
        first = byte | (4 + byte) << 4;
        fix_or = fix_sub = 0;
        fix_xor = low ? 0x80808080u : 0;
        if (Queries<T>::digits == 3 &&
            !low) { /* the third byte has the sum's exponent's 0x40 in it */
            fix_or = fix_xor = 0x80808080u;
            fix_sub = 0x40404040u;
        }
    }
    /* For scales with the largest exponent e: added to a factor it leaves its digits in the low bits. */
    static __device__ __forceinline__ float magic(int e) {
        return Queries<T>::magic * power2(e);
    }
    __device__ __forceinline__ void make(uint32_t (&b)[2], const float *q, const char *scales,
                                         float magic) const {
        const float4 x = *(const float4 *)q;
        const uint2 s = *(const uint2 *)scales;
        const float2 s0 = two_halves(s.x), s2 = two_halves(s.y);
        const uint32_t v0 = __float_as_uint(fmaf(x.x, s0.x, magic));
        const uint32_t v1 = __float_as_uint(fmaf(x.y, s0.y, magic));
        const uint32_t v2 = __float_as_uint(fmaf(x.z, s2.x, magic));
        const uint32_t v3 = __float_as_uint(fmaf(x.w, s2.y, magic));
        b[0] = __byte_perm(__byte_perm(v0, v1, first), __byte_perm(v2, v3, first), 0x5410);
        if (Queries<T>::digits == 3) {
            b[0] = ((b[0] | fix_or) - fix_sub) ^ fix_xor;
            b[1] = __byte_perm(__byte_perm(v0, v1, 0x40), __byte_perm(v2, v3, 0x40), 0x5410) ^
                   0x80808080u;
        } else {
            b[0] ^= fix_xor;
        }
    }
};

/* Sums of digits as one number. */
template <int D>
__device__ __forceinline__ float weigh_digits(const int *c, const int *d, bool wide) {
    float x;
    if (wide) {
        x = fmaf((float)c[0], 256.0f, (float)c[1]);
    } else {
        x = (float)(c[0] * 256 + c[1]);
    }
    return D == 3 ? fmaf(x, 256.0f, (float)d[0]) : x;
}

/* The lane's scores: token lane / 4 of each tile, and the eighth behind it; in units of carrier_norm. */
template <int MT> struct Scores {
    float s[MT][2];
    float add; /* to all, in units of log2 */
};

/* Adds the scores of the codes. */
template <typename T, int MT, int H>
__device__ __forceinline__ void score_codes(const char *part, const CodedView &v,
                                            const KeyDigits<T> &digits, int lane, Scores<MT> &s) {
    constexpr int D = Queries<T>::digits, G = (D + 1) / 2, panel = MT * 64;
    const int steps = v.head.k_steps, t = lane % 4;
    const char *scales = part + steps * panel + v.head.k_exact * panel * 8;
    const char *zeros = scales + steps * 32;
    const int e = *(const int *)(zeros + steps * 32);
    const float magic = KeyDigits<T>::magic(e);
    const float *q = v.planes + lane / 8 * 16 + t * 4;
    float base[4] = {};
    int c[G][MT][4] = {};
    for (int i = 0; i < steps; i++) { /* all tokens' rows are the same: the unit's zero points */
        const uint32_t low = *(const uint32_t *)(zeros + i * 32 + t * 4);
        const uint32_t high = *(const uint32_t *)(zeros + i * 32 + t * 4 + 16);
        multiply_halves(base, make_uint4(low, low, high, high), v.bases[i * 32 + lane]);
    }
    for (int i = 0; i + 1 < steps; i += 2) {
        uint32_t b0[2], b1[2];
        digits.make(b0, q + i * H * 16, scales + i * 32 + t * 8, magic);
        digits.make(b1, q + (i + 1) * H * 16, scales + i * 32 + 32 + t * 8, magic);
#pragma unroll
        for (int j = 0; j < MT / 4; j++) {
            const uint4 w = ((const uint4 *)(part + i * panel))[j * 32 + lane];
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const uint32_t m = kCodes << 2 * p;
#pragma unroll
                for (int g = 0; g < G; g++) {
                    multiply_keys(c[g][4 * j + p], w.x & m, w.y & m, w.z & m, w.w & m, b0[g],
                                  b1[g]);
                }
            }
        }
    }
    if (steps & 1) {
        uint32_t b[2];
        digits.make(b, q + (steps - 1) * H * 16, scales + (steps - 1) * 32 + t * 8, magic);
#pragma unroll
        for (int j = 0; j < MT / 4; j++) {
            const uint2 w = ((const uint2 *)(part + (steps - 1) * panel))[lane * (MT / 4) + j];
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const uint32_t m = kCodes << 2 * p;
#pragma unroll
                for (int g = 0; g < G; g++) {
                    multiply_keys(c[g][4 * j + p], w.x & m, w.y & m, b[g]);
                }
            }
        }
    }
    const bool wide = steps > kMostSteps;
    const float f = v.by * power2(e); /* sums to the carriers' norm; tile i's are times 4^(i % 4) */
#pragma unroll
    for (int i = 0; i < MT; i++) {
        const float by = f / (float)(1 << 2 * (i % 4));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float x = weigh_digits<D>(&c[0][i][2 * r], &c[G - 1][i][2 * r], wide);
            s.s[i][r] = fmaf(x, by, s.s[i][r]);
        }
    }
    s.add = fmaf(base[0] + base[1], v.base_norm, v.constant);
}

/* Exact channels of K: f16, behind the codes. */
template <int MT>
__device__ __forceinline__ void score_exact(const char *part, const CodedView &v, int lane,
                                            Scores<MT> &s) {
    const uint4 *a = (const uint4 *)(part + v.head.k_steps * MT * 64) + lane;
    float c[MT][4] = {};
    for (int i = 0; i < v.head.k_exact; i++) {
        const uint2 b = v.exacts[i * 32 + lane];
#pragma unroll
        for (int t = 0; t < MT; t++) {
            multiply_halves(c[t], a[(i * MT + t) * 32], b);
        }
    }
#pragma unroll
    for (int t = 0; t < MT; t++) {
        s.s[t][0] += c[t][0] + c[t][1];
        s.s[t][1] += c[t][2] + c[t][3];
    }
}

/* Factors of eight fast pairs: for cosines and sines. */
struct Turned {
    uint32_t even, odd;
};
__device__ __forceinline__ Turned turn_pairs(const float2 *turned, const float2 *turns,
                                             uint32_t cut) {
    const float4 w = *(const float4 *)turned, t = *(const float4 *)turns;
    return {split_halves(w.x * t.x + w.y * t.y, w.z * t.z + w.w * t.w, cut),
            split_halves(w.y * t.x - w.x * t.y, w.w * t.z - w.z * t.w, cut)};
}

/* Those of the unit's polynomials. */
template <int H>
__device__ __forceinline__ Turned turn_polynomials(const CodedView &v, int unit, int lane,
                                                   uint32_t cut) {
    const float *x = v.slow + lane % 4 * 2 * H + lane / 8;
    const uint2 b =
        make_uint2(split_halves(x[0], x[H], cut), split_halves(x[8 * H], x[9 * H], cut));
    const uint4 *a = v.sections + unit * 64 + lane;
    float c[4] = {};
    multiply_halves(c, __ldg(a), b);
    multiply_halves(c, __ldg(a + 32), b);
    return {transpose(both_parts(c[0] + c[1])), transpose(both_parts(c[2] + c[3]))};
}

/* Scores begin with the carriers': an even and an odd function of the distance from the unit's middle. */
template <int MT, int H>
__device__ __forceinline__ void score_carriers(const CodedView &v, int unit, int lane,
                                               Scores<MT> &s) {
    constexpr int tiles = MT / 2;
    const uint32_t cut = cut_of(lane);
    const float2 *turned = v.turned + lane / 8 * v.fast + lane % 4 * 2;
    const float2 *turns = v.turns + unit * v.fast + lane % 4 * 2;
    const int panels = v.fast / 16 + 1;
    const Turned polynomials = turn_polynomials<H>(v, unit, lane, cut);
    float even[tiles][4] = {}, odd[tiles][4] = {};
    for (int i = 0; i < panels; i++) {
        Turned x = polynomials, y = {0, 0};
        if (i * 16 < v.fast) {
            x = turn_pairs(turned + i * 16, turns + i * 16, cut);
            y = polynomials;
        }
        if (i * 16 + 8 < v.fast) {
            y = turn_pairs(turned + i * 16 + 8, turns + i * 16 + 8, cut);
        }
        const uint32_t a = shared_address(v.basis + i * tiles * 64 + lane);
        const uint32_t b = a + panels * tiles * 1024;
#pragma unroll
        for (int part = 0; part < 2; part++) {
            uint4 f[tiles];
#pragma unroll
            for (int t = 0; t < tiles; t++) {
                f[t] = load_now(a + t * 1024 + part * 512);
            }
#pragma unroll
            for (int t = 0; t < tiles; t++) {
                multiply_halves(even[t], f[t], make_uint2(x.even, y.even));
            }
#pragma unroll
            for (int t = 0; t < tiles; t++) {
                f[t] = load_now(b + t * 1024 + part * 512);
            }
#pragma unroll
            for (int t = 0; t < tiles; t++) {
                multiply_halves(odd[t], f[t], make_uint2(x.odd, y.odd));
            }
        }
    }
#pragma unroll
    for (int t = 0; t < tiles; t++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float e = even[t][2 * r] + even[t][2 * r + 1],
                        o = odd[t][2 * r] + odd[t][2 * r + 1];
            s.s[t][r] = e - o;
            s.s[tiles + t][r] = e + o;
        }
    }
}

/* The weights of a unit: digits as operands, [tiles][(high, middle), (low, -)]. */
template <int MT> struct Weights {
    uint32_t p[MT][2];
    float alpha; /* what was gathered before shrinks by it, */
    float beta;  /* and the unit's sums of integers are times beta */
    float total; /* of the unit */
};

/* o[panel] of exact V channels, whose factors are f16. x: weights as numbers with 2^23 added. */
template <int MT>
__device__ __forceinline__ void add_exact_values(const char *a, const uint32_t (&x)[MT][2],
                                                 int panels, float alpha, float beta, int lane,
                                                 float2 *o) {
    uint2 p[MT];
#pragma unroll
    for (int t = 0; t < MT; t++) {
        p[t].x = transpose(both_parts((__uint_as_float(x[t][0]) - kMagic) * 0x1p-13f));
        p[t].y = transpose(both_parts((__uint_as_float(x[t][1]) - kMagic) * 0x1p-13f));
    }
    for (int i = 0; i < panels; i++) {
        float acc[4] = {};
#pragma unroll
        for (int t = 0; t < MT; t++) {
            multiply_halves(acc, ((const uint4 *)a)[(i * MT + t) * 32 + lane], p[t]);
        }
        const float2 was = o[i * 32 + lane];
        o[i * 32 + lane] = make_float2(fmaf(acc[0] + acc[1], beta * 0x1p13f, was.x * alpha),
                                       fmaf(acc[2] + acc[3], beta * 0x1p13f, was.y * alpha));
    }
}

/* Scores into weights. `visible` of the unit's tokens count. */
template <int MT>
__device__ __forceinline__ void soften_unit(float (&s)[MT][2], const CodedView &v, float add,
                                            int visible, int lane, CodedRunning &r, Weights<MT> &w,
                                            uint32_t (&x)[MT][2]) {
    float top = -INFINITY;
    if (visible < MT * 16) {
#pragma unroll
        for (int i = 0; i < MT; i++) {
            const int token = in_order(MT * 16, i * 16 + lane / 4);
            const int other = in_order(MT * 16, i * 16 + 8 + lane / 4);
            s[i][0] = token < visible ? s[i][0] : -INFINITY;
            s[i][1] = other < visible ? s[i][1] : -INFINITY;
        }
    }
#pragma unroll
    for (int i = 0; i < MT; i++) {
        top = fmaxf(top, fmaxf(s[i][0], s[i][1]));
    }
#pragma unroll
    for (int d = 4; d < 32; d *= 2) {
        top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    }
    const float shift = fmaf(-top, v.carrier_norm, kPTop);
    const float here = fmaf(top, v.carrier_norm, add), max = fmaxf(here, r.max);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float y = fast_exp2(fmaf(s[i][j], v.carrier_norm, shift));
            sum += y;
            x[i][j] = __float_as_uint(y + kMagic);
        }
        w.p[i][0] = transpose(__byte_perm(x[i][0], x[i][1], 0x5162));
        w.p[i][1] = transpose(__byte_perm(x[i][0], x[i][1], 0x4040));
    }
#pragma unroll
    for (int d = 4; d < 32; d *= 2) {
        sum += __shfl_xor_sync(~0u, sum, d);
    }
    w.alpha = fast_exp2(r.max - max);
    w.beta = fast_exp2(here - max + (kPBits - kPTop));
    w.total = sum * w.beta;
    r.max = max;
    r.sum = fmaf(r.sum, w.alpha, w.total);
}

/* What a lane needs of a panel of V. */
template <int MT> struct ValuePanel {
    uint32_t word[MT / 2], scale[2]; /* scale: (scale, zero point) of its two planes */

    __device__ __forceinline__ void load(const char *codes, const char *scales, int lane) {
        if (MT == 8) {
            const uint4 x = ((const uint4 *)codes)[lane];
            word[0] = x.x, word[1] = x.y, word[MT / 2 - 2] = x.z, word[MT / 2 - 1] = x.w;
        } else {
            const uint2 x = ((const uint2 *)codes)[lane];
            word[0] = x.x, word[1] = x.y;
        }
        scale[0] = ((const uint32_t *)scales)[lane / 4];
        scale[1] = ((const uint32_t *)scales)[lane / 4 + 8];
    }
};

/* o[panel] := o * alpha + scale * (weights times codes) + zero point * total. Far: the panels are not in shared memory,
 * so that each is loaded ahead of its use. */
template <int MT, bool Far>
__device__ __forceinline__ void gather_codes(const char *part, const CodedView &v,
                                             const Weights<MT> &w, int lane, float2 *o) {
    constexpr int panel = MT * 64, each = MT / 4;
    const char *scales = part + v.head.v_steps * panel + v.head.v_exact * panel * 8;
    const float beta0 = w.beta * 0.0625f, beta8 = w.beta * 0.015625f;
    ValuePanel<MT> ahead;
    if (Far && v.head.v_steps) {
        ahead.load(part, scales, lane);
    }
    for (int i = 0; i < v.head.v_steps; i++) {
        ValuePanel<MT> now;
        if (Far) {
            now = ahead;
            if (i + 1 < v.head.v_steps) {
                ahead.load(part + (i + 1) * panel, scales + (i + 1) * 64, lane);
            }
        } else {
            now.load(part + i * panel, scales + i * 64, lane);
        }
        const float2 c0 = two_halves(now.scale[0]), c8 = two_halves(now.scale[1]);
        /* codes times 1 and 4 in `x`, times 16 and 64 in `y` */
        int x[2][4] = {}, y[2][4] = {};
#pragma unroll
        for (int j = 0; j < each; j++) {
            const uint32_t u = now.word[2 * j], z = now.word[2 * j + 1];
#pragma unroll
            for (int g = 0; g < 2; g++) {
                multiply_values(x[g], u & kCodes, u & kCodes << 2, z & kCodes, z & kCodes << 2,
                                w.p[2 * j][g], w.p[2 * j + 1][g]);
                multiply_values(y[g], u & kCodes << 4, u & kCodes << 6, z & kCodes << 4,
                                z & kCodes << 6, w.p[2 * (each + j)][g],
                                w.p[2 * (each + j) + 1][g]);
            }
        }
        float sum[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int high = x[0][2 * r] * 16 + y[0][2 * r];
            const int middle = x[0][2 * r + 1] * 16 + y[0][2 * r + 1];
            const int low = x[1][2 * r] * 16 + y[1][2 * r];
            sum[r] = fmaf((float)(high * 256 + middle), 256.0f, (float)low);
        }
        const float2 was = o[i * 32 + lane];
        o[i * 32 + lane] =
            make_float2(fmaf(sum[0], c0.x * beta0, fmaf(c0.y, w.total, was.x * w.alpha)),
                        fmaf(sum[1], c8.x * beta8, fmaf(c8.y, w.total, was.y * w.alpha)));
    }
}

} // namespace fkv

#endif /* FKV_CUDA_ATTEND_CODED_CUH */
