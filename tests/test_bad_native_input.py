"""Bad input to the native module, tested as in test_bad_input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import pytest
import sglang_distguard as dg
from bad_values import (
    TEXT,
    WRONG_FLAG,
    WRONG_TEXT,
    Chosen,
    is_refused,
    one_wrong,
    report,
    some,
    state,
    tried,
    wrong,
)
from hypothesis import given
from hypothesis import strategies as st
from registry_calls import request
from sglang_distguard import _core

count = pytest.fixture(scope="module", autouse=True)(report)


# Our own code calls the native module with arguments that have the right type already.

GOOD_KEY = "groups:bad input 走"


def is_key(value: object) -> bool:
    """Whether ``value`` names a piece of shared state."""
    if not isinstance(value, str):
        return False
    name, colon, label = value.partition(":")
    return value == "world" or (name in ("groups", "experts") and bool(label) == bool(colon))


WRONG_KEY = wrong(is_key, none=False) | TEXT.map(lambda text: f"world:{text}")
NO_LIST = wrong(lambda value: isinstance(value, (list, bytes)), none=False)
#: Values that a spec may hold; a value that is not plain is compared by its ``str``.
SPEC_VALUES = st.recursive(
    wrong(lambda value: isinstance(value, (list, dict))),
    lambda values: st.lists(values, max_size=3) | st.tuples(values, values),
    max_leaves=12,
)
WRONG_NUMBER = wrong(lambda value: isinstance(value, (int, float)), none=False)
WRONG_IDENTITY = (
    wrong(lambda value: isinstance(value, int))
    | st.integers(max_value=-1)
    | st.integers(min_value=2**64)
)
WRONG_REQUEST = {
    "key": WRONG_KEY,
    "spec": wrong(lambda value: isinstance(value, dict)),
    "runner": WRONG_TEXT,
    "reuse": WRONG_FLAG | st.none(),
    "reentrant": WRONG_FLAG | st.none(),
    "slow_after": WRONG_NUMBER,
    "identity": WRONG_IDENTITY,
}


def ask(
    key: Any = GOOD_KEY,
    spec: Any = None,
    *,
    identity: Any = None,
    use: Optional[Callable[[_core.Claim], Any]] = None,
    **options: Any,
) -> None:
    """Make one request; afterwards it leads no longer, even when ``use`` raises."""
    claim = request(key, {} if spec is None else spec, **options).try_acquire(identity)
    assert claim is not None
    try:
        if use is not None:
            use(claim)
    finally:
        claim.fail("a test")


@tried
@given(one_wrong(WRONG_REQUEST, {}), st.dictionaries(TEXT | st.integers(), SPEC_VALUES, max_size=4))
def test_a_request_refuses_wrong_arguments_and_shows_the_spec_it_takes(
    chosen: Chosen, spec: dict[Any, Any]
) -> None:
    def is_shown(_claim: _core.Claim) -> None:
        (slot,) = [slot for slot in dg.snapshot()["slots"] if slot["key"] == GOOD_KEY]
        assert set(slot["spec"]) == set(spec)

    name, arguments = chosen
    named = ("identity", "integer") if name == "identity" else (name,)
    assert is_refused(lambda: ask(**arguments), *named)
    is_refused(lambda: ask(spec=spec, use=is_shown), "spec")


def test_a_list_that_holds_itself_is_refused_and_named() -> None:
    endless: list[Any] = []
    endless.append(endless)
    deep: list[Any] = []
    for _ in range(20_000):
        deep = [deep]
    for value in (endless, deep):
        assert is_refused(lambda value=value: ask(spec={"widths": value}), "widths")


@tried
@given(one_wrong(some(WRONG_REQUEST, "identity", "spec"), {}), WRONG_TEXT)
def test_a_leader_that_passes_wrong_arguments_still_leads(chosen: Chosen, reason: Any) -> None:
    name, result = chosen[0], {"identity": 1, **chosen[1]}

    def use(claim: _core.Claim) -> None:
        assert is_refused(lambda: claim.publish(**{"resource": None, **result}), name)
        assert is_refused(lambda: claim.fail(reason), "reason")
        assert is_refused(lambda: claim.poison(reason), "reason")
        assert claim.pending

    ask(use=use)


@tried
@given(
    one_wrong(
        {
            "key": WRONG_KEY,
            "runner": WRONG_TEXT,
            "force": WRONG_FLAG | st.none(),
            "why": WRONG_TEXT,
        },
        {},
    )
)
def test_functions_of_a_key_refuse_wrong_arguments(chosen: Chosen) -> None:
    name, arguments = chosen
    call: dict[str, Any] = {"key": GOOD_KEY, "runner": None, "force": False, **arguments}
    assert is_refused(lambda: _core.begin_teardown(**call), name)
    if name == "force":
        assert is_refused(lambda: _core.reset(**arguments), name)
    if name == "key":
        for function in (_core.is_ready, _core.resource, _core.forget):
            assert is_refused(lambda function=function: function(**arguments), name)


WRONG_HANDLE = {
    "name": WRONG_TEXT | st.none(),
    "scope": wrong(),
    "keys": NO_LIST | st.lists(WRONG_KEY, min_size=1, max_size=2) | st.just([GOOD_KEY]),
}


@tried
@given(one_wrong(WRONG_HANDLE, {}), WRONG_KEY)
def test_a_handle_refuses_wrong_arguments_and_leaves_nothing(chosen: Chosen, key: Any) -> None:
    name, arguments = chosen
    good: dict[str, Any] = {"name": "a", "scope": None, "keys": []}
    call: dict[str, Any] = {**good, **arguments}
    assert is_refused(lambda: _core.RunnerHandle(**call), name, "key", GOOD_KEY)
    before = state()
    handle = _core.RunnerHandle(**good)
    assert is_refused(lambda: handle.hold(key), "key")
    assert handle.close()
    assert is_refused(lambda: handle.hold("world"), "closed")
    assert state() == before


@tried
@given(WRONG_TEXT | st.none(), WRONG_KEY)
def test_scopes_and_visits_refuse_wrong_arguments(label: Any, phase: Any) -> None:
    assert is_refused(lambda: _core.Scope(), "Scope")
    assert is_refused(lambda: _core.new_scope(label), "label")
    assert is_refused(
        lambda: _core.Publishing(label, is_other=lambda: True, may_put_aside=True), "label"
    )
    scope = _core.new_scope("a")
    assert is_refused(lambda: setattr(scope, "label", label), "label", "str")
    assert scope.label == "a"
    assert is_refused(lambda: _core.Visit(phase, runner=None), "phase")
    if label is not None:
        assert is_refused(lambda: _core.Visit("load", runner=label), "runner")
