"""Client text to ids: the model's own tokenizer, and clear errors around it."""

import numpy as np
import pytest

from kvfetcher.errors import EngineError, RequestError
from kvfetcher.models.tokenizer import Tokenizer


def test_ids_are_those_of_the_models_tokenizer(model_folder, tokenizer):
    ids = Tokenizer.for_model(str(model_folder)).encode("Grüße <eos> 😀" * 300)
    assert ids.dtype == np.int32
    assert ids.tolist() == tokenizer.encode("Grüße <eos> 😀" * 300)
    assert 256 in ids


def test_empty_text_is_the_senders_fault(model_folder):
    with pytest.raises(RequestError, match="text_input is empty"):
        Tokenizer(model_folder).encode("")


def test_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(EngineError, match="cannot be loaded"):
        Tokenizer(tmp_path)
