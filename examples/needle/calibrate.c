/* SPDX-License-Identifier: Apache-2.0 */
#include "calibrate.h"

#include <stdio.h>

#include "engine.h"
#include "report.h"

/* Keys per token in the prompts that hold some: as many as the multikey task has in 8192 tokens. */
#define TOKENS_PER_KEY 136

struct calibration {
    const struct needle_options *options;
    const struct needle_model *model;
    fkv_context *ctx;
    struct needle_source source;
    fkv_model_params params;
    fkv_calibrator *calibrator;
    struct needle_error *error;
};

static int64_t middle_period(const struct calibration *c, const fkv_fourier_params *fourier) {
    int64_t period = (int64_t)c->options->context - fourier->n_sink - fourier->n_local;
    return period < 64 ? 64 : (period + 63) / 64 * 64;
}

static int create(struct calibration *c) {
    const struct needle_options *o = c->options;
    fkv_fourier_params fourier;
    fkv_calibrator_params params;
    fkv_fourier_params_init(&fourier, sizeof fourier);
    fkv_calibrator_params_init(&params, sizeof params);
    fourier.bins = o->bins ? o->bins : fourier.bins;
    fourier.n_local = o->local >= 0 ? o->local : fourier.n_local;
    fourier.restoration = o->restoration;
    fourier.period = middle_period(c, &fourier);
    params.criterion = o->criterion;
    params.fourier = &fourier;
    if (o->context <= (size_t)fourier.n_sink + (size_t)fourier.n_local) {
        return needle_fail(c->error, NEEDLE_BAD_INPUT,
                           "a context of %zu tokens has no middle: %d sinks and %d local tokens "
                           "stay exact",
                           o->context, fourier.n_sink, fourier.n_local);
    }
    fkv_status status = fkv_calibrator_create(c->ctx, &c->params, &params, &c->calibrator);
    return status ? needle_fail_fkv(c->error, NEEDLE_FAILED, c->ctx, status, "calibrator")
                  : NEEDLE_OK;
}

/* Every other prompt has keys to look up; the rest is plain text. */
static int make_prompt(const struct calibration *c, size_t index, struct needle_item *item) {
    const size_t context = c->options->context;
    /* Other streams than those of the questions. */
    struct needle_random random =
        needle_random_stream(c->options->seed, ((uint64_t)1 << 32) + index);
    if (index % 2 == 0 && context >= 1024) {
        return needle_item_niah(c->source, context, needle_random_unit(&random),
                                context / TOKENS_PER_KEY, &random, item, c->error);
    }
    return needle_item_text(c->source, context, index, item, c->error);
}

static int observe(const struct calibration *c, struct needle_engine *engine) {
    const size_t prompts = c->options->calibrate_prompts, context = c->options->context;
    struct needle_progress progress;
    needle_progress_begin(&progress, "calibration",
                          prompts * needle_engine_units(engine, context, 0));
    engine->progress = &progress;
    int code = NEEDLE_OK;
    for (size_t i = 0; i < prompts && !code; i++) {
        struct needle_item item;
        code = make_prompt(c, i, &item);
        code = code ? code : needle_engine_begin(engine, 0, 0, c->error);
        code = code ? code : needle_engine_prefill(engine, item.tokens, context, 0, c->error);
        needle_item_free(&item);
    }
    needle_progress_end(&progress);
    return code;
}

static int observe_exactly(const struct calibration *c) {
    fkv_profile *exact = NULL;
    fkv_status status = fkv_profile_create_exact(c->ctx, &c->params, FKV_DTYPE_F32, &exact);
    if (status) {
        return needle_fail_fkv(c->error, NEEDLE_FAILED, c->ctx, status, "exact profile");
    }
    struct needle_engine engine;
    int code = needle_engine_open(&engine, c->model, c->ctx, &exact, 1, 0, c->error);
    if (!code) {
        engine.calibrator = c->calibrator;
        code = observe(c, &engine);
        needle_engine_close(&engine);
    }
    fkv_profile_destroy(exact);
    return code;
}

static int save(const struct calibration *c, double start) {
    const struct needle_options *o = c->options;
    fkv_profile *profile = NULL;
    fkv_profile_info info = {.struct_size = sizeof info};
    fkv_stats estimate = {.struct_size = sizeof estimate};
    fkv_status status = fkv_calibrator_solve(c->calibrator, NULL, NULL, 0, &profile);
    status = status ? status : fkv_profile_save_file(profile, o->calibrate);
    status = status ? status : fkv_profile_query(profile, &info);
    status = status ? status
                    : fkv_profile_estimate(profile, (int64_t)o->context, info.period, &estimate);
    fkv_profile_destroy(profile);
    return status ? needle_fail_fkv(c->error, NEEDLE_FAILED, c->ctx, status, o->calibrate)
                  : needle_report_profile(o, &info, &estimate, needle_seconds() - start, c->error);
}

int needle_calibrate(const struct needle_options *options, const struct needle_model *model,
                     fkv_context *ctx, struct needle_source source, struct needle_error *error) {
    const double start = needle_seconds();
    struct calibration c = {
        .options = options, .model = model, .ctx = ctx, .source = source, .error = error};
    needle_model_params(model, &c.params);
    int code = create(&c);
    code = code ? code : observe_exactly(&c);
    code = code ? code : save(&c, start);
    fkv_calibrator_destroy(c.calibrator);
    return code;
}
