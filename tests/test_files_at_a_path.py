"""What SGLang keeps by a path alone does not serve another runner."""

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
