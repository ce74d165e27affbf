/* SPDX-License-Identifier: Apache-2.0 */
/* Attention of Fourier caches: what happens before and behind the items; see fourier.cuh. */
#include "fourier.cuh"

#include <math_constants.h>

namespace fkv {

constexpr int kChunk = 128; /* reals of a spectrum that a block of bins_kernel() makes */
constexpr int kQueries = 4; /* query heads it makes them for */
constexpr int kGroups = 16; /* of threads, when rows of coefficients are added */
constexpr int kMassThreads = 1024;
constexpr int kChannels = 8; /* that a block of output_kernel() makes */

struct Counts {
    int items, waves, outputs;
};
__device__ __forceinline__ Counts counts_of(const fkv_cuda_attend &a) {
    const int *n = (const int *)a.n_items;
    return {n[0], n[1], n[2]};
}

/* Elements of the query that meet coded channels, in units of log2. */
__device__ void load_coded_query(const fkv_cuda_cache &c, const fkv_cuda_attend &a,
                                 const fkv_cuda_row &row, const fkv_cuda_wave &wave,
                                 const fkv_cuda_split &split, int first, int n, float *q) {
    const uint16_t *list = (const uint16_t *)c.channels + split.list[0] + split.kept[0];
    const float *rope =
        (const float *)a.rope + row.rope_offset + row.base + wave.query - row.rope_first;
    for (int i = threadIdx.x; i < n * split.coded[0]; i += blockDim.x) {
        const int h = i / split.coded[0], r = i % split.coded[0];
        const char *from = row_at(a.q, row.offset + wave.query, first + h);
        q[h * 256 + r] =
            rotated(c, from, a.q.dtype, list[r], rope, a.rope_capacity) * (c.scale * kToLog2);
    }
}

/* What the restoration adds: q . offsets to the mean, q . betas times the spectrum of a constant. */
__device__ void weigh_states(const fkv_cuda_state *states, int coded, int n, const float *q,
                             float (*sums)[2]) {
    const int h = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (h >= n) {
        return;
    }
    float beta = 0.0f, offset = 0.0f;
    for (int r = lane; r < coded; r += 32) {
        beta = fmaf(q[h * 256 + r], states[r].beta, beta);
        offset = fmaf(q[h * 256 + r], states[r].offset, offset);
    }
    for (int i = 16; i; i /= 2) {
        beta += __shfl_xor_sync(~0u, beta, i);
        offset += __shfl_xor_sync(~0u, offset, i);
    }
    if (!lane) {
        sums[h][0] = beta;
        sums[h][1] = offset;
    }
}

__global__ __launch_bounds__(256) void bins_kernel(const __grid_constant__ fkv_cuda_cache c,
                                                   const __grid_constant__ fkv_cuda_attend a) {
    __shared__ float q[kQueries * 256], sums[kGroups][kQueries][kChunk + 4];
    __shared__ float states[kQueries][2];
    release_launch();
    const int quads = (c.group + kQueries - 1) / kQueries;
    const int chunks = (int)((a.spectrum_stride + kChunk - 1) / kChunk);
    const int jobs = counts_of(a).waves * c.n_kv_heads * quads * chunks;
    const int column = threadIdx.x % 16 * 8, rank = threadIdx.x / 16;
    for (int job = blockIdx.x; job < jobs; job += gridDim.x) {
        const int chunk = job % chunks, quad = job / chunks % quads;
        const int head = job / chunks / quads % c.n_kv_heads;
        const fkv_cuda_wave wave =
            ((const fkv_cuda_wave *)a.waves)[job / chunks / quads / c.n_kv_heads];
        const fkv_cuda_row row = ((const fkv_cuda_row *)a.rows)[wave.row];
        const fkv_cuda_spectrum &sp = *(const fkv_cuda_spectrum *)row.spectrum;
        const fkv_cuda_split &split =
            ((const fkv_cuda_split *)c.splits)[a.layer * c.n_kv_heads + head];
        const int stride = sp.stride, coded = split.coded[0], first = chunk * kChunk;
        const int n = min(kQueries, c.group - quad * kQueries);
        const int q_head = head * c.group + quad * kQueries;
        if (first >= stride || !visible_tiles(c, a, row, wave, sp)) {
            continue;
        }
        const Segment segment = segment_of(c, a, row, wave.segment, stride);
        load_coded_query(c, a, row, wave, split, q_head, n, q);
        __syncthreads();
        weigh_states(segment.states + split.row[0], coded, n, q, states);
        float acc[kQueries][8] = {};
        if (first + column < stride) {
#pragma unroll 4
            for (int r = rank; r < coded; r += kGroups) {
                float x[8];
                load_eight(segment.coefficients,
                           (size_t)(split.row[0] + r) * stride + first + column, c.coefficients, x);
#pragma unroll
                for (int h = 0; h < kQueries; h++) {
                    const float by = h < n ? q[h * 256 + r] : 0.0f;
#pragma unroll
                    for (int j = 0; j < 8; j++) {
                        acc[h][j] = fmaf(by, x[j], acc[h][j]);
                    }
                }
            }
        }
#pragma unroll
        for (int h = 0; h < kQueries; h++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                sums[rank][h][column + j] = acc[h][j];
            }
        }
        __syncthreads();
        const int64_t job_wave = job / chunks / quads / c.n_kv_heads;
        float *to = (float *)a.spectra + (job_wave * c.n_q_heads + q_head) * a.spectrum_stride;
        for (int i = threadIdx.x; i < n * kChunk; i += blockDim.x) {
            const int h = i / kChunk, at = i % kChunk, bin = first + at;
            if (bin < stride) {
                float sum = 0.0f;
                for (int g = 0; g < kGroups; g++) {
                    sum += sums[g][h][at];
                }
                sum = fmaf(segment.ones[bin], states[h][0], sum) * ((const float *)sp.weight)[bin];
                to[h * a.spectrum_stride + bin] = bin ? sum : sum + states[h][1];
            }
        }
        __syncthreads();
    }
    await_launch(); /* who waits for this launch waits for the append in front of it, too */
}

__global__ __launch_bounds__(256) void grid_kernel(const __grid_constant__ fkv_cuda_cache c,
                                                   const __grid_constant__ fkv_cuda_attend a) {
    extern __shared__ __align__(128) char memory[];
    __shared__ float most[8];
    float2 *z = (float2 *)memory;
    release_launch();
    const int jobs = counts_of(a).waves * c.n_q_heads;
    await_launch();
    for (int job = blockIdx.x; job < jobs; job += gridDim.x) {
        const fkv_cuda_wave wave = ((const fkv_cuda_wave *)a.waves)[job / c.n_q_heads];
        const fkv_cuda_row row = ((const fkv_cuda_row *)a.rows)[wave.row];
        const fkv_cuda_spectrum &sp = *(const fkv_cuda_spectrum *)row.spectrum;
        const int n = 1 << sp.log_fft, log_n = sp.log_fft, grid = sp.grid;
        const bool direct = sp.direct;
        if (!visible_tiles(c, a, row, wave, sp)) {
            continue;
        }
        const float *from = (const float *)a.spectra + job * a.spectrum_stride;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            float2 x = make_float2(0.0f, 0.0f);
            if (i < sp.bins) {
                x = times(make_float2(from[i], -from[sp.padded + i]), ((const float2 *)sp.pre)[i]);
            }
            z[spaced(i)] = x;
        }
        __syncthreads();
        if (direct) {
            transform<false, true>(z, log_n, (const float2 *)sp.twiddles);
        } else {
            convolve<false>(z, sp);
        }
        const auto point = [&](int i) {
            if (direct) {
                return z[spaced(reversed(i & (n - 1), log_n))].x;
            }
            const float2 x = z[spaced(i)], by = ((const float2 *)sp.post)[i];
            return by.x * x.x - by.y * x.y;
        };
        float largest = 0.0f;
        for (int i = threadIdx.x; i < grid; i += blockDim.x) {
            largest = fmaxf(largest, fabsf(point(i)));
        }
        for (int i = 16; i; i /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, i));
        }
        if (threadIdx.x % 32 == 0) {
            most[threadIdx.x / 32] = largest;
        }
        __syncthreads();
        for (int i = 0; i < 8; i++) {
            largest = fmaxf(largest, most[i]);
        }
        /* factors of up to 2^14: their low parts are normal numbers of f16 for all that matters */
        const int e = max(exponent(largest) - 13, -100);
        const float by = power2(-e);
        float *to = (float *)a.grids + job * a.grid_stride;
        for (int i = threadIdx.x; i < a.grid_stride; i += blockDim.x) {
            to[i] = i < grid ? point(i) * by : 0.0f;
        }
        if (!threadIdx.x) {
            ((float *)a.stats)[job * 4] = power2(e);
        }
        __syncthreads();
    }
}

/* Largest score of a wave's tiles; their shares exp2(largest of the tile - that), in shared memory. */
__device__ float weigh_tiles(const float *maxima, int tiles, float *shares, float *scratch) {
    float top = kNothing;
    for (int j = threadIdx.x; j < tiles; j += blockDim.x) {
        top = fmaxf(top, maxima[j]);
    }
    for (int i = 16; i; i /= 2) {
        top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
    }
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = top;
    }
    __syncthreads();
    for (int i = 0; i < (int)blockDim.x / 32; i++) {
        top = fmaxf(top, scratch[i]);
    }
    for (int j = threadIdx.x; j < tiles; j += blockDim.x) {
        shares[j] = fast_exp2(maxima[j] - top);
    }
    __syncthreads();
    return top;
}

/* Grid point i of what the tiles have spread. */
__device__ __forceinline__ float mass_at(const float *mass, const float *shares, int tiles,
                                         const fkv_cuda_spectrum &sp, int i) {
    const int each = 64 / sp.cell, first = i - sp.points + 1;
    float sum = 0.0f;
#pragma unroll 4
    for (int j = first <= 0 ? 0 : (first + each - 1) / each; j < tiles && j * each <= i; j++) {
        sum = fmaf(mass[(size_t)j * sp.rows + i - j * each], shares[j], sum);
    }
    return sum;
}

__global__
__launch_bounds__(kMassThreads) void mass_kernel(const __grid_constant__ fkv_cuda_cache c,
                                                 const __grid_constant__ fkv_cuda_attend a,
                                                 int shares_at) {
    extern __shared__ __align__(128) char memory[];
    __shared__ float scratch[kMassThreads / 32];
    float2 *z = (float2 *)memory;
    float *shares = (float *)(memory + shares_at);
    release_launch();
    const int jobs = counts_of(a).waves * c.n_q_heads;
    await_launch();
    for (int job = blockIdx.x; job < jobs; job += gridDim.x) {
        const fkv_cuda_wave wave = ((const fkv_cuda_wave *)a.waves)[job / c.n_q_heads];
        const fkv_cuda_row row = ((const fkv_cuda_row *)a.rows)[wave.row];
        const fkv_cuda_spectrum &sp = *(const fkv_cuda_spectrum *)row.spectrum;
        const int n = 1 << sp.log_fft, log_n = sp.log_fft, head = job % c.n_q_heads;
        const int tiles = visible_tiles(c, a, row, wave, sp);
        if (!tiles) {
            continue;
        }
        const int64_t first = (int64_t)head * sp.per_segment;
        const float *mass = (const float *)a.mass + wave.mass + first * sp.rows;
        const float top =
            weigh_tiles((const float *)a.maxima + wave.maxima + first, tiles, shares, scratch);
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            float2 x = make_float2(0.0f, 0.0f);
            if (sp.direct) {
                for (int k = i; k < sp.grid; k += n) {
                    x.x += mass_at(mass, shares, tiles, sp, k);
                }
            } else if (i < sp.grid) {
                const float g = mass_at(mass, shares, tiles, sp, i);
                const float2 by = ((const float2 *)sp.post)[i];
                x = make_float2(g * by.x, -g * by.y);
            }
            z[spaced(i)] = x;
        }
        __syncthreads();
        if (sp.direct) {
            transform<false, false>(z, log_n, (const float2 *)sp.twiddles);
        } else {
            convolve<true>(z, sp);
        }
        float *to = (float *)a.spectra + job * a.spectrum_stride, ones = 0.0f, total = 0.0f;
        const float *weight = (const float *)sp.weight,
                    *constant = segment_of(c, a, row, wave.segment, sp.stride).ones;
        for (int i = threadIdx.x; i < sp.padded; i += blockDim.x) {
            float u = 0.0f, v = 0.0f;
            if (i < sp.bins) {
                const float2 x = z[spaced(sp.direct ? reversed(i, log_n) : i)];
                const float2 by = ((const float2 *)sp.pre)[i];
                u = x.x * by.x + x.y * by.y;
                v = x.x * by.y - x.y * by.x;
            }
            total = i ? total : u; /* thread 0's */
            u *= weight[i];
            v *= weight[sp.padded + i];
            ones = fmaf(u, constant[i], fmaf(v, constant[sp.padded + i], ones));
            to[i] = u;
            to[sp.padded + i] = v;
        }
        for (int i = 16; i; i /= 2) {
            ones += __shfl_xor_sync(~0u, ones, i);
        }
        __syncthreads(); /* scratch has been read */
        if (threadIdx.x % 32 == 0) {
            scratch[threadIdx.x / 32] = ones;
        }
        __syncthreads();
        if (!threadIdx.x) {
            float *stats = (float *)a.stats + job * 4;
            ones = 0.0f;
            for (int i = 0; i < (int)blockDim.x / 32; i++) {
                ones += scratch[i];
            }
            stats[1] = top;
            stats[2] = total;
            stats[3] = ones;
        }
        __syncthreads();
    }
}

/* What an output is made of. */
struct Parts {
    const float *parts, *stats; /* [parts][group][stride]; of the first wave, [waves][Hq][4] */
    int n_parts, n_waves, stride, group, n_q_heads, dim;

    __device__ __forceinline__ const float *part(int i, int h) const {
        return parts + ((size_t)i * group + h) * stride;
    }
    __device__ __forceinline__ const float *wave(int i, int h) const {
        return stats + ((size_t)i * n_q_heads + h) * 4;
    }
};

/* Largest score and sum of one query head, by a warp. */
__device__ void weigh_output(const Parts &p, int h, float *top, float *total) {
    const int lane = threadIdx.x % 32;
    float most = kNothing, sum = 0.0f;
    for (int i = lane; i < p.n_parts; i += 32) {
        most = fmaxf(most, p.part(i, h)[p.dim]);
    }
    for (int i = 16; i; i /= 2) {
        most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
    }
    for (int i = lane; i < p.n_parts; i += 32) {
        sum = fmaf(p.part(i, h)[p.dim + 1], fast_exp2(p.part(i, h)[p.dim] - most), sum);
    }
    for (int i = 16; i; i /= 2) {
        sum += __shfl_xor_sync(~0u, sum, i);
    }
    if (!lane) {
        *top = most;
        *total = sum;
    }
}

/* Coded channel `row` of a segment: sums over bins of its coefficients times the query heads' spectra, by a warp. */
template <int H>
__device__ void expand(const Segment &segment, const fkv_cuda_cache &c, int row, int stride,
                       const float *spectra, int64_t spectrum_stride, int n, float (&sum)[H]) {
    for (int h = 0; h < H; h++) {
        sum[h] = 0.0f;
    }
    for (int at = threadIdx.x % 32 * 8; at < stride; at += 256) {
        float x[8];
        load_eight(segment.coefficients, (size_t)row * stride + at, c.coefficients, x);
#pragma unroll
        for (int h = 0; h < H; h++) {
            if (h < n) {
                const float4 *p = (const float4 *)(spectra + h * spectrum_stride + at);
                const float4 u = p[0], v = p[1];
                float s = fmaf(u.y, x[1], u.x * x[0]), t = fmaf(v.y, x[5], v.x * x[4]);
                s = fmaf(u.w, x[3], fmaf(u.z, x[2], s));
                t = fmaf(v.w, x[7], fmaf(v.z, x[6], t));
                sum[h] += s + t;
            }
        }
    }
#pragma unroll
    for (int h = 0; h < H; h++) {
        for (int i = 16; i; i /= 2) {
            sum[h] += __shfl_xor_sync(~0u, sum[h], i);
        }
    }
}

/* Sums over waves of one coded channel, to `to` [H]. */
template <int H>
__device__ void coded_channel(const fkv_cuda_cache &c, const fkv_cuda_attend &a,
                              const fkv_cuda_row &row, const fkv_cuda_output &o, const Parts &parts,
                              int coefficient_row, const float *top, float *to) {
    const fkv_cuda_spectrum &sp = *(const fkv_cuda_spectrum *)row.spectrum;
    const int head = o.head * c.group + o.q_first;
    float all[H];
    for (int h = 0; h < H; h++) {
        all[h] = 0.0f;
    }
    for (int i = 0; i < o.waves; i++) {
        const fkv_cuda_wave wave = ((const fkv_cuda_wave *)a.waves)[o.wave + i];
        if (!visible_tiles(c, a, row, wave, sp)) {
            break;
        }
        const Segment segment = segment_of(c, a, row, wave.segment, sp.stride);
        const fkv_cuda_state state = segment.states[coefficient_row];
        const float *spectra = (const float *)a.spectra +
                               ((int64_t)(o.wave + i) * c.n_q_heads + head) * a.spectrum_stride;
        float sum[H];
        expand<H>(segment, c, coefficient_row, sp.stride, spectra, a.spectrum_stride, o.q_count,
                  sum);
#pragma unroll
        for (int h = 0; h < H; h++) {
            if (h < o.q_count) {
                const float *s = parts.wave(i, h);
                const float x = fmaf(state.beta, s[3], fmaf(state.offset, s[2], sum[h]));
                all[h] = fmaf(x, fast_exp2(s[1] - top[h]), all[h]);
            }
        }
    }
    if (threadIdx.x % 32 == 0) {
        for (int h = 0; h < H; h++) {
            to[h] = all[h];
        }
    }
}

template <int H>
__global__ __launch_bounds__(256) void output_kernel(const __grid_constant__ fkv_cuda_cache c,
                                                     const __grid_constant__ fkv_cuda_attend a) {
    __shared__ float top[H], total[H], coded[kChannels][H], sums[256];
    release_launch();
    const int chunks = (c.dim + kChannels - 1) / kChannels;
    const int jobs = counts_of(a).outputs * chunks;
    const int warp = threadIdx.x / 32, group = min(c.group, FKV_CUDA_MAX_GROUP);
    await_launch();
    for (int job = blockIdx.x; job < jobs; job += gridDim.x) {
        const fkv_cuda_output o = ((const fkv_cuda_output *)a.outputs)[job / chunks];
        const fkv_cuda_row row = ((const fkv_cuda_row *)a.rows)[o.row];
        const fkv_cuda_split &split =
            ((const fkv_cuda_split *)c.splits)[a.layer * c.n_kv_heads + o.head];
        const int stride = FKV_CUDA_PARTIAL(c.dim), first = job % chunks * kChannels;
        const uint16_t *list = (const uint16_t *)c.channels + split.list[1];
        const int head = o.head * c.group + o.q_first;
        const Parts parts = {(const float *)a.partials + (size_t)o.slot * group * stride,
                             (const float *)a.stats + ((int64_t)o.wave * c.n_q_heads + head) * 4,
                             o.parts,
                             o.waves,
                             stride,
                             group,
                             c.n_q_heads,
                             c.dim};
        if (warp < o.q_count) {
            weigh_output(parts, warp, &top[warp], &total[warp]);
        }
        __syncthreads();
        for (int i = warp; i < kChannels; i += 8) {
            const int at = first + i - split.kept[1];
            if (at >= 0 && first + i < c.dim) {
                coded_channel<H>(c, a, row, o, parts, split.row[1] + at, top, coded[i]);
            } else if (threadIdx.x % 32 < H) {
                coded[i][threadIdx.x % 32] = 0.0f;
            }
        }
        /* channels of H heads, each by as many threads as there are */
        const int which = threadIdx.x % (kChannels * H), rank = threadIdx.x / (kChannels * H);
        const int channel = which % kChannels, h = which / kChannels;
        const bool real = first + channel < c.dim && h < o.q_count;
        const int d = real ? list[first + channel] : 0;
        float sum = 0.0f;
        for (int i = rank; real && i < o.parts; i += 256 / (kChannels * H)) {
            const float *part = parts.part(i, h);
            sum = fmaf(part[d], fast_exp2(part[c.dim] - top[h]), sum);
        }
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (!rank && real) {
            const float all = total[h];
            const float inverse = all > 0.0f ? 1.0f / all : all == 0.0f ? 0.0f : all;
            sum = coded[channel][h];
            for (int i = 0; i < 256 / (kChannels * H); i++) {
                sum += sums[i * kChannels * H + which];
            }
            store_element((char *)row_at(a.out, row.offset + o.query, head + h), a.out.dtype, d,
                          sum * inverse);
            if (a.lse.present && first + channel == 0) {
                *(float *)row_at(a.lse, row.offset + o.query, head + h) =
                    all == 0.0f ? -CUDART_INF_F
                                : (top[h] - kWeightBits + log2f(all)) * 0.69314718055994531f;
            }
        }
        __syncthreads();
    }
}

/* So many blocks that a device is full, or fewer if there cannot be more work. */
inline int blocks_for(int64_t jobs, int grid) {
    return (int)(jobs < 1 ? 1 : jobs < 4 * grid ? jobs : 4 * grid);
}

template <typename K> cudaError_t allow_shared(K kernel, size_t bytes, int *allowed) {
    int device;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess && (device >= 64 || allowed[device] < (int)bytes)) {
        e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
        if (e == cudaSuccess && device < 64) {
            allowed[device] = (int)bytes;
        }
    }
    return e;
}

} // namespace fkv

cudaError_t fkv_cuda_fourier_launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a,
                                    cudaStream_t stream) {
    using namespace fkv;
    static int allowed[2][64]; /* by device; an attribute may be set twice, that is harmless */
    const size_t fft = (transform_bytes(a.log_fft) + 127) / 128 * 128;
    const size_t with_shares = fft + (size_t)a.tiles * sizeof(float);
    const int64_t quads = (c.group + kQueries - 1) / kQueries;
    const int64_t chunks = (a.spectrum_stride + kChunk - 1) / kChunk;
    const int64_t spectra = (int64_t)a.n_waves * c.n_q_heads;
    const int64_t outputs = (int64_t)a.n_outputs * ((c.dim + kChannels - 1) / kChannels);
    cudaError_t e = allow_shared(grid_kernel, fft, allowed[0]);
    if (e == cudaSuccess) {
        e = allow_shared(mass_kernel, with_shares, allowed[1]);
    }
    if (e == cudaSuccess && spectra) {
        e = launch_early(bins_kernel,
                         blocks_for((int64_t)a.n_waves * c.n_kv_heads * quads * chunks, a.grid),
                         256, 0, a.follows, stream, c, a);
    }
    if (e == cudaSuccess && spectra) {
        e = launch_early(grid_kernel, blocks_for(spectra, a.grid), 256, fft, true, stream, c, a);
    }
    if (e == cudaSuccess) {
        e = fkv_cuda_fourier_items_launch(c, a, stream);
    }
    if (e == cudaSuccess && spectra) {
        e = launch_early(mass_kernel, blocks_for(spectra, a.grid),
                         spectra > a.grid ? 256 : kMassThreads, with_shares, true, stream, c, a,
                         (int)fft);
    }
    if (e == cudaSuccess && c.group <= 4) {
        e = launch_early(output_kernel<4>, blocks_for(outputs, a.grid), 256, 0, true, stream, c, a);
    } else if (e == cudaSuccess) {
        e = launch_early(output_kernel<8>, blocks_for(outputs, a.grid), 256, 0, true, stream, c, a);
    }
    return e;
}
