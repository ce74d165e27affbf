/* SPDX-License-Identifier: Apache-2.0 */
#define FKV_SUFFIX avx2
#define MAX_ROWS 3
#define WEIGH_ROWS 2
#include <stdint.h>

#include "vec_avx2.h"

#include "simd.h"
