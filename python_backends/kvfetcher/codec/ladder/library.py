"""Where calibrations are found: registered by hand, or kept in the cache folder under their digest.

A unit names its calibration by digest; a server names the model and takes the artifact made for it.
"""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from kvfetcher.codec.ladder.artifact import Calibration
from kvfetcher.config import cache_home
from kvfetcher.errors import ConfigError

if TYPE_CHECKING:
    from kvfetcher.spec import KVDtype

_known: dict[str, Calibration] = {}
_served: dict[tuple[str, int], Calibration] = {}
_lock = threading.Lock()


def calibration_folder() -> Path:
    """Where `kvfetcher calibrate` keeps artifacts: ``<cache>/kvfetcher/calibrations``."""
    return cache_home() / "calibrations"


def register_calibration(calibration: Calibration) -> str:
    """Make a calibration known to this process; returns its digest."""
    digest = calibration.digest
    with _lock:
        _known[digest] = calibration
    return digest


def find_calibration(digest: str) -> Calibration:
    """The calibration of a digest: registered ones, then ``<digest>.safetensors`` in the folder.

    Raises:
        ConfigError: it is not on this machine.
        FormatError: its file is damaged.
    """
    with _lock:
        found = _known.get(digest)
    if found is not None:
        return found
    path = calibration_folder() / f"{digest}.safetensors"
    if not path.is_file():
        raise ConfigError(
            f"calibration {digest[:16]} is not on this machine; copy {path.name} from the server"
            f" that saved the chunk to {path.parent}"
        )
    calibration = Calibration.load(path)
    if register_calibration(calibration) != digest:
        raise ConfigError(f"calibration {path} has another digest than its name; delete it")
    return calibration


class Certified(NamedTuple):
    """What a certificate says of one profile."""

    ratio: float
    """Times smaller than the KV dtype."""
    kl: float
    """Nats per token."""


def certified(calibration: Calibration, profile: str, *, dtype: KVDtype | None = None) -> Certified:
    """What a calibration is certified for.

    Args:
        calibration: with its certificate.
        profile: profile of the ladder.
        dtype: KV dtype that it is to serve; None = not known, not compared.

    Raises:
        ConfigError: it has no certificate, or one of another calibration or KV dtype, or one
            without this profile.
    """
    certificate, wrong = calibration.certificate, ""
    if certificate is None:
        wrong = "carries no certificate of its quality"
    elif certificate.get("calibration") != calibration.digest:
        wrong = "carries a certificate of another calibration"
    elif certificate.get("dtype") != calibration.spec.dtype:
        wrong = f"is for {calibration.spec.dtype} and its certificate for another KV dtype"
    elif dtype not in (None, calibration.spec.dtype):
        # Certifying measures with the calibration's own dtype: only a new one serves another.
        raise ConfigError(
            f"calibration {calibration.digest[:16]} is certified for {calibration.spec.dtype} and"
            f" the KV dtype that is served is {dtype}; run `kvfetcher calibrate --kv-dtype {dtype}`,"
            " or set codec.allow_uncertified"
        )
    else:
        profiles = certificate.get("profiles")
        row = profiles.get(profile) if isinstance(profiles, dict) else None
        ratio, kl = (row.get("ratio"), row.get("kl")) if isinstance(row, dict) else (None, None)
        if _is_number(ratio) and _is_number(kl):
            return Certified(ratio, kl)
        wrong = f"carries a certificate without ratio and KL of {profile}"
    raise ConfigError(
        f"calibration {calibration.digest[:16]} {wrong}; run `kvfetcher certify`, or set"
        " codec.allow_uncertified"
    )


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) is float and math.isfinite(value)


def served_calibration(
    path: str, profile: str, *, allow_uncertified: bool, dtype: KVDtype | None = None
) -> Calibration:
    """The calibration that a server codes with; read once per process and file state.

    Args:
        path: its file (`codec.calibration`).
        profile: what it is to code.
        allow_uncertified: take one whose quality was not measured, see `certified`.
        dtype: KV dtype that is served; None = not known, not compared.

    Raises:
        ConfigError: no file is named or it is missing, or it is not certified for this.
        FormatError: it is damaged.
    """
    if not path:
        raise ConfigError(
            "codec.profile needs a calibration of the model and there is none; run `kvfetcher"
            " calibrate` (or name one in codec.calibration), or take the profile `exact` or"
            " `uncalibrated`"
        )
    file = Path(path).expanduser()
    try:
        state = (str(file.resolve()), file.stat().st_mtime_ns)
    except OSError as exc:
        raise ConfigError(
            f"codec.calibration = {path!r} cannot be read: {exc.strerror}; make it with `kvfetcher"
            " calibrate`"
        ) from exc
    with _lock:
        calibration = _served.get(state)
    if calibration is None:
        calibration = Calibration.load(file)
        with _lock:
            _served[state] = calibration
    if not allow_uncertified:
        certified(calibration, profile, dtype=dtype)
    register_calibration(calibration)
    return calibration


def model_calibration_path(model: str) -> Path:
    """Where the artifact of a model (hex SHA-256 of its weights) is kept."""
    return calibration_folder() / f"model-{model}.safetensors"


def store_calibration(calibration: Calibration) -> Path:
    """Keep an artifact in the folder, under its digest and as its model's current one.

    Older artifacts stay: chunks in a store may name them.
    """
    digest = register_calibration(calibration)
    path = calibration_folder() / f"{digest}.safetensors"
    calibration.save(path)
    current = model_calibration_path(calibration.model)
    link = current.with_name(f"{current.name}.partial")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(current)
    return path
