# SPDX-License-Identifier: Apache-2.0
"""Profiles, and their calibration."""
from __future__ import annotations

from typing import Any, Sequence

import numpy

from ._convert import (View, as_enum, code_bytes, ffi, from_c, lib, mask_bytes, new_result, numbers,
                       path_bytes, text_bytes, to_c)
from ._objects import Context, Handle, expect, tensor_pointer
from ._types import (AllocationInfo, AllocationParams, CalibratorParams, CodecParams, DType,
                     FourierParams, ModelParams, Part, ProfileInfo, Statistic, Stats)


class Profile(Handle):
    """A model's geometry, and how each channel of its cache is held. Immutable, for any thread.

    Made by Profile.exact(), fourier(), coded(), uniform(), published(), load(), loads(), or by a
    Calibrator.
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
    def coded(cls, context: Context, model: ModelParams, k_bits: Any, v_bits: Any,
              k_carrier: Any = None, v_carrier: Any = None,
              params: CodecParams | None = None) -> 'Profile':
        """The calibrated coding (docs/codec.md): carriers, and residuals of few bits.

        k_bits, v_bits: [n_layers, Hk, D] of integers, values of fkv.Channel but FOURIER;
        k_carrier, v_carrier: the same shape of floats, means of K before RoPE and of V; None: zeros.
        """
        struct, keep = to_c(ModelParams, model)
        codec, keep_codec = to_c(CodecParams, params or CodecParams())
        shape = (struct.n_layers, struct.n_kv_heads, struct.head_dim)
        k = code_bytes(k_bits, shape, 'k_bits')
        v = code_bytes(v_bits, shape, 'v_bits')
        carriers, pointers, count = carrier_arrays(k_carrier, v_carrier, shape)
        out = ffi.new('fkv_profile **')
        expect(Context, context)._check(lib.fkv_profile_create_coded(
            context._pointer, struct, codec, ffi.from_buffer('uint8_t[]', k),
            ffi.from_buffer('uint8_t[]', v), k.nbytes, *pointers, count, out))
        return cls(out[0], context)

    @classmethod
    def uniform(cls, context: Context, model: ModelParams, bits: int,
                params: CodecParams | None = None) -> 'Profile':
        """The same number of bits for every channel, and no carriers: to compare with."""
        struct, keep = to_c(ModelParams, model)
        codec, keep_codec = to_c(CodecParams, params or CodecParams())
        out = ffi.new('fkv_profile **')
        expect(Context, context)._check(lib.fkv_profile_create_uniform(
            context._pointer, struct, codec, bits, out))
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
    def allocated(cls, context: Context, model: ModelParams, k_losses: Any, v_losses: Any,
                  params: AllocationParams | None = None, codec: CodecParams | None = None,
                  k_carrier: Any = None, v_carrier: Any = None) -> tuple['Profile', AllocationInfo]:
        """A calibrated profile: bits go to the channels where they avoid most loss.

        k_losses, v_losses: [n_layers, Hk, D], the loss of holding a channel's carrier alone;
        k_carrier, v_carrier: of the same shape; None: zeros.
        """
        struct, keep = to_c(ModelParams, model)
        options, keep_options = to_c(AllocationParams, params or AllocationParams())
        coding, keep_coding = to_c(CodecParams, codec or CodecParams())
        shape = (struct.n_layers, struct.n_kv_heads, struct.head_dim)
        k, v = (numbers(x, shape, numpy.float64, name)
                for x, name in ((k_losses, 'k_losses'), (v_losses, 'v_losses')))
        carriers, pointers, count = carrier_arrays(k_carrier, v_carrier, shape)
        report, out = new_result(AllocationInfo), ffi.new('fkv_profile **')
        expect(Context, context)._check(lib.fkv_profile_create_allocated(
            context._pointer, struct, coding, options, ffi.from_buffer('double[]', k),
            ffi.from_buffer('double[]', v), k.size, *pointers, count, report, out))
        return cls(out[0], context), from_c(AllocationInfo, report)

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

    def carriers(self, layer: int, part: Any) -> numpy.ndarray:
        """The carriers of a layer: [Hk, D] of float32; zeros unless the profile is calibrated."""
        info = self.info
        values = numpy.zeros((info.n_kv_heads, info.head_dim), numpy.float32)
        self._check(lib.fkv_profile_carriers(self._pointer, layer, int(as_enum(Part, part)),
                                             ffi.from_buffer('float[]', values), values.size))
        return values

    def match(self, model: ModelParams) -> None:
        """Raises MismatchError, which names the field, unless the profile is of this model."""
        struct, keep = to_c(ModelParams, model)
        self._check(lib.fkv_profile_match(self._pointer, struct))

    def estimate(self, tokens: int, period: int = 0) -> Stats:
        """What one sequence of that many tokens will take, without allocating it."""
        struct = new_result(Stats)
        self._check(lib.fkv_profile_estimate(self._pointer, tokens, period, struct))
        return from_c(Stats, struct)


def carrier_arrays(k_carrier: Any, v_carrier: Any, shape: Sequence[int]) -> tuple[list, list, int]:
    """(arrays to keep, their pointers, NULL for None; floats in each)"""
    arrays = [None if given is None else numbers(given, shape, numpy.float32, name)
              for given, name in ((k_carrier, 'k_carrier'), (v_carrier, 'v_carrier'))]
    pointers = [ffi.NULL if a is None else ffi.from_buffer('float[]', a) for a in arrays]
    return arrays, pointers, max((a.size for a in arrays if a is not None), default=0)


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

    def observe_gradients(self, layer: int, k: Any, v: Any, grad_k: Any = None, grad_v: Any = None,
                          q: Any = None) -> None:
        """Adds a window of a layer to a calibrator of Criterion.SENSITIVITY.

        k, v and the gradients of the loss with respect to them: [tokens, Hk, D], before RoPE; q:
        [tokens, Hq, D]. See fkv_calibrator_observe_gradients() in fkv.h for which gradients to take.
        """
        views = [None if x is None else View(x) for x in (k, v, grad_k, grad_v, q)]
        self._check(lib.fkv_calibrator_observe_gradients(self._pointer, layer,
                                                         *map(tensor_pointer, views)))

    def weigh_values(self, layer: int, weights: Any) -> None:
        """How much the hidden state moves when a channel of V does: [Hk, D]. Without gradients."""
        array = numbers(weights, self._shape, numpy.float64, 'weights')
        self._check(lib.fkv_calibrator_weigh_values(
            self._pointer, layer, ffi.from_buffer('double[]', array), array.size))

    def statistic(self, layer: int, part: Any, statistic: Any) -> numpy.ndarray:
        """One of fkv.Statistic for each channel: [Hk, D] of float64."""
        values = numpy.zeros(self._shape)
        self._check(lib.fkv_calibrator_statistic(
            self._pointer, layer, int(as_enum(Part, part)), int(as_enum(Statistic, statistic)),
            ffi.from_buffer('double[]', values), values.size))
        return values

    def merge(self, other: 'Calibrator') -> None:
        """Adds all that `other` has seen."""
        self._check(lib.fkv_calibrator_merge(self._pointer, expect(Calibrator, other)._pointer))

    def dumps(self) -> bytes:
        """The statistics as bytes, for loads()."""
        needed = ffi.new('size_t *')
        self._check(lib.fkv_calibrator_save(self._pointer, ffi.NULL, 0, needed))
        buffer = ffi.new('char[]', needed[0])
        self._check(lib.fkv_calibrator_save(self._pointer, buffer, len(buffer), needed))
        return bytes(ffi.buffer(buffer, needed[0]))

    @classmethod
    def loads(cls, context: Context, data: bytes, model: ModelParams) -> 'Calibrator':
        """From what dumps() gave, for a model that must be the same."""
        out = ffi.new('fkv_calibrator **')
        expect(Context, context)._check(
            lib.fkv_calibrator_load(context._pointer, data, len(data), out))
        calibrator = cls.__new__(cls)
        Handle.__init__(calibrator, out[0], context)
        same = cls(context, model, criterion='sensitivity')
        same.merge(calibrator)  # which compares the models
        calibrator._layers, calibrator._shape = same._layers, same._shape
        same.close()
        return calibrator

    def allocate(self, params: AllocationParams | None = None) -> tuple[Profile, AllocationInfo]:
        """A calibrated profile that meets a target, and what is expected of it."""
        options, keep = to_c(AllocationParams, params or AllocationParams())
        report, out = new_result(AllocationInfo), ffi.new('fkv_profile **')
        self._check(lib.fkv_calibrator_allocate(self._pointer, options, report, out))
        return Profile(out[0], self._context), from_c(AllocationInfo, report)

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
