"""A real tritonserver with the real model repository, the real model and a store in a folder."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from kvfetcher import wire
from kvfetcher.memory.control import ControlClient, socket_path
from kvfetcher.memory.permits import Permits
from kvfetcher.models.folders import prepare_model
from kvfetcher_client import Client
from support.triton_server import TritonServer, server_config

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.config import Config
    from kvfetcher_client import Generation

DOCUMENT = (
    Path(__file__).parents[1] / "data" / "documents" / "references_and_borrowing.txt"
).read_text()
CHUNK_TOKENS = 64  # short chunks keep prompts, and so the tests, short
# What a killed decoder or restorer may still write to rests for as long again as its lease was for.
# Several tests wait for that.
LEASE_TTL_SECONDS = 20.0


def make_config(store: Path, /, **sections: dict[str, object]) -> Config:
    """The tests' configuration: free ports, `store`, short chunks; sections override fields."""
    config = server_config()
    fields = {
        "store": {"path": str(store)},
        "codec": {"chunk_tokens": CHUNK_TOKENS},
        "engine": {"prefill_slice_tokens": CHUNK_TOKENS, "arena_bytes": 256 << 20},
        "fetch": {
            "min_hit_tokens": CHUNK_TOKENS,
            "deadline_seconds": LEASE_TTL_SECONDS,
            "lease_ttl_seconds": LEASE_TTL_SECONDS,
        },
    }
    for name, values in sections.items():
        fields[name] = {**fields.get(name, {}), **values}
    return replace(
        config, **{name: replace(getattr(config, name), **v) for name, v in fields.items()}
    )


def text_input(text: str) -> grpcclient.InferInput:
    """A prompt, for models that take one."""
    tensor = grpcclient.InferInput(wire.TEXT_INPUT, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=object))
    return tensor


@dataclass
class Running:
    """A ready server and its clients."""

    server: TritonServer
    config: Config
    client: Client
    triton: grpcclient.InferenceServerClient

    @property
    def store(self) -> Path:
        return Path(self.config.store.path)

    def chunk_files(self) -> list[Path]:
        return sorted(p for p in self.store.glob("*/*/*/*") if p.is_file())

    def generate_hit(self, text: str, **options: Any) -> Generation:
        """An answer whose prefix comes from the store, however slow the machine is just now.

        Not by policy `auto`: it computes where fetching falls behind.
        """
        answer = self.client.generate(text, kv_policy="fetch", **options)
        assert answer.report.raw["outcome"] == "hit", answer.report.raw
        return answer

    def token_ids(self, text: str) -> NDArray[np.int32]:
        """What `preprocessing` makes of a prompt."""
        result = self.triton.infer(wire.PREPROCESSING, [text_input(text)])
        return result.as_numpy(wire.INPUT_IDS)

    @property
    def permits(self) -> Permits:
        """What this server's processes sign with: the tests run as its user."""
        return Permits.of_run(self.server.run_dir)

    def fetch_permit(self, ids: NDArray[np.int32]) -> str:
        """What `preprocessing` gives `kv_fetch` with these ids."""
        return self.permits.seal("fetch", "", ids.tobytes())

    def settle(self, *, timeout_seconds: float = 2 * LEASE_TTL_SECONDS + 20) -> list[Path]:
        """The store's chunk files once no request runs and nothing is left to save."""
        with ControlClient(socket_path(self.server.run_dir), timeout_seconds=10) as control:
            deadline = time.monotonic() + timeout_seconds
            while (stats := control.stats())["running"] or (
                stats["blocks"]["free"] != stats["blocks"]["total"]
            ):
                assert time.monotonic() < deadline, f"not idle after {timeout_seconds} s: {stats}"
                time.sleep(0.05)
        return self.chunk_files()


class start_server:
    """Context manager: a server over `store`, of the models in `repository` (None = the project's)."""

    def __init__(
        self, store: Path, /, repository: Path | None = None, **sections: dict[str, object]
    ) -> None:
        self._config = make_config(store, **sections)
        self._repository = repository

    def __enter__(self) -> Running:
        self._server = TritonServer(self._config, model_repository=self._repository)
        self._server.start()
        self._client = Client(self._server.grpc_url, timeout_seconds=120)
        self._triton = grpcclient.InferenceServerClient(self._server.grpc_url)
        return Running(self._server, self._config, self._client, self._triton)

    def __exit__(self, *_: object) -> None:
        self._triton.close()
        self._client.close()
        lived = self._server.is_alive()
        clean = self._server.stop()
        assert clean or not lived, "the server had to be killed: a request never ended"


@pytest.fixture(scope="session", autouse=True)
def model():
    """The default model, fetched and converted once."""
    return prepare_model("smollm2-135m-instruct")


@pytest.fixture(scope="package")
def running(tmp_path_factory):
    """One server for all tests that need no other; those that kill its processes heal it again."""
    with start_server(tmp_path_factory.mktemp("store"), server={"probe_seconds": 0}) as started:
        yield started


_next_words = iter(range(10_000))


@pytest.fixture
def prompt():
    """A function: a prompt that no other test uses, of about `num_words` words of the document."""

    def make(num_words: int = 200) -> str:
        number = next(_next_words)
        words = DOCUMENT.split()
        return f"Document {number}. " + " ".join(words[:num_words])

    return make
