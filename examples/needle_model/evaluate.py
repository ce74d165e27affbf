# SPDX-License-Identifier: Apache-2.0
"""How well a model finds numbers and predicts text that it was not trained on, with plain exact attention.

    PYTHONPATH=examples python3 -m needle_model.evaluate --model examples/models/needle-13m --text FILE
"""
from __future__ import annotations

import argparse
import math
import pathlib

import numpy
import torch
import torch.nn.functional as F

from . import data, model
from .tasks import Mixer, frequent_words

BATCH_TOKENS = 65536


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda')


@torch.no_grad()
def answers(net: model.Llama, items: list[tuple[bytes, bytes]], device: torch.device) -> int:
    """How many of the items are answered in full; all prompts are of one length."""
    right, at_once = 0, max(1, BATCH_TOKENS // len(items[0][0]))
    for begin in range(0, len(items), at_once):
        some = items[begin:begin + at_once]
        ids = torch.tensor([list(prompt + answer) for prompt, answer in some], device=device)
        asked = len(some[0][0])
        with autocast(device):
            # Answers are read along: each byte is judged after the right ones before it, which is what
            # greedy decoding would see up to its first error.
            guessed = net(ids[:, :-1])[:, asked - 1:].argmax(-1)
        right += int((guessed == ids[:, asked:]).all(1).sum())
    return right


@torch.no_grad()
def bits_per_byte(net: model.Llama, text, window: int, most: int, device: torch.device) -> float:
    """Of consecutive windows of the text, `most` bytes at most."""
    count = min(len(text), most) // window
    if not count:
        raise ValueError(f'the text has {len(text)} bytes, fewer than a window of {window}')
    rows = torch.from_numpy(numpy.frombuffer(text[:count * window], numpy.uint8).copy()).view(count, window)
    total, at_once = 0.0, max(1, BATCH_TOKENS // window)
    for some in rows.split(at_once):
        ids = some.to(device).long()
        with autocast(device):
            logits = net(ids[:, :-1])
        total += F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction='sum').item()
    return total / (count * (window - 1)) / math.log(2)


def evaluate(net: model.Llama, path: pathlib.Path, window: int, lengths, items: int, most: int,
             seed: int = 7) -> dict:
    device = next(net.parameters()).device
    result = {}
    with data.open_text(path) as text:
        words = frequent_words(text)
        for others in (0, 8):
            for length in lengths:
                mixer = Mixer(text, [seed, length, others], words=words)
                drawn = [mixer.needle(length, (i + .5) / items, others) for i in range(items)]
                # Answers are of one length, too: seven digits.
                right = answers(net, drawn, device)
                result[f'{length} bytes, {others} other keys'] = f'{right} of {items}'
                print(f'numbers found in {length} bytes, {others} other keys: {right} of {items}', flush=True)
        result['bits per byte'] = bits_per_byte(net, text, window, most, device)
        print(f'bits per byte, windows of {window}: {result["bits per byte"]:.4f}', flush=True)
    return result


def lengths_of(text: str) -> list[int]:
    return [int(part) for part in text.split(',')]


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', type=pathlib.Path, required=True, help='folder')
    parser.add_argument('--text', type=pathlib.Path, required=True, help='plain ASCII')
    parser.add_argument('--lengths', type=lengths_of, default=[1024, 2048, 4096, 8192])
    parser.add_argument('--items', type=int, default=40, help='questions of each kind')
    parser.add_argument('--window', type=int, help='for bits per byte (default: that of training)')
    parser.add_argument('--bytes', type=int, default=1 << 19, help='of text to predict, at most')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args(arguments)
    net, trained = model.load(args.model, args.device)
    evaluate(net.eval(), args.text, args.window or trained, args.lengths, args.items, args.bytes)


if __name__ == '__main__':
    main()
