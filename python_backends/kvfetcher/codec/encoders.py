"""What encodes chunks on a machine's CPU: the own HEVC encoder, libx265, or NVENC beside it."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvfetcher.codec.gpu import nvenc
from kvfetcher.codec.video import encode_planes
from kvfetcher.errors import EncoderUnavailableError

if TYPE_CHECKING:
    from kvfetcher.codec.base import PlaneEncoder

EncoderChoice = Literal["auto", "own", "x265", "nvenc"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChosenEncoder:
    """What encodes on this machine."""

    encode: PlaneEncoder
    name: str
    """"own", "x265" or "nvenc"."""
    reason: str
    """Why it is not the own encoder, where `auto` should have chosen that; else empty."""


def choose_encoder(choice: EncoderChoice) -> ChosenEncoder:
    """The encoder of a `codec.encoder`, ready: the own one is compiled here, which takes 20 s once.

    Args:
        choice: "own" and "nvenc" must be usable; "auto" = the own one where numba is installed, else
            libx265.

    Raises:
        EncoderUnavailableError: what is asked for is not usable.
    """
    if choice == "x265":
        return ChosenEncoder(encode_planes, "x265", "")
    if choice == "nvenc":
        return ChosenEncoder(nvenc.proven_encoder(), "nvenc", "")
    try:
        return ChosenEncoder(_own_encoder(), "own", "")
    except EncoderUnavailableError as exc:
        if choice == "own":
            raise
        _log.warning("chunks are encoded by libx265, which is several times slower: %s", exc)
        return ChosenEncoder(encode_planes, "x265", str(exc))


def _own_encoder() -> PlaneEncoder:
    if importlib.util.find_spec("numba") is None:
        raise EncoderUnavailableError(
            "the own HEVC encoder needs numba; install it with `pip install 'kvfetcher[codec]'`"
        )
    from kvfetcher.codec.hevc import encoder

    encoder.warm_up()
    return encoder.encode_planes
