/* SPDX-License-Identifier: Apache-2.0 */
/* A module in front of the real one, whose memory ends when a test says so. FKV_REAL_MODULE is the real one's path. */
#define _GNU_SOURCE
#include "backend_cuda.h"

#include "fault_module.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#define OUT_OF_MEMORY 2 /* cudaErrorMemoryAllocation */

static const struct fkv_cuda_ops *real;
static struct fkv_cuda_ops table;
static int left = -1; /* requests that are still granted; -1: all */
static int refused;

static int grant(void) {
    if (left > 0) {
        left--;
    } else if (!left) {
        refused++;
        return 0;
    }
    return 1;
}

static int limited_alloc(int device, size_t bytes, uint64_t *address) {
    *address = 0;
    return grant() ? real->alloc(device, bytes, address) : OUT_OF_MEMORY;
}

static int limited_alloc_host(int device, size_t bytes, void **pointer) {
    *pointer = NULL;
    return grant() ? real->alloc_host(device, bytes, pointer) : OUT_OF_MEMORY;
}

void fault_after(int requests) {
    left = requests;
    refused = 0;
}

int fault_count(void) {
    return refused;
}

const struct fkv_cuda_ops *fkv_cuda_module(uint32_t handshake, const char *version) {
    void *module = dlopen(getenv("FKV_REAL_MODULE"), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    fkv_cuda_module_fn entry = NULL;
    void *symbol = module ? dlsym(module, FKV_MODULE_ENTRY) : NULL;
    memcpy(&entry, &symbol, sizeof entry);
    real = entry ? entry(handshake, version) : NULL;
    if (!real) {
        return NULL;
    }
    table = *real;
    table.alloc = limited_alloc;
    table.alloc_host = limited_alloc_host;
    return &table;
}
