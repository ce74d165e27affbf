# SPDX-License-Identifier: Apache-2.0
"""Profiles: made, imported, read, written, looked at."""
import json

import fkv
import numpy
import pytest

import oracle

SHAPE = oracle.LAYERS, oracle.KV_HEADS, oracle.DIM
NONE = numpy.zeros(SHAPE, bool)

# Two heads of 8. The first head keeps 1..6 in layer 0; layer 1 compresses one channel of K.
PLAIN = {
    'Layer_1': {'self_attn.v_proj': [], 'self_attn.k_proj': [15]},
    'Layer_0': {'self_attn.k_proj': [9, 0, 7, 8], 'self_attn.v_proj': list(range(16))},
}
SPLIT = {
    'Layer_0': {
        'kc_list': [0, 7, 8, 9], 'kc_h_list': [2, 4],
        'kn_list': [1, 2, 3, 4, 5, 6, 10, 11, 12, 13, 14, 15], 'kn_h_list': [6, 12],
        'vc_list': list(range(16)), 'vc_h_list': [8, 16], 'vn_list': [], 'vn_h_list': [0, 0]},
    'Layer_1': {
        'kc_list': [15], 'kc_h_list': [0, 1], 'kn_list': list(range(15)), 'kn_h_list': [8, 15],
        'vc_list': [], 'vc_h_list': [0, 0], 'vn_list': list(range(16)), 'vn_h_list': [8, 16]},
}


def small():
    return fkv.ModelParams(n_layers=2, n_q_heads=2, n_kv_heads=2, head_dim=8)


def coded(profile, layer, part):
    return numpy.flatnonzero(profile.channels(layer, part).ravel() == fkv.Channel.FOURIER).tolist()


@pytest.mark.parametrize('dtype', ['f32', 'f16', 'bf16', fkv.DType.F32, 2])
def test_exact(context, model, dtype):
    profile = fkv.Profile.exact(context, model, dtype)
    expected = fkv.DType[dtype.upper()] if isinstance(dtype, str) else fkv.DType(dtype)
    info = profile.info
    assert info.storage_dtype is expected and info.coding is fkv.Coding.EXACT
    assert (info.n_layers, info.n_q_heads, info.n_kv_heads, info.head_dim) == (2, 4, 2, 16)
    assert info.coefficient_dtype is fkv.DType.NONE and info.bins == 0
    assert (profile.channels(1, 'v') == fkv.Channel.EXACT).all()


def test_info_of_the_model(context):
    profile = fkv.Profile.exact(context, oracle.model('interleaved', 8, softmax_scale=0.5))
    info = profile.info
    assert info.rope_layout is fkv.RopeLayout.INTERLEAVED
    assert info.rope_dim == 8 and info.softmax_scale == 0.5


def test_default_scale(context, model):
    assert fkv.Profile.exact(context, model).info.softmax_scale == 0.25


def test_fourier(context, model, random):
    k, v = random.random(SHAPE) < 0.7, random.random(SHAPE) < 0.2
    profile = fkv.Profile.fourier(context, model, k, v, oracle.FOURIER)
    info = profile.info
    assert info.coding is fkv.Coding.FOURIER
    assert (info.bins, info.n_sink, info.n_local, info.period) == (8, 2, 16, 256)
    assert (info.k_fourier_channels, info.v_fourier_channels) == (k.sum(), v.sum())
    assert info.min_middle == 16 and info.restoration is fkv.Restoration.LEAST_SQUARES
    for layer in range(oracle.LAYERS):
        for part, mask in (('k', k), ('v', v), (fkv.Part.K, k), (1, v)):
            codes = profile.channels(layer, part)
            assert codes.dtype == numpy.uint8 and codes.shape == SHAPE[1:]
            assert ((codes == fkv.Channel.FOURIER) == mask[layer]).all()
            assert set(codes.ravel()) <= set(fkv.Channel)


def test_fourier_defaults(context, model):
    info = fkv.Profile.fourier(context, model, NONE, ~NONE).info
    assert (info.bins, info.n_sink, info.n_local, info.period) == (512, 4, 1024, 32768)
    assert info.storage_dtype is info.coefficient_dtype is fkv.DType.F16


def test_params_as_dicts(context):
    profile = fkv.Profile.fourier(
        context, {'n_layers': 2, 'n_q_heads': 4, 'n_kv_heads': 2, 'head_dim': 16}, NONE, NONE,
        {'bins': 9, 'restoration': 'authors', 'outgrow': 'error', 'min_middle': 77})
    info = profile.info
    assert info.bins == 9 and info.min_middle == 77
    assert info.restoration is fkv.Restoration.AUTHORS and info.outgrow is fkv.Outgrow.ERROR


@pytest.mark.parametrize('dtype', [bool, numpy.uint8, numpy.int64, numpy.float32])
def test_mask_types(context, model, dtype):
    mask = (numpy.arange(NONE.size).reshape(SHAPE) % 3 == 0).astype(dtype)
    profile = fkv.Profile.fourier(context, model, mask, mask.tolist(), oracle.FOURIER)
    for part in 'kv':
        assert coded(profile, 0, part) == numpy.flatnonzero(mask[0]).tolist()


def test_mask_without_order(context, model):
    mask = numpy.arange(NONE.size).reshape(SHAPE) % 5 == 0
    turned = numpy.asfortranarray(mask)
    assert not turned.flags.c_contiguous
    profile = fkv.Profile.fourier(context, model, turned, mask, oracle.FOURIER)
    assert coded(profile, 1, 'k') == coded(profile, 1, 'v') == numpy.flatnonzero(mask[1]).tolist()


@pytest.mark.parametrize('value', [2, 256, -1, 0.5, numpy.nan])
def test_mask_of_something_else(context, model, value):
    mask = NONE.astype(float)
    mask[0, 0, 0] = value
    with pytest.raises(ValueError, match='k_mask|mask'):
        fkv.Profile.fourier(context, model, mask, NONE, oracle.FOURIER)


@pytest.mark.parametrize('shape', [(2, 2), (2, 16, 2), (1, 2, 16), (64,)])
def test_mask_of_wrong_shape(context, model, shape):
    with pytest.raises(ValueError, match='v_mask has shape'):
        fkv.Profile.fourier(context, model, NONE, numpy.zeros(shape, bool), oracle.FOURIER)


@pytest.mark.parametrize('field, value, kind', [
    ('bins', 0, fkv.InvalidError), ('bins', 2**31, OverflowError), ('n_sink', 65, fkv.Error),
    ('n_local', -1, fkv.InvalidError), ('period', 1, fkv.InvalidError),
    ('period', 2**63, OverflowError), ('period', 2.5, TypeError),
    ('storage_dtype', 'f64', ValueError), ('coefficient_dtype', 'bf16', fkv.Error),
    ('outgrow', 'wrap', ValueError),
])
def test_wrong_fourier_params(context, model, field, value, kind):
    with pytest.raises(kind, match=field.split('_')[0]):
        fkv.Profile.fourier(context, model, NONE, NONE, fkv.FourierParams(**{field: value}))


@pytest.mark.parametrize('change, kind', [
    ({'n_layers': 0}, fkv.InvalidError), ({'n_q_heads': 3}, fkv.InvalidError),
    ({'head_dim': 12}, fkv.InvalidError), ({'head_dim': 264}, fkv.InvalidError),
    ({'n_layers': -1}, fkv.InvalidError), ({'n_layers': 2**31}, OverflowError),
    ({'inv_freq': [1.0]}, fkv.InvalidError), ({'inv_freq': ['a']}, ValueError),
    ({'inv_freq': 3.0}, TypeError), ({'model_id': 5}, TypeError),
    ({'model_id': 'x' * 256}, fkv.Error), ({'model_id': 'a\0b'}, ValueError),
    ({'model_id': '\ud800'}, ValueError), ({'rope_scaling': 'much'}, TypeError),
    ({'softmax_scale': float('nan')}, fkv.Error),
])
def test_wrong_model(context, change, kind):
    with pytest.raises(kind):
        fkv.Profile.exact(context, oracle.model(**change))


def test_arrays_of_numpy_in_params(context):
    model = oracle.model(inv_freq=numpy.array(oracle.frequencies(16)))
    assert (fkv.Profile.exact(context, model).dumps()
            == fkv.Profile.exact(context, oracle.model()).dumps())


@pytest.mark.parametrize('lists', [PLAIN, SPLIT], ids=['plain', 'split'])
@pytest.mark.parametrize('kind', [str, bytes, bytearray])
def test_published(context, lists, kind):
    text = json.dumps(lists)
    text = text if kind is str else kind(text.encode())
    profile = fkv.Profile.published(context, small(), text, fkv.FourierParams(bins=16))
    assert coded(profile, 0, 'k') == [0, 7, 8, 9] and coded(profile, 0, 'v') == list(range(16))
    assert coded(profile, 1, 'k') == [15] and coded(profile, 1, 'v') == []
    assert profile.info.bins == 16


def test_published_defaults(context):
    assert fkv.Profile.published(context, small(), json.dumps(PLAIN)).info.bins == 512


def test_published_fraction(context):
    profile = fkv.Profile.published(context, small(), json.dumps(PLAIN), fkv.FourierParams(), 0.5)
    assert coded(profile, 0, 'k') == [0, 9] and coded(profile, 0, 'v') == list(range(8))


@pytest.mark.parametrize('fraction', [0.0, -1.0, 1.01, float('nan')])
def test_published_fraction_out_of_range(context, fraction):
    with pytest.raises(fkv.InvalidError, match='fraction'):
        fkv.Profile.published(context, small(), json.dumps(PLAIN), fraction=fraction)


@pytest.mark.parametrize('old, new, kind, path', [
    ('[9, 0', '[9, 9', fkv.FormatError, r'Layer_0\.self_attn\.k_proj\[1\]'),
    ('[9, 0', '[16, 0', fkv.MismatchError, r'Layer_0\.self_attn\.k_proj\[0\]'),
    ('Layer_1', 'Layer_2', fkv.Error, 'Layer_'),
    ('{"Layer_1"', '{{"Layer_1"', fkv.FormatError, 'line 1'),
])
def test_published_errors_have_the_path(context, old, new, kind, path):
    text = json.dumps(PLAIN)
    assert old in text
    with pytest.raises(kind, match=path):
        fkv.Profile.published(context, small(), text.replace(old, new))


def test_round_trip_through_text(context, fourier, exact):
    for profile in (fourier, exact):
        text = profile.dumps()
        again = fkv.Profile.loads(context, text)
        assert again.dumps() == text and again.info == profile.info
        assert fkv.Profile.loads(context, text.encode()).dumps() == text
        for layer in range(oracle.LAYERS):
            for part in fkv.Part:
                assert (again.channels(layer, part) == profile.channels(layer, part)).all()


def test_text_is_json(fourier):
    value = json.loads(fourier.dumps())
    assert value['format'] == 'fkv-profile' and value['model']['n_layers'] == oracle.LAYERS


def test_names_in_any_script(context):
    profile = fkv.Profile.exact(context, oracle.model(model_id='Größe 模型'))
    assert json.loads(profile.dumps())['model']['id'] == 'Größe 模型'
    assert fkv.Profile.loads(context, profile.dumps()).dumps() == profile.dumps()


def test_round_trip_through_a_file(context, fourier, tmp_path):
    for path in (tmp_path / 'a.json', str(tmp_path / 'b ä.json'), bytes(tmp_path / 'c.json')):
        fourier.save(path)
        assert fkv.Profile.load(context, path).dumps() == fourier.dumps()
    assert (tmp_path / 'a.json').read_text() == fourier.dumps()
    fourier.save(tmp_path / 'a.json')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.json', 'b ä.json', 'c.json']


def test_files_that_cannot_be(context, exact, tmp_path):
    missing = tmp_path / 'no' / 'file.json'
    for use in (lambda: fkv.Profile.load(context, missing), lambda: exact.save(missing)):
        with pytest.raises(fkv.FileError, match='file.json') as caught:
            use()
        assert isinstance(caught.value, OSError)


def test_paths_with_a_zero(context, exact, tmp_path):
    exact.save(tmp_path / 'a')
    for use in (lambda: fkv.Profile.load(context, f'{tmp_path}/a\0b'),
                lambda: exact.save(f'{tmp_path}/c\0d')):
        with pytest.raises(ValueError, match='null'):
            use()
    assert [p.name for p in tmp_path.iterdir()] == ['a']


@pytest.mark.parametrize('path', [None, 5, object()])
def test_paths_of_wrong_type(context, path):
    with pytest.raises(TypeError):
        fkv.Profile.load(context, path)


@pytest.mark.parametrize('text', [None, 5, 2**50, [123], object()])
def test_text_of_wrong_type(context, text):
    with pytest.raises(TypeError):
        fkv.Profile.loads(context, text)
    with pytest.raises(TypeError):
        fkv.Profile.published(context, small(), text)


@pytest.mark.parametrize('old, new, kind', [
    ('"version": 1', '"version": 99', fkv.VersionError),
    ('"n_layers": 2', '"n_layers": 3', fkv.FormatError),
    ('"n_layers"', '"layers"', fkv.FormatError),
    ('fkv-profile', 'other', fkv.FormatError),
])
def test_malformed_text(context, fourier, old, new, kind):
    text = fourier.dumps()
    assert old in text
    with pytest.raises(kind):
        fkv.Profile.loads(context, text.replace(old, new, 1))


@pytest.mark.parametrize('text', ['', '[', 'null', '{}', b'\xff\xfe', '{"format": "fkv-profile"}'])
def test_no_profile(context, text):
    with pytest.raises(fkv.FormatError):
        fkv.Profile.loads(context, text)


def test_channels_out_of_range(exact):
    for layer, kind in ((-1, fkv.InvalidError), (2, fkv.InvalidError), (2**31, OverflowError),
                        (0.5, TypeError), (None, TypeError)):
        with pytest.raises(kind):
            exact.channels(layer, 'k')
    for part in ('q', 2, None):
        with pytest.raises(ValueError):
            exact.channels(0, part)


@pytest.mark.parametrize('count, period', [(0, 0), (1, 0), (63, 0), (300, 0), (300, 128),
                                           (700, 250)])
@pytest.mark.parametrize('which', ['exact', 'fourier'])
def test_estimate_is_what_a_cache_takes(request, context, random, which, count, period):
    profile = request.getfixturevalue(which)
    cache = fkv.Cache(context, profile)
    sequence = cache.sequence(period=period)
    oracle.fill(cache, sequence, random, count)
    assert profile.estimate(count, period) == cache.stats()
    if which == 'fourier' and count >= 300:
        assert cache.stats().tokens_coded > 0 and cache.stats().bytes_coefficients > 0


def test_estimate_out_of_range(exact):
    for tokens, kind in ((-1, fkv.InvalidError), (2**62, fkv.Error), (2**63, OverflowError),
                         (0.5, TypeError)):
        with pytest.raises(kind):
            exact.estimate(tokens)


@pytest.mark.parametrize('model', [None, 'llama', 5, fkv.FourierParams()])
def test_model_of_wrong_type(context, model):
    with pytest.raises((TypeError, fkv.InvalidError)):
        fkv.Profile.exact(context, model)


@pytest.mark.parametrize('context', [None, 'x', 5])
def test_context_of_wrong_type(context, model):
    for use in (lambda: fkv.Profile.exact(context, model), lambda: fkv.Profile.loads(context, '{}'),
                lambda: fkv.Profile.load(context, 'x'), lambda: fkv.Calibrator(context, model),
                lambda: fkv.Profile.fourier(context, model, NONE, NONE, oracle.FOURIER),
                lambda: fkv.Profile.published(context, model, '{}')):
        with pytest.raises(TypeError):
            use()
