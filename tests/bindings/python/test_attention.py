# SPDX-License-Identifier: Apache-2.0
"""Appending and attending, against attention in float64."""
import itertools

import fkv
import numpy
import pytest

import oracle

CLOSE = dict(rtol=2e-5, atol=2e-5)


def prompt(cache, random, count, layer=0, **more):
    """(q, k, v), the outputs of a prompt in one step, and its sequence."""
    sequence, plan = cache.sequence(), cache.plan()
    plan.update([sequence], count)
    q, k, v = oracle.tokens(random, count, **more)
    out, lse = plan.append_attend(layer, q, k, v, lse=True)
    return (q, k, v), out, lse, sequence


@pytest.mark.parametrize('layout, rope_dim', [('none', 0), ('half_split', 16), ('half_split', 8),
                                              ('interleaved', 16), ('interleaved', 4)])
def test_prompt(context, random, layout, rope_dim):
    profile = fkv.Profile.exact(context, oracle.model(layout, rope_dim), 'f32')
    given, out, lse, _ = prompt(fkv.Cache(context, profile), random, 37)
    expected, expected_lse = oracle.causal(*given, layout, rope_dim)
    assert out.dtype == lse.dtype == numpy.float32
    numpy.testing.assert_allclose(out, expected, **CLOSE)
    numpy.testing.assert_allclose(lse, expected_lse, **CLOSE)


@pytest.mark.parametrize('q_heads, kv_heads', [(1, 1), (4, 4), (6, 2), (8, 1), (12, 3)])
def test_grouped_heads(context, random, q_heads, kv_heads):
    model = oracle.model(n_q_heads=q_heads, n_kv_heads=kv_heads)
    cache = fkv.Cache(context, fkv.Profile.exact(context, model, 'f32'))
    given, out, lse, _ = prompt(cache, random, 20, q_heads=q_heads, kv_heads=kv_heads)
    expected, expected_lse = oracle.causal(*given)
    numpy.testing.assert_allclose(out, expected, **CLOSE)
    numpy.testing.assert_allclose(lse, expected_lse, **CLOSE)


@pytest.mark.parametrize('change', [{'softmax_scale': 0.7}, {'rope_scaling': 1.3}])
def test_scales(context, random, change):
    cache = fkv.Cache(context, fkv.Profile.exact(context, oracle.model(**change), 'f32'))
    given, out, lse, _ = prompt(cache, random, 20)
    expected, expected_lse = oracle.causal(*given, scale=change.get('softmax_scale'),
                                           scaling=change.get('rope_scaling', 1.0))
    numpy.testing.assert_allclose(out, expected, **CLOSE)
    numpy.testing.assert_allclose(lse, expected_lse, **CLOSE)


@pytest.mark.parametrize('storage, bound', [('f16', 4e-3), ('bf16', 3e-2)])
def test_storage_types(context, model, random, storage, bound):
    cache = fkv.Cache(context, fkv.Profile.exact(context, model, storage))
    given, out, _, _ = prompt(cache, random, 40)
    expected, _ = oracle.causal(*given)
    assert 0 < numpy.abs(out - expected).max() < bound


def test_decode(cache, random):
    """Token by token on all layers, as a model does it."""
    sequence, plan = cache.sequence(), cache.plan()
    given = [oracle.tokens(random, 45) for _ in range(oracle.LAYERS)]
    expected = [oracle.causal(*each) for each in given]
    for token in range(45):
        plan.update([sequence], 1)
        for layer, each in enumerate(given):
            out, lse = plan.append_attend(layer, *(x[token:token + 1] for x in each), lse=True)
            numpy.testing.assert_allclose(out[0], expected[layer][0][token], **CLOSE)
            numpy.testing.assert_allclose(lse[0], expected[layer][1][token], **CLOSE)
        assert len(sequence) == token + 1


@pytest.mark.parametrize('which', ['exact', 'fourier'])
def test_any_split_of_appends_holds_the_same_bits(request, context, random, which):
    profile = request.getfixturevalue(which)
    cache = fkv.Cache(context, profile)
    given = [oracle.tokens(random, 330) for _ in range(oracle.LAYERS)]
    held, stats = [], []
    for cuts in ([330], [1] * 40 + [290], [64, 64, 2, 200], [100, 0, 229, 1]):
        sequence, plan, start = cache.sequence(), cache.plan(), 0
        for count in cuts:
            plan.update([sequence], count)
            for layer, (_, k, v) in enumerate(given):
                plan.append(layer, k[start:start + count], v[start:start + count])
            start += count
        held.append([part.tobytes() for layer in range(2) for part in sequence.read(layer)])
        stats.append(sequence.stats())
        q = given[0][0][:1]
        plan.update([sequence], 1)
        held[-1].append(plan.attend(0, q).tobytes())
    assert all(each == held[0] for each in held[1:])
    assert all(each.tokens_coded == stats[0].tokens_coded for each in stats)
    assert (stats[0].tokens_coded > 0) == (which == 'fourier')


def test_ragged_batch(cache, random):
    """Each sequence of a batch gets what it gets alone."""
    counts = [5, 0, 1, 17]
    sequences, plan = [cache.sequence() for _ in counts], cache.plan()
    history = [[numpy.zeros((0, heads, oracle.DIM), numpy.float32)
                for heads in (oracle.Q_HEADS, oracle.KV_HEADS, oracle.KV_HEADS)] for _ in counts]
    for _ in range(3):
        plan.update(sequences, counts)
        step = oracle.tokens(random, sum(counts))
        out = plan.append_attend(0, *step)
        plan.append(1, *step[1:])
        start = 0
        for number, count in enumerate(counts):
            history[number] = [numpy.concatenate([old, new[start:start + count]])
                               for old, new in zip(history[number], step)]
            expected, _ = oracle.causal(*history[number])
            numpy.testing.assert_allclose(out[start:start + count],
                                          expected[len(expected) - count:], **CLOSE)
            start += count
        counts = [1, 3, 1, 0]
    assert [len(s) for s in sequences] == [7, 6, 3, 17]
    assert cache.stats().tokens == 33 and cache.stats().sequences == 4


def test_batch_order_does_not_matter(cache, random):
    given = {name: oracle.tokens(random, 6) for name in 'abc'}
    results = []
    for order in itertools.permutations('abc'):
        plan = cache.plan()
        plan.update([cache.sequence() for _ in order], 6)
        out = plan.append_attend(0, *(numpy.concatenate([given[name][i] for name in order])
                                      for i in range(3)))
        results.append({name: out[6 * i:6 * i + 6].tobytes() for i, name in enumerate(order)})
    assert all(each == results[0] for each in results)


def test_positions(cache, random):
    where = numpy.array([7, 1, 900, 3, 3, 12])
    for given in (where, where.tolist(), tuple(where), where.astype(numpy.int32),
                  where.astype(numpy.uint8) if where.max() < 256 else where.astype(numpy.uint16)):
        q, k, v = oracle.tokens(random, 6)
        plan, sequence = cache.plan(), cache.sequence()
        plan.update([sequence], 6, positions=given)
        out = plan.append_attend(0, q, k, v)
        expected, _ = oracle.causal(q, k, v, positions=where)
        numpy.testing.assert_allclose(out, expected, **CLOSE)


def test_positions_matter(cache, random):
    q, k, v = oracle.tokens(random, 3)
    outs = []
    for positions in (None, [0, 1, 2], [0, 1, 5]):
        plan, sequence = cache.plan(), cache.sequence()
        plan.update([sequence], 3, positions)
        outs.append(plan.append_attend(0, q, k, v).tobytes())
    assert outs[0] == outs[1] != outs[2]


def test_attend_without_append_sees_earlier_steps(cache, random):
    sequence, plan = cache.sequence(), cache.plan()
    (_, k, v), _ = oracle.fill(cache, sequence, random, 11)
    plan.update([sequence], 2)
    q = oracle.tokens(random, 2)[0]
    out, lse = plan.attend(0, q, lse=True)
    expected, expected_lse = oracle.attention(
        oracle.rotate(q, [11, 12]), oracle.rotate(k, range(11)), v, [11, 11])
    numpy.testing.assert_allclose(out, expected, **CLOSE)
    numpy.testing.assert_allclose(lse, expected_lse, **CLOSE)
    assert len(sequence) == 11


def test_attend_after_append(cache, random):
    q, k, v = oracle.tokens(random, 9)
    plan, sequence = cache.plan(), cache.sequence()
    plan.update([sequence], 9)
    assert plan.append(0, k, v) is None
    numpy.testing.assert_allclose(plan.attend(0, q), oracle.causal(q, k, v)[0], **CLOSE)


def test_nothing_to_see(cache, random):
    plan, sequence = cache.plan(), cache.sequence()
    plan.update([sequence], 2)
    out, lse = plan.attend(0, oracle.tokens(random, 2)[0], lse=True)
    assert (out == 0).all() and (lse == -numpy.inf).all()


def test_merge_of_two_halves_is_the_whole(context, cache, random):
    whole, first, second = (cache.sequence() for _ in range(3))
    plan = cache.plan()
    _, k, v = oracle.tokens(random, 30)
    for sequence, part in ((whole, slice(0, 30)), (first, slice(0, 18)), (second, slice(18, 30))):
        plan.update([sequence], part.stop - part.start, range(part.start, part.stop))
        for layer in range(2):
            plan.append(layer, k[part], v[part])
    q = oracle.tokens(random, 1)[0]
    results = []
    for sequence in (whole, first, second):
        plan.update([sequence], 1, [30])
        results.append(plan.attend(0, q, lse=True))
    (expected, expected_lse), (out, lse), (other, other_lse) = results
    before = other.copy(), other_lse.copy()
    assert context.merge(out, lse, other, other_lse) is None
    numpy.testing.assert_allclose(out, expected, **CLOSE)
    numpy.testing.assert_allclose(lse, expected_lse, **CLOSE)
    assert (other == before[0]).all() and (other_lse == before[1]).all()


def test_merge_with_nothing(context, random):
    out = random.standard_normal((3, 4, 16)).astype(numpy.float32)
    lse = random.standard_normal((3, 4)).astype(numpy.float32)
    before = out.copy(), lse.copy()
    context.merge(out, lse, numpy.zeros_like(out), numpy.full_like(lse, -numpy.inf))
    assert (out == before[0]).all() and (lse == before[1]).all()


def test_merge_refuses(context, random):
    out, lse = numpy.zeros((3, 4, 16), 'f'), numpy.zeros((3, 4), 'f')
    for arguments, kind in (((out, lse, out.copy(), lse[:2].copy()), fkv.InvalidError),
                            ((out, lse.astype('e'), out.copy(), lse.copy()), fkv.InvalidError),
                            ((out, None, out.copy(), lse), TypeError)):
        with pytest.raises(kind):
            context.merge(*arguments)
    sealed = out.copy()
    sealed.flags.writeable = False
    with pytest.raises(ValueError, match='read-only'):
        context.merge(sealed, lse, out, lse.copy())
    context.merge(out, lse, sealed, lse.copy())


@pytest.mark.parametrize('storage, bound', [('f32', 1e-6), ('f16', 2e-3), ('bf16', 2e-2)])
def test_read_back(context, model, random, storage, bound):
    cache = fkv.Cache(context, fkv.Profile.exact(context, model, storage))
    sequence = cache.sequence()
    given = oracle.fill(cache, sequence, random, 50)
    for layer, (_, k, v) in enumerate(given):
        read_k, read_v = sequence.read(layer)
        numpy.testing.assert_allclose(read_k, oracle.rotate(k, range(50)), rtol=bound, atol=bound)
        numpy.testing.assert_allclose(read_v, v, rtol=bound, atol=bound)
        part_k, part_v = sequence.read(layer, 10, 7)
        assert (part_k == read_k[10:17]).all() and (part_v == read_v[10:17]).all()
        rest = sequence.read(layer, first=45)
        assert (rest[0] == read_k[45:]).all() and rest[1].shape == (5, 2, 16)
        half = sequence.read(layer, dtype=numpy.float16)
        assert half[0].dtype == numpy.float16
        assert (half[0] == read_k.astype(numpy.float16)).all()
        assert sequence.read(layer, 3, 0)[0].shape == (0, 2, 16)


def test_read_out_of_range(cache, random):
    sequence = cache.sequence()
    oracle.fill(cache, sequence, random, 5)
    for arguments, kind in (((0, 0, 6), fkv.InvalidError), ((0, 5, 1), fkv.InvalidError),
                            ((0, -1, 1), fkv.InvalidError), ((2,), fkv.InvalidError),
                            ((0, 0, -1), ValueError), ((0, 2**63, 1), OverflowError),
                            ((2**40,), OverflowError), ((0, 'a', 1), TypeError)):
        with pytest.raises(kind):
            sequence.read(*arguments)
    with pytest.raises(TypeError):
        sequence.read(0, dtype=numpy.float64)


def test_fourier_attends_what_it_holds(context, fourier, random):
    cache = fkv.Cache(context, fourier)
    sequence, plan = cache.sequence(), cache.plan()
    given = oracle.fill(cache, sequence, random, 300)
    assert sequence.stats().tokens_coded >= 192
    q = oracle.tokens(random, 1)[0]
    plan.update([sequence], 1)
    for layer, (_, k, v) in enumerate(given):
        held = sequence.read(layer)
        expected, expected_lse = oracle.attention(oracle.rotate(q, [300]), *held, [300])
        out, lse = plan.attend(layer, q, lse=True)
        numpy.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
        numpy.testing.assert_allclose(lse, expected_lse, rtol=1e-4, atol=1e-4)
        coded = fourier.channels(layer, 'v') == fkv.Channel.FOURIER
        middle = slice(2, 2 + 128)
        assert (held[1][middle][:, ~coded] == v[middle][:, ~coded]).all()
        assert (held[1][middle][:, coded] != v[middle][:, coded]).mean() > 0.9
        assert (held[1][:2] == v[:2]).all() and (held[1][-16:] == v[-16:]).all()


def test_fourier_keeps_what_its_bins_span(context, random):
    """A channel made of the first bins of its period comes back."""
    period, count = 256, 256 + 2 + 16
    mask = numpy.ones((1, 1, 8), bool)
    model = fkv.ModelParams(n_layers=1, n_q_heads=1, n_kv_heads=1, head_dim=8)
    cache = fkv.Cache(context, fkv.Profile.fourier(context, model, mask, mask, oracle.FOURIER))
    sequence = cache.sequence(period=period)
    time = (numpy.arange(count) - 2) * 2 * numpy.pi / period
    series = numpy.stack([numpy.cos((c % 8) * time + c) + 0.1 * c for c in range(8)], 1)
    v = series[:, None, :].astype(numpy.float32)
    plan = cache.plan()
    plan.update([sequence], count)
    plan.append(0, v, v)
    assert sequence.stats().tokens_coded == 256
    for held in sequence.read(0):
        numpy.testing.assert_allclose(held, v, atol=2e-5)


@pytest.mark.parametrize('outgrow', ['segment', 'error'])
def test_outgrowing_the_period(context, model, random, outgrow):
    mask = numpy.ones((2, 2, 16), bool)
    profile = fkv.Profile.fourier(context, model, mask, mask, {
        'bins': 8, 'n_sink': 2, 'n_local': 16, 'period': 128, 'outgrow': outgrow})
    cache = fkv.Cache(context, profile)
    sequence = cache.sequence()
    if outgrow == 'segment':
        oracle.fill(cache, sequence, random, 600)
        assert len(sequence) == 600 and sequence.stats().tokens_coded > 400
    else:
        oracle.fill(cache, sequence, random, 100)
        with pytest.raises(fkv.LimitError):
            oracle.fill(cache, sequence, random, 500)


def test_authors_restoration_can_be_had(context, model, random):
    mask = numpy.ones((2, 2, 16), bool)
    held = []
    for restoration in fkv.Restoration:
        profile = fkv.Profile.fourier(context, model, mask, mask, {
            'bins': 8, 'n_sink': 2, 'n_local': 16, 'period': 256, 'restoration': restoration})
        cache = fkv.Cache(context, profile)
        sequence = cache.sequence()
        oracle.fill(cache, sequence, numpy.random.default_rng(2), 200)
        held.append(sequence.read(0)[1])
        assert numpy.isfinite(held[-1]).all()
    assert (held[0] != held[1]).any() and (held[0][:2] == held[1][:2]).all()


def test_levels_agree(model, random):
    q, k, v = oracle.tokens(random, 70)
    with fkv.Context(threads=1) as probe:
        best = probe.info.best_cpu_level
    for level in range(1, best + 1):
        with fkv.Context(threads=1, cpu_level=level) as context:
            cache = fkv.Cache(context, fkv.Profile.exact(context, model, 'f32'))
            plan = cache.plan()
            sequence = cache.sequence()
            plan.update([sequence], 70)
            numpy.testing.assert_allclose(plan.append_attend(0, q, k, v),
                                          oracle.causal(q, k, v)[0], **CLOSE)


def test_threads_of_a_context_do_not_change_bits(model, random):
    q, k, v = oracle.tokens(random, 150)
    outs = set()
    for threads in (1, 2, 3, 8):
        with fkv.Context(threads=threads) as context:
            cache = fkv.Cache(context, fkv.Profile.exact(context, model))
            plan, sequence = cache.plan(), cache.sequence()
            plan.update([sequence], 150)
            outs.add(plan.append_attend(0, q, k, v).tobytes())
    assert len(outs) == 1
