"""The guard: the conformance suite through it, and what it does with a store that fails."""

import asyncio
from collections import Counter

import pytest

from kvfetcher.errors import (
    ChunkNotFoundError,
    StoreError,
    StoreFullError,
    StoreThrottledError,
    StoreTimeoutError,
    StoreUnavailableError,
    TransientStoreError,
)
from kvfetcher.storage.base import ByteRange
from kvfetcher.storage.guard import GuardedStore, GuardOptions
from kvfetcher.storage.local import LocalStore
from support.stores import NAME, FaultyStore, LatencyStore, StoreTests, WrappedStore

OPTIONS = GuardOptions(
    max_retries=2,
    hedge_fraction=0.25,
    min_failures=3,
    min_backoff_seconds=1.0,
    max_backoff_seconds=8.0,
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Guard:
    """A guarded store with its clock and what it told."""

    def __init__(self, inner, **options):
        self.inner = inner
        self.clock = Clock()
        self.events = Counter()
        settings = {name: getattr(OPTIONS, name) for name in OPTIONS.__slots__} | options
        self.store = GuardedStore(
            inner,
            GuardOptions(**settings),
            observe=lambda event: self.events.update([event]),
            clock=self.clock,
            uniform=lambda: 1.0,
        )


@pytest.fixture
def local(tmp_path):
    return LocalStore(tmp_path / "store", timeout_seconds=5)


class TestGuarded(StoreTests):
    @pytest.fixture
    def store(self, local):
        return GuardedStore(local, OPTIONS)

    async def raw_get(self, store, name):
        return await store._inner.get(name)

    async def raw_set(self, store, name, data):
        await store._inner.put(name, data)


async def test_a_failure_that_passes_is_retried(local):
    await local.put(NAME, b"0123456789")
    error = TransientStoreError("reset")
    faulty = FaultyStore(local)

    async def twice(verb, name):
        if faulty.calls[verb] <= 2:
            raise error

    faulty.before = twice
    guard = Guard(faulty)
    assert await guard.store.get_range(NAME, 2, 5) == b"234"
    assert (faulty.calls["get_range"], guard.events["retry"]) == (3, 2)


async def test_retries_end(local):
    guard = Guard(FaultyStore(local, errors={"get": TransientStoreError("reset")}), min_failures=9)
    with pytest.raises(TransientStoreError):
        await guard.store.get(NAME)
    assert guard.inner.calls["get"] == 3


@pytest.mark.parametrize("error", [StoreError("denied"), StoreTimeoutError("slow")])
async def test_a_final_failure_is_not_retried(local, error):
    guard = Guard(FaultyStore(local, errors={"get": error}))
    with pytest.raises(type(error)):
        await guard.store.get(NAME)
    assert guard.inner.calls["get"] == 1


async def test_a_dead_store_is_soon_not_asked_any_more_and_asked_again_later(local):
    await local.put(NAME, b"data")
    faulty = FaultyStore(local, errors={"get": StoreError("down")})
    guard = Guard(faulty)
    for _ in range(3):
        with pytest.raises(StoreError, match="down"):
            await guard.store.get(NAME)
    for _ in range(5):
        with pytest.raises(StoreUnavailableError, match=r"again in 1\.0 s"):
            await guard.store.get(NAME)
    assert faulty.calls["get"] == 3
    faulty.errors.clear()
    guard.clock.now += 1.0
    assert await guard.store.get(NAME) == b"data"
    assert guard.store.breaker.state == "closed"
    assert guard.events == {"failure": 3, "opened": 1, "refused": 5, "closed": 1}


async def test_every_verb_is_refused_while_the_breaker_is_open(local):
    faulty = FaultyStore(local, errors={"get": StoreError("down")})
    guard = Guard(faulty, min_failures=1)
    with pytest.raises(StoreError):
        await guard.store.get(NAME)
    calls = [
        guard.store.get(NAME),
        guard.store.get_range(NAME, 0, 1),
        guard.store.head(NAME),
        guard.store.put(NAME, b""),
        guard.store.delete(NAME),
        guard.store.quarantine(NAME, "why"),
        anext(guard.store.list_prefix("")),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailableError):
            await call
    answers = await guard.store.get_ranges([ByteRange(NAME, 0, 1)] * 2)
    assert [type(answer) for answer in answers] == [StoreUnavailableError] * 2
    assert faulty.calls.total() == 1


async def test_missing_objects_and_bad_names_do_not_open_the_breaker(local):
    guard = Guard(local)
    for _ in range(20):
        with pytest.raises(ChunkNotFoundError):
            await guard.store.get(NAME)
        with pytest.raises(StoreError, match="not allowed"):
            await guard.store.get("../escape")
        with pytest.raises(StoreError, match="empty or negative"):
            await guard.store.get_range(NAME, 3, 3)
    assert guard.store.breaker.state == "closed"


async def test_of_a_batch_only_what_failed_in_passing_is_asked_again(local):
    await local.put("aa/1", b"one")
    await local.put("aa/2", b"two")
    asked = []

    class Half(WrappedStore):
        async def get_ranges(self, ranges):
            asked.append([part.name for part in ranges])
            answers = await local.get_ranges(ranges)
            if len(asked) == 1:
                answers[1] = TransientStoreError("reset")
            return answers

    guard = Guard(Half(local))
    ranges = [ByteRange(name, 0, 9) for name in ("aa/1", "aa/2", "aa/3")]
    first, second, third = await guard.store.get_ranges(ranges)
    assert (first, second) == (b"one", b"two")
    assert isinstance(third, ChunkNotFoundError)
    assert asked == [["aa/1", "aa/2", "aa/3"], ["aa/2"]]


async def test_a_batch_of_which_nothing_is_answered_is_one_failure(local):
    class Down(WrappedStore):
        async def get_ranges(self, ranges):
            return [StoreError("down")] * len(ranges)

    guard = Guard(Down(local), min_failures=2)
    for _ in range(2):
        answers = await guard.store.get_ranges([ByteRange(NAME, 0, 1)] * 10)
        assert [str(answer) for answer in answers] == ["down"] * 10
    assert guard.events["failure"] == 2
    assert guard.store.breaker.state == "open"


class Straggler(WrappedStore):
    """The reads whose number (from 1) is in `slow` never end."""

    def __init__(self, inner, slow):
        super().__init__(inner)
        self.slow = slow
        self.cancelled = 0

    async def before(self, verb, name):
        if self.calls["get_range"] in self.slow:
            try:
                await asyncio.sleep(60)
            finally:
                self.cancelled += 1


def warmed(inner, seconds=0.05, **options):
    guard = Guard(inner, **options)
    for _ in range(20):
        guard.store._hedges.record(4, seconds)
    return guard


async def test_a_stuck_read_is_overtaken_by_a_second_one(local):
    await local.put(NAME, b"0123456789")
    guard = warmed(Straggler(local, slow={1}))
    data = await asyncio.wait_for(guard.store.get_range(NAME, 0, 4), timeout=5)
    assert data == b"0123"
    assert (guard.events["hedge"], guard.events["hedge_won"]) == (1, 1)
    assert guard.inner.cancelled == 1


async def test_the_second_read_failing_leaves_the_first_its_time(local):
    await local.put(NAME, b"0123456789")
    slow = LatencyStore(local, latency_seconds=0.4)
    faulty = FaultyStore(
        slow, errors={"get_range": StoreError("down")}, fail_after={"get_range": 1}
    )
    guard = warmed(faulty)
    assert await guard.store.get_range(NAME, 0, 4) == b"0123"
    assert (guard.events["hedge"], guard.events["hedge_won"]) == (1, 0)


@pytest.mark.parametrize("failing", [1, 2])
async def test_of_reads_that_end_at_once_the_one_that_succeeded_counts(local, failing):
    class Pair(WrappedStore):
        """Both reads end when the second has come."""

        def __init__(self, inner):
            super().__init__(inner)
            self.both = asyncio.Event()

        async def get_range(self, name, start, end):
            self.calls["get_range"] += 1
            number = self.calls["get_range"]
            if number == 2:
                self.both.set()
            await self.both.wait()
            await asyncio.sleep(0)
            if number == failing:
                raise StoreError("down")
            return b"0123"

    for _ in range(20):  # which of the two is looked at first is a matter of chance
        guard = warmed(Pair(local), seconds=0.001)
        assert await guard.store.get_range(NAME, 0, 4) == b"0123"
        assert guard.events["hedge_won"] == (failing == 1)
        assert guard.events["failure"] == 0


async def test_without_budget_there_is_no_second_read(local):
    await local.put(NAME, b"0123456789")
    guard = warmed(LatencyStore(local, latency_seconds=0.3))
    while guard.store._hedges.take():
        pass
    assert await guard.store.get_range(NAME, 0, 4) == b"0123"
    assert guard.inner.calls["get_range"] == 1


async def test_cancelling_a_hedged_read_cancels_both(local):
    await local.put(NAME, b"0123456789")
    guard = warmed(Straggler(local, slow={1, 2}))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(guard.store.get_range(NAME, 0, 4), timeout=0.5)
    assert guard.inner.cancelled == 2
    assert guard.store.breaker.state == "closed"


async def test_a_read_given_up_long_after_its_like_was_answered_counts_as_a_failure(local):
    guard = warmed(Straggler(local, slow={1}), min_failures=1, hedge_fraction=0.0)
    read = asyncio.create_task(guard.store.get_range(NAME, 0, 4))
    while not guard.inner.calls["get_range"]:
        await asyncio.sleep(0.01)
    guard.clock.now += 2.0
    read.cancel()
    with pytest.raises(asyncio.CancelledError):
        await read
    assert guard.store.breaker.state == "open"


class Stalled(WrappedStore):
    """Batches wait for `gate`; then the store's own timeout ends them, or it answers after all."""

    def __init__(self, inner, *, answers_after_all=False):
        super().__init__(inner)
        self.gate = asyncio.Event()
        self.answers_after_all = answers_after_all
        self.running = self.most = self.cancelled = 0

    async def get_ranges(self, ranges):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if self.answers_after_all:
            return await self.inner.get_ranges(ranges)
        return [StoreTimeoutError("no answer")] * len(ranges)


HEADER = [ByteRange(NAME, 0, 8 << 10)]


async def give_up_on(call):
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call, timeout=0.02)


async def let_leftovers_end(guard):
    guard.inner.gate.set()
    await asyncio.wait(guard.store._leftovers, timeout=20)
    guard.inner.gate.clear()


async def test_look_ups_that_their_askers_leave_open_the_breaker_and_it_heals(local):
    await local.put(NAME, b"header")
    guard = Guard(Stalled(local))
    for _ in range(3):
        await give_up_on(guard.store.get_ranges(HEADER))
    assert guard.store.breaker.state == "closed"
    await let_leftovers_end(guard)
    assert guard.events == {"failure": 3, "opened": 1}
    (answer,) = await guard.store.get_ranges(HEADER)
    assert isinstance(answer, StoreUnavailableError)

    guard.clock.now += 1.0
    await give_up_on(guard.store.get_ranges(HEADER))
    assert guard.store.breaker.state == "half-open"  # the probe goes on, too
    await let_leftovers_end(guard)
    assert guard.store.breaker.state == "open"

    guard.inner.answers_after_all = True
    guard.clock.now += 2.0
    await give_up_on(guard.store.get_ranges(HEADER))
    await let_leftovers_end(guard)
    assert guard.store.breaker.state == "closed"
    assert guard.inner.cancelled == 0


async def test_a_late_answer_to_a_left_look_up_counts_for_the_store(local):
    guard = Guard(Stalled(local, answers_after_all=True), min_failures=1)
    await give_up_on(guard.store.get_ranges(HEADER))
    await let_leftovers_end(guard)
    assert not guard.events
    assert guard.store.breaker.state == "closed"
    assert not guard.store._leftovers


async def test_only_so_many_left_look_ups_run_on_as_open_the_breaker(local):
    guard = Guard(Stalled(local), window=8, min_failures=3)
    for _ in range(7):
        await give_up_on(guard.store.get_ranges(HEADER))
    assert (guard.inner.running, guard.inner.most, guard.inner.cancelled) == (4, 5, 3)
    assert guard.store.breaker.state == "closed"
    await guard.store.close()
    assert (guard.inner.running, guard.inner.cancelled) == (0, 7)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_transfer_is_cancelled_with_its_asker(local):
    guard = Guard(Straggler(local, slow={1}))
    await give_up_on(guard.store.get_range(NAME, 0, 4))
    assert guard.inner.cancelled == 1
    guard = Guard(Stalled(local))
    await give_up_on(guard.store.get_ranges([ByteRange(NAME, 0, 2 << 20)]))
    assert guard.inner.cancelled == 1
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_full_store_is_not_a_dead_one(local):
    """Its error must not be hidden behind `store_unavailable`, and what it holds is still read."""
    await local.put(NAME, b"data")
    guard = Guard(FaultyStore(local, errors={"put": StoreFullError("maxmemory")}))
    for number in range(40):
        with pytest.raises(StoreFullError, match="maxmemory"):
            await guard.store.put(f"bb/{number}", b"x")
    assert await guard.store.get(NAME) == b"data"
    assert guard.events == {}


async def test_a_store_that_asks_for_fewer_calls_is_not_a_dead_one(local):
    await local.put(NAME, b"data")
    faulty = FaultyStore(local, errors={"get": StoreThrottledError("503 SlowDown")})
    guard = Guard(faulty, max_retries=0)
    for _ in range(40):
        with pytest.raises(StoreThrottledError):
            await guard.store.get(NAME)
    assert guard.store.breaker.state == "closed"
    assert guard.events == {"throttled": 40}
    faulty.errors.clear()
    assert await guard.store.get(NAME) == b"data"


async def test_one_object_that_hangs_does_not_take_the_store_from_others(local):
    class OneHangs(WrappedStore):
        async def before(self, verb, name):
            if name == "aa/hangs":
                raise StoreTimeoutError("it took too long")

    await local.put(NAME, b"data")
    guard = Guard(OneHangs(local))
    for _ in range(40):
        with pytest.raises(StoreTimeoutError):
            await guard.store.get("aa/hangs")
        assert await guard.store.get(NAME) == b"data"
    assert guard.store.breaker.state == "closed"


async def test_a_store_that_hangs_at_everything_opens_the_breaker(local):
    guard = Guard(FaultyStore(local, errors={"get": StoreTimeoutError("it took too long")}))
    for _ in range(3):
        with pytest.raises(StoreTimeoutError):
            await guard.store.get(NAME)
    with pytest.raises(StoreUnavailableError):
        await guard.store.get(NAME)
