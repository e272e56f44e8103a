"""TensorRT-LLM's second KV cache manager (V2), as its documentation of 1.4 states it, without it.

What differs from the first, and is made certain here instead of rare:

* memory is byte ranges that repeat once per block, and each layer group has block ids of its own;
* the connector is asked once, in an iteration that may drop the request again; the answer is resolved in
  that iteration or a later one, and all, a part or nothing of it is taken (`cancel_load` says so);
* an asynchronous load may be discarded: it is waited for, then computed over;
* blocks are allocated by parts of the prompt, and the connector hears of those of the first part;
* a request may lose its blocks (`request_reset`, or `request_finished` where it is preempted, because
  the policy is MAX_UTILIZATION whatever was set) and run again from the start;
* `block_hashes` are empty, and metadata is cleared after each iteration.
"""

import random
from abc import ABC
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from kvfetcher.engines.paged import contract
from kvfetcher.engines.paged.blocks import block_hashes
from kvfetcher.engines.paged.executor import _Told
from kvfetcher.engines.paged.model import PagedKV
from kvfetcher.errors import EngineError
from support.trtllm_contract.loop import ContractLoop, ScribblingPool

GAP_BYTES = 32
"""Between the ranges of neighbouring blocks: a connector that takes size for stride is seen."""


@dataclass
class RequestDataV2(contract.RequestData):
    """What 1.4 adds to a request's report."""

    block_hashes: list = field(default_factory=list)
    priorities: list | None = None
    cache_salt: str | None = None
    new_block_ids_by_layer_group: list = field(default_factory=list)


class KvCacheConnectorWorker(contract.KvCacheConnectorWorker):
    supports_attention_dp = False

    def register_kv_cache_layout(self, layout):
        raise NotImplementedError

    def _clear_connector_meta(self):
        self._metadata = None


class SchedulerWithoutCancel(contract.KvCacheConnectorScheduler, ABC):
    """1.4 before `cancel_load`."""

    supports_attention_dp = False

    def request_finished_by_layer_group(self, request, cache_block_ids_by_layer_group):
        (block_ids,) = cache_block_ids_by_layer_group
        return self.request_finished(request, block_ids)

    def update_state_after_alloc_by_layer_group(self, request, block_ids_by_layer_group):
        (block_ids,) = block_ids_by_layer_group
        self.update_state_after_alloc(request, block_ids)

    def wait_for_initialization(self):
        return


class KvCacheConnectorScheduler(SchedulerWithoutCancel):
    def cancel_load(self, request, start, end):
        return

    def request_reset(self, request):
        return


def interface(*, tells_cancelled):
    """A module with the two abstract classes, newer or older."""
    return SimpleNamespace(
        __name__="contract_v2",
        KvCacheConnectorScheduler=(
            KvCacheConnectorScheduler if tells_cancelled else SchedulerWithoutCancel
        ),
        KvCacheConnectorWorker=KvCacheConnectorWorker,
    )


class Region(SimpleNamespace):
    def as_tensor(self, dtype=torch.uint8):
        return self.memory.view(dtype)


class GroupedKV(PagedKV):
    """The pool of a `PagedModel` in byte ranges; takes the place of its `kv`.

    Args:
        kv: what it replaces.
        num_groups: layer groups, 1 or 2. Of one, the second layer lies in a range of its own, V first.
    """

    def __init__(self, kv, *, num_groups):
        self.num_groups = num_groups
        self.num_slots, num_layers = kv.pool.shape[0], kv.pool.shape[1]
        flat = kv._by_token[0, 0, 0].numel() * kv.pool.element_size()
        self._views, regions = {}, {}
        split = [range(num_layers - 1), range(num_layers - 1, num_layers)]
        for index, layers in enumerate(split):
            kinds = (0, 1) if index == 0 else (1, 0)
            size = len(layers) * 2 * flat
            memory = torch.full((self.num_slots, size + GAP_BYTES), 0xFF, dtype=torch.uint8)
            memory = memory[:, :size]
            buffers = [(layer, kind) for layer in layers for kind in kinds]
            group = index if num_groups == 2 else 0
            regions.setdefault(group, []).append(
                Region(
                    base=memory.data_ptr(),
                    size=size,
                    stride=size + GAP_BYTES,
                    num_slots=self.num_slots,
                    buffers=tuple(
                        SimpleNamespace(layer_id=layer, role=("key", "value")[kind], expansion=1)
                        for layer, kind in buffers
                    ),
                    memory=memory,
                )
            )
            for i, place in enumerate(buffers):
                part = memory[:, i * flat : (i + 1) * flat].view(kv.pool.dtype)
                by_token = kv._by_token[:, 0, 0]
                if by_token.stride(1) > by_token.stride(2):  # NHD
                    part = part.unflatten(1, by_token.shape[1:])
                else:
                    tokens, heads, dim = by_token.shape[1:]
                    part = part.unflatten(1, (heads, tokens, dim)).transpose(1, 2)
                self._views[place] = group, part
        self._regions = regions
        self._dtype, self._limit = kv._dtype, kv._limit
        self._tokens_per_block, self._compute_dtype = kv._tokens_per_block, kv._compute_dtype
        self.pool = kv.pool[:, :0]  # for its length alone
        self._start = 0
        self.for_model = kv.for_model
        for layer in self.for_model.layers:
            layer._paged = self

    def pages(self, group, blocks):
        """Ids in a group's own space; group 1 counts otherwise."""
        if group == 0:
            return blocks
        return [-1 if b < 0 else (b * 5 + 3) % self.num_slots for b in blocks]

    def scribble(self, blocks):
        for group, regions in self._regions.items():
            for region in regions:
                region.memory[self.pages(group, blocks)] = 0xFF

    def layout(self):
        groups = [
            SimpleNamespace(
                layer_group_id=group,
                layer_ids=tuple(sorted({b.layer_id for r in regions for b in r.buffers})),
                window_size=None,
                regions=tuple(regions),
                replicated_regions=(),
            )
            for group, regions in self._regions.items()
        ]
        return SimpleNamespace(tokens_per_block=self._tokens_per_block, groups=tuple(groups))

    def point(self, block_ids, start):
        self._blocks = {
            group: torch.tensor(self.pages(group, block_ids)) for group in range(self.num_groups)
        }
        self._start = start

    def update(self, layer, keys, values):
        end = self._start + keys.shape[-2]
        positions = torch.arange(self._start, end)
        found = []
        for kind, states in enumerate((keys, values)):
            group, view = self._views[layer, kind]
            blocks = self._blocks[group]
            slots = positions % self._tokens_per_block
            rounded = self._round(states[0].transpose(0, 1))
            view[blocks[positions // self._tokens_per_block], slots] = rounded
            used = blocks[: -(-end // self._tokens_per_block)]
            tokens = view[used].reshape(-1, *view.shape[2:])[:end]
            found.append(tokens.transpose(0, 1)[None].to(self._compute_dtype).contiguous())
        return tuple(found)


class GroupedPool(ScribblingPool):
    kv = None

    def allocate(self, number):
        taken = super(ScribblingPool, self).allocate(number)
        self.kv.scribble(taken)
        return taken


@dataclass
class Offer:
    number: int
    is_async: bool
    first: int
    """Position that it begins at: what the engine held when it asked."""


class V2Loop(ContractLoop):
    """The loop over `GroupedKV`; what the real one does now and then is decided by dice.

    Args:
        luck: seed; ranks throw the same dice. None = every offer is taken at once and whole.
        tells_cancelled: call `cancel_load` and `request_reset`.
    """

    def __init__(self, model, *, num_groups=1, luck=0, tells_cancelled=True, **options):
        model.kv = GroupedKV(model.kv, num_groups=num_groups)
        self._dice = random.Random(luck)
        self._is_lucky = luck is None
        self._tells_cancelled = tells_cancelled
        self.offers = {}
        self.counts = dict.fromkeys(("deferred", "short", "refused", "reset", "preempted"), 0)
        super().__init__(model, **options)
        self.pool = GroupedPool(num_blocks=self.pool.num_blocks, reuse=self.rules.reuse)
        self.pool.kv = model.kv

    def _register(self, worker):
        worker.register_kv_cache_layout(self.model.kv.layout())

    def _throw(self, sides):
        return 1 if self._is_lucky else self._dice.randrange(sides)

    # What the connector sees

    def _by_group(self, blocks):
        kv = self.model.kv
        return [list(kv.pages(group, blocks)) for group in range(kv.num_groups)]

    def _show(self, request, *, is_finished=False):
        return SimpleNamespace(
            request_id=request.request_id,
            get_tokens=request.get_tokens,
            cache_salt=request.cache_salt or None,
            is_finished=is_finished,
        )

    def _tell(self, name, *arguments):
        if self._scheduler is None:
            return None
        flat = self.model.kv.num_groups == 1
        if name in ("update_state_after_alloc", "request_finished"):
            request, groups = arguments
            if flat:
                return getattr(self._scheduler, name)(request, groups[0])
            return getattr(self._scheduler, f"{name}_by_layer_group")(request, groups)
        return getattr(self._scheduler, name)(*arguments)

    # Scheduling: MAX_UTILIZATION, whatever was set

    def _schedule(self):
        batch = []
        for request in list(self.requests.values()):
            if len(batch) == self.rules.max_batch:
                break
            if request.state == "parked" or request.cancelled:
                continue
            if request.is_allocated or self._admit(request):
                batch.append(request)
        return [request for request in batch if request.is_allocated and self._make_room(request)]

    def _admit(self, request):
        """Ask, once; then resolve the answer, perhaps in a later iteration; True = it has blocks."""
        size = self.rules.tokens_per_block
        offer = self.offers.get(request.request_id)
        if offer is None:
            hashes = block_hashes(request.tokens, size, request.cache_salt)
            shared = self.pool.find(hashes[: (request.prompt_tokens - 1) // size])
            keep = self._shared_blocks(len(shared))
            self.pool.free(shared[keep:])
            request.blocks = shared[:keep]
            request.reused_tokens = keep * size
            answer = self._tell("get_num_new_matched_tokens", self._show(request), keep * size)
            number, is_async = self._ranks.broadcast(answer)
            if keep * size + number > request.prompt_tokens - 1:
                raise EngineError("at least one token must be left to compute")
            offer = self.offers[request.request_id] = Offer(number, is_async, keep * size)
        if self._throw(3) == 0:
            self.counts["deferred"] += 1
            return False
        return self._resolve(request, offer)

    def _resolve(self, request, offer):
        size, first = self.rules.tokens_per_block, offer.first
        taken = offer.number
        if taken and (fate := self._throw(4)) != 1:
            taken = (0, taken, size * self._dice.randrange(taken // size), taken)[fate]
        wanted = self._part_end_from(request, first + taken)
        if self._blocks_for(wanted) - len(request.blocks) > self.pool.num_free and taken:
            taken = 0
            wanted = self._part_end_from(request, first)
        if self._blocks_for(wanted) - len(request.blocks) > self.pool.num_free:
            return False
        if taken < offer.number:
            self.counts["short" if taken else "refused"] += 1
            if self._tells_cancelled:
                self._tell("cancel_load", self._show(request), first + taken, first + offer.number)
        del self.offers[request.request_id]
        request.is_allocated, request.state = True, "context"
        self._grow(request, wanted)
        request.position, request.loaded_tokens = first + taken, taken
        self._external[request.request_id] = taken
        self.counters.loaded_tokens += taken
        if offer.is_async:  # also where nothing of it is taken: the transfer may have begun
            self._started.loading[request.request_id] = request
        self._tell("update_state_after_alloc", self._show(request), self._by_group(request.blocks))
        if self._tells_cancelled and self._throw(6) == 0:  # rolled back before the batch
            self.counts["reset"] += 1
            self._started.loading.pop(request.request_id, None)
            self._tell("request_reset", self._show(request))
            self._forget(request)
            return False
        return True

    def _part_end_from(self, request, position):
        part = self.rules.part_tokens
        return min(request.prompt_tokens, (position // part + 1) * part)

    def _make_room(self, request):
        """Blocks for the next part; takes those of the newest other request where none are free."""
        if request.request_id in self._started.loading:
            return True
        needed = self._blocks_for(self._part_end(request)) - len(request.blocks)
        while needed > self.pool.num_free:
            after = list(self.requests.values())
            after = after[after.index(request) + 1 :]  # the oldest goes on, or none would end
            newer = [r for r in after if r.is_allocated and not self._is_moving(r)]
            if not newer:
                return False
            self._preempt(newer[-1])
        if not request.is_allocated:
            return False
        self._grow(request, self._part_end(request))
        return True

    def _is_moving(self, request):
        stages = (self._started, self._pending, self._done_here)
        return any(
            request.request_id in held for stage in stages for held in (stage.loading, stage.saving)
        )

    def _preempt(self, request):
        self.counts["preempted"] += 1
        blocks = self._by_group(request.blocks)
        # Whether the answer holds the blocks of a preempted request is not documented: here it does not.
        self._ranks.broadcast(self._tell("request_finished", self._show(request), blocks))
        self._forget(request)

    def _forget(self, request):
        self.pool.free(request.blocks)
        self.model.kv.scribble([b for b in request.blocks if b not in self.pool._held])
        for block in request.blocks:  # what was there is gone for others too
            if block in self.pool._cached:
                del self.pool._cached[block]
                self.pool._forget(block)
                self.pool._unused.append(block)
        request.blocks, request.is_allocated = [], False
        request.position, request.state = 0, "waiting"
        self._told.pop(request.request_id, None)
        self._external.pop(request.request_id, None)

    def _prepare(self, batch):
        """Nothing: blocks are there already."""

    def _start_batch(self, batch):
        batch = [request for request in batch if request.is_allocated]
        return super()._start_batch(batch) if batch else []

    def _scheduler_output(self, batch):
        output = contract.SchedulerOutput()
        for request in batch:
            if request.request_id in self._started.loading:
                continue
            is_new = request.request_id not in self._told
            told = self._told.setdefault(request.request_id, _Told())
            new = self._by_group(request.blocks[told.blocks :])
            data = RequestDataV2(
                request_id=request.request_id,
                new_tokens=request.tokens[told.tokens :],
                new_block_ids=new[0] if len(new) == 1 else [],
                computed_position=request.position - self._external.get(request.request_id, 0),
                num_scheduled_tokens=self._part_end(request) - request.position,
                cache_salt=request.cache_salt or None,
                new_block_ids_by_layer_group=new,
            )
            told.tokens, told.blocks = len(request.tokens), len(request.blocks)
            (output.new_requests if is_new else output.cached_requests).append(data)
        self._external.clear()
        return output

    def _sample(self, request, logits):
        if request.position < len(request.tokens):  # runs again what it had answered already
            request.state = "generation"
            return False
        return super()._sample(request, logits)

    # Ends

    def _cancelled(self):
        """Those whose load is under way keep their blocks until it is over."""
        return [r for r in super()._cancelled() if not self._is_moving(r)]

    def _finish(self, request):
        del self.requests[request.request_id]
        if request.cancelled and self._sink is not None:
            self._sink.over(request, "cancelled")
        offer = self.offers.pop(request.request_id, None)
        if offer is not None and offer.number and self._tells_cancelled:
            end = offer.first + offer.number
            self._tell("cancel_load", self._show(request), offer.first, end)
        if not request.is_allocated:
            self.pool.free(request.blocks)
            request.state = "over"
            return
        shown = self._show(request, is_finished=not request.cancelled)
        pinned = self._tell("request_finished", shown, self._by_group(request.blocks))
        self._told.pop(request.request_id, None)
        if self._ranks.broadcast(pinned):
            request.state = "saving"
            self._started.saving[request.request_id] = request
        else:
            self._release(request)

    def _get_finished(self):
        self._worker._clear_connector_meta()
        super()._get_finished()

    def _take_input(self):
        replays, self.replays = self.replays, []
        super()._take_input()
        for request_id in self._ranks.broadcast(replays if self._ranks.rank == 0 else None):
            request = self.requests.get(request_id)
            running = request is not None and request.is_allocated
            if running and not request.cancelled and not self._is_moving(request):
                self._preempt(request)
