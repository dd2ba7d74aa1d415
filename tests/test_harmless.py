"""What is called harmless in treatments.py is: what is remembered is true of every runner, what is set changes no logits."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard
from conftest import CACHE
from sglang_distguard import treatments
from sglang_distguard.audit.values import is_cache
from sglang_distguard.testing import bit_equal, generate, server_args, solo
from sglang_distguard.treatments import How

Model = Callable[..., Path]

HARMLESS = [row for row in treatments.TREATMENTS if row.how is How.HARMLESS]
VARIABLES = [row.name.split("'")[1] for row in HARMLESS if row.name.startswith("environ['")]


def caches() -> Iterator[tuple[str, Any]]:
    for row in HARMLESS:
        if row.module.startswith("sglang."):
            thing = getattr(importlib.import_module(row.module), row.name, None)
            if is_cache(thing):
                yield f"{row.module}.{row.name}", thing


@contextmanager
def two_runners(model: Model) -> Iterator[list[Any]]:
    """Of different architectures and dtypes."""
    built = [
        sglang_distguard.build_runner(server_args(model("gpt2")), name="first"),
        sglang_distguard.build_runner(server_args(model("qwen3_moe"), dtype="bfloat16")),
    ]
    try:
        yield built
    finally:
        for runner in built:
            sglang_distguard.close(runner)


def test_what_is_remembered_would_be_found_again_by_every_runner(guard: None, model: Model) -> None:
    from sglang.srt.server_args import ServerArgs

    looked_at = []
    with two_runners(model) as runners:
        for name, cache in caches():
            if name.endswith("_dp_tp_moe_masks_pad_rows"):
                continue  # of the first runner's widths, and false but on ROCm
            arguments = [ServerArgs] if "arg_groups" in name else []
            try:
                remembered = cache(*arguments)
            except TypeError:
                continue  # asks for something else; its results are told apart by that
            for runner in runners:
                with sglang_distguard.activate(runner):
                    assert cache.__wrapped__(*arguments) == remembered, name
            looked_at.append(name)
    assert len(looked_at) >= 15, looked_at


@pytest.mark.parametrize("variable", VARIABLES)
def test_what_is_written_into_the_environment_changes_no_logits(
    guard: None, model: Model, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = solo(model("gpt2"), "float32", cache_dir=CACHE).logits
    runner = sglang_distguard.build_runner(server_args(model("gpt2")))
    # What another runner could have written; cuda_ipc is refused where there is no CUDA.
    monkeypatch.setenv(variable, "0" if variable == "SGLANG_USE_CUDA_IPC_TRANSPORT" else "1")
    assert bit_equal(generate(runner, activate=sglang_distguard.activate).logits, expected)
    other = sglang_distguard.build_runner(server_args(model("gpt2")))
    assert bit_equal(generate(other, activate=sglang_distguard.activate).logits, expected)
    for it in (runner, other):
        sglang_distguard.close(it)


def test_random_numbers_drawn_elsewhere_change_no_greedy_logits(guard: None, model: Model) -> None:
    import torch

    expected = solo(model("gpt2"), "float32", cache_dir=CACHE).logits
    torch.rand(7)
    runner = sglang_distguard.build_runner(server_args(model("gpt2")))
    torch.rand(7)
    assert bit_equal(generate(runner, activate=sglang_distguard.activate).logits, expected)
    sglang_distguard.close(runner)
