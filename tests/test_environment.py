"""Environment variables that a runner writes through SGLang's envs are private to its scope."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interpreters
import pytest
import sglang_distguard
import torch
from sglang_distguard import _core
from sglang_distguard.context import environment
from sglang_distguard.testing import generate, server_args

Model = Callable[..., Path]
VARIABLE = "SGLANG_MAMBA_SSM_DTYPE"


def mamba_dtype() -> Any:
    """The value that the running code sees."""
    from sglang.srt.environ import envs

    return envs.SGLANG_MAMBA_SSM_DTYPE.get()


def dtype_seen_by(runner: Any) -> Any:
    with sglang_distguard.activate(runner):
        return mamba_dtype()


def test_without_the_guard_a_configuration_reaches_the_next_runner(
    sglang: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline for the tests below."""
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import SpawnRanks, publish, reset_context

    monkeypatch.setattr(os, "environ", copy.deepcopy(os.environ))
    for args in (
        server_args(model("gpt2"), mamba_ssm_dtype="bfloat16"),
        server_args(model("gpt2")),
    ):
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    assert mamba_dtype() == "bfloat16"  # although the second configuration does not set it
    envs.SGLANG_MAMBA_SSM_DTYPE.clear()
    reset_context()


def test_without_the_guard_settings_that_are_resolved_by_hand_reach_every_runner(
    sglang: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline for the next one."""
    monkeypatch.setattr(os, "environ", copy.deepcopy(os.environ))
    server_args(model("gpt2"), mamba_ssm_dtype="bfloat16").resolve_once()
    server_args(model("gpt2")).resolve_once()
    assert mamba_dtype() == "bfloat16"


def test_settings_that_are_resolved_by_hand_reach_only_those_who_are_built_of_them(
    guard: None, model: Model
) -> None:
    before = dict(os.environ)
    asks = server_args(model("gpt2"), mamba_ssm_dtype="bfloat16")
    asks.resolve_once()
    asks.resolve_once()  # as `publish` does once more
    other = server_args(model("gpt2"))
    other.resolve_once()
    assert mamba_dtype() is None
    runners = [sglang_distguard.build_runner(it) for it in (asks, other)]
    assert [dtype_seen_by(it) for it in runners] == ["bfloat16", None]
    assert dict(os.environ) == before
    for runner in runners:
        sglang_distguard.close(runner)


def test_an_engine_writes_no_decision_of_its_settings_into_the_process(
    guard: None, model: Model
) -> None:
    from sglang.srt.environ import envs

    names = {it.name for it in vars(type(envs)).values() if hasattr(it, "is_set")}
    before = {name: os.environ.get(name) for name in names}
    args = server_args(model("gpt2"), mamba_ssm_dtype="bfloat16")
    with sglang_distguard.Engine(server_args=args):
        assert {name: os.environ.get(name) for name in names} == before


def test_an_engine_that_starts_child_processes_hands_them_its_decisions(cache: Path) -> None:
    """They inherit the variables of the process, and may have no guard."""
    printed = interpreters.run_well(LAUNCH, has=interpreters.Has.SGLANG)
    assert printed.splitlines()[-1] == "None bfloat16"


LAUNCH = """
import os
import sglang_distguard
from sglang_distguard.testing import create_model, server_args

sglang_distguard.install()
from sglang.srt.entrypoints import engine


def before_children(server_args):
    raise InterruptedError(os.environ.get("SGLANG_MAMBA_SSM_DTYPE"))


engine._set_envs_and_config = before_children  # it is called with the resolved settings
before = os.environ.get("SGLANG_MAMBA_SSM_DTYPE")
args = server_args(create_model("gpt2", CACHE), mamba_ssm_dtype="bfloat16")
try:
    engine.Engine._launch_subprocesses(args, None, None, None)
except InterruptedError as seen:
    print(before, seen)
"""


def test_every_runner_reads_what_its_own_configuration_wrote(guard: None, model: Model) -> None:
    before = dict(os.environ)
    asks = server_args(model("gpt2"), mamba_ssm_dtype="bfloat16")
    # The same arguments twice: SGLang resolves them, and writes, only once.
    every = [server_args(model("gpt2")), asks, server_args(model("gpt2")), asks]
    runners = [sglang_distguard.build_runner(it, name=f"runner {n}") for n, it in enumerate(every)]
    assert [dtype_seen_by(it) for it in runners] == [None, "bfloat16", None, "bfloat16"]
    for runner in runners:
        generate(runner, activate=sglang_distguard.activate)
    assert dict(os.environ) == before
    for runner in runners:
        sglang_distguard.close(runner)


def test_what_is_written_between_publish_and_the_runner_is_the_runners(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `ModelConfig` does (0.5.23, for DeepSeek V4)."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.environ import envs

    make = ModelConfig.from_server_args

    def writes(*args: Any, **kwargs: Any) -> Any:
        envs.SGLANG_MAMBA_SSM_DTYPE.set("float16")
        return make(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(ModelConfig, "from_server_args", writes)
        first = sglang_distguard.build_runner(server_args(model("gpt2")), name="first")
    second = sglang_distguard.build_runner(server_args(model("gpt2")), name="second")
    assert [dtype_seen_by(it) for it in (first, second)] == ["float16", None]
    assert VARIABLE not in os.environ
    for runner in (first, second):
        sglang_distguard.close(runner)


def test_what_a_refused_runner_wrote_is_gone(guard: None, model: Model) -> None:
    first = sglang_distguard.build_runner(server_args(model("gpt2")), name="first")
    refused = server_args(model("gpt2"), mamba_ssm_dtype="bfloat16", enable_tf32_matmul=True)
    with pytest.raises(sglang_distguard.SpecMismatch):
        sglang_distguard.build_runner(refused, name="refused")
    third = sglang_distguard.build_runner(server_args(model("gpt2")), name="third")
    assert [dtype_seen_by(it) for it in (first, third)] == [None, None]
    assert VARIABLE not in os.environ
    for runner in (first, third):
        sglang_distguard.close(runner)


def test_a_failed_publish_leaves_what_was_written_before(
    guard: None, model: Model, tmp_path: Path
) -> None:
    from sglang.srt.runtime_context import SpawnRanks, publish

    ranks = SpawnRanks(world_rank=0, gpu_id=0)
    publish(server_args(model("gpt2"), mamba_ssm_dtype="bfloat16"), role="scheduler", ranks=ranks)
    with pytest.raises(Exception, match="nowhere"):
        publish(
            server_args(tmp_path / "nowhere", mamba_ssm_dtype="float16"),
            role="scheduler",
            ranks=ranks,
        )
    assert mamba_dtype() == "bfloat16"
    publish(server_args(model("gpt2")), role="scheduler", ranks=ranks)
    assert mamba_dtype() is None


@pytest.mark.parametrize(
    "how", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))]
)
def test_copies_of_resolved_arguments_carry_what_they_wrote(
    guard: None, model: Model, how: Callable[[Any], Any]
) -> None:
    from sglang.srt.runtime_context import SpawnRanks, publish, reset_context

    args = server_args(model("gpt2"), mamba_ssm_dtype="bfloat16")
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    reset_context()
    assert mamba_dtype() is None
    publish(how(args), role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    assert mamba_dtype() == "bfloat16"


def test_a_context_that_is_made_and_entered_has_what_its_configuration_wrote(
    guard: None, model: Model
) -> None:
    from sglang.srt.runtime_context import create_context, use_context

    context = create_context(
        server_args(model("gpt2"), mamba_ssm_dtype="bfloat16"), role="scheduler"
    )
    assert mamba_dtype() is None
    with use_context(context):
        assert mamba_dtype() == "bfloat16"
    assert mamba_dtype() is None


def test_what_the_user_sets_reaches_every_runner_that_does_not_say_otherwise(
    guard: None, model: Model
) -> None:
    from sglang.srt.environ import envs

    runner = sglang_distguard.build_runner(server_args(model("gpt2")), name="silent")
    asks = server_args(model("gpt2"), mamba_ssm_dtype="bfloat16")
    says = sglang_distguard.build_runner(asks, name="says")
    with envs.SGLANG_MAMBA_SSM_DTYPE.override("float16"):
        assert os.environ[VARIABLE] == "float16"
        assert [dtype_seen_by(it) for it in (runner, says)] == ["float16", "bfloat16"]
    assert VARIABLE not in os.environ
    assert [dtype_seen_by(it) for it in (runner, says)] == [None, "bfloat16"]
    for it in (runner, says):
        sglang_distguard.close(it)


def test_fields_behave_in_a_scope_as_they_do_without(guard: None) -> None:
    from sglang.srt.environ import envs
    from sglang_distguard.context.scopes import scope_active

    number, text = envs.SGLANG_TCP_STORE_PORT, envs.SGLANG_HTTP_SERVER_APP_PATH

    def look() -> list[Any]:
        found: list[Any] = [number.is_set(), number.get()]
        number.set(7)
        found += [number.is_set(), number.get()]
        with number.override(8):
            found.append(number.get())
            with number.override(None):
                found += [number.is_set(), number.get()]
            found.append(number.get())
        found.append(number.get())
        with pytest.raises(KeyError), number.override(9):
            raise KeyError
        number.set("no number")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found += [number.get(), [str(it.message) for it in said]]
        text.set(None)
        found += [text.is_set(), text.get()]
        text.set("None")
        found.append(text.get())
        for field in (number, text):
            field.clear()
            found += [field.is_set(), field.get()]
        return found

    before = dict(os.environ)
    as_without = look()
    assert dict(os.environ) == before
    with scope_active(_core.new_scope("test")):
        assert look() == as_without
        assert dict(os.environ) == before


def test_what_is_cleared_in_a_scope_stays_for_the_process(
    guard: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.environ import envs
    from sglang_distguard.context.scopes import scope_active

    monkeypatch.setenv(VARIABLE, "float16")
    with scope_active(_core.new_scope("test")):
        assert mamba_dtype() == "float16"
        envs.SGLANG_MAMBA_SSM_DTYPE.clear()
        assert not envs.SGLANG_MAMBA_SSM_DTYPE.is_set()
        assert mamba_dtype() is None
    assert mamba_dtype() == "float16"


def test_two_scopes_override_one_variable_at_once(guard: None) -> None:
    """As constructors of draft models do (0.5.23: `models.deepseek_nextn`)."""
    from sglang.srt.environ import envs
    from sglang_distguard.context.scopes import scope_active

    inside, looked = threading.Barrier(2), threading.Barrier(2)
    seen: dict[str, Any] = {}

    def work(dtype: str) -> None:
        with scope_active(_core.new_scope(dtype)), envs.SGLANG_MAMBA_SSM_DTYPE.override(dtype):
            inside.wait(60)
            seen[dtype] = mamba_dtype()
            looked.wait(60)

    threads = [threading.Thread(target=work, args=(it,)) for it in ("float16", "bfloat16")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"float16": "float16", "bfloat16": "bfloat16"}
    assert VARIABLE not in os.environ


def test_a_runner_that_outlives_the_guard_finds_in_the_process_what_it_wrote(
    sglang: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import SpawnRanks, publish, reset_context

    sglang_distguard.install()
    try:
        args = server_args(model("gpt2"), mamba_ssm_dtype="bfloat16")
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
        assert VARIABLE not in os.environ
    finally:
        sglang_distguard.uninstall()
    try:
        assert os.environ[VARIABLE] == mamba_dtype() == "bfloat16"
        assert environment.of_scope.value_in(None) == {}
    finally:
        for name in environment.written_by(args):
            getattr(envs, name).clear()
        reset_context()


def test_a_compiled_forward_reads_its_own_runners_variables(guard: None) -> None:
    from sglang.srt.environ import envs
    from sglang_distguard.context.scopes import scope_active
    from torch._dynamo.testing import CompileCounter

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * envs.SGLANG_TCP_STORE_PORT.get()

    torch._dynamo.reset()
    counter = CompileCounter()
    run = torch.compile(forward, backend=counter, fullgraph=True)
    scopes = {number: _core.new_scope(str(number)) for number in (2, 5)}
    for number, scope in scopes.items():
        with scope_active(scope):
            envs.SGLANG_TCP_STORE_PORT.set(number)
    for _ in range(3):
        for number, scope in scopes.items():
            with scope_active(scope):
                assert run(torch.ones(3)).tolist() == [float(number)] * 3
    assert counter.frame_count == 2
    torch._dynamo.reset()
