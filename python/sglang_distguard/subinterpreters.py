"""Refuse subinterpreters before the native module is loaded: in them PyO3 0.30 waits for ever."""

from __future__ import annotations

import ctypes

from sglang_distguard.errors import SubinterpreterError


def require_main() -> None:
    """Do nothing in the main interpreter.

    Raises:
        SubinterpreterError: this is a subinterpreter.
    """
    api = ctypes.pythonapi
    api.PyInterpreterState_Get.restype = ctypes.c_void_p
    api.PyInterpreterState_GetID.argtypes = [ctypes.c_void_p]
    api.PyInterpreterState_GetID.restype = ctypes.c_int64
    number = api.PyInterpreterState_GetID(api.PyInterpreterState_Get())
    if number != 0:
        raise SubinterpreterError(
            f"sglang_distguard was imported in subinterpreter {number}, but there is one registry "
            "per process, and torch does not run in subinterpreters. Import it in the main "
            "interpreter and use threads, or processes started with spawn",
            interpreter=number,
        )
