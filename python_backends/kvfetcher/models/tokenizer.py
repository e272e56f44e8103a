"""The served model's tokenizer, for text that comes in from clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher.errors import EngineError, RequestError
from kvfetcher.models.folders import prepare_model

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


class Tokenizer:
    """Text -> token ids, exactly as the model's own tokenizer does it. Not thread-safe."""

    def __init__(self, folder: Path) -> None:
        """Load from a Hugging Face folder.

        Raises:
            EngineError: the folder has no tokenizer that can be loaded.
        """
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as exc:
            raise EngineError(f"the tokenizer in {folder} cannot be loaded: {exc}") from exc
        # The engine checks lengths, with its own limit and message.
        self._tokenizer.model_max_length = int(1e30)

    @classmethod
    def for_model(cls, model: str) -> Tokenizer:
        """The tokenizer of a built-in model's name or a local folder."""
        return cls(prepare_model(model).path)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids [num_tokens] of `text`; special tokens written in it count as such.

        Raises:
            RequestError: the text is empty.
        """
        if not text:
            raise RequestError("text_input is empty; send at least one character")
        return np.asarray(self._tokenizer(text)["input_ids"], dtype=np.int32)
