"""Runs the slow checks of `make verify` one after the other and prints what each one counted.

    .venv/bin/python verify/verify.py [STEP …]

The output of each step is kept in target/verify/. The summary goes into docs/VERIFICATION.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "target" / "verify"
PYTEST = (sys.executable, "-m", "pytest", "-q", "-s")


@dataclass(frozen=True)
class Step:
    """One check.

    Attributes:
        name: as given on the command line.
        claim: what it shows, for the summary.
        command: run in the repository's root.
        counts: lines of its output that the summary shows, as a regular expression.
        environment: extra variables, added to those of this process.
    """

    name: str
    claim: str
    command: Sequence[str]
    counts: str
    environment: Mapping[str, str] = field(default_factory=dict)


_RUST = r"^test result: .*|^counted: .*"
_PYTHON = r"^\d+ passed.*|^counted: .*|^200 cycles.*"

_FAULTS = ("waiting", "deadlock", "fork", "exit", "teardown")

STEPS = (
    Step(
        "loom",
        "every interleaving of 2-3 threads: slots, phases, wait-for graph",
        ("make", "loom"),
        _RUST,
    ),
    Step(
        "shuttle",
        "100,000 random schedules of registry, leases and phases together",
        ("make", "shuttle"),
        _RUST,
        {"DISTGUARD_SCHEDULES": "100000"},
    ),
    Step(
        "proptest",
        "10,000 random call sequences against the sequential model",
        ("cargo", "test", "-q", "--release", "-p", "distguard-core", "--test", "model_registry"),
        _RUST,
        {"PROPTEST_CASES": "10000"},
    ),
    Step(
        "mutations",
        "planted bugs that the three find",
        (sys.executable, "verify/mutations.py"),
        r".*caught by.*|.*SURVIVED.*|.*NOT TESTED.*|^\d+ .*",
    ),
    Step(
        "input",
        "10,000 random settings through every public function",
        (
            *PYTEST,
            "tests/test_good_input.py",
            "tests/test_bad_input.py",
            "tests/test_bad_native_input.py",
        ),
        _PYTHON,
        {"DISTGUARD_EXAMPLES": "400"},
    ),
    Step(
        "operators",
        "the default dtype over torch's operator tables, also in float16 and float64",
        (*PYTEST, "-m", "slow", "tests/test_default_dtype_operators.py"),
        _PYTHON,
    ),
    Step(
        "cycles",
        "200 times two runners built, used, closed, all torn down",
        (*PYTEST, "-m", "slow", "tests/test_leaks.py"),
        _PYTHON,
    ),
    Step(
        "faults",
        "fork, exit, interrupt, deadlock and teardown, three times in a row",
        (
            *PYTEST,
            "--keep-duplicates",
            *[f"tests/test_{name}.py" for name in _FAULTS * 3],
        ),
        _PYTHON,
    ),
    Step(
        "interrupt",
        "how long after Ctrl-C a wait ends",
        (sys.executable, "benchmarks/interrupt_latency.py"),
        r"^(key|phase|threading|milliseconds).*",
    ),
)


def run(step: Step) -> tuple[bool, float, list[str]]:
    """Run a step; return whether it passed, its seconds, and the lines that its summary shows."""
    LOGS.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    with (LOGS / f"{step.name}.log").open("w+") as log:
        status = subprocess.run(
            step.command,
            cwd=ROOT,
            env={**os.environ, **step.environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
        log.seek(0)
        counted = [line.strip() for line in log if re.match(step.counts, line)]
    return status == 0, time.perf_counter() - begun, counted


def main() -> int:
    """Run the steps named on the command line, or all; return 1 if any failed."""
    chosen = [step for step in STEPS if step.name in sys.argv[1:]] or list(STEPS)
    unknown = set(sys.argv[1:]) - {step.name for step in STEPS}
    if unknown:
        known = ", ".join(step.name for step in STEPS)
        print(f"unknown step {', '.join(sorted(unknown))}; known: {known}", file=sys.stderr)
        return 2
    failed, total = [], time.perf_counter()
    with tqdm(chosen, unit="check", disable=None) as bar:
        for step in bar:
            bar.set_description(step.name)
            passed, seconds, counted = run(step)
            if not passed:
                failed.append(step.name)
            word = "passed" if passed else f"FAILED, see target/verify/{step.name}.log"
            tqdm.write(f"{step.name}: {step.claim}: {word}, {seconds:.0f} s")
            for line in counted:
                tqdm.write(f"  {line}")
    minutes = (time.perf_counter() - total) / 60
    print(f"{len(chosen) - len(failed)} of {len(chosen)} checks passed in {minutes:.0f} min")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
