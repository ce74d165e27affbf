/* SPDX-License-Identifier: Apache-2.0 */
/* What the two readers of JSON share. */
#ifndef FKV_PROFILE_JSON_H
#define FKV_PROFILE_JSON_H

#include "core/core.h"

#include <jansson.h>

/* Parses a whole text, strictly. On success *root is the caller's, an object. */
fkv_status fkv_json_parse(struct fkv_ctx *ctx, const char *text, size_t bytes, json_t **root);
/* "string", "integer", ...; "nothing" for NULL. */
const char *fkv_json_type(const json_t *value);

#endif /* FKV_PROFILE_JSON_H */
