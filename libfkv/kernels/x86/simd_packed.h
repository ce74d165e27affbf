/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels of packed residuals, over the vectors of vec_avx2.h or vec_avx512.h. Codes become floats by a
 * look-up in a register where the instruction set has one that looks at the low bits only, so that a code costs
 * a shift and a look-up for all rows together.
 */

/* ---- scores: lanes are tokens. Vector v of `half` holds tokens 16 v + half VL .. + VL - 1. */

static inline __attribute__((always_inline)) void key_vectors(vf key[4], const uint8_t *p, int half,
                                                              const int bits) {
    if (bits == 8) {
        UNROLL for (int v = 0; v < 4; v++) key[v] = v_from_int(vi_bytes(p + 16 * v + half * VL));
        return;
    }
    if (bits == 4) {
        vi x = vi_words(p + 2 * half * VL);
        UNROLL for (int v = 0; v < 4; v++) key[v] = v_low4(vi_srl(x, 4 * v));
        return;
    }
    vi x = vi_bytes(p + half * VL);
    UNROLL for (int v = 0; v < 4; v++) key[v] = v_low2(vi_srl(x, 2 * v));
    if (bits == 3)
        UNROLL for (int v = 0; v < 4; v++) {
            uint16_t high;
            memcpy(&high, p + 16 + 2 * v, sizeof high);
            key[v] = v_add4_bits(key[v], (unsigned)high >> half * VL);
        }
}

#define KEYS_OF(bits)                                                                              \
    for (int end = c + *counts++; c < end; c++, p += 8 * (bits)) {                                 \
        vf key[4];                                                                                 \
        key_vectors(key, p, half, bits);                                                           \
        UNROLL for (int r = 0; r < rows; r++) {                                                    \
            vf x = v_set1(q[r * q_stride + c]);                                                    \
            UNROLL for (int v = 0; v < 4; v++) sum[r][v] = v_fma(x, key[v], sum[r][v]);            \
        }                                                                                          \
    }

static inline __attribute__((always_inline)) void
scores_packed_half(float *s, ptrdiff_t s_stride, const float *q, ptrdiff_t q_stride,
                   const float *base, const uint8_t *p, const uint16_t *counts, int add, int half,
                   const int rows) {
    vf sum[MAX_ROWS][4];
    int c = 0;
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < 4; v++) sum[r][v] =
        v_set1(base[r]);
    KEYS_OF(8)
    KEYS_OF(4)
    KEYS_OF(3)
    KEYS_OF(2)
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < 4; v++) {
        float *to = s + r * s_stride + 16 * v + half * VL;
        v_store(to, add ? v_add(v_load(to), sum[r][v]) : sum[r][v]);
    }
}

static inline __attribute__((always_inline)) void
scores_packed_block(float *s, ptrdiff_t s_stride, const float *q, ptrdiff_t q_stride,
                    const float *base, const void *k, const uint16_t *counts, int add,
                    const int rows) {
    for (int half = 0; half < 16 / VL; half++)
        scores_packed_half(s, s_stride, q, q_stride, base, k, counts, add, half, rows);
}

static size_t packed_bytes(const uint16_t *counts) {
    return 8 * (size_t)(8 * counts[0] + 4 * counts[1] + 3 * counts[2] + 2 * counts[3]);
}

static FKV_DECL_SCORES_PACKED(FKV_NAME(scores_packed)) {
    if (next)
        prefetch(next, 0, packed_bytes(counts));
    for (; rows >= MAX_ROWS;
         rows -= MAX_ROWS, s += MAX_ROWS * s_stride, q += MAX_ROWS * q_stride, base += MAX_ROWS)
        scores_packed_block(s, s_stride, q, q_stride, base, k, counts, add, MAX_ROWS);
#if MAX_ROWS > 4
    for (; rows >= 4; rows -= 4, s += 4 * s_stride, q += 4 * q_stride, base += 4)
        scores_packed_block(s, s_stride, q, q_stride, base, k, counts, add, 4);
#endif
    for (; rows >= 2; rows -= 2, s += 2 * s_stride, q += 2 * q_stride, base += 2)
        scores_packed_block(s, s_stride, q, q_stride, base, k, counts, add, 2);
    if (rows)
        scores_packed_block(s, s_stride, q, q_stride, base, k, counts, add, 1);
}

/* ---- weighted sums: lanes are channels */

/* sum[r][v] += p[r][t] x[t], t = 0..tokens-1, for `cols` vectors of a class of n channels, the last of `keep` */
static inline __attribute__((always_inline)) void
weigh_codes(vf sum[WEIGH_ROWS][2], const float *p, ptrdiff_t p_stride, const uint8_t *words, int n,
            int tokens, int keep, const int bits, const int rows, const int cols) {
    const int low_bits = bits == 3 ? 2 : bits, S = 32 / low_bits;
    const uint8_t *high_words = words + 16 * (ptrdiff_t)n;
    for (int first = 0; first < tokens; first += S) {
        const int here = tokens - first < S ? tokens - first : S;
        vi x[2], high[2];
        UNROLL for (int v = 0; v < cols; v++) {
            const int lanes = v == cols - 1 ? keep : VL;
            x[v] = vi_dwords(words + 4 * ((ptrdiff_t)(first / S) * n + v * VL), lanes);
            if (bits == 3)
                high[v] = vi_srl(
                    vi_dwords(high_words + 4 * ((ptrdiff_t)(first / 32) * n + v * VL), lanes),
                    first % 32);
        }
        for (int t = 0; t < here; t++) {
            vf value[2];
            UNROLL for (int v = 0; v < cols; v++) {
                value[v] = bits == 8   ? v_from_int(vi_and(x[v], vi_set1(255)))
                           : bits == 4 ? v_low4(x[v])
                                       : v_low2(x[v]);
                x[v] = vi_srl(x[v], low_bits);
                if (bits == 3) {
                    value[v] = v_add4_if(value[v], high[v], 0);
                    high[v] = vi_srl(high[v], 1);
                }
            }
            UNROLL for (int r = 0; r < rows; r++) {
                vf weight = v_set1(p[r * p_stride + first + t]);
                UNROLL for (int v = 0; v < cols; v++) sum[r][v] =
                    v_fma(weight, value[v], sum[r][v]);
            }
        }
    }
}

/* What the channels of a class share. */
struct packed_values {
    const float *p;
    ptrdiff_t p_stride, o_stride;
    const float *total; /* [rows] sums of the weights */
    int n, tokens;
};

static inline __attribute__((always_inline)) void
weigh_packed_block(const struct packed_values *a, float *o, const uint8_t *words,
                   const uint16_t *scale, const uint16_t *zero, int keep, const int bits,
                   const int rows, const int cols) {
    vf sum[WEIGH_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < cols; v++) sum[r][v] =
        v_zero();
    weigh_codes(sum, a->p, a->p_stride, words, a->n, a->tokens, keep, bits, rows, cols);
    UNROLL for (int v = 0; v < cols; v++) {
        const int lanes = v == cols - 1 ? keep : VL;
        const vf step = v_f16_first(scale + v * VL, lanes), low = v_f16_first(zero + v * VL, lanes);
        UNROLL for (int r = 0; r < rows; r++) {
            float *to = o + r * a->o_stride + v * VL;
            vf level = v_mul(low, v_set1(a->total[r]));
            vf x = v_add(v_load(to), v_fma(step, sum[r][v], level));
            v_store_first(to, x, lanes);
        }
    }
}

static inline __attribute__((always_inline)) void
weigh_class(const struct packed_values *a, float *o, const uint8_t *words, const uint16_t *scale,
            const uint16_t *zero, const int bits, const int rows) {
    int c = 0;
    for (; a->n - c > VL; c += 2 * VL) {
        const int keep = a->n - c - VL < VL ? a->n - c - VL : VL;
        weigh_packed_block(a, o + c, words + 4 * c, scale + c, zero + c, keep, bits, rows, 2);
    }
    if (c < a->n)
        weigh_packed_block(a, o + c, words + 4 * c, scale + c, zero + c, a->n - c, bits, rows, 1);
}

static inline __attribute__((always_inline)) void
weigh_packed_rows(struct packed_values a, float *o, const uint8_t *v, const uint16_t *counts,
                  const uint16_t *scale, const uint16_t *zero, const int rows) {
#define VALUES_OF(bits)                                                                            \
    a.n = *counts++;                                                                               \
    weigh_class(&a, o, v, scale, zero, bits, rows);                                                \
    o += a.n, scale += a.n, zero += a.n, v += 8 * (bits)*a.n;
    VALUES_OF(8)
    VALUES_OF(4)
    VALUES_OF(3)
    VALUES_OF(2)
}

static inline float sum_weights(const float *p, int n) {
    vf sum = v_zero();
    int t = 0;
    for (; t + VL <= n; t += VL)
        sum = v_add(sum, v_load(p + t));
    if (t < n)
        sum = v_add(sum, v_first(v_load(p + t), n - t, v_zero()));
    return v_hsum(sum);
}

static FKV_DECL_WEIGH_PACKED(FKV_NAME(weigh_packed)) {
    float total[WEIGH_ROWS];
    struct packed_values a = {
        .p = p, .p_stride = p_stride, .o_stride = o_stride, .total = total, .tokens = tokens};
    if (next)
        prefetch(next, 0, packed_bytes(counts));
    for (; rows >= WEIGH_ROWS; rows -= WEIGH_ROWS) {
        for (int r = 0; r < WEIGH_ROWS; r++)
            total[r] = sum_weights(a.p + r * p_stride, tokens);
        weigh_packed_rows(a, o, v, counts, scale, zero, WEIGH_ROWS);
        o += WEIGH_ROWS * o_stride;
        a.p += WEIGH_ROWS * p_stride;
    }
    for (; rows; rows--, o += o_stride, a.p += p_stride) {
        total[0] = sum_weights(a.p, tokens);
        weigh_packed_rows(a, o, v, counts, scale, zero, 1);
    }
}

static FKV_DECL_FOLD(FKV_NAME(fold)) {
    for (int r = 0; r < rows; r++, y += y_stride, q += q_stride) {
        vf sum = v_zero();
        for (int c = 0; c < channels; c += VL) {
            const int n = channels - c < VL ? channels - c : VL;
            vf x = v_first(v_load(q + c), n, v_zero());
            v_store_first(y + c, v_mul(x, v_f16_first(scale + c, n)), n);
            sum = v_fma(x, v_f16_first(zero + c, n), sum);
        }
        base[r] = v_hsum(sum);
    }
}

/* ---- coding */

/* Of a lane's series: what is stored, and code = (x - origin) * inverse. */
struct ranges {
    vf scale, zero, origin, inverse;
};

/* bad: 0 where all values are finite, else NaN */
static inline struct ranges ranges_of(vf low, vf high, vf bad, float top) {
    struct ranges g;
    vf constant = v_round_f16(low);
    vf floor = v_floor_f16(v_max(low, v_set1(-65504.0f)));
    vf step = v_ceil_f16(v_div(v_sub(high, floor), v_set1(top)));
    g.scale = v_if_equal(low, high, v_zero(), step);
    g.zero = v_if_equal(low, high, constant, floor);
    g.scale = v_if_equal(bad, v_zero(), g.scale, v_zero());
    g.zero = v_if_equal(bad, v_zero(), g.zero, v_set1(NAN));
    g.origin = g.zero;
    g.inverse = v_if_equal(g.scale, v_zero(), v_zero(), v_div(v_set1(1.0f), g.scale));
    return g;
}

/* x - origin is NaN in a bad lane, and the maximum makes it 0 */
static inline vi code_vector(vf x, vf origin, vf inverse, vf top) {
    vf code = v_max(v_mul(v_sub(x, origin), inverse), v_zero());
    return v_to_int(v_min(code, top));
}

static inline void save_ranges(const struct ranges *g, uint16_t *scale, uint16_t *zero, int n) {
    v_save_f16_first(scale, g->scale, n);
    v_save_f16_first(zero, g->zero, n);
}

static inline __attribute__((always_inline)) void pack_key(uint8_t *p, const float *x, vf origin,
                                                           vf inverse, const int bits) {
    const vf top = v_set1((float)((1 << bits) - 1));
    for (int half = 0; half < 16 / VL; half++) {
        vi code[4];
        UNROLL for (int v = 0; v < 4; v++) code[v] =
            code_vector(v_load(x + 16 * v + half * VL), origin, inverse, top);
        if (bits == 8) {
            UNROLL for (int v = 0; v < 4; v++) vi_save_bytes(p + 16 * v + half * VL, code[v]);
            continue;
        }
        if (bits == 3)
            for (int v = 0; v < 4; v++) {
                unsigned high = vi_bits(code[v], 2);
                memcpy(p + 16 + 2 * v + half * VL / 8, &high, VL / 8);
                code[v] = vi_and(code[v], vi_set1(3));
            }
        const int step = bits == 4 ? 4 : 2;
        vi packed = vi_or(vi_or(code[0], vi_sll(code[1], step)),
                          vi_or(vi_sll(code[2], 2 * step), vi_sll(code[3], 3 * step)));
        if (bits == 4)
            vi_save_words(p + 2 * half * VL, packed);
        else
            vi_save_bytes(p + half * VL, packed);
    }
}

static inline __attribute__((always_inline)) void
code_keys_of(uint8_t *codes, ptrdiff_t tile_bytes, uint16_t *scale, uint16_t *zero, const float *x,
             ptrdiff_t x_stride, int channels, int tiles, const int bits) {
    for (int c = 0; c < channels; c += VL) {
        const int n = channels - c < VL ? channels - c : VL;
        float low[VL] = {0}, high[VL] = {0}, bad[VL] = {0}, origin[VL], inverse[VL];
        for (int i = 0; i < n; i++) {
            const float *series = x + (c + i) * x_stride;
            vf least = v_load(series), most = least, rest = v_zero();
            for (int t = 0; t < 64 * tiles; t += VL) {
                vf y = v_load(series + t);
                least = v_min(least, y);
                most = v_max(most, y);
                rest = v_fma(y, v_zero(), rest);
            }
            low[i] = v_hmin(least);
            high[i] = v_hmax(most);
            bad[i] = v_hsum(rest);
        }
        struct ranges g =
            ranges_of(v_load(low), v_load(high), v_load(bad), (float)((1 << bits) - 1));
        save_ranges(&g, scale + c, zero + c, n);
        v_store(origin, g.origin);
        v_store(inverse, g.inverse);
        for (int i = 0; i < n; i++)
            for (int tile = 0; tile < tiles; tile++)
                pack_key(codes + tile * tile_bytes + (ptrdiff_t)(c + i) * 8 * bits,
                         x + (c + i) * x_stride + 64 * tile, v_set1(origin[i]), v_set1(inverse[i]),
                         bits);
    }
}

static FKV_DECL_CODE(FKV_NAME(code_keys)) {
    if (bits == 8)
        code_keys_of(codes, tile_bytes, scale, zero, x, x_stride, channels, tiles, 8);
    else if (bits == 4)
        code_keys_of(codes, tile_bytes, scale, zero, x, x_stride, channels, tiles, 4);
    else if (bits == 3)
        code_keys_of(codes, tile_bytes, scale, zero, x, x_stride, channels, tiles, 3);
    else
        code_keys_of(codes, tile_bytes, scale, zero, x, x_stride, channels, tiles, 2);
}

/* The words of `low_bits` bits from bit `shift` on of one tile's codes. */
static inline __attribute__((always_inline)) void pack_words(uint8_t *words, const float *x,
                                                             ptrdiff_t x_stride, int channels,
                                                             int n, const struct ranges *g, vf top,
                                                             int shift, const int low_bits) {
    const int S = 32 / low_bits;
    const vi mask = vi_set1((1 << low_bits) - 1);
    for (int first = 0; first < 64; first += S, words += 4 * (ptrdiff_t)channels) {
        vi packed = vi_set1(0);
        for (int t = 0; t < S; t++, x += x_stride) {
            vi code = vi_srl(code_vector(v_load(x), g->origin, g->inverse, top), shift);
            packed = vi_or(packed, vi_sll(vi_and(code, mask), t * low_bits));
        }
        vi_save_dwords(words, packed, n);
    }
}

static inline __attribute__((always_inline)) void
code_values_of(uint8_t *codes, ptrdiff_t tile_bytes, uint16_t *scale, uint16_t *zero,
               const float *x, ptrdiff_t x_stride, int channels, int tiles, const int bits) {
    const vf top = v_set1((float)((1 << bits) - 1));
    for (int c = 0; c < channels; c += VL) {
        const int n = channels - c < VL ? channels - c : VL;
        vf low = v_load(x + c), high = low, bad = v_zero();
        for (int t = 0; t < 64 * tiles; t++) {
            vf y = v_load(x + t * x_stride + c);
            low = v_min(low, y);
            high = v_max(high, y);
            bad = v_fma(y, v_zero(), bad);
        }
        struct ranges g = ranges_of(low, high, bad, (float)((1 << bits) - 1));
        save_ranges(&g, scale + c, zero + c, n);
        for (int tile = 0; tile < tiles; tile++) {
            uint8_t *words = codes + tile * tile_bytes + 4 * c;
            const float *from = x + (ptrdiff_t)tile * 64 * x_stride + c;
            pack_words(words, from, x_stride, channels, n, &g, top, 0, bits == 3 ? 2 : bits);
            if (bits == 3)
                pack_words(words + 16 * (ptrdiff_t)channels, from, x_stride, channels, n, &g, top,
                           2, 1);
        }
    }
}

static FKV_DECL_CODE(FKV_NAME(code_values)) {
    if (bits == 8)
        code_values_of(codes, tile_bytes, scale, zero, x, x_stride, channels, tiles, 8);
    else if (bits == 4)
        code_values_of(codes, tile_bytes, scale, zero, x, x_stride, channels, tiles, 4);
    else if (bits == 3)
        code_values_of(codes, tile_bytes, scale, zero, x, x_stride, channels, tiles, 3);
    else
        code_values_of(codes, tile_bytes, scale, zero, x, x_stride, channels, tiles, 2);
}

/* ---- carriers */

#define CHEBYSHEV_VECTORS (FKV_CHEBYSHEV / VL)

static FKV_DECL_CARRY(FKV_NAME(carry)) {
    float turned[2 * FKV_MAX_HEAD_DIM];
    for (int r = 0; r < rows; r++, y += y_stride, weights += w_stride) {
        for (int j = 0; j < pairs; j += VL) {
            vf a = v_load(weights + j), b = v_load(weights + half + j);
            vf vc = v_load(c + j), vs = v_load(s + j);
            v_store_pairs(turned + 2 * j, v_fma(a, vc, v_mul(b, vs)),
                          v_sub(v_mul(b, vc), v_mul(a, vs)));
        }
        for (int j = 0; j < fast; j++) {
            y[j] = turned[2 * j];
            y[fast + j] = turned[2 * j + 1];
        }
        vf sum[4][CHEBYSHEV_VECTORS];
        UNROLL for (int i = 0; i < 4; i++) UNROLL for (int v = 0; v < CHEBYSHEV_VECTORS; v++)
            sum[i][v] = v_zero();
        const float *row = project;
        int j = fast;
        for (; j + 4 <= pairs; j += 4)
            UNROLL for (int i = 0; i < 4; i++, row += FKV_CHEBYSHEV) {
                vf pair = v_set_pair(turned + 2 * (j + i));
                UNROLL for (int v = 0; v < CHEBYSHEV_VECTORS; v++) sum[i][v] =
                    v_fma(pair, v_load(row + v * VL), sum[i][v]);
            }
        for (; j < pairs; j++, row += FKV_CHEBYSHEV)
            UNROLL for (int v = 0; v < CHEBYSHEV_VECTORS; v++) sum[0][v] =
                v_fma(v_set_pair(turned + 2 * j), v_load(row + v * VL), sum[0][v]);
        UNROLL for (int v = 0; v < CHEBYSHEV_VECTORS; v++) v_store(
            y + 2 * fast + v * VL, v_add(v_add(sum[0][v], sum[1][v]), v_add(sum[2][v], sum[3][v])));
    }
}
