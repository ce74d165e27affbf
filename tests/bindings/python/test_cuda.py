# SPDX-License-Identifier: Apache-2.0
"""What Python says of the CUDA backend where there is no device; tests/cuda has the rest."""
import fkv
import pytest
from fkv._objects import CUDA_MODULE


def test_stream_is_for_devices(context):
    with pytest.raises(fkv.UnsupportedError):
        context.set_stream(1)
    with pytest.raises(fkv.UnsupportedError):
        context.set_stream(fkv._ffi.cast('void *', 1))


def test_the_cpu_has_nothing_to_wait_for(context):
    context.synchronize()


def test_replaying_is_for_devices(cache):
    with pytest.raises(fkv.UnsupportedError):
        cache.plan().replayed()


def test_the_package_has_its_own_module_or_says_that_there_is_none(monkeypatch):
    monkeypatch.delenv('FKV_CUDA_MODULE', raising=False)
    try:
        with fkv.Context(backend='cuda') as context:
            assert context.info.backend == fkv.Backend.CUDA
    except fkv.DeviceError as error:  # loaded, and there is no device
        assert CUDA_MODULE.exists() and 'CUDA device 0' in str(error)
    except fkv.UnsupportedError as error:
        assert not CUDA_MODULE.exists() and 'CUDA' in str(error)


def test_module_that_is_not_there_is_named(tmp_path):
    with pytest.raises(fkv.Error, match='nothing.so'):
        fkv.Context(backend='cuda', module_path=str(tmp_path / 'nothing.so'))
