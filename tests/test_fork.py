"""A forked child has an empty registry and refuses inherited objects; the parent goes on."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard
from forking import fresh_registry, in_child, put_fresh_registry
from interpreters import run_well
from registry_calls import acquire, leader_of, state_of, until, waits_for
from sglang_distguard import _core
from sglang_distguard.process import installation
from sglang_distguard.testing import server_args, steps

Model = Callable[..., Path]
FRESH = {"slots": [], "events": [], "decision": "lead", "generation": 1}


def test_a_child_forked_while_others_lead_and_wait_has_a_fresh_registry() -> None:
    decisions: list[str] = []
    with leader_of("groups:led in the parent"):
        waiter = threading.Thread(
            target=lambda: decisions.append(acquire("groups:led in the parent").decision)
        )
        waiter.start()
        until(waits_for("groups:led in the parent"))
        assert in_child(fresh_registry) == FRESH
        assert in_child(lambda: in_child(fresh_registry)) == FRESH
        assert state_of("groups:led in the parent")["state"] == "running"
    waiter.join()
    assert decisions == ["lead"]  # the fork changed nothing in the parent
    assert state_of("groups:of the child") == {}


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_starts_with_an_empty_registry_by_every_method(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    with leader_of("groups:led in the parent"):
        queue = context.Queue()
        process = context.Process(target=put_fresh_registry, args=(queue,))
        process.start()
        assert queue.get(timeout=120) == FRESH
        process.join(60)
        assert process.exitcode == 0


def test_no_lock_that_other_threads_hold_at_the_fork_blocks_the_child() -> None:
    """Threads change the registry all the time, so that at some fork its lock is held.

    A process without SGLang forks faster.

    Without `start_afresh` the 89th of 300 such children hung (once, two cores).
    """
    run_well(
        f"FRESH = {FRESH}\n",
        """
        import threading
        from forking import fresh_registry, in_child
        from registry_calls import request

        stop = threading.Event()

        def change(number):
            while not stop.is_set():
                asked = request(f"groups:busy {number}", {}, slow_after=9.0)
                claim = asked.try_acquire(None)
                asked.wait(0.0)
                if claim is not None:
                    claim.fail("again")

        threads = [threading.Thread(target=change, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(300):
                assert in_child(fresh_registry) == FRESH
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        """,
    )


def test_a_claim_of_the_forking_thread_is_refused_in_the_child() -> None:
    claim = acquire("groups:mine")

    def use_it() -> tuple[str, bool]:
        try:
            claim.publish(identity=1, resource=None)
        except sglang_distguard.DistGuardError as error:
            return str(error), _core.is_ready("groups:mine")
        return "published", _core.is_ready("groups:mine")

    text, ready = in_child(use_it)
    assert "before a fork" in text
    assert not ready
    assert state_of("groups:mine")["state"] == "running"
    claim.fail("done")


def test_a_fork_waits_for_an_install_in_another_thread() -> None:
    held, go_on = threading.Event(), threading.Event()

    def install() -> None:
        with installation._lock:
            held.set()
            assert go_on.wait(30)

    thread = threading.Thread(target=install)
    thread.start()
    assert held.wait(30)
    release = threading.Thread(target=go_on.set)
    release.start()
    assert in_child(sglang_distguard.is_installed) is False
    assert in_child(lambda: installation._lock.acquire(timeout=30)) is True
    thread.join()
    release.join()
    assert installation._lock.acquire(timeout=30)
    installation._lock.release()


def test_an_inherited_runner_and_its_world_are_refused_and_the_parents_still_work(
    guard: None, model: Model
) -> None:
    runner = sglang_distguard.build_runner(server_args(model("gpt2")), name="the parent's")
    alone = steps.generate(runner, activate=sglang_distguard.activate)

    def try_everything() -> list[str]:
        uses: list[Callable[[], Any]] = [
            lambda: runner.forward(None),  # type: ignore[arg-type]
            lambda: sglang_distguard.activate(runner).__enter__(),
            lambda: sglang_distguard.build_runner(server_args(model("gpt2"))),
        ]
        said = []
        for use in uses:
            try:
                use()
            except sglang_distguard.ForkedError as error:
                said.append(str(error))
        said.append(str(sglang_distguard.close(runner)))
        said.append(str([slot["state"] for slot in sglang_distguard.snapshot()["slots"]]))
        return said

    said = in_child(try_everything)
    assert len(said) == 5, said
    for text in said[:2]:
        assert "'the parent's' was built in process" in text
        assert str(os.getpid()) in text
    assert "world was initialised by the process that this one was forked from" in said[2]
    assert "spawn" in said[2]
    holders = state_of("world")["holders"]
    assert [holder["name"] for holder in holders] == ["the parent's"]
    again = steps.generate(runner, activate=sglang_distguard.activate)
    assert again.tokens == alone.tokens
    assert again.logits.equal(alone.logits)
    sglang_distguard.close(runner)


def test_a_forked_error_crosses_process_borders() -> None:
    error = sglang_distguard.ForkedError("text", runner="r")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.details) == (type(error), "text", {"runner": "r"})
