"""TensorRT-LLM's KV-connector interface as its documentation states it (1.2.x), to be run without it.

The names, the order of the calls and the meaning of every field are TensorRT-LLM's: connector classes
bound to this module (`trtllm_connector.bind`) are the ones that TensorRT-LLM runs. The paged engine
drives them in production; the contract suite drives them in tests.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

T = TypeVar("T")


@dataclass
class RequestData:
    """What one iteration says about one request; only tokens and blocks that are new."""

    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    """First position without valid KV; in the first report without what a synchronous load brings."""
    num_scheduled_tokens: int


@dataclass
class SchedulerOutput:
    """The batch of one iteration; requests that load asynchronously are not in it."""

    new_requests: list[RequestData] = field(default_factory=list)
    cached_requests: list[RequestData] = field(default_factory=list)


class KvCacheConnectorWorker(ABC):
    """Runs on every rank; called from the executor's thread only."""

    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args
        self._metadata: object = None
        super().__init__()

    def bind_connector_meta(self, metadata: object) -> None:
        """Keep the metadata of this iteration; it stays bound until the next one's comes."""
        self._metadata = metadata

    def get_connector_meta(self) -> object:
        return self._metadata

    def register_forward_pass_callable(self) -> Callable[[], None] | None:
        """A callable for the end of every forward pass, on its stream; None = none."""
        return None

    @abstractmethod
    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None: ...

    @abstractmethod
    def start_load_kv(self, stream: Any) -> None: ...

    @abstractmethod
    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None: ...

    @abstractmethod
    def save_kv_layer(self, layer_idx: int, stream: Any) -> None: ...

    @abstractmethod
    def wait_for_save(self, stream: Any) -> None: ...

    @abstractmethod
    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]: ...


class KvCacheConnectorScheduler(ABC):
    """Runs on rank 0 only; called from the executor's thread only."""

    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args
        super().__init__()

    @abstractmethod
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> object: ...

    @abstractmethod
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]: ...

    @abstractmethod
    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool: ...

    @abstractmethod
    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None: ...


class Ranks(Protocol):
    """The processes of one tensor-parallel engine; every call is a collective of all of them."""

    rank: int
    size: int

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value on every rank; it travels pickled."""
        ...

    def allgather(self, value: T) -> list[T]: ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks."""
        ...


class OneRank:
    """An engine of one process. Objects still travel pickled, as they do between processes."""

    rank = 0
    size = 1

    def broadcast(self, value: T | None) -> T:
        result: T = pickle.loads(pickle.dumps(value))
        return result

    def allgather(self, value: T) -> list[T]:
        return [value]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor
