"""Which profile a server saves with where the configuration leaves it open (`auto`).

Decided once per server, before its processes start, so that all of them agree; a calibration made
meanwhile counts from the next start on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from kvfetcher.codec.profiles import AUTO
from kvfetcher.engines.identity import weights_digest
from kvfetcher.errors import KVFetcherError
from kvfetcher.transform.artifact import LADDER
from kvfetcher.transform.library import model_calibration_path, served_calibration

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kvfetcher.config import CodecConfig


class ChosenProfile(NamedTuple):
    """A configuration without `auto`, and why it is this one."""

    codec: CodecConfig
    reason: str


def choose_profile(codec: CodecConfig, model: Path) -> ChosenProfile:
    """The configuration with profile and calibration settled.

    `auto` becomes `balanced` where a certified calibration of the model is kept on this machine,
    else `exact`. A profile that needs a calibration and names none gets the one that is kept.

    Args:
        codec: as configured.
        model: folder of the model that is served.

    Raises:
        EngineError: the model's weights cannot be read.
        ConfigError, FormatError: the calibration that `codec` names, or needs, cannot be served.
    """
    is_open = codec.profile == AUTO
    if not is_open and (codec.profile not in LADDER or codec.calibration):
        return ChosenProfile(codec, "configured")
    wanted = "balanced" if is_open else codec.profile
    if codec.calibration:
        served_calibration(codec.calibration, allow_uncertified=codec.allow_uncertified)
        return ChosenProfile(replace(codec, profile=wanted), "codec.calibration is set")
    kept = model_calibration_path(weights_digest(model))
    if not kept.exists():
        if not is_open:
            return ChosenProfile(codec, "configured")
        return ChosenProfile(
            replace(codec, profile="exact"),
            "this model has no calibration here; `kvfetcher calibrate` makes one, and chunks"
            " several times smaller",
        )
    # The file itself, not the link to the newest: a later calibration changes no running server.
    path = str(kept.resolve())
    try:
        calibration = served_calibration(path, allow_uncertified=codec.allow_uncertified)
    except KVFetcherError as exc:
        if not is_open:
            raise
        return ChosenProfile(replace(codec, profile="exact"), str(exc))
    return ChosenProfile(
        replace(codec, profile=wanted, calibration=path),
        f"calibration {calibration.digest[:16]} of this model"
        f"{_quality(calibration.certificate, wanted)}",
    )


def _quality(certificate: Mapping[str, Any] | None, profile: str) -> str:
    """What a certificate says of a profile."""
    if certificate is None:
        return ", not certified"
    row = certificate["profiles"][profile]
    return f": {row['ratio']:.1f} times smaller at KL {row['kl']:.1e} nats"
