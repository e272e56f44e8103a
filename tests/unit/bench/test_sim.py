"""The simulator on small cases whose answer is known, and the promises on a few traces."""

import asyncio
import json
import time

import pytest

from kvfetcher.bench import main as bench_main
from kvfetcher.bench import sim
from kvfetcher.bench.simulate import SimFetcher, SimLink, run_simulated
from kvfetcher.bench.traces import GBIT, all_traces, make_trace, uniform_jitter
from kvfetcher.config import FetchConfig
from kvfetcher.fetch.planning.bandwidth import LinkEstimate
from kvfetcher.fetch.planning.decode_times import H100_NVDEC
from kvfetcher.fetch.planning.pipeline import Machine
from kvfetcher.fetch.planning.variants import UnitWalk, chunk_options
from kvfetcher.format.container import HEADER_READ_BYTES
from kvfetcher.spec import RAW_VARIANT

LIBRARY = sim.Library(H100_NVDEC, sim.PICTURE_SIZES)
SHORT = sim.Request(sim.SHAPES[0], 2048)
LONG = sim.Request(sim.SHAPES[0], 8192)


def constant(gbit):
    return make_trace("constant", "constant", [(1.0, gbit)])


def fetch(trace, sizes, request=LONG, *, times=1, policy="fetch", **fields):
    """Outcomes of the same request again and again; the last one's alone where there is one."""

    async def serve():
        config = FetchConfig(**fields)
        fetcher = SimFetcher(trace, H100_NVDEC, config, rtt_seconds=sim.RTT_SECONDS)
        prompt = LIBRARY.prompt(request, sizes)
        outcomes = []
        for number in range(times):
            outcomes += await fetcher.serve([prompt], at=7.0 * number, policy=policy)
        return outcomes if times > 1 else outcomes[0]

    return run_simulated(serve)


def test_the_clock_jumps():
    async def sleep():
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    begun = time.monotonic()
    assert run_simulated(sleep) == pytest.approx(3600)
    assert time.monotonic() - begun < 60


def test_what_never_comes_is_an_error():
    with pytest.raises(RuntimeError, match="never comes"):
        run_simulated(lambda: asyncio.Event().wait())


def test_transfers_share_the_link_evenly_and_a_cancelled_one_leaves_it():
    async def share():
        link = SimLink(constant(8), rtt_seconds=0.0)
        clock = asyncio.get_running_loop().time
        first, second, third = (
            asyncio.create_task(link.transfer(n)) for n in (1 << 20, 2 << 20, 8 << 20)
        )
        await asyncio.sleep(0.5e-3)
        third.cancel()
        await first
        at_first = clock()
        await second
        return at_first, clock()

    megabyte = (1 << 20) / GBIT / 8
    third = 0.5e-3 / 3  # what each got while there were three
    at_first, at_second = run_simulated(share)
    assert at_first == pytest.approx(0.5e-3 + 2 * (megabyte - third), rel=1e-3)
    assert at_second == pytest.approx(at_first + megabyte, rel=1e-3)


def test_a_slow_link_sets_the_time():
    found = fetch(constant(1), ("small",))
    elements = 8192 * 65536
    headers = LONG.num_chunks * HEADER_READ_BYTES
    assert found.num_bytes == pytest.approx(elements * 1.6745 / 8, rel=1e-3)
    assert found.fetch_seconds == pytest.approx(8 * (found.num_bytes + headers) / 1e9, rel=0.02)
    assert found.fetch_seconds > 8 * found.num_bytes / 1e9
    assert found.num_chunks == LONG.num_chunks
    assert found.network_bubble_seconds == pytest.approx(0, abs=1e-3)
    assert found.decoder_bubble_seconds > 0.5 * found.fetch_seconds


@pytest.mark.parametrize(("size", "layers"), [("small", 1), ("huge", 8)])
def test_on_a_fast_link_decoders_or_restorers_set_the_time(size, layers):
    found = fetch(constant(40), (size,))
    prompt = LIBRARY.prompt(LONG, (size,))
    load = next(iter(prompt.works.values())).load
    decoding = H100_NVDEC.picture_seconds(load, num_busy=7) / 7
    restoring = H100_NVDEC.restore_seconds_per_unit(layers * 2048 * 256)
    assert (restoring > decoding) == (size == "small")
    work = LONG.num_chunks * 32 / layers * max(decoding, restoring)
    assert found.fetch_seconds == pytest.approx(work, rel=0.15)
    assert sum(found.variants.values()) == LONG.num_chunks * 32 // layers


def test_a_full_queue_stops_the_network():
    found = fetch(constant(40), ("small",), max_inflight_bytes=1 << 20)
    assert found.network_bubble_seconds > 0.01


def test_raw_units_pass_the_decoders_by():
    found = fetch(constant(40), ("raw",), SHORT)
    assert found.fetch_seconds == pytest.approx(8 * found.num_bytes / 40e9, rel=0.2)
    assert found.decoder_bubble_seconds == pytest.approx(found.fetch_seconds, rel=0.2)


def test_a_stall_lasts_as_long_as_it_lasts():
    stalled = make_trace("stall", "stalls", [(0.05, 8), (0.3, 0), (100.0, 8)])
    plain = fetch(constant(8), ("huge",))
    found = fetch(stalled, ("huge",))
    assert found.fetch_seconds == pytest.approx(plain.fetch_seconds + 0.3, abs=0.02)


def test_giving_up_keeps_what_is_ready():
    breaks = make_trace("breaks", "stalls", [(0.1, 8), (60.0, 0)])
    found = fetch(breaks, ("huge",), policy="auto", expected_gbit_per_second=8.0)
    assert found.report.reason == "fell_behind"
    assert 5 <= found.num_chunks < LONG.num_chunks
    assert found.fetch_seconds < 1.0


def test_a_link_is_fetched_over_once_a_probe_has_seen_that_it_is_fast():
    first, *later = fetch(constant(8), ("huge",), policy="auto", times=3)
    assert first.num_chunks == 0  # 1 Gbit/s is what is expected
    assert first.report.gate.predicted_all_fetch_ms > first.report.gate.predicted_compute_ms
    assert [outcome.num_chunks for outcome in later] == [LONG.num_chunks] * 2


def test_the_same_run_twice_is_the_same():
    trace = uniform_jitter(1, 40, dwell_seconds=0.05, seed=3)
    first, second = (fetch(trace, LIBRARY.pictures) for _ in range(2))
    assert first.fetch_seconds == second.fetch_seconds
    assert first.variants == second.variants


def test_traces_repeat_and_say_when_they_change():
    trace = make_trace("t", "steps", [(0.5, 8), (1.5, 2)])
    assert trace.at(0.25) == (8 * GBIT, pytest.approx(0.25))
    assert trace.at(2.75) == (2 * GBIT, pytest.approx(1.25))
    assert trace.mean_bytes_per_second == pytest.approx(3.5 * GBIT)
    assert trace.seconds_for(3 * GBIT, start=0.25) == pytest.approx(0.25 + 0.5)
    for moment in (0.5, 2.0, 1e6):
        assert trace.at(moment)[1] > 0


def test_every_family_is_there_and_seeds_differ():
    traces = all_traces(seeds=2)
    assert {t.family for t in traces} == {"constant", "steps", "jitter", "stalls"}
    assert len({t.name for t in traces}) == len({t.pieces for t in traces}) == len(traces)
    assert traces == all_traces(seeds=2)
    jitter = [[t for t in all_traces(seeds=n) if t.family == "jitter"] for n in (1, 2)]
    later = [t for t in all_traces(seeds=1, first_seed=1) if t.family == "jitter"]
    assert jitter[1] == jitter[0] + later
    for trace in traces:
        rates = {rate / GBIT for _, rate in trace.pieces}
        assert max(rates) <= 40
        assert min(rates) >= (0 if trace.family == "stalls" else 1)


def test_the_paper_s_rule_matches_transfer_and_decoding():
    assert LIBRARY.matching_size(SHORT, bytes_per_second=1 * GBIT) == "small"
    assert LIBRARY.matching_size(SHORT, bytes_per_second=40 * GBIT) == "largest"
    (found,) = sim.run_policy("previous", constant(16), LIBRARY, H100_NVDEC, [LONG])
    assert found.outcome.num_chunks == LONG.num_chunks
    assert len(found.outcome.variants) > 1


def test_chunks_look_to_the_planner_as_they_are():
    prompt = LIBRARY.prompt(SHORT, LIBRARY.pictures)
    for option, entry in zip(
        chunk_options(prompt.header, H100_NVDEC), prompt.header.units, strict=True
    ):
        really = H100_NVDEC.picture_seconds(prompt.works[entry.offset].load, num_busy=7)
        assert option.decode_seconds == pytest.approx(really, rel=0.2)


def test_requests_that_come_together_share_the_link():
    alone = sim.run_policy("ours", constant(4), LIBRARY, H100_NVDEC, [SHORT])
    both = sim.run_policy("ours", constant(4), LIBRARY, H100_NVDEC, [SHORT] * 2, num_together=2)
    slowest = max(run.outcome.fetch_seconds for run in both)
    assert slowest == pytest.approx(2 * alone[0].outcome.fetch_seconds, rel=0.15)


def test_raw_units_wait_until_decoders_would_outlast_a_stall_but_on_a_link_with_room_to_spare():
    header = LIBRARY.prompt(LONG, ("largest", sim.RAW)).header
    chunks = [chunk_options(header, H100_NVDEC)] * LONG.num_chunks

    def first(queue_seconds, gbit, **facts):
        link = LinkEstimate(*[gbit * GBIT] * 4, sim.RTT_SECONDS, **facts)
        machine = Machine(num_decoders=7, decode_queue_seconds=queue_seconds)
        return UnitWalk(chunks, hysteresis=0.1).next(link=link, machine=machine)[1].variant

    # Coded units come three times as fast as decoders take them at 24 Gbit/s, five times at 40.
    assert first(0.03, 24) != RAW_VARIANT
    assert first(0.06, 24) == RAW_VARIANT
    assert first(0.03, 40) == RAW_VARIANT
    # A link that fell to a tenth before may again.
    assert first(0.06, 40, fallen_to=0.1) != RAW_VARIANT


def test_raw_units_that_are_too_risky_now_are_not_counted_on_for_later_either():
    """Else small pictures seem best, unit after unit: decoders would have time while raw ones come."""
    link = LinkEstimate(40 * GBIT, 40 * GBIT, 1 * GBIT, 40 * GBIT, sim.RTT_SECONDS)
    machine = Machine(num_decoders=7, decode_queue_seconds=0.1)

    def first(sizes):
        chunks = [chunk_options(LIBRARY.prompt(SHORT, sizes).header, H100_NVDEC)] * 8
        return UnitWalk(chunks, hysteresis=0.1).next(link=link, machine=machine)[1].variant

    with_raw = (*LIBRARY.pictures, sim.RAW)
    assert first(with_raw) == first(LIBRARY.pictures) == first(("largest",))


@pytest.fixture(scope="module")
def report():
    traces = [
        constant(2),
        constant(16),
        make_trace("stalls", "stalls", [(0.1, 8), (0.05, 0)]),
        uniform_jitter(2, 40, dwell_seconds=0.05, seed=1),
    ]
    # The first fetch finds out how fast the link is.
    return sim.run(traces, [SHORT, *[LONG] * 3])


def test_report_has_what_scripts_read(report):
    assert json.loads(json.dumps(report))["jitter_gain_vs_fixed"] == report["jitter_gain_vs_fixed"]
    assert len(report["traces"]) == 4
    assert set(report["traces"][0]["policies"]) == {
        *(f"fixed {name}" for name in LIBRARY.names),
        *sim.PLANNED,
    }
    stored = report["stored_bytes_over_one_size"]
    assert stored[sim.OURS_TWO] == pytest.approx(2.0, rel=0.02)
    assert 2.1 < stored[sim.OURS_ONE] < 2.4


def test_promises_hold_on_a_few_traces(report):
    assert report["worst_loss_vs_best_fixed"] < 0.03
    assert report["one_size_worst_loss_vs_best_fixed"] < 0.03
    gains = report["jitter_gain_vs_each_fixed"]
    assert report["jitter_gain_vs_fixed"] == gains[sim.DEFAULT_SIZE] > 0.05
    assert gains["medium"] > 0.2
    assert report["one_size_jitter_gain_vs_each_fixed"]["medium"] > 0.2
    gains = report["sizes_alone_jitter_gain_vs_each_fixed"]
    assert gains["small"] > gains["medium"] > 0.2
    assert min(gains.values()) > -0.03
    for size, possible in report["jitter_gain_possible_vs_each_fixed"].items():
        assert gains[size] < possible < gains[size] + 0.3
        # A fixed size that is fetched without waiting leaves less to gain.
        assert 0 <= report["jitter_gain_possible_by_size"][size] < possible


def test_ideal_decodes_nothing_that_has_not_come():
    sizes = ("largest",)
    computed = LONG.prompt.compute_seconds(LONG.num_chunks)
    num_bytes = LONG.num_chunks * sum(e.length for e in LIBRARY.prompt(LONG, sizes).header.units)

    def ideal(pieces):
        trace = make_trace("steps", "steps", [*pieces, (100.0, 40)])
        return (
            sim.ideal_seconds(trace, LIBRARY, H100_NVDEC, LONG, start=0.0, sizes=sizes) - computed
        )

    decoding = ideal([(1.0, 1e6)])
    assert decoding > num_bytes / (40 * GBIT)
    # All of it comes after a second, and is decoded then; half of it is decoded meanwhile.
    assert ideal([(1.0, 0)]) == pytest.approx(1.0 + decoding)
    assert ideal([(1.0, num_bytes / 2 / GBIT)]) == pytest.approx(1.0 + decoding / 2)
    # A link that is slower than the decoders is all that counts.
    assert ideal([(100.0, 1)]) == pytest.approx(num_bytes / GBIT)


def test_the_gate_computes_on_a_slow_link_and_fetches_on_a_fast_one(report):
    slow, fast = (row["policies"]["gated"] for row in report["traces"][:2])
    assert slow["mean_ttft_seconds"] < report["traces"][0]["policies"]["ours"]["mean_ttft_seconds"]
    assert sum(slow["units"].values()) <= 32  # of one chunk, to learn
    assert fast["units"]
    assert report["worst_gated_over_compute"] < 1.3
    assert report["worst_gated_over_better_of_both"] < 1.5


def test_command_line_refuses_nonsense(capsys):
    with pytest.raises(SystemExit):
        bench_main(["sim", "--seeds", "0"])
    assert "at least 1" in capsys.readouterr().err


def test_command_line_prints_json_or_shares(capsys, monkeypatch):
    monkeypatch.setattr(
        sim,
        "all_traces",
        lambda seeds, first_seed: [uniform_jitter(4, 40, dwell_seconds=0.1, seed=first_seed)],
    )
    monkeypatch.setattr(sim, "REQUESTS", (SHORT,))
    assert bench_main(["sim", "--json", "--first-seed", "2"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["command"].endswith(
        "--seeds 4 --first-seed 2 --rounds 2 --together 1 --jobs 1"
    )
    assert "jitter uniform" in printed.err
    assert "seed 2" in printed.err
    assert bench_main(["sim"]) == 0
    printed = capsys.readouterr().out
    assert "jitter_gain_vs_fixed +" in printed
    assert "jitter_gain_vs_each_fixed small +" in printed
    assert "worst_gated_over_compute 1." in printed
