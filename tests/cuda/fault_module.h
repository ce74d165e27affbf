/* SPDX-License-Identifier: Apache-2.0 */
#ifndef FKV_TESTS_FAULT_MODULE_H
#define FKV_TESTS_FAULT_MODULE_H

struct fkv_cuda_ops;

/* After so many requests for memory, of the device or pinned, every further one is refused; -1: none is. */
void fault_after(int requests);
/* Requests refused since then. */
int fault_count(void);

const struct fkv_cuda_ops *fkv_cuda_module(unsigned handshake, const char *version);

#endif /* FKV_TESTS_FAULT_MODULE_H */
