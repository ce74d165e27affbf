#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Passages to be repeated, through generate(), from coded caches and from the framework's own.

    python3 tests/bindings/hf_passages.py --text FILE [--context 8192] [--items 16] [PROFILE ..]

The items are those of `python -m fkv eval --task copy`: 160 bytes, marked in a text; the text is coded before the
question is known. As with fkv-needle the passage's first byte is given with the question, which cannot tell it;
generate() goes on greedily for the other 159, and all of them must be right. Every item is asked of every cache.
"""
import argparse
import copy
import pathlib
import sys
import time

import torch
import transformers

import fkv
import fkv.transformers
from fkv.eval import tasks, tokens

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / 'examples/models/needle-13m'
FRAMEWORK, EXACT = 'the framework', 'exact'


def load():
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = 319  # never said; 5.0 wants one
    model.generation_config.pad_token_id = 0
    return fkv.transformers.enable(model)


def items_of(text, context, count):
    source = tasks.Source(text.decode('ascii', 'ignore'), tokens.Bytes())
    return tasks.items(source, 'copy', context, count)


def repeat(model, method, item):
    """(what was said after the first byte, ratio to f16): the context is read, then the question asked."""
    cache = (transformers.DynamicCache(config=model.config) if method == FRAMEWORK else
             fkv.transformers.FkvCache(model, None if method == EXACT else method))
    name = fkv.transformers.CACHE_NAME
    with torch.no_grad():
        model(torch.tensor([item.context]), logits_to_keep=1, **{name: cache})
    ratio = None if method == FRAMEWORK else cache.stats().ratio
    ids = torch.tensor([item.context + item.question + item.answer[:1]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(item.answer) - 1,
                         do_sample=False, **{name: copy.deepcopy(cache)})
    return out[0, ids.shape[1]:].tolist(), ratio


def right_until(answer, item):
    """Bytes before the first that is wrong, of 159."""
    return next((i for i, (a, b) in enumerate(zip(answer, item.answer[1:])) if a != b), len(answer))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--text', type=pathlib.Path, required=True)
    parser.add_argument('--context', type=int, default=8192)
    parser.add_argument('--items', type=int, default=16)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('profiles', nargs='*', metavar='PROFILE', help='files; calibrated-12x.json of the model')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, begin = load(), time.monotonic()
    items = items_of(args.text.read_bytes(), args.context, args.items)
    methods = [FRAMEWORK, EXACT, *(args.profiles or [str(MODEL / 'calibrated-12x.json')])]
    said = {method: [] for method in methods}
    ratios = {}
    for i, item in enumerate(items):
        for method in methods:
            answer, ratios[method] = repeat(model, method, item)
            said[method].append(answer)
        if sys.stderr.isatty():
            print(f'\r{i + 1}/{len(items)}', end='', file=sys.stderr, flush=True)
    right = {method: [answer == item.answer[1:] for answer, item in zip(said[method], items)]
             for method in methods}
    for method in methods:
        same = sum(a == b for a, b in zip(said[method], said[FRAMEWORK]))
        both = sum(a == b for a, b in zip(right[method], right[FRAMEWORK]))
        until = sum(right_until(answer, item) for answer, item in zip(said[method], items)) / len(items)
        ratio = '' if ratios[method] is None else f', {ratios[method]:.2f}x'
        print(f'{pathlib.Path(method).stem}{ratio}: {sum(right[method])} of {len(items)} passages right, the first '
              f'error after {until:.1f} bytes on average; '
              f'{both} items judged as with {FRAMEWORK}, {same} answers the same token by token')
    print(f'{time.monotonic() - begin:.0f} s')


if __name__ == '__main__':
    main()
