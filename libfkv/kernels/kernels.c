/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/kernels.h"

void fkv_kernels_init(struct fkv_kernels *k, fkv_cpu_level level) {
    fkv_kernels_init_ref(k);
#ifdef FKV_HAVE_AVX2
    if (level >= FKV_CPU_AVX2)
        fkv_kernels_init_avx2(k);
#endif
#ifdef FKV_HAVE_AVX512
    if (level >= FKV_CPU_AVX512)
        fkv_kernels_init_avx512(k);
    if (level >= FKV_CPU_AVX512 && fkv_cpu_has_avx512_vnni())
        fkv_kernels_init_avx512_vnni(k);
#endif
    (void)level;
}
