"""The commands of the Slurm pages, typed as they stand on a real cluster, one after the other; none is left out.

A line that is written into a `bash` block of one of the pages is run from then on. What it needs before, and what is expected of
it other than exit code 0, is in `SAID`; a line that cannot be run here ends with `# not tried:` and why.
"""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import Cluster
from drills import START, Run
from machines import until
from reader import ROOT, Reader, commands, is_tried, unrun
from tiny_runs import WORDS

HOW_TO = Path("docs/how-to")
PAGES = {
    name: str(HOW_TO / f"{name}.md")
    for name in (
        *("submit-to-slurm", "preemption-and-time-limits", "resume-and-change-layout"),
        *("debug-a-hang", "write-a-cluster-file"),
    )
}


def nothing(reader: Reader) -> None:
    pass


def trains(reader: Reader) -> None:
    """Until the job has made a step that no life before it had."""
    step = reader.run.step()
    reader.run.reach(step + 3)


def saved(reader: Reader) -> None:
    until(
        lambda: any((reader.folder / "runs/xl_8e/checkpoints").glob("step_*[0-9]")), what="a checkpoint", seconds=START
    )


def logged(reader: Reader) -> None:
    until(lambda: any((reader.folder / "runs/xl_8e/logs").glob("*.out")), what="a log", seconds=START)


def gone(reader: Reader) -> None:
    """Nothing of the run is in the queue any more."""
    until(lambda: not reader.run.cluster.exec("squeue", "--noheader"), what="the job to leave", seconds=60)


def back(reader: Reader) -> None:
    """Requeued, and under way again."""
    until(lambda: reader.run.cluster.job(reader.job).restarts, what="the requeue", seconds=60)
    trains(reader)


def runs_elsewhere(reader: Reader) -> None:
    """A job of the run on two nodes, which has saved."""
    assert reader.types(LAUNCH)[0] == 0
    saved(reader)
    trains(reader)


def silent(reader: Reader) -> None:
    """A rank is stopped, long enough to be seen and not yet found by its watchdog."""
    assert reader.types(LAUNCH)[0] == 0
    saved(reader)
    trains(reader)
    reader.run.rank(reader.job, 1)[1].kill(signal.SIGSTOP)
    step = [-1]

    def still() -> bool:
        step.append(reader.run.step())
        return step[-1] == step[-2]

    until(still, what="the run to stand still", seconds=30, every=3.0)


def found(reader: Reader) -> None:
    """The watchdog has ended the life that hung."""
    until(lambda: any((reader.folder / "runs/xl_8e/logs").glob("stacks-*")), what="stacks", seconds=120)


def demo(reader: Reader) -> None:
    """`runs/demo` as after the first leg of `make demo`: stopped in the middle, of two ranks."""
    kept, place = reader.folder / "demo.kept", reader.folder / "runs" / "demo"
    if not kept.exists():
        words = (
            *WORDS,
            "model.heads=2",
            "model.width=128",
            "parallel=pair",
            "run=runs/demo",
            "data.shards=data/images",
        )
        code, text = reader.types(f"ecdit --nproc 2 train {' '.join(words)} --stop-after 4")
        assert code == 75, text
        shutil.copytree(place, kept)
    shutil.rmtree(place)
    shutil.copytree(kept, place)


def finished_demo(reader: Reader) -> None:
    demo(reader)
    assert reader.types("ecdit --nproc 2 resume runs/demo")[0] == 0


def own_folder(reader: Reader) -> None:
    """The files that the page tells its reader to save, on top of the cluster that is here."""
    page = text_of("write-a-cluster-file")
    for path, text in re.findall(r"`(mylab/[\w./]+)`[^`]*```\w+\n(.*?)```", page, re.DOTALL):
        (reader.folder / path).parent.mkdir(parents=True)
        (reader.folder / path).write_text(
            text.replace("h100_ib400", "local").replace("partition: gpu", "partition: low")
        )


LAUNCH = (
    "ecdit launch experiment=ec_dit_xl_8e cluster=h100_ib400 cluster.nodes=4 run=runs/xl_8e data.shards=data/images"
)


@dataclass(frozen=True, kw_only=True)
class Said:
    """Of one command."""

    line: str
    """How it begins; of several the first that was not there yet."""
    before: Callable[[Reader], None] = nothing
    """Waits for what the page supposes at this place."""
    code: int = 0
    says: str = ""
    """A pattern that its output holds."""


SAID: dict[str, tuple[Said, ...]] = {
    "submit-to-slurm": (
        Said(line=f"{LAUNCH} --render-only", says=r"#SBATCH --nodes=2(.|\n)*job\.json"),
        Said(line=LAUNCH, says=r"job \d+ submitted: runs/xl_8e\n +log .*\n +how it goes +ecdit status runs/xl_8e"),
        Said(line="ecdit status", before=saved, says=r"state +running\n"),
        Said(line="ecdit logs", says=r"step \d+/3000"),
        Said(line="ecdit stop", says="asked .* to save and stop"),
        Said(line="sbatch", before=gone),
        Said(line="scancel", before=trains),
    ),
    "preemption-and-time-limits": (
        Said(line="scontrol show config", says=r"KillWait += \d+"),
        Said(line="scontrol show partition", says=r"PreemptMode=REQUEUE"),
        Said(line="ecdit launch", says=r"job \d+ submitted"),
        Said(line="scontrol requeue", before=saved),
        Said(line="ecdit status", before=back, says=r"state +running\n(.|\n)*life 1 .* exit code 75"),
        Said(line="ecdit stop", says="asked .* to save and stop"),
        Said(line="ecdit status", before=gone, code=75, says=r"stopped, to be resumed\n(.|\n)*decided .*: stop\n"),
        Said(line="sbatch", says=r"Submitted batch job \d+"),
        Said(line="ecdit status", before=trains, says=r"state +running\n(.|\n)*life 3 .*from step"),
        Said(line="ecdit logs", says=r"step \d+/3000"),
    ),
    "resume-and-change-layout": (
        Said(line="ecdit --nproc 2 resume runs/demo", before=demo, says=r"step 12/12"),
        Said(line="ecdit resume runs/demo parallel=single", before=demo, says=r"step 12/12"),
        Said(line="ecdit --nproc 2 resume runs/demo parallel=single parallel.tp=2", before=demo, says=r"step 12/12"),
        Said(line="ecdit --nproc 4 resume runs/demo", before=demo, says=r"step 12/12"),
        Said(line="ecdit stop", before=runs_elsewhere, says="asked .* to save and stop"),
        Said(line="ecdit launch", before=gone, says=r"job \d+ submitted"),
        Said(line="ecdit stop", before=trains, says="asked .* to save and stop"),
        Said(line="ecdit --nproc 8 resume runs/xl_8e", before=gone, code=75, says=r"step \d+/3000"),
        Said(line="ecdit --nproc 2 resume runs/demo train.steps", before=finished_demo, says=r"step 16/16"),
        Said(line="mv", before=finished_demo),
        Said(line="ecdit ckpt ls", says=r"step +8 .*newest"),
        Said(line="ecdit ckpt verify", says=r"."),
    ),
    "debug-a-hang": (
        Said(line="ecdit status", before=silent, says=r"ranks +2 alive; last rank \d on n\d, in \w+ of step \d+ for \d"),
        Said(line="srun", says=r"(?m)^1: +\d+ T.*ecdit_train\.cli.* resume "),
        Said(line="ecdit logs", before=found, says="stacks of this machine's ranks"),
        Said(line="grep", says=r"HangError.*rank 1 "),
        Said(line="head", says=r"most recent call first"),
        Said(line="ecdit stop", before=trains, says="asked .* to save and stop"),
        Said(line="ecdit launch", before=gone, says=r"job \d+ submitted"),
    ),
    "write-a-cluster-file": (
        Said(line="ecdit launch --config-dir mylab", before=own_folder, says=r"#SBATCH --partition=low"),
    ),
}  # fmt: skip


def text_of(name: str) -> str:
    return (ROOT / PAGES[name]).read_text(encoding="utf-8")


def matched(name: str, text: str) -> list[tuple[str, Said]]:
    """The lines that are run, each with what is expected of it. AssertionError: something is expected that is not there."""
    expected, found = list(SAID[name]), []
    for line in filter(is_tried, commands(text)):
        fits = bool(expected) and line.startswith(expected[0].line)
        found.append((line, expected.pop(0) if fits else Said(line=line)))
    assert expected == [], f"{name} has no such line, or not in this place"
    return found


@pytest.mark.parametrize("name", PAGES)
def test_no_command_of_a_page_stays_unrun(name):
    assert unrun(text_of(name)) == []
    assert matched(name, text_of(name))


@pytest.mark.parametrize("more", [
    "```\necdit fly\n```\n", "\n    ecdit fly\n", "```bash\necdit fly  # not tried\n```\n", "```console\n$ ecdit fly\n```\n",
])  # fmt: skip
def test_a_command_that_nobody_runs_is_noticed(more):
    text = text_of("submit-to-slurm")
    assert len(unrun(text + more)) == 1
    assert matched("submit-to-slurm", text + "```bash\necdit fly\n```\n")[-1][0] == "ecdit fly"
    with pytest.raises(AssertionError, match="no such line"):
        matched("submit-to-slurm", text.replace("ecdit stop ", "ecdit halt "))


@pytest.mark.slurm
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_typed(
    name: str, cluster: Cluster, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reader = Reader(Run(cluster, folder=tmp_path / "runs" / "xl_8e", shards=tiny_shards), folder=tmp_path)
    for line, said in matched(name, text_of(name)):
        said.before(reader)
        code, text = reader.types(line)
        assert code == said.code, f"{line}\nexit code {code}\n{text}"
        assert re.search(said.says, text), f"{line}\n{text}"
