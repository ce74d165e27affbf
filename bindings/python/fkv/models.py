# SPDX-License-Identifier: Apache-2.0
"""ModelParams of models: from Hugging Face configurations, or by name for a few."""
from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any

from ._types import ModelParams, RopeLayout

_LLAMA3 = {'rope_type': 'llama3', 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
           'original_max_position_embeddings': 8192}


def _llama(layers, heads, kv_heads, head_dim, theta, **more):
    return {'num_hidden_layers': layers, 'num_attention_heads': heads,
            'num_key_value_heads': kv_heads, 'head_dim': head_dim, 'rope_theta': theta, **more}


#: Name: configuration, in the words of Hugging Face.
PRESETS = {
    'llama-3.1-8b': _llama(32, 32, 8, 128, 500000.0, rope_scaling={**_LLAMA3, 'factor': 8.0}),
    'llama-3.1-70b': _llama(80, 64, 8, 128, 500000.0, rope_scaling={**_LLAMA3, 'factor': 8.0}),
    'llama-3.2-1b': _llama(16, 32, 8, 64, 500000.0, rope_scaling={**_LLAMA3, 'factor': 32.0}),
    'llama-3.2-3b': _llama(28, 24, 8, 128, 500000.0, rope_scaling={**_LLAMA3, 'factor': 32.0}),
    'mistral-7b-v0.3': _llama(32, 32, 8, 128, 1000000.0),
    'qwen2.5-7b': _llama(28, 28, 4, 128, 1000000.0),
    'qwen3-8b': _llama(36, 32, 8, 128, 1000000.0),
}


def model_params(source: Any, model_id: str | None = None) -> ModelParams:
    """The geometry of a model.

    source  a name in fkv.models.PRESETS ('llama-3.1-8b'), the path of a Hugging Face config.json or
            of the folder that has it, its contents as a dict, or a configuration object of
            transformers
    """
    if isinstance(source, str) and source.lower() in PRESETS:
        return _from_config(PRESETS[source.lower()], model_id or source.lower())
    if isinstance(source, (str, os.PathLike)):
        path = pathlib.Path(source)
        path = path / 'config.json' if path.is_dir() else path
        if not path.exists():
            raise ValueError(f'{source} is neither a file nor a known model; known are: '
                             + ', '.join(PRESETS))
        with open(path, encoding='utf-8') as file:
            try:
                config = json.load(file)
            except ValueError as error:
                raise ValueError(f'{path}: {error}') from None
        if not isinstance(config, dict):
            raise ValueError(f'{path} has no configuration: it is no JSON object')
        return _from_config(config, model_id or path.resolve().parent.name)
    if hasattr(source, 'to_dict'):
        source = source.to_dict()
    if not isinstance(source, dict):
        raise TypeError(f'expected a name, a path or a configuration, not {type(source).__name__}')
    return _from_config(source, model_id)


def _from_config(config: dict, model_id: str | None) -> ModelParams:
    try:
        return _geometry(config, model_id)
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f'the configuration is malformed: {error}') from None


def _geometry(config: dict, model_id: str | None) -> ModelParams:
    try:
        heads = config['num_attention_heads']
        head_dim = config.get('head_dim') or config['hidden_size'] // heads
        params = ModelParams(
            n_layers=config['num_hidden_layers'], n_q_heads=heads,
            n_kv_heads=config.get('num_key_value_heads') or heads, head_dim=head_dim,
            rope_layout=RopeLayout.HALF_SPLIT, model_id=model_id)
    except KeyError as error:
        raise ValueError(f'the configuration has no {error.args[0]}') from None
    # transformers 5 has all of RoPE in rope_parameters; earlier files have two keys.
    rope = dict(config.get('rope_scaling') or {})
    rope.update(config.get('rope_parameters') or {})
    theta = rope.get('rope_theta') or config.get('rope_theta') or 10000.0
    share = rope.get('partial_rotary_factor') or config.get('partial_rotary_factor') or 1.0
    params.rope_dim = int(head_dim * share)
    base = [theta ** (-2.0 * j / params.rope_dim) for j in range(params.rope_dim // 2)]
    original = (rope.get('original_max_position_embeddings')
                or config.get('original_max_position_embeddings')
                or config.get('max_position_embeddings'))
    kind = rope.get('rope_type') or rope.get('type') or 'default'
    if kind not in _SCALINGS:
        raise ValueError(f'RoPE of type {kind!r} is not known here: give inv_freq yourself '
                         f'(known are {", ".join(_SCALINGS)})')
    try:
        params.inv_freq, scaling = _SCALINGS[kind](base, rope, theta, original)
    except KeyError as error:
        raise ValueError(f'RoPE of type {kind!r} needs {error.args[0]}') from None
    if scaling != 1.0:
        params.rope_scaling = scaling
    return params


def _default(base, rope, theta, original):
    return base, 1.0


def _linear(base, rope, theta, original):
    return [f / rope['factor'] for f in base], 1.0


def _llama3(base, rope, theta, original):
    """Slow pairs are divided by the factor, fast ones are not, those between in proportion."""
    factor, low, high = (rope[k] for k in ('factor', 'low_freq_factor', 'high_freq_factor'))

    def scaled(f):
        turns = original * f / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        return keep * f + (1 - keep) * f / factor

    return [scaled(f) for f in base], 1.0


def _yarn(base, rope, theta, original):
    """YaRN (arXiv 2309.00071), equations 17 to 22."""
    factor = rope['factor']
    dim = 2 * len(base)
    fast, slow = rope.get('beta_fast') or 32.0, rope.get('beta_slow') or 1.0

    def pair_of(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(fast), pair_of(slow)
    if rope.get('truncate', True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = max(high - low, 0.001)
    scaled = []
    for j, f in enumerate(base):
        slowed = min(max((j - low) / width, 0.0), 1.0)
        scaled.append(slowed * f / factor + (1 - slowed) * f)

    def magnitude(share):
        return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = rope.get('attention_factor')
    if attention is None:
        some, all_dim = rope.get('mscale'), rope.get('mscale_all_dim')
        both = some and all_dim
        attention = magnitude(some) / magnitude(all_dim) if both else magnitude(1.0)
    return scaled, float(attention)


_SCALINGS = {'default': _default, 'linear': _linear, 'llama3': _llama3, 'yarn': _yarn}
