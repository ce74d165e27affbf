# SPDX-License-Identifier: Apache-2.0
"""Items, metrics, files, names, bytes and tables of python -m fkv eval: all that needs no torch."""
import csv
import io
import json
import math
import random
import sys

import pytest
from fkv.__main__ import main
from fkv.eval import charts, count, files, metrics, names, report, tasks, tokens

WORDS = [f'{a}{b}ing' for a in ('walk', 'talk', 'mend', 'sort', 'find', 'hold', 'turn', 'read', 'sing', 'wait')
         for b in 'abcdefghijklmno']


@pytest.fixture(scope='module')
def text():
    dice = random.Random(1)
    return ' '.join(dice.choice(WORDS) + ('.\n' if dice.random() < .1 else '') for _ in range(6000))


@pytest.fixture(scope='module')
def source(text):
    return tasks.Source(text, tokens.Bytes(), 3)


# ---- metrics

def test_matches():
    assert metrics.match_all('It is Red and blue', ['red', 'BLUE', 'green', '5']) == .5
    assert metrics.match_part('It is red', ['green', 'RED']) == 1 and metrics.match_part('no', ['yes']) == 0
    assert metrics.begins(' 123. And', [' 123.']) == 1 and metrics.begins(' 1234.', [' 123.']) == 0


@pytest.mark.parametrize('answer, references, expected', [
    ('The quick, brown fox!', ['a quick brown fox'], 1.0),
    ('quick fox', ['quick brown fox'], 2 * 1 * (2 / 3) / (1 + 2 / 3)),
    ('red red', ['red'], 2 * .5 * 1 / 1.5), ('cat', ['dog', 'cat'], 1.0), ('', ['x'], 0.0), ('the', ['the'], 0.0)])
def test_f1(answer, references, expected):
    assert metrics.f1(answer, references) == pytest.approx(expected)


# ---- tokens

def test_bytes():
    t = tokens.Bytes()
    assert t.decode(t.encode('grün - ok')) == 'grün - ok' and len(t.encode('ü')) == 2
    assert t.decode([65, 300, 66]) == 'A?B' and t.size([1, 2]) == 2
    assert t.begins_word(32) and t.begins_word(10) and not t.begins_word(65)


# ---- items

@pytest.mark.parametrize('task', tasks.TASKS)
@pytest.mark.parametrize('length', [1500, 4096])
def test_items_have_their_length(source, task, length):
    made = tasks.items(source, task, length, 3)
    assert made == tasks.items(source, task, length, 3)
    assert len({item.key for item in made}) == 3 and made[0].context != made[1].context
    for item in made:
        given = 1 if task == 'ppl' else 0
        assert len(item.context) + len(item.question) - given == length
        assert item.metric in (*metrics.METRICS, 'tokens', 'bits') and bool(item.answer) != bool(item.max_new)


def test_other_seeds_are_other_items(text, source):
    other = tasks.Source(text, tokens.Bytes(), 4)
    assert tasks.make(other, 'niah', 2000, 0, 1) != tasks.make(source, 'niah', 2000, 0, 1)


@pytest.mark.parametrize('task, keys', [('niah', 1), ('multikey', 30)])
def test_needles(source, task, keys):
    t = source.tokens
    for item in tasks.items(source, task, 4096, 5):
        said, asked = t.decode(item.context), t.decode(item.question)
        assert said.count('special magic numbers for') == keys
        key = asked.split('number for ')[1].split(' mentioned')[0]
        assert said.count(f'for {key} is:{item.references[0]}\n') == 1
        place = said.index(f'numbers for {key} is') / len(said)
        assert abs(place - item.depth) < .25 if keys == 1 else 0 < place < 1
        assert said.startswith('A special magic number') and said.endswith('\n')
        assert len(item.references[0]) == 9 and item.max_new >= 9


def test_needles_are_between_words(source):
    said = source.tokens.decode(tasks.make(source, 'multikey', 4096, 0, 1).context)
    for piece in said.split('\nOne of the special magic numbers')[1:]:
        after = piece.split('.\n', 1)[1]
        assert after[:1] in (' ', '\n', ''), after[:20]


def test_chains(source):
    item = tasks.make(source, 'vt', 4096, 0, 1)
    said, asked = source.tokens.decode(item.context), source.tokens.decode(item.question)
    value = asked.split('variables are ')[1].split(',')[0]
    is_ = dict(line.split('VAR ', 1)[1].split(' = ') for line in said.split('\n') if line.startswith('VAR '))
    assert len(is_) == 2 * tasks.CHAIN

    def follow(name):
        return follow(is_[name][4:]) if is_[name].startswith('VAR ') else is_[name]

    assert {name for name in is_ if follow(name) == value} == set(item.references)
    assert metrics.match_all(' ' + ', VAR '.join(item.references), item.references) == 1


def test_copies(source):
    item = tasks.make(source, 'copy', 3000, 0, 1)
    said, passage = source.tokens.decode(item.context), source.tokens.decode(item.answer)
    tag = source.tokens.decode(item.question).removeprefix('<repeat ').removesuffix('>')
    assert len(passage) == 160 and '\n' not in passage and said.count(f'<note {tag}>{passage}</note>') == 1


def test_plain_text_goes_on(source):
    item = tasks.make(source, 'ppl', 2000, 1, 3)
    whole = source.tokens.decode(item.context + item.question + item.answer)
    assert whole in source.text and len(item.answer) == tasks.TEXT_TOKENS - 1


def test_calibration_is_of_another_half(source, text):
    assert source.calibration + source.text == text and abs(len(source.text) - len(text) / 2) < 30
    for task in tasks.TASKS:
        said = source.tokens.decode(tasks.make(source, task, 2000, 0, 1).context)
        longest = max(said.split('\n'), key=len)
        assert longest in source.text + source.text


def test_short_texts_go_in_a_circle():
    short = ' '.join(WORDS)
    ids = tasks.Source(short, tokens.Bytes()).hay(random.Random(1), 3 * len(short))
    assert len(ids) == 3 * len(short)


def test_impossible_items(source):
    with pytest.raises(ValueError, match='too short for niah'):
        tasks.make(source, 'niah', 300, 0, 1)
    with pytest.raises(ValueError, match='too short for copy'):
        tasks.make(source, 'copy', 100, 0, 1)
    with pytest.raises(ValueError, match='different words'):
        tasks.Source('too few words', tokens.Bytes())


# ---- files

def lines(path, *records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def test_ruler(tmp_path):
    t = tokens.Bytes()
    record = dict(index=0, input='Some text.\nMore text.\nWhat is it? It is', outputs=['5', '7'], length=40)
    folder = tmp_path / 'niah_multivalue'
    folder.mkdir()
    (item,) = files.read(lines(folder / 'validation.jsonl', record), t)
    assert (item.task, item.metric, item.references) == ('niah_multivalue', 'all', ['5', '7'])
    assert t.decode(item.context) == 'Some text.\nMore text.\n' and t.decode(item.question) == 'What is it? It is'
    assert item.length == len(record['input']) and item.max_new == 128
    qa = dict(record, outputs=['yes'], answer_prefix=' Answer:')
    (item,) = files.read(lines(tmp_path / 'qa_1.jsonl', qa), t)
    assert (item.task, item.metric, item.max_new) == ('qa_1', 'part', 32)
    assert t.decode(item.question) == 'What is it? It is Answer:'


def test_longbench(tmp_path):
    t = tokens.Bytes()
    record = dict(input='Who?', context='It was me.', answers=['me', 'I'], dataset='hotpotqa', length=3, _id='x',
                  language='en', all_classes=None)
    made = files.read(lines(tmp_path / 'hotpotqa.jsonl', record, record, dict(record, dataset='qasper_e')), t)
    assert [(item.task, item.index, item.max_new) for item in made] == [
        ('hotpotqa', 0, 32), ('hotpotqa', 1, 32), ('qasper_e', 2, 128)]
    assert made[0].metric == 'f1' and t.decode(made[0].context) == 'It was me.'
    assert t.decode(made[0].question) == '\n\nQuestion: Who?\nAnswer:' and made[0].references == ['me', 'I']
    assert len(files.read(tmp_path / 'hotpotqa.jsonl', t, limit=2)) == 2


@pytest.mark.parametrize('content, words', [
    ('{"input": 5, "outputs": ["x"]}', 'input must be a text'), ('{', 'line 1'), ('[1]', 'no JSON object'),
    ('{"input": "a\\nb", "outputs": []}', 'outputs must be'), ('{"what": 1}', 'neither of RULER'),
    ('', 'no items'), ('{"input": "one line", "outputs": ["x"]}', 'one line'),
    ('{"input": "a", "context": "b", "answers": ["c"], "dataset": "gov_report"}', 'gov_report is not measured by F1')])
def test_bad_files(tmp_path, content, words):
    (tmp_path / 'bad.jsonl').write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        files.read(tmp_path / 'bad.jsonl', tokens.Bytes())
    assert 'bad.jsonl' in str(error.value)


def test_long_contexts_lose_their_middle():
    item = tasks.Item('hotpotqa', 0, 0, list(range(100)), [1, 2, 3], max_new=7)
    assert files.shorten(item, 50).context == list(range(20)) + list(range(80, 100))
    assert files.shorten(item, 1000).context[-1] == 99
    with pytest.raises(ValueError, match='longer than 10 tokens'):
        files.shorten(item, 10)


# ---- names and bytes

def test_names():
    made = names.parse_all(['full', 'int4', 'fkv:a/b-12x.json', 'snapkv', 'snapkv:0.5', 'fourier:64', 'kivi', 'full'])
    assert [str(name) for name in made] == ['full', 'int4', 'b-12x', 'snapkv', 'snapkv:0.5', 'fourier:64', 'kivi']
    assert made[2].file == 'a/b-12x.json' and made[3].value == .25 and made[5].value == 64


@pytest.mark.parametrize('text', ['', 'int5', 'int4:3', 'fkv', 'fkv:', 'full:1', 'snapkv:2', 'snapkv:x', 'kivi:9',
                                  'fourier:0', 'fourier:', 'h2o', 'nan', 'snapkv:nan'])
def test_bad_names(text):
    with pytest.raises(ValueError):
        names.parse(text)


def test_names_must_differ():
    with pytest.raises(ValueError, match='same name'):
        names.parse_all(['fkv:a/x.json', 'fkv:b/x.json'])


def test_bytes_are_counted():
    account = count.Account(exact=10)
    count.coded(account, 100, 3, 2)
    assert account.bytes() == 20 + 38 + 8
    assert count.Account(allocated=77).bytes() == 77
    assert count.dense(8, 2, 64, 8192) == 2 * 8 * 2 * 64 * 8192 * 2


# ---- tables

def row(method, score, task='copy', index=0, size=50, metric='begins', **more):
    return dict(task=task, length=4096, index=index, method=method, metric=metric, score=score, bytes=size, dense=100,
                **more)


def test_cells():
    rows = [row('full', 1, size=100), row('full', 0, index=1, size=100), row('int4', 1), row('int4', 1, index=1)]
    full, other = report.summarize(rows)
    assert (full.method, full.score, full.items, full.ratio) == ('full', .5, 2, 1) and other.ratio == 2
    assert full.error == pytest.approx(math.sqrt(.5 / 2)) and other.error == 0
    assert [cell.method for cell in report.summarize(rows, ['int4', 'full'])] == ['int4', 'full']


def test_changes_are_of_the_same_items():
    rows = [row('full', 1.0, metric='bits'), row('full', 2.0, metric='bits', index=1),
            row('int2', 1.1, metric='bits'), row('int2', 2.6, metric='bits', index=1),
            row('int2', 9.9, metric='bits', index=2)]
    other = report.summarize(rows)[1]
    assert other.change == pytest.approx(20) and other.change_error == pytest.approx(10)


def test_table():
    rows = [row('full', 1, size=100), row('int4', 0), row('full', .9, 'ppl', metric='bits', size=100),
            row('int4', .99, 'ppl', metric='bits', size=20)]
    lines_ = report.table(report.summarize(rows)).splitlines()
    assert [part.strip() for part in lines_[0].split('|')[1:-1]] == ['method', 'ratio', 'copy 4096 (1)',
                                                                     'ppl 4096 (1)']
    assert [part.strip() for part in lines_[3].split('|')[1:-1]] == ['int4', '2.00-5.00', '0.00',
                                                                     '0.9900 (+10.0 %)']
    assert len({len(line) for line in lines_}) == 1
    back = list(csv.DictReader(io.StringIO(report.as_csv(report.summarize(rows)))))
    assert back[3]['method'] == 'int4' and float(back[3]['ratio']) == 5 and back[3]['error'] == ''
    assert report.as_dicts(report.summarize(rows))[0]['score'] == 1


def test_items_of_files_are_taken_together():
    rows = [dict(row('full', score, 'vt', metric='all', index=score, given=True), length=100 + score)
            for score in (1, 0)]
    (cell,) = report.summarize(rows)
    assert cell.items == 2 and cell.length == 0 and 'vt (2)' in report.table([cell])


def test_needle_grid():
    rows = [row('full', score, 'niah', index=i, depth=depth)
            for i, (depth, score) in enumerate([(.1, 1), (.2, 0), (.9, 1)])]
    lengths, grid = charts.needle_grid(rows, 'niah', 'full', 3)
    assert lengths == [4096] and grid[0] == [.5] and math.isnan(grid[1][0]) and grid[2] == [1]


def test_pictures(tmp_path):
    pytest.importorskip('matplotlib')
    rows = [dict(row(method, score, 'niah', index=i, depth=(i + .5) / 4), length=length)
            for length in (1024, 2048) for i in range(4) for method, score in (('full', 1), ('int2', i % 2))]
    charts.needle_map(rows, 'niah', ['full', 'int2'], tmp_path / 'map.png')
    rows += [row('full', 1.0, 'ppl', metric='bits'), row('int2', 1.2, 'ppl', metric='bits')]
    charts.quality_chart(report.summarize(rows), tmp_path / 'quality.png')
    for name in ('map.png', 'quality.png'):
        assert (tmp_path / name).read_bytes()[:4] == b'\x89PNG' and (tmp_path / name).stat().st_size > 10000


# ---- the command line, before anything is loaded

@pytest.fixture
def text_file(tmp_path, text):
    path = tmp_path / 'text.txt'
    path.write_text(text)
    return path


@pytest.mark.parametrize('more, words', [
    (['--methods', 'h2o'], "'h2o' is no method"), (['--tasks', 'sums'], "'sums' is no task"),
    (['--context', 'long'], 'numbers of tokens'), (['--context', '0'], 'at least 1'),
    (['--items', 'many'], '--items many'), (['--items', 'copy=0'], 'copy=0'), (['--items', 'x=1'], 'x=1'),
    (['--profile', 'nowhere.json'], 'nowhere.json: no such profile'), (['--local', '0'], '--local'),
    (['--threads', '0'], '--threads'), (['--methods', 'fkv:'], 'fkv:FILE')])
def test_wrong_options(capsys, text_file, more, words):
    assert main(['eval', '--model', 'nowhere', '--text', str(text_file), *more]) == 1
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('fkv: ') and words in err and len(err.splitlines()) == 1


def test_nothing_to_ask(capsys):
    assert main(['eval', '--model', 'nowhere']) == 1
    assert 'nothing to ask' in capsys.readouterr().err
    assert main(['eval', '--model', 'nowhere', '--data', 'x', '--methods', 'fourier']) == 1
    assert 'calibrated on a text' in capsys.readouterr().err
    assert main(['eval', '--model', 'nowhere', '--text', '/nowhere/text']) == 1
    assert '/nowhere/text' in capsys.readouterr().err


def test_without_transformers(capsys, text_file, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    assert main(['eval', '--model', 'nowhere', '--text', str(text_file)]) == 1
    assert "pip install 'fkv[eval]'" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['eval', '--help'])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(word in out for word in ('--methods', 'snapkv', '--data', '--output'))
