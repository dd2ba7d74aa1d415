"""A thread's own default dtype gives the same bits as torch's process-wide default."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import sglang_distguard
import torch
from runner_calls import in_thread
from sglang_distguard import _core
from sglang_distguard.context import default_dtype
from sglang_distguard.context.default_dtype import holding
from sglang_distguard.testing import bit_equal
from torch.overrides import _get_current_function_mode_stack

INTEGERS = torch.arange(1, 7)
FLAGS = torch.tensor([True, False, True, False, True, True])
FLOATS = torch.linspace(0.1, 0.9, 6, dtype=torch.float32)


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return make()


CASES: dict[str, Callable[[], Any]] = {
    "empty": lambda: torch.empty(3).dtype,
    "zeros": lambda: torch.zeros(3),
    "ones": lambda: torch.ones(2, 3),
    "ones dtype None": lambda: torch.ones(2, dtype=None),
    "ones int": lambda: torch.ones(2, dtype=torch.int32),
    "rand": lambda: _seeded(lambda: torch.rand(5)),
    "randn": lambda: _seeded(lambda: torch.randn(5)),
    "normal": lambda: _seeded(lambda: torch.normal(0.0, 1.0, size=(4,))),
    "eye": lambda: torch.eye(3),
    "linspace": lambda: torch.linspace(0, 1, 7),
    "logspace": lambda: torch.logspace(0, 1, 7),
    "hann_window": lambda: torch.hann_window(8),
    "full float": lambda: torch.full((2,), 1.5),
    "full int": lambda: torch.full((2,), 3),
    "full bool": lambda: torch.full((2,), True),
    "arange int": lambda: torch.arange(5),
    "arange float": lambda: torch.arange(0, 1, 0.25),
    "tensor float": lambda: torch.tensor([1.5, 2.7]),
    "tensor int": lambda: torch.tensor([1, 2]),
    "tensor of tensor": lambda: torch.as_tensor(FLOATS),
    "tensor of double": lambda: torch.tensor(FLOATS.double().numpy()),
    "asarray": lambda: torch.asarray([0.1, 0.2]),
    "scalar_tensor": lambda: torch.scalar_tensor(0.1),
    "int / int": lambda: INTEGERS / 7,
    "int / int tensor": lambda: INTEGERS / (INTEGERS + 3),
    "7 / int": lambda: 7 / INTEGERS,
    "int * float": lambda: INTEGERS * 0.37,
    "float * int": lambda: 0.37 * INTEGERS,
    "int + float": lambda: INTEGERS + 0.37,
    "int - float": lambda: INTEGERS - 0.37,
    "float - int": lambda: 0.37 - INTEGERS,
    "float ** int": lambda: 10000.0**INTEGERS,
    "int ** float": lambda: INTEGERS**0.5,
    "int ** int": lambda: INTEGERS**2,
    "int * int": lambda: INTEGERS * 3,
    "div floor": lambda: torch.div(INTEGERS, 2, rounding_mode="floor"),
    "sqrt": lambda: INTEGERS.sqrt(),
    "rsqrt": lambda: torch.rsqrt(INTEGERS),
    "exp": lambda: torch.exp(INTEGERS),
    "log": lambda: torch.log(INTEGERS),
    "sin": lambda: INTEGERS.sin(),
    "tanh": lambda: torch.tanh(INTEGERS),
    "sigmoid": lambda: torch.sigmoid(INTEGERS),
    "reciprocal": lambda: INTEGERS.reciprocal(),
    "atan2": lambda: torch.atan2(INTEGERS, INTEGERS + 1),
    "bool * float": lambda: FLAGS * 0.37,
    "bool / int": lambda: FLAGS / 3,
    "where scalars": lambda: torch.where(FLAGS, 1.25, 0.1),
    "where int float": lambda: torch.where(FLAGS, INTEGERS, 0.37),
    "where keyword": lambda: torch.where(FLAGS, INTEGERS, other=0.37),
    "where method": lambda: INTEGERS.where(FLAGS, 0.37),
    "uint8 / int": lambda: INTEGERS.to(torch.uint8) / 3,
    "int8 * float": lambda: INTEGERS.to(torch.int8) * 0.37,
    "where tensors": lambda: torch.where(FLAGS, FLOATS, 0.37),
    "clamp": lambda: torch.clamp(INTEGERS, min=1.37),
    "float tensor stays": lambda: FLOATS * 0.37,
    "float() stays": lambda: INTEGERS.float(),
    "to stays": lambda: INTEGERS.to(torch.float32) / 3,
    "double stays": lambda: INTEGERS.double() / 3,
    "zeros_like": lambda: torch.zeros_like(FLOATS),
    "new_zeros": lambda: INTEGERS.new_zeros(3),
    "sum": lambda: INTEGERS.sum(),
    "Linear": lambda: _seeded(lambda: torch.nn.Linear(3, 2)).weight.detach(),
    "Embedding": lambda: _seeded(lambda: torch.nn.Embedding(3, 2)).weight.detach(),
    "LayerNorm": lambda: torch.nn.LayerNorm(3).weight.detach(),
    "rope": lambda: 1.0 / (10000.0 ** (torch.arange(0, 8, 2, dtype=torch.int64) / 8)),
    "attention": lambda: torch.nn.functional.softmax(FLOATS, dim=0),
    "get_default_dtype": lambda: default_dtype.in_force() or torch.get_default_dtype(),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_same_dtype_and_bits_as_with_the_process_wide_default(
    case: str, dtype: torch.dtype
) -> None:
    make = CASES[case]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        expected = make()
    finally:
        torch.set_default_dtype(before)
    with holding(dtype):
        actual = make()
    assert torch.get_default_dtype() is before
    if not isinstance(expected, torch.Tensor):
        assert actual == expected
        return
    assert bit_equal(actual, expected), (actual, expected)


def test_other_threads_keep_the_process_wide_default() -> None:
    seen: list[torch.dtype] = []
    with holding(torch.bfloat16):
        thread = threading.Thread(target=lambda: seen.append(torch.ones(1).dtype))
        thread.start()
        thread.join()
        assert torch.ones(1).dtype is torch.bfloat16
    assert seen == [torch.float32]
    assert torch.ones(1).dtype is torch.float32


def test_a_default_set_in_a_thread_of_a_runners_code_is_not_the_processs(runner: Any) -> None:
    def change() -> torch.dtype:
        torch.set_default_dtype(torch.float64)
        return torch.empty(1).dtype

    try:
        with sglang_distguard.activate(runner):
            assert in_thread(change) is torch.float64
            assert torch.empty(1).dtype is torch.float32
        assert torch._C.get_default_dtype() is torch.float32
    finally:
        torch._C._set_default_dtype(torch.float32)


def test_a_thread_keeps_its_default_while_another_one_compiles(guard: None) -> None:
    # Dynamo sets torch's process-wide flag while it compiles (2.14.1, `compile_inner`).
    found = []

    def load() -> None:
        with holding(torch.bfloat16):
            found.append(torch.get_default_dtype())

    with torch.compiler._compile_session_context():
        assert torch.compiler.is_compiling()
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
    assert found == [torch.bfloat16]


def test_nested_defaults_are_restored_in_order_also_after_an_error() -> None:
    with holding(torch.bfloat16):
        with pytest.raises(ZeroDivisionError), holding(torch.float16):
            raise ZeroDivisionError
        with holding(torch.float16):
            assert torch.ones(1).dtype is torch.float16
        assert torch.ones(1).dtype is torch.bfloat16
    assert default_dtype.in_force() is None


def test_it_nests_with_a_device_context() -> None:
    with holding(torch.bfloat16), torch.device("meta"):
        made = torch.empty(2)
    assert (made.dtype, made.device.type) == (torch.bfloat16, "meta")


def test_a_default_that_was_never_restored_ends_with_its_execution() -> None:
    with _core.run_as(None):
        default_dtype.set_in_force(torch.bfloat16)
        with torch.device("cpu"):
            default_dtype.set_in_force(torch.float16)
            assert torch.ones(1).dtype is torch.float16
    assert torch.ones(1).dtype is torch.float32
    assert default_dtype.in_force() is None
    assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize("dtype", [torch.int64, "float32", None])
def test_what_is_no_floating_dtype_is_refused(dtype: Any) -> None:
    with pytest.raises(TypeError, match="floating"):
        default_dtype.set_in_force(dtype)
    assert default_dtype.in_force() is None
