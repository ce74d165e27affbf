#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a call costs from Python beyond its cost from C: call_cost.py PROGRAM

Decodes 2000 tokens on a small cache, as PROGRAM (call_cost.c) does, in turns with it, and prints the
medians. Exits with 1 if append_attend() with arrays of numpy costs more than LIMIT_US over C.
"""
import statistics
import subprocess
import sys
import time

import numpy

import fkv

LIMIT_US = 5.0
STEPS, ROUNDS, WARM_UP = 2000, 5, 1
QUERY_HEADS, KV_HEADS, DIM = 4, 2, 64


def decode(make, prepare=lambda array, writable=False: array):
    """(median of append_attend(), of the whole step) in nanoseconds"""
    model = fkv.ModelParams(n_layers=1, n_q_heads=QUERY_HEADS, n_kv_heads=KV_HEADS, head_dim=DIM)
    context = fkv.Context(threads=1)
    cache = fkv.Cache(context, fkv.Profile.exact(context, model))
    sequences, plan = [cache.sequence()], cache.plan()
    q = prepare(make((1, QUERY_HEADS, DIM)))
    k, v = (prepare(make((1, KV_HEADS, DIM))) for _ in range(2))
    out = prepare(make((1, QUERY_HEADS, DIM)), writable=True)
    now = time.perf_counter_ns
    calls, steps = [], []
    for _ in range(STEPS):
        start = now()
        plan.update(sequences, 1)
        planned = now()
        plan.append_attend(0, q, k, v, out)
        end = now()
        calls.append(end - planned)
        steps.append(end - start)
    return statistics.median(calls), statistics.median(steps)


def zeros(shape):
    return numpy.zeros(shape, numpy.float32)


def main(program):
    ways = {
        'C': lambda: tuple(map(int, subprocess.check_output([program]).split())),
        'numpy': lambda: decode(zeros),
        'fkv.tensor, made before': lambda: decode(zeros, lambda array, writable=False: fkv.tensor(array, writable=writable)),
    }
    try:
        import torch
        torch.set_num_threads(1)
        ways['torch'] = lambda: decode(torch.zeros)
    except ImportError:
        print('torch is not there')
    times = {name: [] for name in ways}
    for turn in range(ROUNDS + WARM_UP):
        for name, way in ways.items():
            if turn >= WARM_UP:
                times[name].append(way())
            else:
                way()
    medians = {name: [statistics.median(column) / 1000 for column in zip(*rounds)]
               for name, rounds in times.items()}
    c_call, c_step = medians['C']
    print(f'us; medians of {STEPS} tokens, then of {ROUNDS} turns')
    print(f'{"":26}{"append_attend":>14}{"over C":>8}{"with update":>14}{"over C":>8}')
    for name, (call, step) in medians.items():
        print(f'{name:26}{call:14.2f}{call - c_call:8.2f}{step:14.2f}{step - c_step:8.2f}')
    over = medians['numpy'][0] - c_call
    if over > LIMIT_US:
        print(f'not ok: {over:.2f} us over C, {LIMIT_US} allowed')
        return 1
    print(f'ok: {over:.2f} us over C, {LIMIT_US} allowed')
    return 0


sys.exit(main(sys.argv[1]))
