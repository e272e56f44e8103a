"""The engine process's belongings in one place: model, arena, leases, engine, control socket."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Self

from kvfetcher.engines.factory import prepare_engine
from kvfetcher.engines.streams import Streams
from kvfetcher.errors import ConfigError
from kvfetcher.memory.arena import Arena
from kvfetcher.memory.control import ControlServer, socket_path
from kvfetcher.memory.cuda import cuda_context
from kvfetcher.memory.leases import LeaseTable
from kvfetcher.memory.split_arena import create_arena, publish_arena, withdraw_arenas
from kvfetcher.models.folders import prepare_model
from kvfetcher.spec import heads_of_rank

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfetcher.config import Config, EngineConfig
    from kvfetcher.spec import HeadRange, KVSpec

SHARED_MEMORY = Path("/dev/shm")

_log = logging.getLogger(__name__)


class EngineHost:
    """Everything the engine process owns, opened together and closed in the right order.

    Args:
        config: the whole configuration.
        run_folder: where the control socket goes; None = `control.run_dir()`.
        arena_folder: where the arena file goes.
        progress: gets one sentence before each long step.

    Raises:
        ConfigError, EngineError, ArenaError: see `prepare_model`, `prepare_engine`, `open_arena`.
    """

    def __init__(
        self,
        config: Config,
        *,
        run_folder: Path | None = None,
        arena_folder: Path = SHARED_MEMORY,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        with contextlib.ExitStack() as stack:
            folder = prepare_model(config.engine.model, progress=progress)
            socket = socket_path(run_folder)
            opening = prepare_engine(config, folder.path, socket.parent, progress=progress)
            removed = Arena.sweep(arena_folder, _arena_name("*"))
            if removed:
                _log.warning("removed %d arena file(s) of engines that died", removed)
            self.arena = open_arena(
                arena_folder / _arena_name(socket.parent.name),
                opening.spec,
                config.engine,
                devices=opening.devices,
            )
            stack.callback(self.arena.close)
            stack.callback(self.arena.unlink)
            withdraw_arenas(socket.parent)
            published = publish_arena(socket.parent, self.arena)
            stack.callback(published.unlink, missing_ok=True)
            gpus = {part.gpu for part in self.arena.parts}
            if config.engine.kind != "tensorrt_llm":  # its workers are processes that it watches
                gpus |= {_gpu_of(device) for device in opening.devices}
            self._contexts = [cuda_context(gpu) for gpu in gpus if gpu is not None]
            self.leases = LeaseTable(
                num_blocks=self.arena.num_blocks, tokens_per_block=self.arena.tokens_per_block
            )
            self.engine = opening.open(self.arena, self.leases, stack)
            stack.callback(self.engine.close)
            self.streams = Streams()
            self.control = ControlServer(
                socket,
                arena=self.arena,
                leases=self.leases,
                describe=lambda: self.engine.describe().to_dict(),
                stats=self.engine.stats,
                cancel=self.streams.cancel,
                was_cancelled=self.streams.was_cancelled,
            )
            stack.callback(self.control.close)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_lost(self) -> bool:
        """Whether a GPU failed so that this process can use it no more; waits for its work there."""
        return any(context.is_lost() for context in self._contexts)

    def close(self) -> None:
        """Close the socket, the engine and the arena, and remove their files. Safe to call twice."""
        self._stack.close()


def open_arena(
    path: Path, spec: KVSpec, config: EngineConfig, *, devices: tuple[str, ...]
) -> Arena:
    """A new arena where `engine.arena` wants it, with a part for each range of heads that ranks hold.

    Args:
        path: path of its file, or of its parts' (`split_arena.create_arena`).
        spec: geometry of the whole model.
        config: where, and how large.
        devices: where the model is, by tensor-parallel rank. Ranks that hold the same heads share
            a part, which lies at the first of them.

    Raises:
        ConfigError: it is wanted on a GPU and the model runs on the CPU, it holds no block, or the
            heads cannot be divided among the ranks.
        ArenaError: there is not enough memory.
    """
    gpus = [_gpu_of(device) for device in devices]
    has_gpus = None not in gpus
    if config.arena == "gpu" and not has_gpus:
        raise ConfigError(
            f"engine.arena = 'gpu', but the model runs on {devices[0]}; set engine.device to cuda or"
            " engine.arena to auto"
        )
    places: dict[HeadRange, int | None] = {}
    for rank, gpu in enumerate(gpus):
        heads = heads_of_rank(spec.num_kv_heads, rank=rank, num_ranks=len(devices))
        places.setdefault(heads, gpu if config.arena != "host" and has_gpus else None)
    return create_arena(
        path,
        spec=spec,
        tokens_per_block=config.tokens_per_block,
        num_bytes=config.arena_bytes,
        places=places,
    )


def _gpu_of(device: str) -> int | None:
    """The index in a name as torch has it; None = it names no GPU."""
    kind, _, index = device.partition(":")
    return int(index or 0) if kind == "cuda" else None


def _arena_name(run: str) -> str:
    """Of the run folder, whose owner removes what a killed server left (`server.rundir`)."""
    return f"kvfetcher-{run}-arena"
