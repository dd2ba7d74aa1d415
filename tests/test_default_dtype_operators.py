"""Every torch function gives the same with an execution's default dtype as with the process's.

The tests use torch's own tables: the functions of its namespaces, called with patterns of
arguments, and the samples of its operator database. Functions that cannot be intercepted are
listed here; no other may differ.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Optional

import pytest
import torch
from sglang_distguard.context.default_dtype import holding
from sglang_distguard.hooks import torch_dtype
from torch.signal import windows

DTYPES = (
    torch.bfloat16,
    pytest.param(torch.float16, marks=pytest.mark.slow),
    pytest.param(torch.float64, marks=pytest.mark.slow),
)

#: Functions that may differ, with the reason (torch 2.14.1).
NOT_INTERCEPTED = {
    "Tensor": "the legacy constructor makes a tensor of torch's default type; new code uses torch.tensor",
    "block_diag": "without arguments it makes an empty tensor, and takes no dtype",
    "finfo": "without arguments it describes the process's default; pass torch.get_default_dtype()",
    "has_torch_function": "returns True because a function mode is active",
    "has_torch_function_unary": "returns True because a function mode is active",
    "has_torch_function_variadic": "returns True because a function mode is active",
    "handle_torch_function": "itself calls the function modes",
    "nn.functional.local_response_norm": "pools integers in Python before the default applies",
    "native_dropout_backward": "multiplies integer gradients (none exist) before the default applies",
    "range": "deprecated in favour of arange; its binding calls no function mode",
}
#: Not called: they change the process, the file system or torch itself, or do not return.
_LEFT_OUT_TEXT = """
    set_default_dtype set_default_tensor_type set_default_device manual_seed seed set_num_threads
    set_num_interop_threads set_rng_state compile load save hub set_flush_denormal import_ir_module
    set_printoptions use_deterministic_algorithms classproperty __setstate__ __del__ resize_ set_ __class__
    __init__ __new__ __subclasshook__ __init_subclass__ __delattr__ __setattr__ initial_seed from_file map_
    map2_ apply_ __sizeof__ __reduce__ __reduce_ex__ __dir__ data_ptr __hash__ __repr__ __str__ __format__
    resize _make_wrapper_subclass
    autocast_increment_nesting autocast_decrement_nesting const_data_ptr
    share_memory_ pin_memory untyped_storage storage __dlpack__ to_dlpack get_rng_state
"""
#: Their results are whatever memory held: of the samples, only dtype and shape are compared.
_UNINITIALISED = frozenset(
    [
        "empty",
        "empty_strided",
        "empty_permuted",
        "empty_like",
        "empty_quantized",
        "new_empty",
        "new_empty_strided",
    ]
)
_LEFT_OUT = frozenset(_LEFT_OUT_TEXT.split()) | _UNINITIALISED


def _integers(*shape: int) -> torch.Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.arange(1, 1 + count, dtype=torch.int64).reshape(shape)


def _patterns() -> list[tuple[Any, ...]]:
    four, square, flags = _integers(4), _integers(2, 2), _integers(4) > 2
    return [
        (), (4,), (2,), (four,), (four, 2.5), (four, four), (2.5, four), (square,), (square, square),
        (four, four, four), (four, 2), (2, four), (flags, 1.0, 2.0), (flags, four, 2.5),
        (flags, 2.5, four), (four, 1.5, 3.5), (_integers(2, 4), 0), (four, four, 0.5),
        ([1.5, 2.5],), (four, 2.5, four), (_integers(1, 3), [1.5, 2.5, 3.5]), (four, 0.25),
        (flags,), (flags, 0.5), (0.1, 0.9, 5), ((2, 3), 0.7), ((2,), 1.5j), (flags, flags),
    ]  # fmt: skip


def _functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    namespaces = (
        torch, torch.Tensor, torch.special, torch.fft, torch.nn.functional,
        windows, torch.linalg,
    )  # fmt: skip
    seen: set[int] = set()
    for namespace in namespaces:
        for name in sorted(dir(namespace)):
            is_operator = name.startswith("__") and namespace is torch.Tensor
            if (name.startswith("_") and not is_operator) or name in _LEFT_OUT:
                continue
            function = getattr(namespace, name)
            is_class = isinstance(function, type) and name not in ("finfo", "Tensor")
            if not callable(function) or inspect.ismodule(function) or is_class:
                continue
            if id(function) not in seen:
                seen.add(id(function))
                yield name, function


def _outcome(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The result's dtypes and bits, and the random numbers drawn; or the class of the error."""
    torch.manual_seed(7)
    try:
        result = function(*_copied(args), **kwargs)
    except RuntimeError:
        # Includes NotImplementedError: one way may find earlier that a kernel is missing.
        return RuntimeError
    except Exception as error:
        return type(error)
    return _seen(result), torch.get_rng_state().sum().item()


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(it) for it in value)
    return value


def _seen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_seen(it) for it in value)
    if not isinstance(value, torch.Tensor):
        return value if isinstance(value, (torch.dtype, bool, int, str)) else repr(type(value))
    bits: Optional[bytes] = None
    if value.layout is torch.strided and not value.is_quantized and value.device.type == "cpu":
        # Not a clone: one of a single element may keep a stride of 0; its bytes cannot be viewed.
        plain = torch.empty(value.numel(), dtype=value.dtype)
        plain.copy_(value.detach().resolve_conj().resolve_neg().flatten())
        bits = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return str(value.dtype), tuple(value.shape), bits


def _with_process_default(dtype: torch.dtype, call: Callable[[], Any]) -> Any:
    before = torch._C.get_default_dtype()
    torch._C._set_default_dtype(dtype)
    try:
        return call()
    finally:
        torch._C._set_default_dtype(before)


def _differing(
    calls: Iterator[tuple[str, Callable[..., Any], Any, Any]], dtype: torch.dtype
) -> tuple[int, dict[str, list[Any]]]:
    """The number of calls that depend on the default, and those that differ in an execution."""
    count, differing = 0, dict[str, list[Any]]()
    for name, function, args, kwargs in calls:

        def call(function: Any = function, args: Any = args, kwargs: Any = kwargs) -> Any:
            return _outcome(function, args, kwargs)

        want = _with_process_default(dtype, call)
        with holding(dtype):
            got = call()
        count += str(dtype) in repr(want)
        if got != want:
            differing.setdefault(name, []).append((args, kwargs, want, got))
    return count, differing


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace `torch.get_default_dtype`, as ``install()`` does."""
    replaced = torch_dtype._get_default_dtype(torch.get_default_dtype)
    monkeypatch.setattr(torch, "get_default_dtype", replaced)
    # torch's own also formats the stack for each library of a GPU: most of the time of these tests.
    monkeypatch.setattr(torch, "manual_seed", torch.default_generator.manual_seed)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_rng_state(state)


def _assert_listed(differing: dict[str, list[Any]]) -> None:
    told = {name: it[0] for name, it in differing.items() if name not in NOT_INTERCEPTED}
    assert not told, "\n".join(f"{name}: {it}" for name, it in told.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_function_gives_what_it_gives_with_the_process_wide_default(
    dtype: torch.dtype,
) -> None:
    calls = ((name, function, args, {}) for name, function in _functions() for args in _patterns())
    count, differing = _differing(calls, dtype)
    assert count > 500
    _assert_listed(differing)


def _zeroed(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs).zero_()


def _samples() -> Iterator[tuple[str, Callable[..., Any], Any, Any]]:
    from torch.testing._internal.common_methods_invocations import op_db

    for op in op_db:
        function = _zeroed(op.op) if op.name in _UNINITIALISED else op.op
        for integral in (torch.int64, torch.bool):
            if integral not in op.supported_dtypes("cpu"):
                continue
            try:
                samples = list(op.sample_inputs("cpu", integral, requires_grad=False))
            except Exception:  # an error of the database itself, which is not tested here
                continue
            for sample in samples[:6]:
                yield op.full_name, function, (sample.input, *sample.args), sample.kwargs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_own_samples_of_every_operator_give_the_same_bits(dtype: torch.dtype) -> None:
    count, differing = _differing(_samples(), dtype)
    assert count > 200
    _assert_listed(differing)
