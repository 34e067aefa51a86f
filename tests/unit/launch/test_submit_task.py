"""`ecdit submit`, `--after`, `--array` and `--parsable`: what is written and handed to Slurm, and what is refused before."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_commands import ecdit, refused
from secret_shapes import TOKENS
from slurm_stand_in import StandIn

from launch import record, submit
from launch.job_file import read

CPU = ("cluster=local", "cluster.cpus_per_gpu=1", "cluster.partition=cpu")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def jobs() -> list[Path]:
    return sorted(Path("runs/jobs").glob("*"))


def directives(folder: Path) -> list[str]:
    return re.findall(r"^#SBATCH --(.+)$", (folder / "job.sh").read_text(), flags=re.MULTILINE)


def a_run(name: str = "r") -> str:
    Path(name).mkdir()
    (Path(name) / "resolved.yaml").write_text("{}\n")
    return name


def test_a_folder_of_its_own_that_a_job_can_start_from(slurm, here, capsys):
    assert ecdit("submit", *CPU, "report", a_run()) == 0
    (folder,) = jobs()
    assert re.fullmatch(r"report-\d{8}-\d{6}", folder.name)
    assert sorted(os.listdir(folder)) == ["code", "job.json", "job.sh", "logs"], "no configuration: it is no run"
    told = read(folder / "job.json")
    (code,) = (folder / "code").iterdir()
    assert (told.words, told.python, told.code) == (("report", "r"), sys.executable, str(here / code))
    assert slurm.log.read_text() == f"--parsable {here / folder}/job.sh\n"
    assert capsys.readouterr().out.splitlines() == [
        "job 4711 submitted: ecdit report r",
        f"  log          {here / folder}/logs/report-4711.out",
        "  how it goes  squeue --jobs 4711",
        "  take it out  scancel 4711",
    ]
    assert "-m launch.task" in (folder / "job.sh").read_text()
    subprocess.run(["bash", "-n", str(folder / "job.sh")], check=True)


def test_an_array_of_parts(slurm):
    assert ecdit("submit", *CPU, "data", "shapes", "out=set", "count=10", "--array", "4") == 0
    (folder,) = jobs()
    assert folder.name.startswith("data-shapes-")
    assert "array=1-4" in directives(folder)
    assert read(folder / "job.json").words[-2:] == ("--part", "SLURM_ARRAY_TASK_ID/4")


def test_what_a_command_needs_of_a_node(tmp_path, monkeypatch):
    """Drawing takes one GPU, or as many as are named, and as many ranks; all else none, whatever the file says."""
    StandIn(folder=tmp_path / "bin").install(monkeypatch)
    Path("mine/cluster").mkdir(parents=True)
    text = "defaults: [h100_ib400, _self_]\npartition: gpu\nexclusive: true\nmem: 900G\ngpus_per_node: 8\ncpus_per_gpu: 12\n"
    Path("mine/cluster/big.yaml").write_text(text + "sbatch: ['gres=gpu:h100:8', 'comment=x']\n")
    run, big = a_run(), ("--config-dir", "mine", "cluster=big")
    assert ecdit("submit", *big, "evaluate", f"run={run}") == 0
    assert ecdit("submit", *big, "--nproc", "2", "cluster.mem=9G", "--", "sample", f"run={run}", "prompts=a") == 0
    assert ecdit("submit", *big, "report", run) == 0
    assert ecdit("submit", *big, "--nproc", "8", "doctor") == 0
    names = ("evaluate", "report", "sample", "doctor")
    one, none, two, all_of_it = ({job.name.partition("-")[0]: job for job in jobs()}[n] for n in names)
    assert "gres=gpu:h100:8" in directives(all_of_it)
    assert read(all_of_it / "job.json").words[0] == "doctor", "one process, which looks at all of them"
    assert {"gres=gpu:h100:1", "comment=x", "cpus-per-task=12", "nodes=1"} <= set(directives(one))
    assert not {"exclusive", "mem=900G"} & set(directives(one))
    assert {"gres=gpu:h100:2", "mem=9G", "cpus-per-task=24"} <= set(directives(two))
    assert not any("gpu" in line for line in directives(none) if not line.startswith("partition"))
    assert read(one / "job.json").words[0] == "evaluate"
    assert read(two / "job.json").words[:3] == ("--nproc", "2", "sample")
    copy = read(one / "job.json").words[-1]
    assert copy.endswith("/config_dir")
    assert (Path(copy) / "cluster" / "big.yaml").exists(), "the user's folder, as it was"
    assert "--config-dir" not in read(none / "job.json").words, "report takes none"


def test_a_short_job_needs_no_lead_for_saving(slurm):
    """Only a study is warned before the time limit: the others use all of it."""
    assert ecdit("submit", *CPU, "cluster.time_limit=00:01:00", "data", "verify", "set") == 0
    assert ecdit("submit", *CPU, "cluster.time_limit=00:30:00", "study", "routing") == 0
    short, study = (next(job for job in jobs() if job.name.startswith(name)) for name in ("data", "study"))
    assert "signal=B:USR2@30" in directives(short)
    assert "signal=B:USR2@60" in directives(study), "the file's"


def test_chains(slurm, demo, capsys):
    """The number alone goes from one to the next; the script knows nothing of those before it."""
    words = [f"run={demo.run}", f"data.shards={demo.data.shards}", "experiment=shapes_tiny", *CPU]
    assert ecdit("launch", *words, "--after", "17,18_2", "--parsable") == 0
    assert capsys.readouterr().out == "4711\n"
    assert slurm.log.read_text() == (
        f"--parsable --dependency=afterok:17:18_2 --kill-on-invalid-dep=yes {demo.run}/job.sh\n"
    )
    assert "dependency" not in (Path(demo.run) / "job.sh").read_text()
    slurm.log.unlink()
    assert ecdit("submit", *CPU, "--after", "4711", "--parsable", "evaluate", "run=to/come") == 0
    assert capsys.readouterr().out == "4711\n"
    assert slurm.log.read_text().startswith("--parsable --dependency=afterok:4711 --kill-on-invalid-dep=yes ")


@pytest.mark.parametrize("how", [["--after", "17"], ["cluster.dependency=afterok:17"]], ids=["after", "dependency"])
def test_data_that_a_job_before_makes(how, slurm, capsys):
    words = ["launch", "experiment=shapes_tiny", "run=r", "data.shards=to/come", *CPU]
    code, lines = refused(capsys, *words)
    assert code == 77
    assert "data.shards = 'to/come'" in lines[0]
    assert ecdit(*words, *how) == 0
    assert "ecdit: not there yet, a job before this one must make it: data.shards" in capsys.readouterr().err
    assert [line["what"] for line in record.read(Path("r"), "4711")] == ["submitted"]


def test_a_sweep_after_a_job(slurm, demo, capsys):
    words = ["experiment=shapes_tiny", f"data.shards={demo.data.shards}", *CPU, "train.seed=1,2", "hydra.sweep.dir=s"]
    assert ecdit("launch", "-m", *words, "--after", "9", "--parsable") == 0
    assert capsys.readouterr().out == "4711,4711\n"
    lines = slurm.log.read_text().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("--parsable --dependency=afterok:9 --kill-on-invalid-dep=yes ") for line in lines)


SWEEP = ("-m", "experiment=shapes_tiny", *CPU, "cluster.gpus_per_node=1", "hydra.sweep.dir=s")


def test_a_sweep_is_checked_whole_before_its_first_job(slurm, demo, here, capsys):
    """The second job's problem keeps the first one from Slurm, too, and nothing is written."""
    words = [*SWEEP, f"data.shards={demo.data.shards}"]
    code, lines = refused(capsys, "launch", *words, "cluster.cpus_per_gpu=1,99,98")
    assert code == 77
    assert ["99 CPUs" in line for line in lines if "CPUs" in line] == [True, False]
    assert os.listdir(here) == []
    assert not slurm.log.exists()


def test_each_job_of_a_sweep_is_looked_at_once(slurm, demo, monkeypatch):
    looked, real = [], submit.compose_job
    monkeypatch.setattr(submit, "compose_job", lambda cfg, **how: looked.append(cfg.run) or real(cfg, **how))
    assert ecdit("launch", *SWEEP, f"data.shards={demo.data.shards}", "train.seed=1,2") == 0
    assert looked == ["s/train.seed-1", "s/train.seed-2"]


def test_a_sweep_that_slurm_refuses_leaves_nothing(tmp_path, demo, monkeypatch, here, capsys):
    """From its first job on; after that the sweep's file says which were taken."""
    taken = f"[ -e {tmp_path}/taken ] && exit 1; [ -e {tmp_path}/one ] && touch {tmp_path}/taken && echo 7"
    StandIn(folder=tmp_path / "bin", sbatch=taken).install(monkeypatch)
    words = [*SWEEP, f"data.shards={demo.data.shards}", "train.seed=1,2"]
    assert refused(capsys, "launch", *words)[0] == 83
    assert os.listdir(here) == []
    (tmp_path / "one").touch()
    assert ecdit("launch", *words) == 83
    assert [job["slurm_job"] for job in json.loads(Path("s/sweep.json").read_text())["jobs"]] == [7, None]
    assert not Path("s/train.seed-2").exists()


def test_render_only_writes_nothing(slurm, here, capsys):
    assert ecdit("submit", *CPU, "--render-only", "--after", "5", "--array", "2", "data", "verify", "set") == 0
    said = capsys.readouterr()
    assert "#SBATCH --array=1-2" in said.out
    assert "# " in said.out
    assert "ecdit: would start when 5 have ended well" in said.err
    assert os.listdir(here) == []


def test_what_slurm_refuses_leaves_nothing(tmp_path, monkeypatch, here, capsys):
    StandIn(folder=tmp_path / "bin", sbatch="echo 'sbatch: error: Invalid account' >&2; exit 1").install(monkeypatch)
    code, lines = refused(capsys, "submit", *CPU, "data", "verify", "set")
    assert (code, "Invalid account" in lines[0]) == (83, True)
    assert os.listdir(here) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["cluster.partition=gpx", "data", "index", "s"], 77, "no partition gpx here"),
        (["cluster.nodes=2", "data", "index", "s"], 77, "cluster.nodes = 2: is one for a command"),
        (["cluster.array=0-3%1", "data", "index", "s"], 77, "is --array N for a command"),
        (["train.steps=3", "data", "index", "s"], 77, "words of the command come after its verb"),
        (["--array", "2", "report", "r"], 77, "report cannot be cut into parts"),
        (["--array", "0", "data", "index", "s"], 77, "must be 1 or more"),
        (["--array", "2", "--", "data", "index", "s", "--part", "1/2"], 77, "leave --part out"),
        (["--", "evaluate", "run=r", "--config-dir", "x"], 77, "comes before the verb"),
        (["evaluate", "run=nowhere"], 79, "if a job makes it first: --after JOB"),
        (["data", "shapes", "out=ghp_abcdefghijklmnopqrstuvwxyz0123456789"], 77, "holds a GitHub token"),
        (["train", "run=r"], 2, "ecdit launch trains a run"),
        (["status", "r"], 2, "runs here"),
        (["--", "--nproc", "2", "report", "r"], 2, "the verb first"),
        (["--nproc", "2", "report", "r"], 77, "is for verbs that draw and for doctor, not for report"),
        (["cluster.gpus_per_node=2", "report", "r"], 77, "is --nproc N for a command that draws"),
        (["evaluat", "run=r"], 2, "invalid choice: 'evaluat'"),
        ([], 2, "which command?"),
        (["--after", "4711;rm", "data", "index", "s"], 2, "is not JOB[,JOB]"),
    ],
)
def test_what_is_refused_here(words, code, said, slurm, here, capsys):
    assert ecdit("submit", *(CPU if "cluster.partition=gpx" not in words else ["cluster=local"]), *words) == code
    error = capsys.readouterr().err
    assert said in error
    assert "ghp_" not in error
    assert os.listdir(here) == []
    assert not slurm.log.exists()


@pytest.mark.parametrize(
    ("place", "kind"),
    [*(("value", kind) for kind in TOKENS), *((p, "GitHub") for p in ("prompt", "bare", "name", "folder", "cluster"))],
)
def test_a_token_gets_nowhere(place, kind, slurm, here, capsys):
    token = TOKENS[kind]
    lines = {
        "value": ["--", "data", "shapes", f"out={token}"],
        "prompt": ["--after", "1", "--", "sample", "run=r", f"prompts='[a {token} dog]'"],
        "bare": ["--", "data", "verify", token],
        "name": ["--", "data", "shapes", f"{token}=1", "out=s"],
        "folder": ["--folder", f"jobs/{token}", "--", "data", "verify", "s"],
        "cluster": [f"cluster.account='{token}'", "--", "data", "verify", "s"],
    }
    assert ecdit("submit", *CPU, *lines[place]) in (2, 77)
    said = capsys.readouterr()
    assert token not in said.out + said.err
    assert not slurm.log.exists()
    assert os.listdir(here) == []


def test_a_folder_is_one_jobs(slurm, capsys):
    line = ["submit", *CPU, "--folder", "j", "data", "verify", "set"]
    assert ecdit(*line) == 0
    code, lines = refused(capsys, *line)
    assert (code, "holds another job" in lines[0]) == (79, True)


def test_a_container_sees_what_the_command_names(slurm, tmp_path):
    """Besides the folder it starts in; also a folder that is not there yet, by the one that will hold it."""
    (tmp_path / "far").mkdir()
    Path("near").mkdir()
    image = ["cluster.container=i.sif"]
    assert ecdit("submit", *CPU, *image, "data", "shapes", f"out={tmp_path}/far/set") == 0
    assert ecdit("submit", *CPU, *image, "data", "verify", "near") == 0
    far, near = (json.loads((job / "job.json").read_text()) for job in jobs())
    mounted = " ".join(far["srun"])
    assert f"{tmp_path}/far:{tmp_path}/far" in mounted
    assert "far" not in " ".join(near["srun"])
