/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels that read or write a storage type. Included once for each type by simd.h, with
 *   STORE    suffix (f32, f16, bf16)      ELEMENT   C type of an element
 * Blocks of ROWS x COLS vectors stay in registers; the remainder rows take smaller blocks. Each row's
 * sums run in the same order whatever block it falls in.
 */
#define NAME(name) FKV_PASTE(name, STORE)
#define LOAD FKV_PASTE(v_load, STORE)
#define SAVE FKV_PASTE(v_save, STORE)

static inline __attribute__((always_inline)) void
NAME(scores_block)(float *s, ptrdiff_t s_stride, const float *q, ptrdiff_t q_stride,
                   const ELEMENT *k, int dims, int add, intptr_t ahead, const int rows) {
    for (int part = 0; part < 64; part += 4 * VL) {
        vf sum[MAX_ROWS][4];
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < 4; v++) sum[r][v] =
            v_zero();
        for (int d = 0; d < dims; d++) {
            vf key[4];
            if (part == 0)
                prefetch(k + d * 64, ahead, 64 * sizeof *k);
            UNROLL for (int v = 0; v < 4; v++) key[v] = LOAD(k + d * 64 + part + v * VL);
            UNROLL for (int r = 0; r < rows; r++) {
                vf x = v_set1(q[r * q_stride + d]);
                UNROLL for (int v = 0; v < 4; v++) sum[r][v] = v_fma(x, key[v], sum[r][v]);
            }
        }
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < 4; v++) {
            float *to = s + r * s_stride + part + v * VL;
            v_store(to, add ? v_add(v_load(to), sum[r][v]) : sum[r][v]);
        }
    }
}

static FKV_DECL_SCORES(NAME(scores)) {
    const intptr_t ahead = distance(k, next);
    for (; rows >= MAX_ROWS; rows -= MAX_ROWS, s += MAX_ROWS * s_stride, q += MAX_ROWS * q_stride)
        NAME(scores_block)(s, s_stride, q, q_stride, k, dims, add, ahead, MAX_ROWS);
#if MAX_ROWS > 4
    for (; rows >= 4; rows -= 4, s += 4 * s_stride, q += 4 * q_stride)
        NAME(scores_block)(s, s_stride, q, q_stride, k, dims, add, ahead, 4);
#endif
    for (; rows >= 2; rows -= 2, s += 2 * s_stride, q += 2 * q_stride)
        NAME(scores_block)(s, s_stride, q, q_stride, k, dims, add, ahead, 2);
    if (rows)
        NAME(scores_block)(s, s_stride, q, q_stride, k, dims, add, ahead, 1);
}

/* o[r][0..cols * VL) += sum_t p[r][t] v[t]; only the first `keep` lanes of the last vector are written */
static inline __attribute__((always_inline)) void
NAME(weigh_block)(float *o, ptrdiff_t o_stride, const float *p, ptrdiff_t p_stride,
                  const ELEMENT *v, ptrdiff_t v_stride, int tokens, int keep, intptr_t ahead,
                  const int rows, const int cols) {
    vf sum[4][4];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < cols; c++) sum[r][c] =
        v_load(o + r * o_stride + c * VL);
    for (int t = 0; t < tokens; t++) {
        vf value[4];
        prefetch(v + t * v_stride, ahead, (size_t)(cols * VL) * sizeof *v);
        UNROLL for (int c = 0; c < cols; c++) value[c] = LOAD(v + t * v_stride + c * VL);
        UNROLL for (int r = 0; r < rows; r++) {
            vf x = v_set1(p[r * p_stride + t]);
            UNROLL for (int c = 0; c < cols; c++) sum[r][c] = v_fma(x, value[c], sum[r][c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < cols; c++) {
        float *to = o + r * o_stride + c * VL;
        if (c == cols - 1 && keep < VL)
            v_store_first(to, sum[r][c], keep);
        else
            v_store(to, sum[r][c]);
    }
}

static inline __attribute__((always_inline)) void
NAME(weigh_cols)(float *o, ptrdiff_t o_stride, const float *p, ptrdiff_t p_stride, const ELEMENT *v,
                 ptrdiff_t v_stride, int tokens, int keep, intptr_t ahead, int rows,
                 const int cols) {
    for (; rows >= WEIGH_ROWS; rows -= WEIGH_ROWS) {
        NAME(weigh_block)
        (o, o_stride, p, p_stride, v, v_stride, tokens, keep, ahead, WEIGH_ROWS, cols);
        o += WEIGH_ROWS * o_stride;
        p += WEIGH_ROWS * p_stride;
    }
    for (; rows; rows--, o += o_stride, p += p_stride)
        NAME(weigh_block)(o, o_stride, p, p_stride, v, v_stride, tokens, keep, ahead, 1, cols);
}

static FKV_DECL_WEIGH(NAME(weigh)) {
    const ELEMENT *value = v;
    const int row = dims;
    const intptr_t ahead = distance(v, next);
    for (; dims >= 4 * VL; dims -= 4 * VL, o += 4 * VL, value += 4 * VL)
        NAME(weigh_cols)(o, o_stride, p, p_stride, value, row, tokens, VL, ahead, rows, 4);
    if (dims >= 2 * VL) {
        NAME(weigh_cols)(o, o_stride, p, p_stride, value, row, tokens, VL, ahead, rows, 2);
        dims -= 2 * VL;
        o += 2 * VL;
        value += 2 * VL;
    }
    if (dims > VL)
        NAME(weigh_cols)(o, o_stride, p, p_stride, value, row, tokens, dims - VL, ahead, rows, 2);
    else if (dims > 0)
        NAME(weigh_cols)(o, o_stride, p, p_stride, value, row, tokens, dims, ahead, rows, 1);
}

/* a[r] += sum of `channels` rows of coefficients, which are read as they lie in memory: there are many of them,
 * far apart, and the sums stay in the first-level cache. */
static inline __attribute__((always_inline)) void
NAME(contract_block)(float *a, ptrdiff_t a_stride, const float *q, ptrdiff_t q_stride,
                     const ELEMENT *coef, ptrdiff_t coef_stride, int count, const int channels,
                     const int rows) {
    for (int n = 0; n < count; n += VL) {
        vf c[4];
        UNROLL for (int j = 0; j < channels; j++) c[j] = LOAD(coef + j * coef_stride + n);
        UNROLL for (int r = 0; r < rows; r++) {
            float *to = a + r * a_stride + n;
            vf sum = v_load(to);
            UNROLL for (int j = 0; j < channels; j++) sum =
                v_fma(v_set1(q[r * q_stride + j]), c[j], sum);
            if (count - n < VL)
                v_store_first(to, sum, count - n);
            else
                v_store(to, sum);
        }
    }
}

static inline __attribute__((always_inline)) void
NAME(contract_rows)(float *a, ptrdiff_t a_stride, const float *q, ptrdiff_t q_stride,
                    const ELEMENT *coef, ptrdiff_t coef_stride, int channels, int count,
                    const int rows) {
    for (; channels >= 4; channels -= 4, q += 4, coef += 4 * coef_stride)
        NAME(contract_block)(a, a_stride, q, q_stride, coef, coef_stride, count, 4, rows);
    for (; channels; channels--, q++, coef += coef_stride)
        NAME(contract_block)(a, a_stride, q, q_stride, coef, coef_stride, count, 1, rows);
}

static FKV_DECL_CONTRACT(NAME(contract)) {
    for (int r = 0; r < rows; r++)
        memset(a + r * a_stride, 0, (size_t)count * sizeof *a);
    for (; rows >= 4; rows -= 4, a += 4 * a_stride, q += 4 * q_stride)
        NAME(contract_rows)(a, a_stride, q, q_stride, coef, coef_stride, channels, count, 4);
    for (; rows; rows--, a += a_stride, q += q_stride)
        NAME(contract_rows)(a, a_stride, q, q_stride, coef, coef_stride, channels, count, 1);
}

static inline __attribute__((always_inline)) void
NAME(expand_block)(float *o, ptrdiff_t o_stride, const float *p, ptrdiff_t p_stride,
                   const ELEMENT *coef, int count, const int rows) {
    vf sum[4][2];
    UNROLL for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = v_zero();
    int n = 0;
    for (; n + 2 * VL <= count; n += 2 * VL) {
        vf low = LOAD(coef + n), high = LOAD(coef + n + VL);
        UNROLL for (int r = 0; r < rows; r++) {
            sum[r][0] = v_fma(v_load(p + r * p_stride + n), low, sum[r][0]);
            sum[r][1] = v_fma(v_load(p + r * p_stride + n + VL), high, sum[r][1]);
        }
    }
    for (; n < count; n += VL) {
        int keep = count - n < VL ? count - n : VL;
        vf c = v_first(LOAD(coef + n), keep, v_zero());
        UNROLL for (int r = 0; r < rows; r++) {
            vf x = v_first(v_load(p + r * p_stride + n), keep, v_zero());
            sum[r][0] = v_fma(x, c, sum[r][0]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) o[r * o_stride] = v_hsum(v_add(sum[r][0], sum[r][1]));
}

static FKV_DECL_EXPAND(NAME(expand)) {
    const ELEMENT *coefficient = coef;
    for (int c = 0; c < channels; c++) {
        int r = 0;
        for (; r + 4 <= rows; r += 4)
            NAME(expand_block)
        (o + r * o_stride + c, o_stride, p + r * p_stride, p_stride, coefficient + c * coef_stride,
         count, 4);
        for (; r < rows; r++)
            NAME(expand_block)
        (o + r * o_stride + c, o_stride, p + r * p_stride, p_stride, coefficient + c * coef_stride,
         count, 1);
    }
}

static FKV_DECL_WIDEN(NAME(widen)) {
    const ELEMENT *from = src;
    size_t i = 0;
    for (; i + VL <= n; i += VL)
        v_store(dst + i, LOAD(from + i));
    if (i < n)
        v_store_first(dst + i, LOAD(from + i), (int)(n - i));
}

/* The remainder goes through a full vector on the stack: outputs are written exactly. */
static FKV_DECL_NARROW(NAME(narrow)) {
    ELEMENT *to = dst, last[VL];
    size_t i = 0;
    for (; i + VL <= n; i += VL)
        SAVE(to + i, v_load(src + i));
    if (i < n) {
        SAVE(last, v_load(src + i));
        memcpy(to + i, last, (n - i) * sizeof *to);
    }
}

static FKV_DECL_ACCUMULATE(NAME(accumulate)) {
    ELEMENT *coefficient = coef, last[VL];
    for (int c = 0; c < channels; c++) {
        ELEMENT *to = coefficient + c * coef_stride;
        const float *from = x + c * x_stride;
        int n = 0;
        for (; n + VL <= count; n += VL)
            SAVE(to + n, v_add(LOAD(to + n), v_load(from + n)));
        if (n < count) {
            SAVE(last, v_add(LOAD(to + n), v_load(from + n)));
            memcpy(to + n, last, (size_t)(count - n) * sizeof *to);
        }
    }
}

static FKV_DECL_UNCARRY(NAME(uncarry)) {
    const ELEMENT *key = k;
    const vf vu = v_set1(-u), vv = v_set1(-v);
    for (int t = 0; t < 64; t += VL) {
        vf carried = v_fma(vu, v_load(c + t), v_mul(vv, v_load(s + t)));
        v_store(x + t, v_add(LOAD(key + t), carried));
    }
}

static FKV_DECL_GATHER(NAME(gather)) {
    const ELEMENT *value = v;
    float row[FKV_MAX_HEAD_DIM + VL], level[FKV_MAX_HEAD_DIM + VL];
    int index[FKV_MAX_HEAD_DIM + VL];
    for (int i = 0; i < count + VL - 1; i++) {
        index[i] = i < count ? list[i] : 0;
        level[i] = carrier[index[i]];
    }
    for (int t = 0; t < 64; t++, x += x_stride, value += dims) {
        int i = 0;
        for (int d = 0; d < dims; d += VL)
            v_store(row + d, LOAD(value + d));
        for (; i + VL <= count; i += VL)
            v_store(x + i, v_sub(v_gather(row, index + i), v_load(level + i)));
        if (i < count)
            v_store_first(x + i, v_sub(v_gather(row, index + i), v_load(level + i)), count - i);
    }
}

static FKV_DECL_TURN(NAME(turn)) {
    const ELEMENT *key = k;
    const int begin = from / VL * VL;
    const intptr_t ahead = distance(k, next);
    for (int j = 0; j < pairs; j++) {
        const int a = first[j] * 64, b = second[j] * 64;
        prefetch(key + a, ahead, 64 * sizeof *key);
        prefetch(key + b, ahead, 64 * sizeof *key);
        for (int t = begin; t < end; t += VL) {
            const vf x = LOAD(key + a + t), z = LOAD(key + b + t);
            const vf c = v_load(cos + j * 64 + t), s = v_load(sin + j * 64 + t);
            v_store(y + a + t, v_sub(v_mul(x, c), v_mul(z, s)));
            v_store(y + b + t, v_fma(z, c, v_mul(x, s)));
        }
    }
    for (int d = 2 * pairs; d < dims; d++)
        for (int t = begin; t < end; t += VL)
            v_store(y + d * 64 + t, LOAD(key + d * 64 + t));
}

#undef NAME
#undef LOAD
#undef SAVE
#undef STORE
#undef ELEMENT
