/* SPDX-License-Identifier: Apache-2.0 */
#include "core/core.h"

#include <string.h>

/* No struct of any version comes near this; a larger size is an uninitialised field, not a newer one,
 * and looking for its tail would leave the caller's memory. */
#define MAX_STRUCT 4096u

static fkv_status read_size(struct fkv_ctx *ctx, const char *name, const void *p, size_t min_size,
                            size_t *size) {
    if (!p) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "%s is NULL", name);
    }
    uint32_t struct_size;
    memcpy(&struct_size, p, sizeof struct_size);
    if (struct_size < min_size || struct_size > MAX_STRUCT) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "%s: struct_size is %lu, not in %zu..%u", name,
                        (unsigned long)struct_size, min_size, MAX_STRUCT);
    }
    *size = struct_size;
    return FKV_OK;
}

fkv_status fkv_params_read(struct fkv_ctx *ctx, const char *name, const void *src, size_t min_size,
                           void *dst, size_t dst_size) {
    size_t size = 0;
    fkv_status status = read_size(ctx, name, src, min_size, &size);
    if (status != FKV_OK) {
        return status;
    }
    const unsigned char *bytes = src;
    for (size_t i = dst_size; i < size; i++) {
        if (bytes[i] != 0) {
            return fkv_fail(ctx, FKV_ERR_UNSUPPORTED,
                            "%s: byte %zu is set, beyond the %zu bytes this library knows", name, i,
                            dst_size);
        }
    }
    size_t known = size < dst_size ? size : dst_size;
    uint32_t own_size = (uint32_t)dst_size;
    memcpy(dst, src, known);
    memset((char *)dst + known, 0, dst_size - known);
    memcpy(dst, &own_size, sizeof own_size);
    return FKV_OK;
}

fkv_status fkv_params_write(struct fkv_ctx *ctx, const char *name, void *dst, size_t min_size,
                            const void *src, size_t src_size) {
    size_t size = 0;
    fkv_status status = read_size(ctx, name, dst, min_size, &size);
    if (status != FKV_OK) {
        return status;
    }
    size_t known = size < src_size ? size : src_size;
    size_t skip = sizeof(uint32_t);
    memcpy((char *)dst + skip, (const char *)src + skip, known - skip);
    memset((char *)dst + known, 0, size - known);
    return FKV_OK;
}

fkv_status fkv_params_init(void *dst, size_t struct_size, size_t min_size, const void *defaults,
                           size_t defaults_size) {
    if (!dst || struct_size < min_size || struct_size > MAX_STRUCT) {
        return FKV_ERR_INVALID;
    }
    uint32_t size = (uint32_t)struct_size;
    memcpy(dst, &size, sizeof size);
    return fkv_params_write(NULL, "", dst, min_size, defaults, defaults_size);
}
