# SPDX-License-Identifier: Apache-2.0
"""Caches that are held by torch but stand where fkv.transformers has those of libfkv, so that every method
answers through the same path of the model: one sequence, and attention in float32 or the model's own type."""
from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as functional

from ..transformers._geometry import rotate
from .count import Account


class Rope:
    """cos and sin of any positions, as libfkv has them."""

    def __init__(self, params: Any, device: Any, dtype: Any):
        self.frequencies = torch.tensor(params.inv_freq or [], dtype=torch.float64)
        self.scaling, self.device, self.dtype = params.rope_scaling or 1.0, device, dtype

    def turn(self, x, first: int, sign: int = 1):
        """x [H, T, D], the first token of which is at position `first`."""
        if not len(self.frequencies):
            return x
        angles = torch.arange(first, first + x.shape[1], dtype=torch.float64)[:, None] * self.frequencies
        angles = torch.cat((angles, angles), -1)[None]
        # in float32, whatever the model: rounding once is enough
        cos, sin = ((part * self.scaling).float().to(self.device) for part in (angles.cos(), sign * angles.sin()))
        return rotate(x.float()[None], cos, sin)[0].to(x.dtype)


class Dense:
    """Rotated keys and values [Hk, n, D] of each layer; n may be less than the tokens that were read."""

    def __init__(self, params: Any, device: Any, dtype: Any):
        self.params, self.rope = params, Rope(params, device, dtype)
        self.keys: list = [None] * params.n_layers
        self.values: list = [None] * params.n_layers
        self.columns = 0  #: tokens that were read
        self.account = Account()
        self.step: Any = None
        self._left = 0

    def bytes(self) -> int:
        return self.account.bytes()

    def put(self, layer: int, keys, values) -> None:
        """What a layer holds of the context: rotated keys and values, [Hk, n, D]."""
        self.keys[layer], self.values[layer] = keys, values

    # ---- what fkv.transformers calls

    def begin(self, batch: int, tokens: int, mask, position_ids) -> None:
        if batch != 1 or mask is not None:
            raise ValueError('one sequence without padding at a time')
        if self._left:  # a step that broke off
            raise ValueError('an earlier step of this cache failed')
        self.step = types.SimpleNamespace(columns=self.columns)
        self._left = len(self.keys)
        self.columns += tokens

    def append_attend(self, layer: int, q, k, v):
        """q [1, Hq, T, D], k, v [1, Hk, T, D] before RoPE; attention [1, T, Hq, D]."""
        q, k = (self.rope.turn(x[0], self.step.columns) for x in (q, k))
        v = v[0]
        if self.keys[layer] is not None:
            k = torch.cat((self.keys[layer], k), 1)
            v = torch.cat((self.values[layer], v), 1)
        self.keys[layer], self.values[layer] = k, v
        self._left -= 1
        return attend(q, k, v, self.params.softmax_scale or None).transpose(0, 1)[None]


def attend(q, k, v, scale):
    """Causal attention of the newest tokens: q [Hq, T, D], k, v [Hk, n, D]."""
    group = q.shape[0] // k.shape[0]
    tokens, n = q.shape[1], k.shape[1]
    if tokens == 1:  # heads of a group stand where tokens would, and nothing is repeated
        grouped = q.reshape(1, k.shape[0], group, -1)
        out = functional.scaled_dot_product_attention(grouped, k[None], v[None], scale=scale)
        return out.reshape(q.shape[0], 1, -1)
    k, v = (x.repeat_interleave(group, 0)[None] for x in (k, v))
    mask = None
    if tokens < n:
        mask = torch.ones(tokens, n, dtype=torch.bool, device=q.device).tril(n - tokens)
    return functional.scaled_dot_product_attention(q[None], k, v, attn_mask=mask, scale=scale,
                                                   is_causal=tokens == n)[0]
