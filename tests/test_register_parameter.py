"""A model built from transformers' own code replaces a torch method for its own thread only."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import pytest
import sglang_distguard


def interleaved(events: list[Any]) -> None:
    """Two threads enter SGLang's context manager in turn, and leave it in the same order."""
    import torch
    from sglang.srt.models.transformers import _init_on_device_without_buffers
    from torch import nn

    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    class Marked(nn.Parameter):
        """Like SGLang's own parameters, it has attributes that its constructor does not take."""

    def marked() -> Any:
        parameter = Marked(torch.zeros(2))
        parameter.input_dim = 1  # type: ignore[attr-defined]
        return parameter

    def first() -> None:
        with ExitStack() as stack:
            stack.enter_context(_init_on_device_without_buffers(torch.device("meta")))
            stack.callback(first_out.set)
            first_in.set()
            assert second_in.wait(60)
            module = nn.Linear(2, 2)
            events.append(("inside", str(module.weight.device)))

    def second() -> None:
        assert first_in.wait(60)
        module = nn.Module()
        try:
            module.register_parameter("weight", marked())
            events.append(("beside", str(module.weight.device)))
        except TypeError as error:
            events.append(("beside", str(error)))
        finally:
            with _init_on_device_without_buffers(torch.device("meta")):
                second_in.set()
                assert first_out.wait(60)

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events.append(("after", str(nn.Linear(2, 2).weight.device)))


def test_parameters_of_other_threads_are_left_alone_and_so_are_later_ones(guard: None) -> None:
    events: list[Any] = []
    interleaved(events)
    assert events == [("beside", "cpu"), ("inside", "meta"), ("after", "cpu")]


def test_without_the_guard_parameters_of_other_threads_are_changed(sglang: None) -> None:
    """The reason for the hook: parameters are made anew, and another thread's function stays."""
    from torch import nn

    assert not sglang_distguard.is_installed()
    before = nn.Module.register_parameter
    events: list[Any] = []
    try:
        interleaved(events)
    finally:
        nn.Module.register_parameter = before
    found = dict(events)
    assert "unexpected keyword argument 'input_dim'" in found["beside"]
    assert found["after"] == "meta"


def test_an_error_inside_restores_the_method_of_the_thread(guard: None) -> None:
    import torch
    from sglang.srt.models.transformers import _init_on_device_without_buffers
    from torch import nn

    with (
        pytest.raises(ZeroDivisionError),
        _init_on_device_without_buffers(torch.device("meta")),
    ):
        raise ZeroDivisionError
    assert nn.Linear(2, 2).weight.device.type == "cpu"
