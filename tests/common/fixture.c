/* SPDX-License-Identifier: Apache-2.0 */
#include "fixture.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* ---- allocator */

/* Stands in front of each piece, `lead` bytes after the start of its block. */
struct piece {
    size_t lead, bytes;
};

void *heap_alloc(void *user, size_t bytes, size_t alignment) {
    struct heap *heap = user;
    int64_t call = ++heap->calls;
    if (heap->watch)
        heap->watch(heap->watch_user);
    if (heap->fail_at && (call == heap->fail_at || (heap->forever && call > heap->fail_at)))
        return NULL;
    struct piece piece = {alignment < sizeof piece ? sizeof piece : alignment, bytes};
    void *base;
    if (bytes > SIZE_MAX / 2 || posix_memalign(&base, piece.lead, bytes + piece.lead))
        return NULL;
    char *data = (char *)base + piece.lead;
    memcpy(data - sizeof piece, &piece, sizeof piece);
    memset(data, 0xff, bytes);
    heap->blocks++;
    heap->bytes += (int64_t)bytes;
    return data;
}

void heap_free(void *user, void *pointer, size_t bytes) {
    struct heap *heap = user;
    struct piece piece;
    memcpy(&piece, (char *)pointer - sizeof piece, sizeof piece);
    if (piece.bytes != bytes)
        heap->mismatches++;
    memset(pointer, 0xff, piece.bytes);
    heap->blocks--;
    heap->bytes -= (int64_t)piece.bytes;
    free((char *)pointer - piece.lead);
}

void heap_fail(struct heap *heap, int64_t fail_at, bool forever) {
    heap->calls = 0;
    heap->forever = forever;
    heap->fail_at = fail_at;
}

bool heap_failed(const struct heap *heap) {
    return heap->fail_at && heap->calls >= heap->fail_at;
}

/* ---- model, profile, cache */

static void set_default(int *option, int value) {
    *option = *option ? *option : value;
}

void fixture_model(struct fixture *f, const struct options *options) {
    *f = (struct fixture){0};
    if (options)
        f->options = *options;
    struct options *o = &f->options;
    set_default(&o->layers, 2);
    set_default(&o->q_heads, 4);
    set_default(&o->kv_heads, 2);
    set_default(&o->dim, 16);
    set_default(&o->bins, 16);
    set_default(&o->n_sink, 4);
    set_default(&o->n_local, 32);
    set_default(&o->threads, 1);
    o->storage = o->storage ? o->storage : FKV_DTYPE_F16;
    o->period = o->period ? o->period : 512;
    fkv_model_params_init(&f->model, sizeof f->model);
    f->model.n_layers = o->layers;
    f->model.n_q_heads = o->q_heads;
    f->model.n_kv_heads = o->kv_heads;
    f->model.head_dim = o->dim;
    f->model.rope_layout = FKV_ROPE_HALF_SPLIT;
    f->model.inv_freq_count = o->dim / 2;
    f->model.inv_freq = f->inv_freq;
    for (int j = 0; j < o->dim / 2; j++)
        f->inv_freq[j] = pow(10000, -2.0 * j / o->dim);
}

static fkv_status calibrated_profile(struct fixture *f, fkv_profile **out) {
    static const uint8_t bits[] = {0, 2, 3, 4, 8, 16, 0};
    const struct options *o = &f->options;
    fkv_codec_params codec;
    fkv_codec_params_init(&codec, sizeof codec);
    codec.storage_dtype = o->storage;
    codec.group = codec.block = 64;
    codec.n_sink = o->n_sink < 0 ? 0 : o->n_sink;
    codec.n_local = o->n_local;
    size_t count = (size_t)o->layers * (size_t)o->kv_heads * (size_t)o->dim;
    uint8_t *width = malloc(count);
    float *carrier = malloc(count * sizeof *carrier);
    for (size_t i = 0; i < count; i++) {
        width[i] = bits[i % sizeof bits];
        carrier[i] = (float)(i % 5) / 4 - 0.5f;
    }
    fkv_status status = fkv_profile_create_coded(f->ctx, &f->model, &codec, width, width, count,
                                                 carrier, carrier, count, out);
    free(width);
    free(carrier);
    return status;
}

fkv_status fixture_profile(struct fixture *f, fkv_profile **out) {
    const struct options *o = &f->options;
    if (o->exact)
        return fkv_profile_create_exact(f->ctx, &f->model, o->storage, out);
    if (o->calibrated)
        return calibrated_profile(f, out);
    fkv_fourier_params fourier;
    fkv_fourier_params_init(&fourier, sizeof fourier);
    fourier.storage_dtype = o->storage;
    fourier.restoration = o->authors ? FKV_RESTORE_AUTHORS : FKV_RESTORE_LEAST_SQUARES;
    fourier.bins = o->bins;
    fourier.n_sink = o->n_sink < 0 ? 0 : o->n_sink;
    fourier.n_local = o->n_local;
    fourier.period = o->period;
    fourier.min_middle = o->min_middle;
    size_t bytes = (size_t)o->layers * (size_t)o->kv_heads * (size_t)o->dim;
    uint8_t *mask = malloc(bytes);
    for (size_t i = 0; i < bytes; i++)
        mask[i] = i % 3 != 0;
    fkv_status status =
        fkv_profile_create_fourier(f->ctx, &f->model, &fourier, mask, mask, bytes, out);
    free(mask);
    return status;
}

fkv_status fixture_try(struct fixture *f, const struct options *options) {
    fixture_model(f, options);
    const struct options *o = &f->options;
    fkv_context_params params;
    fkv_context_params_init(&params, sizeof params);
    params.threads = o->threads;
    params.cpu_level = o->level;
    params.flags = o->flags;
    params.max_bytes = o->max_bytes;
    if (o->heap) {
        params.alloc = heap_alloc;
        params.free = heap_free;
        params.alloc_user = o->heap;
    }
    fkv_cache_params cache;
    fkv_cache_params_init(&cache, sizeof cache);
    cache.max_bytes = o->cache_bytes;
    cache.max_tokens = o->cache_tokens;
    fkv_status status = fkv_context_create(&params, &f->ctx);
    if (!status)
        status = fixture_profile(f, &f->profile);
    if (!status)
        status = fkv_cache_create(f->ctx, f->profile, &cache, &f->cache);
    return status;
}

void fixture_open(struct fixture *f, const struct options *options) {
    assert_int_equal(fixture_try(f, options), FKV_OK);
}

void fixture_close(struct fixture *f) {
    assert_int_equal(fkv_cache_destroy(f->cache), FKV_OK);
    assert_int_equal(fkv_profile_destroy(f->profile), FKV_OK);
    assert_int_equal(fkv_context_destroy(f->ctx), FKV_OK);
    f->cache = NULL;
    f->profile = NULL;
    f->ctx = NULL;
    if (f->options.heap) {
        assert_int_equal(f->options.heap->blocks, 0);
        assert_int_equal(f->options.heap->bytes, 0);
        assert_int_equal(f->options.heap->mismatches, 0);
    }
}

/* ---- tensors and steps */

static uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

void fixture_values(float *x, int64_t first, int64_t tokens, int heads, int dim, uint64_t stream,
                    int layer, int kind) {
    uint64_t series = mix(stream * 0x9e3779b97f4a7c15u + (uint64_t)layer * 256 + (uint64_t)kind);
    for (int64_t t = first; t < first + tokens; t++)
        for (int i = 0; i < heads * dim; i++) {
            uint64_t bits = mix(series + (uint64_t)t * 0xd1342543de82ef95u + (uint64_t)i);
            double noise = (double)(bits >> 11) * 0x1p-52 - 1;
            *x++ = (float)(.5 * noise + .5 * cos(.003 * (i % dim + 1) * (double)t));
        }
}

fkv_tensor fixture_tensor(void *data, fkv_dtype dtype, int64_t tokens, int64_t heads, int64_t dim) {
    fkv_tensor tensor;
    int64_t shape[3] = {tokens, heads, dim};
    assert_int_equal(fkv_tensor_init(&tensor, data, dtype, 3, shape), FKV_OK);
    return tensor;
}

fkv_tensor fixture_lse(void *data, int64_t tokens, int64_t heads) {
    fkv_tensor tensor;
    int64_t shape[2] = {tokens, heads};
    assert_int_equal(fkv_tensor_init(&tensor, data, FKV_DTYPE_F32, 2, shape), FKV_OK);
    return tensor;
}

#define DAMAGE(name, change)                                                                       \
    static void damage_##name(fkv_tensor *t) {                                                     \
        t->change;                                                                                 \
    }
#define LAST(member) member[t->ndim - 1]
DAMAGE(size_zero, struct_size = 0)
DAMAGE(size_short, struct_size -= 8)
DAMAGE(size_wild, struct_size = UINT32_MAX)
DAMAGE(dtype_none, dtype = FKV_DTYPE_NONE)
DAMAGE(dtype_unknown, dtype = 4)
DAMAGE(dtype_negative, dtype = -1)
DAMAGE(device_cuda, device = FKV_DEVICE_CUDA)
DAMAGE(device_unknown, device = -3)
DAMAGE(device_id, device_id = 1)
DAMAGE(reserved, reserved = 1)
DAMAGE(data_null, data = NULL)
DAMAGE(data_odd, data = (char *)t->data + 1)
DAMAGE(length_short, byte_length--)
DAMAGE(length_zero, byte_length = 0)
DAMAGE(ndim_zero, ndim = 0)
DAMAGE(ndim_less, ndim--)
DAMAGE(ndim_more, ndim++)
DAMAGE(ndim_beyond, ndim = 5)
DAMAGE(ndim_negative, ndim = -1)
DAMAGE(tokens_more, shape[0]++)
DAMAGE(tokens_less, shape[0]--)
DAMAGE(tokens_zero, shape[0] = 0)
DAMAGE(tokens_negative, shape[0] = -1)
DAMAGE(tokens_most, shape[0] = INT64_MAX)
DAMAGE(tokens_least, shape[0] = INT64_MIN)
DAMAGE(heads_more, shape[1]++)
DAMAGE(heads_less, shape[1]--)
DAMAGE(heads_most, shape[1] = INT64_MAX)
DAMAGE(last_more, LAST(shape) += 8)
DAMAGE(last_zero, LAST(shape) = 0)
DAMAGE(stride_zero, strides[0] = 0)
DAMAGE(stride_negative, strides[0] *= -1)
DAMAGE(stride_partial, strides[0] -= 2)
DAMAGE(stride_beyond, strides[0] += 4)
DAMAGE(stride_most, strides[0] = INT64_MAX - 3)
DAMAGE(stride_least, strides[0] = INT64_MIN)
DAMAGE(head_stride_zero, strides[1] = 0)
DAMAGE(head_stride_negative, strides[1] *= -1)
DAMAGE(head_stride_beyond, strides[1] = INT64_MAX - 3)
DAMAGE(last_stride_zero, LAST(strides) = 0)
DAMAGE(last_stride_gap, LAST(strides) = 8)

#define INVALID(name)                                                                              \
    { #name, FKV_ERR_INVALID, damage_##name }
#define UNSUPPORTED(name)                                                                          \
    { #name, FKV_ERR_UNSUPPORTED, damage_##name }
const struct damage fixture_damages[] = {
    INVALID(size_zero),          INVALID(size_short),
    INVALID(size_wild),          INVALID(dtype_none),
    UNSUPPORTED(dtype_unknown),  UNSUPPORTED(dtype_negative),
    UNSUPPORTED(device_cuda),    UNSUPPORTED(device_unknown),
    INVALID(device_id),          UNSUPPORTED(reserved),
    INVALID(data_null),          INVALID(data_odd),
    INVALID(length_short),       INVALID(length_zero),
    INVALID(ndim_zero),          INVALID(ndim_less),
    INVALID(ndim_more),          INVALID(ndim_beyond),
    INVALID(ndim_negative),      INVALID(tokens_more),
    INVALID(tokens_less),        INVALID(tokens_zero),
    INVALID(tokens_negative),    INVALID(tokens_most),
    INVALID(tokens_least),       INVALID(heads_more),
    INVALID(heads_less),         INVALID(heads_most),
    INVALID(last_more),          INVALID(last_zero),
    INVALID(stride_zero),        INVALID(stride_negative),
    INVALID(stride_partial),     INVALID(stride_beyond),
    INVALID(stride_most),        INVALID(stride_least),
    INVALID(head_stride_zero),   INVALID(head_stride_negative),
    INVALID(head_stride_beyond), INVALID(last_stride_zero),
    INVALID(last_stride_gap),
};
const int fixture_n_damages = sizeof fixture_damages / sizeof *fixture_damages;

size_t fixture_q_floats(const struct fixture *f, int64_t tokens) {
    return (size_t)tokens * (size_t)f->options.q_heads * (size_t)f->options.dim;
}

fkv_status fixture_update(fkv_plan *plan, fkv_sequence id, int64_t tokens) {
    fkv_batch batch;
    fkv_batch_init(&batch, sizeof batch);
    batch.count = 1;
    batch.sequences = &id;
    batch.n_new = &tokens;
    return fkv_plan_update(plan, &batch);
}

fkv_status fixture_layer(struct fixture *f, fkv_plan *plan, const struct stream *s, int64_t tokens,
                         int layer, float *out, float *lse) {
    const struct options *o = &f->options;
    size_t floats = fixture_q_floats(f, tokens);
    float *memory = malloc((4 * floats + 1) * sizeof *memory);
    float *q = memory, *k = q + floats, *v = k + floats, *unused = v + floats;
    fixture_values(q, s->length, tokens, o->q_heads, o->dim, s->number, layer, 'q');
    fixture_values(k, s->length, tokens, o->kv_heads, o->dim, s->number, layer, 'k');
    fixture_values(v, s->length, tokens, o->kv_heads, o->dim, s->number, layer, 'v');
    fkv_tensor tq = fixture_tensor(q, FKV_DTYPE_F32, tokens, o->q_heads, o->dim);
    fkv_tensor tk = fixture_tensor(k, FKV_DTYPE_F32, tokens, o->kv_heads, o->dim);
    fkv_tensor tv = fixture_tensor(v, FKV_DTYPE_F32, tokens, o->kv_heads, o->dim);
    fkv_tensor to = fixture_tensor(out ? out : unused, FKV_DTYPE_F32, tokens, o->q_heads, o->dim);
    fkv_tensor tl = fixture_lse(lse ? lse : unused, tokens, o->q_heads);
    fkv_status status = fkv_append_attend(plan, layer, &tq, &tk, &tv, &to, lse ? &tl : NULL);
    free(memory);
    return status;
}

fkv_status fixture_step(struct fixture *f, fkv_plan *plan, struct stream *s, int64_t tokens,
                        float *out, float *lse) {
    size_t heads = (size_t)tokens * (size_t)f->options.q_heads;
    fkv_status status = fixture_update(plan, s->id, tokens);
    for (int layer = 0; !status && layer < f->options.layers; layer++)
        status = fixture_layer(f, plan, s, tokens, layer,
                               out ? out + (size_t)layer * fixture_q_floats(f, tokens) : NULL,
                               lse ? lse + (size_t)layer * heads : NULL);
    if (!status)
        s->length += tokens;
    return status;
}

struct stream fixture_stream(struct fixture *f, uint64_t number, int64_t tokens) {
    struct stream s = {.number = number};
    fkv_plan *plan;
    assert_int_equal(fkv_sequence_create(f->cache, NULL, &s.id), FKV_OK);
    assert_int_equal(fkv_plan_create(f->cache, &plan), FKV_OK);
    assert_int_equal(fixture_step(f, plan, &s, tokens, NULL, NULL), FKV_OK);
    assert_int_equal(fkv_plan_destroy(plan), FKV_OK);
    return s;
}

uint64_t fixture_hash(uint64_t hash, const void *data, size_t bytes) {
    const unsigned char *p = data;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ p[i]) * 0x100000001b3u;
    return hash;
}

uint64_t fixture_digest(struct fixture *f, fkv_sequence id) {
    const struct options *o = &f->options;
    fkv_stats stats = {.struct_size = sizeof stats};
    int64_t length;
    assert_int_equal(fkv_sequence_length(f->cache, id, &length), FKV_OK);
    assert_int_equal(fkv_cache_stats(f->cache, id, &stats), FKV_OK);
    uint64_t hash = fixture_hash(0xcbf29ce484222325u, &length, sizeof length);
    hash = fixture_hash(hash, &stats, sizeof stats);
    size_t bytes = (size_t)length * (size_t)o->kv_heads * (size_t)o->dim * sizeof(float);
    float *k = malloc(2 * bytes + 1), *v = k + bytes / sizeof *k;
    fkv_tensor tk = fixture_tensor(k, FKV_DTYPE_F32, length, o->kv_heads, o->dim);
    fkv_tensor tv = fixture_tensor(v, FKV_DTYPE_F32, length, o->kv_heads, o->dim);
    for (int layer = 0; layer < o->layers; layer++) {
        assert_int_equal(fkv_sequence_read(f->cache, id, layer, 0, length, &tk, &tv), FKV_OK);
        hash = fixture_hash(hash, k, 2 * bytes);
    }
    free(k);
    return hash;
}

const char *fixture_message(struct fixture *f) {
    static _Thread_local char text[1024];
    text[0] = 0;
    fkv_context_message(f->ctx, text, sizeof text, NULL);
    return text;
}
