# SPDX-License-Identifier: Apache-2.0
"""python -m fkv eval with models: caches of all methods, against direct formulas; answers that are taken up again."""
import json
import math
import random

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
import fkv  # noqa: E402
import transformers  # noqa: E402
from fkv.__main__ import main  # noqa: E402
from fkv.eval import baselines, capture, methods, names, run, stores, tasks, tokens  # noqa: E402
from fkv.transformers._geometry import rotate  # noqa: E402

import hf  # noqa: E402

pytestmark = pytest.mark.torch
WORDS = [f'{a}{b}ing' for a in ('walk', 'talk', 'mend', 'sort', 'find', 'hold', 'turn', 'read', 'sing', 'wait')
         for b in 'abcdefghijklmno']


def prose(words=2500):
    dice = random.Random(1)
    return ' '.join(dice.choice(WORDS) + ('.\n' if dice.random() < .1 else '') for _ in range(words))


def ids(count, seed=3):
    return hf.prompt(count, seed=seed)[0].tolist()


def method(reader, text, **settings):
    return methods.make([names.parse(text)], reader, methods.Settings(**settings))[0]


@pytest.fixture
def reader():
    return capture.Reader(hf.small(), threads=1)


# ---- the pass over the context, and exact caches

MODELS = [pytest.param(lambda f=family: hf.small(f), id=family) for family in hf.FAMILIES]


@pytest.mark.parametrize('make', [*MODELS, pytest.param(hf.mixed, id='mixed')])
def test_exact_caches_continue_as_the_framework(make):
    model = make()
    context, question, answer = ids(150), ids(9, 4), ids(12, 5)
    every = context + question + answer
    expected = hf.last_logits(model, torch.tensor([every]))[0, len(context) + len(question) - 1:-1]
    reader = capture.Reader(model, threads=1)
    read = reader.read(context)
    exact = fkv.Profile.exact(reader.settings.context, reader.params, 'f32')
    held = method(reader, 'full')
    for each in (held, method(reader, 'int8')):
        if each is not held:
            each.profile = lambda: exact
        cache, size = each.hold(read)
        logits = reader.follow(cache, question, answer)
        assert torch.allclose(logits, expected, atol=2e-4), (logits - expected).abs().max()
        again, _ = each.hold(read)  # a context serves any number of caches
        said = reader.generate(again, question, 5, frozenset())
        assert said[0] == int(expected[0].argmax()) and len(said) == 5
    dense = reader.dense_bytes(len(context))
    assert held.hold(read)[1] == dense == 4 * len(context) * len(reader.geometry.layers) * 2 * 16


def test_generation_ends(reader):
    read = reader.read(ids(60))
    said = reader.generate(method(reader, 'full').hold(read)[0], ids(3), 6, frozenset())
    cut = reader.generate(method(reader, 'full').hold(read)[0], ids(3), 6, frozenset([said[2]]))
    assert cut == said[:said.index(said[2])]


@pytest.mark.parametrize('queries', [1, 4, 30])
def test_attention(queries):
    torch.manual_seed(1)
    q, k, v = torch.randn(4, queries, 8), torch.randn(2, 30, 8), torch.randn(2, 30, 8)
    out = stores.attend(q, k, v, .3)
    for head in range(4):
        for i in range(queries):
            seen = 30 - queries + i + 1
            p = (k[head // 2, :seen] @ q[head, i] * .3).softmax(0)
            assert torch.allclose(out[head, i], p @ v[head // 2, :seen], atol=1e-5)


def test_keys_are_captured_before_rope(reader):
    read = reader.read(ids(40))
    rope = stores.Rope(reader.params, 'cpu', torch.float32)
    turned = rope.turn(read.keys[1], 0)
    assert torch.allclose(rope.turn(turned, 0, -1), read.keys[1], atol=1e-5)
    assert not torch.allclose(turned, read.keys[1], atol=1e-2)
    dynamic = transformers.DynamicCache()
    reader.call(ids(40), dynamic, 1)
    assert torch.allclose(dynamic.layers[1].keys[0], turned, atol=1e-4)
    assert torch.allclose(dynamic.layers[1].values[0], read.values[1], atol=1e-4)


# ---- methods

def test_uniform_caches_are_libfkvs(reader):
    read = reader.read(ids(400))
    cache, size = method(reader, 'int4', sinks=2, local=64).hold(read)
    stats = cache.stats()
    assert stats.bytes == size and stats.tokens == 400 and stats.tokens_coded == 256
    errors = []
    for bits in (2, 4, 8):
        held = method(reader, f'int{bits}', sinks=2, local=64).hold(read)[0].store.rows[0].read(1)[1]
        errors.append((torch.from_numpy(held).transpose(0, 1) - read.values[1]).abs().mean().item())
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


@pytest.mark.parametrize('along', [1, 2])
@pytest.mark.parametrize('bits', [1, 2, 4])
def test_quantisation_of_kivi(along, bits):
    torch.manual_seed(2)
    x = torch.randn(2, 40, 24) * 3
    out, groups = baselines.quantized(x, bits, 16, along)
    lines = x.movedim(along, -1).reshape(-1, x.shape[along]).double()
    expected, n = [], 0
    for line in lines.tolist():
        back = []
        for at in range(0, len(line), 16):
            part, n = line[at:at + 16], n + 1
            low, high = min(part), max(part)
            step = (high - low) / (2 ** bits - 1)
            back += [low + step * round((value - low) / step) for value in part]
        expected.append(back)
    assert groups == n
    got = out.movedim(along, -1).reshape(-1, x.shape[along]).double()
    step = (lines.amax(1) - lines.amin(1)).max().item() / (2 ** bits - 1)
    wrong = (got - torch.tensor(expected)).abs() > .01  # beyond f16 of scale and zero
    assert wrong.double().mean() < .01 and (got - lines).abs().max() <= .51 * step + .02


def test_kivi(reader):
    read = reader.read(ids(200))
    store = baselines.kivi(reader, read, 2, 64, 4, 32)
    middle = 200 - 36
    keys = store.rope.turn(read.keys[0], 0)
    assert torch.equal(store.keys[0][:, :4], keys[:, :4]) and torch.equal(store.keys[0][:, -32:], keys[:, -32:])
    assert torch.equal(store.values[2][:, -32:], read.values[2][:, -32:])
    assert len(store.keys[0][0, 4:68, 5].unique()) <= 4 and len(store.values[1][1, 9].unique()) <= 4
    groups = 2 * 16 * math.ceil(middle / 64) + 2 * middle  # of a layer: keys per channel, values per token
    assert store.bytes() == 3 * (2 * 2 * 2 * 16 * 36 + 2 * 2 * 16 * middle * 2 // 8 + 4 * groups)
    assert not torch.equal(read.values[2], store.values[2])  # what was captured is as it was


def test_streamingllm(reader):
    pytest.importorskip('kvpress')
    read = reader.read(ids(200))
    cache, size = method(reader, 'streamingllm', sinks=4, local=28).hold(read)
    rope = stores.Rope(reader.params, 'cpu', torch.float32)
    for layer, (keys, values) in enumerate(zip(read.keys, read.values)):
        for held, whole in ((cache.store.keys[layer], rope.turn(keys, 0)), (cache.store.values[layer], values)):
            expected = torch.cat((whole[:, :4], whole[:, -28:]), 1)
            assert torch.equal(held.sort(1).values, expected.sort(1).values)
    assert size == 3 * 2 * 2 * 16 * 32 * 2 and cache.store.columns == 200
    logits = reader.follow(cache, ids(3), ids(2))
    assert logits.shape == (2, hf.VOCABULARY) and logits.isfinite().all()


@pytest.mark.parametrize('family', ['Llama', 'Qwen3'])
def test_snapkv(family):
    pytest.importorskip('kvpress')
    reader = capture.Reader(hf.small(family), threads=1)
    queries = {}
    read = reader.read(ids(200), lambda layer, q, k, v: queries.setdefault(layer, q))
    cache, size = method(reader, 'snapkv:0.5').hold(read)
    assert size == 3 * 2 * 2 * 16 * 100 * 2
    rope = stores.Rope(reader.params, 'cpu', torch.float32)
    for layer in range(3):
        q, k = rope.turn(queries[layer], 0)[:, -64:], rope.turn(read.keys[layer], 0)
        for head in range(2):
            score = torch.zeros(136)
            for query_head in (2 * head, 2 * head + 1):
                s = q[query_head] @ k[head].T / 4
                s += torch.full((64, 200), -math.inf).triu(137)
                score += s.softmax(-1)[:, :136].mean(0)
            padded = torch.cat((torch.zeros(2), score, torch.zeros(2)))
            pooled = torch.stack([padded[i:i + 5].sum() for i in range(136)])
            kept = sorted(pooled.topk(36).indices.tolist()) + list(range(136, 200))
            expected, got = k[head, kept], cache.store.keys[layer][head]
            same = {tuple(x) for x in expected.tolist()} & {tuple(x) for x in got.tolist()}
            assert len(same) >= 99, len(same)  # two scores may be alike but for rounding


def test_kvpress_may_come_before_and_after():
    """It wraps all attention functions that it finds, and passes dropout by place."""
    pytest.importorskip('kvpress').attention_patch.patch_attention_functions()
    model = hf.small()
    plain = hf.last_logits(model, torch.tensor([ids(60)]))[0, -1]
    for _ in range(2):
        reader = capture.Reader(model, threads=1)
        cache, _ = method(reader, 'full').hold(reader.read(ids(60)[:-1]))
        assert torch.allclose(reader.call(ids(60)[-1:], cache, 1)[0], plain, atol=1e-4)


@pytest.mark.parametrize('name', ['fourier:16', 'fourier-published:16'])
def test_fourier_is_calibrated_once(reader, tmp_path, name):
    asked = []

    def calibration(length):
        asked.append(length)
        return [ids(length, seed) for seed in (7, 8)]

    settings = dict(calibration=calibration, folder=tmp_path, local=64, room=20)
    first = method(reader, name, **settings)
    first.prepare(300)
    cache, size = first.hold(reader.read(ids(300)))
    first.prepare(300)
    first.hold(reader.read(ids(300)))
    assert asked == [300] and size < reader.dense_bytes(300)
    profile = first.profile()
    assert profile.info.bins == 16 and profile.info.period == 320
    assert (profile.info.restoration == fkv.Restoration.AUTHORS) == ('published' in name)
    assert profile.info.k_fourier_channels > 0
    again = method(reader, name, **settings)
    again.prepare(300)
    assert again.profile().dumps() == profile.dumps() and asked == [300]
    again.prepare(400)
    again.profile()
    assert asked == [300, 400]



@pytest.mark.parametrize('tokens_, period', [(1, 64), (65, 72), (127, 128), (8193, 8640)])
def test_periods(tokens_, period):
    assert methods.period_for(tokens_) == period


def test_profiles_of_other_models_are_refused(reader, tmp_path):
    params = fkv.ModelParams(n_layers=2, n_q_heads=4, n_kv_heads=2, head_dim=16)
    fkv.Profile.exact(reader.settings.context, params, 'f16').save(tmp_path / 'other.json')
    with pytest.raises(fkv.Error, match='layers'):
        method(reader, f'fkv:{tmp_path}/other.json')


# ---- the whole

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model of bytes that knows nothing, and a text."""
    path = tmp_path_factory.mktemp('model')
    hf.small(vocab_size=256, bos_token_id=None, eos_token_id=None, pad_token_id=None).save_pretrained(path)
    (path / 'text.txt').write_text(prose())
    return path


def evaluate(folder, output, *more):
    return main(['eval', '--model', str(folder), '--tokens', 'bytes', '--text', str(folder / 'text.txt'), '--context',
                 '600,900', '--items', '2', '--dtype', 'float32', '--threads', '1', '--output', str(output), *more])


def test_everything(capsys, folder, tmp_path):
    assert evaluate(folder, tmp_path, '--methods', 'full,int4,kivi,fourier:8', '--calibrate', '1') == 0
    out, err = capsys.readouterr()
    assert 'method' in out.splitlines()[0] and out.count('\n| ') == 5 and '100/100' in err
    rows = [json.loads(line) for line in (tmp_path / run.ANSWERS).read_text().splitlines()]
    assert len(rows) == 5 * 2 * 2 * 4 and {row['task'] for row in rows} == set(tasks.TASKS)
    assert {row['dense'] / row['bytes'] for row in rows if row['method'] == 'full'} == {1.0}
    assert all(row['score'] > 1 for row in rows if row['task'] == 'ppl')
    cells = json.loads((tmp_path / 'table.json').read_text())
    assert len(cells) == 40 and (tmp_path / 'table.csv').read_text().count('\n') == 41
    assert (tmp_path / 'table.md').read_text().startswith('| method')
    for name in ('quality.png', 'niah.png', 'multikey.png'):
        assert (tmp_path / name).exists() == bool(_matplotlib())


def _matplotlib():
    try:
        import matplotlib
    except ImportError:
        return None
    return matplotlib


def test_answers_are_taken_up_again(capsys, folder, tmp_path, monkeypatch):
    reads = []
    plain = capture.Reader.read

    def read(self, ids, watch=None):
        reads.append(len(ids))
        if len(reads) == 3:
            raise ValueError('stopped')
        return plain(self, ids, watch)

    monkeypatch.setattr(capture.Reader, 'read', read)
    options = '--tasks', 'copy', '--methods', 'full,int4', '--json'
    assert evaluate(folder, tmp_path, *options) == 1
    part = json.loads(capsys.readouterr().out)
    assert [cell['items'] for cell in part] == [1, 1, 1, 1]
    file = tmp_path / run.ANSWERS
    before = file.read_text()
    file.write_text(before[:-20])  # as if the machine had stopped in the middle of a line
    reads[:] = []
    monkeypatch.setattr(capture.Reader, 'read', lambda self, ids, watch=None: reads.append(1) or plain(self, ids))
    assert evaluate(folder, tmp_path, *options) == 0
    assert len(reads) == 3 and [cell['items'] for cell in json.loads(capsys.readouterr().out)] == [2, 2, 2, 2]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 8 == len({(row['length'], row['index'], row['method']) for row in lines})

    def scores(line):
        return {key: value for key, value in json.loads(line).items() if key != 'seconds'}

    assert [scores(line) for line in before.splitlines()] == [scores(json.dumps(row)) for row in lines[:4]]
    reads[:] = []
    assert evaluate(folder, tmp_path, *options) == 0 and not reads
    capsys.readouterr()
    assert evaluate(folder, tmp_path, *options, '--seed', '5') == 1
    assert 'another seed' in capsys.readouterr().err
    (tmp_path / run.SETTINGS).unlink()
    assert evaluate(folder, tmp_path, *options) == 1 and 'choose another --output' in capsys.readouterr().err


def test_files_of_others(capsys, folder, tmp_path):
    text = prose(60)
    ruler = tmp_path / 'niah_single_1.jsonl'
    ruler.write_text(''.join(json.dumps(dict(index=0, input=text + end + '\nWhat is it?', outputs=['x', 'y'])) + '\n'
                             for end in ('', 'longer')))
    bench = tmp_path / 'hotpotqa.jsonl'
    bench.write_text(''.join(json.dumps(dict(input='Who?', context=text * n, answers=['me'], dataset='hotpotqa')) + '\n'
                             for n in (1, 9)))
    assert main(['eval', '--model', str(folder), '--tokens', 'bytes', '--data', str(ruler), str(bench), '--methods',
                 'full,int2', '--output', str(tmp_path / 'out'), '--json', '--quiet']) == 0
    cells = json.loads(capsys.readouterr().out)
    assert [(cell['task'], cell['method'], cell['items'], cell['metric']) for cell in cells] == [
        (task, name, n, metric) for name in ('full', 'int2')
        for task, n, metric in (('niah_single_1', 2, 'all'), ('hotpotqa', 2, 'f1'))]
    rows = [json.loads(line) for line in (tmp_path / 'out' / run.ANSWERS).read_text().splitlines()]
    assert max(row['tokens'] for row in rows) < 2048  # the model's window: the middle was left out


def test_a_tokenizer_of_its_own(capsys, folder, tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    t = tokens.load('tokenizer', str(tmp_path))
    assert t.decode(t.encode(' a\nb é')) == ' a\nb é' and t.prefix == [] and t.size(t.encode('é')) == 2
    assert t.begins_word(t.encode(' ')[0]) and t.begins_word(t.encode('\n')[0]) and not t.begins_word(t.encode('a')[0])
    item = tasks.make(tasks.Source(prose(), t), 'multikey', 1000, 0, 1)
    assert len(item.context) + len(item.question) == 1000
    with pytest.raises(ValueError, match='--tokens bytes'):
        tokens.load('tokenizer', str(folder))


def test_the_shipped_model_finds_keys():
    """All from one pass over 3000 bytes: exact and calibrated caches find the key, and less than the sinks does not."""
    reader = capture.Reader(hf.needle(), threads=1)
    text = '\n'.join((hf.ROOT / f'docs/{name}.md').read_text() for name in ('codec', 'calibration', 'numerics'))
    source = tasks.Source(text.encode('ascii', 'ignore').decode(), tokens.Bytes())
    made = methods.make(names.parse_all(['full', 'int4', f'fkv:{hf.NEEDLE}/calibrated-12x.json']), reader,
                        methods.Settings())
    answers = run.Answers(None, {})
    run.evaluate(reader, source.tokens, tasks.items(source, 'multikey', 3000, 2), made, answers, quiet=True)
    assert [row['score'] for row in answers.rows] == [1.0] * 6
    assert answers.rows[2]['dense'] / answers.rows[2]['bytes'] > 6
