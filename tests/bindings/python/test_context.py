# SPDX-License-Identifier: Apache-2.0
"""Contexts: parameters, facts, messages, memory."""
import ctypes
import gc
import re

import fkv
import numpy
import pytest

import oracle

ALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Counting:
    """An allocator for a context: aligned blocks cut from bytearrays."""

    def __init__(self):
        self.blocks, self.asked, self.live, self.broken = {}, 0, 0, False
        self.alloc, self.free = ALLOC(self._alloc), FREE(self._free)

    def _alloc(self, user, size, alignment):
        if self.broken:
            return None
        block = ctypes.create_string_buffer(size + alignment)
        address = -(-ctypes.addressof(block) // alignment) * alignment
        self.blocks[address] = block, size
        self.asked += 1
        self.live += size
        return address

    def _free(self, user, pointer, size):
        assert self.blocks.pop(pointer)[1] == size
        self.live -= size

    def fields(self):
        return {'alloc': ctypes.cast(self.alloc, ctypes.c_void_p).value,
                'free': ctypes.cast(self.free, ctypes.c_void_p).value}


def test_version():
    assert re.fullmatch(r'\d+\.\d+\.\d+', fkv.version())
    assert fkv.__version__ == fkv.version()


def test_version_is_of_the_header():
    from fkv import capi
    assert fkv.version() == (f'{capi.FKV_VERSION_MAJOR}.{capi.FKV_VERSION_MINOR}.'
                             f'{capi.FKV_VERSION_PATCH}')
    assert fkv.abi_version() == capi.FKV_ABI_VERSION


def test_everything_promised_is_there():
    assert [name for name in fkv.__all__ if not hasattr(fkv, name)] == []
    assert sorted(fkv.__all__, key=str.lower) == sorted(set(fkv.__all__), key=str.lower)


@pytest.mark.parametrize('threads', [1, 2, 5])
def test_threads(threads):
    with fkv.Context(threads=threads) as context:
        assert context.info.threads == threads


def test_info(context):
    info = context.info
    assert info.backend is fkv.Backend.CPU
    assert info.cpu_level is info.best_cpu_level is not fkv.CpuLevel.BEST
    assert info.peak_bytes >= info.live_bytes > 0
    assert info.has_cuda in (0, 1)
    with pytest.raises(AttributeError):
        info.threads = 3


def test_defaults_use_every_processor():
    with fkv.Context() as context:
        assert context.info.threads >= 1


@pytest.mark.parametrize('given', ['reference', 'REFERENCE', 1, fkv.CpuLevel.REFERENCE])
def test_cpu_level(given):
    with fkv.Context(cpu_level=given) as context:
        assert context.info.cpu_level is fkv.CpuLevel.REFERENCE


@pytest.mark.parametrize('params, kind, text', [
    ({'threads': -1}, fkv.InvalidError, 'threads is -1'),
    ({'flags': 1 << 40}, fkv.UnsupportedError, 'flags'),
    ({'max_bytes': 100}, fkv.LimitError, 'max_bytes'),
])
def test_creation_says_why_it_failed(params, kind, text):
    with pytest.raises(kind, match=text):
        fkv.Context(**params)


def test_cuda_without_it(context):
    if context.info.has_cuda:
        pytest.skip('this library has CUDA')
    with pytest.raises(fkv.UnsupportedError, match='CUDA'):
        fkv.Context(backend='cuda')


@pytest.mark.parametrize('params, kind', [
    ({'threads': 2**31}, OverflowError), ({'threads': 2**63}, OverflowError),
    ({'threads': -2**31 - 1}, OverflowError), ({'max_bytes': -1}, OverflowError),
    ({'max_bytes': 2**64}, OverflowError), ({'threads': 1.5}, TypeError),
    ({'threads': '2'}, TypeError), ({'max_tokens': object()}, TypeError),
    ({'cpu_level': 'mmx'}, ValueError), ({'cpu_level': 99}, ValueError),
    ({'cpu_level': object()}, ValueError), ({'backend': 'tpu'}, ValueError),
])
def test_wrong_values_name_the_field(params, kind):
    with pytest.raises(kind, match='ContextParams.' + next(iter(params))):
        fkv.Context(**params)


@pytest.mark.parametrize('unknown', ['thread', 'message', 'struct_size'])
def test_unknown_keyword(unknown):
    with pytest.raises(TypeError, match=unknown):
        fkv.Context(**{unknown: 1})


def test_message_is_of_the_last_error(context):
    assert context.message == ''
    with pytest.raises(fkv.FormatError) as caught:
        fkv.Profile.loads(context, '{}')
    assert str(caught.value) == context.message == 'format: missing'


def test_max_bytes(model):
    with fkv.Context(threads=1) as probe:
        needed = probe.info.peak_bytes
    with fkv.Context(threads=1, max_bytes=needed + 30000) as context:
        profile = fkv.Profile.exact(context, model)
        made = []
        with pytest.raises(fkv.LimitError, match='max_bytes'):
            for _ in range(1000):
                made.append(fkv.Cache(context, profile).sequence())
        assert context.info.live_bytes <= needed + 30000


def test_max_tokens(model, random):
    with fkv.Context(threads=1, max_tokens=5) as context:
        cache = fkv.Cache(context, fkv.Profile.exact(context, model))
        plan = cache.plan()
        plan.update([cache.sequence()], 5)
        with pytest.raises(fkv.LimitError):
            plan.update([cache.sequence()], 6)


def test_max_file_bytes(exact):
    text = exact.dumps()
    with fkv.Context(threads=1, max_file_bytes=len(text) - 1) as context:
        with pytest.raises(fkv.LimitError):
            fkv.Profile.loads(context, text)
    with fkv.Context(threads=1, max_file_bytes=len(text)) as context:
        assert fkv.Profile.loads(context, text).dumps() == text


def test_live_bytes_come_back(leak_free, model, random):
    before = leak_free.info.live_bytes
    with fkv.Profile.exact(leak_free, model) as profile, fkv.Cache(leak_free, profile) as cache:
        with cache.sequence() as sequence:
            oracle.fill(cache, sequence, random, 200)
            held = leak_free.info.live_bytes - before
            assert held >= cache.stats().bytes >= sequence.stats().bytes > 200 * 4 * 32 * 2
    assert leak_free.info.live_bytes == before
    assert leak_free.info.peak_bytes >= before + held


def test_own_allocator(model, random):
    memory = Counting()
    with fkv.Context(threads=1, **memory.fields()) as context:
        cache = fkv.Cache(context, fkv.Profile.exact(context, model))
        sequence = cache.sequence()
        oracle.fill(cache, sequence, random, 100)
        assert memory.asked > 0 and memory.live == context.info.live_bytes
        memory.broken = True
        with pytest.raises(fkv.NoMemoryError):
            for _ in range(100):
                fkv.Cache(context, cache.profile)
        memory.broken = False
        assert len(sequence) == 100
        del sequence, cache
        gc.collect()
    assert memory.live == 0


def test_own_allocator_lives_as_long_as_the_context(model):
    """Callbacks of cffi that nobody else refers to."""
    from fkv._native import ffi
    memory = Counting()

    def make():
        alloc = ffi.callback('fkv_alloc_fn', lambda user, size, alignment: ffi.cast(
            'void *', memory._alloc(None, size, alignment)))
        free = ffi.callback('fkv_free_fn', lambda user, pointer, size: memory._free(
            None, int(ffi.cast('uintptr_t', pointer)), size))
        return fkv.Context(threads=1, alloc=alloc, free=free)

    context = make()
    gc.collect()
    junk = [ffi.callback('int(int)', lambda x: x) for _ in range(50)]
    profile = fkv.Profile.exact(context, model)
    assert memory.live == context.info.live_bytes
    context.close()
    assert profile.info.n_layers == oracle.LAYERS
    profile.close()
    assert memory.live == 0 and len(junk) == 50


def test_half_an_allocator():
    memory = Counting()
    with pytest.raises(fkv.InvalidError):
        fkv.Context(alloc=memory.fields()['alloc'])


def test_nonfinite_is_refused_or_passes(model, random):
    q, k, v = oracle.tokens(random, 2)
    k[1, 0, 3] = numpy.nan
    for flags in (0, fkv.PROPAGATE_NONFINITE):
        with fkv.Context(threads=1, flags=flags) as context:
            cache = fkv.Cache(context, fkv.Profile.exact(context, model))
            plan = cache.plan()
            sequence = cache.sequence()
            plan.update([sequence], 2)
            if flags:
                out = plan.append_attend(0, q, k, v)
                assert numpy.isfinite(out[0]).all() and numpy.isnan(out[1, :2]).any()
                assert numpy.isfinite(out[1, 2:]).all()
            else:
                with pytest.raises(fkv.NonFiniteError, match='k'):
                    plan.append_attend(0, q, k, v)


def test_contexts_are_independent(model):
    a, b = fkv.Context(threads=1), fkv.Context(threads=1)
    held = b.info.live_bytes
    profile = fkv.Profile.exact(a, model)
    assert b.info.live_bytes == held
    with pytest.raises(fkv.FormatError):
        fkv.Profile.loads(a, '[')
    assert b.message == ''
    a.close()
    assert b.info.live_bytes == held and profile.info.n_layers == 2


def test_repr_and_closed():
    context = fkv.Context(threads=1)
    assert repr(context) == '<fkv.Context>' and not context.closed
    context.close()
    context.close()
    assert repr(context) == '<fkv.Context (closed)>' and context.closed
    for use in (lambda: context.info, lambda: fkv.Profile.loads(context, '{}')):
        with pytest.raises(fkv.HandleError, match='the context is closed'):
            use()


def test_with_block_closes_on_an_exception():
    with pytest.raises(KeyError):
        with fkv.Context(threads=1) as context:
            raise KeyError
    assert context.closed
