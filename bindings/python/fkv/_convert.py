# SPDX-License-Identifier: Apache-2.0
"""Between Python's values and the structs of the header."""
from __future__ import annotations

import enum
import operator
import os
from typing import Any, Sequence

import numpy

from ._native import ffi, lib
from ._types import DType
from ._view import View
from .errors import failure

TENSOR = ffi.typeof('fkv_tensor *')
NUMPY_DTYPES: dict[int, Any] = {DType.F32: numpy.float32, DType.F16: numpy.float16}


def as_enum(kind: type[enum.IntEnum], value: Any) -> enum.IntEnum:
    """A member of `kind` from itself, its number, or its name in any case with - or _."""
    if isinstance(value, str):
        name = value.upper().replace('-', '_')
        if name in kind.__members__:
            return kind[name]
    else:
        try:
            return kind(value)
        except ValueError:
            pass
    known = ', '.join(repr(member.name.lower()) for member in kind)
    raise ValueError(f'{value!r} is no {kind.__name__}: {known}')


def _set_field(struct, name: str, kind: Any, value: Any, keep: list) -> None:
    if isinstance(kind, type) and issubclass(kind, enum.IntEnum):
        setattr(struct, name, int(as_enum(kind, value)))
    elif isinstance(kind, type):
        inner = to_c(kind, value)
        keep.append(inner)
        setattr(struct, name, inner[0])
    elif kind == 'text':
        if not isinstance(value, str):
            raise TypeError(f'expected str, not {type(value).__name__}')
        keep.append(ffi.new('char[]', _without_zero(value.encode())))
        setattr(struct, name, keep[-1])
    elif kind == 'address':
        target = ffi.typeof(struct[0]).fields
        pointer = dict(target)[name].type
        setattr(struct, name, ffi.cast(pointer, value) if isinstance(value, int) else value)
    elif kind.startswith('array:'):
        _, element, count = kind.split(':')
        keep.append(ffi.new(element + '[]', [float(x) for x in value]))
        setattr(struct, name, keep[-1])
        setattr(struct, count, len(keep[-1]))
    else:
        setattr(struct, name, value)


def to_c(kind: Any, params: Any) -> tuple[Any, list]:
    """(pointer to the C struct, what must live as long); (NULL, []) for None.

    `params` is an instance of the dataclass `kind`, or a mapping with its fields.
    """
    if params is None:
        return ffi.NULL, []
    if isinstance(params, dict):
        params = kind(**params)
    if not isinstance(params, kind):
        raise TypeError(f'expected {kind.__name__} or a dict, not {type(params).__name__}')
    struct = ffi.new(kind._c + ' *')
    status = getattr(lib, kind._c + '_init')(struct, ffi.sizeof(kind._c))
    if status:
        raise failure(status, '')
    keep: list = []
    for name, field_kind in kind._kinds.items():
        value = getattr(params, name)
        if value is None:
            continue
        try:
            _set_field(struct, name, field_kind, value, keep)
        except (TypeError, ValueError, OverflowError) as error:
            # Some kinds of ValueError take more than a text.
            what = ValueError if isinstance(error, ValueError) else type(error)
            raise what(f'{kind.__name__}.{name}: {error}') from None
    return struct, keep


def new_result(kind: Any):
    """An empty C struct that the library will fill, with its size set."""
    struct = ffi.new(kind._c + ' *')
    struct.struct_size = ffi.sizeof(kind._c)
    return struct


def from_c(kind: Any, struct) -> Any:
    """The dataclass `kind` from what the library filled."""
    values = {}
    for name, field_kind in kind._kinds.items():
        value = getattr(struct, name)
        values[name] = field_kind(value) if isinstance(field_kind, type) else value
    return kind(**values)


def _without_zero(data: bytes) -> bytes:
    if b'\0' in data:
        raise ValueError('embedded null character')  # C would end the text there
    return data


def path_bytes(path: Any) -> bytes:
    """A path as the bytes of the file system."""
    return _without_zero(os.fsencode(os.fspath(path)))


def text_bytes(text: Any) -> bytes:
    """UTF-8 text, given as str or as bytes."""
    if isinstance(text, str):
        return text.encode()
    if isinstance(text, (bytes, bytearray, memoryview)):
        return bytes(text)
    raise TypeError(f'expected str or bytes, not {type(text).__name__}')


def shaped(values: Any, shape: Sequence[int], name: str) -> numpy.ndarray:
    """`values` as an array, which must have exactly that shape."""
    array = numpy.asarray(values)
    if array.shape != tuple(shape):
        raise ValueError(f'{name} has shape {array.shape}, expected {tuple(shape)}')
    return array


def mask_bytes(mask: Any, shape: Sequence[int], name: str) -> numpy.ndarray:
    """`mask`, of exactly that shape and of nothing but 0 and 1, as contiguous bytes."""
    mask = shaped(mask, shape, name)
    ones = mask == 1
    if not numpy.all(ones | (mask == 0)):
        raise ValueError(f'{name} has values other than 0 and 1')
    return numpy.ascontiguousarray(ones, dtype=numpy.uint8)


def code_bytes(codes: Any, shape: Sequence[int], name: str) -> numpy.ndarray:
    """`codes`, whole numbers of exactly that shape that fit a byte, as contiguous bytes."""
    codes = shaped(codes, shape, name)
    if codes.dtype.kind not in 'iu' or (codes.size and (codes.min() < 0 or codes.max() > 255)):
        raise ValueError(f'{name} must be whole numbers of 0..255')
    return numpy.ascontiguousarray(codes, dtype=numpy.uint8)


def numbers(values: Any, shape: Sequence[int], dtype: Any, name: str) -> numpy.ndarray:
    """`values`, numbers of exactly that shape, as a contiguous array of that type."""
    array = shaped(values, shape, name)
    if array.dtype.kind not in 'fiu':
        raise ValueError(f'{name} must be numbers')
    return numpy.ascontiguousarray(array, dtype=dtype)


def int64_list(values: Any, name: str) -> numpy.ndarray:
    """A contiguous array of whole numbers; others are not rounded but refused."""
    array = numpy.asarray(values)
    if array.ndim != 1:
        raise ValueError(f'{name} has {array.ndim} dimensions, expected 1')
    if array.size and array.dtype.kind not in 'iu':  # no integers, or some too large for numpy
        return numpy.array([operator.index(value) for value in values], numpy.int64)
    if array.dtype.kind == 'u' and array.size and array.max() > numpy.iinfo(numpy.int64).max:
        raise OverflowError(f'{name}: an entry is too large')
    return numpy.ascontiguousarray(array, numpy.int64)


def tensor(array: Any, dtype: Any = None, writable: bool = False, stream: Any = None) -> View:
    """A view of an array, made once and used in many calls.

    Every call takes arrays as they are; this saves their conversion where the same array is used
    again and again, and says what cannot be seen from it:

    dtype     'bf16' or 'f16' for an array of 16-bit integers that are the bits of such numbers
    writable  the view may be an output
    stream    for arrays on a CUDA device, the stream (as DLPack numbers them) on which the library
              will use it; its producer makes it safe there

    Nothing is copied; the array lives as long as the view.
    """
    code = DType.NONE if dtype is None else as_enum(DType, dtype)
    return View(array, writable, int(code), stream)


def empty_for(query: Any, view: View, shape: Sequence[int], lse: bool = False) -> Any:
    """A new array beside `query`, whose view is `view`: of torch for its tensors, else of numpy."""
    if type(query).__module__.split('.')[0] == 'torch':
        import torch
        return query.new_empty(shape, dtype=torch.float32 if lse else query.dtype)
    if lse:
        return numpy.empty(shape, numpy.float32)
    if view.dtype not in NUMPY_DTYPES:
        raise TypeError('numpy has no bfloat16: give out=')
    return numpy.empty(shape, NUMPY_DTYPES[view.dtype])
