"""A TCP link between server and store that can be made slow, unreliable or dead at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from dataclasses import dataclass, field
from typing import Self

_PART_BYTES = 1 << 14
_START_SECONDS = 10.0


@dataclass(slots=True)
class LinkFault:
    """What the link does to what the store answers; the defaults do nothing."""

    latency_seconds: float = 0.0
    jitter_seconds: float = 0.0
    bytes_per_second: float = 0.0
    """0 = as fast as it goes."""
    cut_after_bytes: int = 0
    """Each connection ends after this many bytes; 0 = none does."""
    flip_every_bytes: int = 0
    """One bit is wrong in this many bytes; 0 = none is."""
    stalls: bool = False
    """Nothing passes, and nothing is closed."""
    resets: bool = False
    """New connections and running ones are closed."""
    random: random.Random = field(default_factory=random.Random)


class Link:
    """Listens on a port of its own and passes connections on; a context manager.

    Args:
        target_port: of the store, on 127.0.0.1.
    """

    def __init__(self, target_port: int) -> None:
        self.fault = LinkFault()
        """Replaced to change what happens from now on."""
        self.port = 0
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvfetcher-chaos-link", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._is_up.wait(_START_SECONDS):
            raise TimeoutError("the link of the chaos run did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._pass_on, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._is_up.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _pass_on(
        self, near_reader: asyncio.StreamReader, near_writer: asyncio.StreamWriter
    ) -> None:
        try:
            if self.fault.resets:
                return
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
            try:
                done, left = await asyncio.wait(
                    [
                        asyncio.create_task(_copy(near_reader, far_writer)),
                        asyncio.create_task(self._answer(far_reader, near_writer)),
                    ],
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in left:
                    task.cancel()
                await asyncio.gather(*done, *left, return_exceptions=True)
            finally:
                far_writer.close()
        except OSError:  # the store is down
            pass
        finally:
            near_writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed = 0
        while part := await reader.read(_PART_BYTES):
            fault = self.fault
            while fault.stalls:
                await asyncio.sleep(0.05)
                fault = self.fault
            if fault.resets:
                return
            delay = fault.latency_seconds + fault.jitter_seconds * fault.random.random()
            if fault.bytes_per_second:
                delay += len(part) / fault.bytes_per_second
            if delay:
                await asyncio.sleep(delay)
            if fault.flip_every_bytes:
                part = _flipped(part, fault)
            if fault.cut_after_bytes and passed + len(part) >= fault.cut_after_bytes:
                writer.write(part[: max(0, fault.cut_after_bytes - passed)])
                return
            passed += len(part)
            writer.write(part)
            await writer.drain()


def _flipped(part: bytes, fault: LinkFault) -> bytes:
    data = bytearray(part)
    for _ in range(max(1, len(part) // fault.flip_every_bytes)):
        data[fault.random.randrange(len(data))] ^= 1 << fault.random.randrange(8)
    return bytes(data)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while part := await reader.read(_PART_BYTES):
            writer.write(part)
            await writer.drain()
