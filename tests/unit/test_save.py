"""Saving: what is stored, what is skipped, and that leases always come back."""

import asyncio
import dataclasses

import pytest

from kvfetcher.errors import CodecError, LeaseError, StoreError
from kvfetcher.fetch.fetcher import FetchFacts
from kvfetcher.memory.leases import SaveTicket
from kvfetcher.save import Saver
from kvfetcher.spec import KVSpec
from kvfetcher.storage.local import LocalStore

FACTS = FetchFacts(
    identity_digest=b"i" * 32,
    chunk_tokens=4,
    tokens_per_block=2,
    spec=KVSpec(num_layers=1, num_kv_heads=1, head_dim=8),
    max_prompt_tokens=100,
)


@dataclasses.dataclass
class Leases:
    renewed: int = 0
    released: list = dataclasses.field(default_factory=list)
    lost_after: int = 100

    async def facts(self):
        return FACTS

    async def renew(self, lease_id):
        self.renewed += 1
        if self.renewed > self.lost_after:
            raise LeaseError(f"lease {lease_id} expired")

    async def release(self, lease_id):
        self.released.append(lease_id)


def ticket(num_chunks=3, first=0):
    tokens = tuple(range(1, 4 * (first + num_chunks) + 1))
    return SaveTicket("lease", tuple(f"target{i}" for i in range(num_chunks)), first, tokens, "")


class Rig:
    def __init__(self, folder):
        self.store = LocalStore(folder, timeout_seconds=5)
        self.leases = Leases()
        self.encoded = []

    async def encode(self, tokens, key, facts, target):
        self.encoded.append((key.index, tokens.tolist(), target))
        return b"chunk" + bytes([key.index])

    def saver(self, encode=None, store=None):
        return Saver(
            store=store or self.store, leases=self.leases, encode_chunk=encode or self.encode
        )

    async def names(self):
        return [info.name async for info in self.store.list_prefix()]


@pytest.fixture
def rig(tmp_path):
    return Rig(tmp_path / "store")


async def test_every_chunk_is_encoded_from_its_own_target_and_stored(rig):
    report = await rig.saver().save(ticket())
    assert (report.chunks_saved, report.chunks_known, report.error) == (3, 0, "")
    assert rig.encoded == [
        (0, [1, 2, 3, 4], "target0"),
        (1, [5, 6, 7, 8], "target1"),
        (2, [9, 10, 11, 12], "target2"),
    ]
    assert len(await rig.names()) == 3
    assert rig.leases.released == ["lease"]


async def test_chunks_after_a_hit_get_the_keys_of_their_place_in_the_chain(rig, tmp_path):
    await rig.saver().save(ticket(3))
    whole = set(await rig.names())
    again = Rig(tmp_path / "other")
    await again.saver().save(ticket(1, first=2))
    assert again.encoded == [(2, [9, 10, 11, 12], "target0")]
    assert set(await again.names()) < whole


async def test_a_chunk_that_is_stored_is_not_encoded_again(rig):
    await rig.saver().save(ticket(2))
    rig.encoded.clear()
    report = await rig.saver().save(ticket(3))
    assert (report.chunks_saved, report.chunks_known) == (1, 2)
    assert [index for index, *_ in rig.encoded] == [2]


async def test_a_lease_that_was_lost_while_encoding_stores_nothing_of_it(rig):
    rig.leases.lost_after = 1
    report = await rig.saver().save(ticket(3))
    assert report.chunks_saved == 1
    assert "expired" in report.error
    assert len(await rig.names()) == 1


@pytest.mark.parametrize("kind", [CodecError, StoreError])
async def test_a_failure_is_reported_and_the_lease_comes_back(rig, kind):
    async def broken(tokens, key, facts, target):
        raise kind("no")

    report = await rig.saver(encode=broken).save(ticket())
    assert (report.chunks_saved, report.error) == (0, "no")
    assert rig.leases.released == ["lease"]


async def test_a_bug_gives_the_lease_back_too(rig):
    async def broken(tokens, key, facts, target):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await rig.saver(encode=broken).save(ticket())
    assert rig.leases.released == ["lease"]


async def test_chunks_are_encoded_side_by_side_and_stored_as_they_finish(tmp_path):
    rig = Rig(tmp_path)
    gates = [asyncio.Event() for _ in range(4)]
    begun = []

    async def encode(tokens, key, facts, target):
        begun.append(key.index)
        await gates[key.index].wait()
        return b"chunk" + bytes([key.index])

    saver = Saver(store=rig.store, leases=rig.leases, encode_chunk=encode, chunks_in_flight=2)
    saving = asyncio.create_task(saver.save(ticket(4)))
    await until(lambda: begun == [0, 1])
    gates[1].set()  # the second is over first
    await until(lambda: begun == [0, 1, 2])
    assert len(list(tmp_path.rglob("*"))) > 0
    for gate in gates:
        gate.set()
    report = await saving
    assert (report.chunks_saved, report.error) == (4, "")
    assert rig.leases.released == ["lease"]


async def test_after_a_failure_no_further_chunk_is_begun(tmp_path):
    rig = Rig(tmp_path)
    begun = []

    async def encode(tokens, key, facts, target):
        begun.append(key.index)
        await asyncio.sleep(0)
        if key.index == 0:
            raise CodecError("it does not encode")
        return b"chunk"

    saver = Saver(store=rig.store, leases=rig.leases, encode_chunk=encode, chunks_in_flight=2)
    report = await saver.save(ticket(9))
    assert "does not encode" in report.error
    assert len(begun) < 5
    assert rig.leases.released == ["lease"]


async def until(holds):
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.001)
