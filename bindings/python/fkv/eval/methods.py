# SPDX-License-Identifier: Apache-2.0
"""What is compared: names as they are given, and how each makes its cache of a context."""
from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Callable

from .._types import CodecParams, FourierParams, Restoration
from ..errors import Error
from ..profile import Calibrator, Profile
from . import baselines
from .capture import Context, Reader
from .count import Account
from .names import Name


@dataclasses.dataclass
class Settings:
    """What all methods share."""

    sinks: int = 4
    local: int = 128
    calibration: Callable[[int], list] | None = None  #: contexts of so many tokens, for the Fourier methods
    folder: pathlib.Path | None = None  #: where profiles that were made are kept
    room: int = 512  #: tokens that follow a context at most


class Method:
    """One of those that are compared."""

    def __init__(self, name: Name, reader: Reader, settings: Settings):
        self.name, self.reader, self.settings = name, reader, settings

    def prepare(self, length: int) -> None:
        """Whatever takes time once, for contexts of about so many tokens."""

    def hold(self, context: Context) -> tuple[Any, int]:
        """(cache, bytes) of a context, coded."""
        store = self.store(context)
        return self.reader.cache(context, store), store.bytes()

    def store(self, context: Context) -> Any:
        raise NotImplementedError


class Full(Method):
    """Everything, as the model has it; counted as f16."""

    def store(self, context: Context) -> Any:
        store = self.reader.dense()
        for layer, (keys, values) in enumerate(zip(context.keys, context.values)):
            store.put(layer, store.rope.turn(keys, 0), values)
            store.account.exact += keys.numel() + values.numel()
        store.columns = context.tokens
        return store


class Streaming(Method):
    def store(self, context: Context) -> Any:
        s = self.settings
        kept = s.sinks + s.local if self.name.value is None else int(self.name.value * context.tokens)
        return baselines.streamingllm(self.reader, context, kept, s.sinks)


class Snap(Method):
    def store(self, context: Context) -> Any:
        return baselines.snapkv(self.reader, context, self.name.value)


class Kivi(Method):
    def store(self, context: Context) -> Any:
        return baselines.kivi(self.reader, context, self.name.value, 64, self.settings.sinks, self.settings.local)


class Held(Method):
    """Held by libfkv, which decodes from what it holds."""

    def __init__(self, name: Name, reader: Reader, settings: Settings):
        super().__init__(name, reader, settings)
        self.made: Any = None

    def profile(self) -> Any:
        return self.name.file

    def hold(self, context: Context) -> tuple[Any, int]:
        if self.made is None:
            try:
                self.made = self.reader.settings.other(self.profile(), None)
            except Error as error:
                raise ValueError(f'{self.name}: {error}') from error
        store = self.made.store()
        store.begin(1, context.tokens, None, None)
        for layer, (keys, values) in enumerate(zip(context.keys, context.values)):
            store.append(layer, keys[None], values[None])
        cache = self.reader.cache(context, store)
        return cache, Account(allocated=cache.stats().bytes).bytes()


class Uniform(Held):
    def profile(self) -> Profile:
        s = self.settings
        codec = CodecParams(group=64, n_sink=s.sinks, n_local=s.local)
        return Profile.uniform(self.reader.settings.context, self.reader.params, self.name.value, codec)


class Fourier(Held):
    """Channels chosen by calibration on texts that are asked about nowhere, at the length of the contexts."""

    published = False

    def __init__(self, name: Name, reader: Reader, settings: Settings):
        super().__init__(name, reader, settings)
        self.profiles: dict[int, Profile] = {}
        self.length = 0

    def prepare(self, length: int) -> None:
        if length != self.length:
            self.made, self.length = None, length

    def profile(self) -> Profile:
        if self.length not in self.profiles:
            self.profiles[self.length] = self._load() or self._calibrate()
        return self.profiles[self.length]

    def _file(self) -> pathlib.Path | None:
        folder = self.settings.folder
        return folder and folder / f'{str(self.name).replace(":", "-")}-{self.length}.json'

    def _load(self) -> Profile | None:
        file = self._file()
        return Profile.load(self.reader.settings.context, file) if file and file.exists() else None

    def _calibrate(self) -> Profile:
        s, reader = self.settings, self.reader
        params = FourierParams(
            bins=self.name.value, n_sink=s.sinks, n_local=s.local, period=period_for(self.length + s.room),
            restoration=Restoration.AUTHORS if self.published else Restoration.LEAST_SQUARES)
        calibrator = Calibrator(reader.settings.context, reader.params, fourier=params,
                                criterion='published' if self.published else 'residual')

        def watch(layer, q, k, v):
            arrays = [x.transpose(0, 1).contiguous().cpu() for x in (k, v, q)]
            calibrator.observe(layer, *(arrays[:2] if self.published else arrays))

        for ids in s.calibration(self.length):
            reader.read(ids, watch)
        profile = calibrator.solve()
        if self._file():
            profile.save(self._file())
        return profile


class FourierPublished(Fourier):
    published = True


def period_for(tokens: int) -> int:
    """The next number with no other factors than 2, 3 and 5: fast, and hardly longer than needed."""
    def smooth(n: int) -> bool:
        for factor in (2, 3, 5):
            while n % factor == 0:
                n //= factor
        return n == 1
    period = max(64, tokens)
    while not smooth(period):
        period += 1
    return period


_CLASSES = {'full': Full, 'fkv': Held, 'int': Uniform, 'fourier': Fourier, 'fourier-published': FourierPublished,
            'streamingllm': Streaming, 'snapkv': Snap, 'kivi': Kivi}


def make(names: list[Name], reader: Reader, settings: Settings) -> list[Method]:
    """The methods; whatever can be refused is refused here, before the first context is read."""
    made = [_CLASSES[name.kind](name, reader, settings) for name in names]
    if any(isinstance(method, (Streaming, Snap)) for method in made):
        baselines.presses()
    for method in made:
        if type(method) is Held:
            reader.settings.other(method.name.file, None)
    return made
