/* SPDX-License-Identifier: Apache-2.0 */
/* The Fourier basis, the grid and the transforms of one (period, bins), against sums in double. */
#include "codec/spectrum.h"

#include "arrays.h"

#include <stdio.h>

#define LENGTH(a) ((int)(sizeof(a) / sizeof(a)[0]))

static struct fkv_kernels kernels;

/* ---- a heap whose n-th allocation fails */

static int allocations_left;

static void *allocate(void *user, size_t bytes, size_t alignment) {
    (void)user;
    if (allocations_left-- <= 0)
        return NULL;
    return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

static void release(void *user, void *pointer, size_t bytes) {
    (void)user;
    (void)bytes;
    free(pointer);
}

static struct fkv_heap heap = {.alloc = allocate, .free = release};

/* ---- one plan and the oracle's phases for it */

struct fixture {
    struct fkv_spectrum *sp;
    struct oracle_phases phases;
    void *scratch;
    int64_t tokens; /* of a full segment */
};

static void fixture_init(struct fixture *f, int64_t period, int bins) {
    snprintf(where, sizeof where, "period %lld bins %d", (long long)period, bins);
    allocations_left = 1000;
    assert_int_equal(fkv_spectrum_create(&heap, &kernels, period, bins, &f->sp), FKV_OK);
    oracle_phases_init(&f->phases, period);
    f->scratch = malloc(fkv_spectrum_scratch(f->sp));
    f->tokens = f->sp->capacity;
}

static void fixture_free(struct fixture *f) {
    fkv_spectrum_destroy(&heap, f->sp);
    assert_int_equal(heap.live, 0);
    oracle_phases_free(&f->phases);
    free(f->scratch);
}

static int64_t phase_of(const struct fixture *f, int64_t n, int64_t t) {
    return (int64_t)((uint64_t)n * (uint64_t)t % (uint64_t)f->sp->period);
}

/* Rows of random A, B; what lies between and behind them is zero. */
static float *random_rows(const struct fixture *f, int rows) {
    const struct fkv_spectrum *sp = f->sp;
    float *row = calloc((size_t)(rows * sp->stride + PADDING), sizeof *row);

    for (int r = 0; r < rows; r++) {
        random_fill(&rng, row + r * sp->stride, (size_t)sp->bins, 1);
        random_fill(&rng, row + r * sp->stride + sp->padded, (size_t)sp->bins, 1);
    }
    return row;
}

/* Mean square over a period of what the row describes, whatever cancels at some tokens. */
static double row_energy(const struct fkv_spectrum *sp, const float *row) {
    double sum = 0;

    for (int n = 0; n < sp->stride; n++)
        sum += (double)row[n] * (double)row[n] / 2;
    return sum;
}

/* Guarded, so that a grid point too many ends the test. */
static float *grid_alloc(const struct fixture *f, int rows, struct guard *guard) {
    return guard_alloc(guard, (size_t)rows * (size_t)f->sp->grid * sizeof(float),
                       PADDING * sizeof(float));
}

static void compare(const char *what, double error, double size, double bound) {
    if (!(sqrt(error / size) <= bound))
        fail_msg("%s: %s: relative error %.3g, allowed %.3g", where, what, sqrt(error / size),
                 bound);
}

/* ---- tables */

static void check_sizes(const struct fixture *f, int64_t period, int bins) {
    const struct fkv_spectrum *sp = f->sp;

    assert_int_equal(sp->period, period);
    assert_int_equal(sp->capacity, period / 64 * 64);
    assert_int_equal(sp->bins, bins < period / 2 + 1 ? bins : period / 2 + 1);
    assert_true(sp->padded >= sp->bins && sp->stride == 2 * sp->padded);
    assert_true(sp->grid >= (sp->capacity - 1) / sp->taps.cell + sp->taps.width);
    assert_true(sp->taps.width == 1 ? sp->taps.cell == 1 : sp->taps.width == FKV_TAPS);
    assert_int_equal(heap.live, fkv_spectrum_bytes(period, bins));
}

static void check_basis(const struct fixture *f, int64_t first) {
    const struct fkv_spectrum *sp = f->sp;
    float *basis = malloc(64 * (size_t)sp->stride * sizeof *basis);
    double period = 2.0 * (double)sp->period;

    fkv_spectrum_basis(sp, first, basis);
    for (int j = 0; j < 64; j++) {
        for (int n = 0; n < sp->padded; n++) {
            int64_t at = phase_of(f, n, first + j);
            double c = n < sp->bins ? f->phases.cos[at] : 0,
                   s = n < sp->bins ? f->phases.sin[at] : 0;
            const float *row = basis + j * sp->stride;
            near("cos", j, n, (double)row[n] * period, c, 3e-7);
            near("sin", j, n, (double)row[sp->padded + n] * period, s, 3e-7);
        }
    }
    free(basis);
}

static void check_ones(const struct fixture *f, int64_t length) {
    const struct fkv_spectrum *sp = f->sp;
    float *row = malloc((size_t)sp->stride * sizeof *row);
    double error = 0, size = (double)(length * length);

    fkv_spectrum_ones(sp, length, row);
    for (int n = 0; n < sp->bins; n++) {
        double c = 0, s = 0;
        for (int64_t l = 0, at = 0; l < length; l++) {
            c += f->phases.cos[at];
            s += f->phases.sin[at];
            at += n;
            at -= at >= sp->period ? sp->period : 0;
        }
        double dc = (double)row[n] * 2.0 * (double)sp->period - c;
        double ds = (double)row[sp->padded + n] * 2.0 * (double)sp->period - s;
        error = fmax(error, dc * dc + ds * ds);
    }
    compare("ones", error, size, 1e-7);
    free(row);
}

static void check_weights(const struct fixture *f) {
    const struct fkv_spectrum *sp = f->sp;

    for (int n = 0; n < sp->padded; n++) {
        float want = n == 0 || n >= sp->bins ? 0 : 2 * (int64_t)n == sp->period ? 2 : 4;
        assert_true(sp->weight[n] == want && sp->weight[sp->padded + n] == want);
    }
}

/* ---- bins to tokens */

static void check_tile(const struct fixture *f, const float *row, const float *s, int64_t tile,
                       double *error, double *size) {
    const struct fkv_spectrum *sp = f->sp;
    double energy = row_energy(sp, row);

    for (int j = 0; j < 64; j += 3) {
        double sum = 0;
        for (int n = 0; n < sp->bins; n++) {
            int64_t at = phase_of(f, n, 64 * tile + j);
            sum += (double)row[n] * f->phases.cos[at] +
                   (double)row[sp->padded + n] * f->phases.sin[at];
        }
        *error += (sum - (double)s[j]) * (sum - (double)s[j]);
        *size += energy;
    }
}

static void check_forward(const struct fixture *f, int rows) {
    const struct fkv_spectrum *sp = f->sp;
    struct guard guard, alone_guard;
    float *row = random_rows(f, rows), s[64];
    float *grid = grid_alloc(f, rows, &guard), *alone = grid_alloc(f, 1, &alone_guard);
    int64_t tiles = f->tokens / 64, last = tiles - 1, step = tiles / 12 + 1;
    double error = 0, size = 0;

    fkv_spectrum_to_grid(sp, &kernels, row, sp->stride, grid, sp->grid, rows, f->scratch);
    assert_true(guard_intact(&guard));
    for (int64_t tile = 0; tile < tiles;
         tile = tile < last ? fkv_min64(tile + step, last) : tiles) {
        int r = (int)random_int(&rng, 0, rows - 1);
        kernels.interpolate(s, 64, grid + r * sp->grid + 64 * tile / sp->taps.cell, sp->grid,
                            &sp->taps, 1);
        check_tile(f, row + r * sp->stride, s, tile, &error, &size);
    }
    compare("bins to tokens", error, size, 1e-6);
    for (int r = 0; r < rows; r += 3) {
        fkv_spectrum_to_grid(sp, &kernels, row + r * sp->stride, sp->stride, alone, sp->grid, 1,
                             f->scratch);
        assert_memory_equal(alone, grid + r * sp->grid, (size_t)sp->grid * sizeof *grid);
    }
    guard_free(&guard);
    guard_free(&alone_guard);
    free(row);
}

/* ---- tokens to bins */

/* Spreads p[tokens] of each row over the grids, tile by tile; the last tile may be partly filled. */
static void spread_all(const struct fixture *f, const float *p, int64_t tokens, int rows,
                       float *grid) {
    const struct fkv_spectrum *sp = f->sp;

    memset(grid, 0, (size_t)(rows * sp->grid) * sizeof *grid);
    for (int64_t first = 0; first < tokens; first += 64) {
        int n = (int)(tokens - first < 64 ? tokens - first : 64);
        kernels.spread(grid + first / sp->taps.cell, sp->grid, p + first, f->tokens, &sp->taps, n,
                       rows);
    }
}

static void check_sums(const struct fixture *f, const float *p, int64_t tokens, const float *row) {
    const struct fkv_spectrum *sp = f->sp;
    double error = 0, size = 0, energy = 0;

    for (int64_t t = 0; t < tokens; t++)
        energy += (double)p[t] * (double)p[t];
    for (int n = 0; n < sp->bins; n += 1 + sp->bins / 40) {
        double c = 0, s = 0;
        for (int64_t t = 0, at = 0; t < tokens; t++) {
            c += (double)p[t] * f->phases.cos[at];
            s += (double)p[t] * f->phases.sin[at];
            at += n;
            at -= at >= sp->period ? sp->period : 0;
        }
        double dc = (double)row[n] - c, ds = (double)row[sp->padded + n] - s;
        error += dc * dc + ds * ds;
        size += energy; /* what c^2 + s^2 is on average; it can be much less */
    }
    compare("tokens to bins", error, size, 1e-6);
    for (int n = sp->bins; n < sp->padded; n++)
        assert_true(row[n] == 0 && row[sp->padded + n] == 0);
}

static void check_backward(const struct fixture *f, int rows, int64_t tokens) {
    const struct fkv_spectrum *sp = f->sp;
    struct guard guard;
    size_t n = (size_t)rows * (size_t)f->tokens, stride = (size_t)sp->stride;
    float *p = malloc((n + PADDING) * sizeof *p);
    float *row = malloc((size_t)rows * stride * sizeof *row), *alone = malloc(stride * sizeof *row);
    float *grid = grid_alloc(f, rows, &guard);

    random_fill(&rng, p, n, 1);
    spread_all(f, p, tokens, rows, grid);
    fkv_spectrum_from_grid(sp, &kernels, grid, sp->grid, row, sp->stride, rows, f->scratch);
    assert_true(guard_intact(&guard));
    int r = (int)random_int(&rng, 0, rows - 1);
    check_sums(f, p + (size_t)r * (size_t)f->tokens, tokens, row + (size_t)r * stride);
    fkv_spectrum_from_grid(sp, &kernels, grid + r * sp->grid, sp->grid, alone, sp->stride, 1,
                           f->scratch);
    assert_memory_equal(alone, row + (size_t)r * stride, stride * sizeof *row);
    guard_free(&guard);
    free(alone);
    free(row);
    free(p);
}

/* <tokens of bins a, p> = <a, bins of tokens p> for one random pair */
static void check_adjoint(const struct fixture *f) {
    const struct fkv_spectrum *sp = f->sp;
    struct guard guard;
    float *a = random_rows(f, 1), *grid = grid_alloc(f, 1, &guard), s[64];
    float *p = malloc((size_t)(f->tokens + PADDING) * sizeof *p);
    float *b = malloc((size_t)sp->stride * sizeof *b);
    double left = 0, right = 0, size_p = 0;

    random_fill(&rng, p, (size_t)f->tokens, 1);
    fkv_spectrum_to_grid(sp, &kernels, a, sp->stride, grid, sp->grid, 1, f->scratch);
    for (int64_t t = 0; t < f->tokens; t++) {
        if (t % 64 == 0)
            kernels.interpolate(s, 64, grid + t / sp->taps.cell, sp->grid, &sp->taps, 1);
        left += (double)s[t % 64] * (double)p[t];
        size_p += (double)p[t] * (double)p[t];
    }
    spread_all(f, p, f->tokens, 1, grid);
    fkv_spectrum_from_grid(sp, &kernels, grid, sp->grid, b, sp->stride, 1, f->scratch);
    for (int n = 0; n < sp->stride; n++)
        right += (double)a[n] * (double)b[n];
    compare("adjoint", (left - right) * (left - right),
            row_energy(sp, a) * (double)f->tokens * size_p, 1e-6);
    guard_free(&guard);
    free(a);
    free(b);
    free(p);
}

/* ---- the tests */

static const int64_t periods[] = {64,    65,    67,    96,    100,   127,   128,   129,   255,
                                  256,   257,   320,   511,   512,   513,   1000,  1021,  1023,
                                  1024,  1025,  3000,  4093,  4095,  4096,  4097,  9973,  12000,
                                  32767, 32768, 32769, 46340, 46341, 65535, 65536, 65537, 70000};

static void check_all(int64_t period, int bins, bool tables) {
    struct fixture f;

    fixture_init(&f, period, bins);
    if (tables) {
        check_sizes(&f, period, bins);
        check_weights(&f);
        check_basis(&f, 0);
        check_basis(&f, f.tokens - 64);
        check_ones(&f, 1);
        check_ones(&f, random_int(&rng, 1, f.tokens));
        check_ones(&f, f.tokens);
    }
    int rows = period * (int64_t)bins > 3000000 ? 2 : (int)random_int(&rng, 1, FKV_FFT_LANES);
    check_forward(&f, rows);
    check_backward(&f, rows, f.tokens);
    check_backward(&f, 1, random_int(&rng, 1, f.tokens));
    check_adjoint(&f);
    fixture_free(&f);
}

static void transforms(void **state) {
    static const int bins[] = {1, 2, 7, 64, 512};
    fkv_cpu_level level = *(const fkv_cpu_level *)*state;
    bool best = level == fkv_cpu_best_level();

    fkv_kernels_init(&kernels, level);
    for (int i = 0; i < LENGTH(periods); i++) {
        if (periods[i] > 5000 && (random_quick() || (!best && i % 4 != 0)))
            continue;
        for (int j = 0; j < LENGTH(bins); j++)
            check_all(periods[i], bins[j], best);
        if (periods[i] <= (best ? 4100 : 300))
            check_all(periods[i], (int)(periods[i] / 2 + 1), best);
    }
    for (int i = 0; i < (random_quick() ? 20 : 100); i++)
        check_all(random_int(&rng, 64, 3000), (int)random_int(&rng, 1, 800), best);
}

static void phases(void **state) {
    static const int64_t large[] = {64, 1021, 46341, 65537, (INT64_C(1) << 31) - 1};
    (void)state;

    for (int i = 0; i < LENGTH(large); i++) {
        struct fkv_spectrum *sp;
        allocations_left = 1000;
        assert_int_equal(
            fkv_spectrum_create(&heap, &kernels, large[i] < 1000000 ? large[i] : 1000003, 3, &sp),
            FKV_OK);
        for (int j = 0; j < 2000; j++) {
            int64_t n = random_int(&rng, 0, sp->period - 1),
                    t = random_int(&rng, 0, sp->period - 1);
            uint64_t at = (uint64_t)n * (uint64_t)t % (uint64_t)sp->period;
            double angle = 6.283185307179586476925 * (double)at / (double)sp->period, c, s;
            fkv_spectrum_phase(sp, n, t, &c, &s);
            near("cos", j, 0, c, cos(angle), 1e-14);
            near("sin", j, 0, s, sin(angle), 1e-14);
        }
        fkv_spectrum_destroy(&heap, sp);
    }
}

static void no_memory(void **state) {
    static const int64_t kinds[] = {64, 1021, 4096, 46341}; /* with and without chirp */
    (void)state;

    for (int i = 0; i < LENGTH(kinds); i++) {
        for (int n = 0;; n++) {
            struct fkv_spectrum *sp;
            allocations_left = n;
            fkv_status status = fkv_spectrum_create(&heap, &kernels, kinds[i], 64, &sp);
            if (status == FKV_OK) {
                assert_true(n > 0);
                fkv_spectrum_destroy(&heap, sp);
                break;
            }
            assert_int_equal(status, FKV_ERR_NOMEM);
            assert_null(sp);
            assert_int_equal(heap.live, 0);
        }
    }
}

static void limits(void **state) {
    struct fkv_spectrum *sp;
    (void)state;

    allocations_left = 1000;
    assert_int_equal(fkv_spectrum_create(&heap, &kernels, INT64_MAX, 512, &sp), FKV_ERR_LIMIT);
    assert_null(sp);
    assert_int_equal(fkv_spectrum_bytes(INT64_MAX, 512), 0);
    assert_int_equal(heap.live, 0);
}

int main(void) {
    static const char *const names[] = {"", "transforms reference", "transforms avx2",
                                        "transforms avx512"};
    static fkv_cpu_level levels[4];
    struct CMUnitTest tests[6] = {cmocka_unit_test(phases), cmocka_unit_test(no_memory),
                                  cmocka_unit_test(limits)};
    int n = 3;

    random_init(&rng, random_seed("test_spectrum", 2));
    fkv_kernels_init(&kernels, FKV_CPU_REFERENCE);
    for (fkv_cpu_level level = FKV_CPU_REFERENCE; level <= fkv_cpu_best_level(); level++) {
        levels[level] = level;
        tests[n++] = (struct CMUnitTest){
            .name = names[level], .test_func = transforms, .initial_state = &levels[level]};
    }
    return _cmocka_run_group_tests("spectrum", tests, (size_t)n, NULL, NULL);
}
