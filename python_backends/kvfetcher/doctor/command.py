"""`kvfetcher doctor`: run the checks, say what was found.

Exit status: 0 nothing failed (warnings are allowed), 1 a check failed or the configuration cannot
be read, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_type_hints

from kvfetcher import __version__
from kvfetcher.config import CONFIG_VARIABLE, EngineConfig, cache_home, load_config
from kvfetcher.doctor import host
from kvfetcher.doctor.check import Check, guarded
from kvfetcher.doctor.engine import check_engine
from kvfetcher.doctor.store import check_store
from kvfetcher.launcher.rundir import SHARED_MEMORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvfetcher.config import Config
    from kvfetcher.doctor.parallel_decode import DecoderKind

_VIDEO_PACKAGES = ("numpy", "av", "zstandard", "isal")
_GOLDEN_ROUNDS = 3
_TIMING_SECONDS = 0.4
_SMI_TIMEOUT_SECONDS = 30.0


def main_doctor(argv: Sequence[str]) -> int:
    """Run `kvfetcher doctor`.

    Args:
        argv: arguments after ``doctor``.

    Returns:
        The exit status; see this module's head.
    """
    arguments = make_parser().parse_args(argv)
    config = load_config(arguments.config)
    checks = []
    for check in _checks(config, arguments):
        checks.append(check)
        if not arguments.json:
            print(_line(check), flush=True)
    failed = [check.name for check in checks if check.status == "fail"]
    if arguments.json:
        facts = {
            "kvfetcher": __version__,
            "machine": platform.platform(),
            "python": platform.python_version(),
            "ok": not failed,
            "checks": [asdict(check) for check in checks],
        }
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        warned = sum(check.status == "warn" for check in checks)
        print(f"{len(checks)} checks, {warned} warnings, {len(failed)} failed")
    return int(bool(failed))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    engines = get_args(get_type_hints(EngineConfig)["kind"])
    parser = argparse.ArgumentParser(
        prog="kvfetcher doctor",
        description="Check driver, decoders, store, memory, packages and engine of this machine, and"
        " measure decode times for the fetcher.",
        epilog="Exit status: 0 nothing failed, 1 a check failed, 2 wrong command line.",
    )
    parser.add_argument("--config", metavar="FILE", help=f"TOML file; default ${CONFIG_VARIABLE}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--store", action="store_true", help="check the store alone")
    parser.add_argument(
        "--trust", action="store_true", help="only play the attacks between two tenants"
    )
    parser.add_argument("--quick", action="store_true", help="do not measure decode times")
    parser.add_argument(
        "--engine", choices=engines, help="the engine to check; default: engine.kind"
    )
    return parser


def _checks(config: Config, arguments: argparse.Namespace) -> Iterator[Check]:
    from kvfetcher.storage import open_store

    store = guarded("store", partial(check_store, config, open_it=lambda: open_store(config.store)))
    if arguments.store:
        yield store
        return
    if arguments.trust:
        yield _trust()
        return
    packages = host.check_packages(config, has_gpu=Path("/proc/driver/nvidia").exists())
    yield packages
    yield from _host_checks(config)
    yield store
    missing = [name for name in _VIDEO_PACKAGES if find_spec(name) is None]
    if missing:
        detail = f"not checked without {', '.join(missing)}"
        yield Check("video", "fail", detail, packages.remedy)
        return
    yield _trust()
    yield from _video_checks(config, quick=arguments.quick)
    yield from check_engine(config, arguments.engine or config.engine.kind)


def _trust() -> Check:
    from kvfetcher.doctor.trust import check_trust

    return guarded("trust", check_trust)


def _host_checks(config: Config) -> Iterator[Check]:
    from kvfetcher.launcher.installation import find_installation
    from kvfetcher.launcher.ports import check_ports
    from kvfetcher.models.folders import prepared_folder
    from kvfetcher.models.geometry import refuse_folder

    free, total = host.shared_memory_bytes(SHARED_MEMORY)
    checks: dict[str, Callable[[], Check]] = {
        "tritonserver": lambda: host.check_tritonserver(find_installation),
        "shared memory": lambda: host.check_shared_memory(
            config, free_bytes=free, total_bytes=total
        ),
        "ports": lambda: host.check_free_ports(config, check=lambda: check_ports(config.server)),
        "model": lambda: host.check_model(config, find=prepared_folder, refuse=refuse_folder),
        "calibration": lambda: _check_calibration(config),
    }
    for name, run in checks.items():
        yield guarded(name, run)


def _check_calibration(config: Config) -> Check:
    """With profile and calibration settled as `serve` settles them."""
    from kvfetcher.launcher.profile import choose_profile
    from kvfetcher.models.folders import prepared_folder

    model = prepared_folder(config.engine.model)
    if model is not None:
        chosen = choose_profile(config.codec, model, dtype=config.engine.kv_dtype)
        config = replace(config, codec=chosen.codec)
    return host.check_calibration(config, read=host.read_certificate)


def _video_checks(config: Config, *, quick: bool) -> Iterator[Check]:
    from kvfetcher.codec.encoders import choose_encoder
    from kvfetcher.codec.gpu.instances import decode_instances
    from kvfetcher.codec.gpu.nvdec import ask_caps, count_engines, loads_library
    from kvfetcher.codec.video import VideoDecoder
    from kvfetcher.doctor import video

    choice = config.codec.decoder
    driver = video.check_driver(choice, loads=loads_library)
    yield driver
    yield guarded("MPS", lambda: _check_mps(config))
    yield guarded("CPU decoder", lambda: video.check_cpu_golden(VideoDecoder()))
    yield guarded(
        "encoder",
        lambda: video.check_encoder(
            lambda: choose_encoder(config.codec.encoder), num_cores=len(os.sched_getaffinity(0))
        ),
    )
    kind: DecoderKind = "cpu"
    places: list[int] = []  # each GPU, for each of its engines
    is_one = len(config.nvdec_gpus) == 1
    if choice != "cpu" and loads_library("libnvcuvid.so.1"):
        for gpu in config.nvdec_gpus:
            capabilities = video.check_capabilities(
                partial(ask_caps, gpu), gpu=None if is_one else gpu
            )
            yield capabilities
            if capabilities.status != "fail":
                kind = "nvdec"
                places += [gpu] * max(1, count_engines(gpu))
    if kind == "cpu":
        places = [0] * decode_instances(config)
    names = [None] if is_one or kind == "cpu" else list(dict.fromkeys(places))
    yield from _decoder_checks(kind, places, names, quick=quick)


def _check_mps(config: Config) -> Check:
    from kvfetcher.codec.gpu.nvdec import has_driver
    from kvfetcher.launcher.mps import find_control, find_daemon

    return host.check_mps(
        config,
        has_driver=has_driver(),
        control=find_control(os.environ),
        in_use=find_daemon(os.environ),
        compute_mode=_ask_gpu("compute_mode"),
    )


def _decoder_checks(
    kind: DecoderKind, places: Sequence[int], names: Sequence[int | None], *, quick: bool
) -> Iterator[Check]:
    """Checks with several decoding processes.

    Args:
        kind: which decoder.
        places: the GPU of each process, for NVDEC.
        names: those of several GPUs; None = there is but one, or none.
        quick: do not measure decode times.
    """
    from kvfetcher.doctor import timing, video
    from kvfetcher.doctor.parallel_decode import DecoderProcesses
    from kvfetcher.errors import CodecError

    _talk(f"starting {len(places)} {kind} decoders")
    try:
        processes = DecoderProcesses(kind, len(places), places)
    except CodecError as exc:
        yield Check(f"{kind} golden", "fail", str(exc), 'set codec.decoder = "cpu"')
        return
    with processes:
        for gpu in names:
            yield guarded(
                video.name_on(f"{kind} golden", gpu),
                partial(
                    video.check_golden_everywhere, kind, processes, rounds=_GOLDEN_ROUNDS, gpu=gpu
                ),
            )
        if quick:
            return
        measure = partial(
            timing.measure_table,
            kind,
            processes,
            device=_gpu_names(places) if kind == "nvdec" else _cpu_name(),
            seconds=_TIMING_SECONDS,
            progress=_talk,
        )
        yield guarded(
            "decode times", lambda: timing.check_decode_times(measure, folder=cache_home())
        )


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def _gpu_names(gpus: Sequence[int]) -> str:
    return ", ".join(_ask_gpu("name", gpu) or "NVIDIA GPU" for gpu in dict.fromkeys(gpus))


def _ask_gpu(fact: str, gpu: int = 0) -> str:
    """What nvidia-smi says of a GPU, as it counts; "" where it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={fact}", "--format=csv,noheader", f"--id={gpu}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SMI_TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _talk(text: str) -> None:
    print(f"kvfetcher: {text}", file=sys.stderr, flush=True)


def _line(check: Check) -> str:
    head = f"{check.status:<5} {check.name:<14} {check.detail}"
    return f"{head}\n{'':20} remedy: {check.remedy}" if check.remedy else head
