"""What a load leaves is collected when it ends, without a look at what existed before it."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import interpreters
import pytest
from sglang_distguard.config.overlapping import Overlapping
from sglang_distguard.patching.import_garbage import Imports
from sglang_distguard.runner.garbage import Loads


@pytest.fixture(autouse=True)
def nothing_set_aside() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.enable()


class Knot:
    """An object that refers to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


def oldest(made: Knot) -> weakref.ref[Knot]:
    """Let ``made`` survive collections, as what a long load makes does."""
    gc.collect(0)
    gc.collect(1)
    return weakref.ref(made)


def test_a_load_collects_what_it_made_and_leaves_what_was_there() -> None:
    loads = Loads()
    kept = Knot()
    earlier = oldest(kept)
    with loads.one():
        assert gc.get_freeze_count() > 0
        del kept  # set aside: a collection would have to look through everything for it
        made = Knot()
        within = oldest(made)
        del made
    assert within() is None
    assert earlier() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert earlier() is None


def test_what_is_set_aside_is_taken_back_when_the_last_of_several_loads_ends() -> None:
    loads = Loads()
    inside, leave = threading.Event(), threading.Event()

    def load() -> None:
        with loads.one():
            inside.set()
            assert leave.wait(60)

    thread = threading.Thread(target=load)
    thread.start()
    assert inside.wait(60)
    with loads.one():
        pass
    assert loads
    assert gc.get_freeze_count() > 0
    leave.set()
    thread.join()
    assert not loads
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_load_that_fails_takes_back_what_was_set_aside(kind: type[BaseException]) -> None:
    loads = Loads()
    with pytest.raises(kind), loads.one():
        raise kind
    assert not loads
    assert gc.get_freeze_count() == 0


def test_what_other_code_has_set_aside_stays_so() -> None:
    gc.freeze()
    with Loads().one():
        pass
    assert gc.get_freeze_count() > 0


def test_a_forked_child_takes_back_what_a_load_of_its_parent_has_set_aside() -> None:
    loads = Loads()
    with loads.one():
        child = os.fork()
        if not child:
            loads.start_afresh()
            os._exit(int(gc.get_freeze_count() > 0 or bool(loads)))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert gc.get_freeze_count() > 0


PROGRAM = """
import gc
import sglang_distguard
from sglang_distguard.testing import create_model, server_args

sglang_distguard.install()
from sglang.srt.model_loader import loader

gc.unfreeze()  # tests hide SGLang's modules from collections
seen = []
load = loader.DefaultModelLoader.load_weights_and_postprocess


def watched(*args, **kwargs):
    seen.append(gc.get_freeze_count() > 0)
    return load(*args, **kwargs)


loader.DefaultModelLoader.load_weights_and_postprocess = staticmethod(watched)
runner = sglang_distguard.build_runner(server_args(create_model("gpt2", CACHE)))
assert seen == [True], seen
assert gc.get_freeze_count() == 0
"""


def test_a_runner_is_loaded_with_what_existed_before_set_aside() -> None:
    interpreters.run_well(PROGRAM, has=interpreters.Has.SGLANG)


@pytest.mark.parametrize("kind", [Loads, Imports])
def test_an_interrupt_at_any_bytecode_leaves_nothing_set_aside_and_collecting_on(
    kind: Callable[[], Overlapping],
) -> None:
    text = Overlapping.one.__wrapped__.__code__.co_filename  # type: ignore[attr-defined]
    interrupted = 0
    for place in itertools.count():
        loads, left = kind(), place

        def trace(frame: Any, event: str, _: object) -> Any:
            nonlocal left
            if frame.f_code.co_filename != text:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if left == -1:
                    raise KeyboardInterrupt
            return trace

        def load(loads: Overlapping = loads, trace: Any = trace) -> None:
            sys.settrace(trace)
            try:
                with loads.one():
                    pass
            finally:
                sys.settrace(None)

        try:
            load()
        except KeyboardInterrupt:
            interrupted += 1
        assert not loads, place
        assert gc.get_freeze_count() == 0, place
        assert gc.isenabled(), place
        if left >= 0:
            break
    assert interrupted > 30
