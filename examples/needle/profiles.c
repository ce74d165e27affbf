/* SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L

#include "profiles.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct making {
    const struct needle_options *options;
    const struct needle_model *model;
    fkv_context *ctx;
    fkv_profile **profile;
    struct needle_error *error;
};

static int check_model(const struct making *m, const char *path) {
    fkv_model_params params;
    needle_model_params(m->model, &params);
    params.model_id = NULL;
    fkv_status status = fkv_profile_match(*m->profile, &params);
    if (status) {
        char reason[256] = "";
        fkv_context_message(m->ctx, reason, sizeof reason, NULL);
        return needle_fail(m->error, NEEDLE_BAD_INPUT, "%s: a profile of another model than %s: %s",
                           path, m->options->model, reason);
    }
    return NEEDLE_OK;
}

static int load(const struct making *m, const char *path) {
    fkv_status status = fkv_profile_load_file(m->ctx, path, m->profile);
    if (status) {
        int code = status == FKV_ERR_NOMEM ? NEEDLE_FAILED : NEEDLE_BAD_INPUT;
        return needle_fail_fkv(m->error, code, m->ctx, status, path);
    }
    return check_model(m, path);
}

static int load_fourier(const struct making *m) {
    const char *model = m->options->model;
    char path[4096];
    snprintf(path, sizeof path, "%s/fourier.json", model);
    if (access(path, F_OK) != 0) {
        return needle_fail(m->error, NEEDLE_BAD_INPUT,
                           "%s: %s; make it with: fkv-needle --model %s --calibrate %s", path,
                           strerror(errno), model, path);
    }
    return load(m, path);
}

/* With selection, keys are needed as they are before RoPE. */
static int create_exact(const struct making *m) {
    fkv_model_params params;
    fkv_codec_params codec;
    needle_model_params(m->model, &params);
    fkv_codec_params_init(&codec, sizeof codec);
    codec.storage_dtype = m->options->storage;
    codec.domain = FKV_DOMAIN_UNROTATED;
    fkv_status status =
        m->options->longcache
            ? fkv_profile_create_uniform(m->ctx, &params, &codec, FKV_CHANNEL_EXACT, m->profile)
            : fkv_profile_create_exact(m->ctx, &params, m->options->storage, m->profile);
    return status ? needle_fail_fkv(m->error, NEEDLE_FAILED, m->ctx, status, "exact profile")
                  : NEEDLE_OK;
}

static int create_uniform(const struct making *m, const char *name) {
    fkv_model_params params;
    fkv_codec_params codec;
    int bits = 0;
    needle_model_params(m->model, &params);
    fkv_codec_params_init(&codec, sizeof codec);
    /* the parser of options has seen that these are numbers */
    sscanf(name, "uniform:%d:%d", &bits, &codec.group);
    codec.domain = strstr(name, ":unrotated") ? FKV_DOMAIN_UNROTATED : codec.domain;
    fkv_status status = fkv_profile_create_uniform(m->ctx, &params, &codec, bits, m->profile);
    return status ? needle_fail_fkv(m->error, NEEDLE_BAD_INPUT, m->ctx, status, name) : NEEDLE_OK;
}

int needle_profile_make(const struct needle_options *options, const char *name,
                        const struct needle_model *model, fkv_context *ctx, fkv_profile **profile,
                        fkv_profile_info *info, struct needle_error *error) {
    const struct making m = {options, model, ctx, profile, error};
    int code = !strncmp(name, "uniform:", 8) ? create_uniform(&m, name)
               : !strcmp(name, "exact")      ? create_exact(&m)
               : !strcmp(name, "fourier")    ? load_fourier(&m)
                                             : load(&m, name);
    if (code) {
        return code;
    }
    *info = (fkv_profile_info){.struct_size = sizeof *info};
    fkv_status status = fkv_profile_query(*profile, info);
    return status ? needle_fail_fkv(error, NEEDLE_FAILED, ctx, status, name) : NEEDLE_OK;
}
