"""`preprocessing`: what a client sent as text or as a chat, as token ids."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Self

from kvfetcher import wire
from kvfetcher.backend.tags import prompt_tag
from kvfetcher.backend.tensors import ids_tensor, read_text, text_tensor
from kvfetcher.backend.vitals import pulse
from kvfetcher.config import load_config
from kvfetcher.errors import RequestError
from kvfetcher.memory.permits import Permits
from kvfetcher.models.chat_template import ChatTemplate, parse_messages
from kvfetcher.models.folders import prepare_model
from kvfetcher.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

# Triton's own, and what tracing adds.
_KNOWN_PARAMETERS = frozenset(
    {"priority", "timeout", "sequence_id", "sequence_start", "sequence_end", "traceparent",
     "tracestate", "headers", "binary_data_output", "max_response_size"}
)  # fmt: skip


class Prompting:
    """Reads requests of `preprocessing`. Not thread-safe, as the tokenizer is not."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, pb_utils: Any) -> None:
        self._folder = folder
        self._pb_utils = pb_utils
        self._tokenizer = tokenizer
        self._permits = Permits.of_run()
        self._template: ChatTemplate | None = None

    @classmethod
    def open(cls, pb_utils: Any) -> Self:
        """Of the configured model."""
        engine = load_config().engine
        tokenizer = Tokenizer.for_model(
            engine.model,
            max_prompt_tokens=engine.max_prompt_tokens,
            repeat_bos=engine.repeat_bos,
        )
        return cls(prepare_model(engine.model).path, tokenizer, pb_utils)

    def answer(self, request: Any) -> list[Any]:
        """The output tensors that a request asked for.

        Raises:
            RequestError: neither text nor messages, or both, or a parameter that nothing reads.
            UnsupportedRequestError: messages, and the model has no chat template.
            KVFetcherError: the server is stopping.
        """
        pb_utils = self._pb_utils
        pulse().refuse_when_stopping()
        check_parameters(request.parameters())
        text = read_text(request, wire.TEXT_INPUT, pb_utils, default="")
        messages = read_text(request, wire.MESSAGES, pb_utils, default="")
        if text and messages:
            raise RequestError(f"send {wire.TEXT_INPUT} or {wire.MESSAGES}, not both")
        if messages:
            text = self._chat_template().render(parse_messages(messages))
        wanted = set(request.requested_output_names())
        if not wanted - {wire.PROMPT}:  # what a chat looks like, without its token ids
            return [text_tensor(wire.PROMPT, text, pb_utils)]
        ids = ids_tensor(wire.INPUT_IDS, self._tokenizer.encode(text), pb_utils)
        permit = self._permits.seal("fetch", "", ids.as_numpy().tobytes())
        texts = {wire.PROMPT: text, wire.PERMIT: permit, wire.PROMPT_TAG: prompt_tag(text)}
        tensors = [ids, *(text_tensor(name, value, pb_utils) for name, value in texts.items())]
        return [tensor for tensor in tensors if tensor.name() in wanted]

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate(self._folder)
        return self._template


def check_parameters(text: str) -> None:
    """Refuse request parameters that nothing reads: an option in a wrong place has no effect.

    Triton takes every JSON field that is no input (``"beam_width": 2``) as a parameter.

    Raises:
        RequestError: names the parameter.
    """
    for name in json.loads(text or "{}"):
        if name not in _KNOWN_PARAMETERS and not name.startswith("triton_"):
            raise RequestError(
                f"{name} is not an input of this model and not supported; the inputs are those in"
                f" docs/openai.md and README: text_input, max_tokens, stream, temperature, top_k,"
                f" top_p, seed, stop_words, min_length, exclude_input_in_output, cache_salt,"
                f" kv_policy"
            )
