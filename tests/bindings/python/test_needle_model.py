# SPDX-License-Identifier: Apache-2.0
"""examples/needle_model: a tiny model is trained on this repository's documents, and what was saved is the
model for whoever loads it."""
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('safetensors')
ROOT = pathlib.Path(__file__).resolve().parents[3]
if not (ROOT / 'examples/needle_model').is_dir():
    pytest.skip('no sources here', allow_module_level=True)
sys.path.append(str(ROOT / 'examples'))

import fkv  # noqa: E402
from needle_model import collect, data, evaluate, model, train  # noqa: E402

pytestmark = pytest.mark.torch
SHIPPED = ROOT / 'examples/models/needle-13m'
TINY = {'hidden-size': 48, 'num-hidden-layers': 2, 'num-attention-heads': 4, 'num-key-value-heads': 2,
        'head-dim': 16, 'intermediate-size': 96}
STEPS = 40


def arguments(text, output, *more):
    sizes = [part for name, value in TINY.items() for part in (f'--{name}', str(value))]
    return ['--text', str(text), '--output', str(output), '--steps', str(STEPS), '--stages', '64:.5,256:.5',
            '--tokens', '1024', '--rate', '5e-3', '--warmup', '5', '--workers', '0', '--report', '1', '--device',
            'cpu', '--no-compile', *sizes, *more]


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """So small matrices are not worth more; where processors are busy, waiting for one another takes longest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp('texts')
    assert collect.main(['--folders', str(ROOT / 'docs'), '--output', str(folder), '--one-in', '5',
                         '--processes', '1']) == 0
    return folder


@pytest.fixture(scope='module')
def trained(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    return folder, train.main(arguments(texts / 'train.txt', folder))


@pytest.fixture(scope='module')
def ids():
    return torch.from_numpy(numpy.random.default_rng(3).integers(0, 256, (2, 200)))


def test_loss_falls(trained):
    losses = trained[1].losses
    assert len(losses) == STEPS
    assert 5.3 < losses[0] < 6.3  # log(320) = 5.77: nothing is known at first
    assert sum(losses[-5:]) / 5 < losses[0] - 2


def test_what_is_saved_is_the_model(trained, ids):
    folder, trainer = trained
    loaded, window = model.load(folder)
    assert window == 256
    expected = {name: weight.bfloat16().float() for name, weight in trainer.net.state_dict().items()}
    assert set(loaded.state_dict()) == set(expected)
    assert all(torch.equal(loaded.state_dict()[name], expected[name]) for name in expected)


def test_layout_is_that_of_the_shipped_model(trained):
    folder, _ = trained
    for name in ('config.json', model.INDEX):
        mine, shipped = (json.loads((where / name).read_text()) for where in (folder, SHIPPED))
        assert list(mine) == list(shipped)
    full = model.Llama(model.Config())
    shipped = json.loads((SHIPPED / model.INDEX).read_text())
    assert set(full.state_dict()) == set(shipped['weight_map'])
    assert 2 * sum(weight.numel() for weight in full.parameters()) == shipped['metadata']['total_size']
    assert model.hugging_face_config(model.Config(), 8192) == json.loads((SHIPPED / 'config.json').read_text())
    index = json.loads((folder / model.INDEX).read_text())
    assert {file.name for file in folder.glob('*.safetensors')} == set(index['weight_map'].values())
    assert len(set(index['weight_map'].values())) == 2


@pytest.mark.parametrize('which', ['trained', 'shipped'])
def test_transformers_has_the_same_logits(trained, ids, which):
    transformers = pytest.importorskip('transformers')
    folder = trained[0] if which == 'trained' else SHIPPED
    other, report = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                                      output_loading_info=True)
    assert not report['missing_keys'] and not report['unexpected_keys'], report
    mine, _ = model.load(folder)
    with torch.no_grad():
        expected, logits = other(ids).logits, mine(ids)
    assert logits.shape == (2, 200, 320)
    assert torch.allclose(logits, expected, rtol=1e-4, atol=2e-4), (logits - expected).abs().max()
    assert expected.std() > 0.1


def test_the_bindings_read_its_geometry(trained):
    params = fkv.model_params(trained[0])
    assert (params.n_layers, params.n_q_heads, params.n_kv_heads, params.head_dim) == (2, 4, 2, 16)
    speed = [500000.0 ** (-2 * j / 16) for j in range(8)]
    assert numpy.allclose(params.inv_freq, speed)
    cos, _ = model.rotations(model.Config(head_dim=16), 5)
    assert numpy.allclose(cos.numpy(), numpy.cos(numpy.outer(range(5), speed)), atol=1e-7)


def needle_program():
    """The built example program: FKV_NEEDLE, or what this checkout's build/ has."""
    path = pathlib.Path(os.environ.get('FKV_NEEDLE') or ROOT / 'build/examples/needle/fkv-needle')
    return path if os.access(path, os.X_OK) else None


@pytest.mark.skipif(not needle_program(), reason='fkv-needle is not built')
@pytest.mark.parametrize('which', ['trained', 'shipped'])
def test_fkv_needle_has_the_same_logits(trained, texts, tmp_path, which):
    folder, out = trained[0] if which == 'trained' else SHIPPED, tmp_path / 'logits'
    done = subprocess.run([str(needle_program()), '--model', str(folder), '--task', 'text', '--context', '256',
                           '--items', '1', '--text', str(texts / 'held-out.txt'), '--storage', 'f32', '--threads',
                           '1', '--logits', str(out), '--json'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    # The program asks for the 511 bytes behind the context, in the second half of the text.
    text = (texts / 'held-out.txt').read_bytes()
    seen = torch.tensor([list(text[len(text) // 2:][:256 + 511])])
    logits = torch.from_numpy(numpy.fromfile(out, numpy.float32).reshape(-1, 320))
    net, _ = model.load(folder)
    with torch.no_grad():
        expected = net(seen)[0, 255:-1]
    assert logits.shape == (511, 320)
    assert torch.allclose(logits, expected, rtol=1e-3, atol=2e-3), (logits - expected).abs().max()
    loss = torch.nn.functional.cross_entropy(expected, seen[0, 256:]).item() / math.log(2)
    assert json.loads(done.stdout.splitlines()[0])['bits_per_byte'] == pytest.approx(loss, abs=1e-3)


def test_evaluation_counts_what_is_right(trained, texts):
    """A model that knows nothing finds no number; one answer of two counts as one."""
    net, _ = model.load(trained[0])
    result = evaluate.evaluate(net.eval(), texts / 'held-out.txt', 256, [1024], 4, 4096)
    assert result['1024 bytes, 0 other keys'] == '0 of 4'
    assert 1 < result['bits per byte'] < 6

    items = [(b'abcdefgh', b' 12.'), (b'ijklmnop', b' 34.')]

    class Known(torch.nn.Module):
        """Knows the first item's answer, and the second's but for a digit."""

        def forward(self, ids):
            whole = torch.tensor([list(b'abcdefgh 12.'), list(b'ijklmnop 35.')])
            return torch.nn.functional.one_hot(whole[:, 1:], 320).float()

    assert evaluate.answers(Known(), items, torch.device('cpu')) == 1


def test_a_seed_gives_the_same_model(texts, tmp_path):
    first, again, other = (
        train.main(arguments(texts / 'train.txt', tmp_path / name, '--steps', '4', '--seed', seed))
        for name, seed in (('first', '1'), ('again', '1'), ('other', '2')))
    assert first.losses == again.losses != other.losses
    for file in ('config.json', 'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'):
        assert (tmp_path / 'first' / file).read_bytes() == (tmp_path / 'again' / file).read_bytes()


def test_batches_are_windows(texts):
    words = data.words_of(texts / 'train.txt')
    ids, weights = next(iter(data.Batches(texts / 'train.txt', words, 128, 3, [1, 0])))
    assert ids.shape == (3, 129) and ids.dtype == torch.uint8
    assert weights.shape == (3, 128) and weights.dtype == torch.float32
    with pytest.raises(ValueError, match='too few for windows'):
        next(iter(data.Batches(texts / 'held-out.txt', words, 1 << 20, 1, [1, 0])))


@pytest.mark.parametrize('stages', ['64:.5,256:.4', '8:1', 'x', '64'])
def test_stages_are_checked(stages):
    with pytest.raises((ValueError, train.argparse.ArgumentTypeError)):
        train.stages_of(stages)
    assert train.stages_of('64:.5,256:.5') == [(64, .5), (256, 1.)]


def test_rate_rises_stays_and_falls():
    args = train.make_parser().parse_args(['--text', 'x', '--output', 'y', '--rate', '1', '--warmup', '10'])
    assert [round(train.rate(args, *at), 3) for at in ((0, 0.), (4, .1), (50, .5), (90, .8), (99, 1.))] == [
        .1, .5, 1., .5, .02]
