/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Decodes one token after another on a small cache and prints, in nanoseconds, the median of
 * fkv_append_attend() alone and of a whole step with fkv_plan_update(). call_cost.py does the same in
 * Python and compares.
 */
#include <fkv/fkv.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { STEPS = 2000, QUERY_HEADS = 4, KV_HEADS = 2, DIM = 64 };

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static int64_t median(int64_t *values) {
    qsort(values, STEPS, sizeof(*values), ascending);
    return values[STEPS / 2];
}

static void check(fkv_status status) {
    if (status != FKV_OK) {
        fprintf(stderr, "%s\n", fkv_status_string(status));
        exit(1);
    }
}

static fkv_plan *make_plan(fkv_sequence *sequence) {
    fkv_context *ctx;
    fkv_profile *profile;
    fkv_cache *cache;
    fkv_plan *plan;
    fkv_context_params params;
    fkv_model_params model;
    check(fkv_context_params_init(&params, sizeof(params)));
    params.threads = 1;
    check(fkv_model_params_init(&model, sizeof(model)));
    model.n_layers = 1;
    model.n_q_heads = QUERY_HEADS;
    model.n_kv_heads = KV_HEADS;
    model.head_dim = DIM;
    check(fkv_context_create(&params, &ctx));
    check(fkv_profile_create_exact(ctx, &model, FKV_DTYPE_F16, &profile));
    check(fkv_cache_create(ctx, profile, NULL, &cache));
    check(fkv_sequence_create(cache, NULL, sequence));
    check(fkv_plan_create(cache, &plan));
    return plan; /* it keeps the rest, and ends with the process */
}

int main(void) {
    static float q[QUERY_HEADS * DIM], k[KV_HEADS * DIM], v[KV_HEADS * DIM];
    static float out[QUERY_HEADS * DIM];
    static int64_t call_ns[STEPS], step_ns[STEPS];
    const int64_t q_shape[3] = {1, QUERY_HEADS, DIM}, k_shape[3] = {1, KV_HEADS, DIM}, n_new = 1;
    fkv_sequence sequence;
    fkv_plan *plan = make_plan(&sequence);
    for (int i = 0; i < STEPS; i++) {
        const int64_t start = now();
        fkv_batch batch;
        fkv_tensor tq, tk, tv, to;
        check(fkv_batch_init(&batch, sizeof(batch)));
        batch.count = 1;
        batch.sequences = &sequence;
        batch.n_new = &n_new;
        check(fkv_plan_update(plan, &batch));
        const int64_t planned = now();
        check(fkv_tensor_init(&tq, q, FKV_DTYPE_F32, 3, q_shape));
        check(fkv_tensor_init(&tk, k, FKV_DTYPE_F32, 3, k_shape));
        check(fkv_tensor_init(&tv, v, FKV_DTYPE_F32, 3, k_shape));
        check(fkv_tensor_init(&to, out, FKV_DTYPE_F32, 3, q_shape));
        check(fkv_append_attend(plan, 0, &tq, &tk, &tv, &to, NULL));
        const int64_t end = now();
        call_ns[i] = end - planned;
        step_ns[i] = end - start;
    }
    const int64_t call = median(call_ns), step = median(step_ns);
    printf("%lld %lld\n", (long long)call, (long long)step);
    return 0;
}
