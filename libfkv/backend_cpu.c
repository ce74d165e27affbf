/* SPDX-License-Identifier: Apache-2.0 */
#include "backend.h"

#include "attend/plan.h"

static void code(struct fkv_plan_object *plan, const struct fkv_row *row, int layer,
                 const struct fkv_coding_room *room) {
    if (plan->cache->profile->coding == FKV_CODING_CALIBRATED)
        fkv_code_blocks(plan, row, layer, room);
    else
        fkv_code(plan, row, layer, room);
}

const struct fkv_backend_ops *fkv_backend_cpu(void) {
    static const struct fkv_backend_ops ops = {
        .name = "cpu",
        .store = fkv_store,
        .code = code,
        .attend = fkv_attend_rows,
    };
    return &ops;
}
