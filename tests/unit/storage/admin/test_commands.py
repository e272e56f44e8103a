"""`kvfetcher store ...` on real stores."""

import asyncio
import json
import os
import time

import pytest
import redis

from kvfetcher.cli import main
from kvfetcher.config import load_config
from kvfetcher.errors import StoreError
from kvfetcher.storage import LocalStore, TieredStore, open_backend
from kvfetcher.storage import tier as tier_module
from kvfetcher.storage.admin import commands, upkeep
from kvfetcher.storage.disk_tier import DiskTier
from support.chunks import chain
from support.stores import FaultyStore

LONG = list(range(1, 21))
FORK = [*LONG[:8], 70, 71, 72, 73]
MODEL_B = bytes(range(1, 33))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def settings():
    """More lines for section [store]."""
    return {}


@pytest.fixture
def run(tmp_path, folder, settings, capsys):
    """Run `kvfetcher store` with arguments; (status, parsed JSON, stderr)."""
    path = tmp_path / "kvfetcher.toml"

    def call(*arguments, store=None, json_output=True):
        values = {"path": str(folder), "timeout_seconds": 10.0, **settings, **(store or {})}
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        path.write_text("\n".join(["[store]", *lines]))
        tail = ["--json"] if json_output else []
        status = main(["store", *arguments, *tail, "--config", str(path)])
        captured = capsys.readouterr()
        output = json.loads(captured.out) if json_output and captured.out else captured.out
        return status, output, captured.err

    return call


def save(folder, objects, *, age=0.0):
    for name, data in objects.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (time.time() - age, time.time() - age))


def stored(folder):
    return sorted(
        str(path.relative_to(folder)) for path in folder.glob("[!.]*/**/*") if path.is_file()
    )


def test_ls_and_stat_tell_models_and_tenants(run, folder):
    mine, theirs = chain(LONG), chain(LONG[:8], salt="team-b", identity=MODEL_B)
    save(folder, {**mine, **theirs, "stray": b"12345"})
    status, listed, _ = run("ls")
    assert status == 0
    assert [entry["name"] for entry in listed] == sorted([*mine, *theirs, "stray"])
    status, facts, _ = run("stat")
    assert (facts["objects"], facts["other_objects"]) == (8, 1)
    assert facts["num_bytes"] == sum(map(len, (*mine.values(), *theirs.values(), b"12345")))
    assert [(s["model"], s["chunks"]) for s in facts["scopes"]] == [
        ("0001020304050607", 5),
        ("0102030405060708", 2),
    ]
    first, second = list(mine)[:2]
    status, facts, _ = run("stat", second)
    assert (facts["first_position"], facts["chunk_before"]) == (4, first)
    assert run("stat", first)[1]["chunk_before"] is None
    assert run("stat", "stray")[1]["num_bytes"] == 5
    assert "chunks 5" in run("stat", json_output=False)[1]


def test_stat_tells_what_is_wrong_with_a_damaged_chunk(run, folder):
    (name, data), *_ = chain(LONG).items()
    save(folder, {name: data[:300]})
    assert "header" in run("stat", name)[1]["problem"]


def test_purge_tells_before_it_does(run, folder):
    save(folder, chain(LONG))
    status, result, talk = run("purge", "--model", "0001")
    assert status == 0
    assert (len(result["objects"]), result["deleted"], result["removed"]) == (5, False, 0)
    assert "would remove 5 objects" in talk
    assert len(stored(folder)) == 5
    status, result, talk = run("purge", "--model", "0001", "--delete")
    assert (result["removed"], result["failed"]) == (5, {})
    assert stored(folder) == []


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["--tenant", "a"], {"b", "model b"}),
        (["--tenant", ""], {"a", "b", "model b"}),
        (["--model", MODEL_B.hex()[:16]], {"a", "b"}),
        (["--model", MODEL_B.hex()[:16], "--tenant", "a"], {"a", "b", "model b"}),
        (["--model", MODEL_B.hex()[:16], "--tenant", "b"], {"a", "b"}),
        (["--prefix", "00"], {"model b"}),
    ],
)
def test_purge_by_model_tenant_and_name(run, folder, arguments, left):
    groups = {
        "a": chain(LONG, salt="a"),
        "b": chain(LONG, salt="b"),
        "model b": chain(LONG, salt="b", identity=MODEL_B),
    }
    for objects in groups.values():
        save(folder, objects)
    assert run("purge", *arguments, "--delete")[0] == 0
    assert stored(folder) == sorted(name for group in left for name in groups[group])


def set_aside(folder, objects, *, age=0.0):
    async def quarantine():
        store = LocalStore(folder, timeout_seconds=10.0)
        for name in objects:
            await store.quarantine(name, "digest differs")

    save(folder, objects, age=age)
    asyncio.run(quarantine())


def quarantined(folder):
    """Names of the quarantined copies and of their reasons, without what makes them unique."""
    paths = (folder / ".quarantine").iterdir()
    return sorted(path.name.removesuffix(".reason").rpartition(".")[0] for path in paths)


@pytest.mark.parametrize(
    ("arguments", "num_left"),
    [
        (["--tenant", "a"], 2),
        (["--model", "0001"], 0),
        (["--model", "0002"], 4),
        (["--prefix", "0001020304050607/"], 0),
        (["--chunk", "{chunk}"], 2),
        (["--chunk", "{chunk}", "--tenant", "b"], 4),
    ],
)
def test_purge_takes_quarantined_copies_too(run, folder, arguments, num_left):
    mine, theirs = (list(chain(LONG, salt=salt).items()) for salt in "ab")
    set_aside(folder, dict(mine[:2]))
    set_aside(folder, dict(theirs[:2]))
    save(folder, dict(mine))
    arguments = [argument.format(chunk=mine[0][0]) for argument in arguments]
    before = quarantined(folder)
    _, result, talk = run("purge", *arguments)
    assert len(result["quarantined"]) == 4 - num_left
    assert f"{4 - num_left} quarantined copies" in talk
    assert quarantined(folder) == before
    status, result, _ = run("purge", *arguments, "--delete")
    assert (status, result["failed"]) == (0, {})
    assert result["removed"] == len(result["objects"]) + 4 - num_left
    left = quarantined(folder)
    assert len(left) == 2 * num_left  # each with its reason
    if arguments[0] == "--tenant":
        assert set(left) == {name.replace("/", "_") for name, _ in theirs[:2]}


def test_gc_takes_quarantined_copies_after_their_time(run, folder):
    old, young = (dict(list(chain(LONG, salt=salt).items())[:1]) for salt in "ab")
    set_aside(folder, old, age=1000)
    set_aside(folder, young)
    assert run("gc")[1]["quarantined"] == []
    _, result, _ = run("gc", "--delete", store={"ttl_seconds": 500.0})
    assert [entry["name"] for entry in result["quarantined"]] == list(old)
    assert result["removed"] == 1
    assert set(quarantined(folder)) == {name.replace("/", "_") for name in young}


def test_ls_tells_as_it_goes(run, folder, monkeypatch):
    save(folder, chain(LONG))

    class Dying(FaultyStore):
        async def list_prefix(self, prefix=""):
            async for info in super().list_prefix(prefix):
                if info.name == sorted(chain(LONG))[3]:
                    raise StoreError("down")
                yield info

    monkeypatch.setattr(commands, "_SHOW_EVERY", 2)
    status, listed, talk = run("ls", json_output=False)
    assert (status, len(listed.splitlines())) == (0, 5)
    assert "looked at 2 objects" in talk
    assert "looked at 2 objects" in run("purge", "--model", "0001")[2]
    monkeypatch.setattr(commands, "open_store", lambda config, **_: Dying(open_backend(config)))
    status, listed, talk = run("ls", json_output=False)
    assert (status, len(listed.splitlines())) == (1, 3)
    assert run("ls", "ff")[1] == []


def test_purge_of_a_chunk_takes_what_continues_it(run, folder):
    save(folder, {**chain(LONG), **chain(FORK)})
    run("purge", "--chunk", list(chain(LONG))[2], "--delete")
    assert stored(folder) == sorted(chain(FORK))


def test_purge_of_prompts_that_begin_with_tokens(run, folder, tmp_path):
    save(folder, {**chain(LONG), **chain(FORK)})
    save(folder, chain(LONG, salt="other"))
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(FORK[:10]))
    _status, result, _ = run("purge", "--tokens", str(path), "--tenant", "", "--delete")
    assert [entry["name"] for entry in result["objects"]] == list(chain(FORK))[2:]
    assert stored(folder) == sorted([*chain(LONG), *chain(LONG, salt="other")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to purge"),
        (["--model", "xyz"], "must be 1 to 16 digits"),
        (["--model", ""], "must be 1 to 16 digits"),
        (["--chunk", "ab/cd"], "is not the name of a chunk"),
        (["--tokens", "/absent"], "cannot be read"),
        (["--tokens", "{file}"], "must hold a JSON list of at least one integer"),
    ],
)
@pytest.mark.parametrize("content", ["{}", "[]", '["a"]', "[true]"])
def test_purge_of_nonsense_removes_nothing(run, folder, tmp_path, arguments, message, content):
    path = tmp_path / "tokens.json"
    path.write_text(content)
    save(folder, chain(LONG))
    arguments = [argument.format(file=path) for argument in arguments]
    status, _, talk = run("purge", *arguments, "--delete")
    assert status == 1
    assert message in talk
    assert len(stored(folder)) == 5


def test_tokens_may_come_from_stdin(run, folder, monkeypatch):
    import io

    save(folder, chain(LONG))
    monkeypatch.setattr("sys.stdin", io.StringIO("[1, 2]"))
    assert run("purge", "--tokens", "-", "--delete")[1]["removed"] == 5


def test_gc_removes_what_nobody_can_reach(run, folder):
    objects = {**chain(LONG), **chain(FORK)}
    lost = list(chain(LONG))[3]
    save(folder, {name: data for name, data in objects.items() if name != lost}, age=7200)
    status, result, _talk = run("gc")
    assert status == 0
    assert result["objects"] == [{"name": list(chain(LONG))[4], "why": "unreachable"}]
    assert (result["chunks"], result["deleted"]) == (5, False)
    assert len(stored(folder)) == 5
    assert run("gc", "--delete", json_output=False)[1].split()[1] == "unreachable"
    assert stored(folder) == sorted({*list(chain(LONG))[:3], *chain(FORK)})
    assert run("gc")[1]["objects"] == []


def test_gc_gives_young_chunks_grace(run, folder):
    save(folder, dict(list(chain(LONG).items())[1:]))
    assert run("gc")[1]["objects"] == []
    assert len(run("gc", store={"gc_grace_seconds": 0.0})[1]["objects"]) == 4


def test_gc_removes_the_old_where_a_time_is_set(run, folder):
    save(folder, chain(LONG), age=1000)
    save(folder, chain(FORK))
    assert run("gc")[1]["objects"] == []
    _status, result, _ = run("gc", "--delete", store={"ttl_seconds": 500.0})
    assert {entry["why"] for entry in result["objects"]} == {"expired"}
    # The shared two were saved again with the fork.
    assert stored(folder) == sorted(chain(FORK))


def test_verify_finds_every_kind_of_damage(run, folder):
    names = list(chain(LONG))
    objects = chain(LONG)
    other_key = dict(zip(names, chain(LONG, salt="x").values(), strict=True))
    objects[names[1]] = objects[names[1]][:-50] + bytes(1) + objects[names[1]][-49:]
    objects[names[2]] = objects[names[2]][:-1]
    objects[names[3]] = other_key[names[3]]
    objects[names[4]] = b"no chunk"
    stray = {"stray/object": b"x"}
    save(folder, {**objects, **stray})
    status, result, _talk = run("verify")
    assert status == commands.STATUS_DAMAGED == 3
    assert (result["sound"], result["others"], result["failed"]) == (1, 1, {})
    problems = [result["damaged"][name] for name in names[1:]]
    for problem, text in zip(
        problems,
        ["SHA-256", "its header says", "differs from the object's name", "prefix"],
        strict=True,
    ):
        assert text in problem
    assert len(stored(folder)) == 6
    status, result, _ = run("verify", "--quarantine")
    assert (status, result["quarantined"]) == (3, 4)
    assert stored(folder) == sorted([names[0], "stray/object"])
    assert run("verify")[0] == 0


def test_verify_blames_no_object_for_one_damaged_transfer(run, folder, monkeypatch):
    objects = chain(LONG)
    save(folder, objects)
    once, always = list(objects)[1:3]
    damaged = {once, always}

    class Noisy(FaultyStore):
        async def get_range(self, name, start, end):
            data = await super().get_range(name, start, end)
            if name in damaged:
                data = data[:-1] + bytes([data[-1] ^ 1])
                if name == once:
                    damaged.discard(once)
            return data

    monkeypatch.setattr(commands, "open_store", lambda config, **_: Noisy(open_backend(config)))
    status, result, _ = run("verify", "--quarantine")
    assert (status, result["sound"], list(result["damaged"])) == (3, 4, [always])
    assert stored(folder) == sorted(set(objects) - {always})


def test_verify_tells_a_model_that_is_not_the_names(run, folder):
    (name, _), *_ = chain(LONG).items()
    (data, *_) = chain(LONG, identity=MODEL_B).values()
    save(folder, {name: data})
    status, result, _ = run("verify", name[:16])
    assert status == 3
    assert "key differs" in result["damaged"][name]


class TestNear:
    @pytest.fixture
    def settings(self, tmp_path):
        return {"tier_disk_bytes": 100_000, "tier_path": str(tmp_path / "tier")}

    @pytest.fixture
    def copies(self, tmp_path):
        return lambda: sorted(
            path.name.replace("!", "/") for path in (tmp_path / "tier").glob("??/*")
        )

    def test_warm_brings_objects_near(self, run, folder, copies):
        save(folder, {**chain(LONG), **chain(LONG, identity=MODEL_B)})
        status, result, _ = run("warm", MODEL_B.hex()[:4])
        assert (status, result["objects"], result["is_full"]) == (0, 5, False)
        assert copies() == sorted(chain(LONG, identity=MODEL_B))

    def test_warm_stops_where_the_disk_part_is_full(self, run, folder, copies):
        objects = chain(LONG, unit_bytes=20_000)
        save(folder, objects)
        _status, result, talk = run("warm", store={"tier_disk_bytes": 170_000})
        assert (result["objects"], result["is_full"]) == (4, True)
        assert "more do not fit" in talk
        assert len(copies()) == 4

    def test_warm_waits_for_the_copies_of_each_batch(self, run, folder, copies, monkeypatch):
        objects = chain(LONG, unit_bytes=5000)
        save(folder, objects)
        batch_bytes = sum(sorted(map(len, objects.values()))[-4:])
        monkeypatch.setattr(tier_module, "MAX_PENDING_BYTES", batch_bytes)
        add = DiskTier.add

        def slowly(self, *args):
            time.sleep(0.1)
            add(self, *args)

        monkeypatch.setattr(DiskTier, "add", slowly)
        status, result, _ = run("warm")
        assert (status, result["objects"], result["failed"]) == (0, 5, {})
        assert copies() == sorted(objects)

    def test_warm_tells_what_was_read_but_is_not_near(self, run, folder, copies, monkeypatch):
        objects = chain(LONG)
        save(folder, objects)
        lost, add = list(objects)[2], DiskTier.add

        def refuse(self, name, span, data):
            if name == lost:
                raise OSError(28, "No space left on device")
            add(self, name, span, data)

        monkeypatch.setattr(DiskTier, "add", refuse)
        status, result, talk = run("warm", store={"tier_memory_bytes": 10**6})
        assert (status, result["objects"], list(result["failed"])) == (1, 4, [lost])
        assert f"{lost}: no copy of it was kept" in talk
        assert lost not in copies()

    def test_purge_takes_the_copies_too_also_of_objects_that_are_gone(self, run, folder, copies):
        mine, theirs = chain(LONG, salt="a"), chain(LONG, salt="b")
        save(folder, {**mine, **theirs})
        run("warm")
        (folder / next(iter(mine))).unlink()  # another host purged it
        _status, result, _ = run("purge", "--tenant", "a", "--delete")
        assert (result["removed"], result["copies_dropped"]) == (4, 1)
        assert copies() == sorted(theirs)

    def test_verify_judges_the_store_not_a_copy(self, run, folder, copies):
        save(folder, chain(LONG))
        run("warm")
        name = next(iter(chain(LONG)))
        save(folder, {name: b"rotten"})
        assert list(run("verify")[1]["damaged"]) == [name]
        run("verify", "--quarantine")
        assert name not in copies()


def test_warm_without_a_disk_part_says_what_to_set(run, folder):
    status, _, talk = run("warm")
    assert status == 1
    assert "store.tier_disk_bytes is 0" in talk


def test_objects_that_fail_cost_no_others_and_the_status_tells(run, folder, monkeypatch, tmp_path):
    objects = chain(LONG)
    save(folder, objects)
    bad = list(objects)[2]

    class Faulty(FaultyStore):
        async def before(self, verb, name):
            if name == bad and verb in ("get_range", "delete"):
                raise StoreError("down")

    def broken(config, **_):
        return Faulty(open_backend(config))

    monkeypatch.setattr(commands, "open_store", broken)
    status, result, talk = run("verify")
    assert (status, result["sound"], result["failed"]) == (1, 4, {bad: "down"})
    near = {"tier_disk_bytes": 100_000, "tier_path": str(tmp_path / "tier")}
    status, result, talk = run("warm", store=near)
    assert (status, result["objects"], result["failed"]) == (1, 4, {bad: "down"})
    status, result, talk = run("purge", "--model", "00", "--delete")
    assert (status, result["removed"], result["failed"]) == (1, 4, {bad: "down"})
    assert f"{bad} was not removed: down" in talk
    assert stored(folder) == [bad]


async def test_a_survey_that_cannot_read_fails_instead_of_calling_it_missing(folder, tmp_path):
    save(folder, chain(LONG))
    config = load_config(environ={"KVFETCHER_STORE_PATH": str(folder)}).store
    store = FaultyStore(open_backend(config), errors={"get_range": StoreError("down")})
    with pytest.raises(StoreError, match="down"):
        await upkeep.survey(store, "", tell=lambda _: None)


async def test_objects_that_go_meanwhile_are_nobodys_fault(folder, tmp_path):
    save(folder, chain(LONG))
    names = list(chain(LONG))

    class Vanishing(FaultyStore):
        async def before(self, verb, name):
            if verb == "get_range":
                (folder / names[1]).unlink(missing_ok=True)

    config = load_config(environ={"KVFETCHER_STORE_PATH": str(folder)}).store
    store = Vanishing(open_backend(config))
    found = await upkeep.survey(store, "", tell=lambda _: None)
    assert len(found.chunks) in (4, 5)
    save(folder, chain(LONG))
    result = await upkeep.verify(store, store.list_prefix(), tell=lambda _: None)
    assert (result.sound, result.damaged, result.failed) == (4, {}, {})
    save(folder, chain(LONG))
    disk = DiskTier(tmp_path / "tier", max_bytes=10**6, max_age_seconds=60.0)
    tiered = TieredStore(store, memory=None, disk=disk, disk_timeout_seconds=10.0)
    near = await upkeep.warm(tiered, store.list_prefix(), max_bytes=10**6, tell=lambda _: None)
    assert (near.objects, near.failed) == (4, {})


async def test_headers_longer_than_the_first_read_are_read_whole(folder, monkeypatch):
    monkeypatch.setattr(upkeep.container, "HEADER_READ_BYTES", 50)
    save(folder, chain(LONG))
    config = load_config(environ={"KVFETCHER_STORE_PATH": str(folder)}).store
    found = await upkeep.survey(open_backend(config), "", tell=lambda _: None)
    assert (len(found.chunks), found.damaged) == (5, [])


@pytest.mark.redis
def test_the_same_on_redis_where_time_is_for_the_server_to_keep(run, redis_server):
    raw = redis.Redis(port=redis_server.port)
    raw.flushall()
    settings = {"kind": "redis", "url": redis_server.url}
    config = load_config(
        environ={"KVFETCHER_STORE_KIND": "redis", "KVFETCHER_STORE_URL": redis_server.url}
    )

    async def fill():
        store = open_backend(config.store)
        for name, data in list(chain(LONG).items())[1:]:
            await store.put(name, data)
        await store.close()

    asyncio.run(fill())
    for key in raw.scan_iter():
        raw.pexpire(key, 60_000)
    settings["ttl_seconds"] = 3600.0
    assert run("stat", store=settings)[1]["objects"] == 4
    assert run("verify", store=settings)[1]["sound"] == 4
    assert run("gc", store={**settings, "ttl_seconds": 0.001})[1]["objects"] == []
    # Looking renewed nothing.
    assert all(0 < raw.pttl(key) <= 60_000 for key in raw.scan_iter())
    store = {**settings, "gc_grace_seconds": 0.0}
    assert run("gc", "--delete", store=store)[1]["removed"] == 4
    assert run("ls", store=settings)[1] == []
    raw.close()


def test_wrong_command_line_is_status_2(capsys):
    for arguments in ([], ["absent"], ["purge", "--chunk", "a", "--tokens", "b"]):
        with pytest.raises(SystemExit) as ended:
            main(["store", *arguments])
        assert ended.value.code == 2
        assert "usage: kvfetcher store" in capsys.readouterr().err
