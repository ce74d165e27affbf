/* SPDX-License-Identifier: Apache-2.0 */
/* Progress of long work on stderr: a bar on a terminal, else a line now and then. */
#ifndef NEEDLE_PROGRESS_H
#define NEEDLE_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>

struct needle_progress {
    bool terminal;
    char label[64];
    uint64_t done;
    uint64_t total;
    double start;
    double shown; /* when something was last printed */
};

void needle_progress_begin(struct needle_progress *progress, const char *label, uint64_t total);
/* `progress` may be NULL. */
void needle_progress_step(struct needle_progress *progress, uint64_t units);
/* Removes the bar, so that results can be printed. */
void needle_progress_end(struct needle_progress *progress);

#endif
