"""Run the concurrent tests and the audit with another release of SGLang, in an environment of its own.

.venv/bin/python verify/compat.py sglang==0.5.22 [--keep]

The environment is made in .compat/ and removed afterwards. uv links most of it from its cache. With
``--keep`` it stays, and the next run of that release with ``--keep`` puts only the package of this
checkout into it anew. The release is compared with its ledger; if it has none, one is written, to be
judged line by line.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".compat"
#: Names the release whose environment is whole.
MADE = FOLDER / "made"
TOOLS = ("pytest>=8.3", "pytest-timeout>=2.3")
#: Eight runners built and run at once, and that this notices when a treatment is switched off;
#: engines, managers and schedulers; models of images and sounds; globals without a treatment.
_FILES = (
    "concurrent_runners",
    "without_a_treatment",
    "engines",
    "pool",
    "managers",
    "schedulers",
    "process_settings_of_engines",
    "images_and_sounds",
    "unmanaged_globals",
)
TESTS = tuple(f"tests/test_{name}.py" for name in _FILES)


def main(arguments: Sequence[str]) -> int:
    """Return 0 if the tests passed and the audit agrees with the ledger, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("requirement", help="one release, such as sglang==0.5.22")
    parser.add_argument("--keep", action="store_true", help="keep the environment (10 GB)")
    chosen = parser.parse_args(arguments)
    name, _, release = chosen.requirement.partition("==")
    if name != "sglang" or not release:
        parser.error(f"name one release, such as sglang==0.5.22, not {chosen.requirement}")
    if not (chosen.keep and MADE.is_file() and MADE.read_text() == chosen.requirement):
        shutil.rmtree(FOLDER, ignore_errors=True)
    try:
        python = _environment(chosen.requirement)
        tests = _run(python, "-m", "pytest", "-q", *TESTS)
        audit = _run(python, "-m", "sglang_distguard", "audit", *_ledger(release))
    finally:
        if not chosen.keep:
            shutil.rmtree(FOLDER, ignore_errors=True)
    print(f"{chosen.requirement}: tests {_said(tests)}, audit {_said(audit)}")
    return int(bool(tests or audit))


def _environment(requirement: str) -> str:
    """Make the environment with the release and with a wheel of this checkout; return its Python."""
    print(f"compat: environment with {requirement} in {FOLDER.name}/", flush=True)
    own, uv = Path(sys.executable), str(Path(sys.executable).with_name("uv"))
    wheels = FOLDER / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    maturin = [str(own.with_name("maturin")), "build", "--release", "-q", "-i", str(own)]
    subprocess.run([*maturin, "-o", str(wheels)], cwd=ROOT, check=True)
    python = str(FOLDER / "env" / "bin" / "python")
    install = [uv, "pip", "install", "-q", "--python", python]
    overrides = ["--overrides", str(ROOT / "verify" / "overrides.txt")]
    if not MADE.is_file():
        subprocess.run([uv, "venv", "-q", "--python", str(own), str(FOLDER / "env")], check=True)
        subprocess.run([*install, *overrides, requirement, *TOOLS], check=True)
        MADE.write_text(requirement)
    again = ["--reinstall", "--no-deps"]  # the version of the package is that of the last checkout
    subprocess.run([*install, *again, *map(str, wheels.glob("*.whl"))], check=True)
    return python


def _ledger(release: str) -> list[str]:
    file = ROOT / "ledger" / f"{release}.csv"
    return ["--ledger", str(file), *([] if file.is_file() else ["--update"])]


def _run(*command: str) -> int:
    environment = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def _said(status: int) -> str:
    return "ok" if status == 0 else f"failed (status {status})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
