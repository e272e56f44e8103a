"""Units on a GPU: planes left there by `kv_decode`, values restored there by `kv_restore`.

Torch and the Triton language are imported when the first arena on a GPU is seen, so that servers
without one pay nothing. Where the Triton language is missing, units are restored by the CPU and copied.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from kvfetcher.codec import profiles
from kvfetcher.codec.base import LeftToCpuError
from kvfetcher.codec.gpu.nvdec import sample_shift
from kvfetcher.errors import GpuError, KVFetcherError, LayoutError
from kvfetcher.memory.arena import BlockTarget, read_arena_header
from kvfetcher.memory.control import run_dir
from kvfetcher.memory.cuda import cuda_context
from kvfetcher.memory.permits import Permits
from kvfetcher.memory.plane_ring import PlaneReader, PlaneRing, PlaneTicket
from kvfetcher.memory.split_arena import attach_arena, find_arena

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvfetcher.codec.gpu.nvdec import NvdecDecoder
    from kvfetcher.codec.gpu.restore import PendingBatch
    from kvfetcher.format.pictures import Integers, PlaneGeometry
    from kvfetcher.format.unit import Unit
    from kvfetcher.memory.arena import Arena
    from kvfetcher.memory.cuda import CudaContext

_SHARED_MEMORY = Path("/dev/shm")
# kv_restore takes milliseconds; longer than this and the unit's request is gone or the GPU is
# overloaded: the unit then goes through host memory.
_WAIT_SECONDS = 2.0
# Longer than a unit takes from kv_decode to kv_restore in a server that is well: milliseconds. A
# request may wait longer (fetch.deadline_seconds); a reader that comes later is refused, and its
# unit fails.
_EXPIRY_SECONDS = 60.0
# Pause between two tries of a GPU that had no memory for planes.
_RETRY_SECONDS = 30.0
_MAX_KNOWN_TARGETS = 256
_MAX_KNOWN_ARENAS = 16

_log = logging.getLogger(__name__)


class Arenas:
    """Attached arenas; an engine restart makes a new one, and the old one is let go."""

    def __init__(self, permits: Permits) -> None:
        self._permits = permits
        self._attached: dict[tuple[str, ...], Arena] = {}
        self._paths: dict[str, tuple[str, ...]] = {}

    def target(self, right: Literal["read", "write"], sealed: str) -> BlockTarget:
        """The target of a sealed text, checked before anything is opened.

        Raises:
            PermissionDeniedError: no process of this server run gave it out for this.
            LayoutError: it is not a target.
        """
        return BlockTarget.from_json(self._permits.open(right, sealed))

    def of(self, target: BlockTarget) -> Arena:
        """The arena that a target names.

        Raises:
            ArenaError: it or a part of it is gone.
        """
        generation = target.generation
        paths = self._paths.get(generation)
        if paths is not None:
            return self._attached[paths]
        paths = find_arena(self._permits.folder, generation)
        fresh = attach_arena(paths, generation=generation)
        if (old := self._attached.get(paths)) is not None:
            old.close()
            self._paths = {g: p for g, p in self._paths.items() if p != paths}
        self._attached[paths], self._paths[generation] = fresh, paths
        return fresh

    def close(self) -> None:
        """Detach from all."""
        for arena in self._attached.values():
            arena.close()
        self._attached.clear()
        self._paths.clear()


class KeptPlanes(NamedTuple):
    """Where one unit's planes are."""

    planes_at: str
    """Sealed JSON `PlaneTicket`; "" = in `planes`."""
    planes: Integers | None = None
    """[F, P, Y, X] in host memory."""
    why: str = ""
    """Why they are in host memory."""
    reserved_at: float = 0.0
    """When their memory was found, seconds of `time.monotonic`."""


class GpuOutput:
    """The decoding side: which units stay on the GPU, and where.

    Args:
        ring_bytes: GPU memory for them; 0 = none stays.
        permits: permits of the server run; None = `Permits.of_run`, when the first target comes.
    """

    def __init__(self, ring_bytes: int, permits: Permits | None = None) -> None:
        self._ring_bytes = ring_bytes
        self._permits = permits
        self._ring: PlaneRing | None = None
        self._no_ring = ""
        """Why there is none, since `_tried_at`."""
        self._tried_at = 0.0
        self._was_full = False
        self._has_warned = False
        self._gpus: OrderedDict[str, bool] = OrderedDict()

    def wants(self, sealed_target: str) -> bool:
        """Whether the target lies on a GPU.

        Raises:
            PermissionDeniedError: no process of this server run gave the target out for writing.
            LayoutError, ArenaError: the target is not one, or its arena is gone.
        """
        if not (sealed_target and self._ring_bytes):
            return False
        target = BlockTarget.from_json(self._open_permits().open("write", sealed_target))
        known = self._gpus.get(target.generation)
        if known is None:
            header = read_arena_header(
                find_arena(self._open_permits().folder, target.generation)[0]
            )
            known = self._gpus[target.generation] = header.gpu is not None
            if len(self._gpus) > _MAX_KNOWN_ARENAS:
                self._gpus.popitem(last=False)
        return known

    def decode(self, unit: Unit, decoder: NvdecDecoder) -> KeptPlanes:
        """Decode into the ring, or into host memory where the ring has no room.

        Raises:
            CodecError, GpuError: it does not decode, or the GPU refused.
        """
        ring = self._open_ring(decoder.context)
        geometry = unit.geometry
        ticket: PlaneTicket | None = None
        why, reserved_at = self._no_ring, 0.0

        def place() -> int | None:
            nonlocal ticket, why, reserved_at
            if ring is not None:
                ticket, why = self._reserve(ring, geometry)
            reserved_at = time.monotonic()
            return None if ring is None or ticket is None else ring.address_of(ticket)

        try:
            planes = decoder.decode_on_gpu(unit.packets(), geometry, place)
            if ring is None or ticket is None:
                return KeptPlanes("", planes, why, reserved_at)
            ring.written()
        except BaseException:
            if ring is not None and ticket is not None:
                ring.cancel(ticket)
            raise
        sealed = self._open_permits().seal("planes", ticket.to_json())
        return KeptPlanes(sealed, reserved_at=reserved_at)

    def _open_permits(self) -> Permits:
        if self._permits is None:
            self._permits = Permits.of_run()
        return self._permits

    def _reserve(self, ring: PlaneRing, geometry: PlaneGeometry) -> tuple[PlaneTicket | None, str]:
        """Room for planes, or None and why there is none."""
        num_bytes = geometry.num_bytes
        if num_bytes > ring.num_bytes:
            why = (
                f"planes of {num_bytes} bytes do not fit this decoder's {ring.num_bytes} on the GPU;"
                " raise server.plane_bytes, which kv_decode's processes share, or lower"
                " server.decode_instances"
            )
            if not self._has_warned:
                self._has_warned = True
                _log.warning("%s; such units go through host memory", why)
            return None, why
        # Where the last one waited in vain, kv_restore is lost or far behind: not each unit again.
        wait_seconds = 0.0 if self._was_full else _WAIT_SECONDS
        ticket = ring.reserve(num_bytes, shift=sample_shift(geometry), wait_seconds=wait_seconds)
        self._was_full = ticket is None
        if ticket is None:
            return None, "planes that were not restored yet fill this decoder's memory on the GPU"
        return ticket, ""

    def _open_ring(self, context: CudaContext) -> PlaneRing | None:
        now = time.monotonic()
        if self._ring is None and (not self._no_ring or now - self._tried_at > _RETRY_SECONDS):
            name = f"kvfetcher-{run_dir().name}-planes-{os.getpid()}"
            try:
                self._ring = PlaneRing(
                    context,
                    self._ring_bytes,
                    table=_SHARED_MEMORY / name,
                    expiry_seconds=_EXPIRY_SECONDS,
                )
                self._no_ring = ""
            except GpuError as exc:
                self._no_ring, self._tried_at = f"no memory for planes on the GPU: {exc}", now
                _log.warning("%s", self._no_ring)
        return self._ring

    def close(self) -> None:
        """Free the memory."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None


class GpuJob(NamedTuple):
    """One unit that is being restored on a GPU, or was restored by the CPU for it."""

    restorer: Literal["cpu", "gpu"]
    gpu: int
    ticket: PlaneTicket | None
    pending: Any = None
    """`PendingRestore`; None = it is done."""


def _left_to_cpu() -> tuple[type[RuntimeError], ...]:
    """What a restorer raises where the CPU can do the work."""
    import torch

    return torch.OutOfMemoryError, LeftToCpuError


class GpuBatch(NamedTuple):
    """Jobs that are waited for together."""

    jobs: Sequence[GpuJob]
    pending: list[tuple[int, list[int], Any]]
    """GPU, which of `jobs`, their `PendingBatch`."""
    errors: dict[int, KVFetcherError]
    """Errors of the jobs that failed, by number."""


class GpuInput:
    """The restoring side: planes from anywhere into arenas on GPUs.

    One thread begins units and closes batches, another may `finish` batches meanwhile.
    """

    def __init__(self) -> None:
        self._reader = PlaneReader(cuda_context)
        self._restorers: dict[int, Any] = {}
        self._block_ids: OrderedDict[tuple[int, tuple[int, ...]], Any] = OrderedDict()
        self._is_lost = False

    def warm_up(self, gpu: int, unit: Unit, planes: Integers) -> None:
        """Restore a unit into memory that is freed again.

        Raises:
            GpuError: the GPU failed.
        """
        try:
            restorer = self._restorer(gpu)
            if restorer is not None and restorer.can_restore(unit):
                restorer.restore(unit, self._planes(unit, planes.view(np.uint8), None, gpu))
        except RuntimeError as exc:
            self._settle(gpu)
            raise self._failure(gpu, exc) from exc

    def warm_up_copies(self, source: int, gpu: int) -> None:
        """Get ready for planes that another GPU decodes.

        Raises:
            GpuError: one of them failed.
        """
        import torch

        try:
            torch.zeros(1, device=f"cuda:{source}").to(f"cuda:{gpu}")
        except RuntimeError as exc:
            self._settle(source, gpu)
            raise self._failure(source, exc) from exc

    def start(
        self,
        unit: Unit,
        planes: NDArray[np.uint8],
        planes_at: str,
        arena: Arena,
        target: BlockTarget,
    ) -> GpuJob:
        """Begin a unit; see `UnitRestorer.start`. For an arena in parts it is over then.

        Where the GPU lacks the memory, the CPU restores. After an error nothing of the unit runs,
        and the planes are the caller's to `drop`.
        """
        assert arena.gpu is not None
        arena.check_values(target, unit.layer_start, unit.shape)
        ticket = PlaneTicket.from_json(planes_at) if planes_at else None
        is_split = len(arena.parts) > 1
        # Parts lie on several GPUs: the one that has the planes does the work.
        gpu = ticket.gpu if is_split and ticket is not None else arena.gpu
        gpus = {gpu} if ticket is None else {gpu, ticket.gpu}
        try:
            restorer = self._restorer(gpu)
            if restorer is None or not restorer.can_restore(unit):
                return self._start_on_cpu(unit, planes, ticket, gpu, arena, target)
            try:
                on_gpu = self._planes(unit, planes, ticket, gpu)
                if is_split:
                    arena.write(target, unit.layer_start, restorer.restore(unit, on_gpu))
                    return GpuJob("gpu", gpu, ticket)
                pending = restorer.begin(unit, on_gpu, self._destination(unit, arena, target))
            except _left_to_cpu() as exc:
                _log.warning("a unit is restored by the CPU: %s", exc)
                self._settle(*gpus)
                return self._start_on_cpu(unit, planes, ticket, gpu, arena, target)
        except BaseException as exc:
            # Kernels may be reading the planes and writing leased blocks.
            self._settle(*gpus)
            if isinstance(exc, RuntimeError):
                raise self._failure(gpu, exc) from exc
            raise
        # Tensors need not be kept: torch gives their memory only to what comes later on the stream.
        return GpuJob("gpu", gpu, ticket, pending)

    def close_batch(self, jobs: Sequence[GpuJob]) -> GpuBatch:
        """What `finish` is to wait for at one time; nothing waits here."""
        batch = GpuBatch(jobs, [], {})
        for gpu in {job.gpu for job in jobs}:
            begun = [j for j, job in enumerate(jobs) if job.gpu == gpu and job.pending is not None]
            if not begun:
                continue
            try:
                pending = self._restorers[gpu].close_batch([jobs[j].pending for j in begun])
                batch.pending.append((gpu, begun, pending))
            except Exception as exc:  # noqa: BLE001 - `finish` must give the planes back
                self._settle(gpu)
                batch.errors.update(dict.fromkeys(begun, self._failure(gpu, exc)))
        return batch

    def finish(self, batch: GpuBatch) -> list[KVFetcherError | None]:
        """Wait for all; what is wrong with each, or None."""
        errors: dict[int, KVFetcherError | None] = dict(batch.errors)
        try:
            for gpu, begun, pending in batch.pending:
                errors.update(zip(begun, self._finish_on(gpu, pending), strict=True))
        finally:
            for index, job in enumerate(batch.jobs):
                if job.ticket is not None:
                    lost = self._give_back(job.ticket)
                    errors[index] = errors.get(index) or lost
        return [errors.get(index) for index in range(len(batch.jobs))]

    def drop(self, planes_at: str) -> None:
        """Give planes back whose unit cannot be restored."""
        with contextlib.suppress(LayoutError):
            self._reader.drop(PlaneTicket.from_json(planes_at))

    def is_lost(self) -> bool:
        """Whether a GPU failed so that this process can use it no more."""
        return self._is_lost

    def close(self) -> None:
        """Let go of the decoders' memory."""
        self._reader.close()

    def _start_on_cpu(
        self,
        unit: Unit,
        planes: NDArray[np.uint8],
        ticket: PlaneTicket | None,
        gpu: int,
        arena: Arena,
        target: BlockTarget,
    ) -> GpuJob:
        host = planes if ticket is None else self._download(unit, ticket)
        arena.write(target, unit.layer_start, profiles.restore_parsed(unit, host))
        return GpuJob("cpu", gpu, ticket)

    def _finish_on(self, gpu: int, pending: PendingBatch) -> list[KVFetcherError | None]:
        try:
            found: list[KVFetcherError | None] = self._restorers[gpu].finish(pending)
        except RuntimeError as exc:
            self._settle(gpu)
            return [self._failure(gpu, exc)] * len(pending.units)
        except BaseException:
            self._settle(gpu)
            raise
        return found

    def _settle(self, *gpus: int) -> None:
        """Wait until nothing of this process runs on these GPUs, and see whether they still work."""
        for gpu in gpus:
            self._is_lost |= cuda_context(gpu).is_lost()

    def _failure(self, gpu: int, exc: Exception) -> GpuError:
        """What torch and the driver raise, as an error of ours."""
        _log.error("GPU %d failed at restoring", gpu, exc_info=exc)
        return GpuError(f"GPU {gpu} failed at restoring ({type(exc).__name__}); see the server log")

    def _restorer(self, gpu: int) -> Any:
        if gpu not in self._restorers:
            try:
                from kvfetcher.codec.gpu.restore import GpuRestorer
            except ImportError as exc:
                _log.warning("units are restored by the CPU and copied to GPU %d: %s", gpu, exc)
                self._restorers[gpu] = None
            else:
                self._restorers[gpu] = GpuRestorer(f"cuda:{gpu}")
        return self._restorers[gpu]

    def _planes(
        self, unit: Unit, planes: NDArray[np.uint8], ticket: PlaneTicket | None, gpu: int
    ) -> Any:
        import torch

        from kvfetcher.codec.gpu.restore import GpuPlanes

        geometry = unit.geometry
        device = torch.device("cuda", gpu)
        if not geometry.num_frames:  # nothing is looked at
            return GpuPlanes(torch.empty(geometry.shape, dtype=torch.uint8, device=device), 0)
        if ticket is not None:
            tensor = self._tensor(unit, ticket)
            return GpuPlanes(tensor.to(device), ticket.shift)
        if planes.nbytes != geometry.num_bytes:
            raise LayoutError(
                f"planes must be {geometry.shape} {geometry.dtype}, got {planes.nbytes} bytes"
            )
        signed = np.uint8 if geometry.dtype.itemsize == 1 else np.int16
        host = np.ascontiguousarray(planes).view(signed).reshape(geometry.shape)
        return GpuPlanes(torch.from_numpy(host.copy()).to(device), 0)

    def _tensor(self, unit: Unit, ticket: PlaneTicket) -> Any:
        from kvfetcher.memory.gpu_arena import as_tensor

        geometry = unit.geometry
        if ticket.num_bytes != geometry.num_bytes:
            raise LayoutError(
                f"planes must be {geometry.num_bytes} bytes, the ticket has {ticket.num_bytes}"
            )
        return as_tensor(
            self._reader.address(ticket),
            geometry.shape,
            item_bytes=geometry.dtype.itemsize,
            gpu=ticket.gpu,
        )

    def _download(self, unit: Unit, ticket: PlaneTicket) -> NDArray[Any]:
        host: NDArray[Any] = self._tensor(unit, ticket).cpu().numpy().view(unit.geometry.dtype)
        return host >> ticket.shift

    def _destination(self, unit: Unit, arena: Arena, target: BlockTarget) -> Any:
        import torch

        from kvfetcher.codec.gpu.restore import Destination

        key = (arena.gpu or 0, target.block_ids)
        if key not in self._block_ids:
            ids = torch.tensor(target.block_ids, dtype=torch.int32)
            # Not blocking: the driver takes its own copy, and nothing before it is waited for.
            self._block_ids[key] = ids.to(arena.blocks.device, non_blocking=True)
            if len(self._block_ids) > _MAX_KNOWN_TARGETS:
                self._block_ids.popitem(last=False)
        return Destination(arena.blocks, self._block_ids[key], unit.layer_start)

    def _give_back(self, ticket: PlaneTicket) -> KVFetcherError | None:
        try:
            self._reader.finish(ticket)
        except GpuError as exc:
            return exc
        return None
