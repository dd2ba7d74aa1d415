"""Records of experts and of torch's profiler, of engines in one process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import engine_calls
import interpreters
import pytest
from engine_calls import at_once, checkpoint, opened, tokens
from sglang_distguard import _core
from sglang_distguard.hooks.torch_profiler import PROFILER

FOLDER = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"
MODE = {"expert_distribution_recorder_mode": "stat"}


def test_each_engine_records_its_own_experts(
    guard: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both are of the one architecture that records on a CPU: Qwen2-MoE needs Triton (0.5.23).
    folders = [checkpoint("qwen3_moe", seed) for seed in (0, 1)]
    expected = []
    for number, folder in enumerate(folders):
        alone = tmp_path / f"alone-{number}"
        call = f"engine_calls.plain({str(folder)!r}, {MODE!r}, {{'recorded': {{}}}})"
        printed = interpreters.run_well(
            "import engine_calls\n", call, has=interpreters.Has.SGLANG, **{FOLDER: str(alone)}
        )
        assert "tokens" in printed
        expected += engine_calls.dumped(alone)
    assert len(expected) == 2
    assert expected[0] != expected[1]
    monkeypatch.setenv(FOLDER, str(tmp_path / "both"))
    with opened(*folders, **MODE) as engines:
        at_once(engines, [{"recorded": {}}] * 2)
    assert sorted(engine_calls.dumped(tmp_path / "both")) == sorted(expected)


def traces(folder: Path) -> list[str]:
    return [it.name for it in folder.rglob("*.trace.json.gz")]


def test_one_engine_is_profiled_at_a_time(guard: None, tmp_path: Path) -> None:
    recording: dict[str, Any] = {"activities": ["CPU"], "with_stack": False}
    with opened(checkpoint("llama"), checkpoint("qwen3_moe")) as (one, other):
        one.start_profile(output_dir=str(tmp_path / "one"), **recording)
        expected = tokens(one), tokens(other)
        # Two recordings at once would end the process: libkineto (torch 2.14.1) accesses freed memory.
        with pytest.raises(RuntimeError, match=r"profile: existing .* of llama-0-scheduler"):
            other.start_profile(output_dir=str(tmp_path / "other"), **recording)
        assert (tokens(one), tokens(other)) == expected
        one.stop_profile()
        other.start_profile(output_dir=str(tmp_path / "other"), **recording)
        assert tokens(other) == expected[1]
        other.stop_profile()
        assert len(traces(tmp_path / "one")) == len(traces(tmp_path / "other")) == 1


def test_a_profile_ends_with_its_engine(guard: None, tmp_path: Path) -> None:
    recording: dict[str, Any] = {"activities": ["CPU"], "with_stack": False}
    with opened(checkpoint("llama")) as (engine,):
        engine.start_profile(output_dir=str(tmp_path), **recording)
        tokens(engine)
        assert _core.is_ready(PROFILER)
    assert not _core.is_ready(PROFILER)
    with opened(checkpoint("llama")) as (another,):
        another.start_profile(output_dir=str(tmp_path), **recording)
        another.stop_profile()
    assert len(traces(tmp_path)) == 1


def test_a_profile_of_other_code_is_named(guard: None, tmp_path: Path) -> None:
    import torch

    recording: dict[str, Any] = {"activities": ["CPU"], "with_stack": False}
    with opened(checkpoint("llama")) as (engine,):
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
            pytest.raises(RuntimeError, match=f"of thread {threading.current_thread().name}"),
        ):
            engine.start_profile(output_dir=str(tmp_path), **recording)
        engine.start_profile(output_dir=str(tmp_path), **recording)
        engine.stop_profile()
    assert len(traces(tmp_path)) == 1
