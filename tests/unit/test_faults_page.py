"""docs/reference/faults.md names for every fault the test that makes it happen; here, that there are such tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reference" / "faults.md").read_text(encoding="utf-8")
DATA = (ROOT / "docs" / "reference" / "data-faults.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d+) \|(.*)\|$", flags=re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
WITHOUT = ("no test: ",)


def functions_in(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_row_names_a_test_or_says_why_there_is_none():
    rows = ROW.findall(PAGE)
    numbers = [int(number) for number, _ in rows]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 48
    for number, row in rows:
        shown = row.split("|")[-1]
        assert TEST.search(shown) or any(words in shown for words in WITHOUT), number


def test_every_fault_of_data_has_a_policy_and_a_test():
    rows = [row for row in DATA.splitlines() if row.startswith("| ") and not row.startswith("| event")]
    assert len(rows) >= 25
    for row in rows:
        event, policy, counter, code, shown = (cell.strip() for cell in row.strip("|").split("|"))
        assert event
        assert policy
        assert counter != ""
        assert re.fullmatch(r"-|[67]\d( or \d\d| when they are used up)?", code), row
        assert TEST.search(shown), row


@pytest.mark.parametrize("page", [PAGE, DATA], ids=["faults", "data-faults"])
def test_the_named_tests_exist(page):
    named = TEST.findall(page)
    assert named
    assert page.count("::") == len(named), "a name in another form is not checked"
    missing = [
        f"{file}::{name}"
        for file, name in sorted(set(named))
        if not name.startswith("test_") or not (ROOT / file).is_file() or name not in functions_in(ROOT / file)
    ]
    assert not missing
