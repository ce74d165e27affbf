/* SPDX-License-Identifier: Apache-2.0 */
/* Random arguments of kernels in guarded memory, and how a wrong element is reported. */
#ifndef FKV_TESTS_ARRAYS_H
#define FKV_TESTS_ARRAYS_H

#include "guard.h"
#include "oracle.h"
#include "random.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define PADDING 15 /* elements behind an array that kernels may read */

static struct random rng;
static char where[200]; /* the case, for messages */

static inline void near(const char *what, int row, int column, double got, double want,
                        double bound) {
    if (!(fabs(got - want) <= bound))
        fail_msg("%s: %s[%d][%d] = %.9g, want %.9g +- %.3g", where, what, row, column, got, want,
                 bound);
}

/* ---- floats in rows with gaps of NaN */

struct matrix {
    struct guard guard;
    float *x;
    ptrdiff_t stride;
    int rows, columns;
};

static inline void matrix_init(struct matrix *m, int rows, int columns) {
    m->stride = columns + (random_chance(&rng, 0.5) ? random_int(&rng, 1, 19) : 0);
    m->rows = rows;
    m->columns = columns;
    size_t n = (size_t)((rows - 1) * m->stride + columns);
    m->x = guard_alloc(&m->guard, n * sizeof(float), PADDING * sizeof(float));
    for (int r = 0; r < rows; r++)
        random_fill(&rng, m->x + r * m->stride, (size_t)columns, 1);
}

static inline void matrix_copy(struct matrix *to, const struct matrix *from) {
    for (int r = 0; r < from->rows; r++)
        memcpy(to->x + r * to->stride, from->x + r * from->stride,
               (size_t)from->columns * sizeof(float));
}

static inline void matrix_check_gaps(const struct matrix *m) {
    for (int r = 0; r < m->rows - 1; r++) {
        const float *end = m->x + r * m->stride + m->columns;
        if (!guard_untouched(end, end + m->stride - m->columns))
            fail_msg("%s: wrote behind row %d", where, r);
    }
    if (!guard_intact(&m->guard))
        fail_msg("%s: wrote outside its array", where);
}

static inline void matrix_free(struct matrix *m) {
    guard_free(&m->guard);
}

/* ---- stored elements of any type and their values */

struct stored {
    struct guard guard;
    char *data;
    double *value;
    ptrdiff_t stride;
    fkv_dtype dtype;
};

static inline void stored_init(struct stored *s, fkv_dtype dtype, int rows, int columns,
                               ptrdiff_t stride) {
    size_t size = oracle_element_size(dtype);
    size_t n = rows > 0 ? (size_t)((rows - 1) * stride + columns) : 0;

    s->data = guard_alloc(&s->guard, n * size, PADDING * size);
    s->value = calloc(n + 1, sizeof *s->value);
    s->stride = stride;
    s->dtype = dtype;
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < columns; c++) {
            size_t at = (size_t)(r * stride + c);
            oracle_store(s->data + at * size, dtype, random_normal(&rng));
            s->value[at] = oracle_load(s->data + at * size, dtype);
        }
    }
}

static inline void stored_free(struct stored *s) {
    guard_free(&s->guard);
    free(s->value);
}

#endif /* FKV_TESTS_ARRAYS_H */
