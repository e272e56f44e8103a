"""What a model's process says of itself in the run folder: its last beat, and its running requests.

    <run folder>/vitals/<process id>   24 bytes, little-endian: last beat (float64, seconds of the
                                       machine's monotonic clock), running requests (int64),
                                       requests taken since the start (int64)
    <run folder>/stopping              there = no new request is taken
    <run folder>/suspects/<model>      there = its processes are to be replaced

The launcher reads them: a server may stop once nothing runs in any process. Standard library only.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

_FOLDER = "vitals"
_STOPPING = "stopping"
_SUSPECTS = "suspects"
_RECORD = struct.Struct("<dqq")


class Vitals(NamedTuple):
    """One process's record."""

    beat: float
    running: int
    taken: int


class VitalsRecord:
    """The record of this process, written in place.

    Args:
        run_folder: run folder of the server.
    """

    def __init__(self, run_folder: Path) -> None:
        folder = run_folder / _FOLDER
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / str(os.getpid())
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _RECORD.size)
            self._memory = mmap.mmap(descriptor, _RECORD.size)
        finally:
            os.close(descriptor)

    def write(self, vitals: Vitals) -> None:
        """Replace the record. A reader may see half of it: every field is an aligned word."""
        _RECORD.pack_into(self._memory, 0, *vitals)


def read_vitals(run_folder: Path) -> dict[int, Vitals]:
    """The records of all processes that ever ran, by process id; dead ones' last words, too."""
    found = {}
    for path in (run_folder / _FOLDER).glob("[0-9]*"):
        with contextlib.suppress(OSError, struct.error):
            found[int(path.name)] = Vitals(*_RECORD.unpack(path.read_bytes()))
    return found


def begin_stopping(run_folder: Path) -> None:
    """Refuse new requests from now on."""
    (run_folder / _STOPPING).touch(mode=0o600)


def is_stopping(run_folder: Path) -> bool:
    """Whether new requests are to be refused; costs microseconds."""
    return (run_folder / _STOPPING).exists()


def mark_suspect(run_folder: Path, model: str) -> None:
    """Have a model's processes replaced: one of them replied to another request."""
    folder = run_folder / _SUSPECTS
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / model).touch(mode=0o600)


def take_suspects(run_folder: Path) -> tuple[str, ...]:
    """The models that `mark_suspect` named since the last call, in order of their names."""
    found = sorted((run_folder / _SUSPECTS).glob("*"))
    for path in found:
        path.unlink(missing_ok=True)
    return tuple(path.name for path in found)
