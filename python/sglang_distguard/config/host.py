"""Whether this process belongs to a program around SGLang, and not to SGLang itself."""

from __future__ import annotations

import multiprocessing
import threading

from sglang_distguard.config import settings


def is_host() -> bool:
    """Whether the calling code of SGLang is a guest in a process that a program owns.

    SGLang runs each of its own processes on the main thread: its server, where only the plugin has
    installed the guard, and the child processes that ``multiprocessing`` starts (0.5.23). So it is a
    guest on every other thread, and in a program that has called ``install()`` itself. Acts on the
    whole process (its title, its signals, its log, its children) belong to the host.
    """
    if threading.current_thread() is not threading.main_thread():
        return True
    return multiprocessing.parent_process() is None and settings.installed().is_program
