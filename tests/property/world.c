/* SPDX-License-Identifier: Apache-2.0 */
#include "property.h"

#include <inttypes.h>

/* ---- running and shrinking */

static jmp_buf failed;
static char reason[400];

void property_fail(const char *format, ...) {
    va_list args;

    va_start(args, format);
    vsnprintf(reason, sizeof reason, format, args);
    va_end(args);
    longjmp(failed, 1);
}

static bool attempt(property_fn property, const struct config *c) {
    if (setjmp(failed))
        return false;
    property(c);
    return true;
}

/* Proposals for something smaller; false when there are no more. */
static bool smaller(struct config *c, int proposal) {
    switch (proposal) {
    case 0:
        c->tokens /= 2;
        return true;
    case 1:
        c->tokens = c->tokens * 7 / 8;
        return true;
    case 2:
        c->tokens -= 1;
        return true;
    case 3:
        c->layers = 1;
        return true;
    case 4:
        c->kv_heads = 1;
        return true;
    case 5:
        c->group = 1;
        return true;
    case 6:
        c->head_dim = c->rope_dim || c->head_dim % 16 ? c->head_dim : c->head_dim / 2;
        return true;
    case 7:
        c->threads = 1;
        return true;
    case 8:
        c->strided = false;
        return true;
    case 9:
        c->positions = false;
        return true;
    case 10:
        c->rope = FKV_ROPE_NONE;
        c->rope_dim = 0;
        return true;
    case 11:
        c->level = FKV_CPU_REFERENCE;
        return true;
    case 12:
        c->in = c->out = c->storage = FKV_DTYPE_F32;
        return true;
    case 13:
        c->rope_scaling = c->softmax_scale = 0;
        return true;
    case 14:
        c->coded[0] = 0;
        return true;
    case 15:
        c->coded[1] = 0;
        return true;
    case 16:
        c->carriers = false;
        return true;
    case 17:
        c->bits = c->calibrated ? 4 : c->bits;
        return true;
    case 18:
        c->bits = c->calibrated ? 0 : c->bits;
        return true;
    default:
        return false;
    }
}

static void describe(const struct config *c, char *text, size_t bytes) {
    int n = snprintf(text, bytes,
                     "seed %" PRIu64 " layers %d Hk %d G %d D %d rope %d/%d scaling %g scale %g "
                     "storage %d in %d out %d level %d threads %d flags %" PRIu64
                     " strided %d positions %d tokens %" PRId64,
                     c->seed, c->layers, c->kv_heads, c->group, c->head_dim, c->rope, c->rope_dim,
                     c->rope_scaling, c->softmax_scale, c->storage, c->in, c->out, c->level,
                     c->threads, c->flags, c->strided, c->positions, c->tokens);
    if (c->fourier && n > 0 && (size_t)n < bytes)
        snprintf(text + n, bytes - (size_t)n,
                 " fourier: bins %d coefficients %d sink %d local %d restoration %d outgrow %d "
                 "period %" PRId64 " min_middle %" PRId64 " coded %g %g",
                 c->params.bins, c->params.coefficient_dtype, c->params.n_sink, c->params.n_local,
                 c->params.restoration, c->params.outgrow, c->params.period, c->params.min_middle,
                 c->coded[0], c->coded[1]);
    if (c->calibrated && n > 0 && (size_t)n < bytes)
        snprintf(text + n, bytes - (size_t)n,
                 " calibrated: group %d block %d sink %d local %d domain %d carriers %d bits %d",
                 c->codec.group, c->codec.block, c->codec.n_sink, c->codec.n_local, c->codec.domain,
                 c->carriers, c->bits);
}

void property_run(const char *name, property_fn property, const struct config *c) {
    struct config best = *c;
    char text[800], first[sizeof reason];

    if (attempt(property, c))
        return;
    snprintf(first, sizeof first, "%s", reason);
    for (int proposal = 0, tries = 0; tries < 200; tries++) {
        struct config next = best;
        if (!smaller(&next, proposal))
            break;
        if (memcmp(&next, &best, sizeof next) != 0 && next.tokens > 0 &&
            !attempt(property, &next)) {
            best = next;
            snprintf(first, sizeof first, "%s", reason);
            proposal = 0;
        } else
            proposal++;
    }
    describe(&best, text, sizeof text);
    fail_msg("%s: %s\n    smallest failing case: %s", name, first, text);
}

/* ---- configurations */

struct config config_plain(uint64_t seed) {
    struct config c;

    memset(&c, 0, sizeof c); /* padding too: shrinking compares bytes */
    c.seed = seed;
    c.layers = c.kv_heads = c.group = c.threads = 1;
    c.head_dim = 16;
    c.storage = c.in = c.out = FKV_DTYPE_F32;
    c.tokens = 100;
    return c;
}

static fkv_dtype draw_dtype(struct random *r) {
    return (fkv_dtype)random_int(r, FKV_DTYPE_F32, FKV_DTYPE_BF16);
}

fkv_cpu_level config_best_level(void) {
    static fkv_cpu_level best;
    fkv_context_info info = {.struct_size = sizeof info};
    fkv_context *ctx;

    if (best)
        return best;
    assert_int_equal(fkv_context_create(NULL, &ctx), FKV_OK);
    assert_int_equal(fkv_context_query(ctx, &info), FKV_OK);
    assert_int_equal(fkv_context_destroy(ctx), FKV_OK);
    return best = info.best_cpu_level;
}

struct config config_draw(struct random *r) {
    static const int dims[] = {8, 16, 24, 64, 80, 128, 256}, groups[] = {1, 2, 3, 4, 7, 8};
    struct config c = config_plain(random_next(r));

    c.layers = (int)random_int(r, 1, 2);
    c.kv_heads = (int)random_int(r, 1, 3);
    c.group = groups[random_int(r, 0, LENGTH(groups) - 1)];
    c.level = (fkv_cpu_level)random_int(r, FKV_CPU_REFERENCE, config_best_level());
    /* the reference is slow: mostly small heads */
    bool small = c.level == FKV_CPU_REFERENCE && random_chance(r, 0.8);
    c.head_dim = dims[random_int(r, 0, small ? 2 : LENGTH(dims) - 1)];
    c.rope = (fkv_rope_layout)random_int(r, FKV_ROPE_NONE, FKV_ROPE_INTERLEAVED);
    if (c.rope != FKV_ROPE_NONE && random_chance(r, 0.4))
        c.rope_dim = 2 * (int)random_int(r, 1, c.head_dim / 2);
    if (random_chance(r, 0.3))
        c.rope_scaling = 0.8 + 0.5 * random_uniform(r);
    if (random_chance(r, 0.3))
        c.softmax_scale = (0.5 + random_uniform(r)) / sqrt(c.head_dim);
    c.storage = draw_dtype(r);
    c.in = draw_dtype(r);
    c.out = draw_dtype(r);
    c.threads = (int)random_int(r, 1, 3);
    c.strided = random_chance(r, 0.5);
    c.positions = random_chance(r, 0.3);
    c.tokens = random_int(r, 1, 300);
    return c;
}

void config_draw_fourier(struct random *r, struct config *c) {
    fkv_fourier_params *p = &c->params;

    c->fourier = true;
    if (c->head_dim > 80) { /* for time */
        c->layers = 1;
        c->kv_heads = c->kv_heads < 2 ? c->kv_heads : 2;
        c->group = c->group < 4 ? c->group : 4;
    }
    assert_int_equal(fkv_fourier_params_init(p, sizeof *p), FKV_OK);
    p->coefficient_dtype = random_chance(r, 0.5) ? FKV_DTYPE_F32 : FKV_DTYPE_F16;
    p->n_sink = random_chance(r, 0.3) ? 0 : (int)random_int(r, 1, FKV_MAX_SINK);
    p->n_local = (int)random_int(r, 0, 130);
    p->period = random_int(r, 64, 700);
    p->bins = (int)(random_chance(r, 0.2) ? p->period : random_int(r, 1, 60));
    p->min_middle = random_chance(r, 0.3) ? random_int(r, 1, 200) : 1;
    c->tokens = p->n_sink + p->n_local + random_int(r, 1, 700);
    for (int part = 0; part < 2; part++)
        c->coded[part] = random_chance(r, 0.2) ? (double)random_int(r, 0, 1) : random_uniform(r);
}

void config_draw_calibrated(struct random *r, struct config *c) {
    fkv_codec_params *p = &c->codec;

    c->calibrated = true;
    if (c->head_dim > 80) { /* for time */
        c->layers = 1;
        c->kv_heads = c->kv_heads < 2 ? c->kv_heads : 2;
        c->group = c->group < 4 ? c->group : 4;
    }
    assert_int_equal(fkv_codec_params_init(p, sizeof *p), FKV_OK);
    p->block = 64 << random_int(r, 0, 2);
    p->group = p->block == 64 || random_chance(r, 0.5) ? 64 : 128;
    p->n_sink = random_chance(r, 0.3) ? 0 : (int)random_int(r, 1, FKV_MAX_SINK);
    p->n_local = (int)random_int(r, 0, 130);
    p->domain = random_chance(r, 0.25) ? FKV_DOMAIN_UNROTATED : FKV_DOMAIN_ROTATED;
    c->carriers = random_chance(r, 0.8);
    c->bits = -1;
    c->tokens = p->n_sink + p->n_local + random_int(r, 1, 700);
}

int64_t config_sinks(const struct config *c) {
    return c->fourier ? c->params.n_sink : c->calibrated ? c->codec.n_sink : 0;
}

int64_t config_local(const struct config *c) {
    return c->fourier ? c->params.n_local : c->calibrated ? c->codec.n_local : 0;
}

int64_t config_coded(const struct config *c, int64_t tokens) {
    int64_t middle = tokens - config_sinks(c) - config_local(c), least = 1, unit = 64;

    if (!c->fourier && !c->calibrated)
        return 0;
    if (c->fourier)
        least = c->params.min_middle ? c->params.min_middle : 2 * c->params.bins;
    else
        unit = c->codec.block;
    return middle < least || middle < 1 ? 0 : middle / unit * unit;
}

/* ---- worlds */

static void *world_alloc(void *user, size_t bytes, size_t alignment) {
    struct world *w = user;

    __atomic_add_fetch(&w->live, (int64_t)bytes, __ATOMIC_RELAXED);
    return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

static void world_release(void *user, void *pointer, size_t bytes) {
    struct world *w = user;

    __atomic_sub_fetch(&w->live, (int64_t)bytes, __ATOMIC_RELAXED);
    free(pointer);
}

static void fill_model(struct world *w) {
    const struct config *c = &w->config;
    fkv_model_params *m = &w->model;
    int rotated = c->rope == FKV_ROPE_NONE ? 0 : c->rope_dim ? c->rope_dim : c->head_dim;

    OK(fkv_model_params_init(m, sizeof *m));
    m->n_layers = c->layers;
    m->n_q_heads = c->kv_heads * c->group;
    m->n_kv_heads = c->kv_heads;
    m->head_dim = c->head_dim;
    m->rope_layout = c->rope;
    m->rope_dim = c->rope == FKV_ROPE_NONE ? 0 : c->rope_dim;
    m->rope_scaling = c->rope_scaling;
    m->softmax_scale = c->softmax_scale;
    m->inv_freq_count = rotated / 2;
    for (int j = 0; j < rotated / 2; j++)
        w->inv_freq[j] = pow(10000, -2.0 * j / rotated);
    m->inv_freq = rotated ? w->inv_freq : NULL;
}

/* A tenth of the heads have no coded channel and a tenth only coded ones, unless the share says so. */
static void fill_masks(struct world *w, size_t bytes) {
    const struct config *c = &w->config;
    struct random r;

    random_init(&r, c->seed + 17);
    for (int part = 0; part < 2; part++) {
        w->mask[part] = malloc(bytes);
        for (size_t head = 0; head < bytes / (size_t)c->head_dim; head++) {
            double share = c->coded[part], kind = random_uniform(&r);
            if (share > 0 && share < 1)
                share = kind < 0.1 ? 0 : kind < 0.2 ? 1 : share;
            for (int d = 0; d < c->head_dim; d++)
                w->mask[part][head * (size_t)c->head_dim + (size_t)d] = random_chance(&r, share);
        }
    }
}

/* Of the heads some have channels of one kind only. */
static void fill_bits(struct world *w, size_t count) {
    static const uint8_t widths[] = {0, 0, 2, 2, 3, 4, 8, 16};
    const struct config *c = &w->config;
    struct random r;

    random_init(&r, c->seed + 18);
    for (int part = 0; part < 2; part++) {
        w->mask[part] = malloc(count);
        w->carrier[part] = calloc(count, sizeof(float));
        for (size_t head = 0; head < count / (size_t)c->head_dim; head++) {
            int same = random_chance(&r, 0.3) ? widths[random_int(&r, 0, 7)] : -1;
            bool carried = c->carriers && random_chance(&r, 0.9);
            for (size_t i = head * (size_t)c->head_dim; i < (head + 1) * (size_t)c->head_dim; i++) {
                uint8_t mixed = widths[random_int(&r, 0, 7)];
                w->mask[part][i] = (uint8_t)(c->bits >= 0 ? c->bits
                                             : same >= 0  ? same
                                                          : (int)mixed);
                float carrier = (float)random_normal(&r);
                w->carrier[part][i] = carried ? carrier : 0.0f;
            }
        }
    }
}

static void make_profile(struct world *w) {
    const struct config *c = &w->config;
    size_t bytes = (size_t)c->layers * (size_t)c->kv_heads * (size_t)c->head_dim;
    fkv_fourier_params p = c->params;

    fill_model(w);
    if (c->calibrated) {
        fkv_codec_params codec = c->codec;
        codec.storage_dtype = c->storage;
        fill_bits(w, bytes);
        OK(fkv_profile_create_coded(w->ctx, &w->model, &codec, w->mask[0], w->mask[1], bytes,
                                    c->carriers ? w->carrier[0] : NULL,
                                    c->carriers ? w->carrier[1] : NULL, c->carriers ? bytes : 0,
                                    &w->profile));
        return;
    }
    if (!c->fourier) {
        OK(fkv_profile_create_exact(w->ctx, &w->model, c->storage, &w->profile));
        return;
    }
    fill_masks(w, bytes);
    p.storage_dtype = c->storage;
    OK(fkv_profile_create_fourier(w->ctx, &w->model, &p, w->mask[0], w->mask[1], bytes,
                                  &w->profile));
}

void world_open(struct world *w, const struct config *c) {
    fkv_context_params params;

    memset(w, 0, sizeof *w);
    w->config = *c;
    random_init(&w->rng, c->seed + 1);
    OK(fkv_context_params_init(&params, sizeof params));
    params.threads = c->threads;
    params.cpu_level = c->level;
    params.flags = c->flags;
    params.alloc = world_alloc;
    params.free = world_release;
    params.alloc_user = w;
    OK(fkv_context_create(&params, &w->ctx));
    make_profile(w);
    OK(fkv_cache_create(w->ctx, w->profile, NULL, &w->cache));
    OK(fkv_plan_create(w->cache, &w->plan));
}

void world_close(struct world *w) {
    OK(fkv_plan_destroy(w->plan));
    OK(fkv_cache_destroy(w->cache));
    OK(fkv_profile_destroy(w->profile));
    OK(fkv_context_destroy(w->ctx));
    CHECK(w->live == 0);
    free(w->mask[0]);
    free(w->mask[1]);
    free(w->carrier[0]);
    free(w->carrier[1]);
}

fkv_sequence world_sequence(struct world *w) {
    fkv_sequence id = -1;

    OK(fkv_sequence_create(w->cache, NULL, &id));
    CHECK(id >= 0);
    return id;
}

bool world_coded(const struct world *w, int layer, fkv_part part, int kv_head, int channel) {
    const struct config *c = &w->config;

    return c->fourier &&
           w->mask[part][(layer * c->kv_heads + kv_head) * c->head_dim + channel] != 0;
}

fkv_stats world_stats(struct world *w, fkv_sequence sequence) {
    fkv_stats stats = {.struct_size = sizeof stats};

    OK(fkv_cache_stats(w->cache, sequence, &stats));
    return stats;
}

/* ---- tokens */

static float *draw_rows(struct random *r, const struct config *c, int64_t n, int heads) {
    size_t count = (size_t)n * (size_t)heads * (size_t)c->head_dim;
    float *x = malloc((count + 1) * sizeof *x);

    for (size_t i = 0; i < count; i++)
        x[i] = (float)oracle_round(random_bell(r), c->in);
    return x;
}

void stream_init(struct stream *s, const struct config *c, uint64_t seed, int64_t n) {
    struct random r;

    memset(s, 0, sizeof *s);
    random_init(&r, c->seed * 31 + seed);
    s->n = n;
    s->positions = malloc((size_t)(n + 1) * sizeof *s->positions);
    /* now and then for calibrated profiles, whose blocks say where runs of positions begin */
    const double jumps = !c->positions ? 0 : c->calibrated && c->seed % 2 ? 0.005 : 1;
    for (int64_t i = 0, at = 0; i < n; i++) {
        s->positions[i] = at;
        at += 1 + (jumps > 0 && random_chance(&r, jumps) ? random_int(&r, -1, 40) : 0);
    }
    for (int layer = 0; layer < c->layers; layer++) {
        s->q[layer] = draw_rows(&r, c, n, c->kv_heads * c->group);
        s->k[layer] = draw_rows(&r, c, n, c->kv_heads);
        s->v[layer] = draw_rows(&r, c, n, c->kv_heads);
    }
}

void stream_free(struct stream *s) {
    for (int layer = 0; layer < MAX_LAYERS; layer++) {
        free(s->q[layer]);
        free(s->k[layer]);
        free(s->v[layer]);
    }
    free(s->positions);
}
