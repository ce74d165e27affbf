# SPDX-License-Identifier: Apache-2.0
"""Answers as a table: for people, as CSV and as JSON."""
from __future__ import annotations

import csv
import dataclasses
import io
import math
from typing import Any

LOWER_IS_BETTER = 'bits'


@dataclasses.dataclass
class Cell:
    """A method on a task at a length."""

    task: str
    length: int
    method: str
    metric: str
    items: int
    score: float  #: mean
    error: float | None  #: standard error of the mean; None: of one item
    ratio: float  #: bytes of f16 to bytes held
    share: float | None = None  #: of tokens that are right, where all were to be
    change: float | None = None  #: of bits, to the method `full` on the same items, in percent
    change_error: float | None = None


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def summarize(rows: list[dict], methods: list[str] | None = None) -> list[Cell]:
    """Cells by task and length, each in the order in which they come first; methods in their own."""
    groups: dict[tuple, list[dict]] = {}
    # Items of files have lengths of their own; they are taken together.
    for row in rows:
        groups.setdefault((row['task'], 0 if row.get('given') else row['length'], row['method']),
                          []).append(row)
    order = methods or list(dict.fromkeys(row['method'] for row in rows))
    first = {task: place for place, task in enumerate(dict.fromkeys(row['task'] for row in rows))}
    tasks = sorted(dict.fromkeys(key[:2] for key in groups), key=lambda key: (first[key[0]], key[1]))
    return [_cell(groups[(*task, method)], groups.get((*task, 'full')), task[1])
            for method in order for task in tasks if (*task, method) in groups]


def _cell(rows: list[dict], full: list[dict] | None, length: int) -> Cell:
    first = rows[0]
    score, error = mean_and_error([row['score'] for row in rows])
    cell = Cell(first['task'], length, first['method'], first['metric'], len(rows), score, error,
                sum(row['dense'] for row in rows) / sum(row['bytes'] for row in rows))
    if 'share' in first:
        cell.share = sum(row['share'] for row in rows) / len(rows)
    if first['metric'] == LOWER_IS_BETTER and full:
        base = {row['index']: row['score'] for row in full}
        both = [100 * (row['score'] / base[row['index']] - 1) for row in rows if row['index'] in base]
        if both:
            cell.change, cell.change_error = mean_and_error(both)
    return cell


def columns_of(cells: list[Cell]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((cell.task, cell.length) for cell in cells))


def heading(task: str, length: int, cells: list[Cell]) -> str:
    items = [cell.items for cell in cells if (cell.task, cell.length) == (task, length)]
    count = f'{min(items)}' if min(items) == max(items) else f'{min(items)}-{max(items)}'
    return f'{task}{f" {length}" if length else ""} ({count})'


def value_of(cell: Cell | None) -> str:
    """0.88 +-0.08, with bits 0.9345 (+0.3 %)."""
    if cell is None:
        return ''
    if cell.metric != LOWER_IS_BETTER:
        # where all are alike, none is known: 8 of 8 is no certainty
        error = f' ±{cell.error:.2f}' if cell.error else ''
        return f'{cell.score:.2f}{error}' + ('' if cell.share is None else f' ({cell.share:.3f})')
    if cell.change is None or cell.method == 'full':
        return f'{cell.score:.4f}'
    error = '' if cell.change_error is None else f' ±{cell.change_error:.1f}'
    return f'{cell.score:.4f} ({cell.change:+.1f}{error} %)'


def table(cells: list[Cell]) -> str:
    """Markdown, which is readable as it is: a row for each method, a column for each task and length."""
    columns = columns_of(cells)
    lines = [['method', 'ratio', *(heading(*column, cells) for column in columns)]]
    for method in dict.fromkeys(cell.method for cell in cells):
        mine = {(cell.task, cell.length): cell for cell in cells if cell.method == method}
        ratios = [cell.ratio for cell in mine.values()]
        low, high = f'{min(ratios):.2f}', f'{max(ratios):.2f}'
        lines.append([method, low if low == high else f'{low}-{high}',
                      *(value_of(mine.get(column)) for column in columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ['-' * width for width in widths])
    return '\n'.join('| ' + ' | '.join(part.ljust(width) for part, width in zip(line, widths)) + ' |'
                     for line in lines)


def legend(cells: list[Cell]) -> str:
    notes = ['ratio: bytes of dense f16 to bytes held after the context, before the question',
             'in brackets behind the task: items; ±: standard error']
    metrics = {cell.metric for cell in cells}
    if 'tokens' in metrics:
        notes.append('copy: passages of which all tokens are right (share of tokens that are)')
    if 'bits' in metrics:
        notes.append('ppl: bits per byte, less is better (mean change to full on the same items)')
    return '\n'.join(notes)


def as_csv(cells: list[Cell]) -> str:
    out = io.StringIO()
    names = [field.name for field in dataclasses.fields(Cell)]
    writer = csv.writer(out, lineterminator='\n')
    writer.writerow(names)
    for cell in cells:
        writer.writerow(['' if value is None else value for value in (getattr(cell, name) for name in names)])
    return out.getvalue()


def as_dicts(cells: list[Cell]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(cell) for cell in cells]
