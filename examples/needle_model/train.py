# SPDX-License-Identifier: Apache-2.0
"""Trains the small model of examples/models/needle-13m from scratch.

    PYTHONPATH=examples python3 -m needle_model.train --text corpus/train.txt --held-out corpus/held-out.txt \\
        --output needle --minutes 9

Windows grow from stage to stage. With --steps instead of --minutes the schedule does not depend on how fast
the machine is.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import time

import torch
import torch.nn.functional as F

from . import data, model
from .evaluate import autocast, evaluate

FLOOR = 0.02  # of the learning rate, at the end


@dataclasses.dataclass
class Clock:
    """How much of the budget is spent, 0 to 1: of the time, or of the steps if their number is given."""

    minutes: float
    steps: int
    begin: float = dataclasses.field(default_factory=time.monotonic)
    done: int = 0

    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def share(self) -> float:
        return self.done / self.steps if self.steps else self.seconds() / (60 * self.minutes)


def stages_of(text: str) -> list[tuple[int, float]]:
    """'1024:.4,8192:.6' as lengths and the shares of the budget at which their stages end."""
    stages, end = [], 0.0
    for part in text.split(','):
        length, share = part.split(':')
        end += float(share)
        stages.append((int(length), end))
    if not math.isclose(end, 1, abs_tol=1e-6) or any(length < 64 for length, _ in stages):
        raise argparse.ArgumentTypeError('shares must sum to 1, and lengths be 64 at least')
    stages[-1] = stages[-1][0], 1.0
    return stages


def rate(args, done: int, share: float) -> float:
    """Up over the first steps, constant, and down over the last part of the budget."""
    up = min(1.0, (done + 1) / args.warmup)
    down = min(1.0, (1 - share) / args.decay)
    return args.rate * up * max(FLOOR, down)


def make_optimizer(net: model.Llama, args, fused: bool) -> torch.optim.Optimizer:
    matrices = [weight for weight in net.parameters() if weight.ndim == 2]
    vectors = [weight for weight in net.parameters() if weight.ndim < 2]
    groups = [{'params': matrices, 'weight_decay': args.weight_decay},
              {'params': vectors, 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=args.rate, betas=(.9, .95), fused=fused)


class Trainer:
    def __init__(self, args):
        self.args = args
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision('high')
        names = {field.name for field in dataclasses.fields(model.Config)}
        self.net = model.Llama(model.Config(**{k: v for k, v in vars(args).items() if k in names}))
        self.net.to(self.device).train()
        self.optimizer = make_optimizer(self.net, args, self.device.type == 'cuda')
        # One graph for each length of window.
        self.loss = torch.compile(self._loss, dynamic=False) if args.compile else self._loss
        self.words = data.words_of(args.text)
        self.losses = []  # of the steps that were reported

    def _loss(self, ids, weights, rope):
        """Mean over the weights, of the loss of each token that follows another."""
        logits = self.net(ids[:, :-1], rope)
        each = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction='none')
        return (each * weights.flatten()).sum() / weights.sum()

    def step(self, batch, rope, learning_rate: float) -> torch.Tensor:
        ids, weights = (part.to(self.device, non_blocking=True) for part in batch)
        for group in self.optimizer.param_groups:
            group['lr'] = learning_rate
        with autocast(self.device):
            loss = self.loss(ids.long(), weights, rope)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def report(self, clock: Clock, length: int, loss: float, learning_rate: float, seen: int) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f'the loss became {loss} by step {clock.done}: try a lower --rate')
        self.losses.append(loss)
        print(json.dumps({'step': clock.done, 'length': length, 'loss': round(loss, 4),
                          'rate': float(f'{learning_rate:.3g}'), 'tokens': seen,
                          'seconds': round(clock.seconds(), 1)}), flush=True)

    def train(self) -> None:
        args, seen = self.args, 0
        clock = Clock(args.minutes, args.steps)
        for stage, (length, end) in enumerate(args.stages):
            batches = data.Batches(args.text, self.words, length, max(1, args.tokens // length),
                                   [args.seed, stage])
            rope = model.rotations(self.net.config, length, self.device)
            source = iter(data.loader(batches, args.workers, self.device.type == 'cuda'))
            while (share := clock.share()) < end:
                batch = next(source)
                learning_rate = rate(args, clock.done, share)
                loss = self.step(batch, rope, learning_rate)
                clock.done += 1
                seen += batch[1].numel()
                if clock.done == 1 or clock.done % args.report == 0:
                    self.report(clock, length, loss.item(), learning_rate, seen)
            del source  # and with it the processes that draw
            # After each stage: what is there if a later one does not end.
            model.save(self.net, args.output, length)
        print(f'{clock.done} steps, {seen / 1e6:.1f} million tokens, {clock.seconds():.0f} s', flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python3 -m needle_model.train', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--text', type=pathlib.Path, required=True, help='to train on: plain ASCII')
    parser.add_argument('--held-out', type=pathlib.Path, help='plain ASCII to evaluate on at the end')
    parser.add_argument('--output', type=pathlib.Path, required=True, help='folder for the model')
    parser.add_argument('--minutes', type=float, default=9, help='of training, compiling included')
    parser.add_argument('--steps', type=int, default=0, help='instead of a time')
    parser.add_argument('--stages', type=stages_of, default='1024:.4,4096:.3,8192:.3', metavar='N:SHARE,..',
                        help='lengths of windows and their shares of the budget (default %(default)s)')
    parser.add_argument('--tokens', type=int, default=1 << 18, help='of a step')
    parser.add_argument('--rate', type=float, default=2e-3, help='learning rate')
    parser.add_argument('--warmup', type=int, default=150, help='steps')
    parser.add_argument('--decay', type=float, default=.4, help='last share of the budget, with falling rate')
    parser.add_argument('--weight-decay', type=float, default=.1, help='of matrices')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--workers', type=int, default=max(1, min(14, (os.cpu_count() or 1) - 1)),
                        help='processes that draw windows; 0: none but this one')
    parser.add_argument('--compile', action=argparse.BooleanOptionalAction,
                        default=torch.cuda.is_available())
    parser.add_argument('--report', type=int, default=100, help='a line every so many steps')
    for field in dataclasses.fields(model.Config):
        parser.add_argument('--' + field.name.replace('_', '-'), default=field.default,
                            type=type(field.default), help='of the model (default %(default)s)')
    return parser


def main(arguments=None) -> Trainer:
    args = make_parser().parse_args(arguments)
    trainer = Trainer(args)
    print(f'{sum(weight.numel() for weight in trainer.net.parameters()):,} parameters', flush=True)
    trainer.train()
    if args.held_out:
        # As it was saved: what rounding to bfloat16 costs belongs to it.
        net, window = model.load(args.output, trainer.device)
        evaluate(net.eval(), args.held_out, window, [n for n in (1024, 2048, 4096, 8192) if n <= window], 40,
                 1 << 19)
    return trainer


if __name__ == '__main__':
    main()
