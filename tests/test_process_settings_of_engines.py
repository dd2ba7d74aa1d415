"""What SGLang's managers do to a whole process is skipped where a program hosts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interpreters import Has, facts_of, run


@pytest.fixture(scope="module")
def treated(cache: Path) -> dict[str, Any]:
    return facts_of("host_programs.acts(CACHE, True)")


@pytest.fixture(scope="module")
def untreated(cache: Path) -> dict[str, Any]:
    return facts_of("host_programs.acts(CACHE, False)")


def test_a_scheduler_leaves_title_log_and_death_signal_to_its_host(treated: dict[str, Any]) -> None:
    before, after = treated["settings"]
    assert after == before


def test_without_the_treatment_it_sets_them(untreated: dict[str, Any]) -> None:
    before, after = untreated["settings"]
    changed = {name for name in before if before[name] != after[name]}
    assert {"log", "world"} <= changed


def test_the_shutdown_of_one_scheduler_keeps_the_world_of_the_others(
    treated: dict[str, Any],
) -> None:
    assert treated["late"] == "None"
    assert treated["other"] is True


def test_without_the_treatment_the_world_is_aborted(untreated: dict[str, Any]) -> None:
    _, after = untreated["settings"]
    assert not after["world"]


def test_a_later_runner_does_not_seed_the_process_again(
    treated: dict[str, Any], untreated: dict[str, Any]
) -> None:
    assert treated["random numbers stay"]
    assert not untreated["random numbers stay"]


def test_the_watchdog_of_a_scheduler_ends_with_it(
    treated: dict[str, Any], untreated: dict[str, Any]
) -> None:
    assert treated["watchdogs"] == 1  # of the other one
    assert untreated["watchdogs"] == 2


def test_a_failing_scheduler_raises_in_its_thread_and_signals_nothing(cache: Path) -> None:
    facts = facts_of("host_programs.failing(CACHE, True)")
    assert facts["error"] == "RuntimeError('planted')"
    assert facts["signals"] == 0
    assert facts["other"]
    assert max(facts["holders"]) == 1  # the other one's


def test_without_the_treatment_a_failing_scheduler_signals_the_parent_of_its_host(
    cache: Path,
) -> None:
    facts = facts_of("host_programs.failing(CACHE, False)")
    assert facts["error"] == "None"
    assert facts["signals"] > 0


def test_a_scheduler_that_serves_in_a_daemon_thread_does_not_block_the_exit(cache: Path) -> None:
    program = "host_programs.exits_while_serving(CACHE)"
    done = run("import host_programs\n", program, has=Has.SGLANG)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "served"), done.stderr[-3000:]
