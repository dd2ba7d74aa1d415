"""The one list of process-globals: each row names what does it, and what does it is there."""

from __future__ import annotations

import importlib

from sglang_distguard import groups, treatments
from sglang_distguard.adapters import runtime_contexts
from sglang_distguard.treatments import TREATMENTS, How

#: torch keeps these for each thread itself.
TORCHS = ("torch._inductor.config", "torch._inductor.config.triton", "torch._dynamo.config")


def test_every_row_that_is_not_harmless_is_done_by_something() -> None:
    scoped = {(module, name) for module, names in treatments.scoped().items() for name in names}
    targets = {target.__name__ for target in runtime_contexts.TARGETS}
    for row in TREATMENTS:
        if row.how is How.HARMLESS or row.module in TORCHS:
            assert not row.by, row
        elif row.by:
            name = f"sglang_distguard.{row.by}"
            importlib.import_module(name)
            assert ".targets." not in name or name in targets, row
        else:
            assert (row.module, row.name) in scoped, row


def test_no_global_has_two_rows() -> None:
    keys = [(row.module, row.name) for row in TREATMENTS]
    assert len(set(keys)) == len(keys)


def test_whatever_is_scoped_of_the_groups_module_is_stamped_or_compared() -> None:
    """A handle that a release adds needs its field in ``groups.FIELDS``, too: rows are made from it."""
    rows = set(treatments.scoped()[groups.MODULE])
    assert rows == {*groups.FIELDS, *groups.FLAGS, *groups.PATCHED}
