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
DEFAULT_TIMEOUT = 300.0
DEFAULT_SLOW_AFTER = 30.0
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


def timeout_from_environment() -> Optional[float]:
    """``SGLANG_DISTGUARD_TIMEOUT`` in seconds, None when unset.

    Raises:
        ValueError: it is set to something that is not a positive number of seconds.
    """
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None or not text.strip():
        return None
    try:
        return check_timeout(float(text))
    except ValueError as error:
        raise ValueError(f"{TIMEOUT_VARIABLE}={text!r}: {error}") from None


def check_timeout(timeout: object) -> float:
    """Return ``timeout`` in seconds.

    Raises:
        TypeError: not a number.
        ValueError: zero, negative or not a number at all.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be seconds as int or float, not {type(timeout).__name__}")
    if math.isnan(timeout) or timeout <= 0:
        raise ValueError(f"timeout must be more than 0 seconds, not {timeout}")
    return float(timeout)


def check_flag(name: str, value: object) -> bool:
    """Return ``value``, which must be a bool (TypeError otherwise)."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True, False or None, not {type(value).__name__}")
    return value


def check_name(name: object) -> str:
    """Return ``name``, a non-empty string of at most 200 characters (TypeError, ValueError)."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, not {type(name).__name__}")
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise ValueError(f"name must be 1 to 200 printable characters, not {name[:40]!r}")
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
        chosen = replace(chosen, timeout=check_timeout(timeout))
    token = _scope.set(chosen)
    try:
        yield chosen
    finally:
        _scope.reset(token)
