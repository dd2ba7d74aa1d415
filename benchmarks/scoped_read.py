"""Measures the parts of one read of a scoped global: what bounds it, beside a scope and without.

    .venv/bin/python benchmarks/scoped_read.py

Each function returns a global of its module, as SGLang's `get_context` does. In the fastest of many
repetitions, and as ratios to a plain function of the same run. No SGLang is needed.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

from sglang_distguard import _core

#: A getter as it is while no scope exists, as the guard changes it for scopes, and with the test that
#: functions have which call something before they read (``patching.rewrite``).
TEXT = """
def plain():
    return value

def getter():
    return accessor.value

def tested():
    return accessor.value if _distguard_scopes_exist else value
"""
NUMBER, ROUNDS = 100_000, 100


def nanoseconds(*functions: Callable[[], Any]) -> list[float]:
    """The fastest of many repetitions of each, in turn: a processor changes its frequency."""
    rounds = [[timeit.timeit(it, number=NUMBER) for it in functions] for _ in range(ROUNDS)]
    return [min(found) / NUMBER * 1e9 for found in zip(*rounds, strict=True)]


def main() -> None:
    module: dict[str, Any] = {"__name__": "module", "value": object()}
    module["accessor"] = _core.ScopedGlobal(module, "value", object)
    exec(TEXT, module)
    functions = [module[it] for it in ("plain", "getter", "tested")]
    print("| | SGLang's own, ns | through the accessor | with the test |\n|---|---|---|---|")

    def row(where: str) -> None:
        plain, getter, tested = nanoseconds(*functions)
        cells = [f"{it:.1f} ({it / plain:.2f})" for it in (getter, tested)]
        print(f"| {where} | {plain:.1f} | {cells[0]} | {cells[1]} |", flush=True)

    row("no scope exists: there a getter is SGLang's own")
    scope = _core.new_scope("scope")
    row("beside a scope, in the default one")
    with _core.in_scope(scope):
        row("in a scope")


if __name__ == "__main__":
    main()
