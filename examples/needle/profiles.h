/* SPDX-License-Identifier: Apache-2.0 */
/* What --profile names. */
#ifndef NEEDLE_PROFILES_H
#define NEEDLE_PROFILES_H

#include "model.h"
#include "options.h"

/* *profile is to be destroyed, also after an error, where it may be NULL. */
int needle_profile_make(const struct needle_options *options, const char *name,
                        const struct needle_model *model, fkv_context *ctx, fkv_profile **profile,
                        fkv_profile_info *info, struct needle_error *error);

#endif
