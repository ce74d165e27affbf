/* SPDX-License-Identifier: Apache-2.0 */
#include "attend/plan.h"

#include <math.h>
#include <string.h>

void fkv_merge_states(const struct fkv_view *out_a, const struct fkv_view *lse_a,
                      const struct fkv_view *out_b, const struct fkv_view *lse_b, int64_t tokens,
                      int64_t heads, int64_t dim) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            char *la = lse_a->data + t * lse_a->token_stride + h * lse_a->head_stride;
            const char *lb = lse_b->data + t * lse_b->token_stride + h * lse_b->head_stride;
            char *a = out_a->data + t * out_a->token_stride + h * out_a->head_stride;
            const char *b = out_b->data + t * out_b->token_stride + h * out_b->head_stride;
            float x, y;
            memcpy(&x, la, sizeof x);
            memcpy(&y, lb, sizeof y);
            if (y == -INFINITY) /* nothing to add; also keeps -inf - -inf away */
                continue;
            float max = x > y ? x : y, wa = expf(x - max), wb = expf(y - max), sum = wa + wb;
            for (int64_t d = 0; d < dim; d++) {
                char *to = a + d * (int64_t)fkv_dtype_size(out_a->dtype);
                float va = fkv_load_element(to, out_a->dtype);
                float vb =
                    fkv_load_element(b + d * (int64_t)fkv_dtype_size(out_b->dtype), out_b->dtype);
                fkv_store_element(to, out_a->dtype, (va * wa + vb * wb) / sum);
            }
            float lse = max + logf(sum);
            memcpy(la, &lse, sizeof lse);
        }
}
