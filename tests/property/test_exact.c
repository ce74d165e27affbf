/* SPDX-License-Identifier: Apache-2.0 */
/* Exact profiles: attention is dense attention over the stored values, however the tokens came in. */
#include "property.h"

static struct random rng;

static int runs(int full) {
    return random_quick() ? (full + 7) / 8 : full;
}

/* ---- what is stored, and attention over it */

static double distance(double got, double want, double slack, fkv_dtype storage) {
    return fabs(got - want) - slack - oracle_half_ulp(fabs(want) + slack, storage);
}

/* Stored values are the given ones, keys rotated, rounded to the storage type. */
static void check_stored(const struct world *w, int layer, const struct held *h,
                         const struct stream *s) {
    const struct config *c = &w->config;
    int dim = c->head_dim;
    double x[FKV_MAX_HEAD_DIM];

    for (int64_t row = 0; row < h->n * c->kv_heads; row++) {
        const float *k = s->k[layer] + row * dim, *v = s->v[layer] + row * dim;
        double largest = 0;
        for (int d = 0; d < dim; d++) {
            x[d] = (double)k[d];
            largest = fmax(largest, fabs(x[d]));
            CHECK(h->v[row * dim + d] == oracle_round((double)v[d], c->storage));
        }
        oracle_rope(&w->model, s->positions[row / c->kv_heads], x);
        /* two products of f32 numbers, their sum, and two rounded factors */
        double slack = c->rope == FKV_ROPE_NONE ? 0 : 4 * 0x1p-23 * largest * 1.5;
        for (int d = 0; d < dim; d++)
            CHECK(distance(h->k[row * dim + d], x[d], slack, c->storage) <= 0);
    }
}

static void dense(const struct config *c) {
    struct world w;
    struct stream s;
    struct outputs o;
    struct held h;

    world_open(&w, c);
    stream_init(&s, c, 1, c->tokens);
    fkv_sequence id = world_sequence(&w);
    for (int64_t at = 0; at < s.n;) {
        int64_t n = at == 0 ? random_int(&w.rng, 1, s.n) : random_int(&w.rng, 0, 3);
        n = n < s.n - at ? n : s.n - at;
        enum step_mode mode = random_chance(&w.rng, 0.7) ? STEP_FUSED : STEP_APPEND_ATTEND;
        step_one(&w, id, &s, at, n, mode, &o);
        for (int layer = 0; layer < c->layers && (at == 0 || at + n == s.n); layer++) {
            held_read(&h, &w, id, layer, 0, at + n);
            check_stored(&w, layer, &h, &s);
            check_attention(&w, layer, &h, &s, at, n, at, true, &o, 0);
            held_free(&h);
        }
        outputs_free(&o);
        at += n;
    }
    int64_t length = -1;
    OK(fkv_sequence_length(w.cache, id, &length));
    CHECK(length == s.n);
    stream_free(&s);
    world_close(&w);
}

static void dense_attention(void **state) {
    (void)state;
    for (int i = 0; i < runs(160); i++) {
        struct config c = config_draw(&rng);
        property_run("dense", dense, &c);
    }
    assert_true(checks_that_count() > 0.5);
}

static void lengths(void **state) {
    static const int64_t edges[] = {1,   2,   3,   31,  32,  33,   63,   64,   65,  127,
                                    128, 129, 191, 192, 193, 1023, 1024, 1025, 2049};
    (void)state;

    for (fkv_cpu_level level = FKV_CPU_REFERENCE; level <= config_best_level(); level++) {
        for (int i = 0; i < LENGTH(edges); i++) {
            struct config c = config_draw(&rng);
            c.level = level;
            c.head_dim = 8 * (int)random_int(&rng, 1, 4);
            c.rope_dim = 0;
            c.group = (int)random_int(&rng, 1, 3);
            c.tokens = edges[i];
            property_run("lengths", dense, &c);
        }
    }
}

/* ---- the same tokens in other pieces */

static void splits(const struct config *c) {
    struct world w;
    struct stream s;
    struct outputs whole, o;

    world_open(&w, c);
    stream_init(&s, c, 1, c->tokens);
    fkv_sequence bulk = world_sequence(&w);
    feed(&w, bulk, &s, 0, STEP_FUSED, &whole);
    for (int64_t pieces = 1; pieces < 16; pieces += 7) {
        fkv_sequence id = world_sequence(&w);
        feed(&w, id, &s, pieces, pieces > 8 ? STEP_APPEND_ATTEND : STEP_FUSED, &o);
        outputs_same(&whole, 0, &o, 0, s.n, c, "pieces");
        held_same(&w, bulk, &w, id, s.n);
        outputs_free(&o);
        CHECK(world_stats(&w, id).bytes == world_stats(&w, bulk).bytes);
        OK(fkv_sequence_free(w.cache, id));
    }
    outputs_free(&whole);
    stream_free(&s);
    world_close(&w);
}

static void any_split(void **state) {
    (void)state;
    for (int i = 0; i < runs(48); i++) {
        struct config c = config_draw(&rng);
        property_run("splits", splits, &c);
    }
    for (int i = 0; i < runs(6); i++) {
        struct config c = config_draw(&rng);
        c.head_dim = 16;
        c.rope_dim = 0;
        c.layers = c.kv_heads = 1;
        c.tokens = random_int(&rng, 1000, 2200);
        property_run("long splits", splits, &c);
    }
}

/* ---- heads */

static float *heads_copied(const float *x, int64_t tokens, int from_heads, const int *map,
                           int to_heads, int dim) {
    float *y = malloc((size_t)(tokens * to_heads * dim + 1) * sizeof *y);

    for (int64_t t = 0; t < tokens; t++) {
        for (int h = 0; h < to_heads; h++)
            memcpy(y + (t * to_heads + h) * dim, x + (t * from_heads + map[h]) * dim,
                   (size_t)dim * sizeof *y);
    }
    return y;
}

/* Outputs of a world of configuration `c` with heads taken from those of `base` by the two maps. */
static struct outputs mapped_run(const struct config *c, const struct stream *base, int q_heads,
                                 int kv_heads, const int *q_map, const int *kv_map) {
    struct world w;
    struct stream s = *base;
    struct outputs o;

    for (int layer = 0; layer < c->layers; layer++) {
        s.q[layer] =
            heads_copied(base->q[layer], s.n, q_heads, q_map, c->kv_heads * c->group, c->head_dim);
        s.k[layer] = heads_copied(base->k[layer], s.n, kv_heads, kv_map, c->kv_heads, c->head_dim);
        s.v[layer] = heads_copied(base->v[layer], s.n, kv_heads, kv_map, c->kv_heads, c->head_dim);
    }
    world_open(&w, c);
    feed(&w, world_sequence(&w), &s, 4, STEP_FUSED, &o);
    world_close(&w);
    for (int layer = 0; layer < c->layers; layer++) {
        free(s.q[layer]);
        free(s.k[layer]);
        free(s.v[layer]);
    }
    return o;
}

static void same_heads(const struct config *c, const struct outputs *a, const struct outputs *b,
                       const int *q_map) {
    int heads = c->kv_heads * c->group, dim = c->head_dim;

    for (int layer = 0; layer < c->layers; layer++) {
        for (int64_t t = 0; t < a->rows; t++) {
            for (int h = 0; h < heads; h++) {
                const float *x = a->out[layer] + (t * heads + q_map[h]) * dim;
                const float *y = b->out[layer] + (t * heads + h) * dim;
                CHECK(memcmp(x, y, (size_t)dim * sizeof *x) == 0);
                CHECK(memcmp(a->lse[layer] + t * heads + q_map[h], b->lse[layer] + t * heads + h,
                             sizeof *x) == 0);
            }
        }
    }
}

static void heads(const struct config *c) {
    int q_heads = c->kv_heads * c->group, q_map[64], kv_map[64];
    struct config repeated = *c;
    struct stream s;
    struct outputs plain, other;

    stream_init(&s, c, 1, c->tokens);
    for (int h = 0; h < 64; h++)
        q_map[h] = kv_map[h] = h;
    plain = mapped_run(c, &s, q_heads, c->kv_heads, q_map, kv_map);

    /* every query head with a KV head of its own */
    repeated.kv_heads = q_heads;
    repeated.group = 1;
    for (int h = 0; h < q_heads; h++)
        kv_map[h] = h / c->group;
    other = mapped_run(&repeated, &s, q_heads, c->kv_heads, q_map, kv_map);
    same_heads(c, &plain, &other, q_map);
    outputs_free(&other);

    /* KV heads rotated by one, query heads with them and reversed within their group */
    for (int h = 0; h < c->kv_heads; h++) {
        kv_map[h] = (h + 1) % c->kv_heads;
        for (int g = 0; g < c->group; g++)
            q_map[h * c->group + g] = kv_map[h] * c->group + c->group - 1 - g;
    }
    other = mapped_run(c, &s, q_heads, c->kv_heads, q_map, kv_map);
    same_heads(c, &plain, &other, q_map);
    outputs_free(&other);
    outputs_free(&plain);
    stream_free(&s);
}

static void head_maps(void **state) {
    (void)state;
    for (int i = 0; i < runs(48); i++) {
        struct config c = config_draw(&rng);
        property_run("heads", heads, &c);
    }
}

/* ---- values */

static void transform_values(struct stream *s, const struct config *c, double a,
                             const struct stream *x, double b, const struct stream *y,
                             double constant) {
    int64_t n = s->n * c->kv_heads * c->head_dim;

    for (int layer = 0; layer < c->layers; layer++) {
        for (int64_t i = 0; i < n; i++)
            s->v[layer][i] = (float)(constant + (x ? a * (double)x->v[layer][i] : 0) +
                                     (y ? b * (double)y->v[layer][i] : 0));
    }
}

static struct outputs plain_run(const struct config *c, const struct stream *s) {
    struct world w;
    struct outputs o;

    world_open(&w, c);
    feed(&w, world_sequence(&w), s, 3, STEP_FUSED, &o);
    world_close(&w);
    return o;
}

static void linear(const struct config *c) {
    struct stream x, y, s;
    int64_t n = c->tokens * c->kv_heads * c->group * c->head_dim;

    stream_init(&x, c, 1, c->tokens);
    stream_init(&y, c, 1, c->tokens);
    stream_init(&s, c, 1, c->tokens);
    struct stream other;
    stream_init(&other, c, 2, c->tokens);
    transform_values(&y, c, 1, &other, 0, NULL,
                     0); /* y: the queries and keys of x, values of its own */
    transform_values(&s, c, 0.75, &x, -1.5, &y, 0);
    struct outputs ox = plain_run(c, &x), oy = plain_run(c, &y), os = plain_run(c, &s);
    transform_values(&s, c, 0, NULL, 0, NULL, 0.3);
    struct outputs constant = plain_run(c, &s);
    for (int layer = 0; layer < c->layers; layer++) {
        for (int64_t i = 0; i < n; i++) {
            double want = 0.75 * (double)ox.out[layer][i] - 1.5 * (double)oy.out[layer][i];
            CHECK(fabs((double)os.out[layer][i] - want) <= 1e-5);
            CHECK(fabs((double)constant.out[layer][i] - (double)(float)0.3) <= 1e-6);
        }
        CHECK(memcmp(ox.lse[layer], os.lse[layer],
                     (size_t)(c->tokens * c->kv_heads * c->group) * sizeof(float)) == 0);
    }
    struct outputs *all[] = {&ox, &oy, &os, &constant};
    struct stream *streams[] = {&x, &y, &s, &other};
    for (int i = 0; i < 4; i++) {
        outputs_free(all[i]);
        stream_free(streams[i]);
    }
}

static void linear_in_values(void **state) {
    (void)state;
    for (int i = 0; i < runs(24); i++) {
        struct config c = config_draw(&rng);
        c.storage = c.in = c.out = FKV_DTYPE_F32;
        property_run("linear", linear, &c);
    }
}

/* ---- keys: one vector added to all leaves the weights, zero queries see the mean */

static void keys(const struct config *c) {
    struct stream s, moved;
    struct random r;
    int64_t row = (int64_t)c->kv_heads * c->head_dim, heads = (int64_t)c->kv_heads * c->group;

    random_init(&r, c->seed + 3);
    stream_init(&s, c, 1, c->tokens);
    stream_init(&moved, c, 1, c->tokens);
    for (int64_t i = 0; i < row; i++) {
        float shift = (float)random_normal(&r);
        for (int64_t t = 0; t < c->tokens; t++)
            moved.k[0][t * row + i] += shift;
    }
    struct outputs a = plain_run(c, &s), b = plain_run(c, &moved);
    for (int64_t i = 0; i < c->tokens * heads * c->head_dim; i++)
        CHECK(fabs((double)a.out[0][i] - (double)b.out[0][i]) <= 2e-5 * 5);
    outputs_free(&b);

    memset(s.q[0], 0, (size_t)(c->tokens * heads * c->head_dim) * sizeof(float));
    b = plain_run(c, &s);
    for (int h = 0; h < heads; h++) {
        for (int d = 0; d < c->head_dim; d++) {
            double sum = 0;
            for (int64_t t = 0; t < c->tokens; t++) {
                sum += (double)s.v[0][t * row + h / c->group * c->head_dim + d];
                double got = (double)b.out[0][(t * heads + h) * c->head_dim + d];
                CHECK(fabs(got - sum / (double)(t + 1)) <= 1e-5);
            }
        }
    }
    outputs_free(&a);
    outputs_free(&b);
    stream_free(&s);
    stream_free(&moved);
}

static void moved_keys(void **state) {
    (void)state;
    for (int i = 0; i < runs(24); i++) {
        struct config c = config_draw(&rng);
        c.storage = c.in = c.out = FKV_DTYPE_F32;
        c.rope = FKV_ROPE_NONE;
        c.rope_dim = 0;
        c.layers = 1;
        property_run("keys", keys, &c);
    }
}

/* ---- empty and single */

static void smallest(const struct config *c) {
    struct world w;
    struct stream s;
    struct outputs o;
    int64_t heads = (int64_t)c->kv_heads * c->group;

    world_open(&w, c);
    stream_init(&s, c, 1, 2);
    fkv_sequence id = world_sequence(&w);
    step_one(&w, id, &s, 0, 2, STEP_ATTEND, &o);
    for (int64_t i = 0; i < 2 * heads; i++) {
        CHECK(o.lse[0][i] == -INFINITY);
        for (int d = 0; d < c->head_dim; d++)
            CHECK(o.out[0][i * c->head_dim + d] == 0);
    }
    outputs_free(&o);
    step_one(&w, id, &s, 0, 1, STEP_FUSED, &o);
    for (int64_t h = 0; h < heads; h++) {
        for (int d = 0; d < c->head_dim; d++) {
            double v = oracle_round((double)s.v[0][h / c->group * c->head_dim + d], c->storage);
            CHECK((double)o.out[0][h * c->head_dim + d] == oracle_round(v, c->out));
        }
    }
    outputs_free(&o);
    step_one(&w, id, &s, 1, 0, STEP_FUSED, NULL);
    CHECK(step_try(&w, NULL, 0, STEP_FUSED, NULL) == FKV_OK);
    stream_free(&s);
    world_close(&w);
}

static void empty_and_single(void **state) {
    (void)state;
    for (int i = 0; i < runs(40); i++) {
        struct config c = config_draw(&rng);
        c.tokens = 2;
        property_run("smallest", smallest, &c);
    }
}

/* ---- merging: what came before and the new tokens, attended apart */

static void merge_calls(struct world *w, struct outputs *past, struct outputs *own, int layer) {
    const struct config *c = &w->config;
    int64_t heads = (int64_t)c->kv_heads * c->group;
    int64_t shape[3] = {past->rows, heads, c->head_dim};
    fkv_tensor out_a, lse_a, out_b, lse_b;

    OK(fkv_tensor_init(&out_a, past->out[layer], FKV_DTYPE_F32, 3, shape));
    OK(fkv_tensor_init(&out_b, own->out[layer], FKV_DTYPE_F32, 3, shape));
    OK(fkv_tensor_init(&lse_a, past->lse[layer], FKV_DTYPE_F32, 2, shape));
    OK(fkv_tensor_init(&lse_b, own->lse[layer], FKV_DTYPE_F32, 2, shape));
    OK(fkv_merge(w->ctx, &out_a, &lse_a, &out_b, &lse_b));
}

static void merge(const struct config *c) {
    struct world w;
    struct stream s;
    struct outputs past, own, whole;
    struct held h;

    world_open(&w, c);
    stream_init(&s, c, 1, c->tokens);
    fkv_sequence id = world_sequence(&w), apart = world_sequence(&w);
    int64_t before = random_int(&w.rng, 0, s.n), n = s.n - before;
    step_one(&w, id, &s, 0, before, STEP_APPEND, NULL);
    step_one(&w, id, &s, before, n, STEP_ATTEND, &past);
    step_one(&w, id, &s, before, n, STEP_FUSED, &whole);
    step_one(&w, apart, &s, before, n, STEP_FUSED, &own);
    for (int layer = 0; layer < c->layers; layer++) {
        held_read(&h, &w, id, layer, 0, s.n);
        check_attention(&w, layer, &h, &s, before, n, before, false, &past, 0);
        merge_calls(&w, &past, &own, layer);
        check_attention(&w, layer, &h, &s, before, n, before, true, &past, 0);
        check_attention(&w, layer, &h, &s, before, n, before, true, &whole, 0);
        held_free(&h);
    }
    outputs_free(&past);
    outputs_free(&own);
    outputs_free(&whole);
    stream_free(&s);
    world_close(&w);
}

static void merge_of_a_split(void **state) {
    (void)state;
    for (int i = 0; i < runs(60); i++) {
        struct config c = config_draw(&rng);
        c.out = FKV_DTYPE_F32;
        c.positions = true; /* the part on its own keeps the positions it has in the whole */
        property_run("merge", merge, &c);
    }
}

/* ---- extreme values */

static void extremes(const struct config *c) {
    static const float values[] = {0,        65504,     -65504, 0x1p-24f, -0x1p-24f,
                                   0x1p-14f, 0x1p-140f, 1,      -0.0f,    65000};
    struct world w;
    struct stream s;
    struct outputs o;
    int64_t n = c->tokens * c->kv_heads * c->head_dim, stride = c->kv_heads * c->head_dim;

    world_open(&w, c);
    stream_init(&s, c, 1, c->tokens);
    for (int64_t i = 0; i < n; i++) {
        float x = values[i % stride % LENGTH(values)];
        x = i % stride % 3 == 0 && i / stride % 2 ? -x
                                                  : x; /* alternating, at every third channel */
        s.k[0][i] = (float)oracle_round((double)x * 0.7, c->storage);
        s.v[0][i] = (float)oracle_round((double)x, c->storage);
    }
    feed(&w, world_sequence(&w), &s, 3, STEP_FUSED, &o);
    for (int64_t i = 0; i < c->tokens * c->group * stride; i++) {
        int64_t channel = i % (c->group * stride);
        channel = channel / (c->group * c->head_dim) * c->head_dim + channel % c->head_dim;
        float limit = fabsf(values[channel % LENGTH(values)]);
        CHECK(isfinite(o.out[0][i]) && isfinite(o.lse[0][i / c->head_dim]));
        CHECK(fabsf(o.out[0][i]) <= limit * 1.00001f + 0x1p-126f);
    }
    outputs_free(&o);
    stream_free(&s);
    world_close(&w);
}

static void extreme_values(void **state) {
    (void)state;
    for (int i = 0; i < runs(40); i++) {
        struct config c = config_draw(&rng);
        c.in = c.out = FKV_DTYPE_F32;
        c.storage = i % 2 ? FKV_DTYPE_F16 : FKV_DTYPE_F32;
        c.layers = 1;
        c.rope_scaling = 0;
        property_run("extremes", extremes, &c);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dense_attention),  cmocka_unit_test(lengths),
        cmocka_unit_test(any_split),        cmocka_unit_test(head_maps),
        cmocka_unit_test(linear_in_values), cmocka_unit_test(moved_keys),
        cmocka_unit_test(empty_and_single), cmocka_unit_test(merge_of_a_split),
        cmocka_unit_test(extreme_values)};

    random_init(&rng, random_seed("test_exact", 3));
    return cmocka_run_group_tests_name("exact", tests, NULL, NULL);
}
