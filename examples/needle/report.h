/* SPDX-License-Identifier: Apache-2.0 */
/* What is printed on stdout: for people, or one JSON object per line. */
#ifndef NEEDLE_REPORT_H
#define NEEDLE_REPORT_H

#include "options.h"
#include "run.h"

struct needle_report {
    const struct needle_options *options;
    const char *profile;
    const struct needle_engine *engine; /* whose meter is read, if it runs */
    /* Sums over the items so far. */
    size_t items;
    size_t right;
    double byte_accuracy;
    double bits_per_byte;
    double prefill_s;
    double decode_s;
    size_t decode_tokens;
    /* Of the last item. */
    struct needle_result last;
};

int needle_report_item(struct needle_report *report, const struct needle_item *item,
                       const struct needle_result *result, struct needle_error *error);
int needle_report_summary(const struct needle_report *report, struct needle_error *error);
/* After a calibration: what the profile at `path` compresses, and the ratio at --context tokens. */
int needle_report_profile(const struct needle_options *options, const fkv_profile_info *info,
                          const fkv_stats *estimate, double seconds, struct needle_error *error);

#endif
