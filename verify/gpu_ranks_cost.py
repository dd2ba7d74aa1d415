"""What a forward of two ranks costs with the guard, and in blocks of ``turn``, beside plain SGLang.

A virtual machine's cores may have all of their speed or less, by a factor of 1.8 from one second to
the next (H200 machines, 2026-11-30). So plain SGLang and the guard, in processes of their own, are
measured in turn. Their fastest tenths are compared, and a loop beside each measurement, whose work
is always the same, shows how far the core's speed went.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from gpu_ranks_parts import MODELS, Rank, generation, in_a_block, in_threads, say, short, wait_for

#: In this order they are measured.
WAYS = ("plain", "own", "share")
#: Decode steps of a generation of which the time is taken; its prefill is one more forward.
STEPS = 31
#: How often each is measured.
TIMES = {"eager": 10, "graphs": 40}


class Measured(NamedTuple):
    """Milliseconds of a forward, and of the loop, before or afterwards, whichever took longer."""

    forward: float
    loop: float


def cost(at: Rank, groups: str, mode: str) -> bool:
    """Take the time of a forward of one runner; with the guard also in blocks, and of two at once."""
    steps, times = (2, 3) if at.tiny else (STEPS, TIMES[mode])
    runners, ways = _ways(at, groups, mode, steps)
    for way in ways.values():
        for runner in runners:
            for _ in range(3):
                way(runner)
    found: dict[str, list[Measured]] = {how: [] for how in ways}
    for number in range(times):
        _wait_in_line(at, groups, mode, number)
        for how, way in ways.items():
            _measure(at, way, runners[0], steps + 1)  # wakes the core
            found[how].append(_measure(at, way, runners[0], steps + 1))
        _measured(at, groups, mode, number)
    _wait_in_line(at, groups, mode, times)
    failed = []
    together: dict[str, float] = {}
    for how, way in ways.items():
        if len(runners) > 1 and not at.is_on_one_card:
            at.meet(f"one measured{how}")
            together[how], errors = _together(at, way, runners, steps + 1)
            failed += errors
    _measured(at, groups, mode, times)
    if at.rank == 0:
        _report(at, groups, mode, found, together)
    for error in failed:
        say(short(error) if isinstance(error, BaseException) else "not at its end")
    return not failed


def _ways(
    at: Rank, groups: str, mode: str, steps: int
) -> tuple[list[Any], dict[str, Callable[[Any], Any]]]:
    """Build what is measured; return the runners, and how one of them generates, by name."""
    if groups == "plain":
        runners = [at.plain(MODELS[0], mode)]
        generation(runners[0], 1)  # also where rank 1 does nothing: the first one makes buffers
        if at.is_on_one_card and at.rank > 0:
            return runners, {"": lambda runner: None}
        return runners, {"": lambda runner: generation(runner, steps)}
    guard = at.start(groups)
    runners = [at.build(MODELS[0], mode, name) for name in ("one", "two")]

    for runner in runners:
        in_a_block(guard, runner, 1)

    def empty(runner: Any) -> None:
        with guard.turn(runner):
            pass

    block, nothing = f", {steps + 1} in a block", f", the turn of {steps + 1} alone"
    if not at.is_on_one_card:
        return runners, {
            "": lambda runner: generation(runner, steps, activate=guard.activate),
            block: lambda runner: in_a_block(guard, runner, steps),
            nothing: empty,
        }
    # Without collectives no rank needs another one inside of a block.
    within = empty if at.rank > 0 else lambda runner: in_a_block(guard, runner, steps)
    return runners, {block: within, nothing: empty}


def _loop() -> float:
    """Milliseconds of work that is always the same."""
    begun, total = time.perf_counter(), 0
    for number in range(20_000):
        total += number
    return 1e3 * (time.perf_counter() - begun)


def _measure(at: Rank, way: Callable[[Any], Any], runner: Any, forwards: int) -> Measured:
    before = _loop()
    at.wait()
    begun = time.perf_counter()
    way(runner)
    at.wait()
    milliseconds = 1e3 * (time.perf_counter() - begun) / forwards
    return Measured(milliseconds, max(before, _loop()))


def _together(
    at: Rank, way: Callable[[Any], Any], runners: list[Any], forwards: int
) -> tuple[float, list[Any]]:
    """Milliseconds of a forward of all runners at once, and what went wrong."""
    times = 3 if at.tiny else 15

    def use(runner: Any) -> bool:
        at.device()
        for _ in range(times):
            way(runner)
        return True

    at.wait()
    begun = time.perf_counter()
    ended = in_threads([lambda it=it: use(it) for it in runners], 0, at.limit)
    at.wait()
    milliseconds = 1e3 * (time.perf_counter() - begun) / (forwards * times * len(runners))
    return milliseconds, [it for it in ended if it is not True]


def _wait_in_line(at: Rank, groups: str, mode: str, number: int) -> None:
    """Wait until it is this part's ``number``-th time to be measured."""
    before = WAYS.index(groups) - 1
    if before < 0:
        number -= 1
    if number >= 0:
        for rank in range(at.size):
            wait_for(at.folder / f"cost {mode} {WAYS[before]} {number} {rank}")


def _measured(at: Rank, groups: str, mode: str, number: int) -> None:
    (at.folder / f"cost {mode} {groups} {number} {at.rank}").touch()


def _report(
    at: Rank,
    groups: str,
    mode: str,
    found: dict[str, list[Measured]],
    together: dict[str, float],
) -> None:
    """Say what was found, also as a part of what plain SGLang takes."""
    shared = at.folder / f"cost {mode} plain"
    if groups == "plain":
        shared.with_suffix(".new").write_text(json.dumps(found[""]))
        shared.with_suffix(".new").rename(shared)
    wait_for(shared)
    plain = [Measured(*it) for it in json.loads(shared.read_text())]
    loops = [it.loop for those in found.values() for it in those]
    say(f"a loop of always the same work took {min(loops):.2f} to {max(loops):.2f} ms")
    for how, those in found.items():
        all_of_them = [it.forward for it in those]
        said = f"{statistics.median(all_of_them):.3f} ms a forward of one runner"
        said += f" ({min(all_of_them):.3f} to {max(all_of_them):.3f})"
        said += f"; the fastest tenth {_fastest(those):.3f}"
        if groups != "plain":
            said += f", {_fastest(those) / _fastest(plain):.3f} times plain SGLang's"
        if how in together:
            said += f"; {together[how]:.3f} ms a forward of two at once"
        say(f"{said}{how}")


def _fastest(those: list[Measured]) -> float:
    """The mean of the fastest tenth."""
    return statistics.mean(sorted(it.forward for it in those)[: max(len(those) // 10, 1)])
