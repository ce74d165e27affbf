# SPDX-License-Identifier: Apache-2.0
"""The table and the chart of what examples/quality.sh measured: python3 quality_chart.py FOLDER"""
import csv
import json
import math
import os
import sys

TASKS = ('text', 'multikey', 'copy')
EXACT = 'exact'
SERIES = (('uniform, before RoPE', 's', lambda p: p.startswith('uniform') and 'unrotated' in p),
          ('uniform, after RoPE', 'v', lambda p: p.startswith('uniform') and 'unrotated' not in p),
          ('FourierAttention, mended', 'D', lambda p: p == 'fourier'),
          ('calibrated', 'o', lambda p: p.startswith('calibrated')),
          ('calibrated without gradients', 'x', lambda p: p.startswith('forward')))
COLUMNS = (('profile', 'profile', '{}'), ('ratio', 'ratio', '{:.2f}'),
           ('bits_per_byte', 'bits per byte', '{:.4f}'),
           ('text_change', 'to exact', '{:+.2f} %'), ('text_error', '+-', '{:.2f} %'),
           ('multikey_right', 'one of 61 keys', '{}'), ('copy_right', 'passage of 160 bytes', '{}'),
           ('copy_bytes', 'its bytes', '{:.3f}'))


def read(folder):
    """{task: {profile: [items]}}, profiles by their short names; of items that all were asked."""
    found = {}
    for task in TASKS:
        profiles = found[task] = {}
        with open(os.path.join(folder, f'quality-{task}.jsonl'), encoding='utf-8') as lines:
            for item in map(json.loads, lines):
                if 'summary' not in item:
                    name = os.path.basename(item['profile']).removesuffix('.json')
                    profiles.setdefault(name, []).append(item)
        asked = min(map(len, profiles.values()))
        found[task] = {name: items[:asked] for name, items in profiles.items()}
    return found


def mean(values):
    return sum(values) / len(values)


def change(coded, exact):
    """Mean change of bits per byte in percent, and its standard error: the same texts, in pairs."""
    base = mean([x['bits_per_byte'] for x in exact])
    pairs = [100 * (a['bits_per_byte'] - b['bits_per_byte']) / base for a, b in zip(coded, exact)]
    middle = mean(pairs)
    spread = sum((x - middle) ** 2 for x in pairs) / max(1, len(pairs) - 1)
    return middle, math.sqrt(spread / len(pairs))


def rows_of(found):
    rows = []
    for name, items in found['text'].items():
        text_change, text_error = change(items, found['text'][EXACT])
        right = {task: sum(x['right'] for x in found[task][name]) for task in ('multikey', 'copy')}
        total = {task: len(found[task][name]) for task in right}
        rows.append({
            'profile': name, 'ratio': mean([x['ratio'] for x in items]),
            'bits_per_byte': mean([x['bits_per_byte'] for x in items]),
            'text_change': text_change, 'text_error': text_error,
            **{f'{task}_right': f'{right[task]} of {total[task]}' for task in right},
            **{task: right[task] / total[task] for task in right},
            'copy_bytes': mean([x['byte_accuracy'] for x in found['copy'][name]])})
    return sorted(rows, key=lambda row: row['ratio'])


def write_tables(rows, folder):
    lines = ['| ' + ' | '.join(title for _, title, _ in COLUMNS) + ' |', '|---' * len(COLUMNS) + '|']
    lines += ['| ' + ' | '.join(form.format(row[key]) for key, _, form in COLUMNS) + ' |'
              for row in rows]
    with open(os.path.join(folder, 'quality.md'), 'w', encoding='utf-8') as file:
        print(*lines, sep='\n', file=file)
    with open(os.path.join(folder, 'quality.csv'), 'w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(*lines, sep='\n')


def draw(rows, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    panels = (('text_change', 'bits per byte of text, change in %', 1),
              ('multikey', 'right: one of 61 keys, %', 100), ('copy', 'right: passages, %', 100))
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    exact = next(row for row in rows if row['profile'] == EXACT)
    for axis, (key, title, scale) in zip(axes, panels):
        axis.axhline(scale * exact[key], color='0.6', lw=1, label='exact, f16')
        for label, marker, belongs in SERIES:
            points = [row for row in rows if belongs(row['profile'])]
            if not points:
                continue
            errors = [row['text_error'] for row in points] if key == 'text_change' else None
            axis.errorbar([row['ratio'] for row in points], [scale * row[key] for row in points],
                          yerr=errors, marker=marker, ms=5, lw=1, capsize=2, label=label)
        axis.set_xscale('log', base=2)
        axis.set_xticks([2, 3, 4, 6, 8, 12, 16, 24], ['2', '3', '4', '6', '8', '12', '16', '24'])
        axis.set_xlabel('times less memory than f16, everything counted')
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(folder):
    rows = rows_of(read(folder))
    write_tables(rows, folder)
    chart = os.path.join(folder, 'quality.png')
    try:
        draw(rows, chart)
        print(f'The chart: {chart}')
    except ImportError:
        print('No chart: it needs matplotlib (apt-get install python3-matplotlib)')


if __name__ == '__main__':
    main(*sys.argv[1:])
