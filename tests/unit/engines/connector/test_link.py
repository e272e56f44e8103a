"""The socket between the arena's owner and the ranks: start, versions, ends."""

import json
import socket
import subprocess
import sys
import threading
import time

import pytest

from kvfetcher.config import Config, ConnectorConfig, FetchConfig
from kvfetcher.engines.connector import link as link_module
from kvfetcher.engines.connector.link import OwnerLink
from kvfetcher.engines.connector.messages import (
    Announce,
    Copied,
    Finished,
    Matched,
    Probed,
    Ready,
    Room,
    Saved,
    Withdraw,
    Withdrawn,
    to_line,
)
from kvfetcher.engines.connector.server import ConnectorHub, HubSettings, hub_settings
from kvfetcher.errors import ArenaError, EngineError
from kvfetcher.memory.arena import Arena
from kvfetcher.memory.leases import LeaseTable
from kvfetcher.spec import KVSpec

SPEC = KVSpec(num_layers=1, num_kv_heads=1, head_dim=4)
PROMPT = tuple(range(20))


class Owner:
    """A hub whose clock the test moves, over a small arena."""

    def __init__(self, folder, *, num_ranks=1, **settings):
        self.now = 0.0
        self.arena = Arena.create(
            folder / "arena", spec=SPEC, tokens_per_block=4, num_bytes=1 << 13
        )
        self.leases = LeaseTable(num_blocks=self.arena.num_blocks, tokens_per_block=4)
        values = {
            "spec": SPEC,
            "tokens_per_block": 4,
            "chunk_tokens": 8,
            "layout": "HND",
            "async_load_tokens": 0,
            "save_timeout_seconds": 1.0,
            "save_generated": True,
            "lease_ttl_seconds": 10.0,
        }
        self.hub = ConnectorHub(
            folder / "c.sock",
            num_ranks=num_ranks,
            arena=self.arena,
            leases=self.leases,
            settings=HubSettings(**values | settings),
            clock=lambda: self.now,
        )

    def lease(self, tokens):
        lease = self.leases.lease(tokens, 10.0, now=self.now)
        self.leases.seal(lease.id, tokens, "", now=self.now)
        return self.leases.claim(lease.id, now=self.now)

    def close(self):
        self.hub.close()
        self.arena.close()


class Rank:
    """A connection that collects what it hears."""

    def __init__(self, owner, rank=0, num_ranks=1):
        self.heard = []
        self.link = OwnerLink(owner.hub.path, rank=rank, num_ranks=num_ranks, timeout_seconds=5.0)
        self.link.start(self.heard.append)

    def ready(self):
        self.link.send(Ready(8, "facts"))
        return self

    def hears(self, kind):
        wait(lambda: any(isinstance(m, kind) for m in self.heard))
        return [m for m in self.heard if isinstance(m, kind)]


def wait(condition):
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.fixture
def owner_of(tmp_path):
    made = []

    def make(**options):
        made.append(Owner(tmp_path, **options))
        return made[-1]

    yield make
    for owner in made:
        owner.close()


@pytest.fixture
def owner(owner_of):
    return owner_of()


def announce(owner, *, lease=None, save=True, **options):
    return owner.hub.announce(PROMPT, cache_salt="", lease=lease, save=save, **options)


def test_welcome_and_ready(owner):
    rank = Rank(owner).ready()
    assert rank.link.welcome.arena == str(owner.arena.path)
    assert rank.link.welcome.spec == SPEC.to_dict()
    owner.hub.wait_ready(5)
    assert owner.hub.facts == ("facts",)
    rank.link.close()
    rank.link.close()


def test_owner_that_is_not_there(tmp_path):
    with pytest.raises(EngineError, match="KVFETCHER_RUN_DIR"):
        OwnerLink(tmp_path / "none", rank=0, num_ranks=1, timeout_seconds=0.1)


@pytest.mark.parametrize(
    ("rank", "num_ranks", "message"),
    [
        (0, 2, "the engine has 2 ranks, 1 were expected"),
        (1, 1, "not one of this engine"),
        (0, 1, "connected already"),
    ],
)
def test_rank_that_does_not_belong_is_refused(owner, rank, num_ranks, message):
    first = Rank(owner)
    with pytest.raises(EngineError, match=message):
        OwnerLink(owner.hub.path, rank=rank, num_ranks=num_ranks, timeout_seconds=5.0)
    first.link.close()


@pytest.mark.parametrize("line", [b"", b"nonsense\n", to_line(Copied("a"))])
def test_owner_of_another_version(tmp_path, line):
    path = tmp_path / "s"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def answer():
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(line)

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(EngineError, match=r"did not answer|answered"):
        OwnerLink(path, rank=0, num_ranks=1, timeout_seconds=5.0)
    thread.join()
    listener.close()


@pytest.mark.parametrize("line", [b"nonsense\n", to_line(Copied("a"))])
def test_stranger_at_the_owners_socket_harms_nobody(owner, line):
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(owner.hub.path))
        stranger.sendall(line)
        stranger.recv(1000)
    rank = Rank(owner).ready()
    owner.hub.wait_ready(5)
    assert not owner.hub.dead
    rank.link.close()


def test_fault_at_a_message_ends_the_link_for_both(owner):
    def fail(message):
        raise KeyError("no such thing")

    rank = Rank(owner).ready()
    owner.hub.wait_ready(5)
    rank.link._receive = fail
    announce(owner)
    wait(lambda: not rank.link.is_open and owner.hub.dead)
    rank.link.close()


def test_fault_of_the_hub_at_a_message_is_the_end_of_the_engine(owner, monkeypatch):
    rank = Rank(owner).ready()
    owner.hub.wait_ready(5)
    monkeypatch.setattr(owner.hub, "_advance", lambda *_: {}["missing"])
    handle = announce(owner)
    rank.link.send(Copied(handle.announce.key))
    wait(lambda: owner.hub.dead and not rank.link.is_open)
    assert handle.ticket.result(5) is None
    rank.link.close()


def test_room_lives_as_long_as_a_rank_may_take():
    config = Config(
        connector=ConnectorConfig(save_timeout_seconds=100.0),
        fetch=FetchConfig(lease_ttl_seconds=30.0),
    )
    assert hub_settings(config, SPEC).lease_ttl_seconds == 200
    assert hub_settings(Config(), SPEC).lease_ttl_seconds == FetchConfig().lease_ttl_seconds


def test_owner_that_speaks_nonsense_later_is_left(owner):
    rank = Rank(owner).ready()
    owner.hub.wait_ready(5)
    owner.hub._ranks[0]._connection.sendall(b"nonsense\n")
    wait(lambda: not rank.link.is_open)
    rank.link.send(Copied("a"))  # goes nowhere, raises nothing
    rank.link.close()


def test_rank_that_speaks_nonsense_is_the_end_of_the_engine(owner):
    rank = Rank(owner).ready()
    owner.hub.wait_ready(5)
    rank.link._socket.sendall(b"nonsense\n")
    wait(lambda: owner.hub.dead)
    rank.link.close()


def test_missing_rank_is_named(owner_of):
    owner = owner_of(num_ranks=2)
    rank = Rank(owner, num_ranks=2).ready()
    with pytest.raises(EngineError, match="1 of 2 engine ranks"):
        owner.hub.wait_ready(0.2)
    rank.link.close()


def test_probe_that_proves_nothing_names_the_setting(owner_of):
    owner = owner_of(layout="")
    rank = Rank(owner).ready()
    owner.hub.wait_ready(5)
    early = announce(owner, lease=owner.lease(8))
    assert early.is_announced.result(1) is False  # nothing goes before the layout is known
    assert owner.leases.usage()["claimed"] == 0
    rank.link.send(Probed(""))
    with pytest.raises(EngineError, match=r"connector\.kv_layout"):
        owner.hub.wait_layout(5)
    rank.link.close()


def test_probe_that_contradicts_the_configured_layout_is_the_end(owner_of):
    owner = owner_of(layout="NHD")
    rank = Rank(owner).ready()
    owner.hub.wait_ready(5)
    rank.link.send(Probed(""))
    owner.hub.wait_layout(5)
    assert (owner.hub.layouts, owner.hub.is_layout_proven) == (("NHD",), False)
    rank.link.send(Probed("HND"))
    wait(lambda: owner.hub.is_layout_proven)
    with pytest.raises(EngineError, match=r"kv_layout = 'NHD', but .*\['HND'\].*set it to auto"):
        owner.hub.wait_layout(5)
    rank.link.close()


def test_socket_that_cannot_be_bound(tmp_path):
    with pytest.raises(EngineError, match="cannot be bound"):
        ConnectorHub(
            tmp_path / "missing" / "s",
            num_ranks=0,
            arena=None,
            leases=None,
            settings=None,
            clock=time.monotonic,
        )


def test_arena_without_a_part_for_a_rank_is_refused(tmp_path):
    spec = KVSpec(num_layers=1, num_kv_heads=2, head_dim=4)
    arena = Arena.create(tmp_path / "arena", spec=spec, tokens_per_block=4, num_bytes=1 << 13)
    with pytest.raises(ArenaError, match="no part with the heads of rank 0"):
        ConnectorHub(
            tmp_path / "s",
            num_ranks=2,
            arena=arena,
            leases=None,
            settings=None,
            clock=time.monotonic,
        )
    assert not (tmp_path / "s").exists()
    arena.close()


class TestOneRequest:
    @pytest.fixture
    def rank(self, owner):
        rank = Rank(owner).ready()
        owner.hub.wait_ready(5)
        yield rank
        rank.link.close()

    def free(self, owner):
        return owner.leases.usage()["free"] == owner.arena.num_blocks

    def finished(self, key, *, held=20, pinned=True, generated=()):
        return Finished(key, 7, pinned, held, tuple(generated), (tuple(range(10)),))

    def test_lease_is_held_until_it_is_copied(self, owner, rank):
        handle = announce(owner, lease=owner.lease(8), save=False)
        (told,) = rank.hears(Announce)
        assert (told.lease_tokens, len(told.lease_blocks)) == (8, 2)
        rank.link.send(Matched(told.key, 0, 8, ""))
        assert handle.is_matched.result(5)
        assert not self.free(owner)
        rank.link.send(Copied(told.key))
        wait(lambda: self.free(owner))
        rank.link.send(self.finished(told.key, held=0, pinned=False))
        wait(lambda: owner.hub.num_open == 0)

    def test_lease_that_is_not_needed_goes_at_once(self, owner, rank):
        handle = announce(owner, lease=owner.lease(8))
        rank.link.send(Matched(handle.announce.key, 16, 0, "has it"))
        wait(lambda: self.free(owner))

    def test_withdrawn_request_gives_its_lease_back(self, owner, rank):
        handle = announce(owner, lease=owner.lease(8))
        owner.hub.settle(handle, save=True)
        rank.hears(Withdraw)
        rank.link.send(Withdrawn(handle.announce.key, used=False))
        wait(lambda: self.free(owner) and owner.hub.num_open == 0)
        assert handle.ticket.result(5) is None
        owner.hub.settle(handle, save=True)  # over: nothing is sent
        assert len(rank.heard) == 2

    def test_save(self, owner, rank):
        handle = announce(owner)
        rank.link.send(self.finished(handle.announce.key, held=25, generated=range(50, 55)))
        (room,) = rank.hears(Room)
        assert room.pool_blocks == (tuple(range(6)),)  # 24 tokens of 4 a block
        rank.link.send(Saved(room.key, ok=True))
        ticket = handle.ticket.result(5)
        assert ticket.token_ids == (*PROMPT, 50, 51, 52, 53)
        assert len(ticket.targets) == 3
        assert owner.hub.counters.tickets == 1

    def test_save_that_a_rank_could_not_do(self, owner, rank):
        handle = announce(owner)
        rank.link.send(self.finished(handle.announce.key))
        rank.hears(Room)
        rank.link.send(Saved(handle.announce.key, ok=False, reason="no"))
        assert handle.ticket.result(5) is None
        wait(lambda: self.free(owner))

    def test_save_that_outlives_its_room(self, owner, rank):
        handle = announce(owner)
        rank.link.send(self.finished(handle.announce.key))
        rank.hears(Room)
        owner.now = 11.0
        rank.link.send(Saved(handle.announce.key, ok=True))
        assert handle.ticket.result(5) is None
        assert owner.hub.counters.saves_dropped == 1

    def test_full_arena_means_no_room(self, owner, rank):
        owner.leases.lease(owner.arena.num_blocks * 4, 10.0, now=0.0)
        handle = announce(owner)
        rank.link.send(self.finished(handle.announce.key))
        assert rank.hears(Room)[0].arena_blocks == ()
        assert handle.ticket.result(5) is None

    def test_consumer_that_left_saves_nothing(self, owner, rank):
        handle = announce(owner)
        owner.hub.settle(handle, save=False)
        rank.link.send(self.finished(handle.announce.key))
        assert rank.hears(Room)[0].arena_blocks == ()
        assert handle.ticket.result(5) is None

    def test_rank_that_goes_while_it_saves(self, owner, rank):
        handle = announce(owner)
        rank.link.send(self.finished(handle.announce.key))
        rank.hears(Room)
        rank.link.close()
        assert handle.ticket.result(5) is None
        assert "rank 0 of the engine is gone" in owner.hub.dead
        assert owner.leases.usage()["resting"] == 4  # it may have been writing
        owner.hub._ranks[0].send(Copied("x"))  # to a closed connection: lost, not raised

    def test_room_that_expired_before_the_rank_went(self, owner, rank):
        handle = announce(owner)
        rank.link.send(self.finished(handle.announce.key))
        rank.hears(Room)
        owner.now = 11.0
        rank.link.close()
        assert handle.ticket.result(5) is None


class TestRankThatIsLost:
    """Its connection ends before its process does: it may still read what it was told of."""

    @pytest.fixture
    def process(self, monkeypatch):
        """Another process, which the ranks of a test say they are."""
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        monkeypatch.setattr(link_module.os, "getpid", lambda: child.pid)
        yield child
        child.kill()
        child.communicate()

    def test_its_leases_stay_claimed_until_its_process_is_gone(self, owner, process):
        rank = Rank(owner).ready()
        owner.hub.wait_ready(5)
        handle = announce(owner, lease=owner.lease(8))
        rank.hears(Announce)
        rank.link.close()
        assert handle.ticket.result(5) is None
        assert handle.is_matched.result(5) is False
        assert owner.hub.num_open == 0
        wait(lambda: any(t.name == "kvfetcher-hub-end" for t in threading.enumerate()))
        assert owner.leases.usage()["claimed"] == 2
        process.communicate()
        wait(lambda: owner.leases.usage()["claimed"] == 0)

    def test_process_that_cannot_be_watched_is_not_taken_for_gone(self, owner, monkeypatch):
        monkeypatch.setattr(link_module.os, "getpid", lambda: 2**22 + 1)  # above every pid
        rank = Rank(owner).ready()
        owner.hub.wait_ready(5)
        announce(owner, lease=owner.lease(8))
        rank.link.close()
        wait(lambda: owner.hub.dead)
        assert not owner.hub._ranks[0].is_gone()
        assert owner.leases.usage()["claimed"] == 2
        owner.hub.close()
        assert owner.leases.usage()["claimed"] == 0

    def test_the_other_ranks_lose_their_link_too(self, owner_of, process):
        owner = owner_of(num_ranks=2)
        first, second = Rank(owner, 0, 2).ready(), Rank(owner, 1, 2).ready()
        owner.hub.wait_ready(5)
        second.link.close()
        wait(lambda: not first.link.is_open)
        first.link.close()

    @pytest.mark.parametrize("is_expected", [False, True])
    def test_it_is_told_where_no_end_is_expected(self, owner, process, is_expected):
        told = []
        rank = Rank(owner).ready()
        owner.hub.wait_ready(5)
        owner.hub.when_lost(told.append)
        if is_expected:
            owner.hub.expect_end()
        rank.link.close()
        wait(lambda: owner.hub.dead and (told or is_expected))
        owner.hub.close()
        assert told == ([] if is_expected else ["rank 0 of the engine is gone; restart the server"])
        with pytest.raises(EngineError, match="rank 0 of the engine is gone"):
            owner.hub.when_lost(told.append)


def test_rank_that_does_not_read_holds_nobody_up(owner):
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.connect(str(owner.hub.path))
        hello = {"kind": "hello", "rank": 0, "num_ranks": 1, "pid": 2**22 + 1}
        ready = {"kind": "ready", "num_pool_blocks": 1, "facts": ""}
        for line in (hello, ready):
            stuck.sendall(json.dumps(line).encode() + b"\n")
        owner.hub.wait_ready(5)
        started = time.monotonic()
        handles = [
            owner.hub.announce(PROMPT, cache_salt="x" * 10_000, lease=None, save=False)
            for _ in range(200)  # 2 MB, ten times what the socket takes
        ]
        for handle in handles:
            owner.hub.settle(handle, save=False)
        assert time.monotonic() - started < 5  # a send is given up after 30 s
        assert owner.hub.num_open == 200
    wait(lambda: owner.hub.num_open == 0)
