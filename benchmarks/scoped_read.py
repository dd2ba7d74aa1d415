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

#: What the guard makes of `def read(): return value` (``patching.rewrite``), and parts of it.
TEXT = """
def plain():
    return value

def changed():
    return accessor.value if _distguard_scopes_exist else value

def without_test():
    return accessor.value
"""
NUMBER, REPETITIONS = 1_000_000, 15


def nanoseconds(function: Callable[[], Any]) -> float:
    return min(timeit.repeat(function, number=NUMBER, repeat=REPETITIONS)) / NUMBER * 1e9


def main() -> None:
    module: dict[str, Any] = {"__name__": "module", "value": object()}
    module["accessor"] = _core.ScopedGlobal(module, "value", object)
    exec(TEXT, module)
    plain, changed, without_test = (module[it] for it in ("plain", "changed", "without_test"))
    base = nanoseconds(plain)

    def row(what: str, found: float) -> None:
        print(f"| {what} | {found:.1f} | {found / base:.2f} |", flush=True)

    print("| a call of a function that returns a global | ns | ratio |\n|---|---|---|")
    row("SGLang's own", base)
    tested = nanoseconds(changed)
    row("with the test whether any scope exists; none does", tested)
    attribute = nanoseconds(without_test)
    row("through the accessor, without the test and without a look at the execution", attribute)
    row("the two together: what a read beside a scope takes at least", tested + attribute - base)
    scope = _core.new_scope("scope")
    row("a read beside a scope, in the default one", nanoseconds(changed))
    with _core.in_scope(scope):
        row("a read in a scope", nanoseconds(changed))


if __name__ == "__main__":
    main()
