"""Checks of arguments: each returns the value, or raises an error that shows it."""

from __future__ import annotations

import math
from typing import Optional

MAX_NAME = 200


def shown(value: object) -> str:
    """Return ``value`` for a message: its repr, shortened, and its type. Never raises."""
    try:
        text = " ".join(repr(value).splitlines())
    except Exception:  # a wrong argument may be an object whose repr raises
        text = object.__repr__(value)
    if len(text) > 80:
        text = text[:79] + "…"
    return f"{text} ({type(value).__name__})"


def check_seconds(name: str, value: object) -> float:
    """Return ``value``, a number of seconds, as a float; ``math.inf`` is allowed.

    Args:
        name: name of the argument, for messages.
        value: the argument.

    Raises:
        TypeError: not an int or float, or a bool.
        ValueError: zero, negative, NaN, or too large for a float.
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
    """Return ``value``, a bool.

    Raises:
        TypeError: not a bool.
    """
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


def check_memory(name: str, value: object) -> int | float:
    """Return ``value``, an amount of memory: bytes as an int, or a fraction of the device as a float.

    Raises:
        TypeError: neither, or a bool.
        ValueError: less than one byte, or a fraction that is not more than 0 and at most 1.
    """
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise ValueError(
                f"{name} must be a fraction of the device, more than 0 and at most 1, or bytes as "
                f"an int, not {shown(value)}"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be bytes as int, or a fraction of the device as float, not {shown(value)}"
        )
    return check_whole(name, value, least=1, most=2**63 - 1)


def check_name(name: object) -> str:
    """Return ``name``, the name of a runner.

    Raises:
        TypeError: not a string.
        ValueError: blank, longer than 200 characters, or not printable.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, not {shown(name)}")
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"name must be 1 to {MAX_NAME} printable characters, not {shown(name)}")
    return name
