# SPDX-License-Identifier: Apache-2.0
"""The loop: every item is read once and asked of every method; answers are written as they come."""
from __future__ import annotations

import json
import math
import pathlib
import sys
import time
from typing import Any, Iterable

from .metrics import METRICS
from .tasks import Item

ANSWERS, SETTINGS = 'answers.jsonl', 'settings.json'


class Answers:
    """What was answered, in a folder: a line of JSON for each item and method. Finished ones are kept."""

    def __init__(self, folder: pathlib.Path | None, settings: dict):
        self.rows: list[dict] = []
        self.file = folder and folder / ANSWERS
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        marks = folder / SETTINGS
        if marks.exists():
            self._compare(json.loads(marks.read_text()), settings, folder)
            self._load()
        else:
            if self.file.exists():
                raise ValueError(f'{self.file} is there, but {marks} is not: choose another --output')
            marks.write_text(json.dumps(settings, indent=1) + '\n')

    @staticmethod
    def _compare(before: dict, now: dict, folder: pathlib.Path) -> None:
        other = [name for name in now if before.get(name) != now[name]]
        if other:
            raise ValueError(f'{folder} has answers with another {", ".join(other)} '
                             f'({before.get(other[0])!r}, now {now[other[0]]!r}): choose another --output')

    def _load(self) -> None:
        if not self.file.exists():
            return
        data = self.file.read_bytes()
        whole = data[:data.rfind(b'\n') + 1]
        if len(whole) < len(data):  # the last line was cut off
            with open(self.file, 'r+b') as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.decode().splitlines(), 1):
            try:
                self.rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f'{self.file}, line {number}: {error}') from None

    def done(self) -> set:
        return {(row['task'], row['length'], row['index'], row['method']) for row in self.rows}

    def add(self, row: dict) -> None:
        self.rows.append(row)
        if self.file:
            with open(self.file, 'a', encoding='utf-8') as file:
                file.write(json.dumps(row) + '\n')


class Progress:
    """A line on stderr: in place where somebody watches, else one in a while. Nothing if quiet."""

    EVERY = 30.0  #: seconds between lines of a log

    def __init__(self, total: int, quiet: bool = False):
        self.total, self.done, self.quiet = total, 0, quiet
        self.start = self.last = time.monotonic()
        self.watched = sys.stderr.isatty()

    def step(self, what: str, done: int = 1) -> None:
        self.done += done
        now = time.monotonic()
        if self.quiet or not self.total or not (self.watched or now - self.last > self.EVERY
                                                or self.done == self.total):
            return
        self.last = now
        left = (now - self.start) / self.done * (self.total - self.done)
        bar = '#' * (24 * self.done // self.total)
        text = f'evaluating [{bar:24}] {self.done}/{self.total}, {what}, {_clock(left)} left'
        end = '\n' if not self.watched or self.done == self.total else ''
        print(f'\r{text:90}' if self.watched else text, end=end, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return f'{seconds:.0f} s' if seconds < 90 else f'{seconds / 60:.0f} min'


def ask(reader: Any, tokens: Any, cache: Any, item: Item) -> dict:
    """{'score': .., and more by the metric}."""
    if item.metric in METRICS:
        said = reader.generate(cache, item.question, item.max_new, tokens.end)
        answer = tokens.decode(said)
        return {'score': METRICS[item.metric](answer, item.references), 'answer': answer}
    logits = reader.follow(cache, item.question, item.answer).float()
    import torch
    right = torch.tensor(item.answer, device=logits.device)
    if item.metric == 'tokens':
        same = logits.argmax(-1) == right
        return {'score': float(same.all()), 'share': same.double().mean().item()}
    nats = torch.nn.functional.cross_entropy(logits.double(), right, reduction='sum').item()
    bits = nats / math.log(2)
    return {'score': bits / max(1, tokens.size(item.answer)), 'bits per token': bits / len(item.answer)}


def evaluate(reader: Any, tokens: Any, items: Iterable[Item], methods: list, answers: Answers,
             quiet: bool = False) -> None:
    """Asks every item of every method that has not answered it."""
    done = answers.done()
    todo = []
    for item in items:
        missing = [method for method in methods if (*item.key, str(method.name)) not in done]
        if missing:
            todo.append((item, missing))
    progress = Progress(sum(1 + len(missing) for _, missing in todo), quiet)
    for item, missing in todo:
        for method in missing:
            method.prepare(item.length)
        context = reader.read(item.context)
        dense = reader.dense_bytes(context.tokens)
        progress.step(f'{item.task} {item.length}')
        for method in missing:
            begin = time.monotonic()
            cache, size = method.hold(context)
            held = time.monotonic()
            result = ask(reader, tokens, cache, item)
            answers.add(dict(task=item.task, length=item.length, index=item.index, depth=item.depth,
                             metric=item.metric, given=item.given, method=str(method.name), tokens=context.tokens, bytes=size,
                             dense=dense, seconds=[held - begin, time.monotonic() - held], **result))
            del cache
            progress.step(f'{item.task} {item.length}, {method.name}')
