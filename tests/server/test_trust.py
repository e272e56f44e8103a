"""A client that reaches every port, against the inner models: nothing of another's is read or written."""

import json
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from kvfetcher import wire
from kvfetcher.launcher.probe import probe_unit
from kvfetcher.memory.control import ControlClient, socket_path
from kvfetcher.memory.leases import LeaseClaim
from kvfetcher.memory.permits import Permits
from kvfetcher.memory.split_arena import attach_arena, find_arena

from .conftest import CHUNK_TOKENS

pytestmark = [pytest.mark.triton, pytest.mark.slow]

DENIED = "NOT_FOUND: permission denied"
SENTENCE = (
    f"{DENIED}: this request needs a permit that the server issued for it, and which still holds;"
    " send requests to the model kvfetcher"
)


def text(value, *, batched=False):
    array = np.array([value.encode() if isinstance(value, str) else value], dtype=object)
    return array[None] if batched else array


def tensor(name, array):
    kinds = {"O": "BYTES", "i": f"INT{8 * array.itemsize}", "u": "UINT8", "f": "FP32"}
    made = grpcclient.InferInput(name, list(array.shape), kinds[array.dtype.kind])
    made.set_data_from_numpy(array)
    return made


def answers(running, model, inputs, *, timeout=30.0):
    """What a decoupled model answers: results and the last error's text."""
    over, results, errors = threading.Event(), [], []

    def callback(result, error):
        if error is not None:
            errors.append(str(error.message()))
            over.set()
            return
        results.append(result)
        if result.get_response().parameters["triton_final_response"].bool_param:
            over.set()

    with grpcclient.InferenceServerClient(running.server.grpc_url) as client:
        client.start_stream(callback)
        client.async_stream_infer(model, inputs, enable_empty_final_response=True)
        assert over.wait(timeout), f"{model} did not answer"
        client.stop_stream()
    return results, "".join(errors)


def refusal(running, model, inputs):
    """The error that a model which gives one answer gives."""
    with pytest.raises(InferenceServerException) as refused:
        running.triton.infer(model, inputs, client_timeout=30)
    return refused.value.message()


@pytest.fixture(scope="module")
def victim(running):
    """Tenant A's lease, held while the attacks run, and A's values in it."""
    with ControlClient(socket_path(running.server.run_dir), timeout_seconds=10) as control:
        lease_id, target = control.lease(CHUNK_TOKENS, ttl_seconds=300)
        paths = find_arena(running.server.run_dir, target.generation)
        arena = attach_arena(paths, generation=target.generation)
        arena.write(target, 0, np.full_like(arena.read(target), 0x3F80))
        yield lease_id, target, arena
        arena.close()
        control.abandon(lease_id)


def forged(target, right):
    """Targets that no process of this server run gave out for this."""
    named = target.to_json()
    path = target.to_dict() | {"arena": "/dev/shm/kvfetcher-arena", "generation": "0" * 32}
    other = Permits(bytes(32)).seal(right, named)
    return [named, json.dumps(path), "/etc/passwd", other, other[:120], "x", "\x00", "{" * 1000]


def test_no_target_of_a_clients_making_reads_or_writes_the_arena(running, victim):
    _, target, arena = victim
    before = arena.read(target)
    unit = np.frombuffer(probe_unit(), np.uint8)[None]
    spec = tensor(wire.KV_SPEC, text(json.dumps({"spec": arena.spec.to_dict()})))
    ids = tensor(wire.INPUT_IDS, np.arange(CHUNK_TOKENS, dtype=np.int32))
    over = running.permits.seal("write", target.to_json(), expires_at=1.0)
    for made in [*forged(target, "write"), over, running.permits.seal("read", target.to_json())]:
        batched = tensor(wire.KV_TARGET, text(made, batched=True))
        assert SENTENCE in refusal(running, wire.KV_PIPELINE, [tensor(wire.UNIT, unit), batched])
        planes = tensor(wire.PLANES, np.zeros((1, 1, 1, 1, 1), np.uint8))
        inputs = [tensor(wire.UNIT, unit), planes, batched]
        assert SENTENCE in refusal(running, wire.KV_RESTORE, inputs)
    for made in [*forged(target, "read"), running.permits.seal("write", target.to_json())]:
        inputs = [ids, spec, tensor(wire.KV_TARGET, text(made))]
        assert SENTENCE in refusal(running, wire.KV_ENCODE, inputs)
    np.testing.assert_array_equal(arena.read(target), before)


def test_no_planes_of_a_clients_making_are_looked_for(running, tmp_path):
    """A ticket of planes names a file, and the reader clears a number in it."""
    file = tmp_path / "table"
    file.write_bytes(b"\x07" + bytes(4095))
    ticket = {
        "table": str(file), "gpu": 0, "handle": "00" * 64, "event": "00" * 64, "owner": 1,
        "entry": 0, "ticket": 7, "offset": 0, "num_bytes": 1, "shift": 0,
    }  # fmt: skip
    for made in (json.dumps(ticket), Permits(bytes(32)).seal("planes", json.dumps(ticket))):
        inputs = [
            tensor(wire.UNIT, np.frombuffer(probe_unit(), np.uint8)[None]),
            tensor(wire.PLANES, np.zeros((1, 1, 1, 1, 1), np.uint8)),
            tensor(wire.PLANES_AT, text(made, batched=True)),
        ]
        assert SENTENCE in refusal(running, wire.KV_RESTORE, inputs)
    assert file.read_bytes()[0] == 7


def test_nothing_is_saved_under_another_tenants_prompt(running, prompt, victim):
    lease_id, target, _ = victim
    ids = np.resize(running.token_ids(prompt(100)), CHUNK_TOKENS)
    ticket = {
        "lease_id": lease_id, "targets": [target.to_dict()], "first_chunk_index": 0,
        "cache_salt": "",
    }  # fmt: skip
    before = running.chunk_files()
    sealed = Permits(bytes(32)).seal("save", json.dumps(ticket), ids.tobytes())
    for made in (json.dumps(ticket), sealed, "", "[]", "null", '{"targets": 1}'):
        inputs = [tensor(wire.INPUT_IDS, ids), tensor(wire.KV_LEASE, text(made))]
        assert SENTENCE in refusal(running, wire.KV_SAVE, inputs)
    assert running.chunk_files() == before


def test_kv_fetch_and_the_llm_refuse_outsiders(running, prompt, victim):
    """Also a lease id that is no UTF-8, and unknown keys: each is answered, with one sentence."""
    lease_id, target, _ = victim
    ids = running.token_ids(prompt(60))
    claim = LeaseClaim(lease_id, CHUNK_TOKENS, target.generation).to_json()
    plain = [tensor(wire.INPUT_IDS, ids)]
    told = set()
    for policy in ("auto", "fetch", "recompute"):
        inputs = [*plain, tensor(wire.KV_POLICY, text(policy))]
        told.add(answers(running, wire.KV_FETCH, inputs)[1])
    for sampling, lease in (
        ("", ""),
        ("{}", claim),
        ('{"save": true}', ""),
        ('{"fetch_id": "0"}', ""),
        ('{"\\ud800": 1}', ""),
        ("{}", '{"lease_id":"\\ud800","num_tokens":1,"generation":""}'),
        (Permits(bytes(32)).seal("generate", "{}", ids.tobytes(), b""), ""),
    ):
        inputs = [
            *plain,
            tensor(wire.SAMPLING, text(sampling)),
            tensor(wire.KV_LEASE, text(lease)),
        ]
        told.add(answers(running, wire.TENSORRT_LLM, inputs)[1])
    not_text = [*plain, tensor(wire.KV_LEASE, text(b"\xff"))]
    assert "INVALID_ARG" in answers(running, wire.TENSORRT_LLM, not_text)[1]
    assert told == {SENTENCE}


def test_a_permit_of_preprocessing_holds_once(running, prompt):
    question = prompt(60)
    asked = tensor(wire.TEXT_INPUT, text(question))
    tokens = running.triton.infer(wire.PREPROCESSING, [asked])
    ids, permit = tokens.as_numpy(wire.INPUT_IDS), tokens.as_numpy(wire.PERMIT)
    inputs = [
        tensor(wire.INPUT_IDS, ids),
        tensor(wire.PERMIT, permit),
        tensor(wire.KV_POLICY, text("recompute")),
    ]
    results, error = answers(running, wire.KV_FETCH, inputs)
    assert (error, results[0].as_numpy(wire.KV_LEASE)[0]) == ("", b"")
    assert answers(running, wire.KV_FETCH, inputs)[1] == SENTENCE
    other = [tensor(wire.INPUT_IDS, ids + 1), *inputs[1:]]
    assert answers(running, wire.KV_FETCH, other)[1] == SENTENCE


def test_tritons_own_apis_are_closed_to_clients(running):
    region = next(iter(running.server.run_dir.glob("arena-*.json")))
    path = json.loads(region.read_text())[0]
    name = f"/{path.rpartition('/')[2]}"
    client = running.triton
    for call in (
        lambda: client.register_system_shared_memory("a", name, 4096),
        client.get_system_shared_memory_status,
        client.unregister_system_shared_memory,
        lambda: client.update_log_settings({"log_file": "/tmp/kvfetcher-attack"}),
        lambda: client.update_trace_settings(settings={"trace_level": ["TENSORS"]}),
        client.get_model_repository_index,
        lambda: client.unload_model(wire.KV_FETCH),
    ):
        with pytest.raises(InferenceServerException, match="restricted"):
            call()
    for api, body in (
        ("systemsharedmemory/region/a/register", {"key": name, "offset": 0, "byte_size": 4096}),
        ("logging", {"log_file": "/tmp/kvfetcher-attack"}),
        ("trace/setting", {"trace_level": ["TENSORS"]}),
        ("repository/index", {}),
    ):
        request = urllib.request.Request(
            f"http://{running.server.http_url}/v2/{api}", json.dumps(body).encode(), method="POST"
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        refused.value.close()
        assert refused.value.code == 403, api
    assert client.is_server_ready()


def test_random_tensors_sent_directly_are_the_senders_fault(running):
    """Never INTERNAL, never unanswered: 18 of 204 were."""
    rng, bad = np.random.default_rng(20), []
    texts = ["", "{}", "[]", "null", "7", '{"a":1}', '{"spec":{}}', "\x00", "x" * 5000]
    models = {
        wire.KV_ENCODE: (wire.INPUT_IDS, wire.KV_SPEC, wire.KV_TARGET, wire.KV_VALUES),
        wire.KV_DECODE: (wire.UNIT, wire.KV_TARGET),
        wire.KV_RESTORE: (
            wire.UNIT, wire.PLANES, wire.PLANES_AT, wire.DECODE_STATUS, wire.KV_TARGET,
        ),
        wire.KV_PIPELINE: (wire.UNIT, wire.KV_TARGET),
        wire.KV_SAVE: (wire.INPUT_IDS, wire.KV_LEASE),
    }  # fmt: skip
    unit = probe_unit()
    for number in range(100):
        model = list(models)[number % len(models)]
        batched = model not in (wire.KV_ENCODE, wire.KV_SAVE)
        inputs = []
        for name in models[model]:
            if name == wire.INPUT_IDS:
                array = rng.integers(-(1 << 31), 1 << 31, rng.integers(0, 9), dtype=np.int32)
            elif name in (wire.UNIT, wire.KV_VALUES):
                cut = int(rng.integers(0, len(unit)))
                data = unit if number % 2 else unit[:cut] + rng.bytes(len(unit) - cut)
                array = np.frombuffer(data, np.uint8)
                array = array[None] if batched else array
            elif name == wire.PLANES:
                shape = (1, *rng.integers(0, 4, 4))
                array = rng.integers(0, 256, shape, dtype=np.uint8)
            elif rng.integers(0, 2) and name not in (wire.KV_SPEC, wire.KV_LEASE):
                continue
            else:
                array = text(texts[int(rng.integers(0, len(texts)))], batched=batched)
            inputs.append(tensor(name, array))
        try:
            running.triton.infer(model, inputs, client_timeout=30)
        except InferenceServerException as exc:
            said = exc.message()
            if "INTERNAL: " in said or "Deadline" in said:
                bad.append((number, model, said[:200]))
    assert bad == []
    assert running.triton.is_server_ready()
