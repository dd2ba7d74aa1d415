"""Expert-location metadata belongs to the runner."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import sglang_distguard
from sglang_distguard.testing import bit_equal, fleet, max_abs_error, server_args, steps

#: Logical expert held by each physical slot, per layer: the model's own order and two others.
LAYOUTS = (
    [[0, 1, 2, 3, 4, 5, 6, 7]] * 2,
    [[3, 1, 2, 0, 7, 6, 5, 4], [7, 6, 5, 4, 3, 2, 1, 0]],
    [[1, 0, 3, 2, 5, 4, 7, 6], [0, 2, 4, 6, 1, 3, 5, 7]],
)


def test_runners_with_different_layouts_keep_their_own_and_are_right_at_once(
    guard: None, cache: Path
) -> None:
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    (member,) = fleet.members(cache, [("qwen3_moe", "float32")])
    expected = fleet.huggingface_logits(member)
    results = sglang_distguard.build_runners(
        [
            server_args(
                member.model,
                init_expert_location=json.dumps({"physical_to_logical_map": layout}),
                ep_dispatch_algorithm="dynamic",
            )
            for layout in LAYOUTS
        ],
        progress=False,
    )
    runners = [result.unwrap() for result in results]
    for runner, layout in zip(runners, LAYOUTS, strict=True):
        with sglang_distguard.activate(runner):
            metadata = get_global_expert_location_metadata()
        assert metadata is not None
        assert metadata.physical_to_logical_map.tolist() == layout
    alone = [steps.generate(runner, activate=sglang_distguard.activate) for runner in runners]
    wrong: list[str] = []
    start = threading.Barrier(len(runners))

    def work(number: int) -> None:
        start.wait()
        for _ in range(5):
            result = steps.generate(runners[number], activate=sglang_distguard.activate)
            if not bit_equal(result.logits, alone[number].logits):
                wrong.append(f"layout {number} changed")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(runners))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for generation in alone:
        assert max_abs_error(generation.logits, expected) < fleet.FLOAT32_TOLERANCE
    for runner in runners:
        sglang_distguard.close(runner)


def test_metadata_may_be_set_again_where_sglang_asserts_that_it_is_set_once(
    guard: None, cache: Path
) -> None:
    (member,) = fleet.members(cache, [("qwen3_moe", "float32")])
    for _ in range(2):  # the second publish replaces SGLang's default context, resources and all
        runner = steps.build(server_args(member.model))
        result = steps.generate(runner, activate=sglang_distguard.activate)
        assert bit_equal(result.logits, member.alone.logits)
        sglang_distguard.close(runner)
