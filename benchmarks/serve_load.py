"""Load on `serve --tiny`: wrk asks both models at once, alternating completions and embeddings.

python benchmarks/serve_load.py [--seconds 10] [--connections 16]

It needs wrk (a package of most distributions). Exit status: 2 without it, 1 if a request failed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

#: As wrk's script: every other request is for the other model.
SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local asked = {
  {"/v1/completions", '{"model":"chat","prompt":"Hello","max_tokens":8,"temperature":0,"ignore_eos":true}'},
  {"/v1/embeddings", '{"model":"embed","input":"Hello"}'},
}
local number = 0
request = function()
  number = number + 1
  local it = asked[number % 2 + 1]
  return wrk.format(nil, it[1], nil, it[2])
end
"""


def main() -> int:
    """Start the server, ask it, and end it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--connections", type=int, default=16)
    given = parser.parse_args()
    wrk = shutil.which("wrk")
    if wrk is None:
        print("error: wrk is not installed here, so no load can be made", file=sys.stderr)
        return 2
    server = subprocess.Popen(
        [sys.executable, "-m", "sglang_distguard", "serve", "--tiny", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    try:
        for line in server.stdout:
            address = re.search(r" on (http://\S+)", line)
            if address is not None:
                return _load(wrk, address[1], given.seconds, given.connections)
        print("error: the server did not start", file=sys.stderr)
        return 1
    finally:
        server.terminate()
        print("the server's exit status:", server.wait(300))


def _load(wrk: str, address: str, seconds: int, connections: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "ask.lua"
        script.write_text(SCRIPT)
        options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "--latency"]
        ran = subprocess.run(
            [wrk, *options, "-s", str(script), address],
            capture_output=True,
            text=True,
            timeout=seconds + 120,
            check=True,
        )
    print(ran.stdout)
    return 1 if "Non-2xx" in ran.stdout or "Socket errors" in ran.stdout else 0


if __name__ == "__main__":
    sys.exit(main())
