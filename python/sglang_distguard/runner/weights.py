"""Runners that share the memory of equal parameters, and what must not change them meanwhile.

A replica is built by SGLang's own code from its own settings and files. Then each of its parameters
is compared with the source's, bit for bit, and takes the source's storage. So it computes with the
bits that it would have alone, whatever its architecture and quantisation make of the files. Buffers,
and tensors that are no parameters, stay its own: kernels write to some of them.

States of a runner::

    from     by                                                    to
    alone    built with a source, or taken as one                  sharing
    sharing  the other holders have closed or detached             alone
    sharing  detach()                                              alone

Who shares is recorded as leases on the registry's key "weights:N". Weights of a runner that is not
alone are not changed in place: ``refuse_if_shared``.

Invariants:
- A runner that has ``_ATTRIBUTE`` holds a lease on its key until it is closed.
- A runner's sharing begins in its load phase, or in the forward phase of its source, and ends in
  its load phase. Updates are in the load phase, so none of them overlaps either.

Lock order: phases only; the source's is entered within the replica's load phase.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from sglang_distguard import _core
from sglang_distguard.config.naming import name_of_model
from sglang_distguard.context import generation
from sglang_distguard.context.scopes import scope_active
from sglang_distguard.distributed import world
from sglang_distguard.errors import NotSupported, SpecMismatch, StateInUse
from sglang_distguard.runner.handle import find_handle
from sglang_distguard.runner.tensors import Place, Slot, place_of, slots, storages_of_model
from sglang_distguard.sync.phases import in_phase

if TYPE_CHECKING:
    import torch

_ATTRIBUTE = "_sglang_distguard_weights"
_numbers = itertools.count(1)
#: The runner whose weights the runner that is being built shares. It does not keep it alive:
#: threads that are started meanwhile inherit the value.
_source: ContextVar[Optional[weakref.ref[Any]]] = ContextVar(
    "sglang_distguard.weights", default=None
)
#: Settings (0.5.23) with which weights are moved, replaced or filled later, and the values without.
_MOVING: Mapping[str, tuple[Any, ...]] = {
    "enable_eplb": (False, None),
    "elastic_ep_backend": (None,),
    "enable_lora": (False, None),
    "lora_paths": (None, [], {}),
    "cpu_offload_gb": (0, None),
    "offload_group_size": (-1, 0, None),
    "enable_memory_saver": (False, None),
    "startup_weight_load_mode": ("serial", None),
    "weight_cache_mode": ("off", None),
}
#: How many differing parameters an error names.
_NAMED = 5


@dataclass(frozen=True)
class Sharing:
    """What runners share: the same object on each of them.

    Attributes:
        key: of the registry, on which each of them holds a lease.
        places: where the shared storages lie.
    """

    key: str
    places: frozenset[Place]


@contextmanager
def sharing_with(source: Optional[Any]) -> Iterator[None]:
    """Let a runner that is built in the with block share the weights of ``source``, a runner."""
    token = _source.set(None if source is None else weakref.ref(source))
    try:
        yield
    finally:
        _source.reset(token)


def others(runner: Any) -> list[str]:
    """Return the names of the other runners that share weights with ``runner`` now."""
    sharing = sharing_of(runner)
    handle = find_handle(runner)
    if sharing is None or handle is None or handle.closed:
        return []
    names = _core.holders(sharing.key)
    if handle.name in names:
        names.remove(handle.name)
    return names


def sharing_of(runner: Any) -> Optional[Sharing]:
    """Return what ``runner`` shares, or shared before all others closed; None if nothing."""
    return getattr(runner, "__dict__", {}).get(_ATTRIBUTE)


def refuse_if_shared(runner: Any, change: str) -> None:
    """Refuse a change of weights that other runners share.

    Args:
        runner: whose weights would change.
        change: name of the method.

    Raises:
        StateInUse: others share them.
    """
    names = others(runner)
    if not names:
        return
    handle = find_handle(runner)
    assert handle is not None
    raise StateInUse(
        f"{change}() would change weights that runner '{handle.name}' shares with "
        f"{', '.join(map(repr, names))}. Close those, or call detach_weights() first, which gives "
        "this one a copy of its own",
        runner=handle.name,
        holders=names,
        step=change,
    )


def check_source(runner: Any) -> None:
    """Refuse to load a model for ``runner`` that could not share its source's weights.

    Does nothing outside of ``sharing_with``, and for a draft runner.

    Raises:
        SpecMismatch: the two differ in a setting.
        NotSupported: settings of one of the two move or replace weights; several ranks.
        DistGuardError: the source is closed.
    """
    found = _source_of(runner)
    if found is None:
        return
    source, owner = found
    owner.check()
    _check_settings(runner, source, owner.name)


def share(runner: Any) -> None:
    """Give ``runner``, which has just loaded its model, the storages of its source's parameters.

    Does nothing outside of ``sharing_with``, and for a draft runner.

    Raises:
        SpecMismatch: the two differ in a parameter's name, shape, type or bits.
        DistGuardError: the source is closed.
        StateInUse: it was detached meanwhile.
        AcquireTimeout, DeadlockError: see ``in_phase``.
    """
    found = _source_of(runner)
    if found is None:
        return
    source, owner = found
    handle = find_handle(runner)
    assert handle is not None
    with in_phase("load", owner):
        owner.check()
        sharing = sharing_of(source) or _begin(source, owner)
    with in_phase("forward", owner):  # no update of the source begins; its own forwards go on
        owner.check()
        if sharing_of(source) is not sharing:  # it was detached in between
            raise StateInUse(
                f"runner '{owner.name}' got weights of its own while '{handle.name}' was about to "
                "share them; build it again",
                runner=owner.name,
            )
        given = _parameters(source)
        _check_equal(_parameters(runner), given, owner.name)
        handle.hold(sharing.key)
        vars(runner)[_ATTRIBUTE] = sharing
        _take(runner.model, given)


def detach(runner: Any, *, timeout: Optional[float] = None) -> bool:
    """Give ``runner`` a copy of the weights that it shares; return False if it shares none.

    Waits for its methods. Args and errors: see ``api.weights.detach_weights``.
    """
    handle = find_handle(runner)
    assert handle is not None
    with in_phase("load", handle, timeout=timeout):
        handle.check()
        sharing = sharing_of(runner)
        if sharing is None:
            return False
        is_shared = bool(others(runner))
        if is_shared:
            with scope_active(handle.scope):
                if generation.current().captures_graphs():
                    raise NotSupported(
                        f"runner '{handle.name}' has captured graphs, which hold the addresses of "
                        "the shared weights. Close it, and build one that does not share",
                        runner=handle.name,
                    )
            _copy(runner.model, sharing.places)
        del vars(runner)[_ATTRIBUTE]
        handle.release_key(sharing.key)
        return is_shared


def _source_of(runner: Any) -> Optional[tuple[Any, _core.RunnerHandle]]:
    reference = _source.get()
    if reference is None or runner.is_draft_worker:
        return None
    source = reference()
    owner = find_handle(source)
    if owner is None:
        raise StateInUse("the runner whose weights were to be shared is gone; build without it")
    return source, owner


def _begin(source: Any, owner: _core.RunnerHandle) -> Sharing:
    """Record that the weights of ``source`` may be shared; the caller is in its load phase."""
    key = f"weights:{next(_numbers)}"
    places = {place_of(tensor) for tensor in _parameters(source).values()}
    made = Sharing(key, frozenset(it for it in places if it is not None))
    spec = {"model": name_of_model(source.server_args), "dtype": str(source.model_config.dtype)}
    request = _core.Request(
        key, spec, runner=owner.name, reuse=True, reentrant=False, slow_after=math.inf
    )
    claim = request.try_acquire(None)
    assert claim is not None  # the number is new
    claim.publish(identity=1, resource=None)
    owner.hold(key)
    vars(source)[_ATTRIBUTE] = made
    return made


def _check_settings(runner: Any, source: Any, name: str) -> None:
    if world.ranks() is not None:
        raise NotSupported(
            "runners with several ranks do not share weights: their ranks would have to agree on "
            "each change. Build without share_weights_with"
        )
    for role, it in (("runner", runner), ("source", source)):
        for field, values in _MOVING.items():
            value = getattr(it.server_args, field, values[0])
            if value not in values:
                raise NotSupported(
                    f"the {role} has {field}={value!r}, with which SGLang moves, replaces or fills "
                    "weights later, so they cannot be shared. Leave it out, or share_weights_with",
                    field=field,
                    requested=value,
                )
    existing, requested = _spec(source), _spec(runner)
    _compare(existing, requested, name)


def _spec(runner: Any) -> dict[str, str]:
    config = runner.model_config
    return {
        "architectures": str(getattr(config.hf_config, "architectures", None)),
        "dtype": str(config.dtype),
        "quantization": str(config.quantization),
        "device": str(runner.device),
        "gpu_id": str(runner.gpu_id),
    }


def _compare(existing: Mapping[str, str], requested: Mapping[str, str], name: str) -> None:
    """Raise SpecMismatch, naming some of the fields, unless the two are equal."""
    fields = {
        field: {"existing": existing.get(field, "none"), "requested": requested.get(field, "none")}
        for field in sorted({*existing, *requested})
        if existing.get(field) != requested.get(field)
    }
    if not fields:
        return
    said = [
        f"{field} (existing: {it['existing']}, requested: {it['requested']})"
        for field, it in itertools.islice(fields.items(), _NAMED)
    ]
    more = f" and {len(fields) - _NAMED} more" if len(fields) > _NAMED else ""
    raise SpecMismatch(
        f"the weights of runner '{name}' cannot be shared: different {', '.join(said)}{more}. Use "
        "the same checkpoint and settings, or build without share_weights_with",
        key="weights",
        fields=fields,
        holders=[name],
        leader=None,
    )


def _parameters(runner: Any) -> dict[str, torch.Tensor]:
    """Every parameter by its name; one that has several names is there several times."""
    return dict(runner.model.named_parameters(remove_duplicate=False))


def _check_equal(
    mine: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], name: str
) -> None:
    existing = {it: _described(tensor) for it, tensor in given.items()}
    requested = {it: _described(tensor) for it, tensor in mine.items()}
    _compare(existing, requested, name)
    other = [it for it in mine if not _same_bits(mine[it], given[it])]
    _compare(
        {it: f"{existing[it]}, other content" for it in other},
        {it: requested[it] for it in other},
        name,
    )


def _described(tensor: torch.Tensor) -> str:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    strided = str(tensor.layout) == "torch.strided"
    place = f", strides {tensor.stride()}" if strided else f", {tensor.layout}"
    return f"{shape} {tensor.dtype} on {tensor.device}{place}"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of equal shape, type and layout have the same bits, also those of NaN."""
    import torch

    if one.layout != torch.strided or other.layout != torch.strided or one.is_quantized:
        return False  # nothing is known about its memory
    if one.is_meta or other.is_meta or not one.numel():
        return one.is_meta == other.is_meta
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(one.element_size())
    with torch.inference_mode():
        if bits is None:
            one, other, bits = torch.view_as_real(one), torch.view_as_real(other), torch.int64
        return torch.equal(one.detach().view(bits), other.detach().view(bits))


def _take(model: Any, given: Mapping[str, torch.Tensor]) -> None:
    """Let the parameters of ``model`` lie in the storages of ``given``, which has equal bits.

    Attributes that are views of a parameter follow it, so that its old storage is freed.

    Raises:
        NotSupported: a view is kept elsewhere. Then ``model`` is not usable.
    """
    moved: dict[Place, tuple[torch.Tensor, int]] = {}
    for name, own in model.named_parameters(remove_duplicate=False):
        theirs, before = given[name], place_of(own)
        if before is None or before == place_of(theirs):
            continue
        moved[before] = (theirs, theirs.storage_offset() - own.storage_offset())
        own.data = theirs.data
    for slot in slots(model):
        found = _moved(slot, moved)
        if found is not None:
            theirs, further = found
            view = _view(slot.tensor, theirs.untyped_storage(), further)
            if view is not None and _same_bits(slot.tensor, view):
                slot.holder[slot.name] = view
    # A later update would write to the parameter and miss what still lies in its old memory. What
    # this refuses for a replica is not in its source either, which is of the same class.
    left = storages_of_model(model).keys() & moved.keys()
    if left:
        raise NotSupported(
            f"{type(model).__name__} keeps {len(left)} views of parameters that cannot follow them "
            "to shared memory. Build without share_weights_with",
            model=type(model).__name__,
        )


def _moved(
    slot: Slot, moved: Mapping[Place, tuple[torch.Tensor, int]]
) -> Optional[tuple[torch.Tensor, int]]:
    import torch

    tensor = slot.tensor
    if isinstance(tensor, torch.nn.Parameter):
        return None
    place = place_of(tensor)
    return None if place is None else moved.get(place)


def _view(like: torch.Tensor, storage: Any, further: int) -> Optional[torch.Tensor]:
    """A tensor as ``like``, in ``storage``, ``further`` elements on; None if that has no room."""
    import torch

    start = like.storage_offset() + further
    reach = sum((size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True))
    if start < 0 or (start + reach + 1) * like.element_size() > storage.nbytes():
        return None
    made = torch.empty(0, dtype=like.dtype, device=like.device)
    return made.set_(storage, start, like.shape, like.stride())


def _copy(model: Any, places: frozenset[Place]) -> None:
    """Give every tensor of ``model`` that lies in one of ``places`` a copy; views stay views."""
    import torch

    copies: dict[Place, Any] = {}
    done: set[int] = set()
    for slot in slots(model):
        tensor = slot.tensor
        place = place_of(tensor)
        if place is None or place not in places or id(tensor) in done:
            continue
        if place not in copies:
            copies[place] = tensor.untyped_storage().clone()
        made = _view(tensor, copies[place], 0)
        assert made is not None  # the copy is as large
        if isinstance(tensor, torch.nn.Parameter):
            tensor.data = made
            done.add(id(tensor))
        else:
            slot.holder[slot.name] = made
