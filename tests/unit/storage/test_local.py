import asyncio
import errno
import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvfetcher.config import StoreConfig
from kvfetcher.errors import ChunkNotFoundError, StoreError, StoreTimeoutError
from kvfetcher.storage import LocalStore, open_store
from kvfetcher.storage import local as local_module
from support.stores import NAME, OTHER, FaultyStore, LatencyStore, StoreTests


class _FileStoreTests(StoreTests):
    async def raw_get(self, store, name):
        return (self.folder / name).read_bytes()

    async def raw_set(self, store, name, data):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class TestLocalStore(_FileStoreTests):
    @pytest.fixture
    def store(self, tmp_path):
        self.folder = tmp_path / "made" / "on first put"
        return open_store(StoreConfig(path=str(self.folder), timeout_seconds=10.0))


class TestWrappedStore(_FileStoreTests):
    """The wrappers of this suite keep every promise when told to make no trouble."""

    @pytest.fixture
    def store(self, tmp_path):
        self.folder = tmp_path
        return FaultyStore(LatencyStore(LocalStore(tmp_path, timeout_seconds=10.0)))


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path, timeout_seconds=10.0)


async def test_missing_folder_reads_as_an_empty_store(tmp_path):
    store = LocalStore(tmp_path / "absent", timeout_seconds=10.0)
    assert await store.head(NAME) is None
    assert [info async for info in store.list_prefix()] == []
    with pytest.raises(ChunkNotFoundError):
        await store.get(NAME)
    assert not (tmp_path / "absent").exists()


async def test_folder_under_a_file_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    store = LocalStore(tmp_path / "file" / "store", timeout_seconds=10.0)
    with pytest.raises(StoreError, match="name a folder"):
        await store.put(NAME, b"data")
    for call in (store.head(NAME), store.get(NAME), store.get_range(NAME, 0, 1)):
        with pytest.raises(StoreError, match="is not a folder") as caught:
            await call
        assert type(caught.value) is StoreError  # a miss would be ChunkNotFoundError
    with pytest.raises(StoreError, match="is not a folder"):
        [info async for info in store.list_prefix()]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_read_only_folder_is_refused_with_the_remedy(store, tmp_path):
    await store.put(NAME, b"data")
    (tmp_path / ".partial").chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(StoreError, match="write permission"):
        await store.put(OTHER, b"data")
    assert await store.get(NAME) == b"data"


async def test_full_disk_is_reported_and_leaves_nothing(store, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local_module.os, "fsync", full)
    with pytest.raises(StoreError, match=r"No space left.*free space"):
        await store.put(NAME, b"data")
    assert await store.head(NAME) is None
    assert list((tmp_path / ".partial").iterdir()) == []


async def test_put_leaves_no_partial_file(store, tmp_path):
    await store.put(NAME, b"data")
    await store.put(NAME, b"data")
    assert list((tmp_path / ".partial").iterdir()) == []


async def test_leftovers_of_a_crashed_writer_are_ignored_then_removed(tmp_path):
    partials = tmp_path / ".partial"
    partials.mkdir()
    dead, alive = partials / "dead", partials / "alive"
    for path in (dead, alive):
        path.write_bytes(b"half")
    long_ago = time.time() - local_module.PARTIAL_MAX_AGE_SECONDS - 1
    os.utime(dead, (long_ago, long_ago))

    store = LocalStore(tmp_path, timeout_seconds=10.0)
    assert [info async for info in store.list_prefix()] == []
    await store.put(NAME, b"data")
    assert not dead.exists()
    assert alive.exists()


async def test_without_hard_links_objects_are_still_made_once(store, tmp_path, monkeypatch):
    def no_links(source, target):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(local_module.os, "link", no_links)
    assert await store.put(NAME, b"first") is True
    assert await store.put(NAME, b"second") is False
    assert await store.get(NAME) == b"first"
    assert list((tmp_path / ".partial").iterdir()) == []


async def test_quarantine_keeps_bytes_and_reason(store, tmp_path):
    await store.put(NAME, b"rotten")
    await store.quarantine(NAME, "unit 3: digest differs")
    kept = sorted((tmp_path / ".quarantine").iterdir())
    assert [path.read_bytes() for path in kept] == [
        b"rotten",
        f"{NAME}\nunit 3: digest differs\n".encode(),
    ]


def open_as_it_is(path):
    """Opening a FIFO blocks until a writer comes: a hung NFS server, in small."""
    return path.open("rb", buffering=0)


async def test_slow_file_system_ends_in_a_timeout(store, tmp_path, monkeypatch):
    monkeypatch.setattr(local_module, "_open_regular", open_as_it_is)
    fifo = tmp_path / "ab" / "fifo"
    fifo.parent.mkdir()
    os.mkfifo(fifo)
    slow = LocalStore(tmp_path, timeout_seconds=0.05)
    with pytest.raises(StoreTimeoutError, match=r"store\.timeout_seconds"):
        await slow.get("ab/fifo")
    await asyncio.to_thread(fifo.write_bytes, b"")  # lets the abandoned thread end


async def test_a_hung_file_system_takes_no_threads_but_the_stores(tmp_path, monkeypatch):
    monkeypatch.setattr(local_module, "_MAX_THREADS", 2)
    monkeypatch.setattr(local_module, "_open_regular", open_as_it_is)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    fifo = tmp_path / "ab" / "fifo"
    fifo.parent.mkdir()
    os.mkfifo(fifo)
    slow = LocalStore(tmp_path, timeout_seconds=0.5)
    while len(slow._threads._running) < 2:  # a busy machine may not begin one in time
        with pytest.raises(StoreTimeoutError, match="took longer than"):
            await slow.get("ab/fifo")
    started = time.monotonic()
    for _ in range(10):
        with pytest.raises(
            StoreTimeoutError, match=r"2 earlier calls hang.*store\.timeout_seconds"
        ):
            await slow.head(NAME)
    assert time.monotonic() - started < 2.5, "refused at once, not after the timeout"
    await asyncio.to_thread(fifo.write_bytes, b"")  # the file system lives again
    deadline = time.monotonic() + 20
    while True:
        try:
            assert await slow.head(NAME) is None
            break
        except StoreTimeoutError:
            assert time.monotonic() < deadline, "the store did not heal"
            await asyncio.sleep(0.01)


def test_a_hung_file_system_does_not_keep_the_process(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    program = """
import asyncio, sys
from kvfetcher.errors import StoreTimeoutError
from kvfetcher.storage import LocalStore, local
local._open_regular = lambda path: path.open("rb", buffering=0)  # of a FIFO: blocks
try:
    asyncio.run(LocalStore(sys.argv[1], timeout_seconds=0.05).get("fifo"))
except StoreTimeoutError:
    print("timed out", flush=True)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "timed out\n", "")


async def test_latency_store_delays_and_paces(tmp_path):
    store = LatencyStore(
        LocalStore(tmp_path, timeout_seconds=10.0), latency_seconds=0.02, bytes_per_second=1e5
    )
    await store.put(NAME, b"x" * 5000)
    start = time.monotonic()
    await store.get(NAME)
    assert time.monotonic() - start >= 0.07


async def test_faulty_store_fails_and_damages_as_told(tmp_path):
    inner = LocalStore(tmp_path, timeout_seconds=10.0)
    await inner.put(NAME, b"0123456789")
    store = FaultyStore(
        inner,
        errors={"head": StoreError("down")},
        fail_after={"head": 1},
        flip_byte={NAME: 3},
        truncate={NAME: 6},
    )
    assert await store.head(NAME) is not None
    with pytest.raises(StoreError, match="down"):
        await store.head(NAME)
    assert await store.get(NAME) == b"012" + bytes([ord("3") ^ 0xFF]) + b"45"
    assert await store.get_range(NAME, 3, 5) == bytes([ord("3") ^ 0xFF]) + b"4"
    assert await store.get_range(NAME, 8, 10) == b""


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
async def test_what_is_no_regular_file_is_no_object_and_is_not_waited_for(tmp_path, kind):
    store = LocalStore(tmp_path, timeout_seconds=5)
    path = tmp_path / "aa" / "odd"
    path.parent.mkdir()
    {
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
    }[kind]()
    started = time.monotonic()
    for call in (store.get("aa/odd"), store.get_range("aa/odd", 0, 10)):
        with pytest.raises(ChunkNotFoundError):
            await call
    assert time.monotonic() - started < 2
