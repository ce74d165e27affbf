/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The layout of every public struct and the value of every public constant, for 64-bit (LP64) hosts.
 * Programs are compiled against these, so a line here is never changed: fields and constants are only
 * added, at the end. Size lines change when a struct grows.
 */
#include <fkv/fkv.h>

#define SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), "size of " #type)
#define FIELD(type, field, offset, bytes)                                                          \
    _Static_assert(offsetof(type, field) == (offset) && sizeof(((type *)0)->field) == (bytes),     \
                   #type "." #field)
#define VALUE(name, value) _Static_assert((name) == (value), #name)

SIZE(fkv_tensor, 104);
FIELD(fkv_tensor, struct_size, 0, 4);
FIELD(fkv_tensor, dtype, 4, 4);
FIELD(fkv_tensor, device, 8, 4);
FIELD(fkv_tensor, device_id, 12, 4);
FIELD(fkv_tensor, data, 16, 8);
FIELD(fkv_tensor, byte_length, 24, 8);
FIELD(fkv_tensor, ndim, 32, 4);
FIELD(fkv_tensor, reserved, 36, 4);
FIELD(fkv_tensor, shape, 40, 32);
FIELD(fkv_tensor, strides, 72, 32);

SIZE(fkv_context_params, 112);
FIELD(fkv_context_params, struct_size, 0, 4);
FIELD(fkv_context_params, backend, 4, 4);
FIELD(fkv_context_params, threads, 8, 4);
FIELD(fkv_context_params, cpu_level, 12, 4);
FIELD(fkv_context_params, flags, 16, 8);
FIELD(fkv_context_params, alloc, 24, 8);
FIELD(fkv_context_params, free, 32, 8);
FIELD(fkv_context_params, alloc_user, 40, 8);
FIELD(fkv_context_params, max_bytes, 48, 8);
FIELD(fkv_context_params, max_tokens, 56, 8);
FIELD(fkv_context_params, max_file_bytes, 64, 8);
FIELD(fkv_context_params, message, 72, 8);
FIELD(fkv_context_params, message_bytes, 80, 8);
FIELD(fkv_context_params, device_id, 88, 4);
FIELD(fkv_context_params, reserved, 92, 4);
FIELD(fkv_context_params, module_path, 96, 8);
FIELD(fkv_context_params, stream, 104, 8);

SIZE(fkv_context_info, 40);
FIELD(fkv_context_info, struct_size, 0, 4);
FIELD(fkv_context_info, backend, 4, 4);
FIELD(fkv_context_info, threads, 8, 4);
FIELD(fkv_context_info, cpu_level, 12, 4);
FIELD(fkv_context_info, live_bytes, 16, 8);
FIELD(fkv_context_info, peak_bytes, 24, 8);
FIELD(fkv_context_info, best_cpu_level, 32, 4);
FIELD(fkv_context_info, has_cuda, 36, 4);

SIZE(fkv_model_params, 64);
FIELD(fkv_model_params, struct_size, 0, 4);
FIELD(fkv_model_params, n_layers, 4, 4);
FIELD(fkv_model_params, n_q_heads, 8, 4);
FIELD(fkv_model_params, n_kv_heads, 12, 4);
FIELD(fkv_model_params, head_dim, 16, 4);
FIELD(fkv_model_params, rope_layout, 20, 4);
FIELD(fkv_model_params, rope_dim, 24, 4);
FIELD(fkv_model_params, inv_freq_count, 28, 4);
FIELD(fkv_model_params, inv_freq, 32, 8);
FIELD(fkv_model_params, rope_scaling, 40, 8);
FIELD(fkv_model_params, softmax_scale, 48, 8);
FIELD(fkv_model_params, model_id, 56, 8);

SIZE(fkv_fourier_params, 48);
FIELD(fkv_fourier_params, struct_size, 0, 4);
FIELD(fkv_fourier_params, storage_dtype, 4, 4);
FIELD(fkv_fourier_params, coefficient_dtype, 8, 4);
FIELD(fkv_fourier_params, bins, 12, 4);
FIELD(fkv_fourier_params, n_sink, 16, 4);
FIELD(fkv_fourier_params, n_local, 20, 4);
FIELD(fkv_fourier_params, restoration, 24, 4);
FIELD(fkv_fourier_params, outgrow, 28, 4);
FIELD(fkv_fourier_params, period, 32, 8);
FIELD(fkv_fourier_params, min_middle, 40, 8);

SIZE(fkv_codec_params, 32);
FIELD(fkv_codec_params, struct_size, 0, 4);
FIELD(fkv_codec_params, storage_dtype, 4, 4);
FIELD(fkv_codec_params, group, 8, 4);
FIELD(fkv_codec_params, block, 12, 4);
FIELD(fkv_codec_params, n_sink, 16, 4);
FIELD(fkv_codec_params, n_local, 20, 4);
FIELD(fkv_codec_params, domain, 24, 4);
FIELD(fkv_codec_params, spectral_bins, 28, 4);

SIZE(fkv_profile_info, 136);
FIELD(fkv_profile_info, struct_size, 0, 4);
FIELD(fkv_profile_info, coding, 4, 4);
FIELD(fkv_profile_info, n_layers, 8, 4);
FIELD(fkv_profile_info, n_q_heads, 12, 4);
FIELD(fkv_profile_info, n_kv_heads, 16, 4);
FIELD(fkv_profile_info, head_dim, 20, 4);
FIELD(fkv_profile_info, rope_layout, 24, 4);
FIELD(fkv_profile_info, rope_dim, 28, 4);
FIELD(fkv_profile_info, storage_dtype, 32, 4);
FIELD(fkv_profile_info, coefficient_dtype, 36, 4);
FIELD(fkv_profile_info, bins, 40, 4);
FIELD(fkv_profile_info, n_sink, 44, 4);
FIELD(fkv_profile_info, n_local, 48, 4);
FIELD(fkv_profile_info, restoration, 52, 4);
FIELD(fkv_profile_info, outgrow, 56, 4);
FIELD(fkv_profile_info, reserved, 60, 4);
FIELD(fkv_profile_info, period, 64, 8);
FIELD(fkv_profile_info, min_middle, 72, 8);
FIELD(fkv_profile_info, k_fourier_channels, 80, 8);
FIELD(fkv_profile_info, v_fourier_channels, 88, 8);
FIELD(fkv_profile_info, softmax_scale, 96, 8);
FIELD(fkv_profile_info, group, 104, 4);
FIELD(fkv_profile_info, block, 108, 4);
FIELD(fkv_profile_info, domain, 112, 4);
FIELD(fkv_profile_info, reserved2, 116, 4);
FIELD(fkv_profile_info, k_bits, 120, 8);
FIELD(fkv_profile_info, v_bits, 128, 8);

SIZE(fkv_calibrator_params, 24);
FIELD(fkv_calibrator_params, struct_size, 0, 4);
FIELD(fkv_calibrator_params, criterion, 4, 4);
FIELD(fkv_calibrator_params, fourier, 8, 8);
FIELD(fkv_calibrator_params, codec, 16, 8);

SIZE(fkv_allocation_params, 48);
FIELD(fkv_allocation_params, struct_size, 0, 4);
FIELD(fkv_allocation_params, target, 4, 4);
FIELD(fkv_allocation_params, value, 8, 8);
FIELD(fkv_allocation_params, tokens, 16, 8);
FIELD(fkv_allocation_params, levels, 24, 8);
FIELD(fkv_allocation_params, weights, 32, 8);
FIELD(fkv_allocation_params, weights_count, 40, 8);

SIZE(fkv_allocation_info, 48);
FIELD(fkv_allocation_info, struct_size, 0, 4);
FIELD(fkv_allocation_info, reserved, 4, 4);
FIELD(fkv_allocation_info, predicted_loss, 8, 8);
FIELD(fkv_allocation_info, carrier_loss, 16, 8);
FIELD(fkv_allocation_info, bits, 24, 8);
FIELD(fkv_allocation_info, ratio, 32, 8);
FIELD(fkv_allocation_info, tokens, 40, 8);

SIZE(fkv_cache_params, 32);
FIELD(fkv_cache_params, struct_size, 0, 4);
FIELD(fkv_cache_params, reserved, 4, 4);
FIELD(fkv_cache_params, max_tokens, 8, 8);
FIELD(fkv_cache_params, max_bytes, 16, 8);
FIELD(fkv_cache_params, flags, 24, 8);

SIZE(fkv_sequence_params, 16);
FIELD(fkv_sequence_params, struct_size, 0, 4);
FIELD(fkv_sequence_params, reserved, 4, 4);
FIELD(fkv_sequence_params, period, 8, 8);

SIZE(fkv_stats, 128);
FIELD(fkv_stats, struct_size, 0, 4);
FIELD(fkv_stats, reserved, 4, 4);
FIELD(fkv_stats, sequences, 8, 8);
FIELD(fkv_stats, tokens, 16, 8);
FIELD(fkv_stats, tokens_exact, 24, 8);
FIELD(fkv_stats, tokens_coded, 32, 8);
FIELD(fkv_stats, bytes, 40, 8);
FIELD(fkv_stats, bytes_exact, 48, 8);
FIELD(fkv_stats, bytes_kept, 56, 8);
FIELD(fkv_stats, bytes_coefficients, 64, 8);
FIELD(fkv_stats, bytes_tables, 72, 8);
FIELD(fkv_stats, dense_bytes, 80, 8);
FIELD(fkv_stats, ratio, 88, 8);
FIELD(fkv_stats, bytes_shared, 96, 8);
FIELD(fkv_stats, bytes_blocks, 104, 8);
FIELD(fkv_stats, bytes_scales, 112, 8);
FIELD(fkv_stats, bytes_index, 120, 8);

SIZE(fkv_fidelity, 104);
FIELD(fkv_fidelity, struct_size, 0, 4);
FIELD(fkv_fidelity, reserved, 4, 4);
FIELD(fkv_fidelity, fraction, 8, 8);
FIELD(fkv_fidelity, blocks, 16, 8);
FIELD(fkv_fidelity, blocks_missed, 24, 8);
FIELD(fkv_fidelity, samples, 32, 8);
FIELD(fkv_fidelity, block_error, 40, 8);
FIELD(fkv_fidelity, block_error_max, 48, 8);
FIELD(fkv_fidelity, lse_bias, 56, 8);
FIELD(fkv_fidelity, lse_error, 64, 8);
FIELD(fkv_fidelity, lse_error_max, 72, 8);
FIELD(fkv_fidelity, weight, 80, 8);
FIELD(fkv_fidelity, output_error, 88, 8);
FIELD(fkv_fidelity, output_error_max, 96, 8);

SIZE(fkv_batch, 40);
FIELD(fkv_batch, struct_size, 0, 4);

FIELD(fkv_batch, count, 4, 4);
FIELD(fkv_batch, sequences, 8, 8);
FIELD(fkv_batch, n_new, 16, 8);
FIELD(fkv_batch, positions, 24, 8);
FIELD(fkv_batch, positions_count, 32, 8);

SIZE(fkv_select_params, 32);
FIELD(fkv_select_params, struct_size, 0, 4);
FIELD(fkv_select_params, n_global, 4, 4);
FIELD(fkv_select_params, n_local, 8, 4);
FIELD(fkv_select_params, span, 12, 4);
FIELD(fkv_select_params, top_k, 16, 4);
FIELD(fkv_select_params, clip, 20, 4);
FIELD(fkv_select_params, chunk, 24, 4);
FIELD(fkv_select_params, reserved, 28, 4);

SIZE(fkv_selection, 48);
FIELD(fkv_selection, struct_size, 0, 4);
FIELD(fkv_selection, layer, 4, 4);
FIELD(fkv_selection, tokens, 8, 8);
FIELD(fkv_selection, view, 16, 8);
FIELD(fkv_selection, middle_first, 24, 8);
FIELD(fkv_selection, middle_end, 32, 8);
FIELD(fkv_selection, spans, 40, 8);

VALUE(FKV_OK, 0);
VALUE(FKV_ERR_INVALID, -1);
VALUE(FKV_ERR_HANDLE, -2);
VALUE(FKV_ERR_STATE, -3);
VALUE(FKV_ERR_NOMEM, -4);
VALUE(FKV_ERR_LIMIT, -5);
VALUE(FKV_ERR_NONFINITE, -6);
VALUE(FKV_ERR_IO, -7);
VALUE(FKV_ERR_FORMAT, -8);
VALUE(FKV_ERR_CHECKSUM, -9);
VALUE(FKV_ERR_VERSION, -10);
VALUE(FKV_ERR_MISMATCH, -11);
VALUE(FKV_ERR_UNSUPPORTED, -12);
VALUE(FKV_ERR_DEVICE, -13);
VALUE(FKV_ERR_BUSY, -14);
VALUE(FKV_ERR_BUFFER, -15);
VALUE(FKV_DTYPE_NONE, 0);
VALUE(FKV_DTYPE_F32, 1);
VALUE(FKV_DTYPE_F16, 2);
VALUE(FKV_DTYPE_BF16, 3);
VALUE(FKV_DEVICE_CPU, 0);
VALUE(FKV_DEVICE_CUDA, 1);
VALUE(FKV_BACKEND_CPU, 0);
VALUE(FKV_BACKEND_CUDA, 1);
VALUE(FKV_CPU_BEST, 0);
VALUE(FKV_CPU_REFERENCE, 1);
VALUE(FKV_CPU_AVX2, 2);
VALUE(FKV_CPU_AVX512, 3);
VALUE(FKV_ROPE_NONE, 0);
VALUE(FKV_ROPE_HALF_SPLIT, 1);
VALUE(FKV_ROPE_INTERLEAVED, 2);
VALUE(FKV_RESTORE_LEAST_SQUARES, 0);
VALUE(FKV_RESTORE_AUTHORS, 1);
VALUE(FKV_OUTGROW_SEGMENT, 0);
VALUE(FKV_OUTGROW_ERROR, 1);
VALUE(FKV_PART_K, 0);
VALUE(FKV_PART_V, 1);
VALUE(FKV_CHANNEL_CARRIER, 0);
VALUE(FKV_CHANNEL_FOURIER, 1);
VALUE(FKV_CHANNEL_2BIT, 2);
VALUE(FKV_CHANNEL_3BIT, 3);
VALUE(FKV_CHANNEL_4BIT, 4);
VALUE(FKV_CHANNEL_8BIT, 8);
VALUE(FKV_CHANNEL_EXACT, 16);
VALUE(FKV_CODING_EXACT, 0);
VALUE(FKV_CODING_FOURIER, 1);
VALUE(FKV_CODING_CALIBRATED, 2);
VALUE(FKV_DOMAIN_ROTATED, 0);
VALUE(FKV_DOMAIN_UNROTATED, 1);
VALUE(FKV_CRITERION_RESIDUAL, 0);
VALUE(FKV_CRITERION_PUBLISHED, 1);
VALUE(FKV_CRITERION_SENSITIVITY, 2);
VALUE(FKV_STATISTIC_MEAN, 0);
VALUE(FKV_STATISTIC_VARIANCE, 1);
VALUE(FKV_STATISTIC_SENSITIVITY, 2);
VALUE(FKV_STATISTIC_QUERY, 3);
VALUE(FKV_STATISTIC_SLOW_SHARE, 4);
VALUE(FKV_STATISTIC_LOSS, 5);
VALUE(FKV_TARGET_RATIO, 0);
VALUE(FKV_TARGET_BITS, 1);
VALUE(FKV_TARGET_LOSS, 2);

VALUE(FKV_MAX_TOP_K, 256);
VALUE(FKV_MAX_SCOPE, 16777216);
VALUE(FKV_CONTEXT_PROPAGATE_NONFINITE, 1u);
VALUE(FKV_CACHE_KEY_INDEX, 1u);
VALUE(FKV_ALL_SEQUENCES, -1);
VALUE(FKV_ALL_LAYERS, -1);
