"""The installed package where torch or SGLang is missing; runs without either (`make wheel`)."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sglang_distguard
from sglang_distguard import _core
from sglang_distguard.sync.single_flight import run_once

#: The key of a scope that does not exist.
KEY = "experts:4000000000"
PACKAGE = Path(sglang_distguard.__file__).parent.parent


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m sglang_distguard`` without the packages that are installed beside it."""
    program = f"import sys, runpy; sys.path.insert(0, {str(PACKAGE)!r}); " + (
        "runpy.run_module('sglang_distguard', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_version_is_printed_without_torch_and_sglang() -> None:
    ran = _run("version")
    assert ran.returncode == 0, ran.stderr
    assert sglang_distguard.__version__ in ran.stdout


def test_status_says_that_sglang_is_missing() -> None:
    ran = _run("status")
    assert ran.returncode == 1, ran.stderr
    assert "sglang is not installed" in ran.stdout


@pytest.mark.parametrize("command", ["demo", "audit"])
def test_a_program_that_needs_sglang_names_it_and_the_remedy(command: str) -> None:
    ran = _run(command)
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert "pip install sglang==" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_registry_lets_one_of_eight_threads_lead_and_the_others_join() -> None:
    led: list[int] = []
    results: list[object] = []
    together = threading.Barrier(8)

    def build() -> None:
        together.wait()
        results.append(
            run_once(
                KEY,
                {"num_layers": 1},
                observe=lambda: id(led) if led else None,
                initialise=lambda: led.append(1) or "made",
                adopt=lambda: ("adopted", {"num_layers": 1}),
                join=lambda made: made,
                undo=led.clear,
            )
        )

    threads = [threading.Thread(target=build) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert led == [1]
    assert results == ["made"] * 8
    assert _core.forget(KEY)
