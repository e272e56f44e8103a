"""How a fetch inside an ensemble learns that its client went away.

Triton (2.51 to 2.73dev) marks only an ensemble's *next* step as cancelled, never the running one.
While it fetches, `kv_fetch` therefore sends signs of life: responses that make the ensemble start
its next step, `tensorrt_llm`, for a moment. That one sees the mark, notes it in the engine process,
drops the sign, and is asked over the control socket.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from kvfetcher import wire
from kvfetcher.backend.params import GenerationOptions, seal_options
from kvfetcher.backend.respond import send, send_error, settle_ensemble
from kvfetcher.backend.tensors import ids_tensor, text_tensor
from kvfetcher.errors import KVFetcherError, RequestCancelledError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kvfetcher.memory.permits import Permits

_log = logging.getLogger(__name__)

# A fetch that is over sooner sends no sign.
_SIGN_SECONDS = 0.2
# A sign takes about a millisecond of the server: all fetches together send at most 200 a second.
_SECONDS_PER_WATCH = 0.005
# The next step takes about a millisecond.
_ANSWER_SECONDS = 0.02


@dataclass(slots=True)
class Watches:
    """How many clients are watched now; shared by the watches of a process."""

    count: int = 0

    def sign_seconds(self) -> float:
        """How long each waits between two signs."""
        return max(_SIGN_SECONDS, _SECONDS_PER_WATCH * self.count)


class ClientWatch:
    """Watches the client of one request while its context lasts.

    Args:
        watches: counts it.
        sender: the request's response sender.
        pb_utils: the module `triton_python_backend_utils`.
        was_cancelled: asks the engine process about a fetch's id.
        permits: permits of the server run; the next step takes no sign without one.
        in_ensemble: there is a next step; a model that is used alone is marked itself.
    """

    def __init__(
        self,
        watches: Watches,
        sender: Any,
        pb_utils: Any,
        *,
        was_cancelled: Callable[[str], Awaitable[bool]],
        permits: Permits,
        in_ensemble: bool,
    ) -> None:
        self.in_ensemble = in_ensemble
        self.has_signed = False
        """Whether the next step was started before: an error must let it settle first."""
        self._watches = watches
        self._sender = sender
        self._pb_utils = pb_utils
        self._was_cancelled = was_cancelled
        self._permits = permits
        self._fetch_id = secrets.token_hex(8)
        self._is_gone = False
        self._task: asyncio.Task[None] | None = None

    def is_gone(self) -> bool:
        """Whether the client went away, as far as is known.

        A step of an ensemble is never marked while it runs: asking costs a message for nothing.
        """
        return self._is_gone if self.in_ensemble else bool(self._sender.is_cancelled())

    async def __aenter__(self) -> Self:
        self._watches.count += 1
        if self.in_ensemble:
            self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watches.count -= 1
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _watch(self) -> None:
        try:
            while not self._is_gone:
                await asyncio.sleep(self._watches.sign_seconds())
                self.has_signed = True
                send(self._sender, self._sign(), self._pb_utils, is_last=False)
                await asyncio.sleep(_ANSWER_SECONDS)
                self._is_gone = await self._was_cancelled(self._fetch_id)
        except KVFetcherError as exc:  # the engine is gone: the fetch will notice by itself
            _log.warning("fetch %s is not watched any more: %s", self._fetch_id, exc)

    def _sign(self) -> Any:
        pb_utils = self._pb_utils
        options = GenerationOptions(fetch_id=self._fetch_id)
        return pb_utils.InferenceResponse(
            output_tensors=[
                ids_tensor(wire.INPUT_IDS, np.zeros(0, np.int32), pb_utils),
                text_tensor(wire.SAMPLING, seal_options(options, self._permits), pb_utils),
                text_tensor(wire.KV_LEASE, "", pb_utils),
                text_tensor(wire.KV_REPORT, "", pb_utils),
            ]
        )


async def end_fetch(watch: ClientWatch, sender: Any, exc: BaseException, pb_utils: Any) -> None:
    """End a request's responses with a failure.

    Nobody waits for a cancelled one, and an ensemble that gets an error while another of its steps
    runs never ends: it ends without.
    """
    if watch.in_ensemble and isinstance(exc, RequestCancelledError):
        send(sender, None, pb_utils, is_last=True)
        return
    if watch.has_signed:
        await settle_ensemble()
    send_error(sender, exc, pb_utils)
