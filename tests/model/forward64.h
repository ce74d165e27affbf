/* SPDX-License-Identifier: Apache-2.0 */
/* The model once more, in double precision and plain loops: shares no arithmetic with what it checks. */
#ifndef FORWARD64_H
#define FORWARD64_H

#include "model.h"

/* Logits [n, vocab] of all n tokens. Returns false without memory. */
bool forward64(const struct needle_model *model, const uint8_t *tokens, size_t n, double *logits);

#endif
