"""What applies to the code that is running: reuse, deadline, runner name. Args, then environment."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, Optional

from sglang_distguard_plugin import FALSE, VARIABLE

TIMEOUT_VARIABLE = "SGLANG_DISTGUARD_TIMEOUT"
SLOW_VARIABLE = "SGLANG_DISTGUARD_SLOW_AFTER"
AGREEMENT_VARIABLE = "SGLANG_DISTGUARD_AGREEMENT_TIMEOUT"
DEFAULT_TIMEOUT = 300.0
DEFAULT_SLOW_AFTER = 30.0
DEFAULT_AGREEMENT_TIMEOUT = 60.0
#: What a runner of a world of several ranks does about communicators: see ``install``.
GROUP_POLICIES = ("own", "share")
MAX_NAME = 200
_TRUE = frozenset({"1", "true", "yes", "on", "y"})


@dataclass(frozen=True)
class Settings:
    """Settings in force.

    Attributes:
        reuse: whether an equal request joins what exists.
        timeout: seconds that one wait may take; ``math.inf`` for no deadline.
        name: the name given to the runner that is being built, if any.
        slow_after: seconds after which a leader that others wait for is logged as slow.
        agreement_timeout: seconds that the ranks of a world may take for each step of agreeing.
        groups: "own" or "share", in a world of several ranks.
    """

    reuse: bool = True
    timeout: float = DEFAULT_TIMEOUT
    name: Optional[str] = None
    slow_after: float = DEFAULT_SLOW_AFTER
    agreement_timeout: float = DEFAULT_AGREEMENT_TIMEOUT
    groups: str = GROUP_POLICIES[0]


_installed = Settings()
_scope: ContextVar[Optional[Settings]] = ContextVar("sglang_distguard.settings", default=None)


def current() -> Settings:
    """The settings of the running thread or task."""
    return _scope.get() or _installed


def installed() -> Settings:
    """What applies outside every ``runner_scope``."""
    return _installed


def set_installed(settings: Settings) -> None:
    """Set what applies outside every ``runner_scope``."""
    global _installed
    _installed = settings


def reuse_from_environment() -> Optional[bool]:
    """``SGLANG_ALLOW_REUSE_DISTRIBUTED`` as a bool, None when unset.

    Raises:
        ValueError: it is set to something that is neither true nor false.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    if text.strip().lower() in _TRUE:
        return True
    if text.strip().lower() in FALSE:
        return False
    raise ValueError(f"{VARIABLE}={text!r} is neither true nor false")


def seconds_from_environment(variable: str) -> Optional[float]:
    """An environment variable in seconds, None when unset or empty.

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
) -> Settings:
    """What ``install`` sets: its arguments, else what is set already, else the environment.

    Raises:
        TypeError, ValueError: an argument or environment variable is not usable.
    """
    if not again:
        # A variable is not looked at where an argument is given: that wins, also over a mistyped one.
        if reuse is None:
            reuse = reuse_from_environment()
        if timeout is None:
            timeout = seconds_from_environment(TIMEOUT_VARIABLE)
        if slow_after is None:
            slow_after = seconds_from_environment(SLOW_VARIABLE)
        if agreement_timeout is None:
            agreement_timeout = seconds_from_environment(AGREEMENT_VARIABLE)
    return _changed(
        _installed if again else Settings(),
        reuse=reuse,
        timeout=timeout,
        slow_after=slow_after,
        agreement_timeout=agreement_timeout,
        groups=groups,
    )


def _changed(base: Settings, **chosen: Any) -> Settings:
    """``base`` with what is not None, checked."""
    checks: dict[str, Callable[[str, object], object]] = {
        "name": lambda _, value: check_name(value),
        "reuse": check_flag,
        "groups": _check_groups,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    return replace(
        base,
        **{name: checks.get(name, check_seconds)(name, value) for name, value in given.items()},
    )


def _check_groups(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {shown(value)}")
    if value not in GROUP_POLICIES:
        raise ValueError(f"{name} must be one of {', '.join(GROUP_POLICIES)}, not {shown(value)}")
    return value


def shown(value: object) -> str:
    """``value`` for a message: what it prints, shortened, and its type. Never raises."""
    try:
        text = " ".join(repr(value).splitlines())
    except Exception:  # a wrong argument may be anything, also an object that cannot print itself
        text = object.__repr__(value)
    if len(text) > 80:
        text = text[:79] + "…"
    return f"{text} ({type(value).__name__})"


def check_seconds(name: str, value: object) -> float:
    """Return ``value`` in seconds.

    Raises:
        TypeError: not a number.
        ValueError: zero, negative, not a number at all, or too large for a float.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be seconds as int or float, not {shown(value)}")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.nan
    if math.isnan(seconds) or seconds <= 0:
        raise ValueError(
            f"{name} must be more than 0 seconds (math.inf for no limit), not {shown(value)}"
        )
    return seconds


def check_flag(name: str, value: object) -> bool:
    """Return ``value``, which must be a bool (TypeError otherwise)."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {shown(value)}")
    return value


def check_whole(name: str, value: object, *, least: int, most: Optional[int] = None) -> int:
    """Return ``value``, an int from ``least`` to ``most``.

    Raises:
        TypeError: not an int, or a bool.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {shown(value)}")
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {wanted}, not {shown(value)}")
    return value


def check_name(name: object) -> str:
    """Return ``name``, a non-empty string of at most 200 characters (TypeError, ValueError)."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, not {shown(name)}")
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"name must be 1 to {MAX_NAME} printable characters, not {shown(name)}")
    return name


@contextmanager
def runner_scope(
    name: Optional[str] = None,
    *,
    reuse: Optional[bool] = None,
    timeout: Optional[float] = None,
    agreement_timeout: Optional[float] = None,
    groups: Optional[Literal["own", "share"]] = None,
) -> Iterator[Settings]:
    """Settings for what the calling thread (or asyncio task) builds inside the with block.

    What is None stays as it is in force (``install``).

    Args:
        name: name of the runner built inside; in errors, events and ``snapshot()``, and how the
            ranks of a world know which runners belong together.
        reuse: whether it may reuse an equal world and equal groups.
        timeout: seconds that one wait for another thread may take.
        agreement_timeout: seconds that the ranks may take for each step of agreeing.
        groups: "own" or "share", in a world of several ranks: see ``install``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """
    chosen = _changed(
        current(),
        name=name,
        reuse=reuse,
        timeout=timeout,
        agreement_timeout=agreement_timeout,
        groups=groups,
    )
    token = _scope.set(chosen)
    try:
        yield chosen
    finally:
        _scope.reset(token)
