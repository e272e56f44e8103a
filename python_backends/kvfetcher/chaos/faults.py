"""The kinds of faults: each makes something go wrong and asks the server meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfetcher import wire
from kvfetcher.chaos.link import LinkFault
from kvfetcher.chaos.world import make_prompt
from kvfetcher.errors import KVFetcherError
from kvfetcher_client import Client

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from kvfetcher.chaos.stores import StoreKind
    from kvfetcher.chaos.world import Asked, World
    from kvfetcher.storage.base import Store

_ALL: tuple[StoreKind, ...] = ("file", "redis", "s3")
_REMOTE: tuple[StoreKind, ...] = ("redis", "s3")
_STOPPED_SECONDS = 1.6  # Triton gives a process up after 1 s
_MODELS = (
    wire.PREPROCESSING,
    wire.KV_FETCH,
    wire.KV_DECODE,
    wire.KV_RESTORE,
    wire.KV_ENCODE,
    wire.KV_SAVE,
    wire.TENSORRT_LLM,
    wire.POSTPROCESSING,
)


@dataclass(frozen=True, slots=True)
class FaultKind:
    """One kind of fault.

    `run` makes it, asks, and undoes it; it returns the requests that it asked.
    """

    name: str
    run: Callable[[World, random.Random], list[Asked]]
    stores: tuple[StoreKind, ...] = _ALL
    needs_small_file_systems: bool = False
    """/dev/shm and the store's folder must be this run's own."""


def ask_all(world: World, rng: random.Random) -> list[Asked]:
    """Requests of several kinds: a hit at any price, a hit by choice, a prompt to be saved."""
    new = make_prompt(f"new-{rng.randrange(1 << 40)}")
    return [
        world.ask(rng.choice(world.prompts), kv_policy="fetch"),
        world.ask(rng.choice(world.prompts)),
        world.ask(new),
    ]


def fault_kinds() -> tuple[FaultKind, ...]:
    """All kinds, in the order in which they are run."""
    return (*_link_kinds(), *_object_kinds(), *_store_kinds(), *_process_kinds(), *_other_kinds())


def _link_kinds() -> Iterator[FaultKind]:
    def kind(name: str, make: Callable[[random.Random], LinkFault]) -> FaultKind:
        def run(world: World, rng: random.Random) -> list[Asked]:
            assert world.store.link is not None
            world.store.link.fault = make(rng)
            world.store.link.fault.random = rng
            try:
                asked = ask_all(world, rng)
                _await_some(asked)
            finally:
                world.store.link.fault = LinkFault()
            return asked

        return FaultKind(name, run, _REMOTE)

    yield kind("latency", lambda rng: LinkFault(latency_seconds=rng.uniform(0.05, 0.5)))
    yield kind("jitter", lambda rng: LinkFault(jitter_seconds=rng.uniform(0.1, 1.0)))
    yield kind("slow_link", lambda rng: LinkFault(bytes_per_second=rng.uniform(5e4, 1e6)))
    yield kind("truncation", lambda rng: LinkFault(cut_after_bytes=rng.randrange(1, 200_000)))
    yield kind("bit_flips", lambda rng: LinkFault(flip_every_bytes=rng.randrange(500, 100_000)))
    yield kind("stalled_link", lambda _: LinkFault(stalls=True))
    yield kind("resets", lambda _: LinkFault(resets=True))


def _object_kinds() -> Iterator[FaultKind]:
    def kind(name: str, change: Callable[[bytes, World, random.Random], bytes | None]) -> FaultKind:
        def run(world: World, rng: random.Random) -> list[Asked]:
            async def damage(store: Store) -> None:
                for object_name, data in world.originals.items():
                    if rng.random() < 0.5:
                        await store.delete(object_name)
                        if (changed := change(data, world, rng)) is not None:
                            await store.put(object_name, changed)

            world.on_store(damage)
            try:
                asked = ask_all(world, rng)
                _await_some(asked)
            finally:
                world.restore_objects()
            return asked

        return FaultKind(name, run)

    def flipped(data: bytes, _: World, rng: random.Random) -> bytes:
        changed = bytearray(data)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)

    def swapped(_: bytes, world: World, rng: random.Random) -> bytes:
        return rng.choice(list(world.originals.values()))

    yield kind("object_bit_flip", flipped)
    yield kind("object_cut", lambda data, _, rng: data[: rng.randrange(len(data))])
    yield kind("object_empty", lambda _, __, ___: b"")
    yield kind("object_lost", lambda _, __, ___: None)
    yield kind("object_swapped", swapped)
    yield kind("object_random", lambda data, _, rng: rng.randbytes(len(data)))
    yield kind("object_longer", lambda data, _, rng: data + rng.randbytes(1000))
    yield kind(
        "object_header_random", lambda data, _, rng: data[:64] + rng.randbytes(200) + data[264:]
    )

    def replay(world: World, rng: random.Random) -> list[Asked]:
        """Each chunk's name holds the bytes of the one before it, as of another moment."""
        names = list(world.originals)

        async def shift(store: Store) -> None:
            for name, other in zip(names, names[1:] + names[:1], strict=True):
                await store.delete(name)
                await store.put(name, world.originals[other])

        world.on_store(shift)
        try:
            asked = ask_all(world, rng)
            _await_some(asked)
        finally:
            world.restore_objects()
        return asked

    yield FaultKind("object_replayed", replay)


def _store_kinds() -> Iterator[FaultKind]:
    def killed(world: World, rng: random.Random) -> list[Asked]:
        asked = ask_all(world, rng)
        time.sleep(rng.uniform(0, 0.3))
        world.store.kill()
        try:
            asked += ask_all(world, rng)
            _await_some(asked)
        finally:
            world.store.start()
        world.restore_objects()
        return asked

    def stopped(world: World, rng: random.Random) -> list[Asked]:
        asked = ask_all(world, rng)
        time.sleep(rng.uniform(0, 0.3))
        world.store.stop()
        try:
            asked += ask_all(world, rng)
            _await_some(asked)
        finally:
            world.store.go_on()
        return asked

    def gone(world: World, rng: random.Random) -> list[Asked]:
        moved = world.store.folder.with_name("moved")
        world.store.folder.rename(moved)
        try:
            asked = ask_all(world, rng)
            _await_some(asked)
        finally:
            shutil.rmtree(world.store.folder, ignore_errors=True)
            moved.rename(world.store.folder)
        return asked

    def odd_files(world: World, rng: random.Random) -> list[Asked]:
        path = world.store.folder / rng.choice(list(world.originals))
        path.unlink()
        os.mkfifo(path)
        try:
            asked = ask_all(world, rng)
            _await_some(asked)
        finally:
            path.unlink(missing_ok=True)
            world.restore_objects()
        return asked

    def full(world: World, rng: random.Random) -> list[Asked]:
        from redis import Redis

        with Redis(port=world.store.port) as redis:
            redis.config_set("maxmemory", 1)
            try:
                asked = [*ask_all(world, rng), *ask_all(world, rng)]
                _await_some(asked)
            finally:
                redis.config_set("maxmemory", 0)
        return asked

    def disk_full(world: World, rng: random.Random) -> list[Asked]:
        with _filled(world.store.folder, leave=rng.randrange(200_000)):
            asked = [*ask_all(world, rng), *ask_all(world, rng)]
            _await_some(asked)
            world.settle()  # the saves meet the full disk
        return asked

    yield FaultKind("store_killed", killed, _REMOTE)
    yield FaultKind("store_stopped", stopped, _REMOTE)
    yield FaultKind("store_folder_gone", gone, ("file",))
    yield FaultKind("store_fifo", odd_files, ("file",))
    yield FaultKind("store_full", full, ("redis",))
    yield FaultKind("disk_full", disk_full, ("file",), needs_small_file_systems=True)


def _process_kinds() -> Iterator[FaultKind]:
    def killed(model: str) -> Callable[[World, random.Random], list[Asked]]:
        def run(world: World, rng: random.Random) -> list[Asked]:
            asked = ask_all(world, rng)
            time.sleep(rng.uniform(0, 0.5))
            _signal(world, model, signal.SIGKILL)
            asked += ask_all(world, rng)
            _await_some(asked)
            return asked

        return run

    def stopped(model: str) -> Callable[[World, random.Random], list[Asked]]:
        def run(world: World, rng: random.Random) -> list[Asked]:
            asked = ask_all(world, rng)
            time.sleep(rng.uniform(0, 0.5))
            victims = _signal(world, model, signal.SIGSTOP)
            asked += ask_all(world, rng)
            time.sleep(_STOPPED_SECONDS)
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGCONT)
            _await_some(asked)
            return asked

        return run

    for model in _MODELS:
        yield FaultKind(f"{model}_killed", killed(model))
        yield FaultKind(f"{model}_stopped", stopped(model))
    yield FaultKind("tritonserver_killed", killed(""))
    yield FaultKind("tritonserver_stopped", stopped(""))


def _other_kinds() -> Iterator[FaultKind]:
    def arena_full(world: World, rng: random.Random) -> list[Asked]:
        with world.control() as control:
            blocks = control.stats()["blocks"]["free"]
            tokens = max(1, blocks - rng.randrange(2)) * world.config.engine.tokens_per_block
            lease, _ = control.lease(tokens, ttl_seconds=60)
            try:
                asked = ask_all(world, rng)
                _await_some(asked)
            finally:
                control.release(lease)
        return asked

    def shared_memory_full(world: World, rng: random.Random) -> list[Asked]:
        with _filled(Path("/dev/shm"), leave=rng.randrange(1 << 20)):
            asked = ask_all(world, rng)
            _await_some(asked)
        return asked

    def cancelled(after: str) -> Callable[[World, random.Random], list[Asked]]:
        def run(world: World, rng: random.Random) -> list[Asked]:
            for _ in range(4):
                _cancel(world, rng, after)
            return ask_all(world, rng)

        return run

    def slow_reader(world: World, rng: random.Random) -> list[Asked]:
        with Client(world.url, timeout_seconds=60) as client:
            for _ in client.stream(rng.choice(world.prompts), max_tokens=24):
                time.sleep(0.2)
        return ask_all(world, rng)

    def many_clients(world: World, rng: random.Random) -> list[Asked]:
        return [asked for _ in range(5) for asked in ask_all(world, rng)]

    def same_prefix(world: World, rng: random.Random) -> list[Asked]:
        """Its chunks are saved by several requests, and go meanwhile."""
        prompt = make_prompt(f"same-{rng.randrange(1 << 40)}")
        return [world.ask(prompt) for _ in range(6)]

    yield FaultKind("arena_full", arena_full)
    yield FaultKind("shared_memory_full", shared_memory_full, needs_small_file_systems=True)
    for after in ("at_once", "while_fetching", "in_the_stream"):
        yield FaultKind(f"cancelled_{after}", cancelled(after))
    yield FaultKind("slow_reader", slow_reader)
    yield FaultKind("many_clients", many_clients)
    yield FaultKind("one_prefix_saved_at_once", same_prefix)


def _await_some(asked: list[Asked], *, seconds: float = 8.0) -> None:
    """Keep the fault up until all is answered, but not for ever."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(a.future.done() for a in asked):
        time.sleep(0.05)


def _signal(world: World, model: str, number: signal.Signals) -> list[int]:
    victims = world.processes(model)
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, number)
    return victims


def _cancel(world: World, rng: random.Random, after: str) -> None:
    """Ask and leave."""
    policy: dict[str, Any] = {"kv_policy": "fetch"} if after == "while_fetching" else {}
    with Client(world.url, timeout_seconds=60) as client:
        stream = client.stream(rng.choice(world.prompts), max_tokens=40, **policy)
        if after == "in_the_stream":
            for _ in zip(stream, range(rng.randrange(1, 5)), strict=False):
                pass
            stream.close()
            return
        delay = 0.0 if after == "at_once" else rng.uniform(0.02, 0.3)
        timer = threading.Timer(delay, client.close)
        timer.start()
        with contextlib.suppress(KVFetcherError, ValueError):
            for _ in stream:
                pass
        timer.join()


@contextlib.contextmanager
def _filled(folder: Path, *, leave: int) -> Iterator[None]:
    """The file system has no more than `leave` bytes free meanwhile."""
    path = folder / ".chaos-filler"
    status = os.statvfs(folder)
    size = max(0, status.f_bavail * status.f_frsize - leave)
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, max(1, size))
        yield
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)
