"""Garbage is not collected while a watched module is executed, and is afterwards, however that ends."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_distguard.patching.import_garbage import Imports
from sglang_distguard.patching.imports import Watcher

NAME = "of_test_import_garbage"


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    assert gc.isenabled()
    yield
    gc.enable()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a module that is watched and has not been imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    watcher = Watcher({NAME}, lambda _module, code, run: run(code))
    watcher.start()
    yield tmp_path / f"{NAME}.py"
    watcher.stop()
    sys.modules.pop(NAME, None)


def test_a_watched_module_is_executed_without_collections(module: Path) -> None:
    module.write_text("import gc\nwas_enabled = gc.isenabled()")
    assert importlib.import_module(NAME).was_enabled is False
    assert gc.isenabled()


def test_collecting_goes_on_after_an_import_that_fails(module: Path) -> None:
    module.write_text("raise OSError(7)")
    with pytest.raises(OSError, match="7"):
        importlib.import_module(NAME)
    assert gc.isenabled()


def test_the_last_of_several_executions_lets_collecting_go_on() -> None:
    imports = Imports()
    inside, leave = threading.Event(), threading.Event()

    def execute() -> None:
        with imports.one():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=execute)
    with imports.one(), imports.one():
        thread.start()
        inside.wait(60)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_a_process_that_does_not_collect_stays_so() -> None:
    gc.disable()
    with Imports().one():
        pass
    assert not gc.isenabled()


def test_a_forked_child_collects_though_a_thread_of_its_parent_was_importing() -> None:
    imports = Imports()
    with imports.one():
        imports.start_afresh()
        assert gc.isenabled()
    assert gc.isenabled()
