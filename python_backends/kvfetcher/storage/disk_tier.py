"""Copies of parts of objects on a local disk, shared by the processes of a host.

    <folder>/<2 digits>/<name with !>/<start>-<stop>      a part; with an "e" at the end where the
                                                          object ends there
    <folder>/.partial/                                    parts being written

A part begins with 16 bytes: ``KVFT``, CRC-32 of what follows them (u32), its length (u64), all
little-endian. The folder is the only state: any number of processes may share it, it survives a
restart, and a part that a crash left torn or that rotted is a miss and goes. The modification time
of an object's folder is when it was last used; objects that were not used for longest go first.

Blocking: called in threads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import struct
import threading
import time
import uuid
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvfetcher.storage.spans import Span, cover, join

if TYPE_CHECKING:
    from collections.abc import Iterator

_PARTIAL = ".partial"
_PARTIAL_MAX_AGE_SECONDS = 3600.0
_HEADER = struct.Struct("<4sIQ")
_MAGIC = b"KVFT"
_FILE = re.compile(r"(\d+)-(\d+)(e?)")
_SHARD = re.compile(r"[0-9a-f]{2}")
# Other processes write too: the folder is counted again after this part of the limit was written.
_RECOUNT_PART = 16
# Evicting goes down to this part of the limit, so that it is rare.
_KEEP_PART = 0.9

_log = logging.getLogger(__name__)


class _Used(NamedTuple):
    """One object's folder and when it was used last."""

    last_used: float
    num_bytes: int
    folder: Path


class DiskTier:
    """Parts of objects by name; thread-safe.

    The limit is kept after each `add` for what this process knows; where several processes write,
    each may be over by a sixteenth of the limit until it counts again.
    """

    def __init__(self, folder: Path, *, max_bytes: int, max_age_seconds: float) -> None:
        """Does no I/O; the folder is made by the first `add`.

        Args:
            folder: folder of this tier alone.
            max_bytes: limit of all parts together, headers included.
            max_age_seconds: older parts are not served.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_age_seconds = max_age_seconds
        self._lock = threading.Lock()
        self._evicting = threading.Lock()
        self._pins: Counter[str] = Counter()
        self._num_bytes = max_bytes + 1  # unknown: the first `add` counts
        self._uncounted = 0

    def get(self, name: str, start: int, end: int) -> bytes | None:
        """The answer of a store to a read of ``[start, end)``; None where it is not all here.

        Raises:
            OSError: the disk failed.
        """
        folder = self._object_folder(name)
        with self._pinned(folder):
            files = self._spans(folder)
            spans = cover(files, start, end)
            if spans is None:
                return None
            parts = []
            for span in spans:
                data = _read_part(folder / files[span], span)
                if data is None:
                    return None
                parts.append((span, data))
            with contextlib.suppress(FileNotFoundError):  # evicted by another process
                os.utime(folder)
            return join(parts, start, end) if parts else b""

    def holds(self, name: str, start: int, end: int) -> bool:
        """Whether `get` would answer, by what the folder shows; does not count as a use.

        Raises:
            OSError: the disk failed.
        """
        return cover(self._spans(self._object_folder(name)), start, end) is not None

    def add(self, name: str, span: Span, data: bytes) -> None:
        """Keep a part; what it covers goes. One that is larger than all of the tier is not kept.

        Raises:
            OSError: the disk failed or is full.
        """
        num_bytes = _HEADER.size + len(data)
        if num_bytes > self._max_bytes:
            return
        folder = self._object_folder(name)
        partial = self._folder / _PARTIAL / uuid.uuid4().hex
        partial.parent.mkdir(parents=True, exist_ok=True)
        with self._pinned(folder):
            try:
                with partial.open("xb") as file:
                    file.write(_HEADER.pack(_MAGIC, zlib.crc32(data), len(data)))
                    file.write(data)
                folder.mkdir(parents=True, exist_ok=True)
                covered = [f for s, f in self._spans(folder).items() if _is_within(s, span)]
                partial.replace(folder / _file_name(span))
                for file_name in covered:
                    if file_name != _file_name(span):
                        (folder / file_name).unlink(missing_ok=True)
            finally:
                partial.unlink(missing_ok=True)
            self._make_room(num_bytes)

    def drop(self, name: str) -> bool:
        """Forget an object; always True.

        Raises:
            OSError: the disk failed.
        """
        folder = self._object_folder(name)
        with contextlib.suppress(FileNotFoundError):
            # Out of sight at once: removing file by file could leave a part in sight.
            aside = self._folder / _PARTIAL / uuid.uuid4().hex
            aside.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        return True

    def names(self) -> list[str]:
        """Names of the objects of which it keeps parts.

        Raises:
            OSError: the disk failed.
        """
        return sorted(
            folder.name.replace("!", "/") for folder in self._folder.glob("[0-9a-f][0-9a-f]/*")
        )

    def _object_folder(self, name: str) -> Path:
        flat = name.replace("/", "!")  # no name has a "!"
        return self._folder / f"{zlib.crc32(flat.encode()) & 0xFF:02x}" / flat

    @contextlib.contextmanager
    def _pinned(self, folder: Path) -> Iterator[None]:
        """Keep this process from evicting the object meanwhile."""
        with self._lock:
            self._pins[folder.name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._pins[folder.name] -= 1
                if not self._pins[folder.name]:
                    del self._pins[folder.name]

    def _spans(self, folder: Path) -> dict[Span, str]:
        """Parts of an object that are young enough, by span; the file name of each."""
        spans = {}
        oldest = time.time() - self._max_age_seconds
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                match = _FILE.fullmatch(entry.name)
                if match and entry.stat().st_mtime >= oldest:
                    spans[Span(int(match[1]), int(match[2]), bool(match[3]))] = entry.name
        return spans

    def _make_room(self, num_bytes: int) -> None:
        """Count what was written; evict where that went over the limit."""
        with self._lock:
            self._num_bytes += num_bytes
            self._uncounted += num_bytes
            recount = self._uncounted * _RECOUNT_PART >= self._max_bytes
            if self._num_bytes <= self._max_bytes and not recount:
                return
        if not self._evicting.acquire(blocking=False):
            return  # another thread is at it
        try:
            total = self._evict()
        finally:
            self._evicting.release()
        with self._lock:
            self._num_bytes, self._uncounted = total, 0

    def _evict(self) -> int:
        """Remove what was not used for longest where the tier is over its limit; the bytes left."""
        objects = sorted(self._objects())
        total = sum(used.num_bytes for used in objects)
        if total <= self._max_bytes:
            return total
        for used in objects:
            if total <= self._max_bytes * _KEEP_PART:
                break
            with self._lock:
                is_pinned = used.folder.name in self._pins
            if not is_pinned:  # a read that begins right now finds nothing, or half: a miss
                shutil.rmtree(used.folder, ignore_errors=True)
                total -= used.num_bytes
        return total

    def _objects(self) -> Iterator[_Used]:
        """All objects; unfinished parts of writers that died long ago go on the way.

        What is not of this tier (lost+found) or cannot be read costs no other its place in the
        count. Another process may evict meanwhile.
        """
        for shard in _entries(self._folder):
            is_partial = shard.name == _PARTIAL
            if not is_partial and not _SHARD.fullmatch(shard.name):
                continue
            with contextlib.suppress(OSError):
                for entry in _entries(shard):
                    with contextlib.suppress(OSError):
                        if is_partial:
                            _remove_if_old(entry)
                            continue
                        sizes = [file.stat().st_size for file in _entries(entry)]
                        yield _Used(entry.stat().st_mtime, sum(sizes), Path(entry.path))


def _entries(folder: os.PathLike[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _remove_if_old(entry: os.DirEntry[str]) -> None:
    if entry.stat().st_mtime < time.time() - _PARTIAL_MAX_AGE_SECONDS:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink()


def _read_part(path: Path, span: Span) -> bytes | None:
    """The bytes of a part; None, and the file gone, where they are not what was written."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:  # evicted by another process
        return None
    data = stored[_HEADER.size :]
    if stored[: _HEADER.size] != _HEADER.pack(_MAGIC, zlib.crc32(data), span.num_bytes):
        _log.warning("the local copy %s is damaged and goes", path)
        path.unlink(missing_ok=True)
        return None
    return data


def _file_name(span: Span) -> str:
    return f"{span.start}-{span.stop}{'e' if span.is_last else ''}"


def _is_within(inner: Span, outer: Span) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop
