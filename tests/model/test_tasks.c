/* SPDX-License-Identifier: Apache-2.0 */
/* The questions: exact lengths, one right answer, sentences as in training, same seed same item. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tasks.h"
#include "tiny.h"

static struct needle_text text;
static struct needle_words words;

static struct needle_source source(void) {
    return (struct needle_source){needle_text_half(&text, 1), &words, NULL};
}

static size_t count_string(const uint8_t *bytes, size_t count, const char *wanted) {
    size_t found = 0, length = strlen(wanted);
    for (size_t i = 0; i + length <= count; i++) {
        found += memcmp(bytes + i, wanted, length) == 0;
    }
    return found;
}

static size_t find_string(const uint8_t *bytes, size_t count, const char *wanted) {
    size_t length = strlen(wanted);
    for (size_t i = 0; i + length <= count; i++) {
        if (memcmp(bytes + i, wanted, length) == 0) {
            return i;
        }
    }
    fail_msg("\"%s\" is not there", wanted);
    return 0;
}

static void check_niah(const struct needle_item *item, size_t context, double depth,
                       size_t distractors) {
    char answer[16] = "", key[64] = "", question[300], needle[128];
    assert_int_equal(item->prompt, context);
    assert_int_equal(item->length, context + 9);
    memcpy(answer, item->tokens + item->prompt, 9);
    assert_int_equal(answer[0], ' ');
    assert_int_equal(answer[8], '.');
    assert_int_equal(strspn(answer + 1, "0123456789"), 7);
    const char *ask = "What is the special magic number for ";
    assert_memory_equal(item->tokens + item->question, ask, strlen(ask));
    assert_int_equal(sscanf((const char *)item->tokens + item->question + strlen(ask), "%63s", key),
                     1);
    int n = snprintf(question, sizeof question,
                     "%s%s mentioned in the provided text? The special magic number for %s "
                     "mentioned in the provided text is",
                     ask, key, key);
    assert_int_equal(item->prompt - item->question, n);
    assert_memory_equal(item->tokens + item->question, question, (size_t)n);
    assert_int_equal(item->tokens[item->question - 1], '\n');
    snprintf(needle, sizeof needle, "\nOne of the special magic numbers for %s is:%s\n", key,
             answer);
    size_t at = find_string(item->tokens, item->question, needle);
    assert_int_equal(count_string(item->tokens, item->question, key), 1);
    assert_int_equal(count_string(item->tokens, item->question, "One of the special magic numbers"),
                     distractors + 1);
    const char *head = "A special magic number is hidden within the following text. Make sure to "
                       "memorize it.\n";
    assert_memory_equal(item->tokens, head, strlen(head));
    if (distractors == 0) {
        double share = (double)(at - strlen(head)) /
                       (double)(item->question - 1 - strlen(head) - strlen(needle));
        assert_true(share <= depth + 1e-9 && share > depth - 0.1);
    }
}

static void test_niah(void **state) {
    (void)state;
    const double depths[] = {0, 0.3, 0.5, 0.99, 1};
    for (uint64_t seed = 0; seed < 40; seed++) {
        struct needle_random random = needle_random_stream(7, seed), again = random;
        struct needle_item item, same;
        struct needle_error error;
        double depth = depths[seed % 5];
        size_t context = 1000 + 211 * (size_t)seed, distractors = seed % 3 * 4;
        assert_int_equal(
            needle_item_niah(source(), context, depth, distractors, &random, &item, &error),
            NEEDLE_OK);
        check_niah(&item, context, depth, distractors);
        assert_int_equal(
            needle_item_niah(source(), context, depth, distractors, &again, &same, &error),
            NEEDLE_OK);
        assert_memory_equal(item.tokens, same.tokens, item.length);
        needle_item_free(&item);
        needle_item_free(&same);
    }
}

/* Items in the same text differ from their number on. */
static void test_same_text(void **state) {
    (void)state;
    struct needle_error error;
    struct needle_item items[2];
    for (int i = 0; i < 2; i++) {
        struct needle_random begin = needle_random_stream(7, 0);
        struct needle_random random = needle_random_stream(7, (uint64_t)i + 1);
        struct needle_source from = source();
        from.begin = &begin;
        assert_int_equal(needle_item_niah(from, 3000, 0.3 + 0.4 * i, 0, &random, &items[i], &error),
                         NEEDLE_OK);
        check_niah(&items[i], 3000, 0.3 + 0.4 * i, 0);
        assert_memory_equal(items[i].tokens + items[i].shared, "\nOne of the special", 19);
    }
    assert_true(items[0].shared > 600 && items[1].shared > items[0].shared + 800);
    assert_memory_equal(items[0].tokens, items[1].tokens, items[0].shared);
    assert_int_not_equal(
        memcmp(items[0].tokens, items[1].tokens, items[0].shared + 19 + sizeof " numbers for x-y"),
        0);
    needle_item_free(&items[0]);
    needle_item_free(&items[1]);
}

static void test_copy(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 40; seed++) {
        struct needle_random random = needle_random_stream(7, seed);
        struct needle_item item;
        struct needle_error error;
        size_t context = 600 + 37 * (size_t)seed;
        assert_int_equal(needle_item_copy(source(), context, &random, &item, &error), NEEDLE_OK);
        assert_int_equal(item.prompt, context);
        assert_int_equal(item.length, context + 160);
        assert_memory_equal(item.tokens + item.question, "<repeat ", 8);
        char tag[64] = "", note[300];
        memcpy(tag, item.tokens + item.question + 8, item.prompt - item.question - 9);
        snprintf(note, sizeof note, "\n<note %s>%.160s</note>\n", tag,
                 (const char *)item.tokens + item.prompt);
        size_t at = find_string(item.tokens, item.question, note);
        assert_true((double)at >= 0.1 * 0.5 * (double)context);
        assert_null(memchr(item.tokens + item.prompt, '\n', 160));
        needle_item_free(&item);
    }
}

static void test_text(void **state) {
    (void)state;
    struct needle_item a, b;
    struct needle_error error;
    assert_int_equal(needle_item_text(source(), 300, 0, &a, &error), NEEDLE_OK);
    assert_int_equal(needle_item_text(source(), 300, 1, &b, &error), NEEDLE_OK);
    assert_int_equal(a.length, 811);
    assert_int_equal(a.prompt, 300);
    assert_int_equal(a.question, 299);
    assert_memory_equal(a.tokens, source().text.bytes, 811);
    assert_memory_equal(b.tokens, source().text.bytes + 811, 811);
    needle_item_free(&a);
    needle_item_free(&b);
}

static void test_too_short(void **state) {
    (void)state;
    struct needle_random random = needle_random_stream(1, 1);
    struct needle_item item;
    struct needle_error error;
    assert_int_equal(needle_item_niah(source(), 300, 0.5, 0, &random, &item, &error),
                     NEEDLE_BAD_INPUT);
    assert_null(item.tokens);
    assert_int_equal(needle_item_niah(source(), 4000, 0.5, 60, &random, &item, &error),
                     NEEDLE_BAD_INPUT);
    assert_null(item.tokens);
    assert_int_equal(needle_item_copy(source(), 200, &random, &item, &error), NEEDLE_BAD_INPUT);
    assert_null(item.tokens);
    assert_int_equal(needle_item_text(source(), 10, 0, &item, &error), NEEDLE_BAD_INPUT);
    assert_null(item.tokens);
}

static void test_text_is_repeated(void **state) {
    (void)state;
    uint8_t out[10];
    needle_span_copy((struct needle_span){(const uint8_t *)"abcd", 4}, 6, out, sizeof out);
    assert_memory_equal(out, "cdabcdabcd", 10);
}

static void test_words(void **state) {
    (void)state;
    /* "alpha" is in every line of the text, "none" of these can be a word. */
    assert_string_equal(words.word[0], "alpha");
    const char *none[] = {"the", "Upper", "snake", "abcdefghijk", "mixed"};
    for (size_t i = 0; i < words.count; i++) {
        for (size_t j = 0; j < sizeof none / sizeof *none; j++) {
            assert_string_not_equal(words.word[i], none[j]);
        }
    }
}

static void test_ascii_only(void **state) {
    (void)state;
    char dir[256], path[300];
    static char raw[4096];
    struct needle_text loaded;
    struct needle_error error = {""};
    memset(raw, 'x', sizeof raw);
    memcpy(raw, "a\xe2\x80\x94z\tb\r\n\x01", 10);
    tiny_make_dir(dir, sizeof dir);
    tiny_write_file(dir, "text", raw, sizeof raw);
    snprintf(path, sizeof path, "%s/text", dir);
    assert_int_equal(needle_text_load(path, &loaded, &error), NEEDLE_OK);
    assert_memory_equal(loaded.bytes, "a-z b\nxxx", 9);
    assert_int_equal(loaded.count, sizeof raw - 4);
    needle_text_free(&loaded);
    tiny_write_file(dir, "text", raw, 100);
    assert_int_equal(needle_text_load(path, &loaded, &error), NEEDLE_BAD_INPUT);
    assert_non_null(strstr(error.text, path));
    tiny_remove_dir(dir);
}

/* 6000 bytes of invented words, the same in every run. */
static int make_text(void **state) {
    (void)state;
    enum { BYTES = 6000 };
    struct needle_random random = needle_random_stream(3, 3);
    struct needle_error error;
    text.bytes = malloc(BYTES + 64);
    while (text.bytes && text.count < BYTES) {
        char line[64] = "alpha the Upper snake_case mixed9 abcdefghijk\n";
        if (needle_random_below(&random, 2)) {
            for (int i = 6; i < 40; i++) {
                line[i] = (char)('a' + needle_random_below(&random, 26));
                line[i] = i % 7 == 5 ? ' ' : line[i];
            }
            line[40] = '\n';
            line[41] = '\0';
        }
        memcpy(text.bytes + text.count, line, strlen(line));
        text.count += strlen(line);
    }
    return text.bytes && needle_words_collect(&text, &words, &error) == NEEDLE_OK ? 0 : -1;
}

static int free_text(void **state) {
    (void)state;
    needle_words_free(&words);
    needle_text_free(&text);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_niah),      cmocka_unit_test(test_same_text),
        cmocka_unit_test(test_copy),      cmocka_unit_test(test_text),
        cmocka_unit_test(test_too_short), cmocka_unit_test(test_text_is_repeated),
        cmocka_unit_test(test_words),     cmocka_unit_test(test_ascii_only),
    };
    return cmocka_run_group_tests(tests, make_text, free_text);
}
