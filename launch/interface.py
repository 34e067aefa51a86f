"""The network interface that ranks of several nodes talk over, where nobody has said."""

from __future__ import annotations

import fcntl
import socket
import struct

GET_ADDRESS = 0x8915
"""SIOCGIFADDR of Linux."""
NEVER = ("lo", "docker", "virbr", "cni", "veth")


def towards(host: str, *, port: int) -> str | None:
    """The interface with the route to `host`; None if that cannot be told, or is one of this machine alone. Sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect((host, port))
            address = s.getsockname()[0]
    except OSError:
        return None
    name = next((name for name, has in addresses().items() if has == address), None)
    return None if name is None or name.startswith(NEVER) else name


def addresses() -> dict[str, str]:
    """The IPv4 address of every interface that has one."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(s.fileno(), GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def variables(name: str) -> dict[str, str]:
    """What NCCL and gloo read; NCCL takes a bare name for the beginning of one."""
    return {"NCCL_SOCKET_IFNAME": f"={name}", "GLOO_SOCKET_IFNAME": name}
