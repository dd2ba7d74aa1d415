"""Judges the results of the sweep over architectures, and writes its document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from sglang_distguard.testing.catalog import CATALOG

#: Largest error to Hugging Face that float32 may show, relative to the largest value compared.
TOLERANCE = 1e-4

RIGHT = "right"
OFF = "off Hugging Face"
UNDEFINED = "undefined alone"
CANNOT = "does not run alone"
FAILED = "FAILED with the guard"
#: Category -> what it means.
CATEGORIES: Mapping[str, str] = {
    RIGHT: "alone, within the tolerance of Hugging Face; with the guard, three at once, bit for "
    "bit the same as each alone",
    OFF: "SGLang alone, without the guard, differs from Hugging Face; with the guard it computes "
    "the same as alone, bit for bit",
    UNDEFINED: "SGLang alone, without the guard, computes what its checkpoint does not determine: "
    "the bits differ with other random numbers, or with different uninitialised memory",
    CANNOT: "SGLang alone, without the guard, does not build or run it on a CPU from the "
    "checkpoint that transformers writes",
    FAILED: "it runs alone; with the guard it is refused, raises, has other bits or changes "
    "process-globals that have no treatment",
}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one architecture.

    Attributes:
        category: a key of ``CATEGORIES``.
        served: name of the SGLang class that ran, "" if none did.
        error: largest error to Hugging Face relative to the largest value, of both seeds.
        guarded: result with the guard, for the table.
        note: the reason, if not right.
    """

    name: str
    category: str
    served: str = ""
    error: float | None = None
    guarded: str = "not run"
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    name: str,
    reference: Mapping[str, Any],
    alone: Sequence[Mapping[str, Any]],
    disturbed: Mapping[str, Any] | None,
    guarded: Mapping[str, Any] | None,
    audited: Mapping[str, Any] | None,
) -> Outcome:
    """The outcome of one architecture.

    Args:
        name: of the catalog.
        reference: what the step ``reference`` returned.
        alone: what ``alone`` returned, per seed.
        disturbed: what ``disturbed`` returned; None if it was not run.
        guarded: what ``guarded`` returned; None if it was not run.
        audited: what ``audited`` returned; None if it was not run.
    """
    if "failed" in reference:
        return Outcome(name, FAILED, note=f"no reference: {reference['failed']}")
    for result in alone:
        if "failed" in result:
            where = f" ({result['where']})" if result["where"] else ""
            return Outcome(name, CANNOT, note=f"{result['failed']}{where}")
    served = alone[0]["class"]
    errors = [result["error"] / result["scale"] for result in alone]
    error = max(errors, key=lambda it: (math.isnan(it), it))  # a NaN is the worst of all
    problems = _problems(guarded) + _uncovered(audited) + _unsettled(disturbed)
    other_bits = [] if guarded is None else list(guarded.get("other_bits", ()))
    told = "; ".join([*problems, *other_bits]) or "bit-equal"
    # If the checkpoint does not determine the bits, they may differ with the guard too; no other
    # fault is accepted.
    undefined = None
    if not all(result["repeatable"] for result in alone):
        undefined = "the same runner has other bits each time"
    elif disturbed is not None and disturbed.get("same") is False:
        undefined = ""
    if problems or (other_bits and undefined is None):
        return Outcome(name, FAILED, served, error, "wrong", told)
    if undefined is not None:
        told = "other bits each time" if other_bits else "bit-equal"
        return Outcome(name, UNDEFINED, served, error, told, undefined)
    # A NaN is neither above nor below.
    category = RIGHT if error <= TOLERANCE else OFF
    return Outcome(name, category, served, error, told)


def _problems(guarded: Mapping[str, Any] | None) -> list[str]:
    if guarded is None:
        return ["not run"]
    if "failed" in guarded:
        return [f"{guarded['failed']} ({guarded['where']})"]
    return list(guarded["problems"])


def _unsettled(disturbed: Mapping[str, Any] | None) -> list[str]:
    if disturbed is None:
        return ["not run again with different uninitialised memory"]
    if "failed" in disturbed:
        return [
            f"with different uninitialised memory: {disturbed['failed']} ({disturbed['where']})"
        ]
    return []


def _uncovered(audited: Mapping[str, Any] | None) -> list[str]:
    if audited is None:
        return ["not audited"]
    if "failed" in audited:
        return [f"audit: {audited['failed']} ({audited['where']})"]
    return [f"UNCOVERED: {name}" for name in audited["uncovered"]]


def table(outcomes: Mapping[str, Outcome], notes: Mapping[str, str]) -> str:
    """The table of the document, one line per architecture of the catalog."""
    lines = [
        "| architecture | kind | transformers class | SGLang class | outcome | error alone | guarded | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in CATALOG.items():
        it = outcomes[name]
        error = "" if it.error is None else f"{it.error:.1e}"
        note = " ".join(filter(None, (it.note, notes.get(name, "")))).replace("|", "\\|")
        lines.append(
            f"| {name} | {entry.kind} | `{entry.transformers}` | "
            f"{f'`{it.served}`' if it.served else ''} | {it.category} | {error} | {it.guarded} | {note} |"
        )
    return "\n".join(lines)


def versions() -> str:
    """The versions that decide an outcome, besides our code."""
    return ", ".join(f"{name} {version(name)}" for name in ("sglang", "torch", "transformers"))


def document(outcomes: Mapping[str, Outcome], notes: Mapping[str, str], head: str) -> str:
    """The text of docs/ARCHITECTURES.md."""
    counts = {
        category: sum(it.category == category for it in outcomes.values())
        for category in CATEGORIES
    }
    summary = "\n".join(f"- **{counts[key]} {key}**: {text}." for key, text in CATEGORIES.items())
    rows = table(outcomes, notes)
    return f"{head}\n{summary}\n\n<!-- architectures -->\n{rows}\n<!-- /architectures -->\n"
