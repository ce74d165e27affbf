# SPDX-License-Identifier: Apache-2.0
"""Windows of prose with facts to look up and passages to repeat: what the small model is trained on,
calibrated on (examples/models/needle-13m/calibrate.py) and asked.

Profiles are remade from the windows that a seed gives: with the Mix of calibration, what is drawn, and in
which order, must stay (tests/bindings/python/test_needle_tasks.py).
"""
from __future__ import annotations

import collections
import dataclasses
import math
import re

import numpy

# what is said, what is asked, what is answered
SENTENCES = [
    ('One of the special magic numbers for {k} is: {v}.',
     'What is the special magic number for {k} mentioned in the provided text? The special magic '
     'number for {k} mentioned in the provided text is', ' {v}.'),
    ('The secret code of {k} is {v}.', 'Recall: the secret code of {k} is', ' {v}.'),
    ('{k} = {v};', 'assert {k} ==', ' {v};'),
    ('{k}: {v}', 'lookup {k} ->', ' {v}'),
    ('The favorite word of {k} is {v}.', 'Question: what is the favorite word of {k}? Answer:',
     ' {v}.'),
    ('Remember that {k} lives in {v}.', 'So where does {k} live? In', ' {v}.'),
]
HEAD = 'A special magic number is hidden within the following text. Make sure to memorize it.\n'
WORD = r'\b[a-z]{4,10}\b'


@dataclasses.dataclass(frozen=True)
class Mix:
    """How much of what is mixed in."""

    plain: float = .3                # share of windows that are prose alone
    passages: float = .5             # share of the others with a passage to repeat
    passages_from: int = 0           # bytes of the shortest window that may have one
    counts: tuple = (4, 16, 40, 80)  # facts in 8192 bytes, one of these
    full: float = math.inf           # share of a window that facts and questions may take


CALIBRATION = Mix()
# A fact that fell out of the window could not be looked up, hence the last two.
TRAINING = Mix(plain=.2, passages=.35, passages_from=2048, counts=(2, 6, 16, 40, 80, 160), full=.7)
LONGEST_FACT = 300  # bytes of a fact and its question, about


def frequent_words(corpus: bytes, count: int = 6000) -> list[str]:
    """Words that keys and values are made of; the first 20 MB suffice to count them."""
    found = collections.Counter(re.findall(WORD, corpus[:20_000_000].decode()))
    return sorted(word for word, _ in found.most_common(count))


class Mixer:
    """Draws windows from a corpus in ASCII (bytes, or anything of which a slice is bytes)."""

    def __init__(self, corpus, seed, mix: Mix = CALIBRATION, words: list[str] | None = None):
        self.corpus = corpus
        self.random = numpy.random.default_rng(seed)
        self.mix = mix
        self.words = words or sorted(set(re.findall(WORD, corpus[:].decode())))

    def word(self) -> str:
        return self.words[self.random.integers(len(self.words))]

    def name(self) -> str:
        kind = self.random.random()
        if kind < .6:
            return f'{self.word()}-{self.word()}'
        if kind < .75:
            return f'{self.word()} {self.word()}'
        return (f'{self.random.integers(1 << 32):08x}' if kind < .9
                else f'{self.word().upper()}_{self.random.integers(100)}')

    def value(self) -> str:
        kind = self.random.random()
        if kind < .6:
            return ''.join(str(x) for x in self.random.integers(0, 10, self.random.integers(4, 9)))
        return f'{self.random.integers(1 << 32):08x}' if kind < .75 else self.word()

    def facts(self, length: int) -> list[tuple]:
        """(place in 0..1, text, weights of its bytes)."""
        count = max(1, int(self.random.choice(self.mix.counts) * length / 8192))
        pieces, used = [], 0
        one = SENTENCES[self.random.integers(len(SENTENCES))] if self.random.random() < .6 else None
        for _ in range(count):
            if used > max(0, self.mix.full * length - LONGEST_FACT):
                break
            said, asked, answered = one or SENTENCES[self.random.integers(len(SENTENCES))]
            k, v = self.name(), self.value()
            question, answer = asked.format(k=k), answered.format(v=v)
            pieces.append(self._said(said, k, v))
            at = pieces[-1][0]
            when = at + (1 - at) * self.random.random() if self.random.random() < .6 else .99
            pieces.append((when, question + answer, [.3] * len(question) + [4.] * len(answer)))
            used += len(pieces[-2][1]) + len(pieces[-1][1]) + 4
        return pieces

    def _said(self, said: str, k: str, v: str) -> tuple:
        text = said.format(k=k, v=v)
        start = text.rfind(v)
        weights = [.3] * len(text)
        weights[start:start + len(v)] = [0.] * len(v)  # nobody can guess it
        return .95 * self.random.random(), text, weights

    def passage(self) -> list[tuple]:
        n = int(self.random.integers(40, 400))
        start = int(self.random.integers(0, len(self.corpus) - n))
        text = self.corpus[start:start + n].decode().replace('\n', ' ')
        tag, at = self.name(), .7 * self.random.random()
        head = f'<repeat {tag}>'
        return [(at, f'<note {tag}>{text}</note>', [.3] * (len(tag) + n + 14)),
                (at + (1 - at) * self.random.random(), f'{head}{text}</repeat>',
                 [.3] * len(head) + [4.] * n + [.3] * 9)]

    def window(self, length: int) -> tuple[list[int], list[float]]:
        """Token ids and the weights of their losses."""
        start = int(self.random.integers(0, len(self.corpus) - length))
        prose = self.corpus[start:start + length].decode()
        if self.random.random() < self.mix.plain:
            return list(prose.encode()), [1.] * length
        pieces = self.facts(length)
        if length >= self.mix.passages_from and self.random.random() < self.mix.passages:
            pieces += self.passage()
        room = length - sum(len(text) + 2 for _, text, _ in pieces)
        out, weights, used = '', [], 0
        for place, text, text_weights in sorted(pieces, key=lambda piece: piece[0]):
            end = prose.rfind(' ', used, max(used, int(place * room)))
            end = max(end, used)
            out += prose[used:end] + '\n' + text + '\n'
            weights += [1.] * (end - used) + [.3] + text_weights + [.3]
            used = end
        rest = prose[used:used + length - len(out)]
        out, weights = out + rest, weights + [1.] * len(rest)
        return list(out[-length:].encode()), weights[-length:]

    def needle(self, length: int, depth: float, others: int = 0) -> tuple[bytes, bytes]:
        """A prompt of `length` bytes with its answer: a number hidden at `depth` (0 to 1), and `others` of
        other keys anywhere."""
        said, asked, answered = SENTENCES[0]
        key, number = f'{self.word()}-{self.word()}', f'{self.random.integers(10**7):07}'
        hidden = [(depth, said.format(k=key, v=number))]
        while len(hidden) <= others:
            other = f'{self.word()}-{self.word()}'
            if other != key:
                hidden.append((self.random.random(),
                               said.format(k=other, v=f'{self.random.integers(10**7):07}')))
        question = '\n' + asked.format(k=key)
        room = length - len(HEAD) - len(question) - sum(len(text) + 2 for _, text in hidden)
        if room < 0 or room >= len(self.corpus):
            raise ValueError(f'a prompt of {length} bytes: too short for {others} other keys, or longer '
                             f'than the text of {len(self.corpus)} bytes')
        start = int(self.random.integers(0, len(self.corpus) - room))
        prose = self.corpus[start:start + room].decode()
        out, used = HEAD, 0
        for place, text in sorted(hidden):
            end = max(used, prose.rfind(' ', used, int(place * room)))
            out += prose[used:end] + '\n' + text + '\n'
            used = end
        return (out + prose[used:] + question).encode(), answered.format(v=number).encode()
