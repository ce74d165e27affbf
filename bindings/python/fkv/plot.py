# SPDX-License-Identifier: Apache-2.0
"""Pictures of profiles. Needs matplotlib: pip install 'fkv[plot]'."""
from __future__ import annotations

from typing import Any

import numpy

from ._types import Channel, Coding, Part
from .profile import Profile


def held(profile: Profile) -> tuple[str, dict[str, numpy.ndarray]]:
    """(what is told, {'k': [n_layers, Hk], 'v': the same}) of each KV head.

    Of a calibrated profile the mean bits of a channel, without scales; of others the share of channels
    that are held exactly, in percent.
    """
    info = profile.info
    calibrated = info.coding == Coding.CALIBRATED
    what = 'mean bits of a channel' if calibrated else 'channels held exactly, %'

    def of(codes):
        return codes.mean(axis=1) if calibrated else 100 * (codes == Channel.EXACT).mean(axis=1)

    return what, {part.name.lower(): numpy.array(
        [of(profile.channels(layer, part)) for layer in range(info.n_layers)]) for part in Part}


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'fkv[plot]'") from error
    return Figure


def profile_heat_map(profile: Profile, path: Any, title: str = '') -> None:
    """Writes a picture (PNG, SVG or PDF, by the file's ending) of what held() tells.

    Rows are layers, columns KV heads; one map for K and one for V.
    """
    what, values = held(profile)
    layers, heads = values['k'].shape
    top = 100 if profile.info.coding != Coding.CALIBRATED else max(
        1.0, *(part.max() for part in values.values()))
    # No pyplot: it would look for a display and keep every figure.
    figure = _figure_class()(figsize=(max(6.0, 2.5 + heads * 0.9), max(3.0, 1.6 + layers * 0.24)),
                             layout='constrained')
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (part, value) in zip(axes, values.items()):
        image = axis.imshow(value, vmin=0, vmax=top, aspect='auto', cmap='viridis',
                            interpolation='nearest')
        axis.set_title(part.upper())
        axis.set_xlabel('KV head')
        axis.set_xticks(range(heads))
        axis.set_yticks(range(0, layers, max(1, layers // 16)))
        if heads * layers <= 256:
            _label(axis, value, top)
    axes[0].set_ylabel('layer')
    figure.colorbar(image, ax=axes, label=what)
    figure.suptitle(title or what)
    figure.savefig(path, dpi=150)


def _label(axis, values, top) -> None:
    for (layer, head), value in numpy.ndenumerate(values):
        axis.text(head, layer, f'{value:.0f}' if top == 100 else f'{value:.1f}', ha='center',
                  va='center', fontsize=7, color='black' if value > 0.6 * top else 'white')
