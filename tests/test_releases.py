"""Other releases of SGLang: what they lack is dropped and told, or required and named."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sglang_distguard
from sglang_distguard.errors import NotSupported
from sglang_distguard.hooks import (
    generation_0_5_21,
    releases,
    requirements,
    torch_compiler,
    versions,
)
from sglang_distguard.hooks.versions import Plan
from sglang_distguard.patching import (
    Around,
    Change,
    ModuleSource,
    Needs,
    Replace,
    Scoped,
    Within,
    split,
)

MODULE = "sglang.srt.made_up"
NEWEST = releases.SUPPORTED[-1]
PlanOf = Callable[..., Plan]


def unchanged(original: Any) -> Any:
    return original


@pytest.fixture
def plan_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlanOf:
    """``plan_of(text, changes)``: the plan for an SGLang whose one module has this text."""
    monkeypatch.setattr(versions, "REQUIRED", ())

    def plan(text: str, changes: Sequence[Change], release: str | None = NEWEST) -> Plan:
        file = tmp_path.joinpath(*MODULE.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        return versions.plan_of(changes, release, tmp_path)

    return plan


def absent(plan: Plan) -> list[str]:
    assert plan.fits
    return [it.name for it in plan.absent]


def test_a_row_and_a_hook_that_a_release_does_not_have_are_dropped_and_the_others_stay(
    plan_of: PlanOf,
) -> None:
    plan = plan_of(
        """
        _here = None

        def f():
            return _here
        """,
        [
            Scoped(MODULE, "_here"),
            Scoped(MODULE, "_gone"),
            Scoped(MODULE, "C.x"),
            Around(MODULE, "f", unchanged),
            Around(MODULE, "g", unchanged),
            Scoped("sglang.srt.no_such_module", "_gone"),
        ],
    )
    assert absent(plan) == ["_gone", "C.x", "g", "_gone"]
    (module,) = plan.modules
    assert [getattr(it, "qualname", getattr(it, "name", "")) for it in module.changes] == [
        "_here",
        "f",
    ]


def test_a_hook_is_dropped_with_what_it_uses(plan_of: PlanOf) -> None:
    """``__enter__`` without its ``__exit__`` would enter a phase for ever."""
    changes = [Around(MODULE, "C.__enter__", unchanged, uses=("C.__exit__",))]
    text = "class C:\n    def __enter__(self): pass\n"
    assert absent(plan_of(text, changes)) == ["C.__enter__"]
    assert absent(plan_of(f"{text}    def __exit__(self): pass\n", changes)) == []


@pytest.mark.parametrize(
    "text",
    [
        "_value = 1\n_value = 2\n",
        "if True:\n    _value = 1\n",
        "def f():\n    global _value\n    _value = 1\n",
    ],
)
def test_a_global_in_a_form_that_cannot_be_scoped_is_refused_and_not_dropped(
    plan_of: PlanOf, text: str
) -> None:
    plan = plan_of(text, [Scoped(MODULE, "_value")])
    assert not plan.fits
    assert f"{MODULE}._value is assigned" in plan.refused[0]


def test_a_global_that_is_imported_from_another_module_is_not_there(plan_of: PlanOf) -> None:
    text = "from sglang.srt.elsewhere import _value, f\n"
    changes = [Scoped(MODULE, "_value"), Around(MODULE, "f", unchanged)]
    assert absent(plan_of(text, changes)) == ["_value", "f"]


def test_a_function_that_is_none_or_lacks_the_parameter_is_refused(plan_of: PlanOf) -> None:
    assert "is not a function" in plan_of("f = g(h)", [Around(MODULE, "f", unchanged)]).refused[0]
    block = Within(MODULE, "f", unchanged, "model_runner")
    assert plan_of("def f(model_runner): pass", [block]).fits
    assert "no parameter model_runner" in plan_of("def f(runner): pass", [block]).refused[0]


@pytest.mark.parametrize(
    ("text", "is_there"),
    [
        ("cached = 1", True),
        ("def cached(): pass", True),
        ("from sglang.srt.elsewhere import cached", True),
        ("from sglang.srt.elsewhere import *", True),
        ("globals()['cac' + 'hed'] = 1", True),
        ("other = [cached for cached in ()]", False),
    ],
)
def test_a_replaced_attribute_is_looked_up_in_the_text(
    plan_of: PlanOf, text: str, is_there: bool
) -> None:
    plan = plan_of(text, [Replace(MODULE, "cached", unchanged)])
    assert absent(plan) == ([] if is_there else ["cached"])


def test_an_attribute_of_instances_is_found_in_slots() -> None:
    source = ModuleSource(MODULE, "made_up.py", "class C:\n    __slots__ = ('a', '_b')\n")
    needs = [Needs(MODULE, f"C.{name}") for name in ("a", "_b", "c")]
    assert split(source, needs)[0] == needs[:2]


def test_what_an_earlier_release_had_is_told_and_what_a_later_one_brings_is_not(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = {
        (MODULE, "_young"): releases.Span("0.5.22"),
        (MODULE, "_old"): releases.Span(None, "0.5.21"),
    }
    monkeypatch.setattr(releases, "_SPANS", spans)
    changes = [Scoped(MODULE, name) for name in ("_young", "_old", "_gone")]
    lost = {
        release: [it.name for it in plan_of("", changes, release).lost]
        for release in ("0.5.20", "0.5.21", "0.5.22", "0.5.23", "0.6.0", None)
    }
    assert lost == {
        "0.5.20": [],  # refused
        "0.5.21": ["_old", "_gone"],
        "0.5.22": ["_young", "_gone"],
        "0.5.23": ["_young", "_gone"],
        "0.6.0": ["_young", "_gone"],
        None: ["_young", "_gone"],
    }
    assert [it.name for it in plan_of("", changes, "0.5.22").absent] == ["_young", "_gone"]
    (warning,) = plan_of("", changes, "0.5.21").warnings()
    assert f"{MODULE}._gone" in warning
    assert "_young" not in warning


def test_a_package_that_is_not_installed_lacks_nothing(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a program has put an object of its own in the place of the package."""
    monkeypatch.setitem(sys.modules, "a_stub", ModuleType("a_stub"))
    for package in ("no_such_package", "a_stub"):
        plan = plan_of("", [Scoped(f"{package}.utils", "_buffers")])
        assert (plan.absent, plan.warnings()) == ([], [])


@pytest.mark.parametrize(
    "release", ["0.5.24", "0.5.22.post1", "0.6.0.dev3+g1234", "a branch", None]
)
def test_a_release_without_a_ledger_is_unverified(plan_of: PlanOf, release: str | None) -> None:
    (warning,) = plan_of("", [], release).warnings()
    assert "unverified" in warning
    assert str(release or "unknown") in warning


def test_a_supported_release_has_a_ledger_and_a_row_in_the_documents() -> None:
    root = Path(__file__).parent.parent
    assert sorted(it.stem for it in (root / "ledger").glob("*.csv")) == list(releases.SUPPORTED)
    text = (root / "docs" / "COMPATIBILITY.md").read_text()
    assert all(f"\n| {release} | verified" in text for release in releases.SUPPORTED)


def test_the_installed_release_is_supported_and_has_all_that_it_should(sglang: None) -> None:
    plan = versions.choose()
    assert releases.is_verified(plan.release)
    assert (plan.missing, plan.refused, plan.lost, plan.warnings()) == ([], [], [], [])


@pytest.fixture
def clean(sglang: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from sglang_distguard.process import installation

    monkeypatch.setattr(installation, "_told", set())
    assert not sglang_distguard.is_installed()
    yield
    sglang_distguard.uninstall()


def test_a_newer_release_works_and_says_once_that_it_is_unverified(
    clean: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(releases, "installed_version", lambda: "99.0")
    with caplog.at_level(logging.WARNING, "sglang_distguard"):
        for _ in range(2):
            sglang_distguard.install()
            sglang_distguard.uninstall()
    assert [it.getMessage().split(":")[0] for it in caplog.records] == ["sglang 99.0 is unverified"]


def test_a_row_that_a_newer_release_has_lost_is_told_once(
    clean: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes = [*generation_0_5_21.changes(), Scoped("sglang.srt.environ", "_of_an_old_release")]
    monkeypatch.setattr(versions, "GENERATIONS", {"this one": lambda: changes})
    with caplog.at_level(logging.WARNING, "sglang_distguard"):
        for _ in range(2):
            sglang_distguard.install()
            sglang_distguard.uninstall()
    (told,) = caplog.records
    assert "sglang.srt.environ._of_an_old_release" in told.getMessage()


def test_an_older_torch_without_compile_sessions_is_told_and_not_refused() -> None:
    text = "_is_compiling_flag = False\n\ndef is_compiling():\n    return _is_compiling_flag\n"
    source = ModuleSource("torch.compiler", "made_up.py", text)
    _, absent = split(source, torch_compiler.CHANGES)
    assert [it.name for it in absent] == ["_compile_session_context"]
    lost = Plan(NEWEST, absent=absent)
    assert lost.fits
    (told,) = lost.warnings()
    assert "does not have torch.compiler._compile_session_context" in told


def test_everything_required_that_is_missing_is_named_at_once(
    clean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = (
        Needs("sglang.srt.environ", "gone", "first reason"),
        Needs("sglang.srt.no_such_module", "gone_too", "second reason"),
    )
    monkeypatch.setattr(versions, "REQUIRED", (*requirements.REQUIRED, *lacking))
    monkeypatch.setattr(releases, "installed_version", lambda: "99.0")
    with pytest.raises(NotSupported, match=r"first reason.*second reason") as caught:
        sglang_distguard.install()
    assert caught.value.details["missing"] == [
        "sglang.srt.environ.gone",
        "sglang.srt.no_such_module.gone_too",
    ]
    assert not sglang_distguard.is_installed()


def test_an_older_release_is_refused_and_the_supported_ones_are_named(
    clean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "installed_version", lambda: "0.5.20")
    with pytest.raises(NotSupported, match=r"older than 0.5.21.*0.5.21, 0.5.22, 0.5.23") as caught:
        sglang_distguard.install()
    assert caught.value.details["supported"] == list(releases.SUPPORTED)


def test_what_only_some_releases_have_is_what_a_row_or_a_hook_is_about() -> None:
    from sglang_distguard.hooks.process_globals import TREATMENTS
    from sglang_distguard.patching import name_of

    known = {(it.module, name_of(it)) for it in generation_0_5_21.changes()}
    known |= {(row.module, row.name) for row in TREATMENTS}
    assert set(releases.limited()) <= known


def test_requirements_are_none_of_what_only_some_supported_releases_have() -> None:
    required = {(it.module, it.qualname) for it in requirements.REQUIRED}
    assert not required & set(releases.limited())
    assert all(it.why for it in requirements.REQUIRED)
    assert split(None, requirements.REQUIRED)[0] == []
