"""Raw copies among the variants: chosen exactly where the link is faster than the decoders."""

from collections import Counter

import numpy as np
import pytest

from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.profiles import encode_chunk
from kvfetcher.codec.raw import WithRawCopy
from kvfetcher.fetch.planning.bandwidth import LinkEstimate
from kvfetcher.fetch.planning.decode_times import DecodePoint, DecodeTable, Factors
from kvfetcher.fetch.planning.pipeline import Machine, finish_times
from kvfetcher.fetch.planning.variants import UnitWalk, chunk_options
from kvfetcher.format.container import parse_header
from kvfetcher.spec import KVSpec

SPEC = KVSpec(10, 3, 64)
TOKENS = 64
MACHINE = Machine(num_decoders=2)
# 20 M elements/s on each of two decoders: a CPU.
PICTURE = DecodePoint(64, 640, 2.7, 0.006, 0.006, 0.006)
CPU = DecodeTable("test", "cpu", 2, 50e6, (PICTURE,), "test")


@pytest.fixture(scope="module")
def header():
    values = np.random.default_rng(0).normal(size=(10, 2, 3, TOKENS, 64)).astype(np.float32)
    values = (values.view(np.uint32) >> 16).astype(np.uint16)
    return parse_header(
        encode_chunk(
            values, spec=SPEC, profile=WithRawCopy(ExactProfile()), identity=bytes(32),
            chunk_key=bytes(32), token_ids=range(TOKENS), first_position=0, num_threads=1,
        )
    )  # fmt: skip


def link(gbit_per_second):
    rate = gbit_per_second * 1e9 / 8
    return LinkEstimate(
        bytes_per_second=rate,
        recent_bytes_per_second=rate,
        low_bytes_per_second=rate,
        high_bytes_per_second=rate,
        rtt_seconds=0.001,
    )


def walk(header, chunks=8):
    options = chunk_options(header, CPU)
    return UnitWalk([options] * chunks, hysteresis=0.05)


def taken(header, gbit_per_second):
    """The variant that most layers are taken in."""
    layers, plan = Counter(), walk(header)
    while step := plan.next(link=link(gbit_per_second), machine=MACHINE):
        layers[step[1].variant] += step[1].num_layers
    return layers.most_common(1)[0][0]


def test_a_raw_unit_needs_no_decoder(header):
    raw = [o for o in chunk_options(header, CPU, Factors(3.0, 3.0)) if o.variant == "raw"]
    assert {(o.decode_seconds, o.latency_seconds) for o in raw} == {(0.0, 0.0)}
    assert all(0 < o.restore_seconds < CPU.restore_seconds(10 * 384 * TOKENS) for o in raw)


@pytest.mark.parametrize(("gbit_per_second", "variant"), [(0.05, "-"), (0.3, "-"), (5.0, "raw")])
def test_the_raw_copy_is_taken_where_the_link_is_faster(header, gbit_per_second, variant):
    assert taken(header, gbit_per_second) == variant


def test_raw_units_spare_decoders_that_have_enough_to_do_and_starve_none(header):
    options = chunk_options(header, CPU)

    def first(queue_seconds, gbit_per_second):
        machine = Machine(num_decoders=2, decode_queue_seconds=queue_seconds)
        plan = UnitWalk([options] * 50, hysteresis=0.05)
        return plan.next(link=link(gbit_per_second), machine=machine)[1].variant

    # 1 Gbit/s: 50 chunks are 0.14 s of link and 0.3 s of decoders coded, 0.2 s of link raw.
    assert first(0.25, 1.0) == "raw"
    assert first(0.0, 1.0) == "-"
    assert first(0.25, 0.1) == "-"


@pytest.mark.parametrize("gbit_per_second", [0.05, 5.0])
def test_costs_before_the_first_unit_are_of_the_variant_that_will_be_taken(header, gbit_per_second):
    plan = walk(header)
    plan.start(link=link(gbit_per_second), machine=MACHINE)
    variant = taken(header, gbit_per_second)
    expected = sum(e.length for e in header.units_of(variant))
    assert {cost.num_bytes for cost in plan.costs()} == {expected}
    before = finish_times(plan.costs(), link=link(gbit_per_second), machine=MACHINE)[-1]
    assert 0 < before < 8 * sum(e.length for e in header.units) / (gbit_per_second * 1e9 / 8)
