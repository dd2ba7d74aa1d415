"""A check of layers that `make lint` cannot do: import-linter takes `_core` for the package."""

from __future__ import annotations

import ast
from pathlib import Path

import sglang_distguard

PACKAGE = Path(sglang_distguard.__file__).parent
#: Parts that use the package as its users do.
ABOVE = {"__main__", "demo", "audit", "testing"}


def test_layers_import_nothing_of_the_package_itself_but_the_native_module() -> None:
    taken: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE).with_suffix("").parts[0]
        if place in ABOVE or place == "__init__":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "sglang_distguard":
                taken.setdefault(place, set()).update(name.name for name in node.names)
            elif isinstance(node, ast.Import):
                names = {name.name for name in node.names if name.name == "sglang_distguard"}
                taken.setdefault(place, set()).update(names)
    assert taken["hooks"] == {"_core"}
    assert set().union(*taken.values()) == {"_core"}
