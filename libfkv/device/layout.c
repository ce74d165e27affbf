/* SPDX-License-Identifier: Apache-2.0 */
/* What the device must know of a profile, laid out in one buffer; see backend_cuda.h. */
#define _GNU_SOURCE
#include "device/device.h"

#include <math.h>
#include <string.h>

#define PANEL 16
#define SLOW_RADIUS 5.0 /* 16 polynomials give cos and sin of up to this angle to 1e-7 */

/* Offsets of the tables in the buffer, and sizes. */
struct plan_of_tables {
    size_t inv_freq, heads, planes, unit_bytes, carriers, coded_channels, kinds, basis, sections,
        turns, project, splits, channels, bytes;
    size_t n_planes, n_channels;
};

static fkv_status check_profile(struct fkv_ctx *ctx, const struct fkv_profile_object *p) {
    if (p->coding == FKV_CODING_FOURIER && p->fourier.restoration == FKV_RESTORE_AUTHORS) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED,
                        "the CUDA backend restores Fourier channels by least squares only "
                        "(fourier.restoration)");
    }
    if (p->storage_dtype == FKV_DTYPE_F32) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED,
                        "the CUDA backend stores f16 and bf16, not f32; make the profile with one");
    }
    if (p->coding != FKV_CODING_CALIBRATED) {
        return FKV_OK;
    }
    if (p->codec.domain == FKV_DOMAIN_UNROTATED) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED,
                        "the CUDA backend holds keys rotated only (codec.domain)");
    }
    for (int i = 0; i < p->model.n_layers * 2 * p->model.n_kv_heads; i++) {
        if (p->residuals[i].count[FKV_WIDTH_EXACT] && p->storage_dtype == FKV_DTYPE_BF16) {
            return fkv_fail(ctx, FKV_ERR_UNSUPPORTED,
                            "the CUDA backend has exact channels of blocks in f16 only; "
                            "storage_dtype is bf16");
        }
    }
    return FKV_OK;
}

static int planes_of(enum fkv_width w) {
    return w == FKV_WIDTH_8 ? 4 : w == FKV_WIDTH_4 || w == FKV_WIDTH_3 ? 2 : 1;
}

/* Planes of one part, those of 2 bits last as the fewest panels mix then; `to` may be NULL. Filled up to whole
 * panels. */
static int list_planes(const struct fkv_residuals *r, struct fkv_plane *to) {
    int n = 0, at = r->count[FKV_WIDTH_EXACT];
    for (enum fkv_width w = FKV_WIDTH_8; w < FKV_WIDTH_0; w++) {
        for (int i = 0; i < r->count[w]; i++, at++) {
            for (int plane = 0; plane < planes_of(w); plane++, n++) {
                if (to) {
                    to[n] = (struct fkv_plane){r->list[at], (int16_t)plane};
                }
            }
        }
    }
    for (; n % PANEL; n++) {
        if (to) {
            to[n] = (struct fkv_plane){FKV_CUDA_NO_CHANNEL, 0};
        }
    }
    return n;
}

static int list_exact(const struct fkv_residuals *r, struct fkv_plane *to) {
    int n = 0;
    for (; n < r->count[FKV_WIDTH_EXACT] || n % PANEL; n++) {
        if (to) {
            to[n] = (struct fkv_plane){FKV_CUDA_NO_CHANNEL, 0};
            if (n < r->count[FKV_WIDTH_EXACT]) {
                to[n].channel = r->list[n];
            }
        }
    }
    return n;
}

/* The channels with codes in the order of their planes; mu: the part's carriers. `to` may be NULL. */
static int list_coded(const struct fkv_model *m, const struct fkv_residuals *r, fkv_part part,
                      const float *mu, struct fkv_cuda_channel *to) {
    static const int bits[] = {
        [FKV_WIDTH_8] = 8, [FKV_WIDTH_4] = 4, [FKV_WIDTH_3] = 3, [FKV_WIDTH_2] = 2};
    const int pairs = m->rope_dim / 2;
    int n = 0, plane = 0, at = r->count[FKV_WIDTH_EXACT];
    for (enum fkv_width w = FKV_WIDTH_8; w < FKV_WIDTH_0; w++) {
        for (int i = 0; i < r->count[w]; i++, at++, n++, plane += planes_of(w)) {
            if (!to) {
                continue;
            }
            const int d = r->list[at];
            const bool interleaved = m->rope_layout == FKV_ROPE_INTERLEAVED;
            const bool turns = part == FKV_PART_K && d < m->rope_dim;
            const bool leads = interleaved ? d % 2 == 0 : d < pairs;
            const int other = interleaved ? d ^ 1 : leads ? d + pairs : d - pairs;
            to[n] = (struct fkv_cuda_channel){.number = (int16_t)d,
                                              .first = (int16_t)plane,
                                              .pair = (int16_t)(!turns        ? pairs
                                                                : interleaved ? d / 2
                                                                              : d % pairs),
                                              .bits = (int16_t)bits[w],
                                              .u = mu[d],
                                              .w = !turns  ? 0.0f
                                                   : leads ? -mu[other]
                                                           : mu[other]};
        }
    }
    return n;
}

static int max_int(int a, int b) {
    return a > b ? a : b;
}

/* Heads of all layers, and the sizes that follow. */
static void lay_out_heads(const struct fkv_profile_object *p, struct fkv_device_cache *d,
                          size_t *n_planes) {
    const int heads = p->model.n_kv_heads, panel = d->c.unit * 4;
    int32_t next = 0;
    for (int l = 0; l < p->model.n_layers; l++) {
        int32_t offset = 0;
        for (int i = 0; i < heads; i++) {
            struct fkv_cuda_head *h = &d->heads[l * heads + i];
            const struct fkv_residuals *k = fkv_profile_residuals(p, l, FKV_PART_K, i);
            const struct fkv_residuals *v = fkv_profile_residuals(p, l, FKV_PART_V, i);
            h->k_planes = next;
            h->v_planes = h->k_planes + list_planes(k, NULL);
            h->k_exacts = h->v_planes + list_planes(v, NULL);
            h->v_exacts = h->k_exacts + list_exact(k, NULL);
            next = h->v_exacts + list_exact(v, NULL);
            h->k_steps = (h->v_planes - h->k_planes) / PANEL;
            h->v_steps = (h->k_exacts - h->v_planes) / PANEL;
            h->k_exact = (h->v_exacts - h->k_exacts) / PANEL;
            h->v_exact = (next - h->v_exacts) / PANEL;
            h->carried = k->carried;
            h->k_channels = list_coded(&p->model, k, FKV_PART_K, NULL, NULL);
            h->v_channels = list_coded(&p->model, v, FKV_PART_V, NULL, NULL);
            h->offset = offset;
            h->k_bytes = h->k_steps * (panel + 64) + h->k_exact * panel * 8 + 16;
            h->bytes = h->k_bytes + h->v_steps * (panel + 64) + h->v_exact * panel * 8;
            offset += h->bytes;
            d->c.most_bytes = max_int(d->c.most_bytes, h->bytes);
            d->c.panels = max_int(d->c.panels, h->v_steps + h->v_exact);
            d->c.most_k_planes = max_int(d->c.most_k_planes, h->k_steps * PANEL);
            d->c.most_k_exacts = max_int(d->c.most_k_exacts, h->k_exact * PANEL);
        }
        d->unit_bytes[l] = (offset + 127) / 128 * 128;
        for (int i = 0; i < heads; i++) {
            d->heads[l * heads + i].unit_bytes = d->unit_bytes[l];
        }
    }
    *n_planes = (size_t)next;
}

static size_t part_of(size_t *at, size_t bytes) {
    size_t offset = *at;
    *at += (bytes + 255) / 256 * 256;
    return offset;
}

static void lay_out_tables(const struct fkv_profile_object *p, const struct fkv_device_cache *d,
                           struct plan_of_tables *t) {
    const struct fkv_model *m = &p->model;
    const size_t heads = (size_t)m->n_layers * (size_t)m->n_kv_heads, dim = (size_t)m->head_dim;
    const size_t pairs = (size_t)m->rope_dim / 2, fast = (size_t)d->c.fast;
    size_t at = 0;
    t->inv_freq = part_of(&at, pairs * sizeof(double));
    if (d->c.coded == FKV_CUDA_FOURIER) {
        t->splits = part_of(&at, heads * sizeof(struct fkv_cuda_split));
        t->channels = part_of(&at, t->n_channels * sizeof(uint16_t));
    }
    if (d->c.coded == FKV_CUDA_CALIBRATED) {
        const size_t fragments = (fast / 16 + 1) * (size_t)(d->c.unit / 16) * 2;
        t->heads = part_of(&at, heads * sizeof(struct fkv_cuda_head));
        t->planes = part_of(&at, t->n_planes * sizeof(struct fkv_plane));
        t->unit_bytes = part_of(&at, (size_t)m->n_layers * sizeof(int32_t));
        t->carriers = part_of(&at, 2 * heads * dim * sizeof(float));
        t->coded_channels = part_of(&at, 2 * heads * dim * sizeof(struct fkv_cuda_channel));
        t->kinds = part_of(&at, 2 * heads * dim);
        t->basis = part_of(&at, fragments * 512);
        t->sections = part_of(&at, (size_t)FKV_SPAN * 1024);
        t->turns = part_of(&at, FKV_SPAN * fast * 2 * sizeof(float));
        t->project = part_of(&at, (pairs > fast ? (pairs - fast + 7) / 8 : 1) * 1024);
    }
    t->bytes = at + 256;
}

/* ---- the carriers' basis */

/* Puts x at (r, c) of a fragment and of the one with what is left. */
static void put(uint16_t *fragment, int r, int c, double x) {
    const size_t at =
        (size_t)((r % 8 * 4 + c % 8 / 2) * 4 + r / 8 + 2 * (c / 8)) * 2 + (size_t)(c % 2);
    fragment[at] = fkv_f32_to_f16((float)x);
    fragment[256 + at] = fkv_f32_to_f16((float)(x - (double)fkv_f16_to_f32(fragment[at])));
}

/* Even (0) and odd (1) functions of the distance j + 1/2 from a unit's middle. */
static double basis_at(const struct fkv_model *m, const struct fkv_cuda_cache *c, int odd,
                       int column, int j) {
    const int group = column / 8, k = column % 8, pair = column;
    if (group < c->fast / 8) {
        const double angle = pair < m->rope_dim / 2 ? m->inv_freq[pair] * (j + 0.5) : 0.0;
        return pair >= m->rope_dim / 2 ? 0.0 : odd ? sin(angle) : cos(angle);
    }
    return group > c->fast / 8 ? 0.0 : cos((2 * k + odd) * acos((j + 0.5) / (0.5 * c->unit)));
}

static void fill_basis(const struct fkv_model *m, const struct fkv_cuda_cache *c, uint16_t *basis) {
    const int panels = c->fast / 16 + 1, tiles = c->unit / 32;
    for (int odd = 0; odd < 2; odd++) {
        for (int i = 0; i < panels * PANEL * (c->unit / 2); i++) {
            const int j = i / PANEL % (c->unit / 2), panel = i / PANEL / (c->unit / 2);
            put(basis + (size_t)((odd * panels + panel) * tiles + j / 16) * 512, j % 16, i % PANEL,
                basis_at(m, c, odd, panel * PANEL + i % PANEL, j));
        }
    }
}

/* The coefficient of polynomial m of a unit in polynomial n of its span, by Gauss and Chebyshev's quadrature. */
static double section(int unit, int m, int n) {
    enum { NODES = 32 };
    const double middle = (unit + 0.5 - 0.5 * FKV_SPAN) / (0.5 * FKV_SPAN);
    double sum = 0.0;
    for (int k = 0; k < NODES; k++) {
        const double angle = (k + 0.5) / NODES * 3.14159265358979323846;
        const double x = middle + cos(angle) / FKV_SPAN;
        sum += cos(n * acos(x)) * cos(m * angle);
    }
    return sum * (m ? 2.0 : 1.0) / NODES;
}

static void fill_sections(uint16_t *sections) {
    for (int i = 0; i < FKV_SPAN * FKV_CUDA_CHEBYSHEV * PANEL; i++) {
        const int n = i % PANEL, r = i / PANEL % PANEL, unit = i / PANEL / PANEL;
        put(sections + (size_t)unit * 512, r, n, section(unit, r % 8 * 2 + r / 8, n));
    }
}

static void fill_turns(const struct fkv_model *m, const struct fkv_cuda_cache *c, float *turns,
                       uint16_t *project) {
    const int pairs = m->rope_dim / 2;
    for (int i = 0; i < FKV_SPAN * c->fast; i++) {
        const int pair = i % c->fast;
        const double middle = i / c->fast * c->unit + 0.5 * (c->unit - 1);
        const double angle = pair < pairs ? m->inv_freq[pair] * middle : 0.0;
        turns[2 * i] = (float)cos(angle);
        turns[2 * i + 1] = (float)sin(angle);
    }
    for (int j = c->fast; j < pairs; j++) {
        /* cos(z x) and sin(z x) in Chebyshev polynomials of x: Jacobi and Anger's expansion */
        const double z = m->inv_freq[j] * 0.5 * FKV_SPAN * c->unit;
        uint16_t *fragment = project + (size_t)((j - c->fast) / 8) * 512;
        for (int n = 0; n < FKV_CUDA_CHEBYSHEV; n++) {
            const double sign = n / 2 % 2 ? -1.0 : 1.0;
            put(fragment, n, 2 * ((j - c->fast) % 8) + n % 2, sign * (n ? 2.0 : 1.0) * jn(n, z));
        }
    }
}

static int fast_pairs(const struct fkv_model *m, int unit) {
    int fast = 0;
    for (int j = 0; j < m->rope_dim / 2; j++) {
        if (fabs(m->inv_freq[j]) * 0.5 * FKV_SPAN * unit > SLOW_RADIUS) {
            fast = j + 1;
        }
    }
    return (fast + 7) / 8 * 8;
}

static void fill_tables(const struct fkv_profile_object *p, const struct fkv_device_cache *d,
                        const struct plan_of_tables *t, char *to) {
    const struct fkv_model *m = &p->model;
    const int heads = m->n_kv_heads;
    const size_t dim = (size_t)m->head_dim;
    memset(to, 0, t->bytes);
    if (m->rope_dim) {
        memcpy(to + t->inv_freq, m->inv_freq, (size_t)m->rope_dim / 2 * sizeof(double));
    }
    if (d->c.coded == FKV_CUDA_FOURIER) {
        fkv_device_split(p, (struct fkv_device_cache *)(uintptr_t)d,
                         (uint16_t *)(void *)(to + t->channels));
        memcpy(to + t->splits, d->splits, (size_t)(m->n_layers * heads) * sizeof *d->splits);
    }
    if (d->c.coded != FKV_CUDA_CALIBRATED) {
        return;
    }
    memcpy(to + t->heads, d->heads, (size_t)(m->n_layers * heads) * sizeof *d->heads);
    memcpy(to + t->unit_bytes, d->unit_bytes, (size_t)m->n_layers * sizeof(int32_t));
    struct fkv_plane *planes = (struct fkv_plane *)(void *)(to + t->planes);
    for (int l = 0; l < m->n_layers; l++) {
        for (int i = 0; i < 2 * heads; i++) {
            const fkv_part part = i % 2;
            const struct fkv_cuda_head *h = &d->heads[l * heads + i / 2];
            const struct fkv_residuals *r = fkv_profile_residuals(p, l, part, i / 2);
            const size_t at = ((size_t)(l * 2 + part) * (size_t)heads + (size_t)(i / 2)) * dim;
            list_planes(r, planes + (part == FKV_PART_K ? h->k_planes : h->v_planes));
            list_exact(r, planes + (part == FKV_PART_K ? h->k_exacts : h->v_exacts));
            memcpy(to + t->carriers + at * sizeof(float), fkv_profile_carrier(p, l, part, i / 2),
                   dim * sizeof(float));
            list_coded(m, r, part, fkv_profile_carrier(p, l, part, i / 2),
                       (struct fkv_cuda_channel *)(void *)(to + t->coded_channels) + at);
            const int first =
                r->count[FKV_WIDTH_EXACT] + r->count[FKV_WIDTH_8] + r->count[FKV_WIDTH_4];
            for (int j = 0; j < r->count[FKV_WIDTH_3]; j++) {
                to[t->kinds + at + r->list[first + j]] = 1;
            }
            for (int j = 0; j < r->count[FKV_WIDTH_EXACT]; j++) {
                to[t->kinds + at + r->list[j]] = 2;
            }
        }
    }
    fill_basis(m, &d->c, (uint16_t *)(void *)(to + t->basis));
    fill_sections((uint16_t *)(void *)(to + t->sections));
    fill_turns(m, &d->c, (float *)(void *)(to + t->turns), (uint16_t *)(void *)(to + t->project));
}

static void point_to_tables(struct fkv_cuda_cache *c, uint64_t base,
                            const struct plan_of_tables *t) {
    c->inv_freq = base + t->inv_freq;
    c->splits = base + t->splits;
    c->channels = base + t->channels;
    c->heads = base + t->heads;
    c->planes = base + t->planes;
    c->unit_bytes = base + t->unit_bytes;
    c->carriers = base + t->carriers;
    c->coded_channels = base + t->coded_channels;
    c->kinds = base + t->kinds;
    c->basis = base + t->basis;
    c->sections = base + t->sections;
    c->turns = base + t->turns;
    c->project = base + t->project;
}

/* ---- pools */

static size_t layer_scales(const struct fkv_device_cache *d, int layer, int heads) {
    size_t bytes = 0;
    for (int i = 0; i < heads; i++) {
        bytes +=
            (size_t)(d->heads[layer * heads + i].k_steps + d->heads[layer * heads + i].v_steps) *
            64;
    }
    return bytes * (size_t)d->c.units_per_block;
}

/* The pool of pages like these, a new one if there is none. */
static int32_t pool_like(struct fkv_device_cache *d, struct fkv_device_pool pool) {
    int32_t i = 1;
    while (i < d->n_pools && (d->pools[i].bytes != pool.bytes || d->pools[i].class != pool.class ||
                              d->pools[i].scales != pool.scales)) {
        i++;
    }
    if (i == d->n_pools) {
        d->pools[d->n_pools++] = pool;
    }
    return i;
}

static void make_pools(const struct fkv_profile_object *p, struct fkv_device_cache *d) {
    const size_t padded = ((size_t)p->model.head_dim + 15) / 16 * 16;
    d->pools[0] = (struct fkv_device_pool){
        .bytes = (size_t)p->model.n_kv_heads * padded * 2 * FKV_TILE * 2, .class = FKV_CLASS_EXACT};
    d->n_pools = 1;
    for (int l = 0; d->c.coded == FKV_CUDA_CALIBRATED && l < p->model.n_layers; l++) {
        d->pool_of[l] =
            pool_like(d, (struct fkv_device_pool){
                             .bytes = (size_t)d->unit_bytes[l] * (size_t)d->c.units_per_block,
                             .class = FKV_CLASS_BLOCKS,
                             .scales = layer_scales(d, l, p->model.n_kv_heads)});
    }
    for (int l = 0; d->c.coded == FKV_CUDA_FOURIER && l < p->model.n_layers; l++) {
        d->pool_of[l] = pool_like(d, (struct fkv_device_pool){.bytes = (size_t)d->unit_bytes[l],
                                                              .class = FKV_CLASS_KEPT});
        d->segment_pool[l] =
            pool_like(d, (struct fkv_device_pool){.bytes = fkv_device_segment_bytes(p, d, l),
                                                  .class = FKV_CLASS_COEFFICIENTS});
    }
}

static void set_geometry(const struct fkv_profile_object *p, struct fkv_cuda_cache *c) {
    const struct fkv_model *m = &p->model;
    *c = (struct fkv_cuda_cache){
        .n_layers = m->n_layers,
        .n_q_heads = m->n_q_heads,
        .n_kv_heads = m->n_kv_heads,
        .group = m->group,
        .dim = m->head_dim,
        .dtype = p->storage_dtype,
        .rope_layout = m->rope_layout,
        .rope_dim = m->rope_dim,
        .scale = (float)m->softmax_scale,
        .rope_scaling = m->rope_scaling,
    };
    if (p->coding == FKV_CODING_FOURIER) {
        c->coded = FKV_CUDA_FOURIER;
        c->unit = FKV_TILE;
        c->units_per_block = 1;
        c->sinks = p->fourier.n_sink;
        c->coefficients = p->fourier.coefficient_dtype;
    }
    if (p->coding == FKV_CODING_CALIBRATED) {
        c->coded = FKV_CUDA_CALIBRATED;
        c->unit = p->codec.group;
        c->units_per_block = p->codec.block / p->codec.group;
        c->sinks = p->codec.n_sink;
        c->fast = fast_pairs(m, c->unit);
    }
}

static fkv_status make_cache(struct fkv_cache_object *cache) {
    struct fkv_device_cache *d = cache->device;
    const struct fkv_profile_object *p = cache->profile;
    const size_t layers = (size_t)p->model.n_layers, heads = layers * (size_t)p->model.n_kv_heads;
    struct plan_of_tables t = {0};
    void *memory;
    set_geometry(p, &d->c);
    d->pools = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, (2 * layers + 1) * sizeof *d->pools);
    d->splits = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, heads * sizeof *d->splits);
    d->coded_rows = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, layers * sizeof *d->coded_rows);
    d->segment_pool =
        fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, layers * sizeof *d->segment_pool);
    d->heads = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, heads * sizeof *d->heads);
    d->unit_bytes = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, layers * sizeof *d->unit_bytes);
    d->pool_of = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, layers * sizeof *d->pool_of);
    if (!d->pools || !d->heads || !d->unit_bytes || !d->pool_of || !d->splits || !d->coded_rows ||
        !d->segment_pool) {
        return fkv_cache_refused(cache);
    }
    if (d->c.coded == FKV_CUDA_CALIBRATED) {
        lay_out_heads(p, d, &t.n_planes);
    } else if (d->c.coded == FKV_CUDA_FOURIER) {
        t.n_channels = fkv_device_split(p, d, NULL);
    }
    make_pools(p, d);
    lay_out_tables(p, d, &t);
    fkv_status status = fkv_device_reserve(cache, &d->tables, t.bytes);
    if (status == FKV_OK) {
        status = fkv_device_stage(cache, t.bytes, &memory);
    }
    if (status != FKV_OK) {
        return status;
    }
    fill_tables(p, d, &t, memory);
    point_to_tables(&d->c, d->tables.address, &t);
    return fkv_device_send(cache, d->tables.address, t.bytes);
}

fkv_status fkv_device_cache_new(struct fkv_cache_object *cache) {
    fkv_status status = check_profile(cache->ctx, cache->profile);
    if (status != FKV_OK) {
        return status;
    }
    cache->device = fkv_cache_alloc(cache, NULL, FKV_CLASS_TABLES, sizeof *cache->device);
    if (!cache->device) {
        return fkv_cache_refused(cache);
    }
    status = make_cache(cache);
    if (status != FKV_OK) {
        fkv_device_cache_free(cache);
    }
    return status;
}

void fkv_device_cache_free(struct fkv_cache_object *cache) {
    struct fkv_device_cache *d = cache->device;
    struct fkv_ctx *ctx = cache->ctx;
    const size_t layers = (size_t)cache->profile->model.n_layers;
    if (!d) {
        return;
    }
    ctx->cuda->synchronize(ctx->device, ctx->stream); /* or it would go on reading what is freed */
    fkv_device_pools_free(cache);
    fkv_device_release(cache, &d->tables);
    fkv_device_release(cache, &d->patches);
    for (int i = 0; i < FKV_DEVICE_STAGES; i++) {
        if (d->stages[i].memory) {
            ctx->cuda->free_host(ctx->device, d->stages[i].memory);
        }
        if (d->stages[i].event) {
            ctx->cuda->event_destroy(ctx->device, d->stages[i].event);
        }
    }
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, d->pending,
                   (size_t)d->pending_slots * sizeof *d->pending);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, d->pools, (2 * layers + 1) * sizeof *d->pools);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, d->splits,
                   layers * (size_t)cache->profile->model.n_kv_heads * sizeof *d->splits);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, d->coded_rows, layers * sizeof *d->coded_rows);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, d->segment_pool,
                   layers * sizeof *d->segment_pool);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, d->heads,
                   layers * (size_t)cache->profile->model.n_kv_heads * sizeof *d->heads);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, d->unit_bytes, layers * sizeof *d->unit_bytes);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, d->pool_of, layers * sizeof *d->pool_of);
    fkv_cache_free(cache, NULL, FKV_CLASS_TABLES, d, sizeof *d);
    cache->device = NULL;
}
