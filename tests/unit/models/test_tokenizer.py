"""Client text to ids: the model's own tokenizer, and clear errors around it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from kvfetcher.errors import EngineError, RequestError
from kvfetcher.models.limits import max_positions
from kvfetcher.models.tokenizer import Tokenizer, check_tokenizer, end_token_ids
from support.engine_rig import byte_tokenizer


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


def word_folder(path, **tokenizer_options):
    """A tiny Llama's folder whose tokenizer puts <s> before each text."""
    words = ["<unk>", "<s>", "</s>", "<|im_end|>", "a", "b", "c"]
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", **tokenizer_options
    ).save_pretrained(path)
    LlamaConfig(max_position_embeddings=512).save_pretrained(path)
    return path


def test_a_text_that_begins_with_the_first_token_gets_no_second(tmp_path):
    folder = word_folder(tmp_path)
    assert Tokenizer(folder).encode("a b").tolist() == [1, 4, 5]
    assert Tokenizer(folder).encode("<s> a b").tolist() == [1, 4, 5]
    assert Tokenizer(folder, repeat_bos=True).encode("<s> a b").tolist() == [1, 1, 4, 5]


def test_a_text_longer_than_any_prompt_is_refused_untokenised(model_folder, monkeypatch):
    tokenizer = Tokenizer(model_folder, max_prompt_tokens=100)
    monkeypatch.setattr(tokenizer, "_tokenizer", None)  # not even looked at
    with pytest.raises(RequestError, match="more than 100 tokens can hold"):
        tokenizer.encode("x" * 10_000_000)


def test_a_text_that_is_certain_to_be_too_long_is_tokenised_in_part(model_folder, monkeypatch):
    tokenizer = Tokenizer(model_folder)  # one token per byte; 511 tokens
    seen = []
    real = tokenizer._tokenizer

    def count(text, **options):
        seen.append(len(text))
        return real(text, **options)

    monkeypatch.setattr(tokenizer, "_tokenizer", count)
    with pytest.raises(RequestError, match="has more than 511 tokens"):
        tokenizer.encode("x" * 32_000)
    assert seen == [16384]


def test_text_as_long_as_a_prompt_can_be_is_tokenised(model_folder):
    assert len(Tokenizer(model_folder).encode("x" * 511)) == 511
    assert len(Tokenizer(model_folder).encode("é" * 300)) == 600  # the engine's to refuse


def test_ids_that_differ_from_tokenizer_json_are_refused_at_load(model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    check_tokenizer(byte_tokenizer(), folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["pre_tokenizer"]["add_prefix_space"] = True  # what transformers was told, the file is not
    path.write_text(json.dumps(data))
    with pytest.raises(EngineError, match=r"other token ids than .*tokenizer\.json"):
        check_tokenizer(byte_tokenizer(), folder)


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ((None, None), ()),
        ((2, None), (2,)),
        (([151645, 151643], 151645), (151645, 151643)),
        ((151643, 151645), (151643, 151645)),  # the tokenizer knows the end of a turn
        ((None, 7), (7,)),
        ((0, None), (0,)),
    ],
)
def test_all_files_may_name_tokens_that_end_an_answer(declared, expected):
    assert end_token_ids(*declared) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        (
            {
                "max_position_embeddings": 32768,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e6,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            65536,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
    ],
)
def test_positions_of_a_model(fields, expected):
    assert max_positions(SimpleNamespace(**fields)) == expected
