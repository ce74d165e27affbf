# SPDX-License-Identifier: Apache-2.0
"""Calibrated profiles, and caches of them."""
import json
import subprocess
import sys

import fkv
import numpy
import oracle
import pytest

SHAPE = oracle.LAYERS, oracle.KV_HEADS, oracle.DIM
CODEC = fkv.CodecParams(storage_dtype='f32', group=64, block=64, n_sink=4, n_local=32)
LEVELS = numpy.array([0, 2, 3, 4, 8, 16])


@pytest.fixture
def coded(context, model, random):
    bits = [random.choice(LEVELS, SHAPE) for _ in range(2)]
    carriers = [random.standard_normal(SHAPE) for _ in range(2)]
    return fkv.Profile.coded(context, model, *bits, *carriers, CODEC), bits, carriers


def fill(cache, tokens, random):
    """(sequence, k, v) with the same tokens in every layer"""
    sequence, plan = cache.sequence(), cache.plan()
    k, v = random.standard_normal((2, tokens, oracle.KV_HEADS, oracle.DIM), numpy.float32)
    plan.update([sequence], tokens)
    for layer in range(oracle.LAYERS):
        plan.append(layer, k, v)
    return sequence, k, v


def test_says_what_it_was_told(coded):
    profile, bits, carriers = coded
    for part in (0, 1):
        for layer in range(oracle.LAYERS):
            assert (profile.channels(layer, part) == bits[part][layer]).all()
            assert (profile.carriers(layer, part) == carriers[part][layer].astype('f4')).all()
    info = profile.info
    assert info.coding == fkv.Coding.CALIBRATED and info.domain == fkv.Domain.ROTATED
    assert (info.group, info.block, info.n_sink, info.n_local) == (64, 64, 4, 32)
    assert info.k_bits > bits[0].mean() / 2


def test_text_holds_all_of_it(context, coded):
    profile = coded[0]
    again = fkv.Profile.loads(context, profile.dumps())
    assert again.dumps() == profile.dumps()
    assert (again.carriers(0, 'v') == profile.carriers(0, 'v')).all()


def test_error_falls_with_the_bits_and_bytes_grow(context, model, random):
    errors, sizes = [], []
    for bits in (2, 3, 4, 8, 16):
        cache = fkv.Cache(context, fkv.Profile.uniform(context, model, bits, CODEC))
        sequence, _, v = fill(cache, 300, random)
        stats = sequence.stats()
        assert stats.tokens_coded > 0
        errors.append(abs(sequence.read(0)[1] - v).max())
        sizes.append(stats.bytes_blocks)
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] == 0
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 8


def test_attention_is_that_over_what_is_held(context, coded, random):
    cache = fkv.Cache(context, coded[0])
    sequence, _, _ = fill(cache, 200, random)
    plan = cache.plan()
    plan.update([sequence], 1)
    q = random.standard_normal((1, oracle.Q_HEADS, oracle.DIM), numpy.float32)
    k, v = (array.astype(float) for array in sequence.read(1))
    # Positions 0: what the query is rotated by must not matter for this check.
    plan.update([sequence], 1, positions=[0])
    out = plan.attend(1, q)
    group = oracle.Q_HEADS // oracle.KV_HEADS
    for head in range(oracle.Q_HEADS):
        scores = k[:, head // group] @ q[0, head].astype(float) / numpy.sqrt(oracle.DIM)
        weights = numpy.exp(scores - scores.max())
        expected = weights @ v[:, head // group] / weights.sum()
        assert abs(out[0, head] - expected).max() < 1e-4


def test_estimate_is_what_is_allocated(context, coded, random):
    cache = fkv.Cache(context, coded[0])
    held = fill(cache, 500, random)
    assert len(held[0]) == 500 and cache.stats().bytes == coded[0].estimate(500).bytes


def test_of_another_model(coded, model):
    profile = coded[0]
    profile.match(model)
    other = fkv.ModelParams(**{**vars(model), 'head_dim': oracle.DIM + 8})
    with pytest.raises(fkv.MismatchError, match='head_dim'):
        profile.match(other)


@pytest.mark.parametrize('bits', [1, 5, 17, 255])
def test_bits_outside_the_set(context, model, bits):
    good = numpy.full(SHAPE, 2)
    with pytest.raises(fkv.InvalidError):
        fkv.Profile.coded(context, model, good, numpy.where(good, bits, 0), params=CODEC)


@pytest.mark.parametrize('bits', [numpy.full(SHAPE, 256), numpy.full(SHAPE, -1),
                                  numpy.full(SHAPE, 2.0), numpy.full(SHAPE[1:], 2)])
def test_bits_that_are_no_bytes(context, model, bits):
    with pytest.raises(ValueError, match='k_bits'):
        fkv.Profile.coded(context, model, bits, numpy.full(SHAPE, 2), params=CODEC)


@pytest.mark.parametrize('carrier', [numpy.full(SHAPE, numpy.nan), numpy.full(SHAPE, 1e9)])
def test_carriers_that_cannot_be(context, model, carrier):
    bits = numpy.full(SHAPE, 2)
    with pytest.raises(fkv.InvalidError):
        fkv.Profile.coded(context, model, bits, bits, carrier, params=CODEC)


def test_command_line_shows_bits(coded, tmp_path):
    profile, bits, _ = coded
    profile.save(tmp_path / 'p.json')
    command = [sys.executable, '-m', 'fkv', 'profile', 'show', str(tmp_path / 'p.json')]
    shown = json.loads(subprocess.check_output(command + ['--json']))
    assert numpy.allclose(shown['bits']['k'], bits[0].mean(axis=2))
    text = subprocess.check_output(command, text=True)
    assert 'mean bits of a channel' in text and 'calibrated profile' in text


def test_meter_tells_good_codings_from_bad_ones(context, model, random):
    errors = []
    for bits in (2, 8):
        cache = fkv.Cache(context, fkv.Profile.uniform(context, model, bits, CODEC))
        with pytest.raises(fkv.StateError):
            cache.fidelity()
        cache.meter()
        sequence, plan = cache.sequence(), cache.plan()
        plan.update([sequence], 300)
        for layer in range(oracle.LAYERS):
            plan.append_attend(layer, *oracle.tokens(random, 300))
        found = cache.fidelity()
        assert found.fraction == 1 and found.blocks_missed == 0
        assert found.blocks == oracle.LAYERS * (300 - 4 - 32) // 64
        assert cache.fidelity(0).blocks * oracle.LAYERS == found.blocks
        errors.append(found.block_error)
        for bad in (-1, 1.5):
            with pytest.raises(fkv.InvalidError):
                cache.meter(bad)
        with pytest.raises(fkv.InvalidError):
            cache.fidelity(oracle.LAYERS)
        cache.meter(0)
        with pytest.raises(fkv.StateError):
            cache.fidelity()
    assert errors[0] > 10 * errors[1] > 0
    with pytest.raises(fkv.UnsupportedError):
        fkv.Cache(context, fkv.Profile.exact(context, model)).meter()
