"""Sources of every form, written once."""

from pathlib import Path

import pytest
from preparing_forms import WRITERS


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("forms")
    for name, write in WRITERS.items():
        write(folder / name)
    return {name: folder / name for name in WRITERS}
