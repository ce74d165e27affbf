# SPDX-License-Identifier: Apache-2.0
"""Calibration: from observed keys and values to a profile."""
import fkv
import numpy
import pytest

import oracle

PARAMS = {'bins': 8, 'n_local': 8, 'n_sink': 2, 'period': 128}


def observed(context, model, random, criterion='residual', with_q=True, count=120):
    calibrator = fkv.Calibrator(context, model, criterion=criterion, fourier=PARAMS)
    for layer in range(oracle.LAYERS):
        q, k, v = oracle.tokens(random, count)
        calibrator.observe(layer, k, v, q if with_q else None)
    return calibrator


@pytest.mark.parametrize('criterion', ['residual', 'published', fkv.Criterion.PUBLISHED])
def test_solve_takes_the_channels_of_least_error(context, model, random, criterion):
    calibrator = observed(context, model, random, criterion)
    profile = calibrator.solve(0.5, 0.25)
    assert profile.info.k_fourier_channels == 32 and profile.info.v_fourier_channels == 16
    assert (profile.info.bins, profile.info.n_local, profile.info.period) == (8, 8, 128)
    for layer in range(oracle.LAYERS):
        for part, count in (('k', 16), ('v', 8)):
            errors = calibrator.errors(layer, part)
            assert errors.shape == (2, 16) and errors.dtype == numpy.float64
            assert (errors > 0).all()
            least = numpy.argsort(errors.ravel())[:count]
            codes = profile.channels(layer, part).ravel()
            assert set(numpy.flatnonzero(codes == fkv.Channel.FOURIER)) == set(least)


def test_smooth_channels_have_small_errors(context, random):
    """Without RoPE a slow sine of amplitude 1 is cheaper than noise of the same size."""
    calibrator = fkv.Calibrator(context, oracle.model('none'), fourier=PARAMS)
    time = numpy.arange(120)
    for layer in range(oracle.LAYERS):
        q, k, v = oracle.tokens(random, 120)
        k[:, 1, 5] = numpy.sin(2 * numpy.pi * time / 120)
        v[:, 0, 3] = numpy.cos(2 * numpy.pi * time / 110)
        calibrator.observe(layer, k, v)
        assert calibrator.errors(layer, 'k').argmin() == 16 + 5
        assert calibrator.errors(layer, 'v').argmin() == 3


def test_shares_by_layer(context, model, random):
    calibrator = observed(context, model, random)
    profile = calibrator.solve([0.0, 1.0], numpy.array([0.25, 0.75]))
    coded = [[int((profile.channels(layer, part) == fkv.Channel.FOURIER).sum())
              for part in 'kv'] for layer in range(2)]
    assert coded == [[0, 8], [32, 24]]


def test_published_shares(context, model, random):
    info = observed(context, model, random).solve().info
    assert 0 < info.k_fourier_channels < 64 and 0 < info.v_fourier_channels < 64


def test_errors_do_not_depend_on_queries_for_values(context, model):
    a = observed(context, model, numpy.random.default_rng(3), with_q=True)
    b = observed(context, model, numpy.random.default_rng(3), with_q=False)
    assert (a.errors(0, 'v') == b.errors(0, 'v')).all()
    assert (a.errors(0, 'k') != b.errors(0, 'k')).any()


def test_observations_add_up(context, model, random):
    calibrator = fkv.Calibrator(context, model, fourier=PARAMS)
    seen = []
    for _ in range(2):
        _, k, v = oracle.tokens(random, 90)
        calibrator.observe(0, k, v)
        one = fkv.Calibrator(context, model, fourier=PARAMS)
        one.observe(0, k, v)
        seen.append(one.errors(0, 'v'))
    both = calibrator.errors(0, 'v')
    assert (both >= numpy.minimum(*seen) * (1 - 1e-9)).all()
    assert (both <= numpy.maximum(*seen) * (1 + 1e-9)).all()


def test_state_without_observations(context, model, random):
    calibrator = fkv.Calibrator(context, model, fourier=PARAMS)
    with pytest.raises(fkv.StateError, match='layer 0'):
        calibrator.errors(0, 'k')
    with pytest.raises(fkv.StateError, match='layer 0'):
        calibrator.solve(0.5, 0.5)
    _, k, v = oracle.tokens(random, 100)
    calibrator.observe(0, k, v)
    with pytest.raises(fkv.StateError, match='layer 1'):
        calibrator.solve(0.5, 0.5)


def test_wrong_observations(context, model, random):
    calibrator = fkv.Calibrator(context, model, fourier=PARAMS)
    q, k, v = oracle.tokens(random, 100)
    calibrator.observe(0, k, v, q)
    for arguments, kind in (((0, k, v), fkv.InvalidError), ((0, k[:9], v[:9], q[:9]),
                                                            fkv.InvalidError),
                            ((0, k, v[:50], q), fkv.InvalidError), ((2, k, v), fkv.InvalidError),
                            ((0, k.astype(float), v, q), TypeError), ((0, None, v), TypeError),
                            ((0, k * numpy.float32('nan'), v, q), fkv.NonFiniteError)):
        before = calibrator.errors(0, 'k')
        with pytest.raises(kind):
            calibrator.observe(*arguments)
        assert (calibrator.errors(0, 'k') == before).all()


@pytest.mark.parametrize('shares, kind', [
    ((0.5, None), fkv.InvalidError), ((1.5, 0.5), fkv.InvalidError),
    ((0.5, -0.1), fkv.InvalidError), (([0.5] * 3, 0.5), ValueError), (('half', 0.5), ValueError),
    ((float('nan'), 0.5), fkv.InvalidError),
])
def test_wrong_shares(context, model, random, shares, kind):
    calibrator = observed(context, model, random)
    with pytest.raises(kind):
        calibrator.solve(*shares)
    assert calibrator.solve(0.5, 0.5).info.k_fourier_channels == 32


def test_wrong_parameters(context, model):
    with pytest.raises(ValueError, match='criterion'):
        fkv.Calibrator(context, model, criterion='best')
    with pytest.raises(OverflowError, match='bins'):
        fkv.Calibrator(context, model, fourier={'bins': 2**40})
    with pytest.raises(TypeError, match='fourier'):
        fkv.Calibrator(context, model, fourier=7)
    with pytest.raises(fkv.InvalidError):
        fkv.Calibrator(context, model, fourier={'bins': 0})


def test_profile_outlives_the_calibrator(leak_free, model, random):
    calibrator = observed(leak_free, model, random)
    profile = calibrator.solve(0.5, 0.5)
    calibrator.close()
    with pytest.raises(fkv.HandleError, match='the calibrator is closed'):
        calibrator.errors(0, 'k')
    assert profile.info.v_fourier_channels == 32
    text = profile.dumps()
    profile.close()
    with pytest.raises(fkv.HandleError, match='the profile is closed'):
        profile.info
    assert fkv.Profile.loads(leak_free, text).dumps() == text


def test_types_of_observations(context, model, random):
    """f16 inputs give what the same numbers give in f32."""
    _, k, v = oracle.tokens(random, 100, dtype=numpy.float16)
    errors = []
    for dtype in (numpy.float16, numpy.float32):
        calibrator = fkv.Calibrator(context, model, fourier=PARAMS)
        calibrator.observe(1, k.astype(dtype), v.astype(dtype))
        errors.append(calibrator.errors(1, fkv.Part.K))
    assert (errors[0] == errors[1]).all()
