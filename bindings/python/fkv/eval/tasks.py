# SPDX-License-Identifier: Apache-2.0
"""Items: a context, a question about it, and what is right. Made from any text, always the same for a seed."""
from __future__ import annotations

import collections
import dataclasses
import random
import re
from typing import Any

TASKS = 'niah', 'multikey', 'vt', 'copy', 'ppl'
HEAD = 'A special magic number is hidden within the following text. Make sure to memorize it.\n'
SAID = '\nOne of the special magic numbers for {key} is: {value}.\n'
ASKED = ('What is the special magic number for {key} mentioned in the provided text? The special magic number '
         'for {key} mentioned in the provided text is')
COPY_CHARACTERS = 160
TEXT_TOKENS = 511
KEYS_AT_8192 = 61
CHAIN = 5  #: variables that have the value, in the task vt
MIN_HAY = 64
VOCABULARY = 6000


@dataclasses.dataclass
class Item:
    """What is asked. Token ids; the context is coded before the question is known."""

    task: str
    length: int  #: of the context with the question, as asked for
    index: int
    context: list[int]
    question: list[int]
    answer: list[int] = dataclasses.field(default_factory=list)  #: given token by token; empty: generated
    metric: str = 'begins'  #: of metrics.METRICS; 'tokens' and 'bits' of what is given token by token
    references: list[str] = dataclasses.field(default_factory=list)
    max_new: int = 0  #: tokens to generate
    depth: float | None = None
    given: bool = False  #: read from a file

    @property
    def key(self) -> tuple:
        return self.task, self.length, self.index


class Source:
    """A text to make items from: its words, and its halves for calibration and for questions."""

    def __init__(self, text: str, tokens: Any, seed: int = 1):
        self.tokens, self.seed = tokens, seed
        half = len(text) // 2
        cut = text.find(' ', half)
        half = cut if cut >= 0 else half
        self.calibration, self.text = text[:half], text[half:]
        counts = collections.Counter(re.findall(r'\b[a-z]{4,10}\b', text))
        self.words = [word for word, _ in counts.most_common(VOCABULARY)]
        if len(self.words) < 100:
            raise ValueError(f'the text has {len(self.words)} different words of 4 to 10 letters; at least 100 '
                             'are needed')

    def dice(self, *what: Any) -> random.Random:
        return random.Random('/'.join(map(str, (self.seed, *what))))

    def hay(self, dice: random.Random, count: int, text: str | None = None) -> list[int]:
        """`count` tokens of the text, from anywhere; it is read in a circle if it is short."""
        text = self.text if text is None else text
        at = dice.randrange(len(text))
        return self.stretch(text, at, count)

    def stretch(self, text: str, at: int, count: int) -> list[int]:
        ids: list[int] = []
        at %= len(text)
        while len(ids) < count:
            piece = text[at:at + 8 * (count - len(ids)) + 64]  # few tokens are longer
            ids += self.tokens.encode(piece)
            at = 0
        return ids[:count]


def make(source: Source, task: str, length: int, index: int, count: int) -> Item:
    """Item `index` of `count` of a task, whose context and question have `length` tokens."""
    item = _MAKERS[task](source, length, index, count)
    item.context = source.tokens.prefix + item.context
    return item


def items(source: Source, task: str, length: int, count: int) -> list[Item]:
    return [make(source, task, length, index, count) for index in range(count)]


def _room(length: int, fixed: int, what: str) -> int:
    if length < fixed + MIN_HAY:
        raise ValueError(f'a context of {length} tokens is too short for {what}: {fixed + MIN_HAY} are needed')
    return length - fixed


def _hide(source: Source, hay: list[int], facts: list[tuple[float, str]]) -> list[int]:
    """The facts at their depths, between words."""
    out: list[int] = []
    used = 0
    for depth, fact in sorted(facts):
        at = target = min(int(depth * len(hay)), len(hay))
        while at > used and at < len(hay) and not source.tokens.begins_word(hay[at]):
            at -= 1
        if at == used < len(hay) and not (used and source.tokens.begins_word(hay[used])):
            at = max(target, used)  # there is no word to go before
        out += hay[used:at] + source.tokens.encode(fact)
        used = at
    return out + hay[used:]


def _keys(source: Source, dice: random.Random, count: int) -> list[str]:
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[f'{dice.choice(source.words)}-{dice.choice(source.words)}'] = None
    return list(keys)


def _needles(source: Source, task: str, length: int, index: int, depth: float, keys: int) -> Item:
    dice = source.dice(task, length, index)
    encode = source.tokens.encode
    names = _keys(source, dice, keys)
    values = [''.join(dice.choices('0123456789', k=7)) for _ in names]
    depths = [depth] + [dice.random() for _ in names[1:]]
    facts = [(where, SAID.format(key=key, value=value)) for where, key, value in zip(depths, names, values)]
    question, answer = encode(ASKED.format(key=names[0])), f' {values[0]}.'
    fixed = len(source.tokens.prefix) + len(encode(HEAD)) + len(question) + sum(
        len(encode(fact)) for _, fact in facts) + 1
    hay = source.hay(dice, _room(length, fixed, f'{task} with {keys} keys'))
    context = encode(HEAD) + _hide(source, hay, facts) + encode('\n')
    return Item(task, length, index, context[:length - len(question) - len(source.tokens.prefix)], question,
                references=[answer], max_new=len(encode(answer)) + 2, depth=depth)


def _niah(source: Source, length: int, index: int, count: int) -> Item:
    return _needles(source, 'niah', length, index, (index + .5) / count, 1)


def _multikey(source: Source, length: int, index: int, count: int) -> Item:
    return _needles(source, 'multikey', length, index, (index + .5) / count, max(2, KEYS_AT_8192 * length // 8192))


def _vt(source: Source, length: int, index: int, count: int) -> Item:
    """One chain of variables has the value that is asked for, another one has another value."""
    dice = source.dice('vt', length, index)
    encode = source.tokens.encode
    names: dict[str, None] = {}
    while len(names) < 2 * CHAIN:
        names[''.join(dice.choices('ABCDEFGHIJKLMNOPQRSTUVWXYZ', k=5))] = None
    values = [str(dice.randrange(10000, 100000)) for _ in range(2)]
    facts = []
    for chain, value in enumerate(values):
        mine = list(names)[chain * CHAIN:(chain + 1) * CHAIN]
        says = [value] + [f'VAR {name}' for name in mine]
        depths = sorted(dice.random() for _ in mine)
        facts += [(depth, f'\nVAR {name} = {is_}\n') for depth, name, is_ in zip(depths, mine, says)]
    head = encode('Variables are set in the text below, to numbers or to what other variables are. Follow them.\n')
    question = encode(f'Which {CHAIN} variables are {values[0]}, be it through others? Those that are {values[0]} '
                      'are: VAR')
    fixed = len(source.tokens.prefix) + len(head) + len(question) + sum(len(encode(fact)) for _, fact in facts) + 1
    hay = source.hay(dice, _room(length, fixed, 'vt'))
    context = head + _hide(source, hay, facts) + encode('\n')
    references = list(names)[:CHAIN]
    return Item('vt', length, index, context, question, metric='all', references=references,
                max_new=len(encode(', '.join(f'VAR {name}' for name in references))) + 8)


def _tag(source: Source, dice: random.Random) -> str:
    kind, word = dice.random(), dice.choice(source.words)
    if kind < .7:
        return f'{word}-{dice.choice(source.words)}'
    return f'{dice.randrange(1 << 32):08x}' if kind < .85 else f'{word.upper()}_{dice.randrange(100)}'


def _copy(source: Source, length: int, index: int, count: int) -> Item:
    """A marked passage is to be repeated. It and its surroundings come from different parts of the text."""
    dice = source.dice('copy', length, index)
    encode = source.tokens.encode
    half = len(source.text) // 2
    at = dice.randrange(max(1, half - COPY_CHARACTERS))
    passage = source.text[at:at + COPY_CHARACTERS].replace('\n', ' ')
    tag, depth = _tag(source, dice), .1 + .7 * dice.random()
    note = f'\n<note {tag}>{passage}</note>\n'
    question, answer = encode(f'<repeat {tag}>'), encode(passage)
    fixed = len(source.tokens.prefix) + len(encode(note)) + len(question) + 1
    hay = source.hay(dice, _room(length, fixed, 'copy'), source.text[half:])
    at = int(depth * len(hay))
    context = hay[:at] + encode(note) + hay[at:] + encode('\n')
    return Item('copy', length, index, context, question, answer, 'tokens', depth=depth)


def _ppl(source: Source, length: int, index: int, count: int) -> Item:
    """Plain text. The first token behind the context is given, as a question of one token."""
    wanted = length - len(source.tokens.prefix) + TEXT_TOKENS
    at = index * len(source.text) // count
    ids = source.stretch(source.text, at, wanted)
    cut = length - len(source.tokens.prefix)
    return Item('ppl', length, index, ids[:cut], ids[cut:cut + 1], ids[cut + 1:], 'bits')


_MAKERS = {'niah': _niah, 'multikey': _multikey, 'vt': _vt, 'copy': _copy, 'ppl': _ppl}
