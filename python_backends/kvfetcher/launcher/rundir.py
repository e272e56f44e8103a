"""The run folder of one server, and what servers leave behind when they are killed.

    /tmp/kvfetcher-<uid>/<launcher pid>-<random>/   lock  config.toml  tritonserver.log
                                                    engine.sock  model_repository/  mps/
    /dev/shm/kvfetcher-<name of the run folder>-*   the KV arena, Triton's shared-memory regions
    /tmp/kvfetcher-<name of the run folder>-*       the folder of MPS, where the one above is too deep

The launcher holds a lock (flock) on ``lock`` as long as it lives, however it dies. A folder whose
lock is free belongs to nobody: its processes are killed and its files removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from kvfetcher.config import RUN_DIR_VARIABLE
from kvfetcher.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARED_MEMORY = Path("/dev/shm")
TEMPORARY = Path("/tmp")
"""Not $TMPDIR: the next start, which cleans up, may have another one; and it is short."""

_LOCK = "lock"

_log = logging.getLogger(__name__)


class RunDir:
    """A fresh run folder, locked while this object lives.

    Raises:
        ServerError: the folder cannot be made, or its parent is not ours alone.
    """

    def __init__(self) -> None:
        base = _base()
        self.path = base / f"{os.getpid()}-{secrets.token_hex(3)}"
        self.path.mkdir(mode=0o700)
        self._lock = _try_lock(self.path)
        if self._lock is None:
            raise ServerError(f"run folder {self.path} is locked by somebody else")

    @property
    def shared_memory_prefix(self) -> str:
        """Start of the names of all files in /dev/shm that belong to this server."""
        return shared_memory_prefix(self.path)

    def remove(self) -> None:
        """Kill what still runs for this folder, remove its files and itself. May be repeated."""
        _remove(self.path)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def shared_memory_prefix(path: Path) -> str:
    """``kvfetcher-<name of the run folder>-``."""
    return f"kvfetcher-{path.name}-"


def remove_leftovers() -> list[Path]:
    """Clean up after launchers that died. Returns the run folders that were removed."""
    removed = []
    for path in sorted(_base().iterdir()):
        if path.name.isdigit():  # of a tritonserver started by hand: control.run_dir()
            alive = Path(f"/proc/{path.name}").exists()
            lock = None
        else:
            # Without the lock file it is being made right now, or is not ours to judge.
            lock = _try_lock(path) if (path / _LOCK).exists() else None
            alive = lock is None
        if not alive:
            _log.warning("cleaning up after a server that died: %s", path)
            _remove(path)
            removed.append(path)
        if lock is not None:
            os.close(lock)
    return removed


def processes_of(path: Path, *, variable: str = RUN_DIR_VARIABLE) -> Iterator[int]:
    """Ids of the processes that were started with this run folder, this one excepted.

    Args:
        path: the run folder.
        variable: the environment variable that named it to them; zombies have none any more.
    """
    wanted = f"{variable}={path}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environ = (process / "environ").read_bytes()
        except OSError:  # another user's, or it ended
            continue
        if wanted in environ.split(b"\0") and int(process.name) != os.getpid():
            yield int(process.name)


def _base() -> Path:
    base = Path(f"/tmp/kvfetcher-{os.getuid()}")  # as control.run_dir()
    try:
        base.mkdir(mode=0o700, exist_ok=True)
        status = base.stat(follow_symlinks=False)
    except OSError as exc:
        raise ServerError(f"run folder {base} cannot be made: {exc.strerror}") from exc
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ServerError(
            f"run folder {base} belongs to uid {status.st_uid} with mode"
            f" {status.st_mode & 0o777:o}; it must be yours and writable by nobody else: remove it"
        )
    return base


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(path: Path) -> None:
    for process in processes_of(path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for file in SHARED_MEMORY.glob(f"{shared_memory_prefix(path)}*"):
        file.unlink(missing_ok=True)
    for folder in TEMPORARY.glob(f"{shared_memory_prefix(path)}*"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)
