"""The codec models' work: one unit decoded, one unit restored, one chunk encoded."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from kvfetcher import wire
from kvfetcher.backend.gpu_coding import Arenas, GpuInput, GpuOutput
from kvfetcher.backend.tags import compare, unit_tag
from kvfetcher.backend.warm_up import gpu_of, warm_up_units
from kvfetcher.codec import profiles
from kvfetcher.codec.encoders import choose_encoder
from kvfetcher.codec.gpu import nvdec
from kvfetcher.codec.video import VideoDecoder, encode_planes
from kvfetcher.errors import (
    CodecError,
    ConfigError,
    DecoderUnavailableError,
    GpuError,
    KVFetcherError,
    LayoutError,
    RequestError,
)
from kvfetcher.format.pictures import PlaneGeometry
from kvfetcher.format.unit import parse_unit
from kvfetcher.format.unit_rest import without_bitstream
from kvfetcher.memory.arena import storage_dtype
from kvfetcher.memory.permits import Permits
from kvfetcher.spec import KVSpec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from kvfetcher.backend.gpu_coding import GpuBatch, GpuJob, KeptPlanes
    from kvfetcher.backend.gpu_encoding import ChunkSource, GpuChunkEncoder
    from kvfetcher.config import CodecConfig, Config
    from kvfetcher.format.unit import Unit
    from kvfetcher.memory.arena import BlockTarget

DecoderChoice = Literal["auto", "cpu", "nvdec"]

_log = logging.getLogger(__name__)

_NO_KEY = "00" * 32
_MAX_STATUS_CHARACTERS = 4096


class DecodedUnit(NamedTuple):
    """One unit's planes, in host memory or on a GPU."""

    planes: NDArray[np.uint8]
    """[F, P, Y, X * bytes_per_sample]; one zero where they are on a GPU."""
    planes_at: str
    """Sealed JSON `PlaneTicket`; "" = `planes` holds them."""
    rest: bytes | memoryview
    """The unit without its bitstream, for `kv_restore`."""
    status: str


# An empty tensor does not pass every version of Triton.
_NO_PLANES = np.zeros((1, 1, 1, 1), np.uint8)


class UnitDecoder:
    """Decodes units one after the other on warm decoders. Not thread-safe.

    A unit that NVDEC refuses or fails at is decoded by the CPU; its status says why.

    Args:
        choice: "cpu"; "nvdec" = NVDEC must be usable; "auto" = NVDEC where it is usable.
        gpu: whose NVDEC, as CUDA counts.
        ring_bytes: GPU memory for planes that stay on the GPU; 0 = none do.
        permits: permits of the server run; None = `Permits.of_run`, when they are needed.

    Raises:
        DecoderUnavailableError: NVDEC is asked for and not usable; says what to do.
    """

    def __init__(
        self,
        choice: DecoderChoice = "auto",
        *,
        gpu: int = 0,
        ring_bytes: int = 0,
        permits: Permits | None = None,
    ) -> None:
        self._cpu = VideoDecoder()
        self._gpu_output = GpuOutput(ring_bytes, permits)
        self._nvdec: nvdec.NvdecDecoder | None = None
        self._fallback = ""
        """Why every unit goes to the CPU although the machine has an NVIDIA GPU."""
        self._is_lost = False
        if choice == "nvdec" or (choice == "auto" and nvdec.has_driver()):
            try:
                self._nvdec = _proven_nvdec(gpu)
            except CodecError as exc:
                if choice == "nvdec":
                    raise
                self._fallback = str(exc)
                _log.warning("units are decoded by the CPU: %s", exc)
            else:
                _log.info("units are decoded by NVDEC of GPU %d", gpu)

    @property
    def name(self) -> str:
        """What decodes units here: "nvdec" or "cpu"."""
        return "cpu" if self._nvdec is None else "nvdec"

    def decode_for(self, unit: bytes | memoryview, sealed_target: str) -> DecodedUnit:
        """`decode`, but for a target on a GPU the planes stay there, where that can be.

        Raises:
            FormatError, CodecError: as `decode`.
            PermissionDeniedError: the target was not given out by this server run.
            LayoutError, ArenaError: the target is not one, or its arena is gone.
        """
        started = time.monotonic()
        parsed = parse_unit(unit)
        tag = unit_tag(unit, sealed_target)
        if not parsed.geometry.num_frames:
            planes, text = self._decode(parsed, started, tag)
            return DecodedUnit(planes, "", memoryview(unit), text)
        rest = without_bitstream(parsed)
        if self._nvdec is not None and self._gpu_output.wants(sealed_target):
            try:
                kept = self._gpu_output.decode(parsed, self._nvdec)
            except (CodecError, GpuError) as exc:
                _log.warning("a unit is not kept on the GPU: %s", exc)
                self._is_lost = self._nvdec.is_lost()
            else:
                return _kept_unit(kept, rest, started, tag)
        planes, text = self._decode(parsed, started, tag)
        return DecodedUnit(planes, "", rest, text)

    def decode(self, unit: bytes | memoryview) -> tuple[NDArray[np.uint8], str]:
        """Planes [F, P, Y, X * bytes_per_sample] uint8 and the status JSON.

        The status holds `decoder` ("nvdec", "cpu", or "none" for a unit without video), `decode_ms`,
        `stamps` (seconds of the machine's monotonic clock) and, where NVDEC should have decoded and
        did not, `fallback`: why.

        Raises:
            FormatError: not a unit.
            CodecError: the bitstream does not decode to what the unit says.
        """
        started = time.monotonic()
        return self._decode(parse_unit(unit), started, "")

    def _decode(self, unit: Unit, started: float, tag: str) -> tuple[NDArray[np.uint8], str]:
        status: dict[str, Any] = {"decoder": self.name} | ({"tag": tag} if tag else {})
        fallback = self._fallback
        planes = None
        if self._nvdec is not None:
            try:
                planes = profiles.decode_parsed(unit, self._nvdec)
            except (CodecError, GpuError) as exc:
                fallback = str(exc)
                _log.warning("a unit is decoded by the CPU: %s", exc)
                self._is_lost = self._nvdec.is_lost()
        if planes is None:
            planes = profiles.decode_parsed(unit, self._cpu)
            status["decoder"] = "cpu"
        status["decode_ms"] = _ms_since(started)
        status["stamps"] = _stamps(decode=started, decoded=time.monotonic())
        if not planes.size:
            status["decoder"] = "none"
        elif fallback:
            status["fallback"] = fallback
        return planes.view(np.uint8), json.dumps(status)

    def is_lost(self) -> bool:
        """Whether the GPU failed so that this process must be replaced to use NVDEC again.

        Until then the CPU decodes. Other errors cost a session, which is opened anew.
        """
        return self._is_lost

    def close(self) -> None:
        """Free the decoders."""
        self._cpu.close()
        self._gpu_output.close()
        if self._nvdec is not None:
            self._nvdec.close()


def _kept_unit(kept: KeptPlanes, rest: bytes, started: float, tag: str) -> DecodedUnit:
    planes = _NO_PLANES if kept.planes is None else kept.planes.view(np.uint8)
    status = {
        "decoder": "nvdec",
        "tag": tag,
        "planes": "gpu" if kept.planes is None else "host",
        "decode_ms": _ms_since(started),
        "stamps": _stamps(decode=started, reserved=kept.reserved_at, decoded=time.monotonic()),
    }
    if kept.why:
        status["fallback"] = kept.why
    return DecodedUnit(planes, kept.planes_at, rest, json.dumps(status))


def _proven_nvdec(gpu: int) -> nvdec.NvdecDecoder:
    """NVDEC of a GPU after a picture of each usual depth: opening takes up to half a second.

    Raises:
        CodecError: not usable, or a picture came back changed.
    """
    decoder = nvdec.NvdecDecoder(gpu)
    for bit_depth in (8, 10):
        geometry = PlaneGeometry(num_frames=1, width=256, height=160, bit_depth=bit_depth)
        numbers = np.arange(math.prod(geometry.shape), dtype=np.uint32) * np.uint32(2654435761)
        planes = (numbers >> np.uint32(32 - bit_depth)).astype(geometry.dtype)
        planes = planes.reshape(geometry.shape)
        decoded = decoder.decode(encode_planes(planes, bit_depth=bit_depth), geometry)
        if not np.array_equal(decoded, planes):
            decoder.close()
            raise DecoderUnavailableError(
                f"NVDEC of GPU {gpu} changed the values of a lossless picture at start; run the GPU tests"
                ' (tests/gpu) on this machine, or set codec.decoder = "cpu"'
            )
    return decoder


@dataclass(slots=True)
class RestoreJob:
    """One unit between `UnitRestorer.start` and `close_batch`."""

    unit: Unit
    decode_status: dict[str, Any]
    started: float
    tag: str
    launched: float = 0.0
    values: bytes = b""
    on_gpu: GpuJob | None = None
    """None = it is done."""


class RestoreBatch(NamedTuple):
    """Units between `UnitRestorer.close_batch` and `finish`."""

    jobs: Sequence[RestoreJob]
    on_gpu: GpuBatch


class UnitRestorer:
    """Restores units into arenas, which stay attached between calls.

    One thread starts units and closes batches, another may `finish` batches meanwhile.

    Args:
        permits: permits of the server run; None = `Permits.of_run`.
        run_folder: run folder of the server; see `tags.compare`.
    """

    def __init__(self, permits: Permits | None = None, *, run_folder: Path | None = None) -> None:
        self._run_folder = run_folder
        self._permits = Permits.of_run() if permits is None else permits
        self._arenas = Arenas(self._permits)
        self._gpu = GpuInput()

    def warm_up(self, config: Config) -> None:
        """Restore units like those that will come, where the arena is to lie on a GPU.

        What fails is logged: it may be mended by the time that it is needed.
        """
        gpu = gpu_of(config)
        if gpu is None:
            return
        started = time.monotonic()
        decoder = VideoDecoder()
        try:
            for data in warm_up_units(config):
                unit = parse_unit(data)
                self._gpu.warm_up(gpu, unit, profiles.decode_parsed(unit, decoder))
            for source in set(config.nvdec_gpus) - {gpu}:
                self._gpu.warm_up_copies(source, gpu)
        except Exception as exc:  # noqa: BLE001 - nothing here may keep the server from starting
            _log.warning("GPU %d is not warmed up: %s: %s", gpu, type(exc).__name__, exc)
        else:
            _log.info("GPU %d restores units after %.0f ms", gpu, _ms_since(started))
        finally:
            decoder.close()

    def start(
        self,
        data: bytes | memoryview,
        planes: NDArray[np.uint8],
        *,
        planes_at: str = "",
        target_json: str,
        decode_status: str,
    ) -> RestoreJob:
        """Restore one unit; into an arena on a GPU the work is only begun.

        Args:
            data: the unit, or its `DecodedUnit.rest`; it and `planes` must stay until `finish`.
            planes: [F, P, Y, X * bytes_per_sample] uint8.
            planes_at: sealed JSON `PlaneTicket` of planes on a GPU, which replace `planes`; "" = none.
            target_json: sealed JSON `BlockTarget`; "" = the values are wanted themselves.
            decode_status: JSON of `UnitDecoder`, passed on; "" = none.

        Raises:
            PermissionDeniedError: planes or target were not given out by this server run.
            RequestError: `decode_status` is none.
            FormatError: not a unit, or its digest differs.
            MixedUpError: what `kv_decode` replied belongs to another unit or target.
            RequestError: `decode_status` is not one.
            LayoutError: planes or target do not fit the unit.
            ArenaError: the arena is gone.
            GpuError: planes on a GPU are gone, or it failed.
        """
        ticket = self._permits.open("planes", planes_at) if planes_at else ""
        try:
            job = self._start(data, planes, ticket, target_json, decode_status)
        except BaseException:
            if ticket:
                self._gpu.drop(ticket)
            raise
        job.launched = time.monotonic()
        return job

    def _start(
        self,
        data: bytes | memoryview,
        planes: NDArray[np.uint8],
        ticket: str,
        target_json: str,
        decode_status: str,
    ) -> RestoreJob:
        started = time.monotonic()
        target = self._arenas.target("write", target_json) if target_json else None
        unit = parse_unit(data, checks_video=False)
        decoded = _parse_status(decode_status)
        tag = unit_tag(data, target_json)
        # What a stranger claims to be kv_decode's must not have kv_decode replaced.
        folder = None if target is None else self._run_folder
        compare(decoded.pop("tag", tag), tag, model=wire.KV_DECODE, run_folder=folder)
        job = RestoreJob(unit, decoded, started, tag)
        if target is None:
            job.values = profiles.restore_parsed(unit, planes).tobytes()
            return job
        arena = self._arenas.of(target)
        if arena.gpu is None:
            # Before a byte is allocated: a small unit may say that it restores to 512 MiB.
            arena.check_values(target, unit.layer_start, unit.shape)
            arena.write(target, unit.layer_start, profiles.restore_parsed(unit, planes))
            return job
        job.on_gpu = self._gpu.start(unit, planes, ticket, arena, target)
        return job

    def close_batch(self, jobs: Sequence[RestoreJob]) -> RestoreBatch:
        """Started units that `finish` is to wait for at one time; nothing waits here."""
        on_gpu = [job.on_gpu for job in jobs if job.on_gpu is not None]
        return RestoreBatch(jobs, self._gpu.close_batch(on_gpu))

    def finish(self, batch: RestoreBatch) -> list[tuple[bytes, str] | Exception]:
        """Values (empty where a target was given) and status JSON of each job, or its error."""
        errors = iter(self._gpu.finish(batch.on_gpu))
        synced, count = time.monotonic(), len(batch.jobs)
        results: list[tuple[bytes, str] | Exception] = []
        for job in batch.jobs:
            error = None if job.on_gpu is None else next(errors)
            results.append(error or (job.values, _restore_status(job, synced, count)))
        return results

    def restore(
        self,
        unit: bytes | memoryview,
        planes: NDArray[np.uint8],
        *,
        target_json: str,
        decode_status: str,
        planes_at: str = "",
    ) -> tuple[bytes, str]:
        """One unit from `start` to `finish`; raises what they give."""
        job = self.start(
            unit,
            planes,
            planes_at=planes_at,
            target_json=target_json,
            decode_status=decode_status,
        )
        (result,) = self.finish(self.close_batch([job]))
        if isinstance(result, Exception):
            raise result
        return result

    def is_lost(self) -> bool:
        """Whether a GPU failed so that this process must be replaced."""
        return self._gpu.is_lost()

    def close(self) -> None:
        """Detach from all arenas and planes."""
        self._gpu.close()
        self._arenas.close()


def _restore_status(job: RestoreJob, synced: float, batch: int) -> str:
    unit = job.unit
    decoded = job.decode_status
    stamps = decoded.pop("stamps", {}) | _stamps(
        restore=job.started, launched=job.launched, synced=synced
    )
    status = {
        "layer_start": unit.layer_start,
        "num_layers": unit.num_layers,
        "num_tokens": unit.num_tokens,
        "decoder": "" if unit.geometry.num_frames else "none",
        "decode_ms": 0.0,
        **decoded,
        "restorer": "cpu" if job.on_gpu is None else job.on_gpu.restorer,
        "restore_ms": _ms_since(job.started),
        "batch": batch,
        "stamps": stamps,
        "tag": job.tag,
    }
    return json.dumps(status)


@dataclass(frozen=True, slots=True)
class ChunkJob:
    """One chunk to encode, read from a request."""

    token_ids: list[int]
    spec: KVSpec
    first_position: int
    identity: bytes
    chunk_key: bytes
    parent_key: bytes
    target: BlockTarget | None
    """Where its values lie; None = in `values`."""
    values: NDArray[Any] | None
    started: float

    def status(self, encoder: str, chunk: bytes) -> str:
        """JSON for the caller."""
        num_bytes = self.spec.bytes_per_token * len(self.token_ids)
        status = {
            "encoder": encoder,
            "num_bytes": len(chunk),
            "ratio": round(num_bytes / len(chunk), 4),
            "encode_ms": _ms_since(self.started),
        }
        return json.dumps(status)


def _parse_status(text: str) -> dict[str, Any]:
    """What `UnitDecoder` reported, or {}.

    Raises:
        RequestError: it is not such JSON.
    """
    if not text:
        return {}
    try:
        status = json.loads(text) if len(text) <= _MAX_STATUS_CHARACTERS else None
    except (ValueError, RecursionError):
        status = None
    if not isinstance(status, dict) or not isinstance(status.get("stamps", {}), dict):
        raise RequestError(
            f"input {wire.DECODE_STATUS!r} must be what kv_decode gave: a JSON object of at most"
            f" {_MAX_STATUS_CHARACTERS} characters"
        )
    return status


class ChunkEncoder:
    """Encodes chunks with the configured profile, on the CPU or on the GPU where they lie.

    Args:
        config: section `codec`.
        permits: permits of the server run; None = `Permits.of_run`.

    Raises:
        EncoderUnavailableError: `codec.encoder` names an encoder that is not usable.
    """

    def __init__(
        self, config: CodecConfig, permits: Permits | None = None, *, on_gpu: bool = False
    ) -> None:
        self._profile = profiles.make_profile(config)
        self._uses_gpus = on_gpu and config.encoder in ("auto", "own")
        self._encoder = choose_encoder(config.encoder)
        self.num_cores = len(os.sched_getaffinity(0))
        self._arenas = Arenas(Permits.of_run() if permits is None else permits)
        self._on_gpu: dict[int, GpuChunkEncoder | None] = {}

    def read(
        self, token_ids: NDArray[np.int32], *, spec_json: str, target_json: str, values: bytes
    ) -> ChunkJob:
        """A request's chunk.

        Args:
            token_ids: [T] the chunk's tokens.
            spec_json: {"spec": KVSpec fields, "first_position": 0, "identity_digest": hex,
                "chunk_key": hex, "parent_key": hex}; all but "spec" may be left out.
            target_json: sealed BlockTarget to read the values from; "" = `values` holds them.
            values: canonical [L, K, H, T, D], little-endian.

        Raises:
            PermissionDeniedError: the target was not given out by this server run for reading.
            RequestError: the JSON or the size of `values` does not fit.
            LayoutError: the target is none.
        """
        started = time.monotonic()
        target = self._arenas.target("read", target_json) if target_json else None
        asked = _parse_spec(spec_json)
        spec: KVSpec = asked["spec"]
        return ChunkJob(
            token_ids=token_ids.tolist(),
            spec=spec,
            first_position=asked["first_position"],
            identity=bytes.fromhex(asked["identity_digest"]),
            chunk_key=bytes.fromhex(asked["chunk_key"]),
            parent_key=bytes.fromhex(asked["parent_key"]),
            target=target,
            values=None if target_json else _as_values(values, spec, len(token_ids)),
            started=started,
        )

    def encode(
        self, token_ids: NDArray[np.int32], *, spec_json: str, target_json: str, values: bytes
    ) -> tuple[bytes, str]:
        """`read` and `encode_job`; raises what they give."""
        job = self.read(token_ids, spec_json=spec_json, target_json=target_json, values=values)
        return self.encode_job(job)

    def encode_job(self, job: ChunkJob) -> tuple[bytes, str]:
        """`values_of` and `encode_values` with all cores; raises what they give."""
        return self.encode_values(job, self.values_of(job), num_threads=self.num_cores)

    def values_of(self, job: ChunkJob) -> NDArray[Any]:
        """A chunk's values [L, K, H, T, D], read from its target if it has one.

        Raises:
            LayoutError, ArenaError: the target does not fit or is gone.
        """
        if job.target is not None:
            return self._arenas.of(job.target).read(job.target)
        assert job.values is not None
        return job.values

    def encode_values(
        self, job: ChunkJob, values: NDArray[Any], *, num_threads: int
    ) -> tuple[bytes, str]:
        """One chunk object and the status JSON, by the CPU. Thread-safe.

        Args:
            job: whose chunk it is.
            values: from `values_of`.
            num_threads: units encoded at one time.

        Raises:
            LayoutError, CodecError, FormatError: as `profiles.encode_chunk`.
        """
        chunk = profiles.encode_chunk(
            values,
            spec=job.spec,
            profile=self._profile,
            identity=job.identity,
            chunk_key=job.chunk_key,
            parent_key=job.parent_key,
            first_position=job.first_position,
            token_ids=job.token_ids,
            num_threads=num_threads,
            encoder=self._encoder.encode,
        )
        return chunk, job.status(self._encoder.name, chunk)

    def source_on_gpu(self, job: ChunkJob) -> tuple[GpuChunkEncoder, ChunkSource] | None:
        """Who encodes a chunk on a GPU, and what; None = it is for the CPU.

        Raises:
            LayoutError, ArenaError: the target does not fit or is gone.
        """
        if job.target is None or not self._uses_gpus:
            return None
        arena = self._arenas.of(job.target)
        if arena.gpu is None or len(arena.parts) > 1 or arena.spec != job.spec:
            return None
        encoder = self._gpu_encoder(arena.gpu, job.spec)
        if encoder is None:
            return None
        if job.target.num_tokens != len(job.token_ids):
            raise LayoutError(
                f"the target holds {job.target.num_tokens} tokens, the chunk {len(job.token_ids)}"
            )
        from kvfetcher.backend.gpu_encoding import ChunkSource

        return encoder, ChunkSource(
            arena,  # type: ignore[arg-type]  # one part that is on a GPU
            job.target,
            job.token_ids,
            job.first_position,
            job.identity,
            job.chunk_key,
            job.parent_key,
        )

    def warm_up(self, config: Config) -> None:
        """Import, compile and load what chunks on a GPU need, so that no request waits for it."""
        gpu = gpu_of(config)
        if gpu is not None and self._uses_gpus:
            spec = KVSpec(num_layers=1, num_kv_heads=1, head_dim=128, dtype=config.engine.kv_dtype)
            self._gpu_encoder(gpu, spec)

    def _gpu_encoder(self, gpu: int, spec: KVSpec) -> GpuChunkEncoder | None:
        if gpu not in self._on_gpu:
            self._on_gpu[gpu] = None
            try:
                from kvfetcher.backend.gpu_encoding import GpuChunkEncoder

                if GpuChunkEncoder.can_encode(self._profile, spec):
                    made = GpuChunkEncoder(gpu, self._profile, self._encoder.encode)
                    made.warm_up()
                    self._on_gpu[gpu] = made
            except (ImportError, KVFetcherError, RuntimeError) as exc:
                _log.warning("chunks on GPU %d are encoded by the CPU: %s", gpu, exc)
        return self._on_gpu[gpu]

    def is_lost(self) -> bool:
        """Whether a GPU failed so that this process must be replaced."""
        return any(one.is_lost() for one in self._on_gpu.values() if one is not None)

    def close(self) -> None:
        """Detach from all arenas."""
        for encoder in self._on_gpu.values():
            if encoder is not None:
                encoder.close()
        self._arenas.close()


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
    except (
        ValueError, TypeError, KeyError, AttributeError, ConfigError, RecursionError,
    ) as exc:  # fmt: skip
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


def _stamps(**seconds: float) -> dict[str, float]:
    """Moments of one unit's way, comparable over the machine's processes."""
    return {name: round(moment, 6) for name, moment in seconds.items()}


def _ms_since(started: float) -> float:
    return round((time.monotonic() - started) * 1e3, 3)
