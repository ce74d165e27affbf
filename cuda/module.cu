/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The module's entry and its table. Each function works on the device it is told and leaves the caller's current
 * device and error state as they were.
 */
#include "common.cuh"

#include <cstring>

namespace {

/* Makes a device current for a scope. */
class Current {
  public:
    explicit Current(int device) {
        error = cudaGetDevice(&before);
        if (error == cudaSuccess && before != device) {
            error = cudaSetDevice(device);
            changed = error == cudaSuccess;
        }
    }
    ~Current() {
        if (changed) {
            cudaSetDevice(before);
        }
    }
    /* A failure of ours must not be found by the caller's next cudaGetLastError(). */
    int end(cudaError_t e) const {
        if (e != cudaSuccess) {
            cudaGetLastError();
        }
        return (int)e;
    }
    cudaError_t error;

  private:
    int before = 0;
    bool changed = false;
};

template <typename F> int on(int device, F f) noexcept {
    Current current(device);
    return current.end(current.error == cudaSuccess ? f() : current.error);
}

int open_device(int device, struct fkv_cuda_info *info) {
    int count = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e != cudaSuccess) {
        cudaGetLastError();
        return (int)e;
    }
    if (device < 0 || device >= count) {
        return (int)cudaErrorInvalidDevice;
    }
    return on(device, [&] {
        cudaDeviceProp p;
        cudaError_t error = cudaGetDeviceProperties(&p, device);
        if (error != cudaSuccess) {
            return error;
        }
        info->device = device;
        info->multiprocessors = p.multiProcessorCount;
        info->major = p.major;
        info->minor = p.minor;
        memcpy(info->name, p.name, sizeof info->name);
        info->name[sizeof info->name - 1] = 0;
        return cudaFree(nullptr); /* makes the device's context now, not in the first call */
    });
}

const char *text(int error) {
    return cudaGetErrorString((cudaError_t)error);
}

int alloc(int device, size_t bytes, uint64_t *address) {
    return on(device, [&] {
        void *p = nullptr;
        cudaError_t e = cudaMalloc(&p, bytes);
        if (e == cudaSuccess) {
            e = cudaMemset(p, 0, bytes);
            if (e == cudaSuccess) {
                e = cudaStreamSynchronize(nullptr); /* streams need not wait for the default one */
            }
            if (e != cudaSuccess) {
                cudaFree(p);
            }
        }
        *address = e == cudaSuccess ? (uint64_t)p : 0;
        return e;
    });
}

int release(int device, uint64_t address) {
    return on(device, [&] { return cudaFree((void *)address); });
}

int alloc_host(int device, size_t bytes, void **pointer) {
    return on(device, [&] { return cudaHostAlloc(pointer, bytes, cudaHostAllocDefault); });
}

int free_host(int device, void *pointer) {
    return on(device, [&] { return cudaFreeHost(pointer); });
}

int upload(int device, uint64_t to, const void *from, size_t bytes, void *stream) {
    return on(device, [&] {
        return cudaMemcpyAsync((void *)to, from, bytes, cudaMemcpyHostToDevice,
                               (cudaStream_t)stream);
    });
}

int copy(int device, uint64_t to, uint64_t from, size_t bytes, void *stream) {
    return on(device, [&] {
        return cudaMemcpyAsync((void *)to, (const void *)from, bytes, cudaMemcpyDeviceToDevice,
                               (cudaStream_t)stream);
    });
}

int synchronize(int device, void *stream) {
    return on(device, [&] { return cudaStreamSynchronize((cudaStream_t)stream); });
}

int stream_device(void *stream, int *device) {
#if CUDART_VERSION >= 12080
    const cudaError_t e = cudaStreamGetDevice((cudaStream_t)stream, device);
    if (e != cudaSuccess) {
        cudaGetLastError();
    }
    return (int)e;
#else
    (void)stream;
    *device = -1; /* not known */
    return 0;
#endif
}

int capturing(int device, void *stream, int *yes) {
    return on(device, [&] {
        cudaStreamCaptureStatus status;
        cudaError_t e = cudaStreamIsCapturing((cudaStream_t)stream, &status);
        *yes = e == cudaSuccess && status == cudaStreamCaptureStatusActive;
        return e;
    });
}

int owns(int device, uint64_t address, int *yes) {
    return on(device, [&] {
        cudaPointerAttributes a;
        cudaError_t e = cudaPointerGetAttributes(&a, (const void *)address);
        *yes = e == cudaSuccess && ((a.type == cudaMemoryTypeDevice && a.device == device) ||
                                    a.type == cudaMemoryTypeManaged);
        return e;
    });
}

int event_create(int device, void **event) {
    return on(device, [&] {
        return cudaEventCreateWithFlags((cudaEvent_t *)event, cudaEventDisableTiming);
    });
}

int event_destroy(int device, void *event) {
    return on(device, [&] { return cudaEventDestroy((cudaEvent_t)event); });
}

int event_record(int device, void *event, void *stream) {
    return on(device, [&] { return cudaEventRecord((cudaEvent_t)event, (cudaStream_t)stream); });
}

int event_wait(int device, void *event) {
    return on(device, [&] { return cudaEventSynchronize((cudaEvent_t)event); });
}

int patch(int device, uint64_t patches, int count, void *stream) {
    return on(device, [&] { return fkv_cuda_patch_launch(patches, count, (cudaStream_t)stream); });
}

int rope(int device, const fkv_cuda_cache *c, uint64_t positions, int tokens, uint64_t table,
         int64_t capacity, void *stream) {
    return on(device, [&] {
        return fkv_cuda_rope_launch(*c, positions, tokens, table, capacity, (cudaStream_t)stream);
    });
}

int append(int device, const fkv_cuda_cache *c, const fkv_cuda_attend *a, const fkv_cuda_view *k,
           const fkv_cuda_view *v, int max_tokens, void *stream) {
    return on(device, [&] {
        return fkv_cuda_append_launch(*c, *a, *k, *v, max_tokens, (cudaStream_t)stream);
    });
}

int attend(int device, const fkv_cuda_cache *c, const fkv_cuda_attend *a, void *stream) {
    return on(device, [&] {
        return c->coded == FKV_CUDA_FOURIER ? fkv_cuda_fourier_launch(*c, *a, (cudaStream_t)stream)
                                            : fkv_cuda_attend_launch(*c, *a, (cudaStream_t)stream);
    });
}

int seal(int device, const fkv_cuda_cache *c, const fkv_cuda_attend *a, uint64_t seals, int count,
         void *stream) {
    return on(device,
              [&] { return fkv_cuda_seal_launch(*c, *a, seals, count, (cudaStream_t)stream); });
}

int read(int device, const fkv_cuda_cache *c, uint64_t table, int64_t slots, int layer, int part,
         int64_t coded, int64_t first, int64_t count, const fkv_cuda_view *out, void *stream) {
    return on(device, [&] {
        return fkv_cuda_read_launch(*c, table, slots, layer, part, coded, first, count, *out,
                                    (cudaStream_t)stream);
    });
}

int fold(int device, const fkv_cuda_cache *c, const fkv_cuda_attend *a, uint64_t seals, int n_seals,
         uint64_t folds, int n_folds, int most_bins, void *stream) {
    return on(device, [&] {
        return fkv_cuda_fold_launch(*c, *a, seals, n_seals, folds, n_folds, most_bins,
                                    (cudaStream_t)stream);
    });
}

int read_fourier(int device, const fkv_cuda_cache *c, const fkv_cuda_row *row, int layer, int part,
                 int coded_rows, int64_t coded, int64_t first, int64_t count,
                 const fkv_cuda_view *out, void *stream) {
    return on(device, [&] {
        return fkv_cuda_read_fourier_launch(*c, *row, layer, part, coded_rows, coded, first, count,
                                            *out, (cudaStream_t)stream);
    });
}

const fkv_cuda_ops table = {
    sizeof(fkv_cuda_ops),
    FKV_MODULE_ABI,
    FKV_MODULE_VERSION,
    open_device,
    text,
    alloc,
    release,
    alloc_host,
    free_host,
    upload,
    copy,
    synchronize,
    stream_device,
    capturing,
    owns,
    event_create,
    event_destroy,
    event_record,
    event_wait,
    patch,
    rope,
    append,
    attend,
    seal,
    read,
    fold,
    read_fourier,
};

} // namespace

/* NULL unless the library is of the same version. */
extern "C" __attribute__((visibility("default"))) const struct fkv_cuda_ops *
fkv_cuda_module(uint32_t handshake, const char *version) {
    return handshake == FKV_MODULE_HANDSHAKE && !strcmp(version, FKV_MODULE_VERSION) ? &table
                                                                                     : nullptr;
}
