"""Where the time of the GPU path goes: tritonserver's counters, the machine's, the units' stamps."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

# Triton's names; microseconds but for the counts.
_COUNTERS = {
    "nv_inference_request_success": "units",
    "nv_inference_exec_count": "executions",
    "nv_inference_queue_duration_us": "queue_us",
    "nv_inference_compute_input_duration_us": "input_us",
    "nv_inference_compute_infer_duration_us": "infer_us",
    "nv_inference_compute_output_duration_us": "output_us",
}
_LINE = re.compile(r'^(\w+)\{[^}]*\bmodel="([^"]+)"[^}]*\} (\S+)$', re.MULTILINE)

# From one stamp of `kv_status` to the next one.
STAGES = (
    ("decode", "reserved", "decode_to_first_picture"),
    ("reserved", "decoded", "rest_of_decode"),
    ("decoded", "restore", "to_kv_restore"),
    ("restore", "launched", "launch"),
    ("launched", "synced", "rest_of_batch"),
)


def triton_counters(text: str) -> dict[str, dict[str, float]]:
    """Of each model, from the text of the metrics endpoint."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(_COUNTERS.values(), 0.0))
    for name, model, value in _LINE.findall(text):
        if name in _COUNTERS:
            found[model][_COUNTERS[name]] += float(value)
    return dict(found)


def per_unit(before: dict, after: dict) -> dict[str, dict[str, float]]:
    """Microseconds of one unit in each model that ran between two readings, and the mean batch."""
    rows = {}
    for model, now in after.items():
        then = before.get(model, dict.fromkeys(now, 0.0))
        grown = {name: now[name] - then[name] for name in now}
        units = grown.pop("units")
        if units:
            executions = grown.pop("executions")
            rows[model] = {name: round(us / units, 1) for name, us in grown.items()}
            rows[model]["units"] = units
            rows[model]["batch"] = round(units / executions, 2) if executions else 0.0
    return rows


def cpu_times() -> tuple[int, int]:
    """(busy, all) ticks of all cores since the machine's start."""
    ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def busy_cores(before: tuple[int, int], after: tuple[int, int]) -> float:
    """How many cores were busy between two readings."""
    passed = after[1] - before[1]
    return round((os.cpu_count() or 1) * (after[0] - before[0]) / passed, 2) if passed else 0.0


def stage_times(units: list[dict], *, restorers: int) -> dict[str, object]:
    """Milliseconds of each stage, and how much of its time kv_restore spent on beginning units.

    Args:
        units: ``{"stamps": {...}, "batch": n}`` of each unit; those that did not go over the GPU
            lack a stamp and are left out of its stage.
        restorers: kv_restore processes.
    """
    rows: dict[str, object] = {}
    for first, last, name in STAGES:
        stamps = [u["stamps"] for u in units if {first, last} <= u["stamps"].keys()]
        times = sorted(1e3 * (s[last] - s[first]) for s in stamps)
        if times:
            rows[name] = {
                "median_ms": round(times[len(times) // 2], 3),
                "p95_ms": round(times[int(0.95 * len(times))], 3),
            }
    if units:
        stamps = [u["stamps"] for u in units]
        begins = sum(s["launched"] - s["restore"] for s in stamps)
        wall = max(s["synced"] for s in stamps) - min(s["restore"] for s in stamps)
        rows["kv_restore_begins"] = round(begins / wall / restorers, 3) if wall else 0.0
        rows["batch"] = round(sum(u["batch"] for u in units) / len(units), 2)
    return rows
