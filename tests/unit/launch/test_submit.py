"""What a launch writes, what it refuses, and that a refusal leaves nothing behind. Slurm is played by executables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_stand_in import StandIn

from ecdit_train.config.convert import with_values
from ecdit_train.config.stored import freeze, load
from ecdit_train.errors import ConfigError, RunFolderError, RunOwnedError, StorageError
from launch import inputs, record, submit
from launch.submit import SubmitError, compose_job, launch


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content and mode, and every folder."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mode, p.read_bytes() if p.is_file() else None)
        for p in sorted(folder.rglob("*"))
        if "bin" not in p.relative_to(folder).parts[:1]
    }


def test_a_run_folder_that_a_job_can_start_from(demo, slurm, tmp_path):
    made = launch(demo)
    run = Path(demo.run)
    assert sorted(os.listdir(run)) == ["code", "job.json", "job.sh", "jobs", "logs", "resolved.yaml"]
    assert [line["what"] for line in record.read(run, "4711")] == ["submitted"]
    assert load(run) == demo
    assert os.access(run / "job.sh", os.X_OK)
    (code,) = (run / "code").iterdir()
    told = json.loads((run / "job.json").read_text())
    assert (told["run"], told["code"], told["python"]) == (str(run), str(code), sys.executable)
    assert f"code={code}\n" in (run / "job.sh").read_text()
    assert slurm.log.read_text() == f"--parsable {run / 'job.sh'}\n"
    assert made.text().splitlines() == [
        f"job 4711 submitted: {run}",
        f"  log          {run}/logs/shapes_tiny-4711.out",
        f"  how it goes  ecdit status {run}",
        f"  save, stop   ecdit stop {run}",
        "  take it out  scancel 4711",
    ]


def test_what_is_shown_is_what_is_submitted(demo, slurm, tmp_path):
    before = tree(tmp_path)
    job = compose_job(demo)
    assert tree(tmp_path) == before
    assert job.problems == ()
    launch(demo)
    run = Path(demo.run)
    assert (run / "job.sh").read_text() == job.script
    assert (run / "job.json").read_text() == job.files.text
    assert job.text().startswith(job.script)
    rest = job.text().removeprefix(job.script).splitlines()
    assert all(line.startswith("#") for line in rest if line)  # the whole is the script still
    assert "".join(line.removeprefix("# ") for line in rest).count('"format": 1') == 1


def test_the_answer_may_name_the_cluster(demo, tmp_path, monkeypatch):
    StandIn(folder=tmp_path / "bin", sbatch="echo '4712;big'").install(monkeypatch)
    assert launch(demo).job == 4712


# --- refused: as if nothing had been asked -----------------------------------------------------------------------------


REFUSES = "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1"


def test_a_refused_submission_leaves_nothing(demo, tmp_path, monkeypatch):
    StandIn(folder=tmp_path / "bin", sbatch=REFUSES).install(monkeypatch)
    before = tree(tmp_path)
    with pytest.raises(SubmitError) as caught:
        launch(demo)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "sbatch refused the job (exit code 1): sbatch: error: Batch job submission failed: Invalid account"
    )
    assert "  there is cpu (default): 2 nodes with 2 CPUs, 4 GB, no GPU; limit unlimited" in lines
    assert "  there is gpu: 8 nodes with 96 CPUs, 977 GB, 8 h100 GPUs; limit 2-00:00:00" in lines
    assert tree(tmp_path) == before
    assert SubmitError.exit_code == 83


def test_a_run_folder_that_was_there_is_put_back(demo, tmp_path, monkeypatch):
    """Other words, other code, and Slurm says no: the next life is what the first launch said."""
    StandIn(folder=tmp_path / "bin").install(monkeypatch)
    launch(demo)
    (Path(demo.run) / "metrics.jsonl").write_text("{}\n")
    (Path(demo.run) / "job.sh").chmod(0o700)
    before = tree(tmp_path)
    StandIn(folder=tmp_path / "bin", sbatch=REFUSES).install(monkeypatch)
    monkeypatch.setattr(submit, "take", lambda **_: changed_code())
    with pytest.raises(SubmitError):
        launch(with_values(demo, {"cluster.time_limit": "02:00:00", "data.threads": 3, "cluster.container": "x.sif",
                                  "cluster.container_kind": "apptainer"}))  # fmt: skip
    assert tree(tmp_path) == before


def changed_code():
    from launch.snapshot import Snapshot

    return Snapshot(id="0123456789ab", files={"ecdit_train/x.py": b"1\n", "snapshot.json": b"{}"}, config_dir=None)


def test_what_others_put_there_meanwhile_stays(demo, tmp_path, monkeypatch):
    StandIn(folder=tmp_path / "bin", sbatch=f"echo mine > {demo.run}/notes; exit 1").install(monkeypatch)
    with pytest.raises(SubmitError):
        launch(demo)
    assert list(Path(demo.run).iterdir()) == [Path(demo.run) / "notes"]


@pytest.mark.parametrize("answer", ["echo what", "echo"])
def test_what_may_have_been_taken_is_kept(answer, demo, tmp_path, monkeypatch):
    """A job without its folder would be worse than a folder without its job."""
    StandIn(folder=tmp_path / "bin", sbatch=answer).install(monkeypatch)
    with pytest.raises(SubmitError, match=r"look with `squeue --me` whether there is a job of .*/job\.sh"):
        launch(demo)
    assert (Path(demo.run) / "job.json").exists()


def test_sbatch_that_does_not_answer(demo, tmp_path, monkeypatch):
    StandIn(folder=tmp_path / "bin", sbatch="exec sleep 60").install(monkeypatch)
    monkeypatch.setattr(submit, "SBATCH_SECONDS", 0.3)
    with pytest.raises(SubmitError, match=r"has not answered for 0\.3 s"):
        launch(demo)
    assert (Path(demo.run) / "job.sh").exists()


def test_a_folder_that_cannot_be_written(demo, slurm, tmp_path, monkeypatch):
    real = os.access  # root may write anywhere
    monkeypatch.setattr(inputs.os, "access", lambda path, *how, **more: path != tmp_path and real(path, *how, **more))
    with pytest.raises(ConfigError, match=r"run = .*: .* cannot be written by you"):
        launch(demo)


def test_a_disk_that_refuses(demo, slurm, tmp_path, monkeypatch):
    before = tree(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(submit, "freeze", full)
    with pytest.raises(StorageError, match=r"cannot be written: .*No space left"):
        launch(demo)
    assert tree(tmp_path) == before


def test_without_slurm_nothing_is_written(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    before = tree(tmp_path)
    with pytest.raises(SubmitError, match=r"sbatch was not found; use a Slurm login node"):
        launch(demo)
    assert tree(tmp_path) == before


def test_all_that_is_missing_is_said_at_once(demo, slurm, tmp_path):
    wrong = with_values(demo, {"data.shards": "none", "train.init_from": "runs/old", "cluster.partition": "gpo"})  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        launch(wrong)
    assert [p.field for p in caught.value.problems] == ["data.shards", "train.init_from", "cluster.partition"]
    assert "there are cpu, gpu; nearest valid: gpu" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_layout_before_anything(demo, slurm, tmp_path):
    with pytest.raises(ConfigError, match="must divide the world of 3 ranks"):
        launch(with_values(demo, {"parallel.tp": 2, "cluster.gpus_per_node": 3}))
    assert not (tmp_path / "runs").exists()


# --- the same folder again -----------------------------------------------------------------------------------------------


def test_launching_again_copies_no_code_twice(demo, slurm):
    launch(demo)
    first = (Path(demo.run) / "job.sh").read_text()
    launch(demo)
    assert (Path(demo.run) / "job.sh").read_text() == first
    assert len(os.listdir(Path(demo.run) / "code")) == 1


def test_after_a_life_that_stored_another_path(demo, slurm, tmp_path, monkeypatch):
    """A rank is started with the absolute folder, and stores that."""
    monkeypatch.chdir(tmp_path)
    cfg = with_values(demo, {"run": "runs/demo"})
    launch(cfg)
    freeze(demo, "runs/demo")
    assert launch(cfg).job == 4711


def test_launching_again_may_change_what_a_resume_may(demo, slurm):
    launch(demo)
    wider = with_values(demo, {"cluster.nodes": 2, "data.threads": 3, "train.microbatch": 32})
    launch(wider)
    assert load(demo.run) == wider
    assert "#SBATCH --nodes=2\n" in (Path(demo.run) / "job.sh").read_text()
    longer = with_values(wider, {"train.steps": wider.train.steps + 1})
    with pytest.raises(RunFolderError, match=r"give train\.steps=\d+ on the command line if you mean it"):
        launch(longer, allow={"optim.lr"})
    assert load(demo.run) == wider
    launch(longer, allow={"train.steps"})
    assert load(demo.run) == longer


def test_another_run_in_the_folder_is_refused(demo, slurm, tmp_path):
    launch(demo)
    before = tree(tmp_path)
    with pytest.raises(RunFolderError) as caught:
        launch(with_values(demo, {"train.seed": 1, "data.threads": 3}), allow={"train.seed"})
    assert "train.seed: 0 -> 1 (identity): another run; start a new run folder for it" in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED"])
def test_two_jobs_of_one_folder(state, demo, tmp_path, monkeypatch):
    queue = f"41|{state}|{demo.run}/job.sh\n42|RUNNING|/elsewhere/job.sh\n"
    StandIn(folder=tmp_path / "bin", queue=queue).install(monkeypatch)
    with pytest.raises(RunOwnedError, match=rf"job 41 of this folder is {state}; take it out first \(scancel 41\)"):
        launch(demo)
    assert not Path(demo.run).exists()
    assert launch(with_values(demo, {"cluster.dependency": "afterany:41"})).job == 4711


def test_a_job_that_comes_after_another_changes_nothing_of_it(demo, tmp_path, monkeypatch):
    """What the first reads when it comes back is what it was told."""
    stand_in = StandIn(folder=tmp_path / "bin").install(monkeypatch)
    launch(demo)
    (stand_in.folder / "queue").write_text(f"4711|RUNNING|{demo.run}/job.sh\n")
    before, after = tree(tmp_path), with_values(demo, {"cluster.dependency": "afterany:4711"})
    wider = {"cluster.nodes": 2, "train.microbatch": 32}
    for values in (wider, {"train.steps": 70}, {"cluster.lives": 9}):
        key, value = next(iter(values.items()))
        with pytest.raises(RunOwnedError, match=rf"job 4711 of this folder may still run.*{key}: \d+ -> {value}\)"):
            launch(with_values(after, values), allow={"train.steps"})
    with monkeypatch.context() as patch:
        patch.setattr(submit, "take", lambda **_: changed_code())
        with pytest.raises(RunOwnedError, match="the code, its environment or the nodes"):
            launch(demo, after=["4711"])
    assert tree(tmp_path) == before
    assert launch(after).job == 4711
    assert launch(demo, after=["4711"]).job == 4711
    assert (Path(demo.run) / "job.json").read_bytes() == before["runs/demo/job.json"][1]
    (stand_in.folder / "queue").write_text("")
    assert launch(with_values(after, wider)).job == 4711, "nobody has the folder"


def test_a_job_that_has_ended_holds_nothing(demo, tmp_path, monkeypatch):
    StandIn(folder=tmp_path / "bin", queue=f"41|TIMEOUT|{demo.run}/job.sh\n").install(monkeypatch)
    assert launch(demo).job == 4711


def test_a_folder_that_somebody_trains_in(demo, slurm):
    """On this machine, without Slurm."""
    launch(demo)
    code = (
        "import sys, time; from pathlib import Path; from ecdit_train.supervise import lease\n"
        "held = lease.acquire(Path(sys.argv[1]), expires=60.0)\nprint('held', flush=True); time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, demo.run], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(RunOwnedError, match=rf"is owned by process {owner.pid} .*stop it first: ecdit stop"):
            launch(demo)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert launch(demo).job == 4711


# --- sbatch's own variables ------------------------------------------------------------------------------------------


def test_the_script_wins_over_the_shells_variables(demo, slurm, monkeypatch):
    for name in ("SBATCH_TIMELIMIT", "SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_NO_REQUEUE", "SBATCH_WCKEY"):
        monkeypatch.setenv(name, "1")
    launch(with_values(demo, {"cluster.partition": "cpu"}))
    assert sorted(slurm.log.read_text().splitlines()[1:]) == ["SBATCH_ACCOUNT=1", "SBATCH_WCKEY=1"]


def test_memory_is_said_once(demo, slurm, monkeypatch):
    """sbatch takes one of --mem, --mem-per-cpu and --mem-per-gpu."""
    for name in ("SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU", "SBATCH_CPUS_PER_GPU"):
        monkeypatch.setenv(name, "4")
    launch(with_values(demo, {"cluster.mem": "3G"}))
    assert slurm.log.read_text().splitlines()[1:] == []
    slurm.log.unlink()
    launch(demo)
    assert sorted(slurm.log.read_text().splitlines()[1:]) == ["SBATCH_MEM_PER_CPU=4", "SBATCH_MEM_PER_GPU=4"]


def test_a_launch_inside_of_another_job(demo, tmp_path, monkeypatch):
    """Its figures are not those of the new job, whose srun would take them."""
    StandIn(folder=tmp_path / "bin", sbatch=f"env > {tmp_path}/environment; echo 4711").install(monkeypatch)

    def passed_on() -> set[str]:
        launch(demo)
        names = (line.partition("=")[0] for line in (tmp_path / "environment").read_text().splitlines())
        return {name for name in names if name.startswith("SLURM")}

    for name in ("SLURM_CONF", "SLURM_JWT", "SLURM_MPI_TYPE"):
        monkeypatch.setenv(name, "mine")
    assert passed_on() == {"SLURM_CONF", "SLURM_JWT", "SLURM_MPI_TYPE"}, "the user's own"
    for name in ("SLURM_JOB_ID", "SLURM_CPU_BIND", "SLURM_MEM_PER_CPU", "SLURM_TRES_PER_TASK", "SLURMD_NODENAME"):
        monkeypatch.setenv(name, "1")
    assert passed_on() == {"SLURM_CONF", "SLURM_JWT"}
