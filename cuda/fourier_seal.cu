/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Coding tiles of Fourier caches, and reading them back. Tiles are folded one after the other, each with one rounding
 * of the coefficients, as on the CPU: bytes depend on the tokens and not on how they were appended. The sums of a tile
 * are taken against the basis of a segment's first tile and turned to its place afterwards.
 */
#include "fourier.cuh"

namespace fkv {

constexpr int kRows = 128; /* coded channels of a block of fold_kernel() */
constexpr int kBins = 64;  /* and bins */
constexpr int kFoldThreads = 512;
constexpr int kRowStride = kRows + 4; /* floats from token to token */

/* Words of kept pages: two elements of the exact page each. */
__global__ __launch_bounds__(256) void keep_kernel(const __grid_constant__ fkv_cuda_cache c,
                                                   const __grid_constant__ fkv_cuda_attend a,
                                                   const fkv_cuda_seal *seals, int n) {
    const int head = blockIdx.y / 2, part = blockIdx.y % 2, panels = (c.dim + 15) / 16;
    const fkv_cuda_split split = ((const fkv_cuda_split *)c.splits)[a.layer * c.n_kv_heads + head];
    const uint16_t *list = (const uint16_t *)c.channels + split.list[part];
    for (int job = blockIdx.x; job < n; job += gridDim.x) {
        const fkv_cuda_seal seal = seals[job];
        const fkv_cuda_row row = ((const fkv_cuda_row *)a.rows)[seal.row];
        const uint16_t *from =
            (const uint16_t *)((const uint64_t *)row.table)[a.layer * row.slots + 1 + seal.tile] +
            (size_t)head * panels * 2048 + (part ? panels * 1024 : 0);
        uint32_t *to =
            (uint32_t *)(seal.block + split.offset) + (part ? split.eighths[0] * 256 : 0);
        for (int i = threadIdx.x; i < split.eighths[part] * 256; i += blockDim.x) {
            const int panel = i / 512, within = i % 512;
            const bool half = panel * 2 + 1 == split.eighths[part];
            const int words = half ? 2 : 4, group = within / (32 * words);
            const int lane = within / words % 32, word = within % words;
            const int reg = half && part ? 2 * word : word;
            const int r = lane / 4 + reg % 2 * 8, col = lane % 4 * 2 + reg / 2 * 8;
            uint16_t x[2];
            for (int j = 0; j < 2; j++) {
                const int at = panel * 16 + (part ? r : col + j);
                const int token = group * 16 + (part ? col + j : r);
                x[j] = at < split.kept[part] ? from[in_page(token, list[at], part)] : 0;
            }
            to[i] = x[0] | (uint32_t)x[1] << 16;
        }
    }
}

/* cos and sin of 2 pi k / period, from an integer below it */
__device__ __forceinline__ void phase(int64_t k, int64_t period, double *co, double *si) {
    sincospi(2.0 * (double)k / (double)period, si, co);
}

/* The spectrum of a series that is 1 for `length` tokens, over 2T: see fkv_spectrum_ones(). */
__device__ void write_ones(const fkv_cuda_spectrum &sp, int64_t length, float *row) {
    const double period = (double)sp.period;
    for (int n = threadIdx.x; n < sp.padded; n += blockDim.x) {
        float u = 0.0f, v = 0.0f;
        if (!n) {
            u = (float)(0.5 * (double)length / period);
        } else if (n < sp.bins) {
            const double above = sinpi((double)((int64_t)n * length % (2 * sp.period)) / period);
            const double below = sinpi((double)n / period);
            double co, si;
            sincospi((double)((int64_t)n * (length - 1) % (2 * sp.period)) / period, &si, &co);
            const double size = 0.5 * above / below / period;
            u = (float)(size * co);
            v = (float)(size * si);
        }
        row[n] = u;
        row[sp.padded + n] = v;
    }
}

/* Four coefficients, rounded to their type. */
__device__ __forceinline__ void store_four(void *base, size_t at, int dtype, const float (&x)[4]) {
    if (dtype == FKV_F32) {
        *(float4 *)((float *)base + at) = make_float4(x[0], x[1], x[2], x[3]);
    } else {
        *(uint2 *)((uint16_t *)base + at) =
            make_uint2(Element<__half>::pack(x[0], x[1]), Element<__half>::pack(x[2], x[3]));
    }
}
__device__ __forceinline__ void load_four(const void *base, size_t at, int dtype, float (&x)[4]) {
    for (int i = 0; i < 4; i++) {
        x[i] = dtype == FKV_F32 ? ((const float *)base)[at + i]
                                : Element<__half>::value(((const uint16_t *)base)[at + i]);
    }
}
__device__ __forceinline__ float rounded(float x, int dtype) {
    return dtype == FKV_F32 ? x : __half2float(__float2half_rn(x));
}

/* A block's part of a fold: channels of one KV head's K or V, and bins. */
struct Folding {
    const fkv_cuda_spectrum &sp;
    const fkv_cuda_fold &fold;
    const fkv_cuda_row &row;
    const fkv_cuda_split &split;
    int part, head, first_row, rows, first_bin;
};

/* x[token][channel] of a tile, as stored */
template <typename T>
__device__ void load_tile(const fkv_cuda_cache &c, int layer, const Folding &f, int tile,
                          float *x) {
    const int panels = (c.dim + 15) / 16;
    const uint16_t *list =
        (const uint16_t *)c.channels + f.split.list[f.part] + f.split.kept[f.part] + f.first_row;
    const uint16_t *from =
        (const uint16_t *)((const uint64_t *)f.row.table)[layer * f.row.slots + 1 + tile] +
        (size_t)f.head * panels * 2048 + (f.part ? panels * 1024 : 0);
    for (int i = threadIdx.x; i < kRows * 64; i += kFoldThreads) {
        const int r = i % kRows, t = i / kRows;
        x[t * kRowStride + r] =
            r < f.rows ? Element<T>::value(from[in_page(t, list[r], f.part)]) : 0.0f;
    }
}

/* Threads of the first rows: the reference, if the segment begins here, and the sum of the tile. */
__device__ void centre(const Folding &f, bool first, const float *x, float *references,
                       double *sum) {
    const int r = threadIdx.x;
    if (r >= f.rows) {
        return;
    }
    double all = 0.0;
    if (first) {
        for (int t = 0; t < 64; t++) {
            all += (double)x[t * kRowStride + r];
        }
        references[r] = (float)(all / 64);
        all = 0.0;
    }
    for (int t = 0; t < 64; t++) {
        all += (double)(x[t * kRowStride + r] - references[r]);
    }
    *sum += all;
}

/* c, s := the tile's sums over the basis of a segment's first tile, of four channels and four bins */
__device__ __forceinline__ void multiply_tile(const float *x, const float *panel,
                                              const float *references, int row, int bin,
                                              float (&c)[4][4], float (&s)[4][4]) {
    const float4 ref = *(const float4 *)(references + row);
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            c[i][j] = s[i][j] = 0.0f;
        }
    }
#pragma unroll 2
    for (int t = 0; t < 64; t++) {
        const float4 y = *(const float4 *)(x + t * kRowStride + row);
        const float4 u = *(const float4 *)(panel + t * 2 * kBins + bin);
        const float4 v = *(const float4 *)(panel + (t * 2 + 1) * kBins + bin);
        const float ys[4] = {y.x - ref.x, y.y - ref.y, y.z - ref.z, y.w - ref.w};
        const float us[4] = {u.x, u.y, u.z, u.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                c[i][j] = fmaf(ys[i], us[j], c[i][j]);
                s[i][j] = fmaf(ys[i], vs[j], s[i][j]);
            }
        }
    }
}

/* Sums and numbers of the block's channels behind the last tile. */
__device__ void write_states(const Folding &f, fkv_cuda_state *states, const float *references,
                             double sum) {
    const int r = threadIdx.x;
    if (r < f.rows) {
        const double rest = sum / (double)((int64_t)(f.fold.local + f.fold.count) * 64);
        fkv_cuda_state state;
        state.sum = sum;
        state.reference = references[r];
        state.beta = (float)-rest;
        state.offset = (float)((double)references[r] + rest);
        state.padding = 0.0f;
        states[r] = state;
    }
}

/* Shared memory of fold_kernel(): a tile, the basis of the first tile, references, phases. */
struct FoldRoom {
    float x[64 * kRowStride], panel[64 * 2 * kBins], references[kRows];
    float2 phases[kBins];
};

template <typename T>
__global__
__launch_bounds__(kFoldThreads) void fold_kernel(const __grid_constant__ fkv_cuda_cache c,
                                                 const __grid_constant__ fkv_cuda_attend a,
                                                 const fkv_cuda_fold *folds) {
    extern __shared__ __align__(128) char memory[];
    FoldRoom &room = *(FoldRoom *)memory;
    const int blocks = (c.dim + kRows - 1) / kRows;
    const fkv_cuda_fold fold = folds[blockIdx.z];
    const fkv_cuda_row row = ((const fkv_cuda_row *)a.rows)[fold.row];
    const fkv_cuda_spectrum sp = *(const fkv_cuda_spectrum *)row.spectrum;
    const int head = blockIdx.y / 2 / blocks, part = blockIdx.y / blocks % 2;
    const fkv_cuda_split split = ((const fkv_cuda_split *)c.splits)[a.layer * c.n_kv_heads + head];
    const int first_row = blockIdx.y % blocks * kRows;
    const Folding f = {sp,
                       fold,
                       row,
                       split,
                       part,
                       head,
                       first_row,
                       min(kRows, split.coded[part] - first_row),
                       (int)blockIdx.x * kBins};
    char *page = (char *)fold.segment;
    if (!blockIdx.x && !blockIdx.y) {
        write_ones(sp, (int64_t)(fold.local + fold.count) * 64,
                   (float *)(page + ones_at(a.coded_rows, sp.stride, c.coefficients)));
    }
    if (f.rows <= 0 || f.first_bin >= sp.padded) {
        return;
    }
    const int first = split.row[part] + first_row;
    fkv_cuda_state *states =
        (fkv_cuda_state *)segment_at(page, a.coded_rows, sp.stride, c.coefficients).states + first;
    for (int i = threadIdx.x; i < 64 * kBins; i += kFoldThreads) {
        const int t = i / kBins, n = i % kBins;
        const float *from = (const float *)sp.panel + t * sp.stride + f.first_bin + n;
        const bool real = f.first_bin + n < sp.padded;
        room.panel[t * 2 * kBins + n] = real ? from[0] : 0.0f;
        room.panel[(t * 2 + 1) * kBins + n] = real ? from[sp.padded] : 0.0f;
    }
    for (int r = threadIdx.x; r < kRows; r += kFoldThreads) {
        room.references[r] = fold.local && r < f.rows ? states[r].reference : 0.0f;
    }
    double sum = fold.local && (int)threadIdx.x < f.rows ? states[threadIdx.x].sum : 0.0;
    /* every thread has four channels and four bins */
    const int bin = threadIdx.x % 16 * 4, channel = threadIdx.x / 16 * 4;
    const int n = f.first_bin + bin;
    const bool real = n < sp.padded;
    float cosines[4][4] = {}, sines[4][4] = {};
    for (int i = 0; fold.local && real && i < 4 && channel + i < f.rows; i++) {
        const size_t at = (size_t)(first + channel + i) * sp.stride + n;
        load_four(page, at, c.coefficients, cosines[i]);
        load_four(page, at + sp.padded, c.coefficients, sines[i]);
    }
    for (int tile = 0; tile < fold.count; tile++) {
        __syncthreads();
        load_tile<T>(c, a.layer, f, fold.tile + tile, room.x);
        if (threadIdx.x >= kFoldThreads - kBins) {
            const int j = (int)threadIdx.x - (kFoldThreads - kBins);
            const int64_t token = (int64_t)(fold.local + tile) * 64;
            double co, si;
            phase((f.first_bin + j) * token % sp.period, sp.period, &co, &si);
            const double by = 0.5 / (double)sp.period;
            const bool used = f.first_bin + j < sp.bins;
            room.phases[j] =
                used ? make_float2((float)(co * by), (float)(si * by)) : make_float2(0.0f, 0.0f);
        }
        __syncthreads();
        centre(f, !(fold.local + tile), room.x, room.references, &sum);
        __syncthreads();
        float u[4][4], v[4][4];
        multiply_tile(room.x, room.panel, room.references, channel, bin, u, v);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 p = room.phases[bin + j];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                cosines[i][j] =
                    rounded(cosines[i][j] + (u[i][j] * p.x - v[i][j] * p.y), c.coefficients);
                sines[i][j] =
                    rounded(sines[i][j] + (v[i][j] * p.x + u[i][j] * p.y), c.coefficients);
            }
        }
    }
    for (int i = 0; real && i < 4 && channel + i < f.rows; i++) {
        const size_t at = (size_t)(first + channel + i) * sp.stride + n;
        store_four(page, at, c.coefficients, cosines[i]);
        store_four(page, at + sp.padded, c.coefficients, sines[i]);
    }
    /* other blocks of these channels read the states above: only one of them, which is done with that, writes */
    if (!blockIdx.x) {
        write_states(f, states, room.references, sum);
    }
}

/* ---- reading back */

constexpr int kPhases = 512;

/* Token `local` of a segment: channels of one KV head by threads, sums in double. */
__device__ void read_coded(const fkv_cuda_cache &c, const fkv_cuda_row &row, const Segment &segment,
                           const fkv_cuda_spectrum &sp, const fkv_cuda_split &split, int part,
                           int64_t local, double2 *phases, char *to, int dtype) {
    const uint16_t *list = (const uint16_t *)c.channels + split.list[part] + split.kept[part];
    const float *weight = (const float *)sp.weight;
    for (int first = 0; first < split.coded[part]; first += blockDim.x) {
        const int r = first + threadIdx.x;
        const bool real = r < split.coded[part];
        const size_t at = (size_t)(split.row[part] + (real ? r : 0)) * sp.stride;
        const fkv_cuda_state state = segment.states[split.row[part] + (real ? r : 0)];
        double sum = state.offset;
        for (int begin = 0; begin < sp.bins; begin += kPhases) {
            __syncthreads();
            for (int i = threadIdx.x; i < kPhases && begin + i < sp.bins; i += blockDim.x) {
                phase((begin + i) * local % sp.period, sp.period, &phases[i].x, &phases[i].y);
            }
            __syncthreads();
            for (int i = 0; real && i < kPhases && begin + i < sp.bins; i++) {
                const int n = begin + i;
                float x[2];
                for (int j = 0; j < 2; j++) {
                    const size_t k = at + n + (j ? sp.padded : 0);
                    x[j] =
                        c.coefficients == FKV_F32
                            ? ((const float *)segment.coefficients)[k]
                            : Element<__half>::value(((const uint16_t *)segment.coefficients)[k]);
                }
                const double u = (double)x[0] + (double)state.beta * (double)segment.ones[n];
                const double v =
                    (double)x[1] + (double)state.beta * (double)segment.ones[sp.padded + n];
                sum += (double)weight[n] * (u * phases[i].x + v * phases[i].y);
            }
        }
        if (real) {
            store_element(to, dtype, list[r], (float)sum);
        }
    }
}

__device__ __forceinline__ float stored(const uint16_t *page, int dtype, size_t at) {
    return dtype == FKV_F16 ? Element<__half>::value(page[at])
                            : Element<__nv_bfloat16>::value(page[at]);
}

/* Element (token, kept channel i) of a part of a kept page. */
__device__ __forceinline__ int in_kept(int eighths, int token, int i, int part) {
    const int panel = i / 16, at = i % 16, r = part ? at : token % 16, col = part ? token % 16 : at;
    if (panel * 2 + 1 < eighths) {
        return panel * 1024 + token / 16 * 256 + in_fragment(r, col);
    }
    const int lane = r % 8 * 4 + col % 8 / 2, word = part ? col / 8 : r / 8;
    return panel * 1024 + token / 16 * 128 + (lane * 2 + word) * 2 + col % 2;
}

__global__ __launch_bounds__(128) void read_fourier_kernel(
    const __grid_constant__ fkv_cuda_cache c, const __grid_constant__ fkv_cuda_row row, int layer,
    int part, int coded_rows, int64_t coded, int64_t first, int64_t count,
    const __grid_constant__ fkv_cuda_view out) {
    __shared__ double2 phases[kPhases];
    const fkv_cuda_spectrum sp = *(const fkv_cuda_spectrum *)row.spectrum;
    const uint64_t *table = (const uint64_t *)row.table + layer * row.slots;
    const int panels = (c.dim + 15) / 16, head = blockIdx.y;
    const fkv_cuda_split split = ((const fkv_cuda_split *)c.splits)[layer * c.n_kv_heads + head];
    for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
        const int64_t body = first + i - c.sinks;
        char *to = (char *)row_at(out, i, head);
        if (body >= 0 && body / 64 < coded) {
            const int64_t tile = body / 64, segment = tile / sp.per_segment;
            const uint16_t *page = (const uint16_t *)(table[1 + tile] + split.offset) +
                                   (part ? split.eighths[0] * 512 : 0);
            const uint16_t *list = (const uint16_t *)c.channels + split.list[part];
            for (int j = threadIdx.x; j < split.kept[part]; j += blockDim.x) {
                const int at = in_kept(split.eighths[part], (int)(body % 64), j, part);
                store_element(to, out.dtype, list[j], stored(page, c.dtype, at));
            }
            const char *at =
                (const char *)((const uint64_t *)row.segments)[layer * row.segment_slots + segment];
            read_coded(c, row, segment_at(at, coded_rows, sp.stride, c.coefficients), sp, split,
                       part, body - segment * sp.per_segment * 64, phases, to, out.dtype);
        } else {
            const uint16_t *page = (const uint16_t *)table[body < 0 ? 0 : 1 + body / 64] +
                                   (size_t)head * panels * 2048 + (part ? panels * 1024 : 0);
            const int within = (int)(body < 0 ? first + i : body % 64);
            for (int d = threadIdx.x; d < c.dim; d += blockDim.x) {
                store_element(to, out.dtype, d, stored(page, c.dtype, in_page(within, d, part)));
            }
        }
    }
}

template <typename T>
cudaError_t fold(const fkv_cuda_cache &c, const fkv_cuda_attend &a, const fkv_cuda_fold *folds,
                 int n, int bins, cudaStream_t stream) {
    cudaError_t e = cudaFuncSetAttribute(
        fold_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(FoldRoom));
    const unsigned blocks = (unsigned)((c.dim + kRows - 1) / kRows * 2 * c.n_kv_heads);
    for (int done = 0; e == cudaSuccess && done < n; done += 32768) {
        const dim3 grid((unsigned)((bins + kBins - 1) / kBins), blocks,
                        (unsigned)(n - done < 32768 ? n - done : 32768));
        fold_kernel<T><<<grid, kFoldThreads, sizeof(FoldRoom), stream>>>(c, a, folds + done);
        e = cudaGetLastError();
    }
    return e;
}

} // namespace fkv

cudaError_t fkv_cuda_fold_launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a, uint64_t seals,
                                 int n_seals, uint64_t folds, int n_folds, int most_bins,
                                 cudaStream_t stream) {
    const unsigned jobs = (unsigned)(n_seals < 4096 ? n_seals : 4096);
    cudaError_t e = cudaSuccess;
    if (n_seals) {
        fkv::keep_kernel<<<dim3(jobs, 2 * c.n_kv_heads), 256, 0, stream>>>(
            c, a, (const fkv_cuda_seal *)seals, n_seals);
        e = cudaGetLastError();
    }
    if (e == cudaSuccess) { /* the spectrum of a constant, even where no channel is coded */
        const fkv_cuda_fold *list = (const fkv_cuda_fold *)folds;
        e = c.dtype == FKV_F16 ? fkv::fold<__half>(c, a, list, n_folds, most_bins, stream)
                               : fkv::fold<__nv_bfloat16>(c, a, list, n_folds, most_bins, stream);
    }
    return e;
}

cudaError_t fkv_cuda_read_fourier_launch(const fkv_cuda_cache &c, const fkv_cuda_row &row,
                                         int layer, int part, int coded_rows, int64_t coded,
                                         int64_t first, int64_t count, const fkv_cuda_view &out,
                                         cudaStream_t stream) {
    fkv::read_fourier_kernel<<<dim3((unsigned)(count < 2048 ? count : 2048), c.n_kv_heads), 128, 0,
                               stream>>>(c, row, layer, part, coded_rows, coded, first, count, out);
    return cudaGetLastError();
}
