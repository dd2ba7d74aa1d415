"""What SGLang keeps by a path or by an image alone does not serve another runner."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard
from sglang_distguard.testing import bit_equal, generate, server_args

Model = Callable[..., Path]


def configure(folder: Path, theta: float) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    file.write_text(json.dumps(config))


@pytest.fixture
def checkpoint(model: Model, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model("llama"), tmp_path / "checkpoint"))


def theta_of(folder: Path) -> float:
    from sglang.srt.utils.hf_transformers import get_config

    config: Any = get_config(str(folder), trust_remote_code=False)
    return config.rope_parameters["rope_theta"]


def test_plain_sglang_gives_a_new_checkpoint_the_configuration_of_the_old_one(
    checkpoint: Path,
) -> None:
    configure(checkpoint, 10000.0)
    assert theta_of(checkpoint) == 10000.0
    configure(checkpoint, 3.0)
    assert theta_of(checkpoint) == 10000.0


def test_a_checkpoint_that_replaces_another_is_built_with_its_own_configuration(
    guard: None, checkpoint: Path, tmp_path: Path
) -> None:
    def logits(folder: Path) -> Any:
        runner = sglang_distguard.build_runner(server_args(folder), name=folder.name)
        runners.append(runner)
        return generate(runner, activate=sglang_distguard.activate).logits

    runners: list[Any] = []
    configure(checkpoint, 10000.0)
    before = logits(checkpoint)
    configure(checkpoint, 3.0)
    after = logits(checkpoint)
    elsewhere = logits(Path(shutil.copytree(checkpoint, tmp_path / "elsewhere")))
    for runner in runners:
        sglang_distguard.close(runner)
    assert bit_equal(after, elsewhere)
    assert not bit_equal(after, before)


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
