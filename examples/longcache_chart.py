# SPDX-License-Identifier: Apache-2.0
"""Draws what examples/longcache.sh measured: python3 longcache_chart.py FOLDER OUT.png"""
import glob
import json
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = [("plain", "plain attention"), ("exact", "selection, exact"),
           ("coded", "selection, coded")]
ROWS = [("alone", "one number in the text"), ("among", "among 8 others")]
BANDS = 5


def read(folder, name):
    """{length: [right of total in each band of depth]}"""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(folder), name + "-*.jsonl")):
        bands = [[0, 0] for _ in range(BANDS)]
        with open(path) as lines:
            for item in map(json.loads, lines):
                if "summary" in item:
                    continue
                band = bands[min(BANDS - 1, int(item["depth"] * BANDS))]
                band[0] += item["right"]
                band[1] += 1
        length = int(os.path.basename(path)[len(name) + 1:-len(".jsonl")])
        found[length] = bands
    return found


def draw(axis, found, lengths):
    for x, length in enumerate(lengths):
        for y in range(BANDS):
            right, total = found[length][y] if length in found else (0, 0)
            shade = right / total if total else None
            axis.add_patch(plt.Rectangle((x, y), 1, 1, ec="white",
                                         fc="0.9" if shade is None else plt.cm.RdYlGn(shade)))
            axis.text(x + 0.5, y + 0.5, f"{right}/{total}" if total else "not run",
                      ha="center", va="center", fontsize=8)
    axis.set_xlim(0, len(lengths))
    axis.set_ylim(BANDS, 0)
    axis.set_xticks([x + 0.5 for x in range(len(lengths))], [f"{n // 1024}k" for n in lengths])
    axis.set_yticks([y + 0.5 for y in range(BANDS)],
                    [f"{100 * y // BANDS}-{100 * (y + 1) // BANDS} %" for y in range(BANDS)])


def main(folder, out):
    results = [[read(folder, f"{row}-{column}") for column, _ in COLUMNS] for row, _ in ROWS]
    lengths = sorted({n for row in results for found in row for n in found})
    if not lengths:
        sys.exit(f"{folder}: no answers (alone-*.jsonl, among-*.jsonl); run examples/longcache.sh")
    figure, axes = plt.subplots(len(ROWS), len(COLUMNS), figsize=(4 * len(COLUMNS), 6.4),
                                sharex=True, sharey=True)
    for row, found_of in zip(axes, results):
        for axis, found in zip(row, found_of):
            draw(axis, found, lengths)
    for axis, (_, title) in zip(axes[0], COLUMNS):
        axis.set_title(title)
    for axis, (_, title) in zip(axes[:, 0], ROWS):
        axis.set_ylabel(f"{title}\ndepth")
    for axis in axes[-1]:
        axis.set_xlabel("tokens of context")
    figure.suptitle("Numbers found (model trained for 8192 tokens)")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
