"""The executor with the hazards that the documentation warns of made certain instead of rare."""

import dataclasses

import torch

from kvfetcher.engines.paged import contract
from kvfetcher.engines.paged.blocks import BlockPool
from kvfetcher.engines.paged.executor import PagedExecutor, Sink
from kvfetcher.memory.leases import LeaseTable

SCRIBBLE = -1  # every bit set: NaN in bf16, fp16 and fp8


class ScribblingPool(BlockPool):
    """Pool blocks hold NaN when they are handed out: what is not written is seen."""

    tensor = None

    def allocate(self, number):
        taken = super().allocate(number)
        self.tensor.view(torch.uint8)[taken] = SCRIBBLE & 0xFF
        return taken


class ScribblingLeases(LeaseTable):
    """Arena blocks hold NaN as soon as nobody leases them: what is read too late is seen."""

    arena = None

    def release(self, lease_id, *, now, is_claimer=False):
        blocks = self._entries[lease_id].block_ids if lease_id in self._entries else ()
        super().release(lease_id, now=now, is_claimer=is_claimer)
        if lease_id not in self._entries:
            free = [block for block in blocks if block in self._free]
            for part in self.arena.parts:
                part.blocks[free] = SCRIBBLE & (0xFFFF if part.spec.item_bytes == 2 else 0xFF)


class ContractLoop(PagedExecutor):
    """The documented loop; idle iterations show the worker its old metadata, requests can be replayed."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.pool = ScribblingPool(num_blocks=self.pool.num_blocks, reuse=self.rules.reuse)
        self.pool.tensor = model.kv.pool
        self.batches = 0
        self.replays = []
        self._replayed = set()

    def _start_batch(self, batch):
        self.batches += 1
        return super()._start_batch(batch)

    def _get_finished(self):
        # "Never cleared automatically": the object of an earlier iteration is still bound.
        self._worker.start_load_kv(self.model.stream)
        super()._get_finished()

    def _take_input(self):
        super()._take_input()
        for request_id in self._ranks.broadcast(self.replays if self._ranks.rank == 0 else None):
            request = self.requests.get(request_id)
            if request is not None and request.state == "context":
                self.pool.free(request.blocks)
                request.blocks, request.is_allocated, request.position = [], False, 0
                request.state = "waiting"
                self._replayed.add(request_id)
        self.replays = []

    def _finish(self, request):
        # A cancelled request still reaches `request_finished`, also one that lost its blocks before.
        request.is_allocated |= request.request_id in self._replayed
        super()._finish(request)


class GreedySink(Sink):
    """Collects tokens; the likeliest one each time."""

    def __init__(self):
        self.tokens = {}
        self.ends = {}

    def choose(self, request, logits):
        tokens = self.tokens.setdefault(request.request_id, [])
        tokens.append(int(logits.float().argmax()))
        return tokens[-1], "length" if len(tokens) == request.max_tokens else None

    def over(self, request, reason):
        assert request.request_id not in self.ends, "a request ended twice"
        self.ends[request.request_id] = reason


class KeepingLoop(ContractLoop):
    """Shows the blocks of each request that ends."""

    def __init__(self, model, *, keep, **options):
        super().__init__(model, **options)
        self._keep = keep

    def _finish(self, request):
        self._keep(request.blocks)
        super()._finish(request)


class NoScheduler(contract.KvCacheConnectorScheduler):
    """Offers nothing."""

    def build_connector_meta(self, scheduler_output):
        return dataclasses.asdict(scheduler_output)

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        return 0, False

    def update_state_after_alloc(self, request, block_ids):
        pass

    def request_finished(self, request, cache_block_ids):
        return False


class NoWorker(contract.KvCacheConnectorWorker):
    """Copies nothing."""

    def register_kv_caches(self, kv_cache_tensor):
        pass

    def start_load_kv(self, stream):
        pass

    def wait_for_layer_load(self, layer_idx, stream):
        pass

    def save_kv_layer(self, layer_idx, stream):
        pass

    def wait_for_save(self, stream):
        pass

    def get_finished(self, finished_gen_req_ids, started_loading_req_ids):
        return [], []
