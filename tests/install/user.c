/* SPDX-License-Identifier: Apache-2.0 */
/* A program of somebody who has only the installed library: two tokens into an exact cache and back. */
#include <fkv/fkv.h>

#include <math.h>
#include <stdio.h>
#include <string.h>

#define TOKENS 2
#define DIM 8

static int failed(const char *what, fkv_status status) {
    fprintf(stderr, "%s: %s\n", what, fkv_status_string(status));
    return 1;
}

static fkv_status step(fkv_plan *plan, fkv_sequence sequence, float *out) {
    int64_t n_new = TOKENS;
    const int64_t shape[3] = {TOKENS, 1, DIM};
    float k[TOKENS * DIM] = {0};
    float v[TOKENS * DIM];
    fkv_tensor tk, tv, to;
    fkv_batch batch;
    fkv_status status;

    for (int i = 0; i < TOKENS * DIM; i++)
        v[i] = i < DIM ? 1.0f : 3.0f;
    fkv_tensor_init(&tk, k, FKV_DTYPE_F32, 3, shape);
    fkv_tensor_init(&tv, v, FKV_DTYPE_F32, 3, shape);
    fkv_tensor_init(&to, out, FKV_DTYPE_F32, 3, shape);
    fkv_batch_init(&batch, sizeof(batch));
    batch.count = 1;
    batch.sequences = &sequence;
    batch.n_new = &n_new;
    status = fkv_plan_update(plan, &batch);
    return status ? status : fkv_append_attend(plan, 0, &tk, &tk, &tv, &to, NULL);
}

int main(void) {
    fkv_context *ctx = NULL;
    fkv_profile *profile = NULL;
    fkv_cache *cache = NULL;
    fkv_plan *plan = NULL;
    fkv_sequence sequence;
    fkv_model_params model;
    fkv_status status;
    float out[TOKENS * DIM];

    if (fkv_abi_version() != FKV_ABI_VERSION)
        return failed("another library", FKV_ERR_VERSION);
    fkv_model_params_init(&model, sizeof(model));
    model.n_layers = model.n_q_heads = model.n_kv_heads = 1;
    model.head_dim = DIM;
    model.rope_layout = FKV_ROPE_NONE;
    if ((status = fkv_context_create(NULL, &ctx)) ||
        (status = fkv_profile_create_exact(ctx, &model, FKV_DTYPE_F16, &profile)) ||
        (status = fkv_cache_create(ctx, profile, NULL, &cache)) ||
        (status = fkv_sequence_create(cache, NULL, &sequence)) ||
        (status = fkv_plan_create(cache, &plan)) || (status = step(plan, sequence, out)))
        return failed("libfkv", status);
    fkv_plan_destroy(plan);
    fkv_cache_destroy(cache);
    fkv_profile_destroy(profile);
    fkv_context_destroy(ctx);

    /* Equal keys weigh both tokens alike: the first sees 1, the second the mean of 1 and 3. */
    if (fabsf(out[0] - 1.0f) > 1e-6f || fabsf(out[DIM] - 2.0f) > 1e-6f)
        return failed("attention is wrong", FKV_ERR_STATE);
    printf("%s\n", fkv_version_string());
    return 0;
}
