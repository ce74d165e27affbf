# SPDX-License-Identifier: Apache-2.0
"""Selection: attention within a finite scope."""
import fkv
import numpy
import oracle
import pytest

SMALL = dict(n_global=4, n_local=16, span=4, top_k=2, clip=3, chunk=8)


def unrotated(context, model, bits=16, flags=0, **more):
    codec = fkv.CodecParams(storage_dtype='f32', group=64, block=64, n_sink=4, n_local=16,
                            domain='unrotated', **more)
    return fkv.Cache(context, fkv.Profile.uniform(context, model, bits, codec), flags=flags)


@pytest.fixture
def filled(context, model, random):
    cache = unrotated(context, model)
    sequence, plan = cache.sequence(), cache.plan()
    q, k, v = oracle.tokens(random, 300)
    plan.update([sequence], 300)
    for layer in range(oracle.LAYERS):
        plan.append(layer, k, v)
    return cache, sequence, plan


def step(plan, sequence, random, layer=0):
    """Decodes one token in the layer, the others get it too."""
    q, k, v = oracle.tokens(random, 1)
    plan.update([sequence], 1)
    out = None
    for number in range(oracle.LAYERS):
        result = plan.append_attend(number, q, k, v)
        out = result if number == layer else out
        if number == layer:
            seen = plan.selection() if plan_selects(plan) else None
    return out, seen


def plan_selects(plan):
    try:
        plan.selection()
    except fkv.StateError:
        return False
    return True


def test_view_is_finite_and_spans_lie_in_the_middle(filled, random):
    cache, sequence, plan = filled
    plan.select(**SMALL)
    _, (selection, spans) = step(plan, sequence, random)
    assert selection.tokens == 301 and selection.layer == 0
    assert selection.view <= 4 + 3 * 4 + 16
    assert spans.shape == (selection.spans, 2) and 1 <= len(spans) <= 3
    assert (selection.middle_first, selection.middle_end) == (4, 285)
    assert (spans[:, 0] >= 4).all() and (spans[:, 1] <= 285).all()
    assert (spans[:, 1] > spans[:, 0]).all() and (spans[1:, 0] >= spans[:-1, 1]).all()


def test_scope_beyond_the_length_is_plain_attention(filled, random):
    cache, sequence, plan = filled
    twin = sequence.fork()
    seed = random.integers(1 << 30)
    plain, _ = step(plan, sequence, numpy.random.default_rng(seed))
    other = cache.plan()
    other.select(**{**SMALL, 'n_local': 4096})
    seen, (selection, spans) = step(other, twin, numpy.random.default_rng(seed))
    assert abs(seen - plain).max() < 1e-4
    assert selection.view == 301 and len(spans) == 0


def test_selecting_ends_with_select_of_nothing(filled, random):
    cache, sequence, plan = filled
    plan.select(fkv.SelectParams(**SMALL))
    step(plan, sequence, random)
    plan.select()
    step(plan, sequence, random)
    with pytest.raises(fkv.StateError):
        plan.selection()


def test_rotated_keys_cannot_be_selected(cache):
    with pytest.raises(fkv.UnsupportedError):
        cache.plan().select(**SMALL)


@pytest.mark.parametrize('wrong', [{'n_local': 0}, {'span': 0}, {'top_k': -1}, {'clip': -1},
                                   {'chunk': 0}, {'n_global': -1}, {'top_k': 257}])
def test_wrong_parameters(context, model, wrong):
    with pytest.raises(fkv.InvalidError):
        unrotated(context, model).plan().select(**{**SMALL, **wrong})


def test_unknown_field_and_both_ways(context, model):
    plan = unrotated(context, model).plan()
    with pytest.raises(TypeError):
        plan.select(scope=5)
    with pytest.raises(TypeError):
        plan.select(fkv.SelectParams(), clip=5)


def test_selection_of_no_such_sequence(filled, random):
    cache, sequence, plan = filled
    plan.select(**SMALL)
    step(plan, sequence, random)
    for index in (-1, 1):
        with pytest.raises(fkv.InvalidError):
            plan.selection(index)


def test_an_index_of_keys_changes_bytes_but_no_result(context, model, random):
    q, k, v = oracle.tokens(random, 500)
    results = []
    for flags in 0, fkv.KEY_INDEX:
        cache = unrotated(context, model, flags=flags)
        sequence, plan = cache.sequence(), cache.plan()
        plan.select(**SMALL)
        plan.update([sequence], 500)
        outs = [plan.append_attend(layer, q, k, v) for layer in range(oracle.LAYERS)]
        results.append((outs, plan.selection()[1], cache.stats()))
    (outs, spans, stats), (outs_indexed, spans_indexed, stats_indexed) = results
    assert all((a == b).all() for a, b in zip(outs, outs_indexed))
    assert len(spans) and (spans == spans_indexed).all()
    assert stats.bytes_index == 0
    assert stats_indexed.bytes - stats.bytes == pytest.approx(stats_indexed.bytes_index, rel=0.1)


def test_an_index_needs_unrotated_keys(context, model):
    for profile in fkv.Profile.exact(context, model), fkv.Profile.uniform(context, model, 16):
        with pytest.raises(fkv.UnsupportedError, match='index'):
            fkv.Cache(context, profile, flags=fkv.KEY_INDEX)
    with pytest.raises(fkv.UnsupportedError, match='flags'):
        fkv.Cache(context, fkv.Profile.exact(context, model), flags=2)
