"""The bound on bytes: never exceeded, in order of arrival, nothing lost on cancellation."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.fetch.queues import ByteBudget


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_takers_wait_in_order_of_arrival():
    budget, got = ByteBudget(10), []

    async def take(name, num_bytes):
        await budget.take(num_bytes)
        got.append(name)

    tasks = [asyncio.create_task(take(n, b)) for n, b in (("a", 6), ("b", 6), ("c", 1))]
    await settle()
    assert got == ["a"], "c must not pass b, or b would wait for ever"
    budget.give(6)
    await settle()
    assert (got, budget.used_bytes) == (["a", "b", "c"], 7)
    await asyncio.gather(*tasks)


async def test_one_larger_than_the_bound_goes_alone():
    budget = ByteBudget(10)
    await budget.take(25)
    waiting = asyncio.create_task(budget.take(1))
    await settle()
    assert not waiting.done()
    budget.give(25)
    await waiting
    assert budget.used_bytes == 1


async def test_a_cancelled_waiter_makes_room_for_the_next():
    budget = ByteBudget(10)
    await budget.take(8)
    first, second = (asyncio.create_task(budget.take(n)) for n in (9, 2))
    await settle()
    first.cancel()
    await settle()
    assert second.done()
    assert budget.used_bytes == 10


async def test_what_was_granted_to_one_who_left_is_given_back():
    budget = ByteBudget(10)
    await budget.take(10)
    waiting = asyncio.create_task(budget.take(4))
    await settle()
    budget.give(10)  # grants, and before the waiter runs ...
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert budget.used_bytes == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "give", "cancel"]), st.integers(1, 15)), max_size=40
    )
)
def test_the_bound_holds_whatever_happens(steps):
    async def run():
        budget, waiting, held = ByteBudget(10), [], []
        for step, number in steps:
            if step == "take":
                waiting.append((number, asyncio.create_task(budget.take(number))))
            elif step == "give" and held:
                budget.give(held.pop(number % len(held)))
            elif step == "cancel" and waiting:
                waiting[number % len(waiting)][1].cancel()
            await settle()
            held += [n for n, task in waiting if task.done() and not task.cancelled()]
            waiting = [(n, task) for n, task in waiting if not task.done()]
            assert budget.used_bytes == sum(held)
            assert budget.used_bytes <= 10 or len(held) == 1
            assert held or not waiting, "somebody may always go"
        for _, task in waiting:
            task.cancel()
        await settle()

    asyncio.run(run())


async def test_room_that_comes_as_a_waiter_is_cancelled_goes_to_the_next():
    budget = ByteBudget(10)
    await budget.take(10)
    first, second = (asyncio.create_task(budget.take(n)) for n in (9, 3))
    await settle()
    first.cancel()
    budget.give(10)  # before the first one runs again
    await settle()
    assert second.done()
    assert budget.used_bytes == 3
