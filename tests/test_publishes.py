"""A publish beside those of other threads, at the worst moments: no configuration is lost or mixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard as dg
from runner_calls import Blocked, in_thread, thread
from sglang_distguard import _core
from sglang_distguard.context import environment, generation, scopes
from sglang_distguard.context.scopes import of_published, scopes_of_published
from sglang_distguard.testing import server_args

Model = Callable[..., Path]


def publish(args: Any) -> None:
    from sglang.srt.runtime_context import SpawnRanks
    from sglang.srt.runtime_context import publish as publish_of_sglang

    publish_of_sglang(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))


def published() -> str:
    from sglang.srt.runtime_context import get_model

    return Path(get_model().model_path).name


def test_a_configuration_that_another_thread_publishes_meanwhile_is_kept(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published after this thread has looked whether there is one, and before it decides."""
    other, mine = server_args(model("llama")), server_args(model("gpt2"))
    found = type(generation.current()).published

    def looks(self: Any) -> Any:
        monkeypatch.undo()
        seen = found(self)
        in_thread(lambda: publish(other))
        return seen

    with _core.run_as(None):
        monkeypatch.setattr(type(generation.current()), "published", looks)
        in_thread(lambda: publish(mine))
        assert published() == "gpt2-0"
        assert len(scopes_of_published(other)) == len(scopes_of_published(mine)) == 1
        with of_published(other):
            assert published() == "llama-0"


def test_a_build_finds_a_configuration_that_is_put_aside_meanwhile(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put aside after the build has found where it is, and before it goes there."""
    mine, other = server_args(model("llama")), server_args(model("gpt2"))
    found = scopes.scopes_of_published

    def looks(server_args: Any) -> Any:
        monkeypatch.undo()
        seen = found(server_args)
        in_thread(lambda: publish(other))
        return seen

    with _core.run_as(None):
        in_thread(lambda: publish(mine))
        monkeypatch.setattr(scopes, "scopes_of_published", looks)
        with of_published(mine):
            assert published() == "llama-0"
        assert published() == "gpt2-0"
        runner = dg.build_runner(server_args(model("opt")))
        dg.close(runner)


@contextmanager
def held(
    monkeypatch: pytest.MonkeyPatch, args: Any, *, fails: bool
) -> Iterator[Callable[[], None]]:
    """A thread is publishing ``args``: its scope is decided. Yield what lets it end."""
    resolve = environment.resolve

    def resolves(server_args: Any) -> None:
        resolve(server_args)
        if fails and server_args is args:
            raise ValueError("planted")

    def publishes() -> None:
        with pytest.raises(ValueError, match="planted") if fails else nullcontext():
            publish(args)

    def end() -> None:
        blocked.go_on.set()
        publisher.join()

    blocked = Blocked(resolves)
    monkeypatch.setattr(environment, "resolve", blocked)
    publisher, out = thread(publishes)
    blocked.inside.wait()
    try:
        yield end
    finally:
        end()
    assert out == [None]


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_what_another_publish_leaves_behind_after_a_look_is_kept(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """It had been decided before the look, and is over before this one is decided.

    It leaves its own configuration; if it fails, the one that it had put aside.
    """
    pending, other, mine = (server_args(model(name)) for name in ("llama", "opt", "gpt2"))
    found = type(generation.current()).published
    with _core.run_as(None):
        if fails:
            in_thread(lambda: publish(pending))
        with held(monkeypatch, other, fails=fails) as end:

            def looks(self: Any) -> Any:
                seen = found(self)
                end()
                return seen

            monkeypatch.setattr(type(generation.current()), "published", looks)
            in_thread(lambda: publish(mine))
        assert published() == "gpt2-0"
        assert len(scopes_of_published(mine)) == 1
        assert len(scopes_of_published(pending if fails else other)) == 1


def test_a_build_that_has_begun_keeps_its_scope_when_the_publish_that_moved_it_fails(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending, other = server_args(model("llama")), server_args(model("opt"))
    with _core.run_as(None):
        in_thread(lambda: publish(pending))
        with held(monkeypatch, other, fails=True) as end, of_published(pending):
            assert published() == "llama-0"
            end()
            assert published() == "llama-0"
        with of_published(pending):
            assert published() == "llama-0"
        in_thread(lambda: publish(server_args(model("gpt2"))))
        assert published() == "gpt2-0"


@pytest.mark.parametrize("step", ["keep_pending", "initial value"])
def test_a_configuration_that_cannot_be_put_aside_stays_where_it_is(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Before the decision, and after it: nothing stays claimed or moved."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    pending = server_args(model("llama"))
    with _core.run_as(None):
        in_thread(lambda: publish(pending))
        with monkeypatch.context() as patch:
            if step == "keep_pending":
                patch.setattr(scopes, "keep_pending", interrupt)
            else:
                patch.setattr(runtime_context(), "RuntimeContext", interrupt)
            with pytest.raises(KeyboardInterrupt):
                publish(server_args(model("gpt2")))
        assert published() == "llama-0"
        assert scopes_of_published(pending) == [None]
        in_thread(lambda: publish(server_args(model("opt"))))
        assert published() == "opt-0"
        assert len(scopes_of_published(pending)) == 1


def runtime_context() -> Any:
    from sglang.srt import runtime_context

    return runtime_context
