"""The one list of process-globals: each row names what does it, and what does it is there."""

from __future__ import annotations

import importlib

from sglang_distguard.distributed import coordinators
from sglang_distguard.hooks import generation_0_5_23, process_globals
from sglang_distguard.hooks.process_globals import TREATMENTS, How

#: torch keeps these for each thread itself.
TORCHS = ("torch._inductor.config", "torch._inductor.config.triton", "torch._dynamo.config")


def test_every_row_that_is_not_harmless_is_done_by_something() -> None:
    scoped = {
        (module, name) for module, names in process_globals.scoped().items() for name in names
    }
    hooks = {hook.__name__ for hook in generation_0_5_23.HOOKS}
    for row in TREATMENTS:
        if row.how is How.HARMLESS or row.module in TORCHS:
            assert not row.by, row
        elif row.by:
            name = f"sglang_distguard.{row.by}"
            importlib.import_module(name)
            assert ".hooks." not in name or name in hooks, row
        else:
            assert (row.module, row.name) in scoped, row


def test_no_global_has_two_rows() -> None:
    keys = [(row.module, row.name) for row in TREATMENTS]
    assert len(set(keys)) == len(keys)


def test_whatever_is_scoped_of_the_groups_module_is_stamped_or_compared() -> None:
    """A handle that a release adds needs its field in ``coordinators.FIELDS``, too: rows are made from it."""
    rows = set(process_globals.scoped()[coordinators.MODULE])
    assert rows == {*coordinators.FIELDS, *coordinators.FLAGS, *coordinators.PATCHED}
