"""Random invalid arguments, and a check that a refused call changes nothing.

``DISTGUARD_EXAMPLES`` is the number of random settings that each property is tried with.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import hypothesis
import sglang_distguard as dg
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.distributed import coordinators

Chosen = tuple[str, dict[str, Any]]

EXAMPLES = int(os.environ.get("DISTGUARD_EXAMPLES", "30"))
tried = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=False,
    database=None,
    suppress_health_check=[*hypothesis.HealthCheck],  # type: ignore[list-item]
)


class Unprintable:
    """A wrong argument whose ``repr`` raises when an error message needs it."""

    tested = False  # hypothesis prints it too

    def __repr__(self) -> str:
        if self.tested:
            raise RuntimeError("this cannot be printed")
        return "Unprintable()"


#: Includes lone surrogates, which no encoding accepts: undecodable file names decode to them.
TEXT = st.text(st.characters(exclude_categories=()), max_size=30)
#: Integers that a float cannot hold, or that Python does not print (over 4300 digits).
HUGE = st.builds(pow, st.sampled_from([-10, 10]), st.sampled_from([401, 6001]))
NUMBERS = st.integers() | st.floats() | HUGE
ANYTHING: SearchStrategy[Any] = st.one_of(
    st.none() | st.booleans() | NUMBERS | TEXT | st.binary(max_size=9) | st.complex_numbers(),
    st.lists(NUMBERS | TEXT, max_size=3) | st.sets(st.integers(), max_size=2),
    st.dictionaries(TEXT, NUMBERS, max_size=2),
    st.sampled_from([object(), int, len, ...]) | st.builds(Unprintable) | st.builds(mock.Mock),
)


def is_seconds(value: object) -> bool:
    """Whether ``value`` is a valid number of seconds for a wait."""
    with contextlib.suppress(OverflowError):
        return type(value) in (int, float) and float(value) > 0  # type: ignore[arg-type]
    return False


def is_count(value: object, *, least: int = 1, most: int = 2**63 - 1) -> bool:
    """Whether ``value`` is an int in range."""
    return type(value) is int and least <= value <= most


def is_name(value: object) -> bool:
    """Whether ``value`` may name a runner."""
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def wrong(
    is_right: Callable[[Any], bool] = lambda value: False, *, none: bool = True
) -> SearchStrategy[Any]:
    """Values that an argument refuses; ``none``: the argument accepts None."""
    return ANYTHING.filter(lambda value: not is_right(value) and not (none and value is None))


WRONG_FLAG = wrong(lambda value: isinstance(value, bool))
WRONG_TEXT = wrong(lambda value: isinstance(value, str))
RIGHT = {
    "name": st.none() | TEXT.filter(is_name),
    "reuse": st.none() | st.booleans(),
    "timeout": st.none() | st.floats(0, exclude_min=True) | st.integers(1, 2**53),
    "slow_after": st.none() | st.floats(0, exclude_min=True) | st.integers(1, 2**53),
    "nccl_port": st.none() | st.integers(1, 65535),
}
WRONG = {
    "name": wrong(is_name),
    "reuse": WRONG_FLAG,
    "timeout": wrong(is_seconds),
    "slow_after": wrong(is_seconds),
    "nccl_port": wrong(lambda value: is_count(value, most=65535)),
    "gpu_id": wrong(lambda value: is_count(value, least=0), none=False),
    "target": wrong(),
}


def some(values: Mapping[str, SearchStrategy[Any]], *names: str) -> dict[str, SearchStrategy[Any]]:
    """The strategies of ``names``."""
    return {name: values[name] for name in names}


def one_wrong(
    bad: Mapping[str, SearchStrategy[Any]], right: Mapping[str, SearchStrategy[Any]]
) -> SearchStrategy[Chosen]:
    """The name of one wrong argument, and arguments in which only that one is wrong."""

    def build(name: str) -> SearchStrategy[Chosen]:
        others = {other: right[other] for other in bad if other != name and other in right}
        chosen = st.fixed_dictionaries({name: bad[name]}, optional=others)
        return chosen.map(lambda arguments: (name, arguments))

    return st.sampled_from(sorted(bad)).flatmap(build)


def state() -> dict[str, Any]:
    """All state that a refused call must not change, without events and times."""
    seen = {**dg.snapshot(), "at": None, "events": None, "dropped_events": None}
    return {
        "snapshot": repr(seen),  # NaN in a spec is not equal to itself
        "installed": (dg.is_installed(), settings.installed()),
        "settings": settings.current(),
        "scope": (_core.current_scope(), _core.depth(), _core.live_runners(None)),
        "world": coordinators.default_process_group(),
        "environment": dict(os.environ),
    }


@dataclass
class Counted:
    """Calls made with random settings, and how many of them were refused."""

    calls: int = 0
    refused: int = 0


counted = Counted()


def is_refused(call: Callable[[], Any], *named: str) -> bool:
    """Whether ``call`` raises; the error must be a documented one that names one of ``named``."""
    counted.calls += 1
    before = state()
    told: list[str] = []
    try:
        with mock.patch.object(Unprintable, "tested", True):
            call()
    except (TypeError, ValueError, dg.DistGuardError) as error:
        told = [str(error), *getattr(error, "__notes__", [])]
    if not told:
        return False
    counted.refused += 1
    assert told[0].strip()
    assert any(name in line for name in named for line in told), told
    after = state()
    assert after == before, {key: (before[key], after[key]) for key in before}
    return True


def report() -> Iterator[None]:
    """A fixture that prints how many calls a module made; `make verify` shows it."""
    before = (counted.calls, counted.refused)
    yield
    calls, refused = counted.calls - before[0], counted.refused - before[1]
    print(f"\ncounted: {calls} calls with random settings, {refused} of them refused")
