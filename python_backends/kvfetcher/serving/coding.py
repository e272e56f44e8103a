"""The codec models' work: one unit decoded, one unit restored, one chunk encoded."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kvfetcher import wire
from kvfetcher.arena import Arena, BlockTarget, storage_dtype
from kvfetcher.codec import nvdec, profiles
from kvfetcher.codec.base import PlaneGeometry
from kvfetcher.codec.video import VideoDecoder, encode_planes
from kvfetcher.errors import CodecError, ConfigError, DecoderUnavailableError, RequestError
from kvfetcher.spec import KVSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.config import CodecConfig

DecoderChoice = Literal["auto", "cpu", "nvdec"]

_log = logging.getLogger(__name__)

_NO_KEY = "00" * 32


class UnitDecoder:
    """Decodes units one after the other on warm decoders. Not thread-safe.

    A unit that NVDEC refuses or fails at is decoded by the CPU; its status says why.

    Args:
        choice: "cpu"; "nvdec" = NVDEC must be usable; "auto" = NVDEC where it is usable.

    Raises:
        DecoderUnavailableError: NVDEC is asked for and not usable; says what to do.
    """

    def __init__(self, choice: DecoderChoice = "auto") -> None:
        self._cpu = VideoDecoder()
        self._nvdec: nvdec.NvdecDecoder | None = None
        self._fallback = ""
        """Why every unit goes to the CPU although the machine has an NVIDIA GPU."""
        if choice == "nvdec" or (choice == "auto" and nvdec.has_driver()):
            try:
                self._nvdec = _proven_nvdec()
            except CodecError as exc:
                if choice == "nvdec":
                    raise
                self._fallback = str(exc)
                _log.warning("units are decoded by the CPU: %s", exc)

    @property
    def name(self) -> str:
        """What decodes units here: "nvdec" or "cpu"."""
        return "cpu" if self._nvdec is None else "nvdec"

    def decode(self, unit: bytes) -> tuple[NDArray[np.uint8], str]:
        """Planes [F, P, Y, X * bytes_per_sample] uint8 and the status JSON.

        The status holds `decoder` ("nvdec" or "cpu"), `decode_ms` and, where NVDEC should have
        decoded and did not, `fallback`: why.

        Raises:
            FormatError: not a unit.
            CodecError: the bitstream does not decode to what the unit says.
        """
        started = time.perf_counter()
        status: dict[str, Any] = {"decoder": self.name}
        fallback = self._fallback
        planes = None
        if self._nvdec is not None:
            try:
                planes = profiles.decode_unit(unit, self._nvdec)
            except CodecError as exc:
                fallback = str(exc)
                _log.warning("a unit is decoded by the CPU: %s", exc)
        if planes is None:
            planes = profiles.decode_unit(unit, self._cpu)
            status["decoder"] = "cpu"
        status["decode_ms"] = _ms_since(started)
        if fallback:
            status["fallback"] = fallback
        return planes.view(np.uint8), json.dumps(status)

    def close(self) -> None:
        """Free the decoders."""
        self._cpu.close()
        if self._nvdec is not None:
            self._nvdec.close()


def _proven_nvdec() -> nvdec.NvdecDecoder:
    """NVDEC after it has decoded a picture of each usual depth: opening takes up to half a second.

    Raises:
        CodecError: not usable, or a picture came back changed.
    """
    decoder = nvdec.NvdecDecoder()
    for bit_depth in (8, 10):
        geometry = PlaneGeometry(num_frames=1, width=256, height=160, bit_depth=bit_depth)
        numbers = np.arange(math.prod(geometry.shape), dtype=np.uint32) * np.uint32(2654435761)
        planes = (numbers >> np.uint32(32 - bit_depth)).astype(geometry.dtype)
        planes = planes.reshape(geometry.shape)
        decoded = decoder.decode(encode_planes(planes, bit_depth=bit_depth), geometry)
        if not np.array_equal(decoded, planes):
            decoder.close()
            raise DecoderUnavailableError(
                "NVDEC changed the values of a lossless picture at start; run the GPU tests"
                ' (tests/gpu) on this machine, or set codec.decoder = "cpu"'
            )
    return decoder


class UnitRestorer:
    """Restores units into arenas, which stay attached between calls. Not thread-safe."""

    def __init__(self) -> None:
        self._arenas = _Arenas()

    def restore(
        self, unit: bytes, planes: NDArray[np.uint8], *, target_json: str, decode_status: str
    ) -> tuple[bytes, str]:
        """Values as bytes (empty where a target is given) and the status JSON.

        Raises:
            FormatError: not a unit, or its digest differs.
            LayoutError: planes or target do not fit the unit.
            ArenaError: the arena is gone.
        """
        started = time.perf_counter()
        restored = profiles.restore_unit(unit, planes)
        values = b""
        if target_json:
            target = BlockTarget.from_json(target_json)
            self._arenas.of(target).write(target, restored.layer_start, restored.values)
        else:
            values = restored.values.tobytes()
        layers, _, _, tokens, _ = restored.values.shape
        status = {
            "layer_start": restored.layer_start,
            "num_layers": layers,
            "num_tokens": tokens,
            "decoder": "",
            "decode_ms": 0.0,
            **(json.loads(decode_status) if decode_status else {}),
            "restore_ms": _ms_since(started),
        }
        return values, json.dumps(status)

    def close(self) -> None:
        """Detach from all arenas."""
        self._arenas.close()


class ChunkEncoder:
    """Encodes chunks with the configured profile."""

    def __init__(self, config: CodecConfig) -> None:
        self._profile = profiles.make_profile(config)
        self._num_threads = len(os.sched_getaffinity(0))
        self._arenas = _Arenas()

    def encode(
        self, token_ids: NDArray[np.int32], *, spec_json: str, target_json: str, values: bytes
    ) -> tuple[bytes, str]:
        """One chunk object and the status JSON.

        Args:
            token_ids: [T] the chunk's tokens.
            spec_json: {"spec": KVSpec fields, "first_position": 0, "identity_digest": hex,
                "chunk_key": hex, "parent_key": hex}; all but "spec" may be left out.
            target_json: BlockTarget to read the values from; "" = `values` holds them.
            values: canonical [L, K, H, T, D], little-endian.

        Raises:
            RequestError: the JSON or the size of `values` does not fit.
            LayoutError, ArenaError: the target does not fit or is gone.
        """
        started = time.perf_counter()
        asked = _parse_spec(spec_json)
        spec: KVSpec = asked["spec"]
        if target_json:
            target = BlockTarget.from_json(target_json)
            array = self._arenas.of(target).read(target)
        else:
            array = _as_values(values, spec, len(token_ids))
        chunk = profiles.encode_chunk(
            array,
            spec=spec,
            profile=self._profile,
            identity=bytes.fromhex(asked["identity_digest"]),
            chunk_key=bytes.fromhex(asked["chunk_key"]),
            parent_key=bytes.fromhex(asked["parent_key"]),
            first_position=asked["first_position"],
            token_ids=token_ids.tolist(),
            num_threads=self._num_threads,
        )
        status = {
            "num_bytes": len(chunk),
            "ratio": round(array.nbytes / len(chunk), 4),
            "encode_ms": _ms_since(started),
        }
        return chunk, json.dumps(status)

    def close(self) -> None:
        """Detach from all arenas."""
        self._arenas.close()


class _Arenas:
    """Attached arenas; an engine restart makes a new one, and the old one is let go."""

    def __init__(self) -> None:
        self._attached: dict[str, Arena] = {}

    def of(self, target: BlockTarget) -> Arena:
        arena = self._attached.get(target.arena)
        if arena is None or arena.generation != target.generation:
            fresh = Arena.attach(target.arena, generation=target.generation)
            if arena is not None:
                arena.close()
            self._attached[target.arena] = arena = fresh
        return arena

    def close(self) -> None:
        for arena in self._attached.values():
            arena.close()
        self._attached.clear()


def _parse_spec(text: str) -> dict[str, Any]:
    defaults = {
        "first_position": 0,
        "identity_digest": _NO_KEY,
        "chunk_key": _NO_KEY,
        "parent_key": _NO_KEY,
    }
    try:
        data = {**defaults, **json.loads(text)}
        spec = KVSpec(**data.pop("spec"))
        if set(data) != set(defaults) or any(
            len(bytes.fromhex(data[k])) != 32 for k in defaults if k != "first_position"
        ):
            raise ValueError("keys are spec, first_position and three 64-digit hex names")
        return {"spec": spec, **data, "first_position": int(data["first_position"])}
    except (ValueError, TypeError, KeyError, AttributeError, ConfigError) as exc:
        raise RequestError(f"input {wire.KV_SPEC!r} does not describe a chunk: {exc}") from exc


def _as_values(values: bytes, spec: KVSpec, num_tokens: int) -> NDArray[Any]:
    expected = spec.bytes_per_token * num_tokens
    if len(values) != expected or not num_tokens:
        raise RequestError(
            f"input {wire.KV_VALUES!r} must hold {num_tokens} tokens x {spec.bytes_per_token} bytes"
            f" = {expected}, got {len(values)}"
        )
    shape = (spec.num_layers, spec.kv_factor, spec.num_kv_heads, num_tokens, spec.head_dim)
    return np.frombuffer(values, storage_dtype(spec)).reshape(shape)


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 3)
