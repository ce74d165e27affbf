#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes the generated parts of the bindings from include/fkv/fkv.h.

    python3 bindings/gen/gen.py            rewrites them
    python3 bindings/gen/gen.py --check    prints how they differ from the header, exits with 1 if they do

The header becomes api.json, which is there to be reviewed: a change of the interface is a readable diff
of it. Everything else is made from api.json. Needs pycparser (it comes with cffi) and a C compiler.
"""
import argparse
import difflib
import json
import pathlib
import sys

import emit
import header

BINDINGS = pathlib.Path(__file__).resolve().parent.parent

FILES = {
    'gen/symbols.txt': emit.symbols,
    'python/fkv.cdef': emit.cdef,
    'python/fkv/_types.py': emit.types,
    'python/fkv/_native.pyi': emit.native_stub,
    'python/fkv/capi.py': emit.capi,
    'python/fkv/capi.pyi': emit.capi_stub,
}


def make(include, compiler):
    """{path below bindings/: contents}"""
    text = json.dumps(header.read_header(include, compiler), indent=1) + '\n'
    files = {'gen/api.json': text}
    files.update((path, emitter(json.loads(text))) for path, emitter in FILES.items())
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; compare')
    parser.add_argument('--include', default=BINDINGS.parent / 'include', metavar='DIR',
                        help='folder that has fkv/fkv.h')
    parser.add_argument('--bindings', default=BINDINGS, type=pathlib.Path, metavar='DIR',
                        help='folder to write to or to compare with')
    parser.add_argument('--cc', default='cc', help='C compiler to preprocess with')
    args = parser.parse_args()
    try:
        files = make(args.include, args.cc)
    except (header.HeaderError, OSError) as error:
        sys.exit(f'gen.py: {error}')

    different = 0
    for path, text in files.items():
        target = args.bindings / path
        old = target.read_text(encoding='utf-8') if target.exists() else ''
        if old == text:
            continue
        different += 1
        if args.check:
            sys.stdout.writelines(difflib.unified_diff(
                old.splitlines(True), text.splitlines(True), path, 'from the header'))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding='utf-8')
            print('wrote', path)
    if args.check and different:
        sys.exit(f'{different} generated files are out of date: run bindings/gen/gen.py')


main()
