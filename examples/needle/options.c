/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE

#include "options.h"

#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

const char needle_usage[] =
    "Usage: fkv-needle [OPTION]...\n"
    "Hide a number in a long text, hold the text's keys and values in libfkv, and ask a small\n"
    "byte-level LLaMA model for the number. The cache is coded before the question is known.\n"
    "\n"
    "What is asked:\n"
    "  --task NAME         niah: find a number (default); multikey: among 60 others; copy: repeat\n"
    "                      a marked passage of 160 bytes; text: predict 511 bytes\n"
    "  --context N         tokens (bytes) of text and question together (default 8192)\n"
    "  --depth F           where the number is, 0 to 1 (default: spread over the items)\n"
    "  --distractors K     other keys with other numbers (default 0; multikey 60)\n"
    "  --items N           questions (default 4)\n"
    "  --together          hide the numbers of all items in one text, evenly spread, and read it\n"
    "                      once; each question is put to a fork of the sequence (niah only).\n"
    "                      With --distractors K: K + 1 numbers in a text, each one's\n"
    "                      distractors being the others, and as many texts as the items need\n"
    "  --same-text         hide each item's number in the same text, so that what lies before it "
    "is\n"
    "                      read once for all; with --chunk or --longcache (niah and multikey)\n"
    "  --text FILE         plain text to hide it in (default: the project's documentation);\n"
    "                      questions use its second half, calibration its first; a text that is\n"
    "                      too short is repeated\n"
    "  --seed S            of everything drawn (default 1)\n"
    "\n"
    "How the cache holds it:\n"
    "  --profile P         exact (default), fourier (the model folder's fourier.json),\n"
    "                      uniform:BITS[:GROUP[:unrotated]] (all channels alike, without\n"
    "                      carriers; groups of 64 or 128 tokens; unrotated: keys before RoPE),\n"
    "                      or a file. May be given several times: the context is read once, by\n"
    "                      exact attention, and each profile's cache is asked\n"
    "  --storage T         f32, f16 (default) or bf16: the type of the exact profile\n"
    "  --chunk N           tokens per step of the prefill (default: all in one, which makes\n"
    "                      attention within the context exact)\n"
    "\n"
    "  --longcache         attend with selection (docs/longcache.md): the model's window over a\n"
    "                      context of any length; profile exact, or a file with unrotated keys;\n"
    "                      prefill in steps of 512 tokens\n"
    "  --scope N           tokens attended to (default: the window), half of them local\n"
    "  --meter FRACTION    measure on this fraction of the coded blocks what coding costs\n"
    "                      attention, and print it for each layer at the end (docs/codec.md);\n"
    "                      calibrated and uniform profiles only\n"
    "  --index             hold an index of exact keys, which makes selection faster\n"
    "\n"
    "Calibration (instead of questions):\n"
    "  --calibrate OUT     write a Fourier profile of the model, from prompts of --context tokens\n"
    "  --calibrate-prompts N   prompts to observe (default 4)\n"
    "  --criterion C       residual (default) or published: how channels are ranked\n"
    "  --restoration R     ls (default) or authors: how time series come back\n"
    "  --bins N            complex Fourier coefficients per channel (default 512)\n"
    "  --local N           newest tokens that stay exact (default 1024)\n"
    "\n"
    "  --model DIR         config.json and safetensors (default: the model of this project)\n"
    "  --threads N         default: one for each processor\n"
    "  --logits FILE       write the logits behind the answers: f32, [tokens, vocabulary] per "
    "item\n"
    "  --json              one JSON object per item and one at the end\n"
    "  --help, --version\n"
    "\n"
    "Exit status: 0 done, whatever the answers; 1 failed; 2 options or input files are not "
    "usable;\n"
    "130 interrupted.\n";

enum option_code {
    OPT_MODEL = 256,
    OPT_CONTEXT,
    OPT_DEPTH,
    OPT_DISTRACTORS,
    OPT_ITEMS,
    OPT_PROFILE,
    OPT_STORAGE,
    OPT_TEXT,
    OPT_SEED,
    OPT_THREADS,
    OPT_CHUNK,
    OPT_LONGCACHE,
    OPT_SCOPE,
    OPT_METER,
    OPT_INDEX,
    OPT_TOGETHER,
    OPT_SAME_TEXT,
    OPT_TASK,
    OPT_CALIBRATE,
    OPT_CALIBRATE_PROMPTS,
    OPT_CRITERION,
    OPT_RESTORATION,
    OPT_BINS,
    OPT_LOCAL,
    OPT_LOGITS,
    OPT_JSON,
    OPT_HELP,
    OPT_VERSION
};

static const struct option long_options[] = {
    {"model", required_argument, NULL, OPT_MODEL},
    {"context", required_argument, NULL, OPT_CONTEXT},
    {"depth", required_argument, NULL, OPT_DEPTH},
    {"distractors", required_argument, NULL, OPT_DISTRACTORS},
    {"items", required_argument, NULL, OPT_ITEMS},
    {"profile", required_argument, NULL, OPT_PROFILE},
    {"storage", required_argument, NULL, OPT_STORAGE},
    {"text", required_argument, NULL, OPT_TEXT},
    {"seed", required_argument, NULL, OPT_SEED},
    {"threads", required_argument, NULL, OPT_THREADS},
    {"chunk", required_argument, NULL, OPT_CHUNK},
    {"longcache", no_argument, NULL, OPT_LONGCACHE},
    {"scope", required_argument, NULL, OPT_SCOPE},
    {"meter", required_argument, NULL, OPT_METER},
    {"index", no_argument, NULL, OPT_INDEX},
    {"together", no_argument, NULL, OPT_TOGETHER},
    {"same-text", no_argument, NULL, OPT_SAME_TEXT},
    {"task", required_argument, NULL, OPT_TASK},
    {"calibrate", required_argument, NULL, OPT_CALIBRATE},
    {"calibrate-prompts", required_argument, NULL, OPT_CALIBRATE_PROMPTS},
    {"criterion", required_argument, NULL, OPT_CRITERION},
    {"restoration", required_argument, NULL, OPT_RESTORATION},
    {"bins", required_argument, NULL, OPT_BINS},
    {"local", required_argument, NULL, OPT_LOCAL},
    {"logits", required_argument, NULL, OPT_LOGITS},
    {"json", no_argument, NULL, OPT_JSON},
    {"help", no_argument, NULL, OPT_HELP},
    {"version", no_argument, NULL, OPT_VERSION},
    {NULL, 0, NULL, 0},
};

/* The option at hand. */
struct argument {
    const char *name;
    const char *value;
    struct needle_error *error;
};

static int parse_integer(const struct argument *a, uint64_t min, uint64_t max, uint64_t *out) {
    char *end;
    errno = 0;
    unsigned long long n = strtoull(a->value, &end, 10);
    if (a->value[0] < '0' || a->value[0] > '9' || *end || errno || n < min || n > max) {
        return needle_fail(a->error, NEEDLE_BAD_INPUT,
                           "--%s %s: must be an integer from %llu to %llu", a->name, a->value,
                           (unsigned long long)min, (unsigned long long)max);
    }
    *out = n;
    return NEEDLE_OK;
}

static int parse_size(const struct argument *a, size_t min, size_t max, size_t *out) {
    uint64_t n = 0;
    int code = parse_integer(a, min, max, &n);
    *out = code ? *out : (size_t)n;
    return code;
}

static int parse_int32(const struct argument *a, int32_t min, int32_t max, int32_t *out) {
    uint64_t n = 0;
    int code = parse_integer(a, (uint64_t)min, (uint64_t)max, &n);
    *out = code ? *out : (int32_t)n;
    return code;
}

static int parse_share(const struct argument *a, double *out) {
    char *end;
    double x = strtod(a->value, &end);
    if (end == a->value || *end || !(x >= 0 && x <= 1)) {
        return needle_fail(a->error, NEEDLE_BAD_INPUT, "--%s %s: must be a number from 0 to 1",
                           a->name, a->value);
    }
    *out = x;
    return NEEDLE_OK;
}

/* uniform:BITS[:GROUP[:unrotated]]; the library says which numbers are possible. */
static int parse_profile(const struct argument *a, struct needle_options *o) {
    static const char digits[] = "0123456789", prefix[] = "uniform:";
    const char *p = a->value + sizeof prefix - 1;
    if (o->n_profiles == NEEDLE_MAX_PROFILES) {
        return needle_fail(a->error, NEEDLE_BAD_INPUT, "--%s: at most %d profiles", a->name,
                           NEEDLE_MAX_PROFILES);
    }
    o->profiles[o->n_profiles++] = a->value;
    if (strncmp(a->value, prefix, sizeof prefix - 1) != 0) {
        return NEEDLE_OK;
    }
    size_t bits = strspn(p, digits), group = p[bits] == ':' ? strspn(p + bits + 1, digits) : 0;
    const char *end = p + bits + (group ? group + 1 : 0);
    if (bits < 1 || bits > 2 || group > 3 || (*end && (!group || strcmp(end, ":unrotated") != 0))) {
        return needle_fail(a->error, NEEDLE_BAD_INPUT,
                           "--%s %s: must be uniform:BITS[:GROUP[:unrotated]]", a->name, a->value);
    }
    return NEEDLE_OK;
}

struct choice {
    const char *name;
    int32_t value;
};

static int parse_choice(const struct argument *a, const struct choice *choices, size_t n,
                        int32_t *out) {
    char known[128] = "";
    for (size_t i = 0; i < n; i++) {
        if (!strcmp(a->value, choices[i].name)) {
            *out = choices[i].value;
            return NEEDLE_OK;
        }
        strncat(known, i ? ", " : "", sizeof known - strlen(known) - 1);
        strncat(known, choices[i].name, sizeof known - strlen(known) - 1);
    }
    return needle_fail(a->error, NEEDLE_BAD_INPUT, "--%s %s: must be one of %s", a->name, a->value,
                       known);
}

static int parse_task(const struct argument *a, struct needle_options *o) {
    enum { MULTIKEY = 100 };
    static const struct choice tasks[] = {{"niah", NEEDLE_TASK_NIAH},
                                          {"multikey", MULTIKEY},
                                          {"copy", NEEDLE_TASK_COPY},
                                          {"text", NEEDLE_TASK_TEXT}};
    int32_t task = 0;
    int code = parse_choice(a, tasks, 4, &task);
    if (!code) {
        o->task_name = a->value;
        o->task = task == MULTIKEY ? NEEDLE_TASK_NIAH : (enum needle_task)task;
    }
    return code;
}

static int parse_calibration(int option, const struct argument *a, struct needle_options *o) {
    static const struct choice criteria[] = {{"residual", FKV_CRITERION_RESIDUAL},
                                             {"published", FKV_CRITERION_PUBLISHED}};
    static const struct choice restorations[] = {{"ls", FKV_RESTORE_LEAST_SQUARES},
                                                 {"authors", FKV_RESTORE_AUTHORS}};
    switch (option) {
    case OPT_CALIBRATE_PROMPTS:
        return parse_size(a, 1, 10000, &o->calibrate_prompts);
    case OPT_CRITERION:
        return parse_choice(a, criteria, 2, &o->criterion);
    case OPT_RESTORATION:
        return parse_choice(a, restorations, 2, &o->restoration);
    case OPT_BINS:
        return parse_int32(a, 1, 65536, &o->bins);
    default:
        return parse_int32(a, 0, INT32_MAX, &o->local);
    }
}

static int parse_option(int option, const struct argument *a, struct needle_options *o) {
    static const struct choice types[] = {
        {"f32", FKV_DTYPE_F32}, {"f16", FKV_DTYPE_F16}, {"bf16", FKV_DTYPE_BF16}};
    switch (option) {
    case OPT_MODEL:
        o->model = a->value;
        return NEEDLE_OK;
    case OPT_CONTEXT:
        return parse_size(a, 64, (size_t)1 << 26, &o->context);
    case OPT_DEPTH:
        return parse_share(a, &o->depth);
    case OPT_DISTRACTORS:
        return parse_size(a, 0, 100000, &o->distractors);
    case OPT_ITEMS:
        return parse_size(a, 1, 1000000, &o->items);
    case OPT_PROFILE:
        return parse_profile(a, o);
    case OPT_STORAGE:
        return parse_choice(a, types, 3, &o->storage);
    case OPT_TEXT:
        o->text = a->value;
        return NEEDLE_OK;
    case OPT_SEED:
        return parse_integer(a, 0, UINT64_MAX, &o->seed);
    case OPT_THREADS:
        return parse_int32(a, 1, 1024, &o->threads);
    case OPT_CHUNK:
        return parse_size(a, 1, (size_t)1 << 26, &o->chunk);
    case OPT_LONGCACHE:
        o->longcache = true;
        return NEEDLE_OK;
    case OPT_INDEX:
        o->index = true;
        return NEEDLE_OK;
    case OPT_TOGETHER:
        o->together = true;
        return NEEDLE_OK;
    case OPT_SAME_TEXT:
        o->same_text = true;
        return NEEDLE_OK;
    case OPT_SCOPE:
        return parse_int32(a, 256, FKV_MAX_SCOPE, &o->scope);
    case OPT_METER:
        return parse_share(a, &o->meter);
    case OPT_TASK:
        return parse_task(a, o);
    case OPT_CALIBRATE:
        o->calibrate = a->value;
        return NEEDLE_OK;
    case OPT_LOGITS:
        o->logits = a->value;
        return NEEDLE_OK;
    case OPT_JSON:
        o->json = true;
        return NEEDLE_OK;
    case OPT_HELP:
        o->help = true;
        return NEEDLE_OK;
    case OPT_VERSION:
        o->version = true;
        return NEEDLE_OK;
    default:
        return parse_calibration(option, a, o);
    }
}

/* An option that would have no effect is a mistake of the caller. */
static int check_given(const bool *given, const struct needle_options *o,
                       struct needle_error *error) {
    static const int calibration[] = {OPT_CALIBRATE_PROMPTS, OPT_CRITERION, OPT_RESTORATION,
                                      OPT_BINS, OPT_LOCAL};
    static const int questions[] = {
        OPT_DEPTH,  OPT_DISTRACTORS, OPT_ITEMS, OPT_PROFILE, OPT_STORAGE,  OPT_CHUNK, OPT_TASK,
        OPT_LOGITS, OPT_LONGCACHE,   OPT_SCOPE, OPT_METER,   OPT_TOGETHER, OPT_INDEX};
    const int *useless = o->calibrate ? questions : calibration;
    const size_t n = o->calibrate ? sizeof questions / sizeof *questions
                                  : sizeof calibration / sizeof *calibration;
    for (size_t i = 0; i < n; i++) {
        if (given[useless[i] - OPT_MODEL]) {
            return needle_fail(error, NEEDLE_BAD_INPUT, "--%s has no effect %s --calibrate",
                               long_options[useless[i] - OPT_MODEL].name,
                               o->calibrate ? "with" : "without");
        }
    }
    if (o->task != NEEDLE_TASK_NIAH &&
        (given[OPT_DEPTH - OPT_MODEL] || given[OPT_DISTRACTORS - OPT_MODEL])) {
        return needle_fail(error, NEEDLE_BAD_INPUT,
                           "--depth and --distractors have no effect on task %s", o->task_name);
    }
    if (o->together && (strcmp(o->task_name, "niah") != 0 || given[OPT_DEPTH - OPT_MODEL])) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "--together is for task niah, without --depth");
    }
    if (o->same_text && (o->task != NEEDLE_TASK_NIAH || o->together || o->depth >= 0 ||
                         !(o->chunk || o->longcache))) {
        return needle_fail(
            error, NEEDLE_BAD_INPUT,
            "--same-text is for tasks niah and multikey, with --chunk or --longcache, "
            "without --together and --depth");
    }
    return NEEDLE_OK;
}

static bool has_profile(const struct needle_options *o, const char *name) {
    for (size_t i = 0; i < o->n_profiles; i++) {
        if (!strcmp(o->profiles[i], name)) {
            return true;
        }
    }
    return false;
}

/* What does not go together in "How the cache holds it". */
static int check_holding(const bool *given, const struct needle_options *o,
                         struct needle_error *error) {
    if ((o->scope || o->index) && !o->longcache) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "--%s has no effect without --longcache",
                           o->scope ? "scope" : "index");
    }
    if (o->longcache && o->meter > 0) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "--meter cannot measure with --longcache");
    }
    if (o->longcache && has_profile(o, "fourier")) {
        return needle_fail(error, NEEDLE_BAD_INPUT,
                           "--longcache needs unrotated keys, which --profile fourier has not");
    }
    if (given[OPT_STORAGE - OPT_MODEL] && !has_profile(o, "exact")) {
        return needle_fail(error, NEEDLE_BAD_INPUT,
                           "--storage is for --profile exact; other profiles say it themselves");
    }
    if (o->n_profiles > 1 && (o->chunk || o->longcache || o->logits || o->meter > 0)) {
        return needle_fail(error, NEEDLE_BAD_INPUT,
                           "--chunk, --longcache, --logits and --meter are for one --profile: "
                           "several share what exact attention reads in one step");
    }
    return NEEDLE_OK;
}

/* getopt leaves a short option, of which there are none, in optopt; a long one was argv[optind - 1]. */
static int refuse_option(int why, char **argv, struct needle_error *error) {
    if (optopt > 0 && optopt < OPT_MODEL) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "-%c: unknown option; see --help", optopt);
    }
    return needle_fail(error, NEEDLE_BAD_INPUT, "%s: %s; see --help", argv[optind - 1],
                       why == ':' ? "needs a value"
                       : optopt   ? "takes no value"
                                  : "unknown option");
}

int needle_options_parse(int argc, char **argv, struct needle_options *options,
                         struct needle_error *error) {
    bool given[OPT_VERSION - OPT_MODEL + 1] = {false};
    *options = (struct needle_options){.model = FKV_SOURCE_ROOT "/examples/models/needle-13m",
                                       .storage = FKV_DTYPE_F16,
                                       .task_name = "niah",
                                       .context = 8192,
                                       .depth = -1,
                                       .items = 4,
                                       .seed = 1,
                                       .calibrate_prompts = 4,
                                       .local = -1};
    optind = 1;
    opterr = 0;
    for (;;) {
        int index = -1;
        int option = getopt_long(argc, argv, ":", long_options, &index);
        if (option == -1) {
            break;
        }
        if (option == '?' || option == ':') {
            return refuse_option(option, argv, error);
        }
        struct argument a = {long_options[index].name, optarg, error};
        given[option - OPT_MODEL] = true;
        int code = parse_option(option, &a, options);
        if (code) {
            return code;
        }
    }
    if (optind < argc) {
        return needle_fail(error, NEEDLE_BAD_INPUT, "%s: unexpected argument; see --help",
                           argv[optind]);
    }
    if (!strcmp(options->task_name, "multikey") && !given[OPT_DISTRACTORS - OPT_MODEL]) {
        options->distractors = NEEDLE_MULTIKEY;
    }
    options->per_text = !options->together                   ? 1
                        : given[OPT_DISTRACTORS - OPT_MODEL] ? options->distractors + 1
                                                             : options->items;
    if (!options->n_profiles) {
        options->profiles[options->n_profiles++] = "exact";
    }
    int code = check_given(given, options, error);
    return code ? code : check_holding(given, options, error);
}
