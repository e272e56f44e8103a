import os
import socket

import pytest

from kvfetcher.errors import ServerError
from kvfetcher.launcher.ports import bind_address, check_ports, port_holder
from support.triton_server import free_ports, server_config


def test_free_ports_pass():
    check_ports(server_config().server)


def test_taken_port_names_setting_and_holder():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=rf"port {port} .*metrics_port.*{os.getpid()}"):
            check_ports(server_config(metrics_port=port).server)
        assert port_holder(port)[0] == os.getpid()


def test_a_port_that_is_only_winding_down_is_free():
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as tritonserver does
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = listener.accept()
            accepted.close()  # this side closes first: its end waits in TIME_WAIT
    check_ports(server_config(http_port=port).server)


def test_equal_ports_are_refused():
    port = free_ports(1)[0]
    with pytest.raises(ServerError, match=rf"http_port and server\.grpc_port are both {port}"):
        check_ports(server_config(http_port=port, grpc_port=port).server)


def test_foreign_address_is_refused():
    with pytest.raises(ServerError, match=r"192\.0\.2\.1 .*cannot be bound"):
        check_ports(server_config(host="192.0.2.1").server)


def test_nobody_holds_a_free_port():
    assert port_holder(free_ports(1)[0]) is None


def test_a_name_is_bound_by_its_ipv4_address():
    assert bind_address("localhost") == "127.0.0.1"
    assert bind_address("0.0.0.0") == "0.0.0.0"


@pytest.mark.parametrize("host", ["::1", "::", "no-such-host.invalid", "300.1.1.1"])
def test_a_host_that_tritonserver_cannot_bind_is_refused_at_once(host):
    with pytest.raises(ServerError, match=r"server\.host = .* is not an IPv4 address"):
        check_ports(server_config(host=host).server)
