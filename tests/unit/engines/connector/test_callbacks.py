"""No callback waits: neither for an owner that does not read, nor for a copy that does not end."""

import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from kvfetcher.engines.connector.link import OwnerLink
from kvfetcher.engines.connector.messages import Announce, Room, Welcome, to_line
from kvfetcher.engines.connector.scheduler import ConnectorScheduler
from kvfetcher.engines.connector.worker import ConnectorWorker
from kvfetcher.memory.leases import tokens_digest

BLOCK = 32
NUM_REQUESTS = 200
PROMPT_TOKENS = 4000
# A callback takes microseconds; a stuck one would take as long as the test lets it.
LONGEST_SECONDS = 2.0


class GatedCopier:
    """As `BlockCopier`; no copy begins or ends before `gate` is set."""

    def __init__(self):
        self.gate = threading.Event()

    def load(self, source, target, *, layout, stream):
        if stream == "side":
            self.gate.wait(60)
        return self

    def save(self, source, target, *, layout, stream):
        return self.load(source, target, layout=layout, stream=stream)

    def wait(self):
        self.gate.wait(60)

    def mark(self, stream):
        return None

    def side_stream(self, name, after):
        return "side"

    def close(self):
        pass


class StuckOwner:
    """Greets a rank, tells it what the test wants, and reads nothing."""

    def __init__(self, folder):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "s"))
        self.listener.listen()
        self.thread = threading.Thread(target=self._greet)
        self.thread.start()
        self.link = OwnerLink(folder / "s", rank=0, num_ranks=1, timeout_seconds=10.0)
        self.thread.join()

    def _greet(self):
        self.connection, _ = self.listener.accept()
        self.connection.recv(1000)
        self.connection.sendall(to_line(Welcome("", "", {}, BLOCK, "HND", 1, 5.0)))

    def close(self):
        self.connection.close()
        self.listener.close()
        self.link.close()


@pytest.mark.parametrize("is_async", [False, True])
def test_no_callback_waits(tmp_path, is_async):
    with contextlib.ExitStack() as stack:
        owner = StuckOwner(tmp_path)
        stack.callback(owner.close)
        copier, fatal = GatedCopier(), []
        worker = ConnectorWorker(
            owner.link, layout="HND", save_timeout_seconds=3600.0, fatal=fatal.append
        )
        stack.callback(worker.close)
        stack.callback(copier.gate.set)
        scheduler = ConnectorScheduler(
            owner.link, tokens_per_block=BLOCK, async_load_tokens=int(is_async)
        )
        owner.link.start(lambda message: [half.receive(message) for half in (scheduler, worker)])
        pool = SimpleNamespace(num_blocks=10)
        worker.register(pool, copier, facts="")
        longest = 0.0

        def timed(call, *arguments):
            nonlocal longest
            started = time.perf_counter()
            result = call(*arguments)
            longest = max(longest, time.perf_counter() - started)
            return result

        blocks = list(range(2000))  # what is told of all of them is ten times what a socket takes
        for number in range(NUM_REQUESTS):
            prompt = [number] * PROMPT_TOKENS
            tokens = tuple(prompt)
            told = Announce(
                key=f"k{number}",
                tokens_digest=tokens_digest(tokens),
                num_prompt_tokens=PROMPT_TOKENS,
                cache_salt="",
                lease_tokens=PROMPT_TOKENS,
                lease_blocks=tuple(range(PROMPT_TOKENS // BLOCK)),
                save=True,
            )
            scheduler.receive(told)
            request = SimpleNamespace(request_id=number, get_tokens=lambda _, held=prompt: held)
            offered, held = timed(scheduler.get_num_new_matched_tokens, request, 0)
            assert (offered, held) == (PROMPT_TOKENS - BLOCK, is_async)
            timed(scheduler.update_state_after_alloc, request, blocks)
            data = SimpleNamespace(request_id=number, computed_position=0, num_scheduled_tokens=32)
            batch = SimpleNamespace(new_requests=[] if is_async else [data], cached_requests=[])
            meta = timed(scheduler.build_connector_meta, batch)
            assert len(meta.loads) == 1
            timed(worker.start_load_kv, meta, None)
            timed(worker.wait_for_save, None)
            # Ended at once; its room comes, its copies hang.
            prompt.append(7)
            assert timed(scheduler.request_finished, request, blocks) is True
            worker.receive(Room(f"k{number}", number, (1,), (1,)))
            loading = [number] if is_async else []
            assert timed(worker.get_finished, [number], loading) == ([], [])
            assert timed(worker.get_finished, [], []) == ([], [])
        assert scheduler.counters.loads == NUM_REQUESTS
        assert scheduler.counters.faults == 0
        assert not fatal
        assert owner.link.is_open
        assert owner.link._outbox.qsize() > NUM_REQUESTS  # the owner was stuck indeed
        assert longest < LONGEST_SECONDS
