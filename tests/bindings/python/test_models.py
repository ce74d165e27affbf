# SPDX-License-Identifier: Apache-2.0
"""Models from names and from configurations of Hugging Face."""
import json
import math

import fkv
import numpy
import pytest
from fkv import models

SMALL = {'num_hidden_layers': 2, 'num_attention_heads': 8, 'num_key_value_heads': 2,
         'hidden_size': 512, 'max_position_embeddings': 4096, 'rope_theta': 10000.0}
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 2048}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 1024}

#: Name: configuration. Each is also compared with transformers, where that is installed.
CONFIGS = {
    'default': SMALL,
    'theta': {**SMALL, 'rope_theta': 500000.0},
    'head-dim': {**SMALL, 'head_dim': 96},
    'linear': {**SMALL, 'rope_scaling': {'rope_type': 'linear', 'factor': 2.5}},
    'linear-old-key': {**SMALL, 'rope_scaling': {'type': 'linear', 'factor': 4.0}},
    'llama3': {**SMALL, 'rope_theta': 500000.0, 'rope_scaling': LLAMA3},
    'yarn': {**SMALL, 'rope_scaling': YARN},
    'yarn-factors': {**SMALL, 'rope_scaling': {**YARN, 'beta_fast': 16.0, 'beta_slow': 2.0,
                                               'attention_factor': 1.25}},
    'yarn-mscale': {**SMALL, 'rope_scaling': {**YARN, 'mscale': 0.7, 'mscale_all_dim': 1.3}},
    'yarn-exact-bounds': {**SMALL, 'rope_scaling': {**YARN, 'truncate': False}},
    'parameters': {**{k: v for k, v in SMALL.items() if k != 'rope_theta'},
                   'rope_parameters': {**LLAMA3, 'rope_theta': 250000.0}},
    'parameters-default': {**SMALL, 'rope_parameters': {'rope_type': 'default',
                                                        'rope_theta': 77777.0}},
}


def base(theta, dim):
    return theta ** (-numpy.arange(0, dim, 2) / dim)


def ramp(freq, dim, theta, original, fast=32.0, slow=1.0, truncate=True):
    """YaRN: how much of each pair is interpolated, by how often it turns in the original length."""
    def pair(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low, high = pair(fast), pair(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return numpy.clip((numpy.arange(len(freq)) - low) / (high - low), 0, 1)


def by_formula(name):
    """(frequencies, scaling), from the definitions."""
    freq, scaling = base(10000.0, 64), 1.0
    if name == 'theta':
        freq = base(500000.0, 64)
    elif name == 'head-dim':
        freq = base(10000.0, 96)
    elif name == 'parameters-default':
        freq = base(77777.0, 64)
    elif name.startswith('linear'):
        freq = freq / (2.5 if name == 'linear' else 4.0)
    elif name in ('llama3', 'parameters'):
        freq = base(500000.0 if name == 'llama3' else 250000.0, 64)
        length = 2 * math.pi / freq
        smooth = (2048 / length - 1.0) / (4.0 - 1.0)
        freq = numpy.where(length < 2048 / 4.0, freq, numpy.where(
            length > 2048 / 1.0, freq / 8, (1 - smooth) * freq / 8 + smooth * freq))
    elif name.startswith('yarn'):
        bounds = {'yarn-factors': dict(fast=16.0, slow=2.0),
                  'yarn-exact-bounds': dict(truncate=False)}.get(name, {})
        share = ramp(freq, 64, 10000.0, 1024, **bounds)
        freq = share * freq / 4 + (1 - share) * freq
        scaling = {'yarn-factors': 1.25,
                   'yarn-mscale': (0.07 * math.log(4) + 1) / (0.13 * math.log(4) + 1)}.get(
                       name, 0.1 * math.log(4) + 1)
    return freq, scaling


@pytest.mark.parametrize('name', CONFIGS)
def test_configuration(name):
    params = fkv.model_params(CONFIGS[name])
    freq, scaling = by_formula(name)
    assert (params.n_layers, params.n_q_heads, params.n_kv_heads) == (2, 8, 2)
    assert params.head_dim == params.rope_dim == (96 if name == 'head-dim' else 64)
    assert params.rope_layout is fkv.RopeLayout.HALF_SPLIT and params.model_id is None
    numpy.testing.assert_allclose(params.inv_freq, freq, rtol=1e-12)
    assert (params.rope_scaling or 1.0) == pytest.approx(scaling, rel=1e-12)


@pytest.mark.torch
@pytest.mark.parametrize('name', CONFIGS)
def test_transformers_computes_the_same(name):
    pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    llama = pytest.importorskip('transformers.models.llama.modeling_llama')
    config = transformers.LlamaConfig(**CONFIGS[name])
    rope = llama.LlamaRotaryEmbedding(config)
    for source in (CONFIGS[name], config):
        params = fkv.model_params(source)
        assert params.head_dim == (96 if name == 'head-dim' else 64)
        numpy.testing.assert_allclose(params.inv_freq, rope.inv_freq.double().numpy(), rtol=2e-6)
        assert (params.rope_scaling or 1.0) == pytest.approx(rope.attention_scaling, rel=1e-6)


@pytest.mark.parametrize('config', [
    {**SMALL, 'partial_rotary_factor': 0.25},
    {**SMALL, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0,
                                  'partial_rotary_factor': 0.25}}])
def test_partial_rotary(context, config):
    params = fkv.model_params(config)
    assert params.rope_dim == 16 and params.head_dim == 64
    numpy.testing.assert_allclose(params.inv_freq, base(10000.0, 16), rtol=1e-12)
    assert fkv.Profile.exact(context, params).info.rope_dim == 16


def test_defaults_of_old_configurations():
    """No KV heads: as many as query heads. No theta: 10000."""
    params = fkv.model_params({'num_hidden_layers': 1, 'num_attention_heads': 4,
                               'hidden_size': 64})
    assert params.n_kv_heads == 4 and params.head_dim == 16
    numpy.testing.assert_allclose(params.inv_freq, base(10000.0, 16))


@pytest.mark.parametrize('name, geometry', [
    ('llama-3.1-8b', (32, 32, 8, 128)), ('llama-3.1-70b', (80, 64, 8, 128)),
    ('llama-3.2-1b', (16, 32, 8, 64)), ('llama-3.2-3b', (28, 24, 8, 128)),
    ('mistral-7b-v0.3', (32, 32, 8, 128)), ('qwen2.5-7b', (28, 28, 4, 128)),
    ('qwen3-8b', (36, 32, 8, 128))])
def test_presets(context, name, geometry):
    assert name in models.PRESETS
    for spelled in (name, name.upper()):
        params = fkv.model_params(spelled)
        assert (params.n_layers, params.n_q_heads, params.n_kv_heads, params.head_dim) == geometry
        assert params.model_id == name and len(params.inv_freq) == geometry[3] // 2
    info = fkv.Profile.exact(context, params).info
    assert info.rope_dim == geometry[3] and info.n_layers == geometry[0]


def test_all_presets_are_tested():
    assert len(models.PRESETS) == 7


def test_frequencies_of_llama_3_1():
    """Fast pairs as they are, slow ones divided by 8, a few between."""
    params = fkv.model_params('llama-3.1-8b')
    plain = base(500000.0, 128)
    quotient = plain / numpy.array(params.inv_freq)
    turns = 8192 * plain / (2 * math.pi)
    numpy.testing.assert_allclose(quotient[turns >= 4], 1)
    numpy.testing.assert_allclose(quotient[turns <= 1], 8)
    between = quotient[(turns > 1) & (turns < 4)]
    assert 1 <= len(between) <= 10 and (between > 1).all() and (between < 8).all()


def test_name_can_be_given():
    assert fkv.model_params('qwen3-8b', 'mine').model_id == 'mine'
    assert fkv.model_params(SMALL, model_id='mine').model_id == 'mine'


def test_files(tmp_path):
    folder = tmp_path / 'my-model'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(CONFIGS['llama3']))
    expected = fkv.model_params(CONFIGS['llama3'], 'my-model')
    for source in (folder, str(folder), folder / 'config.json', str(folder / 'config.json')):
        assert fkv.model_params(source) == expected
    assert expected.model_id == 'my-model'


def test_files_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match='llama-3.1-8b'):
        fkv.model_params('no-such-model')
    with pytest.raises(ValueError, match='neither a file'):
        fkv.model_params(tmp_path)
    bad = tmp_path / 'config.json'
    for text in ('', '{', '[]', '5', 'null', '"x"', '[1, 2]'):
        bad.write_text(text)
        with pytest.raises(ValueError, match='config.json'):
            fkv.model_params(bad)


@pytest.mark.parametrize('source', [None, 5, [1], object()])
def test_wrong_sources(source):
    with pytest.raises(TypeError, match='configuration'):
        fkv.model_params(source)


@pytest.mark.parametrize('change, text', [
    ({'num_attention_heads': None}, 'malformed'), ({'num_attention_heads': 0}, 'malformed'),
    ({'num_attention_heads': 'eight'}, 'malformed'), ({'head_dim': 'x'}, 'malformed'),
    ({'rope_scaling': {'rope_type': 'longrope', 'factor': 4.0}}, 'longrope.*inv_freq'),
    ({'rope_scaling': {'rope_type': 'dynamic', 'factor': 4.0}}, 'dynamic'),
    ({'rope_scaling': {'type': 'su'}}, 'su'),
    ({'rope_scaling': {'rope_type': 'linear'}}, 'needs factor'),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'needs low_freq_factor'),
    ({'rope_scaling': {'rope_type': 'yarn'}}, 'needs factor'),
    ({'rope_scaling': {'rope_type': 'linear', 'factor': 0}}, 'malformed'),
    ({'rope_scaling': {'rope_type': 'linear', 'factor': 'x'}}, 'malformed'),
    ({'rope_theta': 'x'}, 'malformed'),
])
def test_wrong_configurations(change, text):
    with pytest.raises(ValueError, match=text):
        fkv.model_params({**SMALL, 'head_dim': None, **change})


@pytest.mark.parametrize('missing', ['num_hidden_layers', 'num_attention_heads', 'hidden_size'])
def test_missing_keys(missing):
    with pytest.raises(ValueError, match=f'no {missing}'):
        fkv.model_params({k: v for k, v in SMALL.items() if k != missing})


def test_nothing_is_changed():
    config = json.loads(json.dumps(CONFIGS['llama3']))
    fkv.model_params(config)
    assert config == CONFIGS['llama3']
