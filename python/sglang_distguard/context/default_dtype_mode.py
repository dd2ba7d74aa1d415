"""The TorchFunctionMode that gives functions an execution's default dtype, not the process's.

There is no list of functions that use the default: the mode finds them by running them. A default
dtype affects a result only where no floating operand and no dtype argument decides. Then the result
has the process's default, or the complex dtype that belongs to it:

- A function that makes tensors is first run on the meta device, which shows the dtype of its
  result. Then it is called with the wanted dtype.
- Integral operands of a function are cast to the wanted default first. torch's type promotion does
  the same (`TensorIterator`, INT_TO_FLOAT: the operands are cast to the common dtype before
  anything is computed). If the result has another dtype than that default, the default had no part
  in it.

This is a separate module, imported on first use, so that the package can be imported without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Optional

import torch
from torch.overrides import TorchFunctionMode

from sglang_distguard import _core

#: Floating dtype -> the complex dtype that type promotion derives from it (c10 `toComplexType`).
_COMPLEX = {
    torch.float16: torch.complex32,
    torch.float32: torch.complex64,
    torch.float64: torch.complex128,
    torch.bfloat16: torch.complex64,
}
#: Never called twice: they have side effects, and no default affects what they return.
_ONCE = frozenset(
    {
        torch.Tensor.backward,
        torch.Tensor.__setitem__,
        torch.Tensor.register_hook,
    }
)


def process_default() -> torch.dtype:
    """Return the process's default dtype, by the C function: `get_default_dtype` is patched."""
    return torch._C.get_default_dtype()


class DefaultDtypeMode(TorchFunctionMode):
    """Gives functions the default dtype that the running execution carries; holds no state."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        wanted = _core.default_dtype_in_force()
        if wanted is None:
            return func(*args, **kwargs)
        process = process_default()
        if wanted is process or _is_settled(func, args, kwargs):
            return func(*args, **kwargs)
        return _Call(func, args, kwargs, wanted, process).result()


def _is_settled(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether no default can affect the result: a dtype or a floating operand is given."""
    if func in _ONCE or kwargs.get("dtype") is not None:
        return True
    operands = [value for name, value in kwargs.items() if name != "out"]
    return any(_settles(value) for value in _leaves([*args, *operands]))


def _settles(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    if isinstance(value, torch.dtype):
        return True
    # Arrays and scalars of numpy bring their own dtype, except float64, a subclass of float.
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return kind in ("f", "c") and not isinstance(value, (float, complex))


def _leaves(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


class _Call:
    """One call whose result may depend on the default dtype."""

    def __init__(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        wanted: torch.dtype,
        process: torch.dtype,
    ) -> None:
        self._func = func
        self._args = args
        self._kwargs = kwargs
        self._process = {process, _COMPLEX.get(process)}
        self._wanted = wanted
        self._tensors = [
            it for it in _leaves([*args, *kwargs.values()]) if isinstance(it, torch.Tensor)
        ]

    def result(self) -> Any:
        operands = [it for it in self._tensors if it is not self._kwargs.get("out")]
        return self._promoted() if operands else self._made()

    def _made(self) -> Any:
        """Return the result of a function that makes tensors from other arguments."""
        if self._kwargs.get("out") is not None:
            return self._func(*self._args, **self._kwargs)  # the result has its dtype
        try:
            # The meta device takes no memory and draws no random numbers.
            probe = self._func(*self._args, **{**self._kwargs, "device": "meta"})
        except Exception:  # it takes no device, or refuses its arguments
            return self._made_without_a_device()
        # Some meta kernels are Python (`torch._refs`) and call `torch.get_default_dtype`, which
        # returns the wanted dtype already.
        defaults = {*self._process, self._wanted, _COMPLEX.get(self._wanted)}
        if not isinstance(probe, torch.Tensor) or probe.dtype not in defaults:
            return self._func(*self._args, **self._kwargs)
        return self._told(probe.dtype)

    def _made_without_a_device(self) -> Any:
        with _Restored(self._tensors) as random:
            first = self._func(*self._args, **self._kwargs)
            if isinstance(first, torch.dtype) and first in self._process:
                return self._default_of(first)
            if not isinstance(first, torch.Tensor) or first.dtype not in self._process:
                return first
            random.restore()
            try:
                return self._told(first.dtype)
            except TypeError:  # takes no dtype: it makes tensors of scalars itself
                second = self._converted(scalars=True)
                return second if self._is_wanted(first, second) else first

    def _process_dtype(self, result: Any) -> torch.dtype:
        dtypes = (_dtype_of(it) for it in _parts(result))
        return next(it for it in dtypes if it is not None and it in self._process)

    def _told(self, dtype: torch.dtype) -> Any:
        return self._func(*self._args, **{**self._kwargs, "dtype": self._default_of(dtype)})

    def _default_of(self, dtype: torch.dtype) -> torch.dtype:
        # `full` makes no complex32 (`infer_full_options`, torch 2.14.1).
        if dtype.is_complex and self._func is torch.full:
            return torch.complex128 if self._wanted is torch.float64 else torch.complex64
        return _COMPLEX[self._wanted] if dtype.is_complex else self._wanted

    def _promoted(self) -> Any:
        """Return the result of a function of integral tensors."""
        out = self._kwargs.get("out")
        if out is None and _is_in_place(self._func):
            return self._func(*self._args, **self._kwargs)
        with _Restored(self._tensors) as random:
            # What is computed into `out` is computed in the default dtype first.
            kwargs = {name: it for name, it in self._kwargs.items() if name != "out"}
            first = self._func(*self._args, **kwargs)
            if not any(_dtype_of(it) in self._process for it in _parts(first)):
                return first if out is None else self._func(*self._args, **self._kwargs)
            for attempt in (self._all_converted, self._first_converted, self._told_process):
                random.restore()
                try:
                    result = attempt(first)
                except NotImplementedError:  # torch has no such kernel for the wanted dtype
                    raise
                except (RuntimeError, TypeError, IndexError):  # some tensor must stay integral
                    continue
                if out is not None or self._is_wanted(first, result):
                    return result
            random.restore()  # the default had no part in it
            return self._func(*self._args, **self._kwargs)

    def _is_wanted(self, first: Any, result: Any) -> bool:
        """Whether what has the process's default in ``first`` has the wanted one in ``result``."""
        wanted = (self._wanted, _COMPLEX.get(self._wanted))
        pairs = zip(_parts(first), _parts(result), strict=False)
        return all(
            _dtype_of(after) in wanted
            for before, after in pairs
            if _dtype_of(before) in self._process
        )

    def _told_process(self, first: Any) -> Any:
        return self._told(self._process_dtype(first))

    def _first_converted(self, _first: Any) -> Any:
        """Call with the first operand converted; others are masks or weights that stay integral."""
        self_, *others = self._args
        return self._func(self_.to(self._wanted), *others, **self._kwargs)

    def _all_converted(self, _first: Any) -> Any:
        return self._converted(scalars=_is_where(self._func))

    def _converted(self, *, scalars: bool) -> Any:
        """Call with all operands in the wanted dtype."""
        condition = _condition(self._func, self._args, self._kwargs)

        def operand(value: Any) -> Any:
            if value is condition:
                return value
            if isinstance(value, torch.Tensor):
                return value.to(self._wanted)
            if isinstance(value, (list, tuple)):
                return type(value)(operand(it) for it in value)
            if scalars and isinstance(value, (int, float)):
                # `where` rounds scalars to the default before it looks at anything else.
                return torch.scalar_tensor(value, dtype=self._wanted)
            return value

        args = [operand(value) for value in self._args]
        kwargs = {
            name: value if name == "out" else operand(value) for name, value in self._kwargs.items()
        }
        return self._func(*args, **kwargs)


def _parts(result: Any) -> Sequence[Any]:
    return result if isinstance(result, (list, tuple)) else (result,)


def _dtype_of(part: Any) -> Optional[torch.dtype]:
    if isinstance(part, torch.Tensor):
        return part.dtype
    return part if isinstance(part, torch.dtype) else None


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _is_where(func: Callable[..., Any]) -> bool:
    return getattr(func, "__name__", "") == "where"


def _condition(func: Callable[..., Any], args: Any, kwargs: Any) -> Optional[Any]:
    """Return the condition of `where`, which is no operand and must not be converted."""
    if not _is_where(func):
        return None
    if "condition" in kwargs:
        return kwargs["condition"]
    is_method = getattr(func, "__objclass__", None) is not None  # Tensor.where(self, condition, …)
    return args[1] if is_method else args[0]


class _Restored:
    """Restores the random state, so that a call made twice draws random numbers once."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._state = torch.get_rng_state()
        devices = {it.device for it in tensors if it.device.type == "cuda"}
        self._of_devices = {it: torch.cuda.get_rng_state(it) for it in devices}

    def __enter__(self) -> _Restored:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def restore(self) -> None:
        """Restore the random state that was there before the first call."""
        torch.set_rng_state(self._state)
        for device, state in self._of_devices.items():
            torch.cuda.set_rng_state(state, device)
