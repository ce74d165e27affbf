/* SPDX-License-Identifier: Apache-2.0 */
/* The command line. */
#ifndef NEEDLE_OPTIONS_H
#define NEEDLE_OPTIONS_H

#include "engine.h"
#include "tasks.h"

struct needle_options {
    const char *model;
    const char *profiles[NEEDLE_MAX_PROFILES]; /* "exact", "fourier", "uniform:..", or files */
    size_t n_profiles;
    fkv_dtype storage;
    const char *text; /* NULL: the project's documentation */
    const char *logits;
    enum needle_task task;
    const char *task_name;
    size_t context;
    double depth; /* negative: spread over the items */
    size_t distractors;
    size_t items;
    bool together;   /* items ask about the same text, per_text of them */
    bool same_text;  /* items differ from the number that they hide on */
    size_t per_text; /* numbers hidden in it */
    uint64_t seed;
    int32_t threads; /* 0: all processors */
    size_t chunk;    /* 0: the whole context at once, with selection select.chunk */
    bool longcache;
    int32_t scope; /* 0: the model's trained window */
    double meter;  /* fraction of the blocks to measure; 0: none */
    bool index;
    bool json;
    bool help;
    bool version;
    /* Calibration; `calibrate` is the file to write, NULL: none. 0 and -1 mean the library's default. */
    const char *calibrate;
    size_t calibrate_prompts;
    fkv_criterion criterion;
    fkv_restoration restoration;
    int32_t bins;
    int32_t local;
};

/* The strings of argv are borrowed. */
int needle_options_parse(int argc, char **argv, struct needle_options *options,
                         struct needle_error *error);
/* Text of --help. */
extern const char needle_usage[];

#endif
