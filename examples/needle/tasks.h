/* SPDX-License-Identifier: Apache-2.0 */
/* Questions about long texts. Their sentences are those the model was trained on: keep them. */
#ifndef NEEDLE_TASKS_H
#define NEEDLE_TASKS_H

#include "text.h"

enum needle_task {
    NEEDLE_TASK_NIAH, /* find the number of a key that is hidden in the text */
    NEEDLE_TASK_COPY, /* repeat a passage of 160 bytes that was marked in the text */
    NEEDLE_TASK_TEXT  /* predict 511 bytes of plain text */
};

/* One question: [context | question | answer]. The cache holds the context before the rest is known. */
struct needle_item {
    uint8_t *tokens;
    size_t length;
    size_t shared;   /* tokens before the first hidden sentence (niah) */
    size_t question; /* first token of the question */
    size_t prompt;   /* first token of the answer */
    double depth;    /* where the needle is, 0..1; 0 for plain text */
};

struct needle_source {
    struct needle_span text;
    const struct needle_words *words;
    struct needle_random
        *begin; /* draws where in the text a context begins; NULL: the item's own */
};

/* Distractors of the multikey task. */
#define NEEDLE_MULTIKEY 60

/*
 * Makes an item whose context and question together have `context` tokens. `depth` is ignored by copy
 * and text, which draw or need none, `distractors` too. For text, `index` chooses the passage.
 */
int needle_item_niah(struct needle_source source, size_t context, double depth, size_t distractors,
                     struct needle_random *random, struct needle_item *item,
                     struct needle_error *error);
/*
 * One of `count` items that share their text and hide a number each in it, evenly spread: up to the question they
 * are the same if `random` is in the same state.
 */
int needle_item_together(struct needle_source source, size_t context, size_t count, size_t index,
                         struct needle_random *random, struct needle_item *item,
                         struct needle_error *error);
int needle_item_copy(struct needle_source source, size_t context, struct needle_random *random,
                     struct needle_item *item, struct needle_error *error);
int needle_item_text(struct needle_source source, size_t context, size_t index,
                     struct needle_item *item, struct needle_error *error);
void needle_item_free(struct needle_item *item);

#endif
