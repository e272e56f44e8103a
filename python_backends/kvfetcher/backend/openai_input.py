"""`openai_input`: sampling inputs of Triton's OpenAI frontend as options of `kv_fetch`."""

from __future__ import annotations

import json
from typing import Any

from kvfetcher import wire
from kvfetcher.backend.tensors import read_scalar, read_texts
from kvfetcher.errors import UnsupportedRequestError

_NUMBERS = (wire.STREAM, wire.MAX_TOKENS, wire.TEMPERATURE, wire.TOP_P, wire.SEED)
_PENALTIES = (wire.FREQUENCY_PENALTY, wire.PRESENCE_PENALTY)
_GUIDED = (wire.GUIDED_DECODING_GUIDE_TYPE, wire.GUIDED_DECODING_GUIDE)


def read_openai_options(request: Any, pb_utils: Any) -> str:
    """The JSON of `wire.CLIENT_OPTIONS` for one request.

    The frontend always sends both penalties, as 0 where the client gave none.

    Raises:
        UnsupportedRequestError: a penalty that is not 0, or guided decoding.
        RequestError: a tensor holds more than one value.
    """
    for name in _PENALTIES:
        if penalty := read_scalar(request, name, pb_utils):
            raise UnsupportedRequestError(f"{name} is not supported, got {penalty:g}; leave it out")
    for name in _GUIDED:
        if any(read_texts(request, name, pb_utils) or ()):
            raise UnsupportedRequestError(f"{name} is not supported; leave it and tools out")
    given = {name: read_scalar(request, name, pb_utils) for name in _NUMBERS}
    options = {name: value for name, value in given.items() if value is not None}
    if words := read_texts(request, wire.STOP_WORDS, pb_utils):
        options[wire.STOP_WORDS] = words
    return json.dumps(options)
