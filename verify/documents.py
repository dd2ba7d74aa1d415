"""Writes the generated tables of docs/ from what the hooks and the audit read.

.venv/bin/python verify/documents.py
"""

from __future__ import annotations

import re
from pathlib import Path

from sglang_distguard.audit import paths
from sglang_distguard.engines import methods
from sglang_distguard.hooks import process_globals
from sglang_distguard.testing import prepare_environment

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLES = {
    "process-globals.md": process_globals.markdown,
    "audit.md": paths.markdown,
    "engines.md": methods.markdown,
}


def main() -> None:
    """Replace each table and keep the text around it."""
    prepare_environment()
    for name, markdown in TABLES.items():
        table = f"<!-- table -->\n{markdown()}\n<!-- /table -->"
        text = (DOCS / name).read_text()
        text = re.sub(r"<!-- table -->.*<!-- /table -->", lambda _, it=table: it, text, flags=re.S)
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    main()
