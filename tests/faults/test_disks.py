"""Disks that are full, read-only, failing, slow or gone, at everything a run writes: training goes on where it can, ends with
exit code 87 where it cannot, and what was committed stays."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faulty_disk import FULL, FaultyDisk
from tiny_runs import assert_same, configure, live, records, steady, words

from ecdit_train import checkpoint
from ecdit_train.checkpoint import restore
from ecdit_train.errors import StorageError
from ecdit_train.observe import journal
from ecdit_train.run_folder import CHECKPOINTS
from ecdit_train.supervise import lease

STEPS = 14
WORDS = (
    f"train.steps={STEPS}",
    *("checkpoint.every_steps=2", "checkpoint.keep=9", "optim.schedule=constant", "data.on_bad=substitute"),
    *("data.max_bad=0.5", "observe.sample_every=2", "observe.prompts=[a red circle]", "watch.lease=2"),
)
ERRORS = [
    *(errno.ENOSPC, errno.EIO),
    *(pytest.param(error, marks=pytest.mark.faults) for error in (errno.EDQUOT, errno.EROFS, errno.ESTALE)),
]


@pytest.fixture(scope="module")
def spoilt_shards(tiny_shards, tmp_path_factory):
    """With one image in ten that cannot be read, so that there is a quarantine to write."""
    shards = shutil.copytree(tiny_shards, tmp_path_factory.mktemp("spoilt") / "shards")
    for tar in sorted(shards.glob("*.tar")):
        data, start = bytearray(tar.read_bytes()), 0
        for number in range(40):
            start = data.find(b"\x89PNG", start + 1)
            if number % 10 == 3:
                data[start + 60 : start + 70] = bytes(10)
        tar.write_bytes(data)
    return shards


@pytest.fixture(scope="module")
def calm(spoilt_shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("calm")
    return run, live(configure(run, spoilt_shards, *WORDS))


@pytest.fixture
def quick(monkeypatch):
    """Tries again sooner, so that an outage can last steps instead of minutes."""
    monkeypatch.setattr(journal, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(lease, "PAUSES", (0.01, None))


def outage(disk: FaultyDisk, *, error: int | None, delay: float = 0.0, first: int, last: int = 10**9):
    """For `live(before=...)`: the disk is as said while steps `first` to `last` are at work."""

    def meddle(trainer):
        step = trainer._step

        def changed(taken):
            here = first <= trainer.state.step + 1 <= last
            disk.error, disk.delay = (error, delay) if here else (None, 0.0)
            return step(taken)

        trainer._step = changed

    return meddle


def committed(run: Path) -> list[int]:
    return [c.step for c in checkpoint.find(run / CHECKPOINTS)]


def quarantined(run: Path) -> list[tuple]:
    files = sorted(run.glob("quarantine-*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [(row["position"], row["shard"], row["sample"], row["attempt"]) for row in rows]


def same_but_for_saves(run: Path, calm: Path) -> None:
    assert [line["step"] for line in records(run)] == list(range(1, STEPS + 1))
    assert steady(records(run)) == steady(records(calm))


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_an_outage_of_some_steps_costs_only_what_could_not_be_drawn(
    error, calm, spoilt_shards, quick, tmp_path, monkeypatch
):
    """Steps 5 to 9: metrics, quarantine, pictures, routing maps, the lease and two saves are refused."""
    run = tmp_path / "run"
    disk = FaultyDisk(run, monkeypatch)
    life = live(configure(run, spoilt_shards, *WORDS), before=outage(disk, error=error, first=5, last=9))
    first = {"metrics.jsonl", "routing", "checkpoints"} if error in FULL else {"lease"}  # a lease needs no room
    assert disk.refused >= {"metrics", "quarantine"} | first
    assert life.finished
    assert_same(life.tensors, calm[1].tensors)
    same_but_for_saves(run, calm[0])
    assert quarantined(run) == quarantined(calm[0])
    assert committed(run) == [2, 4, 10, 12, 14]
    assert not list((run / CHECKPOINTS).glob("*.tmp-*"))
    drawn = {int(path.stem.partition("_")[2]) for path in (run / "samples").glob("*.png")}
    assert drawn == {2, 4, 10, 12, 14}


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_an_outage_that_lasts_ends_with_87_and_the_run_goes_on_from_what_was_committed(
    error, calm, spoilt_shards, quick, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    disk = FaultyDisk(run, monkeypatch)
    config = configure(run, spoilt_shards, *WORDS)
    with pytest.raises(StorageError, match=r"step 12 could not be saved \(4 in a row\); newest committed step: 4"):
        live(config, before=outage(disk, error=error, first=5))
    assert committed(run) == [2, 4]
    disk.error = None
    monkeypatch.setattr(lease, "is_gone", lambda owner, **_: True)  # its process would have ended
    life = live(config)
    assert len(life.seen) == STEPS - 4
    assert_same(life.tensors, calm[1].tensors)
    same_but_for_saves(run, calm[0])


def test_a_slow_disk_is_only_slow(calm, spoilt_shards, tmp_path, monkeypatch):
    """Every call that changes something takes 4 ms, for as long as it lasts."""
    run = tmp_path / "run"
    disk = FaultyDisk(run, monkeypatch)
    life = live(configure(run, spoilt_shards, *WORDS), before=outage(disk, error=None, delay=0.004, first=3))
    assert_same(life.tensors, calm[1].tensors)
    same_but_for_saves(run, calm[0])
    assert committed(run) == committed(calm[0])


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("new", [True, False], ids=["new", "resumed"])
def test_a_start_that_cannot_write_is_one_error_and_harms_nothing(error, new, spoilt_shards, tmp_path, monkeypatch):
    run = tmp_path / "run"
    if not new:
        live(configure(run, spoilt_shards, *WORDS), stop_after=4)
    disk = FaultyDisk(run, monkeypatch)
    disk.error = error
    with pytest.raises(StorageError):
        live(configure(run, spoilt_shards, *WORDS))
    disk.error = None
    assert committed(run) == ([] if new else [2, 4])
    assert live(configure(run, spoilt_shards, *WORDS)).finished


@pytest.mark.parametrize("how", ["renamed", "removed", "replaced"])
def test_a_run_folder_that_is_gone_ends_the_run_at_its_next_save(
    how, calm, spoilt_shards, quick, tmp_path, monkeypatch
):
    run, moved = tmp_path / "run", tmp_path / "moved"
    config = configure(run, spoilt_shards, *WORDS)

    def meddle(trainer):
        step = trainer._step

        def gone(taken):
            if trainer.state.step == 4:
                shutil.rmtree(run) if how == "removed" else run.rename(moved)
                if how == "replaced":
                    run.mkdir()
                    (run / "another.txt").write_text("not ours")
            return step(taken)

        trainer._step = gone

    with pytest.raises(StorageError, match="renamed, replaced or removed"):
        live(config, before=meddle)
    left = sorted(path.name for path in run.iterdir()) if run.exists() else None
    assert left == (["another.txt"] if how == "replaced" else None), "something was made under a name that is not ours"
    if how != "removed":
        assert committed(moved) == [2, 4]
        life = live(configure(moved, spoilt_shards, *WORDS))
        assert_same(life.tensors, calm[1].tensors)
        same_but_for_saves(moved, calm[0])


# --- a real file system, real processes -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MB of its own; root only."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a file system takes root; the tests above refuse the same calls")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize(
    "lasts", [pytest.param(False, id="passing", marks=pytest.mark.faults), pytest.param(True, id="lasting")]
)
def test_two_ranks_on_a_file_system_without_room(lasts, tiny_shards, small_disk):
    """Full from the second commit on, while both ranks save beside the training."""
    run, filler = small_disk / "run", small_disk / "filler"
    extra = ("train.steps=120", "checkpoint.every_steps=10", "checkpoint.keep=2", "checkpoint.save=background")
    command = [sys.executable, "-m", "ecdit_train.cli", "--nproc", "2", "train", *words(run, tiny_shards, *extra)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if not filler.exists() and len(committed(run)) == 2:
                fill(filler)
            if "was not saved, training goes on" in line and not lasts:
                filler.unlink()
                break
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert filler.exists() == lasts
    filler.unlink(missing_ok=True)
    kept = committed(run)
    for step in kept:
        restore.verify(run / CHECKPOINTS / f"step_{step:08d}")
    if not lasts:
        assert process.returncode == 0, err
        assert kept == [110, 120], out
        assert [record["step"] for record in records(run)] == list(range(1, 121))
        return
    assert process.returncode == 87, err
    assert len(kept) == 2
    assert f"newest committed step: {kept[-1]}" in err
    assert "No space left on device" in err or "needs" in err
    assert "Traceback" not in err
    again = [sys.executable, "-m", "ecdit_train.cli", "resume", str(run), "--stop-after", str(kept[-1] + 3)]
    assert subprocess.run(again, capture_output=True).returncode == 75
