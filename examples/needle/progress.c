/* SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L

#include "progress.h"

#include <stdio.h>
#include <unistd.h>

#include "common.h"

#define BAR_WIDTH 30
#define BAR_EVERY 0.1   /* seconds between two drawings on a terminal */
#define LINE_EVERY 10.0 /* seconds between two lines in a log */

void needle_progress_begin(struct needle_progress *progress, const char *label, uint64_t total) {
    double now = needle_seconds();
    *progress = (struct needle_progress){
        .terminal = isatty(STDERR_FILENO) == 1, .total = total, .start = now, .shown = now};
    snprintf(progress->label, sizeof progress->label, "%s", label);
}

static void draw(const struct needle_progress *p, double elapsed, double share) {
    double left = share > 0 ? elapsed / share - elapsed : 0;
    if (!p->terminal) {
        fprintf(stderr, "%s: %.0f %%, %.0f s, about %.0f s left\n", p->label, 100 * share, elapsed,
                left);
        return;
    }
    char bar[BAR_WIDTH + 1];
    for (int i = 0; i < BAR_WIDTH; i++) {
        bar[i] = i < (int)(share * BAR_WIDTH) ? '#' : '.';
    }
    bar[BAR_WIDTH] = '\0';
    fprintf(stderr, "\r%s [%s] %3.0f %%  %.1f s, %.0f s left\033[K", p->label, bar, 100 * share,
            elapsed, left);
    fflush(stderr);
}

void needle_progress_step(struct needle_progress *progress, uint64_t units) {
    if (!progress || !progress->total) {
        return;
    }
    progress->done += units;
    double now = needle_seconds();
    if (now - progress->shown < (progress->terminal ? BAR_EVERY : LINE_EVERY)) {
        return;
    }
    progress->shown = now;
    draw(progress, now - progress->start, (double)progress->done / (double)progress->total);
}

void needle_progress_end(struct needle_progress *progress) {
    if (progress->terminal && progress->shown > progress->start) {
        fprintf(stderr, "\r\033[K");
        fflush(stderr);
    }
    progress->total = 0;
}
