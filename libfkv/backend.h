/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The table of operations a backend implements. The rooms above it (api/, cache/, attend/plan.c) check
 * arguments, allocate, and keep the books; a backend computes, and cannot fail. A NULL slot is
 * FKV_ERR_UNSUPPORTED.
 */
#ifndef FKV_BACKEND_H
#define FKV_BACKEND_H

#include <stdbool.h>

struct fkv_plan_object;
struct fkv_row;
struct fkv_coding_room;
struct fkv_view;

struct fkv_backend_ops {
    const char *name;
    /* Rotates and stores the step's k and v behind each row's tokens, in pages that exist already. false
     * if a value is not finite in the storage type (and the context refuses such values). */
    bool (*store)(struct fkv_plan_object *plan, int layer, const struct fkv_view *k,
                  const struct fkv_view *v);
    /* Codes the row's tiles up to room->until: coefficients in place, kept channels into room->kept. */
    void (*code)(struct fkv_plan_object *plan, const struct fkv_row *row, int layer,
                 const struct fkv_coding_room *room);
    /* Attention of the step's queries over what the rows hold; lse may be NULL. */
    void (*attend)(struct fkv_plan_object *plan, int layer, const struct fkv_view *q,
                   const struct fkv_view *out, const struct fkv_view *lse);
    /* The same over what each selects, of plans with plan->longcache. */
    void (*attend_selected)(struct fkv_plan_object *plan, int layer, const struct fkv_view *q,
                            const struct fkv_view *out, const struct fkv_view *lse);
};

const struct fkv_backend_ops *fkv_backend_cpu(void);

#endif /* FKV_BACKEND_H */
