"""The report of an audit: which globals changed, which writers ran, and what is UNCOVERED."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from sglang_distguard.audit.findings import Finding, Open
from sglang_distguard.audit.runs import Change, Ran

_PLACES = 2


def uncovered(findings: Iterable[Finding]) -> list[Finding]:
    """The untreated globals that changed, or whose writers ran, or whose state cannot be read."""
    return [it for it in findings if it.verdict in (Open.UNCOVERED, Open.UNSEEABLE)]


def text(findings: Sequence[Finding]) -> str:
    """List the globals that changed after SGLang was imported or are UNCOVERED, by verdict.

    The last lines count the globals of each verdict.
    """
    return "\n".join(_lines(findings))


def _lines(findings: Sequence[Finding]) -> Iterator[str]:
    changed = [it for it in findings if any(map(_is_later, it.changes))]
    missing = uncovered(findings)
    told = [it for it in findings if it in changed or it in missing]
    for finding in sorted(told, key=lambda it: (it.verdict, it.module, it.name)):
        reason = f": {finding.reason}" if finding.reason else ""
        yield f"{finding.module}.{finding.name}"
        yield f"    {finding.verdict}{reason}"
        for change in filter(_is_later, finding.changes):
            yield f"    {_when(change)}: {change.before} -> {change.after}"
        yield from _ran(finding)
        yield from _written(finding)
    yield ""
    counts = Counter(finding.verdict for finding in findings)
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    yield f"{len(findings)} process-globals: {verdicts}."
    yield f"{len(changed)} of them changed in these runs; {len(uncovered(findings))} UNCOVERED."


def _is_later(it: Change | Ran) -> bool:
    """Whether it happened after SGLang was imported."""
    return it.phase != "import"


def _when(it: Change | Ran) -> str:
    return f"{it.phase} ({it.runner})"


def _ran(finding: Finding) -> Iterator[str]:
    places: dict[str, list[str]] = {}
    for it in filter(_is_later, finding.ran):
        places.setdefault(f"{it.module}:{it.line}", []).append(_when(it))
    for place, times in list(places.items())[:_PLACES]:
        yield f"    ran at {place} in {', '.join(times)}"
    if len(places) > _PLACES:
        yield f"    and at {len(places) - _PLACES} more"


def _written(finding: Finding) -> Iterator[str]:
    places = [f"{it.file}:{it.line} {it.function}" for it in finding.writes]
    if places:
        more = f" and {len(places) - _PLACES} more" if len(places) > _PLACES else ""
        yield f"    written at {', '.join(places[:_PLACES])}{more}"
