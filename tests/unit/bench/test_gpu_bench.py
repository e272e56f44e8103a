"""The GPU benchmark without a GPU: its arithmetic, its workloads, and one report of made-up rates."""

import importlib
import json
from argparse import Namespace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from kvfetcher.codec.quant import bits_to_float32
from kvfetcher.spec import KVSpec

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("bench_gpu")


@pytest.fixture
def counters(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu_counters")


METRICS = """\
# HELP nv_inference_queue_duration_us queue
nv_inference_request_success{model="kv_decode",version="1"} 10
nv_inference_request_success{gpu_uuid="x",model="kv_decode",version="1"} 2
nv_inference_exec_count{model="kv_decode",version="1"} 12
nv_inference_queue_duration_us{model="kv_decode",version="1"} 2400
nv_inference_queue_duration_us{model="idle",version="1"} 5
nv_gpu_utilization{gpu_uuid="x"} 0.5
"""


def test_tritons_counters_are_told_for_each_unit(counters):
    after = counters.triton_counters(METRICS)
    assert after["kv_decode"]["units"] == 12
    rows = counters.per_unit({"idle": after["idle"]}, after)
    assert rows == {
        "kv_decode": {
            "queue_us": 200.0,
            "input_us": 0.0,
            "infer_us": 0.0,
            "output_us": 0.0,
            "units": 12,
            "batch": 1.0,
        }
    }
    assert counters.per_unit(after, after) == {}


def test_cores_are_counted(counters):
    assert counters.busy_cores((0, 0), counters.cpu_times()) >= 0
    assert counters.busy_cores((5, 9), (5, 9)) == 0


def test_stages_and_the_load_of_kv_restore_come_from_the_stamps(counters):
    def unit(at, *, synced, **more):
        stamps = {"decode": at, "decoded": at + 0.004, "restore": at + 0.005}
        return {"batch": 2, "stamps": {**stamps, "launched": at + 0.006, "synced": synced, **more}}

    units = [
        unit(0.0, synced=0.010, reserved=0.003),
        unit(0.001, synced=0.010),  # through host memory
        unit(0.010, synced=0.020),
    ]
    found = counters.stage_times(units, restorers=1)
    assert found["decode_to_first_picture"]["median_ms"] == 3.0
    assert found["launch"] == {"median_ms": 1.0, "p95_ms": 1.0}
    assert found["kv_restore_begins"] == pytest.approx(3 / 15, abs=1e-3)
    assert found["batch"] == 2
    assert counters.stage_times([], restorers=1) == {}


def test_workloads_are_units_with_what_the_cpu_restores(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bench, "SPEC", KVSpec(num_layers=4, num_kv_heads=4, head_dim=64))
    calibration = bench.make_calibration()
    bench.store_calibration(calibration)
    bits = {}
    work, packed = bench.make_workloads(
        calibration, [(192, "balanced", 1), (192, "balanced", 0)], bits
    )
    assert (len(work.units), work.num_tokens, set(bits)) == (2, 192, {192})
    assert work.has_pictures
    assert not packed.has_pictures
    assert set(packed.video_bytes) == {0}
    for each in (work, packed):
        assert sum(each.elements) == each.values.size
    # The units hold the same integers in other groups. Values are equal to the rounding of float32
    # (docs/format.md), which may move one to the next bfloat16: CPUs with AVX-512 VNNI add in
    # another order.
    ours, theirs = (bits_to_float32(each.values, "bfloat16") for each in (packed, work))
    np.testing.assert_allclose(ours, theirs, rtol=2**-7, atol=1e-6)
    assert np.count_nonzero(ours != theirs) < ours.size / 1000
    row = bench.describe(work)
    assert row["plane_bytes"] > 0
    assert 0 < row["bits_per_element"] < 16


class FakeProcesses:
    gpus: ClassVar[set] = set()

    def __init__(self, work, size, *, gpus=()):
        self.size = size
        self.gpus.add(gpus)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def load(self, units):
        pass

    def start(self, count, seconds, **options):
        return []

    def rate(self, count, seconds, **options):
        assert count <= self.size
        return 1e9 * count


class FakeRig:
    """Faster with two restorers than with one or four."""

    opened: ClassVar[list] = []

    gpus: ClassVar[set] = set()

    def __init__(self, count, *, arena_bytes, restorers=1, plane_bytes=0, gpus=(0,)):
        self.opened.append((count, restorers, plane_bytes))
        self.gpus.add(gpus)
        self.restorers, self.in_flight = restorers, 2 * count
        self.free_bytes = {"before": 4 << 30, "arena": 3 << 30, "server": 2 << 30}

    def check(self, work):
        return {"largest_difference": 0.0}

    def rate(self, work, seconds, **options):
        speed = {1: 4.0, 2: 9.0, 4: 8.0}[self.restorers]
        return {"elements_g_per_s": speed, "latency_ms_median": 1.0, "latency_ms_p95": 2.0}

    def targets(self, num_tokens, count):
        return ["{}"] * count

    def paths(self, work):
        return ["unit"]

    def call(self, plans):
        return [{} for _ in plans]

    def close(self):
        pass


class FakeNeighbour:
    """Loses a tenth beside anything."""

    def __init__(self, target):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def beside(self, loads):
        return {name: {"elements_g_per_s": [load()], "lost": 0.1} for name, load in loads.items()}


class FakeContext:
    """100 MiB go when the server gets warm, 50 more while it works."""

    asked = 0

    def memory_info(self):
        self.asked += 1
        used = 100 if self.asked == 1 else 150
        return (2 << 30) - (used << 20), 1 << 40


@pytest.fixture
def report_of(bench, monkeypatch, tmp_path):
    """Arguments -> (exit status, the report) of a run in which nothing is real."""
    monkeypatch.setattr(bench, "make_calibration", lambda: None)
    monkeypatch.setattr(bench, "store_calibration", lambda calibration: None)
    monkeypatch.setattr(
        bench, "make_workloads", lambda _, wanted, bits: [work_of(w) for w in wanted]
    )
    monkeypatch.setattr(bench, "describe", lambda work: {"units": 1})
    monkeypatch.setattr(bench, "machine", dict)
    monkeypatch.setattr(bench, "DecoderProcesses", FakeProcesses)
    monkeypatch.setattr(bench, "rate_of", lambda pipes: 3e9)
    monkeypatch.setattr(bench, "Rig", FakeRig)
    context = FakeContext()
    monkeypatch.setattr(bench, "cuda_context", lambda gpu: context)
    monkeypatch.setattr(bench, "Neighbour", FakeNeighbour)
    monkeypatch.setattr(FakeRig, "opened", [])
    for fake in (FakeProcesses, FakeRig):
        monkeypatch.setattr(fake, "gpus", set())

    def run(*arguments):
        output = tmp_path / "report.json"
        status = bench.main(["--output", str(output), *arguments])
        return status, json.loads(output.read_text())

    return run


def work_of(wanted):
    tokens, _, joined = wanted
    return Namespace(name=str(wanted), units=[b""], num_tokens=tokens, has_pictures=joined > 0)


@pytest.mark.parametrize(("arguments", "gpus"), [((), (0,)), (("--gpus", "0,1"), (0, 1))])
def test_decoders_of_every_part_take_turns_on_the_gpus(report_of, arguments, gpus):
    _, report = report_of(*arguments)
    assert report["errors"] == {}
    assert FakeRig.gpus == {gpus}
    assert FakeProcesses.gpus == {gpus, ()}, "restoring is told no GPU"


def test_one_report_holds_every_part(report_of, bench):
    status, report = report_of()
    assert (status, report["errors"], report["left_out"]) == (0, {}, [])
    main = report["rates"][str(bench.MAIN[0])]
    assert main["bare_7"] == 7.0
    assert main["triton_14_2"]["of_bare_14"] == pytest.approx(9 / 14, abs=1e-3)
    assert main["triton_14_2"]["twice_in_flight_g_per_s"] == 9.0
    assert {"bare_14_with_ring_copy", "bare_14_beside_restorer", "restorer_alone"} <= main.keys()
    assert report["memory"]["extra_mib"] == {"4096": 50, "32768": 50, "131072": 50}
    assert report["memory"]["resident_mib"] == 100
    assert report["memory"]["server_start_mib"] == 1024
    product = report["interference"]["gemm_tflop_per_s"]
    assert product == {"path": {"elements_g_per_s": [4.0], "lost": 0.1}}
    assert "no LMCache" in report["interference"]["cachegen"]
    assert len(report["rates"]) == len(bench.MAIN) + len(bench.MORE)
    lost = [
        r["triton_14_2"]["generation"]["lost"]
        for r in report["rates"].values()
        if r["triton_14_2"].get("generation")
    ]
    assert lost == [0.1] * len(bench.MORE)
    assert main["triton_14_1"]["generation"]["lost"] == 0.1, "in the first server"
    packed = report["rates"][str(next(work for work in bench.MORE if not work[2]))]
    assert "triton_14_2" in packed
    assert "bare_14" not in packed, "no decoder has anything to do with it"
    assert report["instances"]["restorers"] == 2, "the best one"
    instances = report["instances"][str(bench.MAIN[1])]
    assert set(instances["triton"]) == set(instances["generation"]) == {"1", "2", "4", "7", "14"}
    assert FakeRig.opened[:4] == [(14, 1, 0), (14, 2, 0), (14, 4, 0), (14, 4, 1 << 30)]


def test_what_there_was_no_time_for_is_named(report_of):
    status, report = report_of("--budget-seconds", "0")
    assert status == 0
    assert report["rates"] == {}
    assert {"bare", "triton_14_1", "instances"} <= set(report["left_out"])


def test_a_part_that_fails_does_not_take_the_others_with_it(report_of, bench, monkeypatch):
    def fail(*_, **__):
        raise SystemExit("kv_pipeline failed")

    monkeypatch.setattr(bench, "run_memory", fail)
    status, report = report_of("--parts", "bare,rates,memory")
    assert status == 1
    assert "kv_pipeline failed" in report["errors"]["memory"]
    assert "triton_14_4" in report["rates"][str(bench.MAIN[0])]
    assert report["rates"][str(bench.MAIN[0])]["bare_14"] == 14.0


def test_unknown_parts_are_refused(report_of, capsys):
    with pytest.raises(SystemExit):
        report_of("--parts", "rates,everything")
    assert "no such part: ['everything']" in capsys.readouterr().err


def test_under_mps_all_of_it_runs_in_a_process_of_its_own(bench, monkeypatch, tmp_path):
    from support import mps_stand_in

    asked = []

    def run(command, *, env, check):
        asked.append((command[2:], env["CUDA_MPS_PIPE_DIRECTORY"]))
        assert Path(asked[0][1]).is_dir()
        return Namespace(returncode=3)

    mps_stand_in.install(tmp_path, monkeypatch)
    monkeypatch.setattr("kvfetcher.launcher.mps._has_driver", lambda: True)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setattr(bench, "subprocess", Namespace(run=run))
    arguments = ["--mps", "--output", str(tmp_path / "out.json")]
    assert bench.main(arguments) == 3
    assert asked[0][0] == arguments
    assert not Path(asked[0][1]).exists()
