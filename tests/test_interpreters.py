"""Programs in forked children: what they find, how they end, and how they are ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreters import Forked, Has, run
from registry_calls import until


@pytest.mark.parametrize("has", [Has.THIRD_PARTY, Has.SGLANG])
def test_a_forked_program_finds_no_more_than_it_asks_for_and_ends_as_any_program(has: Has) -> None:
    done = run(
        """
        import atexit, sys

        atexit.register(print, "end")
        print(__name__, "torch" in sys.modules, "sglang.srt.runtime_context" in sys.modules)
        if "sglang" in sys.modules:
            import torch
            import sglang_distguard
            assert not sglang_distguard.is_installed()
            assert not torch.distributed.is_initialized()
        raise SystemExit(3)
        """,
        has=has,
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == f"__main__ True {has is Has.SGLANG}\nend\n"


def test_a_program_sees_the_environment_of_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATH")
    done = run("import os; print(os.environ.get('PATH'), os.environ['X'])", has=Has.SGLANG, X="1")
    assert done.stdout == "None 1\n", done.stderr


def test_a_program_that_does_not_end_is_ended_and_its_stacks_are_shown(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    program = Forked(
        f"BEGUN = {str(begun)!r}\n",
        """
        import pathlib, threading

        def waits_for_ever():
            pathlib.Path(BEGUN).touch()
            threading.Event().wait()

        waits_for_ever()
        """,
    )
    until(begun.exists)
    with pytest.raises(AssertionError, match=r"(?s)no end within 0\.1 s.*in waits_for_ever"):
        program.wait(0.1)
