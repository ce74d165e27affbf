/* SPDX-License-Identifier: Apache-2.0 */
/* Puts one item to the model and measures. */
#ifndef NEEDLE_RUN_H
#define NEEDLE_RUN_H

#include <stdio.h>

#include "engine.h"
#include "tasks.h"

struct needle_result {
    uint8_t *answer; /* [expected], what the model said */
    size_t expected; /* tokens of the right answer */
    bool right;
    double byte_accuracy;
    double bits_per_byte; /* of the right answer; copy and text only */
    size_t prefill_tokens;
    double prefill_s;
    size_t decode_tokens; /* forward passes of one token; copy and text: tokens of the only one */
    double decode_s;
    uint64_t kv_bytes;
    uint64_t dense_bytes;
    double ratio;
    uint64_t peak_rss_bytes;
};

struct needle_run {
    struct needle_engine *engine;
    enum needle_task task;
    bool together;  /* items differ in their questions only: the first one's context serves all */
    bool read;      /* and is in the engine's sequences */
    bool same_text; /* contexts are the same up to the first hidden sentence */
    size_t trunk;   /* tokens that the engine's first sequence keeps of them */
    fkv_sequence whole;               /* what a fork is at work for; -1: none */
    size_t chunk;                     /* of the prefill; 0: the whole context */
    const fkv_profile_info *profiles; /* of what the engine holds */
    FILE *logits;                     /* may be NULL */
    const char *logits_path;
    const char *label;     /* of the progress bar */
    size_t prefill_tokens; /* of the context that was read last */
    double prefill_s;
};

/*
 * Begins new sequences and fills them with the context, which does not show the question. Nothing to do if
 * the items share one context and it has been read; with same_text, only what no item before has read.
 */
int needle_run_read(struct needle_run *run, const struct needle_item *item,
                    struct needle_error *error);

/*
 * Puts the question to what the engine holds under profile `index`. niah: the answer is generated
 * greedily. copy and text: the right answer is given token by token and every prediction compared.
 * result->answer is freed with needle_result_free().
 */
int needle_run_ask(struct needle_run *run, const struct needle_item *item, size_t index,
                   struct needle_result *result, struct needle_error *error);
void needle_result_free(struct needle_result *result);

#endif
