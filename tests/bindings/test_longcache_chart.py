# SPDX-License-Identifier: Apache-2.0
"""The chart of examples/longcache.sh: what it counts from the answers, and what it says without any."""
import importlib.util
import json
import subprocess
import sys

import layouts
import pytest

PROGRAM = layouts.ROOT / 'examples/longcache_chart.py'


@pytest.fixture
def chart():
    pytest.importorskip('matplotlib')
    spec = importlib.util.spec_from_file_location('longcache_chart', PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_answers(folder, name, answers):
    lines = [{'depth': depth, 'right': right} for depth, right in answers] + [{'summary': True}]
    (folder / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')


def test_counts_by_length_and_depth(chart, tmp_path):
    write_answers(tmp_path, 'alone-coded-8192', [(0.0, True), (0.1, False), (0.55, True), (1.0, True)])
    write_answers(tmp_path, 'alone-coded-65536', [(0.2, False)])
    write_answers(tmp_path, 'among-coded-8192', [(0.9, False)])
    assert chart.read(tmp_path, 'alone-coded') == {
        8192: [[1, 2], [0, 0], [1, 1], [0, 0], [1, 1]],
        65536: [[0, 0], [0, 1], [0, 0], [0, 0], [0, 0]],
    }
    assert chart.read(tmp_path, 'alone-exact') == {}


def test_draws_what_was_run(chart, tmp_path):
    write_answers(tmp_path, 'among-plain-16384', [(0.5, False)])
    chart.main(tmp_path, tmp_path / 'chart.png')
    assert (tmp_path / 'chart.png').read_bytes().startswith(b'\x89PNG')


def test_says_what_to_run_when_there_are_no_answers(tmp_path):
    pytest.importorskip('matplotlib')
    done = subprocess.run([sys.executable, PROGRAM, tmp_path, tmp_path / 'chart.png'],
                          stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert 'run examples/longcache.sh' in done.stderr
    assert not (tmp_path / 'chart.png').exists()
