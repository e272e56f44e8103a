"""The paged engine with its connector over a tiny model, and short ways to use it."""

import contextlib

from kvfetcher.config import (
    CodecConfig,
    Config,
    ConnectorConfig,
    EngineConfig,
    FetchConfig,
    SaveConfig,
)
from kvfetcher.engines.base import GenerateRequest, SamplingParams
from kvfetcher.engines.paged.host import open_paged_engine
from kvfetcher.memory.arena import Arena
from kvfetcher.memory.leases import LeaseTable
from support.engine_rig import BLOCK, CHUNK, SLICE, collect


class PagedRig:
    """As `engine_rig.Rig`, with the engine that runs behind the KV connector."""

    def __init__(self, loaded, folder, *, num_bytes=1 << 20, layout="HND", **options):
        self.config = Config(
            engine=EngineConfig(
                **{
                    "prefill_slice_tokens": SLICE,
                    "tokens_per_block": BLOCK,
                    "max_running_requests": 32,
                }
                | options.pop("engine", {})
            ),
            connector=ConnectorConfig(
                **{"pool_bytes": 1 << 20, "device_reuse": False} | options.pop("connector", {})
            ),
            codec=CodecConfig(chunk_tokens=CHUNK),
            fetch=FetchConfig(),
            save=SaveConfig(**options.pop("save", {})),
        )
        assert not options, options
        self.now = 0.0
        self._stack = contextlib.ExitStack()
        self.arena = Arena.create(
            folder / "arena",
            spec=loaded.spec,
            tokens_per_block=self.config.engine.tokens_per_block,
            num_bytes=num_bytes,
        )
        self._stack.callback(self.arena.close)
        self.leases = LeaseTable(
            num_blocks=self.arena.num_blocks, tokens_per_block=self.arena.tokens_per_block
        )
        self.engine = open_paged_engine(
            loaded,
            self.config,
            folder=folder,
            arena=self.arena,
            leases=self.leases,
            clock=lambda: self.now,
            closing=self._stack,
            pool_layout=layout,
        )
        self._stack.callback(self.engine.close)

    def request(self, ids, *, max_tokens=8, lease=None, save=False, salt="", **sampling):
        return GenerateRequest(
            tuple(ids),
            SamplingParams(max_tokens=max_tokens, **sampling),
            lease=lease,
            save=save,
            cache_salt=salt,
        )

    async def run(self, ids, *, is_cancelled=None, **options):
        """All of a request's output at once."""
        request = self.request(ids, **options)
        return await collect(self.engine.generate(request, is_cancelled=is_cancelled))

    def close(self):
        self._stack.close()
