# SPDX-License-Identifier: Apache-2.0
"""Items from files in the formats in which RULER and LongBench are published: JSON lines.

RULER      {"index", "input", "outputs": [..], ..}: the last line of the input is the question, with
           "answer_prefix" behind it if there is one. The task is the name of the file's folder, or of the file.
           Its measure is the share of the outputs in the answer; of tasks named qa.. whether any is.
LongBench  {"input", "context", "answers": [..], "dataset", ..}: the input is the question. Measured by F1.
"""
from __future__ import annotations

import json
import pathlib
from typing import Any, Iterator

from .tasks import Item

#: LongBench's sets that are measured by F1, and how many tokens their answers may have.
F1_SETS = {'narrativeqa': 128, 'qasper': 128, 'multifieldqa_en': 64, 'hotpotqa': 32, '2wikimqa': 32,
           'musique': 32, 'triviaqa': 32}
#: RULER's tasks, by how their names begin, and how many tokens their answers may have.
RULER_TOKENS = {'niah': 128, 'vt': 30, 'cwe': 120, 'fwe': 50, 'qa': 32}


def records(path: Any) -> Iterator[tuple[int, dict]]:
    """(line number, record) of a file of JSON lines."""
    with open(path, encoding='utf-8') as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f'{path}, line {number}: {error}') from None
            if not isinstance(record, dict):
                raise ValueError(f'{path}, line {number}: no JSON object')
            yield number, record


def read(path: Any, tokens: Any, limit: int | None = None) -> list[Item]:
    """The items of a file, at most `limit` of them. Their task is the set's name, their length what they have."""
    made: list[Item] = []
    for number, record in records(path):
        if limit is not None and len(made) >= limit:
            break
        place = f'{path}, line {number}'
        if {'context', 'answers', 'input'} <= set(record):
            made.append(_longbench(record, len(made), place, tokens))
        elif {'input', 'outputs'} <= set(record):
            made.append(_ruler(record, len(made), place, pathlib.Path(path), tokens))
        else:
            raise ValueError(f'{place}: neither of RULER (input, outputs) nor of LongBench (context, input, '
                             f'answers); it has {", ".join(sorted(record)) or "nothing"}')
    if not made:
        raise ValueError(f'{path}: no items')
    return made


def _strings(record: dict, name: str, place: str) -> list[str]:
    values = record[name]
    if isinstance(values, str):
        values = [values]
    if not isinstance(values, list) or not values or not all(isinstance(v, (str, int, float)) for v in values):
        raise ValueError(f'{place}: {name} must be a list of texts, and not empty')
    return [str(value) for value in values]


def _text(record: dict, name: str, place: str) -> str:
    if not isinstance(record.get(name), str):
        raise ValueError(f'{place}: {name} must be a text')
    return record[name]


def _item(task: str, index: int, context: str, question: str, tokens: Any, **more) -> Item:
    ids, asked = tokens.prefix + tokens.encode(context), tokens.encode(question)
    return Item(task, len(ids) + len(asked), index, ids, asked, given=True, **more)


def _ruler(record: dict, index: int, place: str, path: pathlib.Path, tokens: Any) -> Item:
    text = _text(record, 'input', place).rstrip('\n')
    cut = text.rfind('\n') + 1
    if not cut:
        raise ValueError(f'{place}: the input has one line; its last line must be the question')
    question = text[cut:]
    if record.get('answer_prefix'):
        question = f'{question} {_text(record, "answer_prefix", place).lstrip()}'
    task = path.stem
    for name in (path.parent.name, path.stem):  # RULER's own files are TASK/validation.jsonl
        if name.startswith(tuple(RULER_TOKENS)):
            task = name
    kind = next((kind for kind in RULER_TOKENS if task.startswith(kind)), 'niah')
    return _item(task, index, text[:cut], question, tokens, metric='part' if kind == 'qa' else 'all',
                 references=_strings(record, 'outputs', place), max_new=RULER_TOKENS[kind])


def _longbench(record: dict, index: int, place: str, tokens: Any) -> Item:
    name = str(record.get('dataset') or 'longbench')
    plain = name.removesuffix('_e')
    if plain not in F1_SETS and name != 'longbench':
        raise ValueError(f'{place}: {name} is not measured by F1; known are {", ".join(F1_SETS)}')
    question = f'\n\nQuestion: {_text(record, "input", place)}\nAnswer:'
    return _item(name, index, _text(record, 'context', place), question, tokens, metric='f1',
                 references=_strings(record, 'answers', place), max_new=F1_SETS.get(plain, 64))


def shorten(item: Item, longest: int) -> Item:
    """Leaves out the middle of a context, as LongBench does, so that item and answer have `longest` tokens."""
    room = longest - len(item.question) - max(item.max_new, len(item.answer))
    if len(item.context) > room:
        if room < 2:
            raise ValueError(f'{item.task} {item.index}: question and answer alone are longer than {longest} tokens')
        half = room // 2
        item.context = item.context[:half] + item.context[len(item.context) - (room - half):]
    return item
