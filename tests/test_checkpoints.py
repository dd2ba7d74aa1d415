"""The checkpoints of tests have the weights of their seed, whatever other threads do meanwhile.

Otherwise what a test compares depends on the first test that made the checkpoint: some weights have
logits so close to each other that the order in which requests arrive decides between them.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from sglang_distguard.testing import create_model
from sglang_distguard.testing.random_numbers import drawing_from

pytestmark = pytest.mark.usefixtures("sglang")


def test_numbers_that_another_thread_draws_meanwhile_change_no_weight(tmp_path: Path) -> None:
    import torch

    def draw_elsewhere() -> None:
        thread = threading.Thread(target=lambda: torch.rand(7))
        thread.start()
        thread.join()

    def written(folder: str, *, disturbed: bool) -> bytes:
        def adjust(model: Any) -> None:
            if disturbed:
                draw_elsewhere()
            for parameter in model.parameters():
                parameter.data.normal_()

        made = create_model("gpt2", tmp_path / folder, adjust=adjust)
        return (made / "model.safetensors").read_bytes()

    assert written("one", disturbed=True) == written("other", disturbed=False)


def test_making_a_checkpoint_leaves_torchs_own_generator_as_it_is(tmp_path: Path) -> None:
    import torch

    before = torch.random.get_rng_state()
    create_model("qwen3_moe", tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "draw",
    [
        lambda torch: torch.randn(3, 5),
        lambda torch: torch.randn_like(torch.zeros(4)),
        lambda torch: torch.rand_like(torch.zeros(2, 3), dtype=torch.float64),
        lambda torch: torch.nn.Linear(3, 4).weight.detach(),
        lambda torch: torch.nn.init.trunc_normal_(torch.zeros(9)),
        lambda torch: torch.randperm(11),
    ],
)
def test_the_numbers_of_a_seed_are_those_of_torchs_own_generator(draw: Any) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = draw(torch)
    with drawing_from(torch.Generator().manual_seed(3)):
        assert torch.equal(draw(torch), expected)


def test_a_generator_that_is_given_is_used() -> None:
    import torch

    given = [torch.Generator().manual_seed(5) for _ in range(2)]
    with drawing_from(torch.Generator().manual_seed(3)):
        drawn = torch.rand(3, generator=given[0])
    assert torch.equal(drawn, torch.rand(3, generator=given[1]))
