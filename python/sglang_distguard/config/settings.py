"""Settings of the running code, from arguments or the environment: reuse, deadlines, name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, Optional, Union

from sglang_distguard_plugin import FALSE, VARIABLE

from sglang_distguard.config.checks import (
    check_flag,
    check_memory,
    check_name,
    check_seconds,
    shown,
)

TIMEOUT_VARIABLE = "SGLANG_DISTGUARD_TIMEOUT"
SLOW_VARIABLE = "SGLANG_DISTGUARD_SLOW_AFTER"
AGREEMENT_VARIABLE = "SGLANG_DISTGUARD_AGREEMENT_TIMEOUT"
PINNED_LOADS_VARIABLE = "SGLANG_DISTGUARD_PINNED_LOADS"
DEFAULT_TIMEOUT = 300.0
DEFAULT_SLOW_AFTER = 30.0
DEFAULT_AGREEMENT_TIMEOUT = 60.0
#: Whether a runner owns or shares its communicators in a world of several ranks: see ``install``.
GROUP_POLICIES = ("own", "share")
#: Whether a runner on a GPU has a stream of its own: see ``install``.
STREAM_POLICIES = ("share", "own")
_TRUE = frozenset({"1", "true", "yes", "on", "y"})


@dataclass(frozen=True)
class Settings:
    """Settings in force.

    Attributes:
        reuse: whether an equal request joins existing state.
        timeout: seconds that one wait may take; ``math.inf`` for no deadline.
        name: the name given to the runner that is being built, if any.
        slow_after: seconds after which a leader that others wait for is logged as slow.
        agreement_timeout: seconds that the ranks of a world may take for each stage of agreement.
        groups: "own" or "share", in a world of several ranks.
        pinned_loads: whether weights for a GPU are read from files that are registered with CUDA.
        streams: "share" or "own", for runners on a GPU.
        memory: what a runner may use of its device, in bytes (int) or as a fraction of it (float).
        is_program: whether a program has installed the guard itself, not only SGLang's plugin.
    """

    reuse: bool = True
    timeout: float = DEFAULT_TIMEOUT
    name: Optional[str] = None
    slow_after: float = DEFAULT_SLOW_AFTER
    agreement_timeout: float = DEFAULT_AGREEMENT_TIMEOUT
    groups: str = GROUP_POLICIES[0]
    pinned_loads: bool = True
    streams: str = STREAM_POLICIES[0]
    memory: Union[int, float, None] = None
    is_program: bool = False


_installed = Settings()
_scope: ContextVar[Optional[Settings]] = ContextVar("sglang_distguard.settings", default=None)


def current() -> Settings:
    """Return the settings of the running thread or task."""
    return _scope.get() or _installed


def installed() -> Settings:
    """Return the settings that apply outside every ``runner_scope``."""
    return _installed


def set_installed(settings: Settings) -> None:
    """Set the settings that apply outside every ``runner_scope``."""
    global _installed
    _installed = settings


def reuse_from_environment() -> Optional[bool]:
    """Return ``SGLANG_ALLOW_REUSE_DISTRIBUTED`` as a bool; None when unset.

    Raises:
        ValueError: it is set to something that is neither true nor false.
    """
    return flag_from_environment(VARIABLE)


def flag_from_environment(variable: str) -> Optional[bool]:
    """Return an environment variable as a bool; None when unset.

    Raises:
        ValueError: it is set to something that is neither true nor false.
    """
    text = os.environ.get(variable)
    if text is None:
        return None
    if text.strip().lower() in _TRUE:
        return True
    if text.strip().lower() in FALSE:
        return False
    raise ValueError(f"{variable}={text!r} is neither true nor false")


def seconds_from_environment(variable: str) -> Optional[float]:
    """Return an environment variable in seconds; None when unset or empty.

    Raises:
        ValueError: it is set to something that is not a positive number of seconds.
    """
    text = os.environ.get(variable)
    if text is None or not text.strip():
        return None
    try:
        return check_seconds(variable, float(text))
    except ValueError as error:
        raise ValueError(f"{variable}={text!r}: {error}") from None


def choose(
    *,
    again: bool,
    reuse: Optional[bool] = None,
    timeout: Optional[float] = None,
    slow_after: Optional[float] = None,
    agreement_timeout: Optional[float] = None,
    groups: Optional[str] = None,
    pinned_loads: Optional[bool] = None,
    streams: Optional[str] = None,
) -> Settings:
    """Return the settings that ``install`` sets.

    Arguments come first. Values that are None come from the installed settings if ``again`` is
    true, else from the environment.

    Args:
        again: whether the guard is installed already.
        reuse, timeout, slow_after, agreement_timeout, groups, pinned_loads, streams: see
            ``install``; times in seconds.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or an environment variable is not usable.
    """
    if not again:
        # Where an argument is given, the variable is not read, even if its value is invalid.
        if reuse is None:
            reuse = reuse_from_environment()
        if timeout is None:
            timeout = seconds_from_environment(TIMEOUT_VARIABLE)
        if slow_after is None:
            slow_after = seconds_from_environment(SLOW_VARIABLE)
        if agreement_timeout is None:
            agreement_timeout = seconds_from_environment(AGREEMENT_VARIABLE)
        if pinned_loads is None:
            pinned_loads = flag_from_environment(PINNED_LOADS_VARIABLE)
    return _changed(
        _installed if again else Settings(),
        reuse=reuse,
        timeout=timeout,
        slow_after=slow_after,
        agreement_timeout=agreement_timeout,
        groups=groups,
        pinned_loads=pinned_loads,
        streams=streams,
    )


def _changed(base: Settings, **chosen: Any) -> Settings:
    """Return ``base`` with the values of ``chosen`` that are not None, after checking them."""
    checks: dict[str, Callable[[str, object], object]] = {
        "name": lambda _, value: check_name(value),
        "reuse": check_flag,
        "groups": _one_of(GROUP_POLICIES),
        "pinned_loads": check_flag,
        "streams": _one_of(STREAM_POLICIES),
        "memory": check_memory,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    return replace(
        base,
        **{name: checks.get(name, check_seconds)(name, value) for name, value in given.items()},
    )


def _one_of(known: tuple[str, ...]) -> Callable[[str, object], str]:
    def check(name: str, value: object) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string, not {shown(value)}")
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {shown(value)}")
        return value

    return check


@contextmanager
def runner_scope(
    name: Optional[str] = None,
    *,
    reuse: Optional[bool] = None,
    timeout: Optional[float] = None,
    agreement_timeout: Optional[float] = None,
    groups: Optional[Literal["own", "share"]] = None,
    pinned_loads: Optional[bool] = None,
    streams: Optional[Literal["share", "own"]] = None,
    memory: Union[int, float, None] = None,
) -> Iterator[Settings]:
    """Apply settings to what the calling thread (or asyncio task) builds inside the with block.

    An argument that is None leaves the setting in force (see ``install``).

    Args:
        name: name of the runner that is built inside, 1 to 200 printable characters. Errors, events
            and ``snapshot()`` show it. Runners of one name on several ranks belong together.
        reuse: whether the runner may reuse an equal world and equal groups.
        timeout: seconds that one wait for another thread may take; ``math.inf`` for no deadline.
        agreement_timeout: seconds that the ranks may take for each stage of agreement.
        groups: "own" or "share", in a world of several ranks: see ``install``.
        pinned_loads: whether weights for a GPU are read from registered files: see ``install``.
        streams: "share" or "own", for runners on a GPU: see ``install``.
        memory: what each runner that is built inside may use of its device for weights and
            key-value cache, in bytes (int) or as a fraction of the device (float).

    Yields:
        The settings in force inside the with block.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """
    chosen = _changed(
        current(),
        name=name,
        reuse=reuse,
        timeout=timeout,
        agreement_timeout=agreement_timeout,
        groups=groups,
        pinned_loads=pinned_loads,
        streams=streams,
        memory=memory,
    )
    token = _scope.set(chosen)
    try:
        yield chosen
    finally:
        _scope.reset(token)
