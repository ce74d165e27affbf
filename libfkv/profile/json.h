/* SPDX-License-Identifier: Apache-2.0 */
/* What the two readers of JSON share. */
#ifndef FKV_PROFILE_JSON_H
#define FKV_PROFILE_JSON_H

#include "profile/profile.h"

#include <jansson.h>

/* Parses a whole text, strictly. On success *root is the caller's, an object. */
fkv_status fkv_json_parse(struct fkv_ctx *ctx, const char *text, size_t bytes, json_t **root);
/* "string", "integer", ...; "nothing" for NULL. */
const char *fkv_json_type(const json_t *value);

/* Reads members. The first error stays; after it every function returns nothing. */
struct fkv_reader {
    struct fkv_ctx *ctx;
    fkv_status status;
};

#define FKV_JSON_FAIL(r, ...) ((r)->status = fkv_fail((r)->ctx, FKV_ERR_FORMAT, __VA_ARGS__))

/* place: "" or the path of `object` with a final dot. NULL if missing or of another type. */
json_t *fkv_json_member(struct fkv_reader *r, const json_t *object, const char *place,
                        const char *key, json_type type);
/* Every key must be one of `known`. */
void fkv_json_only_keys(struct fkv_reader *r, json_t *object, const char *place,
                        const char *const *known, size_t count);
int64_t fkv_json_int(struct fkv_reader *r, const json_t *object, const char *place,
                     const char *key);
int32_t fkv_json_int32(struct fkv_reader *r, const json_t *object, const char *place,
                       const char *key);
double fkv_json_real(struct fkv_reader *r, const json_t *object, const char *place,
                     const char *key);
/* The index of a string's value among names, some of which may be NULL. */
int32_t fkv_json_name(struct fkv_reader *r, const json_t *object, const char *place,
                      const char *key, const char *const *names, size_t count);
/* The array `key` with one entry for every KV head; NULL after an error. */
json_t *fkv_json_heads(struct fkv_reader *r, const struct fkv_model *m, const json_t *layer,
                       const char *place, const char *key);

/* coded_json.c: the layers of a calibrated profile. */
void fkv_json_read_coded(struct fkv_reader *r, json_t *root, struct fkv_model *model,
                         const fkv_codec_params *codec, struct fkv_profile_object **out);
/* NULL if there is no memory. */
json_t *fkv_json_coded_layers(const struct fkv_profile_object *p);

#endif /* FKV_PROFILE_JSON_H */
