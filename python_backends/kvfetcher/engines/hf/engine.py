"""The embedded engine: a Hugging Face model on CPU or GPU, one thread, several requests at once.

Each turn of the loop runs at most one prefill slice, one decode step of every running stream, and
one chunk's copy of a request that is being saved; a long prompt therefore slows running streams by
one slice per token and never stops them. Decode steps run one by one, not batched: a request's
numbers do not depend on its neighbours.

A prefix hit and a full computation give the same bits from the end of the hit on, because
(1) the cache holds values already rounded to the shared KV dtype (`kv_cache`), (2) prefill slices
end at absolute multiples of engine.prefill_slice_tokens (`schedule.slice_end`), and (3) the logits
after a prompt that ends at such a multiple always come from a pass over its last token alone
(`_score_last_token`), since that is all that is left to compute when the hit covers the prompt.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvfetcher.engines.admission import check_request, claim_lease, stop_rules
from kvfetcher.engines.base import EngineInfo, GenerateEvent
from kvfetcher.engines.hf.kv_cache import SequenceCache
from kvfetcher.engines.hf.model_call import forward
from kvfetcher.engines.hf.request_state import EventPipe, Sequence
from kvfetcher.engines.hf.states import LOSSLESS_PROFILES, StatefulCache
from kvfetcher.engines.schedule import WaitingLine, slice_end
from kvfetcher.errors import (
    ArenaFullError,
    EngineError,
    KVFetcherError,
    LeaseError,
)
from kvfetcher.memory.leases import SaveTicket, chunks_to_save, tokens_digest
from kvfetcher.prefill_rate import PrefillEstimator

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from kvfetcher.config import Config
    from kvfetcher.engines.base import GenerateRequest
    from kvfetcher.engines.hf.loader import LoadedModel
    from kvfetcher.memory.arena import Arena
    from kvfetcher.memory.leases import Lease, LeaseTable
    from kvfetcher.prefill_rate import PrefillModel

# Shorter slices are dominated by fixed costs and say little about the rate.
_MIN_RATE_TOKENS = 32
# Stands in only until the warm-up has run its first slice.
_PRIOR_TOKENS_PER_SECOND = 1000.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class EngineCounters:
    """Totals since the start. Written by the engine's thread (refused, leases: by submitters)."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    leases_used: int = 0
    leases_refused: int = 0
    saves: int = 0
    saves_dropped: int = 0


@dataclass(slots=True)
class _Saving:
    """A finished request whose chunks are being copied into the arena."""

    sequence: Sequence
    lease: Lease
    chunks: range
    done: int = 0


class TorchEngine:
    """See the module's text; methods as in `base.Engine`. Call `close` when done.

    Args:
        loaded: the model.
        config: sections engine, codec.chunk_tokens, fetch.lease_ttl_seconds, save.
        arena: arena of the model's spec; stays the caller's to close, after the engine.
        leases: over the arena's blocks; shared with the control server.
        clock: seconds, monotonic; the one that the control server leases with.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: Config,
        *,
        arena: Arena,
        leases: LeaseTable,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loaded = loaded
        self._config = config
        self._arena = arena
        self._leases = leases
        self._clock = clock
        self._slice_tokens = config.engine.prefill_slice_tokens
        self._chunk_tokens = config.codec.chunk_tokens
        # One position is kept for the first generated token.
        self.max_prompt_tokens = min(
            config.engine.max_prompt_tokens or loaded.max_positions - 1, loaded.max_positions - 1
        )
        self._check_states()
        self._counters = EngineCounters()
        self._prefill_estimator = PrefillEstimator(prior_tokens_per_second=_PRIOR_TOKENS_PER_SECOND)
        self._prefill_lock = threading.Lock()
        self._line: WaitingLine[Sequence] = WaitingLine(
            max_running=config.engine.max_running_requests,
            max_waiting=config.engine.max_waiting_requests,
        )
        self._prefilling: list[Sequence] = []
        self._decoding: list[Sequence] = []
        self._saving: list[_Saving] = []
        self._changed = threading.Condition()
        self._closing = False
        self._dead = ""
        if config.engine.num_threads:
            torch.set_num_threads(config.engine.num_threads)
        self._warm_up()
        self._thread = threading.Thread(target=self._run, name="kvfetcher-engine", daemon=True)
        self._thread.start()

    def describe(self) -> EngineInfo:
        loaded = self._loaded
        return EngineInfo(
            engine="torch",
            model=str(loaded.folder),
            device=str(loaded.device),
            identity=loaded.identity,
            tokens_per_block=self._arena.tokens_per_block,
            chunk_tokens=self._chunk_tokens,
            arena=self._arena.paths,
            generation=self._arena.generation,
            eos_ids=loaded.eos_ids,
            vocab_size=loaded.vocab_size,
            max_prompt_tokens=self.max_prompt_tokens,
            max_output_tokens=self._config.engine.max_output_tokens,
            prefill_tokens_per_second=1 / self._prefill_model().base_seconds,
            rope=loaded.rope,
        )

    def stats(self) -> dict[str, Any]:
        prefill = asdict(self._prefill_model())
        with self._changed:
            return {
                **asdict(self._counters),
                "waiting": len(self._line),
                "running": self._num_running(),
                "prefill": prefill,
                "dead": self._dead,
            }

    async def generate(
        self, request: GenerateRequest, *, is_cancelled: Callable[[], bool] | None = None
    ) -> AsyncGenerator[GenerateEvent]:
        pipe = EventPipe(is_cancelled)
        self._submit(request, pipe)
        try:
            while (event := await pipe.get()) is not None:
                yield event
        finally:
            pipe.leave()
            with self._changed:
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # Submission: any thread

    def _submit(self, request: GenerateRequest, pipe: EventPipe) -> None:
        max_tokens = check_request(
            request,
            vocab_size=self._loaded.vocab_size,
            max_prompt_tokens=self.max_prompt_tokens,
            max_output_tokens=self._config.engine.max_output_tokens,
            max_positions=self._loaded.max_positions,
        )
        rules = stop_rules(
            self._loaded.tokenizer,
            eos_ids=self._loaded.eos_ids,
            stop_words=request.sampling.stop_words,
        )
        with self._changed:
            if self._dead or self._closing:
                raise EngineError(self._dead or "the engine is closed")
            try:
                self._line.check_room(self._num_running())
            except KVFetcherError:
                self._counters.refused += 1
                raise
            # Claimed now, not when its turn comes: a lease must not expire in the line.
            lease, lease_error = claim_lease(
                request,
                generation=self._arena.generation,
                leases=self._leases,
                now=self._clock(),
            )
            self._counters.leases_refused += bool(lease_error)
            self._line.add(
                Sequence(
                    request,
                    pipe,
                    tokenizer=self._loaded.tokenizer,
                    rules=rules,
                    max_tokens=max_tokens,
                    lease=lease,
                    lease_error=lease_error,
                )
            )
            self._changed.notify()

    # The loop: the engine's thread only

    def _num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding) + len(self._saving)

    def _run(self) -> None:
        reason = "the engine was closed"
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._turn()
        except BaseException as exc:  # noqa: BLE001  whatever it was, nobody may be left waiting
            reason = f"the engine's loop died: {exc!r}; restart the server"
            _log.exception("engine loop died")
        finally:
            self._abort_all(reason)

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._closing and not self._num_running() and not len(self._line):
                self._changed.wait()
            if self._closing:
                return False
            for sequence in [s for s in self._line if s.pipe.cancelled]:
                self._line.remove(sequence)
                self._drop_lease(sequence)
                self._counters.cancelled += 1
                sequence.cancel()
                sequence.pipe.put(None)
            self._prefilling += (admitted := self._line.admit(self._num_running()))
        for sequence in admitted:
            self._guard(sequence, self._start)
        return True

    def _turn(self) -> None:
        for sequence in [*self._prefilling, *self._decoding]:
            if sequence.pipe.cancelled:
                self._guard(sequence, self._cancel)
        if self._prefilling:
            # Round robin: the first in line gets one slice and goes to the end.
            sequence = self._prefilling.pop(0)
            self._prefilling.append(sequence)
            self._guard(sequence, self._prefill)
        for sequence in list(self._decoding):
            self._guard(sequence, self._decode)
        for saving in list(self._saving):
            self._guard(saving.sequence, functools.partial(self._save_chunk, saving))

    def _guard(self, sequence: Sequence, step: Callable[[Sequence], None]) -> None:
        """Run one step; its failure ends that request only."""
        try:
            step(sequence)
        except Exception as exc:  # noqa: BLE001  one request's failure is its own
            _log.exception("request %s failed", sequence.request.request_id)
            self._forget(sequence)
            if sequence.finish_reason:  # the answer is out; only the saving is lost
                self._counters.saves_dropped += 1
            else:
                self._counters.failed += 1
                sequence.pipe.put(
                    exc
                    if isinstance(exc, KVFetcherError)
                    else EngineError(f"the engine failed at this request: {exc!r}")
                )
            sequence.pipe.put(None)

    def _start(self, sequence: Sequence) -> None:
        sequence.mark_began()
        sequence.cache = self._new_cache(
            sequence.prompt_tokens + sequence.max_tokens,
            is_saved=sequence.request.save and self._config.save.enabled,
        )
        lease = sequence.lease
        if lease is None:
            return
        target = self._arena.target(lease.block_ids, lease.num_tokens)
        usable = lease.num_tokens
        if self._loaded.states is not None:
            # States are known at ends of chunks only, and the last token must be computed.
            usable = min(usable, sequence.prompt_tokens - 1) // self._chunk_tokens
            usable *= self._chunk_tokens
        # Only copies that are over have read the blocks: the lease goes after the last one.
        for first in range(0, usable, self._chunk_tokens):  # bounded extra memory
            part = target.span(
                first,
                min(self._chunk_tokens, usable - first),
                tokens_per_block=self._arena.tokens_per_block,
            )
            sequence.cache.append(self._arena.load(part))
        self._drop_lease(sequence)
        # The last prompt token is always computed: its logits are what the prefix is for.
        sequence.cached_tokens = min(usable, sequence.prompt_tokens - 1)
        if sequence.cached_tokens < usable and usable % self._slice_tokens:
            sequence.cache.truncate(sequence.cached_tokens)
        sequence.mark_loaded()
        self._counters.leases_used += 1
        self._counters.cached_tokens += sequence.cached_tokens

    def _prefill(self, sequence: Sequence) -> None:
        cache, prompt = _cache(sequence), sequence.prompt_tokens
        logits = None
        if cache.length < prompt:
            start, position = time.perf_counter(), cache.length
            end = slice_end(position, prompt, self._slice_tokens)
            logits = self._forward(sequence.ids[position:end], cache)
            self._counters.prefill_tokens += end - position
            sequence.add_compute(self._learn(position, end, start))
        if cache.length < prompt:
            return
        # With states a hit never covers the whole prompt, so that its last slice is always computed.
        if logits is None or (prompt % self._slice_tokens == 0 and self._loaded.states is None):
            logits = self._score_last_token(sequence)
        self._prefilling.remove(sequence)
        self._decoding.append(sequence)
        self._accept(sequence, logits)

    def _score_last_token(self, sequence: Sequence) -> torch.Tensor:
        """Logits after the prompt from a pass over its last token alone; the cache stays as it is.

        Costs one decode step, and only where the prompt ends at a slice's end.
        """
        cache = _cache(sequence)
        last = cache.length - 1
        kept = cache.export(last, last + 1)
        cache.truncate(last)
        logits = self._forward(sequence.ids[last : last + 1], cache)
        cache.truncate(last)
        cache.append(kept)
        return logits

    def _decode(self, sequence: Sequence) -> None:
        self._accept(sequence, self._forward(sequence.ids[-1:], _cache(sequence)))

    def _accept(self, sequence: Sequence, logits: torch.Tensor) -> None:
        sequence.accept(logits)
        self._counters.generated_tokens += 1
        if sequence.finish_reason:
            self._decoding.remove(sequence)
            self._counters.finished += 1
            self._begin_saving(sequence)

    def _cancel(self, sequence: Sequence) -> None:
        for running in (self._prefilling, self._decoding):
            if sequence in running:
                running.remove(sequence)
        self._counters.cancelled += 1
        sequence.cancel()
        self._begin_saving(sequence)

    def _begin_saving(self, sequence: Sequence) -> None:
        """Lease room for what is worth saving; without any, the request is over."""
        saving = self._lease_for_saving(sequence)
        if saving is None:
            self._finish(sequence)
        else:
            self._saving.append(saving)

    def _lease_for_saving(self, sequence: Sequence) -> _Saving | None:
        save = self._config.save
        if not (sequence.request.save and save.enabled) or sequence.pipe.gone:
            return None
        held = _cache(sequence).length
        if not save.generated or sequence.finish_reason == "cancelled":
            held = min(held, sequence.prompt_tokens)
        chunks = chunks_to_save(
            cached_tokens=sequence.cached_tokens,
            tokens_with_kv=held,
            chunk_tokens=self._chunk_tokens,
        )
        if not chunks:
            return None
        try:
            lease = self._leases.lease(
                len(chunks) * self._chunk_tokens,
                self._config.fetch.lease_ttl_seconds,
                now=self._clock(),
            )
        except ArenaFullError as exc:
            self._counters.saves_dropped += 1
            _log.info("request %s is not saved: %s", sequence.request.request_id, exc)
            return None
        return _Saving(sequence, lease, chunks)

    def _save_chunk(self, saving: _Saving, _: Sequence) -> None:
        """Copy one chunk; after the last, seal and hand the ticket over."""
        sequence, lease, size = saving.sequence, saving.lease, self._chunk_tokens
        if saving.done < len(saving.chunks):
            first = (saving.chunks.start + saving.done) * size
            on_gpu = self._arena.gpu is not None
            cache = _cache(sequence)
            export = cache.export_tensor if on_gpu else cache.export
            values = export(first, first + size)
            self._arena.write(self._save_target(saving, saving.done), 0, values)
            saving.done += 1
            return
        self._saving.remove(saving)
        first, end = saving.chunks.start * size, saving.chunks.stop * size
        self._leases.seal(
            lease.id, lease.num_tokens, tokens_digest(sequence.ids[first:end]), now=self._clock()
        )
        ticket = SaveTicket(
            lease_id=lease.id,
            targets=tuple(self._save_target(saving, i) for i in range(len(saving.chunks))),
            first_chunk_index=saving.chunks.start,
            token_ids=tuple(sequence.ids[:end]),
            cache_salt=sequence.request.cache_salt,
        )
        if sequence.pipe.put(GenerateEvent(save=ticket)):
            self._counters.saves += 1
        else:
            self._leases.release(lease.id, now=self._clock(), is_claimer=True)
        self._finish(sequence)

    def _save_target(self, saving: _Saving, index: int) -> Any:
        whole = self._arena.target(saving.lease.block_ids, saving.lease.num_tokens)
        return whole.span(
            index * self._chunk_tokens,
            self._chunk_tokens,
            tokens_per_block=self._arena.tokens_per_block,
        )

    def _finish(self, sequence: Sequence) -> None:
        sequence.cache = None
        sequence.pipe.put(None)

    def _forget(self, sequence: Sequence) -> None:
        """Take a failed request out of every list and give back what it held."""
        for running in (self._prefilling, self._decoding):
            if sequence in running:
                running.remove(sequence)
        for saving in [s for s in self._saving if s.sequence is sequence]:
            self._saving.remove(saving)
            self._release(saving.lease.id)
        self._drop_lease(sequence)
        sequence.cache = None

    def _drop_lease(self, sequence: Sequence) -> None:
        if sequence.lease is not None:
            lease, sequence.lease = sequence.lease, None
            self._release(lease.id)

    def _release(self, lease_id: str) -> None:
        try:
            self._leases.release(lease_id, now=self._clock(), is_claimer=True)
        except LeaseError as exc:  # a save that outlived its lease
            _log.warning("%s", exc)

    def _abort_all(self, reason: str) -> None:
        with self._changed:
            self._dead = reason
            everything = [
                *self._line.clear(),
                *self._prefilling,
                *self._decoding,
                *(saving.sequence for saving in self._saving),
            ]
        for sequence in everything:
            self._forget(sequence)
            if not sequence.finish_reason:
                sequence.pipe.put(EngineError(reason))
            sequence.pipe.put(None)

    # The model

    def _check_states(self) -> None:
        """Refuse settings with which a model's states cannot be kept."""
        if self._loaded.states is None:
            return
        codec = self._config.codec
        if codec.profile not in LOSSLESS_PROFILES:
            raise EngineError(
                f"the model in {self._loaded.folder} keeps states (linear attention), which must stay as"
                f" they are, and codec.profile = {codec.profile!r} rounds them; set it to exact or raw"
            )

    def _new_cache(self, capacity: int, *, is_saved: bool = False) -> SequenceCache:
        if self._loaded.states is not None:
            return StatefulCache(
                self._loaded.states,
                keeps_borders=is_saved,
                capacity=capacity,
                compute_dtype=self._loaded.compute_dtype,
                device=self._loaded.device,
            )
        return SequenceCache(
            self._loaded.spec,
            capacity=capacity,
            compute_dtype=self._loaded.compute_dtype,
            device=self._loaded.device,
            part_dims=self._loaded.part_dims,
        )

    def _forward(self, token_ids: list[int], cache: SequenceCache) -> torch.Tensor:
        """Append tokens to the cache; returns the logits [vocab] after the last one."""
        ids = torch.tensor([token_ids], dtype=torch.long, device=self._loaded.device)
        logits = forward(self._loaded.model, ids, cache.for_model)[0, -1]
        cache.note_border()
        return logits

    def _warm_up(self) -> None:
        """One slice over arbitrary tokens: later requests find warm kernels and a known rate."""
        tokens = min(self._slice_tokens, self.max_prompt_tokens)
        try:
            with torch.inference_mode():
                for measured in (False, True):
                    start = time.perf_counter()
                    cache = self._new_cache(tokens)
                    self._forward([0] * tokens, cache)
                    if not cache.is_uniform or cache.length != tokens:
                        raise ValueError("its layers do not all keep KV of their own")
                    if measured:
                        self._learn(0, tokens, start)
        except (RuntimeError, TypeError, ValueError) as exc:
            raise EngineError(
                f"the model in {self._loaded.folder} cannot run a first slice of {tokens} tokens on"
                f" {self._loaded.device}: {exc}"
            ) from exc

    def _learn(self, first: int, stop: int, started: float) -> float:
        """Learn from the slice of positions [first, stop); returns the seconds that it took."""
        if self._loaded.device.type == "cuda":
            torch.cuda.synchronize(self._loaded.device)
        seconds = time.perf_counter() - started
        if stop - first >= min(_MIN_RATE_TOKENS, self._slice_tokens):
            with self._prefill_lock:
                self._prefill_estimator.observe(first, stop - first, seconds)
        return seconds

    def _prefill_model(self) -> PrefillModel:
        """What prefill costs, as learnt so far. Any thread."""
        with self._prefill_lock:
            return self._prefill_estimator.model()


def _cache(sequence: Sequence) -> SequenceCache:
    assert sequence.cache is not None  # from _start to _finish
    return sequence.cache
