"""Tells whether ports are free, and who holds those that are not (Linux)."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING

from kvfetcher.errors import ServerError

if TYPE_CHECKING:
    from kvfetcher.config import ServerConfig

_LISTEN = "0A"


def check_ports(config: ServerConfig) -> None:
    """Make sure that the server's three ports differ and can be bound now.

    Raises:
        ServerError: naming port, holder and setting.
    """
    ports = {
        "http_port": config.http_port,
        "grpc_port": config.grpc_port,
        "metrics_port": config.metrics_port,
    }
    for name, port in ports.items():
        twin = next((n for n, p in ports.items() if p == port and n != name), None)
        if twin is not None:
            raise ServerError(f"server.{name} and server.{twin} are both {port}; make them differ")
        try:
            _bind(bind_address(config.host), port)
        except OSError as exc:
            raise ServerError(
                f"port {port} of {config.host} (server.{name}) cannot be bound: {exc.strerror}"
                f"{_holder_text(port)}; stop that process, or choose another port (--{name[:-5]}"
                f"-port, or KVFETCHER_SERVER_{name.upper()})"
            ) from exc


def bind_address(host: str) -> str:
    """The IPv4 address that tritonserver is to bind to.

    tritonserver (2.51) takes a name for 255.255.255.255 at its HTTP endpoint, and an IPv6 address
    for none at all.

    Raises:
        ServerError: the host has no IPv4 address, or is no host.
    """
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise ServerError(
            f"server.host = {host!r} is not an IPv4 address of this machine, nor a name of one"
            f" ({exc.strerror if isinstance(exc, OSError) else exc}); tritonserver binds to IPv4 only:"
            " give 127.0.0.1, 0.0.0.0 for all, or another one"
        ) from exc
    return str(found[0][4][0])


def port_holder(port: int) -> tuple[int, str] | None:
    """(process id, command) of the process that listens on a TCP port.

    None where nobody does, or where this user may not see who.
    """
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(link.readlink()) in inodes for link in (process / "fd").iterdir()):
                return int(process.name), (process / "comm").read_text().strip()
        except OSError:  # another user's, or it ended
            continue
    return None


def _bind(host: str, port: int) -> None:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        # As the server does: connections of a server that just stopped are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def _holder_text(port: int) -> str:
    holder = port_holder(port)
    return f" (held by {holder[1]}, process {holder[0]})" if holder else ""
