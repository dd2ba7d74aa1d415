"""What applies to the code that is running: reuse, deadline, runner name. Args, then environment."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Optional

REUSE_VARIABLE = "SGLANG_ALLOW_REUSE_DISTRIBUTED"
TIMEOUT_VARIABLE = "SGLANG_DISTGUARD_TIMEOUT"
SLOW_VARIABLE = "SGLANG_DISTGUARD_SLOW_AFTER"
DEFAULT_TIMEOUT = 300.0
DEFAULT_SLOW_AFTER = 30.0
MAX_NAME = 200
_TRUE = frozenset({"1", "true", "yes", "on", "y"})
_FALSE = frozenset({"", "0", "false", "no", "off", "n"})


@dataclass(frozen=True)
class Settings:
    """Settings in force.

    Attributes:
        reuse: whether an equal request joins what exists.
        timeout: seconds that one wait may take; ``math.inf`` for no deadline.
        name: the name given to the runner that is being built, if any.
        slow_after: seconds after which a leader that others wait for is logged as slow.
    """

    reuse: bool = True
    timeout: float = DEFAULT_TIMEOUT
    name: Optional[str] = None
    slow_after: float = DEFAULT_SLOW_AFTER


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
    text = os.environ.get(REUSE_VARIABLE)
    if text is None:
        return None
    if text.strip().lower() in _TRUE:
        return True
    if text.strip().lower() in _FALSE:
        return False
    raise ValueError(f"{REUSE_VARIABLE}={text!r} is neither true nor false")


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
    reuse: Optional[bool], timeout: Optional[float], slow_after: Optional[float], *, again: bool
) -> Settings:
    """What ``install`` sets: its arguments, else what is set already, else the environment.

    Raises:
        TypeError, ValueError: an argument or environment variable is not usable.
    """
    base = _installed if again else Settings()
    # A variable is not looked at where an argument is given: that wins, also over a mistyped one.
    if reuse is None and not again:
        reuse = reuse_from_environment()
    if timeout is None and not again:
        timeout = seconds_from_environment(TIMEOUT_VARIABLE)
    if slow_after is None and not again:
        slow_after = seconds_from_environment(SLOW_VARIABLE)
    if reuse is not None:
        base = replace(base, reuse=check_flag("reuse", reuse))
    if timeout is not None:
        base = replace(base, timeout=check_seconds("timeout", timeout))
    if slow_after is not None:
        base = replace(base, slow_after=check_seconds("slow_after", slow_after))
    return base


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
) -> Iterator[Settings]:
    """Settings for what the calling thread (or asyncio task) builds inside the with block.

    Args:
        name: name of the runner built inside; in errors, events and ``snapshot()``.
        reuse: whether it may reuse an equal world and equal groups; None keeps the setting in
            force (``install(reuse=…)``).
        timeout: seconds that one wait may take; None keeps the setting in force.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """
    chosen = current()
    if name is not None:
        chosen = replace(chosen, name=check_name(name))
    if reuse is not None:
        chosen = replace(chosen, reuse=check_flag("reuse", reuse))
    if timeout is not None:
        chosen = replace(chosen, timeout=check_seconds("timeout", timeout))
    token = _scope.set(chosen)
    try:
        yield chosen
    finally:
        _scope.reset(token)
