"""NCCL communicators that SGLang makes beside torch's are destroyed once, and used by no code later.

A null communicator is one that NCCL takes and does nothing with, also without a GPU. What becomes of
the memory is measured on GPUs (`make gpu-ranks`).
"""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_distguard.distributed import coordinators, nccl
from sglang_distguard.distributed.destroyed_groups import PROCESS_GROUPS

pytestmark = pytest.mark.usefixtures("guard")


class Library:
    """NCCL's library as SGLang loads it; the functions that end a communicator note their calls."""

    def __init__(self, may_end: threading.Event) -> None:
        from sglang.srt.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        self._real = NCCLLibrary("libnccl.so.2")  # torch has loaded it
        self._may_end = may_end
        self.called: list[str] = []
        self.lib = SimpleNamespace(ncclCommAbort=self._abort)

    def ncclCommDestroy(self, communicator: Any) -> None:
        assert self._may_end.wait(60)
        self.called.append("destroy")
        self._real.ncclCommDestroy(communicator)

    def _abort(self, communicator: Any) -> int:
        assert self._may_end.wait(60)
        self.called.append("abort")
        return self._real.lib.ncclCommAbort(communicator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def coordinator_of(library: Any) -> Any:
    import torch
    from sglang.srt.distributed.device_communicators.pynccl import PyNcclCommunicator
    from sglang.srt.distributed.device_communicators.pynccl_wrapper import ncclComm_t
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    made = object.__new__(PyNcclCommunicator)
    made.nccl, made.comm, made.disabled = library, ncclComm_t(), False
    made.device = torch.device("cpu")
    coordinator = object.__new__(GroupCoordinator)
    coordinator.pynccl_comm = made
    others = ("pymscclpp_comm", "pcie_ipc_comm", "ca_comm", "mq_broadcaster")
    for name in (*PROCESS_GROUPS, *others):
        setattr(coordinator, name, None)
    return coordinator


@pytest.fixture
def may_end() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def test_groups_that_are_destroyed_destroy_their_communicator_once(
    may_end: threading.Event,
) -> None:
    library = Library(may_end)
    coordinator = coordinator_of(library)
    for _ in range(2):  # one coordinator stands under several names
        coordinators.destroy({"_TP": coordinator, "_ATTN_TP": coordinator, "_PP": None})
    assert nccl.wait_for_destroyed(60)
    assert library.called == ["destroy"]


def test_broken_groups_abort_their_communicator_so_that_its_kernels_end(
    may_end: threading.Event,
) -> None:
    library = Library(may_end)
    coordinator = coordinator_of(library)
    coordinators.disconnect({"_TP": coordinator})
    coordinators.destroy({"_TP": coordinator})
    assert nccl.wait_for_destroyed(60)
    assert library.called == ["abort"]


def test_sglang_does_nothing_with_a_destroyed_communicator_and_cannot_reach_it(
    may_end: threading.Event,
) -> None:
    import torch

    coordinator = coordinator_of(Library(may_end))
    nccl.destroy_soon(coordinator)
    communicator = coordinator.pynccl_comm
    assert communicator.all_reduce(torch.zeros(1)) is None  # 0.5.23: it is disabled
    with (
        communicator.change_state(enable=True),
        pytest.raises(AttributeError, match="no attribute 'comm'"),
    ):
        communicator.deregister_comm_window(None)
    assert nccl.wait_for_destroyed(60)


def test_a_communicator_whose_graphs_live_is_waited_for_once_until_the_deadline() -> None:
    may_end = threading.Event()
    library = Library(may_end)
    nccl.destroy_soon(coordinator_of(library))
    (thread,) = [it for it in threading.enumerate() if it.name == nccl._NAME]
    try:
        assert not nccl.wait_for_destroyed(0.0)
        assert not nccl.wait_for_destroyed(3600.0)
        assert library.called == []
    finally:
        may_end.set()
    thread.join(60)
    assert library.called == ["destroy"]


def test_a_communicator_that_nccl_does_not_destroy_is_told_and_stays(
    may_end: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    library = Library(may_end)
    library.lib.ncclCommAbort = lambda _: 1  # ncclUnhandledCudaError
    with caplog.at_level(logging.WARNING, "sglang_distguard"):
        nccl.destroy_soon(coordinator_of(library), abort=True)
        assert nccl.wait_for_destroyed(60)
    assert "was not destroyed: RuntimeError('NCCL error: unhandled cuda error" in caplog.text
