# SPDX-License-Identifier: Apache-2.0
"""One exact pass over a context, of which every method makes its cache."""
from __future__ import annotations

import copy
import dataclasses
from typing import Any, Callable

import torch

from ..transformers._cache import FkvCache, FkvLayer
from ..transformers._enable import CACHE_NAME, enable, settings_of
from ..transformers._geometry import examine
from ..transformers._settings import Settings
from . import count
from .stores import Dense

TAIL = 65  #: hidden states of so many newest tokens are kept: SnapKV's window of 64 and one more


@dataclasses.dataclass
class Context:
    """What a context left behind. Keys are before RoPE; both [Hk, T, D], in the type of the model."""

    keys: list
    values: list
    hidden: list  #: what went into the attention of each held layer, newest TAIL tokens: [1, TAIL, hidden]
    cache: FkvCache  #: with the layers that the framework holds itself
    tokens: int


class _Recorder(Dense):
    """Attends exactly, and keeps keys as they were before RoPE."""

    def __init__(self, *args, watch: Callable | None = None):
        super().__init__(*args)
        self.plain: list = [None] * len(self.keys)
        self.watch = watch

    def append_attend(self, layer: int, q, k, v):
        out = super().append_attend(layer, q, k, v)
        self.plain[layer] = k[0]
        if self.watch:
            self.watch(layer, q[0], k[0], v[0])
        self.keys[layer] = None  # rotated keys of all layers are not needed
        return out


class Reader:
    """A model that is made ready: it reads contexts, and continues from caches of any method."""

    def __init__(self, model: Any, threads: int | None = None):
        self.model = enable(model, threads=threads, prefill='fkv')
        self.settings: Settings = settings_of(model)
        self.geometry = self.settings.geometry
        modules = examine(model)[1].attentions
        self.attentions = [module for module in modules if module.layer_idx in self.geometry.layers]

    @property
    def params(self) -> Any:
        return self.geometry.params

    def dense_bytes(self, tokens: int) -> int:
        p = self.params
        return count.dense(p.n_layers, p.n_kv_heads, p.head_dim, tokens)

    def dense(self) -> Dense:
        return Dense(self.params, self.geometry.device, self.geometry.dtype)

    def call(self, ids: list[int], cache: Any, keep: int):
        """Logits of the last `keep` of these tokens, [keep, vocabulary]."""
        device = self.model.get_input_embeddings().weight.device
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids], device=device), logits_to_keep=keep,
                              **{CACHE_NAME: cache}).logits[0]

    def read(self, ids: list[int], watch: Callable | None = None) -> Context:
        """watch(layer, q, k, v): called with what each layer has, [H, T, D], before RoPE."""
        store = _Recorder(self.params, self.geometry.device, self.geometry.dtype, watch=watch)
        cache = FkvCache(None, _settings=self.settings, _store=store)
        hidden: dict[int, Any] = {}

        def keep(module, args, kwargs):
            states = kwargs['hidden_states'] if 'hidden_states' in kwargs else args[0]
            hidden[module.layer_idx] = states[:, -TAIL:].detach().clone()

        hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in self.attentions]
        try:
            self.call(ids, cache, 1)
        finally:
            for hook in hooks:
                hook.remove()
        return Context(store.plain, store.values, [hidden[layer] for layer in self.geometry.layers], cache,
                       len(ids))

    def cache(self, context: Context, store: Any) -> FkvCache:
        """A cache of a context whose full-attention layers are held by `store`."""
        cache = FkvCache(None, _settings=self.settings, _store=store)
        for i, layer in enumerate(context.cache.layers):
            if not isinstance(layer, FkvLayer):
                cache.layers[i] = copy.deepcopy(layer)
        cache.own_layers = [layer for layer in cache.layers if not isinstance(layer, FkvLayer)]
        return cache

    def generate(self, cache: Any, question: list[int], most: int, end: frozenset) -> list[int]:
        """Greedy: up to `most` tokens, without what ends them."""
        said: list[int] = []
        ids = question
        while len(said) < most:
            token = int(self.call(ids, cache, 1)[-1].argmax())
            if token in end:
                break
            said.append(token)
            ids = [token]
        return said

    def follow(self, cache: Any, question: list[int], answer: list[int]):
        """Logits for each token of an answer that is given token by token, [len(answer), vocabulary]."""
        return self.call(question + answer[:-1], cache, len(answer))
