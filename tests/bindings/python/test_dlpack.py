# SPDX-License-Identifier: Apache-2.0
"""DLPack: what is asked of a producer, what is made of its answer, and that memory is given back once."""
import ctypes
import gc

import fkv
import numpy
import pytest

import oracle

CPU, CUDA, CUDA_HOST, ROCM, MANAGED = 1, 2, 3, 10, 13
FLOAT, BFLOAT, INT = 2, 4, 0
READ_ONLY = 1

Tensor = type('Tensor', (ctypes.Structure,), {'_fields_': [
    ('data', ctypes.c_void_p), ('device_type', ctypes.c_int32), ('device_id', ctypes.c_int32),
    ('ndim', ctypes.c_int32), ('code', ctypes.c_uint8), ('bits', ctypes.c_uint8),
    ('lanes', ctypes.c_uint16), ('shape', ctypes.POINTER(ctypes.c_int64)),
    ('strides', ctypes.POINTER(ctypes.c_int64)), ('byte_offset', ctypes.c_uint64)]})
Managed = type('Managed', (ctypes.Structure,), {'_fields_': [
    ('tensor', Tensor), ('manager', ctypes.c_void_p), ('deleter', ctypes.c_void_p)]})
Versioned = type('Versioned', (ctypes.Structure,), {'_fields_': [
    ('major', ctypes.c_uint32), ('minor', ctypes.c_uint32), ('manager', ctypes.c_void_p),
    ('deleter', ctypes.c_void_p), ('flags', ctypes.c_uint64), ('tensor', Tensor)]})
Exchange = type('Exchange', (ctypes.Structure,), {'_fields_': [
    ('major', ctypes.c_uint32), ('minor', ctypes.c_uint32), ('older', ctypes.c_void_p),
    ('allocate', ctypes.c_void_p), ('export', ctypes.c_void_p)]})

DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
EXPORT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(ctypes.c_void_p))


def python_api(name, result, *arguments):
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


new_capsule = python_api('PyCapsule_New', ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p,
                         ctypes.c_void_p)
# Of a capsule that is being destroyed, as an address: nothing may count references to it.
is_valid = python_api('PyCapsule_IsValid', ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
pointer_in = python_api('PyCapsule_GetPointer', ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
NAMES = {Managed: b'dltensor', Versioned: b'dltensor_versioned'}


@DELETER
def destroy_capsule(capsule):
    """What a producer must do with a capsule that nobody renamed."""
    for kind, name in NAMES.items():
        if is_valid(capsule, name):
            address = pointer_in(capsule, name)
            DELETER(kind.from_address(address).deleter)(address)


class Producer:
    """An array that speaks DLPack, and notes what it was asked and how often it was deleted."""

    def __init__(self, array, kind=Versioned, device=CPU, device_id=0, flags=0, strides=True,
                 offset=0, version=(1, 0), dtype=(FLOAT, None, 1), says=None, ndim=None):
        self.array, self.kind, self.device = array, kind, (says or device, device_id)
        self.asked, self.deleted, self.alive = [], 0, []
        self.deleter = DELETER(self._delete)
        code, bits, lanes = dtype
        extents = (ctypes.c_int64 * array.ndim)(*array.shape)
        steps = (ctypes.c_int64 * array.ndim)(*(s // array.itemsize for s in array.strides))
        self.alive += [extents, steps]
        tensor = Tensor(array.ctypes.data - offset, device, device_id,
                        array.ndim if ndim is None else ndim, code, bits or 8 * array.itemsize,
                        lanes, extents, steps if strides else None, offset)
        self.managed = kind(tensor=tensor)
        self.managed.deleter = ctypes.cast(self.deleter, ctypes.c_void_p).value
        if kind is Versioned:
            self.managed.major, self.managed.minor = version
            self.managed.flags = flags

    def _delete(self, address):
        assert address == ctypes.addressof(self.managed)
        self.deleted += 1

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **words):
        self.asked.append(words)
        if self.kind is Managed and 'max_version' in words:
            raise TypeError('unexpected keyword max_version')
        return new_capsule(ctypes.addressof(self.managed), NAMES[self.kind],
                           ctypes.cast(destroy_capsule, ctypes.c_void_p).value)


class Hidden:
    """A numpy array without its buffer protocol."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **words):
        return self.array.__dlpack__(**words)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.fixture
def qkv(random):
    return oracle.tokens(random, 5)


def attend(cache, q, k, v, out=None):
    sequence, plan = cache.sequence(), cache.plan()
    plan.update([sequence], 5)
    return plan.append_attend(0, q, k, v, out)


@pytest.fixture
def expected(cache, qkv):
    return attend(cache, *qkv)


def check_deleted_once(producer):
    gc.collect()
    assert producer.deleted == len(producer.asked[-1:]) == 1


@pytest.mark.parametrize('kind', [Managed, Versioned])
@pytest.mark.parametrize('order', [lambda x: x,
                                   lambda x: x.transpose(1, 0, 2).copy().transpose(1, 0, 2)],
                         ids=['dense', 'by-head'])
def test_inputs(cache, qkv, expected, kind, order):
    made = [Producer(order(x), kind) for x in qkv]
    assert (attend(cache, *made) == expected).all()
    for producer in made:
        check_deleted_once(producer)


@pytest.mark.parametrize('kind', [Managed, Versioned])
def test_outputs(cache, qkv, expected, kind):
    out = Producer(numpy.zeros_like(expected), kind)
    assert attend(cache, *qkv, out=out) is out
    assert (out.array == expected).all()
    check_deleted_once(out)


def test_numpy_behind_dlpack(cache, qkv, expected):
    out = Hidden(numpy.zeros_like(expected))
    attend(cache, *map(Hidden, qkv), out=out)
    assert (out.array == expected).all()
    half = [x.astype(numpy.float16) for x in qkv]
    assert (attend(cache, *map(Hidden, half), out=numpy.zeros_like(expected))
            == attend(cache, *half, out=numpy.zeros_like(expected))).all()


def test_numpy_read_only_behind_dlpack(cache, qkv):
    sealed = numpy.zeros((5, 4, 16), 'f')
    sealed.flags.writeable = False
    with pytest.raises((ValueError, BufferError), match='read-?only'):
        attend(cache, *qkv, out=Hidden(sealed))


def test_what_is_asked_for(qkv):
    new, old = Producer(qkv[0]), Producer(qkv[0], Managed)
    fkv.tensor(new), fkv.tensor(old)
    (words,) = new.asked
    assert words['stream'] is None and words['max_version'][0] == 1
    assert len(old.asked) == 2 and old.asked[1] == {'stream': None}


def test_stream_is_not_told_to_the_host(qkv):
    producer = Producer(qkv[0])
    fkv.tensor(producer, stream=7)
    assert producer.asked[0]['stream'] is None


@pytest.mark.parametrize('stream, told', [(None, 1), (2, 2), (123456789, 123456789), (-1, -1)])
@pytest.mark.parametrize('device', [CUDA, MANAGED])
def test_stream_is_told_to_cuda(qkv, stream, told, device):
    producer = Producer(qkv[0], device=device, device_id=3)
    view = fkv.tensor(producer, stream=stream)
    assert producer.asked[0]['stream'] == told
    assert view.device == fkv.Device.CUDA and view.device_id == 3
    del view
    check_deleted_once(producer)


def test_cuda_memory_is_refused_by_the_cpu(cache, qkv):
    q, k, v = qkv
    for number, name in enumerate(('q', 'k', 'v')):
        given = list(qkv)
        given[number] = producer = Producer(given[number], device=CUDA)
        with pytest.raises(fkv.UnsupportedError, match=f'^{name}: device'):
            attend(cache, *given, out=numpy.zeros_like(q))
        assert producer.asked[0]['stream'] == 1
        check_deleted_once(producer)
    producer = Producer(q.copy(), device=CUDA)
    with pytest.raises(fkv.UnsupportedError, match='^out: device'):
        attend(cache, q, k, v, out=producer)


def test_pinned_memory_is_the_hosts(cache, qkv, expected):
    made = [Producer(x, device=CUDA_HOST, device_id=1) for x in qkv]
    assert (attend(cache, *made) == expected).all()
    assert all(p.asked[0]['stream'] is None for p in made)


@pytest.mark.parametrize('kind', [Managed, Versioned])
def test_strides_may_be_missing(qkv, kind):
    producer = Producer(qkv[0], kind, strides=False)
    assert fkv.tensor(producer).strides == qkv[0].strides


@pytest.mark.parametrize('offset', [0, 4, 256, 10**6])
def test_byte_offset(qkv, offset):
    producer = Producer(qkv[0], offset=offset)
    assert fkv.tensor(producer).data == qkv[0].ctypes.data


@pytest.mark.parametrize('dtype, array, expected', [
    ((FLOAT, 32, 1), 'f4', fkv.DType.F32), ((FLOAT, 16, 1), 'f2', fkv.DType.F16),
    ((BFLOAT, 16, 1), 'u2', fkv.DType.BF16)])
def test_types(dtype, array, expected):
    view = fkv.tensor(Producer(numpy.zeros((2, 3), array), dtype=dtype), dtype=expected)
    assert view.dtype == expected and view.nbytes == 6 * dtype[1] // 8
    assert view.strides == (3 * dtype[1] // 8, dtype[1] // 8)


def test_read_only_flag(qkv):
    producer = Producer(qkv[0], flags=READ_ONLY)
    assert fkv.tensor(producer).writable == 0
    with pytest.raises(ValueError, match='read-only'):
        fkv.tensor(producer, writable=True)
    gc.collect()
    assert producer.deleted == 2
    assert fkv.tensor(Producer(qkv[0], flags=2), writable=True).writable == 1


@pytest.mark.parametrize('kind', [Managed, Versioned])
@pytest.mark.parametrize('change, error', [
    ({'device': ROCM}, 'device type 10'), ({'dtype': (FLOAT, 64, 1)}, 'bits 64'),
    ({'dtype': (INT, 32, 1)}, 'code 0'), ({'dtype': (FLOAT, 32, 4)}, 'lanes 4'),
    ({'dtype': (BFLOAT, 32, 1)}, 'code 4'), ({'ndim': 5}, '5 dimensions'),
    ({'ndim': -1}, '-1 dimensions')])
def test_refused_and_deleted_once(qkv, kind, change, error):
    producer = Producer(qkv[0], kind, **change)
    with pytest.raises((TypeError, ValueError), match=error):
        fkv.tensor(producer)
    check_deleted_once(producer)


def test_type_that_is_not_the_arrays(qkv):
    producer = Producer(qkv[0])
    with pytest.raises(TypeError, match='holds f32, not bf16'):
        fkv.tensor(producer, dtype='bf16')
    check_deleted_once(producer)


@pytest.mark.parametrize('version', [(0, 8), (2, 0), (99, 1)])
def test_unknown_major_version(qkv, version):
    producer = Producer(qkv[0], version=version)
    with pytest.raises(BufferError, match='%d.%d' % version):
        fkv.tensor(producer)
    check_deleted_once(producer)


def test_newer_minor_version(qkv):
    assert fkv.tensor(Producer(qkv[0], version=(1, 77))).shape == qkv[0].shape


def test_view_holds_the_memory(qkv):
    producer = Producer(qkv[0])
    view = fkv.tensor(producer)
    gc.collect()
    assert producer.deleted == 0
    del view
    check_deleted_once(producer)


def test_used_capsule_is_refused(qkv):
    class Used(Producer):
        def __dlpack__(self, **words):
            self.asked.append(words)
            return new_capsule(ctypes.addressof(self.managed), b'used_dltensor_versioned', None)

    producer = Used(qkv[0])
    with pytest.raises(TypeError, match='fresh DLPack capsule'):
        fkv.tensor(producer)
    assert producer.deleted == 0


@pytest.mark.parametrize('result', [None, 5, 'capsule'])
def test_no_capsule(qkv, result):
    class Strange(Producer):
        def __dlpack__(self, **words):
            return result

    with pytest.raises(TypeError, match='DLPack capsule'):
        fkv.tensor(Strange(qkv[0]))


@pytest.mark.parametrize('device', [None, 5, [1, 0], (1,), ('cpu', 0), (2**40, 0)])
def test_strange_devices(qkv, device):
    class Strange(Producer):
        def __dlpack_device__(self):
            return device

    producer = Strange(qkv[0])
    with pytest.raises((TypeError, OverflowError)):
        fkv.tensor(producer)
    assert producer.asked == []


def test_exceptions_of_the_producer_come_through(qkv):
    class Broken(Producer):
        def __dlpack__(self, **words):
            raise BufferError('not today')

    with pytest.raises(BufferError, match='not today'):
        fkv.tensor(Broken(qkv[0]))

    class NoDevice(Producer):
        def __dlpack_device__(self):
            raise LookupError('lost')

    with pytest.raises(LookupError, match='lost'):
        fkv.tensor(NoDevice(qkv[0]))

    class TypeBroken(Producer):
        def __dlpack__(self, **words):
            raise TypeError('never')

    with pytest.raises(TypeError, match='never'):
        fkv.tensor(TypeBroken(qkv[0]))


def with_exchange(producer, major=1, older=None, status=0):
    """A class of its own for `producer`, whose type offers the C interface."""
    calls = []

    @EXPORT
    def export(given, out):
        calls.append(given is producer)
        if status == 0:
            out[0] = ctypes.addressof(producer.managed)
        return status

    api = Exchange(major, 0, older, None, ctypes.cast(export, ctypes.c_void_p).value)
    name = b'dlpack_exchange_api'
    capsule = new_capsule(ctypes.addressof(api), name, None)
    producer.__class__ = type('Fast', (Producer,), {'__dlpack_c_exchange_api__': capsule})
    producer.alive += [export, api, name]
    return calls, api


def test_exchange_interface(cache, qkv, expected):
    made = [Producer(x) for x in qkv]
    calls = [with_exchange(p)[0] for p in made]
    assert (attend(cache, *made) == expected).all()
    gc.collect()
    assert calls == [[True]] * 3
    assert [(p.deleted, p.asked) for p in made] == [(1, [])] * 3


def test_exchange_interface_is_not_for_cuda(qkv):
    """It does not wait for the device's work, so the stream is told in the other way."""
    producer = Producer(qkv[0], device=CUDA)
    calls, _ = with_exchange(producer)
    view = fkv.tensor(producer, stream=5)
    assert calls == [True] and producer.deleted == 1
    assert producer.asked[0]['stream'] == 5 and view.device == fkv.Device.CUDA
    del view
    gc.collect()
    assert producer.deleted == 2


@pytest.mark.parametrize('change, kind', [({'version': (2, 0)}, BufferError),
                                          ({'flags': READ_ONLY}, ValueError),
                                          ({'dtype': (INT, 32, 1)}, TypeError)])
def test_exchange_interface_refused(qkv, change, kind):
    producer = Producer(qkv[0], **change)
    with_exchange(producer)
    with pytest.raises(kind):
        fkv.tensor(producer, writable=True)
    assert producer.deleted == 1 and producer.asked == []


def test_exchange_interface_of_another_version(qkv):
    producer = Producer(qkv[0])
    _, known = with_exchange(producer)
    with_exchange(producer, major=3, older=ctypes.addressof(known))
    assert fkv.tensor(producer).shape == qkv[0].shape
    assert producer.asked == [] and producer.deleted == 1
    calls, _ = with_exchange(producer, major=3)
    assert fkv.tensor(producer).shape == qkv[0].shape
    assert calls == [] and len(producer.asked) == 1 and producer.deleted == 2


def test_failing_deleter_does_not_hide_the_error(qkv):
    """Code of Python runs while the view of a refused array goes."""
    class Talking(Producer):
        def _delete(self, address):
            super()._delete(address)
            try:
                raise KeyError
            except KeyError:
                self.said = ['deleted']

    producer = Talking(qkv[0], dtype=(INT, 32, 1))
    with pytest.raises(TypeError, match='code 0'):
        fkv.tensor(producer)
    assert producer.said == ['deleted']
    check_deleted_once(producer)
