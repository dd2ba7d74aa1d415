"""Runs runners of two ranks (tp_size=2) on two GPUs over NCCL: bits, cost, memory, and a death.

``python verify/gpu_ranks.py MODELS [rounds cost memory death]`` makes small checkpoints in the
folder MODELS. Every part runs in two processes of its own, one for each GPU, with a time limit; a
part that fails does not end the others.

- rounds: each model alone with plain SGLang, twice; then both in one process per rank, built and
  used from two threads that begin in opposite order on the two ranks, half of it in blocks of
  ``turn``.
- cost: milliseconds of a forward, with plain SGLang and with the guard, also in blocks
  (``gpu_ranks_cost.py``). With ``--one-card`` one GPU is enough, for this section alone.
- memory: what each further runner adds, and what stays when all are closed.
- death: one rank is killed in a forward, also in a block, and with decode graphs; the other builds
  a runner of its own.

With ``--tiny`` it runs a few rounds over gloo on a CPU, to try the program itself. Otherwise it
needs its GPUs, or says so and ends.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from gpu_ranks_cost import WAYS, cost
from gpu_ranks_parts import MODELS, Rank, death, memory, reference, rounds, say

SECTIONS = ("rounds", "cost", "memory", "death")
PARTS: dict[str, Callable[[Rank, str, str], bool]] = {
    "reference": reference,
    "rounds": rounds,
    "cost": cost,
    "memory": memory,
    "death": death,
}
MODES = ("eager", "graphs")
GROUPS = ("own", "share")
#: NVLink's multicast is not available on every machine with several GPUs.
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


@dataclass
class Part:
    """One part in processes of its own, one for each rank.

    Attributes:
        name, what, mode: of the part; what is a model, or how groups are made.
        size: number of ranks.
    """

    name: str
    what: str
    mode: str
    size: int = 2
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def label(self) -> str:
        ranks = "" if self.size == 2 else ", one rank"
        return f"{self.name} {self.what} {self.mode}{ranks}"

    def start(self, options: argparse.Namespace, folder: Path) -> None:
        """Start the ranks, which import SGLang and then wait for ``run``."""
        from sglang_distguard.config.ports import free_port

        port = free_port()
        for rank in range(self.size):
            numbers = ["--rank", str(rank), "--size", str(self.size), "--port", str(port)]
            how = ["--limit", str(options.limit)]
            how += ["--tiny"] * options.tiny + ["--one-card"] * options.one_card
            names = ["--folder", str(folder), "--label", self.label]
            part = ["--part", self.name, self.what, self.mode]
            command = [sys.executable, __file__, str(options.models), *numbers, *names, *how, *part]
            environment = {**ENVIRONMENT, **os.environ}
            files = (self.file(folder, rank, "out"), self.file(folder, rank, "err"))
            with files[0].open("wb") as out, files[1].open("wb") as err:
                process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
            self.processes.append(process)

    def file(self, folder: Path, rank: int, kind: str) -> Path:
        return folder / f"{self.label} {rank}.{kind}"

    def go(self, folder: Path, until: float) -> None:
        """Let the ranks begin when they have imported SGLang."""
        for rank, process in enumerate(self.processes):
            ready = folder / f"{self.label} ready {rank}"
            while not ready.exists() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
        (folder / f"{self.label} go").touch()

    def end(self, folder: Path, until: float) -> bool:
        """Wait for the ranks, print what they said, and return whether all is right."""
        codes: list[Optional[int]] = []
        for process in self.processes:
            try:
                codes.append(process.wait(max(until - time.monotonic(), 0.1)))
            except subprocess.TimeoutExpired:
                codes.append(None)
        self.kill()
        expected = [0, -signal.SIGKILL] if self.name == "death" else [0] * self.size
        for rank, code in enumerate(codes):
            for line in self.file(folder, rank, "out").read_text(errors="replace").splitlines():
                say(f"{self.label}, rank {rank}: {line}")
            if code != expected[rank]:
                ending = "not at its end in its time" if code is None else f"code {code}"
                told = self.file(folder, rank, "err").read_text(errors="replace")[-2500:]
                say(f"{self.label}, rank {rank}: ENDED with {ending}: {told}")
        return codes == expected

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def plan(sections: Sequence[str], modes: Sequence[str]) -> list[list[Part]]:
    """The parts of the sections: those of one list run at the same time, the lists in order.

    Processes that share GPUs take turns there, and a collective needs its two at the same moment.
    """
    references: list[Part] = []
    lists = [references]
    if "rounds" in sections:
        references += [Part("reference", model, mode) for model in MODELS for mode in modes]
        lists += [[Part("rounds", groups, mode) for groups in GROUPS] for mode in modes]
    if "death" in sections:
        references.append(Part("reference", MODELS[0], "eager", 1))
        ways = ["eager", "block", *(["graphs"] if "graphs" in modes else [])]
        lists += [[Part("death", groups, how) for groups in GROUPS] for how in ways]
    if "cost" in sections:
        lists += [[Part("cost", how, mode) for how in WAYS] for mode in modes]
    if "memory" in sections:
        lists += [[Part("memory", groups, mode)] for mode in modes for groups in GROUPS]
    return lists


def run(options: argparse.Namespace, folder: Path) -> bool:
    """Run the chosen sections; with GPUs, all processes import SGLang at once."""
    lists = plan(options.sections or SECTIONS, options.modes)
    parts = [part for those in lists for part in those]
    right = True
    try:
        for part in parts if not options.tiny else []:
            part.start(options, folder)
        for those in lists:
            for part in those:
                if not part.processes:
                    part.start(options, folder)
            until = time.monotonic() + options.limit
            for part in those:
                part.go(folder, until)
            until = time.monotonic() + options.limit
            ended = [part.end(folder, until) for part in those]
            right = right and all(ended)
    finally:
        for part in parts:
            part.kill()
    return right


def run_rank(at: Rank, part: str, what: str, mode: str) -> int:
    """Run one part in this process, as one of its ranks."""
    from sglang_distguard.testing import prepare_environment

    prepare_environment(ranks=2)
    try:
        right = PARTS[part](at, what, mode)
        if part != "death":  # the store ends with rank 0's process
            at.meet("end")
    except BaseException:
        say("FAILED: " + "\n  ".join(traceback.format_exc().strip().splitlines()[-14:]))
        right = False
    return 0 if right else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("sections", nargs="*", help=f"{', '.join(SECTIONS)}; default: all")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: both, with GPUs")
    parser.add_argument("--tiny", action="store_true", help="a few rounds over gloo on a CPU")
    parser.add_argument("--one-card", action="store_true", help="the section cost, on one GPU")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for one process")
    for name in ("--rank", "--size", "--port"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--label", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        rank, size, port = options.rank, options.size, options.port
        models, folder, label = options.models, options.folder, options.label
        on_one = options.one_card
        at = Rank(models, folder, label, rank, size, port, options.tiny, on_one, options.limit)
        code = run_rank(at, *options.part)
        sys.stdout.flush()
        os._exit(code)  # destructors of communicators whose peer is gone may wait for it
    if not set(options.sections) <= set(SECTIONS):
        parser.error(f"sections are {', '.join(SECTIONS)}")
    if options.one_card and options.sections != ["cost"]:
        parser.error("one card is enough for the section cost alone")
    import torch
    from sglang_distguard.testing import create_model

    options.modes = options.modes or (["eager"] if options.tiny else list(MODES))
    cards = 1 if options.one_card else 2
    if not options.tiny and torch.cuda.device_count() < cards:
        say(f"skipped: there are {torch.cuda.device_count()} GPUs here, and this needs {cards}")
        return 0
    begun = time.perf_counter()
    where = "CPU, gloo" if options.tiny else f"{cards} x {torch.cuda.get_device_name(0)}, NCCL"
    say(where, "torch", torch.__version__)
    for name in MODELS:
        architecture, _, seed = name.rpartition("-")
        create_model(architecture, options.models, seed=int(seed))
    with tempfile.TemporaryDirectory() as folder:
        right = run(options, Path(folder))
    say(f"all after {time.perf_counter() - begun:.0f} s; {'ok' if right else 'WRONG'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
