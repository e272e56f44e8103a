"""Which profile a server saves with where the configuration leaves it open (`auto`).

Decided once per server, before its processes start, so that all of them agree; a calibration made
meanwhile counts from the next start on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from kvfetcher.codec.ladder.bar import below_bar
from kvfetcher.codec.ladder.library import certified, model_calibration_path, served_calibration
from kvfetcher.config import AUTO
from kvfetcher.errors import ConfigError, KVFetcherError
from kvfetcher.models.identity import weights_digest
from kvfetcher.spec import LADDER

if TYPE_CHECKING:
    from pathlib import Path

    from kvfetcher.codec.ladder.artifact import Calibration
    from kvfetcher.config import CodecConfig
    from kvfetcher.spec import KVDtype


class ChosenProfile(NamedTuple):
    """A configuration without `auto`, and why it is this one."""

    codec: CodecConfig
    reason: str


def choose_profile(
    codec: CodecConfig, model: Path, *, dtype: KVDtype | None = None
) -> ChosenProfile:
    """The configuration with profile and calibration settled.

    `auto` becomes `balanced` where a calibration of the model is named or kept on this machine whose
    certificate reaches the quality bar (`codec.ladder.bar`), else `exact`. A profile that needs a calibration and names none gets the one that is kept.

    Args:
        codec: as configured.
        model: folder of the model that is served.
        dtype: KV dtype that its engine keeps, and certificates must be of; None = not compared.

    Raises:
        EngineError: the model's weights cannot be read.
        ConfigError, FormatError: the calibration that `codec` names, or needs, cannot be served, is
            of another model, or is not there.
    """
    is_open = codec.profile == AUTO
    if codec.profile == "uncalibrated":
        return ChosenProfile(
            codec,
            "configured; its quality is not certified: `kvfetcher calibrate` makes the model ready"
            " for `balanced`, which is smaller and has a certificate",
        )
    if not is_open and codec.profile not in LADDER:
        return ChosenProfile(codec, "configured")
    wanted = "balanced" if is_open else codec.profile

    def served(path: str) -> Calibration:
        return served_calibration(
            path, wanted, allow_uncertified=codec.allow_uncertified, dtype=dtype
        )

    if codec.calibration:
        calibration = served(codec.calibration)
        if calibration.model != weights_digest(model):
            raise ConfigError(
                f"codec.calibration = {codec.calibration!r} was made for another model than the one"
                f" in {model}; run `kvfetcher calibrate` for this one"
            )
        if is_open and (why := _too_low(codec, calibration, wanted)):
            return ChosenProfile(replace(codec, profile="exact", calibration=""), why)
        return ChosenProfile(
            replace(codec, profile=wanted),
            f"codec.calibration is set{_quality(calibration, wanted, dtype)}",
        )
    kept = model_calibration_path(weights_digest(model))
    if not kept.exists():
        if not is_open:
            served("")  # raises
        return ChosenProfile(
            replace(codec, profile="exact"),
            "this model has no calibration here; `kvfetcher calibrate` makes one, and chunks"
            " several times smaller",
        )
    # The file itself, not the link to the newest: a later calibration changes no running server.
    path = str(kept.resolve())
    try:
        calibration = served(path)
    except KVFetcherError as exc:
        if not is_open:
            raise
        return ChosenProfile(replace(codec, profile="exact"), str(exc))
    if is_open and (why := _too_low(codec, calibration, wanted)):
        return ChosenProfile(replace(codec, profile="exact"), why)
    return ChosenProfile(
        replace(codec, profile=wanted, calibration=path),
        f"calibration {calibration.digest[:16]} of this model"
        f"{_quality(calibration, wanted, dtype)}",
    )


def _too_low(codec: CodecConfig, calibration: Calibration, profile: str) -> str:
    """Why `auto` does not take a profile though it has a certificate; "" = it takes it."""
    if codec.allow_uncertified:
        return ""
    why = below_bar(calibration.certificate, profile)
    return why and (
        f"calibration {calibration.digest[:16]}: {why}; calibrate with more and longer texts, or set"
        f' codec.profile = "{profile}" to take it as it is'
    )


def _quality(calibration: Calibration, profile: str, dtype: KVDtype | None) -> str:
    """What the certificate of a calibration says of a profile."""
    try:
        ratio, kl = certified(calibration, profile, dtype=dtype)
    except ConfigError:
        return ", not certified"
    why = below_bar(calibration.certificate, profile)
    return f": {ratio:.1f} times smaller at KL {kl:.1e} nats{why and f'; {why}'}"
