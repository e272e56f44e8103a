"""A network link of an asked-for quality between a client and a server on one machine.

    with ShapedLink(("127.0.0.1", 6379), LinkShape(gbit_per_second=0.1, rtt_seconds=0.02)) as link:
        ...                                     # connect to link.host, link.port
        link.reshape(LinkShape(is_stalled=True))

Three links behind one interface:

* `ShapedLink`: a TCP proxy in a process of its own. Needs nothing. Rate, delay, jitter, stalls,
  resets, short reads, slow-loris and HTTP errors; changed at run time over a control socket.
* `KernelLink`: the same, but the rate is the kernel's (``tc tbf`` on a veth pair into a network
  namespace). Needs root and iproute2; `kernel_link_problem` says what is missing.
* `NamespaceLink`: no proxy at all: the server itself runs in the namespace (`NamespaceLink.inside`).
  Rate by ``tbf``, delay and jitter by ``netem`` where the kernel has it, nothing else. For rates that
  a proxy cannot carry.

`require_rate` measures the asked rate once and raises where this machine does not reach it.

The model of all is one bottleneck: every connection shares the rate, each way has a rate of its
own, and bytes leave in the order in which they came. This file is also the proxy's program; it
imports nothing but the standard library.

Measured on two cores of a Xeon: the proxy holds the asked rate within 1 % up to 5 Gbit/s and ends
at 8 to 10; a KernelLink, which has the same proxy behind it, within 6 % up to 5 and ends at 8. A
NamespaceLink held 1 and 5 within 1 %, 10 within 5 % and reached 17 of 40, other work beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

_START_SECONDS = 15.0
_CONTROL_SECONDS = 5.0

# One read is what the link carries in 2 ms, within these bounds: small enough that connections
# take turns at low rates, large enough that Python is not the bottleneck at high ones.
_READ_SECONDS = 0.002
_MIN_READ_BYTES = 4 << 10
_MAX_READ_BYTES = 1 << 20

# Bytes that one connection may have inside the link beyond rate times delay. Timers of the event
# loop come up to 1 ms late; what is queued meanwhile keeps the link busy.
_SLACK_SECONDS = 0.02

_DRIP_SECONDS = 0.05

_LOOPBACK = "127.0.0.1"
_MEASURE_SECONDS = 0.5
# The kernel's links count headers: 4.4 % at an MTU of 1500.
_TOLERANCE = 0.15
# Fewer packets for the same bytes, and headers that do not count.
_LARGE_MTU = 65_000
# Packets that netem may hold: 10 ms at 40 Gbit/s, in segments of 1500 bytes.
_NETEM_PACKETS = 40_000
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, slots=True)
class LinkShape:
    """Quality of a link.

    Attributes:
        gbit_per_second: rate of each way, shared by all connections; 0 = as fast as it goes.
        rtt_seconds: round-trip time; half of it each way, and one to open a connection.
        jitter_seconds: each read is delayed by up to so much more, each way; order is kept.
        is_stalled: nothing passes, connections stay open.
        is_down: connections are reset at once, open ones too.
        cut_after_bytes: a connection ends after so many bytes towards the client; 0 = never.
        cut: how: ``reset`` (an error) or ``close`` (a short read).
        drip_bytes_per_second: at most so fast towards the client on each connection; 0 = no bound.
        http_status: what comes from a client is answered with this status instead of passed on
            (and its connection closed); 0 = passed on.
    """

    gbit_per_second: float = 0.0
    rtt_seconds: float = 0.0
    jitter_seconds: float = 0.0
    is_stalled: bool = False
    is_down: bool = False
    cut_after_bytes: int = 0
    cut: str = "reset"
    drip_bytes_per_second: int = 0
    http_status: int = 0

    def __post_init__(self) -> None:
        for name in ("gbit_per_second", "rtt_seconds", "jitter_seconds"):
            if not 0 <= getattr(self, name) < 1e6:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.cut not in ("reset", "close"):
            raise ValueError(f"cut must be reset or close, got {self.cut!r}")

    @property
    def bytes_per_second(self) -> float:
        return self.gbit_per_second * 1e9 / 8


@dataclass(frozen=True, slots=True)
class LinkStats:
    """What has passed since the start.

    Attributes:
        connections: accepted.
        cut: ended by the link: reset, closed early, or answered by it.
        bytes_up: from clients to the server.
        bytes_down: from the server to clients.
    """

    connections: int
    cut: int
    bytes_up: int
    bytes_down: int


class ShapedLink:
    """The proxy process as a context manager. Not thread-safe.

    Args:
        target: host and port of the server; it need not listen yet.
        shape: quality to begin with.
        seed: of the jitter.

    Attributes:
        host, port: where clients connect.
    """

    def __init__(
        self, target: tuple[str, int], shape: LinkShape | None = None, *, seed: int = 0
    ) -> None:
        self._target = target
        self._shape = shape or LinkShape()
        self._seed = seed
        self.host = _LOOPBACK
        self.port = 0

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="link-")
        self._control = str(Path(self._folder.name) / "control")
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._prepare()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
        self._tear_down()
        self._folder.cleanup()

    def reshape(self, shape: LinkShape) -> None:
        """Change the link; holds for what enters it from now on (stalls, cuts: at once)."""
        self._shape = shape
        self._ask({"shape": asdict(self._proxy_shape())})

    def stats(self) -> LinkStats:
        return LinkStats(**self._ask({"stats": True}))

    def reached_gbit_per_second(self, *, seconds: float = _MEASURE_SECONDS) -> float:
        """What a link of this kind and rate carries on this machine, measured on a twin."""
        rate = LinkShape(gbit_per_second=self._shape.gbit_per_second)
        with (
            socket.create_server((_LOOPBACK, 0)) as listener,
            type(self)(listener.getsockname(), rate) as twin,
        ):
            return _reached(listener, (twin.host, twin.port), seconds)

    def require_rate(self, *, seconds: float = _MEASURE_SECONDS) -> float:
        """Measure; the rate in Gbit/s.

        Raises:
            RuntimeError: this machine does not reach what is asked for.
        """
        asked = self._shape.gbit_per_second
        reached = self.reached_gbit_per_second(seconds=seconds)
        if reached < (1 - _TOLERANCE) * asked:
            raise RuntimeError(
                f"a {type(self).__name__} of {asked:g} Gbit/s was asked for, this machine reached"
                f" {reached:.3g}; ask for less, use a NamespaceLink, or a machine with free cores"
            )
        return reached

    def _prepare(self) -> None:
        """Hook: before the process starts."""

    def _tear_down(self) -> None:
        """Hook: after the process ended."""

    def _proxy_shape(self) -> LinkShape:
        """What the process does; the rest is done elsewhere."""
        return self._shape

    def _namespace(self) -> str:
        """Network namespace of the clients' side; "" = this one."""
        return ""

    def _start(self) -> None:
        host, port = self._target
        command = [
            *(sys.executable, "-I", str(Path(__file__).resolve())),
            *("--target-host", host, "--target-port", str(port), "--host", self.host),
            *("--control", self._control, "--namespace", self._namespace()),
            *("--seed", str(self._seed), "--shape", json.dumps(asdict(self._proxy_shape()))),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        # The process prints one short line or ends: both wake this wait.
        if not select.select([self._process.stdout], [], [], _START_SECONDS)[0] or not (
            line := self._process.stdout.readline()
        ):
            raise RuntimeError(f"the link's process did not start: {' '.join(command)}")
        self.port = int(line)

    def _ask(self, message: dict) -> dict:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_CONTROL_SECONDS)
            connection.connect(self._control)
            connection.sendall(json.dumps(message).encode() + b"\n")
            with connection.makefile("rb") as replies:
                return json.loads(replies.readline())


class KernelLink(ShapedLink):
    """A link whose rate is the kernel's; everything else as `ShapedLink`.

    Clients reach the proxy through a veth pair into a network namespace; ``tbf`` shapes what comes
    out of the namespace (towards the client) and what goes in, headers included: payload gets 95.6 % of
    the rate at an MTU of 1500.
    """

    _numbers = count()
    _name = ""

    def _prepare(self) -> None:
        if problem := kernel_link_problem():
            raise RuntimeError(problem)
        number = os.getpid() % 4096 * 16 + next(self._numbers) % 16
        self._name = f"kvl{number}"
        # 198.18.0.0/15 is reserved for benchmarks (RFC 2544): nobody routes it.
        base = f"198.{18 + (number >> 15 & 1)}.{number >> 7 & 255}."
        low = (number & 127) << 1
        self.host = f"{base}{low | 1}"
        here = f"{base}{low}"
        inner = f"{self._name}i"
        _run("ip", "netns", "add", self._name)
        _run("ip", "link", "add", self._name, "type", "veth", "peer", "name", inner)
        _run("ip", "link", "set", inner, "netns", self._name)
        _run("ip", "addr", "add", f"{here}/31", "dev", self._name)
        _run("ip", "link", "set", self._name, "up")
        _run("ip", "-n", self._name, "addr", "add", f"{self.host}/31", "dev", inner)
        _run("ip", "-n", self._name, "link", "set", inner, "up")
        self._shape_kernel()

    def reshape(self, shape: LinkShape) -> None:
        super().reshape(shape)
        self._shape_kernel()

    def _tear_down(self) -> None:
        if self._name:
            for command in (["link", "del", self._name], ["netns", "del", self._name]):
                subprocess.run(["ip", *command], check=False, capture_output=True)

    def _namespace(self) -> str:
        return self._name

    def _proxy_shape(self) -> LinkShape:
        return replace(self._shape, gbit_per_second=0.0)

    def _shape_kernel(self) -> None:
        sides = ([], self._name), (["-n", self._name], f"{self._name}i")
        for where, device in sides:
            subprocess.run(
                ["tc", *where, "qdisc", "del", "dev", device, "root"],
                check=False, capture_output=True,
            )  # fmt: skip
            parent = self._delay_kernel(where, device)
            if not self._shape.gbit_per_second:
                continue
            rate = self._shape.bytes_per_second
            # The kernel refills the bucket at its timer; 2 ms of the rate, and one 64 KiB packet
            # of segmentation offload, must fit or the rate is missed.
            burst = int(max(128 << 10, rate * 0.002))
            limit = burst + int(max(256 << 10, rate * 0.02))
            _run(
                "tc", *where, "qdisc", "add", "dev", device, *parent, "tbf",
                "rate", f"{int(rate)}bps", "burst", str(burst), "limit", str(limit),
            )  # fmt: skip

    def _delay_kernel(self, where: list[str], device: str) -> list[str]:
        """Hook: delay what leaves by `device`; where the rate's queue is attached."""
        return ["root"]


class NamespaceLink(KernelLink):
    """A link without a proxy: the server is started inside its namespace.

        with NamespaceLink(port, LinkShape(gbit_per_second=20)) as link:
            subprocess.Popen([*link.inside, "redis-server", "--bind", link.host, "--port", ...])

    Args:
        port: where the server will listen.
        shape: rate, round trip and jitter; nothing else can be asked for.

    Attributes:
        inside: a command that starts with these words runs in the namespace.
    """

    def __init__(self, port: int, shape: LinkShape | None = None) -> None:
        super().__init__(("", port), shape)
        self._refuse_other(self._shape)

    @property
    def inside(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self._name)

    def reshape(self, shape: LinkShape) -> None:
        self._refuse_other(shape)
        self._shape = shape
        self._shape_kernel()

    def stats(self) -> LinkStats:
        raise NotImplementedError("only a proxy counts")

    def reached_gbit_per_second(self, *, seconds: float = _MEASURE_SECONDS) -> float:
        """What this link carries, with its delay."""
        with _inside(self._name):
            listener = socket.create_server((self.host, 0))
        with listener:
            return _reached(listener, listener.getsockname(), seconds)

    def _start(self) -> None:
        _run("ip", "-n", self._name, "link", "set", "lo", "up")
        for where, device in ([], self._name), (["-n", self._name], f"{self._name}i"):
            _run("ip", *where, "link", "set", device, "mtu", str(_LARGE_MTU))
        self.port = self._target[1]

    def _delay_kernel(self, where: list[str], device: str) -> list[str]:
        shape = self._shape
        if not (shape.rtt_seconds or shape.jitter_seconds):
            return ["root"]
        delay = [f"{1e3 * shape.rtt_seconds / 2:.3f}ms"]
        if shape.jitter_seconds:
            # netem's jitter goes both ways from its delay, ours is added.
            half = 1e3 * shape.jitter_seconds / 2
            delay = [f"{1e3 * shape.rtt_seconds / 2 + half:.3f}ms", f"{half:.3f}ms"]
        try:
            _run(
                "tc", *where, "qdisc", "add", "dev", device, "root", "handle", "1:", "netem",
                "delay", *delay, "limit", str(_NETEM_PACKETS),
            )  # fmt: skip
        except RuntimeError as exc:
            raise RuntimeError(
                f"delay and jitter without a proxy need the kernel's netem: {exc}"
            ) from exc
        return ["parent", "1:1", "handle", "2:"]

    @staticmethod
    def _refuse_other(shape: LinkShape) -> None:
        plain = LinkShape(shape.gbit_per_second, shape.rtt_seconds, shape.jitter_seconds)
        if shape != plain:
            raise ValueError(
                "a NamespaceLink has a rate, a round trip and jitter; stalls, cuts and answers must"
                f" come from a ShapedLink or KernelLink, got {shape}"
            )


def _reached(listener: socket.socket, address: tuple[str, int], seconds: float) -> float:
    """Gbit/s that a connection to `address`, which ends at `listener`, carries for so long."""

    def send() -> None:
        with contextlib.suppress(OSError):  # the reader has seen enough
            to, _ = listener.accept()
            with to:
                block = bytes(_MAX_READ_BYTES)
                while True:
                    to.sendall(block)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    buffer = bytearray(4 * _MAX_READ_BYTES)
    with socket.create_connection(address, timeout=_CONTROL_SECONDS) as connection:
        # What the rate's bucket lets through at once does not count.
        warm = time.monotonic() + seconds / 4
        while time.monotonic() < warm:
            connection.recv_into(buffer)
        num_bytes, begun = 0, time.monotonic()
        while (now := time.monotonic()) < begun + seconds:
            num_bytes += connection.recv_into(buffer)
    sender.join(_CONTROL_SECONDS)
    return num_bytes * 8e-9 / (now - begun)


def kernel_link_problem() -> str:
    """Why `KernelLink` cannot work here; "" if it can."""
    if os.geteuid() != 0:
        return "a KernelLink needs root: it makes a network namespace"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"a KernelLink needs `{tool}` (Debian: apt-get install iproute2)"
    name = f"kvlprobe{os.getpid() % 4096}"
    try:
        _run("ip", "netns", "add", name)
    except RuntimeError as exc:
        return f"network namespaces are not allowed here: {exc}"
    try:
        _run("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "tbf",
             "rate", "1mbit", "burst", "10kb", "limit", "10kb")  # fmt: skip
    except RuntimeError as exc:
        return f"the kernel has no tbf: {exc}"
    finally:
        _run("ip", "netns", "del", name)
    return ""


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


# --- the proxy's process ---------------------------------------------------------------------


class _Way:
    """One way of the link: bytes leave in the order in which they came, at the link's rate."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._free_at = 0.0

    def reserve(self, num_bytes: int, shape: LinkShape) -> float:
        """When the last of these bytes leaves the bottleneck, on `time.monotonic`."""
        self.num_bytes += num_bytes
        start = max(self._free_at, time.monotonic())
        seconds = num_bytes / shape.bytes_per_second if shape.gbit_per_second else 0.0
        self._free_at = start + seconds
        return self._free_at


class _Link:
    """What all connections share."""

    def __init__(self, shape: LinkShape, seed: int) -> None:
        self.up, self.down = _Way(), _Way()
        self.connections = self.cut = 0
        self.open: set[_Connection] = set()
        self.random = random.Random(seed)
        self.changed = asyncio.Event()
        self.shape = shape

    def reshape(self, shape: LinkShape) -> None:
        self.shape = shape
        self.changed.set()
        self.changed = asyncio.Event()
        if shape.is_down:
            for connection in list(self.open):
                connection.end(reset=True)

    def stats(self) -> LinkStats:
        return LinkStats(self.connections, self.cut, self.up.num_bytes, self.down.num_bytes)


class _Connection:
    """One client's connection and its twin to the server."""

    def __init__(self, link: _Link, client: socket.socket, target: tuple[str, int]) -> None:
        self._link = link
        self._client = client
        self._target = target
        self._server: socket.socket | None = None
        self._opened = time.monotonic()
        self._delivered_bytes = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def serve(self) -> None:
        self._link.connections += 1
        self._link.open.add(self)
        try:
            if self._link.shape.is_down:
                self.end(reset=True)
                return
            loop = asyncio.get_running_loop()
            self._server = socket.socket()
            self._server.setblocking(False)
            self._server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(self._server, self._target)
            self._tasks = [
                asyncio.create_task(self._carry(self._client, self._server, is_down=False)),
                asyncio.create_task(self._carry(self._server, self._client, is_down=True)),
            ]
            await asyncio.gather(*self._tasks)
        except (OSError, asyncio.CancelledError):
            self.end(reset=True)
        finally:
            self._link.open.discard(self)
            for task in self._tasks:
                task.cancel()
            for each in (self._client, self._server):
                if each is not None:
                    each.close()

    def end(self, *, reset: bool) -> None:
        """End the connection from the link's side."""
        if self._client.fileno() >= 0:
            self._link.cut += 1
            if reset:  # linger 0: close sends RST and drops what is queued
                self._client.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
            for task in self._tasks:
                task.cancel()
            self._client.close()

    async def _carry(self, source: socket.socket, sink: socket.socket, *, is_down: bool) -> None:
        """Read, hold back for as long as the link takes, write; both run at once."""
        queue: deque[tuple[float, bytes | memoryview]] = deque()
        state = _Queue()
        writer = asyncio.create_task(self._write(queue, state, sink, is_down=is_down))
        try:
            await self._read(queue, state, source, is_down=is_down)
            await writer
        finally:
            writer.cancel()

    async def _read(
        self,
        queue: deque[tuple[float, bytes | memoryview]],
        state: _Queue,
        source: socket.socket,
        *,
        is_down: bool,
    ) -> None:
        loop = asyncio.get_running_loop()
        way = self._link.down if is_down else self._link.up
        while True:
            shape = self._link.shape
            size = int(shape.bytes_per_second * _READ_SECONDS) or _MAX_READ_BYTES
            data = await loop.sock_recv(source, min(max(size, _MIN_READ_BYTES), _MAX_READ_BYTES))
            shape = self._link.shape
            if not data:
                state.is_ended = True
                state.wake.set()
                return
            if shape.http_status and not is_down:
                await self._answer(shape.http_status)
                return
            due = way.reserve(len(data), shape) + shape.rtt_seconds / 2
            due += self._link.random.uniform(0, shape.jitter_seconds)
            if not is_down:  # the handshake of TCP
                due = max(due, self._opened + shape.rtt_seconds * 1.5)
            queue.append((due, data))
            state.num_bytes += len(data)
            state.wake.set()
            delay = shape.rtt_seconds / 2 + shape.jitter_seconds + _SLACK_SECONDS
            window = max(shape.bytes_per_second * delay, 2 * len(data))
            if not shape.gbit_per_second:
                window = 4 * _MAX_READ_BYTES
            while state.num_bytes > window:
                state.room.clear()
                await state.room.wait()

    async def _write(
        self,
        queue: deque[tuple[float, bytes | memoryview]],
        state: _Queue,
        sink: socket.socket,
        *,
        is_down: bool,
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not queue:
                if state.is_ended:
                    with contextlib.suppress(OSError):
                        sink.shutdown(socket.SHUT_WR)
                    return
                state.wake.clear()
                await state.wake.wait()
            due, data = queue.popleft()
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            while self._link.shape.is_stalled:
                await self._link.changed.wait()
            if is_down:
                await self._deliver(memoryview(data))
            else:
                await loop.sock_sendall(sink, data)
            state.num_bytes -= len(data)
            state.room.set()

    async def _deliver(self, data: memoryview) -> None:
        """To the client: slowly, and cut where the shape says so."""
        loop = asyncio.get_running_loop()
        while data:
            shape = self._link.shape
            size = len(data)
            if shape.drip_bytes_per_second:
                size = min(size, max(1, int(shape.drip_bytes_per_second * _DRIP_SECONDS)))
            if shape.cut_after_bytes:
                size = min(size, max(0, shape.cut_after_bytes - self._delivered_bytes))
            if size:
                await loop.sock_sendall(self._client, data[:size])
                self._delivered_bytes += size
                data = data[size:]
            if shape.cut_after_bytes and self._delivered_bytes >= shape.cut_after_bytes:
                self.end(reset=shape.cut == "reset")
                return
            if shape.drip_bytes_per_second:
                await asyncio.sleep(_DRIP_SECONDS)

    async def _answer(self, status: int) -> None:
        code = b"InternalError" if status == 500 else b"SlowDown"
        body = b"<Error><Code>%s</Code><Message>made by the link</Message></Error>" % code
        head = (
            f"HTTP/1.1 {status} Made By The Link\r\nContent-Type: application/xml\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        await asyncio.get_running_loop().sock_sendall(self._client, head.encode() + body)
        self.end(reset=False)


class _Queue:
    """What the reading and the writing half of one way tell each other."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.is_ended = False
        self.wake = asyncio.Event()
        self.room = asyncio.Event()


async def _main(args: argparse.Namespace) -> None:
    link = _Link(LinkShape(**json.loads(args.shape)), args.seed)
    with _inside(args.namespace):
        listener = socket.create_server((args.host, 0), backlog=1024)
    listener.setblocking(False)

    async def control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        message = json.loads(await reader.readline())
        if "shape" in message:
            link.reshape(LinkShape(**message["shape"]))
        writer.write(json.dumps(asdict(link.stats())).encode() + b"\n")
        await writer.drain()
        writer.close()

    await asyncio.start_unix_server(control, args.control)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    loop = asyncio.get_running_loop()
    tasks = set()
    while True:
        client, _ = await loop.sock_accept(listener)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(link, client, (args.target_host, args.target_port))
        task = asyncio.create_task(connection.serve())
        tasks.add(task)
        task.add_done_callback(tasks.discard)


@contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """Sockets made meanwhile belong to the network namespace ("" = this one)."""
    if not namespace:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    paths = Path("/proc/self/ns/net"), Path("/run/netns") / namespace
    with paths[0].open() as home, paths[1].open() as away:
        if libc.setns(away.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {namespace}")
        try:
            yield
        finally:
            libc.setns(home.fileno(), _CLONE_NEWNET)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The proxy process of a ShapedLink.")
    parser.add_argument("--target-host", required=True)
    parser.add_argument("--target-port", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--control", required=True, help="path of the control socket")
    parser.add_argument("--namespace", default="", help="network namespace to listen in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", default="{}", help="LinkShape as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(_main(_parse_args()))
