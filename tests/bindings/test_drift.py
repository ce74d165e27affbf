# SPDX-License-Identifier: Apache-2.0
"""The bindings cannot drift from the header unnoticed.

Each check must pass with the header as it is, and fail with one field, one constant or one function of it
altered. A check that cannot fail would be found here.
"""
import ast
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import fkv
import fkv.capi
import layouts
import pytest

ROOT = layouts.ROOT
HEADER = ROOT / 'include/fkv/fkv.h'

ALTERATIONS = {
    'a wider field': ('    int32_t bins;\n', '    int64_t bins;\n'),
    'a field in the middle': ('    int64_t min_middle;\n',
                              '    /** New. */\n    int64_t extra;\n    int64_t min_middle;\n'),
    'a renamed field': ('    const int64_t *n_new;\n', '    const int64_t *n_tokens;\n'),
}


def generated_files(include, folder):
    """The files made from the header are those in the repository."""
    return run(sys.executable, ROOT / 'bindings/gen/gen.py', '--check', '--include', include)


def frozen_layout(include, folder):
    """The sizes that tests/abi freezes."""
    return run('cc', '-std=c11', '-fsyntax-only', f'-I{include}', ROOT / 'tests/abi/layout.c')


def ctypes_layout(include, folder):
    """fkv.capi has the compiler's sizes and offsets."""
    try:
        return layouts.compiled(include, folder) == layouts.of_ctypes(fkv.capi)
    except subprocess.CalledProcessError:
        return False


def api_layout(include, folder):
    """api.json, whose sizes no compiler made, has the compiler's."""
    try:
        return layouts.compiled(include, folder) == layouts.of_api()
    except subprocess.CalledProcessError:
        return False


def cffi_module(include, folder):
    """The cdef, compiled against the header in cffi's API mode, every struct looked at."""
    source, module = folder / '_native.c', folder / 'fkv' / '_native.so'
    module.parent.mkdir()
    (folder / 'fkv/__init__.py').touch()
    subprocess.run([sys.executable, ROOT / 'bindings/python/native.py',
                    ROOT / 'bindings/python/fkv.cdef', source], check=True)
    installed = pathlib.Path(fkv.__file__).parent
    if not run('cc', '-w', '-shared', '-fPIC', f'-I{include}',
               f'-I{sysconfig.get_paths()["include"]}', '-o', module, source,
               installed / fkv.capi.SONAME, f'-Wl,-rpath,{installed}'):
        return False
    look = ('import sys; sys.path[:0] = sys.argv[1:]; import layouts; '
            'from fkv._native import ffi; '
            'sys.exit(layouts.of_cffi(ffi) != layouts.of_api())')
    return run(sys.executable, '-c', look, folder, ROOT / 'tests/bindings')


def run(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    return done.returncode == 0


CHECKS = [generated_files, frozen_layout, ctypes_layout, api_layout, cffi_module]


def altered(tmp_path, old, new):
    include = tmp_path / 'include'
    shutil.copytree(ROOT / 'include', include)
    text = HEADER.read_text(encoding='utf-8')
    assert text.count(old) >= 1, f'{old!r} is not in the header: this test must be brought up to date'
    (include / 'fkv/fkv.h').write_text(text.replace(old, new, 1), encoding='utf-8')
    return include


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
def test_header_as_it_is(check, tmp_path):
    assert check(ROOT / 'include', tmp_path), check.__doc__


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize('what', ALTERATIONS)
def test_altered_field_is_noticed(check, what, tmp_path):
    include = altered(tmp_path, *ALTERATIONS[what])
    assert not check(include, tmp_path), f'{check.__name__} does not notice {what}'


@pytest.mark.parametrize('old, new', [
    ('FKV_ERR_BUSY = -14', 'FKV_ERR_BUSY = -16'),
    ('#define FKV_MAX_SINK 64', '#define FKV_MAX_SINK 65'),
    ('FKV_API uint32_t fkv_abi_version(void);', ''),
    ('fkv_status fkv_attend(fkv_plan *plan, int32_t layer', 'fkv_status fkv_attend(fkv_plan *plan, '
     'int64_t layer'),
    ('/** Largest number of sink tokens. */', '/** Sinks. */'),
])
def test_other_changes_show_in_generated_files(old, new, tmp_path):
    assert not generated_files(altered(tmp_path, old, new), tmp_path)


def test_undocumented_function_is_refused(tmp_path):
    include = altered(tmp_path, '#ifdef __cplusplus\n}\n',
                      'FKV_API fkv_status fkv_more(void);\n#ifdef __cplusplus\n}\n')
    done = subprocess.run([sys.executable, ROOT / 'bindings/gen/gen.py', '--check', '--include',
                           include], stderr=subprocess.PIPE, text=True)
    assert done.returncode and 'not documented: fkv_more' in done.stderr


@pytest.mark.parametrize('stub', sorted((ROOT / 'bindings/python/fkv').glob('*.pyi')),
                         ids=lambda path: path.name)
def test_stubs_are_python(stub):
    names = {node.name for node in ast.walk(ast.parse(stub.read_text(encoding='utf-8')))
             if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    symbols = set((ROOT / 'bindings/gen/symbols.txt').read_text().split())
    assert 'View' in names if stub.name == '_view.pyi' else symbols <= names


def test_symbols_are_those_of_the_version_script():
    symbols = (ROOT / 'bindings/gen/symbols.txt').read_text().split()
    script = (ROOT / 'libfkv/libfkv.map').read_text()
    assert symbols and all(f'    {name};\n' in script or f' {name};' in script for name in symbols)

