# SPDX-License-Identifier: Apache-2.0
"""libfkv: the KV cache of language models in less memory, and attention on what is held.

    import fkv

    context = fkv.Context(threads=2)
    model = fkv.ModelParams(n_layers=1, n_q_heads=8, n_kv_heads=2, head_dim=64)
    profile = fkv.Profile.exact(context, model)
    cache = fkv.Cache(context, profile)
    sequence, plan = cache.sequence(), cache.plan()
    plan.update([sequence], 1)
    out = plan.append_attend(0, q, k, v)

Arrays are anything that has the buffer protocol or speaks DLPack: numpy, torch and others, without
a copy. Errors are exceptions, all of them fkv.Error. docs/python.md is the guide, fkv.h the manual.
"""
from ._convert import tensor
from ._native import ffi as _ffi
from ._native import lib as _lib
from ._objects import Context
from ._types import (AllocationInfo, AllocationParams, Backend, CacheParams, CalibratorParams,
                     Channel, CodecParams, Coding, ContextInfo, ContextParams, CpuLevel,
                     Criterion, Device, Domain, DType, Fidelity, FourierParams, ModelParams, Outgrow,
                     Part, ProfileInfo, Restoration, RopeLayout, Selection, SelectParams,
                     SequenceParams, Statistic, Stats, Status, Target)
from .cache import Cache, Plan, Sequence
from .calibration import calibrate
from .errors import (BufferTooSmallError, BusyError, ChecksumError, DeviceError, Error, FileError,
                     FormatError, HandleError, InvalidError, LimitError, MismatchError,
                     NoMemoryError, NonFiniteError, StateError, UnsupportedError, VersionError,
                     status_string)
from .models import model_params
from .profile import Calibrator, Profile

__all__ = [
    'AllocationInfo', 'AllocationParams', 'Backend', 'BufferTooSmallError', 'BusyError', 'Cache',
    'CacheParams', 'Calibrator', 'CalibratorParams', 'Channel', 'ChecksumError', 'CodecParams',
    'Coding', 'Context', 'ContextInfo', 'ContextParams', 'CpuLevel', 'Criterion', 'DType',
    'Device', 'DeviceError', 'Domain', 'Error', 'Fidelity', 'FileError', 'FormatError', 'FourierParams',
    'HandleError', 'InvalidError', 'LimitError', 'MismatchError', 'ModelParams', 'NoMemoryError',
    'NonFiniteError', 'Outgrow', 'Part', 'Plan', 'Profile', 'ProfileInfo', 'Restoration',
    'RopeLayout', 'SelectParams', 'Selection', 'Sequence', 'SequenceParams', 'StateError',
    'Statistic', 'Stats', 'Status', 'Target', 'UnsupportedError', 'VersionError', 'abi_version', 'calibrate', 'model_params',
    'status_string', 'tensor', 'version',
]

#: Lets NaN and infinity pass: Context(flags=fkv.PROPAGATE_NONFINITE).
PROPAGATE_NONFINITE = _lib.FKV_CONTEXT_PROPAGATE_NONFINITE
#: An index of keys, for faster selection: Cache(context, profile, flags=fkv.KEY_INDEX).
KEY_INDEX = _lib.FKV_CACHE_KEY_INDEX


def version() -> str:
    """Version of the library that was loaded."""
    return _ffi.string(_lib.fkv_version_string()).decode()


def abi_version() -> int:
    """FKV_ABI_VERSION of the library that was loaded."""
    return _lib.fkv_abi_version()


if abi_version() != _lib.FKV_ABI_VERSION:
    raise ImportError(f'libfkv has ABI {abi_version()}; this package was built for '
                      f'{_lib.FKV_ABI_VERSION}')

__version__ = version()
