"""A tiny random Llama with a word tokenizer, saved as a Hugging Face folder; and texts for it."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvfetcher.calibration.texts import Text

WORDS = [f"w{i}" for i in range(64)]


def save_tiny_llama(path: Path) -> Path:
    """3 layers, 2 KV heads of 8 dims, linearly scaled rotation."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    )
    LlamaForCausalLM(config).save_pretrained(path)
    vocabulary = {word: i for i, word in enumerate([*WORDS, "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    return path


def walk_text(seed: int, num_words: int = 400) -> Text:
    """A walk over the vocabulary: tokens have context, so caches are not white noise."""
    steps = np.random.default_rng(seed).integers(-2, 3, num_words).cumsum() % len(WORDS)
    return Text(f"user/{seed}", "user", " ".join(WORDS[i] for i in steps))
