"""Control socket: every operation, and every way in which a peer can misbehave."""

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import replace

import pytest

from kvfetcher.errors import (
    ArenaFullError,
    ConfigError,
    EngineError,
    LeaseError,
    RequestError,
)
from kvfetcher.memory.arena import Arena
from kvfetcher.memory.control import ControlClient, ControlServer, run_dir, socket_path
from kvfetcher.memory.leases import LeaseTable
from kvfetcher.spec import KVSpec

SPEC = KVSpec(num_layers=2, num_kv_heads=1, head_dim=8)


@pytest.fixture
def arena(tmp_path):
    made = Arena.create(tmp_path / "arena", spec=SPEC, tokens_per_block=4, num_bytes=6144)
    yield made
    made.close()


@pytest.fixture
def table(arena):
    return LeaseTable(num_blocks=arena.num_blocks, tokens_per_block=4)


@contextlib.contextmanager
def serving(path, arena, table, **overrides):
    functions = {"describe": lambda: {"name": "tiny"}, "stats": lambda: {"running": 0}} | overrides
    with ControlServer(path, arena=arena, leases=table, **functions) as server:
        yield server


@pytest.fixture
def server(tmp_path, arena, table):
    with serving(tmp_path / "engine.sock", arena, table) as made:
        yield made


@pytest.fixture
def client(server):
    with ControlClient(server.path, timeout_seconds=5.0) as made:
        yield made


@contextlib.contextmanager
def raw(server):
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(5.0)
        peer.connect(str(server.path))
        yield peer


def test_lease_seal_renew_release(client, arena, table):
    lease_id, target = client.lease(10, ttl_seconds=30)
    assert replace(target, lease_id="", expires_at=0.0) == arena.target(target.block_ids, 10)
    assert (target.lease_id, target.expires_at > 0) == (lease_id, True)
    assert client.seal(lease_id, num_tokens=8, digest="d").num_tokens == 8
    assert client.renew(lease_id).num_tokens == 8
    client.release(lease_id)
    with pytest.raises(LeaseError, match="unknown, expired or released"):
        client.release(lease_id)
    assert table.usage()["free"] == arena.num_blocks
    other, _ = client.lease(1, ttl_seconds=30)
    client.abandon(other)
    assert table.usage()["resting"] == 1


def test_a_shared_lease_and_a_live_tail_over_the_socket(client, table):
    lease_id, _ = client.lease(16, ttl_seconds=30)
    client.seal(lease_id, num_tokens=4, digest="d", num_holders=2, tail_is_live=True)
    assert client.share(lease_id).num_tokens == 4
    assert table.usage()["resting"] > 0
    for _ in range(3):
        assert table.usage()["sealed"] == 1
        client.release(lease_id)
    assert table.usage()["sealed"] == 0


def test_blocks_that_the_engine_reads_cannot_be_released_under_it(client, table):
    lease_id, _ = client.lease(4, ttl_seconds=30)
    client.seal(lease_id, num_tokens=4, digest="d")
    table.claim(lease_id, now=0.0)
    with pytest.raises(LeaseError, match="only its claimer"):
        client.release(lease_id)
    assert table.usage()["claimed"] == 1


def test_errors_keep_their_class(client):
    with pytest.raises(ArenaFullError, match="arena blocks"):
        client.lease(10_000, ttl_seconds=1)
    with pytest.raises(LeaseError, match="at least 1 token"):
        client.lease(0, ttl_seconds=1)


def test_describe_and_stats(client, arena):
    assert client.describe() == {"name": "tiny"}
    stats = client.stats()
    assert stats["running"] == 0
    assert stats["blocks"]["total"] == arena.num_blocks
    assert stats["leases"]["leased"] == 0


def test_expired_leases_end_without_a_call(client, table):
    client.lease(1, ttl_seconds=0.05)
    deadline = time.monotonic() + 10
    while table.counts.expired == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"garbage\n", "must be JSON"),
        (b"\xff\xfe\n", "must be JSON"),
        (b"[" * 100_000 + b"\n", "must be JSON"),
        (b"[1]\n", "string 'op'"),
        (b'{"op":1}\n', "string 'op'"),
        (b'{"op":"lease","args":[]}\n', "must be an object"),
        (b'{"op":"destroy"}\n', "unknown"),
        (b'{"op":"lease"}\n', "takes the arguments"),
        (b'{"op":"lease","args":{"num_tokens":true,"ttl_seconds":1.0}}\n', "must be int"),
        (b'{"op":"release","args":{"lease_id":[]}}\n', "must be str"),
    ],
)
def test_bad_lines_are_answered_and_the_connection_lives(server, line, message):
    with raw(server) as peer, peer.makefile("rb") as answers:
        peer.sendall(line)
        answer = json.loads(answers.readline())
        assert (answer["ok"], answer["error"]) == (False, "RequestError")
        assert message in answer["message"]
        peer.sendall(b'{"op":"describe"}\n')
        assert json.loads(answers.readline())["ok"] is True


def test_endless_line_ends_only_that_connection(server, client):
    with raw(server) as peer:
        with contextlib.suppress(OSError):
            for _ in range(40):
                peer.sendall(b"x" * 65536)
        with contextlib.suppress(ConnectionResetError):
            assert peer.recv(1) == b""
    assert client.describe() == {"name": "tiny"}


def test_peers_that_die_or_sit_idle_do_not_disturb_others(server, client):
    with raw(server) as half, raw(server):
        half.sendall(b'{"op":"desc')
        assert client.describe() == {"name": "tiny"}
    with raw(server) as peer:
        peer.sendall(b'{"op":"describe"}\n' * 50)  # leaves without reading
    assert client.describe() == {"name": "tiny"}


def test_cancel_reaches_the_engine_and_says_whether_it_was_in_time(tmp_path, arena, table):
    with (
        serving(tmp_path / "s", arena, table, cancel={"running"}.__contains__) as server,
        ControlClient(server.path, timeout_seconds=5) as client,
    ):
        assert client.cancel("running") is True
        assert client.cancel("over") is False


def test_bug_in_an_operation_is_an_engine_error(tmp_path, arena, table):
    def broken():
        raise ZeroDivisionError("oops")

    with (
        serving(tmp_path / "s", arena, table, describe=broken) as server,
        ControlClient(server.path, timeout_seconds=5) as client,
    ):
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            client.describe()
        assert client.stats()["running"] == 0


def test_client_without_server_says_what_to_check(tmp_path):
    client = ControlClient(tmp_path / "none", timeout_seconds=1)
    with pytest.raises(EngineError, match="is model tensorrt_llm loaded"):
        client.describe()


def test_client_gives_up_on_a_silent_server(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        client = ControlClient(tmp_path / "s", timeout_seconds=0.2)
        start = time.monotonic()
        with pytest.raises(EngineError, match="did not answer 'describe'"):
            client.describe()
        assert time.monotonic() - start < 5
        client.close()


@pytest.mark.parametrize("reply", [b"", b"nonsense\n", b"[]\n"])
def test_client_survives_a_server_that_talks_nonsense(tmp_path, reply):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        with (
            ControlClient(tmp_path / "s", timeout_seconds=5) as client,
            pytest.raises(EngineError, match="did not answer"),
        ):
            client.describe()
        thread.join()


def test_client_reconnects_to_a_restarted_engine(tmp_path, arena, table):
    path = tmp_path / "s"
    with ControlClient(path, timeout_seconds=5) as client:
        with serving(path, arena, table):
            client.describe()
        with serving(path, arena, table, describe=lambda: {"name": "second"}):
            assert client.describe() == {"name": "second"}
        with serving(path, arena, table):
            # Changes state: never sent twice by itself, works at the next call.
            with pytest.raises(EngineError, match="'lease'"):
                client.lease(1, ttl_seconds=1)
            client.lease(1, ttl_seconds=1)


def test_many_threads_share_one_client(client, arena):
    failures = []

    def work():
        try:
            for _ in range(20):
                with contextlib.suppress(ArenaFullError):
                    lease_id, _ = client.lease(3, ttl_seconds=30)
                    client.release(lease_id)
        except Exception as exc:  # noqa: BLE001  reported below
            failures.append(exc)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert client.stats()["blocks"]["free"] == arena.num_blocks


def test_socket_is_private_and_goes_with_its_server(tmp_path, arena, table):
    path = tmp_path / "s"
    server = ControlServer(path, arena=arena, leases=table, describe=dict, stats=dict)
    assert path.stat().st_mode & 0o777 == 0o600
    second = ControlServer(path, arena=arena, leases=table, describe=dict, stats=dict)
    server.close()
    assert path.exists()  # it is the second one's now
    second.close()
    second.close()
    assert not path.exists()


def test_socket_that_cannot_be_bound_is_an_engine_error(tmp_path, arena, table):
    with pytest.raises(EngineError, match="cannot be bound"):
        ControlServer(tmp_path / "no" / "s", arena=arena, leases=table, describe=dict, stats=dict)


def test_run_dir_is_made_private(tmp_path):
    folder = run_dir(environ={"KVFETCHER_RUN_DIR": str(tmp_path / "a" / "b")})
    assert folder.stat().st_mode & 0o777 == 0o700
    assert run_dir(environ={"KVFETCHER_RUN_DIR": str(folder)}) == folder


def test_default_run_dir_is_shared_by_children_of_one_parent():
    folder = run_dir(environ={})
    assert folder.name == str(os.getppid())
    assert folder.parent.name == f"kvfetcher-{os.getuid()}"
    with contextlib.suppress(OSError):  # a server of the same parent uses it
        folder.rmdir()


def test_run_dir_of_others_is_refused(tmp_path):
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(0o777)
    with pytest.raises(ConfigError, match="KVFETCHER_RUN_DIR"):
        run_dir(environ={"KVFETCHER_RUN_DIR": str(loose)})
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        run_dir(environ={"KVFETCHER_RUN_DIR": str(tmp_path / "file")})


def test_socket_path_too_long_for_the_kernel_is_refused(tmp_path):
    assert socket_path(tmp_path).name == "engine.sock"
    with pytest.raises(ConfigError, match="107 bytes"):
        socket_path(tmp_path / ("x" * 120))


def test_request_error_is_raised_for_unknown_arguments(client):
    with pytest.raises(RequestError, match="takes the arguments"):
        client._call("release", lease="x")
