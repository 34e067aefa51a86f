"""`make slurm-deps`, with a stand-in for apt-get: it never fails, and says what it did or why it could do nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "slurm_deps.sh"
BASH = shutil.which("bash")
LAST = "the Slurm tests will skip"


def run(folder: Path, *, user: int, apt: str | None) -> str:
    """On a machine with bash, `id` and perhaps this apt-get."""
    for name, body in {"id": f"echo {user}", "apt-get": apt, "systemctl": "exit 1"}.items():
        if body is not None:
            (folder / name).write_text(f"#!{BASH}\n{body}\n")
            (folder / name).chmod(0o755)
    assert BASH is not None
    done = subprocess.run([BASH, SCRIPT], env={"PATH": os.fspath(folder)}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(("user", "apt", "why"), [
    (1000, "exit 0", "only root can install packages"),
    (0, None, "there is no apt-get"),
    (0, "exit 100", "apt-get update failed"),
    (0, '[ "$1" = update ]', "apt-get install failed"),
])  # fmt: skip
def test_it_says_why_not(user, apt, why, tmp_path):
    assert run(tmp_path, user=user, apt=apt).endswith(f" missing, and {why}; {LAST}")


def test_it_installs_what_is_missing(tmp_path):
    said = run(tmp_path, user=0, apt=f'echo "$@" >> {tmp_path}/asked')
    update, install = (tmp_path / "asked").read_text().splitlines()
    assert update.startswith("update")
    assert install.startswith("install -qq -y --no-install-recommends ")
    assert "slurm-client" in install  # sbatch lies in /usr/bin, which this machine does not have
    assert "slurm-deps: installed" in said
