# SPDX-License-Identifier: Apache-2.0
"""The Python programs in the documentation run, each in a process and a folder of its own."""
import re
import subprocess
import sys

import layouts
import pytest

PROGRAM = re.compile(r'^```python\n(.*?)^```', re.S | re.M)
DOCUMENTS = sorted(layouts.ROOT.glob('*.md')) + sorted(layouts.ROOT.glob('docs/*.md'))
PROGRAMS = [pytest.param(program, id=f'{path.name}-{number}',
                         marks=[pytest.mark.torch] if 'import transformers' in program else [])
            for path in DOCUMENTS
            for number, program in enumerate(PROGRAM.findall(path.read_text(encoding='utf-8')), 1)]


def test_there_are_programs():
    assert len(PROGRAMS) >= 4


@pytest.mark.parametrize('program', PROGRAMS)
def test_program_runs(program, tmp_path):
    if 'import transformers' in program:
        pytest.importorskip('transformers')
        import fkv.transformers  # which knows what a cache is called in this version
        program = re.sub(r'\bcache=', f'{fkv.transformers.CACHE_NAME}=', program)
    for name in ('README.md', 'examples'):  # programs may read these
        (tmp_path / name).symlink_to(layouts.ROOT / name)
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout and ('transformers' in program or not done.stderr), done.stderr


@pytest.mark.torch
def test_notebook_runs(tmp_path):
    pytest.importorskip('transformers')
    done = subprocess.run([sys.executable, str(layouts.ROOT / 'examples/hf_notebook.py')], cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'calibrated-12x' in done.stdout
