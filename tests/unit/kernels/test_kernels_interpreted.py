"""Triton's kernels run here on a CPU, program by program, in a process of their own: TRITON_INTERPRET is read when triton is first
imported, and would change how every other test runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ecdit_train.kernels import language

HERE = Path(__file__).parent


@pytest.mark.skipif(not language.HERE, reason="Triton is not installed (pip install 'ecdit[kernels]')")
@pytest.mark.parametrize("name", sorted(p.stem for p in HERE.glob("interpreted_*.py")))
def test_kernels_equal_their_twins(name):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / f"{name}.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 2
    assert "skipped" not in done.stdout
