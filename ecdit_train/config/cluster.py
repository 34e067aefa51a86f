"""A machine room. Fields are grouped as a reader meets them: what it is, what a job asks for, what runs it, how it comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """A machine room: what `ecdit plan` computes with and `ecdit launch` submits to."""

    name: str
    """Name in plans and logs."""
    nodes: int
    """Nodes of a job; experiments set their own."""
    gpus_per_node: int
    """GPUs (processes) per node."""
    gpu: str
    """GPU model; cpu asks Slurm for no GPU."""
    gpu_memory: float
    """Bytes per GPU."""
    peak_flops: float
    """Dense bf16 FLOP/s per GPU; MFU is stated against it in any precision."""
    peak_fp8_flops: float
    """Dense FLOP/s per GPU of 8-bit operands; 0: it has no units for them."""
    gemm_efficiency: float
    """Share of the peak that a large matrix product reaches."""
    memory_bandwidth: float
    """Bytes/s of device memory (reached, not printed on the box)."""
    intra_bandwidth: float
    """Bytes/s one way per GPU inside a node (NVLink)."""
    inter_bandwidth: float
    """Bytes/s one way per GPU between nodes (InfiniBand)."""
    call_latency: float
    """Seconds that a collective takes before its first byte moves."""
    intra_latency: float
    """Seconds of a step from one GPU to another inside a node."""
    inter_latency: float
    """Seconds of a step from one GPU to another across nodes."""

    partition: str | None
    """Slurm partition, or several as `a,b`; null takes Slurm's default."""
    account: str | None
    """Slurm account; null leaves the line out, as with the keys below."""
    qos: str | None
    """Slurm quality of service."""
    time_limit: str
    """Slurm time limit of one attempt of the job, HH:MM:SS or D-HH:MM:SS."""
    signal_lead: int
    """Seconds before the limit at which Slurm sends USR2, so that the run saves and asks to be requeued."""
    cpus_per_gpu: int
    """CPU cores per GPU."""
    mem: str | None
    """Memory per node as `--mem` takes it, 400G; `0` is all of the node's."""
    exclusive: bool
    """Whether the nodes are shared with no other job."""
    exclude: str | None
    """Nodes that the job must not get, as `n3,n[7-9]`."""
    constraint: str | None
    """Features that the nodes must have, as `hbm80&ib`."""
    reservation: str | None
    """Slurm reservation."""
    dependency: str | None
    """Jobs to wait for, as `afterok:1234`."""
    array: str | None
    """Several jobs of this run one after another, as `0-4%1`; for several runs use `-m`."""
    mail_user: str | None
    """Whom Slurm writes to."""
    mail_type: str | None
    """What about, as `FAIL,REQUEUE`."""
    sbatch: tuple[str, ...]
    """Further flags of sbatch, `name=value` or `name`; those that another key sets are refused with that key."""

    python: str | None
    """Interpreter of the ranks; null: this one, in a container `python`."""
    job_python: str | None
    """Interpreter that supervises the job on its first node, Python 3.11 or later; null: this one."""
    container: str | None
    """Image of the ranks; null runs them on the node itself."""
    container_kind: Literal["pyxis", "apptainer"]
    """What starts the image: `srun --container-image` (pyxis/enroot) or `apptainer exec`."""
    mounts: tuple[str, ...]
    """Folders that the container sees beside what the run needs, `/outside:/inside` or `/same`."""
    modules: tuple[str, ...]
    """`module load` lines of the job script."""
    env: tuple[str, ...]
    """NAME=value lines exported in the job script; never a secret."""
    interface: str | None
    """Network interface between nodes, as ib0; null: the one with the route to the first node."""

    lives_without_progress: int
    """Lives in a row without a newer checkpoint after which the job stops with exit code 76."""
    lives: int
    """Lives of a job in total; those that were preempted do not count."""
    back_off: tuple[float, ...]
    """Seconds to wait before the first, second, ... try in a row; the last one again for all after it."""
    bad_node: Literal["exclude", "drain", "keep"]
    """What to do with a node that failed: keep the job off it, drain it in Slurm too (needs an operator's rights), or nothing."""
    preflight_bandwidth: float
    """Bytes/s that an all-reduce between the nodes must reach before the first step; 0 does not measure it."""
