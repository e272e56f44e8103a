"""The served model's tokenizer: text that comes in from clients, and the tokens that end an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher.errors import EngineError, RequestError
from kvfetcher.models.folders import prepare_model
from kvfetcher.models.limits import max_positions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

# Text is tokenised piece by piece until it is certain to be too long. 16 Ki characters are about 4,000
# tokens of English, 25 ms on one core.
_PIECE_CHARACTERS = 16384
# Tokenizers differ: some have a token for a run of unknown characters.
_MIN_CHARACTERS_PER_TOKEN = 64

# transformers 5.13 to 5.21 drop all spaces of some tokenizers without a word.
_SAMPLES = (
    "Hello world, how are you?  Two spaces.\n\nA new paragraph\twith a tab.",
    "def f(x):\n    return {x: 1.5e-3, 'k': [x] * 42}  # naïve café",
    "Straße 東京 привет مرحبا 😀 e\u0301",
    " leading and trailing ",
)


class Tokenizer:
    """Text -> token ids, exactly as the model's own tokenizer does it. Not thread-safe.

    Args:
        folder: Hugging Face's.
        max_prompt_tokens: longest prompt; 0 = what the model's positions allow.
        repeat_bos: keep two beginning-of-text tokens where the text already begins with one.

    Raises:
        EngineError: the folder has no tokenizer that can be loaded, or the installed transformers
            reads it wrongly.
    """

    def __init__(
        self, folder: Path, *, max_prompt_tokens: int = 0, repeat_bos: bool = False
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            positions = max_positions(config.get_text_config())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as exc:
            raise EngineError(f"the tokenizer in {folder} cannot be loaded: {exc}") from exc
        check_tokenizer(self._tokenizer, folder)
        # The engine checks lengths, with its own limit and message.
        self._tokenizer.model_max_length = int(1e30)
        # One position is kept for the first generated token.
        self._max_tokens = min(max_prompt_tokens or positions - 1, positions - 1)
        longest = max(map(len, self._tokenizer.get_vocab()), default=1)
        self._longest_token = max(longest, _MIN_CHARACTERS_PER_TOKEN)
        self._repeat_bos = repeat_bos

    @classmethod
    def for_model(
        cls, model: str, *, max_prompt_tokens: int = 0, repeat_bos: bool = False
    ) -> Tokenizer:
        """The tokenizer of a built-in model's name or a local folder."""
        return cls(
            prepare_model(model).path, max_prompt_tokens=max_prompt_tokens, repeat_bos=repeat_bos
        )

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids [num_tokens] of `text`; special tokens written in it count as such.

        A text that begins with the tokenizer's first special token itself (as chat templates of
        Llama write it) does not get another one.

        Raises:
            RequestError: the text is empty, or longer than any prompt can be: that is found
                without tokenising more of it than the longest prompt.
        """
        if not text:
            raise RequestError("text_input is empty; send at least one character")
        self._refuse_long(text)
        ids = self._tokenizer(text)["input_ids"]
        bos = self._tokenizer.bos_token_id
        # A chat template writes the token itself; the tokenizer would put another before it.
        if not self._repeat_bos and bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return np.asarray(ids, dtype=np.int32)

    def _refuse_long(self, text: str) -> None:
        most = self._max_tokens * self._longest_token
        if len(text) > most:
            raise RequestError(
                f"text_input has {len(text)} characters, more than {self._max_tokens} tokens can"
                f" hold ({most}; the model's positions, engine.max_prompt_tokens); shorten it"
            )
        # Where a piece is cut, a token may become several: as many as the longest has characters.
        certain = 0
        if len(text) <= max(self._max_tokens, _PIECE_CHARACTERS):
            return
        for piece in _pieces(text):
            ids = self._tokenizer(piece, add_special_tokens=False)["input_ids"]
            certain += len(ids) - self._longest_token
            if certain > self._max_tokens:
                raise RequestError(
                    f"text_input ({len(text)} characters) has more than {self._max_tokens} tokens,"
                    " which is the most that is possible (the model's positions,"
                    " engine.max_prompt_tokens); shorten it"
                )


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Compare token ids with those of tokenizer.json itself, read by the library under it.

    Args:
        tokenizer: transformers' tokenizer.
        folder: it was loaded from; without a tokenizer.json nothing is compared.

    Raises:
        EngineError: they differ.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    import tokenizers
    import transformers

    raw = tokenizers.Tokenizer.from_file(str(path))
    raw.no_truncation()
    raw.no_padding()
    for sample in _SAMPLES:
        got = list(tokenizer(sample, add_special_tokens=False)["input_ids"])
        expected = raw.encode(sample, add_special_tokens=False).ids
        if got != expected:
            raise EngineError(
                f"transformers {transformers.__version__} gives other token ids than {path} for"
                f" {sample[:24]!r} ({got[:6]}, not {expected[:6]}); install transformers>=5.22.2, or"
                " repair the tokenizer's files"
            )


def end_token_ids(*declared: Any) -> tuple[int, ...]:
    """Tokens that end an answer: all that the model's files name, each once, in this order.

    Instruct models end their turn with a token that only the tokenizer (or only the generation
    configuration) calls eos; generation that knows one of them alone invents further turns.

    Args:
        declared: each an id, a list of ids, or None.
    """
    found: list[int] = []
    for each in declared:
        if each is not None:
            found += each if isinstance(each, list | tuple) else [each]
    return tuple(dict.fromkeys(int(token) for token in found))


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), _PIECE_CHARACTERS):
        yield text[start : start + _PIECE_CHARACTERS]
