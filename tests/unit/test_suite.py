"""The test suite itself: what nobody runs proves nothing."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_no_folder_of_tests_is_left_out(request):
    """pytest never looks into folders whose names match `norecursedirs`; its own list has `dist`."""
    left_out = request.config.getini("norecursedirs")
    folders = {path.parent for path in TESTS.rglob("test_*.py")}
    assert TESTS / "dist" in folders
    for folder in folders:
        for name in folder.relative_to(TESTS).parts:
            assert not any(fnmatch(name, pattern) for pattern in left_out), folder
