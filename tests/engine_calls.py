"""Calls of an engine's methods, the same for `sglang_distguard.Engine` and for SGLang's own.

Each subject takes an engine and returns what it answered, as JSON values. ``plain`` runs subjects
with `sgl.Engine`, alone and without the guard, whose scheduler and detokenizer are processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import interpreters
from sglang_distguard import Engine
from sglang_distguard.testing import create_model, server_args
from sglang_distguard.testing.catalog import CATALOG
from sglang_distguard.testing.steps import PROMPTS

GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
#: Seconds; nothing here takes more than a fraction of it.
MANY = 300.0
BUILDERS = {name: entry.builder for name, entry in CATALOG.items()}


def checkpoint(architecture: str, seed: int = 0, *, talks: bool = False) -> Path:
    """A checkpoint of any architecture of the catalog.

    Args:
        architecture: key of ``CATALOG``.
        seed: of its weights.
        talks: whether it has a tokenizer: the word w7 is the token 7.
    """
    models = interpreters.CACHE / "models"
    folder = create_model(architecture, models, seed=seed, builders=BUILDERS)
    if not talks:
        return folder
    talking = models / f"{folder.name}-talking"
    if not talking.exists():
        scratch = Path(tempfile.mkdtemp(dir=models))
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
        write_tokenizer(scratch)
        with contextlib.suppress(OSError):  # another worker was first
            scratch.rename(talking)
    return talking


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(1000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    # A special token is found within longer words: w1 would be found in w12.
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", eos_token="w999", pad_token="w999"
    )
    made.save_pretrained(folder)


def said(prompt: Sequence[int]) -> str:
    return " ".join(f"w{token}" for token in prompt)


def tokens(engine: Any, **given: Any) -> list[list[int]]:
    """The tokens that the engine generates for the prompts."""
    prompts = [list(it) for it in PROMPTS]
    answers = engine.generate(input_ids=prompts, sampling_params=GREEDY, **given)
    return [answer["output_ids"] for answer in answers]


def waited(engine: Any, coroutine: Any) -> Any:
    """Run a coroutine of the engine in the loop that its class is for."""
    loop = vars(engine).get("loop")  # of sgl.Engine
    return asyncio.run(coroutine) if loop is None else loop.run_until_complete(coroutine)


def error_of(call: Callable[[], Any]) -> str:
    """The error of ``call``, which must raise one."""
    try:
        answer = call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"no error: {answer}")


def pooled(engine: Any) -> dict[str, Any]:
    # One text at a time: the bits of a sum on a CPU depend on the other texts of a batch.
    texts = [said(prompt) for prompt in PROMPTS]
    return {
        "encode": [engine.encode(it)["embedding"] for it in texts],
        "async_encode": [waited(engine, engine.async_encode(it))["embedding"] for it in texts],
    }


def reranked(engine: Any) -> dict[str, Any]:
    pairs = [[said(PROMPTS[0]), said(it)] for it in PROMPTS]
    return {"rerank": [engine.rerank([pair])[0]["embedding"] for pair in pairs]}


def scored(engine: Any) -> dict[str, Any]:
    given = {"query": [5, 6, 7], "items": [[8, 9]], "label_token_ids": [3, 4, 5]}
    later = engine.async_score(**given, item_first=True)
    return {
        "score": engine.score(**given, apply_softmax=True).scores,
        "async_score": waited(engine, later).scores,
    }


def sessions(engine: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"open": engine.open_session(1000, session_id="talk")}
    found["open again"] = engine.open_session(1000, session_id="talk")
    turn = {"id": "talk", "rid": None, "offset": 0, "replace": False}
    for number, prompt in enumerate(PROMPTS):
        answer = engine.generate(
            input_ids=list(prompt), sampling_params=GREEDY, session_params=turn
        )
        turn["rid"] = answer["meta_info"]["id"]
        found[f"turn {number}"] = [answer["output_ids"], answer["meta_info"]["prompt_tokens"]]
    engine.close_session("talk")
    found["closed"] = error_of(
        lambda: engine.generate(input_ids=[1], sampling_params=GREEDY, session_params=turn)
    )
    return found


def saved(engine: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    by_rpc = functools.partial(engine.collective_rpc, "save_sharded_model")
    for call in (engine.save_sharded_model, by_rpc):
        with tempfile.TemporaryDirectory() as folder:
            call(path=folder, pattern=None, max_size=None)
            files = sorted(Path(folder).glob("*.safetensors"))
            digests = [hashlib.sha256(it.read_bytes()).hexdigest() for it in files]
            found[f"shards {len(found)}"] = digests
    found["save_remote_model"] = error_of(lambda: engine.save_remote_model(url="nothing://nowhere"))
    found["collective_rpc"] = error_of(lambda: engine.collective_rpc("no_such_method"))
    return found


def updated(engine: Any, own: str, other: str) -> dict[str, Any]:
    """New weights as tensors, and the old ones again; what is refused."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {"before": tokens(engine)}
    found["end before begin"] = engine.end_weight_update()
    for name, folder in (("new", other), ("old", own)):
        weights = list(load_file(Path(folder) / "model.safetensors").items())
        found[f"{name}: outside"] = engine.update_weights_from_tensor(weights)
        found[f"{name}: begin"] = engine.begin_weight_update()
        found[f"{name}: begin again"] = engine.begin_weight_update()
        found[f"{name}: update"] = engine.update_weights_from_tensor(weights)
        found[f"{name}: end"] = engine.end_weight_update()
        found[name] = tokens(engine)
    found["ipc"] = engine.update_weights_from_ipc({"GPU-0": "ipc:///nowhere"})
    found["no group"] = engine.destroy_weights_update_group("nothing")
    return found


def recorded(engine: Any) -> dict[str, Any]:
    engine.start_expert_distribution_record()
    found: dict[str, Any] = {"tokens": tokens(engine)}
    engine.dump_expert_distribution_record()
    engine.stop_expert_distribution_record()
    return found


def dumped(folder: Path) -> list[Any]:
    """How often each expert was chosen, of every record in ``folder``."""
    import torch

    made = [torch.load(it, weights_only=False) for it in sorted(folder.glob("*.pt"))]
    return [it["logical_count"].tolist() for it in made]


def without_lora(engine: Any) -> dict[str, Any]:
    """What an engine that has no adapters answers."""
    return {
        "load": engine.load_lora_adapter("one", "nowhere").error_message,
        "async_load": waited(
            engine, engine.async_load_lora_adapter("one", "nowhere")
        ).error_message,
        "tensors": engine.load_lora_adapter_from_tensors("one", {}, {}).error_message,
        "unload": engine.unload_lora_adapter("one").error_message,
        "async_unload": waited(engine, engine.async_unload_lora_adapter("one")).error_message,
    }


@contextlib.contextmanager
def opened(*folders: Path, **settings: Any) -> Iterator[list[Engine]]:
    """Engines of this process, one of each checkpoint, named by it."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Engine(
                    server_args=server_args(folder, sleep_on_idle=True, **settings),
                    name=folder.name,
                    start_timeout=MANY,
                )
            )
            for folder in folders
        ]


Given = dict[str, dict[str, Any]]


def answers(engine: Any, given: Given) -> dict[str, Any]:
    """Call the subjects of ``given``, name -> arguments, one after the other; JSON values."""
    found = {name: globals()[name](engine, **arguments) for name, arguments in given.items()}
    values: dict[str, Any] = json.loads(json.dumps(found))
    return values


def at_once(engines: Sequence[Any], given: Sequence[Given]) -> list[dict[str, Any]]:
    """The same with several engines, each in a thread of its own."""
    with ThreadPoolExecutor(len(engines)) as threads:
        return list(threads.map(answers, engines, given))


def plain(folder: str, settings: dict[str, Any], given: Given) -> None:
    """Print what SGLang's own engine answers; of a process that has SGLang imported."""
    with plain_engine(folder, settings) as engine:
        print(json.dumps(answers(engine, given)))


@contextlib.contextmanager
def plain_engine(folder: str, settings: dict[str, Any]) -> Iterator[Any]:
    import multiprocessing

    from sglang.srt.entrypoints import engine as sgl

    # Its processes are forked from this one, which has SGLang and its stub of sgl_kernel imported.
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_args, **_kwargs: None  # type: ignore[assignment]
    engine = sgl.Engine(server_args=server_args(folder, **settings))
    try:
        yield engine
    finally:
        engine.shutdown()


def alone(folder: Path, given: Given, **settings: Any) -> dict[str, Any]:
    """What SGLang's own engine answers, in a process of its own."""
    call = f"engine_calls.plain({str(folder)!r}, {settings!r}, {given!r})"
    answered: dict[str, Any] = interpreters.facts_of(call)
    return answered
