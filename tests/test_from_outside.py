"""User code sees scoped globals and hooked functions as it would without the guard."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import sglang_distguard as dg
from interpreters import Has, run_well
from sglang_distguard.errors import NotSupported
from sglang_distguard.testing import bit_equal, fleet, server_args, steps

Model = Callable[..., Path]


@pytest.fixture
def two(guard: None, model: Model) -> Iterator[tuple[Any, Any]]:
    """A runner in the default scope and one in a scope of its own."""
    made = [dg.build_runner(server_args(model(name)), name=name) for name in ("llama", "gpt2")]
    yield made[0], made[1]
    for runner in made:
        dg.close(runner)


def test_a_global_read_from_outside_equals_what_sglangs_functions_read(
    two: tuple[Any, Any],
) -> None:
    from sglang.srt import runtime_context
    from sglang.srt.distributed import parallel_state

    seen = []
    for runner in two:
        with dg.activate(runner):
            group = parallel_state.get_tp_group()
            assert parallel_state._TP is group
            assert getattr(parallel_state, "_T" + "P") is group
            assert runtime_context._CONTEXT is runtime_context.get_context()
            assert runtime_context._PARALLEL is runtime_context.get_parallel()
            seen.append(runtime_context._CONTEXT)
    assert seen[0] is not seen[1]
    assert runtime_context._CONTEXT is seen[0]  # the default scope is the first runner's


@pytest.mark.parametrize("way", ["assignment", "setattr", "mock.patch.object", "mock.patch"])
def test_a_write_reaches_the_scope_it_is_made_in_and_no_other(
    two: tuple[Any, Any], way: str
) -> None:
    from sglang.srt.distributed import parallel_state

    fake = SimpleNamespace(world_size=7, rank_in_group=3)

    def written() -> Any:
        if way == "mock.patch.object":
            return mock.patch.object(parallel_state, "_TP", fake)
        if way == "mock.patch":
            return mock.patch("sglang.srt.distributed.parallel_state._TP", fake)
        return Assigned(parallel_state, fake, by_name=way == "setattr")

    for runner, other in (two, two[::-1]):
        with dg.activate(other):
            of_other = parallel_state._TP
        with dg.activate(runner):
            before = parallel_state._TP
            with written():
                assert parallel_state._TP is fake
                assert parallel_state.model_parallel_is_initialized()
                with dg.activate(other):
                    assert parallel_state._TP is of_other
            assert parallel_state._TP is before


class Assigned:
    """Context manager that sets and restores `parallel_state._TP`, as in-tree code does."""

    def __init__(self, module: Any, value: Any, *, by_name: bool) -> None:
        self._module, self._value, self._by_name = module, value, by_name

    def __enter__(self) -> None:
        self._before = self._module._TP
        self._set(self._value)

    def __exit__(self, *_error: object) -> None:
        self._set(self._before)

    def _set(self, value: Any) -> None:
        if self._by_name:
            setattr(self._module, "_" + "TP", value)
        else:
            self._module._TP = value


def test_none_assigned_outside_is_seen_by_the_first_runner_and_not_by_the_second(
    two: tuple[Any, Any],
) -> None:
    from sglang.srt.distributed import parallel_state

    want = [steps.generate(runner, activate=dg.activate) for runner in two]
    before, parallel_state._TP = parallel_state._TP, None
    try:
        assert not parallel_state.model_parallel_is_initialized()
        with dg.activate(two[0]):  # its scope is the default one
            assert not parallel_state.model_parallel_is_initialized()
        with dg.activate(two[1]):
            assert parallel_state.model_parallel_is_initialized()
        again = steps.generate(two[1], activate=dg.activate)
        assert bit_equal(again.logits, want[1].logits)
    finally:
        parallel_state._TP = before
    assert bit_equal(steps.generate(two[0], activate=dg.activate).logits, want[0].logits)


def test_a_global_that_is_deleted_is_missing_in_that_scope_only(two: tuple[Any, Any]) -> None:
    from sglang.srt.distributed import parallel_state

    with dg.activate(two[1]):
        before = parallel_state._PDMUX_PREFILL_TP_GROUP
        del parallel_state._PDMUX_PREFILL_TP_GROUP
        assert not hasattr(parallel_state, "_PDMUX_PREFILL_TP_GROUP")
        with pytest.raises(AttributeError, match="_PDMUX_PREFILL_TP_GROUP"):
            _ = parallel_state._PDMUX_PREFILL_TP_GROUP
    assert hasattr(parallel_state, "_PDMUX_PREFILL_TP_GROUP")
    with dg.activate(two[1]):
        parallel_state._PDMUX_PREFILL_TP_GROUP = before


def test_contexts_that_are_patched_are_those_of_the_scope(two: tuple[Any, Any]) -> None:
    from sglang.srt import runtime_context
    from sglang.srt.model_executor import forward_context

    made = runtime_context.RuntimeContext(parallel=runtime_context.ParallelContext())
    given = object()
    for runner, other in (two, two[::-1]):
        with dg.activate(other):
            of_other = runtime_context.get_context()
        with dg.activate(runner):
            with mock.patch.object(runtime_context, "_CONTEXT", made):
                assert runtime_context.get_context() is made
                with dg.activate(other):
                    assert runtime_context.get_context() is of_other
            with mock.patch.object(runtime_context, "_PARALLEL", made.parallel):
                assert runtime_context.get_parallel() is made.parallel
            with mock.patch.object(forward_context, "_current", given):
                assert forward_context.get_forward_context() is given
            assert runtime_context.get_context() is runtime_context._CONTEXT is not made


def test_globals_in_use_context_are_read_and_written_from_outside_as_by_sglang(
    guard: None, model: Model
) -> None:
    from sglang.srt import runtime_context
    from sglang.srt.distributed import parallel_state

    context = runtime_context.create_context(server_args(model("llama")), role="scheduler")
    fake: Any = object()
    before = parallel_state._ENABLE_CUSTOM_ALL_REDUCE
    with runtime_context.use_context(context):
        assert runtime_context._CONTEXT is context
        assert runtime_context._PARALLEL is context.parallel
        parallel_state._TP = parallel_state._PP = fake
        assert parallel_state.model_parallel_is_initialized()
        parallel_state.set_custom_all_reduce(not before)
        assert parallel_state._ENABLE_CUSTOM_ALL_REDUCE is not before
    assert not parallel_state.model_parallel_is_initialized()
    assert parallel_state._ENABLE_CUSTOM_ALL_REDUCE is before


def hooked() -> dict[str, Any]:
    """The functions of the SGLang modules and classes that the guard changes, by name."""
    from sglang.srt import runtime_context
    from sglang.srt.distributed import bootstrap, parallel_state
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    functions = [
        *(it for it in vars(parallel_state).values() if inspect.isfunction(it)),
        *(it for it in vars(runtime_context).values() if inspect.isfunction(it)),
        *(it for it in vars(bootstrap).values() if inspect.isfunction(it)),
        *(it for it in vars(ModelRunner).values() if inspect.isfunction(it)),
        *(it for it in vars(WeightUpdater).values() if inspect.isfunction(it)),
        ForwardBatch.init_new.__func__,  # type: ignore[attr-defined]
    ]
    return {
        f"{it.__module__}.{it.__qualname__}": it
        for it in functions
        if it.__module__.startswith("sglang.")
    }


def looks(function: Any) -> tuple[Any, ...]:
    code = function.__code__
    taken = code.co_argcount + code.co_kwonlyargcount
    try:
        source: Any = inspect.getsource(function), inspect.getsourcelines(function)[1]
    except OSError:  # made by exec, as the constructor of a dataclass is
        source = None
    return (
        source,
        str(inspect.signature(function)),
        (function.__name__, function.__qualname__, function.__module__, function.__doc__),
        (function.__defaults__, function.__kwdefaults__, sorted(vars(function))),
        (code.co_name, code.co_qualname, code.co_filename, code.co_firstlineno),
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
        code.co_varnames[:taken],
        code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR),
    )


def test_functions_that_are_hooked_look_as_sglang_wrote_them(sglang: None) -> None:
    assert not dg.is_installed()
    functions = hooked()
    before = {name: (looks(it), it.__code__) for name, it in functions.items()}
    dg.install()
    try:
        changed = [name for name, it in functions.items() if it.__code__ is not before[name][1]]
        assert len(changed) > 100
        for name in changed:
            assert looks(functions[name]) == before[name][0], name
            assert copy.deepcopy(functions[name]) is functions[name]
        publish = functions["sglang.srt.runtime_context.publish"]
        assert pickle.loads(pickle.dumps(publish)) is publish
    finally:
        dg.uninstall()


def test_an_autospec_of_a_hooked_function_takes_what_the_function_takes(guard: None) -> None:
    from sglang.srt.distributed import parallel_state

    with mock.patch.object(parallel_state, "initialize_model_parallel", autospec=True) as made:
        with pytest.raises(TypeError, match="tp"):
            parallel_state.initialize_model_parallel(tp=3)  # type: ignore[call-arg]
        parallel_state.initialize_model_parallel("gloo")
    made.assert_called_once_with("gloo")


def test_a_traceback_through_a_hooked_function_shows_sglangs_own_lines(
    two: tuple[Any, Any],
) -> None:
    from sglang.srt.model_executor.model_runner import ModelRunner

    with pytest.raises(AttributeError) as caught:
        two[1].forward(None)
    ours = str(Path(dg.__file__).parent)
    frames = [entry.frame.code for entry in caught.traceback]
    forward = next(it for it in frames if it.name == "forward")
    assert str(forward.path) == inspect.getsourcefile(ModelRunner)
    assert not [it.name for it in frames if str(it.path).startswith(ours)]


class TestSGLangsSourcePatcher:
    """`sglang.srt.debug_utils.source_patcher` edits the text of a function and restores it."""

    @pytest.fixture
    def edit(self, guard: None) -> Callable[..., Any]:
        from sglang.srt.debug_utils.source_patcher import code_patcher
        from sglang.srt.debug_utils.source_patcher.types import EditSpec, PatchSpec

        def edited(target: str, match: str, **how: str) -> Any:
            spec = PatchSpec(target=target, edits=[EditSpec(match=match, **how)])
            return code_patcher.CodePatcher(patches=[spec])

        return edited

    def test_a_function_that_the_guard_leaves_alone_is_edited_and_put_back(
        self, edit: Callable[..., Any]
    ) -> None:
        from sglang.srt.utils import network

        with edit(
            "sglang.srt.utils.network.is_valid_ipv6_address",
            "ipaddress.IPv6Address(address)",
            append="return 'edited'",
        ):
            assert network.is_valid_ipv6_address("::1") == "edited"
        assert network.is_valid_ipv6_address("::1") is True

    @pytest.mark.parametrize(
        ("target", "match"),
        [
            (
                "sglang.srt.model_executor.model_runner.ModelRunner.forward",
                "self.forward_pass_id += 1",
            ),
            ("sglang.srt.runtime_context.get_context", "return _CONTEXT"),
            ("sglang.srt.distributed.parallel_state.destroy_model_parallel", "global _TP"),
        ],
    )
    def test_a_function_that_the_guard_changes_is_refused_and_stays(
        self, edit: Callable[..., Any], target: str, match: str
    ) -> None:
        function = hooked()[target]
        before = function.__code__
        with (
            pytest.raises(NotSupported, match=f"{target}.*uninstall"),
            edit(target, match, prepend="pass"),
        ):
            pass
        assert function.__code__ is before

    def test_an_edit_that_would_read_a_scoped_global_is_refused_and_undone(
        self, edit: Callable[..., Any]
    ) -> None:
        from sglang.srt.distributed import parallel_state

        function = parallel_state._split_tensor_dict
        before = function.__code__
        with (
            pytest.raises(NotSupported, match=r"_split_tensor_dict.*_TP"),
            edit(
                "sglang.srt.distributed.parallel_state._split_tensor_dict",
                "tensor_list: List[torch.Tensor] = []",
                append="assert _TP is not None",
            ),
        ):
            pass
        assert function.__code__ is before


IMPORTED_AGAIN = """
    import importlib, sys
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    import torch
    from sglang_distguard.testing import prepare_environment, fleet, steps, server_args
    prepare_environment()
    import sglang_distguard as dg
    dg.install()
    members = fleet.members(Path(CACHE), [("llama", "float32"), ("qwen3_moe", "bfloat16")])

    def right(member):
        runner = dg.build_runner(server_args(member.model, dtype=member.dtype), name=member.name)
        made = steps.generate(runner, activate=dg.activate)
        dg.close(runner)
        return torch.equal(made.logits, member.alone.logits)

    assert right(members[0])
    dg.teardown()
    if HOW == "purge":
        for name in [it for it in sys.modules if it.partition(".")[0] == "sglang"]:
            del sys.modules[name]
    else:
        import sglang.srt.distributed.bootstrap as bootstrap
        import sglang.srt.distributed.parallel_state as parallel_state
        importlib.reload(parallel_state)
        importlib.reload(bootstrap)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(right, members)) == [True, True]
    assert dg.is_installed()
"""


@pytest.mark.parametrize("how", ["reload", "purge"])
def test_modules_that_are_imported_again_are_hooked_again(
    how: str, sglang: None, cache: Path
) -> None:
    fleet.members(cache, [("llama", "float32"), ("qwen3_moe", "bfloat16")])  # made once, here
    run_well(f"HOW = {how!r}\n", IMPORTED_AGAIN, has=Has.SGLANG)
