"""No garbage is collected while modules of SGLang are executed.

An import makes objects that stay, a million of them. Full collections look through all of them, again
and again: some 2 of the 16 seconds of processor time in which a process imports SGLang 0.5.23 and starts
an engine (docs/engine-numbers.md). What other threads drop meanwhile is collected afterwards.
"""

from __future__ import annotations

import gc

from sglang_distguard.config.overlapping import Overlapping


class Imports(Overlapping):
    """The executions that are under way in this process; a process that does not collect stays so."""

    def __init__(self) -> None:
        super().__init__(lambda: not gc.isenabled(), gc.disable, gc.enable)


IMPORTS = Imports()
