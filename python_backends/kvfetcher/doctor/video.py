"""Checks of the video side: driver libraries, NVDEC's capabilities, golden streams everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfetcher.codec.gpu.nvdec import DRIVER_LIBRARIES, REMEDY
from kvfetcher.doctor.check import Check
from kvfetcher.doctor.streams import golden_streams, planes_sha256
from kvfetcher.errors import CodecError, KVFetcherError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvfetcher.codec.base import Decoder
    from kvfetcher.codec.encoders import ChosenEncoder
    from kvfetcher.codec.gpu.nvdec import DecoderCaps
    from kvfetcher.doctor.check import Status
    from kvfetcher.doctor.parallel_decode import DecoderKind, DecoderProcesses

_DRIVER = DRIVER_LIBRARIES[0]


def check_driver(choice: str, *, loads: Callable[[str], bool]) -> Check:
    """The NVIDIA driver and its video libraries.

    Args:
        choice: `codec.decoder`.
        loads: whether a shared library can be loaded.
    """
    if choice == "cpu":
        return Check("driver", "ok", 'codec.decoder = "cpu": no NVIDIA driver is used')
    missing = [name for name in DRIVER_LIBRARIES if not loads(name)]
    if not missing:
        return Check("driver", "ok", ", ".join(DRIVER_LIBRARIES) + " load")
    status: Status = "fail" if choice == "nvdec" else "warn"
    if _DRIVER in missing:
        detail = f"no NVIDIA driver here ({_DRIVER} does not load)"
        if choice == "nvdec":
            return Check("driver", "fail", f'{detail}, and codec.decoder = "nvdec"', REMEDY)
        return Check("driver", "ok", f"{detail}: units are decoded by the CPU")
    return Check(
        "driver",
        status,
        f"an NVIDIA driver is here, but {', '.join(missing)} does not load: its video engines"
        " cannot be used",
        REMEDY,
    )


def check_capabilities(
    ask: Callable[[], Sequence[DecoderCaps]], *, gpu: int | None = None
) -> Check:
    """What NVDEC decodes: engines and sizes per chroma format and bit depth.

    Args:
        ask: for what the driver says.
        gpu: which one it is of several; None = there is but one.
    """
    name = name_on("NVDEC", gpu)
    try:
        caps = ask()
    except KVFetcherError as exc:
        remedy = REMEDY if gpu is None else f"take {gpu} out of server.decode_gpus; or {REMEDY}"
        return Check(name, "fail", str(exc), remedy)
    able = [c for c in caps if c.num_engines]
    unable = [f"{c.chroma} {c.bit_depth} bit" for c in caps if not c.num_engines]
    if not able:
        return Check(name, "fail", "this GPU decodes no HEVC", 'set codec.decoder = "cpu"')
    first = able[0]
    detail = (
        f"{first.num_engines} engines; HEVC "
        + ", ".join(f"{c.chroma} {c.bit_depth} bit" for c in able)
        + f"; {first.min_width}x{first.min_height} to {first.max_width}x{first.max_height}"
    )
    if unable:
        return Check(
            name,
            "warn",
            f"{detail}; not {', '.join(unable)}",
            "none needed: the CPU decodes units of those formats",
        )
    return Check(name, "ok", detail)


def check_encoder(choose: Callable[[], ChosenEncoder], *, num_cores: int) -> Check:
    """What encodes chunks here; NVENC proves itself while it is chosen."""
    try:
        chosen = choose()
    except KVFetcherError as exc:
        return Check("encoder", "fail", str(exc), 'set codec.encoder = "auto"')
    if chosen.name == "nvenc":
        return Check("encoder", "ok", "NVENC, proven on pictures of 8 and 10 bits")
    if chosen.name == "own":
        return Check("encoder", "ok", f"the own HEVC encoder on {num_cores} cores")
    if chosen.reason:
        return Check(
            "encoder",
            "warn",
            f"libx265 on {num_cores} cores: {chosen.reason}",
            "none needed: saving is several times slower",
        )
    return Check("encoder", "ok", f"libx265 on {num_cores} cores")


def check_cpu_golden(decoder: Decoder) -> Check:
    """The golden streams on the CPU decoder, against their recorded digests."""
    wrong = []
    streams = golden_streams()
    for stream in streams:
        try:
            planes = decoder.decode([memoryview(p) for p in stream.packets], stream.geometry)
            if planes_sha256(planes) != stream.sha256:
                wrong.append(f"{stream.name}: other samples")
        except CodecError as exc:
            wrong.append(f"{stream.name}: {exc}")
    if wrong:
        return Check(
            "CPU decoder",
            "fail",
            "; ".join(wrong),
            "reinstall the `av` wheel from PyPI: pip install --force-reinstall av",
        )
    return Check("CPU decoder", "ok", f"{len(streams)} golden streams decode bit for bit")


def check_golden_everywhere(
    kind: DecoderKind, processes: DecoderProcesses, *, rounds: int, gpu: int | None = None
) -> Check:
    """The golden streams on every engine at the same time, against the CPU decoder's planes.

    Their recorded digests are of the CPU decoder's planes; `check_cpu_golden` proves those here.

    Args:
        kind: for the name of the check.
        processes: as many processes as engines.
        rounds: how often each process decodes each stream.
        gpu: of several the one whose engines are looked at; None = there is but one.
    """
    name = name_on(f"{kind} golden", gpu)
    streams = golden_streams()
    wrong: dict[str, int] = {}
    size = 0
    for stream in streams * rounds:
        try:
            digests = processes.digests(stream, gpu=gpu)
        except CodecError as exc:
            return Check(name, "fail", f"{stream.name}: {exc}", 'set codec.decoder = "cpu"')
        size = len(digests)
        if bad := sum(digest != stream.sha256 for digest in digests):
            wrong[stream.name] = wrong.get(stream.name, 0) + bad
    times = rounds * size
    if wrong:
        return Check(
            name,
            "fail",
            "other samples than the CPU decoder's: "
            + ", ".join(f"{stream} {bad} of {times} times" for stream, bad in wrong.items()),
            'set codec.decoder = "cpu" and report it',
        )
    return Check(
        name,
        "ok",
        f"{len(streams)} streams, {size} processes at once, {rounds} times each: all equal to"
        " the CPU decoder's planes",
    )


def name_on(name: str, gpu: int | None) -> str:
    """The name of a check on one of several GPUs; None = there is but one."""
    return name if gpu is None else f"{name}, GPU {gpu}"
