"""The ring of decoded planes: parts are handed out, given back, expire, and are refused when stale."""

import itertools
import json

import numpy as np
import pytest

from kvfetcher.errors import GpuError, LayoutError
from kvfetcher.memory.plane_ring import PlaneReader, PlaneRing, PlaneTicket


class FakeGpu:
    """The calls of `CudaContext` that a ring makes; memory is an address."""

    gpu = 0

    def __init__(self, *, is_full=False, refuses=()):
        self.is_full = is_full
        self.refuses = refuses
        self.open = set()
        self.log = []

    def __getattribute__(self, name):
        if not name.startswith("_") and name in object.__getattribute__(self, "refuses"):
            raise GpuError(f"{name} is refused")
        return object.__getattribute__(self, name)

    def allocate(self, num_bytes):
        if self.is_full:
            raise GpuError("no memory")
        self.log.append(("allocate", num_bytes))
        return 1 << 20

    def free(self, address):
        self.log.append(("free", address))

    def share(self, address):
        return address.to_bytes(64, "little")

    def new_event(self):
        return 7

    def share_event(self, event):
        return event.to_bytes(64, "little")

    def record(self, event):
        self.log.append(("record", event))

    def free_event(self, event):
        self.log.append(("free_event", event))

    def wait_on_gpu(self, event):
        self.log.append(("wait", event))

    def open_event(self, handle):
        return int.from_bytes(handle, "little")

    def open_shared(self, handle):
        self.open.add(handle)
        return 1 << 30

    def settle(self):
        self.log.append(("settle",))

    def close_shared(self, address):
        self.open.clear()


@pytest.fixture
def clock():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


@pytest.fixture
def ring(tmp_path, clock):
    made = PlaneRing(FakeGpu(), 4096, table=tmp_path / "planes", expiry_seconds=30.0, clock=clock)
    yield made
    made.close()


@pytest.fixture
def reader():
    made = PlaneReader(lambda gpu: FakeGpu())
    yield made
    made.close()


def reserve(ring, num_bytes=1000):
    return ring.reserve(num_bytes, shift=6, wait_seconds=0.0)


def test_parts_do_not_overlap_and_a_full_ring_gives_none(ring):
    tickets = [reserve(ring) for _ in range(4)]
    starts = sorted(t.offset for t in tickets)
    assert all(b - a >= 1000 for a, b in itertools.pairwise(starts))
    assert reserve(ring) is None
    assert ring.reserve(5000, shift=0, wait_seconds=9.0) is None  # never fits: no waiting


def test_reader_finds_the_planes_and_makes_room(ring, reader):
    tickets = [PlaneTicket.from_json(reserve(ring).to_json()) for _ in range(4)]
    assert reader.address(tickets[2]) == (1 << 30) + tickets[2].offset
    reader.finish(tickets[2])
    again = reserve(ring)
    assert again.offset == tickets[2].offset
    assert again.ticket != tickets[2].ticket


def test_planes_that_are_not_wanted_make_room_read_or_not(ring, reader):
    tickets = [reserve(ring) for _ in range(4)]
    reader.drop(tickets[3])  # of a ring that was not opened
    reader.address(tickets[0])
    reader.drop(tickets[0])
    assert {reserve(ring).offset for _ in range(2)} == {tickets[0].offset, tickets[3].offset}
    ring.close()
    PlaneReader(lambda gpu: FakeGpu()).drop(tickets[1])  # nothing to give back to


def test_planes_that_nobody_fetched_are_overwritten_and_then_refused(ring, reader, clock):
    old = [reserve(ring) for _ in range(4)]
    reader.address(old[0])  # being read
    clock.now = 31.0
    assert reserve(ring) is not None
    with pytest.raises(GpuError, match="while they were restored"):
        reader.finish(old[0])
    with pytest.raises(GpuError, match="before they were restored"):
        reader.address(old[0])


def test_cancelled_ticket_is_free_again(ring):
    tickets = [reserve(ring) for _ in range(4)]
    ring.cancel(tickets[1])
    assert reserve(ring).offset == tickets[1].offset


def test_reader_lets_go_of_a_dead_owners_memory(tmp_path, clock):
    gpu = FakeGpu()
    reader = PlaneReader(lambda _: gpu)
    first = PlaneRing(FakeGpu(), 4096, table=tmp_path / "a", expiry_seconds=30.0, clock=clock)
    reader.address(reserve(first))
    first.close()
    assert gpu.open
    second = PlaneRing(FakeGpu(), 4096, table=tmp_path / "b", expiry_seconds=30.0, clock=clock)
    reader.address(reserve(second))
    assert set(reader._rings) == {str(tmp_path / "b")}
    second.close()
    reader.close()
    assert not gpu.open


def test_vanished_table_and_odd_tables_are_refused(ring, reader, tmp_path):
    ticket = reserve(ring)
    (tmp_path / "planes").unlink()
    with pytest.raises(GpuError, match="did kv_decode die"):
        reader.address(ticket)
    (tmp_path / "planes").write_bytes(b"no table")
    with pytest.raises(GpuError, match="is not one"):
        reader.address(ticket)


def test_gpu_without_memory_leaves_no_table(tmp_path):
    with pytest.raises(GpuError, match="no memory"):
        PlaneRing(FakeGpu(is_full=True), 4096, table=tmp_path / "planes", expiry_seconds=1.0)
    assert not (tmp_path / "planes").exists()


@pytest.mark.parametrize("call", ["share", "new_event", "share_event"])
def test_gpu_that_does_not_share_its_memory_gets_it_back(tmp_path, call):
    gpu = FakeGpu(refuses={call})
    with pytest.raises(GpuError, match=call):
        PlaneRing(gpu, 4096, table=tmp_path / "planes", expiry_seconds=1.0)
    assert ("free", 1 << 20) in gpu.log
    assert (("free_event", 7) in gpu.log) == (call == "share_event")
    assert not (tmp_path / "planes").exists()


def test_reader_that_cannot_open_the_event_lets_go_of_the_memory(ring):
    gpu = FakeGpu(refuses={"open_event"})
    reader = PlaneReader(lambda _: gpu)
    with pytest.raises(GpuError, match="open_event"):
        reader.address(reserve(ring))
    assert not gpu.open


def test_lost_context_does_not_keep_the_table(tmp_path):
    gpu = FakeGpu()
    made = PlaneRing(gpu, 4096, table=tmp_path / "planes", expiry_seconds=1.0)
    gpu.refuses = {"free", "free_event"}
    made.close()
    assert not (tmp_path / "planes").exists()


def test_table_that_cannot_be_made_is_an_error(tmp_path):
    with pytest.raises(GpuError, match="cannot be made"):
        PlaneRing(FakeGpu(), 4096, table=tmp_path / "no" / "planes", expiry_seconds=1.0)


@pytest.mark.parametrize(
    "change",
    [{"entry": 64}, {"shift": 9}, {"offset": -1}, {"handle": "zz"}, {"event": "00"}, {"gpu": "0"}],
)
def test_odd_tickets_are_refused(ring, change):
    data = json.loads(reserve(ring).to_json())
    assert PlaneTicket.from_json(json.dumps(data))
    with pytest.raises(LayoutError, match="plane ticket"):
        PlaneTicket.from_json(json.dumps({**data, **change}))


def test_tickets_survive_json_exactly(ring):
    ticket = reserve(ring)
    assert PlaneTicket.from_json(ticket.to_json()) == ticket
    assert np.uint64(ticket.ticket) == ticket.ticket
