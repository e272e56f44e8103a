"""Fixtures of several packages: the tiny model, made once, and its tokenizer."""

import pytest

from support.engine_rig import byte_tokenizer, write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()
