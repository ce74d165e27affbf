# SPDX-License-Identifier: Apache-2.0
"""Exceptions: one for each status of the library, all of them fkv.Error."""
from __future__ import annotations

from ._native import ffi, lib
from ._types import Status


class Error(Exception):
    """A call failed. Nothing has changed, except after DeviceError."""

    #: What the library returned.
    status: int = Status.INVALID

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        if status is not None:
            self.status = as_status(status)


class InvalidError(Error, ValueError):
    """An argument is wrong in itself."""
    status = Status.INVALID


class HandleError(Error):
    """The object was closed, or the sequence freed."""
    status = Status.HANDLE


class StateError(Error):
    """A right call at a wrong time."""
    status = Status.STATE


class NoMemoryError(Error, MemoryError):
    """The allocator has no memory."""
    status = Status.NOMEM


class LimitError(Error):
    """A limit of the context, the cache or the sequence would be passed."""
    status = Status.LIMIT


class NonFiniteError(Error, ValueError):
    """NaN or infinity in an input, or a value that the storage type cannot hold."""
    status = Status.NONFINITE


class FileError(Error, OSError):
    """A file cannot be read or written."""
    status = Status.IO


class FormatError(Error, ValueError):
    """Malformed JSON, or contents that contradict themselves."""
    status = Status.FORMAT


class ChecksumError(Error, ValueError):
    """Stored contents fail their checksum."""
    status = Status.CHECKSUM


class VersionError(Error):
    """A file or module of a version that the library does not know."""
    status = Status.VERSION


class MismatchError(Error, ValueError):
    """Well-formed, but of another model or geometry."""
    status = Status.MISMATCH


class UnsupportedError(Error, NotImplementedError):
    """Known, but not possible here."""
    status = Status.UNSUPPORTED


class DeviceError(Error):
    """The device failed; objects on it stay unusable."""
    status = Status.DEVICE


class BusyError(Error):
    """Another thread is using the object."""
    status = Status.BUSY


class BufferTooSmallError(Error):
    """A buffer is too small."""
    status = Status.BUFFER


BY_STATUS: dict[int, type[Error]] = {int(kind.status): kind for kind in (
    InvalidError, HandleError, StateError, NoMemoryError, LimitError, NonFiniteError, FileError,
    FormatError, ChecksumError, VersionError, MismatchError, UnsupportedError, DeviceError,
    BusyError, BufferTooSmallError)}


def as_status(status: int) -> int:
    """The Status of a number, or the number if this package does not know it."""
    try:
        return Status(status)
    except ValueError:
        return status


def status_string(status: int) -> str:
    """The library's name of a status, for any value."""
    return ffi.string(lib.fkv_status_string(status)).decode()


def message_of(context) -> str:
    """The text of the last error of a context (a cdata handle); empty if it has none."""
    needed = ffi.new('size_t *')
    buffer = ffi.new('char[]', 1024)
    if lib.fkv_context_message(context, buffer, len(buffer), needed):
        return ''
    return ffi.string(buffer).decode(errors='replace')


def failure(status: int, message: str) -> Error:
    """The exception of a status."""
    kind = BY_STATUS.get(status, Error)
    return kind(message or status_string(status), status)
