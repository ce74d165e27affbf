# SPDX-License-Identifier: Apache-2.0
"""Arrays through the buffer protocol: types, shapes, strides, who may write, who lives how long."""
import array
import ctypes
import gc
import sys
import weakref

import fkv
import numpy
import pytest
from fkv._view import View

import oracle

COUNT = 6


def attend(cache, q, k, v, out=None, lse=None, count=COUNT):
    """One step of layer 0 in a new sequence."""
    sequence, plan = cache.sequence(), cache.plan()
    plan.update([sequence], count)
    return plan.append_attend(0, q, k, v, out, lse)


@pytest.fixture
def qkv(random):
    return oracle.tokens(random, COUNT)


@pytest.fixture
def expected(cache, qkv):
    return attend(cache, *qkv)


def by_head(x):
    """The same values in memory as [heads, tokens, D]."""
    return numpy.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2)


def padded(x):
    """The same values with room between rows and tokens."""
    room = numpy.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 3), numpy.nan, x.dtype)
    view = room[:, :x.shape[1], :x.shape[2]]
    view[...] = x
    return view


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def as_ctypes(x):
    return (ctypes.c_float * x.shape[2] * x.shape[1] * x.shape[0]).from_buffer_copy(x)


def as_memoryview(x):
    return memoryview(x.tobytes()).cast('f', x.shape)


def as_bytearray(x):
    return memoryview(bytearray(x.tobytes())).cast('f', x.shape)


def as_array(x):
    return memoryview(array.array('f', x.ravel().tolist())).cast('B').cast('f', x.shape)


@pytest.mark.parametrize('make', [by_head, padded, read_only, as_ctypes, as_memoryview,
                                  as_bytearray, as_array, fkv.tensor,
                                  lambda x: fkv.tensor(by_head(x)),
                                  lambda x: x.astype(numpy.dtype('<f4')),
                                  lambda x: x.view(type('Mine', (numpy.ndarray,), {}))],
                         ids=['by-head', 'padded', 'read-only', 'ctypes', 'memoryview',
                              'bytearray', 'array', 'view', 'view-by-head', 'little', 'subclass'])
def test_inputs(cache, qkv, expected, make):
    assert (attend(cache, *map(make, qkv)) == expected).all()


@pytest.mark.parametrize('make', [by_head, padded, as_ctypes, as_bytearray, as_array,
                                  lambda x: fkv.tensor(x.copy(), writable=True)],
                         ids=['by-head', 'padded', 'ctypes', 'bytearray', 'array', 'view'])
def test_outputs(cache, qkv, expected, make):
    out = make(numpy.zeros_like(expected))
    assert attend(cache, *qkv, out=out) is out
    if isinstance(out, View):
        values = numpy.frombuffer((ctypes.c_char * out.nbytes).from_address(out.data), 'f')
        assert (values.reshape(expected.shape) == expected).all()
    else:
        assert (numpy.asarray(out) == expected).all()


def test_outputs_write_between_no_rows(cache, qkv, expected):
    out = padded(numpy.zeros_like(expected))
    attend(cache, *qkv, out=out)
    assert numpy.isnan(out.base[:, -1]).all() and numpy.isnan(out.base[:, :, 16:]).all()
    lse = numpy.zeros((COUNT, 9), 'f')
    attend(cache, *qkv, out=out, lse=lse[:, 2:6])
    assert (lse[:, :2] == 0).all() and (lse[:, 6:] == 0).all() and (lse[:, 2:6] != 0).all()


def test_half_precision(cache, random):
    q, k, v = oracle.tokens(random, COUNT, dtype=numpy.float16)
    out = attend(cache, q, k, v)
    assert out.dtype == numpy.float16
    wide = attend(cache, *(x.astype(numpy.float32) for x in (q, k, v)))
    assert (out == wide.astype(numpy.float16)).all()
    mixed = attend(cache, q, k.astype(numpy.float32), v, out=numpy.zeros_like(wide))
    assert (mixed == wide).all()


def bf16(x):
    """The bits of the values, whose low halves are cut off, and the values."""
    bits = (x.view(numpy.uint32) >> 16).astype(numpy.uint16)
    return bits, (bits.astype(numpy.uint32) << 16).view(numpy.float32)


@pytest.mark.parametrize('integer', [numpy.uint16, numpy.int16])
def test_bfloat16_from_bits(cache, qkv, integer):
    bits, values = zip(*map(bf16, qkv))
    views = [fkv.tensor(b.view(integer), dtype='bf16') for b in bits]
    assert [v.dtype for v in views] == [fkv.DType.BF16] * 3
    wide = attend(cache, *values)
    assert (attend(cache, *views, out=numpy.zeros_like(wide)) == wide).all()
    with pytest.raises(TypeError, match='bfloat16.*out='):
        attend(cache, *views)
    out = numpy.zeros(wide.shape, integer)
    attend(cache, *values, out=fkv.tensor(out, 'bf16', writable=True))
    got = (out.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)
    numpy.testing.assert_allclose(got, wide, rtol=2**-8)
    assert (got != wide).any()


def test_float16_from_bits(cache, random):
    given = oracle.tokens(random, COUNT, dtype=numpy.float16)
    views = [fkv.tensor(x.view(numpy.uint16), dtype=fkv.DType.F16) for x in given]
    out = attend(cache, *views)
    assert out.dtype == numpy.float16 and (out == attend(cache, *given)).all()


@pytest.mark.parametrize('dtype', ['f8', 'i4', 'u1', 'i8', '?', 'c8', 'f16', '>f4', '>f2', 'u2',
                                   'S4', [('a', 'f4')]])
def test_wrong_types(cache, qkv, dtype):
    q, k, v = qkv
    wrong = numpy.zeros(k.shape, dtype)
    for use in (lambda: attend(cache, q, wrong, v), lambda: attend(cache, q, k, wrong),
                lambda: attend(cache, wrong, k, v),
                lambda: attend(cache, q, k, v, out=numpy.zeros(q.shape, dtype))):
        with pytest.raises(TypeError, match='not supported'):
            use()


def test_big_endian_bits_are_no_bfloat16():
    with pytest.raises(TypeError, match='not supported'):
        fkv.tensor(numpy.zeros(3, '>u2'), dtype='bf16')


@pytest.mark.parametrize('dtype, given', [('f16', 'f4'), ('f32', 'f2'), ('bf16', 'f4'),
                                          ('f32', 'u2')])
def test_type_that_is_not_the_arrays(dtype, given):
    with pytest.raises(TypeError):
        fkv.tensor(numpy.zeros(3, given), dtype=dtype)


@pytest.mark.parametrize('wrong', [None, 5, 1.5, 'text', [1.0, 2.0], object(), {}, b'bytes',
                                   numpy.float64(3)])
def test_no_arrays(cache, qkv, wrong):
    q, k, v = qkv
    for use in (lambda: attend(cache, wrong, k, v), lambda: attend(cache, q, wrong, v),
                lambda: attend(cache, q, k, wrong), lambda: fkv.tensor(wrong)):
        with pytest.raises(TypeError):
            use()
    if wrong is not None:
        with pytest.raises((TypeError, ValueError)):
            attend(cache, q, k, v, out=wrong)
        with pytest.raises((TypeError, ValueError)):
            attend(cache, q, k, v, lse=wrong)


@pytest.mark.parametrize('shape', [(), (6,), (6, 32), (6, 2, 16, 1), (5, 2, 16), (7, 2, 16),
                                   (6, 1, 16), (6, 3, 16), (6, 2, 8), (2, 6, 16), (6, 16, 2)])
def test_wrong_shapes_name_the_argument(cache, qkv, shape):
    q, k, v = qkv
    wrong = numpy.zeros(shape, 'f')
    for use, name in ((lambda: attend(cache, q, wrong, v), 'k'),
                      (lambda: attend(cache, q, k, wrong), 'v'),
                      (lambda: attend(cache, wrong, k, v, out=q.copy()), 'q'),
                      (lambda: attend(cache, q, k, v, out=wrong), 'out'),
                      (lambda: attend(cache, q, k, v, lse=wrong), 'lse')):
        with pytest.raises(fkv.InvalidError, match=f'^{name}: '):
            use()


def test_five_dimensions(cache, qkv):
    with pytest.raises(ValueError, match='5 dimensions'):
        attend(cache, qkv[0], numpy.zeros((1, 1, 6, 2, 16), 'f'), qkv[2])


@pytest.mark.parametrize('make, text', [
    (lambda x: numpy.repeat(x, 2, axis=2)[:, :, ::2], 'last dimension'),
    (lambda x: x[:, :, ::-1], 'strides'), (lambda x: x[::-1], 'strides'),
    (lambda x: x[:, ::-1], 'strides'),
    (lambda x: numpy.broadcast_to(x[:1], x.shape), 'strides'),
    (lambda x: numpy.broadcast_to(x[:, :1], x.shape), 'strides'),
    (lambda x: numpy.asfortranarray(x), 'last dimension'),
], ids=['strided', 'mirrored', 'backwards', 'heads-backwards', 'broadcast', 'broadcast-heads',
        'fortran'])
def test_strides_that_cannot_be(cache, qkv, make, text):
    q, k, v = qkv
    for use, name in ((lambda: attend(cache, make(q), k, v), 'q'),
                      (lambda: attend(cache, q, make(k), v), 'k'),
                      (lambda: attend(cache, q, k, make(v)), 'v')):
        with pytest.raises(fkv.InvalidError, match=f'^{name}: .*{text}'):
            use()


def test_extent_one_may_have_any_stride(cache, random):
    q, k, v = oracle.tokens(random, 1)
    expected = attend(cache, q, k, v, count=1)
    assert (attend(cache, *(x[::-1] for x in (q, k, v)), count=1) == expected).all()
    strange = [numpy.lib.stride_tricks.as_strided(x, strides=(0, *x.strides[1:]))
               for x in (q, k, v)]
    assert (attend(cache, *strange, count=1) == expected).all()


def test_unaligned(cache, qkv):
    raw = numpy.zeros(qkv[1].nbytes + 1, numpy.uint8)
    wrong = raw[1:].view('f').reshape(qkv[1].shape)
    assert not wrong.flags.aligned
    with pytest.raises(fkv.InvalidError, match='^k: .*aligned'):
        attend(cache, qkv[0], wrong, qkv[2])


def test_read_only_outputs(cache, qkv, expected):
    q, k, v = qkv
    for out in (read_only(expected), as_memoryview(expected)):
        before = numpy.array(out)
        with pytest.raises(ValueError, match='read-only'):
            attend(cache, q, k, v, out=out)
        with pytest.raises(ValueError, match='read-only'):
            fkv.tensor(out, writable=True)
        assert (numpy.asarray(out) == before).all()
    with pytest.raises(ValueError, match='read-only'):
        attend(cache, q, k, v, lse=read_only(numpy.zeros((COUNT, 4), 'f')))
    with pytest.raises(ValueError, match='writable=True'):
        attend(cache, q, k, v, out=fkv.tensor(expected.copy()))


def test_outputs_overlap_no_input(cache, qkv):
    q, k, v = qkv
    shared = numpy.lib.stride_tricks.as_strided(q, strides=(64, 64, 4))
    with pytest.raises(fkv.InvalidError, match='overlap'):
        attend(cache, q.copy(), k, v, out=shared)


def test_lse(cache, qkv, expected):
    q, k, v = qkv
    assert isinstance(attend(cache, q, k, v, lse=False), numpy.ndarray)
    out, lse = attend(cache, q, k, v, lse=True)
    assert lse.shape == (COUNT, 4) and lse.dtype == numpy.float32 and (out == expected).all()
    mine = numpy.zeros((COUNT, 4), 'f')
    assert attend(cache, q, k, v, lse=mine)[1] is mine and (mine == lse).all()
    half = attend(cache, *(x.astype('e') for x in qkv), lse=True)
    assert half[0].dtype == numpy.float16 and half[1].dtype == numpy.float32
    for wrong in (numpy.zeros((COUNT, 4), 'e'), numpy.zeros((4, COUNT), 'f')):
        with pytest.raises(fkv.InvalidError, match='^lse: '):
            attend(cache, q, k, v, lse=wrong)


def test_nothing(cache):
    q, k = numpy.zeros((0, 4, 16), 'f'), numpy.zeros((0, 2, 16), 'e')
    out, lse = attend(cache, q, k, k, lse=True, count=0)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)
    assert View(numpy.zeros((3, 0, 5), 'f')).nbytes == 0


def test_view_says_what_it_is():
    x = numpy.zeros((4, 6, 8), 'f')[1:, ::2]
    view = fkv.tensor(x, writable=True)
    assert view.shape == (3, 3, 8) and view.strides == x.strides == (192, 64, 4)
    assert view.data == x.__array_interface__['data'][0]
    assert view.dtype == fkv.DType.F32 and view.device == fkv.Device.CPU and view.device_id == 0
    assert view.nbytes == 2 * 192 + 2 * 64 + 32 and view.writable == 1
    assert fkv.tensor(x).writable == 0
    assert fkv.tensor(view) is view and View(view, True) is view
    with pytest.raises(AttributeError):
        view.data = 0
    with pytest.raises(AttributeError):
        view.other = 0


def test_view_is_the_struct_of_the_header():
    from fkv import capi
    x = numpy.zeros((2, 3), 'e')
    view = fkv.tensor(x)
    struct = capi.fkv_tensor.from_address(view.address)
    assert struct.struct_size == ctypes.sizeof(capi.fkv_tensor)
    assert (struct.dtype, struct.device, struct.device_id, struct.ndim) == (2, 0, 0, 2)
    assert struct.data == view.data and struct.byte_length == 12 and struct.reserved == 0
    assert list(struct.shape) == [2, 3, 0, 0] and list(struct.strides) == [6, 2, 0, 0]
    other = capi.fkv_tensor()
    shape = (ctypes.c_int64 * 2)(2, 3)
    assert capi.load().fkv_tensor_init(other, struct.data, 2, 2, shape) == 0
    assert bytes(other) == bytes(struct)


@pytest.mark.parametrize('arguments, keywords', [((), {}), ((1, 2, 3, 4, 5), {}),
                                                 ((numpy.zeros(1, 'f'),), {'unknown': 1}),
                                                 ((numpy.zeros(1, 'f'), False, 'f32'), {}),
                                                 ((numpy.zeros(1, 'f'), False, 2**40), {})])
def test_view_arguments(arguments, keywords):
    with pytest.raises((TypeError, OverflowError)):
        View(*arguments, **keywords)


@pytest.mark.parametrize('dtype', ['f64', 7, -1, object()])
def test_tensor_of_unknown_type(dtype):
    with pytest.raises(ValueError, match='DType'):
        fkv.tensor(numpy.zeros(1, 'f'), dtype=dtype)


def test_views_are_used_again(cache, qkv, expected):
    q, k, v = qkv
    out = numpy.zeros_like(expected)
    views = [fkv.tensor(x) for x in qkv] + [fkv.tensor(out, writable=True)]
    for scale in (1, 2):
        v *= scale
        attend(cache, *views)
        numpy.testing.assert_allclose(out, scale * expected, rtol=1e-6)


class Owner(numpy.ndarray):
    """An array that can be referred to weakly."""


def test_view_keeps_its_array():
    owner = numpy.ones((2, 3), 'f').view(Owner)
    dead, address = weakref.ref(owner), owner.ctypes.data
    view = fkv.tensor(owner)
    del owner
    gc.collect()
    assert dead() is not None and view.data == address
    assert ctypes.c_float.from_address(view.data).value == 1
    del view
    gc.collect()
    assert dead() is None


def test_calls_keep_nothing(cache, qkv):
    given = [x.view(Owner) for x in map(numpy.copy, qkv)]
    counts = [sys.getrefcount(x) for x in given]
    out = attend(cache, *given)
    assert [sys.getrefcount(x) for x in given] == counts
    for wrong in (dict(lse=numpy.zeros(3, 'f')), dict(out=read_only(out))):
        with pytest.raises(ValueError):
            attend(cache, *given, **wrong)
        gc.collect()
        assert [sys.getrefcount(x) for x in given] == counts


def test_failed_views_keep_nothing():
    for x, keywords in ((numpy.zeros(2, 'f8'), {}), (numpy.zeros((1,) * 5, 'f'), {}),
                        (read_only(numpy.zeros(2, 'f')), {'writable': True}),
                        (numpy.zeros(2, 'f'), {'dtype': 2})):
        before = sys.getrefcount(x)
        for _ in range(10):
            with pytest.raises((TypeError, ValueError)):
                View(x, **keywords)
        assert sys.getrefcount(x) == before


def test_bytearray_is_locked_while_a_view_lives():
    memory = bytearray(64)
    view = fkv.tensor(memoryview(memory).cast('f'), writable=True)
    with pytest.raises(BufferError):
        memory.append(0)
    del view
    gc.collect()
    memory.append(0)
