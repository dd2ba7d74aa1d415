"""The TorchFunctionMode that answers for one thread what torch would ask of the process's default.

A module of its own, imported on first use: the import lock makes the one class for all threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch.overrides import TorchFunctionMode

#: Make a float tensor of the default dtype unless told otherwise (torch 2.14).
_FACTORIES = (
    "empty zeros ones rand randn eye linspace logspace empty_strided empty_permuted "
    "hann_window hamming_window blackman_window bartlett_window kaiser_window"
)
#: The same, but only when a number they are given is a float.
_INFERRING = "full arange range tensor as_tensor asarray scalar_tensor normal"
#: Turn integral arguments into floats of the default dtype (torch's type promotion).
_PROMOTING = (
    "div divide true_divide add sub subtract mul multiply pow float_power where "
    "sqrt rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh tanh asin acos atan "
    "asinh acosh atanh arcsin arccos arctan arcsinh arccosh arctanh atan2 arctan2 sigmoid erf erfc "
    "erfinv lgamma digamma reciprocal logit i0 sinc xlogy ldexp logaddexp logaddexp2 "
    "rad2deg deg2rad clamp clip maximum minimum lerp std var softmax log_softmax logsumexp "
    "remainder fmod copysign hypot nan_to_num bernoulli frac cumsum prod"
)
_OPERATORS = (
    "__truediv__ __rtruediv__ __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __pow__ __rpow__ "
    "__rdiv__ __mod__ __rmod__"
)


def _functions(owner: Any, names: str) -> frozenset[Any]:
    return frozenset(getattr(owner, name) for name in names.split() if hasattr(owner, name))


_FACTORY_FUNCTIONS = _functions(torch, _FACTORIES)
_INFERRING_FUNCTIONS = _functions(torch, _INFERRING)
_PROMOTING_FUNCTIONS = (
    _functions(torch, _PROMOTING)
    | _functions(torch.Tensor, _PROMOTING + " " + _OPERATORS)
    | _functions(torch.special, _PROMOTING)
    | _functions(torch.nn.functional, "softmax log_softmax sigmoid tanh")
)


def process_default() -> torch.dtype:
    """The default dtype of the process: the C function, for `torch.get_default_dtype` is patched."""
    return torch._C.get_default_dtype()


class DefaultDtypeMode(TorchFunctionMode):
    """Answers for one thread what torch would ask of the process's default dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is None:
            if func in _FACTORY_FUNCTIONS:
                return func(*args, **{**kwargs, "dtype": self.dtype})
            if func in _INFERRING_FUNCTIONS:
                return self._infer(func, args, kwargs)
            if func in _PROMOTING_FUNCTIONS:
                return self._promote(func, args, kwargs)
        return func(*args, **kwargs)

    def _infer(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Let torch infer, then ask again where what it inferred is the process's default."""
        if _has_float_source(args, kwargs) or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        rng = func is torch.normal
        inferred = torch.empty(()) if rng else func(*args, **kwargs)
        if inferred.dtype != process_default():
            return inferred
        return func(*args, **{**kwargs, "dtype": self.dtype})

    def _promote(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Cast integral tensors first: what type promotion itself does with the default."""
        tensors = [value for value in _flat(args, kwargs) if isinstance(value, torch.Tensor)]
        if any(_is_float(tensor) for tensor in tensors) or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor) or result.dtype != process_default():
            return result
        # A condition is no operand: torch wants it as it is.
        condition = _condition(func, args, kwargs)
        operands = _Operands(self.dtype, condition, scalars=condition is not None)
        return func(*operands.of(args), **operands.named(kwargs))


def _is_float(tensor: Any) -> bool:
    return bool(tensor.is_floating_point() or tensor.is_complex())


def _flat(args: Any, kwargs: Any) -> list[Any]:
    return [*args, *kwargs.values()]


def _has_float_source(args: Any, kwargs: Any) -> bool:
    """Whether the dtype comes from data that has one: a tensor or an array."""
    return any(hasattr(value, "dtype") and hasattr(value, "shape") for value in _flat(args, kwargs))


def _condition(func: Callable[..., Any], args: Any, kwargs: Any) -> Optional[Any]:
    if getattr(func, "__name__", "") != "where":
        return None
    if "condition" in kwargs:
        return kwargs["condition"]
    tensor_method = (
        getattr(func, "__objclass__", None) is not None
    )  # Tensor.where(self, condition, other)
    return args[1] if tensor_method else args[0]


class _Operands:
    """The arguments of a call with every operand in the default dtype."""

    def __init__(self, dtype: Any, condition: Optional[Any], *, scalars: bool) -> None:
        self._dtype = dtype
        self._condition = condition
        self._scalars = scalars

    def of(self, values: Any) -> tuple[Any, ...]:
        return tuple(self._operand(value) for value in values)

    def named(self, values: Any) -> dict[str, Any]:
        return {name: self._operand(value) for name, value in values.items()}

    def _operand(self, value: Any) -> Any:
        if value is self._condition:
            return value
        if hasattr(value, "is_floating_point"):
            return value.to(self._dtype)
        if self._scalars and isinstance(value, (int, float)):
            # `where` rounds scalars to the default before it looks at anything else.
            return torch.scalar_tensor(value, dtype=self._dtype)
        return value
