# SPDX-License-Identifier: Apache-2.0
"""Pictures of answers: where needles are found, and quality against ratio. Needs matplotlib."""
from __future__ import annotations

import math
from typing import Any

from ..plot import _figure_class
from .report import LOWER_IS_BETTER, Cell, columns_of, heading

NEEDLES = 'niah', 'multikey'
MARKS = 'osDv^<>PX*hp'
COLORS = [f'C{i}' for i in range(10)] + ['black', 'navy', 'darkgreen', 'maroon', 'goldenrod']


def needle_grid(rows: list[dict], task: str, method: str, parts: int) -> tuple[list[int], list[list[float]]]:
    """(lengths, [parts][lengths] of the mean score): needles by depth; nan where none was asked."""
    lengths = sorted({row['length'] for row in rows if row['task'] == task})
    sums = [[[0.0, 0] for _ in lengths] for _ in range(parts)]
    for row in rows:
        if row['task'] == task and row['method'] == method and row.get('depth') is not None:
            cell = sums[min(int(row['depth'] * parts), parts - 1)][lengths.index(row['length'])]
            cell[0] += row['score']
            cell[1] += 1
    return lengths, [[total / n if n else math.nan for total, n in line] for line in sums]


def needle_map(rows: list[dict], task: str, methods: list[str], path: Any) -> None:
    """A heat map for each method: depth of the needle by length of the context, green where it is found."""
    mine = [row for row in rows if row['task'] == task]
    depths = len({row['depth'] for row in mine})
    parts = min(10, max(1, depths))
    grids = [needle_grid(mine, task, method, parts) for method in methods]
    lengths = grids[0][0]
    down = -(-len(methods) // 7)
    across = -(-len(methods) // down)
    figure = _figure_class()(figsize=(1.2 + across * (1.1 + .35 * len(lengths)), .9 + down * (1.1 + .2 * parts)),
                             layout='constrained')
    axes = figure.subplots(down, across, squeeze=False, sharey=True)
    image = None
    for axis in axes.flat[len(methods):]:
        axis.set_axis_off()
    for axis, method, (_, grid) in zip(axes.flat, methods, grids):
        image = axis.imshow(grid, vmin=0, vmax=1, cmap='RdYlGn', aspect='auto')
        axis.set_title(method, fontsize=9)
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
        axis.set_yticks(range(parts), [f'{100 * (i + .5) / parts:.0f} %' for i in range(parts)], fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel('depth of the needle')
    for axis in axes[-1]:
        axis.set_xlabel('tokens')
    figure.colorbar(image, ax=axes, label='found', shrink=.8)
    figure.suptitle(f'{task}: needles found, by depth and length')
    figure.savefig(path, dpi=150)


def quality_chart(cells: list[Cell], path: Any) -> None:
    """A panel for each task and length: quality over the ratio to f16."""
    columns = columns_of(cells)
    methods = list(dict.fromkeys(cell.method for cell in cells))
    across = min(len(columns), 3)
    down = -(-len(columns) // across)
    figure = _figure_class()(figsize=(4.2 * across, 3.4 * down + .9), layout='constrained')
    axes = figure.subplots(down, across, squeeze=False)
    for axis in axes.flat[len(columns):]:
        axis.set_axis_off()
    for axis, column in zip(axes.flat, columns):
        _panel(axis, column, cells, methods)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=min(5, len(methods)), fontsize=8)
    figure.savefig(path, dpi=150)


def _panel(axis, column, cells, methods) -> None:
    mine = [cell for cell in cells if (cell.task, cell.length) == column]
    bits = mine[0].metric == LOWER_IS_BETTER
    for number, method in enumerate(methods):
        for cell in mine:
            if cell.method == method:
                axis.errorbar(cell.ratio, cell.score, yerr=None if bits else cell.error,
                              marker=MARKS[number % len(MARKS)], color=COLORS[number % len(COLORS)], linestyle='none',
                              capsize=2, label=method)
    full = next((cell.score for cell in mine if cell.method == 'full'), None)
    if full is not None:
        axis.axhline(full, color='gray', linewidth=.8, linestyle=':')
    axis.set_xscale('log')
    ticks = [x for x in (1, 2, 4, 8, 16, 32, 64, 128) if x <= 2 * max(cell.ratio for cell in cells)]
    axis.set_xticks(ticks, [str(x) for x in ticks])
    axis.minorticks_off()
    axis.set_xlabel('times less memory than f16')
    axis.set_ylabel('bits per byte' if bits else 'right')
    if bits:
        axis.invert_yaxis()  # up is better in every panel
    else:
        axis.set_ylim(-.05, 1.05)
    axis.set_title(heading(*column, mine), fontsize=10)
    axis.grid(alpha=.3)
