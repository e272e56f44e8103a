"""`postprocessing`: what of the engine's responses the client gets, and who is still there."""

from __future__ import annotations

import logging
from typing import Any

from kvfetcher import wire
from kvfetcher.backend.tensors import (
    count_tensor,
    ids_tensor,
    read_ids,
    read_scalar,
    read_text,
    text_tensor,
)
from kvfetcher.errors import KVFetcherError
from kvfetcher.memory.control import ControlClient, socket_path

_log = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 5.0
_TEXTS = (wire.TEXT_OUTPUT, wire.FINISH_REASON, wire.KV_REPORT)


class AnswerRelay:
    """Passes responses on, one request of Triton each. Not thread-safe."""

    def __init__(self, pb_utils: Any) -> None:
        self._pb_utils = pb_utils
        self._control = ControlClient(socket_path(), timeout_seconds=_TIMEOUT_SECONDS)

    def pass_on(self, request: Any) -> Any:
        """The client's InferenceResponse, or None for a heartbeat or a client that went away."""
        pb_utils = self._pb_utils
        if request.is_cancelled():
            self._stop(read_text(request, wire.STREAM_ID, pb_utils))
            return None
        texts = {name: read_text(request, name, pb_utils) for name in _TEXTS}
        ids = read_ids(request, wire.OUTPUT_IDS, pb_utils)
        if not ids.size and not any(texts.values()):
            return None
        num_input_tokens = read_scalar(request, wire.NUM_INPUT_TOKENS, pb_utils) or 0
        tensors = [text_tensor(name, text, pb_utils) for name, text in texts.items()]
        tensors += [
            ids_tensor(wire.OUTPUT_IDS, ids, pb_utils),
            count_tensor(wire.NUM_INPUT_TOKENS, num_input_tokens, pb_utils),
            count_tensor(wire.NUM_OUTPUT_TOKENS, ids.size, pb_utils),
        ]
        wanted = request.requested_output_names()
        return pb_utils.InferenceResponse(output_tensors=[t for t in tensors if t.name() in wanted])

    def _stop(self, stream_id: str) -> None:
        try:
            if self._control.cancel(stream_id):
                _log.info("stream %s: its client went away", stream_id)
        except KVFetcherError as exc:
            _log.warning("stream %s cannot be cancelled: %s", stream_id, exc)

    def close(self) -> None:
        """Close the connection to the engine."""
        self._control.close()
