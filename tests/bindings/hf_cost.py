#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a cache of libfkv costs and saves in transformers, measured on the model in this repository.

    python3 tests/bindings/hf_cost.py time   [--tokens 32768] [--profile FILE] [--threads N]
    python3 tests/bindings/hf_cost.py memory [--tokens 32768] [--profile FILE] [--dtype bfloat16]
    python3 tests/bindings/hf_cost.py calibration [--tokens 4096] [--dtype float32] [--half-a-billion]

time: a decoded token, inside libfkv and in all that fkv.transformers does besides. The cache is filled with
random keys and values. memory: the process while generate() goes on from so many tokens, with the framework's
cache and with libfkv's, each in a process of its own. Only lengths matter here: the model was trained for 8192.
calibration: the process at its peak, and the time, of two windows of so many tokens; with the layers computed
again for the backward pass, with all of them kept, and without gradients. --half-a-billion takes a model of
random weights in the shape of Qwen2.5-0.5B.
"""
import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
import time

import torch
import transformers

import fkv
import fkv.cache
import fkv.calibration
import fkv.transformers
from fkv.transformers import _attention, _cache

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / 'examples/models/needle-13m'


def load(dtype):
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


# ---- time

class Clock:
    """Time spent in functions that were wrapped; calls within one another count once."""

    def __init__(self, now):
        self.seconds, self.depth, self.now = 0.0, 0, now

    def wrap(self, owner, name):
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            if self.depth:
                return function(*args, **kwargs)
            self.depth = 1
            begin = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self.now() - begin
                self.depth = 0

        setattr(owner, name, timed)


class Library:
    """The library's functions, those of a step timed."""

    def __init__(self, lib, clock):
        for name in dir(lib):
            setattr(self, name, getattr(lib, name))
        for name in ('fkv_plan_update', 'fkv_append_attend'):
            clock.wrap(self, name)


def fill(cache, tokens):
    """Random keys and values of all layers."""
    random = torch.Generator().manual_seed(1)
    store, info = cache.store, cache.store.cache.profile.info
    for first in range(0, tokens, 4096):
        count = min(4096, tokens - first)
        store.begin(1, count, None, None)
        for layer in range(info.n_layers):
            k, v = (torch.randn(1, info.n_kv_heads, count, info.head_dim, generator=random) for _ in 'kv')
            store.append(layer, k, v)


def measure_time(args):
    torch.set_num_threads(args.threads)
    # One thread's own time does not mind what else the machine does.
    now = time.thread_time if args.threads == 1 else time.perf_counter
    whole, inside = Clock(now), Clock(now)
    for name in ('before_model', 'after_model', 'before_attention', 'attention', 'mask'):
        whole.wrap(_attention, name)
    for name in ('update', 'get_seq_length', 'get_mask_sizes'):
        whole.wrap(_cache.FkvCache, name)
    library = Library(fkv.cache.lib, inside)
    fkv.cache.lib = fkv.transformers._fixed._lib = library
    model = load(torch.float32)
    fkv.transformers.enable(model, None if args.profile == 'exact' else args.profile)
    cache = fkv.transformers.FkvCache(model)
    fill(cache, args.tokens)
    mask = torch.ones(1, args.tokens + args.steps, dtype=torch.long)
    rows = []
    with torch.no_grad():
        for i in range(args.tokens, args.tokens + args.steps):
            whole.seconds = inside.seconds = 0
            begin = now()
            model(torch.tensor([[65]]), attention_mask=mask[:, :i + 1], position_ids=torch.tensor([[i]]),
                  **{fkv.transformers.CACHE_NAME: cache})
            rows.append((now() - begin, inside.seconds, whole.seconds - inside.seconds))
    step, inside, added = (torch.tensor(rows[args.steps // 5:], dtype=torch.float64) * 1000).median(0)[0].tolist()
    print(f'{args.tokens} tokens, {args.threads} threads, {cache.stats().ratio:.1f}x; medians of {args.steps} '
          f'tokens, ms: whole step {step:.3f}, in libfkv {inside:.3f}, added {added:.3f} = {added / inside:.1%}')


# ---- memory

def resident():
    """Bytes of this process that are in memory, and the most there ever were."""
    text = pathlib.Path('/proc/self/status').read_text()
    fields = dict(line.split(':', 1) for line in text.splitlines() if ':' in line)
    return tuple(1024 * int(fields[name].split()[0]) for name in ('VmRSS', 'VmHWM'))


class Watch(transformers.generation.StoppingCriteria):
    """Looks at the process at every token."""

    def __init__(self):
        self.seen = []

    def __call__(self, ids, scores, **_):
        self.seen.append(resident()[0])
        return torch.zeros(len(ids), dtype=torch.bool)


def run_memory(args):
    """One process: memory before, and while generating."""
    torch.set_num_threads(args.threads)
    model = load(getattr(torch, args.dtype))
    if args.only == 'fkv':
        fkv.transformers.enable(model, args.profile)
    text = (ROOT / 'include/fkv/fkv.h').read_bytes().decode('ascii', 'ignore').encode()
    ids = torch.tensor(list((text * (args.tokens // len(text) + 1))[:args.tokens]))[None]

    def generate(ids, count):
        watch = Watch()
        cache = (fkv.transformers.FkvCache(model) if args.only == 'fkv'
                 else transformers.DynamicCache(config=model.config))
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                       prefill_chunk_size=args.chunk, stopping_criteria=[watch],
                       **{fkv.transformers.CACHE_NAME: cache})
        return watch.seen, cache

    generate(ids[:, :2 * args.chunk], 4)  # what is needed whatever the length
    before = resident()[0]
    seen, cache = generate(ids, args.steps)
    print(json.dumps({'before': before, 'steady': sorted(seen)[len(seen) // 2], 'peak': resident()[1],
                      'ratio': cache.stats().ratio if args.only == 'fkv' else None}))


def measure_memory(args):
    found = {}
    for which in ('framework', 'fkv'):
        command = [sys.executable, __file__, *sys.argv[1:], '--only', which]
        found[which] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    size = 4 * 2 * 64 * 8 * args.tokens * {'float32': 2}.get(args.dtype, 1)  # of dense keys and values
    print(f'{args.tokens} tokens, {args.dtype}; dense keys and values are {size / 1e6:.1f} MB')
    for which, x in found.items():
        print(f"{which:10} MB: before {x['before'] / 1e6:.1f}, while generating {x['steady'] / 1e6:.1f} "
              f"(+{(x['steady'] - x['before']) / 1e6:.1f}), peak {x['peak'] / 1e6:.1f} "
              f"(+{(x['peak'] - x['before']) / 1e6:.1f})")
    grown = [x['steady'] - x['before'] for x in found.values()]
    print(f"grows {grown[0] / grown[1]:.1f} times less; the cache counts {found['fkv']['ratio']:.1f}x less than f16")


# ---- calibration

WAYS = {'recomputed': {}, 'kept': {'recompute': False}, 'forward': {'gradients': False}}


def half_a_billion(dtype):
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True, dtype=dtype)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def run_calibration(args):
    """One process: memory before, and at its peak."""
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    model = half_a_billion(dtype) if args.half_a_billion else load(dtype)
    ids = list((ROOT / 'include/fkv/fkv.h').read_bytes())
    ids = (ids * (2 * args.tokens // len(ids) + 1))[:2 * args.tokens]

    def gather(window):
        with fkv.Context(threads=args.threads) as context:
            return fkv.calibration.gather(model, [ids[:2 * window]], context=context, window=window,
                                          progress=False, **WAYS[args.only]).dumps()

    gather(256)  # what is loaded and set up once
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # forget the peak
    before, begin = resident()[0], time.perf_counter()
    statistics = gather(args.tokens)
    print(json.dumps({'before': before, 'peak': resident()[1], 'seconds': time.perf_counter() - begin,
                      'statistics': hashlib.sha256(statistics).hexdigest()}))


def measure_calibration(args):
    found = {}
    for way in args.ways:
        command = [sys.executable, __file__, *sys.argv[1:], '--only', way]
        found[way] = x = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        print(f"{way:10} {args.tokens} tokens, {args.dtype}: MB before {x['before'] / 1e6:.0f}, peak "
              f"{x['peak'] / 1e6:.0f} (+{(x['peak'] - x['before']) / 1e6:.0f}); {x['seconds'] / 2:.1f} s a window",
              flush=True)
    if 'recomputed' in found and 'kept' in found:
        same = found['recomputed']['statistics'] == found['kept']['statistics']
        print('recomputed and kept: ' + ('the same statistics, bit for bit' if same else 'other statistics'))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('time', 'memory', 'calibration'))
    parser.add_argument('--tokens', type=int, help='32768, or a window of 4096')
    parser.add_argument('--profile', default=str(MODEL / 'calibrated-12x.json'),
                        help="a file, or for time 'exact'")
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--steps', type=int, default=None, help='decoded tokens')
    parser.add_argument('--dtype', help='bfloat16, of a calibration float32')
    parser.add_argument('--half-a-billion', action='store_true')
    parser.add_argument('--ways', nargs='+', default=list(WAYS), choices=WAYS, help='of a calibration')
    parser.add_argument('--chunk', type=int, default=1024, help='tokens of a step of the prompt')
    parser.add_argument('--only', choices=('framework', 'fkv', *WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.steps = args.steps or {'time': 200, 'memory': 10, 'calibration': 0}[args.what]
    args.tokens = args.tokens or (4096 if args.what == 'calibration' else 32768)
    args.dtype = args.dtype or ('float32' if args.what == 'calibration' else 'bfloat16')
    if args.what == 'time':
        measure_time(args)
    elif args.what == 'calibration':
        run_calibration(args) if args.only else measure_calibration(args)
    elif args.only:
        run_memory(args)
    else:
        measure_memory(args)


if __name__ == '__main__':
    main()
