/* SPDX-License-Identifier: Apache-2.0 */
/* Seeded random numbers (xoshiro256**, seeded by splitmix64), so that every failure can be repeated. */
#ifndef FKV_TESTS_RANDOM_H
#define FKV_TESTS_RANDOM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct random {
    uint64_t state[4];
};

/* FKV_SEED if set, else `fallback`; printed with the program's name. */
uint64_t random_seed(const char *program, uint64_t fallback);
/* FKV_QUICK set: the smaller loops for instrumented builds. */
bool random_quick(void);

void random_init(struct random *r, uint64_t seed);
uint64_t random_next(struct random *r);
/* lo..hi, both included */
int64_t random_int(struct random *r, int64_t lo, int64_t hi);
/* [0, 1) */
double random_uniform(struct random *r);
double random_normal(struct random *r);
/* Mean 0 and variance 1 like the normal deviate, within +-3.5, and much cheaper. */
double random_bell(struct random *r);
bool random_chance(struct random *r, double probability);
void random_fill(struct random *r, float *x, size_t n, double deviation);

#endif /* FKV_TESTS_RANDOM_H */
