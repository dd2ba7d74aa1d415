"""The examples as programs of tests."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def embedded_pool() -> None:
    """Print what the example's own route and the mounted ones answer."""
    from starlette.testclient import TestClient

    sys.argv = ["embedded_pool.py"]
    app = runpy.run_path(str(EXAMPLES / "embedded_pool.py"))["app"]
    with TestClient(app) as client:
        asked = {"question": "Where?", "sentences": ["Where is it?", "Then."]}
        wanted = {"model": "chat", "prompt": "Hello", "max_tokens": 4, "temperature": 0}
        facts = {
            "nearest": client.post("/nearest", json=asked).json(),
            "models": [it["id"] for it in client.get("/models/v1/models").json()["data"]],
            "text": client.post("/models/v1/completions", json=wanted).json()["choices"][0]["text"],
        }
    print(json.dumps(facts))


def engines_walkthrough() -> None:
    """Run it as a script."""
    sys.argv = ["engines_walkthrough.py"]
    runpy.run_path(str(EXAMPLES / "engines_walkthrough.py"), run_name="__main__")
