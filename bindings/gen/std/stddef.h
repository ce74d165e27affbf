/* SPDX-License-Identifier: Apache-2.0 */
/* For the parser of header.py, which wants types and nothing else. */
typedef unsigned long size_t;
