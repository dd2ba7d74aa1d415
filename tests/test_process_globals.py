"""The one table of process-globals: the implementation that each row names exists."""

from __future__ import annotations

import importlib

from sglang_distguard.distributed import coordinators
from sglang_distguard.hooks import generation_0_5_21, process_globals
from sglang_distguard.hooks.process_globals import TREATMENTS, How

#: torch itself keeps these per thread.
TORCHS = ("torch._inductor.config", "torch._inductor.config.triton", "torch._dynamo.config")


def test_every_managed_row_has_an_implementation() -> None:
    scoped = {
        (module, name) for module, names in process_globals.scoped().items() for name in names
    }
    hooks = {hook.__name__ for hook in generation_0_5_21.HOOKS}
    for row in TREATMENTS:
        if row.how is How.UNMANAGED or row.module in TORCHS:
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


def test_every_scoped_global_of_the_groups_module_is_stamped_or_compared() -> None:
    """A group that a release adds needs a field in ``coordinators.FIELDS``, the source of rows."""
    rows = set(process_globals.scoped()[coordinators.MODULE])
    assert rows == {*coordinators.FIELDS, *coordinators.FLAGS, *coordinators.PATCHED}
