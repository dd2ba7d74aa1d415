"""Programs that tests run on every rank (``testing.ranks``): real SGLang, real gloo."""

from __future__ import annotations

import importlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional
from unittest import mock

CACHE = Path(__file__).resolve().parent.parent / ".cache"
#: Seconds within which ranks that cannot agree must raise.
DEADLINE = 5.0

#: Runners of the tests, by name: architecture and dtype.
RUNNERS: dict[str, tuple[str, str]] = {
    "dense": ("llama", "float32"),
    "experts": ("qwen3_moe", "float32"),
    "half": ("llama", "bfloat16"),
    "mixture": ("mixtral", "float32"),
}


def rank() -> int:
    return int(os.environ["RANK"])


def size() -> int:
    return int(os.environ["WORLD_SIZE"])


def args_of(name: str, **overrides: Any) -> Any:
    """The settings of one of ``RUNNERS``, over all ranks."""
    from sglang_distguard.testing import create_model, server_args

    architecture, dtype = RUNNERS[name]
    folder = create_model(
        overrides.pop("architecture", architecture),
        CACHE / "models",
        seed=overrides.pop("seed", 0),
    )
    return server_args(folder, **{"tp_size": size(), "dtype": dtype, **overrides})


def start(*, agreement_timeout: float = 30.0, **settings: Any) -> None:
    """Install the guard, and initialise a world as user code under torchrun does."""
    import sglang_distguard
    import torch.distributed as dist

    sglang_distguard.install(agreement_timeout=agreement_timeout, **settings)
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method="env://")


#: Runners that the current repetition has built, and the number of that repetition.
_built: list[Any] = []
_repetition = 0


def build(model: str, *, name: Optional[str] = None, **overrides: Any) -> Any:
    """Build one of ``RUNNERS``, by default under its name there."""
    import sglang_distguard

    runner = sglang_distguard.build_runner(
        args_of(model, **overrides), name=name or model, gpu_id=rank()
    )
    _built.append(runner)
    return runner


def repeat(module: str, program: str, times: int, arguments: dict[str, Any]) -> list[Any]:
    """Run a program ``times`` times in this process and world; close its runners after each run."""
    global _repetition
    import sglang_distguard

    results = []
    for _repetition in range(times):
        results.append(getattr(importlib.import_module(module), program)(**arguments))
        for runner in _built:
            sglang_distguard.close(runner)
        _built.clear()
    return results


def generated(runner: Any, steps: int = 3) -> str:
    """Generate, and return a digest of the logits' bits."""
    import sglang_distguard
    from sglang_distguard.testing import generate

    return digest(generate(runner, steps=steps, activate=sglang_distguard.activate))


def digest(generation: Any) -> str:
    import hashlib

    import torch

    raw = generation.logits.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()


def in_threads(works: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run all at once; return each one's result, or the error it raised."""
    results: list[Any] = [None] * len(works)

    def run(index: int) -> None:
        try:
            results[index] = works[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def raise_errors(results: Sequence[Any]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result


def error_facts(error: Any) -> Any:
    """An error as data for the test that forked this rank; None if it is no error."""
    from sglang_distguard import DistGuardError

    if not isinstance(error, BaseException):
        return None
    return {
        "type": type(error).__name__,
        "kinds": [kind.__name__ for kind in type(error).__mro__],
        "text": str(error),
        "details": error.details if isinstance(error, DistGuardError) else None,
        "cause": repr(error.__cause__),
    }


def attempt(work: Callable[[], Any]) -> Any:
    """The facts of the error that ``work`` raises; None when it raises none."""
    try:
        work()
    except Exception as error:
        return error_facts(error)
    return None


def shared_file(name: str) -> Path:
    """The path of ``name`` that all ranks of this repetition share, and no other repetition."""
    return Path(os.environ["DISTGUARD_RUN_FOLDER"]) / f"{_repetition} {name}"


def tell_others(event: str) -> None:
    """Let ``wait_for_others(event)`` return on other ranks; does not use the world's store."""
    shared_file(f"{event} {rank()}").touch()


def wait_for_others(event: str, count: int) -> None:
    """Wait until ``count`` other ranks have reported ``event``."""
    path = shared_file(event)
    while len(list(path.parent.glob(f"{path.name} *"))) < count:
        time.sleep(0.01)


@contextmanager
def noting_asks(note: Callable[[str], None]) -> Iterator[None]:
    """``note(name)`` whenever this rank has asked the others for a runner, and waits for them."""
    from sglang_distguard.distributed.ranks.ask import Ask

    real = Ask.tell

    def tell(self: Ask, stage: str, report: Any) -> None:
        real(self, stage, report)
        if stage == "ask" and self.what.startswith("runner "):
            note(self.name)

    with mock.patch.object(Ask, "tell", tell):
        yield


# --- programs -----------------------------------------------------------------------------------


def alone(name: str, overrides: Optional[dict[str, Any]] = None, steps: int = 3) -> dict[str, Any]:
    """Build one runner with plain SGLang, without the guard: the expected bits, and error to HF."""
    from sglang_distguard.testing import PROMPTS, create_model, generate, huggingface, max_abs_error
    from sglang_distguard.testing import build as plain_build

    overrides = overrides or {}
    runner = plain_build(
        args_of(name, **overrides),
        gpu_id=rank(),
        world_rank=rank(),
        port=int(os.environ["MASTER_PORT"]),
    )
    made = generate(runner, steps=steps)
    model = create_model(RUNNERS[name][0], CACHE / "models", seed=overrides.get("seed", 0))
    error = max_abs_error(made.logits.float(), huggingface(model, PROMPTS, made.tokens))
    return {"digest": digest(made), "error": error}


def build_from_threads(names: Sequence[str], seed: int) -> dict[str, str]:
    """Build each from its own thread, in another order on every rank, and generate.

    With an even seed, a thread begins when this rank has asked for the runner of the one before:
    with 0 in exactly the opposite order on odd ranks. With an odd seed all begin at once.
    """
    start()
    order = list(names)
    if seed != 0:
        random.Random(f"{seed} {_repetition} {rank()}").shuffle(order)
    elif rank() % 2:
        order.reverse()
    in_line = seed % 2 == 0 and size() > 1  # one rank asks no other
    asked = {name: threading.Event() for name in order}
    before = [None, *order[:-1]] if in_line else [None] * len(order)
    together = threading.Barrier(1 if in_line else len(order))

    def one(name: str, earlier: Optional[str]) -> tuple[str, str]:
        together.wait()
        assert earlier is None or asked[earlier].wait(60)
        return name, generated(build(name))

    with noting_asks(lambda name: asked[name].set()):
        results = in_threads(
            [lambda n=n, e=e: one(n, e) for n, e in zip(order, before, strict=True)]
        )
    raise_errors(results)
    return dict(results)


def again(names: Sequence[str]) -> dict[str, str]:
    """The end of every test of a failure: build again, and return digests for comparison."""
    return {name: generated(build(name)) for name in names}


def ask_for_different_things(overrides: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Build the same runner with different overrides on every rank; then with equal ones."""
    import sglang_distguard

    start()
    kept = build("dense")
    with sglang_distguard.runner_scope(agreement_timeout=DEADLINE):
        error = attempt(lambda: build("experts", **overrides[rank()]))
    return {"error": error, "after": {"dense": generated(kept), **again(["experts"])}}


def ask_under_different_names() -> dict[str, Any]:
    import sglang_distguard

    start()
    build("dense")
    with sglang_distguard.runner_scope(agreement_timeout=DEADLINE):
        error = attempt(lambda: build("experts", name=f"runner of {rank()}"))
    return {"error": error, "after": again(["experts"])}


def never_come(absent: int) -> dict[str, Any]:
    """One rank does not build until the others have timed out."""
    import sglang_distguard

    start()
    build("dense")
    with sglang_distguard.runner_scope(agreement_timeout=DEADLINE):
        if rank() == absent:
            wait_for_others("timed out", size() - 1)
            error = None
        else:
            error = attempt(lambda: build("experts"))
            tell_others("timed out")
    late = attempt(lambda: build("experts")) if rank() == absent else None
    return {"error": error, "late": late, "after": again(["experts"])}


#: Where a rank fails: module, class or "", and the function that fails.
FAULTS: dict[str, tuple[str, str, str]] = {
    "creating a group": ("sglang.srt.distributed.parallel_state", "", "init_model_parallel_group"),
    "load": ("sglang.srt.model_loader.loader", "DefaultModelLoader", "load_model"),
    "memory pool": (
        "sglang.srt.model_executor.model_runner",
        "ModelRunner",
        "alloc_memory_pool",
    ),
    "expert metadata": ("sglang.srt.distributed.bootstrap", "", "init_layer_runtime"),
}


def fail(point: str, on: int, die: bool = False) -> Callable[[], None]:
    """Make ``FAULTS[point]`` raise on one rank, or end its process; return what undoes it."""
    module_name, classname, function = FAULTS[point]
    module = importlib.import_module(module_name)
    owner = getattr(module, classname) if classname else module
    real = getattr(owner, function)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if die:
            os._exit(17)
        raise OSError(f"no {point} today")

    if rank() == on:
        setattr(owner, function, failing)
    return lambda: setattr(owner, function, real)


def raise_on_one(point: str, on: int) -> dict[str, Any]:
    """A build that raises on one rank only."""
    import sglang_distguard
    from sglang_distguard.distributed.keys import all_keys

    start()
    kept = build("dense")
    keys = all_keys()
    mend = fail(point, on)
    with sglang_distguard.runner_scope(agreement_timeout=DEADLINE):
        error = attempt(lambda: build("experts"))
    mend()
    return {
        "error": error,
        "left": sorted(set(all_keys()) - set(keys)),
        "after": {"dense": generated(kept), **again(["experts"])},
    }


def die_on_one(point: str, on: int) -> dict[str, Any]:
    """End one rank's process in a build; the others make a world of the remaining ranks."""
    import sglang_distguard

    start()
    kept = build("dense")
    fail(point, on, die=True)
    with sglang_distguard.runner_scope(agreement_timeout=DEADLINE):
        error = attempt(lambda: build("experts"))
    sglang_distguard.close(kept)
    del kept
    leave_behind(on)
    return {"error": error, "after": again(["experts"])}


def leave_behind(on: int) -> None:
    """Make a world of the remaining ranks when one is gone; all runners are closed before."""
    import torch.distributed as dist
    from sglang.srt import runtime_context
    from torch._C._distributed_c10d import FileStore

    dist.destroy_process_group()
    runtime_context.reset_context()  # 0.5.23 keeps this rank's number in the old world
    left = [it for it in range(size()) if it != on]
    os.environ.update(WORLD_SIZE=str(len(left)), RANK=str(left.index(rank())))
    store = FileStore(str(shared_file("next world")), len(left))
    dist.init_process_group("gloo", store=store, rank=rank(), world_size=size())


def build_anonymously() -> list[Any]:
    """Build runners of equal settings from two threads, both without a name."""
    import sglang_distguard

    start()
    build("dense")
    together = threading.Barrier(2)

    def one() -> Any:
        together.wait()
        return attempt(
            lambda: _built.append(sglang_distguard.build_runner(args_of("experts"), gpu_id=rank()))
        )

    return in_threads([one, one])


def interrupted() -> dict[str, Any]:
    """Interrupt rank 0 while it waits for the others; then all build the same runner again."""
    import signal

    from sglang_distguard.distributed import world

    signal.signal(signal.SIGINT, signal.default_int_handler)
    start()
    build("dense")
    ranks = world.ranks()
    assert ranks is not None
    error: Any = None
    if rank() == 0:

        def interrupt() -> None:
            while not ranks.state.is_reading():
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        try:
            build("experts")
        except KeyboardInterrupt as caught:
            error = {"type": type(caught).__name__}
        tell_others("interrupted")
    else:
        wait_for_others("interrupted", 1)
        error = attempt(lambda: build("experts"))
    return {"error": error, "after": again(["experts"])}


def one_rank() -> dict[str, Any]:
    """Build two runners in a world of one rank; return which functions of ``ranks`` were called."""
    from sglang_distguard.distributed.ranks import agreement, log

    called: list[str] = []
    for module, function in ((log, "connect"), (agreement, "_await"), (agreement, "turn")):
        real = getattr(module, function)

        def noted(*args: Any, _real: Any = real, _name: str = function, **kwargs: Any) -> Any:
            called.append(_name)
            return _real(*args, **kwargs)

        setattr(module, function, noted)
    return {"made": build_from_threads(["dense", "half"], seed=0), "called": called}


def update_weights(names: Sequence[str]) -> dict[str, str]:
    """Load new weights into two runners at once, in opposite order; digest their logits."""
    from sglang_distguard.testing import create_model

    start()
    runners = {name: build(name) for name in names}
    order = list(names) if rank() % 2 == 0 else list(reversed(names))
    folders = {name: create_model(RUNNERS[name][0], CACHE / "models", seed=1) for name in names}
    together = threading.Barrier(len(order))

    def update(name: str) -> tuple[str, str]:
        together.wait()
        updater = runners[name].weight_updater
        done, message = updater.update_weights_from_disk(str(folders[name]), "auto")
        assert done, message
        return name, generated(runners[name])

    results = in_threads([lambda n=n: update(n) for n in order])
    raise_errors(results)
    return dict(results)


def create_a_model(folder: str) -> list[str]:
    """The files of a checkpoint that this rank alone makes in an initialised world."""
    import torch.distributed as dist
    from sglang_distguard.testing import create_model

    dist.init_process_group("gloo", init_method="env://")
    made = create_model("llama", Path(folder) / str(rank()))
    return sorted(file.name for file in made.iterdir())


def try_a_world_alone_first() -> dict[str, Any]:
    """Rank 0 tries twice to make SGLang's world before rank 1; then both try until it exists."""
    import sglang_distguard

    start()
    errors = []
    with sglang_distguard.runner_scope(agreement_timeout=1.0):
        if rank() == 0:
            errors = [attempt(lambda: build("dense")) for _ in range(2)]
            tell_others("tried")
        else:
            wait_for_others("tried", 1)
    with sglang_distguard.runner_scope(agreement_timeout=DEADLINE):
        for _ in range(4):
            error = attempt(lambda: build("dense"))
            if error is None:
                return {"errors": errors, "made": generated(_built[-1])}
            errors.append(error)
    return {"errors": errors, "made": None}
