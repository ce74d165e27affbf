# SPDX-License-Identifier: Apache-2.0
"""enable() and disable()."""
from __future__ import annotations

import inspect
import types
import weakref
from typing import Any

import torch
from transformers.generation.utils import GenerationMixin

from .._objects import Context
from . import _attention
from ._cache import FkvCache
from ._geometry import examine
from ._settings import Settings

#: What generate() calls a cache among the arguments of the model.
CACHE_NAME = ('cache' if 'cache' in inspect.signature(
    GenerationMixin.prepare_inputs_for_generation).parameters else 'past_key_values')


class _Enabled:
    """What was changed in a model."""

    def __init__(self, settings: Settings, implementation: Any, hooks: list):
        self.settings, self.implementation, self.hooks = settings, implementation, hooks


_models: 'weakref.WeakKeyDictionary[Any, _Enabled]' = weakref.WeakKeyDictionary()


def enable(model, profile: Any = None, *, longcache: Any = None, threads: int | None = None,
           context: Context | None = None, prefill: str = 'auto'):
    """Makes generate() of a model use caches of libfkv. Returns the model.

    model      a causal language model of transformers, built like LLaMA, Mistral, Qwen2 or Qwen3
    profile    how keys and values are held: a file, a fkv.Profile (whose context is used), or None:
               exactly, in the model's own type
    longcache  attention within a finite scope (docs/longcache.md): True, or a dict of the fields of
               fkv.SelectParams; the model is then not bound to the length it was trained for
    threads    of libfkv on the CPU; None: as many as torch uses
    context    a fkv.Context to work in; None: a new one for the model's device
    prefill    who attends to the first prompt of a cache: 'framework', 'fkv', or 'auto', the faster one

    The model must be on its device already. What cannot be is refused with fkv.UnsupportedError (the model)
    or fkv.MismatchError (the profile is of another model), and nothing is changed. Enabling twice replaces
    the settings.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f'model: expected a model of transformers, as from_pretrained() gives it, not '
                        f'{type(model).__name__}')
    geometry, modules = examine(model)
    settings = Settings(geometry, profile, longcache, context, threads, prefill)
    settings.store()  # so that what cannot be held is refused here
    disable(model)
    _attention.register()
    before = _implementations(model)
    hooks = [modules.decoder.register_forward_pre_hook(_attention.before_model, with_kwargs=True),
             modules.decoder.register_forward_hook(_attention.after_model, always_call=True)]
    hooks += [module.register_forward_pre_hook(_attention.before_attention, with_kwargs=True)
              for module in modules.attentions]
    model.set_attn_implementation(_attention.NAME)
    _models[model] = _Enabled(settings, before, hooks)
    if hasattr(model, '_prepare_cache_for_generation'):
        # A method, so that a copy of the model has one of its own.
        model._prepare_cache_for_generation = types.MethodType(_prepare_cache, model)
    return model


def disable(model) -> None:
    """Undoes enable(). Caches that were made live on, but only an enabled model takes them."""
    state = _models.pop(model, None)
    if state is None:
        return
    for hook in state.hooks:
        hook.remove()
    model.set_attn_implementation(state.implementation)
    model.__dict__.pop('_prepare_cache_for_generation', None)


def enabled(model) -> bool:
    """Whether a model is enabled."""
    return model in _models


def settings_of(model) -> Settings:
    state = _models.get(model)
    if state is None:
        raise ValueError('the model is not enabled: fkv.transformers.enable(model) first')
    return state.settings


def _implementations(model):
    """What set_attn_implementation() takes to make all as it is now."""
    config = model.config
    parts = {name: getattr(config, name)._attn_implementation for name in config.sub_configs
             if getattr(config, name, None) is not None}
    return {'': config._attn_implementation, **parts} if parts else config._attn_implementation


def _prepare_cache(model, generation_config, model_kwargs, *args, **kwargs):
    """What generate() calls to get a cache: a FkvCache, unless something else is asked for."""
    given = any(model_kwargs.get(name) is not None for name in ('cache', 'past_key_values'))
    wanted = (generation_config.use_cache is not False
              and generation_config.cache_implementation in (None, 'dynamic'))
    if given or not wanted or not enabled(model):
        return type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args,
                                                         **kwargs)
    cache = model_kwargs[CACHE_NAME] = FkvCache(model)
    if getattr(generation_config, 'is_assistant', False) and hasattr(cache, 'activate_past_recording'):
        cache.activate_past_recording()  # of layers with a sliding window
    return None
