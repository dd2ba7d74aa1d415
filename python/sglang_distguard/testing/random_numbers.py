"""Random numbers of a thread's own: transformers fills new models from torch's one CPU generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Optional

#: Functions of torch, and of `torch.nn.init`, that draw and take ``generator``.
_DRAWS = frozenset(
    [
        "bernoulli",
        "bernoulli_",
        "exponential_",
        "multinomial",
        "normal",
        "normal_",
        "rand",
        "randint",
        "randn",
        "random_",
        "randperm",
        "uniform_",
        "kaiming_normal_",
        "kaiming_uniform_",
        "orthogonal_",
        "sparse_",
        "trunc_normal_",
        "xavier_normal_",
        "xavier_uniform_",
    ]
)
#: Functions that draw and take none in some releases of torch, by what fills an empty tensor alike.
_LIKE = {"rand_like": "uniform_", "randn_like": "normal_"}


@contextmanager
def drawing_from(generator: Any) -> Iterator[None]:
    """Let what the thread draws in the with block come from ``generator``, a `torch.Generator`.

    Numbers are those that torch's own generator gives after the same seed (torch 2.14.1). Draws
    with a generator of their own keep it, and so do draws of C++ code, such as dropout.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Drawing(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Sequence[type],
            args: Sequence[Any] = (),
            kwargs: Optional[Mapping[str, Any]] = None,
        ) -> Any:
            given = dict(kwargs or {})
            name = getattr(func, "__name__", "")
            if given.get("generator") is None and name in _DRAWS:
                given["generator"] = generator
            elif name in _LIKE and given.pop("generator", None) is None:
                made = torch.empty_like(*args, **given)
                return getattr(made, _LIKE[name])(generator=generator)
            return func(*args, **given)

    with Drawing():
        yield
