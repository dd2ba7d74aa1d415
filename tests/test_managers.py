"""SGLang's TokenizerManager, DetokenizerManager and TpModelWorker live in scopes of their own."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from interpreters import facts_of
from sglang_distguard.hooks import managers
from sglang_distguard.hooks.releases import ALL, Span, installed_version
from sglang_distguard.patching import find_source
from test_runner_steps import READS

#: Methods that not every supported release has.
SINCE = {"is_healthy": Span("0.5.23")}


@pytest.fixture(scope="module")
def answered(cache: Path) -> dict[str, Any]:
    return facts_of("tokenizer_programs.from_another_engine(CACHE, True)")


@pytest.fixture(scope="module")
def ended(cache: Path) -> dict[str, Any]:
    return facts_of("tokenizer_programs.streams_and_ends(CACHE)")


def test_a_tokenizer_manager_answers_by_its_own_configuration_from_another_engines_code(
    answered: dict[str, Any],
) -> None:
    expected = [facts_of(f"manager_programs.alone(CACHE, {number})") for number in (0, 2)]
    assert answered["answers"] == expected
    assert answered["with states"] == expected[0][0]


def test_without_the_hook_it_refuses_a_request_by_the_other_engines_configuration(
    cache: Path,
) -> None:
    facts = facts_of("tokenizer_programs.from_another_engine(CACHE, False)")
    assert "not configured to return hidden states" in facts["refused"]


def test_a_stream_leaves_its_consumer_in_the_consumers_own_scope(ended: dict[str, Any]) -> None:
    scopes = ended["items in the consumer's scope"]
    assert len(scopes) > 1
    assert all(scopes)
    assert "output_ids" in ended["item"]


def test_building_a_runner_in_the_thread_of_a_tokenizer_manager_keeps_its_configuration(
    ended: dict[str, Any],
) -> None:
    assert ended["published"]


def test_a_tokenizer_manager_that_is_answering_is_not_closed(ended: dict[str, Any]) -> None:
    assert "generate_request()" in ended["in use"]
    assert ended["closed"] == [True, False]


def test_callers_of_a_failing_tokenizer_manager_hear_of_it_and_the_process_lives(
    ended: dict[str, Any],
) -> None:
    assert ended["failure"].startswith("HTTPException")
    assert "planted" in ended["failure"]
    assert "is closed" in ended["afterwards"]
    assert len(ended["still answers"]) == 8


def test_a_tokenizer_manager_on_the_main_thread_leaves_signals_to_the_host(
    ended: dict[str, Any],
) -> None:
    before, after = ended["settings"]
    assert after == {**before, "world": True}


def test_a_detokenizer_that_waits_for_messages_is_closed_and_leaves_nothing(cache: Path) -> None:
    facts = facts_of("tokenizer_programs.detokenizers(CACHE)")
    assert facts["closed"] == [True, True]
    before, after = facts["process"]
    assert after == before
    before, after = facts["settings"]
    assert after == before


def test_a_context_of_a_managers_sockets_ends_when_its_peer_leaves_at_that_moment(
    cache: Path,
) -> None:
    assert facts_of("tokenizer_programs.peers_that_leave(CACHE)") == 0


def test_a_worker_reads_its_own_configuration_from_any_thread(cache: Path) -> None:
    assert facts_of("tokenizer_programs.workers(CACHE)") == [1000, 1001]


@pytest.mark.parametrize("manager", managers.TABLE, ids=lambda it: it.classname)
def test_methods_of_managers_without_a_hook_read_no_scoped_values(
    manager: managers.Manager,
) -> None:
    source = find_source(manager.module)
    assert source is not None
    methods = {
        node.name: ast.unparse(node)
        for node in ast.walk(ast.parse(source.text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name in manager.plain
    }
    release = installed_version()
    assert methods.keys() == {it for it in manager.plain if SINCE.get(it, ALL).has(release)}
    assert {name for name, text in methods.items() if READS.search(text)} == set()
