"""The house check finds what it says it finds, passes over what is not prose, and its fix changes no word."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house.py")
assert spec is not None
assert spec.loader is not None
house = importlib.util.module_from_spec(spec)
sys.modules["house"] = house  # dataclasses look their module up
spec.loader.exec_module(house)

ORPHAN = '''"""A first sentence that is long enough to be wrapped by whoever wrote it, which left the last word on a line of
its own."""


class A:
    x: int
    """A field's docstring counts too, and it says that v = (x - x_t) / (1 - t) where the line would end, or w = (a -
    b)."""
'''
SOUND = '''"""Title.

Args:
    x: a description that goes on for so long that it has to be wrapped somewhere in the middle of the next
        line.

    a table    of two columns
    a          b

- a list item
- three more words

`B` is said in a sentence that is wrapped with care, so that its end is not left alone on the line that
comes after it, alone.

E experts:
    indented
"""

x = """not a docstring
at all"""
'''


def problems(tmp_path: Path, name: str, text: str) -> list[str]:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    return [str(problem) for problem in house.check(tmp_path)]


def test_orphans_are_found_and_wrapped(tmp_path: Path) -> None:
    said = problems(tmp_path, "a.py", ORPHAN)
    assert [line.partition(":")[2].partition(":")[0] for line in said] == ["2", "8"]
    assert house.fix(tmp_path) == [Path("a.py")]
    new = (tmp_path / "a.py").read_text()
    assert house.check(tmp_path) == []
    assert new.split() == ORPHAN.split()
    assert "v = (x - x_t) / (1 - t)" in new
    assert "w = (a - b)" in new
    assert max(map(len, new.splitlines())) <= house.WIDTH
    assert house.fix(tmp_path) == []


def test_long_lines_are_wrapped_but_left_to_ruff_to_report(tmp_path: Path) -> None:
    long = '"""' + "A sentence of six words stands. " * 6 + 'The end."""\n'
    assert problems(tmp_path, "a.py", long) == []
    assert house.fix(tmp_path) == [Path("a.py")]
    new = (tmp_path / "a.py").read_text()
    assert max(map(len, new.splitlines())) <= house.WIDTH
    assert new.split() == long.split()


def test_what_is_not_prose_stays(tmp_path: Path) -> None:
    assert problems(tmp_path, "a.py", SOUND) == []
    assert house.fix(tmp_path) == []
    assert (tmp_path / "a.py").read_text() == SOUND


def test_long_files(tmp_path: Path) -> None:
    assert problems(tmp_path, "a.py", "x = 1\n" * 400) == []
    assert problems(tmp_path, "a.py", "x = 1\n" * 401) == ["a.py:401: 401 lines; at most 400, one idea a file"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("import megatron.core", "imports megatron, whose home is ecdit_train/parallel/tensor_parallel.py"),
        ("from webdataset import TarWriter", "imports webdataset, whose home is data_pipeline/preparing/tarring.py"),
        ("import astropy", "imports astropy, whose home is a file of its own"),
    ],
)
def test_vendors_stay_at_home(line: str, says: str, tmp_path: Path) -> None:
    """Also where the import hides in a function; tests may import what they compare with."""
    inside = f"import json\nimport torch\nfrom . import b\nfrom launch import render\n\n\ndef f():\n    {line}\n"
    assert problems(tmp_path, "tests/a.py", inside) == []
    (said,) = problems(tmp_path, "ecdit_train/a.py", inside)
    assert said.startswith(f"ecdit_train/a.py:8: {says} ")
    home = house.VENDORS.get(line.split()[1].partition(".")[0], ())
    (tmp_path / "ecdit_train" / "a.py").unlink()
    for path in home:
        assert problems(tmp_path, path, inside) == []


def test_the_table_is_about_this_code() -> None:
    """No entry outlives its import: a file that no longer imports a vendor is no home of it."""
    for vendor, homes in house.VENDORS.items():
        for home in homes:
            tree = ast.parse((ROOT / home).read_text())
            names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
            names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            assert vendor in {name.partition(".")[0] for name in names}, (vendor, home)


def test_ruff_reads_every_file():
    """Its own list of exclusions has names of folders that we use."""
    git = ["git", "-C", str(ROOT), "ls-files", "*.py"]
    ours = subprocess.run(git, capture_output=True, text=True, check=False)
    if ours.returncode:
        pytest.skip("no checkout")
    seen = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--show-files", str(ROOT)], capture_output=True, text=True, check=True
    )
    read = {Path(line).resolve() for line in seen.stdout.split()}
    assert {(ROOT / name).resolve() for name in ours.stdout.split()} <= read
