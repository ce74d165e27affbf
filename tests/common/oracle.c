/* SPDX-License-Identifier: Apache-2.0 */
#include "oracle.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Mantissa bits, least normal exponent and largest exponent of a type. */
static void format_of(fkv_dtype dtype, int *mantissa, int *least, int *largest) {
    *mantissa = dtype == FKV_DTYPE_F32 ? 23 : dtype == FKV_DTYPE_F16 ? 10 : 7;
    *least = dtype == FKV_DTYPE_F16 ? -14 : -126;
    *largest = dtype == FKV_DTYPE_F16 ? 15 : 127;
}

size_t oracle_element_size(fkv_dtype dtype) {
    return dtype == FKV_DTYPE_F32 ? 4 : 2;
}

/* 2^e of a normal double */
static double power_of_two(int e) {
    uint64_t bits = (uint64_t)(e + 1023) << 52;
    double x;

    memcpy(&x, &bits, 8);
    return x;
}

/* floor(log2 |x|) of a normal double; less than any exponent of the types for zero */
static int exponent(double x) {
    uint64_t bits;

    memcpy(&bits, &x, 8);
    return (int)(bits >> 52 & 0x7ff) - 1023;
}

static double quantum(double x, fkv_dtype dtype) {
    int mantissa, least, largest;

    format_of(dtype, &mantissa, &least, &largest);
    int e = exponent(x);
    return power_of_two((e < least ? least : e) - mantissa);
}

double oracle_round(double x, fkv_dtype dtype) {
    int mantissa, least, largest;

    if (!isfinite(x))
        return x;
    double q = quantum(x, dtype);
    double y = nearbyint(x / q) * q;
    format_of(dtype, &mantissa, &least, &largest);
    return fabs(y) >= power_of_two(largest + 1) ? copysign(INFINITY, x) : y;
}

double oracle_half_ulp(double x, fkv_dtype dtype) {
    return quantum(x, dtype) / 2;
}

double oracle_load(const void *p, fkv_dtype dtype) {
    int mantissa, least, largest;
    uint16_t h;

    if (dtype == FKV_DTYPE_F32) {
        float f;
        memcpy(&f, p, 4);
        return (double)f;
    }
    memcpy(&h, p, 2);
    format_of(dtype, &mantissa, &least, &largest);
    int fraction = h & ((1 << mantissa) - 1);
    int e = (h & 0x7fff) >> mantissa;
    double sign = h & 0x8000 ? -1 : 1;
    if (e == largest - least + 2)
        return fraction ? (double)NAN : sign * INFINITY;
    if (e == 0)
        return sign * fraction * power_of_two(least - mantissa);
    return sign * (fraction + (1 << mantissa)) * power_of_two(e - 1 + least - mantissa);
}

void oracle_store(void *p, fkv_dtype dtype, double x) {
    int mantissa, least, largest;
    double y = oracle_round(x, dtype);

    if (dtype == FKV_DTYPE_F32) {
        float f = (float)y;
        memcpy(p, &f, 4);
        return;
    }
    format_of(dtype, &mantissa, &least, &largest);
    unsigned infinity = (unsigned)(largest - least + 2) << mantissa;
    unsigned h;
    if (isnan(y))
        h = infinity | 1u << (mantissa - 1);
    else if (isinf(y))
        h = infinity;
    else {
        double a = fabs(y);
        int e = exponent(a);
        /* below the normal range the exponent field is 0 and the leading one is not implied */
        h = e < least ? (unsigned)(a * power_of_two(mantissa - least))
                      : ((unsigned)(e - least + 1) << mantissa) +
                            ((unsigned)(a * power_of_two(mantissa - e)) - (1u << mantissa));
    }
    uint16_t bits = (uint16_t)(h | (signbit(y) ? 0x8000u : 0u));
    memcpy(p, &bits, 2);
}

void oracle_rope(const fkv_model_params *model, int64_t position, double *x) {
    if (model->rope_layout == FKV_ROPE_NONE)
        return;
    int dim = model->rope_dim ? model->rope_dim : model->head_dim;
    double scaling = model->rope_scaling == 0 ? 1 : model->rope_scaling;
    for (int j = 0; j < dim / 2; j++) {
        bool half = model->rope_layout == FKV_ROPE_HALF_SPLIT;
        double *a = &x[half ? j : 2 * j];
        double *b = &x[half ? j + dim / 2 : 2 * j + 1];
        double angle = (double)position * model->inv_freq[j];
        double c = cos(angle) * scaling, s = sin(angle) * scaling;
        double re = *a * c - *b * s, im = *a * s + *b * c;
        *a = re;
        *b = im;
    }
}

double oracle_scale(const fkv_model_params *model) {
    return model->softmax_scale == 0 ? 1 / sqrt(model->head_dim) : model->softmax_scale;
}

struct oracle_row oracle_attend(const double *q, const double *k, const double *v, int64_t count,
                                int64_t stride, int dim, double scale, double *out) {
    struct oracle_row row = {-INFINITY, 0, 0, 0};
    double max = -INFINITY, sum = 0;
    double *s = malloc((size_t)(count + 1) * sizeof *s);

    memset(out, 0, (size_t)dim * sizeof *out);
    for (int64_t t = 0; t < count; t++) {
        s[t] = 0;
        for (int d = 0; d < dim; d++)
            s[t] += q[d] * k[t * stride + d];
        s[t] *= scale;
        max = fmax(max, s[t]);
        row.max_score = fmax(row.max_score, fabs(s[t]));
    }
    for (int64_t t = 0; t < count; t++)
        sum += exp(s[t] - max);
    for (int64_t t = 0; t < count; t++) {
        double w = exp(s[t] - max) / sum;
        row.max_weight = fmax(row.max_weight, w);
        for (int d = 0; d < dim; d++) {
            out[d] += w * v[t * stride + d];
            row.max_value = fmax(row.max_value, fabs(v[t * stride + d]));
        }
    }
    if (count > 0)
        row.lse = max + log(sum);
    free(s);
    return row;
}

double oracle_tolerance(const struct oracle_row *row, double o, fkv_dtype out) {
    double kernel = 16 * 0x1p-23 * (1 + row->max_score) * row->max_value;

    return kernel + (out == FKV_DTYPE_F16    ? 0x1p-11 * fabs(o) + 0x1p-25
                     : out == FKV_DTYPE_BF16 ? 0x1p-8 * fabs(o)
                                             : 0);
}

bool oracle_row_counts(const struct oracle_row *row, const double *out, int dim) {
    int zeros = 0;

    for (int d = 0; d < dim; d++)
        zeros += out[d] == 0;
    return row->max_weight < 0.99 && zeros * 10 <= dim * 3;
}

void oracle_phases_init(struct oracle_phases *p, int64_t period) {
    p->period = period;
    p->cos = malloc((size_t)period * sizeof *p->cos);
    p->sin = malloc((size_t)period * sizeof *p->sin);
    for (int64_t j = 0; j < period; j++) {
        double angle = 6.283185307179586476925286766559 * (double)j / (double)period;
        p->cos[j] = cos(angle);
        p->sin[j] = sin(angle);
    }
}

void oracle_phases_free(struct oracle_phases *p) {
    free(p->cos);
    free(p->sin);
}

double oracle_mean(const double *x, int64_t n, int64_t stride) {
    double sum = 0;

    for (int64_t l = 0; l < n; l++)
        sum += x[l * stride];
    return n > 0 ? sum / (double)n : 0;
}

void oracle_analyse(const struct oracle_phases *p, const double *x, int64_t n, int64_t stride,
                    double level, int bins, struct oracle_series *series) {
    if (bins > p->period / 2 + 1)
        bins = (int)(p->period / 2 + 1);
    series->bins = bins;
    series->c = calloc((size_t)bins, sizeof *series->c);
    series->s = calloc((size_t)bins, sizeof *series->s);
    for (int b = 0; b < bins; b++) {
        int64_t j = 0; /* b l mod T */
        for (int64_t l = 0; l < n; l++) {
            series->c[b] += (x[l * stride] - level) * p->cos[j];
            series->s[b] += (x[l * stride] - level) * p->sin[j];
            j += b;
            if (j >= p->period)
                j -= p->period;
        }
    }
}

void oracle_series_free(struct oracle_series *series) {
    free(series->c);
    free(series->s);
}

/* sum over n >= first of weight (C cos + S sin) at l; the weight is 1 at the Nyquist bin */
static double synthesis(const struct oracle_phases *p, const struct oracle_series *series,
                        int first, double weight, int64_t l) {
    double sum = 0;

    for (int n = first; n < series->bins; n++) {
        int64_t j = (int64_t)((uint64_t)n * (uint64_t)l % (uint64_t)p->period);
        double w = 2 * (int64_t)n == p->period ? 1 : weight;
        sum += w * (series->c[n] * p->cos[j] + series->s[n] * p->sin[j]);
    }
    return sum;
}

double oracle_least_squares(const struct oracle_phases *p, const double *x, int64_t n,
                            int64_t stride, int bins, double *y) {
    double mean = oracle_mean(x, n, stride);
    struct oracle_series series;

    oracle_analyse(p, x, n, stride, mean, bins, &series);
    for (int64_t l = 0; l < n; l++)
        y[l] = mean + synthesis(p, &series, 1, 2, l) / (double)p->period;
    oracle_series_free(&series);
    return 0;
}

static double span(const double *x, int64_t n, int64_t stride, double mean) {
    double largest = 0;

    for (int64_t l = 0; l < n; l++)
        largest = fmax(largest, fabs(x[l * stride] - mean));
    return largest;
}

double oracle_authors(const struct oracle_phases *p, const double *x, int64_t n, int64_t stride,
                      int bins, double *y) {
    double mean = oracle_mean(x, n, stride);
    struct oracle_series series;

    oracle_analyse(p, x, n, stride, 0, bins, &series);
    for (int64_t l = 0; l < n; l++)
        y[l] = synthesis(p, &series, 0, 1, l) / series.bins;
    oracle_series_free(&series);
    double r_mean = oracle_mean(y, n, 1), r_span = span(y, n, 1, r_mean);
    double scale = r_span > 0 ? span(x, n, stride, mean) / r_span : 0;
    for (int64_t l = 0; l < n; l++)
        y[l] = (y[l] - r_mean) * scale + mean;
    return scale * fabs(r_mean);
}
