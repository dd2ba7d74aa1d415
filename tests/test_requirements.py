"""hooks.requirements has every name of SGLang that the guard itself imports or reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import sglang_distguard
from sglang_distguard.hooks.requirements import REQUIRED

PACKAGE = Path(sglang_distguard.__file__).parent
#: Parts that use the package as its users do, and build runners and engines with SGLang's own steps.
ABOVE = {"__main__", "demo", "audit", "testing", "serving", "engines"}
NAMES = {(it.module, it.qualname) for it in REQUIRED}


def trees() -> Iterator[ast.Module]:
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).with_suffix("").parts[0] not in ABOVE:
            yield ast.parse(file.read_text())


def test_every_import_from_sglang_is_required() -> None:
    found = {
        (node.module or "", alias.name)
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang.")
        for alias in node.names
    }
    assert len(found) > 10
    modules = {module for module, _ in NAMES}
    assert [it for it in sorted(found - NAMES) if ".".join(it) not in modules] == []


def test_every_global_that_must_have_an_accessor_is_required() -> None:
    found = {
        node.args[1].value
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "accessor"
        and isinstance(node.args[1], ast.Constant)
    }
    assert found == {"_CONTEXT", "_PARALLEL", "_PARALLEL_INITIALISED"}
    assert found <= {name for _, name in NAMES}
