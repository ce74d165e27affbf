# SPDX-License-Identifier: Apache-2.0
"""The sequences behind a FkvCache, and its steps.

The framework counts columns: tokens of a batch, padding included, the same for all rows. libfkv holds a
sequence for each row, of its real tokens alone. This is where one becomes the other.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .._convert import View
from ..cache import Cache, Plan, Sequence
from ..errors import StateError
from ._fixed import Fixed, signature


def all_of(mask) -> bool:
    """Whether a mask has no 0. torch would start threads for a long one."""
    return bool(mask.numpy().all() if mask.device.type == 'cpu' else mask.all())


@dataclasses.dataclass
class Step:
    """One forward pass."""

    tokens: int  #: columns of it
    columns: int  #: columns before it
    lengths: list[int]  #: tokens of the rows before it
    padding: Any  #: mask before it
    real: Any = None  #: [real tokens] index into [B * T], or None: all are real
    left: int = 0  #: layers that have not had it


class Store:
    """Rows of one cache of libfkv; several stores may share it."""

    def __init__(self, cache: Cache, layers: int, select: Any = None, on_device: bool = False):
        self.cache, self.layers, self.select = cache, layers, select
        self.plan: Plan = cache.plan()
        if select is not None:
            self.plan.select(select)
        self.rows: list[Sequence] = []
        self.lengths: list[int] = []
        self.columns = 0
        self.padding = None  # [B, columns] of bool, False where padding is; None: there is none
        self.step: Step | None = None
        self.fixed: Fixed | None = None
        self.on_device, self.stream = on_device, None

    # ---- steps

    def begin(self, batch: int, tokens: int, mask, position_ids) -> Step:
        """Starts a step of `tokens` columns. mask: [B, columns] of bool with it, or None: all are real."""
        if self.step is not None:
            self.undo()
        if self.rows and len(self.rows) != batch:
            raise ValueError(f'the cache holds {len(self.rows)} sequences, and this input has {batch}')
        self._check_mask(batch, tokens, mask)
        step = Step(tokens, self.columns, list(self.lengths), self.padding, left=self.layers)
        new = None if mask is None else mask[:, -tokens:]
        if new is not None and all_of(new):
            new = None
        lengths = self.lengths or [0] * batch
        counts: Any = tokens
        if new is not None:
            counts = new.sum(1).tolist()
            step.real = new.reshape(-1).nonzero()[:, 0]
        positions = self._positions(batch, tokens, lengths, new, position_ids)
        if self.on_device:
            self._follow_stream()
        if not self.rows:
            self.rows = [self.cache.sequence() for _ in range(batch)]
        self.plan.update(self.rows, counts, positions)
        self.columns += tokens
        self.lengths = [n + c for n, c in zip(lengths, [tokens] * batch if new is None else counts)]
        self.padding = mask
        self.step = step
        return step

    def _follow_stream(self) -> None:
        """The context works on the stream that torch works on now."""
        stream = torch.cuda.current_stream().cuda_stream
        if stream != self.stream:
            self.cache._context.set_stream(stream)
            self.stream = stream

    def _check_mask(self, batch: int, tokens: int, mask) -> None:
        if mask is None:
            if self.padding is not None:
                raise ValueError('attention_mask is missing: the cache holds input with padding')
            return
        if tuple(mask.shape) != (batch, self.columns + tokens):
            raise ValueError(f'attention_mask has shape {tuple(mask.shape)}; the cache and the new tokens need '
                             f'{(batch, self.columns + tokens)}')
        old = mask[:, :self.columns]
        same = all_of(old) if self.padding is None else torch.equal(old, self.padding)
        if not same:
            raise ValueError('attention_mask differs from that of earlier steps: what a cache of libfkv holds '
                             'cannot be hidden from single tokens')

    def _positions(self, batch: int, tokens: int, lengths, new, position_ids):
        """None where every token's position is its index in its row, else all positions."""
        if position_ids is None or self.select is not None:
            return None
        if position_ids.ndim != 2:
            raise ValueError(f'position_ids have {position_ids.ndim} dimensions, expected 2')
        if new is None and batch == 1 and tokens == 1:
            position = position_ids.item()
            return None if position == lengths[0] else [position]
        given = position_ids.expand(batch, tokens).cpu()
        if new is None:
            usual = torch.tensor(lengths)[:, None] + torch.arange(tokens)
            return None if torch.equal(given, usual) else given.reshape(-1).numpy()
        new = new.cpu()
        usual = torch.tensor(lengths)[:, None] + new.long().cumsum(1) - 1
        given = given[new]
        return None if torch.equal(given, usual[new]) else given.numpy()

    def undo(self) -> None:
        """Takes back a step that not all layers have had, for instance because of an error in the model."""
        step = self.step
        if step is None:
            return
        for row, length in zip(self.rows, step.lengths or [0] * len(self.rows)):
            row.crop(length)  # as far as nothing was coded: else this cache can only be reset
        self.step = None
        self.columns, self.lengths, self.padding = step.columns, step.lengths, step.padding
        if not step.lengths:
            self.rows = []

    def done(self) -> None:
        """A layer has had the step."""
        self.step.left -= 1
        if not self.step.left:
            self.step = None

    # ---- arrays

    def _flat(self, x):
        """[B, H, T, D] as [real tokens, H, D]; copied only if there are several rows of several tokens."""
        batch, heads, tokens, dim = x.shape
        if tokens == 1:
            x = x.reshape(batch, heads, dim)
        elif batch == 1:
            x = x[0].transpose(0, 1)
        else:
            x = x.transpose(1, 2).reshape(batch * tokens, heads, dim)
        real = self.step.real
        return x if real is None else x.index_select(0, real.to(x.device))

    def _view(self, x, writable: bool = False):
        # -1: no waiting between streams, since the context runs on torch's own.
        return View(x, writable, 0, -1) if self.on_device else View(x, writable)

    def append_attend(self, layer: int, q, k, v):
        """Attention of the step: [B, T, Hq, D]; what it returns for padding is 0."""
        batch, heads, tokens, dim = q.shape
        if tokens == 1 and self.step.real is None and not self.on_device:
            out = self._decode(layer, q, k, v)
            if out is not None:
                return out
        flat = self._flat(q)
        out = flat.new_empty(flat.shape)
        self.plan.append_attend(layer, self._view(flat), self._view(self._flat(k)),
                                self._view(self._flat(v)), self._view(out, True))
        real = self.step.real
        self.done()
        if real is not None:
            out = q.new_zeros(batch * tokens, heads, dim).index_copy_(0, real.to(q.device), out)
        return out.view(batch, tokens, heads, dim)

    def _decode(self, layer: int, q, k, v):
        """append_attend() where every row has one token; None if it must go the long way."""
        fixed = self.fixed
        if fixed is None or fixed.signature != signature(q, k, v):
            fixed = self.fixed = Fixed(q, k, v)
        if not fixed.possible:
            return None
        out = fixed.append_attend(self.plan, layer, q, k, v)
        self.done()
        return out

    def append(self, layer: int, k, v) -> None:
        """Stores the step's tokens; attention to them was done elsewhere."""
        self.plan.append(layer, self._view(self._flat(k)), self._view(self._flat(v)))
        self.done()

    # ---- what the framework does with caches

    def choose(self, indices: list[int]) -> None:
        """Row i becomes what row indices[i] was. Pages are shared until they are written to."""
        if self.step is not None:
            self.undo()
        if not self.rows:
            return
        old, taken, rows = self.rows, set(), []
        for index in indices:
            rows.append(old[index].fork() if index in taken else old[index])
            taken.add(index)
        for index, row in enumerate(old):
            if index not in taken:
                row.free()
        self.rows = rows
        self.lengths = [self.lengths[index] for index in indices]
        if self.padding is not None:
            self.padding = self.padding[torch.tensor(indices, device=self.padding.device)]

    def lengths_at(self, columns: int) -> list[int]:
        """Tokens of the rows when `columns` are left; refused if a row cannot be cropped to that."""
        if self.step is not None:
            self.undo()
        if columns >= self.columns:
            return list(self.lengths)
        if self.padding is None:
            lengths = [length - (self.columns - columns) for length in self.lengths]
        else:
            counts = self.padding[:, columns:].sum(1).tolist()
            lengths = [length - count for length, count in zip(self.lengths, counts)]
        for row, length in zip(self.rows, lengths):
            if row.crop_floor(length) != length:
                raise StateError(f'the cache cannot be cropped to {columns} tokens: those from {length} on are '
                                 f'coded already. From {row.crop_limit} tokens on any length is possible')
        return lengths

    def crop(self, columns: int, lengths: list[int]) -> None:
        """Drops the newest columns so that `columns` are left, which are `lengths` tokens of the rows."""
        for row, length in zip(self.rows, lengths):
            row.crop(length)
        self.columns, self.lengths = columns, lengths
        if self.padding is not None:
            self.padding = self.padding[:, :columns]

    def reset(self) -> None:
        """Frees everything."""
        for row in self.rows:
            row.free()
        self.rows, self.lengths, self.columns, self.padding, self.step = [], [], 0, None, None

    def copy(self) -> 'Store':
        """A store that holds the same: forks of the rows, without copies of keys and values."""
        if self.step is not None:
            self.undo()
        twin = Store(self.cache, self.layers, self.select, self.on_device)
        twin.rows = [row.fork() for row in self.rows]
        twin.lengths, twin.columns, twin.padding = list(self.lengths), self.columns, self.padding
        return twin
