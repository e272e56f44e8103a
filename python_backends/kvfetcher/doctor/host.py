"""Checks of packages, tritonserver, shared memory, ports, model and calibration."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvfetcher.codec.gpu.nvdec import MIN_LIBRARY, is_too_old
from kvfetcher.doctor.check import Check, Status
from kvfetcher.errors import ConfigError, KVFetcherError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfetcher.config import Config
    from kvfetcher.launcher.installation import Installation

_MIB = 1 << 20
# What the stubs and tritonserver take besides the arena: a few MiB per model instance.
_STUB_BYTES = 64 * _MIB

_ALWAYS = {"numpy": "", "tritonclient": "", "av": "codec", "zstandard": "codec", "isal": "codec"}
_BY_ENGINE = {
    "torch": {"torch": "engine", "transformers": "engine", "safetensors": "engine"},
    "paged": {"torch": "engine", "transformers": "engine", "safetensors": "engine"},
    "tensorrt_llm": {"tensorrt_llm": ""},
}
_BY_STORE = {"redis": {"redis": "redis"}, "s3": {"obstore": "s3"}}


def installed_version(package: str) -> str:
    """Version of an installed package; "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_packages(
    config: Config, *, version: Callable[[str], str] = installed_version, has_gpu: bool = False
) -> Check:
    """The Python packages that this configuration needs, and numpy's version.

    Args:
        config: names engine and store.
        version: of a package; "" = not installed.
        has_gpu: an NVIDIA driver is here, so PyNvVideoCodec is of use.
    """
    wanted = {
        **_ALWAYS,
        **_BY_ENGINE.get(config.engine.kind, {}),
        **_BY_STORE.get(config.store.kind, {}),
    }
    found = {name: version(name) for name in wanted}
    missing = [name for name, have in found.items() if not have]
    detail = ", ".join(f"{name} {have or 'missing'}" for name, have in found.items())
    if missing:
        extras = sorted({wanted[name] for name in missing if wanted[name]})
        names = " ".join(name for name in missing if not wanted[name])
        remedy = " ".join([f"'kvfetcher[{','.join(extras)}]'"] * bool(extras) + [names]).strip()
        return Check("packages", "fail", detail, f"pip install {remedy}")
    if int(found["numpy"].split(".")[0]) >= 2:
        return Check(
            "packages",
            "fail",
            f"{detail}: Triton's Python stub reads arrays of numpy 2 garbled, without an error",
            "pip install 'numpy<2'",
        )
    uses_nvdec = has_gpu and config.codec.decoder != "cpu"
    codec = version("PyNvVideoCodec") if uses_nvdec else ""
    if uses_nvdec and not codec:
        return Check(
            "packages",
            "warn",
            f"{detail}; PyNvVideoCodec missing: this GPU's NVDEC is not used",
            "pip install 'kvfetcher[gpu]'",
        )
    if uses_nvdec and is_too_old(codec):
        return Check(
            "packages",
            "fail" if config.codec.decoder == "nvdec" else "warn",
            f"{detail}; PyNvVideoCodec {codec} gives the strides of 10- and 12-bit pictures in bytes:"
            " this GPU's NVDEC is not used",
            f"pip install 'PyNvVideoCodec>={MIN_LIBRARY},<3'",
        )
    return Check("packages", "ok", f"{detail}, PyNvVideoCodec {codec}" if uses_nvdec else detail)


def check_tritonserver(find: Callable[[], Installation]) -> Check:
    """A tritonserver that can run this interpreter's models."""
    try:
        found = find()
    except KVFetcherError as exc:
        return Check("tritonserver", "fail", str(exc), "pip install 'kvfetcher[server]'")
    return Check("tritonserver", "ok", f"{found.executable} ({found.origin})")


def check_shared_memory(config: Config, *, free_bytes: int, total_bytes: int) -> Check:
    """Room in /dev/shm for the arena and Triton's own memory."""
    needed = config.engine.arena_bytes + _STUB_BYTES
    detail = (
        f"/dev/shm: {free_bytes // _MIB} of {total_bytes // _MIB} MiB free; the arena takes"
        f" {config.engine.arena_bytes // _MIB}, Triton's models about {_STUB_BYTES // _MIB}"
    )
    if free_bytes >= needed:
        return Check("shared memory", "ok", detail)
    remedy = f"docker run --shm-size={-(-needed // (1 << 30)) + 1}g, or lower engine.arena_bytes"
    too_small = total_bytes < needed or free_bytes < config.engine.arena_bytes
    return Check("shared memory", "fail" if too_small else "warn", detail, remedy)


def shared_memory_bytes(folder: Path) -> tuple[int, int]:
    """(free, total) bytes of the file system that `folder` is on."""
    usage = shutil.disk_usage(folder)
    return usage.free, usage.total


def check_free_ports(config: Config, *, check: Callable[[], None]) -> Check:
    """The server's three ports; taken ones only warn, since the server itself may hold them."""
    server = config.server
    numbers = f"{server.http_port}, {server.grpc_port}, {server.metrics_port} of {server.host}"
    try:
        check()
    except KVFetcherError as exc:
        remedy = "none, if that is the server of this configuration"
        return Check("ports", "warn", str(exc), remedy)
    return Check("ports", "ok", f"{numbers} are free")


def check_mps(
    config: Config, *, has_driver: bool, control: str | None, in_use: Path | None, compute_mode: str
) -> Check:
    """Whether NVIDIA's Multi-Process Service is used, or could be.

    Args:
        config: `server.mps`.
        has_driver: an NVIDIA driver is here.
        control: where the daemon's program is; None = not installed.
        in_use: folder of a daemon that the environment names and that answers.
        compute_mode: compute mode of the first GPU, as nvidia-smi says it; "" = unknown.
    """
    mode = config.server.mps
    wanted: Status = "warn" if mode == "on" else "ok"
    if not has_driver:
        remedy = 'set server.mps = "auto" or "off"' if mode == "on" else ""
        return Check("MPS", wanted, "no NVIDIA driver here, so there is none", remedy)
    facts = f"server.mps = {mode}, compute mode {compute_mode or 'unknown'}"
    if in_use is not None:
        return Check("MPS", "ok", f"the daemon of {in_use} is used ({facts})")
    if control is None:
        remedy = "install it: it comes with the driver" if mode == "on" else ""
        detail = f"nvidia-cuda-mps-control is not installed ({facts})"
        return Check("MPS", wanted, f"{detail}: processes take turns on the GPU", remedy)
    if mode != "off":
        return Check("MPS", "ok", f"{control}; `serve` starts a daemon ({facts})")
    detail = f"{control} is here and not used ({facts}): processes take turns on the GPU"
    if compute_mode == "Exclusive_Process":  # then only one process may use it
        return Check("MPS", "warn", detail, 'set server.mps = "on"')
    return Check("MPS", "ok", detail)


def check_model(
    config: Config,
    *,
    find: Callable[[str], Path | None],
    refuse: Callable[[Path], None] = lambda _: None,
) -> Check:
    """The engine's model: there, or to be fetched; and of a family that can be served.

    Args:
        config: names the model.
        find: the folder of a model by name or path; None = a built-in one that is not here yet.
        refuse: raises where the engine cannot serve the model of a folder (`models.geometry`).
    """
    name = config.engine.model
    try:
        folder = find(name)
    except KVFetcherError as exc:
        return Check("model", "fail", str(exc), "set engine.model to a Hugging Face model folder")
    if folder is None:
        return Check(
            "model", "warn", f"{name} is fetched at the first start", "run `kvfetcher prepare` now"
        )
    if config.engine.kind != "tensorrt_llm":  # which has checks of its own
        try:
            refuse(folder)
        except KVFetcherError as exc:
            return Check(
                "model", "fail", str(exc), "choose a model that docs/models.md lists as yes"
            )
    return Check("model", "ok", f"{name}: {folder}")


class Certified(NamedTuple):
    """What the certificate of a calibration says of one profile."""

    kl: float
    ratio: float
    below_bar: str = ""
    """Why the quality is not good enough (`codec.ladder.bar`); "" = it is."""


def check_calibration(config: Config, *, read: Callable[[str, str], Certified | None]) -> Check:
    """The calibration of the configured profile, and whether its quality was measured.

    Args:
        config: names profile and artifact.
        read: what the artifact (a file) certifies of a profile; None = nothing.
    """
    from kvfetcher.spec import LADDER  # numpy comes with it

    codec = config.codec
    if codec.profile not in LADDER:
        return Check("calibration", "ok", f"profile {codec.profile} needs none")
    if not codec.calibration:
        return Check(
            "calibration",
            "fail",
            f"profile {codec.profile} needs one and codec.calibration names none",
            "kvfetcher calibrate MODEL --output FILE, then set codec.calibration",
        )
    try:
        certified = read(codec.calibration, codec.profile)
    except KVFetcherError as exc:
        return Check("calibration", "fail", str(exc), "kvfetcher calibrate MODEL --output FILE")
    if certified is None:
        return Check(
            "calibration",
            "warn" if codec.allow_uncertified else "fail",
            f"{codec.calibration} carries no certificate of the quality of {codec.profile}",
            f"kvfetcher certify {codec.calibration}",
        )
    if certified.below_bar:
        return Check(
            "calibration",
            "warn",
            f"{codec.calibration}: {certified.below_bar}",
            'kvfetcher calibrate MODEL with more and longer texts, or codec.profile = "exact"',
        )
    return Check(
        "calibration",
        "ok",
        f"{codec.calibration}: {codec.profile} certified, {certified.ratio:.1f}x smaller at KL"
        f" {certified.kl:.1e}",
    )


def read_certificate(path: str, profile: str) -> Certified | None:
    """What a calibration artifact certifies of a profile; None = nothing that counts.

    Raises:
        ConfigError, FormatError: the file is missing or not an artifact.
    """
    from kvfetcher.codec.ladder.artifact import Calibration
    from kvfetcher.codec.ladder.bar import below_bar
    from kvfetcher.codec.ladder.library import certified

    calibration = Calibration.load(Path(path).expanduser())
    try:
        ratio, kl = certified(calibration, profile)
    except ConfigError:
        return None
    return Certified(kl, ratio, below_bar(calibration.certificate, profile))
