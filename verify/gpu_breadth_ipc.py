"""Sections of ``gpu_breadth.py`` in which a process of its own offers weights by CUDA's handles."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from gpu_breadth_common import ROUNDS, Asked, Counted, Section, checkpoint, has_card, wrong_of
from gpu_breadth_engines import answers, opened, plain, section

#: Seconds that the other process has to put the weights on the card.
LIMIT = 200.0
#: Where the other process speaks checkpoint_engine's protocol.
ADDRESS = "ipc://@sglang-distguard-breadth-{}.sock"


def _tensors(folder: Path) -> list[tuple[str, Any]]:
    """The weights of a checkpoint, on the card if there is one."""
    from sglang_distguard.testing.updates import weights_of

    device = "cuda" if has_card() else "cpu"
    return [(name, weight.to(device)) for name, weight in weights_of(folder)]


def offer_handles(folders: Mapping[str, Path], connection: Any) -> None:
    """In a process of its own: send handles of each checkpoint's tensors; keep them until told.

    ``each`` gets a handle for each tensor, every other name one handle for all of them (SGLang's
    ``flattened_bucket``).
    """
    from sglang_distguard.testing import prepare_environment

    prepare_environment()
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    if has_card():  # which goes by its id, as in SGLang's own processes
        monkey_patch_torch_reductions()
    offered: dict[str, Any] = {}
    kept: list[Any] = []
    for how, folder in folders.items():
        tensors = _tensors(folder)
        if how == "each":
            offered[how] = [(name, MultiprocessingSerializer.serialize(it)) for name, it in tensors]
            kept.append(tensors)
        else:
            bucket = FlattenedTensorBucket(named_tensors=tensors)
            flat = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.metadata}
            offered[how] = MultiprocessingSerializer.serialize(flat)
            kept.append(flat)
    connection.send(offered)
    connection.recv()


def offer_by_checkpoint_engine(folder: Path, address: str, connection: Any) -> None:
    """In a process of its own: offer a checkpoint as checkpoint_engine's server does (0.4.2)."""
    import torch
    import zmq
    from torch.multiprocessing.reductions import reduce_tensor

    tensors = _tensors(folder)
    parts, told, offset = [], [], 0
    for name, tensor in tensors:
        flat = tensor.contiguous().flatten().view(torch.uint8)
        told.append({"name": name, "shape": tensor.shape, "dtype": tensor.dtype, "offset": offset})
        spare = -len(flat) % 256
        parts += [flat, flat.new_zeros(spare)]
        offset += len(flat) + spare
    buffer = torch.cat(parts)
    torch.cuda.synchronize()
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.bind(address)
        connection.send(None)  # one may connect
        for said in (reduce_tensor(buffer), told, None, None):
            socket.send_pyobj(said)
            if answer := socket.recv():
                raise RuntimeError(answer.decode())
    connection.recv()


@contextmanager
def _another_process(work: Any, *args: Any) -> Iterator[Any]:
    """Run ``work(*args, connection)`` in a process; yield what it sends first, end it after."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(*args, there), daemon=True)
    process.start()
    try:
        if not here.poll(LIMIT):
            raise RuntimeError(f"the other process has offered nothing in {LIMIT:g} s")
        yield here.recv()
        here.send(None)
        process.join(LIMIT)
        if process.exitcode:
            raise RuntimeError(f"the other process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _must(*told: Any) -> None:
    for answer in told:
        if not answer[0]:
            raise RuntimeError(f"SGLang refuses the new weights: {answer}")


def _by_handles(models: Path, expected: Sequence[Any]) -> Counted:
    """Give the first of two engines other weights twice, while the second serves."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import (
        LocalSerializedTensor,
    )

    one, other = opened(plain, models, (0, 1))
    folders = {"each": checkpoint(models, "gpt2", 2), "all": checkpoint(models, "gpt2", 0)}
    with (
        _another_process(offer_handles, folders) as offered,
        Asked(partial(answers, other), expected[1]) as asked,
    ):
        before = wrong_of(partial(answers, one), expected[0], ROUNDS // 2)
        each = [(name, LocalSerializedTensor([it])) for name, it in offered["each"]]
        _must(one.begin_weight_update(), one.update_weights_from_tensor(each))
        _must(one.end_weight_update())
        after = wrong_of(partial(answers, one), expected[2], ROUNDS // 2)
        _must(one.begin_weight_update())
        _must(one.update_weights_from_tensor([offered["all"]], load_format="flattened_bucket"))
        _must(one.end_weight_update())
        again = wrong_of(partial(answers, one), expected[0], ROUNDS // 2)
    one.close()
    other.close()
    return _counted(asked, [before, after, again])


def _by_checkpoint_engine(models: Path, expected: Sequence[Any]) -> Counted:
    """Give each of two engines the other's weights in turn, while the second serves."""
    import torch
    from sglang.srt.platforms import current_platform

    one, other = opened(plain, models, (0, 1))
    card = f"GPU-{current_platform.get_device_uuid(torch.cuda.current_device())}"
    found: list[int] = []
    with Asked(partial(answers, other), expected[1]) as asked:
        found.append(wrong_of(partial(answers, one), expected[0], ROUNDS // 2))
        for seed in (2, 0):
            address = ADDRESS.format(seed)
            folder = checkpoint(models, "gpt2", seed)
            with _another_process(offer_by_checkpoint_engine, folder, address):
                _must(one.update_weights_from_ipc({card: address}))
            found.append(wrong_of(partial(answers, one), expected[seed], ROUNDS // 2))
    one.close()
    other.close()
    return _counted(asked, found)


def _counted(asked: Asked, found: Sequence[int]) -> Counted:
    rounds = ROUNDS // 2
    told = ", ".join(f"{it} of {rounds}" for it in found)
    note = f"{told} before and after the two updates, {asked.wrong} of {asked.total} of the other"
    return Counted(sum(found) + asked.wrong, len(found) * rounds + asked.total, note)


def sections() -> list[Section]:
    """All sections in which another process offers weights."""

    def gpt2(models: Path, seed: int) -> None:
        checkpoint(models, "gpt2", seed)

    how: dict[str, Any] = {"drafts": False, "seeds": 3, "limit": LIMIT}
    return [
        section("ipc", plain, gpt2, guarded=_by_handles, **how),
        section(
            "checkpoint_engine", plain, gpt2, guarded=_by_checkpoint_engine, **how, needs_cuda=True
        ),
    ]
