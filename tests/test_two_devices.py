"""Runners of one process on different devices: one world of one rank, and each its own device."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard as dg
import torch
from conftest import CACHE
from sglang_distguard.hooks.parallel_state import world_spec
from sglang_distguard.runner.handle import handle_of
from sglang_distguard.testing import bit_equal, fleet, generate, server_args

Model = Callable[..., Path]
CALL = {"local_rank": 1, "distributed_init_method": "tcp://…", "backend": "gloo"}


def test_runners_on_devices_0_and_1_compute_what_each_computes_alone(
    guard: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: "world was requested with other values than it has: local_rank: existing 0"."""
    cores = sorted(os.sched_getaffinity(0))
    node = (
        f"{cores[0]}-{cores[-1]}"  # of a CPU the index is that of a NUMA node; each has all cores
    )
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"{node}|{node}")
    members = fleet.members(CACHE, [("llama", "float32"), ("gpt2", "float32")])
    requests = [
        dg.BuildRequest(server_args(member.model), gpu_id=index, name=f"on {index}")
        for index, member in enumerate(members)
    ]
    runners = [result.unwrap() for result in dg.build_runners(requests, progress=False)]
    assert [runner.gpu_id for runner in runners] == [0, 1]
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda it: generate(it, activate=dg.activate), runners))
    for runner, member, result in zip(runners, members, made, strict=True):
        assert bit_equal(result.logits, member.alone.logits)
        dg.close(runner)


def test_the_local_rank_counts_in_a_world_of_several_ranks_only() -> None:
    alone = [
        world_spec({**CALL, "world_size": 1, "rank": 0, "local_rank": device}) for device in (0, 1)
    ]
    assert alone[0] == alone[1]
    several = [
        world_spec({**CALL, "world_size": 2, "rank": 0, "local_rank": device}) for device in (0, 1)
    ]
    assert several[0] != several[1]


class Devices(threading.local):
    """What torch keeps for each thread; a CPU has no device to change."""

    current = 0

    def exchange(self, index: int) -> int:
        before, self.current = self.current, index
        return before


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    made = Devices()
    monkeypatch.setattr(torch.cuda, "_exchange_device", made.exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", made.exchange)
    return made


def test_a_method_computes_on_its_runners_device_and_restores_the_callers(
    runner: Any, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle_of(runner).use_device(3)
    seen: list[int] = []
    forward = runner.model.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(devices.current)
        return forward(*args, **kwargs)

    monkeypatch.setattr(runner.model, "forward", noted)

    def use(before: int) -> int:
        devices.current = before
        generate(runner, steps=1)  # not activated: batches find the runner by what they are given
        with dg.activate(runner):
            seen.append(devices.current)
        with pytest.raises(TypeError):
            runner.forward()
        return devices.current

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(use, 2).result() == 2
    assert use(0) == 0
    assert seen == [3] * 6


def test_blocks_of_tasks_of_one_loop_change_no_device(runner: Any, devices: Devices) -> None:
    """They end in any order: the last one to end would leave another one's device."""
    handle_of(runner).use_device(3)

    async def use() -> int:
        with dg.activate(runner):
            await asyncio.sleep(0)
            return devices.current

    async def both() -> list[int]:
        return list(await asyncio.gather(use(), use()))

    assert asyncio.run(both()) == [0, 0]
    assert devices.current == 0


def test_without_a_device_of_its_own_a_runner_leaves_the_threads_one(
    runner: Any, devices: Devices
) -> None:
    devices.current = 5
    with dg.activate(runner):
        assert devices.current == 5
    assert generate(runner, steps=1).tokens
    assert devices.current == 5
