"""`make probe`: what it says about the wheel of another SGLang, which it does not install."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from sglang_distguard.hooks import generation_0_5_21, releases
from sglang_distguard.hooks.process_globals import TREATMENTS
from sglang_distguard.hooks.requirements import REQUIRED
from sglang_distguard.patching import find_source

PROBE = Path(__file__).parent.parent / "verify" / "probe.py"
RELEASE = "99.0"
ROPE = "sglang.srt.layers.rotary_embedding.factory"
ENVIRON = "sglang.srt.environ"
WEIGHTS = "sglang.srt.model_loader.weight_utils"
BOOTSTRAP = "sglang.srt.distributed.bootstrap"


def wheel(folder: Path, changed: Mapping[str, str], release: str = RELEASE) -> None:
    """Write a wheel of SGLang: all modules that the guard is about, some with another text."""
    modules = {it.module for it in (*REQUIRED, *generation_0_5_21.changes(), *TREATMENTS)}
    texts = {module: source.text for module in modules if (source := find_source(module))}
    about = f"sglang-{release}.dist-info"
    folder.mkdir()
    with zipfile.ZipFile(folder / f"sglang-{release}-py3-none-any.whl", "w") as archive:
        for module, text in {**texts, **changed}.items():
            if module.startswith("sglang."):
                is_package = any(it.startswith(f"{module}.") for it in modules)
                path = module.replace(".", "/") + ("/__init__.py" if is_package else ".py")
                archive.writestr(path, text)
        archive.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: sglang\nVersion: {release}\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")


def probe(index: Path, *arguments: str) -> tuple[int, str]:
    """Run the probe with a folder of wheels as its package index; return status and output."""
    done = subprocess.run(
        [sys.executable, str(PROBE), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": "/dev/null"},
    )
    return done.returncode, done.stdout + done.stderr


def text_of(module: str) -> str:
    source = find_source(module)
    assert source is not None
    return source.text


def test_of_a_release_like_this_one_nothing_is_said_but_its_new_globals(tmp_path: Path) -> None:
    added = "\ndef written():\n    global _just_added\n    _just_added = 1\n"
    wheel(tmp_path / "index", {ENVIRON: text_of(ENVIRON) + added})
    status, said = probe(tmp_path / "index", f"sglang=={RELEASE}")
    assert status == 0, said
    (first, *others) = said.splitlines()
    assert first.startswith(f"sglang {RELEASE}: ")
    assert others == [f"  new globals: 1 since {releases.SUPPORTED[-1]}: {ENVIRON}._just_added"]


def test_what_is_missing_moved_lost_or_refused_is_told(tmp_path: Path) -> None:
    changed = {
        ROPE: text_of(ROPE).replace("_ROPE_DICT", "_RENAMED"),
        "sglang.srt.layers.elsewhere": "_ROPE_DICT = {}\n\ndef init_parallel_runtime(): pass\n",
        BOOTSTRAP: text_of(BOOTSTRAP).replace("init_parallel_runtime", "begin_parallel_runtime"),
        WEIGHTS: text_of(WEIGHTS) + "\n_PREFETCH_BLOCK_SIZE = 1\n",
    }
    wheel(tmp_path / "index", changed)
    status, said = probe(tmp_path / "index", f"sglang=={RELEASE}")
    assert status == 1, said
    lines = [line.strip() for line in said.splitlines()]
    elsewhere = "moved to sglang.srt.layers.elsewhere"
    (missing,) = [line for line in lines if line.startswith("missing: ")]
    assert missing.startswith(f"missing: {BOOTSTRAP}.init_parallel_runtime (")
    assert missing.endswith(elsewhere)
    assert [line for line in lines if line.startswith("lost: ")] == [
        f"lost: {ROPE}._ROPE_DICT; {elsewhere}"
    ]
    (refused,) = [line for line in lines if line.startswith("refused: ")]
    assert f"{WEIGHTS}._PREFETCH_BLOCK_SIZE is assigned 2 times" in refused


def test_names_of_other_libraries_are_not_looked_up_in_this_environment(tmp_path: Path) -> None:
    wheel(tmp_path / "index", {}, "0.5.21")  # with the text of the installed SGLang
    _, said = probe(tmp_path / "index", "sglang==0.5.21")
    assert "wrong: sglang.srt.runtime_context.use_context is here" in said
    assert "transformers" not in said


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (("--newest", "3"), 0, "SKIPPED, no package index answers"),
        (("sglang==98.0",), 2, "error: "),
    ],
)
def test_without_an_index_the_newest_are_skipped_and_a_named_release_is_an_error(
    tmp_path: Path, arguments: tuple[str, ...], status: int, told: str
) -> None:
    (tmp_path / "index").mkdir()
    ended, said = probe(tmp_path / "index", *arguments)
    assert ended == status, said
    assert told in said
