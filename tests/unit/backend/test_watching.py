"""How a fetch inside an ensemble hears that its client went away."""

import asyncio
import json
import time

import pytest

from kvfetcher.backend import watching
from kvfetcher.backend.watching import ClientWatch, Watches, end_fetch
from kvfetcher.errors import EngineError, RequestCancelledError, StoreError
from kvfetcher.memory.permits import Permits
from support import pb_utils

PERMITS = Permits(bytes(32))


class Sender:
    """Records what is sent; may be marked as cancelled."""

    def __init__(self):
        self.sent = []
        self.cancelled = False

    def send(self, response=None, flags=0):
        self.sent.append((response, flags))

    def is_cancelled(self):
        return self.cancelled


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watching, "_SIGN_SECONDS", 0.02)
    monkeypatch.setattr(watching, "_ANSWER_SECONDS", 0.005)


def make(sender, was_cancelled, *, in_ensemble=True):
    return ClientWatch(
        Watches(),
        sender,
        pb_utils,
        was_cancelled=was_cancelled,
        permits=PERMITS,
        in_ensemble=in_ensemble,
    )


async def nobody_left(_):
    return False


async def until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_signs_of_life_are_sent_until_the_next_step_saw_the_mark():
    sender, asked = Sender(), []

    async def third_time(fetch_id):
        asked.append(fetch_id)
        return len(asked) == 3

    async with make(sender, third_time) as watch:
        await until(watch.is_gone)
        await asyncio.sleep(0.1)
    assert (len(asked), len(sender.sent), len(set(asked))) == (3, 3, 1)
    response, flags = sender.sent[0]
    assert flags == 0
    assert len(response["input_ids"]) == 0
    sign = PERMITS.open("generate", response["sampling"][0].decode(), b"", b"")
    assert json.loads(sign)["fetch_id"] == asked[0]
    assert watch.has_signed


async def test_a_short_fetch_sends_no_sign():
    sender = Sender()
    async with make(sender, nobody_left) as watch:
        pass
    assert (sender.sent, watch.has_signed, watch.is_gone()) == ([], False, False)


async def test_a_model_that_is_used_alone_is_marked_itself():
    sender = Sender()
    async with make(sender, nobody_left, in_ensemble=False) as watch:
        await asyncio.sleep(0.1)
        assert not watch.is_gone()
        sender.cancelled = True
        assert watch.is_gone()
    assert sender.sent == []


async def test_an_engine_that_does_not_answer_ends_the_watching_only():
    async def unreachable(_):
        raise EngineError("gone")

    async with make(Sender(), unreachable) as watch:
        await until(lambda: watch.has_signed)
        await asyncio.sleep(0.05)
        assert not watch.is_gone()


async def test_a_cancelled_fetch_in_an_ensemble_ends_without_an_error():
    sender = Sender()
    watch = make(sender, nobody_left)
    await end_fetch(watch, sender, RequestCancelledError("gone"), pb_utils)
    assert sender.sent == [(None, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)]


async def test_any_other_failure_is_told_once_earlier_steps_are_over():
    sender = Sender()
    watch = make(sender, nobody_left)
    watch.has_signed = True
    started = time.monotonic()
    await end_fetch(watch, sender, StoreError("down"), pb_utils)
    assert time.monotonic() - started > 0.1
    ((response, flags),) = sender.sent
    assert response.has_error()
    assert "down" in response.error.message()
    assert flags == pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


async def test_alone_a_cancelled_fetch_is_told_as_such():
    sender = Sender()
    watch = make(sender, nobody_left, in_ensemble=False)
    await end_fetch(watch, sender, RequestCancelledError("gone"), pb_utils)
    assert "CANCELLED" in sender.sent[0][0].error.message()


def test_many_watches_share_a_bounded_rate_of_signs(monkeypatch):
    monkeypatch.setattr(watching, "_SIGN_SECONDS", 0.2)
    assert Watches(1).sign_seconds() == 0.2
    for count in (100, 1000):
        assert count / Watches(count).sign_seconds() <= 200
