"""The command `serve` as a program of a test, and what its models answer without a server."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Name of the file with the command's output, of that with its process id, and of that with what
#: is left when it has ended.
OUTPUT, PROCESS, LEFT = "output", "process", "left"
#: Name of the model that fails at SIGUSR1, and the error.
DOOMED, PLANTED = "doomed", "planted"
#: Name of the model whose steps take 0.25 s from SIGUSR2 on, and of the file that says so.
LASTING = "lasting"
TEXTS = ("Hello", "What is a word?", "word5 and more")
#: Prompt of the chat model for one message of a user, by its template.
TURN = "user: {}\nassistant: "
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


def slow_down(engine: Any) -> None:
    """Let each step of ``engine`` take 0.25 s: a request of 200 tokens is pending for 50 s."""
    scheduler, never = engine._begun[0].manager, threading.Event()

    def slow(*arguments: object, run_batch: Any = scheduler.run_batch) -> Any:
        never.wait(0.25)
        return run_batch(*arguments)

    scheduler.run_batch = slow


def serve(folder: str, options: Sequence[str]) -> None:
    """Run the command, and write what it leaves in its folder for files and in shared memory."""
    from sglang_distguard import Pool
    from sglang_distguard.__main__ import main

    place = Path(folder)
    sys.stdout = (place / OUTPUT).open("w", buffering=1)
    (place / PROCESS).write_text(str(os.getpid()))
    shared: set[str] = set()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith("/dev/shm/"):
            shared.add(str(arguments[0]))

    sys.addaudithook(note)
    pools: list[Any] = []
    made = Pool.__init__

    def noted(self: Any) -> None:
        made(self)
        pools.append(self)

    setattr(Pool, "__init__", noted)

    def fail(*_: object) -> None:
        def breaks(*_args: object) -> None:
            raise ValueError(PLANTED)

        pools[0][DOOMED]._begun[0].manager.run_batch = breaks

    def last(*_: object) -> None:
        slow_down(pools[0][LASTING])
        (place / LASTING).touch()

    signal.signal(signal.SIGUSR1, fail)
    signal.signal(signal.SIGUSR2, last)
    # A socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory() as files:
        tempfile.tempdir = files
        status = main(["serve", *options])
        left = {
            "files": sorted(os.listdir(files)),
            "shared memory": sorted(it for it in shared if os.path.exists(it)),
        }
    (place / LEFT).write_text(json.dumps(left))
    sys.exit(status)


def alone(cache: str) -> None:
    """Print what an engine of each small model answers, with no other engine in the process."""
    import sglang_distguard
    from sglang_distguard import Engine
    from sglang_distguard.testing import recipe
    from sglang_distguard.testing.talking import create_talking_models

    sglang_distguard.install()
    folders = create_talking_models(Path(cache) / "models")
    settings = {**recipe.settings(), "skip_tokenizer_init": False}
    found: dict[str, Any] = {}
    with Engine(model_path=str(folders["chat"]), **settings) as engine:
        prompts = [*TEXTS, *(TURN.format(text) for text in TEXTS)]
        made = [engine.generate(it, GREEDY, return_logprob=True) for it in prompts]
        found["chat"] = [
            [it["text"], [logprob for logprob, *_ in it["meta_info"]["output_token_logprobs"]]]
            for it in made
        ]
    with Engine(model_path=str(folders["embed"]), **settings) as engine:
        found["embed"] = [engine.encode(text)["embedding"] for text in TEXTS]
    print(json.dumps(found))


def bench(arguments: Sequence[str]) -> None:
    """Run SGLang's own `bench_serving` (0.5.23)."""
    import runpy

    sys.argv = ["bench_serving", *arguments]
    runpy.run_module("sglang.bench_serving", run_name="__main__")
