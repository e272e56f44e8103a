"""A tiny model for the contract suite, and references of it by number of ranks."""

import pytest
import torch

from kvfetcher.engines.hf.loader import load_model
from support.engine_rig import write_model
from support.trtllm_contract.engine import Reference


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2)
    return load_model(folder, device="cpu", kv_dtype="bfloat16")


@pytest.fixture(scope="session")
def references(loaded):
    return {ranks: Reference(loaded, num_ranks=ranks) for ranks in (1, 2)}


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_rank():
    """The ranks are threads of this process already, and the model is tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
