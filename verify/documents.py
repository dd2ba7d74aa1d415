"""Writes the generated part of docs/process-globals.md from the table that the hooks read.

.venv/bin/python verify/documents.py
"""

from __future__ import annotations

import re
from pathlib import Path

from sglang_distguard.hooks import process_globals

FILE = Path(__file__).resolve().parent.parent / "docs" / "process-globals.md"


def main() -> None:
    """Replace the table and keep the text around it."""
    table = f"<!-- table -->\n{process_globals.markdown()}\n<!-- /table -->"
    text = FILE.read_text()
    FILE.write_text(re.sub(r"<!-- table -->.*<!-- /table -->", lambda _: table, text, flags=re.S))


if __name__ == "__main__":
    main()
