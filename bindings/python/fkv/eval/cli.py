# SPDX-License-Identifier: Apache-2.0
"""python -m fkv eval."""
from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import sys
from typing import Any

from . import charts, files, report
from .names import KNOWN, parse_all
from .tasks import TASKS, Item, Source, items

DEFAULT_METHODS = 'full,int4,int2'


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        'eval', help='compare codings and other methods on a Hugging Face model',
        description='Asks a model the same questions from caches of several methods. Contexts are read once, and '
                    'coded before the question. Needs torch and transformers.')
    parser.add_argument('--model', required=True, help='folder or name that transformers can load')
    parser.add_argument('--text', nargs='+', metavar='FILE',
                        help='plain text that items are made of; its first half is for calibration only')
    parser.add_argument('--tasks', default=','.join(TASKS), metavar='TASK,..',
                        help=f'of {", ".join(TASKS)} (default: all, if there is a text)')
    parser.add_argument('--context', default='4096', metavar='N,N,..', help='tokens (default 4096)')
    parser.add_argument('--items', default='8', metavar='N or TASK=N,..',
                        help='items of each task and length (default 8)')
    parser.add_argument('--data', nargs='+', default=[], metavar='FILE', help='items from files of RULER or LongBench')
    parser.add_argument('--methods', metavar='METHOD,..', help=f'of {KNOWN} (default {DEFAULT_METHODS})')
    parser.add_argument('--profile', nargs='+', default=[], metavar='FILE', help='more methods: fkv:FILE')
    parser.add_argument('--output', type=pathlib.Path, metavar='DIR',
                        help='keeps answers, tables and pictures there; finished items are not asked again')
    parser.add_argument('--json', action='store_true', help='the table for programs')
    parser.add_argument('--quiet', action='store_true', help='no progress')
    parser.add_argument('--tokens', default='tokenizer', choices=('tokenizer', 'bytes'),
                        help='bytes: a byte is a token')
    parser.add_argument('--device', default='cpu', help='of torch (default cpu)')
    parser.add_argument('--dtype', default='auto', help='of the weights (default: as stored)')
    parser.add_argument('--threads', type=int, help='of torch and of libfkv (default: as torch has it)')
    parser.add_argument('--seed', type=int, default=1, help='of the items (default 1)')
    for name, value, what in (('sinks', 4, 'first tokens held exactly'), ('local', 128, 'newest tokens held exactly'),
                              ('calibrate', 4, 'contexts that the Fourier methods are calibrated on')):
        parser.add_argument(f'--{name}', type=int, default=value, help=f'{what} (default {value})')
    parser.set_defaults(run=evaluate)


# ---- options

def lengths_of(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(',')]
    except ValueError:
        raise ValueError(f'--context {text}: numbers of tokens are expected, like 4096,8192') from None
    if min(lengths) < 1:
        raise ValueError(f'--context {text}: at least 1 token')
    return list(dict.fromkeys(lengths))


def tasks_of(text: str) -> list[str]:
    tasks = list(dict.fromkeys(text.split(',')))
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f'--tasks: {task!r} is no task; known are {", ".join(TASKS)}')
    return tasks


def counts_of(text: str, tasks: list[str]) -> dict[str, int]:
    """Items of each task: one number for all, TASK=N for one; tasks that are not named have 8."""
    counts = dict.fromkeys(tasks, 8)
    for part in text.split(','):
        name, equals, number = part.rpartition('=')
        if not number.isdigit() or int(number) < 1 or (equals and name not in TASKS):
            raise ValueError(f'--items {text}: a number, or like copy=8,ppl=4')
        if not equals:
            counts = dict.fromkeys(tasks, int(number))
        elif name in counts:
            counts[name] = int(number)
    return counts


def methods_of(args: Any) -> list:
    texts = [text for text in (args.methods or DEFAULT_METHODS).split(',') if text]
    texts += [f'fkv:{file}' for file in args.profile]
    names = parse_all(texts)
    for name in names:
        if name.kind == 'fkv' and not pathlib.Path(name.file).is_file():
            raise ValueError(f'{name.file}: no such profile')
        if name.kind.startswith('fourier') and not args.text:
            raise ValueError(f'{name} is calibrated on a text: --text FILE')
    return names


def read_text(paths: list[str]) -> str:
    return '\n'.join(pathlib.Path(path).read_bytes().decode('utf-8', 'replace') for path in paths)


# ---- the run

def make_items(args: Any, source: Source | None, tokens: Any, longest: int | None) -> list[Item]:
    made: list[Item] = []
    if source:
        tasks, lengths = tasks_of(args.tasks), lengths_of(args.context)
        counts = counts_of(args.items, tasks)
        if longest and max(lengths) > longest:
            print(f'fkv: the model was made for {longest} tokens; contexts of {max(lengths)} are longer',
                  file=sys.stderr)
        for length in lengths:
            for task in tasks:
                made += items(source, task, length, counts[task])
    limit = None if '=' in args.items else counts_of(args.items, ['data'])['data']
    for path in args.data:
        given = files.read(path, tokens, limit)
        made += [files.shorten(item, longest) for item in given] if longest else given
    seen: set[tuple] = set()
    for item in made:
        if item.key in seen:
            raise ValueError(f'two items are {item.task} {item.index}: give files of the same task one by one')
        seen.add(item.key)
    # In turn, so that what is there early tells something of every task.
    return sorted(made, key=lambda item: item.index)


def marks_of(args: Any, text: str) -> dict:
    """What answers depend on, apart from their own names: folders are only continued with the same."""
    data = hashlib.sha256(text.encode()).hexdigest()[:16]
    given = {path: hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:16] for path in args.data}
    return dict(model=str(args.model), text=data, data=given, items=args.items, seed=args.seed, tokens=args.tokens,
                dtype=args.dtype, sinks=args.sinks, local=args.local, calibrate=args.calibrate)


def load_model(args: Any) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("python -m fkv eval needs torch and transformers: pip install 'fkv[eval]'") from error
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if args.threads is not None:
        import torch
        torch.set_num_threads(args.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    return model.to(args.device).eval()


def check(args: Any) -> list:
    """Whatever is wrong with the options is said before anything is loaded."""
    names = methods_of(args)
    if not args.text and not args.data:
        raise ValueError('nothing to ask: --text FILE makes items from a text, --data FILE reads them')
    tasks = tasks_of(args.tasks)
    lengths_of(args.context)
    counts_of(args.items, tasks)
    if args.threads is not None and args.threads < 1:
        raise ValueError('--threads must be at least 1')
    if args.sinks < 0 or args.local < 1 or args.calibrate < 1:
        raise ValueError('--sinks must be at least 0, --local and --calibrate at least 1')
    return names


def evaluate(args: Any) -> None:
    names = check(args)
    text = read_text(args.text) if args.text else ''
    answers_marks = marks_of(args, text)
    from . import run, tokens as tokens_
    model = load_model(args)
    from . import capture, methods
    tokens = tokens_.load(args.tokens, args.model)
    source = Source(text, tokens, args.seed) if text else None
    longest = getattr(model.config.get_text_config(), 'max_position_embeddings', None)
    asked = make_items(args, source, tokens, longest)
    reader = capture.Reader(model, args.threads)

    def calibration(length: int) -> list:
        dice = source.dice('calibration', length)
        return [source.hay(dice, length, source.calibration) for _ in range(args.calibrate)]

    room = max(len(item.question) + max(item.max_new, len(item.answer)) for item in asked)
    made = methods.make(names, reader, methods.Settings(
        args.sinks, args.local, calibration if source else None, args.output, room))
    answers = run.Answers(args.output, answers_marks)
    try:
        run.evaluate(reader, tokens, asked, made, answers, args.quiet)
    finally:
        wanted = {(*item.key, str(name)) for item in asked for name in names}
        rows = [row for row in answers.rows
                if (row['task'], row['length'], row['index'], row['method']) in wanted]
        if rows:
            show(args, rows, [str(name) for name in names])


def show(args: Any, rows: list[dict], methods: list[str]) -> None:
    cells = report.summarize(rows, methods)
    if args.json:
        print(json.dumps(report.as_dicts(cells), indent=1))
    else:
        print(f'{report.table(cells)}\n\n{report.legend(cells)}')
    if args.output:
        write(args.output, rows, cells, methods)


def write(folder: pathlib.Path, rows: list[dict], cells: list, methods: list[str]) -> None:
    (folder / 'table.md').write_text(f'{report.table(cells)}\n\n{report.legend(cells)}\n', encoding='utf-8')
    (folder / 'table.csv').write_text(report.as_csv(cells), encoding='utf-8')
    (folder / 'table.json').write_text(json.dumps(report.as_dicts(cells), indent=1) + '\n', encoding='utf-8')
    try:
        charts.quality_chart(cells, folder / 'quality.png')
        for task in charts.NEEDLES:
            if any(row['task'] == task for row in rows):
                there = [m for m in methods if any(r['task'] == task and r['method'] == m for r in rows)]
                charts.needle_map(rows, task, there, folder / f'{task}.png')
    except ImportError as error:
        print(f'fkv: no pictures: {error}', file=sys.stderr)
