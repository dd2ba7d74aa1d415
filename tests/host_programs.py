"""What SGLang's managers do to the process that hosts them, with the treatment and without."""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Any

from manager_programs import (
    DEADLINE,
    Serving,
    in_event_loop,
    in_process_function,
    member_args,
    settings_of_the_process,
)


def install(treated: bool) -> None:
    """Install the guard, without what it treats as the host's if not ``treated``."""
    import sglang_distguard
    from sglang_distguard.hooks import daemon_threads, generation_0_5_21, host, versions

    if not treated:
        versions.GENERATIONS = {
            "without host": lambda: [
                it
                for it in generation_0_5_21.changes()
                if it not in (*host.CHANGES, *daemon_threads.CHANGES)
            ]
        }
    sglang_distguard.install(timeout=DEADLINE)


def acts(cache: str, treated: bool) -> None:
    """Print what one scheduler that is started and shut down changes for another one."""
    install(treated)
    other = Serving(member_args(cache, 2), in_event_loop)
    first = other.ask()
    settings = settings_of_the_process()
    one = Serving(member_args(cache, 0), in_process_function)
    one.ask()
    random = _random_state()
    seeding = threading.Thread(target=_seed)
    seeding.start()
    seeding.join()
    facts: dict[str, Any] = {"random numbers stay": _random_state() == random}
    one.client.shut_down()
    one.thread.join(DEADLINE)
    facts["settings"] = [settings, settings_of_the_process()]
    facts["watchdogs"] = sum("watchdog" in it.name for it in threading.enumerate())
    if treated:
        late = Serving(member_args(cache, 1), in_event_loop)
        assert late.ready.wait(DEADLINE)
        facts["late"] = repr(late.error)
        facts["other"] = other.ask() == first
    print(json.dumps(facts), flush=True)
    os._exit(0)


def _seed() -> None:
    from sglang.srt.utils.common import set_random_seed

    set_random_seed(12345)


def _random_state() -> int:
    import torch

    return hash(bytes(torch.get_rng_state().numpy()))


def failing(cache: str, treated: bool) -> None:
    """Print the signals that the parent of a process gets in which a scheduler fails."""
    signals: list[int] = []
    signal.signal(signal.SIGQUIT, lambda number, _: signals.append(number))
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        with os.fdopen(writable, "w") as out:
            json.dump(_failing_in_child(cache, treated), out)
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as text:
        facts = json.load(text)
    os.waitpid(child, 0)
    print(json.dumps({**facts, "signals": len(signals)}), flush=True)


def _failing_in_child(cache: str, treated: bool) -> dict[str, Any]:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.utils import watchdog

    install(treated)
    other = Serving(member_args(cache, 2), in_event_loop)
    first = other.ask()

    def fails(_scheduler: Any) -> None:
        raise RuntimeError("planted")

    build, Scheduler.init_overlap = Scheduler.init_overlap, fails  # type: ignore[method-assign]
    one = Serving(member_args(cache, 0), in_process_function)
    one.thread.join(DEADLINE)
    Scheduler.init_overlap = build  # type: ignore[method-assign]
    error = repr(one.error)

    # As a watchdog whose scheduler is stuck does.
    def is_stuck() -> None:
        parent: Any = watchdog.psutil.Process().parent()
        parent.send_signal(signal.SIGQUIT)

    stuck = threading.Thread(target=is_stuck)
    stuck.start()
    stuck.join()
    import sglang_distguard

    holders = [len(it["holders"]) for it in sglang_distguard.snapshot()["slots"]]
    return {"error": error, "other": other.ask() == first, "holders": holders}


def exits_while_serving(cache: str) -> None:
    """End the interpreter while a scheduler serves in a daemon thread."""
    install(True)
    serving = Serving(member_args(cache, 2), in_event_loop)
    serving.ask()
    print("served", flush=True)
