"""Entry point ``sglang.srt.plugins``: installs the guard in processes that SGLang starts."""

from __future__ import annotations

from sglang_distguard import settings


def load() -> None:
    """Install when ``SGLANG_ALLOW_REUSE_DISTRIBUTED`` is true; else change nothing.

    SGLang (0.5.11 and later) calls this in each of its processes; it logs what this raises and
    goes on without the plugin.
    """
    if settings.reuse_from_environment():
        from sglang_distguard.installation import install

        install()
