"""What a client may ask for, and what it is told when it may not."""

import numpy as np
import pytest

from kvfetcher.backend.params import (
    GenerationOptions,
    open_options,
    read_client_request,
    seal_options,
)
from kvfetcher.config import Config, TrustConfig
from kvfetcher.engines.base import SamplingParams
from kvfetcher.errors import PermissionDeniedError, RequestError
from kvfetcher.memory.permits import Permits
from support import pb_utils

PERMITS = Permits(bytes(32))
IDS = np.arange(5, dtype=np.int32)


def read(config=Config(), /, **tensors):  # noqa: B008 - frozen
    tensors.setdefault("permit", text(PERMITS.seal("fetch", "", IDS.tobytes())))
    request = pb_utils.Request({"input_ids": IDS, **tensors})
    return read_client_request(request, config, pb_utils, PERMITS)


def one(value, dtype):
    return np.array([value], dtype=dtype)


def text(*values):
    return np.array([v.encode() for v in values], dtype=object)


def test_absent_inputs_mean_the_defaults():
    asked = read()
    assert asked.input_ids.tolist() == [0, 1, 2, 3, 4]
    assert asked.kv_policy == "auto"
    assert asked.options.params == SamplingParams()
    assert (asked.options.stream, asked.options.save) == (False, True)


def test_every_input_arrives():
    asked = read(
        max_tokens=one(7, np.int32),
        stream=one(True, np.bool_),
        temperature=one(0.5, np.float32),
        top_k=one(3, np.int32),
        top_p=one(0.25, np.float32),
        seed=one(42, np.uint64),
        stop_words=text("a", "b"),
        exclude_input_in_output=one(False, np.bool_),
        min_length=one(2, np.int32),
        cache_salt=text("tenant"),
        kv_policy=text("no_store"),
    )
    assert asked.options.params == SamplingParams(
        max_tokens=7, temperature=0.5, top_k=3, top_p=0.25, seed=42, stop_words=("a", "b"),
        exclude_input_in_output=False, min_length=2,
    )  # fmt: skip
    assert (asked.options.stream, asked.options.save) == (True, False)
    assert (asked.options.cache_salt, asked.kv_policy) == ("tenant", "no_store")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_tokens", one(0, np.int32), "max_tokens must be"),
        ("max_tokens", one(10**9, np.int32), "engine.max_output_tokens"),
        ("temperature", one(np.nan, np.float32), "temperature must be"),
        ("top_p", one(1.5, np.float32), "top_p must be"),
        ("top_k", one(-1, np.int32), "top_k must be"),
        ("max_tokens", np.array([1, 2], np.int32), "must hold one value"),
        ("kv_policy", text("sometimes"), "kv_policy must be one of"),
        ("cache_salt", text("x" * 5000), "cache_salt has at most"),
        ("cache_salt", np.array([b"\xff"], dtype=object), "not UTF-8"),
        ("stop_words", text("a", "x" * 2000), "stop word"),
    ],
)
def test_a_bad_input_is_named_with_its_rule(name, value, rule):
    with pytest.raises(RequestError, match=rule):
        read(**{name: value})


def test_options_travel_between_models_unchanged():
    options = GenerationOptions(
        SamplingParams(max_tokens=3, stop_words=("x",), seed=9), stream=True, cache_salt="s"
    )
    assert GenerationOptions.from_json(options.to_json()) == options
    assert GenerationOptions.from_json("") == GenerationOptions()


@pytest.mark.parametrize("bad", ["{", "[]", '{"params":{"colour":1}}', '{"params":7}'])
def test_what_is_no_options_json_is_refused(bad):
    with pytest.raises(RequestError, match="sampling"):
        GenerationOptions.from_json(bad)


def test_an_empty_stop_word_is_none():
    """As TensorRT-LLM's documented requests have it."""
    asked = read(stop_words=text(""))
    assert asked.options.params.stop_words == ()


def test_only_what_came_through_preprocessing_is_fetched_for():
    """But warming, which gives nothing out; and everything where the models are open."""
    for permit in (
        text(""),
        text("x"),
        text(PERMITS.seal("fetch", "", b"other ids")),
        text(PERMITS.seal("generate", "", IDS.tobytes())),
        text(Permits(b"1" * 32).seal("fetch", "", IDS.tobytes())),
    ):
        with pytest.raises(PermissionDeniedError):
            read(permit=permit)
    once = text(PERMITS.seal("fetch", "", IDS.tobytes()))
    assert read(permit=once).is_internal
    with pytest.raises(PermissionDeniedError):
        read(permit=once)
    assert not read(permit=text(""), kv_policy=text("warm")).is_internal
    is_open = Config(trust=TrustConfig(internal_models="open"))
    assert not read(is_open, permit=text("")).is_internal


def test_what_is_generated_is_what_kv_fetch_sealed():
    options = GenerationOptions(save=True, cache_salt="a")
    lease = '{"lease_id":"x"}'
    sealed = seal_options(options, PERMITS, input_ids=IDS, lease=lease)
    for change in (
        {"input_ids": IDS + 1},
        {"lease": ""},
        {"lease": "\ud800"},
        {"sealed": sealed.replace('"cache_salt":"a"', '"cache_salt":"b"')},
        {"sealed": options.to_json()},
        {"sealed": ""},
    ):
        given = {"sealed": sealed, "input_ids": IDS, "lease": lease} | change
        with pytest.raises(PermissionDeniedError):
            open_options(given.pop("sealed"), PERMITS, **given)
    assert open_options(sealed, PERMITS, input_ids=IDS, lease=lease) == options
    with pytest.raises(PermissionDeniedError):  # once
        open_options(sealed, PERMITS, input_ids=IDS, lease=lease)


def test_open_models_take_no_lease_sign_or_save_of_a_clients_making():
    plain = GenerationOptions()
    asked = {"input_ids": IDS, "lease": "", "is_open": True}
    assert open_options(plain.to_json(), PERMITS, **asked) == plain
    assert open_options("", PERMITS, **asked) == plain
    for options in (GenerationOptions(save=True), GenerationOptions(fetch_id="f")):
        with pytest.raises(PermissionDeniedError):
            open_options(options.to_json(), PERMITS, **asked)
    with pytest.raises(PermissionDeniedError):
        open_options(plain.to_json(), PERMITS, **asked | {"lease": "{}"})
