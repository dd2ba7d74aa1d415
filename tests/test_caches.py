"""SGLang's caches that depend on one runner's configuration do not serve another runner."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard
from sglang_distguard.audit.values import is_cache
from sglang_distguard.hooks.caches import CHANGES
from sglang_distguard.testing import server_args

Model = Callable[..., Path]


@pytest.fixture
def tuned(sglang: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SGLang's MoE configurations, with one that is tuned for this machine."""
    import triton
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config as configs

    folder = tmp_path / "configs" / f"triton_{triton.__version__.replace('.', '_')}"
    folder.mkdir(parents=True)
    (folder / "tuned.json").write_text(json.dumps({"1": {"BLOCK_SIZE_M": 16}}))
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(configs, "get_config_file_name", lambda *args, **kwargs: "tuned.json")
    configs.get_moe_configs.cache_clear()
    yield configs
    configs.get_moe_configs.cache_clear()


def ask(configs: Any, model: Path, *, deterministic: bool) -> Any:
    """Ask twice as a runner of this configuration; return the result."""
    from sglang.srt.runtime_context import SpawnRanks, get_context, publish

    publish(server_args(model), role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    get_context().override("test", enable_deterministic_inference=deterministic)
    first, second = (configs.get_moe_configs(8, 64, None) for _ in range(2))
    assert first is second
    return first


def test_plain_sglang_gives_one_runner_the_cached_value_of_another(
    tuned: Any, model: Model
) -> None:
    from sglang.srt.runtime_context import reset_context

    try:
        assert ask(tuned, model("qwen3_moe"), deterministic=False) == {1: {"BLOCK_SIZE_M": 16}}
        assert ask(tuned, model("qwen3_moe"), deterministic=True) is not None
    finally:
        reset_context()


def test_a_runner_is_told_what_follows_from_its_own_configuration(
    guard: None, tuned: Any, model: Model
) -> None:
    told = {}
    for name, deterministic in (("fast", False), ("deterministic", True), ("fast again", False)):
        with sglang_distguard.runner_scope(name):
            told[name] = ask(tuned, model("qwen3_moe"), deterministic=deterministic)
    assert told["fast"] == told["fast again"] == {1: {"BLOCK_SIZE_M": 16}}
    assert told["deterministic"] is None


def test_sglangs_own_caches_are_there_again_after_uninstall(sglang: None) -> None:
    import importlib

    def caches() -> list[Any]:
        return [getattr(importlib.import_module(it.module), it.name) for it in CHANGES]

    before = caches()
    sglang_distguard.install()
    try:
        kept = caches()
        for ours, theirs in zip(kept, before, strict=True):
            assert ours is not theirs
            assert ours.__wrapped__ is theirs.__wrapped__
            if is_cache(theirs):
                assert ours.cache_parameters() == theirs.cache_parameters()
    finally:
        sglang_distguard.uninstall()
    assert caches() == before
    for ours, theirs in zip(kept, before, strict=True):
        if is_cache(theirs):
            assert ours.cache_info() == theirs.cache_info()
