"""Run programs in processes of their own: new interpreters, or children forked from one.

A new interpreter takes 10 s of processor time to import SGLang. A forked child has it imported. The
processes that fork (`fork_server`) are started when a test first needs them, and serve all workers
of a test session.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import fork_server
from conftest import CACHE

TESTS = Path(__file__).parent
#: Seconds for a program. It builds at most a few small runners (20 s on two idle cores with the
#: import of SGLang).
DEADLINE = 240
#: File with the output of the processes that fork.
LOG = "log"


class Has(enum.Enum):
    """What a process has imported when its program begins."""

    NOTHING = "nothing"
    #: torch, transformers and others, as in a process that has not imported SGLang yet.
    THIRD_PARTY = "third party"
    #: Also SGLang and all its models. `prepare_environment()` has been called.
    SGLANG = "sglang"


def run(
    *parts: str, has: Has = Has.NOTHING, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the dedented parts of a program; ``CACHE`` is defined as the folder of checkpoints.

    Args:
        *parts: Python text; the modules of this folder can be imported.
        has: what is imported already.
        **environment: variables on top of this process's.
    """
    if has is not Has.NOTHING:
        return Forked(*parts, has=has, environment=environment).wait()
    return subprocess.run(
        [sys.executable, "-c", _text(parts)],
        env=_environment(environment),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def run_well(*parts: str, has: Has = Has.NOTHING, **environment: str) -> str:
    """Run a program as ``run`` does; it must exit with 0. Return what it printed."""
    done = run(*parts, has=has, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def facts_of(call: str) -> Any:
    """Run ``module.function(...)``, of a module of programs here, where SGLang is imported.

    ``CACHE`` is defined as for ``run``. Return the JSON value in the last line that it prints.
    """
    printed = run_well(f"import {call.partition('.')[0]}\n", call, has=Has.SGLANG)
    return json.loads(printed.splitlines()[-1])


class Forked:
    """A program that runs in a forked child."""

    def __init__(
        self,
        *parts: str,
        has: Has = Has.SGLANG,
        arguments: Sequence[str] = (),
        stdin: Optional[int] = None,
        environment: Mapping[str, str] = {},
    ) -> None:
        """Begin the program: ``parts``, ``has`` and ``environment`` as for ``run``.

        Args:
            arguments: ``sys.argv[1:]`` of the program.
            stdin: file descriptor of its standard input; default: an empty file.
        """
        self._out, self._err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        job = {
            "text": _text(parts),
            "arguments": arguments,
            "environment": _environment(environment),
            "folder": os.getcwd(),
        }
        with open(os.devnull) as nothing, _saying_why():
            files = [nothing.fileno() if stdin is None else stdin]
            files += [self._out.fileno(), self._err.fileno()]
            self._connection = _connect(has)
            socket.send_fds(self._connection, [fork_server.FILES], files)
            self._connection.sendall(f"{json.dumps(job)}\n".encode())

    def wait(self, seconds: float = DEADLINE) -> subprocess.CompletedProcess[str]:
        """Wait until the program has ended; it is ended after ``seconds``."""
        late = False
        with self._out, self._err, self._connection, _saying_why():
            self._connection.settimeout(seconds)
            try:
                code = self._connection.recv(16)
            except TimeoutError:
                late = True
                self._connection.settimeout(DEADLINE)
                self._connection.shutdown(socket.SHUT_WR)  # has its stacks printed, and ends it
                code = self._connection.recv(16)
            if not code:
                raise ConnectionError
            self._out.seek(0)
            self._err.seek(0)
            done = subprocess.CompletedProcess(
                ["forked"], int(code), self._out.read(), self._err.read()
            )
        assert not late, f"no end within {seconds} s:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done


@contextlib.contextmanager
def _saying_why() -> Iterator[None]:
    try:
        yield
    except ConnectionError:
        log = (_Session.folder / LOG).read_text()
        raise AssertionError(f"the process that forks has ended:\n{log[-3000:]}") from None


def _text(parts: Sequence[str]) -> str:
    return f"CACHE = {str(CACHE)!r}\n{''.join(map(textwrap.dedent, parts))}"


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **changes}


class _Session:
    """What the workers of a test session share."""

    #: Folder of the sockets, which only this user may enter.
    folder: Path
    #: Environment at the begin of the session, whichever test starts the processes.
    environment: Mapping[str, str]
    #: The process that all workers end with.
    process: int


def begin_session(folder: Path) -> None:
    """Begin a test session, whose workers all have the same ``folder``."""
    _Session.folder, _Session.environment = folder / "forking", _environment({})
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    _Session.process = os.getppid() if is_worker else os.getpid()


def _connect(has: Has) -> socket.socket:
    if not _Session.folder.exists():
        _start_forking()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(_Session.folder / has.value))
    return connection


def _start_forking() -> None:
    """Start the processes that fork, unless another worker does at the same time."""
    mine = Path(tempfile.mkdtemp(dir=_Session.folder.parent))
    listeners = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for listener, has in zip(listeners, (Has.THIRD_PARTY, Has.SGLANG), strict=True):
        listener.bind(str(mine / has.value))
        listener.listen()
    try:
        mine.rename(_Session.folder)
    except OSError:  # it exists
        shutil.rmtree(mine)
        return
    numbers = [listener.fileno() for listener in listeners]
    with (_Session.folder / LOG).open("w") as log:
        subprocess.Popen(
            [sys.executable, fork_server.__file__, *map(str, numbers), str(_Session.process)],
            env=_Session.environment,
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C ends the session, and then these processes
        )
