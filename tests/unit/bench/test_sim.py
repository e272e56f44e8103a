"""The simulator on small cases whose answer is known, and the promises on a few traces."""

import json

import pytest

from kvfetcher.bench import main as bench_main
from kvfetcher.bench import sim
from kvfetcher.bench.simulate import Limits, simulate
from kvfetcher.bench.traces import GBIT, all_traces, make_trace, uniform_jitter
from kvfetcher.fetch.bandwidth import LinkEstimator
from kvfetcher.fetch.decode_times import H100_NVDEC

LIBRARY = sim.Library(H100_NVDEC, sim.PICTURE_SIZES)
SHORT = sim.Request(sim.SHAPES[0], 2048)
LONG = sim.Request(sim.SHAPES[0], 8192)


def constant(gbit):
    return make_trace("constant", "constant", [(1.0, gbit)])


def fetch(trace, sizes, request=LONG, *, limits=sim.LIMITS, policy=None, start=0.0):
    estimator = LinkEstimator(
        prior_bytes_per_second=8 * GBIT, prior_rtt_seconds=1e-3, half_life_seconds=1.0
    )
    return simulate(
        policy or sim.WalkPolicy(LIBRARY, request, sizes=sizes),
        trace,
        H100_NVDEC,
        estimator,
        limits,
        start=start,
        num_chunks=request.num_chunks,
        num_layers=request.shape.num_layers,
    )


def test_a_slow_link_sets_the_time():
    found = fetch(constant(1), ("small",))
    elements = 8192 * 65536
    assert found.num_bytes == pytest.approx(elements * 1.8001 / 8, rel=1e-3)
    assert found.fetch_seconds == pytest.approx(8 * found.num_bytes / 1e9, rel=0.02)
    assert found.fetch_seconds > 8 * found.num_bytes / 1e9
    assert found.num_chunks == LONG.num_chunks
    assert found.network_bubble_seconds == 0
    assert found.decoder_bubble_seconds > 0.5 * found.fetch_seconds


@pytest.mark.parametrize(("size", "layers"), [("small", 1), ("huge", 8)])
def test_on_a_fast_link_the_decoders_set_the_time(size, layers):
    found = fetch(constant(40), (size,))
    (unit, *_) = LIBRARY.chunk(LONG.shape, (size,))
    work = LONG.num_chunks * 32 / layers * unit.decode_seconds / 7
    assert found.fetch_seconds == pytest.approx(work, rel=0.15)
    assert found.variants == {size: LONG.num_chunks * 32 // layers}


def test_a_full_queue_stops_the_network():
    limits = Limits(rtt_seconds=1e-6, max_transfers=8, transfer_bytes=1, max_waiting_bytes=1 << 20)
    assert fetch(constant(40), ("small",), limits=limits).network_bubble_seconds > 0.01


def test_raw_units_pass_the_decoders_by():
    found = fetch(constant(40), ("raw",), SHORT)
    assert found.fetch_seconds == pytest.approx(8 * found.num_bytes / 40e9, rel=0.1)


def test_a_stall_lasts_as_long_as_it_lasts():
    stalled = make_trace("stall", "stalls", [(0.05, 8), (0.3, 0), (100.0, 8)])
    plain = fetch(constant(8), ("huge",))
    found = fetch(stalled, ("huge",))
    assert found.fetch_seconds == pytest.approx(plain.fetch_seconds + 0.3, abs=0.02)


def test_giving_up_keeps_what_is_ready():
    class Impatient(sim.WalkPolicy):
        def num_wanted(self, num_ready, now, machine):
            return num_ready if num_ready >= 5 else 99

    policy = Impatient(LIBRARY, LONG, sizes=("huge",))
    found = fetch(constant(2), (), policy=policy)
    assert 5 <= found.num_chunks < 10
    assert found.fetch_seconds < 0.3 * fetch(constant(2), ("huge",)).fetch_seconds


def test_the_same_run_twice_is_the_same():
    trace = uniform_jitter(1, 40, dwell_seconds=0.05, seed=3)
    assert fetch(trace, LIBRARY.pictures) == fetch(trace, LIBRARY.pictures)


def test_traces_repeat_and_say_when_they_change():
    trace = make_trace("t", "steps", [(0.5, 8), (1.5, 2)])
    assert trace.at(0.25) == (8 * GBIT, pytest.approx(0.25))
    assert trace.at(2.75) == (2 * GBIT, pytest.approx(1.25))
    assert trace.mean_bytes_per_second == pytest.approx(3.5 * GBIT)
    for moment in (0.5, 2.0, 1e6):
        assert trace.at(moment)[1] > 0


def test_every_family_is_there_and_seeds_differ():
    traces = all_traces(seeds=2)
    assert {t.family for t in traces} == {"constant", "steps", "jitter", "stalls"}
    assert len({t.name for t in traces}) == len({t.pieces for t in traces}) == len(traces)
    assert traces == all_traces(seeds=2)
    for trace in traces:
        rates = {rate / GBIT for _, rate in trace.pieces}
        assert max(rates) <= 40
        assert min(rates) >= (0 if trace.family == "stalls" else 1)


def test_the_paper_s_rule_matches_transfer_and_decoding():
    shape = sim.SHAPES[0]
    assert LIBRARY.matching_size(shape, bytes_per_second=1 * GBIT) == "small"
    assert LIBRARY.matching_size(shape, bytes_per_second=40 * GBIT) == "largest"
    found = fetch(constant(16), (), policy=sim.PreviousChunkPolicy(LIBRARY, LONG))
    assert found.num_chunks == LONG.num_chunks
    assert len(found.variants) > 1


@pytest.fixture(scope="module")
def report():
    traces = [
        constant(2),
        constant(16),
        make_trace("stalls", "stalls", [(0.1, 8), (0.05, 0)]),
        uniform_jitter(2, 40, dwell_seconds=0.05, seed=1),
    ]
    return sim.run(traces, [SHORT, LONG] * 2)


def test_report_has_what_scripts_read(report):
    assert json.loads(json.dumps(report))["jitter_gain_vs_fixed"] == report["jitter_gain_vs_fixed"]
    assert len(report["traces"]) == 4
    assert set(report["traces"][0]["policies"]) == {
        *(f"fixed {name}" for name in LIBRARY.names),
        *sim.PLANNED,
    }
    assert report["stored_bytes_over_one_size"]["ours, two sizes"] == pytest.approx(2.0, rel=0.01)


def test_promises_hold_on_a_few_traces(report):
    assert report["jitter_gain_vs_fixed"] > 0.2
    assert report["worst_loss_vs_best_fixed"] < 0.05
    assert report["with_raw_worst_loss_vs_best_fixed"] < 0.06


def test_the_gate_computes_on_a_slow_link_and_fetches_on_a_fast_one(report):
    slow, fast = (row["policies"]["gated"] for row in report["traces"][:2])
    assert slow["mean_ttft_seconds"] < report["traces"][0]["policies"]["ours"]["mean_ttft_seconds"]
    assert fast["mean_ttft_seconds"] == pytest.approx(
        report["traces"][1]["policies"]["ours"]["mean_ttft_seconds"], rel=0.02
    )
    # The first request is decided on an assumed rate, and given up when that proves wrong.
    assert max(row["worst_gated_over_compute"] for row in report["traces"]) < 2.0


def test_command_line_refuses_nonsense(capsys):
    with pytest.raises(SystemExit):
        bench_main(["sim", "--seeds", "0"])
    assert "at least 1" in capsys.readouterr().err


def test_command_line_prints_json_or_shares(capsys, monkeypatch):
    monkeypatch.setattr(
        sim, "all_traces", lambda seeds: [uniform_jitter(4, 40, dwell_seconds=0.1, seed=seeds)]
    )
    monkeypatch.setattr(sim, "REQUESTS", (SHORT,))
    assert bench_main(["sim", "--json", "--seeds", "2"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["command"].endswith("--seeds 2 --rounds 2")
    assert "jitter uniform" in printed.err
    assert bench_main(["sim"]) == 0
    assert "jitter_gain_vs_fixed +" in capsys.readouterr().out
