/* SPDX-License-Identifier: Apache-2.0 */
#include "tasks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COPY_BYTES 160
#define TEXT_BYTES 511
#define MIN_HAY 64
#define MAX_SENTENCE 96

static const char HEAD[] = "A special magic number is hidden within the following text. "
                           "Make sure to memorize it.\n";

struct sentence {
    double depth;
    char text[MAX_SENTENCE];
};

/* Bytes are appended to tokens, which has room for all that the item will have. */
static void put(struct needle_item *item, const void *bytes, size_t count) {
    memcpy(item->tokens + item->length, bytes, count);
    item->length += count;
}

static void put_text(struct needle_item *item, const char *text) {
    put(item, text, strlen(text));
}

static int reserve(struct needle_item *item, size_t bytes, struct needle_error *error) {
    *item = (struct needle_item){.tokens = malloc(bytes)};
    return item->tokens ? NEEDLE_OK
                        : needle_fail(error, NEEDLE_FAILED, "out of memory for %zu tokens", bytes);
}

void needle_item_free(struct needle_item *item) {
    free(item->tokens);
    *item = (struct needle_item){0};
}

static int too_short(struct needle_error *error, size_t context, size_t needed) {
    return needle_fail(error, NEEDLE_BAD_INPUT,
                       "a context of %zu tokens is too short for this task: %zu are needed",
                       context, needed);
}

static const char *draw_word(const struct needle_words *words, struct needle_random *random) {
    return words->word[needle_random_below(random, words->count)];
}

static void draw_needle_key(const struct needle_words *words, struct needle_random *random,
                            char *key, size_t bytes) {
    const char *first = draw_word(words, random);
    snprintf(key, bytes, "%s-%s", first, draw_word(words, random));
}

static void make_sentence(struct sentence *s, double depth, const char *key, char *value,
                          struct needle_random *random) {
    for (int i = 0; i < 7; i++) {
        value[i] = (char)('0' + needle_random_below(random, 10));
    }
    value[7] = '\0';
    s->depth = depth;
    snprintf(s->text, sizeof s->text, "One of the special magic numbers for %s is: %s.", key,
             value);
}

static int compare_depths(const void *a, const void *b) {
    double x = ((const struct sentence *)a)->depth, y = ((const struct sentence *)b)->depth;
    return (x > y) - (x < y);
}

/* Where a sentence goes: the last space before its place that is behind the sentence before it. */
static size_t place(const uint8_t *hay, size_t count, double depth, size_t after) {
    size_t at = (size_t)(depth * (double)count);
    at = at > count ? count : at;
    for (size_t i = at; i > after; i--) {
        if (hay[i - 1] == ' ') {
            return i - 1;
        }
    }
    return at > after ? at : after;
}

static void hide(struct needle_item *item, const uint8_t *hay, size_t count,
                 const struct sentence *sentences, size_t n) {
    size_t used = 0;
    for (size_t i = 0; i < n; i++) {
        size_t at = place(hay, count, sentences[i].depth, used);
        put(item, hay + used, at - used);
        item->shared = i ? item->shared : item->length;
        put_text(item, "\n");
        put_text(item, sentences[i].text);
        put_text(item, "\n");
        used = at;
    }
    put(item, hay + used, count - used);
}

/* The needle and, with other keys, its distractors; sorted by depth. */
static void draw_sentences(struct needle_source source, double depth, struct needle_random *random,
                           struct sentence *sentences, size_t n, char key[32], char value[8]) {
    draw_needle_key(source.words, random, key, 32);
    make_sentence(&sentences[0], depth, key, value, random);
    for (size_t i = 1; i < n; i++) {
        char other[32], number[8];
        do {
            draw_needle_key(source.words, random, other, sizeof other);
        } while (!strcmp(other, key));
        make_sentence(&sentences[i], needle_random_unit(random), other, number, random);
    }
    qsort(sentences, n, sizeof *sentences, compare_depths);
}

static void ask_for(const char *key, char *question, size_t bytes) {
    snprintf(
        question, bytes,
        "\nWhat is the special magic number for %s mentioned in the provided text? The special "
        "magic number for %s mentioned in the provided text is",
        key, key);
}

/* `spare` tokens of the context stay unused. */
static int build_niah(struct needle_source source, size_t context, double depth,
                      const struct sentence *sentences, size_t n, const char *key,
                      const char *value, size_t spare, struct needle_random *random,
                      struct needle_item *item, struct needle_error *error) {
    char question[256], answer[16];
    ask_for(key, question, sizeof question);
    snprintf(answer, sizeof answer, " %s.", value);
    size_t fixed = strlen(HEAD) + strlen(question) + spare;
    for (size_t i = 0; i < n; i++) {
        fixed += strlen(sentences[i].text) + 2;
    }
    if (context < fixed + MIN_HAY) {
        return too_short(error, context, fixed + MIN_HAY);
    }
    const size_t count = context - fixed;
    uint8_t *hay = malloc(count);
    int code = reserve(item, context + strlen(answer), error);
    if (!hay || code) {
        free(hay);
        return code ? code : needle_fail(error, NEEDLE_FAILED, "out of memory for the text");
    }
    random = source.begin ? source.begin : random;
    needle_span_copy(source.text, needle_random_below(random, source.text.count), hay, count);
    put_text(item, HEAD);
    hide(item, hay, count, sentences, n);
    /* The newline before the question belongs to the context, as in training. */
    item->question = item->length + 1;
    put_text(item, question);
    item->prompt = item->length;
    put_text(item, answer);
    item->depth = depth;
    free(hay);
    return NEEDLE_OK;
}

int needle_item_niah(struct needle_source source, size_t context, double depth, size_t distractors,
                     struct needle_random *random, struct needle_item *item,
                     struct needle_error *error) {
    char key[32], value[8];
    const size_t n = distractors + 1;
    *item = (struct needle_item){0};
    struct sentence *sentences = needle_alloc(n, sizeof *sentences);
    if (!sentences) {
        return needle_fail(error, NEEDLE_FAILED, "out of memory for %zu needles", n);
    }
    draw_sentences(source, depth, random, sentences, n, key, value);
    int code = build_niah(source, context, depth, sentences, n, key, value, 0, random, item, error);
    free(sentences);
    if (code) {
        needle_item_free(item);
    }
    return code;
}

/* A sentence and what it is about. */
struct fact {
    char key[32], value[8];
};

static bool known(const struct fact *facts, size_t n, const char *key) {
    for (size_t i = 0; i < n; i++) {
        if (!strcmp(facts[i].key, key)) {
            return true;
        }
    }
    return false;
}

int needle_item_together(struct needle_source source, size_t context, size_t count, size_t index,
                         struct needle_random *random, struct needle_item *item,
                         struct needle_error *error) {
    struct sentence *sentences = needle_alloc(count, sizeof *sentences);
    struct fact *facts = needle_alloc(count, sizeof *facts);
    size_t longest = 0;
    char question[256];
    *item = (struct needle_item){0};
    int code = sentences && facts
                   ? NEEDLE_OK
                   : needle_fail(error, NEEDLE_FAILED, "out of memory for %zu needles", count);
    for (size_t i = 0; i < count && !code; i++) {
        do {
            draw_needle_key(source.words, random, facts[i].key, sizeof facts[i].key);
        } while (known(facts, i, facts[i].key));
        make_sentence(&sentences[i], ((double)i + 0.5) / (double)count, facts[i].key,
                      facts[i].value, random);
        ask_for(facts[i].key, question, sizeof question);
        longest = strlen(question) > longest ? strlen(question) : longest;
    }
    if (!code) {
        ask_for(facts[index].key, question, sizeof question);
        code =
            build_niah(source, context, sentences[index].depth, sentences, count, facts[index].key,
                       facts[index].value, longest - strlen(question), random, item, error);
    }
    free(sentences);
    free(facts);
    if (code) {
        needle_item_free(item);
    }
    return code;
}

/* The tags of training: two words, a hexadecimal number, or an upper-case name. */
static void draw_tag(const struct needle_words *words, struct needle_random *random, char *tag,
                     size_t bytes) {
    const double kind = needle_random_unit(random);
    const char *word = draw_word(words, random);
    if (kind < 0.7) {
        snprintf(tag, bytes, "%s%c%s", word, kind < 0.55 ? '-' : ' ', draw_word(words, random));
    } else if (kind < 0.85) {
        snprintf(tag, bytes, "%08x", (unsigned)(needle_random_u64(random) >> 32));
    } else {
        int n = snprintf(tag, bytes, "%s_%zu", word, needle_random_below(random, 100));
        for (int i = 0; i < n; i++) {
            tag[i] = (char)(tag[i] >= 'a' && tag[i] <= 'z' ? tag[i] - 'a' + 'A' : tag[i]);
        }
    }
}

int needle_item_copy(struct needle_source source, size_t context, struct needle_random *random,
                     struct needle_item *item, struct needle_error *error) {
    /* Passage and surroundings come from different parts of the text. */
    const size_t half = source.text.count / 2;
    const struct needle_span passages = {source.text.bytes, half};
    const struct needle_span hay = {source.text.bytes + half, source.text.count - half};
    uint8_t passage[COPY_BYTES];
    char tag[32], open[64], repeat[64];
    needle_span_copy(passages, needle_random_below(random, half), passage, sizeof passage);
    for (size_t i = 0; i < sizeof passage; i++) {
        passage[i] = passage[i] == '\n' ? ' ' : passage[i];
    }
    draw_tag(source.words, random, tag, sizeof tag);
    snprintf(open, sizeof open, "\n<note %s>", tag);
    snprintf(repeat, sizeof repeat, "\n<repeat %s>", tag);
    const char *close = "</note>\n";
    const size_t fixed = strlen(open) + sizeof passage + strlen(close) + strlen(repeat);
    if (context < fixed + MIN_HAY) {
        *item = (struct needle_item){0};
        return too_short(error, context, fixed + MIN_HAY);
    }
    const size_t count = context - fixed;
    int code = reserve(item, context + sizeof passage, error);
    if (code) {
        return code;
    }
    const size_t begin = needle_random_below(random, hay.count);
    item->depth = 0.1 + 0.7 * needle_random_unit(random);
    const size_t before = (size_t)(item->depth * (double)count);
    needle_span_copy(hay, begin, item->tokens, before);
    item->length = before;
    put_text(item, open);
    put(item, passage, sizeof passage);
    put_text(item, close);
    needle_span_copy(hay, begin + before, item->tokens + item->length, count - before);
    item->length += count - before;
    item->question = item->length + 1;
    put_text(item, repeat);
    item->prompt = item->length;
    put(item, passage, sizeof passage);
    return NEEDLE_OK;
}

int needle_item_text(struct needle_source source, size_t context, size_t index,
                     struct needle_item *item, struct needle_error *error) {
    /* The first byte behind the context is given, as a question of one token. */
    const size_t length = context + TEXT_BYTES;
    if (context < MIN_HAY) {
        *item = (struct needle_item){0};
        return too_short(error, context, MIN_HAY);
    }
    int code = reserve(item, length, error);
    if (code) {
        return code;
    }
    needle_span_copy(source.text, index % source.text.count * length, item->tokens, length);
    item->length = length;
    item->question = context - 1;
    item->prompt = context;
    return NEEDLE_OK;
}
