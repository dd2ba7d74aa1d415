"""The main test detects that any one of the four treatments is switched off."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreters import Has, run
from sglang_distguard.testing import fleet

TREATMENTS = ("registry", "scope", "dtype", "input buffers")


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_eight_runners_are_not_right_without(cache: Path, treatment: str) -> None:
    fleet.members(cache)
    call = f"test_without_a_treatment.main(CACHE, {treatment!r})\n"
    done = run("import test_without_a_treatment\n", call, has=Has.SGLANG)
    report = done.stdout[-3000:] + done.stderr[-3000:]
    assert "WRONG" in done.stdout, report
    print(done.stdout.strip().splitlines()[-1])


def switch_off(treatment: str) -> None:
    """Install the guard without one of its treatments."""
    from sglang_distguard import _core
    from sglang_distguard.hooks import (
        expert_location,
        generation_0_5_21,
        model_loader,
        parallel_state,
        torch_dtype,
        versions,
    )
    from sglang_distguard.patching import Scoped
    from sglang_distguard.sync import single_flight

    left_out: tuple[object, ...] = ()
    if treatment == "registry":

        def every_caller_leads(*_args: object, **callbacks: object) -> object:
            return callbacks["initialise"]()  # type: ignore[operator]

        for module in (single_flight, parallel_state, expert_location):
            module.run_once = every_caller_leads  # type: ignore[attr-defined]
    elif treatment == "scope":
        _core.Publishing = Replacing  # type: ignore[assignment, misc]
    elif treatment == "dtype":
        left_out = (*model_loader.CHANGES, *torch_dtype.CHANGES)
    elif treatment == "input buffers":
        module = "sglang.srt.model_executor.input_buffers"
        left_out = (Scoped(module, "_forward_input_buffer_pool"),)
    versions.GENERATIONS = {
        f"without {treatment}": lambda: [
            change for change in generation_0_5_21.changes() if change not in left_out
        ]
    }


class Replacing:
    """A publish like SGLang's own: the last one replaces the one context."""

    is_fresh = False

    def __init__(self, _label: str, *, is_other: bool, may_put_aside: bool) -> None:
        pass

    def __enter__(self) -> Replacing:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def succeed(self) -> None:
        pass


def main(cache: str, treatment: str) -> None:
    """Print RIGHT, or WRONG with the first problem."""
    import os

    import sglang_distguard

    switch_off(treatment)
    members = fleet.members(Path(cache))
    sglang_distguard.install(timeout=60)
    problems: list[str] = []
    with fleet.bystander() as seen:
        outcomes = fleet.build_all(members)
        for outcome in outcomes:
            if outcome.error is not None:
                problems.append(f"{outcome.member.name}: {outcome.error!r}"[:200])
            elif fleet.parameter_dtypes(outcome.runner) != {outcome.member.dtype}:  # type: ignore[arg-type]
                problems.append(f"{outcome.member.name}: parameters of another dtype")
        problems += fleet.sharing_problems(outcomes, sglang_distguard.activate)
        if not problems:
            for _ in range(20):
                fleet.generate_all(outcomes, 5, sglang_distguard.activate)
                if any(outcome.problems for outcome in outcomes):
                    break
    problems += [f"{o.member.name}: {problem}" for o in outcomes for problem in o.problems[:1]]
    problems += seen[:1]
    verdict = "RIGHT" if not problems else f"WRONG ({len(problems)} problems, first: {problems[0]})"
    print(f"without {treatment}: {verdict}", flush=True)
    os._exit(0)  # half-built runners need no orderly exit
