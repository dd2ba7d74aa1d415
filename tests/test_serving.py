"""`python -m sglang_distguard serve`: one process answers OpenAI's clients for several models."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import httpx
import openai
import pytest
from conftest import CACHE
from interpreters import Forked, Has, facts_of, run_well
from prometheus_client.parser import text_string_to_metric_families
from serving_programs import DOOMED, LASTING, LEFT, OUTPUT, PLANTED, PROCESS, TEXTS

KEY, ADMIN = "the-key", "the-administrators-key"
#: Seconds; nothing here takes more than a fraction of it.
MANY = 300.0
MODELS = CACHE / "models"
WISHES: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
#: Runs long enough for something to happen meanwhile.
LONG: dict[str, Any] = {**WISHES, "model": "chat", "prompt": "Hello", "max_tokens": 200}


class Server:
    """The command in a process of its own, and its clients."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        options = ["--tiny", "--cache", str(CACHE), "--port", "0", "--drain", "300"]
        options += ["--api-key", KEY, "--admin-key", ADMIN]
        self._program = Forked(
            f"import serving_programs\nserving_programs.serve({str(folder)!r}, {options!r})",
            has=Has.SGLANG,
        )
        self.status: Optional[int] = None
        self._is_told = False  # a second signal while the interpreter ends would kill it
        self.address = self._started()

    def _started(self) -> str:
        until = time.monotonic() + MANY
        output = self.folder / OUTPUT
        while time.monotonic() < until:
            if output.exists() and " on http://" in output.read_text():
                return "http://" + output.read_text().split(" on http://")[1].split()[0]
            time.sleep(0.05)
        raise AssertionError(self.end())

    def signal(self, number: int) -> None:
        self._is_told |= number == signal.SIGTERM
        os.kill(int((self.folder / PROCESS).read_text()), number)

    def end(self) -> str:
        """End it, once; return what it wrote to its standard error."""
        if self.status is None:
            if not self._is_told:
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    self.signal(signal.SIGTERM)
            ended = self._program.wait(MANY)
            self.status = ended.returncode
            return ended.stderr
        return ""

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=MANY
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.address + path, timeout=MANY)

    def change(self, method: str, path: str = "", key: str = ADMIN, **body: Any) -> httpx.Response:
        return httpx.request(
            method,
            f"{self.address}/admin/models{path}",
            headers={"Authorization": f"Bearer {key}"},
            json=body or None,
            timeout=MANY,
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("serving"))
    yield made
    made.end()


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found: dict[str, Any] = facts_of("serving_programs.alone(CACHE)")
    return found


def completed(client: openai.OpenAI, text: str) -> list[Any]:
    made = client.completions.create(model="chat", prompt=text, logprobs=1, **WISHES).choices[0]
    assert made.logprobs is not None
    return [made.text, made.logprobs.token_logprobs]


def talked(client: openai.OpenAI, text: str) -> list[Any]:
    messages: Any = [{"role": "user", "content": text}]
    made = client.chat.completions.create(model="chat", messages=messages, logprobs=True, **WISHES)
    choice = made.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    return [choice.message.content, [it.logprob for it in choice.logprobs.content]]


def streamed(client: openai.OpenAI, text: str) -> str:
    stream = client.completions.create(model="chat", prompt=text, stream=True, **WISHES)
    chunks = [it.choices[0].text for it in stream]
    assert len(chunks) > 1
    return "".join(chunks)


def talked_in_pieces(client: openai.OpenAI, text: str) -> str:
    messages: Any = [{"role": "user", "content": text}]
    stream = client.chat.completions.create(model="chat", messages=messages, stream=True, **WISHES)
    return "".join(it.choices[0].delta.content or "" for it in stream)


def embedded(client: openai.OpenAI, text: str) -> list[float]:
    return client.embeddings.create(model="embed", input=text).data[0].embedding


def test_two_models_asked_at_once_answer_each_as_its_engine_alone(
    server: Server, alone: dict[str, Any]
) -> None:
    client = server.client()
    assert [it.id for it in client.models.list()] == ["chat", "embed"]
    assert client.models.retrieve("embed").id == "embed"

    def talk() -> list[Any]:
        return [ask(client, text) for ask in (completed, talked) for text in TEXTS]

    def talk_in_streams() -> list[str]:
        return [ask(client, text) for ask in (streamed, talked_in_pieces) for text in TEXTS]

    def embed() -> list[Any]:
        return [embedded(client, text) for text in TEXTS]

    texts = [text for text, _ in alone["chat"]]
    with ThreadPoolExecutor() as threads:
        for asked, expected in ((talk, alone["chat"]), (talk_in_streams, texts)):
            # One request of each engine at a time: the bits of a sum on a CPU depend on the batch.
            talking, embedding = threads.submit(asked), threads.submit(embed)
            assert talking.result() == expected
            assert embedding.result() == alone["embed"]
        many = [threads.submit(streamed, client, text) for text in TEXTS for _ in range(3)]
        assert [it.result() for it in many] == [text for text in texts[:3] for _ in range(3)]


def test_the_client_in_the_readme_prints_what_stands_there(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(
        r"<!-- client -->\n```python\n(.*?)```\n<!-- /client -->\n\n```\n(.*?)```",
        (CACHE.parent / "README.md").read_text(),
        re.DOTALL,
    )
    assert found is not None
    # A port that is free, and this server's key.
    program = (
        found[1].replace("http://127.0.0.1:30000", server.address).replace('"none"', f"{KEY!r}")
    )
    exec(program, {})
    assert capsys.readouterr().out == found[2]


def test_the_other_routes_of_sglang_answer_by_model(server: Server) -> None:
    def post(path: str, **body: Any) -> Any:
        made = httpx.post(
            f"{server.address}/v1/{path}",
            json=body,
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=MANY,
        )
        assert made.status_code == 200, made.text
        return made.json()

    tokens = post("tokenize", model="embed", prompt="Hello")["tokens"]
    assert len(tokens) == len("Hello")
    assert post("detokenize", model="chat", tokens=tokens)["text"] == "Hello"
    scored = post("score", model="chat", query="a", items=["b", "c"], label_token_ids=[1, 2])
    assert [len(it) for it in scored["scores"]] == [2, 2]
    ranked = post("rerank", model="embed", query="a", documents=["b", "c"])
    assert sorted(it["document"] for it in ranked) == ["b", "c"]
    assert post("classify", model="embed", input="a")["data"][0]["index"] == 0


def test_what_is_refused_says_why(server: Server) -> None:
    client = server.client()
    with pytest.raises(
        openai.NotFoundError, match=r"'chatt' does not exist.*serve: chat, embed"
    ) as e:
        client.completions.create(model="chatt", prompt="Hello")
    assert (e.value.code, e.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="'default' does not exist"):
        client.completions.create(model="default", prompt="Hello")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("chatt")
    for key in ("another", KEY[:-1], "kéy"):
        sent = httpx.get(
            f"{server.address}/v1/models", headers={b"Authorization": f"Bearer {key}".encode()}
        )
        assert (sent.status_code, sent.json()["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError, match="send the server's key"):
        server.client("another").models.list()
    with pytest.raises(openai.BadRequestError, match="prompt: Field required"):
        client.post("/completions", body={"model": "chat"}, cast_to=object)
    with pytest.raises(openai.BadRequestError, match="Prompt cannot be empty"):
        client.completions.create(model="chat", prompt="")
    with pytest.raises(openai.BadRequestError, match="not appear to be an embedding model"):
        client.embeddings.create(model="chat", input="Hello")
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model="chat", prompt="x" * 1000)
    assert server.get("/nothing").status_code == 401
    assert server.get("/health").json()["models"]["chat"]["state"] == "serving"
    assert server.get("/health/nothing").status_code == 404


def test_the_administrators_routes_need_the_administrators_key(server: Server) -> None:
    for key in (KEY, "another"):
        refused = server.change("GET", key=key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    path = str(MODELS / "tiny-chat")
    for body, code, said in (
        ({"name": "chat", "model_path": path}, 409, "the name 'chat' is taken"),
        ({"name": "x", "model_path": path, "set": {"dtyp": 1}}, 400, "'dtyp'; is it dtype"),
        ({"name": "x", "model_path": path, "set": {"tp_size": "two"}}, 400, "cannot be 'two'"),
        ({"name": "x", "model_path": path, "set": {"port": 1}}, 400, "use --port"),
        ({"name": "x", "model_path": path, "set": {"tp_size": 2}}, 400, "needs 2 processes"),
        ({"name": "x", "model_path": path, "sets": {}}, 400, "sets: Extra inputs"),
        ({"name": "x", "model_path": str(CACHE / "nothing")}, 400, "nothing"),
    ):
        refused = server.change("POST", **body)
        assert refused.status_code == code, refused.text
        assert said in refused.json()["error"]["message"]
    assert server.change("PUT", "/x", model_path=path).status_code == 404
    assert server.change("DELETE", "/x").status_code == 404
    assert [it["name"] for it in server.change("GET").json()] == ["chat", "embed"]


def test_models_are_loaded_replaced_and_unloaded_while_they_and_others_are_asked(
    server: Server, alone: dict[str, Any]
) -> None:
    client = server.client()
    is_over = threading.Event()
    texts = [text for text, _ in alone["chat"]]

    def ask(model: str, answers: list[str]) -> None:
        while not is_over.is_set():
            made = client.completions.create(model=model, prompt=TEXTS[0], **WISHES)
            answers.append(made.choices[0].text)

    path = str(MODELS / "tiny-chat")
    loaded = server.change("POST", name="more", model_path=path, set={"max_running_requests": 4})
    assert (loaded.status_code, loaded.json()["state"]) == (201, "serving")
    found: list[list[str]] = [[], []]
    with ThreadPoolExecutor() as threads:
        asking = [threads.submit(ask, *it) for it in zip(("chat", "more"), found, strict=True)]
        try:
            for _ in range(2):
                replaced = server.change("PUT", "/more", model_path=path)
                assert replaced.status_code == 200, replaced.text
        finally:
            is_over.set()
        for it in asking:
            it.result()
    assert all(answers for answers in found)
    assert {text for answers in found for text in answers} == {texts[0]}
    assert server.change("DELETE", "/more").json() == {"name": "more", "state": "closed"}
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="more", prompt="Hello")


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + MANY
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_disconnects_aborts_its_request(server: Server) -> None:
    """Its requests would take 50 s, so that they are pending when it disconnects."""
    path = str(MODELS / "tiny-chat")
    assert server.change("POST", name=LASTING, model_path=path).status_code == 201
    server.signal(signal.SIGUSR2)
    until((server.folder / LASTING).exists)

    def pending() -> int:
        return int(server.get(f"/health/{LASTING}").json()["pending"])

    def aborted() -> float:
        return sum(
            value for name, value in samples(server) if name.endswith("aborted_requests_total")
        )

    before = aborted()
    stream = server.client().completions.create(stream=True, **{**LONG, "model": LASTING})
    next(iter(stream))
    assert pending() == 1
    stream.close()
    until(lambda: pending() == 0)
    # A request that does not stream, whose client goes without reading anything.
    wanted = {"model": LASTING, "prompt": "Hello", "max_tokens": 200, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"))
    connection.request("POST", "/v1/completions", json.dumps(wanted), headers)
    until(lambda: pending() == 1)
    connection.close()
    until(lambda: pending() == 0)
    until(lambda: aborted() == before + 2)
    assert server.change("DELETE", f"/{LASTING}").status_code == 200


def samples(server: Server) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for it in family.samples:
            yield it.name, it.value


def test_metrics_have_the_models_as_a_label_and_each_family_once(server: Server) -> None:
    server.client().completions.create(model="chat", prompt="Hello", **WISHES)
    server.client().embeddings.create(model="embed", input="Hello")
    families = list(text_string_to_metric_families(server.get("/metrics").text))
    names = [it.name for it in families]
    assert len(names) == len(set(names))
    tokens = next(it for it in families if it.name == "sglang:prompt_tokens")
    assert {it.labels["model"] for it in tokens.samples} == {"chat", "embed"}
    assert all("model" in it.labels for family in families for it in family.samples)
    assert all(it.value > 0 for it in tokens.samples if it.name.endswith("_total"))


def test_an_engine_that_fails_is_503_with_the_cause_and_others_go_on(
    server: Server, alone: dict[str, Any]
) -> None:
    path = str(MODELS / "tiny-chat")
    assert server.change("POST", name=DOOMED, model_path=path).status_code == 201
    server.signal(signal.SIGUSR1)
    cause = f"'{DOOMED}' has failed: ValueError: {PLANTED}"
    client = server.client()

    def is_refused() -> bool:
        with contextlib.suppress(openai.InternalServerError):
            client.completions.create(model=DOOMED, prompt="Hello", **WISHES)
            return False
        return True

    until(is_refused)  # the signal may come a request later
    with pytest.raises(openai.InternalServerError, match=cause) as refused:
        client.completions.create(model=DOOMED, prompt="Hello", **WISHES)
    assert (refused.value.status_code, refused.value.code) == (503, "engine_failed")
    health = server.get(f"/health/{DOOMED}")
    assert (health.status_code, health.json()["cause"]) == (503, f"ValueError: {PLANTED}")
    assert server.get("/health").status_code == 503
    assert [it.id for it in client.models.list()] == ["chat", "embed"]
    assert completed(client, TEXTS[0]) == alone["chat"][0]
    assert server.change("PUT", f"/{DOOMED}", model_path=path).status_code == 200
    assert client.completions.create(model=DOOMED, prompt="Hello", **WISHES).choices
    assert server.change("DELETE", f"/{DOOMED}").status_code == 200
    assert server.get("/health").status_code == 200


def test_sglangs_own_benchmark_measures_it(server: Server, tmp_path: Path) -> None:
    for backend in ("sglang-oai", "sglang-oai-chat"):
        result = tmp_path / f"{backend}.jsonl"
        given = [
            *("--backend", backend, "--base-url", server.address, "--model", "chat"),
            *("--tokenizer", str(MODELS / "tiny-chat"), "--dataset-name", "random-ids"),
            *("--random-input-len", "16", "--random-output-len", "8", "--num-prompts", "4"),
            *("--random-range-ratio", "1", "--output-file", str(result), "--disable-tqdm"),
        ]
        run_well(
            f"import serving_programs\nserving_programs.bench({given!r})",
            has=Has.SGLANG,
            OPENAI_API_KEY=KEY,
        )
        measured = json.loads(result.read_text().splitlines()[-1])
        assert (measured["completed"], measured["total_output_tokens"]) == (4, 32)


def test_at_sigterm_a_pending_stream_ends_whole_and_nothing_is_left(
    server: Server, alone: dict[str, Any]
) -> None:
    client = server.client()
    whole = client.completions.create(**LONG).choices[0].text
    stream = iter(client.completions.create(stream=True, **LONG))
    text = next(stream).choices[0].text
    server.signal(signal.SIGTERM)
    last = None
    for last in stream:
        text += last.choices[0].text
    assert last is not None
    assert last.choices[0].finish_reason == "length"
    assert text == whole
    with pytest.raises(openai.APIConnectionError):
        server.client().models.list()
    errors = server.end()
    assert server.status == 0, errors[-3000:]
    assert json.loads((server.folder / LEFT).read_text()) == {"files": [], "shared memory": []}
    assert (server.folder / OUTPUT).read_text().splitlines()[-1] == "closing"
