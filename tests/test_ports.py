"""A port that ``free_port`` returned stays free until the caller listens on it."""

from __future__ import annotations

import socket
import struct

import pytest
from sglang_distguard.config.ports import free_port

#: Linux 6.3: the range from which the kernel picks the port of one socket.
IP_LOCAL_PORT_RANGE = 51


def _restricted_to(port: int) -> socket.socket:
    """A socket to which the kernel can give no port but this one."""
    made = socket.socket()
    try:
        made.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port | port << 16))
    except OSError:
        made.close()
        pytest.skip("the kernel has no IP_LOCAL_PORT_RANGE (Linux 6.3)")
    return made


def _released() -> int:
    """A port as usual: bound, then released."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_taken_by_a_socket_that_names_no_port(port: int) -> bool:
    with _restricted_to(port) as other:
        try:
            other.bind(("127.0.0.1", 0))
        except OSError:
            return False
        return True


def _is_taken_by_an_outgoing_connection(port: int) -> bool:
    with socket.create_server(("127.0.0.1", 0)) as server, _restricted_to(port) as other:
        try:
            other.connect(server.getsockname())
        except OSError:
            return False
        return True


def test_no_other_socket_is_given_a_free_port_and_its_caller_can_listen_on_it() -> None:
    port = free_port()
    assert not _is_taken_by_a_socket_that_names_no_port(port)
    assert not _is_taken_by_an_outgoing_connection(port)
    with socket.create_server(("127.0.0.1", port)) as server:
        assert server.getsockname()[1] == port


def test_a_port_that_was_only_released_goes_to_the_next_socket() -> None:
    assert _is_taken_by_a_socket_that_names_no_port(_released())
    assert _is_taken_by_an_outgoing_connection(_released())
