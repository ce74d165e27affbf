# SPDX-License-Identifier: Apache-2.0
"""Batches of windows, drawn by several processes from one text that is mapped, not read."""
from __future__ import annotations

import mmap
import pathlib

import numpy
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .tasks import TRAINING, Mixer, frequent_words


def open_text(path: pathlib.Path) -> mmap.mmap:
    with open(path, 'rb') as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Batches(IterableDataset):
    """Without end: ids [count, length + 1] as uint8, and weights [count, length] of the losses of ids[:, 1:].

    Each process draws from a seed of its own, so that a seed gives the same batches for the same number of
    processes.
    """

    def __init__(self, path: pathlib.Path, words: list[str], length: int, count: int, seed: list[int]):
        super().__init__()
        self.path, self.words, self.length, self.count, self.seed = path, words, length, count, seed

    def __iter__(self):
        worker = get_worker_info()
        with open_text(self.path) as text:
            if len(text) <= 2 * self.length + 2:
                raise ValueError(f'{self.path} has {len(text)} bytes, too few for windows of {self.length}')
            mixer = Mixer(text, [*self.seed, worker.id if worker else 0], TRAINING, self.words)
            while True:
                yield self._batch(mixer)

    def _batch(self, mixer: Mixer) -> tuple[torch.Tensor, torch.Tensor]:
        ids = numpy.empty((self.count, self.length + 1), numpy.uint8)
        weights = numpy.empty((self.count, self.length), numpy.float32)
        for row in range(self.count):
            tokens, losses = mixer.window(self.length + 1)
            ids[row], weights[row] = tokens, losses[1:]
        return torch.from_numpy(ids), torch.from_numpy(weights)


def words_of(path: pathlib.Path) -> list[str]:
    with open_text(path) as text:
        return frequent_words(text)


def loader(batches: Batches, workers: int, pinned: bool) -> DataLoader:
    more = {'prefetch_factor': 4} if workers else {}
    return DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=pinned, **more)
