# SPDX-License-Identifier: Apache-2.0
"""Tensors of torch."""
import gc
import weakref

import fkv
import numpy
import pytest

import oracle

torch = pytest.importorskip('torch')
pytestmark = pytest.mark.torch
COUNT = 6


def attend(cache, q, k, v, out=None, lse=None):
    sequence, plan = cache.sequence(), cache.plan()
    plan.update([sequence], len(q))
    return plan.append_attend(0, q, k, v, out, lse)


@pytest.fixture
def qkv(random):
    return oracle.tokens(random, COUNT)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_types(cache, qkv, dtype):
    given = [torch.from_numpy(x).to(dtype) for x in qkv]
    out, lse = attend(cache, *given, lse=True)
    assert isinstance(out, torch.Tensor) and out.dtype == dtype and out.shape == given[0].shape
    assert lse.dtype == torch.float32 and lse.shape == (COUNT, 4)
    wide, wide_lse = attend(cache, *(x.float().numpy() for x in given), lse=True)
    assert (out == torch.from_numpy(wide).to(dtype)).all()
    assert (lse.numpy() == wide_lse).all()


@pytest.mark.parametrize('dtype', [torch.float64, torch.int32, torch.bool, torch.complex64,
                                   torch.float8_e4m3fn])
def test_wrong_types(cache, qkv, dtype):
    q, k, v = map(torch.from_numpy, qkv)
    with pytest.raises((TypeError, BufferError)):
        attend(cache, q, torch.zeros(k.shape).to(dtype), v)


def test_orders(cache, qkv):
    expected = attend(cache, *qkv)
    q, k, v = (torch.from_numpy(x).transpose(0, 1).contiguous().transpose(0, 1) for x in qkv)
    assert not k.is_contiguous()
    out = torch.zeros(4, COUNT, 16).transpose(0, 1)
    assert attend(cache, q, k, v, out=out) is out
    assert (out.numpy() == expected).all()
    room = torch.full((COUNT, 4, 20), torch.nan)
    attend(cache, q, k, v, out=room[:, :, 2:18])
    assert (room[:, :, 2:18].numpy() == expected).all() and room[:, :, :2].isnan().all()


@pytest.mark.parametrize('make, text', [
    (lambda x: torch.zeros(COUNT, 2, 32)[:, :, ::2], 'last dimension'),
    (lambda x: x[:1].expand(COUNT, 2, 16), 'strides')], ids=['strided', 'expanded'])
def test_strides_that_cannot_be(cache, qkv, make, text):
    q, k, v = map(torch.from_numpy, qkv)
    with pytest.raises(fkv.InvalidError, match=f'^k: .*{text}'):
        attend(cache, q, make(k), v)


def test_gradients_are_refused_or_not_recorded(cache, qkv):
    """Which of both depends on the version of torch: it is torch that exports the tensor."""
    expected = attend(cache, *qkv)
    q, k, v = map(torch.from_numpy, qkv)
    q.requires_grad_()
    try:
        out = attend(cache, q, k, v)
    except BufferError as error:
        assert 'grad' in str(error)
    else:
        assert not out.requires_grad and (out.numpy() == expected).all()
    assert q.grad is None
    out = attend(cache, q.detach(), k, v)
    assert not out.requires_grad and (out.numpy() == expected).all()


def test_no_copy(cache, qkv):
    q, k, v = map(torch.from_numpy, qkv)
    assert fkv.tensor(k).data == k.data_ptr()
    assert fkv.tensor(k[2:, 1:]).data == k[2:, 1:].data_ptr()
    assert fkv.tensor(k[2:, 1:]).strides == tuple(4 * s for s in k.stride())


def test_view_keeps_its_memory():
    owner = numpy.arange(6, dtype='f').reshape(2, 3).view(type('Owner', (numpy.ndarray,), {}))
    dead = weakref.ref(owner)
    view = fkv.tensor(torch.from_numpy(owner), writable=True)
    del owner
    gc.collect()
    assert dead() is not None and view.shape == (2, 3) and view.writable
    del view
    gc.collect()
    assert dead() is None


def test_mixed_with_numpy(cache, qkv):
    q, k, v = qkv
    expected = attend(cache, q, k, v)
    out = attend(cache, torch.from_numpy(q), k, torch.from_numpy(v))
    assert isinstance(out, torch.Tensor) and (out.numpy() == expected).all()
    out = torch.zeros(q.shape, dtype=torch.bfloat16)
    attend(cache, q, k, v, out=out)
    assert (out == torch.from_numpy(expected).bfloat16()).all()


def test_parameters_and_inference_mode(cache, qkv):
    expected = attend(cache, *qkv)
    with torch.inference_mode():
        given = [torch.from_numpy(x) + 0 for x in qkv]
        assert (attend(cache, *given).numpy() == expected).all()
    frozen = [torch.nn.Parameter(torch.from_numpy(x), requires_grad=False) for x in qkv]
    assert (attend(cache, *frozen, out=numpy.zeros_like(expected)) == expected).all()


def test_empty(cache):
    q, k = torch.zeros(0, 4, 16), torch.zeros(0, 2, 16)
    out, lse = attend(cache, q, k, k, lse=True)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


@pytest.mark.skipif(torch.version.cuda is None and not torch.backends.mps.is_available(),
                    reason='a torch for the CPU only')
def test_meta_tensors(cache, qkv):
    q, k, v = map(torch.from_numpy, qkv)
    with pytest.raises((TypeError, BufferError, RuntimeError, ValueError, fkv.Error)):
        attend(cache, q, k.to('meta'), v)


def test_sparse_tensors(cache, qkv):
    q, k, v = map(torch.from_numpy, qkv)
    with pytest.raises((TypeError, BufferError, RuntimeError)):
        attend(cache, q, k.to_sparse(), v)


def test_attention_of_torch(cache, random):
    """The same as torch's own attention, on rotated inputs."""
    q, k, v = oracle.tokens(random, 33)
    rotated = [torch.from_numpy(oracle.rotate(x, range(33))).transpose(0, 1) for x in (q, k)]
    repeated = [x.repeat_interleave(2, 0) for x in
                (rotated[1], torch.from_numpy(v).double().transpose(0, 1))]
    expected = torch.nn.functional.scaled_dot_product_attention(
        rotated[0], *repeated, is_causal=True).transpose(0, 1)
    out = attend(cache, *map(torch.from_numpy, (q, k, v)))
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA')
def test_cuda_tensors_on_a_cpu_context(cache, qkv):
    q, k, v = (torch.from_numpy(x).cuda() for x in qkv)
    with pytest.raises(fkv.UnsupportedError, match='^q: device'):
        attend(cache, q, k, v)
    view = fkv.tensor(q, stream=torch.cuda.current_stream().cuda_stream or None)
    assert view.device == fkv.Device.CUDA and view.data == q.data_ptr()
