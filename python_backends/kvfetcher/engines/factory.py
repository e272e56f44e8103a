"""From the configuration to a running engine, by kind: what must be known first, and how it is opened.

Each kind's modules are imported when it is chosen: TensorRT-LLM's image has another transformers than the
torch engine is written for.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable
    from pathlib import Path

    from kvfetcher.config import Config
    from kvfetcher.engines.base import Engine
    from kvfetcher.memory.arena import Arena
    from kvfetcher.memory.leases import LeaseTable
    from kvfetcher.spec import KVSpec


class Opening(Protocol):
    """An engine whose model is known and whose arena is still to be made."""

    @property
    def spec(self) -> KVSpec: ...

    @property
    def devices(self) -> tuple[str, ...]:
        """Where the model runs, by tensor-parallel rank: "cuda:N", or "cpu"."""
        ...

    def open(self, arena: Arena, leases: LeaseTable, closing: contextlib.ExitStack) -> Engine:
        """Start the engine on its arena; `closing` gets what must be closed after it.

        Raises:
            ConfigError, EngineError: it cannot run so.
        """
        ...


def prepare_engine(
    config: Config, model: Path, run_folder: Path, *, progress: Callable[[str], None]
) -> Opening:
    """Load or read the model of the configured engine.

    Args:
        config: the whole configuration.
        model: folder of the model.
        run_folder: for sockets.
        progress: gets one sentence before each long step.

    Raises:
        ConfigError, EngineError: see `loader.load_model`, `tensorrt_llm.read_model`.
    """
    if config.engine.kind == "tensorrt_llm":
        return _TensorrtLlm(config, model, run_folder, progress)
    progress(f"loading model {model.name}")
    if config.engine.kind == "paged":
        return _Paged(config, model, run_folder)
    return _Torch(config, model)


class _Torch:
    def __init__(self, config: Config, model: Path) -> None:
        from kvfetcher.engines.hf.loader import load_model

        self._config = config
        self._loaded = load_model(
            model,
            device=config.engine.device,
            kv_dtype=config.engine.kv_dtype,
            chunk_tokens=config.codec.chunk_tokens,
        )
        self.spec = self._loaded.spec
        self.devices = (str(self._loaded.device),)

    def open(self, arena: Arena, leases: LeaseTable, closing: contextlib.ExitStack) -> Engine:
        from kvfetcher.engines.hf.engine import TorchEngine

        return TorchEngine(self._loaded, self._config, arena=arena, leases=leases)


class _Paged:
    def __init__(self, config: Config, model: Path, run_folder: Path) -> None:
        from kvfetcher.engines.hf.loader import load_model

        self._config = config
        self._run_folder = run_folder
        self._loaded = load_model(
            model,
            device=config.engine.device,
            kv_dtype=config.engine.kv_dtype,
            chunk_tokens=config.codec.chunk_tokens,
        )
        self.spec = self._loaded.spec
        self.devices = (str(self._loaded.device),)

    def open(self, arena: Arena, leases: LeaseTable, closing: contextlib.ExitStack) -> Engine:
        from kvfetcher.engines.paged.host import open_paged_engine

        return open_paged_engine(
            self._loaded,
            self._config,
            folder=self._run_folder,
            arena=arena,
            leases=leases,
            clock=time.monotonic,
            closing=closing,
        )


class _TensorrtLlm:
    def __init__(
        self, config: Config, model: Path, run_folder: Path, progress: Callable[[str], None]
    ) -> None:
        from kvfetcher.engines import tensorrt_llm

        self._config = config
        self._run_folder = run_folder
        self._progress = progress
        self._arguments = tensorrt_llm.llm_arguments(config, model)
        version = str(tensorrt_llm.import_tensorrt_llm().__version__)
        self._model = tensorrt_llm.read_model(
            model, config, version=version, arguments=self._arguments
        )
        self.spec = self._model.spec
        # Assumed: rank N runs on the N-th visible GPU. A wrong guess costs copies between GPUs only.
        self.devices = tuple(f"cuda:{rank}" for rank in range(self._arguments.num_ranks))

    def open(self, arena: Arena, leases: LeaseTable, closing: contextlib.ExitStack) -> Engine:
        from kvfetcher.engines.connector.engine import ConnectedEngine
        from kvfetcher.engines.connector.server import open_hub
        from kvfetcher.engines.tensorrt_llm import end_process, start_llm

        hub = open_hub(
            self._config,
            self.spec,
            folder=self._run_folder,
            arena=arena,
            num_ranks=self._arguments.num_ranks,
            leases=leases,
            clock=time.monotonic,
        )
        closing.callback(hub.close)
        self._progress("starting TensorRT-LLM")
        source = start_llm(self._arguments, run_folder=self._run_folder)
        closing.callback(source.close)
        return ConnectedEngine(
            "tensorrt_llm",
            self._model,
            self._config,
            source=source,
            hub=hub,
            arena=arena,
            leases=leases,
            on_lost=end_process,
            clock=time.monotonic,
        )
