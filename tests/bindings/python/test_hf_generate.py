# SPDX-License-Identifier: Apache-2.0
"""generate() with an exact cache of libfkv gives the tokens that it gives with the framework's own."""
import copy

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
import fkv.transformers  # noqa: E402

import hf  # noqa: E402

pytestmark = pytest.mark.torch

RAGGED = 37, 5, 64, 21


@pytest.fixture(scope='module', params=[*hf.FAMILIES, 'mixed', 'needle'])
def model(request):
    """Models with full attention, one with sliding windows in between, and the shipped one."""
    if request.param in hf.FAMILIES:
        return hf.small(request.param)
    return hf.mixed() if request.param == 'mixed' else hf.needle()


@pytest.fixture(params=['fkv', 'framework'])
def prefill(request):
    return request.param


def both(model, prefill='auto', seed=None, **arguments):
    """Tokens with the framework's cache and with ours; a FkvCache must have been used."""
    made = []
    make = fkv.transformers.FkvCache.__init__

    def count(self, *args, **kwargs):
        made.append(self)
        make(self, *args, **kwargs)

    def run():
        if seed is not None:
            torch.manual_seed(seed)
        return model.generate(**arguments)

    expected = run()
    fkv.transformers.enable(model, prefill=prefill)
    fkv.transformers.FkvCache.__init__ = count
    try:
        got = run()
    finally:
        fkv.transformers.FkvCache.__init__ = make
        fkv.transformers.disable(model)
    assert len(made) == 1 and made[0].store.columns >= got.shape[1] - 1 - (got == 0).all(0).sum()
    return expected, got


def check(*args, **kwargs):
    expected, got = both(*args, **kwargs)
    assert torch.equal(expected, got)
    return got


def test_greedy(model, prefill):
    out = check(model, prefill, input_ids=hf.prompt(50, 2), max_new_tokens=60, do_sample=False)
    assert len(out[0, 50:].unique()) > 4  # not one token again and again


def test_ragged_batch(model, prefill):
    check(model, prefill, **hf.padded(RAGGED), max_new_tokens=40, do_sample=False)


def test_beam_search(model, prefill):
    check(model, prefill, **hf.padded((30, 17)), max_new_tokens=40, num_beams=4, do_sample=False,
          num_return_sequences=2)


def test_sampling(model):
    check(model, seed=5, **hf.padded((30, 17)), max_new_tokens=60, do_sample=True, top_k=40, temperature=1.3)


def test_sampling_with_beams(model):
    check(model, seed=5, input_ids=hf.prompt(30), max_new_tokens=30, do_sample=True, num_beams=3)


@pytest.mark.parametrize('chunk', [16, 33])
def test_chunked_prefill(model, chunk):
    from transformers import DynamicCache
    arguments = dict(**hf.padded(RAGGED), max_new_tokens=20, do_sample=False, prefill_chunk_size=chunk)
    # 5.0 chunks prompts only for caches that it is given.
    expected = model.generate(**arguments, **{hf.cache_name(): DynamicCache(config=model.config)})
    fkv.transformers.enable(model)
    try:
        cache = fkv.transformers.FkvCache(model)
        got = model.generate(**arguments, **{hf.cache_name(): cache})
    finally:
        fkv.transformers.disable(model)
    assert torch.equal(got, expected) and cache.get_seq_length() == max(RAGGED) + 19


def test_drafts_from_the_prompt(model):
    ids = hf.prompt(20).repeat(1, 3)  # so that there is something to find
    skip_if_windows_cannot_be_cropped(model)
    check(model, input_ids=ids, max_new_tokens=60, do_sample=False, prompt_lookup_num_tokens=5)


@pytest.mark.parametrize('seed', [1, 9])
def test_assistant(model, seed):
    """An assistant that is always right (the same model) or mostly wrong (another one)."""
    skip_if_windows_cannot_be_cropped(model)
    assistant = copy.deepcopy(model) if seed == 1 else hf.small(
        layers=1, seed=seed, vocab_size=model.config.vocab_size)
    for m in (model, assistant):
        m.generation_config.num_assistant_tokens = 6
    check(model, input_ids=hf.prompt(40), max_new_tokens=50, do_sample=False, assistant_model=assistant)


def test_enabled_assistant():
    """Both with caches of libfkv; the assistant's is cropped and continued over many calls."""
    model, assistant = hf.small(), hf.small(layers=2, seed=9)
    arguments = dict(input_ids=hf.prompt(40), max_new_tokens=50, do_sample=False)
    expected = model.generate(**arguments)
    for m in (model, assistant):
        fkv.transformers.enable(m)
    assert torch.equal(model.generate(**arguments, assistant_model=assistant), expected)


def skip_if_windows_cannot_be_cropped(model):
    if model.config.model_type == 'qwen2' and model.config.use_sliding_window and (
            not fkv.transformers._cache.CROP_REMOVES):
        pytest.skip('this version of transformers cannot crop layers with a sliding window')


def test_turns(model):
    """A conversation on one cache, each turn with all that was said before."""
    def talk(new_cache):
        cache, said, answers = new_cache(), torch.zeros(1, 0, dtype=torch.long), []
        for turn in range(4):
            said = torch.cat((said, hf.prompt(11 + turn, seed=turn)), 1)
            more = {} if cache is None else {hf.cache_name(): cache}
            said = model.generate(said, max_new_tokens=15, do_sample=False, **more)
            answers.append(said)
        return answers

    expected = talk(lambda: None)
    fkv.transformers.enable(model)
    try:
        got = talk(lambda: fkv.transformers.FkvCache(model))
    finally:
        fkv.transformers.disable(model)
    assert all(torch.equal(a, b) for a, b in zip(expected, got))


def test_turns_of_a_ragged_batch():
    """The second turn brings padding into the middle."""
    model = hf.small()
    first, second = hf.padded((20, 9), seed=1), hf.padded((7, 13), seed=2)

    def talk(more):
        out = model.generate(**first, max_new_tokens=8, min_new_tokens=8, do_sample=False, **more)
        mask = torch.cat((first['attention_mask'], torch.ones(2, 8, dtype=torch.long),
                          second['attention_mask']), 1)
        return model.generate(torch.cat((out, second['input_ids']), 1), attention_mask=mask,
                              max_new_tokens=20, do_sample=False, **more)

    expected = talk({})
    fkv.transformers.enable(model)
    assert torch.equal(talk({hf.cache_name(): fkv.transformers.FkvCache(model)}), expected)


def test_returned_cache_goes_on():
    model = hf.small()
    ids = hf.prompt(30)
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)
    fkv.transformers.enable(model)
    first = model.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    cache = first[hf.cache_name()]
    assert isinstance(cache, fkv.transformers.FkvCache) and cache.get_seq_length() == 49
    assert torch.equal(model.generate(first.sequences, max_new_tokens=20, do_sample=False,
                                      **{hf.cache_name(): cache}), expected)


def test_without_a_cache_or_with_another():
    model = hf.small()
    arguments = dict(input_ids=hf.prompt(20, 2), max_new_tokens=20, do_sample=False)
    expected = model.generate(**arguments)
    fkv.transformers.enable(model)
    assert torch.equal(model.generate(**arguments, use_cache=False), expected)
    assert torch.equal(model.generate(**arguments, cache_implementation='static'), expected)
    from transformers import DynamicCache
    cache = DynamicCache(config=model.config)
    assert torch.equal(model.generate(**arguments, **{hf.cache_name(): cache}), expected)
    assert cache.get_seq_length() == 39


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Stored in the model's own type; as far from the results in float32 as the framework's own cache is."""
    model = hf.small().to(dtype)
    ids = hf.prompt(40, 2)

    def pieces(cache):
        parts = (0, 20), (20, 30), *((i, i + 1) for i in range(30, 40))
        return torch.cat([hf.last_logits(model, ids[:, a:b], cache).float() for a, b in parts], 1)

    from transformers import DynamicCache
    expected = hf.last_logits(copy.deepcopy(model).float(), ids)
    framework = (pieces(DynamicCache(config=model.config)) - expected).square().mean().sqrt()
    fkv.transformers.enable(model)
    cache = fkv.transformers.FkvCache(model)
    ours = (pieces(cache) - expected).square().mean().sqrt()
    assert ours < 1.3 * framework < .2 * expected.square().mean().sqrt()
    assert cache.store.cache.profile.info.storage_dtype.name in ('BF16', 'F16')
