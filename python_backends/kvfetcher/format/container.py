"""The chunk object: header, token ids, unit table, units; bytes <-> dataclasses (docs/format.md).

Standard library only. All numbers are little-endian. A reader checks every length against the
constants below before it allocates, and rejects what it does not understand.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from kvfetcher.errors import ChecksumError, ConfigError, FormatError, UnsupportedVersionError
from kvfetcher.spec import FORMAT_VERSION, KVDtype, KVSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK_MAGIC = b"KVFCHUNK"

MAX_CHUNK_BYTES = 1 << 30
MAX_HEADER_BYTES = 4 << 20
MAX_CHUNK_TOKENS = 1 << 16
MAX_UNITS = 4096
MAX_VARIANTS = 64
MAX_PROFILE_BYTES = 1024
MAX_POSITION = 1 << 40

PREFIX_BYTES = 24
"""Number of bytes of an object that tell how long its header is (`header_size`)."""

HEADER_READ_BYTES = 8 << 10
"""A good first range: the header of a 256-token chunk with up to about 80 units. Longer headers
take a second read; 64 KiB would add 1.6 % to the bytes of an `exact` hit of SmolLM2."""

DTYPE_CODES: dict[KVDtype, int] = {"bfloat16": 1, "float16": 2, "float8_e4m3fn": 3}
DTYPE_NAMES: dict[int, KVDtype] = {code: name for name, code in DTYPE_CODES.items()}

# magic, version, flags, header_bytes, object_bytes
_PREFIX = struct.Struct("<8sHHIQ")
# identity, chunk key, parent key, first_position, num_tokens, num_layers, num_kv_heads, head_dim,
# kv_factor, dtype, profile_bytes, num_variants, reserved, num_units, reserved
_FIXED = struct.Struct("<32s32s32sQIIIIBBHHHII")
_VARIANT = struct.Struct("<24s")
# layer_start, num_layers, variant, reserved, reserved, offset, length, SHA-256
_UNIT = struct.Struct("<IIHHIQQ32s")
_DIGEST_BYTES = 32

UNIT_MAGIC = b"KVFUNIT\0"
# Within a unit (`codec.unit`): dtype, kv_factor, num_layers_of_model, num_kv_heads, head_dim,
# layer_start, num_layers, num_tokens, first_position.
_UNIT_FACTS = struct.Struct("<BBIIIIIIQ")
_UNIT_FACTS_AT = 26

_ZERO_KEY = bytes(32)


@dataclass(frozen=True, slots=True)
class UnitEntry:
    """One unit as the chunk's table has it: which layers, where, and its digest."""

    layer_start: int
    num_layers: int
    variant: str
    """Name of the variant; the frame size as ``WIDTHxHEIGHT``, or ``-`` where there is only one."""
    offset: int
    """First byte, from the start of the chunk object."""
    length: int
    """Bytes; the unit is ``object[offset : offset + length]``."""
    digest: bytes
    """SHA-256 of the unit's bytes."""

    @property
    def stop(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """What a chunk object says about itself before its units."""

    profile: str
    """Canonical text of the codec profile and its parameters (`profiles.profile_id`)."""
    spec: KVSpec
    identity: bytes
    """32 bytes, `ModelIdentity.digest`."""
    chunk_key: bytes
    parent_key: bytes
    """Key of the chunk before this one; the root of its chain for the first."""
    first_position: int
    token_ids: tuple[int, ...]
    units: tuple[UnitEntry, ...]
    """Variant after variant; within one, in layer order without gaps."""
    header_bytes: int
    object_bytes: int
    version: int = FORMAT_VERSION

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def variants(self) -> tuple[str, ...]:
        """Variant names in the order in which they lie in the object."""
        return tuple(dict.fromkeys(unit.variant for unit in self.units))

    def units_of(self, variant: str) -> tuple[UnitEntry, ...]:
        """The units of one variant, in layer order; empty where there is no such variant."""
        return tuple(unit for unit in self.units if unit.variant == variant)


@dataclass(frozen=True, slots=True)
class UnitData:
    """One unit before it lies in a chunk."""

    layer_start: int
    num_layers: int
    variant: str
    data: bytes


def build_chunk(
    units: Sequence[UnitData],
    *,
    spec: KVSpec,
    profile: str,
    identity: bytes,
    chunk_key: bytes,
    first_position: int,
    token_ids: Sequence[int],
    parent_key: bytes = _ZERO_KEY,
) -> bytes:
    """Serialise a chunk object. Exact inverse: `parse_header` and the ranges that it names.

    Args:
        units: variant after variant; every variant covers all layers of `spec` in order.
        spec: geometry of the chunk's values.
        profile: ASCII text, 1 to MAX_PROFILE_BYTES bytes.
        identity: 32 bytes; as `chunk_key` and `parent_key`.
        chunk_key: key of this chunk.
        first_position: position of the first token in its sequence.
        token_ids: the chunk's tokens, each 0 to 2^31 - 1.
        parent_key: key of the chunk before it; zeros for none.

    Raises:
        FormatError: a value breaks the format (also what a reader would refuse).
    """
    names = tuple(dict.fromkeys(unit.variant for unit in units))
    try:
        profile_bytes = profile.encode("ascii")
        variants = b"".join(_VARIANT.pack(_variant_bytes(name)) for name in names)
        tokens = struct.pack(f"<{len(token_ids)}I", *token_ids)
    except (UnicodeEncodeError, struct.error) as exc:
        raise FormatError(f"chunk cannot be written: {exc}") from exc
    _check_limits(len(profile_bytes), len(names), len(units), len(token_ids), first_position)
    for name, key in (("identity", identity), ("chunk", chunk_key), ("parent", parent_key)):
        if len(key) != 32:
            raise FormatError(f"{name} key must be 32 bytes, got {len(key)}")
    header_bytes = (
        _PREFIX.size
        + _FIXED.size
        + len(profile_bytes)
        + len(variants)
        + len(tokens)
        + _UNIT.size * len(units)
        + _DIGEST_BYTES
    )
    table = []
    offset = header_bytes
    for unit in units:
        digest = hashlib.sha256(unit.data).digest()
        table.append(
            _UNIT.pack(
                unit.layer_start,
                unit.num_layers,
                names.index(unit.variant),
                0,
                0,
                offset,
                len(unit.data),
                digest,
            )
        )
        offset += len(unit.data)
    if header_bytes > MAX_HEADER_BYTES or offset > MAX_CHUNK_BYTES:
        raise FormatError(
            f"chunk of {offset} bytes (header {header_bytes}) is over the limit of"
            f" {MAX_CHUNK_BYTES} ({MAX_HEADER_BYTES}); save fewer tokens per chunk"
        )
    header = b"".join(
        (
            _PREFIX.pack(CHUNK_MAGIC, FORMAT_VERSION, 0, header_bytes, offset),
            _FIXED.pack(
                identity,
                chunk_key,
                parent_key,
                first_position,
                len(token_ids),
                spec.num_layers,
                spec.num_kv_heads,
                spec.head_dim,
                spec.kv_factor,
                DTYPE_CODES[spec.dtype],
                len(profile_bytes),
                len(names),
                0,
                len(units),
                0,
            ),
            profile_bytes,
            variants,
            tokens,
            *table,
        )
    )
    header += hashlib.sha256(header).digest()
    parse_header(header)  # what we write, we read: same rules, one place
    return b"".join((header, *(unit.data for unit in units)))


def header_size(prefix: bytes | memoryview) -> int:
    """Bytes of a chunk's header, learnt from its first PREFIX_BYTES bytes.

    Raises:
        FormatError: fewer bytes than that, or not a chunk of this format.
    """
    if len(prefix) < PREFIX_BYTES:
        raise FormatError(f"chunk prefix must be {PREFIX_BYTES} bytes, got {len(prefix)}")
    magic, version, flags, header_bytes, object_bytes = _PREFIX.unpack_from(prefix)
    if magic != CHUNK_MAGIC:
        raise FormatError(f"not a KVFetcher chunk: it starts with {magic!r}, not {CHUNK_MAGIC!r}")
    if version != FORMAT_VERSION:
        raise UnsupportedVersionError(
            f"chunk is of format version {version}, this build reads {FORMAT_VERSION};"
            " save it again or use a matching kvfetcher"
        )
    if flags:
        raise UnsupportedVersionError(f"chunk has unknown flags {flags:#06x}; upgrade kvfetcher")
    lowest = _PREFIX.size + _FIXED.size + _DIGEST_BYTES
    if not lowest <= header_bytes <= min(MAX_HEADER_BYTES, object_bytes):
        raise FormatError(
            f"chunk header of {header_bytes} bytes is outside {lowest} to"
            f" min({MAX_HEADER_BYTES}, object bytes {object_bytes})"
        )
    if object_bytes > MAX_CHUNK_BYTES:
        raise FormatError(f"chunk of {object_bytes} bytes is over the limit of {MAX_CHUNK_BYTES}")
    return int(header_bytes)


def parse_header(prefix: bytes | memoryview) -> ChunkHeader:
    """Read and check a chunk's header.

    Args:
        prefix: the object, or its first bytes; at least `header_size(prefix)` of them.

    Raises:
        ChecksumError: the header's digest differs.
        UnsupportedVersionError: written by another format version.
        FormatError: too few bytes, or any rule of docs/format.md is broken.
    """
    size = header_size(prefix)
    if len(prefix) < size:
        raise FormatError(
            f"chunk header needs {size} bytes, got {len(prefix)}; read the range [0, {size})"
        )
    view = memoryview(prefix)[:size]
    if hashlib.sha256(view[:-_DIGEST_BYTES]).digest() != view[-_DIGEST_BYTES:]:
        raise ChecksumError("chunk header differs from its SHA-256; fetch or save it again")
    object_bytes = _PREFIX.unpack_from(view)[4]
    (
        identity,
        chunk_key,
        parent_key,
        first_position,
        num_tokens,
        num_layers,
        num_kv_heads,
        head_dim,
        kv_factor,
        dtype,
        profile_bytes,
        num_variants,
        reserved_a,
        num_units,
        reserved_b,
    ) = _FIXED.unpack_from(view, _PREFIX.size)
    _check_limits(profile_bytes, num_variants, num_units, num_tokens, first_position)
    if reserved_a or reserved_b:
        raise UnsupportedVersionError("chunk header has reserved fields set; upgrade kvfetcher")
    at = _PREFIX.size + _FIXED.size
    expected = (
        at
        + profile_bytes
        + _VARIANT.size * num_variants
        + 4 * num_tokens
        + _UNIT.size * num_units
        + _DIGEST_BYTES
    )
    if expected != size:
        raise FormatError(f"chunk header is {size} bytes, its counts need {expected}")
    profile = _ascii(view[at : at + profile_bytes], "profile")
    at += profile_bytes
    names = []
    for _ in range(num_variants):
        names.append(_ascii(view[at : at + _VARIANT.size].tobytes().rstrip(b"\0"), "variant"))
        at += _VARIANT.size
    token_ids = struct.unpack_from(f"<{num_tokens}I", view, at)
    if max(token_ids) >= 1 << 31:
        raise FormatError(
            f"chunk holds token id {max(token_ids)}, at most {(1 << 31) - 1} is valid"
        )
    at += 4 * num_tokens
    spec = parse_spec(num_layers, num_kv_heads, head_dim, kv_factor, dtype)
    units = []
    for index in range(num_units):
        layer_start, layers, variant, zero_a, zero_b, offset, length, digest = _UNIT.unpack_from(
            view, at + _UNIT.size * index
        )
        if variant >= num_variants or zero_a or zero_b:
            raise FormatError(f"unit {index} of the chunk has an unknown variant or reserved field")
        units.append(UnitEntry(layer_start, layers, names[variant], offset, length, digest))
    _check_table(units, tuple(names), num_layers, size, object_bytes)
    return ChunkHeader(
        profile=profile,
        spec=spec,
        identity=identity,
        chunk_key=chunk_key,
        parent_key=parent_key,
        first_position=first_position,
        token_ids=token_ids,
        units=tuple(units),
        header_bytes=size,
        object_bytes=object_bytes,
    )


def check_unit(header: ChunkHeader, entry: UnitEntry, data: bytes | memoryview) -> None:
    """Check a unit's bytes against the chunk's table, and whose values they say they are.

    Raises:
        FormatError: `data` is not as long as the table says, or is a unit of other layers, tokens,
            geometry or position than the chunk's.
        ChecksumError: its SHA-256 differs.
    """
    name = (
        f"chunk {header.chunk_key.hex()[:12]}, unit of layers {entry.layer_start} to"
        f" {entry.layer_start + entry.num_layers - 1}, variant {entry.variant}"
    )
    if len(data) != entry.length:
        raise FormatError(f"{name}: expected {entry.length} bytes, got {len(data)}")
    if hashlib.sha256(data).digest() != entry.digest:
        raise ChecksumError(f"{name}: bytes differ from their SHA-256; the store's copy is damaged")
    # What is no unit at all is for its parser to refuse.
    if data[: len(UNIT_MAGIC)] == UNIT_MAGIC and len(data) >= _UNIT_FACTS_AT + _UNIT_FACTS.size:
        spec = header.spec
        expected = (
            DTYPE_CODES[spec.dtype],
            spec.kv_factor,
            spec.num_layers,
            spec.num_kv_heads,
            spec.head_dim,
            entry.layer_start,
            entry.num_layers,
            header.num_tokens,
            header.first_position,
        )
        found = _UNIT_FACTS.unpack_from(data, _UNIT_FACTS_AT)
        if found != expected:
            raise FormatError(
                f"{name}: it says (dtype, kv_factor, layers of the model, heads, dim, first layer,"
                f" layers, tokens, position) {found}, the chunk {expected}; save it again"
            )


def parse_spec(
    num_layers: int, num_kv_heads: int, head_dim: int, kv_factor: int, dtype: int
) -> KVSpec:
    """A KVSpec from numbers read out of bytes.

    Raises:
        FormatError: the dtype code is unknown or a number is out of range.
    """
    if dtype not in DTYPE_NAMES:
        raise FormatError(f"dtype code {dtype} is unknown; there are {sorted(DTYPE_NAMES)}")
    try:
        return KVSpec(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            kv_factor=kv_factor,
            dtype=DTYPE_NAMES[dtype],
        )
    except ConfigError as exc:
        raise FormatError(f"geometry is not valid: {exc}") from exc


def _check_limits(
    profile_bytes: int, num_variants: int, num_units: int, num_tokens: int, first_position: int
) -> None:
    for name, value, limit in (
        ("profile text bytes", profile_bytes, MAX_PROFILE_BYTES),
        ("variants", num_variants, MAX_VARIANTS),
        ("units", num_units, MAX_UNITS),
        ("tokens", num_tokens, MAX_CHUNK_TOKENS),
    ):
        if not 1 <= value <= limit:
            raise FormatError(f"a chunk has 1 to {limit} {name}, got {value}")
    if not 0 <= first_position <= MAX_POSITION:
        raise FormatError(f"first_position must be 0 to {MAX_POSITION}, got {first_position}")


def _check_table(
    units: Sequence[UnitEntry],
    names: tuple[str, ...],
    num_layers: int,
    first_byte: int,
    object_bytes: int,
) -> None:
    """Units lie without gaps, variant after variant, each covering all layers in order."""
    runs = tuple(name for name, _ in groupby(unit.variant for unit in units))
    if runs != names or len(set(names)) != len(names):
        raise FormatError("the chunk's units are not in the order of its variants")
    offset = first_byte
    variant, layer = names[0], 0
    for index, unit in enumerate(units):
        if unit.variant != variant:
            if layer != num_layers:
                raise FormatError(f"variant {variant} ends at layer {layer} of {num_layers}")
            variant, layer = unit.variant, 0
        if unit.layer_start != layer or not 1 <= unit.num_layers <= num_layers - layer:
            raise FormatError(
                f"unit {index} covers {unit.num_layers} layers from {unit.layer_start}; layers must"
                f" follow in order from {layer}, up to {num_layers}"
            )
        if unit.offset != offset or unit.length < 1:
            raise FormatError(f"unit {index} must start at byte {offset}, got {unit.offset}")
        layer += unit.num_layers
        offset += unit.length
    if layer != num_layers:
        raise FormatError(f"variant {variant} ends at layer {layer} of {num_layers}")
    if offset != object_bytes:
        raise FormatError(f"the chunk's units end at byte {offset}, the object at {object_bytes}")


def _variant_bytes(name: str) -> bytes:
    data = name.encode("ascii")
    if not 1 <= len(data) <= _VARIANT.size or not name.isprintable():
        raise FormatError(f"variant name must be 1 to {_VARIANT.size} ASCII letters, got {name!r}")
    return data


def _ascii(data: bytes | memoryview, what: str) -> str:
    text = bytes(data).decode("latin-1")
    if not text or not text.isascii() or not text.isprintable():
        raise FormatError(f"chunk's {what} is not printable ASCII text")
    return text
