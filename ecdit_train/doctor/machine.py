"""What ranks need of a machine beside its GPUs: names, ports, shared memory, open files."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

from ecdit_train.doctor.findings import Check, Finding, fail, ok, warning
from launch import interface

SHM = Path("/dev/shm")
SHM_BYTES = 1 << 30
"""NCCL and gloo pass messages between the ranks of a machine through it; containers give 64 MB by default."""
FILES = 1024
CONNECT_SECONDS = 5.0


def checks(*, wanted_interface: str | None, nodes: int) -> list[Check]:
    return [
        Check(
            what="host name",
            ask=lambda: host_name(nodes=nodes),
            hangs="a name server does not answer: /etc/resolv.conf",
        ),
        Check(what="port", ask=port),
        Check(what="interface", ask=lambda: interfaces(wanted_interface)),
        Check(what="shared memory", ask=shared_memory),
        Check(what="open files", ask=open_files),
    ]


def host_name(*, nodes: int) -> Iterator[Finding]:
    """Ranks on other machines meet at the first one's name."""
    name = socket.gethostname()
    judge = fail if nodes > 1 else warning
    fix = (
        f"give {name} an address of this machine in /etc/hosts or the name server; ranks of several nodes meet by name"
    )
    try:
        found = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        yield judge("host name", f"{name} does not resolve: {error}", fix)
        return
    own = {*interface.addresses().values(), "::1"}
    if any(address in own or address.startswith("127.") or ":" in address for address in found):
        yield ok("host name", f"{name} is {', '.join(found)}")
    else:
        yield judge("host name", f"{name} is {', '.join(found)}, which is no address of this machine", fix)


def port() -> Iterator[Finding]:
    """A free one can be bound and reached: at the address of the host's name, else at loopback."""
    fix = "a firewall or a sandbox forbids it: ask for ports 20000 to 30000 between and inside nodes"
    with socket.socket() as server:
        try:
            server.bind(("", 0))
            server.listen(1)
        except OSError as error:
            yield fail("port", f"none can be bound: {error}", fix)
            return
        number = server.getsockname()[1]
        for host in (socket.gethostname(), "127.0.0.1"):
            try:
                with socket.create_connection((host, number), timeout=CONNECT_SECONDS):
                    yield ok("port", f"{number} was bound and reached at {host}")
                    return
            except OSError as error:
                said = f"{number} was bound, and cannot be reached at {host}: {error}"
        yield fail("port", said, fix)


def interfaces(wanted: str | None) -> Iterator[Finding]:
    there = interface.addresses()
    listed = ", ".join(f"{name} {address}" for name, address in there.items()) or "none with an IPv4 address"
    if wanted is not None and wanted not in there:
        fix = "cluster.interface must be its name on the compute nodes (null finds it); if only this machine lacks it, all is well"
        yield warning("interface", f"{wanted} is not here; there are {listed}", fix)
    else:
        yield ok("interface", listed)


def shared_memory(folder: Path = SHM) -> Iterator[Finding]:
    fix = "a container's default is 64 MB: docker run --shm-size=16g, or mount the host's /dev/shm"
    try:
        size = os.statvfs(folder)
    except OSError as error:
        yield fail("shared memory", f"{folder}: {error}", "mount a tmpfs there")
        return
    free, total = size.f_bavail * size.f_frsize, size.f_blocks * size.f_frsize
    found = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free in {folder}"
    yield ok("shared memory", found) if free >= SHM_BYTES else warning("shared memory", found, fix)


def open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = soft == resource.RLIM_INFINITY or soft >= FILES
    found = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} (hard limit {hard})"
    yield (
        ok("open files", found)
        if many
        else warning("open files", found, f"ulimit -n {FILES}, or more, in the shell that launches")
    )
