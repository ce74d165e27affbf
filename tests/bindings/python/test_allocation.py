# SPDX-License-Identifier: Apache-2.0
"""The allocation of bits by what is observed, saved, merged or given."""
import fkv
import numpy
import oracle
import pytest

SHAPE = oracle.LAYERS, oracle.KV_HEADS, oracle.DIM
CODEC = fkv.CodecParams(group=64, block=64, n_sink=4, n_local=64)


def calibrator(context, model):
    return fkv.Calibrator(context, model, criterion='sensitivity', codec=CODEC)


def observe(target, seed, gradients=True, queries=True, tokens=128):
    random = numpy.random.default_rng(seed)
    size = tokens, oracle.KV_HEADS, oracle.DIM
    for layer in range(oracle.LAYERS):
        k, v = 3 + random.standard_normal((2, *size), numpy.float32)
        steep = numpy.broadcast_to(numpy.arange(oracle.DIM, dtype='f4'), size)
        grads = (numpy.ascontiguousarray(steep), numpy.zeros(size, 'f4')) if gradients else ()
        q = random.standard_normal((tokens, oracle.Q_HEADS, oracle.DIM), numpy.float32)
        target.observe_gradients(layer, k, v, *grads, q=q if queries else None)


@pytest.fixture
def seen(context, model):
    made = calibrator(context, model)
    for seed in range(3):
        observe(made, seed)
    return made


def test_statistics_are_those_of_the_numbers(context, model, random):
    made = calibrator(context, model)
    size = 200, oracle.KV_HEADS, oracle.DIM
    k, v, grad_k, grad_v = random.standard_normal((4, *size), numpy.float32)
    for part in (slice(0, 70), slice(70, 200)):
        made.observe_gradients(1, k[part], v[part], grad_k[part], grad_v[part])
    for x, grad, part in ((k, grad_k, 'k'), (v, grad_v, 'v')):
        x, grad = x.astype(float), grad.astype(float)
        assert abs(made.statistic(1, part, 'mean') - x.mean(0)).max() < 1e-6
        assert abs(made.statistic(1, part, 'variance') - x.var(0)).max() < 1e-6
        assert abs(made.statistic(1, part, 'sensitivity') - (grad ** 2).mean(0)).max() < 1e-6
        expected = (grad ** 2).mean(0) * x.var(0) / 2
        assert abs(made.statistic(1, part, 'loss') - expected).max() < 1e-6


def test_bits_go_where_the_gradients_are(seen):
    profile, info = seen.allocate(fkv.AllocationParams(target='bits', value=1.0))
    assert info.bits <= 1.0 and 0 < info.predicted_loss < info.carrier_loss
    for layer in range(oracle.LAYERS):
        k = profile.channels(layer, 'k')
        assert (k[:, -1] > 0).all() and (k[:, 0] == 0).all()
        assert (profile.channels(layer, 'v') == 0).all()
        assert abs(profile.carriers(layer, 'k') - seen.statistic(layer, 'k', 'mean')).max() < 1e-3


def test_ratio_is_that_of_the_estimate(seen):
    profile, info = seen.allocate(fkv.AllocationParams(value=6.0, tokens=65536))
    assert info.ratio >= 6 and info.tokens == 65536
    assert info.ratio == pytest.approx(profile.estimate(65536).ratio)


def test_target_that_cannot_be_met_says_what_can(seen):
    with pytest.raises(fkv.UnsupportedError, match=r'\d'):
        seen.allocate(fkv.AllocationParams(value=1e6, tokens=8192))


def test_merged_is_as_if_one_had_seen_all(context, model, seen):
    parts = [calibrator(context, model) for _ in range(2)]
    for seed in range(3):
        observe(parts[seed % 2], seed)
    parts[0].merge(parts[1])
    for part in 'kv':
        assert numpy.allclose(parts[0].statistic(0, part, 'variance'),
                              seen.statistic(0, part, 'variance'), rtol=1e-12)
    with pytest.raises(fkv.InvalidError):
        seen.merge(seen)
    with pytest.raises(TypeError):
        seen.merge(None)


def test_saved_statistics_come_back_whole(context, model, seen):
    data = seen.dumps()
    again = fkv.Calibrator.loads(context, data, model)
    assert again.dumps() == data
    assert again.allocate()[0].dumps() == seen.allocate()[0].dumps()
    for wrong in (data[:-1], data[:50], b'', data[:100] + bytes([data[100] ^ 1]) + data[101:]):
        with pytest.raises((fkv.FormatError, fkv.ChecksumError, fkv.InvalidError,
                            fkv.VersionError, fkv.MismatchError)):
            fkv.Calibrator.loads(context, wrong, model)
    other = fkv.ModelParams(**{**vars(model), 'n_layers': oracle.LAYERS + 1})
    with pytest.raises(fkv.MismatchError):
        fkv.Calibrator.loads(context, data, other)


def test_too_little_observed(context, model):
    made = calibrator(context, model)
    with pytest.raises(fkv.StateError):
        made.allocate()
    observe(made, 1)
    with pytest.raises(fkv.StateError):
        made.allocate()
    with pytest.raises(fkv.UnsupportedError):
        made.solve()


def test_without_gradients_queries_stand_in(context, model):
    made = calibrator(context, model)
    for seed in range(2):
        observe(made, seed, gradients=False)
    weights = numpy.zeros(SHAPE[1:])
    weights[0, 5] = 1
    for layer in range(oracle.LAYERS):
        made.weigh_values(layer, weights)
    profile, _ = made.allocate(fkv.AllocationParams(target='bits', value=2.0))
    v = profile.channels(0, 'v')
    assert v[0, 5] > 0 and v.sum() == v[0, 5]
    with pytest.raises(ValueError, match='weights'):
        made.weigh_values(0, weights[:1])


def test_profile_of_given_losses(context, model):
    losses = numpy.zeros(SHAPE)
    losses[0, 1, 7] = 1.0
    carriers = numpy.ones(SHAPE, 'f4')
    profile, info = fkv.Profile.allocated(
        context, model, losses, numpy.zeros(SHAPE),
        fkv.AllocationParams(target='loss', value=0.2), CODEC, k_carrier=carriers)
    assert info.predicted_loss <= 0.2 and info.carrier_loss == pytest.approx(1.0)
    assert profile.channels(0, 'k')[1, 7] > 0
    assert (profile.carriers(1, 'k') == 1).all() and (profile.carriers(1, 'v') == 0).all()
    with pytest.raises(ValueError, match='losses'):
        fkv.Profile.allocated(context, model, losses[0], losses)
    with pytest.raises(fkv.InvalidError):
        fkv.Profile.allocated(context, model, -losses, losses)


def test_other_criteria_have_no_sensitivities(context, model):
    made = fkv.Calibrator(context, model)
    for call in (made.allocate, made.dumps, lambda: made.statistic(0, 'k', 'mean')):
        with pytest.raises(fkv.UnsupportedError):
            call()


@pytest.mark.torch
@pytest.mark.parametrize('gradients', [True, False])
def test_calibrate_a_model_of_transformers(context, gradients):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=1024)
    model = transformers.LlamaForCausalLM(config)
    ids = numpy.random.default_rng(2).integers(0, 64, 1600).tolist()
    codec = fkv.CodecParams(n_local=64)
    profile, info = fkv.calibrate(model, [ids], 2.0, tokens=8192, window=512, codec=codec,
                                  context=context, progress=False, gradients=gradients)
    assert codec == fkv.CodecParams(n_local=64) and profile.info.n_local == 64
    assert info.ratio >= 2 and profile.info.coding == fkv.Coding.CALIBRATED
    assert all(p.requires_grad for p in model.parameters())
    profile.match(fkv.model_params(config))
