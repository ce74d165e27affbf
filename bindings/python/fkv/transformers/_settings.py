# SPDX-License-Identifier: Apache-2.0
"""What enable() was told: profile, selection, and where the work is done."""
from __future__ import annotations

import os
from typing import Any

import numpy
import torch

from .._objects import Context
from .._types import (Backend, Channel, CodecParams, Coding, Domain, DType, FourierParams,
                      SelectParams)
from ..cache import Cache
from ..errors import FormatError, MismatchError
from ..profile import Profile
from ._geometry import Geometry, identity_rope
from ._store import Store

STORAGE = {torch.float32: DType.F32, torch.float16: DType.F16, torch.bfloat16: DType.BF16}
PREFILL = 'auto', 'fkv', 'framework'


class Settings:
    """One model's geometry with a profile in a context; caches are made from it."""

    def __init__(self, geometry: Geometry, profile: Any, longcache: Any, context: Context | None,
                 threads: int | None, prefill: str):
        if prefill not in PREFILL:
            raise ValueError(f'prefill: {prefill!r} is none of {", ".join(map(repr, PREFILL))}')
        if geometry.dtype not in STORAGE:
            raise TypeError(f'the model computes in {geometry.dtype}; float32, float16 or bfloat16 are possible')
        self.geometry, self.prefill, self.threads = geometry, prefill, threads
        self.select = _select_params(longcache)
        self.context, self.asked = context, profile
        self.profile = self._resolve(profile)
        self._no_rope: dict[Any, tuple] = {}

    def other(self, profile: Any, longcache: Any) -> 'Settings':
        """The same with another profile or selection."""
        return Settings(self.geometry, self.asked if profile is None else profile,
                        self.select if longcache is None else longcache, self.context, self.threads,
                        self.prefill)

    def store(self) -> Store:
        """An empty cache of libfkv for one batch."""
        return Store(Cache(self.context, self.profile), len(self.geometry.layers), self.select,
                     self.geometry.device.type == 'cuda')

    def no_rope(self, like) -> tuple:
        """cos and sin of no rotation, made once."""
        key = like.device, like.dtype, like.shape[-1]
        made = self._no_rope.get(key)
        if made is None:
            made = self._no_rope[key] = identity_rope(like)
        return made

    def by_framework(self, dtype) -> bool:
        """Whether the framework attends to a first prompt, and libfkv only stores it. It computes in 16 bits
        where the model does, which is faster than libfkv's float32; and CUDA has no kernel for prompts."""
        if self.select is not None or self.prefill == 'fkv':
            return False
        return self.prefill == 'framework' or dtype != torch.float32 or self.geometry.device.type == 'cuda'

    # ---- profiles

    def _resolve(self, profile: Any) -> Profile:
        if isinstance(profile, Profile):
            # What is made from a profile lives where the profile does.
            self.context = profile._context
        elif self.context is None:
            self.context = _context_for(self.geometry.device, self.threads)
        if profile is None:
            return self._exact()
        if isinstance(profile, (str, os.PathLike)):
            profile = _load(self.context, profile)
        if not isinstance(profile, Profile):
            raise TypeError(f'profile: expected a file, a Profile or None, not {type(profile).__name__}')
        profile = self._of_held_layers(profile)
        profile.match(self.geometry.params)
        return profile

    def _exact(self) -> Profile:
        dtype = STORAGE[self.geometry.dtype]
        if self.select is None:
            return Profile.exact(self.context, self.geometry.params, dtype)
        codec = CodecParams(storage_dtype=dtype, domain=Domain.UNROTATED)
        return Profile.uniform(self.context, self.geometry.params, int(Channel.EXACT), codec)

    def _of_held_layers(self, profile: Profile) -> Profile:
        """The profile of the layers that are held, with unrotated keys if they are selected from."""
        info, layers = profile.info, list(self.geometry.layers)
        turn = (self.select is not None and info.coding == Coding.CALIBRATED
                and info.domain != Domain.UNROTATED)
        if info.n_layers == len(layers) and not turn:
            return profile
        if info.n_layers == len(layers):
            layers = list(range(len(layers)))
        elif info.n_layers != self.geometry.n_layers:
            raise MismatchError(f'the profile is of {info.n_layers} layers, the model has '
                                f'{self.geometry.n_layers}, {len(layers)} of them with full attention')
        return _rebuilt(self.context, profile, info, self.geometry.params, layers, turn)


def _load(context: Context, path: Any) -> Profile:
    try:
        return Profile.load(context, path)
    except FormatError as error:
        raise type(error)(f'{os.fspath(path)} is no profile of libfkv: {error}') from None


def _rebuilt(context, profile, info, params, layers: list[int], turn: bool) -> Profile:
    """A profile of some of another's layers."""
    if info.coding == Coding.EXACT:
        return Profile.exact(context, params, info.storage_dtype)
    k, v = (numpy.stack([profile.channels(layer, part) for layer in layers]) for part in 'kv')
    if info.coding == Coding.FOURIER:
        names = ('storage_dtype', 'coefficient_dtype', 'bins', 'n_sink', 'n_local', 'restoration', 'outgrow',
                 'period', 'min_middle')
        fourier = FourierParams(**{name: getattr(info, name) for name in names})
        return Profile.fourier(context, params, k == Channel.FOURIER, v == Channel.FOURIER, fourier)
    names = 'storage_dtype', 'group', 'block', 'n_sink', 'n_local', 'domain'
    codec = CodecParams(**{name: getattr(info, name) for name in names})
    if turn:
        codec.domain = Domain.UNROTATED
    means = [numpy.stack([profile.carriers(layer, part) for layer in layers]) for part in 'kv']
    return Profile.coded(context, params, k, v, *means, codec)


def _select_params(longcache: Any) -> SelectParams | None:
    if longcache is None or longcache is False:
        return None
    if longcache is True:
        return SelectParams()
    if isinstance(longcache, dict):
        return SelectParams(**longcache)
    if not isinstance(longcache, SelectParams):
        raise TypeError('longcache: expected True, a dict or fkv.SelectParams, not '
                        f'{type(longcache).__name__}')
    return longcache


def _context_for(device, threads: int | None) -> Context:
    if device.type == 'cpu':
        return Context(threads=threads or torch.get_num_threads())
    if device.type == 'cuda':
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = torch.cuda.current_stream(device).cuda_stream
        return Context(backend=Backend.CUDA, device_id=index, stream=stream)
    raise TypeError(f'the model is on {device}; libfkv works on the CPU and on CUDA devices')

