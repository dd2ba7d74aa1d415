"""Run the concurrent tests and the audit with another release of SGLang, in an environment of its own.

.venv/bin/python verify/compat.py sglang==0.5.22

The environment is made in .compat/ and removed afterwards. uv links most of it from its cache. The
release is compared with its ledger; if it has none, one is written, to be judged line by line.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".compat"
TOOLS = ("pytest>=8.3", "pytest-timeout>=2.3")
#: Eight runners built and run at once; and that this notices when a treatment is switched off.
TESTS = ("tests/test_concurrent_runners.py", "tests/test_without_a_treatment.py")


def main(requirement: str) -> int:
    """Return 0 if the tests passed and the audit agrees with the ledger, else 1."""
    name, _, release = requirement.partition("==")
    if name != "sglang" or not release:
        print(
            f"error: name one release, such as sglang==0.5.22, not {requirement}", file=sys.stderr
        )
        return 2
    shutil.rmtree(FOLDER, ignore_errors=True)
    try:
        python = _environment(requirement)
        tests = _run(python, "-m", "pytest", "-q", *TESTS)
        audit = _run(python, "-m", "sglang_distguard", "audit", *_ledger(release))
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
    print(f"{requirement}: tests {_said(tests)}, audit {_said(audit)}")
    return int(bool(tests or audit))


def _environment(requirement: str) -> str:
    """Make the environment with the release and with a wheel of this checkout; return its Python."""
    print(f"compat: environment with {requirement} in {FOLDER.name}/", flush=True)
    own, uv = Path(sys.executable), str(Path(sys.executable).with_name("uv"))
    wheels = FOLDER / "wheels"
    maturin = [str(own.with_name("maturin")), "build", "--release", "-q", "-i", str(own)]
    subprocess.run([*maturin, "-o", str(wheels)], cwd=ROOT, check=True)
    subprocess.run([uv, "venv", "-q", "--python", str(own), str(FOLDER / "env")], check=True)
    python = str(FOLDER / "env" / "bin" / "python")
    install = [uv, "pip", "install", "-q", "--python", python]
    overrides = ["--overrides", str(ROOT / "verify" / "overrides.txt")]
    given = [requirement, *TOOLS, *map(str, wheels.glob("*.whl"))]
    subprocess.run([*install, *overrides, *given], check=True)
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
    sys.exit(main(sys.argv[1]))
