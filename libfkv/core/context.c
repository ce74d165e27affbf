/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "core/core.h"

#include "backend.h"
#include "kernels/kernels.h"

#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Size of fkv_context_params in the first release. */
#define FIRST_PARAMS offsetof(fkv_context_params, device_id)
#define DEFAULT_MAX_TOKENS (UINT64_C(1) << 26)
#define MAX_MAX_TOKENS (UINT64_C(1) << 31) /* positions are below 2^31 */
#define DEFAULT_MAX_FILE_BYTES (UINT64_C(64) << 20)
/* Tokens of a middle from which an index of keys is searched; measured, see attend/sift.c. */
#define DEFAULT_SIFT_FROM 6144

static void lock_message(struct fkv_ctx *ctx) {
    while (atomic_exchange_explicit(&ctx->message_lock, 1, memory_order_acquire)) {
        sched_yield();
    }
}

static void unlock_message(struct fkv_ctx *ctx) {
    atomic_store_explicit(&ctx->message_lock, 0, memory_order_release);
}

fkv_status fkv_fail(struct fkv_ctx *ctx, fkv_status status, const char *format, ...) {
    if (!ctx) {
        return status;
    }
    char text[sizeof ctx->message];
    va_list args;
    va_start(args, format);
    if (vsnprintf(text, sizeof text, format, args) < 0) {
        text[0] = '\0';
    }
    va_end(args);
    for (char *p = text; *p; p++) {
        if ((unsigned char)*p < ' ' || *p == 0x7f) {
            *p = '?'; /* names out of files must not steer a terminal or fake a log line */
        }
    }
    lock_message(ctx);
    memcpy(ctx->message, text, sizeof text);
    unlock_message(ctx);
    return status;
}

fkv_status fkv_fail_memory(struct fkv_ctx *ctx, size_t bytes, const char *what) {
    if (fkv_heap_status(&ctx->heap, bytes) == FKV_ERR_LIMIT) {
        return fkv_fail(ctx, FKV_ERR_LIMIT, "%s: %zu bytes would pass max_bytes", what, bytes);
    }
    return fkv_fail(ctx, FKV_ERR_NOMEM, "%s: no memory for %zu bytes", what, bytes);
}

void fkv_ctx_message(struct fkv_ctx *ctx, char text[512]) {
    lock_message(ctx);
    memcpy(text, ctx->message, sizeof ctx->message);
    unlock_message(ctx);
}

static fkv_status check_backend(struct fkv_ctx *ctx, const fkv_context_params *p) {
    ctx->backend = p->backend;
    if (p->backend == FKV_BACKEND_CPU && (p->device_id || p->module_path || p->stream)) {
        return fkv_fail(ctx, FKV_ERR_INVALID,
                        "device_id, module_path and stream are of the CUDA backend");
    }
    if (p->reserved) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED, "params.reserved is not zero");
    }
    if (p->backend != FKV_BACKEND_CPU && p->backend != FKV_BACKEND_CUDA) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED, "unknown backend %d", (int)p->backend);
    }
    ctx->best_cpu_level = fkv_cpu_best_level();
    ctx->cpu_level = p->cpu_level == FKV_CPU_BEST ? ctx->best_cpu_level : p->cpu_level;
    if (ctx->cpu_level < FKV_CPU_REFERENCE || ctx->cpu_level > FKV_CPU_AVX512) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED, "unknown cpu_level %d", (int)p->cpu_level);
    }
    if (ctx->cpu_level > ctx->best_cpu_level) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED,
                        "cpu_level %d: this processor and build have %d at best", (int)p->cpu_level,
                        (int)ctx->best_cpu_level);
    }
    ctx->flags = p->flags;
    if (p->flags & ~(uint64_t)FKV_CONTEXT_PROPAGATE_NONFINITE) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED, "unknown bits in flags 0x%llx",
                        (unsigned long long)p->flags);
    }
    return FKV_OK;
}

static fkv_status open_backend(struct fkv_ctx *ctx, const fkv_context_params *p) {
    if (p->backend != FKV_BACKEND_CUDA) {
        return FKV_OK;
    }
    fkv_status status = fkv_module_load(ctx, p->module_path);
    if (status == FKV_OK) {
        status = fkv_module_open_device(ctx, p->device_id);
    }
    ctx->stream = p->stream;
    return status == FKV_OK ? fkv_module_check_stream(ctx, p->stream) : status;
}

static fkv_status check_limits(struct fkv_ctx *ctx, const fkv_context_params *p) {
    if ((p->alloc == NULL) != (p->free == NULL)) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "alloc and free must be set together");
    }
    if (p->threads < 0) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "threads is %d", (int)p->threads);
    }
    if (p->threads > FKV_MAX_THREADS) {
        return fkv_fail(ctx, FKV_ERR_LIMIT, "threads is %d, at most %d", (int)p->threads,
                        FKV_MAX_THREADS);
    }
    if (p->max_tokens > MAX_MAX_TOKENS) {
        return fkv_fail(ctx, FKV_ERR_LIMIT, "max_tokens is %llu, at most 2^31",
                        (unsigned long long)p->max_tokens);
    }
    ctx->threads = p->threads > 0 ? p->threads : fkv_online_processors();
    ctx->max_tokens = p->max_tokens > 0 ? p->max_tokens : DEFAULT_MAX_TOKENS;
    ctx->sift_from = DEFAULT_SIFT_FROM;
    ctx->max_file_bytes = p->max_file_bytes > 0 ? p->max_file_bytes : DEFAULT_MAX_FILE_BYTES;
    ctx->heap.alloc = p->alloc;
    ctx->heap.free = p->free;
    ctx->heap.user = p->alloc_user;
    ctx->heap.max_bytes = p->max_bytes;
    return FKV_OK;
}

/* Frees what a context owns, and itself, through its own heap: that has to live outside it for the last
 * call. */
static void destroy(struct fkv_ctx *ctx) {
    fkv_pool_destroy(ctx->pool);
    fkv_heap_free(&ctx->heap, ctx->kernels, sizeof *ctx->kernels);
    struct fkv_heap heap = {
        .alloc = ctx->heap.alloc, .free = ctx->heap.free, .user = ctx->heap.user};
    fkv_heap_free(&heap, ctx, sizeof *ctx);
}

/* Turns the checked description into an object on its own heap. */
static fkv_status build(struct fkv_ctx *description, struct fkv_ctx **out) {
    struct fkv_ctx *ctx = fkv_heap_alloc(&description->heap, sizeof *ctx);
    if (!ctx) {
        return fkv_fail_memory(description, sizeof *ctx, "context");
    }
    memcpy(ctx, description, sizeof *ctx); /* the count of its own bytes included */
    atomic_init(&ctx->refs, 1);
    ctx->ops = fkv_backend_cpu();
    ctx->kernels = fkv_heap_calloc(&ctx->heap, sizeof *ctx->kernels);
    fkv_status status = FKV_OK;
    if (ctx->kernels) {
        fkv_kernels_init(ctx->kernels, ctx->cpu_level);
        status = fkv_pool_create(&ctx->heap, ctx->threads, &ctx->pool);
    } else {
        status = fkv_heap_status(&ctx->heap, sizeof *ctx->kernels);
    }
    if (status != FKV_OK) {
        destroy(ctx);
        return fkv_fail(description, status, "context with %d threads: %s", description->threads,
                        status == FKV_ERR_NOMEM ? "no memory" : "a limit refuses it");
    }
    *out = ctx;
    return FKV_OK;
}

void fkv_ctx_report(const fkv_context_params *params, const char *text) {
    if (params && params->message && params->message_bytes > 0) {
        size_t room = params->message_bytes < SIZE_MAX ? (size_t)params->message_bytes : SIZE_MAX;
        size_t n = strlen(text);
        n = n < room ? n : room - 1;
        memcpy(params->message, text, n);
        params->message[n] = '\0';
    }
}

fkv_status fkv_ctx_create(const fkv_context_params *params, struct fkv_ctx **out) {
    struct fkv_ctx description;
    fkv_context_params p = {.struct_size = sizeof p};
    memset(&description, 0, sizeof description);
    fkv_status status =
        params ? fkv_params_read(&description, "params", params, FIRST_PARAMS, &p, sizeof p)
               : FKV_OK;
    bool can_report = status != FKV_ERR_INVALID; /* else the struct may not reach to `message` */
    if (status == FKV_OK) {
        status = check_backend(&description, &p);
    }
    if (status == FKV_OK) {
        status = check_limits(&description, &p);
    }
    if (status == FKV_OK) {
        status = open_backend(&description, &p);
    }
    if (status == FKV_OK) {
        status = build(&description, out);
    }
    if (status != FKV_OK && can_report) {
        fkv_ctx_report(params, description.message);
    }
    return status;
}

void fkv_ctx_ref(struct fkv_ctx *ctx) {
    atomic_fetch_add_explicit(&ctx->refs, 1, memory_order_relaxed);
}

void fkv_ctx_unref(struct fkv_ctx *ctx) {
    if (ctx && atomic_fetch_sub_explicit(&ctx->refs, 1, memory_order_acq_rel) == 1) {
        destroy(ctx);
    }
}
