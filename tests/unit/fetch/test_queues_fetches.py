"""Places: bounded, ordered by `order.py`, and none lost on cancellation."""

import asyncio
import time

import pytest

from kvfetcher.fetch.queues import FetchQueue


class Visitor:
    """Enters the queue and leaves when told."""

    def __init__(self, queue, tenant, seconds, log):
        self.leave = asyncio.Event()
        self.tenant = tenant
        self.task = asyncio.create_task(self._visit(queue, seconds, log))

    async def _visit(self, queue, seconds, log):
        async with queue.slot(self.tenant, fetch_seconds=seconds):
            log.append(f"{self.tenant}{seconds:g}")
            await self.leave.wait()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def enter(queue, log, *visits):
    visitors = [Visitor(queue, tenant, seconds, log) for tenant, seconds in visits]
    await settle()
    return visitors


def make(num_slots=1, ageing=0.001, max_waiting=256):
    return FetchQueue(
        num_slots=num_slots, max_waiting=max_waiting, ageing=ageing, clock=time.monotonic
    )


async def empty(visitors):
    for visitor in visitors:
        visitor.leave.set()
    await asyncio.gather(*(visitor.task for visitor in visitors), return_exceptions=True)


async def test_places_are_bounded():
    queue, log = make(num_slots=3), []
    visitors = await enter(queue, log, *(("a", i) for i in range(5)))
    assert (len(log), queue.num_waiting) == (3, 2)
    await empty(visitors)
    assert (len(log), queue.num_waiting) == (5, 0)


async def test_short_fetches_pass_long_ones_of_their_tenant():
    queue, log = make(), []
    visitors = await enter(queue, log, ("a", 1), ("a", 9), ("a", 3), ("a", 2))
    await empty(visitors)
    assert log == ["a1", "a2", "a3", "a9"]


async def test_one_tenants_many_fetches_do_not_keep_another_one_waiting():
    queue, log = make(), []
    visitors = await enter(queue, log, *(("a", 5) for _ in range(5)))
    visitors += await enter(queue, log, ("b", 5))
    await empty(visitors)
    assert log.index("b5") == 1


async def test_one_who_leaves_while_waiting_takes_no_place():
    queue, log = make(), []
    first, second, third = await enter(queue, log, ("a", 1), ("a", 2), ("a", 3))
    second.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second.task
    await empty([first, third])
    assert log == ["a1", "a3"]


async def test_a_place_given_to_one_who_is_just_leaving_goes_to_the_next():
    queue, log = make(), []
    first, second, third = await enter(queue, log, ("a", 1), ("a", 2), ("a", 3))
    first.leave.set()
    await first.task
    second.task.cancel()  # its turn came, but it has not run yet
    await settle()
    await empty([third])
    assert log[-1] == "a3"
    assert queue.num_waiting == 0


async def test_a_line_is_full_once_so_many_wait():
    queue, log = make(max_waiting=1), []
    assert not queue.is_full
    visitors = await enter(queue, log, ("a", 1))
    assert not queue.is_full, "the place is taken, but nobody waits"
    visitors += await enter(queue, log, ("a", 2))
    assert queue.is_full
    await empty(visitors)
    assert not queue.is_full
    assert not make(max_waiting=0).is_full, "a free place needs no waiting"
