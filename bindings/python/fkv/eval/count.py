# SPDX-License-Identifier: Apache-2.0
"""Bytes of a cache, counted the same way for every method.

What is kept exactly counts as f16, 2 bytes. What is coded counts its codes, and a scale and a zero of f16 for
each group. What libfkv holds counts what libfkv has allocated for it, in blocks, tables and all.
"""
from __future__ import annotations

import dataclasses

F16 = 2  #: bytes


@dataclasses.dataclass
class Account:
    """What is held, in elements: one number of one key or value."""

    exact: int = 0
    code_bits: int = 0  #: bits of all codes together
    groups: int = 0  #: that have a scale and a zero
    allocated: int = 0  #: bytes that libfkv has told

    def bytes(self) -> int:
        return self.exact * F16 + (self.code_bits + 7) // 8 + self.groups * 2 * F16 + self.allocated


def dense(layers: int, kv_heads: int, head_dim: int, tokens: int) -> int:
    """Bytes of all keys and values in f16."""
    return 2 * layers * kv_heads * head_dim * tokens * F16


def coded(account: Account, elements: int, bits: int, groups: int) -> None:
    """Adds elements of `bits` bits each."""
    account.code_bits += elements * bits
    account.groups += groups
