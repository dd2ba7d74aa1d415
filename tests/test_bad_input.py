"""Bad input is refused with a documented error, and a refused call changes nothing."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import sglang_distguard as dg
import sglang_distguard_plugin
from bad_values import (
    ANYTHING,
    RIGHT,
    TEXT,
    WRONG,
    WRONG_FLAG,
    Chosen,
    is_count,
    is_refused,
    is_seconds,
    one_wrong,
    report,
    some,
    state,
    tried,
    wrong,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from sglang_distguard import errors
from sglang_distguard.__main__ import main
from sglang_distguard.config import settings
from sglang_distguard.testing import server_args

Model = Callable[..., Path]


count = pytest.fixture(scope="module", autouse=True)(report)


INSTALL = ("reuse", "timeout", "slow_after")
SCOPE = ("name", "reuse", "timeout")


@tried
@given(one_wrong(some(WRONG, *INSTALL), RIGHT))
def test_install_refuses_settings_it_cannot_use(chosen: Chosen) -> None:
    name, arguments = chosen
    assert is_refused(lambda: dg.install(**arguments), name)


def test_a_refused_install_keeps_the_settings_and_a_good_one_changes_what_it_names(
    guard: None,
) -> None:
    @tried
    @given(one_wrong(some(WRONG, *INSTALL), RIGHT), st.fixed_dictionaries(some(RIGHT, *INSTALL)))
    def again(chosen: Chosen, good: dict[str, Any]) -> None:
        name, arguments = chosen
        assert is_refused(lambda: dg.install(**arguments), name)
        before = settings.installed()
        dg.install(**good)
        for setting, value in good.items():
            expected = getattr(before, setting) if value is None else value
            assert getattr(settings.installed(), setting) == expected

    before = settings.installed()
    try:
        again()
    finally:
        settings.set_installed(before)


@tried
@given(one_wrong(some(WRONG, *SCOPE), RIGHT), st.fixed_dictionaries(some(RIGHT, *SCOPE)))
def test_a_scope_refuses_wrong_settings_and_ends_with_what_was_there(
    chosen: Chosen, good: dict[str, Any]
) -> None:
    def enter(arguments: dict[str, Any]) -> None:
        with dg.runner_scope(**arguments) as inside:
            for setting, value in arguments.items():
                assert value is None or getattr(inside, setting) == value

    name, arguments = chosen
    assert is_refused(lambda: enter(arguments), name)
    before = state()
    enter(good)
    assert state() == before


@tried
@given(ANYTHING | st.lists(ANYTHING, max_size=2), ANYTHING, ANYTHING)
def test_what_is_no_server_args_is_not_built(things: Any, max_workers: Any, progress: Any) -> None:
    def build() -> None:
        assert dg.build_runners(things, max_workers=max_workers, progress=progress) == []

    nothing = any(things == empty for empty in ("", b"", [], {}, set()))
    usable = max_workers is None or is_count(max_workers, most=10**9999)
    refused = is_refused(build, "server_args", "requests", "max_workers", "progress")
    assert refused == (not (nothing and usable and isinstance(progress, bool)))
    thing: Any = things
    assert is_refused(lambda: dg.build_runner(thing), "server_args")


SIZES = ("tp_size", "pp_size", "dp_size", "page_size", "max_total_tokens", "context_length")
WRONG_SIZES = {size: wrong(is_count) for size in SIZES}
WRONG_SIZES["mem_fraction_static"] = wrong(lambda value: is_seconds(value) and value <= 1)
#: Never the name of an argument: hypothesis also tries words that it finds in our sources.
UNKNOWN = TEXT.map(lambda text: f"{text}?") | st.just("model_config")
WRONG_OPTIONS = st.dictionaries(UNKNOWN, ANYTHING, min_size=1)
WRONG_BUILD = some(WRONG, "name", "timeout", "gpu_id", "target")


def test_a_build_with_one_wrong_argument_never_begins(guard: None, model: Model) -> None:
    path = model("gpt2")

    @tried
    @given(one_wrong({**WRONG_BUILD, "nccl_port": WRONG["nccl_port"]}, RIGHT))
    def build(chosen: Chosen) -> None:
        name, arguments = chosen
        assert is_refused(lambda: dg.build_runner(server_args(path), **arguments), name)

    @tried
    @given(one_wrong(WRONG_SIZES, {}), st.integers(1, 2**63 - 1), st.integers(2, 2**63 - 1))
    def build_with_sizes(chosen: Chosen, tp_size: int, pp_size: int) -> None:
        name, sizes = chosen
        assert is_refused(lambda: dg.build_runner(server_args(path, **sizes)), f"args.{name}")
        many = server_args(path, tp_size=tp_size, pp_size=pp_size)
        assert is_refused(lambda: dg.build_runner(many), f"tp_size={tp_size}, pp_size={pp_size}")

    @tried
    @given(WRONG_OPTIONS)
    def build_with_options(options: dict[str, Any]) -> None:
        assert is_refused(lambda: dg.build_runner(server_args(path), **options), "option")

    build()
    build_with_sizes()
    build_with_options()


def test_a_list_with_one_wrong_request_is_refused_before_any_is_built(
    guard: None, model: Model
) -> None:
    good = server_args(model("gpt2"))
    not_options = wrong(lambda value: isinstance(value, Mapping), none=False)
    fields = {**WRONG_BUILD, "options": not_options | WRONG_OPTIONS, "server_args": ANYTHING}

    @tried
    @given(one_wrong(fields, RIGHT))
    def build(chosen: Chosen) -> None:
        name, arguments = chosen
        request = dg.BuildRequest(**{"server_args": good, **arguments})
        named = name.removesuffix("s")  # "option 'x'"
        assert is_refused(lambda: dg.build_runners([good, request], progress=False), named)

    build()


@tried
@given(ANYTHING)
def test_only_runners_are_activated_and_closed(thing: Any) -> None:
    def enter(function: Callable[..., contextlib.AbstractContextManager[Any]]) -> None:
        with function(thing):
            pass

    for refused in (
        lambda: enter(dg.activate),
        lambda: enter(dg.closing),
        lambda: dg.close(thing),
    ):
        assert is_refused(refused, "runner")


@tried
@given(WRONG_FLAG | st.none(), ANYTHING)
def test_reset_and_teardown_take_a_flag_and_other_functions_nothing(
    force: Any, argument: Any
) -> None:
    assert is_refused(lambda: dg.reset(force=force), "force")
    assert is_refused(lambda: dg.teardown(force=force), "force")
    for function in (dg.uninstall, dg.is_installed, dg.snapshot):
        call: Any = function
        assert is_refused(lambda call=call: call(argument), function.__name__)


def is_usable(variable: str, text: str) -> bool:
    """Whether an environment variable may have this value."""
    text = text.strip().lower()
    if variable == sglang_distguard_plugin.VARIABLE:
        return text in {*"10yn", "", "true", "false", "yes", "no", "on", "off"}
    with contextlib.suppress(ValueError):
        return text == "" or float(text) > 0
    return False


@tried
@given(
    st.sampled_from(
        [sglang_distguard_plugin.VARIABLE, settings.TIMEOUT_VARIABLE, settings.SLOW_VARIABLE]
    ),
    st.binary(max_size=9).filter(lambda raw: 0 not in raw).map(os.fsdecode) | st.floats().map(str),
)
def test_an_environment_variable_that_cannot_be_used_is_named(variable: str, text: str) -> None:
    with mock.patch.dict(os.environ, {variable: text}):
        if is_usable(variable, text):
            settings.choose(again=False)
            return
        assert is_refused(dg.install, variable)
        if variable == sglang_distguard_plugin.VARIABLE:
            assert is_refused(sglang_distguard_plugin.load, variable)


COMMANDS = ("demo", "status", "version")


@tried
@given(st.lists(TEXT | st.sampled_from([*COMMANDS, "--json", "--cache"]), max_size=3))
def test_a_command_line_that_cannot_be_used_ends_with_2(argv: list[str]) -> None:
    # `--js` is `--json` and `--` is no argument, whatever the other parts are.
    usable = all(part in COMMANDS or "--json".startswith(part) for part in argv) and argv
    assume(not usable and not any(part.startswith(("-h", "--h")) for part in argv))
    before, printed = state(), io.StringIO()
    with contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as ended:
        main(["--no-such-option", *argv] if "demo" in argv else argv)
    assert ended.value.code == 2
    assert "usage: " in printed.getvalue()
    assert state() == before


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXT, values, max_size=3),
    max_leaves=9,
)
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]


@tried
@given(
    st.sampled_from([kind for kind in KINDS if issubclass(kind, dg.DistGuardError)]),
    TEXT,
    st.dictionaries(TEXT.map(lambda text: f"{text}?"), PLAIN, max_size=3),
    st.integers(0, pickle.HIGHEST_PROTOCOL),
)
def test_errors_survive_pickling_with_any_message_and_facts(
    kind: type[dg.DistGuardError], message: str, details: dict[str, Any], protocol: int
) -> None:
    copy = pickle.loads(pickle.dumps(kind(message, **details), protocol))
    assert (type(copy), str(copy), copy.details) == (kind, message, details)
