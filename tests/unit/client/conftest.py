"""A small decoupled `kvfetcher` model on a real tritonserver, whose prompt says how to behave."""

import pytest

from kvfetcher import wire
from support.triton_server import TritonServer, server_config, write_model

CONFIG = """
name: "kvfetcher"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [
  { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] optional: true },
  { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true },
  { name: "temperature" data_type: TYPE_FP32 dims: [ 1 ] optional: true },
  { name: "top_k" data_type: TYPE_INT32 dims: [ 1 ] optional: true },
  { name: "top_p" data_type: TYPE_FP32 dims: [ 1 ] optional: true },
  { name: "seed" data_type: TYPE_UINT64 dims: [ 1 ] optional: true },
  { name: "stop_words" data_type: TYPE_STRING dims: [ -1 ] optional: true },
  { name: "exclude_input_in_output" data_type: TYPE_BOOL dims: [ 1 ] optional: true },
  { name: "min_length" data_type: TYPE_INT32 dims: [ 1 ] optional: true },
  { name: "cache_salt" data_type: TYPE_STRING dims: [ 1 ] optional: true },
  { name: "kv_policy" data_type: TYPE_STRING dims: [ 1 ] optional: true }
]
output [
  { name: "text_output" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "output_ids" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "finish_reason" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "kv_report" data_type: TYPE_STRING dims: [ 1 ] }
]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""

MODEL = """
import asyncio
import json

import numpy as np
import triton_python_backend_utils as pb_utils

NAMES = NAMES_OF_INPUTS
REPORT = {
    "prompt_tokens": 10, "hit_tokens": 8, "bytes_fetched": 1234, "reason": "not_stored",
    "stages_ms": {"lookup": 0.5}, "of_a_later_version": [1],
}


def response(text="", ids=(), finish="", report=""):
    def strings(value):
        return np.array([value.encode()], dtype=object)

    return pb_utils.InferenceResponse([
        pb_utils.Tensor("text_output", strings(text)),
        pb_utils.Tensor("output_ids", np.array(ids, dtype=np.int32)),
        pb_utils.Tensor("finish_reason", strings(finish)),
        pb_utils.Tensor("kv_report", strings(report)),
    ])


def inputs_of(request):
    found = {}
    for name in NAMES:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is not None:
            values = tensor.as_numpy()
            found[name] = {
                "shape": list(values.shape),
                "values": [v.decode() if isinstance(v, bytes) else v.item() for v in values],
            }
    return found


class TritonPythonModel:
    def initialize(self, args):
        self.cancelled = 0

    async def execute(self, requests):
        for request in requests:
            await self.answer(request, request.get_response_sender())

    async def answer(self, request, sender):
        inputs = inputs_of(request)
        behaviour, _, rest = inputs["text_input"]["values"][0].partition(" ")
        report = json.dumps(REPORT)
        if behaviour == "inputs":
            sender.send(response(json.dumps(inputs), [1], "stop", report))
        elif behaviour == "count":
            for i in range(int(rest)):
                await asyncio.sleep(0.01)
                sender.send(response(f"{i} ", [i], report=report if i == 0 else ""))
            sender.send(response("", [], "length", json.dumps({**REPORT, "hit_tokens": 9})))
        elif behaviour == "fail":
            code, _, message = rest.partition(" ")
            error = pb_utils.TritonError(f"{code}: {message}", getattr(pb_utils.TritonError, code))
            sender.send(pb_utils.InferenceResponse(error=error))
        elif behaviour == "Why":
            sender.send(response("It scatters", [1, 2], report=report))
            sender.send(response(" blue light.", [3, 4], "stop", report))
        elif behaviour == "unfinished":
            sender.send(response("half", [1], report=report))
        elif behaviour == "garbage":
            sender.send(response("x", [1], "stop", "no json"))
        elif behaviour == "cancelled":
            sender.send(response(str(self.cancelled), [1], "stop", report))
        elif behaviour == "endless":
            while not sender.is_cancelled():
                sender.send(response("more ", [7]))
                await asyncio.sleep(0.02)
            self.cancelled += 1
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

INPUTS = [
    wire.TEXT_INPUT,
    wire.MAX_TOKENS,
    wire.STREAM,
    wire.TEMPERATURE,
    wire.TOP_K,
    wire.TOP_P,
    wire.SEED,
    wire.STOP_WORDS,
    wire.EXCLUDE_INPUT_IN_OUTPUT,
    wire.MIN_LENGTH,
    wire.CACHE_SALT,
    wire.KV_POLICY,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A ready server; one per test file."""
    repository = tmp_path_factory.mktemp("repository")
    model = MODEL.replace("NAMES_OF_INPUTS", repr(INPUTS))
    write_model(repository, "kvfetcher", config=CONFIG, model=model)
    write_model(repository, "other", config=CONFIG.replace('"kvfetcher"', '"other"'), model=model)
    with TritonServer(server_config(), model_repository=repository) as server:
        yield server
