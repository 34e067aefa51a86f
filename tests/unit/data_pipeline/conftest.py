"""A small shapes set, made once: 8 shards of 50 samples at 16 pixels. Tests that damage files take a copy."""

import shutil
from pathlib import Path

import pytest

from data_pipeline.manifest import View, open_view
from data_pipeline.shapes.make import make_shapes


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, count=400, resolution=16, seed=5, samples_per_shard=50)
    return folder


@pytest.fixture
def shapes_view(shapes_folder: Path) -> View:
    return open_view(shapes_folder)


@pytest.fixture
def copied_folder(shapes_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shapes_folder, tmp_path / "copy"))
