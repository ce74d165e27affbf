# SPDX-License-Identifier: Apache-2.0
"""Exceptions and enumerations."""
import pickle

import fkv
import pytest
from fkv import errors
from fkv._convert import as_enum

CODES = [status for status in fkv.Status if status is not fkv.Status.OK]


@pytest.mark.parametrize('status', CODES, ids=lambda status: status.name)
def test_every_status_has_its_exception(status):
    error = errors.failure(int(status), 'what happened')
    assert type(error) is errors.BY_STATUS[status] is not fkv.Error
    assert error.status is status and type(error).status is status
    assert str(error) == 'what happened' and error.args == ('what happened',)
    assert str(errors.failure(status, '')) == fkv.status_string(status)


def test_every_exception_has_its_status():
    classes = {kind for kind in vars(errors).values()
               if isinstance(kind, type) and issubclass(kind, fkv.Error) and kind is not fkv.Error}
    assert sorted(kind.status for kind in classes) == sorted(CODES)
    assert classes == set(errors.BY_STATUS.values())
    assert all(getattr(fkv, kind.__name__) is kind and kind.__doc__ for kind in classes)


@pytest.mark.parametrize('kind, base', [
    (fkv.InvalidError, ValueError), (fkv.NoMemoryError, MemoryError), (fkv.FileError, OSError),
    (fkv.NonFiniteError, ValueError), (fkv.FormatError, ValueError),
    (fkv.UnsupportedError, NotImplementedError)])
def test_exceptions_are_pythons_too(kind, base):
    with pytest.raises(base):
        raise kind('x')


def test_status_of_a_newer_library():
    error = errors.failure(-99, 'new')
    assert type(error) is fkv.Error and error.status == -99 and str(error) == 'new'
    assert fkv.status_string(-99) and isinstance(fkv.status_string(2**31 - 1), str)


def test_names_of_statuses():
    assert len({fkv.status_string(status) for status in fkv.Status}) == len(fkv.Status)
    for wrong in (None, 'x', 1.5):
        with pytest.raises(TypeError):
            fkv.status_string(wrong)
    with pytest.raises(OverflowError):
        fkv.status_string(2**31)


@pytest.mark.parametrize('status', CODES, ids=lambda status: status.name)
def test_exceptions_can_be_pickled(status):
    error = errors.failure(status, 'text')
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == 'text' and again.status == status


ENUMS = [fkv.DType, fkv.Device, fkv.Backend, fkv.CpuLevel, fkv.RopeLayout, fkv.Restoration,
         fkv.Outgrow, fkv.Part, fkv.Channel, fkv.Coding, fkv.Criterion, fkv.Status]


@pytest.mark.parametrize('kind', ENUMS, ids=lambda kind: kind.__name__)
def test_enums(kind):
    for member in kind:
        name = member.name
        for given in (member, int(member), name, name.lower(), name.lower().replace('_', '-')):
            assert as_enum(kind, given) is member
    for wrong in ('', 'nothing', 12345, -12345, None, 0.25, object(), b'cpu', [1]):
        with pytest.raises(ValueError, match=f'no {kind.__name__}: .*{next(iter(kind)).name.lower()}'):
            as_enum(kind, wrong)


def test_enums_are_those_of_the_ctypes_module():
    from fkv import capi
    prefixes = {'Status': ('FKV_ERR_', 'FKV_'), 'RopeLayout': ('FKV_ROPE_',),
                'Restoration': ('FKV_RESTORE_',), 'CpuLevel': ('FKV_CPU_',)}
    for kind in ENUMS:
        for member in kind:
            names = [prefix + member.name for prefix in
                     prefixes.get(kind.__name__, (f'FKV_{kind.__name__.upper()}_',))]
            found = [getattr(capi, name) for name in names if hasattr(capi, name)]
            assert found == [member], names


@pytest.mark.parametrize('kind', [fkv.ContextParams, fkv.ModelParams, fkv.FourierParams,
                                  fkv.CalibratorParams, fkv.CacheParams, fkv.SequenceParams])
def test_params_are_plain_records(kind):
    assert kind() == kind() and kind.__doc__
    assert all(value is None for value in vars(kind()).values())
    with pytest.raises(TypeError):
        kind(no_such_field=1)
    assert pickle.loads(pickle.dumps(kind())) == kind()
