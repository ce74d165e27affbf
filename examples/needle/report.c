/* SPDX-License-Identifier: Apache-2.0 */
#include "report.h"

#include <ctype.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#define MIB (1024.0 * 1024.0)

static void print_quoted(const char *label, const uint8_t *bytes, size_t count) {
    printf("  %-9s \"", label);
    for (size_t i = 0; i < count; i++) {
        if (bytes[i] == '\n') {
            printf("\\n");
        } else if (isprint(bytes[i])) {
            putchar(bytes[i]);
        } else {
            printf("\\x%02x", bytes[i]);
        }
    }
    printf("\"\n");
}

static double rate(size_t tokens, double seconds) {
    return seconds > 0 ? (double)tokens / seconds : 0;
}

static double ms_per_token(size_t tokens, double seconds) {
    return tokens ? 1e3 * seconds / (double)tokens : 0;
}

static bool is_forced(const struct needle_options *o) {
    return o->task != NEEDLE_TASK_NIAH;
}

static void print_item(const struct needle_report *report, const struct needle_item *item,
                       const struct needle_result *r) {
    const struct needle_options *o = report->options;
    printf("item %zu of %zu: %s, %zu tokens, profile %s", report->items, o->items, o->task_name,
           o->context, report->profile);
    if (o->task == NEEDLE_TASK_TEXT) {
        printf("\n  %.4f bits per byte, %.3f of the bytes right\n", r->bits_per_byte,
               r->byte_accuracy);
    } else {
        printf(", depth %.3f\n", item->depth);
        print_quoted("question", item->tokens + item->question, item->prompt - item->question);
        print_quoted("expected", item->tokens + item->prompt, r->expected);
        print_quoted("answer", r->answer, r->expected);
        printf("  %s, %.3f of the bytes\n", r->right ? "right" : "WRONG", r->byte_accuracy);
    }
    printf("  prefill %.2f s, %.0f tokens/s; then %.2f ms per token, %.0f tokens/s\n", r->prefill_s,
           rate(r->prefill_tokens, r->prefill_s), ms_per_token(r->decode_tokens, r->decode_s),
           rate(r->decode_tokens, r->decode_s));
    printf("  cache %.2f MiB, dense f16 %.2f MiB, ratio %.2f; peak memory %.0f MiB\n",
           (double)r->kv_bytes / MIB, (double)r->dense_bytes / MIB, r->ratio,
           (double)r->peak_rss_bytes / MIB);
}

/* Takes `object`, which may be NULL for want of memory. */
static int print_json(json_t *object, struct needle_error *error) {
    int failed = object ? json_dumpf(object, stdout, JSON_REAL_PRECISION(9)) : -1;
    json_decref(object);
    return failed ? needle_fail(error, NEEDLE_FAILED, "JSON could not be written")
                  : (putchar('\n'), NEEDLE_OK);
}

/* Answers are bytes; JSON strings are UTF-8. What is not ASCII becomes '?'. */
static json_t *json_bytes(const uint8_t *bytes, size_t count) {
    char text[1024];
    size_t n = count < sizeof text ? count : sizeof text;
    for (size_t i = 0; i < n; i++) {
        text[i] = (char)(bytes[i] >= 1 && bytes[i] < 0x80 ? bytes[i] : '?');
    }
    return json_stringn(text, n);
}

/* Keys that only some tasks have. */
static int add_task_keys(json_t *object, const struct needle_options *o, double byte_accuracy,
                         double bits_per_byte) {
    int bad = json_object_set_new(object, "byte_accuracy", json_real(byte_accuracy));
    if (is_forced(o)) {
        bad |= json_object_set_new(object, "bits_per_byte", json_real(bits_per_byte));
    }
    return bad;
}

static json_t *item_json(const struct needle_report *report, const struct needle_item *item,
                         const struct needle_result *r) {
    const struct needle_options *o = report->options;
    json_t *object =
        json_pack("{s:I, s:s, s:s, s:I, s:f, s:f, s:f, s:I, s:I, s:f, s:I}", "item",
                  (json_int_t)report->items, "task", o->task_name, "profile", report->profile,
                  "context", (json_int_t)o->context, "depth", item->depth, "prefill_s",
                  r->prefill_s, "decode_ms_per_token", ms_per_token(r->decode_tokens, r->decode_s),
                  "kv_bytes", (json_int_t)r->kv_bytes, "dense_bytes", (json_int_t)r->dense_bytes,
                  "ratio", r->ratio, "peak_rss_bytes", (json_int_t)r->peak_rss_bytes);
    int bad = add_task_keys(object, o, r->byte_accuracy, r->bits_per_byte);
    if (o->task != NEEDLE_TASK_TEXT) {
        const uint8_t *t = item->tokens;
        bad |= json_object_set_new(object, "question",
                                   json_bytes(t + item->question, item->prompt - item->question));
        bad |= json_object_set_new(object, "expected", json_bytes(t + item->prompt, r->expected));
        bad |= json_object_set_new(object, "answer", json_bytes(r->answer, r->expected));
        bad |= json_object_set_new(object, "right", json_boolean(r->right));
    }
    if (bad) {
        json_decref(object);
        object = NULL;
    }
    return object;
}

int needle_report_item(struct needle_report *report, const struct needle_item *item,
                       const struct needle_result *result, struct needle_error *error) {
    report->items++;
    report->right += result->right;
    report->byte_accuracy += result->byte_accuracy;
    report->bits_per_byte += result->bits_per_byte;
    report->prefill_s += result->prefill_s;
    report->decode_s += result->decode_s;
    report->decode_tokens += result->decode_tokens;
    report->last = *result;
    report->last.answer = NULL;
    int code = NEEDLE_OK;
    if (report->options->json) {
        code = print_json(item_json(report, item, result), error);
    } else {
        print_item(report, item, result);
    }
    fflush(stdout);
    return code;
}

/* ---- the meter */

static int read_meter(const struct needle_report *report, int layer, fkv_fidelity *f,
                      struct needle_error *error) {
    *f = (fkv_fidelity){.struct_size = sizeof *f};
    fkv_status status = fkv_cache_fidelity(report->engine->now->cache, layer, f);
    return status ? needle_fail_fkv(error, NEEDLE_FAILED, report->engine->ctx, status, "the meter")
                  : NEEDLE_OK;
}

static void print_fidelity(const char *layer, const fkv_fidelity *f) {
    printf("  %-5s %7" PRIu64 " %9.3f %9.3f %9.2f %9.4f %9.4f %9.4f %9.3f %9.3f\n", layer,
           f->blocks, 100 * f->block_error, 100 * f->block_error_max, 100 * f->weight, f->lse_bias,
           f->lse_error, f->lse_error_max, 100 * f->output_error, 100 * f->output_error_max);
}

static int print_meter(const struct needle_report *report, struct needle_error *error) {
    const int layers = report->engine->model->config.n_layers;
    fkv_fidelity f;
    int code = NEEDLE_OK;
    printf("the meter: errors in percent, of a block by itself and of outputs by one coded block\n"
           "  layer  blocks  of block       max    weight  lse bias lse error       max"
           "    output       max\n");
    for (int l = 0; l < layers && !code; l++) {
        char name[16];
        snprintf(name, sizeof name, "%d", l);
        code = read_meter(report, l, &f, error);
        if (!code) {
            print_fidelity(name, &f);
        }
    }
    code = code ? code : read_meter(report, FKV_ALL_LAYERS, &f, error);
    if (!code) {
        print_fidelity("all", &f);
    }
    return code;
}

static json_t *fidelity_json(const fkv_fidelity *f) {
    return json_pack("{s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "blocks",
                     (json_int_t)f->blocks, "samples", (json_int_t)f->samples, "block_error",
                     f->block_error, "block_error_max", f->block_error_max, "lse_bias", f->lse_bias,
                     "lse_error", f->lse_error, "lse_error_max", f->lse_error_max, "weight",
                     f->weight, "output_error", f->output_error, "output_error_max",
                     f->output_error_max);
}

/* All layers together, and in "layers" each. */
static int add_meter(json_t *object, const struct needle_report *report,
                     struct needle_error *error) {
    const int layers = report->engine->model->config.n_layers;
    fkv_fidelity f;
    json_t *list = json_array();
    int code = NEEDLE_OK;
    for (int l = 0; l < layers && !code; l++) {
        code = read_meter(report, l, &f, error);
        code = code || !json_array_append_new(list, fidelity_json(&f))
                   ? code
                   : needle_fail(error, NEEDLE_FAILED, "out of memory for JSON");
    }
    code = code ? code : read_meter(report, FKV_ALL_LAYERS, &f, error);
    if (code) {
        json_decref(list);
        return code;
    }
    json_t *all = fidelity_json(&f);
    int bad = json_object_set_new(all, "fraction", json_real(f.fraction));
    bad |= json_object_set_new(all, "layers", list);
    bad |= json_object_set_new(object, "meter", all);
    return bad ? needle_fail(error, NEEDLE_FAILED, "out of memory for JSON") : NEEDLE_OK;
}

/* ---- the end */

/* Plain text has no right answer. */
static json_t *exact(const struct needle_report *report) {
    return report->options->task == NEEDLE_TASK_TEXT || !report->items
               ? json_null()
               : json_real((double)report->right / (double)report->items);
}

int needle_report_summary(const struct needle_report *report, struct needle_error *error) {
    const struct needle_options *o = report->options;
    const struct needle_result *last = &report->last;
    const double n = report->items ? (double)report->items : 1;
    const double decode_ms = ms_per_token(report->decode_tokens, report->decode_s);
    const uint64_t rss = needle_peak_rss();
    if (!o->json) {
        printf("%s, %zu tokens, profile %s: ", o->task_name, o->context, report->profile);
        if (is_forced(o)) {
            printf("%.4f bits per byte, %.3f of the bytes; ", report->bits_per_byte / n,
                   report->byte_accuracy / n);
        }
        if (o->task != NEEDLE_TASK_TEXT) {
            printf("%zu of %zu right; ", report->right, report->items);
        }
        printf("ratio %.2f, %.2f of %.2f MiB; prefill %.2f s, %.2f ms per token; "
               "peak memory %.0f MiB\n",
               last->ratio, (double)last->kv_bytes / MIB, (double)last->dense_bytes / MIB,
               report->prefill_s / n, decode_ms, (double)rss / MIB);
        return o->meter > 0 ? print_meter(report, error) : NEEDLE_OK;
    }
    json_t *object = json_pack(
        "{s:b, s:s, s:s, s:I, s:I, s:o, s:f, s:I, s:I, s:f, s:f, s:I}", "summary", 1, "task",
        o->task_name, "profile", report->profile, "context", (json_int_t)o->context, "items",
        (json_int_t)report->items, "exact", exact(report), "ratio", last->ratio, "kv_bytes",
        (json_int_t)last->kv_bytes, "dense_bytes", (json_int_t)last->dense_bytes, "prefill_s",
        report->prefill_s / n, "decode_ms_per_token", decode_ms, "peak_rss_bytes", (json_int_t)rss);
    if (add_task_keys(object, o, report->byte_accuracy / n, report->bits_per_byte / n)) {
        json_decref(object);
        object = NULL;
    }
    int code = object && o->meter > 0 ? add_meter(object, report, error) : NEEDLE_OK;
    if (code) {
        json_decref(object);
        return code;
    }
    return print_json(object, error);
}

int needle_report_profile(const struct needle_options *options, const fkv_profile_info *info,
                          const fkv_stats *estimate, double seconds, struct needle_error *error) {
    const struct needle_options *o = options;
    const int64_t all = (int64_t)info->n_layers * info->n_kv_heads * info->head_dim;
    if (!o->json) {
        printf("%s: %" PRId64 " of %" PRId64 " key channels and %" PRId64 " of %" PRId64
               " value channels as %d Fourier bins; ratio %.2f at %zu tokens (%.1f s)\n",
               o->calibrate, info->k_fourier_channels, all, info->v_fourier_channels, all,
               info->bins, estimate->ratio, o->context, seconds);
        return NEEDLE_OK;
    }
    return print_json(json_pack("{s:s, s:I, s:I, s:I, s:i, s:I, s:f, s:f}", "profile", o->calibrate,
                                "channels", (json_int_t)all, "k_fourier_channels",
                                (json_int_t)info->k_fourier_channels, "v_fourier_channels",
                                (json_int_t)info->v_fourier_channels, "bins", (int)info->bins,
                                "context", (json_int_t)o->context, "ratio", estimate->ratio,
                                "seconds", seconds),
                      error);
}
