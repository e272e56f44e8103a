"""Every request gets one answer, with the status of its failure."""

import pickle

import pytest

from kvfetcher import errors
from kvfetcher.backend.respond import (
    is_internal,
    respond_each,
    respond_each_async,
    triton_error,
    unit_error,
)
from kvfetcher.errors import (
    ArenaError,
    ChecksumError,
    CodecError,
    DecoderUnavailableError,
    GpuError,
    LayoutError,
    LeaseError,
)
from kvfetcher.fetch.failures import Failures
from support import pb_utils


def leaves(kind=errors.KVFetcherError):
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in leaves(child))]


@pytest.mark.parametrize(
    "kind", dict.fromkeys(leaves()), ids=lambda kind: f"{kind.__module__}.{kind.__name__}"
)
def test_every_error_has_a_triton_status_and_survives_pickling(kind):
    assert hasattr(pb_utils.TritonError, kind.triton_status)
    copy = pickle.loads(pickle.dumps(kind("which, rule, remedy")))
    assert (type(copy), str(copy)) == (kind, "which, rule, remedy")


def test_one_bad_request_never_fails_its_batch():
    def handle(request):
        if request.tensors["n"] == 1:
            raise errors.RequestError("n must not be 1")
        if request.tensors["n"] == 2:
            raise RuntimeError("/secret/path")
        return [pb_utils.Tensor("n", request.tensors["n"])]

    requests = [pb_utils.Request({"n": n}) for n in range(4)]
    requests[3].cancelled = True
    good, bad, bug, cancelled = respond_each(requests, handle, pb_utils)
    assert good["n"] == 0
    assert bad.error.code == pb_utils.TritonError.INVALID_ARG
    assert "n must not be 1" in bad.error.message()
    assert bug.error.code == pb_utils.TritonError.INTERNAL
    assert "RuntimeError" in bug.error.message()
    assert "secret" not in bug.error.message()
    assert cancelled.error.code == pb_utils.TritonError.CANCELLED


def test_short_work_is_done_without_asking_whether_it_is_wanted(monkeypatch):
    monkeypatch.setattr(pb_utils.Request, "is_cancelled", None)
    (done,) = respond_each([pb_utils.Request({})], lambda _: [], pb_utils, asks_cancelled=False)
    assert not done.has_error()


async def test_the_async_form_answers_each_request_too():
    async def handle(request):
        if request.tensors["n"]:
            raise errors.StoreTimeoutError("the store is slow")
        return []

    requests = [pb_utils.Request({"n": n}) for n in range(2)]
    good, bad = await respond_each_async(requests, handle, pb_utils)
    assert not good.has_error()
    assert bad.error.code == pb_utils.TritonError.UNAVAILABLE


def test_what_the_next_request_may_meet_too_is_told_from_what_is_this_ones_own():
    assert is_internal(RuntimeError("CUDA error"))
    assert is_internal(errors.EngineError("request 1 failed"))
    assert not is_internal(errors.EngineBusyError("the queue is full"))
    assert not is_internal(errors.RequestError("no such token"))


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("INVALID_ARG: unit: the digest of its planes differs", CodecError),
        ("in ensemble 'kv_pipeline', INTERNAL: the bitstream does not decode", CodecError),
        ("UNSUPPORTED: version 9, this build reads 1", CodecError),
        ("INTERNAL: KeyError; the server log has the traceback", DecoderUnavailableError),
        ("Request for unknown model: 'kv_pipeline' is not found", DecoderUnavailableError),
        ("Stub process 'kv_decode_0' is not healthy.", DecoderUnavailableError),
        ("CANCELLED: the request was cancelled", DecoderUnavailableError),
    ],
)
def test_only_what_a_units_own_bytes_may_have_caused_is_a_codec_error(message, kind):
    error = unit_error("kv_pipeline", message)
    assert type(error) is kind
    assert str(error) == f"kv_pipeline: {message}"


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (ArenaError("arena a is gone"), "arena_lost"),
        (LeaseError("lease 7 is over"), "arena_lost"),
        (GpuError("no memory left"), "gpu_error"),
        (DecoderUnavailableError("no session left"), "decoder_unavailable"),
        (CodecError("picture 3 does not decode"), "decode_error"),
        (ChecksumError("the digest differs"), "decode_error"),
        (LayoutError("too few blocks"), "decode_error"),
    ],
)
async def test_the_kind_of_a_units_error_crosses_triton(raised, reason):
    told = f"in ensemble 'kv_pipeline', {triton_error(raised, pb_utils).message()}"
    error = unit_error("kv_pipeline", told)
    assert Failures(None).note("object", error)[0] == reason
    assert str(raised) in str(error)
