# SPDX-License-Identifier: Apache-2.0
"""Caches, their sequences, and the plans of steps."""
from __future__ import annotations

import collections
import operator
from typing import Any, Sequence as Seq

import numpy

from ._convert import (TENSOR, View, empty_for, ffi, from_c, int64_list, lib, new_result, to_c)
from ._objects import Context, Handle, expect, tensor_pointer
from ._types import CacheParams, Fidelity, Selection, SelectParams, SequenceParams, Stats
from .profile import Profile

_cast = ffi.cast
_append = lib.fkv_append
_attend = lib.fkv_attend
_append_attend = lib.fkv_append_attend


class Cache(Handle):
    """The keys and values of many sequences over all layers.

    Keywords are the fields of CacheParams. Attends of different plans may run at the same time;
    appending, creating and freeing are writers: one beside anything else raises BusyError.
    """

    _destroy = lib.fkv_cache_destroy

    def __init__(self, context: Context, profile: Profile, **params):
        struct, keep = to_c(CacheParams, CacheParams(**params))
        out = ffi.new('fkv_cache **')
        info = expect(Profile, profile).info
        self._shape = info.n_kv_heads, info.head_dim
        expect(Context, context)._check(
            lib.fkv_cache_create(context._pointer, profile._pointer, struct, out))
        super().__init__(out[0], context)
        self.profile = profile
        # Sequences that became garbage while a call was running.
        self._garbage: collections.deque = collections.deque()

    def sequence(self, **params) -> 'Sequence':
        """A new empty sequence. Keywords are the fields of SequenceParams."""
        self._collect()
        struct, keep = to_c(SequenceParams, SequenceParams(**params))
        out = ffi.new('fkv_sequence *')
        self._check(lib.fkv_sequence_create(self._pointer, struct, out))
        return Sequence(self, out[0])

    def plan(self) -> 'Plan':
        """A new plan on this cache."""
        return Plan(self)

    def stats(self) -> Stats:
        """Bytes and tokens of all sequences, as allocated."""
        self._collect()
        return self._stats(lib.FKV_ALL_SEQUENCES)

    def _stats(self, sequence: int) -> Stats:
        struct = new_result(Stats)
        self._check(lib.fkv_cache_stats(self._pointer, sequence, struct))
        return from_c(Stats, struct)

    def meter(self, fraction: float = 1.0) -> None:
        """Starts the fidelity meter: `fraction` of the blocks of each layer is measured as they are sealed.

        From each plan's next update() on. Figures begin afresh; 0 ends the meter. For calibrated profiles
        on the CPU, else UnsupportedError. Outputs do not change.
        """
        self._check(lib.fkv_cache_meter(self._pointer, fraction))

    def fidelity(self, layer: int | None = None) -> Fidelity:
        """What the meter has found in a layer, or (None) in all. StateError while it is off."""
        struct = new_result(Fidelity)
        self._check(lib.fkv_cache_fidelity(
            self._pointer, lib.FKV_ALL_LAYERS if layer is None else layer, struct))
        return from_c(Fidelity, struct)

    def _collect(self) -> None:
        """Frees the garbage that could not be freed at once."""
        for _ in range(len(self._garbage)):
            try:
                sequence = self._garbage.popleft()
            except IndexError:
                return
            if lib.fkv_sequence_free(self._pointer, sequence) == lib.FKV_ERR_BUSY:
                self._garbage.append(sequence)


class Sequence:
    """One sequence of a cache. Freed by free(), by a with block, or when it is garbage."""

    def __init__(self, cache: Cache, number: int):
        self.cache = cache
        #: The id within the cache (fkv_sequence).
        self.id = number
        self._living = True

    def free(self) -> None:
        """Frees the sequence and its memory. Freeing twice, or after the cache, is allowed."""
        if self._living and not self.cache.closed:
            self.cache._check(lib.fkv_sequence_free(self.cache._pointer, self.id))
        self._living = False

    def fork(self) -> 'Sequence':
        """A new sequence that holds what this one holds. Pages are shared until one writes to them."""
        out = ffi.new('fkv_sequence *')
        self.cache._check(lib.fkv_sequence_fork(self.cache._pointer, self.id, out))
        return Sequence(self.cache, out[0])

    def crop(self, tokens: int) -> None:
        """Drops the newest tokens so that `tokens` are left.

        Every length from crop_limit on is possible; of shorter ones those that crop_floor() names. Any
        other raises StateError.
        """
        self.cache._check(lib.fkv_sequence_crop(self.cache._pointer, self.id, tokens))

    @property
    def crop_limit(self) -> int:
        """The smallest length from which on crop() takes every one."""
        limit = ffi.new('int64_t *')
        self.cache._check(lib.fkv_sequence_crop_limit(self.cache._pointer, self.id, limit))
        return limit[0]

    def crop_floor(self, tokens: int) -> int:
        """The greatest length, no more than `tokens`, that crop() takes."""
        possible = ffi.new('int64_t *')
        self.cache._check(lib.fkv_sequence_crop_floor(self.cache._pointer, self.id, tokens,
                                                      possible))
        return possible[0]

    def __enter__(self) -> 'Sequence':
        return self

    def __exit__(self, *exception) -> None:
        self.free()

    def __del__(self):
        try:
            if not self._living or self.cache.closed:
                return
            if lib.fkv_sequence_free(self.cache._pointer, self.id) == lib.FKV_ERR_BUSY:
                self.cache._garbage.append(self.id)
        except Exception:  # nobody is there to be told
            pass

    def __len__(self) -> int:
        """Number of tokens that every layer holds."""
        tokens = ffi.new('int64_t *')
        self.cache._check(lib.fkv_sequence_length(self.cache._pointer, self.id, tokens))
        return tokens[0]

    def __bool__(self) -> bool:
        return self._living

    def __repr__(self) -> str:
        return f'<fkv.Sequence {self.id}{"" if self._living else " (freed)"}>'

    def stats(self) -> Stats:
        """Bytes and tokens of this sequence."""
        return self.cache._stats(self.id)

    def read(self, layer: int, first: int = 0, count: int | None = None,
             dtype: Any = numpy.float32) -> tuple[numpy.ndarray, numpy.ndarray]:
        """What is held of `count` tokens from `first` on, as attention sees it: (k, v).

        Both [count, Hk, D], keys after RoPE. For inspection: slow.
        """
        if count is None:
            count = max(len(self) - first, 0)
        k = numpy.empty((count, *self.cache._shape), dtype)
        v = numpy.empty_like(k)
        views = View(k, True), View(v, True)
        self.cache._check(lib.fkv_sequence_read(self.cache._pointer, self.id, layer, first, count,
                                                *map(tensor_pointer, views)))
        return k, v


class Plan(Handle):
    """One step's batch, prepared by update() and used by every layer. One thread at a time."""

    _destroy = lib.fkv_plan_destroy

    def __init__(self, cache: Cache):
        out = ffi.new('fkv_plan **')
        expect(Cache, cache)._check(lib.fkv_plan_create(cache._pointer, out))
        super().__init__(out[0], cache._context)
        self.cache = cache
        self._sequences: tuple = ()

    def update(self, sequences: Seq[Sequence], n_new: Seq[int] | int,
               positions: Seq[int] | None = None) -> None:
        """Sets the step.

        sequences  which sequences take part, each at most once
        n_new      new tokens of each; one number stands for all
        positions  RoPE position of every new token, in batch order; None: a token's index
        """
        sequences = tuple(sequences)
        count = len(sequences)
        counts = [n_new] * count if isinstance(n_new, int) else _counts(n_new, count)
        if len(counts) != count:
            raise ValueError(f'n_new has {len(counts)} entries for {count} sequences')
        for sequence in sequences:
            if expect(Sequence, sequence).cache is not self.cache:
                raise ValueError(f'{sequence!r} is not of this cache')
        if self.cache._garbage:
            self.cache._collect()
        batch = ffi.new('fkv_batch *')
        lib.fkv_batch_init(batch, ffi.sizeof('fkv_batch'))
        batch.count = count
        batch.sequences = ids = ffi.new('fkv_sequence[]', [s.id for s in sequences])
        batch.n_new = new = ffi.new('int64_t[]', counts)
        if positions is not None:
            given = int64_list(positions, 'positions')
            batch.positions = where = ffi.from_buffer('int64_t[]', given)
            batch.positions_count = len(where)
        self._check(lib.fkv_plan_update(self._pointer, batch))
        # What is planned must not become garbage before it is used.
        self._sequences = sequences

    def select(self, params: SelectParams | None = None, **fields) -> None:
        """Attends within a finite scope from the next update() on (docs/longcache.md).

        params, or its fields as keywords: what is seen. Without either: plain attention again. The
        cache must be of a calibrated profile with unrotated keys.
        """
        if fields and params is not None:
            raise TypeError('give params or its fields, not both')
        struct, keep = to_c(SelectParams, SelectParams(**fields) if fields else params)
        self._check(lib.fkv_plan_select(self._pointer, struct))

    def selection(self, index: int = 0) -> tuple[Selection, numpy.ndarray]:
        """What the last queries of a sequence (`index` in the batch) saw: (numbers, spans).

        spans: [n, 2] of int64, first token and end of each span of the middle, ascending.
        """
        struct = new_result(Selection)
        status = lib.fkv_plan_selection(self._pointer, index, struct, ffi.NULL, 0)
        if status not in (lib.FKV_OK, lib.FKV_ERR_BUFFER):
            raise self._failure(status)
        spans = numpy.empty((struct.spans, 2), numpy.int64)
        if len(spans):
            self._check(lib.fkv_plan_selection(self._pointer, index, struct,
                                               ffi.from_buffer('int64_t[]', spans), spans.size))
        return from_c(Selection, struct), spans

    def replayed(self) -> None:
        """CUDA: tells that a graph with the step's calls of all layers was launched once more."""
        self._check(lib.fkv_plan_replayed(self._pointer))

    def append(self, layer: int, k: Any, v: Any) -> None:
        """Stores the step's new tokens of one layer: k, v [tokens, Hk, D], before RoPE."""
        k_view = View(k)
        v_view = View(v)
        status = _append(self._pointer, layer, _cast(TENSOR, k_view.address),
                         _cast(TENSOR, v_view.address))
        if status:
            raise self._failure(status)

    def attend(self, layer: int, q: Any, out: Any = None, lse: Any = None) -> Any:
        """Attention of the step's tokens; q [tokens, Hq, D], before RoPE.

        out  [tokens, Hq, D] to write to, of any type; None: a new array like q
        lse  [tokens, Hq] float32 to write the log-sum-exp to; True: a new array; None: not wanted

        Returns out, or (out, lse) if lse was asked for.
        """
        q_view = View(q)
        out, lse, out_view, lse_view = _outputs(q, q_view, out, lse)
        status = _attend(self._pointer, layer, _cast(TENSOR, q_view.address),
                         _cast(TENSOR, out_view.address), tensor_pointer(lse_view))
        if status:
            raise self._failure(status)
        return out if lse is None else (out, lse)

    def append_attend(self, layer: int, q: Any, k: Any, v: Any, out: Any = None,
                      lse: Any = None) -> Any:
        """append() and attend() in one, attending before anything new is coded.

        This is the call for prefill and decode. Arguments and result as in both.
        """
        q_view = View(q)
        k_view = View(k)
        v_view = View(v)
        out, lse, out_view, lse_view = _outputs(q, q_view, out, lse)
        status = _append_attend(self._pointer, layer, _cast(TENSOR, q_view.address),
                                _cast(TENSOR, k_view.address), _cast(TENSOR, v_view.address),
                                _cast(TENSOR, out_view.address), tensor_pointer(lse_view))
        if status:
            raise self._failure(status)
        return out if lse is None else (out, lse)


def _counts(n_new, count):
    """The numbers of new tokens, from a sequence or from one number of another type than int."""
    try:
        return [operator.index(n_new)] * count
    except TypeError:
        return [operator.index(number) for number in n_new]


def _outputs(q, q_view, out, lse):
    """Outputs to return and their views; new ones where none were given."""
    if out is None:
        out = empty_for(q, q_view, q_view.shape)
    out_view = View(out, True)
    if lse is None or lse is False:
        return out, None, out_view, None
    if lse is True:
        lse = empty_for(q, q_view, q_view.shape[:2], lse=True)
    return out, lse, out_view, View(lse, True)
