"""Checks of arguments: each returns the value, or raises and shows it."""

from __future__ import annotations

import math
from typing import Optional

MAX_NAME = 200


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
