/* SPDX-License-Identifier: Apache-2.0 */
/* Rows of RoPE's sines: right to a rounding of f32 at every position, and a function of the position alone. */
#include "codec/rope.h"
#include "random.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct random rng;

struct setup {
    struct fkv_ctx *ctx;
    struct fkv_profile_object profile;
    double inv_freq[FKV_MAX_PAIRS];
};

static void begin(struct setup *s, int pairs, double theta, double scaling) {
    fkv_context_params params;
    memset(s, 0, sizeof *s);
    assert_int_equal(fkv_context_params_init(&params, sizeof params), FKV_OK);
    params.threads = 1;
    assert_int_equal(fkv_ctx_create(&params, &s->ctx), FKV_OK);
    for (int j = 0; j < pairs; j++)
        s->inv_freq[j] = pow(theta, -1.0 * j / pairs);
    s->profile.model.rope_dim = 2 * pairs;
    s->profile.model.rope_scaling = scaling;
    s->profile.model.inv_freq = s->inv_freq;
    assert_int_equal(fkv_angles_create(s->ctx, &s->profile.model, &s->profile.angles), FKV_OK);
}

static void end(struct setup *s) {
    fkv_angles_destroy(s->ctx, &s->profile.model, s->profile.angles);
    fkv_ctx_unref(s->ctx);
}

static int64_t draw_position(void) {
    switch (random_int(&rng, 0, 3)) {
    case 0:
        return random_int(&rng, 0, 200);
    case 1:
        return 64 * random_int(&rng, 0, 1 << 20) + random_int(&rng, -1, 1);
    case 2:
        return random_int(&rng, 0, 1 << 20);
    default:
        return random_int(&rng, 0, INT32_MAX);
    }
}

static void near(float got, long double want) {
    const double error = fabs((double)((long double)got - want));
    if (!(error <= fabs((double)want) * 0x1p-24 + 1e-9))
        fail_msg("%.9g, want %.12Lg", (double)got, want);
}

static void rows_are_right(void **state) {
    (void)state;
    static const struct {
        int pairs;
        double theta, scaling;
    } models[] = {{64, 500000, 1}, {1, 1, 1}, {13, 10000, 1.25}, {128, 1e6, 0.75}};
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        struct setup s;
        struct fkv_rope_rows rows;
        float c[FKV_MAX_PAIRS], sine[FKV_MAX_PAIRS];
        begin(&s, models[i].pairs, models[i].theta, models[i].scaling);
        fkv_rope_begin(&rows, &s.profile);
        for (int n = 0; n < 2000; n++) {
            const int64_t position = fkv_max64(draw_position(), 0);
            fkv_rope_row(&rows, position, c, sine);
            for (int j = 0; j < models[i].pairs; j++) {
                const long double angle = (long double)position * (long double)s.inv_freq[j];
                near(c[j], cosl(angle) * (long double)models[i].scaling);
                near(sine[j], sinl(angle) * (long double)models[i].scaling);
            }
        }
        end(&s);
    }
}

/* Whatever came before: the same bits, on which the independence of splits rests. */
static void rows_have_no_past(void **state) {
    (void)state;
    enum { PAIRS = 64 };
    struct setup s;
    struct fkv_rope_rows rows, fresh;
    float c[2][PAIRS], sine[2][PAIRS];
    begin(&s, PAIRS, 500000, 1.1);
    fkv_rope_begin(&rows, &s.profile);
    for (int n = 0; n < 3000; n++) {
        const int64_t position = n % 3 ? n : fkv_max64(draw_position(), 0);
        fkv_rope_row(&rows, position, c[0], sine[0]);
        fkv_rope_begin(&fresh, &s.profile);
        fkv_rope_row(&fresh, position, c[1], sine[1]);
        assert_memory_equal(c[0], c[1], sizeof c[0]);
        assert_memory_equal(sine[0], sine[1], sizeof sine[0]);
    }
    end(&s);
}

static void without_rope(void **state) {
    (void)state;
    struct setup s;
    begin(&s, 0, 1, 1);
    assert_null(s.profile.angles);
    end(&s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_are_right),
        cmocka_unit_test(rows_have_no_past),
        cmocka_unit_test(without_rope),
    };
    random_init(&rng, random_seed("test_rope", 3));
    return cmocka_run_group_tests_name("rope", tests, NULL, NULL);
}
