# SPDX-License-Identifier: Apache-2.0
"""Decoding without a view of each array anew.

A decoding step brings, layer for layer, arrays that differ in nothing but their address. Their fkv_tensors are made
once, for as long as shapes, strides and types stay, and only the addresses are written: a quarter of the time.
"""
from __future__ import annotations

import torch

from .._convert import TENSOR, View, ffi
from ..cache import Plan
from ..cache import lib as _lib


def signature(q, k, v) -> tuple:
    return q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype


class Fixed:
    """Four fkv_tensors for one token of each sequence, on the host."""

    def __init__(self, q, k, v):
        self.signature = signature(q, k, v)
        batch, heads, _, dim = q.shape
        self.shape, self.dtype = (batch, 1, heads, dim), q.dtype
        out = torch.empty(self.shape, dtype=q.dtype)
        flat = [x.reshape(batch, x.shape[1], dim) for x in (q, k, v)]
        #: Whether they can be described where they lie.
        self.possible = all(a.data_ptr() == b.data_ptr() for a, b in zip(flat, (q, k, v)))
        self.tensors = [ffi.new('fkv_tensor *') for _ in range(4)]
        for tensor, x in zip(self.tensors, (*flat, out.view(batch, heads, dim))):
            ffi.memmove(tensor, ffi.cast(TENSOR, View(x).address), ffi.sizeof('fkv_tensor'))
        self.addresses = [ffi.cast('uintptr_t *', ffi.addressof(tensor, 'data')) for tensor in self.tensors]

    def append_attend(self, plan: Plan, layer: int, q, k, v):
        """plan.append_attend() of [B, H, 1, D]; returns [B, 1, Hq, D]."""
        out = torch.empty(self.shape, dtype=self.dtype)
        at_q, at_k, at_v, at_out = self.addresses
        at_q[0], at_k[0], at_v[0], at_out[0] = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        tq, tk, tv, tout = self.tensors
        status = _lib.fkv_append_attend(plan._pointer, layer, tq, tk, tv, tout, ffi.NULL)
        if status:
            raise plan._failure(status)
        return out
