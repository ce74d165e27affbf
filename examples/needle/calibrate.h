/* SPDX-License-Identifier: Apache-2.0 */
#ifndef NEEDLE_CALIBRATE_H
#define NEEDLE_CALIBRATE_H

#include "model.h"
#include "options.h"

/*
 * Runs prompts through the model with an exact cache, hands every layer's keys, values and queries to a
 * fkv_calibrator, and writes the solved profile to options->calibrate.
 */
int needle_calibrate(const struct needle_options *options, const struct needle_model *model,
                     fkv_context *ctx, struct needle_source source, struct needle_error *error);

#endif
