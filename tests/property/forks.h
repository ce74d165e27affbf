/* SPDX-License-Identifier: Apache-2.0 */
/* What the tests of forks and crops share: the rules of the header, once more, and small worlds. */
#ifndef FKV_TESTS_FORKS_H
#define FKV_TESTS_FORKS_H

#include "property.h"

int64_t sinks(const struct config *c);
/* Tiles that are coded once a sequence that was never cropped has so many tokens. */
int64_t tiles_to_code(const struct config *c, int64_t tokens);
/* Tokens before the first that is not coded, behind so many coded tiles; 0 if there are none. */
int64_t coded_end(const struct config *c, int64_t tiles);
/* The greatest length, no more than `tokens`, that a sequence with so many coded tiles can be cropped to. */
int64_t floor_of(const struct config *c, int64_t tiles, int64_t tokens);

enum coding_kind { KIND_EXACT, KIND_FOURIER, KIND_CALIBRATED, N_KIND };
struct config forks_draw(struct random *r, enum coding_kind kind);
fkv_sequence fork_of(struct world *w, fkv_sequence parent);
/* Bytes that are not the cache's, with no plan. */
int64_t other_bytes(struct world *w);
/* The allocator has what the cache and its sequences say. Replaces the plan, whose bytes are its own. */
void check_bytes(struct world *w, int64_t others);
void same_stats(const fkv_stats *a, const fkv_stats *b, bool tables);
/* The same step on two sequences gives the same bits. */
void step_both(struct world *w, fkv_sequence a, fkv_sequence b, const struct stream *s,
               int64_t first, int64_t count);

#endif /* FKV_TESTS_FORKS_H */
