"""Every parser of bytes that others may send or store: one function of bytes each, and its seeds.

A target returns for any bytes; what it may raise is caught by name, and anything else is a fault.
Seeds are made here instead of kept as files, so that they follow the formats.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.backend.params import GenerationOptions, read_client_request
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.ladder.artifact import Calibration
from kvfetcher.codec.profiles import describe_chunk, encode_chunk, restore_parsed
from kvfetcher.codec.raw import RawProfile
from kvfetcher.config import Config, load_config
from kvfetcher.engines.connector import messages
from kvfetcher.errors import KVFetcherError
from kvfetcher.format.unit import max_samples, parse_unit
from kvfetcher.launcher.probe import probe_unit
from kvfetcher.memory.arena import BlockTarget
from kvfetcher.memory.control import ControlServer
from kvfetcher.memory.leases import LeaseClaim, LeaseTable
from kvfetcher.memory.permits import Permits
from kvfetcher.memory.plane_ring import PlaneTicket
from kvfetcher.spec import KVSpec
from support import pb_utils
from support.calibrations import make_calibration
from support.kv_values import finite_values

if TYPE_CHECKING:
    from collections.abc import Callable

SPEC = KVSpec(2, 2, 8)
PERMITS = Permits(bytes(32))


@dataclass(frozen=True)
class Target:
    """One parser under test."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


_DTYPES = {
    "input_ids": "int32", "max_tokens": "int32", "min_length": "int32", "top_k": "int32",
    "temperature": "float32", "top_p": "float32", "seed": "uint64", "stream": "bool",
    "exclude_input_in_output": "bool", "stop_words": "text", "kv_policy": "text",
    "cache_salt": "text", "text_input": "text", "prompt_tag": "text",
}  # fmt: skip


def parse_chunk(data: bytes) -> None:
    try:
        facts = describe_chunk(data)
    except KVFetcherError:
        return
    assert facts["units"]


def parse_and_restore_unit(data: bytes) -> None:
    try:
        unit = parse_unit(data)
        most = max_samples(unit.spec, num_layers=unit.num_layers, num_tokens=unit.num_tokens)
        assert unit.geometry.num_frames == 0 or unit.geometry.num_samples <= most
        if unit.num_elements < 1 << 16 and unit.geometry.num_bytes < 1 << 20:
            restore_parsed(unit, np.zeros(unit.geometry.shape, unit.geometry.dtype))
    except KVFetcherError:
        return


def load_calibration(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        try:
            Calibration.load(Path(file.name))
        except KVFetcherError:
            return


def load_configuration(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        try:
            load_config(file.name, environ={})
        except KVFetcherError:
            return


def read_request(data: bytes) -> None:
    """A JSON object of tensors: name -> [dtype, values]; Triton has checked each name's dtype."""
    try:
        tensors = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(tensors, dict):
        return
    arrays = {}
    for name, value in tensors.items():
        try:
            kind, values = value
            if kind != _DTYPES.get(name):
                return
            if kind == "text":
                array = np.array([str(v).encode("utf-8", "surrogatepass") for v in values], object)
            else:
                array = np.array(values).astype(np.dtype(kind))
        except (ValueError, TypeError, OverflowError):
            return  # Triton checks types
        if array.dtype.kind not in "biufO":
            return
        arrays[name] = array
    request = pb_utils.Request(arrays)
    try:
        asked = read_client_request(request, Config(), pb_utils, PERMITS)
        assert GenerationOptions.from_json(asked.options.to_json()) == asked.options
    except KVFetcherError:
        return


def read_internal_json(data: bytes) -> None:
    """What the models send to each other as text."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    for parse in (
        GenerationOptions.from_json,
        LeaseClaim.from_json,
        BlockTarget.from_json,
        PlaneTicket.from_json,
        lambda words: PERMITS.open("write", words),
    ):
        try:
            parse(text)
        except KVFetcherError:
            continue


def answer_control_line(data: bytes) -> None:
    server = ControlServer.__new__(ControlServer)  # its socket is not under test
    server._leases = LeaseTable(num_blocks=16, tokens_per_block=8)
    server._arena = SimpleNamespace(target=lambda ids, tokens: BlockTarget("g", tuple(ids), tokens))
    server._clock = lambda: 0.0
    server._describe = dict
    server._stats = dict
    server._cancel = server._was_cancelled = lambda _: False
    answer = server._answer(data)
    assert answer["ok"] or "internal error" not in answer["message"], answer


def read_connector_line(data: bytes) -> None:
    try:
        message = messages.from_line(data)
    except KVFetcherError:
        return
    assert messages.from_line(messages.to_line(message)) == message


def _seeds_of_calibrations() -> tuple[bytes, ...]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration"
        make_calibration(SPEC).save(path)
        return (path.read_bytes(),)


def _chunk(profile: object) -> bytes:
    return encode_chunk(
        finite_values(SPEC, 20), spec=SPEC, profile=profile, identity=bytes(32),
        chunk_key=bytes(32), token_ids=range(20), first_position=0, num_threads=1,
    )  # fmt: skip


def targets() -> dict[str, Target]:
    """All targets by name."""
    lines = [
        {"op": "lease", "args": {"num_tokens": 9, "ttl_seconds": 1.5}},
        {"op": "seal", "args": {
            "lease_id": "a", "num_tokens": 1, "digest": "d", "num_holders": 1, "tail_is_live": True,
        }},
        {"op": "renew", "args": {"lease_id": "a"}},
        {"op": "cancel", "args": {"stream_id": "s"}},
        {"op": "stats"},
    ]  # fmt: skip
    internal = [
        GenerationOptions().to_json(),
        json.dumps({"lease_id": "a", "num_tokens": 1, "generation": "g"}),
        BlockTarget("g", (0, 1), 9).to_json(),
        PERMITS.seal("write", "blocks 1 to 4"),
    ]
    request = {
        "input_ids": ["int32", [1, 2]], "max_tokens": ["int32", [4]], "stop_words": ["text", ["a"]],
        "temperature": ["float32", [0.5]], "kv_policy": ["text", ["auto"]], "seed": ["uint64", [1]],
        "cache_salt": ["text", ["s"]], "text_input": ["text", ["a"]], "top_p": ["float32", [0.9]],
    }  # fmt: skip
    return {
        "chunk": Target(parse_chunk, (_chunk(ExactProfile(unit_layers=1)), _chunk(RawProfile()))),
        "unit": Target(parse_and_restore_unit, (probe_unit(),)),
        "calibration": Target(load_calibration, _seeds_of_calibrations()),
        "config": Target(load_configuration, (b'[store]\nkind = "file"\n[fetch]\n',)),
        "request": Target(read_request, (json.dumps(request).encode(),)),
        "internal_json": Target(read_internal_json, tuple(map(str.encode, internal))),
        "control": Target(answer_control_line, tuple(json.dumps(x).encode() for x in lines)),
        "connector": Target(
            read_connector_line, tuple(messages.to_line(m) for m in _connector_messages())
        ),
    }


def _connector_messages() -> list[messages.Message]:
    return [
        messages.Refused("why"),
        messages.Announce("k", "d", 9, "", 8, (1, 2), save=True),
        messages.Room("k", 1, ((1, 2), (3,)), (0, 1)),
        messages.Matched("k", 0, 8, ""),
        messages.Finished("k", 1, True, 9, (1, 2, 3), ((1,),)),
        messages.Saved("k", ok=True),
    ]
