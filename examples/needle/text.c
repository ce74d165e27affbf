/* SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L

#include "text.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define MAX_TEXT_BYTES ((size_t)1 << 30)
#define MAX_DEPTH 8 /* of folders below docs */
#define MIN_TEXT_BYTES 2048
#define MIN_WORDS 32
#define MAX_WORDS 6000
#define WORD_TEXT_BYTES ((size_t)20 << 20) /* words are counted in the beginning of a long text */

struct paths {
    char **path;
    size_t count;
};

static int add_path(struct paths *paths, const char *path) {
    char **grown = realloc(paths->path, (paths->count + 1) * sizeof *grown);
    if (!grown) {
        return NEEDLE_FAILED;
    }
    paths->path = grown;
    paths->path[paths->count] = strdup(path);
    return paths->path[paths->count] ? (paths->count++, NEEDLE_OK) : NEEDLE_FAILED;
}

static bool is_documentation(const char *name) {
    const char *dot = strrchr(name, '.');
    return (dot && !strcmp(dot, ".md")) || !strcmp(name, "NEWS");
}

/* Folders that cannot be read are no error: what counts is whether anything was found. */
static int find_documents(const char *dir, int depth, struct paths *paths) {
    int code = NEEDLE_OK;
    DIR *stream = opendir(dir);
    for (struct dirent *entry; !code && stream && (entry = readdir(stream));) {
        char path[4096];
        struct stat status;
        if (entry->d_name[0] == '.' ||
            (size_t)snprintf(path, sizeof path, "%s/%s", dir, entry->d_name) >= sizeof path ||
            stat(path, &status) != 0) {
            continue;
        }
        if (S_ISDIR(status.st_mode) && depth > 0) {
            code = find_documents(path, depth - 1, paths);
        } else if (S_ISREG(status.st_mode) && is_documentation(entry->d_name)) {
            code = add_path(paths, path);
        }
    }
    if (stream) {
        closedir(stream);
    }
    return code;
}

static int compare_paths(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* In place; the result is never longer. */
static size_t to_ascii(const char *in, size_t count, uint8_t *out) {
    size_t n = 0;
    bool foreign = false;
    for (size_t i = 0; i < count; i++) {
        unsigned char c = (unsigned char)in[i];
        if (c >= 0x80) {
            if (!foreign) {
                out[n++] = '-';
            }
        } else if (c == '\n' || (c >= ' ' && c < 0x7f)) {
            out[n++] = c;
        } else if (c == '\t') {
            out[n++] = ' ';
        }
        foreign = c >= 0x80;
    }
    return n;
}

static int append_file(struct needle_text *text, const char *path, struct needle_error *error) {
    char *bytes;
    size_t count;
    int code = needle_read_file(path, MAX_TEXT_BYTES - text->count, &bytes, &count, error);
    if (code) {
        return code;
    }
    uint8_t *grown = realloc(text->bytes, text->count + count + 1);
    if (!grown) {
        free(bytes);
        return needle_fail(error, NEEDLE_FAILED, "%s: out of memory", path);
    }
    text->bytes = grown;
    text->count += to_ascii(bytes, count, grown + text->count);
    free(bytes);
    return NEEDLE_OK;
}

static int load_documentation(struct needle_text *text, struct needle_error *error) {
    struct paths paths = {0};
    int code = find_documents(FKV_SOURCE_ROOT, 0, &paths);
    code = code ? code : find_documents(FKV_SOURCE_ROOT "/docs", MAX_DEPTH, &paths);
    if (code) {
        code = needle_fail(error, code, "out of memory");
    } else if (paths.count > 1) {
        qsort(paths.path, paths.count, sizeof *paths.path, compare_paths);
    }
    for (size_t i = 0; i < paths.count; i++) {
        code = code ? code : append_file(text, paths.path[i], error);
        free(paths.path[i]);
    }
    free(paths.path);
    return code;
}

int needle_text_load(const char *path, struct needle_text *text, struct needle_error *error) {
    *text = (struct needle_text){0};
    int code = path ? append_file(text, path, error) : load_documentation(text, error);
    if (!code && text->count < MIN_TEXT_BYTES) {
        code = needle_fail(error, NEEDLE_BAD_INPUT,
                           "%s: %zu bytes of text, %d are needed; give one with --text FILE",
                           path ? path : FKV_SOURCE_ROOT "/docs", text->count, MIN_TEXT_BYTES);
    }
    if (code) {
        needle_text_free(text);
    }
    return code;
}

void needle_text_free(struct needle_text *text) {
    free(text->bytes);
    *text = (struct needle_text){0};
}

struct needle_span needle_text_half(const struct needle_text *text, int half) {
    const size_t middle = text->count / 2;
    return half == 0 ? (struct needle_span){text->bytes, middle}
                     : (struct needle_span){text->bytes + middle, text->count - middle};
}

void needle_span_copy(struct needle_span span, size_t offset, uint8_t *out, size_t count) {
    for (size_t at = offset % span.count; count > 0; at = 0) {
        size_t n = span.count - at < count ? span.count - at : count;
        memcpy(out, span.bytes + at, n);
        out += n;
        count -= n;
    }
}

static bool in_word(uint8_t c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

/* Words of 4 to 10 lower-case letters that are not part of something longer. `out` NULL: count only. */
static size_t scan_words(const uint8_t *text, size_t count, char (*out)[NEEDLE_WORD_BYTES]) {
    size_t n = 0;
    for (size_t i = 0; i < count;) {
        size_t begin = i;
        bool lower = true;
        for (; i < count && in_word(text[i]); i++) {
            lower = lower && text[i] >= 'a' && text[i] <= 'z';
        }
        size_t length = i - begin;
        if (lower && length >= 4 && length < NEEDLE_WORD_BYTES) {
            if (out) {
                memset(out[n], 0, NEEDLE_WORD_BYTES);
                memcpy(out[n], text + begin, length);
            }
            n++;
        }
        i += length == 0;
    }
    return n;
}

struct counted {
    char word[NEEDLE_WORD_BYTES];
    uint32_t times;
};

static int compare_words(const void *a, const void *b) {
    return memcmp(a, b, NEEDLE_WORD_BYTES);
}

static int compare_counts(const void *a, const void *b) {
    const struct counted *x = a, *y = b;
    return x->times != y->times ? (x->times < y->times) - (x->times > y->times)
                                : strcmp(x->word, y->word);
}

/* Sorted occurrences to distinct words with their number; in order of frequency. */
static size_t count_words(char (*all)[NEEDLE_WORD_BYTES], size_t n, struct counted *counted) {
    size_t distinct = 0;
    qsort(all, n, sizeof *all, compare_words);
    for (size_t i = 0; i < n; i++) {
        if (i == 0 || compare_words(all[i], all[i - 1]) != 0) {
            memcpy(counted[distinct].word, all[i], NEEDLE_WORD_BYTES);
            counted[distinct++].times = 0;
        }
        counted[distinct - 1].times++;
    }
    qsort(counted, distinct, sizeof *counted, compare_counts);
    return distinct;
}

int needle_words_collect(const struct needle_text *text, struct needle_words *words,
                         struct needle_error *error) {
    *words = (struct needle_words){0};
    const size_t bytes = text->count < WORD_TEXT_BYTES ? text->count : WORD_TEXT_BYTES;
    const size_t n = scan_words(text->bytes, bytes, NULL);
    struct counted *counted = needle_alloc(n, sizeof *counted);
    words->word = needle_alloc(n, sizeof *words->word);
    if (!counted || !words->word) {
        free(counted);
        needle_words_free(words);
        return needle_fail(error, NEEDLE_FAILED, "out of memory for the words of the text");
    }
    scan_words(text->bytes, bytes, words->word);
    const size_t distinct = count_words(words->word, n, counted);
    words->count = distinct < MAX_WORDS ? distinct : MAX_WORDS;
    for (size_t i = 0; i < words->count; i++) {
        memcpy(words->word[i], counted[i].word, NEEDLE_WORD_BYTES);
    }
    free(counted);
    if (words->count < MIN_WORDS) {
        needle_words_free(words);
        return needle_fail(error, NEEDLE_BAD_INPUT,
                           "the text has too few different words; %d are needed", MIN_WORDS);
    }
    return NEEDLE_OK;
}

void needle_words_free(struct needle_words *words) {
    free(words->word);
    *words = (struct needle_words){0};
}
