/*
 * libfkv: a KV-cache library for language-model inference.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * This header is the whole public interface, and its manual. docs/c.md has a first program.
 *
 * What it does
 *   A fkv_cache holds the keys and values of many sequences over all layers of one model, exactly or
 *   coded. How every channel is held is written in a fkv_profile. Attention runs on what is held; the
 *   coded part is never expanded to a dense copy.
 *
 *       context -> profile -> cache -> sequences
 *                                  \-> plan: one step's ragged batch, used by every layer
 *
 *       fkv_context_create(&params, &ctx);
 *       fkv_profile_load_file(ctx, "profile.json", &profile);
 *       fkv_cache_create(ctx, profile, NULL, &cache);
 *       fkv_sequence_create(cache, NULL, &sequence);
 *       fkv_plan_create(cache, &plan);
 *       for each step:
 *           fkv_plan_update(plan, &batch);                          which sequences, how many new tokens
 *           for each layer:
 *               fkv_append_attend(plan, layer, &q, &k, &v, &out, NULL);
 *
 * Conventions
 *   Words. Hq query heads, Hk KV heads, G = Hq / Hk, D = head_dim. Query head h reads KV head h / G.
 *       A token's index counts from 0 in its sequence; its position, used by RoPE, is its index unless
 *       the batch gives another.
 *   Status. Every function that can fail returns a fkv_status: FKV_OK (0) or a negative code. On any
 *       error but FKV_ERR_DEVICE nothing has changed and no output was written. The text of the last
 *       error of a context is read with fkv_context_message(). The library never prints, exits, aborts
 *       or throws; errno is no part of the interface.
 *   Parameter structs. `struct_size` first; call the struct's _init function with sizeof, then set
 *       fields. Structs only grow at the end and zero in a new field means the old behaviour. A struct
 *       longer than the library knows is accepted while its unknown tail is zero.
 *   Handles. Opaque. They are checked on every call: a destroyed, foreign or wrong handle gives
 *       FKV_ERR_HANDLE and is never dereferenced. Destroying NULL is allowed and does nothing. Objects
 *       may be destroyed in any order: what a living object still needs is kept until it goes, except
 *       that destroying a cache frees all its data at once and leaves its plans unusable.
 *   Threads. Different handles may be used from different threads freely. A context and a profile may
 *       be shared by any number of threads. One plan serves one thread at a time (else FKV_ERR_BUSY).
 *       On one cache attends of different plans may run at the same time; append, and creating, forking,
 *       cropping and freeing sequences, are writers: a writer beside anything else gives FKV_ERR_BUSY,
 *       never a race.
 *   CUDA. With FKV_BACKEND_CUDA tensors are memory of the context's device, and the calls of a step only
 *       launch work on its stream: outputs are there, and inputs may be reused, for what is later on that
 *       stream, or after fkv_context_synchronize(). Values that are not finite are not refused but spoil
 *       outputs of their own sequence and KV head. What is not supported there says so: docs/cuda.md.
 *   Numbers. Same build, same instruction set, same inputs: same bits, for any number of threads, any
 *       batch and any split of the appends (docs/numerics.md).
 */
#ifndef FKV_FKV_H
#define FKV_FKV_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Version of this header. fkv_version_string() tells the version of the library that was loaded. */
#define FKV_VERSION_MAJOR 0
#define FKV_VERSION_MINOR 1
#define FKV_VERSION_PATCH 0
/** Changes when a program built against another header can no longer be served. */
#define FKV_ABI_VERSION 0

/** Largest head_dim. */
#define FKV_MAX_HEAD_DIM 256
/** Largest number of sink tokens. */
#define FKV_MAX_SINK 64
/** Largest top_k of a selection. */
#define FKV_MAX_TOP_K 256
/** Largest scope of a selection, in tokens. */
#define FKV_MAX_SCOPE 16777216
/** Number of dimensions a fkv_tensor can describe. */
#define FKV_MAX_NDIM 4

#if defined(__GNUC__) && !defined(FKV_STATIC)
#define FKV_API __attribute__((visibility("default")))
#else
#define FKV_API
#endif

/* ------------------------------------------------------------------------------------------------ */
/* Status and version                                                                               */

/** One of fkv_status_code. Fixed width, so that bindings need not know the enum. */
typedef int32_t fkv_status;

/** Values are frozen; new ones are appended. */
enum fkv_status_code {
    /** Done. */
    FKV_OK = 0,
    /** An argument is wrong in itself: NULL, a negative count, a shape that does not fit. */
    FKV_ERR_INVALID = -1,
    /** Not a living handle of the expected type, or a sequence id that was freed. */
    FKV_ERR_HANDLE = -2,
    /** A right call at a wrong time: layers of unequal length, solving without observations. */
    FKV_ERR_STATE = -3,
    /** The allocator returned NULL. */
    FKV_ERR_NOMEM = -4,
    /** A limit of the context, the cache or the sequence would be exceeded, or a size overflows. */
    FKV_ERR_LIMIT = -5,
    /** NaN or infinity in an input, or a value that the storage type cannot hold. */
    FKV_ERR_NONFINITE = -6,
    /** The operating system refused to read or write a file. */
    FKV_ERR_IO = -7,
    /** Malformed JSON or contents that contradict themselves. */
    FKV_ERR_FORMAT = -8,
    /** Stored contents fail their checksum. */
    FKV_ERR_CHECKSUM = -9,
    /** A file or module of a version this library does not know. */
    FKV_ERR_VERSION = -10,
    /** Well-formed, but of another model or geometry. */
    FKV_ERR_MISMATCH = -11,
    /** Known, but not possible here; or a flag, type or field this library does not know. */
    FKV_ERR_UNSUPPORTED = -12,
    /** The device failed; the handles on it stay unusable. */
    FKV_ERR_DEVICE = -13,
    /** Another thread is using the object. */
    FKV_ERR_BUSY = -14,
    /** The caller's buffer is too small; the needed size was reported. */
    FKV_ERR_BUFFER = -15
};

/** Name of a status, for any value; never NULL. Static storage. */
FKV_API const char *fkv_status_string(fkv_status status);
/** "MAJOR.MINOR.PATCH" of the loaded library. Static storage. */
FKV_API const char *fkv_version_string(void);
/** FKV_ABI_VERSION of the loaded library. */
FKV_API uint32_t fkv_abi_version(void);

/* ------------------------------------------------------------------------------------------------ */
/* Tensors                                                                                          */

/** One of fkv_dtype_code. */
typedef int32_t fkv_dtype;

/** Element types, all little-endian IEEE or bfloat16. */
enum fkv_dtype_code {
    /** Not set. */
    FKV_DTYPE_NONE = 0,
    /** binary32. */
    FKV_DTYPE_F32 = 1,
    /** binary16. */
    FKV_DTYPE_F16 = 2,
    /** bfloat16. */
    FKV_DTYPE_BF16 = 3
};

/** One of fkv_device_code. */
typedef int32_t fkv_device;

/** Where a tensor's bytes are. */
enum fkv_device_code {
    /** Memory of the host. */
    FKV_DEVICE_CPU = 0,
    /** Memory of a CUDA device. */
    FKV_DEVICE_CUDA = 1
};

/**
 * A borrowed view of a caller's array: nothing is copied or kept beyond the call. The meaning is that
 * of DLPack, with strides in bytes and the extent of the memory stated.
 *
 * Token tensors are [tokens, heads, D]: q and out have Hq heads, k and v Hk; the tokens of all
 * sequences of a batch follow one another in batch order. lse is [tokens, Hq], f32. The last dimension
 * is contiguous; the others may have any positive stride that is a multiple of the element size, so a
 * [heads, tokens, D] array is described by its strides. A dimension of extent 0 or 1 may have any
 * stride. Outputs must not overlap themselves or an input.
 */
typedef struct fkv_tensor {
    /** sizeof(fkv_tensor) as the caller compiled it. */
    uint32_t struct_size;
    /** fkv_dtype_code. */
    fkv_dtype dtype;
    /** fkv_device_code. */
    fkv_device device;
    /** Number of the device; 0 for the CPU. */
    int32_t device_id;
    /** First element; aligned to the element size. May be NULL only if a dimension is 0. */
    void *data;
    /** Bytes that may be read or written from data on. */
    uint64_t byte_length;
    /** Number of dimensions used in shape and strides. */
    int32_t ndim;
    /** Zero. */
    int32_t reserved;
    /** Extents. */
    int64_t shape[4];
    /** Distances between neighbours of a dimension, in bytes. */
    int64_t strides[4];
} fkv_tensor;

/**
 * Fills *tensor with a contiguous (row-major) view of `data`. `shape` has `ndim` entries. `tensor` must
 * have room for sizeof(fkv_tensor) bytes. Errors: INVALID, LIMIT (the size overflows). Since 0.1.
 */
FKV_API fkv_status fkv_tensor_init(fkv_tensor *tensor, void *data, fkv_dtype dtype, int32_t ndim,
                                   const int64_t *shape);

/* ------------------------------------------------------------------------------------------------ */
/* Context                                                                                          */

/** Where things run: backend, threads, allocator, limits. There are no globals behind it. */
typedef struct fkv_context fkv_context;

/** One of fkv_backend_code. */
typedef int32_t fkv_backend;

/** Backends. */
enum fkv_backend_code {
    /** The CPU. */
    FKV_BACKEND_CPU = 0,
    /** A CUDA device, through the module libfkv-cuda. */
    FKV_BACKEND_CUDA = 1
};

/** One of fkv_cpu_level_code. */
typedef int32_t fkv_cpu_level;

/** Instruction-set levels of the CPU kernels. */
enum fkv_cpu_level_code {
    /** The best level that both the processor and this build have. */
    FKV_CPU_BEST = 0,
    /** Portable C: the readable reference. */
    FKV_CPU_REFERENCE = 1,
    /** AVX2, FMA and F16C. */
    FKV_CPU_AVX2 = 2,
    /** AVX-512 F, BW, DQ and VL. */
    FKV_CPU_AVX512 = 3
};

/**
 * Lets NaN and infinity pass in k, v and q instead of refusing them. They then spoil the outputs of
 * their own sequence and KV head only. Never applies to profiles or files.
 */
#define FKV_CONTEXT_PROPAGATE_NONFINITE 1u

/** Returns `bytes` bytes aligned to `alignment` (a power of two), or NULL. Called from any thread. */
typedef void *(*fkv_alloc_fn)(void *user, size_t bytes, size_t alignment);
/** Frees what the matching fkv_alloc_fn returned; `bytes` is what was asked for. */
typedef void (*fkv_free_fn)(void *user, void *pointer, size_t bytes);

/** How a context is made. Only read during fkv_context_create(). Since 0.1. */
typedef struct fkv_context_params {
    /** sizeof(fkv_context_params) as the caller compiled it. */
    uint32_t struct_size;
    /** fkv_backend_code. */
    fkv_backend backend;
    /** Threads that work on one call, the caller's included. 0: one for each online processor. */
    int32_t threads;
    /** fkv_cpu_level_code. A level the processor lacks is UNSUPPORTED. */
    fkv_cpu_level cpu_level;
    /** FKV_CONTEXT_ flags; unknown bits are UNSUPPORTED. */
    uint64_t flags;
    /** Both NULL (the C library's allocator) or both set. They are called for all cached data. */
    fkv_alloc_fn alloc;
    /** See alloc. */
    fkv_free_fn free;
    /** First argument of alloc and free. */
    void *alloc_user;
    /** Bytes that all objects of the context may hold together. 0: no limit but the allocator's. */
    uint64_t max_bytes;
    /** Tokens of one sequence. 0: 2^26. */
    uint64_t max_tokens;
    /** Size of a file or text to be parsed. 0: 64 MiB. */
    uint64_t max_file_bytes;
    /** Receives the reason if creation fails (there is no context to ask); may be NULL. */
    char *message;
    /** Bytes at message. */
    uint64_t message_bytes;
    /** CUDA: number of the device. Since 0.1. */
    int32_t device_id;
    /** Zero. */
    int32_t reserved;
    /**
     * CUDA: the module's file. NULL: that of the environment variable FKV_CUDA_MODULE (an absolute path), or
     * else libfkv-cuda.so.0 in fkv/ beside libfkv.so, or where the system looks. docs/cuda.md.
     */
    const char *module_path;
    /**
     * CUDA: the cudaStream_t on which everything runs, of that device; NULL is the default stream. Borrowed:
     * it must live until fkv_context_set_stream() replaces it or the context's last object is gone.
     */
    void *stream;
} fkv_context_params;

/** What a context is and holds. Written by fkv_context_query(). Since 0.1. */
typedef struct fkv_context_info {
    /** sizeof(fkv_context_info) as the caller compiled it; no more than this is written. */
    uint32_t struct_size;
    /** fkv_backend_code. */
    fkv_backend backend;
    /** Threads that work on one call. */
    int32_t threads;
    /** The level in use; never FKV_CPU_BEST. */
    fkv_cpu_level cpu_level;
    /** Bytes now held by all objects of the context: the sum over the allocator's calls. */
    uint64_t live_bytes;
    /** The most live_bytes ever was. */
    uint64_t peak_bytes;
    /** Best level this processor and build offer. */
    fkv_cpu_level best_cpu_level;
    /** 1 if the CUDA backend is built in, else 0. */
    int32_t has_cuda;
} fkv_context_info;

/** Fills *params with defaults. `struct_size` is sizeof(fkv_context_params). Errors: INVALID. */
FKV_API fkv_status fkv_context_params_init(fkv_context_params *params, size_t struct_size);
/**
 * Makes a context. `params` may be NULL for the defaults. On success *out is the caller's, to be freed
 * with fkv_context_destroy(); on error *out is NULL and params->message says why: also which of module,
 * driver and device is missing for the CUDA backend.
 * Errors: INVALID, UNSUPPORTED (also: no module), VERSION (of the module), NOMEM, LIMIT, DEVICE. Since 0.1.
 */
FKV_API fkv_status fkv_context_create(const fkv_context_params *params, fkv_context **out);
/**
 * Ends the handle. Objects made from the context stay usable and release its resources with the last
 * of them. Errors: HANDLE, BUSY (a call on this handle is running). Since 0.1.
 */
FKV_API fkv_status fkv_context_destroy(fkv_context *ctx);
/** Fills *info; set info->struct_size before. Thread-safe. Errors: HANDLE, INVALID. Since 0.1. */
FKV_API fkv_status fkv_context_query(fkv_context *ctx, fkv_context_info *info);
/**
 * Copies the text of the last error of this context, zero-terminated, into `buffer`. *needed (may be
 * NULL) gets the bytes it takes. With several threads, the last error of any of them.
 * Errors: HANDLE, INVALID, BUFFER (cut off to `bytes`). Since 0.1.
 */
FKV_API fkv_status fkv_context_message(fkv_context *ctx, char *buffer, size_t bytes,
                                       size_t *needed);

/**
 * CUDA: all that follows runs on `stream`, a cudaStream_t of the context's device. Waits for what was
 * launched so far. No other call may run on the context's objects meanwhile.
 * Errors: HANDLE, UNSUPPORTED (the CPU has no streams), DEVICE. Since 0.1.
 */
FKV_API fkv_status fkv_context_set_stream(fkv_context *ctx, void *stream);
/**
 * Waits until everything launched by the context's objects is done. Does nothing on the CPU.
 * Errors: HANDLE, DEVICE (a kernel failed). Since 0.1.
 */
FKV_API fkv_status fkv_context_synchronize(fkv_context *ctx);

/* ------------------------------------------------------------------------------------------------ */
/* Model and profile                                                                                */

/** Immutable description of a model's geometry and of how each channel is held. */
typedef struct fkv_profile fkv_profile;

/** One of fkv_rope_layout_code. */
typedef int32_t fkv_rope_layout;

/** Which channels form a RoPE pair. */
enum fkv_rope_layout_code {
    /** q and k arrive rotated already, or the model has no RoPE. */
    FKV_ROPE_NONE = 0,
    /** Channel j pairs with j + rope_dim / 2 (LLaMA in Hugging Face form, Mistral, Qwen). */
    FKV_ROPE_HALF_SPLIT = 1,
    /** Channel 2j pairs with 2j + 1 (GPT-J, the original LLaMA files). */
    FKV_ROPE_INTERLEAVED = 2
};

/** Geometry of a model. Everything is copied. Since 0.1. */
typedef struct fkv_model_params {
    /** sizeof(fkv_model_params) as the caller compiled it. */
    uint32_t struct_size;
    /** Number of layers. 1..1024. */
    int32_t n_layers;
    /** Hq; a multiple of n_kv_heads. 1..1024. */
    int32_t n_q_heads;
    /** Hk. */
    int32_t n_kv_heads;
    /** D; a multiple of 8 up to FKV_MAX_HEAD_DIM. */
    int32_t head_dim;
    /** fkv_rope_layout_code. */
    fkv_rope_layout rope_layout;
    /** Rotated channels, the first of each head; even, at most head_dim. 0: all, or none without RoPE. */
    int32_t rope_dim;
    /** Entries at inv_freq; rope_dim / 2. */
    int32_t inv_freq_count;
    /** Angle per position of each pair, in radians. With scaled RoPE: the scaled values. */
    const double *inv_freq;
    /** Factor on cos and sin of q and k (Hugging Face attention_scaling). 0: 1. */
    double rope_scaling;
    /** Factor on q . k before softmax. 0: 1 / sqrt(D). */
    double softmax_scale;
    /** Name for people and for matching, at most 255 bytes; may be NULL. Not used in computation. */
    const char *model_id;
} fkv_model_params;

/** Fills *params with zeros and its size. Errors: INVALID. */
FKV_API fkv_status fkv_model_params_init(fkv_model_params *params, size_t struct_size);

/** One of fkv_restoration_code. */
typedef int32_t fkv_restoration;

/** How time series come back from their Fourier coefficients. */
enum fkv_restoration_code {
    /**
     * Least squares: x(l) = mean + (1/T) sum_n w_n (C[n] cos(2 pi n l/T) + S[n] sin(2 pi n l/T)), with
     * w_n = 2, and 1 at the Nyquist bin; C and S are of the series without its mean.
     */
    FKV_RESTORE_LEAST_SQUARES = 0,
    /**
     * The published formula (arXiv 2506.11886, and its code): (r - mean r) * s + mean x, with
     * r(l) = (1/N) sum_n C cos + S sin and s = max|x - mean x| / max|r - mean r| over the tokens that
     * the first coding append coded, frozen afterwards. For comparison only: what it holds depends on
     * how the prompt was split.
     */
    FKV_RESTORE_AUTHORS = 1
};

/** One of fkv_outgrow_code. */
typedef int32_t fkv_outgrow;

/** What happens when the coded middle of a sequence reaches its period T. */
enum fkv_outgrow_code {
    /** A new segment with the same T and bins begins; earlier ones are untouched. Nothing wraps. */
    FKV_OUTGROW_SEGMENT = 0,
    /** Appending further is FKV_ERR_LIMIT. */
    FKV_OUTGROW_ERROR = 1
};

/**
 * The Fourier coding (FourierAttention, arXiv 2506.11886, corrected: docs/fourier.md). A sequence is
 * [sinks | middle | local tail]; in the middle each compressed channel is held as `bins` complex
 * coefficients of its time series, the other channels exactly. Since 0.1.
 */
typedef struct fkv_fourier_params {
    /** sizeof(fkv_fourier_params) as the caller compiled it. */
    uint32_t struct_size;
    /** Type of exact tokens and kept channels. Default F16. */
    fkv_dtype storage_dtype;
    /** Type of the coefficients: F16 or F32. Default F16, which refuses values beyond its range. */
    fkv_dtype coefficient_dtype;
    /** Complex bins N, n = 0..N-1. 1..65536; at most T/2 + 1 are used. Default 512. */
    int32_t bins;
    /** Sink tokens, exact. 0..FKV_MAX_SINK. Default 4. */
    int32_t n_sink;
    /** Newest tokens that stay exact; up to 63 more do, between two codings. Default 1024. */
    int32_t n_local;
    /** fkv_restoration_code. */
    fkv_restoration restoration;
    /** fkv_outgrow_code. */
    fkv_outgrow outgrow;
    /** Period T in tokens for sequences that do not state their own; at least 64. Default 32768. */
    int64_t period;
    /** A middle shorter than this stays exact. 0: 2 * bins, the number of reals per channel. */
    int64_t min_middle;
} fkv_fourier_params;

/** Fills *params with the defaults above. Errors: INVALID. */
FKV_API fkv_status fkv_fourier_params_init(fkv_fourier_params *params, size_t struct_size);

/** One of fkv_part_code. */
typedef int32_t fkv_part;

/** Keys or values. */
enum fkv_part_code {
    /** Keys. */
    FKV_PART_K = 0,
    /** Values. */
    FKV_PART_V = 1
};

/** How one channel of the middle is held. fkv_profile_channels() writes these. */
enum fkv_channel_code {
    /** Calibrated: as its carrier alone, which takes no bytes. */
    FKV_CHANNEL_CARRIER = 0,
    /** Fourier coefficients over time. */
    FKV_CHANNEL_FOURIER = 1,
    /** Calibrated: carrier and a residual of 2 bits per token. */
    FKV_CHANNEL_2BIT = 2,
    /** Carrier and a residual of 3 bits. */
    FKV_CHANNEL_3BIT = 3,
    /** Carrier and a residual of 4 bits. */
    FKV_CHANNEL_4BIT = 4,
    /** Carrier and a residual of 8 bits. */
    FKV_CHANNEL_8BIT = 8,
    /** Exactly, in the storage type. */
    FKV_CHANNEL_EXACT = 16
};

/** One of fkv_coding_code. */
typedef int32_t fkv_coding;

/** What a profile does. */
enum fkv_coding_code {
    /** Every token and channel exactly. */
    FKV_CODING_EXACT = 0,
    /** fkv_fourier_params. */
    FKV_CODING_FOURIER = 1,
    /** fkv_codec_params: carriers, and residuals of few bits. */
    FKV_CODING_CALIBRATED = 2
};

/** One of fkv_domain_code. */
typedef int32_t fkv_domain;

/** Whether the calibrated coding holds keys with RoPE's rotation or without. */
enum fkv_domain_code {
    /** Keys are held as attention sees them. For plain decoding: the fast one. */
    FKV_DOMAIN_ROTATED = 0,
    /** Keys are held, in the tail too, as they came, and are rotated whenever they are read. */
    FKV_DOMAIN_UNROTATED = 1
};

/**
 * The calibrated coding (docs/codec.md). A sequence is [sinks | middle | local tail]. The middle is a
 * list of sealed blocks; in them each channel is its carrier (the mean of K before RoPE, rotated to the
 * token's position; the mean of V), which stands in the profile, plus a residual of 0, 2, 3, 4 or 8
 * bits per token, quantised between the least and the largest value of a group of tokens. Since 0.1.
 */
typedef struct fkv_codec_params {
    /** sizeof(fkv_codec_params) as the caller compiled it. */
    uint32_t struct_size;
    /** Type of exact tokens and of exact channels. Default F16. */
    fkv_dtype storage_dtype;
    /** Tokens that share a scale and a zero point: 64 or 128. Default 128. */
    int32_t group;
    /** Tokens of a block: 64, 128 or 256, a multiple of group. Default 128. */
    int32_t block;
    /** Sink tokens, exact. 0..FKV_MAX_SINK. Default 4. */
    int32_t n_sink;
    /** Newest tokens that stay exact; up to block - 1 more do, until a block is full. Default 128. */
    int32_t n_local;
    /** fkv_domain_code. Default FKV_DOMAIN_ROTATED. */
    fkv_domain domain;
    /** Fourier bins around the carrier for each channel. 0; anything else is UNSUPPORTED. */
    int32_t spectral_bins;
} fkv_codec_params;

/** Fills *params with the defaults above. Errors: INVALID. */
FKV_API fkv_status fkv_codec_params_init(fkv_codec_params *params, size_t struct_size);

/** What a profile says. Written by fkv_profile_query(). Since 0.1. */
typedef struct fkv_profile_info {
    /** sizeof(fkv_profile_info) as the caller compiled it; no more than this is written. */
    uint32_t struct_size;
    /** fkv_coding_code. */
    fkv_coding coding;
    /** Geometry, as given. */
    int32_t n_layers;
    /** Hq. */
    int32_t n_q_heads;
    /** Hk. */
    int32_t n_kv_heads;
    /** D. */
    int32_t head_dim;
    /** fkv_rope_layout_code. */
    fkv_rope_layout rope_layout;
    /** Rotated channels. */
    int32_t rope_dim;
    /** Type of exact tokens and kept channels. */
    fkv_dtype storage_dtype;
    /** Type of the coefficients; NONE without Fourier coding. */
    fkv_dtype coefficient_dtype;
    /** Bins; 0 without Fourier coding. */
    int32_t bins;
    /** Sink tokens. */
    int32_t n_sink;
    /** Local tokens. */
    int32_t n_local;
    /** fkv_restoration_code. */
    fkv_restoration restoration;
    /** fkv_outgrow_code. */
    fkv_outgrow outgrow;
    /** Zero. */
    int32_t reserved;
    /** Default period in tokens. */
    int64_t period;
    /** Middle below which nothing is coded. */
    int64_t min_middle;
    /** Channels (layer, head, d) of K that are Fourier-coded. */
    int64_t k_fourier_channels;
    /** The same of V. */
    int64_t v_fourier_channels;
    /** Scale on q . k. */
    double softmax_scale;
    /** Tokens of a group; 0 unless calibrated. */
    int32_t group;
    /** Tokens of a block; 0 unless calibrated. */
    int32_t block;
    /** fkv_domain_code. */
    fkv_domain domain;
    /** Zero. */
    int32_t reserved2;
    /** Bits that an element of K takes in a block, scales included: the mean over all channels. */
    double k_bits;
    /** The same of V. */
    double v_bits;
} fkv_profile_info;

/**
 * A profile that holds everything exactly in `storage_dtype`. On success *out is the caller's, freed
 * with fkv_profile_destroy(); on error *out is NULL. Errors: HANDLE, INVALID, NOMEM, LIMIT. Since 0.1.
 */
FKV_API fkv_status fkv_profile_create_exact(fkv_context *ctx, const fkv_model_params *model,
                                            fkv_dtype storage_dtype, fkv_profile **out);
/**
 * A Fourier profile. k_mask and v_mask are [n_layers, Hk, D] bytes, 1 where the channel is compressed,
 * 0 where it is kept; mask_bytes is the size of each. Keys are coded as attention sees them, that is
 * after RoPE. Ownership as above. Errors: HANDLE, INVALID, NOMEM, LIMIT. Since 0.1.
 */
FKV_API fkv_status fkv_profile_create_fourier(fkv_context *ctx, const fkv_model_params *model,
                                              const fkv_fourier_params *fourier,
                                              const uint8_t *k_mask, const uint8_t *v_mask,
                                              size_t mask_bytes, fkv_profile **out);
/**
 * A calibrated profile. k_bits and v_bits are [n_layers, Hk, D] bytes, each a fkv_channel_code but
 * FOURIER; bits_bytes is the size of each. k_carrier and v_carrier are [n_layers, Hk, D] floats, the
 * means of K before RoPE and of V, at most 32768 in size; carrier_count is the number of floats in each.
 * Either or both may be NULL, which stands for zeros; both NULL: carrier_count 0. Everything is copied.
 * Ownership as above. Errors: HANDLE, INVALID, UNSUPPORTED, NOMEM, LIMIT. Since 0.1.
 */
FKV_API fkv_status fkv_profile_create_coded(fkv_context *ctx, const fkv_model_params *model,
                                            const fkv_codec_params *codec, const uint8_t *k_bits,
                                            const uint8_t *v_bits, size_t bits_bytes,
                                            const float *k_carrier, const float *v_carrier,
                                            size_t carrier_count, fkv_profile **out);
/**
 * A calibrated profile without carriers in which every channel has the same `bits`, a fkv_channel_code
 * but FOURIER: a plain low-bit cache, to compare with. Ownership as above.
 * Errors: HANDLE, INVALID, UNSUPPORTED, NOMEM, LIMIT. Since 0.1.
 */
FKV_API fkv_status fkv_profile_create_uniform(fkv_context *ctx, const fkv_model_params *model,
                                              const fkv_codec_params *codec, int32_t bits,
                                              fkv_profile **out);
/**
 * A Fourier profile from channel lists as published with FourierAttention, in either layout: plain
 * ("self_attn.k_proj", ascending error) or split by head ("kc_list", "kc_h_list", ...). `fraction` in
 * (0, 1] takes only that leading share of each plain list; 1 takes all, and is the only value for split
 * lists. Everything is checked: indices in range and unique, offsets monotone, compressed and kept
 * lists covering each channel once, no layer missing or left over.
 * Errors: HANDLE, INVALID, NOMEM, LIMIT, FORMAT and MISMATCH (with the JSON path). Since 0.1.
 */
FKV_API fkv_status fkv_profile_import_published(fkv_context *ctx, const fkv_model_params *model,
                                                const fkv_fourier_params *fourier, const char *json,
                                                size_t json_bytes, double fraction,
                                                fkv_profile **out);
/**
 * Reads a profile from its JSON text (docs/formats.md). `json` need not be zero-terminated.
 * Errors: HANDLE, INVALID, NOMEM, LIMIT, FORMAT, VERSION (each with the JSON path). Since 0.1.
 */
FKV_API fkv_status fkv_profile_load(fkv_context *ctx, const char *json, size_t json_bytes,
                                    fkv_profile **out);
/** fkv_profile_load() of a file. Errors: also IO, with the path. Since 0.1. */
FKV_API fkv_status fkv_profile_load_file(fkv_context *ctx, const char *path, fkv_profile **out);
/**
 * Writes the profile's JSON text, without a terminating zero, to `buffer`; *needed gets its bytes.
 * buffer may be NULL with bytes 0, to ask. Equal profiles give equal bytes.
 * Errors: HANDLE, INVALID, NOMEM, BUFFER (nothing written but *needed). Since 0.1.
 */
FKV_API fkv_status fkv_profile_save(fkv_profile *profile, char *buffer, size_t bytes,
                                    size_t *needed);
/** fkv_profile_save() to a file, which is replaced whole or not at all. Errors: also IO. Since 0.1. */
FKV_API fkv_status fkv_profile_save_file(fkv_profile *profile, const char *path);
/** Fills *info; set info->struct_size before. Errors: HANDLE, INVALID. Since 0.1. */
FKV_API fkv_status fkv_profile_query(fkv_profile *profile, fkv_profile_info *info);
/**
 * Writes a fkv_channel_code for each channel of a layer's K or V: [Hk, D] bytes; `bytes` is the
 * buffer's size. Errors: HANDLE, INVALID (layer, part), BUFFER. Since 0.1.
 */
FKV_API fkv_status fkv_profile_channels(fkv_profile *profile, int32_t layer, fkv_part part,
                                        uint8_t *codes, size_t bytes);
/**
 * Writes the carriers of a layer's K or V: [Hk, D] floats, zeros unless the profile is calibrated;
 * `count` is the number of floats at `carriers`. Errors: HANDLE, INVALID (layer, part), BUFFER.
 * Since 0.1.
 */
FKV_API fkv_status fkv_profile_carriers(fkv_profile *profile, int32_t layer, fkv_part part,
                                        float *carriers, size_t count);
/**
 * Whether a profile is of this model: geometry, RoPE (frequencies to a relative 1e-6) and softmax scale
 * must agree, and the id unless either is empty. A profile loaded from a file should be checked so.
 * Errors: HANDLE, INVALID, MISMATCH (the message names the field). Since 0.1.
 */
FKV_API fkv_status fkv_profile_match(fkv_profile *profile, const fkv_model_params *model);
/** Ends the handle; caches made from the profile keep it. Errors: HANDLE, BUSY. Since 0.1. */
FKV_API fkv_status fkv_profile_destroy(fkv_profile *profile);

/* ------------------------------------------------------------------------------------------------ */
/* Calibration                                                                                      */

/** Running statistics from which a profile is solved. One thread at a time. */
typedef struct fkv_calibrator fkv_calibrator;

/** One of fkv_criterion_code. */
typedef int32_t fkv_criterion;

/** What makes a channel cheap to compress. */
enum fkv_criterion_code {
    /**
     * Ours: energy of the least-squares residual of the series as stored (keys after RoPE), for keys
     * times E[q_d^2] of the query heads that read them, if queries are observed.
     */
    FKV_CRITERION_RESIDUAL = 0,
    /**
     * As published: mean squared error after the authors' restoration, of keys before RoPE.
     */
    FKV_CRITERION_PUBLISHED = 1,
    /**
     * For the calibrated coding (docs/calibration.md): squared gradients of the model's loss times the
     * variance about the carrier, or a weaker estimate from queries where no gradients are given.
     * fkv_calibrator_observe_gradients() feeds it, fkv_calibrator_allocate() solves it.
     */
    FKV_CRITERION_SENSITIVITY = 2
};

/** How a calibrator is made. Since 0.1. */
typedef struct fkv_calibrator_params {
    /** sizeof(fkv_calibrator_params) as the caller compiled it. */
    uint32_t struct_size;
    /** fkv_criterion_code. */
    fkv_criterion criterion;
    /** The coding to calibrate for. A profile solved later has these parameters. NULL: defaults. */
    const fkv_fourier_params *fourier;
    /** The same for SENSITIVITY, which ignores `fourier`; the others ignore this. NULL: defaults. */
    const fkv_codec_params *codec;
} fkv_calibrator_params;

/** One of fkv_statistic_code. */
typedef int32_t fkv_statistic;

/** What a calibrator of SENSITIVITY knows of each channel. */
enum fkv_statistic_code {
    /** Mean over all tokens: the carrier. */
    FKV_STATISTIC_MEAN = 0,
    /** Variance about that mean. */
    FKV_STATISTIC_VARIANCE = 1,
    /** Mean squared gradient; without gradients, the estimate that stands for it. */
    FKV_STATISTIC_SENSITIVITY = 2,
    /** Mean square of the queries that read the channel, before RoPE; 0 for V. */
    FKV_STATISTIC_QUERY = 3,
    /**
     * Share of the variance that each window's own mean and its waves of at least 64 tokens explain:
     * what spectral coefficients around the carrier could save. White noise has about 1/32.
     */
    FKV_STATISTIC_SLOW_SHARE = 4,
    /** Expected loss of holding the carrier alone: half of sensitivity times variance. */
    FKV_STATISTIC_LOSS = 5
};

/** One of fkv_target_code. */
typedef int32_t fkv_target;

/** What an allocation must reach. */
enum fkv_target_code {
    /** At least this ratio, as fkv_profile_estimate() counts it for `tokens` tokens. */
    FKV_TARGET_RATIO = 0,
    /** At most these bits per element of the blocks, scales included, over K and V. */
    FKV_TARGET_BITS = 1,
    /** At most this predicted loss. */
    FKV_TARGET_LOSS = 2
};

/** How bits are given to channels. Only read during the call. Since 0.1. */
typedef struct fkv_allocation_params {
    /** sizeof(fkv_allocation_params) as the caller compiled it. */
    uint32_t struct_size;
    /** fkv_target_code. Default RATIO. */
    fkv_target target;
    /** The target; above 0. Default 12. */
    double value;
    /** Tokens of a sequence for which ratios hold. Default 8192. */
    int64_t tokens;
    /** Allowed levels: bit b stands for b bits, of 0, 2, 3, 4, 8, 16. Default 0, 2 and 4. */
    uint64_t levels;
    /**
     * Factors on the expected losses, [n_layers, 2]: of K, of V. To correct them by what was measured.
     * NULL: none.
     */
    const double *weights;
    /** Entries at weights: 2 * n_layers, or 0. */
    uint64_t weights_count;
} fkv_allocation_params;

/**
 * What came of an allocation; the bits of each channel are read with fkv_profile_channels(). Losses are in
 * the unit of the gradients: with gradients of the sum of all tokens' losses they are per token, and a
 * guide to compare by, not a promise. Since 0.1.
 */
typedef struct fkv_allocation_info {
    /** sizeof(fkv_allocation_info) as the caller compiled it; no more than this is written. */
    uint32_t struct_size;
    /** Zero. */
    int32_t reserved;
    /** Predicted loss of the profile. */
    double predicted_loss;
    /** Predicted loss with no bits at all. */
    double carrier_loss;
    /** Bits per element of the blocks, scales included. */
    double bits;
    /** Ratio for `tokens` tokens. */
    double ratio;
    /** As asked for. */
    int64_t tokens;
} fkv_allocation_info;

/** Fills *params with the defaults. Errors: INVALID. */
FKV_API fkv_status fkv_calibrator_params_init(fkv_calibrator_params *params, size_t struct_size);
/**
 * Makes a calibrator; *out is the caller's, freed with fkv_calibrator_destroy(). `params` may be NULL.
 * Errors: HANDLE, INVALID, NOMEM. Since 0.1.
 */
FKV_API fkv_status fkv_calibrator_create(fkv_context *ctx, const fkv_model_params *model,
                                         const fkv_calibrator_params *params, fkv_calibrator **out);
/**
 * Adds one prompt's keys and values of one layer, whole: [tokens, Hk, D], *before* RoPE, positions
 * 0..tokens-1. `q`, [tokens, Hq, D] before RoPE, may be NULL; under RESIDUAL it is given for all prompts
 * of a layer or for none (else INVALID). The sums are kept in double precision and depend on the order
 * of the observations only by its rounding. A prompt without a middle (no longer than sinks + local) is
 * INVALID. Errors: HANDLE, INVALID, NONFINITE, NOMEM, LIMIT, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_calibrator_observe(fkv_calibrator *calibrator, int32_t layer,
                                          const fkv_tensor *k, const fkv_tensor *v,
                                          const fkv_tensor *q);
/**
 * The mean error of each channel of a layer's K or V under the criterion, [Hk, D] doubles; `count` is
 * the number of doubles at `errors`. Errors: HANDLE, INVALID, STATE (layer not observed), BUFFER.
 */
FKV_API fkv_status fkv_calibrator_errors(fkv_calibrator *calibrator, int32_t layer, fkv_part part,
                                         double *errors, size_t count);
/**
 * Makes a profile that compresses, in each layer, the given share of the Hk * D channels: those of
 * least error. k_fraction and v_fraction have n_layers entries in [0, 1]; `count` is n_layers. Both NULL
 * (count 0) take the published shares by depth: the first 4/28 of the layers K .90 / V .95, the last
 * 8/28 K .50 / V .70, the others .80 / .80.
 * Errors: HANDLE, INVALID, STATE (a layer was never observed), UNSUPPORTED (SENSITIVITY), NOMEM. Since 0.1.
 */
FKV_API fkv_status fkv_calibrator_solve(fkv_calibrator *calibrator, const double *k_fraction,
                                        const double *v_fraction, size_t count, fkv_profile **out);
/**
 * Adds a window of consecutive tokens of one layer to a calibrator of SENSITIVITY; windows come in any
 * number, length and order. k and v, [tokens, Hk, D], are before RoPE. grad_k and grad_v, of the same shape,
 * are the gradients of the loss with respect to them, through those queries only that will read the token
 * coded, that is at least n_local tokens later (docs/calibration.md says why); give both or neither. `q`,
 * [tokens, Hq, D] before RoPE, may be NULL; without gradients it is what the estimate is made of. Leave
 * sinks out. The sums are kept in double precision and depend on the order only by its rounding.
 * fkv_calibrator_observe() is this without gradients.
 * Errors: HANDLE, INVALID, UNSUPPORTED (another criterion), NONFINITE, NOMEM, LIMIT, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_calibrator_observe_gradients(fkv_calibrator *calibrator, int32_t layer,
                                                    const fkv_tensor *k, const fkv_tensor *v,
                                                    const fkv_tensor *grad_k,
                                                    const fkv_tensor *grad_v, const fkv_tensor *q);
/**
 * How much the model's hidden state moves, squared, when a channel of V moves by 1: [Hk, D] doubles, for
 * instance the sum over the query heads of a group of |W_o[:, d]|^2, by the mean square of the hidden state.
 * Used where no gradients are given; by default all channels of a layer weigh the same, and all layers.
 * `count` is Hk * D. Errors: HANDLE, INVALID, UNSUPPORTED (another criterion), BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_calibrator_weigh_values(fkv_calibrator *calibrator, int32_t layer,
                                               const double *weights, size_t count);
/**
 * One statistic of each channel of a layer's K or V, [Hk, D] doubles; `count` is the room at `values`.
 * Errors: HANDLE, INVALID, UNSUPPORTED (another criterion), STATE (not observed, or without what the
 * statistic needs), BUFFER, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_calibrator_statistic(fkv_calibrator *calibrator, int32_t layer,
                                            fkv_part part, fkv_statistic statistic, double *values,
                                            size_t count);
/**
 * Adds all that `other` has seen; `other` stays as it is. Both are of SENSITIVITY and of the same model.
 * Errors: HANDLE, INVALID (the same calibrator), UNSUPPORTED (another criterion), MISMATCH, NONFINITE,
 * LIMIT, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_calibrator_merge(fkv_calibrator *calibrator, fkv_calibrator *other);
/**
 * Writes the statistics of a calibrator of SENSITIVITY to `buffer` as bytes with a version and a checksum;
 * *needed gets their number. buffer may be NULL with bytes 0, to ask.
 * Errors: HANDLE, INVALID, UNSUPPORTED (another criterion), BUFFER, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_calibrator_save(fkv_calibrator *calibrator, char *buffer, size_t bytes,
                                       size_t *needed);
/**
 * Makes a calibrator from what fkv_calibrator_save() wrote. Everything is checked.
 * Errors: HANDLE, INVALID, NOMEM, LIMIT, FORMAT, VERSION, CHECKSUM. Since 0.1.
 */
FKV_API fkv_status fkv_calibrator_load(fkv_context *ctx, const char *data, size_t bytes,
                                       fkv_calibrator **out);
/** Fills *params with the defaults. Errors: INVALID. */
FKV_API fkv_status fkv_allocation_params_init(fkv_allocation_params *params, size_t struct_size);
/**
 * Makes a calibrated profile: bits go, over all channels of all layers, K and V together, to where they
 * avoid most loss, until the target is met. Carriers are the means. `params` may be NULL; *report (set its
 * struct_size before) may be NULL. Errors: HANDLE, INVALID, STATE (a layer with fewer than two
 * observations, or with neither gradients nor queries, or gradients in some layers only), UNSUPPORTED (a
 * target that cannot be met: the message says what can; another criterion), NONFINITE (a mean beyond what
 * carriers hold), NOMEM, LIMIT, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_calibrator_allocate(fkv_calibrator *calibrator,
                                           const fkv_allocation_params *params,
                                           fkv_allocation_info *report, fkv_profile **out);
/**
 * The same for a caller with losses of their own: k_losses and v_losses are [n_layers, Hk, D], the loss
 * of holding each channel's carrier alone, finite and not negative; losses_count is the number in each.
 * `codec` may be NULL. Carriers as in fkv_profile_create_coded(). On success *out is the caller's.
 * Errors: HANDLE, INVALID, UNSUPPORTED (target), NOMEM, LIMIT. Since 0.1.
 */
FKV_API fkv_status fkv_profile_create_allocated(fkv_context *ctx, const fkv_model_params *model,
                                                const fkv_codec_params *codec,
                                                const fkv_allocation_params *params,
                                                const double *k_losses, const double *v_losses,
                                                size_t losses_count, const float *k_carrier,
                                                const float *v_carrier, size_t carrier_count,
                                                fkv_allocation_info *report, fkv_profile **out);
/** Ends the handle. Errors: HANDLE, BUSY. Since 0.1. */
FKV_API fkv_status fkv_calibrator_destroy(fkv_calibrator *calibrator);

/* ------------------------------------------------------------------------------------------------ */
/* Cache and sequences                                                                              */

/** The keys and values of many sequences over all layers, under one profile. */
typedef struct fkv_cache fkv_cache;

/** Id of a sequence within its cache. Ids are never negative and are not reused. */
typedef int64_t fkv_sequence;

/** Stands for every sequence in fkv_cache_stats(). */
#define FKV_ALL_SEQUENCES -1

/** Stands for every layer in fkv_cache_fidelity(). */
#define FKV_ALL_LAYERS -1

/**
 * Holds an index beside the keys of each sealed block, so that selection (fkv_plan_select()) finds what it would
 * find without, faster (docs/longcache.md). Keys that are held in 16 bits take half as much again. For calibrated
 * profiles with FKV_DOMAIN_UNROTATED; KV heads with a channel of K that is not exact have none. CUDA: UNSUPPORTED.
 */
#define FKV_CACHE_KEY_INDEX 1u

/** How a cache is made. Since 0.1. */
typedef struct fkv_cache_params {
    /** sizeof(fkv_cache_params) as the caller compiled it. */
    uint32_t struct_size;
    /** Zero. */
    int32_t reserved;
    /** Tokens of one sequence. 0: the context's limit. */
    uint64_t max_tokens;
    /** Bytes of cached data. 0: the context's limit. */
    uint64_t max_bytes;
    /** FKV_CACHE_ flags; unknown bits are UNSUPPORTED. Since 0.1. */
    uint64_t flags;
} fkv_cache_params;

/** How a sequence is made. Since 0.1. */
typedef struct fkv_sequence_params {
    /** sizeof(fkv_sequence_params) as the caller compiled it. */
    uint32_t struct_size;
    /** Zero. */
    int32_t reserved;
    /**
     * Period T of the Fourier coding, in tokens: for best quality, just above the length that the
     * sequence will have, less sinks and local tokens. 0: the profile's. Ignored by other profiles.
     */
    int64_t period;
} fkv_sequence_params;

/**
 * Counted bytes and tokens of one sequence or of all of a cache. Bytes are those really allocated: of a
 * sequence all that it holds, whether or not others hold it too; of all sequences each byte once. Tokens
 * are of the sequence (not multiplied by layers), and of all sequences the sum. Since 0.1.
 */
typedef struct fkv_stats {
    /** sizeof(fkv_stats) as the caller compiled it; no more than this is written. */
    uint32_t struct_size;
    /** Zero. */
    int32_t reserved;
    /** Sequences counted. */
    uint64_t sequences;
    /** Tokens held. */
    uint64_t tokens;
    /** Of these, tokens held exactly in all channels (layer 0). */
    uint64_t tokens_exact;
    /** Of these, tokens of the coded middle (layer 0): in segments or in sealed blocks. */
    uint64_t tokens_coded;
    /** Everything below together. */
    uint64_t bytes;
    /** Sinks, tail, and middle that is not coded. */
    uint64_t bytes_exact;
    /** Exactly kept channels of the coded middle. */
    uint64_t bytes_kept;
    /** Fourier coefficients. */
    uint64_t bytes_coefficients;
    /** Means, gains, page tables, and (for all sequences) tables that sequences share. */
    uint64_t bytes_tables;
    /** What the same tokens take as dense f16, unshared: 4 * Hk * D * n_layers bytes each. */
    uint64_t dense_bytes;
    /** dense_bytes / bytes; 0 while nothing is held. */
    double ratio;
    /**
     * Of bytes, those that several sequences hold since a fork. Freeing the one sequence gives back
     * bytes - bytes_shared. For one sequence this looks at every page. Since 0.1.
     */
    uint64_t bytes_shared;
    /** Calibrated: residuals and exact channels of sealed blocks. */
    uint64_t bytes_blocks;
    /** Calibrated: scales and zero points of sealed blocks. */
    uint64_t bytes_scales;
    /** Indices of keys: FKV_CACHE_KEY_INDEX. Since 0.1. */
    uint64_t bytes_index;
} fkv_stats;

/**
 * What coding has cost attention, measured on the tokens and queries of this very cache: fkv_cache_meter()
 * chooses blocks, each is measured when it is sealed, while its exact tokens are still there, with the queries
 * of the token whose arrival seals it. A sample is one query head and one block. o and l are output and
 * log-sum-exp of attention to the block's tokens alone, exact; o' and l' the same from the sealed block; O the
 * query's whole output. Samples that are not finite are left out. Since 0.1.
 */
typedef struct fkv_fidelity {
    /** sizeof(fkv_fidelity) as the caller compiled it; no more than this is written. */
    uint32_t struct_size;
    /** Zero. */
    int32_t reserved;
    /** Of blocks that are chosen, as set. */
    double fraction;
    /** Blocks measured; those of each layer count. */
    uint64_t blocks;
    /**
     * Blocks chosen but not measured: sealed by fkv_append(), which has no queries, with selection, or by a plan
     * that was last updated before the meter started.
     */
    uint64_t blocks_missed;
    /** Samples: query heads of measured blocks. */
    uint64_t samples;
    /** sqrt(sum |o' - o|^2 / sum |o|^2): the relative error of the block's output. */
    double block_error;
    /** The largest |o' - o| / |o|. */
    double block_error_max;
    /** Mean of l' - l: above 0, coded tokens draw too much attention. */
    double lse_bias;
    /** Root of the mean of (l' - l)^2. */
    double lse_error;
    /** The largest |l' - l|. */
    double lse_error_max;
    /** Mean share of all attention that the block has. */
    double weight;
    /** sqrt(sum |O' - O|^2 / sum |O|^2), O' being O with this one block coded. */
    double output_error;
    /** The largest |O' - O| / |O|. */
    double output_error_max;
} fkv_fidelity;

/** Fills *params with the defaults. Errors: INVALID. */
FKV_API fkv_status fkv_cache_params_init(fkv_cache_params *params, size_t struct_size);
/** Fills *params with the defaults. Errors: INVALID. */
FKV_API fkv_status fkv_sequence_params_init(fkv_sequence_params *params, size_t struct_size);
/**
 * Makes an empty cache. `params` may be NULL. On success *out is the caller's, freed with
 * fkv_cache_destroy(). Errors: HANDLE, INVALID, NOMEM, LIMIT, UNSUPPORTED. Since 0.1.
 */
FKV_API fkv_status fkv_cache_create(fkv_context *ctx, fkv_profile *profile,
                                    const fkv_cache_params *params, fkv_cache **out);
/** Frees all sequences and ends the handle. Errors: HANDLE, BUSY (a call is running). Since 0.1. */
FKV_API fkv_status fkv_cache_destroy(fkv_cache *cache);
/** Makes an empty sequence. `params` may be NULL. Errors: HANDLE, INVALID, NOMEM, LIMIT, BUSY. */
FKV_API fkv_status fkv_sequence_create(fkv_cache *cache, const fkv_sequence_params *params,
                                       fkv_sequence *out);
/**
 * Makes a sequence that holds what `sequence` holds. *out is a sequence like any other: from now on the
 * two know nothing of each other and are freed in any order. No keys or values are copied, whatever the
 * length, only pointers to pages of 64 tokens; pages and coded tokens stay shared until the last that
 * holds them goes. A copy is made of what one of them writes to while another holds it: the last page at
 * its next append, and the Fourier segment under way when it next codes (never, if it ends before that).
 * Plans stay valid. Errors: HANDLE, INVALID, STATE (unequal layers), NOMEM, LIMIT, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_sequence_fork(fkv_cache *cache, fkv_sequence sequence, fkv_sequence *out);
/**
 * Drops the newest tokens so that `tokens` are left, of every layer: also those that a step stored in some
 * layers and not in others. What is left is what was held of it before, bit for bit. 0 empties the
 * sequence, always. Tokens held exactly can be dropped one by one, coded ones only together with all that
 * they were coded with. So these lengths are possible:
 *     from fkv_sequence_crop_limit() on, every one;
 *     up to the number of sinks, every one;
 *     between them, the ends of full Fourier segments: the number of sinks + i * 64 * (T / 64, rounded
 *     down); with a calibrated profile those of its blocks: the number of sinks + i * block. What remains coded then stays so, with no local window behind it until tokens are appended.
 * Any other is STATE, the message names the smallest length of the first kind and the nearest below.
 *
 * To take back draft tokens, append them and crop: right after an append, the last n_local tokens can
 * always be taken back. The rest is held as if they had never been, bit for bit, unless a tile was coded
 * because of them: it then stays coded, though its newest token is younger than n_local tokens. Where even
 * that must not be, append drafts to a fork.
 *
 * Nothing is allocated. Page tables keep their size unless `tokens` is 0. Plans that have the sequence are
 * outdated, unless it had that length already.
 * Errors: HANDLE, INVALID (negative, or more than fkv_sequence_length()), STATE, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_sequence_crop(fkv_cache *cache, fkv_sequence sequence, int64_t tokens);
/**
 * *limit gets the smallest length from which on fkv_sequence_crop() takes every one: the end of the coded
 * tokens, 0 if there are none. After a step that not all layers have had it can be more than
 * fkv_sequence_length(). Errors: HANDLE, INVALID, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_sequence_crop_limit(fkv_cache *cache, fkv_sequence sequence, int64_t *limit);
/**
 * *possible gets the greatest length, no more than `tokens`, that fkv_sequence_crop() takes. To go back to
 * any length: crop to this one, then append again what lies between.
 * Errors: HANDLE, INVALID (as for fkv_sequence_crop()), BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_sequence_crop_floor(fkv_cache *cache, fkv_sequence sequence, int64_t tokens,
                                           int64_t *possible);
/** Frees a sequence, and the memory that no other holds. Errors: HANDLE, BUSY. Since 0.1. */
FKV_API fkv_status fkv_sequence_free(fkv_cache *cache, fkv_sequence sequence);
/**
 * Number of tokens that every layer holds (between two steps all layers hold the same).
 * Errors: HANDLE, INVALID, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_sequence_length(fkv_cache *cache, fkv_sequence sequence, int64_t *tokens);
/**
 * Reads back what is held of `count` tokens from `first` on, as attention sees it: keys after RoPE, the
 * coded channels reconstructed in double precision. k and v are [count, Hk, D] outputs; either may be
 * NULL. For inspection and tests: slow.
 * Errors: HANDLE, INVALID, BUSY, NOMEM. Since 0.1.
 */
FKV_API fkv_status fkv_sequence_read(fkv_cache *cache, fkv_sequence sequence, int32_t layer,
                                     int64_t first, int64_t count, const fkv_tensor *k,
                                     const fkv_tensor *v);
/**
 * Fills *stats for a sequence or FKV_ALL_SEQUENCES; set stats->struct_size before.
 * Errors: HANDLE, INVALID, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_cache_stats(fkv_cache *cache, fkv_sequence sequence, fkv_stats *stats);
/**
 * Starts the fidelity meter of a cache with a calibrated profile, on the CPU: from each plan's next
 * fkv_plan_update() on this `fraction` of the blocks of every layer is measured; 1 measures all. Which, depends
 * on layer and place in the sequence only, evenly spread. Figures begin afresh; 0 ends the meter, as does the
 * cache's end. Outputs and what is held are the same bits with and without. Costs: docs/codec.md.
 * Errors: HANDLE, INVALID (not in 0..1), UNSUPPORTED (other profiles, CUDA), NOMEM, LIMIT, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_cache_meter(fkv_cache *cache, double fraction);
/**
 * Fills *fidelity with what the meter has found in a layer or FKV_ALL_LAYERS, over all sequences, also those
 * freed; set fidelity->struct_size before. All numbers but fraction are 0 until a block was measured.
 * Errors: HANDLE, INVALID, STATE (the meter is off), BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_cache_fidelity(fkv_cache *cache, int32_t layer, fkv_fidelity *fidelity);
/**
 * What fkv_cache_stats() will say of a cache without flags and one sequence of `tokens` tokens and the given
 * period (0: the profile's) that was never cropped, without allocating. Errors: HANDLE, INVALID, LIMIT. Since 0.1.
 */
FKV_API fkv_status fkv_profile_estimate(fkv_profile *profile, int64_t tokens, int64_t period,
                                        fkv_stats *stats);

/* ------------------------------------------------------------------------------------------------ */
/* Plan, append, attend                                                                             */

/** One step's ragged batch, prepared once and used by every layer. */
typedef struct fkv_plan fkv_plan;

/** A step: which sequences get how many new tokens. Only read during the call. Since 0.1. */
typedef struct fkv_batch {
    /** sizeof(fkv_batch) as the caller compiled it. */
    uint32_t struct_size;
    /** Entries of sequences and n_new. May be 0. */
    int32_t count;
    /** Sequence ids, each at most once. */
    const fkv_sequence *sequences;
    /** New tokens of each; 0 is allowed. */
    const int64_t *n_new;
    /** RoPE position of every new token, in batch order; NULL: a token's position is its index. */
    const int64_t *positions;
    /** Entries at positions: the sum over n_new; 0 if NULL. Positions are 0..2^31-1. */
    int64_t positions_count;
} fkv_batch;

/** Fills *batch with zeros and its size. Errors: INVALID. */
FKV_API fkv_status fkv_batch_init(fkv_batch *batch, size_t struct_size);
/** Makes an empty plan on a cache; *out is freed with fkv_plan_destroy(). Errors: HANDLE, NOMEM, LIMIT. */
FKV_API fkv_status fkv_plan_create(fkv_cache *cache, fkv_plan **out);
/**
 * Sets the step. All layers of a sequence must hold the same number of tokens. Allocates the workspace,
 * so that append and attend allocate nothing but cached data.
 * Errors: HANDLE, INVALID, STATE (unequal layers), LIMIT, NOMEM, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_plan_update(fkv_plan *plan, const fkv_batch *batch);
/**
 * Stores the step's new tokens of one layer: k and v [tokens, Hk, D], before RoPE. Then tokens that
 * have left the local window are coded. The bytes held depend only on the tokens, never on how they
 * were split into appends. Errors: HANDLE, INVALID, STATE (the layer has had this step, or the plan is
 * outdated), NONFINITE, NOMEM, LIMIT, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_append(fkv_plan *plan, int32_t layer, const fkv_tensor *k,
                              const fkv_tensor *v);
/**
 * Attention of the step's tokens: q and out [tokens, Hq, D], q before RoPE; lse [tokens, Hq], f32, may
 * be NULL. After fkv_append() of this step and layer each token sees all tokens up to itself; before it
 * each sees the tokens of earlier steps only, which is the part to merge with attention done elsewhere:
 * lse is the natural logarithm of the sum of exp(scale * q . k). A token that sees nothing gets 0 and
 * -infinity. out may be of another type than q.
 * Errors: HANDLE, INVALID, STATE (plan outdated), NONFINITE, NOMEM, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_attend(fkv_plan *plan, int32_t layer, const fkv_tensor *q,
                              const fkv_tensor *out, const fkv_tensor *lse);
/**
 * fkv_append() and fkv_attend() in one, attending before anything new is coded: the step's own tokens,
 * and the local window behind each, are seen exactly. This is the call for prefill and decode.
 * Errors: those of both. Since 0.1.
 */
FKV_API fkv_status fkv_append_attend(fkv_plan *plan, int32_t layer, const fkv_tensor *q,
                                     const fkv_tensor *k, const fkv_tensor *v,
                                     const fkv_tensor *out, const fkv_tensor *lse);
/**
 * Selection: attention to a sequence of any length within a finite scope (LongCache, arXiv 2407.15176, here
 * docs/longcache.md). Nothing is evicted. Queries that come together, at most `chunk`, see a view of
 *     [n_global first tokens | spans of the middle | n_local newest tokens, their own included]
 * at positions 0, 1, .. in this order, each query up to itself; the batch's positions have no influence. Views have
 * at most n_global + clip * span + n_local tokens: the scope, which should be the length that the model was trained
 * for. A sequence that fits is seen whole. Else each query head of each of the queries gives a vote to the top_k
 * keys of the middle with which its raw product q . k (no RoPE, no scale) is largest, of equal ones to the lower
 * token; the clip tokens of most votes, of equal ones the lower, become the centres of spans [c - span / 2,
 * c + (span + 1) / 2), cut off at the ends of the middle; what overlaps is one. Products that are NaN or -infinity
 * get no votes. One selection serves all heads of the layer. Since 0.1.
 */
typedef struct fkv_select_params {
    /** sizeof(fkv_select_params) as the caller compiled it. */
    uint32_t struct_size;
    /** First tokens that are always seen. Default 32. */
    int32_t n_global;
    /** Newest tokens that are always seen; at least 1. Default 4096. */
    int32_t n_local;
    /** Tokens of a span; at least 1. Default 32. */
    int32_t span;
    /** Votes of a query head. 0..FKV_MAX_TOP_K; 0: no spans. Default 4. */
    int32_t top_k;
    /** Most spans of a view. 0: no spans. Default 127. */
    int32_t clip;
    /**
     * Most queries that select together, 1..n_local. New tokens of a step are cut where their index is a multiple
     * of it: any split of the appends at such places gives the same selections. Default 512.
     */
    int32_t chunk;
    /** Zero. */
    int32_t reserved;
} fkv_select_params;

/** What the last queries of a sequence saw. Written by fkv_plan_selection(). Since 0.1. */
typedef struct fkv_selection {
    /** sizeof(fkv_selection) as the caller compiled it; no more than this is written. */
    uint32_t struct_size;
    /** Layer of the last attention with this plan. */
    int32_t layer;
    /** Tokens of the sequence, up to the last query. */
    int64_t tokens;
    /** Tokens of the view. */
    int64_t view;
    /** First token of the middle that was searched. */
    int64_t middle_first;
    /** End of that middle; equal to middle_first if everything was seen. */
    int64_t middle_end;
    /** Spans of the middle. */
    int64_t spans;
} fkv_selection;

/** Fills *params with the defaults above. Errors: INVALID. */
FKV_API fkv_status fkv_select_params_init(fkv_select_params *params, size_t struct_size);
/**
 * Makes a plan attend with selection from its next fkv_plan_update() on, or, with params NULL, without. Then
 * fkv_append_attend() and fkv_attend() work as described there, the latter after fkv_append() only (else STATE).
 * The plan's cache must have a calibrated profile with FKV_DOMAIN_UNROTATED (else UNSUPPORTED).
 * Errors: HANDLE, INVALID, UNSUPPORTED, BUSY. Since 0.1.
 */
FKV_API fkv_status fkv_plan_select(fkv_plan *plan, const fkv_select_params *params);
/**
 * Tells what the queries of a sequence (`index` in the batch) saw in the last attention with this plan: those of
 * the last chunk, if there were several. Set selection->struct_size before. spans, which may be NULL with count 0,
 * gets the first token and the end of each span, in ascending order; `count` is the number of int64_t at spans.
 * Errors: HANDLE, INVALID, STATE (no attention with selection since the last update), BUSY, BUFFER (*selection is
 * written: 2 * selection->spans are needed). Since 0.1.
 */
FKV_API fkv_status fkv_plan_selection(fkv_plan *plan, int32_t index, fkv_selection *selection,
                                      int64_t *spans, size_t count);
/**
 * CUDA: tells that a graph, into which the step's calls of all layers were captured, has been launched once
 * more (docs/cuda.md). During a capture the calls only record; the cache's books follow here, and blocks that
 * became full are coded. Errors: HANDLE, STATE (a layer has had this step), UNSUPPORTED, DEVICE, BUSY.
 * Since 0.1.
 */
FKV_API fkv_status fkv_plan_replayed(fkv_plan *plan);
/** Ends the handle. Errors: HANDLE, BUSY. Since 0.1. */
FKV_API fkv_status fkv_plan_destroy(fkv_plan *plan);
/**
 * Merges attention over disjoint sets of tokens: out_a and out_b [tokens, Hq, D], lse_a and lse_b
 * [tokens, Hq] f32; the result replaces out_a and lse_a. Exact: o = sum e^{l_i - m} o_i / sum e^{l_i - m}.
 * Errors: HANDLE, INVALID. Since 0.1.
 */
FKV_API fkv_status fkv_merge(fkv_context *ctx, const fkv_tensor *out_a, const fkv_tensor *lse_a,
                             const fkv_tensor *out_b, const fkv_tensor *lse_b);

#ifdef __cplusplus
}
#endif

#endif /* FKV_FKV_H */
