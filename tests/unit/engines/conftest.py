"""Fixtures: the tiny model (made once), and engines over it that are closed again."""

import contextlib

import pytest

from kvfetcher.engines.hf.loader import load_model
from support.engine_rig import Rig


@pytest.fixture(scope="session")
def loaded(model_folder):
    return load_model(model_folder, device="cpu", kv_dtype="bfloat16")


@pytest.fixture
def rig_of(loaded, tmp_path):
    with contextlib.ExitStack() as stack:

        def make(**options):
            made = Rig(options.pop("loaded", loaded), tmp_path, **options)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def rig(rig_of):
    return rig_of()
