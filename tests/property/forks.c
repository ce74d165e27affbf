/* SPDX-License-Identifier: Apache-2.0 */
#include "forks.h"

/* ---- the rules of the header, once more */

int64_t sinks(const struct config *c) {
    return config_sinks(c);
}

int64_t tiles_to_code(const struct config *c, int64_t tokens) {
    return config_coded(c, tokens) / 64;
}

int64_t coded_end(const struct config *c, int64_t tiles) {
    return tiles ? sinks(c) + 64 * tiles : 0;
}

/* The greatest length, no more than `tokens`, that a sequence with so many coded tiles can be cropped to. */
int64_t floor_of(const struct config *c, int64_t tiles, int64_t tokens) {
    if (tokens <= sinks(c) || tokens >= coded_end(c, tiles))
        return tokens;
    int64_t length = sinks(c);
    int64_t unit = c->calibrated ? c->codec.block : c->params.period / 64 * 64;
    while (length + unit <= tokens)
        length += unit;
    return length;
}

/* ---- small worlds */

struct config forks_draw(struct random *r, enum coding_kind kind) {
    struct config c = config_draw(r);

    c.layers = (int)random_int(r, 1, 2);
    c.kv_heads = (int)random_int(r, 1, 2);
    c.head_dim = 8 * (int)random_int(r, 1, 3);
    c.rope_dim = 0;
    c.positions = false; /* a token's position follows from its place */
    c.tokens = random_int(r, 1, 400);
    if (kind == KIND_FOURIER) {
        config_draw_fourier(r, &c);
        c.params.n_local = (int)random_int(r, 0, 70);
        c.params.period = random_int(r, 64, 260);
        c.params.bins = (int)random_int(r, 1, 20);
        c.tokens = sinks(&c) + c.params.n_local + random_int(r, 1, 500);
    }
    if (kind == KIND_CALIBRATED) {
        config_draw_calibrated(r, &c);
        c.codec.n_local = (int)random_int(r, 0, 70);
        c.tokens = sinks(&c) + c.codec.n_local + random_int(r, 1, 500);
    }
    return c;
}

fkv_sequence fork_of(struct world *w, fkv_sequence parent) {
    fkv_sequence child = -1;

    OK(fkv_sequence_fork(w->cache, parent, &child));
    CHECK(child >= 0 && child != parent);
    return child;
}

/* The allocator has what the cache and its sequences say. Replaces the plan, whose bytes are its own. */
void check_bytes(struct world *w, int64_t others) {
    fkv_stats all = world_stats(w, FKV_ALL_SEQUENCES);

    OK(fkv_plan_destroy(w->plan));
    w->plan = NULL;
    if (w->live - others != (int64_t)all.bytes)
        property_fail("%lld bytes live, %llu counted", (long long)(w->live - others),
                      (unsigned long long)all.bytes);
    CHECK(all.bytes == all.bytes_exact + all.bytes_kept + all.bytes_coefficients +
                           all.bytes_tables + all.bytes_blocks + all.bytes_scales);
    CHECK(all.bytes_shared <= all.bytes);
    OK(fkv_plan_create(w->cache, &w->plan));
}

/* Bytes that are not the cache's, with no plan. */
int64_t other_bytes(struct world *w) {
    OK(fkv_plan_destroy(w->plan));
    int64_t others = w->live - (int64_t)world_stats(w, FKV_ALL_SEQUENCES).bytes;
    OK(fkv_plan_create(w->cache, &w->plan));
    return others;
}

void same_stats(const fkv_stats *a, const fkv_stats *b, bool tables) {
    CHECK(a->tokens == b->tokens && a->tokens_exact == b->tokens_exact);
    CHECK(a->tokens_coded == b->tokens_coded && a->dense_bytes == b->dense_bytes);
    CHECK(a->bytes_exact == b->bytes_exact && a->bytes_kept == b->bytes_kept);
    CHECK(a->bytes_coefficients == b->bytes_coefficients);
    CHECK(a->bytes_blocks == b->bytes_blocks && a->bytes_scales == b->bytes_scales);
    CHECK(!tables || (a->bytes_tables == b->bytes_tables && a->bytes == b->bytes));
}

/* The same step on two sequences gives the same bits. */
void step_both(struct world *w, fkv_sequence a, fkv_sequence b, const struct stream *s,
               int64_t first, int64_t count) {
    struct outputs x, y;

    step_one(w, a, s, first, count, STEP_FUSED, &x);
    step_one(w, b, s, first, count, STEP_FUSED, &y);
    outputs_same(&x, 0, &y, 0, count, &w->config, "a fork's output");
    outputs_free(&x);
    outputs_free(&y);
}
