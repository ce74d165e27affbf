#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes the calibrated profiles beside this file, from the project's own texts.

    python3 examples/models/needle-13m/calibrate.py [--windows 32] [--window 4096]

The texts are this project's documents and the comments in its sources, as plain prose and with facts to
look up and passages to repeat put into them, in the sentences that the model was trained on. Needs the
Python package of libfkv, torch and transformers. Writes calibrated-4x.json and so on.
"""
import argparse
import pathlib
import re
import time

import numpy
import torch
import transformers

import fkv
from fkv import calibration

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
RATIOS = (4, 12, 16, 20)

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


def read_corpus() -> bytes:
    """Documents first, then the comments of C sources, from the folders of the repository alone."""
    texts = []
    for path in sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), ROOT / 'include/fkv/fkv.h']):
        texts.append(path.read_text(encoding='utf-8'))
    for folder in ('libfkv', 'tests', 'examples'):
        for path in sorted((ROOT / folder).rglob('*.[ch]')):
            for comment in re.findall(r'/\*+(.*?)\*/', path.read_text(encoding='utf-8'), re.S):
                text = re.sub(r'\n\s*\*? ?', '\n', comment).strip()
                if len(text) > 60:
                    texts.append(text + '\n')
    return '\n'.join(texts).encode('ascii', 'ignore')


class Mixer:
    """Windows of prose, most of them with things to remember."""

    def __init__(self, corpus: bytes, seed: int):
        self.corpus = corpus
        self.random = numpy.random.default_rng(seed)
        self.words = sorted(set(re.findall(r'\b[a-z]{4,10}\b', corpus.decode())))

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
        count = max(1, int(self.random.choice([4, 16, 40, 80]) * length / 8192))
        pieces = []
        one = SENTENCES[self.random.integers(len(SENTENCES))] if self.random.random() < .6 else None
        for _ in range(count):
            said, asked, answered = one or SENTENCES[self.random.integers(len(SENTENCES))]
            k, v = self.name(), self.value()
            question, answer = asked.format(k=k), answered.format(v=v)
            pieces.append(self._said(said, k, v))
            at = pieces[-1][0]
            when = at + (1 - at) * self.random.random() if self.random.random() < .6 else .99
            pieces.append((when, question + answer, [.3] * len(question) + [4.] * len(answer)))
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
        if self.random.random() < .3:
            return list(prose.encode()), [1.] * length
        pieces = self.facts(length)
        if self.random.random() < .5:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--windows', type=int, default=32)
    parser.add_argument('--window', type=int, default=4096, help='bytes of a window')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--output', type=pathlib.Path, default=HERE, help='folder')
    parser.add_argument('--statistics', type=pathlib.Path, help='also write what was gathered')
    parser.add_argument('--labels', default='text', choices=('text', 'model', 'both'))
    parser.add_argument('--no-gradients', action='store_true',
                        help='only forward passes; writes forward-12x.json and so on')
    parser.add_argument('--unrotated', action='store_true',
                        help='for selection: keys held before RoPE; writes unrotated-12x.json and so on')
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    mixer = Mixer(read_corpus(), args.seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32)
    params = fkv.model_params(HERE)
    kind = 'forward' if args.no_gradients else 'unrotated' if args.unrotated else 'calibrated'
    codec = fkv.CodecParams(domain='unrotated' if args.unrotated else 'rotated')
    begin = time.time()
    texts = [mixer.window(args.window) for _ in range(args.windows)]
    with fkv.Context(threads=1) as context:
        calibrator = calibration.gather(model, texts, context=context, params=params, codec=codec,
                                        labels=args.labels, gradients=not args.no_gradients,
                                        progress=True)
        if args.statistics:
            args.statistics.write_bytes(calibrator.dumps())
        for ratio in RATIOS:
            # with bits to spare finer steps pay
            levels = (0, 2, 3, 4, 8) if ratio < 8 else (0, 2, 4)
            profile, result = calibrator.allocate(fkv.AllocationParams(
                value=ratio, tokens=8192, levels=sum(1 << bits for bits in levels)))
            path = args.output / f'{kind}-{ratio}x.json'
            profile.save(path)
            print(f'{path.name}: {result.ratio:.2f}x, {result.bits:.3f} bits per element, '
                  f'predicted loss {result.predicted_loss:.4f}')
    print(f'{time.time() - begin:.0f} s')


if __name__ == '__main__':
    main()
