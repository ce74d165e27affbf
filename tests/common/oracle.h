/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the library should compute, in double precision and by the shortest road: plain loops, softmax in
 * two passes, phases reduced in integers. It shares no code with the library, only its public types.
 */
#ifndef FKV_TESTS_ORACLE_H
#define FKV_TESTS_ORACLE_H

#include "fkv/fkv.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- element types, round to nearest even */

size_t oracle_element_size(fkv_dtype dtype);
double oracle_round(double x, fkv_dtype dtype);
double oracle_load(const void *p, fkv_dtype dtype);
/* Rounds and stores; a NaN is stored as a quiet NaN. */
void oracle_store(void *p, fkv_dtype dtype, double x);
/* Largest rounding error of a stored value near x: half a unit in the last place. */
double oracle_half_ulp(double x, fkv_dtype dtype);

/* ---- rope and attention */

/* Rotates x[head_dim] as the model says; the model's zeros have their documented meaning. */
void oracle_rope(const fkv_model_params *model, int64_t position, double *x);
double oracle_scale(const fkv_model_params *model);

struct oracle_row {
    double lse;
    double max_score;  /* of the absolute values, after scaling */
    double max_weight; /* largest softmax weight */
    double max_value;  /* largest |v| */
};

/* One query head over `count` keys and values, each `stride` doubles after the one before. */
struct oracle_row oracle_attend(const double *q, const double *k, const double *v, int64_t count,
                                int64_t stride, int dim, double scale, double *out);
/* How far an output element may be from the oracle's `o`. */
double oracle_tolerance(const struct oracle_row *row, double o, fkv_dtype out);
/* A row says something only if attention really mixes values and the output is not mostly zero. */
bool oracle_row_counts(const struct oracle_row *row, const double *out, int dim);

/* ---- Fourier */

/* cos and sin of 2 pi j / T for j < T */
struct oracle_phases {
    int64_t period;
    double *cos;
    double *sin;
};

void oracle_phases_init(struct oracle_phases *p, int64_t period);
void oracle_phases_free(struct oracle_phases *p);

double oracle_mean(const double *x, int64_t n, int64_t stride);

struct oracle_series {
    double *c; /* [bins] */
    double *s;
    int bins;
};

/* Coefficients of x[0..n-1] (`stride` apart) less `level`; bins is cut to T / 2 + 1. */
void oracle_analyse(const struct oracle_phases *p, const double *x, int64_t n, int64_t stride,
                    double level, int bins, struct oracle_series *series);
void oracle_series_free(struct oracle_series *series);

/*
 * FKV_RESTORE_LEAST_SQUARES: y[0..n-1] from x[0..n-1], which are `stride` apart. Returned is the size of
 * terms that cancel in y, beside x itself; errors of the coefficients grow with it.
 */
double oracle_least_squares(const struct oracle_phases *p, const double *x, int64_t n,
                            int64_t stride, int bins, double *y);
/* The same for FKV_RESTORE_AUTHORS, all of x being in the first coding append. */
double oracle_authors(const struct oracle_phases *p, const double *x, int64_t n, int64_t stride,
                      int bins, double *y);

#endif /* FKV_TESTS_ORACLE_H */
