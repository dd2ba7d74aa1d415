"""A port that ``free_port`` returned stays free until the caller listens on it."""

from __future__ import annotations

import errno
import socket
import struct

import pytest
from sglang_distguard.config.ports import free_port

#: Linux 6.3: the range from which the kernel picks the port of one socket.
IP_LOCAL_PORT_RANGE = 51
#: What the kernel says when it has no port left for a socket.
NONE_LEFT = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)


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


def _is_taken(port: int, how: str) -> bool:
    """Whether a socket that names no port is given this one."""
    with socket.create_server(("127.0.0.1", 0)) as server, _restricted_to(port) as other:
        try:
            if how == "connect":
                other.connect(server.getsockname())
            else:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, how == "bind and reuse")
                other.bind(("127.0.0.1", 0))
        except OSError as error:
            if error.errno not in NONE_LEFT:
                raise
            return False
        return True


def test_its_caller_can_listen_on_a_free_port() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server:
        assert server.getsockname()[1] == port


@pytest.mark.parametrize("how", ["connect", "bind", "bind and reuse"])
def test_no_other_socket_is_given_a_free_port(how: str) -> None:
    assert not _is_taken(free_port(), how)
    assert _is_taken(_released(), how)  # as a port that was only released
