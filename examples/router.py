"""Two processes, each with both models in its threads, behind SGLang's router.

    pip install sglang-router
    python examples/router.py [--processes 2]

The router sends each request to one of the processes, whatever its model is, so that all of them
serve the same models. One process is ended while both models are asked: no request is lost, since
it finishes what it has begun, and the router asks another one for what it refuses.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from openai import APIError, OpenAI
from sglang_distguard.testing import free_port

SERVER = ("sglang_distguard", "serve", "--tiny", "--port", "0")
#: Seconds until a process that was started must answer.
LIMIT = 600


def main() -> int:
    """Start the processes and the router, ask, and end them."""
    parser = argparse.ArgumentParser(description="servers behind SGLang's router")
    parser.add_argument("--processes", type=int, default=2, help="how many servers (2)")
    number = max(2, parser.parse_args().processes)
    servers = [_started(*SERVER) for _ in range(number)]
    started = list(servers)
    try:
        urls = [_address(it) for it in servers]
        port = free_port()
        started.append(_router(port, urls))
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        _wait(client, started[-1], urls)
        print("one answer of all:", _are_one(_answers(client, 4 * number)))
        print("processes that answered:", sum(map(_answered, urls)))
        with ThreadPoolExecutor(1) as thread:
            meanwhile = thread.submit(_answers, client, 16 * number)
            servers[0].terminate()
            print("exit status of one process:", servers[0].wait(LIMIT))
            print("one answer meanwhile:", _are_one(meanwhile.result()))
        print("one answer of the others:", _are_one(_answers(client, 4)))
        return 0
    finally:
        for process in reversed(started):  # the router first: it would find no process
            process.terminate()
        for process in started:
            process.wait(LIMIT)


def _started(*module: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _router(port: int, urls: list[str]) -> subprocess.Popen[str]:
    options = {"host": "127.0.0.1", "port": port, "policy": "round_robin"}
    # A port for its own metrics, which it opens in any case.
    options |= {"prometheus-host": "127.0.0.1", "prometheus-port": free_port()}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", "sglang_router.launch_router", *words, "--worker-urls", *urls],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _address(server: subprocess.Popen[str]) -> str:
    """The address in the line that ``serve`` prints when its models are loaded."""
    assert server.stdout is not None
    for line in server.stdout:
        found = re.search(r" on (http://\S+)", line)
        if found is not None:
            return found[1]
    raise RuntimeError(f"a server ended with status {server.wait()} before it served")


def _wait(client: OpenAI, router: subprocess.Popen[str], urls: list[str]) -> None:
    """Wait until the router has found every process; it answers 503 before it has found one."""
    until = time.monotonic() + LIMIT
    while True:
        try:
            _answers(client, 4)
            if all(map(_answered, urls)):
                return
            missing = "the router has not found every process"
        except APIError as error:
            missing = f"the router does not answer: {error}"
        if router.poll() is not None or time.monotonic() > until:
            raise RuntimeError(missing)
        time.sleep(0.2)


def _answers(client: OpenAI, number: int) -> list[tuple[str, list[float]]]:
    """Ask both models ``number`` times each, some at once; return the texts and vectors."""

    def ask(_: int) -> tuple[str, list[float]]:
        text = client.completions.create(model="chat", prompt="Hello", max_tokens=6, temperature=0)
        numbers = client.embeddings.create(model="embed", input="Hello")
        return text.choices[0].text, numbers.data[0].embedding

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(ask, range(number)))


def _are_one(answers: list[tuple[str, list[float]]]) -> bool:
    """Whether all have one text and one vector.

    The last bits of a vector depend on how many requests SGLang computes in one batch (0.5.23).
    """
    (text, vector), *others = answers
    return all(
        it == text and all(abs(x - y) < 1e-5 for x, y in zip(numbers, vector, strict=True))
        for it, numbers in others
    )


def _answered(url: str) -> bool:
    """Whether both models of this process have answered a request."""
    import urllib.request

    with urllib.request.urlopen(f"{url}/metrics", timeout=LIMIT) as answer:
        text = answer.read().decode()
    counted = re.findall(r'^sglang:num_requests_total\{[^}]*model="(\w+)"[^}]*\} (\S+)', text, re.M)
    return {model for model, count in counted if float(count) > 0} == {"chat", "embed"}


if __name__ == "__main__":
    sys.exit(main())
