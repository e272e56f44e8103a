"""The codec's front: configuration -> profile, values -> chunk, unit -> planes -> values."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher.codec.base import Decoder, PlaneEncoder, Profile, RestoredUnit, Restorer, UnitSource
from kvfetcher.codec.exact import FLOAT_BITS, ExactProfile, restore_exact
from kvfetcher.codec.ladder.library import certified, served_calibration
from kvfetcher.codec.ladder.profile import TransformProfile, restore_transform
from kvfetcher.codec.paper import PAPER_FRAME_SIZES, PaperProfile, restore_paper
from kvfetcher.codec.raw import RawProfile, WithRawCopy, restore_raw
from kvfetcher.codec.uncalibrated import UncalibratedProfile, restore_uncalibrated
from kvfetcher.config import AUTO, PROFILES
from kvfetcher.errors import ConfigError, FormatError, LayoutError, UnsupportedVersionError
from kvfetcher.format.container import UnitData, build_chunk, check_unit, parse_header
from kvfetcher.format.sections import ProfileCode
from kvfetcher.format.unit import parse_unit
from kvfetcher.spec import LADDER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvfetcher.config import CodecConfig
    from kvfetcher.format.pictures import Integers
    from kvfetcher.format.unit import Unit
    from kvfetcher.spec import KVSpec

RESTORERS: dict[int, Restorer] = {
    ProfileCode.EXACT: restore_exact,
    ProfileCode.PAPER: restore_paper,
    ProfileCode.TRANSFORM: restore_transform,
    ProfileCode.UNCALIBRATED: restore_uncalibrated,
    ProfileCode.RAW: restore_raw,
}
PROFILE_NAMES: dict[int, str] = {
    ProfileCode.EXACT: "exact",
    ProfileCode.PAPER: "paper",
    ProfileCode.TRANSFORM: "transform",
    ProfileCode.UNCALIBRATED: "uncalibrated",
    ProfileCode.RAW: "raw",
}


def make_profile(config: CodecConfig) -> Profile:
    """The profile that `config` names, with its parameters.

    Raises:
        ConfigError: there is no such profile, or a parameter does not fit it.
    """
    if config.packed_copy and config.profile not in LADDER:
        raise ConfigError(
            f"codec.packed_copy needs codec.profile {', '.join(LADDER[:-1])} or {LADDER[-1]}, got"
            f" {config.profile!r}; turn one of them off"
        )
    if config.profile == "raw":
        return RawProfile(unit_layers=config.unit_layers)
    coded = _coded_profile(config)
    return WithRawCopy(coded) if config.raw_copy else coded


def _coded_profile(config: CodecConfig) -> Profile:
    if config.profile in ("exact", AUTO):
        return ExactProfile(unit_layers=config.unit_layers, frame_sizes=config.frame_sizes)
    if config.profile == "paper":
        return PaperProfile(
            frame_sizes=config.frame_sizes or PAPER_FRAME_SIZES,
            bits=config.paper_bits,
            unit_layers=config.unit_layers,
        )
    if config.profile == "uncalibrated":
        return UncalibratedProfile(unit_layers=config.unit_layers, frame_sizes=config.frame_sizes)
    if config.profile in LADDER:
        return TransformProfile(
            config.profile,
            served_calibration(
                config.calibration, config.profile, allow_uncertified=config.allow_uncertified
            ),
            frame_sizes=config.frame_sizes,
            packed_copy=config.packed_copy,
        )
    raise ConfigError(f"codec.profile must be one of {(AUTO, *PROFILES)}, got {config.profile!r}")


def profile_id(config: CodecConfig, spec: KVSpec, *, weights: str = "") -> str:
    """Canonical text of profile and parameters; part of a chunk's identity.

    Two profiles of the same text restore the same values from the same input, but for the
    rounding that docs/format.md leaves to the reader where the profile computes.

    Args:
        config: names the profile.
        spec: geometry of the model that is served.
        weights: hex SHA-256 of its weights; "" = not known, not compared.

    Raises:
        ConfigError: as `make_profile`, or its calibration was made for another model, or certified
            for another KV dtype.
    """
    profile = make_profile(config)
    coded = profile.coded if isinstance(profile, WithRawCopy) else profile
    if isinstance(coded, TransformProfile):
        calibration = coded.calibration
        ours = replace(calibration.spec, dtype=spec.dtype)
        if ours != spec or (weights and weights != calibration.model):
            raise ConfigError(
                f"calibration {config.calibration} was made for another model than the one that"
                " is served; run `kvfetcher calibrate` for this one"
            )
        if not config.allow_uncertified:
            certified(calibration, coded.name, dtype=spec.dtype)
    return profile.identity


def encode_chunk(
    values: Integers,
    *,
    spec: KVSpec,
    profile: Profile,
    identity: bytes,
    chunk_key: bytes,
    token_ids: Sequence[int],
    first_position: int,
    num_threads: int,
    parent_key: bytes = bytes(32),
    encoder: PlaneEncoder | None = None,
) -> bytes:
    """Encode one chunk object, ready for the store.

    Args:
        values: [L, K, H, T, D] bit patterns of `spec.dtype`.
        spec: geometry; must match `values`.
        profile: from `make_profile`.
        identity: 32 bytes, `ModelIdentity.digest`; as the keys, stored in the header.
        chunk_key: key of this chunk.
        token_ids: the chunk's T tokens.
        first_position: position of the first token in its sequence.
        num_threads: units encoded at one time.
        parent_key: key of the chunk before; zeros for the first.
        encoder: encoder of the pictures; None = libx265.

    Raises:
        LayoutError: shape or dtype of `values` differ from `spec` and `token_ids`.
        CodecError: the encoder failed, or the profile cannot hold these values.
        FormatError: the chunk would break a limit of the format.

    Example:
        >>> from kvfetcher.codec.video import VideoDecoder
        >>> from kvfetcher.config import CodecConfig
        >>> from kvfetcher.format.container import parse_header
        >>> from kvfetcher.spec import KVSpec
        >>> spec = KVSpec(num_layers=2, num_kv_heads=1, head_dim=64)
        >>> values = np.full((2, 2, 1, 32, 64), 0x3F80, np.uint16)  # 32 tokens of ones in bfloat16
        >>> chunk = encode_chunk(
        ...     values,
        ...     spec=spec,
        ...     profile=make_profile(CodecConfig(profile="exact")),
        ...     identity=bytes(32),
        ...     chunk_key=bytes(32),
        ...     token_ids=range(32),
        ...     first_position=0,
        ...     num_threads=1,
        ... )
        >>> entry = parse_header(chunk).units[0]
        >>> unit = chunk[entry.offset : entry.stop]
        >>> restored = restore_unit(unit, decode_unit(unit, VideoDecoder()))
        >>> np.array_equal(restored.values, values[: entry.num_layers])
        True
    """
    expected = (
        spec.num_layers,
        spec.kv_factor,
        spec.num_kv_heads,
        len(token_ids),
        spec.head_dim,
    )
    dtype = FLOAT_BITS[spec.dtype].item_dtype
    if values.shape != expected or values.dtype != dtype or not token_ids:
        raise LayoutError(
            f"KV values must be [L, K, H, T, D] = {expected} {dtype} for {spec.dtype}, got"
            f" {values.shape} {values.dtype}"
        )
    jobs = [
        (variant, start, layers)
        for variant in profile.variants()
        for start, layers in profile.layer_groups(spec, len(token_ids), variant)
    ]

    def encode(job: tuple[str, int, int]) -> UnitData:
        variant, start, layers = job
        part = np.ascontiguousarray(values[start : start + layers])
        source = UnitSource(part, spec, start, first_position, encoder)
        return UnitData(start, layers, variant, _encode_unit(profile, source, variant))

    if num_threads == 1:
        units = [encode(job) for job in jobs]
    else:
        with ThreadPoolExecutor(num_threads, thread_name_prefix="kvfetcher-encode") as pool:
            units = list(pool.map(encode, jobs))
    return build_chunk(
        units,
        spec=spec,
        profile=profile.identity,
        identity=identity,
        chunk_key=chunk_key,
        parent_key=parent_key,
        first_position=first_position,
        token_ids=token_ids,
    )


def _encode_unit(profile: Profile, source: UnitSource, variant: str) -> bytes:
    """One unit; a bit-exact one without redundancy in its values is stored raw, which is smaller.

    Uniform bit patterns would take 1.16 times their own size at `exact`.
    """
    data = profile.encode(source, variant)
    if not profile.identity.startswith("exact/") or len(data) <= source.values.nbytes:
        return data
    return min(data, RawProfile().encode(source, variant), key=len)


def encode_unnamed(
    values: Integers,
    *,
    spec: KVSpec,
    profile: Profile,
    first_position: int,
    num_threads: int,
    encoder: PlaneEncoder | None = None,
) -> bytes:
    """`encode_chunk` of values whose model and tokens nobody names: to be measured, not stored.

    Raises:
        LayoutError, CodecError, FormatError: as `encode_chunk`.
    """
    return encode_chunk(
        values,
        spec=spec,
        profile=profile,
        identity=bytes(32),
        chunk_key=bytes(32),
        token_ids=[0] * values.shape[3],
        first_position=first_position,
        num_threads=num_threads,
        encoder=encoder,
    )


def decode_unit(data: bytes | memoryview, decoder: Decoder) -> Integers:
    """Decode the video of one unit.

    Returns:
        Planes [F, P, Y, X] of `parse_unit(data).geometry`; empty where there is no video.

    Raises:
        FormatError: `data` is not a unit.
        CodecError: the video does not decode to the pictures that the unit promises.
    """
    return decode_parsed(parse_unit(data), decoder)


def decode_parsed(unit: Unit, decoder: Decoder) -> Integers:
    """`decode_unit` of a unit that was parsed.

    Raises:
        CodecError: as `decode_unit`.
    """
    if not unit.geometry.num_frames:
        return _no_planes(unit)
    return decoder.decode(unit.packets(), unit.geometry)


def _no_planes(unit: Unit) -> Integers:
    return np.empty(unit.geometry.shape, np.uint8)


def restore_unit(data: bytes | memoryview, planes: NDArray[Any]) -> RestoredUnit:
    """Turn decoded planes back into KV values, and check them.

    Args:
        data: the unit's bytes.
        planes: [F, P, Y, X] as from `decode_unit`; at more than 8 bits also as bytes,
            uint8 [F, P, Y, 2 X] little-endian. Not looked at where the unit has no video.

    Raises:
        FormatError: `data` is not a unit, or its profile is unknown.
        ChecksumError: the restored integers differ from the unit's digest.
        LayoutError: `planes` is not what the unit's geometry says.
    """
    # The digest says whether the planes are right; whoever decoded them checked the video.
    unit = parse_unit(data, checks_video=False)
    return RestoredUnit(unit.layer_start, restore_parsed(unit, planes))


def restore_parsed(unit: Unit, planes: NDArray[Any]) -> Integers:
    """`restore_unit` of a unit that was parsed: values [Lg, K, H, T, D].

    Raises:
        FormatError, ChecksumError, LayoutError: as `restore_unit`.
    """
    geometry = unit.geometry
    planes = np.ascontiguousarray(planes) if geometry.num_frames else _no_planes(unit)
    if planes.dtype == np.uint8 and geometry.dtype != np.uint8 and planes.shape[-1] % 2 == 0:
        planes = planes.view(geometry.dtype)
    if planes.shape != geometry.shape or planes.dtype != geometry.dtype:
        raise LayoutError(
            f"planes must be {geometry.shape} {geometry.dtype}, got {planes.shape} {planes.dtype}"
        )
    restorer = RESTORERS.get(unit.profile)
    if restorer is None:
        raise UnsupportedVersionError(
            f"unit is of profile {unit.profile}, this build restores {sorted(RESTORERS)}; upgrade"
        )
    return restorer(unit, planes)


def describe_chunk(data: bytes | memoryview) -> dict[str, Any]:
    """What a chunk object holds, as JSON-ready data; checks every unit's bytes.

    Raises:
        FormatError: `data` is not a whole, sound chunk.
    """
    header = parse_header(data)
    if len(data) != header.object_bytes:
        raise FormatError(f"chunk says {header.object_bytes} bytes, got {len(data)}")
    view = memoryview(data)
    elements = header.spec.elements_per_token * header.num_tokens
    units: list[dict[str, Any]] = []
    totals: dict[str, int] = {}
    for entry in header.units:
        unit_bytes = view[entry.offset : entry.stop]
        check_unit(header, entry, unit_bytes)
        unit = parse_unit(unit_bytes)
        geometry = unit.geometry
        totals[entry.variant] = totals.get(entry.variant, 0) + entry.length
        units.append(
            {
                "layers": [unit.layer_start, unit.layer_start + unit.num_layers],
                "variant": entry.variant,
                "profile": PROFILE_NAMES.get(unit.profile, str(unit.profile)),
                "bytes": entry.length,
                "bits_per_element": 8 * entry.length / unit.num_elements,
                "pictures": geometry.num_frames,
                "picture": f"{geometry.width}x{geometry.height}" if geometry.num_frames else "",
                "bit_depth": geometry.bit_depth if geometry.num_frames else 0,
                "chroma": geometry.chroma if geometry.num_frames else "",
                "sections": {
                    str(s.kind): {"stored_bytes": len(s.stored), "raw_bytes": s.raw_bytes}
                    for s in unit.sections
                },
            }
        )
    return {
        "format_version": header.version,
        "profile": header.profile,
        "spec": header.spec.to_dict(),
        "chunk_key": header.chunk_key.hex(),
        "parent_key": header.parent_key.hex(),
        "first_position": header.first_position,
        "num_tokens": header.num_tokens,
        "header_bytes": header.header_bytes,
        "object_bytes": header.object_bytes,
        "bits_per_element": {
            name: 8 * (header.header_bytes + size) / elements for name, size in totals.items()
        },
        "units": units,
    }
