# SPDX-License-Identifier: Apache-2.0
"""Pictures of profiles. Needs matplotlib: pip install 'fkv[plot]'."""
from __future__ import annotations

from typing import Any

import numpy

from ._types import Channel, Part
from .profile import Profile


def kept_share(profile: Profile) -> dict[str, numpy.ndarray]:
    """Share of channels that are held exactly: {'k': [n_layers, Hk], 'v': the same}."""
    info = profile.info
    return {part.name.lower(): numpy.array(
        [(profile.channels(layer, part) == Channel.EXACT).mean(axis=1)
         for layer in range(info.n_layers)]) for part in Part}


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'fkv[plot]'") from error
    return Figure


def profile_heat_map(profile: Profile, path: Any, title: str = '') -> None:
    """Writes a picture (PNG, SVG or PDF, by the file's ending) of the kept channels.

    Rows are layers, columns KV heads; one map for K and one for V.
    """
    shares = kept_share(profile)
    layers, heads = shares['k'].shape
    # No pyplot: it would look for a display and keep every figure.
    figure = _figure_class()(figsize=(max(6.0, 2.5 + heads * 0.9), max(3.0, 1.6 + layers * 0.24)),
                             layout='constrained')
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (part, share) in zip(axes, shares.items()):
        image = axis.imshow(100 * share, vmin=0, vmax=100, aspect='auto', cmap='viridis',
                            interpolation='nearest')
        axis.set_title(part.upper())
        axis.set_xlabel('KV head')
        axis.set_xticks(range(heads))
        axis.set_yticks(range(0, layers, max(1, layers // 16)))
        if heads * layers <= 256:
            _label(axis, share)
    axes[0].set_ylabel('layer')
    figure.colorbar(image, ax=axes, label='channels held exactly, %')
    figure.suptitle(title or 'Channels held exactly in the middle of a sequence')
    figure.savefig(path, dpi=150)


def _label(axis, share) -> None:
    for (layer, head), value in numpy.ndenumerate(share):
        axis.text(head, layer, f'{100 * value:.0f}', ha='center', va='center', fontsize=7,
                  color='black' if value > 0.6 else 'white')
