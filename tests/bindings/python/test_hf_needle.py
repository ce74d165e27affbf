# SPDX-License-Identifier: Apache-2.0
"""The shipped model answers through generate() what it answers in fkv-needle, from coded caches."""
import copy
import random
import re
import subprocess
import sys

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
import fkv.transformers  # noqa: E402

import hf  # noqa: E402

pytestmark = pytest.mark.torch

HEAD = ('A special magic number is hidden within the following text. Make sure to memorize it.\n')
ASK = ('What is the special magic number for {0} mentioned in the provided text? The special magic number for '
       '{0} mentioned in the provided text is')


def haystack(prose: bytes, context: int, count: int, seed: int):
    """(text of `context` bytes, {key: number}): that many keys in prose, as fkv-needle --task multikey has."""
    dice = random.Random(seed)
    words = sorted(set(re.findall(r'\b[a-z]{4,10}\b', prose.decode('ascii', 'ignore'))))
    facts = {}
    while len(facts) < count:
        facts[f'{dice.choice(words)}-{dice.choice(words)}'] = ''.join(dice.choices('0123456789', k=7))
    lines = [f'\nOne of the special magic numbers for {key} is: {number}.\n' for key, number in facts.items()]
    room = context - len(HEAD) - sum(map(len, lines)) - 1
    first = dice.randrange(len(prose))
    prose = (prose * (2 + room // len(prose)))[first:first + room].decode('ascii', 'replace').replace('\ufffd', '-')
    text, used = HEAD, 0
    for i, line in enumerate(lines):
        at = prose.rfind(' ', used, int((i + .5) / count * room) + 1)
        at = max(at, used)
        text += prose[used:at] + line
        used = at
    return (text + prose[used:] + '\n').encode('ascii', 'replace')[:context], facts


def ask(model, cache, text: bytes, key: str) -> str:
    """The answer from a copy of a cache that has read the text."""
    question = torch.tensor([list(text + ASK.format(key).encode())])
    out = model.generate(question, max_new_tokens=9, do_sample=False, **{hf.cache_name(): copy.deepcopy(cache)})
    return bytes(out[0, question.shape[1]:].clamp(max=255).tolist()).decode('ascii', 'replace')


def score(model, profile, prose: bytes, context: int, count: int, asked: int, seed: int = 1):
    """(right answers, ratio to f16) of a cache that has coded the text before it is asked."""
    text, facts = haystack(prose, context, count, seed)
    cache = fkv.transformers.FkvCache(model, profile)
    hf.last_logits(model, torch.tensor([list(text)]), cache, logits_to_keep=1)
    ratio = cache.stats().ratio
    keys = random.Random(seed).sample(sorted(facts), asked)
    return sum(ask(model, cache, text, key) == f' {facts[key]}.' for key in keys), ratio


@pytest.mark.parametrize('profile, least', [(None, 0.4), ('calibrated-12x.json', 8.5)])
def test_keys_are_found(profile, least):
    model = fkv.transformers.enable(hf.needle())
    prose = (hf.ROOT / 'docs/calibration.md').read_bytes() + (hf.ROOT / 'docs/codec.md').read_bytes()
    file = profile and hf.NEEDLE / profile
    right, ratio = score(model, file, prose, context=4096, count=24, asked=8)
    assert right >= 7 and ratio > least


def test_passages_are_repeated():
    """As with the framework's exact cache: the same items, each token by token."""
    script = hf.ROOT / 'tests/bindings/hf_passages.py'
    done = subprocess.run([sys.executable, script, '--text', hf.ROOT / 'include/fkv/fkv.h', '--context', '2048',
                           '--items', '4'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r'^(.*?)(?:, \S+x)?: (\d) of 4 .* after (\S+) bytes .*; (\d) items .*, (\d) answers', done.stdout, re.M)
    rows = {name: list(map(float, numbers)) for name, *numbers in found}
    framework, coded = rows['the framework'], rows['calibrated-12x']
    assert framework[0] >= 2 and rows['exact'] == [*framework[:2], 4, 4], done.stdout
    assert framework[1] > 60 and coded[1] > .75 * framework[1], done.stdout
