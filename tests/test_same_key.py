"""Runners that agree in every key and differ in content: each is right, and a wrong memory is found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.exhaustive

#: Lets `same_key` write its results, and no document, in a folder of the test's own: the tests may
#: run at the same time, and the document is that of the whole sweep.
BEGIN = """
import dataclasses, functools, sys
from pathlib import Path
sys.path.insert(0, "verify")
import same_key

folder = Path(sys.argv.pop(1))
same_key.FOLDERS = dataclasses.replace(same_key.FOLDERS, work=folder)
same_key.DOCUMENT = folder / "document"
"""
#: A memory of checkpoints by the names of their files, as plain as SGLang's own are.
REMEMBERED = """
prepared = same_key.prepare

def prepare():
    prepared()
    from sglang.srt.model_loader import loader

    read = loader.safetensors_weights_iterator

    @functools.cache
    def remembered(files):
        return [(name, weight.clone()) for name, weight in read(list(files))]

    loader.safetensors_weights_iterator = lambda files, *_, **__: iter(remembered(tuple(files)))
    loader.buffered_multi_thread_safetensors_weights_iterator = loader.safetensors_weights_iterator

same_key.prepare = prepare
"""
END = "sys.exit(same_key.main())"


def run(folder: Path, *names: str, planted: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BEGIN + planted + END, str(folder), "--only", *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)


def rows(output: str) -> dict[str, list[str]]:
    """Architecture -> cells: weights, config.json, override, reopened, note."""
    found = re.findall(r"^(\w+): (.*\|.*)$", output, re.M)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in found}


def test_runners_of_one_key_and_different_content_are_each_right(tmp_path: Path) -> None:
    names = ["llama", "qwen3_moe", "bert"]
    ran = run(tmp_path, *names)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    found = rows(ran.stdout)
    assert {name: cells[:-1] for name, cells in found.items()} == {
        name: ["bit-equal"] * 4 for name in names
    }


def test_a_memory_that_is_keyed_by_a_path_is_found(tmp_path: Path) -> None:
    ran = run(tmp_path, "llama", planted=REMEMBERED)
    assert ran.returncode == 1, ran.stdout + ran.stderr[-4000:]
    cells = rows(ran.stdout)["llama"]
    assert cells[0] == "OTHER BITS"
    assert "weights: second has those of first" in cells[-1]
