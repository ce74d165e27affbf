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
import sys
import time

import torch
import transformers

import fkv
from fkv import calibration

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
sys.path.append(str(ROOT / 'examples'))

from needle_model.tasks import Mixer  # noqa: E402

RATIOS = (4, 12, 16, 20)


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
    if args.no_gradients and args.unrotated:
        parser.error('--no-gradients and --unrotated would write unrotated profiles to forward-*.json')
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
