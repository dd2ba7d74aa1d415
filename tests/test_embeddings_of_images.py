"""What SGLang keeps by an image alone does not serve another runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import sglang_distguard
from sglang_distguard.testing import server_args

Model = Callable[..., Path]


def embedded(value: float) -> Any:
    """What a model of this value makes of the same image, by SGLang's own function."""
    import torch
    from sglang.srt.managers import mm_schedule
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

    image = MultimodalDataItem(modality=Modality.IMAGE, feature=torch.ones(2, 2), hash=7)
    image.offsets = [(0, 1)]
    found, _ = mm_schedule._get_chunked_embedding_full(
        lambda _items: torch.full((2, 4), value),
        [image],
        [(0, 1)],
        0,
        2,
        torch.zeros(2, dtype=torch.int64),
        torch.device("cpu"),
    )
    assert found is not None
    return found.unique().tolist()


def test_plain_sglang_gives_a_model_the_embeddings_of_another(sglang: None) -> None:
    from sglang.srt.managers import mm_schedule

    mm_schedule.init_mm_embedding_cache(1 << 20)
    assert [embedded(1.0), embedded(2.0)] == [[1.0], [1.0]]
    mm_schedule.embedding_cache = None


def test_every_runner_has_its_own_embeddings_of_an_image(guard: None, model: Model) -> None:
    from sglang.srt.managers import mm_schedule

    runners = [
        sglang_distguard.build_runner(server_args(model("llama")), name=name) for name in "ab"
    ]
    found = []
    for runner in runners:
        with sglang_distguard.activate(runner):
            mm_schedule.init_mm_embedding_cache(1 << 20)
    for value, runner in enumerate(runners):
        with sglang_distguard.activate(runner):
            found += [embedded(float(value)), embedded(9.0)]
    for runner in runners:
        sglang_distguard.close(runner)
    assert found == [[0.0], [0.0], [1.0], [1.0]]


def test_every_runner_waits_for_its_own_copies_of_images(guard: None, model: Model) -> None:
    """By an event in a global (0.5.23, `mm_utils.py:825`), which a GPU alone sets."""
    from sglang.srt.managers import mm_schedule

    runners = [
        sglang_distguard.build_runner(server_args(model("llama")), name=name) for name in "ab"
    ]
    found = []
    for name, runner in zip("ab", runners, strict=True):
        with sglang_distguard.activate(runner):
            found.append(mm_schedule.host_offload_event)
            mm_schedule.host_offload_event = cast("Any", f"the event of {name}")
    for runner in runners:
        with sglang_distguard.activate(runner):
            found.append(mm_schedule.host_offload_event)
        sglang_distguard.close(runner)
    assert found == [None, None, "the event of a", "the event of b"]
