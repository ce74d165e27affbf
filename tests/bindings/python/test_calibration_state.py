# SPDX-License-Identifier: Apache-2.0
"""fkv.calibrate in bounded memory, and going on after it was stopped."""
import json
import re
import signal
import subprocess
import sys
import time

import fkv
import numpy
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
from fkv import calibration  # noqa: E402

import hf  # noqa: E402

pytestmark = pytest.mark.torch
WINDOW, WINDOWS = 400, 5


def texts(seed=7, windows=WINDOWS):
    return [numpy.random.default_rng(seed).integers(1, hf.EOS, WINDOW * windows).tolist()]


def gather(model, context, given=None, **options):
    with calibration.gather(model, given or texts(), context=context, window=WINDOW, **options) as calibrator:
        return calibrator.dumps()


# ---- memory

@pytest.mark.parametrize('family', hf.FAMILIES)
@pytest.mark.parametrize('options', [{}, {'labels': 'both'}], ids=['text', 'both'])
def test_layers_computed_again_give_the_same(context, family, options):
    model = hf.small(family)
    assert gather(model, context, **options) == gather(model, context, recompute=False, **options)
    assert not any('forward' in module.__dict__ for module in model.modules())
    assert hf.last_logits(model, hf.prompt(5)).isfinite().all()


@pytest.mark.parametrize('options', [{}, {'gradients': False}, {'labels': 'both'}], ids=['text', 'none', 'both'])
def test_logits_in_parts_give_the_same(monkeypatch, context, options):
    model = hf.small()
    params = fkv.model_params(model.config)

    def sensitivities():
        with fkv.calibration.Calibrator.loads(context, gather(model, context, **options), params) as calibrator:
            return [calibrator.statistic(layer, part, 'sensitivity') for layer in range(3) for part in 'kv']

    whole, calls = sensitivities(), []
    plain = calibration._loss
    monkeypatch.setattr(calibration, 'LOGITS', 97 * 64)
    monkeypatch.setattr(calibration, '_loss', lambda *args: calls.append(len(args[0])) or plain(*args))
    for one, other in zip(whole, sensitivities()):
        assert abs(one - other).max() <= 1e-5 * abs(one).max()
    assert max(calls) == 64 and sum(calls) == WINDOWS * (WINDOW - 1)


def test_logits_that_the_model_scales(monkeypatch, context):
    """What a model does to its logits is done to parts of them too."""
    monkeypatch.setattr(calibration, 'LOGITS', 97 * 64)
    model = hf.small('Granite', logits_scaling=3.)
    parts = gather(model, context)
    monkeypatch.setattr(calibration, '_body', lambda model: None)
    whole = gather(model, context)
    params = fkv.model_params(model.config)
    with fkv.calibration.Calibrator.loads(context, parts, params) as a, \
            fkv.calibration.Calibrator.loads(context, whole, params) as b:
        one, other = (x.statistic(1, 'v', 'sensitivity') for x in (a, b))
    assert abs(one - other).max() <= 1e-5 * abs(one).max()


MEASURE = '''
import sys, json, pathlib
sys.path.insert(0, {folder!r})
import fkv, hf, test_calibration_state as t
from fkv import calibration
model = hf.small(layers=24, intermediate_size=1024)
with fkv.Context(threads=1) as context:
    def peak(tokens):
        calibration.gather(model, [hf.prompt(2 * tokens)[0].tolist()], context=context, window=tokens,
                           progress=False, recompute={recompute})
        text = pathlib.Path('/proc/self/status').read_text()
        return int(text.split('VmHWM:')[1].split()[0])
    few = peak(256)
    print((peak(2048) - few) / 1024)
'''


def test_memory_does_not_grow_with_the_layers():
    grown = []
    for recompute in (True, False):
        code = MEASURE.format(folder=str(hf.ROOT / 'tests/bindings/python'), recompute=recompute)
        done = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, check=True)
        grown.append(float(done.stdout))
    # Of each layer four arrays of [2048, 1024] floats, 8 MiB each, and smaller ones.
    assert grown[1] > 24 * 4 * 8 * .8 and grown[0] < .4 * grown[1], grown


def test_windows_are_read_as_far_as_needed():
    def forever():
        while True:
            yield list(range(30))

    windows = calibration.windows_of(forever(), None, 20, 4)
    assert [ids.tolist() for ids, _ in windows] == [
        [x % 30 for x in range(a, a + 20)] for a in range(0, 80, 20)]
    weighted = ([1, 2, 3], [0, 1, 1])
    assert calibration.windows_of([weighted, range(9)], None, 6)[0] is weighted
    assert [len(ids) for ids, _ in calibration.windows_of([range(15)], None, 6)] == [6, 6, 3]
    assert len(calibration.windows_of([range(14)], None, 6)) == 2
    with pytest.raises(TypeError, match='tokenizer'):
        calibration.windows_of(['text'], None, 6)


# ---- going on

class Stop(Exception):
    pass


def stop_in_window(monkeypatch, number):
    """The process ends, so to speak, in the midst of a window."""
    real, count = calibration.observe, [0]

    def observe(calibrator, *args, **kwargs):
        count[0] += 1
        real(calibrator, *args, **kwargs)
        if count[0] == number:
            raise Stop
    monkeypatch.setattr(calibration, 'observe', observe)
    return lambda: monkeypatch.setattr(calibration, 'observe', real)


@pytest.mark.parametrize('options', [{}, {'labels': 'model'}, {'gradients': False}],
                         ids=['text', 'model', 'none'])
def test_goes_on_where_it_stopped(monkeypatch, context, tmp_path, capsys, options):
    model, state = hf.small(), tmp_path / 'state'
    whole = gather(model, context, **options)
    again = stop_in_window(monkeypatch, 3)
    with pytest.raises(Stop):
        gather(model, context, state=state, **options)
    again()
    assert json.loads(state.read_text())['done'] == 2
    seen = []
    real = calibration.observe
    monkeypatch.setattr(calibration, 'observe', lambda *args, **more: seen.append(args[2]) or real(*args, **more))
    assert gather(model, context, state=state, progress=True, **options) == whole
    assert len(seen) == 3
    said = capsys.readouterr().err
    assert '2 of 5 windows were done before' in said and re.search(r'5/5, loss \d+\.\d+, \d+ s', said)
    # What is complete is not computed again.
    assert gather(model, context, state=state, **options) == whole and len(seen) == 3
    assert [path.name for path in tmp_path.iterdir()] == ['state']


def test_more_windows_go_on_too(context, tmp_path):
    model, state = hf.small(), tmp_path / 'state'
    gather(model, context, state=state, max_windows=2)
    assert gather(model, context, state=state) == gather(model, context)
    before = state.read_bytes()
    with pytest.raises(ValueError, match='has seen 5 windows, more than the 2'):
        gather(model, context, state=state, max_windows=2)
    assert state.read_bytes() == before


def test_the_profile_is_the_same(monkeypatch, context, tmp_path):
    model = hf.small(layers=2)
    options = dict(target=4, tokens=2048, window=WINDOW, context=context)
    fkv.calibrate(model, texts(), **options)[0].save(tmp_path / 'whole')
    again = stop_in_window(monkeypatch, 4)
    with pytest.raises(Stop):
        fkv.calibrate(model, texts(), state=tmp_path / 'state', **options)
    again()
    fkv.calibrate(model, texts(), state=tmp_path / 'state', **options)[0].save(tmp_path / 'parts')
    assert (tmp_path / 'whole').read_bytes() == (tmp_path / 'parts').read_bytes()


@pytest.mark.parametrize('change, text', [
    (dict(model=dict(seed=2)), 'another model'),
    (dict(model=dict(layers=2)), 'another model'),
    (dict(given=texts(8)), 'other texts'),
    (dict(given=[(texts()[0][:WINDOW], [.5] * WINDOW)] * WINDOWS), 'other texts'),
    (dict(labels='both'), "labels was 'text', now 'both'"),
    (dict(gradients=False), 'gradients was True, now False'),
    (dict(seed=4), 'seed was 0, now 4'),
    (dict(codec=fkv.CodecParams(n_local=64)), 'codec.n_local was 128, now 64'),
    (dict(params=fkv.model_params(hf.small().config, 'small')), "geometry.model_id was None, now 'small'")], ids=lambda x: x if isinstance(x, str) else '')
def test_of_something_else(context, tmp_path, change, text):
    state = tmp_path / 'state'
    gather(hf.small(), context, state=state, max_windows=2)
    before = state.read_bytes()
    options = dict(change)
    with pytest.raises(ValueError, match=text) as caught:
        gather(hf.small(**options.pop('model', {})), context, state=state, **options)
    assert str(state) in str(caught.value) and state.read_bytes() == before


def damaged(content):
    return content.replace(b'"done": 2', b'"done": 1')


def cut(content):
    return content[:-20]


def foreign(content):
    return b'{"format": "fkv profile"}'


def newer(content):
    return content.replace(b'"version": 1,', b'"version": 2,')


@pytest.mark.parametrize('spoil, text', [(damaged, 'checksum'), (cut, 'no state of a calibration'),
                                         (foreign, 'no state of a calibration'), (newer, 'version 2')])
def test_files_that_are_none(context, tmp_path, spoil, text):
    state = tmp_path / 'state'
    gather(hf.small(), context, state=state, max_windows=2)
    content = spoil(state.read_bytes())
    state.write_bytes(content)
    with pytest.raises(ValueError, match=text):
        gather(hf.small(), context, state=state)
    assert state.read_bytes() == content


def test_folder_that_is_not_there(monkeypatch, context, tmp_path):
    monkeypatch.setattr(calibration, 'observe', lambda *args, **more: pytest.fail('work before the error'))
    with pytest.raises(OSError, match='nowhere'):
        gather(hf.small(), context, state=tmp_path / 'nowhere/state')
    with pytest.raises(OSError):
        gather(hf.small(), context, state=tmp_path)


# ---- the command

def command(tmp_path, name, *more):
    text = tmp_path / 'text'
    text.write_bytes((hf.ROOT / 'include/fkv/fkv.h').read_bytes()[:8 * 512])
    return [sys.executable, '-m', 'fkv', 'calibrate', '--model', str(hf.NEEDLE), '--tokens', 'bytes',
            '--text', str(text), '--window', '512', '--dtype', 'float32', '-o', str(tmp_path / name), *more]


def test_killed(tmp_path):
    """SIGKILL, whenever it may come."""
    subprocess.run(command(tmp_path, 'whole', '--quiet'), check=True)
    state = tmp_path / 'state'
    process = subprocess.Popen(command(tmp_path, 'parts', '--state', str(state)), stderr=subprocess.PIPE)
    until = time.monotonic() + 300
    while not state.exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = json.loads(state.read_text())['done']
    assert process.returncode == -signal.SIGKILL and 1 <= done < 8 and not (tmp_path / 'parts').exists()
    finished = subprocess.run(command(tmp_path, 'parts', '--state', str(state)), check=True,
                              stderr=subprocess.PIPE, text=True)
    assert f'{done} of 8 windows were done before' in finished.stderr
    assert (tmp_path / 'whole').read_bytes() == (tmp_path / 'parts').read_bytes()


def test_mistakes_in_the_command(tmp_path):
    other = tmp_path / 'other'
    other.write_text('notes of mine')
    done = subprocess.run(command(tmp_path, 'parts', '--state', str(other)), stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and 'no state of a calibration' in done.stderr
    assert 'Traceback' not in done.stderr and other.read_text() == 'notes of mine'
    done = subprocess.run(command(tmp_path, 'no/where'), stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and 'is no folder' in done.stderr
