# SPDX-License-Identifier: Apache-2.0
"""python -m fkv."""
import json
import os
import struct
import subprocess
import sys

import fkv
import pytest
from fkv.__main__ import main

import oracle

#: A module that is found before matplotlib and cannot be imported.
NO_MATPLOTLIB = 'raise ImportError("not here")\n'


def call(*arguments, folder=None, **environment):
    return subprocess.run([sys.executable, '-m', 'fkv', *map(str, arguments)], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120, cwd=folder,
                          env={**os.environ, **environment})


def run(capsys, *arguments):
    """main() in this process: (exit code, standard output, standard error)."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    return (code, *capsys.readouterr())


@pytest.fixture
def profile(fourier, tmp_path):
    path = tmp_path / 'profile.json'
    fourier.save(path)
    return path


@pytest.fixture
def published(tmp_path):
    """Lists for llama-3.2-1b: 16 layers, 8 heads of 64."""
    path = tmp_path / 'published.json'
    path.write_text(json.dumps({f'Layer_{layer}': {
        'self_attn.k_proj': list(range(0, 512, 2)),
        'self_attn.v_proj': list(range(layer))} for layer in range(16)}))
    return path


def test_info_in_a_process(tmp_path):
    done = call('info', folder=tmp_path)
    assert done.returncode == 0 and done.stderr == ''
    facts = dict(line.split(':', 1) for line in done.stdout.splitlines())
    assert facts['libfkv'].strip() == fkv.version() and 'cpu' in facts['backends']


def test_info_as_json(capsys):
    code, out, err = run(capsys, 'info', '--json')
    facts = json.loads(out)
    assert (code, err) == (0, '')
    assert facts['ABI'] == fkv.abi_version() and facts['threads'] >= 1
    assert os.path.samefile(facts['package'], os.path.dirname(fkv.__file__))
    with fkv.Context() as context:
        assert facts['CPU level'] == context.info.cpu_level.name.lower()
    assert os.path.exists(facts['library'])


def test_show(capsys, profile, fourier):
    code, out, err = run(capsys, 'profile', 'show', profile)
    assert (code, err) == (0, '')
    lines = out.splitlines()
    assert lines[0].startswith('fourier profile: 2 layers, 4 query heads, 2 KV heads of 16')
    assert '8 bins, period 256, 2 sinks, 16 local tokens' in lines[1]
    for layer, line in enumerate(lines[-oracle.LAYERS:]):
        shares = [100 * (fourier.channels(layer, part)[head] == fkv.Channel.EXACT).mean()
                  for part in 'kv' for head in range(oracle.KV_HEADS)]
        assert line.split() == [str(layer)] + [f'{share:.0f}' for share in shares]


def test_show_exact(capsys, exact, tmp_path):
    exact.save(tmp_path / 'exact.json')
    code, out, _ = run(capsys, 'profile', 'show', tmp_path / 'exact.json')
    assert code == 0 and 'exact profile' in out and 'f32 storage' in out
    assert out.splitlines()[-1].split() == ['1'] + ['100'] * 4


def test_show_as_json(capsys, profile, fourier):
    code, out, err = run(capsys, 'profile', 'show', profile, '--json')
    value = json.loads(out)
    assert (code, err) == (0, '')
    shares = value['kept']
    for part in 'kv':
        expected = [[(heads == fkv.Channel.EXACT).mean() for heads in fourier.channels(layer, part)]
                    for layer in range(oracle.LAYERS)]
        assert shares[part] == expected


def test_show_as_png(capsys, profile, tmp_path):
    pytest.importorskip('matplotlib')
    picture = tmp_path / 'map.png'
    code, out, err = run(capsys, 'profile', 'show', profile, '--png', picture)
    assert (code, err) == (0, '') and f'wrote {picture}' in out
    data = picture.read_bytes()
    assert data[:8] == b'\x89PNG\r\n\x1a\n' and data[-8:-4] == b'IEND'
    width, height = struct.unpack('>II', data[16:24])
    assert 600 <= width <= 3000 and 300 <= height <= 3000 and len(data) > 5000


def test_png_shows_the_shares(context, model, tmp_path):
    """All kept is another picture than all compressed."""
    pytest.importorskip('matplotlib')
    image = pytest.importorskip('matplotlib.image')
    import numpy
    from fkv.plot import profile_heat_map
    pictures = []
    for value in (False, True):
        mask = numpy.full((2, 2, 16), value)
        profile_heat_map(fkv.Profile.fourier(context, model, mask, mask), tmp_path / 'a.png')
        pictures.append(image.imread(tmp_path / 'a.png'))
    a, b = pictures
    assert a.shape == b.shape and (a != b).any(axis=-1).mean() > 0.3


def test_png_without_matplotlib(profile, tmp_path):
    """In a process where importing it fails."""
    (tmp_path / 'matplotlib.py').write_text(NO_MATPLOTLIB)
    picture = tmp_path / 'map.png'
    done = call('profile', 'show', profile, '--png', picture, folder=tmp_path,
                PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and not picture.exists() and done.stdout == ''
    assert done.stderr.splitlines() == ["fkv: pictures need matplotlib: pip install 'fkv[plot]'"]
    assert call('profile', 'show', profile, folder=tmp_path,
                PYTHONPATH=str(tmp_path)).returncode == 0


def test_png_to_a_missing_folder(capsys, profile, tmp_path):
    pytest.importorskip('matplotlib')
    check_error(run(capsys, 'profile', 'show', profile, '--png', tmp_path / 'no' / 'map.png'), 'no')


def test_import(capsys, published, tmp_path, context):
    target = tmp_path / 'out.json'
    code, out, err = run(capsys, 'profile', 'import', published, '--model', 'llama-3.2-1b', '-o',
                         target, '--bins', 64, '--period', 4096, '--sinks', 3, '--local', 100)
    assert (code, err) == (0, '') and f'wrote {target} ({target.stat().st_size} bytes)' in out
    profile = fkv.Profile.load(context, target)
    info = profile.info
    assert (info.bins, info.period, info.n_sink, info.n_local) == (64, 4096, 3, 100)
    assert info.k_fourier_channels == 16 * 256 and info.v_fourier_channels == sum(range(16))
    assert (profile.channels(5, 'v').ravel()[:5] == fkv.Channel.FOURIER).all()
    assert json.loads(target.read_text())['model']['id'] == 'llama-3.2-1b'
    expected = fkv.Profile.published(context, fkv.model_params('llama-3.2-1b'),
                                     published.read_bytes(),
                                     dict(bins=64, period=4096, n_sink=3, n_local=100))
    assert target.read_text() == expected.dumps()


def test_import_with_defaults_and_a_fraction(capsys, published, tmp_path, context):
    code, _, _ = run(capsys, 'profile', 'import', published, '--model', 'llama-3.2-1b',
                     '--output', tmp_path / 'out.json', '--fraction', '0.5')
    info = fkv.Profile.load(context, tmp_path / 'out.json').info
    assert code == 0 and info.k_fourier_channels == 16 * 128 and info.bins == 512


def test_import_for_a_configuration(capsys, tmp_path, context):
    folder = tmp_path / 'tiny'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps({
        'num_hidden_layers': 1, 'num_attention_heads': 2, 'hidden_size': 16}))
    lists = tmp_path / 'lists.json'
    lists.write_text('{"Layer_0": {"self_attn.k_proj": [3], "self_attn.v_proj": []}}')
    code, _, err = run(capsys, 'profile', 'import', lists, '--model', folder, '-o',
                       tmp_path / 'out.json')
    assert (code, err) == (0, '')
    assert fkv.Profile.load(context, tmp_path / 'out.json').info.k_fourier_channels == 1


def test_stats(capsys, profile, fourier):
    code, out, err = run(capsys, 'stats', profile, '--tokens', '100,5000')
    assert (code, err) == (0, '')
    rows = [line.split() for line in out.splitlines()[-2:]]
    for row, tokens in zip(rows, (100, 5000)):
        stats = fourier.estimate(tokens)
        assert row[0] == str(tokens) and row[-1] == f'{stats.ratio:.2f}x'
        assert row[-2] == f'{stats.dense_bytes / 2**20:.2f}'
        assert row[-3] == f'{stats.bytes / 2**20:.2f}'


def test_stats_as_json(capsys, profile, fourier):
    code, out, _ = run(capsys, 'stats', profile, '--json', '--tokens', '7,3000', '--period', '640')
    rows = json.loads(out)
    assert code == 0 and [row['tokens'] for row in rows] == [7, 3000]
    for row in rows:
        stats = fourier.estimate(row['tokens'], 640)
        assert all(getattr(stats, name) == value for name, value in row.items())
        assert {'bytes', 'dense_bytes', 'ratio'} <= set(row)


def test_stats_have_default_lengths(capsys, profile):
    _, out, _ = run(capsys, 'stats', profile, '--json')
    assert [row['tokens'] for row in json.loads(out)] == [4096, 8192, 32768, 131072]


def check_error(result, *words):
    code, out, err = result
    assert code == 1 and out == ''
    (line,) = err.splitlines()
    assert line.startswith('fkv: ') and 'Traceback' not in line
    for word in words:
        assert word in line


def test_error_in_a_process(tmp_path):
    done = call('profile', 'show', tmp_path / 'missing.json', folder=tmp_path)
    check_error((done.returncode, done.stdout, done.stderr), 'missing.json')


@pytest.mark.parametrize('command', [('profile', 'show'), ('stats',)])
def test_bad_files(capsys, tmp_path, command):
    path = tmp_path / 'bad.json'
    check_error(run(capsys, *command, path), 'bad.json')
    for text in ('', '{', '[]', '{"format": "fkv-profile", "version": 9}'):
        path.write_text(text)
        check_error(run(capsys, *command, path))
    check_error(run(capsys, *command, tmp_path))


def test_bad_imports(capsys, published, tmp_path):
    target = tmp_path / 'out.json'

    def imported(file=published, model='llama-3.2-1b', output=target, *more):
        return run(capsys, 'profile', 'import', file, '--model', model, '-o', output, *more)

    check_error(imported(model='llama-9'), 'llama-9', 'llama-3.1-8b')
    check_error(imported(model='llama-3.1-8b'), 'Layer_')
    check_error(imported(file=tmp_path / 'missing.json'), 'missing.json')
    check_error(imported(output=tmp_path / 'no' / 'out.json'), 'out.json')
    check_error(imported(published, 'llama-3.2-1b', target, '--fraction', '2'), 'fraction')
    check_error(imported(published, 'llama-3.2-1b', target, '--bins', '0'), 'bins')
    check_error(imported(published, 'llama-3.2-1b', target, '--bins', 2**40), 'bins')
    config = tmp_path / 'config.json'
    for text in ('{', '[]', '{}', '{"num_hidden_layers": "x", "num_attention_heads": []}'):
        config.write_text(text)
        check_error(imported(model=config))
    (tmp_path / 'bad.json').write_text('{"Layer_0": 5}')
    check_error(imported(file=tmp_path / 'bad.json'), 'Layer_')
    assert not target.exists()


@pytest.mark.parametrize('tokens', ['-1', '1,-5', str(2**63), str(2**62)])
def test_bad_lengths(capsys, profile, tokens):
    check_error(run(capsys, 'stats', profile, f'--tokens={tokens}'))


@pytest.mark.parametrize('arguments', [(), ('nothing',), ('profile',), ('profile', 'show'),
                                       ('stats', 'x', '--tokens', 'many'), ('info', '--what'),
                                       ('profile', 'import', 'x')])
def test_usage(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == '' and 'usage: python -m fkv' in err


@pytest.mark.parametrize('arguments, words', [
    ((), ('info', 'profile', 'stats')), (('profile',), ('show', 'import')),
    (('info',), ('--json',)), (('profile', 'show'), ('--png', '--json')),
    (('profile', 'import'), ('--model', '--fraction', '--output', 'llama-3.1-8b')),
    (('stats',), ('--tokens', '--period', '--json'))])
def test_help(capsys, arguments, words):
    code, out, err = run(capsys, *arguments, '--help')
    assert code == 0 and err == '' and 'usage: python -m fkv' in out
    assert all(word in out for word in words)


def test_closed_pipe():
    """`python -m fkv profile show FILE | head -0` leaves no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, '-m', 'fkv', 'info'], stdout=writer,
                          stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert 'Traceback' not in done.stderr and done.returncode != 0
