"""Which SGLang this is, found by looking at its source, and what distguard changes in it."""

from sglang_distguard.adapters.generations import choose

__all__ = ["choose"]
