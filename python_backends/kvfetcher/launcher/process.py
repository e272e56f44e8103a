"""Runs one tritonserver: start, readiness, death, stop; leaves nothing behind.

with TritonServer(load_config()) as server:
    ...                            # ready: server.grpc_url answers
                                   # stopped, /dev/shm and the run folder clean
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import queue
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from kvfetcher.codec.gpu.instances import decode_instances
from kvfetcher.config import (
    CONFIG_VARIABLE,
    RUN_DIR_VARIABLE,
    Config,
    cache_home,
    dump_config,
    is_setting_variable,
)
from kvfetcher.errors import ServerError
from kvfetcher.launcher.guardian import Guardian
from kvfetcher.launcher.installation import Installation, find_installation
from kvfetcher.launcher.mps import Mps, start_mps
from kvfetcher.launcher.ports import bind_address, check_ports
from kvfetcher.launcher.repository import (
    find_repository,
    is_decoupled,
    mark_changed,
    served_repository,
)
from kvfetcher.launcher.rundir import SHARED_MEMORY, RunDir, remove_leftovers, shared_memory_prefix
from kvfetcher.launcher.stubs import Stub, find_stubs, is_running
from kvfetcher.memory.vitals import begin_stopping, read_vitals

if TYPE_CHECKING:
    from types import TracebackType

Progress = Callable[[float, int, tuple[str, ...]], None]
"""Called while waiting: seconds since the start, number of models in all, those not ready yet."""

_POLL_SECONDS = 0.1
_PROGRESS_SECONDS = 1.0
_TAIL_LINES = 30

# Between a model's stop and the server's own: Triton logs and frees after its exit timeout.
_STOP_GRACE_SECONDS = 5.0

# Where a stub died while it had a request, Triton 2.51 keeps its model for ever (the response
# factory of that request leaks) and ends only at its exit timeout. Once no stub is left, all models
# have been finalised and nothing is worth the wait.
_EMPTY_SECONDS = 3.0
_STOP_POLL_SECONDS = 0.2

# A request is in no process for a moment on its way from one model to the next.
_IDLE_POLLS = 3

# tritonserver (2.51) died at about 2 of 28 first starts (SIGABRT), before any model was loaded.
_START_ATTEMPTS = 2

_CONTROL_HEADER = "kvfetcher-control"
# What Triton offers to every client by default, and no client needs: loading models, mapping a file of
# /dev/shm by its name (the arena's, too), writing log and trace files where the client says.
_RESTRICTED = "model-repository,shared-memory,logging,trace"

# Per model instance, growing in steps of 1 MiB by itself; a unit's planes are a few MiB.
_STUB_SHARED_BYTES = 4 << 20

# Of the Python backend by itself, for calls from model to model: kv_fetch holds one for each unit.
_BACKEND_THREADS = 32

# Triton's information lines and its tables of options, which come after the error that matters.
_CHATTER = re.compile(r"I\d{4} |\+-|\| ")

_LOADED = re.compile(rb"successfully loaded '([^']+)'")

# Between fork and exec nothing of this process may run (threads), so a small program sets the
# signal that comes when the launcher dies, and becomes the server. SIGKILL, for a server with running
# requests outlives SIGTERM (seen: over 110 s); its stubs are the guardian's.
_EXEC = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the launcher died")
os.execv(sys.argv[2], sys.argv[2:])
"""

_log = logging.getLogger(__name__)


class _CrashedError(ServerError):
    """tritonserver was killed by a signal while it started."""


class TritonServer:
    """One tritonserver process with its Python stubs.

    Not thread-safe. `start` must be called in a thread that lives as long as the server: Linux
    sends the signal of a dying parent when the *thread* that started the child ends.

    Args:
        config: settings; the models read exactly these (a copy in the run folder).
        model_repository: see `repository.find_repository`.
        log_path: the server's and models' output; None = in the run folder, gone at stop.
        progress: called about once a second while waiting for readiness.
    """

    def __init__(
        self,
        config: Config,
        *,
        model_repository: str | os.PathLike[str] | None = None,
        log_path: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self._model_repository = model_repository
        self._chosen_log_path = log_path
        self._progress = progress
        self._run_dir: RunDir | None = None
        self._mps = Mps(is_used=False)
        self._process: subprocess.Popen[bytes] | None = None
        self._guardian: Guardian | None = None
        self._log_start = 0
        # These are for the launcher alone, not for every client of the endpoints (`_RESTRICTED`).
        self._control_token = secrets.token_hex(16)

    @property
    def http_url(self) -> str:
        """``host:port``, as tritonclient wants it."""
        return _url(self.config.server.host, self.config.server.http_port)

    @property
    def grpc_url(self) -> str:
        """``host:port``, as tritonclient wants it."""
        return _url(self.config.server.host, self.config.server.grpc_port)

    @property
    def metrics_url(self) -> str:
        """``host:port`` of the Prometheus endpoint."""
        return _url(self.config.server.host, self.config.server.metrics_port)

    @property
    def run_dir(self) -> Path:
        """The run folder; there from `start` to `stop`."""
        if self._run_dir is None:
            raise ServerError("the server is not started")
        return self._run_dir.path

    @property
    def log_path(self) -> Path:
        """Output of server and models."""
        if self._chosen_log_path is not None:
            return Path(self._chosen_log_path)
        return self.run_dir / "tritonserver.log"

    @property
    def process_id(self) -> int:
        """Process id of tritonserver itself; its stubs are its children."""
        if self._process is None:
            raise ServerError("the server is not started")
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """How tritonserver ended, as `subprocess` counts; None while it runs."""
        return None if self._process is None else self._process.poll()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait for readiness.

        Raises:
            ServerError: no tritonserver, no models, a port is taken, no MPS where ``server.mps`` is
                on, a model failed to load (with the last lines of the log), or not ready within
                ``server.ready_timeout_seconds``. Nothing is left running. A tritonserver that is
                killed by a signal while it starts is started once more.
        """
        if self._process is not None:
            raise ServerError("the server is started already")
        for _ in range(_START_ATTEMPTS - 1):
            try:
                self._start_once()
            except _CrashedError as exc:
                _log.warning("%s\nit is started once more", exc)
            else:
                return
        self._start_once()

    def _start_once(self) -> None:
        installation = find_installation()
        repository = find_repository(self._model_repository)
        remove_leftovers()
        check_ports(self.config.server)
        _check_shared_memory(self.config)
        self._run_dir = RunDir()
        try:
            self._mps = start_mps(self.config.server.mps, self._run_dir.path)
            self._spawn(installation, repository)
            self._wait_ready({p.name for p in repository.iterdir() if p.is_dir()})
        except BaseException as exc:
            tail = self.log_tail()
            self._kill_all()
            if isinstance(exc, ServerError) and tail:
                raise type(exc)(f"{exc}\n{tail}") from exc
            raise

    def is_started(self) -> bool:
        """Whether `start` was called and `stop` not yet; it may have ended meanwhile."""
        return self._process is not None

    def is_alive(self) -> bool:
        """Whether the tritonserver process runs (ready or not)."""
        return self._process is not None and self._process.poll() is None

    def is_ready(self) -> bool:
        """Whether all models can take requests now."""
        connection = http.client.HTTPConnection(
            _reachable(self.config.server.host), self.config.server.http_port, timeout=1.0
        )
        try:
            headers = self.config.server.restricted_headers
            connection.request("GET", "/v2/health/ready", headers=headers)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stubs(self) -> tuple[Stub, ...]:
        """The processes of the models' instances that run now."""
        return () if self._process is None else find_stubs(self._process.pid)

    def is_decoupled(self, model: str) -> bool:
        """Whether a model answers its requests with a stream of responses."""
        return is_decoupled(self._served, model)

    def reload(self, model: str) -> None:
        """Replace a model's processes by new ones, and load again what depends on it.

        The old ones serve until the new ones are ready; requests that are with a dead process are
        answered with an error, but those of a decoupled model never are (2.51).

        Raises:
            ServerError: tritonserver does not answer, or the model does not load; the old one
                stays.
        """
        mark_changed(self._served, model)
        outcome: queue.SimpleQueue[ServerError | None] = queue.SimpleQueue()

        def load() -> None:
            try:
                self._load(model)
            except ServerError as exc:
                outcome.put(exc)
            else:
                outcome.put(None)

        # Stubs keep the connection of a tritonserver that died open: it would not be noticed.
        threading.Thread(target=load, name="kvfetcher-reload", daemon=True).start()
        while True:
            try:
                error = outcome.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if not self.is_alive():
                    raise ServerError(f"tritonserver ended while it loaded {model} again") from None
            else:
                break
        if error is not None:
            raise error

    def _load(self, model: str) -> None:
        connection = http.client.HTTPConnection(
            _reachable(self.config.server.host),
            self.config.server.http_port,
            timeout=self.config.server.ready_timeout_seconds,
        )
        try:
            connection.request(
                "POST",
                f"/v2/repository/models/{model}/load",
                "{}",
                {_CONTROL_HEADER: self._control_token} | self.config.server.restricted_headers,
            )
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as exc:
            raise ServerError(
                f"tritonserver did not load {model} again: {exc or type(exc).__name__}"
            ) from exc
        finally:
            connection.close()
        if response.status != 200:
            raise ServerError(f"tritonserver did not load {model} again: {text}")

    def keep_log(self) -> Path:
        """Make the log outlive the run folder, until the next failure. Returns where it is."""
        if self._chosen_log_path is not None:
            return self.log_path
        kept = cache_home() / "tritonserver" / "last-failure.log"
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.log_path, kept)
        return kept

    def log_tail(self) -> str:
        """The last lines of the log that tell more than that all goes well."""
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()
        except (OSError, ServerError):
            return ""
        telling = [line for line in lines if line and not _CHATTER.match(line)]
        return "\n".join(telling[-_TAIL_LINES:])

    def stop(self) -> bool:
        """Stop cleanly, then by force; remove the run folder and the files in /dev/shm.

        New requests are refused from now on. Running ones, and what they have to save, get
        ``server.stop_timeout_seconds``; then the models are finalised. A second Ctrl-C meanwhile
        kills at once. May be repeated.

        Returns:
            Whether all requests and saves were finished and all models finalised.
        """
        clean = False
        try:
            if self.is_alive() and self._drain():
                assert self._process is not None
                self._process.send_signal(signal.SIGINT)
                clean = self._wait_stopped()
        except KeyboardInterrupt:
            _log.warning("tritonserver is killed")
        finally:
            self._kill_all()
        return clean

    def kill(self) -> None:
        """Kill tritonserver alone, as a crash would; `stop` still has to follow."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _drain(self) -> bool:
        """Let running requests and saves finish; whether they all did."""
        begin_stopping(self.run_dir)
        deadline = time.monotonic() + self.config.server.stop_timeout_seconds
        idle_polls, reported = 0, False
        while self.is_alive():
            alive = {
                process: vitals
                for process, vitals in read_vitals(self.run_dir).items()
                if is_running(process)
            }
            running = sum(vitals.running for vitals in alive.values())
            idle_polls = 0 if running else idle_polls + 1
            if not alive or idle_polls >= _IDLE_POLLS:
                return True
            if time.monotonic() > deadline:
                _log.warning(
                    "requests or saves still ran after %g s (server.stop_timeout_seconds) in: %s",
                    self.config.server.stop_timeout_seconds,
                    ", ".join(
                        sorted(
                            {
                                stub.model
                                for stub in self.stubs()
                                if (vitals := alive.get(stub.process_id)) and vitals.running
                            }
                        )
                    ),
                )
                return False
            if running and not reported:
                _log.info("running requests and saves are finished first")
                reported = True
            time.sleep(_POLL_SECONDS)
        return False

    def _wait_stopped(self) -> bool:
        assert self._process is not None
        wait_seconds = self.config.server.stop_timeout_seconds + _STOP_GRACE_SECONDS
        deadline = time.monotonic() + wait_seconds
        last_stub = time.monotonic()
        while (status := self._process.poll()) is None:
            now = time.monotonic()
            if self.stubs():
                last_stub = now
            elif now > last_stub + _EMPTY_SECONDS:
                _log.info("all models have ended; tritonserver is killed")
                return True
            if now > deadline:
                _log.warning("tritonserver did not stop in time and is killed")
                return False
            time.sleep(_STOP_POLL_SECONDS)
        return status == 0

    @property
    def _served(self) -> Path:
        return self.run_dir / "model_repository"

    def _config_in_effect(self) -> Config:
        """`config`, with "on" or "off" for "auto"."""
        mps: Literal["on", "off"] = "on" if self._mps.is_used else "off"
        return replace(self.config, server=replace(self.config.server, mps=mps))

    def _spawn(self, installation: Installation, repository: Path) -> None:
        run_dir = self.run_dir
        config_path = run_dir / "config.toml"
        config = self._config_in_effect()
        config_path.write_text(dump_config(config))
        served = served_repository(repository, config, self._served)
        command = [
            *(sys.executable, "-I", "-S", "-c", _EXEC, str(os.getpid())),
            str(installation.executable),
            *self._flags(installation, served),
        ]
        environ = {k: v for k, v in os.environ.items() if not is_setting_variable(k)}
        environ[CONFIG_VARIABLE] = str(config_path)
        environ[RUN_DIR_VARIABLE] = str(run_dir)
        environ |= self._mps.variables
        try:
            with self.log_path.open("ab") as log:
                self._log_start = log.tell()
                self._process = subprocess.Popen(
                    command,
                    env=installation.environment(environ),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # A group of its own: the terminal's Ctrl-C is for the launcher alone.
                    start_new_session=True,
                )
        except OSError as exc:
            raise ServerError(
                f"log file {self.log_path} cannot be written: {exc.strerror}"
            ) from exc
        prefix = SHARED_MEMORY / shared_memory_prefix(run_dir)
        self._guardian = Guardian(self._process.pid, str(prefix))

    def _flags(self, installation: Installation, repository: Path) -> list[str]:
        assert self._run_dir is not None
        server = self.config.server
        host = bind_address(server.host)
        python = {
            "shm-region-prefix-name": f"{self._run_dir.shared_memory_prefix}py",
            "shm-default-byte-size": _STUB_SHARED_BYTES,
            "stub-timeout-seconds": int(server.ready_timeout_seconds),
        }
        units = self.config.fetch.units_in_flight(decode_instances(self.config))
        if units > _BACKEND_THREADS:
            python["thread-pool-size"] = units
        control = f"{_RESTRICTED}:{_CONTROL_HEADER}={self._control_token}"
        return [
            f"--model-repository={repository}",
            # So that `reload` works.
            "--model-control-mode=explicit",
            "--load-model=*",
            f"--http-restricted-api={control}",
            f"--grpc-restricted-protocol={control}",
            f"--backend-directory={installation.backend_folder}",
            *(f"--backend-config=python,{key}={value}" for key, value in python.items()),
            # Every config.pbtxt here is complete. Asking the models would start each stub twice.
            "--disable-auto-complete-config",
            f"--http-address={host}",
            f"--http-port={server.http_port}",
            f"--grpc-address={host}",
            f"--grpc-port={server.grpc_port}",
            f"--metrics-address={host}",
            f"--metrics-port={server.metrics_port}",
            f"--exit-timeout-secs={int(server.stop_timeout_seconds)}",
            f"--log-verbose={server.log_verbose}",
            *server.extra_args,
        ]

    def _wait_ready(self, models: set[str]) -> None:
        assert self._process is not None
        start = time.monotonic()
        next_report = start + _PROGRESS_SECONDS
        while not self.is_ready():
            now = time.monotonic()
            if (status := self._process.poll()) is not None:
                kind = _CrashedError if status < 0 else ServerError
                raise kind(
                    f"tritonserver ended while starting ({status_text(status)}); its log is kept"
                    f" in {self.keep_log()}; the last lines:"
                )
            if now - start > self.config.server.ready_timeout_seconds:
                raise ServerError(
                    f"tritonserver was not ready after"
                    f" {self.config.server.ready_timeout_seconds:g} s"
                    f" (server.ready_timeout_seconds); not ready:"
                    f" {', '.join(self._not_ready(models)) or 'the server itself'}; its log is kept in {self.keep_log()};"
                    " the last lines:"
                )
            if self._progress is not None and now >= next_report:
                self._progress(now - start, len(models), self._not_ready(models))
                next_report += _PROGRESS_SECONDS
            time.sleep(_POLL_SECONDS)

    def _not_ready(self, models: set[str]) -> tuple[str, ...]:
        log = self.log_path.read_bytes()[self._log_start :]  # not an earlier tritonserver's
        loaded = {name.decode() for name in _LOADED.findall(log)}
        return tuple(sorted(models - loaded))

    def _kill_all(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._guardian is not None:
            self._guardian.dismiss()
            self._guardian = None
        try:
            self._mps.stop()  # its clients have ended
        finally:
            if self._run_dir is not None:
                self._run_dir.remove()
                self._run_dir = None


def plain_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a tritonserver started by hand needs, as the variables that differ from `environ`.

    Raises:
        ServerError: no tritonserver fits.
    """
    from kvfetcher.launcher.installation import prepare_shim

    installation = find_installation()
    result = installation.environment(environ)
    if installation.origin != "system":
        shim = str(prepare_shim(installation))
        rest = [part for part in result["PATH"].split(":") if part != shim]
        result["PATH"] = ":".join([rest[0], shim, *rest[1:]])
    return {key: value for key, value in result.items() if environ.get(key) != value}


def _check_shared_memory(config: Config) -> None:
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < config.engine.arena_bytes:
        raise ServerError(
            f"{SHARED_MEMORY} has {free >> 20} MiB free, the KV arena takes"
            f" {config.engine.arena_bytes >> 20} MiB; make it larger (docker run --shm-size=2g), or"
            " lower engine.arena_bytes"
        )


def _reachable(host: str) -> str:
    """Where a server bound to `host` answers on this machine."""
    return {"0.0.0.0": "127.0.0.1"}.get(host, host)


def _url(host: str, port: int) -> str:
    return f"{_reachable(host)}:{port}"


def status_text(status: int) -> str:
    """An exit status, as `subprocess` counts, in words."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
