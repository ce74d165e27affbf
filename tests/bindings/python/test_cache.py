# SPDX-License-Identifier: Apache-2.0
"""Caches, sequences and plans as objects: limits, life and death, the order of calls."""
import gc
import itertools
import weakref

import fkv
import numpy
import pytest

import oracle


def test_empty_cache(cache):
    stats = cache.stats()
    assert stats.sequences == stats.tokens == stats.dense_bytes == 0 and stats.ratio == 0
    assert repr(cache) == '<fkv.Cache>'


def test_sequences(cache, random):
    a, b = cache.sequence(), cache.sequence()
    assert a.id != b.id and min(a.id, b.id) >= 0 and a.cache is cache
    assert a and b and len(a) == len(b) == 0
    oracle.fill(cache, a, random, 12)
    assert (len(a), len(b)) == (12, 0)
    assert repr(a) == f'<fkv.Sequence {a.id}>'
    assert cache.stats().tokens == a.stats().tokens == 12 and b.stats().tokens == 0


def test_stats_add_up(context, fourier, random):
    cache = fkv.Cache(context, fourier)
    sequences = [cache.sequence() for _ in range(3)]
    for sequence, count in zip(sequences, (10, 150, 300)):
        oracle.fill(cache, sequence, random, count)
    each, total = [s.stats() for s in sequences], cache.stats()
    for stats in each + [total]:
        assert stats.tokens == stats.tokens_exact + stats.tokens_coded
        assert stats.bytes == (stats.bytes_exact + stats.bytes_kept + stats.bytes_coefficients
                               + stats.bytes_tables)
        assert stats.dense_bytes == 4 * 2 * 16 * 2 * stats.tokens
        assert stats.ratio == pytest.approx(stats.dense_bytes / stats.bytes)
    for name in ('tokens', 'tokens_coded', 'bytes_exact', 'bytes_kept', 'bytes_coefficients',
                 'dense_bytes'):
        assert getattr(total, name) == sum(getattr(stats, name) for stats in each)
    assert total.bytes >= sum(stats.bytes for stats in each)
    assert total.sequences == 3 and each[0].sequences == 1


def test_stats_are_bytes_of_the_context(context, exact, random):
    cache = fkv.Cache(context, exact)
    sequence = cache.sequence()
    before, held = context.info.live_bytes, cache.stats().bytes
    with cache.plan() as plan:
        plan.update([sequence], 500)
        planned = context.info.live_bytes
        for layer in range(2):
            plan.append(layer, *oracle.tokens(random, 500)[1:])
        grown = context.info.live_bytes - planned
    assert grown == cache.stats().bytes - held > 0
    assert context.info.live_bytes == before + grown
    sequence.free()
    assert context.info.live_bytes < before


def test_freed_sequence(cache, random):
    sequence, other = cache.sequence(), cache.sequence()
    oracle.fill(cache, sequence, random, 3)
    plan = cache.plan()
    sequence.free()
    sequence.free()
    assert not sequence and repr(sequence).endswith('(freed)>')
    for use in (lambda: len(sequence), sequence.stats, lambda: sequence.read(0, 0, 1),
                lambda: plan.update([other, sequence], 1)):
        with pytest.raises(fkv.HandleError, match=str(sequence.id)):
            use()
    assert cache.sequence().id != sequence.id and len(other) == 0


def test_sequence_freed_after_update(cache, random):
    sequence, plan = cache.sequence(), cache.plan()
    plan.update([sequence], 1)
    sequence.free()
    q, k, v = oracle.tokens(random, 1)
    with pytest.raises(fkv.Error) as caught:
        plan.append_attend(0, q, k, v)
    assert isinstance(caught.value, (fkv.StateError, fkv.HandleError))


def test_planned_sequence_is_not_garbage(cache, random):
    plan = cache.plan()
    plan.update([cache.sequence()], 4)
    gc.collect()
    q, k, v = oracle.tokens(random, 4)
    numpy.testing.assert_allclose(plan.append_attend(0, q, k, v), oracle.causal(q, k, v)[0],
                                  rtol=2e-5, atol=2e-5)
    assert cache.stats().sequences == 1
    plan.update([], 0)
    gc.collect()
    assert cache.stats().sequences == 0


def test_sequence_as_garbage_is_freed(cache, random):
    sequence = cache.sequence()
    oracle.fill(cache, sequence, random, 100)
    before = cache.stats()
    assert (before.sequences, before.tokens) == (1, 100)
    del sequence
    gc.collect()
    assert cache.stats().sequences == cache.stats().tokens == 0


def test_with_blocks(context, exact, random):
    with fkv.Cache(context, exact) as cache, cache.plan() as plan, cache.sequence() as sequence:
        plan.update([sequence], 1)
    assert cache.closed and plan.closed and not sequence


def test_everything_goes_without_closing(leak_free, model, random):
    profile = fkv.Profile.exact(leak_free, model)
    cache = fkv.Cache(leak_free, profile)
    sequence, plan = cache.sequence(), cache.plan()
    oracle.fill(cache, sequence, random, 80)
    dead = [weakref.ref(x) for x in (profile, cache, plan)]
    del profile, cache, sequence, plan
    assert [ref() for ref in dead] == [None] * 3, 'no cycles: freed at once'


def make_all(model, random):
    context = fkv.Context(threads=1)
    profile = fkv.Profile.exact(context, model)
    cache = fkv.Cache(context, profile)
    sequence, plan = cache.sequence(), cache.plan()
    plan.update([sequence], 3)
    plan.append_attend(0, *oracle.tokens(random, 3))
    return {'context': context, 'profile': profile, 'cache': cache, 'sequence': sequence,
            'plan': plan}


@pytest.mark.parametrize('how', ['close', 'garbage'])
def test_every_order_of_closing(model, random, how):
    for order in itertools.permutations(['context', 'profile', 'cache', 'sequence', 'plan']):
        objects = make_all(model, random)
        for name in order:
            if how == 'garbage':
                del objects[name]
            elif name == 'sequence':
                objects[name].free()
                assert not objects[name]
            else:
                objects[name].close()
                assert objects[name].closed


def test_profile_and_context_may_go_first(model, random):
    objects = make_all(model, random)
    cache, sequence, plan = (objects[name] for name in ('cache', 'sequence', 'plan'))
    objects['profile'].close()
    objects['context'].close()
    q, k, v = oracle.tokens(random, 3)
    plan.append_attend(1, q, k, v)
    assert len(sequence) == 3 and cache.stats().tokens == 3
    k_held, v_held = sequence.read(1)
    numpy.testing.assert_allclose(v_held, v, atol=2e-3)
    assert k_held.shape == (3, 2, 16)
    with pytest.raises(fkv.InvalidError):
        plan.append(7, k, v)


def test_closed_cache(cache, random):
    sequence, plan = cache.sequence(), cache.plan()
    plan.update([sequence], 1)
    cache.close()
    q, k, v = oracle.tokens(random, 1)
    for use in (cache.stats, cache.sequence, cache.plan, sequence.stats, lambda: len(sequence),
                lambda: sequence.read(0, 0, 0)):
        with pytest.raises(fkv.HandleError, match='the cache is closed'):
            use()
    for use in (lambda: plan.append(0, k, v), lambda: plan.attend(0, q),
                lambda: plan.append_attend(0, q, k, v), lambda: plan.update([], 0)):
        with pytest.raises(fkv.HandleError, match='cache'):
            use()
    sequence.free()
    plan.close()


def test_closed_plan(cache, random):
    plan = cache.plan()
    plan.close()
    q, k, v = oracle.tokens(random, 1)
    for use in (lambda: plan.update([], 0), lambda: plan.append(0, k, v),
                lambda: plan.attend(0, q), lambda: plan.append_attend(0, q, k, v)):
        with pytest.raises(fkv.HandleError, match='the plan is closed'):
            use()


def test_closed_profile_makes_no_cache(context, exact):
    exact.close()
    with pytest.raises(fkv.HandleError, match='the profile is closed'):
        fkv.Cache(context, exact)


def test_profile_of_another_context(exact):
    with fkv.Context(threads=1) as other:
        try:
            cache = fkv.Cache(other, exact)
        except fkv.Error as error:
            assert str(error)
        else:
            assert cache.stats().tokens == 0


def test_max_tokens_of_a_cache(context, exact, random):
    cache = fkv.Cache(context, exact, max_tokens=10)
    sequence, plan = cache.sequence(), cache.plan()
    oracle.fill(cache, sequence, random, 10)
    with pytest.raises(fkv.LimitError):
        plan.update([sequence], 1)
    assert len(sequence) == 10


def test_max_bytes_of_a_cache(context, exact, random):
    cache = fkv.Cache(context, exact, max_bytes=400_000)
    sequence = cache.sequence()
    with pytest.raises(fkv.LimitError):
        for _ in range(100):
            oracle.fill(cache, sequence, random, 100)
    assert 0 < cache.stats().bytes <= 400_000


@pytest.mark.parametrize('period, kind', [(-1, fkv.InvalidError), (1, fkv.InvalidError),
                                          (2**63, OverflowError), (1.5, TypeError)])
def test_wrong_period(context, fourier, period, kind):
    cache = fkv.Cache(context, fourier)
    with pytest.raises(kind):
        cache.sequence(period=period)
    assert cache.stats().sequences == 0


def test_unknown_keywords(context, exact, cache):
    with pytest.raises(TypeError, match='tokens'):
        fkv.Cache(context, exact, tokens=5)
    with pytest.raises(TypeError, match='length'):
        cache.sequence(length=5)


@pytest.mark.parametrize('wrong', [None, 'x', 5, object()])
def test_wrong_objects(context, exact, cache, wrong):
    for use in (lambda: fkv.Cache(wrong, exact), lambda: fkv.Cache(context, wrong),
                lambda: fkv.Cache(exact, context), lambda: fkv.Plan(wrong),
                lambda: cache.plan().update([wrong], 1), lambda: cache.plan().update(5, 1)):
        with pytest.raises(TypeError):
            use()


def test_sequence_of_another_cache(context, exact, cache):
    with pytest.raises(ValueError, match='not of this cache'):
        cache.plan().update([fkv.Cache(context, exact).sequence()], 1)


def test_empty_batch(cache):
    plan = cache.plan()
    plan.update([], [])
    q, k = numpy.zeros((0, 4, 16), 'f'), numpy.zeros((0, 2, 16), 'f')
    out, lse = plan.append_attend(0, q, k, k, lse=True)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


def test_plan_before_update(cache, random):
    q, k, v = oracle.tokens(random, 1)
    with pytest.raises(fkv.Error):
        cache.plan().append_attend(0, q, k, v)


@pytest.mark.parametrize('counts, kind, text', [
    ([1, 2], ValueError, 'entries'), ([], ValueError, 'entries'), ([1.5], TypeError, None),
    ([numpy.float32(1.5)], TypeError, None), (1.0, TypeError, None), ('1', TypeError, None),
    (None, TypeError, None), (-1, fkv.InvalidError, 'negative'), (2**62, fkv.LimitError, None),
    (2**63, OverflowError, None), ([2**70], OverflowError, None),
])
def test_wrong_counts(cache, counts, kind, text):
    with pytest.raises(kind, match=text):
        cache.plan().update([cache.sequence()], counts)


@pytest.mark.parametrize('counts', [3, [3], (3,), numpy.int64(3), numpy.array([3]),
                                    numpy.array([3], numpy.uint8), iter([3])])
def test_counts(cache, random, counts):
    plan, sequence = cache.plan(), cache.sequence()
    plan.update([sequence], counts)
    for layer in range(2):
        plan.append(layer, *oracle.tokens(random, 3)[1:])
    assert len(sequence) == 3


@pytest.mark.parametrize('positions, kind', [
    ([0], fkv.InvalidError), ([0, 1, 2], fkv.InvalidError), ([0, -1], fkv.InvalidError),
    ([0, 2**31], fkv.InvalidError), ([0, 2**63], OverflowError), ([0, 2**70], OverflowError),
    ([0.0, 1.0], TypeError), ([0.5, 1.5], TypeError), (['a', 'b'], TypeError), (5, ValueError),
    ([[0, 1]], ValueError), ([None, None], TypeError), (numpy.array([0, 2**63], 'u8'),
                                                        OverflowError),
])
def test_wrong_positions(cache, positions, kind):
    plan, sequence = cache.plan(), cache.sequence()
    with pytest.raises(kind):
        plan.update([sequence], 2, positions)


def test_same_sequence_twice(cache):
    sequence = cache.sequence()
    with pytest.raises(fkv.InvalidError, match='again'):
        cache.plan().update([sequence, sequence], 1)


def test_each_layer_once_in_a_step(cache, random):
    plan, sequence = cache.plan(), cache.sequence()
    plan.update([sequence], 2)
    q, k, v = oracle.tokens(random, 2)
    plan.append(0, k, v)
    with pytest.raises(fkv.StateError, match='layer 0'):
        plan.append(0, k, v)
    with pytest.raises(fkv.StateError, match='layer 0'):
        plan.append_attend(0, q, k, v)
    with pytest.raises(fkv.StateError):
        plan.update([sequence], 1)
    plan.append(1, k, v)
    plan.update([sequence], 1)
    assert len(sequence) == 2


def test_outdated_plan(cache, random):
    a, b, sequence = cache.plan(), cache.plan(), cache.sequence()
    _, k, v = oracle.tokens(random, 2)
    a.update([sequence], 2)
    b.update([sequence], 2)
    for layer in range(2):
        a.append(layer, k, v)
    with pytest.raises(fkv.StateError):
        b.append(0, k, v)
    b.update([sequence], 2)
    b.append(0, k, v)


@pytest.mark.parametrize('layer, kind', [(-1, fkv.InvalidError), (2, fkv.InvalidError),
                                         (2**31, OverflowError), (2**63, OverflowError),
                                         (0.5, TypeError), ('0', TypeError), (None, TypeError)])
def test_wrong_layer(cache, random, layer, kind):
    plan, sequence = cache.plan(), cache.sequence()
    plan.update([sequence], 1)
    q, k, v = oracle.tokens(random, 1)
    for use in (lambda: plan.append(layer, k, v), lambda: plan.attend(layer, q),
                lambda: plan.append_attend(layer, q, k, v)):
        with pytest.raises(kind):
            use()


def test_a_failed_call_changes_nothing(cache, random):
    plan, sequence = cache.plan(), cache.sequence()
    plan.update([sequence], 2)
    q, k, v = oracle.tokens(random, 2)
    bad = v.copy()
    bad[1, 1, 15] = numpy.inf
    out, lse = numpy.full((2, 4, 16), 7, 'f'), numpy.full((2, 4), 7, 'f')
    stats = cache.stats()
    with pytest.raises(fkv.NonFiniteError, match='v'):
        plan.append_attend(0, q, k, bad, out, lse)
    assert (out == 7).all() and (lse == 7).all() and cache.stats() == stats
    plan.append_attend(0, q, k, v, out, lse)
    numpy.testing.assert_allclose(out, oracle.causal(q, k, v)[0], rtol=2e-5, atol=2e-5)
