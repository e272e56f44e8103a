"""Places by priority: bounded, in order, none lost."""

import asyncio

import pytest

from kvfetcher.fetch.queues import PrioritySlots


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


class Holders:
    def __init__(self, slots):
        self.slots = slots
        self.log = []
        self.gates = {}
        self.tasks = {}

    async def enter(self, name, *priority):
        self.gates[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, priority))
        await settle()

    async def _hold(self, name, priority):
        async with self.slots.hold(priority):
            self.log.append(name)
            await self.gates[name].wait()

    async def leave(self, name):
        self.gates[name].set()
        await settle()


async def test_the_smallest_priority_goes_first_and_equals_in_order_of_arrival():
    holders = Holders(PrioritySlots(1))
    for name, *priority in (("a", 5), ("d", 2, 1), ("c", 2, 0), ("e", 2, 1), ("b", 1, 9)):
        await holders.enter(name, *priority)
    for name in "abcde":
        await holders.leave(name)
    assert holders.log == ["a", "b", "c", "d", "e"]


async def test_places_are_bounded_and_come_back():
    holders = Holders(PrioritySlots(2))
    for number in range(4):
        await holders.enter(number, number)
    assert holders.log == [0, 1]
    await holders.leave(1)
    await holders.leave(0)
    assert holders.log == [0, 1, 2, 3]


async def test_one_who_leaves_while_waiting_is_passed_over():
    holders = Holders(PrioritySlots(1))
    for number in range(3):
        await holders.enter(number, number)
    holders.tasks[1].cancel()
    await settle()
    await holders.leave(0)
    assert holders.log == [0, 2]


async def test_a_place_given_to_one_who_is_leaving_goes_to_the_next():
    holders = Holders(PrioritySlots(1))
    for number in range(3):
        await holders.enter(number, number)
    holders.gates[0].set()
    await holders.tasks[0]
    holders.tasks[1].cancel()  # its turn came, but it has not run yet
    with pytest.raises(asyncio.CancelledError):
        await holders.tasks[1]
    await settle()
    assert holders.log[-1] == 2
