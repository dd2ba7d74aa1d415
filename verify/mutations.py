"""Plants the bugs of rust/core/mutations.toml one at a time; the checkers must find each.

    .venv/bin/python verify/mutations.py [--checker CHECKER] [--only NAME] [--short]

Each checker works on a copy of its own in target/mutants, with a target folder beside it, so that
only the core crate is rebuilt. No other build may use these folders: cargo tells two checkouts of a
workspace apart by the times of their files only, and would take a planted bug's library for its own.
With --short, what passes without a bug is the checker as CI runs it, not the smaller one that is
used for each bug. The exit status is 1 when a bug survives or cannot be planted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = ROOT / "target" / "mutants"
COPIED = ("Cargo.toml", "Cargo.lock", "rust")
#: Seconds for one program; none takes a tenth of them.
LIMIT_S = 600


class SetupError(Exception):
    """A mutation could not be tested: it does not fit, does not compile, or hangs."""


@dataclass(frozen=True)
class Checker:
    """One way to look for bugs.

    Attributes:
        name: as in mutations.toml.
        targets: which tests cargo builds.
        environment: extra variables while building and running.
        limits: extra variables that make it small enough for many bugs.
        is_model_checker: whether --short runs it.
    """

    name: str
    targets: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    is_model_checker: bool = True

    @property
    def copy(self) -> Path:
        """The copy of the sources that it is built from."""
        return MUTANTS / self.name / "src"


CHECKERS = (
    Checker(
        "loom",
        ("--test", "loom"),
        {"RUSTFLAGS": "--cfg loom", "DISTGUARD_SHORT": "1"},
        {"LOOM_MAX_PREEMPTIONS": "2"},
    ),
    Checker(
        "shuttle",
        ("--test", "shuttle"),
        {"RUSTFLAGS": "--cfg shuttle"},
        {"DISTGUARD_SCHEDULES": "4000", "SHUTTLE_RANDOM_SEED": "1"},
    ),
    # A failing case is not shrunk, because only the failure counts.
    Checker(
        "proptest",
        ("--test", "model_registry", "--test", "agreement"),
        limits={"PROPTEST_CASES": "500", "PROPTEST_MAX_SHRINK_ITERS": "0"},
        is_model_checker=False,
    ),
)


@dataclass(frozen=True)
class Mutation:
    """One planted bug; see mutations.toml."""

    name: str
    why: str
    file: str
    find: str
    replace: str
    caught_by: Sequence[str]
    missed_by: Sequence[str] = ()

    def check(self) -> None:
        """Raise SetupError unless the text occurs exactly once and the checkers are known."""
        found = (ROOT / self.file).read_text().count(self.find)
        if found != 1:
            raise SetupError(f"{self.name}: its text occurs {found} times in {self.file}, not once")
        unknown = {*self.caught_by, *self.missed_by} - {checker.name for checker in CHECKERS}
        if unknown or not self.caught_by:
            raise SetupError(f"{self.name}: unknown or no checkers {sorted(unknown)}")


@dataclass(frozen=True)
class Verdict:
    """The result of a checker.

    Attributes:
        failed: the first test that failed; None when all passed.
        seconds: duration, without building.
    """

    failed: str | None
    seconds: float


def read_mutations() -> list[Mutation]:
    """Read and check mutations.toml."""
    text = (ROOT / "rust" / "core" / "mutations.toml").read_text()
    mutations = [Mutation(**entry) for entry in tomllib.loads(text)["mutation"]]
    for mutation in mutations:
        mutation.check()
    return mutations


def copy_sources(copy: Path) -> None:
    """Update a copy; equal files keep their times, so that cargo does not rebuild them."""
    wanted: set[Path] = set()
    for name in COPIED:
        top = ROOT / name
        for source in [top] if top.is_file() else sorted(top.rglob("*")):
            if source.is_dir():
                continue
            target = copy / source.relative_to(ROOT)
            wanted.add(target)
            if not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    for path in copy.rglob("*"):
        if path.is_file() and path not in wanted:
            path.unlink()


@contextmanager
def planted(mutation: Mutation | None, copy: Path) -> Iterator[None]:
    """Plant the mutation in a copy for the duration of the with block."""
    if mutation is None:
        yield
        return
    path = copy / mutation.file
    before = path.read_text()
    path.write_text(before.replace(mutation.find, mutation.replace))
    try:
        yield
    finally:
        path.write_text(before)


def build(checker: Checker, environment: Mapping[str, str]) -> list[Path]:
    """Build the checker's tests in the copy and return the programs; SetupError if that fails."""
    command = ["cargo", "test", "-q", "--profile", "checkers", "--locked", "--no-run"]
    command += ["-p", "distguard-core", "--message-format=json"]
    command += ["--target-dir", str(MUTANTS / checker.name / "target")]
    built = subprocess.run(
        [*command, *checker.targets],
        cwd=checker.copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    messages = [json.loads(line) for line in built.stdout.splitlines() if line.startswith("{")]
    if built.returncode != 0:
        rendered = [
            it["message"]["rendered"] for it in messages if it["reason"] == "compiler-message"
        ]
        raise SetupError("does not compile:\n" + "".join(rendered) + built.stderr)
    programs = [it.get("executable") for it in messages if it["reason"] == "compiler-artifact"]
    return [Path(it) for it in programs if it]


def first_failure(program: Path, environment: Mapping[str, str]) -> str | None:
    """Run a test program to its first failure; return that test's name. SetupError if it hangs."""
    process = subprocess.Popen(
        [str(program), "--test-threads=1"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    hung: list[bool] = []

    def stop() -> None:
        hung.append(True)
        os.killpg(process.pid, signal.SIGKILL)

    timer = Timer(LIMIT_S, stop)
    timer.start()
    running = "?"
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if begun := re.match(r"test (\S+)(?: - should panic)? \.\.\. ?", line):
                running = begun[1]
            if line.rstrip().endswith("FAILED") and begun:
                return running
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if hung:
        raise SetupError(f"{running} hung for {LIMIT_S} s")
    # A panic while panicking ends the program in the middle of a test.
    return running if code != 0 else None


def judge(checker: Checker, mutation: Mutation | None, *, limited: bool) -> Verdict:
    """Run a checker on its copy, with the bug or unmutated."""
    environment = {**os.environ, **checker.environment, "CARGO_TERM_PROGRESS_WHEN": "never"}
    if limited:
        environment |= checker.limits
    with planted(mutation, checker.copy):
        programs = build(checker, environment)
        begun = time.perf_counter()
        failed = None
        for program in programs:
            failed = failed or first_failure(program, environment)
        return Verdict(failed, time.perf_counter() - begun)


def chosen(
    mutations: Sequence[Mutation], checker: Checker, only: str | None, short: bool
) -> list[tuple[Mutation, bool]]:
    """The mutations for a checker, each with whether it has to be caught."""
    named = [it for it in mutations if only in (None, it.name)]
    caught = [(it, True) for it in named if checker.name in it.caught_by]
    if short:
        return caught[:1]
    return caught + [(it, False) for it in named if checker.name in it.missed_by]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return 1 if any result differs from mutations.toml."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checker", choices=[it.name for it in CHECKERS], help="only this one")
    parser.add_argument("--only", metavar="NAME", help="only this mutation")
    parser.add_argument(
        "--short", action="store_true", help="the model checkers as in CI, and one mutation each"
    )
    options = parser.parse_args(arguments)
    try:
        mutations = read_mutations()
    except (SetupError, TypeError) as error:
        print(f"mutations.toml: {error}", file=sys.stderr)
        return 1
    if options.only and options.only not in [it.name for it in mutations]:
        print(f"unknown mutation {options.only}", file=sys.stderr)
        return 2
    work: list[tuple[Checker, Mutation | None, bool]] = []
    for checker in CHECKERS:
        if options.checker not in (None, checker.name):
            continue
        if options.short and not checker.is_model_checker:
            continue
        copy_sources(checker.copy)
        jobs = chosen(mutations, checker, options.only, options.short)
        if jobs:
            work.append((checker, None, False))
            work += [(checker, mutation, caught) for mutation, caught in jobs]
    return run(work, is_short=options.short)


def run(work: Sequence[tuple[Checker, Mutation | None, bool]], *, is_short: bool) -> int:
    """Run the work and print a line for each run; return 1 if any result is wrong."""
    begun = time.perf_counter()
    caught_by: dict[str, int] = {}
    wrong = 0
    with tqdm(work, unit="run", disable=None) as bar:
        for checker, mutation, must_catch in bar:
            name = mutation.name if mutation else "unmutated"
            bar.set_description(f"{checker.name} {name}")
            try:
                verdict = judge(checker, mutation, limited=not is_short or mutation is not None)
            except SetupError as error:
                wrong += 1
                tqdm.write(f"{checker.name}: {name}: NOT TESTED: {error}")
                continue
            in_time = f"in {verdict.seconds:.1f} s"
            if verdict.failed is None:
                word = "SURVIVED" if must_catch else "passes" if mutation is None else "is not seen"
                tqdm.write(f"{checker.name}: {name}: {word} {in_time}")
            else:
                tqdm.write(f"{checker.name}: {name}: caught by {verdict.failed} {in_time}")
                caught_by[checker.name] = caught_by.get(checker.name, 0) + must_catch
            wrong += (verdict.failed is not None) != must_catch
    counts = ", ".join(f"{count} by {name}" for name, count in caught_by.items())
    minutes = (time.perf_counter() - begun) / 60
    print(f"{len(work)} runs in {minutes:.1f} min, caught: {counts or 'none'}; {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
