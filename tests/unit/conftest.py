"""Fixtures of several packages: the tiny model, made once, its tokenizer, and engines over it."""

import contextlib

import pytest

from kvfetcher.engines.hf.loader import load_model
from support.engine_rig import Rig, byte_tokenizer, write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def loaded(model_folder):
    return load_model(model_folder, device="cpu", kv_dtype="bfloat16")


@pytest.fixture
def rig_of(loaded, tmp_path):
    """Makes engines over the tiny model; they are closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            made = Rig(options.pop("loaded", loaded), tmp_path, **options)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def rig(rig_of):
    return rig_of()
