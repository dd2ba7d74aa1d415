"""What people read of an audit: what changed, where it is written, and what is open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from sglang_distguard.audit.findings import Finding, Open
from sglang_distguard.audit.runs import Change

_PLACES = 2


def uncovered(findings: Iterable[Finding]) -> list[Finding]:
    """What was seen to change and nobody treats."""
    return [finding for finding in findings if finding.verdict == Open.UNCOVERED]


def text(findings: Sequence[Finding]) -> str:
    """Everything that changed after SGLang was imported, by verdict, and how much there is of each."""
    return "\n".join(_lines(findings))


def _lines(findings: Sequence[Finding]) -> Iterator[str]:
    changed = [it for it in findings if any(change.phase != "import" for change in it.changes)]
    for finding in sorted(changed, key=lambda it: (it.verdict, it.module, it.name)):
        reason = f": {finding.reason}" if finding.reason else ""
        yield f"{finding.module}.{finding.name}"
        yield f"    {finding.verdict}{reason}"
        for change in finding.changes:
            if change.phase != "import":
                yield f"    {_when(change)}: {change.before} -> {change.after}"
        yield from _written(finding)
    yield ""
    counts = Counter(finding.verdict for finding in findings)
    told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    yield f"{len(findings)} process-globals: {told}."
    yield f"{len(changed)} of them changed in these runs; {len(uncovered(findings))} UNCOVERED."


def _when(change: Change) -> str:
    return f"{change.phase} ({change.runner})"


def _written(finding: Finding) -> Iterator[str]:
    places = [f"{it.file}:{it.line} {it.function}" for it in finding.writes]
    if places:
        more = f" and {len(places) - _PLACES} more" if len(places) > _PLACES else ""
        yield f"    written at {', '.join(places[:_PLACES])}{more}"
