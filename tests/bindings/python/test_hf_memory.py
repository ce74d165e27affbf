# SPDX-License-Identifier: Apache-2.0
"""The memory of the process, as tests/bindings/hf_cost.py measures it, at a length that a test can wait for."""
import re
import subprocess
import sys

import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')

import hf  # noqa: E402

pytestmark = pytest.mark.torch


def test_the_process_grows_less():
    script = hf.ROOT / 'tests/bindings/hf_cost.py'
    done = subprocess.run([sys.executable, script, 'memory', '--tokens', '8192'], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    dense = float(re.search(r'values are (\S+) MB', done.stdout).group(1))
    framework, ours = map(float, re.findall(r'generating \S+ \(\+(\S+)\)', done.stdout))
    ratio = float(re.search(r'counts (\S+)x', done.stdout).group(1))
    # Some megabytes of either are the allocator's: at this length the cache itself is hardly more.
    assert ratio > 12 and framework - ours > .9 * dense * (1 - 1 / ratio) and ours < .4 * dense, done.stdout
