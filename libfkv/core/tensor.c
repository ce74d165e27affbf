/* SPDX-License-Identifier: Apache-2.0 */
#include "core/core.h"

#include "backend_cuda.h"

#include <string.h>

size_t fkv_dtype_size(fkv_dtype dtype) {
    switch (dtype) {
    case FKV_DTYPE_F32:
        return 4;
    case FKV_DTYPE_F16:
    case FKV_DTYPE_BF16:
        return 2;
    default:
        return 0;
    }
}

/* That the memory is the context's device's, as far as the driver knows it. */
static fkv_status check_place(struct fkv_ctx *ctx, const char *name, const fkv_tensor *t) {
    int yes = 1;
    if (t->device != FKV_DEVICE_CUDA || t->device_id != ctx->device) {
        return fkv_fail(ctx, FKV_ERR_INVALID,
                        "%s: device %d, %d; the context's is FKV_DEVICE_CUDA, %d", name,
                        (int)t->device, (int)t->device_id, ctx->device);
    }
    if (t->reserved != 0) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED, "%s: reserved is not 0", name);
    }
    if (t->data && !ctx->cuda->owns(ctx->device, (uint64_t)(uintptr_t)t->data, &yes) && !yes) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "%s: data is no memory of CUDA device %d", name,
                        ctx->device);
    }
    return FKV_OK;
}

static fkv_status check_type(struct fkv_ctx *ctx, const char *name, const fkv_tensor *t,
                             bool only_f32) {
    if (t->dtype == FKV_DTYPE_NONE) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "%s: dtype is not set", name);
    }
    if (fkv_dtype_size(t->dtype) == 0) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED, "%s: unknown dtype %d", name, (int)t->dtype);
    }
    if (only_f32 && t->dtype != FKV_DTYPE_F32) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "%s: must be f32", name);
    }
    if (ctx && ctx->cuda) {
        return check_place(ctx, name, t);
    }
    if (t->device != FKV_DEVICE_CPU) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED, "%s: device %d is not that of the context", name,
                        (int)t->device);
    }
    if (t->device_id != 0) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "%s: device_id is %d, the CPU is 0", name,
                        (int)t->device_id);
    }
    if (t->reserved != 0) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED, "%s: reserved is not 0", name);
    }
    return FKV_OK;
}

static fkv_status check_shape(struct fkv_ctx *ctx, const char *name, const fkv_tensor *t,
                              const int64_t *expected, int ndim) {
    if (t->ndim != ndim) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "%s: %d dimensions, expected %d", name, (int)t->ndim,
                        ndim);
    }
    for (int i = 0; i < ndim; i++) {
        if (t->shape[i] != expected[i]) {
            return fkv_fail(ctx, FKV_ERR_INVALID, "%s: shape[%d] is %lld, expected %lld", name, i,
                            (long long)t->shape[i], (long long)expected[i]);
        }
    }
    return FKV_OK;
}

/* Strides of dimensions that have neighbours, and that everything lies within byte_length. */
static fkv_status check_extent(struct fkv_ctx *ctx, const char *name, const fkv_tensor *t) {
    int64_t element = (int64_t)fkv_dtype_size(t->dtype);
    int64_t bytes = element;
    for (int i = 0; i < t->ndim; i++) {
        int64_t step;
        if (t->shape[i] <= 1) {
            continue;
        }
        if (t->strides[i] <= 0 || t->strides[i] % element != 0) {
            return fkv_fail(ctx, FKV_ERR_INVALID,
                            "%s: strides[%d] is %lld, not a positive multiple of %lld", name, i,
                            (long long)t->strides[i], (long long)element);
        }
        if (i == t->ndim - 1 && t->strides[i] != element) {
            return fkv_fail(ctx, FKV_ERR_INVALID, "%s: the last dimension is not contiguous", name);
        }
        if (__builtin_mul_overflow(t->shape[i] - 1, t->strides[i], &step) ||
            __builtin_add_overflow(bytes, step, &bytes)) {
            return fkv_fail(ctx, FKV_ERR_INVALID, "%s: the extent overflows", name);
        }
    }
    if (!t->data) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "%s: data is NULL", name);
    }
    if ((uintptr_t)t->data % (uintptr_t)element != 0) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "%s: data is not aligned to %lld bytes", name,
                        (long long)element);
    }
    if ((uint64_t)bytes > t->byte_length || t->byte_length > UINTPTR_MAX - (uintptr_t)t->data) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "%s: byte_length is %llu, %lld needed", name,
                        (unsigned long long)t->byte_length, (long long)bytes);
    }
    return FKV_OK;
}

/* Whether two rows of `row` bytes share bytes. Rows lie at i * near + j * far, i < n, j < m, near <= far.
 * It is enough to compare the first row of the first run with the rows of the others that come closest. */
static bool rows_overlap(int64_t near, int64_t n, int64_t far, int64_t m, int64_t row) {
    if (n > 1 && near < row) {
        return true;
    }
    for (int64_t j = 1; j < m && j * far < (n - 1) * near + row; j++) {
        int64_t i = fkv_min64(j * far / near, n - 1);
        int64_t ahead = j * far - i * near;
        if (ahead < row || (i + 1 < n && near - ahead < row)) {
            return true;
        }
    }
    return false;
}

static bool overlaps_itself(const struct fkv_view *v, int64_t tokens, int64_t heads, int64_t row) {
    return v->token_stride < v->head_stride
               ? rows_overlap(v->token_stride, tokens, v->head_stride, heads, row)
               : rows_overlap(v->head_stride, heads, v->token_stride, tokens, row);
}

fkv_status fkv_tensor_view(struct fkv_ctx *ctx, const char *name, const fkv_tensor *tensor,
                           int64_t tokens, int64_t heads, int64_t dim, bool output,
                           struct fkv_view *view) {
    fkv_tensor t;
    fkv_status status = fkv_params_read(ctx, name, tensor, sizeof t, &t, sizeof t);
    if (status != FKV_OK) {
        return status;
    }
    const int64_t expected[3] = {tokens, heads, dim};
    bool by_head = dim >= 0;
    status = check_type(ctx, name, &t, !by_head);
    if (status == FKV_OK) {
        status = check_shape(ctx, name, &t, expected, by_head ? 3 : 2);
    }
    bool empty = tokens == 0 || heads == 0 || dim == 0;
    if (status == FKV_OK && !empty) {
        status = check_extent(ctx, name, &t);
    }
    if (status != FKV_OK) {
        return status;
    }
    /* a stride that separates nothing may hold anything: replace it by that of a packed array */
    int64_t row = (int64_t)fkv_dtype_size(t.dtype) * (by_head ? dim : 1);
    struct fkv_view v = {.data = t.data, .dtype = t.dtype};
    v.head_stride = empty || heads == 1 ? row : t.strides[1];
    v.token_stride = empty || tokens == 1 ? heads * v.head_stride : t.strides[0];
    if (output && !empty && overlaps_itself(&v, tokens, heads, row)) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "%s: an output must not overlap itself", name);
    }
    *view = v;
    return FKV_OK;
}
