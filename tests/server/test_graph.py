"""Every promise of the graph through the real tritonserver, with the real model."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from kvfetcher import wire
from kvfetcher.config import CodecConfig
from kvfetcher.engines.base import GenerateRequest, SamplingParams
from kvfetcher.engines.host import EngineHost
from kvfetcher.errors import KVFetcherError, RequestError
from kvfetcher.format import container
from kvfetcher.memory.arena import Arena
from kvfetcher.memory.control import ControlClient, socket_path
from kvfetcher.memory.split_arena import attach_arena, create_arena, find_arena
from kvfetcher.spec import HeadRange, KVSpec
from support.trust import give_out

from .conftest import CHUNK_TOKENS, start_server

pytestmark = [pytest.mark.triton, pytest.mark.slow]


def text(value):
    return np.array([value.encode()], dtype=object)


def tensor(name, array, dtype):
    made = grpcclient.InferInput(name, list(array.shape), dtype)
    made.set_data_from_numpy(array)
    return made


def stream(running, model, inputs, *, timeout=60):
    """All responses of one request to a decoupled model."""
    done, results = threading.Event(), []

    def callback(result, error):
        results.append(error or result)
        response = None if error else result.get_response()
        if error or response.parameters["triton_final_response"].bool_param:
            done.set()

    with grpcclient.InferenceServerClient(running.server.grpc_url) as client:
        client.start_stream(callback)
        client.async_stream_infer(model, inputs, enable_empty_final_response=True)
        assert done.wait(timeout)
        client.stop_stream()
    return results


def test_a_miss_is_saved_and_the_next_request_hits_with_the_same_answer(running, prompt):
    question = prompt()
    miss = running.client.generate(question, max_tokens=12)
    assert (miss.report.raw["outcome"], miss.report.hit_tokens) == ("miss", 0)
    assert miss.report.raw["reason"] == "not_stored"
    running.settle()
    hit = running.generate_hit(question, max_tokens=12)
    assert hit.report.hit_tokens == (hit.report.prompt_tokens - 1) // CHUNK_TOKENS * CHUNK_TOKENS
    assert hit.report.raw["engine"]["cached_tokens"] == hit.report.hit_tokens
    assert 0 < hit.report.bytes_fetched < hit.report.raw["bytes_bf16"]
    again = running.client.generate(question, max_tokens=12, kv_policy="recompute")
    assert (again.report.raw["outcome"], again.report.hit_tokens) == ("skipped", 0)
    assert hit.output_ids == again.output_ids == miss.output_ids
    assert hit.text == again.text == miss.text
    assert hit.text.strip()


def test_by_default_what_is_faster_is_done_and_the_report_says_why(running, prompt):
    question = prompt()
    miss = running.client.generate(question, max_tokens=4)
    running.settle()
    report = (answer := running.client.generate(question, max_tokens=4)).report.raw
    assert answer.output_ids == miss.output_ids
    gate = report["gate"]
    assert (gate["verdict"], gate["chunks_wanted"]) == ("all", report["chunks_stored"]), report
    assert gate["predicted_with_fetch_ms"] < gate["predicted_compute_ms"]
    # A machine that is busy with something else may keep fetching from what was predicted.
    assert report["outcome"] == "hit" or report["reason"] in ("fell_behind", "deadline"), report


async def own_kv(config, ids, folder):
    """KV of the whole chunks of `ids`, computed by an engine of this process."""
    request = GenerateRequest(tuple(ids.tolist()), SamplingParams(max_tokens=1), save=True)
    with EngineHost(config, run_folder=folder, arena_folder=folder) as host:
        async for event in host.engine.generate(request):
            if event.save is not None:
                parts = [host.arena.read(target) for target in event.save.targets]
                return np.concatenate(parts, axis=3)
    raise AssertionError("the engine had nothing to save")


async def test_restored_kv_equals_the_engines_own_byte_for_byte(running, prompt, tmp_path):
    """kv_fetch -> kv_pipeline -> arena through the server, against an engine of our own."""
    question = prompt(150)
    ids = running.token_ids(question)
    running.client.generate(question, max_tokens=2)
    running.settle()
    inputs = [
        tensor("input_ids", ids, "INT32"),
        tensor("kv_policy", text("fetch"), "BYTES"),
        tensor("permit", text(running.fetch_permit(ids)), "BYTES"),
    ]
    (fetched,) = stream(running, wire.KV_FETCH, inputs)
    claim = json.loads(fetched.as_numpy(wire.KV_LEASE)[0])
    assert claim["num_tokens"] == (len(ids) - 1) // CHUNK_TOKENS * CHUNK_TOKENS
    with ControlClient(socket_path(running.server.run_dir), timeout_seconds=10) as control:
        target = control.renew(claim["lease_id"])
        paths = find_arena(running.server.run_dir, target.generation)
        arena = attach_arena(paths, generation=target.generation)
        restored = arena.read(target)
        arena.close()
        control.release(claim["lease_id"])
    own = await own_kv(running.config, ids, tmp_path)
    np.testing.assert_array_equal(restored, own[:, :, :, : claim["num_tokens"]])


def test_a_longer_prompt_hits_the_part_that_is_stored(running, prompt):
    start = prompt(150)
    running.client.generate(start, max_tokens=1)
    running.settle()
    longer = running.client.generate(
        start + " And so it goes on. " * 40, max_tokens=1, kv_policy="fetch"
    )
    assert longer.report.raw["outcome"] == "partial", longer.report.raw
    assert 0 < longer.report.hit_tokens < longer.report.prompt_tokens - CHUNK_TOKENS
    assert longer.report.raw["reason"] == "not_stored"


def test_another_salt_shares_nothing(running, prompt):
    question = prompt(120)
    running.client.generate(question, max_tokens=1, cache_salt="tenant a")
    running.settle()
    options = {"max_tokens": 1, "kv_policy": "fetch"}
    other = running.client.generate(question, cache_salt="tenant b", **options)
    same = running.client.generate(question, cache_salt="tenant a", **options)
    assert other.report.hit_tokens == 0
    assert same.report.hit_tokens > 0, same.report.raw


def test_no_store_neither_reads_nor_writes(running, prompt):
    before = running.settle()
    answer = running.client.generate(prompt(120), max_tokens=1, kv_policy="no_store")
    assert answer.report.raw["outcome"] == "skipped"
    assert running.settle() == before


def test_streamed_deltas_add_up_to_the_whole_answer(running, prompt):
    question = prompt(60)
    whole = running.client.generate(question, max_tokens=10)
    pieces = list(running.client.stream(question, max_tokens=10))
    assert len(pieces) > 3
    assert "".join(piece.text for piece in pieces) == whole.text


def test_two_requests_at_once_are_both_right(running, prompt):
    questions = [prompt(80), prompt(90), prompt(100)]
    alone = [running.client.generate(q, max_tokens=8, kv_policy="no_store").text for q in questions]
    with ThreadPoolExecutor(3) as pool:
        together = list(
            pool.map(
                lambda q: running.client.generate(q, max_tokens=8, kv_policy="no_store").text,
                questions,
            )
        )
    assert together == alone


def test_one_bad_request_among_good_ones_fails_alone(running, prompt):
    def ask(options):
        try:
            return running.client.generate(options.pop("text", None) or prompt(60), **options).text
        except KVFetcherError as exc:
            return exc

    asked = [{"max_tokens": 4}, {"max_tokens": 0}, {"max_tokens": 4}, {"kv_policy": "often"}]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, asked))
    assert isinstance(answers[0], str)
    assert isinstance(answers[2], str)
    assert isinstance(answers[1], RequestError)
    assert "max_tokens must be" in str(answers[1])
    assert isinstance(answers[3], RequestError)
    assert "kv_policy must be one of" in str(answers[3])


@pytest.mark.parametrize(
    ("question", "rule"),
    [("", "empty"), ("word " * 9000, "position|longest|prompt")],
    ids=["empty", "oversize"],
)
def test_an_impossible_prompt_is_refused_with_its_rule(running, question, rule):
    with pytest.raises(RequestError, match=rule):
        running.client.generate(question, max_tokens=1)
    assert running.server.is_ready()


def test_an_unknown_tensor_is_refused_by_name(running):
    with pytest.raises(InferenceServerException, match="colour"):
        running.triton.infer(
            wire.PREPROCESSING,
            [tensor("text_input", text("x"), "BYTES"), tensor("colour", text("x"), "BYTES")],
        )


def test_a_wrong_dtype_is_refused(running):
    (error,) = stream(
        running,
        wire.KVFETCHER,
        [
            tensor("text_input", text("hello"), "BYTES"),
            tensor("max_tokens", np.array([1.0], np.float32), "FP32"),
        ],
    )
    assert isinstance(error, InferenceServerException)
    assert "max_tokens" in str(error)


def test_cancelling_mid_stream_frees_the_engine(running, prompt):
    with contextlib.closing(running.client.stream(prompt(40), max_tokens=800)) as deltas:
        next(deltas)
    running.settle(timeout_seconds=15)  # 800 tokens would take longer
    assert running.client.generate(prompt(40), max_tokens=2).text is not None


def test_http_generate_and_generate_stream(running, prompt):
    import urllib.request

    def post(verb, body):
        request = urllib.request.Request(
            f"http://{running.server.http_url}/v2/models/{wire.KVFETCHER}/{verb}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read().decode()

    question = prompt(40)
    whole = json.loads(post("generate", {"text_input": question, "max_tokens": 6}))
    assert json.loads(whole["kv_report"])["prompt_tokens"] > 40
    events = post("generate_stream", {"text_input": question, "max_tokens": 6, "stream": True})
    pieces = [json.loads(e.removeprefix("data: ")) for e in events.strip().split("\n\n")]
    assert len(pieces) > 2
    assert "".join(p["text_output"] for p in pieces) == whole["text_output"]


def test_the_http_client_sees_the_models(running):
    with httpclient.InferenceServerClient(running.server.http_url) as client:
        assert client.is_model_ready(wire.KVFETCHER)


def test_kv_encode_and_kv_pipeline_are_usable_alone(running):
    spec = {"num_layers": 6, "num_kv_heads": 2, "head_dim": 32, "dtype": "float16"}
    values = np.random.default_rng(0).normal(size=(6, 2, 2, 48, 32)).astype(np.float16)
    encoded = running.triton.infer(
        wire.KV_ENCODE,
        [
            tensor("input_ids", np.arange(48, dtype=np.int32), "INT32"),
            tensor("kv_spec", text(json.dumps({"spec": spec})), "BYTES"),
            tensor("kv_values", np.frombuffer(values.tobytes(), np.uint8), "UINT8"),
        ],
    )
    chunk = encoded.as_numpy("chunk").tobytes()
    parts = []
    for entry in container.parse_header(chunk).units:
        unit = np.frombuffer(chunk[entry.offset : entry.stop], np.uint8)[None]
        result = running.triton.infer(wire.KV_PIPELINE, [tensor("unit", unit, "UINT8")])
        parts.append(result.as_numpy("kv_values").tobytes())
    assert b"".join(parts) == values.tobytes()


def test_kv_restore_and_kv_encode_work_on_the_part_of_each_rank(running, tmp_path):
    """An arena in four parts, as of four tensor-parallel ranks, against one in one piece."""
    spec = KVSpec(num_layers=6, num_kv_heads=4, head_dim=32)
    values = np.random.default_rng(0).integers(0, 1 << 16, (6, 2, 4, 48, 32), np.uint16)
    sizes = {"spec": spec, "tokens_per_block": 16, "num_bytes": 1 << 20}
    places = {HeadRange(head, head + 1): None for head in range(4)}
    split = create_arena(tmp_path / "split", **sizes, places=places)
    whole = Arena.create(tmp_path / "whole", **sizes)

    def encode(target):
        inputs = [
            tensor("input_ids", np.arange(48, dtype=np.int32), "INT32"),
            tensor("kv_spec", text(json.dumps({"spec": spec.to_dict()})), "BYTES"),
            tensor("kv_target", text(target), "BYTES"),
        ]
        return running.triton.infer(wire.KV_ENCODE, inputs).as_numpy("chunk").tobytes()

    def restore(chunk, target):
        for entry in container.parse_header(chunk).units:
            unit = np.frombuffer(chunk[entry.offset : entry.stop], np.uint8)[None]
            inputs = [
                tensor("unit", unit, "UINT8"),
                tensor("kv_target", text(target)[None], "BYTES"),
            ]
            running.triton.infer(wire.KV_PIPELINE, inputs)

    chunks = []
    for arena in (split, whole):
        source = arena.target((2, 0, 5), 48)
        arena.write(source, 0, values)
        chunks.append(encode(give_out("read", arena, source, folder=running.server.run_dir)))
        target = arena.target((3, 7, 1), 48)
        restore(chunks[0], give_out("write", arena, target, folder=running.server.run_dir))
    assert chunks[0] == chunks[1]
    together = np.concatenate([part.blocks for part in split.parts], axis=3)
    np.testing.assert_array_equal(together[:8], whole.blocks[:8])
    np.testing.assert_array_equal(split.read(split.target((3, 7, 1), 48)), values)

    for arena in (split, whole):
        arena.close()


def test_units_of_different_sizes_share_a_batch_and_a_bad_one_fails_alone(running):
    from kvfetcher.codec import profiles

    units = []
    for tokens in (16, 40, 64):
        spec = KVSpec(num_layers=2, num_kv_heads=1, head_dim=32)
        values = np.random.default_rng(tokens).integers(
            0, 1 << 16, (2, 2, 1, tokens, 32), np.uint16
        )
        chunk = profiles.encode_chunk(
            values, spec=spec, profile=profiles.make_profile(CodecConfig()), identity=bytes(32),
            chunk_key=bytes(32), token_ids=list(range(tokens)), first_position=0, num_threads=1,
        )  # fmt: skip
        entry = container.parse_header(chunk).units[0]
        units.append((chunk[entry.offset : entry.stop], values.tobytes()))
    units.append((b"KVFUNIT\0 but not really", None))

    def run(unit):
        array = np.frombuffer(unit, np.uint8)[None]
        try:
            result = running.triton.infer(wire.KV_PIPELINE, [tensor("unit", array, "UINT8")])
        except InferenceServerException as exc:
            return exc
        return result.as_numpy("kv_values").tobytes()

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, [unit for unit, _ in units] * 4))
    for got, (_, expected) in zip(results, units * 4, strict=True):
        if expected is None:
            assert isinstance(got, InferenceServerException)
        else:
            assert got == expected


def test_metrics_count_hits_and_saves(running, prompt):
    import urllib.request

    question = prompt(100)
    running.client.generate(question, max_tokens=1)
    running.settle()
    running.generate_hit(question, max_tokens=1)
    with urllib.request.urlopen(f"http://{running.server.metrics_url}/metrics") as response:
        text = response.read().decode()
    values = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("kvfetcher_")
    }
    assert sum(v for k, v in values.items() if k.startswith("kvfetcher_hit_tokens_total")) > 0
    assert sum(v for k, v in values.items() if k.startswith("kvfetcher_saved_chunks_total")) > 0
    (units,) = (k for k in values if k.startswith("kvfetcher_units_total"))
    assert 'decoder="cpu"' in units
    assert values[units] > 0


def test_another_server_hits_what_one_saved_and_sets_a_corrupt_chunk_aside(running, prompt):
    question = prompt(200)
    others = set(running.settle())
    miss = running.client.generate(question, max_tokens=8)
    files = [path for path in running.settle() if path not in others]
    with start_server(running.store) as second:
        hit = second.generate_hit(question, max_tokens=8)
        assert hit.output_ids == miss.output_ids
        for path in files:
            data = bytearray(path.read_bytes())
            data[-3] ^= 1
            path.write_bytes(data)
        corrupt = second.client.generate(question, max_tokens=8, kv_policy="fetch")
        assert (corrupt.report.raw["outcome"], corrupt.report.hit_tokens) == ("miss", 0)
        assert corrupt.report.raw["reason"] == "corrupt_chunk"
        assert corrupt.output_ids == miss.output_ids
        # The corrupt chunks that were read are set aside, and the request's own save replaces them.
        assert set(second.settle()) == others | set(files)
        again = second.client.generate(question, max_tokens=8)
        assert again.output_ids == miss.output_ids
