"""The steps that the processes of the sweep over architectures run, and their failure reports.

architecture_outcomes.py decides what a result means.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_distguard.testing import steps
from sglang_distguard.testing.catalog import CATALOG, Entry, create
from sglang_distguard.testing.children import fork
from sglang_distguard.testing.readouts import greedy, pooled
from sglang_distguard.testing.reference import bit_equal, max_abs_error

if TYPE_CHECKING:
    import torch

#: Decode steps after the prefill, and how often each runner repeats all of it.
STEPS = 3
ROUNDS = 3
SEEDS = (0, 1)
#: Runs beside every architecture, in a thread of its own.
COMPANION = "llama"
M_PERTURB = -6  # glibc: malloc and free fill the memory


@dataclass(frozen=True)
class Folders:
    """The folders of a sweep.

    Attributes:
        models: checkpoints and Hugging Face's results with them, kept between sweeps.
        work: results of the steps and their output, of this sweep.
    """

    models: Path
    work: Path

    def reference(self, name: str, seed: int) -> Path:
        """File of Hugging Face's results."""
        return self.models / f"{name}-{seed}.pt"

    def tensors(self, name: str, what: str, seed: int) -> Path:
        """File of one step's tensors."""
        return self.work / f"{name}-{what}-{seed}.pt"


def in_child(folders: Folders, label: str, seconds: float, work: Callable[[], Any]) -> Any:
    """Run ``work`` in a forked child and return what it returned (a JSON value).

    If the child raises, dies or takes longer than ``seconds``, this returns ``{"failed": …}``. Its
    output is in ``<label>.log`` of ``folders.work``.
    """
    result = folders.work / f"{label}.json"
    log = folders.work / f"{label}.log"
    result.unlink(missing_ok=True)

    def report() -> None:
        faulthandler.dump_traceback_later(max(1.0, seconds - 5))
        signal.alarm(int(seconds))  # ends the process wherever it hangs
        try:
            value = work()
        except BaseException as error:
            traceback.print_exc()
            value = failure(error)
        result.write_text(json.dumps(value))

    child = fork(report, log)
    _, status = os.waitpid(child, 0)
    if result.is_file():
        return json.loads(result.read_text())
    if os.waitstatus_to_exitcode(status) == -signal.SIGALRM:
        return {"failed": f"took over {seconds:.0f} s", "where": last_sglang_line(log.read_text())}
    return {"failed": f"died with status {os.waitstatus_to_exitcode(status)}", "where": ""}


def failure(error: BaseException) -> dict[str, str]:
    """Describe an error in one line, with the last line of SGLang's source in its traceback."""
    said = re.sub(r"\s+", " ", str(error)).strip()
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    trace = "".join(traceback.format_exception(error))
    return {"failed": text[:300], "where": last_sglang_line(trace)}


def last_sglang_line(trace: str) -> str:
    """``srt/…py:123`` of the innermost frame of SGLang in a printed traceback, or ""."""
    found = re.findall(r'File "[^"]*/sglang/((?:srt|kernels)/[^"]+)", line (\d+)', trace)
    if not found:
        return ""
    file, line = found[0] if "most recent call first" in trace else found[-1]
    return f"{file}:{line}"


def reference(name: str, folders: Folders) -> dict[str, Any]:
    """Make the checkpoints; compute and save the results of Hugging Face's model in float32."""
    import torch

    entry = CATALOG[name]
    kind, _ = entry.builder()
    for seed in SEEDS:
        model = kind.from_pretrained(create(name, folders.models, seed=seed)).eval()
        tokens: list[list[int]] = []
        if entry.readout == "logits":
            tokens, values = greedy(model, entry.prompts(), STEPS)
        else:
            values = pooled(model, entry.prompts(), entry.readout)
        made = folders.reference(name, seed).with_suffix(".part")
        torch.save({"tokens": tokens, "values": values}, made)
        made.rename(folders.reference(name, seed))
    return {}


def alone(name: str, seed: int, folders: Folders, beside: str = "") -> dict[str, Any]:
    """Build and run one runner with plain SGLang; compare with Hugging Face and save the bits.

    ``beside``: the architecture beside which it will run later, if that needs its own settings.
    """
    import torch

    require_plain_sglang()
    entry = CATALOG[name]
    expected = torch.load(folders.reference(name, seed), weights_only=True)
    runner = build(entry, seed, folders, **CATALOG[beside or name].beside)
    results = [compute(entry, runner, expected["tokens"]) for _ in range(ROUNDS)]
    torch.save(results[0], folders.tensors(name, _alone(beside), seed))
    return {
        "error": max_abs_error(results[0], expected["values"]),
        "scale": float(expected["values"].abs().max()),
        "repeatable": all(bit_equal(results[0], other) for other in results[1:]),
        "class": type(runner.model).__name__,
    }


def disturbed(name: str, seed: int, folders: Folders) -> dict[str, Any]:
    """Whether the bits are the same with different uninitialised memory and other random numbers.

    They depend on the checkpoint only, unless SGLang fails to load or to compute something.
    """
    import torch

    disturb()
    entry = CATALOG[name]
    before = torch.load(folders.tensors(name, "alone", seed), weights_only=True)
    expected = torch.load(folders.reference(name, seed), weights_only=True)
    runner = build(entry, seed, folders, random_seed=1)
    return {"same": bit_equal(compute(entry, runner, expected["tokens"]), before)}


def guarded(name: str, folders: Folders) -> dict[str, Any]:
    """Run two runners of one architecture and a Llama in three threads; compare each with alone."""
    import sglang_distguard
    import torch

    def work(key: str, meet: threading.Barrier) -> None:
        entry, seed = CATALOG[members[key][0]], members[key][1]
        meet.wait()
        with sglang_distguard.runner_scope(key):
            runner = build(entry, seed, folders, **CATALOG[name].beside)
            runners[key] = runner
        meet.wait()
        for number in range(ROUNDS):
            tokens = references[key]["tokens"]
            actual = compute(entry, runner, tokens, activate=sglang_distguard.activate)
            if not bit_equal(actual, expected[key]):
                off = max_abs_error(actual, expected[key])
                other_bits.append(f"{key}: round {number} differs from alone by {off:.3g}")

    members = {f"{name}-{seed}": (name, seed) for seed in SEEDS}
    members[f"companion-{COMPANION}"] = (COMPANION, SEEDS[0])
    references = {
        key: torch.load(folders.reference(*it), weights_only=True) for key, it in members.items()
    }
    expected = {
        key: torch.load(
            folders.tensors(it[0], _alone(name if it[0] != name else ""), it[1]), weights_only=True
        )
        for key, it in members.items()
    }
    runners: dict[str, Any] = {}
    other_bits: list[str] = []
    sglang_distguard.install()
    problems = at_once(list(members), work)
    for runner in runners.values():
        sglang_distguard.close(runner)
    return {"problems": problems, "other_bits": other_bits}


def require_plain_sglang() -> None:
    """Raise RuntimeError if the guard is installed."""
    import sglang_distguard

    if sglang_distguard.is_installed():
        raise RuntimeError("the guard is installed; a runner alone must run without it")


def disturb() -> None:
    """Let allocated memory hold other values than before, and draw other random numbers."""
    import torch

    ctypes.CDLL(None).mallopt(M_PERTURB, 0x55)
    torch.manual_seed(1)


def at_once(keys: Sequence[str], work: Callable[[str, threading.Barrier], None]) -> list[str]:
    """Call ``work(key, meet)`` in a thread for each key; all can wait for each other at ``meet``.

    Returns a line for each thread that failed. The first one to fail releases the others.
    """

    def run(key: str) -> None:
        try:
            work(key, meet)
        except threading.BrokenBarrierError:
            pass  # another thread reports the reason
        except BaseException as error:
            traceback.print_exc()
            told = failure(error)
            problems.append(f"{key}: {told['failed']} ({told['where']})")
            meet.abort()

    problems: list[str] = []
    meet = threading.Barrier(len(keys))
    threads = [threading.Thread(target=run, args=(key,), name=key) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return problems


def _alone(beside: str) -> str:
    """Name under which ``alone`` saves its tensors."""
    return f"alone-{beside}" if beside and CATALOG[beside].beside else "alone"


def audited(name: str, folders: Folders) -> dict[str, Any]:
    """Find untreated process-globals that change, or whose writers run, with the guard."""
    import sglang_distguard
    from sglang_distguard.audit import findings, report, runs

    entry = CATALOG[name]

    def computed(runner: Any, number: int, *, activate: Any, after: Any = None) -> None:
        compute(entry, runner, None, activate=activate)

    # Only `sglang_distguard audit` tells the phase of a change: observing takes most of the time.
    subject = runs.Subject(lambda number, after: build(entry, SEEDS[number], folders), computed)
    sglang_distguard.install()
    found = report.uncovered(findings.find([runs.together(subject)]))
    return {"uncovered": [f"{it.module}.{it.name}" for it in found]}


def build(entry: Entry, seed: int, folders: Folders, **overrides: Any) -> Any:
    """A runner of this architecture in float32, by SGLang's own steps."""
    from sglang_distguard.testing.recipe import server_args

    model = create(entry.name, folders.models, seed=seed)
    return steps.build(server_args(model, dtype="float32", **{**entry.overrides, **overrides}))


def compute(
    entry: Entry, runner: Any, tokens: Sequence[Sequence[int]] | None, **how: Any
) -> torch.Tensor:
    """Logits of a prefill and the decode steps, on these tokens; or one prefill's readout.

    ``how`` is passed on to ``steps.generate`` or ``steps.embed``.
    """
    prompts = entry.prompts()
    ids = [it.ids for it in prompts]
    if entry.readout == "logits":
        items = [it.item for it in prompts]
        return steps.generate(runner, ids, STEPS, forced=tokens, items=items, **how).logits
    return steps.embed(runner, ids, **how)


def wait_for_one(children: dict[int, str]) -> str:
    """Wait for any of these children; remove it and return its name."""
    while True:
        for child in list(children):
            done, _ = os.waitpid(child, os.WNOHANG)
            if done:
                return children.pop(child)
        time.sleep(0.02)
