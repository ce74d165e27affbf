/* SPDX-License-Identifier: Apache-2.0 */
#include "core/core.h"

#include "backend_cuda.h"

#include <string.h>

#ifndef FKV_HAVE_CUDA
#define FKV_HAVE_CUDA 0
#endif

#define TEXT_OF(x) #x
#define VERSION_TEXT(major, minor, patch) TEXT_OF(major) "." TEXT_OF(minor) "." TEXT_OF(patch)

const char *fkv_version_string(void) {
    return VERSION_TEXT(FKV_VERSION_MAJOR, FKV_VERSION_MINOR, FKV_VERSION_PATCH);
}

uint32_t fkv_abi_version(void) {
    return FKV_ABI_VERSION;
}

const char *fkv_status_string(fkv_status status) {
#define NAME(code)                                                                                 \
    case code:                                                                                     \
        return #code
    switch (status) {
        NAME(FKV_OK);
        NAME(FKV_ERR_INVALID);
        NAME(FKV_ERR_HANDLE);
        NAME(FKV_ERR_STATE);
        NAME(FKV_ERR_NOMEM);
        NAME(FKV_ERR_LIMIT);
        NAME(FKV_ERR_NONFINITE);
        NAME(FKV_ERR_IO);
        NAME(FKV_ERR_FORMAT);
        NAME(FKV_ERR_CHECKSUM);
        NAME(FKV_ERR_VERSION);
        NAME(FKV_ERR_MISMATCH);
        NAME(FKV_ERR_UNSUPPORTED);
        NAME(FKV_ERR_DEVICE);
        NAME(FKV_ERR_BUSY);
        NAME(FKV_ERR_BUFFER);
    default:
        return "unknown status";
    }
#undef NAME
}

fkv_status fkv_tensor_init(fkv_tensor *tensor, void *data, fkv_dtype dtype, int32_t ndim,
                           const int64_t *shape) {
    int64_t element = (int64_t)fkv_dtype_size(dtype);
    if (!tensor || !shape || element == 0 || ndim < 1 || ndim > FKV_MAX_NDIM) {
        return FKV_ERR_INVALID;
    }
    fkv_tensor t = {.struct_size = sizeof t, .dtype = dtype, .data = data, .ndim = ndim};
    int64_t stride = element;
    bool empty = false;
    for (int i = ndim - 1; i >= 0; i--) {
        if (shape[i] < 0) {
            return FKV_ERR_INVALID;
        }
        t.shape[i] = shape[i];
        t.strides[i] = stride;
        if (__builtin_mul_overflow(stride, fkv_max64(shape[i], 1), &stride)) {
            return FKV_ERR_LIMIT;
        }
        empty = empty || shape[i] == 0;
    }
    if (!data && !empty) {
        return FKV_ERR_INVALID;
    }
    t.byte_length = empty ? 0 : (uint64_t)stride;
    *tensor = t;
    return FKV_OK;
}

fkv_status fkv_context_params_init(fkv_context_params *params, size_t struct_size) {
    const fkv_context_params defaults = {.struct_size = sizeof defaults};
    return fkv_params_init(params, struct_size, offsetof(fkv_context_params, device_id), &defaults,
                           sizeof defaults);
}

fkv_status fkv_context_create(const fkv_context_params *params, fkv_context **out) {
    if (!out) {
        return FKV_ERR_INVALID;
    }
    *out = NULL;
    struct fkv_ctx *ctx;
    fkv_status status = fkv_ctx_create(params, &ctx);
    if (status != FKV_OK) {
        return status;
    }
    *out = fkv_handle_create(FKV_KIND_CONTEXT, ctx);
    if (!*out) {
        fkv_ctx_report(params, "no memory for a handle");
        fkv_ctx_unref(ctx);
        return FKV_ERR_NOMEM;
    }
    return FKV_OK;
}

fkv_status fkv_context_destroy(fkv_context *handle) {
    if (!handle) {
        return FKV_OK;
    }
    void *ctx;
    fkv_status status = fkv_handle_close(FKV_KIND_CONTEXT, handle, &ctx);
    if (status == FKV_OK) {
        fkv_ctx_unref(ctx);
    }
    return status;
}

fkv_status fkv_context_query(fkv_context *handle, fkv_context_info *info) {
    struct fkv_ctx *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, handle);
    if (!ctx) {
        return FKV_ERR_HANDLE;
    }
    fkv_context_info filled = {
        .struct_size = sizeof filled,
        .backend = ctx->backend,
        .threads = ctx->threads,
        .cpu_level = ctx->cpu_level,
        .live_bytes = atomic_load(&ctx->heap.live),
        .peak_bytes = atomic_load(&ctx->heap.peak),
        .best_cpu_level = ctx->best_cpu_level,
        .has_cuda = FKV_HAVE_CUDA,
    };
    /* an allocation is counted as live a moment before it raises the peak */
    filled.peak_bytes =
        filled.peak_bytes > filled.live_bytes ? filled.peak_bytes : filled.live_bytes;
    fkv_status status = fkv_params_write(ctx, "info", info, sizeof filled, &filled, sizeof filled);
    fkv_handle_release(handle);
    return status;
}

fkv_status fkv_context_message(fkv_context *handle, char *buffer, size_t bytes, size_t *needed) {
    struct fkv_ctx *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, handle);
    if (!ctx) {
        return FKV_ERR_HANDLE;
    }
    char text[sizeof ctx->message];
    fkv_ctx_message(ctx, text);
    fkv_handle_release(handle);
    bool asks = !buffer && bytes == 0 && needed;
    if (!buffer && !asks) {
        return FKV_ERR_INVALID;
    }
    size_t length = strlen(text) + 1;
    if (needed) {
        *needed = length;
    }
    if (asks) {
        return FKV_OK;
    }
    size_t n = length < bytes ? length : bytes;
    if (n > 0) {
        memcpy(buffer, text, n);
        buffer[n - 1] = '\0';
    }
    return n == length ? FKV_OK : FKV_ERR_BUFFER;
}

/* The context, if it is one of the CUDA backend. */
static fkv_status enter_cuda(fkv_context *handle, struct fkv_ctx **ctx) {
    *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, handle);
    if (!*ctx) {
        return FKV_ERR_HANDLE;
    }
    if ((*ctx)->cuda) {
        return FKV_OK;
    }
    fkv_status status = fkv_fail(*ctx, FKV_ERR_UNSUPPORTED, "the CPU backend has no streams");
    fkv_handle_release(handle);
    return status;
}

fkv_status fkv_context_set_stream(fkv_context *handle, void *stream) {
    struct fkv_ctx *ctx;
    fkv_status status = enter_cuda(handle, &ctx);
    if (status != FKV_OK) {
        return status;
    }
    status = fkv_module_check_stream(ctx, stream);
    int error = status != FKV_OK || stream == ctx->stream
                    ? 0
                    : ctx->cuda->synchronize(ctx->device, ctx->stream);
    if (error) {
        status = fkv_fail(ctx, FKV_ERR_DEVICE, "the stream so far: %s", ctx->cuda->text(error));
    } else if (status == FKV_OK) {
        ctx->stream = stream;
    }
    fkv_handle_release(handle);
    return status;
}

fkv_status fkv_context_synchronize(fkv_context *handle) {
    struct fkv_ctx *ctx = fkv_handle_acquire(FKV_KIND_CONTEXT, handle);
    if (!ctx) {
        return FKV_ERR_HANDLE;
    }
    int error = ctx->cuda ? ctx->cuda->synchronize(ctx->device, ctx->stream) : 0;
    fkv_status status =
        error ? fkv_fail(ctx, FKV_ERR_DEVICE, "stream: %s", ctx->cuda->text(error)) : FKV_OK;
    fkv_handle_release(handle);
    return status;
}
