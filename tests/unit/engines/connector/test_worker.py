"""Copies on a rank: what happens when they are late, fail, or are asked for twice."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from kvfetcher.engines.connector import worker as worker_module
from kvfetcher.engines.connector.messages import Copied, Probed, Ready, Room, Saved
from kvfetcher.engines.connector.scheduler import Failed, Load, Metadata
from kvfetcher.engines.connector.worker import ConnectorWorker, abort_process


class Outbox:
    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)

    def wait(self, kind):
        until = time.monotonic() + 5
        while not (found := [m for m in self.sent if isinstance(m, kind)]):
            assert time.monotonic() < until
            time.sleep(0.001)
        return found


class Copier:
    """Records copies; each waits for `gate` and may fail."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.error = self.wait_error = None
        self.copies = []

    def load(self, source, target, *, layout, stream):
        assert self.gate.wait(5)
        if self.error:
            raise self.error
        self.copies.append(("load", tuple(source), tuple(target)))
        return self

    def save(self, source, target, *, layout, stream):
        self.load(source, target, layout=layout, stream=stream)
        self.copies[-1] = ("save", tuple(source), tuple(target))
        return self

    def wait(self):
        if self.wait_error:
            raise self.wait_error

    def mark(self, stream):
        return None

    def side_stream(self, name, after):
        return None

    def close(self):
        pass


class Rig:
    def __init__(self, **options):
        self.outbox, self.copier, self.fatal = Outbox(), Copier(), []
        self.now = 0.0
        settings = {"layout": "HND", "save_timeout_seconds": 5.0} | options
        self.worker = ConnectorWorker(
            self.outbox, clock=lambda: self.now, fatal=self.fatal.append, **settings
        )
        values = torch.arange(2).repeat_interleave(8 * 4).float() + 1
        values = torch.stack([torch.arange(2 * 8 * 4).float(), values])
        self.pool = SimpleNamespace(
            num_blocks=10,
            heads=SimpleNamespace(count=2),
            spec=SimpleNamespace(head_dim=4),
            has_one_order=False,
            probe_values=lambda block: values,
        )
        self.worker.register(self.pool, self.copier, facts="facts")


@pytest.fixture
def rig_of():
    made = []

    def make(**options):
        made.append(Rig(**options))
        return made[-1]

    yield make
    for rig in made:
        rig.copier.gate.set()
        rig.worker.close()


@pytest.fixture
def rig(rig_of):
    return rig_of()


def load(request_id=1, *, is_async=False):
    return Load(request_id, f"k{request_id}", (4, 5), ((0, 1),), is_async)


def room(request_id=1, *, blocks=(3,), probe=False):
    return Room(f"k{request_id}", request_id, (blocks,), blocks, probe)


def settle(rig, finished=(), loading=()):
    """Ask until something is over."""
    until = time.monotonic() + 5
    saved, loaded = rig.worker.get_finished(list(finished), list(loading))
    while not saved and not loaded:
        assert time.monotonic() < until
        time.sleep(0.001)
        saved, loaded = rig.worker.get_finished([], [])
    return saved, loaded


def test_registering_is_told(rig):
    assert rig.outbox.sent == [Ready(10, "facts")]


def test_metadata_is_executed_once(rig):
    for _ in range(3):
        rig.worker.start_load_kv(Metadata(1, (load(),)), None)
    rig.worker.start_load_kv(Metadata(2), None)
    assert rig.copier.copies == [("load", (4, 5), ((0, 1),))]
    assert rig.worker.counters.stale_metadata == 2
    assert rig.outbox.wait(Copied) == [Copied("k1")]
    assert rig.worker.get_finished([], []) == ([], [])


def test_asynchronous_load_is_reported_once_and_when_it_is_over(rig):
    rig.copier.gate.clear()
    rig.worker.start_load_kv(Metadata(1, (load(is_async=True),)), None)
    assert rig.worker.get_finished([], [1]) == ([], [])
    assert not [m for m in rig.outbox.sent if isinstance(m, Copied)]
    rig.copier.gate.set()
    assert settle(rig) == ([], [1])
    assert rig.worker.get_finished([], []) == ([], [])


def test_cancelled_request_keeps_its_blocks_until_its_load_is_over(rig):
    rig.copier.gate.clear()
    rig.worker.start_load_kv(Metadata(1, (load(is_async=True),)), None)
    rig.worker.get_finished([], [1])
    rig.worker.receive(room(blocks=()))
    assert rig.worker.get_finished([1], []) == ([], [])
    rig.now = 100.0  # not even when its time is over
    assert rig.worker.get_finished([], []) == ([], [])
    rig.copier.gate.set()
    assert settle(rig) == ([1], [1])


@pytest.mark.parametrize("room_first", [True, False])
def test_save_waits_for_both_the_room_and_the_engine(rig, room_first):
    if room_first:
        rig.worker.receive(room())
        time.sleep(0.02)
        assert not rig.copier.copies
        assert settle(rig, finished=[1]) == ([1], [])
    else:
        assert rig.worker.get_finished([1], []) == ([], [])
        rig.worker.receive(room())
        assert settle(rig) == ([1], [])
    assert rig.copier.copies == [("save", ((3,),), (3,))]
    assert rig.outbox.wait(Saved) == [Saved("k1", ok=True)]
    assert rig.worker.get_finished([], []) == ([], [])


def test_save_that_fails_is_dropped(rig):
    rig.copier.error = RuntimeError("no more memory")
    rig.worker.receive(room())
    assert settle(rig, finished=[1]) == ([1], [])
    (saved,) = rig.outbox.wait(Saved)
    assert not saved.ok
    assert "no more memory" in saved.reason
    assert rig.worker.counters.saves_failed == 1
    assert not rig.fatal


def test_room_that_comes_too_late_is_refused(rig):
    rig.worker.get_finished([1], [])
    rig.now = 5.1
    assert rig.worker.get_finished([], []) == ([1], [])
    assert rig.worker.counters.saves_timed_out == 1
    rig.worker.receive(room())
    (saved,) = rig.outbox.wait(Saved)
    assert not saved.ok
    assert "too late" in saved.reason
    rig.worker.receive(room(blocks=()))
    assert not rig.worker._requests.settled
    assert not rig.copier.copies


def test_room_for_a_request_that_never_ends_is_given_up(rig_of):
    rig = rig_of(save_timeout_seconds=0.02)
    rig.worker.receive(room())
    (saved,) = rig.outbox.wait(Saved)
    assert not saved.ok
    assert "did not hand" in saved.reason


def test_save_without_a_layout_is_dropped_and_load_is_fatal(rig_of):
    rig = rig_of(layout=None)
    rig.worker.receive(room())
    settle(rig, finished=[1])
    assert "layout is not known" in rig.outbox.wait(Saved)[0].reason
    rig.worker.start_load_kv(Metadata(1, (load(),)), None)
    assert "layout is not known" in rig.fatal[0]


@pytest.mark.parametrize(
    ("configured", "has_one_order", "told"),
    [("HND", False, "HND"), ("NHD", False, "HND"), ("NHD", True, "")],
)
def test_probe_is_told_beside_a_configured_layout(rig_of, configured, has_one_order, told):
    rig = rig_of(layout=configured)
    rig.pool.has_one_order = has_one_order
    rig.worker.receive(room(probe=True))
    assert settle(rig, finished=[1]) == ([1], [])
    assert rig.outbox.wait(Probed) == [Probed(told)]


def test_probe_finds_the_layout_and_uses_it(rig_of):
    rig = rig_of(layout=None)
    rig.worker.receive(room(probe=True))
    assert settle(rig, finished=[1]) == ([1], [])
    assert rig.outbox.wait(Probed) == [Probed("HND")]
    rig.worker.start_load_kv(Metadata(1, (load(),)), None)
    assert not rig.fatal


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("where", ["error", "wait_error"])
def test_load_that_fails_ends_the_engine(rig, is_async, where):
    setattr(rig.copier, where, RuntimeError("device lost"))
    rig.worker.start_load_kv(Metadata(1, (load(is_async=is_async),)), None)
    until = time.monotonic() + 5
    while not rig.fatal:
        assert time.monotonic() < until
    assert "device lost" in rig.fatal[0]
    assert not [m for m in rig.outbox.sent if isinstance(m, Copied)]
    if is_async:
        assert rig.worker.get_finished([], [1]) == ([], [])  # never reported as loaded


def test_without_a_mark_nothing_is_saved_until_the_next_one(rig, caplog):
    def fail(stream):
        raise RuntimeError("no event")

    right, rig.copier.mark = rig.copier.mark, fail
    rig.worker.wait_for_save(None)
    assert "could not be marked" in caplog.text
    rig.worker.receive(room())
    assert settle(rig, finished=[1]) == ([1], [])
    (saved,) = rig.outbox.wait(Saved)
    assert not saved.ok
    assert "when the forward pass ends" in saved.reason
    assert not rig.copier.copies
    rig.copier.mark = right
    rig.worker.wait_for_save(None)
    rig.worker.receive(room(2))
    assert settle(rig, finished=[2]) == ([2], [])
    assert rig.copier.copies == [("save", ((3,),), (3,))]
    assert not rig.fatal


def test_fault_in_get_finished_ends_the_engine(rig):
    assert rig.worker.get_finished(None, []) == ([], [])
    assert "what is loaded and saved is not known" in rig.fatal[0]


def test_metadata_that_is_cleared_is_nothing_to_do(rig):
    rig.worker.start_load_kv(None, None)
    assert not rig.fatal


def test_metadata_that_failed_ends_the_engine(rig):
    rig.worker.start_load_kv(Failed(), None)
    assert "rank 0 could not say" in rig.fatal[0]


def test_the_end_is_the_end_of_the_process(monkeypatch):
    ended = []
    monkeypatch.setattr(worker_module.os, "abort", lambda: ended.append(True))
    abort_process("no KV")
    assert ended
