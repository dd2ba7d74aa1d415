"""Engines that are open when their program ends are closed, and leave no file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from interpreters import Has, run

# Waits in these programs have 200 seconds, less than a program has: one that hangs is told.

ENGINES = """
    import os, sys, threading
    from pathlib import Path

    shared = set()  # files in shared memory that this process has opened

    def note(event, arguments):
        if event == "open" and str(arguments[0]).startswith("/dev/shm/"):
            shared.add(str(arguments[0]))

    sys.addaudithook(note)

    def tell_what_is_left():
        found = [it for it in sorted(shared) if os.path.exists(it)]
        os.write(1, f"opened {len(shared)}, left {found}\\n".encode())

    import atexit
    atexit.register(tell_what_is_left)
    from sglang_distguard.testing import create_model, prepare_environment, server_args
    prepare_environment()
    import sglang_distguard as dg
    dg.install()

    def opened(name, architecture="llama", seed=0):
        folder = create_model(architecture, Path(CACHE) / "models", seed=seed)
        return dg.Engine(server_args=server_args(folder, sleep_on_idle=True), name=name)

    GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    LONG = {**GREEDY, "max_new_tokens": 200}
    engine = opened("first")
    ask = lambda it: it.generate(input_ids=[1, 2, 3], sampling_params=GREEDY)["output_ids"]
    assert len(ask(engine)) == 4
"""


@pytest.fixture
def folder() -> Iterator[str]:
    """A folder for the sockets of a program; a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory() as made:
        yield made


def ends(folder: str, program: str) -> tuple[int, list[str], str]:
    """Run the program; return its exit code, what it printed, and its errors."""
    done = run(ENGINES, program, has=Has.SGLANG, TMPDIR=folder)
    assert [it.name for it in Path(folder).iterdir() if it.name.startswith("tmp")] == []
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_engines_that_are_left_open_are_closed_when_the_program_ends(folder: str) -> None:
    """Two that serve, one that has failed, and one whose request is pending in a thread that is joined."""
    code, printed, errors = ends(
        folder,
        """
        failed = opened("failed")

        def breaks(*_):
            raise ValueError("planted")

        failed._begun[0].manager.run_batch = breaks
        try:
            ask(failed)
        except dg.EngineFailed:
            print("failed")

        def wait_for_the_rest():
            try:
                for _ in busy.generate(input_ids=[1, 2], sampling_params=LONG, stream=True):
                    begun.set()
            except dg.EngineClosed as error:
                os.write(1, b"EngineClosed\\n")

        from serving_programs import slow_down
        begun, busy = threading.Event(), opened("busy", "gpt2")
        slow_down(busy)  # so that its request is pending at the end
        threading.Thread(target=wait_for_the_rest).start()
        assert begun.wait(200)
        """,
    )
    assert (code, printed) == (0, ["failed", "EngineClosed", "opened 3, left []"]), errors
    assert "not closed at exit" not in errors


def test_the_exit_code_of_a_program_that_leaves_an_engine_open_is_its_own(folder: str) -> None:
    code, printed, errors = ends(folder, "raise KeyError('planted')")
    assert (code, printed) == (1, ["opened 1, left []"])
    assert "KeyError: 'planted'" in errors
    code, printed, errors = ends(folder, "sys.exit(7)")
    assert (code, printed) == (7, ["opened 1, left []"]), errors


def test_an_engine_that_still_starts_does_not_keep_the_program(folder: str) -> None:
    code, printed, errors = ends(
        folder,
        """
        from sglang.srt.managers import scheduler
        loading = threading.Event()

        def load_for_ever(*_):
            loading.set()
            threading.Event().wait()

        scheduler.Scheduler.init_model_worker = load_for_ever
        threading.Thread(target=opened, args=("starting", "gpt2"), daemon=True).start()
        assert loading.wait(200)
        """,
    )
    assert code == 0, errors
    assert printed[-1].endswith("left []")


def test_a_forked_child_that_ends_leaves_its_parents_engine_open(folder: str) -> None:
    code, printed, errors = ends(
        folder,
        """
        child = os.fork()
        if child == 0:
            atexit.unregister(tell_what_is_left)
            sys.exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        print(len(ask(engine)))
        """,
    )
    assert (code, printed) == (0, ["4", "opened 1, left []"]), errors
