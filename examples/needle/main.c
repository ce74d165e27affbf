/* SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calibrate.h"
#include "engine.h"
#include "options.h"
#include "profiles.h"
#include "report.h"
#include "run.h"

/* Everything the program holds; each part may be empty. */
struct program {
    struct needle_options options;
    struct needle_text text;
    struct needle_words words;
    struct needle_model model;
    fkv_context *ctx;
    fkv_profile *profiles[NEEDLE_MAX_PROFILES];
    fkv_profile_info infos[NEEDLE_MAX_PROFILES];
    FILE *logits;
    struct needle_error error;
};

static int create_context(struct program *p) {
    char message[512] = "";
    fkv_context_params params;
    fkv_context_params_init(&params, sizeof params);
    params.threads = p->options.threads;
    params.message = message;
    params.message_bytes = sizeof message;
    fkv_status status = fkv_context_create(&params, &p->ctx);
    needle_engine_threads(p->options.threads);
    return status ? needle_fail(&p->error, NEEDLE_FAILED, "context: %s: %s",
                                fkv_status_string(status), message)
                  : NEEDLE_OK;
}

static int open_logits(struct program *p) {
    if (!p->options.logits) {
        return NEEDLE_OK;
    }
    p->logits = fopen(p->options.logits, "wb");
    return p->logits ? NEEDLE_OK
                     : needle_fail(&p->error, NEEDLE_FAILED, "%s: %s", p->options.logits,
                                   strerror(errno));
}

/* Half of the scope for the newest tokens, the rest for spans and the first tokens. */
static int select_tokens(struct program *p, struct needle_engine *engine, size_t *chunk) {
    const int32_t window = p->model.config.trained_window;
    const int32_t scope = p->options.scope ? p->options.scope : window > 0 ? window : 8192;
    fkv_select_params select;
    fkv_select_params_init(&select, sizeof select);
    select.n_local = scope / 2;
    select.clip = (scope - select.n_local - select.n_global) / select.span;
    select.chunk = select.chunk < select.n_local ? select.chunk : select.n_local;
    *chunk = *chunk ? *chunk : (size_t)select.chunk;
    fkv_status status = fkv_plan_select(engine->now->plan, &select);
    return status ? needle_fail_fkv(&p->error, NEEDLE_BAD_INPUT, p->ctx, status, "--longcache")
                  : NEEDLE_OK;
}

static int make_item(struct program *p, size_t index, struct needle_item *item) {
    const struct needle_options *o = &p->options;
    struct needle_random begin = needle_random_stream(o->seed, 0);
    const struct needle_source source = {needle_text_half(&p->text, 1), &p->words,
                                         o->same_text ? &begin : NULL};
    struct needle_random random = needle_random_stream(o->seed, index / o->per_text);
    if (o->together) {
        return needle_item_together(source, o->context, o->per_text, index % o->per_text, &random,
                                    item, &p->error);
    }
    switch (o->task) {
    case NEEDLE_TASK_COPY:
        return needle_item_copy(source, o->context, &random, item, &p->error);
    case NEEDLE_TASK_TEXT:
        return needle_item_text(source, o->context, index, item, &p->error);
    default:
        return needle_item_niah(source, o->context,
                                o->depth >= 0 ? o->depth : ((double)index + 0.5) / (double)o->items,
                                o->distractors, &random, item, &p->error);
    }
}

static int ask(struct program *p, struct needle_run *run, struct needle_report *reports) {
    const struct needle_options *o = &p->options;
    int code = NEEDLE_OK;
    for (size_t i = 0; i < o->items && !code; i++) {
        struct needle_item item;
        char label[64];
        snprintf(label, sizeof label, "item %zu of %zu, prefill", i + 1, o->items);
        run->label = label;
        run->read = run->read && i % o->per_text != 0;
        code = make_item(p, i, &item);
        code = code ? code : needle_run_read(run, &item, &p->error);
        for (size_t k = 0; k < o->n_profiles && !code; k++) {
            struct needle_result result = {0};
            code = needle_run_ask(run, &item, k, &result, &p->error);
            code = code ? code : needle_report_item(&reports[k], &item, &result, &p->error);
            needle_result_free(&result);
        }
        needle_item_free(&item);
    }
    return code;
}

/* Also of what was done before an interruption. */
static int summarize(struct program *p, const struct needle_report *reports, int code) {
    struct needle_error ignored;
    for (size_t k = 0; k < p->options.n_profiles; k++) {
        if (!code || (code == NEEDLE_INTERRUPTED && reports[k].items)) {
            int failed = needle_report_summary(&reports[k], code ? &ignored : &p->error);
            code = code ? code : failed;
        }
    }
    return code;
}

static int open_engine(struct program *p, struct needle_engine *engine) {
    const struct needle_options *o = &p->options;
    int code = NEEDLE_OK;
    for (size_t k = 0; k < o->n_profiles && !code; k++) {
        code = needle_profile_make(o, o->profiles[k], &p->model, p->ctx, &p->profiles[k],
                                   &p->infos[k], &p->error);
    }
    code = code ? code : open_logits(p);
    return code ? code
                : needle_engine_open(engine, &p->model, p->ctx, p->profiles, o->n_profiles,
                                     o->index ? FKV_CACHE_KEY_INDEX : 0, &p->error);
}

static int ask_all(struct program *p) {
    struct needle_engine engine;
    int code = open_engine(p, &engine);
    if (code) {
        return code;
    }
    struct needle_run run = {.engine = &engine,
                             .task = p->options.task,
                             .chunk = p->options.chunk,
                             .together = p->options.together,
                             .same_text = p->options.same_text,
                             .whole = -1,
                             .profiles = p->infos,
                             .logits = p->logits,
                             .logits_path = p->options.logits};
    struct needle_report reports[NEEDLE_MAX_PROFILES];
    for (size_t k = 0; k < p->options.n_profiles; k++) {
        reports[k] = (struct needle_report){
            .options = &p->options, .engine = &engine, .profile = p->options.profiles[k]};
    }
    if (p->options.longcache) {
        code = select_tokens(p, &engine, &run.chunk);
    }
    if (p->options.meter > 0) {
        fkv_status status = fkv_cache_meter(engine.now->cache, p->options.meter);
        code =
            status ? needle_fail_fkv(&p->error, NEEDLE_BAD_INPUT, p->ctx, status, "--meter") : code;
    }
    code = code ? code : ask(p, &run, reports);
    code = summarize(p, reports, code);
    needle_engine_close(&engine);
    return code;
}

static void warn(const struct program *p) {
    const struct needle_options *o = &p->options;
    const int32_t window = p->model.config.trained_window;
    if (window > 0 && o->context > (size_t)window && !o->longcache) {
        fprintf(stderr,
                "fkv-needle: note: the model was trained for %d tokens; beyond that plain "
                "attention finds nothing\n",
                window);
    }
    if (p->text.count / 2 < o->context) {
        fprintf(stderr, "fkv-needle: note: half of the text has %zu bytes and is repeated%s\n",
                p->text.count / 2,
                o->task == NEEDLE_TASK_TEXT ? ", which makes it easy to predict" : "");
    }
}

static int run_program(struct program *p) {
    const struct needle_options *o = &p->options;
    int code = needle_model_load(o->model, &p->model, &p->error);
    code = code ? code : needle_text_load(o->text, &p->text, &p->error);
    code = code ? code : needle_words_collect(&p->text, &p->words, &p->error);
    code = code ? code : create_context(p);
    if (code) {
        return code;
    }
    warn(p);
    if (o->calibrate) {
        const struct needle_source source = {needle_text_half(&p->text, 0), &p->words, NULL};
        return needle_calibrate(o, &p->model, p->ctx, source, &p->error);
    }
    return ask_all(p);
}

static int release(struct program *p, int code) {
    if (p->logits && fclose(p->logits) != 0 && !code) {
        code = needle_fail(&p->error, NEEDLE_FAILED, "%s: %s", p->options.logits, strerror(errno));
    }
    if ((fflush(stdout) != 0 || ferror(stdout)) && !code) {
        code = needle_fail(&p->error, NEEDLE_FAILED, "standard output could not be written");
    }
    for (size_t k = 0; k < p->options.n_profiles; k++) {
        fkv_profile_destroy(p->profiles[k]);
    }
    fkv_context_destroy(p->ctx);
    needle_words_free(&p->words);
    needle_text_free(&p->text);
    needle_model_free(&p->model);
    return code;
}

int main(int argc, char **argv) {
    struct program p = {0};
    int code = needle_options_parse(argc, argv, &p.options, &p.error);
    if (!code && p.options.help) {
        fputs(needle_usage, stdout);
    } else if (!code && p.options.version) {
        printf("fkv-needle, libfkv %s\n", fkv_version_string());
    } else if (!code) {
        needle_catch_interrupt();
        code = run_program(&p);
    }
    code = release(&p, code);
    if (code) {
        fprintf(stderr, "fkv-needle: %s\n", p.error.text);
    }
    return code;
}
