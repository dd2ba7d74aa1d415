"""build_runner and build_runners: ready to forward, in order, one failure does not lose others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sglang_distguard
from sglang_distguard import BuildRequest
from sglang_distguard.testing import bit_equal, fleet, server_args, steps

Model = Callable[..., Path]


def test_results_come_in_order_and_a_failure_is_reported_with_its_name(
    guard: None, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    members = fleet.members(cache, [("llama", "float32"), ("gpt2", "bfloat16")])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "no_such_model"}')
    requests = [
        BuildRequest(server_args(members[0].model), name="first"),
        BuildRequest(server_args(broken), name="second"),
        server_args(members[1].model, dtype="bfloat16"),
    ]
    results = sglang_distguard.build_runners(requests, max_workers=3, progress=False)
    assert [result.name for result in results] == ["first", "second", "gpt2-0-2"]
    assert [result.error is None for result in results] == [True, False, True]
    assert "second" in "".join(getattr(results[1].error, "__notes__", []))
    with pytest.raises(type(results[1].error)):  # type: ignore[arg-type]
        results[1].unwrap()
    for result, member in ((results[0], members[0]), (results[2], members[1])):
        generated = steps.generate(result.unwrap(), activate=sglang_distguard.activate)
        assert bit_equal(generated.logits, member.alone.logits)
        sglang_distguard.close(result.unwrap())
    del results


def test_nothing_to_build_is_an_empty_list(guard: None) -> None:
    assert sglang_distguard.build_runners([]) == []


def test_without_install_it_says_what_to_do(sglang: None, model: Model) -> None:
    with pytest.raises(sglang_distguard.DistGuardError, match="install"):
        sglang_distguard.build_runner(server_args(model("gpt2")))


def test_the_callers_own_scope_and_settings_stay_as_they_were(guard: None, model: Model) -> None:
    from sglang_distguard import _core, settings

    before = _core.current_scope(), settings.current()
    runners = [sglang_distguard.build_runner(server_args(model("gpt2"))) for _ in range(2)]
    assert (_core.current_scope(), settings.current()) == before
    for runner in runners:
        sglang_distguard.close(runner)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"name": ""}, ValueError),
        ({"name": "a\nb"}, ValueError),
        ({"name": 3}, TypeError),
        ({"timeout": 0}, ValueError),
        ({"timeout": "1"}, TypeError),
        ({"reuse": "no"}, TypeError),
    ],
)
def test_unusable_settings_of_a_scope_are_refused(
    arguments: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error), sglang_distguard.runner_scope(**arguments):  # type: ignore[arg-type]
        pass


def test_a_snapshot_is_plain_json(guard: None, model: Model) -> None:
    import json

    runner = sglang_distguard.build_runner(server_args(model("gpt2")), name="Läufer 走")
    snapshot = json.loads(json.dumps(sglang_distguard.snapshot()))
    assert snapshot["installed"] is True
    slots = {slot["key"]: slot for slot in snapshot["slots"]}
    assert slots["groups"]["holders"][0]["name"] == "Läufer 走"
    assert slots["groups"]["spec"]["tp_size"] == 1
    sglang_distguard.close(runner)


def test_errors_survive_pickling_with_their_facts() -> None:
    import pickle

    from sglang_distguard import errors

    for kind in (errors.SpecMismatch, errors.AcquireTimeout, errors.NotSupported):
        copy = pickle.loads(pickle.dumps(kind("what happened", key="world")))
        assert type(copy) is kind
        assert (str(copy), copy.details) == ("what happened", {"key": "world"})
    assert issubclass(errors.SpecMismatch, ValueError)
    assert issubclass(errors.AcquireTimeout, TimeoutError)
