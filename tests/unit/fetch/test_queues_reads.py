import asyncio
import math

import pytest

from kvfetcher.fetch.planning.bandwidth import LinkEstimate
from kvfetcher.fetch.queues import ReadQueue, full_window_bytes


async def started(queue, sizes):
    """Tasks that may read or wait for one, in order."""
    tasks = [asyncio.create_task(queue.take(size)) for size in sizes]
    await asyncio.sleep(0)
    return tasks


@pytest.mark.parametrize(
    ("window_bytes", "max_reads", "expected"),
    [(0, 8, 2), (250, 8, 3), (600, 8, 6), (math.inf, 8, 8), (math.inf, 1, 1), (0, 1, 1)],
)
async def test_two_reads_and_as_many_more_as_fill_the_link(window_bytes, max_reads, expected):
    queue = ReadQueue(max_reads, window_bytes=lambda: window_bytes)
    tasks = await started(queue, [100] * 10)
    assert sum(task.done() for task in tasks) == queue.num_holders == expected
    for _ in tasks:  # every end lets the next one start
        queue.give(100)
        await asyncio.sleep(0)
    assert all(task.done() for task in tasks)
    assert queue.num_holders == 0


async def test_who_came_first_goes_first_and_who_leaves_holds_nobody_up():
    queue = ReadQueue(2, window_bytes=lambda: math.inf)
    tasks = await started(queue, [1, 1, 1, 1, 1])
    tasks[2].cancel()
    queue.give(1)
    tasks[3].cancel()  # granted in this very moment
    await asyncio.gather(*tasks[2:4], return_exceptions=True)
    assert [task.done() and not task.cancelled() for task in tasks] == [1, 1, 0, 0, 1]
    queue.give(1)
    queue.give(1)
    assert queue.num_holders == 0


async def test_who_asks_to_be_last_lets_those_pass_that_come_later():
    queue, got = ReadQueue(1, window_bytes=lambda: 0.0), []

    async def take(name, *, last=False):
        await queue.take(1, last=last)
        got.append(name)

    tasks = [asyncio.create_task(take("first"))]
    for name, last in (("warm", True), ("warmer", True), ("now", False)):
        tasks.append(asyncio.create_task(take(name, last=last)))
    for _ in range(4):
        await asyncio.sleep(0)
        queue.give(1)
    await asyncio.gather(*tasks)
    assert got == ["first", "now", "warm", "warmer"]
    assert queue.num_holders == 0


async def test_who_asks_to_be_last_waits_while_others_wait():
    queue = ReadQueue(2, window_bytes=lambda: 0.0)
    tasks = await started(queue, [1, 1, 1])
    last = asyncio.create_task(queue.take(1, last=True))
    await asyncio.sleep(0)
    queue.give(1)
    await asyncio.sleep(0)
    assert tasks[2].done()
    assert not last.done()
    queue.give(1)
    await last


async def test_a_place_comes_back_when_its_read_fails():
    queue = ReadQueue(1, window_bytes=lambda: 0.0)
    with pytest.raises(OSError, match="gone"):
        async with queue.hold(5):
            raise OSError("gone")
    assert queue.num_holders == 0


def test_the_window_is_what_the_link_holds():
    slow, fast = (LinkEstimate(r, r, r, r, 0.01) for r in (1e6, 1e9))
    assert full_window_bytes(slow) == pytest.approx(15e3)
    assert full_window_bytes(fast) == pytest.approx(15e6)
