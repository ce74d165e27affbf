# SPDX-License-Identifier: Apache-2.0
"""What transformers calls: the attention function and the mask function, both named 'fkv', and the hooks.

Keys reach a cache of transformers rotated by RoPE. libfkv wants them as they were before it, since profiles
and selection are about such keys. They are not turned back: the hook on an attention module gives it a RoPE of
angle 0, which changes no bit of queries and keys, and libfkv rotates them.

Where no FkvCache is passed, all of this is the framework's own `sdpa`.
"""
from __future__ import annotations

import threading

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from ._cache import FkvCache, FkvLayer
from ._geometry import rotate
from ._store import all_of

NAME = 'fkv'
_running = threading.local()  # .cache: the FkvCache of the forward pass that this thread is in, or None


def register() -> None:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def _given_cache(kwargs: dict):
    cache = kwargs.get('cache')
    if cache is None:
        cache = kwargs.get('past_key_values')  # its name before 5.2x
    return cache if isinstance(cache, FkvCache) else None


# ---- hooks

def before_model(module, args, kwargs) -> None:
    """Tells the mask function below, which is not told, which cache is in use."""
    cache = _given_cache(kwargs)
    if cache is None:
        cache = next((x for x in args if isinstance(x, FkvCache)), None)
    if cache is not None:
        _check_input(cache, kwargs)
    _running.cache = cache


def _check_input(cache, kwargs: dict) -> None:
    """generate() cuts off as many tokens of a prompt as the cache holds, even if that leaves none."""
    given = kwargs.get('input_ids')
    given = kwargs.get('inputs_embeds') if given is None else given
    if given is not None and given.shape[1] == 0:
        raise ValueError(f'no tokens are left to read: the cache holds {cache.get_seq_length()} already. '
                         'generate() is given all of the text, what the cache holds and what is new behind it')


def after_model(module, args, output) -> None:
    _running.cache = None


def before_attention(module, args, kwargs):
    """Takes RoPE out of what libfkv will get, and sends the cache along to the attention function."""
    cache = _given_cache(kwargs)
    if cache is None or type(cache.layers[module.layer_idx]) is not FkvLayer or 'fkv_step' in kwargs:
        return None  # the last: a copy of an enabled model was enabled
    rope = kwargs['position_embeddings']
    kwargs['position_embeddings'] = cache.announce(module.layer_idx, rope)
    kwargs['fkv_step'] = cache, rope, kwargs.get('position_ids')
    return args, kwargs


# ---- the two functions

def mask(**kwargs):
    """For layers that libfkv holds: which columns are real, [B, columns] of bool, or None: all."""
    cache = getattr(_running, 'cache', None)
    if cache is None or kwargs.get('mask_function', causal_mask_function) is not causal_mask_function:
        return sdpa_mask(**kwargs)
    padding = kwargs.get('attention_mask')
    if padding is None or (padding.shape[-1] == kwargs['kv_length'] and all_of(padding)):
        return None
    return padding


def _refuse(query, attention_mask, dropout, kwargs: dict) -> None:
    if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.dtype != torch.bool):
        raise ValueError('a FkvCache knows causal attention with padding, given as attention_mask [B, tokens]; '
                         f'this mask has shape {tuple(attention_mask.shape)}')
    if kwargs.get('output_attentions'):
        raise ValueError('output_attentions: libfkv does not give attention weights')
    if dropout:
        raise ValueError('a FkvCache is for inference: call model.eval()')
    if query.requires_grad:
        raise ValueError('a FkvCache is for inference: use torch.no_grad()')


def attention(module, query, key, value, attention_mask=None, dropout=0.0, fkv_step=None, **kwargs):
    """Attention of one layer: [B, H, T, D] to [B, T, H, D].

    Dropout stands where the framework's own functions have it, for wrappers that pass it by place (kvpress).
    """
    if fkv_step is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, **kwargs)
    cache, rope, position_ids = fkv_step
    layer, store = cache.layers[module.layer_idx].number, cache.store
    if layer == 0:
        _refuse(query, attention_mask, dropout, kwargs)
        store.begin(query.shape[0], query.shape[2], attention_mask, position_ids)
    if query.shape[2] > 1 and not store.step.columns and cache.settings.by_framework(query.dtype):
        out = _framework(module, query, key, value, rope, attention_mask, kwargs)
        store.append(layer, key, value)
        return out, None
    return store.append_attend(layer, query, key, value), None


def _framework(module, query, key, value, rope, padding, kwargs: dict):
    """Attention within a first prompt, as the framework computes it."""
    seen = None
    if padding is not None:
        tokens = query.shape[2]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
        alone = torch.eye(tokens, dtype=torch.bool, device=query.device)  # no row of padding sees nothing
        seen = (causal & padding[:, None, None, :]) | alone
    return sdpa_attention_forward(module, rotate(query, *rope), rotate(key, *rope), value, seen, **kwargs)[0]
