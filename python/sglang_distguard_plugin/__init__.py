"""Entry point ``sglang.srt.plugins``: installs the guard in processes that SGLang starts.

This is a package of its own because SGLang loads it in each of its processes. Where the guard is
switched off, nothing of the guard is imported.
"""

import os

#: Whether equal requests join existing state, and whether SGLang's own processes install the guard.
VARIABLE = "SGLANG_ALLOW_REUSE_DISTRIBUTED"
#: Values of the variable, in lower case, that mean false.
FALSE = frozenset({"", "0", "false", "no", "off", "n"})


def load() -> None:
    """Install the guard when ``SGLANG_ALLOW_REUSE_DISTRIBUTED`` is true; else change nothing.

    SGLang (0.5.11 and later) calls this in each of its processes. It logs an exception that this
    raises, and continues without the plugin.

    Raises:
        ValueError: the variable is set to a text that is neither true nor false.
        NotSupported: see ``sglang_distguard.install``.
    """
    if os.environ.get(VARIABLE, "").strip().lower() in FALSE:
        return
    from sglang_distguard.config.settings import reuse_from_environment
    from sglang_distguard.process.installation import install_for_sglang

    if reuse_from_environment():
        install_for_sglang()
