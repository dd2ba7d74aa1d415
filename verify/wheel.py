"""Builds the wheel for each Python that this machine has, and tests it in a clean environment.

    .venv/bin/python verify/wheel.py [VERSION …]

The environments have no torch, no SGLang, no Rust and no source of this package, so that tests
import the wheel. Wheels and the source distribution stay in target/wheels/; it must contain what the
Makefile needs. The exit status is 1 when it does not, or when a step of any Python fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "target" / "wheels"
VERSIONS = ("3.11", "3.12", "3.13")
BIN = Path(sys.executable).parent
#: Tests that need neither torch nor SGLang.
TESTS = ("test_rewrite.py", "test_names.py", "test_code_cache.py", "test_wheel.py")
#: What these and the fixtures of every session import of the folder of tests.
HELPERS = ("conftest.py", "fork_server.py", "interpreters.py", "rewritten_modules.py")
#: What tools of the Makefile's targets read although it does not name it.
UNNAMED = ("Cargo.lock", "LICENSE", "clippy.toml", "pyproject.toml", "rust/core/mutations.toml")
#: What is made in a checkout, and so is not in the source distribution; so are folders with a dot.
MADE = ("target",)


def find_python(version: str) -> Path | None:
    """A working interpreter of ``version``, on the path or managed by uv; None if there is none."""
    found = shutil.which(f"python{version}")
    asked = subprocess.run(
        [str(BIN / "uv"), "python", "find", version], capture_output=True, text=True, check=False
    )
    for candidate in (found, asked.stdout.strip()):
        if not candidate:
            continue
        runs = subprocess.run([candidate, "-c", ""], capture_output=True, check=False)
        if runs.returncode == 0:
            return Path(candidate)
    return None


def _run(command: Sequence[str | Path], cwd: Path = ROOT) -> str:
    left_out = ("VIRTUAL_ENV", "PYTHONPATH")
    environment = {name: it for name, it in os.environ.items() if name not in left_out}
    environment["CARGO_TARGET_DIR"] = str(ROOT / "target" / "wheel")
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode != 0:
        raise SystemExit(
            f"failed: {' '.join(map(str, command))}\n{ran.stdout[-4000:]}{ran.stderr[-4000:]}"
        )
    return ran.stdout


def build_source() -> Path:
    """Build the source distribution."""
    with tempfile.TemporaryDirectory() as folder:
        _run([BIN / "maturin", "sdist", "-o", folder])
        (archive,) = Path(folder).iterdir()
        return Path(shutil.copy(archive, WHEELS))


def missing(archive: Path) -> list[str]:
    """Return what the Makefile's targets need of the checkout, and ``archive`` does not contain."""
    words = re.findall(r"[\w.][\w./-]*", (ROOT / "Makefile").read_text())
    named = {Path(word.rstrip(".")) for word in words} | {Path(name) for name in UNNAMED}
    with tarfile.open(archive) as opened:
        members = [Path(*Path(name).parts[1:]) for name in opened.getnames()]
    contained = {folder for member in members for folder in (member, *member.parents)}
    return sorted(
        str(path)
        for path in named - contained
        if (ROOT / path).exists() and path.parts[0] not in MADE and path.parts[0][0] != "."
    )


def build(python: Path, archive: Path) -> Path:
    """Build the wheel for ``python`` from the source distribution only, as pip does."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(archive, folder)
        source = Path(folder) / archive.name.removesuffix(".tar.gz")
        for file in source.rglob("*.rs"):
            file.touch()  # the archive's times are old: cargo would take an earlier build for this
        _run([BIN / "maturin", "build", "--release", "-i", python, "-o", folder], source)
        (wheel,) = Path(folder).glob("*.whl")
        return Path(shutil.copy(wheel, WHEELS))


def test(python: Path, wheel: Path) -> str:
    """Test ``wheel`` in its own environment; return the summary of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        _run([python, "-m", "venv", environment])
        _run(
            [
                BIN / "uv",
                "pip",
                "install",
                "-q",
                "--python",
                environment,
                wheel,
                "pytest",
                "pytest-timeout",
            ]
        )
        tests = Path(folder) / "tests"
        tests.mkdir()
        for name in (*HELPERS, *TESTS):
            shutil.copy(ROOT / "tests" / name, tests)
        shutil.copy(ROOT / "pyproject.toml", folder)
        said = _run([environment / "bin" / "python", "-m", "pytest", "-q", tests], Path(folder))
        return said.strip().splitlines()[-1]


def main(versions: Sequence[str]) -> int:
    """Build and test for each version; print one line for each."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    archive = build_source()
    if left_out := missing(archive):
        raise SystemExit(f"{archive.name} does not contain {', '.join(left_out)}")
    tested = 0
    for version in tqdm(versions, desc="wheels", unit="Python", disable=None):
        python = find_python(version)
        if python is None:
            tqdm.write(f"Python {version}: not on this machine, not tested")
            continue
        wheel = build(python, archive)
        tqdm.write(f"Python {version}: {wheel.name}: {test(python, wheel)}")
        tested += 1
    return 0 if tested else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or VERSIONS))
