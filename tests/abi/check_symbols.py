#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What libfkv shows to the linker, checked against the header and the version script.

Every check is also run on input that was spoiled for it, and must complain there.
"""
import argparse
import pathlib
import re
import subprocess
import sys
import tempfile

VERSION_NODE = 'FKV_0'
SONAME = 'libfkv.so.0'
NEEDED_ALWAYS = {'libc.so', 'libjansson.so'}
NEEDED_ALLOWED = NEEDED_ALWAYS | {'libm.so'}


def run(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def header_functions(text):
    text = re.sub(r'/\*.*?\*/|^\s*#.*?$', '', text, flags=re.S | re.M)
    return set(re.findall(r'FKV_API[^;(]*?\b(\w+)\s*\(', text))


def map_functions(text):
    node = re.search(VERSION_NODE + r'\s*\{\s*global:(.*?)local:\s*\*;\s*\};', text, re.S)
    return {name.strip() for name in node.group(1).split(';') if name.strip()} if node else set()


def dynamic_functions(library):
    """Defined dynamic symbols; one that is not in our version node shows its version."""
    names = set()
    for line in run('nm', '-D', '--defined-only', '--with-symbol-versions', library).splitlines():
        kind, name = line.split()[-2:]
        if kind == 'A' and name.split('@')[0] == VERSION_NODE:
            continue
        suffix = '@@' + VERSION_NODE
        names.add(name[:-len(suffix)] if name.endswith(suffix) else name)
    return names


def difference(name_a, a, name_b, b):
    return ([f'{name} is in {name_a}, not in {name_b}' for name in sorted(a - b)] +
            [f'{name} is in {name_b}, not in {name_a}' for name in sorted(b - a)])


def check_exports(header, version_script, library):
    in_header = header_functions(header)
    in_map = map_functions(version_script)
    return ([] if in_header else ['no function found in the header']) + difference(
        'the header', in_header, 'the map', in_map) + difference(
        'the header', in_header, 'the library', dynamic_functions(library))


def check_archive(archive):
    """Nothing that could clash with a user's names: a static library has no map."""
    names = {line.split()[-1] for line in
             run('nm', '-g', '--defined-only', '--no-sort', archive).splitlines()
             if len(line.split()) == 3}
    return ([] if names else ['no symbol found in the archive']) + [
        f'{name} does not start with fkv_' for name in sorted(names)
        if not name.startswith('fkv_')]


def check_dynamic_section(library):
    text = run('readelf', '-dW', library)
    soname = re.findall(r'\(SONAME\).*\[(.*)\]', text)
    needed = {re.sub(r'(\.so).*', r'\1', name)
              for name in re.findall(r'\(NEEDED\).*\[(.*)\]', text)}
    return ([] if soname == [SONAME] else [f'soname is {soname}']) + [
        f'{name} is needed' for name in sorted(needed - NEEDED_ALLOWED)] + [
        f'{name} is not needed' for name in sorted(NEEDED_ALWAYS - needed)]


def check_stack(library):
    flags = re.findall(r'GNU_STACK(?:\s+0x\w+){5}\s+(\S+)', run('readelf', '-lW', library))
    return [] if flags == ['RW'] else [f'flags of GNU_STACK are {flags}']


def spoiled(args, header, version_script, tmp):
    """(what was done, complaints of the check that must notice it)"""
    source = tmp / 'stray.c'
    source.write_text('int stray(void);\nint stray(void) { return 0; }\n')
    stray, archive, library = (str(tmp / name) for name in ('stray.o', 'stray.a', 'stray.so'))
    run(args.cc, '-c', '-fPIC', '-o', stray, str(source))
    run('ar', 'rcs', archive, stray)
    run(args.cc, '-shared', '-Wl,-z,execstack', '-Wl,-soname,libstray.so.1', '-o', library, stray)
    first = sorted(map_functions(version_script))[0]
    return [
        ('a function missing in the map',
         check_exports(header, version_script.replace(first + ';', ''), args.shared)),
        ('a function missing in the header',
         check_exports(header.replace(first + '(', 'fkv_other('), version_script, args.shared)),
        ('a library with other exports', check_exports(header, version_script, library)),
        ('a foreign name in the archive', check_archive(archive)),
        ('another soname and other libraries', check_dynamic_section(library)),
        ('an executable stack', check_stack(library)),
    ]


def main():
    parser = argparse.ArgumentParser()
    for option in ('--header', '--map', '--shared', '--static', '--cc'):
        parser.add_argument(option, required=True)
    args = parser.parse_args()
    header = pathlib.Path(args.header).read_text()
    version_script = pathlib.Path(args.map).read_text()

    results = [
        ('header, map and library have the same functions',
         check_exports(header, version_script, args.shared)),
        ('names in the archive', check_archive(args.static)),
        ('soname and needed libraries', check_dynamic_section(args.shared)),
        ('the stack is not executable', check_stack(args.shared)),
    ]
    with tempfile.TemporaryDirectory() as tmp:
        for what, complaints in spoiled(args, header, version_script, pathlib.Path(tmp)):
            results.append((f'{what} is noticed', [] if complaints else ['it was not']))

    for number, (name, complaints) in enumerate(results, 1):
        print('not ok' if complaints else 'ok', number, '-', name)
        for complaint in complaints:
            print('#', complaint)
    return any(complaints for _, complaints in results)


sys.exit(main())
