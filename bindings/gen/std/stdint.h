/* SPDX-License-Identifier: Apache-2.0 */
/* For the parser of header.py, which wants types and nothing else. */
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long uintptr_t;
