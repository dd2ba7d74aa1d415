"""The interpreter exits at once and without output, whatever threads and runners are left."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from interpreters import Has, run

# Waits in these programs have 300 seconds, more than a program: one that waits to the end fails.

WAITING = """
    import sys, threading
    import sglang_distguard
    from registry_calls import acquire, until, state_of
    from sglang_distguard import _core
    from sglang_distguard.sync.phases import in_phase

    claim = acquire("groups:never")
    captor = _core.Visit("capture", runner=None)

    def wait_for_key():
        acquire("groups:never", timeout=300)

    def wait_for_phase():
        with sglang_distguard.runner_scope(timeout=300), in_phase("forward"):
            pass

    works = [wait_for_key, wait_for_phase] * 4

    def all_wait():
        in_line = [visit for visit in _core.snapshot()["phases"] if not visit["inside"]]
        return state_of("groups:never")["waiters"] == 4 and len(in_line) == 4
"""

RUNNERS = """
    import threading
    from pathlib import Path
    from sglang_distguard.testing import prepare_environment, create_model, server_args, generate
    prepare_environment()
    import sglang_distguard
    sglang_distguard.install()
    build = lambda name: sglang_distguard.build_runner(
        server_args(create_model("gpt2", Path(CACHE) / "models")), name=name)
    runners = [build("default scope"), build("own scope")]
"""


@pytest.mark.parametrize("attempt", range(5))
def test_daemon_threads_that_wait_are_left_where_they_are(attempt: int) -> None:
    result = run(
        WAITING,
        """
            for work in works:
                threading.Thread(target=work, daemon=True).start()
            until(all_wait)
            """,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_threads_that_the_interpreter_waits_for_are_told_and_end() -> None:
    result = run(
        WAITING,
        """
            for work in works:
                threading.Thread(target=work).start()
            until(all_wait)
            """,
    )
    assert result.returncode == 0
    assert result.stderr.count("stopped waiting for groups:never: the interpreter is exiting") == 4
    assert result.stderr.count("stopped waiting for phase:forward: the interpreter is exiting") == 4
    assert "Exception ignored" not in result.stderr


def test_tasks_of_executors_that_wait_are_told_and_end() -> None:
    result = run(
        WAITING,
        """
            from concurrent.futures import ThreadPoolExecutor
            pool = ThreadPoolExecutor(len(works))
            tasks = [pool.submit(work) for work in works]
            until(all_wait)
            """,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_control_c_ends_a_process_that_waits() -> None:
    result = run(
        WAITING,
        """
            import os, signal
            # A shell that starts a process in the background makes it ignore SIGINT.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            def interrupt():
                until(lambda: state_of("groups:never")["waiters"] == 1)
                os.kill(os.getpid(), signal.SIGINT)
            claim.fail("led by another thread")
            leads = threading.Event()
            def lead():
                global other
                other = acquire("groups:never")
                leads.set()
                threading.Event().wait()
            threading.Thread(target=lead, daemon=True).start()
            leads.wait()
            threading.Thread(target=interrupt).start()
            acquire("groups:never", timeout=300)
            """,
    )
    assert result.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in result.stderr


def test_runners_that_were_never_closed_exit_without_output(cache: Path) -> None:
    result = run(RUNNERS, "print('built', len(runners))\n", has=Has.SGLANG)
    assert (result.returncode, result.stdout) == (0, "built 2\n"), result.stderr
    assert own_messages(result.stderr) == []


def test_daemon_threads_in_the_middle_of_forwards_do_not_crash_the_exit(cache: Path) -> None:
    """Without `begin_exit` torch aborts ("terminate called …"), four times of four (3.11, 2.14.1)."""
    result = run(
        RUNNERS,
        """
            rounds = threading.Barrier(3)
            def forward_for_ever(runner):
                first = True
                while True:
                    generate(runner, activate=sglang_distguard.activate)
                    if first:
                        rounds.wait()
                        first = False
            for runner in runners:
                threading.Thread(target=forward_for_ever, args=(runner,), daemon=True).start()
            rounds.wait()
            print("forwarding")
            """,
        has=Has.SGLANG,
    )
    assert (result.returncode, result.stdout) == (0, "forwarding\n"), result.stderr
    assert own_messages(result.stderr) == []


def own_messages(stderr: str) -> list[str]:
    """The lines on stderr, without SGLang's progress bars and torch's warnings."""
    noise = ("Multi-thread loading shards", "Warning", "warn(", "[W")
    lines = (line.strip() for line in stderr.replace("\r", "\n").splitlines())
    return [line for line in lines if line and not any(word in line for word in noise)]


def test_a_subinterpreter_is_refused_with_the_reason() -> None:
    result = run("""
        import faulthandler
        faulthandler.dump_traceback_later(60, exit=True)
        try:
            import _xxsubinterpreters as interpreters
            made = interpreters.create(isolated=False)
        except ImportError:
            import _interpreters as interpreters
            made = interpreters.create("legacy")
        try:
            failed = interpreters.run_string(made, "import sglang_distguard")
        except interpreters.RunFailedError as error:
            failed = error
        print(failed)
        import sglang_distguard  # the main interpreter still can
        """)
    assert result.returncode == 0, result.stderr
    assert "SubinterpreterError" in result.stdout
    assert "Import it in the main interpreter" in result.stdout


def test_an_activate_that_idles_does_not_delay_the_exit() -> None:
    done = run(
        RUNNERS,
        """
        from sglang_distguard import _core
        inside = threading.Event()

        def idle():
            with sglang_distguard.activate(runners[1]):
                inside.set()
                threading.Event().wait()

        threading.Thread(target=idle, daemon=True).start()
        inside.wait()
        print("still inside of a step:", _core.begin_exit(60.0))
        """,
        has=Has.SGLANG,
    )
    assert done.returncode == 0, done.stderr
    assert "still inside of a step: 0" in done.stdout
