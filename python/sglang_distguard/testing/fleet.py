"""Builds eight runners of five architectures from eight threads and checks what they compute.

This is the main claim of the project as code; its tests, its demo and its stress run use it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from sglang_distguard.context import generation
from sglang_distguard.testing import steps
from sglang_distguard.testing.models import create_model
from sglang_distguard.testing.recipe import server_args
from sglang_distguard.testing.reference import bit_equal, huggingface, max_abs_error
from sglang_distguard.testing.solo import STEPS, solo_many
from sglang_distguard.testing.steps import PROMPTS, Generation

if TYPE_CHECKING:
    import torch
    from sglang.srt.model_executor.model_runner import ModelRunner

#: Architecture and dtype of each of the eight.
MEMBERS: tuple[tuple[str, str], ...] = (
    ("gpt2", "float32"),
    ("gpt2", "bfloat16"),
    ("opt", "float32"),
    ("llama", "float32"),
    ("llama", "bfloat16"),
    ("mixtral", "bfloat16"),
    ("qwen3_moe", "float32"),
    ("qwen3_moe", "bfloat16"),
)
#: Largest absolute difference to Hugging Face that float32 may show (logits are of order 1).
FLOAT32_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Member:
    """One runner of the fleet: what it is and what it must compute."""

    name: str
    model: Path
    dtype: str
    alone: Generation


@dataclass
class Outcome:
    """The result for one member. ``seconds`` is the time its build took."""

    member: Member
    runner: Optional[ModelRunner] = None
    error: Optional[BaseException] = None
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def members(
    cache: Path, wanted: Sequence[tuple[str, str]] = MEMBERS, *, repeat: int = 1
) -> list[Member]:
    """The fleet, with what each runner computes alone (run now unless ``cache`` has it)."""
    requests = [(create_model(arch, cache / "models"), dtype) for arch, dtype in wanted]
    alone = solo_many(requests, cache / "solo")
    return [
        Member(f"{model.name.split('-')[0]}-{dtype}-{number}", model, dtype, generation)
        for number in range(repeat)
        for (model, dtype), generation in zip(requests, alone, strict=True)
    ]


def build_all(
    fleet: Sequence[Member],
    build: Callable[[Any, str], ModelRunner] = lambda args, _name: steps.build(args),
) -> list[Outcome]:
    """Build every member in a thread of its own, all at the same moment.

    Args:
        fleet: what to build.
        build: called with the ServerArgs and the name; default: SGLang's own steps.
    """
    import time

    outcomes = [Outcome(member) for member in fleet]

    def work(outcome: Outcome) -> None:
        member = outcome.member
        args = server_args(member.model, dtype=member.dtype)
        start.wait()
        begun = time.perf_counter()
        try:
            outcome.runner = build(args, member.name)
        except BaseException as error:
            outcome.error = error
        outcome.seconds = time.perf_counter() - begun

    start = threading.Barrier(len(fleet))
    in_threads(work, outcomes)
    return outcomes


def generate_all(
    outcomes: Sequence[Outcome],
    rounds: int,
    activate: Callable[[ModelRunner], Any],
) -> None:
    """Prefill and decode ``rounds`` times with all built runners at once; record the problems."""
    built = [outcome for outcome in outcomes if outcome.runner is not None]

    def work(outcome: Outcome) -> None:
        assert outcome.runner is not None
        start.wait()
        for number in range(rounds):
            try:
                result = steps.generate(outcome.runner, PROMPTS, STEPS, activate=activate)
            except BaseException as error:
                outcome.problems.append(f"round {number}: {error!r}")
                return
            alone = outcome.member.alone
            if not bit_equal(result.logits, alone.logits) or result.tokens != alone.tokens:
                off = max_abs_error(result.logits, alone.logits)
                outcome.problems.append(f"round {number}: logits differ from alone by {off:.3g}")

    start = threading.Barrier(max(1, len(built)))
    in_threads(work, built)


def huggingface_logits(member: Member) -> torch.Tensor:
    """Hugging Face's logits in float32 for the tokens that the member generates (alone)."""
    return huggingface(member.model, PROMPTS, member.alone.tokens)


def error_to_huggingface(member: Member) -> float:
    """Largest absolute difference of the member's logits (alone) to Hugging Face's in float32."""
    return max_abs_error(member.alone.logits, huggingface_logits(member))


def sharing_problems(
    outcomes: Sequence[Outcome], activate: Callable[[ModelRunner], Any]
) -> list[str]:
    """Describe what is wrong; empty if all runners use one world and one set of groups."""
    used: dict[str, set[int]] = {"world_group": set(), "tp_group": set(), "pp_group": set()}
    for outcome in outcomes:
        if outcome.runner is not None:
            with activate(outcome.runner):
                for field, seen in used.items():
                    seen.add(id(generation.current().stamped(field)))
    return [f"{len(seen)} different {field}s" for field, seen in used.items() if len(seen) > 1]


def parameter_dtypes(runner: ModelRunner) -> set[str]:
    """The dtypes of a runner's parameters, as ServerArgs names them."""
    return {str(parameter.dtype).removeprefix("torch.") for parameter in runner.model.parameters()}


def in_threads(work: Callable[[Outcome], None], outcomes: Sequence[Outcome]) -> None:
    """Run ``work`` for each outcome in a thread of its own and wait for all."""
    threads = [
        threading.Thread(target=work, args=(outcome,), name=f"fleet-{outcome.member.name}")
        for outcome in outcomes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def bystander() -> Iterator[list[str]]:
    """Run a thread that does not use SGLang and reads torch's default dtype all the time.

    Yields the list of changes that it saw; the list is empty when the guard works.
    """
    import torch

    expected = torch.get_default_dtype()
    seen: list[str] = []
    done, looking = threading.Event(), threading.Event()

    def look() -> None:
        while not done.is_set():
            dtypes = (
                torch.get_default_dtype(),
                torch.empty(1).dtype,
                torch.tensor(1.5).dtype,
                (torch.ones(1, dtype=torch.int64) / 2).dtype,
            )
            if any(dtype != expected for dtype in dtypes) and len(seen) < 10:
                seen.append(f"default dtype {expected} seen as {dtypes}")
            looking.set()

    thread = threading.Thread(target=look, name="bystander")
    thread.start()
    looking.wait()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
