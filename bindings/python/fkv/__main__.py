# SPDX-License-Identifier: Apache-2.0
"""python -m fkv: what the library is, and work with profiles."""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import sys

import fkv
from fkv import capi, models, plot
from fkv.eval import cli as evaluation


def print_info(args) -> None:
    with fkv.Context() as context:
        info = context.info
    here = pathlib.Path(fkv.__file__).parent
    facts = {
        'libfkv': fkv.version(), 'ABI': fkv.abi_version(), 'library': str(here / capi.SONAME),
        'package': str(here), 'Python': platform.python_version(),
        'backends': 'cpu, cuda' if info.has_cuda else 'cpu',
        'CPU level': info.cpu_level.name.lower(),
        'best CPU level': info.best_cpu_level.name.lower(), 'threads': info.threads,
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        print(f'{name + ":":16}{value}')


def describe(info: fkv.ProfileInfo) -> str:
    text = (f'{info.coding.name.lower()} profile: {info.n_layers} layers, {info.n_q_heads} query '
            f'heads, {info.n_kv_heads} KV heads of {info.head_dim}; '
            f'{info.storage_dtype.name.lower()} storage')
    if info.coding == fkv.Coding.FOURIER:
        channels = info.n_layers * info.n_kv_heads * info.head_dim
        text += (f'\n{info.bins} bins, period {info.period}, {info.n_sink} sinks, {info.n_local} '
                 f'local tokens; compressed: K {info.k_fourier_channels / channels:.1%}, '
                 f'V {info.v_fourier_channels / channels:.1%} of the channels')
    elif info.coding == fkv.Coding.CALIBRATED:
        text += (f'\ngroups of {info.group}, blocks of {info.block}, {info.n_sink} sinks, '
                 f'{info.n_local} local tokens, {info.domain.name.lower()} keys; bits with scales: '
                 f'K {info.k_bits:.2f}, V {info.v_bits:.2f}')
    return text


def show_profile(args) -> None:
    with fkv.Context() as context, fkv.Profile.load(context, args.file) as profile:
        info = profile.info
        what, values = plot.held(profile)
        if args.png:
            plot.profile_heat_map(profile, args.png, f'{args.file}: {what}')
    calibrated = info.coding == fkv.Coding.CALIBRATED
    if args.json:
        scale = 1 if calibrated else 0.01
        print(json.dumps({'bits' if calibrated else 'kept': {
            part: (scale * value).tolist() for part, value in values.items()}}))
        return
    print(describe(info))
    print(f'\n{what}, by KV head')
    heads = ''.join(f'{head:5}' for head in range(info.n_kv_heads))
    print(f'layer  K{heads[1:]}   V{heads[1:]}')
    digits = 1 if calibrated else 0
    for layer, (k, v) in enumerate(zip(values['k'], values['v'])):
        print(f'{layer:5}  ' + ''.join(f'{x:5.{digits}f}' for x in k) + '   '
              + ''.join(f'{x:5.{digits}f}' for x in v))
    if args.png:
        print(f'\nwrote {args.png}')


def import_profile(args) -> None:
    text = pathlib.Path(args.file).read_bytes()
    params = fkv.FourierParams(bins=args.bins, n_sink=args.sinks, n_local=args.local,
                               period=args.period)
    with fkv.Context() as context:
        model = models.model_params(args.model)
        with fkv.Profile.published(context, model, text, params, args.fraction) as profile:
            profile.save(args.output)
            print(describe(profile.info))
    print(f'wrote {args.output} ({os.path.getsize(args.output)} bytes)')


def read_texts(files: list[str], tokens: str, tokenizer) -> list:
    """The texts of the files: one text each, or with bytes as tokens the ids themselves."""
    contents = [pathlib.Path(file).read_bytes() for file in files]
    if tokens == 'bytes':
        return [list(content) for content in contents]
    return [content.decode(errors='replace') for content in contents]


def load_model(args) -> tuple:
    """(tokenizer or None, model) of transformers."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError("python -m fkv calibrate needs torch and transformers: pip install 'fkv[transformers]' "
                          f'({error})') from None
    from fkv.eval import tokens
    if args.dtype != 'auto' and not isinstance(getattr(torch, args.dtype, None), torch.dtype):
        raise ValueError(f'--dtype {args.dtype}: torch has no such type')
    tokenizer = None if args.tokens == 'bytes' else tokens.load('tokenizer', args.model).tokenizer
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    try:
        model.to(args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'--device {args.device}: {str(error).splitlines()[0]}') from None
    return tokenizer, model


def calibrate(args) -> None:
    folder = pathlib.Path(args.output).parent
    if not folder.is_dir():  # better said now than after the work
        raise OSError(f'{args.output} cannot be written: {folder} is no folder')
    tokenizer, model = load_model(args)
    from fkv import calibration
    params = (models.model_params(args.model) if os.path.exists(args.model)
              else models.model_params(model.config, args.model))
    target = fkv.AllocationParams(value=args.ratio, tokens=args.at)
    codec = fkv.CodecParams(n_sink=args.sinks, n_local=args.local, group=args.group,
                            block=max(args.block, args.group))
    with fkv.Context() as context:
        calibration.check_target(context, params, codec, target)
        try:
            calibrator = calibration.gather(
                model, read_texts(args.text, args.tokens, tokenizer), tokenizer=tokenizer,
                context=context, params=params, codec=codec,
                window=args.window, max_windows=args.windows, labels=args.labels,
                gradients=not args.no_gradients, recompute=not args.no_recompute, state=args.state,
                progress=not args.quiet)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f'stopped; the same command goes on from {args.state}' if args.state
                else 'stopped; with --state FILE it could go on from here') from None
        profile, allocation = calibrator.allocate(target)
        profile.save(args.output)
    print(f'wrote {args.output}: {allocation.ratio:.2f}x at {allocation.tokens} tokens, '
          f'{allocation.bits:.3f} bits per element, predicted loss {allocation.predicted_loss:.4g}')


STATS_COLUMNS = ('bytes_exact', 'bytes_kept', 'bytes_coefficients', 'bytes_blocks', 'bytes_scales',
                 'bytes_tables', 'bytes', 'dense_bytes')


def print_stats(args) -> None:
    with fkv.Context() as context, fkv.Profile.load(context, args.file) as profile:
        rows = [profile.estimate(tokens, args.period) for tokens in args.tokens]
        info = profile.info
    if args.json:
        names = ('tokens', 'tokens_exact', 'tokens_coded', *STATS_COLUMNS, 'ratio')
        print(json.dumps([{name: getattr(row, name) for name in names} for row in rows], indent=2))
        return
    print(describe(info))
    print('\nMiB of one sequence, all layers; ratio to dense f16\n')
    print(f'{"tokens":>10}' + ''.join(f'{name.removeprefix("bytes_"):>14}'
                                      for name in STATS_COLUMNS) + f'{"ratio":>8}')
    for row in rows:
        print(f'{row.tokens:10}' + ''.join(f'{getattr(row, name) / 2**20:14.2f}'
                                           for name in STATS_COLUMNS) + f'{row.ratio:7.2f}x')


def token_counts(text: str) -> list[int]:
    return [int(part) for part in text.split(',')]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m fkv', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    info = commands.add_parser('info', help='version, backends, CPU level')
    info.set_defaults(run=print_info)

    profile = commands.add_parser('profile', help='show or import profiles')
    actions = profile.add_subparsers(dest='action', required=True, metavar='ACTION')
    show = actions.add_parser('show', help='what a profile holds how')
    show.add_argument('file', help='a profile (JSON)')
    show.add_argument('--png', metavar='FILE', help='write a heat map (needs matplotlib)')
    show.set_defaults(run=show_profile)

    imported = actions.add_parser('import', help='channel lists published with FourierAttention')
    imported.add_argument('file', metavar='PUBLISHED.json')
    imported.add_argument('--model', required=True,
                          help='config.json, its folder, or one of ' + ', '.join(models.PRESETS))
    imported.add_argument('-o', '--output', required=True, metavar='FILE')
    imported.add_argument('--fraction', type=float, default=1.0,
                          help='take only this leading share of each plain list')
    for name, what in (('bins', 'complex bins'), ('sinks', 'sink tokens'),
                       ('local', 'local tokens'), ('period', 'period in tokens')):
        imported.add_argument(f'--{name}', type=int, help=f'{what} (default: the library\'s)')
    imported.set_defaults(run=import_profile)

    made = commands.add_parser('calibrate', help='a calibrated profile for a Hugging Face model')
    made.add_argument('--model', required=True, help='folder or name that transformers can load')
    made.add_argument('--text', required=True, nargs='+', metavar='FILE',
                      help='texts like those the model will work on')
    made.add_argument('--ratio', type=float, default=12.0, help='to dense f16 (default 12)')
    made.add_argument('--at', type=int, default=8192, metavar='TOKENS',
                      help='length for which the ratio holds (default 8192)')
    made.add_argument('-o', '--output', required=True, metavar='FILE')
    made.add_argument('--window', type=int, default=4096, help='tokens of a pass (default 4096)')
    made.add_argument('--windows', type=int, metavar='N', help='use only the first N windows')
    made.add_argument('--labels', default='text', choices=('text', 'model', 'both'))
    made.add_argument('--no-gradients', action='store_true',
                      help='forward passes only, which is a little worse')
    made.add_argument('--state', metavar='FILE',
                      help='written after every window: a calibration that was stopped goes on from it')
    made.add_argument('--no-recompute', action='store_true',
                      help='keep what all layers have computed: faster, and takes memory with each layer')
    made.add_argument('--quiet', action='store_true', help='no progress on stderr')
    made.add_argument('--tokens', default='tokenizer', choices=('tokenizer', 'bytes'),
                      help='bytes: a byte is a token')
    made.add_argument('--device', default='cpu', help='of torch (default cpu)')
    made.add_argument('--dtype', default='auto', help='of the weights (default: as stored)')
    for name, value in (('sinks', 4), ('local', 128), ('group', 128), ('block', 128)):
        made.add_argument(f'--{name}', type=int, default=value, help=f'default {value}')
    made.set_defaults(run=calibrate)

    evaluation.add_parser(commands)

    stats = commands.add_parser('stats', help='bytes that a profile takes at given lengths')
    stats.add_argument('file', help='a profile (JSON)')
    stats.add_argument('--tokens', type=token_counts, default=[4096, 8192, 32768, 131072],
                       metavar='N,N,..', help='lengths (default 4096,8192,32768,131072)')
    stats.add_argument('--period', type=int, default=0, help='period of the sequences')
    stats.set_defaults(run=print_stats)
    for command in (info, show, stats):
        command.add_argument('--json', action='store_true', help='for programs')
    return parser


def main(arguments=None) -> int:
    args = make_parser().parse_args(arguments)
    try:
        args.run(args)
    except (fkv.Error, OSError, ValueError, OverflowError, ImportError) as error:
        print(f'fkv: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f'\nfkv: {stop or "stopped"}', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
