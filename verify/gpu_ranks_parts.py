"""The parts of ``gpu_ranks.py``: what the processes of two ranks do."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import gpu_ranks_one_card as one_card

#: Architecture and seed. SGLang 0.5.23 cannot split a GPT-2; the kernels of OPT need no flashinfer.
#: Collectives of equal sizes that meet each other are not refused, so that the bits show it.
MODELS = ("opt-0", "opt-1")
STEPS = 8
#: Runners that the section ``memory`` builds after the first.
FURTHER = 5
#: Seconds that ranks of the section ``death`` wait for each other, and that its threads may take.
AGREEMENT, HEAR = 10.0, 60.0
MIB = 2**20


def say(*words: Any) -> None:
    print(*words, flush=True)


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


@dataclass
class Rank:
    """One of the processes of a part.

    Attributes:
        models: folder of the checkpoints.
        folder: folder that all processes of this program share.
        label: name of the part; the names of its files begin with it.
        rank, size: of the world.
        port: where its ranks meet.
        tiny: whether there is no GPU.
        is_on_one_card: whether all ranks use one GPU, over which no collective is computed.
        limit: seconds for this process, once it has imported SGLang and its part has begun.
    """

    models: Path
    folder: Path
    label: str
    rank: int
    size: int
    port: int
    tiny: bool
    is_on_one_card: bool
    limit: float

    @property
    def gpu(self) -> int:
        return 0 if self.is_on_one_card else self.rank

    def settings(self, model: str, mode: str = "eager", **options: Any) -> Any:
        from sglang_distguard.testing import create_model, graphs, server_args

        architecture, _, seed = model.rpartition("-")
        folder = create_model(architecture, self.models, seed=int(seed))
        how: dict[str, Any] = {"tp_size": self.size, "disable_custom_all_reduce": True}
        how["enforce_disable_flashinfer_allreduce_fusion"] = True
        if not self.tiny:
            how |= {"dtype": "bfloat16", "mem_fraction_static": 0.15, "max_total_tokens": 4096}
        if mode == "graphs":
            how |= graphs.CUDA_GRAPHS
        return server_args(folder, **{**how, **options})

    def plain(self, model: str, mode: str) -> Any:
        """Build a runner with SGLang's own steps and without the guard."""
        from sglang_distguard.testing import steps

        self.gate()
        self.device()
        settings = self.settings(model, mode)
        return steps.build(settings, gpu_id=self.gpu, world_rank=self.rank, port=self.port)

    def start(self, groups: str, **options: Any) -> Any:
        """Install the guard, make the world, and return the guard."""
        import sglang_distguard
        import torch.distributed as dist

        sglang_distguard.install(groups=groups, **options)  # type: ignore[arg-type]
        self.gate()
        self.device()
        address = f"tcp://127.0.0.1:{self.port}"
        backend = "gloo" if self.tiny else "nccl"
        dist.init_process_group(backend, address, rank=self.rank, world_size=self.size)
        return sglang_distguard

    def build(self, model: str, mode: str, name: str, **options: Any) -> Any:
        import sglang_distguard

        self.device()
        settings = self.settings(model, mode, **options)
        return sglang_distguard.build_runner(settings, name=name, gpu_id=self.gpu)

    def device(self) -> None:
        """Make this rank's GPU the thread's current device."""
        if not self.tiny:
            import torch

            torch.cuda.set_device(self.gpu)

    def wait(self) -> None:
        """Wait until the GPU has done what this thread gave it."""
        if not self.tiny:
            import torch

            torch.cuda.synchronize()

    def file(self, event: str, rank: Optional[int] = None) -> Path:
        return self.folder / f"{self.label} {event}{'' if rank is None else f' {rank}'}"

    def meet(self, event: str) -> None:
        """Wait for the other ranks, without the world and its store."""
        self.file(event, self.rank).touch()
        for other in range(self.size):
            wait_for(self.file(event, other))

    def gate(self) -> None:
        """Say that this rank has imported SGLang, and wait until it is this part's time."""
        import sglang.srt.model_executor.model_runner  # noqa: F401

        if self.is_on_one_card:
            one_card.leave_out_collectives()
        self.file("ready", self.rank).touch()
        wait_for(self.file("go"))
        faulthandler.dump_traceback_later(self.limit - 5, exit=True)


def wait_for(file: Path) -> None:
    parent = os.getppid()
    while not file.exists():
        if os.getppid() != parent:
            raise TimeoutError("the program that began this process has ended")
        time.sleep(0.005)


def generation(runner: Any, steps: int = STEPS, **how: Any) -> Any:
    from sglang_distguard.testing import steps as sglang_steps

    return sglang_steps.generate(runner, steps=steps, **how).logits


def in_a_block(guard: Any, runner: Any, steps: int = STEPS) -> Any:
    """Generate in one block of ``turn``: a turn for all forwards and samples."""
    with guard.turn(runner):
        return generation(runner, steps, activate=guard.activate)


def in_threads(works: Sequence[Callable[[], Any]], apart: float, limit: float) -> list[Any]:
    """Call each in a thread of its own, ``apart`` seconds one after the other.

    Returns what each returned, the error that it raised, or None after ``limit`` seconds.
    """
    ended: list[Any] = [None] * len(works)

    def run(index: int) -> None:
        try:
            ended[index] = works[index]()
        except BaseException as error:
            ended[index] = error

    threads = [threading.Thread(target=run, args=(it,), daemon=True) for it in range(len(works))]
    for thread in threads:
        thread.start()
        time.sleep(apart)
    until = time.monotonic() + limit
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0))
    return ended


def build_both(at: Rank, mode: str) -> dict[str, Any]:
    """Build a runner of each model at once, in opposite order on the two ranks."""
    order = MODELS[:: 1 if at.rank == 0 else -1]
    begun = time.perf_counter()
    built = in_threads([lambda it=it: at.build(it, mode, it) for it in order], 0.1, at.limit)
    for model, runner in zip(order, built, strict=True):
        if runner is None:
            raise TimeoutError(f"{model} is still being built")
        if isinstance(runner, BaseException):
            raise runner
    say(f"both built at once in {time.perf_counter() - begun:.1f} s, {order[0]} first")
    return dict(zip(order, built, strict=True))


def reference(at: Rank, model: str, mode: str) -> bool:
    """Run one model with plain SGLang, twice, and keep its logits."""
    import torch

    runner = at.plain(model, mode)
    first, second = generation(runner), generation(runner)
    torch.save(first, at.folder / f"{model}-{mode}-{at.size}-{at.rank}.pt")
    same = torch.equal(first, second)
    say(f"the same bits a second time: {'yes' if same else 'NO'}")
    return same


def rounds(at: Rank, groups: str, mode: str) -> bool:
    """Use both runners from two threads, in opposite order; say how many bits differ.

    Every other generation is in a block of ``turn``.
    """
    import torch
    from sglang_distguard.testing import bit_equal

    guard = at.start(groups)
    runners = build_both(at, mode)
    expected = {it: torch.load(at.folder / f"{it}-{mode}-2-{at.rank}.pt") for it in MODELS}
    count = 5 if at.tiny else 100

    def use(model: str) -> int:
        at.device()
        wrong = 0
        for number in range(count):
            runner = runners[model]
            if number % 2:
                made = in_a_block(guard, runner)
            else:
                made = generation(runner, activate=guard.activate)
            wrong += not bit_equal(made, expected[model])
        return wrong

    begun = time.perf_counter()
    order = list(runners)
    found = in_threads([lambda it=it: use(it) for it in order], 0.02, at.limit)
    seconds = time.perf_counter() - begun
    for model, wrong in zip(order, found, strict=True):
        if wrong is None:
            wrong = "not at their end"
        if isinstance(wrong, BaseException):
            wrong = short(wrong)
        say(f"{model}: of {count} generations had other bits than alone: {wrong}")
    say(f"{count * len(order)} generations in {seconds:.1f} s, half of them in blocks")
    return found == [0] * len(order)


def memory(at: Rank, groups: str, mode: str) -> bool:
    """Say what each further runner adds to this process and its GPU, and what closing leaves."""
    import torch
    import torch.distributed as dist

    def held() -> dict[str, int]:
        gc.collect()
        card = 0
        if not at.tiny:
            at.wait()
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            card = (total - free) // MIB
        return {
            "MiB of the card": card,
            "process groups": len(dist.distributed_c10d._world.pg_map),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
        }

    guard = at.start(groups)
    runners: list[Any] = []
    seen = [held()]
    for number in range(1 + FURTHER):
        runner = at.build(MODELS[0], mode, f"runner {number}")
        runners.append(runner)
        generation(runner, activate=guard.activate)
        at.meet(f"built {number}")
        seen.append(held())
        at.meet(f"looked {number}")
    for runner in runners:
        guard.close(runner)
    runner = None
    runners.clear()
    at.meet("closed")
    seen.append(held())
    for what in seen[0]:
        values = [it[what] for it in seen]
        added = [after - before for before, after in itertools.pairwise(values[:-1])]
        say(
            f"{what}: {values[0]} in the world; the first runner adds {added[0]}, each further one "
            f"{', '.join(map(str, added[1:]))}; {values[-1]} after all are closed"
        )
    return seen[-1]["process groups"] <= seen[1]["process groups"]


def death(at: Rank, groups: str, mode: str) -> bool:
    """Kill rank 1 in a forward; say what the threads of rank 0 hear, and let it go on alone.

    With the mode "block" the forward is in a block of ``turn``, and so is rank 0. With "graphs"
    rank 1 is killed where it would replay a graph, for which rank 0's graph waits on the GPU.
    """
    import torch
    import torch.distributed as dist
    from sglang.srt import runtime_context
    from sglang_distguard.testing import bit_equal
    from torch._C._distributed_c10d import FileStore

    guard = at.start(groups, agreement_timeout=AGREEMENT)
    runners = build_both(at, "graphs" if mode == "graphs" else "eager")
    heard: dict[str, float] = {}

    def use(model: str) -> None:
        at.device()
        try:
            while True:
                if mode == "block" and model == MODELS[0]:
                    in_a_block(guard, runners[model])
                else:
                    generation(runners[model], activate=guard.activate)
        finally:
            heard[model] = time.time()

    def killing(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if at.file("kill").exists():
            at.file("killed new").write_text(str(time.time()))
            at.file("killed new").rename(at.file("killed"))
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(*args, **kwargs)

    if at.rank == 1:
        runner = runners[MODELS[0]]
        owner, name = runner.model, "forward"
        if mode == "graphs":
            owner, name = runner.decode_cuda_graph_runner.backend, "replay"
        real = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: killing(real, *args, **kwargs))
    else:
        threading.Timer(2.0, at.file("kill").touch).start()
    order = list(runners)
    ended = in_threads([lambda it=it: use(it) for it in order], 0.02, 2 + HEAR)
    killed = float(at.file("killed").read_text())
    for model, error in zip(order, ended, strict=True):
        if error is None:
            say(f"{model}: nothing heard {time.time() - killed:.1f} s after the kill")
        else:
            say(f"{model}: {heard[model] - killed:.1f} s after the kill {short(error)}")
    if None in ended:
        faulthandler.dump_traceback(all_threads=True)
        return False
    for name in order:
        guard.close(runners[name])
    runners.clear()
    ended.clear()
    dist.destroy_process_group()
    runtime_context.reset_context()  # 0.5.23 keeps this rank's number in the old world
    os.environ.update(WORLD_SIZE="1", RANK="0")
    store = FileStore(str(at.file("next world")), 1)
    dist.init_process_group("gloo" if at.tiny else "nccl", store=store, rank=0, world_size=1)
    runner = at.build(MODELS[0], "eager", "alone again", tp_size=1)
    made = generation(runner, activate=guard.activate)
    right = bit_equal(made, torch.load(at.folder / f"{MODELS[0]}-eager-1-0.pt"))
    say(f"a runner of one rank in the same process: {'right' if right else 'WRONG'}")
    return right
