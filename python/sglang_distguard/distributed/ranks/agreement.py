"""Ranks agree before they create: they ask under a name, take turns in one order, and report.

The state is in rust/core/src/agreement.rs; this module decides what is reported to the other ranks
and when. Every wait has a deadline. A rank that stops waiting writes that into the log, and the
first entry for a stage counts for all ranks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, Optional

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.distributed.ranks import failures
from sglang_distguard.distributed.ranks.creation import creating
from sglang_distguard.distributed.ranks.log import PREFIX, Ranks
from sglang_distguard.errors import DistGuardError
from sglang_distguard.sync import waiting

#: Part of the deadline in which a turn's groups are created; the rest is for reports of the ranks.
_CREATE = 0.8
_READER = "distguard-ranks"
#: Stages that end with an entry in the log.
_ENDS = ("ask", "turn", "build")
#: Seconds for which a rank whose own stage failed reads on in the log for the decision.
_HEAR = 5.0

#: The ask with which the running code builds a runner, until the outcome is reported.
_asked: ContextVar[Optional[Ask]] = ContextVar("sglang_distguard.asked", default=None)
_building: ContextVar[Optional[_Block]] = ContextVar("sglang_distguard.building", default=None)


class _Block:
    """A with block; a context that a task has copied inside may outlive it."""

    is_over = False


@dataclass
class Ask:
    """One round of one name.

    Attributes:
        ranks: the ranks that must agree.
        what: the name that all ranks use: "runner NAME", "world" …
        round: number of earlier attempts under this name.
        deadline: seconds for each stage.
        creates: whether the turn creates something; otherwise it computes with what exists.
        has_left_turn: whether the turn is over on this rank.
        has_built: whether the build that uses it is over on this rank.
    """

    ranks: Ranks
    what: str
    round: int
    deadline: float
    creates: bool = True
    has_left_turn: bool = False
    has_built: bool = False

    @property
    def name(self) -> str:
        """The runner's name without "runner "."""
        return self.what.removeprefix("runner ")

    @property
    def known_as(self) -> str:
        """Name and round: equal on all ranks, and unique in this world."""
        return f"{self.what} #{self.round}"

    @property
    def prefix(self) -> str:
        """Prefix of the names of process groups that are created in the turn."""
        return f"{PREFIX}/{self.ranks.generation}/{self.what}/{self.round}:"

    def _key(self, stage: str, *, before: int = 0) -> str:
        return f"{self.what}/{self.round - before}/{stage}"

    def tell(self, stage: str, report: Mapping[str, Any]) -> None:
        """Report to the other ranks; the last rank to report judges and writes the stage's end."""
        key = self._key(stage)
        if self.ranks.state.arrive(self.what, self.round, stage) and self.ranks.tell(key, report):
            judge = failures.disagree if stage == "ask" else failures.failed
            self.write(stage, judge(self.ranks.told(key)))
            self._tidy(stage)

    def _tidy(self, stage: str) -> None:
        """Delete earlier stages from the store: all ranks have reported ``stage`` and left them."""
        left = {
            "ask": [self._key("turn", before=1), self._key("build", before=1)],
            "turn": [self._key("ask")],
            "build": [self._key("turn")],
        }[stage]
        read = self.ranks.state.outlived(self.what, self.round, stage)
        keys = [] if stage == "ask" and self.round == 0 else left
        told = [part for key in keys for part in (key, f"{key}/told")]
        self.ranks.tidy(*told, *(f"log/{index}" for index in read))

    def write(self, stage: str, failure: Optional[str]) -> None:
        """Write into the log that ``stage`` has ended; ``failure`` is None if it passed."""
        self.ranks.write(
            {"name": self.what, "round": self.round, "stage": stage, "failure": failure}
        )

    def stands(self, stage: str) -> Optional[tuple[str, Optional[str]]]:
        """Return how ``stage`` ended; None while it is open.

        When "begin" has passed, this rank is in the turn.
        """
        state = self.ranks.state
        standing = (
            state.enter(self.what, self.round)
            if stage == "begin"
            else state.stands(self.what, self.round, stage)
        )
        return None if standing[0] == "open" else standing

    def error(self, stage: str, failure: str) -> DistGuardError:
        """Return the error that this rank raises for a ``failure`` of ``stage``."""
        rank = self.ranks.rank
        return failures.error_of(self.what, stage, rank, failure, creates=self.creates)

    def time_out(self, stage: str, waited: float) -> None:
        """Write that ``stage`` timed out here after ``waited`` seconds, and what is missing."""
        ranks = self.ranks
        if stage == "begin":
            self.write("turn", failures.queued(ranks.rank, ranks.state.turn(), waited))
            return
        told = ranks.told(self._key(stage))
        self.write(stage, failures.missing(ranks.rank, told, ranks.size, waited))

    def abort(self, stage: str, error: BaseException) -> None:
        """Write that this rank left ``stage`` because of ``error``; earlier entries still count."""
        with suppress(Exception):  # without a store no rank can be told
            failure = failures.failed({self.ranks.rank: failures.report(error)})
            # The stage may have passed on the other ranks already: then the next stage fails.
            for later in _ENDS[_ENDS.index("turn" if stage == "begin" else stage) :]:
                self.write(later, failure)

    def may_have_begun(self) -> bool:
        """Whether any rank may have entered the turn."""
        return self.ranks.state.began(self.what, self.round) is not False


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
    what = f"the other ranks ({ask.what}, {stage})"

    def wait(seconds: float) -> tuple[str, Optional[str]]:
        return waiting.until(
            lambda: ask.stands(stage), _Wait(ask, stage), timeout=seconds, what=what
        )

    try:
        if ranks.state.begin_wait(ask.what, ask.round, stage):
            _start_reader(ranks)
        try:
            standing = wait(timeout)
        except _TimedOut as error:
            ask.time_out(stage, error.waited)
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


def _start_reader(ranks: Ranks) -> None:
    # It ends with the last wait. It is a daemon because it may be asleep in the store.
    try:
        threading.Thread(target=_read, args=(ranks,), name=_READER, daemon=True).start()
    except BaseException:
        ranks.state.end_reading()
        raise


def _read(ranks: Ranks) -> None:
    """Read the log and apply its entries while a thread of this process waits for them."""
    while (index := ranks.state.next_to_read()) is not None:
        try:
            entry = ranks.read(index)
            if entry is not None:
                if entry["by"] == ranks.rank:
                    ranks.state.read_own(index)
                ranks.state.apply(
                    index, entry["name"], entry["round"], entry["stage"], entry["failure"]
                )
        except Exception as error:  # any error must reach the threads that wait
            ranks.state.lose(failures.lost(failures.describe(error)))


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
    undo: Callable[[], object] = lambda: None,
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
        undo: called when this or another rank failed and any rank may have entered the turn;
            no other turn begins here before it returns.

    Raises:
        AmbiguousBuild: another thread of this process works under the same name.
        RanksDisagree, AgreementTimeout, RankFailed, StoreLost: see ``errors``. All ranks raise.
        Whatever the with block raised, on the rank where it did; the others raise RankFailed.
    """
    outer = _turn_in_force()
    if outer is not None and not outer.has_left_turn:
        yield outer
        return
    chosen = settings.current()
    deadline = chosen.agreement_timeout
    ask = Ask(ranks, what, ranks.state.begin(what), deadline, creates)
    turn_of_code = ExitStack()
    try:
        turn_of_code.enter_context(_core.in_turn(ask))
        with _store_errors(ask, "ask"):
            _tell_and_await(ask, "ask", {"spec": dict(spec)})
            # Other turns may come first: this waits for them, not for ranks.
            _await(ask, "begin", chosen.timeout)
        try:
            with creating(deadline * _CREATE, ask.prefix, ranks.store):
                yield ask
        except BaseException as error:
            explain(ask, "turn", error)
        with _store_errors(ask, "turn"):
            _tell_and_await(ask, "turn", {})
    except BaseException:
        try:
            if ask.may_have_begun():
                undo()
        finally:
            ranks.state.end(what)
        raise
    finally:
        ask.has_left_turn = True
        turn_of_code.close()
        ranks.state.leave(what, ask.round)
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
        RankFailed, AgreementTimeout: ``error`` occurred because another rank failed or is gone.
        ``error`` itself: in all other cases.
    """
    verdict = None
    with suppress(Exception):  # without a store no rank can be told; ``error`` is enough
        ask.tell(stage, failures.report(error))
        if failures.is_consequence(error):
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
        RankFailed, AgreementTimeout: the block raised because another rank failed or is gone.
        Whatever the block raised, in all other cases.
    """
    outer = _building.get()
    if outer is not None and not outer.is_over:
        yield
        return
    if asks:
        _forget_asked()
    block = _Block()
    token = _building.set(block)
    try:
        yield
    except BaseException as error:
        ask = asked()
        if ask is None:
            raise
        explain(ask, "build", error)
    finally:
        block.is_over = True
        _building.reset(token)
        _forget_asked()


def _forget_asked() -> None:
    ask = asked()
    if ask is not None:
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
    ask = _turn_in_force()
    return ask is not None and not ask.has_left_turn


def _turn_in_force() -> Optional[Ask]:
    """Return the turn that the running execution carries, even if it is over."""
    execution = _core.current_execution()
    return None if execution is None else execution.turn


def close(ranks: Ranks, seconds: float) -> None:
    """End the reader within ``seconds`` seconds, because the process exits.

    A daemon thread that returns from a call into torch after the interpreter's end aborts the
    process.
    """
    ranks.state.lose(failures.lost("this process exits"))
    with suppress(Exception):
        if ranks.state.is_reading():
            ranks.write({"name": "(exit)", "round": 0, "stage": "build", "failure": None})
        until = time.monotonic() + seconds
        for thread in threading.enumerate():
            if thread.name == _READER:
                _join(thread, until)


def _join(thread: threading.Thread, until: float) -> None:
    """Join ``thread``, even if another thread is just starting it and it cannot be joined yet."""
    while thread in threading.enumerate():
        left = until - time.monotonic()
        if left <= 0:
            return
        try:
            thread.join(left)
        except RuntimeError:
            time.sleep(0.001)
