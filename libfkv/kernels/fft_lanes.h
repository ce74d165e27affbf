/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One pass of the Stockham FFT and the pointwise rotation over 16 lanes, in C with the compiler's vectors.
 * Every level includes this file under its own flags, FKV_SUFFIX and FKV_FFT_WIDTH (floats of a register):
 * intrinsics would add nothing.
 */
#define FKV_PASTE2(a, b) a##_##b
#define FKV_PASTE(a, b) FKV_PASTE2(a, b)
#define FKV_NAME(name) FKV_PASTE(name, FKV_SUFFIX)
#define L FKV_FFT_LANES

/* radix constants: cos and sin of 2 pi k / 3 and 2 pi k / 5 */
#define C3_1 (-0.5f)
#define S3_1 0.866025403784438647f
#define C5_1 0.309016994374947424f
#define C5_2 (-0.809016994374947424f)
#define S5_1 0.951056516295153572f
#define S5_2 0.587785252292473129f

/* A register of floats at any address, and one of complex numbers. */
typedef float FKV_NAME(lanes)
    __attribute__((vector_size(4 * FKV_FFT_WIDTH), aligned(4), may_alias));
struct FKV_NAME(complex) {
    FKV_NAME(lanes) re, im;
};
#define Z struct FKV_NAME(complex)
#define AT(p) (*(FKV_NAME(lanes) *)(p))
#define FROM(p) (*(const FKV_NAME(lanes) *)(p))

static inline __attribute__((always_inline)) Z FKV_NAME(add)(Z a, Z b) {
    return (Z){a.re + b.re, a.im + b.im};
}
static inline __attribute__((always_inline)) Z FKV_NAME(sub)(Z a, Z b) {
    return (Z){a.re - b.re, a.im - b.im};
}
/* a + c b */
static inline __attribute__((always_inline)) Z FKV_NAME(madd)(Z a, float c, Z b) {
    return (Z){a.re + c * b.re, a.im + c * b.im};
}
/* a - i b */
static inline __attribute__((always_inline)) Z FKV_NAME(minus_i)(Z a, Z b) {
    return (Z){a.re + b.im, a.im - b.re};
}
/* a + i b */
static inline __attribute__((always_inline)) Z FKV_NAME(plus_i)(Z a, Z b) {
    return (Z){a.re - b.im, a.im + b.re};
}
#define ADD FKV_NAME(add)
#define SUB FKV_NAME(sub)
#define MADD FKV_NAME(madd)
#define MINUS_I FKV_NAME(minus_i)
#define PLUS_I FKV_NAME(plus_i)

static inline __attribute__((always_inline)) void FKV_NAME(butterfly)(const Z *x, Z *y,
                                                                      const int radix) {
    const Z zero = {{0.0f}, {0.0f}};
    if (radix == 2) {
        y[0] = ADD(x[0], x[1]);
        y[1] = SUB(x[0], x[1]);
    } else if (radix == 3) {
        Z t = ADD(x[1], x[2]), u = SUB(x[1], x[2]), m = MADD(x[0], C3_1, t);
        Z v = MADD(zero, S3_1, u);
        y[0] = ADD(x[0], t);
        y[1] = MINUS_I(m, v);
        y[2] = PLUS_I(m, v);
    } else if (radix == 4) {
        Z a = ADD(x[0], x[2]), b = SUB(x[0], x[2]), c = ADD(x[1], x[3]), d = SUB(x[1], x[3]);
        y[0] = ADD(a, c);
        y[1] = MINUS_I(b, d);
        y[2] = SUB(a, c);
        y[3] = PLUS_I(b, d);
    } else {
        Z a = ADD(x[1], x[4]), b = SUB(x[1], x[4]), c = ADD(x[2], x[3]), d = SUB(x[2], x[3]);
        Z e = MADD(MADD(x[0], C5_1, a), C5_2, c), f = MADD(MADD(x[0], C5_2, a), C5_1, c);
        Z g = MADD(MADD(zero, S5_1, b), S5_2, d), h = MADD(MADD(zero, S5_2, b), -S5_1, d);
        y[0] = ADD(x[0], ADD(a, c));
        y[1] = MINUS_I(e, g);
        y[4] = PLUS_I(e, g);
        y[2] = MINUS_I(f, h);
        y[3] = PLUS_I(f, h);
    }
}

static inline __attribute__((always_inline)) void
FKV_NAME(fft_pass_radix)(float *restrict yr, float *restrict yi, const float *restrict xr,
                         const float *restrict xi, const float *tw, const int radix, int m, int s) {
    const ptrdiff_t from = (ptrdiff_t)s * m * L, to = (ptrdiff_t)s * L;
    for (int p = 0; p < m; p++, tw += 2 * (radix - 1))
        for (int q = 0; q < s; q++) {
            const ptrdiff_t in = ((ptrdiff_t)q + (ptrdiff_t)s * p) * L;
            const ptrdiff_t out = ((ptrdiff_t)q + (ptrdiff_t)s * radix * p) * L;
            for (int i = 0; i < L; i += FKV_FFT_WIDTH) {
                Z x[5], y[5];
                for (int j = 0; j < radix; j++)
                    x[j] = (Z){FROM(xr + in + j * from + i), FROM(xi + in + j * from + i)};
                FKV_NAME(butterfly)(x, y, radix);
                AT(yr + out + i) = y[0].re;
                AT(yi + out + i) = y[0].im;
                for (int k = 1; k < radix; k++) {
                    float wr = tw[2 * k - 2], wi = tw[2 * k - 1];
                    AT(yr + out + k * to + i) = y[k].re * wr - y[k].im * wi;
                    AT(yi + out + k * to + i) = y[k].re * wi + y[k].im * wr;
                }
            }
        }
}

static FKV_DECL_FFT_PASS(FKV_NAME(fft_pass)) {
    switch (radix) {
    case 2:
        FKV_NAME(fft_pass_radix)(yr, yi, xr, xi, twiddles, 2, m, s);
        break;
    case 3:
        FKV_NAME(fft_pass_radix)(yr, yi, xr, xi, twiddles, 3, m, s);
        break;
    case 4:
        FKV_NAME(fft_pass_radix)(yr, yi, xr, xi, twiddles, 4, m, s);
        break;
    default:
        FKV_NAME(fft_pass_radix)(yr, yi, xr, xi, twiddles, 5, m, s);
        break;
    }
}

static FKV_DECL_ROTATE(FKV_NAME(rotate)) {
    for (ptrdiff_t p = 0; p < points; p++)
        for (ptrdiff_t at = p * L; at < (p + 1) * L; at += FKV_FFT_WIDTH) {
            FKV_NAME(lanes) a = FROM(xr + at), b = FROM(xi + at); /* z may be x */
            AT(zr + at) = a * cr[p] - b * ci[p];
            AT(zi + at) = a * ci[p] + b * cr[p];
        }
}

#undef AT
#undef FROM
#undef Z
#undef ADD
#undef SUB
#undef MADD
#undef MINUS_I
#undef PLUS_I
#undef C3_1
#undef S3_1
#undef C5_1
#undef C5_2
#undef S5_1
#undef S5_2
#undef L
