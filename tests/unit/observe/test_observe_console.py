"""A terminal gets a bar, a log file one plain line per log step."""

from __future__ import annotations

import io

import pytest

from ecdit_train.observe.console import Progress, duration

RECORD = {
    "train/loss": 0.12341,
    "optim/lr": 3e-4,
    "optim/grad_norm": 0.518,
    "perf/images_per_s": 812.4,
    "perf/step_s": 0.146,
    "data/stall_frac": 0.012,
}


def test_plain_line() -> None:
    out = io.StringIO()
    progress = Progress(1500, stream=out)
    progress.update(120, RECORD)
    progress.message("saved [step 120]")
    progress.close()
    assert out.getvalue() == (
        "step 120/1500  loss 0.1234  lr 3.0e-04  norm 0.52  812 img/s  data 1.2%  ETA 03:21\nsaved [step 120]\n"
    )


def test_what_is_missing_is_left_out() -> None:
    out = io.StringIO()
    Progress(10, stream=out).update(1, {"train/loss": 1.0, "optim/lr": None})
    assert out.getvalue() == "step 1/10  loss 1.0000\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    out = Terminal()
    progress = Progress(1500, stream=out)
    progress.update(120, RECORD)
    progress.message("saved [step 120]")
    progress.update(130, RECORD)
    progress.close()
    progress.close()
    text = out.getvalue()
    assert "saved [step 120]" in text
    assert "130/1500" in text
    assert "812 img/s" in text


def test_no_stream_is_silent() -> None:
    progress = Progress(10, stream=None)
    progress.update(1, RECORD)
    progress.message("x")
    progress.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00"), (201.3, "03:21"), (14601, "4:03:21"), (187401, "2d 04:03:21")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
