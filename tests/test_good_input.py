"""Random input that is mostly accepted: settings and the registry follow a simple model.

``test_bad_input.py`` and ``test_bad_native_input.py`` test input that is refused.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Optional
from unittest import mock

import hypothesis
import pytest
import sglang_distguard as dg
import sglang_distguard_plugin
from bad_values import RIGHT, counted, report, some, tried
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from registry_calls import request, state_of
from sglang_distguard import _core
from sglang_distguard.config import settings

count = pytest.fixture(scope="module", autouse=True)(report)

GOOD = {
    **RIGHT,
    "agreement_timeout": RIGHT["timeout"],
    "groups": st.none() | st.sampled_from(settings.GROUP_POLICIES),
    "pinned_loads": RIGHT["reuse"],
    "streams": st.none() | st.sampled_from(settings.STREAM_POLICIES),
}
ANYWHERE = ("reuse", "timeout", "agreement_timeout", "groups", "pinned_loads", "streams")
INSTALL = (*ANYWHERE, "slow_after")
SCOPE = (*ANYWHERE, "name")


def given_of(chosen: dict[str, Any]) -> dict[str, Any]:
    """The settings in ``chosen`` that are not None; None keeps the present value."""
    return {name: value for name, value in chosen.items() if value is not None}


class SettingsInForce(RuleBasedStateMachine):
    """Nested scopes over installed settings; the innermost one that names a setting decides."""

    def __init__(self) -> None:
        super().__init__()
        self.installed = vars(settings.installed()).copy()
        self.scopes: list[tuple[AbstractContextManager[Any], dict[str, Any]]] = []

    @rule(chosen=st.fixed_dictionaries({}, optional=some(GOOD, *SCOPE)))
    def enter(self, chosen: dict[str, Any]) -> None:
        counted.calls += 1
        scope = dg.runner_scope(**chosen)
        inside = scope.__enter__()
        self.scopes.append((scope, {**self.in_force(), **given_of(chosen)}))
        assert vars(inside) == self.in_force()

    @precondition(lambda self: self.scopes)
    @rule()
    def leave(self) -> None:
        self.scopes.pop()[0].__exit__(None, None, None)

    @rule(chosen=st.fixed_dictionaries({}, optional=some(GOOD, *INSTALL)))
    def install_again(self, chosen: dict[str, Any]) -> None:
        counted.calls += 1
        dg.install(**chosen)
        self.installed.update(given_of(chosen))

    def in_force(self) -> dict[str, Any]:
        return self.scopes[-1][1] if self.scopes else self.installed

    @invariant()
    def the_settings_are_those_of_the_model(self) -> None:
        assert vars(settings.current()) == self.in_force()
        assert vars(settings.installed()) == self.installed

    def teardown(self) -> None:
        while self.scopes:
            self.leave()


def test_settings_in_force_are_those_of_the_innermost_scope_that_names_them(guard: None) -> None:
    before = settings.installed()
    try:
        run_state_machine_as_test(
            SettingsInForce, settings=hypothesis.settings(tried, stateful_step_count=20)
        )
    finally:
        settings.set_installed(before)


KEYS = [f"groups:good input {number}" for number in range(3)]
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans()
SPECS = st.dictionaries(
    st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8),
    NUMBERS | st.none() | st.text(max_size=8) | st.lists(NUMBERS, max_size=3),
    max_size=4,
)


@dataclass
class Known:
    """The state of one key in the model."""

    spec: Optional[dict[str, Any]] = None
    generation: int = 0
    handles: list[_core.RunnerHandle] = field(default_factory=list)


class OneThread(RuleBasedStateMachine):
    """One thread leads, joins, leases and forgets; a request with another spec is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.known = {key: Known() for key in KEYS}

    @rule(key=st.sampled_from(KEYS), spec=SPECS, other=st.sampled_from([False] * 4 + [True]))
    def ask(self, key: str, spec: dict[str, Any], other: bool) -> None:
        counted.calls += 1
        known = self.known[key]
        if known.spec is not None:
            spec = {**known.spec, "one field more": 1} if other else known.spec
        asked = request(key, spec, runner="asks")
        identity = None if known.spec is None else 1
        if known.spec is not None and other:
            counted.refused += 1
            with pytest.raises(dg.SpecMismatch, match="one field more"):
                asked.try_acquire(identity)
            return
        claim = asked.try_acquire(identity)
        assert claim is not None
        assert claim.decision == ("lead" if known.spec is None else "join")
        if claim.decision == "lead":
            claim.publish(identity=1, resource=f"made for {key}")
            assert claim.generation > known.generation
            known.spec, known.generation = spec, claim.generation
        assert claim.resource == f"made for {key}" or claim.decision == "lead"
        assert claim.generation == known.generation

    @rule(key=st.sampled_from(KEYS), reason=st.text(max_size=20))
    def fail(self, key: str, reason: str) -> None:
        if self.known[key].spec is not None:
            return
        counted.calls += 1
        claim = request(key, {}, runner="fails").try_acquire(None)
        assert claim is not None
        claim.fail(reason)
        assert state_of(key)["last_failure"] == reason

    @rule(key=st.sampled_from(KEYS), name=RIGHT["name"])
    def hold(self, key: str, name: Optional[str]) -> None:
        if self.known[key].spec is None:
            return
        counted.calls += 1
        handle = _core.RunnerHandle(name or "a runner", None, [key])
        handle.check()
        self.known[key].handles.append(handle)

    @rule(key=st.sampled_from(KEYS))
    def close(self, key: str) -> None:
        if not self.known[key].handles:
            return
        counted.calls += 1
        handle = self.known[key].handles.pop()
        assert handle.close()
        assert not handle.close()
        with pytest.raises(dg.DistGuardError, match="closed"):
            handle.check()

    @rule(key=st.sampled_from(KEYS))
    def forget(self, key: str) -> None:
        counted.calls += 1
        known = self.known[key]
        is_free = known.spec is not None and not known.handles
        assert _core.forget(key) == is_free
        if is_free:
            known.spec = None

    @invariant()
    def the_snapshot_is_that_of_the_model(self) -> None:
        for key, known in self.known.items():
            slot = state_of(key)
            if known.spec is None:
                assert slot.get("state", "idle") == "idle"
                assert not slot.get("holders")
                continue
            assert (slot["state"], slot["generation"]) == ("ready", known.generation)
            assert set(slot["spec"]) == set(known.spec)
            names = sorted(handle.name for handle in known.handles)
            assert sorted(holder["name"] for holder in slot["holders"]) == names

    def teardown(self) -> None:
        for key, known in self.known.items():
            for handle in known.handles:
                handle.close()
            _core.forget(key)


def test_requests_leases_and_ends_of_one_thread_follow_the_model() -> None:
    run_state_machine_as_test(
        OneThread, settings=hypothesis.settings(tried, stateful_step_count=30)
    )


SECONDS = st.floats(min_value=1e-6, max_value=1e12) | st.integers(1, 2**53)


@tried
@given(SECONDS, SECONDS, SECONDS, st.booleans(), st.sampled_from(["", " ", "\t"]))
def test_usable_environment_variables_are_what_install_would_set(
    timeout: float, slow_after: float, agreement: float, reuse: bool, space: str
) -> None:
    counted.calls += 1
    variables = {
        settings.TIMEOUT_VARIABLE: f"{space}{timeout}",
        settings.SLOW_VARIABLE: f"{slow_after}{space}",
        settings.AGREEMENT_VARIABLE: str(agreement),
        sglang_distguard_plugin.VARIABLE: space + str(reuse),
        settings.PINNED_LOADS_VARIABLE: str(not reuse),
    }
    with mock.patch.dict(os.environ, variables):
        chosen = settings.choose(again=False)
    assert chosen.reuse is reuse
    assert chosen.pinned_loads is not reuse
    assert [chosen.timeout, chosen.slow_after, chosen.agreement_timeout] == [
        float(timeout),
        float(slow_after),
        float(agreement),
    ]
