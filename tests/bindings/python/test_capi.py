# SPDX-License-Identifier: Apache-2.0
"""The ctypes module, alone and beside the wrapper; layouts of all structs."""
import ctypes
import os
import pathlib
import shutil
import subprocess
import sys

import fkv
import numpy
import pytest
from fkv import capi
from fkv._native import ffi

import oracle

PACKAGE = pathlib.Path(fkv.__file__).parent
HEADER = oracle.ROOT / 'include/fkv/fkv.h'
STRUCTS = [name for name in vars(capi) if isinstance(getattr(capi, name), type)
           and issubclass(getattr(capi, name), ctypes.Structure)
           and hasattr(getattr(capi, name), '_fields_')]

# Uses nothing but the file capi.py; prints the bits of two steps' outputs.
PROGRAM = '''
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location('alone', sys.argv[1])
c = importlib.util.module_from_spec(spec)
spec.loader.exec_module(c)
lib = c.load()
assert 'fkv' not in sys.modules and 'numpy' not in sys.modules and 'cffi' not in sys.modules

def must(status):
    if status != c.FKV_OK:
        text = ctypes.create_string_buffer(200)
        lib.fkv_context_message(context, text, 200, None)
        raise SystemExit(f'{lib.fkv_status_string(status)} {text.value}')

context = ctypes.POINTER(c.fkv_context)()
params = c.fkv_context_params()
must(lib.fkv_context_params_init(params, ctypes.sizeof(params)))
params.threads = 1
must(lib.fkv_context_create(params, context))
model = c.fkv_model_params()
must(lib.fkv_model_params_init(model, ctypes.sizeof(model)))
model.n_layers, model.n_q_heads, model.n_kv_heads, model.head_dim = 1, 4, 2, 16
model.rope_layout, model.rope_dim, model.inv_freq_count = c.FKV_ROPE_HALF_SPLIT, 16, 8
frequencies = (ctypes.c_double * 8)(*(10000.0 ** (-2.0 * j / 16) for j in range(8)))
model.inv_freq = frequencies
profile = ctypes.POINTER(c.fkv_profile)()
must(lib.fkv_profile_create_exact(context, model, c.FKV_DTYPE_F16, profile))
cache = ctypes.POINTER(c.fkv_cache)()
must(lib.fkv_cache_create(context, profile, None, cache))
sequence = ctypes.c_int64()
must(lib.fkv_sequence_create(cache, None, sequence))
plan = ctypes.POINTER(c.fkv_plan)()
must(lib.fkv_plan_create(cache, plan))

def tensor(values, shape):
    data = (ctypes.c_float * len(values))(*values)
    t = c.fkv_tensor()
    must(lib.fkv_tensor_init(t, data, c.FKV_DTYPE_F32, len(shape),
                             (ctypes.c_int64 * len(shape))(*shape)))
    return t, data

number = 0
def some(count):
    global number
    number += count
    return [((i * 37) % 101 - 50) / 64 for i in range(number - count, number)]

for count in (9, 1):
    batch = c.fkv_batch()
    must(lib.fkv_batch_init(batch, ctypes.sizeof(batch)))
    batch.count = 1
    batch.sequences, batch.n_new = ctypes.pointer(sequence), ctypes.pointer(ctypes.c_int64(count))
    must(lib.fkv_plan_update(plan, batch))
    q, k, v = (tensor(some(count * h * 16), (count, h, 16)) for h in (4, 2, 2))
    out, lse = tensor([0.0] * count * 64, (count, 4, 16)), tensor([0.0] * count * 4, (count, 4))
    must(lib.fkv_append_attend(plan, 0, q[0], k[0], v[0], out[0], lse[0]))
    print(bytes(out[1]).hex(), bytes(lse[1]).hex())
assert lib.fkv_append(plan, 5, k[0], v[0]) == c.FKV_ERR_INVALID
for destroy, handle in ((lib.fkv_context_destroy, context), (lib.fkv_plan_destroy, plan),
                        (lib.fkv_cache_destroy, cache), (lib.fkv_profile_destroy, profile)):
    assert destroy(handle) == c.FKV_OK and destroy(handle) == c.FKV_ERR_HANDLE
'''


def alone(path, **environment):
    return subprocess.run([sys.executable, '-c', PROGRAM, str(path)], text=True, timeout=60,
                          env={**os.environ, **environment}, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)


def through_the_wrapper(context):
    model = oracle.model(n_layers=1)
    cache = fkv.Cache(context, fkv.Profile.exact(context, model, 'f16'))
    sequence, plan, number, lines = cache.sequence(), cache.plan(), 0, []
    for count in (9, 1):
        plan.update([sequence], count)
        arrays = []
        for heads in (4, 2, 2):
            values = numpy.arange(number, number + count * heads * 16)
            number += len(values)
            arrays.append(((values * 37 % 101 - 50) / 64).astype('f').reshape(count, heads, 16))
        lines.append(' '.join(x.tobytes().hex() for x in plan.append_attend(0, *arrays, lse=True)))
    return lines


def test_ctypes_alone_gives_the_bits_of_the_wrapper(context, tmp_path):
    copy = tmp_path / 'elsewhere.py'
    shutil.copy(PACKAGE / 'capi.py', copy)
    done = alone(copy, FKV_LIBRARY=str(PACKAGE / capi.SONAME))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == through_the_wrapper(context)


def test_library_beside_the_module(context):
    environment = {key: '' for key in ('FKV_LIBRARY',)}
    done = alone(PACKAGE / 'capi.py', **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == through_the_wrapper(context)


def test_no_library(tmp_path):
    with pytest.raises(OSError):
        capi.load(tmp_path / 'libfkv.so.0')
    done = alone(PACKAGE / 'capi.py', FKV_LIBRARY=str(tmp_path / 'nothing.so'))
    assert done.returncode != 0 and 'nothing.so' in done.stderr.splitlines()[-1]


def test_library_of_another_abi(monkeypatch):
    monkeypatch.setattr(capi, 'FKV_ABI_VERSION', 12345)
    with pytest.raises(ImportError, match='12345'):
        capi.load()


def test_wrong_arguments_are_no_crash():
    lib = capi.load(PACKAGE / capi.SONAME)
    for wrong in ('context', 5, 1.5, capi.fkv_tensor()):
        with pytest.raises(ctypes.ArgumentError):
            lib.fkv_context_destroy(wrong)
    assert lib.fkv_context_destroy(None) == capi.FKV_OK
    assert lib.fkv_context_create(None, None) == capi.FKV_ERR_INVALID


def of_ctypes(name):
    kind = getattr(capi, name)
    return ctypes.sizeof(kind), {field: (getattr(kind, field).offset, getattr(kind, field).size)
                                 for field, _ in kind._fields_}


def of_cffi(name):
    kind = ffi.typeof(name)
    return ffi.sizeof(kind), {field: (what.offset, ffi.sizeof(what.type))
                              for field, what in kind.fields}


def test_there_are_structs():
    assert len(STRUCTS) >= 11 and 'fkv_tensor' in STRUCTS and 'fkv_batch' in STRUCTS


@pytest.mark.parametrize('name', STRUCTS)
def test_layout_of_cffi_and_ctypes(name):
    assert of_ctypes(name) == of_cffi(name)


@pytest.mark.skipif(not HEADER.exists(), reason='no sources here')
def test_layout_in_api_json():
    import json
    api = json.loads((oracle.ROOT / 'bindings/gen/api.json').read_text(encoding='utf-8'))
    assert sorted(s['name'] for s in api['structs']) == sorted(STRUCTS)
    for struct in api['structs']:
        listed = struct['size'], {f['name']: (f['offset'], f['size']) for f in struct['fields']}
        assert listed == of_ctypes(struct['name'])


@pytest.mark.skipif(not HEADER.exists() or not shutil.which('cc'), reason='no sources, or no cc')
def test_layout_of_the_compiler(tmp_path):
    lines = ['#include <fkv/fkv.h>', '#include <stddef.h>']
    for name in STRUCTS:
        size, fields = of_ctypes(name)
        lines.append(f'_Static_assert(sizeof({name}) == {size}, "{name}");')
        lines += [f'_Static_assert(offsetof({name}, {field}) == {offset} && '
                  f'sizeof((({name} *)0)->{field}) == {bytes_}, "{name}.{field}");'
                  for field, (offset, bytes_) in fields.items()]
    constants = {name: value for name, value in vars(capi).items()
                 if name.startswith('FKV_') and isinstance(value, int)}
    assert len(constants) > 40
    lines += [f'_Static_assert({name} == {value}, "{name}");' for name, value in constants.items()]

    def compiles(text):
        source = tmp_path / 'layout.c'
        source.write_text(text + '\n')
        return subprocess.run(['cc', '-std=c11', '-fsyntax-only', f'-I{oracle.ROOT}/include',
                               source], stderr=subprocess.PIPE, text=True)

    done = compiles('\n'.join(lines))
    assert done.returncode == 0, done.stderr
    size = ctypes.sizeof(capi.fkv_stats)
    assert compiles('\n'.join(lines).replace(f'sizeof(fkv_stats) == {size}',
                                             f'sizeof(fkv_stats) == {size + 8}')).returncode != 0


@pytest.mark.parametrize('name', [n for n in STRUCTS if n.endswith('_params')] + ['fkv_batch'])
def test_init_functions(name):
    lib = capi.load()
    struct = getattr(capi, name)()
    ctypes.memset(ctypes.byref(struct), 0xff, ctypes.sizeof(struct))
    init = getattr(lib, name + '_init')
    assert init(struct, ctypes.sizeof(struct)) == capi.FKV_OK
    assert struct.struct_size == ctypes.sizeof(struct)
    assert init(struct, 3) == capi.FKV_ERR_INVALID
