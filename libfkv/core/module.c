/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Finding and loading the module libfkv-cuda. Never from the current directory or the program's, and never
 * unloaded: the driver keeps threads and callbacks of its own.
 */
#define _GNU_SOURCE
#include "core/core.h"

#include "backend_cuda.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#define MODULE_NAME "libfkv-cuda.so.0"
#define MODULE_VARIABLE "FKV_CUDA_MODULE"

static fkv_status choose(struct fkv_ctx *ctx, const char *given, const char **path) {
    *path = given;
    if (given && *given) {
        return FKV_OK;
    }
    *path = secure_getenv(MODULE_VARIABLE);
    if (*path && **path) {
        if (**path != '/') {
            return fkv_fail(ctx, FKV_ERR_INVALID, "%s: \"%.200s\" is no absolute path",
                            MODULE_VARIABLE, *path);
        }
        return FKV_OK;
    }
    *path = MODULE_NAME; /* beside libfkv, through its RUNPATH */
    return FKV_OK;
}

fkv_status fkv_module_load(struct fkv_ctx *ctx, const char *given) {
    const char *path;
    fkv_status status = choose(ctx, given, &path);
    if (status != FKV_OK) {
        return status;
    }
    void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!module) {
        const char *why = dlerror();
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED, "the CUDA module cannot be loaded: %.300s",
                        why ? why : path);
    }
    fkv_cuda_module_fn entry = NULL;
    void *symbol = dlsym(module, FKV_MODULE_ENTRY);
    memcpy(&entry, &symbol, sizeof entry);
    if (!entry) {
        return fkv_fail(ctx, FKV_ERR_VERSION, "%.300s is no module of libfkv", path);
    }
    const struct fkv_cuda_ops *ops = entry(FKV_MODULE_HANDSHAKE, fkv_version_string());
    if (!ops || ops->struct_size != sizeof *ops || ops->abi != FKV_MODULE_ABI) {
        return fkv_fail(ctx, FKV_ERR_VERSION, "%.300s is of another version than libfkv %s", path,
                        fkv_version_string());
    }
    ctx->cuda = ops;
    return FKV_OK;
}

fkv_status fkv_module_open_device(struct fkv_ctx *ctx, int device) {
    struct fkv_cuda_info info = {.device = -1};
    int error = ctx->cuda->open(device, &info);
    if (error) {
        void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
        if (driver) {
            dlclose(driver);
        }
        return fkv_fail(ctx, FKV_ERR_DEVICE, "CUDA device %d: %s%s", device, ctx->cuda->text(error),
                        driver ? "" : "; there is no driver (libcuda.so.1) on this system");
    }
    if (info.major < 8) {
        return fkv_fail(ctx, FKV_ERR_UNSUPPORTED,
                        "CUDA device %d (%s): compute capability %d.%d, at least 8.0 is needed",
                        device, info.name, info.major, info.minor);
    }
    ctx->device = device;
    ctx->multiprocessors = info.multiprocessors;
    return FKV_OK;
}

fkv_status fkv_module_check_stream(struct fkv_ctx *ctx, void *stream) {
    int device = -1;
    int error = stream ? ctx->cuda->stream_device(stream, &device) : 0;
    if (error) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "stream: %s", ctx->cuda->text(error));
    }
    if (device >= 0 && device != ctx->device) {
        return fkv_fail(ctx, FKV_ERR_INVALID, "stream is of CUDA device %d, the context of %d",
                        device, ctx->device);
    }
    return FKV_OK;
}
