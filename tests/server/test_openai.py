"""OpenAI's API in front of the real server, driven by OpenAI's own client; and the model that
Triton's OpenAI frontend drives, with the tensors that this frontend sends."""

import asyncio
import contextlib
import json
import time
import urllib.error
import urllib.request

import numpy as np
import openai
import pytest
import tritonclient.grpc as grpcclient

from kvfetcher.openai import OpenAIServer
from kvfetcher_client import AsyncClient, RequestError

pytestmark = pytest.mark.triton

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def entrance(running):
    with OpenAIServer(
        "127.0.0.1", 0, grpc_url=running.server.grpc_url, model=MODEL, default_max_tokens=12
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(entrance):
    with openai.OpenAI(base_url=entrance.url, api_key="none", max_retries=0) as client:
        yield client


def chat(text):
    return [
        {"role": "system", "content": "You answer questions about a document."},
        {"role": "user", "content": text},
    ]


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "kvfetcher"


def test_a_chat_is_what_the_template_makes_of_it_and_hits_the_second_time(running, client, prompt):
    messages = chat(prompt())
    first = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8)
    text = running.client.chat_prompt(messages)
    assert text.startswith("<|im_start|>system\nYou answer")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert first.choices[0].message.content == running.client.generate(text, max_tokens=8).text
    assert first.choices[0].finish_reason == "length"
    assert first.usage.completion_tokens == 8
    assert first.usage.prompt_tokens == len(running.token_ids(text))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    running.settle()
    again = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=8, extra_body={"kv_policy": "fetch"}
    )
    assert again.choices[0].message.content == first.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens > 100


def test_a_stream_gives_the_same_answer_and_its_usage(client, prompt):
    messages = chat(prompt(50))
    whole = client.chat.completions.create(model=MODEL, messages=messages, seed=3, temperature=0.8)
    pieces = list(
        client.chat.completions.create(
            model=MODEL,
            messages=messages,
            seed=3,
            temperature=0.8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == whole.choices[0].message.content
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert pieces[-1].choices == []


def test_completions_stop_and_echo(running, client):
    whole = client.completions.create(model=MODEL, prompt="Count: 1, 2, 3, 4,", max_tokens=12)
    assert (
        whole.choices[0].text == running.client.generate("Count: 1, 2, 3, 4,", max_tokens=12).text
    )
    stopped = client.completions.create(
        model=MODEL, prompt="Count: 1, 2, 3, 4,", max_tokens=12, stop=[" 6", "never"], echo=True
    )
    assert stopped.choices[0].text.startswith("Count: 1, 2, 3, 4,")
    assert " 6" not in stopped.choices[0].text
    assert stopped.choices[0].finish_reason == "stop"
    pieces = client.completions.create(model=MODEL, prompt="Count: 1,", max_tokens=3, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces)


def test_errors_have_openais_form(client):
    def ask(**more):
        client.chat.completions.create(**{"model": MODEL, "messages": chat("x"), **more})

    with pytest.raises(openai.NotFoundError) as caught:
        ask(model="gpt-5")
    assert caught.value.code == "model_not_found"
    for more in ({"temperature": -1}, {"max_tokens": 10**6}, {"messages": []}, {"n": 3}):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(**more)
        assert caught.value.type == "invalid_request_error"
        assert next(iter(more)) in str(caught.value)
    with pytest.raises(openai.BadRequestError):
        ask(temperature=-1, stream=True)
    with pytest.raises(openai.APIStatusError) as caught:
        ask(messages=chat("x" * (17 << 20)))
    assert caught.value.status_code == 413


async def test_many_at_one_time_and_one_that_goes_away(running, entrance, prompt):
    text = prompt(30)
    async with openai.AsyncOpenAI(base_url=entrance.url, api_key="none") as client:

        async def ask():
            answer = await client.chat.completions.create(model=MODEL, messages=chat(text))
            return answer.choices[0].message.content

        async def leave():
            stream = await client.chat.completions.create(
                model=MODEL, messages=chat(text), max_tokens=1000, stream=True
            )
            async for _ in stream:
                break
            await stream.close()

        _, *answers = await asyncio.gather(leave(), *(ask() for _ in range(4)))
    assert len(set(answers)) == 1
    started = time.monotonic()
    await asyncio.to_thread(running.settle)  # nothing runs on
    assert time.monotonic() - started < 60


async def test_without_a_server_it_says_so():
    with OpenAIServer(
        "127.0.0.1", 0, grpc_url="127.0.0.1:9", model=MODEL, default_max_tokens=5
    ) as alone:
        async with openai.AsyncOpenAI(base_url=alone.url, api_key="x", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                await client.completions.create(model=MODEL, prompt="x")
    assert caught.value.status_code == 503
    assert caught.value.code == "unavailable"


class TestClientChat:
    def test_chat_and_stream_chat(self, running, prompt):
        messages = chat(prompt(20))
        whole = running.client.chat(messages, max_tokens=6)
        pieces = list(running.client.stream_chat(messages, max_tokens=6))
        assert "".join(piece.text for piece in pieces) == whole.text

    async def test_async(self, running, prompt):
        messages = chat(prompt(20))
        client = AsyncClient(running.server.grpc_url)
        try:
            whole = await client.chat(messages, max_tokens=6)
            pieces = [piece.text async for piece in client.stream_chat(messages, max_tokens=6)]
        finally:
            await client.close()
        assert "".join(pieces) == whole.text

    @pytest.mark.parametrize("messages", [[], [{"role": "x", "content": "y"}], [3]])
    def test_wrong_messages(self, running, messages):
        with pytest.raises(RequestError, match="message"):
            running.client.chat(messages)


# What `_create_trtllm_inference_request` of Triton's OpenAI frontend sends
# (server/python/openai/openai_frontend/engine/utils/triton.py): every scalar is [1, 1].
FRONTEND = {
    "stream": ("BOOL", np.bool_([[False]])),
    "max_tokens": ("INT32", np.int32([[6]])),
    "frequency_penalty": ("FP32", np.float32([[0.0]])),
    "presence_penalty": ("FP32", np.float32([[0.0]])),
    "return_num_input_tokens": ("BOOL", np.bool_([[True]])),
    "return_num_output_tokens": ("BOOL", np.bool_([[True]])),
    "top_p": ("FP32", np.float32([[1.0]])),
    "temperature": ("FP32", np.float32([[0.0]])),
    "seed": ("UINT64", np.uint64([[5]])),
}


def as_the_frontend(running, text, **more):
    """Responses of `kvfetcher_openai` until the final one, as numpy arrays by name."""
    tensors = {"text_input": ("BYTES", np.array([[text.encode()]], object)), **FRONTEND, **more}
    inputs = []
    for name, (datatype, array) in tensors.items():
        tensor = grpcclient.InferInput(name, array.shape, datatype)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    with contextlib.closing(grpcclient.InferenceServerClient(running.server.grpc_url)) as triton:
        done = []
        triton.start_stream(lambda result, error: done.append((result, error)))
        triton.async_stream_infer(
            "kvfetcher_openai", inputs, enable_empty_final_response=True, request_id="from-openai"
        )
        deadline = time.monotonic() + 60
        while not (done and is_final(done[-1])):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        triton.stop_stream()
    if done[-1][1] is not None:
        raise done[-1][1]
    return [
        {name: result.as_numpy(name) for name in ("text_output", "finish_reason", *USAGE)}
        for result, _ in done
        if result.get_response().outputs
    ]


USAGE = ("num_input_tokens", "num_output_tokens")


def is_final(answer):
    result, error = answer
    if error is not None:
        return True
    return result.get_response().parameters["triton_final_response"].bool_param


class TestTheModelOfTritonsFrontend:
    def test_one_answer_with_its_usage(self, running):
        (answer,) = as_the_frontend(running, "Count: 1, 2, 3, 4,")
        expected = running.client.generate("Count: 1, 2, 3, 4,", max_tokens=6)
        assert answer["text_output"].size == 1
        assert answer["text_output"].ravel()[0].decode() == expected.text
        assert all(answer[name].dtype == np.uint32 for name in USAGE)
        assert answer["num_input_tokens"].ravel()[0] == expected.report.prompt_tokens
        assert answer["num_output_tokens"].ravel()[0] == len(expected.output_ids) == 6

    def test_a_stream_counts_each_piece(self, running):
        stream = {"stream": ("BOOL", np.bool_([[True]]))}
        stops = {"stop_words": ("BYTES", np.array([[b" 7", b"never"]], object))}
        pieces = as_the_frontend(running, "Count: 1, 2, 3, 4,", **stream, **stops)
        assert len(pieces) > 1
        assert sum(int(p["num_output_tokens"].ravel()[0]) for p in pieces) <= 6
        assert len({int(p["num_input_tokens"].ravel()[0]) for p in pieces}) == 1

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [
            ("frequency_penalty", ("FP32", np.float32([[0.5]]))),
            ("guided_decoding_guide", ("BYTES", np.array([[b"{}"]], object))),
        ],
    )
    def test_what_it_cannot_do_is_refused_by_name(self, running, name, tensor):
        with pytest.raises(Exception, match=f"{name} is not supported"):
            as_the_frontend(running, "x", **{name: tensor})

    def test_d16_the_log_names_the_request(self, running):
        as_the_frontend(running, "Count: 1, 2, 3, 4,")
        assert "request from-openai: fetch" in running.server.log_path.read_text(errors="replace")


@pytest.mark.parametrize(
    "option", [{"beam_width": 2}, {"bad_words": "x"}, {"return_log_probs": True}, {"typo": 1.5}]
)
def test_d10_an_option_that_nothing_reads_is_refused(running, option):
    def ask(**more):
        request = urllib.request.Request(
            f"http://{running.server.http_url}/v2/models/kvfetcher/generate",
            json.dumps({"text_input": "x", "max_tokens": 1, **more}).encode(),
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.read().decode()
        except urllib.error.HTTPError as exc:
            return exc.read().decode()

    assert "text_output" in ask()
    (name,) = option
    assert f"{name} is not an input of this model" in ask(**option)
