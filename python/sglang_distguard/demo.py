"""The demo: eight runners from eight threads with the guard, then the same code without it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import sglang_distguard
from sglang_distguard.testing import fleet, max_abs_error, prepare_environment, steps

if TYPE_CHECKING:
    import torch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs

ROUNDS = 5
_COLUMNS = ("runner", "dtype", "decision", "waited ms", "build s", "tokens", "max error")


def run(cache: Path) -> int:
    """Run both halves; exit status 0 when all runners were right with the guard."""
    print("1/4 importing SGLang (about 15 s; a minute the first time)", flush=True)
    prepare_environment()
    print("2/4 small models, and each one run alone for comparison (kept in .cache)", flush=True)
    members = fleet.members(cache)
    with _quiet_stderr():
        expected = [fleet.huggingface_logits(member) for member in members]
    print(f"3/4 {len(members)} runners built at once from {len(members)} threads, with:\n")
    print("    import sglang_distguard\n    sglang_distguard.install()\n", flush=True)
    sglang_distguard.install()
    begun = time.perf_counter()
    with _quiet_stderr(), fleet.bystander() as seen:
        outcomes = fleet.build_all(members, _build_named)
        built = time.perf_counter() - begun
        fleet.generate_all(outcomes, ROUNDS, sglang_distguard.activate)
    rows = [_row(outcome, logits) for outcome, logits in zip(outcomes, expected, strict=True)]
    _print_table(_COLUMNS, rows)
    wrong = [o for o in outcomes if o.error is not None or o.problems]
    print(
        f"\n{len(outcomes) - len(wrong)} of {len(outcomes)} right: built together in {built:.1f} "
        f"s, then {ROUNDS} x {len(outcomes)} generations at once,\nlogits equal to the same runner "
        f"alone in its process, bit for bit. Changes a bystander thread saw: {len(seen)}.\n"
    )
    for outcome in wrong:
        print(f"  {outcome.member.name}: {outcome.error or outcome.problems}")
    print("4/4 the same code without the guard, in a process of its own:\n", flush=True)
    _run_unguarded(cache)
    sys.stdout.flush()
    return 1 if wrong or seen else 0


def unguarded(cache: Path) -> int:
    """The second half: the same threads and steps on plain SGLang."""
    from contextlib import nullcontext

    prepare_environment()
    members = fleet.members(cache)
    with _quiet_stderr():
        outcomes = fleet.build_all(members)
        fleet.generate_all(outcomes, 1, nullcontext)
    rows = []
    for outcome in outcomes:
        what = outcome.error or (outcome.problems or ["right"])[0]
        rows.append((outcome.member.name, outcome.member.dtype, _shorten(str(what))))
    _print_table(("runner", "dtype", "what happened"), rows)
    right = sum(outcome.error is None and not outcome.problems for outcome in outcomes)
    print(f"\n{right} of {len(outcomes)} right")
    sys.stdout.flush()
    os._exit(0)  # half-built runners and an orphaned world need no orderly shutdown


def _build_named(args: ServerArgs, name: str) -> ModelRunner:
    with sglang_distguard.runner_scope(name):
        return steps.build(args)


def _row(outcome: fleet.Outcome, expected: torch.Tensor) -> tuple[str, ...]:
    member = outcome.member
    if outcome.error is not None:
        return (member.name, member.dtype, type(outcome.error).__name__, "", "", "", "")
    events = [
        event
        for event in sglang_distguard.snapshot()["events"]
        if event["actor"]["runner"] == member.name and event["decision"] in ("lead", "join")
    ]
    decisions = {event["key"]: event["decision"] for event in events}
    waited = sum(event["waited"] for event in events) * 1000
    error = max_abs_error(member.alone.logits, expected)
    return (
        member.name,
        member.dtype,
        f"world {decisions.get('world', '-')}, groups {decisions.get('groups', '-')}",
        f"{waited:.0f}",
        f"{outcome.seconds:.1f}",
        " ".join(str(token) for token in member.alone.tokens[0]),
        f"{error:.1e}" + (" WRONG" if outcome.problems else ""),
    )


def _run_unguarded(cache: Path) -> None:
    command = [sys.executable, "-m", "sglang_distguard", "demo", "--unguarded"]
    environment = {k: v for k, v in os.environ.items() if k != "SGLANG_ALLOW_REUSE_DISTRIBUTED"}
    try:
        done = subprocess.run(
            [*command, "--cache", str(cache)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=300,
        )
        print(done.stdout or f"it ended with status {done.returncode} and no output")
    except subprocess.TimeoutExpired:
        print("it hung and was ended after 300 s")


def _shorten(text: str, width: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard stderr: SGLang shows a progress bar per runner that cannot be switched off."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
