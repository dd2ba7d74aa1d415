"""Two runners whose weights are updated from tensors at once patch torch only once.

SGLang's function is real. It is given another module in the place of torch's, because a patch of
torch's own would last for the process, and because a thread must be held in the middle of it.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_distguard
from registry_calls import until, waits_for
from sglang_distguard.hooks.patch_torch import REDUCTIONS


def reduce_tensor() -> None:
    """Stand-in for torch's function."""


def rebuild_cuda_tensor() -> None:
    """Stand-in for torch's function."""


class Reductions(SimpleNamespace):
    """torch's module; the first check whether it is patched blocks until ``go_on`` is set."""

    def __init__(self) -> None:
        super().__init__(reduce_tensor=reduce_tensor, rebuild_cuda_tensor=rebuild_cuda_tensor)
        self.init_reductions = lambda: None
        self.looking, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        if name == "_reduce_tensor_original" and not self.looking.is_set():
            self.looking.set()
            self.go_on.wait()
        raise AttributeError(name)


def patch_from_two_threads(monkeypatch: pytest.MonkeyPatch, *, guarded: bool) -> Reductions:
    from sglang.srt.utils import patch_torch

    reductions = Reductions()
    monkeypatch.setattr(patch_torch, "reductions", reductions)
    patch = patch_torch.monkey_patch_torch_reductions
    first, second = (threading.Thread(target=patch) for _ in range(2))
    first.start()
    reductions.looking.wait()
    second.start()
    if guarded:
        until(waits_for(REDUCTIONS))
    else:
        second.join()
    reductions.go_on.set()
    first.join()
    second.join()
    patch()
    return reductions


def test_plain_sglang_keeps_its_own_replacement_as_the_original_of_torch(
    sglang: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = patch_from_two_threads(monkeypatch, guarded=False)
    assert made._reduce_tensor_original is made.reduce_tensor  # it calls itself endlessly


def test_the_second_runner_waits_for_the_first_and_finds_torch_patched(
    guard: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = patch_from_two_threads(monkeypatch, guarded=True)
    assert made.reduce_tensor is not reduce_tensor
    assert made._reduce_tensor_original is reduce_tensor
    assert made._rebuild_cuda_tensor_original is rebuild_cuda_tensor


def test_a_patch_that_fails_half_way_is_undone_and_tried_again(
    guard: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.utils import patch_torch

    made = Reductions()
    made.go_on.set()

    def fail() -> None:
        raise OSError("no reductions")

    made.init_reductions = fail
    monkeypatch.setattr(patch_torch, "reductions", made)
    with sglang_distguard.runner_scope("one"), pytest.raises(OSError, match="no reductions"):
        patch_torch.monkey_patch_torch_reductions()
    assert made.reduce_tensor is reduce_tensor
    assert made.rebuild_cuda_tensor is rebuild_cuda_tensor
    made.init_reductions = lambda: None
    patch_torch.monkey_patch_torch_reductions()
    assert made._reduce_tensor_original is reduce_tensor
