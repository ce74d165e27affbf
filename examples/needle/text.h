/* SPDX-License-Identifier: Apache-2.0 */
/* The text in which needles are hidden, and the words their keys are made of. */
#ifndef NEEDLE_TEXT_H
#define NEEDLE_TEXT_H

#include "common.h"

/* Printable ASCII and newlines only. */
struct needle_text {
    uint8_t *bytes;
    size_t count;
};

/* A borrowed part of a text. */
struct needle_span {
    const uint8_t *bytes;
    size_t count;
};

#define NEEDLE_WORD_BYTES 11 /* ten letters and the end */

/* Lower-case words of a text, the most common first. */
struct needle_words {
    char (*word)[NEEDLE_WORD_BYTES];
    size_t count;
};

/*
 * Loads a text file, or, with path NULL, the project's own documentation: the *.md files of the source
 * tree and of its docs folder, one after the other. Runs of bytes that are not ASCII become one
 * hyphen.
 */
int needle_text_load(const char *path, struct needle_text *text, struct needle_error *error);
void needle_text_free(struct needle_text *text);

/* Calibration reads the first half of a text, tests read the second. */
struct needle_span needle_text_half(const struct needle_text *text, int half);
/* Copies `count` bytes from `offset` on; a span that is too short starts again from its beginning. */
void needle_span_copy(struct needle_span span, size_t offset, uint8_t *out, size_t count);

int needle_words_collect(const struct needle_text *text, struct needle_words *words,
                         struct needle_error *error);
void needle_words_free(struct needle_words *words);

#endif
