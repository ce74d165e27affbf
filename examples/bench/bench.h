/* SPDX-License-Identifier: Apache-2.0 */
/* fkv-bench: what a decode step and an append cost, beside dense attention in the same process. */
#ifndef FKV_BENCH_H
#define FKV_BENCH_H

#include <fkv/fkv.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- machine.c: the clock, the memory and the random numbers */

double bench_now(void);
/* All last-level caches of the online processors together; 32 MiB if the system does not say. */
uint64_t bench_cache_bytes(void);
uint64_t bench_memory_bytes(void);
/* Bytes per second: the best of several passes of `threads` threads that sum up `bytes` bytes. */
double bench_read_bandwidth(int threads, size_t bytes);

struct bench_random {
    uint64_t state;
};
uint64_t bench_random_next(struct bench_random *r);
/* Nearly normal: the sum of four uniform numbers, with mean 0 and deviation 1. */
void bench_random_fill(struct bench_random *r, float *x, size_t n);

/* Prints the message and ends the program. */
void bench_fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
/* The same if status is an error, with the context's own words. */
void bench_check(fkv_context *ctx, fkv_status status, const char *what);
void *bench_alloc(size_t count, size_t size);

/* ---- variant.c: one way to hold the same tokens */

/* One layer: geometry and, if `coded` or `calibrated`, how channels are held. */
struct bench_model {
    int hq, hk, dim;
    fkv_rope_layout rope_layout;
    int rope_dim;
    double *inv_freq;
    double scale;
    bool coded;
    fkv_dtype storage;
    fkv_fourier_params fourier;
    bool calibrated;
    bool select; /* attend with selection; keys are held unrotated */
    bool index;  /* with an index of keys */
    fkv_codec_params codec;
    uint8_t *mask[2];  /* [hk][dim] of K and V: 1 for Fourier-coded, or bits */
    float *carrier[2]; /* the same shape; NULL unless calibrated */
};

struct bench_variant {
    fkv_context *ctx;
    const struct bench_model *model;
    fkv_profile *profile;
    fkv_cache *cache;
    fkv_plan *plan;
    int64_t tokens;
    int batch;
    int sets; /* groups of `batch` sequences, visited in turn so that no data stays in a cache */
    fkv_sequence *sequences; /* [sets][batch] */
    /* of one set */
    uint64_t bytes;
    uint64_t dense_bytes;
    int64_t tokens_coded;
    /* of each repeat */
    double *seconds;
    double *plan_seconds;
    /* over everything that was checked */
    double max_error;
    double max_output;
    double tolerance;
};

/* theta is RoPE's base. Masks are left NULL. */
void bench_model_init(struct bench_model *model, int hq, int hk, int dim, double theta);
/* Masks with `fraction` of all channels, spread unevenly over the heads. */
void bench_model_code(struct bench_model *model, double fraction, struct bench_random *r);
/* Bits of 0, 2 and 4, for each channel of 4 bits 15 of 2, which is what calibration finds, so that an element
 * takes `rate` bits with its scales; or all channels alike, without carriers. false if that is not possible. */
bool bench_model_calibrate(struct bench_model *model, double rate, struct bench_random *r);
bool bench_model_uniform(struct bench_model *model, int bits);
/* Geometry and coding of one layer of a profile file; RoPE's frequencies are ours. */
void bench_model_load(struct bench_model *model, fkv_context *ctx, const char *path, int layer,
                      double theta);
void bench_model_free(struct bench_model *model);

/* sets 0: as many as it takes for the data to be 4 times the last-level caches. */
void bench_variant_init(struct bench_variant *variant, fkv_context *ctx,
                        const struct bench_model *model, int64_t tokens, int batch, int sets,
                        int repeats);
/* Makes the sequences of a set and appends all their tokens. The time of the appends and of the plan
 * updates is added to *seconds and *plan_seconds. */
void bench_variant_fill(struct bench_variant *variant, int set, struct bench_random *r,
                        double *seconds, double *plan_seconds);
void bench_variant_drop(struct bench_variant *variant, int set);
/* One decode step of a set, timed likewise; q and out are [batch][hq][dim]. With selection the step's token is
 * appended as well. */
void bench_variant_attend(struct bench_variant *variant, int set, float *q, float *out,
                          double *seconds, double *plan_seconds);
void bench_variant_free(struct bench_variant *variant);

/* ---- check.c */

/* Attends with a set and compares some heads with float64 attention over what the set holds. */
void bench_variant_check(struct bench_variant *variant, int set, struct bench_random *r);

/* ---- cuda.c */

/* All shapes, or one if tokens is not 0. profile: of the coded side, "fourier:SHARE[:BINS]" or a file; NULL: a
 * calibrated one. The program's exit status. */
int bench_cuda(bool json, int batch, int64_t tokens, const char *profile);

#endif /* FKV_BENCH_H */
