"""Runs a function on several ranks, each in its own process that has already imported sglang.

``RankRunner`` keeps one process that has imported sglang and built nothing. It forks every rank of
every run from that process. So a run begins within a second and sees no effects of other runs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_distguard.config.ports import free_port
from sglang_distguard.testing.children import end_with_parent, fork
from sglang_distguard.testing.recipe import prepare_environment

_MODULE = "sglang_distguard.testing.ranks"
_READY = "ready"
#: Largest number of ranks of a run.
_MOST = 16


class RankError(AssertionError):
    """A rank raised, died or hung; the text has the output of every rank."""


class RankRunner:
    """Forks ranks from a process that has sglang imported. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """``path``: folder of the modules whose functions are run."""
        # Further folders of this process's PYTHONPATH: ranks run the package that runs here.
        folders = [str(path), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore::RuntimeWarning:runpy", "-m", _MODULE],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def __enter__(self) -> RankRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def run(
        self,
        function: Callable[..., Any],
        size: int,
        *,
        seconds: float = 120.0,
        may_die: bool = False,
        **arguments: Any,
    ) -> list[Any]:
        """Run ``function(**arguments)`` on ``size`` ranks.

        ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` are set, as by
        torchrun. ``DISTGUARD_RUN_FOLDER`` is a folder that only the ranks of this run share; it is
        deleted after the run.

        Args:
            function: a function of an importable module.
            size: how many ranks, at most 16.
            seconds: limit after which every rank that still runs prints its stacks and is killed.
            may_die: whether a rank that dies without a result yields None instead of an error.
            **arguments: JSON values.

        Returns:
            What each rank returned (JSON values), by rank.

        Raises:
            RankError: a rank raised, died or hung.
        """
        job = [function.__module__, function.__name__, size, seconds, arguments]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        results = json.loads(self._answer())
        bad = [it for it in results if it["status"] != "ok" and not (may_die and it["died"])]
        if bad:
            told = "\n".join(
                f"--- rank {rank}: {it['status']}\n{it['output']}"
                for rank, it in enumerate(results)
            )
            raise RankError(f"{function.__name__} on {size} ranks\n{told}")
        return [it["value"] for it in results]

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RankError("the process that forks ranks has ended")
        return line


def _serve() -> None:
    """Read jobs from standard input, run each on forked ranks, and write the results."""
    from sglang_distguard.testing.solo import import_sglang

    end_with_parent()  # otherwise a killed test run would leave ranks behind
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # sglang's output is not an answer
        prepare_environment(ranks=_MOST)
        import_sglang()
        _prepare_compiler()
        print(_READY, file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(_run(*json.loads(line))), file=answers, flush=True)


def _prepare_compiler() -> None:
    """Do what the first ``torch.compile`` of each rank would: half of a short test's time.

    SGLang compiles the embedding of several ranks. torch 2.14.1 then digests its own text and
    Triton's, asks a C++ compiler for the processor's instructions and imports back ends. None of
    these starts a thread.
    """
    try:
        import sympy.tensor.tensor  # noqa: F401
        import torch._dynamo
        import torch.export._trace
        import torch.fx.experimental.validator
        import torch.utils.cpp_extension
        from torch._inductor.codecache import CacheBase, torch_key
        from torch._inductor.codegen.common import init_backend_registration
        from torch._inductor.cpu_vec_isa import pick_vec_isa
    except ImportError:  # of another torch, whose ranks take longer
        return
    torch_key()
    CacheBase.get_system()
    init_backend_registration()
    torch._dynamo.list_backends()
    with contextlib.suppress(RuntimeError):  # there is no C++ compiler
        pick_vec_isa()


def _run(
    module: str, name: str, size: int, seconds: float, arguments: dict[str, Any]
) -> list[dict[str, Any]]:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(size)]
        # No rank exits before all are done: the store ends with rank 0, and others still read it.
        hold, release = os.pipe()
        children = [
            _fork(files[rank], rank, size, port, (module, name, arguments), (hold, release))
            for rank in range(size)
        ]
        os.close(hold)
        statuses = _wait(children, files, release, seconds)
        return [_outcome(file, status) for file, status in zip(files, statuses, strict=True)]


def _fork(
    file: Path,
    rank: int,
    size: int,
    port: int,
    job: tuple[str, str, Any],
    hold: tuple[int, int],
) -> int:
    def work() -> None:
        os.close(hold[1])
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            DISTGUARD_RUN_FOLDER=str(file.parent),
        )
        module, name, arguments = job
        value = getattr(importlib.import_module(module), name)(**arguments)
        file.with_suffix(".new").write_text(json.dumps(value))
        file.with_suffix(".new").rename(file)
        os.read(hold[0], 1)  # returns when the parent closes the pipe

    return fork(work, file.with_suffix(".out"))


def _wait(children: list[int], files: list[Path], release: int, seconds: float) -> list[int | None]:
    """Wait for exit codes, None for a killed child; close ``release`` when all ranks are done."""
    held = True
    deadline = time.monotonic() + seconds
    statuses: dict[int, int | None] = {}
    while len(statuses) < len(children) and time.monotonic() < deadline:
        for child in children:
            if child not in statuses:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        done = [it in statuses or file.exists() for it, file in zip(children, files, strict=True)]
        if held and all(done):
            os.close(release)
            held = False
        time.sleep(0.01)
    if held:
        os.close(release)
    hung = [child for child in children if child not in statuses]
    for sign, pause in ((signal.SIGUSR1, 1.0), (signal.SIGKILL, 0.0)):
        for child in hung:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, sign)
        time.sleep(pause if hung else 0)
    for child in hung:
        os.waitpid(child, 0)
        statuses[child] = None
    return [statuses[child] for child in children]


def _outcome(file: Path, status: int | None) -> dict[str, Any]:
    output = file.with_suffix(".out")
    said = {0: "ok", None: "hung"}.get(status, f"exit code {status}")
    return {
        "status": said,
        "died": status is not None and status not in (0, 1),
        "value": json.loads(file.read_text()) if status == 0 else None,
        "output": output.read_text(errors="replace")[-6000:] if output.is_file() else "",
    }


if __name__ == "__main__":
    _serve()
