/* SPDX-License-Identifier: Apache-2.0 */
/* The weights of a model folder: model.safetensors, or several files behind an index. */
#ifndef NEEDLE_SAFETENSORS_H
#define NEEDLE_SAFETENSORS_H

#include "common.h"

struct needle_weights;

/*
 * Opens dir/model.safetensors.index.json with the files it names, else dir/model.safetensors, and checks
 * every header: JSON, types, shapes, byte ranges against the size of the file. *out is freed with
 * needle_weights_close().
 */
int needle_weights_open(const char *dir, struct needle_weights **out, struct needle_error *error);
void needle_weights_close(struct needle_weights *weights);

/*
 * Reads a tensor of exactly this shape (cols 0: one dimension) as f32 into `out`. A missing tensor,
 * another shape, or a value that is not finite is NEEDLE_BAD_INPUT.
 */
int needle_weights_read(struct needle_weights *weights, const char *name, size_t rows, size_t cols,
                        float *out, struct needle_error *error);
/* Name of a tensor that was never read and for which `ignore` says no; NULL if there is none. */
const char *needle_weights_unread(const struct needle_weights *weights,
                                  bool (*ignore)(const char *name, const void *user),
                                  const void *user, const char **file);

#endif
