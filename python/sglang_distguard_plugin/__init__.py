"""Entry point ``sglang.srt.plugins``: installs the guard in processes that SGLang starts.

A package of its own, for SGLang loads it in each of its processes: where the guard is switched off
nothing of it is imported.
"""

import os

#: Whether equal requests join what exists, and whether SGLang's own processes install the guard.
VARIABLE = "SGLANG_ALLOW_REUSE_DISTRIBUTED"
#: Its values, in lower case, that mean no.
FALSE = frozenset({"", "0", "false", "no", "off", "n"})


def load() -> None:
    """Install when ``SGLANG_ALLOW_REUSE_DISTRIBUTED`` is true; else change nothing.

    SGLang (0.5.11 and later) calls this in each of its processes; it logs what this raises and
    goes on without the plugin.

    Raises:
        ValueError: the variable is set to something that is neither true nor false.
        NotSupported: see ``sglang_distguard.install``.
    """
    if os.environ.get(VARIABLE, "").strip().lower() in FALSE:
        return
    from sglang_distguard.config.settings import reuse_from_environment
    from sglang_distguard.process.installation import install

    if reuse_from_environment():
        install()
