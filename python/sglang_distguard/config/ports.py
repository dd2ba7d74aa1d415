"""TCP ports for stores and servers that this machine has yet to start."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port of the loopback interface, kept for the caller for about a minute.

    A port that was only bound and released is the next program's at once: outgoing connections draw
    from the same range, so a store that listens later may find it in use. Here one connection has
    passed through the port, and its closed end keeps Linux from giving the port to anything that
    does not name it (``TIME_WAIT``, 60 s). torch's stores, zmq, uvicorn and SGLang's
    servers bind with ``SO_REUSEADDR``, for which such a port is free; without it, to bind fails
    with EADDRINUSE for that time.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            accepted.close()  # this end closes first, so it is the one that lingers
        return int(listener.getsockname()[1])
