"""Where calibrations are found: registered by hand, or kept in the cache folder under their digest.

A unit names its calibration by digest; a server names the model and takes the artifact made for it.
"""

from __future__ import annotations

import threading
from pathlib import Path

from kvfetcher.config import cache_home
from kvfetcher.errors import ConfigError
from kvfetcher.transform.artifact import Calibration

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


def served_calibration(path: str, *, allow_uncertified: bool) -> Calibration:
    """The calibration that a server codes with; read once per process and file state.

    Args:
        path: its file (`codec.calibration`).
        allow_uncertified: take one whose quality was not measured.

    Raises:
        ConfigError: no file is named or it is missing, or it has no certificate.
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
    if calibration.certificate is None and not allow_uncertified:
        raise ConfigError(
            f"calibration {path} carries no certificate of its quality; run `kvfetcher certify`, or"
            " set codec.allow_uncertified"
        )
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
