"""Where calibrations are found: registered by hand, or kept in the cache folder under their digest.

A unit names its calibration by digest; a server names the model and takes the artifact made for it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvfetcher.config import cache_home
from kvfetcher.errors import ConfigError
from kvfetcher.transform.artifact import Calibration

if TYPE_CHECKING:
    from pathlib import Path

_known: dict[str, Calibration] = {}
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
