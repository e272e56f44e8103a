"""NVIDIA's Multi-Process Service (MPS) around one tritonserver: a daemon of its own, or the user's.

What NVIDIA documents, and this rests on (docs.nvidia.com/deploy/mps):

* CUDA, when it starts in a process, connects to the control daemon whose folder
  $CUDA_MPS_PIPE_DIRECTORY names, and runs without MPS where none answers. The daemon starts one
  server process, with the user id of its clients; a client of another user waits until it has ended.
* While that server starts, clients are refused. So it is started before tritonserver, and waited for.
* After a fatal fault of one client the server takes no new ones until all that shared the GPU with
  it have ended: then the reloads of `supervise` fail, until it restarts tritonserver and MPS.
* $CUDA_VISIBLE_DEVICES of the daemon renumbers the GPUs for its clients: numbers are kept from it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvfetcher.config import MPS_PIPE_VARIABLE, RUN_DIR_VARIABLE
from kvfetcher.errors import ServerError
from kvfetcher.launcher.rundir import TEMPORARY, processes_of, shared_memory_prefix

if TYPE_CHECKING:
    from collections.abc import Mapping

MPS_CONTROL = "nvidia-cuda-mps-control"

_LOG_VARIABLE = "CUDA_MPS_LOG_DIRECTORY"
_DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
# Tells the daemon and its server, which inherits it, from all other processes of a run folder.
_OWNER_VARIABLE = "KVFETCHER_MPS_OF"

# sizeof(sockaddr_un.sun_path) - 1, less "/control_privileged", the longest socket of the daemon, and
# some room for names of other drivers.
_MAX_FOLDER_BYTES = 107 - 32

_COMMAND_SECONDS = 5.0
_DAEMON_SECONDS = 5.0
# As long as CUDA takes to start on all GPUs of the host: seconds where no process keeps them awake.
_SERVER_SECONDS = 30.0
# All clients have ended by then, so nothing is worth a longer wait.
_QUIT_SECONDS = 10.0
_POLL_SECONDS = 0.05
_TAIL_LINES = 8

_log = logging.getLogger(__name__)


class Mps:
    """MPS for the processes of one server, or none.

    Attributes:
        is_used: whether they will be clients of a daemon.
        variables: what they need in their environment; none where that names the daemon already.
    """

    def __init__(self, *, is_used: bool, daemon: _Daemon | None = None) -> None:
        self.is_used = is_used
        self.variables = {} if daemon is None else daemon.variables
        self._daemon = daemon

    def stop(self) -> None:
        """End the daemon if it is ours, once all its clients have ended. May be repeated."""
        if self._daemon is not None:
            self._daemon.stop()
            self._daemon = None


def start_mps(mode: Literal["off", "auto", "on"], run_dir: Path) -> Mps:
    """What `server.mps` asks for, before any process of the server starts.

    Args:
        mode: `server.mps`.
        run_dir: run folder of the server; the daemon's folder lies there, and its processes belong to it.

    Raises:
        ServerError: mode "on", and MPS cannot be had; says what to do. Nothing is left running.
    """
    if mode == "off":
        return Mps(is_used=False)
    try:
        return _start(run_dir)
    except ServerError as exc:
        if mode == "on":
            raise
        _log.warning("without MPS (server.mps = auto): %s", exc)
        return Mps(is_used=False)


def find_daemon(environ: Mapping[str, str]) -> Path | None:
    """The folder of the daemon that an environment names and that answers; None = there is none."""
    executable, folder = find_control(environ), environ.get(MPS_PIPE_VARIABLE, "")
    if executable is None or not folder:
        return None
    answers = _ask(executable, environ, "get_server_list", timeout_seconds=_COMMAND_SECONDS)
    return None if answers is None else Path(folder)


def find_control(environ: Mapping[str, str]) -> str | None:
    """Where the control program is; None = not on PATH."""
    return shutil.which(MPS_CONTROL, path=environ.get("PATH"))


def _start(run_dir: Path) -> Mps:
    executable = find_control(os.environ)
    if executable is None:
        raise ServerError(
            f"{MPS_CONTROL} is not on PATH; it comes with the NVIDIA driver (in a container, with the"
            ' driver capability `compute`): install it, or set server.mps = "off"'
        )
    if not _has_driver():
        raise ServerError(
            'no NVIDIA driver here (libcuda.so.1 does not load), so no MPS; set server.mps = "off"'
        )
    if (folder := find_daemon(os.environ)) is not None:
        _log.info("the MPS daemon of %s is used ($%s)", folder, MPS_PIPE_VARIABLE)
        return Mps(is_used=True)  # the processes inherit what names it
    if named := os.environ.get(MPS_PIPE_VARIABLE):
        _log.warning("no MPS daemon answers in %s ($%s)", named, MPS_PIPE_VARIABLE)
    folder = _make_folder(run_dir)
    daemon = _Daemon(executable, folder, run_dir)
    try:
        daemon.start()
    except BaseException:
        daemon.stop()
        raise
    _log.info("an MPS daemon was started in %s", folder)
    return Mps(is_used=True, daemon=daemon)


@dataclass(frozen=True, slots=True)
class _Daemon:
    """A control daemon whose folder and processes are this server's alone."""

    executable: str
    folder: Path
    run_dir: Path

    @property
    def variables(self) -> dict[str, str]:
        return {MPS_PIPE_VARIABLE: str(self.folder), _LOG_VARIABLE: str(self.folder)}

    def start(self) -> None:
        """Start the daemon and the server, and wait for both.

        Raises:
            ServerError: they do not come up; with the last lines of their logs.
        """
        said = self.folder / "start.log"  # no pipe: the daemon would keep its end open
        try:
            with said.open("wb") as output:
                subprocess.run(
                    [self.executable, "-d"],
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=_COMMAND_SECONDS,
                    check=True,
                    start_new_session=True,  # the terminal's Ctrl-C is not for it
                )
        except (OSError, subprocess.SubprocessError) as exc:
            raise self._failure(f"it cannot be started: {exc}") from exc
        deadline = time.monotonic() + _DAEMON_SECONDS
        while self._ask("get_server_list") is None:
            if time.monotonic() > deadline:
                raise self._failure(f"it did not answer within {_DAEMON_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)
        self._start_server()

    def stop(self) -> None:
        """End it and its server, by force if need be, and remove a folder outside `run_dir`."""
        try:
            deadline = time.monotonic() + _QUIT_SECONDS
            if self._processes():
                self._ask("quit", timeout_seconds=_QUIT_SECONDS)
            while self._processes() and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        finally:
            for process in self._processes():
                _log.warning("process %d of MPS did not end and is killed", process)
                _kill_group(process)
            if self.run_dir not in self.folder.parents:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _processes(self) -> list[int]:
        return list(processes_of(self.run_dir, variable=_OWNER_VARIABLE))

    def _start_server(self) -> None:
        self._ask(f"start_server -uid {os.getuid()}")  # what comes of it is seen below
        deadline = time.monotonic() + _SERVER_SECONDS
        was_listed = False
        while time.monotonic() < deadline:
            servers = re.findall(r"\d+", self._ask("get_server_list") or "")
            if was_listed and not servers:
                raise self._failure("its server ended")
            status = self._ask(f"get_server_status {servers[0]}") if servers else ""
            status = (status or "").upper()
            if "FAULT" in status:
                raise self._failure("its server failed")
            # A daemon that does not know the command says something else; the server lives.
            if "ACTIVE" in status or (was_listed and "INITIALIZING" not in status):
                return
            was_listed = bool(servers)
            time.sleep(_POLL_SECONDS)
        raise self._failure(f"its server was not ready within {_SERVER_SECONDS:g} s")

    def _environment(self) -> dict[str, str]:
        environ = {**os.environ, **self.variables}
        environ |= dict.fromkeys((RUN_DIR_VARIABLE, _OWNER_VARIABLE), str(self.run_dir))
        # Identifiers such as GPU-5ebe9f43 mean the same to the daemon and to its clients.
        if environ.get(_DEVICES_VARIABLE, "")[:1].isdigit():
            del environ[_DEVICES_VARIABLE]
        return environ

    def _ask(self, command: str, *, timeout_seconds: float = _COMMAND_SECONDS) -> str | None:
        return _ask(self.executable, self._environment(), command, timeout_seconds=timeout_seconds)

    def _failure(self, what: str) -> ServerError:
        lines = []
        for name in ("start.log", "control.log", "server.log"):
            with contextlib.suppress(OSError):
                text = (self.folder / name).read_text(errors="replace")
                lines += [f"{name}: {line}" for line in text.splitlines()[-_TAIL_LINES:]]
        return ServerError(
            f"the MPS daemon: {what}. Is the GPU free for it (`nvidia-smi -q -d COMPUTE`; where"
            f" another daemon holds it, name that one's folder in ${MPS_PIPE_VARIABLE})? Else set"
            ' server.mps = "off"' + "".join(f"\n{line}" for line in lines)
        )


def _ask(
    executable: str, environ: Mapping[str, str], command: str, *, timeout_seconds: float
) -> str | None:
    """What the daemon that `environ` names answers to a command; None = it does not."""
    try:
        done = subprocess.run(
            [executable],
            env=dict(environ),
            input=f"{command}\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            check=False,
            start_new_session=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # Without a daemon it says so and ends with 1.
    return None if done.returncode or "Cannot find" in done.stdout + done.stderr else done.stdout


def _make_folder(run_dir: Path) -> Path:
    """An empty folder for the daemon, with a path that is short enough for its sockets.

    Raises:
        ServerError: it cannot be made.
    """
    folder = run_dir / "mps"
    if len(os.fsencode(folder)) > _MAX_FOLDER_BYTES:
        folder = TEMPORARY / f"{shared_memory_prefix(run_dir)}mps"  # `rundir` finds it by its name
    try:
        folder.mkdir(mode=0o700)
    except OSError as exc:
        raise ServerError(f"folder {folder} for MPS cannot be made: {exc.strerror}") from exc
    return folder


def _has_driver() -> bool:
    from kvfetcher.codec.gpu.nvdec import has_driver  # numpy comes with it

    return has_driver()


def _kill_group(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        group = os.getpgid(process)
        if group == os.getpgrp():
            os.kill(process, signal.SIGKILL)
        else:
            os.killpg(group, signal.SIGKILL)
