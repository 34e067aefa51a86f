"""What Slurm says of a cluster, and what of a configuration it can never run."""

from __future__ import annotations

import pytest
from slurm_stand_in import CPU_NODES, GPU_NODES, StandIn, partition

from ecdit_train.config.cluster_rules import gpus_of, seconds_of
from ecdit_train.config.compose import compose
from ecdit_train.config.convert import with_values
from ecdit_train.config.validate import validate
from launch import cluster_check, cluster_facts
from launch.cluster_facts import UnknownClusterError, ask, clock

GPU = {"cluster.partition": "gpu", "cluster.nodes": 8}


@pytest.fixture(scope="module")
def h100():
    return compose(["experiment=ec_dit_m_64e", "cluster=h100_ib400"], local=False)


@pytest.fixture
def said(h100, tmp_path, monkeypatch):
    """`said(values, **stand_in)`: the problems of these values on that cluster, as text."""

    def of(values: dict[str, object], **cluster: str) -> list[str]:
        StandIn(folder=tmp_path / "bin", **cluster).install(monkeypatch)
        return [str(p) for p in cluster_check.problems(with_values(h100, values).cluster, ask())]

    return of


def test_what_fits_is_not_talked_about(said):
    everything = {
        "cluster.mem": "900G",
        "cluster.constraint": "hbm80&ib",
        "cluster.account": "mine",
        "cluster.qos": "high",
    }
    assert said({**GPU, **everything, "cluster.time_limit": "2-00:00:00"}) == []
    assert said({**GPU, "cluster.nodes": 6, "cluster.exclude": "g1,g8", "cluster.mem": "0"}) == []
    assert said({**GPU, "cluster.sbatch": ("gres=gpu:h100:8",)}) == []


@pytest.mark.parametrize(("values", "problem"), [
    ({"cluster.partition": "gpus"}, "cluster.partition = 'gpus': no partition gpus here; there are cpu, gpu; nearest valid: gpu"),
    ({"cluster.nodes": 9}, "cluster.nodes = 9: partition gpu has 8 nodes; nearest valid: 8"),
    ({"cluster.nodes": 8, "cluster.exclude": "g1,g2"},
     "cluster.nodes = 8: partition gpu has 8 nodes, 2 of them excluded, and 6 of them can take this job; nearest valid: 6"),
    ({"cluster.gpus_per_node": 16, "cluster.cpus_per_gpu": 6},
     "cluster.gpus_per_node = 16: partition gpu has 8 h100 GPUs a node; nearest valid: 8"),
    ({"cluster.cpus_per_gpu": 64},
     "cluster.cpus_per_gpu = 64: times cluster.gpus_per_node = 8 asks for 512 CPUs a node; partition gpu has 96; "
     "nearest valid: 12"),
    ({"cluster.mem": "1T"}, "cluster.mem = '1T': partition gpu has 1000000M a node; nearest valid: 1000000M"),
    ({"cluster.time_limit": "3-00:00:00"},
     "cluster.time_limit = '3-00:00:00': partition gpu allows 2-00:00:00; more do cpu; nearest valid: 2-00:00:00"),
    ({"cluster.constraint": "hbm141"},
     "cluster.constraint = 'hbm141': no node here has the feature hbm141; there are hbm80, ib; nearest valid: hbm80"),
    ({"cluster.exclude": "g77"},
     "cluster.exclude = 'g77': no node g77 here; there are c1, c2, g1, g2, g3, g4 ... g8 (10); nearest valid: g7"),
    ({"cluster.reservation": "friday"}, "cluster.reservation = 'friday': no reservation friday here; there are none"),
    ({"cluster.sbatch": ("gres=gpu:a100:8",)}, "cluster.sbatch = 'gres=gpu:a100': partition gpu has no GPU a100; there are h100"),
])  # fmt: skip
def test_each_thing_that_is_not_there(values, problem, said):
    assert said({**GPU, **values}) == [problem]


def test_all_problems_at_once(said):
    found = said({"cluster.partition": "cpu", "cluster.nodes": 5, "cluster.mem": "1T", "cluster.constraint": "nvme"})
    fields = [line.partition(" ")[0] for line in found]
    assert sorted(fields) == [
        f"cluster.{name}" for name in ("constraint", "cpus_per_gpu", "gpus_per_node", "mem", "nodes")
    ]
    assert "partition cpu has no GPU a node; cluster.gpu=cpu asks for none" in "\n".join(found)


def test_limits_of_a_partition(said):
    gpu = partition("gpu", MaxNodes=4, AllowAccounts="lab,ops", DenyQos="long", MaxMemPerNode=500000, Default="YES")
    wanted = {"cluster.nodes": 6, "cluster.account": "mine", "cluster.mem": "600G"}
    assert said(wanted, partitions=gpu) == [
        "cluster.nodes = 6: partition gpu allows 4 nodes a job; nearest valid: 4",
        "cluster.account = 'mine': partition gpu takes lab, ops",
        "cluster.mem = '600G': partition gpu allows 500000M a node; nearest valid: 500000M",
    ]
    (line,) = said({**GPU, "cluster.nodes": 1, "cluster.qos": "long", "cluster.account": "Lab"}, partitions=gpu)
    assert line == "cluster.qos = 'long': partition gpu takes all but long"
    (line,) = said({**GPU, "cluster.nodes": 1}, partitions=partition("gpu", State="DOWN"))
    assert line == "cluster.partition = 'gpu': partition gpu is DOWN and starts no jobs"


@pytest.fixture
def told(h100, tmp_path, monkeypatch):
    """`told(values, **stand_in)`: (problems, notes)."""

    def of(values: dict[str, object], **cluster: str) -> tuple[list[str], list[str]]:
        StandIn(folder=tmp_path / "bin", **cluster).install(monkeypatch)
        config = with_values(h100, values).cluster
        return [str(p) for p in cluster_check.problems(config, ask())], cluster_check.notes(config, ask())

    return of


def test_no_partition_was_named(told, monkeypatch):
    """A plugin of Slurm may send the job to any that fits; only where none does it is refused."""
    gpu, cpu = partition("gpu"), partition("cpu")
    assert told({"cluster.nodes": 8}, partitions=partition("gpu", Default="YES") + cpu) == ([], [])
    problems, (note,) = told({"cluster.nodes": 8}, partitions=cpu + gpu)
    assert problems == []
    assert note.endswith(
        "cluster.partition = None: is needed: this cluster has no default partition; there are cpu, gpu; nearest valid: gpu"
    )
    default = partition("cpu", Default="YES") + gpu
    problems, notes = told({"cluster.nodes": 2}, partitions=default)
    assert problems == []
    assert "partition cpu has no GPU a node" in "\n".join(notes)
    problems, _ = told({"cluster.nodes": 9}, partitions=default)
    assert problems != []
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    assert told({"cluster.nodes": 8}, partitions=cpu + gpu) == ([], [])
    problems, _ = told({"cluster.nodes": 9}, partitions=cpu + gpu)
    assert problems == ["cluster.nodes = 9: partition gpu has 8 nodes; nearest valid: 8"]
    monkeypatch.setenv("SBATCH_PARTITION", "gpx")
    assert "no partition gpx here (SBATCH_PARTITION)" in told({}, partitions=cpu + gpu)[0][0]


def test_a_qos_may_allow_more_than_the_partition(told):
    small = partition("gpu", MaxNodes=4, MaxTime="02:00:00", AllowQos="Wide")
    values = {**GPU, "cluster.time_limit": "1-00:00:00"}
    assert [line.partition(" ")[0] for line in told(values, partitions=small)[0]] == [
        "cluster.time_limit",
        "cluster.nodes",
    ]
    problems, notes = told({**values, "cluster.qos": "wide"}, partitions=small)
    assert problems == []
    assert [line.split(": ")[1].partition(" ")[0] for line in notes] == ["cluster.time_limit", "cluster.nodes"]


@pytest.mark.parametrize(
    "constraint", ["80gb", "GPU_MEM:80GB", "80gb&1g", "[v5*8]", "[v5*4&1g*4]", "a=b/c|80gb", "80gb,v5"]
)
def test_features_as_sites_name_them(constraint, h100, said):
    nodes = GPU_NODES.replace("hbm80,ib", "80gb,h100-80gb,GPU_MEM:80GB,v5,1g,a=b/c")
    values = {**GPU, "cluster.constraint": constraint}
    validate(with_values(h100, values), world=64)
    assert said(values, nodes=nodes) == []
    assert "no node here has the feature 80gp" in said({**GPU, "cluster.constraint": "80gp"}, nodes=nodes)[0]


def test_reservations(said):
    two = {**GPU, "cluster.reservation": "friday,night"}
    listed = "echo 'ReservationName=friday StartTime=x'; echo 'ReservationName=night StartTime=x'"
    assert said(two, reservations=listed) == []
    (line,) = said(two, reservations="echo 'ReservationName=friday StartTime=x'")
    assert "no reservation night here; there are friday" in line
    assert said(two, reservations="exit 1") == [], "Slurm did not say"


def test_of_several_partitions_one_is_enough(said):
    assert said({**GPU, "cluster.partition": "cpu,gpu"}) == []
    assert "no partition gpo here" in said({**GPU, "cluster.partition": "gpu,gpo"})[0]
    assert said({**GPU, "cluster.partition": "cpu,gpu", "cluster.nodes": 9}) == [
        "cluster.nodes = 9: partition gpu has 8 nodes; nearest valid: 8"
    ]


def test_nodes_that_are_away_now_make_it_wait_and_names_alone_are_no_nodes(h100, tmp_path, monkeypatch):
    nodes = CPU_NODES + GPU_NODES.replace("|idle", "|down*", 2) + "g9|gpu|96|1000000|gpu:h100:8|hbm80,ib|future\n"
    StandIn(folder=tmp_path / "bin", nodes=nodes).install(monkeypatch)
    eight = with_values(h100, GPU).cluster
    assert cluster_check.problems(eight, ask()) == []
    assert cluster_check.notes(eight, ask()) == [
        "partition gpu: 8 nodes are asked for, 6 of 8 that fit are up: the job waits"
    ]
    assert cluster_check.problems(with_values(h100, {**GPU, "cluster.nodes": 9}).cluster, ask()) != []


def test_one_node_too_small_does_not_hide_the_others(said):
    """Seven nodes have the memory."""
    nodes = GPU_NODES.replace("1000000", "500000", 1)
    assert said({**GPU, "cluster.mem": "900G", "cluster.nodes": 7}, nodes=nodes) == []
    assert said({**GPU, "cluster.mem": "900G"}, nodes=nodes) == [
        "cluster.nodes = 8: partition gpu has 8 nodes, and 7 of them can take this job; nearest valid: 7"
    ]


# --- when Slurm does not answer ----------------------------------------------------------------------------------------


def test_no_slurm_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnknownClusterError, match="there is no scontrol on this machine"):
        ask()


def test_a_controller_that_is_away(tmp_path, monkeypatch):
    StandIn(folder=tmp_path).install(monkeypatch)
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'slurm_load_partitions: Unable to contact' >&2\nexit 1\n")
    with pytest.raises(UnknownClusterError, match="scontrol said: slurm_load_partitions: Unable to contact"):
        ask()
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(cluster_facts, "SECONDS", 0.3)
    with pytest.raises(UnknownClusterError, match=r"scontrol did not answer within 0\.3 s"):
        ask()


def test_an_answer_that_says_nothing(tmp_path, monkeypatch):
    StandIn(folder=tmp_path, partitions="", nodes="what\n").install(monkeypatch)
    with pytest.raises(UnknownClusterError, match="names no partition with nodes"):
        ask()


# --- Slurm's notation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gres", "gpus"), [
    ("(null)", {}),
    ("gpu:8", {"": 8}),
    ("gpu:h100:8(S:0-1)", {"h100": 8}),
    ("gpu:a100_80:4,nvme:1,gpu:t4:2", {"a100_80": 4, "t4": 2}),
    ("gpu", {"": 1}),
    ("gpu:nvidia_h100_80gb_hbm3:8", {"nvidia_h100_80gb_hbm3": 8}),
    ("gpu:4090:8", {"4090": 8}),
    ("mygpu:3", {}),
])  # fmt: skip
def test_gres(gres, gpus):
    assert gpus_of(gres) == gpus


@pytest.mark.parametrize(("text", "seconds"), [
    ("UNLIMITED", None), ("1-00:00:00", 86400), ("02:00:00", 7200), ("30:00", 1800), ("30", 1800), ("2-12", 216000),
    ("2-12:30", 217800),
])  # fmt: skip
def test_times(text, seconds):
    assert seconds_of(text) == seconds
    assert seconds_of(clock(seconds)) == seconds
