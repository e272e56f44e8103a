"""OpenAI's requests and responses: what is read, what is refused, what comes back."""

import json

import pytest

from kvfetcher.errors import RequestError, UnsupportedRequestError
from kvfetcher.openai import schema
from kvfetcher_client import KVReport

MESSAGES = [{"role": "user", "content": "Hello"}]
CHAT = {"model": "m", "messages": MESSAGES}
TEXT = {"model": "m", "prompt": "Hello"}


def parse(data, kind="chat"):
    return schema.parse_request(kind, json.dumps(data).encode(), default_max_tokens=100)


def test_a_chat_and_its_options():
    asked = parse(
        CHAT
        | {"temperature": 0.5, "top_p": 1, "top_k": 5, "seed": 7, "stop": "end", "min_tokens": 1}
        | {"max_completion_tokens": 9, "max_tokens": 8, "cache_salt": "s", "kv_policy": "fetch"}
        | {"stream": True, "stream_options": {"include_usage": True}, "user": "u", "n": 1}
        | {"tool_choice": "auto", "frequency_penalty": 0.0, "logprobs": False, "logit_bias": None}
    )
    assert asked.messages == MESSAGES
    assert (asked.stream, asked.include_usage) == (True, True)
    assert asked.options == {
        "temperature": 0.5, "top_p": 1, "top_k": 5, "seed": 7, "stop_words": ["end"],
        "min_length": 1, "max_tokens": 9, "cache_salt": "s", "kv_policy": "fetch",
    }  # fmt: skip


def test_limits_are_openais_where_none_is_given():
    assert parse(CHAT).options == {"max_tokens": 100}
    assert parse(TEXT, "completion").options == {"max_tokens": 16}
    echoed = parse(TEXT | {"echo": True, "prompt": ["Hello"]}, "completion")
    assert echoed.prompt == "Hello"
    assert echoed.options["exclude_input_in_output"] is False


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -1},
        {"logprobs": True},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"logit_bias": {"5": 1}},
        {"tool_choice": {"type": "function"}},
    ],
)
def test_what_is_not_supported_is_refused_by_name(more):
    ((name, _),) = more.items()
    with pytest.raises(UnsupportedRequestError, match=f"{name} is not supported"):
        parse(CHAT | more)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"messages": MESSAGES}, "model must be"),
        ({"model": 3, "messages": MESSAGES}, "model must be"),
        ({"model": "m"}, "messages must be"),
        (CHAT | {"beam_width": 2}, "unknown parameter 'beam_width'"),
        (CHAT | {"temperature": "hot"}, "temperature must be int or float"),
        (CHAT | {"seed": True}, "seed must be int"),
        (CHAT | {"seed": 1.5}, "seed must be int"),
        (CHAT | {"max_tokens": 0}, "at least 1"),
        (CHAT | {"max_tokens": 1.0}, "at least 1"),
        (CHAT | {"stop": ["a"] * 17}, "up to 16"),
        (CHAT | {"stop": [""]}, "up to 16"),
        (CHAT | {"stop": 3}, "up to 16"),
        (CHAT | {"stream": 1}, "stream must be true or false"),
        (CHAT | {"stream_options": []}, "must be an object"),
        ([], "JSON object"),
    ],
)
def test_wrong_requests_are_named(data, reason):
    with pytest.raises(RequestError, match=reason):
        parse(data)


@pytest.mark.parametrize("prompt", [None, 3, [], ["a", "b"], [[1, 2]], [1, 2]])
def test_a_completion_takes_one_text(prompt):
    with pytest.raises(RequestError, match="prompt must be one text"):
        parse({"model": "m", "prompt": prompt}, "completion")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_is_refused(body):
    with pytest.raises(RequestError, match="body must be JSON"):
        schema.parse_request("chat", body, default_max_tokens=1)


def test_usage_counts_what_was_fetched():
    used = schema.usage(KVReport(prompt_tokens=10, hit_tokens=8), 3)
    assert used == {
        "prompt_tokens": 10,
        "completion_tokens": 3,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 8},
    }


@pytest.mark.parametrize(("ours", "theirs"), [("length", "length"), ("stop", "stop"), ("", None)])
def test_why_an_answer_ended(ours, theirs):
    assert schema.piece(parse(CHAT), "x", ours)["choices"][0]["finish_reason"] == theirs
