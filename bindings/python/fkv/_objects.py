# SPDX-License-Identifier: Apache-2.0
"""What all handles have in common, and the context."""
from __future__ import annotations

import os
import pathlib
from typing import Any

from . import errors
from ._convert import View, ffi, from_c, lib, new_result, to_c
from ._types import ContextInfo, ContextParams


class Handle:
    """An object of the library. Closed by close(), by a with block, or when it is garbage.

    Objects may be closed in any order; using a closed one raises HandleError.
    """

    _pointer = ffi.NULL
    _context: 'Context | None' = None
    _destroy: Any = None

    def __init__(self, pointer, context: 'Context | None'):
        self._pointer = pointer
        self._context = context

    @property
    def closed(self) -> bool:
        """Whether the object was closed."""
        return self._pointer == ffi.NULL

    def close(self) -> None:
        """Ends the object. Closing twice is allowed. Raises BusyError while a call on it runs."""
        pointer = self._pointer
        if pointer == ffi.NULL:
            return
        status = type(self)._destroy(pointer)
        if status == lib.FKV_ERR_BUSY:
            raise errors.BusyError('a call on this object is running in another thread')
        self._pointer = ffi.NULL
        if status:
            raise errors.failure(status, '')

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __del__(self):
        try:
            self.close()
        except Exception:  # nobody is there to be told
            pass

    def __repr__(self) -> str:
        return f'<fkv.{type(self).__name__}{" (closed)" if self.closed else ""}>'

    def _failure(self, status: int) -> errors.Error:
        if status == lib.FKV_ERR_HANDLE and self.closed:
            return errors.HandleError(f'the {type(self).__name__.lower()} is closed')
        context = self._context
        text = '' if context is None or context.closed else errors.message_of(context._pointer)
        return errors.failure(status, text)

    def _check(self, status: int) -> None:
        if status:
            raise self._failure(status)


#: The CUDA module, if the package was built with one.
CUDA_MODULE = pathlib.Path(__file__).with_name('libfkv-cuda.so.0')


def own_module(struct) -> Any:
    """The package's CUDA module, if nothing says which one to load; else what the struct has."""
    if (struct.backend == lib.FKV_BACKEND_CUDA and struct.module_path == ffi.NULL
            and not os.environ.get('FKV_CUDA_MODULE') and CUDA_MODULE.exists()):
        return ffi.new('char[]', os.fsencode(CUDA_MODULE))
    return struct.module_path


class Context(Handle):
    """Where things run: threads, memory, limits. Keywords are the fields of ContextParams.

    May be shared by any number of threads.

        with fkv.Context(threads=2) as context:
            ...
    """

    _destroy = lib.fkv_context_destroy

    def __init__(self, **params):
        struct, keep = to_c(ContextParams, ContextParams(**params))
        struct.module_path = module = own_module(struct)  # noqa: F841 -- lives through the call
        message = ffi.new('char[]', 512)
        struct.message = message
        struct.message_bytes = len(message)
        out = ffi.new('fkv_context **')
        status = lib.fkv_context_create(struct, out)
        if status:
            raise errors.failure(status, ffi.string(message).decode(errors='replace'))
        # Without itself as context: in a cycle, closing would be left to the collector of cycles.
        super().__init__(out[0], None)
        # Callbacks of cffi live as long as somebody has them.
        self._allocator = params.get('alloc'), params.get('free'), params.get('alloc_user')

    @property
    def info(self) -> ContextInfo:
        """What the context is, and the bytes it holds now."""
        struct = new_result(ContextInfo)
        self._check(lib.fkv_context_query(self._pointer, struct))
        return from_c(ContextInfo, struct)

    @property
    def message(self) -> str:
        """The text of the last error of this context, in any thread."""
        return errors.message_of(self._pointer)

    def set_stream(self, stream: Any) -> None:
        """CUDA: the stream (its address, as torch's `stream.cuda_stream` tells it) of later calls."""
        pointer = ffi.cast('void *', stream) if isinstance(stream, int) else stream
        self._check(lib.fkv_context_set_stream(self._pointer, pointer))

    def synchronize(self) -> None:
        """Waits for what was asked of the device so far; at once on the CPU."""
        self._check(lib.fkv_context_synchronize(self._pointer))

    def merge(self, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> None:
        """Merges attention over disjoint sets of tokens into out_a and lse_a, in place.

        out_a, out_b: [tokens, Hq, D]; lse_a, lse_b: [tokens, Hq], float32, natural logarithms. See
        fkv_merge() in fkv.h.
        """
        views = [View(out_a, True), View(lse_a, True), View(out_b), View(lse_b)]
        self._check(lib.fkv_merge(self._pointer, *map(tensor_pointer, views)))

    def _failure(self, status: int) -> errors.Error:
        if self.closed:
            return errors.HandleError('the context is closed')
        return errors.failure(status, errors.message_of(self._pointer))


def expect(kind: type, value: Any) -> Any:
    """`value`, which must be an object of that class."""
    if not isinstance(value, kind):
        raise TypeError(f'expected {kind.__name__}, not {type(value).__name__}')
    return value


def tensor_pointer(view: View | None, _type=ffi.typeof('fkv_tensor *'), _cast=ffi.cast):
    """The fkv_tensor of a view, for a call; it lives as long as the view."""
    return ffi.NULL if view is None else _cast(_type, view.address)
