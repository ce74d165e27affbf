/* SPDX-License-Identifier: Apache-2.0 */
#include "property.h"

#include "guard.h"

/* ---- a tensor in guarded memory, laid out as the configuration wants */

struct box {
    fkv_tensor tensor;
    struct guard guard;
    int64_t tokens, heads, dim;
};

static void box_init(struct box *b, struct world *w, fkv_dtype dtype, int64_t tokens, int64_t heads,
                     int64_t dim) {
    int64_t size = (int64_t)oracle_element_size(dtype);
    int64_t shape[3] = {tokens, heads, dim};
    int64_t row = dim * size, gap = 0;
    fkv_tensor *t = &b->tensor;

    b->tokens = tokens;
    b->heads = heads;
    b->dim = dim;
    OK(fkv_tensor_init(t, b, dtype, dim == 1 ? 2 : 3, shape));
    if (w->config.strided)
        gap = size * random_int(&w->rng, 0, 5);
    t->strides[1] = dim == 1 ? row : row + gap; /* the last dimension is contiguous */
    t->strides[0] = heads * t->strides[1] + gap;
    if (dim > 1 && w->config.strided && random_chance(&w->rng, 0.5)) { /* [heads, tokens, D] */
        t->strides[0] = row + gap;
        t->strides[1] = tokens * t->strides[0] + gap;
    }
    int64_t bytes =
        tokens * heads == 0 ? 0 : (tokens - 1) * t->strides[0] + (heads - 1) * t->strides[1] + row;
    t->data = guard_alloc(&b->guard, (size_t)bytes, 0);
    t->byte_length = (uint64_t)bytes;
}

static char *box_at(const struct box *b, int64_t token, int64_t head, int64_t i) {
    int64_t size = (int64_t)oracle_element_size(b->tensor.dtype);

    return (char *)b->tensor.data + token * b->tensor.strides[0] + head * b->tensor.strides[1] +
           i * size;
}

static void box_write(struct box *b, int64_t first, int64_t count, const float *x) {
    for (int64_t t = first; t < first + count; t++) {
        for (int64_t h = 0; h < b->heads; h++) {
            for (int64_t i = 0; i < b->dim; i++)
                oracle_store(box_at(b, t, h, i), b->tensor.dtype, (double)*x++);
        }
    }
}

static bool box_untouched(const struct box *b) {
    return guard_intact(&b->guard) &&
           guard_untouched(b->guard.data, (char *)b->guard.data + b->guard.bytes);
}

/* Takes the elements out, and finds everything else as it was. */
static float *box_read(struct box *b) {
    size_t size = oracle_element_size(b->tensor.dtype);
    float *x = malloc((size_t)(b->tokens * b->heads * b->dim + 1) * sizeof *x), *to = x;

    for (int64_t t = 0; t < b->tokens; t++) {
        for (int64_t h = 0; h < b->heads; h++) {
            for (int64_t i = 0; i < b->dim; i++)
                *to++ = (float)oracle_load(box_at(b, t, h, i), b->tensor.dtype);
            guard_fill(box_at(b, t, h, 0), (size_t)b->dim * size);
        }
    }
    CHECK(box_untouched(b));
    return x;
}

/* ---- steps */

enum { Q, K, V, OUT, LSE, N_BOXES };

static void boxes_init(struct box *b, struct world *w, const struct part *parts, int count,
                       int layer, int64_t rows) {
    const struct config *c = &w->config;
    int64_t q_heads = c->kv_heads * c->group, dim = c->head_dim, at = 0;

    box_init(&b[Q], w, c->in, rows, q_heads, dim);
    box_init(&b[K], w, c->in, rows, c->kv_heads, dim);
    box_init(&b[V], w, c->in, rows, c->kv_heads, dim);
    box_init(&b[OUT], w, c->out, rows, q_heads, dim);
    box_init(&b[LSE], w, FKV_DTYPE_F32, rows, q_heads, 1);
    for (int i = 0; i < count; at += parts[i++].count) {
        const struct stream *s = parts[i].stream;
        int64_t n = parts[i].count, row = parts[i].first * dim;
        if (n == 0)
            continue;
        box_write(&b[Q], at, n, s->q[layer] + row * q_heads);
        box_write(&b[K], at, n, s->k[layer] + row * c->kv_heads);
        box_write(&b[V], at, n, s->v[layer] + row * c->kv_heads);
    }
}

static fkv_status update(struct world *w, const struct part *parts, int count, int64_t rows) {
    fkv_sequence ids[MAX_PARTS];
    int64_t n_new[MAX_PARTS];
    int64_t *positions = malloc((size_t)(rows + 1) * sizeof *positions), at = 0;
    fkv_batch batch;

    OK(fkv_batch_init(&batch, sizeof batch));
    for (int i = 0; i < count; i++) {
        ids[i] = parts[i].sequence;
        n_new[i] = parts[i].count;
        for (int64_t t = 0; t < parts[i].count; t++)
            positions[at++] = parts[i].stream->positions[parts[i].first + t];
    }
    batch.count = count;
    batch.sequences = ids;
    batch.n_new = n_new;
    if (w->config.positions) {
        batch.positions = positions;
        batch.positions_count = rows;
    }
    fkv_status status = fkv_plan_update(w->plan, &batch);
    free(positions);
    return status;
}

static fkv_status run(struct world *w, int layer, struct box *b, enum step_mode mode) {
    const fkv_tensor *q = &b[Q].tensor, *k = &b[K].tensor, *v = &b[V].tensor;
    const fkv_tensor *out = &b[OUT].tensor, *lse = &b[LSE].tensor;
    fkv_status status = FKV_OK;

    if (mode == STEP_FUSED)
        return fkv_append_attend(w->plan, layer, q, k, v, out, lse);
    if (mode != STEP_ATTEND)
        status = fkv_append(w->plan, layer, k, v);
    if (mode != STEP_APPEND && status == FKV_OK)
        status = fkv_attend(w->plan, layer, q, out, lse);
    return status;
}

fkv_status step_try(struct world *w, const struct part *parts, int count, enum step_mode mode,
                    struct outputs *o) {
    struct box b[N_BOXES];
    int64_t rows = 0;

    for (int i = 0; i < count; i++)
        rows += parts[i].count;
    if (o) {
        memset(o, 0, sizeof *o);
        o->rows = rows;
    }
    fkv_status status = update(w, parts, count, rows);
    for (int layer = w->first_layer; layer < w->config.layers && status == FKV_OK; layer++) {
        boxes_init(b, w, parts, count, layer, rows);
        status = run(w, layer, b, mode);
        if (status != FKV_OK || mode == STEP_APPEND)
            CHECK(box_untouched(&b[OUT]) && box_untouched(&b[LSE]));
        else {
            float *out = box_read(&b[OUT]), *lse = box_read(&b[LSE]);
            if (o) {
                o->out[layer] = out;
                o->lse[layer] = lse;
            } else {
                free(out);
                free(lse);
            }
        }
        for (int i = 0; i < N_BOXES; i++)
            guard_free(&b[i].guard);
    }
    if (status != FKV_OK && o) {
        outputs_free(o);
        memset(o, 0, sizeof *o);
    }
    return status;
}

void step_one(struct world *w, fkv_sequence sequence, const struct stream *s, int64_t first,
              int64_t count, enum step_mode mode, struct outputs *o) {
    struct part part = {sequence, s, first, count};

    fkv_status status = step_try(w, &part, 1, mode, o);
    if (status != FKV_OK) {
        char text[300] = "";
        fkv_context_message(w->ctx, text, sizeof text, NULL);
        property_fail("step of tokens %lld + %lld: %s: %s", (long long)first, (long long)count,
                      fkv_status_string(status), text);
    }
}

void outputs_free(struct outputs *o) {
    for (int layer = 0; layer < MAX_LAYERS; layer++) {
        free(o->out[layer]);
        free(o->lse[layer]);
    }
}

static float *joined(float *a, size_t na, const float *b, size_t nb) {
    float *x = realloc(a, (na + nb + 1) * sizeof *x);

    memcpy(x + na, b, nb * sizeof *x);
    return x;
}

void outputs_append(struct outputs *a, const struct outputs *b, const struct config *c) {
    size_t heads = (size_t)(c->kv_heads * c->group), row = heads * (size_t)c->head_dim;
    size_t na = (size_t)a->rows, nb = (size_t)b->rows;

    for (int layer = 0; layer < c->layers; layer++) {
        if (!b->out[layer])
            continue;
        a->out[layer] = joined(a->out[layer], na * row, b->out[layer], nb * row);
        a->lse[layer] = joined(a->lse[layer], na * heads, b->lse[layer], nb * heads);
    }
    a->rows += b->rows;
}

void outputs_same(const struct outputs *a, int64_t a_row, const struct outputs *b, int64_t b_row,
                  int64_t rows, const struct config *c, const char *what) {
    size_t heads = (size_t)(c->kv_heads * c->group), dim = (size_t)c->head_dim;

    for (int layer = 0; layer < c->layers; layer++) {
        for (int64_t i = 0; i < rows; i++) {
            size_t x = (size_t)(a_row + i) * heads, y = (size_t)(b_row + i) * heads;
            for (size_t h = 0; h < heads; h++) {
                if (memcmp(a->out[layer] + (x + h) * dim, b->out[layer] + (y + h) * dim,
                           dim * sizeof(float)) != 0 ||
                    memcmp(a->lse[layer] + x + h, b->lse[layer] + y + h, sizeof(float)) != 0)
                    property_fail("%s: layer %d row %lld head %zu differs (%g, %g)", what, layer,
                                  (long long)i, h, (double)a->out[layer][(x + h) * dim],
                                  (double)b->out[layer][(y + h) * dim]);
            }
        }
    }
}

void feed(struct world *w, fkv_sequence sequence, const struct stream *s, int64_t pieces,
          enum step_mode mode, struct outputs *o) {
    struct outputs part;

    if (o)
        memset(o, 0, sizeof *o);
    for (int64_t at = 0; at < s->n;) {
        int64_t left = s->n - at, n = pieces == 0 ? left : pieces == 1 ? 1 : 0;
        if (n == 0) {
            int64_t most = random_chance(&w->rng, 0.5) ? 3 : 1 + 2 * s->n / pieces;
            n = random_int(&w->rng, 0, most);
            n = n < left ? n : left;
        }
        step_one(w, sequence, s, at, n, mode, o ? &part : NULL);
        if (o) {
            outputs_append(o, &part, &w->config);
            outputs_free(&part);
        }
        at += n;
    }
}

/* ---- what is held */

static double *widened(float *x, size_t n) {
    double *y = malloc((n + 1) * sizeof *y);

    for (size_t i = 0; i < n; i++)
        y[i] = (double)x[i];
    free(x);
    return y;
}

void held_read(struct held *h, struct world *w, fkv_sequence sequence, int layer, int64_t first,
               int64_t count) {
    const struct config *c = &w->config;
    size_t n = (size_t)count * (size_t)c->kv_heads * (size_t)c->head_dim;
    struct box k, v;

    box_init(&k, w, FKV_DTYPE_F32, count, c->kv_heads, c->head_dim);
    box_init(&v, w, FKV_DTYPE_F32, count, c->kv_heads, c->head_dim);
    OK(fkv_sequence_read(w->cache, sequence, layer, first, count, &k.tensor, &v.tensor));
    h->n = count;
    h->k = widened(box_read(&k), n);
    h->v = widened(box_read(&v), n);
    guard_free(&k.guard);
    guard_free(&v.guard);
}

void held_free(struct held *h) {
    free(h->k);
    free(h->v);
}

void held_same(struct world *a, fkv_sequence x, struct world *b, fkv_sequence y, int64_t count) {
    const struct config *c = &a->config;
    size_t n = (size_t)count * (size_t)c->kv_heads * (size_t)c->head_dim;
    struct held p, q;

    for (int layer = 0; layer < c->layers; layer++) {
        held_read(&p, a, x, layer, 0, count);
        held_read(&q, b, y, layer, 0, count);
        for (size_t i = 0; i < n; i++) {
            if (memcmp(&p.k[i], &q.k[i], 8) != 0 || memcmp(&p.v[i], &q.v[i], 8) != 0)
                property_fail("layer %d token %zu element %zu is held as (%g, %g) and (%g, %g)",
                              layer, i / (n / (size_t)count), i % (n / (size_t)count), p.k[i],
                              p.v[i], q.k[i], q.v[i]);
        }
        held_free(&p);
        held_free(&q);
    }
}

/* ---- the oracle's word */

static int64_t checked, counted;

double checks_that_count(void) {
    return checked ? (double)counted / (double)checked : 0;
}

static void check_row(const struct world *w, int layer, const struct held *h,
                      const struct stream *s, int64_t token, int64_t visible,
                      const struct outputs *o, int64_t row) {
    const struct config *c = &w->config;
    int heads = c->kv_heads * c->group, dim = c->head_dim;
    int64_t stride = (int64_t)c->kv_heads * dim;
    double q[FKV_MAX_HEAD_DIM], want[FKV_MAX_HEAD_DIM];

    for (int head = 0; head < heads; head++) {
        int64_t kv = (int64_t)(head / c->group) * dim, at = row * heads + head;
        for (int d = 0; d < dim; d++)
            q[d] = (double)s->q[layer][(token * heads + head) * dim + d];
        oracle_rope(&w->model, s->positions[token], q);
        struct oracle_row r = oracle_attend(q, h->k + kv, h->v + kv, visible, stride, dim,
                                            oracle_scale(&w->model), want);
        for (int d = 0; d < dim; d++) {
            double got = (double)o->out[layer][at * dim + d];
            double bound = oracle_tolerance(&r, want[d], c->out);
            if (!(fabs(got - want[d]) <= bound))
                property_fail(
                    "layer %d token %lld of %lld visible, head %d, channel %d: %.9g, want "
                    "%.9g +- %.2g (max score %.3g)",
                    layer, (long long)token, (long long)visible, head, d, got, want[d], bound,
                    r.max_score);
        }
        double lse = (double)o->lse[layer][at], bound = 16 * 0x1p-23 * (1 + fabs(r.max_score));
        if (visible == 0 ? lse != -INFINITY : !(fabs(lse - r.lse) <= bound))
            property_fail("layer %d token %lld head %d: lse %.9g, want %.9g +- %.2g", layer,
                          (long long)token, head, lse, r.lse, bound);
        checked++;
        counted += oracle_row_counts(&r, want, dim);
    }
}

void check_attention(const struct world *w, int layer, const struct held *h, const struct stream *s,
                     int64_t first, int64_t count, int64_t past, bool causal,
                     const struct outputs *o, int64_t o_row) {
    int64_t step = 1 + count / 6;

    for (int64_t i = 0; i < count; i = i + 1 < count && i + step >= count ? count - 1 : i + step) {
        int64_t visible = past + (causal ? i + 1 : 0);
        CHECK(visible <= h->n);
        check_row(w, layer, h, s, first + i, visible, o, o_row + i);
    }
}
