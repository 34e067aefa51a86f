"""Joining the world, talking, and the single process that needs none of it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from dist_harness import run_distributed

from ecdit_train.parallel import runtime as runtimes

ROOT = Path(__file__).parents[2]


def talk(runtime: Any) -> dict[str, Any]:
    mine = {"rank": runtime.rank, "text": "ü" * runtime.rank}
    return {
        "any": list(runtime.any_rank(runtime.rank == 1, False)),
        "told": [runtime.broadcast_object({"step": runtime.rank}), runtime.broadcast_object(mine, source=2)],
        "heard": runtime.all_gather_json(mine),
    }


def test_talk() -> None:
    for said in run_distributed(3, talk):
        assert said["any"] == [True, False]
        assert said["told"] == [{"step": 0}, {"rank": 2, "text": "üü"}]
        assert said["heard"] == [{"rank": r, "text": "ü" * r} for r in range(3)]


def test_alone() -> None:
    alone = runtimes.start("cpu", env={})
    assert (alone.rank, alone.world, alone.control) == (0, 1, None)
    assert alone.any_rank(True, False) == (True, False)
    assert alone.broadcast_object((1, 2)) == [1, 2]
    assert alone.all_gather_json("x") == ["x"]
    alone.barrier()
    alone.shutdown()


def run_script(body: str, *, launcher: tuple[str, ...] = ()) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'dist'}"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    what = [body] if launcher else ["-c", textwrap.dedent(body)]
    done = subprocess.run([sys.executable, *launcher, *what], env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_one_process_imports_no_vendor_and_needs_no_group() -> None:
    out = run_script("""
        import sys
        import torch.distributed as dist
        from dist_cases import case, compare, run_parallel, run_reference
        from ecdit_train.parallel import runtime
        from ecdit_train.parallel.mesh import make_mesh
        alone = runtime.start("cpu")
        c = case(chunks=2, ac="selective", steps=2)
        errors = compare(run_parallel(c, make_mesh(c.parallel, device_type="cpu", world=1)), run_reference(c))
        assert errors.within(1e-12), errors
        assert not dist.is_initialized()
        c = case(precision="bf16", dtype="float32", steps=1)
        mesh = make_mesh(c.parallel, device_type="cpu", world=1)
        errors = compare(run_parallel(c, mesh), run_reference(c))
        assert dist.is_initialized() and mesh.world_group is None
        assert errors.loss < 1e-2, errors
        assert not {"megatron", "deepspeed"} & {name.partition(".")[0] for name in sys.modules}
        alone.shutdown()
        print("fine")
    """)
    assert "fine" in out


def test_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from ecdit_train.parallel import runtime\nr = runtime.start('cpu')\n"
        "assert r.all_gather_json(r.rank) == [0, 1]\nr.shutdown()\nprint('joined')\n"
    )
    out = run_script(str(script), launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"))
    assert out.count("joined") == 2
