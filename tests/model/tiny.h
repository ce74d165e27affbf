/* SPDX-License-Identifier: Apache-2.0 */
/* Writes model folders of a few thousand parameters, right and wrong ones. */
#ifndef TINY_H
#define TINY_H

#include <fkv/fkv.h>
#include <stdbool.h>
#include <stddef.h>

enum { TINY_HIDDEN = 32, TINY_INNER = 40, TINY_HEADS = 4, TINY_LAYERS = 2, TINY_VOCAB = 256 };

struct tiny {
    fkv_dtype dtype;
    int kv_heads;
    int head_dim; /* TINY_HIDDEN / TINY_HEADS: config.json leaves it out */
    bool tied;
    bool indexed;       /* two files behind an index */
    const char *config; /* appended to the keys of config.json, such as ", \"mlp_bias\": true" */
    const char *skip;   /* name of a tensor that is left out */
    const char *extra;  /* name of one [2] tensor too many */
    const char *nan;    /* name of a tensor whose first element is NaN */
    int added_rows;     /* of every matrix, beyond what config.json says */
};

/* What the matrix `name` has at element i; exact in all types. */
float tiny_value(const char *name, size_t i);
/* Writes config.json and weights into an existing folder; aborts the test if it cannot. */
void tiny_write(const char *dir, const struct tiny *tiny);
/* Writes a file of the folder. */
void tiny_write_file(const char *dir, const char *name, const void *bytes, size_t count);
/* Makes an empty temporary folder; removes one with the files in it. */
void tiny_make_dir(char *dir, size_t bytes);
void tiny_remove_dir(const char *dir);

#endif
