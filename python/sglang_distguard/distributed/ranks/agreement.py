"""Ranks agree before they create: they ask under a name, take turns in one order, and report.

The state is in rust/core/src/agreement.rs; this module decides what is reported to the other ranks
and when. Every wait has a deadline. A rank that stops waiting writes that into the log, and the
first entry for a stage counts for all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NoReturn, Optional

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.distributed.ranks import failures, reader
from sglang_distguard.distributed.ranks.ask import Ask
from sglang_distguard.distributed.ranks.creation import creating
from sglang_distguard.distributed.ranks.log import Ranks
from sglang_distguard.errors import DistGuardError
from sglang_distguard.sync import waiting

#: Part of the deadline in which a turn's groups are created; the rest is for reports of the ranks.
_CREATE = 0.8
#: Seconds for which a rank whose own stage failed reads on in the log for the decision.
_HEAR = 5.0

#: The ask with which the running code builds a runner, until the outcome is reported.
_asked: ContextVar[Optional[Ask]] = ContextVar("sglang_distguard.asked", default=None)
_building: ContextVar[Optional[_Build]] = ContextVar("sglang_distguard.building", default=None)


class _Build:
    """A with block; a context that a task has copied inside may outlive it."""

    is_over = False


class _Wait:
    """Waits for the end of one stage (see ``waiting.Waits``)."""

    #: Seconds between attempts, because the interpreter's exit does not wake this wait.
    patience = 1.0

    def __init__(self, ask: Ask, stage: str) -> None:
        self._ask, self._stage = ask, stage
        self._since = time.monotonic()

    def wait(self, seconds: float) -> None:
        ask = self._ask
        ask.ranks.state.wait(ask.what, ask.round, self._stage, seconds)

    def timed_out(self) -> Exception:
        return _TimedOut(time.monotonic() - self._since)


class _TimedOut(Exception):
    def __init__(self, waited: float) -> None:
        self.waited = waited


def _await(ask: Ask, stage: str, timeout: float) -> None:
    """Wait up to ``timeout`` seconds until all ranks have ended ``stage``.

    Raises the failure that the stage ended with, or what interrupted the wait.
    """
    ranks = ask.ranks
    ask.stage = stage
    what = f"the other ranks ({ask.what}, {stage})"

    def wait(seconds: float) -> tuple[str, Optional[str]]:
        return waiting.until(
            lambda: ask.stands(stage), _Wait(ask, stage), timeout=seconds, what=what
        )

    try:
        if ranks.state.begin_wait(ask.what, ask.round, stage):
            reader.start(ranks)
        try:
            standing = wait(timeout)
        except _TimedOut as error:
            ask.time_out(stage, error.waited)
            ask.is_decided = True
            standing = wait(_HEAR)
    except _TimedOut:
        unheard = failures.unheard(_HEAR)
        raise ask.error(stage, unheard) from None
    except BaseException as error:  # an interrupt, say: other ranks must not wait for this one
        ask.abort(stage, error)
        if stage in ("ask", "begin"):
            _learn_whether_it_began(ask)
        raise
    finally:
        ranks.state.end_wait(ask.what, ask.round, stage)
    if standing[0] == "failed":
        ask.is_decided = True
        raise ask.error(stage, standing[1] or "")


def _learn_whether_it_began(ask: Ask) -> None:
    """Wait until the log shows whether the turn began, or how it ended.

    This rank has written an entry before, which decides at the latest. An earlier entry takes
    precedence.
    """
    state = ask.ranks.state

    def is_known() -> Optional[bool]:
        if state.began(ask.what, ask.round) is not None or ask.stands("turn") is not None:
            return True
        return None

    with suppress(Exception):
        waiting.until(
            is_known,
            _Wait(ask, "turn"),
            timeout=_HEAR,
            what=f"the log ({ask.what})",
        )


@contextmanager
def _store_errors(ask: Ask, stage: str) -> Iterator[None]:
    """Raise StoreLost when torch reports that the store cannot be reached."""
    import torch.distributed as dist

    try:
        yield
    except dist.DistError as error:
        reason = failures.lost(failures.describe(error))
        raise ask.error(stage, reason) from error


@contextmanager
def turn(
    ranks: Ranks,
    what: str,
    spec: Mapping[str, Any],
    *,
    keep: bool = False,
    creates: bool = True,
    undo: Callable[[str], object] = lambda _: None,
    users: Any = None,
    is_block: bool = False,
) -> Iterator[Ask]:
    """Run the with block once all ranks have asked for the same; turns have one order on all ranks.

    Process groups created inside have names that the ranks agreed on, and the deadline. A turn
    inside another turn is part of it. Each stage may take ``agreement_timeout`` seconds; the wait
    for other turns may take ``timeout`` seconds (``settings``).

    Args:
        ranks: the ranks that must agree.
        what: the name that all ranks use: "runner NAME", "world" …
        spec: JSON values that must be equal on all ranks.
        keep: remember the ask for the runner that the running code builds (``building``).
        creates: whether something is created; otherwise the turn computes with what exists.
        undo: called, with the reason in words, when this or another rank failed and any rank may
            have entered the turn;
            no other turn begins here before it returns. If nothing is created, another thread may
            call it, while the with block runs.
        users: kept with the ask.
        is_block: whether the with block is one of user code, with several steps.

    Raises:
        DistGuardError: something was to be created within a with block of user code.
        AmbiguousBuild: another thread of this process works under the same name.
        RanksDisagree, AgreementTimeout, RankFailed, StoreLost: see ``errors``. All ranks raise.
        Whatever the with block raised, on the rank where it did; the others raise RankFailed.
    """
    outer = turn_in_force()
    if outer is not None:
        if creates and outer.is_block:
            raise _build_within(outer, what)
        yield outer
        return
    chosen = settings.current()
    deadline = chosen.agreement_timeout
    ask = Ask(
        ranks, what, ranks.state.begin(what), deadline, creates, undo, users, is_block=is_block
    )
    turn_of_code = ExitStack()
    try:
        ranks.alive.begin(ask)
        turn_of_code.enter_context(_core.in_turn(ask))
        with _store_errors(ask, "ask"):
            _tell_and_await(ask, "ask", {"spec": dict(spec)})
            # Other turns may come first: this waits for them, not for ranks.
            _await(ask, "begin", chosen.timeout)
        try:
            ask.enter_turn()
            with creating(deadline * _CREATE, ask.prefix, ranks.store) as ask.creation:
                yield ask
        except BaseException as error:
            ask.leave_turn()
            explain(ask, "turn", error)
        ask.leave_turn()
        with _store_errors(ask, "turn"):
            _tell_and_await(ask, "turn", {})
    except BaseException as error:
        if not ask.is_decided:  # an interrupt between two stages: other ranks must not wait
            ask.abort(ask.stage, error)
        ranks.alive.end(ask)
        try:
            if ask.may_have_begun():
                ask.undo_once(error)
        finally:
            ranks.state.end(what)
        raise
    finally:
        ask.has_left_turn = True
        turn_of_code.close()
        ranks.state.leave(what, ask.round)
        if not (keep and _is_building()):  # otherwise the build ends it
            ranks.alive.end(ask)
    if keep:
        _asked.set(ask)
    else:
        ranks.state.end(what)


def _tell_and_await(ask: Ask, stage: str, report: Mapping[str, Any]) -> None:
    try:
        ask.tell(stage, report)
    except BaseException as error:  # interrupted: the report may not have arrived
        ask.abort(stage, error)
        raise
    _await(ask, stage, ask.deadline)


def explain(ask: Ask, stage: str, error: BaseException) -> NoReturn:
    """Report ``error`` to the other ranks, and raise it or the failure of another rank behind it.

    Raises:
        RankFailed, AgreementTimeout: ``error`` occurred because another rank failed or is silent.
        ``error`` itself: in all other cases.
    """
    verdict = None
    with suppress(Exception):  # without a store no rank can be told; ``error`` is enough
        ask.tell(stage, failures.report(error))
        is_ended = stage == "turn" and ask.was_ended and isinstance(error, Exception)
        if is_ended or failures.is_consequence(error):
            verdict = _verdict(ask, stage)
    if verdict is None:
        raise error
    raise verdict from error


def _verdict(ask: Ask, stage: str) -> Optional[DistGuardError]:
    try:
        _await(ask, stage, min(_HEAR, ask.deadline) if stage == "build" else ask.deadline)
    except DistGuardError as verdict:
        return verdict
    return None


@contextmanager
def building(*, asks: bool = False) -> Iterator[None]:
    """Tell the other ranks if the with block, which builds a runner, raises.

    A build inside another such with block is part of it.

    Args:
        asks: the block itself asks the other ranks. An earlier ask of the running code that no
            build has used is over then.

    Raises:
        RankFailed, AgreementTimeout: the block raised because another rank failed or is silent.
        Whatever the block raised, in all other cases.
    """
    if _is_building():
        yield
        return
    if asks:
        _forget_asked()
    build = _Build()
    token = _building.set(build)
    try:
        earlier = asked()
        if earlier is not None:
            earlier.ranks.alive.begin(earlier)
        yield
    except BaseException as error:
        ask = asked()
        if ask is None:
            raise
        explain(ask, "build", error)
    finally:
        build.is_over = True
        _building.reset(token)
        _forget_asked()


def _is_building() -> bool:
    build = _building.get()
    return build is not None and not build.is_over


def _forget_asked() -> None:
    ask = asked()
    if ask is not None:
        ask.ranks.alive.end(ask)
        ask.has_built = True
        _asked.set(None)
        ask.ranks.state.end(ask.what)


def built() -> None:
    """Report that the runner is complete on this rank, and wait until it is on all ranks.

    Raises:
        RankFailed: another rank's build failed.
        AgreementTimeout: another rank's build did not end within ``agreement_timeout`` seconds.
        StoreLost: the store cannot be reached.
    """
    ask = asked()
    if ask is not None:
        with _store_errors(ask, "build"):
            _tell_and_await(ask, "build", {})


def asked() -> Optional[Ask]:
    """Return the ask with which the running code builds a runner; None without one."""
    ask = _asked.get()
    return None if ask is None or ask.has_built else ask


def has_turn() -> bool:
    """Whether the running code is in a turn."""
    return turn_in_force() is not None


def turn_in_force() -> Optional[Ask]:
    """Return the turn that the running code is in; None if it is in none, or that is over."""
    execution = _core.current_execution()
    ask: Optional[Ask] = None if execution is None else execution.turn
    return None if ask is None or ask.has_left_turn else ask


def _build_within(block: Ask, what: str) -> DistGuardError:
    return DistGuardError(
        f"{what} cannot be built within a block of sglang_distguard.turn ({block.what}): the ranks "
        "would have to agree on it in a turn of its own, which begins when this one has ended. "
        "Build before the block or after it.",
        name=what,
        turn=block.what,
    )
