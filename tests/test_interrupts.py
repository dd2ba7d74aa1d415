"""Ctrl-C at any bytecode of any hook leaves nothing entered, held or bound.

A runner is published, built, run, updated and closed. KeyboardInterrupt is raised before each
bytecode of the package's own functions, and of SGLang's functions whose bodies the guard has put
into a with block. `make interrupts` raises at all of them; by default tests of builds raise at a
share of them.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Optional

import pytest
import sglang_distguard as dg
from sglang_distguard import _core
from sglang_distguard.context import default_dtype
from sglang_distguard.process import installation
from sglang_distguard.testing import bit_equal, server_args, steps
from sglang_distguard.testing.updates import weights_of
from torch.overrides import _get_current_function_mode_stack

Model = Callable[..., Path]
Place = tuple[CodeType, int]
PACKAGE = str(Path(dg.__file__).parent)
#: Raise at one of this many places; 1 means all. By default each test chooses.
EVERY = int(os.environ.get("DISTGUARD_EVERY", "0"))


def is_ours(code: CodeType) -> bool:
    if code.co_filename.startswith(PACKAGE):
        return f"{os.sep}testing{os.sep}" not in code.co_filename
    return any(name.startswith(("_distguard_within", "_distguard_hook")) for name in code.co_names)


class Tracer:
    """Records each place once, and raises at ``raise_at`` if that is given."""

    def __init__(self, raise_at: Optional[Place] = None) -> None:
        self.places: dict[Place, None] = {}
        self._raise_at = raise_at
        self.has_raised = False

    def run(self, work: Callable[[], Any]) -> None:
        sys.settrace(self._called)
        try:
            work()
        finally:
            sys.settrace(None)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not is_ours(frame.f_code):
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        return self._inside

    def _inside(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode" and not self.has_raised:
            place = (frame.f_code, frame.f_lasti)
            self.places[place] = None
            if place == self._raise_at:
                self.has_raised = True
                raise KeyboardInterrupt
        return self._inside


def state() -> dict[str, Any]:
    """The state that an interrupt must leave unchanged: depth, scope, dtype, leases, phases."""
    gc.collect()  # only objects made since `gc.freeze`: all objects take half a second
    facts = dg.snapshot()
    return {
        "execution": _core.current_execution(),
        "depth": _core.depth(),
        "dtype": default_dtype.in_force(),
        "modes": _get_current_function_mode_stack(),
        "phases": facts["phases"],
        "activations": _core.activations(),
        "install() waits": is_install_locked(),
        "runners": [it["runners"] for it in facts["scopes"] if it["runners"]],
        "holders": {
            it["key"]: sorted(holder["name"] for holder in it["holders"])
            for it in facts["slots"]
            if it["holders"]
        },
    }


def is_install_locked() -> bool:
    found: list[bool] = []

    def look() -> None:
        found.append(not installation._lock.acquire(blocking=False))
        if not found[0]:
            installation._lock.release()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0]


def interrupted_everywhere(
    work: Callable[[], Any], every: int, after: Callable[[], Any] = lambda: None
) -> int:
    """Interrupt ``work`` once at each place, compare the state, and return the number of places."""
    work()  # makes the objects that are made only once
    seen = Tracer()
    seen.run(work)
    places = list(seen.places)[:: EVERY or every]
    gc.collect()
    gc.freeze()
    try:
        _interrupted_at(places, work, after)
    finally:
        gc.unfreeze()
    return len(places)


def _interrupted_at(places: list[Place], work: Callable[[], Any], after: Callable[[], Any]) -> None:
    before = state()
    for place in places:
        tracer = Tracer(place)
        try:
            tracer.run(work)
        except KeyboardInterrupt:
            pass
        code, offset = place
        where = f"{code.co_qualname} in {code.co_filename} at {offset}"
        after()
        assert state() == before, where


@pytest.fixture
def runner(guard: None, model: Model) -> Iterator[Any]:
    other = dg.build_runner(server_args(model("gpt2")), name="other")
    made = dg.build_runner(server_args(model("llama")), name="served")
    yield made
    dg.close(made)
    dg.close(other)


def test_in_a_forward_and_a_sample(runner: Any) -> None:
    wanted = steps.generate(runner, steps=1).logits

    def in_another_thread() -> None:
        out: list[Any] = []
        thread = threading.Thread(target=lambda: out.append(steps.generate(runner, steps=1)))
        thread.start()
        thread.join()
        assert bit_equal(out[0].logits, wanted)  # no thread still holds the runner

    count = interrupted_everywhere(
        lambda: steps.generate(runner, steps=0), every=1, after=in_another_thread
    )
    assert count > 50


def test_in_activate(runner: Any) -> None:
    def work() -> None:
        with dg.activate(runner):
            pass

    assert interrupted_everywhere(work, every=1) > 5


def test_in_an_update_of_weights(runner: Any, model: Model) -> None:
    weights = weights_of(model("llama"))
    wanted = steps.generate(runner, steps=0).logits

    def work() -> None:
        runner.weight_updater.update_weights_from_tensor(weights)

    assert interrupted_everywhere(work, every=1) > 5
    work()
    assert bit_equal(steps.generate(runner, steps=0).logits, wanted)


# A socket that has not yet entered its with block is closed when collected, with a warning.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_in_a_build_and_a_close(runner: Any, model: Model) -> None:
    path = model("llama", seed=1)

    def work() -> None:
        dg.close(dg.build_runner(server_args(path), name="third"))

    assert interrupted_everywhere(work, every=150) > 20
    third = dg.build_runner(server_args(path), name="third")
    assert steps.generate(third, steps=0).logits.shape[-1] > 0
    dg.close(third)


def test_in_sglangs_own_steps_of_a_build(runner: Any, model: Model) -> None:
    path = model("llama", seed=1)

    def work() -> None:
        with _core.run_as(_core.current_execution()):
            dg.close(steps.build(server_args(path)))

    assert interrupted_everywhere(work, every=150) > 20


def test_in_a_publish(runner: Any, model: Model) -> None:
    from sglang.srt.runtime_context import SpawnRanks, publish

    args = server_args(model("llama"))
    ranks = SpawnRanks(world_rank=0, gpu_id=0)

    def work() -> None:
        with _core.run_as(_core.current_execution()):
            publish(args, role="scheduler", ranks=ranks)

    assert interrupted_everywhere(work, every=1) > 20
