/* SPDX-License-Identifier: Apache-2.0 */
#include "random.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

uint64_t random_seed(const char *program, uint64_t fallback) {
    const char *text = getenv("FKV_SEED");
    uint64_t seed = text ? strtoull(text, NULL, 0) : fallback;

    printf("# %s: FKV_SEED=%" PRIu64 "%s\n", program, seed, random_quick() ? " (quick)" : "");
    fflush(stdout);
    return seed;
}

bool random_quick(void) {
    const char *text = getenv("FKV_QUICK");

    return text && *text && *text != '0';
}

static uint64_t splitmix(uint64_t *x) {
    uint64_t z = *x += 0x9e3779b97f4a7c15u;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

void random_init(struct random *r, uint64_t seed) {
    for (int i = 0; i < 4; i++)
        r->state[i] = splitmix(&seed);
}

static uint64_t rotate(uint64_t x, int k) {
    return (x << k) | (x >> (64 - k));
}

uint64_t random_next(struct random *r) {
    uint64_t *s = r->state;
    uint64_t result = rotate(s[1] * 5, 7) * 9;
    uint64_t t = s[1] << 17;

    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate(s[3], 45);
    return result;
}

int64_t random_int(struct random *r, int64_t lo, int64_t hi) {
    return lo + (int64_t)(random_next(r) % ((uint64_t)(hi - lo) + 1));
}

double random_uniform(struct random *r) {
    return (double)(random_next(r) >> 11) * 0x1p-53;
}

double random_normal(struct random *r) {
    double u = 1 - random_uniform(r);
    double v = random_uniform(r);

    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

double random_bell(struct random *r) {
    uint64_t x = random_next(r);
    double sum = (double)((x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48));

    /* four uniform numbers: variance 4 / 12 of their width squared */
    return (sum / 65535 - 2) * 1.7320508075688772;
}

bool random_chance(struct random *r, double probability) {
    return random_uniform(r) < probability;
}

void random_fill(struct random *r, float *x, size_t n, double deviation) {
    for (size_t i = 0; i < n; i++)
        x[i] = (float)(deviation * random_normal(r));
}
