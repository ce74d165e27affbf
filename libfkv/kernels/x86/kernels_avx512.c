/* SPDX-License-Identifier: Apache-2.0 */
#define FKV_SUFFIX avx512
#define MAX_ROWS 6
#define WEIGH_ROWS 4
#include <stdint.h>

#include "vec_avx512.h"

#include "simd.h"

/* ---- for processors that have AVX512_VNNI, too */

#define VNNI __attribute__((target("avx512vnni")))
static inline VNNI vi sift_dot_vnni(vi s, vi u, vi z) {
    return _mm512_dpbusd_epi32(s, u, z);
}
#define SIFT(name) name##_vnni
#define SIFT_TARGET VNNI
#define SIFT_ROWS 6
#define SIFT_VECTORS 4
#define SIFT_DOT 1
#include "simd_sift.h"

void fkv_kernels_init_avx512_vnni(struct fkv_kernels *k) {
    k->sift = sift_vnni;
}
