/* SPDX-License-Identifier: Apache-2.0 */
#define FKV_SUFFIX avx512
#define MAX_ROWS 6
#define WEIGH_ROWS 4
#include <stdint.h>

#include "vec_avx512.h"

#include "simd.h"
