"""`kv_save`: the saver with Triton's `kv_encode` as its encoder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from kvfetcher import wire
from kvfetcher.backend.leases import EngineLeases
from kvfetcher.backend.metrics import Metrics, store_observer
from kvfetcher.backend.tags import compare
from kvfetcher.backend.tensors import ids_tensor, text_tensor
from kvfetcher.errors import CodecError, RequestError
from kvfetcher.format.container import parse_header
from kvfetcher.memory.arena import BlockTarget
from kvfetcher.memory.control import run_dir
from kvfetcher.memory.leases import SaveTicket
from kvfetcher.memory.permits import Permits
from kvfetcher.save import Saver, SaveReport
from kvfetcher.storage import open_store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kvfetcher.config import Config
    from kvfetcher.fetch.fetcher import FetchFacts
    from kvfetcher.format.keys import ChunkKey


def seal_ticket(ticket: SaveTicket, token_ids: NDArray[np.int32], permits: Permits) -> str:
    """What `kv_save` takes: the ticket without its token ids, which travel as a tensor, sealed."""
    data = ticket.to_dict()
    del data["token_ids"]
    return permits.seal("save", json.dumps(data, separators=(",", ":")), token_ids.tobytes())


def open_ticket(sealed: str, token_ids: NDArray[np.int32], permits: Permits) -> SaveTicket:
    """Inverse of `seal_ticket`, once each.

    Raises:
        PermissionDeniedError: `tensorrt_llm` of this server run did not give it out, or it was used.
        RequestError: not such JSON.
        LayoutError: a target is none.
    """
    text = permits.open("save", sealed, token_ids.tobytes(), once=True)
    try:
        data = json.loads(text)
        targets = tuple(BlockTarget.from_dict(target) for target in data.pop("targets"))
        return SaveTicket(targets=targets, token_ids=tuple(token_ids.tolist()), **data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise RequestError(f"input {wire.KV_LEASE!r} is not a save ticket: {exc}") from exc


class SaveService:
    """The saver and what it borrows."""

    def __init__(self, config: Config, pb_utils: Any) -> None:
        self._pb_utils = pb_utils
        self._leases = EngineLeases(config)
        self._permits = Permits.of_run()
        self._metrics = Metrics(pb_utils)
        observe = store_observer(self._metrics, "kvfetcher_save_store")
        self._saver = Saver(
            store=open_store(config.store, observe=observe),
            leases=self._leases,
            encode_chunk=self._encode_chunk,
            chunks_in_flight=config.save.chunks_in_flight,
        )

    async def save(self, input_ids: NDArray[np.int32], ticket_json: str) -> SaveReport:
        """See `Saver.save`."""
        return await self._saver.save(open_ticket(ticket_json, input_ids, self._permits))

    async def _encode_chunk(
        self, tokens: NDArray[np.int32], key: ChunkKey, facts: FetchFacts, target: BlockTarget
    ) -> bytes:
        pb_utils = self._pb_utils
        sealed = self._permits.seal("read", target.to_json())
        spec = {
            "spec": facts.spec.to_dict(),
            "first_position": key.index * facts.chunk_tokens,
            "identity_digest": facts.identity_digest.hex(),
            "chunk_key": key.key.hex(),
            "parent_key": key.parent.hex(),
        }
        response = await pb_utils.InferenceRequest(
            model_name=wire.KV_ENCODE,
            requested_output_names=[wire.CHUNK],
            inputs=[
                ids_tensor(wire.INPUT_IDS, tokens, pb_utils),
                text_tensor(wire.KV_SPEC, json.dumps(spec), pb_utils),
                text_tensor(wire.KV_TARGET, sealed, pb_utils),
            ],
        ).async_exec()
        if response.has_error():
            raise CodecError(f"kv_encode: {response.error().message()}")
        chunk = pb_utils.get_output_tensor_by_name(response, wire.CHUNK).as_numpy().tobytes()
        header = parse_header(chunk)
        compare(
            f"{header.chunk_key.hex()} {header.identity.hex()}",
            f"{key.key.hex()} {facts.identity_digest.hex()}",
            model=wire.KV_ENCODE,
            run_folder=run_dir(),
        )
        return bytes(chunk)

    def close(self) -> None:
        """Close the connection to the engine and drop the series."""
        self._metrics.close()
        self._leases.close()


def build_saver(config: Config, pb_utils: Any) -> SaveService:
    """The service of `kv_save`."""
    return SaveService(config, pb_utils)
