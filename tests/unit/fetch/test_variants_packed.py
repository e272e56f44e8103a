"""Packed copies among the variants, and restorers that may be slower than link and decoders."""

import pytest

from kvfetcher.bench import sim
from kvfetcher.bench.traces import GBIT
from kvfetcher.fetch.learning import StageLearning, UnitStatus
from kvfetcher.fetch.planning.bandwidth import LinkEstimate
from kvfetcher.fetch.planning.decode_times import (
    AS_IN_TABLE,
    H100_NVDEC,
    DecodeTable,
    Factors,
    cpu_table,
)
from kvfetcher.fetch.planning.pipeline import Machine
from kvfetcher.fetch.planning.variants import UnitWalk, chunk_options
from kvfetcher.spec import PACKED_VARIANT

LIBRARY = sim.Library(H100_NVDEC, sim.PICTURE_SIZES)
REQUEST = sim.Request(sim.SHAPES[0], 8192)


def options(*sizes, table=H100_NVDEC, factors=AS_IN_TABLE):
    return chunk_options(LIBRARY.prompt(REQUEST, sizes).header, table, factors)


def first(*sizes, gbit, chunks=REQUEST.num_chunks, **queues):
    walk = UnitWalk([options(*sizes)] * chunks, hysteresis=0.1)
    link = LinkEstimate(*[gbit * GBIT] * 4, sim.RTT_SECONDS)
    return walk.next(link=link, machine=Machine(num_decoders=7, **queues))[1].variant


def test_a_packed_unit_needs_no_decoder_but_the_same_restoring():
    packed, *_ = options("packed", factors=Factors(3.0, 3.0, 2.0))
    assert packed.variant == PACKED_VARIANT
    assert not packed.needs_decoder
    assert (packed.decode_seconds, packed.latency_seconds) == (0.0, 0.0)
    elements = packed.num_layers * 2048 * 256
    assert packed.restore_seconds == pytest.approx(2 * H100_NVDEC.restore_seconds(elements))


@pytest.mark.parametrize(
    ("gbit", "queue", "packed"),
    [
        (2, 0.0, False),
        (2, 0.1, False),  # the link is the bottleneck: fewer bytes
        (16, 0.0, False),  # decoders first get work
        (16, 0.03, True),
        (40, 0.03, True),
    ],
)
def test_packed_units_are_taken_while_decoders_have_enough_to_do(gbit, queue, packed):
    found = first("large", "packed", gbit=gbit, decode_queue_seconds=queue)
    assert (found == PACKED_VARIANT) == packed


def test_decoders_do_not_get_more_than_they_can_use():
    """Bytes that wait for a decoder count against those in flight, and keep others from being asked for."""
    walk = UnitWalk([options("large", "packed")] * 128, hysteresis=0.1)
    link = LinkEstimate(*[16 * GBIT] * 4, sim.RTT_SECONDS)
    queue, deepest = 0.0, 0.0
    while step := walk.next(link=link, machine=Machine(num_decoders=7, decode_queue_seconds=queue)):
        arriving = step[1].num_bytes / (16 * GBIT)
        queue = max(0.0, queue - arriving) + step[1].decode_seconds / 7
        deepest = max(deepest, queue)
    assert 0.01 < deepest < 0.03


def test_small_pictures_are_left_where_restoring_each_takes_too_long():
    assert first("small", "medium", gbit=1, chunks=1) == "1024x416"
    assert first("small", "medium", gbit=1, chunks=1, restore_queue_seconds=0.5) == "1024x816"


def test_no_pace_is_known_of_a_cpu():
    assert cpu_table(2).restore_seconds_per_unit(1 << 20) == 0.0
    assert {o.restore_interval_seconds for o in options("medium", table=cpu_table(2))} == {0.0}
    elements = 2 * 2048 * 256
    expected = 1 / 2665 + H100_NVDEC.restore_seconds(elements)
    (pace,) = {o.restore_interval_seconds for o in options("medium")}
    assert pace == pytest.approx(expected)


def test_a_table_keeps_what_units_take_to_be_restored():
    again = DecodeTable.from_json(H100_NVDEC.to_json())
    assert again == H100_NVDEC
    assert again.restore_unit_seconds == H100_NVDEC.restore_unit_seconds > 0


@pytest.mark.parametrize("size", ["small", "huge"])
def test_where_restoring_sets_the_pace_nothing_is_learnt_of_the_decoders(size):
    learning, (unit, *_) = StageLearning(7), options(size)
    pace = max(unit.decode_seconds / 7, unit.restore_interval_seconds)
    status = UnitStatus("nvdec", 1e3 * unit.latency_seconds, 1e3 * unit.restore_seconds)
    now = 0.0
    for _ in range(14):
        learning.begin()
    for _ in range(140):
        now += pace
        learning.end(unit, learning.factors, status, now)
        learning.begin()
    assert learning.factors.decode == pytest.approx(1.0, rel=0.05)
