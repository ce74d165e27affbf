# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model can be held by libfkv, and how their heads and RoPE are: looked at, not guessed.

What a configuration says is checked by running the model on a few tokens: every attention layer is asked once
with RoPE and once without, so that what reaches libfkv without RoPE is known to become what the model means.
"""
from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .._native import lib
from .._types import ModelParams
from ..errors import UnsupportedError
from ..models import _SCALINGS as SCALINGS
from ..models import model_params

MAX_HEAD_DIM = lib.FKV_MAX_HEAD_DIM
PROBE = 'fkv_probe'
POSITIONS = (0, 1, 5, 61)  #: of the probe's tokens: near and far, no two distances alike


@dataclasses.dataclass
class Geometry:
    """What is known of a model."""

    params: ModelParams  #: of the layers that libfkv holds
    layers: dict[int, int]  #: layer of the model: layer of the fkv cache
    n_layers: int  #: of the model
    config: Any  #: of the text model
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass
class Modules:
    """Parts of a model."""

    decoder: Any  #: the module that has the layers
    attentions: list  #: of every layer


def unsupported(model, reason: str) -> UnsupportedError:
    return UnsupportedError(f'{type(model).__name__} cannot use caches of libfkv: {reason}')


def identity_rope(like, shape=(1, 1)):
    """cos and sin of no rotation at all, for what the model passes to its layers."""
    width = like.shape[-1]
    return like.new_ones((*shape, width)), like.new_zeros((*shape, width))


def rotate(x, cos, sin):
    """x [B, H, T, D] after RoPE as libfkv has it (halves of a pair in the two halves); cos, sin [B, T, R]."""
    width = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    y, rest = x[..., :width], x[..., width:]
    half = width // 2
    turned = torch.cat((-y[..., half:], y[..., :half]), -1)
    y = y * cos + turned * sin
    return y if not rest.shape[-1] else torch.cat((y, rest), -1)


# ---- what the configuration tells

def examine(model) -> tuple[Geometry, Modules]:
    """The geometry of a model, and its parts; raises UnsupportedError, which names the reason."""
    config = model.config.get_text_config(decoder=True)
    _refuse_by_config(model, config)
    modules = _modules(model, config)
    held = _held_layers(model, config)
    parameters = [p for module in modules.attentions for p in module.parameters()]
    if len({p.device for p in parameters}) != 1:
        raise unsupported(model, 'its layers are on several devices')
    params = _params(model, config)
    params.n_layers = len(held)
    params.model_id = None
    geometry = Geometry(params, {layer: i for i, layer in enumerate(held)}, config.num_hidden_layers,
                        config, model.dtype, parameters[0].device)
    _probe(model, geometry, modules)
    return geometry, modules


def _refuse_by_config(model, config) -> None:
    given = {name: getattr(config, name, None) for name in (
        'attn_logit_softcapping', 'kv_lora_rank', 'kv_sharing_modes', 'num_kv_shared_layers')}
    if model.config.is_encoder_decoder or getattr(config, 'add_cross_attention', False):
        raise unsupported(model, 'it has cross attention, whose keys are not those of the text')
    if given['kv_lora_rank']:
        raise unsupported(model, 'its keys and values are compressed into latents (MLA), which libfkv '
                                 'does not hold')
    if given['attn_logit_softcapping']:
        raise unsupported(model, 'it caps its attention scores (softcapping), which libfkv does not compute')
    if given['kv_sharing_modes'] or given['num_kv_shared_layers']:
        raise unsupported(model, 'some of its layers read the keys of other layers')
    rope = getattr(config, 'rope_parameters', None) or getattr(config, 'rope_scaling', None) or {}
    if 'mrope_section' in rope:
        raise unsupported(model, 'its RoPE has positions of several dimensions (M-RoPE)')
    if not getattr(model, '_supports_attention_backend', True):
        raise unsupported(model, 'its attention cannot be replaced through AttentionInterface')


def _modules(model, config) -> Modules:
    """Attention modules, and the module whose list of layers they are in."""
    found, parents = {}, set()
    for name, module in model.named_modules():
        if not (hasattr(module, 'layer_idx') and type(module).__name__.endswith('Attention')):
            continue
        parent, _, rest = name.partition('layers.')
        if not rest:
            raise unsupported(model, 'its layers are not in a list `layers`, as those of LLaMA are')
        if module.layer_idx in found:
            raise unsupported(model, f'it has more than one attention in layer {module.layer_idx}')
        found[module.layer_idx] = module
        parents.add(parent.rstrip('.'))
    if len(found) != config.num_hidden_layers or len(parents) != 1:
        raise unsupported(model, f'{len(found)} attention modules were found for '
                                 f'{config.num_hidden_layers} layers')
    return Modules(model.get_submodule(parents.pop()), list(found.values()))


def _held_layers(model, config) -> list[int]:
    """Layers with full attention. Those with a sliding window stay with the framework."""
    held = []
    for i, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicLayer:
            held.append(i)
        elif type(layer) is not DynamicSlidingWindowLayer:
            raise unsupported(model, f'layer {i} has a cache of another kind ({type(layer).__name__})')
    if not held:
        raise unsupported(model, 'all of its layers have a sliding window, which bounds their memory already; '
                                 'such layers stay with the framework, and there are no others')
    return held


def _params(model, config) -> ModelParams:
    values = _rope_of_full_layers(config)
    rope = values.get('rope_parameters') or values.get('rope_scaling') or {}
    kind = rope.get('rope_type') or rope.get('type') or 'default'
    if kind not in SCALINGS:
        raise unsupported(model, f'its RoPE is of type {kind!r}; known are {", ".join(SCALINGS)}')
    try:
        params = model_params(values)
    except ValueError as error:
        raise unsupported(model, str(error)) from None
    if params.head_dim % 8 or params.head_dim > MAX_HEAD_DIM:
        raise unsupported(model, f'its head_dim, {params.head_dim}, is no multiple of 8 up to {MAX_HEAD_DIM}')
    return params


def _rope_of_full_layers(config) -> dict:
    values = config.to_dict()
    rope = values.get('rope_parameters') or {}
    if isinstance(rope.get('full_attention'), dict):  # one set for each kind of layer
        values['rope_parameters'] = rope['full_attention']
    return values


# ---- what the model does

_recorder = threading.local()


def probe_attention(module, query, key, value, attention_mask=None, dropout=0.0, **kwargs):
    """Stands in for attention during the probe: records, and answers zeros."""
    _recorder.seen.setdefault(module.layer_idx, []).append((query, key, value, kwargs))
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _ask_twice(model, modules) -> dict[int, list]:
    """One pass over the layers; each attention is called without RoPE too, before its own call."""
    def before(module, args, kwargs):
        rope = kwargs.get('position_embeddings')
        if args or not (isinstance(rope, tuple) and len(rope) == 2) or 'position_ids' not in kwargs:
            raise unsupported(model, f'layer {module.layer_idx} does not get RoPE and positions from the '
                                     'model as layers of LLaMA do')
        _recorder.rope[module.layer_idx] = rope
        if rope[0].ndim != 3:
            raise unsupported(model, 'its RoPE has positions of several dimensions')
        module.forward(**{**kwargs, 'position_embeddings': identity_rope(rope[0])})

    from transformers import AttentionInterface
    AttentionInterface.register(PROBE, probe_attention)
    implementation, training = model.config._attn_implementation, model.training
    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in modules.attentions]
    _recorder.seen, _recorder.rope = {}, {}
    device = model.get_input_embeddings().weight.device
    try:
        model.eval()
        model.set_attn_implementation(PROBE)
        if model.config.get_text_config(decoder=True)._attn_implementation != PROBE:
            raise unsupported(model, 'its attention cannot be replaced through AttentionInterface')
        with torch.no_grad():
            modules.decoder(input_ids=torch.arange(1, 1 + len(POSITIONS), device=device)[None],
                             position_ids=torch.tensor([POSITIONS], device=device), use_cache=False)
        return _recorder.seen
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
        for hook in hooks:
            hook.remove()
        _recorder.seen = None


def _probe(model, geometry, modules) -> None:
    seen = _ask_twice(model, modules)
    params, scales = geometry.params, set()
    table = _angles(params)
    for layer in geometry.layers:
        calls = seen.get(layer, [])
        if len(calls) != 2:
            raise unsupported(model, f'layer {layer} does not call its attention through AttentionInterface')
        _check_kwargs(model, layer, calls[1][3])
        (plain_q, plain_k, v, _), (q, k, _, kwargs) = calls
        shapes = {tuple(k.shape[1::2]), tuple(v.shape[1::2]), (params.n_kv_heads, params.head_dim)}
        if len(shapes) != 1 or tuple(q.shape[1::2]) != (params.n_q_heads, params.head_dim):
            raise unsupported(model, f'the heads of layer {layer} are not as its configuration says')
        for name, before, after in (('queries', plain_q, q), ('keys', plain_k, k)):
            _check_rotation(model, layer, name, before, after, table)
        scale = kwargs.get('scaling')
        scales.add(params.head_dim ** -0.5 if scale is None else float(scale))
    if len(scales) != 1:
        raise unsupported(model, f'its layers scale their scores differently: {sorted(scales)}')
    scale = scales.pop()
    if abs(scale * params.head_dim ** 0.5 - 1) > 1e-12:
        params.softmax_scale = scale
    _recorder.rope = None


def _check_kwargs(model, layer: int, kwargs: dict) -> None:
    reasons = {'softcap': 'caps its attention scores (softcapping)', 's_aux': 'has attention sinks',
               'sinks': 'has attention sinks', 'position_bias': 'adds a bias to its scores',
               'sliding_window': 'has a sliding window that the configuration does not tell of'}
    for name, reason in reasons.items():
        if kwargs.get(name) is not None:
            raise unsupported(model, f'layer {layer} {reason}, which libfkv does not compute')
    if kwargs.get('is_causal') is False:
        raise unsupported(model, f'layer {layer} is not causal')


def _angles(params) -> tuple:
    """cos and sin of the probe's positions as libfkv has them, [1, tokens, rope_dim]."""
    angles = torch.tensor(POSITIONS, dtype=torch.float64)[:, None] * torch.tensor(
        params.inv_freq, dtype=torch.float64)
    angles = torch.cat((angles, angles), -1)[None]
    scaling = params.rope_scaling or 1.0
    return angles.cos() * scaling, angles.sin() * scaling


def _check_rotation(model, layer: int, name: str, before, after, table) -> None:
    expected = rotate(before.double(), *(x.to(before.device) for x in table))
    size = expected.abs().max().clamp_min(1e-30)
    error = ((expected - after.double()).abs().max() / size).item()
    if error > {torch.float32: 1e-4}.get(before.dtype, 3e-2):
        text = (f'the {name} of layer {layer} are not rotated as its configuration says (off by '
                f'{error:.1%} of the largest)')
        if torch.equal(before, after):
            text = f'layer {layer} has no RoPE, while the configuration says it has'
        raise unsupported(model, text)
