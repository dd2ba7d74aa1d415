"""Errors of failed imports keep no frames alive, and modules are looked at when they are executed."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sglang_distguard.runner.import_errors import drop_tracebacks

NAME = "sglang.of_test_import_errors"
TEXT = """
try:
    raise ImportError("optional")
except ImportError as error:
    kept = error
during()
"""


@pytest.fixture
def text(tmp_path: Path) -> Iterator[Path]:
    """The file of a module that keeps an error."""
    file = tmp_path / "module.py"
    file.write_text(TEXT)
    yield file
    sys.modules.pop(NAME, None)


def imported(file: Path, during: object = lambda: None) -> ModuleType:
    """Execute the module as an import does, and let it call ``during`` when it has its error."""
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module)["during"] = during
    sys.modules.pop(NAME, None)
    sys.modules[NAME] = module
    setattr(spec, "_initializing", True)  # as `importlib._bootstrap._load_unlocked` does
    try:
        spec.loader.exec_module(module)
    finally:
        setattr(spec, "_initializing", False)
    return module


def test_a_module_that_is_executed_again_is_looked_at_again(text: Path) -> None:
    for _ in range(2):
        module = imported(text)
        assert module.kept.__traceback__ is not None
        drop_tracebacks()
        assert module.kept.__traceback__ is None
        assert str(module.kept) == "optional"


def test_a_module_is_looked_at_after_its_import_has_ended_if_that_was_under_way(text: Path) -> None:
    text.write_text("during()\n" + TEXT.replace("during()", ""))
    module = imported(text, during=drop_tracebacks)
    assert module.kept.__traceback__ is not None
    drop_tracebacks()
    assert module.kept.__traceback__ is None


def test_a_module_is_looked_at_once(text: Path) -> None:
    module = imported(text)
    drop_tracebacks()
    later = ImportError("later")
    setattr(module, "kept", later)
    try:
        raise later
    except ImportError:
        drop_tracebacks()
    assert later.__traceback__ is not None


def test_no_function_of_sglang_makes_a_global_name_of_an_error_that_it_caught() -> None:
    import sglang

    package = Path(next(iter(sglang.__path__))) / "srt"
    found = [
        f"{file.relative_to(package)}:{line}"
        for file in package.rglob("*.py")
        for line in kept_by_functions(ast.parse(file.read_text()))
    ]
    assert not found


def kept_by_functions(tree: ast.AST) -> Iterator[int]:
    """Lines at which a function gives a global name to an error that it has caught."""
    for function in found_in(tree, ast.FunctionDef, ast.AsyncFunctionDef):
        names = {name for it in found_in(function, ast.Global) for name in it.names}
        for handler in found_in(function, ast.ExceptHandler) if names else ():
            for it in found_in(handler, ast.Assign):
                stored = {name for target in it.targets for name in names_in(target)}
                if handler.name in names_in(it.value) and names & stored:
                    yield it.lineno


def found_in(tree: ast.AST, *kinds: type[Any]) -> Iterator[Any]:
    return (it for it in ast.walk(tree) if isinstance(it, kinds))


def names_in(tree: ast.AST) -> set[str]:
    return {it.id for it in found_in(tree, ast.Name)}


def test_the_search_finds_such_a_function() -> None:
    text = "def f():\n global e\n try: g()\n except E as x:\n  e = str(x)"
    assert list(kept_by_functions(ast.parse(text))) == [5]
