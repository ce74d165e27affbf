/* SPDX-License-Identifier: Apache-2.0 */
#include "backend.h"

#include "attend/plan.h"

const struct fkv_backend_ops *fkv_backend_cpu(void) {
    static const struct fkv_backend_ops ops = {
        .name = "cpu",
        .store = fkv_store,
        .code = fkv_code,
        .attend = fkv_attend_rows,
    };
    return &ops;
}
