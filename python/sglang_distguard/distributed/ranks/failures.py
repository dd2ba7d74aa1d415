"""Failures among ranks: as entries of the shared log, and as the errors that all ranks raise."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Optional

from sglang_distguard.distributed.ranks.creation import NotTogether
from sglang_distguard.errors import (
    AgreementTimeout,
    DistGuardError,
    RankFailed,
    RanksDisagree,
    StoreLost,
)

#: Matches what a backend reports when another rank has ended or does not arrive (gloo and NCCL of
#: torch 2.14.1, and sglang 0.5.23 where it has caught such an error: `load_model_utils`).
_CONSEQUENCE = re.compile(
    r"gloo|NCCL|[Cc]onnection|[Tt]im(ed|e) ?out|[Ss]ocket|[Bb]arrier|didn't finish loading"
)
_SHOWN = 500


def disagree(reports: Mapping[int, Mapping[str, Any]]) -> Optional[str]:
    """Return the failure of ranks whose specs differ; None when the specs are equal."""
    specs = {rank: report["spec"] for rank, report in sorted(reports.items())}
    names = sorted({name for spec in specs.values() for name in spec})
    fields = {}
    for name in names:
        values = {str(rank): spec.get(name) for rank, spec in specs.items()}
        if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            fields[name] = values
    return json.dumps({"kind": "disagree", "fields": fields}) if fields else None


def failed(reports: Mapping[int, Mapping[str, Any]]) -> Optional[str]:
    """Return one failure with those that ranks report; None when no rank reports one."""
    failures = _causes(reports) or _told(reports)
    return json.dumps({"kind": "failed", "failures": failures}) if failures else None


def missing(rank: int, reports: Mapping[int, Mapping[str, Any]], size: int, waited: float) -> str:
    """Return the failure of ``rank``, which timed out waiting for ranks that have not reported.

    Args:
        rank: the rank that waited.
        reports: reports by rank, so far.
        size: number of ranks.
        waited: seconds.
    """
    absent = [other for other in range(size) if other not in reports]
    failures = _causes(reports)
    return json.dumps(
        {
            "kind": "missing",
            "by": rank,
            "missing": absent,
            "waited": round(waited, 3),
            "failures": failures,
        }
    )


def silent(
    rank: int, silences: Mapping[int, float], reports: Mapping[int, Mapping[str, Any]]
) -> str:
    """Return the failure of ``rank``, which has heard no sign of life of ranks that it needs.

    Args:
        rank: the rank that listened.
        silences: seconds without a sign of life, by rank.
        reports: reports by rank, so far.
    """
    return json.dumps(
        {
            "kind": "missing",
            "by": rank,
            "missing": sorted(silences),
            "waited": round(min(silences.values()), 3),
            "failures": _causes(reports),
            "silent": True,
        }
    )


def cause(reports: Mapping[int, Mapping[str, Any]]) -> Optional[str]:
    """Return one failure with those that do not only follow from others; None without any."""
    failures = _causes(reports)
    return json.dumps({"kind": "failed", "failures": failures}) if failures else None


def report(error: BaseException) -> dict[str, Any]:
    """Return what a rank reports to the others about ``error``."""
    return {"failure": describe(error), "consequence": is_consequence(error)}


def _told(reports: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Failures by rank."""
    return {str(rank): it["failure"] for rank, it in sorted(reports.items()) if it.get("failure")}


def _causes(reports: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Failures by rank, without those that only follow from another rank's failure."""
    return _told({rank: it for rank, it in reports.items() if not it.get("consequence")})


def queued(rank: int, turn: Optional[tuple[str, int]], waited: float) -> str:
    """Return the failure of ``rank``, which timed out waiting for its turn.

    Args:
        rank: the rank that waited.
        turn: name and round that have the turn now, if any.
        waited: seconds.
    """
    holder = None if turn is None else turn[0]
    return json.dumps({"kind": "queued", "by": rank, "holder": holder, "waited": round(waited, 3)})


def unheard(waited: float) -> str:
    """Return a failure of this rank only: no decision after ``waited`` more seconds."""
    return lost(f"no answer within {waited:.0f} s")


def lost(reason: str) -> str:
    """Return a failure of this rank only: it can no longer reach the store."""
    return json.dumps({"kind": "lost", "reason": reason})


def describe(error: BaseException) -> str:
    """Return ``error`` as text for the other ranks, at most 500 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_SHOWN]


def in_short(error: BaseException) -> str:
    """Return the first sentence of ``error``: what runners are told whose communicators it breaks.

    That of an error of this package names ranks.
    """
    sentence, _, _ = " ".join(str(error).split()).partition(". ")
    kind = "" if isinstance(error, DistGuardError) else f"{type(error).__name__}: "
    return f"{kind}{sentence}"[:_SHOWN]


def is_consequence(error: BaseException) -> bool:
    """Whether ``error`` may only mean that another rank has ended, and not be the cause."""
    import torch.distributed as dist

    if isinstance(error, DistGuardError):
        return False
    if isinstance(error, (dist.DistError, NotTogether)):
        return True
    kinds = (RuntimeError, ValueError, TimeoutError, ConnectionError)
    return isinstance(error, kinds) and bool(_CONSEQUENCE.search(str(error)))


def error_of(
    what: str, stage: str, rank: int, failure: str, *, creates: bool = True
) -> DistGuardError:
    """Return the error that rank ``rank`` raises for a ``failure`` of the log.

    Args:
        what: the name that all ranks use, such as "runner NAME".
        stage: "ask", "begin", "turn" or "build".
        rank: the rank that raises.
        failure: text from the functions above. Plain text comes from the core and means that the
            ranks are in a later round of that name.
        creates: whether the turn creates something; otherwise it computes with what exists.
    """
    facts: dict[str, Any]
    try:
        facts = json.loads(failure)
    except ValueError:
        facts = {"kind": "left", "reason": failure}
    details = {"name": what, "stage": stage, "rank": rank}
    remedy = _remedy(stage, creates=creates)
    if facts["kind"] == "disagree":
        return _disagreement(what, facts["fields"], details)
    if facts["kind"] == "missing":
        return _absence(what, stage, facts, details, creates=creates)
    if facts["kind"] == "failed":
        failures = {int(other): text for other, text in facts["failures"].items()}
        told = "; ".join(f"rank {other}: {text}" for other, text in failures.items())
        return RankFailed(
            f"{what} failed on {_ranks(failures)} and was aborted on all ranks ({told}). {remedy}",
            **details,
            failures=failures,
        )
    if facts["kind"] == "left":
        return RankFailed(
            f"{what} was aborted by another rank, which has begun a new attempt "
            f"({facts['reason']}). {remedy}",
            **details,
            failures={},
        )
    if facts["kind"] == "queued":
        return _overlong_turn(what, facts, details)
    return StoreLost(
        f"{what}: the store of the world cannot be reached from rank {rank} ({facts['reason']}). "
        "Its server is in rank 0's process or in torchrun's agent: check whether that has ended. "
        "Nothing more can be built in this world. Call teardown(force=True) and make a new one.",
        **details,
        reason=facts["reason"],
    )


def _disagreement(
    what: str, fields: Mapping[str, Mapping[str, Any]], details: Mapping[str, Any]
) -> DistGuardError:
    by_rank = {
        name: {int(rank): value for rank, value in values.items()}
        for name, values in fields.items()
    }
    told = "; ".join(f"{name}: {_grouped(values)}" for name, values in by_rank.items())
    return RanksDisagree(
        f"the ranks request different settings for {what}: {told}. Nothing was created. "
        "Give every rank the same settings, or give different runners different names.",
        **details,
        fields=by_rank,
    )


def _remedy(stage: str, *, creates: bool) -> str:
    if creates:
        return (
            "What this rank had made for it is destroyed. Build it again once the cause is removed."
        )
    if stage == "ask":  # no rank begins what not all have asked for
        return "Nothing was changed. Call it again once the cause is removed."
    broken = (
        "its communicators are out of step and were destroyed or disconnected: the runners that "
        "used them raise LeaseBroken. Build those again."
    )
    if stage == "turn":
        return broken[0].upper() + broken[1:]
    return f"If a rank had begun it, {broken} Otherwise nothing was changed: call it again."


def _absence(
    what: str, stage: str, facts: Mapping[str, Any], details: Mapping[str, Any], *, creates: bool
) -> DistGuardError:
    absent, failures = facts["missing"], facts["failures"]
    doing = {
        "ask": "ask for it",
        "begin": "finish its turn",
        "turn": "finish creating its groups" if creates else "finish it",
        "build": "finish building it",
    }[stage]
    same = "build runners under the same names" if creates else "call the same methods"
    who = f"{_ranks(absent)} did not {doing}" if absent else "no decision was written"
    since = f"within {facts['waited']:.1f} s"
    if facts.get("silent"):
        since = f"and gave no sign of life for {facts['waited']:.1f} s"
    told = "".join(f"; rank {rank}: {text}" for rank, text in failures.items())
    return AgreementTimeout(
        f"{what}: {who} {since}, so rank {facts['by']} aborted it on all "
        f"ranks{told}. Check whether those ranks are alive, and {same} there (py-spy dump shows "
        "what they wait for). agreement_timeout=... changes the deadline. "
        f"{_remedy(stage, creates=creates)}",
        **details,
        silent=facts.get("silent", False),
        missing=absent,
        waited=facts["waited"],
        failures={int(rank): text for rank, text in failures.items()},
    )


def _overlong_turn(
    what: str, facts: Mapping[str, Any], details: Mapping[str, Any]
) -> DistGuardError:
    holder = facts["holder"]
    reason, remedy = "and it is free now", "try again"
    if holder is not None:
        reason = f"because {holder} has it"
        remedy = "check what the holder is doing (py-spy dump)"
    return AgreementTimeout(
        f"{what}: the turn did not come within {facts['waited']:.1f} s {reason}, so rank "
        f"{facts['by']} aborted it on all ranks. Turns run one after the other on all ranks: "
        f"{remedy}, or allow more time with timeout=...",
        **details,
        missing=[],
        waited=facts["waited"],
        failures={},
        holder=holder,
    )


def _grouped(values: Mapping[int, Any]) -> str:
    """Return values as text, equal ones together: "2 on rank 0, 4 on ranks 1, 2"."""
    groups: dict[str, list[int]] = {}
    for rank, value in values.items():
        groups.setdefault(repr(value), []).append(rank)
    return ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in groups.items())


def _ranks(ranks: Any) -> str:
    numbers = sorted(ranks)
    return f"rank{'s' if len(numbers) != 1 else ''} {', '.join(map(str, numbers))}"
