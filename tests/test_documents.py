"""Documents that repeat parts of the code agree with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sglang_distguard.audit import paths
from sglang_distguard.hooks import process_globals

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("page", "table"),
    [
        ("process-globals.md", process_globals.markdown()),
        ("audit.md", paths.markdown()),
    ],
)
def test_a_table_in_the_documents_is_the_one_that_the_code_reads(page: str, table: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    found = re.search(r"<!-- table -->\n(.*?)\n?<!-- /table -->", text, re.DOTALL)
    assert found is not None
    assert found[1] == table, "run: make docs"


def test_the_page_of_engines_has_every_method_of_the_installed_engine(sglang: None) -> None:
    from sglang_distguard.engines import methods

    table = (ROOT / "docs" / "engines.md").read_text()
    assert methods.markdown() in table, "run: make docs"
    assert {name for name, _, _ in methods.methods()} >= methods.LIMITS.keys()


def test_the_tests_of_engines_call_every_method(sglang: None) -> None:
    from sglang_distguard.engines import methods
    from sglang_distguard.engines.refusals import REFUSED, REFUSED_ON_CPU

    files = [*(ROOT / "tests").glob("test_engines*.py"), ROOT / "tests" / "engine_calls.py"]
    text = "".join(file.read_text() for file in files)
    names = {name for name, _, _ in methods.methods()} - REFUSED.keys() - REFUSED_ON_CPU.keys()
    # An engine's `with` block and `close` are `shutdown`.
    assert [it for it in sorted(names - {"shutdown"}) if not re.search(rf"\.{it}\b", text)] == []


def test_every_process_global_is_listed_once_with_a_reason() -> None:
    names = [(row.module, row.name) for row in process_globals.TREATMENTS]
    assert len(names) == len(set(names))
    assert all(row.reason for row in process_globals.TREATMENTS)


def test_every_public_name_has_a_docstring() -> None:
    import sglang_distguard

    for name in sglang_distguard.__all__:
        if not name.startswith("__"):
            assert getattr(sglang_distguard, name).__doc__, name


def test_no_source_file_is_longer_than_five_hundred_lines() -> None:
    files = [
        file
        for folder in ("python", "rust", "tests")
        for pattern in ("*.py", "*.rs", "*.pyi")
        for file in (ROOT / folder).rglob(pattern)
    ]
    assert files
    assert [file.name for file in files if len(file.read_text().splitlines()) > 500] == []


def test_the_architecture_fits_two_hundred_lines() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 200
