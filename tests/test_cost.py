"""The cost of the guard in a forward, as its Python frames: counted, not timed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import sglang_distguard as dg
import torch
from sglang_distguard.testing import server_args, steps

PACKAGE = str(Path(dg.__file__).parent)


def is_ours(frame: FrameType) -> bool:
    code = frame.f_code
    is_trampoline = any(name.startswith("_distguard_hook") for name in code.co_names)
    return is_trampoline or code.co_filename.startswith(PACKAGE)


@pytest.mark.parametrize("beside_others", [False, True])
def test_a_forward_and_a_sample_run_no_python_frame_of_ours(
    guard: None, model: Callable[[str], Path], beside_others: bool
) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    runners = [dg.build_runner(server_args(model("gpt2")))] if beside_others else []
    runner = dg.build_runner(server_args(model("llama")))
    runners.append(runner)
    frames: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call" and is_ours(frame):
            frames[frame.f_code.co_qualname] += 1

    with torch.no_grad():
        batch = steps._prefill_batch(steps.PROMPTS, runner)
        forward_batch = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
        runner.forward(forward_batch)  # creates everything that is made once
        sys.setprofile(count)
        try:
            output: Any = runner.forward(forward_batch).logits_output
            runner.sample(output, forward_batch)
        finally:
            sys.setprofile(None)
    for it in runners:
        dg.close(it)
    assert not frames
