"""Values cached between processes: whole, matching and in a private folder, or made anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sglang_distguard.patching import code_cache


@pytest.fixture(autouse=True)
def folder(code_cache_folder: Path) -> Path:
    return code_cache_folder


def test_a_value_is_made_once_for_what_it_is_made_from() -> None:
    made: list[int] = []

    def make() -> list[int]:
        made.append(len(made))
        return [len(made)]

    assert code_cache.kept(("text", 1), make) == [1]
    assert code_cache.kept(("text", 1), make) == [1]
    assert code_cache.kept(("another text", 1), make) == [2]
    assert len(made) == 2


@pytest.mark.parametrize("damage", [b"", b"short", b"\x00" * 100])
def test_a_damaged_file_is_made_anew(folder: Path, damage: bytes) -> None:
    assert code_cache.kept(("text",), lambda: "first") == "first"
    (file,) = folder.iterdir()
    file.write_bytes(damage)
    assert code_cache.kept(("text",), lambda: "second") == "second"
    assert code_cache.kept(("text",), lambda: "third") == "second"


@pytest.mark.parametrize("setting", ["0", ""])
def test_nothing_is_kept_when_it_is_switched_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv(code_cache.VARIABLE, setting)
    code_cache._folder.cache_clear()
    assert code_cache.kept(("text",), lambda: 1) == 1
    assert code_cache.kept(("text",), lambda: 2) == 2
    assert not folder.exists()


def test_a_folder_that_others_may_write_to_is_not_used(folder: Path) -> None:
    folder.mkdir()
    os.chmod(folder, 0o777)
    assert code_cache.kept(("text",), lambda: 1) == 1
    assert list(folder.iterdir()) == []


def test_two_processes_that_write_at_once_leave_a_whole_file(folder: Path) -> None:
    program = (
        "from sglang_distguard.patching import code_cache\n"
        "for round in range(200):\n"
        "    value = code_cache.kept(('text', round % 3), lambda: list(range(2000)))\n"
        "    assert value == list(range(2000))\n"
        "    for file in list(code_cache._folder().iterdir()):\n"
        "        file.unlink(missing_ok=True)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [it.wait() for it in processes] == [0, 0]


def test_installing_with_what_is_kept_gives_the_same_code(folder: Path) -> None:
    from sglang_distguard.patching import find_source
    from sglang_distguard.patching.rewrite import rewrite

    source = find_source("sglang.srt.runtime_context")
    if source is None:
        pytest.skip("sglang is not installed: `make wheel`")
    names = frozenset({"_CONTEXT", "_PARALLEL"})
    rewrite.cache_clear()
    first = rewrite(source, names)
    rewrite.cache_clear()
    second = rewrite(source, names)
    assert len(list(folder.iterdir())) == 1
    assert first.replaced == second.replaced
    assert first.initials == second.initials
    assert first is not second
