from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.fetch.planning.bandwidth import LinkEstimate
from kvfetcher.fetch.planning.decode_times import H100_NVDEC, Factors, cpu_table, picture_load
from kvfetcher.fetch.planning.pipeline import Machine
from kvfetcher.fetch.planning.variants import (
    NOTHING_AHEAD,
    Ahead,
    Plan,
    UnitOption,
    UnitWalk,
    choose_variant,
    chunk_options,
)
from kvfetcher.format.container import ChunkHeader, UnitEntry
from kvfetcher.spec import KVSpec
from support.examples import examples

IDLE = Machine(num_decoders=7)
FAST, SLOW = 5e9, 2e7


def link(rate):
    return LinkEstimate(rate, rate, rate, rate, 1e-3)


def chunk(cuts, *, num_layers=32, num_bytes=100_000, per_picture=1e-3, per_layer=5e-4):
    """Units of each variant: name -> layers of a unit. Larger ones cost less in all."""
    return tuple(
        UnitOption(
            variant=name,
            layer_start=start,
            num_layers=min(layers, num_layers - start),
            num_bytes=num_bytes * min(layers, num_layers - start),
            decode_seconds=per_picture + per_layer * min(layers, num_layers - start),
            latency_seconds=per_picture + per_layer * min(layers, num_layers - start),
            restore_seconds=1e-5,
        )
        for name, layers in cuts.items()
        for start in range(0, num_layers, layers)
    )


def walk_all(walk, *, rate=FAST, machine=IDLE):
    found = []
    while (step := walk.next(link=link(rate), machine=machine)) is not None:
        found.append(step)
    return found


chunks = st.lists(
    st.dictionaries(st.sampled_from("abcde"), st.integers(1, 12), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
).map(lambda cuts: [chunk(c, num_layers=12) for c in cuts])
rates = st.floats(1e4, 1e11)


@examples(60)
@given(chunks, st.lists(rates, min_size=1, max_size=8), st.floats(0, 0.5), st.floats(0, 10))
def test_every_layer_of_every_chunk_once_and_in_order(found, rates, hysteresis, queue):
    walk = UnitWalk(found, hysteresis=hysteresis)
    at, turn = [], 0
    machine = replace(IDLE, decode_queue_seconds=queue)
    while (step := walk.next(link=link(rates[turn % len(rates)]), machine=machine)) is not None:
        index, option = step
        assert option in found[index]
        at += [(index, layer) for layer in range(option.layer_start, option.layer_stop)]
        turn += 1
    assert at == [(index, layer) for index in range(len(found)) for layer in range(12)]


def test_one_variant_is_taken_as_it_is():
    steps = walk_all(UnitWalk([chunk({"-": 4})] * 3, hysteresis=0.02))
    assert [(index, option.layer_start) for index, option in steps] == [
        (index, start) for index in range(3) for start in range(0, 32, 4)
    ]


def test_where_decoders_are_the_bottleneck_large_pictures_are_taken_but_not_at_the_end():
    names = [
        o.variant for _, o in walk_all(UnitWalk([chunk({"s": 1, "l": 16})] * 20, hysteresis=0.02))
    ]
    assert names[:20] == ["l"] * 20
    assert names[-1] == "s"


def test_a_lone_short_fetch_is_spread_over_the_decoders():
    names = {o.variant for _, o in walk_all(UnitWalk([chunk({"s": 4, "l": 32})], hysteresis=0.02))}
    assert names == {"s"}


def test_where_the_network_is_the_bottleneck_fewer_bytes_win():
    small = chunk({"s": 1}, num_bytes=100_000)
    large = chunk({"l": 8}, num_bytes=110_000)
    names = {
        o.variant for _, o in walk_all(UnitWalk([small + large] * 9, hysteresis=0.02), rate=SLOW)
    }
    assert names == {"s"}


def test_a_full_decoder_queue_asks_for_less_decode_work():
    options = {o.variant: o for o in chunk({"s": 1, "l": 8}, num_layers=8) if o.layer_start == 0}
    plans = {
        "s": [Plan(NOTHING_AHEAD, Ahead(700_000, 10.5e-3, 1.5e-3, 1.5e-3))],
        "l": [Plan(NOTHING_AHEAD, NOTHING_AHEAD)],
    }

    def choice(queue):
        return choose_variant(
            options, plans, link=link(FAST),
            machine=Machine(num_decoders=1, decode_queue_seconds=queue),
            current=None, hysteresis=0.0,
        )  # fmt: skip

    assert choice(1.0) == "l"


def _switches(hysteresis):
    """Variants taken while the rate swings around the point where two variants are equal."""
    pair = chunk({"s": 8}, num_bytes=100_000) + chunk(
        {"l": 8}, num_bytes=103_000, per_picture=1e-4, per_layer=4.5e-4
    )
    walk = UnitWalk([pair] * 200, hysteresis=hysteresis)
    names = []
    for turn in range(400):
        # At about 1.07 GB/s the network takes as long as the seven decoders.
        rate = 1.6e9 if turn % 2 else 1.2e9
        _, option = walk.next(link=link(rate), machine=IDLE)
        names.append(option.variant)
    return sum(a != b for a, b in pairwise(names))


def test_hysteresis_keeps_a_choice_that_is_nearly_as_good():
    assert _switches(0.0) > 100
    assert _switches(0.1) <= 1


def test_what_was_cut_off_is_not_handed_out():
    walk = UnitWalk([chunk({"-": 8})] * 5, hysteresis=0.0)
    for _ in range(3):
        walk.next(link=link(FAST), machine=IDLE)
    walk.truncate(2)
    assert walk.num_chunks == 2
    assert [index for index, _ in walk_all(walk)] == [0, 1, 1, 1, 1]
    walk.truncate(0)
    assert walk.next(link=link(FAST), machine=IDLE) is None


def test_costs_are_what_is_left():
    walk = UnitWalk([chunk({"s": 1, "l": 8})] * 3, hysteresis=0.0)
    before = walk.costs()
    assert [cost.num_bytes for cost in before] == [3_200_000] * 3
    assert before[0].decode_seconds == pytest.approx(4 * 5e-3)
    assert before[0].tail_seconds == pytest.approx(5e-3)
    assert before[0].restore_seconds == pytest.approx(4e-5)
    while walk.next(link=link(FAST), machine=IDLE)[0] == 0:
        pass
    left = walk.costs()
    assert left[0].num_bytes == 0
    assert 0 < left[1].num_bytes < 3_200_000
    assert [cost.num_bytes for cost in walk.costs(2)] == [3_200_000]


def header(profile="balanced/1", variants=("256x640", "256x1280"), layers=(5, 10), length=100_000):
    spec = KVSpec(num_layers=30, num_kv_heads=3, head_dim=64)
    units, offset = [], 0
    for variant, count in zip(variants, layers, strict=True):
        for start in range(0, 30, count):
            units.append(UnitEntry(start, count, variant, offset, length * count // 5, b""))
            offset += length * count // 5
    return ChunkHeader(
        profile, spec, bytes(32), bytes(32), bytes(32), 0, tuple(range(256)), tuple(units), 0, 0
    )


def test_costs_of_a_stored_chunk_come_from_its_header_and_the_table():
    options = chunk_options(header(), H100_NVDEC)
    assert [(o.variant, o.layer_start, o.num_layers) for o in options] == [
        *(("256x640", start, 5) for start in range(0, 30, 5)),
        *(("256x1280", start, 10) for start in range(0, 30, 10)),
    ]
    assert options[0].num_bytes == 100_000
    # 256x640 at 1.63 bits per sample: the first point of the table.
    assert options[0].decode_seconds == pytest.approx(1.434e-3, rel=0.01)
    assert options[0].latency_seconds == pytest.approx(0.96e-3, rel=0.01)
    assert 1 < options[6].decode_seconds / options[0].decode_seconds < 2


def test_corrections_scale_their_stage():
    (plain, *_), (corrected, *_) = (
        chunk_options(header(), H100_NVDEC),
        chunk_options(header(), H100_NVDEC, Factors(4.0, 3.0, 2.0)),
    )
    assert corrected.decode_seconds == pytest.approx(3 * plain.decode_seconds)
    assert corrected.latency_seconds == pytest.approx(4 * plain.latency_seconds)
    assert corrected.restore_seconds == pytest.approx(2 * plain.restore_seconds)


def test_pictures_smaller_than_a_unit_are_counted():
    whole = chunk_options(header(variants=("-",), layers=(5,)), cpu_table(2))
    halves = chunk_options(header(variants=("256x320",), layers=(5,)), cpu_table(2))
    assert halves[0].decode_seconds >= whole[0].decode_seconds


@pytest.mark.parametrize(
    ("profile", "variant", "bits", "video_bits", "samples"),
    [  # per element; video bits per sample
        ("near", "1024x1040", 2.728, 2.811, 0.796),
        ("balanced", "1024x1040", 1.658, 2.489, 0.587),
        ("compact", "1024x1040", 0.987, 2.207, 0.410),
        ("tiny", "1024x1040", 0.503, 1.916, 0.248),
        ("balanced", "-", 1.658, 2.489, 0.587),
    ],
)
def test_the_ladder_s_pictures_weigh_what_is_in_them(profile, variant, bits, video_bits, samples):
    """Much of a unit's elements is nearly always zero, and not in its pictures."""
    elements = 30 * 384 * 256
    stored = header(f"{profile}/1", (variant,), (30,), length=round(elements * bits / 8 / 6))
    (option,) = chunk_options(stored, H100_NVDEC)
    load = picture_load(samples * elements, video_bits * samples * elements)
    really = H100_NVDEC.picture_seconds(load, num_busy=7)
    assert really <= option.decode_seconds < 1.2 * really
    assert option.latency_seconds >= H100_NVDEC.latency_seconds(load)


def test_a_picture_of_the_ladder_that_holds_the_whole_unit_is_one_picture():
    """1024x2560 holds fewer samples than this unit has elements, but all that are in pictures."""
    spec = KVSpec(num_layers=30, num_kv_heads=3, head_dim=64)
    num_bytes = round(30 * spec.elements_per_layer_token * 1024 * 0.985 / 8)
    unit = UnitEntry(0, 30, "1024x2560", 0, num_bytes, b"")
    stored = replace(header("compact/1"), token_ids=tuple(range(1024)), units=(unit,))
    (option,) = chunk_options(stored, H100_NVDEC)
    whole = H100_NVDEC.picture_seconds(8 * num_bytes, num_busy=7)
    assert option.decode_seconds == pytest.approx(whole)


def test_raw_bits_of_exact_are_no_work_for_the_decoder():
    samples = 5 * 384 * 256
    exact = header("exact/1", ("-",), (5,), length=samples * (8 + 2) // 8 + samples // 8)
    lossy = header("paper/1 bits=8", ("-",), (5,), length=samples * (8 + 2) // 8 + samples // 8)
    (fast, *_), (slow, *_) = chunk_options(exact, cpu_table(1)), chunk_options(lossy, cpu_table(1))
    assert slow.decode_seconds > 2 * fast.decode_seconds
