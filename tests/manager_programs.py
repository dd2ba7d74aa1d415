"""Runs SGLang's schedulers and managers as threads, and talks to them over their own sockets."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

from sglang_distguard.testing.steps import tokenized

#: Token ids; the second is longer than a chunk of the prefill (``SETTINGS``).
PROMPTS = ((1, 5, 9, 200, 31), tuple(range(3, 40)), (7, 7, 8), (1, 5, 9, 200, 44, 2))
#: More than ``testing.server_args``: a prefix cache, and prefills in chunks.
SETTINGS: dict[str, Any] = {
    "disable_radix_cache": False,
    "chunked_prefill_size": 16,
    "sleep_on_idle": True,
    "watchdog_timeout": 300,
}
#: Seconds for one answer; alone it takes less than one.
DEADLINE = 60


class Client:
    """The other end of one Scheduler's sockets, in the place of a TokenizerManager."""

    def __init__(self, server_args: Any) -> None:
        import zmq
        from sglang.srt.server_args import PortArgs

        self.port_args = PortArgs.init_new(server_args)
        self._context = zmq.Context()
        self._out = self._context.socket(zmq.PUSH)
        self._out.bind(self.port_args.scheduler_input_ipc_name)
        self._in = self._context.socket(zmq.PULL)
        self._in.setsockopt(zmq.RCVTIMEO, DEADLINE * 1000)
        self._in.bind(self.port_args.tokenizer_ipc_name)

    def ask(self, prompts: Sequence[Sequence[int]], steps: int = 8) -> list[list[int]]:
        """Send all prompts at once; return the token ids of each answer."""
        from sglang.srt.managers.io_struct import sock_recv, sock_send

        answers: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
        for number, prompt in enumerate(prompts):
            sock_send(self._out, tokenized(str(number), prompt, steps, ignore_eos=True))
        left = set(answers)
        while left:
            got = sock_recv(self._in)
            for rid, ids, reason in zip(
                got.rids, got.output_ids or got.decode_ids, got.finished_reasons, strict=True
            ):
                answers[rid] = list(ids)
                if reason is not None:
                    left.discard(rid)
        return list(answers.values())

    def shut_down(self) -> None:
        """Send what SGLang's own shutdown sends."""
        from sglang.srt.managers.io_struct import ShutdownReq, sock_send

        sock_send(self._out, ShutdownReq())

    def close(self) -> None:
        """Close the sockets."""
        self._context.destroy(linger=0)


class Serving:
    """One Scheduler in a thread, made by SGLang's own code."""

    def __init__(self, server_args: Any, run: Callable[[Serving], None]) -> None:
        self.server_args = server_args
        self.client = Client(server_args)
        self.scheduler: Any = None
        self.error: Optional[BaseException] = None
        self.ready = threading.Event()
        self._run = run
        self.thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            self._run(self)
        except BaseException as error:
            self.error = error
        finally:
            self.ready.set()

    def ask(self, prompts: Sequence[Sequence[int]] = PROMPTS, steps: int = 8) -> list[list[int]]:
        """Wait until the scheduler is ready, and ask it."""
        assert self.ready.wait(DEADLINE)
        if self.error is not None:
            raise self.error
        return self.client.ask(prompts, steps)

    def send(self, info: dict[str, Any]) -> None:
        """As the pipe to which `run_scheduler_process` writes."""
        assert info["status"] == "ready"
        self.ready.set()


def in_event_loop(serving: Serving) -> None:
    """What an embedder writes: publish, build, serve."""
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.runtime_context import SpawnRanks, publish

    ranks = SpawnRanks(world_rank=0, gpu_id=0)
    publish(serving.server_args, role="scheduler", ranks=ranks)
    serving.scheduler = Scheduler(serving.server_args, serving.client.port_args)
    serving.ready.set()
    serving.scheduler.run_event_loop()


def in_process_function(serving: Serving) -> None:
    """SGLang's own function, which it runs in a process of its own."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    run_scheduler_process(serving.server_args, serving.client.port_args, 0, 0, 0, None, serving)


#: Checkpoint, dtype, and whether it overlaps: the schedulers of the tests.
MEMBERS = (
    ("llama", "float32", False),
    ("qwen3_moe", "bfloat16", True),
    ("gpt2", "bfloat16", False),
)


def member_args(cache: str, number: int) -> Any:
    """SGLang's settings of one of ``MEMBERS``."""
    from sglang_distguard.testing import create_model, server_args

    name, dtype, overlaps = MEMBERS[number]
    model = create_model(name, Path(cache) / "models")
    return server_args(model, dtype=dtype, **SETTINGS, disable_overlap_schedule=not overlaps)


def settings_of_the_process() -> dict[str, Any]:
    """What a host does not expect a guest to change."""
    import setproctitle
    import torch

    return {
        "title": setproctitle.getproctitle(),
        "signals": [str(signal.getsignal(it)) for it in (signal.SIGQUIT, signal.SIGTERM)],
        "log": [logging.getLogger().level, len(logging.getLogger().handlers)],
        "frozen": gc.get_freeze_count() > 0,
        "cores": sorted(os.sched_getaffinity(0)),
        "dies with its parent": _death_signal(),
        "world": torch.distributed.is_initialized(),
    }


def _death_signal() -> int:
    number = ctypes.c_int()
    ctypes.CDLL("libc.so.6").prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
    return number.value


def of_process() -> dict[str, list[str]]:
    """Its threads, and what its descriptors refer to."""
    threads = [it.name for it in threading.enumerate() if it.name != "tqdm_monitor"]
    files = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            files.append(os.readlink(f"/proc/self/fd/{number}").partition(":")[0])
    return {"threads": sorted(threads), "files": sorted(files)}


def alone(cache: str, number: int) -> None:
    """Print the answers of one scheduler of plain SGLang, the only one of its process."""
    serving = Serving(member_args(cache, number), in_event_loop)
    print(json.dumps(serving.ask()), flush=True)
    os._exit(0)


def together(cache: str, how: str, numbers: Sequence[int]) -> None:
    """Print what happens with several schedulers in threads of one process."""
    import sglang_distguard

    sglang_distguard.install(timeout=DEADLINE)
    run = {"event loop": in_event_loop, "process function": in_process_function}[how]
    facts: dict[str, Any] = {}
    settings = settings_of_the_process()
    _end([Serving(member_args(cache, numbers[-1]), run)])  # what the first of a process leaves
    before = of_process()
    servings = [Serving(member_args(cache, number), run) for number in numbers]
    facts["answers"] = _ask_all(servings)
    facts["answers again"] = _ask_all(servings)
    first, *others = servings
    first.client.shut_down()
    first.thread.join(DEADLINE)
    facts["answers when one has ended"] = _ask_all(others)
    _end(others)
    _end([first])
    facts["settings"] = [settings, settings_of_the_process()]
    facts["holders"] = [it["holders"] for it in sglang_distguard.snapshot()["slots"]]
    servings.clear()
    del first, others
    gc.collect()
    facts["process"] = [before, of_process()]
    facts["dropped"] = [_drop(member_args(cache, numbers[-1])), of_process()]
    sglang_distguard.teardown()
    sglang_distguard.uninstall()
    print(json.dumps(facts), flush=True)


def _drop(server_args: Any) -> bool:
    """Drop a scheduler whose loop has ended, without closing it; say whether it is freed."""
    serving = Serving(server_args, in_event_loop)
    serving.ask()
    serving.client.shut_down()
    serving.thread.join(DEADLINE)
    serving.client.close()
    scheduler = weakref.ref(serving.scheduler)
    del serving
    gc.collect()
    return scheduler() is None


def _end(servings: Sequence[Serving]) -> None:
    """Close what an embedder has built; let SGLang's process function end by itself."""
    import sglang_distguard

    for serving in servings:
        assert serving.ready.wait(DEADLINE)
        if serving.scheduler is not None:  # its loop runs, or has ended
            assert sglang_distguard.close(serving.scheduler)
            assert not sglang_distguard.close(serving.scheduler)
        elif serving.thread.is_alive():
            serving.client.shut_down()
        serving.thread.join(DEADLINE)
        serving.client.close()
        assert serving.error is None, serving.error
        assert not serving.thread.is_alive()


def _ask_all(servings: Sequence[Serving]) -> list[list[list[int]]]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(Serving.ask, servings))


def without_the_guard(cache: str) -> None:
    """Print what a second scheduler says in a thread of plain SGLang, after a first one is ready."""
    servings = []
    for number in range(2):
        servings.append(Serving(member_args(cache, number), in_event_loop))
        assert servings[-1].ready.wait(DEADLINE)
    print(json.dumps({"errors": [repr(it.error) for it in servings]}), flush=True)
    os._exit(0)


def closing(cache: str) -> None:
    """Print what `close` says of a scheduler whose event loop is busy, and does when forced."""
    import sglang_distguard

    sglang_distguard.install(timeout=DEADLINE)
    serving = Serving(member_args(cache, 2), in_event_loop)
    serving.ask()
    busy, go_on = threading.Event(), threading.Event()
    errors: list[str] = []

    def refused(**options: Any) -> None:
        try:
            sglang_distguard.close(serving.scheduler, **options)
        except sglang_distguard.StateInUse as error:
            errors.append(str(error))

    def in_the_loop() -> None:
        if not busy.is_set():
            refused()
        busy.set()
        assert go_on.wait(DEADLINE)

    serving.scheduler.maybe_sleep_on_idle = in_the_loop
    assert busy.wait(DEADLINE)
    refused(timeout=0.1)
    facts: dict[str, Any] = {"errors": errors}
    facts["alive"] = serving.thread.is_alive()
    facts["forced"] = sglang_distguard.close(serving.scheduler, force=True)
    facts["holders"] = [it["holders"] for it in sglang_distguard.snapshot()["slots"]]
    go_on.set()
    serving.thread.join(DEADLINE)
    facts["ended"] = [serving.thread.is_alive(), repr(serving.error)]
    try:
        serving.scheduler.get_init_info()
    except sglang_distguard.DistGuardError as error:
        facts["afterwards"] = str(error)
    print(json.dumps(facts), flush=True)
