"""python -m sglang_distguard: what it prints and how it ends."""

from __future__ import annotations

import json

import pytest
from sglang_distguard.__main__ import main
from sglang_distguard.errors import NotSupported
from sglang_distguard.hooks import generation_0_5_21, releases, versions
from sglang_distguard.patching import Scoped


def test_status_says_that_the_installed_sglang_is_supported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_ALLOW_REUSE_DISTRIBUTED", "true")
    assert main(["status", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sglang"] == releases.installed_version()
    assert facts["supported"] is True
    assert (facts["verified"], facts["dropped"], facts["warnings"]) == (True, [], [])
    assert facts["SGLANG_ALLOW_REUSE_DISTRIBUTED"] is True


def test_status_ends_with_1_and_the_reason_when_it_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> object:
        raise NotSupported("it lacks a thing")

    monkeypatch.setattr(versions, "choose", refuse)
    assert main(["status"]) == 1
    assert "it lacks a thing" in capsys.readouterr().out


def test_status_says_what_is_dropped_and_that_a_release_is_not_verified(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Scoped("sglang.srt.environ", "_of_an_old_release")
    changes = [*generation_0_5_21.changes(), gone]
    monkeypatch.setattr(versions, "GENERATIONS", {"this one": lambda: changes})
    monkeypatch.setattr(releases, "installed_version", lambda: "99.0")
    assert main(["status", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["supported"], facts["verified"]) == (True, False)
    assert facts["dropped"] == ["sglang.srt.environ._of_an_old_release"]
    assert facts["warnings"][0].startswith("sglang 99.0 is unverified")
    assert "_of_an_old_release" in facts["warnings"][1]
    assert main(["status"]) == 0
    assert "sglang 99.0 is unverified" in capsys.readouterr().out


def test_a_variable_that_cannot_be_used_ends_with_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_DISTGUARD_TIMEOUT", "soon")
    assert main(["status"]) == 2
    assert "SGLANG_DISTGUARD_TIMEOUT='soon'" in capsys.readouterr().err


def test_version_names_the_guard_sglang_and_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == [
        "sglang-distguard",
        "sglang",
        "torch",
    ]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("demo", "status", "version"))
