# SPDX-License-Identifier: Apache-2.0
"""FkvCache as a cache: cropping, choosing, copying, errors in the middle, bytes."""
import copy
import gc

import numpy
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
import fkv.transformers  # noqa: E402
from fkv.transformers import FkvCache  # noqa: E402

import hf  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture
def model():
    return fkv.transformers.enable(hf.small())


def close(a, b):
    return (a - b).abs().max() < 1e-4 * b.abs().max()


def whole(model, ids, **more):
    """Logits without any cache."""
    return hf.last_logits(model, ids, **more)


def coded(model, bits=4):
    """A profile of few bits, with a short tail: much is coded soon."""
    params = fkv.model_params(model.config)
    codec = fkv.CodecParams(group=64, block=64, n_sink=2, n_local=16, storage_dtype='f32')
    return fkv.Profile.uniform(fkv.Context(threads=1), params, bits, codec)


def test_steps_of_any_length(model):
    ids = hf.prompt(60, 3)
    expected = whole(model, ids)
    cache = FkvCache(model)
    assert cache.get_seq_length() == 0 and cache.batch_size == -1 and not cache.is_initialized
    parts = []
    for a, b in ((0, 7), (7, 8), (8, 40), (40, 41), (41, 60)):
        parts.append(hf.last_logits(model, ids[:, a:b], cache))
        assert cache.get_seq_length() == b
    assert close(torch.cat(parts, 1), expected)
    assert cache.batch_size == 3 and cache.is_initialized and not cache.is_compileable and len(cache) == 3
    stats = cache.stats()
    assert stats.sequences == 3 and stats.tokens == 180 and stats.bytes >= 180 * 3 * 2 * 2 * 16 * 4
    assert repr(cache) == 'FkvCache(3 sequences, 60 tokens)'


def test_copies_share_and_part(model):
    ids = hf.prompt(80)
    cache = FkvCache(model)
    hf.last_logits(model, ids[:, :70], cache)
    before = cache.stats().bytes
    twins = [copy.deepcopy(cache) for _ in range(5)]
    assert cache.stats().bytes < 1.2 * before  # of all six
    other = hf.prompt(10, seed=8)
    for i, twin in enumerate(twins):
        more = ids[:, 70:] if i % 2 else other
        expected = whole(model, torch.cat((ids[:, :70], more), 1))[:, 70:]
        assert close(hf.last_logits(model, more, twin), expected)
    assert cache.get_seq_length() == 70
    assert close(hf.last_logits(model, ids[:, 70:], cache), whole(model, ids)[:, 70:])


def test_copy_with_windows():
    model = fkv.transformers.enable(hf.mixed())
    ids = hf.prompt(50)
    expected = whole(model, ids)[:, 40:]
    cache = FkvCache(model)
    hf.last_logits(model, ids[:, :40], cache)
    twin = copy.deepcopy(cache)
    hf.last_logits(model, hf.prompt(7, seed=5), twin)
    assert close(hf.last_logits(model, ids[:, 40:], cache), expected)


@pytest.mark.parametrize('leave', [True, False])
def test_crop(model, leave):
    ids = hf.prompt(60, 2)
    cache = FkvCache(model)
    hf.last_logits(model, torch.cat((ids[:, :50], hf.prompt(9, 2, seed=7)), 1), cache)
    cache.crop(50 if leave else -9)
    assert cache.get_seq_length() == 50
    cache.crop(99)
    cache.crop(-0 if fkv.transformers._cache.CROP_REMOVES else 50)
    assert cache.get_seq_length() == 50
    assert close(hf.last_logits(model, ids[:, 50:], cache), whole(model, ids)[:, 50:])


def test_crop_of_a_padded_batch(model):
    batch = hf.padded((30, 12))
    ids, mask = batch['input_ids'], batch['attention_mask']
    expected = whole(model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    cache = FkvCache(model)

    def step(a, b):
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, a:b]
        return hf.last_logits(model, ids[:, a:b], cache, attention_mask=mask[:, :b], position_ids=positions)

    step(0, 28)
    cache.crop(-14)  # into the padding of the second row
    assert cache.get_seq_length() == 14 and cache.store.lengths == [14, 0]
    got = step(14, 30)
    assert close(got[:, 4:], expected[:, 18:]) and close(got[0], expected[0, 14:])


def test_crop_among_coded_tokens_is_refused(model):
    cache = FkvCache(model, coded(model))
    hf.last_logits(model, hf.prompt(300), cache)
    assert cache.stats().tokens_coded > 200
    with pytest.raises(fkv.StateError, match='coded already. From'):
        cache.crop(-200)
    assert cache.get_seq_length() == 300
    cache.crop(-16)
    assert cache.get_seq_length() == 284
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.stats().sequences == 0
    hf.last_logits(model, hf.prompt(300), cache)


def test_reorder_and_choose(model):
    ids = hf.prompt(30, 3)
    expected = whole(model, ids)[:, 20:]
    cache = FkvCache(model)
    hf.last_logits(model, ids[:, :20], cache)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    got = hf.last_logits(model, ids[[2, 2, 0], 20:], cache)
    assert close(got, expected[[2, 2, 0]])
    cache.crop(-10)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    rows = [2, 2, 2, 2, 0, 0]
    assert close(hf.last_logits(model, ids[rows, 20:], cache), expected[rows])
    cache.crop(-10)
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert close(hf.last_logits(model, ids[[0, 2], 20:], cache), expected[[0, 2]])
    cache.crop(-10)
    cache.batch_select_indices(torch.tensor([False, True]))
    assert close(hf.last_logits(model, ids[2:, 20:], cache), expected[2:])
    assert cache.stats().sequences == 1


def test_positions_of_ones_own(model):
    """Positions that are not the tokens' numbers reach RoPE."""
    ids, positions = hf.prompt(40), 3 * torch.arange(40)[None] + 5
    expected = whole(model, ids, position_ids=positions)
    assert not close(expected, whole(model, ids))
    cache = FkvCache(model)
    got = [hf.last_logits(model, ids[:, a:b], cache, position_ids=positions[:, a:b])
           for a, b in ((0, 30), (30, 31), (31, 40))]
    assert close(torch.cat(got, 1), expected)


def test_error_in_the_middle_is_taken_back(model):
    """A step that only some layers have had leaves nothing behind."""
    ids = hf.prompt(50, 2)
    cache = FkvCache(model)

    def fail(*_):
        raise KeyboardInterrupt

    for done in (0, 30):
        with model.model.layers[1].mlp.register_forward_hook(fail), pytest.raises(KeyboardInterrupt):
            hf.last_logits(model, hf.prompt(9, 2, seed=6), cache)
        if not done:
            hf.last_logits(model, ids[:, :30], cache)
    assert close(hf.last_logits(model, ids[:, 30:], cache), whole(model, ids)[:, 30:])
    assert cache.get_seq_length() == 50 and cache.stats().tokens == 100
    with model.model.layers[0].mlp.register_forward_hook(fail), pytest.raises(KeyboardInterrupt):
        hf.last_logits(model, hf.prompt(9, 2, seed=6), cache)
    cache.crop(50)
    assert cache.stats().tokens == 100


def test_memory_is_given_back(model):
    context = fkv.Context(threads=1)
    fkv.transformers.enable(model, context=context)
    gc.collect()
    before = context.info.live_bytes
    for _ in range(3):
        model.generate(hf.prompt(100, 2), max_new_tokens=5, num_beams=3)
    gc.collect()
    assert context.info.live_bytes == before
    fkv.transformers.disable(model)


@pytest.mark.parametrize('bits', [8, 4])
def test_coded_caches_decode_in_libfkv(model, bits):
    """The logits are those of attention to what the cache holds, which the cache itself tells."""
    ids = hf.prompt(301)
    cache = FkvCache(model, coded(model, bits))
    prompt = hf.last_logits(model, ids[:, :300], cache)
    assert close(prompt, whole(model, ids[:, :300]))  # a prompt is attended to before it is coded
    k, v = zip(*(cache.store.rows[0].read(layer) for layer in range(3)))
    from transformers import DynamicCache
    held = DynamicCache(config=model.config)
    for layer in range(3):
        held.update(*(torch.from_numpy(numpy.ascontiguousarray(x[layer].transpose(1, 0, 2)))[None]
                      for x in (k, v)), layer)
    expected = hf.last_logits(model, ids[:, 300:], held)
    got = hf.last_logits(model, ids[:, 300:], cache)
    assert close(got, expected)
    exact = whole(model, ids)[:, 300:]
    assert not close(got, exact)
    assert (got - exact).abs().mean() < {8: .03, 4: .4}[bits] * exact.abs().mean()


def test_chunks_of_coded_prompts(model):
    """Later chunks see earlier ones as they are held."""
    ids = hf.prompt(400, 2)
    cache = FkvCache(model, coded(model, 8))
    got = torch.cat([hf.last_logits(model, part, cache) for part in ids.split(130, 1)], 1)
    expected = whole(model, ids)
    assert close(got[:, :130], expected[:, :130]) and not close(got, expected)
    assert (got - expected).abs().mean() < .02 * expected.abs().mean()


def test_profiles_of_all_layers_serve_models_with_windows():
    model = hf.mixed()
    params = fkv.model_params(model.config)
    context = fkv.Context(threads=1)
    random = numpy.random.default_rng(3)
    shape = 4, 2, 16
    bits = random.choice([0, 2, 4, 8], shape)
    carriers = [random.normal(size=shape).astype('f') for _ in 'kv']
    codec = fkv.CodecParams(group=64, block=64, n_sink=2, n_local=16)
    profile = fkv.Profile.coded(context, params, bits, bits, *carriers, codec)
    fkv.transformers.enable(model, profile)
    held = FkvCache(model).store.cache.profile
    assert held.info.n_layers == 2
    for i, layer in enumerate((0, 2)):
        assert (held.channels(i, 'k') == bits[layer]).all()
        assert (held.carriers(i, 'v') == profile.carriers(layer, 'v')).all()
    mask = random.random(shape) < .5
    fourier = fkv.Profile.fourier(context, params, mask, ~mask, fkv.FourierParams(bins=16, n_local=20))
    info = FkvCache(model, fourier).store.cache.profile.info
    assert info.n_layers == 2 and info.bins == 16 and info.n_local == 20
    assert info.k_fourier_channels == mask[[0, 2]].sum()
    exact = fkv.Profile.exact(context, params, 'f16')
    assert FkvCache(model, exact).store.cache.profile.info.storage_dtype == fkv.DType.F16
    model.generate(hf.prompt(200), max_new_tokens=3)


@pytest.mark.parametrize('own', [True, False])
def test_selection(model, own):
    """With longcache, a scope that holds everything changes nothing; a smaller one bounds what is seen."""
    ids = hf.prompt(500)
    expected = whole(model, ids)
    profile = None if own else coded(model, 16)  # of rotated keys: turned
    wide = FkvCache(model, profile, longcache=dict(n_local=600, chunk=64))
    assert close(torch.cat([hf.last_logits(model, x, wide) for x in ids.split(64, 1)], 1), expected)
    narrow = FkvCache(model, profile, longcache=dict(n_global=4, n_local=32, span=4, clip=4, chunk=32))
    got = [hf.last_logits(model, x, narrow) for x in (*ids[:, :496].split(32, 1), *ids[:, 496:].split(1, 1))]
    selection, spans = narrow.store.plan.selection()
    assert selection.tokens == 500 and selection.view <= 4 + 16 + 32 and len(spans)
    got = torch.cat(got, 1)
    assert close(got[:, :32], expected[:, :32]) and not close(got, expected)


def test_enabling_with_selection_runs_beyond_the_trained_length():
    model = hf.small(max_position_embeddings=64)
    fkv.transformers.enable(model, longcache=dict(n_global=4, n_local=32, span=4, clip=4, chunk=16))
    out = model.generate(hf.prompt(300), max_new_tokens=5, do_sample=False, prefill_chunk_size=16)
    assert out.shape == (1, 305)
