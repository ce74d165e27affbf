# SPDX-License-Identifier: Apache-2.0
"""Sizes and offsets of the header's structs as the C compiler has them."""
import json
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
API = json.loads((ROOT / 'bindings/gen/api.json').read_text(encoding='utf-8'))


def compiled(include, folder, compiler='cc'):
    """{struct: (size, {field: (offset, size)})} for the structs and fields that api.json names."""
    lines = ['#include <fkv/fkv.h>', '#include <stddef.h>', '#include <stdio.h>',
             'int main(void) {']
    for struct in API['structs']:
        name = struct['name']
        lines.append(f'    printf("{name} - 0 %zu\\n", sizeof({name}));')
        lines += [f'    printf("{name} {f["name"]} %zu %zu\\n", offsetof({name}, {f["name"]}), '
                  f'sizeof((({name} *)0)->{f["name"]}));' for f in struct['fields']]
    lines += ['    return 0;', '}']
    source, program = pathlib.Path(folder) / 'layout.c', pathlib.Path(folder) / 'layout'
    source.write_text('\n'.join(lines) + '\n')
    subprocess.run([compiler, '-w', f'-I{include}', '-o', program, source], check=True,
                   stderr=subprocess.PIPE)
    layout = {}
    for line in subprocess.check_output([program], text=True).splitlines():
        struct, field, offset, size = line.split()
        if field == '-':
            layout[struct] = (int(size), {})
        else:
            layout[struct][1][field] = (int(offset), int(size))
    return layout


def of_api():
    """The same from api.json."""
    return {s['name']: (s['size'], {f['name']: (f['offset'], f['size']) for f in s['fields']})
            for s in API['structs']}


def of_ctypes(capi):
    """The same from the ctypes module."""
    import ctypes
    layout = {}
    for struct in API['structs']:
        kind = getattr(capi, struct['name'])
        layout[struct['name']] = (ctypes.sizeof(kind), {
            name: (getattr(kind, name).offset, getattr(kind, name).size)
            for name, _ in kind._fields_})
    return layout


def of_cffi(ffi):
    """The same from a compiled cffi module; cffi raises ffi.error where it differs from its cdef."""
    layout = {}
    for struct in API['structs']:
        kind = ffi.typeof(struct['name'])
        layout[struct['name']] = (ffi.sizeof(kind), {
            name: (field.offset, ffi.sizeof(field.type)) for name, field in kind.fields})
    return layout
