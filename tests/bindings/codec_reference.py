#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The calibrated coding of libfkv beside a reference of it in PyTorch, on the same texts and questions.

    python3 codec_reference.py REFERENCE.py MODEL_DIR TEXT.xz [--bits 1.0,0.75] [--items 24]

REFERENCE.py is the reference tool: a script that ends in a line `fisher, mean, var = sensitivity()..` and
the reports. All before that line is run as it is; then each coding is reported twice: coded by the
reference's functions, and by libfkv with the same bits and means, read back from its cache. Keys are
unrotated and groups have 64 tokens in both. Needs torch and the fkv package; minutes on a CPU.
"""
import argparse
import sys

import numpy

import fkv


def load(reference, arguments):
    """The names of the reference tool, up to its reports."""
    with open(reference, encoding='utf-8') as file:
        source = file.read()
    head, _, _ = source.partition('\nfisher, mean, var = ')
    sys.argv = [reference, *arguments]
    names = {'__name__': 'reference', '__file__': reference}
    exec(compile(head, reference, 'exec'), names)
    return names


def coder(ref, context, model, bits, means):
    """kv -> (what libfkv gives back of kv, ratio), as the reference's code()."""
    params = fkv.CodecParams(group=64, block=128, n_sink=ref['a'].sink, n_local=ref['a'].local,
                             domain=fkv.Domain.UNROTATED)
    k_bits, v_bits = (numpy.ascontiguousarray(bits[:, part].cpu().numpy()) for part in (0, 1))
    k_mean, v_mean = (numpy.ascontiguousarray(means[:, part].cpu().numpy()) for part in (0, 1))
    profile = fkv.Profile.coded(context, model, k_bits.astype(numpy.uint8),
                                v_bits.astype(numpy.uint8), k_mean, v_mean, params)
    torch = ref['torch']

    def code(kv):
        tokens = kv[0][0].shape[1]
        positions = torch.arange(tokens, device=ref['dev'])
        with fkv.Cache(context, profile) as cache, cache.plan() as plan:
            sequence = cache.sequence()
            plan.update([sequence], [tokens])
            for layer, pair in enumerate(kv):
                plan.append(layer, *(x.transpose(0, 1).contiguous().cpu() for x in pair))
            back = []
            for layer in range(len(kv)):
                k, v = (torch.as_tensor(x).transpose(0, 1).to(ref['dev'])
                        for x in sequence.read(layer))
                back.append([ref['unrot'](k, positions), v])
            ratio = sequence.stats().ratio
            sequence.free()
        return back, ratio

    return code


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('reference')
    parser.add_argument('model')
    parser.add_argument('text')
    parser.add_argument('--bits', default='1.0,0.75,0.5')
    parser.add_argument('--uniform', default='4,3,2')
    parser.add_argument('--items', default='24')
    args = parser.parse_args()
    ref = load(args.reference, [args.model, args.text, '--items', args.items])
    torch, report = ref['torch'], ref['report']
    context, model = fkv.Context(), fkv.model_params(args.model)
    fisher, means, variances = ref['sensitivity']()
    zeros = torch.zeros_like(means)
    report('full', lambda kv: (kv, 1.))
    codings = [(f'uniform int{b}', torch.full_like(means, float(b)), zeros)
               for b in map(int, args.uniform.split(','))]
    codings += [(f'{r} bits/element', ref['allocate'](fisher * variances, float(r)), means)
                for r in args.bits.split(',')]
    for name, bits, carriers in codings:
        report(name, lambda kv: ref['code'](kv, bits, carriers))
        report(name + ', libfkv', coder(ref, context, model, bits, carriers))


if __name__ == '__main__':
    main()
