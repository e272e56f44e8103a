"""Decisions on rank 0: recognition, clamping, and faults that stay inside."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.engines.connector import scheduler as scheduler_module
from kvfetcher.engines.connector.messages import (
    Announce,
    Announced,
    Finished,
    Matched,
    Withdraw,
    Withdrawn,
)
from kvfetcher.engines.connector.scheduler import ConnectorScheduler, Failed, usable_tokens
from kvfetcher.memory.leases import tokens_digest

BLOCK = 8
PROMPT = list(range(100, 170))


@dataclass
class Outbox:
    sent: list = field(default_factory=list)
    is_open: bool = True

    def send(self, message):
        self.sent.append(message)

    def of(self, kind):
        return [message for message in self.sent if isinstance(message, kind)]


@dataclass
class Request:
    request_id: int = 1
    tokens: list = field(default_factory=lambda: list(PROMPT))

    def get_tokens(self, beam):
        assert beam == 0
        return self.tokens


class Salted(Request):
    cache_salt = "b"


class Unsalted(Request):
    cache_salt = None


class Numbered(Request):
    cache_salt_id = 77


class Unnumbered(Request):
    cache_salt_id = None


class NumberedAlone(Request):
    cache_salt = None
    cache_salt_id = 77


def announce(key="k", prompt=PROMPT, salt="", lease=64, save=True, probe=False):
    return Announce(
        key=key,
        tokens_digest=tokens_digest(prompt),
        num_prompt_tokens=len(prompt),
        cache_salt=salt,
        lease_tokens=lease,
        lease_blocks=tuple(range(40, 40 + lease // BLOCK)),
        save=save,
        probe=probe,
    )


@pytest.fixture
def outbox():
    return Outbox()


@pytest.fixture
def scheduler(outbox):
    return ConnectorScheduler(outbox, tokens_per_block=BLOCK, async_load_tokens=0)


def output(*new, cached=()):
    return SimpleNamespace(new_requests=list(new), cached_requests=list(cached))


def data(request_id=1, position=0, number=70):
    return SimpleNamespace(
        request_id=request_id, computed_position=position, num_scheduled_tokens=number
    )


@given(
    lease=st.integers(0, 200),
    prompt=st.integers(1, 200),
    computed=st.integers(0, 199),
    block=st.integers(1, 64),
)
def test_offer_is_whole_blocks_and_leaves_a_token(lease, prompt, computed, block):
    computed = min(computed, prompt - 1)
    number = usable_tokens(lease, prompt_tokens=prompt, computed=computed, block=block)
    assert number >= 0
    assert number % block == 0
    if number:
        assert computed % block == 0
        assert computed + number <= min(lease, prompt - 1)
        assert computed + number + block > min(lease, prompt - 1)


def test_load_covers_what_the_engine_lacks(scheduler, outbox):
    scheduler.receive(announce())
    assert outbox.sent == [Announced("k")]
    assert scheduler.get_num_new_matched_tokens(Request(), 16) == (48, False)
    scheduler.update_state_after_alloc(Request(), list(range(9)))
    meta = scheduler.build_connector_meta(output(data(position=16, number=6)))
    (load,) = meta.loads
    assert load.arena_blocks == tuple(range(42, 48))
    assert load.pool_blocks == (tuple(range(2, 8)),)
    assert scheduler.build_connector_meta(output()).loads == ()
    assert scheduler.build_connector_meta(output()).sequence == meta.sequence + 2


def test_unknown_prompts_are_not_hashed(scheduler, monkeypatch):
    scheduler.receive(announce())
    monkeypatch.setattr(scheduler_module, "tokens_digest", None)
    assert scheduler.get_num_new_matched_tokens(Request(tokens=PROMPT[:-1]), 0) == (0, False)
    assert scheduler.counters.faults == 0


def test_prompt_of_another_tokens_is_not_matched(scheduler):
    scheduler.receive(announce())
    assert scheduler.get_num_new_matched_tokens(Request(tokens=PROMPT[::-1]), 0) == (0, False)
    assert scheduler.counters.unmatched == 1


def test_equal_prompts_of_two_salts_match_only_where_the_salt_is_told(scheduler):
    scheduler.receive(announce("a", salt="a"))
    scheduler.receive(announce("b", salt="b"))
    assert scheduler.get_num_new_matched_tokens(Request(1), 0) == (0, False)
    assert scheduler.get_num_new_matched_tokens(Salted(2), 0) == (64, False)
    assert scheduler.get_num_new_matched_tokens(Request(3), 0) == (64, False)  # only a is left


@pytest.mark.parametrize("kind", [Unsalted, Unnumbered])
def test_request_without_a_salt_is_not_taken_for_a_salted_one(scheduler, kind):
    scheduler.receive(announce("a", salt="a"))
    assert scheduler.get_num_new_matched_tokens(kind(1), 0) == (0, False)
    scheduler.receive(announce("plain"))
    assert scheduler.get_num_new_matched_tokens(kind(2), 0) == (64, False)
    assert scheduler._tracked[2].announce.key == "plain"


@pytest.mark.parametrize("kind", [Numbered, NumberedAlone])
def test_request_with_a_salt_that_is_not_told_is_salted(scheduler, kind):
    scheduler.receive(announce("plain"))
    assert scheduler.get_num_new_matched_tokens(kind(1), 0) == (0, False)
    scheduler.receive(announce("a", salt="a"))
    assert scheduler.get_num_new_matched_tokens(kind(2), 0) == (64, False)
    scheduler.receive(announce("b", salt="b"))
    scheduler.receive(announce("c", salt="c"))
    assert scheduler.get_num_new_matched_tokens(kind(3), 0) == (0, False)  # whose is it?


@pytest.mark.parametrize("order", ["saved first", "unsaved first"])
def test_of_equal_prompts_none_is_saved_where_one_must_not_be(scheduler, outbox, order):
    saves = [order == "saved first", order != "saved first"]
    for key, save in zip("ab", saves, strict=True):
        scheduler.receive(announce(key, save=save))
    for request_id in (1, 2):
        request = Request(request_id, [*PROMPT, 7])
        request.tokens = list(PROMPT)
        scheduler.get_num_new_matched_tokens(request, 0)
        scheduler.update_state_after_alloc(request, list(range(9)))
        scheduler.build_connector_meta(output(data(request_id, number=6)))
        request.tokens.append(7)
        assert scheduler.request_finished(request, list(range(9))) is False
    assert [m.tokens_with_kv for m in outbox.of(Finished)] == [0, 0]
    scheduler.receive(announce("c"))  # alone again
    scheduler.get_num_new_matched_tokens(Request(3), 0)
    assert scheduler._tracked[3].announce.save


def test_withdrawn_request_is_not_matched(scheduler, outbox):
    scheduler.receive(announce())
    scheduler.receive(Withdraw("k"))
    assert outbox.of(Withdrawn) == [Withdrawn("k", used=False)]
    assert scheduler.get_num_new_matched_tokens(Request(), 0) == (0, False)
    scheduler.receive(announce())
    scheduler.get_num_new_matched_tokens(Request(), 0)
    scheduler.receive(Withdraw("k"))
    assert outbox.of(Withdrawn)[-1] == Withdrawn("k", used=True)


def test_nothing_is_offered_once_the_owner_is_lost(scheduler, outbox):
    scheduler.receive(announce())
    scheduler.receive(announce("later"))
    assert scheduler.get_num_new_matched_tokens(Request(1), 0) == (64, False)
    outbox.is_open = False
    assert scheduler.get_num_new_matched_tokens(Request(2), 0) == (0, False)
    assert scheduler.get_num_new_matched_tokens(Request(1), 0) == (0, False)  # allocated again
    scheduler.update_state_after_alloc(Request(1), list(range(9)))
    assert scheduler.build_connector_meta(output(data())).loads == ()
    outbox.is_open = True  # not even then: it was forgotten
    assert scheduler.get_num_new_matched_tokens(Request(3), 0) == (0, False)
    assert scheduler.counters.faults == 0


def test_announcements_are_bounded(scheduler, outbox, monkeypatch):
    monkeypatch.setattr(scheduler_module, "MAX_ANNOUNCED", 3)
    for number in range(5):
        scheduler.receive(announce(f"k{number}", prompt=[number] * (20 + number), lease=16))
    assert scheduler.get_num_new_matched_tokens(Request(1, [1] * 21), 0) == (0, False)
    assert scheduler.get_num_new_matched_tokens(Request(2, [2] * 22), 0) == (16, False)
    assert len(scheduler._announced._lengths) == 2
    # Its owner would wait for ever for the end of a request that is not going to be recognised.
    assert outbox.of(Withdrawn) == [Withdrawn("k0", used=False), Withdrawn("k1", used=False)]


def test_request_that_ends_before_its_load_gives_the_lease_back(scheduler, outbox):
    scheduler.receive(announce())
    scheduler.get_num_new_matched_tokens(Request(), 0)
    scheduler.update_state_after_alloc(Request(), list(range(9)))
    assert scheduler.request_finished(Request(), list(range(9))) is False
    assert outbox.of(Matched)[-1].num_loaded_tokens == 0
    assert not outbox.of(Finished)[0].is_pinned


def test_replay_before_the_load_is_offered_again_and_after_it_is_not(scheduler):
    scheduler.receive(announce())
    assert scheduler.get_num_new_matched_tokens(Request(), 0) == (64, False)
    assert scheduler.get_num_new_matched_tokens(Request(), 0) == (64, False)
    scheduler.update_state_after_alloc(Request(), list(range(10, 19)))
    assert scheduler.build_connector_meta(output(data())).loads[0].pool_blocks[0][0] == 10
    assert scheduler.get_num_new_matched_tokens(Request(), 0) == (0, False)


def test_parked_request_keeps_its_blocks_when_it_is_cancelled(outbox):
    scheduler = ConnectorScheduler(outbox, tokens_per_block=BLOCK, async_load_tokens=8)
    scheduler.receive(announce())
    assert scheduler.get_num_new_matched_tokens(Request(), 0) == (64, True)
    scheduler.update_state_after_alloc(Request(), list(range(9)))
    assert scheduler.build_connector_meta(output()).loads[0].is_async
    assert scheduler.request_finished(Request(), list(range(9))) is True
    (finished,) = outbox.of(Finished)
    assert finished.is_pinned
    assert finished.tokens_with_kv == 0


def test_finished_tells_what_has_kv(scheduler, outbox):
    scheduler.receive(announce())
    scheduler.get_num_new_matched_tokens(Request(), 0)
    scheduler.update_state_after_alloc(Request(), list(range(9)))
    scheduler.build_connector_meta(output(data(position=0, number=6)))  # the load is left out
    scheduler.build_connector_meta(output(cached=[data(position=70, number=1)]))
    tokens = [*PROMPT, 7, 8]
    assert scheduler.request_finished(Request(tokens=tokens), list(range(9))) is True
    (finished,) = outbox.of(Finished)
    assert finished.tokens_with_kv == 71
    assert finished.token_ids == (7,)


def test_faults_stay_inside_and_are_counted(scheduler):
    broken = SimpleNamespace(request_id=1)
    scheduler.receive(announce())
    assert scheduler.get_num_new_matched_tokens(broken, 0) == (0, False)
    scheduler.get_num_new_matched_tokens(Request(), 0)
    scheduler.update_state_after_alloc(Request(), None)
    assert scheduler.request_finished(broken, []) is True  # blocks are held rather than lost
    assert scheduler.counters.faults == 3


def test_owner_hears_of_the_end_whatever_fails(scheduler, outbox):
    scheduler.receive(announce())
    scheduler.get_num_new_matched_tokens(Request(), 0)
    scheduler.update_state_after_alloc(Request(), list(range(9)))
    scheduler.build_connector_meta(output(data()))
    assert scheduler.request_finished(SimpleNamespace(request_id=1), list(range(9))) is True
    assert outbox.of(Finished) == [Finished("k", 1, True, 0, (), ())]
    assert scheduler.counters.faults == 1


def test_batch_that_cannot_be_read_costs_saves_and_no_loads(scheduler, outbox):
    assert scheduler.build_connector_meta(None).loads == ()
    scheduler.receive(announce())
    scheduler.get_num_new_matched_tokens(Request(), 0)
    scheduler.update_state_after_alloc(Request(), list(range(9)))
    meta = scheduler.build_connector_meta(SimpleNamespace(new_requests=[object()]))
    assert len(meta.loads) == 1
    assert meta.sequence == 2
    assert scheduler.request_finished(Request(), list(range(9))) is False
    assert outbox.of(Finished)[0].tokens_with_kv == 0
    assert scheduler.counters.faults == 2


def test_offer_without_blocks_is_no_metadata_at_all(scheduler):
    scheduler.receive(announce())
    scheduler.get_num_new_matched_tokens(Request(), 0)
    assert scheduler.build_connector_meta(output(data())) == Failed()
    assert scheduler.counters.faults == 1


class TestSecondManager:
    """What it may do between the offer and the batch."""

    @pytest.fixture
    def v2(self, scheduler):
        scheduler.begin(is_v2=True, tells_cancelled=True)
        scheduler.receive(announce())
        assert scheduler.get_num_new_matched_tokens(Request(), 0) == (64, False)
        return scheduler

    def test_blocks_without_memory_end_the_engine_instead_of_being_indexed(self, v2):
        v2.update_state_after_alloc_by_layer_group(
            Request(), [list(range(9)), [1, 2, -1, *range(6)]]
        )
        assert v2.build_connector_meta(output(data())) == Failed()

    def test_a_request_is_saved_up_to_its_first_block_without_memory(self, v2, outbox):
        v2.update_state_after_alloc_by_layer_group(Request(), [list(range(9)), list(range(9))])
        v2.build_connector_meta(output(data()))
        blocks = [list(range(9)), [0, 1, 2, 3, 4, -1, 6, 7, 8]]
        assert v2.request_finished_by_layer_group(Request(), blocks)
        assert outbox.of(Finished)[0].tokens_with_kv == 40

    @pytest.mark.parametrize(
        ("cancelled", "blocks"),
        [
            ((32, 64), (10, 11, 12, 13)),
            ((30, 64), (10, 11, 12)),
            ((0, 16), (12, 13, 14, 15, 16, 17)),
            ((0, 17), (13, 14, 15, 16, 17)),
            ((0, 64), ()),
            ((0, 200), ()),
        ],
    )
    @pytest.mark.parametrize("is_late", [False, True])
    def test_what_is_cancelled_is_not_loaded(self, v2, outbox, cancelled, blocks, is_late):
        if not is_late:
            v2.cancel_load(Request(), *cancelled)
        v2.update_state_after_alloc(Request(), list(range(10, 19)))
        if is_late:
            v2.cancel_load(Request(), *cancelled)
        meta = v2.build_connector_meta(output(data()))
        assert [load.pool_blocks for load in meta.loads] == ([(blocks,)] if blocks else [])
        if not blocks:
            assert outbox.of(Matched)[-1].num_loaded_tokens == 0

    def test_what_is_cancelled_too_late_is_loaded_all_the_same(self, v2):
        v2.update_state_after_alloc(Request(), list(range(9)))
        assert v2.build_connector_meta(output(data())).loads
        v2.cancel_load(Request(), 0, 64)
        assert v2.counters.cancelled_tokens == 0

    def test_an_offer_without_room_is_loaded_as_far_as_there_are_blocks(self, v2):
        v2.update_state_after_alloc(Request(), [7, 8, 9])
        assert v2.build_connector_meta(output(data())).loads[0].pool_blocks == ((7, 8, 9),)

    def test_a_request_that_was_reset_is_offered_its_prefix_again(self, v2):
        v2.update_state_after_alloc(Request(), list(range(9)))
        v2.request_reset(Request())
        assert v2.build_connector_meta(output()).loads == ()
        assert v2.get_num_new_matched_tokens(Request(), 0) == (64, False)
        v2.update_state_after_alloc(Request(), list(range(20, 29)))
        assert v2.build_connector_meta(output(data())).loads[0].pool_blocks[0][0] == 20

    @pytest.mark.parametrize("is_first", [False, True])
    def test_a_request_that_rests_ends_when_nobody_waits_for_it(self, v2, outbox, is_first):
        if is_first:
            v2.receive(Withdraw("k"))
        v2.request_reset(Request())
        if not is_first:
            assert not outbox.of(Finished)
            v2.receive(Withdraw("k"))
        assert outbox.of(Matched)[-1].num_loaded_tokens == 0
        assert outbox.of(Finished) == [Finished("k", 1, False, 0, (), ())]
