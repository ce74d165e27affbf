# SPDX-License-Identifier: Apache-2.0
"""Forks and crops of sequences."""
import gc

import numpy
import pytest

import fkv

DIM = 16


@pytest.fixture
def cache():
    context = fkv.Context(threads=1)
    model = fkv.ModelParams(n_layers=1, n_q_heads=1, n_kv_heads=1, head_dim=DIM)
    return fkv.Cache(context, fkv.Profile.exact(context, model, 'f32'))


@pytest.fixture
def coded_cache():
    """Everything compressed, 64 local tokens: coding begins early."""
    context = fkv.Context(threads=1)
    model = fkv.ModelParams(n_layers=1, n_q_heads=1, n_kv_heads=1, head_dim=DIM)
    mask = numpy.ones((1, 1, DIM), bool)
    params = fkv.FourierParams(bins=8, n_local=64, n_sink=4, period=256, min_middle=1)
    return fkv.Cache(context, fkv.Profile.fourier(context, model, mask, mask, params))


def append(sequence, tokens, seed):
    plan = sequence.cache.plan()
    plan.update([sequence], tokens)
    k, v = numpy.random.default_rng(seed).standard_normal((2, tokens, 1, DIM), numpy.float32)
    plan.append(0, k, v)


def held(sequence):
    return numpy.stack(sequence.read(0))


def test_fork_holds_the_same_and_shares_it(cache):
    parent = cache.sequence()
    append(parent, 200, 1)
    before = cache.stats().bytes
    child = parent.fork()
    assert child.id != parent.id and len(child) == 200
    assert (held(child) == held(parent)).all()
    assert child.stats().bytes_shared > 0
    assert cache.stats().bytes < 1.1 * before


def test_what_one_writes_the_other_does_not_see(cache):
    parent = cache.sequence()
    append(parent, 100, 1)
    before = held(parent)
    child = parent.fork()
    append(child, 5, 2)
    append(parent, 3, 3)
    assert (held(parent)[:, :100] == before).all() and (held(child)[:, :100] == before).all()
    assert len(parent) == 103 and len(child) == 105
    assert not (held(parent)[:, 100:103] == held(child)[:, 100:103]).any()


def test_parent_may_go_first(cache):
    parent = cache.sequence()
    append(parent, 130, 1)
    before = held(parent)
    child = parent.fork()
    del parent
    gc.collect()
    assert cache.stats().sequences == 1
    assert (held(child) == before).all()
    assert cache.stats().bytes_shared == 0


def test_crop_leaves_what_was_there(cache):
    sequence = cache.sequence()
    append(sequence, 77, 1)
    before = held(sequence)
    append(sequence, 9, 2)
    sequence.crop(77)
    assert len(sequence) == 77 and (held(sequence) == before).all()
    append(sequence, 9, 2)
    assert len(sequence) == 86
    sequence.crop(0)
    assert len(sequence) == 0


def test_crop_of_exact_tokens_has_no_limit(cache):
    sequence = cache.sequence()
    append(sequence, 100, 1)
    assert sequence.crop_limit == 0
    assert sequence.crop_floor(37) == 37


def test_crop_into_coded_tokens_is_refused_and_says_what_can_be(coded_cache):
    sequence = coded_cache.sequence()
    append(sequence, 300, 1)
    limit = sequence.crop_limit
    assert 0 < limit < 300
    before = held(sequence)
    with pytest.raises(fkv.StateError, match=str(limit)):
        sequence.crop(limit - 1)
    assert (held(sequence) == before).all()
    assert sequence.crop_floor(limit - 1) < limit - 1
    sequence.crop(limit)
    assert len(sequence) == limit


@pytest.mark.parametrize('tokens', [-1, 11])
def test_crop_to_more_or_less_than_there_is(cache, tokens):
    sequence = cache.sequence()
    append(sequence, 10, 1)
    with pytest.raises(fkv.InvalidError):
        sequence.crop(tokens)
    with pytest.raises(fkv.InvalidError):
        sequence.crop_floor(tokens)


def test_freed_sequences(cache):
    sequence = cache.sequence()
    sequence.free()
    for call in (sequence.fork, lambda: sequence.crop(0), lambda: sequence.crop_limit):
        with pytest.raises(fkv.HandleError):
            call()


def test_plan_is_outdated_by_a_crop(cache):
    sequence, plan = cache.sequence(), cache.plan()
    append(sequence, 10, 1)
    plan.update([sequence], 1)
    sequence.crop(5)
    k = numpy.zeros((1, 1, DIM), numpy.float32)
    with pytest.raises(fkv.StateError):
        plan.append(0, k, k)
    assert len(sequence) == 5
