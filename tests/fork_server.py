"""Two processes that have modules imported and fork a child for each program of `interpreters`.

``python fork_server.py THIRD_PARTY SGLANG SESSION`` takes two listening sockets (numbers of file
descriptors) and the id of a process. A connection to the first socket forks a child that has torch
and other packages imported which sglang imports; one to the second, a child that has sglang
imported and nothing built. Both processes end with the process SESSION, their children with them.

A child returns from ``serve`` to ``main`` and runs the program as the module ``__main__``. Then the
interpreter ends as after any program, with exit handlers and exit code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import random
import selectors
import signal
import socket
import sys
import types
from dataclasses import dataclass
from typing import Any

from sglang_distguard.testing.children import end_with_parent

#: The packages that take longest of those that sglang 0.5.23 imports.
THIRD_PARTY = ("torch", "torchvision", "transformers", "openai", "timm", "datasets", "flashinfer")
#: What a connection sends with its three files.
FILES = b"files"


@dataclass
class _Child:
    pid: int
    ended: int
    connection: socket.socket


def main(third_party: str, sglang: str, session: str) -> None:
    """Import, fork the second process, and serve; in a child, run the program."""
    inherited = set(os.environ)
    # huggingface_hub reads it when it is imported. Without a network it would try for a minute to
    # ask about each tokenizer (transformers 5.19).
    os.environ["HF_HUB_OFFLINE"] = "1"
    session_ended = os.pidfd_open(int(session))
    mine, other = (socket.socket(fileno=int(number)) for number in (third_party, sglang))
    for name in THIRD_PARTY:
        with contextlib.suppress(ModuleNotFoundError):  # another sglang may need others
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the end of the interpreter of each child collects garbage several times
    if os.fork() == 0:
        end_with_parent()
        mine, other = other, mine
        _import_sglang()
        gc.collect()
        gc.freeze()
    other.close()
    job = serve(mine, session_ended)
    for name in inherited - job["environment"].keys():
        del os.environ[name]
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.argv = ["-c", *job["arguments"]]
    random.seed()
    faulthandler.enable()
    sys.modules["__main__"] = program = types.ModuleType("__main__")
    exec(compile(job["text"], "<string>", "exec"), vars(program))


def _import_sglang() -> None:
    from sglang_distguard.testing.recipe import prepare_environment
    from sglang_distguard.testing.solo import import_sglang

    prepare_environment()
    import_sglang()


def serve(listener: socket.socket, session_ended: int) -> Any:
    """Fork a child for each connection. Only the children return, each with its job.

    A connection sends standard input, output and error, and a line with the job as JSON. It
    receives the exit code. If its sending side is shut before, the child prints its stacks and
    ends.
    """
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(session_ended, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj == session_ended:
                os._exit(0)
            elif key.fileobj is listener:
                connection, _ = listener.accept()
                _, files, _, _ = socket.recv_fds(connection, len(FILES), 3)
                with connection.makefile() as lines:
                    job = json.loads(lines.readline())
                pid = os.fork()
                if pid == 0:
                    end_with_parent()
                    for number, file in enumerate(files):
                        os.dup2(file, number)
                        os.close(file)
                    connection.close()
                    _close(selector)
                    return job
                for file in files:
                    os.close(file)
                child = _Child(pid, os.pidfd_open(pid), connection)
                selector.register(child.ended, selectors.EVENT_READ, child)
                selector.register(connection, selectors.EVENT_READ, child)
            elif key.fileobj is key.data.connection:
                selector.unregister(key.fileobj)
                os.kill(key.data.pid, signal.SIGABRT)  # faulthandler prints the stacks
            else:
                _answer(selector, key.data)


def _answer(selector: selectors.BaseSelector, child: _Child) -> None:
    """Send the exit code of a child that has ended."""
    _, status = os.waitpid(child.pid, 0)
    selector.unregister(child.ended)
    os.close(child.ended)
    with contextlib.suppress(KeyError):  # its caller no longer waits for it
        selector.unregister(child.connection)
    with child.connection, contextlib.suppress(BrokenPipeError):
        child.connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def _close(selector: selectors.BaseSelector) -> None:
    """Close, in a child, what belongs to the process that serves."""
    for key in list(selector.get_map().values()):
        if isinstance(key.fileobj, socket.socket):
            key.fileobj.close()
        else:
            os.close(key.fd)
    selector.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
