# SPDX-License-Identifier: Apache-2.0
"""Calibration by sensitivities: statistics against numpy, allocation, and gradients through torch."""
import fkv
import numpy
import pytest

import oracle

SHAPE = (2, 16)  # of one layer in test_model()


def small_model(layers=2):
    return fkv.ModelParams(n_layers=layers, n_q_heads=4, n_kv_heads=2, head_dim=16,
                           rope_layout='half_split', inv_freq=[10.0 ** (-j / 4) for j in range(8)])


def window(random, tokens):
    scale = numpy.exp(random.normal(size=SHAPE))
    k, v = (random.normal(size=(tokens, *SHAPE)) * scale + 1 for _ in range(2))
    grad_k, grad_v = (random.normal(size=(tokens, *SHAPE)) for _ in range(2))
    q = random.normal(size=(tokens, 4, 16))
    return [x.astype(numpy.float32) for x in (k, v, grad_k, grad_v, q)]


def gathered(context, seed=0, windows=2):
    random = numpy.random.default_rng(seed)
    calibrator = fkv.Calibrator(context, small_model(), criterion='sensitivity')
    all_windows = [window(random, 100 + i) for i in range(windows)]
    for arrays in all_windows:
        for layer in range(2):
            calibrator.observe_gradients(layer, *arrays)
    return calibrator, [numpy.concatenate(x) for x in zip(*all_windows)]


def test_statistics(context):
    calibrator, (k, v, grad_k, grad_v, q) = gathered(context)
    for part, x, grad in (('k', k, grad_k), ('v', v, grad_v)):
        x, grad = x.astype(float), grad.astype(float)
        numpy.testing.assert_allclose(calibrator.statistic(1, part, 'mean'), x.mean(0), 1e-10)
        numpy.testing.assert_allclose(calibrator.statistic(1, part, 'variance'), x.var(0), 1e-10)
        numpy.testing.assert_allclose(calibrator.statistic(1, part, fkv.Statistic.SENSITIVITY),
                                      (grad ** 2).mean(0), 1e-10)
    squares = (q.astype(float) ** 2).reshape(-1, 2, 2, 16).mean((0, 2))
    numpy.testing.assert_allclose(calibrator.statistic(0, 'k', 'query'), squares, 1e-10)
    with pytest.raises(ValueError):
        calibrator.statistic(0, 'k', 'median')


def test_dumps_loads_merge(leak_free):
    calibrator, _ = gathered(leak_free)
    data = calibrator.dumps()
    loaded = fkv.Calibrator.loads(leak_free, data, small_model())
    assert loaded.dumps() == data
    other, _ = gathered(leak_free, seed=1)
    other.merge(loaded)
    both, _ = gathered(leak_free, seed=1)
    both.merge(calibrator)
    assert other.dumps() == both.dumps()
    with pytest.raises(fkv.MismatchError):
        fkv.Calibrator.loads(leak_free, data, small_model(layers=3))
    with pytest.raises(fkv.ChecksumError):
        fkv.Calibrator.loads(leak_free, data[:-1] + b'\0', small_model())
    for made in (calibrator, loaded, other, both):
        made.close()


def test_allocate(context):
    calibrator, _ = gathered(context)
    with calibrator:
        params = fkv.AllocationParams(value=8, tokens=8192)
        profile, info = calibrator.allocate(params)
        assert 8 <= info.ratio == profile.estimate(8192).ratio < 9
        bits = numpy.stack([profile.channels(layer, part) for part in 'kv' for layer in range(2)])
        assert set(numpy.unique(bits)) <= {0, 2, 4}
        losses = [numpy.stack([calibrator.statistic(layer, part, 'loss') for layer in range(2)])
                  for part in 'kv']
        # V is not rotated: what loses more never has fewer bits
        order = numpy.argsort(losses[1], axis=None)
        assert (numpy.diff(bits[2:].reshape(-1)[order].astype(int)) >= 0).all()
        with pytest.raises(fkv.UnsupportedError, match='8192 tokens to'):
            calibrator.allocate(fkv.AllocationParams(value=500))
        weighed = fkv.AllocationParams(target='bits', value=1.0, weights=[1, 1, 1, 1000])
        more = calibrator.allocate(weighed)[0].channels(1, 'v').sum()
        assert more > calibrator.allocate(fkv.AllocationParams(target='bits', value=1.0))[0] \
            .channels(1, 'v').sum()


def test_without_gradients(context):
    calibrator = fkv.Calibrator(context, small_model(), criterion='sensitivity')
    random = numpy.random.default_rng(2)
    for _ in range(2):
        k, v, _, _, q = window(random, 100)
        for layer in range(2):
            calibrator.observe(layer, k, v, q)
    weights = random.exponential(size=SHAPE)
    calibrator.weigh_values(0, weights)
    assert (calibrator.statistic(0, 'v', 'sensitivity') == weights).all()
    assert (calibrator.statistic(0, 'k', 'slow_share') < .3).all()
    calibrator.allocate(fkv.AllocationParams(value=6))[0].close()


def test_allocated(context):
    random = numpy.random.default_rng(3)
    k, v = random.exponential(size=(2, 2, *SHAPE))
    carriers = random.normal(size=(2, *SHAPE)).astype(numpy.float32)
    profile, info = fkv.Profile.allocated(context, small_model(), k, v,
                                          fkv.AllocationParams(target='bits', value=1.5),
                                          k_carrier=carriers)
    assert 1.4 < info.bits <= 1.5
    assert profile.info.coding == fkv.Coding.CALIBRATED
    with pytest.raises(ValueError, match='losses'):
        fkv.Profile.allocated(context, small_model(), k[0], v)
    with pytest.raises(fkv.InvalidError):
        fkv.Profile.allocated(context, small_model(), -k, v)


# ---- through torch

@pytest.fixture
def llama():
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
        initializer_range=.2)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.torch
@pytest.mark.parametrize('kind', ['Llama', 'Mistral', 'Qwen2', 'Qwen3'])
def test_far_gradients(kind):
    """The gradients are those with respect to an offset that far queries alone can see."""
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    from fkv import calibration
    torch.manual_seed(1)
    config = getattr(transformers, f'{kind}Config')(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
        initializer_range=.3)
    model = getattr(transformers, f'{kind}ForCausalLM')(config).eval()
    random = numpy.random.default_rng(5)
    ids = random.integers(0, 64, 40)
    distance, seen = 10, {}

    class Seen:
        def observe_gradients(self, layer, k, v, grad_k, grad_v, q):
            seen[layer] = [x.numpy() for x in (k, v, grad_k, grad_v, q)]

    codec = fkv.CodecParams(n_sink=2, n_local=6, block=8, group=64)
    before = model(torch.tensor(ids)[None]).logits
    implementation = model.config._attn_implementation
    with calibration.calibrating(model):
        calibration.observe(Seen(), model, ids, codec=codec)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(torch.tensor(ids)[None]).logits, before)

    # The same by autograd, through a plain attention that adds zeros for far pairs.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    zeros = {layer: torch.zeros(2, 2, len(ids), 16, requires_grad=True) for layer in range(2)}
    cos, sin = (x[0] for x in model.model.rotary_emb(before, torch.arange(len(ids))[None]))

    def attend(module, query, key, value, attention_mask=None, scaling=None, **_):
        q, k, v = query[0], key[0].repeat_interleave(2, 0), value[0].repeat_interleave(2, 0)
        age = torch.arange(len(ids))[:, None] - torch.arange(len(ids))[None]
        far = age >= distance
        zero_k, zero_v = zeros[module.layer_idx]
        turned = torch.cat([-zero_k[..., 8:], zero_k[..., :8]], -1)
        zero_k = (zero_k * cos + turned * sin).repeat_interleave(2, 0)
        scores = q @ k.transpose(1, 2) + (q @ zero_k.transpose(1, 2)) * far
        weights = (scores * scaling).masked_fill(age < 0, float('-inf')).softmax(-1)
        out = weights @ v + (weights * far) @ zero_v.repeat_interleave(2, 0)
        return out.transpose(0, 1)[None], None

    ALL_ATTENTION_FUNCTIONS.register('fkv_test', attend)
    model.set_attn_implementation('fkv_test')
    logits = model(torch.tensor(ids)[None], use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction='sum').backward()
    for layer in range(2):
        for part, grad in enumerate(zeros[layer].grad.numpy()):
            grad = grad[:, 2:-distance].transpose(1, 0, 2)
            largest = abs(grad).max()
            assert largest > 1e-3
            assert abs(seen[layer][2 + part] - grad).max() < 1e-4 * largest


@pytest.mark.torch
def test_calibrate(llama):
    random = numpy.random.default_rng(7)
    texts = [random.integers(0, 64, 500).tolist() for _ in range(4)]
    wanted = [p.requires_grad for p in llama.parameters()]
    for labels in ('text', 'model', 'both'):
        profile, info = fkv.calibrate(llama, texts, target=8, window=500, labels=labels)
        assert info.ratio >= 8
        profile.close()
    assert wanted == [p.requires_grad for p in llama.parameters()]
    with pytest.raises(ValueError, match='at least two'):
        fkv.calibrate(llama, texts, window=2000)
    with pytest.raises(ValueError, match='labels'):
        fkv.calibrate(llama, texts, window=500, labels='none')
    with pytest.raises(TypeError, match='tokenizer'):
        fkv.calibrate(llama, ['text'], window=500)
