"""The shaped link does what its shape says; else no benchmark over it means anything."""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.shaping import (
    KernelLink,
    LinkShape,
    NamespaceLink,
    ShapedLink,
    kernel_link_problem,
)


class Source:
    """A server that answers a decimal number with so many bytes."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                while text := client.recv(64):
                    client.sendall(bytes(int(text)))
            except OSError:
                return

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a second close
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self._listener.close()


@pytest.fixture
def source():
    made = Source()
    yield made
    made.close()


def need_kernel_link() -> None:
    if problem := kernel_link_problem():
        pytest.skip(f"not tested: {problem}")


@pytest.fixture(params=[ShapedLink, KernelLink])
def link(request, source):
    if request.param is KernelLink:
        need_kernel_link()
    with request.param(source.address) as made:
        yield made


def connect(link):
    connection = socket.create_connection((link.host, link.port), timeout=20)
    connection.settimeout(20)
    return connection


def pull(connection, num_bytes):
    """Bytes that came, and the seconds until the first and the last of them."""
    start = time.monotonic()
    connection.sendall(str(num_bytes).encode())
    received, first = 0, 0.0
    while received < num_bytes and (data := connection.recv(1 << 20)):
        first = first or time.monotonic() - start
        received += len(data)
    return received, first, time.monotonic() - start


def pull_once(link, num_bytes):
    with connect(link) as connection:
        return pull(connection, num_bytes)


@pytest.mark.parametrize("gbit_per_second", [0.05, 0.2, 1.0])
def test_one_connection_gets_the_asked_rate(link, gbit_per_second):
    link.reshape(LinkShape(gbit_per_second=gbit_per_second))
    num_bytes = int(gbit_per_second * 1e9 / 8 * 0.6)
    reached = []
    while len(reached) < 4 and max(reached, default=0.0) < 0.88 * gbit_per_second:
        with connect(link) as connection:  # a busy machine may be late, now and then
            _, _, seconds = pull(connection, num_bytes)
        reached.append(num_bytes * 8 / seconds / 1e9)
    # The kernel counts headers too (4.4 % at an MTU of 1500).
    assert 0.88 * gbit_per_second < max(reached) < 1.05 * gbit_per_second


def test_connections_share_the_rate(link):
    link.reshape(LinkShape(gbit_per_second=0.1))
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(pull_once, [link] * 4, [1_500_000] * 4))
    seconds = time.monotonic() - start
    assert [received for received, _, _ in done] == [1_500_000] * 4
    assert 0.44 < seconds < 3.0  # 6 MB at 12.5 MB/s; a busy machine may be late
    if isinstance(link, KernelLink):
        return  # tbf's queue is first come, first served: a connection that is ahead may stay so
    # Served one after the other, the first would be done after 0.12 s.
    assert min(total for _, _, total in done) > 0.15, "one connection was served before the others"


def test_a_round_trip_takes_the_asked_time(link):
    link.reshape(LinkShape(rtt_seconds=0.06))
    with connect(link) as connection:
        _, opened, _ = pull(connection, 1)
        first = min(pull(connection, 1)[1] for _ in range(5))  # a busy machine may be late
    assert 0.115 < opened < 1.0  # the handshake is one more
    assert 0.058 < first < 0.12


def test_delay_does_not_cost_rate(link):
    link.reshape(LinkShape(gbit_per_second=0.2, rtt_seconds=0.1))
    with connect(link) as connection:
        pull(connection, 1)
        _, _, seconds = pull(connection, 10_000_000)
    assert 0.48 < seconds < 2.0  # 0.4 s of transfer after 0.1 s


def test_jitter_delays_and_keeps_the_order(source):
    with ShapedLink(source.address, LinkShape(jitter_seconds=0.05)) as link, connect(link) as to:
        firsts = [pull(to, 1)[1] for _ in range(20)]
        received, _, _ = pull(to, 300_000)
    assert received == 300_000
    assert max(firsts) < 0.2
    assert max(firsts) - min(firsts) > 0.02


def test_a_stall_holds_everything_and_loses_nothing(link):
    with connect(link) as connection:
        pull(connection, 1)
        link.reshape(LinkShape(is_stalled=True))
        threading.Timer(0.4, link.reshape, [LinkShape()]).start()
        received, first, _ = pull(connection, 100_000)
    assert received == 100_000
    assert 0.35 < first < 1.0


def test_a_cut_connection_is_really_reset(link):
    link.reshape(LinkShape(cut_after_bytes=50_000))
    with connect(link) as connection, pytest.raises(ConnectionResetError):
        pull(connection, 200_000)
    assert link.stats().cut == 1


def test_a_short_read_ends_without_an_error(link):
    link.reshape(LinkShape(cut_after_bytes=50_000, cut="close"))
    with connect(link) as connection:
        received, _, _ = pull(connection, 200_000)
    assert received == 50_000


def test_a_link_that_is_down_resets_old_and_new_connections(link):
    with connect(link) as old:
        pull(old, 1)
        link.reshape(LinkShape(is_down=True))
        with pytest.raises(ConnectionError):
            pull(old, 1)
    with pytest.raises(ConnectionError):
        pull_once(link, 1)
    link.reshape(LinkShape())
    with connect(link) as healed:
        assert pull(healed, 5)[0] == 5


def test_slow_loris_drips(link):
    link.reshape(LinkShape(drip_bytes_per_second=1000))
    with connect(link) as connection:
        received, _, seconds = pull(connection, 500)
    assert received == 500
    assert 0.35 < seconds < 1.0


def test_http_requests_are_answered_with_the_asked_status(link):
    link.reshape(LinkShape(http_status=503))
    connection = http.client.HTTPConnection(link.host, link.port, timeout=5)
    connection.request("GET", "/object")
    assert connection.getresponse().status == 503
    connection.close()
    assert link.stats().cut == 1


def test_a_dead_server_resets_the_client(source):
    source.close()
    with ShapedLink(source.address) as link, pytest.raises(ConnectionError):
        pull_once(link, 1)


def test_bytes_and_connections_are_counted(link):
    for _ in range(2):
        with connect(link) as connection:
            pull(connection, 1000)
    stats = link.stats()
    assert (stats.connections, stats.cut, stats.bytes_down, stats.bytes_up) == (2, 0, 2000, 8)


@pytest.mark.parametrize("fields", [{"gbit_per_second": -1}, {"cut": "drop"}, {"rtt_seconds": -1}])
def test_a_wrong_shape_is_refused(fields):
    with pytest.raises(ValueError, match="must be"):
        LinkShape(**fields)


def test_a_kernel_link_leaves_nothing_behind(source):
    need_kernel_link()
    with KernelLink(source.address, LinkShape(gbit_per_second=1.0)) as link:
        name = link._name
        assert name in {interface for _, interface in socket.if_nameindex()}
    assert name not in {interface for _, interface in socket.if_nameindex()}


def test_a_link_whose_process_cannot_start_says_so(source, monkeypatch):
    link = ShapedLink(source.address)
    link.host = "203.0.113.1"  # not an address of this machine
    with pytest.raises(RuntimeError, match="did not start"):
        link.__enter__()


def test_a_link_measures_what_it_carries(link):
    link.reshape(LinkShape(gbit_per_second=0.2))
    assert 0.1 < link.require_rate() < 0.23


def test_a_rate_that_this_machine_does_not_reach_is_named(link):
    link.reshape(LinkShape(gbit_per_second=1000))
    with pytest.raises(RuntimeError, match=r"of 1000 Gbit/s .* this machine reached [0-9]"):
        link.require_rate(seconds=0.1)


def test_a_server_inside_the_namespace_is_reached_at_the_asked_rate():
    need_kernel_link()
    code = (
        "import socket, sys\n"
        "with socket.create_server((sys.argv[1], int(sys.argv[2]))) as listener:\n"
        "    print(flush=True)\n"
        "    to, _ = listener.accept()\n"
        "    to.sendall(bytes(int(to.recv(64))))\n"
    )
    with NamespaceLink(4000, LinkShape(gbit_per_second=0.2)) as link:
        command = [*link.inside, sys.executable, "-c", code, link.host, str(link.port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
            server.stdout.readline()
            received, _, seconds = pull_once(link, 10_000_000)
        assert received == 10_000_000
        assert 0.39 < seconds < 2.0  # 0.4 s of transfer
        link.reshape(LinkShape(gbit_per_second=1.0))
        assert 0.3 < link.reached_gbit_per_second() < 1.05


def test_a_link_without_a_proxy_delays_where_the_kernel_can():
    need_kernel_link()
    with NamespaceLink(4000) as link:
        try:
            link.reshape(LinkShape(rtt_seconds=0.06))
        except RuntimeError as exc:
            pytest.skip(f"not tested: {exc}")
        begun = time.monotonic()
        with contextlib.suppress(ConnectionRefusedError):
            connect(link).close()
        assert 0.055 < time.monotonic() - begun < 1.0


def test_a_link_without_a_proxy_refuses_what_only_a_proxy_can():
    with pytest.raises(ValueError, match="stalls"):
        NamespaceLink(4000, LinkShape(is_stalled=True))
