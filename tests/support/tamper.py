"""Change header bytes and make the header's own checksum right again: what a hostile writer does."""

import hashlib
import struct
import zlib


def resealed_chunk(data: bytes, offset: int, replacement: bytes) -> bytes:
    """The chunk object with bytes of its header replaced."""
    size = struct.unpack_from("<I", data, 12)[0]
    changed = bytearray(data)
    changed[offset : offset + len(replacement)] = replacement
    changed[size - 32 : size] = hashlib.sha256(changed[: size - 32]).digest()
    return bytes(changed)


def resealed_unit(data: bytes, offset: int, replacement: bytes) -> bytes:
    """The unit with bytes of its header replaced."""
    size = struct.unpack_from("<I", data, 12)[0]
    changed = bytearray(data)
    changed[offset : offset + len(replacement)] = replacement
    changed[size - 4 : size] = struct.pack("<I", zlib.crc32(changed[: size - 4]))
    return bytes(changed)


def resealed_sections(data: bytes) -> bytes:
    """The unit with the CRC-32 of every section, and of the header, made right."""
    size, params_bytes = (struct.unpack_from("<I", data, at)[0] for at in (12, 84))
    (num_sections,) = struct.unpack_from("<H", data, 80)
    changed = bytearray(data)
    at = size
    for index in range(num_sections):
        entry = 88 + params_bytes + 24 * index
        (stored_bytes,) = struct.unpack_from("<Q", data, entry + 8)
        struct.pack_into("<I", changed, entry + 4, zlib.crc32(changed[at : at + stored_bytes]))
        at += stored_bytes
    return resealed_unit(bytes(changed), 0, b"")
