/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The search in 4-bit codes. Included by simd.h, and again for processors with better dot products, with
 *   SIFT(name)    name of a function       SIFT_TARGET    attributes of it
 *   SIFT_ROWS     rows and SIFT_VECTORS vectors whose sums fit the registers
 *   SIFT_DOT      1: sums of four products in one instruction; 0: sums of two, in words, which hold those of four
 *                 octets: 4 * 2 * 2 * 15 * 127 = 30480
 */
static inline __attribute__((always_inline)) SIFT_TARGET void
SIFT(sift_sums)(vi sum[SIFT_ROWS][SIFT_VECTORS], const int8_t *z, ptrdiff_t z_stride,
                const uint8_t *codes, int octets, intptr_t ahead, const int rows) {
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < SIFT_VECTORS; v++) sum[r][v] =
        vi_set1(0);
    for (int o = 0; o < octets;) {
        const int end = octets - o < 4 ? octets : o + 4;
        vi part[SIFT_ROWS][SIFT_VECTORS];
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < SIFT_VECTORS; v++)
            part[r][v] = SIFT_DOT ? sum[r][v] : vi_set1(0);
        for (; o < end; o++, codes += 256) {
            prefetch(codes, ahead, 4 * SIFT_VECTORS * VL);
            UNROLL for (int v = 0; v < SIFT_VECTORS; v++) {
                const vi x = vi_load(codes + 4 * v * VL), low = vi_lower(x), high = vi_upper(x);
                UNROLL for (int r = 0; r < rows; r++) {
                    int32_t four[2];
                    memcpy(four, z + r * z_stride + 8 * o, sizeof four);
                    part[r][v] = SIFT(sift_dot)(part[r][v], low, vi_set1(four[0]));
                    part[r][v] = SIFT(sift_dot)(part[r][v], high, vi_set1(four[1]));
                }
            }
        }
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < SIFT_VECTORS; v++)
            sum[r][v] = SIFT_DOT ? part[r][v] : vi_add_words(sum[r][v], part[r][v]);
    }
}

static inline __attribute__((always_inline)) SIFT_TARGET void
SIFT(sift_block)(uint64_t *bits, const int8_t *z, ptrdiff_t z_stride, const struct fkv_sift *sift,
                 const float *limit, const uint8_t *codes, int octets, intptr_t ahead,
                 const int rows) {
    const uint16_t *bounds = (const uint16_t *)(const void *)(codes + 256 * (ptrdiff_t)octets);
    UNROLL for (int r = 0; r < rows; r++) bits[r] = 0;
    prefetch(bounds, ahead, 128);
    for (int part = 0; part < 64; part += SIFT_VECTORS * VL) {
        vi sum[SIFT_ROWS][SIFT_VECTORS];
        SIFT(sift_sums)(sum, z, z_stride, codes + 4 * part, octets, ahead, rows);
        UNROLL for (int v = 0; v < SIFT_VECTORS; v++) {
            const vf bound = v_load_bf16(bounds + part + v * VL);
            UNROLL for (int r = 0; r < rows; r++) {
                const vf add = v_fma(v_set1(sift[r].norm), bound, v_set1(sift[r].base));
                const vf most = v_fma(v_set1(sift[r].step), v_from_int(sum[r][v]), add);
                bits[r] |= v_not_under(most, v_set1(limit[r])) << (part + v * VL);
            }
        }
    }
}

static SIFT_TARGET FKV_DECL_SIFT(SIFT(sift)) {
    intptr_t ahead = distance(codes, next);
    for (; rows > 0;) {
        const int n = rows >= SIFT_ROWS ? SIFT_ROWS : rows >= 4 ? 4 : rows >= 3 ? 3 : rows;
        if (n == SIFT_ROWS)
            SIFT(sift_block)(bits, z, z_stride, sift, limit, codes, octets, ahead, SIFT_ROWS);
#if SIFT_ROWS > 4
        else if (n == 4)
            SIFT(sift_block)(bits, z, z_stride, sift, limit, codes, octets, ahead, 4);
        else if (n == 3)
            SIFT(sift_block)(bits, z, z_stride, sift, limit, codes, octets, ahead, 3);
#endif
        else if (n == 2)
            SIFT(sift_block)(bits, z, z_stride, sift, limit, codes, octets, ahead, 2);
        else
            SIFT(sift_block)(bits, z, z_stride, sift, limit, codes, octets, ahead, 1);
        bits += n, z += n * z_stride, sift += n, limit += n, rows -= n;
        ahead = 0;
    }
}

#undef SIFT
#undef SIFT_TARGET
#undef SIFT_ROWS
#undef SIFT_VECTORS
#undef SIFT_DOT
