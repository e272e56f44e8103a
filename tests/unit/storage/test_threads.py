"""Threads for blocking calls: bounded, never blocking an asker or the process."""

import asyncio
import contextlib
import threading
import time
from functools import partial

import pytest

from kvfetcher.storage import threads as threads_module
from kvfetcher.storage.threads import IoThreads


def pool(*, name="test-io", timeout_seconds=10.0, **options):
    io = IoThreads(name, **{"max_threads": 2, "max_stuck": 2, **options})
    io.run = partial(io.run, timeout_seconds=timeout_seconds)
    return io


class Hanging:
    """Calls that hang until `end`."""

    def __init__(self):
        self.may_end = threading.Event()
        self.begun = 0

    def __call__(self):
        self.begun += 1
        self.may_end.wait(60)
        return "late"

    async def has_begun(self):
        async with asyncio.timeout(20):
            while not self.begun:
                await asyncio.sleep(0.001)


@pytest.fixture
def hanging():
    hanging = Hanging()
    yield hanging
    hanging.may_end.set()


async def test_every_call_is_answered_and_no_more_run_at_once_than_allowed():
    io, lock = pool(max_threads=3, max_stuck=3), threading.Lock()
    running = most = 0

    def call(i):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.001)
        with lock:
            running -= 1
        return i

    answers = await asyncio.gather(*(io.run(lambda i=i: call(i)) for i in range(60)))
    assert answers == list(range(60))
    assert most <= 3


@pytest.mark.parametrize("error", [OSError("disk"), TimeoutError("ETIMEDOUT"), KeyError("x")])
async def test_errors_are_the_callers(error):
    def fail():
        raise error

    io = pool()
    for _ in range(5):
        with pytest.raises(type(error), match=error.args[0]):
            await io.run(fail)


async def test_while_too_many_hang_calls_are_refused_at_once(hanging):
    io = pool(timeout_seconds=0.3)
    while hanging.begun < 2:  # a busy machine may not begin one in time
        with pytest.raises(TimeoutError):
            await io.run(hanging)
    ran = []
    for _ in range(10):
        with pytest.raises(TimeoutError, match="2 earlier calls hang"):
            await io.run(lambda: ran.append(1))
    assert not ran
    hanging.may_end.set()
    async with asyncio.timeout(20):
        while not ran:
            with contextlib.suppress(TimeoutError):
                await io.run(lambda: ran.append(1))
            await asyncio.sleep(0.01)


async def test_calls_whose_askers_left_early_count_as_hanging_after_the_timeout(hanging):
    io = pool(timeout_seconds=0.3, max_stuck=1)
    asker = asyncio.create_task(io.run(hanging))
    await hanging.has_begun()
    asker.cancel()
    await asyncio.sleep(0.31)
    with pytest.raises(TimeoutError, match="1 earlier calls"):
        await io.run(lambda: None)


async def test_a_call_with_time_left_is_not_taken_for_hanging(hanging):
    io = IoThreads("test-io", max_threads=2, max_stuck=1)
    large = asyncio.create_task(io.run(hanging, timeout_seconds=60.0))
    await hanging.has_begun()
    assert await io.run(lambda: "small", timeout_seconds=10.0) == "small"
    hanging.may_end.set()
    assert await large == "late"


async def test_a_call_that_nobody_waits_for_any_more_never_begins(hanging):
    io, ran = pool(max_threads=1), []
    first = asyncio.create_task(io.run(hanging))
    second = asyncio.create_task(io.run(lambda: ran.append(1)))
    await hanging.has_begun()
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert not io._waiting
    hanging.may_end.set()
    assert await first == "late"
    await io.run(lambda: None)
    assert (hanging.begun, ran) == (1, [])


async def test_without_a_thread_to_be_had_a_call_fails_and_later_ones_need_not(monkeypatch):
    monkeypatch.setattr(threads_module, "_LINGER_SECONDS", 20.0)
    io = pool()

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(OSError, match="can't start new thread"):
            await io.run(lambda: None)
    assert not io._waiting
    assert await io.run(lambda: 1) == 1
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert await asyncio.gather(*(io.run(lambda: 2) for _ in range(5))) == [2] * 5


async def test_threads_without_work_end(monkeypatch):
    monkeypatch.setattr(threads_module, "_LINGER_SECONDS", 0.05)
    io = pool(name="ending-io")
    for _ in range(3):
        await asyncio.gather(io.run(lambda: None), io.run(lambda: None))
        async with asyncio.timeout(20):
            while any(thread.name == "ending-io" for thread in threading.enumerate()):
                await asyncio.sleep(0.01)
