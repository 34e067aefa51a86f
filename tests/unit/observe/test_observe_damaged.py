"""A report of a run whose files somebody, or a disk, has damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from observe_demo_run import build

from ecdit_train.observe.report import write_report
from ecdit_train.observe.serve import LiveRun


def hit(path: Path) -> None:
    """Three bytes of the compressed counts."""
    data = bytearray(path.read_bytes())
    at = data.index(b"counts.npy") + 60
    data[at : at + 3] = b"\xff\x00\xff"
    path.write_bytes(data)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and the report of it."""
    run = build(tmp_path_factory.mktemp("sound") / "run", steps=300, grids=2)
    write_report(run)
    return run


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("evaluation/shapes_00000100.json", '{"a": NaN, "b": Infinity}'),
        ("allocation/step_00000100.json", '{"kinds": [], "layers": 3}'),
        ("samples/step_00000300.json", '{"prompts": null}'),
        ("resolved.yaml", "train: [1]\n"),
        (
            "metrics/0001.jsonl",
            '{"step": 1, "time": "noon", "train/loss": 1e308}\n{"step": 2, "time": [], "train/loss": -1e308}\n',
        ),
        ("metrics/0001.jsonl", '{"step": 1, "train/loss": 1' + "0" * 400 + "}\n"),
        ("routing", None),
    ],
)
def test_one_damaged_file_takes_no_other_part_away(sound: Path, tmp_path: Path, file: str, content: str | None) -> None:
    run = Path(shutil.copytree(sound, tmp_path / "run"))
    whole = (run / "report.html").read_text()
    (run / "report.html").unlink()
    if content is None:
        hit(next((run / file).glob("step_*.npz")))
    else:
        (run / file).parent.mkdir(exist_ok=True)
        (run / file).write_text(content)
    text = write_report(run).read_text()
    for part in ("learning", "configuration"):
        assert f'id="{part}"' in text
    assert len(text) > len(whole) / 20
    live = LiveRun(run)
    assert "<!doctype html>" in live.page()
    assert json.dumps(live.update({}), allow_nan=False)
