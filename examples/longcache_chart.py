# SPDX-License-Identifier: Apache-2.0
"""Draws what examples/longcache.sh measured: python3 longcache_chart.py FOLDER OUT.png"""
import glob
import json
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROWS = [("plain", "plain attention"), ("longcache", "selection, exact"),
        ("coded", "selection, coded")]
BANDS = 5


def read(folder, name):
    """{length: [right of total in each band of depth]}"""
    found = {}
    for path in glob.glob(os.path.join(folder, name + "-*.jsonl")):
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


def main(folder, out):
    results = [(title, read(folder, name)) for name, title in ROWS]
    lengths = sorted({n for _, found in results for n in found})
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3.6), sharey=True)
    for axis, (title, found) in zip(axes, results):
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
        axis.set_title(title)
        axis.set_xlabel("tokens of context")
    axes[0].set_ylabel("depth of the needle")
    figure.suptitle("Numbers found, of 20 hidden in each text (model trained for 8192 tokens)")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
