/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "gpu.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Types of the driver's interface: handles are pointers, memory is a 64-bit number. */
typedef int result;

static struct {
    result (*Init)(unsigned);
    result (*DriverGetVersion)(int *);
    result (*DeviceGet)(int *, int);
    result (*DeviceGetName)(char *, int, int);
    result (*DevicePrimaryCtxRetain)(void **, int);
    result (*CtxSetCurrent)(void *);
    result (*CtxSynchronize)(void);
    result (*MemAlloc)(uint64_t *, size_t);
    result (*MemFree)(uint64_t);
    result (*MemsetD8)(uint64_t, unsigned char, size_t);
    result (*MemcpyHtoD)(uint64_t, const void *, size_t);
    result (*MemcpyDtoH)(void *, uint64_t, size_t);
    result (*MemcpyDtoDAsync)(uint64_t, uint64_t, size_t, void *);
    result (*MemGetInfo)(size_t *, size_t *);
    result (*StreamCreate)(void **, unsigned);
    result (*StreamDestroy)(void *);
    result (*StreamBeginCapture)(void *, int);
    result (*StreamEndCapture)(void *, void **);
    result (*EventCreate)(void **, unsigned);
    result (*EventRecord)(void *, void *);
    result (*EventSynchronize)(void *);
    result (*EventElapsedTime)(float *, void *, void *);
    result (*GraphInstantiate)(void **, void *, unsigned long long);
    result (*GraphDestroy)(void *);
    result (*GraphLaunch)(void *, void *);
    result (*GraphExecDestroy)(void *);
} cu;

static const struct {
    const char *name;
    void *slot;
} symbols[] = {
    {"cuInit", &cu.Init},
    {"cuDriverGetVersion", &cu.DriverGetVersion},
    {"cuDeviceGet", &cu.DeviceGet},
    {"cuDeviceGetName", &cu.DeviceGetName},
    {"cuDevicePrimaryCtxRetain", &cu.DevicePrimaryCtxRetain},
    {"cuCtxSetCurrent", &cu.CtxSetCurrent},
    {"cuCtxSynchronize", &cu.CtxSynchronize},
    {"cuMemAlloc_v2", &cu.MemAlloc},
    {"cuMemFree_v2", &cu.MemFree},
    {"cuMemsetD8_v2", &cu.MemsetD8},
    {"cuMemcpyHtoD_v2", &cu.MemcpyHtoD},
    {"cuMemcpyDtoH_v2", &cu.MemcpyDtoH},
    {"cuMemcpyDtoDAsync_v2", &cu.MemcpyDtoDAsync},
    {"cuMemGetInfo_v2", &cu.MemGetInfo},
    {"cuStreamCreate", &cu.StreamCreate},
    {"cuStreamDestroy_v2", &cu.StreamDestroy},
    {"cuStreamBeginCapture_v2", &cu.StreamBeginCapture},
    {"cuStreamEndCapture", &cu.StreamEndCapture},
    {"cuEventCreate", &cu.EventCreate},
    {"cuEventRecord", &cu.EventRecord},
    {"cuEventSynchronize", &cu.EventSynchronize},
    {"cuEventElapsedTime", &cu.EventElapsedTime},
    {"cuGraphInstantiateWithFlags", &cu.GraphInstantiate},
    {"cuGraphDestroy", &cu.GraphDestroy},
    {"cuGraphLaunch", &cu.GraphLaunch},
    {"cuGraphExecDestroy", &cu.GraphExecDestroy},
};

static char name[128];
static int version;

static void check(result error, const char *what) {
    if (error) {
        fprintf(stderr, "%s: CUDA driver error %d\n", what, error);
        exit(1);
    }
}

static bool load(const char **why) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!driver) {
        *why = "there is no CUDA driver (libcuda.so.1)";
        return false;
    }
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *symbol = dlsym(driver, symbols[i].name);
        if (!symbol) {
            *why = "the CUDA driver is too old";
            return false;
        }
        memcpy(symbols[i].slot, &symbol, sizeof symbol);
    }
    return true;
}

bool gpu_open(int device, const char **why) {
    int handle;
    void *context;
    if (!load(why)) {
        return false;
    }
    if (cu.Init(0) || cu.DeviceGet(&handle, device)) {
        *why = "there is no such CUDA device";
        return false;
    }
    check(cu.DriverGetVersion(&version), "version of the driver");
    check(cu.DeviceGetName(name, sizeof name, handle), "name of the device");
    check(cu.DevicePrimaryCtxRetain(&context, handle), "context of the device");
    check(cu.CtxSetCurrent(context), "context of the device");
    return true;
}

const char *gpu_name(void) {
    return name;
}

int gpu_driver_version(void) {
    return version;
}

void *gpu_alloc(size_t bytes) {
    uint64_t address;
    check(cu.MemAlloc(&address, bytes), "device memory");
    check(cu.MemsetD8(address, 0xff, bytes), "device memory");
    gpu_synchronize(); /* or it could come behind what other streams write there */
    return (void *)(uintptr_t)address;
}

void gpu_free(void *pointer) {
    if (pointer) {
        check(cu.MemFree((uint64_t)(uintptr_t)pointer), "freeing");
    }
}

void gpu_fill(void *pointer, unsigned char byte, size_t bytes) {
    check(cu.MemsetD8((uint64_t)(uintptr_t)pointer, byte, bytes), "filling");
    gpu_synchronize();
}

void gpu_to_device(void *to, const void *from, size_t bytes) {
    check(cu.MemcpyHtoD((uint64_t)(uintptr_t)to, from, bytes), "copy to the device");
    gpu_synchronize();
}

void gpu_to_host(void *to, const void *from, size_t bytes) {
    gpu_synchronize();
    check(cu.MemcpyDtoH(to, (uint64_t)(uintptr_t)from, bytes), "copy from the device");
}

void gpu_copy(void *to, const void *from, size_t bytes, void *stream) {
    check(cu.MemcpyDtoDAsync((uint64_t)(uintptr_t)to, (uint64_t)(uintptr_t)from, bytes, stream),
          "copy");
}

size_t gpu_free_bytes(void) {
    size_t available, total;
    check(cu.MemGetInfo(&available, &total), "memory");
    return available;
}

void *gpu_stream_new(void) {
    void *stream;
    check(cu.StreamCreate(&stream, 1),
          "stream"); /* one that does not wait for the default stream */
    return stream;
}

void gpu_stream_free(void *stream) {
    check(cu.StreamDestroy(stream), "stream");
}

void gpu_synchronize(void) {
    check(cu.CtxSynchronize(), "waiting");
}

void *gpu_event_new(void) {
    void *event;
    check(cu.EventCreate(&event, 0), "event");
    return event;
}

void gpu_event_record(void *event, void *stream) {
    check(cu.EventRecord(event, stream), "event");
}

double gpu_event_seconds(void *first, void *second) {
    float milliseconds;
    check(cu.EventSynchronize(second), "event");
    check(cu.EventElapsedTime(&milliseconds, first, second), "event");
    return (double)milliseconds * 1e-3;
}

void gpu_capture_begin(void *stream) {
    check(cu.StreamBeginCapture(stream, 1), "capture"); /* of this thread's calls */
}

void *gpu_capture_end(void *stream) {
    void *graph, *executable;
    check(cu.StreamEndCapture(stream, &graph), "capture");
    check(cu.GraphInstantiate(&executable, graph, 0), "graph");
    check(cu.GraphDestroy(graph), "graph");
    return executable;
}

void gpu_graph_launch(void *graph, void *stream) {
    check(cu.GraphLaunch(graph, stream), "graph");
}

void gpu_graph_free(void *graph) {
    check(cu.GraphExecDestroy(graph), "graph");
}
