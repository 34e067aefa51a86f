"""`make gpu-check` where there is no GPU: every check runs on small shapes, can fail, and loses nothing of the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import te_stand_in
import torch

from benchmarks import timing
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import arithmetic, layers, rank, runs
from benchmarks.gpu.device import Device
from benchmarks.gpu.record import Findings, Record, Skipped, good, perform, table
from ecdit_train.kernels import language
from ecdit_train.model import te_products

CPU = Device(kind="cpu")
ALL = """
import json, sys
from benchmarks.gpu.__main__ import checks
from benchmarks.gpu.device import Device
from benchmarks.gpu.record import perform
done = {name: perform(check, Device(kind="cpu")) for name, check in checks().items() if name != "kernels"}
open(sys.argv[1], "w").write(json.dumps(done))
"""
BARS = {
    "about": 0,
    "parity": 3,
    "bf16": 6,
    "fp8": 4,
    "grid": 13,
    "waits": 1,
    "graphs": 3,
    "layers": 0,
    "blocks": 0,
    "steps": 0,
    "demo": 2,
}
"""How many each has on a CPU, where times are no measurement."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All checks in one process, away from this one: some own the process group."""
    out = tmp_path_factory.mktemp("gpu") / "outcomes.json"
    run = subprocess.run(
        [sys.executable, "-c", ALL, str(out)], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", BARS)
def test_every_check_runs_on_a_cpu(outcomes, name):
    assert outcomes[name]["status"] == "ran", outcomes[name]["reason"]
    assert len(outcomes[name]["bars"]) == BARS[name]
    assert good(outcomes[name]), table(outcomes)


def test_what_was_measured_is_there(outcomes):
    rows = outcomes["layers"]["values"]
    assert {"small, plain", "small, deterministic", "small, triton", "small, plain, compiled"} <= rows.keys()
    assert rows["small, plain"]["experts"] == 1, "one of four experts, as the rank of a layout with ep=4 has"
    assert rows["small, plain"]["rows"] == 64, "f_c 2 * 32 tokens of a rank * 4 ranks / 4 experts"
    assert set(rows) | set(outcomes["layers"]["skipped"]) == {f"small, {form}" for form in layers.FORMS}
    assert len(outcomes["blocks"]["values"]) == 6, "two kinds, in three forms"
    assert outcomes["blocks"]["values"]["small, sparse, compiled"]["mfu"] > 0
    assert outcomes["steps"]["values"]["small"]["mfu / plan"] > 0
    assert len(outcomes["demo"]["values"]["losses"]["0 cpu"]) == 8


def test_the_shapes_of_the_presets_are_those_of_one_rank():
    """The issue's figures: one of 64 ranks with ep64 sees one expert with 16,384 rows, with ep8 four with 4,096."""
    found = {}
    for preset in rank.layouts(Device(kind="cuda")):
        c = preset.config()
        with rank.fake_world(preset.world):
            from ecdit_train.parallel.mesh import make_mesh

            gpus = c.cluster.gpus_per_node
            mesh = make_mesh(c.parallel, device_type="cpu", world=preset.world, gpus_per_node=gpus)
        found[preset.name] = rank.Part(config=c, mesh=mesh, blocks={}).rows
    assert found["ec_dit_m_64e, ep64"] == (1, 16384)
    assert found["ec_dit_3xl_32e, ep8"] == (4, 4096)
    assert found["ec_dit_m_64e"] == (2, 8192)


@pytest.mark.skipif(not language.HERE, reason="Triton is not installed")
def test_kernels_are_checked_through_the_interpreter(capfd):
    """And by way of the command, in a process of its own."""
    assert gpu.main(["--device", "cpu", "--only", "kernels"]) == 0
    assert capfd.readouterr().out.count("kernel against twin") == 15


@pytest.mark.slow
def test_the_grid_under_torchrun(outcomes):
    done = perform(gpu.checks()["grid"], Device(kind="cpu", ranks=2))
    assert done["status"] == "ran", done["reason"]
    assert len(done["bars"]) == 2
    assert good(done)


def test_skips_with_a_reason(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    assert "skipped: torch sees no CUDA device" in capsys.readouterr().out


def test_a_fault_of_one_check_loses_neither_its_bars_nor_the_others(tmp_path):
    def breaks(device, found):
        found.at_most("held before", 1, 2)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def has_nothing(device, found):
        raise Skipped("no such device")

    def half(device, found):
        with found.part("large"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        with found.part("fp8"):
            raise Skipped("not there")
        found.at_most("small", 1, 2)

    kept = Record.open(tmp_path, name="gpu_check")
    slow = lambda device, found: found.at_least("speed", 0.5, 0.85)  # noqa: E731
    for name, check in {"a": breaks, "b": has_nothing, "c": slow, "d": half}.items():
        kept.keep(name, perform(check, CPU))
        assert name in Record.open(tmp_path, name="gpu_check").checks, "saved as it ends"
    (path,) = tmp_path.iterdir()
    checks = json.loads(path.read_text())["checks"]
    assert [good(checks[name]) for name in "abcd"] == [False, True, False, False]
    said = "\n".join(table(checks))
    assert "pass  held before" in said
    assert "illegal memory access" in said
    assert "skip  no such device" in said
    assert "FAIL  speed" in said
    assert "pass  small" in said, "after a part that failed"
    assert "CUDA out of memory" in said
    assert "skip  fp8: not there" in said


def test_a_process_that_dies_is_a_failed_check(monkeypatch):
    monkeypatch.setattr(gpu, "WITHIN", 0.01)
    outcome = gpu.child("about", CPU)
    assert outcome["status"] == "failed"
    assert "took more than" in outcome["reason"]
    assert not good(outcome)


def test_wrong_results_fail(monkeypatch):
    found = Findings()
    sums = iter([torch.ones(3), 1.5 * torch.ones(3)] * 100)
    monkeypatch.setattr(arithmetic.language, "launches", lambda device: True)
    monkeypatch.setattr(
        arithmetic, "cases", lambda *a, **k: {"gather": (lambda: (next(sums),), lambda: (next(sums),), 1)}
    )
    arithmetic.kernels(CPU, found)
    assert not any(bar.passed for bar in found.bars)

    losses = iter([[3.0, 2.0, 1.0, 1.0, 1.0], [3.1, 2.0, 1.0, 1.0, 1.5]])
    monkeypatch.setattr(runs, "live", lambda *a, **k: next(losses))
    found = Findings()
    runs.demo(CPU, found)
    assert not any(bar.passed for bar in found.bars)


def test_what_is_not_installed_is_a_row(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(te_products, "missing", lambda: "is not installed here")
    config = rank.with_words(rank.presets(CPU)[0], layers.FORMS["fp8, transformer engine"])
    with pytest.raises(Skipped, match="Transformer Engine is not installed here"):
        rank.check_products(config, Device(kind="cuda"))
    rank.check_products(rank.with_words(rank.presets(CPU)[0], layers.FORMS["fp8"]), Device(kind="cuda"))


def test_wrong_8_bit_products_fail(monkeypatch):
    cast = te_products.cast

    def twice(*args):
        values, scale = cast(*args)
        return values, 2 * scale

    monkeypatch.setattr(arithmetic, "check_products", lambda config, device: None)
    for wrong in (False, True):
        found = Findings()
        with te_stand_in.used(blackwell=True):
            arithmetic.fp8(CPU, found)
        assert not found.failed
        assert {bar.name.partition(":")[0] for bar in found.bars if not bar.passed} == (
            {"transformer_engine, current", "transformer_engine, delayed"} if wrong else set()
        )
        monkeypatch.setattr(te_products, "cast", twice)


def test_waits_are_counted_by_the_line_that_waited(monkeypatch):
    """torch warns at the line that waits; here a warning of the same words."""
    import warnings

    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with Device(kind="cuda").waits() as places:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    ((place, count),) = places.items()
    assert Path(place.partition(":")[0]).name == "test_gpu_check.py"
    assert count == 1


def test_results_go_where_benchmarks_go(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    outcome = perform(lambda device, found: found.at_most("error", 2.0, 1.0), CPU)
    monkeypatch.setattr(gpu, "child", lambda name, device: outcome)
    assert gpu.main(["--only", "parity", "bf16"]) == 1
    (path,) = tmp_path.iterdir()
    assert set(json.loads(path.read_text())["checks"]) == {"parity", "bf16"}
    assert "0 of 2 checks held; not: parity, bf16" in capsys.readouterr().out
