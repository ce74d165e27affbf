# SPDX-License-Identifier: Apache-2.0
"""A cache of transformers whose full-attention layers are held by libfkv."""
from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .._types import Stats
from ..errors import Error
from ._settings import Settings
from ._store import Store

#: Whether crop() is told how many tokens to remove (5.24), or the length to leave (5.0).
CROP_REMOVES = 'tokens_to_remove' in inspect.signature(Cache.crop).parameters


class FkvLayer(CacheLayerMixin):
    """One layer that libfkv holds. Its tensors are nowhere to be had: attention reads what is coded."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, store: Store, number: int):
        super().__init__()
        self.store, self.number = store, number

    def lazy_initialization(self, *args, **kwargs) -> None:
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        return key_states, value_states  # attention hands them on

    def get_seq_length(self, *args) -> int:
        return self.store.columns

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in 5.0

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.store.columns + new, 0

    # The cache does these for all layers at once.
    def reset(self) -> None:
        pass

    def crop(self, *args) -> None:
        pass

    def reorder_cache(self, beam_idx) -> None:
        pass

    def batch_repeat_interleave(self, repeats: int) -> None:
        pass

    def batch_select_indices(self, indices) -> None:
        pass

    def offload(self) -> None:
        pass

    def prefetch(self) -> None:
        pass


class FkvCache(Cache):
    """Keys and values of a model in libfkv, for `past_key_values=` (or `cache=`) of the model's calls.

        cache = FkvCache(model)
        model.generate(**inputs, past_key_values=cache)

    model     a model after enable()
    profile   how things are held: as for enable(); None: as enable() was told
    longcache as for enable(); None: as enable() was told

    Holds one batch, over as many calls as wanted. copy.deepcopy() makes a second one that shares all memory
    with the first until they differ: for many continuations of one prompt.
    """

    def __init__(self, model, profile: Any = None, *, longcache: Any = None,
                 _settings: Settings | None = None, _store: Store | None = None):
        from ._enable import settings_of
        settings = _settings or settings_of(model)
        if profile is not None or longcache is not None:
            settings = settings.other(profile, longcache)
        self.settings = settings
        self.store = _store or settings.store()
        layers = DynamicCache(config=settings.geometry.config).layers
        for layer, number in settings.geometry.layers.items():
            layers[layer] = FkvLayer(self.store, number)
        super().__init__(layers=layers)
        #: Layers of the framework's own: those with a sliding window.
        self.own_layers = [layer for layer in layers if not isinstance(layer, FkvLayer)]
        self._announced: int | None = None
        self._rope = self._no_rope = None

    def announce(self, layer_idx: int, rope: tuple) -> tuple:
        """The attention of the layer is about to call update(), and libfkv will get what it brings. Returns
        what it shall have in place of RoPE's cos and sin."""
        self._announced = layer_idx
        if rope is not self._rope:  # one for all layers of a step
            self._rope, self._no_rope = rope, self.settings.no_rope(rope[0])
        return self._no_rope

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        layer = self.layers[layer_idx]
        if type(layer) is not FkvLayer:
            return layer.update(key_states, value_states, *args, **kwargs)
        if self._announced != layer_idx:
            raise Error('the model does not pass its attention to libfkv: fkv.transformers.enable(model) first')
        self._announced = None
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0, *args) -> int:
        return self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0

    def get_mask_sizes(self, query_length, layer_idx: int) -> tuple[int, int]:
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def reset(self) -> None:
        self.store.reset()
        super().reset()

    def crop(self, tokens: int) -> None:
        """Drops newest tokens: -n drops n of them. n > 0 leaves n; 0 is as the framework has it.

        Raises StateError if what remains would end among coded tokens: the last n_local can always go.
        """
        columns = self.store.columns
        leave = tokens if tokens > 0 or (tokens == 0 and not CROP_REMOVES) else columns + tokens
        leave = min(max(leave, 0), columns)
        lengths = self.store.lengths_at(leave)  # may refuse, and nothing has changed
        for layer in self.own_layers:
            if leave < columns or CROP_REMOVES:
                layer.crop(leave - columns)
        self.store.crop(leave, lengths)

    def reorder_cache(self, beam_idx) -> None:
        self.store.choose(beam_idx.tolist())
        for layer in self.own_layers:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store.choose([i for i in range(len(self.store.rows)) for _ in range(repeats)])
        for layer in self.own_layers:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices) -> None:
        rows = range(len(self.store.rows))
        chosen = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self.store.choose([rows[i] for i in chosen.tolist()])
        for layer in self.own_layers:
            layer.batch_select_indices(indices)

    @property
    def batch_size(self) -> int:
        return len(self.store.rows) or -1

    max_batch_size = batch_size  # its name in 5.0

    @property
    def is_initialized(self) -> bool:
        return bool(self.store.rows)

    @property
    def is_compileable(self) -> bool:
        return False

    def stats(self) -> Stats:
        """Bytes and tokens of the batch in libfkv; layers with a sliding window are not counted."""
        return self.store.cache.stats()

    def __deepcopy__(self, memo) -> 'FkvCache':
        import copy
        twin = FkvCache(None, _settings=self.settings, _store=self.store.copy())
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, FkvLayer):
                twin.layers[i] = copy.deepcopy(layer, memo)
        twin.own_layers = [layer for layer in twin.layers if not isinstance(layer, FkvLayer)]
        return twin

    def __repr__(self) -> str:
        return f'FkvCache({len(self.store.rows)} sequences, {self.store.columns} tokens)'
