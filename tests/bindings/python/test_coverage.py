# SPDX-License-Identifier: Apache-2.0
"""Every function of the header is called by the package, and every part of the package is tested."""
import pathlib
import re

import fkv
import pytest
from fkv import capi
from fkv._native import lib

import oracle

PACKAGE = pathlib.Path(fkv.__file__).parent
WRAPPER = '\n'.join(path.read_text(encoding='utf-8') for path in sorted(PACKAGE.glob('*.py'))
                    if path.name != 'capi.py')
HERE = pathlib.Path(__file__).parent
#: Called by nobody here, with the reason.
EXCEPTIONS = {
    'fkv_tensor_init': 'a View fills its fkv_tensor itself, with strides',
}


def symbols():
    path = oracle.ROOT / 'bindings/gen/symbols.txt'
    return path.read_text().split() if path.exists() else sorted(capi.PROTOTYPES)


def is_called(name):
    if re.search(rf'\b_?lib\.{name}\b', WRAPPER):
        return True
    # to_c() calls the _init function of each parameter struct.
    return name.endswith('_init') and re.search(rf"_c: ClassVar\[str\] = '{name[:-5]}'", WRAPPER)


@pytest.mark.parametrize('name', symbols())
def test_function_is_called(name):
    assert hasattr(lib, name) and name in capi.PROTOTYPES
    assert bool(is_called(name)) != (name in EXCEPTIONS)


def test_exceptions_are_functions():
    assert set(EXCEPTIONS) <= set(symbols())


def test_modules_know_the_same_functions():
    assert set(symbols()) == set(capi.PROTOTYPES)
    assert {name for name in dir(lib) if name.startswith('fkv_')} == set(symbols())


def public_members():
    for name in fkv.__all__:
        kind = getattr(fkv, name)
        if isinstance(kind, type) and not issubclass(kind, (Exception, int)):
            for member, value in vars(kind).items():
                if not member.startswith('_') and (callable(value) or isinstance(
                        value, (property, classmethod))):
                    yield f'{name}.{member}', member


@pytest.mark.parametrize('member', sorted({m for _, m in public_members()}))
def test_method_is_tested(member):
    tests = '\n'.join(path.read_text(encoding='utf-8') for path in HERE.glob('test_*.py')
                      if path.name != pathlib.Path(__file__).name)
    assert re.search(rf'\.{member}\b', tests)


def test_everything_has_a_docstring():
    for name in fkv.__all__:
        assert getattr(fkv, name).__doc__, name
    for full, member in public_members():
        assert getattr(getattr(fkv, full.split('.')[0]), member).__doc__, full
