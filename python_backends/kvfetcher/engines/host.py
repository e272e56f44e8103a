"""The engine process's belongings in one place: model, arena, leases, engine, control socket."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Self

from kvfetcher.arena import Arena
from kvfetcher.control import ControlServer, socket_path
from kvfetcher.engines.models import prepare_model
from kvfetcher.engines.opening import prepare_engine
from kvfetcher.engines.streams import Streams
from kvfetcher.errors import ConfigError
from kvfetcher.leases import LeaseTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfetcher.config import Config, EngineConfig
    from kvfetcher.spec import KVSpec

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
        ConfigError, EngineError, ArenaError: see `prepare_model`, `prepare_engine`, `Arena.create`.
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
                device=opening.device,
            )
            stack.callback(self.arena.close)
            stack.callback(self.arena.unlink)
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

    def close(self) -> None:
        """Close the socket, the engine and the arena, and remove their files. Safe to call twice."""
        self._stack.close()


def open_arena(path: Path, spec: KVSpec, config: EngineConfig, *, device: str) -> Arena:
    """A new arena where `engine.arena` wants it; `device` is where the model is.

    Raises:
        ConfigError: it is wanted on a GPU and the model runs on the CPU, or it holds no block.
        ArenaError: there is not so much memory.
    """
    sizes = {"tokens_per_block": config.tokens_per_block, "num_bytes": config.arena_bytes}
    if config.arena == "host" or (config.arena == "auto" and not device.startswith("cuda")):
        return Arena.create(path, spec=spec, **sizes)
    if not device.startswith("cuda"):
        raise ConfigError(
            f"engine.arena = 'gpu', but the model runs on {device}; set engine.device to cuda or"
            " engine.arena to auto"
        )
    from kvfetcher.gpu_arena import GpuArena

    index = int(device.partition(":")[2] or 0)
    return GpuArena.create_on(index, path, spec=spec, **sizes)


def _arena_name(run: str) -> str:
    """Of the run folder, whose owner removes what a killed server left (`server.rundir`)."""
    return f"kvfetcher-{run}-arena"
