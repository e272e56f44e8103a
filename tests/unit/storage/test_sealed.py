"""Sealed objects: the conformance suite through each seal, and every way to change an object."""

import base64
import json
import logging

import pytest

from kvfetcher.config import StoreConfig
from kvfetcher.errors import ChecksumError, ConfigError
from kvfetcher.format.keys import object_name
from kvfetcher.storage import open_store
from kvfetcher.storage.base import ByteRange
from kvfetcher.storage.keyring import load_keyring, parse_keyring
from kvfetcher.storage.local import LocalStore
from kvfetcher.storage.sealed import PART_BYTES, SealedStore, Sealer
from support.stores import NAME, StoreTests

KINDS = ("hmac", "ed25519", "aes-gcm")
DIGITS = "0123456789abcdef"
CHUNK = object_name(f"{DIGITS}/{DIGITS}", bytes(32))
OTHER = object_name(f"{DIGITS}/fedcba9876543210", bytes(32))
DATA = bytes(range(251)) * 1100  # five parts, the last one short


def key(number):
    return base64.b64encode(bytes([number]) * 32).decode()


def keyring(**changes):
    data = {"names": key(1), "current": "k1", "keys": {"k1": key(2)}} | changes
    return parse_keyring(json.dumps(data))


@pytest.fixture(params=KINDS)
def sealer(request):
    return Sealer(request.param, keyring())


class TestConformance(StoreTests):
    @pytest.fixture
    async def store(self, tmp_path, sealer):
        self.inner = LocalStore(tmp_path / "store", timeout_seconds=10.0)
        self.sealer = sealer
        made = SealedStore(self.inner, sealer)
        yield made
        await made.close()

    async def raw_get(self, store, name):
        return self.sealer.open(name, await self.inner.get(name))

    async def raw_set(self, store, name, data):
        await self.inner.put(name, self.sealer.seal(name, data))


@pytest.fixture
async def stores(tmp_path, sealer):
    inner = LocalStore(tmp_path / "store", timeout_seconds=10.0)
    made = SealedStore(inner, sealer)
    yield made, inner
    await made.close()


async def put_raw(inner, name, data):
    await inner.delete(name)
    await inner.put(name, data)


async def test_every_range_is_the_objects(stores):
    store, _ = stores
    await store.put(CHUNK, DATA)
    assert await store.get(CHUNK) == DATA
    assert (await store.head(CHUNK)).num_bytes == len(DATA)
    p = PART_BYTES
    for start, end in (
        (0, 1), (0, p), (p - 1, p + 1), (p, 2 * p), (1, len(DATA)), (len(DATA) - 1, len(DATA) + 9),
        (0, 10 * p), (len(DATA), len(DATA) + 1), (9 * p, 10 * p),
    ):  # fmt: skip
        assert await store.get_range(CHUNK, start, end) == DATA[start:end]
    ranges = [ByteRange(CHUNK, 5, 70_000), ByteRange(CHUNK, 3 * p, 4 * p)]
    assert await store.get_ranges(ranges) == [DATA[5:70_000], DATA[3 * p : 4 * p]]


async def test_any_changed_byte_is_found(stores):
    store, inner = stores
    data = DATA[:100]
    await store.put(CHUNK, data)
    whole = await inner.get(CHUNK)
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        await put_raw(inner, CHUNK, bytes(changed))
        with pytest.raises(ChecksumError, match="sealed"):
            await store.get(CHUNK)
        with pytest.raises(ChecksumError):
            await store.get_range(CHUNK, 0, 10)
        assert await store.get_ranges([ByteRange(CHUNK, 0, 10)]) == [b""]


async def test_parts_and_objects_cannot_change_places(stores, sealer):
    """Whoever can write to the store has sealed parts, but no key."""
    store, inner = stores
    size = sealer.sealed_bytes
    await store.put(CHUNK, DATA)
    whole = await inner.get(CHUNK)
    other = sealer.seal(OTHER, DATA)
    parts = [whole[i : i + size] for i in range(0, len(whole), size)]
    assert len(parts) == 5
    for forged in (
        other,  # another tenant's object under this name
        DATA,  # unsealed
        b"",
        b"".join([parts[1], parts[0], *parts[2:]]),
        b"".join(parts[:-1]),  # cut at a border
        b"".join(parts[:-1])[:-1],
        whole + parts[-1],
        whole + b"\0",
        b"".join([parts[0], other[size : 2 * size], *parts[2:]]),
    ):
        await put_raw(inner, CHUNK, forged)
        with pytest.raises(ChecksumError):
            await store.get(CHUNK)
        with pytest.raises(ChecksumError):
            await store.get_range(CHUNK, 0, len(DATA))


async def test_a_cut_object_is_no_shorter_object(stores, sealer):
    store, inner = stores
    await store.put(CHUNK, DATA)
    whole = await inner.get(CHUNK)
    await put_raw(inner, CHUNK, whole[: 2 * sealer.sealed_bytes])
    assert await store.get_range(CHUNK, 0, PART_BYTES) == DATA[:PART_BYTES]
    with pytest.raises(ChecksumError):
        await store.get_range(CHUNK, 0, 3 * PART_BYTES)


def test_what_is_encrypted_cannot_be_read_and_what_is_signed_can():
    data = b"a prompt in clear" * 10
    for kind in KINDS:
        sealed = Sealer(kind, keyring()).seal(CHUNK, data)
        assert (data in sealed) is (kind != "aes-gcm")
    again = Sealer("aes-gcm", keyring())
    assert again.seal(CHUNK, data) != again.seal(CHUNK, data), "a nonce is used once"


@pytest.mark.parametrize("kind", KINDS)
def test_keys_rotate_and_a_dropped_key_shreds(kind):
    old = Sealer(kind, keyring())
    both = Sealer(kind, keyring(current="k2", keys={"k1": key(2), "k2": key(3)}))
    new = Sealer(kind, keyring(current="k2", keys={"k2": key(3)}))
    first, second = old.seal(CHUNK, DATA), both.seal(CHUNK, DATA)
    assert both.open(CHUNK, first) == both.open(CHUNK, second) == DATA
    assert new.open(CHUNK, second) == DATA
    for sealer, sealed in ((new, first), (old, second)):
        with pytest.raises(ChecksumError):
            sealer.open(CHUNK, sealed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tenant_with_keys_of_its_own_is_shredded_alone(kind):
    own = {DIGITS: {"current": "t1", "keys": {"t1": key(9)}}}
    with_own, without = Sealer(kind, keyring(tenants=own)), Sealer(kind, keyring())
    mine, theirs = with_own.seal(CHUNK, DATA), with_own.seal(OTHER, DATA)
    assert with_own.open(CHUNK, mine) == DATA
    assert without.open(OTHER, theirs) == DATA
    with pytest.raises(ChecksumError):
        without.open(CHUNK, mine)


def test_a_public_key_checks_and_cannot_sign():
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = Ed25519PrivateKey.from_private_bytes(bytes([2]) * 32).public_key().public_bytes_raw()
    reader = Sealer(
        "ed25519",
        keyring(current="", keys={}, public={"k1": base64.b64encode(public).decode()}),
    )
    assert reader.open(CHUNK, Sealer("ed25519", keyring()).seal(CHUNK, DATA)) == DATA
    with pytest.raises(ConfigError, match="only public ones"):
        reader.seal(CHUNK, DATA)


def test_names_tell_nothing_of_a_salt_without_the_key():
    ring = keyring()
    assert ring.salt("a") == keyring(current="k2", keys={"k2": key(3)}).salt("a"), "rotation"
    assert ring.salt("a") not in (ring.salt("b"), keyring(names=key(7)).salt("a"))


BAD_RINGS = {
    "not JSON": "{",
    "an array": "[]",
    "no names": json.dumps({"current": "k", "keys": {"k": key(1)}}),
    "short key": json.dumps({"names": "c2hvcnQ=", "current": "k", "keys": {"k": key(1)}}),
    "no current": json.dumps({"names": key(1), "keys": {"k": key(1)}}),
    "unknown key": json.dumps({"names": key(1), "current": "k", "keys": {"k": key(1)}, "x": 1}),
    "long id": json.dumps({"names": key(1), "current": "k" * 9, "keys": {"k" * 9: key(1)}}),
    "tenant": json.dumps(
        {"names": key(1), "current": "k", "keys": {"k": key(1)}, "tenants": {"a": {}}}
    ),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", BAD_RINGS)
def test_what_is_no_keyring_is_refused_without_quoting_it(name):
    with pytest.raises(ConfigError) as refused:
        parse_keyring(BAD_RINGS[name])
    assert key(1) not in str(refused.value)


def test_keys_come_from_where_the_setting_says(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    text = json.dumps({"names": key(1), "current": "k1", "keys": {"k1": key(2)}})
    path = tmp_path / "ring.json"
    path.write_text(text)
    path.chmod(0o600)
    found = [
        load_keyring("env:RING", environ={"RING": text}),
        load_keyring(f"file:{path}"),
        load_keyring(f"command:cat {path}"),
    ]
    assert found[0] == found[1] == found[2]
    assert key(2) not in repr(found[0])
    assert repr(bytes([2]) * 32)[2:-1] not in repr(found[0])
    path.chmod(0o640)
    for source, why in (
        ("env:RING", "empty or not set"),
        (f"file:{path}", "chmod 600"),
        (f"file:{tmp_path / 'none'}", "cannot be read"),
        ("command:false", "ended with status 1"),
        ("command:/no/such/program", "FileNotFoundError"),
        ("vault", "must be env:NAME"),
        ("command: ", "must be env:NAME"),
    ):
        with pytest.raises(ConfigError, match=why):
            load_keyring(source, environ={})
    assert key(2) not in caplog.text


async def test_the_setting_seals_what_the_store_gets(tmp_path, monkeypatch):
    text = json.dumps({"names": key(1), "current": "k1", "keys": {"k1": key(2)}})
    monkeypatch.setenv("RING", text)
    config = StoreConfig(path=str(tmp_path), keys="env:RING", seal="aes-gcm")
    store = open_store(config)
    await store.put(NAME, b"secret" * 100)
    raw = LocalStore(tmp_path, timeout_seconds=5)
    assert b"secret" not in await raw.get(NAME)
    assert await store.get(NAME) == b"secret" * 100
    await store.close()
    await raw.close()


def test_settings_that_would_not_protect_are_refused():
    with pytest.raises(ConfigError, match=r"needs store\.keys"):
        StoreConfig(seal="hmac")
    with pytest.raises(ConfigError, match="lie in clear"):
        StoreConfig(seal="aes-gcm", keys="env:RING", tier_disk_bytes=1 << 30)
