"""Every request of a mixed load is accounted for: what it asked, how it had to end, how it ended."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

from engines_common import Answers, Kind, Left
from tqdm import tqdm


@dataclass
class Served:
    """An engine that is open, and what is being done to it."""

    engine: Any
    kind: Kind
    seed: int
    expected: Answers
    #: "drained", "ended" (not drained) or "failed" once we end it.
    ending: Optional[str] = None
    #: No request may begin: its weights are being changed.
    is_reserved: bool = False
    users: int = 0


@dataclass
class Asked:
    """A request that is running."""

    what: str
    served: Served
    begun: float = field(default_factory=time.monotonic)
    #: It had been answered in part before its engine was told to end.
    is_begun: bool = False
    outcome: Optional[str] = None


class Accounts:
    """The engines that are open, the requests that run, and the outcomes of those that ended.

    ``lock`` guards them. It is never held while an engine is asked.
    """

    def __init__(self) -> None:
        import sglang_distguard as dg

        self.dg = dg
        self.lock = threading.Lock()
        self.live: dict[str, Served] = {}
        self.outcomes: Counter[str] = Counter()
        self.acts: Counter[str] = Counter()
        self.tokens = 0
        self.errors: list[str] = []
        self.running: dict[int, Asked] = {}
        self.longest = 0.0

    def wrong(self, text: str) -> None:
        with self.lock:
            self.errors.append(text)
        tqdm.write(f"WRONG: {text}", file=sys.stderr)

    @contextmanager
    def request(self, what: str, served: Served) -> Iterator[Asked]:
        """One request: its outcome is counted, however it ends."""
        asked = Asked(what, served)
        with self.lock:
            self.running[id(asked)] = asked
        try:
            yield asked
        except self.dg.EngineClosed as error:
            if served.ending is None or (served.ending == "drained" and asked.is_begun):
                self.wrong(f"{what} of {served.engine!r}: {error} (ending: {served.ending})")
            asked.outcome = "its engine was closed: EngineClosed"
        except self.dg.EngineFailed as error:
            if served.ending != "failed" or "planted" not in str(error):
                self.wrong(f"{what} of {served.engine!r}: {error}")
            asked.outcome = "its engine was broken: EngineFailed"
        except BaseException as error:
            self.wrong(f"{what} of {served.engine!r}: {type(error).__name__}: {error}")
            asked.outcome = "another error"
            if not isinstance(error, Exception):
                raise
        finally:
            with self.lock:
                del self.running[id(asked)]
                served.users -= 1
                seconds = time.monotonic() - asked.begun
                self.longest = max(self.longest, seconds)
                self.outcomes[asked.outcome or "lost"] += 1
            if asked.outcome is None:
                self.wrong(f"{what} of {served.engine!r} ended without an outcome")

    def compare(self, asked: Asked, number: int, got: Sequence[int], *, whole: bool = True) -> bool:
        expected = asked.served.expected[number]
        right = tuple(got) == (expected if whole else expected[: len(got)])
        with self.lock:
            self.tokens += len(got)
        if not right:
            served = asked.served
            self.wrong(
                f"{asked.what}: question {number} of {served.kind.architecture}-{served.seed}: got "
                f"{list(got)}, alone {list(expected)}"
            )
        return right

    def settle(self, asked: Asked, number: int, answer: dict[str, Any], *, aborts: bool) -> None:
        """Judge a final answer; ``aborts``: we have asked to abort it."""
        reason = answer["meta_info"]["finish_reason"]
        if reason["type"] == "abort":
            self.compare(asked, number, answer["output_ids"], whole=False)
            asked.outcome = "aborted, as asked"
            if not aborts:
                self.wrong(f"{asked.what}: aborted, and no thread had asked for it: {reason}")
        elif self.compare(asked, number, answer["output_ids"]):
            asked.outcome = "answered right"
        else:
            asked.outcome = "answered wrong"

    def pick(self, chosen: random.Random) -> Optional[Served]:
        """An engine that may be asked; it counts one user more."""
        with self.lock:
            found = [it for it in self.live.values() if not it.is_reserved]
            if not found:
                return None
            served = chosen.choice(found)
            served.users += 1
            return served

    def note_begun(self, asked: Asked) -> None:
        asked.is_begun = asked.is_begun or asked.served.ending is None


def grown(memory: Sequence[float]) -> float:
    """How much more memory the last third of the rounds has left than the first, in MiB."""
    third = max(1, len(memory) // 3)
    return sum(memory[-third:]) / third - sum(memory[:third]) / third


def report(load: Accounts, rows: Sequence[tuple[float, int, int, Left]], head: str) -> str:
    lines = [head, "", "| outcome of a request | number |", "|---|---|"]
    lines += [f"| {name} | {count} |" for name, count in sorted(load.outcomes.items())]
    lines += [f"| **all** | {load.outcomes.total()} |", ""]
    lines += ["| what was done | number |", "|---|---|"]
    lines += [f"| {name} | {count} |" for name, count in sorted(load.acts.items())]
    lines += ["", f"{load.tokens} tokens compared. The longest request took {load.longest:.1f} s."]
    memory = [it.rss for _, _, _, it in rows]
    if memory:
        lines += [
            f"Resident memory, last third of the rounds less the first: {grown(memory):+.1f} MiB."
        ]
    lines += ["", "| round ends | requests | opened | threads | descriptors | tensors | RSS |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for seconds, requests, opened, left in rows:
        lines.append(
            f"| {seconds / 60:.1f} min | {requests} | {opened} | {len(left.threads)} | "
            f"{left.descriptors} | {left.tensors} | {left.rss:.1f} MiB |"
        )
    lines += ["", *(f"- WRONG: {it}" for it in load.errors[:20])]
    return "\n".join(lines).rstrip() + "\n"
