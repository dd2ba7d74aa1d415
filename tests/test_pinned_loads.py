"""Weights in a mapping of their file: the same bits, one mapping for all loads, never written.

Registering with CUDA needs a GPU (verify/gpu_loads.py); here it is counted, or fails.
"""

from __future__ import annotations

import ast
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard
from forking import in_child
from runner_calls import held_in_thread
from sglang_distguard.patching import find_source
from sglang_distguard.runner import pinned_loads, streams
from sglang_distguard.runner.mapped_files import (
    LEAST_BYTES,
    MappedFiles,
    NotMapped,
    NotRegistered,
)

#: No CUDA device, for torch.
NONE = -1


class Counting:
    """Mapped files that are registered with a list."""

    def __init__(self, most: int = 1 << 40, fails: bool = False) -> None:
        self.registered: list[tuple[int, int]] = []
        self.unregistered: list[int] = []
        self.fails = fails
        self.files = MappedFiles(self.register, self.unregistered.append, lambda: most)

    def register(self, address: int, length: int) -> None:
        if self.fails:
            raise NotRegistered("out of memory")
        self.registered.append((address, length))

    def weights(self, paths: list[str], *, sorts: bool = True) -> Iterator[tuple[str, Any]]:
        return pinned_loads.weights_of(
            paths, NONE, sorts=sorts, after_each=lambda: None, files=self.files
        )


def save(path: Path, seed: int = 0, **more: Any) -> str:
    """Write a file with tensors of several types, some of them large."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(0, 256, (512, 512), generator=generator, dtype=torch.uint8)
    tensors = {
        "b.large": random.view(torch.bfloat16),
        "a.float": torch.randn(300, 200, generator=generator),
        "c.float8": random.clone().view(torch.float8_e4m3fn),
        "d.bool": random.clone() % 2 == 0,
        "e.norm": torch.randn(40_000, generator=generator),
        "f.small": torch.randn(4, 4, generator=generator),
        "g.scalar": torch.tensor(1.5),
        "h.empty": torch.empty(0, 3),
        **more,
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return str(path)


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return [save(tmp_path / f"{index}.safetensors", index) for index in range(12)]


@pytest.fixture(autouse=True)
def no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_loads, "_refusal", pinned_loads._Refusal())


def the_same(one: Any, other: Any) -> bool:
    import torch

    alike = one.dtype == other.dtype and one.shape == other.shape
    flat = [it.contiguous().view(-1).view(torch.uint8) for it in (one, other)]
    return alike and torch.equal(*flat)


@pytest.mark.parametrize("sorts", [True, False])
def test_the_weights_are_those_of_sglangs_own_iterators(
    sglang: None, paths: list[str], sorts: bool
) -> None:
    from sglang.srt.model_loader import weight_utils

    own = (
        weight_utils.buffered_multi_thread_safetensors_weights_iterator(paths, max_workers=2)
        if sorts
        else weight_utils.safetensors_weights_iterator(paths)
    )
    counting = Counting()
    count = 0
    for (name, weight), (expected, like) in zip(
        counting.weights(paths, sorts=sorts), own, strict=True
    ):
        assert name == expected
        assert the_same(weight, like)
        count += 1
    assert count == 8 * len(paths)
    assert len(counting.registered) == len(counting.unregistered) == len(paths)
    assert counting.files.now() == []


def test_large_weights_lie_in_the_mapping_and_outlive_it(paths: list[str]) -> None:
    counting = Counting()
    kept = dict(counting.weights(paths[:1]))
    (address, length) = counting.registered[0]
    inside = {name for name, it in kept.items() if address <= it.data_ptr() < address + length}
    assert inside == {"a.float", "b.large", "c.float8", "d.bool"}
    assert all(kept[name].nbytes >= LEAST_BYTES for name in inside)
    assert counting.unregistered == [address]
    assert the_same(kept["b.large"], dict(Counting().weights(paths[:1]))["b.large"])
    # SGLang's Gemma adds 1 to norms in place (0.5.23).
    kept["e.norm"] += 1.0
    kept["f.small"].zero_()


def test_loads_at_once_share_one_mapping_of_each_file(paths: list[str]) -> None:
    counting = Counting()
    meet = threading.Barrier(4)
    addresses: list[set[int]] = []

    def load() -> None:
        found = set()
        for name, weight in counting.weights(paths[:4]):
            if name == "a.float":
                found.add(weight.data_ptr())
            # All four files are kept until the load ends.
            if name == "h.empty" and len(found) == 4:
                meet.wait()
        addresses.append(found)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert addresses[0] == addresses[1] == addresses[2] == addresses[3]
    assert len(counting.registered) == len(counting.unregistered) == 4
    assert counting.files.now() == []


def test_one_load_registers_a_bounded_number_of_files(paths: list[str]) -> None:
    counting = Counting()
    most = max(len(counting.files.now()) for _ in counting.weights(paths))
    assert most <= pinned_loads.AHEAD + pinned_loads.KEPT + 1


def test_a_load_that_is_given_up_unregisters_its_files(paths: list[str]) -> None:
    counting = Counting()
    weights = counting.weights(paths)
    next(weights)
    weights.close()  # type: ignore[attr-defined]
    assert counting.files.now() == []
    assert sorted(counting.unregistered) == sorted(address for address, _ in counting.registered)


def test_a_forked_child_waits_for_no_lock_of_its_parents_threads() -> None:
    """They may hold it at the fork, and do not exist in the child."""
    with held_in_thread(pinned_loads.FILES._lock, streams._lock):
        assert in_child(lambda: sglang_distguard.snapshot()["pinned_files"]) == []
        assert in_child(lambda: streams._lock.acquire(timeout=10)) is True


def test_a_path_with_other_content_is_another_file(tmp_path: Path) -> None:
    counting = Counting()
    path = tmp_path / "model.safetensors"
    first = counting.files.acquire(save(path, 1))
    assert first is counting.files.acquire(str(path))
    os.replace(save(tmp_path / "new", 2), path)
    second = counting.files.acquire(str(path))
    assert first is not None
    assert second is not None
    assert second is not first
    assert len(counting.registered) == 2
    for file in (first, first, second):
        counting.files.release(file)
    assert counting.files.now() == []
    new = dict(counting.weights([str(path)]))
    assert the_same(new["b.large"], dict(Counting().weights([save(tmp_path / "x", 2)]))["b.large"])


def test_where_registering_fails_files_are_read_as_sglang_does(
    paths: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    failing, right = Counting(fails=True), Counting()
    with caplog.at_level(logging.WARNING, "sglang_distguard"):
        found = dict(failing.weights(paths))
        again = dict(failing.weights(paths))
    assert all(the_same(found[name], it) for name, it in dict(right.weights(paths)).items())
    assert again.keys() == found.keys()
    assert failing.files.now() == []
    told = [it.getMessage() for it in caplog.records]
    assert len(told) == 1
    assert "out of memory" in told[0]
    assert "out of memory" in str(sglang_distguard.snapshot()["not_pinned"])


def test_no_more_is_registered_than_there_is_room_for(paths: list[str]) -> None:
    size = os.path.getsize(paths[0])
    counting = Counting(most=2 * size)
    first, second = (counting.files.acquire(path) for path in paths[:2])
    assert first is not None
    assert second is not None
    assert counting.files.acquire(paths[2]) is None
    counting.files.release(first)
    third = counting.files.acquire(paths[2])
    assert third is not None
    for file in (second, third):
        counting.files.release(file)
    assert pinned_loads.most_bytes() > 0
    assert pinned_loads.refused() is None


def test_other_formats_are_left_to_sglang(tmp_path: Path) -> None:
    counting = Counting()
    path = tmp_path / "model.bin"
    for content in (b"", b"PK\3\4", bytes(8) + b"{}", (2).to_bytes(8, "little") + b"[]"):
        path.write_bytes(content)
        with pytest.raises((NotMapped, ValueError)):
            counting.files.acquire(str(path))
    assert counting.registered == []
    assert counting.files.now() == []


def test_sglangs_iterators_use_the_mapping_for_loads_that_are_marked(
    guard: None, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.model_loader import weight_utils

    counting = Counting()
    weights_of: Callable[..., Any] = pinned_loads.weights_of
    monkeypatch.setattr(
        pinned_loads,
        "weights_of",
        lambda *args, **kwargs: weights_of(*args, **kwargs, files=counting.files),
    )
    buffered = weight_utils.buffered_multi_thread_safetensors_weights_iterator
    single = weight_utils.safetensors_weights_iterator
    for make in (lambda **how: buffered(paths, 2, **how), lambda **how: single(paths, **how)):
        plain = dict(make())
        assert counting.registered == []
        for way in ("disable_mmap", "prefetch", "drop_cache_after_load"):
            dict(pinned_loads.onto(NONE, make(**{way: True})))
        assert counting.registered == []
        marked = dict(pinned_loads.onto(NONE, make()))
        assert len(counting.registered) == len(paths)
        assert plain.keys() == marked.keys()
        assert all(the_same(plain[name], it) for name, it in marked.items())
        counting.registered.clear()
    assert pinned_loads.loading_onto() is None


def test_only_sglangs_models_on_one_cuda_device_are_served(guard: None) -> None:
    import torch
    from sglang.srt.models.gpt_oss import GptOssForCausalLM
    from sglang.srt.models.llama import LlamaForCausalLM

    served = pinned_loads._served
    one, other, host = (torch.device(it) for it in ("cuda:1", "cuda:0", "cpu"))
    assert served(LlamaForCausalLM, {one}) == 1
    assert served(LlamaForCausalLM, {other}) == 0
    assert served(LlamaForCausalLM, {one, other}) is None
    assert served(LlamaForCausalLM, {one, host}) is None
    assert served(LlamaForCausalLM, {host}) is None
    assert served(LlamaForCausalLM, set()) is None
    assert served(GptOssForCausalLM, {one}) is None
    assert served(torch.nn.Linear, {one}) is None
    assert pinned_loads.device_for(torch.nn.Linear(2, 2)) is None
    with sglang_distguard.runner_scope(pinned_loads=False):
        assert pinned_loads.device_for(torch.nn.Linear(2, 2)) is None


#: Functions of SGLang that write into a loaded weight, found in 0.5.21 to 0.5.23: of one dimension,
#: or of a model in `WRITERS`.
KNOWN_WRITES = {
    "gemma.py: loaded_weight += 1.0",
    "gpt_oss.py: loaded_weight.zero_()",
}


@pytest.mark.exhaustive
def test_no_model_of_this_release_writes_into_loaded_weights() -> None:
    source = find_source("sglang.srt.models.llama")
    assert source is not None
    folder = Path(source.filename).parent
    layers = folder.parent / "layers"
    files = [*folder.rglob("*.py"), *layers.rglob("*.py")]
    assert len(files) > 300
    found = {
        f"{path.name}: {ast.unparse(write)}"
        for path in files
        if "loaded_weight" in (text := path.read_text()) or "load_weights" in text
        for write in writes(ast.parse(text))
    }
    assert found == KNOWN_WRITES


def writes(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield what changes a loaded weight in place: a parameter, or a variable of a loop over them."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = {"loaded_weight"}
        for node in ast.walk(function):
            if isinstance(node, ast.For) and "weights" in ast.unparse(node.iter):
                names |= {it.id for it in ast.walk(node.target) if isinstance(it, ast.Name)}
        names -= {"name", "param_name", "weight_name", "shard_id"}
        for node in ast.walk(function):
            target: Any = None
            if isinstance(node, ast.AugAssign):
                target = node.target
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                target = node.targets[0]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                method = node.func.attr
                if method.endswith("_") and not method.endswith("__"):
                    target = node.func.value
            while isinstance(target, ast.Subscript):
                target = target.value
            if isinstance(target, ast.Name) and target.id in names:
                yield node
