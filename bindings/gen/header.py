# SPDX-License-Identifier: Apache-2.0
"""Reads include/fkv/fkv.h into one plain dictionary, the contents of api.json.

The C preprocessor and pycparser read the declarations; documentation comments and constants come from
the text, which both of them drop. Sizes and offsets are computed here by the rules of LP64, not asked
from a compiler: the tests compare them with what the compiler says.
"""
import pathlib
import re
import subprocess

from pycparser import c_ast, c_generator, c_parser

HERE = pathlib.Path(__file__).parent

# (size, alignment) on LP64
SCALARS = {
    'char': 1, 'int8_t': 1, 'uint8_t': 1, 'int32_t': 4, 'uint32_t': 4, 'float': 4,
    'int64_t': 8, 'uint64_t': 8, 'size_t': 8, 'double': 8,
}
POINTER = 8


class HeaderError(Exception):
    """The header has something that the bindings cannot express."""


def preprocess(include, compiler='cc'):
    command = [compiler, '-E', '-P', '-nostdinc', f'-I{HERE / "std"}', f'-I{include}',
               '-D__attribute__(x)=', '-xc', str(pathlib.Path(include) / 'fkv/fkv.h')]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if run.returncode:
        raise HeaderError(f'{compiler} does not accept the header:\n{run.stderr}')
    return run.stdout


def clean_comment(comment):
    lines = [re.sub(r'^\s*\*? ?', '', line).rstrip() for line in comment.strip().splitlines()]
    return '\n'.join(lines).strip()


def comments(text):
    """{declared name: documentation}; fields and enumerators as 'owner.name'."""
    found = {}
    owner = None
    pattern = re.compile(
        r'/\*\*(?P<doc>.*?)\*/\s*(?P<next>[^\n]*(?:\n[^\n]*)?)'
        r'|^(?:typedef )?(?:struct|enum) (?P<owner>\w+) \{'
        r'|^\}(?P<end>)', re.S | re.M)
    position = 0
    while True:
        match = pattern.search(text, position)
        if not match:
            return found
        if match['doc'] is None:
            owner = match['owner']
            position = match.end()
            continue
        name = declared_name(match['next'])
        if name:
            key = f'{owner}.{name}' if owner else name
            found[key] = clean_comment(match['doc'])
        position = match.start('next')


def declared_name(code):
    """The name that the declaration at the start of `code` declares, or None."""
    for pattern in (r'#define (\w+)', r'typedef (?:struct|enum) (\w+)', r'enum (\w+) \{',
                    r'typedef [^;(]*\(\*(\w+)\)', r'typedef [^;(]*?(\w+);',
                    r'FKV_API [^(;]*?(\w+)\(', r'([A-Z]\w+) = ', r'[\w *]+?(\w+)(?:\[\d+\])?;'):
        match = re.match(pattern, code, re.S)
        if match:
            return match[1]
    return None


def literal(text):
    """A constant as int or str, or None if the define is something else."""
    text = text.strip()
    if re.fullmatch(r'-?(0x[0-9a-fA-F]+|\d+)[uUlL]*', text):
        return int(text.rstrip('uUlL'), 0)
    if re.fullmatch(r'"[^"\\]*"', text):
        return text[1:-1]
    return None


def constants(text, docs):
    found = []
    for name, value in re.findall(r'^#define (FKV_\w+)[ \t]+(\S[^\n]*)$', text, re.M):
        value = literal(value)
        if value is not None:
            found.append({'name': name, 'value': value, 'doc': docs.get(name, '')})
    return found


class Types:
    """Sizes of the types seen so far."""

    def __init__(self):
        self.sizes = dict(SCALARS)
        self.alignments = dict(SCALARS)
        self.generator = c_generator.CGenerator()

    def text(self, node):
        """The type of a declaration, written without its name."""
        return re.sub(r'\s+', ' ', self.generator.visit(anonymous(node))).strip()

    def measure(self, node):
        """(size, alignment)"""
        if isinstance(node, c_ast.PtrDecl):
            return POINTER, POINTER
        if isinstance(node, c_ast.ArrayDecl):
            size, alignment = self.measure(node.type)
            return size * int(node.dim.value), alignment
        name = ' '.join(node.type.names)
        if name not in self.sizes:
            raise HeaderError(f'a field has type {name}, of unknown size')
        return self.sizes[name], self.alignments[name]

    def add(self, name, size, alignment):
        self.sizes[name] = size
        self.alignments[name] = alignment


def anonymous(node):
    """A copy of a type without the declared name, for printing it."""
    if isinstance(node, c_ast.TypeDecl):
        return c_ast.TypeDecl(None, node.quals, node.align, node.type)
    if isinstance(node, c_ast.PtrDecl):
        return c_ast.PtrDecl(node.quals, anonymous(node.type))
    if isinstance(node, c_ast.ArrayDecl):
        return c_ast.ArrayDecl(anonymous(node.type), node.dim, node.dim_quals)
    raise HeaderError(f'unexpected {type(node).__name__} in a declaration')


def round_up(value, alignment):
    return -(-value // alignment) * alignment


def read_struct(name, node, types, docs):
    fields = []
    offset, alignment = 0, 1
    for declaration in node.decls:
        size, field_alignment = types.measure(declaration.type)
        offset = round_up(offset, field_alignment)
        fields.append({'name': declaration.name, 'type': types.text(declaration.type),
                       'offset': offset, 'size': size,
                       'doc': docs.get(f'{name}.{declaration.name}', '')})
        offset += size
        alignment = max(alignment, field_alignment)
    size = round_up(offset, alignment)
    types.add(name, size, alignment)
    return {'name': name, 'size': size, 'doc': docs.get(name, ''), 'fields': fields}


def read_enum(node, typedefs, docs):
    values = []
    following = 0
    for item in node.values.enumerators:
        if item.value is not None:
            following = int(c_generator.CGenerator().visit(item.value).replace(' ', ''), 0)
        values.append({'name': item.name, 'value': following,
                       'doc': docs.get(f'{node.name}.{item.name}', '')})
        following += 1
    typedef = node.name[:-len('_code')] if node.name.endswith('_code') else None
    return {'name': node.name, 'typedef': typedef if typedef in typedefs else None,
            'doc': docs.get(node.name, ''), 'values': values}


def read_function(name, node, types, docs):
    parameters = []
    for parameter in node.args.params if node.args else []:
        text = types.text(parameter.type)
        if text != 'void':
            parameters.append({'name': parameter.name, 'type': text})
    return {'name': name, 'returns': types.text(node.type), 'params': parameters,
            'doc': docs.get(name, '')}


def read_header(include, compiler='cc'):
    """The whole interface as a dictionary. `include` is the folder that has fkv/fkv.h."""
    text = (pathlib.Path(include) / 'fkv/fkv.h').read_text(encoding='utf-8')
    docs = comments(text)
    tree = c_parser.CParser().parse(preprocess(include, compiler), 'fkv.h')
    types = Types()
    api = {'constants': constants(text, docs), 'typedefs': [], 'enums': [], 'handles': [],
           'callbacks': [], 'structs': [], 'functions': []}
    standard = set(SCALARS) | {'uintptr_t'}
    for item in tree.ext:
        read_item(item, api, types, docs, standard)
    values = {c['name']: c['value'] for c in api['constants']}
    api['version'] = '.'.join(str(values[f'FKV_VERSION_{part}'])
                              for part in ('MAJOR', 'MINOR', 'PATCH'))
    undocumented = [f['name'] for f in api['functions'] if not f['doc']] + [
        f'{s["name"]}.{f["name"]}' for s in api['structs'] for f in s['fields'] if not f['doc']]
    if undocumented:
        raise HeaderError('not documented: ' + ', '.join(undocumented))
    return api


def read_item(item, api, types, docs, standard):
    if isinstance(item, c_ast.Typedef):
        if item.name in standard:
            return
        kind = item.type
        if isinstance(kind, c_ast.PtrDecl) and isinstance(kind.type, c_ast.FuncDecl):
            types.add(item.name, POINTER, POINTER)
            api['callbacks'].append(read_function(item.name, kind.type, types, docs))
        elif isinstance(kind.type, c_ast.Struct) and kind.type.decls:
            api['structs'].append(read_struct(item.name, kind.type, types, docs))
        elif isinstance(kind.type, c_ast.Struct):
            api['handles'].append({'name': item.name, 'doc': docs.get(item.name, '')})
        else:
            types.add(item.name, *types.measure(kind))
            api['typedefs'].append({'name': item.name, 'type': types.text(kind),
                                    'doc': docs.get(item.name, '')})
    elif isinstance(item.type, c_ast.Enum):
        api['enums'].append(read_enum(item.type, {t['name'] for t in api['typedefs']}, docs))
    elif isinstance(item.type, c_ast.FuncDecl):
        api['functions'].append(read_function(item.name, item.type, types, docs))
    else:
        raise HeaderError(f'unexpected declaration of {item.name}')
