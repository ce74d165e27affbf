/* SPDX-License-Identifier: Apache-2.0 */
#include "run.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Answers are bytes, whatever else the vocabulary has. */
static uint8_t best_byte(const float *logits) {
    int best = 0;
    for (int i = 1; i < 256; i++) {
        best = logits[i] > logits[best] ? i : best;
    }
    return (uint8_t)best;
}

/* -log2 of the softmax at `token`. */
static double bits(const float *logits, size_t vocab, uint8_t token) {
    double top = logits[0], sum = 0;
    for (size_t i = 1; i < vocab; i++) {
        top = logits[i] > top ? logits[i] : top;
    }
    for (size_t i = 0; i < vocab; i++) {
        sum += exp(logits[i] - top);
    }
    return (log(sum) + top - logits[token]) / log(2.0);
}

static int write_logits(const struct needle_run *run, const float *logits, size_t rows,
                        size_t vocab, struct needle_error *error) {
    if (run->logits && fwrite(logits, vocab * sizeof *logits, rows, run->logits) != rows) {
        return needle_fail(error, NEEDLE_FAILED, "%s: %s", run->logits_path, strerror(errno));
    }
    return NEEDLE_OK;
}

/* The period that serves best is just above what will have to be coded. */
static int64_t period(const fkv_profile_info *profile, size_t length) {
    int64_t coded = (int64_t)length - profile->n_sink - profile->n_local;
    return coded < 64 ? 64 : (coded + 63) / 64 * 64;
}

static int begin(struct needle_run *run, size_t length, struct needle_error *error) {
    struct needle_engine *e = run->engine;
    int code = NEEDLE_OK;
    for (size_t i = 0; i < e->n_held && !code; i++) {
        code = needle_engine_begin(e, i, period(&run->profiles[i], length), error);
    }
    return code;
}

/* Whole steps of what the items have in common go to the sequence that is kept; a fork reads the rest. */
static int read_trunk(struct needle_run *run, const struct needle_item *item,
                      struct needle_error *error) {
    const size_t end = item->shared / run->chunk * run->chunk, from = run->trunk;
    int code = NEEDLE_OK;
    if (end > from) {
        code =
            needle_engine_prefill(run->engine, item->tokens + from, end - from, run->chunk, error);
        run->trunk = end;
    }
    return code ? code : needle_engine_branch(run->engine, &run->whole, error);
}

int needle_run_read(struct needle_run *run, const struct needle_item *item,
                    struct needle_error *error) {
    struct needle_engine *e = run->engine;
    run->trunk = run->trunk > item->shared ? 0 : run->trunk;
    int code = run->read || run->trunk ? NEEDLE_OK : begin(run, item->length, error);
    if (run->read || code) {
        return code;
    }
    struct needle_progress progress;
    const size_t known = run->trunk;
    needle_progress_begin(&progress, run->label,
                          needle_engine_units(e, item->question - known, run->chunk));
    e->progress = &progress;
    code = run->same_text ? read_trunk(run, item, error) : NEEDLE_OK;
    code = code ? code
                : needle_engine_prefill(e, item->tokens + run->trunk, item->question - run->trunk,
                                        run->chunk, error);
    e->progress = NULL;
    run->prefill_s = needle_seconds() - progress.start;
    run->prefill_tokens = item->question - known;
    run->read = run->together && !code;
    needle_progress_end(&progress);
    return code;
}

static int generate(const struct needle_run *run, const struct needle_item *item, float *logits,
                    struct needle_result *result, struct needle_error *error) {
    struct needle_engine *e = run->engine;
    const size_t vocab = (size_t)e->model->config.vocab_size;
    int code = needle_engine_forward(e, item->tokens + item->question,
                                     item->prompt - item->question, 1, logits, error);
    code = code ? code : write_logits(run, logits, 1, vocab, error);
    const double start = needle_seconds();
    for (size_t i = 0; i < result->expected && !code; i++) {
        result->answer[i] = best_byte(logits);
        if (i + 1 < result->expected) {
            code = needle_engine_forward(e, result->answer + i, 1, 1, logits, error);
        }
    }
    result->decode_s = needle_seconds() - start;
    result->decode_tokens = result->expected - 1;
    return code;
}

static int force(const struct needle_run *run, const struct needle_item *item, float *logits,
                 struct needle_result *result, struct needle_error *error) {
    struct needle_engine *e = run->engine;
    const size_t vocab = (size_t)e->model->config.vocab_size;
    const size_t n = item->length - 1 - item->question;
    const double start = needle_seconds();
    int code =
        needle_engine_forward(e, item->tokens + item->question, n, result->expected, logits, error);
    result->decode_s = needle_seconds() - start;
    result->decode_tokens = n;
    code = code ? code : write_logits(run, logits, result->expected, vocab, error);
    if (code) {
        return code;
    }
    double sum = 0;
    for (size_t i = 0; i < result->expected; i++) {
        const float *row = logits + i * vocab;
        result->answer[i] = best_byte(row);
        sum += bits(row, vocab, item->tokens[item->prompt + i]);
    }
    result->bits_per_byte = sum / (double)result->expected;
    return NEEDLE_OK;
}

/* The first byte of a copy cannot be known from the question's end, so it does not count. */
static void judge(enum needle_task task, const uint8_t *expected, struct needle_result *result) {
    const size_t first = task == NEEDLE_TASK_COPY;
    size_t same = 0;
    for (size_t i = first; i < result->expected; i++) {
        same += result->answer[i] == expected[i];
    }
    result->byte_accuracy = (double)same / (double)(result->expected - first);
    result->right = same == result->expected - first;
}

static int measure(const struct needle_run *run, struct needle_result *result,
                   struct needle_error *error) {
    fkv_stats stats = {.struct_size = sizeof stats};
    fkv_status status =
        fkv_cache_stats(run->engine->now->cache, run->engine->now->sequence, &stats);
    if (status) {
        return needle_fail_fkv(error, NEEDLE_FAILED, run->engine->ctx, status, "cache statistics");
    }
    result->kv_bytes = stats.bytes;
    result->dense_bytes = stats.dense_bytes;
    result->ratio = stats.ratio;
    result->peak_rss_bytes = needle_peak_rss();
    return NEEDLE_OK;
}

int needle_run_ask(struct needle_run *run, const struct needle_item *item, size_t index,
                   struct needle_result *result, struct needle_error *error) {
    const size_t vocab = (size_t)run->engine->model->config.vocab_size;
    run->engine->now = &run->engine->held[index];
    *result = (struct needle_result){.expected = item->length - item->prompt,
                                     .prefill_tokens = run->prefill_tokens,
                                     .prefill_s = run->prefill_s};
    result->answer = malloc(result->expected);
    float *logits = needle_alloc(result->expected, vocab * sizeof *logits);
    int code = result->answer && logits
                   ? NEEDLE_OK
                   : needle_fail(error, NEEDLE_FAILED, "out of memory for the answer");
    if (!code && run->together) {
        code = needle_engine_branch(run->engine, &run->whole, error);
    }
    if (!code) {
        code = run->task == NEEDLE_TASK_NIAH ? generate(run, item, logits, result, error)
                                             : force(run, item, logits, result, error);
    }
    code = code ? code : measure(run, result, error);
    if (run->whole >= 0) {
        needle_engine_return(run->engine, run->whole);
        run->whole = -1;
    }
    if (!code) {
        judge(run->task, item->tokens + item->prompt, result);
    } else {
        needle_result_free(result);
    }
    free(logits);
    return code;
}

void needle_result_free(struct needle_result *result) {
    free(result->answer);
    result->answer = NULL;
}
