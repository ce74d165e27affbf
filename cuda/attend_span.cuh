/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A work item of codes: what its warps share, and the way of units through shared memory. Each warp takes a run of
 * units and waits for no other. Carriers' weights are turned to the start of a span, then to a unit's middle.
 */
#ifndef FKV_CUDA_ATTEND_SPAN_CUH
#define FKV_CUDA_ATTEND_SPAN_CUH

#include "attend_coded.cuh"

namespace fkv {

/* Starts the copy of what the profile says of the item's K and V: carriers, kinds and planes of their channels. */
template <int H>
__device__ void fetch_profile(const Block<H> &b, const fkv_cuda_item &item,
                              const fkv_cuda_head &head) {
    const fkv_cuda_cache &c = b.g.c;
    const size_t first = ((size_t)b.g.a.layer * 2 * c.n_kv_heads + item.head) * c.dim;
    const auto copy = [&](int to, const char *from, int bytes) {
        for (int i = b.thread * 8; i < bytes; i += kThreads * 8) {
            copy_async8(b.shared + to + i, from + i);
        }
    };
    copy(b.at.mu, (const char *)((const float *)c.carriers + first), c.dim * 4);
    copy(b.at.kinds, (const char *)c.kinds + first, c.dim);
    const fkv_plane *planes = (const fkv_plane *)c.planes;
    constexpr int size = sizeof(fkv_plane);
    copy(b.at.lists, (const char *)(planes + head.k_planes), head.k_steps * 16 * size);
    copy(b.at.lists + b.g.k_planes * size, (const char *)(planes + head.k_exacts),
         head.k_exact * 16 * size);
    /* what the end of the item will need of V */
    const size_t values = first + (size_t)c.n_kv_heads * c.dim;
    copy(b.at.v_mu, (const char *)((const float *)c.carriers + values), c.dim * 4);
    copy(b.at.v_kinds, (const char *)c.kinds + values, c.dim);
    copy(b.at.v_lists, (const char *)(planes + head.v_planes), head.v_steps * 16 * size);
    copy(b.at.v_lists + head.v_steps * 16 * size, (const char *)(planes + head.v_exacts),
         head.v_exact * 16 * size);
    copies_commit();
}

/* Queries times carriers: [pairs][H] (a, b), and what does not turn. */
template <int H> __device__ void weigh_carriers(const Block<H> &b) {
    const fkv_cuda_cache &c = b.g.c;
    const int pairs = c.rope_dim / 2, all = padded_pairs(c), padded = (c.dim + 15) / 16 * 16;
    const float *mu = b.template as<float>(b.at.mu);
    const uint8_t *kinds = b.template as<uint8_t>(b.at.kinds);
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
        for (int d = b.lane; d < c.dim; d += 32) {
            sum += kinds[d] == 2 ? fabsf(q[h * padded + d]) : 0.0f;
        }
        for (int d = c.rope_dim + b.lane; d < c.dim; d += 32) {
            rest += kinds[d] == 2 ? 0.0f : q[h * padded + d] * mu[d];
        }
        for (int i = 16; i; i /= 2) {
            sum += __shfl_xor_sync(~0u, sum, i);
            rest += __shfl_xor_sync(~0u, rest, i);
        }
        if (!b.lane) {
            const float norm = power2(max(exponent(sum), -60) + 1 - kWBits);
            b.carrier_norm()[h] = norm;
            b.carrier_by()[h] = 1.0f / norm;
            b.constant()[h] = rest + 0.0f * sum; /* not a number if one of them is none */
        }
    }
}

/* Factors of K's planes: for scales as numbers, for zero points and exact channels as fragments. */
template <int H> __device__ void make_plane_factors(const Block<H> &b, const fkv_cuda_head &head) {
    const int padded = (b.g.c.dim + 15) / 16 * 16;
    const fkv_plane *planes = b.template as<fkv_plane>(b.at.lists);
    const float *q = b.template as<float>(b.at.q);
    const auto factor = [&](int first, int i, int h, const float *norm) {
        const fkv_plane p = planes[first + i];
        return p.channel < 0 ? 0.0f
                             : q[h * padded + p.channel] * __fdividef(power2(2 * p.index), norm[h]);
    };
    for (int i = b.thread; i < head.k_steps * 16 * H; i += kThreads) {
        const int panel = i / (16 * H), h = i / 16 % H;
        b.template as<float>(b.at.planes)[i] = factor(0, panel * 16 + i % 16, h, b.code_norm());
    }
    const int steps = head.k_steps, quads = H / 4;
    for (int i = b.thread; i < (steps + head.k_exact) * 32 * quads; i += kThreads) {
        const int lane = i % 32, panel = i / 32 / quads, quad = i / 32 % quads;
        const int h = quad * 4 + lane / 8, k = lane % 4 * 2;
        const bool exact = panel >= steps;
        const int row = (exact ? panel - steps : panel) * 16 + k;
        const int first = exact ? b.g.k_planes : 0;
        const float *norm = exact ? b.carrier_norm() : b.norm();
        const auto at = [&](int r) {
            return planes[first + row + r].index ? 0.0f : factor(first, row + r, h, norm);
        };
        const uint32_t cut = cut_of(lane);
        const uint2 x =
            make_uint2(split_halves(at(0), at(1), cut), split_halves(at(8), at(9), cut));
        if (exact) {
            b.template as<uint2>(
                b.at.exacts)[(quad * b.g.k_exacts / 16 + panel - steps) * 32 + lane] = x;
        } else {
            b.template as<uint2>(b.at.bases)[(quad * b.g.k_planes / 16 + panel) * 32 + lane] = x;
        }
    }
}

/* What a warp keeps of the span it is in. */
template <int H> struct Span {
    float2 *phases, *turned; /* [pairs], [H][fast], in the same place */
    float *slow;             /* [16][H] */

    __device__ explicit Span(const Block<H> &b) {
        char *own = b.of_warp(b.warp);
        phases = turned = (float2 *)(own + b.at.turned);
        slow = (float *)(own + b.at.slow);
    }
};

/* cos and sin of the pairs' angles: at the span's start, or at its middle for slow pairs. */
template <int H> __device__ void turn_phases(const Block<H> &b, const Span<H> &s, int span) {
    const fkv_cuda_cache &c = b.g.c;
    const double *inv_freq =
        b.g.near ? b.template as<double>(b.at.inv_freq) : (const double *)c.inv_freq;
    const double start = (double)c.sinks + (double)span * (FKV_SPAN * c.unit);
    const double middle = start + 0.5 * (FKV_SPAN * c.unit - 1);
    for (int j = b.lane; j < padded_pairs(c); j += 32) {
        float x = 0.0f, y = 1.0f;
        if (j < c.rope_dim / 2) {
            const double z = (j < c.fast ? start : middle) * inv_freq[j] * 0.15915494309189533577;
            sincospif(2.0f * (float)(z - rint(z)), &x, &y);
        }
        s.phases[j] = make_float2(y, x);
    }
}

/* Weights of the fast pairs turned to the span's start; behind turn_slow(), since phases are overwritten. */
template <int H> __device__ void turn_fast(const Block<H> &b, const Span<H> &s) {
    const float2 *w = b.template as<float2>(b.at.pairs);
    const int fast = b.g.c.fast;
    float2 t[4]; /* of no more than 128 pairs */
#pragma unroll
    for (int k = 0; k < 4; k++) {
        t[k] = b.lane + 32 * k < fast ? s.phases[b.lane + 32 * k] : make_float2(0.0f, 0.0f);
    }
    __syncwarp();
    for (int h = 0; h < H; h++) {
        const float by = b.carrier_by()[h];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int j = b.lane + 32 * k;
            if (j < fast) {
                const float2 x = w[j * H + h];
                s.turned[h * fast + j] = make_float2((x.x * t[k].x + x.y * t[k].y) * by,
                                                     (x.y * t[k].x - x.x * t[k].y) * by);
            }
        }
    }
}

/* Coefficients of the polynomials that stand for the slow pairs: cosines give to even ones, sines to odd ones. */
template <int H> __device__ void turn_slow(const Block<H> &b, const Span<H> &s) {
    const fkv_cuda_cache &c = b.g.c;
    const float2 *w = b.template as<float2>(b.at.pairs);
    const uint4 *project = b.g.near ? b.template as<uint4>(b.at.project) : (const uint4 *)c.project;
    const uint32_t cut = cut_of(b.lane);
    const int k = b.lane % 4;
    for (int quad = 0; quad < H / 4; quad++) {
        const int head = quad * 4 + b.lane / 8;
        const float by = b.carrier_by()[head];
        const auto factor = [&](int j) {
            const float2 x = w[j * H + head], t = s.phases[j];
            return split_halves((x.x * t.x + x.y * t.y) * by, (x.y * t.x - x.x * t.y) * by, cut);
        };
        float acc[4] = {};
        for (int i = c.fast; i < padded_pairs(c); i += 8) {
            const uint2 f = make_uint2(factor(i + k), factor(i + k + 4));
            const uint4 *a = project + (i - c.fast) * 8 + b.lane;
            multiply_halves(acc, a[0], f);
            multiply_halves(acc, a[32], f);
        }
        float *to = s.slow + quad * 4 + k;
        to[b.lane / 4 * H] = acc[0] + acc[1];
        to[(b.lane / 4 + 8) * H] = acc[2] + acc[3];
    }
}

template <int H> __device__ void begin_span(const Block<H> &b, const Span<H> &s, int span) {
    __syncwarp();
    turn_phases(b, s, span);
    __syncwarp();
    turn_slow(b, s);
    turn_fast(b, s);
    __syncwarp();
}

/* A warp's units on their way to shared memory: K and V have a place each, which is filled again as soon as it was
 * read. Parts that have no place are read where they lie. */
struct Conveyor {
    char *memory;
    uint64_t *barriers; /* of K and V */
    int k_bytes, v_bytes, lane;
    bool k_staged;
    uint32_t passed; /* units so far */
    const char *at;  /* the unit in hand */

    __device__ __forceinline__ void issue(const char *unit, int part) {
        char *to = memory + (part ? k_bytes : 0);
        const char *from = unit + (part ? k_bytes : 0);
        const int bytes = part ? v_bytes : k_bytes;
#if FKV_BULK
        if (unit && !lane && bytes) {
            bulk_copy(to, from, bytes, &barriers[part]);
        }
#else
        for (int i = lane * 16; unit && i < bytes; i += 512) {
            copy_async(to + i, from + i);
        }
        copies_commit();    /* also if there is nothing: groups are counted */
#endif
    }
    /* For a part that stays where it is. */
    __device__ __forceinline__ void announce(const char *unit, int part) const {
        if (unit && !lane && (part ? v_bytes : k_bytes)) {
            prefetch_block(unit + (part ? k_bytes : 0), part ? v_bytes : k_bytes);
        }
    }
    __device__ __forceinline__ void wait(int part, bool only) const {
#if FKV_BULK
        if (part ? v_bytes : k_bytes) {
            barrier_wait(&barriers[part], passed & 1);
        }
#else
        copies_wait(!only); /* all but the other part's, which came later */
        __syncwarp();
#endif
    }
};

/* The units of a sequence, one after the other: no divisions on the way. */
struct Walk {
    const uint64_t *entry; /* of the unit's block in the table */
    int left, within;      /* units ahead; number of the unit in its block */
    int tiles, units, unit_bytes, offset;

    /* The next unit's address, or NULL behind the last. */
    __device__ __forceinline__ const char *next() {
        if (left-- <= 0) {
            return nullptr;
        }
        const char *at = (const char *)*entry + (size_t)within * unit_bytes + offset;
        if (++within == units) {
            within = 0;
            entry += tiles;
        }
        return at;
    }
};

/* view_of: of a quad. Staged: both parts; else K if belt.k_staged, and V lies where it is. */
template <typename T, int MT, int H, bool Staged, typename F>
__device__ __forceinline__ void one_unit(const Block<H> &b, Conveyor &belt, const char *next,
                                         const F &view_of, const KeyDigits<T> &digits, int unit,
                                         int here, CodedRunning (&r)[H / 4]) {
    const char *k = Staged || belt.k_staged ? belt.memory : belt.at;
    const char *v = (Staged ? belt.memory : belt.at) + belt.k_bytes;
#pragma unroll
    for (int quad = 0; quad < H / 4; quad++) {
        const CodedView view = view_of(quad);
        float2 *o = (float2 *)b.of_warp(b.warp) + quad * b.g.coded_tiles * 32;
        Scores<MT> s = {};
        uint32_t x[MT][2];
        Weights<MT> w;
        if (view.head.carried) {
            score_carriers<MT, H>(view, unit % FKV_SPAN, b.lane, s);
        }
        if (!quad && (Staged || belt.k_staged)) {
            belt.wait(0, !Staged);
        }
        score_codes<T, MT, H>(k, view, digits, b.lane, s);
        if (view.head.k_exact) {
            score_exact<MT>(k, view, b.lane, s);
        }
        if (quad == H / 4 - 1) {
            __syncwarp();
            if (Staged || belt.k_staged) {
                belt.issue(next, 0);
            } else {
                belt.announce(next, 0);
            }
            if (!Staged) {
                belt.announce(next, 1);
            }
        }
        soften_unit<MT>(s.s, view, s.add, here, b.lane, r[quad], w, x);
        if (Staged && !quad) {
            belt.wait(1, false);
        }
        if (view.head.v_exact) {
            add_exact_values<MT>(v + view.head.v_steps * MT * 64, x, view.head.v_exact, w.alpha,
                                 w.beta, b.lane, o + view.head.v_steps * 32);
        }
        gather_codes<MT, !Staged>(v, view, w, b.lane, o);
    }
    if (Staged) {
        __syncwarp();
        belt.issue(next, 1);
    }
    belt.passed += Staged || belt.k_staged;
}

template <typename T, int MT, int H, bool Staged>
__device__ void coded_item(const Block<H> &b, const fkv_cuda_row &row, const fkv_cuda_item &item,
                           const fkv_cuda_head &head, CodedRunning (&r)[H / 4], uint32_t &passed) {
    const fkv_cuda_cache &c = b.g.c;
    const uint64_t *table = (const uint64_t *)row.table + b.g.a.layer * row.slots + 1;
    const int tiles = c.units_per_block * c.unit / 64;
    const int visible = visible_tokens(b.g, row, item) - c.sinks;
    const int count = min(item.count, (visible + c.unit - 1) / c.unit - item.first);
    const int first = item.first + count * b.warp / kWarps;
    const int end = item.first + count * (b.warp + 1) / kWarps;
    Walk walk = {table + first / c.units_per_block * tiles,
                 end - first,
                 first % c.units_per_block,
                 tiles,
                 c.units_per_block,
                 head.unit_bytes,
                 head.offset};
    Conveyor belt = {b.of_warp(b.warp) + b.at.stage,
                     b.template as<uint64_t>(b.at.barriers) + b.warp * kStages,
                     head.k_bytes,
                     head.bytes - head.k_bytes,
                     b.lane,
                     head.k_bytes <= b.g.stage,
                     passed,
                     walk.next()};
    const char *next = walk.next(); /* addresses early: tables are far away */
    const EarlyQuery<H> early = begin_query(b, row, item); /* as are the queries */
    if (Staged || belt.k_staged) {
        belt.issue(belt.at, 0);
    }
    if (Staged) {
        belt.issue(belt.at, 1);
    } else {
        belt.announce(belt.at, 1);
    }
    fetch_profile(b, item, head);
    load_query(b, row, item, Queries<T>::top, early);
    copies_wait(false);
    __syncthreads();
    weigh_carriers(b);
    __syncthreads();
    make_plane_factors(b, head);
    __syncthreads();
    const Span<H> span(b);
    float by[H / 4]; /* sums of codes to units of the carriers' norm */
#pragma unroll
    for (int quad = 0; quad < H / 4; quad++) {
        by[quad] = b.code_norm()[quad * 4 + b.lane % 4] * b.carrier_by()[quad * 4 + b.lane % 4];
    }
    const auto view_of = [&](int quad) {
        const int h = quad * 4 + b.lane % 4;
        return CodedView{head,
                         b.template as<float>(b.at.planes) + quad * 64,
                         b.template as<uint2>(b.at.bases) + quad * b.g.k_planes / 16 * 32,
                         b.template as<uint2>(b.at.exacts) + quad * b.g.k_exacts / 16 * 32,
                         b.template as<uint4>(b.at.basis),
                         (const uint4 *)c.sections,
                         b.template as<float2>(b.at.turns),
                         span.turned + quad * 4 * c.fast,
                         span.slow + quad * 4,
                         c.fast,
                         by[quad],
                         b.norm()[h],
                         b.carrier_norm()[h],
                         b.constant()[h]};
    };
    const KeyDigits<T> digits(b.lane);
    for (int unit = first; unit < end; unit++) {
        if (head.carried && (unit == first || unit % FKV_SPAN == 0)) {
            begin_span(b, span, unit / FKV_SPAN);
        }
        const char *second = walk.next();
        one_unit<T, MT, H, Staged>(b, belt, next, view_of, digits, unit,
                                   min(visible - unit * c.unit, c.unit), r);
        belt.at = next;
        next = second;
    }
#if !FKV_BULK
    copies_wait(false);
    __syncwarp();
#endif
    passed = belt.passed;
}

} // namespace fkv

#endif /* FKV_CUDA_ATTEND_SPAN_CUH */
