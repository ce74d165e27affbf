/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What every room stands on: the heap that counts, checked arithmetic, the text of errors, handles,
 * tensor views, parameter structs, and the thread pool. Nothing here knows of keys or values.
 */
#ifndef FKV_CORE_CORE_H
#define FKV_CORE_CORE_H

#include "fkv/fkv.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fkv_kernels;
struct fkv_backend_ops;
struct fkv_cuda_ops;
struct fkv_pool;

/* ---- memory.c: every byte of cached data and workspace passes here, so that the count is the truth */

struct fkv_heap {
    fkv_alloc_fn alloc;
    fkv_free_fn free;
    void *user;
    uint64_t max_bytes;
    _Atomic uint64_t live;
    _Atomic uint64_t peak;
};

/* Aligned to 64 bytes; NULL if the allocator or the limit refuses. bytes 0 gives NULL without failing
 * callers that ask for nothing: test bytes first. */
void *fkv_heap_alloc(struct fkv_heap *heap, size_t bytes);
void *fkv_heap_calloc(struct fkv_heap *heap, size_t bytes);
/* `bytes` as asked for; pointer may be NULL. */
void fkv_heap_free(struct fkv_heap *heap, void *pointer, size_t bytes);
/* Why the heap just refused `bytes`: LIMIT if max_bytes did, else NOMEM. */
fkv_status fkv_heap_status(struct fkv_heap *heap, size_t bytes);

/* false on overflow; *out is then unspecified */
static inline bool fkv_mul_size(size_t a, size_t b, size_t *out) {
    return !__builtin_mul_overflow(a, b, out);
}
static inline bool fkv_add_size(size_t a, size_t b, size_t *out) {
    return !__builtin_add_overflow(a, b, out);
}
/* count * size + extra */
static inline bool fkv_size(size_t count, size_t size, size_t extra, size_t *out) {
    return fkv_mul_size(count, size, out) && fkv_add_size(*out, extra, out);
}
static inline int64_t fkv_min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t fkv_max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static inline int64_t fkv_ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/* ---- context.c: the object behind fkv_context; lives until the last object made from it is gone */

struct fkv_ctx {
    _Atomic int refs;
    struct fkv_heap heap;
    uint64_t max_tokens;
    uint64_t max_file_bytes;
    uint64_t flags;
    fkv_backend backend;
    fkv_cpu_level cpu_level;
    fkv_cpu_level best_cpu_level;
    int threads;
    int64_t sift_from; /* see attend/sift.c; tests set it to 0 */
    const struct fkv_backend_ops *ops;
    struct fkv_kernels *kernels;
    struct fkv_pool *pool;
    /* of the CUDA backend; cuda is NULL for the CPU's */
    const struct fkv_cuda_ops *cuda;
    int device, multiprocessors;
    void *stream;
    _Atomic int message_lock; /* spin: only a short copy is done under it */
    char message[512];
};

fkv_status fkv_ctx_create(const fkv_context_params *params, struct fkv_ctx **out);
void fkv_ctx_ref(struct fkv_ctx *ctx);
void fkv_ctx_unref(struct fkv_ctx *ctx);
/* Sets the context's message and returns `status`, so that callers write: return fkv_fail(...). */
fkv_status fkv_fail(struct fkv_ctx *ctx, fkv_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* fkv_fail() with fkv_heap_status() after a NULL from the context's heap. */
fkv_status fkv_fail_memory(struct fkv_ctx *ctx, size_t bytes, const char *what);
/* The text that the last fkv_fail() left. */
void fkv_ctx_message(struct fkv_ctx *ctx, char text[512]);
/* Puts the reason why there is no context into params->message. */
void fkv_ctx_report(const fkv_context_params *params, const char *text);

/* ---- module.c: the CUDA backend's module and its device, into ctx->cuda */

fkv_status fkv_module_load(struct fkv_ctx *ctx, const char *path);
fkv_status fkv_module_open_device(struct fkv_ctx *ctx, int device);
/* That a stream is of the context's device. */
fkv_status fkv_module_check_stream(struct fkv_ctx *ctx, void *stream);

/* ---- handle.c: a process-wide table turns opaque handles into objects without touching the handle */

enum fkv_kind {
    FKV_KIND_CONTEXT = 1,
    FKV_KIND_PROFILE,
    FKV_KIND_CALIBRATOR,
    FKV_KIND_CACHE,
    FKV_KIND_PLAN
};

/* NULL if there is no memory for the entry. */
void *fkv_handle_create(enum fkv_kind kind, void *object);
/* The object, with one more user; NULL if the handle is not living or of another kind. */
void *fkv_handle_acquire(enum fkv_kind kind, const void *handle);
void fkv_handle_release(const void *handle);
/* Ends the handle: HANDLE, or BUSY while it has users; on OK *object is the caller's to release. */
fkv_status fkv_handle_close(enum fkv_kind kind, const void *handle, void **object);

/* ---- params.c: parameter structs of other versions */

/* Copies a caller's struct into `dst` (dst_size bytes, zero-filled behind a shorter one).
 * min_size: the size in the first release. INVALID if src is NULL or too short, UNSUPPORTED if a
 * longer one has non-zero bytes that this library does not know. */
fkv_status fkv_params_read(struct fkv_ctx *ctx, const char *name, const void *src, size_t min_size,
                           void *dst, size_t dst_size);
/* Copies `src` (src_size bytes) to a caller's output struct, at most its own struct_size, which stays. */
fkv_status fkv_params_write(struct fkv_ctx *ctx, const char *name, void *dst, size_t min_size,
                            const void *src, size_t src_size);
/* What the exported _init functions do: `defaults` to a caller's struct of struct_size bytes. */
fkv_status fkv_params_init(void *dst, size_t struct_size, size_t min_size, const void *defaults,
                           size_t defaults_size);

/* ---- tensor.c: checked views */

/* A tensor of [tokens, heads, dim] (or [tokens, heads] with dim 1) after all checks. Strides in bytes. */
struct fkv_view {
    char *data;
    fkv_dtype dtype;
    int64_t token_stride;
    int64_t head_stride;
};

size_t fkv_dtype_size(fkv_dtype dtype); /* 0 for an unknown type */
/* Checks everything the header says of token tensors and fills *view. `name` is the argument's name in
 * messages. dim < 0: the tensor has two dimensions and is f32. */
fkv_status fkv_tensor_view(struct fkv_ctx *ctx, const char *name, const fkv_tensor *tensor,
                           int64_t tokens, int64_t heads, int64_t dim, bool output,
                           struct fkv_view *view);

/* ---- pool.c: one job at a time over the context's threads, the caller being one of them */

/* Runs fn(arg, item, thread) for item 0..items-1; thread is 0..threads-1 and picks scratch space.
 * Items are handed out in ascending order. Concurrent calls wait for one another. */
typedef void (*fkv_pool_fn)(void *arg, int64_t item, int thread);
#define FKV_MAX_THREADS 256
/* Processors this process may run on, at most FKV_MAX_THREADS. */
int fkv_online_processors(void);
fkv_status fkv_pool_create(struct fkv_heap *heap, int threads, struct fkv_pool **out);
void fkv_pool_destroy(struct fkv_pool *pool);
void fkv_pool_run(struct fkv_pool *pool, int64_t items, fkv_pool_fn fn, void *arg);

/* ---- half.c: scalar conversions, round to nearest even; the kernels have their own wide ones */

float fkv_f16_to_f32(uint16_t h);
uint16_t fkv_f32_to_f16(float x);
float fkv_bf16_to_f32(uint16_t h);
uint16_t fkv_f32_to_bf16(float x);
/* One element of an array of any type. */
float fkv_load_element(const void *p, fkv_dtype dtype);
void fkv_store_element(void *p, fkv_dtype dtype, float x);

#endif /* FKV_CORE_CORE_H */
