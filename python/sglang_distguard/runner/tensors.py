"""The tensors of a model and of a runner's pools, and the storages that they lie in."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Where a storage lies: its device, and its address there.
Place = tuple[str, int]

#: Entries of a module's ``__dict__`` that hold its registries.
_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})
#: Attributes of a runner that hold its pools (SGLang 0.5.23).
_POOLS = (
    "token_to_kv_pool",
    "req_to_token_pool",
    "mtp_draft_device_pools",
    "mtp_draft_mamba_pools",
)
_POOL_MODULES = "sglang.srt.mem_cache"


def place_of(tensor: torch.Tensor) -> Place | None:
    """Return where the storage of ``tensor`` lies; None if it has no memory."""
    import torch

    if tensor.is_meta or tensor.layout != torch.strided:
        return None
    storage = tensor.untyped_storage()
    address = storage.data_ptr()
    return (str(tensor.device), address) if address and storage.nbytes() else None


@dataclass(frozen=True)
class Slot:
    """A place of a module that holds a tensor: an entry of one of its dicts."""

    holder: dict[str, Any]
    name: str

    @property
    def tensor(self) -> torch.Tensor:
        tensor: torch.Tensor = self.holder[self.name]
        return tensor


def slots(model: nn.Module) -> Iterator[Slot]:
    """Yield every place of a tensor in ``model``: parameters, buffers and plain attributes."""
    import torch

    for module in model.modules():
        for holder in (module._parameters, module._buffers, vars(module)):
            for name, value in list(holder.items()):
                if isinstance(value, torch.Tensor):
                    yield Slot(holder, name)  # type: ignore[arg-type]


def storages_of_model(model: nn.Module) -> dict[Place, int]:
    """Return the storages of a model's tensors, place -> bytes.

    Those are its parameters and buffers, and tensors in attributes of its modules, also in lists,
    tuples and dicts there.
    """
    found: dict[Place, int] = {}
    for module in model.modules():
        registered = (*module._parameters.values(), *module._buffers.values())
        own = [value for name, value in list(vars(module).items()) if name not in _REGISTRIES]
        for tensor in _tensors_in((registered, own), ()):
            _add(found, tensor)
    return found


def storages_of_pools(runner: Any) -> dict[Place, int]:
    """Return the storages of a runner's pools of keys, values, states and requests; as above."""
    found: dict[Place, int] = {}
    pools = [getattr(runner, name, None) for name in _POOLS]
    for tensor in _tensors_in(pools, (_POOL_MODULES,)):
        _add(found, tensor)
    return found


def _add(found: dict[Place, int], tensor: torch.Tensor) -> None:
    place = place_of(tensor)
    if place is not None:
        found[place] = tensor.untyped_storage().nbytes()


def _tensors_in(value: Any, modules: tuple[str, ...]) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers, and in objects of classes of ``modules``."""
    torch = sys.modules["torch"]
    seen: set[int] = set()
    pending = [value]
    while pending:
        it = pending.pop()
        if isinstance(it, torch.Tensor):
            yield it
        elif id(it) not in seen:
            seen.add(id(it))
            if isinstance(it, Mapping):
                pending += list(it.values())
            elif isinstance(it, (list, tuple, set, frozenset)):
                pending += list(it)
            elif modules and type(it).__module__.startswith(modules):
                pending += list(getattr(it, "__dict__", {}).values())
