"""The `file` store: a folder, local or on NFS.

    <folder>/<name>                 objects; the segments of a name are folders
    <folder>/.partial/              files being written; what a crashed writer left goes after
                                    `PARTIAL_MAX_AGE_SECONDS`
    <folder>/.quarantine/           corrupt objects, each with a ``.reason`` beside it

A writer fills a unique file in ``.partial``, syncs it, and makes it visible with ``link``, which
fails if the name exists: readers see whole objects only, and of two writers one wins. The same
holds over NFS. No locks, no index, no state in the process: any number of processes may share the
folder. All I/O runs in threads of the store's own, never in the event loop.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import time
import uuid
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kvfetcher.errors import ChunkNotFoundError, StoreError, StoreFullError, StoreTimeoutError
from kvfetcher.storage.base import (
    SINGLE_LOOKUP_BATCH,
    ObjectInfo,
    SetAside,
    allowed_seconds,
    check_name,
    check_prefix,
    check_range,
    flat_name,
    get_ranges_singly,
    name_of_flat,
)
from kvfetcher.storage.threads import IoThreads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from kvfetcher.storage.base import ByteRange

# Far above the longest write of one object, and far above the clock skew of an NFS server.
PARTIAL_MAX_AGE_SECONDS = 3600.0

_PARTIAL = ".partial"
_QUARANTINE = ".quarantine"
_LIST_BATCH = 256
# Reads of one batch that run at one time: hides the round trips of NFS; each holds a thread.
_BATCH_READS = 16
# Two batches of reads at one time; that many hang where the file system does.
_MAX_THREADS = 32
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class LocalStore:
    """Objects as files of one folder; see `kvfetcher.storage.base` for the contract.

    The folder is made on the first `put`. Reading from a folder that does not exist, or writing to
    one that may not be written, fails per call, so that a server lives on without its store.
    """

    lookup_batch_size = SINGLE_LOOKUP_BATCH

    def __init__(self, folder: str | os.PathLike[str], *, timeout_seconds: float) -> None:
        self._folder = Path(folder)
        self._timeout_seconds = timeout_seconds
        self._threads = IoThreads(
            "kvfetcher-file",
            max_threads=_MAX_THREADS,
            max_stuck=_MAX_THREADS,
        )
        self._swept = False

    def __repr__(self) -> str:
        return f"LocalStore({str(self._folder)!r})"

    async def get(self, name: str) -> bytes:
        path = self._path(name)
        return await self._run(f"get {name}", lambda: _read_whole(path))

    async def get_range(self, name: str, start: int, end: int) -> bytes:
        check_range(name, start, end)
        path = self._path(name)
        return await self._run(
            f"get {name}", lambda: _read_range(path, start, end), num_bytes=end - start
        )

    async def get_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes | StoreError]:
        return await get_ranges_singly(self, ranges, max_concurrency=_BATCH_READS)

    async def head(self, name: str) -> ObjectInfo | None:
        path = self._path(name)
        try:
            status = await self._run(f"head {name}", path.stat)
        except ChunkNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return ObjectInfo(name, status.st_size, status.st_mtime)

    async def put(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        return await self._run(
            f"put {name}", lambda: self._put(path, data), num_bytes=len(data), reads=False
        )

    async def delete(self, name: str) -> None:
        path = self._path(name)
        with contextlib.suppress(ChunkNotFoundError):
            await self._run(f"delete {name}", path.unlink)

    async def quarantine(self, name: str, reason: str) -> None:
        path = self._path(name)
        await self._run(
            f"quarantine {name}", lambda: self._set_aside(path, name, reason), reads=False
        )

    async def list_prefix(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        found = self._walk(check_prefix(prefix))
        while batch := await self._run(
            f"list {prefix!r}", lambda: list(islice(found, _LIST_BATCH))
        ):
            for info in batch:
                yield info

    async def list_quarantined(self) -> AsyncIterator[SetAside]:
        for aside in await self._run("list the quarantine", self._set_asides):
            yield aside

    async def delete_quarantined(self, aside: SetAside) -> None:
        path = self._folder / _QUARANTINE / aside.place
        await self._run(f"delete {path}", lambda: _remove_aside(path))

    async def close(self) -> None:
        """Nothing to give back: threads without work end by themselves."""

    def _path(self, name: str) -> Path:
        return self._folder / check_name(name)

    async def _run(
        self, what: str, call: Callable[[], _T], *, num_bytes: int = 0, reads: bool = True
    ) -> _T:
        """Run blocking I/O in a thread, within the timeout, its errors translated.

        Where `reads`, a file that is not there means that the object is not. A thread cannot be
        stopped: after a timeout it ends by itself, its result unused.
        """
        seconds = allowed_seconds(self._timeout_seconds, num_bytes)
        try:
            return await self._threads.run(call, timeout_seconds=seconds)
        except TimeoutError as exc:
            problem = str(exc) or f"it took longer than {seconds:g} s"
            raise StoreTimeoutError(
                f"file store {self._folder}: {what}: {problem} (store.timeout_seconds); is the file"
                " system it lies on alive?"
            ) from exc
        except OSError as exc:
            if isinstance(exc, NotADirectoryError) and not self._folder.is_dir():
                # Not a miss: nothing can ever be stored there.
                raise StoreError(
                    f"file store {self._folder}: {what}: store.path is not a folder; name a folder"
                    " or remove the file"
                ) from exc
            if reads and isinstance(
                exc, FileNotFoundError | NotADirectoryError | IsADirectoryError
            ):
                raise ChunkNotFoundError(
                    f"file store {self._folder}: {what}: no such object"
                ) from exc
            raise self._error(what, exc) from exc

    def _error(self, what: str, exc: OSError) -> StoreError:
        if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            remedy = "; give this user write permission there, or set store.path to another folder"
        elif exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreFullError(
                f"file store {self._folder}: {what}: {exc.strerror or exc}; free space there, or set"
                " store.path to another folder"
            )
        else:
            remedy = ""
        return StoreError(f"file store {self._folder}: {what}: {exc.strerror or exc}{remedy}")

    def _put(self, path: Path, data: bytes) -> bool:
        if path.exists():
            return False
        partials = self._folder / _PARTIAL
        partials.mkdir(parents=True, exist_ok=True)
        self._sweep(partials)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _partial_file(partials / uuid.uuid4().hex, data) as partial:
            return _publish(partial, path)

    def _sweep(self, partials: Path) -> None:
        """Remove, once per process, what writers that died long ago left behind."""
        if self._swept:
            return
        self._swept = True
        oldest = time.time() - PARTIAL_MAX_AGE_SECONDS
        with os.scandir(partials) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process sweeps too
                    if entry.stat().st_mtime < oldest:
                        Path(entry.path).unlink()
                        _log.info("removed %s, which a writer that died left", entry.path)

    def _set_aside(self, path: Path, name: str, reason: str) -> None:
        # The suffix keeps an earlier bad object of the same name.
        aside = self._folder / _QUARANTINE / flat_name(name, uuid.uuid4().hex[:8])
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.replace(aside)
        except FileNotFoundError:
            return
        _reason_path(aside).write_text(f"{name}\n{reason}\n")
        _log.warning("set object %s aside as %s: %s", name, aside, reason)

    def _set_asides(self) -> list[SetAside]:
        found = []
        with (
            contextlib.suppress(FileNotFoundError),  # nothing was ever set aside
            os.scandir(self._folder / _QUARANTINE) as entries,
        ):
            for entry in entries:
                if name := name_of_flat(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        info = ObjectInfo(name, status.st_size, status.st_mtime)
                        found.append(SetAside(info, entry.name))
        return found

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects in order of name. Folders that cannot lead to `prefix` are not opened."""
        return _walk_folder(self._folder, "", prefix)


def _walk_folder(folder: Path, base: str, prefix: str) -> Iterator[ObjectInfo]:
    try:
        with os.scandir(folder) as entries:
            # A folder sorts by its name with "/", as its objects' names do.
            found = sorted(
                (f"{base}{e.name}/" if e.is_dir(follow_symlinks=False) else f"{base}{e.name}", e)
                for e in entries
                if not e.name.startswith(".")
            )
    except FileNotFoundError:  # never written to, or removed meanwhile
        return
    for name, entry in found:
        if name.endswith("/"):
            if name.startswith(prefix) or prefix.startswith(name):
                yield from _walk_folder(Path(entry.path), name, prefix)
        elif name.startswith(prefix):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                yield ObjectInfo(name, status.st_size, status.st_mtime)


def _reason_path(aside: Path) -> Path:
    return aside.with_name(f"{aside.name}.reason")


def _remove_aside(aside: Path) -> None:
    """The reason goes first: what is left of half a removal is listed again."""
    _reason_path(aside).unlink(missing_ok=True)
    aside.unlink(missing_ok=True)


def _open_regular(path: Path) -> FileIO:
    """Open a file for reading; what is none (a FIFO, a device) is no object, and is not waited for."""
    file = FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileNotFoundError(errno.ENOENT, "it is not a regular file", str(path))
    return file


def _read_range(path: Path, start: int, end: int) -> bytes:
    with _open_regular(path) as file:
        wanted = min(end, os.fstat(file.fileno()).st_size) - start
        if wanted <= 0:
            return b""
        file.seek(start)
        parts = []
        while wanted > 0 and (part := file.read(wanted)):
            parts.append(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_whole(path: Path) -> bytes:
    with _open_regular(path) as file:
        return bytes(file.readall())


@contextlib.contextmanager
def _partial_file(path: Path, data: bytes) -> Iterator[Path]:
    """A synced file with `data`, gone at exit whatever happened."""
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _publish(partial: Path, path: Path) -> bool:
    """Give `partial` its final name, unless that name exists."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError as exc:
        if exc.errno not in _NO_HARD_LINKS:
            raise
        # No hard links here (FAT, some FUSE): still atomic, but of two writers both may be told
        # True. Objects of one name have one content, so the loser's bytes are as good.
        partial.replace(path)
    return True
