"""New weights for two engines at once, from trainers in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_calls import checkpoint, opened, tokens
from interpreters import Forked
from references import reference
from sglang_distguard import Engine
from sglang_distguard.testing import free_port
from sglang_distguard.testing.updates import weights_of

#: Name of both engines' groups, and SGLang's default.
GROUP = "weight_update_group"
TRAINER = """
    import torch
    from sglang.srt.utils import init_custom_process_group
    from sglang_distguard.testing.updates import weights_of
    from pathlib import Path
    address = "tcp://127.0.0.1:" + sys.argv[1]
    group = init_custom_process_group(
        backend="gloo", init_method=address, world_size=2, rank=0, group_name=sys.argv[2]
    )
    for _, weight in weights_of(Path(sys.argv[3])):
        torch.distributed.broadcast(weight, src=0, group=group)
"""


@pytest.fixture
def engines(guard: None) -> Iterator[list[Engine]]:
    with opened(checkpoint("llama"), checkpoint("qwen3_moe")) as made:
        yield made


def trained(engine: Engine, folder: Path) -> list[list[int]]:
    """Give the engine the weights of ``folder`` from another process, as SGLang's own tests do."""
    port = free_port()
    trainer = Forked("import sys\n", TRAINER, arguments=[str(port), GROUP, str(folder)])
    joined = engine.init_weights_update_group(
        master_address="127.0.0.1",
        master_port=port,
        rank_offset=1,
        world_size=2,
        group_name=GROUP,
        backend="gloo",
    )
    assert joined == (True, "Succeeded to initialize custom process group.")
    assert engine.begin_weight_update()[0]
    weights = weights_of(folder)
    changed = engine.update_weights_from_distributed(
        [name for name, _ in weights],
        [str(it.dtype).removeprefix("torch.") for _, it in weights],
        [list(it.shape) for _, it in weights],
        group_name=GROUP,
    )
    assert changed == (True, "Succeeded to update parameter online.")
    assert engine.end_weight_update()[0]
    assert trainer.wait().returncode == 0
    return tokens(engine)


def test_two_engines_get_weights_at_once_through_groups_of_one_name(engines: list[Engine]) -> None:
    folders = [checkpoint("llama", seed=1), checkpoint("qwen3_moe", seed=1)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(trained, engines, folders))
    assert found == [reference(it).tokens for it in folders]
    one, other = engines
    refused = one.init_weights_update_group(
        "127.0.0.1", free_port(), 0, 1, group_name=GROUP, backend="gloo"
    )
    assert refused[1].startswith("Failed to initialize custom process group: The specified group")
    assert one.destroy_weights_update_group(GROUP) == (
        True,
        "Succeeded to destroy custom process group.",
    )
    assert one.destroy_weights_update_group(GROUP)[0] is False
    assert other.destroy_weights_update_group(GROUP)[0]  # its own one is still there


def test_the_groups_of_an_engine_end_with_it(engines: list[Engine]) -> None:
    from torch.distributed import distributed_c10d

    engine = engines[0]
    before = set(distributed_c10d._world.pg_names.values())
    made = engine.init_weights_update_group(
        "127.0.0.1", free_port(), 0, 1, group_name=GROUP, backend="gloo"
    )
    assert made[0]
    assert set(distributed_c10d._world.pg_names.values()) - before
    engine.close()
    assert set(distributed_c10d._world.pg_names.values()) == before
