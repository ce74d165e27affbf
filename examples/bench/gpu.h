/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The little of the CUDA driver that the bench and the tests need, found at run time: they build and start without
 * CUDA. Every function ends the program with a message if the driver refuses.
 */
#ifndef FKV_GPU_H
#define FKV_GPU_H

#include <stdbool.h>
#include <stddef.h>

/* false if there is no driver or no such device; *why says which. */
bool gpu_open(int device, const char **why);
/* Name of the device, version of the driver, processors. */
const char *gpu_name(void);
int gpu_driver_version(void);

void *gpu_alloc(size_t bytes); /* filled with 0xff: NaN in every type */
void gpu_free(void *pointer);
void gpu_fill(void *pointer, unsigned char byte, size_t bytes);
void gpu_to_device(void *to, const void *from, size_t bytes);
void gpu_to_host(void *to, const void *from, size_t bytes);
void gpu_copy(void *to, const void *from, size_t bytes, void *stream);
size_t gpu_free_bytes(void);

void *gpu_stream_new(void);
void gpu_stream_free(void *stream);
void gpu_synchronize(void);

void *gpu_event_new(void);
void gpu_event_record(void *event, void *stream);
/* Waits for the second event; seconds between them. */
double gpu_event_seconds(void *first, void *second);

void gpu_capture_begin(void *stream);
void *gpu_capture_end(void *stream); /* an executable graph */
void gpu_graph_launch(void *graph, void *stream);
void gpu_graph_free(void *graph);

#endif /* FKV_GPU_H */
