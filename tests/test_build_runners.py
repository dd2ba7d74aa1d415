"""build_runner and build_runners: runners ready to forward, in order, despite single failures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard
from registry_calls import request
from sglang_distguard import BuildRequest, NotSupported, _core
from sglang_distguard.distributed.coordinators import default_process_group
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


def test_a_wrong_request_is_refused_before_any_is_built_and_the_error_says_which(
    guard: None, model: Model
) -> None:
    good = server_args(model("gpt2"))
    with pytest.raises(TypeError, match="gpu_id must be an int, not '0'") as caught:
        sglang_distguard.build_runners([good, BuildRequest(good, gpu_id="0")])  # type: ignore[arg-type]
    assert "requests[1]" in caught.value.__notes__[0]
    assert default_process_group() is None


def test_an_unknown_option_is_refused_with_the_one_that_may_be_meant(
    guard: None, model: Model
) -> None:
    with pytest.raises(TypeError, match=r"'draft_model_index' .* did you mean draft_model_idx"):
        sglang_distguard.build_runner(server_args(model("gpt2")), draft_model_index=1)


def test_several_ranks_are_refused_where_no_process_would_start_the_others(
    guard: None, model: Model
) -> None:
    with pytest.raises(NotSupported, match="Use tp_size=1") as caught:
        sglang_distguard.build_runner(server_args(model("gpt2"), tp_size=2))
    assert caught.value.details == {"tp_size": 2, "pp_size": 1, "world_size": None}
    runner = sglang_distguard.build_runner(server_args(model("gpt2")))
    with pytest.raises(NotSupported, match=r"torch\.distributed has 1 ") as caught:
        sglang_distguard.build_runner(server_args(model("gpt2"), pp_size=2))
    assert caught.value.details["world_size"] == 1
    sglang_distguard.close(runner)


@pytest.mark.parametrize(
    "asked",
    [
        {"enable_tf32_matmul": True},
        {
            "enable_deterministic_inference": True,
            "attention_backend": "triton",
        },  # it needs a kernel
        {"enable_p2p_check": True},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_runners_agree_on_what_sglang_changes_for_the_whole_process(
    guard: None, model: Model, asked: dict[str, Any]
) -> None:
    setting = next(iter(asked))
    plain = sglang_distguard.build_runner(server_args(model("gpt2")), name="plain")
    with pytest.raises(sglang_distguard.SpecMismatch, match=setting) as caught:
        sglang_distguard.build_runner(server_args(model("gpt2"), **asked))
    assert "'plain'" in str(caught.value)
    assert caught.value.details["key"] == "process"
    sglang_distguard.close(plain)
    assert _core.forget("process")


def test_what_sglang_never_takes_back_is_not_taken_for_undone(guard: None, model: Model) -> None:
    import torch

    path = model("gpt2")
    sglang_distguard.close(sglang_distguard.build_runner(server_args(path)))
    with pytest.raises(sglang_distguard.SpecMismatch, match="enable_p2p_check"):
        # SGLang has removed the check.
        sglang_distguard.build_runner(server_args(path, enable_p2p_check=True))
    sglang_distguard.close(
        sglang_distguard.build_runner(server_args(path, enable_tf32_matmul=True))
    )
    try:
        with pytest.raises(sglang_distguard.SpecMismatch, match="enable_tf32_matmul"):
            sglang_distguard.build_runner(server_args(path))  # SGLang never switches it off
    finally:
        torch.set_float32_matmul_precision("highest")
        assert _core.forget("process")


def test_a_runner_that_agreed_and_holds_nothing_yet_agrees_again_when_another_wants_more(
    guard: None, model: Model
) -> None:
    """Before the fix: "process cannot be held: it is not initialised, or was rebuilt"."""
    import torch

    path, beside = model("gpt2"), []

    def build_another(step: str) -> None:
        if step == "init":
            args = server_args(path, enable_tf32_matmul=True)
            thread = threading.Thread(
                target=lambda: beside.append(sglang_distguard.build_runner(args, name="another"))
            )
            thread.start()
            thread.join()

    try:
        with (
            sglang_distguard.runner_scope("first"),
            pytest.raises(sglang_distguard.SpecMismatch, match="enable_tf32_matmul") as caught,
        ):
            steps.build(server_args(path), after=build_another)
        assert "'another'" in str(caught.value)
        sglang_distguard.close(beside.pop())
    finally:
        torch.set_float32_matmul_precision("highest")
        assert _core.forget("process")


def test_a_draft_of_what_is_no_open_runner_is_refused(guard: None, model: Model) -> None:
    runner = sglang_distguard.build_runner(server_args(model("gpt2")), name="target")
    with pytest.raises(ValueError, match="is_draft_worker must be True"):
        sglang_distguard.build_runner(
            server_args(model("gpt2")), target=runner, is_draft_worker=False
        )
    sglang_distguard.close(runner)
    with pytest.raises(sglang_distguard.DistGuardError, match="'target' is closed"):
        sglang_distguard.build_runner(server_args(model("gpt2")), target=runner)
    thing: Any = object()
    with pytest.raises(TypeError, match="target must be a ModelRunner that was built under"):
        sglang_distguard.build_runner(server_args(model("gpt2")), target=thing)


def test_what_sglang_refuses_leaves_no_runner_scope_or_lease(guard: None, model: Model) -> None:
    from sglang.srt.runtime_context import snapshot_context

    path = model("gpt2")

    def refused(gpu_id: int = 0, **overrides: Any) -> None:
        with pytest.raises(Exception, match=r"\w"):  # any error of SGLang's own
            sglang_distguard.build_runner(server_args(path, **overrides), gpu_id=gpu_id)
        assert (sglang_distguard.snapshot()["scopes"], _core.live_runners(None)) == ([], 0)
        assert _core.current_scope() is None

    context = snapshot_context()
    stamp = dict(context["__parallel__"]["_stamp"])
    refused(dtype="nonsense")
    refused(device="nonsense")
    refused(dist_init_addr="nonsense")
    refused(gpu_id=10**6)
    assert default_process_group() is None
    now = snapshot_context()
    assert now["_server_args"] is context["_server_args"]
    # reported: a `publish` that fails half-way (ep_size=3) leaves a part of its stamp
    assert now["__parallel__"]["_stamp"] == stamp
    # This fails after the world and the groups were made; they are valid and stay for others.
    refused(load_format="nonsense")
    slots = {slot["key"]: slot for slot in sglang_distguard.snapshot()["slots"]}
    for key in ("world", "groups"):
        assert (slots[key]["state"], slots[key]["holders"]) == ("ready", [])
    sglang_distguard.close(sglang_distguard.build_runner(server_args(path)))


@contextmanager
def another_thread_makes_the_world() -> Iterator[None]:
    """Let another thread lead the world, with the spec of a runner on the CPU, in a with block."""
    leading, finish = threading.Event(), threading.Event()
    spec = {"world_size": 1, "rank": 0, "local_rank": 0, "backend": "gloo"}

    def lead() -> None:
        claim = request("world", spec, runner="slow").try_acquire(None)
        assert claim is not None
        leading.set()
        assert finish.wait(60)
        claim.fail("on purpose")

    thread = threading.Thread(target=lead)
    thread.start()
    assert leading.wait(30)
    try:
        yield
    finally:
        finish.set()
        thread.join()


def test_the_deadline_can_be_set_per_build_request_and_around_them(
    guard: None, model: Model
) -> None:
    path = model("gpt2")
    with another_thread_makes_the_world():
        with pytest.raises(sglang_distguard.AcquireTimeout, match="'slow'"):
            sglang_distguard.build_runner(server_args(path), timeout=0.1)
        requests = [BuildRequest(server_args(path), timeout=0.1)]
        (result,) = sglang_distguard.build_runners(requests, progress=False)
        assert isinstance(result.error, sglang_distguard.AcquireTimeout)
        with sglang_distguard.runner_scope(timeout=0.1):
            (result,) = sglang_distguard.build_runners([server_args(path)], progress=False)
        assert isinstance(result.error, sglang_distguard.AcquireTimeout)


def test_nothing_to_build_is_an_empty_list(guard: None) -> None:
    assert sglang_distguard.build_runners([]) == []


def test_without_install_it_says_what_to_do(sglang: None, model: Model) -> None:
    with pytest.raises(sglang_distguard.DistGuardError, match="install"):
        sglang_distguard.build_runner(server_args(model("gpt2")))


def test_the_callers_own_scope_and_settings_stay_as_they_were(guard: None, model: Model) -> None:
    from sglang_distguard import _core
    from sglang_distguard.config import settings

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
