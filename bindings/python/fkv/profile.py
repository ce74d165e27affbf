# SPDX-License-Identifier: Apache-2.0
"""Profiles, and their calibration."""
from __future__ import annotations

from typing import Any, Sequence

import numpy

from ._convert import (View, as_enum, ffi, from_c, lib, mask_bytes, new_result, path_bytes,
                       text_bytes, to_c)
from ._objects import Context, Handle, expect, tensor_pointer
from ._types import (CalibratorParams, DType, FourierParams, ModelParams, Part, ProfileInfo, Stats)


class Profile(Handle):
    """A model's geometry, and how each channel of its cache is held. Immutable, for any thread.

    Made by Profile.exact(), fourier(), published(), load(), loads(), or by a Calibrator.
    """

    _destroy = lib.fkv_profile_destroy

    @classmethod
    def exact(cls, context: Context, model: ModelParams, dtype: Any = DType.F16) -> 'Profile':
        """Everything exactly, stored in `dtype`: 'f32', 'f16' or 'bf16'."""
        struct, keep = to_c(ModelParams, model)
        out = ffi.new('fkv_profile **')
        expect(Context, context)._check(lib.fkv_profile_create_exact(
            context._pointer, struct, int(as_enum(DType, dtype)), out))
        return cls(out[0], context)

    @classmethod
    def fourier(cls, context: Context, model: ModelParams, k_mask: Any, v_mask: Any,
                params: FourierParams | None = None) -> 'Profile':
        """Fourier coding of the channels that the masks name.

        k_mask, v_mask: [n_layers, Hk, D] of bool, True where a channel is compressed.
        """
        struct, keep = to_c(ModelParams, model)
        fourier, keep_fourier = to_c(FourierParams, params or FourierParams())
        shape = (struct.n_layers, struct.n_kv_heads, struct.head_dim)
        k = mask_bytes(k_mask, shape, 'k_mask')
        v = mask_bytes(v_mask, shape, 'v_mask')
        out = ffi.new('fkv_profile **')
        expect(Context, context)._check(lib.fkv_profile_create_fourier(
            context._pointer, struct, fourier, ffi.from_buffer('uint8_t[]', k),
            ffi.from_buffer('uint8_t[]', v), k.nbytes, out))
        return cls(out[0], context)

    @classmethod
    def published(cls, context: Context, model: ModelParams, text: str | bytes,
                  params: FourierParams | None = None, fraction: float = 1.0) -> 'Profile':
        """From channel lists as published with FourierAttention (JSON, either layout).

        fraction: take only that leading share of each plain list.
        """
        struct, keep = to_c(ModelParams, model)
        fourier, keep_fourier = to_c(FourierParams, params or FourierParams())
        data = text_bytes(text)
        out = ffi.new('fkv_profile **')
        expect(Context, context)._check(lib.fkv_profile_import_published(
            context._pointer, struct, fourier, data, len(data), fraction, out))
        return cls(out[0], context)

    @classmethod
    def loads(cls, context: Context, text: str | bytes) -> 'Profile':
        """From JSON text (docs/formats.md)."""
        data = text_bytes(text)
        out = ffi.new('fkv_profile **')
        expect(Context, context)._check(
            lib.fkv_profile_load(context._pointer, data, len(data), out))
        return cls(out[0], context)

    @classmethod
    def load(cls, context: Context, path: Any) -> 'Profile':
        """From a JSON file."""
        out = ffi.new('fkv_profile **')
        expect(Context, context)._check(
            lib.fkv_profile_load_file(context._pointer, path_bytes(path), out))
        return cls(out[0], context)

    def dumps(self) -> str:
        """The JSON text. Equal profiles give equal text."""
        needed = ffi.new('size_t *')
        status = lib.fkv_profile_save(self._pointer, ffi.NULL, 0, needed)
        if status not in (lib.FKV_OK, lib.FKV_ERR_BUFFER):
            raise self._failure(status)
        buffer = ffi.new('char[]', needed[0])
        self._check(lib.fkv_profile_save(self._pointer, buffer, len(buffer), needed))
        return ffi.unpack(buffer, needed[0]).decode()

    def save(self, path: Any) -> None:
        """Writes the JSON to a file, which is replaced whole or not at all."""
        self._check(lib.fkv_profile_save_file(self._pointer, path_bytes(path)))

    @property
    def info(self) -> ProfileInfo:
        """What the profile says."""
        struct = new_result(ProfileInfo)
        self._check(lib.fkv_profile_query(self._pointer, struct))
        return from_c(ProfileInfo, struct)

    def channels(self, layer: int, part: Any) -> numpy.ndarray:
        """How each channel of a layer is held: [Hk, D] of uint8, values of fkv.Channel.

        part: 'k' or 'v'.
        """
        info = self.info
        codes = numpy.zeros((info.n_kv_heads, info.head_dim), numpy.uint8)
        self._check(lib.fkv_profile_channels(self._pointer, layer, int(as_enum(Part, part)),
                                             ffi.from_buffer('uint8_t[]', codes), codes.nbytes))
        return codes

    def estimate(self, tokens: int, period: int = 0) -> Stats:
        """What one sequence of that many tokens will take, without allocating it."""
        struct = new_result(Stats)
        self._check(lib.fkv_profile_estimate(self._pointer, tokens, period, struct))
        return from_c(Stats, struct)


class Calibrator(Handle):
    """Gathers statistics of a model's keys and values, and makes a profile from them.

    One thread at a time. Keywords are the fields of CalibratorParams.
    """

    _destroy = lib.fkv_calibrator_destroy

    def __init__(self, context: Context, model: ModelParams, **params):
        struct, keep = to_c(ModelParams, model)
        options, keep_options = to_c(CalibratorParams, CalibratorParams(**params))
        out = ffi.new('fkv_calibrator **')
        expect(Context, context)._check(
            lib.fkv_calibrator_create(context._pointer, struct, options, out))
        super().__init__(out[0], context)
        self._layers = struct.n_layers
        self._shape = (struct.n_kv_heads, struct.head_dim)

    def observe(self, layer: int, k: Any, v: Any, q: Any = None) -> None:
        """Adds one prompt's keys and values of a layer, before RoPE.

        k, v: [tokens, Hk, D]; q: [tokens, Hq, D] or None.
        """
        views = [View(k), View(v), None if q is None else View(q)]
        self._check(lib.fkv_calibrator_observe(self._pointer, layer,
                                               *map(tensor_pointer, views)))

    def errors(self, layer: int, part: Any) -> numpy.ndarray:
        """The mean error of each channel under the criterion: [Hk, D] of float64."""
        values = numpy.zeros(self._shape)
        self._check(lib.fkv_calibrator_errors(
            self._pointer, layer, int(as_enum(Part, part)), ffi.from_buffer('double[]', values),
            values.size))
        return values

    def solve(self, k_fraction: Sequence[float] | float | None = None,
              v_fraction: Sequence[float] | float | None = None) -> Profile:
        """A profile that compresses the given share of each layer's channels, those of least error.

        Shares in [0, 1]: one number, or one for each layer. Without any: the published ones.
        """
        def shares(value):
            if value is None:
                return ffi.NULL
            return ffi.new('double[]', [float(x) for x in numpy.broadcast_to(value, self._layers)])

        k, v = shares(k_fraction), shares(v_fraction)
        count = 0 if k == ffi.NULL and v == ffi.NULL else self._layers
        out = ffi.new('fkv_profile **')
        self._check(lib.fkv_calibrator_solve(self._pointer, k, v, count, out))
        return Profile(out[0], self._context)
