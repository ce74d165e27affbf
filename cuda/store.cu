/* SPDX-License-Identifier: Apache-2.0 */
/* Storing new tokens: tables, the angles of RoPE, rotating and rounding into exact pages; and reading back. */
#include "common.cuh"

namespace fkv {

__global__ void patch_kernel(const fkv_cuda_patch *patches) {
    const fkv_cuda_patch p = patches[blockIdx.x];
    if (!threadIdx.x && !blockIdx.y && p.where) {
        *(uint64_t *)p.where = p.value;
    }
    uint4 *to = (uint4 *)p.value;
    for (size_t i = blockIdx.y * blockDim.x + threadIdx.x; i < p.zero / 16;
         i += gridDim.y * blockDim.x) {
        to[i] = make_uint4(0, 0, 0, 0);
    }
}

/* rope[pair][i], then the same of sines: as fkv_rope_table() */
__global__ void rope_kernel(const fkv_cuda_cache c, const int *positions, int tokens, float *rope,
                            int64_t capacity) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, pair = blockIdx.y;
    if (i >= tokens) {
        return;
    }
    const double position = positions[i], w = ((const double *)c.inv_freq)[pair];
    const double angle = position * w, rest = fma(position, w, -angle);
    double s, t;
    sincos(angle, &s, &t);
    rope[pair * capacity + i] = (float)(__dsub_rn(t, __dmul_rn(rest, s)) * c.rope_scaling);
    rope[(c.rope_dim / 2 + pair) * capacity + i] =
        (float)(__dadd_rn(s, __dmul_rn(rest, t)) * c.rope_scaling);
}

__device__ inline int row_of(const fkv_cuda_row *rows, int n, int token) {
    int low = 0;
    while (n - low > 1) {
        const int middle = (low + n) / 2;
        if (rows[middle].offset <= token) {
            low = middle;
        } else {
            n = middle;
        }
    }
    return low;
}

template <typename T>
__global__ void append_kernel(const fkv_cuda_cache c, const fkv_cuda_attend a,
                              const fkv_cuda_view k, const fkv_cuda_view v, bool groups) {
    release_launch();
    const fkv_cuda_step &step = *(const fkv_cuda_step *)a.step;
    const fkv_cuda_row *rows = (const fkv_cuda_row *)a.rows;
    const int panels = (c.dim + 15) / 16, lane = threadIdx.x % 32;
    const int jobs = step.tokens * c.n_kv_heads;
    for (int i = (blockIdx.x * blockDim.x + threadIdx.x) / 32; i < jobs;
         i += gridDim.x * blockDim.x / 32) {
        const int token = i / c.n_kv_heads, head = i % c.n_kv_heads;
        int r = row_of(rows, step.n_rows, token);
        const fkv_cuda_row row = rows[r];
        const int index = row.base + token - row.offset;
        if (groups && index >= c.sinks) { /* append_groups_kernel() has done whole ones */
            const int first = (index - c.sinks) / 16 * 16;
            if (first >= row.base - c.sinks && first + 16 <= row.base + row.n_new - c.sinks) {
                continue;
            }
        }
        const int entry = index < c.sinks ? 0 : (index - c.sinks) / 64 + 1;
        const int within = entry ? (index - c.sinks) % 64 : index;
        char *page = (char *)((const uint64_t *)row.table)[a.layer * row.slots + entry];
        uint16_t *to = (uint16_t *)(page + (size_t)head * panels * 4096);
        const float *rope = (const float *)a.rope + row.rope_offset + index - row.rope_first;
        const char *key = row_at(k, token, head), *value = row_at(v, token, head);
        for (int d = lane; d < c.dim; d += 32) {
            to[in_page(within, d, false)] =
                Element<T>::bits(rotated(c, key, k.dtype, d, rope, a.rope_capacity));
            to[panels * 1024 + in_page(within, d, true)] =
                Element<T>::bits(load_element(value, v.dtype, d));
        }
    }
}

/* Whole groups of 16 tokens of a page: written as fragments, 16 bytes for each lane. The group's first token, or -1. */
__device__ inline int first_of_group(const fkv_cuda_cache &c, const fkv_cuda_row &row, int group) {
    const int body = row.base - c.sinks;
    const int first = (body > 0 ? (body + 15) / 16 : 0) + group;
    return (first + 1) * 16 <= body + row.n_new ? first * 16 : -1;
}

template <typename T>
__global__
__launch_bounds__(128) void append_groups_kernel(const fkv_cuda_cache c, const fkv_cuda_attend a,
                                                 const fkv_cuda_view k, const fkv_cuda_view v) {
    extern __shared__ __align__(16) uint16_t rows[]; /* K [16][D + 8], V [16][D + 8] */
    const fkv_cuda_row row = ((const fkv_cuda_row *)a.rows)[blockIdx.z];
    const int head = blockIdx.y, body = first_of_group(c, row, blockIdx.x);
    const int panels = (c.dim + 15) / 16, stride = panels * 16 + 8, lane = threadIdx.x % 32;
    if (body < 0) {
        return;
    }
    const int first = body + c.sinks;
    for (int i = threadIdx.x; i < 16 * panels * 16; i += blockDim.x) {
        const int t = i / (panels * 16), d = i % (panels * 16);
        const int64_t token = row.offset + first + t - row.base;
        const float *rope = (const float *)a.rope + row.rope_offset + first + t - row.rope_first;
        const bool real = d < c.dim;
        rows[t * stride + d] = real ? Element<T>::bits(rotated(c, row_at(k, token, head), k.dtype,
                                                               d, rope, a.rope_capacity))
                                    : 0;
        rows[(16 + t) * stride + d] =
            real ? Element<T>::bits(load_element(row_at(v, token, head), v.dtype, d)) : 0;
    }
    __syncthreads();
    char *page = (char *)((const uint64_t *)row.table)[a.layer * row.slots + 1 + body / 64] +
                 (size_t)head * panels * 4096;
    for (int i = threadIdx.x / 32; i < 2 * panels; i += blockDim.x / 32) {
        const int panel = i % panels;
        const bool value = i >= panels;
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int r = lane / 4 + j % 2 * 8, col = lane % 4 * 2 + j / 2 * 8;
            const uint16_t *from = value ? rows + (16 + col) * stride + panel * 16 + r
                                         : rows + r * stride + panel * 16 + col;
            words[j] = from[0] | (uint32_t)from[value ? stride : 1] << 16;
        }
        uint4 *to = (uint4 *)(page + (value ? panels * 2048 : 0)) +
                    (panel * 4 + body % 64 / 16) * 32 + lane;
        *to = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

/* ---- reading back */

__device__ inline float exact_of(const void *from, int dtype, int at) {
    const uint16_t bits = ((const uint16_t *)from)[at];
    return dtype == FKV_F16 ? Element<__half>::value(bits) : Element<__nv_bfloat16>::value(bits);
}

/* Carrier of a channel at a position, in double. */
__device__ inline double carrier_at(const fkv_cuda_cache &c, int layer, int part, int head, int d,
                                    double position) {
    const float *mu =
        (const float *)c.carriers + ((size_t)(layer * 2 + part) * c.n_kv_heads + head) * c.dim;
    int other;
    bool first;
    const int pair = part ? -1 : rope_pair(c, d, &other, &first);
    if (pair < 0) {
        return mu[d];
    }
    double s, t;
    sincos(position * ((const double *)c.inv_freq)[pair], &s, &t);
    return c.rope_scaling * (first ? mu[d] * t - mu[other] * s : mu[d] * t + mu[other] * s);
}

__device__ inline float coded_value(const fkv_cuda_cache &c, const char *unit, int layer, int part,
                                    int head_index, int d, int token, double position) {
    const fkv_cuda_head h = ((const fkv_cuda_head *)c.heads)[layer * c.n_kv_heads + head_index];
    const int tiles = c.unit / 16, panel = tiles * 64;
    token = in_order(c.unit, token);
    const int steps = part ? h.v_steps : h.k_steps, exacts = part ? h.v_exact : h.k_exact;
    const char *codes = unit + h.offset + (part ? h.k_bytes : 0);
    const char *exact = codes + steps * panel, *scales = exact + exacts * panel * 8;
    const fkv_plane *planes = (const fkv_plane *)c.planes + (part ? h.v_planes : h.k_planes);
    const fkv_plane *wide = (const fkv_plane *)c.planes + (part ? h.v_exacts : h.k_exacts);
    for (int i = 0; i < exacts * 16; i++) {
        if (wide[i].channel == d) {
            const int at = in_fragment(part ? i % 16 : token % 16, part ? token % 16 : i % 16);
            return exact_of(exact, c.dtype, (i / 16 * tiles + token / 16) * 256 + at);
        }
    }
    double x = carrier_at(c, layer, part, head_index, d, position);
    for (int i = 0; i < steps * 16; i++) {
        if (planes[i].channel != d) {
            continue;
        }
        const Place at = part ? place_in_v(tiles, i, token) : place_in_k(steps, tiles, i, token);
        const unsigned code = ((const uint32_t *)codes)[at.word] >> at.bit & 3;
        const __half scale = ((const __half *)scales)[part ? 2 * i : i];
        const __half zero = ((const __half *)scales)[part ? 2 * i + 1 : steps * 16 + i];
        x += (double)__half2float(scale) * (double)(code << 2 * planes[i].index);
        x += (double)__half2float(zero);
    }
    return (float)x;
}

__global__ void read_kernel(const fkv_cuda_cache c, const uint64_t *table, int layer, int part,
                            int64_t coded, int64_t first, int64_t count, const fkv_cuda_view out) {
    const int64_t all = count * c.n_kv_heads * c.dim;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < all;
         i += (int64_t)gridDim.x * blockDim.x) {
        const int d = (int)(i % c.dim), head = (int)(i / c.dim % c.n_kv_heads);
        const int64_t token = first + i / c.dim / c.n_kv_heads, body = token - c.sinks;
        const int panels = (c.dim + 15) / 16;
        float x;
        if (body >= 0 && body / 64 < coded) {
            const int64_t unit = body / c.unit;
            const int64_t tile = unit / c.units_per_block * (c.units_per_block * c.unit / 64);
            const char *at = (const char *)table[1 + tile] +
                             unit % c.units_per_block * (size_t)((const int *)c.unit_bytes)[layer];
            x = coded_value(c, at, layer, part, head, d, (int)(body % c.unit), (double)token);
        } else {
            const uint16_t *page =
                (const uint16_t *)table[body < 0 ? 0 : 1 + body / 64] + head * panels * 2048;
            const int within = (int)(body < 0 ? token : body % 64);
            x = exact_of(page, c.dtype, (part ? panels * 1024 : 0) + in_page(within, d, part != 0));
        }
        store_element((char *)row_at(out, token - first, head), out.dtype, d, x);
    }
}

/* longest: tokens of the row with most, if it is known; long steps go group by group first. */
template <typename T>
cudaError_t append(const fkv_cuda_cache &c, const fkv_cuda_attend &a, const fkv_cuda_view &k,
                   const fkv_cuda_view &v, int max_tokens, cudaStream_t stream) {
    const int64_t warps = (int64_t)max_tokens * c.n_kv_heads;
    const int grid = (int)(warps < 4 * 4096 ? (warps + 3) / 4 : 4096), groups = a.longest / 16;
    const int padded = (c.dim + 15) / 16 * 16;
    if (!grid) {
        return cudaSuccess;
    }
    if (groups) {
        append_groups_kernel<T>
            <<<dim3(groups, c.n_kv_heads, a.n_rows), 128, 64 * (padded + 8), stream>>>(c, a, k, v);
    }
    append_kernel<T><<<grid, 128, 0, stream>>>(c, a, k, v, groups > 0);
    return cudaGetLastError();
}

} // namespace fkv

cudaError_t fkv_cuda_patch_launch(uint64_t patches, int count, cudaStream_t stream) {
    for (int done = 0; done < count; done += 1 << 20) {
        const int n = count - done < 1 << 20 ? count - done : 1 << 20;
        fkv::patch_kernel<<<dim3(n, 8), 256, 0, stream>>>((const fkv_cuda_patch *)patches + done);
    }
    return cudaGetLastError();
}

cudaError_t fkv_cuda_rope_launch(const fkv_cuda_cache &c, uint64_t positions, int tokens,
                                 uint64_t rope, int64_t capacity, cudaStream_t stream) {
    if (c.rope_dim && tokens) {
        fkv::rope_kernel<<<dim3((tokens + 127) / 128, c.rope_dim / 2), 128, 0, stream>>>(
            c, (const int *)positions, tokens, (float *)rope, capacity);
    }
    return cudaGetLastError();
}

cudaError_t fkv_cuda_append_launch(const fkv_cuda_cache &c, const fkv_cuda_attend &a,
                                   const fkv_cuda_view &k, const fkv_cuda_view &v, int max_tokens,
                                   cudaStream_t stream) {
    return c.dtype == FKV_F16 ? fkv::append<__half>(c, a, k, v, max_tokens, stream)
                              : fkv::append<__nv_bfloat16>(c, a, k, v, max_tokens, stream);
}

cudaError_t fkv_cuda_read_launch(const fkv_cuda_cache &c, uint64_t table, int64_t slots, int layer,
                                 int part, int64_t coded, int64_t first, int64_t count,
                                 const fkv_cuda_view &out, cudaStream_t stream) {
    fkv::read_kernel<<<1024, 256, 0, stream>>>(c, (const uint64_t *)table + layer * slots, layer,
                                               part, coded, first, count, out);
    return cudaGetLastError();
}
